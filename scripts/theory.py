"""Holds the package's transforms against the theory: python scripts/theory.py --study=bounds."""

import pathlib
import runpy
import sys

from absl import flags

from eco_optax.training import jobs

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments.studies import bounds, grid, muon, similarity, stationary

_ROOT = pathlib.Path(__file__).parents[1]
_STUDIES = ("stationary", "grid", "bounds", "similarity", "muon")
_STUDY = flags.DEFINE_enum(
  "study",
  "all",
  ["all", *_STUDIES],
  "Closed forms under white noise, what a grid makes of them, bounds on a network, similarity of"
  " errors in training, or what Muon pays back.",
)
_SMALL = flags.DEFINE_bool("small", False, "Fewer points, chains and steps: under a minute.")
_RESULTS = jobs.define_path(
  "results", str(_ROOT / "results" / "theory"), "Folder where figures go."
)


def main(_: list[str]) -> None:
  """Runs the chosen studies and fails if a claim of the theory does not hold."""
  out, failures = pathlib.Path(_RESULTS.value), []
  out.mkdir(parents=True, exist_ok=True)
  for study in _STUDIES if _STUDY.value == "all" else [_STUDY.value]:
    if study == "muon":
      config = runpy.run_path(str(_ROOT / "configs" / "stdlib_1m.py"))["get_config"]()
      failures += muon.run(out, muon.tiny(config), _SMALL.value)
    elif study == "similarity":
      name, steps = ("tiny", 20) if _SMALL.value else ("stdlib_1m", 400)
      config = runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]()
      config.steps = steps
      runs = dict(list(similarity.RUNS.items())[: 1 if _SMALL.value else None])
      failures += similarity.run(config, out, runs)
    else:
      failures += {"stationary": stationary, "grid": grid, "bounds": bounds}[study].run(
        out, _SMALL.value
      )
    print((out / f"{study}.md").read_text())
  if failures:
    raise SystemExit("does not hold:\n" + "\n".join(failures))


if __name__ == "__main__":
  jobs.run(main)
