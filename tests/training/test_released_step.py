"""With `config.release` a run's steps are those without."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data.pipeline import Batch
from eco_optax.training.models import transformer

pytestmark = pytest.mark.standard_promotion  # Of Optax's schedules.


def small(**changes):
  config = config_lib.small()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, loss_chunks=2)
  config.batch_size, config.length, config.steps = 4, 16, 10
  config.optimizer.max_norm = 0.5
  config.update_from_flattened_dict(changes)
  config_lib.validate(config)
  return config


def batch_of(config, number, weights=None):
  shape = (config.batch_size, config.length + 1)
  tokens = jax.random.randint(jax.random.key(number), shape, 0, config.model.vocabulary)
  return Batch(tokens, weights)


def begin(config):
  """A run's mesh, optimizer and first state, which do not depend on how it steps."""
  sizes = {axis: max(1, size) for axis, size in config.mesh.items()}
  mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
  tx = methods.optimizer(config)
  return mesh, tx, step_lib.init_state(config, tx, mesh)


def train(config, mesh, tx, state, steps=2, weights=None):
  with jax.set_mesh(mesh):
    state = jax.tree.map(jnp.copy, state)  # A step donates it.
    step = step_lib.make_train_step(config, tx, mesh)
    rows = []
    for i in range(steps):
      batch = batch_of(config, i, None if weights is None else weights[i])
      batch = jax.device_put(batch, sharding.batch_sharding(mesh))
      state, metrics = step(state, batch)
      rows.append(jax.device_get(metrics))
  return jax.device_get(state), rows


def assert_alike(ours, theirs):
  """But for sums in another order, which may turn the rounding of a code."""

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype == np.float32:
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=name)
    else:
      assert np.mean(a != b) < 1e-3, name

  jax.tree_util.tree_map_with_path(check, ours, theirs)


@pytest.mark.parametrize(
  "changes",
  [
    {
      "model.tied_embedding": True,
      "model.quantized": "all",
      "method": "eco_rtn",
      "schedule_aware": False,
    },
    {
      "moments.mu": "float8_e4m3fn",
      "moments.nu": "float8_e4m3fn",
      "format": "INT4",
      "optimizer.clip": "previous",
      "accumulation": 2,
    },
    {
      "model.experts": 4,
      "model.experts_per_token": 2,
      "model.expert_width": 32,
      "accumulation": 2,
      "model.remat": "full",
      "mesh.expert": 2,
    },
    {
      "accumulation": 2,
      "mesh.fsdp": 2,
      "mesh.tensor": 2,
      "model.remat": "full",
      "model.quantized": "all",
      "model.vocabulary_parts": 4,
      "moments.mu": "float8_e4m3fn",
      "moments.nu": "factored",
    },
    {
      "accumulation": 2,
      "batch_size": 16,
      "mesh.data": 2,
      "mesh.fsdp": 2,
      "model.remat": "full",
      "reduce_dtype": "float32",
      "keep_gradients": True,
    },
    {"mesh.fsdp": 2, "model.quantized": "all", "method": "eco_rtn", "reduce_dtype": "float32"},
  ],
  ids=lambda changes: ", ".join(changes),
)
def test_a_released_step_is_the_ordinary_one(changes):
  plain = {key: x for key, x in changes.items() if key != "keep_gradients"}
  begun = begin(small(**plain))
  (ours, rows), (theirs, want) = (
    train(config, *begun) for config in (small(release=True, **changes), small(**plain))
  )
  for row, other in zip(rows, want, strict=True):
    assert row.keys() == other.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), row, other)
    assert row["grad_norm"] > 0.5  # So that the clip is seen.

  assert_alike(ours, theirs)


