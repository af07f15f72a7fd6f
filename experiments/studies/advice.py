"""How often `eco.diagnostics.advise` is right: its verdicts beside what whole runs lost.

It is asked in the middle of a run with float32 weights, at each learning rate, and its verdicts are
held against finished runs of the same config, whose methods trained from the start. A method lost
what its validation loss is above that of the same run with float32 weights.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline, shards
from eco_optax.training.models import transformer
from experiments.studies import sweep

BATCHES = 32
# Nats per token; two standard errors of a difference between two such runs are about as much.
TOLERANCE = 0.02
FORMATS = {"FP8": eco.FP8.transposed, "INT4": eco.INT4.transposed}


# Of the study of claims, on configs/packages_1m.py, with seed 0; all steps of it.
CONFIG, STUDY = "packages_1m", "claims"
RATES = (6e-4, 2e-3, 6e-3)
REFERENCE = "BF16 master weights, none"
NAMES = {
  "ECO, stochastic": "ECO + SR, schedule-aware",
  "ECO, nearest": "ECO + RTN, schedule-aware",
  "no feedback, stochastic": "naive SR",
  "no feedback, nearest": "naive RTN",
  "int8 residual, nearest": "int8 residual + RTN",
}


def ask(config: ml_collections.ConfigDict, rate: float, show: Callable[[str], Any]) -> list[Any]:
  """Trains half of a run with float32 weights, and asks.

  Args:
    config: of the run, on one device.
    rate: peak learning rate.
    show: told how it goes.

  Returns:
    A dictionary for each verdict: format, way, loss, progress and whether it is said to be safe.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  config.update({"method": "bf16_mw", "activation_format": "none"})
  config.optimizer.learning_rate = rate
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh.to_dict())
  tx, model = methods.optimizer(config), config_lib.model(config)
  path = config.data.path
  data = shards.load(path, config.data.verify) if path else corpus.standard_library_dataset()
  windows = pipeline.train_windows(data.train, config.length, config.seed)
  with jax.set_mesh(mesh):
    state = step_lib.init_state(config, tx, mesh)
    train_step = step_lib.make_train_step(config, tx, mesh)
    batches = pipeline.batches(windows, 0, config.batch_size, sharding.batch_sharding(mesh))
    for t in range(config.steps // 2):
      state, metrics = train_step(state, next(batches))
      if (t + 1) % 50 == 0:
        show(f"  rate {rate:g}, step {t + 1}: loss {float(metrics['loss']):.4f}")
    advice = eco.diagnostics.advise(
      lambda params, batch: transformer.loss(model, params, *batch),
      state.params,
      methods.stock_optimizer(config),
      [next(batches) for _ in range(BATCHES)],
      list(FORMATS.values()),
      steps=config.steps,
      where=transformer.is_block_kernel,
      opt_state=state.opt_state[1],
      b1=config.optimizer.b1,
      tolerance=TOLERANCE,
      has_aux=True,
    )
  show(str(advice))
  return [
    {"rate": rate} | verdict._asdict() | {"format": name}
    for name, grid in zip(FORMATS, advice.grids, strict=True)
    for verdict in grid.verdicts
  ]


def held(results: pathlib.Path, verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Verdicts with what the runs lost, of those that have runs.

  Args:
    results: folder with each study's runs.
    verdicts: as `ask` returns them, of all rates.

  Returns:
    The verdicts with `lost` (nats) and `is_right`.
  """
  done, rows = sweep.read(results / STUDY / "runs.jsonl"), []
  for verdict in verdicts:
    tail = f"lr {verdict['rate']:g}, seed 0"
    names = f"{NAMES[verdict['way']]}, {verdict['format']}, {tail}", f"{REFERENCE}, {tail}"
    own, reference = sweep.losses(done, names)
    if own is not None and reference is not None:
      lost = own - reference
      rows.append(verdict | {"lost": lost, "is_right": verdict["is_safe"] == (lost <= TOLERANCE)})
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """What was said and what came, in Markdown, and how often it was right."""
  lines = [
    "| rate | format | way | loss, expected | progress lost, expected | said"
    " | lost by runs | right |",
    "|---" * 8 + "|",
  ]
  for row in rows:
    said = "safe" if row["is_safe"] else "not safe"
    cells = [f"{row['rate']:g}", row["format"], row["way"], f"{row['loss']:+.4f}"]
    right = "yes" if row["is_right"] else "no"
    cells += [f"{row['progress']:.0%}", said, f"{row['lost']:+.4f}", right]
    lines.append(f"| {' | '.join(cells)} |")
  lines += ["", "| way | right | of |", "|---|---|---|"]
  ways = dict.fromkeys(row["way"] for row in rows)
  for way in (*ways, "all"):
    own = [row["is_right"] for row in rows if way in (row["way"], "all")]
    lines.append(f"| {way} | {sum(own)} | {len(own)} |")
  return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, report: dict[str, Any]) -> str:
  """Writes advice.json and table.md to results/advice; returns the table."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "advice.json").write_text(json.dumps(report, indent=1) + "\n")
  text = table(held(folder.parent, report["verdicts"]))
  (folder / "table.md").write_text(text)
  return text
