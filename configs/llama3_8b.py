"""Llama 3.1 8B fine-tuned on one GPU, with everything in 8 bits, on OpenAssistant-Guanaco.

python scripts/train.py --config=configs/llama3_8b.py --workdir=runs/llama3_8b
  --config.init_from=Llama-3.1-8B --config.data.path=data/guanaco

Machine: one GPU of 32 GB, or 4 TPU v5e chips. The state takes 15.21 GiB and the step 23.32 GiB at
the peak, as compiled for one H100 (results/one_gpu/llama3_8b.json). A step of one sequence, by
--config.batch_size=1 --config.accumulation=1, takes 16.34 GiB, and with --config.format=INT4 13.06.
Result: not trained yet.

Codes and momentum are a byte each, and of second moments row and column means are kept; so for
embedding and head, which are stored and stepped in 6 parts of the vocabulary. Three epochs of
chats of 2,048 tokens, 16 in a step. Prepare the chats once:
python scripts/prepare_data.py --format=guanaco --input=guanaco.jsonl
  --tokenizer=Llama-3.1-8B/tokenizer.json --output=data/guanaco
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    mlp_width=14336,
    vocabulary=128256,
    rope_base=5e5,
    rope_interleaved=False,
    rope_factor=8.0,
    rope_length=8192,
    quantized="all",
    vocabulary_parts=6,
    loss_chunks=2,
    remat="full",
  )
  config.moments.update(mu="float8_e4m3fn", nu="factored")
  config.release = True
  config.kept_format = "FP8_TOKEN"
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
