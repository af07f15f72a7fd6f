"""A sweep runs what has no line yet, and the claims ask for what the lines so far call for."""

import json
import math
import re
import statistics
import subprocess
import sys

import pytest

from eco_optax.training import config
from experiments.studies import (
  claims,
  clips,
  families,
  finetune,
  nearest,
  optimizers,
  scale,
  storage,
  sweep,
)


def test_a_sweep_goes_on_where_it_stopped(base, tmp_path):
  runs = [sweep.Run(f"seed {seed}", {"seed": seed, "model.layers": 1}) for seed in range(2)]
  lines, said = tmp_path / "runs.jsonl", []
  plan = lambda rows: runs[: 1 + len(rows)]  # The second is asked for once the first is there.
  rows = sweep.sweep(base, plan, tmp_path / "w", lines, processes=2, show=said.append)
  assert set(rows) == {"seed 0", "seed 1"}
  assert rows["seed 0"]["validation_loss"] == pytest.approx(math.log(256), abs=0.3)
  assert rows["seed 0"]["validation_loss"] != rows["seed 1"]["validation_loss"]
  assert [step for step, _ in rows["seed 0"]["validation_curve"]] == [2, 4]
  assert not list((tmp_path / "w").iterdir())  # What is kept is the line.
  assert sweep.missing(runs, lines, base) == []

  begun = len(said)
  assert sweep.sweep(base, plan, tmp_path / "w", lines, show=said.append) == rows
  assert len(said) == begun
  base.steps = 6  # A line of another config is none.
  assert sweep.missing(runs, lines, base) == runs
  assert sweep.sweep(base, plan, tmp_path / "w", lines, minutes=0, show=said.append) == rows


def test_a_run_that_cannot_be_is_reported_with_its_words(base, tmp_path):
  """Once the others are done."""
  runs = [sweep.Run("bad", {"batch_size": 3, "accumulation": 2}), sweep.Run("good", {"seed": 1})]
  lines = tmp_path / "runs.jsonl"
  with pytest.raises(RuntimeError, match=r"bad ended with 1: .*accumulation 2 does not divide"):
    sweep.sweep(base, lambda rows: runs, tmp_path / "w", lines, show=lambda text: None)
  assert set(sweep.read(lines)) == {"good"}


def test_a_run_that_is_stopped_behind_its_training_is_no_failure(base, tmp_path, monkeypatch):
  def start(config, run, folder, cores):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")  # But what is measured after it is not there yet.
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

  monkeypatch.setattr(sweep, "_start", start)
  runs, lines = [sweep.Run("slow", {})], tmp_path / "runs.jsonl"
  found = sweep.sweep(
    base, lambda rows: runs, tmp_path / "w", lines, minutes=0.02, show=lambda text: None
  )
  assert found == {}
  assert sweep.missing(runs, lines, base) == runs


def line(key, loss):
  row = {"validation_loss": loss, "bytes_per_parameter": {"total": 9.0}}
  return {key.name: row | {"training_curve": [(1, 5.0), (2, loss or 5.0)]}}


@pytest.fixture
def rows():
  """Every method at every rate: the later in the table and the lower the rate the worse."""
  found = {}
  for rate in claims.LEARNING_RATES:
    for i, (method, format) in enumerate(claims._cells()):
      if method in claims.TUNED_AS:
        continue
      loss = None if method == claims.NAIVE and rate == 6e-3 else 3 + 0.01 * i - 10 * rate
      found |= line(claims.Key(method, format, rate, 0, 1), loss)
  return found


def test_other_seeds_wait_for_the_best_rate(rows):
  first = claims.runs({}, 100)
  assert len(first) == 3 * (1 + 2 * (len(claims.METHODS) - len(claims.TUNED_AS)))
  assert {run.changes["steps"] for run in first} == {100}
  then = claims.runs(rows, 100)
  assert then[: len(first)] == first
  names = [run.name for run in then[len(first) :]]
  seeds = [f"master weights + SR, INT4, lr 0.006, seed {seed}" for seed in (1, 2)]
  assert set(seeds) <= set(names)
  assert not any("naive RTN" in name for name in names)
  stored = [name for name in names if name.startswith(tuple(claims.TUNED_AS))]
  assert sorted(stored) == sorted(  # At the rate of the method that they are otherwise.
    claims.Key(method, format, 6e-3, 0, 1).name
    for method in claims.TUNED_AS
    for format in claims.FORMATS
  )
  longer = [run for run in then if run.changes["steps"] == 400]
  assert len(longer) == 10
  assert {run.changes["optimizer.learning_rate"] for run in longer} == {6e-3}
  # The two of ECO's that come first in the table are the two best here.
  eco = {
    name.split(", FP8")[0] for name in names if "ECO" in name and "FP8" in name and "×" in name
  }
  assert eco == {"ECO + RTN, paper's rule", "ECO + RTN, schedule-aware"}


