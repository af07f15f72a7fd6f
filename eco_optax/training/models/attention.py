"""Causal attention: the plain definition, one block of logits at a time, and others' kernels.

Letters in names: B batch, L length, H query heads, G key-value heads, R = H / G, K head width,
N blocks of C positions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax.training import sharding
from eco_optax.training.models.products import product

CHUNK = 256  # Positions in a block of `chunked`. Up to this length `auto` takes `plain`.
_LEAST = np.float32(-1e30)  # Below every logit, and finite, so that differences of two are 0.


def attend(
  q_BxLxHxK: jax.Array,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  *,
  scale: float,
  cap: float = 0.0,
  window: int = 0,
  is_global: bool | jax.Array = True,
  documents_BxL: jax.Array | None = None,
  implementation: str = "auto",
) -> jax.Array:
  """Causal attention, each key-value head for H / G query heads; output shaped like q.

  Args:
    q_BxLxHxK: queries.
    k_BxLxGxK: keys, of the same dtype.
    v_BxLxGxK: values, of the same dtype.
    scale: of the logits.
    cap: logits become cap × tanh(logits / cap); 0 leaves them.
    window: a position sees itself and the ones before it, so many in all; 0 is no limit.
    is_global: whether to see everything before it all the same; may be traced.
    documents_BxL: int32, numbers of documents; a position sees its own document. None: all are one.
    implementation: `plain` makes all logits at once; `chunked` makes them in blocks, in the
      backward pass again; `cudnn` for NVIDIA GPUs and `splash`, JAX's splash attention, for TPUs
      are kernels that do the same. `auto` takes one of these where it can, or else `plain` up to a
      length of `CHUNK` and `chunked` above it.

  Raises:
    ValueError: if a kernel is asked for what it cannot do; JAX has errors of its own for dtypes,
      head widths and machines.

  cuDNN adds the parts of a gradient in any order, so that runs on GPUs repeat bit for bit only with
  XLA_FLAGS=--xla_gpu_deterministic_ops=true. A program that is compiled for a GPU that is absent
  has its kernel up to a head width of 128, and one for a GPU of this machine up to 256 on Hopper.

  References:
    Dao et al, `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022; Rabe & Staats,
    `Self-attention Does Not Need O(n²) Memory <https://arxiv.org/abs/2112.05682>`_, 2021.
  """
  L = q_BxLxHxK.shape[1]
  window = window if window < L else 0
  if implementation == "auto":
    simple = documents_BxL is None and not cap
    if simple and _on_nvidia() and _cudnn_takes(q_BxLxHxK, k_BxLxGxK):
      implementation = "cudnn"
    elif L > CHUNK and _device().platform == "tpu" and _splash_block(q_BxLxHxK):
      implementation = "splash"
    else:
      implementation = "plain" if L <= CHUNK else "chunked"
  if implementation == "plain":
    span = jnp.where(is_global, L, window) if window else None
    return plain(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, documents_BxL, span, scale, cap)

  def with_window(window: int) -> Any:
    def fn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
      if implementation == "chunked":
        return chunked(scale, cap, window, CHUNK, q, k, v, documents_BxL)
      if implementation == "splash":
        return splash(q, k, v, documents_BxL, scale, cap, window)
      if cap or documents_BxL is not None:
        what = f"a cap on logits, here {cap}" if cap else "documents"
        raise ValueError(f"cuDNN's attention does not know {what}: use attention='auto'")
      return _cudnn(q, k, v, scale, window)

    return fn

  if not window:
    return with_window(0)(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
  # Either branch knows its window, and leaves out the blocks that are not seen.
  branches = with_window(0), with_window(window)
  return jax.lax.cond(is_global, *branches, q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)


def plain(
  q_BxLxHxK: jax.Array,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  documents_BxL: jax.Array | None,
  span: jax.Array | None,
  scale: float,
  cap: float,
) -> jax.Array:
  """The definition: a softmax over all logits, in float32, of shape (B, G, R, L, L).

  Args:
    q_BxLxHxK: queries.
    k_BxLxGxK: keys.
    v_BxLxGxK: values.
    documents_BxL: as in `attend`.
    span: how many positions a position sees, itself included; None is no limit.
    scale: as in `attend`.
    cap: as in `attend`.
  """
  B, L, H, K = q_BxLxHxK.shape
  G = k_BxLxGxK.shape[2]
  # Heads first, so that no transposed copy of the logits is made.
  q_BxGxRxLxK = jnp.moveaxis(q_BxLxHxK.reshape(B, L, G, H // G, K), 1, 3)
  logits_BxGxRxLxL = scale * product("bgrlk,bmgk->bgrlm", q_BxGxRxLxK, k_BxLxGxK)
  if cap:
    logits_BxGxRxLxL = cap * jnp.tanh(logits_BxGxRxLxL / cap)
  position = jnp.arange(L)
  seen = _seen(position, position, span, documents_BxL, documents_BxL)
  share_BxGxRxLxL = jax.nn.softmax(jnp.where(seen, logits_BxGxRxLxL, -jnp.inf))
  share_BxGxRxLxL = share_BxGxRxLxL.astype(v_BxLxGxK.dtype)
  y_BxGxRxLxK = product("bgrlm,bmgk->bgrlk", share_BxGxRxLxL, v_BxLxGxK)
  y_BxLxGxRxK = jnp.moveaxis(y_BxGxRxLxK.astype(q_BxLxHxK.dtype), 3, 1)
  return y_BxLxGxRxK.reshape(q_BxLxHxK.shape)


def _seen(
  position_L: jax.Array,
  position_M: jax.Array,
  span: Any,
  documents_BxL: jax.Array | None,
  documents_BxM: jax.Array | None,
) -> jax.Array:
  """Which of M keys each of L queries sees: a mask of shape (1 or B, 1, 1, L, M)."""
  back = position_L[:, None] - position_M[None, :]
  seen = back >= 0
  if span is not None:
    seen = seen & (back < span)
  if documents_BxL is None or documents_BxM is None:
    return seen[None, None, None]
  return (seen & (documents_BxL[:, :, None] == documents_BxM[:, None, :]))[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def chunked(
  scale: float,
  cap: float,
  window: int,
  chunk: int,
  q_BxLxHxK: jax.Array,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  documents_BxL: jax.Array | None,
) -> jax.Array:
  """The same as `plain` with the logits of one block at a time, (B, G, R, C, C) in float32.

  Blocks that no query sees are left out: the ones behind the queries, and before the
  window. The backward pass makes the blocks again, with the sums that the forward pass keeps.

  Args:
    scale: as in `attend`.
    cap: as in `attend`.
    window: as in `attend`.
    chunk: C, in positions; the length need not be a multiple of it.
    q_BxLxHxK: queries.
    k_BxLxGxK: keys.
    v_BxLxGxK: values.
    documents_BxL: as in `attend`.
  """
  operands = (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, documents_BxL)
  return _chunked_forward(scale, cap, window, chunk, *operands)[0]


def _cut(x: jax.Array | None, chunk: int, groups: int = 0) -> Any:
  """(B, L, …) as N blocks (B, C, …), filled up with zeros; with groups, (B, G, R, C, …).

  No position sees the ones at the end, and their own outputs and cotangents are dropped or 0.
  """
  if x is None:
    return None
  B, L, *rest = x.shape
  x = jnp.pad(x, ((0, 0), (0, -L % chunk), *((0, 0) for _ in rest)))
  if not groups:
    return jnp.moveaxis(x.reshape(B, -1, chunk, *rest), 1, 0)
  x = jnp.moveaxis(x.reshape(B, -1, chunk, groups, rest[0] // groups, *rest[1:]), 1, 0)
  return jnp.moveaxis(x, 2, 4)


def _join(x_NxBxCx: jax.Array, like: jax.Array) -> jax.Array:
  """N blocks (B, C, …) as an array like one of (B, L, …)."""
  N, B, C, *rest = x_NxBxCx.shape
  x = jnp.moveaxis(x_NxBxCx, 0, 1).reshape(B, N * C, *rest)[:, : like.shape[1]]
  return x.reshape(like.shape).astype(like.dtype)


def _pairs(blocks: int, chunk: int, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of the blocks of queries, in order, and of the blocks of keys that they see."""
  first = lambda i: max(0, (i * chunk - window + 1) // chunk) if window else 0
  pairs = [(i, j) for i in range(blocks) for j in range(first(i), i + 1)]
  queries, keys = np.array(pairs, np.int32).T
  return queries, keys


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_at = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
_put = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)


