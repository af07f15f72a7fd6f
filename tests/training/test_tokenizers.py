"""Text to tokens and back, and where each token starts."""

import io
import itertools
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eco_optax.training.data import shards, tokenizers

TEXT = ["the cat sat on the mat, and the naïve café", "der Hund lag auf der Matte: 漢字 🙂"] * 20
texts = st.text(st.characters(codec="utf-8"), max_size=60)
awkward = [
  example("é漢🙂\r\n\t  x"),
  example("a<|endoftext|>b</s>"),
  example(""),
  example("e\u0301"),
]


def examples(test):
  for decorate in awkward:
    test = decorate(test)
  return settings(max_examples=60, deadline=None)(given(texts)(test))


def install(folder, contents, kind, separator=None):
  """A tokenizer as a prepared corpus has it, and what its manifest says."""
  path = pathlib.Path(folder) / tokenizers.FILES[kind]
  path.write_bytes(contents)
  description = tokenizers.describe(kind, path, separator)
  assert description["file"] == path.name
  assert description["sha256"] == shards.sha256(path)
  loaded = tokenizers.load(path.parent, description)
  assert loaded.vocabulary == description["vocabulary"]
  return loaded


def train_sentencepiece(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **options
  )
  return model.getvalue()


@pytest.fixture(scope="module")
def bpe():
  with tempfile.TemporaryDirectory() as folder:
    yield install(folder, tokenizers.train_bpe(iter(TEXT), 300).encode(), "bpe")


@pytest.fixture(scope="module")
def characters():
  """Every character is a piece, so character i starts at i."""
  contents = train_sentencepiece(
    model_type="char",
    vocab_size=60,
    hard_vocab_limit=False,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
  )
  with tempfile.TemporaryDirectory() as folder:
    yield install(folder, contents, "sentencepiece")


@pytest.fixture(scope="module")
def unigram():
  contents = train_sentencepiece(vocab_size=320, hard_vocab_limit=False, byte_fallback=True)
  with tempfile.TemporaryDirectory() as folder:
    yield install(folder, contents, "sentencepiece")


@examples
def test_bytes_are_utf8(text):
  tokenizer = tokenizers.load(pathlib.Path(), tokenizers.describe("bytes", None))
  assert (tokenizer.vocabulary, tokenizer.separator) == (256, 0)
  ids, starts = tokenizer.encode_with_starts(text)
  assert bytes(ids.tolist()) == text.encode()
  assert starts.tolist() == [i for i, character in enumerate(text) for _ in character.encode()]
  assert tokenizer.encode(text).tolist() == ids.tolist()
  assert tokenizer.decode(ids) == text


def test_bpe_is_lossless_and_knows_where_its_tokens_start(bpe):
  assert bpe.vocabulary == 300

  @examples
  def check(text):
    ids, starts = bpe.encode_with_starts(text)
    assert bpe.encode(text).tolist() == ids.tolist()
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids
    # Where the tokens before it end, in bytes; a token may start inside a character.
    at = [0, *itertools.accumulate(len(spelling[token]) for token in ids)]
    assert at[-1] == len(text.encode())
    before = [len(text.encode()[:byte].decode(errors="ignore")) for byte in at[:-1]]
    assert starts.tolist() == before

  # A byte-level vocabulary spells each byte as one character.
  model = library.Tokenizer.from_str(tokenizers.train_bpe(iter(TEXT), 300))
  spelling = {token: piece for piece, token in model.get_vocab().items()}
  check()
  for text in TEXT[:2]:
    assert len(bpe.encode(text)) < len(text.encode())


def test_bpe_does_not_depend_on_threads():
  program = (
    "import sys; from eco_optax.training.data import tokenizers;"
    "sys.stdout.write(tokenizers.train_bpe(iter(sys.stdin.read().split('|')), 300))"
  )
  here = tokenizers.train_bpe(iter(TEXT), 300)
  other = subprocess.run(
    [sys.executable, "-c", program],
    input="|".join(TEXT),
    env={"JAX_PLATFORMS": "cpu", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    capture_output=True,
    text=True,
    check=True,
  )
  assert other.stdout == here


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("the cat 漢字🙂é,:")))
def test_sentencepiece_counts_characters(characters, text):
  ids, starts = characters.encode_with_starts(text)
  assert starts.tolist() == list(range(len(text)))
  assert characters.encode(text).tolist() == ids.tolist()
  assert characters.decode(ids) == text
  assert characters.separator not in ids


def test_sentencepiece_with_bytes_and_control_pieces(unigram):
  text = "the ж naïve 漢字 </s> 🙃"
  ids, starts = unigram.encode_with_starts(text)
  assert unigram.decode(ids) == text
  assert unigram.separator not in ids
  assert starts[0] == 0
  assert (np.diff(starts) >= 0).all()
  assert starts.max() <= len(text) - 1
  # What comes before a character is what the tokens that start before it say.
  at = text.index("漢")
  assert unigram.decode(ids[starts < at]).rstrip() == text[:at].rstrip()


