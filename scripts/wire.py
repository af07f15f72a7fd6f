"""Holds gradient exchange against its papers: python scripts/wire.py."""

import pathlib
import sys

from absl import flags

from eco_optax.training import jobs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments.studies import wire

_ROOT = pathlib.Path(__file__).parents[1]
_SMALL = flags.DEFINE_bool("small", False, "Four workers and one seed: two minutes.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results" / "wire"), "Folder for figures.")


def main(_: list[str]) -> None:
  """Runs the study and fails if a rate is not what the papers say."""
  out = pathlib.Path(_RESULTS.value)
  failures = wire.run(out, _SMALL.value)
  print((out / "theory.md").read_text())
  if failures:
    raise SystemExit("does not hold:\n" + "\n".join(failures))


if __name__ == "__main__":
  jobs.run(main)
