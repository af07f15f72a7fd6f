"""The dense view of packed weights is made inside checkpoints and scans; nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax import dense_view

LAYERS, WIDTH = 8, 256


def layer(x, kernel):
  return x + jnp.tanh(x @ kernel.astype(jnp.bfloat16).astype(jnp.float32))


def scanned(params, x, scan=jax.lax.scan):
  remat = jax.checkpoint(layer)
  x = scan(lambda x, kernel: (remat(x, kernel), None), x, params["stack"]["kernel"])[0]
  return jnp.mean(jnp.square(x + params["bias"]))


def unrolled(params, x):
  for i in range(LAYERS):
    x = jax.checkpoint(layer)(x, params[f"layer{i}"]["kernel"])
  return jnp.mean(jnp.square(x))


def make(stacked, format=eco.FP8):
  draw = lambda i, shape: 0.05 * jax.random.normal(jax.random.key(i), shape)
  if stacked:
    params = {"stack": {"kernel": draw(0, (LAYERS, WIDTH, WIDTH))}, "bias": draw(1, (WIDTH,))}
  else:
    params = {f"layer{i}": {"kernel": draw(i, (WIDTH, WIDTH))} for i in range(LAYERS)}
  return eco.quantize(params, format, where=lambda path, leaf: "kernel" in path), draw(
    9, (4, WIDTH)
  )


def nested(params, x):
  """A jitted function around a scan over checkpoints, and a kernel that two places use."""
  body = jax.jit(functools.partial(scanned, scan=functools.partial(jax.lax.scan, reverse=True)))
  return body(params, x) + jnp.sum(params["stack"]["kernel"][0] ** 2)


def in_a_branch(params, x):
  return jax.lax.cond(jnp.sum(x) > 0, lambda: unrolled(params, x), lambda: 2 * unrolled(params, x))


CASES = {
  "scanned": (scanned, True),
  "unrolled": (unrolled, False),
  "nested": (nested, True),
  "in a branch": (in_a_branch, False),
}


@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.NVFP4], ids=lambda f: str(f.dtype))
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_dense_view(case, format):
  fn, stacked = CASES[case]
  params, x = make(stacked, format)
  ours = jax.jit(eco.value_and_grad(fn))(params, x)
  plain = jax.jit(jax.value_and_grad(fn))(eco.dequantize(params), x)
  # The compiler may add in another order in another program.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  jax.tree.map(close, ours, plain)


def test_a_function_that_needs_values_gets_them():
  params, x = make(stacked=False)

  def fn(params, x):
    value = unrolled(params, x)
    return value if params["layer0"]["kernel"][0, 0] > 1e3 else 2 * value

  value, grads = eco.value_and_grad(fn)(params, x)
  want, want_grads = jax.value_and_grad(fn)(eco.dequantize(params), x)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), grads, want_grads)


@pytest.mark.parametrize("case", ["scanned", "unrolled"])
def test_a_backward_pass_keeps_codes_and_no_view(case):
  fn, stacked = CASES[case]
  params, x = make(stacked)
  shape = (LAYERS, WIDTH, WIDTH) if stacked else (WIDTH, WIDTH)
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  dense = eco.dequantize(params)

  def ours(sinks):
    put = lambda leaf, sink: dataclasses.replace(leaf, sink=sink) if is_packed(leaf) else sink
    leaves = jax.tree.map(put, params, sinks, is_leaf=is_packed)
    return dense_view.apply(lambda view: fn(view, x), leaves)

  def views_kept(fn):
    kept = jax.eval_shape(lambda params: jax.vjp(fn, params)[1], dense)
    return sum(x.shape == shape and x.dtype == jnp.float32 for x in jax.tree.leaves(kept))

  assert views_kept(lambda params: fn(params, x)) == (1 if stacked else LAYERS)
  assert views_kept(ours) == 0
