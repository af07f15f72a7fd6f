"""Measures what there is to measure on this machine's GPU, in the minutes there are.

  python scripts/gpu.py --minutes=9

runs the queue of experiments/gpu.py, one entry after another, and writes results/gpu/<card>.json.
What that file has already for this card is left out, unless --again. One entry by itself:

  python scripts/gpu.py --entry=fused_steps
"""

import pathlib
import sys

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import gpu

try:
  from eco_optax.training.jobs import define_path, run
except ImportError:  # Most entries need JAX and Optax alone.
  define_path, run = flags.DEFINE_string, app.run  # type: ignore[assignment]

_ROOT = pathlib.Path(__file__).parents[1]
_MINUTES = flags.DEFINE_float("minutes", 9.0, "That the queue may take.")
_ENTRIES = flags.DEFINE_list("entries", [], "Of the queue, in this order; all by default.")
_ENTRY = flags.DEFINE_enum("entry", None, list(gpu.ENTRIES), "To measure here, by itself.")
_LONGEST = flags.DEFINE_float("longest", float("inf"), "Seconds that one entry may take.")
_AGAIN = flags.DEFINE_boolean("again", False, "Whether to measure what the file has.")
_SIZE = flags.DEFINE_integer("size", gpu.SIZE, "Weights of a step.")
_RESULTS = define_path("results", str(_ROOT / "results"), "Where figures go.")


def main(_: list[str]) -> None:
  """Runs an entry, or the queue."""
  path = pathlib.Path(_RESULTS.value) / "gpu" / f"{gpu.card()}.json"
  if _ENTRY.value:
    gpu.run_entry(_ENTRY.value, path, _SIZE.value)
    return
  command = [sys.executable, __file__, f"--size={_SIZE.value}", f"--results={_RESULTS.value}"]
  asked = _SIZE.value, _ENTRIES.value, _AGAIN.value
  fates = gpu.queue(path, 60 * _MINUTES.value, *asked, command, _LONGEST.value)
  for name, fate in fates.items():
    print(f"{name:<20} {fate}")


if __name__ == "__main__":
  run(main)
