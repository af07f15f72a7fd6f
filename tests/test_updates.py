"""apply_updates and value_and_grad on mixed trees, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco


@pytest.fixture
def params():
  return eco.quantize({"kernel": jnp.arange(8.0).reshape(4, 2) - 3, "bias": jnp.ones(2)}, eco.FP8)


def test_packed_leaves_are_replaced_and_float_leaves_added(params):
  new = eco.quantize(jnp.full((4, 2), 0.3), eco.FP8)
  out = eco.apply_updates(params, {"kernel": new, "bias": jnp.full(2, 0.5)})
  np.testing.assert_array_equal(out["kernel"].dequantize(), new.dequantize())
  np.testing.assert_array_equal(out["bias"], [1.5, 1.5])


def test_float_trees_are_optaxs():
  params = {"a": jnp.ones(3, jnp.bfloat16), "b": {"c": jnp.ones(2)}}
  updates = {"a": jnp.full(3, 0.25), "b": {"c": jnp.full(2, -1.0)}}
  with jax.numpy_dtype_promotion("standard"):
    ours, stock = eco.apply_updates(params, updates), optax.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, ours, stock)
  assert ours["a"].dtype == jnp.bfloat16


def test_mismatched_updates_name_the_leaf(params):
  dense = eco.dequantize(params)
  with pytest.raises(
    ValueError, match=r"leaf 'kernel' is packed, but its update is not.*quantize_"
  ):
    eco.apply_updates(params, dense)
  with pytest.raises(ValueError, match="leaf 'kernel' is not packed, but its update is"):
    eco.apply_updates(dense, params)


def test_updates_of_packed_leaves_cannot_be_added(params):
  grads = eco.dequantize(params)
  stock, naive = optax.sgd(0.1, momentum=0.9), eco.quantize_params(rounding="nearest")
  for tx in (
    eco.adamw(0.1),
    eco.chain(stock, naive),
    eco.layer_by_layer(eco.master_weights(stock, naive)),
  ):
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"call eco_optax\.apply_updates"):
      optax.apply_updates(params, updates)
    new = eco.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["kernel"].qvalue, updates["kernel"].qvalue)


@pytest.mark.parametrize("dense", [True, False])
def test_value_and_grad_with_aux_and_arguments(params, dense):
  x = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])

  def fn(p, x, scale=1.0):
    y = eco.matmul(x, p["kernel"]) + p["bias"]
    return scale * jnp.sum(y), {"y": y}

  run = jax.jit(eco.value_and_grad(fn, dense=dense, has_aux=True))
  (value, aux), grads = run(params, x, scale=2.0)
  stored = np.asarray(params["kernel"].dequantize())
  np.testing.assert_allclose(aux["y"], np.asarray(x) @ stored + 1, rtol=1e-6)
  np.testing.assert_allclose(value, 2 * np.sum(np.asarray(aux["y"])), rtol=1e-6)
  np.testing.assert_allclose(grads["kernel"], 2 * np.repeat(np.asarray(x).T, 2, axis=1))
  np.testing.assert_allclose(grads["bias"], [2.0, 2.0])


def test_missing_params_are_named(params):
  tx = eco.adamw(1e-3)
  with pytest.raises(
    ValueError, match=r"params are missing: call tx.update\(grads, state, params\)"
  ):
    tx.update(eco.dequantize(params), tx.init(params))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: eco.quantize_params().init({"w": jnp.ones((2, 2))}), "no leaf of params is quantized"),
    (
      lambda: eco.quantize_params(where=lambda path, _: "w" in path).init({"w": jnp.ones((2, 2))}),
      "leaf 'w' is float32.* where where= promises a packed leaf",
    ),
    (
      lambda: eco.quantize_params(eco.MXFP8).init({"w": jnp.ones((30, 2))}),
      r"leaf 'w' of shape \(30, 2\) is not divided by blocks of \(32, 1\)",
    ),
    (lambda: eco.quantize_params("fp8"), "format must be an eco_optax.Format"),
    (lambda: eco.quantize_params(rounding="up"), "rounding must be 'nearest' or 'stochastic'"),
    (lambda: eco.quantize(jnp.ones((2, 2)), eco.FP8, rounding="stochastic"), "pass key="),
    (
      lambda: eco.quantize({"i": jnp.ones((2, 2), jnp.int32)}, eco.FP8, where=lambda *_: True),
      "leaf 'i' holds int32, only floats",
    ),
    (lambda: eco.master_weights(optax.sgd(1.0), eco.quantize_params(), "int4"), "residual must be"),
    (
      lambda: eco.master_weights(optax.sgd(1.0), eco.quantize_params(eco.FP8), "int8").init(
        {"w": jnp.ones((2, 2))}
      ),
      "leaf 'w' is not packed, so an int8 residual has no step",
    ),
    (
      lambda: eco.error_feedback_to_momentum(
        optax.adam(1e-3), optax.stateless(lambda u, p: u)
      ).init(eco.quantize({"w": jnp.ones((2, 2))}, eco.FP8)),
      "leaf 'w' is packed, which this quantizer cannot move",
    ),
  ],
)
def test_bad_input_is_named_before_any_step(make, message):
  with pytest.raises(ValueError, match=message):
    make()
