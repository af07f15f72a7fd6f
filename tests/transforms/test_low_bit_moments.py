"""low_bit_moments: its codes one by one, what it finds in optimizers, and what it leaves of ECO."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import optax.contrib
import pytest

import eco_optax as eco
from eco_optax.transforms import low_bit_moments, momentum, stored_moments

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

LOW = ("float8_e4m3fn", "float8_e5m2", "int8")
DRAWS = 1024


def read(stored):
  stored = stored.dequantize() if hasattr(stored, "dequantize") else stored
  return np.asarray(stored, np.float64)


def store(x, kind, dtype, bits, packed=False):
  return stored_moments.store(jnp.asarray(x, jnp.float32), kind, dtype, bits, packed)


def all_dithers(shape):
  """Bits of DRAWS equally spaced dithers, the same for all elements: their mean is exact."""
  bits = (np.arange(DRAWS, dtype=np.uint64) * 2**32 // DRAWS).astype(np.uint32)
  return jnp.broadcast_to(bits.reshape(DRAWS, *[1] * len(shape)), (DRAWS, *shape))


def codes_of(dtype):
  """All values of the format from zero to the largest, by ml_dtypes."""
  if dtype == "int8":
    return np.arange(128.0)
  values = np.arange(256, dtype=np.uint8).view(np.dtype(getattr(ml_dtypes, dtype)))
  values = values.astype(np.float64)
  return np.unique(np.abs(values[np.isfinite(values)]))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["first", "second"])
def test_what_is_stored_stays(kind, dtype):
  codes = codes_of(dtype)[:, None] * np.ones((1, 2))
  rows = np.float32(2.0**-9) * codes.T[:, -128:]  # Each row a block, with the largest code in it.
  if kind == "second":
    rows = np.square(rows)
  bits = jax.random.bits(jax.random.key(0), rows.shape, jnp.uint32)
  stored = store(rows, kind, dtype, bits)
  np.testing.assert_array_equal(read(stored), rows)
  again = store(read(stored), kind, dtype, ~bits)
  np.testing.assert_array_equal(read(again), rows)


@pytest.mark.parametrize("dtype", [*LOW, "bfloat16"])
@pytest.mark.parametrize("kind", ["first", "second"])
def test_every_value_is_kept_in_the_mean(kind, dtype):
  generator = np.random.default_rng(0)
  x = np.exp(generator.uniform(-6, 0, (4, 128)))
  if kind == "first":
    x *= generator.choice([-1, 1], x.shape)
  found = read(jax.vmap(lambda bits: store(x, kind, dtype, bits))(all_dithers(x.shape)))
  spread = found.max(0) - found.min(0)
  assert np.mean(spread > 0) > 0.95
  # Dithers of n equal steps meet each of two codes in n p ± 1 cases, and one that has p < 1/n not
  # at all: then the codes are at most 2^-2 of the root apart.
  spread = np.where(spread > 0, spread, 0.6 * np.abs(x))
  error = np.abs(found.mean(0) - x)
  lost = np.zeros_like(x)
  if kind == "second" and dtype == "int8":
    # Below the smallest code the root is the smallest code, which is never less.
    largest = np.sqrt(x).max(-1, keepdims=True)
    lost = np.where(np.sqrt(x) < largest / 127, np.inf, 0)
  assert np.all(error <= spread * 1.1 / DRAWS + 1e-5 * np.abs(x) + lost)
  assert np.sum(lost == 0) > 400


@pytest.mark.parametrize("dtype", LOW)
def test_a_second_moment_never_becomes_zero(dtype):
  x = np.zeros((1, 128))
  x[0, :3] = 1.0, 1e-20, 1e-12
  for bits in (0, 2**32 - 1):
    found = read(store(x, "second", dtype, jnp.full(x.shape, bits, jnp.uint32)))
    assert np.all((found > 0) == (x > 0))


@pytest.mark.parametrize(
  ("shape", "granularity"),
  [
    ((4, 256), (128,)),
    ((7, 96), (96,)),
    ((3,), (3,)),
    ((2, 262), "channel"),
    ((5, 131), "channel"),
    ((2, 64, 131), (32, 1)),
  ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_divide_an_axis(shape, granularity, packed):
  for dtype in LOW:
    format = stored_moments.block_format(shape, dtype, packed)
    if granularity == (32, 1) and dtype == "int8" and not packed:
      granularity = "channel"  # Rows of an embedding may differ by more than integers span.
    assert format.granularity == granularity
    format.check(shape)
    x = np.random.default_rng(0).standard_normal(shape)
    stored = store(x, "first", dtype, jnp.zeros(shape, jnp.uint32), packed)
    size = shape[-1] if granularity == "channel" else granularity[0]
    assert stored.scale.size == np.prod(shape) // size
    assert np.linalg.norm(read(stored) - x) < 0.3 * np.linalg.norm(x)


FIRST, SECOND = "first", "second"
STOCK = {
  "adamw": (optax.adamw(1e-2), {"mu": FIRST, "nu": SECOND}),
  "nadamw": (optax.nadamw(1e-2), {"mu": FIRST, "nu": SECOND}),
  "amsgrad": (optax.amsgrad(1e-2), {"mu": FIRST, "nu": SECOND, "nu_max": SECOND}),
  "adabelief": (optax.adabelief(1e-2), {"mu": FIRST, "nu": SECOND}),
  "yogi": (optax.yogi(1e-2), {"mu": FIRST, "nu": SECOND}),
  "ademamix": (optax.contrib.ademamix(1e-2), {"m1": FIRST, "m2": FIRST, "nu": SECOND}),
  "lion": (optax.lion(1e-3), {"mu": FIRST}),
  "sgd": (optax.sgd(1e-2, momentum=0.9), {"trace": FIRST}),
  "rmsprop": (optax.rmsprop(1e-3, momentum=0.9), {"nu": SECOND, "trace": FIRST}),
  # The difference of these is a variance, which rounding would make negative.
  "rmsprop, centered": (optax.rmsprop(1e-3, centered=True, momentum=0.9), {"trace": FIRST}),
  "adagrad": (optax.adagrad(1e-1), {"sum_of_squares": SECOND}),
  "accumulated": (optax.MultiSteps(optax.adam(1e-2), 2), {"mu": FIRST, "nu": SECOND}),
  "clipped": (
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    {"mu": FIRST, "nu": SECOND},
  ),
}


@pytest.mark.parametrize("name", STOCK)
def test_moments_of_stock_optimizers(name):
  inner, wanted = STOCK[name]
  inner = inner if hasattr(inner, "_fields") else inner.gradient_transformation()
  # A parameter may have the name of a moment.
  params = {"mu": jnp.ones((8, 128)), "nu": {"bias": jnp.ones((128,))}}
  found = {}
  momentum.map_moments(
    lambda path, kind, x: found.setdefault(path.split("/")[-2 - (path.endswith("bias"))], kind),
    inner.init(params),
    momentum.shapes_of(params),
  )
  assert found == wanted

  target = jax.random.normal(jax.random.key(0), (8, 128))

  def final(tx):
    def step(carry, i):
      params, state = carry
      noise = 0.05 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (8, 128))
      grads = {"mu": params["mu"] - target + noise, "nu": {"bias": params["nu"]["bias"]}}
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    steps = jnp.arange(60)
    carry = (params, tx.init(params))
    (found, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, steps))(carry)
    # A scan would not have it otherwise; nor a checkpoint.
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])

  start = np.ones(9 * 128)
  plain, low = final(inner), final(eco.low_bit_moments(inner))
  moved = np.linalg.norm(plain - start)
  # Each stored number errs by up to an eighth of itself, on 60 steps in a common direction much
  # less; the sign that Lion takes feels it more.
  assert 0 < np.linalg.norm(low - plain) < (0.2 if name == "lion" else 0.1) * moved


@pytest.mark.parametrize(
  ("mu", "nu", "wanted"),
  [
    ("float32", "float32", 9),
    ("bfloat16", "bfloat16", 5),
    ("float8_e4m3fn", "float8_e4m3fn", 3 + 2 / 32),
    ("int8", "float8_e4m3fn", 3 + 2 / 32),
  ],
)
def test_bytes_per_parameter(mu, nu, wanted):
  params = eco.quantize({"w": jnp.ones((3, 256, 128))}, eco.FP8)
  tx = eco.layer_by_layer(eco.low_bit_moments(eco.adamw(1e-3), mu, nu))
  arrays = [x for x in jax.tree.leaves((params, tx.init(params))) if x.ndim]
  found = sum(x.nbytes for x in arrays) / params["w"].size
  assert found == pytest.approx(wanted + 4 / 256)  # The weight has a float32 scale per channel.


def test_eco_pays_back_through_8_bit_momentum():
  """Without noise in the gradient the mean weight arrives, far below the grid's own spacing."""
  params = eco.quantize({"w": jnp.ones((128, 128))}, eco.FP8)
  goal = 1 + 1e-3  # A sixty-fourth of the spacing of E4M3 there.
  tx = eco.low_bit_moments(eco.sgd(0.02, momentum=0.9, rounding="stochastic"))

  def step(carry, _):
    params, state = carry
    dense = eco.dequantize(params)["w"]
    updates, state = tx.update({"w": dense - goal}, state, params)
    return (eco.apply_updates(params, updates), state), jnp.mean(dense)

  (_, _), means = jax.jit(lambda c: jax.lax.scan(step, c, length=600))((params, tx.init(params)))
  # 16,384 weights and 300 steps: the error of the mean is far below a tenth of the distance.
  assert np.mean(means[300:]) == pytest.approx(goal, abs=1e-4)


