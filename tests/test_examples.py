"""The examples: each trains, and what it calls packed is packed."""

import contextlib
import pathlib
import runpy

import jax
import numpy as np
import optax
import pytest

import eco_optax as eco

# Optax's schedules, and the frameworks' own layers, compare and add what is not of one dtype.
pytestmark = pytest.mark.standard_promotion

FOLDER = pathlib.Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
NEEDS = {"equinox_mlp": "equinox", "haiku_mlp": "haiku"}
NEEDS |= dict.fromkeys(("flax_nnx", "flax_linen", "nnx_optimizer"), "flax")
EMULATED = ("emulation", "nnx_optimizer")


def example(name):
  if name in NEEDS:
    pytest.importorskip(NEEDS[name])
  return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("mesh", ["no mesh", "explicit axes"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_train(name, mesh):
  with contextlib.ExitStack() as held:
    if mesh == "explicit axes":  # As JAX's own `make_mesh` has them.
      held.enter_context(jax.set_mesh(jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])))
    losses, params = example(name)["train"]()
  assert losses[-1] < 0.15 * losses[0]
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  leaves = jax.tree.leaves(params, is_leaf=is_packed)
  matrices = [leaf for leaf in leaves if leaf.ndim > 1]
  assert len(matrices) == 2
  if name in (*EMULATED, "switch"):  # These end in floats; those of the first are on the grid.
    assert not any(map(is_packed, leaves))
    on_grid = eco.dequantize(eco.quantize(params, eco.FP8))
    # `optax.apply_updates` adds a difference in float32.
    pairs = zip(leaves, jax.tree.leaves(on_grid), strict=True)
    same = [np.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs]
    assert all(same) == (name in EMULATED)
  else:
    assert all(map(is_packed, matrices))
    assert {leaf.qvalue.dtype.name for leaf in matrices} == {"float8_e4m3fn"}


def test_moments_are_taken_along_and_back():
  switch = example("switch")
  draw = lambda i, shape: 0.2 * jax.random.normal(jax.random.key(i), shape)
  params = {"up": draw(2, (16, 64)), "down": draw(3, (64, 4))}
  plain = optax.adamw(1e-2)
  params, opt_state, losses = switch["run"](plain, params, plain.init(params), 50)
  packed, eco_state = switch["to_eco"](eco.adamw(1e-2), params, opt_state)
  back, again = switch["from_eco"](packed, eco_state)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(opt_state), strict=True):
    np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
    # Half a step of E4M3 is a sixteenth of a value, or a 2^-10th of its scale below that.
    scale = np.abs(b).max(0, keepdims=True) / 448
    assert np.all(np.abs(a - b) <= np.abs(b) / 16 + scale * 2**-10)
  # Rounding costs something once; the loss does not begin anew.
  _, _, after = switch["run"](eco.adamw(1e-2), packed, eco_state, 20)
  assert after[0] < 0.3 * losses[0]
  assert after[-1] < losses[-1]
