"""Counter-based random bits: random enough, and a function of nothing but what they are told."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eco_optax as eco
from eco_optax import rounding
from eco_optax.quantized_array import as_parameter

SHAPE = (8, 16, 24)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(step, shape, seed=0, path="w"):
  return rounding.counter_bits(rounding.stream_key(seed, step, path), shape)


def mesh_of(count):
  devices = np.array(jax.devices()[:count])
  return Mesh(devices.reshape(-1, 2) if count > 1 else devices.reshape(1, 1), ("x", "y"))


SPECS = [P(), P("x"), P(None, "x"), P(None, None, ("x", "y")), P("x", "y"), P("y", None, "x")]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bits_do_not_depend_on_devices_or_sharding(count, spec):
  sharding = NamedSharding(mesh_of(count), spec)
  key = rounding.stream_key(11, 3, "layers/kernel")
  alone = np.asarray(rounding.counter_bits(key, SHAPE))
  sharded = jax.jit(lambda key: rounding.counter_bits(key, SHAPE), out_shardings=sharding)(key)
  assert len(sharded.sharding.device_set) == count
  np.testing.assert_array_equal(np.asarray(sharded), alone)


@pytest.mark.parametrize(
  "format",
  [eco.FP8, eco.INT4, eco.Format("float8_e4m3fn", (8, 8)), eco.Format("float4_e2m1fn", (8, 1))],
  ids=str,
)
def test_a_stochastic_step_is_the_same_on_any_mesh(format):
  """The whole transform: packed parameters, each sharding, all device counts."""
  generator = np.random.default_rng(0)
  x = jnp.asarray(generator.standard_normal(SHAPE), jnp.float32)
  params = eco.quantize({"w": x}, format)
  tx = eco.quantize_params(seed=5)
  updates = {"w": jnp.asarray(0.05 * generator.standard_normal(SHAPE), jnp.float32)}

  def step(params, updates, state):
    return as_parameter(tx.update(updates, state, params)[0]["w"])

  wanted = jax.tree.leaves(jax.jit(step)(params, updates, tx.init(params)))
  assert np.any(np.asarray(wanted[0]) != np.asarray(params["w"].qvalue))
  for count, spec in [(2, P("y")), (4, P(None, "x", "y")), (8, P("x", None, "y")), (8, P("x"))]:
    everywhere = NamedSharding(mesh_of(count), P())
    place = functools.partial(jax.device_put, device=NamedSharding(mesh_of(count), spec))
    # Scales have axes of length one, or of blocks, which need not divide: they stay whole.
    leaf = jax.device_put(params["w"], everywhere)
    leaf = dataclasses.replace(leaf, qvalue=place(leaf.qvalue))
    state = jax.device_put(tx.init(params), everywhere)
    found = jax.tree.leaves(jax.jit(step)({"w": leaf}, {"w": place(updates["w"])}, state))
    for a, b in zip(found, wanted, strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bits_are_those_of_the_stack_by_matrix_and_element():
  """Jitted or not, a leaf's bits are one fixed array; a second call and another step differ."""
  eager = rounding.counter_bits(rounding.stream_key(0, 5, "w"), SHAPE)
  np.testing.assert_array_equal(np.asarray(eager), np.asarray(draw(5, SHAPE)))
  assert eager.dtype == jnp.uint32
  assert eager.shape == SHAPE


STREAMS = {
  "step": lambda i: (0, i, "w"),
  "seed": lambda i: (i, 0, "w"),
  "high seed": lambda i: (i << 32, 0, "w"),
  "path": lambda i: (0, 0, f"layers/{i}/kernel"),
}


@pytest.mark.parametrize("axis", STREAMS)
def test_streams_are_distinct_and_uncorrelated(axis):
  """Two streams agree in a share 1/2 of their bits, to 5 standard deviations, and in no word."""
  size = 4096
  words = [
    np.asarray(rounding.counter_bits(rounding.stream_key(*STREAMS[axis](i)), (size,)))
    for i in range(8)
  ]
  for a, b in itertools.combinations(words, 2):
    agree = 32 * size - np.bitwise_count(a ^ b).sum(dtype=np.int64)
    assert abs(agree - 16 * size) < 5 * np.sqrt(32 * size) / 2
    # A chance 2^-32 per element that two words are equal: 1e-6 here.
    assert not np.any(a == b)


def test_bits_are_uniform():
  """Chi-square of each byte over 256 values, within 5 standard deviations (mean 255, var 510)."""
  words = np.asarray(draw(0, (1024, 1024)))
  for shift in (0, 8, 16, 24):
    counts = np.bincount(((words >> shift) & 0xFF).ravel(), minlength=256)
    expected = words.size / 256
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert abs(chi_square - 255) < 5 * np.sqrt(510)


