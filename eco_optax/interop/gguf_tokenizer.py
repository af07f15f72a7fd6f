"""The tokenizer in a GGUF file, as the files that transformers opens."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from eco_optax.interop import gguf

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # Types of tokens.

_QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

#: How texts are split before byte pairs are merged, by tokenizer.ggml.pre: the pieces' regular
#: expression, "" for GPT-2's.
_SPLITS = {
  "gpt-2": "",
  "olmo": "",
  "smollm": "",
  "dbrx": _LLAMA3,
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
}
_DIGITS = ("smollm",)  # Tokenizers that split off each digit first.
# Tokenizers that look a piece up in the vocabulary before they apply merges, and that begin a text
# with bos unless a file denies it.
_LLAMA = ("llama-bpe", "llama3", "llama-v3")
_NAMES = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
}


def save(path: Any, folder: Any) -> None:
  """Writes `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

  Args:
    path: of a GGUF file.
    folder: that there is.

  Raises:
    FileNotFoundError: if there is no file.
    ImportError: without the packages gguf and tokenizers.
    ValueError: if the file has no tokenizer, or one that is not known here, naming the key.

  References:
    `GGUF <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_.
  """
  metadata = gguf.open_file(path).metadata
  told = {
    name.removeprefix("tokenizer.").removeprefix("ggml."): x
    for name, x in metadata.items()
    if name.startswith("tokenizer.")
  }
  try:
    text = _tokenizer(told, metadata.get("general.architecture", "")).to_str()
    config = _config(told)
  except KeyError as error:
    raise ValueError(
      f"{path} has no tokenizer.ggml.{error.args[0]}: name the tokenizer.json of the model instead"
    ) from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  folder = pathlib.Path(folder)
  (folder / "tokenizer.json").write_text(text)
  (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
  if (template := told.get("chat_template")) is not None:
    (folder / "chat_template.jinja").write_text(template)


def _tokenizer(told: Mapping[str, Any], architecture: str) -> Any:
  """The tokenizer of the metadata, whose keys are without `tokenizer.ggml.`."""
  library = _library()
  kind, tokens, types = told["model"], told["tokens"], told.get("token_type", [])
  if types and len(types) != len(tokens):
    raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
  if kind == "gpt2":
    model = _byte_level(told, tokens)
  elif kind == "llama":
    model = _sentencepiece(told, tokens, architecture.startswith("gemma"))
  else:
    raise ValueError(
      f"tokenizer.ggml.model {kind!r} is neither 'gpt2' nor 'llama': name the tokenizer.json of the"
      " model instead"
    )
  of_type = lambda *kinds: [x for x, own in zip(tokens, types, strict=False) if own in kinds]
  new = lambda token, special: library.AddedToken(token, normalized=False, special=special)
  known = model.get_vocab()
  named = [tokens[i] for i in _special(told, tokens).values()]
  control = dict.fromkeys([*of_type(_CONTROL, _UNKNOWN), *named])
  model.add_special_tokens([new(token, True) for token in control if token in known])
  model.add_tokens([new(token, False) for token in of_type(_USER_DEFINED) if token in known])
  model.post_processor = _post_processor(told, tokens)
  return model


def _library() -> Any:
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError("a GGUF file's tokenizer takes pip install 'eco_optax[data]'") from error
  return tokenizers


def _special(told: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
  """The tokens that have a name for transformers."""
  found = {name: told[key] for name, key in _NAMES.items() if told.get(key) is not None}
  for name, token in found.items():
    if not 0 <= token < len(tokens):
      raise ValueError(
        f"tokenizer.ggml.{_NAMES[name]} {token} is none of {len(tokens)} tokens: fetch it again"
      )
  return found


def _adds(told: Mapping[str, Any], name: str) -> bool:
  """Whether bos or eos is put around a text."""
  default = name == "bos" and (told["model"] == "llama" or told.get("pre") in _LLAMA)
  return bool(told.get(f"add_{name}_token", default)) and f"{name}_token_id" in told


def _config(told: Mapping[str, Any]) -> dict[str, Any]:
  """What tokenizer_config.json says."""
  tokens = told["tokens"]
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    **{name: tokens[token] for name, token in _special(told, tokens).items()},
  }


def _post_processor(told: Mapping[str, Any], tokens: Sequence[str]) -> Any:
  bos = [(tokens[told["bos_token_id"]], told["bos_token_id"])] if _adds(told, "bos") else []
  eos = [(tokens[told["eos_token_id"]], told["eos_token_id"])] if _adds(told, "eos") else []
  single = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
  return _library().processors.TemplateProcessing(single=single, special_tokens=[*bos, *eos])


def _byte_level(told: Mapping[str, Any], tokens: Sequence[str]) -> Any:
  """BPE of bytes."""
  library = _library()
  before = library.pre_tokenizers
  pre = told["pre"]
  if pre not in _SPLITS:
    raise ValueError(
      f"tokenizer.ggml.pre {pre!r} is none of {', '.join(_SPLITS)}, so how texts are split is not"
      " known: name the tokenizer.json of the model instead"
    )
  merges = [tuple(merge.split(" ", 1)) for merge in told["merges"]]
  model = library.Tokenizer(
    library.models.BPE(_vocabulary(tokens), merges, ignore_merges=pre in _LLAMA)
  )
  pattern = _SPLITS[pre]
  steps = [before.Digits(individual_digits=True)] if pre in _DIGITS else []
  if pattern:
    steps.append(before.Split(library.Regex(pattern), behavior="isolated"))
  steps.append(before.ByteLevel(add_prefix_space=False, use_regex=not pattern))
  model.pre_tokenizer = before.Sequence(steps) if len(steps) > 1 else steps[0]
  if pattern == _QWEN2:
    model.normalizer = library.normalizers.NFC()
  model.decoder = library.decoders.ByteLevel()
  return model


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
  found = {token: i for i, token in enumerate(tokens)}
  if len(found) != len(tokens):
    twice = next(token for i, token in enumerate(tokens) if found[token] != i)
    raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice: fetch it again")
  return found


def _sentencepiece(told: Mapping[str, Any], tokens: Sequence[str], is_gemma: bool) -> Any:
  """BPE of SentencePiece, with all merges that the vocabulary allows."""
  library = _library()
  if is_gemma:  # Runs of spaces are written as such, and pieces are in the order of their merges.
    tokens = ["▁" * len(x) if x.strip(" ") == "" else x for x in tokens]
    scores: Sequence[float] = [-float(i) for i in range(len(tokens))]
  else:
    scores = told["scores"]
  vocabulary = _vocabulary(tokens)
  unknown = told.get("unknown_token_id")
  model = library.Tokenizer(
    library.models.BPE(
      vocabulary,
      _merges(vocabulary, scores),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  decoders, normalizers = library.decoders, library.normalizers
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  model.normalizer = normalizers.Replace(" ", "▁")
  if is_gemma:
    model.pre_tokenizer = library.pre_tokenizers.Split(" ", "merged_with_previous")
  elif told.get("add_space_prefix", True):
    # Before any text, as SentencePiece has it; transformers leaves it out before a space.
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), model.normalizer])
    steps.append(decoders.Strip(content=" ", left=1))
  model.decoder = decoders.Sequence(steps)
  return model


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
  """All pairs of pieces that make a piece, the highest score first."""
  found = []
  for piece, i in vocabulary.items():
    for at in range(1, len(piece)):
      left, right = piece[:at], piece[at:]
      if left in vocabulary and right in vocabulary:
        # Of equal scores the longer left part goes first, as for transformers.
        found.append((-scores[i], -at, at - len(piece), i, left, right))
  return [(left, right) for *_, left, right in sorted(found)]
