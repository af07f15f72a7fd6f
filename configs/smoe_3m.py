"""The sparse mixture's architecture at 3M parameters, on the Python standard library.

python scripts/train.py --config=configs/smoe_3m.py --workdir=runs/smoe_3m

Machine: two CPU cores, about three minutes.
Result: validation loss 1.7238 ± 0.0062 nats per byte over three seeds; master weights + SR
(--config.method=mw_sr) 1.7143 (results/families/table.md).
"""

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
