"""matmul against NumPy: values, and gradients that go straight through the rounding."""

import importlib.util
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eco_optax as eco

FORMATS = {
  "float": None,
  "fp8": eco.FP8,
  "fp8 by input": eco.Format("float8_e4m3fn", "channel", contraction_axis=-1),
  "int4": eco.INT4,
  "blocks": eco.Format("float8_e4m3fn", (8, 4)),
  "mxfp4": eco.MXFP4,
  "nvfp4": eco.NVFP4,
}


def float64_quantized_tokens(x):
  """E4M3 with one scale per token, from ml_dtypes' own cast."""
  codes, scale = float64_codes(x, ml_dtypes.float8_e4m3fn)
  return codes * scale


def float64_codes(x, dtype):
  """Codes by ml_dtypes' own cast, and float32 scales per token."""
  largest = np.float32(ml_dtypes.finfo(dtype).max)
  scale = np.maximum(np.abs(x).max(-1, keepdims=True) / largest, np.float32(2.0**-126))
  return (x / scale).astype(dtype).astype(np.float64), scale


@pytest.mark.parametrize(
  ("name", "activations"), list(itertools.product(FORMATS, [None, eco.FP8_TOKEN]))
)
def test_product_and_gradients(name, activations):
  generator = np.random.default_rng(0)
  x = generator.standard_normal((3, 5, 32)).astype(np.float32)
  dense = generator.standard_normal((32, 8)).astype(np.float32)
  target = generator.standard_normal((3, 5, 8)).astype(np.float32)
  params = {"w": jnp.asarray(dense)}
  if FORMATS[name] is not None:
    params = eco.quantize(params, FORMATS[name])
  stored = np.asarray(eco.dequantize(params)["w"], np.float64)
  seen = float64_quantized_tokens(x) if activations else x.astype(np.float64)

  def loss(params, x):
    return jnp.sum(eco.matmul(x, params["w"], activations) * target)

  both = jax.jit(
    lambda p, x: (
      eco.value_and_grad(loss, dense=False)(p, x),
      jax.grad(loss, argnums=1)(p, x),
    )
  )
  (value, grads), dx = both(params, jnp.asarray(x))
  # Sums of 32 to 120 float32 products of order 1.
  np.testing.assert_allclose(value, np.sum(seen @ stored * target), rtol=1e-4)
  assert grads["w"].dtype == jnp.float32
  np.testing.assert_allclose(grads["w"], np.einsum("abi,abo->io", seen, target), atol=2e-5)
  np.testing.assert_allclose(dx, target @ stored.T, atol=2e-5)


def test_stacked_kernels_in_a_scan():
  generator = np.random.default_rng(0)
  kernels = jnp.asarray(generator.standard_normal((4, 8, 8)), jnp.float32) / 3
  params = eco.quantize({"w": kernels}, eco.FP8)
  x = jnp.asarray(generator.standard_normal((2, 8)), jnp.float32)

  def scanned(params):
    return jnp.sum(jax.lax.scan(lambda y, w: (eco.matmul(y, w), None), x, params["w"])[0] ** 2)

  def unrolled(params):
    y = x
    for w in params["w"]:
      y = y @ w
    return jnp.sum(y**2)

  value, grads = jax.jit(eco.value_and_grad(scanned, dense=False))(params)
  wanted, wanted_grads = jax.value_and_grad(unrolled)(eco.dequantize(params))
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(grads["w"], wanted_grads["w"], rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_keep_their_dtype():
  w = eco.quantize(jnp.eye(16) * 0.3, eco.FP8)
  y = eco.matmul(jnp.ones((2, 16), jnp.bfloat16), w, eco.FP8_TOKEN)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(y, np.float32), 0.3, rtol=2**-8)


