"""QuantizedArray: right values, stable when requantized, finite or visibly NaN, a good pytree."""

import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_formats import PRESETS

import eco_optax as eco

DTYPES = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int8", "int4"]
# Every dtype with every granularity and every kind of scale, in a Latin square.
_GRANULARITIES = ["tensor", "channel", (16, 1), (8, 16)]
_SCALES = [("float32",), ("float32", True), ("bfloat16",), ("float8_e8m0fnu",)]
VARIANTS = {
  f"{dtype}-{granularity}-{'-'.join(map(str, scale))}": eco.Format(dtype, granularity, *scale)
  for i, dtype in enumerate(DTYPES)
  for j, granularity in enumerate(_GRANULARITIES)
  for scale in [_SCALES[(i + j) % len(_SCALES)]]
}
# NVFP4's layout with powers of two on both levels.
TWO_LEVELS = {
  f"{dtype}-two levels": eco.Format(dtype, (16, 1), "float8_e4m3fn", True) for dtype in DTYPES
}
FORMATS = PRESETS | VARIANTS | TWO_LEVELS


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(x, format, rounding="nearest", key=0):
  return eco.quantize(x, format, where=lambda path, leaf: True, rounding=rounding, key=key)


def codes_of(packed):
  return np.asarray(packed.codes.astype(jnp.float32))


