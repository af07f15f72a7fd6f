"""Each token through its own experts and no others: no padding to a capacity, and nothing dropped.

Tokens' choices are sorted by expert and cut into blocks of rows, each of one expert, whose last
block is filled up with rows of zeros. One block after another meets its expert, so that the kernels
of one expert are dequantized at a time. The backward pass makes each block's outputs again.

Letters in names: N tokens, D model width, E experts, T experts per token, V blocks, R rows in each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax.quantized_array import is_quantized
from eco_optax.training import sharding

# Rows are at most a seventh of an expert's mean share, and so those of zeros at most a seventh of
# all; but a product of fewer rows than the least, or more than the most, is no faster per row.
_SHARE, _LEAST, _MOST = 7, 8, 1024

# (kernels of one expert, rows of shape (R, D)) → rows of shape (R, D)
Expert = Callable[[Any, jax.Array], jax.Array]


class Blocks(NamedTuple):
  """Which rows go to which expert. Those of zeros have the token N or more, and the weight 0."""

  expert_V: jax.Array  # int32, ascending.
  token_VxR: jax.Array  # int32; in a block no token is there twice.
  weight_VxR: jax.Array  # Float32, of the rows' outputs.
  used: jax.Array  # int32 scalar: blocks behind these have no rows.


class _Sizes(NamedTuple):
  """Numbers of blocks."""

  rows: int  # R.
  expected: int  # Blocks that are always gone through, enough where devices have equal shares.
  most: int  # V, enough for any choices.


def sizes(choices: int, experts: int, devices: int = 1) -> _Sizes:
  """How the choices of tokens are cut into blocks.

  Args:
    choices: N × T of the tokens that share the experts.
    experts: E, of all of these devices.
    devices: with an equal part of the experts each.
  """
  mean = choices // (_SHARE * experts)
  rows = min(_MOST, max(_LEAST, 1 << max(0, mean.bit_length() - 1)))
  # Each expert's last block has one row at least.
  blocks = lambda choices, experts: (choices + experts * (rows - 1)) // rows
  own = experts // devices
  return _Sizes(rows, blocks(-(-choices // devices), own), blocks(choices, own))


def cut(expert_NxT: jax.Array, weight_NxT: jax.Array, experts: int, sizes: _Sizes) -> Blocks:
  """Sorts choices by expert and cuts them into blocks.

  Args:
    expert_NxT: int32; numbers that are not from 0 to experts − 1 are left out.
    weight_NxT: float32.
    experts: E.
    sizes: of the blocks.
  """
  (N, T), (R, _, V) = expert_NxT.shape, sizes
  is_own = (expert_NxT >= 0) & (expert_NxT < experts)
  key = jnp.where(is_own, expert_NxT, experts).ravel()
  order = jnp.argsort(key, stable=True).astype(jnp.int32)
  count_E = jnp.sum(key[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
  end_E = jnp.cumsum(count_E, dtype=jnp.int32)
  blocks_E = (count_E + np.int32(R - 1)) // np.int32(R)
  last_E = jnp.cumsum(blocks_E, dtype=jnp.int32)

  block_V = jnp.arange(V, dtype=jnp.int32)
  expert_V = jnp.sum(block_V[:, None] >= last_E, axis=1, dtype=jnp.int32)
  expert_V = jnp.minimum(expert_V, np.int32(experts - 1))
  number_V = block_V - (last_E - blocks_E)[expert_V]  # Among the blocks of its expert.
  first_V = (end_E - count_E)[expert_V] + number_V * np.int32(R)
  place_VxR = first_V[:, None] + jnp.arange(R, dtype=jnp.int32)
  is_row = place_VxR < end_E[expert_V][:, None]
  choice_VxR = order.at[place_VxR].get(mode="clip")
  # Rows of zeros have tokens that are none, each another one, as the scatters below are told.
  none_R = np.int32(N) + jnp.arange(R, dtype=jnp.int32)
  token_VxR = jnp.where(is_row, choice_VxR // np.int32(T), none_R)
  weight_VxR = jnp.where(is_row, weight_NxT.ravel()[choice_VxR], np.float32(0))
  return Blocks(expert_V, token_VxR, weight_VxR, last_E[-1])


def _with_primal(kernel: Any, primal: Any) -> Any:
  """A kernel whose gradient goes to `primal`; a float kernel is its own."""
  return primal if kernel is None else dataclasses.replace(kernel, sink=primal)


def _apart(kernels: Any) -> tuple[list[Any], list[Any], Any]:
  """Packed kernels without sinks, None for float ones; their primals; and the tree of both."""
  leaves, treedef = jax.tree.flatten(kernels, is_leaf=is_quantized)
  packed = [dataclasses.replace(x, sink=None) if is_quantized(x) else None for x in leaves]
  return packed, [x.sink if is_quantized(x) else x for x in leaves], treedef


class _How(NamedTuple):
  """The static part of the computation."""

  expert: Expert
  treedef: Any  # Of the kernels.
  sizes: _Sizes

  def each(self, turn: Callable[[jax.Array, Any], Any], start: Any, used: jax.Array) -> Any:
    """The loop over blocks."""
    _, expected, most = self.sizes
    carry = jax.lax.fori_loop(0, expected, turn, start)
    if most > expected:  # Where a device has more than its share.
      carry = jax.lax.fori_loop(expected, jnp.maximum(used, expected), turn, carry)
    return carry

  def rows(self, packed: list[Any], primals: list[Any], x_RxD: jax.Array) -> jax.Array:
    """The expert's outputs."""
    kernels = map(_with_primal, packed, primals)
    return self.expert(jax.tree.unflatten(self.treedef, kernels), x_RxD)


