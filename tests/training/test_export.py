"""From a run to a folder that transformers serves."""

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
  "experts, INT4": ("bpe", {"format": "INT4", "activation_format": "none"}),
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory):
  """A run of a few steps, exported."""
  folder = tmp_path_factory.mktemp("run")
  tokenizer, changes = CASES[request.param]
  config = small(**changes)
  if request.param.startswith("experts"):
    config.model.update(rope_interleaved=False, norm_epsilon=1e-6, dense_layers=1)
    config.model.update(experts=4, experts_per_token=2, expert_width=32, shared_experts=1)
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    if tokenizer == "bytes":
      data = corpus.standard_library_dataset()
      data = data._replace(validation=shards.TokenStream([data.validation.read(0, 1003)]))
      patch.setattr(corpus, "standard_library_dataset", lambda: data)
    else:
      (folder / "text").mkdir()
      for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"{TEXTS[i % 2]} {i} " * 20)
      if tokenizer.startswith("sp_"):
        name = folder / "sp.model"
        name.write_bytes(sentencepiece_model(tokenizer[3:]))
      prepare.prepare(
        folder / "data",
        prepare.from_files([str(folder / "text" / "*.txt")]),
        format="text",
        name="text",
        percent=20.0,
        tokenizer=str(name) if tokenizer.startswith("sp_") else tokenizer,
        vocabulary=300,
        workers=1,
      )
      config.data.path = str(folder / "data")
      config.model.vocabulary = 320
    loop.train(config, folder / "run")
    trained = evaluation.load(folder / "run")
    kind = "qwen2_moe" if config.model.experts else None
    export.export(trained, folder / "out", kind)
  return trained, folder / "out"


def test_codes_are_the_trained_ones(run):
  trained, out = run
  target = jax.eval_shape(lambda: trained.params)
  found = hugging_face.load(out, target, trained.model)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(trained.params), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is in the extra [interop]")
def test_transformers_serves_the_same(run):
  trained, out = run
  prompt = TEXTS[1][:17]
  tokens = np.random.default_rng(0).integers(0, trained.tokenizer.vocabulary, (2, 30))
  np.save(out / "tokens.npy", tokens)
  (out / "prompt.txt").write_text(prompt)
  if trained.config.model.experts:
    (out / "dequantize").touch()  # Its experts are one tensor there, which has no codes.
  side = ROOT / "tests" / "interop" / "transformers_side.py"
  done = subprocess.run(
    [sys.executable, str(side), "serve", str(out)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  served = np.load(out / "served.npz")
  wanted = transformer.apply(trained.model, trained.params, jnp.asarray(tokens, jnp.int32))
  # The baseline computes in bfloat16 here and in float32 there.
  atol = 0.1 if trained.config.method == "bf16_mw" else 1e-3
  np.testing.assert_allclose(served["logits"], wanted, atol=atol)
  ids = trained.tokenizer.encode(prompt).tolist()
  assert served["prompt"].tolist() == ids
  ours = list(trained.generate(ids, 20))
  if trained.config.method != "bf16_mw":
    written = served["written"].tolist()
    if trained.tokenizer.separator in written:
      written = written[: written.index(trained.tokenizer.separator)]
    assert written == ours
    assert (out / "served.txt").read_text().strip() == trained.tokenizer.decode(ours).strip()


def test_the_command_says_what_it_made(run, tmp_path):
  trained, out = run
  if trained.corpus["tokenizer"]["kind"] == "bytes":
    pytest.skip("its text was replaced for the test")
  command = [sys.executable, "scripts/export.py", f"--workdir={out.parent / 'run'}"]
  done = subprocess.run(
    [*command, f"--output={tmp_path / 'out'}", "--dtype=bfloat16"],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert f"{tmp_path / 'out'}: step 30, " in done.stdout
  told = json.loads((tmp_path / "out" / "config.json").read_text())
  assert told["torch_dtype"] == "bfloat16"
  again = subprocess.run(
    [*command, f"--output={tmp_path / 'out'}"],
    capture_output=True,
    text=True,
    check=False,
    cwd=ROOT,
  )
  assert again.returncode != 0
  assert "is there already: name another folder" in again.stderr
