"""SOAP and Shampoo: their steps against float64 NumPy, and errors that come back in full."""

import collections

import jax
import jax.numpy as jnp
import kronecker_oracle as oracle
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax.transforms import error_feedback

is_matrix = lambda path, leaf: leaf.ndim >= 2
# A side of more than 6 has no factor. The others are square, or wide of it: the first gradient of a
# matrix that is not has a side whose factor is singular, and eigenvectors there are anyone's.
SHAPES = {"matrix": (5, 5), "wide": (3, 9), "stack": (2, 4, 4), "vector": (7,)}
STEPS = 16


def gradients(dtype, steps=STEPS):
  """Noise of different size in every direction around a gradient that stays, for each leaf."""
  generator = np.random.default_rng(0)
  grads = {}
  for name, shape in SHAPES.items():
    mean, noise = generator.standard_normal(shape), generator.standard_normal((steps, *shape))
    if len(shape) > 1:
      noise = generator.standard_normal((*shape[:-1], shape[-2])) @ noise
    grads[name] = (mean + 0.3 * noise).astype(dtype)
  return grads


def directions(tx, grads):
  """The updates of all steps, in the dtype of the gradients."""
  params = {name: jnp.zeros(g.shape[1:], g.dtype) for name, g in grads.items()}

  def step(state, g):
    updates, state = tx.update(g, state)
    return state, updates

  run = jax.jit(lambda state, grads: jax.lax.scan(step, state, grads)[1])
  return jax.tree.map(np.asarray, run(tx.init(params), grads))


