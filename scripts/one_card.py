"""Draws what fits one card from results/one_gpu: python scripts/one_card.py."""

import pathlib
import sys

from eco_optax.training import jobs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import one_card

_FOLDER = str(pathlib.Path(__file__).parents[1] / "results" / "one_gpu")
_RESULTS = jobs.define_path("results", _FOLDER, "Folder of the reports, and of one_card.png.")


def main(_: list[str]) -> None:
  """Writes one_card.png."""
  folder = pathlib.Path(_RESULTS.value)
  found = one_card.bars(folder)
  one_card.plot(found, folder / "one_card.png")
  for bar in found:
    print(f"{bar.gib:6.1f} GiB  {bar.model}, {bar.label}")


if __name__ == "__main__":
  jobs.run(main)
