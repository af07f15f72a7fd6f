"""Text to tokens and back: bytes, SentencePiece, a tokenizer.json, or a BPE of one's own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from eco_optax.interop import gguf, gguf_tokenizer
from eco_optax.training.data import chats, shards
from eco_optax.training.data.readers import need

_SEPARATORS = ("</s>", "<|endoftext|>", "<eos>", "[EOS]", "<|end_of_text|>")  # Looked for in order.
# What each kind's file is called in a prepared corpus.
FILES = {
  "sentencepiece": "tokenizer.model",
  "huggingface": "tokenizer.json",
  "bpe": "tokenizer.json",
}
SMALLEST_BPE = 257  # Bytes and the separator.


class Tokenizer(NamedTuple):
  """How a corpus became tokens."""

  encode: Callable[[str], np.ndarray]  # Tokens of a text, int64.
  # The same, and the character of the text at which each token starts, int64.
  encode_with_starts: Callable[[str], tuple[np.ndarray, np.ndarray]]
  decode: Callable[[Sequence[int]], str]
  vocabulary: int  # Every token is below it.
  separator: int  # The token behind each document, which no text is encoded to.
  unknown: int | None = None  # The token for whatever the vocabulary lacks, if there is one.
  is_lossless: bool = False  # Whether every text is known to come back from its tokens.
  chat: chats.Template | None = None  # Of its chats, whose special tokens `encode` knows.
  special: frozenset[str] = frozenset()  # Those that it knows.
  ends: tuple[int, ...] = ()  # Tokens that end what a model writes: the separator and a reply's.


class Losses:
  """Finds what a tokenizer loses of texts."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._is_dropped: dict[str, bool] = {}

  def unknown(self, tokens: np.ndarray) -> int:
    """Number of unknown tokens among those of a text."""
    token = self._tokenizer.unknown
    return 0 if token is None else int(np.count_nonzero(tokens == token))

  def dropped(self, text: str) -> dict[str, int]:
    """How often a text has each character that leaves no trace, and is no space."""
    if self._tokenizer.is_lossless:
      return {}
    characters = set(text)
    for character in characters - self._is_dropped.keys():
      self._is_dropped[character] = not character.isspace() and self._leaves_no_trace(character)
    return {x: text.count(x) for x in sorted(characters) if self._is_dropped[x]}

  def _leaves_no_trace(self, character: str) -> bool:
    """Whether a text's tokens are the same without it."""
    encode, decode = self._tokenizer.encode, self._tokenizer.decode
    try:
      if decode(encode(character).tolist()).strip():
        return False
      return encode(f"a{character}b").tolist() == encode("ab").tolist()
    except ValueError:  # It knows words alone, and not these.
      return False


def kind_of(name: str) -> str:
  """The kind of a tokenizer that is asked for by "bytes", by "bpe" or by its file.

  A GGUF file has to be a tokenizer.json first, see `from_gguf`.

  Raises:
    FileNotFoundError: if the file is missing.
    ValueError: if the name is of no kind.
  """
  if name in ("bytes", "bpe"):
    return name
  kinds = {".model": "sentencepiece", ".json": "huggingface"}
  kind = kinds.get(pathlib.Path(name).suffix)
  if kind is None:
    raise ValueError(
      f"tokenizer {name!r} is not 'bytes', 'bpe', a SentencePiece .model, a tokenizer.json or a"
      " .gguf"
    )
  if not os.path.isfile(name):
    raise FileNotFoundError(f"there is no tokenizer {name}: check the path")
  return kind


@contextlib.contextmanager
def from_gguf(name: str) -> Iterator[str]:
  """Yields the path of a tokenizer.json that has what a GGUF file has; any other name as it is.

  Raises:
    As `gguf_tokenizer.save`.
  """
  if not gguf.is_gguf(name):
    yield name
    return
  with tempfile.TemporaryDirectory() as folder:
    gguf_tokenizer.save(name, folder)
    yield os.path.join(folder, "tokenizer.json")


