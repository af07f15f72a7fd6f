"""GGUF files, against the models they were made of and against transformers."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import gguf as library
import jax
import numpy as np
import pytest
import tokenizers
from gguf_files import TEXT, TYPES, add_byte_level, byte_level, random_params, shapes, write

import eco_optax as eco
from eco_optax.interop import gguf, gguf_tokenizer, hugging_face
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig

HERE = pathlib.Path(__file__).parent

LLAMA = TransformerConfig(3, 64, 4, 100, kv_heads=2, mlp_width=96, rope_interleaved=False)
ROUTED = {"experts": 3, "experts_per_token": 2, "expert_width": 32}
GEMMA = {
  "activation": "gelu",
  "tied_embedding": True,
  "scaled_embedding": True,
  "norm_offset": True,
  "post_norms": True,
  "window": 5,
}
# By what GGUF calls the architecture.
MODELS = {
  "llama": LLAMA,
  "llama, tied": dataclasses.replace(LLAMA, tied_embedding=True, norm_epsilon=1e-5),
  "llama, long": dataclasses.replace(LLAMA, rope_base=5e5, rope_factor=8.0, rope_length=8192),
  "llama, experts": dataclasses.replace(
    LLAMA, **ROUTED, mlp_width=0, normalize_expert_weights=True
  ),
  "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_base=1e6),
  "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_width=128),
  "qwen3moe": dataclasses.replace(LLAMA, **ROUTED, qk_norm=True, normalize_expert_weights=True),
  "olmo2": dataclasses.replace(
    LLAMA, pre_norms=False, post_norms=True, qk_norm=True, joint_qk_norm=True
  ),
  "gemma2": dataclasses.replace(
    LLAMA, **GEMMA, attention_cap=50.0, logit_cap=30.0, global_every=2, head_width=256
  ),
  "gemma3": dataclasses.replace(
    LLAMA, **GEMMA, qk_norm=True, global_every=6, layers=7, rope_base=1e6, rope_factor=8.0
  ),
}
# transformers leaves out factors of rotary embedding and widths of experts, and of Qwen3's heads,
# which have to be 128, and caps of Gemma 2, which have to be 50 and 30), and has no OLMo-2.
TRANSFORMERS_DIFFERS = ("llama, long", "llama, experts", "qwen3moe", "olmo2", "gemma3")
TOKENS = np.random.default_rng(0).integers(0, 100, (2, 24))


def logits(config, params):
  return np.asarray(jax.jit(transformer.apply, static_argnums=0)(config, params, TOKENS))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_it_was_made_of(name, tmp_path):
  config, params = MODELS[name], random_params(MODELS[name])
  path = write(tmp_path / "model.gguf", name.split(",")[0], config, params)
  said = [hugging_face.read_config(x) for x in (path, tmp_path / "model")]
  # A file tells nothing of how experts were balanced in training.
  assert said[0] == said[1] | {x: y for x, y in said[0].items() if x == "balance_weight"}
  hugging_face.check_config(path, config)
  found = hugging_face.load(path, shapes(config), config)
  # Adding and subtracting 1 rounds Gemma's norms.
  atol = 2e-7 if name.startswith("gemma") else 0
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), found, params)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_blocks_are_the_values_they_stand_for(kind, tmp_path):
  config = dataclasses.replace(LLAMA, rope_interleaved=True)
  params = random_params(config)
  path = write(tmp_path / "model.gguf", "llama", config, params, TYPES[kind])
  # The definitions of the blocks, on the table, whose rows are in order.
  rows = np.asarray(params["embedding"]).reshape(-1, 32).astype(np.float64)
  found = hugging_face.load(path, shapes(config), config)
  near = np.asarray(found["embedding"]).reshape(-1, 32)
  spread = np.ptp(rows, axis=1, keepdims=True)
  largest = np.abs(rows).max(1, keepdims=True)
  steps = {
    "F16": largest * 2**-11,
    "BF16": largest * 2**-8,
    "Q8_0": largest / 127,
    "Q4_0": largest / 8 * 2,  # The code opposite to the largest value is cut off.
    "Q4_1": spread / 15,
    "Q5_1": spread / 31,
  }
  assert (np.abs(near - rows) <= steps[kind] * 0.52 + 2e-3 * largest).all()
  # What is packed on the way is packed of those values.
  packed = hugging_face.load(path, shapes(config, eco.FP8), config)
  wanted = eco.quantize(found, eco.FP8.transposed, transformer.is_block_kernel)
  jax.tree.map(np.testing.assert_array_equal, packed, wanted)


def test_values_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
  path = write(tmp_path / "model.gguf", "llama", LLAMA, random_params(LLAMA), TYPES.Q8_0)
  gguf.open_file(path)
  read, dequantize = [], library.dequantize
  monkeypatch.setattr(
    library, "dequantize", lambda data, kind: read.append(data.shape) or dequantize(data, kind)
  )
  tensors = gguf.read(path)
  assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
  assert not read
  hugging_face.load(path, shapes(LLAMA, eco.FP8), LLAMA)
  assert len(read) == len(tensors)  # Each once.


def add_sentencepiece(writer, folder):
  sentencepiece = pytest.importorskip("sentencepiece")
  made = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*(HERE / "test_gguf.py").read_text().split("\n"), *TEXT]),
    model_writer=made,
    model_type="bpe",
    vocab_size=500,
    byte_fallback=True,
    minloglevel=2,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
  )
  own = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
  pieces = range(own.get_piece_size())
  kind = lambda i: (
    2 if own.is_unknown(i) else 3 if own.is_control(i) else 6 if own.is_byte(i) else 1
  )
  writer.add_tokenizer_model("llama")
  writer.add_token_list([own.id_to_piece(i) for i in pieces])
  writer.add_token_scores([own.get_score(i) for i in pieces])
  writer.add_token_types([kind(i) for i in pieces])
  writer.add_unk_token_id(own.unk_id())
  writer.add_bos_token_id(own.bos_id())
  writer.add_eos_token_id(own.eos_id())
  return own


def saved(path, folder):
  folder.mkdir()
  gguf_tokenizer.save(path, folder)
  return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


STEPS = tokenizers.pre_tokenizers
SPLIT = lambda pattern: STEPS.Sequence(
  [
    STEPS.Split(tokenizers.Regex(pattern), behavior="isolated"),
    STEPS.ByteLevel(add_prefix_space=False, use_regex=False),
  ]
)
# As the models' own tokenizer.json say it.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
  "gpt-2": lambda: STEPS.ByteLevel(add_prefix_space=False),
  "smollm": lambda: STEPS.Sequence(
    [STEPS.Digits(individual_digits=True), STEPS.ByteLevel(add_prefix_space=False)]
  ),
  "llama-bpe": lambda: SPLIT(LLAMA3),
  "qwen2": lambda: SPLIT(LLAMA3.replace("{1,3}", "")),
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_pairs_are_those_of_the_tokenizer_it_was_made_of(pre, tmp_path):
  own = byte_level(PRE_TOKENIZERS[pre]())
  add = lambda writer: add_byte_level(writer, own, pre, bos=True)
  path = write(tmp_path / "model.gguf", "llama", LLAMA, random_params(LLAMA), change=add)
  found = saved(path, tmp_path / "out")
  for text in [*TEXT, (HERE / "transformers_side.py").read_text()]:
    assert found.encode(text).ids == [1, *own.encode(text).ids]
    assert found.decode(found.encode(text).ids) == text
  assert found.encode("<|im_end|>", add_special_tokens=False).ids == [2]
  config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
  assert config["eos_token"] == "<|im_end|>"
  assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_pieces_are_those_of_sentencepiece(tmp_path):
  own = []
  add = lambda writer: own.append(add_sentencepiece(writer, tmp_path))
  path = write(tmp_path / "model.gguf", "llama", LLAMA, random_params(LLAMA), change=add)
  found = saved(path, tmp_path / "out")
  for text in TEXT:
    assert found.encode(text).ids == [own[0].bos_id(), *own[0].encode(text)]
    assert found.decode(found.encode(text).ids) == text


@pytest.mark.skipif(
  any(importlib.util.find_spec(x) is None for x in ("torch", "transformers", "accelerate")),
  reason="needs transformers and accelerate",
)
def test_transformers_computes_the_same_with_a_file(tmp_path):
  own = byte_level(PRE_TOKENIZERS["llama-bpe"]())
  for name, config in MODELS.items():
    if name in TRANSFORMERS_DIFFERS:
      continue
    path, params = tmp_path / f"{name.replace(', ', '-')}.gguf", random_params(config)
    pieces = lambda writer: add_sentencepiece(writer, tmp_path)
    pairs = lambda writer: add_byte_level(writer, own, "llama-bpe", bos=True)
    change = pieces if name == "llama, tied" else pairs
    write(path, name.split(",")[0], config, params, TYPES.Q8_0, change)
  np.save(tmp_path / "tokens.npy", TOKENS)
  # It puts no space of SentencePiece's own before one of the text.
  texts = [x for x in [*TEXT, "<|im_start|>user\nHi!<|im_end|>", "<s>"] if x[0] != " "]
  (tmp_path / "texts.json").write_text(json.dumps(texts))
  command = [sys.executable, HERE / "transformers_side.py", "gguf", tmp_path]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  for path in sorted(tmp_path.glob("*.gguf")):
    config = TransformerConfig(**hugging_face.read_config(path))
    params = hugging_face.load(path, shapes(config), config)
    theirs = np.load(path.with_suffix(".npz"))
    np.testing.assert_allclose(
      logits(config, params), theirs["logits"], rtol=0, atol=1e-4, err_msg=path.name
    )
    found = saved(path, tmp_path / f"{path.stem}-out")
    assert [found.encode(x).ids for x in texts] == json.loads(path.with_suffix(".json").read_text())


def test_damaged_files_are_told(tmp_path):
  whole = write(tmp_path / "whole.gguf", "llama", LLAMA, random_params(LLAMA))
  with pytest.raises(FileNotFoundError, match=r"there is no .*none.gguf"):
    hugging_face.read_config(tmp_path / "none.gguf")
  data = whole.read_bytes()
  bad = tmp_path / "bad.gguf"
  for size in (0, 3, 40, 300, len(data) - 5000, len(data) - 40):
    bad.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"bad.gguf is no GGUF file, or is damaged or cut short"):
      hugging_face.read_config(bad)
  bad.write_bytes(b"PK\x03\x04" + data[4:])
  with pytest.raises(ValueError, match=r"bad.gguf is no GGUF file"):
    hugging_face.read_config(bad)
  # The type is behind the name, the number of axes and one size.
  at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
  assert data[at : at + 4] == bytes(4)
  bad.write_bytes(data[:at] + (999).to_bytes(4, "little") + data[at + 4 :])
  with pytest.raises(ValueError, match=r"bad.gguf has tensors of a type .*999.*: update it"):
    hugging_face.read_config(bad)


def without(key):
  return lambda writer: writer.kv_data[0].pop(key)


add_norm = lambda name: lambda writer: writer.add_tensor(name, np.ones(64, np.float32))
REFUSED = {
  "architecture": (
    lambda w: w.kv_data[0]["general.architecture"].__setattr__("value", "mamba"),
    r"general.architecture 'mamba' is none of llama, qwen2",
  ),
  "missing": (without("llama.block_count"), r"llama.block_count is missing"),
  "null": (without("llama.attention.layer_norm_rms_epsilon"), r"layer_norm_rms_epsilon is missing"),
  "unknown key": (lambda w: w.add_uint32("llama.twist", 3), r"llama.twist 3 is not understood"),
  "rope": (
    lambda w: w.add_rope_scaling_type(library.RopeScalingType.YARN),
    r"models here have no rope_type 'yarn'",
  ),
  "frequencies": (
    lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
    r"rope_freqs.weight is not what Llama 3.1 makes of a factor 3.0",
  ),
  "both": (
    lambda w: (
      w.add_rope_scaling_type(library.RopeScalingType.LINEAR),
      w.add_rope_scaling_factor(2.0),
      w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
    ),
    r"rope.scaling.type 'linear' and rope_freqs.weight exclude each other",
  ),
  "parts": (lambda w: w.add_uint16("split.count", 2), r"one of 2 parts .*--merge"),
  "type": (
    lambda w: w.add_tensor("blk.0.twist", np.ones((1, 32), np.int8)),
    r"'blk.0.twist' is of type I8, which gguf .* cannot turn into floats",
  ),
  "unknown tensor": (add_norm("blk.0.attn_sub_norm.weight"), r"not known blk.0.attn_sub_norm"),
  "twice": (add_norm("blk.0.post_attention_norm.weight"), r"blk.0.* are both model.layers.0.post"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_has_of_another_model_is_refused(name, tmp_path):
  change, message = REFUSED[name]
  path = write(tmp_path / "bad.gguf", "llama", LLAMA, random_params(LLAMA), change=change)
  with pytest.raises(ValueError, match=rf"bad.gguf.*{message}"):
    hugging_face.load(path, shapes(LLAMA), LLAMA)


def set_key(key, value):
  return lambda writer: writer.kv_data[0][key].__setattr__("value", value)


NO_TOKENIZERS = {
  "none": (lambda w: w.kv_data[0].pop("tokenizer.ggml.tokens"), r"no tokenizer.ggml.tokens"),
  "pre": (set_key("tokenizer.ggml.pre", "mine"), r"tokenizer.ggml.pre 'mine' is none of gpt-2"),
  "kind": (set_key("tokenizer.ggml.model", "rwkv"), r"model 'rwkv' is neither 'gpt2' nor 'llama'"),
  "eos": (set_key("tokenizer.ggml.eos_token_id", 10**6), r"eos_token_id 1000000 is none of"),
  "types": (set_key("tokenizer.ggml.token_type", [1, 1]), r"token_type has 2 entries for"),
  "twice": (set_key("tokenizer.ggml.tokens", ["a", "b"] * 60), r"ggml.tokens has 'a' twice"),
}


@pytest.mark.parametrize("name", NO_TOKENIZERS)
def test_a_tokenizer_that_is_not_known_is_refused(name, tmp_path):
  change, message = NO_TOKENIZERS[name]
  own = byte_level(PRE_TOKENIZERS["gpt-2"]())

  def add(writer):
    add_byte_level(writer, own, "gpt-2")
    if name == "twice":
      writer.kv_data[0].pop("tokenizer.ggml.token_type")
    change(writer)

  path = write(tmp_path / "bad.gguf", "llama", LLAMA, random_params(LLAMA), change=add)
  with pytest.raises(ValueError, match=rf"bad.gguf.*{message}"):
    gguf_tokenizer.save(path, tmp_path)
