"""Gemma 3 1B from scratch: 40B tokens of C4.

python scripts/train.py --config=configs/gemma3_1b.py --workdir=runs/gemma3_1b
  --config.data.path=data/c4_gemma --config.mesh.fsdp=8

Machine: 16 TPU v6e chips; without --config.mesh.fsdp=8 other numbers of
devices work too. A chip holds 1.16 GiB of state and 5.18 GiB at the peak, as compiled
(results/compile/table.md).
Result: not trained yet. The paper calls ECO near-lossless here.

Prepare the text once, with Gemma's tokenizer: python scripts/prepare_data.py --format=c4
  --input='c4/*.json.gz' --tokenizer=tokenizer.json --output=data/c4_gemma
"""

from eco_optax.training.config import defaults


def get_config():
  config = defaults()
  config.model.update(
    layers=26,
    width=1152,
    heads=4,
    kv_heads=1,
    head_width=256,
    mlp_width=6912,
    vocabulary=262144,
    activation="gelu",
    tied_embedding=True,
    scaled_embedding=True,
    norm_epsilon=1e-6,
    norm_offset=True,
    post_norms=True,
    qk_norm=True,
    rope_interleaved=False,
    rope_base=1e6,
    local_rope_base=1e4,
    window=512,
    global_every=6,
    remat="full",
    loss_chunks=16,
  )
  config.dtype = config.gradient_dtype = "bfloat16"
  config.mesh.update(data=-1, fsdp=-1)
  config.batch_size = 256
  config.accumulation = 2
  config.length = 512
  config.steps = 305175
  config.optimizer.learning_rate = 1e-4
  config.log_every = 100
  config.evaluate_every = 1000
  return config
