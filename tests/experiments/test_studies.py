"""The studies of the theory: what they compute, what they would notice, and what was published."""

import json
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eco_optax import diagnostics, theory
from eco_optax.training import methods
from experiments import results
from experiments.studies import bounds, grid, muon, similarity, stationary

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results" / "theory"


def test_small_stationary_study_and_its_figure(tmp_path):
  rows = stationary.study(stationary.SMALL_POINTS[:1], chains=10_000, show=lambda line: None)
  # A standard error here is up to 0.5%, so that its 99% interval and a usual deviation need 5%.
  assert not stationary.failures(rows, 0.05)
  # It notices a closed form that is 5% off, and an interval that is too wide.
  wrong = [row | {"deviation": row["deviation"] + 0.05} for row in rows]
  assert len(stationary.failures(wrong, 0.05)) == len(rows)
  assert stationary.failures(rows, 1e-4)
  stationary.plot(rows, tmp_path / "stationary.png")
  assert (tmp_path / "stationary.png").stat().st_size > 10_000


@pytest.mark.standard_promotion
def test_small_grid_study_and_its_figure(tmp_path):
  assert not grid.run(tmp_path, small=True)
  rows = json.loads((tmp_path / "grid.json").read_text())["rows"]
  assert grid.table(rows) == (tmp_path / "grid.md").read_text()
  assert (tmp_path / "grid.png").stat().st_size > 10_000
  found = {
    (row["problem"], row["method"]): row["squared_gradient"] / row["rounded_optimum"]
    for row in rows
    if row["learning_rate"] == 1e-2
  }
  # White noise would have naive removal at 54.8, and ECO at 5.26, here.
  assert found["apart", "naive"] < 1.3
  assert found["apart", "eco"] < 1.3
  assert found["apart, gradient noise", "eco"] < 0.7 * found["apart, gradient noise", "naive"]
  assert found["coupled", "naive"] < 0.2 * found["coupled", "master_weights"]
  # It notices predictions that are three times what is seen.
  wrong = [row | {"predicted": 3 * row["predicted"]} for row in rows]
  assert len(grid.failures(wrong, 3 * grid.TOLERANCE)) == 9


def test_muon_pays_back_a_part_where_sgd_pays_all():
  with jax.enable_x64(True):
    sgd = muon.payback((12, 12), None, muon.DIRECTIONS["exact polar factor"], 1, 100)
    found = {
      name: muon.payback((12, 12), rule, muon.DIRECTIONS["exact polar factor"], 2, 100)
      for name, rule in muon.RULES.items()
    }
    draw = np.random.default_rng(0)
    matrix, error = (jnp.asarray(draw.standard_normal((9, 6))) for _ in range(2))
    wanted = theory.polar_payback(matrix, error)
    np.testing.assert_allclose(muon.antisymmetric(matrix, error), wanted, atol=1e-8)
    _, s, qt = np.linalg.svd(matrix, full_matrices=False)
    wanted = np.asarray(error) @ (qt.T * s) @ qt
    np.testing.assert_allclose(muon.published(matrix, error), wanted, atol=1e-8)
  # 1 − β^k after k steps.
  np.testing.assert_allclose(sgd.share, 1 - muon.BETA ** np.arange(1, 101), atol=1e-5)
  assert sgd.distance[-1] < 0.01
  assert all(0.2 < own.share[-1] < 0.8 and own.distance[-1] > 0.4 for own in found.values())


def test_published_tables_and_claims_of_muon():
  found = json.loads((RESULTS / "muon.json").read_text())
  assert not muon.failures(found)
  # It notices a rule that pays all, and a share of one element that is another.
  name = next(iter(found["payback"]))
  wrong = found | {"payback": found["payback"] | {name: {"share": [0.5]}}}
  assert len(muon.failures(wrong)) == 1
  wrong = found | {"by_ratio": [row | {"published rule": 0.5} for row in found["by_ratio"]]}
  assert len(muon.failures(wrong)) >= len(found["by_ratio"]) - 1
  page = (ROOT / "docs" / "carry_back.md").read_text()
  assert muon.payback_table(found).strip() in page
  rows = json.loads((RESULTS / "muon_runs.json").read_text())["rows"]
  assert muon.table(rows).strip() in page


def test_the_networks_constants_hold_and_it_is_not_convex():
  problem = bounds.network()
  shape = (problem.inputs, problem.hidden)
  one = lambda w: problem.loss({"w": w.reshape(1, *shape)})[0]
  hessian, gradient = jax.jit(jax.hessian(one)), jax.jit(jax.grad(one))
  eigenvalues, norms = [], []
  for i in range(40):
    w = 3 * jax.random.uniform(jax.random.key(i)) * jax.random.normal(jax.random.key(i), shape)
    eigenvalues.append(np.linalg.eigvalsh(np.asarray(hessian(w.ravel()), np.float64)))
    norms.append(np.linalg.norm(gradient(w.ravel())))
  assert np.max(np.abs(eigenvalues)) <= problem.smoothness
  assert np.max(norms) <= problem.gradient
  assert np.min(eigenvalues) < -1e-3 * problem.smoothness
  # Within a hundred times of what is met, or a bound would say nothing.
  assert np.max(np.abs(eigenvalues)) > problem.smoothness / 100
  assert np.max(norms) > problem.gradient / 100


@pytest.mark.parametrize("setting", bounds.SMALL_SETTINGS, ids=lambda s: s.rounding)
def test_training_keeps_the_bounds(setting):
  row = bounds.measure(bounds.network(), setting, steps=300, chains=8)
  assert not bounds.failures([row])
  assert row["gradient"] < row["start_gradient"]  # It trained.
  assert row["smallest_gradient"] < row["gradient"]
  assert 0 < row["error"] < row["error_bound"]
  for name in ("gradient", "momentum", "error"):  # What is beyond its bound is told.
    (failure,) = bounds.failures([row | {name: 1.01 * row[f"{name}_bound"]}])
    assert name in failure


