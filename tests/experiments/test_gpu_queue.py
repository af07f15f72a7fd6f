"""The queue of a GPU's minutes: it goes on after what fails, and where it stopped."""

import json
import sys
import textwrap

import pytest

from experiments import gpu

PROGRAM = """
import pathlib, sys, time
path, entry = pathlib.Path(sys.argv[1]), sys.argv[2].removeprefix("--entry=")
from experiments import gpu
with open(path.parent / "ran", "a") as ran:
  ran.write(entry + " ")
gpu._put(path, entry, rows={"first": {"milliseconds": 1.0}})
if entry == "fails":
  raise ValueError("out of memory")
if entry == "hangs":
  time.sleep(60)
gpu._put(path, entry, status="done")
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
  """Runs a queue of made-up entries; what became of them."""
  entry = lambda seconds: gpu.Entry(seconds, lambda size: iter(()))
  made = {"fails": entry(60), "hangs": entry(4), "works": entry(60)}
  monkeypatch.setattr(gpu, "ENTRIES", made)
  program = tmp_path / "program.py"
  program.write_text(textwrap.dedent(PROGRAM))
  path = tmp_path / "gpu" / "card.json"
  path.parent.mkdir()

  def run(seconds=100.0, **kwargs):
    (path.parent / "ran").write_text("")
    command = [sys.executable, str(program), str(path)]
    fates = gpu.queue(path, seconds, command=command, **kwargs)
    return fates, (path.parent / "ran").read_text().split(), json.loads(path.read_text())

  return run


def test_a_queue_goes_on_after_what_fails_and_where_it_stopped(queue, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(gpu.pathlib.Path(gpu.__file__).parents[1]))
  fates, ran, figures = queue()
  assert fates == {"fails": "failed", "hangs": "out of time", "works": "done"}
  assert ran == ["fails", "hangs", "works"]
  assert "out of memory" in figures["fails"]["error"]
  assert figures["hangs"]["rows"] == {"first": {"milliseconds": 1.0}}  # What there was.

  fates, ran, _ = queue(names=["works", "fails"])
  assert fates == {"works": "skipped", "fails": "failed"}
  assert ran == ["fails"]
  fates, ran, _ = queue(names=["works"], again=True)
  assert ran == ["works"]


def test_an_entry_writes_rows_with_what_they_were_measured_on(tmp_path, monkeypatch):
  def rows(size):
    yield "one", {"milliseconds": 1.0, "weights": size}
    raise RuntimeError

  monkeypatch.setattr(gpu, "ENTRIES", {"made_up": gpu.Entry(10, rows)})
  path = tmp_path / "card.json"
  with pytest.raises(RuntimeError):
    gpu.run_entry("made_up", path, 64)
  figures = json.loads(path.read_text())["made_up"]
  assert figures["status"] == "running"  # Not done: it runs again.
  assert figures["rows"] == {"one": {"milliseconds": 1.0, "weights": 64}}
  assert figures["command"] == "python scripts/gpu.py --entry=made_up --size=64"
  assert {"python", "jax"} <= figures["versions"].keys()


def test_arithmetic_is_that_of_the_library():
  for name, row in gpu.arithmetic(2**12):
    assert row["equal"] == 1, name


def test_variants_and_ways_run_on_small_matrices():
  rows = dict(gpu._variants("rows", 20, "float32", ({},))(2**16))
  assert rows["default"]["bytes_moved"] == 20
  assert rows["default"]["ratio"] > 0
  (way,) = (make() for name, make in gpu.ways().items() if name == "eco.adamw FP8 (out, in)")
  assert way.transposed
