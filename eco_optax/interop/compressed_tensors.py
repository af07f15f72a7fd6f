"""Packed weights as the compressed-tensors layout has them, which transformers and vLLM serve.

A module's weight is there `(out, in)`. Codes and scales of a kernel `(in, out)` are transposed, and
those of one stored `(out, in)` are not; both keep their bits. Formats are those of kernels `(in,
out)`, see `Format.transposed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eco_optax import quantized_array
from eco_optax.formats import Format
from eco_optax.interop import json_fields
from eco_optax.interop.json_fields import FLAG, LIST, OBJECT, POSITIVE, TEXT
from eco_optax.quantized_array import QuantizedArray

_FLOAT, _INTEGER = "float8_e4m3fn", ("int8", "int4")


def _refuse(format: Format, reason: str) -> ValueError:
  return ValueError(
    f"compressed-tensors has no layout for {format}: {reason}. It has E4M3, INT8 and INT4 with"
    " scales per tensor, channel, block or group, MXFP8, MXFP4 and NVFP4"
  )


def scheme(format: Format, activation_format: Format | None = None) -> dict[str, Any]:
  """What `config.json` says of quantized modules.

  One scale per tensor is written as one per channel, all the same: vLLM puts queries, keys and
  values into one matrix, and would round matrices anew to the largest of their scales.

  Args:
    format: of the weights.
    activation_format: of what they are multiplied with, one scale per token, made anew each time;
      None for floats.

  Returns:
    A config group: `format`, `weights` and `input_activations`.

  Raises:
    ValueError: if the layout does not define such a format, or if no server multiplies such
      weights with such activations.

  Example:
    >>> import eco_optax as eco
    >>> from eco_optax.interop import compressed_tensors
    >>> compressed_tensors.scheme(eco.MXFP4)["format"]
    'mxfp4-pack-quantized'

  References:
    `compressed-tensors <https://github.com/vllm-project/compressed-tensors>`_.
  """
  name, scale = format.dtype.name, format.scale_dtype.name
  weights: dict[str, Any] = {
    "num_bits": format.bits,
    "type": "int" if name in _INTEGER else "float",
    "symmetric": True,
    "dynamic": False,
    **_strategy(format),
  }
  activations = None if activation_format is None else _activations(format, activation_format)
  if name == "float8_e5m2":
    raise _refuse(format, "its FP8 is E4M3")
  if name == "float4_e2m1fn" or scale in ("float8_e8m0fnu", "float8_e4m3fn"):
    known = {
      ("float8_e4m3fn", (32, 1), "float8_e8m0fnu"): ("mxfp8-quantized", "torch.uint8"),
      ("float4_e2m1fn", (32, 1), "float8_e8m0fnu"): ("mxfp4-pack-quantized", "torch.uint8"),
      ("float4_e2m1fn", (16, 1), "float8_e4m3fn"): ("nvfp4-pack-quantized", "torch.float8_e4m3fn"),
    }
    found = known.get((name, format.granularity, scale))  # type: ignore[arg-type]
    if found is None:
      raise _refuse(format, "its micro-scaling formats are those three alone")
    layout, weights["scale_dtype"] = found
    if format.two_level:
      weights["strategy"] = "tensor_group"
  elif name in _INTEGER:
    layout = "int-quantized" if activations else "pack-quantized"
  else:
    layout = "float-quantized"
  return {
    "targets": ["Linear"],
    "format": layout,
    "weights": weights,
    "input_activations": activations,
    "output_activations": None,
  }


def _strategy(format: Format) -> dict[str, Any]:
  granularity = format.granularity
  if granularity == "channel" and format.contraction_axis != -2:
    raise _refuse(format, "scales run over the inputs, axis -2")
  if isinstance(granularity, str):
    return {"strategy": "channel"}
  if len(granularity) != 2:
    raise _refuse(format, "blocks have two axes")
  if granularity[1] == 1:
    return {"strategy": "group", "group_size": granularity[0]}
  if format.dtype.name in _INTEGER:
    raise _refuse(format, "integers have groups of inputs, no blocks")
  return {"strategy": "block", "block_structure": [granularity[1], granularity[0]]}


def _activations(weights: Format, format: Format) -> dict[str, Any]:
  name = format.dtype.name
  is_token = format.granularity == "channel" and format.contraction_axis == -1
  if name not in (_FLOAT, "int8") or not is_token or format.power_of_two:
    raise ValueError(
      f"activations in {format} cannot be served: use one scale per token, as FP8_TOKEN has, or"
      " None for float activations"
    )
  if served_activations(weights, format) is None:
    raise ValueError(
      f"weights in {weights} with activations in {format} cannot be served: vLLM rounds activations"
      " to FP8 beside E4M3 and to INT8 beside INT8, with weight scales per tensor or channel;"
      " activation_format None serves these weights with float activations"
    )
  return {
    "num_bits": 8,
    "type": "float" if name == _FLOAT else "int",
    "symmetric": True,
    "dynamic": True,
    "strategy": "token",
  }


def served_activations(weights: Format, activations: Format | None) -> Format | None:
  """The format in which activations are served beside weights: the trained one, or floats.

  Args:
    weights: their format.
    activations: the format that a run trained with; None for floats.

  Returns:
    `activations` if a server rounds to it beside such weights, else None.

  Example:
    >>> import eco_optax as eco
    >>> from eco_optax.interop import compressed_tensors
    >>> compressed_tensors.served_activations(eco.FP8, eco.FP8_TOKEN) == eco.FP8_TOKEN
    True
    >>> print(compressed_tensors.served_activations(eco.INT4, eco.FP8_TOKEN))
    None
  """
  if activations is None or not isinstance(weights.granularity, str):
    return None
  is_token = activations.granularity == "channel" and activations.contraction_axis == -1
  name = activations.dtype.name
  same = name == weights.dtype.name and name in (_FLOAT, "int8")
  return activations if same and is_token and not activations.power_of_two else None


def vllm(
  weights: Format, activations: Format | None = None, experts: bool = False
) -> tuple[bool, str]:
  """Whether vLLM serves a checkpoint, by its own choice of a scheme for each layer.

  Args:
    weights: their format.
    activations: of activations in config.json; None for floats.
    experts: whether weights of routed experts are among them.

  Returns:
    Whether it does, and in words what to know: why not, or what differs on some GPUs. No words
    are needed where every supported GPU computes what was trained.

  Example:
    >>> import eco_optax as eco
    >>> from eco_optax.interop import compressed_tensors
    >>> compressed_tensors.vllm(eco.INT8)
    (True, '')
    >>> compressed_tensors.vllm(eco.Format("float8_e4m3fn", (32, 1)))
    (False, 'vLLM has no scheme for E4M3 in groups with float32 scales')

  References:
    `_get_scheme_from_parts` and `get_moe_method` of `vllm.model_executor.layers.quantization
    <https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/layers/quantization/compressed_tensors>`_.
  """
  name, granularity = weights.dtype.name, weights.granularity
  if weights.scale_dtype.name == "float8_e8m0fnu":
    rounds = "MXFP8" if weights.bits == 8 else "MXFP4"
    return True, (
      f"GPUs that multiply {rounds} (compute capability 10) round activations to {rounds} too,"
      " others keep them in float"
    )
  if weights.two_level:
    return True, ""
  if name in _INTEGER:
    if isinstance(granularity, tuple) and granularity[0] not in (32, 64, 128):
      return False, f"vLLM's kernels have groups of 32, 64 or 128 inputs, not {granularity[0]}"
    return True, ""
  if isinstance(granularity, tuple):
    if granularity[1] == 1:
      return False, "vLLM has no scheme for E4M3 in groups with float32 scales"
    if granularity != (128, 128):
      return False, f"vLLM's kernels have E4M3 blocks of 128 × 128, not {granularity}"
  if activations is None and experts:
    return False, "vLLM has no experts in E4M3 with float activations: export FP8 activations too"
  if activations is not None:
    return True, "GPUs below compute capability 8.9 keep activations in float"
  return True, ""


def formats(
  quantization_config: Mapping[str, Any], where: str = "config.json"
) -> tuple[Format, Format | None]:
  """The formats of weights and activations that `quantization_config` in `config.json` says.

  Args:
    quantization_config: the object of that name.
    where: the file, for errors.

  Raises:
    ValueError: if there is none like it, naming every key that is in the way.
  """
  told = json_fields.Fields(quantization_config, "quantization_config")
  found = formats_of(told)
  if told.problems or found is None:
    raise ValueError(f"{where}: {'; '.join(told.problems)}")
  return found


def formats_of(told: json_fields.Fields) -> tuple[Format, Format | None] | None:
  """The same, adding faults to `told.problems`; None if there are any."""
  before = len(told.problems)
  method, groups = told.take("quant_method", TEXT), told.take("config_groups", OBJECT, {})
  if method != "compressed-tensors" or len(groups) != 1:
    told.problems[before:] = [
      f"{told.name}: quant_method {method!r} with {len(groups)} config_groups cannot be read: only"
      " compressed-tensors with one group can, or a checkpoint in float"
    ]
    return None
  told.ignore("ignore", "quantization_status", "global_compression_ratio", "version")
  for key, off in (("kv_cache_scheme", None), ("sparsity_config", {}), ("transform_config", {})):
    told.expect(key, off)
  layout = told.take("format", TEXT, "", null=True)
  told.finish()
  ((name, raw),) = groups.items()
  group = told.child(f"config_groups.{name}", raw)
  layout = group.take("format", TEXT, None, null=True) or layout or ""
  group.ignore("targets")  # The tensors say which modules have codes.
  group.expect("output_activations", None)
  weights = group.child("weights", group.take("weights", OBJECT))
  activations = group.take("input_activations", OBJECT, None, null=True)
  group.finish()

  kind, bits = weights.take("type", TEXT, "int"), weights.take("num_bits", POSITIVE, 8)
  dtype = {
    ("float", 8): _FLOAT,
    ("float", 4): "float4_e2m1fn",
    ("int", 8): "int8",
    ("int", 4): "int4",
  }.get((kind, bits))
  if dtype is None:
    told.problems.append(f"{weights.name}: {bits} bits of type {kind!r} cannot be read")
  scales = {"mxfp8": "float8_e8m0fnu", "mxfp4": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}
  strategy = weights.take("strategy", TEXT)
  granularity: Any = None
  if strategy in ("tensor", "channel"):
    granularity = strategy
  elif strategy in ("group", "tensor_group"):
    granularity = (weights.take("group_size", POSITIVE), 1)
  elif strategy == "block":
    shape = weights.take("block_structure", LIST)
    granularity = tuple(x for x in shape[::-1] if POSITIVE.check(x))
  if granularity is None or (isinstance(granularity, tuple) and len(granularity) != 2):
    told.problems.append(f"{weights.name}: scales by strategy {strategy!r} cannot be read")
  weights.expect("dynamic", False)
  _finish_arguments(weights)
  activation_format = None
  if activations is not None:
    inputs = group.child("input_activations", activations)
    kind, bits = inputs.take("type", TEXT, "int"), inputs.take("num_bits", POSITIVE, 8)
    strategy = inputs.take("strategy", TEXT)
    inputs.expect("dynamic", True)
    if strategy != "token" or bits != 8 or kind not in ("float", "int"):
      told.problems.append(
        f"{inputs.name}: {bits} bits of type {kind!r} by strategy {strategy!r} cannot be read:"
        " only 8 bits per token"
      )
    _finish_arguments(inputs)
    name = _FLOAT if kind == "float" else "int8"
    activation_format = Format(name, "channel", contraction_axis=-1)
  if told.problems[before:]:
    return None
  scale = scales.get(layout.split("-")[0], "float32")
  try:
    return Format(dtype, granularity, scale), activation_format
  except ValueError as error:
    told.problems.append(f"{weights.name}: {error}")
    return None


def _finish_arguments(arguments: json_fields.Fields) -> None:
  """What weights and activations have in common: no zero points, no reordered inputs."""
  if not arguments.take("symmetric", FLAG, True):
    told = f"{arguments.name}.symmetric False: zero points cannot be read"
    arguments.problems.append(told)
  arguments.expect("actorder", False)
  arguments.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
  arguments.ignore("group_size", "block_structure")  # Of the strategies that use them.
  arguments.finish()


def encode(
  weight: QuantizedArray, packed: bool, *, transposed: bool = False
) -> dict[str, np.ndarray]:
  """One matrix's tensors, named as behind the module's name.

  Args:
    weight: of shape (in, out), or (out, in) if `transposed`.
    packed: whether its layout is one of those called pack-quantized.
    transposed: whether the weight is stored as tensors are there.

  Returns:
    `weight` or `weight_packed`, `weight_scale`, and what else the layout has.
  """
  weight = jax.device_get(weight)
  format, (inputs, outputs) = weight.format, weight.shape
  codes, scale, odd = np.asarray(weight.qvalue), np.asarray(weight.scale), weight.odd
  if transposed:
    inputs, outputs = outputs, inputs
    if format.bits == 4:  # Two of a channel in a byte, not of two channels.
      code = jnp.asarray(weight.code_bits).T.astype(jnp.int32)
      qvalue, odd = quantized_array.pack(code, format)
      codes = np.asarray(qvalue).T
  else:
    codes, scale = codes.T, scale.T
  codes, scale = np.ascontiguousarray(codes), np.ascontiguousarray(scale)
  tensors: dict[str, np.ndarray] = {}
  if format.granularity == "tensor":
    scale = np.repeat(scale, outputs, 0)  # See `scheme`.
  if format.dtype.name == "float4_e2m1fn":
    tensors["weight_packed"] = codes  # Two to a byte, the first of them low, here as there.
  elif packed:
    # There codes are counted from the lowest, −8 or −128, and stored in words of 32 bits.
    flip = np.uint8(0x88 if format.bits == 4 else 0x80)
    words = np.full((outputs, -(-inputs * format.bits // 32) * 4), flip ^ flip, np.uint8)
    words[:, : codes.shape[1]] = codes.view(np.uint8) ^ flip
    if odd:  # Nothing is behind the last code.
      words[:, codes.shape[1] - 1] &= 0xF
    tensors["weight_packed"] = words.view(np.int32)
    tensors["weight_shape"] = np.array([outputs, inputs], np.int64)
  else:
    tensors["weight"] = codes
  if format.scale_dtype.name == "float8_e8m0fnu":
    scale = scale.view(np.uint8)
  tensors["weight_scale"] = scale
  if weight.tensor_scale is not None:
    # There the codes are divided by it.
    tensors["weight_global_scale"] = np.asarray(1 / weight.tensor_scale).reshape(1)
  return tensors


def decode(
  tensors: Mapping[str, np.ndarray], format: Format, name: str, *, transposed: bool = False
) -> QuantizedArray:
  """The matrix whose tensors these are, in NumPy arrays.

  Args:
    tensors: of one module, see `encode`.
    format: of the result; `"tensor"` takes scales for each channel if they are equal.
    name: of the module, for errors.
    transposed: whether the result is to be stored as tensors are there.

  Returns:
    A QuantizedArray of shape (in, out) with the bits that are stored; if `transposed` of shape
    (out, in) and in `format.transposed`.

  Raises:
    ValueError: if the tensors are not of this format, naming the module.
  """
  is_packed = "weight" not in tensors
  needs = {"weight_scale", "weight_packed" if is_packed else "weight"}
  if format.two_level:
    needs.add("weight_global_scale")
  if is_packed and format.dtype.name in _INTEGER:
    needs.add("weight_shape")
  if missing := needs - tensors.keys():
    raise ValueError(f"{name} has no {', '.join(sorted(missing))}, which {format} needs")
  scale: Any = np.asarray(tensors["weight_scale"])
  if format.granularity == "tensor":
    if not (scale == scale.flat[0]).all():
      raise ValueError(
        f"{name}.weight_scale differs from channel to channel, and {format} has one scale per"
        f" tensor: read it as {Format(format.dtype, 'channel', format.scale_dtype)}"
      )
    scale = scale.reshape(-1, 1)[:1]
  if format.scale_dtype.name == "float8_e8m0fnu":
    scale = scale.view(ml_dtypes.float8_e8m0fnu)
  elif format.scale_dtype == np.float32 and scale.dtype.name in ("bfloat16", "float16"):
    scale = scale.astype(np.float32)  # As llm-compressor stores them: the same numbers.
  odd = False
  if not is_packed:
    codes, inputs = np.asarray(tensors["weight"]), tensors["weight"].shape[1]
  else:
    words = np.ascontiguousarray(tensors["weight_packed"]).view(np.uint8)
    if format.dtype.name == "float4_e2m1fn":
      codes, inputs = words, 2 * words.shape[1]
    else:
      inputs = int(tensors["weight_shape"][1])
      used = -(-inputs * format.bits // 8)
      codes = words[:, :used] ^ np.uint8(0x88 if format.bits == 4 else 0x80)
      odd = format.bits == 4 and inputs % 2 == 1
      if odd:
        codes[:, -1] &= 0xF
      if format.bits == 8:
        codes = codes.view(np.int8)
  stored = np.uint8 if format.bits == 4 else format.dtype
  wanted = _scale_shape(format, inputs, codes.shape[0])
  if codes.dtype != stored or scale.dtype != format.scale_dtype or scale.shape != wanted:
    raise ValueError(
      f"{name} has codes of {codes.dtype} and scales of {scale.dtype}{list(scale.shape)}, where"
      f" {format} has {np.dtype(stored)} and {format.scale_dtype}{list(wanted)}"
    )
  tensor_scale: Any = None
  if format.two_level:
    tensor_scale = (1 / np.asarray(tensors["weight_global_scale"], np.float32)).reshape(1, 1)
  qvalue: Any = codes.T
  weight = QuantizedArray(qvalue, scale.T, format, tensor_scale, None, odd)
  if not transposed:
    return weight
  qvalue, odd = codes, False
  if format.bits == 4:
    code = jnp.asarray(jax.tree.map(jnp.asarray, weight).code_bits).T.astype(jnp.int32)
    qvalue, odd = quantized_array.pack(code, format)
  return QuantizedArray(qvalue, scale, format.transposed, tensor_scale, None, odd)


def _scale_shape(format: Format, inputs: int, outputs: int) -> tuple[int, int]:
  if format.granularity == "tensor":
    return (1, 1)
  if isinstance(format.granularity, str):
    return (outputs, 1)
  rows, columns = format.granularity
  return (outputs // columns, inputs // rows)
