"""A sparse mixture of 32 experts, 2.1B parameters, on LM1B.

python scripts/train.py --config=configs/smoe_2b.py --workdir=runs/smoe_2b
  --config.data.path=data/lm1b --config.mesh.expert=4

Machine: 16 TPU v5p chips; without --config.mesh.expert=4 other numbers of
devices work too. A chip holds 1.26 GiB of state and 3.89 GiB at the peak, as compiled
(results/compile/table.md).
Result: not trained yet. The paper calls ECO near-lossless here.

Only the expert linears are quantized. They have no gate: only so do they make 2.1B parameters. The
run takes 100 tokens for each active parameter. Prepare the text once, with a tokenizer of 32,128
tokens or fewer: python scripts/prepare_data.py --format=lines --input='lm1b/*.txt'
  --tokenizer=tokenizer.model --output=data/lm1b
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
    balance_weight=0.01,
    quantized="experts",
    remat="full",
    loss_chunks=4,
  )
  config.dtype = config.gradient_dtype = "bfloat16"
  config.batch_size = 256
  config.length = 512
  config.steps = 246_000
  config.optimizer.learning_rate = 2e-5
  config.optimizer.start_fraction = 0.1
  config.optimizer.warmup_fraction = 0.01
  config.log_every = 100
  config.evaluate_every = 1000
  return config
