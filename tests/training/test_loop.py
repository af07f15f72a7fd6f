"""One run end to end, and one step of each method."""

import importlib.util
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import image

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import loop, memory, methods, metrics, report, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline, shards
from eco_optax.training.models import transformer
from eco_optax.transforms import momentum as momentum_lib
from experiments import faults
from experiments.studies import comparison

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[2]


def get_config(name="tiny", **changes):
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.mesh.fsdp = 1
  config.mesh.data = 8  # The devices of tests/conftest.py.
  config.update_from_flattened_dict(changes)
  return config


# Enough for runs that are not asked to have learned anything, and the same for all of them, so that
# `traced_once` has one step for them.
SHORT = {"batch_size": 8, "length": 32, "steps": 16}


@pytest.fixture(autouse=True, scope="module")
def short_validation():
  # The whole split takes most of a tiny run's time; tests/training/test_data.py holds it whole.
  data = corpus.standard_library_dataset()
  data = data._replace(validation=shards.TokenStream([data.validation.read(0, 5_000)]))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(corpus, "standard_library_dataset", lambda: data)
    yield


# Bytes per parameter of codes, moments and residual; scales are added by the test.
STORAGE = {
  "bf16_mw": (4, 8, 0),
  "mw_rtn": (1, 8, 4),
  "mw_sr": (1, 8, 4),
  "naive_rtn": (1, 8, 0),
  "naive_sr": (1, 8, 0),
  "eco_rtn": (1, 8, 0),
  "eco_sr": (1, 8, 0),
}


@pytest.mark.parametrize("method", methods.BY_NAME)
def test_one_step_of_each_method(method):
  # On eight devices one of them, whose runs below are too; programs for one compile faster.
  devices = 8 if method == "eco_sr" else 1
  config = get_config(method=method, **{"mesh.data": devices})
  tx = methods.optimizer(config)
  mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices()[:devices])
  state = step_lib.init_state(config, tx, mesh)
  before = jax.tree.map(jnp.copy, state.params)
  step = step_lib.make_train_step(config, tx, mesh)
  tokens = np.random.default_rng(0).integers(0, 256, (16, 129), dtype=np.int32)
  batch = pipeline.Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
  # At the second step the rate has left its first, smallest value.
  with jax.set_mesh(mesh):
    for _ in range(2):
      state, result = step(state, batch)
  assert step._cache_size() == 1
  params = state.params
  # Uniform over 256 bytes at the start, give or take what two steps learn.
  assert abs(float(result["loss"]) - np.log(256)) < 0.2
  assert np.isfinite(result["grad_norm"])

  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
  kernels = [leaf for path, leaf in leaves if "'kernel'" in jax.tree_util.keystr(path)]
  assert len(kernels) == 7
  if method != "bf16_mw":
    assert all(k.qvalue.dtype == jnp.float8_e4m3fn for k in kernels)
    # No float32 copy of a kernel anywhere but in moments, and the residual of master weights.
    assert not any(
      leaf.ndim == 3 and leaf.dtype == jnp.float32 and min(leaf.shape[1:]) > 1
      for leaf in jax.tree.leaves(params)
    )
  moved = [
    np.any(np.asarray(a) != np.asarray(b))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
  ]
  assert any(moved)

  used = memory.per_parameter(state, transformer.is_block_kernel)
  codes, moments, residual = STORAGE[method]
  size = sum(k.size for k in kernels)
  scales = sum(k.scale.nbytes for k in kernels) / size if method != "bf16_mw" else 0
  assert used == pytest.approx((codes + scales, moments, residual))


# That Optax does not have.
OURS = ("soap", "shampoo")


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_precondition_kernels_alone(name):
  config = get_config(**{"optimizer.name": name})
  tx, mesh = loop.prepare(config)
  state = step_lib.abstract_state(config, tx, mesh)
  factors, *_ = [
    node.left
    for node in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "left"))
    if hasattr(node, "left")
  ]
  found = jax.tree_util.tree_flatten_with_path(factors)[0]
  assert {path[-1].key for path, _ in found} == {"kernel"}
  # Layers and experts by themselves, rows with rows.
  assert len(found) == 7
  assert all(leaf.shape[0] == 2 and leaf.shape[-1] == leaf.shape[-2] for _, leaf in found)


