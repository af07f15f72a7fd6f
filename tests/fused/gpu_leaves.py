"""A program that holds interpreted kernels for GPUs against the definition, to the bit."""

import sys

import fused_leaves
import jax.numpy as jnp

import eco_optax as eco
from eco_optax.formats import Format
from eco_optax.fused import gpu, gpu_math
from eco_optax.fused.step import definition
from eco_optax.optimizers.adamw import ADAMW

ROWS = Format("float8_e4m3fn", contraction_axis=-1)
MX_ROWS = Format("float8_e4m3fn", (1, 32), "float8_e8m0fnu")
# Small, so that small matrices have several tiles, and rows several turns.
SMALL = gpu.Tuning(row=512, chunk=256, width=32)

CASES = [
  (ROWS, (64, 256), "float32", "nearest"),
  (ROWS, (64, 256), "float8_e4m3fn", "stochastic"),
  (ROWS, (2, 16, 2048), "bfloat16", "stochastic"),
  (ROWS, (16, 1504), "float32", "stochastic"),  # Masked.
  (ROWS, (16, 1120), "int8", "stochastic"),
  (ROWS, (2, 16, 1504), "factored", "stochastic"),
  (eco.FP8, (2, 64, 96), "float32", "stochastic"),
  (eco.FP8, (64, 64), "float8_e4m3fn", "stochastic"),
  (eco.FP8, (2, 64, 96), "factored", "stochastic"),
  (eco.INT4, (2, 64, 64), "float32", "stochastic"),
  (eco.MXFP8, (64, 64), "float8_e4m3fn", "stochastic"),
  (eco.MXFP4, (64, 64), "float32", "stochastic"),
  (eco.NVFP4, (64, 64), "factored", "stochastic"),
  (eco.NVFP4, (64, 64), "float32", "stochastic"),
  (eco.NVFP4, (2, 64, 64), "float8_e4m3fn", "stochastic"),
  (eco.MXFP8, (1, 64, 64), "float8_e4m3fn", "stochastic"),
  (eco.FP8_BLOCK128, (256, 128), "float8_e5m2", "nearest"),
  (MX_ROWS, (32, 64), "float32", "stochastic"),
  (fused_leaves.ROWS["two levels, powers of two"], (64, 64), "float32", "nearest"),
]


def interpreted(step, how, leaf):
  return gpu.by_tiles(step, how, leaf, gpu_math.Target(interpret=True), SMALL)


def main():
  """Exits with what is not equal."""
  differ = []
  for format, shape, moments, how in CASES:
    layer = 1 if len(shape) > 2 else None
    leaf = fused_leaves.make(ADAMW, format, shape, layer, jnp.bfloat16, moments)
    assert gpu.plan(ADAMW, how, leaf, tuning=SMALL), (format, shape, moments)
    wanted = fused_leaves.run(definition, ADAMW, how, leaf)
    if not fused_leaves.equal(fused_leaves.run(interpreted, ADAMW, how, leaf), wanted):
      differ.append(f"{format} {shape} {moments} {how}")
    if layer:
      stack = fused_leaves.in_stack(leaf)
      assert gpu.plan(ADAMW, how, stack, tuning=SMALL), (format, shape, moments)
      found = fused_leaves.middle(stack, fused_leaves.run(interpreted, ADAMW, how, stack))
      if found is None or not fused_leaves.equal(found, wanted):
        differ.append(f"{format} {shape} {moments} {how}, a layer of a stack")
  sys.exit("\n".join(differ) or None)


if __name__ == "__main__":
  main()
