"""Runs that are killed end as those that are not; what the harness for it would not let pass."""

import json

import pytest

from experiments import faults

# Half of what the script's runs have.
SHORT = {"steps": 120, "checkpoint__every": 20, "evaluate_every": 25}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  bench = faults.Bench(tmp_path_factory.mktemp("faults"), show=lambda text: None)
  bench.finish("undisturbed", **SHORT)
  return bench


def test_a_run_that_is_killed_ends_as_one_that_is_not(bench):
  # After its step 29 of 120, and as it saves after its step 46.
  killed, _ = faults.kill(bench, "stopped twice", 2, **SHORT)
  assert killed == 2
  assert bench.check_same_end("stopped twice") == "ended bit for bit as the undisturbed run"


def test_so_does_one_with_gradient_release(bench):
  how = {"release": True, "optimizer__clip": "previous"}
  how |= {"steps": 40, "checkpoint__every": 10, "evaluate_every": 40}
  bench.finish("released", **how)
  programs = lambda: {path.name for path in (bench.folder / "compiled").glob("jit_step-*-cache")}
  compiled = programs()
  killed, _ = faults.kill(bench, "killed released", 1, **how)
  assert killed == 1
  assert bench.check_same_end("killed released", "released")
  assert programs() == compiled  # Other processes have the same program, and need not compile it.


def test_a_difference_is_seen(bench):
  bench.copy("metric", "undisturbed")
  log = bench.folder / "metric" / "metrics.jsonl"
  lines = log.read_text().splitlines(keepends=True)
  log.write_text("".join(lines[:3] + lines[4:]))
  with pytest.raises(AssertionError, match="has other metrics"):
    bench.check_same_end("metric")

  bench.copy("state", "undisturbed")
  path = bench.newest("state") / "record" / "metadata"
  record = json.loads(path.read_text())
  record["checksums"]["params/head"] += 1
  path.write_text(json.dumps(record))
  with pytest.raises(AssertionError, match=r"ended with other values of .*params/head"):
    bench.check_same_end("state")


def test_bad_data_are_refused_before_a_step(bench):
  names = ["data: broken JSON", "data: changed tokenizer"]
  outcomes = faults.inject(bench, names)
  assert "line 7 is not JSON" in outcomes[names[0]]
  assert "tokenizer.json is not the tokenizer" in outcomes[names[1]]
  assert "FAILED" not in faults.table(outcomes)


def test_what_should_not_happen_fails(bench, monkeypatch):
  ended = 0, "step 120 of 120"  # As if nothing had been wrong with it.
  monkeypatch.setitem(faults.FAULTS, "none", lambda bench: faults._said(bench, *ended, "no"))
  assert faults.inject(bench, ["none"])["none"].startswith("FAILED")
