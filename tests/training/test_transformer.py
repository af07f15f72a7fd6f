"""Whole models: sizes, and values and gradients against a float64 NumPy of the definition."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

import eco_optax as eco
from eco_optax.training.models import transformer

SMALL = {"layers": 3, "width": 16, "heads": 2, "vocabulary": 11, "mlp_width": 24}
FAMILIES = {
  "llama": SMALL,
  "gemma": {
    **SMALL,
    "layers": 4,  # With global_every=3, number 2 alone is global.
    "kv_heads": 1,
    "head_width": 6,
    "activation": "gelu",
    "tied_embedding": True,
    "scaled_embedding": True,
    "norm_epsilon": 1e-3,
    "norm_offset": True,
    "post_norms": True,
    "qk_norm": True,
    "rope_interleaved": False,
    "rope_base": 1000.0,
    "local_rope_base": 10.0,
    "window": 3,
    "global_every": 3,
  },
  "smoe": {
    **SMALL,
    "activation": "gelu",
    "gated": False,
    "experts": 4,
    "experts_per_token": 2,
    "expert_width": 12,
    "capacity_factor": 1.25,
    "balance_weight": 0.01,
    "quantized": "experts",
  },
  "deepseek": {
    **SMALL,
    "rope_interleaved": False,
    "experts": 6,
    "experts_per_token": 3,
    "expert_width": 8,
    "shared_experts": 2,
    "dense_layers": 1,
    "balance_weight": 0.1,
  },
  # Of no one's: layers with and without experts are counted together where windows are.
  "mixed": {
    **SMALL,
    "kv_heads": 1,
    "experts": 4,
    "experts_per_token": 2,
    "expert_width": 8,
    "dense_layers": 1,
    "capacity_factor": 0.8,
    "normalize_expert_weights": True,
    "balance_weight": 0.1,
    "window": 3,
    "global_every": 2,
    "local_rope_base": 10.0,
  },
}
# Options of each family that its logits depend on, with the values they are not to have.
OTHERWISE = {
  "llama": {"rope_interleaved": False, "rope_base": 100.0, "norm_epsilon": 0.1},
  "gemma": {
    "activation": "silu",
    "scaled_embedding": False,
    "norm_epsilon": 1e-5,
    "norm_offset": False,
    "post_norms": False,
    "qk_norm": False,
    "rope_interleaved": True,
    "rope_base": 10.0,
    "local_rope_base": 1000.0,
    "window": 4,
    "global_every": 2,
  },
  "smoe": {"activation": "silu", "experts_per_token": 1, "capacity_factor": None},
  "deepseek": {"shared_experts": 0, "normalize_expert_weights": True, "experts_per_token": 2},
  "mixed": {"global_every": 3, "normalize_expert_weights": False, "capacity_factor": 1.2},
}
# Logits are of order 1 to 10, after a few dozen float32 roundings in a row, each of which the next
# layers' large weights make a few times larger.
LOGIT_ROUNDOFF = 5e-6


@functools.cache
def strong_params(name, packed):
  """A family's parameters, far from where the model is linear."""
  config = transformer.TransformerConfig(**FAMILIES[name])
  generator = np.random.default_rng(0)

  def strong(path, x):
    kind = path[-1].key
    if kind == "scale":  # Of norms: far from 0 and from 1.
      return x + jnp.asarray(0.3 * generator.standard_normal(x.shape), jnp.float32)
    return {"kernel": 10, "router": 30, "embedding": 5, "head": 10}[kind] * x

  if packed:
    dense = strong_params(name, False)
    where = transformer.is_quantized(config)
    return jax.jit(lambda p: eco.quantize(p, eco.FP8.transposed, where))(dense)
  dense = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  return jax.tree_util.tree_map_with_path(strong, dense)


def model(name, packed=False, **changes):
  """A family's config with some changes, and its parameters."""
  config = transformer.TransformerConfig(**{**FAMILIES[name], **changes})
  return config, strong_params(name, packed)


# Windows of nine: eight tokens that go in, and eight targets.
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 11, (2, 9)), jnp.int32)


def leaf_names(tree):
  """Leaves by name; packed ones are leaves."""
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)[0]
  }


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens_BxM):
  return transformer.apply(config, params, tokens_BxM[:, :-1])


@functools.partial(jax.jit, static_argnames=("config", "dense", "gradient_dtype"))
def gradients(config, params, dense=False, gradient_dtype=jnp.float32):
  """((loss, metrics), gradients) on TOKENS."""
  loss = lambda p: transformer.loss(config, p, TOKENS)
  return eco.value_and_grad(loss, dense=dense, has_aux=True, gradient_dtype=gradient_dtype)(params)


