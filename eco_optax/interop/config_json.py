"""config.json of Hugging Face checkpoints, to a TransformerConfig's fields and back.

Reading refuses unknown keys. A known key is read below, or is on a list of keys that never change
what a model computes. Writing is checked by reading: the file must give the same model again.
"""

from __future__ import annotations

import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from eco_optax.interop import compressed_tensors, gguf, json_fields, safetensors
from eco_optax.interop.json_fields import FLAG, LIST, NATURAL, NUMBER, OBJECT, POSITIVE, TEXT

if typing.TYPE_CHECKING:  # The harness imports the library, never the reverse.
  from eco_optax.training.models.config import TransformerConfig

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"

#: Fields of a TransformerConfig that say what it computes, beside sizes, as most models have them.
_PLAIN: dict[str, Any] = {
  "activation": "silu",
  "gated": True,
  "tied_embedding": False,
  "scaled_embedding": False,
  "norm_offset": False,
  "pre_norms": True,
  "post_norms": False,
  "logit_cap": 0.0,
  "qkv_bias": False,
  "qk_norm": False,
  "joint_qk_norm": False,
  "query_scalar": 0.0,
  "attention_cap": 0.0,
  "window": 0,
  "global_every": 1,
  "rope_base": 1e4,
  "rope_factor": 1.0,
  "local_rope_base": 1e4,
  "local_rope_factor": 1.0,
  "rope_length": 0,
  "rope_low": 1.0,
  "rope_high": 4.0,
  "experts": 0,
  "experts_per_token": 0,
  "expert_width": 0,
  "shared_experts": 0,
  "dense_layers": 0,
  "normalize_expert_weights": False,
}
_GEMMA = {
  "activation": "gelu",
  "tied_embedding": True,
  "scaled_embedding": True,
  "norm_offset": True,
  "post_norms": True,
}


class _Family(NamedTuple):
  """A kind of model that transformers or vLLM knows."""

  architecture: str
  # Fields that all its models have otherwise than `_PLAIN`.
  fields: Mapping[str, Any]
  # Keys of fields, with transformers' defaults where they differ from `_DEFAULTS`.
  keys: Mapping[str, str] = types.MappingProxyType({})
  defaults: Mapping[str, Any] = types.MappingProxyType({})
  # Keys that have one meaning only here, and what they must be.
  only: Mapping[str, Any] = types.MappingProxyType({"hidden_act": "silu"})
  # Which layers have a window: none, all, or what `_layer_types` makes of more keys.
  local: str = "none"
  is_even: bool = False  # Whether transformers wants heads to divide the width.


_SIZES = {
  "layers": "num_hidden_layers",
  "width": "hidden_size",
  "heads": "num_attention_heads",
  "vocabulary": "vocab_size",
}
_EXPERTS = {
  "experts": "num_experts",
  "experts_per_token": "num_experts_per_tok",
  "expert_width": "moe_intermediate_size",
  "normalize_expert_weights": "norm_topk_prob",
  "balance_weight": "router_aux_loss_coef",
}
_SHARED_WIDTH = "shared_expert_intermediate_size"

