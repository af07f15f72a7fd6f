"""About 1M non-embedding parameters on the Python standard library, 5 minutes on two cores."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0

  # bf16_mw, mw_rtn, mw_sr, naive_rtn, naive_sr, eco_rtn or eco_sr.
  config.method = "eco_sr"
  config.schedule_aware = True  # The rule follows the learning rate; False is the paper's rule.
  config.residual = "float32"  # Of mw_*: float32, bfloat16 or int8.
  config.format = "FP8"  # Of the blocks' linear weights: a preset of eco_optax.
  config.activation_format = "FP8_TOKEN"  # Of their inputs; "none" leaves them float.

  config.model = config_dict.ConfigDict({"layers": 4, "width": 128, "heads": 4})
  config.dtype = "float32"  # Of activations; bfloat16 is slow on CPU.

  config.batch_size = 16
  config.length = 128
  config.steps = 1000

  config.learning_rate = 2e-3
  config.b1 = 0.9
  config.b2 = 0.98
  config.eps = 1e-9
  config.weight_decay = 0.1
  config.max_norm = 1.0

  config.log_every = 20
  config.evaluate_every = 200
  config.evaluate_batches = 32  # Of the evaluations on the way; the last one takes them all.
  config.stop_on_nonfinite = True
  return config
