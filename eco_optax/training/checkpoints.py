"""Checkpoints of a run through Orbax: created atomically, checked bit by bit, never executed.

A checkpoint holds the state (codes, scales, moments, residuals, counters) and a record in JSON: the
step, the config, the data, versions, and a checksum of every array. The step is also the position
in the data, and together with the config's seed it is all that random numbers depend on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.step import State

# Of the layout; raised when an older reader would misread a newer checkpoint. Version 1 has kernels
# of shape (in, out), and later versions (out, in). Where a config asks for moments in few bits,
# version 2 stores moments of vectors in few bits too, version 3 stores them in float32. For other
# configs versions 2 and 3 are the same.
VERSION = 3

# Keys of a config that may change when a run resumes: its numbers depend on none of them.
FREE = (
  "mesh.",
  "replicated_limit_mib",
  "log_every",
  "evaluate_",
  "checkpoint.",
  "tensorboard",
  "nonfinite",
  "data.",  # Its contents are compared.
  "init_from",  # It was read once.
)


class Restored(NamedTuple):
  """A run as it was when it was saved."""

  step: int  # Steps that had been made.
  state: State
  clock: dict[str, float]  # From `metrics.Clock.saved`.


def _checksum(x: jax.Array) -> jax.Array:
  """Sum of every element's bits times an odd number of its place, modulo 2^32.

  A sum of integers does not depend on how the array is split over devices. One flipped bit changes
  it by a power of two below 2^32 times an odd number, which is never 0.
  """
  unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  # Neighbouring places get numbers that look unrelated, so that errors do not cancel.
  weight = (place * jnp.uint32(0x9E3779B9)) | jnp.uint32(1)
  return jnp.sum(bits * weight, dtype=jnp.uint32)


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return jax.tree.map(_checksum, arrays)


def checksums(state: Any) -> dict[str, int]:
  """A checksum of each array by its path, the same on any mesh."""
  # Of arrays, not of packed leaves, which no tree of sums may stand in for.
  flat = jax.tree_util.tree_flatten_with_path(state)[0]
  arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat}
  return {path: int(x) for path, x in jax.device_get(_checksums(arrays)).items()}


def manager(folder: str | os.PathLike, keep: int | None) -> ocp.CheckpointManager:
  """Opens a folder of checkpoints and keeps the latest `keep` of them and the best.

  The best is the one with the lowest `validation_loss` among those saved at an evaluation. Where
  `keep` is None they are only read, and nothing in the folder is changed.
  """
  if keep is None:
    with _explained(f"cannot read the checkpoints in {folder}"):
      return ocp.CheckpointManager(
        os.path.abspath(folder) if "://" not in str(folder) else folder,
        options=ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False),
        item_names=("state", "record"),
      )
  best = lambda metrics: metrics["validation_loss"]
  policies = [
    checkpoint_managers.LatestN(keep),
    checkpoint_managers.BestN(
      get_metric_fn=best, reverse=True, n=1, keep_checkpoints_without_metrics=False
    ),
  ]
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    cleanup_tmp_directories=True,  # Left by a process that died while saving.
  )
  with _explained(f"cannot use {folder} for checkpoints"):
    return ocp.CheckpointManager(
      os.path.abspath(folder) if "://" not in str(folder) else folder,
      options=options,
      item_names=("state", "record"),
    )


def _reason(error: BaseException) -> str:
  """The first line of an error's root cause, without its middle if it is long."""
  while error.__cause__:
    error = error.__cause__
  text = (str(error).strip() or repr(error)).splitlines()[0]
  # TensorStore names the file first and the reason last. 300 characters hold both for usual paths.
  return text if len(text) <= 300 else f"{text[:100]} … {text[-200:]}"


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  """Turns the many errors of file systems into one that says what to do."""
  try:
    yield
  except Exception as error:
    raise OSError(
      f"{what}: {_reason(error)}. Checkpoints saved before are as they were: make room or make the"
      " folder writable, then run the same command again"
    ) from error


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  state: State,
  config: ml_collections.ConfigDict,
  data: Mapping[str, Any],
  versions: Mapping[str, str],
  clock: Mapping[str, float],
  validation_loss: float | None = None,
) -> None:
  """Begins to write a checkpoint and returns once the state may be changed.

  Args:
    checkpoints: from `manager`.
    step: number of steps made.
    state: of the run.
    config: of the run.
    data: manifest of the data it reads.
    versions: of the packages in use.
    clock: from `metrics.Clock.saved`.
    validation_loss: by which the best checkpoint is chosen; None if it was not evaluated here.

  Raises:
    OSError: if this one, or one begun before, cannot be written; those finished are untouched.
  """
  record = {
    "version": VERSION,
    "step": step,
    "examples": step * config.batch_size,
    "clock": dict(clock),
    "config": config_lib.flat(config),
    "data": _digest(data),
    "versions": dict(versions),
    "checksums": checksums(state),
  }
  if (workers := step_lib.workers(state)) is not None:
    record["workers"] = workers
  record["sha256"] = _digest(record)
  with _explained(f"could not save step {step}, or the one before it, in {checkpoints.directory}"):
    checkpoints.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
      metrics=None if validation_loss is None else {"validation_loss": validation_loss},
    )


def finish(checkpoints: ocp.CheckpointManager) -> None:
  """Waits until every checkpoint begun is written.

  Raises:
    OSError: if one cannot be written.
  """
  with _explained(f"could not finish a checkpoint in {checkpoints.directory}"):
    checkpoints.wait_until_finished()
    checkpoints.check_for_errors()


