"""Checkpoints: what comes back is what was saved, on any mesh, or an error says what is wrong."""

import gc
import json
import os
import pickle
import random

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import eco_optax as eco
from eco_optax.training import checkpoints, loop, memory
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from experiments import faults

pytestmark = [
  # Optax's schedules compare an int32 count with Python floats.
  pytest.mark.standard_promotion,
  # Orbax leaves the other reads of a damaged checkpoint to themselves.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def what_others_left():
  """Takes from the garbage collector what it would walk after every test."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture(autouse=True)
def what_is_left():
  """Lets what Orbax leaves go within its own test."""
  yield
  gc.collect()


DATA = {"source": "random tokens"}
VERSIONS = {"eco_optax": "0"}


def tiny(**changes):
  config = config_lib.defaults()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, vocabulary=64)
  config.batch_size, config.length, config.steps = 8, 16, 20
  config.optimizer.learning_rate = 1e-2
  config.update_from_flattened_dict(changes)
  return config


_targets = {}


def target_of(config):
  """The mesh of a config and its state's shapes, dtypes and shardings, traced once for each."""
  key = json.dumps(config_lib.flat(config), sort_keys=True)
  if key not in _targets:
    tx, mesh = loop.prepare(config)
    _targets[key] = mesh, step_lib.abstract_state(config, tx, mesh)
  return _targets[key]


def filled(config):
  """A state of random numbers in its own shapes, dtypes and shardings; nothing is trained."""
  draw = np.random.default_rng(0)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.integer):
      values = draw.integers(0, np.iinfo(x.dtype).max, x.shape, x.dtype, endpoint=True)
    else:
      values = draw.standard_normal(x.shape, np.float32).astype(x.dtype)
    return jax.device_put(values, x.sharding)

  return jax.tree.map(fill, target_of(config)[1])


@pytest.fixture(scope="module")
def state():
  with jax.numpy_dtype_promotion("standard"):
    return filled(tiny())


def save(folder, state, config, steps=(2,), keep=2, losses=None):
  with checkpoints.manager(folder, keep) as store:
    for step in steps:
      loss = (losses or {}).get(step)
      checkpoints.save(store, step, state, config, DATA, VERSIONS, {"seconds": 1.0}, loss)
      checkpoints.finish(store)


def restore(folder, config, data=DATA):
  mesh, target = target_of(config)
  with checkpoints.manager(folder, 2) as store, jax.set_mesh(mesh):
    return checkpoints.restore(store, target, config, data)


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
  "mesh",
  [
    {"mesh.fsdp": 8},
    {"mesh.fsdp": 1, "mesh.data": 8},
    {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 2},
  ],
)
def test_what_comes_back_is_what_was_saved_on_any_mesh(mesh, state, tmp_path):
  save(tmp_path, state, tiny())
  found = restore(tmp_path, tiny(**mesh))
  assert (found.step, found.clock) == (2, {"seconds": 1.0})
  assert_equal(found.state, state)
  wanted = jax.tree.leaves(target_of(tiny(**mesh))[1])
  for x, y in zip(jax.tree.leaves(found.state), wanted, strict=True):
    assert x.sharding == y.sharding


@pytest.mark.parametrize(
  "changes",
  [
    {"format": "INT4"},
    {"format": "MXFP4"},
    {"format": "NVFP4"},
    {"method": "mw_sr", "residual": "int8"},
    {"method": "mw_rtn", "residual": "int12"},
    {"method": "mw_rtn", "residual": "int16", "moments.mu": "bfloat16"},
    {"moments.mu": "int8", "moments.nu": "float8_e4m3fn"},
    {"moments.mu": "bfloat16", "optimizer.clip": "previous"},
    {"moments.mu": "float8_e4m3fn", "moments.nu": "factored"},
    {"method": "bf16_mw", "optimizer.clip": "previous"},
  ],
)
def test_every_kind_of_state_comes_back(changes, tmp_path):
  config = tiny(**changes)
  state = filled(config)
  save(tmp_path, state, config)
  assert_equal(restore(tmp_path, config).state, state)


def test_packed_leaves_are_stored_packed(state, tmp_path):
  save(tmp_path, state, tiny())
  handler = ocp.StandardCheckpointHandler()
  stored = jax.tree_util.tree_leaves_with_path(handler.metadata(tmp_path / "2" / "state"))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  kept = {name(path): x for path, x in stored if hasattr(x, "dtype")}
  live = {leaf.path: leaf.array for leaf in memory.leaves(state)}
  size = lambda x: np.dtype(x.dtype).itemsize * int(np.prod(x.shape))
  assert sum(map(size, kept.values())) == sum(x.nbytes for x in live.values())
  # 9 bytes per quantized parameter: a code of one byte, two float32 moments, and scales.
  kernels = [leaf for leaf in jax.tree.leaves(state.params, is_leaf=is_packed) if is_packed(leaf)]
  for kernel in kernels:
    same = [x for path, x in kept.items() if "kernel" in path and tuple(x.shape) == kernel.shape]
    assert {np.dtype(x.dtype).name for x in same} == {"float8_e4m3fn", "float32"}


