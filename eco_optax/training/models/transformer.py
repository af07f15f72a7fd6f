"""A decoder-only Transformer: parameters, forward pass and loss of every model of the configs.

Letters in names: B batch, L length, M = L + 1, D model width, V vocabulary, S layers of a stack, P
parts of the vocabulary, R = V / P rows of a part.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import eco_optax as eco
from eco_optax.training import sharding
from eco_optax.training.models import modules, tables
from eco_optax.training.models.config import TransformerConfig
from eco_optax.training.models.products import product

Params = dict[str, Any]

_REMAT = {
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def is_block(path: str) -> bool:
  """Whether a parameter belongs to a stack of blocks."""
  return "blocks" in path.split("/")[0]


def is_block_kernel(path: str, leaf: Any = None) -> bool:
  """Whether a parameter is a linear layer inside a block: what the paper quantizes."""
  del leaf
  return is_block(path) and path.endswith("/kernel")


def is_expert_kernel(path: str, leaf: Any = None) -> bool:
  """Whether a parameter is a linear layer of the routed experts."""
  return is_block_kernel(path, leaf) and "/experts/" in path


def is_kernel_or_table(path: str, leaf: Any = None) -> bool:
  """Whether a parameter is a linear layer inside a block, the embedding or the head."""
  return is_block_kernel(path, leaf) or path in ("embedding/rows", "head/rows")


_QUANTIZED = {
  "blocks": is_block_kernel,
  "experts": is_expert_kernel,
  "all": is_kernel_or_table,
}


def is_quantized(config: TransformerConfig) -> Any:
  """Which parameters of a model are packed, by path and leaf, as `eco.quantize` takes it."""
  return _QUANTIZED[config.quantized]


def _block(config: TransformerConfig, stack: str, key: jax.Array) -> modules.Block:
  return modules.Block(config, nnx.Rngs(params=key), config.is_routed(stack))


def init(config: TransformerConfig, seed: int, format: eco.Format | None = None) -> Params:
  """Parameters as a plain dictionary, layers stacked along a leading axis.

  Layers are drawn and quantized one by one, so that under `jit` no float32 copy of all of them
  exists.

  Args:
    config: of the model.
    seed: of the random numbers.
    format: of the linear layers that the model quantizes, as of kernels `(in, out)`, see
      `tables.row_format` for embedding and head; None leaves them float32.

  Returns:
    A tree of float32 and, with a format, QuantizedArray leaves. Kernels are `(…, out, in)`, and
    packed ones have `format.transposed`.
  """
  rngs = nnx.Rngs(params=jax.random.key(seed))
  size = (config.vocabulary, config.width)
  draw = lambda shape: modules.INIT_SCALE * jax.random.normal(rngs.params(), shape)

  def table(shape: tuple[int, ...]) -> Any:
    if config.quantized != "all":
      return draw(shape)
    return {"rows": tables.init(rngs.params(), size, config.vocabulary_parts, format)}

  params: Params = {"embedding": table(size)}
  keys = jax.random.split(rngs.params(), config.layers)
  for stack, layers in config.stacks.items():

    def layer(key: jax.Array, stack: str = stack) -> Params:
      block = {stack: nnx.to_pure_dict(nnx.state(_block(config, stack, key), nnx.Param))}
      if format:
        block = eco.quantize(block, format.transposed, is_quantized(config))
      return block[stack]

    params[stack] = jax.lax.map(layer, keys[np.array(layers)])
  norm = modules.RMSNorm(config, config.width)
  params["norm"] = {"scale": norm.scale.get_value()}
  if not config.tied_embedding:
    params["head"] = table(size[::-1])
  return params


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(embedding_VxD: jax.Array, tokens_BxL: jax.Array, dtype: Any) -> jax.Array:
  """The rows of `tokens`, in `dtype`; their gradients are summed in float32."""
  return sharding.gather("embedding", embedding_VxD.astype(dtype))[tokens_BxL]


def _lookup_forward(embedding_VxD: jax.Array, tokens_BxL: jax.Array, dtype: Any) -> tuple:
  return _lookup(embedding_VxD, tokens_BxL, dtype), (embedding_VxD, tokens_BxL)


def _lookup_backward(dtype: Any, residuals: tuple, grad_BxLxD: jax.Array) -> tuple:
  del dtype
  embedding_VxD, tokens_BxL = residuals
  # The gradient's zeros wait for the first addend, or they would exist all the backward pass.
  zero, grad_BxLxD = jax.lax.optimization_barrier((jnp.float32(0), grad_BxLxD))
  # A frequent token's gradient is a sum of thousands, in which bfloat16 would lose most.
  zeros = jnp.full_like(embedding_VxD, zero)
  return zeros.at[tokens_BxL].add(grad_BxLxD.astype(zeros.dtype)), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def hidden(
  config: TransformerConfig, params: Params, tokens_BxL: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The last layer's normalized output, shape (B, L, D), and the means of routing metrics."""
  dtype, (_, L) = jnp.dtype(config.dtype), tokens_BxL.shape
  if config.quantized == "all":
    x_BxLxD = tables.lookup("embedding/rows", params["embedding"]["rows"], tokens_BxL, dtype)
  else:
    x_BxLxD = _lookup(params["embedding"], tokens_BxL, dtype)
  x_BxLxD = sharding.constrain(x_BxLxD, "batch", None, None)
  if config.scaled_embedding:
    x_BxLxD = x_BxLxD * jnp.asarray(math.sqrt(config.width), dtype)
  angle_LxK2 = modules.rotation(config, L)
  local_angle_LxK2 = modules.rotation(config, L, is_global=False)
  documents_BxL = None
  if config.separator >= 0:
    documents_BxL = modules.documents(tokens_BxL, config.separator)
  auxiliary = []
  for stack, layers in config.stacks.items():
    block = nnx.eval_shape(functools.partial(_block, config, stack, jax.random.key(0)))
    definition, state = nnx.split(block)

    def layer(
      x_BxLxD: jax.Array,
      scanned: tuple[Params, jax.Array],
      stack: str = stack,
      definition: Any = definition,
      state: Any = state,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
      params, is_global = scanned
      params = sharding.gather(stack, params)
      state = jax.tree.map(lambda x: x, state)  # Of its own, because filling it in changes it.
      nnx.replace_by_pure_dict(state, params)
      angle = angle_LxK2
      if config.window:
        angle = jnp.where(is_global, angle_LxK2, local_angle_LxK2)
      x_BxLxD, aux = nnx.merge(definition, state)(x_BxLxD, angle, is_global, documents_BxL)
      return sharding.constrain(x_BxLxD, "batch", None, None), aux

    if config.remat != "none":
      layer = jax.checkpoint(layer, policy=_REMAT[config.remat], prevent_cse=config.unroll > 1)
    is_global_S = jnp.array([config.is_global(i) for i in layers])
    x_BxLxD, aux = jax.lax.scan(layer, x_BxLxD, (params[stack], is_global_S), unroll=config.unroll)
    auxiliary.append(aux)
  norm = modules.RMSNorm(config, config.width)
  norm.scale.set_value(params["norm"]["scale"])
  return norm(x_BxLxD), {name: jnp.mean(x) for aux in auxiliary for name, x in aux.items()}


def _logits(config: TransformerConfig, params: Params, x_BxLxD: jax.Array) -> jax.Array:
  """Float32 logits of normalized outputs."""
  name = "embedding" if config.tied_embedding else "head"
  if config.quantized == "all":
    return tables.logits(f"{name}/rows", params[name]["rows"], x_BxLxD, config.logit_cap)
  head = sharding.gather(name, params[name].astype(x_BxLxD.dtype))
  spec = "bld,vd->blv" if config.tied_embedding else "bld,dv->blv"
  logits = product(spec, x_BxLxD, head)
  if config.logit_cap:
    logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
  return sharding.constrain(logits, "batch", None, "vocabulary")


def apply(config: TransformerConfig, params: Params, tokens_BxL: jax.Array) -> jax.Array:
  """Float32 logits of shape (B, L, V) of a model with these parameters, packed or float."""
  return _logits(config, params, hidden(config, params, tokens_BxL)[0])


def next_logits(
  config: TransformerConfig, params: Params, tokens_BxL: jax.Array, last: jax.Array
) -> jax.Array:
  """Float32 logits of shape (B, V) of what follows the tokens up to number `last`."""
  x_BxLxD = hidden(config, params, tokens_BxL)[0]
  return _logits(config, params, jax.lax.dynamic_slice_in_dim(x_BxLxD, last, 1, 1))[:, 0]


def _nats(logits_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
  """Cross-entropy of targets.

  The target's logit is chosen by a product. The gradient of an index is a scatter, a kernel of its
  own that reads and writes all logits once more; of `jnp.where`, XLA makes an array of zeros.
  """
  is_target = targets_BxL[..., None] == jnp.arange(logits_BxLxV.shape[-1], dtype=targets_BxL.dtype)
  chosen_BxL = jnp.sum(logits_BxLxV * is_target.astype(jnp.float32), axis=-1)
  return jax.nn.logsumexp(logits_BxLxV, axis=-1) - chosen_BxL


def nats(
  config: TransformerConfig,
  params: Params,
  tokens_BxM: jax.Array,
  weight_BxL: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Cross-entropy of next tokens, summed over each sequence.

  Args:
    config: of the model.
    params: its parameters, packed or float.
    tokens_BxM: windows of M = L + 1 tokens, int32.
    weight_BxL: float32, by which each target's nats are multiplied; None is 1 for all.

  Returns:
    Float32 of shape (B,), and for routed experts a dictionary with `balance_loss` and `dropped`,
    means over layers.
  """
  x_BxLxD, aux = hidden(config, params, tokens_BxM[:, :-1])
  targets_BxL = tokens_BxM[:, 1:]
  B, L, _ = x_BxLxD.shape
  chunks = config.loss_chunks
  if L % chunks:
    raise ValueError(f"loss_chunks {chunks} does not divide a length of {L} tokens")
  if weight_BxL is None:
    weight_BxL = jnp.ones((B, L), jnp.float32)

  cut = lambda y: jnp.moveaxis(y.reshape(B, chunks, L // chunks, *y.shape[2:]), 1, 0)
  if config.quantized == "all":
    name = "embedding" if config.tied_embedding else "head"
    nats_NxBxl = tables.cross_entropy(
      f"{name}/rows", params[name]["rows"], cut(x_BxLxD), cut(targets_BxL), config.logit_cap
    )
    return jnp.sum(nats_NxBxl * cut(weight_BxL), axis=(0, 2)), aux

  def chunk(total_B: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    x, targets, weight = part
    return total_B + jnp.sum(_nats(_logits(config, params, x), targets) * weight, axis=1), None

  if chunks > 1:
    chunk = jax.checkpoint(chunk, prevent_cse=False)
  total_B, _ = jax.lax.scan(
    chunk, jnp.zeros(B, jnp.float32), (cut(x_BxLxD), cut(targets_BxL), cut(weight_BxL))
  )
  return total_B, aux


def loss(
  config: TransformerConfig,
  params: Params,
  tokens_BxM: jax.Array,
  weight_BxL: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The objective: mean cross-entropy of next tokens, and the weighted balance loss.

  Args:
    config: of the model.
    params: its parameters, packed or float.
    tokens_BxM: windows of M = L + 1 tokens, int32.
    weight_BxL: as in `nats`; with weights of mean 1 the mean is the weighted mean.

  Returns:
    The loss, and a dictionary with `cross_entropy` (nats per token) and what `nats` tells.
  """
  total_B, aux = nats(config, params, tokens_BxM, weight_BxL)
  entropy = jnp.sum(total_B) / (tokens_BxM.shape[0] * (tokens_BxM.shape[1] - 1))
  value = entropy
  if config.balance_weight and "balance_loss" in aux:
    value = value + config.balance_weight * aux["balance_loss"]
  return value, {"cross_entropy": entropy, **aux}


def count_params(config: TransformerConfig, embedding: bool = False) -> int:
  """Number of parameters, with or without embedding and head; nothing is allocated."""
  shapes = jax.eval_shape(lambda: init(config, 0))
  counts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(shapes[name])) for name in shapes}
  return sum(n for name, n in counts.items() if embedding or name not in ("embedding", "head"))


@functools.cache
def flops_per_token(config: TransformerConfig, length: int) -> float:
  """Operations of forward and backward pass per token that is trained on.

  Six for each weight that a token meets (its own experts only, the head, not the embedding), and
  12 × heads × head width × positions of the window for each layer, as in Chowdhery et al, `PaLM
  <https://arxiv.org/abs/2204.02311>`_, 2022, appendix B. Recomputation is not counted.
  """
  shapes = jax.eval_shape(lambda: init(config, 0))
  total = float(config.vocabulary * config.width)
  for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if is_block_kernel(name):
      share = config.experts_per_token / config.experts if is_expert_kernel(name) else 1
      total += math.prod(leaf.shape) * share
    elif name.endswith("/router"):
      total += math.prod(leaf.shape)
  spans = [
    length if config.is_global(i) else min(length, config.window) for i in range(config.layers)
  ]
  return 6 * total + 12 * config.heads * config.head_width * sum(spans)
