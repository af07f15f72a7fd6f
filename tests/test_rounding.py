"""Rounding onto a grid: nearest is the cast, stochastic is exact and unbiased."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from eco_optax import rounding

FLOATS = ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
INTEGERS = ["int8", "int4"]
ALL = FLOATS + INTEGERS


def kind(dtype):
  return np.dtype(getattr(ml_dtypes, dtype, dtype))


@functools.partial(jax.jit, static_argnums=(1,))
def _round(y, dtype, bits=None):
  return rounding.round_to_codes(y, kind(dtype), bits).astype(jnp.float32)


def round_values(y, dtype, bits=None):
  """Values of the codes as float64."""
  bits = None if bits is None else jnp.asarray(bits)
  return np.asarray(_round(jnp.asarray(y, jnp.float32), dtype, bits), np.float64)


def cast(y, dtype):
  """The reference: ml_dtypes' own cast; integers have one from whole numbers only."""
  if dtype in INTEGERS:
    return np.rint(y).astype(kind(dtype))
  return y.astype(kind(dtype))


def ties(dtype):
  """Every midpoint of two codes with its float32 neighbours, both signs."""
  table = oracle.TABLES[dtype]
  middle = ((table[1:] + table[:-1]) / 2).astype(np.float32)
  around = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
  y = np.concatenate([middle, *around])
  return np.concatenate([y, -y])


def dense_sweep(dtype):
  """All float32 sign, exponent and leading 11 mantissa bits, each with four tails, in range."""
  heads = np.arange(2**20, dtype=np.uint32) << np.uint32(12)
  tails = np.array([0x000, 0x001, 0x800, 0xFFF], np.uint32)
  y = (heads[:, None] | tails[None, :]).view(np.float32).ravel()
  return y[np.abs(y) <= oracle.TABLES[dtype][-1]]  # Drops NaN too.


@pytest.mark.parametrize("values", [dense_sweep, ties])
@pytest.mark.parametrize("dtype", ALL)
def test_nearest_is_the_cast_of_ml_dtypes(dtype, values):
  y = values(dtype)
  codes = np.asarray(rounding.round_to_codes(jnp.asarray(y), kind(dtype)))
  wanted = cast(y, dtype)
  assert codes.dtype == kind(dtype)
  if dtype in FLOATS:  # To the bit: the sign of zero too.
    codes, wanted = codes.view(np.uint8), wanted.view(np.uint8)
  np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize("dtype", ALL)
def test_nearest_is_the_search_in_the_table(dtype):
  generator = np.random.default_rng(0)
  top = oracle.TABLES[dtype][-1]
  y = np.concatenate(
    [
      generator.uniform(-1.5 * top, 1.5 * top, 20_000),
      generator.standard_normal(20_000) * 2.0 ** generator.integers(-20, 4, 20_000),
      ties(dtype),
    ]
  ).astype(np.float32)
  np.testing.assert_array_equal(round_values(y, dtype), oracle.nearest(y, dtype))


@pytest.mark.parametrize("bits", [None, 0, 0xFFFFFFFF])
@pytest.mark.parametrize("dtype", ALL)
def test_beyond_the_largest_code_it_saturates(dtype, bits):
  top = oracle.TABLES[dtype][-1]
  y = np.array([top, 1.01 * top, 1.5 * top, 1e10, np.finfo(np.float32).max, np.inf], np.float32)
  bits = None if bits is None else np.full(y.shape, bits, np.uint32)
  np.testing.assert_array_equal(round_values(y, dtype, bits), np.full(y.shape, top))
  np.testing.assert_array_equal(round_values(-y, dtype, bits), np.full(y.shape, -top))


def awkward_values(dtype):
  """Magnitudes where public kernels go wrong, in float32.

  Just above and below powers of two, in the subnormals and below the smallest, next to the largest
  code, and at random everywhere.
  """
  generator = np.random.default_rng(1)
  table = oracle.TABLES[dtype]
  top, smallest = table[-1], table[1]
  powers = 2.0 ** np.arange(np.floor(np.log2(smallest)) - 3, np.floor(np.log2(top)) + 1)
  inside = generator.uniform(0, 1, (len(table) - 1, 2))
  y = np.concatenate(
    [
      np.concatenate([powers * f for f in (1 - 2**-7, 1 + 2**-9, 1 + 2**-6, 1 + 2**-4.5)]),
      smallest * np.array([2**-12, 0.01, 0.3, 0.5, 0.9, 1.1, 1.5]),
      (table[:-1, None] + inside * np.diff(table)[:, None]).ravel(),
      [top * (1 - 2**-12)],
    ]
  )
  y = y[y < top].astype(np.float32)
  return np.concatenate([y, -y])


