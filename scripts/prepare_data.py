"""Prepares a corpus: python scripts/prepare_data.py --corpus=packages --output=data/packages.

Or from files: --format=c4 --input='c4/*.json.gz' --tokenizer=tokenizer.json --output=data/c4.

Files may be compressed with gzip, zstd, bzip2 or xz. Each counts once, however many paths lead to
it; files in --output and in other prepared corpora are no input.
"""

import pathlib
import time

from absl import flags

from eco_optax.training import jobs, metrics
from eco_optax.training.data import prepare, readers

_OUTPUT = jobs.define_path("output", None, "Folder of the prepared corpus.", required=True)
_CORPUS = flags.DEFINE_enum(
  "corpus",
  None,
  ["packages", "stdlib", "docstrings"],
  "One that needs no files, in place of --input.",
)
_KINDS = flags.DEFINE_list("kinds", [], "Of --corpus=packages: prose, code, or both.")
_CACHE = jobs.define_path("cache", "~/.cache/eco_optax", "Folder for downloads.")
_FORMAT = flags.DEFINE_enum(
  "format",
  None,
  [name for name in readers.FORMATS if name not in ("packages", "stdlib")],
  "Of the files.",
)
_INPUT = jobs.define_paths("input", "Files: paths or patterns, may be repeated.")
_VALIDATION = jobs.define_paths("validation", "Files of the validation split.")
_PERCENT = flags.DEFINE_float(
  "validation_percent", None, "Of the documents, chosen by hash, if there is no --validation: 2."
)
_FIELD = flags.DEFINE_string("field", "text", "Key of JSON or column of Parquet with the text.")
_TOKENIZER = jobs.define_path(
  "tokenizer",
  "bpe",
  "bytes, bpe (trained here), a SentencePiece .model, a tokenizer.json, or a GGUF file.",
)
_VOCABULARY = flags.DEFINE_integer("vocabulary", None, "Of --tokenizer=bpe: 4096.")
_SEPARATOR = flags.DEFINE_string("separator", None, "Piece behind documents, if not the usual one.")
_CHAT_TEMPLATE = flags.DEFINE_bool(
  "chat_template", False, "Write chats of --format=guanaco in the tokenizer's own chat template."
)
_SKIP_BAD = flags.DEFINE_bool(
  "skip_bad", False, "Leave out and count rows that are null or broken; without, an error."
)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes; the result does not depend on it.")


def _sources() -> tuple[list[prepare.Source], str, str]:
  """What the flags name: sources, their format, and what the corpus is called."""
  if _CORPUS.value is None:
    if _FORMAT.value is None:
      raise ValueError("--input needs --format; or use --corpus=packages or --corpus=stdlib")
    sources = prepare.from_files(_INPUT.value, _VALIDATION.value, _OUTPUT.value)
    files = "file" if len(sources) == 1 else "files"
    return sources, _FORMAT.value, f"{len(sources)} {_FORMAT.value} {files}"
  if _INPUT.value or _VALIDATION.value or _FORMAT.value:
    raise ValueError(f"--corpus={_CORPUS.value} has its own files: leave out --input and --format")
  if _CORPUS.value == "stdlib":
    sources = prepare.from_standard_library()
    return sources, "stdlib", sources[0].name
  cache, show = pathlib.Path(_CACHE.value), lambda text: print(text, flush=True)
  if _CORPUS.value == "docstrings":
    return prepare.from_docstrings(cache), "guanaco", "chats on Python's standard library"
  sources = prepare.from_packages(cache, _KINDS.value, show)
  return sources, "packages", " and ".join(_KINDS.value or ["prose", "code"]) + " of packages"


def main(_: list[str]) -> None:
  """Prepares the corpus, or goes on with it."""
  started = time.monotonic()
  if _VALIDATION.value and _PERCENT.value is not None:
    raise ValueError("--validation and --validation_percent exclude each other")
  if _KINDS.value and _CORPUS.value != "packages":
    raise ValueError("--kinds is of --corpus=packages alone")
  if _VOCABULARY.value is not None and _TOKENIZER.value != "bpe":
    raise ValueError("--vocabulary is of --tokenizer=bpe alone: other tokenizers have theirs")
  sources, format, name = _sources()
  manifest = prepare.prepare(
    _OUTPUT.value,
    sources,
    format=format,
    name=name,
    field=_FIELD.value,
    percent=2.0 if _PERCENT.value is None else _PERCENT.value,
    tokenizer=_TOKENIZER.value,
    vocabulary=4096 if _VOCABULARY.value is None else _VOCABULARY.value,
    separator=_SEPARATOR.value,
    chat_template=_CHAT_TEMPLATE.value,
    skip_bad=_SKIP_BAD.value,
    workers=_WORKERS.value,
  )
  seconds = time.monotonic() - started
  size = sum(split["bytes"] for split in manifest["splits"].values())
  print(prepare.table(manifest))
  print(f"{metrics.clock(seconds)} minutes, {size / 1e6 / seconds:.1f} MB/s")


if __name__ == "__main__":
  jobs.run(main)