def word_level(**added):
  """A tokenizer.json as models come with: it cuts, pads and adds special tokens by itself."""
  words = {"[UNK]": 0, "a": 1, "b": 2, "cé": 3} | added
  model = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
  model.pre_tokenizer = library.pre_tokenizers.Whitespace()
  if added:
    model.add_special_tokens(list(added))
    ((name, token), *_) = added.items()
    model.post_processor = library.processors.TemplateProcessing(
      single=f"$A {name}", special_tokens=[(name, token)]
    )
  model.enable_truncation(3)
  model.enable_padding(length=9)
  return model.to_str().encode()


def test_huggingface_encodes_a_text_as_it_is(tmp_path):
  tokenizer = install(tmp_path, word_level(**{"</s>": 9}), "huggingface")
  assert (tokenizer.vocabulary, tokenizer.separator) == (10, 9)  # 4 to 8 are no tokens.
  ids, starts = tokenizer.encode_with_starts("a cé  b a b")
  assert ids.tolist() == [1, 3, 2, 1, 2]
  assert starts.tolist() == [0, 2, 6, 8, 10]
  assert tokenizer.encode("a cé  b a b").tolist() == ids.tolist()
  assert 9 not in tokenizer.encode("a </s> b")


def test_separator_is_found_or_named(tmp_path):
  both = {"<|endoftext|>": 4, "</s>": 5, "<turn>": 6}
  assert install(tmp_path, word_level(**both), "huggingface").separator == 5
  assert install(tmp_path, word_level(**both), "huggingface", "<turn>").separator == 6
  with pytest.raises(ValueError, match=r"tokenizer.json has none of </s>, <\|endoftext\|>, <eos>"):
    install(tmp_path, word_level(), "huggingface")
  with pytest.raises(ValueError, match=r"tokenizer.json has none of <end> .*--separator"):
    install(tmp_path, word_level(**both), "huggingface", "<end>")

  without = train_sentencepiece(vocab_size=60, hard_vocab_limit=False, eos_id=-1, model_type="bpe")
  with pytest.raises(
    ValueError, match=r"tokenizer.model has no end-of-sentence piece.*--separator"
  ):
    install(tmp_path, without, "sentencepiece")
  assert install(tmp_path, without, "sentencepiece", "<s>").separator == 1
  with pytest.raises(ValueError, match=r"tokenizer.model has no <end> "):
    install(tmp_path, without, "sentencepiece", "<end>")


@pytest.mark.parametrize(
  ("kind", "contents"),
  [("sentencepiece", b"no model"), ("huggingface", b"{}"), ("huggingface", b"\xff{")],
)
def test_damaged_files_are_named(tmp_path, kind, contents):
  with pytest.raises(ValueError, match=rf"{tokenizers.FILES[kind]} is not a .*again"):
    install(tmp_path, contents, kind)


def test_names_of_tokenizers(tmp_path):
  path = tmp_path / "spiece.model"
  path.write_bytes(b"x")
  kinds = [tokenizers.kind_of(name) for name in ("bytes", "bpe", str(path))]
  assert kinds == ["bytes", "bpe", "sentencepiece"]
  with pytest.raises(ValueError, match=r"'words' is not 'bytes', 'bpe', a SentencePiece .model"):
    tokenizers.kind_of("words")
  with pytest.raises(FileNotFoundError, match=r"no tokenizer .*tokenizer.json: check the path"):
    tokenizers.kind_of(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
  ("kind", "package"),
  [("bpe", "tokenizers"), ("huggingface", "tokenizers"), ("sentencepiece", "sentencepiece")],
)
def test_missing_package_is_named(tmp_path, monkeypatch, kind, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"needs {package}: pip install 'eco_optax\[data\]'"):
    install(tmp_path, b"x", kind)


def losses(tokenizer, text):
  found = tokenizers.Losses(tokenizer)
  return found.unknown(tokenizer.encode(text)), found.dropped(text)


def test_what_a_tokenizer_loses_is_found(characters, unigram, bpe, tmp_path):
  plain = train_sentencepiece(vocab_size=60, hard_vocab_limit=False, model_type="bpe")
  byte = tokenizers.load(pathlib.Path(), tokenizers.describe("bytes", None))
  words = install(tmp_path, word_level(**{"</s>": 9}), "huggingface")
  without = install(tmp_path, plain, "sentencepiece")
  text = "the cat Ж\u200b sat\x07"
  assert losses(byte, text) == losses(bpe, text) == (0, {})
  assert losses(unigram, text)[0] == 0  # It falls back to bytes.
  assert losses(characters, text) == (2, {})  # Neighbours are one unknown token.
  unknown, dropped = losses(without, text)
  assert unknown == 1
  assert dropped == {"\x07": 1}  # NFKC of SentencePiece has a zero-width space as a space.
  assert losses(words, "a é b x\u3000") == (2, {})

  model = library.Tokenizer(library.models.BPE({"a": 0, "é": 1, "</s>": 2}, []))
  model.normalizer = library.normalizers.StripAccents()
  characters_of_bpe = install(tmp_path, model.to_str().encode(), "huggingface")
  assert losses(characters_of_bpe, "aa\u0301a漢 漢") == (0, {"\u0301": 1, "漢": 2})
