"""Compositions with stock transformations: right, or an error names the leaf and the remedy."""

import collections
import dataclasses
import functools

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


REFUSED = {
  "the rule over eco.adamw": (
    lambda: eco.error_feedback_to_momentum(eco.adamw(1e-3), nearest()),
    "use eco_optax.adamw and eco_optax.sgd by themselves",
  ),
  "master weights over eco.adamw": (
    lambda: eco.master_weights(eco.adamw(1e-3), nearest()),
    "takes a stock optimizer",
  ),
  "a link behind a packed one": (
    lambda: eco.chain(eco.adamw(1e-3), nearest()),
    "link 0 of 2 of eco_optax.chain moves packed parameters",
  ),
  "moments in few bits inside the rule": (
    lambda: eco.error_feedback_to_momentum(
      eco.low_bit_moments(optax.adamw(1e-3)), nearest()
    ).update(
      GRADS,
      eco.error_feedback_to_momentum(eco.low_bit_moments(optax.adamw(1e-3)), nearest()).init(
        PARAMS
      ),
      PARAMS,
    ),
    "put eco_optax.low_bit_moments around eco_optax.error_feedback_to_momentum",
  ),
  "emulation in bfloat16": (
    lambda: eco.quantize_params(eco.FP8).init({"k": jnp.ones((4, 4), jnp.bfloat16)}),
    "leaf 'k' is bfloat16.*keep the parameters in float32",
  ),
  "a traced learning rate": (
    lambda: jax.jit(
      lambda rate: eco.error_feedback_to_momentum(optax.adamw(rate), nearest()).init(PARAMS)
    )(1e-3),
    "traced value.*inject_hyperparams",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_compositions_are_refused_with_the_remedy(name):
  make, message = REFUSED[name]
  with pytest.raises(ValueError, match=f"(?s){message}"):
    make()


TOTALS = {
  "norm": lambda p: optax.tree.norm(p),
  "sum": lambda p: optax.tree.sum(p),
  "vdot": lambda p: optax.tree.vdot(p, p),
  "cast": lambda p: optax.tree.cast(p, jnp.bfloat16),
}
AVERAGES = {
  "incremental_update": lambda p: optax.incremental_update(p, p, 0.1),
  "scale": lambda p: optax.tree.scale(0.5, p),
  "add_scale": lambda p: optax.tree.add_scale(p, 0.5, p),
}


@pytest.mark.parametrize("format", [eco.FP8, eco.INT8, eco.INT4, eco.MXFP8, eco.NVFP4], ids=repr)
def test_tree_functions_that_compute_on_codes_are_refused(format):
  params = eco.quantize(START, format)
  # Float8 codes stay float8 under arithmetic with Python numbers, which nothing can see.
  averages = {} if format.bits == 8 and format.dtype != "int8" else AVERAGES
  for name, fn in (TOTALS | averages).items():
    for call in (fn, jax.jit(fn)):
      with pytest.raises(TypeError, match=r"eco_optax.dequantize|does not accept dtype"):
        call(params)
    assert name
    fn(eco.dequantize(params))
  assert jax.tree.all(jax.tree.map(lambda x: jnp.all(x == x), params))


def test_an_average_of_packed_parameters_is_one_of_the_dense_view():
  tx = eco.adamw(1e-2)
  params, state, average = PARAMS, tx.init(PARAMS), eco.dequantize(PARAMS)
  wanted = jax.tree.map(np.asarray, average)
  for _ in range(3):
    updates, state = tx.update(GRADS, state, params)
    params = eco.apply_updates(params, updates)
    average = optax.incremental_update(eco.dequantize(params), average, 0.1)
    wanted = jax.tree.map(lambda w, p: 0.9 * w + 0.1 * p, wanted, eco.dequantize(params))
  np.testing.assert_allclose(average["k"], wanted["k"], rtol=1e-5)
  eco.quantize(average, eco.FP8)


BAD_GRADIENTS = {
  "None": ({**GRADS, "k": None}, "leaf 'k' has no gradient"),
  "missing": ({"k": GRADS["k"], "b": GRADS["b"]}, "leaf 'frozen' has no gradient"),
  "one too many": ({**GRADS, "z": GRADS["b"]}, "gradient of leaf 'z', which the parameters do not"),
  "would be broadcast": ({**GRADS, "k": GRADS["k"][:1]}, r"leaf 'k' has shape \(1, 32\)"),
  "of codes": (PARAMS, "gradient of leaf 'frozen' is packed.*eco_optax.value_and_grad"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
@pytest.mark.parametrize("packed", PACKED)
def test_gradients_that_do_not_belong_to_the_parameters_are_named(packed, name):
  grads, message = BAD_GRADIENTS[name]
  tx = PACKED[packed]()
  with pytest.raises(ValueError, match=f"(?s){message}"):
    jax.eval_shape(tx.update, grads, jax.eval_shape(tx.init, PARAMS), PARAMS)


def one_update(tx, grads, params):
  return tx.update(grads, tx.init(params), params)


def test_keys_and_integers_among_parameters_are_named():
  for leaf, dtype in ((jax.random.key(0), "key<fry>"), (jnp.int32(1), "int32")):
    params = {**PARAMS, "r": leaf}
    with pytest.raises(ValueError, match=f"leaf 'r' holds {dtype}"):
      eco.value_and_grad(lambda p: jnp.sum(p["k"]))(params)
    grads = {**GRADS, "r": np.zeros((), jax.dtypes.float0)}
    with pytest.raises(ValueError, match=f"leaf 'r' holds {dtype}"):
      one_update(eco.adamw(1e-3), grads, params)


@pytest.mark.parametrize("rate", ["1e-3", [1e-3], np.ones(1), jnp.ones(3), 1j, float("nan"), True])
def test_a_rate_that_is_not_a_number_is_named(rate):
  for make in (
    eco.adamw,
    eco.sgd,
    lambda rate: eco.error_feedback_to_momentum(optax.adamw(1e-3), nearest(), rate),
  ):
    with pytest.raises(ValueError, match="learning_rate"):
      make(rate)
  with pytest.raises(ValueError, match="schedule learning_rate gives"):
    eco.adamw(lambda count: jnp.ones(3))
  with pytest.raises(ValueError, match="b1 must be a number"):
    eco.adamw(1e-3, b1="0.9")
  with pytest.raises(ValueError, match="seed must be an integer"):
    eco.quantize_params(seed=0.5)


def test_masks_made_over_packed_parameters_are_refused_with_the_remedy():
  mask = jax.tree.map(lambda x: x.ndim >= 2, PARAMS)
  none = jax.tree.map(lambda x: False, PARAMS)
  remedy = r"(?s)one for each leaf: jax.tree.map\(lambda x: x.ndim >= 2, eco_optax.dequantize"
  for tx in (
    eco.adamw(1e-3, mask=mask),
    eco.chain(optax.masked(optax.adam(1e-3), mask), nearest()),
    eco.master_weights(optax.masked(optax.sgd(1e-3), mask), nearest()),
    eco.error_feedback_to_momentum(
      optax.partition(dict.fromkeys((True, False), optax.adamw(1e-3)), mask), nearest()
    ),
    optax.masked(eco.adamw(1e-3), none),
  ):
    with pytest.raises(ValueError, match=remedy):
      tx.init(PARAMS)
  right = jax.tree.map(lambda x: x.ndim >= 2, eco.dequantize(PARAMS))
  one_step(eco.adamw(1e-3, mask=right), True)


@pytest.mark.parametrize(
  "wrap",
  [
    eco.layer_by_layer,
    eco.low_bit_moments,
    lambda tx: eco.low_bit_moments(eco.layer_by_layer(tx)),
  ],
  ids=["layer_by_layer", "low_bit_moments", "both"],
)
def test_a_leaf_that_is_frozen_inside_a_wrapper_stays(wrap):
  params = eco.quantize(
    {"k": jnp.stack([START["k"]] * 3), "f": jnp.stack([START["k"]] * 3)}, eco.FP8
  )
  frozen = optax.masked(optax.set_to_zero(), {"k": False, "f": True})
  rule = eco.error_feedback_to_momentum(optax.adamw(1e-2), nearest())
  tx = wrap(optax.chain(rule, frozen))

  @jax.jit
  def step(params):
    updates, _ = tx.update(eco.dequantize(params), tx.init(params), params)
    return eco.apply_updates(params, updates)

  found = step(params)
  assert np.array_equal(found["f"].dequantize(), params["f"].dequantize())
  assert not np.array_equal(found["k"].dequantize(), params["k"].dequantize())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("wrap", [lambda tx: tx, eco.layer_by_layer], ids=["whole", "by layer"])
@pytest.mark.parametrize("keep", ["rule", "master"])
def test_a_frozen_leaf_keeps_scales_that_it_would_not_find_again(keep, wrap, rounding):
  # Quantized again, both would move: NVFP4's largest codes may be 4 after stochastic rounding, and
  # another library may have chosen scales by which no code is the largest.
  x = jax.random.normal(jax.random.key(2), (2, 64, 32))
  theirs = eco.quantize(x, eco.INT8)
  theirs = dataclasses.replace(
    theirs, qvalue=(theirs.qvalue // 2).astype(jnp.int8), scale=2 * theirs.scale
  )
  params = {"k": eco.quantize(x, eco.NVFP4, rounding="stochastic", key=1), "theirs": theirs, "f": x}
  again = eco.quantize(params, eco.NVFP4)["k"], eco.quantize(theirs.dequantize(), eco.INT8)
  assert not any(map(equal, again, (params["k"], theirs)))
  mask = {"k": True, "theirs": True, "f": False}
  inner = optax.chain(optax.adamw(1e-2), optax.masked(optax.set_to_zero(), mask))
  quantizer = eco.quantize_params(rounding=rounding)
  rule = eco.error_feedback_to_momentum(inner, quantizer, 1e-2)
  tx = wrap(rule if keep == "rule" else eco.master_weights(inner, quantizer, "int8"))

  @jax.jit
  def step(params, state):
    updates, state = tx.update(eco.dequantize(params), state, params)
    return eco.apply_updates(params, updates), state

  found, state = step(params, tx.init(params))
  found, _ = step(found, state)
  assert equal(found["k"], params["k"])
  assert equal(found["theirs"], theirs)
  assert not equal(found["f"], x)


ADAMW, SGD = eco.adamw(1e-3), eco.sgd(1e-3, momentum=0.9)
RULE = lambda keep: eco.error_feedback_to_momentum(optax.sgd(1e-3, 0.9), nearest(), None, keep)
MASTER = lambda kind: eco.master_weights(optax.sgd(1e-3), nearest(), kind)
STATES = {
  "another optimizer's": (ADAMW, SGD, "has no ScaleByAdamState"),
  "without low bits": (eco.low_bit_moments(ADAMW), ADAMW, "is a ErrorFeedbackState"),
  "in low bits": (ADAMW, eco.low_bit_moments(ADAMW), "is a LowBitMomentsState"),
  "other low bits": (
    eco.low_bit_moments(ADAMW),
    eco.low_bit_moments(ADAMW, "int8", "float8_e4m3fn"),
    "moment 'inner/0/mu/.*is int8, but .* stores it in float8_e4m3fn",
  ),
  "keep_error switched": (RULE(True), RULE(False), "keep_error is True"),
  "another residual": (MASTER("int8"), MASTER("int16"), "residual of leaf 'frozen'.*is int16"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_kind_is_refused(name):
  tx, other, message = STATES[name]
  with pytest.raises(ValueError, match=message):
    tx.update(GRADS, other.init(PARAMS), PARAMS)


def test_a_layer_that_the_state_does_not_know_is_named():
  tx = eco.error_feedback_to_momentum(optax.adamw(1e-3), nearest())
  state = tx.init({"k": PARAMS["k"], "b": PARAMS["b"]})
  with pytest.raises(ValueError, match=r"frozen|structure"):
    tx.update(GRADS, state, PARAMS)


def test_an_eager_step_without_jit():
  tx = eco.adamw(1e-3)
  wanted = one_step(tx, True)
  with jax.disable_jit():
    assert equal(one_step(tx, False)["k"], wanted["k"])


def test_scalars_and_bfloat16_leaves_keep_their_moments_dtype():
  params = {"k": PARAMS["k"], "gate": jnp.zeros((), jnp.bfloat16), "none": jnp.zeros((0, 4))}
  tx = eco.low_bit_moments(eco.adamw(1e-3), "bfloat16", "bfloat16")
  grads = {"k": GRADS["k"], "gate": jnp.bfloat16(1), "none": jnp.zeros((0, 4))}
  step = lambda state, _: (tx.update(grads, state, params)[1], None)
  state, _ = jax.lax.scan(step, tx.init(params), None, length=2)
  assert state.inner.inner[0].mu["gate"].dtype == jnp.bfloat16


def test_a_leaf_whose_scales_are_as_many_as_its_codes_is_warned_of():
  kernel = jnp.ones((32, 1, 16))
  with pytest.warns(UserWarning, match=r"leaf 'q' of shape \(32, 1, 16\) takes 5.0 bytes"):
    eco.quantize({"q": kernel}, eco.FP8)
  summed = eco.Format("float8_e4m3fn", contraction_axis=(-3, -2))
  packed = eco.quantize({"q": kernel}, summed)["q"]
  assert packed.nbytes / packed.size < 1.2


@pytest.mark.parametrize("tx", ["eco.adamw", "rule", "master weights", "naive"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_mesh_with_explicit_axes(tx, count):
  """Which JAX's own `make_mesh` makes."""
  wanted = one_step(PACKED[tx](), True)
  with jax.set_mesh(jax.make_mesh((count,), ("x",), devices=jax.devices()[:count])):
    split = lambda leaf: jax.device_put(leaf, jax.P("x") if leaf.ndim > 1 else jax.P())
    params = jax.tree.map(lambda leaf: split(leaf) if leaf.shape[0] > 1 else leaf, PARAMS)
    grads = jax.tree.map(split, GRADS)
    optimizer = PACKED[tx]()

    def step(grads, state, params):
      updates, state = optimizer.update(grads, state, params)
      return eco.apply_updates(params, updates)

    found = jax.jit(step)(grads, optimizer.init(params), params)
  assert equal(found["k"].qvalue, wanted["k"].qvalue)


EVERY = {
  **PACKED,
  "eco.sgd": lambda: eco.sgd(1e-2),
  "low_bit_moments": lambda: eco.low_bit_moments(eco.adamw(1e-2)),
  "factored": lambda: eco.low_bit_moments(eco.adamw(1e-2), nu="factored"),
  "exact rule": lambda: RULE(True),
  "int12": lambda: eco.master_weights(optax.sgd(1e-2), nearest(), "int12"),
}


@functools.cache
def without_a_mesh():
  return every_step(lambda leaf: leaf)


def every_step(place):
  """One step of every transformation, in one program, of blocks that lie on a split axis."""
  start = {"s": jnp.stack([START["k"]] * 2), "v": jnp.ones(8)}
  params, grads = eco.quantize(start, eco.MXFP8), jax.tree.map(jnp.sin, start)
  params, grads = jax.tree.map(place, (params, grads))

  @jax.jit
  def step(grads, params):
    found = {}
    for name, make in EVERY.items():
      tx = make()
      updates, state = tx.update(grads, tx.init(params), params)
      found[name] = eco.apply_updates(params, updates), state
    return found

  return jax.device_get(jax.tree.map(lambda x: x, step(grads, params)))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_every_transformation_on_every_kind_of_mesh(kind, count):
  mesh = jax.make_mesh((count,), ("x",), (kind,), devices=jax.devices()[:count])

  def place(leaf):
    # A scale is split where its blocks are.
    splits = leaf.ndim == 3 and leaf.shape[1] % count == 0
    spec = jax.P(None, "x") if splits else jax.P()
    return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    found = every_step(place)
  for name, (params, _) in without_a_mesh().items():
    assert np.array_equal(found[name][0]["s"].qvalue, params["s"].qvalue), name


Fields = collections.namedtuple("Fields", "count mu nu trace")
# Trees whose parameters are called as fields of states are, in the order of "plain names".
NAMES = {
  "dict": lambda *x: dict(zip(Fields._fields, x, strict=True)),
  "nested": lambda a, b, c, d: {"mu": {"count": a, "mu": b}, "nu": {"mu": c, "nu": d}},
  "named tuple": Fields,
  "of wrappers": lambda a, b, c, d: {"inner": {"0": a, "mu": b}, "residual": c, "step": d},
}
MOVED = {
  "adamw": lambda: eco.adamw(1e-2, rounding="nearest"),
  "sgd": lambda: eco.sgd(1e-2, rounding="nearest"),
  "rule": lambda: eco.error_feedback_to_momentum(
    optax.contrib.ademamix(1e-2), nearest(), keep_error=True
  ),
  "master_weights": lambda: eco.master_weights(optax.adam(1e-2), nearest()),
  "low_bit_moments": lambda: eco.low_bit_moments(
    eco.error_feedback_to_momentum(optax.nadam(1e-2), nearest()), "bfloat16", "bfloat16"
  ),
  "factored": lambda: eco.low_bit_moments(
    eco.error_feedback_to_momentum(optax.nadam(1e-2), nearest()), "float32", "factored"
  ),
  "layer_by_layer": lambda: eco.layer_by_layer(
    eco.error_feedback_to_momentum(optax.sgd(1e-2, 0.9, accumulator_dtype=jnp.float32), nearest())
  ),
}


@functools.cache
def moved_with_names(tree):
  """Parameters and states after two steps of each optimizer, as lists of arrays."""
  make = NAMES.get(tree, lambda a, b, c, d: {"a": a, "b": b, "c": c, "d": d})
  start = make(jnp.float32(1), jnp.stack([START["k"]] * 2), START["k"], START["k"][0])
  start = eco.quantize(start, eco.FP8)

  found = {}
  for name, make in MOVED.items():
    tx = make()

    @jax.jit
    def step(params, state, tx=tx):
      grads = jax.tree.map(jnp.sin, eco.dequantize(params))
      updates, state = tx.update(grads, state, params)
      return eco.apply_updates(params, updates), state

    after = step(*step(start, tx.init(start)))
    found[name] = jax.tree.leaves(jax.device_get(after))
  return found


@pytest.mark.parametrize("tree", NAMES)
def test_parameters_may_be_called_as_fields_of_states_are(tree):
  for name, wanted in moved_with_names("plain names").items():
    found = moved_with_names(tree)[name]
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
      assert (a.dtype, a.shape) == (b.dtype, b.shape)
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      if name == "low_bit_moments":  # Their random bits follow the leaf's name: some codes differ.
        assert np.mean(~np.isclose(a, b, 2**-3, 1e-4)) < 0.01
      else:
        np.testing.assert_array_equal(a, b, err_msg=name)
