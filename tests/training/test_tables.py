"""Embedding and head in packed parts, against the same model with float tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax.interop import hugging_face
from eco_optax.training import sharding
from eco_optax.training.config import FORMATS
from eco_optax.training.models import tables, transformer

PACKED = transformer.TransformerConfig(
  1, 32, 2, 48, mlp_width=32, loss_chunks=2, quantized="all", vocabulary_parts=3
)
TIED = dataclasses.replace(
  PACKED, tied_embedding=True, scaled_embedding=True, logit_cap=2.0, loss_chunks=1
)
MODELS = {"untied": PACKED, "tied, capped": TIED}
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 48)


def floats(config, params):
  """The model with float tables, and these parameters for it."""
  config = dataclasses.replace(config, quantized="blocks", vocabulary_parts=1)
  rows = lambda name: eco.dequantize(params[name]["rows"]).reshape(-1, config.width)
  dense = params | {"embedding": rows("embedding")}
  return config, dense if config.tied_embedding else dense | {"head": rows("head").T}


def strong(config, format):
  """Parameters with logits of order 1 and gradients that differ."""
  params = transformer.init(config, 0, format)
  bigger = lambda x: dataclasses.replace(x, scale=15 * x.scale) if format else 15 * x
  names = [name for name in ("embedding", "head") if name in params]
  return params | {name: {"rows": bigger(params[name]["rows"])} for name in names}


@pytest.mark.parametrize("format", [eco.INT8, None], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_logits_and_gradients_are_those_of_float_tables(name, format):
  config = MODELS[name]
  params = strong(config, format)
  plain, dense = floats(config, params)

  @jax.jit
  def both(params, dense):
    ours, theirs = (
      eco.value_and_grad(lambda p, c=c: transformer.loss(c, p, TOKENS)[0], dense=False)(p)
      for c, p in ((config, params), (plain, dense))
    )
    logits = transformer.apply(config, params, TOKENS), transformer.apply(plain, dense, TOKENS)
    return ours, theirs, logits

  (value, grads), (want, want_grads), logits = both(params, dense)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert abs(want - np.log(48)) > 0.1
  np.testing.assert_allclose(*logits, atol=2e-5)
  assert jax.tree.structure(grads) == jax.tree.structure(eco.dequantize(params))
  _, grads = floats(config, grads)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True
  ):
    limit = 1e-5 * float(jnp.max(jnp.abs(b)))
    np.testing.assert_allclose(a, b, atol=limit, err_msg=jax.tree_util.keystr(path))


def test_bfloat16_gradients_are_summed_in_float32():
  config = dataclasses.replace(PACKED, dtype="bfloat16", loss_chunks=8)
  params = strong(config, eco.FP8)
  tokens = jnp.tile(TOKENS[:, :1], (1, 9))  # One row gets all of the gradient.

  def gradient(dtype):
    loss = lambda p: transformer.loss(config, p, tokens)[0]
    options = {"dense": False, "gradient_dtype": dtype}
    return jax.jit(eco.value_and_grad(loss, **options))(params)[1]

  narrow, wide = gradient(jnp.bfloat16), gradient(jnp.float32)
  for name in ("embedding", "head"):
    a, b = (np.asarray(grads[name]["rows"], np.float32) for grads in (narrow, wide))
    assert np.abs(b).max() > 0
    np.testing.assert_allclose(a, b, rtol=2**-8, atol=1e-9)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_are_in_int8_with_a_scale_each(name):
  format = FORMATS[name]
  rows = tables.row_format(format)
  assert (rows.dtype.name, rows.granularity, rows.contraction_axis) == ("int8", "channel", -1)
  assert rows.power_of_two == format.power_of_two
  params = jax.eval_shape(lambda: transformer.init(PACKED, 0, eco.NVFP4))
  assert params["head"]["rows"].scale.shape == (3, 16, 1)
  assert params["blocks"]["mlp"]["up"]["kernel"].format == eco.NVFP4.transposed


def test_checkpoints_are_read_into_parts_and_written_as_one_tensor(tmp_path):
  pytest.importorskip("safetensors")
  plain, dense = floats(PACKED, transformer.init(PACKED, 3))
  hugging_face.save(tmp_path / "float", dense, plain)
  parts = {"embedding": dense["embedding"], "head": dense["head"].T}
  in_parts = dense | {name: {"rows": x.reshape(3, 16, 32)} for name, x in parts.items()}
  packed = eco.quantize(in_parts, eco.FP8.transposed, transformer.is_block_kernel)
  packed = eco.quantize(packed, tables.row_format(eco.FP8), lambda path, _: "rows" in path)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
  shapes = jax.eval_shape(lambda: packed)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  placed = jax.tree.map(place, shapes, sharding.shardings(shapes, mesh))
  spec = jax.sharding.PartitionSpec(None, "tensor", "fsdp")
  assert placed["head"]["rows"].qvalue.sharding.spec == spec

  def check(folder, target, config, wanted):
    found = hugging_face.load(folder, target, config)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    return found

  check(tmp_path / "float", jax.eval_shape(lambda: in_parts), PACKED, in_parts)
  check(tmp_path / "float", shapes, PACKED, packed)
  found = check(tmp_path / "float", placed, PACKED, packed)
  hugging_face.save(tmp_path / "packed", found, PACKED)
  check(tmp_path / "packed", shapes, PACKED, packed)
  _, rounded = floats(PACKED, packed)
  check(tmp_path / "packed", jax.eval_shape(lambda: rounded), plain, rounded)
