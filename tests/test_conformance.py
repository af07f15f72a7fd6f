"""What Optax expects of a transformation, and what packed parameters expect of the library."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eco_optax as eco
from eco_optax.quantized_array import as_parameter, is_quantized

NEAREST = eco.quantize_params(rounding="nearest")
STOCHASTIC = eco.quantize_params(seed=0)

TRANSFORMS = {
  "eco adamw": lambda q: eco.error_feedback_to_momentum(optax.adamw(1e-2), q),
  "eco adamw, schedule": lambda q: eco.error_feedback_to_momentum(
    optax.adamw(rising, 0.9, 0.98), q, rising
  ),
  "eco exact sgd": lambda q: eco.error_feedback_to_momentum(
    optax.sgd(1e-2, 0.9), q, keep_error=True
  ),
  "eco bfloat16": lambda q: eco.error_feedback_to_momentum(
    optax.adam(1e-2, mu_dtype=jnp.bfloat16), q
  ),
  "master weights": lambda q: eco.master_weights(optax.adamw(1e-2), q),
  "master weights bfloat16": lambda q: eco.master_weights(optax.adamw(1e-2), q, "bfloat16"),
  "naive": lambda q: eco.chain(optax.adamw(1e-2), q),
  "watched": lambda q: eco.diagnostics.watch(optax.adamw(1e-2), q),
}


# Optax's own bfloat16 moments are not clean under strict promotion.
NAMES = [
  pytest.param(name, marks=pytest.mark.standard_promotion) if "eco bfloat16" in name else name
  for name in TRANSFORMS
]


def rising(count):
  return 1e-2 * jnp.minimum(1.0, (count.astype(jnp.float32) + 1) / 10)


def make_params(format=eco.FP8, seed=0):
  generator = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
  tree = {"layers": {"kernel": draw(3, 16, 8), "bias": draw(3, 8)}, "head": draw(8, 4)}
  return eco.quantize(tree, format, where=lambda path, leaf: "bias" not in path)


def grads_like(params, seed=1):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32), eco.dequantize(params)
  )


def make_step(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  return step


def signature(tree):
  """Structure, shapes, dtypes and weak types: what `jit`, `cond` and `scan` compare."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [jax.typeof(leaf) for leaf in leaves]


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  # Guards of updates are no numbers.
  a, b = (jax.tree.map(as_parameter, tree, is_leaf=is_quantized) for tree in (a, b))
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_close(a, b, rtol=1e-5):
  """Codes to the bit; floats to the roundings that a compiler is free to merge."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if x.dtype.itemsize == 1 or not jnp.issubdtype(x.dtype, jnp.floating):
      np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
      continue
    # A momentum is of order 1, and an error is divided by η = 0.01: 2^-24 of that.
    tolerance = max(rtol, 2 * float(jnp.finfo(x.dtype).eps))
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(np.abs(x).max(), 1e-2))


# Optax's target functions: start, optimum, loss.
def parabola(w):
  return jnp.sum((w - jnp.array([[1.0], [-1.0], [1.0]])) ** 2)


def matrix_parabola(w):
  return jnp.sum((w - jnp.array([[3.0, -2.0], [1.0, 4.0]])) ** 2)


def rosenbrock(w):
  return (1 - w[0, 0]) ** 2 + 100 * (w[1, 0] - w[0, 0] ** 2) ** 2


TARGETS = {
  "parabola": (parabola, [[-1.0], [10.0], [1.0]], [[1.0], [-1.0], [1.0]]),
  "matrix parabola": (matrix_parabola, [[0.0, 0.0], [0.0, 0.0]], [[3.0, -2.0], [1.0, 4.0]]),
  "rosenbrock": (rosenbrock, [[0.0], [0.0]], [[1.0], [1.0]]),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_converges_on_the_target_functions(target, optimizer, rounding):
  """The mean of the last quarter of the weights is near the optimum, closer than the grid's steps.

  INT8 has steps of 1/127 of the largest weight; a weight jumps between codes around its optimum.
  """
  loss, start, optimum = TARGETS[target]
  if optimizer == "adamw":
    tx = eco.adamw(1e-2, weight_decay=0.0, rounding=rounding)
  else:
    tx = eco.sgd(5e-4 if target == "rosenbrock" else 1e-2, rounding=rounding)
  params = {"w": jnp.asarray(start)}
  params = eco.quantize(params, eco.Format("int8", "tensor"))

  def step(carry, _):
    params, state = carry
    _, grads = eco.value_and_grad(lambda p: loss(p["w"]))(params)
    params, state = make_step(tx)(params, state, grads)
    return (params, state), params["w"].dequantize()

  steps = 10_000 if target == "rosenbrock" else 4_000
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps)[1])
  trajectory = np.asarray(run((params, tx.init(params))))
  mean = trajectory[3 * steps // 4 :].mean(axis=0)
  grid = np.max(np.abs(np.asarray(optimum))) / 127
  # Rosenbrock's valley is flat along its floor: there the dither's curvature moves the mean.
  tolerance = 8 * grid if target == "rosenbrock" else 2 * grid
  assert np.max(np.abs(mean - np.asarray(optimum))) < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_state_and_params_keep_shapes_and_dtypes(name):
  """Under cond and scan, and without a second compilation."""
  params = make_params()
  tx = TRANSFORMS[name](STOCHASTIC)
  state, grads = tx.init(params), grads_like(params)
  step = jax.jit(make_step(tx))
  new_params, new_state = step(params, state, grads)
  assert signature(new_params) == signature(params)
  assert signature(new_state) == signature(state)
  step(new_params, new_state, grads)
  assert step._cache_size() == 1

  @jax.jit
  def loop(params, state):
    def body(carry, take):
      return jax.lax.cond(take, lambda c: make_step(tx)(*c, grads), lambda c: c, carry), None

    return jax.lax.scan(body, (params, state), jnp.array([True, False, True]))[0]

  once = step(*step(params, state, grads), grads)
  found = loop(params, state)
  assert_close(found, once)
  assert_close(found[0], once[0], rtol=1e-6)  # Of parameters no error is divided by η.


@pytest.mark.parametrize("name", ["eco adamw, schedule", "eco exact sgd", "master weights"])
def test_compiled_and_interpreted_steps_agree(name):
  params = make_params()
  tx = TRANSFORMS[name](STOCHASTIC)
  state, grads = tx.init(params), grads_like(params)
  eager_params, eager_state = make_step(tx)(params, state, grads)
  jit_params, jit_state = jax.jit(make_step(tx))(params, state, grads)
  assert_close((eager_params, eager_state), (jit_params, jit_state))
  for leaf in (lambda p: p["layers"]["kernel"], lambda p: p["head"]):
    np.testing.assert_allclose(leaf(eager_params).scale, leaf(jit_params).scale, rtol=2e-7)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_donated(name):
  """Every buffer of parameters and state is reused: an unused donation would be a warning."""
  params = make_params(eco.INT4)
  tx = TRANSFORMS[name](STOCHASTIC)
  state = tx.init(params)
  # Constants of init may share a buffer; donation wants each once.
  params, state = jax.tree.map(lambda x: jnp.array(np.array(x)), (params, state))
  step = jax.jit(make_step(tx), donate_argnums=(0, 1))
  new = step(params, state, grads_like(make_params(eco.INT4)))
  # Scalars that a step does not read, such as the last metrics, are not even passed.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)) if leaf.size > 1)
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_extra_arguments_pass_through():
  """To an optimizer that wants them; to one that does not they do no harm."""

  def update(updates, state, params=None, *, factor=1.0, **extra):
    del params, extra
    return jax.tree.map(lambda u: u * factor, updates), state

  wants = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params = make_params()
  grads = grads_like(params)
  for wrap in (
    lambda inner: eco.error_feedback_to_momentum(inner, NEAREST),
    lambda inner: eco.master_weights(inner, NEAREST),
    lambda inner: eco.chain(inner, NEAREST),
  ):
    tx = wrap(optax.chain(wants, optax.sgd(1e-2, 0.9)))
    plain = wrap(optax.sgd(1e-2, 0.9))
    doubled, _ = tx.update(grads, tx.init(params), params, factor=2.0, other="unused")
    twice = jax.tree.map(lambda g: 2 * g, grads)
    wanted, _ = plain.update(twice, plain.init(params), params, value=1.0)
    assert_equal(doubled, wanted)


@pytest.mark.parametrize("name", ["eco adamw", "eco exact sgd", "master weights"])
def test_map_params_finds_what_is_shaped_like_parameters(name):
  """`optax.tree.map_params`, as sharding code uses it, on packed and on float parameters."""
  packed = make_params()
  dense = eco.dequantize(packed)
  tx = TRANSFORMS[name](eco.quantize_params(eco.FP8))
  state = tx.init(dense)
  marked = optax.tree.map_params(
    tx, lambda leaf: "param", state, transform_non_params=lambda leaf: "other"
  )
  leaves = [leaf for leaf in jax.tree.leaves(marked) if leaf in ("param", "other")]
  sizes = [np.size(leaf) for leaf in jax.tree.leaves(state)]
  assert len(leaves) == len(sizes)
  for mark, size in zip(leaves, sizes, strict=True):
    assert (mark == "param") == (size > 1)


@pytest.mark.standard_promotion
def test_reduce_on_plateau_gets_its_value():
  params = make_params()
  inner = optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
  tx = eco.error_feedback_to_momentum(inner, NEAREST)
  state, grads = tx.init(params), grads_like(params)
  update = jax.jit(tx.update)
  for _ in range(4):
    _, state = update(grads, state, params, value=jnp.float32(1.0))
  assert float(state.inner[1].scale) < 1.0


def test_only_the_momentum_of_quantized_leaves_is_touched():
  """Second moment, counts and float leaves are the stock optimizer's own; no buffer is added."""
  params = make_params()
  dense, grads = eco.dequantize(params), grads_like(params)
  stock = optax.adamw(1e-2)
  tx = eco.error_feedback_to_momentum(stock, NEAREST)
  state = tx.init(params)
  stock_state = stock.init(dense)
  assert_equal(state.inner, stock_state)
  extra = set(jax.tree.leaves(jax.tree.map(jnp.size, state))) - set(
    jax.tree.leaves(jax.tree.map(jnp.size, stock_state))
  )
  assert extra == set() or max(extra) == 1
  assert sum(x.size for x in jax.tree.leaves(state)) <= 4 + sum(
    x.size for x in jax.tree.leaves(stock_state)
  )
  updates, state = jax.jit(tx.update)(grads, state, params)
  stock_updates, stock_state = jax.jit(stock.update)(grads, stock_state, dense)
  mine, theirs = state.inner[0], stock_state[0]
  np.testing.assert_array_equal(mine.count, theirs.count)
  for a, b in zip(jax.tree.leaves(mine.nu), jax.tree.leaves(theirs.nu), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(mine.mu["layers"]["bias"], theirs.mu["layers"]["bias"], rtol=1e-6)
  np.testing.assert_allclose(updates["layers"]["bias"], stock_updates["layers"]["bias"], rtol=1e-5)
  for leaf in (lambda t: t["layers"]["kernel"], lambda t: t["head"]):
    assert np.any(np.asarray(leaf(mine.mu)) != np.asarray(leaf(theirs.mu)))


def test_the_optimizer_sees_float32_and_nothing_else():
  """Clipping, decay and logging must see stored values, never codes."""
  seen = []

  def update(updates, state, params=None):
    seen.append((updates, params))
    return updates, state

  spy = optax.GradientTransformation(lambda params: (seen.append((None, params)), ())[1], update)
  params = make_params(eco.INT4)
  dense = eco.dequantize(params)
  for tx in (
    eco.error_feedback_to_momentum(optax.chain(spy, optax.sgd(0.1, 0.9)), NEAREST),
    eco.master_weights(optax.chain(spy, optax.sgd(0.1, 0.9)), NEAREST),
    eco.chain(spy, optax.sgd(0.1, 0.9), NEAREST),
  ):
    seen.clear()
    tx.update(grads_like(params), tx.init(params), params)
    assert seen
    for _, view in seen:
      assert jax.tree.structure(view) == jax.tree.structure(dense)
      assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(view))


