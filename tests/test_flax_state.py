"""Packed trees through `flax.serialization` and back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco

serialization = pytest.importorskip("flax.serialization")

FORMATS = ("FP8", "FP8_E5M2", "INT8", "INT4", "MXFP8", "MXFP4", "NVFP4")
KERNEL = jax.random.normal(jax.random.key(0), (33 * 32, 32))


def tree(format, kernel=KERNEL):
  params = {"layer": {"kernel": kernel, "bias": jnp.ones(32)}}
  return eco.quantize(params, format)


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_saved_comes_back_to_the_bit(name):
  format = getattr(eco, name)
  params = tree(format)
  target = tree(format, 0 * KERNEL)
  found = serialization.from_bytes(target, serialization.to_bytes(params))
  assert jax.tree.structure(found) == jax.tree.structure(params)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  before, after = (x["layer"]["kernel"].dequantize() for x in (params, found))
  np.testing.assert_array_equal(after, before)


def test_states_with_packed_moments_come_back_and_go_on():
  params = tree(eco.FP8)
  tx = eco.low_bit_moments(eco.adamw(1e-2))
  grads = jax.tree.map(jnp.sin, eco.dequantize(params))

  @jax.jit
  def step(params, state):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  once = step(params, tx.init(params))
  read = serialization.from_bytes((params, tx.init(params)), serialization.to_bytes(once))
  for a, b in zip(jax.tree.leaves(step(*read)), jax.tree.leaves(step(*once)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_shapes_are_a_target():
  params = tree(eco.INT4)
  state = serialization.to_state_dict(params)
  found = serialization.from_state_dict(jax.eval_shape(lambda: params), state)
  np.testing.assert_array_equal(
    found["layer"]["kernel"].dequantize(), params["layer"]["kernel"].dequantize()
  )


def test_targets_of_another_kind_are_refused():
  # Both have codes of four bits, two to a byte, and scales of one shape for blocks of one size.
  saved = serialization.to_bytes(tree(eco.Format("float4_e2m1fn", (1, 32))))
  with pytest.raises(ValueError, match=r"leaf 'layer/kernel' is packed in .*int4.* in .*float4"):
    serialization.from_bytes(tree(eco.Format("int4", (1, 32))), saved)
  with pytest.raises(ValueError, match=r"kernel' is packed, but what is to be read for it is not"):
    serialization.from_bytes(tree(eco.FP8), serialization.to_bytes(eco.dequantize(tree(eco.FP8))))
  with pytest.raises(ValueError, match=r"has (scale|qvalue) of shape .* was saved"):
    serialization.from_bytes(tree(eco.FP8, KERNEL[:, :16]), serialization.to_bytes(tree(eco.FP8)))
  odd, even = (tree(eco.INT4, KERNEL[:n]) for n in (7, 8))
  with pytest.raises(ValueError, match="of odd length"):
    serialization.from_bytes(even, serialization.to_bytes(odd))


def test_updates_are_not_saved():
  params = tree(eco.FP8)
  tx = eco.adamw(1e-2)
  updates, _ = tx.update(eco.dequantize(params), tx.init(params), params)
  with pytest.raises(TypeError, match=r"save what eco_optax\.apply_updates makes of it"):
    serialization.to_bytes(updates)


def test_the_library_alone_imports_no_flax():
  program = (
    "import sys, jax.numpy as jnp, eco_optax as eco\n"
    "eco.quantize(jnp.ones((4, 4)), eco.FP8)\n"
    "assert not any(name.startswith('flax') for name in sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
