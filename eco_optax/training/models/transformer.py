"""The Transformer of the scaling study: pre-norm, rotary, gated MLP, in Flax NNX.

Letters in names: B batch, L length, D model width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import eco_optax as eco

_INIT_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes of a Transformer; the default of `mlp_width` is the scaling study's."""

  layers: int
  width: int
  heads: int
  vocabulary: int
  mlp_width: int | None = None  # None: 8/3 of the width, rounded up to a multiple of 256.
  dtype: str = "float32"  # Of activations; norms, rotary, softmax and logits are float32.
  activation_format: eco.Format | None = None  # Of the inputs of the blocks' linear layers.

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ValueError(f"width {self.width} does not make {self.heads} heads of an even width")
    if self.mlp_width is None:
      object.__setattr__(self, "mlp_width", 256 * math.ceil(8 * self.width // 3 / 256))


class RMSNorm(nnx.Module):
  """x / rms(x) × scale, in float32."""

  def __init__(self, width: int):
    self.scale = nnx.Param(jnp.ones(width, jnp.float32))

  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    """The normalized x, in its own dtype."""
    x = x_BxLxD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5)
    return (x * self.scale.get_value()).astype(x_BxLxD.dtype)


class Linear(nnx.Module):
  """x @ kernel, packed or float, without bias."""

  def __init__(
    self, config: TransformerConfig, inputs: int, outputs: int, scale: float, rngs: nnx.Rngs
  ):
    self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), (inputs, outputs)))
    self.activation_format = config.activation_format

  def __call__(self, x: jax.Array) -> jax.Array:
    """Shape (…, inputs) to (…, outputs)."""
    return eco.matmul(x, self.kernel.get_value(), self.activation_format)


def rotate(x_BxLxHxK: jax.Array, base: float = 1e4) -> jax.Array:
  """Rotary position embedding on interleaved pairs (2i, 2i + 1), in float32."""
  length, width = x_BxLxHxK.shape[1], x_BxLxHxK.shape[3]
  rates = np.float32(base) ** (-np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
  angle = np.arange(length, dtype=np.float32)[:, None, None] * rates
  pairs = x_BxLxHxK.astype(jnp.float32).reshape(*x_BxLxHxK.shape[:3], width // 2, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  cos, sin = np.cos(angle)[None], np.sin(angle)[None]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BxLxHxK.shape).astype(x_BxLxHxK.dtype)


class Attention(nnx.Module):
  """Causal multi-head attention."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    d = config.width
    out_scale = _INIT_SCALE / math.sqrt(2 * config.layers)
    self.heads = config.heads
    self.query = Linear(config, d, d, _INIT_SCALE, rngs)
    self.key = Linear(config, d, d, _INIT_SCALE, rngs)
    self.value = Linear(config, d, d, _INIT_SCALE, rngs)
    self.out = Linear(config, d, d, out_scale, rngs)

  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    """Each position attends to itself and those before it."""
    batch, length, d = x_BxLxD.shape
    split = lambda y: y.reshape(batch, length, self.heads, d // self.heads)
    q_BxLxHxK = rotate(split(self.query(x_BxLxD)))
    k_BxLxHxK = rotate(split(self.key(x_BxLxD)))
    v_BxLxHxK = split(self.value(x_BxLxD))
    logits_BxHxLxL = jnp.einsum(
      "blhk,bmhk->bhlm", q_BxLxHxK, k_BxLxHxK, preferred_element_type=jnp.float32
    ) / np.float32(math.sqrt(d // self.heads))
    causal = np.tril(np.ones((1, 1, length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, logits_BxHxLxL, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhlm,bmhk->blhk", weights.astype(x_BxLxD.dtype), v_BxLxHxK)
    return self.out(mixed.reshape(batch, length, d))


class GatedMLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) × up(x))."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    d, f = config.width, config.mlp_width
    assert f is not None
    out_scale = _INIT_SCALE / math.sqrt(2 * config.layers)
    self.gate = Linear(config, d, f, _INIT_SCALE, rngs)
    self.up = Linear(config, d, f, _INIT_SCALE, rngs)
    self.down = Linear(config, f, d, out_scale, rngs)

  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    """Each position by itself."""
    return self.down(jax.nn.silu(self.gate(x_BxLxD)) * self.up(x_BxLxD))


class Block(nnx.Module):
  """Attention and MLP, each behind a norm and beside a residual."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width)
    self.attention = Attention(config, rngs)
    self.mlp_norm = RMSNorm(config.width)
    self.mlp = GatedMLP(config, rngs)

  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    """One layer."""
    x_BxLxD = x_BxLxD + self.attention(self.attention_norm(x_BxLxD))
    return x_BxLxD + self.mlp(self.mlp_norm(x_BxLxD))


class Transformer(nnx.Module):
  """A decoder-only language model whose blocks are stacked along a leading axis and scanned."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.dtype)
    size = (config.vocabulary, config.width)
    self.embedding = nnx.Param(_INIT_SCALE * jax.random.normal(rngs.params(), size))
    keys = nnx.Rngs(params=jax.random.split(rngs.params(), config.layers))
    self.blocks = nnx.vmap(lambda rngs: Block(config, rngs))(keys)
    self.norm = RMSNorm(config.width)
    self.head = nnx.Param(_INIT_SCALE * jax.random.normal(rngs.params(), size[::-1]))

  def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
    """Tokens, int32 of shape (B, L), to logits, float32 of shape (B, L, V)."""
    x_BxLxD = self.embedding.get_value().astype(self.dtype)[tokens_BxL]
    definition, stacked = nnx.split(self.blocks)
    layer = lambda x, params: (nnx.merge(definition, params)(x), None)
    x_BxLxD, _ = jax.lax.scan(layer, x_BxLxD, stacked)
    head_DxV = self.head.get_value().astype(self.dtype)
    return jnp.matmul(self.norm(x_BxLxD), head_DxV, preferred_element_type=jnp.float32)


def init(config: TransformerConfig, seed: int) -> dict[str, Any]:
  """Float32 parameters as a plain dictionary, ready for `eco.quantize`."""
  model = Transformer(config, nnx.Rngs(params=jax.random.key(seed)))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def apply(config: TransformerConfig, params: dict[str, Any], tokens_BxL: jax.Array) -> jax.Array:
  """Logits of a model with these parameters, packed or float."""
  model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
  definition, state = nnx.split(model)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(definition, state)(tokens_BxL)


def is_block_kernel(path: str, leaf: Any) -> bool:
  """Whether a parameter is a linear layer inside a block: what the paper quantizes."""
  del leaf
  return path.startswith("blocks/") and path.endswith("/kernel")


def count_params(config: TransformerConfig, embedding: bool = False) -> int:
  """Number of parameters, with or without embedding and head; nothing is allocated."""
  params = jax.eval_shape(lambda: init(config, 0))
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  return total - (0 if embedding else 2 * config.vocabulary * config.width)
