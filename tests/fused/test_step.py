"""The fused update: its definition against the general path, its kernels against the definition."""

import os
import pathlib
import subprocess
import sys

import fused_leaves
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import eco_optax as eco
from eco_optax.fused import tpu as tpu_kernels
from eco_optax.fused.dispatch import take_step
from eco_optax.fused.step import definition
from eco_optax.optimizers.adamw import ADAMW
from eco_optax.optimizers.sgd import SGD
from eco_optax.quantized_array import as_parameter, is_quantized
from experiments import peaks

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 8, 0.0)
MASK = {"blocks": {"up": True, "down": False}, "head": True, "bias": False}
LAST_STEPS = optax.linear_schedule(1e-2, 1e-3, 5)


def long_form(optimizer, rate, how, max_norm=None):
  if max_norm:
    optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer)
  return eco.error_feedback_to_momentum(optimizer, eco.quantize_params(rounding=how, seed=3), rate)


# Each the short form, whose steps are fused, and the long form, whose are not.
PAIRS = {
  "adamw": lambda how: (
    eco.adamw(1e-2, b2=0.98, rounding=how, seed=3),
    long_form(optax.adamw(1e-2, b2=0.98), 1e-2, how),
  ),
  "adamw, schedule from zero to zero, mask, clip": lambda how: (
    eco.adamw(
      SCHEDULE, eps_root=1e-12, weight_decay=0.3, mask=MASK, max_norm=1.0, rounding=how, seed=3
    ),
    long_form(
      optax.adamw(SCHEDULE, eps_root=1e-12, weight_decay=0.3, mask=MASK), SCHEDULE, how, 1.0
    ),
  ),
  "adamw, callable mask, nesterov": lambda how: (
    eco.adamw(
      LAST_STEPS, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree), nesterov=True,
      weight_decay=0.3, rounding=how, seed=3,
    ),
    long_form(
      optax.adamw(
        LAST_STEPS, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree), nesterov=True,
        weight_decay=0.3,
      ),
      LAST_STEPS,
      how,
    ),
  ),
  "adamw, bfloat16 momentum": lambda how: (
    eco.adamw(1e-2, mu_dtype=jnp.bfloat16, rounding=how, seed=3),
    long_form(optax.adamw(1e-2, mu_dtype=jnp.bfloat16), 1e-2, how),
  ),
  "adamw, FP8 moments": lambda how: (
    eco.low_bit_moments(eco.adamw(1e-2, mask=MASK, rounding=how, seed=3)),
    eco.low_bit_moments(long_form(optax.adamw(1e-2, mask=MASK), 1e-2, how)),
  ),
  "adamw, factored second moments, clip": lambda how: (
    eco.low_bit_moments(eco.adamw(1e-2, max_norm=1.0, rounding=how, seed=3), nu="factored"),
    eco.low_bit_moments(long_form(optax.adamw(1e-2), 1e-2, how, 1.0), nu="factored"),
  ),
  "sgd, bfloat16 momentum": lambda how: (
    eco.low_bit_moments(eco.sgd(1e-2, rounding=how, seed=3), "bfloat16"),
    eco.low_bit_moments(long_form(optax.sgd(1e-2, 0.9), 1e-2, how), "bfloat16"),
  ),
  "sgd, schedule": lambda how: (
    eco.sgd(SCHEDULE, rounding=how, seed=3),
    long_form(optax.sgd(SCHEDULE, 0.9), SCHEDULE, how),
  ),
  "sgd, nesterov, clip": lambda how: (
    eco.sgd(1e-2, 0.8, nesterov=True, max_norm=1.0, rounding=how, seed=3),
    long_form(optax.sgd(1e-2, 0.8, nesterov=True), 1e-2, how, 1.0),
  ),
}  # fmt: skip


def tree(format):
  generator = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), jnp.float32)
  params = {
    "blocks": {"up": draw(3, 32, 64), "down": draw(3, 64, 32)},
    "head": draw(64, 512),  # Two chunks of rows.
    "bias": draw(64),
  }
  return eco.quantize(params, format, where=lambda path, leaf: leaf.ndim > 1)


