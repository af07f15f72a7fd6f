"""Second moments of which row and column means are stored, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eco_optax as eco
from eco_optax.transforms.factored import FactoredMoment, factored

pytestmark = pytest.mark.standard_promotion

B1, B2, EPS, RATE = 0.9, 0.95, 1e-8, 1e-2


def projected(x):
  """The matrix of rank one with the rows' and columns' means, matrix by matrix."""
  row, column = x.mean(-1, keepdims=True), x.mean(-2, keepdims=True)
  mean = x.mean((-2, -1), keepdims=True)
  return np.divide(row * column, mean, out=np.zeros_like(x), where=mean > 0)


def draw(generator, params):
  return jax.tree.map(
    lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32), eco.dequantize(params)
  )


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3), (2, 3, 4, 5), (1, 7), (7, 1)])
def test_the_projection_is_exact_and_keeps_what_is_of_rank_one(shape):
  x = np.random.default_rng(0).uniform(0, 1, shape)
  x[..., 0, :] = 0
  x[..., :, -1] = 0
  stored = factored(jnp.asarray(x, jnp.float32))
  assert (stored.shape, stored.ndim, stored.size) == (shape, len(shape), x.size)
  found = np.asarray(stored.dequantize(), np.float64)
  np.testing.assert_allclose(found, projected(x), rtol=1e-6)
  assert np.all(np.isfinite(found))
  again = np.asarray(factored(jnp.asarray(found, jnp.float32)).dequantize(), np.float64)
  np.testing.assert_allclose(again, found, rtol=1e-6)


def make_params():
  generator = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
  packed = {"layers": normal(3, 32, 64), "experts": normal(2, 3, 32, 32)}
  packed |= {"rows": normal(64, 32), "vector": normal(64)}
  return eco.quantize(packed, eco.FP8) | {
    "embedding": normal(130, 128),
    "scales": normal(200, 64),
    "bias": normal(32),
    "number": normal(),
    "nothing": jnp.zeros((0, 256)),
  }


FACTORED = ("layers", "experts", "rows", "embedding")


def find(state, field):
  (found,) = [getattr(x, field) for x in jax.tree.leaves(
    state, is_leaf=lambda x: hasattr(x, "nu")) if hasattr(x, "nu")]  # fmt: skip
  return found


@pytest.mark.parametrize("fused", [False, True])
def test_adam_whose_second_moment_is_projected_after_each_step(fused):
  params, generator = make_params(), np.random.default_rng(2)
  if fused:
    tx = eco.adamw(RATE, B1, B2, EPS, weight_decay=0.0)
  else:
    tx = eco.error_feedback_to_momentum(optax.adam(RATE, B1, B2, EPS), eco.quantize_params())
  tx = eco.low_bit_moments(tx, "float32", "factored")
  state = tx.init(params)
  kinds = {k: isinstance(x, FactoredMoment) for k, x in find(state, "nu").items()}
  assert kinds == {k: k in FACTORED for k in params}

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  dense = {k: np.asarray(x, np.float64) for k, x in eco.dequantize(params).items()}
  mu, nu = ({k: np.zeros_like(x) for k, x in dense.items()} for _ in range(2))
  for t in range(1, 21):
    grads = draw(generator, params)
    grads["layers"] = grads["layers"].at[0].set(0)  # A layer that never moves,
    grads["layers"] = grads["layers"].at[1, 3].set(0)  # a row that does not,
    grads["rows"] = grads["rows"].at[:, 5].set(0)  # and a column.
    params, state = step(params, state, grads)
    for k, g in grads.items():
      g = np.asarray(g, np.float64)
      mu[k] = B1 * mu[k] + (1 - B1) * g
      nu[k] = B2 * nu[k] + (1 - B2) * g**2
      u = -RATE * mu[k] / (1 - B1**t) / (np.sqrt(nu[k] / (1 - B2**t)) + EPS)
      dense[k] = dense[k] + u  # Of float leaves; errors of the others go where they go.
      nu[k] = projected(nu[k]) if k in FACTORED else nu[k]
  for k, x in find(state, "nu").items():
    found = x.dequantize() if k in FACTORED else x
    np.testing.assert_allclose(np.asarray(found, np.float64), nu[k], rtol=2e-5, err_msg=k)
  for k in ("embedding", "scales", "bias", "number", "nothing"):
    np.testing.assert_allclose(np.asarray(params[k], np.float64), dense[k], rtol=2e-4, atol=1e-5)
  for x in jax.tree.leaves(eco.dequantize(params)):
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize(
  "inner",
  [
    optax.adamw(1e-2),
    optax.adagrad(1e-1),
    optax.nadamw(1e-2),
    optax.rmsprop(1e-3, momentum=0.9),
    optax.MultiSteps(optax.adam(1e-2), 2),
  ],
  ids=["adamw", "adagrad", "nadamw", "rmsprop", "accumulated"],
)
def test_stock_optimizers(inner):
  params = {"w": jnp.ones((256, 128)), "b": jnp.ones(128)}
  tx = eco.low_bit_moments(inner, "float32", "factored")
  state = tx.init(params)
  found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, FactoredMoment))]
  assert sum(isinstance(x, FactoredMoment) for x in found) == 1

  @jax.jit
  def step(params, state):
    updates, state = tx.update(params, state, params)  # The gradient of half the square.
    return optax.apply_updates(params, updates), state

  structure = jax.tree.structure(state)
  for _ in range(40):
    params, state = step(params, state)
  assert jax.tree.structure(state) == structure
  assert float(jnp.sum(params["w"] ** 2)) < 0.99 * params["w"].size


def test_layer_by_layer_is_the_same():
  params = eco.quantize({"w": jnp.ones((3, 32, 64)), "v": jnp.ones((2, 32, 32))}, eco.FP8)
  inner = eco.error_feedback_to_momentum(optax.adam(RATE), eco.quantize_params())
  whole = eco.low_bit_moments(inner, "float8_e4m3fn", "factored")
  found = []
  for tx in (whole, eco.layer_by_layer(whole)):
    state, own, generator = tx.init(params), params, np.random.default_rng(0)
    for _ in range(4):
      updates, state = tx.update(draw(generator, params), state, own)
      own = eco.apply_updates(own, updates)
    found.append((eco.dequantize(own), find(state, "nu")))
  for one, other in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6)


@pytest.mark.parametrize("other", ["float8_e4m3fn", "bfloat16", "float32"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_state_of_another_kind_is_refused_by_name(other, fused):
  params = eco.quantize({"block": {"w": jnp.ones((32, 64))}}, eco.FP8)
  inner = eco.error_feedback_to_momentum(optax.adam(RATE), eco.quantize_params())
  inner = eco.adamw(RATE) if fused else inner
  make = lambda nu: eco.low_bit_moments(inner, "int8", nu)
  grads = {"block": {"w": jnp.ones((32, 64))}}
  with pytest.raises(ValueError, match=rf"nu/block/w' in the state is {other}.* in factored"):
    make("factored").update(grads, make(other).init(params), params)
  with pytest.raises(ValueError, match=rf"nu/block/w' in the state is factored.* in {other}"):
    make(other).update(grads, make("factored").init(params), params)
  with pytest.raises(ValueError, match="mu must be one of float32, bfloat16"):
    eco.low_bit_moments(inner, "factored", "factored")


def test_bytes_per_parameter():
  params = eco.quantize({"w": jnp.ones((2, 1024, 1024))}, eco.FP8)
  tx = eco.low_bit_moments(eco.adamw(RATE), nu="factored")
  nbytes = sum(x.nbytes for x in jax.tree.leaves((params, tx.init(params))))
  assert nbytes / (2 * 1024 * 1024) == pytest.approx(1 + 4 / 1024 + 1 + 1 / 32 + 8 / 1024, abs=1e-4)


def of_parts(shape, spec, fused):
  """A step on one device, and on eight of which each has its part."""
  params = eco.quantize(
    {"w": jax.random.normal(jax.random.key(0), shape)}, eco.Format("float8_e4m3fn", (8, 8))
  )
  grads = {"w": jax.random.normal(jax.random.key(1), shape)}
  tx = eco.low_bit_moments(eco.adamw(RATE, fused=fused), "float32", "factored")
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
  place = lambda x: jax.device_put(
    x,
    NamedSharding(mesh, P(*(a if n > 1 else None for n, a in zip(x.shape, spec, strict=True)))),
  )
  shardings = {"w": NamedSharding(mesh, P(*spec))}

  def step(params, state, grads, shardings=None):
    updates, state = tx.update(grads, state, params, shardings=shardings)
    return eco.apply_updates(params, updates), state

  one = params, tx.init(params)
  several = jax.tree.map(place, params), jax.jit(tx.init)(params)
  on_all = jax.jit(lambda p, s, g: step(p, s, g, shardings))
  for _ in range(3):
    one = jax.jit(step)(*one, grads)
    several = on_all(*several, jax.tree.map(place, grads))
  return one, several


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spec", [(None, "x", "y"), (None, ("y", "x"), None), ("x", None, "y")])
def test_means_over_devices(spec, fused):
  one, several = of_parts((2, 64, 64), spec, fused)
  assert np.mean(np.asarray(one[0]["w"].codes != several[0]["w"].codes)) < 1e-3
  ours, theirs = find(several[1], "nu")["w"], find(one[1], "nu")["w"]
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5)
