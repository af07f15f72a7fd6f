"""TransformerConfig: what a model is, in numbers."""

from __future__ import annotations

import dataclasses
import math

import eco_optax as eco

ATTENTIONS = ("auto", "plain", "chunked", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Sizes and choices of a decoder-only Transformer; the defaults are the scaling study's.

  Raises:
    ValueError: for numbers that do not fit each other, naming them.
  """

  layers: int
  width: int
  heads: int
  vocabulary: int
  kv_heads: int = 0  # 0: as many as heads.
  head_width: int = 0  # 0: width / heads.
  mlp_width: int = 0  # 0: 8/3 of the width, rounded up to a multiple of 256.
  activation: str = "silu"  # Or gelu.
  gated: bool = True  # Whether MLPs and experts have a gate.

  tied_embedding: bool = False  # Whether the embedding is the head too.
  scaled_embedding: bool = False  # Whether it is multiplied by √width.
  norm_epsilon: float = 1e-5
  norm_offset: bool = False  # Whether norms multiply by 1 + scale.
  pre_norms: bool = True  # Whether attention and MLP have a norm before them.
  post_norms: bool = False  # Whether they have one after them.
  logit_cap: float = 0.0  # Logits become cap × tanh(logits / cap); 0: they stay.

  qkv_bias: bool = False  # Whether queries, keys and values have a bias.
  qk_norm: bool = False  # Whether queries and keys are normalized, per head.
  joint_qk_norm: bool = False  # Whether all heads are normalized together.
  query_scalar: float = 0.0  # Attention logits are divided by its square root; 0: head_width.
  attention_cap: float = 0.0  # Attention logits become cap × tanh(logits / cap); 0: they stay.
  attention: str = "auto"  # How it is computed: see `attention.attend`.

  rope_base: float = 1e4
  rope_interleaved: bool = True  # Pairs (2i, 2i + 1), or else (i, i + K / 2).
  window: int = 0  # Of layers with local attention, in tokens; 0: all layers are global.
  global_every: int = 1  # With a window, every how many layers one is global.
  local_rope_base: float = 1e4  # Of layers with local attention.
  # Longer contexts: slow rotations are slowed by this factor. Slow are those with fewer than
  # rope_low turns in rope_length tokens, and partly so those with up to rope_high; with a
  # rope_length of 0 all are.
  rope_factor: float = 1.0
  local_rope_factor: float = 1.0  # Of layers with local attention.
  rope_length: int = 0
  rope_low: float = 1.0
  rope_high: float = 4.0

  experts: int = 0  # Routed ones; 0: MLPs.
  experts_per_token: int = 0
  expert_width: int = 0
  shared_experts: int = 0  # Each of expert_width.
  dense_layers: int = 0  # First layers that have an MLP all the same.
  capacity_factor: float | None = None  # Rows of an expert over their mean; None drops nothing.
  normalize_expert_weights: bool = False  # Whether those of a token sum to 1.
  balance_weight: float = 0.0  # Of the load-balancing loss.

  # Linear layers of blocks, of experts alone, or all: blocks, embedding and head.
  quantized: str = "blocks"
  # With `all`, parts of the vocabulary in which embedding and head are stored; the loss makes the
  # logits of one at a time, and `release` the gradient.
  vocabulary_parts: int = 1
  activation_format: eco.Format | None = None  # Of the inputs of quantized linear layers.
  # Of their outputs' cotangents in the gradients of inputs, and of kernels, see eco.matmul.
  gradient_format: eco.Format | None = None
  kernel_gradient_format: eco.Format | None = None
  dtype: str = "float32"  # Of activations; norms, rotary, router, softmax and logits are float32.
  # Layers that one turn of the loop over a stack has. With all in one turn a GPU's step copies no
  # activations into stacks; one of 16 layers takes five times as long to compile.
  unroll: int = 1
  remat: str = "none"  # What the backward pass makes again: none, dots (all but products) or full.
  # Whether MLPs without experts take up to 1,024 rows at a time, whose hidden channels the backward
  # pass makes again: for long batches and wide MLPs.
  mlp_blocks: bool = False
  separator: int = -1  # The token that ends documents, which attention stays in; -1: it does not.
  loss_chunks: int = 1  # Parts of a sequence whose logits are made, and made again, one by one.

  def __post_init__(self):
    sizes = ("layers", "width", "heads", "vocabulary", "vocabulary_parts")
    numbers = (*sizes, "global_every", "loss_chunks", "unroll")
    counts = ("kv_heads", "head_width", "mlp_width", "window", "experts", "shared_experts")
    more = ("dense_layers", "balance_weight", "rope_length")
    scalars = ("logit_cap", "query_scalar", "attention_cap")
    factors = ("rope_factor", "local_rope_factor")
    for least, names in ((1, (*numbers, *factors)), (0, (*counts, *more, *scalars))):
      for name in names:
        if getattr(self, name) < least:
          raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
    if not -1 <= self.separator < self.vocabulary:
      raise ValueError(
        f"separator {self.separator} is neither a token of {self.vocabulary} nor -1 for none"
      )
    if self.capacity_factor is not None and self.capacity_factor <= 0:
      raise ValueError(f"capacity_factor must be above 0 or None, got {self.capacity_factor}")
    for name, choices in (
      ("dtype", ("float32", "bfloat16")),
      ("activation", ("silu", "gelu")),
      ("quantized", ("blocks", "experts", "all")),
      ("remat", ("none", "dots", "full")),
      ("attention", ATTENTIONS),
    ):
      if getattr(self, name) not in choices:
        raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")
    fill = lambda name, value: object.__setattr__(self, name, getattr(self, name) or value)
    if not self.head_width and self.width % self.heads:
      raise ValueError(f"width {self.width} does not make {self.heads} heads: set head_width")
    fill("kv_heads", self.heads)
    fill("head_width", self.width // self.heads)
    fill("mlp_width", 256 * math.ceil(8 * self.width // 3 / 256))
    if self.attention == "cudnn" and (self.attention_cap or self.separator >= 0):
      has = "attention_cap" if self.attention_cap else "separator"
      raise ValueError(f"attention 'cudnn' does not know a {has}: use 'auto'")
    if self.head_width % 2:
      raise ValueError(f"head_width {self.head_width} is odd, rotary embedding turns pairs")
    if self.rope_low >= self.rope_high:
      raise ValueError(f"rope_low {self.rope_low} is not below rope_high {self.rope_high}")
    if not (self.pre_norms or self.post_norms):
      raise ValueError("pre_norms and post_norms are both False: a block needs one of them")
    if self.joint_qk_norm and not self.qk_norm:
      raise ValueError("joint_qk_norm is True and qk_norm False: set qk_norm too")
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.kv_heads} kv_heads do not divide {self.heads} heads")
    if self.experts and not (0 < self.experts_per_token <= self.experts and self.expert_width):
      raise ValueError(
        f"{self.experts} experts need experts_per_token between 1 and {self.experts}, got"
        f" {self.experts_per_token}, and an expert_width, got {self.expert_width}"
      )
    if not self.experts and (
      self.shared_experts or self.dense_layers or self.quantized == "experts"
    ):
      raise ValueError(
        f"shared_experts {self.shared_experts}, dense_layers {self.dense_layers} and quantized"
        f" {self.quantized!r} are of models with experts, and experts is 0"
      )
    if self.vocabulary_parts > 1 and self.quantized != "all":
      raise ValueError(
        f"vocabulary_parts {self.vocabulary_parts} needs quantized 'all', got {self.quantized!r}"
      )
    if self.vocabulary % self.vocabulary_parts:
      raise ValueError(
        f"vocabulary_parts {self.vocabulary_parts} does not divide a vocabulary of"
        f" {self.vocabulary}"
      )
    if self.dense_layers > self.layers:
      raise ValueError(f"dense_layers {self.dense_layers} is not between 0 and {self.layers}")

  @property
  def stacks(self) -> dict[str, tuple[int, ...]]:
    """The numbers of the layers in each scanned stack, by its name in the parameters."""
    layers = tuple(range(self.layers))
    if not self.experts:
      return {"blocks": layers}
    names = {"dense_blocks": layers[: self.dense_layers], "blocks": layers[self.dense_layers :]}
    return {name: numbers for name, numbers in names.items() if numbers}

  def is_routed(self, stack: str) -> bool:
    """Whether the layers of a stack have experts."""
    return self.experts > 0 and stack == "blocks"

  def is_global(self, layer: int) -> bool:
    """Whether a layer attends to everything before it."""
    return self.window == 0 or (layer + 1) % self.global_every == 0
