"""About 1M non-embedding parameters on 5M tokens of prose and code.

python scripts/train.py --config=configs/packages_1m.py --workdir=runs/packages_1m

Machine: one CPU core, about 13 minutes; a minute and a half on an H100.
Result: validation loss 2.9466 nats per token with seed 0; master weights + RTN
(--config.method=mw_rtn) 2.9373 (results/claims/table.md).

Prepare the text once: python scripts/prepare_data.py --corpus=packages --vocabulary=1024
  --output=data/packages_1k
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(layers=4, width=128, heads=4, vocabulary=1024)
  config.data.path = "data/packages_1k"
  config.batch_size = 16
  config.length = 128
  config.steps = 2450
  config.optimizer.learning_rate = 2e-3
  config.log_every = 50
  config.evaluate_every = 490
  config.checkpoint.every = 490
  config.checkpoint.keep = 1
  return config
