"""Leaves to try a fused update on, and a program that compares implementations without FMA."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import eco_optax as eco
from eco_optax import rounding
from eco_optax.kernels import fused_update, pallas_update, steps

STEPS = {
  "adamw": steps.ADAMW,
  "nadamw": steps.NADAMW,
  "sgd": steps.SGD,
  "nesterov": steps.NESTEROV,
}
FORMATS = {
  name: getattr(eco, name)
  for name in ("FP8", "FP8_E5M2", "INT8", "INT4", "FP8_BLOCK128", "MXFP8", "MXFP4", "NVFP4")
}


def make(step, format, shape, layer=None, gradient_dtype=jnp.float32):
  """A leaf in the middle of a training run."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, scale: scale * jax.random.normal(key, shape)
  weight = eco.quantize({"w": draw(keys[0], 0.02)}, format)["w"]
  moments = (draw(keys[1], 1e-3), draw(keys[2], 1e-3) ** 2)
  if step.scalars is steps.SgdScalars:
    scalars, moments = (0.5, 0.9, 1e-1, -3.0), moments[:1]
  else:
    scalars = (0.5, 0.1, 0.9, 0.01, 0.99, 2.4, 0.7, 25.0, 0.0, 1e-8, 0.1, 1e-3, -100.0, 1e20)
  return fused_update.Leaf(
    step.scalars(*(jnp.float32(x) for x in scalars)),
    rounding.stream_key(3, 7, "w"),
    None if layer is None else jnp.int32(layer),
    weight,
    draw(keys[3], 1e-3).astype(gradient_dtype),
    moments,
  )


def run(implementation, step, how, leaf):
  """Codes, scales and moments as NumPy arrays."""
  out = jax.jit(lambda leaf: implementation(step, how, leaf))(leaf)
  return [np.asarray(x) for x in jax.tree.leaves(out)]


def by_interpreted_panels(step, how, leaf):
  return pallas_update.by_panels(step, how, leaf, interpret=True)


def main():
  """Exits with what is not equal to the bit."""
  differ = []
  for name, step in STEPS.items():
    for preset, format in FORMATS.items():
      for how in ("nearest", "stochastic"):
        for shape, layer in (((512, 128), None), ((2, 256, 256), 5)):
          leaf = make(step, format, shape, layer, jnp.bfloat16 if layer else jnp.float32)
          assert pallas_update.applies(leaf)
          wanted = run(fused_update.definition, step, how, leaf)
          for other in (fused_update.by_rows, by_interpreted_panels):
            found = run(other, step, how, leaf)
            same = [
              np.array_equal(a.view(np.uint8), b.view(np.uint8))
              for a, b in zip(found, wanted, strict=True)
            ]
            if not all(same):
              differ.append((name, preset, how, shape, other.__name__, same))
  sys.exit("\n".join(map(str, differ)) or None)


if __name__ == "__main__":
  main()
