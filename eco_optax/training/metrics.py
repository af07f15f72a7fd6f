"""The files that a run writes as it goes, metrics.jsonl and TensorBoard events, and its clock."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TIMING = ("tokens_per_second", "seconds")  # The only metrics that differ between equal runs.


def append_metrics(path: pathlib.Path, step: int, **values: float) -> None:
  """Adds one JSON object as a line and puts it on disk, so that a run that dies has its metrics.

  Args:
    path: of the metrics file.
    step: that the values belong to.
    **values: numbers; a value that is not finite becomes null, because JSON has no NaN.
  """
  numbers = {name: float(value) for name, value in values.items()}
  row = {"step": step} | {n: x if math.isfinite(x) else None for n, x in numbers.items()}
  with path.open("a") as file:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics file; None where a number was not finite.

  A last line without its end, of a process that died while writing it, is left out.
  """
  return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def cut_metrics(path: pathlib.Path, step: int) -> None:
  """Drops the rows after a step, from which a run resumes; replaces the file atomically."""
  if not path.exists():
    return
  kept = [row for row in read_metrics(path) if row["step"] <= step]
  write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that it never holds anything but its old or its new text."""
  new = path.with_name(path.name + ".new")
  with new.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  new.replace(path)


@contextlib.contextmanager
def tensorboard(folder: pathlib.Path, log: pathlib.Path) -> Iterator[Callable[..., None]]:
  """Yields a function of step and metrics that writes TensorBoard events.

  They begin with the rows of the metrics file and hide what was written before, so that a run that
  died and goes on has neither gaps nor repeats.

  Args:
    folder: of the events.
    log: metrics file of the run, cut to where it goes on.

  Raises:
    ImportError: without tensorboardX, naming the remedy.
  """
  try:
    import tensorboardX
  except ImportError as error:
    raise ImportError(
      "config.tensorboard needs tensorboardX: pip install 'eco_optax[tensorboard]'"
    ) from error
  rows = read_metrics(log) if log.exists() else []
  suffix = f".from-{rows[-1]['step'] if rows else 0}"
  # Every 10 s: a viewer lags by that much, and a killed run loses no events, which are made again.
  with tensorboardX.SummaryWriter(
    str(folder), purge_step=0, flush_secs=10, filename_suffix=suffix
  ) as writer:

    def write(step: int, **values: float) -> None:
      for name, value in values.items():
        if value is not None:
          writer.add_scalar(name, float(value), step)

    for row in rows:
      write(**row)
    yield write


def open_log(
  folder: pathlib.Path,
  step: int,
  facts: Mapping[str, Any],
  with_tensorboard: bool,
  held: contextlib.ExitStack,
) -> Callable[..., None]:
  """Writes run.json, and cuts metrics.jsonl to the step from which a run goes on.

  Args:
    folder: of the run.
    step: number of steps it has made.
    facts: for run.json.
    with_tensorboard: whether to write TensorBoard events too.
    held: closes the events.

  Returns:
    A function of step and metrics that records them.
  """
  log = folder / "metrics.jsonl"
  cut_metrics(log, step)
  write_whole(folder / "run.json", json.dumps(facts, indent=2) + "\n")
  events = (
    held.enter_context(tensorboard(folder / "tensorboard", log)) if with_tensorboard else None
  )

  def record(step: int, **values: float) -> None:
    append_metrics(log, step, **values)
    if events:
      events(step, **values)

  return record


def clock(seconds: float) -> str:
  """Minutes and seconds, as a progress line shows them."""
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Clock:
  """Time of a run across restarts, and its tokens per second of training alone.

  Training is what happens between `resume` and `pause`: compiling, evaluating and saving are not.
  """

  def __init__(self, tokens_per_step: int, saved: Mapping[str, float] | None = None):
    self._tokens_per_step = tokens_per_step
    self._started = time.perf_counter()
    self._saved = {"seconds": 0.0, "timed_seconds": 0.0, "timed_steps": 0.0} | dict(saved or {})

  def resume(self, step: int) -> None:
    """Training goes on after `step` steps."""
    self._since_step, self._since = step, time.perf_counter()

  def pause(self, step: int) -> None:
    """Training pauses after `step` steps."""
    self._saved["timed_seconds"] += time.perf_counter() - self._since
    self._saved["timed_steps"] += step - self._since_step

  @property
  def seconds(self) -> float:
    """Since the run began, without the time lost when it died."""
    return self._saved["seconds"] + time.perf_counter() - self._started

  @property
  def tokens_per_second(self) -> float:
    """Mean so far; 0 before any step counted."""
    steps = self._saved["timed_steps"]
    return self._tokens_per_step * steps / self._saved["timed_seconds"] if steps else 0.0

  def saved(self) -> dict[str, float]:
    """The counters that another process needs to go on."""
    return self._saved | {"seconds": self.seconds}


def is_finite(*values: Any) -> bool:
  """Whether all scalars are finite."""
  return all(math.isfinite(float(value)) for value in values)
