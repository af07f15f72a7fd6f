"""The scaling study's 100M: 10B tokens of C4.

python scripts/train.py --config=configs/llama_100m.py --workdir=runs/llama_100m
  --config.data.path=data/c4

Machine: eight TPU v5e chips; other numbers of devices work too. A chip holds 0.40 GiB of state
and 1.65 GiB at the peak, as compiled (results/compile/table.md).
Result: not trained yet.

Prepare the text once, with a tokenizer of 32,128 tokens or fewer: python scripts/prepare_data.py
  --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.model --output=data/c4
"""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=8, width=1024, learning_rate=6e-4, steps=38146)
