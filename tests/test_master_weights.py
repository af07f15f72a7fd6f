"""master_weights against a plain float32 copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

STEPS = 150


def drive(tx, params, apply=eco.apply_updates):
  """Trains on a fixed quadratic; returns every step's stored weights and the last state."""
  target = 0.5 * jax.random.normal(jax.random.key(1), (32, 16))

  def step(carry, i):
    params, state = carry
    noise = 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (32, 16))
    grads = {"w": eco.dequantize(params)["w"] - target + noise}
    updates, state = tx.update(grads, state, params)
    params = apply(params, updates)
    return (params, state), eco.dequantize(params)["w"]

  return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))((params, tx.init(params)))


def plain_master_weights(inner, format):
  """What the baseline means: a float32 weight, and its rounding for the forward pass."""

  def init(params):
    return inner.init(params), params

  def update(grads, state, params):
    inner_state, master = state
    updates, inner_state = inner.update(grads, inner_state, master)
    master = optax.apply_updates(master, updates)
    rounded = eco.dequantize(eco.quantize(master, format))
    return jax.tree.map(jnp.subtract, rounded, params), (inner_state, master)

  return optax.GradientTransformation(init, update)


def start(format):
  return eco.quantize({"w": 0.3 * jax.random.normal(jax.random.key(0), (32, 16))}, format)


INNER = {
  "adamw": lambda: optax.adamw(3e-3, weight_decay=0.1),
  "lion": lambda: optax.lion(1e-3),
  "sgd": lambda: optax.sgd(0.02),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4], ids=["fp8", "int4"])
def test_float32_residual_is_a_float32_copy(name, format):
  params = start(format)
  tx = eco.master_weights(INNER[name](), eco.quantize_params(rounding="nearest"))
  (_, state), stored = drive(tx, params)
  plain = plain_master_weights(INNER[name](), format)
  (_, (_, master)), wanted = drive(plain, eco.dequantize(params), optax.apply_updates)
  # The two keep the same weight up to float32 rounding, so a code differs at a tie only.
  differs = np.abs(np.asarray(stored) - np.asarray(wanted)) > 1e-6
  assert np.mean(differs) < 1e-3
  np.testing.assert_allclose(stored[-1] + np.asarray(state.residual["w"]), master["w"], atol=2e-6)


@pytest.mark.parametrize(
  ("residual", "size", "share"),
  # bfloat16 keeps 8 bits of the residual, int8 1/128 of a step that is twice its size or more.
  [("bfloat16", 2, 2**-8), ("int8", 1, 2**-5)],
)
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.NVFP4], ids=["fp8", "int4", "nvfp4"])
def test_small_residuals_follow_the_large_one(residual, size, share, format):
  params = start(format)
  runs = {}
  for kind in ("float32", residual):
    tx = eco.master_weights(INNER["adamw"](), eco.quantize_params(rounding="nearest"), kind)
    runs[kind] = drive(tx, params)
  assert runs[residual][0][1].residual["w"].nbytes == size * 32 * 16
  naive = drive(eco.chain(INNER["adamw"](), eco.quantize_params(rounding="nearest")), params)
  mean = lambda run: np.asarray(run[1][-50:]).mean(0)
  gap = np.abs(mean(runs[residual]) - mean(runs["float32"])).mean()
  # Beside what losing every small update costs.
  assert gap < 0.3 * np.abs(mean(naive) - mean(runs["float32"])).mean()


def test_int8_residual_reaches_every_error_of_every_format():
  generator = np.random.default_rng(0)
  x = jnp.asarray(generator.standard_normal((64, 32)), jnp.float32)
  for format in (eco.FP8, eco.FP8_E5M2, eco.INT8, eco.INT4, eco.MXFP8, eco.MXFP4, eco.NVFP4):
    for rounding in ("nearest", "stochastic"):
      params = eco.quantize({"w": x}, format)
      tx = eco.master_weights(
        optax.sgd(1.0), eco.quantize_params(rounding=rounding, seed=3), "int8"
      )
      move = 0.01 * generator.standard_normal((64, 32)).astype(np.float32)
      updates, state = tx.update({"w": jnp.asarray(-move)}, tx.init(params), params)
      stored = eco.apply_updates(params, updates)["w"]
      error = np.asarray(params["w"].dequantize()) + move - np.asarray(stored.dequantize())
      step = np.asarray(
        stored.apply_scale(eco.rounding.grid_step(stored.codes.astype(jnp.float32), format.dtype))
      )
      kept = np.asarray(state.residual["w"], np.float32) * step / 128
      # One unit of stochastic rounding; a weight cut at the largest code may hold more than a step.
      cut = np.abs(np.asarray(stored.codes, np.float32)) == format.max
      assert np.all((np.abs(kept - error) <= step / 128 * 1.001) | cut), (format, rounding)
