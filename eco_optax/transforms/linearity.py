"""Whether an update is a linear function of its momentum that can be inverted; found by trying."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

Leaves = dict[str, jax.Array]  # Arrays by the `/`-joined path of their parameter.

# Of the largest element, by which two sides of an equation may differ in float32.
TOLERANCE = 1e-2
# Of the largest eigenvalue of J, below which one counts as zero.
_SINGULAR = 1e-5
# What homogeneity is asked with: a norm that is clipped shows at large momenta only.
_LARGE = np.float32(1e4)


@runtime_checkable
class Preconditioner(Protocol):
  """A state with a momentum of which the optimizer's update is K m, K linear and known.

  The rest of the optimizer, such as its learning rate, may multiply K by one factor per matrix.
  """

  def precondition(self, path: str, momentum: jax.Array) -> jax.Array:
    """K m of the leaf at a path, in the step that left this state."""

  def unprecondition(self, path: str, update: jax.Array) -> jax.Array:
    """K⁻¹ u."""


def factor_between(j: jax.Array, k: jax.Array) -> jax.Array:
  """The c of J = c K for each matrix, the last two axes, from J 1 and K 1; 0 where K 1 is 0."""
  axes = (-2, -1) if j.ndim >= 2 else None
  total = lambda x: jnp.sum(x, axis=axes, keepdims=True)
  squares = total(k * k)
  return jnp.where(squares > 0, total(j * k) / jnp.where(squares > 0, squares, 1), 0)


class Sample(NamedTuple):
  """A step from some momentum, other state being fixed; NumPy arrays by path."""

  updates: Leaves
  along: Leaves  # J d, along a direction d.
  by_momentum: Leaves  # J 1
  decay: Leaves  # B 1
  preconditioners: dict[str, Preconditioner]


def faults(
  sample: Callable[[Leaves, Leaves], Sample],
  momentum: Leaves,
  draw: Callable[[], Leaves],
  paths: tuple[str, ...],
) -> dict[str, str]:
  """Why updates cannot be inverted as linear functions of their momenta, by path.

  With f(d) the change of a step by a change d of the momentum, and random a and b, it asks for
  additivity f(a + b) = f(a) + f(b), homogeneity f(10⁴ a) = 10⁴ f(a), the derivative J a = f(a), and
  that no leaf's update depends on another's momentum, to within 1% of the largest element. Of J
  itself, column by column, it asks that it is symmetric, definite and invertible; or, where the
  state knows a preconditioner K, that J = c K and K⁻¹ K = 1.

  Args:
    sample: (momentum, direction) → a step.
    momentum: of all leaves.
    draw: random normal arrays in their shapes.
    paths: of the leaves that are meant.

  Returns:
    A message for each leaf that has a fault.
  """

  def random() -> Leaves:
    size = lambda m: jnp.sqrt(jnp.mean(jnp.square(m)))
    drawn = draw()
    return {path: drawn[path].astype(m.dtype) * size(m) for path, m in momentum.items()}

  a, b = random(), random()
  start = sample(momentum, a)

  def moved(d: Leaves) -> Leaves:
    updates = sample({path: m + d[path] for path, m in momentum.items()}, a).updates
    return {path: u - start.updates[path] for path, u in updates.items()}

  by_a, by_b = moved(a), moved(b)
  by_both = moved({path: a[path] + b[path] for path in a})
  by_large = moved({path: _LARGE * x for path, x in a.items()})
  # Another factor for each leaf; where leaves are apart J a is multiplied by it.
  factors = {p: np.float32((-1) ** i * (1 + i / len(momentum))) for i, p in enumerate(momentum)}
  apart = sample(momentum, {path: factors[path] * x for path, x in a.items()}).along

  def jacobian(path: str) -> np.ndarray:
    zeros, columns = jax.tree.map(jnp.zeros_like, a), []
    for i in range(a[path].size):
      one = zeros[path].ravel().at[i].set(1).reshape(zeros[path].shape)
      columns.append(np.ravel(sample(momentum, zeros | {path: one}).along[path]))
    return np.stack(columns, axis=1)

  def fault(path: str) -> str | None:
    if not (
      agree(by_both[path], by_a[path] + by_b[path])
      and agree(by_large[path], _LARGE * by_a[path])
      and agree(start.along[path], by_a[path])
    ):
      return (
        "the update is neither element-wise nor linear in its momentum (a norm, a trust ratio or a"
        " matrix function follows it), so a quantization error cannot be paid back through it"
      )
    if not agree(apart[path], factors[path] * start.along[path]):
      return (
        "the update depends on the momentum of another leaf, so that a quantization error put in"
        " one would move both"
      )
    if np.ptp(start.decay[path]) > TOLERANCE:
      return (
        "the update mixes elements of a momentum that decay at different rates, so that it is not"
        " known how much of a quantization error comes back"
      )
    if path in start.preconditioners:
      return _unknown(start.preconditioners[path], path, start, a[path])
    return _not_definite(jacobian(path))

  found = {path: fault(path) for path in paths}
  return {path: message for path, message in found.items() if message}


def agree(x: jax.Array | np.ndarray, y: jax.Array | np.ndarray) -> bool:
  """Whether two arrays are equal to within `TOLERANCE` of their largest element."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  largest = max(np.max(np.abs(x), initial=0), np.max(np.abs(y), initial=0))
  return bool(np.max(np.abs(x - y), initial=0) <= TOLERANCE * largest)


def _unknown(state: Preconditioner, path: str, start: Sample, a: jax.Array) -> str | None:
  """Why a state does not know its preconditioner, if it does not."""
  ones, image = state.precondition(path, jnp.ones_like(a)), state.precondition(path, a)
  factor = factor_between(start.by_momentum[path], ones)
  back = state.unprecondition(path, image)
  if agree(start.along[path], factor * image) and agree(back, a):
    return None
  return (
    f"{type(state).__name__} has precondition and unprecondition, but the update of a random"
    " momentum is not a multiple of the one, or the other is not its inverse"
  )


def _not_definite(j: np.ndarray) -> str | None:
  """Why conjugate residuals cannot invert a Jacobian, if they cannot."""
  if not agree(j, j.T):
    return (
      "the update is linear in its momentum, but its Jacobian is not symmetric, so that the rule"
      " cannot invert it: give the optimizer's state the methods precondition and unprecondition"
    )
  values = np.linalg.eigvalsh(((j + j.T) / 2).astype(np.float64))
  values = values * np.sign(values[np.argmax(np.abs(values))])
  if values.min() < _SINGULAR * values.max():
    return (
      "the update is linear in its momentum, but a part of it is missing or has the other sign (its"
      " Jacobian is symmetric and not definite, as behind optax.centralize), so that a quantization"
      " error put there is lost"
    )
  return None