def restore(
  checkpoints: ocp.CheckpointManager,
  target: State,
  config: ml_collections.ConfigDict,
  data: Mapping[str, Any],
  read_only: bool = False,
) -> Restored | None:
  """Restores the newest intact checkpoint onto the mesh of `target`, which may be any mesh.

  A warning names damaged checkpoints. They are renamed once an older one proves intact.

  Args:
    checkpoints: from `manager`.
    target: shapes, dtypes and shardings of the state, from `step.abstract_state`.
    config: of the run that is to continue.
    data: manifest of what it reads.
    read_only: whether damaged ones keep their names.

  Returns:
    The saved run; None if there is no checkpoint.

  Raises:
    ValueError: if the checkpoint is of another config, other data or a newer version, naming every
      difference.
    OSError: if there are checkpoints and all of them are damaged.
  """
  folder = pathlib.Path(str(checkpoints.directory))
  damaged: dict[int, str] = {}
  for step in sorted(checkpoints.all_steps(), reverse=True):
    record, reason = _attempt(lambda step=step: _read_record(folder, checkpoints, step))
    if record is not None:
      _check_same_run(record, config, data, f"{folder}/{step}")
      own = _of_workers(target, record.get("workers"), f"{folder}/{step}", read_only)
      state, reason = _attempt(
        lambda step=step, record=record, own=own: _read_state(checkpoints, step, record, own)
      )
      if state is not None:
        if not read_only:
          _set_aside(folder, checkpoints, damaged)
        return Restored(step, state, record["clock"])
    logging.warning("checkpoint %s/%d is damaged and left out: %s", folder, step, reason)
    damaged[step] = reason
  if damaged:
    raise OSError(
      f"every checkpoint in {folder} is damaged: "
      + "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
      + ". Copy one back from elsewhere, or delete the folder to begin anew"
    )
  return None


def _of_workers(target: Any, saved: int | None, where: str, read_only: bool) -> Any:
  """The target of a restore, for errors of as many devices as a checkpoint has.

  Raises:
    ValueError: if the run is to go on with another number.
  """
  now = step_lib.workers(target)
  if saved is None or saved == now:
    return target
  if not read_only:
    raise ValueError(
      f"{where} has the errors of {saved} devices, which exchange compressed gradients, and the"
      f" mesh has {now}: continue on {saved} devices, or begin another run with config.init_from of"
      " the exported weights"
    )
  # Nobody reads the errors; they are restored in their own shape, whole on each device.
  shapes = jax.eval_shape(lambda wire: eco.wire.on_workers(wire, saved), target.wire)
  whole = lambda x, old: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=NamedSharding(old.sharding.mesh, PartitionSpec())
  )
  return target._replace(wire=jax.tree.map(whole, shapes, target.wire))


def _attempt(read: Any) -> tuple[Any, str]:
  """The result of `read`, or None and the reason; all processes agree on which."""
  value, reason = None, ""
  try:
    value = read()
  except Exception as error:  # Orbax and TensorStore raise errors of many types for bad files.
    reason = _reason(error)
  if jax.process_count() > 1:
    good = multihost_utils.process_allgather(np.array(value is not None))
    if not good.all():
      return None, reason or "another process could not read it"
  return value, reason


def _read_record(folder: pathlib.Path, checkpoints: Any, step: int) -> dict[str, Any]:
  """The record of a checkpoint that has no links."""
  for path in (folder / str(step)).rglob("*"):
    if path.is_symlink():
      raise ValueError(f"{path.relative_to(folder)} is a link, and checkpoints have none")
  record = checkpoints.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
  record = record["record"]
  if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
    raise ValueError("its record is not what was written")
  return record


def _read_state(checkpoints: Any, step: int, record: dict[str, Any], target: State) -> State:
  """The state, if every array has its checksum."""
  restored = checkpoints.restore(
    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
  )
  found, wanted = checksums(restored["state"]), record["checksums"]
  wrong = [path for path in wanted if found.get(path) != wanted[path]]
  if wrong or found.keys() != wanted.keys():
    raise ValueError(f"{', '.join(wrong[:3]) or 'its list of arrays'} is not what was written")
  return restored["state"]


def _digest(record: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_same_run(
  record: Mapping[str, Any], config: ml_collections.ConfigDict, data: Mapping[str, Any], where: str
) -> None:
  """Raises `ValueError` naming all that differs."""
  moments = {record["config"].get(f"moments.{kind}", "float32") for kind in ("mu", "nu")}
  is_same = record["version"] == 2 and moments <= {"float32", "factored"}
  if record["version"] != VERSION and not is_same:
    raise ValueError(
      f"{where} has version {record['version']}, and this eco_optax reads version {VERSION}:"
      f" continue it with the eco_optax that wrote it ({record['versions'].get('eco_optax')}), or"
      " export it there (scripts/export.py) and start a new run from it (config.init_from)"
    )
  # JSON turns tuples into lists. A key that the record lacks is newer than it, and its default is
  # the behaviour from before.
  plain = lambda config: json.loads(json.dumps(config_lib.flat(config)))
  now, then = plain(config), plain(config_lib.defaults()) | record["config"]
  different = [
    f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
    for key in sorted(now.keys() | then.keys())
    if now.get(key) != then.get(key) and not key.startswith(FREE)
  ]
  if record["data"] != _digest(data):
    different.append(f"the data is not what it was, but now {json.dumps(data)[:200]}")
  if different:
    raise ValueError(
      f"{where} is of another run: {'; '.join(different)}. Continue it as it was, or use another"
      " workdir"
    )


def _set_aside(folder: pathlib.Path, checkpoints: Any, damaged: Mapping[int, str]) -> None:
  """Renames damaged checkpoints, so that their steps can be saved again and nothing is deleted."""
  if not damaged:
    return
  if jax.process_index() == 0:
    for step in damaged:
      (folder / str(step)).rename(folder / f"damaged-{step}-{time.time_ns()}")
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
  checkpoints.reload()
