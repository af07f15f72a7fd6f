"""Gradient release makes the ordinary step's numbers, and refuses what it cannot do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
  """Arrays are equal but for the order of sums, which may turn the rounding of a code."""

  def check(path, a, b):
    name = jax.tree_util.keystr(path)
    a, b = (np.asarray(x) for x in (a, b))
    if a.dtype in (np.float32, np.float64):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-7, err_msg=name)
    else:
      assert np.mean(a != b) < 1e-3, name

  jax.tree_util.tree_map_with_path(check, ours, theirs)


OPTIMIZERS = {
  "fused": lambda: eco.layer_by_layer(eco.adamw(1e-2, seed=3)),
  "FP8 moments": lambda: eco.low_bit_moments(eco.adamw(1e-2)),
  "factored": lambda: eco.low_bit_moments(eco.adamw(1e-2), nu="factored"),
  "factored, any optimizer": lambda: eco.low_bit_moments(
    eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params()), nu="factored"
  ),
  "any optimizer": lambda: eco.layer_by_layer(
    eco.error_feedback_to_momentum(optax.nadam(1e-2), eco.quantize_params())
  ),
  "master weights": lambda: eco.master_weights(optax.adam(1e-2), eco.quantize_params()),
  "in a chain": lambda: optax.chain(optax.scale(0.5), eco.adamw(1e-2)),
}
MODELS = {"scanned": (scanned, True), "unrolled": (unrolled, False)}


@pytest.mark.parametrize(
  ("model", "optimizer", "format", "dense"),
  [
    ("scanned", "fused", eco.FP8, True),
    ("scanned", "FP8 moments", eco.INT4, False),
    ("unrolled", "FP8 moments", eco.FP8, True),
    ("unrolled", "fused", eco.INT4, False),
  ],
)
def test_steps_are_the_ordinary_ones(model, optimizer, format, dense):
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


@pytest.mark.parametrize("optimizer", ["any optimizer", "master weights", "in a chain"])
def test_optimizers_of_any_kind(optimizer):
  params, tokens = make(is_stacked=True)
  tx = OPTIMIZERS[optimizer]()
  ours = theirs = (params, tx.init(params))
  step = jax.jit(eco.value_and_step(scanned, tx, has_aux=True))
  plain = ordinary(scanned, tx)
  for i in range(2):
    _, *ours, _ = step(*ours, tokens[i])
    _, *theirs = plain(*theirs, tokens[i])
  assert_same(ours, theirs)


@pytest.mark.parametrize("model", MODELS)
def test_an_exact_clip_is_the_ordinary_one(model):
  fn, is_stacked = MODELS[model]
  params, tokens = make(is_stacked)
  tx, clipping = eco.adamw(1e-2, weight_decay=0.1), eco.adamw(1e-2, weight_decay=0.1, max_norm=0.25)
  ours, theirs = (params, tx.init(params)), (params, clipping.init(params))
  step = jax.jit(eco.value_and_step(fn, tx, has_aux=True, max_norm=0.25))
  plain = ordinary(fn, clipping)
  for i in range(3):
    _, *ours, report = step(*ours, tokens[i % 2])
    _, *theirs = plain(*theirs, tokens[i % 2])
    assert report.norm > 0.25  # Or nothing was clipped.
  state = optax.tree.get(theirs[1], "mu"), optax.tree.get(theirs[1], "nu")
  own_state = optax.tree.get(ours[1], "mu"), optax.tree.get(ours[1], "nu")
  assert_same((ours[0], own_state), (theirs[0], state))


def test_norms_are_those_of_the_gradient_and_a_layer_clips_by_its_own():
  params, tokens = make(is_stacked=True)
  (_, _), grads = eco.value_and_grad(scanned, has_aux=True)(params, tokens[0])
  tx = eco.sgd(1.0, momentum=0.9)
  step = eco.value_and_step(scanned, tx, has_aux=True, clip="layer", max_norm=1e-3)
  _, _, state, report = jax.jit(step)(params, tx.init(params), tokens[0])
  kernel, scale = (np.asarray(grads["stack"][name], np.float64) for name in ("kernel", "scale"))
  norms = np.linalg.norm(kernel.reshape(LAYERS, -1), axis=1)
  np.testing.assert_allclose(report.norms["stack/kernel"], norms, rtol=1e-5)
  np.testing.assert_allclose(report.norms["stack/scale"], np.linalg.norm(scale), rtol=1e-5)
  squares = sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(grads))
  np.testing.assert_allclose(report.norm, np.sqrt(squares), rtol=1e-5)

  # Momentum of a first step: the clipped gradient, and what the rule adds for the error.
  trace = optax.tree.get(state, "trace")["embedding"]
  np.testing.assert_allclose(
    np.linalg.norm(np.asarray(trace, np.float64)), min(1e-3, report.norms["embedding"]), rtol=1e-4
  )
  clipped = grads["stack"]["kernel"] * (1e-3 / norms)[:, None, None].astype(np.float32)
  grads["stack"]["kernel"] = clipped
  plain = tx.update(grads, tx.init(params), params)[1]
  ours, theirs = (optax.tree.get(x, "trace")["stack"]["kernel"] for x in (state, plain))
  np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_gradient_scale_multiplies_and_skips():
  params, tokens = make(is_stacked=True)
  tx = eco.adamw(1e-2)
  step = jax.jit(eco.value_and_step(scanned, tx, has_aux=True))
  doubled = lambda params, tokens: jax.tree.map(lambda x: 2 * x, scanned(params, tokens))
  twice = jax.jit(eco.value_and_step(doubled, tx, has_aux=True))
  start = params, tx.init(params)
  _, *ours, _ = step(*start, tokens[0], gradient_scale=2.0)
  _, *theirs, _ = twice(*start, tokens[0])
  assert_same(ours, theirs)
  _, *ours, report = step(*start, tokens[0], gradient_scale=jnp.nan)
  jax.tree.map(np.testing.assert_array_equal, tuple(ours), start)
  assert report.skipped == LAYERS + 2  # With the stack of scales, and the embedding.


@jax.custom_vjp
def poisoned(x, factor):
  """x, whose gradient is multiplied by a factor."""
  del factor
  return x


poisoned.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def test_a_gradient_that_is_not_finite_skips_its_own_layer():
  params, tokens = make(is_stacked=True)

  def fn(params, tokens, factors):
    def body(x, own):
      params, factor = own
      return layer(x, params | {"kernel": poisoned(params["kernel"], factor)}), None

    x, _ = jax.lax.scan(body, params["embedding"][tokens], (params["stack"], factors))
    return jnp.mean(x**2)

  tx = eco.adamw(1e-2, weight_decay=0.1)
  start = params, tx.init(params)
  step = jax.jit(eco.value_and_step(fn, tx))
  good = jnp.ones(LAYERS)
  _, params1, state1, _ = step(*start, tokens[0], good)
  value, params2, state2, report = step(*start, tokens[0], good.at[2].set(jnp.nan))
  assert np.isfinite(value)
  assert report.skipped == 1
  np.testing.assert_array_equal(np.isfinite(report.norms["stack/kernel"]), [1, 1, 0, 1])

  def check(path, old, new, with_good):
    if "kernel" in jax.tree_util.keystr(path):
      old, new, with_good = (np.asarray(x) for x in (old, new, with_good))
      np.testing.assert_array_equal(new[2], old[2])
      new, with_good = new.copy(), with_good.copy()
      new[2] = with_good[2]
    np.testing.assert_array_equal(new, with_good)

  jax.tree_util.tree_map_with_path(check, start, (params2, state2), (params1, state1))
  # With an exact clip the whole norm is not finite, and all is as it was.
  step = jax.jit(eco.value_and_step(fn, tx, max_norm=1.0))
  _, *new, report = step(*start, tokens[0], good.at[2].set(jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, tuple(new), start)
  assert report.skipped == LAYERS + 2


def test_a_loss_that_is_not_finite_changes_nothing():
  params, tokens = make(is_stacked=False)
  tx = eco.adamw(1e-2)
  start = params, tx.init(params)
  fn = lambda params, tokens: unrolled(params, tokens)[0] * jnp.inf
  _, *new, _ = jax.jit(eco.value_and_step(fn, tx))(*start, tokens[0])
  jax.tree.map(np.testing.assert_array_equal, tuple(new), start)


@pytest.mark.parametrize("max_norm", [None, 0.25])
@pytest.mark.parametrize("model", MODELS)
def test_micro_batches_are_one_batch(model, max_norm):
  fn, is_stacked = MODELS[model]
  params, tokens = make(is_stacked)
  tx = eco.adamw(1e-2)
  ours = theirs = (params, tx.init(params))
  how = {"has_aux": True, "max_norm": max_norm}
  step = jax.jit(eco.value_and_step(fn, tx, accumulation=2, **how))
  whole = jax.jit(eco.value_and_step(fn, tx, **how))
  for _ in range(2):
    value, *ours, report = step(*ours, tokens)
    want, *theirs, want_report = whole(*theirs, tokens.reshape(-1, tokens.shape[-1]))
    np.testing.assert_allclose(value[0], want[0], rtol=1e-5)
    assert value[1].shape[0] == 2
    np.testing.assert_allclose(np.max(value[1], axis=0), want[1], rtol=1e-5)
    np.testing.assert_allclose(report.norm, want_report.norm, rtol=1e-5)
  assert_same(ours, theirs)


def on_mesh(params, sizes=(2, 2)):
  """Parameters on a mesh, kernels and embedding split over its second axis."""
  mesh = jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

  def place(x):
    split = "fsdp" if x.ndim > 1 and x.shape[-1] % sizes[1] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), split))

  shardings = jax.tree.map(place, params)
  return jax.device_put(params, shardings), shardings


@pytest.mark.parametrize(
  ("model", "optimizer", "dense", "accumulation", "keep_gradients"),
  [
    ("scanned", "FP8 moments", False, 2, False),
    ("unrolled", "any optimizer", True, None, True),
  ],
)
def test_devices_that_sum_gradients_once_make_the_ordinary_step(
  model, optimizer, dense, accumulation, keep_gradients
):
  fn, is_stacked = MODELS[model]
  fn = functools.partial(fn, matmul=jnp.matmul if dense else eco.matmul)
  params, tokens = make(is_stacked)
  tx = OPTIMIZERS[optimizer]()
  placed, shardings = on_mesh(params)
  ours, theirs = (placed, tx.init(placed)), (params, tx.init(params))
  how = {"shardings": shardings, "accumulation": accumulation, "max_norm": 0.25}
  how |= {"batch_axes": ("data", "fsdp"), "reduce_dtype": jnp.float32, "has_aux": True}
  how |= {"keep_gradients": keep_gradients}
  step = jax.jit(eco.value_and_step(fn, tx, dense, **how))
  whole = jax.jit(eco.value_and_step(fn, tx, dense, has_aux=True, max_norm=0.25))
  examples = tokens.reshape(-1, tokens.shape[-1])
  for _ in range(2):
    value, *ours, report = step(*ours, tokens if accumulation else examples)
    want, *theirs, want_report = whole(*theirs, examples)
    np.testing.assert_allclose(value[0], want[0], rtol=1e-5)
    assert value[1].shape[: 2 if accumulation else 1] == ((2, 4) if accumulation else (4,))
    largest = np.max(value[1], axis=(0, 1) if accumulation else 0)
    np.testing.assert_allclose(largest, want[1], rtol=1e-5)
    np.testing.assert_allclose(report.norm, want_report.norm, rtol=1e-5)
  assert_same(ours, theirs)


def test_devices_sum_in_bfloat16_by_default():
  params, tokens = make(is_stacked=True)
  placed, shardings = on_mesh(params)
  tx = eco.sgd(1.0, momentum=0.9)  # Whose momentum of a first step is the gradient, and an error.
  how = {"shardings": shardings, "batch_axes": ("data", "fsdp"), "accumulation": 2}
  loss = lambda params, tokens: scanned(params, tokens)[0]
  grads = {}
  for dtype in (jnp.bfloat16, jnp.float32):
    dtypes = {} if dtype == jnp.bfloat16 else {"reduce_dtype": dtype}
    step = jax.jit(eco.value_and_step(loss, tx, **how, **dtypes))
    state = step(placed, tx.init(placed), tokens)[2]
    grads[dtype] = optax.tree.get(state, "trace")["embedding"]
  found, want = (np.asarray(grads[dtype], np.float64) for dtype in (jnp.bfloat16, jnp.float32))
  error = np.linalg.norm(found - want) / np.linalg.norm(want)
  assert 1e-5 < error < 2**-7  # Four summands, of eight bits each.


def test_collectives_are_outside_the_loop_over_micro_batches():
  compile_lib = pytest.importorskip("eco_optax.training.compile")
  params, _ = make(is_stacked=True, format=eco.INT8)
  placed, shardings = on_mesh(params)
  tx, parts = eco.sgd(1.0, momentum=0.9), 8
  args = placed, tx.init(placed), jnp.zeros((parts, 4, 8), jnp.int32)
  loss = lambda params, tokens: scanned(params, tokens)[0]

  def lower(batch_axes):
    how = {"shardings": shardings, "accumulation": parts, "batch_axes": batch_axes}
    return jax.jit(eco.value_and_step(loss, tx, **how), donate_argnums=(0, 1)).lower(*args)

  lowered = lower(("data", "fsdp"))
  found = compile_lib.collectives(lowered.compile().as_text())
  left = compile_lib.collectives(lower(None).compile().as_text())
  counts = lambda found: [entry["count"] for dtypes in found.values() for entry in dtypes.values()]
  assert max(counts(found)) < parts * LAYERS < max(counts(left))
  # Codes of each layer, forward and back.
  assert found["all-gather"]["s8"] == {"count": 2 * LAYERS, "bytes": 2 * LAYERS * WIDTH**2}
  # Of each layer kernel and scale, and the embedding as it is looked up. Its transpose belongs to
  # no parameter, and is summed whole. CPUs widen what they sum.
  assert found["reduce-scatter"]["f32"]["count"] == 2 * LAYERS + 1
  pattern = r'"stablehlo.(reduce_scatter|all_reduce)".*?\}\) : \(tensor<([x\d]+)x(\w+)>'
  sums = re.findall(pattern, lowered.as_text(), re.DOTALL)
  assert sums
  assert all(dtype == ("bf16" if "x" in shape else "f32") for _, shape, dtype in sums)


def test_gradients_that_are_kept_are_stepped_all_or_not_at_all():
  params, tokens = make(is_stacked=True)
  tx = eco.adamw(1e-2, weight_decay=0.1)
  ours = theirs = (params, tx.init(params))
  how = {"has_aux": True, "max_norm": 0.25}
  step = jax.jit(eco.value_and_step(scanned, tx, keep_gradients=True, **how))
  twice = jax.jit(eco.value_and_step(scanned, tx, **how))
  for i in range(2):
    _, *ours, report = step(*ours, tokens[i])
    _, *theirs, want = twice(*theirs, tokens[i])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), report, want)
  assert_same(ours, theirs)

  def fn(params, tokens):
    kernels = params["stack"]["kernel"]
    poison = jnp.ones(LAYERS).at[2].set(jnp.nan)
    body = lambda x, own: (layer(x, own[0] | {"kernel": poisoned(own[0]["kernel"], own[1])}), None)
    own = params["stack"] | {"kernel": kernels}, poison
    return jnp.mean(jax.lax.scan(body, params["embedding"][tokens], own)[0] ** 2)

  step = jax.jit(eco.value_and_step(fn, tx, keep_gradients=True))
  _, *new, report = step(params, tx.init(params), tokens[0])
  jax.tree.map(np.testing.assert_array_equal, tuple(new), (params, tx.init(params)))
  assert report.skipped == LAYERS + 2
  np.testing.assert_array_equal(np.isfinite(report.norms["stack/kernel"]), [1, 1, 0, 1])


def test_losses_with_carries_constants_and_two_stacks():
  """Integers and constants in the carry, weights that all layers share, a scan from the end."""
  params, tokens = make(is_stacked=True)
  params |= {"second": params["stack"]["kernel"], "shared": params["unused"]}

  def fn(params, tokens):
    def first(carry, own):
      x, total, count = carry
      x = jnp.tanh(layer(x, own) @ params["shared"])
      return (x, total + jnp.mean(x**2), count + 1), jnp.sum(x, axis=(0, 1))

    start = params["embedding"][tokens], jnp.zeros([]), 0
    (x, total, count), sums = jax.jit(lambda: jax.lax.scan(first, start, params["stack"]))()
    second = lambda x, w: (x + jnp.sin(x @ w), None)
    x, _ = jax.lax.scan(second, x, params["second"], reverse=True)
    return jnp.mean(x**2) + total / count + jnp.mean(sums * sums), {
      "count": count,
      "tokens": tokens,
    }

  tx = eco.layer_by_layer(eco.adamw(1e-2))
  ours = theirs = (params, tx.init(params))
  step, plain = jax.jit(eco.value_and_step(fn, tx, has_aux=True)), ordinary(fn, tx)
  for i in range(2):
    value, *ours, report = step(*ours, tokens[i])
    want, *theirs = plain(*theirs, tokens[i])
    np.testing.assert_allclose(value[0], want[0], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, value[1], want[1])
  assert_same(ours, theirs)
  assert report.norms["stack/kernel"].shape == report.norms["second"].shape == (LAYERS,)
  assert report.norms["shared"].shape == ()


def test_layers_are_made_again_from_what_a_format_keeps():
  """Against a layer that saves the rounded input itself, differentiated by JAX."""
  params, tokens = make(is_stacked=True)

  @jax.custom_vjp
  def rounding_layer(x, own):
    return layer(x, own)

  def backward(residuals, grad):
    x, own = residuals
    packed = eco.quantize({"x": x}, eco.FP8_TOKEN)["x"]
    return jax.vjp(layer, packed.dequantize(), own)[1](grad)

  rounding_layer.defvjp(lambda x, own: (layer(x, own), (x, own)), backward)

  def fn(own_layer, params, tokens):
    body = lambda x, own: (own_layer(x, own), None)
    x, _ = jax.lax.scan(body, params["embedding"][tokens], params["stack"])
    return jnp.mean(x**2)

  tx = eco.sgd(1.0, momentum=0.9)
  plain = functools.partial(fn, layer)
  want = jax.jit(eco.value_and_step(functools.partial(fn, rounding_layer), tx))
  seen = []
  for kept in (eco.FP8_TOKEN, lambda path: seen.append(path) or eco.FP8_TOKEN, None):
    step = jax.jit(eco.value_and_step(plain, tx, kept_format=kept))
    value, *ours, report = step(params, tx.init(params), tokens[0])
    want_value, *theirs, want_report = want(params, tx.init(params), tokens[0])
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    if kept is None:
      difference = report.norms["stack/kernel"] / want_report.norms["stack/kernel"] - 1
      assert np.abs(difference).max() > 1e-3  # Or the test would show nothing.
    else:
      assert_same(ours, theirs)
  assert seen == ["stack/kernel"]
  blocks = eco.value_and_step(plain, tx, kept_format=eco.Format("int8", (3, 1)))
  with pytest.raises(ValueError, match=r"what the scan over stack/kernel hands on.* \(3, 1\)"):
    blocks(params, tx.init(params), tokens[0])


def test_no_stack_of_gradients_is_made():
  stack = (16, 256, 256)
  params = eco.quantize({"stack": jnp.ones(stack)}, eco.INT8)
  tx = eco.adamw(1e-3)

  def fn(params, x):
    body = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
    return jnp.mean(jax.lax.scan(body, x, params["stack"])[0] ** 2)

  def temporaries(step):
    args = params, tx.init(params), jnp.ones((4, 256))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  def plain(params, state, x):
    value, grads = eco.value_and_grad(fn)(params, x)
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state, value

  gradient = 4 * np.prod(stack)
  assert temporaries(plain) > gradient  # Or it would show nothing.
  for how in ({}, {"max_norm": 1.0}, {"max_norm": 1.0, "clip": "layer"}):
    assert temporaries(eco.value_and_step(fn, tx, **how)) < gradient / 2, how


@pytest.mark.parametrize(
  "tx",
  [
    eco.adamw(1e-3, max_norm=1.0),
    optax.chain(optax.clip_by_global_norm(1.0), eco.adamw(1e-3)),
    eco.error_feedback_to_momentum(
      optax.apply_if_finite(optax.adam(1e-3), 3), eco.quantize_params()
    ),
  ],
  ids=["max_norm", "chain", "apply_if_finite"],
)
@pytest.mark.parametrize("is_stacked", [True, False])
def test_what_couples_gradients_is_refused(tx, is_stacked):
  params, tokens = make(is_stacked)
  step = eco.value_and_step(scanned if is_stacked else unrolled, tx, has_aux=True)
  with pytest.raises(ValueError, match=r"depends on gradients of other leaves.*pass clip= and"):
    step(params, tx.init(params), tokens[0])


def test_errors_name_the_remedy():
  params, tokens = make(is_stacked=True)
  tx = eco.adamw(1e-3)
  state = tx.init(params)

  def branches(params, tokens):
    return jnp.sum(params["unused"]) if params["unused"][0, 0] > 0 else 0.0

  def run(fn, *args, **how):
    eco.value_and_step(fn, tx, **how)(params, state, *args)

  with pytest.raises(ValueError, match=r"needs the values.*use eco\.value_and_grad"):
    run(branches, tokens)
  with pytest.raises(ValueError, match="must be one real number"):
    run(lambda params, tokens: params["unused"], tokens)
  with pytest.raises(ValueError, match=r"accumulation=3 .* first axis of 3.*\(2, 4, 8\)"):
    run(scanned, tokens, has_aux=True, accumulation=3)
  with pytest.raises(ValueError, match="clip='layer' and keep_gradients exclude each other"):
    run(scanned, tokens, has_aux=True, clip="layer", keep_gradients=True)
  with pytest.raises(ValueError, match="batch_axes needs the parameters' shardings"):
    run(scanned, tokens, has_aux=True, batch_axes=("data",))
  _, shardings = on_mesh(params)
  how = {"has_aux": True, "shardings": shardings}
  with pytest.raises(ValueError, match=r"batch_axes \('data',\) lack the mesh axis 'fsdp' of 2"):
    run(scanned, tokens, batch_axes=("data",), **how)
  with pytest.raises(ValueError, match=r"batch_axes \['rows'\] are none of the mesh's axes"):
    run(scanned, tokens, batch_axes=("rows",), **how)
  with pytest.raises(ValueError, match=r"axis 0 of examples.*each of 4 devices.*\(2, 4, 8\)"):
    run(scanned, tokens, batch_axes=("data", "fsdp"), **how)
  with pytest.raises(ValueError, match="reduction_groups needs batch_axes"):
    run(scanned, tokens, reduction_groups=4, **how)
  how |= {"batch_axes": ("data", "fsdp")}
  with pytest.raises(ValueError, match="reduction_groups 6 is not a multiple of the 4 devices"):
    run(scanned, tokens, reduction_groups=6, **how)
  with pytest.raises(ValueError, match=r"axis 0 of examples.*each of 8 groups.*\(2, 4, 8\)"):
    run(scanned, tokens, reduction_groups=8, **how)
  with pytest.raises(ValueError, match="clip must be 'exact' or 'layer', got 'global'"):
    eco.value_and_step(scanned, tx, clip="global")
  with pytest.raises(ValueError, match="leaf 'count' holds int32, which has no gradient"):
    eco.value_and_step(scanned, tx)(params | {"count": jnp.zeros([], jnp.int32)}, state, tokens)