def assert_trees_close(a, b, rtol):
  """Leaf by leaf, to a share of the leaf's largest entry."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for name, x in leaf_names(a).items():
    y = leaf_names(b)[name]
    np.testing.assert_allclose(x, y, atol=rtol * np.abs(y).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(
  ("layers", "width", "heads", "mlp_width", "count"),
  [
    (6, 640, 5, 1792, 30_482_560),
    (7, 768, 6, 2048, 49_556_736),
    (8, 1024, 8, 2816, 102_777_856),
    (10, 1280, 10, 3584, 203_188_480),
    (13, 1664, 13, 4608, 443_068_288),
    (16, 2048, 16, 5632, 822_151_168),
  ],
)
def test_parameter_counts_are_the_scaling_studys(layers, width, heads, mlp_width, count):
  config = transformer.TransformerConfig(layers, width, heads, vocabulary=32_000)
  assert config.mlp_width == mlp_width
  assert transformer.count_params(config) == count
  assert transformer.count_params(config, embedding=True) == count + 2 * 32_000 * width


def test_parameter_counts_of_gemma3_1b():
  config = transformer.TransformerConfig(
    layers=26,
    width=1152,
    heads=4,
    kv_heads=1,
    head_width=256,
    mlp_width=6912,
    vocabulary=262_144,
    tied_embedding=True,
    qk_norm=True,
    post_norms=True,
    norm_offset=True,
  )
  # The number of its published checkpoint.
  assert transformer.count_params(config, embedding=True) == 999_885_952
  assert transformer.count_params(config) == 999_885_952 - 262_144 * 1152


def test_parameter_counts_of_deepseek_moe_16b():
  config = transformer.TransformerConfig(
    layers=28,
    width=2048,
    heads=16,
    vocabulary=102_400,
    mlp_width=10_944,
    experts=64,
    experts_per_token=6,
    expert_width=1408,
    shared_experts=2,
    dense_layers=1,
  )
  # The number of its published checkpoint.
  assert transformer.count_params(config, embedding=True) == 16_375_728_128
  assert transformer.count_params(config) == 16_375_728_128 - 2 * 102_400 * 2048
  shapes = jax.eval_shape(lambda: transformer.init(config, 0))
  sizes = {name: math.prod(leaf.shape) for name, leaf in leaf_names(shapes).items()}
  routed = sum(n for name, n in sizes.items() if transformer.is_expert_kernel(name))
  assert routed == 14_948_499_456 == 27 * 64 * 3 * 2048 * 1408


def test_parameter_counts_of_a_sparse_mixture_of_experts():
  config = transformer.TransformerConfig(
    layers=24,
    width=576,
    heads=9,
    vocabulary=32_128,
    gated=False,
    experts=32,
    experts_per_token=4,
    expert_width=2304,
  )
  layer = 4 * 576**2 + 2 * 576 + 576 * 32 + 32 * 2 * 576 * 2304
  assert transformer.count_params(config) == 24 * layer + 576
  assert transformer.count_params(config, embedding=True) == 2_107_764_288


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_float64_definition(family, packed):
  config, params = model(family, packed)
  assert any(isinstance(x, eco.QuantizedArray) for x in leaf_names(params).values()) == packed
  logits = logits_of(config, params, TOKENS)
  wanted, aux = numpy_transformer.forward(config, eco.dequantize(params), TOKENS[:, :-1])
  assert np.abs(wanted).max() > 1
  assert (aux.get("dropped", 0) > 0) == (config.capacity_factor is not None)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, wanted, atol=LOGIT_ROUNDOFF)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_every_option_of_a_family(family):
  # Otherwise the test above would not see a wrong one.
  config, params = model(family)
  logits = numpy_transformer.forward(config, params, TOKENS)[0]
  for option, value in OTHERWISE[family].items():
    assert getattr(config, option) != value
    other = dataclasses.replace(config, **{option: value})
    moved = np.abs(numpy_transformer.forward(other, params, TOKENS)[0] - logits).max()
    assert moved > 200 * LOGIT_ROUNDOFF, (option, moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_no_earlier_logits(family):
  config, params = model(family)
  first = logits_of(config, params, TOKENS)
  second = logits_of(config, params, TOKENS.at[:, 5:].set((TOKENS[:, 5:] + 1) % 11))
  np.testing.assert_array_equal(first[:, :5], second[:, :5])
  assert np.all(np.abs(first[:, 5:] - second[:, 5:]).max(-1) > 0.01)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_bfloat16_activations(family):
  # No routing, because a choice of experts that is nearly even may go either way.
  config, params = model(family, packed=True, dtype="bfloat16")
  logits = logits_of(config, params, TOKENS)
  wanted, _ = numpy_transformer.forward(config, eco.dequantize(params), TOKENS[:, :-1])
  error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
  # Some ten roundings in each of three or four layers, each of 2⁻⁹ of the value as a rule: √40 of
  # them are 1.2%, and large weights make some of them a few times larger. Well above float32's.
  assert 1e-3 < error < 0.04
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_definitions_and_its_finite_differences(family):
  config, params = model(family)
  (value, aux), grads = gradients(config, params)
  params, grads = numpy_transformer.float64(params), leaf_names(grads)

  def parts(params):
    logits, aux = numpy_transformer.forward(config, params, TOKENS[:, :-1])
    return {"cross_entropy": numpy_transformer.cross_entropy(logits, TOKENS[:, 1:]), **aux}

  def loss(params):
    wanted = parts(params)
    return wanted["cross_entropy"] + config.balance_weight * wanted.get("balance_loss", 0)

  # A mean of numbers that are each off by at most twice what logits are.
  np.testing.assert_allclose(value, loss(params), atol=2 * LOGIT_ROUNDOFF)
  wanted = parts(params)
  assert set(aux) == set(wanted)
  for name, number in wanted.items():
    np.testing.assert_allclose(aux[name], number, atol=2 * LOGIT_ROUNDOFF, err_msg=name)
  generator = np.random.default_rng(2)
  for name, leaf in leaf_names(params).items():
    direction = generator.standard_normal(leaf.shape)
    # Small enough that the error, its square times the third derivative, is below 1e-7, and that
    # no token changes its experts.
    step = 1e-6 * direction
    leaf += step
    above = loss(params)
    leaf -= 2 * step
    slope = (above - loss(params)) / 2e-6
    leaf += step
    gradient = np.asarray(grads[name], np.float64)
    # Float32 roundoff through forward and backward pass, as a share of the gradient's length.
    np.testing.assert_allclose(
      np.sum(gradient * direction), slope, atol=5e-5 * np.linalg.norm(gradient), err_msg=name
    )
    assert np.linalg.norm(gradient) > 1e-3, name


def test_gradient_of_the_balance_loss_for_one_entry_of_a_router():
  config, params = model("smoe")
  balance = lambda p: transformer.loss(config, p, TOKENS)[1]["balance_loss"]
  gradient = jax.jit(jax.grad(balance))(params)["blocks"]["moe"]["router"]
  params = numpy_transformer.float64(params)
  router = params["blocks"]["moe"]["router"]
  # In the last layer, whose router has no other router's choices behind it.
  values = []
  for sign in (1, -1):
    router[2, 3, 1] += sign * 1e-6
    values.append(numpy_transformer.forward(config, params, TOKENS[:, :-1])[1]["balance_loss"])
    router[2, 3, 1] -= sign * 1e-6
  slope = (values[0] - values[1]) / 2e-6
  assert abs(slope) > 1e-3
  # Float32 roundoff of a sum over 16 tokens.
  np.testing.assert_allclose(gradient[2, 3, 1], slope, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_attention_stays_in_documents(family):
  config, params = model(family, separator=3)
  tokens = np.array([[1, 2, 3, 4, 5, 6, 7, 3], [3, 3, 5, 6, 2, 3, 1, 1]])
  logits = jax.jit(lambda p: transformer.apply(config, p, tokens))(params)
  for row, starts in zip(range(2), ([0, 2, 7], [0, 1, 5]), strict=True):
    for start, stop in zip(starts, [*starts[1:], 8], strict=True):
      alone = numpy_transformer.forward(config, params, tokens[row : row + 1, start:stop])[0]
      # Of a document at the start of its window: rotary attention knows differences alone.
      np.testing.assert_allclose(logits[row, start:stop], alone[0], atol=2 * LOGIT_ROUNDOFF)
  crossing, _ = model(family)
  other = jax.jit(lambda p: transformer.apply(crossing, p, tokens))(params)
  assert np.abs(logits - other)[0, 3:].max() > 0.01


@pytest.mark.parametrize("chunks", [1, 4])
def test_weights_weigh_targets(chunks):
  config, params = model("llama", loss_chunks=chunks)
  weight = np.random.default_rng(3).integers(0, 3, (2, 8)).astype(np.float32)
  loss = jax.jit(lambda p, w: transformer.loss(config, p, TOKENS, w))
  value, aux = loss(params, jnp.asarray(weight / weight.mean()))
  logits = numpy_transformer.forward(config, params, TOKENS[:, :-1])[0]
  wanted = numpy_transformer.cross_entropy(logits, TOKENS[:, 1:], weight)
  # As without weights.
  np.testing.assert_allclose(value, wanted, atol=2 * LOGIT_ROUNDOFF)
  np.testing.assert_allclose(aux["cross_entropy"], wanted, atol=2 * LOGIT_ROUNDOFF)
  assert abs(wanted - numpy_transformer.cross_entropy(logits, TOKENS[:, 1:])) > 1e-3


@pytest.mark.parametrize(
  ("family", "changes"),
  [
    ("gemma", {"loss_chunks": 4}),
    ("mixed", {"remat": "dots", "loss_chunks": 4}),
    ("mixed", {"remat": "full"}),
    ("mixed", {"unroll": 3}),
    ("deepseek", {"unroll": 2, "remat": "dots"}),
    ("deepseek", {"mlp_blocks": True}),
  ],
)
def test_chunks_of_the_loss_and_what_is_made_again_change_no_gradient(family, changes):
  config, params = model(family)
  (value, aux), grads = gradients(config, params)
  other = dataclasses.replace(config, **changes)
  (other_value, other_aux), other_grads = gradients(other, params)
  # The same operations, summed in other orders.
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
  assert set(other_aux) == set(aux)
  assert_trees_close(other_grads, grads, 1e-5)


def test_chunks_that_do_not_divide_are_refused():
  config, params = model("llama", loss_chunks=3)
  with pytest.raises(ValueError, match="loss_chunks 3 does not divide a length of 8"):
    transformer.loss(config, params, TOKENS)


@pytest.mark.parametrize(
  ("family", "changes"),
  [("llama", {}), ("llama", {"mlp_blocks": True}), ("smoe", {}), ("deepseek", {})],
)
def test_gradients_through_codes_are_those_of_the_dense_view(family, changes):
  config, params = model(family, packed=True, **changes)
  (value, _), grads = gradients(config, params, dense=True)
  (code_value, _), code_grads = gradients(config, params, dense=False)
  np.testing.assert_allclose(value, code_value, rtol=1e-5)
  assert jax.tree.structure(grads) == jax.tree.structure(eco.dequantize(params))
  # Scales multiply weights in the one, products in the other: float32 roundoff through all layers.
  assert_trees_close(code_grads, grads, 5e-5)


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_bfloat16_gradients_are_rounded_float32_gradients(family):
  config, params = model(family, packed=True)
  wanted = leaf_names(gradients(config, params)[1])
  grads = leaf_names(gradients(config, params, gradient_dtype=jnp.bfloat16)[1])
  for name, leaf in leaf_names(params).items():
    packed = isinstance(leaf, eco.QuantizedArray)
    assert grads[name].dtype == (jnp.bfloat16 if packed else jnp.float32), name
    rounded = wanted[name].astype(grads[name].dtype).astype(jnp.float32)
    # Both programs do the same float32 arithmetic, so they round the same numbers.
    np.testing.assert_array_equal(grads[name].astype(jnp.float32), rounded, err_msg=name)


def codes_of(tree):
  """Leaves as raw arrays; of packed ones the codes and scales."""
  return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
  ("family", "format"),
  [("gemma", "FP8"), ("smoe", "INT4"), ("deepseek", "FP8"), ("llama", "MXFP4")],
)
def test_init_layer_by_layer_gives_the_codes_of_the_whole(family, format):
  sizes = {"width": 32, "head_width": 16, "mlp_width": 32, "expert_width": 32}
  config = transformer.TransformerConfig(**{**FAMILIES[family], **sizes})
  format = getattr(eco, format)
  params = transformer.init(config, 5, format)
  dense = transformer.init(config, 5)
  whole = eco.quantize(dense, format.transposed, transformer.is_quantized(config))
  assert jax.tree.structure(params) == jax.tree.structure(whole)
  for ours, wanted in zip(codes_of(params), codes_of(whole), strict=True):
    assert ours.dtype == wanted.dtype
    np.testing.assert_array_equal(ours, wanted)


def equations(jaxpr):
  """All equations, those of inner functions and loops too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (list, tuple)) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


