"""The study of optimizers under quantization: what it asks for, measures and says."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from eco_optax.training import config as config_lib
from eco_optax.training.models import modules, transformer
from experiments.studies import outliers, sweep


def finished(runs, losses):
  """Lines of runs, with the losses that a function of the run gives."""
  rows = {}
  for run in runs:
    rows[run.name] = {
      "validation_loss": losses(run),
      "bytes_per_parameter": {"total": 5.0},
      **({"added": ADDED, "outliers": OUTLIERS} if run.measure else {}),
    }
  return rows


ADDED = {
  format: {"weights": 0.01, "weights and inputs": 0.02}
  for format in ("FP8", "INT8", "INT4_GROUP32")
}
OUTLIERS = {what: {"ratio": 4.0, "kurtosis": 3.0} for what in ("weights", "inputs")}


def test_rates_are_tried_until_the_best_has_others_on_both_sides():
  best = {"adamw": 2e-2, "sgd": 2.0, "lion": 2e-4, "muon": 6e-3}

  def loss(run):
    name, rate = run.changes["optimizer.name"], run.changes["optimizer.learning_rate"]
    return abs(math.log(rate / best.get(name, 2e-3)))

  rows = {}
  for _ in range(6):
    rows |= finished([x for x in outliers.runs(rows, 1000) if x.name not in rows], loss)
  assert {name: outliers.best(rows, name) for name in best} == best
  assert outliers.tried(rows, "adamw") == [6e-4, 2e-3, 6e-3, 2e-2, 6e-2]
  assert outliers.tried(rows, "lion")[0] == 2e-4  # The ladder ends there.
  assert outliers.tried(rows, "muon") == [2e-3, 6e-3, 2e-2]
  runs = {run.name: run for run in outliers.runs(rows, 1000)}
  assert runs.keys() == rows.keys()
  # Every optimizer at its best rate: 7 × (3 formats × 3 ways × 3 seeds + 2 seeds more in float32).
  tuning = sum(len(outliers.tried(rows, name)) for name in outliers.START)
  assert len(runs) == tuning + 7 * (27 + 2)
  lion = runs["lion, without, FP8, lr 0.0002, seed 2"].changes
  assert (lion["method"], lion["residual"], lion["seed"], lion["steps"]) == (
    ("mw_rtn", "int8", 2, 250)
  )
  assert runs["soap, without, INT4_GROUP32, lr 0.002, seed 0"].changes["method"] == "eco_sr"
  for run in runs.values():
    own = config_lib.small()
    own.model.update(layers=1, width=32, heads=1)
    own.update_from_flattened_dict(run.changes)
    config_lib.validate(own)


def test_tables_pair_seeds_and_rank_optimizers(tmp_path):
  way = {"bf16_mw": 0.0, "mw_rtn": 0.01, "eco_sr": 0.02, "naive_sr": 0.05}
  loss = lambda run: 2 + way[run.changes["method"]] + 0.1 * run.changes["seed"]
  rows = {}
  for _ in range(8):
    rows |= finished([x for x in outliers.runs(rows, 1000) if x.name not in rows], loss)
  text = outliers.table(rows)
  assert "| adamw | 5.00 / 5.00 | +0.0100 ± 0.0000 | +0.0200 ± 0.0000 | +0.0500 ± 0.0000 |" in text
  assert "| muon, int8 residual | 5.00 / 5.00 | +0.0100 ± 0.0000 | +0.0100 ± 0.0000 |" in text
  # Ranks of outliers that grow as what rounding adds shrinks.
  for i, name in enumerate(outliers.START):
    for each in outliers.names(rows, name, outliers.FLOAT):
      rows[each] = rows[each] | {
        "added": ADDED | {"FP8": {"weights": 0.1**i, "weights and inputs": 2.0**i}},
        "outliers": OUTLIERS | {"weights": {"ratio": 4.0 + i, "kurtosis": 3.0}},
      }
  ratio = ("weights", "ratio")
  assert outliers.correlation(rows, ratio, ("FP8", "weights")) == pytest.approx(-1)
  assert outliers.correlation(rows, ratio, ("FP8", "weights and inputs")) == pytest.approx(1)
  assert math.isnan(outliers.correlation({}, ratio, ("FP8", "weights")))
  assert "| adamw | – | – |" in outliers.table({})
  outliers.plot(rows, tmp_path)
  assert (tmp_path / "outliers.png").stat().st_size > 10_000


def test_outliers_of_numbers_that_are_known():
  draw = np.random.default_rng(0).standard_normal((64, 4096))
  # The standard error of a kurtosis is √(24 / n), 0.01.
  assert outliers.kurtosis(draw) == pytest.approx(3, abs=0.05)
  assert outliers.ratio(np.array([[1.0, -1, 1, -1], [3, 0, 0, 1]])) == pytest.approx((1 + 3) / 2)


def test_a_run_is_rounded_and_measured_when_it_ends(base, tmp_path):
  base.model.update(layers=2, width=32, heads=2, mlp_width=64)
  base.batch_size, base.checkpoint.every = 8, 100
  run = outliers._run("adamw", outliers.FLOAT, "none", 2e-2, 0, steps=30)
  rows = sweep.sweep(base, lambda rows: [run], tmp_path / "w", tmp_path / "runs.jsonl")
  row = rows[run.name]
  assert row["config"]["evaluate_batches_at_end"] == 96
  assert row["validation_loss"] < 4  # Of ln 256 = 5.5: it has learned something to be lost.
  added = row["added"]
  assert abs(added["INT8"]["weights"]) < abs(added["INT4_GROUP32"]["weights"]) < 0.5
  assert added["INT4_GROUP32"]["weights"] != added["INT4_GROUP32"]["weights and inputs"]
  assert 1 < row["outliers"]["weights"]["ratio"] < 32
  json.dumps(row)


def test_inputs_of_layers_are_those_of_the_model():
  config = config_lib.small()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, vocabulary=64)
  model = config_lib.model(config)
  params = transformer.init(model, 0)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 8)))
  seen = outliers.inputs_of_layers(model, params, tokens)
  assert [x.shape for x in seen] == 2 * (6 * [(16, 32)] + [(16, 64)])
  # The first is the embedding, normalized.
  x = np.asarray(params["embedding"])[np.asarray(tokens)].reshape(16, 32)
  wanted = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + model.norm_epsilon)
  np.testing.assert_allclose(seen[0], wanted, rtol=1e-5)
  assert modules.Linear.__call__.__name__ == "__call__"  # It is put back.
