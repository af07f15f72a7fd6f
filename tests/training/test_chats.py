"""Chats in a model's own template, from a GGUF file to an answer of the export."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from gguf_files import add_byte_level, byte_level, write
from tokenizers import pre_tokenizers

from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, export, loop, sharding
from eco_optax.training.data import chats, prepare, shards
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[2]
CHATML = (
  "{% for m in messages %}"
  "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL = TransformerConfig(
  1, 64, 2, 768, kv_heads=1, mlp_width=64, tied_embedding=True, rope_interleaved=False
)
WORDS = ["red", "blue", "green", "white", "black"]
QUESTION, ANSWER = "What is red?", "red is a colour, naïvely."


def write_chats(path):
  rows = [
    f"### Human: What is {WORDS[i % 5]}?### Assistant: {WORDS[i % 5]} is a colour, naïvely."
    + (f"### Human: {i}?### Assistant: Yes." if i % 2 else "")
    for i in range(400)
  ]
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))


def prepared(folder, tokenizer, name="data", **more):
  prepare.prepare(
    folder / name,
    prepare.from_files([str(folder / "chats.jsonl")]),
    format="guanaco",
    name="chats",
    percent=20.0,
    tokenizer=str(tokenizer),
    **more,
  )
  return shards.load(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A GGUF file of a chat model, and chats prepared in its template."""
  folder = tmp_path_factory.mktemp("chats")
  write_chats(folder / "chats.jsonl")
  own = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))

  def add(writer):
    add_byte_level(writer, own, "gpt-2")
    writer.kv_data[0]["tokenizer.chat_template"].value = CHATML

  write(folder / "model.gguf", "llama", MODEL, transformer.init(MODEL, 0), change=add)
  prepared(folder, folder / "model.gguf", chat_template=True, separator="<|endoftext|>")
  return folder


@pytest.fixture(scope="module")
def trained(folder):
  """A run from that file, of enough steps to learn the chats by heart."""
  config = config_lib.small()
  config.model.update({x: y for x, y in dataclasses.asdict(MODEL).items() if x in config.model})
  config.model.vocabulary_parts = 2
  config.update(init_from=str(folder / "model.gguf"), length=64, steps=100)
  config.update(activation_format="none", log_every=100, evaluate_every=100)
  config.model.quantized = "all"
  config.optimizer.update(learning_rate=1e-2, weight_decay=0.0)
  config.checkpoint.every = 100
  config.data.path = str(folder / "data")
  make_mesh = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    # One device is enough, and quicker.
    patch.setattr(
      sharding, "make_mesh", lambda sizes, devices=None: make_mesh(sizes, jax.devices()[:1])
    )
    begun = evaluation.begin(config)
    loop.train(config, folder / "run")
    return begun, evaluation.load(folder / "run")


def test_chats_are_written_in_the_template_and_replies_are_trained_on(folder):
  data = shards.load(folder / "data")
  trained = evaluation.tokenizers.load(folder / "data", data.manifest["tokenizer"])
  tokens = data.train.read(0, len(data.train))
  mask = data.train.read_mask(0, len(data.train))
  ends = np.flatnonzero(tokens == trained.separator)
  texts = [trained.decode(x.tolist()) for x in np.split(tokens, ends + 1)[:3]]
  word = texts[0].split("What is ")[1].split("?")[0]
  first = (
    f"<|im_start|>user\nWhat is {word}?<|im_end|>\n"
    f"<|im_start|>assistant\n{word} is a colour, naïvely.<|im_end|>\n"
  )
  more = texts[0].removeprefix(first).removesuffix("<|endoftext|>")
  again = r"<\|im_start\|>user\n\d+\?<\|im_end\|>\n<\|im_start\|>assistant\nYes.<\|im_end\|>\n"
  assert re.fullmatch(f"({again})?", more)
  replies = trained.decode(tokens[: ends[0]][mask[: ends[0]]].tolist())
  assert replies == f"{word} is a colour, naïvely.<|im_end|>" + "Yes.<|im_end|>" * bool(more)
  # Each mark is one token, and the last of a reply is trained on.
  assert (tokens == 1).sum() == trained.decode(tokens.tolist()).count("<|im_start|>")
  assert mask[tokens == 2].sum() * 2 == (tokens == 2).sum()