def _block(
  scale: float,
  cap: float,
  window: int,
  q_BxGxRxCxK: jax.Array,
  k_BxCxGxK: jax.Array,
  documents_NxBxC: jax.Array | None,
  pair: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
  """Logits of a block of queries and a block of keys, and where they count."""
  logits = scale * _einsum("bgrlk,bmgk->bgrlm", q_BxGxRxCxK, k_BxCxGxK)
  if cap:
    logits = cap * jnp.tanh(logits / cap)
  C = k_BxCxGxK.shape[1]
  at, before = (block * C + jnp.arange(C) for block in pair)
  own, other = (None if documents_NxBxC is None else _at(documents_NxBxC, x) for x in pair)
  return logits, _seen(at, before, window or None, own, other)


def _chunked_forward(
  scale: float,
  cap: float,
  window: int,
  chunk: int,
  q_BxLxHxK: jax.Array,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  documents_BxL: jax.Array | None,
) -> tuple[jax.Array, tuple]:
  chunk, G = min(chunk, q_BxLxHxK.shape[1]), k_BxLxGxK.shape[2]
  q_NxBxGxRxCxK = _cut(q_BxLxHxK, chunk, G)
  k_NxBxCxGxK, v_NxBxCxGxK = _cut(k_BxLxGxK, chunk), _cut(v_BxLxGxK, chunk)
  documents_NxBxC = _cut(documents_BxL, chunk)
  N, B, G, R, C, K = q_NxBxGxRxCxK.shape

  def add(sums: Any, pair: Any) -> tuple[Any, None]:
    """Adds a block of keys to the sums of a block of queries."""
    i, j = pair
    q, k, v = _at(q_NxBxGxRxCxK, i), _at(k_NxBxCxGxK, j), _at(v_NxBxCxGxK, j)
    logits, seen = _block(scale, cap, window, q, k, documents_NxBxC, pair)
    top, total, y = (_at(x, i) for x in sums)
    new_top = jnp.maximum(top, jnp.max(jnp.where(seen, logits, _LEAST), axis=-1))
    share = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0)
    shrink = jnp.exp(top - new_top)
    total = total * shrink + jnp.sum(share, axis=-1)
    added = _einsum("bgrlm,bmgk->bgrlk", share.astype(v.dtype), v)
    y = y * shrink[..., None] + added
    return tuple(_put(x, new, i) for x, new in zip(sums, (new_top, total, y), strict=True)), None

  rows = (N, B, G, R, C)
  start = jnp.full(rows, _LEAST), jnp.zeros(rows), jnp.zeros((*rows, K))
  (top, total, y), _ = jax.lax.scan(add, start, _pairs(N, C, window))
  y = _join(jnp.moveaxis(y / total[..., None], 4, 2), q_BxLxHxK)
  return y, (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, documents_BxL, y, top + jnp.log(total))


