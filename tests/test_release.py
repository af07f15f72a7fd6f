"""Gradient release makes the ordinary step's numbers, and refuses what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

LAYERS, WIDTH, VOCABULARY = 4, 32, 16


def layer(x, params, matmul=jnp.matmul):
  return x + jnp.tanh(matmul(x * params["scale"], params["kernel"]))


def scanned(params, tokens, matmul=jnp.matmul):
  """A stack of layers between the two uses of a tied embedding."""
  body = lambda x, own: (layer(x, own, matmul), jnp.max(x))
  x, largest = jax.lax.scan(jax.checkpoint(body), params["embedding"][tokens], params["stack"])
  logits = x @ params["embedding"].T
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens)), largest


def unrolled(params, tokens, matmul=jnp.matmul):
  x = params["embedding"][tokens]
  for i in range(LAYERS):
    own = functools.partial(layer, matmul=matmul)
    own = jax.checkpoint(own) if i % 2 else own
    x = own(x, {name: params[name][str(i)] for name in ("kernel", "scale")})
  logits = x @ params["embedding"].T
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens)), jnp.max(x)


def make(is_stacked, format=eco.FP8):
  draw = lambda i, shape: 0.3 * jax.random.normal(jax.random.key(i), shape)
  kernels, scales = draw(0, (LAYERS, WIDTH, WIDTH)), 1 + draw(1, (LAYERS, WIDTH))
  params = {"embedding": draw(2, (VOCABULARY, WIDTH)), "unused": draw(3, (WIDTH, WIDTH))}
  if is_stacked:
    params["stack"] = {"kernel": kernels, "scale": scales}
  else:
    split = lambda stack: {str(i): x for i, x in enumerate(stack)}
    params |= {"kernel": split(kernels), "scale": split(scales)}
  where = lambda path, leaf: "kernel" in path or path == "unused"
  tokens = jax.random.randint(jax.random.key(4), (2, 4, 8), 0, VOCABULARY)
  return eco.quantize(params, format, where), tokens


def ordinary(fn, tx, dense=True, **options):
  @jax.jit
  def step(params, state, tokens):
    loss_and_grad = eco.value_and_grad(fn, dense=dense, has_aux=True, **options)
    value, grads = loss_and_grad(params, tokens)
    updates, state = tx.update(grads, state, params)
    return value, eco.apply_updates(params, updates), state

  return step


def assert_same(ours, theirs):
  """Codes, scales of blocks and counts are equal; floats but for the order of sums."""

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    a, b = (np.asarray(x) for x in (a, b))
    if a.dtype in (np.float32, np.float64):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-7, err_msg=name)
    else:
      np.testing.assert_array_equal(a, b, err_msg=name)

  jax.tree_util.tree_map_with_path(check, ours, theirs)


OPTIMIZERS = {
  "fused": lambda: eco.layer_by_layer(eco.adamw(1e-2, seed=3)),
  "FP8 moments": lambda: eco.low_bit_moments(eco.adamw(1e-2)),
  "any optimizer": lambda: eco.layer_by_layer(
    eco.error_feedback_to_momentum(optax.nadam(1e-2), eco.quantize_params())
  ),
  "master weights": lambda: eco.master_weights(optax.adam(1e-2), eco.quantize_params()),
  "in a chain": lambda: optax.chain(optax.scale(0.5), eco.adamw(1e-2)),
}
MODELS = {"scanned": (scanned, True), "unrolled": (unrolled, False)}


@pytest.mark.parametrize("format", [eco.FP8, eco.INT4], ids=lambda f: str(f.dtype))
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "codes"])
@pytest.mark.parametrize("optimizer", ["fused", "FP8 moments"])
@pytest.mark.parametrize("model", MODELS)
def test_steps_are_the_ordinary_ones(model, optimizer, dense, format):
  fn, is_stacked = MODELS[model]
  fn = functools.partial(fn, matmul=jnp.matmul if dense else eco.matmul)
  params, tokens = make(is_stacked, format)
  tx = OPTIMIZERS[optimizer]()
  ours = theirs = (params, tx.init(params))
  step = jax.jit(eco.value_and_step(fn, tx, dense, has_aux=True))
  plain = ordinary(fn, tx, dense)
  for i in range(3):
    value, *ours, report = step(*ours, tokens[i % 2])
    want, *theirs = plain(*theirs, tokens[i % 2])
    np.testing.assert_allclose(value[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(value[1], want[1], rtol=1e-5)
    assert report.skipped == 0
  assert_same(ours, theirs)
