"""Leaves to try a fused update on, and a program that compares implementations without FMA."""

import functools
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eco_optax as eco
from eco_optax import rounding
from eco_optax.formats import Format
from eco_optax.fused import cpu, gpu, gpu_math, mesh, tpu
from eco_optax.fused.leaf import Leaf, on_layers
from eco_optax.fused.step import by_layers, definition
from eco_optax.optimizers import adamw, sgd
from eco_optax.transforms import stored_moments
from eco_optax.transforms.factored import Factors, factored

# No fused multiply-adds; all else as in conftest.py.
EXACT = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX"
STEPS = {
  "adamw": adamw.ADAMW,
  "nadamw": adamw.NADAMW,
  "sgd": sgd.SGD,
  "nesterov": sgd.NESTEROV,
}
FORMATS = {
  name: getattr(eco, name)
  for name in ("FP8", "FP8_E5M2", "INT8", "INT4", "FP8_BLOCK128", "MXFP8", "MXFP4", "NVFP4")
}
# Of kernels stored (…, out, in).
ROWS = {
  "FP8 rows": Format("float8_e4m3fn", contraction_axis=-1),
  "INT4 rows": Format("int4", contraction_axis=-1),
  "MXFP8 rows": Format("float8_e4m3fn", (1, 32), "float8_e8m0fnu"),
  "NVFP4 rows": Format("float4_e2m1fn", (1, 16), "float8_e4m3fn"),
  "two levels, powers of two": Format("float4_e2m1fn", (1, 16), "float8_e4m3fn", True),
}


def make(step, format, shape, layer=None, gradient_dtype=jnp.float32, moments_in="float32"):
  """A leaf in the middle of a training run, its moments stored in a dtype; one small program."""
  return _make(step, format, layer, gradient_dtype, moments_in, _drawn(shape))


@functools.partial(jax.jit, static_argnums=0)
def _drawn(shape):
  """Four arrays of normal numbers and one of random bits, by one program for all leaves."""
  *keys, last = jax.random.split(jax.random.key(0), 5)
  return [jax.random.normal(key, shape) for key in keys], jax.random.bits(last, shape, jnp.uint32)


@functools.partial(jax.jit, static_argnums=range(5))
def _make(step, format, layer, gradient_dtype, moments_in, drawn):
  (weight, first, second, gradient), bits = drawn
  weight = eco.quantize({"w": 0.02 * weight}, format)["w"]
  moments = (1e-3 * first, (1e-3 * second) ** 2)
  if step.scalars is sgd.SgdScalars:
    scalars, moments = (0.5, 0.9, 1e-1, -3.0), moments[:1]
  else:
    scalars = (0.5, 0.1, 0.9, 0.01, 0.99, 2.4, 0.7, 25.0, 0.0, 1e-8, 0.1, 1e-3, -100.0, 1e20)
  starts = [rounding.stream_start(3, "w")]
  if moments_in != "float32":
    starts += [rounding.stream_start(5, name) for name in ("mu", "nu")[: len(moments)]]
    kinds = ("first", "second")[: len(moments)]
    is_factored = moments_in == "factored"
    dtype = "float8_e4m3fn" if is_factored else moments_in
    second = moments[-1]
    moments = tuple(
      stored_moments.store(x, kind, dtype, bits, True, stored_moments.block_axis(format))
      for x, kind in zip(moments, kinds, strict=True)
    )
    if is_factored:  # As a kernel gets it.
      moments = moments[0], factored(second).factors()
  return Leaf(
    step.scalars(*(jnp.float32(x) for x in scalars)),
    jnp.array(starts),
    jnp.full(len(starts), 7, jnp.int32),
    None if layer is None else jnp.int32(layer),
    weight,
    (1e-3 * gradient).astype(gradient_dtype),
    moments,
  )


def run(implementation, step, how, leaf):
  """Codes, scales and moments as NumPy arrays."""
  out = jax.jit(lambda leaf: implementation(step, how, leaf))(leaf)
  return [np.asarray(x) for x in jax.tree.leaves(out)]


def in_stack(leaf):
  """A stack of three layers with the leaf in the middle. The other two have its rows in reverse."""
  stack = lambda x: jnp.stack([x[..., ::-1, :], x, x[..., ::-1, :]])
  moments = tuple(x if isinstance(x, Factors) else jax.tree.map(stack, x) for x in leaf.moments)
  weight = jax.tree.map(stack, leaf.weight)
  return leaf._replace(layer=jnp.int32(1), weight=weight, moments=moments)


def middle(leaf, found):
  """Of the results of a leaf `in_stack` its own; None where another layer is changed."""
  for old, new in zip(jax.tree.leaves(leaf.results), found, strict=True):
    others = slice(None, None, 2)
    if new.ndim > leaf.gradient.ndim and not equal([new[others]], [np.asarray(old)[others]]):
      return None
  return [x[1] if x.ndim > leaf.gradient.ndim else x for x in found]


def equal(found, wanted):
  """Whether arrays are the same to the bit."""
  pairs = zip(found, wanted, strict=True)
  return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)


def by_interpreted_panels(step, how, leaf):
  return tpu.by_panels(step, how, leaf, interpret=True)


def by_interpreted_tiles(step, how, leaf):
  return gpu.by_tiles(step, how, leaf, gpu_math.Target(interpret=True), SMALL_TILES)


