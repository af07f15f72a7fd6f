"""Injects faults into real small runs: python scripts/faults.py --out=results/faults.

--soak=60 kills and continues runs for 60 minutes instead.
"""

import json
import pathlib
import sys

from absl import flags

from eco_optax.training import jobs, report

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import faults

_WORKDIR = jobs.define_path("workdir", "runs/faults", "Folder of the runs.")
_OUT = jobs.define_path("out", "results/faults", "Folder of faults.json and faults.md.")
_ONLY = flags.DEFINE_multi_string("only", [], "Names of faults; all by default.")
_SOAK = flags.DEFINE_float("soak", 0, "Minutes to kill and continue runs, and nothing else.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments at which runs are killed.")


def main(_: list[str]) -> None:
  """Runs the faults and writes what happened."""
  if unknown := set(_ONLY.value) - set(faults.FAULTS):
    raise ValueError(
      f"--only: no fault {', '.join(sorted(unknown))}; use {', '.join(faults.FAULTS)}"
    )
  show = lambda text: print(text, flush=True)
  bench = faults.Bench(pathlib.Path(_WORKDIR.value).absolute(), _SEED.value, show)
  if _SOAK.value:
    faults.soak(bench, _SOAK.value)
    return
  outcomes = faults.inject(bench, _ONLY.value)
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  result = {"outcomes": outcomes, "seed": _SEED.value, **report.describe_machine()}
  (out / "faults.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
  (out / "faults.md").write_text(faults.table(outcomes))
  if any(outcome.startswith("FAILED") for outcome in outcomes.values()):
    raise SystemExit(1)


if __name__ == "__main__":
  jobs.run(main)