def add_noise(scale):
  """A quantizer of a user's own: θ̂ + u moves by a fixed pattern."""

  def update(updates, state, params=None):
    del params
    return jax.tree.map(
      lambda u: u + scale * jnp.sin(jnp.arange(u.size, dtype=jnp.float32)).reshape(u.shape), updates
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
  "quantizer", [add_noise(0.01), eco.quantize_params(eco.FP8)], ids=["noise", "emulation"]
)
def test_the_error_is_the_difference_the_quantizer_made(quantizer):
  """Measured on the weights as `optax.apply_updates` leaves them: m − m̃ = (1/η)(1 − 1/β) e."""
  rate, beta = 1e-2, 0.9
  params = eco.dequantize({"w": make_params()["head"]})
  grads = grads_like(params)
  tx = eco.error_feedback_to_momentum(optax.sgd(rate, beta), quantizer)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  stored = np.asarray(optax.apply_updates(params, updates)["w"], np.float64)
  proposal = np.asarray(params["w"], np.float64) - rate * np.asarray(grads["w"], np.float64)
  error = proposal - stored
  owed = np.asarray(state.inner[0].trace["w"], np.float64) - np.asarray(grads["w"])
  np.testing.assert_allclose(owed, (1 - 1 / beta) / rate * error, rtol=1e-4, atol=2e-5)
  assert np.max(np.abs(error)) > 1e-3


