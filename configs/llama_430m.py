"""The scaling study's 430M: 43B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=13, width=1664, learning_rate=1.5e-4, steps=164031)
