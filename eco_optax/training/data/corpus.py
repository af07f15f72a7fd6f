"""The Python standard library's own source as a corpus: real text that is on every machine."""

from __future__ import annotations

import hashlib
import pathlib
import platform
import sysconfig
import zlib
from typing import Any, NamedTuple

import numpy as np

from eco_optax.training.data import shards

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_VALIDATION_PERCENT = 5


class Corpus(NamedTuple):
  """Documents by split, and what they are."""

  train: list[bytes]
  validation: list[bytes]
  manifest: dict[str, Any]  # files, bytes, sha256 and python version


def standard_library(root: str | None = None) -> Corpus:
  """Reads every Python file of the standard library, tests apart.

  A file's split depends on a hash of its relative path only, so that it never changes sides.

  Args:
    root: another folder of Python files, in place of the standard library's.

  Returns:
    The documents in the order of their paths, and a manifest.

  Raises:
    FileNotFoundError: if the folder holds too little text for both splits.
  """
  folder = pathlib.Path(root or sysconfig.get_path("stdlib"))
  splits: dict[bool, list[bytes]] = {False: [], True: []}
  digest = hashlib.sha256()
  paths = sorted(
    (path.relative_to(folder).as_posix(), path)
    for path in folder.rglob("*.py")
    if not _SKIPPED.intersection(path.relative_to(folder).parts)
  )
  for name, path in paths:
    text = path.read_bytes()
    digest.update(name.encode() + b"\0" + text)
    splits[zlib.crc32(name.encode()) % 100 < _VALIDATION_PERCENT].append(text)
  if not all(any(documents) for documents in splits.values()):
    raise FileNotFoundError(
      f"{folder} holds too few Python files for a training and a validation split: install Python"
      " with its standard library's sources, or pass another root"
    )
  manifest = {
    "source": "Python standard library" if root is None else folder.name,
    "python": platform.python_version(),
    "files": len(paths),
    "train_bytes": sum(map(len, splits[False])),
    "validation_bytes": sum(map(len, splits[True])),
    "sha256": digest.hexdigest(),
    "tokenizer": {"kind": "bytes"},
  }
  return Corpus(splits[False], splits[True], manifest)


def standard_library_dataset(root: str | None = None) -> shards.Dataset:
  """The same as bytes, ready to train on: document, 0, document, 0, …, document.

  Args:
    root: as of `standard_library`.

  Returns:
    A dataset in memory.
  """
  text = standard_library(root)
  join = lambda documents: shards.TokenStream([np.frombuffer(b"\0".join(documents), np.uint8)])
  return shards.Dataset(join(text.train), join(text.validation), 256, 0, text.manifest)
