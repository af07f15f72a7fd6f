"""A model that trains in seconds, for tests and a first look.

python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny

Machine: any, 30 seconds on two CPU cores, most of them to compile.
Result: a validation loss below 3.2 nats per byte, which tests/training/test_loop.py asks of it.
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, vocabulary=256)
  config.batch_size = 16
  config.length = 128
  config.steps = 60
  config.optimizer.learning_rate = 1e-2
  config.log_every = 20
  config.evaluate_every = 40
  config.evaluate_batches = 4
  return config
