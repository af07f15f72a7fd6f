"""The scaling study's 800M: 80B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=16, width=2048, learning_rate=7.5e-5, steps=305175)
