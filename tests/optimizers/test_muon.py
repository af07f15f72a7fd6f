"""eco.muon against optax.contrib.muon on float32 weights."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from optax import contrib

import eco_optax as eco
from eco_optax import rounding
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms.low_bit_moments import LowBitMomentsState
from eco_optax.transforms.master_weights import MasterWeightsState

STEPS = 40
RATE = optax.linear_schedule(4e-3, 1e-3, STEPS)
FORMATS = {
  name: format
  for name, format in vars(eco).items()
  if isinstance(format, eco.Format) and "TOKEN" not in name and "BLOCK128" not in name
}
STOCK = inspect.signature(contrib.muon).parameters
HAS_DIMENSIONS = "muon_weight_dimension_numbers" in STOCK
needs_dimensions = pytest.mark.skipif(not HAS_DIMENSIONS, reason="Optax before 0.2.6")


def each_matrix(params):
  """The last two axes of what has them."""
  dims = contrib.MuonDimensionNumbers(-2, -1)
  return jax.tree.map(lambda x: dims if x.ndim >= 2 else None, params)


STACKED = {"muon_weight_dimension_numbers": each_matrix}


def problem(stacked=False):
  """Weights, and gradients of every step, which do not depend on the weights."""
  draw = np.random.default_rng(0)
  shapes = {"tall": (64, 32), "wide": (32, 64), "bias": (8,)}
  if stacked:
    shapes |= {"stack": (3, 32, 64)}
  weights = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
  drift = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
  grads = {
    name: 0.5 * drift[name] + draw.standard_normal((STEPS, *shape))
    for name, shape in shapes.items()
  }
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (weights, grads))


def is_matrix(path, leaf):
  return path != "bias"


def train(tx, params, grads, **extra):
  """The parameters and the state after all steps."""

  @jax.jit
  def run(params, state):
    def step(carry, grads):
      updates, state = tx.update(grads, carry[1], carry[0], **extra)
      return (eco.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (params, state), grads)[0]

  return run(params, tx.init(params))


def step_of_grid(leaf):
  """The spacing of a weight's grid where it is."""
  return leaf.apply_scale(rounding.grid_step(leaf.codes.astype(jnp.float32), leaf.format.dtype))


def distances(found, wanted, start):
  """Of all matrices together, how far from `wanted`, in parts of the way from the start."""
  found, start = eco.dequantize(found), eco.dequantize(start)
  names = [name for name in wanted if name != "bias"]
  norm = lambda a, b: np.sqrt(sum(float(jnp.sum((a[n] - b[n]) ** 2)) for n in names))
  return norm(found, wanted) / norm(start, wanted)