def _chunked_backward(
  scale: float, cap: float, window: int, chunk: int, residuals: tuple, dy_BxLxHxK: jax.Array
) -> tuple:
  q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, documents_BxL, y_BxLxHxK, log_total_NxBxGxRxC = residuals
  chunk, G = min(chunk, q_BxLxHxK.shape[1]), k_BxLxGxK.shape[2]
  q_NxBxGxRxCxK, dy_NxBxGxRxCxK = _cut(q_BxLxHxK, chunk, G), _cut(dy_BxLxHxK, chunk, G)
  k_NxBxCxGxK, v_NxBxCxGxK = _cut(k_BxLxGxK, chunk), _cut(v_BxLxGxK, chunk)
  documents_NxBxC = _cut(documents_BxL, chunk)
  N, _, C = k_NxBxCxGxK.shape[:3]

  rows_BxLxH = jnp.sum(dy_BxLxHxK.astype(jnp.float32) * y_BxLxHxK.astype(jnp.float32), axis=-1)
  mean_NxBxGxRxC = _cut(rows_BxLxH, chunk, G)

  def add(sums: Any, pair: Any) -> tuple[Any, None]:
    """Adds the gradients that come through a block of logits."""
    i, j = pair
    q, k, v = _at(q_NxBxGxRxCxK, i), _at(k_NxBxCxGxK, j), _at(v_NxBxCxGxK, j)
    dy, mean, log_total = (_at(x, i) for x in (dy_NxBxGxRxCxK, mean_NxBxGxRxC, log_total_NxBxGxRxC))
    logits, seen = _block(scale, cap, window, q, k, documents_NxBxC, pair)
    share = jnp.where(seen, jnp.exp(logits - log_total[..., None]), 0)
    dlogits = share * (_einsum("bgrlk,bmgk->bgrlm", dy, v) - mean[..., None])
    if cap:
      dlogits = dlogits * (1 - jnp.square(logits / cap))
    dlogits = (scale * dlogits).astype(q.dtype)
    new = (
      _einsum("bgrlm,bmgk->bgrlk", dlogits, k),
      _einsum("bgrlm,bgrlk->bmgk", dlogits, q),
      _einsum("bgrlm,bgrlk->bmgk", share.astype(dy.dtype), dy),
    )
    return tuple(
      _put(x, _at(x, at) + more, at) for x, more, at in zip(sums, new, (i, j, j), strict=True)
    ), None

  operands = (q_NxBxGxRxCxK, k_NxBxCxGxK, v_NxBxCxGxK)
  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in operands)
  (dq, dk, dv), _ = jax.lax.scan(add, start, _pairs(N, C, window))
  dq = jnp.moveaxis(dq, 4, 2)
  like = (q_BxLxHxK, k_BxLxGxK, v_BxLxGxK)
  return *(_join(x, y) for x, y in zip((dq, dk, dv), like, strict=True)), None


