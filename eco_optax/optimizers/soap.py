"""soap: SOAP without master weights in one call, and its step as a transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.optimizers import build, kronecker
from eco_optax.optimizers.kronecker import Sides, average, divide, rotate, rotate_back
from eco_optax.quantized_array import Rounding, Where
from eco_optax.transforms.momentum import flat


class ScaleBySoapState(NamedTuple):
  """State of `scale_by_soap`.

  For the error feedback it says what its step makes of a momentum, and the reverse.
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32. Steps taken.
  mu: optax.Updates  # Momentum, in the parameters' own axes.
  nu: optax.Updates  # Second moment plus ε², in the eigenbases; its bias is corrected.
  left: optax.Updates  # E G Gᵀ, (…, m, m); masked where a side has none.
  right: optax.Updates  # E Gᵀ G, (…, n, n).
  left_basis: optax.Updates  # Q_L, whose columns are eigenvectors.
  right_basis: optax.Updates  # Q_R

  @property
  def averaged(self) -> jax.Array:
    """How many gradients the moments know: all but the first."""
    return jnp.maximum(self.count - 1, 0)

  def _of(self, path: str) -> tuple[Sides, jax.Array]:
    """Bases and denominator of a leaf."""
    bases = Sides(flat(self.left_basis).get(path), flat(self.right_basis).get(path))
    return bases, jnp.sqrt(flat(self.nu)[path])

  def precondition(self, path: str, momentum: jax.Array) -> jax.Array:
    """Q_L [(Q_Lᵀ M Q_R) / sqrt(V)] Q_Rᵀ for the leaf at `path`."""
    bases, denominator = self._of(path)
    return rotate_back(divide(rotate(momentum, bases), denominator), bases)

  def unprecondition(self, path: str, update: jax.Array) -> jax.Array:
    """Its inverse, Q_L [(Q_Lᵀ U Q_R) sqrt(V)] Q_Rᵀ."""
    bases, denominator = self._of(path)
    return rotate_back(rotate(update, bases) * denominator, bases)


