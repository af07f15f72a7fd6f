"""From a run to a folder that transformers serves."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from eco_optax.interop import hugging_face
from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, export, loop
from eco_optax.training.data import corpus, prepare, shards
from eco_optax.training.models import transformer

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[2]
HAS_TRANSFORMERS = all(
  importlib.util.find_spec(name) for name in ("torch", "transformers", "compressed_tensors")
)
TEXTS = ["Rounding to nearest loses what is small.", "Naïve sums — of 3 × 4 — stay: 12 = ½ · 24!"]


def small(**changes):
  config = config_lib.small()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64)
  config.update(batch_size=8, length=64, steps=30, evaluate_every=30, log_every=30, **changes)
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 30
  return config


def sentencepiece_model(kind):
  sentencepiece = pytest.importorskip("sentencepiece")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS * 50),
    model_writer=model,
    vocab_size=60,
    model_type=kind,
    hard_vocab_limit=False,
    minloglevel=3,
  )
  return model.getvalue()


CASES = {
  "bytes, FP8": ("bytes", {}),
  "bpe, INT4": ("bpe", {"format": "INT4", "activation_format": "none"}),
  "sentencepiece bpe, master weights": ("sp_bpe", {"method": "mw_rtn"}),
  "sentencepiece unigram, float": ("sp_unigram", {"method": "bf16_mw"}),
  "experts, INT4, fine-tuned": ("bpe", {"format": "INT4", "activation_format": "none"}),
}


def write_texts(folder):
  for i in range(40):
    (folder / f"{i}.txt").write_text(f"{TEXTS[i % 2]} {i} " * 20)
  return "text"


def write_chats(folder):
  turns = [f"### Human: {TEXTS[0]} {i}### Assistant: {TEXTS[1]} {i}" for i in range(200)]
  rows = [{"text": "".join(turns[i : i + 1 + i % 3])} for i in range(200)]
  (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return "guanaco"


def fine_tuning(config, folder):
  """The paper's settings for DeepSeek-MoE, scaled down, from a checkpoint of random weights."""
  config.model.update(rope_interleaved=False, norm_epsilon=1e-6, dense_layers=1)
  config.model.update(experts=4, experts_per_token=2, expert_width=32, shared_experts=1)
  config.update(accumulation=4, batch_size=4 * 8, length=32, steps=20)  # On eight devices.
  config.evaluate_every = config.log_every = config.checkpoint.every = 20
  config.optimizer.update(learning_rate=2e-2, start_fraction=1e-5, warmup_fraction=0.03)
  config.optimizer.update(end_fraction=0.0, weight_decay=0.0)
  config.init_from = str(folder / "base")
  model = config_lib.model(config)
  params = jax.jit(transformer.init, static_argnums=(0, 1))(model, 7)
  hugging_face.save(folder / "base", params, model, kind="deepseek")


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
  """A run of a few steps, exported."""
  folder = tmp_path_factory.mktemp("run")
  tokenizer, changes = CASES[request.param]
  config = small(**changes)
  is_chat = request.param.endswith("fine-tuned")
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    if tokenizer == "bytes":
      data = corpus.standard_library_dataset()
      data = data._replace(validation=shards.TokenStream([data.validation.read(0, 1003)]))
      patch.setattr(corpus, "standard_library_dataset", lambda: data)
    else:
      config.model.vocabulary = 320
      if tokenizer == "bpe":  # Enough to learn the text by heart.
        config.steps = config.evaluate_every = config.checkpoint.every = 60
      if is_chat:
        fine_tuning(config, folder)
      (folder / "text").mkdir()
      format = (write_chats if is_chat else write_texts)(folder / "text")
      if tokenizer.startswith("sp_"):
        name = folder / "sp.model"
        name.write_bytes(sentencepiece_model(tokenizer[3:]))
      prepare.prepare(
        folder / "data",
        prepare.from_files([str(folder / "text" / "*")]),
        format=format,
        name="text",
        percent=20.0,
        tokenizer=str(name) if tokenizer.startswith("sp_") else tokenizer,
        vocabulary=300,
        workers=1,
      )
      config.data.path = str(folder / "data")
    loop.train(config, folder / "run")
    trained = evaluation.load(folder / "run")
    kind = "qwen2_moe" if config.model.experts else None
    # A mesh that is set around it, with explicit axes, makes no difference.
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh) if tokenizer != "bytes" else contextlib.nullcontext():
      export.export(trained, folder / "out", kind)
  return trained, folder / "out"


