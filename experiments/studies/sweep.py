"""Many runs, each in a process on cores of its own, one line of results per finished run.

The lines are all that a sweep needs to resume, on another day or machine: a run with a line is not
run again, and an interrupted run resumes from its checkpoints if they are there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from eco_optax.training import config as config_lib
from eco_optax.training import metrics

# Cores are chosen before JAX counts them to make its threads.
_RUN = """
import importlib
import json
import os
import pathlib
import sys
os.sched_setaffinity(0, json.loads(sys.argv[3]))
from eco_optax.training import config, jobs, loop
changed = config.defaults()
changed.update_from_flattened_dict(json.loads(sys.argv[1]))
folder = pathlib.Path(sys.argv[2])
with jobs.plain_errors():
  loop.train(changed, folder)
  if sys.argv[4]:
    module, name = sys.argv[4].split(":")
    measured = getattr(importlib.import_module(module), name)(folder)
    (folder / "measured.json").write_text(json.dumps(measured))
"""
_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep."""

  name: str
  changes: dict[str, Any]  # To the sweep's config, by the names that flags give keys.
  # "module:function" from the finished run's folder to what its line has besides, if anything.
  measure: str = ""

  @property
  def folder(self) -> str:
    """The name as one of a folder."""
    return re.sub(r"[^\w.+-]+", "_", self.name)


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The finished runs of a results file, by name; the last line of a name counts."""
  rows = metrics.read_metrics(path) if path.exists() else []
  return {row["run"]: row for row in rows}


def missing(
  runs: Sequence[Run], path: pathlib.Path, config: ml_collections.ConfigDict
) -> list[Run]:
  """The runs that have no line yet, or one of another config, in their order."""
  done, usual = read(path), _kept(config_lib.flat(config_lib.defaults()))
  return [
    run
    for run in runs
    # What a line does not have yet had its default.
    if run.name not in done or usual | done[run.name]["config"] != _settings(config, run)
  ]


def mean_and_error(values: Sequence[float]) -> tuple[float, float, int]:
  """The mean, its standard error over the values, and how many there are.

  The mean of no value is NaN, and so is the error of one; the mean is infinite if a value is.
  """
  if not values:
    return math.nan, math.nan, 0
  mean = statistics.fmean(values)
  if len(values) == 1 or math.inf in values:
    return mean, math.nan, len(values)
  return mean, statistics.stdev(values) / math.sqrt(len(values)), len(values)


def losses(rows: Mapping[str, Any], names: Sequence[str]) -> list[float | None]:
  """Validation losses of runs, infinite where one diverged, None where there is none."""
  found = [rows.get(name) for name in names]
  loss = lambda row: math.inf if row["validation_loss"] is None else row["validation_loss"]
  return [None if row is None else loss(row) for row in found]


def compared(
  rows: Mapping[str, Any], names: Sequence[str], references: Sequence[str]
) -> tuple[str, str]:
  """Two cells of a table: a mean loss, and its mean difference to others, with standard errors.

  Args:
    rows: finished runs.
    names: of one run per seed.
    references: of the runs to hold them against, in the same order of seeds.

  Returns:
    The mean over finished seeds, and of differences where both have finished.
  """
  own, others = losses(rows, names), losses(rows, references)
  mean, error, count = mean_and_error([x for x in own if x is not None])
  pairs = [(x, y) for x, y in zip(own, others, strict=True) if x is not None and y is not None]
  gap, gap_error, pairs_count = mean_and_error([x - y for x, y in pairs])
  if not count:
    return "–", "–"
  if not math.isfinite(mean):
    return "diverged", "–"
  with_error = lambda text, error: text if math.isnan(error) else f"{text} ± {error:.4f}"
  shown = with_error(f"{gap:+.4f}", gap_error) if pairs_count and math.isfinite(gap) else "–"
  return with_error(f"{mean:.4f}", error), shown


def used_bytes(rows: Mapping[str, Any], names: Sequence[str]) -> str:
  """A cell of a table: bytes per quantized parameter, of the first finished run."""
  own = [rows[name] for name in names if name in rows]
  return f"{own[0]['bytes_per_parameter']['total']:.2f}" if own else "–"


def _settings(config: ml_collections.ConfigDict, run: Run) -> dict[str, Any]:
  """The settings that a run's numbers depend on, without its data, as JSON returns them."""
  flat = config_lib.flat(config) | {"nonfinite": "record"} | run.changes
  return _kept(flat)


def _kept(flat: dict[str, Any]) -> dict[str, Any]:
  places = ("data.", "checkpoint.", "init_from")
  flat = {key: value for key, value in flat.items() if not key.startswith(places)}
  return json.loads(json.dumps(flat))


