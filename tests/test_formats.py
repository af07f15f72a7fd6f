"""Formats: canonical, hashable, readable, and honest about what they cannot do."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import eco_optax as eco
from eco_optax import formats

PRESETS = {
  "FP8": eco.FP8,
  "FP8_E5M2": eco.FP8_E5M2,
  "INT8": eco.INT8,
  "INT4": eco.INT4,
  "FP8_BLOCK128": eco.FP8_BLOCK128,
  "MXFP8": eco.MXFP8,
  "MXFP4": eco.MXFP4,
  "NVFP4": eco.NVFP4,
}

# name: dtype, granularity, largest code (E4M3 448, E5M2 57344, E2M1 6, symmetric integers), bits.
EXPECTED = {
  "FP8": ("float8_e4m3fn", "channel", 448.0, 8),
  "FP8_E5M2": ("float8_e5m2", "channel", 57344.0, 8),
  "INT8": ("int8", "channel", 127.0, 8),
  "INT4": ("int4", "tensor", 7.0, 4),
  "FP8_BLOCK128": ("float8_e4m3fn", (128, 128), 448.0, 8),
  "MXFP8": ("float8_e4m3fn", (32, 1), 448.0, 8),
  "MXFP4": ("float4_e2m1fn", (32, 1), 6.0, 4),
  "NVFP4": ("float4_e2m1fn", (16, 1), 6.0, 4),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_their_names_promise(name):
  format = PRESETS[name]
  dtype, granularity, largest, bits = EXPECTED[name]
  assert format.dtype.name == dtype
  assert format.granularity == granularity
  assert format.max == largest
  assert format.bits == bits
  assert format.power_of_two == name.startswith("MX")


@pytest.mark.parametrize("name", PRESETS)
def test_repr_is_the_call_that_makes_it(name):
  format = PRESETS[name]
  assert eval(repr(format), {"Format": eco.Format}) == format


@pytest.mark.parametrize(
  ("spellings", "scale_spellings"),
  [
    (
      ["float8_e4m3fn", jnp.float8_e4m3fn, np.dtype(ml_dtypes.float8_e4m3fn)],
      ["float32", np.float32, jnp.float32, np.dtype("float32")],
    ),
    (
      ["float8_e5m2", jnp.float8_e5m2, jnp.dtype("float8_e5m2")],
      ["bfloat16", jnp.bfloat16, np.dtype(ml_dtypes.bfloat16)],
    ),
    (["float4_e2m1fn", jnp.float4_e2m1fn], ["float8_e8m0fnu", jnp.float8_e8m0fnu]),
    (["int4", jnp.int4, np.dtype(ml_dtypes.int4)], ["float32"]),
    (["int8", np.int8, jnp.int8, np.dtype("int8")], ["float32"]),
  ],
  ids=lambda value: str(value[0]),
)
def test_every_spelling_is_one_format(spellings, scale_spellings):
  made = [eco.Format(d, (32, 1), s) for d in spellings for s in scale_spellings]
  made += [eco.Format(d, [32, 1], s) for d in spellings for s in scale_spellings]
  assert len(set(made)) == 1
  assert len({repr(format) for format in made}) == 1
  # Equal formats make equal tree definitions, or `lax.cond` and the jit cache would tell them
  # apart.
  x = jnp.ones((32, 2))
  assert len({jax.tree.structure(eco.quantize(x, format)) for format in made}) == 1


def test_formats_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    eco.FP8.granularity = "tensor"


@pytest.mark.parametrize(
  ("dtype", "codes"),
  [
    ("float8_e4m3fn", 256),
    ("float8_e5m2", 256),
    ("float4_e2m1fn", 16),
    ("int8", 256),
    ("int4", 16),
  ],
)
def test_the_oracles_tables_are_every_finite_code(dtype, codes):
  """Guards the tables that the other tests trust: they are ml_dtypes' finite codes."""
  kind = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
  if codes == 256:
    values = np.arange(256, dtype=np.uint8).view(kind).astype(np.float64)
  elif dtype == "int4":
    values = np.arange(-8, 8).astype(kind).astype(np.float64)
  else:
    values = np.arange(16, dtype=np.uint8).view(kind).astype(np.float64)
  table = oracle.TABLES[dtype]
  lowest = {"int8": -128.0, "int4": -8.0}.get(dtype)  # Not used: integers are symmetric.
  finite = {v for v in values[np.isfinite(values)] if v != lowest}
  assert finite == {*table, *-table}
  assert np.all(np.diff(table) > 0)
  assert formats.grid_max(np.dtype(kind)) == table[-1]


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    (dict(dtype="float7"), "float7"),
    (dict(dtype=np.float32), "float32"),
    (dict(dtype="uint4"), "uint4"),
    (dict(dtype=object), "object"),
    (dict(dtype="int8", granularity="row"), "row"),
    (dict(dtype="int8", granularity=()), r"\(\)"),
    (dict(dtype="int8", granularity=(0, 4)), r"\(0, 4\)"),
    (dict(dtype="int8", granularity=7), "7"),
    (dict(dtype="int8", scale_dtype="float16"), "float16"),
    (dict(dtype="int8", contraction_axis=0), "0"),
    (dict(dtype="float4_e2m1fn", granularity="tensor", scale_dtype="float8_e4m3fn"), "tensor"),
  ],
  ids=lambda value: str(value),
)
def test_unknown_formats_raise_and_name_the_value(arguments, named):
  with pytest.raises(ValueError, match=named):
    eco.Format(**arguments)


@pytest.mark.parametrize(
  ("format", "shape", "named"),
  [
    (eco.FP8_BLOCK128, (128, 100), "100"),
    (eco.MXFP8, (48, 4), "32"),
    (eco.MXFP4, (16,), "16"),
    (eco.NVFP4, (8, 8), "16"),
    (eco.FP8, (5,), "-2"),
    (eco.FP8, (), "nothing"),
    (eco.INT4, (0, 3), "nothing"),
  ],
  ids=str,
)
def test_shapes_that_do_not_fit_raise_and_name_the_leaf(format, shape, named):
  tree = {"block": {"kernel": jnp.ones(shape)}}
  with pytest.raises(ValueError, match="block/kernel") as error:
    eco.quantize(tree, format, where=lambda path, leaf: True)
  assert named in str(error.value)
  if shape and 0 not in shape:
    with pytest.raises(ValueError, match="block/kernel"):
      eco.quantize_params(format, where=lambda path, leaf: True).init(tree)