def code_arrays(params):
  is_packed = lambda x: isinstance(x, eco.QuantizedArray)
  leaves = jax.tree.leaves(params, is_leaf=is_packed)
  return [np.asarray(x.codes.astype(jnp.float32)) for x in leaves if is_packed(x)]


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_the_general_path(name, how):
  """From one state, both take the same step: equal codes, moments equal to some last places.

  A code may differ where the last place of a proposal decides it, about once in a million.
  """
  short, long = PAIRS[name](how)
  params = tree(eco.FP8)
  state = short.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(long.init(params))
  steps_of = [jax.jit(tx.update) for tx in (short, long)]
  # Each leaf's gradient comes in bfloat16 under one rounding and in float32 under the other.
  dtypes = [jnp.bfloat16, jnp.float32][:: 1 if how == "nearest" else -1]
  dtypes = {"blocks": {"up": dtypes[0], "down": dtypes[1]}, "head": dtypes[1], "bias": jnp.float32}
  gradient = jax.jit(
    lambda params, i: jax.tree.map(
      lambda x, dtype: jnp.sin(x + i).astype(dtype), eco.dequantize(params), dtypes
    )
  )
  for i in range(8):
    grads = gradient(params, jnp.float32(i))
    (found, found_state), (wanted, wanted_state) = (step(grads, state, params) for step in steps_of)
    new = eco.apply_updates(params, found)
    pairs = zip(code_arrays(new), code_arrays(eco.apply_updates(params, wanted)), strict=True)
    assert sum(np.sum(a != b) for a, b in pairs) <= 1
    for a, b in zip(jax.tree.leaves(found_state), jax.tree.leaves(wanted_state), strict=True):
      assert a.dtype == b.dtype
      a, b = (np.asarray(x, np.float32) for x in (a, b))
      scale = np.max(np.abs(b), initial=1e-30)
      # A last place of a scale is one of its weights', and their errors are divided by the learning
      # rate. Where a code differs the momentum owes another error.
      assert np.sum(np.abs(a - b) > 1e-4 * scale) <= 1
    params, state = new, found_state


@pytest.mark.parametrize(
  "tx",
  [
    eco.adamw(1e-2, max_norm=100.0),  # Less than the norm, and more than its quarter.
    eco.low_bit_moments(eco.adamw(1e-2)),
    eco.layer_by_layer(eco.sgd(1e-2)),
    eco.sgd(1e-2, keep_error=True),  # Not fused.
  ],
  ids=["clipped", "low-bit moments", "layer by layer", "not fused"],
)
def test_gradients_are_scaled_on_the_way(tx):
  """By a power of two, so that it makes no difference where."""
  params = tree(eco.FP8)
  state = tx.init(params)
  grads = jax.tree.map(lambda x: jnp.sin(x).astype(jnp.bfloat16), eco.dequantize(params))
  quarter = jax.tree.map(lambda g: g / 4, grads)

  @jax.jit
  def step(grads, state, params, **kwargs):
    updates, state = tx.update(grads, state, params, **kwargs)
    return jax.tree.map(as_parameter, updates, is_leaf=is_quantized), state

  found = step(grads, state, params, gradient_scale=0.25)
  wanted = step(quarter, state, params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=1e-6)
  unscaled = jax.tree.leaves(step(grads, state, params))
  pairs = zip(jax.tree.leaves(found), unscaled, strict=True)
  assert any(np.any(np.asarray(a != b)) for a, b in pairs)


@pytest.mark.parametrize("format", fused_leaves.FORMATS)
def test_every_format_takes_the_step_of_the_general_path(format):
  short, long = PAIRS["adamw"]("stochastic")
  params = eco.quantize(
    {"w": jax.random.normal(jax.random.key(0), (256, 128))}, fused_leaves.FORMATS[format]
  )
  grads = {"w": jnp.sin(eco.dequantize(params)["w"])}
  state = short.init(params)
  steps = [jax.jit(tx.update) for tx in (short, long)]
  for _ in range(3):
    (found, new_state), (wanted, _) = (step(grads, state, params) for step in steps)
    pairs = zip(code_arrays(found), code_arrays(wanted), strict=True)
    assert sum(np.sum(a != b) for a, b in pairs) <= 1
    params, state = found, new_state


