"""Documents from files: each format is a function from one file to its documents, in order."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import fnmatch
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, cast

from eco_optax.training.data import corpus, packages, shards

_MARK = "\ufeff"  # A byte order mark, which editors on Windows and concatenation leave.


class Document(NamedTuple):
  """A text to train on."""

  text: str
  place: str  # Where it was read, for messages: a file and a line, row or member of it.
  # The characters that are trained on, from each start to before its stop, in order; None: all.
  spans: list[tuple[int, int]] | None = None
  ambiguous: str = ""  # Why its spans may be others than its writer meant.


class Tally:
  """What was left out of files, or is to be looked at: numbers, and the first of each kind."""

  def __init__(self, skip_bad: bool = False):
    """`skip_bad` counts rows that cannot be read; without it each is an error."""
    self._skip_bad = skip_bad
    self.counts: dict[str, int] = {}
    self.first: dict[str, str] = {}

  def add(self, kind: str, why: str, number: int = 1) -> None:
    """Counts something, if `number` is not 0."""
    if number:
      self.counts[kind] = self.counts.get(kind, 0) + number
      self.first.setdefault(kind, why)

  def bad(self, error: ValueError) -> None:
    """Raises or counts a row's fault."""
    if not self._skip_bad:
      raise ValueError(f"{error}; or --skip_bad leaves such rows out, and counts them") from error
    self.add("bad rows", str(error))


def find(
  patterns: Sequence[str], is_ours: Callable[[str], bool] = lambda path: False
) -> list[pathlib.Path]:
  """The files that glob patterns match, each once, in the order of their paths.

  A file that several paths lead to, by links or loops of folders, has the first of them that
  passes no link. A path to nothing readable is an error, so that no text is missing in silence.

  Args:
    patterns: such as "c4/*.json.gz"; `**` matches folders of any depth.
    is_ours: tells of a path whether it is output rather than input, and left out.

  Raises:
    FileNotFoundError: if a pattern matches no file, naming it.
    OSError: if what it matches cannot be read.
    ValueError: if what it matches is no file.
  """
  found = set()
  for pattern in patterns:
    literal = os.path.lexists(pattern)  # A name may hold what a pattern takes for its own.
    try:
      names = [pattern] if literal else list(_matches("", pattern.split("/")))
    except OSError as error:
      raise OSError(
        f"cannot read {error.filename}, which {pattern!r} takes in: {error.strerror}. Make it"
        " readable, or narrow the pattern"
      ) from error
    any_name = not literal and pattern.split("/")[-1].strip("*") == ""
    matched = [_absolute(name) for name in names if not (any_name and os.path.isdir(name))]
    paths = [path for path in matched if not is_ours(path)]
    if not paths:
      ours = " that is not in a prepared corpus or in --output" if matched else ""
      raise FileNotFoundError(
        f"no file matches {pattern!r}{ours}: check the path, and quote a pattern so that the shell"
        " leaves it alone"
      )
    for path in paths:
      _check_readable(path)
    found |= set(paths)
  files: dict[tuple[int, int], str] = {}
  for path in sorted(found, key=lambda path: (os.path.realpath(path) != path, path)):
    files.setdefault(identity(path), path)
  return [pathlib.Path(path) for path in sorted(files.values())]


def _absolute(path: str) -> str:
  """The whole path; `..` behind a link leads to where the link's target is."""
  full = os.path.abspath(path)
  return full if os.path.realpath(full) == os.path.realpath(path) else os.path.realpath(path)


def identity(path: str | os.PathLike) -> tuple[int, int]:
  """What all paths to one file or folder have in common."""
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _matches(folder: str, parts: Sequence[str]) -> Iterator[str]:
  """As `glob.glob`, but no folder's links are gone around, and what cannot be read is an error."""
  if not parts:
    yield folder
    return
  first, *rest = parts
  if first == "**":
    for inner in _folders(folder):
      yield from _matches(inner, rest or ["*"])
  elif not glob.has_magic(first):
    path = os.path.join(folder, first) if folder or first else "/"
    if os.path.lexists(path):
      yield from _matches(path, rest)
  elif os.path.isdir(folder or "."):
    for name in fnmatch.filter(os.listdir(folder or "."), first):
      if first.startswith(".") or not name.startswith("."):
        yield from _matches(os.path.join(folder, name), rest)