@pytest.mark.parametrize("shape", [(2, 7), ()])
def test_shapes_that_do_not_fit_are_named(shape):
  with pytest.raises(ValueError, match=r"takes \(…, in\) and \(in, out\)"):
    eco.matmul(jnp.ones(shape), eco.quantize(jnp.ones((8, 4)), eco.FP8))
  with pytest.raises(ValueError, match=r"takes \(…, in\) and \(out, in\)"):
    eco.matmul(jnp.ones(shape), jnp.ones((4, 8)), transposed=True)


# Weights whose codes a float8 cotangent can be multiplied by.
WEIGHTS = {
  "fp8": eco.FP8,
  "fp8 by input": FORMATS["fp8 by input"],
  "fp8 by matrix": eco.Format("float8_e4m3fn", "tensor"),
  "fp8, scales in bfloat16": eco.Format("float8_e4m3fn", scale_dtype="bfloat16"),
  "e5m2": eco.FP8_E5M2,
  "int4": eco.INT4,
  "int4 by channel": eco.Format("int4"),
  "fp4": eco.Format("float4_e2m1fn"),
}
# Those of kernels stored (out, in), by their names.
TRANSPOSED = {
  "fp8": FORMATS["fp8 by input"],
  "fp8 by input": eco.FP8,
  "blocks": eco.Format("float8_e4m3fn", (4, 8)),
  "int4": eco.INT4,
}
COTANGENTS = {"e5m2": eco.FP8_E5M2_TOKEN, "e4m3": eco.FP8_TOKEN}