#: Kinds of models that can be read and saved, by what config.json calls model_type. The first that
#: a model fits is what it is saved as.
FAMILIES = {
  "llama": _Family("LlamaForCausalLM", {}, is_even=True),
  "mistral": _Family("MistralForCausalLM", {}, defaults={"num_key_value_heads": 8}, local="all"),
  "qwen2": _Family(
    "Qwen2ForCausalLM",
    {"qkv_bias": True},
    defaults={"num_key_value_heads": 32},
    local="qwen",
  ),
  "qwen3": _Family(
    "Qwen3ForCausalLM",
    {"qk_norm": True},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    local="qwen",
  ),
  "olmo2": _Family(
    "Olmo2ForCausalLM",
    {"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
    defaults={"rms_norm_eps": 1e-5},
  ),
  "gemma2": _Family(
    "Gemma2ForCausalLM",
    _GEMMA,
    keys={
      "query_scalar": "query_pre_attn_scalar",
      "attention_cap": "attn_logit_softcapping",
      "logit_cap": "final_logit_softcapping",
    },
    defaults={
      "num_key_value_heads": 4,
      "head_dim": 256,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
    only={"hidden_activation": "gelu_pytorch_tanh"},
    local="gemma2",
    is_even=True,
  ),
  "gemma3_text": _Family(
    "Gemma3ForCausalLM",
    _GEMMA | {"qk_norm": True},
    keys={"query_scalar": "query_pre_attn_scalar", "logit_cap": "final_logit_softcapping"},
    defaults={"num_key_value_heads": 4, "head_dim": 256, "rope_theta": 1e6},
    # transformers has the key and does not apply it.
    only={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None},
    local="gemma3",
    is_even=True,
  ),
  "mixtral": _Family(
    "MixtralForCausalLM",
    {"normalize_expert_weights": True},
    keys={
      "experts": "num_local_experts",
      "experts_per_token": "num_experts_per_tok",
      "expert_width": "intermediate_size",
      "balance_weight": "router_aux_loss_coef",
    },
    defaults={
      "num_key_value_heads": 8,
      "rms_norm_eps": 1e-5,
      "rope_theta": 1e6,
      "sliding_window": None,
    },
    local="all",
  ),
  "qwen3_moe": _Family(
    "Qwen3MoeForCausalLM",
    {"qk_norm": True},
    keys=_EXPERTS,
    defaults={"num_key_value_heads": 4},
    only={"hidden_act": "silu", "decoder_sparse_step": 1},
    local="qwen3_moe",
  ),
  "deepseek": _Family(
    "DeepseekForCausalLM",
    {},
    keys=_EXPERTS
    | {
      "experts": "n_routed_experts",
      "shared_experts": "n_shared_experts",
      "dense_layers": "first_k_dense_replace",
      "balance_weight": "aux_loss_alpha",
    },
    only={"hidden_act": "silu", "scoring_func": "softmax", "moe_layer_freq": 1},
  ),
  # How transformers, which has no class of DeepSeek-MoE's first version, can serve it: as a model
  # whose shared experts have a gate. One that is always half open goes with twice their output.
  "qwen2_moe": _Family(
    "Qwen2MoeForCausalLM",
    {},
    keys=_EXPERTS | {"qkv_bias": "qkv_bias"},
    defaults={"num_key_value_heads": 16, "qkv_bias": True},
    only={"hidden_act": "silu", "decoder_sparse_step": 1, "use_sliding_window": False},
    local="qwen2_moe",
  ),
}

# What transformers takes keys to be that are left out, in most families.
_DEFAULTS: dict[str, Any] = {
  "num_key_value_heads": None,
  "head_dim": None,
  "rms_norm_eps": 1e-6,
  "rope_theta": 1e4,
  "sliding_window": 4096,
  "norm_topk_prob": False,
  "router_aux_loss_coef": 0.001,
  "aux_loss_alpha": 0.001,
  "n_shared_experts": None,
  "first_k_dense_replace": 0,
  "query_pre_attn_scalar": 256,
  "final_logit_softcapping": None,
}
_KINDS = {
  "normalize_expert_weights": FLAG,
  "qkv_bias": FLAG,
  "tied_embedding": FLAG,
  "attention_cap": NUMBER,
  "logit_cap": NUMBER,
  "norm_epsilon": NUMBER,
  "balance_weight": json_fields.NONNEGATIVE,
  "shared_experts": NATURAL,
  "dense_layers": NATURAL,
}

# Keys whose null stands for none of it.
_NULL_IS_ZERO = ("attn_logit_softcapping", "final_logit_softcapping", "n_shared_experts")

#: Keys that models of several families have, and the only value at which ours compute the same.
_ONLY: dict[str, Any] = {
  "attention_bias": False,
  "mlp_bias": False,
  "partial_rotary_factor": 1.0,
  "rope_interleaved": False,
  "use_bidirectional_attention": False,
  "use_mrope": False,
  "add_cross_attention": False,
  "is_encoder_decoder": False,
  "tie_encoder_decoder": False,
  "pruned_heads": {},
}
# Keys that never change what a trained model computes, by what they are about.
_IRRELEVANT_TO = {
  "the folder": "_commit_hash _name_or_path dtype is_llama_config model_type name_or_path"
  " quantization_config tokenizer_class torch_dtype transformers.js_config transformers_version"
  " unsloth_fixed unsloth_version",
  "running the model": "_attn_implementation _attn_implementation_autoset attn_implementation"
  " cache_implementation chunk_size_feed_forward is_decoder max_position_embeddings"
  " output_attentions output_hidden_states output_router_logits pretraining_tp return_dict"
  " torchscript use_bfloat16 use_cache",
  "training it": "attention_dropout hidden_dropout initializer_range router_jitter_noise seq_aux",
  "other tasks": "finetuning_task id2label label2id num_labels prefix problem_type"
  " task_specific_params tf_legacy_loss",
  "generating text": "bad_words_ids begin_suppress_tokens diversity_penalty do_sample"
  " early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty length_penalty"
  " max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences"
  " output_scores remove_invalid_values repetition_penalty return_dict_in_generate"
  " suppress_tokens temperature top_k top_p typical_p",
}
_IRRELEVANT = frozenset(key for keys in _IRRELEVANT_TO.values() for key in keys.split())


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """What the `config.json` of a checkpoint says, in the fields of a `TransformerConfig`.

  Keys that it leaves out are what transformers takes them to be for that family.

  Args:
    folder: of a model of one of `FAMILIES`: Llama, Mistral, Qwen2 and 2.5, Qwen3, OLMo-2, Gemma 2
      and 3 (text), Mixtral, Qwen3-MoE and DeepSeek-MoE (its first version). Or a GGUF file, see
      `gguf.FAMILIES`.

  Returns:
    Fields by name, for `TransformerConfig(**…)` or `config.model.update(**…)`.

  Raises:
    FileNotFoundError: if there is no config.json.
    ValueError: naming every key that is missing, malformed, unknown, or of a value that models
      here do not have.

  Example:
    >>> import json, pathlib, tempfile
    >>> from eco_optax.interop import hugging_face
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    >>> sizes |= {"intermediate_size": 64, "vocab_size": 100}
    >>> told = {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 16}
    >>> _ = (folder / "config.json").write_text(json.dumps(sizes | told))
    >>> fields = hugging_face.read_config(folder)
    >>> fields["kv_heads"], fields["window"], fields["norm_epsilon"]
    (1, 16, 1e-06)
  """
  told = json_fields.Fields(read(folder))
  fields = _fields(told)
  if (stored := told.raw.get("quantization_config")) is not None:
    compressed_tensors.formats_of(told.child("quantization_config", stored))
  if told.problems:
    path = folder if gguf.is_gguf(folder) else pathlib.Path(folder) / "config.json"
    raise ValueError(f"{path}: {'; '.join(told.problems)}")
  return fields


def check_config(folder: str | pathlib.Path, config: TransformerConfig) -> None:
  """Raises `ValueError` naming every field of a model that is not what a checkpoint says."""
  if differ := _differences(config, read_config(folder), "is ", "and has to be"):
    raise ValueError(f"the model is not that of {folder}: {'; '.join(differ)}")


def read(folder: str | pathlib.Path) -> dict[str, Any]:
  """All that it says; of a GGUF file, all that it would say.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is damaged.
  """
  if gguf.is_gguf(folder):
    return gguf.read_config(folder)
  path = pathlib.Path(folder) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"there is no {path}: name the folder of a Hugging Face checkpoint")
  return safetensors.read_json(path.read_bytes(), path)


def _fields(told: json_fields.Fields) -> dict[str, Any]:
  """Fields of a TransformerConfig; `told.problems` has all that is wrong."""
  kind = told.take("model_type", TEXT)
  if kind not in FAMILIES:
    hint = ": take its text model alone" if "text_config" in told.raw else ""
    told.problems[:] = [f"model_type {told.raw.get('model_type')!r} is none of {_names()}{hint}"]
    return {}
  own = FAMILIES[kind]
  if (found := told.take("architectures", LIST, None, null=True)) not in (None, [own.architecture]):
    told.problems.append(f"architectures {found!r} of a {kind} has to be [{own.architecture!r}]")
  if kind == "deepseek":  # The code is on the Hub, because transformers has none.
    told.ignore("auto_map")
  told.ignore(*_IRRELEVANT, *(key for key in told.raw if key.endswith("_token_id")))
  for key, value in {**_ONLY, **own.only}.items():
    told.expect(key, value)

  fields: dict[str, Any] = {**_PLAIN, **own.fields, "rope_interleaved": False}
  fields |= {name: told.take(key, POSITIVE) for name, key in _SIZES.items()}
  default = lambda key: own.defaults.get(key, _DEFAULTS.get(key, json_fields.REQUIRED))
  optional = lambda key, kind: told.take(key, kind, default(key), null=True)
  fields["kv_heads"] = optional("num_key_value_heads", POSITIVE) or fields["heads"]
  fields["head_width"] = optional("head_dim", POSITIVE) or fields["width"] // fields["heads"]
  if fields["heads"] % fields["kv_heads"]:
    told.problems.append(
      f"num_key_value_heads {fields['kv_heads']} does not divide num_attention_heads"
      f" {fields['heads']}"
    )
  if fields["head_width"] % 2 or not fields["head_width"]:
    told.problems.append(f"head_dim {fields['head_width']} has to be even and above 0")
  fields["norm_epsilon"] = float(told.take("rms_norm_eps", NUMBER, default("rms_norm_eps")))
  tied = fields["tied_embedding"]
  fields["tied_embedding"] = told.take("tie_word_embeddings", FLAG, tied)
  if "intermediate_size" not in own.keys.values():
    fields["mlp_width"] = told.take("intermediate_size", POSITIVE)
  if own.is_even and fields["width"] % fields["heads"]:
    told.problems.append(
      f"num_attention_heads {fields['heads']} does not divide hidden_size {fields['width']}"
    )
  for name, key in own.keys.items():
    if key == "num_experts":  # transformers 5 calls it so in some families.
      told.rename("num_local_experts", key)
    value = told.take(key, _KINDS.get(name, POSITIVE), default(key), null=key in _NULL_IS_ZERO)
    fields[name] = type(_PLAIN.get(name, 0.0))(0 if value is None else value)
  if fields["query_scalar"] == fields["head_width"]:
    fields["query_scalar"] = 0.0  # As most models have it.
  if fields["experts_per_token"] > fields["experts"]:
    told.problems.append(
      f"num_experts_per_tok {fields['experts_per_token']} is more than {fields['experts']} experts"
    )
  if own.keys.get("experts") == "num_experts":
    fields["dense_layers"] = _dense_layers(told, fields["layers"])
  if kind == "qwen2_moe":
    shared = told.take(_SHARED_WIDTH, POSITIVE)
    fields["shared_experts"] = shared // fields["expert_width"]
    if shared % fields["expert_width"]:
      told.problems.append(
        f"{_SHARED_WIDTH} {shared} is no multiple of moe_intermediate_size {fields['expert_width']}"
      )
  fields |= _windows(own, told, fields["layers"])
  fields |= _ropes(own, told, fields)
  told.finish()
  meant = _meaning(fields)
  return {
    name: x if name in meant or name not in _PLAIN else _PLAIN[name] for name, x in fields.items()
  }


def _names() -> str:
  return ", ".join(FAMILIES)


def _dense_layers(told: json_fields.Fields, layers: int) -> int:
  """Number of first layers without experts."""
  dense = told.take("mlp_only_layers", LIST, None, null=True) or []
  if sorted(map(str, dense)) != sorted(map(str, range(len(dense)))) or len(dense) > layers:
    told.problems.append(f"mlp_only_layers {dense}: only first layers can be without experts here")
  return len(dense)


def _windows(own: _Family, told: json_fields.Fields, layers: int) -> dict[str, Any]:
  """The window, and every how many layers one is global."""
  window, kinds = _layer_types(own, told, layers)
  is_global = [kind == _GLOBAL for kind in kinds]
  if len(kinds) != layers or not {*kinds} <= {_GLOBAL, _LOCAL}:
    told.problems.append(f"layer_types {kinds} are not {layers} of {_GLOBAL} and {_LOCAL}")
    return {}
  if all(is_global):
    return {}
  every = is_global.index(True) + 1 if any(is_global) else layers + 1
  if is_global != [(i + 1) % every == 0 for i in range(layers)]:
    told.problems.append(
      f"layer_types {kinds}: here a layer is global at equal distances, the last of each group"
    )
  if window is None:
    told.problems.append(f"sliding_window is null, and layer_types has {_LOCAL}")
  return {"window": window or 0, "global_every": every}


def _layer_types(
  own: _Family, told: json_fields.Fields, layers: int
) -> tuple[int | None, list[str]]:
  """The window, and what kind of attention each layer has, as transformers derives them."""
  if own.local == "none":
    return None, [_GLOBAL] * layers
  if own.local.startswith("qwen") and not told.take("use_sliding_window", FLAG, False):
    told.ignore("sliding_window", "max_window_layers")
    window = None
  else:
    default = own.defaults.get("sliding_window", _DEFAULTS["sliding_window"])
    window = told.take("sliding_window", POSITIVE, default, null=True)
    if window is None:
      told.ignore("max_window_layers")
  if own.local in ("all", "qwen3_moe"):
    return window, [_GLOBAL if window is None else _LOCAL] * layers
  if own.local == "gemma2":
    told.expect("sliding_window_size", window)  # An older name beside the newer one.
    is_global = lambda i: i % 2 == 1
  elif own.local == "gemma3":
    every = told.take("sliding_window_pattern", POSITIVE, 6)
    if told.raw.get("layer_types"):
      told.ignore("_sliding_window_pattern")  # What they were derived from.
    else:
      told.expect("_sliding_window_pattern", every)
    is_global = lambda i: (i + 1) % every == 0
  else:
    first = layers if window is None else told.take("max_window_layers", NATURAL, 28)
    is_global = lambda i: i < first
  derived = [_GLOBAL if is_global(i) else _LOCAL for i in range(layers)]
  return window, told.take("layer_types", LIST, derived, null=True) or derived


class _Rope(NamedTuple):
  """Rotary embedding of one kind of layer."""

  base: float
  factor: float = 1.0
  length: int = 0
  low: float = 1.0
  high: float = 4.0


def _ropes(own: _Family, told: json_fields.Fields, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Rotary embedding, which older and newer versions of transformers say in different ways."""
  default = own.defaults.get("rope_theta", _DEFAULTS["rope_theta"])
  new = told.take("rope_parameters", OBJECT, None, null=True)
  old = told.take("rope_scaling", OBJECT, None, null=True)
  if own.local == "gemma3":
    each = told.child("rope_parameters", new or {})
    full_raw, local_raw = (each.take(x, OBJECT, {}, null=True) or {} for x in (_GLOBAL, _LOCAL))
    each.finish()
    if new is None:
      full_raw = {"rope_type": "default"}
    elif old and any(full_raw.get(key, x) != x for key, x in old.items()):
      told.problems.append(f"rope_scaling {old} and rope_parameters {new} differ")
    name = f"rope_parameters.{_GLOBAL}"
    full = _rope(told, name, {**full_raw, **(old or {})}, "rope_theta", default)
    name = f"rope_parameters.{_LOCAL}"
    local = _rope(told, name, local_raw, "rope_local_base_freq", 1e4)
  else:
    said = [(name, x) for name, x in (("rope_scaling", old), ("rope_parameters", new)) if x]
    found = [_rope(told, *x, "rope_theta", default) for x in said or [("rope_parameters", {})]]
    if found[0] != found[-1]:
      told.problems.append(f"rope_scaling {old} and rope_parameters {new} differ")
    full = local = found[0]
  used = zip((full, local), _has_layers(fields), strict=True)
  scaled = [rope for rope, is_used in used if is_used and rope.factor != 1] or [full]
  if scaled[0][2:] != scaled[-1][2:]:
    told.problems.append(f"rope_parameters {new}: here both kinds of layers share a rope_type")
  return {
    "rope_base": full.base,
    "rope_factor": full.factor,
    "local_rope_base": local.base,
    "local_rope_factor": local.factor,
    "rope_length": scaled[0].length,
    "rope_low": scaled[0].low,
    "rope_high": scaled[0].high,
  }


def _rope(told: json_fields.Fields, name: str, raw: Any, key: str, default: float) -> _Rope:
  """One object of rope_parameters, or rope_scaling; `key` is where the base may be besides."""
  own = told.child(name, raw)
  outside = told.take(key, NUMBER, default)
  base = own.take("rope_theta", NUMBER, outside)
  if key in told.raw and base != outside:
    told.problems.append(f"{key} {outside} and {name}.rope_theta {base} differ")
  own.rename("type", "rope_type")
  own.expect("partial_rotary_factor", 1.0)
  kind = own.take("rope_type", TEXT, "default")
  rope = _Rope(float(base))
  if kind not in ("default", "linear", "llama3"):
    told.problems.append(f"models here have no rope_type {kind!r} ({name})")
    return rope
  if kind != "default":
    rope = rope._replace(factor=float(own.take("factor", json_fields.ONE_OR_MORE)))
  if kind == "llama3":
    key = "original_max_position_embeddings"
    # A model that does not say which length it was trained for was trained for its longest.
    length = (
      own.take(key, POSITIVE) if key in own.raw else told.take("max_position_embeddings", POSITIVE)
    )
    low, high = own.take("low_freq_factor", NUMBER), own.take("high_freq_factor", NUMBER)
    rope = rope._replace(length=length, low=float(low), high=float(high))
    if low >= high and not told.problems:
      told.problems.append(f"{name}.low_freq_factor {low} is not below high_freq_factor {high}")
  own.finish()
  return rope


def _has_layers(fields: Mapping[str, Any]) -> tuple[bool, bool]:
  """Whether some layers are global, and whether some are local."""
  has_global = not fields["window"] or fields["global_every"] <= fields["layers"]
  return has_global, bool(fields["window"]) and fields["global_every"] > 1


_MEANT = (*_SIZES, "kv_heads", "head_width", "mlp_width", "norm_epsilon", *_PLAIN)


def _meaning(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Those fields that change what the model computes, in one way of saying it."""
  kept: dict[str, Any] = {name: fields.get(name) for name in _MEANT}
  has_global, has_local = _has_layers(kept)
  drop: set[str] = set()
  if not has_local:
    kept["window"] = 0
    drop |= {"global_every", "local_rope_base", "local_rope_factor"}
  if not has_global:
    kept["global_every"] = kept["layers"] + 1
    drop |= {"rope_base", "rope_factor"}
  factors = {"rope_factor", "local_rope_factor"} - drop
  if all(kept[name] == 1 for name in factors):
    drop |= {"rope_length", "rope_low", "rope_high"}
  elif not kept["rope_length"]:
    drop |= {"rope_low", "rope_high"}
  if not kept["experts"]:
    drop |= {"experts_per_token", "expert_width", "shared_experts", "dense_layers"}
    drop |= {"normalize_expert_weights"}
  elif not kept["dense_layers"]:
    drop |= {"mlp_width"}
  if not kept["qk_norm"]:
    drop |= {"joint_qk_norm"}
  kept["query_scalar"] = kept["query_scalar"] or kept["head_width"]
  return {name: x for name, x in kept.items() if name not in drop}


def _differences(
  config: TransformerConfig, fields: Mapping[str, Any], is_: str, not_: str
) -> list[str]:
  """Fields in which a model computes something else than what `fields` say."""
  own, wanted = _meaning({name: getattr(config, name) for name in _MEANT}), _meaning(fields)
  return [
    f"{name} {is_}{own[name]!r} {not_} {wanted[name]!r}"
    for name in own
    if name in wanted and own[name] != wanted[name]
  ]


def family(config: TransformerConfig, kind: str | None) -> str:
  """The kind of model that a config is, or the one asked for.

  It describes the model exactly: written out and read back it has the same fields.

  Raises:
    ValueError: naming, for each kind, what it has not.
  """
  if kind is not None and kind not in FAMILIES:
    raise ValueError(f"kind {kind!r} is none of {_names()}")
  reasons = []
  for name in [kind] if kind else FAMILIES:
    told = json_fields.Fields(write(name, config, "float32", 1))
    fields = _fields(told)
    wrong = told.problems or _differences(config, fields, "", "and not")
    if not wrong:
      return name
    reasons.append(f"{name}: {', '.join(wrong)}")
  raise ValueError(f"the model cannot be saved as {'; as '.join(reasons)}")


def write(kind: str, config: TransformerConfig, dtype: str, length: int) -> dict[str, Any]:
  """What config.json is to say of a model, as far as the kind has words for it."""
  own = FAMILIES[kind]
  names = {**_SIZES, "kv_heads": "num_key_value_heads", "head_width": "head_dim"}
  names |= {"norm_epsilon": "rms_norm_eps", "tied_embedding": "tie_word_embeddings"}
  names |= {"mlp_width": "intermediate_size", **own.keys}
  told: dict[str, Any] = {
    "architectures": [own.architecture],
    "model_type": kind,
    "torch_dtype": dtype,
    "max_position_embeddings": length,
    "attention_bias": False,
    **own.only,
    **{theirs: getattr(config, name) for name, theirs in names.items()},
  }
  told |= {key: told[key] or None for key in _NULL_IS_ZERO if key in told}
  if "query_scalar" in own.keys:  # A whole number for transformers; reading refuses any other.
    scalar = config.query_scalar or config.head_width
    told["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
  if own.keys.get("experts") == "num_experts":
    told["mlp_only_layers"] = list(range(config.dense_layers))
  if kind == "qwen2_moe":
    told[_SHARED_WIDTH] = config.shared_experts * config.expert_width

  has_global, has_local = _has_layers(vars(config))
  is_global = [config.is_global(i) for i in range(config.layers)]
  if own.local != "none":
    told["sliding_window"] = config.window if has_local else None
  if own.local.startswith("qwen"):
    told["use_sliding_window"] = has_local
  if own.local in ("gemma2", "gemma3", "qwen"):
    told["layer_types"] = [_GLOBAL if x else _LOCAL for x in is_global]
  if own.local.startswith("gemma") and not has_local:
    told["sliding_window"] = length  # Of no layer; transformers wants a number.

  full = _rope_object(config, config.rope_base, config.rope_factor)
  local = _rope_object(config, config.local_rope_base, config.local_rope_factor)
  if own.local == "gemma3":
    told["rope_parameters"] = {_GLOBAL: full, _LOCAL: local}
    told["rope_local_base_freq"] = config.local_rope_base
  else:  # One for all layers.
    full = full if has_global else local
    told["rope_parameters"] = full
  # The same for transformers before 5, which has the base apart.
  told["rope_theta"] = full["rope_theta"]
  if full["rope_type"] != "default":
    told["rope_scaling"] = {name: x for name, x in full.items() if name != "rope_theta"}
  return told


def _rope_object(config: TransformerConfig, base: float, factor: float) -> dict[str, Any]:
  rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
  if factor != 1:
    rope |= {"rope_type": "linear", "factor": factor}
    if config.rope_length:
      rope |= {
        "rope_type": "llama3",
        "original_max_position_embeddings": config.rope_length,
        "low_freq_factor": config.rope_low,
        "high_freq_factor": config.rope_high,
      }
  return rope
