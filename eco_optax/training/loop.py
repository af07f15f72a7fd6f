"""train: one pretraining run from a config, from reading the text to the closing table."""

from __future__ import annotations

import json
import pathlib
import platform
import sys
import time
from typing import Any

import flax
import grain
import jax
import ml_collections
import ml_dtypes
import optax
from absl import logging
from jax.sharding import Mesh

from eco_optax.training import config as config_lib
from eco_optax.training import hardware, memory, methods, metrics, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline
from eco_optax.training.models import transformer


def evaluate(
  loss: Any, params: Any, windows: Any, batch_size: int, mesh: Mesh, limit: int | None = None
) -> float:
  """Mean loss over the first `limit` batches of validation windows, or over all."""
  count = pipeline.batch_count(windows, batch_size)
  count = count if limit is None else min(limit, count)
  split = sharding.batch_sharding(mesh)
  return (
    sum(float(loss(params, pipeline.batch(windows, i, batch_size, split))) for i in range(count))
    / count
  )


def describe_machine() -> dict[str, Any]:
  """What is needed to make a figure again: command, versions and machine."""
  versions = {
    module.__name__: module.__version__ for module in (jax, optax, flax, grain, ml_dtypes)
  } | {"python": platform.python_version()}
  machine = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "cpu": _processor(),
  }
  command = " ".join(["python", *sys.argv])
  return {"command": command, "versions": versions, "machine": machine}


def _processor() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return f"{names[0]} × {len(names)}" if names else platform.processor() or platform.machine()


def closing_table(summary: dict[str, Any]) -> str:
  """The run's figures as text."""
  used, loss = summary["bytes_per_parameter"], summary["validation_loss"]
  diverged = f"none, diverged at step {summary['diverged_at_step']}"
  rows = [
    ("method", summary["config"]["method"]),
    ("validation loss", diverged if loss is None else f"{loss:.4f} nats per byte"),
    ("weights (codes and scales)", f"{used['weights']:.2f} bytes per parameter"),
    ("moments", f"{used['moments']:.2f}"),
    ("master weights", f"{used['residual']:.2f}" if used["residual"] else "none"),
    ("total on quantized leaves", f"{used['total']:.2f} bytes per parameter"),
    ("throughput", f"{summary['tokens_per_second']:,.0f} tokens/s"),
    ("trained on", f"{summary['tokens']:,} tokens in {metrics.clock(summary['seconds'])}"),
  ]
  width = max(len(name) for name, _ in rows)
  line = "─" * (width + 2 + max(len(value) for _, value in rows))
  return "\n".join([line, *(f"{name:<{width}}  {value}" for name, value in rows), line])


def record_divergence(config: ml_collections.ConfigDict, step: int, what: str) -> int:
  """The step, for the summary, or an error where the config wants the run to stop.

  Raises:
    FloatingPointError: naming the step, where `config.stop_on_nonfinite`.
  """
  if config.stop_on_nonfinite:
    raise FloatingPointError(
      f"{what} at step {step} with method {config.method!r}: lower"
      " config.optimizer.learning_rate, or set config.stop_on_nonfinite=False to record the run as"
      " diverged"
    )
  return step


