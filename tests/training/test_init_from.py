"""Runs that start from a Hugging Face checkpoint."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.interop import hugging_face
from eco_optax.training import config as config_lib
from eco_optax.training import loop, methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline, shards
from eco_optax.training.models import tables, transformer

pytest.importorskip("safetensors")
# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def small(**changes):
  config = config_lib.small()
  config.model.update(layers=2, width=32, heads=2, mlp_width=64)
  config.update(batch_size=8, length=32, steps=4, evaluate_every=4, log_every=2, **changes)
  return config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Float weights of another seed, and their folder."""
  folder = tmp_path_factory.mktemp("checkpoint") / "llama"
  model = config_lib.model(small(method="bf16_mw"))
  params = jax.jit(transformer.init, static_argnums=(0, 1))(model, 7)
  hugging_face.save(folder, params, model)
  return folder, params


def first_state(config, sizes):
  mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
  return step_lib.init_state(config, methods.optimizer(config), mesh)


ONE, FOUR = {"fsdp": 1}, {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  ("method", "sizes"),
  [("eco_sr", ONE), ("eco_sr", FOUR), ("naive_rtn", ONE), ("bf16_mw", FOUR)],
  ids=str,
)
def test_weights_are_the_checkpoints(checkpoint, method, sizes):
  folder, params = checkpoint
  state = first_state(small(method=method, format="INT4", init_from=str(folder)), sizes)
  if method != "bf16_mw":
    params = eco.quantize(params, eco.INT4.transposed, transformer.is_block_kernel)
  assert jax.tree.structure(state.params) == jax.tree.structure(params)
  for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
  ("method", "residual"), [("mw_rtn", "float32"), ("mw_rtn", "int8"), ("mw_sr", "int8")]
)
def test_master_weights_start_in_float(checkpoint, method, residual):
  folder, params = checkpoint
  config = small(method=method, residual=residual, format="INT4", init_from=str(folder))
  state = first_state(config, {"fsdp": 2})
  stored = eco.dequantize(state.params)
  is_state = lambda x: hasattr(x, "residual")
  (master,) = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_state) if is_state(x)]
  kernel = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]
  wanted, step = kernel(params), np.asarray(kernel(state.params).scale)
  left = np.abs(wanted - kernel(stored)) / step
  assert 0.1 < left.max() <= (0.5 if method == "mw_rtn" else 1.0) + 1e-5
  if residual == "float32":
    np.testing.assert_allclose(
      kernel(stored) + kernel(master.residual), wanted, atol=1e-7, rtol=1e-6
    )
  else:  # 127 parts of the largest error each way, drawn.
    largest = 0.5 if method == "mw_rtn" else 1.0
    decoded = np.asarray(kernel(master.residual), np.float32) * largest / 127 * step
    off = np.abs(kernel(stored) + decoded - wanted) / step
    assert off.max() <= largest / 127 * 1.01
  for name in ("embedding", "head"):
    np.testing.assert_allclose(state.params[name], params[name], rtol=1e-6)


def test_a_run_trains_from_it_and_goes_on_without_it(checkpoint, tmp_path, monkeypatch):
  folder, _ = checkpoint
  data = corpus.standard_library_dataset()
  data = data._replace(validation=shards.TokenStream([data.validation.read(0, 1003)]))
  monkeypatch.setattr(corpus, "standard_library_dataset", lambda: data)
  config = small(init_from=str(folder), seed=3)
  config.checkpoint.every = 2
  before = loop.train(config, tmp_path / "run")
  assert before["validation_loss"] < 6
  # What is saved does not need the checkpoint any more.
  config.init_from, config.steps = "", 4
  assert loop.train(config, tmp_path / "run")["validation_loss"] == before["validation_loss"]


# Torch and JAX are better off apart.
DRAW_LLAMA = """
import sys, torch, transformers
torch.manual_seed(0)
rope = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0)
rope |= dict(high_freq_factor=4.0, original_max_position_embeddings=64)
config = transformers.LlamaConfig(
  hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
  intermediate_size=48, vocab_size=256, rms_norm_eps=1e-5, rope_parameters=rope,
)
transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""


def test_everything_packed_and_released_is_fine_tuned_and_goes_on(
  tmp_path, monkeypatch, traced_once
):
  """What configs/llama3_8b.py does, with a small model that transformers made."""
  if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    pytest.skip("needs torch and transformers")
  folder = tmp_path / "llama"
  subprocess.run([sys.executable, "-c", DRAW_LLAMA, str(folder)], check=True, timeout=300)
  config = small(init_from=str(folder), release=True, kept_format="FP8_TOKEN")
  config.model.update(hugging_face.read_config(folder))
  config.model.update(quantized="all", vocabulary_parts=2)
  config.moments.update(mu="float8_e4m3fn", nu="factored")
  config.dtype = config.gradient_dtype = "bfloat16"
  config.update(batch_size=16, accumulation=2, steps=4, evaluate_batches=1)
  config.checkpoint.every = 4
  config.optimizer.clip = "layer"

  # The parameters are the checkpoint's, rounded.
  model = config_lib.model(config)
  model = dataclasses.replace(model, quantized="blocks", vocabulary_parts=1)
  dense = jax.eval_shape(lambda: transformer.init(model, 0))
  dense = hugging_face.load(folder, dense, model)
  params = first_state(config, {"fsdp": 2}).params
  rows = tables.row_format(eco.FP8)
  for name, x in (("embedding", dense["embedding"]), ("head", dense["head"].T)):
    wanted = eco.quantize({name: x.reshape(2, 128, 32)}, rows)[name]
    jax.tree.map(np.testing.assert_array_equal, params[name]["rows"], wanted)

  data = corpus.standard_library_dataset()
  data = data._replace(validation=shards.TokenStream([data.validation.read(0, 1003)]))
  monkeypatch.setattr(corpus, "standard_library_dataset", lambda: data)
  whole = loop.train(config, tmp_path / "whole")
  honest = pipeline.batches

  def batches(windows, start, *args):
    for number, batch in enumerate(honest(windows, start, *args), start + 1):
      if number == 3:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  with monkeypatch.context() as patch:
    patch.setattr(pipeline, "batches", batches)
    with pytest.raises(SystemExit):
      loop.train(config, tmp_path / "stopped")
  resumed = loop.train(config, tmp_path / "stopped")
  assert resumed["validation_loss"] == whole["validation_loss"]
  record = lambda run: json.loads((tmp_path / run / "checkpoints/4/record/metadata").read_text())
  assert record("stopped")["checksums"] == record("whole")["checksums"]


def test_another_model_is_named_before_anything_is_done(checkpoint):
  config = small(init_from=str(checkpoint[0]))
  config.model.layers = 3
  with pytest.raises(ValueError, match="layers is 3 and has to be 2"):
    loop.prepare(config)