def test_arguments_are_those_of_optax():
  """Those that the installed Optax has, with its defaults; ours follow, by name only."""
  own = inspect.signature(eco.muon).parameters
  for name, parameter in STOCK.items():
    assert own[name].default == parameter.default, name
  ours = [name for name in own if name not in STOCK]
  assert all(own[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours)
  newer = {
    "preconditioning": "aol", "adam_learning_rate": 0.1, "consistent_rms": 0.2,
    "muon_weight_dimension_numbers": each_matrix,
  }  # fmt: skip
  for name, value in newer.items():
    if name not in STOCK:
      with pytest.raises(ValueError, match=f"{name} is .* does not take"):
        eco.muon(0.1, **{name: value})


@pytest.mark.parametrize("name", FORMATS)
def test_weights_follow_muon_in_float32(name):
  """Each is within half a step of the grid of stock Muon's float32 weight, and a drift of counts.

  Of a residual each step rounds at most one count, 1/254 of a step of the grid.
  """
  weights, grads = problem()
  params = eco.quantize(weights, FORMATS[name], is_matrix)
  stock = contrib.muon(RATE, weight_decay=0.1)
  wanted = train(stock, eco.dequantize(params), grads)[0]
  found, state = train(eco.muon(RATE, weight_decay=0.1), params, grads)
  naive = train(eco.chain(stock, eco.quantize_params(seed=1)), params, grads)[0]
  for leaf in ("tall", "wide"):
    assert state.residual[leaf].dtype == jnp.int8
    grid, far = step_of_grid(found[leaf]), jnp.abs(found[leaf].dequantize() - wanted[leaf])
    cut = jnp.abs(found[leaf].codes.astype(jnp.float32)) == found[leaf].format.max
    # The grid itself moves with its scales, which the largest weights of a group set.
    assert np.mean((far > (0.5 + STEPS / 254) * grid) & ~cut) < 0.01
    master = found[leaf].dequantize() + state.residual[leaf].astype(
      jnp.float32
    ) * grid * np.float32(0.5 / 127)
    drift = jnp.abs(master - wanted[leaf]) / grid
    assert np.mean(np.where(cut, 0, drift)) < 0.03
  np.testing.assert_allclose(found["bias"], wanted["bias"], rtol=1e-5, atol=1e-6)
  assert distances(found, wanted, params) < 0.6 * distances(naive, wanted, params)


@pytest.mark.parametrize("mu", ["float8_e4m3fn", "int8", "bfloat16"])
def test_momenta_in_few_bits(mu):
  """8 bits turn each polar factor a little, at random; what rounding took comes back as well."""
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  stock = contrib.muon(RATE)
  wanted = train(stock, eco.dequantize(params), grads)[0]
  found, state = train(eco.low_bit_moments(eco.muon(RATE), mu), params, grads)
  momentum = state.inner.inner.inner_states["muon"][0][0].mu["wide"]
  assert str(momentum.format.dtype if is_quantized(momentum) else momentum.dtype) == mu
  floor = distances(eco.quantize(wanted, eco.FP8, is_matrix), wanted, params)
  assert distances(found, wanted, params) < floor + (0.01 if mu == "bfloat16" else 0.06)
  naive = train(eco.chain(stock, eco.quantize_params(seed=1)), params, grads)[0]
  assert distances(naive, wanted, params) > floor + 0.2


def test_3_06_bytes_per_parameter():
  params = eco.quantize({"w": jnp.ones((128, 512))}, eco.FP8)
  state = eco.low_bit_moments(eco.muon(0.02)).init(params)
  held = sum(x.nbytes for x in jax.tree.leaves((params, state)) if x.size > 3)
  assert round(held / (128 * 512), 2) == 3.06


def test_the_state_is_that_of_master_weights():
  """And so are the steps, but for the order of sums."""
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  q = eco.quantize_params(rounding="nearest")
  whole = train(eco.master_weights(contrib.muon(RATE), q, "int8"), params, grads)
  own = train(eco.muon(RATE), params, grads)
  assert jax.tree.structure(whole) == jax.tree.structure(own)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(own), strict=True):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    assert np.mean(np.abs(a - b) > 1e-4 * (1 + np.abs(b))) < 0.01


def test_emulated_weights_take_the_same_steps():
  weights, grads = problem()
  params = eco.quantize(weights, eco.INT4, is_matrix)
  packed = train(eco.muon(RATE, residual="float32"), params, grads)[0]
  tx = eco.muon(RATE, residual="float32", format=eco.INT4, where=is_matrix)
  emulated = train(tx, eco.dequantize(params), grads)[0]
  for name in weights:
    np.testing.assert_allclose(
      eco.dequantize(packed)[name], emulated[name], rtol=1e-5, atol=1e-6, err_msg=name
    )
  with pytest.raises(ValueError, match="not packed, so an int8 residual"):
    eco.muon(RATE, format=eco.INT4).init(eco.dequantize(params))


@needs_dimensions
@pytest.mark.parametrize("around", [lambda tx: tx, eco.layer_by_layer, eco.low_bit_moments])
def test_each_matrix_of_a_stack_has_its_own_polar_factor(around):
  """A stack's steps are those of Optax's on each of its matrices alone."""
  weights, grads = problem(stacked=True)
  params = eco.quantize(weights, eco.FP8, is_matrix)
  found = train(around(eco.muon(RATE, consistent_rms=0.2, **STACKED)), params, grads)[0]
  for i in range(3):
    own = {"w": eco.dequantize(params)["stack"][i]}
    wanted = train(contrib.muon(RATE, consistent_rms=0.2), own, {"w": grads["stack"][:, i]})[0]["w"]
    layer = found["stack"].dequantize()[i]
    limit = 1.5 if around is eco.low_bit_moments else 0.5 + STEPS / 254
    assert np.mean(np.abs(layer - wanted) > limit * step_of_grid(found["stack"])[i]) < 0.01


