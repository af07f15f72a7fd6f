"""FactoredMoment: a matrix without negative elements, stored as row and column means."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax.quantized_array import is_quantized


class Factors(NamedTuple):
  """Two float32 arrays whose product, by broadcasting, is a moment's value."""

  row: jax.Array  # (…, rows, 1)
  ratio: jax.Array  # (…, 1, columns): of the columns' means to the mean of the whole matrix.

  def dense(self) -> jax.Array:
    """The value."""
    return self.row * self.ratio


@functools.partial(jax.tree_util.register_dataclass, data_fields=["row", "column"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class FactoredMoment:
  """Row and column means of matrices, which are the last two axes: one leaf of a state.

  Its value is `row × column ÷ mean`, of all matrices with these means the one whose rows are in
  proportion. Both arrays have all axes of the moment, so that they are scanned, sliced and sharded
  as it is.

  Attributes:
    row: float32, shape (…, rows, 1).
    column: float32, shape (…, 1, columns).
  """

  row: jax.Array
  column: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the moment."""
    return (*self.row.shape[:-1], self.column.shape[-1])

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.row.ndim

  @property
  def size(self) -> int:
    """Number of elements of the moment."""
    return math.prod(self.shape)

  @property
  def dtype(self) -> Any:
    """That of the moment's value."""
    return self.row.dtype

  @property
  def nbytes(self) -> int:
    """Of the stored means."""
    return self.row.nbytes + self.column.nbytes

  def factors(self, mean: jax.Array | None = None) -> Factors:
    """What the value is a product of.

    Args:
      mean: of each matrix, shape (…, 1, 1), where `row` has only a part of the rows.
    """
    mean = jnp.mean(self.row, -2, keepdims=True) if mean is None else mean
    # A matrix of zeros stays one.
    return Factors(self.row, self.column / jnp.where(mean == 0, np.float32(1), mean))

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The moment that the means stand for, computed in float32."""
    return self.factors().dense().astype(dtype)


def factored(x: jax.Array) -> FactoredMoment:
  """Row and column means of matrices."""
  x = x.astype(jnp.float32)
  return FactoredMoment(jnp.mean(x, -1, keepdims=True), jnp.mean(x, -2, keepdims=True))


def is_array(node: Any) -> bool:
  """Whether a node of a state or of parameters stands for one array; the `is_leaf` of walks."""
  return is_quantized(node) or isinstance(node, FactoredMoment)
