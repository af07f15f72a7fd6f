"""The scaling study's 200M: 20B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=10, width=1280, learning_rate=3e-4, steps=76293)
