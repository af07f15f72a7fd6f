"""The scaling study's 430M: 43B tokens of C4.

python scripts/train.py --config=configs/llama_430m.py --workdir=runs/llama_430m
  --config.data.path=data/c4

Machine: 16 TPU v5e chips; other numbers of devices work too. A chip holds 1.23 GiB of state
and 3.47 GiB at the peak, as compiled (results/compile/table.md).
Result: not trained yet.

Prepare the text once, with a tokenizer of 32,128 tokens or fewer: python scripts/prepare_data.py
  --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.model --output=data/c4
"""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=13, width=1664, learning_rate=1.5e-4, steps=164031)