def test_kernels_equal_the_definition_to_the_bit():
  """Without fused multiply-adds, which a compiler puts where it likes; in a process of its own."""
  program = pathlib.Path(fused_leaves.__file__)
  flags = fused_leaves.EXACT + " --xla_force_host_platform_device_count=4"
  flags = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, program], env=flags, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]


def test_shapes_that_do_not_tile_keep_to_the_definition():
  for format, shape in [
    (eco.FP8, (100, 128)),
    (eco.FP8, (256, 100)),
    (eco.FP8, (2**16, 128)),
    (eco.Format("int8", (4, 4)), (256, 128)),
    (eco.Format("float8_e4m3fn", contraction_axis=(-2, -1)), (256, 128)),
    (fused_leaves.ROWS["FP8 rows"], (256, 100)),
    (fused_leaves.ROWS["FP8 rows"], (100, 128)),
    (fused_leaves.ROWS["FP8 rows"], (32, 2**17)),
    (eco.Format("float8_e4m3fn", (1, 8)), (256, 128)),
  ]:
    leaf = jax.eval_shape(lambda f=format, s=shape: fused_leaves.make(SGD, f, s))
    assert not tpu_kernels.applies(leaf)
  leaf = fused_leaves.make(ADAMW, eco.FP8, (100, 128))
  found, wanted = (
    fused_leaves.run(f, ADAMW, "stochastic", leaf)
    for f in (fused_leaves.by_interpreted_panels, definition)
  )
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
  ("format", "spec"),
  [
    (eco.FP8, P("x", "y")),
    (eco.FP8, P(None, ("y", "x"))),
    (fused_leaves.ROWS["FP8 rows"], P("x", "y")),
    (eco.INT4, P("x")),
    # Eight rows are a quarter of a block: such parts are none, and the definition is partitioned.
    (eco.MXFP8, P(("x", "y"))),
  ],
)
def test_a_sharded_leaf_takes_the_same_step(format, spec, told):
  """In a program of several devices, told of its parts or not: the same codes where they were."""
  leaf = fused_leaves.make(ADAMW, format, (64, 32))
  wanted, _ = jax.jit(lambda x: take_step(ADAMW, "stochastic", x))(leaf)
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
  where = NamedSharding(mesh, spec)
  given = leaf._replace(gradient=jax.device_put(leaf.gradient, where))
  given = given._replace(weight=jax.device_put(leaf.weight, NamedSharding(mesh, P())))
  sharding = where if told else None
  step = jax.jit(lambda x: take_step(ADAMW, "stochastic", x, sharding))
  found, moments = step(given)
  assert len(moments[0].sharding.device_set) == 8
  differ = np.asarray(found.qvalue).view(np.uint8) != np.asarray(wanted.qvalue).view(np.uint8)
  assert np.sum(differ) <= 1


@pytest.mark.parametrize("spec", [P(None, "x", "y"), P("x", None, "y")])
def test_a_layer_of_a_split_stack_takes_the_same_step(spec):
  """Also where layers are on different devices: the same codes, and other layers stay."""
  leaf = fused_leaves.make(ADAMW, fused_leaves.ROWS["FP8 rows"], (64, 32), layer=1)
  wanted, _ = jax.jit(lambda x: take_step(ADAMW, "stochastic", x))(leaf)
  stack = fused_leaves.in_stack(leaf)
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
  told = jax.jit(lambda x: take_step(ADAMW, "stochastic", x, NamedSharding(mesh, spec)))
  results = told(jax.device_put(stack, NamedSharding(mesh, P())))
  found = fused_leaves.middle(stack, [np.asarray(x) for x in jax.tree.leaves(results)])
  assert found is not None
  differ = found[0].view(np.uint8) != np.asarray(wanted.qvalue).view(np.uint8)
  assert np.sum(differ) <= 1


