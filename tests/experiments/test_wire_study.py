"""Gradient exchange against its papers: the headline on one problem, and the published tables."""

import json
import pathlib

import numpy as np
import pytest

from eco_optax import wire
from experiments.studies import exchange
from experiments.studies import wire as study

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results" / "wire"


def test_error_feedback_stalls_where_ef21_and_econtrol_converge_linearly():
  problem = study.quadratic(4, is_heterogeneous=True)
  rate = study.ef21_rate(problem, "quadratic")
  txs = study.methods(4, problem.smoothness)
  found = {
    name: study.course(problem, txs[name], rate, 1200)
    for name in ("no feedback", "error feedback", "EF21", "EControl")
  }
  for name in ("EF21", "EControl"):
    assert study.measured_rate(found[name]) <= 1 - rate * problem.mu, name
    assert study.floor_of(found[name]) < 1e-9, name
  # A step of half the size ends at a quarter of the distance.
  half = study.course(problem, txs["error feedback"], rate / 2, 1200)
  ends = [study.floor_of(x) for x in (found["error feedback"], half)]
  assert 1e-4 < ends[0] < 1e-2
  np.testing.assert_allclose(ends[0] / ends[1], 4, rtol=0.1)
  assert study.floor_of(found["no feedback"]) > 0.1


def test_problems_have_the_constants_that_theorems_are_given():
  for problem in (study.quadratic(3, True), study.skewed(5, 0.5), study.logistic(3, True)):
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, study.D)).astype(np.float32)
    g = [np.asarray(problem.gradients(z), np.float64) for z in (x, y)]
    ratios = np.linalg.norm(g[0] - g[1], axis=1) / np.linalg.norm(x - y)
    assert np.all(ratios <= 1.001 * problem.smoothness)
    mean = np.linalg.norm((g[0] - g[1]).mean(axis=0)) / np.linalg.norm(x - y)
    assert problem.mu <= 1.001 * mean <= 1.002 * problem.L
    at_best = np.asarray(problem.gradients(problem.best.astype(np.float32))).mean(axis=0)
    assert np.linalg.norm(at_best) < 1e-5 * np.linalg.norm(g[0].mean(axis=0)) + 1e-6
    gap = problem.value(np.stack([problem.best, x]))
    assert abs(gap[0]) < 1e-12 < gap[1]
  np.testing.assert_allclose(np.mean(study.skewed(5, 0.5).smoothness), 1)


def test_the_published_study_holds_and_its_table_is_the_pages():
  found = json.loads((RESULTS / "theory.json").read_text())
  assert study.failures(found) == []
  table = study.table(found)
  assert table == (RESULTS / "theory.md").read_text()
  assert table.strip() in (ROOT / "docs" / "wire.md").read_text()


def test_a_rate_above_the_theorems_is_seen():
  found = json.loads((RESULTS / "theory.json").read_text())
  row = next(row for row in found["convergence"] if row["method"] == "EControl")
  row["factor"] = 0.9999
  assert len(study.failures(found)) == 1
  row["factor"] = None
  assert len(study.failures(found)) == 1


def test_tables_of_runs_are_those_of_their_files_and_the_pages():
  tables = exchange.tables(RESULTS)
  assert tables == (RESULTS / "table.md").read_text()
  page = (ROOT / "docs" / "wire.md").read_text()
  for table in tables.strip().split("\n\n"):
    assert table in page


@pytest.mark.parametrize(
  ("model", "topology", "sums"),
  [("stdlib_1m", "v5p:2x2x1", 1), ("stdlib_1m", "h100:4", 1), ("llama_800m", "h100:4", 4)],
)
def test_bytes_of_compiled_steps_are_those_of_the_codes(model, topology, sums):
  """Both ways, codes and scales of all values; TPUs gather scales by a sum, which counts twice.

  Without an exchange of codes the compiler sums the gradients of each part of a batch.
  """
  compiled = exchange.read(RESULTS)[1]
  rows = [row for row in compiled if (row["model"], row["topology"]) == (model, topology)]
  assert [row["wire"] for row in rows] == list(exchange.WIRES)
  for row in rows:
    name = exchange.WIRES[row["wire"]]["wire"]
    each = 4.0 * sums if name == "none" else wire.COMPRESSORS[name]().bytes_per_value
    by_dtype = exchange.by_dtype(row["collectives"])
    assert sum(by_dtype.values()) == exchange.moved(row["collectives"])
    share = sum(by_dtype.values()) / (2 * each * row["parameters"])
    assert 0.97 < share < 1.1, row["wire"]
    if name != "none":
      assert {"all-to-all", "all-gather"} <= set(row["collectives"])
      assert "u8" in row["collectives"]["all-to-all"]
