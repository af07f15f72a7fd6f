"""shampoo: Shampoo without master weights in one call, and its step as a transformation."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.optimizers import build, kronecker
from eco_optax.optimizers.kronecker import Sides, average, divide, rotate, rotate_back
from eco_optax.quantized_array import Rounding, Where
from eco_optax.transforms.momentum import flat

Grafting = Literal["none", "adam"]


class ScaleByShampooState(NamedTuple):
  """State of `scale_by_shampoo`.

  For the error feedback it says what its step makes of a momentum, and the reverse.
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32. Steps taken.
  mu: optax.Updates  # Momentum.
  nu: optax.Updates  # Second moment plus ε² where Adam's step is needed; masked elsewhere.
  left: optax.Updates  # L, the mean or sum of G Gᵀ, (…, m, m); masked where a side has none.
  right: optax.Updates  # R, of Gᵀ G, (…, n, n).
  left_basis: optax.Updates  # Eigenvectors of L at the last refreshment.
  right_basis: optax.Updates
  left_values: optax.Updates  # Its eigenvalues with what is added to them, (…, m).
  right_values: optax.Updates
  graft: optax.Updates  # The factor of each matrix's update, (…, 1, 1); masked without grafting.

  def _of(self, path: str) -> tuple[Sides, jax.Array]:
    """Bases and denominator of a leaf."""
    at = lambda tree: flat(tree).get(path)
    bases = Sides(at(self.left_basis), at(self.right_basis))
    values = Sides(at(self.left_values), at(self.right_values))
    if values.left is None and values.right is None:
      return bases, jnp.sqrt(flat(self.nu)[path])
    return bases, _denominator(values)

  def precondition(self, path: str, momentum: jax.Array) -> jax.Array:
    """L^(−1/4) M R^(−1/4) for the leaf at `path`; the factor of grafting is not in it."""
    bases, denominator = self._of(path)
    return _times(momentum, bases, denominator)

  def unprecondition(self, path: str, update: jax.Array) -> jax.Array:
    """Its inverse, L^(1/4) U R^(1/4)."""
    bases, denominator = self._of(path)
    return rotate_back(rotate(update, bases) * denominator, bases)


def _denominator(values: Sides) -> jax.Array:
  """The roots of all products of eigenvalues: fourth roots, or square roots of the only side."""
  if values.right is None:
    return jnp.sqrt(values.left[..., :, None])
  if values.left is None:
    return jnp.sqrt(values.right[..., None, :])
  return (values.left[..., :, None] ** 0.25) * (values.right[..., None, :] ** 0.25)


def _times(x: jax.Array, bases: Sides, denominator: jax.Array) -> jax.Array:
  return rotate_back(divide(rotate(x, bases), denominator), bases)


