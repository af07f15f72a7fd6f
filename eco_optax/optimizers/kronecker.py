"""Kronecker factors of gradients: what the steps of SOAP and Shampoo have in common.

Both precondition the momentum of a matrix in the eigenvectors of its gradients' second moments from
the left and from the right, and differ in what they divide by there:

    L = E G Gᵀ,  R = E Gᵀ G,  U = Q_L [(Q_Lᵀ M Q_R) / D] Q_Rᵀ

For given Q_L, Q_R and D this is linear in M, symmetric and positive, and known in both directions:
M = Q_L [(Q_Lᵀ U Q_R) D] Q_Rᵀ. A side without a factor has the identity for its Q.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import trees
from eco_optax.quantized_array import Where
from eco_optax.transforms.momentum import Leaves, flat

# Rotations and factors are products in float32 on every device: in bfloat16 a basis is orthogonal
# to three digits only.
_PRECISION = jax.lax.Precision.HIGHEST


class Sides(NamedTuple):
  """What belongs to the rows and to the columns of matrices (…, m, n); None is the identity."""

  left: Any = None  # (…, m, m), or eigenvalues (…, m).
  right: Any = None  # (…, n, n), or (…, n).


def sides(left: Any, right: Any) -> dict[str, Sides]:
  """The sides of each leaf that has one by path; left and right are trees with masked leaves."""
  lefts, rights = flat(left), flat(right)
  return {path: Sides(lefts.get(path), rights.get(path)) for path in lefts | rights}


def trees_of(found: dict[str, Sides], params: Any) -> Sides:
  """The reverse of `sides`: two trees like the parameters', masked where there is nothing."""
  put = lambda side: trees.map_with_path(
    lambda path, _: _unmasked(getattr(found.get(path, Sides()), side)), params
  )
  return Sides(put("left"), put("right"))


def _unmasked(x: Any) -> Any:
  return optax.MaskedNode() if x is None else x


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=_PRECISION)


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def rotate(x: jax.Array, bases: Sides) -> jax.Array:
  """Q_Lᵀ x Q_R, float32 or wider."""
  if bases.left is not None:
    x = _product(_transposed(bases.left), x)
  return x if bases.right is None else _product(x, bases.right)


def rotate_back(x: jax.Array, bases: Sides) -> jax.Array:
  """Q_L x Q_Rᵀ."""
  if bases.left is not None:
    x = _product(bases.left, x)
  return x if bases.right is None else _product(x, _transposed(bases.right))


def divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """The quotient, and 0 where `by` is 0."""
  return jnp.where(by > 0, x / jnp.where(by > 0, by, 1), 0)


def average(old: jax.Array, new: jax.Array, decay: Any, count: jax.Array) -> jax.Array:
  """The running mean of `count` values of which `new` is the last, without bias; a sum at decay 1.

  It is Adam's running mean over its bias correction: the weight of `new` is (1 − β) / (1 − β^t).
  """
  keep = jnp.asarray(decay, old.dtype)
  weight = (1 - keep) / jnp.where(keep < 1, bias(keep, count, old.dtype), 1)
  return jnp.where(keep < 1, old + weight * (new - old), old + new)


def moments(gradient: jax.Array, factors: Sides) -> Sides:
  """G Gᵀ and Gᵀ G of the sides that have a factor."""
  return Sides(
    None if factors.left is None else _product(gradient, _transposed(gradient)),
    None if factors.right is None else _product(_transposed(gradient), gradient),
  )


def updated(factors: Sides, gradient: jax.Array, decay: Any, count: jax.Array) -> Sides:
  """Factors that know one more gradient, the one of number `count`."""
  new = moments(gradient, factors)
  return jax.tree.map(lambda old, x: average(old, x, decay, count), factors, new)


def init_factors(params: Any, matrices: Where | None, max_precond_dim: int, name: str) -> Sides:
  """Trees of zeros for the factors of all leaves, masked where a side has none.

  Args:
    params: arrays.
    matrices: as in `eco_optax.soap`.
    max_precond_dim: as there.
    name: of the optimizer, for errors.

  Raises:
    ValueError: naming a leaf that is no matrix, or whose axes say nothing of which of them are.
  """

  def factors(path: str, leaf: Any) -> Sides:
    if matrices is None and leaf.ndim > 2:
      raise ValueError(
        f"{trees.leaf_name(path)} has {leaf.ndim} axes {tuple(leaf.shape)}, and {name} works on"
        " matrices: say by matrices= which leaves are stacks of matrices (…, m, n), as in"
        " matrices=lambda path, leaf: leaf.ndim >= 2. Their last two axes are taken, each index of"
        " the others by itself; False takes Adam's step. A convolution or a kernel of several heads"
        " has other axes in its rows or columns: reshape it to two axes for that"
      )
    is_matrix = leaf.ndim == 2 if matrices is None else matrices(path, leaf)
    if not is_matrix:
      return Sides()
    if leaf.ndim < 2:
      raise ValueError(
        f"{trees.leaf_name(path)} has shape {tuple(leaf.shape)}, but matrices= calls it a matrix:"
        " return True for leaves with two axes or more alone"
      )
    *lead, m, n = leaf.shape
    zeros = lambda k: jnp.zeros((*lead, k, k), float_of(leaf))
    return Sides(
      zeros(m) if m <= max_precond_dim else None, zeros(n) if n <= max_precond_dim else None
    )

  found: dict[str, Sides] = {}
  trees.map_with_path(lambda path, leaf: found.__setitem__(path, factors(path, leaf)), params)
  return trees_of(found, params)


def require_whole(name: str, value: Any) -> None:
  """Raises `ValueError` for a number of steps or a size that is not a whole number above 0."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f"{name} must be an int above 0, got {value!r}; optax.inject_hyperparams leaves it one if its"
      " static_args name it"
    )


def eigenbasis(factor: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues and eigenvectors of symmetric positive factors (…, n, n), the largest first."""
  values, vectors = jnp.linalg.eigh(factor)
  return jnp.flip(values, -1), jnp.flip(vectors, -1)


def power_iteration(factor: jax.Array, basis: jax.Array) -> jax.Array:
  """One power iteration and QR: a basis nearer to the factor's eigenvectors.

  The Gram-Schmidt of QR goes from the largest eigenvalue to the smallest, whatever the order of the
  columns, and each column takes the place of the one that it was made of: what is known of a
  direction stays with it.
  """
  powers = _product(factor, basis)
  eigenvalues = jnp.sum(basis * powers, axis=-2)
  order = jnp.argsort(-eigenvalues, axis=-1)
  columns = lambda x, indices: jnp.take_along_axis(x, indices[..., None, :], axis=-1)
  vectors, _ = jnp.linalg.qr(columns(powers, order))
  return columns(vectors, jnp.argsort(order, axis=-1))


def float_of(x: jax.Array) -> Any:
  """The dtype that an array is computed in: float32 or wider."""
  return x.dtype if x.dtype == jnp.float64 else jnp.dtype("float32")


def as_float(tree: Any) -> Leaves:
  """Leaves by path, in the dtype that they are computed in."""
  return {path: x.astype(float_of(x)) for path, x in flat(tree).items()}


def bias(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
  """1 − β^t: the share of a momentum's mean that t ≥ 1 gradients are."""
  t = jnp.maximum(count, 1).astype(dtype)
  return 1 - jnp.asarray(decay, dtype) ** t
