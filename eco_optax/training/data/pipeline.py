"""Batches of byte tokens through Grain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import grain
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


def train_batches(
  documents: Sequence[bytes], batch_size: int, length: int, seed: int
) -> Iterator[np.ndarray]:
  """Endless shuffled batches.

  Args:
    documents: of the training split.
    batch_size: windows per batch.
    length: tokens per window that are trained on.
    seed: of the shuffle, a new one each epoch.

  Returns:
    A Grain iterator of int32 arrays of shape (batch_size, length + 1); its state is a few bytes.
  """
  return iter(
    grain.MapDataset.source(Windows(documents, length))
    .seed(seed)
    .shuffle()
    .repeat()
    .batch(batch_size, drop_remainder=True)
    .to_iter_dataset()
  )


def validation_batches(
  documents: Sequence[bytes], batch_size: int, length: int
) -> grain.MapDataset:
  """Batches that cover the validation split once, in order.

  Only the windows of a last batch that is not full are left out, so that all have one shape.

  Args:
    documents: of the validation split.
    batch_size: windows per batch.
    length: tokens per window.

  Returns:
    A sequence of int32 arrays of shape (batch_size, length + 1).
  """
  windows = Windows(documents, length)
  if len(windows) < batch_size:
    raise ValueError(f"{len(windows)} validation windows do not fill one batch of {batch_size}")
  return grain.MapDataset.source(windows).batch(batch_size, drop_remainder=True)
