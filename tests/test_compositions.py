"""Compositions with stock transformations: right, or an error names the leaf and the remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax import rounding
from eco_optax.quantized_array import as_parameter, is_quantized

pytestmark = pytest.mark.standard_promotion  # Optax compares an int32 count with Python floats.

FREEZE = {"frozen": True, "k": False, "b": False}
START = {
  "frozen": jax.random.normal(jax.random.key(0), (64, 32)),
  "k": jax.random.normal(jax.random.key(1), (64, 32)),
  "b": jnp.ones(32),
}
PARAMS = eco.quantize(START, eco.FP8)
GRADS = jax.tree.map(jnp.sin, START)
nearest = lambda: eco.quantize_params(rounding="nearest")


def equal(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


def one_step(tx, jit):
  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  return (jax.jit(step) if jit else step)(GRADS, tx.init(PARAMS), PARAMS)[0]


PACKED = {
  "eco.adamw": lambda: eco.adamw(1e-2),
  "naive": lambda: eco.chain(optax.adam(1e-2), nearest()),
  "rule": lambda: eco.error_feedback_to_momentum(optax.adamw(1e-2), nearest()),
  "layer by layer": lambda: eco.layer_by_layer(eco.low_bit_moments(eco.adamw(1e-2))),
  "master weights": lambda: eco.master_weights(optax.sgd(1e-2), nearest()),
}
CHANGE_UPDATES = {
  "scale": lambda: optax.scale(0.5),
  "scale by an integer": lambda: optax.scale(2),
  "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 0.5),
  "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.1),
  "clip": lambda: optax.clip(1e-3),
  "clip_by_block_rms": lambda: optax.clip_by_block_rms(1e-3),
  "clip_by_global_norm": lambda: optax.clip_by_global_norm(1e-3),
  "trace": lambda: optax.trace(0.9),
  "add_noise": lambda: optax.add_noise(0.1, 0.5, jax.random.key(0)),
  "scale_by_sign": lambda: optax.scale_by_sign(),
  "adam": lambda: optax.adam(1e-3),
  "a function": lambda: optax.stateless(lambda u, p: jax.tree.map(lambda x: x * 0.5, u)),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("link", CHANGE_UPDATES)
@pytest.mark.parametrize("packed", ["eco.adamw", "rule"])
def test_no_stock_link_changes_packed_updates(packed, link, jit):
  # Its state is of the dense view: a state for packed parameters is not what is tried here.
  first, second = PACKED[packed](), CHANGE_UPDATES[link]()

  def step(grads, state, params):
    updates, _ = first.update(grads, state[0], params)
    return eco.apply_updates(params, second.update(updates, state[1], params)[0])

  state = first.init(PARAMS), second.init(eco.dequantize(PARAMS))
  with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
    (jax.jit(step) if jit else step)(GRADS, state, PARAMS)
  shown = str(error.value)
  if "key<" in shown:  # Some of Optax's operations fail before they know what on.
    assert "the new value of leaf 'frozen', which is packed" in shown
    assert "eco_optax.chain(optax.adamw(…), optax.masked(…), eco_optax.quantize_params())" in shown


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
  "freeze",
  [
    lambda: optax.masked(optax.set_to_zero(), FREEZE),
    lambda: optax.partition(
      {"fixed": optax.set_to_zero(), "free": optax.identity()},
      {"frozen": "fixed", "k": "free", "b": "free"},
    ),
    lambda: optax.stateless(
      lambda u, p: {**u, "frozen": jax.tree.map(jnp.zeros_like, u["frozen"])}
    ),
  ],
  ids=["masked", "partition", "zeros_like"],
)
def test_a_frozen_layer_stays_and_others_move(freeze, packed, jit):
  free = one_step(PACKED[packed](), jit)
  found = one_step(optax.chain(PACKED[packed](), freeze()), jit)
  assert equal(found["frozen"], PARAMS["frozen"])
  assert equal(found["k"], free["k"])
  assert not equal(found["k"], PARAMS["k"])


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("emit", [False, True])
def test_a_wrapper_skips_a_step_by_zeros(emit, jit):
  tx = eco.adamw(1e-2)
  free = one_step(tx, jit)
  skip = optax.stateless(
    lambda u, p: jax.tree.map(lambda x: jnp.where(emit, x, jnp.zeros_like(x)), u)
  )
  assert equal(one_step(optax.chain(tx, skip), jit), free if emit else PARAMS)


def test_updates_cross_programs():
  """Made by one program and applied by another, stacked or batched on the way."""
  tx = eco.adamw(1e-2)
  updates, _ = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
  wanted = one_step(tx, True)
  assert equal(jax.jit(eco.apply_updates)(PARAMS, updates), wanted)
  zeros = jax.tree.map(jnp.zeros_like, updates)
  assert equal(jax.jit(eco.apply_updates)(PARAMS, zeros), PARAMS)
  stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  both = jax.vmap(eco.apply_updates)(stack(PARAMS, PARAMS), stack(updates, zeros))
  assert equal(jax.tree.map(lambda x: x[0], both), wanted)
  assert equal(jax.tree.map(lambda x: x[1], both), PARAMS)


def test_a_guard_costs_nothing_where_the_update_is_applied_at_once():
  """The selection between old and new codes is gone from the compiled program."""
  tx = eco.adamw(1e-3)
  shapes = lambda: {"w": eco.quantize(jnp.ones((1024, 1024)), eco.FP8)}
  params = jax.eval_shape(shapes)
  state, grads = jax.eval_shape(tx.init, params), jax.eval_shape(eco.dequantize, params)

  def guarded(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  def unguarded(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(as_parameter, updates, is_leaf=is_quantized), state

  used = [
    jax.jit(step, donate_argnums=(1, 2)).lower(grads, state, params).compile().memory_analysis()
    for step in (guarded, unguarded)
  ]
  assert used[0].temp_size_in_bytes == used[1].temp_size_in_bytes
  assert used[0].alias_size_in_bytes == used[1].alias_size_in_bytes


def moved(tx, steps=200):
  params = eco.quantize({"k": START["k"], "frozen": START["frozen"]}, eco.FP8)
  first, grads = eco.dequantize(params), {"k": jnp.ones((64, 32)), "frozen": jnp.ones((64, 32))}

  def step(_, kept):
    params, state = kept
    updates, state = tx.update(grads, state, params, value=jnp.float32(1.0))
    return eco.apply_updates(params, updates), state

  kept = jax.jit(lambda kept: jax.lax.fori_loop(0, steps, step, kept))((params, tx.init(params)))
  return float(jnp.mean(first["k"] - eco.dequantize(kept[0])["k"]))


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 20, 300, 2e-4)
LENGTH = float(sum(SCHEDULE(i) for i in range(200)))  # Of Adam's way under a constant gradient.


@pytest.mark.parametrize(
  ("name", "inner", "schedule"),
  [
    ("plain", lambda: optax.adamw(SCHEDULE, b1=0.5, weight_decay=0.0), SCHEDULE),
    (
      "a counter of something else",
      lambda: optax.chain(
        optax.adamw(SCHEDULE, b1=0.5, weight_decay=0.0),
        optax.contrib.reduce_on_plateau(patience=10**6),
      ),
      SCHEDULE,
    ),
    (
      "a schedule of negative rates",
      lambda: optax.chain(
        optax.scale_by_adam(b1=0.5), optax.scale_by_schedule(lambda count: -SCHEDULE(count))
      ),
      lambda count: -SCHEDULE(count),
    ),
  ],
)
def test_the_rule_follows_the_schedules_own_count(name, inner, schedule):
  """Small steps arrive whatever else the optimizer counts; naive rounding moves by 1% of that."""
  tx = eco.error_feedback_to_momentum(inner(), nearest(), schedule)
  # Weights that all go one way trail behind their proposals by half a step of the grid at most.
  k = PARAMS["k"]
  half = k.apply_scale(rounding.grid_step(k.codes.astype(jnp.float32), k.format.dtype)) / 2
  assert LENGTH - float(jnp.mean(half)) < moved(tx) < LENGTH


def test_a_frozen_leaf_does_not_hide_an_optimizer_that_cannot_carry_errors():
  frozen = optax.masked(optax.set_to_zero(), {"frozen": True, "k": False, "b": False})
  for name, stock in {
    "Lion": optax.lion(1e-3),
    "LAMB": optax.lamb(1e-3),
    "Lion after 2,000 steps at a rate of zero": optax.lion(
      optax.linear_schedule(0.0, 1e-3, 100, transition_begin=2000)
    ),
  }.items():
    tx = eco.error_feedback_to_momentum(optax.chain(stock, frozen), nearest())
    with pytest.raises(ValueError, match="leaf 'k'"):
      tx.init(PARAMS)
    assert name
  eco.error_feedback_to_momentum(optax.chain(optax.adamw(1e-3), frozen), nearest()).init(PARAMS)
