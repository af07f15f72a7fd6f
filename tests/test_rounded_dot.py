"""Products stored in 16 bits: whether the unit rounds its sums, or devices add theirs before."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eco_optax as eco
from eco_optax.rounded_dot import rounded_dot

TOKENS = ((0,), (0,))
P = PartitionSpec


def factors():
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(64, n)), jnp.bfloat16) for n in (16, 24)]


def wanted(a, b):
  sums = np.asarray(a, np.float64).T @ np.asarray(b, np.float64)
  return sums, jnp.asarray(sums, jnp.bfloat16)


@pytest.mark.parametrize("jit", [True, False])
def test_sums_are_float32_and_rounded_once(jit):
  a, b = factors()
  with jax.disable_jit(not jit):
    found = rounded_dot(a, b, TOKENS, jnp.bfloat16)
    exact = rounded_dot(a, b, TOKENS, jnp.float32)
  sums, rounded = wanted(a, b)
  assert found.dtype == jnp.bfloat16
  # Sums of 64 products differ in their order; a few then lie beyond the middle of two bfloat16.
  np.testing.assert_allclose(exact, sums, atol=1e-5)
  assert np.mean(np.asarray(found != rounded)) < 0.01
  np.testing.assert_allclose(np.asarray(found, np.float64), sums, rtol=2**-8, atol=1e-5)


def test_vmap_and_second_derivatives_are_those_of_a_product():
  a, b = factors()
  plain = lambda a, b: jnp.dot(a.T, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16)
  own = lambda a, b: rounded_dot(a, b, TOKENS, jnp.bfloat16)
  stack = jnp.stack([a, -2 * a])
  for axes in ((0, None), (0, 0)):
    of = stack, b if axes[1] is None else jnp.stack([b, b])
    np.testing.assert_array_equal(jax.vmap(own, axes)(*of), jax.vmap(plain, axes)(*of))
  loss = lambda f: lambda a, b: jnp.sum(jnp.sin(f(a, b).astype(jnp.float32)))
  for found, right in zip(
    jax.grad(loss(own), (0, 1))(a, b), jax.grad(loss(plain), (0, 1))(a, b), strict=True
  ):
    np.testing.assert_array_equal(found, right)


def on_four(kind=AxisType.Auto):
  return jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(kind,))


def stored(fn, *args, platform):
  """The dtypes of a program's products."""
  text = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
  return re.findall(r"dot_general.*-> tensor<[\dx]*x(\w+)>", text)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_only_a_device_by_itself_stores_sums_in_16_bits(platform):
  """Otherwise the compiler would add the parts of devices in 16 bits."""
  product = lambda a, b: rounded_dot(a, b, TOKENS, jnp.bfloat16)
  alone = "f32" if platform == "cpu" else "bf16"
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in factors()]
  assert stored(product, *shapes, platform=platform) == [alone]

  mesh = on_four()
  split = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("data"))) for x in shapes
  ]
  assert stored(product, *split, platform=platform) == ["f32"]
  parts = jax.shard_map(product, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  assert stored(parts, *split, platform=platform) == [alone]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_wider_factors_have_wider_sums(platform):
  """JAX has no product whose result is narrower than its factors."""
  wide, narrow = (jnp.ones((64, 16), dtype) for dtype in (jnp.float32, jnp.bfloat16))
  product = lambda a, b, dtype: lambda: rounded_dot(a, b, TOKENS, dtype)
  assert stored(product(wide, wide, jnp.bfloat16), platform=platform) == ["f32"]
  assert stored(product(narrow, narrow, jnp.float32), platform=platform) == ["f32"]
  found = product(wide, wide, jnp.bfloat16)()
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, jnp.full((16, 16), 64, jnp.bfloat16))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_split_tokens_are_added_in_float32(kind):
  x, dy = factors()
  w = eco.quantize(jnp.zeros((16, 24), jnp.bfloat16), eco.FP8)

  def gradient(x, dy):
    loss = lambda w: jnp.sum((eco.matmul(x, w) * dy).astype(jnp.float32))
    _, found = eco.value_and_grad(loss, dense=False, gradient_dtype=jnp.bfloat16)(w)
    return found

  mesh = on_four(kind)
  with jax.set_mesh(mesh):
    put = lambda y: jax.device_put(y, NamedSharding(mesh, P("data", None)))
    found = jax.jit(gradient)(put(x), put(dy))
  _, rounded = wanted(x, dy)
  assert found.dtype == jnp.bfloat16
  assert np.mean(np.asarray(found != rounded)) < 0.01
