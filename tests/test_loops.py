"""Training loops of others: explicit sums over devices, `pmap`, accumulated gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

pytestmark = pytest.mark.standard_promotion

P = jax.sharding.PartitionSpec
COUNT, STEPS = 4, 4
# All sums of the gradients are exact, so that they are the same in any order: codes of 4 bits times
# powers of two, inputs in quarters.
FORMAT = eco.Format("float8_e4m3fn", power_of_two=True)
quarters = lambda seed, *shape: jnp.round(4 * jax.random.normal(jax.random.key(seed), shape)) / 4
BATCH = quarters(0, 32, 16), quarters(1, 32, 8)
START = {"w": quarters(2, 16, 8) / 2, "c": jnp.ones(())}


def loss_fn(params, batch, multiply=jnp.matmul):
  """Of a linear model, and of a float leaf whose gradient is the inputs' mean."""
  x, y = batch
  return jnp.mean((multiply(x, params["w"]) - y) ** 2) + params["c"] * jnp.mean(x)


TRANSFORMATIONS = {
  "sgd": lambda **q: eco.sgd(2.0**-7, **q),
  "adamw": lambda **q: eco.adamw(1e-2, **q),
  "rule": lambda **q: eco.error_feedback_to_momentum(optax.nadam(1e-2), eco.quantize_params(**q)),
  "master weights": lambda **q: eco.master_weights(optax.lion(1e-2), eco.quantize_params(**q)),
}


def setting(name, storage):
  packed = eco.quantize(START, FORMAT)
  if storage == "packed":
    return TRANSFORMATIONS[name](), packed
  return TRANSFORMATIONS[name](format=FORMAT), eco.dequantize(packed)


def stepper(tx, gradients):
  """A step of a loop, from a function of parameters and a batch that returns gradients."""

  def step(params, state, batch):
    updates, state = tx.update(gradients(params, batch), state, params)
    return eco.apply_updates(params, updates), state

  return step


def train(step, tx, params, batch=BATCH):
  state = tx.init(params)
  for _ in range(STEPS):
    params, state = step(params, state, batch)
  return jax.device_get(params)


def assert_same(found, wanted):
  """Codes, scales and float leaves, to the bit."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@functools.cache
def on_one_device(name, storage):
  tx, params = setting(name, storage)
  whole = lambda params, batch: eco.value_and_grad(loss_fn)(params, batch)[1]
  wanted = train(jax.jit(stepper(tx, whole)), tx, params)
  moved = eco.dequantize(wanted)["w"] != eco.dequantize(params)["w"]
  assert np.mean(moved) > 0.2
  return wanted


def mean_of_loss(params, batch):
  """Gradients of the mean of all devices' losses, which are summed where weights are shared."""
  return eco.value_and_grad(lambda p: jax.lax.pmean(loss_fn(p, batch), "data"))(params)[1]


def explicit_sum(params, batch, dense=True):
  """Each device's own gradients, with respect to weights that are its own, then their mean."""
  if hasattr(jax.lax, "pcast"):
    own = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params)
  else:
    own = jax.tree.map(lambda x: jax.lax.pvary(x, "data"), params)
  own_gradients = eco.value_and_grad(
    lambda p: loss_fn(p, batch, jnp.matmul if dense else eco.matmul), dense=dense
  )(own)[1]
  return jax.lax.pmean(own_gradients, "data")


def local_sum(params, batch):
  return jax.lax.pmean(eco.value_and_grad(loss_fn)(params, batch)[1], "data")


SHARDED = {
  "mean of the loss": (mean_of_loss, True),
  "explicit sum": (explicit_sum, True),
  "explicit sum, codes": (functools.partial(explicit_sum, dense=False), True),
  "explicit sum, unchecked": (local_sum, False),
}


CASES = [
  *(("sgd", storage, mode) for storage in ("packed", "emulated") for mode in SHARDED),
  *((name, "packed", "explicit sum") for name in TRANSFORMATIONS if name != "sgd"),
]


@pytest.mark.parametrize(("name", "storage", "mode"), CASES)
def test_a_shard_map_loop_trains_as_one_device(name, storage, mode):
  gradients, check = SHARDED[mode]
  tx, params = setting(name, storage)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:COUNT]), ("data",))
  how = {"mesh": mesh, "in_specs": (P(), P(), P("data")), "out_specs": P(), "check_vma": check}
  step = jax.jit(jax.shard_map(stepper(tx, gradients), **how))
  assert_same(train(step, tx, params), on_one_device(name, storage))


