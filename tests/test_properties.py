"""Properties over shapes, formats and magnitudes, searched by hypothesis."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import eco_optax as eco
from eco_optax import rounding

# Some draws have as many scales as codes, which is warned of.
pytestmark = pytest.mark.filterwarnings(
  "ignore:leaf .* bytes per weight", "ignore:the array .* bytes per weight"
)

# Fixed examples (derandomize), so that a failure is the same everywhere; no deadline, because the
# first example of a shape compiles.
fast = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)

DTYPES = sorted(oracle.TABLES)
SCALES = [("float32", False), ("float32", True), ("bfloat16", False), ("float8_e8m0fnu", True)]
# Few sizes, so that few programs are compiled.
SIZES = st.sampled_from([1, 2, 3, 6])


@st.composite
def tensors(draw):
  """A tensor of one to four axes, a format that fits it, with magnitudes from 1e-30 to 1e30."""
  shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
  granularities = ["tensor", (shape[-1],), (1,)]
  if len(shape) >= 2:
    granularities += ["channel", (shape[-2], 1), (1, shape[-1]), shape[-2:]]
  format = eco.Format(
    draw(st.sampled_from(DTYPES)),
    draw(st.sampled_from(granularities)),
    *draw(st.sampled_from(SCALES)),
  )
  generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  x = generator.standard_normal(shape) * 10.0 ** draw(st.integers(-30, 30))
  x *= 10.0 ** (draw(st.sampled_from([0, 1, 4])) * generator.standard_normal(shape))
  x[generator.uniform(size=shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0
  return np.clip(x, -1e37, 1e37).astype(np.float32), format


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(x, format, rounding="nearest", key=0):
  packed = eco.quantize(x, format, where=lambda path, leaf: True, rounding=rounding, key=key)
  return packed, packed.codes.astype(jnp.float32), packed.dequantize()


@fast
@hypothesis.given(tensors())
def test_nearest_is_as_near_as_the_grid_allows(case):
  """On the grid of its own scale no value would be nearer, to a float32 rounding."""
  x, format = case
  packed, codes, value = quantize(x, format)
  assert packed.shape == x.shape
  codes, value = np.asarray(codes, np.float64), np.asarray(value, np.float64)
  assert np.all(np.isin(np.abs(codes), oracle.TABLES[format.dtype.name]))
  assert np.all(np.isfinite(value))
  scale = value / np.where(codes == 0, 1, codes)
  shown = codes != 0
  best = oracle.nearest(x[shown] / scale[shown], format.dtype.name)
  gap = np.abs(best * scale[shown] - x[shown])
  np.testing.assert_array_less(np.abs(value - x)[shown], gap + 2.0**-22 * np.abs(x[shown]) + 1e-44)
  # Zeros stay zeros, and signs stay signs.
  np.testing.assert_array_equal(value[x == 0], 0)
  assert np.all(value * np.sign(x) >= 0)


@fast
@hypothesis.given(tensors(), st.sampled_from(["nearest", "stochastic"]), st.integers(0, 2**31))
def test_requantizing_changes_nothing(case, how, key):
  x, format = case
  first, _, value = quantize(x, format)
  again, _, same = quantize(value, format, how, key)
  np.testing.assert_array_equal(np.asarray(same), np.asarray(value))
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
    assert a.shape == b.shape
    assert a.dtype == b.dtype


@fast
@hypothesis.given(tensors(), st.integers(0, 2**31))
def test_stochastic_rounds_to_one_of_two_neighbours(case, key):
  """Never further than the gap of the grid around x / scale; always finite."""
  x, format = case
  _, codes, value = quantize(x, format, "stochastic", key)
  codes, value = np.asarray(codes, np.float64), np.asarray(value, np.float64)
  assert np.all(np.isfinite(value))
  shown = codes != 0
  scale = value[shown] / codes[shown]
  y = x[shown].astype(np.float64) / scale
  table = oracle.TABLES[format.dtype.name]
  low, high = oracle.neighbours(y * (1 + 2.0**-20), format.dtype.name)
  below, _ = oracle.neighbours(y * (1 - 2.0**-20), format.dtype.name)
  magnitude = np.abs(codes[shown])
  assert np.all(
    (magnitude == table[low]) | (magnitude == table[high]) | (magnitude == table[below])
  )


@fast
@hypothesis.given(
  st.sampled_from(DTYPES),
  st.lists(st.floats(-70000, 70000, width=32), min_size=8, max_size=8),
  st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
)
def test_rounding_any_value_with_any_bits(dtype, values, bits):
  """One of the two neighbours, and the same as nearest where there is only one."""
  y = np.array(values, np.float32)
  dtype_ = eco.Format(dtype).dtype
  drawn = rounding.round_to_codes(jnp.asarray(y), dtype_, jnp.asarray(np.array(bits, np.uint32)))
  near = rounding.round_to_codes(jnp.asarray(y), dtype_)
  drawn, near = (np.asarray(c.astype(jnp.float32), np.float64) for c in (drawn, near))
  np.testing.assert_array_equal(near, oracle.nearest(y, dtype))
  table = oracle.TABLES[dtype]
  low, high = oracle.neighbours(y, dtype)
  assert np.all((np.abs(drawn) == table[low]) | (np.abs(drawn) == table[high]))
  on_grid = np.isin(np.minimum(np.abs(y), table[-1]), table)
  np.testing.assert_array_equal(drawn[on_grid], near[on_grid])


@fast
@hypothesis.given(
  st.lists(SIZES, min_size=1, max_size=4), st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1)
)
def test_bits_are_a_function_of_seed_step_path_and_index(shape, seed, step):
  shape = tuple(shape)
  draw = lambda path: np.asarray(
    rounding.counter_bits(rounding.stream_key(seed, jnp.int32(step), path), shape)
  )
  np.testing.assert_array_equal(draw("a/b"), draw("a/b"))
  if math.prod(shape) >= 4:  # A chance of 2^-128 that they agree.
    assert np.any(draw("a/b") != draw("a/c"))


@hypothesis.settings(fast, max_examples=8)
@hypothesis.given(
  st.sampled_from([eco.FP8, eco.INT4, eco.Format("int8", (3, 1)), eco.Format("float8_e5m2")]),
  st.integers(-12, 12),
  st.sampled_from(["nearest", "stochastic"]),
  st.integers(0, 2**31),
)
def test_the_virtual_sequence_at_any_magnitude(format, exponent, how, seed):
  """Weights and gradients of any size: θ̂ − (ηβ/(1−β)) m moves by −η g / (1−β) at each step."""
  rate, beta = 0.05, 0.8
  generator = np.random.default_rng(seed)
  unit = 10.0**exponent
  draw = lambda: jnp.asarray(generator.standard_normal((6, 3)) * unit, jnp.float32)
  params = {"w": draw()}
  params = eco.quantize(params, format)
  tx = eco.sgd(rate, beta, rounding=how, seed=seed)
  state = tx.init(params)
  virtual = lambda p, s: (
    np.asarray(p["w"].dequantize(), np.float64)
    - rate * beta / (1 - beta) * np.asarray(s.inner[0].trace["w"], np.float64)
  )
  for _ in range(4):
    grads = {"w": draw()}
    before = virtual(params, state)
    updates, state = tx.update(grads, state, params)
    params = eco.apply_updates(params, updates)
    moved = virtual(params, state) - before
    wanted = -rate / (1 - beta) * np.asarray(grads["w"], np.float64)
    # Roundings of a weight, of its momentum and of their sum: some 2^-24 of the largest of them.
    np.testing.assert_allclose(moved, wanted, rtol=0, atol=40 * 2.0**-24 * unit)


@hypothesis.settings(fast, max_examples=8)
@hypothesis.given(
  st.sampled_from([eco.FP8, eco.INT4, eco.MXFP8, eco.FP8_E5M2]),
  st.integers(-12, 12),
  st.integers(0, 2**31),
)
def test_master_weights_sum_to_the_float_run(format, exponent, seed):
  """Stored weight plus residual is the float32 weight that the plain optimizer would hold."""
  generator = np.random.default_rng(seed)
  unit = 10.0**exponent
  draw = lambda: jnp.asarray(generator.standard_normal((32, 2)) * unit, jnp.float32)
  params = eco.quantize({"w": draw()}, format)
  dense = eco.dequantize(params)
  plain = optax.sgd(0.05, 0.8)
  tx = eco.master_weights(plain, eco.quantize_params(seed=seed))
  state, plain_state = tx.init(params), plain.init(dense)
  for _ in range(4):
    grads = {"w": draw()}
    updates, state = tx.update(grads, state, params)
    params = eco.apply_updates(params, updates)
    updates, plain_state = plain.update(grads, plain_state, dense)
    dense = optax.apply_updates(dense, updates)
  total = np.asarray(params["w"].dequantize() + state.residual["w"])
  np.testing.assert_allclose(total, np.asarray(dense["w"]), rtol=0, atol=20 * 2.0**-24 * unit)
