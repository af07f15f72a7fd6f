"""layer_by_layer against the same optimizer on whole leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax import rounding
from eco_optax.transforms import leafwise

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def tree(format, seed=0):
  draw = lambda *shape: jax.random.normal(
    jax.random.fold_in(jax.random.key(seed), len(shape)), shape
  )
  params = {
    "blocks": {"up": draw(3, 16, 32), "experts": draw(3, 2, 16, 16), "norm": jnp.ones((3, 16))},
    "first": {"up": draw(1, 16, 16)},
    "head": draw(16, 16),
    "embedding": draw(8, 16),
  }
  packed = lambda path, leaf: path.split("/")[-1] in ("up", "experts", "head")
  return eco.quantize(params, format, packed)


SCHEDULE = optax.linear_schedule(1e-3, 1e-1, 10)
BLOCKS = eco.Format("float8_e4m3fn", (16, 16))
OPTIMIZERS = {
  "eco": lambda rounding: eco.error_feedback_to_momentum(
    optax.adamw(SCHEDULE, weight_decay=0.1), eco.quantize_params(rounding=rounding), SCHEDULE
  ),
  "exact": lambda rounding: eco.sgd(SCHEDULE, rounding=rounding, keep_error=True),
  "bfloat16 momentum": lambda rounding: eco.adamw(1e-2, mu_dtype=jnp.bfloat16, rounding=rounding),
  "8-bit moments": lambda rounding: eco.low_bit_moments(eco.sgd(1e-2, rounding=rounding)),
  "master weights": lambda rounding: eco.master_weights(
    optax.lion(1e-2), eco.quantize_params(rounding=rounding)
  ),
  "12-bit residual": lambda rounding: eco.master_weights(
    optax.adamw(1e-2), eco.quantize_params(rounding=rounding), "int12"
  ),
  "naive": lambda rounding: eco.chain(optax.adamw(1e-2), eco.quantize_params(rounding=rounding)),
}


CASES = [
  *((name, eco.FP8, "stochastic") for name in OPTIMIZERS),
  ("eco", eco.FP8, "nearest"),
  ("eco", eco.INT4, "stochastic"),
  ("eco", BLOCKS, "stochastic"),
]


@pytest.mark.parametrize(("name", "format", "rounding"), CASES)
def test_steps_are_those_of_whole_leaves(name, format, rounding):
  whole, layers = (make(OPTIMIZERS[name](rounding)) for make in (lambda tx: tx, eco.layer_by_layer))
  params = other = tree(format)
  state, other_state = whole.init(params), layers.init(other)
  assert jax.tree.structure(state) == jax.tree.structure(other_state)
  for i in range(3):
    grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), eco.dequantize(params))
    updates, state = jax.jit(whole.update)(grads, state, params)
    params = eco.apply_updates(params, updates)
    updates, other_state = jax.jit(layers.update)(grads, other_state, other)
    other = eco.apply_updates(other, updates)
  codes = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype.itemsize == 1]
  differ = sum(
    np.sum(np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8))
    for a, b in zip(codes(params), codes(other), strict=True)
  )
  # Two programs may round a proposal's last place apart, once in a million it decides a code.
  assert differ <= 1
  close = lambda a, b: np.testing.assert_allclose(
    np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-4, atol=1e-5
  )
  if name not in ("bfloat16 momentum", "8-bit moments"):  # A last place decides how they round.
    jax.tree.map(close, state, other_state)


def test_float_leaves_and_trees_without_stacks_are_untouched():
  tx = eco.layer_by_layer(optax.adam(1e-2))
  params = {"w": jnp.ones((3, 4, 4)), "b": jnp.ones(4)}
  grads = jax.tree.map(jnp.sin, params)
  updates, state = tx.update(grads, tx.init(params), params)
  wanted, wanted_state = optax.adam(1e-2).update(grads, optax.adam(1e-2).init(params), params)
  jax.tree.map(np.testing.assert_array_equal, updates, wanted)
  jax.tree.map(np.testing.assert_array_equal, state, wanted_state)


@pytest.mark.parametrize(
  "couples", [optax.clip_by_global_norm(1.0), optax.scale_by_trust_ratio()], ids=["clip", "norm"]
)
def test_what_couples_layers_is_refused_and_named(couples):
  tx = eco.layer_by_layer(
    eco.master_weights(optax.chain(couples, optax.adamw(1e-3)), eco.quantize_params())
  )
  with pytest.raises(ValueError, match=r"leaf 'blocks/.*depends on other layers.*put|Put"):
    tx.init(tree(eco.FP8))
  # Where it belongs it is welcome, and the chain is an ordinary one.
  good = optax.chain(couples, eco.layer_by_layer(eco.adamw(1e-3)))
  params = tree(eco.FP8)
  grads = jax.tree.map(jnp.sin, eco.dequantize(params))
  if "trust" not in str(couples):
    updates, _ = good.update(grads, good.init(params), params)
    assert isinstance(updates["blocks"]["up"], eco.QuantizedArray)


def test_trees_of_one_kind_are_tried_once(monkeypatch):
  tried, honest = [], leafwise.responses
  monkeypatch.setattr(leafwise, "responses", lambda *args: tried.append(1) or honest(*args))
  tx = eco.layer_by_layer(eco.sgd(1e-2))
  stack = lambda *shape, format=eco.FP8: {"w": eco.quantize(jnp.ones(shape), format)}
  for times, params in [
    (1, stack(12, 16, 8)),
    (1, stack(5, 24, 16)),  # Of which the miniature is the same.
    (2, stack(12, 16, 8, format=eco.INT8)),
    (3, stack(2, 16, 8)),
    (4, {"w": stack(12, 16, 8)["w"], "b": jnp.ones(8)}),
    (4, stack(12, 16, 8)),
  ]:
    jax.eval_shape(tx.init, params)
    tx.init(params)
    assert len(tried) == times
  # What has no stack in it is not tried at all.
  tx.init({"w": eco.quantize(jnp.ones((16, 8)), eco.FP8)})
  assert len(tried) == 4


def test_missing_params_are_named():
  params = tree(eco.FP8)
  tx = eco.layer_by_layer(eco.adamw(1e-3))
  with pytest.raises(ValueError, match="params are missing"):
    tx.update(jax.tree.map(jnp.sin, eco.dequantize(params)), tx.init(params))


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 2, 4, 6), (5, 3, 2, 4, 6)])
def test_a_layers_random_bits_are_those_of_the_stack(shape):
  key = rounding.stream_key(7, 3, "blocks/kernel")
  stack = rounding.counter_bits(key, shape)
  for i in range(shape[0]):
    np.testing.assert_array_equal(rounding.counter_bits(key, shape[1:], jnp.int32(i)), stack[i])


def test_one_number_for_all_layers_is_refused():
  params = {"w": eco.quantize(jnp.ones((3, 32, 8)), eco.FP8)}
  inner = optax.chain(optax.zero_nans(), optax.sgd(0.1, momentum=0.9))
  tx = eco.layer_by_layer(eco.error_feedback_to_momentum(inner, eco.quantize_params()))
  with pytest.raises(ValueError, match=r"found_nan/w' is one number for all layers"):
    tx.update({"w": jnp.ones((3, 32, 8))}, tx.init(params), params)


def test_a_loss_that_the_optimizer_wants_is_made_up_where_it_is_tried():
  params = {"w": eco.quantize(jnp.ones((3, 32, 8)), eco.FP8)}
  inner = optax.chain(optax.sgd(0.1, momentum=0.9), optax.contrib.reduce_on_plateau(patience=3))
  rule = eco.error_feedback_to_momentum(inner, eco.quantize_params())
  grads = {"w": jnp.ones((3, 32, 8))}
  moved = []
  for tx in (rule, eco.layer_by_layer(rule)):
    updates, _ = tx.update(grads, tx.init(params), params, value=jnp.float32(1))
    moved.append(eco.apply_updates(params, updates)["w"].dequantize())
  np.testing.assert_array_equal(*moved)
  assert (moved[0] < 1).all()


def test_moments_of_a_stock_chain_know_their_layer():
  """Frozen leaves behind ours make a stock chain, whose moments low_bit_moments rounds by layer."""
  values = jax.random.normal(jax.random.key(0), (3, 32, 8))
  params = eco.quantize({"w": values, "frozen": values}, eco.FP8)
  grads = {"w": values + 1, "frozen": values}
  frozen = optax.masked(optax.set_to_zero(), {"w": False, "frozen": True})
  rule = eco.error_feedback_to_momentum(
    optax.adam(1e-2), eco.quantize_params(rounding="stochastic")
  )
  whole = eco.low_bit_moments(optax.chain(rule, frozen))
  found = []
  for tx in (whole, eco.layer_by_layer(whole)):
    new, state, update = params, tx.init(params), jax.jit(tx.update)
    for _ in range(3):
      updates, state = update(grads, state, new)
      new = eco.apply_updates(new, updates)
    found.append((new, state))
  chex.assert_trees_all_equal(*found)
  np.testing.assert_array_equal(found[1][0]["frozen"].codes, params["frozen"].codes)
  assert (found[1][0]["w"].codes != params["w"].codes).any()
