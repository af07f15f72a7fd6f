"""config.json of Hugging Face checkpoints, to a TransformerConfig's fields and back."""

from __future__ import annotations

import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from eco_optax.interop import safetensors

if typing.TYPE_CHECKING:  # The harness imports the library, never the reverse.
  from eco_optax.training.models.config import TransformerConfig


class _Family(NamedTuple):
  """A kind of model that transformers knows."""

  architecture: str
  # What a TransformerConfig has to be for it, by field.
  fixed: dict[str, Any]
  # Fields of TransformerConfig by what config.json calls them, beside those of all families.
  fields: Mapping[str, str] = types.MappingProxyType({})
  # What config.json has to say, if it says anything; None is among them too.
  required: Mapping[str, tuple[Any, ...]] = types.MappingProxyType({})
  # What it may leave out, for then it is what a TransformerConfig without it has.
  optional: tuple[str, ...] = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
  # What it has to say besides, though no field is it alone.
  needed: tuple[str, ...] = ()


_PLAIN = {
  "activation": "silu",
  "gated": True,
  "scaled_embedding": False,
  "norm_offset": False,
  "post_norms": False,
  "qk_norm": False,
  "experts": 0,
}
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu",)}
_EXPERTS = {"experts_per_token": "num_experts_per_tok", "expert_width": "moe_intermediate_size"}
_EXPERTS |= {"normalize_expert_weights": "norm_topk_prob"}
_SHARED_WIDTH = "shared_expert_intermediate_size"  # Of qwen2_moe.
_OPTIONAL_EXPERTS = (
  "norm_topk_prob",
  "n_shared_experts",
  "first_k_dense_replace",
  "aux_loss_alpha",
  "router_aux_loss_coef",
)