@pytest.mark.parametrize(
  "lag", [("rows", 1, 0), ("columns", 0, 1), ("diagonal", 1, 1), ("power of two", 0, 64)]
)
def test_neighbouring_elements_are_independent(lag):
  """Joint counts of the leading four bits of two neighbours: chi-square within 5 deviations."""
  _, down, right = lag
  words = np.asarray(draw(7, (512, 512))) >> 28
  a, b = words[: 512 - down, : 512 - right], words[down:, right:]
  counts = np.bincount((a * 16 + b).ravel(), minlength=256)
  expected = a.size / 256
  assert abs(np.sum((counts - expected) ** 2 / expected) - 255) < 5 * np.sqrt(510)


def test_consecutive_steps_are_independent():
  """The same element over steps: the serial correlation of U is 0 ± 5/√n."""
  steps = jax.vmap(lambda step: draw(step, (16, 16)))(jnp.arange(1024, dtype=jnp.int32))
  u = (np.asarray(steps, np.float64) / 2**32 - 0.5) * np.sqrt(12)
  for lag in (1, 2, 64):
    product = u[lag:] * u[:-lag]
    assert abs(product.mean()) < 5 / np.sqrt(product.size)
  # Means over time of each element, and over elements at each step.
  assert np.max(np.abs(u.mean(axis=0))) < 5 / np.sqrt(1024)
  assert np.max(np.abs(u.mean(axis=(1, 2)))) < 5 / 16


def test_matrices_of_a_stack_have_bits_of_their_own():
  stack = np.asarray(draw(0, (64, 8, 8))).reshape(64, -1)
  for a, b in itertools.combinations(stack, 2):
    assert not np.any(a == b)
  # Higher stacks too: (2, 32, 8, 8) has 64 different matrices.
  nested = np.asarray(draw(0, (2, 32, 8, 8))).reshape(64, -1)
  assert len(np.unique(nested[:, 0])) == 64


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 5, -1])
def test_any_python_seed_is_accepted(seed):
  assert rounding.counter_bits(rounding.stream_key(seed, 0, "w"), (4,)).shape == (4,)


def test_a_restored_run_draws_the_same_bits():
  """Nothing but the step is carried: a state made anew from its numbers goes on alike."""
  params = eco.quantize({"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}, eco.FP8)
  updates = {"w": jnp.full((8, 8), 0.01)}
  tx = eco.quantize_params(seed=1)
  state = tx.init(params)
  for _ in range(3):
    new, state = tx.update(updates, state, params)
    params = eco.apply_updates(params, new)
  restored = jax.tree.map(lambda a: jnp.asarray(np.array(a)), state)
  again = eco.quantize_params(seed=1)
  a, _ = tx.update(updates, state, params)
  b, _ = again.update(updates, restored, params)
  np.testing.assert_array_equal(np.asarray(a["w"].qvalue), np.asarray(b["w"].qvalue))
  c, _ = eco.quantize_params(seed=2).update(updates, restored, params)
  assert np.any(np.asarray(a["w"].qvalue) != np.asarray(c["w"].qvalue))


@pytest.mark.parametrize("step", [0, 1, 2**31 - 1, -1, -(2**31)])
def test_programs_that_are_compiled_and_steps_one_by_one_draw_the_same_bits(step):
  """Also where a counter has run over."""
  step = jnp.int32(step)
  wanted = rounding.element_bits(
    rounding.key_at(rounding.stream_start(0, "w"), step),
    rounding.mixed(jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)),
  )
  np.testing.assert_array_equal(draw(step, (2, 3)), wanted)
  with jax.disable_jit():
    np.testing.assert_array_equal(draw(step, (2, 3)), wanted)
  batched = jax.vmap(lambda step: draw(step, (2, 3)))(jnp.stack([step, step]))
  np.testing.assert_array_equal(batched, jnp.stack([wanted, wanted]))


def test_steps_can_be_differentiated_around_them():
  """As where a learning rate is learned through the steps that it makes."""

  def loss(rate):
    tx = eco.chain(optax.sgd(rate), eco.quantize_params(eco.FP8))

    def step(carry, _):
      weights, state = carry
      updates, state = tx.update({"w": jnp.ones((2, 2))}, state, weights)
      return (optax.apply_updates(weights, updates), state), None

    weights = {"w": jnp.ones((2, 2))}
    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), None, 3)
    return jnp.sum(weights["w"])

  assert np.isfinite(jax.grad(loss)(0.1))
