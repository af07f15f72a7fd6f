"""Packed weights as the compressed-tensors layout has them, which transformers and vLLM serve.

A module's weight is there `(out, in)`, where a kernel is `(in, out)`: codes and scales are
transposed and otherwise stay the bits that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from eco_optax.formats import Format
from eco_optax.quantized_array import QuantizedArray

_FLOAT, _INTEGER = "float8_e4m3fn", ("int8", "int4")


def _refuse(format: Format, reason: str) -> ValueError:
  return ValueError(
    f"compressed-tensors has no layout for {format}: {reason}. It has E4M3, INT8 and INT4 with"
    " scales per tensor, channel, block or group, MXFP8, MXFP4 and NVFP4"
  )


def scheme(format: Format, activation_format: Format | None = None) -> dict[str, Any]:
  """What `config.json` says of quantized modules.

  Args:
    format: of the weights.
    activation_format: of what they are multiplied with, one scale per token, made anew each time;
      None for floats.

  Returns:
    A config group: `format`, `weights` and `input_activations`.

  Raises:
    ValueError: if the layout does not define such a format.

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
  activations = None if activation_format is None else _activations(activation_format)
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
    layout = "int-quantized" if name == "int8" and activations else "pack-quantized"
    if layout == "pack-quantized" and weights["strategy"] == "tensor":
      weights["strategy"] = "channel"  # All channels have the tensor's scale.
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
    return {"strategy": granularity}
  if len(granularity) != 2:
    raise _refuse(format, "blocks have two axes")
  if granularity[1] == 1:
    return {"strategy": "group", "group_size": granularity[0]}
  if format.dtype.name in _INTEGER:
    raise _refuse(format, "integers have groups of inputs, no blocks")
  return {"strategy": "block", "block_structure": [granularity[1], granularity[0]]}


def _activations(format: Format) -> dict[str, Any]:
  name = format.dtype.name
  is_token = format.granularity == "channel" and format.contraction_axis == -1
  if name not in (_FLOAT, "int8") or not is_token or format.power_of_two:
    raise ValueError(
      f"activations in {format} cannot be served: use one scale per token, as FP8_TOKEN has, or"
      " None for float activations"
    )
  return {
    "num_bits": 8,
    "type": "float" if name == _FLOAT else "int",
    "symmetric": True,
    "dynamic": True,
    "strategy": "token",
  }


def formats(quantization_config: Mapping[str, Any]) -> tuple[Format, Format | None]:
  """The formats of weights and activations that `quantization_config` in `config.json` says.

  Raises:
    ValueError: if there is none like it, naming what is in the way.
  """
  method, groups = quantization_config.get("quant_method"), quantization_config.get("config_groups")
  if method != "compressed-tensors" or not groups or len(groups) != 1:
    raise ValueError(
      f"quant_method {method!r} with {len(groups or ())} config_groups cannot be read: only"
      " compressed-tensors with one group can, or a checkpoint in float"
    )
  (group,) = groups.values()
  weights, activations = group["weights"], group.get("input_activations")
  for what in (weights, activations or {}):
    if not what.get("symmetric", True) or what.get("actorder"):
      raise ValueError(f"{what}: zero points and reordered inputs cannot be read")
  bits, kind = weights["num_bits"], weights["type"]
  dtype = {
    (8, "float"): _FLOAT,
    (4, "float"): "float4_e2m1fn",
    (8, "int"): "int8",
    (4, "int"): "int4",
  }.get((bits, kind))
  if dtype is None:
    raise ValueError(f"weights of {bits} bits and type {kind!r} cannot be read")
  layout = group.get("format") or quantization_config.get("format")
  scale = {"mxfp8": "float8_e8m0fnu", "mxfp4": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}.get(
    str(layout).split("-")[0], "float32"
  )
  strategy = weights["strategy"]
  granularity: Any = strategy
  if strategy in ("group", "tensor_group"):
    granularity = (weights["group_size"], 1)
  elif strategy == "block":
    granularity = tuple(weights["block_structure"][::-1])
  activation_format = None
  if activations is not None:
    if activations.get("strategy") != "token" or activations["num_bits"] != 8:
      raise ValueError(f"input_activations {activations} cannot be read: only 8 bits per token")
    name = _FLOAT if activations["type"] == "float" else "int8"
    activation_format = Format(name, "channel", contraction_axis=-1)
  return Format(dtype, granularity, scale), activation_format


def encode(weight: QuantizedArray, packed: bool) -> dict[str, np.ndarray]:
  """One matrix's tensors, named as behind the module's name.

  Args:
    weight: of shape (in, out).
    packed: whether its layout is one of those called pack-quantized.

  Returns:
    `weight` or `weight_packed`, `weight_scale`, and what else the layout has.
  """
  weight = jax.device_get(weight)
  format, (inputs, outputs) = weight.format, weight.shape
  codes = np.ascontiguousarray(np.asarray(weight.qvalue).T)
  scale = np.ascontiguousarray(np.asarray(weight.scale).T)
  tensors: dict[str, np.ndarray] = {}
  if format.granularity == "tensor":
    # A scale for each channel, all the same, is what integers have to have.
    scale = np.repeat(scale, outputs, 0) if packed else scale.reshape(1)
  if format.dtype.name == "float4_e2m1fn":
    tensors["weight_packed"] = codes  # Two to a byte, the first of them low, here as there.
  elif packed:
    # There codes are counted from the lowest, −8 or −128, and stored in words of 32 bits.
    flip = np.uint8(0x88 if format.bits == 4 else 0x80)
    words = np.full((outputs, -(-inputs * format.bits // 32) * 4), flip ^ flip, np.uint8)
    words[:, : codes.shape[1]] = codes.view(np.uint8) ^ flip
    if weight.odd:  # Nothing is behind the last code.
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


def decode(tensors: Mapping[str, np.ndarray], format: Format, name: str) -> QuantizedArray:
  """The matrix whose tensors these are, in NumPy arrays.

  Args:
    tensors: of one module, see `encode`.
    format: of the result; `"tensor"` takes scales for each channel if they are equal.
    name: of the module, for errors.

  Returns:
    A QuantizedArray of shape (in, out) with the bits that are stored.

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
  return QuantizedArray(qvalue, scale.T, format, tensor_scale, None, odd)


def _scale_shape(format: Format, inputs: int, outputs: int) -> tuple[int, int]:
  if format.granularity == "tensor":
    return (1, 1)
  if isinstance(format.granularity, str):
    return (outputs, 1)
  rows, columns = format.granularity
  return (outputs // columns, inputs // rows)
