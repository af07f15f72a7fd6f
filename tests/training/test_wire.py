"""Runs whose devices exchange compressed gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.training import checkpoints, loop, memory, sharding
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

DEVICES = 4
DATA = {"source": "random tokens"}
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17), dtype=np.int32)


def get_config(**changes):
  config = config_lib.defaults()
  config.model.update(layers=1, width=32, heads=2, mlp_width=64, vocabulary=64)
  config.batch_size, config.length, config.steps = 8, 16, 20
  config.accumulation = 2
  config.optimizer.learning_rate = 1e-2
  config.mesh.update(data=-1, fsdp=1)
  config.wire = "int4"
  config.update_from_flattened_dict(changes)
  return config


def prepared(devices=DEVICES, **changes):
  config = get_config(**changes)
  tx, mesh = loop.prepare(config, jax.devices()[:devices])
  return config, tx, mesh


def batch_on(mesh, weights=None):
  place = sharding.batch_sharding(mesh)
  put = lambda x: None if x is None else jax.device_put(x, place)
  return pipeline.Batch(put(TOKENS), put(weights))


@pytest.fixture(scope="module")
def made():
  """A config, its mesh, first state, compiled step and the step's HLO."""
  with jax.numpy_dtype_promotion("standard"):
    config, tx, mesh = prepared()
    state = step_lib.init_state(config, tx, mesh)
    batch = batch_on(mesh, np.ones((8, 16), np.float32))
    with jax.set_mesh(mesh):
      compiled = step_lib.make_train_step(config, tx, mesh).lower(state, batch).compile()
    # Steps donate their state.
    copies = lambda: jax.tree.map(jnp.copy, state)
    return config, tx, mesh, copies, lambda state: compiled(state, batch), compiled


def test_gradients_cross_the_wire_in_codes_of_four_bits(made):
  _, _, _, copies, _, compiled = made
  state = copies()
  found = compile_lib.collectives(compiled.as_text())
  leaves = [x for x in jax.tree.leaves(state.wire.own)]
  values = sum(x.size // DEVICES for x in leaves)
  rows = state.wire.server.shape[0] * state.wire.server.shape[1]
  assert values <= 64 * rows < values + 64 * (len(leaves) + DEVICES)
  norms = sum(x.size for x in jax.tree.leaves(eco.dequantize(state.params))) - values
  for kind in ("all-to-all", "all-gather"):
    assert found[kind]["u8"]["bytes"] == 32 * rows  # Two codes in a byte.
    # Of all leaves, behind the last part of a batch; norms' scales are exchanged exactly.
    assert found[kind]["u8"]["count"] == 1
    assert found[kind]["f32"]["bytes"] == 4 * rows + 4 * norms
  assert sum(x["bytes"] for x in found["all-reduce"].values()) < 100  # Metrics.
  assert memory.per_device(state)["errors"] == 4 * (values + 64 * rows // DEVICES + 1)


def test_runs_learn_and_go_on_from_a_checkpoint_bit_for_bit(made, tmp_path):
  config, tx, mesh, copies, step, _ = made
  state, losses = copies(), []
  store = checkpoints.manager(tmp_path, 2)
  for i in range(6):
    state, metrics = step(state)
    losses.append(float(metrics["loss"]))
    if i == 2:
      checkpoints.save(store, 3, state, config, DATA, {"eco_optax": "0"}, {})
      checkpoints.finish(store)
  assert losses[-1] < losses[0] - 0.2
  assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(state.wire.own))

  target = step_lib.abstract_state(config, tx, mesh)
  saved = checkpoints.restore(store, target, config, DATA)
  again = saved.state
  assert saved.step == 3
  for _ in range(3):
    again, _ = step(again)
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      jax.lax.bitcast_convert_type(x, jnp.uint8), jax.lax.bitcast_convert_type(y, jnp.uint8)
    ),
    again,
    state,
  )

  # On other devices the run does not go on, but its weights can be read.
  config, tx, mesh = prepared(2)
  target = step_lib.abstract_state(config, tx, mesh)
  with pytest.raises(ValueError, match=r"has the errors of 4 devices.* has 2: continue on 4 dev"):
    checkpoints.restore(store, target, config, DATA)
  read = checkpoints.restore(store, target, config, DATA, read_only=True).state
  assert jax.tree.leaves(read.wire.own)[0].shape[0] == DEVICES
  store.close()


def test_a_step_that_is_not_finite_is_skipped_by_all_devices(made):
  _, _, mesh, copies, step, compiled = made
  state, _ = step(copies())
  before = jax.device_get(state)
  weights = np.ones((8, 16), np.float32)
  weights[5, 3] = np.inf  # Of the third device.
  after, metrics = compiled(state, batch_on(mesh, weights))
  assert int(metrics["skipped"]) == 1
  assert int(metrics["bad_leaf"]) >= 0
  for name in ("params", "wire"):
    jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
  after, metrics = step(after)
  assert int(metrics["bad_leaf"]) == -1
  assert np.isfinite(metrics["loss"])


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match=r"wire 'int4' needs whole parameters.*there is mesh.fsdp 4"):
    prepared(**{"mesh.data": 1, "mesh.fsdp": 4})
  for changes, message in (
    ({"release": True}, "wire 'int4' and release True exclude each other"),
    ({"reduction_groups": 4}, "wire 'int4' and reduction_groups 4 exclude each other"),
    ({"wire": "int5"}, "wire must be one of none, fp8, int4"),
    ({"wire_method": "hope"}, "wire_method must be one of error_feedback, ef21, econtrol"),
  ):
    with pytest.raises(ValueError, match=message):
      prepared(**changes)
