"""DeepSeek-MoE-16B fine-tuned with INT4 weights, one scale per tensor: OpenAssistant-Guanaco.

Three epochs of chats of 2,048 tokens. The paper's micro-batch of 1 × 16 accumulations is a batch of
16 here: 16 devices take a sequence each, and fewer set `accumulation`.
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.format = "INT4"
  config.activation_format = "none"
  config.model.update(
    layers=28,
    width=2048,
    heads=16,
    mlp_width=10944,
    vocabulary=102400,
    norm_epsilon=1e-6,
    rope_interleaved=False,
    experts=64,
    experts_per_token=6,
    expert_width=1408,
    shared_experts=2,
    dense_layers=1,
    capacity_factor=2.0,
    balance_weight=0.001,
    remat="full",
    loss_chunks=16,
  )
  config.dtype = config.gradient_dtype = "bfloat16"
  config.mesh.update(expert=8)
  config.batch_size = 16
  config.length = 2048
  config.steps = 1846
  config.optimizer.learning_rate = 2e-5
  config.optimizer.start_fraction = 1e-5
  config.optimizer.warmup_fraction = 0.03
  config.optimizer.end_fraction = 0.0
  config.optimizer.weight_decay = 0.0
  config.log_every = 10
  config.evaluate_every = 200
  return config
