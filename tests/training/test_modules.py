"""Each part of a Transformer by itself, against its definition in float64 NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_transformer
import pytest
from flax import nnx

import eco_optax as eco
from eco_optax.training.models import modules, transformer

TINY = transformer.TransformerConfig(layers=2, width=16, heads=4, vocabulary=7, mlp_width=24)
ROUTED = dataclasses.replace(TINY, experts=5, experts_per_token=2, expert_width=8)
B, L = 2, 11

# Sums of at most 24 float32 products and a few functions of them, one after another: some ten
# roundings of 6e-8 each, at values of order 1 to 10.
ROUNDOFF = {"rtol": 1e-5, "atol": 1e-5}


def rngs(seed=0):
  return nnx.Rngs(params=jax.random.key(seed))


def inputs(*shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomize(module, seed=0):
  """Fills a module with weights of order 1/√in and norm scales near 1; returns them as a dict."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    x = generator.standard_normal(leaf.shape)
    # Norm scales vary about a number that is neither 0 nor 1, so that a wrong offset shows.
    inputs = leaf.shape[-2] if leaf.ndim > 1 else 1  # A bias has none.
    x = 0.7 + 0.3 * x if path[-1].key == "scale" else x * 1.5 / math.sqrt(inputs)
    return jnp.asarray(x, jnp.float32)

  state = nnx.state(module, nnx.Param)
  params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
  nnx.replace_by_pure_dict(state, params)
  nnx.update(module, state)
  return numpy_transformer.float64(params)


@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm(offset):
  # An epsilon of the order of the mean square, so that its place in the formula matters.
  config = dataclasses.replace(TINY, norm_offset=offset, norm_epsilon=0.5)
  norm, x = modules.RMSNorm(config, 16), inputs(B, L, 16)
  start = numpy_transformer.rms_norm(config, np.full(16, 0.0 if offset else 1.0), x)
  np.testing.assert_allclose(norm(jnp.asarray(x)), start, **ROUNDOFF)
  p = randomize(norm)
  wanted = numpy_transformer.rms_norm(config, p["scale"], x.astype(np.float64))
  np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, **ROUNDOFF)