def test_a_cpu_holds_no_float32_copy():
  """Beside the codes once more, as bytes, temporaries are those of a chunk of rows."""
  shape = (4096, 4096)
  tx = eco.adamw(1e-3)
  params = jax.eval_shape(lambda: {"w": eco.quantize(jnp.ones(shape), eco.FP8)})
  step = lambda grads, state, params: tx.update(grads, state, params)
  compiled = (
    jax.jit(step, donate_argnums=(1, 2))
    .lower({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, jax.eval_shape(tx.init, params), params)
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * shape[0] * shape[1]


@pytest.fixture(scope="module")
def compile_lib():
  """Where there is a compiler for TPUs, and the harness's packages."""
  pytest.importorskip("libtpu")
  pytest.importorskip("ml_collections")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  from eco_optax.training import compile as compile_lib

  # Programs for devices that are not there cannot be loaded from a cache.
  with compile_lib.without_cache():
    yield compile_lib


@pytest.fixture(scope="module")
def tpus(compile_lib):
  """Four TPUs that are not there."""
  return compile_lib.topology_devices("v5p:2x2x1")


@pytest.fixture
def tpu(tpus):
  """One of them."""
  return tpus[0]


def compile_for(where, leaf):
  """The fused step of a leaf on a TPU, or by a sharding on several; weight and moments donated."""
  sharding = None
  if isinstance(where, NamedSharding):
    here, sharding = fused_leaves.spread(leaf, where), where
  else:
    here = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(where)), leaf
    )
  step = lambda weight, moments, rest: take_step(
    ADAMW, "stochastic", rest._replace(weight=weight, moments=moments), sharding
  )
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
    here.weight, here.moments, here._replace(weight=None, moments=None)
  )
  compiled = lowered.compile()
  assert "tpu_custom_call" in compiled.as_text()
  return compiled


@pytest.mark.parametrize(
  # Gradient, codes and moments; then scales of 32 weights, for columns in float32 in the kernel and
  # around it, for rows as they are stored.
  ("preset", "moments_in", "once", "scales"),
  [
    ("FP8", "float8_e4m3fn", 2 + 2 + 4, 2.0),
    ("FP8", "bfloat16", 2 + 2 + 8, 0.02),
    ("FP8", "factored", 2 + 2 + 2, 1.0),
    ("FP8 rows", "float32", 2 + 2 + 16, 0.02),
    ("FP8 rows", "float8_e4m3fn", 2 + 2 + 4, 0.7),
    ("FP8 rows", "factored", 2 + 2 + 2, 0.35),
    ("MXFP8 rows", "float32", 2 + 2 + 16, 0.35),
  ],
)
def test_kernels_read_and_write_moments_as_they_are_stored(tpu, preset, moments_in, once, scales):
  shape = (4096, 16384)
  format = (fused_leaves.FORMATS | fused_leaves.ROWS)[preset]
  leaf = jax.eval_shape(
    lambda: fused_leaves.make(
      ADAMW, format, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in
    )
  )
  size = shape[0] * shape[1]
  compiled = compile_for(tpu, leaf)
  used = compiled.memory_analysis()
  assert once < compiled.cost_analysis()["bytes accessed"] / size < once + scales
  assert used.alias_size_in_bytes >= size * (once - 2) / 2
  assert used.temp_size_in_bytes / size < 0.3


