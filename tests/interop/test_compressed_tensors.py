"""The compressed-tensors layout, against loops over its definition."""

import copy

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.interop import compressed_tensors

TOKEN_INT8 = eco.Format("int8", "channel", contraction_axis=-1)
LAYOUTS = {
  eco.FP8: "float-quantized",
  eco.Format("float8_e4m3fn", "tensor"): "float-quantized",
  eco.FP8_BLOCK128: "float-quantized",
  eco.Format("float8_e4m3fn", (32, 1)): "float-quantized",
  eco.INT8: "pack-quantized",
  eco.INT4: "pack-quantized",
  eco.Format("int4", "channel"): "pack-quantized",
  eco.Format("int4", (32, 1)): "pack-quantized",
  eco.MXFP8: "mxfp8-quantized",
  eco.MXFP4: "mxfp4-pack-quantized",
  eco.NVFP4: "nvfp4-pack-quantized",
}


def kernel(format, inputs=128, outputs=256, transposed=False):
  x = np.random.default_rng(0).standard_normal((inputs, outputs)).astype(np.float32)
  if transposed:
    return eco.quantize(jnp.asarray(x.T), format.transposed)
  return eco.quantize(jnp.asarray(x), format)


def value(tensors, format):
  """Of a module's tensors, `(out, in)`, one element at a time."""
  if "weight" in tensors:
    codes = tensors["weight"].astype(np.float64)
  elif format.dtype.name == "float4_e2m1fn":
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    packed = tensors["weight_packed"]
    codes = np.zeros((packed.shape[0], 2 * packed.shape[1]))
    for i in range(codes.shape[1]):
      nibble = (packed[:, i // 2] >> (4 * (i % 2))) & 15
      codes[:, i] = np.where(nibble & 8, -1, 1) * np.array(table)[nibble & 7]
  else:
    bits, (outputs, inputs) = format.bits, tensors["weight_shape"]
    words = tensors["weight_packed"].astype(np.int64) & 0xFFFFFFFF
    codes = np.zeros((outputs, inputs))
    for i in range(inputs):
      word, shift = divmod(i * bits, 32)
      codes[:, i] = ((words[:, word] >> shift) & (2**bits - 1)) - 2 ** (bits - 1)
  scale = tensors["weight_scale"]
  if format.scale_dtype.name == "float8_e8m0fnu":
    assert scale.dtype == np.uint8
    scale = 2.0 ** (scale.astype(np.float64) - 127)
  scale = scale.astype(np.float64)
  if "weight_global_scale" in tensors:
    scale = scale / tensors["weight_global_scale"].astype(np.float64)
  if scale.ndim == 2:
    rows, columns = (n // s for n, s in zip(codes.shape, scale.shape, strict=True))
    scale = scale.repeat(rows, 0).repeat(columns, 1)
  return codes * scale


@pytest.mark.parametrize("format", LAYOUTS, ids=repr)
def test_values_are_those_of_the_layout_and_bits_come_back(format):
  group = compressed_tensors.scheme(format)
  assert group["format"] == LAYOUTS[format]
  w = kernel(format)
  tensors = compressed_tensors.encode(w, group["format"] == "pack-quantized")
  # Float32 rounds the product of codes and scale once, and a global scale's reciprocal once more.
  np.testing.assert_allclose(value(tensors, format).T, w.dequantize(), rtol=3e-7)
  told = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
  read, activations = compressed_tensors.formats(told)
  assert activations is None
  is_tensor = format.granularity == "tensor"  # One scale per tensor is stored as one per channel.
  assert read == (eco.Format(format.dtype, "channel") if is_tensor else format)
  back = compressed_tensors.decode(tensors, format, "module")
  np.testing.assert_array_equal(back.qvalue, w.qvalue)
  np.testing.assert_array_equal(np.asarray(back.scale), np.asarray(w.scale))
  assert back.scale.dtype == w.scale.dtype
  if format.two_level:  # Half an ulp for each of two reciprocals.
    np.testing.assert_allclose(back.tensor_scale, w.tensor_scale, rtol=1.2e-7)


@pytest.mark.parametrize("inputs", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("format", [eco.INT4, eco.INT8], ids=repr)
def test_rows_that_do_not_fill_their_last_word(format, inputs):
  w = kernel(format, inputs, 5)
  tensors = compressed_tensors.encode(w, True)
  assert tensors["weight_packed"].shape == (5, -(-inputs * format.bits // 32))
  np.testing.assert_allclose(value(tensors, format).T, w.dequantize(), rtol=3e-7)
  back = compressed_tensors.decode(tensors, format, "module")
  assert back.shape == w.shape
  np.testing.assert_array_equal(back.qvalue, w.qvalue)


@pytest.mark.parametrize("inputs", [128, 9])
@pytest.mark.parametrize("format", LAYOUTS, ids=repr)
def test_a_kernel_stored_out_in_has_the_same_tensors(format, inputs):
  if inputs == 9 and (isinstance(format.granularity, tuple) or format.dtype.name[0] == "f"):
    pytest.skip("blocks, and words of floats, are whole")
  is_packed = compressed_tensors.scheme(format)["format"] == "pack-quantized"
  stored = kernel(format, inputs, transposed=True)
  tensors = compressed_tensors.encode(stored, is_packed, transposed=True)
  wanted = compressed_tensors.encode(kernel(format, inputs), is_packed)
  assert tensors.keys() == wanted.keys()
  for name, x in wanted.items():
    assert tensors[name].dtype == x.dtype
    np.testing.assert_array_equal(tensors[name], x)
  back = compressed_tensors.decode(tensors, format, "module", transposed=True)
  assert (back.format, back.shape, back.odd) == (stored.format, stored.shape, stored.odd)
  np.testing.assert_array_equal(back.qvalue, stored.qvalue)
  np.testing.assert_array_equal(np.asarray(back.scale), np.asarray(stored.scale))


def test_scales_in_bfloat16_are_read():
  tensors = compressed_tensors.encode(kernel(eco.FP8), False)
  half = tensors["weight_scale"].astype(ml_dtypes.bfloat16)
  w = compressed_tensors.decode(tensors | {"weight_scale": half}, eco.FP8, "module")
  assert w.scale.dtype == np.float32
  np.testing.assert_array_equal(w.scale, half.astype(np.float32).T)


def test_activations_are_told():
  group = compressed_tensors.scheme(eco.FP8, eco.FP8_TOKEN)
  assert group["input_activations"] == {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "dynamic": True,
    "strategy": "token",
  }
  group = compressed_tensors.scheme(eco.INT8, TOKEN_INT8)
  assert group["format"] == "int-quantized"
  told = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
  assert compressed_tensors.formats(told) == (eco.INT8, TOKEN_INT8)
  with pytest.raises(ValueError, match="one scale per token"):
    compressed_tensors.scheme(eco.FP8, eco.MXFP8)


@pytest.mark.parametrize(
  ("weights", "activations"),
  [
    (eco.INT8, eco.FP8_TOKEN),  # Would run with INT8 activations.
    (eco.INT4, eco.FP8_TOKEN),
    (eco.INT4, TOKEN_INT8),
    (eco.FP8, TOKEN_INT8),
    (eco.FP8_BLOCK128, eco.FP8_TOKEN),  # Would run with a scale for every 128 activations.
    (eco.Format("float8_e4m3fn", (32, 1)), eco.FP8_TOKEN),
    (eco.MXFP8, eco.FP8_TOKEN),
    (eco.NVFP4, eco.FP8_TOKEN),
  ],
  ids=repr,
)
def test_activations_that_no_server_has_beside_such_weights_are_refused(weights, activations):
  assert compressed_tensors.served_activations(weights, activations) is None
  with pytest.raises(ValueError, match="activation_format None serves these weights"):
    compressed_tensors.scheme(weights, activations)


def test_what_vllm_serves_is_said():
  serves = lambda *args, **more: compressed_tensors.vllm(*args, **more)[0]
  for format in (eco.FP8, eco.FP8_BLOCK128, eco.INT8, eco.INT4, eco.NVFP4, eco.MXFP4, eco.MXFP8):
    assert serves(format)
    assert serves(format, experts=True) == (format not in (eco.FP8, eco.FP8_BLOCK128))
  assert serves(eco.FP8, eco.FP8_TOKEN, experts=True)
  for dtype, granularity in (
    ("float8_e4m3fn", (32, 1)),
    ("float8_e4m3fn", (64, 64)),
    ("int4", (16, 1)),
  ):
    assert not serves(eco.Format(dtype, granularity))


@pytest.mark.parametrize(
  ("format", "reason"),
  [
    (eco.FP8_E5M2, "its FP8 is E4M3"),
    (eco.FP8_TOKEN, "scales run over the inputs"),
    (eco.Format("float4_e2m1fn", (64, 1), "float8_e8m0fnu"), "those three alone"),
    (eco.Format("float4_e2m1fn", "channel"), "those three alone"),
    (eco.Format("float8_e4m3fn", (64, 1), "float8_e8m0fnu"), "those three alone"),
    (eco.Format("int4", (32, 32)), "groups of inputs, no blocks"),
    (eco.Format("float8_e4m3fn", (32,)), "blocks have two axes"),
  ],
  ids=repr,
)
def test_what_the_layout_has_not_is_refused(format, reason):
  with pytest.raises(ValueError, match=reason):
    compressed_tensors.scheme(format)


def test_what_cannot_be_read_is_named():
  tensors = compressed_tensors.encode(kernel(eco.Format("int4", "channel")), True)
  with pytest.raises(ValueError, match=r"m.weight_scale differs from channel to channel"):
    compressed_tensors.decode(tensors, eco.INT4, "m")
  with pytest.raises(ValueError, match="m has codes of int8"):
    compressed_tensors.decode(compressed_tensors.encode(kernel(eco.INT8), False), eco.FP8, "m")
  with pytest.raises(ValueError, match="m has no weight_scale, which"):
    compressed_tensors.decode({"weight": np.zeros((2, 2), ml_dtypes.bfloat16)}, eco.FP8, "m")
  group = compressed_tensors.scheme(eco.INT8, TOKEN_INT8)
  told = {"quant_method": "compressed-tensors", "config_groups": {"a": group}}
  assert compressed_tensors.formats(told) == (eco.INT8, TOKEN_INT8)
  for at, key, value, message in (
    ((), "quant_method", "gptq", "quant_method 'gptq'"),
    ((), "config_groups", [], "config_groups"),
    ((), "transform_config", {"a": 1}, "no quantization_config.transform_config"),
    ((), "kv_cache_scheme", {"num_bits": 8}, "no quantization_config.kv_cache_scheme"),
    (("config_groups",), "a", None, "config_groups.a None has to be an object"),
    (("config_groups", "a"), "weights", None, "a.weights null has to be an object"),
    (("config_groups", "a"), "output_activations", {"num_bits": 8}, "no .*output_activations"),
    (("config_groups", "a", "weights"), "symmetric", False, "zero points"),
    (("config_groups", "a", "weights"), "num_bits", 3, "3 bits of type 'int'"),
    (("config_groups", "a", "weights"), "strategy", "group", "weights.group_size is missing"),
    (("config_groups", "a", "weights"), "actorder", "group", "no .*weights.actorder 'group'"),
    (("config_groups", "a", "input_activations"), "dynamic", False, "no .*dynamic False"),
    (("config_groups", "a", "input_activations"), "twist", 1, "twist 1 is not understood"),
  ):
    changed = copy.deepcopy(told)
    inside = changed
    for part in at:
      inside = inside[part]
    inside[key] = value
    with pytest.raises(ValueError, match=message) as error:
      compressed_tensors.formats(changed, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)
