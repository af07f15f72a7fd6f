"""train: one pretraining run from a config, from reading the text to the closing table.

`train` is the loop. `open_run` comes before it, `at_boundary` at each log, evaluation and
checkpoint, and `close_run` after it.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from eco_optax.interop import hugging_face
from eco_optax.training import (
  activations,
  checkpoints,
  jobs,
  memory,
  methods,
  metrics,
  nonfinite,
  report,
  sharding,
)
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline, shards
from eco_optax.training.models import transformer


def prepare(
  config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None
) -> tuple[Any, Mesh]:
  """Validates a config and makes its optimizer and mesh.

  Args:
    config: of a run.
    devices: to run on; None takes all of them.

  Raises:
    ValueError: naming the keys that are out of order, before anything is computed.
  """
  config_lib.validate(config)
  if config.init_from:
    hugging_face.check_config(config.init_from, config_lib.model(config))
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  check_batch(config, mesh)
  methods.exchange(config, mesh)  # Raises where the mesh does not suit it.
  return methods.optimizer(config), mesh


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Raises `ValueError` if the devices of a mesh cannot share a batch evenly."""
  parts = mesh.size // mesh.shape["tensor"]
  if (config.batch_size // step_lib.accumulation(config, mesh)) % parts:
    raise ValueError(
      f"config: batch_size {config.batch_size} / accumulation {config.accumulation} is not a"
      f" multiple of the {parts} devices that the mesh splits sequences over"
    )
  if config.reduction_groups % parts:
    raise ValueError(
      f"config: reduction_groups {config.reduction_groups} is not a multiple of the {parts} devices"
      " that the mesh splits sequences over"
    )


def dry_run(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> str:
  """Describes a run by its config, its parameters and their bytes; allocates nothing."""
  tx, mesh = prepare(config, devices)
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
      "state, bytes per device",
      memory.plan(state),
      "",
      activations.plan(config, state, mesh),
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


class Run(NamedTuple):
  """An open run: its clock, and all that stays the same while it trains."""

  config: ml_collections.ConfigDict
  folder: pathlib.Path
  tx: Any
  mesh: Mesh
  data: shards.Dataset
  windows: Any  # To train on.
  held_out: Any  # To validate on.
  store: Any  # Of checkpoints; None if the run saves none.
  facts: dict[str, Any]  # See `report.describe_run`.
  clock: metrics.Clock
  is_asked_to_stop: Callable[[int], bool]
  # Of several processes only the first shows and records.
  show: Callable[[str], None]  # Prints a line.
  record: Callable[..., None]  # Writes metrics of a step: `record(step, loss=…)`.


def open_run(
  config: ml_collections.ConfigDict, folder: pathlib.Path, held: contextlib.ExitStack
) -> tuple[Run, step_lib.State, int]:
  """Opens everything a run holds, and restores its last checkpoint or draws its first state.

  Args:
    config: of the run.
    folder: of this run alone.
    held: closes lock, signal handler, mesh, checkpoints and events.

  Returns:
    The run, its state, and the number of steps it has made.
  """
  tx, mesh = prepare(config)
  is_main = jax.process_index() == 0
  if is_main:
    held.enter_context(jobs.only_one(folder))
  is_asked_to_stop = held.enter_context(jobs.until_sigterm())
  held.enter_context(jax.set_mesh(mesh))

  data = load_data(config)
  windows = pipeline.train_windows(data.train, config.length, config.seed)
  held_out = pipeline.validation_windows(data.validation, config.length)
  pipeline.batch_count(held_out, config.batch_size)  # Raises where they do not fill a batch.

  target = step_lib.abstract_state(config, tx, mesh)
  store = saved = None
  if config.checkpoint.every:
    where = config.checkpoint.folder or folder / "checkpoints"
    store = held.enter_context(checkpoints.manager(where, config.checkpoint.keep))
    saved = checkpoints.restore(store, target, config, data.manifest)
  step = saved.step if saved else 0
  state = saved.state if saved else step_lib.init_state(config, tx, mesh)
  clock = metrics.Clock(config.batch_size * config.length, saved.clock if saved else None)

  facts = report.describe_run(config, state, data.manifest)
  show, record = (lambda text: None), (lambda step, **values: None)
  if is_main:
    show = lambda text: print(text, flush=True)
    record = metrics.open_log(folder, step, facts, config.tensorboard, held)
  run = Run(
    config, folder, tx, mesh, data, windows, held_out, store, facts, clock, is_asked_to_stop,
    show, record,
  )  # fmt: skip
  return run, state, step


def opening_line(run: Run, step: int) -> str:
  """What a run trains, on what data and devices, and from which step."""
  config, devices = run.config, run.mesh.size
  return (
    f"{config.method}: {transformer.count_params(config_lib.model(config)):,} non-embedding"
    f" parameters, {len(run.data.train):,} tokens of {run.data.manifest['source']},"
    f" {config.steps} steps of {config.batch_size} × {config.length} tokens"
    f" on {devices} {jax.devices()[0].device_kind} device{'s' if devices > 1 else ''}"
    + (f", from step {step}" if step else "")
  )


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Pretrains a model, or goes on with it where its last checkpoint is.

  Args:
    config: of the run, for example from configs/stdlib_1m.py.
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
  with contextlib.ExitStack() as held:
    run, state, done = open_run(config, pathlib.Path(workdir), held)
    run.show(opening_line(run, done))
    train_step = step_lib.make_train_step(config, run.tx, run.mesh)
    eval_step = step_lib.make_eval_step(config)
    split = sharding.batch_sharding(run.mesh)
    batches = pipeline.batches(run.windows, done, config.batch_size, split)
    rows: list[Any] = []  # Metrics of the steps since the last boundary, still on the devices.
    for step in range(done + 1, config.steps + 1):
      state, row = train_step(state, next(batches))
      rows.append(row)
      if step == done + 1:
        jax.block_until_ready(row)  # The first step compiles; the clock starts after it.
        run.clock.resume(step)
      if due := what_is_due(config, step, run.is_asked_to_stop(step)):
        if not at_boundary(run, state, step, rows, due, eval_step):
          break
        rows = []
        run.clock.resume(step)
    return close_run(run)


def what_is_due(config: ml_collections.ConfigDict, step: int, is_asked_to_stop: bool) -> set[str]:
  """What has to be done after a step: "log", "evaluate", "save", "stop", or nothing."""
  is_last = step == config.steps
  due = set()
  if is_last or step % config.evaluate_every == 0:
    due |= {"evaluate", "log"}
  if step % config.log_every == 0:
    due.add("log")
  every = config.checkpoint.every
  if every and (is_last or is_asked_to_stop or step % every == 0):
    due.add("save")
  if is_asked_to_stop and not is_last:
    due.add("stop")
  return due


def at_boundary(
  run: Run, state: step_lib.State, step: int, rows: list[Any], due: set[str], eval_step: Any
) -> bool:
  """Logs, evaluates, saves and stops, in this order, as due after a step.

  Args:
    run: that pauses here.
    state: after the step.
    step: number of steps made.
    rows: metrics of the steps since the last boundary, on the devices.
    due: see `what_is_due`.
    eval_step: from `step.make_eval_step`.

  Returns:
    Whether the run goes on; not if it is recorded as diverged.

  Raises:
    FloatingPointError: see `nonfinite.report`.
    SystemExit: with code 0, if it is to stop.
  """
  config = run.config
  rows = jax.device_get(rows)  # All at once: to read each step would stall the next.
  run.clock.pause(step)  # The steps are over only now that their metrics are here.
  speed, rate = run.clock.tokens_per_second, float(methods.schedule(config)(step - 1))
  timing = {"tokens_per_second": speed, "seconds": run.clock.seconds}
  if bad := nonfinite.first(rows, state.params):
    at = step - len(rows) + 1 + bad.row
    run.show(nonfinite.report(config, at, bad.what, bad.is_undone))
    if config.nonfinite == "record":
      run.record(at, **shown(rows[bad.row]), diverged=True, **timing)
      return False
  if "log" in due:
    run.record(step, **shown(rows[-1]), learning_rate=rate, **timing)
    run.show(report.progress_line(step, config, float(rows[-1]["loss"]), rate, speed))
  validation = None
  if "evaluate" in due:
    is_last = step == config.steps
    limit = (config.evaluate_batches_at_end or None) if is_last else config.evaluate_batches
    validation = evaluate(eval_step, state.params, run.held_out, config.batch_size, run.mesh, limit)
    run.record(step, validation_loss=validation)
    if not metrics.is_finite(validation):
      run.show(nonfinite.report(config, step, f"validation loss {validation}"))
      if config.nonfinite == "record":
        run.record(step, diverged=True)
        return False
  if "save" in due:
    versions, saved = run.facts["versions"], run.clock.saved()
    checkpoints.save(run.store, step, state, config, run.data.manifest, versions, saved, validation)
  if "stop" in due:
    stop(run, step)
  return True


def stop(run: Run, step: int) -> None:
  """Ends the process with code 0, once the last checkpoint is whole."""
  how = "nothing saved, checkpoint.every is 0"
  if run.store is not None:
    checkpoints.finish(run.store)
    how = "saved, the same command goes on"
  run.show(f"asked to stop at step {step}: {how}")
  raise SystemExit(0)


def close_run(run: Run) -> dict[str, Any]:
  """Waits for the last checkpoint, then writes and shows the summary."""
  if run.store is not None:
    checkpoints.finish(run.store)
  if jax.process_index() != 0:
    return run.facts
  summary = report.summarize(run.folder)
  run.show(report.closing_table(summary))
  return summary


def shown(row: dict[str, Any]) -> dict[str, Any]:
  """The metrics of a step that are recorded."""
  return {name: value for name, value in row.items() if name not in ("bad_leaf", "bad_weight")}