def on_mesh(step, how, leaf, sharding, implementation):
  """The step of each device's part, where there are parts."""
  if (split := mesh.split_of(leaf, sharding)) is None:
    return implementation(step, how, leaf)
  return mesh.on_parts(implementation, step, how, leaf, sharding.mesh, split)


def spread(leaf, sharding):
  """A leaf, or its shapes, split over a mesh: what has its axes, where they are longer than 1."""
  spec = sharding.spec

  def place(x):
    own = P(*(axes if n > 1 else None for n, axes in zip(x.shape, spec, strict=False)))
    if x.ndim > leaf.gradient.ndim:  # Of a stack.
      own = P(None, *(axes if n > 1 else None for n, axes in zip(x.shape[1:], spec, strict=False)))
    own = NamedSharding(sharding.mesh, own if x.ndim >= leaf.gradient.ndim else P())
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)
    return jax.device_put(x, own)

  return jax.tree.map(place, leaf)


# The matrices are small, but should have several tiles each.
SMALL_TILES = gpu.Tuning(row=512, chunk=4096, width=32)

# Kernels for GPUs have fewer ways through them, and gpu_leaves.py has more of these.
ON_TILES = {
  "nearest": ("FP8", "INT4", "FP8_BLOCK128", "MXFP8", "NVFP4"),
  "stochastic": ("FP8", "FP8_BLOCK128"),
}
CASES = {  # Step, format and how moments are stored; how else than stochastically it rounds.
  **{("adamw", name, "float32"): ("nearest",) for name in FORMATS},
  ("nadamw", "FP8", "float32"): (),
  ("sgd", "FP8", "float32"): ("nearest",),
  ("nesterov", "FP8", "float32"): (),
  ("adamw", "FP8", "float8_e4m3fn"): ("nearest",),
  ("nadamw", "INT4", "float8_e5m2"): (),
  ("sgd", "MXFP8", "int8"): ("nearest",),
  ("adamw", "INT8", "int8"): (),
  ("adamw", "FP8", "bfloat16"): (),
  ("adamw", "FP8", "factored"): (),
  ("adamw", "NVFP4", "factored"): ("nearest",),
  ("adamw", "FP8 rows", "float32"): ("nearest",),
  ("adamw", "FP8 rows", "factored"): (),
  ("sgd", "FP8 rows", "float8_e4m3fn"): (),
  ("adamw", "INT4 rows", "int8"): (),
  ("adamw", "MXFP8 rows", "float8_e4m3fn"): ("nearest",),
  ("adamw", "NVFP4 rows", "float32"): (),
  ("adamw", "two levels, powers of two", "float32"): ("nearest",),
}


def main():
  """Exits with what is not equal to the bit."""
  differ = []
  devices = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
  of_layer, of_stack = (NamedSharding(devices, P(*lead, None, "x", "y")) for lead in ((), (None,)))
  for (name, preset, moments_in), hows in CASES.items():
    # One matrix to nearest; the matrices of a layer, with gradients in bfloat16, stochastically, on
    # four devices, each of which has half of the rows and of the columns.
    for how in (*hows, "stochastic"):
      layer = 1 if how == "stochastic" else None
      shape, dtype = ((2, 512, 256), jnp.bfloat16) if layer else ((640, 128), jnp.float32)
      leaf = make(STEPS[name], (FORMATS | ROWS)[preset], shape, layer, dtype, moments_in)
      assert tpu.applies(leaf)
      wanted = run(definition, STEPS[name], how, leaf)
      others = [cpu.by_rows, by_interpreted_panels]
      few_bits = moments_in not in ("float32", "bfloat16")
      if name in ("adamw", "sgd") and preset in ON_TILES[how] and not few_bits:
        others.append(by_interpreted_tiles)
      for other in others:
        # Tiles take what is not split along the rows.
        if layer is None or other is by_interpreted_tiles:
          found = run(other, STEPS[name], how, leaf)
        elif preset in ROWS or moments_in != "float32":  # One layer in its stack.
          own = on_layers(other) if other is cpu.by_rows else other
          split = functools.partial(on_mesh, sharding=of_stack, implementation=own)
          stack = in_stack(leaf)
          found = middle(stack, run(split, STEPS[name], how, spread(stack, of_layer)))
        else:
          split = functools.partial(on_mesh, sharding=of_stack, implementation=other)
          found = run(split, STEPS[name], how, spread(leaf, of_layer))
        if found is None or not equal(found, wanted):
          differ.append(f"{name} {preset} {moments_in} {how} {other.__name__}")
    # Where no kernel fits a stack goes layer by layer, on one device and on four.
    placed = spread(leaf, of_layer)
    if (name, preset) == ("adamw", "NVFP4"):  # A whole stack, its columns on two pairs of devices.
      leaf, placed = leaf._replace(layer=None), spread(leaf, of_stack)._replace(layer=None)
      wanted = run(definition, STEPS[name], "stochastic", leaf)
    split = functools.partial(on_mesh, sharding=of_stack, implementation=by_layers)
    for other, own in ((by_layers, leaf), (split, placed)):
      if not equal(run(other, STEPS[name], "stochastic", own), wanted):
        differ.append(f"{name} {preset} {moments_in} by layers")
  sys.exit("\n".join(differ) or None)


if __name__ == "__main__":
  main()