def test_a_mean_has_its_standard_error(rows):
  method, losses = (
    "naive SR",
    [rows["naive SR, FP8, lr 0.006, seed 0"]["validation_loss"], 2.9, 3.1],
  )
  for seed in (1, 2):
    rows |= line(claims.Key(method, "FP8", 6e-3, seed, 1), losses[seed])
  value, error, count = claims.mean(rows, method, "FP8")
  assert (value, count) == (pytest.approx(statistics.fmean(losses)), 3)
  assert error == pytest.approx(statistics.stdev(losses) / 3**0.5)
  assert claims.best(rows, claims.NAIVE, "FP8") == 2e-3  # It diverged at the highest.


def test_the_table_says_what_is_there(rows, tmp_path):
  text = claims.table(rows)
  assert "| naive RTN | 9.00 |" in text
  assert "diverged" in text
  gap = 0.01 * 7  # ECO + SR, schedule-aware, is seven places behind the baseline.
  (row,) = [x for x in text.splitlines() if x.startswith("| ECO + SR, schedule")][:1]
  assert f"{gap:+.4f}" in row
  # Differences are paired: seeds that move both by as much leave the gap what it is.
  for method in ("master weights + RTN", "ECO + SR, schedule-aware"):
    first = rows[claims.Key(method, "FP8", 6e-3, 0, 1).name]["validation_loss"]
    for seed in (1, 2):
      rows |= line(claims.Key(method, "FP8", 6e-3, seed, 1), first + 0.1 * seed)
    rows |= line(claims.Key(method, "FP8", 6e-3, 0, 4), first - 1)
  (row,) = [x for x in claims.table(rows).splitlines() if x.startswith("| ECO + SR, schedule")][:1]
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[6:8] == ["3", f"{gap:+.4f} ± 0.0000"]
  assert cells[9:] == [f"{first - 1:.4f}", f"{gap:+.4f}"]
  (row,) = [x for x in claims.summary(rows).splitlines() if x.startswith("| ECO + SR, schedule")]
  cells = [cell.strip() for cell in row.strip("|").split("|")]
  assert cells[1:4] == ["9.00", f"{gap:+.4f} ± 0.0000", f"{gap:+.4f}"]
  assert cells[4:] == ["9.00", f"{gap:+.4f}", "–"]  # INT4 has but one seed here.
  claims.plot(rows, tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"pareto.png", "rates.png", "curves.png"}
  json.dumps(rows)


@pytest.mark.parametrize("study", [storage, nearest, clips, optimizers])
def test_studies_compare_seed_by_seed(study, tmp_path):
  """The methods' losses are known here, and each seed adds its own to all."""
  rows = {}
  for _ in range(3):  # Some runs are wanted once others are finished.
    for run in study.runs(rows, 100):
      own = {key: value for key, value in run.changes.items() if key != "seed"}
      rank = sum(map(ord, json.dumps(own, sort_keys=True))) % 97
      loss = 2 + 1e-3 * rank + 0.1 * run.changes["seed"]
      rows[run.name] = {"validation_loss": loss, "bytes_per_parameter": {"total": 5.0}}
      assert run.changes["steps"] in (50, 100)
      # Each is a config that can be.
      c = config.small()
      c.model.update(layers=1, width=16, heads=1)
      c.update_from_flattened_dict(run.changes)
      config.validate(c)
  more = {name for name in rows if int(name.rsplit(" ", 1)[1]) > 2}
  assert {name.rsplit(" ", 1)[1] for name in rows.keys() - more} == {"0", "1", "2"}
  assert all(re.match(r"sgd, [^,]+, FP8, .* seed [3-8]$", name) for name in more)
  assert len(more) == (3 * 6 if study is optimizers else 0)  # Three methods, six seeds.
  text = study.table(rows)
  table = [line.split(" | ") for line in text.splitlines() if "5.00" in line]
  assert len(table) >= 3
  nine = [cells for cells in table if cells[0] == "| sgd"][:1]  # The table of FP8 is the first.
  for cells in table:
    means, gaps = (
      [x for x in cells if x[:2] == "2."],
      [x for x in cells if x[:1] in "+-" and "±" in x],
    )
    # Seeds are 0.1 apart, three of them or nine, which says nothing of a gap.
    error = "0.0913" if cells in nine else "0.0577"
    assert all(re.fullmatch(rf"2\.\d{{4}} ± {error}", x.rstrip(" |")) for x in means), cells
    assert all(x.rstrip(" |").endswith("± 0.0000") for x in gaps), cells
    assert means
    assert gaps
  study.plot(rows, tmp_path)
  (figure,) = tmp_path.iterdir()
  assert figure.stat().st_size > 10_000


