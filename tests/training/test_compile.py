"""Compiling ahead of time for TPUs, and reading the compiled program."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import hardware

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

# Two gathers and a sum, one of them in a loop of six; the gather on channel 3 is in two stages of
# one operation. Written by hand in the compiler's syntax.
PROGRAM = """HloModule jit_step, is_scheduled=true

%stage.1 (p.1: f8e4m3fn[1,160,640]) -> f8e4m3fn[1,640,640] {
  %p.1 = f8e4m3fn[1,160,640]{2,1,0} parameter(0)
  ROOT %all-gather.1 = f8e4m3fn[1,640,640] all-gather(%p.1), channel_id=3, chain_id="0"
}

%stage.2 (p.2: f8e4m3fn[1,160,640]) -> f8e4m3fn[1,640,640] {
  %p.2 = f8e4m3fn[1,160,640]{2,1,0} parameter(0)
  ROOT %all-gather.2 = f8e4m3fn[1,640,640] all-gather(%p.2), channel_id=3, chain_id="0"
}

%all-reduce-scatter.1 (p.3: f32[640,640]) -> f32[160,640] {
  %p.3 = f32[640,640]{1,0} parameter(0)
  %all-reduce.1 = f32[640,640]{1,0} all-reduce(%p.3), channel_id=5, to_apply=%add
  ROOT %slice = f32[160,640]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={160,640}
}