@needs_dimensions
@pytest.mark.parametrize("how", ["default", "adaptive", "joined", "decay"])
def test_stacks_are_what_optax_takes_them_for(how):
  """AdamW's without dimensions; layers coupled by a norm or by axes; a mask by numbers of axes."""
  weights, grads = problem(stacked=True)
  params = eco.quantize(weights, eco.FP8, is_matrix)
  options = {
    "default": {},
    "adaptive": dict(adaptive=True, **STACKED),
    "joined": dict(muon_weight_dimension_numbers=lambda params: jax.tree.map(
      lambda x: contrib.MuonDimensionNumbers((0, 1), 2) if x.ndim == 3 else None, params)),
    "decay": dict(weight_decay=0.5, weight_decay_mask=lambda params: jax.tree.map(
      lambda x: x.ndim == 3, params), **STACKED),
  }[how]  # fmt: skip
  if how == "adaptive":  # Its steps are as long as a gradient.
    grads = jax.tree.map(lambda x: 1e-2 * x, grads)
  wanted = train(contrib.muon(RATE, **options), eco.dequantize(params), grads)[0]
  found = train(eco.muon(RATE, **options), params, grads)[0]
  assert distances(eco.dequantize(params), wanted, params) == 1
  for leaf in ("stack", "tall"):
    far = jnp.abs(found[leaf].dequantize() - wanted[leaf])
    assert np.mean(far > (0.5 + STEPS / 254) * step_of_grid(found[leaf])) < 0.01


@needs_dimensions
def test_layers_of_a_stack_one_at_a_time():
  """Gradient release hands over one layer, whose leaves have an axis less."""
  weights = problem(stacked=True)[0]
  params = eco.quantize({"stack": weights["stack"][:, :, :32]}, eco.FP8)

  def loss_fn(params, x):
    body = lambda x, w: (jnp.tanh(x @ w), None)
    return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, params["stack"])[0] ** 2)

  x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 32)), jnp.float32)
  tx = eco.low_bit_moments(eco.muon(0.02, **STACKED))
  found = jax.jit(eco.value_and_step(loss_fn, tx))(params, tx.init(params), x)[:3]
  loss, grads = jax.jit(eco.value_and_grad(loss_fn))(params, x)
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  wanted = loss, eco.apply_updates(params, updates), state
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    assert np.mean(np.abs(a - b) > 1e-4 * np.abs(b) + 1e-6) < 0.01


def test_four_devices_take_the_steps_of_one():
  """Sums are in another order; a weight differs where its rounding hangs on their last place."""
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  tx = eco.low_bit_moments(eco.muon(RATE, max_norm=1.0))
  alone = train(tx, params, grads)
  mesh = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4],
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)  # fmt: skip
  split = lambda x: NamedSharding(mesh, PartitionSpec("x", "y") if x.ndim == 2 and min(
    x.shape) > 1 else PartitionSpec())  # fmt: skip
  shared = jax.device_put(params, jax.tree.map(split, params))
  state = tx.init(shared)

  @jax.jit
  def step(params, state, grads):
    grads = jax.lax.with_sharding_constraint(grads, jax.tree.map(split, grads))
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  for i in range(5):
    shared, state = step(shared, state, jax.tree.map(lambda x, i=i: x[i], grads))
  alone = train(tx, params, jax.tree.map(lambda x: x[:5], grads))
  assert len(shared["tall"].qvalue.sharding.device_set) == 4
  for a, b in zip(jax.tree.leaves((shared, state)), jax.tree.leaves(alone), strict=True):
    a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
    # A residual's count of one is what float32 loses of a proposal as large as some weights.
    assert np.mean(np.abs(a - b) > 1e-3 * np.max(np.abs(b)) + 1) < 0.01
  far = jnp.abs(shared["tall"].dequantize() - alone[0]["tall"].dequantize())
  assert np.mean(far > 1e-6) < 0.01


