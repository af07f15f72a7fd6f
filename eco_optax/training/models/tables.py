"""Embedding and head as packed rows of the vocabulary, computed with part by part.

Both are tables of shape (P, R, D): P parts of R rows each, one row and one scale for each token of
the vocabulary. What reads a table is a `lax.scan` over its parts. So gradient release steps it part
by part, as it steps a stack of layers, and neither its float32 values nor its gradient is ever
whole.

Letters in names: P parts of the vocabulary, R rows of a part, D model width, B batch, L length, N
chunks of l positions.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eco_optax as eco
from eco_optax.training import sharding
from eco_optax.training.models.modules import INIT_SCALE

_Table = Any  # A float array or a QuantizedArray, of shape (P, R, D).


def row_format(format: eco.Format) -> eco.Format:
  """The format of tables beside linear layers in `format`: INT8, one scale for each row.

  Rows are looked up one by one, and the tokens of different rows are not equally frequent: a scale
  belongs to one row. The numbers of a row are spread like a Gaussian's, which INT8 rounds with a
  third of E4M3's error (2,048 of them; with a quarter, 128), and no product is of rows' codes.
  Scales are float32, powers of two where those of `format` are.

  Example:
    >>> import eco_optax as eco
    >>> row_format(eco.NVFP4)
    Format('int8', 'channel', contraction_axis=-1)
  """
  return eco.Format("int8", "channel", power_of_two=format.power_of_two, contraction_axis=-1)


def init(key: jax.Array, size: tuple[int, int], parts: int, format: eco.Format | None) -> _Table:
  """A table of random rows, drawn and packed part by part.

  Args:
    key: a PRNG key.
    size: V, D.
    parts: P, which divides V.
    format: of linear layers; None leaves the table float32.
  """
  rows, width = size[0] // parts, size[1]

  def part(key: jax.Array) -> Any:
    x = INIT_SCALE * jax.random.normal(key, (rows, width))
    return eco.quantize(x, row_format(format)) if format else x

  return jax.lax.map(part, jax.random.split(key, parts))


def _apart(part: Any) -> tuple[Any, Any]:
  """The values of a part, and what collects their gradient."""
  if isinstance(part, eco.QuantizedArray):
    return dataclasses.replace(part, sink=None), part.sink
  return jax.lax.stop_gradient(part), part


def _read(rows: Any, dtype: Any) -> jax.Array:
  return rows.dequantize(dtype) if isinstance(rows, eco.QuantizedArray) else rows.astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rows(part_RxD: Any, sink: Any, row_BxL: jax.Array, dtype: Any) -> jax.Array:
  """Rows of a part by number; of numbers beyond it any row, whose gradient is dropped."""
  del sink
  return _read(jax.tree.map(lambda x: x.at[row_BxL].get(mode="clip"), part_RxD), dtype)


def _rows_forward(part_RxD: Any, sink: Any, row_BxL: jax.Array, dtype: Any) -> tuple:
  return _rows(part_RxD, sink, row_BxL, dtype), (part_RxD, sink, row_BxL)


def _rows_backward(dtype: Any, residuals: tuple, grad_BxLxD: jax.Array) -> tuple:
  del dtype
  part_RxD, sink, row_BxL = residuals
  if sink is None:
    return None, None, None
  # The zeros wait for the first addend, or they would exist before it.
  zero, grad_BxLxD = jax.lax.optimization_barrier((jnp.float32(0), grad_BxLxD))
  zeros = jnp.full(part_RxD.shape, zero)
  # A frequent token's gradient is a sum of thousands, in which bfloat16 would lose most.
  grad_RxD = zeros.at[row_BxL].add(grad_BxLxD.astype(jnp.float32), mode="drop")
  return None, grad_RxD.astype(sink.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def lookup(path: str, table_PxRxD: _Table, tokens_BxL: jax.Array, dtype: Any) -> jax.Array:
  """The rows of `tokens`, shape (B, L, D) in `dtype`; their gradients are summed in float32.

  Args:
    path: of the table in the parameters.
    table_PxRxD: packed or float.
    tokens_BxL: int32.
    dtype: of the result.
  """
  P, R, D = table_PxRxD.shape

  def add(x_BxLxD: jax.Array, scanned: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
    part_RxD, number = scanned
    row_BxL = tokens_BxL - number * R
    is_own = (row_BxL >= 0) & (row_BxL < R)
    # `select`, and not `where`: the backward pass must not keep x_BxLxD.
    row_BxL = jax.lax.select(is_own, row_BxL, jnp.full_like(row_BxL, R))
    own_BxLxD = _rows(*_apart(sharding.gather(path, part_RxD)), row_BxL, dtype)
    is_own = jax.lax.broadcast_in_dim(is_own, x_BxLxD.shape, (0, 1))
    x_BxLxD = jax.lax.select(is_own, own_BxLxD, x_BxLxD)
    return sharding.constrain(x_BxLxD, "batch", None, None), None

  start = sharding.constrain(jnp.zeros((*tokens_BxL.shape, D), dtype), "batch", None, None)
  return jax.lax.scan(add, start, (table_PxRxD, jnp.arange(P, dtype=jnp.int32)))[0]


@jax.custom_vjp
def _product(x_BxLxD: jax.Array, part_RxD: Any, sink: Any) -> jax.Array:
  """Products of outputs with the rows of a part, float32 of shape (B, L, R).

  Codes are multiplied as such in the dtype of x, which has them all, and scales are multiplied into
  the sums. x is not rounded, as it is for linear layers of blocks: logits decide the loss.
  """
  del sink
  codes_RxD, scale_R = _codes(part_RxD, x_BxLxD.dtype)
  y = jnp.einsum("bld,rd->blr", x_BxLxD, codes_RxD, preferred_element_type=jnp.float32)
  return y if scale_R is None else y * scale_R[None, None]


def _codes(part_RxD: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
  if not isinstance(part_RxD, eco.QuantizedArray):
    return part_RxD.astype(dtype), None
  return part_RxD.codes.astype(dtype), part_RxD.float_scale()[:, 0]


def _product_forward(x_BxLxD: jax.Array, part_RxD: Any, sink: Any) -> tuple:
  return _product(x_BxLxD, part_RxD, sink), (x_BxLxD, part_RxD, sink)


def _product_backward(residuals: tuple, grad_BxLxR: jax.Array) -> tuple:
  x_BxLxD, part_RxD, sink = residuals
  dtype = x_BxLxD.dtype
  codes_RxD, scale_R = _codes(part_RxD, dtype)
  scaled = grad_BxLxR if scale_R is None else grad_BxLxR * scale_R[None, None]
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dx_BxLxD = product("blr,rd->bld", scaled.astype(dtype), codes_RxD).astype(dtype)
  if sink is None:
    return dx_BxLxD, None, None
  grad_RxD = product("blr,bld->rd", grad_BxLxR.astype(dtype), x_BxLxD)
  return dx_BxLxD, None, grad_RxD.astype(sink.dtype)


_product.defvjp(_product_forward, _product_backward)


def _capped(logits: jax.Array, cap: float) -> jax.Array:
  logits = cap * jnp.tanh(logits / cap) if cap else logits
  return sharding.constrain(logits, "batch", None, "vocabulary")


def logits(path: str, table_PxRxD: _Table, x_BxLxD: jax.Array, cap: float) -> jax.Array:
  """All logits, float32 of shape (B, L, V).

  Args:
    path: of the table in the parameters.
    table_PxRxD: packed or float.
    x_BxLxD: normalized outputs.
    cap: logits become cap × tanh(logits / cap); 0 leaves them.
  """

  def one(part_RxD: Any) -> jax.Array:
    return _product(x_BxLxD, *_apart(sharding.gather(path, part_RxD)))

  parts_PxBxLxR = jax.lax.map(one, table_PxRxD)
  B, L, _ = x_BxLxD.shape
  return _capped(jnp.moveaxis(parts_PxBxLxR, 0, 2).reshape(B, L, -1), cap)


def cross_entropy(
  path: str, table_PxRxD: _Table, x_NxBxlxD: jax.Array, targets_NxBxl: jax.Array, cap: float
) -> jax.Array:
  """−log softmax(logits)[target], float32 of shape (N, B, l), from a part's logits at a time.

  A running maximum and sum over parts, as in flash attention, make the normalizer. Logits of one
  part and one chunk are there at a time, and the backward pass makes them again.

  Args:
    path: of the table in the parameters.
    table_PxRxD: packed or float.
    x_NxBxlxD: normalized outputs in N chunks of positions.
    targets_NxBxl: int32, tokens.
    cap: as in `logits`.
  """
  P, R, _ = table_PxRxD.shape

  def add(sums: Any, scanned: tuple[Any, jax.Array]) -> tuple[Any, None]:
    part_RxD, number = scanned
    part_RxD, sink = _apart(sharding.gather(path, part_RxD))
    # Its gradient is a sum over chunks, in float32.
    sink = None if sink is None else sink.astype(jnp.float32)

    def chunk(_: None, operands: tuple[Any, ...]) -> tuple[None, Any]:
      x, targets, (top, total, own) = operands
      logits = _capped(_product(x, part_RxD, sink), cap)
      # The result does not depend on it.
      new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(logits, axis=-1)))
      total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None]), -1)
      is_target = (targets - number * R)[..., None] == jnp.arange(R, dtype=jnp.int32)
      own = own + jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
      return None, (new_top, total, own)

    chunk = jax.checkpoint(chunk, prevent_cse=False)
    return jax.lax.scan(chunk, None, (x_NxBxlxD, targets_NxBxl, sums))[1], None

  zeros = sharding.constrain(jnp.zeros(targets_NxBxl.shape, jnp.float32), None, "batch", None)
  # Below every logit, and finite, so that differences of two are 0.
  start = (jnp.full_like(zeros, np.float32(-1e30)), zeros, zeros)
  scanned = (table_PxRxD, jnp.arange(P, dtype=jnp.int32))
  (top, total, own), _ = jax.lax.scan(add, start, scanned)
  return top + jnp.log(total) - own
