"""Runs a study and writes its results: python scripts/reproduce.py --study=methods."""

import pathlib
import runpy

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import comparison

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = config_flags.DEFINE_config_file("config", str(_ROOT / "configs" / "stdlib_1m.py"))
_STUDY = flags.DEFINE_enum(
  "study",
  "methods",
  ["methods", "families"],
  "All methods on one config, or ECO and master weights on a model of each family.",
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Folder of the runs themselves.")
_RESULTS = flags.DEFINE_string("results", str(_ROOT / "results"), "Where figures go.")


def main(_: list[str]) -> None:
  """Trains what is missing and prints the table."""
  workdir, results = pathlib.Path(_WORKDIR.value) / _STUDY.value, pathlib.Path(_RESULTS.value)
  if _STUDY.value == "methods":
    print(comparison.table(comparison.compare(_CONFIG.value, workdir, results / "stdlib_1m")))
    return
  rows = {}
  for name in comparison.FAMILIES:
    config = runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]()
    out = results / "families" / name
    rows[name] = comparison.compare(config, workdir / name, out, comparison.FAMILY_RUNS)
    (results / "families" / "table.md").write_text(comparison.family_table(rows))
  print(comparison.family_table(rows))


if __name__ == "__main__":
  app.run(main)
