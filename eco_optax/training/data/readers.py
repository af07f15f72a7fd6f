"""Documents from files: each format is a function from one file to its documents, in order."""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from eco_optax.training.data import corpus, packages, shards


class Document(NamedTuple):
  """A text to train on."""

  text: str
  place: str  # Where it was read, for messages: a file and a line, row or member of it.
  # The characters that are trained on, from each start to before its stop, in order; None: all.
  spans: list[tuple[int, int]] | None = None


def find(patterns: Sequence[str]) -> list[pathlib.Path]:
  """The files that glob patterns match, each once, in the order of their paths.

  Args:
    patterns: such as "c4/*.json.gz"; `**` matches folders of any depth.

  Raises:
    FileNotFoundError: if a pattern matches no file, naming it.
  """
  paths = set()
  for pattern in patterns:
    # A name may hold what a pattern takes for its own.
    names = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
    files = {os.path.abspath(name) for name in names if os.path.isfile(name)}
    if not files:
      raise FileNotFoundError(
        f"no file matches {pattern!r}: check the path, and quote a pattern so that the shell"
        " leaves it alone"
      )
    paths |= files
  return [pathlib.Path(path) for path in sorted(paths)]


def read(format: str, path: pathlib.Path, field: str = "text") -> Iterator[Document]:
  """The documents of one file; those without any text are left out.

  Args:
    format: a key of `FORMATS`.
    path: of the file.
    field: what holds the text, where the format has names: a key of JSON or a column of Parquet.

  Yields:
    Documents in the order of the file.

  Raises:
    FileNotFoundError: if there is no file.
    ImportError: if the format needs a package that is not installed.
    ValueError: if the file is not what its format says, naming the line and the remedy.
  """
  if path.is_file() and not path.stat().st_size:
    raise ValueError(f"{path} is empty: fetch or write it again, or leave it out")
  count = 0
  for document in FORMATS[format].read(path, field):
    try:
      document.text.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{document.place}: character {error.start} is half of a surrogate pair, which no text may"
        " hold: write the whole pair, or leave the document out"
      ) from error
    if document.text:
      count += 1
      yield document
  if not count:
    raise ValueError(f"{path} holds no text: check its format, or leave it out")


def fingerprint(format: str, path: pathlib.Path) -> str:
  """The sha256 of all that `read` reads."""
  if format == "stdlib":
    return corpus.standard_library(str(path)).manifest["sha256"]
  return shards.sha256(path)


