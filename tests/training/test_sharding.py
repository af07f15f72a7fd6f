"""Where arrays live on meshes, and that training does not depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import loop, memory, methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def tiny(**changes):
  config = config_lib.defaults()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, vocabulary=64)
  config.model.update(experts=4, experts_per_token=2, expert_width=32, dense_layers=1)
  config.batch_size, config.length, config.steps = 8, 16, 20
  config.optimizer.learning_rate = 1e-2
  config.update_from_flattened_dict(changes)
  return config


def mesh_of(config):
  return sharding.make_mesh(config.mesh.to_dict())


MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.expert": 2}


def test_codes_scales_and_moments_are_split_alike():
  config = tiny(**MESH, method="mw_sr")
  mesh = mesh_of(config)
  state = step_lib.abstract_state(config, methods.optimizer(config), mesh)
  specs = {leaf.path: leaf.array.sharding.spec for leaf in memory.leaves(state)}

  def of(end):
    found = {path: spec for path, spec in specs.items() if f"/{path}".endswith("/" + end)}
    assert found, end
    return found

  fsdp, tensor, expert = ("fsdp",), ("tensor",), ("expert",)
  both = ("tensor", "fsdp")
  wanted = {
    "blocks/attention/query/kernel": (None, both, None),
    "blocks/attention/out/kernel": (None, fsdp, tensor),
    "blocks/moe/experts/up/kernel": (None, expert, both, None),
    "blocks/moe/experts/down/kernel": (None, expert, fsdp, tensor),
    "dense_blocks/mlp/down/kernel": (None, fsdp, tensor),
  }
  for path, spec in wanted.items():
    assert specs[f"{path}/qvalue"] == PartitionSpec(*spec)
    # One scale per output channel: the contraction axis has length 1 and is not split.
    assert specs[f"{path}/scale"] == PartitionSpec(*spec[:-1], None)
    kept = of(path)  # mu, nu and the residual of master weights.
    assert len(kept) == 3
    assert set(kept.values()) == {PartitionSpec(*spec)}
  assert specs["embedding"] == PartitionSpec(tensor, fsdp)
  assert set(of("count").values()) == {PartitionSpec()}
  # 8 devices hold a quarter (fsdp × tensor) or an eighth (× expert) of each.
  per_device = memory.per_device(state)
  sizes = memory.quantized(state.params)
  experts = sum(n for path, n in sizes.items() if "experts" in path)
  assert per_device["codes"] == experts // 8 + (sum(sizes.values()) - experts) // 4
  assert per_device["residual"] == 4 * per_device["codes"]
  assert per_device["moments"] == 8 * per_device["codes"]


def test_means_of_a_factored_moment_are_split_as_the_moment_would_be():
  changes = {"moments.mu": "float8_e4m3fn", "moments.nu": "factored"}
  config = tiny(**MESH, **changes)
  mesh = mesh_of(config)
  state = step_lib.abstract_state(config, methods.optimizer(config), mesh)
  nu = {leaf.path.partition("nu/")[2]: leaf.array for leaf in memory.leaves(state)}
  experts = nu["blocks/moe/experts/up/kernel/row"], nu["blocks/moe/experts/up/kernel/column"]
  assert [x.shape[-2:] for x in experts] == [(32, 1), (1, 32)]
  assert experts[0].sharding.spec == PartitionSpec(None, ("expert",), ("tensor", "fsdp"), None)
  assert experts[1].sharding.spec == PartitionSpec(None, ("expert",), None, None)
  assert nu["embedding"].dtype == jnp.float32  # Too small to be taken for a matrix.


def test_state_is_made_where_it_belongs(first_state):
  config = tiny(**MESH)
  mesh, tx = mesh_of(config), methods.optimizer(config)
  target = step_lib.abstract_state(config, tx, mesh)
  state = step_lib.init_state(config, tx, mesh)
  jax.tree.map(lambda x, t: np.testing.assert_equal(x.sharding, t.sharding), state, target)
  # The same numbers as on one device.
  jax.tree.map(np.testing.assert_array_equal, state.params, first_state.params)


TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17), dtype=np.int32)


def one_step(config, state):
  mesh, tx = mesh_of(config), methods.optimizer(config)
  target = step_lib.abstract_state(config, tx, mesh)
  state = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), state, target)
  batch = pipeline.Batch(jax.device_put(TOKENS, sharding.batch_sharding(mesh)))
  with jax.set_mesh(mesh):
    return step_lib.make_train_step(config, tx, mesh)(state, batch)


@pytest.fixture(scope="module")
def first_state():
  """Of pure data parallelism, on the host: every mesh starts from these numbers."""
  one = tiny(**{"mesh.fsdp": 1, "mesh.data": 8})
  with jax.numpy_dtype_promotion("standard"):
    return jax.device_get(step_lib.init_state(one, methods.optimizer(one), mesh_of(one)))


@pytest.fixture(scope="module")
def step_of_pure_data_parallelism(first_state):
  with jax.numpy_dtype_promotion("standard"):
    return one_step(tiny(**{"mesh.data": 8, "mesh.fsdp": 1}), first_state)


@pytest.mark.parametrize(
  "changes",
  [
    {"mesh.data": 2, "mesh.fsdp": 4},
    {"mesh.fsdp": 2, "mesh.expert": 4},
    MESH,
    {"mesh.fsdp": 4, "mesh.tensor": 2, "accumulation": 2},
  ],
)
def test_gradients_do_not_depend_on_the_mesh(changes, first_state, step_of_pure_data_parallelism):
  state, metrics = one_step(tiny(**changes), first_state)
  wanted, wanted_metrics = step_of_pure_data_parallelism
  for name, value in wanted_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
  # After one step Adam's second moment is (1 − b2) g²; a few hundred terms in another order.
  second = lambda state: [leaf for leaf in memory.leaves(state) if "/nu/" in f"/{leaf.path}"]
  for leaf, other in zip(second(state), second(wanted), strict=True):
    scale = float(jnp.max(other.array)) + 1e-30
    np.testing.assert_allclose(leaf.array, other.array, atol=2e-5 * scale, err_msg=leaf.path)


def test_a_mesh_must_take_all_devices():
  assert dict(sharding.make_mesh({"fsdp": -1}).shape) == {
    "data": 1,
    "fsdp": 8,
    "tensor": 1,
    "expert": 1,
  }
  with pytest.raises(ValueError, match="data=3, fsdp=1, tensor=1, expert=1 does not take 8"):
    sharding.make_mesh({"data": 3})
  with pytest.raises(ValueError, match=r"unknown mesh axes \['model'\]"):
    sharding.make_mesh({"model": 8})


def test_large_arrays_left_whole_are_named():
  config = tiny(**{"mesh.fsdp": 8, "replicated_limit_mib": 0})
  with pytest.raises(ValueError, match=r"blocks/attention_norm/scale float32\[1, 32\]"):
    step_lib.abstract_state(config, methods.optimizer(config), mesh_of(config))
  # A width of 36 does not divide by 8.
  changes = {"mesh.fsdp": 8, "model.width": 36, "model.vocabulary": 65536}
  config = tiny(**changes, replicated_limit_mib=8)
  with pytest.raises(ValueError, match=r"params/embedding float32\[65536, 36\] \(9 MiB\)"):
    step_lib.abstract_state(config, methods.optimizer(config), mesh_of(config))


def test_batches_that_devices_cannot_share_are_refused():
  with pytest.raises(ValueError, match="batch_size 12 / accumulation 1 is not a multiple of the 8"):
    loop.prepare(tiny(**{"mesh.fsdp": 8, "batch_size": 12}))
  with pytest.raises(ValueError, match="reduction_groups 4 is not a multiple of the 8 devices"):
    loop.prepare(tiny(**{"mesh.fsdp": 8, "reduction_groups": 4}))


def test_packed_leaves_of_a_mesh_train_through_the_library_alone():
  # No harness: a sharded packed tree, stock jit, told where the parameters lie.
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
  w = jax.random.normal(jax.random.key(0), (3, 60, 64))  # 8 does not divide the outputs, 4 does.
  params = eco.quantize({"blocks": {"up": {"kernel": w}}}, eco.FP8.transposed)
  placed = jax.device_put(params, sharding.shardings(params, mesh))
  tx = eco.layer_by_layer(eco.low_bit_moments(eco.adamw(1e-2, seed=3)))
  grads = {"blocks": {"up": {"kernel": jnp.sin(w)}}}

  def run(params):
    state = tx.init(params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    step = jax.jit(lambda *args: tx.update(*args, shardings=shardings))
    for _ in range(3):
      updates, state = step(grads, state, params)
      params = eco.apply_updates(params, updates)
    moments = state.inner.inner[0]
    return [tree["blocks"]["up"]["kernel"] for tree in (params, moments.mu, moments.nu)]

  for one, many in zip(run(params), run(placed), strict=True):
    assert many.qvalue.sharding.shard_shape(many.shape) == (3, 15, 32)
    differ = np.asarray(one.qvalue).view(np.uint8) != np.asarray(many.qvalue).view(np.uint8)
    assert np.sum(differ) <= 3  # Once in a million, where a last place decides; moments follow.
