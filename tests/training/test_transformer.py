"""The model: the table's parameter counts, and a float64 forward written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.training.models import transformer

SMALL = {"layers": 3, "width": 16, "heads": 2, "vocabulary": 11, "mlp_width": 24}


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


def numpy_forward(params, tokens, layers, heads):
  """Logits in float64 from the definition: no code is shared with the model."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale
  x = p["embedding"][tokens]
  batch, length, width = x.shape
  k = width // heads
  for i in range(layers):
    b = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
    a = norm(x, b["attention_norm"]["scale"])
    q, key, value = (
      (a @ b["attention"][n]["kernel"]).reshape(batch, length, heads, k)
      for n in ("query", "key", "value")
    )

    def turn(y):
      out = np.empty_like(y)
      for position in range(length):
        for j in range(k // 2):
          angle = position * 10_000.0 ** (-2 * j / k)
          even, odd = y[:, position, :, 2 * j], y[:, position, :, 2 * j + 1]
          out[:, position, :, 2 * j] = even * np.cos(angle) - odd * np.sin(angle)
          out[:, position, :, 2 * j + 1] = even * np.sin(angle) + odd * np.cos(angle)
      return out

    q, key = turn(q), turn(key)
    mixed = np.zeros_like(value)
    for t in range(length):
      logits = np.einsum("bhk,bmhk->bhm", q[:, t], key[:, : t + 1]) / np.sqrt(k)
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed[:, t] = np.einsum("bhm,bmhk->bhk", weights, value[:, : t + 1])
    x = x + mixed.reshape(batch, length, width) @ b["attention"]["out"]["kernel"]
    h = norm(x, b["mlp_norm"]["scale"])
    gate = h @ b["mlp"]["gate"]["kernel"]
    x = (
      x + (gate / (1 + np.exp(-gate)) * (h @ b["mlp"]["up"]["kernel"])) @ b["mlp"]["down"]["kernel"]
    )
  return norm(x, p["norm"]["scale"]) @ p["head"]


@pytest.mark.parametrize("packed", [False, True])
def test_forward_equals_float64_definition(packed):
  config = transformer.TransformerConfig(**SMALL)
  # Weights five times the usual size, so that attention and gates are far from linear.
  params = jax.tree.map(lambda x: 5 * x, transformer.init(config, 0))
  if packed:
    params = eco.quantize(params, eco.FP8, transformer.is_block_kernel)
  tokens = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
  logits = transformer.apply(config, params, jnp.asarray(tokens))
  wanted = numpy_forward(eco.dequantize(params), tokens, 3, 2)
  assert np.abs(wanted).max() > 0.3
  # A few dozen float32 roundings in a row, at logits of up to 6.
  np.testing.assert_allclose(logits, wanted, atol=3e-5)


def test_initial_scales_are_the_definitions():
  config = transformer.TransformerConfig(layers=8, width=64, heads=2, vocabulary=256)
  params = transformer.init(config, 0)
  # 64 × 64 × 8 draws or more: the standard deviation of a standard deviation is below 0.4%.
  for name, scale in (("query", 0.02), ("out", 0.02 / 4)):
    np.testing.assert_allclose(
      np.std(params["blocks"]["attention"][name]["kernel"]), scale, rtol=0.02
    )
  np.testing.assert_allclose(np.std(params["blocks"]["mlp"]["down"]["kernel"]), 0.005, rtol=0.02)
  # Layers draw their own numbers.
  first, second = params["blocks"]["attention"]["query"]["kernel"][:2]
  assert abs(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]) < 0.1


def test_gradients_through_codes_are_those_of_the_dense_view():
  config = transformer.TransformerConfig(**SMALL)
  params = eco.quantize(transformer.init(config, 0), eco.FP8, transformer.is_block_kernel)
  tokens = jnp.zeros((2, 5), jnp.int32).at[:, 2].set(3)
  loss = lambda p: jnp.mean(transformer.apply(config, p, tokens) ** 2)
  value, grads = eco.value_and_grad(loss)(params)
  code_value, code_grads = eco.value_and_grad(loss, dense=False)(params)
  np.testing.assert_allclose(value, code_value, rtol=1e-5)
  assert jax.tree.structure(grads) == jax.tree.structure(eco.dequantize(params))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), grads, code_grads
  )


def test_only_block_linears_are_quantized():
  config = transformer.TransformerConfig(**SMALL)
  params = eco.quantize(transformer.init(config, 0), eco.FP8, transformer.is_block_kernel)
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  kinds = {
    jax.tree_util.keystr(path, simple=True, separator="/"): is_packed(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
  }
  assert sum(kinds.values()) == 7
  assert not any(kinds[name] for name in ("embedding", "head", "norm/scale"))


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="width 30 does not make 4 heads"):
    transformer.TransformerConfig(layers=1, width=30, heads=4, vocabulary=8)
