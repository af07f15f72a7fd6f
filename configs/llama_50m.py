"""The scaling study's 50M: 5B tokens of C4.

python scripts/train.py --config=configs/llama_50m.py --workdir=runs/llama_50m
  --config.data.path=data/c4

Machine: four TPU v5e chips; other numbers of devices work too. A chip holds 0.24 GiB of state
and 1.72 GiB at the peak, as compiled (results/compile/table.md).
Result: not trained yet.

Prepare the text once, with a tokenizer of 32,128 tokens or fewer: python scripts/prepare_data.py
  --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.model --output=data/c4
"""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=7, width=768, learning_rate=1.2e-3, steps=19073)
