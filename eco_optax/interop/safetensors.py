"""Folders of safetensors files, read as one dictionary of arrays and written shard by shard."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

#: Name of the file that says which tensor is in which file, if there are several.
INDEX = "model.safetensors.index.json"
#: The most that `write` puts in a file, if not told otherwise.
SHARD_BYTES = 2 << 30

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}


def read(folder: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a checkpoint, on disk until they are looked at.

  The safetensors package cannot hand out float8 as NumPy arrays; these can be, and any part of an
  array can be read without the rest.

  Args:
    folder: with a `model.safetensors.index.json`, or with `.safetensors` files alone.

  Returns:
    Read-only arrays by name, each a map of its part of a file.

  Raises:
    FileNotFoundError: if there are no such files, or one that the index names is missing.
    ValueError: if a file is damaged, or does not hold what the index says, naming it.

  Example:
    >>> import tempfile, numpy as np
    >>> from eco_optax.interop import safetensors
    >>> folder = tempfile.mkdtemp()
    >>> safetensors.write(folder, [("a", np.arange(3.0)), ("b", np.ones((2, 2), np.int8))])
    >>> safetensors.read(folder)["a"]
    memmap([0., 1., 2.])

  References:
    `Format of safetensors <https://github.com/huggingface/safetensors>`_.
  """
  folder = pathlib.Path(folder)
  index = folder / INDEX
  if index.exists():
    named = read_json(index.read_bytes(), index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
      raise ValueError(f"{index} is damaged (its weight_map names no files): fetch it again")
    files = sorted(set(named.values()))
    if missing := [name for name in files if not (folder / name).is_file()]:
      raise FileNotFoundError(
        f"{index} names {', '.join(missing)}, and {folder} lacks {'them' if missing[1:] else 'it'}:"
        " fetch the whole checkpoint"
      )
  else:
    named, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
      raise FileNotFoundError(
        f"{folder} has no {INDEX} and no .safetensors file: fetch the whole checkpoint, or save one"
        " of pytorch_model.bin files anew with transformers"
      )
  tensors: dict[str, np.ndarray] = {}
  for name in files:
    own = _read_file(folder / name)
    if twice := sorted(own.keys() & tensors.keys()):
      raise ValueError(f"{folder / name} has {twice[0]!r} a second time: take its folder apart")
    tensors |= own
  if named is not None and (lost := sorted(named.keys() - tensors.keys())):
    raise ValueError(f"{index} names {lost[0]!r}, which is in none of its files: fetch them again")
  return tensors


def read_json(raw: bytes, path: pathlib.Path) -> dict[str, Any]:
  """An object in JSON.

  Raises:
    ValueError: if it is none, naming the file that it is from.
  """
  try:
    found = json.loads(raw)
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} is damaged (it has no object in JSON): fetch it again")
  return found


def _read_file(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of one file: eight bytes of length, a header in JSON, and the data."""
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
      raise ValueError(f"{path} is no safetensors file, or not whole: fetch it again")
    header = read_json(file.read(length), path)
  header.pop("__metadata__", None)
  data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0)
  tensors = {}
  for name, entry in header.items():
    try:
      dtype, (start, end) = str(entry["dtype"]), map(int, entry["data_offsets"])
      shape = tuple(map(int, entry["shape"]))
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{path} is damaged ({name!r} is {entry!r}): fetch it again") from error
    if dtype not in _DTYPES:
      raise ValueError(f"{path}: {name!r} is of dtype {dtype}, not of {', '.join(_DTYPES)}")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if not (0 <= start <= end <= data.size and end - start == expected):
      raise ValueError(
        f"{path}: {name!r} of {expected} bytes is at {start} to {end} of {data.size}: the file is"
        " damaged or not whole, fetch it again"
      )
    tensors[name] = data[start:end].view(_DTYPES[dtype]).reshape(shape)
  return tensors


def write(
  folder: str | pathlib.Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a checkpoint, taking its tensors one by one and holding one shard of them at a time.

  Args:
    folder: that there is.
    tensors: names and arrays.
    shard_bytes: the most in a file, unless one tensor is larger. If all is in one file, that is
      `model.safetensors`; several have an index.

  Raises:
    ImportError: without the safetensors package.
  """
  try:
    from safetensors.numpy import save_file
  except ImportError as error:
    raise ImportError("writing checkpoints takes pip install 'eco_optax[interop]'") from error
  folder = pathlib.Path(folder)
  shards: list[list[str]] = []
  total, part = 0, dict[str, np.ndarray]()

  def flush() -> None:
    save_file(part, folder / f"{len(shards)}.partial", metadata={"format": "pt"})
    shards.append(list(part))
    part.clear()

  for name, x in tensors:
    x = np.asarray(x, order="C")
    if part and sum(y.nbytes for y in part.values()) + x.nbytes > shard_bytes:
      flush()
    part[name] = x
    total += x.nbytes
  flush()
  names = ["model.safetensors"]
  if len(shards) > 1:
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map = {x: name for name, held in zip(names, shards, strict=True) for x in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
  for i, name in enumerate(names):
    (folder / f"{i}.partial").rename(folder / name)