def test_the_script_writes_what_it_finds(tmp_path):
  command = [sys.executable, ROOT / "scripts" / "theory.py", "--small", "--study=bounds"]
  out = subprocess.run(
    [*command, f"--results={tmp_path}"], capture_output=True, text=True, check=True
  ).stdout
  figures = json.loads((tmp_path / "bounds.json").read_text())
  assert bounds.table(figures["rows"]) == (tmp_path / "bounds.md").read_text()
  assert (tmp_path / "bounds.md").read_text() in out
  assert {"command", "versions", "machine"} <= figures.keys()


def test_compare_errors_is_the_definitions():
  generator = np.random.default_rng(0)
  draw = lambda: {"w": generator.standard_normal((3, 4)), "v": generator.standard_normal((2, 2))}
  old, new, mu = draw(), draw(), draw()
  nu = jax.tree.map(np.square, draw())
  b1, b2, eps, rate, t = 0.9, 0.98, 1e-3, 0.01, 7
  leaves = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

  def state(error):
    adam = optax.ScaleByAdamState(jnp.asarray(t, jnp.int32), leaves(mu), leaves(nu))
    return (optax.EmptyState(), diagnostics.WatchState((adam,), leaves(error), ()))

  seen = similarity.compare_errors(
    state(old), state(new), jnp.asarray(rate, jnp.float32), b1, b2, eps
  )
  flat = lambda tree: np.concatenate([tree[name].ravel() for name in ("w", "v")])
  e, f, m, v = map(flat, (old, new, mu, nu))
  norm = np.linalg.norm
  units = (1 - b1**t) * (np.sqrt(v / (1 - b2**t)) + eps)
  wanted = {
    "norm": norm(f),
    "norm_ratio": norm(f) / norm(e),
    "cosine": e @ f / norm(e) / norm(f),
    "change": norm(f - e) / rate / norm(m),
    "adam_change": norm(units * (f - e)) / rate / norm(m),
  }
  assert seen.keys() == wanted.keys()
  for name, value in wanted.items():
    np.testing.assert_allclose(seen[name], value, rtol=2e-5)


def test_similarity_tells_what_is_unlike_the_paper():
  rates = [1.0, 2.0, 1.0, 0.5]
  settled = {"learning_rate": rates, "norm": rates, "norm_ratio": [None, 1.3, 1.1, 1.0]}
  rising = settled | {"cosine": [None, 0.2, 0.5, 0.9]}
  assert not similarity.failures({"ECO + RTN": rising})
  falling = settled | {"cosine": [None, 0.9, 0.5, 0.2]}
  assert "cosine 0.900 at the peak" in similarity.failures({"ECO + RTN": falling})[0]
  assert not similarity.failures({"ECO + SR": falling})  # Of which nothing is claimed.
  growing = rising | {"norm_ratio": [None, 1.0, 1.0, 1.1]}
  assert "norm ratio 1.100" in similarity.failures({"ECO + SR": growing})[0]


@pytest.mark.standard_promotion
def test_similarity_is_measured_along_a_real_run(tmp_path):
  config = runpy.run_path(str(ROOT / "configs" / "tiny.py"))["get_config"]()
  config.model.layers = 1
  config.steps = 4
  config.mesh.data = 1
  series = similarity.study(config, {"master weights + RTN": methods.BY_NAME["mw_rtn"]})
  (own,) = series.values()
  assert own["norm_ratio"][0] is None  # Before the first step there is no error.
  norm = np.array(own["norm"])
  np.testing.assert_allclose(own["norm_ratio"][1:], norm[1:] / norm[:-1], rtol=2e-4)
  assert np.all(np.abs(own["cosine"][1:]) <= 1)
  assert own["loss"][-1] < own["loss"][0]
  similarity.plot(series, tmp_path / "similarity.png")
  assert (tmp_path / "similarity.png").stat().st_size > 10_000


def test_published_figures_keep_the_claims():
  load = lambda name: json.loads((RESULTS / f"{name}.json").read_text())
  rows = load("stationary")["rows"]
  assert not stationary.failures(rows)
  assert stationary.summary(rows) == (RESULTS / "stationary.md").read_text()
  points = {(row["learning_rate"], row["beta"], row["curvature"]) for row in rows}
  assert points == {tuple(point) for point in stationary.POINTS}
  rows = load("grid")["rows"]
  assert not grid.failures(rows)
  assert grid.table(rows) == (RESULTS / "grid.md").read_text()
  assert {row["learning_rate"] for row in rows} == set(grid.RATES)
  rows = load("bounds")["rows"]
  assert not bounds.failures(rows)
  assert bounds.table(rows) == (RESULTS / "bounds.md").read_text()
  series = load("similarity")["runs"]
  assert set(series) == set(similarity.RUNS)
  assert not similarity.failures(series)
  assert similarity.table(series) == (RESULTS / "similarity.md").read_text()


def test_the_published_page_is_that_of_the_published_figures(tmp_path):
  """And without any figures nothing is claimed to have been measured."""
  assert (ROOT / "RESULTS.md").read_text() == results.markdown(ROOT / "results")
  empty = results.markdown(tmp_path).split("\n## ")[0]
  rows = [line.split(" | ") for line in empty.splitlines() if line.startswith("| ")][1:]
  assert len(rows) > 15
  assert {row[2] for row in rows} == {"–"}
