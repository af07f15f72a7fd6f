"""Compressors: what is on the wire, and the constants of what is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eco_optax import wire

CONTRACTIONS = {
  "sign": wire.sign(64),
  "fp8": wire.fp8(64),
  "int4": wire.int4(64),
  "int3": wire.integers(3, 64),
  "int2": wire.integers(2, 64),
  "top_k": wire.top_k(4, 64),
  "random_k": wire.random_k(8, 64),
}
UNBIASED = {
  "fp8": wire.fp8(64),
  "int4": wire.int4(64),
  "int3": wire.integers(3, 64, unbiased=True),
  "int2": wire.integers(2, 64, unbiased=True),
  "random_k": wire.random_k(8, 64, unbiased=True),
}
DRAWS = 4096


def inputs(block):
  """Rows to be lost: usual ones, and the worst that each compressor's bound is reached by."""
  generator = np.random.default_rng(0)
  rows = {"gaussian": generator.standard_normal(block), "heavy": generator.standard_cauchy(block)}
  rows["one"] = np.eye(block)[3]
  rows["equal"] = np.where(generator.random(block) < 0.5, -1.0, 1.0)
  rows["small beside one"] = np.where(np.arange(block) == 0, 1.0, 1e-2)
  for q in (1, 3, 7):
    share = 1 / (1 + np.sqrt(1 + (block - 1) / q**2))
    rows[f"worst of ±{q}"] = np.where(np.arange(block) == 0, q, share)
  # At the foot of a binade, where steps are largest beside a value: 2a(a + u)/(2a + u).
  rows["worst of E4M3"] = np.where(np.arange(block) == 0, 448.0, 32 * 2 * 8 * 9 / 17)
  return {name: row.astype(np.float32) for name, row in rows.items()}


@functools.cache
def roundtrip(compressor):
  return jax.jit(lambda rows, bits: compressor.decode(compressor.encode(rows, bits), bits))


def draws(compressor, row):
  """Many draws of C(row), shape (draws, block)."""
  bits = None
  if compressor.draws:
    bits = np.random.default_rng(1).integers(0, 2**32, (DRAWS, compressor.draws), np.uint32)
  count = DRAWS if compressor.draws else 1
  rows = jnp.asarray(np.broadcast_to(row, (count, row.size)))
  return np.asarray(roundtrip(compressor)(rows, bits), np.float64)


def lost(compressor, row):
  """‖C(x) − x‖² / ‖x‖², its mean over draws and the mean's standard error."""
  errors = ((draws(compressor, row) - row) ** 2).sum(axis=1) / (row.astype(np.float64) ** 2).sum()
  return errors.mean(), errors.std() / np.sqrt(len(errors))


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contractions_lose_no_more_than_their_delta_says(name):
  compressor = CONTRACTIONS[name]
  found = {case: lost(compressor, row) for case, row in inputs(64).items()}
  for case, (share, error) in found.items():
    assert share <= 1 - compressor.delta + 5 * error + 1e-6, case


def test_deltas_are_reached():
  rows = inputs(64)
  for name, case in (
    ("sign", "one"),
    ("top_k", "equal"),
    ("random_k", "gaussian"),
    ("int4", "worst of ±7"),
    ("int3", "worst of ±3"),
    ("fp8", "worst of E4M3"),
  ):
    compressor = CONTRACTIONS[name]
    share, error = lost(compressor, rows[case])
    # The largest value of the worst rows of E4M3 has no error, and takes its part of the norm.
    slack = 0.05 * (1 - compressor.delta) if name == "fp8" else 0
    assert share >= 1 - compressor.delta - 5 * error - slack - 1e-6, name


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_ones_are_and_vary_no_more_than_their_omega_says(name):
  compressor = UNBIASED[name]
  for case, row in inputs(64).items():
    out = draws(compressor, row)
    # What is rounded up less than once in a hundred draws says nothing of its mean.
    often = np.abs(row) >= 0.01 * np.abs(row).max()
    deviation = out.std(axis=0) / np.sqrt(DRAWS)
    # Quotients keep 21 bits, and products with a scale are rounded once.
    limit = 5 * deviation + 1e-6 * np.abs(row)
    assert np.all(np.abs(out.mean(axis=0) - row)[often] <= limit[often]), case
    share, error = lost(compressor, row)
    assert share <= compressor.omega + 5 * error + 1e-6, case


def test_omegas_of_integers_are_reached():
  for name, q in (("int4", 7), ("int3", 3), ("int2", 1)):
    share, error = lost(UNBIASED[name], inputs(64)[f"worst of ±{q}"])
    np.testing.assert_allclose(share, UNBIASED[name].omega, atol=5 * error)
    np.testing.assert_allclose(share, wire.integers_omega(q, 64), atol=5 * error)


def test_two_bits_are_shrunk_and_cannot_feed_back_without():
  assert wire.integers(2, 64).delta == 1 / (1 + wire.integers_omega(1, 64))
  assert wire.integers(2, 64, unbiased=True).delta is None
  assert wire.random_k(8, unbiased=True).delta is None


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_bytes_on_the_wire_are_those_that_are_told(name):
  compressor = CONTRACTIONS[name]
  rows = jnp.asarray(np.random.default_rng(0).standard_normal((10, 64)), jnp.float32)
  bits = jnp.zeros((10, compressor.draws), jnp.uint32) if compressor.draws else None
  payload = compressor.encode(rows, bits)
  assert sum(x.nbytes for x in payload) == compressor.bytes_per_value * rows.size
  assert all(len(x) == 10 for x in payload)
  # A scale of 1 bit: codes are an eighth of a byte, of 4 bits a half.
  packed = {"sign": 8, "int4": 32, "int3": 24, "int2": 16, "fp8": 64}
  if name in packed:
    assert payload[0].dtype == jnp.uint8
    assert payload[0].shape == (10, packed[name])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packed_codes_are_unpacked(bits):
  codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 48), np.uint8)
  packed = wire.pack(jnp.asarray(codes), bits)
  assert packed.shape == (3, 5, 48 * bits // 8)
  np.testing.assert_array_equal(wire.unpack(packed, bits), codes)


@pytest.mark.parametrize("name", [*CONTRACTIONS])
def test_blocks_of_zeros_and_of_tiny_values_stay_finite(name):
  compressor = CONTRACTIONS[name]
  for size in (0.0, 1e-42, 1e-30, 1e30):
    row = np.full(64, size, np.float32)
    out = draws(compressor, row)
    assert np.all(np.isfinite(out)), size
    assert np.all(np.abs(out) <= 1.01 * max(size, 2.0**-120)), size


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: wire.sign(12), "block must be a multiple of 8, got 12"),
    (lambda: wire.integers(5), "bits must be 2, 3 or 4, got 5"),
    (lambda: wire.top_k(0), "count 0 and block 256"),
    (lambda: wire.random_k(0), "every must be between 1 and 32768, got 0"),
    (lambda: wire.random_k(24, 64), "block must be a multiple of every, got 64 and 24"),
  ],
)
def test_impossible_compressors_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
