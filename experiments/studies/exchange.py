"""Runs of the 1M model on four devices that exchange compressed gradients: loss against bytes."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import eco_optax as eco
from eco_optax import wire
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import loop, methods, report, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline
from eco_optax.training.models import transformer
from experiments.studies import sweep
from experiments.studies.sweep import Run

DEVICES = 4
SEEDS = (0, 1, 2)
STEPS_FOLLOWED = 200
MESH = {"mesh.data": DEVICES, "mesh.fsdp": 1}

# What each exchange changes in the config. The others are held against the first.
WIRES: dict[str, dict[str, Any]] = {
  "exact, float32": {"wire": "none"},
  "fp8, error feedback": {"wire": "fp8"},
  "int4, error feedback": {"wire": "int4"},
  "sign, error feedback": {"wire": "sign"},
}
ONE_SEED = "sign, error feedback"  # Far from the others, whatever the seed.
# The topologies and the models that `traffic` compiles steps for.
TOPOLOGIES = ("v5p:2x2x1", "h100:4")
TRAINED, MODELS = "stdlib_1m", ("stdlib_1m", "llama_800m")


def runs(rows: Mapping[str, Any]) -> list[Run]:
  """All runs, one seed after another, whatever `rows` are finished."""
  del rows
  return [
    Run(f"{name}, seed {seed}", MESH | changes | {"seed": seed})
    for seed in SEEDS
    for name, changes in WIRES.items()
    if name != ONE_SEED or seed == SEEDS[0]
  ]


def traffic(
  model: str, config: ml_collections.ConfigDict, topology: str
) -> Iterator[dict[str, Any]]:
  """Bytes of the collectives in compiled steps, by operation and dtype.

  Args:
    model: its name.
    config: of its runs.
    topology: of four devices, see `compile.topology_devices`.

  Yields:
    A row per exchange.
  """
  devices = compile_lib.topology_devices(topology)
  for name, changes in WIRES.items():
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(MESH | changes)
    _, found = compile_lib.compile_step(own, devices, print)
    yield {
      "model": model,
      "topology": topology,
      "wire": name,
      "parameters": found["parameters"],
      "collectives": found["collectives_per_device"],
      "bytes_per_device": found["bytes_per_device"],
      "seconds": found["seconds"],
    }


def moved(collectives: Mapping[str, Mapping[str, Mapping[str, int]]]) -> int:
  """Bytes that pass a device: a sum's twice, as it is scattered and gathered."""
  return sum(
    entry["bytes"] * (2 if kind == "all-reduce" else 1)
    for kind, dtypes in collectives.items()
    for entry in dtypes.values()
  )


def table(rows: Mapping[str, Any], compiled: list[dict[str, Any]]) -> str:
  """Losses beside bytes on the wire, in Markdown; differences are paired by seed."""
  compiled = [row for row in compiled if row["model"] == TRAINED]
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


def followed(
  config: ml_collections.ConfigDict, devices: int = DEVICES, steps: int = STEPS_FOLLOWED
) -> list[dict[str, Any]]:
  """What Adam makes of each exchange along one run, whose weights take exact exchange's steps.

  Losses of two short runs differ by hundredths whatever is different in them. Here all exchanges
  are given the same gradients, each has errors and moments of its own, and its step is held against
  that of the exact mean.

  Args:
    config: of the runs.
    devices: that are simulated.
    steps: of the run.

  Returns:
    For each exchange the length of its last step as a share of the exact one's, and their cosine,
    over all leaves that are compressed.
  """
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict({"mesh.data": 1, "mesh.fsdp": 1})
  tx, mesh = loop.prepare(config, jax.devices()[:1])
  o, model = config.optimizer, config_lib.model(config)
  adam = optax.chain(
    optax.clip_by_global_norm(o.max_norm), optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
  )
  mean = optax.stateless(lambda g, _: jax.lax.pmean(g, "data"))
  exchanges = {
    name: wire.error_feedback(wire.COMPRESSORS[changes["wire"]](), "data", workers=devices)
    if changes["wire"] != "none"
    else mean
    for name, changes in WIRES.items()
  }
  first = next(iter(WIRES))
  loss_and_grad = eco.value_and_grad(
    lambda params, tokens: transformer.loss(model, params, tokens)[0], dense=False
  )

  def step(params: Any, opt_state: Any, errors: Any, moments: Any, tokens: jax.Array) -> Any:
    def alone(tokens: jax.Array, errors: Any) -> Any:
      _, grads = loss_and_grad(params, tokens)
      found = {name: tx.update(grads, errors[name]) for name, tx in exchanges.items()}
      return {name: x[0] for name, x in found.items()}, {name: x[1] for name, x in found.items()}

    own = tokens.reshape(devices, -1, tokens.shape[-1])
    means, errors = jax.vmap(alone, axis_name="data")(own, errors)
    means = jax.tree.map(lambda x: x[0], means)
    found = {name: adam.update(x, moments[name]) for name, x in means.items()}
    scale = methods.clip_factor(o.max_norm, methods.global_norm(means[first]))
    updates, opt_state = tx.update(means[first], opt_state, params, gradient_scale=scale)
    moments = {name: x[1] for name, x in found.items()}
    return (
      eco.apply_updates(params, updates),
      opt_state,
      errors,
      moments,
      {name: x[0] for name, x in found.items()},
    )

  params, opt_state, *_ = step_lib.init_state(config, tx, mesh)
  start = lambda tx: jax.vmap(
    lambda _: tx.init(params), axis_name="data", axis_size=devices, in_axes=None
  )(0)
  errors = {name: start(tx) for name, tx in exchanges.items()}
  zeros = jax.tree.map(jnp.zeros_like, eco.dequantize(params))
  moments = dict.fromkeys(exchanges, adam.init(zeros))
  windows = pipeline.train_windows(loop.load_data(config).train, config.length, config.seed)
  batches = pipeline.batches(windows, 0, config.batch_size, sharding.batch_sharding(mesh))
  run = jax.jit(step)
  for _ in range(steps):
    tokens = next(batches).tokens
    params, opt_state, errors, moments, taken = run(params, opt_state, errors, moments, tokens)
  leaves = {
    name: np.concatenate([x.ravel() for x in map(np.asarray, jax.tree.leaves(u)) if x.size >= 512])
    for name, u in taken.items()
  }
  norm = lambda name: float(np.linalg.norm(leaves[name].astype(np.float64)))
  product = lambda name: float(leaves[name].astype(np.float64) @ leaves[first].astype(np.float64))
  return [
    {
      "wire": name,
      "steps": steps,
      "length": norm(name) / norm(first),
      "cosine": product(name) / norm(name) / norm(first),
    }
    for name in WIRES
    if name != first
  ]