def normal(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("formats", [(), (eco.FP8_TOKEN,), (None, eco.FP8_TOKEN)])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_kernel_stored_out_in_gives_the_same(name, formats):
  """Its stored values are the same, and so are the factors of each sum."""
  if name == "blocks" and len(formats) == 2:
    return
  dense = normal(0, 32, 16)
  x, dy = jnp.asarray(normal(1, 3, 5, 32)), jnp.asarray(normal(2, 3, 5, 16))
  found = []
  for transposed in (False, True):
    format = (TRANSPOSED if transposed else FORMATS)[name]
    w = eco.quantize(jnp.asarray(dense.T if transposed else dense), format)
    found.append(pulled_back(x, w, dy, *formats, transposed=transposed))
  (y, dx, dw), (other_y, other_dx, other_dw) = found
  np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(other_dx, dx, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(np.asarray(other_dw).T, dw, rtol=1e-5, atol=1e-5)


def pulled_back(x, w, dy, *formats, **options):
  """The value, and the gradients of input and kernel for a cotangent `dy`."""
  params = {"w": w}

  def loss(params, x):
    y = eco.matmul(x, params["w"], *formats, **options)
    return jnp.sum(y * dy.astype(y.dtype)), y

  (_, y), grads = eco.value_and_grad(loss, dense=False, has_aux=True)(params, x)
  dx = jax.grad(lambda x: loss(params, x)[0])(x)
  return y, dx, grads["w"]


pulled_back_jit = jax.jit(pulled_back, static_argnums=(3, 4))


@pytest.mark.parametrize(("weights", "cotangents"), list(itertools.product(WEIGHTS, COTANGENTS)))
def test_input_gradients_of_rounded_cotangents(weights, cotangents):
  x, dense, dy = normal(0, 3, 5, 32), normal(1, 32, 24), normal(2, 3, 5, 24)
  dy *= np.exp(3 * normal(3, 3, 5, 1))  # Tokens of unlike size.
  w = eco.quantize(jnp.asarray(dense), WEIGHTS[weights])
  format = COTANGENTS[cotangents]
  y, dx, dw = pulled_back_jit(jnp.asarray(x), w, jnp.asarray(dy), eco.FP8_TOKEN, format)
  # What the option does not touch.
  plain_y, plain_dx, plain_dw = pulled_back_jit(
    jnp.asarray(x), w, jnp.asarray(dy), eco.FP8_TOKEN, None
  )
  np.testing.assert_array_equal(y, plain_y)
  np.testing.assert_array_equal(dw, plain_dw)

  scale, codes = np.asarray(w.float_scale()), np.asarray(w.codes).astype(np.float64)
  by_output = scale.shape[0] == 1
  rounded, token = float64_codes(dy * scale[0] if by_output else dy, format.dtype)
  wanted = rounded @ codes.T * token
  if not by_output:
    wanted = wanted * scale[:, 0]
  # Sums of 24 float32 products.
  size = np.abs(rounded) @ np.abs(codes).T * token * (1 if by_output else scale[:, 0])
  assert np.all(np.abs(dx - wanted) <= 2.0**-20 * size)
  # Seen, and no more than half a step of each cotangent: 2⁻³ of it in E5M2.
  error = np.linalg.norm(dx - plain_dx) / np.linalg.norm(plain_dx)
  assert 2.0**-8 < error < 2.0**-3


@pytest.mark.parametrize("cotangents", COTANGENTS)
def test_cotangents_have_the_codes_of_a_cast(cotangents):
  """A kernel with one weight in each column shows them one by one."""
  dtype = COTANGENTS[cotangents].dtype
  dy = normal(0, 64, 16) * np.exp(4 * normal(1, 64, 16))
  w = eco.quantize(jnp.diag(jnp.asarray(normal(2, 16))), eco.FP8)
  _, dx, _ = pulled_back_jit(jnp.ones((64, 16)), w, jnp.asarray(dy), None, COTANGENTS[cotangents])
  rounded, token = float64_codes(dy * np.asarray(w.scale)[0], dtype)
  code = np.diag(np.asarray(w.codes).astype(np.float64))
  np.testing.assert_array_equal(dx, (rounded * code).astype(np.float32) * token)


@pytest.mark.parametrize("cotangents", COTANGENTS)
def test_stochastic_cotangents_are_unbiased(cotangents):
  format, draws = COTANGENTS[cotangents], 2048
  dy, w = normal(0, 8, 16), eco.quantize(jnp.diag(jnp.asarray(normal(1, 16))), eco.FP8)
  one = lambda key: pulled_back(
    jnp.ones((8, 16)), w, jnp.asarray(dy), None, format, gradient_key=key
  )[1]
  dx = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(draws, dtype=jnp.uint32)), np.float64)
  wanted = dy.astype(np.float64) * np.diag(eco.dequantize(w)).astype(np.float64)
  # Each draw is one of two neighbours, and their shares say how far draws are from their mean.
  low, high = dx.min(0), dx.max(0)
  deviation = np.sqrt(np.maximum((high - wanted) * (wanted - low), 0) / draws)
  # A code whose neighbour is drawn once in thousands, and float32's own roundings.
  floor = 8 * np.abs(high - low).max(-1, keepdims=True) / draws + 2.0**-21 * np.abs(wanted)
  assert np.all(np.abs(dx.mean(0) - wanted) < 5.5 * deviation + floor)
  assert np.mean(high > low) > 0.8
  assert all(len(np.unique(dx[:, i, j])) <= 2 for i, j in np.ndindex(8, 16))
  # The same from the same key, whatever kind of key it is; to nearest without one.
  np.testing.assert_array_equal(jax.jit(one)(3), dx[3].astype(np.float32))
  by_key = jax.jit(one)(jax.random.key(0))
  np.testing.assert_array_equal(by_key, jax.jit(one)(jax.random.key(0)))
  assert not np.array_equal(by_key, dx[3])