def test_a_run_that_diverged_has_no_gap():
  rows = {
    name: {"validation_loss": loss, "bytes_per_parameter": {"total": 9.0}}
    for name, loss in {"a0": 2.0, "a1": None, "b0": 1.0, "b1": 1.5}.items()
  }
  assert sweep.compared(rows, ["a0", "a1"], ["b0", "b1"]) == ("diverged", "–")
  assert sweep.compared(rows, ["a0", "a2"], ["b0", "b1"]) == ("2.0000", "+1.0000")
  assert sweep.compared(rows, ["b0", "b1"], ["c0", "c1"]) == ("1.2500 ± 0.2500", "–")
  assert sweep.compared(rows, ["c0"], ["b0"]) == ("–", "–")


def test_fine_tuning_is_compared_at_each_methods_best_rate(tmp_path):
  rows = {}
  for i, run in enumerate(finetune.runs(rows, 100)):
    rows[run.name] = {"validation_loss": 3 - 0.01 * i, "bytes_per_parameter": {"total": 8.5}}
    c = config.small()
    c.model.update(layers=1, width=16, heads=1)
    c.update_from_flattened_dict(run.changes)
    config.validate(c)
  text = finetune.table(rows)
  assert "before: 3.0000" in text
  assert "| master weights + RTN | 8.50 | 2.9900 | 2.9300 | +0.0000 |" in text
  assert "| ECO + SR | 8.50 | 2.9400 | 2.8800 | -0.0500 |" in text
  assert finetune.gap(rows, "ECO + SR") == pytest.approx(-0.05)
  assert finetune.gap({name: rows[name] for name in list(rows)[:-1]}, "ECO + SR") is None
  finetune.plot(rows, tmp_path)
  assert (tmp_path / "finetune.png").stat().st_size > 10_000


def test_the_papers_own_size_is_compared_at_each_methods_best_rate(tmp_path):
  rows = {}
  for i, run in enumerate(scale.runs(rows, 100)):
    row = {"validation_loss": 4 + 0.01 * i, "bytes_per_parameter": {"total": 9.0}}
    rows[run.name] = row | {"training_curve": [(1, 10.0), (2, 9.0)]}
    c = config.small()
    c.model.update(layers=1, width=16, heads=1)
    c.update_from_flattened_dict(run.changes)
    config.validate(c)
  rows["ECO + SR, lr 0.0024"]["validation_loss"] = 3.9
  rows["naive RTN, lr 0.0012"]["validation_loss"] = None  # It diverged, but not at the other rate.
  text = scale.table(rows)
  # The first of seven at each rate is what they are held against.
  assert "| BF16 master weights | 9.00 | 4.0000 | 4.0700 | +0.0000 | +0.0000 |" in text
  assert "| ECO + SR | 9.00 | 4.0600 | 3.9000 | -0.1000 | +0.0079 |" in text
  assert "| naive RTN | 9.00 | diverged | 4.1000 | +0.1000 | diverged |" in text
  scale.plot(rows, tmp_path)
  assert (tmp_path / "scale.png").stat().st_size > 10_000
  assert "| BF16 master weights | – | – | – | – | +0.0000 |" in scale.table({})


def test_families_are_compared_seed_by_seed(tmp_path):
  configs = {name: config.small() for name in families.FAMILIES}
  configs["gemma_3m"].model.update(layers=1, width=16, heads=1)
  runs = families.runs(configs)
  assert len(runs) == 2 * 4 * 3
  own = {run.name: config.small() for run in runs}
  for run in runs:
    own[run.name].update_from_flattened_dict(run.changes)
  gemma = own["gemma_3m, ECO, seed 1"]
  assert (gemma.model.width, gemma.method, gemma.seed) == (16, "eco_sr", 1)
  assert own["llama_3m, master weights, seed 0"].model == config.small().model
  rows = {}
  for i, run in enumerate(runs[:-1]):
    row = {"validation_loss": 2 + 0.01 * i, "bytes_per_parameter": {"total": 9.0 + i % 2}}
    row |= {"parameters": 2000, "quantized_parameters": 1000}
    rows[run.name] = row | {"validation_curve": [(1, 3.0), (2, 2.0)]}
  text = families.table(rows)
  losses = "2.0800 ± 0.0462 | 2.0900 ± 0.0462 | +0.0100 ± 0.0000"
  assert f"| llama_3m | 2,000 | 1,000 | {losses} | 3 | 9.00 / 10.00 |" in text
  losses = "2.1400 ± 0.0462 | 2.1100 ± 0.0400 | +0.0100 ± 0.0000"  # A run of ECO's is missing.
  assert f"| deepseek_3m | 2,000 | 1,000 | {losses} | 2 | 9.00 / 10.00 |" in text
  assert "| smoe_3m | – | – | – | – | – | 0 | – / – |" in families.table({})
  families.plot(rows, tmp_path)
  assert (tmp_path / "families.png").stat().st_size > 10_000
