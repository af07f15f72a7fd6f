"""The scaling study's 100M: 10B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=8, width=1024, learning_rate=6e-4, steps=38146)
