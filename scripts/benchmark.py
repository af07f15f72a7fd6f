"""Times random bits and optimizer steps: python scripts/benchmark.py.

Or checkpoints: --config=configs/llama_3m.py --out=results/checkpoint.json
"""

import json
import pathlib
import tempfile

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import benchmark, report

_ROOT = pathlib.Path(__file__).parents[1]
_SIZE = flags.DEFINE_integer("size", 2**25, "Elements per array; a multiple of 4096.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Rounds, of which the median counts.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Of a run whose checkpoints are timed.")
_SAVES = flags.DEFINE_integer("saves", 10, "Checkpoints, of which the median counts.")
_OUT = flags.DEFINE_string("out", str(_ROOT / "results" / "benchmark.json"), "Where figures go.")


def main(_: list[str]) -> None:
  """Measures, prints and writes."""
  if _CONFIG.value:
    with tempfile.TemporaryDirectory(dir=".") as folder:
      figures = benchmark.checkpoint(_CONFIG.value, pathlib.Path(folder).absolute(), _SAVES.value)
    _write(figures)
    return
  figures = {
    "random_bits": benchmark.random_bits(_SIZE.value, _REPEATS.value),
    "optimizer_step": benchmark.optimizer_step(_SIZE.value, _REPEATS.value),
  }
  for study, rows in figures.items():
    print(f"{study}, {_SIZE.value:,} elements")
    for name, row in rows.items():
      print(f"  {name:<30} {row['milliseconds']:9.1f} ms  {row['ratio']:6.2f}×")
  _write(figures)


def _write(figures: dict) -> None:
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  figures |= report.describe_machine()
  out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
