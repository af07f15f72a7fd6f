"""One process of runs that tests/training/test_distributed.py starts in several shapes."""

import hashlib
import os
import sys

process, processes, devices, port = map(int, sys.argv[1:5])
folder = sys.argv[5]
# Without fused multiply-add the compiler's choice of what to fuse does not show in the last place.
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
  " --xla_cpu_max_isa=AVX"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from eco_optax.training import checkpoints, loop
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline
from eco_optax.training.data.shards import TokenStream
from eco_optax.training.sharding import batch_sharding

if processes > 1:
  jax.distributed.initialize(f"localhost:{port}", processes, process)

text = b"\0".join(b"the same words again and again, %d times " % i for i in range(100))
DATA = {"source": "the same words"}


def get_config(**changes):
  config = config_lib.defaults()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64, vocabulary=256)
  config.batch_size, config.length, config.steps = 8, 32, 20
  config.optimizer.learning_rate = 1e-2
  config.update_from_flattened_dict(changes)
  return config


def train(config, saved_at=None):
  """The last metrics and the digest of the last state; from a checkpoint on, where one is saved."""
  tx, mesh = loop.prepare(config)
  windows = pipeline.train_windows(TokenStream([np.frombuffer(text, np.uint8)]), config.length, 0)
  state = step_lib.init_state(config, tx, mesh)
  step = step_lib.make_train_step(config, tx, mesh)
  with jax.set_mesh(mesh):
    for i in range(config.steps):
      if i == saved_at:
        store = checkpoints.manager(folder, 1)
        checkpoints.save(store, i, state, config, DATA, {"eco_optax": "0"}, {})
        checkpoints.finish(store)
        target = step_lib.abstract_state(config, tx, mesh)
        state = checkpoints.restore(store, target, config, DATA).state
        store.close()
      batch = pipeline.batch(windows, i, config.batch_size, batch_sharding(mesh))
      state, metrics = step(state, batch)
  sums = str(sorted(checkpoints.checksums(state).items()))
  return metrics, hashlib.sha256(sums.encode()).hexdigest()


fsdp = min(2, jax.device_count())
runs = [train(get_config(**{"reduction_groups": 4, "mesh.fsdp": fsdp, "mesh.data": -1}))]
if jax.device_count() > 1:
  # One layer's gradient at a time, in one process with four devices and in two with two.
  split = {"reduction_groups": 4, "mesh.fsdp": fsdp, "mesh.data": -1}
  runs.append(train(get_config(**split, release=True, steps=5)))
  wire = get_config(**{"wire": "int4", "mesh.fsdp": 1, "mesh.data": -1})
  runs.append(train(wire, saved_at=10 if processes > 1 else None))
if jax.process_index() == 0:
  for metrics, digest in runs:
    print(f"result {jax.device_count()} {float(metrics['loss']):.6f} {digest}")