def test_emulation_on_bfloat16_weights_measures_what_bfloat16_holds():
  """Powers of two as scales make E4M3 values exact in bfloat16, so nothing is lost on the way."""
  rate, beta = 2.0**-7, 0.75
  format = eco.Format("float8_e4m3fn", power_of_two=True)
  x = eco.dequantize(eco.quantize(make_params()["head"], format)).astype(jnp.bfloat16)
  grads = jnp.asarray(np.random.default_rng(5).integers(-4, 5, x.shape), jnp.bfloat16)
  tx = eco.error_feedback_to_momentum(
    optax.sgd(rate, beta), eco.quantize_params(format, rounding="nearest")
  )
  updates, state = jax.jit(tx.update)(grads, tx.init(x), x)
  new = optax.apply_updates(x, updates)
  assert new.dtype == jnp.bfloat16
  stored = np.asarray(new).astype(np.float64)
  requantized = np.asarray(eco.quantize(new, format).dequantize(), np.float64)
  np.testing.assert_array_equal(stored, requantized)
  # The update itself is bfloat16 arithmetic, exact here; the momentum is bfloat16.
  proposal = np.asarray(x).astype(np.float64) - rate * np.asarray(grads).astype(np.float64)
  owed = np.asarray(state.inner[0].trace).astype(np.float64) - np.asarray(grads).astype(np.float64)
  wanted = (1 - 1 / beta) / rate * (proposal - stored)
  np.testing.assert_allclose(owed, wanted, rtol=2.0**-7, atol=2.0**-5)


