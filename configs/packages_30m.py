"""The scaling study's 30M and its batches: 26M tokens of prose and code.

python scripts/train.py --config=configs/packages_30m.py --workdir=runs/packages_30m

Machine: one 80 GB GPU, three minutes on an H100.
Result: validation loss 4.9046 nats per token; BF16 master weights (--config.method=bf16_mw) 4.9132
(results/scale/table.md).

Prepare the text once: python scripts/prepare_data.py --corpus=packages --vocabulary=32000
  --output=data/packages_32k
"""

from eco_optax.training.config import scaling_study


def get_config():
  config = scaling_study(layers=6, width=640, learning_rate=1.2e-3, steps=100)
  config.data.path = "data/packages_32k"
  config.model.update(remat="none", loss_chunks=8)
  config.accumulation = 8
  config.mesh.update(data=1, fsdp=-1)
  config.replicated_limit_mib = 100  # The embedding is whole on one device.
  config.log_every = 5
  config.evaluate_every = 25
  config.checkpoint.every = 0
  return config
