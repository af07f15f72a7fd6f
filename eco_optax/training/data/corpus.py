"""The Python standard library's own source as a corpus: real text that is on every machine."""

from __future__ import annotations

import ast
import functools
import hashlib
import pathlib
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from eco_optax.training.data import shards

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_VALIDATION_PERCENT = 5
_SHORTEST_ANSWER = 30  # Characters.


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


def docstring_chats(root: str | None = None) -> Iterator[str]:
  """Questions about the standard library and its docstrings as answers, one chat each.

  They are in the format of OpenAssistant-Guanaco, whose own chats have to be fetched: `### Human: …
  ### Assistant: …`.

  Args:
    root: as of `standard_library`.

  Yields:
    Chats in the order of files and of lines, each answer once.
  """
  folder, seen = pathlib.Path(root or sysconfig.get_path("stdlib")), set()
  for path in sorted(folder.rglob("*.py")):
    name = path.relative_to(folder)
    if _SKIPPED.intersection(name.parts):
      continue
    module = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    for qualified, node in _definitions(ast.parse(path.read_bytes()), module):
      answer = ast.get_docstring(node)
      if answer and len(answer) >= _SHORTEST_ANSWER and answer not in seen:
        seen.add(answer)
        yield f"### Human: What does {qualified} do?### Assistant: {answer}"


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Any]]:
  """Functions and classes with their qualified names."""
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      name = f"{prefix}.{node.name}"
      yield name, node
      yield from _definitions(node, name)


@functools.cache  # Studies start one run after another in a process.
def _installed_library() -> Corpus:
  return standard_library()


def standard_library_dataset(root: str | None = None) -> shards.Dataset:
  """The same as bytes, ready to train on: document, 0, document, 0, …, document.

  Args:
    root: as of `standard_library`.

  Returns:
    A dataset in memory.
  """
  text = standard_library(root) if root else _installed_library()
  join = lambda documents: shards.TokenStream([np.frombuffer(b"\0".join(documents), np.uint8)])
  return shards.Dataset(join(text.train), join(text.validation), 256, 0, dict(text.manifest))