@pytest.mark.parametrize(
  ("mu", "lost"), [("float8_e4m3fn", 0.12), ("int8", 0.08), ("bfloat16", 0.01)]
)
def test_watch_tells_what_is_left_of_the_injection(mu, lost):
  params = eco.quantize({"w": 0.1 * jax.random.normal(jax.random.key(0), (64, 128))}, eco.FP8)
  tx = eco.diagnostics.watch(
    optax.adamw(1e-4), eco.quantize_params(), 1e-4, mu=mu, nu="float8_e4m3fn"
  )
  state, update = tx.init(params), jax.jit(tx.update)
  for i in range(20):
    grads = {"w": jax.random.normal(jax.random.key(i), (64, 128))}
    updates, state = update(grads, state, params)
    params = eco.apply_updates(params, updates)
  assert (state.inner.inner.inner[0].mu["w"].dtype if mu == "bfloat16" else mu) == mu
  # At this rate the injection is half of the momentum, and it is the momentum that is rounded: by
  # 4% of itself in E4M3, whose steps are 6% to 12%; by 2^-9 in bfloat16, whose are a 16th of that.
  # A few errors of the largest weights decide: over seeds and steps the ratio's deviation is 0.05.
  assert state.metrics.injection_to_momentum == pytest.approx(0.5, abs=0.15)
  assert lost / 4 < state.metrics.lost_injection < lost
  assert state.metrics.kept_injection == pytest.approx(1, abs=0.02)


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match=r"mu must be one of float32, bfloat16, .*, got 'int3'"):
    eco.low_bit_moments(optax.adam(1e-3), mu="int3")
  with pytest.raises(ValueError, match="keeps no moments in its tuple"):
    eco.low_bit_moments(optax.sgd(1e-3)).init({"w": jnp.ones((2, 2))})
  tx = eco.low_bit_moments(optax.sgd(1e-3, momentum=0.9))
  with pytest.raises(ValueError, match="params are missing"):
    tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize(
  ("dtype", "wanted"),
  [("int8", (1.04, 0.75, 0.08)), ("float8_e4m3fn", (1.02, 1.02, 1.02))],
)
def test_rows_of_much_smaller_gradients_in_a_block(dtype, wanted):
  """How far they move beside float32 moments, which docs/memory.md says."""
  small, b2 = np.array([37, 70, 101]), 0.999  # Each in a block of its own.
  size = jnp.ones((128, 1)).at[small, 0].divide(jnp.array([10.0, 100.0, 1000.0]))

  def step(carried, i):
    kept, exact = carried
    for_grads, for_bits = jax.random.split(jax.random.key(i))
    grads = size * jax.random.normal(for_grads, (128, 128))
    new, exact = (b2 * nu + (1 - b2) * grads**2 for nu in (kept.dequantize(), exact))
    unbiased = 1 - b2 ** (i + 1.0)
    way, exact_way = (
      jnp.mean(jnp.abs(grads) / jnp.sqrt(nu / unbiased), 1)[small] for nu in (new, exact)
    )
    return (store(new, "second", dtype, jax.random.bits(for_bits, new.shape), True), exact), (
      way,
      exact_way,
    )

  zeros = jnp.zeros((128, 128))
  first = store(zeros, "second", dtype, jnp.zeros(zeros.shape, jnp.uint32), True)
  _, ways = jax.lax.scan(step, (first, zeros), jnp.arange(300))
  way, exact_way = (np.sum(np.asarray(x, np.float64), 0) for x in ways)
  # Over 300 steps of 128 weights the ratios' deviation from seed to seed is below 0.03.
  np.testing.assert_allclose(way / exact_way, wanted, atol=0.08)


