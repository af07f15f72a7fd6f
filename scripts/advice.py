"""Holds the adviser against finished runs: python scripts/advice.py --study=storage.

The study of storage takes about five minutes of one CPU core; that of claims half an hour, and the
text of configs/packages_1m.py.
"""

import json
import pathlib
import runpy
import sys

from absl import flags

from eco_optax.training import jobs
from eco_optax.training import report as report_lib

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments.studies import advice

_ROOT = pathlib.Path(__file__).parents[1]
_STUDY = flags.DEFINE_enum("study", "storage", list(advice.CASES), "Whose runs tell what was lost.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results" / "advice"), "Folder of the answers.")


def main(_: list[str]) -> None:
  """Asks at every rate of a study, and writes the answers beside those of other studies."""
  folder, name = pathlib.Path(_RESULTS.value), _STUDY.value
  case, path = advice.CASES[name], folder / "advice.json"
  config = runpy.run_path(str(_ROOT / "configs" / f"{case.config}.py"))["get_config"]()
  config.steps = int(case.share * config.steps)
  show = lambda text: print(text, flush=True)
  found = [verdict for rate in case.rates for verdict in advice.ask(config, rate, show)]
  report = json.loads(path.read_text()) if path.exists() else {"found": {}, "runs": {}}
  report["found"][name] = found
  report["runs"][name] = {"seed": config.seed, **report_lib.describe_machine()}
  print(advice.write(folder, report))


if __name__ == "__main__":
  jobs.run(main)