%body (state: (s32[], f8e4m3fn[1,160,640], f32[640,640])) -> (s32[], f8e4m3fn[1,160,640]) {
  %state = (s32[], f8e4m3fn[1,160,640]{2,1,0}, f32[640,640]{1,0}) parameter(0)
  %codes = f8e4m3fn[1,160,640]{2,1,0} get-tuple-element(%state), index=1
  %grad = f32[640,640]{1,0} get-tuple-element(%state), index=2
  %one = f8e4m3fn[1,640,640]{2,1,0} fusion(%codes), kind=kCustom, calls=%stage.1
  %two = f8e4m3fn[1,640,640]{2,1,0} fusion(%codes), kind=kCustom, calls=%stage.2
  %own = f32[160,640]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state.1: (s32[], f8e4m3fn[1,160,640], f32[640,640])) -> pred[] {
  %state.1 = (s32[], f8e4m3fn[1,160,640]{2,1,0}, f32[640,640]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %constant.6 = s32[]{:T(128)} constant(6)
  ROOT %compare = pred[] compare(%counter, %constant.6), direction=LT
}

ENTRY %main (a: f8e4m3fn[1,160,640], b: bf16[160,100]) -> f8e4m3fn[1,160,640] {
  %a = f8e4m3fn[1,160,640]{2,1,0} parameter(0)
  %b = bf16[160,100]{1,0} parameter(1)
  %start = (bf16[160,100]{1,0}, bf16[640,100]{1,0}) all-gather-start(%b), channel_id=9
  %whole = bf16[640,100]{1,0} all-gather-done(%start)
  %loop = (s32[], f8e4m3fn[1,160,640], f32[640,640]) while(%a), condition=%condition, body=%body
}
"""


def test_collectives_are_counted_with_their_loops():
  found = compile_lib.collectives(PROGRAM)
  assert found["all-gather"]["f8e4m3fn"] == {"count": 6, "bytes": 6 * 640 * 640}
  assert found["reduce-scatter"] == {"f32": {"count": 6, "bytes": 6 * 4 * 640 * 640}}
  # A start's result holds its operand too.
  assert found["all-gather"]["bf16"] == {"count": 1, "bytes": 2 * (160 + 640) * 100}
  assert set(found) == {"all-gather", "reduce-scatter"}


def test_chips_are_told_by_the_longest_name():
  assert hardware.chip("TPU v5").name == "TPU v5p"
  assert hardware.chip("TPU v5 lite").name == "TPU v5e"
  assert hardware.chip("NVIDIA H100 80GB HBM3").name == "H100"
  assert hardware.chip("cpu") is None


@pytest.fixture(scope="module")
def tpu():
  """Four TPUs that are not there."""
  pytest.importorskip("libtpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  return compile_lib.topology_devices("v5e:2x2")


def small(method):
  config = config_lib.defaults()
  config.model.update(layers=3, width=512, heads=4, mlp_width=1024, vocabulary=256, remat="full")
  config.method, config.dtype, config.gradient_dtype = method, "bfloat16", "bfloat16"
  config.batch_size, config.length = 4, 128
  return config


def test_a_step_compiles_for_tpus_and_weights_cross_the_wire_as_codes(tpu):
  lines = []
  compiled, report = compile_lib.compile_step(small("eco_sr"), tpu, lines.append)
  assert lines[:2] == ["tracing", "compiling for 4 × TPU v5 lite"]
  quantized = report["quantized_parameters"]
  assert quantized == 3 * (4 * 512**2 + 3 * 512 * 1024)
  gathers = report["collectives_per_device"]["all-gather"]
  # A layer's codes are gathered for the forward pass and again for the backward pass.
  assert gathers["f8e4m3fn"]["bytes"] == 2 * quantized
  # What is gathered in bfloat16 is embedding and head.
  assert gathers["bf16"]["bytes"] <= 2 * 2 * 256 * 512 * 1.3
  # Gradients of kernels end where their moments are.
  assert report["collectives_per_device"]["reduce-scatter"]["f32"]["bytes"] >= 4 * quantized

  used = report["bytes_per_device"]
  assert used["codes"] == quantized // 4
  assert used["moments"] == 8 * quantized // 4
  assert 9 < report["bytes_per_quantized_parameter"]["total"] < 9.02
  assert used["updated in place"] >= used["state"]  # No second copy while it changes.
  assert report["fits"]
  text = compile_lib.report_text(report)
  assert "fits" in text
  assert "all-gather f8e4m3fn" in text
  # Of all layers at once only the moments are float32, in the parts that devices own.
  assert "f32[3,128,1024]" in compiled.as_text()
  assert "f32[3,512,1024]" not in compiled.as_text()


def test_an_optimizer_step_holds_one_layer_and_works_in_place(tpu):
  layers, width = 16, 2048
  tx = eco.layer_by_layer(eco.adamw(1e-3))
  shape = jax.ShapeDtypeStruct((layers, width, width), jnp.float32)
  params = jax.eval_shape(lambda x: {"kernel": eco.quantize(x, eco.FP8)}, shape)
  grads = {"kernel": jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16)}

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(tpu[0])),
    (grads, jax.eval_shape(tx.init, params), params),
  )
  used = jax.jit(step, donate_argnums=(1, 2)).lower(*arguments).compile().memory_analysis()
  # A few float32 arrays of one layer at most; a stack of proposals would be 16.
  assert used.temp_size_in_bytes <= 4 * 4 * width * width
  assert used.alias_size_in_bytes >= 9 * layers * width * width  # Codes and both moments.


def test_unknown_topologies_are_named(tpu):
  with pytest.raises(ValueError, match="no TPU topology 'v5q:2x2': use v4:2x2x1"):
    compile_lib.topology_devices("v5q:2x2")


def test_table_of_two_reports():
  report = {
    "parameters": 1_000,
    "devices": 4,
    "chip": "TPU v5e",
    "fits": True,
    "bytes_per_quantized_parameter": {"total": 9.0},
    "bytes_per_device": {"state": 2**30, "peak": 3 * 2**30},
  }
  master = report | {
    "fits": False,
    "bytes_per_quantized_parameter": {"total": 13.0},
    "bytes_per_device": {"state": 2 * 2**30, "peak": 4 * 2**30},
  }
  row = (
    "| x | 1,000 | 4 × TPU v5e | 9.00 / 13.00 | 1.00 / 2.00 GiB | 3.00 / 4.00 GiB | 0.75×"
    " | yes / no |"
  )
  assert row in compile_lib.table({"x": (report, master)})