def largest_float32(function):
  jaxpr = jax.make_jaxpr(function)().jaxpr
  results = [v.aval for equation in equations(jaxpr) for v in equation.outvars]
  return max(math.prod(x.shape) for x in results if x.dtype == jnp.float32)


@pytest.mark.parametrize("family", ["llama", "gemma", "smoe", "deepseek"])
def test_init_holds_one_layer_in_float32(family):
  config = transformer.TransformerConfig(
    **{**FAMILIES[family], "layers": 12, "quantized": "blocks"}
  )
  shapes = jax.eval_shape(lambda: transformer.init(config, 0, eco.FP8))
  # All stacks but those of the one dense layer, which are one layer by themselves.
  leaves = {name: x for name, x in leaf_names(shapes).items() if "dense" not in name}
  packed = [x.size for x in leaves.values() if isinstance(x, eco.QuantizedArray)]
  floats = [math.prod(x.shape) for x in leaves.values() if not isinstance(x, eco.QuantizedArray)]
  # Without a format, whole stacks are there to be seen.
  assert largest_float32(lambda: transformer.init(config, 0)) == max(packed)
  # With one, nothing is larger than one layer's kernel, or a parameter that stays float32.
  one = max(16 * 24, max(packed) // (config.layers - config.dense_layers))
  most = largest_float32(lambda: transformer.init(config, 0, eco.FP8))
  assert most <= max(one, *floats)
  assert most < min(packed)


# Products in a layer: 4 of attention, 3 of an MLP, routed and shared experts.
@pytest.mark.parametrize(
  ("family", "count"), [("llama", 7), ("gemma", 7), ("smoe", 2), ("deepseek", 7 + 4 + 3 + 3)]
)
def test_products_of_float8_codes(family, count):
  config, params = model(family, packed=True, activation_format=eco.FP8_TOKEN)

  def float8_products(config, params):
    jaxpr = jax.make_jaxpr(lambda p: transformer.apply(config, p, TOKENS))(params)
    products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    return [e for e in products if all(v.aval.dtype == jnp.float8_e4m3fn for v in e.invars)]

  products = float8_products(config, params)
  assert len(products) == count  # A scan's body is there once.
  assert all(e.outvars[0].aval.dtype == jnp.float32 for e in products)
  assert not float8_products(dataclasses.replace(config, activation_format=None), params)
  assert not float8_products(config, eco.dequantize(params))


@pytest.mark.parametrize(
  ("family", "count", "again"),
  [("llama", 7, 0), ("gemma", 7, 0), ("smoe", 2, 2), ("deepseek", 7 + 4 + 3 + 3, 3)],
)
def test_gradients_of_inputs_are_products_of_float8_codes(family, count, again):
  """Those of packed kernels, in attention, MLPs and experts; not of embedding, head and router."""
  formats = {"activation_format": eco.FP8_TOKEN, "gradient_format": eco.FP8_E5M2_TOKEN}
  config, params = model(family, packed=True, **formats)

  def products(config):
    loss = lambda p: transformer.loss(config, p, TOKENS)[0]
    jaxpr = jax.make_jaxpr(eco.value_and_grad(loss, dense=False))(params)
    dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    return collections.Counter(tuple(v.aval.dtype.name for v in e.invars) for e in dots)

  codes, cotangents = "float8_e4m3fn", "float8_e5m2"
  found, plain = products(config), products(dataclasses.replace(config, gradient_format=None))
  assert found[cotangents, codes] == count
  # Outputs of routed experts are made again.
  assert found[codes, codes] == plain[codes, codes] == count + again
  assert plain[cotangents, codes] == 0
  assert found["float32", "float32"] == plain["float32", "float32"] - count


@pytest.mark.parametrize(("family", "count"), [("llama", 7), ("deepseek", 7 + 4 + 3 + 3)])
def test_gradients_of_kernels_are_products_of_float8_codes(family, count):
  config, params = model(family, packed=True, kernel_gradient_format=eco.FP8_E5M2)
  loss = lambda p: transformer.loss(config, p, TOKENS)[0]
  jaxpr = jax.make_jaxpr(eco.value_and_grad(loss, dense=False))(params)
  dots = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
  factors = [tuple(v.aval.dtype.name for v in e.invars) for e in dots]
  # Kernels are (out, in), and so is cotangents × activations.
  assert factors.count(("float8_e5m2", "float8_e4m3fn")) == count


def test_activations_in_float8_are_close_to_those_in_float32():
  config, params = model("llama", packed=True, activation_format=eco.FP8_TOKEN)
  logits = logits_of(config, params, TOKENS)
  wanted, _ = numpy_transformer.forward(config, eco.dequantize(params), TOKENS[:, :-1])
  error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
  # E4M3 has 4 bits: roundings are off by 2⁻⁵ as a rule, or 3%, and a path through three layers
  # meets about six of them: 8%, and large weights make some of them larger.
  assert 0.005 < error < 0.25


def test_initial_scales_are_the_definitions():
  config = transformer.TransformerConfig(layers=8, width=64, heads=2, vocabulary=256)
  params = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  # 64 × 64 × 8 draws or more: the standard deviation of a standard deviation is below 0.4%.
  for name, scale in (("query", 0.02), ("out", 0.02 / 4)):
    np.testing.assert_allclose(
      np.std(params["blocks"]["attention"][name]["kernel"]), scale, rtol=0.02
    )
  np.testing.assert_allclose(np.std(params["blocks"]["mlp"]["down"]["kernel"]), 0.005, rtol=0.02)
  # Layers draw their own numbers.
  first, second = params["blocks"]["attention"]["query"]["kernel"][:2]
  assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.1


def test_only_block_linears_are_quantized():
  config = transformer.TransformerConfig(**SMALL)
  params = jax.eval_shape(lambda: transformer.init(config, 0, eco.FP8))
  kinds = {name: isinstance(x, eco.QuantizedArray) for name, x in leaf_names(params).items()}
  assert sum(kinds.values()) == 7
  assert not any(kinds[name] for name in ("embedding", "head", "norm/scale"))


@pytest.mark.parametrize(("quantized", "count"), [("experts", 3), ("blocks", 7 + 4 + 3 + 3)])
def test_experts_alone_or_all_linears_of_blocks_are_quantized(quantized, count):
  config = transformer.TransformerConfig(**{**FAMILIES["deepseek"], "quantized": quantized})
  params = jax.eval_shape(lambda: transformer.init(config, 0, eco.FP8))
  packed = {n for n, x in leaf_names(params).items() if isinstance(x, eco.QuantizedArray)}
  assert len(packed) == count
  assert all(name.endswith("/kernel") for name in packed)
  if quantized == "experts":
    assert packed == {f"blocks/moe/experts/{name}/kernel" for name in ("gate", "up", "down")}
  # Each expert of each layer has scales of its own, one for each output.
  assert params["blocks"]["moe"]["experts"]["up"]["kernel"].scale.shape == (2, 6, 8, 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"width": 30, "heads": 4}, "width 30 does not make 4 heads"),
    ({"head_width": 3}, "head_width 3 is odd"),
    ({"width": 6, "heads": 2}, "head_width 3 is odd"),
    ({"heads": 4, "kv_heads": 3}, "3 kv_heads do not divide 4 heads"),
    ({"experts": 4, "expert_width": 8}, "between 1 and 4, got 0"),
    ({"experts": 4, "experts_per_token": 5, "expert_width": 8}, "between 1 and 4, got 5"),
    ({"experts": 4, "experts_per_token": 2}, "expert_width, got 0"),
    (
      {"dense_layers": 4, "experts": 4, "experts_per_token": 2, "expert_width": 8},
      "dense_layers 4 is not between 0 and 3",
    ),
    ({"dense_layers": -1}, "dense_layers must be 0 or more, got -1"),
    ({"dense_layers": 1}, "dense_layers 1 and quantized 'blocks' are of models with experts"),
    ({"quantized": "experts"}, "quantized 'experts' are of models with experts"),
    ({"activation": "relu"}, "activation 'relu' is none of silu, gelu"),
    ({"quantized": "head"}, "quantized 'head' is none of blocks, experts, all"),
    ({"remat": "some"}, "remat 'some' is none of none, dots, full"),
    ({"unroll": 0}, "unroll must be 1 or more, got 0"),
  ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    transformer.TransformerConfig(**{**SMALL, **changes})


def test_sizes_left_out_are_filled_in():
  config = transformer.TransformerConfig(layers=2, width=96, heads=4, vocabulary=8)
  # 8 / 3 × 96 is 256.
  assert (config.kv_heads, config.head_width, config.mlp_width) == (4, 24, 256)
  assert transformer.TransformerConfig(1, 128, 4, 8).mlp_width == 512
  assert transformer.TransformerConfig(1, 30, 4, 8, head_width=6).head_width == 6