def followed_table(rows: list[dict[str, Any]]) -> str:
  """A Markdown table that compares Adam's step after each exchange with the exact one."""
  lines = [
    "| exchange | length of Adam's step | its cosine with that of exact exchange |",
    "|---|---|---|",
  ]
  lines += [f"| {row['wire']} | {row['length']:.3f} | {row['cosine']:.3f} |" for row in rows]
  return "\n".join(lines) + "\n"


def by_dtype(collectives: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, int]:
  """Bytes that pass a device, see `moved`, by dtype."""
  dtypes = sorted({dtype for entries in collectives.values() for dtype in entries})
  only = lambda dtype: {
    kind: {dtype: entries[dtype]} for kind, entries in collectives.items() if dtype in entries
  }
  return {dtype: moved(only(dtype)) for dtype in dtypes}


def traffic_table(compiled: list[dict[str, Any]]) -> str:
  """Bytes of compiled steps by dtype, in Markdown, of models that no runs are of."""
  lines = [
    "| model | compiled for | exchange | float32 | codes | per parameter | errors per device |",
    "|---|---|---|---|---|---|---|",
  ]
  for row in compiled:
    if row["model"] != TRAINED:
      of = by_dtype(row["collectives"])
      floats, codes, total = of.pop("f32", 0), of.pop("u8", 0), moved(row["collectives"])
      assert sum(of.values()) < 1e-3 * total, of  # Metrics, and whether all is finite.
      errors = row["bytes_per_device"]["errors"]
      lines.append(
        f"| {row['model']} | {row['topology']} | {row['wire']} | {floats / 1e9:.3f} GB"
        f" | {codes / 1e9:.3f} GB | {total / row['parameters']:.3f} bytes"
        f" | {errors / 2**30:.2f} GiB |"
      )
  return "\n".join(lines) + "\n"


def read(results: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Finished runs, and compiled steps."""
  path = results / "traffic.json"
  compiled = json.loads(path.read_text())["rows"] if path.exists() else []
  return sweep.read(results / "runs.jsonl"), compiled


def tables(results: pathlib.Path) -> str:
  """All tables of runs, as far as there are results."""
  rows, compiled = read(results)
  found = [table(rows, compiled), traffic_table(compiled)]
  path = results / "followed.json"
  if path.exists():
    found.insert(1, followed_table(json.loads(path.read_text())["rows"]))
  return "\n".join(found)


def write_followed(config: ml_collections.ConfigDict, out: pathlib.Path) -> None:
  """Follows a run with all exchanges and writes followed.json."""
  out.mkdir(parents=True, exist_ok=True)
  figures = report.describe_machine() | {"rows": followed(config)}
  (out / "followed.json").write_text(json.dumps(figures, indent=1) + "\n")


def write_traffic(
  model: str, config: ml_collections.ConfigDict, out: pathlib.Path, topology: str
) -> None:
  """Compiles steps of a model and writes traffic.json after each; others' rows there stay."""
  out.mkdir(parents=True, exist_ok=True)
  order = lambda row: (
    MODELS.index(row["model"]),
    TOPOLOGIES.index(row["topology"]),
    list(WIRES).index(row["wire"]),
  )
  same = lambda a, b: order(a) == order(b)
  for row in traffic(model, config, topology):
    kept = [other for other in read(out)[1] if not same(row, other)]
    figures = report.describe_machine() | {"rows": sorted([*kept, row], key=order)}
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
  compiled = [row for row in compiled if row["model"] == TRAINED]
  topology = compiled[0]["topology"]
  first = next(iter(WIRES))
  loss = lambda name, seed: rows.get(f"{name}, seed {seed}", {}).get("validation_loss", math.nan)
  for name in WIRES:
    behind = [loss(name, seed) - loss(first, seed) for seed in SEEDS]
    (step,) = [row for row in compiled if (row["topology"], row["wire"]) == (topology, name)]
    each = moved(step["collectives"]) / step["parameters"]
    axes.plot([each] * len(behind), behind, "o", label=name)
  axes.set(
    xscale="log",
    xlabel=f"bytes moved per parameter, step and device ({topology})",
    ylabel="loss above exact exchange's, nats",
    title="Four devices, 1M parameters, one point per seed",
  )
  axes.set_yscale("symlog", linthresh=0.01)  # Even up to a hundredth, in tenfolds from there.
  axes.set_ylim(-0.008, 2)
  axes.set_yticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.005", "0.01", "0.1", "1"])
  axes.minorticks_off()
  ticks = [0.25, 0.5, 1, 2, 4, 8]
  axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
  axes.grid(alpha=0.2)
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(results / "wire.png", dpi=140)
  plt.close(figure)
