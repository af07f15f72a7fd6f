"""Runs a study and writes its results: python scripts/reproduce.py --study=methods."""

import pathlib
import runpy
import sys
from typing import Any

import ml_collections
from absl import flags

from eco_optax.training import jobs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import results
from experiments.studies import (
  claims,
  clips,
  comparison,
  families,
  finetune,
  four_bits,
  nearest,
  optimizers,
  outliers,
  scale,
  storage,
  sweep,
)

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = jobs.define_config("config", str(_ROOT / "configs" / "stdlib_1m.py"))
# Studies of many runs, with their configs.
_SWEEPS = {
  "claims": (claims, "packages_1m"),
  "families": (families, families.FAMILIES[0]),
  "scale": (scale, "packages_30m"),
  "storage": (storage, "stdlib_1m"),
  "nearest": (nearest, "stdlib_1m"),
  "clips": (clips, "stdlib_1m"),
  "optimizers": (optimizers, "stdlib_1m"),
  "outliers": (outliers, "stdlib_1m"),
  "four_bits": (four_bits, "packages_1m"),
  "finetune": (finetune, "deepseek_3m_chat"),
}
_STUDY = flags.DEFINE_enum(
  "study",
  "methods",
  ["methods", *_SWEEPS, "results"],
  "All methods on one config; the paper's claims, at several learning rates and seeds; ECO and"
  " master weights on a model of each family; the paper's seven runs at its own size; what moments"
  " and residuals are stored in; rules for rounding to nearest; clips of the gradient; ECO over"
  " several optimizers; optimizers under quantization, and their outliers; formats of"
  " four bits; INT4 fine-tuning; or RESULTS.md alone, which all write.",
)
_PROCESSES = flags.DEFINE_integer("processes", 2, "Runs at a time, of studies of many.")
_MINUTES = flags.DEFINE_float("minutes", float("inf"), "After which they stop for now.")
_WORKDIR = jobs.define_path("workdir", "runs/reproduce", "Folder of the runs themselves.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results"), "Where figures go.")


def main(_: list[str]) -> None:
  """Trains the missing runs, prints the table and rewrites RESULTS.md."""
  workdir, out = pathlib.Path(_WORKDIR.value) / _STUDY.value, pathlib.Path(_RESULTS.value)
  if _STUDY.value == "methods":
    print(comparison.table(comparison.compare(_CONFIG.value, workdir, out / "methods")))
  elif _STUDY.value in _SWEEPS:
    _sweep(*_SWEEPS[_STUDY.value], workdir, out / _STUDY.value)
  (out.parent / "RESULTS.md").write_text(results.markdown(out))


def _read(name: str) -> ml_collections.ConfigDict:
  return runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]()


def _sweep(study: Any, config_name: str, workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Goes on with the runs as long as it may, and says how many are left."""
  config = _CONFIG.value if flags.FLAGS["config"].present else _read(config_name)
  if study is finetune:
    config.init_from = str(finetune.base(config, workdir))
  lines, plan = out / "runs.jsonl", lambda rows: study.runs(rows, config.steps)
  if study is families:
    configs = {name: _read(name) for name in families.FAMILIES}
    plan = lambda rows: families.runs(configs)
  try:
    rows = sweep.sweep(
      config,
      plan,
      workdir,
      lines,
      processes=_PROCESSES.value,
      minutes=_MINUTES.value,
      show=lambda text: print(text, flush=True),
    )
  except RuntimeError as error:  # Of a run, whose last line says what to do.
    raise SystemExit(str(error).rstrip().splitlines()[-1]) from error
  (out / "table.md").write_text(study.table(rows))
  study.plot(rows, out)
  print(study.table(rows))
  print(f"{len(rows)} runs are finished, {len(sweep.missing(plan(rows), lines, config))} are left")


if __name__ == "__main__":
  jobs.run(main)
