"""How often `eco.diagnostics.advise` is right: its verdicts beside what whole runs lost.

It is asked in the middle of a run with float32 weights, at each learning rate, and its verdicts are
held against finished runs of the same config, whose methods trained from the start. A method lost
what its validation loss is above that of master weights of the same format, rate and seed.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
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
# Nats; two standard errors of a difference between the runs that are compared are about as much.
TOLERANCE = 0.02
FORMATS = {"FP8": eco.FP8, "INT4": eco.INT4}


@dataclasses.dataclass(frozen=True)
class Case:
  """Runs of a study that tell what each way lost."""

  config: str  # In configs/.
  share: float  # Of the config's steps that the runs took.
  rates: tuple[float, ...]
  seeds: tuple[int, ...]
  reference: str  # What runs with master weights are called.
  names: dict[str, str]  # What runs are called, by way of `advise`.

  def runs(self, way: str, format: str, rate: float) -> list[str]:
    """Of one way or of the reference, by seed."""
    name = self.names.get(way, self.reference)
    return [f"{name}, {format}, lr {rate:g}, seed {seed}" for seed in self.seeds]


CASES = {
  "storage": Case(
    "stdlib_1m", 0.5, (2e-3, 2e-4), (0, 1, 2), "float32 residual",
    {
      "ECO, stochastic": "no residual: ECO + SR",
      "ECO, nearest": "no residual: ECO + RTN",
      "no feedback, stochastic": "nothing: naive SR",
      "int8 residual, nearest": "int8 residual",
    },
  ),
  "claims": Case(
    "packages_1m", 1.0, (6e-4, 2e-3, 6e-3), (0,), "master weights + RTN",
    {
      "ECO, stochastic": "ECO + SR, schedule-aware",
      "ECO, nearest": "ECO + RTN, schedule-aware",
      "no feedback, stochastic": "naive SR",
      "no feedback, nearest": "naive RTN",
      "int8 residual, nearest": "int8 residual + RTN",
    },
  ),
}  # fmt: skip


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


def held(results: pathlib.Path, found: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Verdicts with what the runs lost, of those that have runs.

  Args:
    results: folder with each study's runs.
    found: verdicts by case, as `ask` returns them.

  Returns:
    The verdicts with `case`, `lost` (nats, the mean over seeds) and `is_right`.
  """
  rows = []
  for name, verdicts in found.items():
    case, done = CASES[name], sweep.read(results / name / "runs.jsonl")
    for verdict in verdicts:
      if verdict["way"] not in case.names:
        continue
      own, others = (
        sweep.losses(done, case.runs(way, verdict["format"], verdict["rate"]))
        for way in (verdict["way"], case.reference)
      )
      pairs = [(x, y) for x, y in zip(own, others, strict=True) if x is not None and y is not None]
      if pairs:
        lost, _, _ = sweep.mean_and_error([x - y for x, y in pairs])
        is_right = verdict["is_safe"] == (lost <= TOLERANCE)
        rows.append(verdict | {"case": name, "lost": lost, "is_right": is_right})
  return rows


def table(rows: list[dict[str, Any]]) -> str:
  """What was said and what came, in Markdown, and how often it was right."""
  lines = [
    "| runs | rate | format | way | loss, expected | progress lost, expected | said"
    " | lost by runs | right |",
    "|---" * 9 + "|",
  ]
  for row in rows:
    said = "safe" if row["is_safe"] else "not safe"
    cells = [row["case"], f"{row['rate']:g}", row["format"], row["way"], f"{row['loss']:+.4f}"]
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
  text = table(held(folder.parent, report["found"]))
  (folder / "table.md").write_text(text)
  return text
