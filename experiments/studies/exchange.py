"""Runs of the 1M model on four devices that exchange compressed gradients: loss against bytes."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from eco_optax import wire
from eco_optax.training import compile as compile_lib
from eco_optax.training import report
from experiments.studies import sweep
from experiments.studies.sweep import Run

DEVICES = 4
SEEDS = (0, 1, 2)
STEPS = 150
MESH = {"mesh.data": DEVICES, "mesh.fsdp": 1}
# Four devices of two cores take seconds for a step.
SIZE = {"length": 64, "steps": STEPS, "evaluate_every": STEPS, "checkpoint.every": STEPS}

# What they change in the config; the first is what the others are held against.
WIRES: dict[str, dict[str, Any]] = {
  "exact, float32": {"wire": "none"},
  "fp8, error feedback": {"wire": "fp8"},
  "int4, error feedback": {"wire": "int4"},
  "sign, error feedback": {"wire": "sign"},
}
# For whom steps are compiled.
TOPOLOGIES = ("v5p:2x2x1", "h100:4")


def runs(rows: Mapping[str, Any]) -> list[Run]:
  """All runs, one seed after another, whatever `rows` are finished."""
  del rows
  return [
    Run(f"{name}, seed {seed}", MESH | SIZE | changes | {"seed": seed})
    for seed in SEEDS
    for name, changes in WIRES.items()
  ]


def traffic(config: ml_collections.ConfigDict, topologies: tuple[str, ...]) -> list[dict[str, Any]]:
  """Bytes of the collectives in compiled steps, by operation and dtype.

  Args:
    config: of the runs.
    topologies: of four devices each, see `compile.topology_devices`.

  Returns:
    A row per topology and exchange.
  """
  rows = []
  for topology in topologies:
    devices = compile_lib.topology_devices(topology)
    for name, changes in WIRES.items():
      own = config.copy_and_resolve_references()
      own.update_from_flattened_dict(MESH | changes)
      _, found = compile_lib.compile_step(own, devices, print)
      rows.append(
        {
          "topology": topology,
          "wire": name,
          "parameters": found["parameters"],
          "collectives": found["collectives_per_device"],
          "bytes_per_device": found["bytes_per_device"],
          "seconds": found["seconds"],
        }
      )
  return rows


def moved(collectives: Mapping[str, Mapping[str, Mapping[str, int]]]) -> int:
  """Bytes that pass a device: a sum's twice, as it is scattered and gathered."""
  return sum(
    entry["bytes"] * (2 if kind == "all-reduce" else 1)
    for kind, dtypes in collectives.items()
    for entry in dtypes.values()
  )


def table(rows: Mapping[str, Any], compiled: list[dict[str, Any]]) -> str:
  """Losses beside bytes on the wire, in Markdown; differences are paired by seed."""
  topologies = list(dict.fromkeys(row["topology"] for row in compiled))
  lines = [
    "| exchange | validation loss | against exact | bytes per parameter, one way"
    f" | {' | '.join(f'moved per step and device, {name}' for name in topologies)} |",
    "|---|---|---|---|" + "---|" * len(topologies),
  ]
  first = [f"{next(iter(WIRES))}, seed {seed}" for seed in SEEDS]
  for name, changes in WIRES.items():
    loss, against = sweep.compared(rows, [f"{name}, seed {seed}" for seed in SEEDS], first)
    compressor = wire.COMPRESSORS.get(changes["wire"])
    each = compressor().bytes_per_value if compressor else 4.0
    cells = [name, loss, against, f"{each:.3f}"]
    for topology in topologies:
      own = [row for row in compiled if (row["topology"], row["wire"]) == (topology, name)]
      cells += [f"{moved(row['collectives']) / 2**20:.2f} MiB" for row in own]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def read(results: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Finished runs, and compiled steps."""
  path = results / "traffic.json"
  compiled = json.loads(path.read_text())["rows"] if path.exists() else []
  return sweep.read(results / "runs.jsonl"), compiled


def write_traffic(
  config: ml_collections.ConfigDict, out: pathlib.Path, topologies: tuple[str, ...]
) -> None:
  """Compiles steps for topologies and writes traffic.json; rows of others there are stay."""
  kept = [row for row in read(out)[1] if row["topology"] not in topologies]
  rows = kept + traffic(config, topologies)
  figures = report.describe_machine() | {"rows": rows}
  out.mkdir(parents=True, exist_ok=True)
  (out / "traffic.json").write_text(json.dumps(figures, indent=1) + "\n")


def plot(results: pathlib.Path) -> None:
  """Draws losses against the bytes that a device moves in a step.

  Args:
    results: the folder with runs.jsonl and traffic.json; the PNG goes there too.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  rows, compiled = read(results)
  figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
  topology = compiled[0]["topology"]
  for name in WIRES:
    own = [rows[f"{name}, seed {seed}"] for seed in SEEDS if f"{name}, seed {seed}" in rows]
    (step,) = [row for row in compiled if (row["topology"], row["wire"]) == (topology, name)]
    each = moved(step["collectives"]) / step["parameters"]
    axes.plot([each] * len(own), [row["validation_loss"] for row in own], "o", label=name)
  axes.set(
    xscale="log",
    xlabel=f"bytes moved per parameter, step and device ({topology})",
    ylabel="validation loss, nats per byte",
    title="Four devices, 1M parameters: loss against bytes on the wire",
  )
  axes.grid(alpha=0.2)
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(results / "wire.png", dpi=140)
  plt.close(figure)
