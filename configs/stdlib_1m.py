"""About 1M non-embedding parameters on the Python standard library, 5 minutes on two cores."""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(layers=4, width=128, heads=4, vocabulary=256)
  config.batch_size = 16
  config.length = 128
  config.steps = 1000
  config.optimizer.learning_rate = 2e-3
  config.checkpoint.every = 200
  return config
