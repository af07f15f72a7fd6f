"""master_weights against a plain float32 copy of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco

STEPS = 150


def drive(tx, params, apply=eco.apply_updates):
  """Trains on a fixed quadratic; returns every step's stored weights and the last state."""
  target = 0.5 * jax.random.normal(jax.random.key(1), (32, 16))

  def step(carry, i):
    params, state = carry
    noise = 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (32, 16))
    grads = {"w": eco.dequantize(params)["w"] - target + noise}
    updates, state = tx.update(grads, state, params)
    params = apply(params, updates)
    return (params, state), eco.dequantize(params)["w"]

  return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))((params, tx.init(params)))


def plain_master_weights(inner, format):
  """What the baseline means: a float32 weight, and its rounding for the forward pass."""

  def init(params):
    return inner.init(params), params

  def update(grads, state, params):
    inner_state, master = state
    updates, inner_state = inner.update(grads, inner_state, master)
    master = optax.apply_updates(master, updates)
    rounded = eco.dequantize(eco.quantize(master, format))
    return jax.tree.map(jnp.subtract, rounded, params), (inner_state, master)

  return optax.GradientTransformation(init, update)


def start(format):
  return eco.quantize({"w": 0.3 * jax.random.normal(jax.random.key(0), (32, 16))}, format)


INNER = {
  "adamw": lambda: optax.adamw(3e-3, weight_decay=0.1),
  "lion": lambda: optax.lion(1e-3),
  "sgd": lambda: optax.sgd(0.02),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4], ids=["fp8", "int4"])
def test_float32_residual_is_a_float32_copy(name, format):
  params = start(format)
  tx = eco.master_weights(INNER[name](), eco.quantize_params(rounding="nearest"))
  (_, state), stored = drive(tx, params)
  plain = plain_master_weights(INNER[name](), format)
  (_, (_, master)), wanted = drive(plain, eco.dequantize(params), optax.apply_updates)
  # The two keep the same weight up to float32 rounding, so a code differs at a tie only.
  differs = np.abs(np.asarray(stored) - np.asarray(wanted)) > 1e-6
  assert np.mean(differs) < 1e-3
  np.testing.assert_allclose(stored[-1] + np.asarray(state.residual["w"]), master["w"], atol=2e-6)


# Bytes per weight of each.
SIZES = {"bfloat16": 2, "int16": 2, "int12": 1.5, "int8": 1}


@pytest.mark.parametrize("residual", SIZES)
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.NVFP4], ids=["fp8", "int4", "nvfp4"])
def test_small_residuals_follow_the_large_one(residual, format):
  params = start(format)
  runs = {}
  for kind in ("float32", residual):
    tx = eco.master_weights(INNER["adamw"](), eco.quantize_params(rounding="nearest"), kind)
    runs[kind] = drive(tx, params)
  assert runs[residual][0][1].residual["w"].nbytes == SIZES[residual] * 32 * 16
  naive = drive(eco.chain(INNER["adamw"](), eco.quantize_params(rounding="nearest")), params)
  mean = lambda run: np.asarray(run[1][-50:]).mean(0)
  gap = np.abs(mean(runs[residual]) - mean(runs["float32"])).mean()
  # Beside what losing every small update costs.
  assert gap < 0.3 * np.abs(mean(naive) - mean(runs["float32"])).mean()


