"""DeepSeek-MoE's architecture at 3M parameters, on the Python standard library.

python scripts/train.py --config=configs/deepseek_3m.py --workdir=runs/deepseek_3m

Machine: two CPU cores, about three minutes.
Result: validation loss 1.6474 ± 0.0157 nats per byte over three seeds; master weights + SR
(--config.method=mw_sr) 1.6337 (results/families/table.md).
"""

from eco_optax.training.config import small


def get_config():
  config = small()
  config.model.update(
    layers=4,
    width=128,
    heads=4,
    mlp_width=640,
    norm_epsilon=1e-6,
    rope_interleaved=False,
    experts=8,
    experts_per_token=2,
    expert_width=192,
    shared_experts=2,
    dense_layers=1,
    capacity_factor=2.0,
    balance_weight=0.001,
  )
  return config
