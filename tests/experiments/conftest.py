"""What tests of studies share."""

import os

import pytest

from eco_optax.training import config
from eco_optax.training.data import prepare


@pytest.fixture
def base(tmp_path, monkeypatch):
  """A config of runs that take seconds, and their text."""
  # On one device, of a flag set twice the last value counts; a run of four steps is all compiling.
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
  monkeypatch.setenv("XLA_FLAGS", flags)
  (tmp_path / "text").write_text("".join(f"line number {i} of a few\n" for i in range(100)))
  sources = prepare.from_files([str(tmp_path / "text")])
  prepare.prepare(
    tmp_path / "data", sources, format="lines", name="a", tokenizer="bytes", percent=9
  )
  c = config.small()
  c.data.path = str(tmp_path / "data")
  c.model.update(layers=1, width=16, heads=1, mlp_width=32)
  c.batch_size, c.length, c.steps, c.evaluate_every, c.evaluate_batches = 2, 16, 4, 2, 1
  return c
