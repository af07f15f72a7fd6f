"""Diagnostics against their definitions, and that watching changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax import diagnostics


def test_saturation_counts_codes_at_the_ends():
  params = {"a": eco.quantize(jnp.array([[1.0, 0.1], [-1.0, 0.2]]), eco.INT4), "b": jnp.ones(3)}
  np.testing.assert_allclose(diagnostics.saturation(params), 0.5)


def test_fraction_moved_compares_values():
  old = eco.quantize({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, eco.FP8)
  new = eco.quantize({"w": jnp.array([[1.0, 2.0], [3.0, 3.0]])}, eco.FP8)
  # The second column's scale changes, so its other weight may move as well as the one that did.
  wanted = np.mean(np.asarray(old["w"].dequantize()) != np.asarray(new["w"].dequantize()))
  assert wanted > 0
  np.testing.assert_allclose(diagnostics.fraction_moved(old, new), wanted)


def test_error_similarity_is_norms_and_cosine():
  generator = np.random.default_rng(0)
  a, b = (
    {"x": generator.standard_normal((3, 4)), "y": generator.standard_normal(5)} for _ in range(2)
  )
  flat = [np.concatenate([t["x"].ravel(), t["y"]]) for t in (a, b)]
  norms = [np.linalg.norm(v) for v in flat]
  ratio, cosine = diagnostics.error_similarity(
    *(jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), t) for t in (a, b))
  )
  np.testing.assert_allclose(ratio, norms[1] / norms[0], rtol=1e-6)
  np.testing.assert_allclose(cosine, flat[0] @ flat[1] / norms[0] / norms[1], rtol=1e-5)
  nothing = jax.tree.map(jnp.zeros_like, {"x": jnp.ones(2)})
  assert all(np.isnan(v) for v in diagnostics.error_similarity(nothing, nothing))


def run(tx, steps=30):
  params = eco.quantize({"w": 0.1 * jax.random.normal(jax.random.key(0), (16, 8))}, eco.FP8)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for i in range(steps):
    grads = {"w": jax.random.normal(jax.random.key(i), (16, 8))}
    updates, state = update(grads, state, params)
    params = eco.apply_updates(params, updates)
  return params, state


@pytest.mark.parametrize("keep_error", [False, True])
def test_watching_changes_nothing_and_measures_the_error(keep_error):
  inner = lambda: optax.adamw(1e-3, b1=0.9)
  quantizer = eco.quantize_params(rounding="stochastic", seed=5)
  plain, state = run(eco.error_feedback_to_momentum(inner(), quantizer, keep_error=keep_error))
  watched, watch_state = run(diagnostics.watch(inner(), quantizer, keep_error=keep_error))
  jax.tree.map(np.testing.assert_array_equal, plain, watched)
  # Two programs may round a momentum differently in its last place.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, watch_state.inner
  )
  seen = watch_state.metrics
  np.testing.assert_allclose(seen.error_norm, np.linalg.norm(watch_state.error["w"]), rtol=1e-6)
  if keep_error:
    np.testing.assert_array_equal(watch_state.error["w"], state.error["w"])
  assert 0.3 < seen.error_norm_ratio < 3
  assert -1 <= seen.error_cosine <= 1
  assert seen.lost_injection < 1e-5  # A float32 momentum holds it.


def test_low_precision_momentum_loses_part_of_the_injection():
  tx = diagnostics.watch(
    optax.sgd(1e-2, momentum=0.9, accumulator_dtype=jnp.bfloat16), eco.quantize_params()
  )
  with jax.numpy_dtype_promotion("standard"):
    _, state = run(tx)
  # A bfloat16 keeps 8 bits: stochastic rounding errs by up to 2^-7 of the momentum.
  assert 1e-4 < state.metrics.lost_injection < 0.1