def unpack(residual, kind, shape):
  """The integers of a residual, read with NumPy from its definition."""
  stored = np.asarray(residual).astype(np.int64)
  if kind != "int12":
    return stored
  axis = max(len(shape) - 2, 0)
  low, next_low, high = (
    np.take(stored, np.arange(i, stored.shape[axis], 3), axis) for i in range(3)
  )
  counts = np.stack([low + 256 * (high % 16), next_low + 256 * (high // 16)], axis + 1)
  counts = counts.reshape(*shape[:axis], -1, *shape[axis + 1 :])
  counts = np.take(counts, np.arange(shape[axis]), axis)
  return np.where(counts >= 2048, counts - 4096, counts)


FORMATS = {
  "fp8": eco.FP8,
  "e5m2": eco.FP8_E5M2,
  "int8": eco.INT8,
  "int4": eco.INT4,
  "mxfp8": eco.MXFP8,
  "mxfp4": eco.MXFP4,
  "nvfp4": eco.NVFP4,
}


@pytest.mark.parametrize("kind", ["int16", "int12", "int8"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_integer_residuals_reach_every_error(format, rounding, kind):
  """The finest count whose largest value is the largest error that rounding makes."""
  generator = np.random.default_rng(0)
  x = jnp.asarray(generator.standard_normal((64, 32)), jnp.float32)
  params = eco.quantize({"w": x}, format)
  tx = eco.master_weights(optax.sgd(1.0), eco.quantize_params(rounding=rounding, seed=3), kind)
  move = 0.5 * generator.standard_normal((64, 32)).astype(np.float32)
  updates, state = tx.update({"w": jnp.asarray(-move)}, tx.init(params), params)
  stored = eco.apply_updates(params, updates)["w"]
  error = np.asarray(params["w"].dequantize(), np.float64) + move - np.asarray(stored.dequantize())
  step = stored.apply_scale(eco.rounding.grid_step(stored.codes.astype(jnp.float32), format.dtype))
  largest = {"int16": 2**15 - 1, "int12": 2**11 - 1, "int8": 2**7 - 1}[kind]
  unit = np.asarray(step) / largest * (0.5 if rounding == "nearest" else 1)
  counts = unpack(state.residual["w"], kind, (64, 32))
  assert np.abs(counts).max() > 0.8 * largest
  # One unit of stochastic rounding, beside float32's own rounding of the proposal; a weight cut at
  # the largest code may be off by more than its residual holds.
  cut = np.abs(np.asarray(stored.codes, np.float32)) == format.max
  off = np.abs(counts * unit - error)
  assert np.all((off <= 1.001 * unit + 2**-23 * np.abs(x)) | cut)
  assert np.mean(cut) < 0.2


@pytest.mark.parametrize("shape", [(7,), (6,), (5, 3), (4, 3), (2, 3, 2), (2, 5, 1)])
def test_12_bits_are_what_they_were(shape):
  """A step at a rate of zero: the residual is read and written again."""
  generator = np.random.default_rng(1)
  x = jnp.asarray(generator.standard_normal(shape), jnp.float32)
  params = eco.quantize({"w": x}, eco.Format("int8", "tensor"), where=lambda *_: True)
  tx = eco.master_weights(optax.sgd(0.0), eco.quantize_params(rounding="nearest"), "int12")
  state = tx.init(params)
  counts = generator.integers(-2047, 2048, shape)
  # The largest of each matrix sets its scale, which is to stay.
  axes = tuple(range(max(len(shape) - 2, 0), len(shape)))
  counts[np.abs(x) == np.abs(x).max(axes, keepdims=True)] = 0
  assert state.residual["w"].shape[max(len(shape) - 2, 0)] == 3 * -(
    -shape[max(len(shape) - 2, 0)] // 2
  )
  np.testing.assert_array_equal(unpack(state.residual["w"], "int12", shape), 0)
  packed = jnp.asarray(_pack(counts))
  assert packed.shape == state.residual["w"].shape
  zeros = {"w": jnp.zeros(shape)}
  updates, new = tx.update(zeros, state._replace(residual={"w": packed}), params)
  stored = eco.apply_updates(params, updates)["w"]
  np.testing.assert_array_equal(stored.codes, params["w"].codes)
  found = unpack(new.residual["w"], "int12", shape)
  # The proposal in float32 has 2^-24 of the weight, at most 127 steps: a tenth of a unit.
  assert np.abs(found - counts).max() <= 1


def _pack(counts):
  """12-bit integers by pairs in three bytes, in NumPy."""
  axis = max(counts.ndim - 2, 0)
  if counts.shape[axis] % 2:
    counts = np.concatenate([counts, np.zeros_like(np.take(counts, [0], axis))], axis)
  first, second = (
    np.take(counts, np.arange(i, counts.shape[axis], 2), axis) % 4096 for i in (0, 1)
  )
  triples = np.stack([first % 256, second % 256, first // 256 + 16 * (second // 256)], axis + 1)
  shape = list(first.shape)
  shape[axis] *= 3
  return triples.reshape(shape).astype(np.uint8)


@pytest.mark.parametrize("residual", SIZES)
def test_residuals_are_unbiased(residual):
  """What is kept of one error, over seeds that the step gives, is the error in the mean."""
  params = eco.quantize({"w": jnp.full((8, 128), 1.0)}, eco.Format("int8", "tensor"))
  tx = eco.master_weights(optax.sgd(1.0), eco.quantize_params(rounding="nearest"), residual)
  error = 0.3137 / 127  # Of a step of 1/127.
  move = {"w": jnp.full((8, 128), error)}
  state = tx.init(params)
  # The largest weight sets the scale: one stays where it is.
  move["w"] = move["w"].at[0, 0].set(0)

  @jax.jit
  def kept(step):
    _, new = tx.update(move, state._replace(step=step), params)
    # Read back by a step that moves nothing.
    master = []
    spy = optax.stateless(lambda u, p: master.append(p["w"]) or u)
    reader = eco.master_weights(spy, eco.quantize_params(rounding="nearest"), residual)
    reader.update(
      jax.tree.map(jnp.zeros_like, move),
      reader.init(params)._replace(residual=new.residual),
      params,
    )
    return 1 - master[0]

  values = np.asarray(jax.vmap(kept)(jnp.arange(64)), np.float64)[:, 1:]
  unit = {"bfloat16": 2**-9 * 0.5 / 127, "int16": 0.5 / 127 / 32767, "int12": 0.5 / 127 / 2047}
  noise = unit.get(residual, 0.5 / 127 / 127) / 2
  # 64 × 7 × 128 draws, each within a unit: five standard errors, and float32's rounding of 1 − x.
  assert abs(values.mean() - error) < 5 * noise / np.sqrt(values.size) + 2**-24


def test_nine_bytes_may_be_master_weights():
  """A bfloat16 momentum and a 16-bit residual take what a float32 momentum alone does."""
  params = eco.quantize({"w": jnp.ones((256, 128))}, eco.FP8)

  def used(tx):
    arrays = [x for x in jax.tree.leaves((params, tx.init(params))) if x.ndim]
    return sum(x.nbytes for x in arrays)

  quantizer = eco.quantize_params(rounding="nearest")
  master = eco.master_weights(optax.adamw(1e-3), quantizer, "int16")
  split = eco.low_bit_moments(master, mu="bfloat16", nu="float32")
  assert used(split) == used(eco.adamw(1e-3)) == (1 + 4 + 4 + 4 / 256) * params["w"].size