def describe(
  kind: str, path: pathlib.Path | None, separator: str | None = None, has_template: bool = False
) -> dict[str, Any]:
  """What a manifest says of a tokenizer, having read it.

  Args:
    kind: of `kind_of`.
    path: of its file, if it has one; a prepared corpus has it under the name that is returned.
    separator: the piece behind each document, if not the one that is found by itself.
    has_template: whether documents are chats in the template that is beside the file.

  Returns:
    What `load` needs, and the vocabulary's size.

  Raises:
    ImportError: if its package is not installed.
    ValueError: if its file cannot be read, or names no separator.
  """
  description: dict[str, Any] = {"kind": kind}
  if path is not None:
    description |= {"file": FILES[kind], "sha256": shards.sha256(path)}
  if separator is not None:
    description["separator"] = separator
  if has_template:
    if kind != "huggingface" or path is None:
      raise ValueError("--chat_template needs the tokenizer.json or the GGUF file of a chat model")
    description["chat"] = chats.beside(path)._asdict()
  tokenizer = _open(kind, path, separator, description.get("chat"))
  return description | {"vocabulary": tokenizer.vocabulary}


def load(folder: pathlib.Path, description: dict[str, Any]) -> Tokenizer:
  """The tokenizer of a prepared corpus.

  Args:
    folder: of the corpus.
    description: of the tokenizer in its manifest.

  Raises:
    As `describe`.
  """
  name = description.get("file")
  path = folder / name if name else None
  return _open(description["kind"], path, description.get("separator"), description.get("chat"))


def _open(
  kind: str, path: pathlib.Path | None, separator: str | None, chat: dict[str, str] | None = None
) -> Tokenizer:
  if path is None:
    tokenizer = _bytes()
  elif kind == "sentencepiece":
    tokenizer = _sentencepiece(path, separator)
  else:
    template = None if chat is None else chats.Template(**chat)
    tokenizer = _huggingface(path, separator, template)._replace(is_lossless=kind == "bpe")
  return tokenizer if tokenizer.ends else tokenizer._replace(ends=(tokenizer.separator,))


def _bytes() -> Tokenizer:
  encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int64)

  def encode_with_starts(text: str) -> tuple[np.ndarray, np.ndarray]:
    ids = encode(text)
    # In UTF-8 a byte of the form 10xxxxxx goes on with the character before it.
    return ids, np.cumsum(ids & 0xC0 != 0x80) - 1

  decode = lambda ids: bytes(np.asarray(ids).tolist()).decode(errors="replace")
  return Tokenizer(encode, encode_with_starts, decode, 256, 0, is_lossless=True)


def _bytes_in_json() -> str:
  """The tokenizer.json of bytes."""
  library = need("tokenizers", "a tokenizer of bytes for others to load")
  # Byte-level models write bytes as characters: printable ones unchanged, others from 256 on.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  vocabulary = {chr(byte): byte for byte in printable}
  vocabulary |= {chr(256 + i): byte for i, byte in enumerate(others)}
  model = library.Tokenizer(library.models.BPE(vocabulary, []))
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  model.decoder = library.decoders.ByteLevel()
  return model.to_str()


def _sentencepiece(path: pathlib.Path, separator: str | None) -> Tokenizer:
  library = need("sentencepiece", "a SentencePiece tokenizer")
  try:
    model = library.SentencePieceProcessor(model_proto=path.read_bytes())
  except (RuntimeError, TypeError) as error:
    raise ValueError(
      f"{path} is not a SentencePiece model, or is damaged ({error}): fetch it again"
    ) from error
  token = model.eos_id() if separator is None else model.piece_to_id(separator)
  if token < 0 or (separator is not None and model.id_to_piece(token) != separator):
    raise ValueError(
      f"{path} has no {separator or 'end-of-sentence piece'} to put behind each document: name"
      " another piece with --separator, one that texts do not hold"
    )

  def encode_with_starts(text: str) -> tuple[np.ndarray, np.ndarray]:
    pieces = model.encode(text, out_type="offset_mapping")
    starts = [start for start, _ in pieces["offsets"]]
    return np.array(pieces["ids"], np.int64), np.array(starts, np.int64)

  encode = lambda text: np.array(model.encode(text), np.int64)
  decode = lambda ids: model.decode(np.asarray(ids).tolist())
  unknown = model.unk_id() if model.unk_id() >= 0 else None
  return Tokenizer(encode, encode_with_starts, decode, model.get_piece_size(), token, unknown)