def sweep(
  config: ml_collections.ConfigDict,
  plan: Callable[[dict[str, dict[str, Any]]], Sequence[Run]],
  workdir: str | pathlib.Path,
  results: str | pathlib.Path,
  *,
  processes: int = 1,
  minutes: float = float("inf"),
  show: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
  """Trains the runs that have no line in the results yet, several at a time.

  Args:
    config: of all runs, before what each changes.
    plan: finished runs by name → the runs that are wanted, in this order; asked again after each.
    workdir: one folder per run is made in it, and removed once its line is written.
    results: the file of lines: a run's name, settings, losses over time, bytes, versions, machine.
    processes: at a time; each has its share of the cores, so that none waits for another.
    minutes: after which no run is started, and running ones are asked to stop and save.
    show: is given a line whenever a run begins or ends.

  Returns:
    All finished runs by name.

  Raises:
    RuntimeError: if runs ended with an error, with what the first said, once the others are done.
  """
  workdir, results = pathlib.Path(workdir), pathlib.Path(results)
  results.parent.mkdir(parents=True, exist_ok=True)
  # SIGTERM to the sweep ends its runs too; they save first.
  previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
  end = time.monotonic() + 60 * minutes
  cores = sorted(os.sched_getaffinity(0))
  share = max(len(cores) // processes, 1)
  free = [cores[i * share : (i + 1) * share] for i in range(processes)]
  busy: list[tuple[Run, subprocess.Popen, list[int]]] = []
  failed: dict[str, str] = {}

  def wanted() -> list[Run]:
    begun = {run.name for run, _, _ in busy} | failed.keys()
    runs = missing(plan(read(results)), results, config)
    return [run for run in runs if run.name not in begun]

  is_over, todo = False, wanted()
  try:
    while busy or (todo and time.monotonic() < end):
      while todo and free and time.monotonic() < end:
        run, own = todo.pop(0), free.pop()
        show(f"{run.name}; {len(todo)} are left")
        busy.append((run, _start(config, run, workdir / run.folder, own), own))
      time.sleep(0.5)  # Runs take a minute or more.
      if time.monotonic() >= end and not is_over:
        is_over = True  # They are asked once: a second time would end them while they save.
        for _, process, _ in busy:
          process.terminate()
      for entry in [entry for entry in busy if entry[1].poll() is not None]:
        run, process, own = entry
        busy.remove(entry)
        free.append(own)
        if is_over and process.returncode == -signal.SIGTERM:
          continue  # Asked behind its training, which saves: it goes on from there another time.
        if process.returncode:
          log = (workdir / run.folder / "log").read_text()
          failed[run.name] = f"{run.name} ended with {process.returncode}: {log[-2000:]}"
          show(failed[run.name])
        elif (workdir / run.folder / "summary.json").exists():
          row = _row(config, run, workdir / run.folder)
          with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
          shutil.rmtree(workdir / run.folder)
          show(f"{run.name}: {row['validation_loss']}")
          todo = wanted()
  finally:
    for _, process, _ in busy:
      process.terminate()
    for _, process, _ in busy:
      process.wait()
    signal.signal(signal.SIGTERM, previous)
  if failed:
    raise RuntimeError(next(iter(failed.values())))
  return read(results)


def _start(
  config: ml_collections.ConfigDict, run: Run, folder: pathlib.Path, cores: list[int]
) -> subprocess.Popen:
  """Begins or continues a run."""
  folder.mkdir(parents=True, exist_ok=True)
  flat = config_lib.flat(config) | {"nonfinite": "record"} | run.changes
  arguments = [json.dumps(flat), str(folder), json.dumps(cores), run.measure]
  with (folder / "log").open("w") as log:
    return subprocess.Popen(
      [sys.executable, "-c", _RUN, *arguments],
      stdout=log,
      stderr=subprocess.STDOUT,
      # In pages of 2 MiB a step of a small model takes a quarter less time: XLA asks for its memory
      # anew at every step, and the kernel gives it page by page. Others than glibc do not read it.
      env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ | _import_path(),
    )


def _import_path() -> dict[str, str]:
  """The environment in which a run finds this package too, which is not installed."""
  return {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}


def _row(config: ml_collections.ConfigDict, run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """The line of results of a run."""
  summary = json.loads((folder / "summary.json").read_text())
  rows = metrics.read_metrics(folder / "metrics.jsonl")
  kept = "validation_loss diverged_at_step tokens seconds parameters quantized_parameters"
  kept += " bytes_per_parameter versions machine"
  curve = lambda key: [(row["step"], row[key]) for row in rows if row.get(key) is not None]
  measured = folder / "measured.json"
  return {
    "run": run.name,
    **{key: summary[key] for key in kept.split()},
    "tokenizer": summary["corpus"]["tokenizer"],
    "source": summary["corpus"]["source"],
    "validation_curve": curve("validation_loss"),
    "training_curve": [(step, round(loss, 4)) for step, loss in curve("loss")],
    "config": _settings(config, run),
    **(json.loads(measured.read_text()) if measured.exists() else {}),
  }