chunked.defvjp(_chunked_forward, _chunked_backward)


def _splash_block(q_BxLxHxK: jax.Array) -> int:
  """Positions in a block of splash attention; 0 where its kernel does not take the shape."""
  L, K = q_BxLxHxK.shape[1], q_BxLxHxK.shape[3]
  return 0 if K % 128 else next((n for n in (512, 256, 128) if L % n == 0), 0)


def splash(
  q_BxLxHxK: jax.Array,
  k_BxLxGxK: jax.Array,
  v_BxLxGxK: jax.Array,
  documents_BxL: jax.Array | None,
  scale: float,
  cap: float,
  window: int,
  interpret: bool = False,
) -> jax.Array:
  """JAX's splash attention, by each device for its own sequences and heads.

  Args:
    q_BxLxHxK: queries.
    k_BxLxGxK: keys.
    v_BxLxGxK: values.
    documents_BxL: as in `attend`.
    scale: as in `attend`.
    cap: as in `attend`.
    window: as in `attend`.
    interpret: whether to run the kernel in plain JAX, on any device.

  Raises:
    ValueError: for lengths and head widths that are no multiples of 128.
  """
  # Kernels for TPUs take a second to import.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, L, _, K = q_BxLxHxK.shape
  if not (block := _splash_block(q_BxLxHxK)):
    raise ValueError(
      f"splash attention takes lengths and head widths that are multiples of 128, here {L} and {K}:"
      " use attention='auto'"
    )
  seen = masks.LocalMask((L, L), (window - 1, 0), 0) if window else masks.CausalMask((L, L))
  sizes = kernels.BlockSizes(*[block] * 8)  # type: ignore[arg-type]

  def own(q: jax.Array, k: jax.Array, v: jax.Array, *documents: jax.Array) -> jax.Array:
    B, _, H, _ = q.shape
    G = k.shape[2]
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes dtypes.
      kernel = kernels.make_splash_mqa_single_device(
        masks.MultiHeadMask([seen] * (H // G)),
        block_sizes=sizes,
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
      )
      q_BxGxRxLxK = jnp.moveaxis((scale * q).reshape(B, L, G, H // G, K), 1, 3)
      k_BxGxLxK, v_BxGxLxK = jnp.moveaxis(k, 1, 2), jnp.moveaxis(v, 1, 2)
      ids = [kernels.SegmentIds(x, x) for x in documents]
      each = jax.vmap(kernel, (0, 0, 0, *(None for _ in ids)))
      y_BxGxRxLxK = jax.vmap(each)(q_BxGxRxLxK, k_BxGxLxK, v_BxGxLxK, *ids)
    return jnp.moveaxis(y_BxGxRxLxK, 3, 1).reshape(q.shape).astype(q.dtype)

  mesh = jax.sharding.get_abstract_mesh()
  # Query heads and the key-value heads that they share are on one device.
  divides = k_BxLxGxK.shape[2] % mesh.shape.get("tensor", 1) == 0
  axes = ("batch", None, "heads" if divides else None, None)
  documents = [] if documents_BxL is None else [documents_BxL]
  split = sharding.on_own_parts(own, [axes] * 3 + [("batch", None)] * len(documents))
  return split(q_BxLxHxK, k_BxLxGxK, v_BxLxGxK, *documents)


def _device() -> Any:
  """What the program is for: a device of the mesh in use, or of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  # Before JAX 0.10 a mesh's device did not say its platform, and it was one of this process's.
  return device if hasattr(device, "platform") else jax.devices()[0]


def _on_nvidia() -> bool:
  """Whether the program is for NVIDIA GPUs."""
  device = _device()
  return device.platform == "gpu" and "AMD" not in device.device_kind.upper()


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: int) -> jax.Array:
  with jax.numpy_dtype_promotion("standard"):  # JAX's own code mixes dtypes.
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=scale,
      is_causal=True,
      local_window_size=(window - 1, 0) if window else None,
      implementation="cudnn",
    )


def _cudnn_takes(q: jax.Array, k: jax.Array) -> bool:
  """Whether cuDNN is there and knows these dtypes and head widths; JAX knows."""
  try:
    jax.eval_shape(jax.grad(lambda q: jnp.sum(_cudnn(q, k, k, 1.0, 0).astype(jnp.float32))), q)
  except (NotImplementedError, RuntimeError):
    return False
  return True
