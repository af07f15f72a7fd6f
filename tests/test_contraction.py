"""Presets of contraction axes against the derivatives of the layers themselves.

An output that depends on several indices along an axis of its kernel sums over that axis; one that
depends on a single index has the axis as its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

X = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
# In reverse, for `out`: heads and head width.
HEADS = np.random.default_rng(1).standard_normal((2, 5, 3, 4)).astype(np.float32)


def summed_over(fn, kernel):
  """Axes of a kernel that `fn`, linear in it, sums over, counted from the end."""
  size = kernel.size
  units = np.eye(size, dtype=np.float32).reshape(size, *kernel.shape)
  columns = np.asarray(jax.vmap(fn)(units), np.float64).reshape(size, -1)
  found = set()
  for output in columns.T:
    used = np.argwhere(output.reshape(kernel.shape) != 0)
    found |= {a - kernel.ndim for a in range(kernel.ndim) if len(set(used[:, a])) > 1}
  return found


def leaves_of(tree):
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def chosen(preset, path, leaf):
  axes = preset(path, leaf)
  return {axes} if isinstance(axes, int) else set(axes)


def linen(make, x=X, method=None):
  """Kernel, path and function of a kernel, of a layer by itself inside of a module."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = make()
      return getattr(layer, method)(x) if method else layer(x)

  params = Model().init(jax.random.key(0), x)["params"]
  ((path, kernel),) = [(k, v) for k, v in leaves_of(params).items() if not k.endswith("bias")]

  def fn(kernel):
    put = lambda p, x: kernel if x.ndim == kernel.ndim and x.shape == kernel.shape else 0 * x
    tree = jax.tree_util.tree_map_with_path(put, params)
    return Model().apply({"params": tree}, x)

  return path, kernel, fn


LINEN = {
  "Dense": lambda: nn.Dense(6),
  "attention's query": lambda: nn.DenseGeneral((3, 4), name="query"),
  "attention's key": lambda: nn.DenseGeneral((3, 4), name="key"),
  "attention's value": lambda: nn.DenseGeneral((3, 4), name="value"),
  "Embed": lambda: nn.Embed(7, 12),
}


@pytest.mark.parametrize("name", LINEN)
def test_layers_of_linen(name):
  method = "attend" if name == "Embed" else None
  path, kernel, fn = linen(LINEN[name], method=method)
  assert chosen(eco.contraction.flax, path, kernel) == summed_over(fn, kernel)


def test_layers_with_axes_of_ones_own_take_a_function_of_ones_own():
  layers = {
    "many outputs": (lambda: nn.DenseGeneral((3, 4), name="up"), X),
    "many inputs": (lambda: nn.DenseGeneral(6, axis=(-2, -1), name="down"), HEADS),
    "Einsum": (lambda: nn.Einsum((3, 4, 6), "...hk,hkd->...d", name="merge"), HEADS),
    "Conv": (lambda: nn.Conv(6, (3,), name="convolution"), X),
  }
  axes = {"up": -3, "down": (-3, -2), "merge": (-3, -2), "convolution": (-3, -2)}
  own = lambda path, leaf: axes[path.split("/")[-2]]
  for name, (make, x) in layers.items():
    path, kernel, fn = linen(make, x)
    wanted = summed_over(fn, kernel)
    assert chosen(own, path, kernel) == wanted, name
    packed = eco.quantize({"layer": {path.split("/")[-2]: {"kernel": kernel}}}, _format(own))
    (scale,) = [leaf for path, leaf in leaves_of(packed).items() if path.endswith("scale")]
    assert {a - kernel.ndim for a, n in enumerate(scale.shape) if n == 1} == wanted, name


def _format(contraction_axis):
  return eco.Format("float8_e4m3fn", contraction_axis=contraction_axis)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_every_kernel_of_attention(library):
  """With the paths of a model's own parameters, and the layers that these belong to."""
  if library == "linen":
    model = nn.MultiHeadDotProductAttention(3)
    params = model.init(jax.random.key(0), X)["params"]
    layer = lambda name: (
      nn.DenseGeneral(12, axis=(-2, -1)) if name == "out" else nn.DenseGeneral((3, 4))
    )
    apply = lambda name, kernel, x: layer(name).apply(
      {"params": {"kernel": kernel, "bias": 0 * params[name]["bias"]}}, x
    )
    # The layers here are those of the model: projections of the same kernels are its own.
    _, seen = model.apply({"params": params}, X, capture_intermediates=True)
    (wanted,) = seen["intermediates"]["query"]["__call__"]
    found = apply("query", params["query"]["kernel"], X)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  else:
    model = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)

    def apply(name, kernel, x):
      layer = getattr(model, name)
      graph, state = nnx.split(layer)
      state = jax.tree.map(lambda leaf: kernel if leaf.ndim >= 3 else 0 * leaf, state)
      return nnx.merge(graph, state)(x)

  tree = {"attention": params}
  format = _format(eco.contraction.flax)
  where = lambda path, leaf: "kernel" in path
  packed = eco.quantize(tree, format, where)
  kernels = {path: leaf for path, leaf in leaves_of(tree).items() if "kernel" in path}
  scales = {path: leaf for path, leaf in leaves_of(packed).items() if path.endswith("/scale")}
  assert len(kernels) == len(scales) == 4
  for path, kernel in kernels.items():
    name = path.split("/")[1]
    wanted = summed_over(lambda k, name=name: apply(name, k, HEADS if name == "out" else X), kernel)
    assert wanted == ({-3, -2} if name == "out" else {-3})
    (scale,) = [scale for own, scale in scales.items() if own.startswith(path + "/")]
    assert {a - 3 for a in range(3) if scale.shape[a] == 1} == wanted