@pytest.mark.skipif(
  not hasattr(optax.contrib, "scale_by_galore"), reason="GaLore is newer than this Optax"
)
def test_galore_projects_each_layers_kernels_alone():
  generator = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
  grads = [{"kernel": draw(2, 64, 48), "embedding": draw(64, 48)} for _ in range(3)]
  tx = methods.OPTIMIZERS["galore"](b1=0.9, b2=0.99, eps=1e-8)
  adam = optax.scale_by_adam(0.9, 0.99, 1e-8)
  own = optax.contrib.scale_by_galore(32, scale=0.25, base_optimizer=adam)
  state, whole = tx.init(grads[0]), adam.init(grads[0]["embedding"])
  layers = [own.init(grads[0]["kernel"][i]) for i in range(2)]
  for grad in grads:
    updates, state = tx.update(grad, state, grad)
    expected, whole = adam.update(grad["embedding"], whole)
    np.testing.assert_allclose(updates["embedding"], expected, rtol=1e-6)
    for i in range(2):
      expected, layers[i] = own.update(grad["kernel"][i], layers[i])
      np.testing.assert_allclose(updates["kernel"][i], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
  not hasattr(optax.contrib, "MuonDimensionNumbers"), reason="stacks of matrices: Optax 0.2.6"
)
@pytest.mark.parametrize("release", [False, True])
def test_two_steps_of_muon(release):
  """Polar factors of the kernels, whatever their gradients' length, and AdamW for all else."""
  changes = {"optimizer.name": "muon", "method": "mw_rtn", "residual": "int8", "release": release}
  config = get_config(**changes, **{"mesh.data": 1, "moments.mu": "float8_e4m3fn", **SHORT})
  config_lib.validate(config)
  tx, mesh = methods.optimizer(config), sharding.make_mesh({"data": 1}, jax.devices()[:1])
  state = step_lib.init_state(config, tx, mesh)
  step = step_lib.make_train_step(config, tx, mesh)
  tokens = np.random.default_rng(0).integers(0, 256, (8, 33), dtype=np.int32)
  batch = pipeline.Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
  with jax.set_mesh(mesh):
    for _ in range(2):
      state, result = step(state, batch)
  assert np.isfinite(result["loss"])
  muon, adam = (optax.tree.get(state.opt_state, name) for name in ("MuonState", "ScaleByAdamState"))
  paths = lambda tree: set(momentum_lib.flat(tree))
  kernels = {path for path in paths(state.params) if path.endswith("/kernel")}
  assert paths(muon.mu) == kernels
  assert paths(adam.mu) == paths(adam.nu) == paths(state.params) - kernels
  assert all(
    np.any(np.asarray(x.qvalue).astype(np.float32)) for x in momentum_lib.flat(muon.mu).values()
  )
  used = memory.per_parameter(state, transformer.is_block_kernel)
  scales = sum(
    leaf.scale.nbytes for path, leaf in momentum_lib.flat(state.params).items() if path in kernels
  ) / sum(leaf.size for path, leaf in momentum_lib.flat(state.params).items() if path in kernels)
  assert used == pytest.approx((1 + scales, 1 + 1 / 32, 1))


@pytest.mark.parametrize("name", methods.CARRY_NOTHING_BACK)
def test_momenta_that_carry_nothing_back_are_refused_with_errors_in_them(name):
  config = get_config(**{"optimizer.name": name})
  with pytest.raises(ValueError, match="set method 'mw_rtn' and residual 'int8'"):
    config_lib.validate(config)


