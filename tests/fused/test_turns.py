"""Many small leaves of one kind on a CPU: steps by turns, in a program that is compiled for one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax.fused import cpu


def many(count, format=eco.FP8):
  rng = np.random.default_rng(0)
  layers = {
    f"layer_{i}": {
      "kernel": jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=32), jnp.float32),
    }
    for i in range(count)
  }
  return eco.quantize(layers, format, where=lambda path, x: x.ndim > 1)


def stepped(tx, params, scales=(1.0, jnp.inf, 0.5)):
  """Weights and state after steps with random gradients; one of them is skipped."""
  rng = np.random.default_rng(1)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)

  @jax.jit
  def step(params, state, grads, scale):
    updates, state = tx.update(grads, state, params, gradient_scale=scale)
    return eco.apply_updates(params, updates), state

  state = tx.init(params)
  for scale in scales:
    grads = jax.tree.map(draw, eco.dequantize(params))
    params, state = step(params, state, grads, jnp.float32(scale))
  return params, state


def assert_equal(found, wanted):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def taken(monkeypatch):
  """Numbers of leaves that steps are taken of by turns, and of the loops that these make."""
  lengths, by_turns = [], cpu.by_turns
  record = lambda take, leaves: lengths.append(len(leaves)) or by_turns(take, leaves)
  monkeypatch.setattr(cpu, "by_turns", record)
  return lengths


@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.NVFP4], ids=str)
@pytest.mark.parametrize("nu", ["float8_e4m3fn", "factored"])
def test_turns_are_the_steps_of_leaves_to_the_bit(monkeypatch, taken, format, nu):
  # In loops of three, three and two leaves.
  monkeypatch.setattr(cpu, "_TURNS", 3 * 64 * 32)
  params = many(8, format)
  tx = lambda fused: eco.low_bit_moments(eco.adamw(1e-2, fused=fused), nu=nu)
  found = stepped(tx(True), params)
  assert taken == [8, 3, 3, 2]
  assert_equal(found, stepped(tx(False), params))
  monkeypatch.setattr(cpu, "FEWEST_TURNS", 9)
  assert_equal(found, stepped(tx(True), params))
  assert taken == [8, 3, 3, 2]


def test_leaves_of_other_kinds_keep_to_themselves(taken):
  """Of another decay, shape or format, and fewer than are worth a loop."""
  params = many(5)
  params["wide"] = eco.quantize(jnp.ones((64, 96)), eco.FP8)
  params["int4"] = eco.quantize(jnp.ones((64, 32)), eco.INT4)
  mask = lambda tree: {name: name != "layer_3" for name in tree}
  tx = lambda fused: eco.low_bit_moments(eco.adamw(1e-2, weight_decay=0.3, mask=mask, fused=fused))
  assert_equal(stepped(tx(True), params), stepped(tx(False), params))
  assert taken == [4]


def instructions(count, tx):
  """Instructions of a compiled step, and its kernels without their names."""
  params = many(count)
  state = tx.init(params)
  text = jax.jit(tx.update).lower(eco.dequantize(params), state, params).compile().as_text()
  bodies = re.findall(r"^%fused_computation[^\n]*\{\n(.*?)^\}", text, re.M | re.S)
  return len(re.findall(r"^ +\S+ = ", text, re.M)), {
    re.sub(r"metadata=\{[^}]*\}|%[\w.\-]+", "", body) for body in bodies
  }


def test_the_step_of_one_more_leaf_is_a_few_instructions():
  tx = eco.low_bit_moments(eco.adamw(1e-2))
  (eight, _), (twelve, _) = instructions(8, tx), instructions(12, tx)
  alone, _ = instructions(1, tx)
  assert twelve - eight < 4 * alone / 8


@pytest.mark.parametrize(
  "tx",
  [
    eco.adamw(1e-2),
    eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params()),
  ],
  ids=["fused", "general"],
)
def test_kernels_of_leaves_that_differ_in_their_random_bits_are_equal(tx):
  """XLA compiles equal kernels once, and one with a constant of its own for each leaf."""
  assert len(instructions(6, tx)[1]) == len(instructions(3, tx)[1])
