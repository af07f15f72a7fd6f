"""Adding a fused optimizer takes one file: its closed form, its step and its alias."""

import importlib.util
import sys
import textwrap

import fused_leaves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax.fused import cpu
from eco_optax.fused.leaf import Leaf
from eco_optax.fused.step import definition

# As CONTRIBUTING.md describes it. The momentum is optax.ema's: m̃ = β m + (1 − β) g, u = −η m̃.
FILE = textwrap.dedent("""
  from typing import Any, NamedTuple

  import jax.numpy as jnp
  import optax

  from eco_optax.fused.step import Step
  from eco_optax.fused.transformation import Optimizer
  from eco_optax.optimizers import build


  class Scalars(NamedTuple):
    scale: Any
    keep: Any
    new: Any
    rate: Any
    injection: Any


  def propose(s, gradient, moments, weight):
    momentum = s.keep * moments[0] + s.new * (gradient.astype(jnp.float32) * s.scale)
    return -s.rate * momentum, (momentum,)


  STEP = Step(Scalars, propose, lambda s, moments, error: s.injection * error)


  def averaged_sgd(learning_rate, decay=0.9, *, rounding="stochastic", seed=0):
    def scalars(state, count, scale, weight_decay):
      keep, rate = jnp.float32(decay), build.rate_at(learning_rate, count)
      injection, _ = build.injection_per_error(learning_rate, count, -rate * keep, keep)
      return Scalars(scale, keep, jnp.float32(1 - decay), rate, injection)

    optimizer = optax.chain(optax.ema(decay, debias=False), optax.scale(-learning_rate))
    return build.without_master_weights(
      optimizer, Optimizer(STEP, optax.EmaState, ("ema",), scalars), learning_rate, None, False,
      format=None, where=None, rounding=rounding, seed=seed,
    )
""")


@pytest.fixture
def toy(tmp_path):
  path = tmp_path / "averaged_sgd.py"
  path.write_text(FILE)
  spec = importlib.util.spec_from_file_location("averaged_sgd", path)
  module = sys.modules["averaged_sgd"] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  yield module
  del sys.modules["averaged_sgd"]


@pytest.mark.standard_promotion
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_a_new_optimizer_takes_the_step_of_the_general_path(toy, how):
  start = {
    "w": jax.random.normal(jax.random.key(0), (256, 128)),
    "b": jnp.zeros(128),
  }
  params = eco.quantize(start, eco.FP8, lambda path, leaf: path == "w")
  stock = optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))
  long = eco.error_feedback_to_momentum(stock, eco.quantize_params(rounding=how, seed=3), 0.1)
  short = toy.averaged_sgd(0.1, rounding=how, seed=3)
  text = str(jax.make_jaxpr(short.update)(eco.dequantize(params), short.init(params), params))
  assert "eco_fused_step" in text
  state = short.init(params)
  for i in range(3):
    grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), eco.dequantize(params))
    (found, new_state), (wanted, _) = (
      jax.jit(tx.update)(grads, state, params) for tx in (short, long)
    )
    differ = np.asarray(found["w"].qvalue != wanted["w"].qvalue)
    assert differ.sum() <= 1  # Where the last place of a product decides.
    np.testing.assert_allclose(found["b"], wanted["b"], rtol=1e-6)
    params, state = eco.apply_updates(params, found), new_state


@pytest.mark.parametrize("format", ["FP8", "MXFP8", "NVFP4"])
def test_every_backend_takes_a_new_optimizers_step(toy, format):
  """The kernels, interpreted, and the definition; none of them knows of it."""
  base = fused_leaves.make(fused_leaves.STEPS["sgd"], fused_leaves.FORMATS[format], (256, 128))
  scalars = toy.Scalars(*(jnp.float32(x) for x in (0.5, 0.9, 0.1, 1e-1, -3.0)))
  leaf = Leaf(scalars, *base[1:])
  wanted = fused_leaves.run(definition, toy.STEP, "stochastic", leaf)
  for implementation in (
    cpu.by_rows,
    fused_leaves.by_interpreted_panels,
    fused_leaves.by_interpreted_tiles,
  ):
    found = fused_leaves.run(implementation, toy.STEP, "stochastic", leaf)
    for a, b in zip(found, wanted, strict=True):
      a, b = (x.astype(np.float32) for x in (a, b))
      # Last places differ by the multiply-adds that a compiler fuses, and what is rounded there.
      assert np.mean(np.abs(a - b) > 1e-5 * np.max(np.abs(b))) <= 1e-4
