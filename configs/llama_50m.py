"""The scaling study's 50M: 5B tokens of C4."""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=7, width=768, learning_rate=1.2e-3, steps=19073)
