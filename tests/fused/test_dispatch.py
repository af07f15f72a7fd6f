"""Steps without kernels: where they are not wanted, and where a backend has none after all."""

import warnings

import fused_leaves
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import mlir

import eco_optax as eco
from eco_optax.fused import dispatch, step
from eco_optax.optimizers.adamw import ADAMW


def params_and_grads():
  params = eco.quantize({"w": jax.random.normal(jax.random.key(0), (64, 32))}, eco.FP8)
  return params, {"w": jax.random.normal(jax.random.key(1), (64, 32))}


@pytest.mark.parametrize("optimizer", [eco.adamw, eco.sgd])
def test_a_step_without_kernels_is_the_same(optimizer, monkeypatch):
  params, grads = params_and_grads()

  def stepped(fused):
    tx = optimizer(1e-2, fused=fused)
    program = jax.jit(tx.update).lower(grads, tx.init(params), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return "eco_fused_step" in program.as_text(debug_info=True), updates["w"]

  has, wanted = stepped(True)
  assert has
  for fused, said in ((False, "1"), (None, "0")):
    monkeypatch.setenv("ECO_OPTAX_FUSED", said)
    has, found = stepped(fused)
    assert not has
    np.testing.assert_array_equal(np.asarray(found.qvalue), np.asarray(wanted.qvalue))
  monkeypatch.setenv("ECO_OPTAX_FUSED", "0")
  assert stepped(True)[0]  # What the program says goes before the environment.


def test_the_environment_variable_is_0_or_1(monkeypatch):
  monkeypatch.setenv("ECO_OPTAX_FUSED", "no")
  params, grads = params_and_grads()
  tx = eco.adamw(1e-2)
  with pytest.raises(ValueError, match="ECO_OPTAX_FUSED is 'no'"):
    tx.update(grads, tx.init(params), params)


def test_a_kernel_that_is_refused_gives_way_with_a_warning(monkeypatch):
  def refuses(*_):
    raise NotImplementedError("no lowering of this")

  leaf = fused_leaves.make(ADAMW, eco.FP8, (64, 48), None, jnp.bfloat16)
  wanted = jax.jit(lambda leaf: step.definition(ADAMW, "nearest", leaf))(leaf)
  lower = dispatch._lowering(refuses)

  def bind(leaf):
    return dispatch.take_step(ADAMW, "nearest", leaf)

  old = dispatch._lowering(dispatch.cpu.by_size, dispatch._by_turns)
  mlir.register_lowering(dispatch._take_steps_p, lower, platform="cpu")
  dispatch._compiled.cache_clear()
  jax.clear_caches()
  try:
    with pytest.warns(RuntimeWarning, match=r"float8_e4m3fn.*\(64, 48\) on cpu: NotImpl.*no lower"):
      found = jax.jit(bind)(leaf)
  finally:
    mlir.register_lowering(dispatch._take_steps_p, old, platform="cpu")
    dispatch._compiled.cache_clear()
    jax.clear_caches()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    jax.jit(bind)(leaf)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(
      np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), rtol=1e-6, atol=1e-12
    )
