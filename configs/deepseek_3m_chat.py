"""DeepSeek-MoE's architecture at 3M parameters, fine-tuned on chats with INT4 weights.

The paper's settings for DeepSeek-MoE-16B, scaled down: one scale per tensor, warm-up from 1e-5 of
the peak, cosine to zero, 16 sequences one after another. Needs a checkpoint of this model
(--config.init_from) and chats in its tokens:

python scripts/prepare_data.py --corpus=docstrings --tokenizer=data/packages_1k/tokenizer.json
  --output=data/docstrings
"""

from eco_optax.training.config import small


def get_config():
  config = small()
  config.model.update(
    layers=4,
    width=128,
    heads=4,
    vocabulary=1024,
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
  config.data.path = "data/docstrings"
  config.format = "INT4"
  config.activation_format = "none"
  config.batch_size = config.accumulation = 16
  config.length = 128
  config.steps = 100
  config.optimizer.learning_rate = 2e-4
  config.optimizer.start_fraction = 1e-5
  config.optimizer.warmup_fraction = 0.03
  config.optimizer.end_fraction = 0.0
  config.optimizer.weight_decay = 0.0
  config.log_every = 10
  config.evaluate_every = 50
  return config
