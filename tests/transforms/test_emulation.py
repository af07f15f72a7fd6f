"""Emulation: float weights that take the values, and so the course, of packed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

pytestmark = pytest.mark.standard_promotion

FORMATS = {
  "FP8": eco.FP8,
  "INT8": eco.INT8,
  "INT4": eco.INT4,
  "INT4 groups": eco.Format("int4", (32, 1)),
  "NVFP4": eco.NVFP4,
  "MXFP4": eco.MXFP4,
}
RATE = 2.0**-9
RULE = lambda quantizer: eco.error_feedback_to_momentum(
  optax.sgd(RATE, 0.9), quantizer, learning_rate=RATE
)


def loss(params, x):
  return sum(jnp.sum(jnp.sin(leaf * x)) for leaf in jax.tree.leaves(params))


def start():
  """Weights of both signs between 1 and 2, so that no step halves one."""
  draw = lambda seed, *shape: jax.random.uniform(jax.random.key(seed), shape, minval=1, maxval=2)
  sign = lambda x: x * jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 == 0, -1, 1)
  return jax.tree.map(sign, {"k": draw(0, 64, 16), "stack": draw(1, 2, 32, 8), "b": draw(2, 16)})


def run(make, format, rounding, jit, packed, steps, params):
  """Weights after each step, dense."""
  quantizer = functools.partial(eco.quantize_params, rounding=rounding, seed=3)
  tx = make(quantizer() if packed else quantizer(format))
  params = eco.quantize(params, format)
  params = params if packed else eco.dequantize(params)
  state = tx.init(params)

  def step(params, state, x):
    if packed:
      _, grads = eco.value_and_grad(loss)(params, x)
      updates, state = tx.update(grads, state, params)
      return eco.apply_updates(params, updates), state
    updates, state = tx.update(jax.grad(loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step) if jit else step
  course = []
  for i in range(steps):
    params, state = step(params, state, jnp.float32(1 + i % 3))
    course.append(jax.device_get(eco.dequantize(params)))
  return course


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("format", FORMATS)
def test_emulated_weights_are_the_packed_ones_to_the_bit(format, rounding):
  course = functools.partial(run, RULE, FORMATS[format], rounding, True, steps=20, params=start())
  packed, emulated = course(packed=True), course(packed=False)
  for a, b in zip(packed, emulated, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  for name in ("k", "stack"):
    ratio = packed[0][name] / packed[-1][name]
    assert rounding == "nearest" or np.mean(ratio != 1) > 0.1
    assert 0.5 <= ratio.min() <= ratio.max() <= 2


def test_interpreted_steps_too():
  params = {"k": start()["stack"]}
  course = functools.partial(run, RULE, eco.FP8, "nearest", False, steps=6, params=params)
  for a, b in zip(course(packed=True), course(packed=False), strict=True):
    np.testing.assert_array_equal(a["k"], b["k"])


def large_moves(format):
  """Weights, updates and new weights of an emulated step, and the new packed weights."""
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (256, 64))
  packed = eco.quantize(draw(0), format)
  stored = packed.dequantize()
  emulated, own = eco.quantize_params(format, seed=1), eco.quantize_params(seed=1)

  @jax.jit
  def both(stored, packed, moves):
    updates, _ = emulated.update(moves, emulated.init(stored), stored)
    replaced, _ = own.update(moves, own.init(packed), packed)
    new = eco.apply_updates(packed, replaced).dequantize()
    return updates, optax.apply_updates(stored, updates), new

  return jax.device_get((stored, *both(stored, packed, draw(2))))


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_is_off_its_grid_only_where_no_update_leads_there(format):
  """Every float32 near the update, tried one by one."""
  stored, updates, found, wanted = large_moves(FORMATS[format])
  off = found != wanted
  if FORMATS[format].power_of_two:
    assert not np.any(off)
    return
  assert 0.01 < np.mean(off) < 0.6
  p, q, u = stored[off], wanted[off], updates[off]
  assert np.all((p * q < 0) | (2 * np.abs(q) < np.abs(p)) | (np.abs(q) > 2 * np.abs(p)))
  assert np.all(np.abs(found[off] - q) <= np.spacing(np.abs(u)))
  for _ in range(3):
    u = np.nextafter(u, np.float32(-np.inf))
  for _ in range(7):
    assert not np.any(p + u == q)
    u = np.nextafter(u, np.float32(np.inf))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "int4"])
def test_scales_of_few_bits_leave_room_for_large_moves(dtype):
  stored, _, found, wanted = large_moves(eco.Format(dtype, scale_dtype="bfloat16"))
  size = np.abs(stored), np.abs(wanted)
  near = (size[0] <= 2**8 * size[1]) & (size[1] <= 2**8 * size[0]) | (size[0] * size[1] == 0)
  assert np.mean(near) > 0.9
  np.testing.assert_array_equal(found[near], wanted[near])


def test_bfloat16_weights_take_the_values_of_packed_ones():
  """In formats whose values bfloat16 has."""
  format = eco.Format("float8_e4m3fn", power_of_two=True)
  packed = eco.quantize(jax.tree.map(jnp.bfloat16, {"k": start()["k"]}), format)
  emulated, own = eco.quantize_params(format, seed=1), eco.quantize_params(seed=1)
  dense, state, states = eco.dequantize(packed, jnp.bfloat16), None, None
  for i in range(5):
    moves = jax.tree.map(lambda x, i=i: jnp.bfloat16(0.1 * jnp.sin(x + i)), dense)
    updates, state = emulated.update(moves, state or emulated.init(dense), dense)
    dense = optax.apply_updates(dense, updates)
    replaced, states = own.update(moves, states or own.init(packed), packed)
    packed = eco.apply_updates(packed, replaced)
    assert dense["k"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(dense["k"], packed["k"].dequantize(jnp.bfloat16))


def test_a_frozen_weight_stays_also_where_its_scales_would_not_be_found_again():
  normal = jax.random.normal(jax.random.key(0), (64, 32))
  packed = eco.quantize({"k": normal}, eco.NVFP4, rounding="stochastic", key=1)
  dense = eco.dequantize(packed)
  again = eco.dequantize(eco.quantize(dense, eco.NVFP4))
  assert np.any(again["k"] != dense["k"])
  zeros = jax.tree.map(jnp.zeros_like, dense)
  tx = eco.quantize_params(eco.NVFP4)
  updates, _ = jax.jit(tx.update)(zeros, tx.init(dense), dense)
  assert not np.any(updates["k"])
