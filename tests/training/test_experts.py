"""Routed experts block by block, against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import sharding
from eco_optax.training.models import experts

B, L, D, F, E = 8, 12, 32, 64, 8
FORMATS = {"float": None, "FP8": eco.FP8, "INT4": eco.INT4, "NVFP4": eco.NVFP4, "MXFP8": eco.MXFP8}


def choose(kind, T=2):
  """The experts of each token."""
  generator = np.random.default_rng(0)
  few = {"any": range(E), "two of one device": (6, 7)}.get(kind, range(E))
  chosen = np.stack([generator.permutation(few)[:T] for _ in range(B * L)]).reshape(B, L, T)
  if kind == "all of one":
    chosen = np.full((B, L, 1), 3)
  if kind == "some of none":
    chosen[generator.random(chosen.shape) < 0.4] = E
  return jnp.asarray(chosen, jnp.int32)


def parameters(format, T):
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[-2])
  kernels = {"up": draw(keys[0], E, D, F), "down": draw(keys[1], E, F, D)}
  if format:
    kernels = eco.quantize(kernels, format)
  weight = jax.random.uniform(keys[2], (B, L, T), minval=0.2)
  return {"kernels": kernels, "x": jax.random.normal(keys[3], (B, L, D)), "weight": weight}


def expert(kernels, x):
  return eco.matmul(jax.nn.silu(eco.matmul(x, kernels["up"])), kernels["down"])


def ours(chosen, p):
  return experts.apply(expert, p["kernels"], p["x"], chosen, p["weight"])


def every(chosen, p):
  """The definition: all experts on all tokens, most of them with weight 0."""
  weight = jnp.sum(jax.nn.one_hot(chosen, E) * p["weight"][..., None], axis=2)
  exact = functools.partial(jnp.einsum, precision="highest")
  hidden = jax.nn.silu(exact("bld,edf->blef", p["x"], p["kernels"]["up"]))
  return exact("blef,efd,ble->bld", hidden, p["kernels"]["down"], weight)


def loss(function, chosen, p):
  y = function(chosen, p)
  return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y


def check(found, wanted):
  """Outputs and gradients, relative to the largest."""
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
  ):
    name, scale = jax.tree_util.keystr(path), np.abs(b).max()
    assert scale > 0.1, name
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
  ("kind", "format"),
  [
    *(("any", format) for format in FORMATS),
    ("all of one", "INT4"),
    ("two of one device", "FP8"),
    ("some of none", "FP8"),
  ],
)
def test_values_and_gradients_are_those_of_every_expert_on_every_token(kind, format):
  chosen = choose(kind)
  p = parameters(FORMATS[format], chosen.shape[-1])
  function = lambda p: loss(ours, chosen, p)
  (_, y), grads = jax.jit(eco.value_and_grad(function, has_aux=True, dense=False))(p)
  dense = eco.dequantize(p)
  (_, wanted), want = jax.value_and_grad(lambda p: loss(every, chosen, p), has_aux=True)(dense)
  check((y, grads), (wanted, want))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_an_expert_is_summed_in_float32_whatever_its_dtype(dtype):
  # All tokens of one expert, in many blocks.
  chosen = choose("all of one")
  p = parameters(eco.FP8, 1)
  function = lambda p: loss(ours, chosen, p)[0]
  grads = eco.value_and_grad(function, dense=False, gradient_dtype=dtype)(p)[1]["kernels"]
  want = jax.grad(lambda p: loss(every, chosen, p)[0])(eco.dequantize(p))["kernels"]
  for name, grad in grads.items():
    assert grad.dtype == dtype
    # One rounding: half of 2⁻⁷ at most.
    tolerance = 2.0**-8 if dtype == jnp.bfloat16 else 1e-5
    scale = np.abs(want[name]).max()
    np.testing.assert_allclose(
      grad.astype(jnp.float32), want[name], rtol=1.01 * tolerance, atol=1e-5 * scale
    )
    assert not np.any(np.delete(np.asarray(grad, np.float32), 3, axis=0))


@pytest.mark.parametrize(
  "mesh", [{"expert": 2}, {"expert": 4, "fsdp": 2}, {"fsdp": 2, "tensor": 2, "expert": 2}]
)
@pytest.mark.parametrize("kind", ["any", "two of one device"])
def test_a_mesh_gives_the_numbers_of_one_device(mesh, kind):
  chosen = choose(kind)
  p = parameters(eco.FP8, chosen.shape[-1])
  function = eco.value_and_grad(lambda p: loss(ours, chosen, p), has_aux=True, dense=False)
  (_, wanted), want = function(p)
  devices = jax.devices()[: np.prod(list(mesh.values()))]
  mesh = sharding.make_mesh(mesh, devices)
  tokens = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.RULES["batch"]))
  named = {"experts": {name: {"kernel": x} for name, x in p["kernels"].items()}}
  named = sharding.shardings(named, mesh)["experts"]
  kernels = {name: x["kernel"] for name, x in named.items()}
  places = {"kernels": kernels, "x": tokens, "weight": tokens}
  with jax.set_mesh(mesh):
    (_, y), grads = jax.jit(function)(jax.device_put(p, places))
  check((y, grads), (wanted, want))


@pytest.mark.parametrize(
  ("tokens", "T", "E"), [(8192, 6, 64), (32768, 6, 64), (65536, 4, 32), (1024, 2, 4)]
)
def test_rows_of_zeros_are_a_seventh_at_most(tokens, T, E):
  for devices in (1, 4):
    rows, expected, most = experts.sizes(tokens * T, E, devices)
    share = tokens * T // devices
    assert share <= rows * expected <= 1.15 * share
    assert tokens * T <= rows * most


def test_operations_are_those_of_the_active_experts():
  tokens, T, E, F = 1024, 2, 4, 16
  x, chosen = jnp.zeros((1, tokens, D)), jnp.zeros((1, tokens, T), jnp.int32)
  p = {"kernels": {"up": jnp.zeros((E, D, F)), "down": jnp.zeros((E, F, D))}}
  p |= {"x": x, "weight": jnp.zeros((1, tokens, T))}
  active = 2 * 2 * tokens * T * D * F
  for program, times in (
    (lambda p: ours(chosen, p), 1),
    # Outputs are made again; and two gradients of each product.
    (jax.grad(lambda p: jnp.sum(ours(chosen, p) ** 2)), 4),
  ):
    text = jax.jit(program).lower(p).compile().as_text()
    found = sum(compile_lib.products(text).values())
    assert times * active <= found <= 1.15 * times * active


def test_no_more_than_one_expert_is_dequantized():
  chosen = choose("any")
  p = parameters(eco.INT4, 2)

  def floats(function):
    text = jax.jit(functools.partial(function, chosen)).lower(p).compile().as_text()
    arrays = {(dtype, *shape) for dtype, shape in compile_lib._arrays(text)}
    return {tuple(shape) for dtype, *shape in arrays if dtype == "f32"}

  assert (D, F) in floats(ours)
  assert (E, D, F) not in floats(ours)
  assert (E, D, F) in floats(lambda chosen, p: every(chosen, eco.dequantize(p)))
