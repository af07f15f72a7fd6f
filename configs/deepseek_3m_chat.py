"""DeepSeek-MoE's architecture at 3M parameters, fine-tuned on chats with INT4 weights.

python scripts/train.py --config=configs/deepseek_3m_chat.py --workdir=runs/deepseek_3m_chat
  --config.init_from=runs/reproduce/finetune/base_exported

Machine: one CPU core, about a minute.
Result: at peak learning rates of 3e-4 and 1e-3, validation loss 3.8610 and 3.7265 nats per token;
master weights + RTN 3.8516 and 3.7133 (results/finetune/table.md). This peak has not been run.

The paper's settings for DeepSeek-MoE-16B, scaled down: one scale per tensor, warm-up from 1e-5 of
the peak, cosine to zero, 16 sequences one after another. It starts from a checkpoint of this model,
such as the one that `python scripts/reproduce.py --study=finetune` pretrains. Prepare the chats
once: python scripts/prepare_data.py --corpus=docstrings --tokenizer=data/packages_1k/tokenizer.json
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