@pytest.mark.parametrize(
  "name", [name for name in methods.OPTIMIZERS if name not in (*OURS, "galore")]
)
def test_every_optimizer_is_optaxs_own(name):
  """ECO or a residual takes it, and float parameters take the steps of Optax's of the same name."""
  config = get_config(**{"optimizer.name": name, "optimizer.max_norm": 1e9})
  if name in methods.CARRY_NOTHING_BACK:
    config.update(method="mw_rtn", residual="int8")
  make = {
    "ademamix": lambda *a, **k: optax.contrib.ademamix(*a, b3=0.99, alpha=2.0, **k),
    "nadamw": optax.nadamw,
    "adamw": optax.adamw,
    "lion": lambda rate, b1, weight_decay, **unused: optax.lion(
      rate, b1, 0.99, weight_decay=weight_decay
    ),
  }
  o, rate = config.optimizer, methods.schedule(config)
  adam = {"b1": o.b1, "b2": o.b2, "eps": o.eps}
  decay = optax.chain(optax.add_decayed_weights(-o.weight_decay), optax.scale_by_schedule(rate))
  if name in make:
    stock = make[name](rate, **adam, weight_decay=o.weight_decay)
  elif name == "sgd":
    stock = optax.sgd(rate, o.b1)
  else:
    stock = getattr(optax, name)(rate, **adam)
  params = {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]])}
  tx, mine, theirs = methods.stock_optimizer(config), params, params
  state, stock_state, decay_state = tx.init(params), stock.init(params), decay.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  for i in range(4):
    grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), mine)
    updates, state = tx.update(grads, state, mine)
    stock_updates, stock_state = stock.update(grads, stock_state, theirs)
    if name not in make:  # Optax's have no weight decay.
      decayed, decay_state = decay.update(zeros, decay_state, theirs)
      stock_updates = jax.tree.map(jnp.add, stock_updates, decayed)
    mine, theirs = optax.apply_updates(mine, updates), optax.apply_updates(theirs, stock_updates)
  np.testing.assert_allclose(mine["w"], theirs["w"], rtol=1e-5)
  assert np.any(np.asarray(mine["w"]) != np.asarray(params["w"]))
  packed = eco.quantize({"w": jnp.ones((16, 16))}, eco.FP8)
  methods.optimizer(config).init(packed)  # The rule's own checks.


def test_rounding_may_become_stochastic():
  start = jnp.ones((64, 64)).at[0].set(1.75)  # The first row keeps the scales where they are.
  rounded = eco.quantize({"w": start, "b": jnp.ones(3)}, eco.FP8)
  quantizers = [eco.quantize_params(rounding=rounding) for rounding in ("nearest", "stochastic")]
  tx = eco.chain(optax.sgd(1.0), methods.until(2, *quantizers))
  state, grads = tx.init(rounded), {"w": jnp.full((64, 64), -0.01).at[0].set(0), "b": jnp.zeros(3)}
  moved = []
  for _ in range(4):
    updates, state = jax.jit(tx.update)(grads, state, rounded)
    rounded = eco.apply_updates(rounded, updates)
    moved.append(bool(jnp.any(rounded["w"].dequantize() != start)))
  assert moved == [False, False, True, True]


def test_eco_bytes_at_the_default_size():
  config = get_config("stdlib_1m")
  tx, mesh = loop.prepare(config)
  state = step_lib.abstract_state(config, tx, mesh)
  used = memory.per_parameter(state, transformer.is_block_kernel)
  assert 9.0 < used.total < 9.05
  assert transformer.count_params(config_lib.model(config)) == 1_049_728


def test_runs_are_written_and_equal_each_other(tmp_path):
  config = get_config(evaluate_every=25)
  first = loop.train(config, tmp_path / "a")
  # A mesh that is set around a run, with explicit axes, makes no difference.
  with jax.set_mesh(jax.make_mesh((8,), ("x",))):
    second = loop.train(config, tmp_path / "b")
  # Guessing among the bytes that code is made of costs about 3.3 nats; uniform, 5.5.
  assert first["validation_loss"] < 3.2
  drop = lambda rows: [{k: v for k, v in r.items() if k not in metrics.TIMING} for r in rows]
  rows = [metrics.read_metrics(tmp_path / run / "metrics.jsonl") for run in "ab"]
  assert drop(rows[0]) == drop(rows[1])
  assert first["validation_loss"] == second["validation_loss"]
  # An evaluation that is due between log lines is not left out.
  assert [r["step"] for r in rows[0] if "loss" in r] == [20, 25, 40, 50, 60]
  assert [r["step"] for r in rows[0] if "validation_loss" in r] == [25, 50, 60]
  assert rows[0][-1]["validation_loss"] == first["validation_loss"]

  saved = json.loads((tmp_path / "a" / "summary.json").read_text())
  assert saved["config"]["method"] == "eco_sr"
  assert saved["versions"]["jax"] == jax.__version__
  picture = image.imread(tmp_path / "a" / "loss.png")
  assert picture.std() > 0.01
  table = report.closing_table(saved)
  assert f"{first['validation_loss']:.4f}" in table
  assert "9.11 bytes per parameter" in table  # Rows of 32: 4 / 32 more for scales, 4 / 64 for some.


