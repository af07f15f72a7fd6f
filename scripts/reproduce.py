"""Runs a study and writes its results: python scripts/reproduce.py --study=methods."""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import comparison

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = config_flags.DEFINE_config_file("config", str(_ROOT / "configs" / "stdlib_1m.py"))
_STUDY = flags.DEFINE_enum("study", "methods", ["methods"], "Which runs to compare.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Folder of the runs themselves.")
_RESULTS = flags.DEFINE_string("results", str(_ROOT / "results" / "stdlib_1m"), "Where figures go.")


def main(_: list[str]) -> None:
  """Trains what is missing and prints the table."""
  rows = comparison.compare(
    _CONFIG.value, pathlib.Path(_WORKDIR.value) / _STUDY.value, _RESULTS.value
  )
  print(comparison.table(rows))


if __name__ == "__main__":
  app.run(main)
