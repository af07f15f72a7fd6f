"""The parts that Transformers are made of, in Flax NNX; all on one token stream, causal.

Letters in names: B batch, L length, D model width, H query heads, G key-value heads, K head width,
E experts, T experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import eco_optax as eco
from eco_optax.training.models import experts
from eco_optax.training.models.attention import attend
from eco_optax.training.models.config import TransformerConfig
from eco_optax.training.models.products import product

INIT_SCALE = 0.02


class RMSNorm(nnx.Module):
  """x / rms(x) × scale over the last axis, in float32; × (1 + scale) where the config says so."""

  def __init__(self, config: TransformerConfig, width: int):
    start = jnp.zeros if config.norm_offset else jnp.ones
    self.scale = nnx.Param(start(width, jnp.float32))
    self.epsilon, self.offset = config.norm_epsilon, float(config.norm_offset)

  def __call__(self, x: jax.Array) -> jax.Array:
    """The normalized x, in its own dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
    scale = self.scale.get_value() + self.offset
    return (y * jax.lax.broadcast_to_rank(scale, y.ndim)).astype(x.dtype)


class Linear(nnx.Module):
  """x @ kernelᵀ, packed or float, plus a bias if asked for.

  Kernels are (out, in): an output channel, whose weights share a scale, is one row in memory.
  With `experts` there is one kernel for each, and one is put in the place of all to be called.
  """

  def __init__(
    self,
    config: TransformerConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    *,
    writes_residual: bool = False,
    bias: bool = False,
    experts: tuple[int, ...] = (),
  ):
    # Additions to the residual stream start small, because 2 × layers of them add up.
    scale = INIT_SCALE / math.sqrt(2 * config.layers) if writes_residual else INIT_SCALE
    drawn = scale * jax.random.normal(rngs.params(), (*experts, inputs, outputs))
    self.kernel = nnx.Param(jnp.swapaxes(drawn, -1, -2))
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
    self.formats = {
      name: getattr(config, name)
      for name in ("activation_format", "gradient_format", "kernel_gradient_format")
    }

  def __call__(self, x: jax.Array) -> jax.Array:
    """Shape (…, inputs) to (…, outputs), by one kernel."""
    kernel = self.kernel.get_value()
    formats: dict = self.formats if isinstance(kernel, eco.QuantizedArray) else {}
    y = eco.matmul(x, kernel, transposed=True, **formats)
    if self.bias is None:
      return y
    bias = self.bias.get_value().astype(y.dtype)
    return y + jax.lax.broadcast_to_rank(bias, y.ndim)


