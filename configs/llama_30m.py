"""The scaling study's 30M: 3B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=6, width=640, learning_rate=1.2e-3, steps=11444)
