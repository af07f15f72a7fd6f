"""Steps without kernels: where they are not wanted, and where a backend has none after all."""

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


def no_lowering(*_):
  raise NotImplementedError("no lowering of this")


def no_compilation(own, rounding, leaf):
  """Lowers to a call that the compiler of CPUs does not know."""
  del own, rounding
  flat, treedef = jax.tree.flatten(leaf.results)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
  return jax.tree.unflatten(treedef, jax.ffi.ffi_call("no_such_kernel", shapes)(leaf.gradient))


@pytest.fixture
def lowers_to(monkeypatch):
  """Puts another implementation of steps on CPUs in its place for a test."""

  def put(lower):
    mlir.register_lowering(dispatch._take_steps_p, lower, platform="cpu")
    dispatch._compiled.cache_clear()
    jax.clear_caches()

  yield lambda implementation: put(dispatch._lowering(implementation, kernels_on="cpu"))
  put(dispatch._lowering(dispatch.cpu.by_size, dispatch._by_turns))


@pytest.mark.parametrize(
  ("implementation", "words"),
  [(no_lowering, "NotImpl.*no lowering"), (no_compilation, "JaxRuntimeError.*no_such_kernel")],
)
def test_a_kernel_that_is_refused_gives_way_with_a_warning(implementation, words, lowers_to):
  leaf = fused_leaves.make(ADAMW, eco.FP8, (64, 48), None, jnp.bfloat16)
  wanted = jax.jit(lambda leaf: step.definition(ADAMW, "nearest", leaf))(leaf)
  take_step = jax.jit(lambda leaf: dispatch.take_step(ADAMW, "nearest", leaf))
  lowers_to(implementation)
  with pytest.warns(RuntimeWarning, match=rf"float8_e4m3fn.*\(64, 48\) on cpu: {words}") as warned:
    found = take_step(leaf)
  assert len(warned) == 1
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(
      np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), rtol=1e-6, atol=1e-12
    )


@pytest.fixture
def lowered(lowers_to):
  """Shapes of leaves whose steps were lowered, each by what may be a kernel."""
  shapes = []

  def by_size(own, rounding, leaf):
    shapes.append(leaf.shape)
    return dispatch.cpu.by_size(own, rounding, leaf)

  lowers_to(by_size)
  return shapes


def test_kernels_are_tried_once(lowered):
  leaf = fused_leaves.make(ADAMW, eco.FP8, (64, 48), None, jnp.bfloat16)
  for factor in (2.0, 3.0):  # Each makes a program. Only the first program tries the kernel.
    jax.jit(
      lambda leaf, c=factor: c * dispatch.take_step(ADAMW, "nearest", leaf)[0].dequantize()
    ).lower(leaf)
  assert len(lowered) == 3


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="no programs for devices of a name")
def test_kernels_for_a_device_that_is_absent_are_not_tried(lowered):
  leaf = fused_leaves.make(ADAMW, eco.FP8, (96, 48), None, jnp.bfloat16)
  absent = jax.sharding.AbstractDevice(device_kind="absent", num_cores=None, platform="cpu")
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=absent)):
    jax.jit(lambda leaf: dispatch.take_step(ADAMW, "nearest", leaf)).lower(leaf)
  assert len(lowered) == 1