def test_a_run_goes_on_from_what_was_saved():
  """Parameters and state are plain arrays: what has been through NumPy takes the same bits on."""
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  tx = eco.low_bit_moments(eco.muon(RATE))
  step = jax.jit(tx.update)
  state = tx.init(params)
  assert isinstance(state, LowBitMomentsState)
  for i in range(4):
    if i == 2:
      saved = jax.tree.map(np.asarray, (params, state))
      restored = jax.tree.map(jnp.asarray, saved)
    updates, state = step(jax.tree.map(lambda x, i=i: x[i], grads), state, params)
    params = eco.apply_updates(params, updates)
  for i in range(2, 4):
    updates, new = step(jax.tree.map(lambda x, i=i: x[i], grads), restored[1], restored[0])
    restored = eco.apply_updates(restored[0], updates), new
  jax.tree.map(np.testing.assert_array_equal, restored, (params, state))


@pytest.mark.parametrize("around", [lambda tx: tx, eco.low_bit_moments])
def test_a_skipped_step_changes_nothing(around):
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  tx = around(eco.muon(RATE, max_norm=1e4))
  params, state = train(tx, params, grads)
  first = jax.tree.map(lambda x: x[0], grads)
  update = jax.jit(lambda scale: tx.update(first, state, params, gradient_scale=scale))
  updates, skipped = update(jnp.nan)
  jax.tree.map(np.testing.assert_array_equal, skipped, state)
  new = eco.apply_updates(params, updates)
  jax.tree.map(np.testing.assert_array_equal, new, params)
  # And a factor of 100 is one of the gradients.
  is_own = lambda x: isinstance(x, MasterWeightsState)
  residual = lambda state: np.asarray(jax.tree.leaves(state, is_leaf=is_own)[-1].residual["tall"])
  longer = jax.tree.map(lambda x: 100 * x, first)
  wanted = residual(jax.jit(tx.update)(longer, state, params)[1])
  assert np.mean(residual(update(100.0)[1]) != wanted) < 0.01
  assert np.mean(residual(update(1.0)[1]) != wanted) > 0.1


def test_gradients_are_clipped_before_the_momentum():
  weights, grads = problem()
  params = eco.quantize(weights, eco.FP8, is_matrix)
  found = train(eco.muon(RATE, max_norm=0.5), params, grads)[0]
  clipped = optax.chain(optax.clip_by_global_norm(0.5), contrib.muon(RATE))
  wanted = train(clipped, eco.dequantize(params), grads)[0]
  assert np.mean(
    np.abs(found["tall"].dequantize() - wanted["tall"])
    > (0.5 + STEPS / 254) * step_of_grid(found["tall"])
  ) < 0.01  # fmt: skip
  # AdamW's leaf does not feel the length of gradients but for how it changes.
  np.testing.assert_allclose(found["bias"], wanted["bias"], rtol=1e-4, atol=1e-5)


@needs_dimensions
def test_temporaries_are_those_of_one_matrix():
  """A stack four times as high takes a few more scalars in memory than the stack itself."""

  def temporaries(layers):
    stack = {"w": jax.ShapeDtypeStruct((layers, 128, 128), jnp.float32)}
    params = jax.eval_shape(lambda p: eco.quantize(p, eco.FP8), stack)
    tx = eco.low_bit_moments(eco.muon(0.02, **STACKED))
    step = jax.jit(tx.update, donate_argnums=(1, 2))
    compiled = step.lower(stack, jax.eval_shape(tx.init, params), params).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (128 * 128 * 4)

  assert temporaries(12) - temporaries(3) < 3


def test_a_wrong_argument_is_named():
  with pytest.raises(ValueError, match="beta must be a number"):
    eco.muon(0.1, beta="large")
  with pytest.raises(ValueError, match="residual must be one of"):
    eco.muon(0.1, residual="int7").init(eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8))
  params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
  tx = eco.muon(0.1)
  with pytest.raises(ValueError, match=r"eco_optax\.muon keeps a MasterWeightsState"):
    tx.update({"w": jnp.ones((4, 4))}, eco.adamw(0.1).init(params), params)