def test_layers_of_nnx():
  class Model(nnx.Module):
    def __init__(self):
      self.linear = nnx.Linear(12, 6, rngs=nnx.Rngs(0))
      self.embed = nnx.Embed(7, 12, rngs=nnx.Rngs(0))
      self.lora = nnx.LoRA(12, 2, 6, rngs=nnx.Rngs(0))

  model = Model()
  x = X[0]
  sums = {
    "linear/kernel": lambda k: x @ k,
    "embed/embedding": lambda k: x @ k.T,  # What `attend` does.
    "lora/lora_a": lambda k: x @ k,
    "lora/lora_b": lambda k: x[:, :2] @ k,
  }
  table = model.embed.embedding[...]
  np.testing.assert_allclose(
    model.embed.attend(jnp.asarray(x)), sums["embed/embedding"](table), rtol=1e-5, atol=1e-6
  )
  state = nnx.state(model, nnx.Param)
  for tree, end in ((state, "/value"), (nnx.to_pure_dict(state), "")):
    found = {p: leaf for p, leaf in leaves_of(tree).items() if "bias" not in p}
    assert set(found) == {path + end for path in sums}
    for path, leaf in found.items():
      wanted = summed_over(sums[path.removesuffix(end)], leaf)
      assert chosen(eco.contraction.flax, path, leaf) == wanted, path


def test_layers_that_are_stacked_keep_scales_of_their_own():
  """Those of biases too: heads have two axes of them, and a stack of heads three."""
  model = nn.MultiHeadDotProductAttention(3)
  params = model.init(jax.random.key(0), X)["params"]
  packed = eco.quantize(params, _format(eco.contraction.flax), lambda path, leaf: leaf.ndim > 1)
  stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  where = lambda path, leaf: leaf.ndim > 2
  stacked = eco.quantize(stack, _format(eco.contraction.flax), where)
  for path, leaf in leaves_of(stacked).items():
    one = leaves_of(packed)[path]
    assert leaf.shape == (2, *one.shape), path
    if path.endswith(("scale", "qvalue")):
      np.testing.assert_array_equal(np.asarray(leaf[0]), np.asarray(one))


# Gemma's own einsums: gemma/modules.py and gemma/layers.py of google-deepmind/gemma.
GEMMA = {
  "layer_0/attn/q_einsum/w": ("BTD,NDH->BTNH", (3, 12, 4), "BTD"),
  "layer_0/attn/kv_einsum/w": ("BSD,CKDH->CBSKH", (2, 3, 12, 4), "BTD"),
  "layer_0/attn/qkv_einsum/w": ("BTD,SNDH->SBTNH", (3, 3, 12, 4), "BTD"),
  "layer_0/attn/attn_vec_einsum/w": ("BTNH,NHD->BTD", (3, 4, 12), "BTNH"),
  "layer_0/mlp/gating_einsum": ("BTF,NFH->BTNH", (2, 12, 20), "BTD"),
  "layer_1/mlp/gating_einsum": ("BTF,NHF->BTNH", (2, 20, 12), "BTD"),
  "layer_0/mlp/linear": ("BTH,HF->BTF", (12, 20), "BTD"),
  "embedder/input_embedding": ("BTD,VD->BTV", (7, 12), "BTD"),
}


@pytest.mark.parametrize("path", GEMMA)
def test_layers_of_gemma(path):
  equation, shape, x = GEMMA[path]
  inputs = HEADS if x == "BTNH" else X
  fn = lambda kernel: jnp.einsum(equation, inputs, kernel)
  kernel = np.ones(shape, np.float32)
  assert chosen(eco.contraction.gemma, path, kernel) == summed_over(fn, kernel)