is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)


def test_the_latest_are_kept_and_the_best(state, tmp_path):
  save(tmp_path, state, tiny(), steps=(1, 2, 3, 4, 5), losses={1: 3.0, 2: 2.0, 4: 2.5})
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "4", "5"]


def flip(path):
  faults.flip_bits(path, random.Random(0), 10)


@pytest.mark.parametrize("damage", [faults.cut_in_half, flip, os.unlink])
def test_a_damaged_one_is_named_and_the_one_before_is_used(damage, state, tmp_path, caplog):
  save(tmp_path, state, tiny(), steps=(1, 2))
  for path in faults.data_files(tmp_path / "2"):
    damage(path)
  with caplog.at_level("WARNING"):
    found = restore(tmp_path, tiny())
  assert found.step == 1
  assert_equal(found.state, state)
  assert f"{tmp_path}/2 is damaged and left out" in caplog.text
  # Nothing is deleted, and its step can be saved again.
  assert [p.name for p in tmp_path.glob("damaged-2-*")]
  save(tmp_path, state, tiny(), steps=(2,))
  assert restore(tmp_path, tiny()).step == 2


def test_all_damaged_is_an_error(state, tmp_path):
  save(tmp_path, state, tiny(), steps=(1, 2))
  for step in "12":
    (tmp_path / step / "record" / "metadata").write_text("{")
  with pytest.raises(
    OSError, match=r"every checkpoint in .* is damaged: 2: .*; 1: .*Copy one back"
  ):
    restore(tmp_path, tiny())


def test_nothing_saved_is_nothing(tmp_path):
  assert restore(tmp_path / "new", tiny()) is None


def test_another_config_is_refused_with_what_differs(state, tmp_path):
  save(tmp_path, state, tiny())
  other = tiny(**{"optimizer.b2": 0.95, "seed": 7, "log_every": 3})
  with pytest.raises(
    ValueError, match=r"optimizer.b2 was 0.98 and is 0.95; seed was 0 and is 7"
  ) as e:
    restore(tmp_path, other)
  assert "log_every" not in str(e.value)  # No number depends on it.
  with pytest.raises(ValueError, match="the data is not what it was"):
    restore(tmp_path, tiny(), data={"source": "another text"})


def test_another_version_is_refused(state, tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoints, "VERSION", 0)
  save(tmp_path, state, tiny())
  monkeypatch.undo()
  with pytest.raises(
    ValueError, match="has version 0, and this eco_optax reads version 3: continue"
  ):
    restore(tmp_path, tiny())


@pytest.mark.parametrize("nu", ["float32", "float8_e4m3fn"])
def test_version_2_is_read_where_moments_are_float32(state, tmp_path, monkeypatch, nu):
  config = tiny()
  config.moments.nu = nu
  monkeypatch.setattr(checkpoints, "VERSION", 2)
  save(tmp_path, state, config)
  monkeypatch.undo()
  if nu == "float32":
    return assert_equal(restore(tmp_path, config).state, state)
  with pytest.raises(ValueError, match="has version 2, and this eco_optax reads version 3"):
    restore(tmp_path, config)
  assert (tmp_path / "2").is_dir()  # Nothing is renamed.


def test_a_link_out_of_the_folder_is_not_followed(state, tmp_path, caplog):
  folder = tmp_path / "checkpoints"
  save(folder, state, tiny(), steps=(1, 2))
  file = faults.data_files(folder / "2")[0]
  file.rename(tmp_path / "elsewhere")
  file.symlink_to(tmp_path / "elsewhere")
  with caplog.at_level("WARNING"):
    assert restore(folder, tiny()).step == 1
  assert "is a link" in caplog.text


def test_nothing_is_unpickled(state, tmp_path, monkeypatch):
  save(tmp_path, state, tiny())
  refuse = lambda *_, **__: pytest.fail("a checkpoint was unpickled")
  for name in ("load", "loads", "Unpickler"):
    monkeypatch.setattr(pickle, name, refuse)
  assert restore(tmp_path, tiny()).step == 2


def test_a_checksum_knows_every_bit():
  draw = np.random.default_rng(0)
  x = draw.integers(0, 256, (7, 33), dtype=np.uint8)
  wanted = checkpoints.checksums({"x": jnp.asarray(x)})
  for _ in range(50):
    other = x.copy()
    other[draw.integers(7), draw.integers(33)] ^= 1 << draw.integers(8)
    assert checkpoints.checksums({"x": jnp.asarray(other)}) != wanted
  assert checkpoints.checksums({"x": jnp.asarray(x[::-1])}) != wanted


def test_a_record_is_read_by_anyone(state, tmp_path):
  save(tmp_path, state, tiny(), losses={2: 1.5})
  record = json.loads((tmp_path / "2" / "record" / "metadata").read_text())
  assert (record["version"], record["step"], record["examples"]) == (3, 2, 16)
  assert record["config"]["optimizer.b2"] == 0.98
  assert record["checksums"]["params/head"] == checkpoints.checksums(state)["params/head"]
