"""A sparse mixture of 32 experts, 2.1B parameters: LM1B.

Only the expert linears are quantized. They have no gate, which is what the number 2.1B implies. 100
tokens for each active parameter.
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(
    layers=24,
    width=576,
    heads=9,
    vocabulary=32128,
    activation="gelu",
    gated=False,
    experts=32,
    experts_per_token=4,
    expert_width=2304,
    capacity_factor=2.0,
    balance_weight=0.01,
    quantized="experts",
    remat="full",
    loss_chunks=4,
  )
  config.dtype = config.gradient_dtype = "bfloat16"
  config.mesh.update(expert=4)
  config.batch_size = 256
  config.length = 512
  config.steps = 246_000
  config.optimizer.learning_rate = 2e-5
  config.optimizer.start_fraction = 0.1
  config.optimizer.warmup_fraction = 0.01
  config.log_every = 100
  config.evaluate_every = 1000
  return config
