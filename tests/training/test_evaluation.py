"""What a trained run is worth, against logits that NumPy sums up."""

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, loop
from eco_optax.training.data import corpus, shards
from eco_optax.training.models import transformer

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 32


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of a few steps, and the validation text of 1,003 bytes that it was told of."""
  folder = tmp_path_factory.mktemp("run")
  config = config_lib.small()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64)
  config.update(batch_size=16, length=LENGTH, steps=20, evaluate_every=20, log_every=20)
  config.optimizer.learning_rate = 1e-2
  config.checkpoint.every = 10
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    data = corpus.standard_library_dataset()
    data = data._replace(validation=shards.TokenStream([data.validation.read(0, 1003)]))
    patch.setattr(corpus, "standard_library_dataset", lambda: data)
    loop.train(config, folder)
  return folder, data


@pytest.fixture(scope="module")
def trained(workdir):
  with jax.numpy_dtype_promotion("standard"):
    return evaluation.load(workdir[0])


@functools.cache
def logits_of(model):
  return jax.jit(lambda params, tokens: transformer.apply(model, params, tokens))


def nats_of(trained, window):
  """Of each token but the first, in float64."""
  tokens = np.zeros((1, LENGTH), np.int32)
  tokens[0, : len(window) - 1] = window[:-1]
  logits = logits_of(trained.model)(trained.params, tokens)[0, : len(window) - 1]
  logits = np.asarray(logits, np.float64)
  largest = logits.max(-1, keepdims=True)
  log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
  return log_sum - logits[np.arange(len(window) - 1), window[1:]], logits.argmax(-1) == window[1:]


def test_every_token_of_a_text_counts_once(workdir, trained):
  stream = workdir[1].validation
  tokens = stream.read(0, len(stream))
  parts = [nats_of(trained, tokens[i : i + LENGTH + 1])[0] for i in range(0, 1002, LENGTH)]
  wanted = np.concatenate(parts)
  assert wanted.size == 1002
  found = evaluation.evaluate(trained, workdir[1])
  assert found.tokens == 1002
  # Logits of other batches differ in their last places.
  assert found.loss == pytest.approx(wanted.mean(), rel=1e-5)
  assert found.perplexity == pytest.approx(np.exp(wanted.mean()), rel=1e-4)
  assert found.nats_per_byte == pytest.approx(wanted.sum() / 1003, rel=1e-5)


def test_it_is_the_loss_that_the_run_reported(workdir, trained):
  """The run takes whole batches of whole windows, here 31 windows of which 16 make one."""
  folder, data = workdir
  one_batch = data._replace(
    validation=shards.TokenStream([data.validation.read(0, 16 * LENGTH + 1)])
  )
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  (reported,) = [row["validation_loss"] for row in rows if "validation_loss" in row]
  assert evaluation.evaluate(trained, one_batch).loss == pytest.approx(reported, rel=1e-5)
  assert trained.step == 20


def test_targets_that_are_not_trained_on_do_not_count(workdir, trained):
  tokens = workdir[1].validation.read(0, 200)
  mask = np.arange(200) % 3 == 0
  data = workdir[1]._replace(validation=shards.TokenStream([tokens], [mask]))
  found = evaluation.evaluate(trained, data)
  parts = [nats_of(trained, tokens[i : i + LENGTH + 1])[0] for i in range(0, 199, LENGTH)]
  wanted = np.concatenate(parts)[mask[1:]]
  assert found.tokens == wanted.size
  assert found.loss == pytest.approx(wanted.mean(), rel=1e-5)
  assert found.nats_per_byte is None


def test_greedy_text_is_the_likeliest_and_a_window_moves_along(trained):
  prompt = trained.tokenizer.encode("def evaluate(self):\n").tolist()
  written = list(trained.generate(prompt, 30))
  tokens = prompt + written
  assert len(written) == 30  # Longer than what fits in a window with the prompt.
  for i in range(len(prompt), len(tokens)):
    window = np.array([*tokens[max(0, i - LENGTH) : i], 0])
    assert nats_of(trained, np.array([*window[:-1], tokens[i]]))[1][-1]
  one, same, other = (list(trained.generate(prompt, 30, 1.0, seed)) for seed in (1, 1, 2))
  assert one == same != other


def test_a_mesh_that_the_caller_has_set_stays(workdir, trained):
  """One with explicit axes, which the run knows nothing of."""
  prompt = trained.tokenizer.encode("import ").tolist()
  windows = [np.arange(i, i + 9) for i in range(20)]
  wanted = list(trained.generate(prompt, 3)), [nats for nats, _ in trained.scores(windows)]
  own = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
  with jax.set_mesh(own):
    again = evaluation.load(workdir[0])
    written, nats = [], []
    for token in again.generate(prompt, 3):
      written.append(token)
      assert jax.sharding.get_abstract_mesh() == own.abstract_mesh
    for scored, _ in again.scores(windows):
      nats.append(scored)
      assert jax.sharding.get_abstract_mesh() == own.abstract_mesh
  assert written == wanted[0]
  np.testing.assert_array_equal(nats, wanted[1])


def test_a_run_is_read_and_not_changed(workdir, tmp_path):
  folder, _ = workdir
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  command = [sys.executable, ROOT / "scripts" / "evaluate.py", f"--workdir={folder}"]
  command += ["--prompt=import ", "--tokens=5", f"--output={tmp_path / 'text.json'}"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "at step 20 of 20\nimport " in done.stdout
  figures = json.loads((tmp_path / "text.json").read_text())
  assert len(figures["tokens"]) <= 5
  assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_what_is_no_run_is_named(workdir, trained, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no run\.json: it is not the workdir"):
    evaluation.load(tmp_path)
  (tmp_path / "run.json").write_text((workdir[0] / "run.json").read_text())
  with pytest.raises(FileNotFoundError, match="has no checkpoint: let the run go on"):
    evaluation.load(tmp_path)
  with pytest.raises(ValueError, match="the data has 300 tokens and the model 256"):
    evaluation.evaluate(trained, workdir[1]._replace(vocabulary=300))
  other = {"tokenizer": {"kind": "bpe", "sha256": "0"}}
  with pytest.raises(ValueError, match="tokens of another tokenizer than the run's"):
    evaluation.evaluate(trained, workdir[1]._replace(manifest=other))


CHOICE = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
WRITE = """
task: goes_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/write.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs eco_optax[eval]")
def test_tasks_of_lm_eval(trained, tmp_path, monkeypatch):
  """Whose right answers are those that the model's own logits give, but for one wrong one."""
  from eco_optax.training import lm_eval_model

  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  rows = []
  for question in ("import ", "def f(", "class A", "return "):
    choices = ["self", "xyz", "ret", "  "]
    ids = [trained.tokenizer.encode(question.rstrip() + question[len(question.rstrip()) :] + c)
           for c in choices]  # fmt: skip
    start = len(trained.tokenizer.encode(question.rstrip()))
    losses = [nats_of(trained, x)[0][start - 1 :].sum() for x in ids]
    rows.append({"question": question, "choices": choices, "answer": int(np.argmin(losses))})
  rows[0]["answer"] = (rows[0]["answer"] + 1) % 4
  (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  texts = []
  for prompt in ("import os", "for x in y"):
    ids = trained.generate(trained.tokenizer.encode(prompt).tolist(), 8)
    texts.append({"prompt": prompt, "text": trained.tokenizer.decode(list(ids))})
  texts.append({"prompt": "if", "text": "not this"})
  (tmp_path / "write.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
  (tmp_path / "letters.yaml").write_text(CHOICE.format(folder=tmp_path))
  (tmp_path / "goes_on.yaml").write_text(WRITE.format(folder=tmp_path))
  found = lm_eval_model.run(trained, ["letters", "goes_on"], str(tmp_path))
  assert found["letters"]["acc,none"] == 0.75
  assert found["goes_on"]["exact_match,none"] == pytest.approx(2 / 3)

  model = lm_eval_model.TrainedLM(trained)
  request = type("Request", (), {"args": ("x = 1\n" * 20,)})
  (total,) = model.loglikelihood_rolling([request])
  tokens = np.array([0, *trained.tokenizer.encode("x = 1\n" * 20)])
  parts = [nats_of(trained, tokens[i : i + LENGTH + 1])[0] for i in range(0, 120, LENGTH)]
  assert total == pytest.approx(-np.concatenate(parts).sum(), rel=1e-5)