def normal(shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("granularity", ["tensor", "channel", (4, 1), (4, 2), (8,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_the_formula(dtype, granularity):
  x = normal((3, 8, 16)) * np.array([1e-3, 1.0, 1e4], np.float32)[:, None, None]
  packed = quantize(jnp.asarray(x), eco.Format(dtype, granularity))
  wanted = oracle.quantize(x, dtype, granularity)
  np.testing.assert_array_equal(codes_of(packed), wanted.codes)
  np.testing.assert_array_equal(np.asarray(packed.dequantize(), np.float64), wanted.stored)
  groups = {"tensor": (3, 1, 1), "channel": (3, 1, 16)}
  shape = groups.get(granularity)
  if shape is None:
    block = (1,) * (3 - len(granularity)) + granularity
    shape = tuple(n // b for n, b in zip(x.shape, block, strict=True))
  assert packed.scale.shape == shape
  assert packed.scale.dtype == jnp.float32


@pytest.mark.parametrize("axis", [-1, -2, -3, (-3, -2), (-2, -1)])
def test_the_contraction_axis_can_be_chosen(axis):
  """An attention kernel (in, heads, head_dim) contracts over −3, one (heads, head_dim, out) over
  −3 and −2.
  """
  x = normal((4, 6, 8))
  packed = quantize(jnp.asarray(x), eco.Format("float8_e4m3fn", contraction_axis=axis))
  scale = np.max(np.abs(x), axis=axis, keepdims=True) / np.float32(448)
  np.testing.assert_array_equal(np.asarray(packed.scale), scale)
  np.testing.assert_array_equal(codes_of(packed), oracle.nearest(x / scale, "float8_e4m3fn"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_of_two_scale_is_the_smallest_that_does_not_overflow(dtype):
  top = oracle.TABLES[dtype][-1]
  step = top - oracle.TABLES[dtype][-2]
  # Largest magnitudes around the changes: at top and at top + step / 2 times a power of two.
  edges = [top * f for f in (0.501, 0.999, 1, 1.001)] + [top + step * f for f in (0.49, 0.51)]
  largest = np.array([e * 2.0**k for e in edges for k in (-20, 0, 9)], np.float32)
  x = np.stack([largest, largest / 3, -largest / 7])
  packed = quantize(jnp.asarray(x), eco.Format(dtype, power_of_two=True))
  # By search: nearest rounding without saturation passes the top code from top + step / 2 on.
  candidates = 2.0 ** np.arange(-60, 60)
  wanted = np.array([candidates[m / candidates < top + step / 2].min() for m in largest])
  np.testing.assert_array_equal(np.asarray(packed.scale)[0], wanted)
  np.testing.assert_array_equal(codes_of(packed), oracle.nearest(x / wanted, dtype))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_levels_of_powers_of_two_store_what_one_does(dtype, rounding):
  """Where magnitudes of blocks are within 2^13 of each other, which is E4M3's range of powers."""
  x = jnp.asarray(normal((64, 96)) * np.exp(2 * normal((64, 96), 1)))
  two, one = (
    quantize(x, eco.Format(dtype, (16, 1), scale_dtype, True), rounding)
    for scale_dtype in ("float8_e4m3fn", "float32")
  )
  np.testing.assert_array_equal(np.asarray(two.float_scale()), np.asarray(one.scale))
  np.testing.assert_array_equal(codes_of(two), codes_of(one))
  assert np.frexp(two.tensor_scale)[0] == 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_survives_fifty_requantizations(name):
  """Groups that hold every code, behind scales of full mantissa; then 50 round trips."""
  format = FORMATS[name]
  table = oracle.TABLES[format.dtype.name]
  values = np.concatenate([-table[:0:-1], table])
  # 256 values to a column, each block of 128, 32, 16 or 8 holding its own largest code.
  column = np.resize(values, 256 - 256 // 8)
  column = np.concatenate(
    [np.r_[table[-1], part] for part in np.array_split(column, 256 // 8)]
  ).astype(np.float32)
  generator = np.random.default_rng(5)
  size = 128
  column = np.stack([generator.permuted(column.reshape(-1, 8), axis=0).ravel()] * size, axis=1)
  scales = generator.uniform(1, 2, size) * 2.0 ** generator.integers(-30, 30, size)
  if format.granularity not in ("channel", (16, 1), (32, 1)):  # One scale for many columns.
    scales[:] = scales[0]
  x = (column * scales.astype(np.float32)).astype(np.float32)
  first = quantize(jnp.asarray(x), format)

  def again(packed, _):
    return eco.quantize(packed.dequantize(), format), None

  last, _ = jax.jit(lambda packed: jax.lax.scan(again, packed, None, length=50))(first)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  if format.scale_dtype == np.float32 and not format.power_of_two:
    np.testing.assert_array_equal(codes_of(first), column)  # The codes that went in.
  np.testing.assert_array_equal(
    np.asarray(eco.quantize(first, format).dequantize()), np.asarray(first.dequantize())
  )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_values_do_not_move_under_requantization(name, rounding):
  """Ordinary weights rounded to nearest: requantizing them, dithered or not, changes nothing."""
  format = FORMATS[name]
  first = quantize(jnp.asarray(normal((128, 128))), format)
  values = np.asarray(first.dequantize())
  packed = first
  for key in range(3):
    packed = quantize(packed.dequantize(), format, rounding, key)
    np.testing.assert_array_equal(np.asarray(packed.dequantize()), values)


STORED_STOCHASTICALLY = ["FP8", "FP8_E5M2", "INT8", "INT4", "FP8_BLOCK128", "MXFP8", "MXFP4"]


@pytest.mark.parametrize("name", STORED_STOCHASTICALLY)
def test_what_stochastic_rounding_stored_does_not_move_either(name):
  """Whatever the dither did to a group's largest weight, its stored values are a grid."""
  format = FORMATS[name]
  first = quantize(jnp.asarray(normal((128, 128), 1)), format, "stochastic", 7)
  values = np.asarray(first.dequantize())
  for rounding, key in (("nearest", 0), ("stochastic", 1), ("stochastic", 2)):
    packed = quantize(jnp.asarray(values), format, rounding, key)
    np.testing.assert_array_equal(np.asarray(packed.dequantize()), values)


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_quantization_is_unbiased_in_value(name):
  """Sums over 1,024 draws of all weights, and of each group's largest, within 5 deviations of x.

  The deviation is estimated from the draws, which are so many because a scale that is rounded up
  leaves a largest weight below its code with a chance of half a percent. The sum of errors times
  sign shows weights that shrink.
  """
  format = FORMATS[name]
  x = normal((128, 128), 2)
  draws = 1024
  one = lambda key: eco.quantize(
    jnp.asarray(x), format, rounding="stochastic", key=key
  ).dequantize()

  def add(key, sums):
    error = one(key) - jnp.asarray(x)
    return sums[0] + error, sums[1] + error**2

  zero = jnp.zeros(x.shape, jnp.float32)
  sums = jax.jit(lambda: jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(draws), add, (zero, zero)))()
  error, square = (np.asarray(s, np.float64) for s in sums)
  largest = np.abs(x) >= oracle.group_max(x, format.granularity)
  for chosen in (np.ones(x.shape, bool), largest):
    drift = abs(np.sum((error * np.sign(x))[chosen]))
    # Where nothing is drawn (a largest weight stays the largest code) only float32 is left.
    float32 = draws * np.sqrt(np.sum(x[chosen] ** 2)) * 2.0**-23
    assert drift < 5 * np.sqrt(np.sum(square[chosen])) + float32


EDGES = {
  "zeros": np.zeros((128, 128), np.float32),
  "negative zeros": -np.zeros((128, 128), np.float32),
  "a zero row and column": np.pad(normal((127, 127)), ((0, 1), (1, 0))),
  "one spike": np.pad(np.full((1, 1), 3.7, np.float32), ((0, 127), (0, 127))),
  "1e-37": np.full((128, 128), 1e-37, np.float32),
  "subnormal": np.full((128, 128), 1e-38, np.float32),
  "smallest subnormal": np.full((128, 128), 1e-45, np.float32),
  "largest": np.full((128, 128), np.finfo(np.float32).max, np.float32),
  "minus largest": np.full((128, 128), -np.finfo(np.float32).max, np.float32),
  "all magnitudes": np.logspace(-44, 38, 128 * 128).astype(np.float32).reshape(128, 128),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", [*PRESETS, "float4_e2m1fn-two levels"])
def test_extreme_values_come_back_finite_and_right(name, edge, rounding):
  format, x = FORMATS[name], EDGES[edge]
  value = np.asarray(quantize(jnp.asarray(x), format, rounding).dequantize(), np.float64)
  assert np.all(np.isfinite(value))
  x = x.astype(np.float64)
  largest = oracle.group_max(x, format.granularity)
  table = oracle.TABLES[format.dtype.name]
  top, lowest = table[-1], table[1]
  # A weight is off by a gap of the grid at most: that at the group's top, or its own, which is
  # wider relative to the weight where a tiny group cannot reach the top of the grid. Powers of two
  # double it. NVFP4 adds the rounding of its E4M3 block scales, 1/16.
  gap = np.maximum(largest * np.max(np.diff(table)) / top, np.abs(x) / 2)
  gap = gap * (2 if format.power_of_two else 1)
  gap += largest / 16 * (format.two_level and not format.power_of_two)
  # Scales stay above 2^-126, and NVFP4's block scales above 2^-6/448 of the matrix's largest, or of
  # 2^-6/2^7 and up to twice as much among powers of two: the grid's lowest step is lost there.
  # Subnormal results are flushed on CPU.
  floor = np.maximum(lowest * 2.0**-126, 2.0**-126)
  if format.two_level:
    most = 64 if format.power_of_two else 448
    floor = top * np.maximum(floor, np.abs(x).max() / top * 2.0**-6 / most)
  assert np.all(np.abs(value - x) <= np.maximum(gap * (1 + 1e-6), floor))
  np.testing.assert_array_equal(value[x == 0], 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_elements_are_stored_exactly(dtype, shape):
  """A group of one holds the largest code alone: x comes back, to the rounding of its scale."""
  x = normal(shape) * 1e3
  for granularity in ("channel", (1, 1)):
    if granularity == "channel" and shape[-2] > 1:
      continue
    value = np.asarray(quantize(jnp.asarray(x), eco.Format(dtype, granularity)).dequantize())
    np.testing.assert_allclose(value, x, rtol=2**-23)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("name", PRESETS)
def test_what_is_not_finite_stays_visible(name, bad, rounding):
  format = FORMATS[name]
  x = normal((128, 128))
  x[5, 7] = bad
  packed = quantize(jnp.asarray(x), format, rounding)
  value = np.asarray(packed.dequantize())
  bf16 = np.asarray(packed.dequantize(jnp.bfloat16)).astype(np.float32)
  assert np.isnan(value[5, 7])
  assert np.isnan(bf16[5, 7])
  # And only there: other groups keep their values.
  if format.granularity == "channel":
    assert np.all(np.isfinite(np.delete(value, 7, axis=1)))
  elif not format.two_level and isinstance(format.granularity, tuple):
    block = format.granularity
    elsewhere = np.ones(x.shape, bool)
    r, c = 5 // block[0] * block[0], 7 // block[1] * block[1]
    elsewhere[r : r + block[0], c : c + block[1]] = False
    assert np.all(np.isfinite(value[elsewhere]))
  # It stays NaN when it is quantized again.
  again = quantize(packed.dequantize(), format, rounding)
  assert np.isnan(np.asarray(again.dequantize())[5, 7])


@pytest.mark.parametrize(
  ("name", "shape", "nbytes"),
  [
    ("FP8", (128, 64), 128 * 64 + 64 * 4),
    ("INT8", (128, 64), 128 * 64 + 64 * 4),
    ("INT4", (128, 64), 128 * 64 // 2 + 4),
    ("INT4", (3, 5, 7), 3 * 3 * 7 + 3 * 4),  # An odd axis ends in half a byte.
    ("MXFP8", (128, 64), 128 * 64 + 4 * 64),
    ("MXFP4", (128, 64), 128 * 64 // 2 + 4 * 64),
    ("NVFP4", (128, 64), 128 * 64 // 2 + 8 * 64 + 4),
    ("FP8_BLOCK128", (256, 128), 256 * 128 + 2 * 4),
  ],
)
def test_storage_is_as_small_as_it_says(name, shape, nbytes):
  packed = quantize(jnp.asarray(normal(shape)), PRESETS[name])
  assert packed.nbytes == nbytes
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(packed)) == nbytes
  assert packed.shape == shape
  assert packed.ndim == len(shape)
  assert packed.size == np.prod(shape)
  assert packed.dequantize().shape == shape
  assert packed.codes.dtype == PRESETS[name].dtype
  if PRESETS[name].bits == 4:
    assert packed.qvalue.dtype == jnp.uint8


@pytest.mark.parametrize("dtype", ["int4", "float4_e2m1fn"])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (1, 1), (1, 4), (5, 3), (2, 3, 4, 1)])
def test_packing_takes_any_length(dtype, shape):
  x = normal(shape)
  packed = quantize(jnp.asarray(x), eco.Format(dtype, "tensor"))
  wanted = oracle.quantize(x, dtype, "tensor")
  assert packed.shape == shape
  assert packed.qvalue.size <= (np.prod(shape) + shape[-1 if len(shape) < 2 else -2]) // 2 + x.size
  np.testing.assert_array_equal(codes_of(packed), wanted.codes)


@pytest.mark.parametrize(("name", "rounding"), [("FP8", "stochastic"), ("NVFP4", "nearest")])
def test_one_program_gives_the_bits_of_its_operations_one_by_one(name, rounding):
  x = jnp.asarray(normal((2, 32, 16)) * np.geomspace(1e-6, 1e6, 16, dtype=np.float32))
  make = lambda: eco.quantize(x, PRESETS[name], rounding=rounding, key=5)
  found, values = make(), make().dequantize()
  with jax.disable_jit():
    wanted, wanted_values = make(), make().dequantize()
  for a, b in zip(
    jax.tree.leaves((found, values)), jax.tree.leaves((wanted, wanted_values)), strict=True
  ):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", ["FP8", "INT4", "NVFP4", "MXFP4"])
def test_layers_of_a_stack_stand_alone(name):
  """scan, vmap and slicing over leading axes; the matrices of a stack share nothing."""
  format = PRESETS[name]
  x = jnp.asarray(normal((2, 3, 32, 8)))
  stack = quantize(x, format)
  dense = np.asarray(stack.dequantize())
  for i, j in np.ndindex(2, 3):
    alone = np.asarray(quantize(x[i, j], format).dequantize())
    np.testing.assert_array_equal(alone, dense[i, j])
    part = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], stack)
    assert part.shape == (32, 8)
    np.testing.assert_array_equal(np.asarray(part.dequantize()), dense[i, j])
  _, scanned = jax.lax.scan(lambda c, layer: (c, layer.dequantize()), None, stack)
  np.testing.assert_array_equal(np.asarray(scanned), dense)
  mapped = jax.vmap(jax.vmap(lambda layer: layer.dequantize()))(stack)
  np.testing.assert_array_equal(np.asarray(mapped), dense)
  made = jax.vmap(jax.vmap(lambda m: eco.quantize(m, format)))(x)
  for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(stack), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", PRESETS)
def test_compiled_and_interpreted_agree(name):
  format, x = PRESETS[name], jnp.asarray(normal((128, 128), 3))
  eager = eco.quantize(x, format)
  for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(quantize(x, format)), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  dense = jax.jit(lambda packed: packed.dequantize())(eager)
  np.testing.assert_array_equal(np.asarray(dense), np.asarray(eager.dequantize()))


@pytest.mark.parametrize("name", ["FP8", "INT4", "MXFP8", "NVFP4"])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P(None, "y", "x")], ids=str)
def test_sharded_arrays_get_the_same_codes(name, spec):
  format = PRESETS[name]
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
  x = jnp.asarray(normal((4, 64, 32)))
  wanted = quantize(x, format)
  found = quantize(jax.device_put(x, NamedSharding(mesh, spec)), format)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  dense = jax.jit(lambda packed: packed.dequantize())(found)
  np.testing.assert_array_equal(np.asarray(dense), np.asarray(wanted.dequantize()))


def test_it_is_a_frozen_pytree_with_a_static_format():
  packed = quantize(jnp.asarray(normal((5, 4))), eco.INT4)
  with pytest.raises(dataclasses.FrozenInstanceError):
    packed.scale = None
  leaves, treedef = jax.tree.flatten(packed)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  back = jax.tree.unflatten(treedef, leaves)
  assert back.format is packed.format
  assert back.shape == (5, 4)
  shapes = jax.eval_shape(lambda p: p, packed)
  assert shapes.shape == (5, 4)
  assert jax.tree.map(lambda a: a, packed).odd


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_any_float_goes_in_and_out(dtype):
  x = jnp.asarray(normal((8, 8))).astype(dtype)
  packed = eco.quantize(x, eco.FP8)
  wanted = oracle.quantize(np.asarray(x).astype(np.float64), "float8_e4m3fn", "channel")
  np.testing.assert_array_equal(codes_of(packed), wanted.codes)
  out = packed.dequantize(dtype)
  assert out.dtype == dtype
  np.testing.assert_array_equal(np.asarray(out), wanted.stored.astype(np.float32).astype(dtype))


def test_power_of_two_scales_are_exact_in_bfloat16():
  packed = quantize(jnp.asarray(normal((64, 8))), eco.MXFP8)
  np.testing.assert_array_equal(
    np.asarray(packed.dequantize(jnp.bfloat16)).astype(np.float32), np.asarray(packed.dequantize())
  )


class TestTrees:
  """`quantize` and `dequantize` on trees."""

  def tree(self):
    return {
      "layers": [{"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}],
      "table": jnp.ones((4, 4), jnp.bfloat16),
      "count": jnp.ones((2, 2), jnp.int32),
      "none": None,
    }

  def test_by_default_floats_with_two_axes(self):
    packed = eco.quantize(self.tree(), eco.FP8)
    assert isinstance(packed["layers"][0]["kernel"], eco.QuantizedArray)
    assert isinstance(packed["table"], eco.QuantizedArray)
    assert packed["layers"][0]["bias"].dtype == jnp.float32
    assert packed["count"].dtype == jnp.int32
    assert packed["none"] is None

  def test_where_sees_joined_paths_and_leaves(self):
    seen = {}
    eco.quantize(self.tree(), eco.FP8, where=lambda path, leaf: seen.update({path: leaf.shape}))
    assert seen == {
      "layers/0/kernel": (4, 4),
      "layers/0/bias": (4,),
      "table": (4, 4),
      "count": (2, 2),
    }

  def test_where_chooses(self):
    where = lambda path, leaf: "kernel" in path and leaf.ndim >= 2
    packed = eco.quantize(self.tree(), eco.FP8, where)
    assert isinstance(packed["layers"][0]["kernel"], eco.QuantizedArray)
    assert packed["table"].dtype == jnp.bfloat16

  def test_dequantize_leaves_other_leaves_alone(self):
    tree = self.tree()
    dense = eco.dequantize(eco.quantize(tree, eco.FP8), jnp.bfloat16)
    assert dense["layers"][0]["kernel"].dtype == jnp.bfloat16
    assert dense["layers"][0]["bias"].dtype == jnp.float32
    assert jax.tree.structure(dense) == jax.tree.structure(tree)

  def test_packed_leaves_are_quantized_again(self):
    packed = eco.quantize(self.tree(), eco.FP8)
    again = eco.quantize(packed, eco.FP8)
    assert jax.tree.structure(packed) == jax.tree.structure(again)
    other = eco.quantize(packed, eco.INT8)
    assert other["table"].format == eco.INT8

  @pytest.mark.parametrize("key", ["typed", "raw", "int", "numpy"])
  def test_stochastic_takes_any_key(self, key):
    x = jnp.asarray(normal((8, 8)))
    make = {
      "typed": jax.random.key,
      "raw": jax.random.PRNGKey,
      "int": int,
      "numpy": np.int64,
    }[key]
    draw = lambda seed: codes_of(eco.quantize(x, eco.INT4, rounding="stochastic", key=make(seed)))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1))

  @pytest.mark.parametrize(
    ("kwargs", "message"),
    [
      (dict(format="fp8"), "fp8"),
      (dict(format=eco.FP8, rounding="up"), "up"),
      (dict(format=eco.FP8, rounding="stochastic"), "key"),
      (dict(format=eco.FP8, where=lambda path, leaf: path == "count"), "count.*int32"),
      (dict(format=eco.FP8, where=lambda path, leaf: path.endswith("bias")), "0/bias"),
    ],
    ids=lambda value: str(value)[:20],
  )
  def test_errors_name_the_leaf_or_the_value(self, kwargs, message):
    with pytest.raises(ValueError, match=message):
      eco.quantize(self.tree(), **kwargs)


def test_orbax_round_trip(tmp_path):
  """A tree of every storage dtype, into fresh arrays of the same structure."""
  x = jnp.asarray(normal((33, 5)))
  tree = {
    "fp8": quantize(x, eco.FP8),
    "e5m2": quantize(x, eco.FP8_E5M2),
    "int4": quantize(x, eco.INT4),
    "int8": quantize(x, eco.INT8),
    "nvfp4": quantize(x[:32], eco.NVFP4),
    "mxfp8": quantize(x[:32], eco.MXFP8),
    "bias": jnp.ones(5),
  }
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(0, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    empty = jax.tree.map(jnp.zeros_like, tree)
    restored = manager.restore(0, args=ocp.args.StandardRestore(empty))
  assert jax.tree.structure(restored) == jax.tree.structure(tree)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_nvfp4_has_two_levels():
  """Block scales are E4M3 codes of one float32 per matrix, so that the largest of them is 448."""
  x = normal((64, 8)) * np.exp(normal((1, 8), 4))
  packed = quantize(jnp.asarray(x), eco.NVFP4)
  assert packed.scale.dtype == ml_dtypes.float8_e4m3fn
  assert packed.scale.shape == (4, 8)
  assert packed.tensor_scale.shape == (1, 1)
  tensor_scale = np.abs(x).max() / np.float32(6 * 448)
  np.testing.assert_array_equal(np.asarray(packed.tensor_scale), [[tensor_scale]])
  largest = np.abs(x.reshape(4, 16, 8)).max(axis=1) / np.float32(6) / tensor_scale
  wanted = largest.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
  np.testing.assert_array_equal(np.asarray(packed.scale).astype(np.float32), wanted)


PACKED = eco.quantize(jnp.asarray(normal((6, 4))), eco.INT4)
STORED = np.asarray(eco.dequantize(PACKED))


def test_values_are_read_as_an_arrays():
  """By trainers, loggers and filters that ask a leaf for its dtype, its length or some elements."""
  assert PACKED.dtype == eco.dequantize(PACKED).dtype
  assert jnp.zeros_like(PACKED).dtype == jax.ShapeDtypeStruct(PACKED.shape, PACKED.dtype).dtype
  assert len(PACKED) == 6
  for index in (1, slice(2, None), (slice(None), 3), jnp.array([[0, 5], [2, 2]]), (..., None)):
    np.testing.assert_array_equal(PACKED[index], STORED[index])
  np.testing.assert_array_equal(np.stack(list(PACKED)), STORED)
  np.testing.assert_array_equal(np.asarray(PACKED), STORED)
  assert np.asarray(PACKED, np.float64).dtype == np.float64
  np.testing.assert_array_equal(PACKED.astype(jnp.bfloat16), PACKED.dequantize(jnp.bfloat16))
  with pytest.raises(ValueError, match="no view of memory"):
    np.asarray(PACKED, copy=False)


ARITHMETIC = {
  "==": lambda q, x: q == q,
  "== a number": lambda q, x: q == 0,
  "!=": lambda q, x: q != x,
  "<": lambda q, x: q < x,
  "-q": lambda q, x: -q,
  "abs": lambda q, x: abs(q),
  "+": lambda q, x: q + x,
  "number *": lambda q, x: 2 * q,
  "array @": lambda q, x: x.T @ q,
  "@": lambda q, x: q @ x.T,
  "sum": lambda q, x: jnp.sum(q),
  "dot": lambda q, x: jnp.dot(x.T, q),
  "einsum": lambda q, x: jnp.einsum("io,io->o", x, q),
  "take": lambda q, x: jnp.take(q, 0, axis=0),
  "where": lambda q, x: jnp.where(True, q, x),
  "stack": lambda q, x: jnp.stack([q, q]),
  "asarray": lambda q, x: jnp.asarray(q),
  "array": lambda q, x: jnp.array(q),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_refused_with_the_remedy(name):
  fn = ARITHMETIC[name]
  fn(eco.dequantize(PACKED), jnp.ones((6, 4)))
  for call in (fn, jax.jit(fn)):
    with pytest.raises(TypeError, match=r"compute with eco_optax\.dequantize"):
      call(PACKED, jnp.ones((6, 4)))


def test_attributes_of_arrays_are_refused_with_the_remedy():
  for name in ("T", "at", "reshape", "sum"):
    with pytest.raises(AttributeError, match=f"no attribute '{name}': .*eco_optax.dequantize"):
      getattr(PACKED, name)
  assert not hasattr(PACKED, "at")
  with pytest.raises((AttributeError, TypeError)):
    PACKED[0] = 1.0
  restored = pickle.loads(pickle.dumps(PACKED))
  np.testing.assert_array_equal(np.asarray(copy.deepcopy(restored)), STORED)


def test_trees_that_hold_no_arrays_are_compared():
  """Such as shardings and masks in the structure of packed parameters."""
  shapes = lambda: jax.tree.map(lambda x: str(x.shape), {"w": PACKED, "b": STORED})
  assert shapes() == shapes()
  assert shapes() != jax.tree.map(lambda x: str(x.shape), {"w": PACKED.dequantize(), "b": STORED})
  assert shapes()["w"] != jax.tree.map(lambda x: x.dtype, PACKED)


@pytest.mark.parametrize(
  "read", [lambda w: w[1:], lambda w: w.astype(jnp.float32)[1:], lambda w: eco.dequantize(w)[1:]]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_that_are_read_have_a_gradient(read, dtype):
  """Also beside codes that are multiplied, in the leaf's one gradient."""
  x = jnp.asarray(normal((2, 6)))

  def loss(w):
    return jnp.sum(jnp.sin(read(w))) + jnp.sum(eco.matmul(x, w) ** 2)

  gradient = eco.value_and_grad(loss, dense=False, gradient_dtype=dtype)(PACKED)[1]
  wanted = jax.grad(loss)(PACKED.dequantize())
  assert gradient.dtype == dtype
  np.testing.assert_allclose(gradient, wanted, rtol=2e-5 if dtype == jnp.float32 else 2e-2)
