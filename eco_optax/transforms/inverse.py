"""J⁻¹: what of a momentum moves the weights by a given amount.

An update that is linear in its momentum, u = J m + …, is inverted in one of three ways:

- element by element, where J is diagonal;
- by what the optimizer's state knows of it, where it has `precondition` and `unprecondition`;
- by conjugate residuals on J, where it is symmetric and definite, as every preconditioner is:
  L^(−1/4) ⊗ R^(−1/4) and Q D Qᵀ have products of positive numbers for eigenvalues.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax.transforms.linearity import Leaves, Preconditioner, factor_between
from eco_optax.transforms.momentum import Derivatives

# Below this |J| the update does not feel the momentum, so that nothing is worth injecting.
SMALLEST_DERIVATIVE = np.float32(1e-30)

# Applications of J in one step of the rule. After k of them the share of an error that is left is
# at most 2 ((√κ − 1) / (√κ + 1))^k, κ being the ratio of J's largest to smallest eigenvalue.
SOLVER_STEPS = 16

# A residual of this share is float32's: from there on a leaf is done.
_SOLVED = 1e-6


class Injection(NamedTuple):
  """What is added to momenta, by path."""

  added: Leaves  # J⁻¹ of what is owed.
  reached: Leaves  # Whether the update feels the momentum there; what it does not feel stays owed.
  unpaid: Leaves  # What conjugate residuals left; only of the leaves that they solved.


def divide(owed: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
  """J⁻¹ of what is owed for an element-wise J, and where it exists."""
  reached = jnp.abs(j) > SMALLEST_DERIVATIVE
  return jnp.where(reached, owed / jnp.where(reached, j, 1), 0), reached


def unprecondition(
  path: str, owed: jax.Array, j: jax.Array, state: Preconditioner
) -> tuple[jax.Array, jax.Array]:
  """J⁻¹ of what is owed for J = c K, where a state knows K and its inverse.

  Args:
    path: of the leaf.
    owed: what its momentum has to move it by.
    j: J 1.
    state: that the step left.

  Returns:
    As `divide`; one flag for all of a matrix.
  """
  factor = factor_between(j, state.precondition(path, jnp.ones_like(owed)))
  added, reached = divide(state.unprecondition(path, owed), factor)
  return added, jnp.broadcast_to(reached, owed.shape)


def conjugate_residuals(
  apply: Callable[[Leaves], Leaves], wanted: Leaves, steps: int = SOLVER_STEPS
) -> tuple[Leaves, Leaves]:
  """Solves J x = wanted for a symmetric definite J that keeps leaves apart.

  Of all x in the span of wanted, J wanted, …, J^(k−1) wanted, it finds the one with the least
  ‖wanted − J x‖ for each leaf, whatever the sign of J. All leaves share an application of J.

  Args:
    apply: J.
    wanted: float32 arrays by path.
    steps: k, the number of applications of J.

  Returns:
    x, and wanted − J x.
  """
  dot = lambda a, b: {path: jnp.vdot(a[path], b[path]) for path in a}
  ratio = lambda a, b: jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)
  add = lambda x, scale, y: {path: x[path] + scale[path] * y[path] for path in x}
  enough = {path: _SOLVED**2 * norm for path, norm in dot(wanted, wanted).items()}

  def turn(_: jax.Array, carry: tuple) -> tuple:
    x, residual, direction, image, energies = carry
    pushed = apply(residual)
    new_energies, norms = dot(residual, pushed), dot(residual, residual)
    share = {path: ratio(new_energies[path], energies[path]) for path in x}
    direction, image = add(residual, share, direction), add(pushed, share, image)
    squares = dot(image, image)
    length = {
      path: jnp.where(norms[path] > enough[path], ratio(new_energies[path], squares[path]), 0)
      for path in x
    }
    less = {path: -length[path] for path in x}
    return add(x, length, direction), add(residual, less, image), direction, image, new_energies

  zeros = jax.tree.map(jnp.zeros_like, wanted)
  nothing = {path: jnp.zeros([], jnp.float32) for path in wanted}
  start = (zeros, wanted, zeros, zeros, nothing)
  x, residual, *_ = jax.lax.fori_loop(0, steps, turn, start)
  return x, residual


def invert(
  step: Derivatives,
  states: Mapping[str, Preconditioner],
  solved: Collection[str],
  owed: Leaves,
) -> Injection:
  """J⁻¹ of what the momentum of each leaf has to move it by.

  Args:
    step: of the optimizer.
    states: the ones that know their preconditioner, by path.
    solved: paths of the leaves for conjugate residuals.
    owed: float32 arrays by path.

  Returns:
    What is added to the momenta.
  """
  added: Leaves = {}
  reached: Leaves = {}
  unpaid: Leaves = {}
  for path, wanted in owed.items():
    j = step.by_momentum[path]
    if path in states:
      added[path], reached[path] = unprecondition(path, wanted, j, states[path])
    elif path not in solved:
      added[path], reached[path] = divide(wanted, j)
  if solved:
    mixed = {path: owed[path] for path in solved}
    found, unpaid = conjugate_residuals(step.linearized(tuple(mixed)), mixed)
    added |= found
    moves = lambda path: jnp.any(jnp.abs(step.by_momentum[path]) > SMALLEST_DERIVATIVE)
    reached |= {path: jnp.broadcast_to(moves(path), owed[path].shape) for path in solved}
  return Injection(added, reached, unpaid)