def _huggingface(
  path: pathlib.Path, separator: str | None, chat: chats.Template | None = None
) -> Tokenizer:
  library = need("tokenizers", "a tokenizer.json")
  try:
    model = library.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises bare exceptions.
    raise ValueError(
      f"{path} is not a tokenizer.json of Hugging Face's tokenizers, or is damaged ({error}):"
      " fetch it again"
    ) from error
  # A text is encoded whole, and text that looks like a special token as characters, but for the
  # marks of a chat template.
  model.no_truncation()
  model.no_padding()
  model.encode_special_tokens = chat is None
  wanted = _SEPARATORS if separator is None else (separator,)
  token = next((token for x in wanted if (token := model.token_to_id(x)) is not None), None)
  if token is None:
    raise ValueError(
      f"{path} has none of {', '.join(wanted)} to put behind each document: name the token that"
      " ends a text there with --separator"
    )

  def encoded(encode: Callable[..., Any], text: Any) -> Any:
    try:
      return encode(text, add_special_tokens=False)
    except Exception as error:  # As of a vocabulary of words without an unknown one.
      raise ValueError(f"{path} cannot encode it ({error}): use another --tokenizer") from error

  def encode(text: str) -> np.ndarray:
    (encoding,) = encoded(model.encode_batch_fast, [text])
    return np.array(encoding.ids, np.int64)

  def encode_with_starts(text: str) -> tuple[np.ndarray, np.ndarray]:
    encoding = encoded(model.encode, text)
    starts = [start for start, _ in encoding.offsets]
    return np.array(encoding.ids, np.int64), np.array(starts, np.int64)

  decode = lambda ids: model.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
  # Tokens may be left out of a vocabulary, so its size alone does not bound them.
  vocabulary = max(model.get_vocab(with_added_tokens=True).values()) + 1
  described = json.loads(path.read_bytes())["model"]
  unknown = described.get("unk_id")
  if (piece := described.get("unk_token")) is not None:
    unknown = model.token_to_id(piece)
  special = frozenset(x.content for x in model.get_added_tokens_decoder().values() if x.special)
  end = None if chat is None else model.token_to_id(chat.eos_token)
  ends = (token,) if end in (None, token) else (token, end)
  return Tokenizer(
    encode,
    encode_with_starts,
    decode,
    vocabulary,
    token,
    unknown,
    chat=chat,
    special=special,
    ends=ends,
  )


def train_bpe(texts: Iterator[str], vocabulary: int) -> str:
  """Trains a byte-level BPE, the same from the same texts.

  Args:
    texts: to learn merges from, all in memory at once.
    vocabulary: number of tokens, `SMALLEST_BPE` or more: short texts give fewer.

  Returns:
    The contents of its tokenizer.json.

  Raises:
    ImportError: if its package is not installed.
  """
  library = need("tokenizers", "--tokenizer=bpe")
  model = library.Tokenizer(library.models.BPE())
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  return model.to_str()


def _one_or_all(ends: tuple[int, ...]) -> int | list[int]:
  return list(ends) if len(ends) > 1 else ends[0]


def save_for_transformers(
  folder: pathlib.Path, description: dict[str, Any], out: pathlib.Path, length: int
) -> None:
  """Writes what `transformers.AutoTokenizer` opens: texts become the tokens of the corpus.

  Args:
    folder: of the corpus.
    description: of the tokenizer in its manifest.
    out: folder to write to.
    length: of the longest text, in tokens.

  Raises:
    As `describe`.
  """
  tokenizer, kind = load(folder, description), description["kind"]
  settings: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": length,
    "clean_up_tokenization_spaces": False,
  }
  if kind == "bytes":
    (out / "tokenizer.json").write_text(_bytes_in_json())
  elif kind == "sentencepiece":
    path = folder / description["file"]
    model = need("sentencepiece", "a SentencePiece tokenizer").SentencePieceProcessor(str(path))
    settings["eos_token"] = model.id_to_piece(tokenizer.separator)
    # Merges have their ranks for scores, and a unigram model's pieces logarithms.
    if all(model.get_score(i) % 1 == 0 for i in range(model.get_piece_size())):
      settings["tokenizer_class"], name = "LlamaTokenizer", "tokenizer.model"
    else:
      settings |= {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
      name = "spiece.model"
    shutil.copyfile(path, out / name)
  else:
    shutil.copyfile(folder / description["file"], out / "tokenizer.json")
    model = need("tokenizers", "a tokenizer.json").Tokenizer.from_file(str(out / "tokenizer.json"))
    settings["eos_token"] = model.id_to_token(tokenizer.ends[-1])
  if tokenizer.chat is not None:
    (out / "chat_template.jinja").write_text(tokenizer.chat.source)
    if tokenizer.chat.bos_token:
      settings["bos_token"] = tokenizer.chat.bos_token
  (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
  (out / "generation_config.json").write_text(
    json.dumps({"eos_token_id": _one_or_all(tokenizer.ends)}, indent=2) + "\n"
  )
