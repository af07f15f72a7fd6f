"""train: one pretraining run from a config, from reading the text to the closing table."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

import eco_optax as eco
from eco_optax.interop import hugging_face
from eco_optax.training import checkpoints, jobs, memory, methods, metrics, report, sharding
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline, shards
from eco_optax.training.models import transformer


def prepare(config: ml_collections.ConfigDict) -> tuple[Any, Mesh]:
  """The optimizer and the mesh of a config that has been found in order.

  Raises:
    ValueError: naming the keys that are out of order, before anything is computed.
  """
  config_lib.validate(config)
  if config.init_from:
    hugging_face.check_config(config.init_from, config_lib.model(config))
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


def load_data(config: ml_collections.ConfigDict) -> shards.Dataset:
  """The tokens that a run reads.

  Raises:
    ValueError: if they are not what was prepared, or not for this model.
  """
  if not config.data.path:
    data = corpus.standard_library_dataset()
  else:
    data = shards.load(config.data.path, config.data.verify)
  if data.vocabulary > config.model.vocabulary:
    raise ValueError(
      f"config: model.vocabulary {config.model.vocabulary} is less than the {data.vocabulary}"
      f" tokens of the data's tokenizer: set it to {data.vocabulary} or more"
    )
  if config.model.separator not in (-1, data.separator):
    raise ValueError(
      f"config: model.separator {config.model.separator} is not the data's, which is"
      f" {data.separator}; -1 lets attention cross documents"
    )
  return data


def evaluate(
  loss: Any, params: Any, windows: Any, batch_size: int, mesh: Mesh, limit: int | None = None
) -> float:
  """Mean loss over the targets of the first `limit` batches of validation windows, or of all."""
  count = pipeline.batch_count(windows, batch_size)
  split = sharding.batch_sharding(mesh)
  sums = [
    jax.device_get(loss(params, pipeline.batch(windows, i, batch_size, split)))
    for i in range(count if limit is None else min(limit, count))
  ]
  # Summed here in float64, in an order that does not depend on the devices.
  nats, targets = (np.concatenate(x).sum(dtype=np.float64) for x in zip(*sums, strict=True))
  return float(nats / max(targets, 1))


class Bad(NamedTuple):
  """What was not finite in a step."""

  row: int  # Number of the step's row of metrics.
  what: str
  is_undone: bool  # Whether the step left weights and moments as they were.


def first_bad(rows: list[dict[str, Any]], state: step_lib.State) -> Bad | None:
  """The first row whose weights are not finite, or else whose gradient is not; None if all are."""
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  flat = jax.tree_util.tree_flatten_with_path(state.params, is_leaf=is_packed)[0]
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  for i, row in enumerate(rows):
    if (leaf := int(row["bad_weight"])) >= 0:
      return Bad(i, f"an update too large for the weights, first of {names[leaf]},", False)
  for i, row in enumerate(rows):
    if not metrics.is_finite(row["loss"], row["grad_norm"]):
      leaf = int(row["bad_leaf"])
      where = f", first in the gradient of {names[leaf]}," if leaf >= 0 else ""
      return Bad(i, f"loss {row['loss']} and gradient norm {row['grad_norm']}{where}", True)
  return None


def report_bad(
  config: ml_collections.ConfigDict, step: int, what: str, is_undone: bool = True
) -> str:
  """A line on what is not finite, or an error where the run has to stop.

  Raises:
    FloatingPointError: naming the step, where `config.nonfinite` is "stop", or "skip" and the step
      cannot be undone.
  """
  line = f"{what} at step {step} with method {config.method!r}"
  if config.nonfinite == "stop" or not (is_undone or config.nonfinite == "record"):
    raise FloatingPointError(
      f"{line}: lower config.optimizer.learning_rate, or set config.nonfinite to 'skip' or"
      " 'record'; what is saved is from before that step"
    )
  return f"{line}: {config.nonfinite}"


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Pretrains a model, or goes on with it where its last checkpoint is.

  Args:
    config: of the run, such as that of configs/stdlib_1m.py.
    workdir: folder of this run alone, made if need be: run.json, metrics.jsonl, checkpoints, and
      in the end summary.json and loss.png.

  Returns:
    The summary, see `report.summarize`.

  Raises:
    ValueError: for a config, data or checkpoint that does not fit, before any step.
    BlockingIOError: if another run has the folder.
    OSError: if a checkpoint cannot be written, or none of those there can be read.
    FloatingPointError: naming the step and the leaf, where a loss or a gradient is not finite and
      `config.nonfinite` is "stop"; nothing of that step is saved.
    SystemExit: with code 0 after SIGTERM, once all is saved.
  """
  tx, mesh = prepare(config)
  folder, is_main = pathlib.Path(workdir), jax.process_index() == 0  # Of several only one writes.
  show = lambda text: print(text, flush=True) if is_main else None
  with contextlib.ExitStack() as held:
    if is_main:
      held.enter_context(jobs.only_one(folder))
    is_asked_to_stop = held.enter_context(jobs.until_sigterm())
    held.enter_context(jax.set_mesh(mesh))

    data = load_data(config)
    windows = pipeline.train_windows(data.train, config.length, config.seed)
    held_out = pipeline.validation_windows(data.validation, config.length)
    pipeline.batch_count(held_out, config.batch_size)

    target = step_lib.abstract_state(config, tx, mesh)
    store = saved = None
    if config.checkpoint.every:
      where = config.checkpoint.folder or folder / "checkpoints"
      store = held.enter_context(checkpoints.manager(where, config.checkpoint.keep))
      saved = checkpoints.restore(store, target, config, data.manifest)
    step = saved.step if saved else 0
    state = saved.state if saved else step_lib.init_state(config, tx, mesh)
    clock = metrics.Clock(config.batch_size * config.length, saved.clock if saved else None)

    run, log = report.describe_run(config, state, data.manifest), folder / "metrics.jsonl"
    if is_main:
      metrics.cut_metrics(log, step)
      metrics.write_whole(folder / "run.json", json.dumps(run, indent=2) + "\n")
    events = None
    if config.tensorboard and is_main:
      events = held.enter_context(metrics.tensorboard(folder / "tensorboard", log))

    def record(step: int, **values: float) -> None:
      if is_main:
        metrics.append_metrics(log, step, **values)
        if events:
          events(step, **values)

    def save(validation_loss: float | None) -> None:
      checkpoints.save(
        store, step, state, config, data.manifest, run["versions"], clock.saved(), validation_loss
      )

    show(
      f"{config.method}: {transformer.count_params(config_lib.model(config)):,} non-embedding"
      f" parameters, {len(data.train):,} tokens of {data.manifest['source']},"
      f" {config.steps} steps of {config.batch_size} × {config.length} tokens"
      f" on {mesh.size} {jax.devices()[0].device_kind} device{'s' if mesh.size > 1 else ''}"
      + (f", from step {step}" if step else "")
    )
    schedule = methods.schedule(config)
    train_step = step_lib.make_train_step(config, tx, mesh)
    loss = step_lib.make_eval_step(config)
    batches = pipeline.batches(windows, step, config.batch_size, sharding.batch_sharding(mesh))
    unread, is_first = [], True
    while step < config.steps:
      state, result = train_step(state, next(batches))
      unread.append(result)
      step += 1
      if is_first:
        jax.block_until_ready(result)  # The first step compiles, so the clock starts behind it.
        clock.resume(step)
        is_first = False
      is_last, stops = step == config.steps, is_asked_to_stop(step)
      evaluates = is_last or step % config.evaluate_every == 0
      logs = evaluates or step % config.log_every == 0
      saves = store is not None and (is_last or stops or step % config.checkpoint.every == 0)
      if not (logs or saves or stops):
        continue
      # All at once, because reading each step would stall the next.
      rows = jax.device_get(unread)
      unread = []
      clock.pause(step)
      speed, rate = clock.tokens_per_second, float(schedule(step - 1))
      timing = {"tokens_per_second": speed, "seconds": clock.seconds}
      if bad := first_bad(rows, state):
        at = step - len(rows) + 1 + bad.row
        show(report_bad(config, at, bad.what, bad.is_undone))
        if config.nonfinite == "record":
          record(at, **_shown(rows[bad.row]), diverged=True, **timing)
          break
      validation = None
      if logs:
        record(step, **_shown(rows[-1]), learning_rate=rate, **timing)
        show(report.progress_line(step, config, float(rows[-1]["loss"]), rate, speed))
      if evaluates:
        limit = None if is_last else config.evaluate_batches
        validation = evaluate(loss, state.params, held_out, config.batch_size, mesh, limit)
        record(step, validation_loss=validation)
        if not metrics.is_finite(validation):
          show(report_bad(config, step, f"validation loss {validation}"))
          if config.nonfinite == "record":
            record(step, diverged=True)
            break
      if saves:
        save(validation)
      if stops and not is_last:
        if store is not None:
          checkpoints.finish(store)
        show(
          f"asked to stop at step {step}: "
          + ("saved, the same command goes on" if store else "nothing saved, checkpoint.every is 0")
        )
        raise SystemExit(0)
      clock.resume(step)
    if store is not None:
      checkpoints.finish(store)
    if not is_main:
      return run
    summary = report.summarize(folder)
    show(report.closing_table(summary))
    return summary


def _shown(row: dict[str, Any]) -> dict[str, Any]:
  """What is recorded of a step."""
  return {name: value for name, value in row.items() if name not in ("bad_leaf", "bad_weight")}
