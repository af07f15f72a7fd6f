"""What a step holds beside its state: closed forms, and what XLA takes for the compiled step."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

import eco_optax as eco
from eco_optax.training import activations, loop
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig

FP8 = eco.FP8.transposed
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MODEL = TransformerConfig(6, 64, 2, 256, mlp_width=192, loss_chunks=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_made_again_leaves_its_input(dtype):
  model = dataclasses.replace(MODEL, remat="full", dtype=dtype)
  more = dataclasses.replace(model, layers=7)
  added = activations.kept(more, FP8, 16, 128) - activations.kept(model, FP8, 16, 128)
  assert added == 16 * 128 * 64 * jnp.dtype(dtype).itemsize


def test_what_is_kept_grows_with_tokens_and_not_with_parameters():
  # Beside it: the rotary table and numbers of layers, the same for any batch.
  one, two, three = (activations.kept(MODEL, FP8, n, 128) for n in (1, 2, 3))
  assert three - two == two - one > 0
  floats = activations.kept(MODEL, None, 2, 128)
  assert floats < 1.2 * two


@pytest.mark.parametrize("remat", activations.REMAT)
def test_a_compiled_step_takes_as_much(remat):
  model = dataclasses.replace(MODEL, remat=remat)
  count = lambda layers, remat: activations.kept(
    dataclasses.replace(model, layers=layers, remat=remat), FP8, 16, 128
  )
  loss = lambda params, tokens: transformer.loss(model, params, tokens)
  step = jax.jit(eco.value_and_grad(loss, dense=False, has_aux=True))
  params = jax.eval_shape(lambda: transformer.init(model, 0, FP8))
  compiled = step.lower(params, jax.ShapeDtypeStruct((16, 129), jnp.int32)).compile()
  of_layer = lambda remat: count(7, remat) - count(6, remat)
  # The backward pass adds the arrays that it makes again for one layer.
  expected = count(6, remat) + of_layer("none") - of_layer(remat)
  # Logits, cotangents and what XLA copies come on top.
  assert expected < compiled.memory_analysis().temp_size_in_bytes < 1.3 * expected


@pytest.mark.standard_promotion
def test_a_dry_run_says_what_each_choice_costs():
  config = runpy.run_path(CONFIGS / "llama_800m.py")["get_config"]()
  config.update(batch_size=32, accumulation=1)
  text = loop.dry_run(config, jax.devices()[:1])
  lines = text.split("activations per device, 32 × 512 tokens at a time\n")[1].splitlines()
  found = (line.rsplit("  ", 1) for line in lines)
  rows = {name.strip(): int(n.replace(",", "")) for name, n in found}
  kept = [n for name, n in rows.items() if name.startswith("kept, remat=")]
  assert kept == sorted(kept, reverse=True)
  assert len(kept) == 3
  (own,) = (name for name in rows if name.endswith("(this run)"))
  assert own.startswith("kept, remat=full")
  assert rows["logits, one of 4 parts, made again"] == 32 * 512 // 4 * 32128 * 4
  # Codes' gradients in bfloat16, the others in float32.
  packed, others = 822_083_584, 953_747_456 - 822_083_584
  assert rows["gradients"] == 2 * packed + 4 * others


@pytest.mark.standard_promotion
def test_a_released_step_keeps_inputs_alone():
  config = runpy.run_path(CONFIGS / "llama3_8b.py")["get_config"]()
  text = loop.dry_run(config, jax.devices()[:1])
  inputs = 32 * 16 * 2048 * (4096 + 4)  # FP8 codes, and a scale for each token.
  assert f"layers' inputs of all micro-batches  {inputs:,}" in text