def test_codes_are_the_trained_ones(run):
  trained, out = run
  target = jax.eval_shape(lambda: trained.params)
  found = hugging_face.load(out, target, trained.model)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(trained.params), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_fine_tuning_lowers_the_loss_of_what_is_answered(run):
  trained, _ = run
  if not trained.config.init_from:
    pytest.skip("it starts from nothing")
  data = evaluation.open_data(trained, None)
  assert data.validation.read_mask(0, len(data.validation)).mean() < 0.6
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  target = jax.tree.map(place, trained.params)
  begun = hugging_face.load(trained.config.init_from, target, trained.model)
  before = evaluation.evaluate(dataclasses.replace(trained, params=begun), data)
  after = evaluation.evaluate(trained, data)
  assert before.tokens == after.tokens
  assert after.loss < before.loss - 1


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
  """Has transformers serve a folder, in one process for all, because it takes seconds to start."""
  if not HAS_TRANSFORMERS:
    pytest.skip("transformers is in the extra [interop]")
  side = ROOT / "tests" / "interop" / "transformers_side.py"
  log = tmp_path_factory.mktemp("transformers") / "stderr"
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  command = [sys.executable, str(side), "serve"]
  with log.open("w") as errors, subprocess.Popen(command, **pipes, stderr=errors, text=True) as own:

    def serve(folder):
      print(folder, file=own.stdin, flush=True)
      assert f"done {folder}\n" in iter(own.stdout.readline, ""), log.read_text()[-3000:]

    yield serve
    own.stdin.close()


def test_transformers_serves_the_same(run, serve):
  trained, out = run
  prompt = TEXTS[1][:17]
  tokens = np.random.default_rng(0).integers(0, trained.tokenizer.vocabulary, (2, 30))
  np.save(out / "tokens.npy", tokens)
  (out / "prompt.txt").write_text(prompt)
  if trained.config.model.experts:
    (out / "dequantize").touch()  # Its experts are one tensor there, which has no codes.
  serve(out)
  served = np.load(out / "served.npz")
  wanted = transformer.apply(trained.model, trained.params, jnp.asarray(tokens, jnp.int32))
  # The baseline computes in bfloat16 here and in float32 there.
  atol = 0.1 if trained.config.method == "bf16_mw" else 1e-3
  np.testing.assert_allclose(served["logits"], wanted, atol=atol)
  ids = trained.tokenizer.encode(prompt).tolist()
  assert served["prompt"].tolist() == ids
  ours = list(trained.generate(ids, 20))
  if trained.corpus["tokenizer"]["kind"] == "bpe" and not trained.config.init_from:
    # It has learned two sentences by heart: no two tokens are likeliest by a hair.
    assert trained.tokenizer.decode(ours).startswith(TEXTS[1][17:25])
  if trained.config.method != "bf16_mw":
    written = served["written"].tolist()
    if trained.tokenizer.separator in written:
      written = written[: written.index(trained.tokenizer.separator)]
    assert written == ours
    assert (out / "served.txt").read_text().strip() == trained.tokenizer.decode(ours).strip()


@pytest.fixture(scope="module")
def command():
  """The `main` of scripts/export.py, to be called in this process."""
  known = set(flags.FLAGS)
  spec = importlib.util.spec_from_file_location("export_script", ROOT / "scripts" / "export.py")
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  yield script.main
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)


def test_the_command_says_what_it_made(run, command, tmp_path, capsys):
  trained, out = run
  kind, experts = trained.corpus["tokenizer"]["kind"], trained.config.model.experts
  if kind == "bytes":
    pytest.skip("its text was replaced for the test")
  arguments = ["scripts/export.py", f"--workdir={out.parent / 'run'}"]
  arguments.append(f"--output={tmp_path / 'out'}")
  start = lambda *more: subprocess.run(
    [sys.executable, *arguments, *more], capture_output=True, text=True, check=False, cwd=ROOT
  )
  as_process = kind == "bpe" and not experts  # Once is enough.
  if as_process:
    done = start("--dtype=bfloat16")
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
  else:
    flags.FLAGS([*arguments, "--dtype=bfloat16"])
    command([])
    said = capsys.readouterr().out
  assert f"{tmp_path / 'out'}: step {trained.step}, " in said
  assert ("--kind=qwen2_moe" if experts else "AutoModelForCausalLM") in said
  told = json.loads((tmp_path / "out" / "config.json").read_text())
  assert told["torch_dtype"] == "bfloat16"
  if as_process:
    again = start()
    assert again.returncode != 0
    assert "is there already: name another folder" in again.stderr