def _norm(x: jax.Array) -> jax.Array:
  """Of each matrix, (…, 1, 1)."""
  return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def scale_by_shampoo(
  b1: float = 0.9,
  b2: float = 0.99,
  eps: float = 1e-8,
  matrix_eps: float = 1e-6,
  mu_dtype: Any = None,
  precondition_frequency: int = 10,
  max_precond_dim: int = 10_000,
  matrices: Where | None = None,
  grafting: Grafting = "none",
) -> optax.GradientTransformation:
  r"""Rescales updates by Shampoo, with a momentum in front of the preconditioner.

  For a matrix with gradient G and momentum M:

  .. math::
    L \leftarrow β_2 L + (1 - β_2) G G^T, \quad R \leftarrow β_2 R + (1 - β_2) G^T G, \quad
    U = L^{-1/4} M R^{-1/4}

  The means have no bias. The roots come from an `eigh` at the first step and then every
  `precondition_frequency` steps. A matrix with one factor alone takes its root −1/2; all other
  leaves take Adam's step, with the same β1 and β2.

  Args:
    b1: decay of the momentum.
    b2: decay of the factors, and of the second moment where Adam's step is taken. 1 adds up all
      gradients, as in the paper.
    eps: of the denominator of Adam's step, inside the root as ε².
    matrix_eps: added to the eigenvalues of a factor, in units of the largest.
    mu_dtype: of the momentum; None is the parameters'.
    precondition_frequency: steps between two refreshments of the roots.
    max_precond_dim: a side of a matrix that is longer has no factor.
    matrices: as in `eco_optax.soap`.
    grafting: `"adam"` gives the update of each matrix the size that Adam's would have, so that its
      learning rates serve: the factor is the ratio of both sizes for the gradient of the step, not
      for the momentum, of which the update stays a linear function. It keeps a second moment.
      `"none"` leaves Shampoo's own size, whose root mean square is about 1/sqrt(max(m, n)).

  Returns:
    A `GradientTransformation`. Chain it with a learning rate, as any of Optax's `scale_by_*`.

  Raises:
    ValueError: at `init`, naming the leaf, for three axes or more that `matrices` does not know.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> tx = optax.chain(eco.scale_by_shampoo(), optax.scale_by_learning_rate(1e-2))
    >>> state = tx.init({"w": jnp.ones((4, 6)), "b": jnp.ones(6)})
    >>> state[0].left["w"].shape, state[0].right_values["w"].shape, state[0].nu["w"]
    ((4, 4), (6,), MaskedNode())

  References:
    Gupta et al, `Shampoo: Preconditioned Stochastic Tensor Optimization
    <https://arxiv.org/abs/1802.09568>`_, 2018, Algorithm 1. Anil et al, `Scalable Second Order
    Optimization for Deep Learning <https://arxiv.org/abs/2002.09018>`_, 2020 (grafting).
  """
  build.require_numbers(None, b1=b1, b2=b2, eps=eps, matrix_eps=matrix_eps)
  kronecker.require_whole("precondition_frequency", precondition_frequency)
  kronecker.require_whole("max_precond_dim", max_precond_dim)
  if grafting not in ("none", "adam"):
    raise ValueError(f"grafting must be 'none' or 'adam', got {grafting!r}")
  grafts = grafting == "adam"

  def init(params: Any) -> ScaleByShampooState:
    factors = kronecker.init_factors(params, matrices, max_precond_dim, "eco_optax.shampoo")
    have_factors = kronecker.sides(*factors)
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, kronecker.float_of(x)), params)

    def only(keep: Any, make: Any) -> Any:
      put = lambda path, x: make(x) if keep(path) else optax.MaskedNode()
      return trees.map_with_path(put, zeros)

    bases = jax.tree.map(jnp.zeros_like, factors)
    values = jax.tree.map(lambda x: jnp.zeros_like(x[..., 0]), factors)
    return ScaleByShampooState(
      count=jnp.zeros([], jnp.int32),
      mu=jax.tree.map(lambda x: jnp.zeros_like(x, mu_dtype), params),
      nu=only(lambda path: grafts or path not in have_factors, lambda x: x),
      left=factors.left,
      right=factors.right,
      left_basis=bases.left,
      right_basis=bases.right,
      left_values=values.left,
      right_values=values.right,
      graft=only(lambda path: grafts and path in have_factors, lambda x: x[..., :1, :1]),
    )

  def decomposed(factors: dict[str, Sides], *_: Any) -> tuple[dict[str, Sides], dict[str, Sides]]:
    """Damped eigenvalues and eigenvectors of all factors."""
    values, bases = {}, {}
    for path, own in factors.items():
      pairs = [None if x is None else kronecker.eigenbasis(x) for x in own]
      bases[path] = Sides(*(pair and pair[1] for pair in pairs))
      values[path] = Sides(*(pair and _damped(pair[0]) for pair in pairs))
    return values, bases

  def _damped(values: jax.Array) -> jax.Array:
    positive = jnp.maximum(values, 0)
    return positive + matrix_eps * positive[..., :1]  # The largest comes first.

  def update(
    updates: Any, state: ScaleByShampooState, params: Any = None
  ) -> tuple[Any, ScaleByShampooState]:
    del params
    t = optax.safe_increment(state.count)
    gradients, mu = kronecker.as_float(updates), flat(state.mu)
    nu, graft = flat(state.nu), flat(state.graft)
    factors = {
      path: kronecker.updated(own, gradients[path], b2, t)
      for path, own in kronecker.sides(state.left, state.right).items()
    }
    values, bases = jax.lax.cond(
      (t - 1) % precondition_frequency == 0,
      decomposed,
      lambda _, values, bases: (values, bases),
      factors,
      kronecker.sides(state.left_values, state.right_values),
      kronecker.sides(state.left_basis, state.right_basis),
    )
    directions = {}
    for path, gradient in gradients.items():
      momentum = b1 * mu[path].astype(gradient.dtype) + (1 - b1) * gradient
      mu[path] = momentum.astype(mu[path].dtype)
      mean = momentum / kronecker.bias(b1, t, gradient.dtype)
      if path in nu:
        nu[path] = average(nu[path], gradient**2 + eps**2, b2, t)
      if path not in factors:
        directions[path] = divide(mean, jnp.sqrt(nu[path]))
        continue
      denominator = _denominator(values[path])
      directions[path] = _times(mean, bases[path], denominator)
      if path in graft:
        wanted = _norm(divide(gradient, jnp.sqrt(nu[path])))
        found = _norm(_times(gradient, bases[path], denominator))
        graft[path] = jnp.where(found > 0, divide(wanted, found), graft[path])
        directions[path] = graft[path] * directions[path]

    put = lambda leaves, tree: trees.map_with_path(lambda path, _: leaves[path], tree)
    new_state = ScaleByShampooState(
      t,
      put(mu, state.mu),
      put(nu, state.nu),
      *kronecker.trees_of(factors, updates),
      *kronecker.trees_of(bases, updates),
      *kronecker.trees_of(values, updates),
      put(graft, state.graft),
    )
    as_updates = lambda path, u: directions[path].astype(u.dtype)
    return trees.map_with_path(as_updates, updates), new_state

  return optax.GradientTransformation(init, update)