def test_rms_norm_of_bfloat16_rounds_once():
  norm, x = modules.RMSNorm(TINY, 16), inputs(B, L, 16).astype(ml_dtypes.bfloat16)
  p = randomize(norm)
  y = norm(jnp.asarray(x))
  assert y.dtype == jnp.bfloat16
  wanted = numpy_transformer.rms_norm(TINY, p["scale"], x.astype(np.float64))
  # Half a step of bfloat16's 8 bits is 2⁻⁸ of the value at most, plus a float32 roundoff.
  np.testing.assert_allclose(y.astype(jnp.float32), wanted, rtol=2**-8 + 1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("base", [10_000.0, 50.0])
def test_rotate(interleaved, base):
  config = dataclasses.replace(TINY, head_width=6, rope_base=base)
  x = inputs(B, 40, 3, 6)
  y = modules.rotate(jnp.asarray(x), modules.rotation(config, 40), interleaved)
  wanted = np.stack([numpy_transformer.rotate(s.astype(np.float64), base, interleaved) for s in x])
  # Angles of up to 39 radians have a float32 roundoff of 2e-6.
  np.testing.assert_allclose(y, wanted, atol=1e-5)
  assert np.abs(y - x).max() > 1


WINDOW = {"window": 3, "global_every": 2, "local_rope_base": 100.0}  # Layer 0 is local, 1 global.
ATTENTIONS = {
  "multi-head": ({}, 0),
  "grouped": ({"kv_heads": 2}, 0),
  "one key and value": ({"kv_heads": 1, "head_width": 6, "rope_interleaved": False}, 0),
  "local": ({**WINDOW, "kv_heads": 2}, 0),
  "global": ({**WINDOW, "kv_heads": 2}, 1),
  "itself alone": ({**WINDOW, "window": 1}, 0),
  "norms of queries and keys": ({"qk_norm": True}, 0),
  "norms with offset": ({"qk_norm": True, "norm_offset": True, "kv_heads": 2}, 0),
  "one norm for all heads": ({"qk_norm": True, "joint_qk_norm": True, "kv_heads": 2}, 0),
  "biases": ({"qkv_bias": True, "kv_heads": 2}, 0),
  "capped logits": ({**WINDOW, "attention_cap": 1.5, "query_scalar": 3.0, "kv_heads": 2}, 0),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
  changes, layer = ATTENTIONS[name]
  config = dataclasses.replace(TINY, **changes)
  is_local = config.window > 0 and layer == 0
  attention, x = modules.Attention(config, rngs()), 2 * inputs(B, L, 16)
  p = randomize(attention)
  angle = modules.rotation(config, L, is_global=not is_local)
  y = attention(jnp.asarray(x), angle, jnp.asarray(not is_local))
  wanted = np.stack([numpy_transformer.attention(config, p, s, layer) for s in x])
  np.testing.assert_allclose(y, wanted, **ROUNDOFF)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(activation, gated):
  config = dataclasses.replace(TINY, activation=activation, gated=gated)
  mlp, x = modules.MLP(config, 24, rngs()), inputs(B, L, 16)
  p = randomize(mlp)
  assert set(p) == ({"gate", "up", "down"} if gated else {"up", "down"})
  wanted = numpy_transformer.mlp(config, p, x.astype(np.float64))
  # The exact form of GELU differs from the tanh form by up to 5e-4.
  np.testing.assert_allclose(mlp(jnp.asarray(x)), wanted, **ROUNDOFF)


def check_experts(config, moe, p, x):
  """Holds all outputs of a RoutedExperts to the definition; returns the share dropped."""
  # Float32 and float64 must agree on who is chosen: no two probabilities may be about equal
  # unless they are equal to the last bit, as with a router of zeros.
  ordered = np.sort(numpy_transformer.softmax(x @ p["router"]), -1)
  gaps = np.diff(ordered, axis=-1)
  assert np.min(gaps[gaps > 0], initial=1) > 1e-5
  y, aux = moe(jnp.asarray(x))
  outs, drops, losses = zip(
    *(numpy_transformer.routed_experts(config, p, s.astype(np.float64)) for s in x), strict=True
  )
  np.testing.assert_allclose(y, np.stack(outs), **ROUNDOFF)
  np.testing.assert_allclose(aux["dropped"], np.mean(drops), atol=1e-6)
  np.testing.assert_allclose(aux["balance_loss"], np.mean(losses), rtol=1e-5)
  return np.mean(drops)


EXPERTS = {
  "one each": {"experts_per_token": 1},
  "two each": {},
  "all": {"experts_per_token": 5},
  "normalized": {"normalize_expert_weights": True, "experts_per_token": 3},
  "shared": {"shared_experts": 2},
  "without gate": {"gated": False, "activation": "gelu"},
}


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("capacity_factor", [None, 0.9])
def test_routed_experts(name, capacity_factor):
  config = dataclasses.replace(ROUTED, capacity_factor=capacity_factor, **EXPERTS[name])
  moe, x = modules.RoutedExperts(config, rngs()), inputs(B, L, 16)
  p = randomize(moe)
  dropped = check_experts(config, moe, p, x)
  # With all experts for every token, each is asked for 11 rows, and has ⌈0.9 × 11⌉ = 10.
  assert dropped == 0 if capacity_factor is None else dropped > 0.05
  if name == "all" and capacity_factor:
    assert dropped == pytest.approx(1 / 11)
  if name == "shared":
    assert p["shared"]["up"]["kernel"].shape == (16, 2 * 8)


def one_sided(config):
  """Experts and inputs whose router sends every token to expert 3 first."""
  moe, x = modules.RoutedExperts(config, rngs()), inputs(B, L, 16)
  p = randomize(moe)
  x[..., 0] = 1
  router = p["router"].copy()
  router[0, 3] = 30
  moe.router.set_value(jnp.asarray(router, jnp.float32))
  return moe, {**p, "router": router}, x


def test_without_capacity_factor_nothing_is_dropped_even_by_one_sided_routers():
  config = dataclasses.replace(ROUTED, experts_per_token=1)
  moe, p, x = one_sided(config)
  y, aux = moe(jnp.asarray(x))
  assert float(aux["dropped"]) == 0
  # The one expert's probability is 1 up to e⁻²⁰.
  expert = numpy_transformer.layer_of(p["experts"], 3)
  np.testing.assert_allclose(y, numpy_transformer.mlp(config, expert, x), **ROUNDOFF)
  # All assignments and all probability on one of five.
  np.testing.assert_allclose(aux["balance_loss"], 5, rtol=1e-5)


def test_capacity_keeps_the_first_positions_of_every_sequence():
  config = dataclasses.replace(ROUTED, experts_per_token=1, capacity_factor=1.0)
  moe, p, x = one_sided(config)
  y, aux = moe(jnp.asarray(x))
  expert = numpy_transformer.layer_of(p["experts"], 3)
  rows = 3  # ⌈11 / 5⌉
  np.testing.assert_allclose(
    y[:, :rows], numpy_transformer.mlp(config, expert, x[:, :rows]), **ROUNDOFF
  )
  np.testing.assert_array_equal(y[:, rows:], 0)
  np.testing.assert_allclose(aux["dropped"], 1 - rows / L, rtol=1e-6)


def test_of_equal_experts_the_first_are_chosen_and_an_even_router_has_a_balance_loss_of_one():
  config = dataclasses.replace(ROUTED, capacity_factor=1.0)
  moe, x = modules.RoutedExperts(config, rngs()), inputs(B, L, 16)
  p = {**randomize(moe), "router": np.zeros((16, 5))}
  moe.router.set_value(jnp.zeros((16, 5)))
  # Experts 0 and 1 are asked for all 11 rows and have ⌈22 / 5⌉ = 5 of them.
  assert check_experts(config, moe, p, x) == pytest.approx(6 / 11)
  np.testing.assert_allclose(moe(jnp.asarray(x))[1]["balance_loss"], 1, rtol=1e-6)


def float64_tokens(x):
  """E4M3 values with one scale per token, by ml_dtypes' own cast."""
  scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(448), np.float32(2.0**-126))
  return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize("packed", [False, True])
def test_linear_quantizes_its_inputs_where_it_is_packed(packed):
  config = dataclasses.replace(TINY, activation_format=eco.FP8_TOKEN)
  linear = modules.Linear(config, 16, 8, rngs())
  x = inputs(B, 5, 16)
  x[0, 0] = 0  # As rows of zeros that fill up a block of an expert.
  if packed:
    linear.kernel.set_value(eco.quantize(linear.kernel.get_value(), eco.FP8.transposed))
  kernel = np.asarray(eco.dequantize(linear.kernel.get_value()), np.float64).T
  seen = float64_tokens(x) if packed else x
  # Sums of 16 float32 products at values of order 0.1.
  np.testing.assert_allclose(linear(jnp.asarray(x)), seen @ kernel, atol=1e-6)
  # Rounding the inputs moves the result by a thousand times as much.
  assert np.abs(float64_tokens(x) @ kernel - x @ kernel).max() > 1e-3