def _folders(top: str) -> Iterator[str]:
  """A folder and all in it that are not hidden, each once."""

  def fail(error: OSError) -> None:
    raise error

  seen = set()
  for folder, names, _ in os.walk(top or ".", followlinks=True, onerror=fail):
    if identity(folder) in seen:
      names.clear()
      continue
    seen.add(identity(folder))
    is_link = lambda name, folder=folder: os.path.islink(os.path.join(folder, name))
    names[:] = sorted(
      (name for name in names if not name.startswith(".")), key=lambda name: (is_link(name), name)
    )
    yield folder


def _check_readable(path: str) -> None:
  """Raises an error unless a path leads to a file that can be read, and read again."""
  if not os.path.exists(path):
    raise FileNotFoundError(f"{path} is a link to nothing: mend it, or leave it out")
  if os.path.isdir(path):
    raise ValueError(f"{path} is a folder: name the files in it, such as '{path}/*'")
  if not os.path.isfile(path):
    raise ValueError(
      f"{path} is a pipe or a device, and is read more than once: write it to a file first"
    )
  if not os.access(path, os.R_OK):
    raise PermissionError(f"{path} cannot be read: change its permissions, or leave it out")


def read(
  format: str, path: pathlib.Path, field: str = "text", tally: Tally | None = None
) -> Iterator[Document]:
  """The documents of one file; those without any text are left out.

  A byte order mark at the start of a line or of a document is no text.

  Args:
    format: a key of `FORMATS`.
    path: of the file.
    field: what holds the text, where the format has names: a key of JSON or a column of Parquet.
    tally: counts rows left out; without, the first row that cannot be read is an error.

  Yields:
    Documents in the order of the file.

  Raises:
    FileNotFoundError: if there is no file.
    ImportError: if the format needs a package that is not installed.
    ValueError: if the file is not what its format says, naming the line and the remedy.
  """
  tally = tally or Tally()
  find_spans = FORMATS[format].spans
  is_barren = True
  for row in _rows(format, path, field):
    try:
      if isinstance(row, ValueError):
        raise row
      text = _checked(row.text, row.place).removeprefix(_MARK)
      if not text.strip():
        tally.add("blank documents", row.place)
        continue
      document = Document(text, row.place, *(find_spans(text, row.place) if find_spans else ()))
    except ValueError as error:
      tally.bad(error)
      is_barren = False
      continue
    if document.ambiguous:
      tally.add("ambiguous chats", f"{document.place}: {document.ambiguous}")
    is_barren = False
    yield document
  if is_barren:
    tally.bad(ValueError(f"{path} holds no text: check its format, or leave it out"))


def _rows(format: str, path: pathlib.Path, field: str) -> Iterator[Document | ValueError]:
  if path.is_file() and not path.stat().st_size:
    return iter([ValueError(f"{path} is empty: fetch or write it again, or leave it out")])
  return iter(FORMATS[format].read(path, field))