def need(module: str, what: str, extra: str = "data") -> Any:
  """Imports a module of an extra.

  Raises:
    ImportError: if it is not installed, naming the remedy.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition(".")[0]
    raise ImportError(f"{what} needs {package}: pip install 'eco_optax[{extra}]'") from error


def _decode(data: bytes, place: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{place}: byte {error.start} is 0x{data[error.start]:02x}, which is not UTF-8"
      f" ({error.reason}): convert the file to UTF-8, as iconv does, or fetch it again"
    ) from error


def _lines(path: pathlib.Path, _: str) -> Iterator[Document]:
  """Each line that is not blank, without its end, of a file that may be gzipped."""
  number = 0
  open_binary: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
  try:
    with open_binary(path, "rb") as file:
      for number, line in enumerate(file, 1):
        place = f"{path}, line {number}"
        text = _decode(line, place).rstrip("\r\n")
        if text.strip():
          yield Document(text, place)
  except EOFError as error:
    raise ValueError(
      f"{path} is cut short: its gzip stream ends after line {number}. Fetch it again"
    ) from error
  except (gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f"{path} is not gzip, or is damaged, after line {number} ({error}): fetch it again, or name"
      " it without .gz if it is not compressed"
    ) from error


def _json_lines(path: pathlib.Path, field: str) -> Iterator[Document]:
  """The field of one JSON object per line."""
  for line, place, _ in _lines(path, field):
    try:
      row = json.loads(line)
    except ValueError as error:
      raise ValueError(
        f"{place} is not JSON ({error}): a file holds one object per line; mend the line, or fetch"
        " the file again"
      ) from error
    if not isinstance(row, dict):
      raise ValueError(f"{place} is {type(row).__name__}, not an object with the key {field!r}")
    if field not in row:
      raise ValueError(
        f"{place} has no key {field!r}, only {', '.join(map(repr, row)) or 'none'}: name the one"
        " that holds the text with --field"
      )
    if not isinstance(row[field], str):
      raise ValueError(
        f"{place}: {field!r} is {type(row[field]).__name__}, not a string: name another key with"
        " --field, or mend the line"
      )
    yield Document(row[field], place)


_TURN = re.compile(r"### (Human|Assistant):")


def _chats(path: pathlib.Path, field: str) -> Iterator[Document]:
  """Conversations whose turns begin with `### Human:` or `### Assistant:`, which is trained on."""
  for text, place, _ in _json_lines(path, field):
    turns = list(_TURN.finditer(text))
    stops = [turn.start() for turn in turns[1:]] + [len(text)]
    spans = [
      (turn.end(), stop) for turn, stop in zip(turns, stops, strict=False) if turn[1] == "Assistant"
    ]
    if not spans:
      raise ValueError(
        f"{place} has no '### Assistant:', so nothing of it would be trained on: mend the line,"
        " leave it out, or use --format=c4 to train on all of the text"
      )
    yield Document(text, place, spans)


def _whole(path: pathlib.Path, _: str) -> Iterator[Document]:
  """The whole file as one document."""
  yield Document(_decode(path.read_bytes(), str(path)), str(path))


def _parquet(path: pathlib.Path, field: str) -> Iterator[Document]:
  """A column of Parquet, of which a few rows at a time are in memory."""
  parquet = need("pyarrow.parquet", "--format=parquet")
  again = "it is not Parquet, or is damaged or cut short: fetch it again"
  try:
    file = parquet.ParquetFile(path)
  except FileNotFoundError:
    raise
  except (ValueError, OSError) as error:
    raise ValueError(f"{path}: {again} ({error})") from error
  with file:
    if field not in (names := file.schema_arrow.names):
      raise ValueError(
        f"{path} has no column {field!r}, only {', '.join(map(repr, names))}: name the one that"
        " holds the text with --field"
      )
    count = 0
    batches = file.iter_batches(batch_size=1024, columns=[field])
    while True:
      try:
        batch = next(batches, None)
      except (ValueError, OSError) as error:
        raise ValueError(f"{path}, after row {count}: {again} ({error})") from error
      if batch is None:
        return
      for row, text in enumerate(batch.column(0).to_pylist(), count + 1):
        if not isinstance(text, str):
          raise ValueError(
            f"{path}, row {row}: {field!r} is {type(text).__name__}, not a string: name another"
            " column with --field, or mend the row"
          )
        yield Document(text, f"{path}, row {row}")
      count += len(batch)


def _standard_library(path: pathlib.Path, _: str) -> Iterator[Document]:
  """The files of the built-in corpus."""
  text = corpus.standard_library(str(path))
  for number, data in enumerate([*text.train, *text.validation], 1):
    place = f"{path}, file {number} of the standard library"
    yield Document(_decode(data, place), place)


def _packages(path: pathlib.Path, _: str) -> Iterator[Document]:
  """The texts of one archive of packages.py."""
  for text, place in packages.texts(path):
    yield Document(text, place)


class Format(NamedTuple):
  """How files are read."""

  read: Callable[[pathlib.Path, str], Iterable[Document]]
  masked: bool = False  # Whether documents have spans.


FORMATS = {
  "c4": Format(_json_lines),
  "lines": Format(_lines),
  "guanaco": Format(_chats, masked=True),
  "text": Format(_whole),
  "parquet": Format(_parquet),
  "stdlib": Format(_standard_library),
  "packages": Format(_packages),
}
