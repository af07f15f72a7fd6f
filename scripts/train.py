"""Pretrains: python scripts/train.py --config=configs/stdlib_1m.py --config.method=eco_sr."""

import pathlib

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import loop

_CONFIG = config_flags.DEFINE_config_file(
  "config", str(pathlib.Path(__file__).parents[1] / "configs" / "stdlib_1m.py")
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/stdlib_1m", "Folder for metrics and figures.")


def main(_: list[str]) -> None:
  """Runs the config."""
  loop.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  app.run(main)