def rotation(config: TransformerConfig, length: int, is_global: bool = True) -> jax.Array:
  """Angles of rotary position embedding: position × base^(−2i / K), float32 of shape (L, K / 2).

  Args:
    config: of the model.
    length: L, in tokens.
    is_global: one flag per layer.
  """
  base = config.rope_base if is_global else config.local_rope_base
  factor = config.rope_factor if is_global else config.local_rope_factor
  rates = base ** (-np.arange(0, config.head_width, 2) / config.head_width)
  turns = config.rope_length * rates / (2 * np.pi)
  kept = np.clip((turns - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
  rates = kept * rates + (1 - kept) * rates / factor
  return jnp.arange(length, dtype=jnp.float32)[:, None] * rates.astype(np.float32)


def rotate(x_BxLxHxK: jax.Array, angle_LxK2: jax.Array, interleaved: bool) -> jax.Array:
  """Turns pairs of channels by the angles, in float32.

  Args:
    x_BxLxHxK: queries or keys.
    angle_LxK2: radians for each position and pair.
    interleaved: whether pairs are channels (2i, 2i + 1), or else (i, i + K / 2).

  Returns:
    An array like x.
  """
  B, L, H, K = x_BxLxHxK.shape
  pair_axis = -1 if interleaved else -2
  pairs = x_BxLxHxK.astype(jnp.float32)
  pairs = pairs.reshape((B, L, H, K // 2, 2) if interleaved else (B, L, H, 2, K // 2))
  first, second = (jax.lax.index_in_dim(pairs, i, pair_axis, keepdims=False) for i in (0, 1))
  cos, sin = jnp.cos(angle_LxK2)[None, :, None], jnp.sin(angle_LxK2)[None, :, None]
  turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=pair_axis)
  return turned.reshape(x_BxLxHxK.shape).astype(x_BxLxHxK.dtype)


def documents(tokens_BxL: jax.Array, separator: int) -> jax.Array:
  """The number of each position's document, int32.

  The separator behind a document is the first token of the next one, so that a document's last
  token still predicts its end, and nothing but the separator predicts the next one's beginning.
  """
  return jnp.cumsum(tokens_BxL == separator, axis=1)


class Attention(nnx.Module):
  """Causal attention, multi-head or with shared keys and values, in a window and a document."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    D, K = config.width, config.head_width
    self.config = config
    bias = config.qkv_bias
    self.query = Linear(config, D, config.heads * K, rngs, bias=bias)
    self.key = Linear(config, D, config.kv_heads * K, rngs, bias=bias)
    self.value = Linear(config, D, config.kv_heads * K, rngs, bias=bias)
    self.out = Linear(config, config.heads * K, D, rngs, writes_residual=True)
    if config.qk_norm:
      width = lambda heads: heads * K if config.joint_qk_norm else K
      self.query_norm = RMSNorm(config, width(config.heads))
      self.key_norm = RMSNorm(config, width(config.kv_heads))

  def __call__(
    self,
    x_BxLxD: jax.Array,
    angle_LxK2: jax.Array,
    is_global: bool | jax.Array = True,
    documents_BxL: jax.Array | None = None,
  ) -> jax.Array:
    """Each position attends to itself and those before it in its document.

    Where `is_global` is false, those of the config's window alone.
    """
    config, (B, L, _) = self.config, x_BxLxD.shape
    split = lambda y: y.reshape(B, L, -1, config.head_width)
    q, k, v_BxLxGxK = self.query(x_BxLxD), self.key(x_BxLxD), split(self.value(x_BxLxD))
    if config.qk_norm:
      shaped = (lambda y: y) if config.joint_qk_norm else split
      q, k = self.query_norm(shaped(q)), self.key_norm(shaped(k))
    turn = lambda y: rotate(split(y), angle_LxK2, config.rope_interleaved)
    scale = (config.query_scalar or config.head_width) ** -0.5
    y_BxLxHxK = attend(
      turn(q),
      turn(k),
      v_BxLxGxK,
      scale=scale,
      cap=config.attention_cap,
      window=config.window,
      is_global=is_global,
      documents_BxL=documents_BxL,
      implementation=config.attention,
    )
    return self.out(y_BxLxHxK.reshape(B, L, -1))


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}  # GELU in its tanh form.


class MLP(nnx.Module):
  """down(activation(gate(x)) × up(x)), or down(activation(up(x))) without a gate."""

  def __init__(
    self, config: TransformerConfig, hidden: int, rngs: nnx.Rngs, experts: tuple[int, ...] = ()
  ):
    D = config.width
    self.activation, self.gated = config.activation, config.gated
    if config.gated:
      self.gate = Linear(config, D, hidden, rngs, experts=experts)
    self.up = Linear(config, D, hidden, rngs, experts=experts)
    self.down = Linear(config, hidden, D, rngs, experts=experts, writes_residual=True)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Each position by itself."""
    act = _ACTIVATIONS[self.activation]
    y = act(self.gate(x)) * self.up(x) if self.gated else act(self.up(x))
    return self.down(y)


def _as_function(mlp: MLP) -> tuple[experts.Expert, Any]:
  """An MLP as a function of kernels and rows, and its kernels."""
  definition, state = nnx.split(mlp)

  def fn(kernels: Any, x_RxD: jax.Array) -> jax.Array:
    own = jax.tree.map(lambda x: x, state)  # Of its own, because filling it in changes it.
    nnx.replace_by_pure_dict(own, kernels)
    return nnx.merge(definition, own)(x_RxD)  # type: ignore[no-any-return]

  return fn, nnx.to_pure_dict(state)


def _dense(config: TransformerConfig, mlp: MLP, x_BxLxD: jax.Array) -> jax.Array:
  """An MLP that takes every token: in blocks of rows it is one expert that all choose."""
  if not config.mlp_blocks:
    return mlp(x_BxLxD)
  expert, kernels = _as_function(mlp)
  kernels = jax.tree.map(lambda x: x[None], kernels)
  one = (*x_BxLxD.shape[:2], 1)
  return experts.apply(expert, kernels, x_BxLxD, jnp.zeros(one, jnp.int32), jnp.ones(one))


class RoutedExperts(nnx.Module):
  """A weighted sum of the outputs of each token's best experts, plus shared experts.

  With a capacity factor, an expert takes the first `capacity` tokens of a sequence that choose it,
  in order of position; what comes after is dropped from the sum and counted. Without one nothing is
  ever dropped.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    D, E = config.width, config.experts
    self.config = config
    self.router = nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), (D, E)))
    self.experts = MLP(config, config.expert_width, rngs, experts=(E,))
    if config.shared_experts:
      self.shared = MLP(config, config.shared_experts * config.expert_width, rngs)

  def _kept(self, chosen_BxLTxE: jax.Array, expert_BxLT: jax.Array) -> jax.Array:
    """Whether a choice is among the first of its expert's in its sequence."""
    config, length = self.config, chosen_BxLTxE.shape[1] // self.config.experts_per_token
    if config.capacity_factor is None:
      return jnp.ones(expert_BxLT.shape, bool)
    rows = config.capacity_factor * length * config.experts_per_token / config.experts
    capacity = math.ceil(round(rows, 6))  # 1.1 × 50 is a little more than 55.
    before = jnp.sum((jnp.cumsum(chosen_BxLTxE, axis=1) - 1) * chosen_BxLTxE, axis=-1)
    return before < capacity

  def __call__(self, x_BxLxD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Outputs like x, and the balance loss and share of dropped choices of this layer."""
    config, (B, L, _) = self.config, x_BxLxD.shape
    E, T = config.experts, config.experts_per_token
    # In float32, because a choice of experts is all or nothing.
    logits_BxLxE = product("bld,de->ble", x_BxLxD, self.router.get_value(), "highest")
    probability_BxLxE = jax.nn.softmax(logits_BxLxE, axis=-1)
    weight_BxLxT, expert_BxLxT = jax.lax.top_k(probability_BxLxE, T)
    if config.normalize_expert_weights:
      weight_BxLxT = weight_BxLxT / jnp.sum(weight_BxLxT, axis=-1, keepdims=True)

    expert_BxLT = expert_BxLxT.reshape(B, L * T)
    chosen_BxLTxE = (expert_BxLT[..., None] == jnp.arange(E)).astype(jnp.int32)
    kept_BxLT = self._kept(chosen_BxLTxE, expert_BxLT)
    expert_BxLxT = jnp.where(kept_BxLT, expert_BxLT, E).reshape(B, L, T)

    expert, kernels = _as_function(self.experts)
    y_BxLxD = experts.apply(expert, kernels, x_BxLxD, expert_BxLxT, weight_BxLxT)
    if config.shared_experts:
      y_BxLxD = y_BxLxD + _dense(config, self.shared, x_BxLxD)

    # 1 when every expert gets the same share of a sequence, more the less even they are.
    share_BxE = jnp.mean(chosen_BxLTxE.astype(jnp.float32), axis=1)
    balance = E * jnp.mean(jnp.sum(share_BxE * jnp.mean(probability_BxLxE, axis=1), axis=-1))
    dropped = 1 - jnp.mean(kept_BxLT.astype(jnp.float32))
    return y_BxLxD, {"balance_loss": balance, "dropped": dropped}


class Block(nnx.Module):
  """Attention and an MLP or experts, each with a norm before or after it, beside a residual."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, routed: bool):
    self.config, self.routed = config, routed
    self.attention = Attention(config, rngs)
    if config.pre_norms:
      self.attention_norm = RMSNorm(config, config.width)
      self.mlp_norm = RMSNorm(config, config.width)
    if routed:
      self.moe = RoutedExperts(config, rngs)
    else:
      self.mlp = MLP(config, config.mlp_width, rngs)
    if config.post_norms:
      self.attention_post_norm = RMSNorm(config, config.width)
      self.mlp_post_norm = RMSNorm(config, config.width)

  def __call__(
    self,
    x_BxLxD: jax.Array,
    angle_LxK2: jax.Array,
    is_global: bool | jax.Array = True,
    documents_BxL: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, Any]]:
    """One layer, and the metrics of its routing if there is any."""
    aux: dict[str, Any] = {}
    before, after = self.config.pre_norms, self.config.post_norms
    h_BxLxD = self.attention_norm(x_BxLxD) if before else x_BxLxD
    y_BxLxD = self.attention(h_BxLxD, angle_LxK2, is_global, documents_BxL)
    x_BxLxD = x_BxLxD + (self.attention_post_norm(y_BxLxD) if after else y_BxLxD)
    h_BxLxD = self.mlp_norm(x_BxLxD) if before else x_BxLxD
    if self.routed:
      y_BxLxD, aux = self.moe(h_BxLxD)
    else:
      y_BxLxD = _dense(self.config, self.mlp, h_BxLxD)
    return x_BxLxD + (self.mlp_post_norm(y_BxLxD) if after else y_BxLxD), aux