def stored_dtypes(state):
  """What each moment is stored in, by the path of its parameter, of both kinds."""
  found = {}
  for moments in (state.mu, state.nu):
    for path, x in moments.items():
      found.setdefault(path, []).append(stored_moments.dtype_name(x))
  return found


@pytest.mark.parametrize("dtype", [*LOW, "bfloat16"])
def test_short_vectors_stay_float32(dtype):
  params = {
    "norm": jnp.ones(2**16 - 1),
    "flat": jnp.ones(2**16),
    "norms": jnp.ones((2, 16)),  # Of a stack of layers.
    "scalar": jnp.ones([]),
    "packed": jnp.ones(64),
  }
  format = eco.Format("float8_e4m3fn", "tensor")
  params = eco.quantize(params, format, where=lambda path, _: path == "packed")
  tx = eco.low_bit_moments(eco.adamw(1e-3), dtype, dtype)
  short, long = ["float32"] * 2, [dtype] * 2
  wanted = {"norm": short, "flat": long, "norms": long, "scalar": short, "packed": short}
  state = tx.init(params)
  assert stored_dtypes(state.inner.inner[0]) == wanted
  grads = jax.tree.map(lambda x: jnp.ones(x.shape), eco.dequantize(params))
  _, new = tx.update(grads, state, params)
  assert stored_dtypes(new.inner.inner[0]) == wanted
  np.testing.assert_allclose(new.inner.inner[0].mu["norm"], 0.1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [*LOW, "bfloat16"])