def test_what_a_template_cannot_say_is_refused(folder, tmp_path):
  model = folder / "model.gguf"
  (tmp_path / "chats.jsonl").write_text(
    json.dumps({"text": "### Human: a <|im_end|> b### Assistant: c"}) + "\n"
  )
  with pytest.raises(ValueError, match=r"line 1: a message holds '<\|im_end\|>', which is a mark"):
    prepared(tmp_path, model, chat_template=True)
  with pytest.raises(
    ValueError, match=r"--chat_template needs the tokenizer.json or the GGUF file"
  ):
    prepared(tmp_path, "bytes", "bytes", chat_template=True)
  with pytest.raises(ValueError, match="a chat template is for chats, of format guanaco, and not"):
    prepare.prepare(
      tmp_path / "text",
      prepare.from_files([str(tmp_path / "chats.jsonl")]),
      format="text",
      name="text",
      tokenizer=str(model),
      chat_template=True,
    )
  (tmp_path / "tokenizer.json").write_bytes((folder / "data" / "tokenizer.json").read_bytes())
  with pytest.raises(ValueError, match=r"has no chat_template.jinja, and no chat_template in"):
    prepared(tmp_path, tmp_path / "tokenizer.json", "bare", chat_template=True)

  question = [{"role": "user", "content": "a"}]
  later = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
  reply = {"role": "assistant", "content": "b"}
  with pytest.raises(ValueError, match="writes a message otherwise once another follows"):
    chats.with_replies(chats.Template(later), [*question, reply, *question])
  with pytest.raises(ValueError, match="does not take it: no"):
    chats.render(chats.Template("{{ raise_exception('no') }}"), question)
  with pytest.raises(ValueError, match="cannot be used"):
    chats.render(chats.Template("{{ messages.clear.__class__.__mro__ }}"), question)
  assert chats.render(chats.GUANACO, question, is_asked=True) == "### Human: a### Assistant:"


def ask(trained, question):
  return "".join(evaluation.answer(trained, [{"role": "user", "content": question}], 40))


def test_a_run_answers_as_it_was_taught(trained):
  begun, after = trained
  assert begun.step == 0
  assert ask(begun, QUESTION) != ANSWER
  assert ask(after, QUESTION) == ANSWER  # Its end is the mark's, which is not shown.
  with pytest.raises(ValueError, match="which is a mark between messages"):
    ask(after, "a<|im_end|>b")
  with pytest.raises(
    ValueError, match=r"is \d+ tokens long, and the run was trained on texts of 64"
  ):
    ask(after, "What is red? " * 30)


def generate(*args, lines=""):
  command = [sys.executable, str(ROOT / "scripts" / "generate.py"), *args]
  return subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout


def test_the_terminal_is_answered_line_by_line(trained, folder):
  lines = f"{QUESTION}\n\n{'What is red? ' * 30}\n\nWhat is green?\n"
  said = generate(f"--workdir={folder / 'run'}", lines=lines).splitlines()
  assert said[0].endswith("at step 100 of 100")
  assert said[1] == ANSWER
  assert said[2].startswith("error: the chat is")
  assert said[3] == ANSWER.replace("red", "green")


@pytest.mark.skipif(
  importlib.util.find_spec("transformers") is None, reason="transformers is in the extra [interop]"
)
def test_transformers_gives_the_same_answer_with_the_export(trained, folder):
  export.export(trained[1], folder / "exported")
  told = json.loads((folder / "exported" / "generation_config.json").read_text())
  assert told["eos_token_id"] == [0, 2]
  said = generate(f"--exported={folder / 'exported'}", f"--prompt={QUESTION}", "--tokens=40")
  assert said == ANSWER + "\n"