@pytest.mark.parametrize(
  ("format", "tx"),
  [
    (eco.FP8, eco.adamw(1e-2, seed=4)),
    (eco.INT4, eco.adamw(1e-2, seed=4)),
    (eco.NVFP4, eco.adamw(1e-2, seed=4)),
    (eco.FP8, eco.master_weights(optax.adamw(1e-2), NEAREST, "int12")),
  ],
  ids=["FP8", "INT4", "NVFP4", "12-bit residual"],
)
def test_a_sharded_step_is_the_same_step(format, tx):
  """On 1, 2, 4 and 8 devices all weights have the same codes after some steps."""
  params = {"w": make_params()["layers"]["kernel"]}
  params = eco.quantize({"w": jnp.tile(eco.dequantize(params)["w"], (1, 2, 2))}, format)
  grads = grads_like(params)
  # Without donation, several steps in one program.
  run = jax.jit(lambda p, s, g: jax.lax.fori_loop(0, 5, lambda _, c: make_step(tx)(*c, g), (p, s)))
  wanted, _ = run(params, tx.init(params), grads)
  for count in (1, 2, 4, 8):
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(-1, 2 if count > 1 else 1), ("x", "y"))
    spread = NamedSharding(mesh, P(None, "x", "y"))
    whole = NamedSharding(mesh, P())
    place = lambda x, spread=spread, whole=whole: jax.device_put(
      x, spread if x.ndim == 3 and x.shape[1] % 8 == 0 and x.shape[2] % 2 == 0 else whole
    )
    sharded = jax.tree.map(place, (params, tx.init(params), grads))
    found, _ = run(*sharded)
    assert len(found["w"].qvalue.sharding.device_set) == count
    assert_equal(jax.device_get(found), jax.device_get(wanted))


