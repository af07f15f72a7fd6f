"""Checkpoints of Hugging Face: the names of their tensors, and both ways.

Parameters are those of `eco_optax.training.models.transformer`: kernels are `(out, in)`, as in
checkpoints; head and router are `(in, out)`; layers and experts are stacked along leading axes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import quantized_array, trees
from eco_optax.formats import Format
from eco_optax.interop import compressed_tensors, config_json, gguf, safetensors
from eco_optax.interop.config_json import check_config as check_config
from eco_optax.interop.config_json import read_config as read_config
from eco_optax.quantized_array import QuantizedArray, is_quantized, pack
from eco_optax.transforms.stacks import write_layer

if typing.TYPE_CHECKING:  # The harness imports the library, never the reverse.
  from eco_optax.training.models.config import TransformerConfig

_Tensors = Mapping[str, Any]  # Arrays, or what `np.asarray` makes arrays of.
_FLOATS = ("float64", "float32", "float16", "bfloat16")


class _Place(NamedTuple):
  """Where the numbers of one parameter are in a checkpoint."""

  name: str  # Of the module; has {layer} and {expert}.
  layers: tuple[int, ...] | None = None  # The leading axis of the parameter.
  experts: int = 0  # The axis behind it.
  is_linear: bool = False  # Whether it is the weight of a Linear there.
  transposed: bool = False  # Whether it is (in, out) here and (out, in) there.
  rotary: int = 0  # The head width of channels whose pairs are apart there and side by side here.
  gain: float = 1.0  # Its values there over those here.
  parts: int = 0  # The leading axis of a table: parts of its rows, which are one tensor there.
  end: str = "weight"  # Of the tensor's name, behind the module's.

  def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
    """Indices of the leading axes, and the names of the tensors there."""
    for i, layer in enumerate(self.layers or range(self.parts or 1)):
      for expert in range(self.experts or 1):
        index = ((i,) if self.layers or self.parts else ()) + ((expert,) if self.experts else ())
        yield index, self.name.format(layer=layer, expert=expert)

  @property
  def lead(self) -> int:
    """Number of leading axes."""
    return (self.layers is not None) + (self.experts > 0) + (self.parts > 0)

  def part(self, x: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """What of a tensor is at an index of the leading axes."""
    return x.reshape(self.parts, -1, *x.shape[1:])[index[0]] if self.parts else x

  def shape(self, leaf: Any) -> tuple[int, ...]:
    """The shape of a tensor there."""
    shape = tuple(leaf.shape[self.lead :])
    if self.parts:
      return (self.parts * shape[0], *shape[1:])
    return shape[::-1] if self.transposed else shape


def _places(kind: str, config: TransformerConfig) -> dict[str, _Place]:
  """Where each parameter is, by its path."""
  tables = {"embedding": _Place("model.embed_tokens")}
  if not config.tied_embedding:
    tables["head"] = _Place("lm_head", is_linear=True, transposed=True)
  if config.quantized == "all":
    in_parts = lambda place: place._replace(
      is_linear=False, transposed=False, parts=config.vocabulary_parts
    )
    tables = {f"{path}/rows": in_parts(place) for path, place in tables.items()}
  places = {**tables, "norm/scale": _Place("model.norm")}
  rotary = config.head_width if config.rope_interleaved else 0
  for stack, layers in config.stacks.items():
    at = functools.partial(_Place, layers=layers)
    put = lambda path, name, stack=stack, at=at, **more: places.update(
      {f"{stack}/{path}": at("model.layers.{layer}." + name, **more)}
    )
    if config.pre_norms:
      put("attention_norm/scale", "input_layernorm")
      between = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
      put("mlp_norm/scale", between)
    if config.post_norms:
      put("attention_post_norm/scale", "post_attention_layernorm")
      put("mlp_post_norm/scale", "post_feedforward_layernorm")
    for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
      own = {"name": f"self_attn.{theirs}_proj", "rotary": rotary if theirs in "qk" else 0}
      put(f"attention/{ours}/kernel", is_linear=True, **own)
      if config.qkv_bias and ours != "out":
        put(f"attention/{ours}/bias", end="bias", **own)
      if config.qk_norm and theirs in "qk":
        put(f"attention/{ours}_norm/scale", f"self_attn.{theirs}_norm", rotary=rotary)
    if not config.is_routed(stack):
      _put_mlp(put, "mlp", "mlp")
      continue
    routed, parts = "mlp", _PARTS
    if kind == "mixtral":
      routed, parts = "block_sparse_moe", ("w1", "w3", "w2")
    put("moe/router", f"{routed}.gate", is_linear=True, transposed=True)
    _put_mlp(put, "moe/experts", routed + ".experts.{expert}", parts, experts=config.experts)
    if config.shared_experts and kind == "qwen2_moe":
      _put_mlp(put, "moe/shared", "mlp.shared_expert", gain=2.0)
    elif config.shared_experts:
      _put_mlp(put, "moe/shared", "mlp.shared_experts")
  return places


_PARTS = ("gate_proj", "up_proj", "down_proj")


def _put_mlp(
  put: Callable[..., None],
  ours: str,
  theirs: str,
  parts: tuple[str, ...] = _PARTS,
  gain: float = 1.0,
  **more: Any,
) -> None:
  """The three kernels of an MLP or of experts, `gain` times as large an output there."""
  for part, name in zip(("gate", "up", "down"), parts, strict=True):
    own = gain if part == "down" else 1.0
    put(f"{ours}/{part}/kernel", f"{theirs}.{name}", is_linear=True, gain=own, **more)


def _shared_gates(kind: str, config: TransformerConfig) -> list[str]:
  """Tensors that are zero, so that a gate is half open."""
  if kind != "qwen2_moe":
    return []
  return [f"model.layers.{i}.mlp.shared_expert_gate.weight" for i in config.stacks["blocks"]]


def _pairs_apart(x: Any, width: int, back: bool = False) -> Any:
  """Channels of heads along the first axis: (2i, 2i + 1) to (i, i + K / 2), or back."""
  size, *rest = x.shape
  if not width or size == 1:  # All channels share a scale.
    return x
  pairs = (2, width // 2) if back else (width // 2, 2)
  return x.reshape(size // width, *pairs, *rest).swapaxes(1, 2).reshape(x.shape)


def _turned(w: QuantizedArray, width: int, back: bool = False) -> QuantizedArray:
  """`_pairs_apart` of a packed kernel: channels and their scales change places."""
  if not width:
    return w
  if w.scale.shape[0] not in (1, w.shape[0]):
    raise ValueError(
      f"kernels in {w.format} of a model with rope_interleaved cannot be saved: channels have to"
      " change places, and blocks of channels share a scale"
    )
  turn = functools.partial(_pairs_apart, width=width, back=back)
  if w.format.bits == 8:
    qvalue = turn(w.qvalue)
  else:  # Two channels share a byte.
    qvalue, _ = pack(turn(w.code_bits).astype(jnp.int32), w.format)
  return dataclasses.replace(w, qvalue=qvalue, scale=turn(w.scale))


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
    folder: of the checkpoint, or a GGUF file.
    target: parameters, or their shapes as from `jax.eval_shape`: a tree of arrays and packed
      leaves, which give dtypes, formats and shardings.
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
  raw = config_json.read(folder)
  tensors: _Tensors = gguf.read(folder) if gguf.is_gguf(folder) else safetensors.read(folder)
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
  if config.tied_embedding and not _is_tied(tensors):
    raise ValueError(
      f"{folder}: tie_word_embeddings is true in config.json, and lm_head.weight is not"
      " model.embed_tokens.weight: set it to false, or remove the head"
    )
  return jax.tree_util.tree_unflatten(
    structure,
    [_load(tensors, places[path], leaf, stored_format) for path, leaf in leaves.items()],
  )


def _is_tied(tensors: _Tensors) -> bool:
  """Whether a head, if there is one, is the embedding."""
  head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
  if head is None:
    return True
  rows = range(0, len(embedding), 4096)
  return head.shape == embedding.shape and all(
    np.array_equal(head[i : i + 4096], embedding[i : i + 4096]) for i in rows
  )


def _module(tensors: _Tensors, name: str) -> dict[str, Any]:
  """Tensors of a module by the rest of their names."""
  ends = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_global_scale")
  return {end: tensors[f"{name}.{end}"] for end in ends if f"{name}.{end}" in tensors}


def _tensors_of(tensors: _Tensors, place: _Place, name: str) -> dict[str, Any]:
  """Tensors of one parameter of a module; one that never has codes is called `weight`."""
  if place.end == "weight":
    return _module(tensors, name)
  full = f"{name}.{place.end}"
  return {"weight": tensors[full]} if full in tensors else {}


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
    wanted = place.shape(leaf)
    for name in dict.fromkeys(name for _, name in place.names()):
      own = _tensors_of(tensors, place, name)
      known |= {f"{name}.{place.end if end == 'weight' else end}" for end in own}
      if "weight_shape" in own:
        shape = tuple(int(n) for n in own["weight_shape"])
      elif "weight_packed" in own:
        shape = (own["weight_packed"].shape[0], 2 * own["weight_packed"].shape[1])
      elif "weight" in own:
        shape = own["weight"].shape
      else:
        lacks.append(f"{name}.{place.end}")
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
    indices = itertools.product(*ranges)
    rows = [place.part(matrix(names[at]), at)[rest].astype(x.dtype) for at in indices]
    return np.stack(rows).reshape(*(len(r) for r in ranges), *rows[0].shape)

  return jax.make_array_from_callback(x.shape, _sharding(x), part)


def _has_codes(stored: Format | None, wanted: Format) -> bool:
  """Whether codes of one format are those of another, if their scales are too."""
  if stored is None or (stored.dtype, stored.two_level) != (wanted.dtype, wanted.two_level):
    return False
  # One scale per tensor is stored as one per channel.
  is_one = wanted.granularity == "tensor" and stored.granularity == "channel"
  return stored.granularity == wanted.granularity or is_one


def _load(tensors: _Tensors, place: _Place, leaf: Any, stored_format: Format | None) -> Any:
  """One parameter."""

  def in_float(name: str) -> np.ndarray:
    own = _tensors_of(tensors, place, name)
    if "weight_scale" in own:
      format = stored_format or leaf.format.transposed
      packed = compressed_tensors.decode(own, format, name, transposed=not place.transposed)
      x = np.asarray(jax.tree.map(jnp.asarray, packed).dequantize())
    else:
      x = np.asarray(own["weight"])
      x = x.T if place.transposed else x
    x = _pairs_apart(x, place.rotary, back=True)
    return x if place.gain == 1 else x / np.float32(place.gain)

  if not is_quantized(leaf):
    return _assemble(leaf, place, in_float)
  _, first = next(place.names())
  wanted = leaf.format.transposed
  has_codes = "weight_scale" in _module(tensors, first) and _has_codes(stored_format, wanted)
  if place.parts or not has_codes:
    return _quantized(leaf, place, in_float, _dtype(tensors, place))

  @functools.lru_cache(maxsize=1)  # Each of its fields is asked for.
  def packed(name: str) -> QuantizedArray:
    w = compressed_tensors.decode(_module(tensors, name), wanted, name, transposed=True)
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


def _dtype(tensors: _Tensors, place: _Place) -> Any:
  """Of a parameter on its way: what it has in the checkpoint, if that is one, or float32."""
  modules = [_tensors_of(tensors, place, name) for _, name in place.names()]
  found = {np.float32 if "weight_scale" in x else x["weight"].dtype for x in modules}
  return found.pop() if len(found) == 1 else np.float32


def _quantized(
  leaf: QuantizedArray, place: _Place, in_float: Callable[[str], np.ndarray], dtype: Any
) -> QuantizedArray:
  """A packed parameter of float tensors, quantized layer by layer where it is to be."""
  in_place = jax.tree.map(_sharding, leaf)
  matrix = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=_sharding(leaf.qvalue))
  quantize = lambda x: quantized_array.quantize(x.astype(jnp.float32), leaf.format)
  if place.layers is None and not place.parts:
    return jax.jit(quantize, out_shardings=in_place)(_assemble(matrix, place, in_float))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=in_place)
  def put(stack: QuantizedArray, x: jax.Array, i: jax.Array) -> QuantizedArray:
    return jax.tree.map(lambda old, new: write_layer(old, new, i), stack, quantize(x))

  zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), leaf)
  stack = jax.jit(zeros, out_shardings=in_place)()
  for i, layer in enumerate(place.layers or range(place.parts)):
    one = place._replace(name=place.name.replace("{layer}", str(layer)), layers=None, parts=0)
    own = lambda name, i=i: place.part(in_float(name), (i,))
    stack = put(stack, _assemble(_layer_of(matrix), one, own), np.int32(i))
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

  Embedding and head are written as the values they stand for: servers look up float rows.

  Args:
    folder: must not exist; created atomically.
    params: of the model, on devices that this process can read.
    config: of the model; its activation_format is how the served model rounds activations.
    kind: one of `config_json.FAMILIES`; None takes the first that the model fits.
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
  kind = config_json.family(config, kind)
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
  leaves = {trees.path_name(path): leaf for path, leaf in flat}
  places = _places(kind, config)
  if unknown := sorted(leaves.keys() ^ places.keys()):
    raise ValueError(f"the parameters are not those of the model: see {', '.join(unknown[:5])}")
  has_codes = lambda path: is_quantized(leaves[path]) and not places[path].parts
  formats = {leaf.format for path, leaf in leaves.items() if has_codes(path)}
  if len(formats) > 1:
    raise ValueError(f"packed leaves of more than one format cannot be saved: {formats}")
  told = config_json.write(kind, config, np.dtype(dtype).name, length) | dict(more or {})
  packed = False
  if formats:
    group = compressed_tensors.scheme(formats.pop().transposed, config.activation_format)
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
          if (place.is_linear or path == "head/rows") and not has_codes(path)
          for name in dict.fromkeys(name for _, name in place.names())
        ),
        *(name.removesuffix(".weight") for name in _shared_gates(kind, config)),
        # A head that is the embedding has no tensors, and is a Linear there all the same.
        *(["lm_head"] if config.tied_embedding else []),
      ],
      "config_groups": {"group_0": group},
    }
  for path, leaf in leaves.items():  # What cannot be saved should be told before hours are spent.
    if has_codes(path) and places[path].rotary:
      # Of one matrix, on no mesh.
      matrix = lambda x, lead=places[path].lead: jax.ShapeDtypeStruct(x.shape[lead:], x.dtype)
      shapes = jax.tree.map(matrix, leaf)
      jax.eval_shape(functools.partial(_turned, width=places[path].rotary), shapes)

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


def _on_host(leaf: Any, layer: int | None) -> Any:
  """A parameter, or one layer of a stack, whatever mesh is set where it is saved."""

  def get(x: Any) -> Any:
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
      return jax.device_get(x if layer is None else x[layer])

  return jax.tree.map(get, leaf)


def _saved(
  leaf: Any, place: _Place, dtype: np.dtype, packed: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors of one parameter, one layer of them at a time on the host."""
  if place.parts:
    parts = [_on_host(leaf, i) for i in range(place.parts)]
    rows = [x.dequantize() if is_quantized(x) else x for x in parts]
    yield f"{place.name}.weight", np.concatenate([np.asarray(x).astype(dtype) for x in rows])
    return
  for i in range(len(place.layers)) if place.layers else (None,):
    own = _on_host(leaf, i)
    for index, name in place.names():
      if i is not None and index[0] != i:
        continue
      rest = index[place.layers is not None :]
      x = jax.tree.map(lambda x, rest=rest: x[rest], own)
      if is_quantized(x):
        x = _turned(x, place.rotary)
        x = x if place.gain == 1 else _scaled(x, place.gain)
        for end, tensor in compressed_tensors.encode(x, packed, transposed=True).items():
          yield f"{name}.{end}", tensor
      else:
        x = _pairs_apart(x, place.rotary) * np.float32(place.gain)
        yield f"{name}.{place.end}", np.asarray(x.T if place.transposed else x).astype(dtype)
