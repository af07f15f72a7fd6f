"""The sparse mixture's architecture at 3M parameters, on the Python standard library."""

from eco_optax.training.config import small


def get_config():
  config = small()
  config.model.update(
    layers=4,
    width=128,
    heads=4,
    activation="gelu",
    gated=False,
    experts=8,
    experts_per_token=2,
    expert_width=320,
    capacity_factor=2.0,
    balance_weight=0.01,
    quantized="experts",
  )
  return config
