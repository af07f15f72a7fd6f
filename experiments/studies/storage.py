"""Dtypes to store moments, residuals, embeddings and inputs of layers in: losses by bytes."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training import methods
from eco_optax.training.methods import Method, Moments
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

LEARNING_RATES = (2e-3, 2e-4)
SEEDS = (0, 1, 2)
FORMATS: dict[str, dict[str, Any]] = {
  "FP8": {"format": "FP8"},
  "INT4": {"format": "INT4", "activation_format": "none"},  # Weights only, as the paper has it.
}

# What they change in the config.
MOMENTS: dict[str, Method] = {
  label: methods.BY_NAME["eco_sr"].but(label, moments=moments)
  for label, moments in {
    "float32 moments": methods.FLOAT32_MOMENTS,
    "bfloat16 moments": Moments("bfloat16", "bfloat16"),
    "FP8 moments": methods.FP8_MOMENTS,
    "INT8 and FP8 moments": Moments("int8", "float8_e4m3fn"),
    "FP8 and factored moments": Moments("float8_e4m3fn", "factored"),
  }.items()
}
# By format; the first of each is what the others are held against.
_MOMENTS_OF = {"FP8": tuple(MOMENTS), "INT4": ("FP8 moments", "FP8 and factored moments")}
# What else may be stored in 8 bits, each beside FP8 moments: changes to the config.
BESIDE = "FP8 moments"
OTHERS: dict[str, dict[str, Any]] = {
  "embedding and head in INT8": {"model.quantized": "all"},
  "inputs of layers in FP8": {"release": True, "kept_format": "FP8_TOKEN"},
}
# A peer that keeps float32 weights and moments of low rank; its best rate with seed 0 is taken.
GALORE = "GaLore, rank 32"
GALORE_RATES = (2e-3, 6e-3, 2e-2)
_KINDS = ("float32", "int16", "bfloat16", "int12", "int8")
# The first is what the others are held against.
RESIDUALS: dict[str, Method] = {
  f"{kind} residual": methods.BY_NAME["mw_rtn"].but(f"{kind} residual", residual=kind)
  for kind in _KINDS
} | {
  "no residual: ECO + SR": methods.BY_NAME["eco_sr"],
  "no residual: ECO + RTN": methods.BY_NAME["eco_rtn"],
  "nothing: naive SR": methods.BY_NAME["naive_sr"],
}


def _name(what: str, format: str, rate: float, seed: int) -> str:
  return f"{what}, {format}, lr {rate:g}, seed {seed}"


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """All runs: ECO + SR at the higher rate for the moments, both rates for the residuals.

  Args:
    rows: finished runs, of which those of GaLore tell its best rate.
    steps: of the config; the many runs of residuals take half.

  Returns:
    The runs of moments, one format after another, then of what else is stored and of residuals, one
    seed after another.
  """
  found = {}
  for format, names in _MOMENTS_OF.items():
    for seed in SEEDS:
      for what in names:
        own = MOMENTS[what].changes | FORMATS[format]
        found[_name(what, format, LEARNING_RATES[0], seed)] = own | {
          "optimizer.learning_rate": LEARNING_RATES[0], "seed": seed, "steps": steps,
        }  # fmt: skip
  for seed in SEEDS:
    for what, changes in OTHERS.items():
      found[_name(what, "FP8", LEARNING_RATES[0], seed)] = {
        **MOMENTS[BESIDE].changes, **FORMATS["FP8"], **changes,
        "optimizer.learning_rate": LEARNING_RATES[0], "seed": seed, "steps": steps,
      }  # fmt: skip
  best = galore_rate(rows)
  wanted = [(rate, 0) for rate in GALORE_RATES] + [(best, seed) for seed in SEEDS if best]
  for rate, seed in dict.fromkeys(wanted):
    found[_name(GALORE, "float32", rate, seed)] = {
      **methods.BY_NAME["bf16_mw"].changes, "optimizer.name": "galore",
      "optimizer.learning_rate": rate, "seed": seed, "steps": steps,
    }  # fmt: skip
  for seed in SEEDS:
    for rate in LEARNING_RATES:
      for format, weights in FORMATS.items():
        for what, method in RESIDUALS.items():
          found[_name(what, format, rate, seed)] = {
            **weights, **method.changes, "optimizer.learning_rate": rate, "seed": seed,
            "steps": steps // 2,
          }  # fmt: skip
  return [Run(name, changes) for name, changes in found.items()]


def galore_rate(rows: Mapping[str, Any]) -> float | None:
  """The rate at which GaLore does best with seed 0; None until all have been tried."""
  found = sweep.losses(rows, [_name(GALORE, "float32", rate, 0) for rate in GALORE_RATES])
  if None in found:
    return None
  return min(zip(found, GALORE_RATES, strict=True))[1]  # type: ignore[type-var]


def runs_of(what: str, format: str, rate: float) -> list[str]:
  """Of the runs of one way, one for each seed."""
  return [_name(what, format, rate, seed) for seed in SEEDS]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  rate, lines = LEARNING_RATES[0], []
  for format, (first, *others) in _MOMENTS_OF.items():
    if not any(name in rows for what in (first, *others) for name in runs_of(what, format, rate)):
      continue
    start = f"| ECO + SR, {format}, peak {rate:g} | bytes per parameter | validation loss"
    lines += ["", f"{start} | against {first} |", "|---|---|---|---|"]
    for what in (first, *others):
      names, references = (runs_of(x, format, rate) for x in (what, first))
      used = sweep.used_bytes(rows, names)
      cells = [what, used, *sweep.compared(rows, names, references)]
      lines.append(f"| {' | '.join(cells)} |")
  head = ["ECO + SR, FP8, beside FP8 moments", "bytes per parameter", "validation loss"]
  lines += ["", f"| {' | '.join(head)} | against {BESIDE} alone |", "|---|---|---|---|"]
  for what in OTHERS:
    names, references = (runs_of(x, "FP8", rate) for x in (what, BESIDE))
    cells = [what, sweep.used_bytes(rows, names), *sweep.compared(rows, names, references)]
    lines.append(f"| {' | '.join(cells)} |")
  peer_rate, (format, (reference, *_)) = galore_rate(rows), next(iter(_MOMENTS_OF.items()))
  if peer_rate:
    start = f"| beside ECO + SR, {format} | peak rate | bytes per parameter | validation loss"
    lines += ["", f"{start} | against {reference} |", "|---|---|---|---|---|"]
    names, references = runs_of(GALORE, "float32", peer_rate), runs_of(reference, format, rate)
    cells = [GALORE, f"{peer_rate:g}", sweep.used_bytes(rows, names)]
    cells += sweep.compared(rows, names, references)
    lines.append(f"| {' | '.join(cells)} |")
  first = next(iter(RESIDUALS))
  for format in FORMATS:
    head = [f"RTN, {format}", "bytes per parameter"]
    for rate in LEARNING_RATES:
      head += [f"peak {rate:g}", f"against {first}"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for what in RESIDUALS:
      cells = [what]
      for rate in LEARNING_RATES:
        names, references = (runs_of(x, format, rate) for x in (what, first))
        cells = [*cells, *sweep.compared(rows, names, references)]
        if len(cells) == 3:
          cells.insert(1, sweep.used_bytes(rows, names))
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines[1:]) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each residual's difference to a float32 residual (storage.png)."""
  plt = figures.pyplot()
  figure, axes = plt.subplots(
    len(LEARNING_RATES), len(FORMATS), figsize=(11, 7), layout="constrained", squeeze=False
  )
  first = next(iter(RESIDUALS))
  for line, rate in zip(axes, LEARNING_RATES, strict=True):
    for ax, format in zip(line, FORMATS, strict=True):
      gaps, colors = {}, {}
      for what, method in RESIDUALS.items():
        names, references = (runs_of(x, format, rate) for x in (what, first))
        label = f"{method.short}, {sweep.used_bytes(rows, names)} bytes"
        gaps[label] = figures.paired(rows, names, references)
        colors[label] = figures.color(method)
      figures.band(ax, figures.noise(gaps.values()), "x")
      figures.dots(ax, gaps, colors=colors, limits=(-0.08, 0.08))
      ax.set_xticks((-0.06, -0.03, 0, 0.03, 0.06))
      ax.set(title=f"{format} weights, peak rate {rate:g}")
      ax.set_xlabel(f"validation loss minus {first}")
      figures.legend(ax, fontsize=8, loc="upper left")
  figure.suptitle("Losses in nats per byte; three seeds, their mean and two standard errors")
  figures.save(figure, folder / "storage.png")
