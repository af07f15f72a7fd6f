"""Holds gradient exchange against its papers, and tries it in runs: python scripts/wire.py."""

import pathlib
import runpy
import sys

import jax
from absl import flags

from eco_optax.training import jobs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments.studies import exchange, sweep, wire

_ROOT = pathlib.Path(__file__).parents[1]
_STUDY = flags.DEFINE_enum(
  "study",
  "theory",
  ["theory", "runs", "followed", "traffic"],
  "Rates on the papers' problems; the 1M model on four devices, which"
  " XLA_FLAGS=--xla_force_host_platform_device_count=4 makes of a CPU; Adam's steps along one run"
  " of it, by exchange; or the bytes on the wire in steps compiled for a topology.",
)
_SMALL = flags.DEFINE_bool("small", False, "Of theory: four workers and one seed.")
_PART = flags.DEFINE_enum("part", "all", ["all", *wire.parts()], "Of theory.")
_TOPOLOGY = flags.DEFINE_string("topology", exchange.TOPOLOGIES[0], "Of traffic: four devices.")
_MODEL = flags.DEFINE_enum("model", exchange.TRAINED, exchange.MODELS, "Of traffic.")
_MINUTES = flags.DEFINE_float("minutes", float("inf"), "After which runs stop for now.")
_WORKDIR = jobs.define_path("workdir", "runs/wire", "Folder of the runs themselves.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results" / "wire"), "Folder for figures.")


def main(_: list[str]) -> None:
  """Runs the study and writes its figures; fails if a rate is not what the papers say."""
  out = pathlib.Path(_RESULTS.value)
  get_config = lambda model: runpy.run_path(str(_ROOT / "configs" / f"{model}.py"))["get_config"]()
  if _STUDY.value == "theory":
    failures = wire.run(out, _SMALL.value, _PART.value)
    print((out / "theory.md").read_text())
    if failures:
      raise SystemExit("does not hold:\n" + "\n".join(failures))
    return
  if _STUDY.value == "traffic":
    model = _MODEL.value
    exchange.write_traffic(model, get_config(model), out, _TOPOLOGY.value)
  elif _STUDY.value == "followed":
    exchange.write_followed(get_config(exchange.TRAINED), out)
  elif jax.device_count() != exchange.DEVICES:
    raise SystemExit(
      f"--study=runs takes {exchange.DEVICES} devices and there are {jax.device_count()}: set"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={exchange.DEVICES}"
    )
  else:
    lines = out / "runs.jsonl"
    config = get_config(exchange.TRAINED)
    sweep.sweep(config, exchange.runs, _WORKDIR.value, lines, minutes=_MINUTES.value)
  rows, compiled = exchange.read(out)
  (out / "table.md").write_text(tables := exchange.tables(out))
  if rows and compiled:
    exchange.plot(out)
  print(tables)


if __name__ == "__main__":
  jobs.run(main)