#: Kinds of models that can be read and saved, by what config.json calls model_type. The first that
#: a model fits is what it is saved as.
FAMILIES = {
  "llama": _Family("LlamaForCausalLM", {**_PLAIN, "window": 0}, required=_NO_BIAS),
  "mistral": _Family(
    "MistralForCausalLM", _PLAIN, required=_NO_BIAS, optional=("head_dim", "tie_word_embeddings")
  ),
  "qwen3": _Family(
    "Qwen3ForCausalLM",
    _PLAIN | {"qk_norm": True, "window": 0},
    required=_NO_BIAS,
    optional=("tie_word_embeddings",),
  ),
  "gemma3_text": _Family(
    "Gemma3ForCausalLM",
    {
      "activation": "gelu",
      "gated": True,
      "scaled_embedding": True,
      "norm_offset": True,
      "post_norms": True,
      "qk_norm": True,
      "experts": 0,
    },
    required={
      "attention_bias": (False,),
      "hidden_activation": ("gelu_pytorch_tanh",),
      "attn_logit_softcapping": (),
      "final_logit_softcapping": (),
      "use_bidirectional_attention": (False,),
    },
    optional=("tie_word_embeddings",),
    needed=("sliding_window",),
  ),
  "deepseek": _Family(
    "DeepseekForCausalLM",
    {name: value for name, value in _PLAIN.items() if name != "experts"} | {"window": 0},
    fields=_EXPERTS
    | {
      "experts": "n_routed_experts",
      "shared_experts": "n_shared_experts",
      "dense_layers": "first_k_dense_replace",
      "balance_weight": "aux_loss_alpha",
    },
    required=_NO_BIAS | {"scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    optional=("num_key_value_heads", "head_dim", "tie_word_embeddings", *_OPTIONAL_EXPERTS),
  ),
  # How transformers, which has no class of DeepSeek-MoE's first version, can serve it: as a model
  # whose shared experts have a gate. One that is always half open goes with twice their output.
  "qwen2_moe": _Family(
    "Qwen2MoeForCausalLM",
    {name: value for name, value in _PLAIN.items() if name != "experts"} | {"window": 0},
    fields=_EXPERTS | {"experts": "num_experts", "balance_weight": "router_aux_loss_coef"},
    required=_NO_BIAS
    | {"qkv_bias": (False,), "decoder_sparse_step": (1,), "use_sliding_window": (False,)},
    optional=("head_dim", "tie_word_embeddings", *_OPTIONAL_EXPERTS),
    needed=(_SHARED_WIDTH,),
  ),
}

_COMMON = {
  "layers": "num_hidden_layers",
  "width": "hidden_size",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_width": "head_dim",
  "mlp_width": "intermediate_size",
  "vocabulary": "vocab_size",
  "norm_epsilon": "rms_norm_eps",
  "tied_embedding": "tie_word_embeddings",
}
_GEMMA_LOCAL_BASE = 1e4


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """What the `config.json` of a checkpoint says, in the fields of a `TransformerConfig`.

  Args:
    folder: of a model of one of `FAMILIES`: Llama, Mistral, Qwen3, Gemma 3 (text) and DeepSeek-MoE
      (its first version).

  Returns:
    Fields by name, for `TransformerConfig(**…)` or `config.model.update(**…)`.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: naming what the model has and this package has not.
  """
  raw = read(folder)
  kind = raw.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(
      f"{folder}: model_type {kind!r} is none of {', '.join(FAMILIES)}"
      + (": take its text model alone" if "text_config" in raw else "")
    )
  own = FAMILIES[kind]
  wrong = [
    f"{name} {raw[name]!r}"
    for name, allowed in own.required.items()
    if raw.get(name) is not None and raw[name] not in allowed
  ]
  fields = {name: x for name, x in own.fixed.items() if name != "window"}
  names = _COMMON | dict(own.fields)
  needed = (*(name for name in names.values() if name not in own.optional), *own.needed)
  if missing := [name for name in needed if raw.get(name) is None]:
    raise ValueError(
      f"{folder}: config.json does not say {', '.join(missing)}: fetch it again, or add what the"
      " model has"
    )
  fields |= {name: raw[theirs] for name, theirs in names.items() if raw.get(theirs) is not None}
  fields.setdefault("tied_embedding", kind == "gemma3_text")
  fields["rope_interleaved"] = False
  if kind == "qwen2_moe":
    expert = fields["expert_width"]
    fields["shared_experts"] = raw[_SHARED_WIDTH] // expert
    fields["dense_layers"] = len(raw.get("mlp_only_layers") or ())
    if raw[_SHARED_WIDTH] % expert:
      wrong.append("a shared expert that is no number of experts")
    if (raw.get("mlp_only_layers") or []) != list(range(fields["dense_layers"])):
      wrong.append("layers without experts behind some that have them")
  fields |= _rope(raw, wrong)
  if kind == "gemma3_text":
    fields |= _gemma_windows(raw, wrong)
    scalar = raw.get("query_pre_attn_scalar", 256)
    if scalar != fields["head_width"]:
      wrong.append(f"query_pre_attn_scalar {scalar} other than head_dim {fields['head_width']}")
  elif kind == "mistral" and raw.get("sliding_window"):
    fields["window"], fields["global_every"] = raw["sliding_window"], fields["layers"] + 1
    fields["local_rope_base"] = fields["rope_base"]
  elif kind == "qwen3" and raw.get("use_sliding_window"):
    wrong.append("use_sliding_window")
  if wrong:
    raise ValueError(f"{folder}: this package's models have no {', no '.join(wrong)}")
  return fields


def check_config(folder: str | pathlib.Path, config: TransformerConfig) -> None:
  """Raises `ValueError` naming every field of a model that is not what a checkpoint says."""
  differ = [
    f"{name} is {getattr(config, name)!r} and has to be {value!r}"
    for name, value in read_config(folder).items()
    if name not in ("rope_interleaved", "balance_weight") and getattr(config, name) != value
  ]
  if differ:
    raise ValueError(f"the model is not that of {folder}: {'; '.join(differ)}")


def read(folder: str | pathlib.Path) -> dict[str, Any]:
  """All that it says.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is damaged.
  """
  path = pathlib.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"there is no {path}: name the folder of a Hugging Face checkpoint")
  return safetensors.read_json(path.read_bytes(), path)


