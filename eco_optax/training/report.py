"""Reports on a run: its progress, and from its files its summary, table and loss curve."""

from __future__ import annotations

import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import flax
import grain
import jax
import ml_collections
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint

from eco_optax.training import config as config_lib
from eco_optax.training import hardware, memory, metrics
from eco_optax.training.models import transformer
from eco_optax.training.step import State


def describe_machine() -> dict[str, Any]:
  """The command, versions and machine that a figure was made with."""
  modules = (jax, optax, flax, grain, ml_dtypes, orbax.checkpoint)
  versions = {module.__name__: module.__version__ for module in modules}
  machine = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "cpu": _processor(),
  }
  versions["python"] = platform.python_version()
  return {"command": command(sys.orig_argv), "versions": versions, "machine": machine}


def command(arguments: Sequence[str]) -> str:
  """A command line to paste into a shell at the root of the repository.

  Args:
    arguments: as the interpreter was given them, see `sys.orig_argv`.
  """
  root = pathlib.Path(__file__).parents[2]

  def from_root(argument: str) -> str:
    path = pathlib.Path(argument).absolute()
    is_script = path.suffix == ".py" and path.is_file() and path.is_relative_to(root)
    return path.relative_to(root).as_posix() if is_script else argument

  return shlex.join(["python", *map(from_root, arguments[1:])])


def _processor() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()


def describe_run(
  config: ml_collections.ConfigDict, state: State, manifest: dict[str, Any]
) -> dict[str, Any]:
  """Describes a run by everything that does not change while it trains.

  Args:
    config: of the run.
    state: of the run, live or abstract.
    manifest: of the data it reads.

  Returns:
    A dictionary for JSON.
  """
  model = config_lib.model(config)
  used = memory.per_parameter(state, transformer.is_quantized(model))
  return {
    "config": config.to_dict(),
    "parameters": transformer.count_params(model, embedding=True),
    "quantized_parameters": sum(memory.quantized(state.params).values()),
    "bytes_per_parameter": used._asdict() | {"total": used.total},
    "corpus": manifest,
    **describe_machine(),
  }


def progress_line(
  step: int, config: ml_collections.ConfigDict, loss: float, rate: float, speed: float
) -> str:
  """A line on a running run: loss, speed, share of the chips' peak, and time left."""
  line = f"step {step:>5}/{config.steps}  loss {loss:.4f}  lr {rate:.2e}"
  if not speed:  # Before a step has been timed.
    return line
  line += f"  {speed:,.0f} tokens/s"
  if chip := hardware.chip(jax.devices()[0].device_kind):
    per_token = transformer.flops_per_token(config_lib.model(config), config.length)
    line += f"  {speed * per_token / (chip.flops * jax.device_count()):.1%} of peak"
  left = (config.steps - step) * config.batch_size * config.length / speed
  return f"{line}  {metrics.clock(left)} left"


def summarize(folder: str | pathlib.Path) -> dict[str, Any]:
  """Makes summary.json and loss.png of a run's folder from its run.json and metrics.jsonl.

  Args:
    folder: of a run, finished or not.

  Returns:
    The summary: `step` (how far it came), `validation_loss` (the last one; None if it has none or
    diverged), `diverged_at_step`, tokens and their rate, and what `describe_run` says.

  Raises:
    FileNotFoundError: if the folder is not of a run.
  """
  folder = pathlib.Path(folder)
  for name in ("run.json", "metrics.jsonl"):
    if not (folder / name).exists():
      raise FileNotFoundError(f"{folder} has no {name}: it is not the workdir of a run")
  run = json.loads((folder / "run.json").read_text())
  rows = metrics.read_metrics(folder / "metrics.jsonl")
  last = lambda name: next((row[name] for row in reversed(rows) if name in row), None)
  step = max((row["step"] for row in rows), default=0)
  diverged = next((row["step"] for row in rows if row.get("diverged")), None)
  summary = {
    "step": step,
    "validation_loss": None if diverged else last("validation_loss"),
    "diverged_at_step": diverged,
    "skipped": int(last("skipped") or 0),
    "tokens_per_second": last("tokens_per_second"),
    "tokens": step * run["config"]["batch_size"] * run["config"]["length"],
    "seconds": last("seconds"),
    **run,
  }
  metrics.write_whole(
    folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n"
  )
  plot_losses({run["config"]["method"]: folder / "metrics.jsonl"}, folder / "loss.png")
  return summary


def closing_table(summary: dict[str, Any]) -> str:
  """A summary as text."""
  used, loss = summary["bytes_per_parameter"], summary["validation_loss"]
  tokenizer = summary["corpus"].get("tokenizer", {"kind": "bytes"})
  unit = "byte" if tokenizer["kind"] == "bytes" else "token"
  shown = "none yet" if loss is None else f"{loss:.4f} nats per {unit}"
  if summary["diverged_at_step"]:
    shown = f"none, diverged at step {summary['diverged_at_step']}"
  speed, seconds = summary["tokens_per_second"] or 0, summary["seconds"] or 0
  rows = [
    ("method", summary["config"]["method"]),
    ("validation loss", shown),
    ("weights (codes and scales)", f"{used['weights']:.2f} bytes per parameter"),
    ("moments", f"{used['moments']:.2f}"),
    ("master weights", f"{used['residual']:.2f}" if used["residual"] else "none"),
    ("total on quantized leaves", f"{used['total']:.2f} bytes per parameter"),
    ("throughput", f"{speed:,.0f} tokens/s"),
    ("trained on", f"{summary['tokens']:,} tokens in {metrics.clock(seconds)}"),
  ]
  if summary["skipped"]:
    rows.append(("updates skipped", f"{summary['skipped']}, because they were not finite"))
  width = max(len(name) for name, _ in rows)
  line = "─" * (width + 2 + max(len(value) for _, value in rows))
  return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])


def plot_losses(runs: dict[str, pathlib.Path], out: pathlib.Path) -> None:
  """Draws training and validation losses of runs from their metrics files.

  Args:
    runs: metrics file by the name that the legend gives the run.
    out: the PNG to write.
  """
  # Without pyplot, whose backend belongs to the caller, such as a notebook.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4.3), layout="constrained")
  axes = figure.subplots()
  for i, (label, path) in enumerate(runs.items()):
    color = f"C{i}"
    rows = metrics.read_metrics(path)
    # Two columns even of no rows, so that a run that diverged at once still has its legend.
    train, held_out = (
      np.array([(r["step"], r[key]) for r in rows if r.get(key) is not None]).reshape(-1, 2).T
      for key in ("loss", "validation_loss")
    )
    if len(runs) == 1:
      axes.plot(*train, color=color, alpha=0.35, lw=1, label=f"{label}, training")
    axes.plot(*held_out, color=color, marker="o", ms=3, label=f"{label}, validation")
  axes.set(xlabel="step", ylabel="loss (nats per token)")
  low, high = axes.get_ylim()
  # A run starts at uniform guessing, 5.5 nats and more, beside which the rest would look flat. 2.5
  # nats above the lowest loss keep the end of the fall.
  axes.set_ylim(low, min(high, low + 2.5))
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)
  figure.savefig(out, dpi=140)