@pytest.mark.parametrize("dtype", ALL)
def test_stochastic_is_exact_over_an_even_sweep_of_the_bits(dtype):
  """No luck needed: over 2^14 evenly spaced draws the share rounded up is the exact fraction."""
  draws = 2**14
  y = awkward_values(dtype)
  low, high = oracle.neighbours(y, dtype)
  table = oracle.TABLES[dtype]
  fraction = (np.abs(y.astype(np.float64)) - table[low]) / (table[high] - table[low])
  bits = (np.arange(draws, dtype=np.uint32) * np.uint32(2**32 // draws))[:, None]
  codes = round_values(
    np.broadcast_to(y, (draws, y.size)), dtype, np.broadcast_to(bits, (draws, y.size))
  )
  magnitude = np.abs(codes)
  assert np.all((magnitude == table[low]) | (magnitude == table[high]))
  assert np.all((magnitude == 0) | (np.sign(codes) == np.sign(y)))
  # One draw of the even sweep, plus 2^-19 for the 21 significant bits that y itself is held to.
  share = np.mean(magnitude == table[high], axis=0)
  np.testing.assert_allclose(share, fraction, rtol=0, atol=1 / draws + 2**-19)


@pytest.mark.parametrize("dtype", ALL)
def test_stochastic_follows_the_bits_monotonically(dtype):
  """The smallest draw goes toward zero and the largest away from it, except for grid points."""
  y = awkward_values(dtype)
  low, high = oracle.neighbours(y, dtype)
  table = oracle.TABLES[dtype]
  high = np.where(np.abs(y) == table[low], low, high)
  ends = [np.full(y.shape, bits, np.uint32) for bits in (0, 0xFFFFFFFF)]
  np.testing.assert_array_equal(np.abs(round_values(y, dtype, ends[0])), table[low])
  np.testing.assert_array_equal(np.abs(round_values(y, dtype, ends[1])), table[high])


@pytest.mark.parametrize("exponent", [4, 8, 12, 16, 20])
@pytest.mark.parametrize("dtype", ALL)
def test_rare_steps_happen_as_often_as_they_should(dtype, exponent):
  """A value 2^-k of a step above zero moves for exactly the top 2^-k of the draws.

  This is the size of updates that nearest rounding loses, so the dither must resolve it.
  """
  smallest = oracle.TABLES[dtype][1]
  y = np.float32(smallest * 2.0**-exponent)
  threshold = np.uint32(2**32 - 2 ** (32 - exponent))
  bits = np.array([threshold - 1, threshold], np.uint32)
  np.testing.assert_array_equal(round_values(np.full(2, y), dtype, bits), [0, smallest])


@pytest.mark.parametrize("dtype", ALL)
def test_stochastic_is_unbiased_in_draws(dtype):
  """E[q(y)] = y with the library's own random bits.

  Each value's z-score is a standard normal if the mean is right: none of them beyond 5 (chance
  6e-7 each, under 1e-3 in all), and their sum of squares within 5 standard deviations of chi-square
  (mean n, variance 2n).
  """
  draws = 2**14
  y = awkward_values(dtype)
  y = y[: y.size // 2][:: max(1, y.size // 2 // 96)]
  low, high = oracle.neighbours(y, dtype)
  table = oracle.TABLES[dtype]
  fraction = (y.astype(np.float64) - table[low]) / (table[high] - table[low])
  keep = (fraction * draws > 50) & ((1 - fraction) * draws > 50)  # Where a normal law applies.
  y, low, high, fraction = y[keep], low[keep], high[keep], fraction[keep]
  bits = rounding.counter_bits(rounding.stream_key(3, 0, "w"), (draws, y.size))
  codes = round_values(np.broadcast_to(y, (draws, y.size)), dtype, bits)
  mean = np.mean((codes - table[low]) / (table[high] - table[low]), axis=0)
  z = (mean - fraction) / np.sqrt(fraction * (1 - fraction) / draws)
  assert y.size > 5
  assert np.max(np.abs(z)) < 5
  assert abs(np.sum(z**2) - z.size) < 5 * np.sqrt(2 * z.size)


@pytest.mark.parametrize("dtype", ALL)
def test_grid_points_never_move(dtype):
  table = oracle.TABLES[dtype]
  y = np.concatenate([table, -table]).astype(np.float32)
  generator = np.random.default_rng(2)
  bits = generator.integers(0, 2**32, (256, y.size), dtype=np.uint32)
  bits[0], bits[1] = 0, 0xFFFFFFFF
  codes = round_values(np.broadcast_to(y, bits.shape), dtype, bits)
  np.testing.assert_array_equal(codes, np.broadcast_to(y, bits.shape))


@pytest.mark.parametrize("dtype", ALL)
def test_grid_points_never_move_behind_an_odd_scale(dtype):
  """(code × scale) / scale in float32 is the code but for a few ulps, and must not be dithered."""
  table = oracle.TABLES[dtype].astype(np.float32)
  generator = np.random.default_rng(3)
  # Scales from 2^-100 to 2^100 with full mantissas: products of small codes stay normal.
  scale = (generator.uniform(1, 2, 2000) * 2.0 ** generator.integers(-100, 100, 2000)).astype(
    np.float32
  )
  y = ((table[None, :] * scale[:, None]) / scale[:, None]).astype(np.float32)
  for bits in (0, 0xFFFFFFFF, None):
    drawn = (
      np.full(y.shape, bits, np.uint32)
      if bits is not None
      else generator.integers(0, 2**32, y.shape, dtype=np.uint32)
    )
    np.testing.assert_array_equal(
      round_values(y, dtype, drawn), np.broadcast_to(table.astype(np.float64), y.shape)
    )


@pytest.mark.parametrize("dtype", ALL)
def test_grid_step_is_the_gap_to_the_next_code(dtype):
  table = oracle.TABLES[dtype]
  y = np.concatenate([table[:-1], (table[1:] + table[:-1]) / 2]).astype(np.float32)
  low, high = oracle.neighbours(y, dtype)
  steps = np.asarray(rounding.grid_step(jnp.asarray(y), kind(dtype)))
  np.testing.assert_array_equal(steps, table[high] - table[low])


def test_stochastic_cast_to_bfloat16_is_exact_over_the_bits():
  generator = np.random.default_rng(4)
  x = (generator.standard_normal(64) * 2.0 ** generator.integers(-30, 30, 64)).astype(np.float32)
  draws = 2**12
  bits = np.arange(draws, dtype=np.uint32) * np.uint32(2**32 // draws)
  cast_x = rounding.stochastic_cast(
    jnp.broadcast_to(x, (draws, x.size)),
    jnp.dtype("bfloat16"),
    jnp.broadcast_to(bits[:, None], (draws, x.size)),
  )
  assert cast_x.dtype == jnp.bfloat16
  values = np.asarray(cast_x).astype(np.float64)
  step = 2.0 ** (np.floor(np.log2(np.abs(x.astype(np.float64)))) - 7)
  low = np.floor(np.abs(x) / step) * step
  assert np.all((np.abs(values) == low) | (np.abs(values) == low + step))
  error = np.abs(values.mean(axis=0) - x.astype(np.float64)) / step
  assert np.max(error) <= 1 / draws + 2**-15  # One draw, and the 16 bits that are dropped.


def test_stochastic_cast_keeps_what_it_cannot_round():
  x = jnp.array([0.0, -0.0, 1.5, -3.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
  for bits in (0, 0xFFFFFFFF):
    drawn = jnp.full(x.shape, bits, jnp.uint32)
    for dtype in ("bfloat16", "float32"):
      cast_x = rounding.stochastic_cast(x, jnp.dtype(dtype), drawn)
      np.testing.assert_array_equal(np.asarray(cast_x).astype(np.float32), np.asarray(x))
