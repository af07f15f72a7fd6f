"""Packed parameters in Linen's train state, against the same steps without it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

nn = pytest.importorskip("flax.linen")

from flax import serialization  # noqa: E402
from flax.training import train_state  # noqa: E402

from eco_optax.linen import TrainState  # noqa: E402

# Flax's own layers add what is not of one dtype.
pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jnp.sin(X)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x))
    return nn.Dense(16)(nn.Dropout(0.1, deterministic=not train)(nn.gelu(x)))


class WithStatistics(TrainState):
  batch_stats: Any


def loss_fn(params, batch_stats, key):
  y, changed = Net().apply(
    {"params": params, "batch_stats": batch_stats},
    X,
    mutable=["batch_stats"],
    rngs={"dropout": key},
  )
  return jnp.mean((y - Y) ** 2), changed["batch_stats"]


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def step(state):
  grad_fn = eco.value_and_grad(loss_fn, has_aux=True)
  key = jax.random.fold_in(jax.random.key(1), state.step)
  (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, key)
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def create(format, tx, state=WithStatistics):
  variables = Net().init(jax.random.key(0), X, train=False)
  params = eco.quantize(variables["params"], format)
  extra = {"batch_stats": variables["batch_stats"]} if state is WithStatistics else {}
  return state.create(apply_fn=Net().apply, params=params, tx=tx, **extra)


@pytest.mark.parametrize(
  ("format", "tx"),
  [
    (eco.FP8, eco.adamw(1e-2)),
    (
      eco.INT4,
      eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params(), learning_rate=1e-2),
    ),
  ],
  ids=["adamw", "rule"],
)
def test_train_state_takes_the_steps_of_plain_trees(format, tx):
  state = create(format, tx)
  assert state.params["Dense_0"]["kernel"].format == format
  params, opt_state, batch_stats = state.params, state.opt_state, state.batch_stats

  @jax.jit
  def plain(params, opt_state, batch_stats, i):
    key = jax.random.fold_in(jax.random.key(1), i)
    grad_fn = eco.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads = grad_fn(params, batch_stats, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eco.apply_updates(params, updates), opt_state, batch_stats, loss

  compiled = jax.jit(step)
  losses = []
  for i in range(10):
    state, loss = compiled(state)
    params, opt_state, batch_stats, wanted = plain(params, opt_state, batch_stats, i)
    losses.append(float(loss))
    assert losses[-1] == float(wanted)
  assert losses[-1] < 0.5 * losses[0]
  assert int(state.step) == 10
  assert same(state.params, params)
  assert same(state.opt_state, opt_state)
  assert same(state.batch_stats, batch_stats)
  # Flax's own serialization saves it, and training goes on.
  again = serialization.from_bytes(create(format, tx), serialization.to_bytes(state))
  (state, a), (again, b) = compiled(state), compiled(again)
  assert float(a) == float(b)
  assert same(state.params, again.params)


def test_states_that_add_updates_are_refused_by_name():
  state = create(eco.FP8, eco.adamw(1e-2), train_state.TrainState)
  grads = jax.tree.map(jnp.zeros_like, eco.dequantize(state.params))
  with pytest.raises(ValueError, match=r"there are .* eco_optax\.linen\.TrainState"):
    state.apply_gradients(grads=grads)
  state = create(eco.FP8, optax.sgd(1e-2), TrainState)
  with pytest.raises(ValueError, match=r"'Dense_0/kernel' is packed, but its update is not"):
    state.apply_gradients(grads=grads)
  with pytest.raises(ValueError, match="of Flax's FP8 layers"):
    state.apply_gradients(grads={"params": grads, "_overwrite_with_gradient": {}})


def test_annotated_parameters_are_packed_in_their_boxes():
  init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
  model = nn.Dense(8, kernel_init=init)
  params = eco.quantize(model.init(jax.random.key(0), X)["params"], eco.FP8)
  assert isinstance(params["kernel"], nn.Partitioned)
  state = TrainState.create(apply_fn=model.apply, params=params, tx=eco.adamw(1e-2))
  loss = lambda params: jnp.mean(model.apply({"params": params}, X) ** 2)
  before = loss(eco.dequantize(params))
  for _ in range(3):
    state = state.apply_gradients(grads=eco.value_and_grad(loss)(state.params)[1])
  assert isinstance(state.params["kernel"].value, eco.QuantizedArray)
  assert loss(eco.dequantize(state.params)) < before