def test_groups_make_a_step_that_does_not_depend_on_the_number_of_devices():
  plain = {"batch_size": 16, "accumulation": 2}
  changes = plain | {"release": True, "reduction_groups": 4, "reduce_dtype": "float32"}
  found = {}
  for count, (data, fsdp) in {1: (1, 1), 2: (1, 2), 4: (2, 2)}.items():
    config = small(**changes, **{"mesh.data": data, "mesh.fsdp": fsdp})
    found[count] = train(config, *begin(config))
  same = lambda path, a, b: np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))
  jax.tree_util.tree_map_with_path(same, found[2], found[4])
  # XLA simplifies a program for one device otherwise, and divides in other places. The ordinary
  # step sums the same gradients in another order.
  config = small(**plain)
  for other in (found[1], train(config, *begin(config))):
    assert_alike(other[0], found[4][0])


def test_the_norm_of_the_step_before_clips():
  changes = {"optimizer.clip": "previous", "format": "INT8"}
  config = small(**changes)
  weights = np.ones((4, 4, 16), np.float32)
  weights[1] = np.nan  # The second step is skipped, and the third clips by the first one's norm.
  begun = begin(config)
  found = [
    train(small(release=on, **changes), *begun, steps=4, weights=weights) for on in (False, True)
  ]

  # By hand: gradients, their norm in float64, and the optimizer of a config with another clip.
  tx = methods.optimizer(small(format="INT8"))
  loss = functools.partial(transformer.loss, config_lib.model(config))
  gradient = jax.jit(lambda *args: eco.value_and_grad(loss, has_aux=True, dense=False)(*args)[1])
  mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
  with jax.set_mesh(mesh):
    params, opt_state, _ = step_lib.init_state(small(format="INT8"), tx, mesh)
    norms, before = [], 0.0
    for i in (0, 2, 3):
      grads = gradient(params, *batch_of(config, i, weights[i]))
      squares = [np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(grads)]
      norm = np.sqrt(sum(squares))
      scale = np.float32(min(1.0, 0.5 / before) if before else 1.0)
      updates, opt_state = tx.update(grads, opt_state, params, gradient_scale=scale)
      params, before = eco.apply_updates(params, updates), norm
      norms.append(norm)
  assert min(norms) > 0.5  # So that the clip is seen.
  for state, rows in found:
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1]
    seen = [rows[i]["grad_norm"] for i in (0, 2, 3)]
    np.testing.assert_allclose(seen, norms, rtol=1e-4)
    np.testing.assert_allclose(methods.previous_norm(state.opt_state), before, rtol=1e-4)
    assert_alike((state.params, state.opt_state[1:]), (params, opt_state[1:]))


def test_no_gradient_or_value_of_a_table_is_whole():
  config = small(
    **{"release": True, "model.quantized": "all", "model.vocabulary_parts": 8, "length": 8},
    **{"model.vocabulary": 32768, "format": "INT8", "model.loss_chunks": 8},
    **{"moments.mu": "float8_e4m3fn", "moments.nu": "float8_e4m3fn"},
  )
  mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
  tx = methods.optimizer(config)
  with jax.set_mesh(mesh):
    step = step_lib.make_train_step(config, tx, mesh)
    state = step_lib.abstract_state(config, tx, mesh)
    compiled = step.lower(state, step_lib.abstract_batch(config, mesh)).compile()
  largest = compile_lib.largest_temporaries(compiled.as_text())
  assert largest[0]["bytes"] <= 4 * 32 * 32768 / 2, largest


def test_what_does_not_go_together_is_refused():
  for changes, message in (
    ({"optimizer.clip": "layer"}, "optimizer.clip 'layer' needs release"),
    ({"kept_format": "FP8_TOKEN"}, "kept_format 'FP8_TOKEN' needs release"),
    ({"keep_gradients": True}, "keep_gradients True needs release"),
    (
      {"release": True, "keep_gradients": True, "optimizer.clip": "layer"},
      "keep_gradients and optimizer.clip 'layer' exclude each other",
    ),
    ({"release": True, "method": "bf16_mw"}, "release steps packed weights"),
    (
      {"release": True, "reduction_groups": 2, "mesh.tensor": 2},
      "release and reduction_groups 2 .* exclude mesh.tensor 2",
    ),
    ({"release": True, "model.unroll": 2}, "release takes one layer at a time"),
  ):
    with pytest.raises(ValueError, match=message):
      small(**changes)
