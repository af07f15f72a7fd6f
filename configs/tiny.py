"""A model that trains in seconds, for tests."""

import importlib.util
import pathlib

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  path = pathlib.Path(__file__).with_name("stdlib_1m.py")
  spec = importlib.util.spec_from_file_location("stdlib_1m", path)
  base = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(base)
  config = base.get_config()
  config.model = config_dict.ConfigDict({"layers": 2, "width": 32, "heads": 2, "mlp_width": 64})
  config.steps = 60
  config.learning_rate = 1e-2
  config.log_every = 20
  config.evaluate_every = 40
  config.evaluate_batches = 4
  return config
