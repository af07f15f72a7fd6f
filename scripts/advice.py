"""Holds the adviser against the runs of the study of claims: python scripts/advice.py.

It takes the text of configs/packages_1m.py, and half an hour of one CPU core.
"""

import pathlib
import runpy
import sys

from eco_optax.training import jobs
from eco_optax.training import report as report_lib

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments.studies import advice

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = jobs.define_path("results", str(_ROOT / "results" / "advice"), "Folder of the answers.")


def main(_: list[str]) -> None:
  """Asks at every rate, and writes the answers and what the runs lost."""
  config = runpy.run_path(str(_ROOT / "configs" / f"{advice.CONFIG}.py"))["get_config"]()
  show = lambda text: print(text, flush=True)
  verdicts = [verdict for rate in advice.RATES for verdict in advice.ask(config, rate, show)]
  report = {"verdicts": verdicts, "seed": config.seed, **report_lib.describe_machine()}
  print(advice.write(pathlib.Path(_RESULTS.value), report))


if __name__ == "__main__":
  jobs.run(main)
