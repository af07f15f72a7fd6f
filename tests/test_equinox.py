"""Equinox modules with packed weights: what its tools do with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco

eqx = pytest.importorskip("equinox")

X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jnp.sin(X)
# Equinox keeps weights as (out, in).
FORMATS = {
  "FP8": eco.Format("float8_e4m3fn", contraction_axis=-1),
  "INT4": eco.Format("int4", "channel", contraction_axis=-1),
}


def loss_fn(model, x, y):
  return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def packed(format):
  model = eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=jax.random.key(2))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  return eco.quantize(params, format), static


@pytest.mark.parametrize("name", FORMATS)
def test_modules_train_under_filter_jit(name):
  params, static = packed(FORMATS[name])
  tx = eco.adamw(1e-2)

  @eqx.filter_jit
  def step(params, static, opt_state, x, y):
    loss_of = lambda params: loss_fn(eqx.combine(params, static), x, y)
    loss, grads = eco.value_and_grad(loss_of)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eco.apply_updates(params, updates), opt_state, loss

  # The gradient is that of the module with floats.
  floats = eqx.combine(eco.dequantize(params), static)
  wanted, wanted_grads = eqx.filter_value_and_grad(loss_fn)(floats, X, Y)
  loss, grads = eco.value_and_grad(lambda p: loss_fn(eqx.combine(p, static), X, Y))(params)
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
  opt_state, losses = tx.init(params), []
  for _ in range(20):
    params, opt_state, loss = step(params, static, opt_state, X, Y)
    losses.append(float(loss))
  assert losses[-1] < 0.3 * losses[0]
  assert isinstance(params.layers[0].weight, eco.QuantizedArray)
  # An evaluation is the module's own code, on floats.
  model = eqx.combine(eco.dequantize(params), static)
  assert float(loss_fn(model, X, Y)) < losses[0]


def test_tools_that_add_or_differentiate_codes_are_refused():
  params, static = packed(FORMATS["FP8"])
  tx = eco.adamw(1e-2)
  grads = jax.tree.map(jnp.zeros_like, eco.dequantize(params))
  updates, _ = tx.update(grads, tx.init(params), params)
  with pytest.raises(ValueError, match=r"call eco_optax\.apply_updates"):
    eqx.apply_updates(params, updates)
  with pytest.raises(ValueError, match="QuantizedArray"):
    eqx.combine(params, static)
  model = eqx.nn.MLP(16, 16, 32, 1, key=jax.random.key(2))
  with pytest.raises(TypeError, match=r"compute with eco_optax\.dequantize"):
    eqx.filter_grad(loss_fn)(eco.quantize(model, FORMATS["FP8"]), X, Y)


def test_checkpoints_of_equinox_keep_codes(tmp_path):
  params, _ = packed(FORMATS["INT4"])
  eqx.tree_serialise_leaves(tmp_path / "params.eqx", params)
  blank = jax.tree.map(jnp.zeros_like, params)
  again = eqx.tree_deserialise_leaves(tmp_path / "params.eqx", blank)
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(x, y)
