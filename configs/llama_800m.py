"""The scaling study's 800M: 80B tokens of C4.

python scripts/train.py --config=configs/llama_800m.py --workdir=runs/llama_800m
  --config.data.path=data/c4

Machine: 16 TPU v5p chips; other numbers of devices work too. A chip holds 2.09 GiB of state
and 5.59 GiB at the peak, as compiled (results/compile/table.md).
Result: not trained yet.

Prepare the text once, with a tokenizer of 32,128 tokens or fewer: python scripts/prepare_data.py
  --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.model --output=data/c4
"""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=16, width=2048, learning_rate=7.5e-5, steps=305175)