def test_vectors_that_were_stored_before_stay_so(dtype):
  """States of versions that stored vectors too go on in what they are."""
  params = {"bias": jnp.zeros(128), "kernel": jnp.zeros((32, 128))}
  inner = optax.adam(1e-2)
  tx = eco.low_bit_moments(inner, dtype, dtype)
  state = tx.init(params)
  moments = state.inner[0]
  old = {
    field: getattr(moments, field)
    | {"bias": store(jnp.zeros(128), kind, dtype, jnp.zeros(128, jnp.uint32))}
    for field, kind in {"mu": "first", "nu": "second"}.items()
  }
  state = state._replace(inner=(moments._replace(**old), *state.inner[1:]))
  grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
  updates, new = jax.jit(tx.update)(grads, state, params)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert stored_dtypes(new.inner[0])["bias"] == [dtype] * 2
  exact, _ = inner.update(grads, inner.init(params), params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, exact)


def test_moments_that_a_stock_optimizer_packs_are_refused():
  params = eco.quantize({"w": jnp.ones((64, 32))}, eco.FP8)
  with pytest.raises(ValueError, match=r"packed moment '0/mu/w'.*error_feedback_to_momentum"):
    eco.low_bit_moments(optax.adam(1e-3)).init(params)


@pytest.mark.parametrize("nu", ["float8_e4m3fn", "int8", "bfloat16", "factored"])
def test_first_moments_take_the_memory_of_one_layer_and_have_the_codes_of_all(nu):
  layers, matrix = 16, (256, 256)
  stack = 0.02 * jax.random.normal(jax.random.key(0), (layers, *matrix))
  params = eco.quantize({"kernel": stack, "bias": jnp.ones((layers, 256))}, eco.FP8)
  # Second moments that are not zero before a step are rounded, with random bits of all layers.
  inner = optax.rmsprop(1e-3, initial_scale=0.1, momentum=0.9)
  inner = eco.error_feedback_to_momentum(inner, eco.quantize_params())
  tx = eco.low_bit_moments(inner, nu=nu)
  init = jax.jit(tx.init).lower(params).compile()
  whole = low_bit_moments.MomentStorage("float8_e4m3fn", nu, jnp.int32(0))
  wanted = whole.store(inner.init(params), params, like=init(params).inner)

  def same(found, wanted):
    if nu == "factored" and wanted.dtype == np.float32:  # Means, which are sums in any order.
      return np.testing.assert_allclose(found, wanted, rtol=2e-7)
    return np.testing.assert_array_equal(found, wanted)

  jax.tree.map(same, init(params).inner, wanted)
  stored = jax.tree.leaves(wanted, is_leaf=lambda x: hasattr(x, "dequantize"))
  assert any(0.09 < read(x).mean() < 0.11 for x in stored if x.ndim > 2)
  # One stack of 16 in float32 takes more; stored whole, two moments take up to four of them.
  assert init.memory_analysis().temp_size_in_bytes < 12 * 4 * 256 * 256