def test_a_restored_run_continues_alike(tmp_path):
  """Through Orbax after three of six steps: the rest is the same to the bit."""
  params = make_params(eco.INT4)
  tx = eco.error_feedback_to_momentum(optax.adamw(1e-2), STOCHASTIC, 1e-2, keep_error=True)
  state = tx.init(params)
  step = jax.jit(make_step(tx))
  grads = [grads_like(params, seed) for seed in range(6)]
  for g in grads[:3]:
    params, state = step(params, state, g)
  with ocp.CheckpointManager(tmp_path / "run") as manager:
    tree = {"params": params, "state": state}
    manager.save(3, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    restored = manager.restore(3, args=ocp.args.StandardRestore(jax.tree.map(jnp.zeros_like, tree)))
  again, again_state = restored["params"], restored["state"]
  for g in grads[3:]:
    params, state = step(params, state, g)
    again, again_state = step(again, again_state, g)
  assert_equal((again, again_state), (params, state))


def test_one_call_is_the_long_form():
  params, grads = make_params(), grads_like(make_params())
  kwargs = dict(b1=0.8, b2=0.98, eps=1e-9, weight_decay=0.1)
  pairs = [
    (
      eco.adamw(rising, max_norm=1.0, rounding="stochastic", seed=3, **kwargs),
      eco.error_feedback_to_momentum(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rising, **kwargs)),
        eco.quantize_params(rounding="stochastic", seed=3),
        learning_rate=rising,
      ),
    ),
    (
      eco.sgd(1e-2, 0.8, nesterov=True, rounding="nearest"),
      eco.error_feedback_to_momentum(
        optax.sgd(1e-2, 0.8, nesterov=True), NEAREST, learning_rate=1e-2
      ),
    ),
  ]
  for short, long in pairs:
    found = jax.jit(make_step(short))(params, short.init(params), grads)
    wanted = jax.jit(make_step(long))(params, long.init(params), grads)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      # Codes and counts are equal; of floats, whose step is fused, the last places may differ.
      tolerance = dict(rtol=1e-5, atol=1e-7) if x.dtype == jnp.float32 else dict(rtol=0, atol=0)
      np.testing.assert_allclose(
        np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64), **tolerance
      )


def test_watching_does_not_change_the_run():
  params, grads = make_params(), grads_like(make_params())
  plain, watched = TRANSFORMS["eco adamw"](STOCHASTIC), TRANSFORMS["watched"](STOCHASTIC)
  a, _ = jax.jit(make_step(plain))(params, plain.init(params), grads)
  b, state = jax.jit(make_step(watched))(params, watched.init(params), grads)
  assert_equal(a["head"].qvalue, b["head"].qvalue)
  assert np.isfinite(float(state.metrics.error_norm))
  assert float(state.metrics.lost_injection) < 1e-5
  moved = float(eco.diagnostics.fraction_moved(params, a))
  old, new = eco.dequantize(params), eco.dequantize(a)
  same = [
    np.asarray(x) == np.asarray(y)
    for x, y in [(old["head"], new["head"]), (old["layers"]["kernel"], new["layers"]["kernel"])]
  ]
  assert abs(moved - (1 - np.mean(np.concatenate([s.ravel() for s in same])))) < 1e-6


class TestGradients:
  """`value_and_grad` and `matmul`."""

  def loss(self, params, x, factor=1.0):
    h = jnp.tanh(eco.matmul(x, params["a"]) + params["bias"])
    return factor * jnp.sum(eco.matmul(h, params["b"]) ** 2)

  def setup_method(self):
    generator = np.random.default_rng(6)
    draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
    self.x = draw(5, 8)
    self.dense = {"a": draw(8, 6), "bias": draw(6), "b": draw(6, 4)}

  @pytest.mark.parametrize(
    "format",
    [eco.FP8, eco.INT4, eco.Format("int8", (2, 1)), eco.Format("float8_e4m3fn", (2, 2))],
    ids=str,
  )
  @pytest.mark.parametrize("dense", [True, False])
  def test_gradients_are_those_of_the_dense_view(self, dense, format):
    params = eco.quantize(self.dense, format)
    view = eco.dequantize(params)
    wanted_value, wanted = jax.value_and_grad(self.loss)(view, self.x, factor=2.0)
    value, grads = eco.value_and_grad(self.loss, dense=dense)(params, self.x, factor=2.0)
    assert jax.tree.structure(grads) == jax.tree.structure(view)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
      assert a.dtype == jnp.float32
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

  @pytest.mark.parametrize("dense", [True, False])
  def test_aux_is_returned(self, dense):
    params = eco.quantize(self.dense, eco.FP8)
    fn = lambda p, x: (self.loss(p, x), {"n": x.shape[0]})
    (value, aux), grads = eco.value_and_grad(fn, dense=dense, has_aux=True)(params, self.x)
    assert aux == {"n": 5}
    assert value.shape == ()
    assert grads["a"].shape == (8, 6)

  def test_activations_are_rounded_per_token_and_straight_through(self):
    """codes(x) @ codes(w) with one scale per row of x and per column of w."""
    w = eco.quantize(self.dense["a"], eco.FP8)
    scale = np.max(np.abs(self.x), axis=-1, keepdims=True) / np.float32(448)
    codes = np.asarray(
      jnp.asarray(np.asarray(self.x) / scale).astype(jnp.float8_e4m3fn), np.float64
    )
    rounded = codes * scale
    kernel = np.asarray(w.dequantize(), np.float64)
    y = eco.matmul(self.x, w, eco.FP8_TOKEN)
    np.testing.assert_allclose(y, rounded @ kernel, rtol=1e-5, atol=1e-5)
    dx = jax.grad(lambda x: jnp.sum(eco.matmul(x, w, eco.FP8_TOKEN)))(self.x)
    np.testing.assert_allclose(dx, np.ones((5, 6)) @ kernel.T, rtol=1e-5, atol=1e-5)
    _, grads = eco.value_and_grad(
      lambda p: jnp.sum(eco.matmul(self.x, p["a"], eco.FP8_TOKEN)), dense=False
    )({"a": w})
    np.testing.assert_allclose(grads["a"], rounded.T @ np.ones((5, 6)), rtol=1e-5, atol=1e-5)