CASES = {
  "soap": (
    lambda: eco.scale_by_soap(0.9, 0.95, 1e-3, None, 3, 6, is_matrix),
    lambda shape: oracle.Soap(shape, 0.9, 0.95, 1e-3, 3, 6),
  ),
  "shampoo": (
    lambda: eco.scale_by_shampoo(0.9, 0.95, 1e-3, 1e-4, None, 3, 6, is_matrix),
    lambda shape: oracle.Shampoo(shape, 0.9, 0.95, 1e-3, 1e-4, 3, 6, False),
  ),
  "shampoo, sums, grafting": (
    lambda: eco.scale_by_shampoo(0.9, 1.0, 1e-3, 1e-4, None, 1, 6, is_matrix, "adam"),
    lambda shape: oracle.Shampoo(shape, 0.9, 1.0, 1e-3, 1e-4, 1, 6, True),
  ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_steps_are_the_papers(case, dtype):
  make, reference = CASES[case]
  grads = gradients(dtype)
  with jax.enable_x64(dtype == "float64"):
    found = directions(make(), grads)
  for name, shape in SHAPES.items():
    assert found[name].dtype == dtype
    parts = [i for i in np.ndindex(*shape[:-2])]  # Layers of a stack by themselves.
    for part in parts:
      own = reference(shape[-2:])
      wanted = np.stack([own.step(g[part].astype(np.float64)) for g in grads[name]])
      limit = (1e-10 if dtype == "float64" else 2e-3) * np.max(np.abs(wanted))
      np.testing.assert_allclose(found[name][(slice(None), *part)], wanted, atol=limit)
      assert np.all(np.any(wanted[1:] != 0, axis=tuple(range(1, wanted.ndim))))


# By name: an optimizer of a decay b2 of its statistics and a frequency of refreshments.
OPTIMIZERS = {
  "soap": lambda b2, every: eco.scale_by_soap(0.9, b2, 1e-8, None, every, 8, is_matrix),
  "shampoo": lambda b2, every: eco.scale_by_shampoo(0.9, b2, 1e-8, 1e-6, None, every, 8, is_matrix),
  "grafted": lambda b2, every: eco.scale_by_shampoo(
    0.9, b2, 1e-8, 1e-6, None, every, 8, is_matrix, "adam"
  ),
}


RATE = 1e-2


def watched(name, b2, every):
  """ECO over an optimizer, which also says what it injected."""
  inner = optax.chain(OPTIMIZERS[name](b2, every), optax.scale_by_learning_rate(RATE))
  quantizer = eco.quantize_params(rounding="nearest")
  return error_feedback.build(
    inner, quantizer, None, False, observe=lambda seen: seen, is_known=True
  )


def what_comes_back(name, momenta, state):
  """The weights' moves by each of two momenta until they have faded, in float64.

  Gradients are zero and a decay next to 1 holds the statistics, so that the preconditioner stays.
  """
  with jax.enable_x64(True):
    inner = optax.chain(OPTIMIZERS[name](1 - 1e-12, 2**30), optax.scale_by_learning_rate(RATE))
    wide = jax.tree.map(
      lambda x: jnp.asarray(x, "float64" if x.dtype == np.float32 else x.dtype),
      jax.device_get(state),
    )
    zero = jax.tree.map(lambda m: np.zeros(m.shape), momenta[0])

    def step(carry, _):
      state, total = carry
      updates, state = inner.update(zero, state)
      return (state, jax.tree.map(jnp.add, total, updates)), None

    run = jax.jit(lambda state: jax.lax.scan(step, (state, zero), length=400)[0][1])
    start = lambda m: (wide[0]._replace(mu=jax.tree.map(np.float64, m)), *wide[1:])
    with_error, without = (jax.device_get(run(start(m))) for m in momenta)
    return jax.tree.map(np.subtract, with_error, without)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_error_comes_back_in_full(name):
  """100.00% of it: by the rule's own injection, through 400 more steps of the optimizer."""
  grads = gradients("float32", 21)
  start = {n: np.random.default_rng(1).standard_normal(g.shape[1:]) for n, g in grads.items()}
  params = eco.quantize(jax.tree.map(jnp.float32, start), eco.INT4, is_matrix)
  tx = watched(name, 0.95, 5)
  state, update = tx.init(params), jax.jit(tx.update)
  at = lambda t: jax.tree.map(lambda g: g[t], grads)
  for t in range(20):
    updates, (state, _) = update(at(t), state, params)
    params = eco.apply_updates(params, updates)
  # From here on statistics stay, and so many steps are over that no bias is left.
  preconditioner, *rest = state.inner
  preconditioner = preconditioner._replace(count=jnp.int32(2**29))
  tx = watched(name, 1 - 1e-6, 2**30)
  state = state._replace(inner=(preconditioner, *rest))
  _, (state, seen) = jax.jit(tx.update)(at(20), state, params)
  with_error = state.inner[0].mu
  back = what_comes_back(name, (with_error, with_error | seen.momentum), state.inner)
  assert set(seen.error) == {"matrix", "wide", "stack"}
  for path, error in jax.device_get(seen.error).items():
    assert np.max(np.abs(error)) > 1e-3
    np.testing.assert_allclose(back[path], error, atol=2e-5 * np.max(np.abs(error)))
    assert np.vdot(back[path], error) / np.vdot(error, error) == pytest.approx(1, abs=5e-5)


def hidden(tx):
  """The optimizer with a state that does not know its preconditioner."""
  kinds = {}

  def hide(state):
    kinds["known"] = type(state)
    if "plain" not in kinds:
      kinds["plain"] = collections.namedtuple("Plain", state._fields)
    return kinds["plain"](*state)

  def update(updates, state, params=None):
    updates, state = tx.update(updates, kinds["known"](*state), params)
    return updates, hide(state)

  return optax.GradientTransformation(lambda params: hide(tx.init(params)), update)


def test_conjugate_residuals_find_most_of_what_a_state_knows():
  """Of an optimizer that does not say what its inverse is; what is missing is measured."""
  grads = {"matrix": gradients("float32")["matrix"]}
  params = eco.quantize({"matrix": jnp.asarray(grads["matrix"][0])}, eco.INT4)
  found = {}
  for name, wrap in {"known": lambda tx: tx, "solved": hidden}.items():
    inner = optax.chain(wrap(OPTIMIZERS["shampoo"](0.95, 5)), optax.scale(-RATE))
    tx = eco.diagnostics.watch(inner, eco.quantize_params(rounding="nearest"))
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(4):
      _, state = update({"matrix": grads["matrix"][t]}, state, params)
    found[name] = jax.device_get(state)
  known, solved = found["known"], found["solved"]
  assert known.metrics.unpaid == 0
  assert 0 < solved.metrics.unpaid < 0.02
  momentum = lambda state: state.inner.inner[0].mu["matrix"]
  difference = momentum(solved) - momentum(known)
  assert np.linalg.norm(difference) < 0.2 * np.linalg.norm(momentum(known))


def after_momentum(fn):
  return optax.chain(optax.trace(0.9), optax.stateless(lambda u, _: fn(u)), optax.scale(-RATE))


def each(fn):
  return after_momentum(lambda updates: jax.tree.map(fn, updates))


class LyingState(eco.optimizers.soap.ScaleBySoapState):
  """Says that it knows an inverse that is none."""

  def unprecondition(self, path, update):
    return self.precondition(path, update)


def lying():
  own = OPTIMIZERS["soap"](0.95, 10)

  def update(updates, state, params=None):
    updates, state = own.update(updates, state, params)
    return updates, LyingState(*state)

  init = lambda params: LyingState(*own.init(params))
  return optax.chain(optax.GradientTransformation(init, update), optax.scale(-RATE))


REFUSED = {
  "not symmetric": (lambda: each(lambda u: jnp.cumsum(u, axis=-2)), "Jacobian is not symmetric"),
  "not definite": (lambda: each(lambda u: jnp.flip(u, -2)), "symmetric and not definite"),
  "a part is missing": (
    lambda: each(lambda u: u - jnp.mean(u, -2, keepdims=True)), "symmetric and not definite"
  ),
  "two leaves": (
    lambda: after_momentum(lambda u: {"a": u["a"] + u["b"] + u["a"].T, "b": u["b"]}),
    "momentum of another leaf",
  ),
  "a norm behind": (
    lambda: optax.chain(OPTIMIZERS["soap"](0.95, 10), optax.scale_by_trust_ratio()),
    "neither element-wise nor linear",
  ),
  "a lie": (lying, "LyingState has precondition and unprecondition"),
}  # fmt: skip


@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_inverted_is_refused(case):
  make, message = REFUSED[case]
  params = eco.quantize({"a": jnp.eye(3) + 0.5, "b": jnp.eye(3) + 0.2}, eco.FP8)
  with pytest.raises(ValueError, match=message) as error:
    eco.error_feedback_to_momentum(make(), eco.quantize_params()).init(params)
  assert "leaf 'a'" in str(error.value)
  assert "eco_optax.master_weights" in str(error.value)


@pytest.mark.parametrize("make", [eco.soap, eco.shampoo])
def test_axes_that_are_not_a_matrix_are_named(make):
  with pytest.raises(ValueError, match=r"leaf 'conv' has 4 axes \(3, 3, 2, 4\)") as error:
    make(1e-3).init(eco.quantize({"conv": jnp.ones((3, 3, 2, 4))}, eco.FP8))
  assert f"eco_optax.{make.__name__}" in str(error.value)
  assert "matrices=" in str(error.value)
  params = {"w": eco.quantize(jnp.ones((4, 4)), eco.FP8), "b": jnp.ones(4)}
  with pytest.raises(ValueError, match=r"leaf 'b' has shape \(4,\), but matrices= calls it"):
    make(1e-3, matrices=lambda path, leaf: True).init(params)
  with pytest.raises(ValueError, match="precondition_frequency must be an int above 0, got 0"):
    make(1e-3, precondition_frequency=0)
  with pytest.raises(ValueError, match=r"max_precond_dim must be an int above 0, got 2\.5"):
    make(1e-3, max_precond_dim=2.5)
  with pytest.raises(ValueError, match="b2 must be a number, got 'x'"):
    make(1e-3, b2="x")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_errors_are_not_kept_for_a_preconditioner_that_changes(name):
  inner = optax.chain(OPTIMIZERS[name](0.95, 10), optax.scale(-RATE))
  tx = eco.error_feedback_to_momentum(inner, eco.quantize_params(), keep_error=True)
  with pytest.raises(ValueError, match="leaf 'w': keep_error=True has to know the next step's"):
    tx.init(eco.quantize({"w": jnp.eye(4) + 0.5}, eco.FP8))


def test_grafting_has_two_ways():
  with pytest.raises(ValueError, match="grafting must be 'none' or 'adam', got 'sgd'"):
    eco.shampoo(1e-3, grafting="sgd")


def train(tx, params, grads, **extra):
  """Parameters after a step for each gradient."""
  state, update = tx.init(params), jax.jit(tx.update)
  for t in range(len(next(iter(grads.values())))):
    updates, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state, params, **extra)
    params = eco.apply_updates(params, updates)
  return jax.device_get(eco.dequantize(params)), state


MAKE = {
  "soap": lambda **kwargs: eco.soap(RATE, precondition_frequency=3, matrices=is_matrix, **kwargs),
  "shampoo": lambda **kwargs: eco.shampoo(
    RATE, precondition_frequency=3, matrices=is_matrix, grafting="adam", **kwargs
  ),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_stack_is_its_layers_and_emulation_is_packing(name):
  """One layer after another in a loop, 8-bit moments and emulated weights take the same steps."""
  grads = {name: g[:8] for name, g in gradients("float32").items() if name in ("stack", "vector")}
  start = {n: np.random.default_rng(1).standard_normal(g.shape[1:]) for n, g in grads.items()}
  start = jax.tree.map(jnp.float32, start)
  params, make = eco.quantize(start, eco.FP8, is_matrix), MAKE[name]
  wanted, state = train(make(), params, grads)
  layers, _ = train(eco.layer_by_layer(make()), params, grads)
  emulated, _ = train(make(format=eco.FP8, where=is_matrix), eco.dequantize(params), grads)
  for path, leaf in wanted.items():
    # Products of one layer and of a stack may round otherwise, and a weight in a hundred with them.
    for other in (layers[path], emulated[path]):
      assert np.mean(np.abs(other - leaf) > 1e-5 * np.max(np.abs(leaf))) <= 0.02
    assert np.any(leaf != np.asarray(eco.dequantize(params)[path]))
  low, low_state = train(eco.low_bit_moments(make()), params, grads)
  assert low_state.inner.inner[0].mu["stack"].qvalue.dtype == jnp.float8_e4m3fn
  assert all(np.all(np.isfinite(leaf)) for leaf in low.values())

  # A step whose gradients' scale is not finite changes nothing.
  nothing = jax.tree.map(lambda g: g[0] * np.float32(np.nan), grads)
  _, same = make().update(nothing, state, params, gradient_scale=np.float32(np.nan))
  jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("name", MAKE)
def test_leaves_without_a_gradient_stay(name):
  """Experts that get no token in a run have factors of zero, and finite steps after that."""
  grads = {"w": np.zeros((8, 4, 4), np.float32)}
  params = eco.quantize({"w": jnp.eye(4) + 0.5}, eco.FP8)
  make = MAKE[name](weight_decay=0.0)
  still, _ = train(make, params, grads)
  np.testing.assert_array_equal(still["w"], params["w"].dequantize())
  grads["w"][4:] = np.eye(4)
  moved, _ = train(make, params, grads)
  assert np.all(np.isfinite(moved["w"]))
  assert np.any(moved["w"] != still["w"])


BYTES = {"soap": (25, 43, 11), "shampoo": (21, 39, 7), "shampoo, grafted": (25, 43, 11)}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_per_weight_are_those_of_the_docs(name):
  make = {
    "soap": eco.soap,
    "shampoo": eco.shampoo,
    "shampoo, grafted": lambda rate, **kwargs: eco.shampoo(rate, grafting="adam", **kwargs),
  }[name]
  for columns, largest, wanted in zip(
    (512, 2048, 2048), (10_000, 10_000, 512), BYTES[name], strict=True
  ):
    params = {"w": eco.quantize(jnp.ones((512, columns)), eco.FP8)}
    state = jax.eval_shape(make(1e-3, max_precond_dim=largest).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params["w"].qvalue, state)))
    assert size / params["w"].size == pytest.approx(wanted, abs=0.02)
