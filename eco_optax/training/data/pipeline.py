"""Batches of byte tokens through Grain."""

from __future__ import annotations

from collections.abc import Sequence

import grain
import jax
import numpy as np

VOCABULARY = 256  # Bytes; 0 separates documents.


class Windows:
  """Consecutive windows of `length + 1` tokens, each starting on the last token of the one before.

  So every token but the first is a target exactly once.
  """

  def __init__(self, documents: Sequence[bytes], length: int):
    self._tokens = np.frombuffer(b"\0".join(documents), np.uint8)
    self._length = length
    if len(self) < 1:
      raise ValueError(
        f"{len(self._tokens)} tokens do not fill one window of {length} + 1: use a shorter length"
      )

  def __len__(self) -> int:
    return (len(self._tokens) - 1) // self._length

  def __getitem__(self, index: int) -> np.ndarray:
    start = int(index) * self._length
    return self._tokens[start : start + self._length + 1].astype(np.int32)


def train_windows(documents: Sequence[bytes], length: int, seed: int) -> grain.MapDataset:
  """The windows of the training split, shuffled anew each epoch, without end.

  Args:
    documents: of the training split.
    length: tokens per window that are trained on.
    seed: of the shuffle.

  Returns:
    A sequence of int32 arrays of shape (length + 1,). Step `i` of a run with batches of B takes
    items i·B … i·B + B − 1, so a step's number is all there is to know about the position.
  """
  return grain.MapDataset.source(Windows(documents, length)).seed(seed).shuffle().repeat()


def validation_windows(documents: Sequence[bytes], length: int) -> grain.MapDataset:
  """The windows of the validation split, once and in order; int32 of shape (length + 1,)."""
  return grain.MapDataset.source(Windows(documents, length))


def batch(
  windows: grain.MapDataset, step: int, batch_size: int, sharding: jax.sharding.Sharding
) -> jax.Array:
  """Batch number `step`, each process reading the rows of its own devices.

  Args:
    windows: of `train_windows` or `validation_windows`.
    step: number of the batch, from 0.
    batch_size: windows per batch, of all processes together.
    sharding: of the batch.

  Returns:
    int32 array of shape (batch_size, length + 1) on all devices of the sharding.
  """
  first = windows[step * batch_size]
  rows = {0: first}

  def read(index: tuple[slice, ...] | None) -> np.ndarray:
    wanted, columns = index or (slice(None), slice(None))
    numbers = range(*wanted.indices(batch_size))
    for row in numbers:
      if row not in rows:
        rows[row] = windows[step * batch_size + row]
    return np.stack([rows[row] for row in numbers])[:, columns]

  return jax.make_array_from_callback((batch_size, len(first)), sharding, read)


def batch_count(windows: grain.MapDataset, batch_size: int) -> int:
  """How many full batches there are; the windows of a last one that is not full are left out.

  Raises:
    ValueError: if there is not even one.
  """
  if len(windows) < batch_size:
    raise ValueError(
      f"{len(windows)} validation windows do not fill one batch of {batch_size}: use a smaller"
      " config.batch_size or a shorter config.length"
    )
  return len(windows) // batch_size