FLOAT_TREE = {"layers": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
ERRORS = {
  "nothing quantized": (
    lambda: STOCHASTIC.init(FLOAT_TREE),
    "no leaf of params is quantized",
  ),
  "a promise": (
    lambda: eco.quantize_params(where=lambda path, leaf: "kernel" in path).init(FLOAT_TREE),
    "layers/kernel",
  ),
  "unknown format": (lambda: eco.quantize_params("fp8"), "fp8"),
  "unknown rounding": (lambda: eco.quantize_params(rounding="up"), "up"),
  "unknown residual": (
    lambda: eco.master_weights(optax.sgd(0.1), NEAREST, residual="int4"),
    "int4",
  ),
  "int8 residual of floats": (
    lambda: eco.master_weights(optax.sgd(0.1), eco.quantize_params(eco.FP8), "int8").init(
      FLOAT_TREE
    ),
    "layers/kernel",
  ),
  "float update of a packed leaf": (
    lambda: eco.apply_updates(eco.quantize(FLOAT_TREE, eco.FP8), FLOAT_TREE),
    "layers/kernel",
  ),
  "packed update of a float leaf": (
    lambda: eco.apply_updates(FLOAT_TREE, eco.quantize(FLOAT_TREE, eco.FP8)),
    "layers/kernel",
  ),
  "packed leaves and a quantizer of one's own": (
    lambda: eco.error_feedback_to_momentum(optax.sgd(0.1, 0.9), add_noise(0.1)).init(
      eco.quantize(FLOAT_TREE, eco.FP8)
    ),
    "layers/kernel",
  ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_leaf_or_the_value(case):
  fn, message = ERRORS[case]
  with pytest.raises(ValueError, match=message):
    fn()


@pytest.mark.parametrize("name", NAMES)
def test_missing_params_raise(name):
  params = make_params()
  tx = TRANSFORMS[name](NEAREST)
  with pytest.raises(ValueError, match="params"):
    tx.update(grads_like(params), tx.init(params))


@pytest.mark.parametrize("name", ["eco adamw", "master weights", "naive"])
def test_a_nan_gradient_stays_visible(name):
  params = make_params()
  grads = grads_like(params)
  grads["head"] = grads["head"].at[0, 1].set(jnp.nan)
  tx = TRANSFORMS[name](STOCHASTIC)
  new, _ = jax.jit(make_step(tx))(params, tx.init(params), grads)
  dense = eco.dequantize(new)
  assert np.all(np.isnan(np.asarray(dense["head"])[:, 1]))
  assert np.all(np.isfinite(np.delete(np.asarray(dense["head"]), 1, axis=1)))
  assert np.all(np.isfinite(np.asarray(dense["layers"]["kernel"])))


@functools.partial(jax.jit, static_argnums=0)
def _one_layer(tx, params, state, grads):
  return make_step(tx)(params, state, grads)


def test_layers_can_be_updated_one_by_one_under_vmap():
  """Nearest rounding: a stack updated layer by layer is the stack updated at once."""
  params = {"kernel": make_params()["layers"]["kernel"]}
  grads = grads_like(params)
  tx = eco.sgd(1e-2, rounding="nearest")
  wanted, _ = _one_layer(tx, params, tx.init(params), grads)
  state = jax.vmap(lambda p: tx.init(p))(params)
  found, _ = jax.jit(jax.vmap(make_step(tx)))(params, state, grads)
  np.testing.assert_array_equal(
    np.asarray(found["kernel"].qvalue), np.asarray(wanted["kernel"].qvalue)
  )