def test_schedule_is_the_papers():
  config = get_config("stdlib_1m")
  rate = methods.schedule(config)
  np.testing.assert_allclose([rate(0), rate(100), rate(1000)], [2e-5, 2e-3, 2e-4], rtol=1e-5)


def test_clip_comes_before_the_momentum():
  config = get_config(method="bf16_mw")
  tx = methods.optimizer(config)
  params = {"w": jnp.zeros((2, 2))}
  grads = {"w": jnp.full((2, 2), 1e6)}
  norm = methods.global_norm(grads)
  assert norm == 2e6
  scale = methods.clip_factor(config.optimizer.max_norm, norm)
  _, state = tx.update(grads, tx.init(params), params, gradient_scale=scale)
  momentum = optax.tree.get(state, "mu")["w"]
  np.testing.assert_allclose(momentum, 0.1 * 0.5, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "eco"}, "method must be one of bf16_mw, .*, got 'eco'"),
    ({"format": "FP9"}, "format must be one of FP4_GROUP32, FP8, .*, got 'FP9'"),
    ({"activation_format": "FP9"}, "activation_format must be one of none, FP4_GROUP32, FP8"),
    ({"gradient_format": "FP8"}, "gradient_format must be one of none, FP8_E5M2_TOKEN, FP8_TOKEN"),
    (
      {"gradient_format": "FP8_TOKEN", "format": "MXFP8"},
      "format MXFP8: gradient_format .* scales of blocks are inside the sum",
    ),
    ({"residual": "float8"}, "residual must be one of float32"),
    ({"batch_size": 12}, "batch_size 12 / accumulation 1 is not a multiple of the 8 devices"),
    ({"mesh.tensor": 3}, "a mesh of data=8, fsdp=1, tensor=3, expert=1 does not take 8 devices"),
  ],
)
def test_bad_configs_are_refused_before_any_step(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    loop.train(get_config(**changes), tmp_path)


def test_a_run_that_diverges_says_where(tmp_path, traced_once):
  # One step at this rate leaves weights whose square is no number; every fifth step is logged.
  config = get_config(log_every=5, **SHORT, **{"optimizer.learning_rate": 1e38})
  with pytest.raises(FloatingPointError, match=r"at step 1 with method 'eco_sr'"):
    loop.train(config, tmp_path)
  config.nonfinite = "record"
  summary = loop.train(config, tmp_path)
  assert summary["diverged_at_step"] == 1
  assert "none, diverged at step 1" in report.closing_table(summary)

  # JSON has no NaN, and readers other than Python's refuse it.
  refuse = lambda name: pytest.fail(f"{name} is not JSON")
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  for text in [(tmp_path / "summary.json").read_text(), *lines]:
    json.loads(text, parse_constant=refuse)
  (only,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
  assert (only["step"], only["diverged"]) == (1, 1)
  row = {"run": "a", **summary}
  assert "| a | diverged at step 1 |  | 9.11 |" in comparison.table([row])


def stop_before(monkeypatch, step):
  """Sends this process SIGTERM when a run reads the batch of a step."""
  honest = pipeline.batches

  def batches(windows, start, *args):
    for number, batch in enumerate(honest(windows, start, *args), start + 1):
      if number == step:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  monkeypatch.setattr(pipeline, "batches", batches)


def end_of(workdir):
  """Checksums of the last state, and the metrics without the clock's."""
  newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
  record = json.loads((newest / "record" / "metadata").read_text())
  rows = metrics.read_metrics(workdir / "metrics.jsonl")
  drop = lambda row: {k: v for k, v in row.items() if k not in metrics.TIMING}
  return record["step"], record["checksums"], [drop(row) for row in rows]


def test_a_run_that_was_asked_to_stop_goes_on(tmp_path, monkeypatch, capsys, traced_once):
  config = get_config(log_every=2, evaluate_every=8, **SHORT, **{"checkpoint.every": 4})
  whole = loop.train(config, tmp_path / "whole")
  with monkeypatch.context() as patch:
    stop_before(patch, 7)
    with pytest.raises(SystemExit) as stopped:
      loop.train(config, tmp_path / "stopped")
  assert stopped.value.code == 0
  assert "asked to stop at step 7: saved, the same command goes on" in capsys.readouterr().out
  shutil.copytree(tmp_path / "stopped", tmp_path / "elsewhere")
  shutil.copytree(tmp_path / "stopped", tmp_path / "changed")

  summary = loop.train(config, tmp_path / "stopped")
  assert "on 8 cpu devices, from step 7" in capsys.readouterr().out
  assert end_of(tmp_path / "stopped") == end_of(tmp_path / "whole")
  assert summary["validation_loss"] == whole["validation_loss"]
  # The summary comes from the run's files, at any time.
  (tmp_path / "stopped" / "summary.json").unlink()
  assert report.summarize(tmp_path / "stopped") == summary
  # A run that is complete says so again, and trains nothing.
  again = loop.train(config, tmp_path / "stopped")
  assert again["validation_loss"] == whole["validation_loss"]
  assert end_of(tmp_path / "stopped") == end_of(tmp_path / "whole")

  # On another mesh sums are made in another order, which nine steps do not make much of.
  config.mesh.update(data=2, fsdp=4)
  elsewhere = loop.train(config, tmp_path / "elsewhere")
  assert elsewhere["validation_loss"] == pytest.approx(whole["validation_loss"], abs=0.01)

  config.optimizer.b2 = 0.9
  with pytest.raises(ValueError, match=r"optimizer\.b2 was 0\.98 and is 0\.9"):
    loop.train(config, tmp_path / "changed")


def test_a_gradient_that_is_not_finite(tmp_path, monkeypatch, capsys, traced_once):
  config = get_config(log_every=4, **SHORT, **{"checkpoint.every": 4})
  monkeypatch.setattr(pipeline, "batches", pipeline.batches)  # Restored after the test.
  faults.poison("7")
  with pytest.raises(
    FloatingPointError, match=r"loss nan .* first in the gradient of .* at step 7"
  ):
    loop.train(config, tmp_path / "stop")
  assert sorted(p.name for p in (tmp_path / "stop" / "checkpoints").iterdir()) == ["4"]
  assert metrics.read_metrics(tmp_path / "stop" / "metrics.jsonl")[-1]["step"] == 4

  config.nonfinite = "skip"
  summary = loop.train(config, tmp_path / "stop")  # With the config's other policy it goes on.
  assert summary["skipped"] == 1
  assert np.isfinite(summary["validation_loss"])
  out = capsys.readouterr().out
  assert "at step 7 with method 'eco_sr': skip" in out
  assert "1, because they were not finite" in out


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_an_update_beyond_float32_is_never_saved(nonfinite, tmp_path, traced_once):
  config = get_config(nonfinite=nonfinite, log_every=1, **SHORT, **{"checkpoint.every": 1})
  config.optimizer.update(learning_rate=3e38, start_fraction=1.0, weight_decay=1e6)
  with pytest.raises(
    FloatingPointError, match=r"too large for the weights, first of .* at step 1 "
  ):
    loop.train(config, tmp_path)
  assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_prepared_data_that_do_not_fit_are_refused(tmp_path, monkeypatch):
  data = corpus.standard_library_dataset()
  monkeypatch.setattr(shards, "load", lambda *_: data._replace(vocabulary=1000))
  config = get_config(**{"data.path": "prepared"})
  with pytest.raises(ValueError, match=r"vocabulary 256 is less than the 1000 tokens .* set it to"):
    loop.train(config, tmp_path)
  config = get_config(**{"model.separator": 3})
  with pytest.raises(ValueError, match="separator 3 is not the data's, which is 0"):
    loop.train(config, tmp_path)


def test_comparison_continues_where_it_stopped(tmp_path, monkeypatch, traced_once):
  config = get_config(**SHORT)
  runs = {"a": {"method": "mw_rtn"}, "b": {"method": "eco_sr"}}
  rows = comparison.compare(config, tmp_path / "runs", tmp_path / "results", runs)
  monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("a complete run was run again"))
  again = comparison.compare(config, tmp_path / "runs", tmp_path / "results", runs)
  assert rows == again
  table = (tmp_path / "results" / "comparison.md").read_text()
  gap = rows[1]["validation_loss"] - rows[0]["validation_loss"]
  assert f"{gap:+.4f}" in table
  assert json.loads((tmp_path / "results" / "comparison.json").read_text())[1]["run"] == "b"
