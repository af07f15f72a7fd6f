"""Several runs of one config side by side: a table, its JSON and a figure."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import ml_collections

from eco_optax.training import loop, methods, metrics, report

# Methods that round weights and store the rest in float32; the first is the reference.
METHODS: dict[str, dict[str, Any]] = {
  method.label: method.changes | {"schedule_aware": method.schedule_aware}
  for method in methods.METHODS.values()
  if method.rounding and method.stores_float32
}


def compare(
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path,
  results: str | pathlib.Path,
  runs: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
  """Trains the runs that have no summary yet and writes what came out.

  Args:
    config: of all runs, before what each changes.
    workdir: holds one folder per run; a complete run is not run again.
    results: folder for comparison.json, comparison.md and comparison.png.
    runs: changes to the config by name; None takes `METHODS`.

  Returns:
    A summary per run, in the order of the runs.
  """
  runs = runs or METHODS
  out = pathlib.Path(results)
  out.mkdir(parents=True, exist_ok=True)
  rows, curves = [], {}
  for name, changes in runs.items():
    own = ml_collections.ConfigDict(config.to_dict() | {"nonfinite": "record"} | changes)
    folder = pathlib.Path(workdir) / "".join(c if c.isalnum() else "_" for c in name)
    done = folder / "summary.json"
    if not done.exists() or not _is_same_run(json.loads(done.read_text())["config"], own.to_dict()):
      if done.exists():
        shutil.rmtree(folder)  # Of another config.
      loop.train(own, folder)
    rows.append({"run": name} | json.loads(done.read_text()))
    curves[name] = folder / "metrics.jsonl"
    curve = metrics.read_metrics(curves[name])
    rows[-1]["validation_curve"] = [
      (row["step"], row["validation_loss"]) for row in curve if "validation_loss" in row
    ]
    (out / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "comparison.md").write_text(table(rows))
  report.plot_losses(curves, out / "comparison.png")
  return rows


def _is_same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
  """Whether two configs give the same numbers: only what happens when they end may differ."""
  return one | {"nonfinite": None} == other | {"nonfinite": None}


def table(rows: list[dict[str, Any]]) -> str:
  """The summaries as a Markdown table, with the gap to the first run."""
  first = rows[0]["validation_loss"]
  lines = [
    f"| run | validation loss | against {rows[0]['run']} | bytes per parameter |",
    "|---|---|---|---|",
  ]
  for row in rows:
    loss, used = row["validation_loss"], row["bytes_per_parameter"]["total"]
    shown = f"diverged at step {row['diverged_at_step']}" if loss is None else f"{loss:.4f}"
    gap = "" if loss is None or first is None else f"{loss - first:+.4f}"
    lines.append(f"| {row['run']} | {shown} | {gap} | {used:.2f} |")
  return "\n".join(lines) + "\n"
