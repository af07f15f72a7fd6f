"""Checkpoints of Hugging Face: their config.json, the names of their tensors, and both ways.

Parameters are those of `eco_optax.training.models.transformer`: kernels are `(in, out)` where
checkpoints have `(out, in)`, and layers and experts are stacked along leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import quantized_array, trees
from eco_optax.formats import Format
from eco_optax.interop import compressed_tensors, safetensors
from eco_optax.layer_by_layer import write_layer
from eco_optax.quantized_array import QuantizedArray, is_quantized

if typing.TYPE_CHECKING:  # The harness imports the library, never the reverse.
  from eco_optax.training.models.config import TransformerConfig

_Tensors = Mapping[str, np.ndarray]
_FLOATS = ("float64", "float32", "float16", "bfloat16")


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
  raw = _config_json(folder)
  kind = raw.get("model_type")
  if kind not in FAMILIES:
    raise ValueError(
      f"{folder}: model_type {kind!r} is none of {', '.join(FAMILIES)}"
      + (": take its text model alone" if "text_config" in raw else "")
    )
  family = FAMILIES[kind]
  wrong = [
    f"{name} {raw[name]!r}"
    for name, allowed in family.required.items()
    if raw.get(name) is not None and raw[name] not in allowed
  ]
  fields = {name: x for name, x in family.fixed.items() if name != "window"}
  told = _COMMON | dict(family.fields)
  needed = (*(name for name in told.values() if name not in family.optional), *family.needed)
  if missing := [name for name in needed if raw.get(name) is None]:
    raise ValueError(
      f"{folder}: config.json does not say {', '.join(missing)}: fetch it again, or add what the"
      " model has"
    )
  fields |= {name: raw[theirs] for name, theirs in told.items() if raw.get(theirs) is not None}
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


def _config_json(folder: str | pathlib.Path) -> dict[str, Any]:
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


class _Place(NamedTuple):
  """Where the numbers of one parameter are in a checkpoint."""

  name: str  # Of the tensors, but for what is behind the last point; has {layer} and {expert}.
  layers: tuple[int, ...] | None = None  # The leading axis of the parameter.
  experts: int = 0  # The axis behind it.
  is_linear: bool = False  # Whether it is (in, out) here and (out, in) there.
  rotary: int = 0  # The head width of channels whose pairs are apart there and side by side here.
  gain: float = 1.0  # Its values there over those here.

  def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """Indices of the leading axes, and the names of what is there."""
    for i, layer in enumerate(self.layers or (0,)):
      for expert in range(self.experts or 1):
        index = ((i,) if self.layers else ()) + ((expert,) if self.experts else ())
        yield index, self.name.format(layer=layer, expert=expert)

  @property
  def lead(self) -> int:
    """Number of leading axes."""
    return (self.layers is not None) + (self.experts > 0)


def _places(kind: str, config: TransformerConfig) -> dict[str, _Place]:
  """Where each parameter is, by its path."""
  places = {
    "embedding": _Place("model.embed_tokens"),
    "norm/scale": _Place("model.norm"),
  }
  if not config.tied_embedding:
    places["head"] = _Place("lm_head", is_linear=True)
  rotary = config.head_width if config.rope_interleaved else 0
  for stack, layers in config.stacks.items():
    at = functools.partial(_Place, layers=layers)
    put = lambda path, name, stack=stack, at=at, **more: places.update(
      {f"{stack}/{path}": at("model.layers.{layer}." + name, **more)}
    )
    put("attention_norm/scale", "input_layernorm")
    before_mlp = "post_attention_layernorm"
    if config.post_norms:
      put("attention_post_norm/scale", "post_attention_layernorm")
      put("mlp_post_norm/scale", "post_feedforward_layernorm")
      before_mlp = "pre_feedforward_layernorm"
    put("mlp_norm/scale", before_mlp)
    turned = {"query": "q_proj", "key": "k_proj"}
    for ours, theirs in (turned | {"value": "v_proj", "out": "o_proj"}).items():
      own = rotary if ours in turned else 0
      put(f"attention/{ours}/kernel", f"self_attn.{theirs}", is_linear=True, rotary=own)
    if config.qk_norm:
      put("attention/query_norm/scale", "self_attn.q_norm", rotary=rotary)
      put("attention/key_norm/scale", "self_attn.k_norm", rotary=rotary)
    mlps: dict[str, tuple[str, dict[str, Any]]] = {"mlp": ("mlp", {})}
    if config.is_routed(stack):
      put("moe/router", "mlp.gate", is_linear=True)
      mlps = {"moe/experts": ("mlp.experts.{expert}", {"experts": config.experts})}
      if config.shared_experts:
        mlps["moe/shared"] = ("mlp.shared_experts", {})
        if kind == "qwen2_moe":
          mlps["moe/shared"] = ("mlp.shared_expert", {})
    for ours, (theirs, more) in mlps.items():
      for part in ("gate", "up", "down"):
        gain = 2.0 if theirs == "mlp.shared_expert" and part == "down" else 1.0
        put(f"{ours}/{part}/kernel", f"{theirs}.{part}_proj", is_linear=True, gain=gain, **more)
  return places


def _shared_gates(kind: str, config: TransformerConfig) -> list[str]:
  """Tensors that are zero, so that a gate is half open."""
  if kind != "qwen2_moe":
    return []
  return [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in config.stacks["blocks"]]


def _pairs_apart(x: Any, width: int, back: bool = False) -> Any:
  """Channels of heads along the last axis: (2i, 2i + 1) to (i, i + K / 2), or back."""
  *rest, size = x.shape
  if not width or size == 1:  # All channels share a scale.
    return x
  pairs = (2, width // 2) if back else (width // 2, 2)
  return x.reshape(*rest, size // width, *pairs).swapaxes(-1, -2).reshape(x.shape)


def _turned(w: QuantizedArray, width: int, back: bool = False) -> QuantizedArray:
  """`_pairs_apart` of a packed kernel: channels and their scales change places."""
  if width and w.scale.shape[-1] not in (1, w.shape[-1]):
    raise ValueError(
      f"kernels in {w.format} of a model with rope_interleaved cannot be saved: channels have to"
      " change places, and blocks of channels share a scale"
    )
  turn = functools.partial(_pairs_apart, width=width, back=back)
  return dataclasses.replace(w, qvalue=turn(w.qvalue), scale=turn(w.scale))


def _scaled(w: QuantizedArray, gain: float) -> QuantizedArray:
  """The same codes with values `gain` times as large, a power of two."""
  name = "scale" if w.tensor_scale is None else "tensor_scale"
  scale = np.asarray(getattr(w, name))
  times: Any = (scale.astype(np.float32) * np.float32(gain)).astype(scale.dtype)
  return dataclasses.replace(w, **{name: times})


def load(folder: str | pathlib.Path, target: Any, config: TransformerConfig) -> Any:
  """Reads a checkpoint tensor by tensor, straight onto the devices.

  Packed leaves are quantized on the way, one layer at a time: no more than a layer is in float at
  once. If the checkpoint has codes of their format itself, as compressed-tensors, they are taken as
  they are; codes of another format are read as the values that they stand for.

  Args:
    folder: of the checkpoint.
    target: parameters, or their shapes as from `jax.eval_shape`: a tree of arrays and packed
      leaves, of which dtypes, formats and shardings are taken.
    config: of the model, in agreement with `read_config(folder)`.

  Returns:
    A tree like `target`.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: naming all fields of the model that differ, or all tensors that are missing, of
      another shape or not known, before any is read; or a damaged file.

  Example:
    >>> import jax, tempfile, eco_optax as eco
    >>> from eco_optax.interop import hugging_face
    >>> from eco_optax.training.models.config import TransformerConfig
    >>> from eco_optax.training.models import transformer
    >>> config = TransformerConfig(1, 32, 2, 64, mlp_width=32, rope_interleaved=False)
    >>> folder = tempfile.mkdtemp() + "/llama"
    >>> hugging_face.save(folder, transformer.init(config, 0, eco.FP8), config)
    >>> config = TransformerConfig(**hugging_face.read_config(folder))
    >>> target = jax.eval_shape(lambda: transformer.init(config, 0, eco.FP8))
    >>> params = hugging_face.load(folder, target, config)
    >>> params["blocks"]["mlp"]["up"]["kernel"].qvalue.dtype
    dtype(float8_e4m3fn)
  """
  check_config(folder, config)
  raw = _config_json(folder)
  tensors = safetensors.read(folder)
  stored = raw.get("quantization_config")
  stored_format = compressed_tensors.formats(stored)[0] if stored else None
  places = _places(raw["model_type"], config)
  gates = _shared_gates(raw["model_type"], config)
  flat, structure = jax.tree_util.tree_flatten_with_path(target, is_leaf=is_quantized)
  leaves = {trees.path_name(path): leaf for path, leaf in flat}
  _check(folder, tensors, places, leaves, gates)
  for name in gates:
    if np.any(tensors[name]):
      raise ValueError(f"{folder}: {name} is not zero: this package's shared experts have no gate")
  return jax.tree_util.tree_unflatten(
    structure,
    [_load(tensors, places[path], leaf, stored_format) for path, leaf in leaves.items()],
  )


def _module(tensors: _Tensors, name: str) -> dict[str, np.ndarray]:
  """Tensors of a module by what is behind its name."""
  ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale")
  return {end: tensors[f"{name}.{end}"] for end in ends if f"{name}.{end}" in tensors}


def _check(
  folder: Any,
  tensors: _Tensors,
  places: Mapping[str, _Place],
  leaves: Mapping[str, Any],
  gates: list[str],
) -> None:
  """Raises `ValueError` naming every tensor that is not as it should be."""
  if missing := sorted(leaves.keys() ^ places.keys()):
    raise ValueError(f"the parameters are not those of the model: see {', '.join(missing[:5])}")
  lacks, shapes, dtypes = [name for name in gates if name not in tensors], [], []
  known = set(gates)
  for path, leaf in leaves.items():
    place = places[path]
    wanted = leaf.shape[place.lead :][:: -1 if place.is_linear else 1]
    for _, name in place.names():
      own = _module(tensors, name)
      known |= {f"{name}.{end}" for end in own}
      if "weight_shape" in own:
        shape = tuple(int(n) for n in own["weight_shape"])
      elif "weight_packed" in own:
        shape = (own["weight_packed"].shape[0], 2 * own["weight_packed"].shape[1])
      elif "weight" in own:
        shape = own["weight"].shape
      else:
        lacks.append(f"{name}.weight")
        continue
      if shape != wanted:
        shapes.append(f"{name} is {list(shape)} and has to be {list(wanted)}")
      if "weight_scale" not in own and own["weight"].dtype.name not in _FLOATS:
        dtypes.append(f"{name} is {own['weight'].dtype}")
  # Tables that can be computed, and a head that is the embedding.
  is_needless = lambda name: name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight"
  extra = [name for name in tensors if name not in known and not is_needless(name)]
  found = {
    "missing": lacks,
    "not known": extra,
    "of another shape:": shapes,
    "codes without a weight_scale:": dtypes,
  }
  problems = [
    f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    for what, names in found.items()
    if names
  ]
  if problems:
    raise ValueError(f"{folder} does not hold this model: {'; '.join(problems)}")


def _sharding(x: Any) -> Any:
  found = getattr(x, "sharding", None)
  return jax.sharding.SingleDeviceSharding(jax.devices()[0]) if found is None else found


def _assemble(x: Any, place: _Place, matrix: Callable[[str], np.ndarray]) -> jax.Array:
  """An array of x's shape, dtype and sharding; each device's part is read for it alone."""
  names = dict(place.names())

  def part(index: Any) -> np.ndarray:
    lead, rest = index[: place.lead], index[place.lead :]
    ranges = [range(*s.indices(n)) for s, n in zip(lead, x.shape, strict=False)]
    rows = [matrix(names[at])[rest].astype(x.dtype) for at in itertools.product(*ranges)]
    return np.stack(rows).reshape(*(len(r) for r in ranges), *rows[0].shape)

  return jax.make_array_from_callback(x.shape, _sharding(x), part)


def _has_codes(stored: Format | None, wanted: Format) -> bool:
  """Whether codes of one format are those of another, if their scales are too."""
  if stored is None or (stored.dtype, stored.two_level) != (wanted.dtype, wanted.two_level):
    return False
  # Integers with one scale per tensor are stored with one per channel.
  is_one = wanted.granularity == "tensor" and stored.granularity == "channel"
  return stored.granularity == wanted.granularity or is_one


def _load(tensors: _Tensors, place: _Place, leaf: Any, stored_format: Format | None) -> Any:
  """One parameter."""

  def in_float(name: str) -> np.ndarray:
    own = _module(tensors, name)
    if "weight_scale" in own:
      packed = compressed_tensors.decode(own, stored_format or leaf.format, name)
      x = np.asarray(jax.tree.map(jnp.asarray, packed).dequantize())
    else:
      x = own["weight"].T if place.is_linear else own["weight"]
    x = _pairs_apart(x, place.rotary, back=True)
    return x if place.gain == 1 else x / np.float32(place.gain)

  if not is_quantized(leaf):
    return _assemble(leaf, place, in_float)
  _, first = next(place.names())
  if "weight_scale" not in _module(tensors, first) or not _has_codes(stored_format, leaf.format):
    return _quantized(leaf, place, in_float)

  @functools.lru_cache(maxsize=1)  # Each of its fields is asked for.
  def packed(name: str) -> QuantizedArray:
    w = compressed_tensors.decode(_module(tensors, name), leaf.format, name)
    w = _turned(w, place.rotary, back=True)
    return w if place.gain == 1 else _scaled(w, 1 / place.gain)

  def field(x: Any, get: Callable[[str], Any]) -> Any:
    return None if x is None else _assemble(x, place, get)

  return QuantizedArray(
    field(leaf.qvalue, lambda name: packed(name).qvalue),
    field(leaf.scale, lambda name: packed(name).scale),
    leaf.format,
    field(leaf.tensor_scale, lambda name: packed(name).tensor_scale),
    None,
    leaf.odd,
  )


def _quantized(
  leaf: QuantizedArray, place: _Place, in_float: Callable[[str], np.ndarray]
) -> QuantizedArray:
  """A packed parameter of float tensors, quantized layer by layer where it is to be."""
  in_place = jax.tree.map(_sharding, leaf)
  stored = {in_float(name).dtype for _, name in place.names()}
  dtype = stored.pop() if len(stored) == 1 else np.float32
  matrix = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=_sharding(leaf.qvalue))
  quantize = lambda x: quantized_array.quantize(x.astype(jnp.float32), leaf.format)
  if place.layers is None:
    return jax.jit(quantize, out_shardings=in_place)(_assemble(matrix, place, in_float))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=in_place)
  def put(stack: QuantizedArray, x: jax.Array, i: jax.Array) -> QuantizedArray:
    return jax.tree.map(lambda old, new: write_layer(old, new, i), stack, quantize(x))

  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), leaf)
  stack = jax.jit(zeros, out_shardings=in_place)()
  for i, layer in enumerate(place.layers):
    one = place._replace(name=place.name.replace("{layer}", str(layer)), layers=None)
    x = _assemble(_layer_of(matrix), one, in_float)
    stack = put(stack, x, np.int32(i))
  return stack


def _layer_of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """One layer of a stack, split over devices as the stack is."""
  sharding: Any = x.sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
  return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)


def save(
  folder: str | pathlib.Path,
  params: Any,
  config: TransformerConfig,
  *,
  kind: str | None = None,
  dtype: Any = "float32",
  length: int = 2048,
  more: Mapping[str, Any] | None = None,
  finish: Callable[[pathlib.Path], None] | None = None,
) -> None:
  """Writes a checkpoint that transformers and vLLM load; packed leaves stay the codes they are.

  Args:
    folder: that there is not yet; it appears once it is whole.
    params: of the model, on devices that this process can read.
    config: of the model; its activation_format is how the served model rounds activations.
    kind: one of `FAMILIES`; None takes the first that the model fits.
    dtype: of leaves that are not packed.
    length: of the longest text, in tokens.
    more: for config.json, such as `eos_token_id`.
    finish: is given the folder before it appears, to put a tokenizer beside the rest.

  Raises:
    FileExistsError: if the folder is there.
    ValueError: if the model is of no family, or the layout has no such format, before anything is
      written.
    ImportError: without the safetensors package.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise FileExistsError(f"{folder} is there already: name another folder, or remove it")
  kind = _family(config, kind)
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
  leaves = {trees.path_name(path): leaf for path, leaf in flat}
  places = _places(kind, config)
  if unknown := sorted(leaves.keys() ^ places.keys()):
    raise ValueError(f"the parameters are not those of the model: see {', '.join(unknown[:5])}")
  formats = {leaf.format for leaf in leaves.values() if is_quantized(leaf)}
  if len(formats) > 1:
    raise ValueError(f"packed leaves of more than one format cannot be saved: {formats}")
  told = _told(kind, config, np.dtype(dtype).name, length) | dict(more or {})
  packed = False
  if formats:
    group = compressed_tensors.scheme(formats.pop(), config.activation_format)
    packed = group["format"] == "pack-quantized"
    told["quantization_config"] = {
      "quant_method": "compressed-tensors",
      "format": group["format"],
      "quantization_status": "compressed",
      "kv_cache_scheme": None,
      "ignore": [
        *(
          name
          for path, place in places.items()
          if place.is_linear and not is_quantized(leaves[path])
          for _, name in place.names()
        ),
        *(name.removesuffix(".weight") for name in _shared_gates(kind, config)),
        # A head that is the embedding has no tensors, and is a Linear there all the same.
        *(["lm_head"] if config.tied_embedding else []),
      ],
      "config_groups": {"group_0": group},
    }
  for path, leaf in leaves.items():  # What cannot be saved should be told before hours are spent.
    if is_quantized(leaf) and places[path].rotary:
      jax.eval_shape(functools.partial(_turned, width=places[path].rotary), leaf)

  def tensors() -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in leaves.items():
      yield from _saved(leaf, places[path], np.dtype(dtype), packed)
    for name in _shared_gates(kind, config):
      yield name, np.zeros((1, config.width), dtype)

  partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
  partial.mkdir(parents=True)
  try:
    safetensors.write(partial, tensors())
    (partial / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    if finish is not None:
      finish(partial)
    partial.rename(folder)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _saved(
  leaf: Any, place: _Place, dtype: np.dtype, packed: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of one parameter, of which one layer at a time is on the host."""
  for i in range(len(place.layers)) if place.layers else (None,):
    own = jax.device_get(leaf if i is None else jax.tree.map(lambda x, i=i: x[i], leaf))
    for index, name in place.names():
      if i is not None and index[0] != i:
        continue
      rest = index[place.layers is not None :]
      x = jax.tree.map(lambda x, rest=rest: x[rest], own)
      if is_quantized(x):
        x = _turned(x, place.rotary)
        x = x if place.gain == 1 else _scaled(x, place.gain)
        for end, tensor in compressed_tensors.encode(x, packed).items():
          yield f"{name}.{end}", tensor
      else:
        x = _pairs_apart(x, place.rotary) * np.float32(place.gain)
        yield f"{name}.weight", np.asarray(x.T if place.is_linear else x).astype(dtype)


def _family(config: TransformerConfig, kind: str | None) -> str:
  """The kind of model that a config is, or the one asked for."""
  if kind is not None and kind not in FAMILIES:
    raise ValueError(f"kind {kind!r} is none of {', '.join(FAMILIES)}")
  reasons = []
  for name in [kind] if kind else FAMILIES:
    family = FAMILIES[name]
    wrong = [
      f"{field} {getattr(config, field)!r} and not {value!r}"
      for field, value in family.fixed.items()
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


def _told(kind: str, config: TransformerConfig, dtype: str, length: int) -> dict[str, Any]:
  """What config.json says."""
  family = FAMILIES[kind]
  told: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": kind,
    "torch_dtype": dtype,
    "max_position_embeddings": length,
    "hidden_act": "silu",
    "attention_bias": False,
  }
  told |= {theirs: getattr(config, name) for name, theirs in {**_COMMON, **family.fields}.items()}
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
