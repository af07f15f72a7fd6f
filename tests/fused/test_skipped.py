"""A step whose gradients' scale is not finite changes nothing, whoever takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax.fused import cpu
from eco_optax.fused.step import definition
from tests.fused import fused_leaves

BACKENDS = {
  "definition": definition,
  "cpu": cpu.by_rows,
  "tpu": fused_leaves.by_interpreted_panels,
  "gpu": fused_leaves.by_interpreted_tiles,
}
# Formats whose kernels differ in who finds scales, and where these lie.
FORMATS = ("FP8", "INT4", "MXFP8", "NVFP4")


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = (np.asarray(z).view(f"u{z.dtype.itemsize}") for z in (x, y))
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("moments_in", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leaf_stays_as_it_is_to_the_bit(backend, name, moments_in):
  own = fused_leaves.STEPS["adamw"]
  leaf = fused_leaves.make(own, getattr(eco, name), (2, 128, 256), moments_in=moments_in)
  if leaf.weight.format.granularity == "channel":
    # A scale that no step would choose, so that one made again would show.
    leaf = leaf._replace(weight=leaf.weight.__class__(
      leaf.weight.qvalue, leaf.weight.scale * 1.7, leaf.weight.format
    ))  # fmt: skip
  step = jax.jit(BACKENDS[backend], static_argnums=(0, 1))
  take = lambda own, clip: step(
    own, "stochastic", leaf._replace(scalars=leaf.scalars._replace(clip=jnp.float32(clip)))
  )
  skips = own._replace(skips=True)
  same(take(skips, np.nan), leaf.results)
  same(take(skips, np.inf), leaf.results)
  # Programs that differ may contract other products and sums, and so round a few weights apart.
  moved = take(skips, 0.5)
  pairs = zip(jax.tree.leaves(moved), jax.tree.leaves(take(own, 0.5)), strict=True)
  for a, b in ((np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in pairs):
    assert np.mean(~np.isclose(a, b, rtol=1e-5, atol=1e-12)) < 1e-3
  assert np.any(np.asarray(moved[1][0].qvalue if moments_in != "float32" else moved[1][0]))
  assert not np.array_equal(
    np.asarray(moved[0].qvalue).view(np.uint8), np.asarray(leaf.weight.qvalue).view(np.uint8)
  )


MAKERS = {
  "adamw": lambda: eco.adamw(1e-2),
  "sgd": lambda: eco.sgd(1e-2),
  "naive": lambda: eco.chain(optax.adamw(1e-2), eco.quantize_params()),
  "general": lambda: eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params()),
  "master weights": lambda: eco.master_weights(optax.adamw(1e-2), eco.quantize_params(), "int8"),
  "8-bit moments": lambda: eco.layer_by_layer(eco.low_bit_moments(eco.adamw(1e-2))),
  "factored": lambda: eco.low_bit_moments(eco.adamw(1e-2), nu="factored"),
  "general in 8 bits": lambda: eco.layer_by_layer(
    eco.low_bit_moments(eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params()))
  ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_of_an_optimizer_is_skipped(name):
  draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
  params = {
    "stack": {"kernel": draw(0, (3, 64, 32))},
    "kernel": draw(1, (64, 32)),
    "bias": draw(2, (8,)),
  }
  params = eco.quantize(params, eco.FP8, where=lambda path, leaf: "kernel" in path)
  tx = MAKERS[name]()
  grads = jax.tree.map(lambda x: 0.1 * x, eco.dequantize(params))
  update = jax.jit(
    lambda state, params, scale: tx.update(grads, state, params, gradient_scale=scale)
  )

  def step(state, params, scale):
    updates, state = update(state, params, scale)
    return state, eco.apply_updates(params, updates)

  state, params = step(tx.init(params), params, 1.0)
  for bad in (np.nan, np.inf, -np.inf):
    same(step(state, params, bad), (state, params))
  # A scale of one is no scale.
  updates, plain_state = jax.jit(tx.update)(grads, state, params)
  close = lambda a, b: np.testing.assert_allclose(
    np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-8
  )
  jax.tree.map(close, step(state, params, 1.0), (plain_state, eco.apply_updates(params, updates)))