def _checked(text: str, place: str) -> str:
  """The text, if it can be written."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{place}: character {error.start} is half of a surrogate pair, which no text may hold:"
      " write the whole pair, or leave the document out"
    ) from error
  return text


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
  """Text from UTF-8.

  Raises:
    ValueError: if it is something else, naming the byte.
  """
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{place}: byte {error.start} is 0x{data[error.start]:02x}, which is not UTF-8"
      f" ({error.reason}): convert the file to UTF-8, as iconv does, or fetch it again"
    ) from error
  if "\0" in text:  # UTF-16 of plain English is UTF-8 too, but for these.
    raise ValueError(
      f"{place}: byte {data.index(0)} is 0x00, which no text file holds: it is UTF-16, which iconv"
      " converts to UTF-8, or no text"
    )
  return text


# What a file begins with: whatever its name is, these say what it is.
_COMPRESSED = {
  b"\x1f\x8b": "gzip",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"BZh": "bzip2",
  b"\xfd7zXZ\0": "xz",
}
_REFUSED = {
  codecs.BOM_UTF32_LE: "UTF-32: convert it, as with iconv -f UTF-32 -t UTF-8",
  codecs.BOM_UTF32_BE: "UTF-32: convert it, as with iconv -f UTF-32 -t UTF-8",
  codecs.BOM_UTF16_LE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
  codecs.BOM_UTF16_BE: "UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8",
  b"PAR1": "Parquet: use --format=parquet",
  b"PK\x03\x04": "a ZIP archive: unpack it",
}


def _unpacked(raw: BinaryIO, compression: str) -> BinaryIO:
  if compression == "zstd":
    arrow: Any = need("pyarrow", "a file in zstd")
    return cast(BinaryIO, io.BufferedReader(arrow.input_stream(raw, compression="zstd")))
  return cast(BinaryIO, {"gzip": gzip, "bzip2": bz2, "xz": lzma}[compression].open(raw))


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[BinaryIO]:
  """The bytes of a text file, unpacked if it is compressed, which its first bytes say.

  Raises:
    ValueError: if it is damaged or cut short, or in an encoding or format of another name.
  """
  compression = ""
  with path.open("rb") as raw:
    head = raw.peek(6)
    try:
      file: Any = raw
      for magic, compression in _COMPRESSED.items():
        if head.startswith(magic):
          file = _unpacked(raw, compression)
          head = file.peek(6)
          break
      for magic, what in _REFUSED.items():
        if head.startswith(magic):
          raise ValueError(f"{path} is {what}")
      yield file
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
      if file is raw:
        raise
      raise ValueError(
        f"{path} is cut short or damaged: its {compression} stream ends in {error}. Fetch it again"
      ) from error


def _lines(path: pathlib.Path, _: str) -> Iterator[Document | ValueError]:
  r"""Each line that is not blank, without its end, which is \n, \r\n or \r, of a text file."""
  with _open(path) as file, io.TextIOWrapper(file, "utf-8", "surrogateescape") as lines:
    for number, line in enumerate(lines, 1):
      place = f"{path}, line {number}"
      try:
        text = _decode(line.encode("utf-8", "surrogateescape"), place).removesuffix("\n")
      except ValueError as error:
        yield error
        continue
      text = text.removeprefix(_MARK)
      if text.strip():
        yield Document(text, place)


def _json_lines(path: pathlib.Path, field: str) -> Iterator[Document | ValueError]:
  """The field of one JSON object per line."""
  for line in _lines(path, field):
    if isinstance(line, ValueError):
      yield line
      continue
    try:
      yield Document(_field(line.text, line.place, field), line.place)
    except ValueError as error:
      yield error


def _field(line: str, place: str, field: str) -> str:
  try:
    row = json.loads(line)
  except RecursionError as error:
    raise ValueError(f"{place} is nested too deeply to be read: mend the line") from error
  except ValueError as error:
    raise ValueError(
      f"{place} is not JSON ({error}): a file holds one object per line; mend the line, or fetch"
      " the file again"
    ) from error
  if not isinstance(row, dict):
    raise ValueError(f"{place} is {type(row).__name__}, not an object with the key {field!r}")
  if field not in row:
    raise ValueError(
      f"{place} has no key {field!r}, only {_listed(row)}: name the one that holds the text with"
      " --field"
    )
  return _string(row[field], place, field)


def _listed(names: Iterable[str]) -> str:
  """Some names, so that a line of a message stays one."""
  names = list(map(repr, names))
  return ", ".join(names[:20] + (["…"] if len(names) > 20 else [])) or "none"


def _string(value: Any, place: str, field: str) -> str:
  if not isinstance(value, str):
    what = "null" if value is None else f"{type(value).__name__}, not a string"
    raise ValueError(f"{place}: {field!r} is {what}: name another with --field, or mend the row")
  return value


_MARKS = r"### (?:Human|Assistant):"
_OPENED = r"(?<![^\s:(\[])"  # What may be before a quotation mark that opens.
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}
_QUOTED = "|".join(f"{x}{_MARKS}[^\\n{y}]*{y}" for x, y in _QUOTES.items())
_TURN = re.compile(rf"{_OPENED}(?:{_QUOTED})|### (Human|Assistant):")
_UNCLOSED = re.compile(f"{_OPENED}[{''.join(_QUOTES)}]")


def _replies(text: str, place: str) -> tuple[list[tuple[int, int]], str]:
  """The parts of a chat that are trained on, and a doubt about them, if there is one.

  A turn begins with `### Human:` or `### Assistant:`, and replies are trained on. Marks between
  quotation marks, on one line and right after the first, are quoted. All others begin a turn, as
  nothing in the format tells whether one is quoted otherwise.
  """
  turns = [match for match in _TURN.finditer(text) if match[1]]
  stops = [turn.start() for turn in turns[1:]] + [len(text)]
  spans = [
    (turn.end(), stop) for turn, stop in zip(turns, stops, strict=False) if turn[1] == "Assistant"
  ]
  if not spans:
    raise ValueError(
      f"{place} has no '### Assistant:', so nothing of it would be trained on: mend the line,"
      " leave it out, or use --format=c4 to train on all of the text"
    )
  before = [text[turn.start() - 1] for turn in turns[1:]]
  doubts = {
    "a turn follows one of the same speaker": any(
      x[1] == y[1] for x, y in itertools.pairwise(turns)
    ),
    "a quotation mark is before a turn": any(
      _UNCLOSED.match(text, turn.start() - 1) for turn in turns[1:]
    ),
    "some turns begin a line, and some do not": len({x in "\r\n" for x in before}) > 1,
    "a turn begins in a block of code": any(text.count("```", 0, stop) % 2 for stop in stops[:-1]),
    "the last turn is not the assistant's": turns[-1][1] != "Assistant",
  }
  return spans, next((doubt for doubt, is_so in doubts.items() if is_so), "")


def messages(document: Document) -> list[dict[str, str]]:
  """The turns of a chat in Guanaco's format, as a model's own template takes them.

  Raises:
    ValueError: if something is before the first turn.
  """
  turns = [match for match in _TURN.finditer(document.text) if match[1]]
  if document.text[: turns[0].start()].strip():
    raise ValueError(f"{document.place} has text before its first turn: mend the line")
  stops = [turn.start() for turn in turns[1:]] + [len(document.text)]
  return [
    {
      "role": "assistant" if turn[1] == "Assistant" else "user",
      "content": document.text[turn.end() : stop].strip(),
    }
    for turn, stop in zip(turns, stops, strict=True)
  ]


def _whole(path: pathlib.Path, _: str) -> Iterator[Document | ValueError]:
  """The whole file as one document."""
  with _open(path) as file:
    data = file.read()
  try:
    yield Document(_decode(data, str(path)), str(path))
  except ValueError as error:
    yield error


def _parquet(path: pathlib.Path, field: str) -> Iterator[Document | ValueError]:
  """A column of Parquet, with a few rows at a time in memory."""
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
        f"{path} has no column {field!r}, only {_listed(names)}: name the one that"
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
      for row, value in enumerate(batch.column(0), count + 1):
        place = f"{path}, row {row}"
        try:
          yield Document(_string(value.as_py(), place, field), place)
        except UnicodeDecodeError as error:
          yield ValueError(f"{place}: {field!r} is not UTF-8 ({error.reason}): mend the row")
        except ValueError as error:
          yield error
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

  # Takes a path and a field. A row that is bad is its error; one that ends the file is raised.
  read: Callable[[pathlib.Path, str], Iterable[Document | ValueError]]
  # Takes a text and its place. Returns `Document.spans` and `Document.ambiguous`; None: all of it.
  spans: Callable[[str, str], tuple[list[tuple[int, int]], str]] | None = None


FORMATS = {
  "c4": Format(_json_lines),
  "lines": Format(_lines),
  "guanaco": Format(_json_lines, _replies),
  "text": Format(_whole),
  "parquet": Format(_parquet),
  "stdlib": Format(_standard_library),
  "packages": Format(_packages),
}
