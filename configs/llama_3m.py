"""The scaling study's architecture at 3M parameters, on the Python standard library."""

from eco_optax.training.config import small


def get_config():
  config = small()
  config.model.update(layers=6, width=192, heads=3)
  return config
