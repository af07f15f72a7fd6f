"""Packed leaves to qwix and back, against qwix's own dequantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.interop.qwix import from_qwix, to_qwix

qwix = pytest.importorskip("qwix")
# Its own code mixes dtypes.
pytestmark = pytest.mark.standard_promotion

FORMATS = [
  eco.FP8,
  eco.FP8_E5M2,
  eco.FP8_TOKEN,
  eco.INT8,
  eco.INT4,
  eco.Format("float8_e4m3fn", (32, 64)),
  eco.Format("int4", (32, 1)),
  eco.MXFP8,
  eco.MXFP4,
  eco.NVFP4,
]


def normal(*shape):
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_values_stay_and_codes_come_back(format):
  params = {"layers": {"w": eco.quantize(normal(3, 64, 128), format)}, "b": jnp.ones(3)}
  theirs = to_qwix(params)
  np.testing.assert_array_equal(
    qwix.dequantize(theirs["layers"]["w"]), params["layers"]["w"].dequantize()
  )
  assert theirs["b"] is params["b"]
  back = from_qwix(theirs)["layers"]["w"]
  np.testing.assert_array_equal(back.dequantize(), params["layers"]["w"].dequantize())
  if format.scale_dtype == np.float32:
    assert back.format == format
    assert_same(back, params["layers"]["w"])
  elif not format.two_level:
    again = from_qwix(theirs, format)["layers"]["w"]
    assert again.format == format
    assert_same(again, params["layers"]["w"])


@pytest.mark.parametrize(
  ("how", "format"),
  [
    ({"qtype": "float8_e4m3fn", "channelwise_axes": [2]}, eco.FP8),
    ({"qtype": "int4"}, eco.INT4),
    ({"qtype": "int8", "channelwise_axes": [0, 2]}, eco.INT8),
    (
      {"qtype": "int8", "channelwise_axes": [2], "tiled_axes": {1: 16}},
      eco.Format("int8", (16, 1)),
    ),
  ],
)
def test_what_qwix_quantized_is_read(how, format):
  theirs = qwix.quantize(normal(2, 64, 8), **how)
  w = from_qwix({"w": theirs})["w"]
  assert w.format == format
  np.testing.assert_array_equal(w.dequantize(), qwix.dequantize(theirs))
  # It is a leaf like any other: layers have scales of their own.
  assert jax.tree.map(lambda x: x[0], w).dequantize().shape == (64, 8)


def test_what_no_format_has_is_named():
  shifted = qwix.quantize(normal(64, 8), "int8", calibration_method="minmax")
  with pytest.raises(ValueError, match="leaf 'a/w' has a zero point"):
    from_qwix({"a": {"w": shifted}})
  plain = qwix.quantize(normal(64, 8), "int8")
  with pytest.raises(ValueError, match=r"leaf 'w' is Format\('int8', 'tensor'\) and cannot be"):
    from_qwix({"w": plain}, eco.FP8)
  tiles = qwix.quantize(normal(64, 8), "float8_e4m3fn", channelwise_axes=[1], tiled_axes={0: 32})
  with pytest.raises(ValueError, match="has scales that float8_e8m0fnu has not"):
    from_qwix({"w": tiles}, eco.MXFP8)
