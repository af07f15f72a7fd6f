"""DeepSeek-MoE-16B fine-tuned with INT4 weights, one scale per tensor, on OpenAssistant-Guanaco.

python scripts/train.py --config=configs/deepseek_moe_16b.py --workdir=runs/deepseek_moe_16b
  --config.init_from=deepseek-moe-16b-base --config.data.path=data/guanaco --config.mesh.expert=8

Machine: 16 TPU v5p chips; without --config.mesh.expert=8 other numbers of
devices work too. A chip holds 13.74 GiB of state and 21.19 GiB at the peak, as compiled
(results/compile/table.md).
Result: not trained yet. In the paper ECO + SR matches master weights and naive removal diverges;
deepseek_3m_chat.py repeats that at 3M parameters.

Three epochs of chats of 2,048 tokens. A batch is 16 sequences: one device computes them one after
another, as the paper's micro-batches of 1, and 16 devices take one each. Prepare the chats once:
python scripts/prepare_data.py --format=guanaco --input=guanaco.jsonl
  --tokenizer=deepseek-moe-16b-base/tokenizer.json --output=data/guanaco
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
    balance_weight=0.001,
    remat="full",
    loss_chunks=16,
  )
  config.dtype = config.gradient_dtype = "bfloat16"
  config.batch_size = config.accumulation = 16
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
