"""A prepared corpus on disk: tokens in memory-mapped arrays, and a manifest of what they are.

A folder holds `manifest.json`, the tokenizer's file if it has one, and each split's shards: `.npy`
files of uint16 or uint32, every document followed by the separator. A corpus that is not trained on
everywhere, such as a chat, has a `.mask.npy` of booleans beside each shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

VERSION = 1  # Of the layout; raised when an older reader would misread a newer corpus.
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


class TokenStream:
  """The tokens of one split, shard after shard, as if they were one array."""

  def __init__(self, shards: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None):
    """Takes arrays of tokens, and of booleans, whether each is trained on (None: all are)."""
    self._shards, self._masks = shards, masks
    self._ends = np.cumsum([len(shard) for shard in shards])

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` − 1, int32."""
    return self._slice(self._shards, start, stop).astype(np.int32)

  def read_mask(self, start: int, stop: int) -> np.ndarray | None:
    """Whether tokens `start` to `stop` − 1 are trained on, bool; None if all of the split are."""
    return None if self._masks is None else self._slice(self._masks, start, stop)

  def _slice(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    if not 0 <= start <= stop <= len(self):
      raise IndexError(f"tokens {start} to {stop} of {len(self)}")
    first = int(np.searchsorted(self._ends, start, side="right"))
    parts, at = [], start
    for array, end in zip(arrays[first:], self._ends[first:], strict=True):
      begin = int(end) - len(array)
      parts.append(array[at - begin : stop - begin])
      at = int(end)
      if at >= stop:
        break
    return np.concatenate(parts) if parts else arrays[0][:0]


class Dataset(NamedTuple):
  """What a run reads."""

  train: TokenStream
  validation: TokenStream
  vocabulary: int  # Every token is below it.
  separator: int  # The token behind each document.
  manifest: dict[str, Any]


def write(path: pathlib.Path, array: np.ndarray) -> str:
  """Writes an array as `.npy`, whole or not at all.

  Returns:
    The file's sha256.
  """
  new = path.with_name(path.name + ".new")
  with new.open("wb") as file:
    # np.save leaves the end of an array out, without an error, where a disk is full.
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).data)
    file.flush()
    os.fsync(file.fileno())
  digest = sha256(new)
  new.replace(path)
  return digest


def sha256(path: pathlib.Path) -> str:
  """Of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def load(folder: str | os.PathLike, verify: bool = True) -> Dataset:
  """Opens a prepared corpus; its tokens stay on disk until they are read.

  Args:
    folder: made by scripts/prepare_data.py.
    verify: whether to hold every file against its sha256 and every token against the vocabulary,
      which reads all of it once; sizes, dtypes and the manifest are always checked.

  Returns:
    The corpus.

  Raises:
    FileNotFoundError: if there is no corpus, or a file of it is missing.
    ValueError: if a file is not what was prepared, naming it.
  """
  folder = pathlib.Path(folder)
  manifest = _read_manifest(folder)
  tokenizer, vocabulary = manifest["tokenizer"], manifest["vocabulary"]
  if name := tokenizer.get("file"):
    _check_file(folder, name, tokenizer["sha256"], "the tokenizer that the shards were made with")
  streams = []
  for split in SPLITS:
    shards, masks = [], []
    for shard in manifest["splits"][split]["shards"]:
      if shard["largest"] >= vocabulary:
        raise ValueError(_wrong(folder / shard["file"], f"token {shard['largest']}", vocabulary))
      dtype = np.dtype(manifest["dtype"])
      tokens = _open(folder, shard["file"], dtype, shard["tokens"])
      shards.append(tokens)
      if verify:
        _check_file(folder, shard["file"], shard["sha256"], "what was prepared")
        if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
          raise ValueError(_wrong(folder / shard["file"], f"token {largest}", vocabulary))
      if name := shard.get("mask"):
        masks.append(_open(folder, name, np.dtype(bool), shard["tokens"]))
        if verify:
          _check_file(folder, name, shard["mask_sha256"], "what was prepared")
    if masks and len(masks) != len(shards):
      raise ValueError(f"{folder / MANIFEST}: only some shards of {split} have masks. {_AGAIN}")
    streams.append(TokenStream(shards, masks or None))
  return Dataset(streams[0], streams[1], vocabulary, manifest["separator"], manifest)


_AGAIN = "Prepare the corpus again with scripts/prepare_data.py, into an empty folder"


def _wrong(path: pathlib.Path, token: str, vocabulary: int) -> str:
  return f"{path} holds {token}, beyond the vocabulary of {vocabulary}. {_AGAIN}"


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / MANIFEST
  if not path.exists():
    raise FileNotFoundError(
      f"{folder} has no {MANIFEST}: it is not a prepared corpus, or its preparation has not come to"
      " its end. Run scripts/prepare_data.py with --output of this folder"
    )
  try:
    manifest = json.loads(path.read_text())
    version = manifest["version"]
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({error}). {_AGAIN}") from error
  if version != VERSION:
    raise ValueError(
      f"{path} has version {version}, and this eco_optax reads version {VERSION}. {_AGAIN}"
    )
  return manifest


def _check_file(folder: pathlib.Path, name: str, wanted: str, what: str) -> None:
  """Raises an error unless a file is there with the contents that the manifest says."""
  path = _inside(folder, name)
  if sha256(path) != wanted:
    raise ValueError(f"{path} is not {what}: its sha256 is not that of {MANIFEST}. {_AGAIN}")


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a file of the corpus; a manifest is data, and names nothing outside its folder."""
  if pathlib.PurePath(name).name != name:
    raise ValueError(f"{folder / MANIFEST} names {name!r}, which is not a file of its folder")
  path = folder / name
  if not path.is_file():
    raise FileNotFoundError(f"{path} is missing, and {MANIFEST} names it. {_AGAIN}")
  return path


def _open(folder: pathlib.Path, name: str, dtype: np.dtype, length: int) -> np.ndarray:
  """Memory-maps an array of a known dtype and length."""
  path = _inside(folder, name)
  try:
    # NumPy cannot map an empty array.
    array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(f"{path} is damaged or cut short ({error}). {_AGAIN}") from error
  if array.dtype != dtype or array.shape != (length,):
    raise ValueError(
      f"{path} holds {array.dtype} of shape {array.shape}, and {MANIFEST} says {dtype} of shape"
      f" ({length},). {_AGAIN}"
    )
  return array
