"""Attention in blocks and in one: values against float64 NumPy, gradients against each other."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import sharding
from eco_optax.training.models import attention, modules, transformer

B, L, H, G, K = 2, 37, 4, 2, 6
SCALE = 0.4
generator = np.random.default_rng(0)
Q, DY = (generator.standard_normal((B, L, H, K)).astype(np.float32) for _ in range(2))
KEYS, VALUES = (generator.standard_normal((B, L, G, K)).astype(np.float32) for _ in range(2))
TOKENS = (generator.random((B, L)) < 0.15).astype(np.int32)  # 1 separates documents.

CASES = list(itertools.product((0.0, 1.5), (0, 1, 5, 20), (False, True)))


def numbers(has_documents):
  return modules.documents(jnp.asarray(TOKENS), 1) if has_documents else None


def oracle(cap, window, has_documents):
  """The definition, one position of one head at a time."""
  q, k, v = (x.astype(np.float64) for x in (Q, KEYS, VALUES))
  y = np.zeros((B, L, H, K))
  for b, at, h in itertools.product(range(B), range(L), range(H)):
    first = max(0, at - window + 1) if window else 0
    if has_documents:
      first = max([first, *(m for m in range(at + 1) if TOKENS[b, m] == 1)])
    logits = SCALE * k[b, first : at + 1, h // (H // G)] @ q[b, at, h]
    logits = cap * np.tanh(logits / cap) if cap else logits
    share = np.exp(logits - logits.max())
    y[b, at, h] = share / share.sum() @ v[b, first : at + 1, h // (H // G)]
  return y


@pytest.mark.parametrize(("cap", "window", "has_documents"), CASES)
def test_values_and_gradients(cap, window, has_documents):
  documents = numbers(has_documents)

  def plain(q, k, v):
    span = jnp.asarray(window) if window else None
    return attention.plain(q, k, v, documents, span, SCALE, cap)

  def pulled(fn):
    y, pull = jax.vjp(fn, *(jnp.asarray(x) for x in (Q, KEYS, VALUES)))
    return y, *pull(jnp.asarray(DY))

  wanted = jax.jit(pulled, static_argnums=0)(plain)
  # Sums of at most 37 products of order 1.
  np.testing.assert_allclose(wanted[0], oracle(cap, window, has_documents), atol=2e-6)
  for chunk in (8, 64):  # The length is no multiple of 8, and less than 64.

    def chunked(q, k, v, chunk=chunk):
      return attention.chunked(SCALE, cap, window, chunk, q, k, v, documents)

    for x, y in zip(jax.jit(pulled, static_argnums=0)(chunked), wanted, strict=True):
      np.testing.assert_allclose(x, y, atol=1e-5)


def sizes(jaxpr):
  """Elements of every array of a traced program."""
  for equation in jaxpr.eqns:
    for x in (*equation.invars, *equation.outvars):
      yield getattr(x.aval, "size", 0)
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
          yield from sizes(inner)


@pytest.mark.parametrize("window", [0, 64])
def test_above_a_chunk_nothing_has_the_size_of_length_times_length(window):
  x = jax.ShapeDtypeStruct((1, 4 * attention.CHUNK, 1, 8), jnp.float32)
  documents = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)

  def largest(implementation):
    def loss(q, k, v, documents, is_global):
      return jnp.sum(
        attention.attend(
          q,
          k,
          v,
          scale=1.0,
          window=window,
          is_global=is_global,
          documents_BxL=documents,
          implementation=implementation,
        )
      )

    flag = jax.ShapeDtypeStruct((), bool)
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, documents, flag)
    return max(sizes(traced.jaxpr))

  assert largest("plain") >= x.shape[1] ** 2
  assert largest("auto") <= attention.CHUNK**2


def test_blocks_of_which_nothing_is_seen_are_left_out():
  C, N = 8, 16
  blocks = lambda window: len(attention._pairs(N, C, window)[0])
  assert blocks(0) == N * (N + 1) // 2
  assert blocks(1) == N
  # Position 8 × i sees the last of block i − 1, and with one more position two of it.
  assert blocks(2) == blocks(9) == 2 * N - 1
  assert blocks(10) == 3 * N - 3


GEMMA = transformer.TransformerConfig(
  layers=3,
  width=16,
  heads=2,
  vocabulary=11,
  mlp_width=24,
  kv_heads=1,
  window=5,
  global_every=3,
  separator=0,
  remat="full",
)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_model_of_local_and_global_layers_is_the_same_in_blocks(monkeypatch, remat):
  monkeypatch.setattr(attention, "CHUNK", 4)
  params = transformer.init(GEMMA, 0, eco.FP8)
  tokens = jnp.asarray(generator.integers(0, 11, (2, 20)), jnp.int32)

  def run(implementation):
    config = dataclasses.replace(GEMMA, attention=implementation, remat=remat)
    loss = lambda p: transformer.loss(config, p, tokens)
    return jax.jit(eco.value_and_grad(loss, dense=False, has_aux=True))(params)

  (plain, _), wanted = run("plain")
  (chunked, _), grads = run("chunked")
  np.testing.assert_allclose(chunked, plain, rtol=1e-6)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), rtol=0)


@pytest.mark.parametrize("changes", [{"attention_cap": 2.0}, {"separator": 0}])
def test_cudnn_is_refused_where_it_would_be_wrong(changes):
  with pytest.raises(ValueError, match=f"does not know a {next(iter(changes))}: use 'auto'"):
    transformer.TransformerConfig(
      layers=1, width=8, heads=1, vocabulary=11, attention="cudnn", **changes
    )
  x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
  for options in ({"cap": 2.0}, {"documents_BxL": jnp.zeros((1, 4), jnp.int32)}):
    with pytest.raises(ValueError, match="cuDNN's attention does not know"):
      attention.attend(x, x, x, scale=1.0, implementation="cudnn", **options)


@pytest.mark.parametrize(
  ("cap", "window", "has_documents", "sizes"),
  [(1.5, 0, True, None), (0.0, 100, False, {"data": 2, "tensor": 2})],
)
def test_splash_attention_is_the_definition(cap, window, has_documents, sizes):
  """Interpreted, on one device or split by sequences and heads."""
  shape = (2, 256, 4, 128)
  q, dy = (generator.standard_normal(shape).astype(np.float32) for _ in range(2))
  k, v = (generator.standard_normal((2, 256, 2, 128)).astype(np.float32) for _ in range(2))
  ends = (generator.random((2, 256)) < 0.02).astype(np.int32)
  documents = modules.documents(jnp.asarray(ends), 1) if has_documents else None

  def pulled(fn):
    y, pull = jax.vjp(fn, q, k, v)
    return y, *pull(dy)

  def plain(q, k, v):
    span = jnp.asarray(window) if window else None
    return attention.plain(q, k, v, documents, span, 0.1, cap)

  def splash(q, k, v):
    return attention.splash(q, k, v, documents, 0.1, cap, window, interpret=True)

  wanted = jax.jit(pulled, static_argnums=0)(plain)
  mesh = sharding.make_mesh(sizes or {}, jax.devices()[: 4 if sizes else 1])
  with jax.set_mesh(mesh):
    found = jax.jit(pulled, static_argnums=0)(splash)
  for x, y in zip(found, wanted, strict=True):  # Sums of 256 products of order 1.
    np.testing.assert_allclose(x, y, atol=2e-5)


def test_splash_attention_is_refused_where_its_kernel_takes_no_shape():
  for L, K in ((100, 128), (256, 64)):
    x = jnp.ones((1, L, 1, K))
    with pytest.raises(
      ValueError, match=f"multiples of 128, here {L} and {K}: use attention='auto'"
    ):
      attention.attend(x, x, x, scale=1.0, implementation="splash")


@pytest.mark.parametrize(("width", "window"), [(128, 0), (128, 100), (64, 0)])
def test_on_tpus_auto_is_splash_attention_where_it_can(width, window):
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, compile_lib.topology_devices("v5e:2x2"))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", None, "tensor"))
  x = jax.ShapeDtypeStruct((2, 512, 2, width), jnp.bfloat16, sharding=place)

  def loss(q, k, v):
    y = attention.attend(q, k, v, scale=0.1, window=window, is_global=False)
    return jnp.sum(y.astype(jnp.float32))

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().as_text()
  assert ("splash" in text) == (width % 128 == 0)
  # Each device keeps to its own sequences and heads.
  assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("width", "window"), [(128, 0), (128, 100), (136, 0)])
def test_on_nvidia_gpus_auto_is_cudnn_where_it_can(width, window):
  """A head width above 128 takes a GPU that is there and is known to be recent."""
  pytest.importorskip("jax_plugins.xla_cuda12")
  mesh = sharding.make_mesh({}, compile_lib.topology_devices("h100:1"))
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  x = jax.ShapeDtypeStruct((1, 512, 2, width), jnp.bfloat16, sharding=place)

  def loss(q, k, v):
    y = attention.attend(q, k, v, scale=0.1, window=window, is_global=False)
    return jnp.sum(y.astype(jnp.float32))

  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
  takes = width <= 128
  assert ("__cudnn$fmhaSoftmaxBackward" in text) == takes
  assert (f"sliding_window_length\\22: {window}," in text) == takes
