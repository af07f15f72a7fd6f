"""How often `eco.diagnostics.advise` is right: its verdicts beside what whole runs lost.

It is asked in the middle of a run with float32 weights, and answers for the runs of the study of
storage, whose methods trained from the start.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline
from eco_optax.training.models import transformer
from experiments.studies import storage, sweep

BATCHES = 32
TOLERANCE = 0.02  # Nats per byte; standard errors of three seeds are up to 0.015.
FORMATS = {"FP8": eco.FP8, "INT4": eco.INT4}
# Runs of the study of storage by way of `advise`; the first is what the others are held against.
RUNS = {
  "master weights": "float32 residual",
  "ECO, stochastic": "no residual: ECO + SR",
  "ECO, nearest": "no residual: ECO + RTN",
  "no feedback, stochastic": "nothing: naive SR",
  "int8 residual, nearest": "int8 residual",
}


def ask(config: ml_collections.ConfigDict, rate: float, show: Callable[[str], Any]) -> eco.Advice:
  """Trains half of a run with float32 weights, and asks.

  Args:
    config: of the run, on one device.
    rate: peak learning rate.
    show: told how it goes.

  Returns:
    The advice on FORMATS.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  config.update({"method": "bf16_mw", "activation_format": "none"})
  config.optimizer.learning_rate = rate
  mesh = sharding.make_mesh(config.mesh.to_dict())
  tx = methods.optimizer(config)
  windows = pipeline.train_windows(
    corpus.standard_library_dataset().train, config.length, config.seed
  )
  with jax.set_mesh(mesh):
    state = step_lib.init_state(config, tx, mesh)
    train_step = step_lib.make_train_step(config, tx, mesh)
    batches = pipeline.batches(windows, 0, config.batch_size, sharding.batch_sharding(mesh))
    for t in range(config.steps // 2):
      state, metrics = train_step(state, next(batches))
      if (t + 1) % 50 == 0:
        show(f"  rate {rate:g}, step {t + 1}: loss {float(metrics['loss']):.4f}")
    model = config_lib.model(config)
    advice = eco.diagnostics.advise(
      lambda params, batch: transformer.loss(model, params, *batch),
      state.params,
      methods.stock_optimizer(config),
      [next(batches) for _ in range(BATCHES)],
      list(FORMATS.values()),
      steps=config.steps,
      where=transformer.is_block_kernel,
      opt_state=state.opt_state[1],
      b1=config.optimizer.b1,
      tolerance=TOLERANCE,
      has_aux=True,
    )
  show(str(advice))
  return advice
