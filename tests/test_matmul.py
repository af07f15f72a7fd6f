"""matmul against NumPy: values, and gradients that go straight through the rounding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco

FORMATS = {
  "float": None,
  "fp8": eco.FP8,
  "fp8 by input": eco.Format("float8_e4m3fn", "channel", contraction_axis=-1),
  "int4": eco.INT4,
  "blocks": eco.Format("float8_e4m3fn", (8, 4)),
  "mxfp4": eco.MXFP4,
  "nvfp4": eco.NVFP4,
}


def float64_quantized_tokens(x):
  """E4M3 with one scale per token, from ml_dtypes' own cast."""
  import ml_dtypes

  scale = np.abs(x).max(-1, keepdims=True) / np.float32(448)
  return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


@pytest.mark.parametrize(
  ("name", "activations"), list(itertools.product(FORMATS, [None, eco.FP8_TOKEN]))
)
def test_product_and_gradients(name, activations):
  generator = np.random.default_rng(0)
  x = generator.standard_normal((3, 5, 32)).astype(np.float32)
  dense = generator.standard_normal((32, 8)).astype(np.float32)
  target = generator.standard_normal((3, 5, 8)).astype(np.float32)
  params = {"w": jnp.asarray(dense)}
  if FORMATS[name] is not None:
    params = eco.quantize(params, FORMATS[name])
  stored = np.asarray(eco.dequantize(params)["w"], np.float64)
  seen = float64_quantized_tokens(x) if activations else x.astype(np.float64)

  def loss(params, x):
    return jnp.sum(eco.matmul(x, params["w"], activations) * target)

  both = jax.jit(
    lambda p, x: (
      eco.value_and_grad(loss, dense=False)(p, x),
      jax.grad(loss, argnums=1)(p, x),
    )
  )
  (value, grads), dx = both(params, jnp.asarray(x))
  # Sums of 32 to 120 float32 products of order 1.
  np.testing.assert_allclose(value, np.sum(seen @ stored * target), rtol=1e-4)
  assert grads["w"].dtype == jnp.float32
  np.testing.assert_allclose(grads["w"], np.einsum("abi,abo->io", seen, target), atol=2e-5)
  np.testing.assert_allclose(dx, target @ stored.T, atol=2e-5)


def test_stacked_kernels_in_a_scan():
  generator = np.random.default_rng(0)
  kernels = jnp.asarray(generator.standard_normal((4, 8, 8)), jnp.float32) / 3
  params = eco.quantize({"w": kernels}, eco.FP8)
  x = jnp.asarray(generator.standard_normal((2, 8)), jnp.float32)

  def scanned(params):
    return jnp.sum(jax.lax.scan(lambda y, w: (eco.matmul(y, w), None), x, params["w"])[0] ** 2)

  def unrolled(params):
    y = x
    for w in params["w"]:
      y = y @ w
    return jnp.sum(y**2)

  value, grads = jax.jit(eco.value_and_grad(scanned, dense=False))(params)
  wanted, wanted_grads = jax.value_and_grad(unrolled)(eco.dequantize(params))
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(grads["w"], wanted_grads["w"], rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_keep_their_dtype():
  w = eco.quantize(jnp.eye(16) * 0.3, eco.FP8)
  y = eco.matmul(jnp.ones((2, 16), jnp.bfloat16), w, eco.FP8_TOKEN)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), 0.3, rtol=2**-8)


@pytest.mark.parametrize("shape", [(2, 7), ()])
def test_shapes_that_do_not_fit_are_named(shape):
  with pytest.raises(ValueError, match=r"takes \(…, in\) and \(in, out\)"):
    eco.matmul(jnp.ones(shape), eco.quantize(jnp.ones((8, 4)), eco.FP8))
