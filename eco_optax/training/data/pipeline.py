"""Batches of tokens through Grain.

A run's position in its data is its step: step i with batches of B takes examples i·B to
i·B + B − 1 of an endless sequence, whatever machines read them. So there is no other state to save,
and a run goes on with the right next example on any number of hosts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from eco_optax.training.data.shards import TokenStream

_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)  # Batches read ahead.


class Batch(NamedTuple):
  """What a step trains on, or one example of it without the leading axis."""

  tokens: Any  # int32 (B, L + 1): inputs are all but the last, targets all but the first.
  weights: Any = None  # float32 (B, L), of each target in the loss; None weighs all the same.


class Windows:
  """Consecutive windows of `length + 1` tokens, each starting on the last token of the one before.

  So every token but the first is a target exactly once.
  """

  def __init__(self, stream: TokenStream, length: int):
    self._stream, self._length = stream, length
    if len(self) < 1:
      raise ValueError(
        f"{len(stream)} tokens do not fill one window of {length} + 1: use a shorter length"
      )

  def __len__(self) -> int:
    return (len(self._stream) - 1) // self._length

  def __getitem__(self, index: int) -> Batch:
    start = int(index) * self._length
    stop = start + self._length + 1
    mask = self._stream.read_mask(start + 1, stop)
    weights = None if mask is None else mask.astype(np.float32)
    return Batch(self._stream.read(start, stop), weights)


def train_windows(stream: TokenStream, length: int, seed: int) -> grain.MapDataset:
  """The windows of the training split, shuffled anew each epoch, without end.

  Args:
    stream: of the training split.
    length: tokens per window that are trained on.
    seed: of the shuffle.

  Returns:
    A sequence of examples.
  """
  return grain.MapDataset.source(Windows(stream, length)).seed(seed).shuffle().repeat()


def validation_windows(stream: TokenStream, length: int) -> grain.MapDataset:
  """The windows of the validation split, once and in order."""
  return grain.MapDataset.source(Windows(stream, length))


class _Batches:
  """The rows of each batch that this process holds, by the batch's number."""

  def __init__(self, windows: grain.MapDataset, batch_size: int, rows: Sequence[int]):
    self._windows, self._batch_size, self._rows = windows, batch_size, rows

  def __len__(self) -> int:
    return len(self._windows) // self._batch_size

  def __getitem__(self, step: int) -> Batch:
    examples = [self._windows[int(step) * self._batch_size + row] for row in self._rows]
    return jax.tree.map(lambda *x: np.stack(x), *examples)


def _own_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """The rows of a batch that devices of this process hold."""
  parts = sharding.addressable_devices_indices_map((batch_size, 1)).values()
  return sorted({row for part in parts for row in range(batch_size)[(part or (slice(None),))[0]]})


def _assemble(
  own: Batch, rows: Sequence[int], batch_size: int, sharding: jax.sharding.Sharding
) -> Batch:
  """Arrays over all devices; this process gives its `rows`."""
  where = {row: i for i, row in enumerate(rows)}

  def whole(x: np.ndarray) -> jax.Array:
    def read(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None
      numbers = np.array([where[row] for row in range(batch_size)[index[0]]], int)
      return x[numbers][:, *index[1:]]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, read)

  return jax.tree.map(whole, own)


def batch(
  windows: grain.MapDataset, step: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Batch:
  """Batch number `step`, each process reading the rows of its own devices.

  Args:
    windows: of `train_windows` or `validation_windows`.
    step: number of the batch, from 0.
    batch_size: windows per batch, of all processes together.
    sharding: of the batch.

  Returns:
    A batch on all devices of the sharding.
  """
  rows = _own_rows(sharding, batch_size)
  return _assemble(_Batches(windows, batch_size, rows)[step], rows, batch_size, sharding)


def batches(
  windows: grain.MapDataset, start: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[Batch]:
  """Batches number `start`, `start` + 1, …, read ahead by threads; otherwise as `batch`."""
  rows = _own_rows(sharding, batch_size)
  source = grain.MapDataset.source(_Batches(windows, batch_size, rows))[start:]
  for own in source.to_iter_dataset(_READ):
    yield _assemble(own, rows, batch_size, sharding)


def batch_count(windows: grain.MapDataset, batch_size: int) -> int:
  """How many full batches there are; the windows of a last one that is not full are left out.

  Raises:
    ValueError: if there is none.
  """
  if len(windows) < batch_size:
    raise ValueError(
      f"{len(windows)} validation windows do not fill one batch of {batch_size}: use a smaller"
      " config.batch_size or a shorter config.length"
    )
  return len(windows) // batch_size