def shampoo(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.99,
  eps: float = 1e-8,
  matrix_eps: float = 1e-6,
  mu_dtype: Any = None,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  precondition_frequency: int = 10,
  max_precond_dim: int = 10_000,
  matrices: Where | None = None,
  grafting: Grafting = "none",
  max_norm: float | None = None,
  rounding: Rounding = "stochastic",
  seed: int = 0,
  format: Format | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Shampoo without master weights, and ECO.

  A weight's error goes into the momentum as L^(1/4) E R^(1/4), so that it comes back in full. A
  step costs what Shampoo's does, and for each matrix what `eco_optax.soap` adds.

  Args:
    learning_rate: a number or a schedule; the rule follows it.
    b1: as in `scale_by_shampoo`.
    b2: as in `scale_by_shampoo`.
    eps: as in `scale_by_shampoo`.
    matrix_eps: as in `scale_by_shampoo`.
    mu_dtype: as in `scale_by_shampoo`.
    weight_decay: decoupled, as in `optax.adamw`.
    mask: as in `optax.adamw`.
    precondition_frequency: as in `scale_by_shampoo`.
    max_precond_dim: as in `scale_by_shampoo`. The sides of a matrix take 8 (m² + n²) bytes.
    matrices: as in `eco_optax.soap`.
    grafting: as in `scale_by_shampoo`.
    max_norm: clips the gradients' global norm, if given.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    format: as in `quantize_params`.
    where: as in `quantize_params`.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`.

  Raises:
    ValueError: naming the hyperparameter, if one is not a number; at `init`, naming the leaf, for
      three axes or more that `matrices` does not know.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, eco.FP8)
    >>> tx = eco.shampoo(3e-3, grafting="adam")
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, state, params)

  References:
    Gupta et al, `Shampoo <https://arxiv.org/abs/1802.09568>`_, 2018. Nikdan et al, `ECO
    <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  build.require_numbers(
    learning_rate, b1=b1, b2=b2, eps=eps, matrix_eps=matrix_eps, weight_decay=weight_decay,
    max_norm=max_norm,
  )  # fmt: skip
  optimizer = optax.chain(
    scale_by_shampoo(
      b1, b2, eps, matrix_eps, mu_dtype, precondition_frequency, max_precond_dim, matrices, grafting
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return build.without_master_weights(
    optimizer, None, learning_rate, max_norm, keep_error=False, momentum=b1,
    format=format, where=where, rounding=rounding, seed=seed,
  )  # fmt: skip