def _rope(raw: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
  """Rotary embedding, which older and newer versions of transformers say in different ways."""
  rope = dict(raw.get("rope_parameters") or {})
  fields: dict[str, Any] = {}
  if "full_attention" in rope:  # One for each kind of layer.
    local = rope.get("sliding_attention") or {}
    fields["local_rope_base"] = local.get("rope_theta", _GEMMA_LOCAL_BASE)
    if local.get("rope_type", "default") != "default":
      wrong.append(f"rope_type {local['rope_type']!r} of local attention")
    rope = dict(rope["full_attention"])
  elif "rope_local_base_freq" in raw:
    fields["local_rope_base"] = raw["rope_local_base_freq"]
  rope |= raw.get("rope_scaling") or {}
  default = 1e6 if raw["model_type"] == "gemma3_text" else 1e4
  fields["rope_base"] = float(rope.get("rope_theta", raw.get("rope_theta", default)))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind in ("linear", "llama3"):
    fields["rope_factor"] = float(rope["factor"])
  elif kind != "default":
    wrong.append(f"rope_type {kind!r}")
  if kind == "llama3":
    fields["rope_length"] = rope["original_max_position_embeddings"]
    fields["rope_low"] = float(rope["low_freq_factor"])
    fields["rope_high"] = float(rope["high_freq_factor"])
  if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
    wrong.append("partial_rotary_factor")
  return fields


def _gemma_windows(raw: dict[str, Any], wrong: list[str]) -> dict[str, Any]:
  layers, types = raw["num_hidden_layers"], raw.get("layer_types")
  every = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern"))
  if types:
    is_global = [kind == "full_attention" for kind in types]
    every = is_global.index(True) + 1 if any(is_global) else layers + 1
    if is_global != [(i + 1) % every == 0 for i in range(layers)]:
      wrong.append(f"layer_types {types}")
  return {"window": raw["sliding_window"], "global_every": every or 6}


def family(config: TransformerConfig, kind: str | None) -> str:
  """The kind of model that a config is, or the one asked for."""
  if kind is not None and kind not in FAMILIES:
    raise ValueError(f"kind {kind!r} is none of {', '.join(FAMILIES)}")
  reasons = []
  for name in [kind] if kind else FAMILIES:
    own = FAMILIES[name]
    wrong = [
      f"{field} {getattr(config, field)!r} and not {value!r}"
      for field, value in own.fixed.items()
      if getattr(config, field) != value
    ]
    if name in ("deepseek", "qwen2_moe") and not (config.experts and config.shared_experts):
      wrong.append("no routed experts beside shared ones")
    if name == "mistral" and config.window and config.global_every <= config.layers:
      wrong.append("layers with global attention")
    if not wrong:
      return name
    reasons.append(f"{name}: {', '.join(wrong)}")
  raise ValueError(f"the model cannot be saved as {'; as '.join(reasons)}")


def write(kind: str, config: TransformerConfig, dtype: str, length: int) -> dict[str, Any]:
  """What config.json is to say of a model."""
  own = FAMILIES[kind]
  told: dict[str, Any] = {
    "architectures": [own.architecture],
    "model_type": kind,
    "torch_dtype": dtype,
    "max_position_embeddings": length,
    "hidden_act": "silu",
    "attention_bias": False,
  }
  told |= {theirs: getattr(config, name) for name, theirs in {**_COMMON, **own.fields}.items()}
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
  if config.rope_factor != 1:
    rope |= {"rope_type": "linear", "factor": config.rope_factor}
    if config.rope_length:
      rope |= {
        "rope_type": "llama3",
        "original_max_position_embeddings": config.rope_length,
        "low_freq_factor": config.rope_low,
        "high_freq_factor": config.rope_high,
      }
  told["rope_parameters"] = rope
  # The same for transformers before 5, which has the base apart.
  told["rope_theta"] = config.rope_base
  if config.rope_factor != 1:
    told["rope_scaling"] = {name: x for name, x in rope.items() if name != "rope_theta"}
  if kind == "mistral":
    told["sliding_window"] = config.window or None
  if kind == "deepseek":
    told |= {"scoring_func": "softmax", "moe_layer_freq": 1}
  if kind == "qwen2_moe":
    told |= {
      "qkv_bias": False,
      _SHARED_WIDTH: config.shared_experts * config.expert_width,
      "mlp_only_layers": list(range(config.dense_layers)),
      "decoder_sparse_step": 1,
      "use_sliding_window": False,
    }
  if kind == "gemma3_text":
    del told["hidden_act"]
    local = {"rope_type": "default", "rope_theta": config.local_rope_base}
    is_global = [config.is_global(i) for i in range(config.layers)]
    told |= {
      "hidden_activation": "gelu_pytorch_tanh",
      "query_pre_attn_scalar": config.head_width,
      "sliding_window": config.window or length,
      "layer_types": ["full_attention" if x else "sliding_attention" for x in is_global],
      "rope_parameters": {"full_attention": rope, "sliding_attention": local},
      "rope_local_base_freq": config.local_rope_base,
      "attn_logit_softcapping": None,
      "final_logit_softcapping": None,
    }
  return told
