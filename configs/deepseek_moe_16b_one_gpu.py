"""DeepSeek-MoE-16B fine-tuned on one GPU, with weights in INT4, on OpenAssistant-Guanaco.

python scripts/train.py --config=configs/deepseek_moe_16b_one_gpu.py
  --workdir=runs/deepseek_moe_16b_one_gpu --config.init_from=deepseek-moe-16b-base
  --config.data.path=data/guanaco

Machine: one GPU of 32 GB or more. The state takes 23.65 GiB and the step 28.65 GiB at the peak, as
compiled for one H100 (results/one_gpu/deepseek_moe_16b_one_gpu.json).
Result: not trained yet.

deepseek_moe_16b.py with a byte for each weight's momentum, and row and column means of second
moments. Embedding and head are INT8, stored and stepped in 25 parts of the vocabulary. Three epochs
of chats of 2,048 tokens, 16 in a step. Prepare the chats once:
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
    quantized="all",
    vocabulary_parts=25,
    remat="full",
    mlp_blocks=True,
    loss_chunks=16,
  )
  config.moments.update(mu="float8_e4m3fn", nu="factored")
  config.release = True
  config.kept_format = "FP8_TOKEN"
  config.dtype = config.gradient_dtype = "bfloat16"
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
