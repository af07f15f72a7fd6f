"""What tests of runs share."""

import json

import pytest

from eco_optax.training import config as config_lib
from eco_optax.training import methods
from eco_optax.training import step as step_lib

# What a run does between its steps, which are the same without.
_NOT_IN_A_STEP = dict.fromkeys(
  ("nonfinite", "log_every", "evaluate_every", "evaluate_batches", "checkpoint.every")
)


@pytest.fixture(scope="module")
def made():
  """Optimizers and steps of a module's tests, by what makes them and the run's config."""
  return {}


@pytest.fixture
def traced_once(made, monkeypatch):
  """Runs of one config share their optimizer and step, of which a trace takes longer than a run."""

  def shared(make):
    def cached(config, *rest):
      key = make.__name__, json.dumps(config_lib.flat(config) | _NOT_IN_A_STEP)
      if key not in made:
        # Of its own config, since the test may change that of the run.
        made[key] = make(config.copy_and_resolve_references(), *rest)
      return made[key]

    return cached

  for module, name in (
    (methods, "optimizer"),
    (step_lib, "make_train_step"),
    (step_lib, "make_eval_step"),
  ):
    monkeypatch.setattr(module, name, shared(getattr(module, name)))