@pytest.mark.parametrize("multiply", [jnp.matmul, eco.matmul])
def test_weights_that_are_shared_have_their_gradient_summed(multiply):
  """JAX does so inside `shard_map`; without `check_vma` it leaves it to the loop."""
  packed = eco.quantize(START, FORMAT)
  gradients = lambda p, batch: eco.value_and_grad(
    lambda p: loss_fn(p, batch, multiply), dense=multiply is jnp.matmul
  )(p)[1]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:COUNT]), ("data",))
  how = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}
  found = jax.jit(jax.shard_map(gradients, **how))(packed, BATCH)
  wanted = jax.tree.map(lambda g: COUNT * g, gradients(packed, BATCH))
  assert_same(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize("storage", ["packed", "emulated"])
@pytest.mark.parametrize("copies", [False, True], ids=["shared", "a copy each"])
def test_a_pmap_loop_trains_as_one_device(copies, storage):
  tx, params = setting("sgd", storage)
  step = stepper(tx, local_sum)
  batch = jax.tree.map(lambda x: x.reshape(COUNT, -1, *x.shape[1:]), BATCH)
  axes = 0 if copies else None
  devices = jax.devices()[:COUNT]
  run = jax.pmap(step, axis_name="data", in_axes=(axes, axes, 0), out_axes=axes, devices=devices)
  if not copies:
    return assert_same(train(run, tx, params, batch), on_one_device("sgd", storage))
  params, state = jax.tree.map(lambda x: jnp.stack([x] * COUNT), (params, tx.init(params)))
  for _ in range(STEPS):
    params, state = run(params, state, batch)
  for i in range(COUNT):
    own = jax.device_get(jax.tree.map(lambda x, i=i: x[i], params))
    assert_same(own, on_one_device("sgd", storage))


MICRO = jax.tree.map(lambda x: x.reshape(COUNT, -1, *x.shape[1:]), BATCH)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_that_are_added_by_hand(name):
  tx, params = setting(name, "packed")

  def gradients(params, batches):
    def add(total, batch):
      return jax.tree.map(jnp.add, total, eco.value_and_grad(loss_fn)(params, batch)[1]), None

    zeros = jax.tree.map(jnp.zeros_like, eco.dequantize(params))
    total, _ = jax.lax.scan(add, zeros, batches)
    return jax.tree.map(lambda g: g / COUNT, total)

  found = train(jax.jit(stepper(tx, gradients)), tx, params, MICRO)
  assert_same(found, on_one_device(name, "packed"))


@pytest.mark.parametrize("storage", ["packed", "emulated"])
def test_multi_steps_take_the_step_of_the_mean(storage):
  """Inside of the rule on packed weights, around it on emulated ones; nothing moves meanwhile."""
  emulates = {"format": FORMAT} if storage == "emulated" else {}
  quantizer = eco.quantize_params(rounding="nearest", **emulates)
  rule = lambda inner: eco.error_feedback_to_momentum(inner, quantizer)
  stock = optax.sgd(2.0**-7, 0.5)
  if storage == "packed":
    tx = rule(optax.MultiSteps(stock, COUNT).gradient_transformation())
  else:
    tx = optax.MultiSteps(rule(stock), COUNT)
  _, params = setting("sgd", storage)
  whole = lambda params, batch: eco.value_and_grad(loss_fn)(params, batch)[1]
  wanted = train(jax.jit(stepper(rule(stock), whole)), rule(stock), params)
  step, state = jax.jit(stepper(tx, whole)), tx.init(params)
  for _ in range(STEPS):
    before = jax.device_get(params)
    for i in range(COUNT):
      assert_same(jax.device_get(params), before)
      params, state = step(params, state, jax.tree.map(lambda x, i=i: x[i], MICRO))
  assert_same(jax.device_get(params), wanted)


WRONG = {
  "buffers of codes": lambda params, grads: jax.tree.map(
    jnp.add, jax.tree.map(jnp.zeros_like, params), grads
  ),
  "buffers of codes, gradients first": lambda params, grads: jax.tree.map(
    lambda g, total: total + g, grads, jax.tree.map(jnp.zeros_like, params)
  ),
  "gradients of codes": lambda params, grads: stepper(
    eco.sgd(0.1),
    lambda p, batch: jax.tree.map(
      jnp.add, jax.tree.map(jnp.zeros_like, p), jax.grad(lambda p: jnp.sum(p["w"][:]))(p)
    ),
  )(params, eco.sgd(0.1).init(params), BATCH),
  "MultiSteps around": lambda params, grads: optax.MultiSteps(eco.sgd(0.1), COUNT).update(
    grads, optax.MultiSteps(eco.sgd(0.1), COUNT).init(params), params
  ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("format", [eco.FP8, eco.INT8, eco.INT4], ids=["FP8", "INT8", "INT4"])
def test_accumulation_that_would_train_to_nothing_is_an_error(format, name):
  params = eco.quantize(START, format)
  grads = jax.tree.map(jnp.ones_like, eco.dequantize(params))
  for call in (WRONG[name], jax.jit(WRONG[name])):
    with pytest.raises((TypeError, ValueError), match=r"eco_optax|QuantizedArray|real- or complex"):
      call(params, grads)