@pytest.mark.parametrize(
  # Output channels that are whole take one pass. Of those whose rows several devices have, the
  # largest proposals are found in one more: gradient, codes and moments.
  ("preset", "spec", "moments_in", "wanted"),
  [
    ("FP8", P(None, "x"), "int8", 9.8),
    ("FP8", P("x", None), "float32", 20 + 2 + 1 + 8),
    ("FP8 rows", P(None, "x"), "float32", 20 + 2 + 1 + 8),
  ],
)
def test_kernels_compile_for_several_tpus(compile_lib, tpus, preset, spec, moments_in, wanted):
  shape = (4096, 16384)
  format = (fused_leaves.FORMATS | fused_leaves.ROWS)[preset]
  leaf = jax.eval_shape(
    lambda: fused_leaves.make(
      ADAMW, format, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in
    )
  )
  size = shape[0] * shape[1] // len(tpus)
  compiled = compile_for(NamedSharding(Mesh(np.array(tpus), ("x",)), spec), leaf)
  used = compiled.memory_analysis()
  assert compiled.cost_analysis()["bytes accessed"] / size == pytest.approx(wanted, abs=0.1)
  assert used.alias_size_in_bytes >= (3 if moments_in != "float32" else 9) * size
  assert used.temp_size_in_bytes / size < 0.3
  # What is exchanged is one number for each channel.
  found = compile_lib.collectives(compiled.as_text())
  is_whole = leaf.weight.scale.shape[1] > 1 and spec[0] is None
  exchanged = {"count": 1, "bytes": 4 * leaf.weight.scale.size}
  assert found == ({} if is_whole else {"all-reduce": {"s32": exchanged}})


@pytest.mark.parametrize(
  # Gradient in float32, codes and moments; then scales, those of moments for each 32 rows.
  ("tx", "once", "scales"),
  [
    (eco.adamw(1e-3), 4 + 2 + 16, 0.02),
    (eco.low_bit_moments(eco.adamw(1e-3)), 4 + 2 + 4, 2.0),
    # The gradient is read once more, for the new means.
    (eco.low_bit_moments(eco.adamw(1e-3), nu="factored"), 2 * 4 + 2 + 2, 1.0),
  ],
  ids=["float32 moments", "FP8 moments", "factored second moments"],
)
def test_layer_by_layer_leaves_stacks_whole_to_kernels(tpu, tx, once, scales):
  shape = (8, 1024, 4096)
  tx = eco.layer_by_layer(tx)
  params = jax.eval_shape(lambda: eco.quantize({"w": jnp.zeros(shape)}, eco.FP8))

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  here = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(tpu)),
    (params, jax.eval_shape(tx.init, params), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}),
  )
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*here).compile()
  size = np.prod(shape)
  assert once < compiled.cost_analysis()["bytes accessed"] / size < once + scales
  assert compiled.memory_analysis().temp_size_in_bytes / size < scales


@pytest.mark.parametrize("format", fused_leaves.FORMATS)
def test_kernels_compile_for_tpus_and_work_in_place(tpu, format):
  shape = (4096, 16384)
  preset = fused_leaves.FORMATS[format]
  leaf = jax.eval_shape(
    lambda: fused_leaves.make(ADAMW, preset, shape, gradient_dtype=jnp.bfloat16)
  )
  size = shape[0] * shape[1]
  moved = tpu_kernels.bytes_moved(ADAMW, "stochastic", leaf) / size
  scale_bytes = 8 * leaf.weight.scale.size / size
  once = 18 + 2 * preset.bits / 8  # Gradient; moments and codes, read and written.
  if preset.granularity == "tensor" or preset.two_level:  # Read once more, for the largest.
    assert once + 10 < moved < once + 10 + preset.bits / 8 + 3 * scale_bytes + 0.01
  else:
    assert once < moved < once + 2 * scale_bytes + 0.1

  compiled = compile_for(tpu, leaf)
  used = compiled.memory_analysis()
  assert used.alias_size_in_bytes >= size * (8 + preset.bits / 8)
  # Block scales are in float32 and one for each column on their way in and out.
  assert used.temp_size_in_bytes / size < 0.01 + 2 * 4 / (
    preset.granularity[0] if isinstance(preset.granularity, tuple) else 4096
  )


def test_gradients_of_numbered_layers_are_stepped_before_the_next_are_made(compile_lib, tpu):
  """16 bytes per weight of a layer wait without `order`: gradients of two layers and factors."""
  layers, width, hidden, tokens = 6, 512, 2048, 512
  way = peaks.Way(eco.adamw(1e-3))
  params = jax.eval_shape(lambda: way.params(layers, width, hidden))
  x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
  arguments = compile_lib.on_device(tpu, (params, jax.eval_shape(way.tx.init, params), x))
  compiled = jax.jit(way.step, donate_argnums=(0, 1)).lower(*arguments).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 12 * 2 * width * hidden