def scale_by_soap(
  b1: float = 0.95,
  b2: float = 0.95,
  eps: float = 1e-8,
  mu_dtype: Any = None,
  precondition_frequency: int = 10,
  max_precond_dim: int = 10_000,
  matrices: Where | None = None,
) -> optax.GradientTransformation:
  r"""Rescales updates by SOAP: Adam in the eigenbasis of Shampoo's factors.

  For a matrix with gradient G and momentum M, with β1 and β2 as in Adam:

  .. math::
    V \leftarrow β_2 V + (1 - β_2) (Q_L^T G Q_R)^2, \quad
    U = Q_L \left[ (Q_L^T M Q_R) / \sqrt{V + ε^2} \right] Q_R^T

  where Q_L and Q_R are eigenvectors of the means of G Gᵀ and Gᵀ G before this step, which decay
  with β2 too. They come from an `eigh` at the second step, and are brought nearer by one power
  iteration and a QR every `precondition_frequency` steps. V keeps its place when a basis turns.

  The first gradient sets the factors alone and gives no update, and moments do not know it, as in
  the authors' code: in its own eigenbasis a gradient is diagonal, and Adam would blow up the
  roundings beside the diagonal. The longer side of a matrix has a factor without full rank at
  first, and what `eigh` gives there is a matter of roundings: a run on other devices goes another
  way, as after another seed.

  Args:
    b1: decay of the momentum, which is kept in the parameters' own axes.
    b2: decay of the second moment and of the factors.
    eps: of the denominator: the paper's ε is its square.
    mu_dtype: of the momentum; None is the parameters'.
    precondition_frequency: steps between two refreshments of the bases.
    max_precond_dim: a side of a matrix that is longer keeps the identity for a basis.
    matrices: as in `soap`.

  Returns:
    A `GradientTransformation`. Chain it with a learning rate, as any of Optax's `scale_by_*`.

  Raises:
    ValueError: at `init`, naming the leaf, for three axes or more that `matrices` does not know.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> tx = optax.chain(eco.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
    >>> state = tx.init({"w": jnp.ones((4, 6)), "b": jnp.ones(6)})
    >>> state[0].left["w"].shape, state[0].right["w"].shape, state[0].left["b"]
    ((4, 4), (6, 6), MaskedNode())

  References:
    Vyas et al, `SOAP: Improving and Stabilizing Shampoo using Adam
    <https://arxiv.org/abs/2409.11321>`_, 2024, Algorithm 3.
  """
  build.require_numbers(None, b1=b1, b2=b2, eps=eps)
  kronecker.require_whole("precondition_frequency", precondition_frequency)
  kronecker.require_whole("max_precond_dim", max_precond_dim)

  def init(params: Any) -> ScaleBySoapState:
    factors = kronecker.init_factors(params, matrices, max_precond_dim, "eco_optax.soap")
    return ScaleBySoapState(
      jnp.zeros([], jnp.int32),
      jax.tree.map(lambda x: jnp.zeros_like(x, mu_dtype), params),
      jax.tree.map(lambda x: jnp.zeros_like(x, kronecker.float_of(x)), params),
      *factors,
      *jax.tree.map(jnp.zeros_like, factors),
    )

  def refreshed(factors: dict[str, Sides], bases: dict[str, Sides], t: jax.Array) -> Any:
    """The bases that step t works in, from factors of the gradients before it."""
    keep = lambda factors, bases: bases
    decompose = lambda factors, _: jax.tree.map(lambda x: kronecker.eigenbasis(x)[1], factors)
    turn = lambda factors, bases: jax.tree.map(kronecker.power_iteration, factors, bases)
    is_due = (t > 1) & ((t - 1) % precondition_frequency == 0)
    which = jnp.where(t == 1, 1, jnp.where(is_due, 2, 0))
    return jax.lax.switch(which, (keep, decompose, turn), factors, bases)

  def update(
    updates: Any, state: ScaleBySoapState, params: Any = None
  ) -> tuple[Any, ScaleBySoapState]:
    del params
    t = state.count  # Of the gradients that moments know, this one included.
    factors = kronecker.sides(state.left, state.right)
    bases = refreshed(factors, kronecker.sides(state.left_basis, state.right_basis), t)
    gradients, mu, nu = kronecker.as_float(updates), flat(state.mu), flat(state.nu)

    def step(path: str, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      """Direction, momentum and second moment of a leaf; the first step keeps the moments."""
      own, dtype = bases.get(path, Sides()), gradient.dtype
      momentum = b1 * mu[path].astype(dtype) + (1 - b1) * gradient
      second = average(nu[path], rotate(gradient, own) ** 2 + eps**2, b2, t)
      rotated = rotate(momentum / kronecker.bias(b1, t, dtype), own)
      direction = rotate_back(divide(rotated, jnp.sqrt(second)), own)
      new = direction, momentum.astype(mu[path].dtype), second
      return trees.select(t == 0, (jnp.zeros_like(gradient), mu[path], nu[path]), new)

    done = {path: step(path, gradient) for path, gradient in gradients.items()}
    factors = {
      path: kronecker.updated(own, gradients[path], b2, t + 1) for path, own in factors.items()
    }
    pick = lambda i: trees.map_with_path(lambda path, _: done[path][i], updates)
    new_state = ScaleBySoapState(
      optax.safe_increment(t),
      pick(1),
      pick(2),
      *kronecker.trees_of(factors, updates),
      *kronecker.trees_of(bases, updates),
    )
    directions = jax.tree.map(lambda u, new: new.astype(u.dtype), updates, pick(0))
    return directions, new_state

  return optax.GradientTransformation(init, update)


def soap(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.95,
  b2: float = 0.95,
  eps: float = 1e-8,
  mu_dtype: Any = None,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  precondition_frequency: int = 10,
  max_precond_dim: int = 10_000,
  matrices: Where | None = None,
  max_norm: float | None = None,
  rounding: Rounding = "stochastic",
  seed: int = 0,
  format: Format | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  """SOAP without master weights: Adam in the eigenbasis of Shampoo's factors, and ECO.

  A weight's error goes into the momentum through the inverse of the preconditioner, so that it
  comes back in full. A step costs what SOAP's does, four products of a matrix with its bases, and
  twelve more: four each for the preconditioner of ones, the derivative along ones, and the inverse.

  Args:
    learning_rate: a number or a schedule; the rule follows it.
    b1: as in `scale_by_soap`.
    b2: as in `scale_by_soap`.
    eps: as in `scale_by_soap`.
    mu_dtype: as in `scale_by_soap`.
    weight_decay: decoupled, as in `optax.adamw`.
    mask: as in `optax.adamw`.
    precondition_frequency: as in `scale_by_soap`.
    max_precond_dim: as in `scale_by_soap`. A matrix takes 16 bytes for each weight and another
      8 (m² + n²) bytes for the factors and bases of its sides; a long side is worth leaving out.
    matrices: called with each leaf's `/`-joined path and the leaf; whether its last two axes are a
      matrix, and each index of the others a matrix of its own, as in stacks of layers. All others
      take Adam's step. None: leaves with two axes, and an error for leaves with more.
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
    >>> tx = eco.soap(3e-3, precondition_frequency=10)
    >>> state = tx.init(params)
    >>> updates, state = tx.update({"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, state, params)

  References:
    Vyas et al, `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024. Nikdan et al, `ECO
    <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  build.require_numbers(
    learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, max_norm=max_norm
  )
  optimizer = optax.chain(
    scale_by_soap(b1, b2, eps, mu_dtype, precondition_frequency, max_precond_dim, matrices),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return build.without_master_weights(
    optimizer, None, learning_rate, max_norm, keep_error=False, momentum=b1,
    format=format, where=where, rounding=rounding, seed=seed,
  )  # fmt: skip