@pytest.mark.parametrize("key", [None, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cotangents", COTANGENTS)
def test_cotangents_of_zeros_of_nan_and_of_extremes(cotangents, dtype, key):
  dy = normal(0, 7, 24)
  dy[0], dy[1, 3], dy[2, 4], dy[3] = 0, np.nan, np.inf, dy[3] * 1e-30
  dy[4], dy[5, 6], dy[6, 1:] = dy[4] * 1e30, -np.inf, 0
  w = eco.quantize(jnp.asarray(normal(1, 32, 24)), eco.FP8)
  x = jnp.ones((7, 32), dtype)
  options = {} if key is None else {"gradient_key": key}
  pull = jax.jit(lambda dy: pulled_back(x, w, dy, None, COTANGENTS[cotangents], **options)[1])
  dx = np.asarray(pull(jnp.asarray(dy, dtype)), np.float64)
  assert np.all(dx[0] == 0)
  assert np.all(np.isnan(dx[[1, 2, 5]]))
  wanted = dy.astype(np.float64) @ np.asarray(eco.dequantize(w), np.float64).T
  for row in (3, 4, 6):
    assert np.linalg.norm(dx[row] - wanted[row]) < 0.2 * np.linalg.norm(wanted[row])


KERNEL_COTANGENTS = {"e5m2": eco.FP8_E5M2, "e4m3": eco.FP8}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cotangents", KERNEL_COTANGENTS)
@pytest.mark.parametrize("weights", ["float", "fp8", "mxfp4"])
def test_kernel_gradients_of_rounded_factors(weights, cotangents, transposed):
  x, dense, dy = normal(0, 3, 5, 32), normal(1, 32, 64), normal(2, 3, 5, 64)
  x *= np.exp(3 * normal(3, 32))  # Channels of unlike size.
  dy *= np.exp(3 * normal(4, 64))
  w = jnp.asarray(dense.T if transposed else dense)
  if FORMATS[weights] is not None:
    w = eco.quantize(w, FORMATS[weights])
  format = KERNEL_COTANGENTS[cotangents]

  def pull(format):
    options = {"kernel_gradient_format": format, "transposed": transposed}
    return pulled_back(jnp.asarray(x), w, jnp.asarray(dy), **options)

  (y, dx, dw), (plain_y, plain_dx, plain_dw) = jax.jit(lambda: (pull(format), pull(None)))()
  # What the option does not touch.
  np.testing.assert_array_equal(y, plain_y)
  np.testing.assert_array_equal(dx, plain_dx)

  rounded, scale = float64_codes(x.reshape(15, 32).T, ml_dtypes.float8_e4m3fn)
  cotangent, by_output = float64_codes(dy.reshape(15, 64).T, format.dtype)
  wanted = rounded @ cotangent.T * scale * by_output.T
  # Sums of 15 float32 products.
  size = np.abs(rounded) @ np.abs(cotangent).T * scale * by_output.T
  dw, plain_dw = (
    np.asarray(d, np.float64).T if transposed else np.asarray(d) for d in (dw, plain_dw)
  )
  assert np.all(np.abs(dw - wanted) <= 2.0**-20 * size)
  # Seen, and no more than half a step of each factor: 2⁻³ of it in E5M2.
  error = np.linalg.norm((dw - plain_dw) / (scale * by_output.T))
  assert 2.0**-8 < error / np.linalg.norm(plain_dw / (scale * by_output.T)) < 2.0**-3


def test_stochastic_kernel_gradients_are_unbiased():
  """In the cotangents: activations of one are the same in every format."""
  draws, dy = 2048, normal(0, 1, 16)
  w = jnp.zeros((4, 16))

  def one(key):
    options = {"gradient_key": key, "kernel_gradient_format": eco.FP8_E5M2}
    return jax.grad(lambda w: jnp.sum(eco.matmul(jnp.ones((4, 4)), w, **options) * spread))(w)

  spread = jnp.asarray(dy * np.array([[1.0], [0.3], [0.11], [0.05]], np.float32))
  dw = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(draws, dtype=jnp.uint32)), np.float64)
  wanted = np.broadcast_to(np.asarray(spread, np.float64).sum(0), (4, 16))
  # Each sum has an error of its own, whose mean over draws has the deviation of one over √draws.
  deviation = dw.std(0) / np.sqrt(draws)
  assert np.all(deviation > 0)
  assert np.all(np.abs(dw.mean(0) - wanted) < 5.5 * deviation + 2.0**-20 * np.abs(wanted))
  # All four channels of activations meet the same cotangents; the input's gradient has its own.
  np.testing.assert_array_equal(dw[:, :1], dw[:, 1:2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernel_gradients_of_zeros_of_nan_and_of_large_sums(dtype):
  x, dy = np.ones((512, 8), np.float32), np.ones((512, 16), np.float32)
  dy[:, 0], dy[3, 1], dy[5, 2] = 0, np.nan, np.inf
  w = eco.quantize(jnp.ones((8, 16)), eco.FP8)
  loss = lambda p: jnp.sum(
    eco.matmul(jnp.asarray(x, dtype), p["w"], kernel_gradient_format=eco.FP8)
    * jnp.asarray(dy, dtype)
  )
  grads = eco.value_and_grad(loss, dense=False, gradient_dtype=dtype)({"w": w})[1]["w"]
  assert grads.dtype == dtype
  grads = np.asarray(grads, np.float64)
  assert np.all(grads[:, 0] == 0)
  assert np.all(np.isnan(grads[:, 1:3]))
  # The codes' sums, 512 × 448², are beyond float16; the gradient is not.
  np.testing.assert_allclose(grads[:, 3:], 512, rtol=2**-8)


@pytest.mark.parametrize("kernel_gradient", [None, eco.FP8])
def test_stacks_of_kernels_have_the_gradients_of_each(kernel_gradient):
  kernels = eco.quantize(jnp.asarray(normal(0, 3, 16, 16)), eco.FP8)
  x, dy = jnp.asarray(normal(1, 3, 4, 16)), jnp.asarray(normal(2, 3, 4, 16))
  formats = eco.FP8_TOKEN, eco.FP8_E5M2_TOKEN
  options = {"kernel_gradient_format": kernel_gradient}
  one = lambda x, w, dy: pulled_back(x, w, dy, *formats, **options)
  alone = [jax.jit(one)(*(jax.tree.map(lambda y, i=i: y[i], (x, kernels, dy)))) for i in range(3)]
  wanted = jax.tree.map(lambda *y: np.stack(y), *alone)
  for found in (
    jax.jit(jax.vmap(one))(x, kernels, dy),
    jax.jit(lambda *a: jax.lax.map(lambda b: one(*b), a))(x, kernels, dy),
  ):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize(
  ("kernel", "format", "message"),
  [
    (eco.FP8, eco.FP8, "must be of float8 codes with one scale per token, got Format"),
    (eco.FP8, eco.INT8, "use Format.*FP8_E5M2_TOKEN"),
    (eco.FP8, eco.MXFP8, "one scale per token"),
    (eco.FP8_BLOCK128, eco.FP8_TOKEN, "scales of blocks are inside the sum.*such as eco_optax.FP8"),
    (eco.NVFP4, eco.FP8_TOKEN, "scales of blocks are inside the sum"),
    (eco.INT8, eco.FP8_TOKEN, "float8 does not have all the codes.*4-bit weights"),
    (None, eco.FP8_TOKEN, r"got floats of shape \(128, 128\).*dense=False"),
  ],
)
def test_gradient_formats_that_do_not_fit_are_named(kernel, format, message):
  w = jnp.ones((128, 128))
  w = w if kernel is None else eco.quantize(w, kernel)
  with pytest.raises(ValueError, match=message):
    eco.matmul(jnp.ones((2, 128)), w, gradient_format=format)


@pytest.mark.parametrize("format", [eco.FP8_TOKEN, eco.INT8, eco.MXFP8])
def test_kernel_gradient_formats_that_do_not_fit_are_named(format):
  with pytest.raises(ValueError, match=r"one scale per channel, got Format.*use Format.*FP8_E5M2"):
    eco.matmul(jnp.ones((2, 8)), jnp.ones((8, 4)), kernel_gradient_format=format)


def test_a_key_without_a_gradient_format_is_refused():
  with pytest.raises(ValueError, match=r"pass gradient_format= or kernel_gradient_format= too"):
    eco.matmul(jnp.ones((2, 8)), eco.quantize(jnp.ones((8, 4)), eco.FP8), gradient_key=0)


def lowered(device=None, **options):
  """A product and its gradients, 256 tokens and bfloat16, in programs that are not run."""
  shapes = (256, 512), (512, 1024), (256, 1024)
  x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
  args = x, jax.eval_shape(lambda w: eco.quantize(w, eco.FP8), w), dy
  pull = jax.jit(lambda *a: pulled_back(*a, eco.FP8_TOKEN, eco.FP8_E5M2_TOKEN, **options))
  if device is None:
    return pull.lower(*args)
  from eco_optax.training import compile as compile_lib

  with compile_lib.abstractly(device):
    return pull.lower(*compile_lib.on_device(device, args))


def test_products_are_of_codes_and_leave_in_the_activations_dtype():
  text = lowered().as_text()
  dots = re.findall(
    r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> "
    r"tensor<[\dx]*x(\w+)>",
    text,
  )
  assert sorted(dots) == [
    ("bf16", "bf16", "f32"),  # The kernel's gradient.
    ("f8E4M3FN", "f8E4M3FN", "bf16"),
    ("f8E5M2", "f8E4M3FN", "bf16"),
  ]


@pytest.mark.parametrize("kernel_gradient", [None, eco.FP8, eco.FP8_E5M2])
def test_an_h100_multiplies_codes_and_stores_no_float32(kernel_gradient):
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    pytest.skip("compiling for a GPU takes JAX's CUDA plugin")
  from eco_optax.training import compile as compile_lib

  (h100,) = compile_lib.topology_devices("h100:1")
  # Without a GPU the compiler cannot time cuBLAS against its own kernels, and takes the latter.
  program = lowered(h100, kernel_gradient_format=kernel_gradient)
  text = program.compile({"xla_gpu_enable_triton_gemm": False}).as_text()
  products = re.findall(r"= \(?(\w+)\[([\d,]+)\].* custom-call\(.*cublas\$lt\$matmul\$f8", text)
  wanted = {("bf16", "256,1024"), ("bf16", "256,512")}
  # The gradient leaves the step in float32 here.
  wanted |= {("f32", "512,1024")} if kernel_gradient else set()
  assert wanted == set(products), text
  entry = text[text.index("\nENTRY") :]
  turned = r"256,(?:512|1024)|(?:512|1024),256"
  assert not re.findall(rf"= \(?(?:f32|s32)\[(?:{turned})\]", entry), entry


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("key", [None, 3])
def test_gradients_of_split_tokens_are_those_of_whole_ones(kind, key):
  """Scales too, which are maxima over all tokens, and random bits, which are told by a place."""
  x, w = jnp.asarray(normal(0, 8, 32)), eco.quantize(jnp.asarray(normal(1, 32, 16)), eco.FP8)
  options = {"gradient_key": key, "kernel_gradient_format": eco.FP8}
  formats = eco.FP8_TOKEN, eco.FP8_E5M2_TOKEN

  def loss(params, x):
    return jnp.sum(eco.matmul(x, params["w"], *formats, **options) ** 2)

  @jax.jit
  def gradients(x, w):
    by_kernel = eco.value_and_grad(loss, dense=False)({"w": w}, x)[1]["w"]
    return jax.grad(loss, 1)({"w": w}, x), by_kernel

  mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(kind,))
  with jax.set_mesh(mesh):
    put = lambda y, *spec: jax.device_put(y, NamedSharding(mesh, PartitionSpec(*spec)))
    found = gradients(put(x, "data", None), jax.tree.map(put, w))
  assert found[0].sharding.spec[0] == "data"
  for own, whole in zip(found, gradients(x, w), strict=True):
    np.testing.assert_allclose(own, whole, rtol=1e-5, atol=1e-4)
