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
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import optax
from absl import logging

import eco_optax as eco
from eco_optax.training import methods, metrics
from eco_optax.training.data import corpus, pipeline
from eco_optax.training.models import transformer


def model_config(config: ml_collections.ConfigDict) -> transformer.TransformerConfig:
  """The model of a run's config."""
  return transformer.TransformerConfig(
    **config.model,
    vocabulary=pipeline.VOCABULARY,
    dtype=methods.compute_dtype(config),
    activation_format=methods.formats(config)[1],
  )


def loss_fn(model: transformer.TransformerConfig, params: Any, tokens_BxM: jax.Array) -> jax.Array:
  """Mean cross-entropy, in nats per token, of windows of M = L + 1 tokens."""
  logits_BxLxV = transformer.apply(model, params, tokens_BxM[:, :-1])
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxM[:, 1:]))


def init_state(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation
) -> tuple[Any, Any]:
  """Parameters, their block kernels packed if the method wants it, and the optimizer's state."""
  weight_format, _ = methods.formats(config)

  @jax.jit
  def init() -> Any:
    params = transformer.init(model_config(config), config.seed)
    if weight_format is None:
      return params
    return eco.quantize(params, weight_format, transformer.is_block_kernel)

  params = init()
  return params, jax.jit(tx.init)(params)


def make_train_step(config: ml_collections.ConfigDict, tx: optax.GradientTransformation) -> Any:
  """A jitted (params, opt_state, tokens) → (params, opt_state, metrics); it donates its state."""
  model = model_config(config)
  loss_and_grad = eco.value_and_grad(lambda p, x: loss_fn(model, p, x), dense=False)

  def step(params: Any, opt_state: Any, tokens_BxM: jax.Array) -> tuple[Any, Any, dict]:
    loss, grads = loss_and_grad(params, tokens_BxM)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = eco.apply_updates(params, updates)
    return params, opt_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

  return jax.jit(step, donate_argnums=(0, 1))


def evaluate(loss: Any, params: Any, batches: Any, limit: int | None = None) -> float:
  """Mean loss over the first `limit` validation batches, or over all."""
  count = len(batches) if limit is None else min(limit, len(batches))
  return sum(float(loss(params, jnp.asarray(batches[i]))) for i in range(count)) / count


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
      f"{what} at step {step} with method {config.method!r}: lower config.learning_rate, or set"
      " config.stop_on_nonfinite=False to record the run as diverged"
    )
  return step


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
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  started = time.perf_counter()
  text = corpus.standard_library()
  batches = pipeline.train_batches(text.train, config.batch_size, config.length, config.seed)
  held_out = pipeline.validation_batches(text.validation, config.batch_size, config.length)

  schedule = methods.schedule(config)
  tx = methods.optimizer(config)
  params, opt_state = init_state(config, tx)
  train_step = make_train_step(config, tx)
  model = model_config(config)
  loss = jax.jit(lambda p, x: loss_fn(model, p, x))
  print(
    f"{config.method}: {transformer.count_params(model):,} non-embedding parameters,"
    f" {text.manifest['train_bytes'] / 1e6:.1f} MB of text from the Python standard library,"
    f" {config.steps} steps of {config.batch_size} × {config.length} tokens",
    flush=True,
  )

  log = folder / "metrics.jsonl"
  log.unlink(missing_ok=True)  # Of an earlier run in this folder.
  throughput = metrics.Throughput(config.batch_size * config.length)
  diverged, unread = None, []
  for step in range(config.steps):
    params, opt_state, result = train_step(params, opt_state, jnp.asarray(next(batches)))
    unread.append(result)
    done, last = step + 1, step + 1 == config.steps
    if step == 0:
      jax.block_until_ready(result)  # The first step compiles, so the clock starts behind it.
      throughput.resume(done)
      continue
    evaluates = not last and done % config.evaluate_every == 0
    if last or evaluates or done % config.log_every == 0:
      rows = jax.device_get(unread)  # All at once, because reading each step would stall the next.
      unread = []
      throughput.pause(done)
      speed, rate = throughput.tokens_per_second, metrics.learning_rate_at(schedule, step)
      metrics.append_metrics(log, done, **rows[-1], learning_rate=rate, tokens_per_second=speed)
      left = (config.steps - done) * config.batch_size * config.length / speed
      print(
        f"step {done:>5}/{config.steps}  loss {rows[-1]['loss']:.4f}  lr {rate:.2e}"
        f"  {speed:,.0f} tokens/s  {metrics.clock(left)} left",
        flush=True,
      )
      for bad, row in enumerate(rows, done - len(rows) + 1):
        if not metrics.is_finite(*row.values()):
          what = f"loss {row['loss']} and gradient norm {row['grad_norm']}"
          diverged = record_divergence(config, bad, what)
          break
      if diverged:
        break
      if evaluates:
        value = evaluate(loss, params, held_out, config.evaluate_batches)
        metrics.append_metrics(log, done, validation_loss=value)
      throughput.resume(done)

  validation = None
  if not diverged:
    validation = evaluate(loss, params, held_out)
    metrics.append_metrics(log, done, validation_loss=validation)
    if not metrics.is_finite(validation):
      diverged = record_divergence(config, done, f"validation loss {validation}")
      validation = None
  used = metrics.bytes_per_parameter(params, opt_state, transformer.is_block_kernel)
  summary = {
    "validation_loss": validation,
    "diverged_at_step": diverged,
    "bytes_per_parameter": used._asdict() | {"total": used.total},
    "tokens_per_second": throughput.tokens_per_second,
    "tokens": done * config.batch_size * config.length,
    "seconds": time.perf_counter() - started,
    "config": config.to_dict(),
    "corpus": text.manifest,
    **describe_machine(),
  }
  (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
  metrics.plot_losses({config.method: log}, folder / "loss.png")
  logging.info("metrics, summary and loss curve are in %s", folder)
  print(closing_table(summary), flush=True)
  return summary
