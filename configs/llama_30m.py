"""The scaling study's 30M: 3B tokens of C4.

python scripts/train.py --config=configs/llama_30m.py --workdir=runs/llama_30m
  --config.data.path=data/c4

Machine: four TPU v5e chips; other numbers of devices work too. A chip holds 0.18 GiB of state
and 1.22 GiB at the peak, as compiled (results/compile/table.md).
Result: not trained yet. The paper's validation losses are 3.3317 for ECO + SR and 3.3238
for BF16 master weights (experiments/studies/scale.py). packages_30m.py is a run of 100 such steps.

Prepare the text once, with a tokenizer of 32,128 tokens or fewer: python scripts/prepare_data.py
  --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.model --output=data/c4
"""

from eco_optax.training.config import scaling_study


def get_config():
  return scaling_study(layers=6, width=640, learning_rate=1.2e-3, steps=11444)