def _at(tree: Any, i: jax.Array) -> Any:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _take(x_NxD: jax.Array, token_R: jax.Array) -> jax.Array:
  return x_NxD.at[token_R].get(mode="fill", fill_value=0)


def _add(x_NxD: jax.Array, token_R: jax.Array, rows_RxD: jax.Array) -> jax.Array:
  return x_NxD.at[token_R].add(rows_RxD.astype(jnp.float32), mode="drop", unique_indices=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(
  how: _How, x_NxD: jax.Array, packed: list[Any], primals: list[Any], blocks: Blocks
) -> jax.Array:
  floats = [
    primal if kernel is None else None for kernel, primal in zip(packed, primals, strict=True)
  ]

  def turn(v: jax.Array, y_NxD: jax.Array) -> jax.Array:
    expert, token_R, weight_R = _at(blocks[:3], v)
    own: tuple[list[Any], list[Any]] = _at((packed, floats), expert)
    y_RxD = how.rows(*own, _take(x_NxD, token_R))
    return _add(y_NxD, token_R, y_RxD.astype(jnp.float32) * weight_R[:, None])

  return how.each(turn, jnp.zeros(x_NxD.shape, jnp.float32), blocks.used).astype(x_NxD.dtype)


def _forward(
  how: _How, x_NxD: jax.Array, packed: list[Any], primals: list[Any], blocks: Blocks
) -> tuple[jax.Array, Any]:
  # Of sinks their dtype alone, since a checkpoint would keep them as arrays of zeros.
  kept = [
    x if kernel is None or x is None else jnp.zeros((0,), x.dtype)
    for kernel, x in zip(packed, primals, strict=True)
  ]
  return _apply(how, x_NxD, packed, primals, blocks), (x_NxD, packed, kept, blocks)


def _backward(how: _How, residuals: Any, dy_NxD: jax.Array) -> tuple:
  x_NxD, packed, kept, blocks = residuals
  is_felt = [x is not None for x in kept]
  floats = [x if kernel is None else None for kernel, x in zip(packed, kept, strict=True)]

  def primal_of(kernel: Any, value: Any, felt: bool) -> Any:
    """Of one expert."""
    return jnp.zeros(kernel.shape, jnp.float32) if felt and kernel is not None else value

  def turn(v: jax.Array, carry: Any) -> Any:
    dx_NxD, dweight_VxR, sums, stacks = carry
    expert, token_R, weight_R = _at(blocks[:3], v)
    own, values = _at((packed, floats), expert)
    primals = list(map(primal_of, own, values, is_felt))
    run = lambda x_RxD, primals: how.rows(own, primals, x_RxD)
    y_RxD, pull = jax.vjp(run, _take(x_NxD, token_R), primals)
    dy_RxD = _take(dy_NxD, token_R).astype(jnp.float32)
    dweight_R = jnp.sum(y_RxD.astype(jnp.float32) * dy_RxD, axis=-1)
    dx_RxD, found = pull((dy_RxD * weight_R[:, None]).astype(y_RxD.dtype))
    # Blocks of one expert follow each other: their sum is float32, whatever the gradient is.
    before = jnp.where(v > 0, _at(blocks.expert_V, jnp.maximum(v - 1, 0)), np.int32(-1))
    is_first = expert != before
    sums = [
      jnp.where(is_first, np.float32(0), total) + dw.astype(jnp.float32)
      for total, dw in zip(sums, (dw for dw in found if dw is not None), strict=True)
    ]
    write = lambda stack, x: jax.lax.dynamic_update_index_in_dim(
      stack, x.astype(stack.dtype), expert, 0
    )
    return (
      _add(dx_NxD, token_R, dx_RxD),
      jax.lax.dynamic_update_index_in_dim(dweight_VxR, dweight_R, v, 0),
      sums,
      list(map(write, stacks, sums)),
    )

  shapes = [
    (x.shape if kernel is None else kernel.shape, x.dtype)
    for kernel, x in zip(packed, kept, strict=True)
    if x is not None
  ]
  start = (
    jnp.zeros(x_NxD.shape, jnp.float32),
    jnp.zeros(blocks.weight_VxR.shape, jnp.float32),
    [jnp.zeros(shape[1:], jnp.float32) for shape, _ in shapes],
    [jnp.zeros(shape, dtype) for shape, dtype in shapes],
  )
  dx_NxD, dweight_VxR, _, stacks = how.each(turn, start, blocks.used)
  gradients = iter(stacks)
  grads = [next(gradients) if felt else None for felt in is_felt]
  of_blocks = blocks._replace(expert_V=None, token_VxR=None, weight_VxR=dweight_VxR, used=None)
  return dx_NxD.astype(x_NxD.dtype), None, grads, of_blocks


_apply.defvjp(_forward, _backward)


def apply(
  expert: Expert,
  kernels: Any,
  x_BxLxD: jax.Array,
  expert_BxLxT: jax.Array,
  weight_BxLxT: jax.Array,
) -> jax.Array:
  """The weighted sum of each token's experts' outputs.

  Args:
    expert: what one of them computes.
    kernels: of all experts: a tree of packed or float arrays with a first axis of E.
    x_BxLxD: inputs.
    expert_BxLxT: int32, the experts of each token, none of them twice; E: none.
    weight_BxLxT: float32, of their outputs.

  Returns:
    An array like x.
  """
  packed, primals, treedef = _apart(kernels)
  leaves = jax.tree.leaves(kernels, is_leaf=is_quantized)

  def run(
    first: Any, devices: int, packed: list[Any], primals: list[Any], *tokens: jax.Array
  ) -> jax.Array:
    x_BxLxD, expert_BxLxT, weight_BxLxT = tokens
    flat = lambda x: x.reshape(-1, x.shape[-1])
    E, own = leaves[0].shape[0], leaves[0].shape[0] // devices
    how = _How(expert, treedef, sizes(expert_BxLxT.size, E, devices))
    blocks = cut(flat(expert_BxLxT) - first, flat(weight_BxLxT), own, how.sizes)
    return _apply(how, flat(x_BxLxD), packed, primals, blocks).reshape(x_BxLxD.shape)

  return sharding.by_own_experts(run, packed, primals, x_BxLxD, expert_BxLxT, weight_BxLxT)