def prepare(config: ml_collections.ConfigDict) -> tuple[Any, Mesh]:
  """The optimizer and the mesh of a config that has been found in order.

  Raises:
    ValueError: naming the keys that are out of order, before anything is computed.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh.to_dict())
  check_batch(config, mesh)
  return methods.optimizer(config), mesh


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Raises `ValueError` if the devices of a mesh cannot share a batch evenly."""
  parts = mesh.size // mesh.shape["tensor"]
  if (config.batch_size // config.accumulation) % parts:
    raise ValueError(
      f"config: batch_size {config.batch_size} / accumulation {config.accumulation} is not a"
      f" multiple of the {parts} devices that the mesh splits sequences over"
    )
  if config.reduction_groups % parts:
    raise ValueError(
      f"config: reduction_groups {config.reduction_groups} is not a multiple of the {parts} devices"
      " that the mesh splits sequences over"
    )


def dry_run(config: ml_collections.ConfigDict) -> str:
  """What a run would be: its config, its parameters and their bytes; nothing is allocated."""
  tx, mesh = prepare(config)
  state = step_lib.abstract_state(config, tx, mesh)
  model = config_lib.model(config)
  axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  return "\n".join(
    [
      str(config).rstrip(),
      "",
      f"{transformer.count_params(model, embedding=True):,} parameters"
      f" ({transformer.count_params(model):,} without embedding and head),"
      f" {transformer.flops_per_token(model, config.length):,.0f} operations per token trained on,"
      f" mesh {axes}",
      "",
      memory.parameter_table(state),
      "",
      "bytes per device",
      memory.plan(state),
    ]
  )


def progress_line(
  step: int, config: ml_collections.ConfigDict, loss: float, rate: float, speed: float
) -> str:
  """What is shown of a running run: loss, speed, share of the chips' peak, and time left."""
  chip = hardware.chip(jax.devices()[0].device_kind)
  utilisation = ""
  if chip:
    per_token = transformer.flops_per_token(config_lib.model(config), config.length)
    share = speed * per_token / (chip.flops * jax.device_count())
    utilisation = f"  {share:.1%} of peak"
  left = (config.steps - step) * config.batch_size * config.length / speed
  return (
    f"step {step:>5}/{config.steps}  loss {loss:.4f}  lr {rate:.2e}  {speed:,.0f} tokens/s"
    f"{utilisation}  {metrics.clock(left)} left"
  )


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Pretrains a model and leaves its metrics, loss curve and summary in a folder.

  Args:
    config: of the run, such as that of configs/stdlib_1m.py.
    workdir: folder for metrics.jsonl, loss.png and summary.json; made if need be.

  Returns:
    The summary: validation loss (None for a run that diverged), bytes per parameter, tokens per
    second, and what made them.

  Raises:
    ValueError: for an unknown method or format, before any step.
    FloatingPointError: naming the step, where a loss is not finite and `config.stop_on_nonfinite`.
  """
  tx, mesh = prepare(config)
  folder = pathlib.Path(workdir)
  is_main = jax.process_index() == 0  # Of several processes only one writes.
  show = lambda text: print(text, flush=True) if is_main else None
  folder.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  text = corpus.standard_library()
  windows = pipeline.train_windows(text.train, config.length, config.seed)
  held_out = pipeline.validation_windows(text.validation, config.length)
  pipeline.batch_count(held_out, config.batch_size)

  schedule = methods.schedule(config)
  model = config_lib.model(config)
  state = step_lib.init_state(config, tx, mesh)
  train_step = step_lib.make_train_step(config, tx, mesh)
  loss = step_lib.make_eval_step(config)
  split = sharding.batch_sharding(mesh)
  show(
    f"{config.method}: {transformer.count_params(model):,} non-embedding parameters,"
    f" {text.manifest['train_bytes'] / 1e6:.1f} MB of text from the Python standard library,"
    f" {config.steps} steps of {config.batch_size} × {config.length} tokens"
    f" on {mesh.size} {jax.devices()[0].device_kind} device{'s' if mesh.size > 1 else ''}"
  )

  log = folder / "metrics.jsonl"
  if is_main:
    log.unlink(missing_ok=True)  # Of an earlier run in this folder.
  record = lambda *args, **kwargs: metrics.append_metrics(log, *args, **kwargs) if is_main else None
  throughput = metrics.Throughput(config.batch_size * config.length)
  diverged, unread = None, []
  with jax.set_mesh(mesh):
    for step in range(config.steps):
      batch = pipeline.batch(windows, step, config.batch_size, split)
      state, result = train_step(state, batch)
      unread.append(result)
      done, last = step + 1, step + 1 == config.steps
      if step == 0:
        jax.block_until_ready(result)  # The first step compiles, so the clock starts behind it.
        throughput.resume(done)
        continue
      evaluates = not last and done % config.evaluate_every == 0
      if last or evaluates or done % config.log_every == 0:
        # All at once, because reading each step would stall the next.
        rows = jax.device_get(unread)
        unread = []
        throughput.pause(done)
        speed, rate = throughput.tokens_per_second, metrics.learning_rate_at(schedule, step)
        record(done, **rows[-1], learning_rate=rate, tokens_per_second=speed)
        show(progress_line(done, config, rows[-1]["loss"], rate, speed))
        for bad, row in enumerate(rows, done - len(rows) + 1):
          if not metrics.is_finite(*row.values()):
            what = f"loss {row['loss']} and gradient norm {row['grad_norm']}"
            diverged = record_divergence(config, bad, what)
            break
        if diverged:
          break
        if evaluates:
          value = evaluate(
            loss, state.params, held_out, config.batch_size, mesh, config.evaluate_batches
          )
          record(done, validation_loss=value)
        throughput.resume(done)

    validation = None
    if not diverged:
      validation = evaluate(loss, state.params, held_out, config.batch_size, mesh)
      record(done, validation_loss=validation)
      if not metrics.is_finite(validation):
        diverged = record_divergence(config, done, f"validation loss {validation}")
        validation = None
  used = memory.per_parameter(state, transformer.is_quantized(model))
  summary = {
    "validation_loss": validation,
    "diverged_at_step": diverged,
    "parameters": transformer.count_params(model, embedding=True),
    "quantized_parameters": sum(memory.quantized(state.params).values()),
    "bytes_per_parameter": used._asdict() | {"total": used.total},
    "tokens_per_second": throughput.tokens_per_second,
    "tokens": done * config.batch_size * config.length,
    "seconds": time.perf_counter() - started,
    "config": config.to_dict(),
    "corpus": text.manifest,
    **describe_machine(),
  }
  if not is_main:
    return summary
  (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
  metrics.plot_losses({config.method: log}, folder / "loss.png")
  logging.info("metrics, summary and loss curve are in %s", folder)
  print(closing_table(summary), flush=True)
  return summary
