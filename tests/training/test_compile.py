"""Compiling ahead of time for TPUs, and reading the compiled program."""

import collections
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import hardware
from eco_optax.training import step as step_lib

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


@pytest.fixture(autouse=True, scope="module")
def no_cache():
  """Programs for devices that are not there cannot be loaded from a cache."""
  with compile_lib.without_cache():
    yield


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
  # A start's result holds its operand too, of which nothing is gathered.
  assert found["all-gather"]["bf16"] == {"count": 1, "bytes": 2 * 640 * 100}
  assert set(found) == {"all-gather", "reduce-scatter"}


# A product in each of the compiler's forms, of M = 4, K = 8 and N = 16 but for attention, which has
# B = 2, L = M = 32, H = 3 and K = 16; a loop of six; a copy and two transposes, one in a fusion.
PRODUCTS = """HloModule jit_step, is_scheduled=true

FileNames
1 "/python/site-packages/jax/numpy.py"
2 "/home/me/eco_optax/training/step.py"

FunctionNames
1 "exp"
2 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=11 end_line=11 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=22 end_line=23 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused_dot (x: bf16[4,8], y: f8e4m3fn[8,16]) -> f32[4,16] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f8e4m3fn[8,16]{1,0} parameter(1)
  %wide = bf16[8,16]{1,0} convert(%y)
  ROOT %dot = f32[4,16]{1,0} dot(%x, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_transpose (x.1: f32[16,8]) -> bf16[8,16] {
  %x.1 = f32[16,8]{1,0} parameter(0)
  %turned = f32[8,16]{1,0} transpose(%x.1), dimensions={1,0}
  ROOT %narrow = bf16[8,16]{1,0} convert(%turned)
}

%body (state: (s32[], f32[8,4], f32[8,16])) -> (s32[], f32[8,4], f32[8,16]) {
  %state = (s32[], f32[8,4]{1,0}, f32[8,16]{1,0}) parameter(0)
  %left = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %right = f32[8,16]{1,0} get-tuple-element(%state), index=2
  %inner = (f32[4,16]{1,0}, s8[99]{0}) custom-call(%left, %right), \
custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}}}
  %again = f32[16,8]{1,0} transpose(%right), dimensions={1,0}
}

%condition (state.1: (s32[], f32[8,4], f32[8,16])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}, f32[8,16]{1,0}) parameter(0)
  %bound = s32[] constant(7)
}

ENTRY %main (a: bf16[4,8], b: f8e4m3fn[8,16], c: f32[16,8], q: bf16[2,32,3,16]) \
-> (f32[4,16], bf16[8,16]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f8e4m3fn[8,16]{1,0} parameter(1)
  %c = f32[16,8]{1,0} parameter(2)
  %q = bf16[2,32,3,16]{3,2,1,0} parameter(3)
  %one = f32[4,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_dot
  %codes = f8e4m3fn[4,8]{1,0} convert(%a)
  %two = f32[4,16]{1,0} custom-call(%codes, %b), \
custom_call_target="__cublas$lt$matmul$f8", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %three = f32[5,4,16]{2,1,0} convolution(%five, %six), \
window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf
  %five = s8[5,4,8]{2,1,0} custom-call(%a), custom_call_target="other"
  %six = s8[5,8,16]{2,1,0} custom-call(%a), custom_call_target="other"
  %four = (bf16[2,3,32,16]{3,1,2,0}, f32[2,3,32]{2,1,0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"mask_type": "CAUSAL", "sliding_window_length": 0}
  %local = (bf16[2,3,32,16]{3,1,2,0}, f32[2,3,32]{2,1,0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", \
backend_config={"mask_type": "CAUSAL", "sliding_window_length": 8}
  %copied = f32[16,8]{1,0} copy(%c)
  %moved = f32[16,8]{1,0:S(1)} copy(%c)
  %new = bf16[8,16]{1,0} fusion(%copied), kind=kLoop, calls=%fused_transpose
  %large = f32[1000]{0} exponential(%c), metadata={op_name="exp" stack_frame_id=2}
  %loop = (s32[], f32[8,4]{1,0}, f32[8,16]{1,0}) while(%c), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  ROOT %out = (f32[4,16]{1,0}, bf16[8,16]{1,0}) tuple(%one, %new)
}
"""


def test_operations_of_products_are_counted_by_dtypes():
  one = 2 * 4 * 8 * 16
  attention = 2 * 32 * 3 * 16  # Sums over keys, by two for a product of each of them.
  assert compile_lib.products(PRODUCTS) == {
    "bf16 × bf16": one + 2 * attention * 2 * 16 + 5 * attention * 2 * 8,
    "f32 × f32": 6 * one,
    "s8 × s8": 5 * one,
    "f8e4m3fn × f8e4m3fn": one,
  }


def test_bytes_of_copies_and_transposes_are_counted():
  assert compile_lib.bytes_copied(PRODUCTS) == 4 * 128 + 2 * 128 + 6 * 4 * 128


def test_the_largest_temporaries_are_told_with_their_source():
  own = "eco_optax/training/step.py:22"  # JAX's line 11 is called from there.
  assert compile_lib.largest_temporaries(PRODUCTS, 2) == [
    {"bytes": 2 * 2 * 3 * 32 * 16, "array": "bf16[2,3,32,16]", "source": ""},
    {"bytes": 4000, "array": "f32[1000]", "source": own},
  ]
  arrays = [x["array"] for x in compile_lib.largest_temporaries(PRODUCTS, 20)]
  assert "s8[5,8,16]" in arrays
  assert "bf16[8,16]" not in arrays  # Returned.


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


@pytest.fixture(scope="module")
def step(tpu):
  """A whole training step for a mesh of four: the compiled program, its report, what was shown."""
  with jax.numpy_dtype_promotion("standard"):
    lines = []
    compiled, report = compile_lib.compile_step(small("eco_sr"), tpu, lines.append)
  return compiled, report, lines


def test_a_step_compiles_for_tpus_and_weights_cross_the_wire_as_codes(step):
  _, report, lines = step
  assert lines[:2] == ["tracing", "compiling for 4 × TPU v5 lite"]
  quantized = report["quantized_parameters"]
  assert quantized == 3 * (4 * 512**2 + 3 * 512 * 1024)
  gathers = report["collectives_per_device"]["all-gather"]
  # A layer's codes are gathered for the forward pass and again for the backward pass.
  assert gathers["f8e4m3fn"]["bytes"] == 2 * quantized
  # Embedding and head are gathered in bfloat16, and the scale of each channel in float32.
  assert gathers["bf16"]["bytes"] <= 2 * 2 * 256 * 512 * 1.3
  assert gathers["f32"]["bytes"] == 2 * 4 * 3 * (4 * 512 + 2 * 1024 + 512)
  # Gradients of kernels end where their moments are.
  assert report["collectives_per_device"]["reduce-scatter"]["f32"]["bytes"] >= 4 * quantized

  used = report["bytes_per_device"]
  assert used["codes"] == quantized // 4
  assert used["moments"] == 8 * quantized // 4
  assert 9 < report["bytes_per_quantized_parameter"]["total"] < 9.02
  assert report["fits"]
  # Each device multiplies the codes of all kernels by its tokens, forward and once more.
  flops = report["product_flops_per_device"]
  forward = 2 * 128 * quantized
  down = 2 * 128 * 3 * 512 * 1024  # Nobody needs what `down` gives a second time.
  assert flops["f8e4m3fn × f8e4m3fn"] in (2 * forward, 2 * forward - down)
  # Nothing multiplies float32; the gradients of inputs and weights are two products each.
  assert "f32 × f32" not in flops
  head = 2 * 128 * 256 * 512
  logits = 4 * 2 * 128 * 128 * 128  # Of four heads of 128 channels, in one of a layer's products.
  assert flops["bf16 × bf16"] >= 2 * forward + 3 * head + 3 * 6 * logits

  text = compile_lib.report_text(report)
  assert "fits" in text
  assert "products f8e4m3fn" in text
  assert "large temporary" in text
  assert "all-gather f8e4m3fn" in text


def test_a_released_step_sums_each_gradient_once_in_bfloat16(tpu):
  config = small("eco_sr")
  config.release, config.optimizer.clip, config.model.layers = True, "layer", 2
  config.batch_size, config.accumulation = 16, 4
  _, report = compile_lib.compile_step(config, tpu)
  found, quantized = report["collectives_per_device"], report["quantized_parameters"]
  # Kernels of both layers, forward and back, whatever the number of micro-batches.
  assert found["all-gather"]["f8e4m3fn"] == {"count": 2 * 2 * 7, "bytes": 2 * quantized}
  # One sum of their gradients, of the embedding's and of the head's.
  sums = collections.Counter()
  for kind in ("reduce-scatter", "all-reduce"):
    sums.update({dtype: entry["bytes"] for dtype, entry in found.get(kind, {}).items()})
  wanted = 2 * (quantized + 2 * 256 * 512)
  assert wanted <= sums["bf16"] <= 1.1 * wanted
  assert sums["f32"] + sums["s32"] < 0.01 * wanted  # Norms, and largest proposals of channels.


def products(text):
  """Of each matrix product of a program: its operands' dtypes, and the name that it was given."""
  found = []
  for lines in compile_lib._computations(text).values():
    dtypes = dict(re.findall(r"%([\w.\-]+) = ([a-z]\w*)\[", "\n".join(lines)))
    for line in lines:
      if operands := re.search(r" convolution\(%([\w.\-]+), %([\w.\-]+)\)", line):
        name = re.search(r'op_name="([^"]*)"', line)
        found.append((tuple(dtypes[x] for x in operands.groups()), name[1]))
  return found


def test_products_of_the_forward_pass_are_of_codes_and_those_of_the_backward_pass_are_not(step):
  compiled, _, _ = step
  layer = [
    (dtypes, name)
    for dtypes, name in products(compiled.as_text())
    if "/while/" in name and "bgrlm" not in name and "blv" not in name
  ]
  codes = ("f8e4m3fn", "f8e4m3fn")
  # Query, key, value, out, gate, up and down: once forward, and once made again for the backward.
  forward = [dtypes for dtypes, name in layer if "transpose" not in name]
  again = [dtypes for dtypes, name in layer if "rematted" in name]
  backward = [dtypes for dtypes, name in layer if "transpose" in name and "rematted" not in name]
  assert forward == [codes] * 7
  # Nobody needs what `down` gives, and the compiler may find the same of others.
  assert len(again) in (6, 7)
  assert set(again) == {codes}
  assert len(backward) >= 14
  assert set(backward) == {("bf16", "bf16")}


@pytest.mark.parametrize(("topology", "has_units"), [("v6e:2x2", False), ("tpu7x:2x2x1", True)])
def test_products_of_codes_take_float8_units_where_there_are_some(tpu, topology, has_units):
  """By the compiler's own estimate: about half the cycles of bfloat16 on TPU7x.

  The programs of v5e, v5p and v6e have the same product of codes. Without units for it each tile is
  widened on its way from memory: half the bytes are read, and the cycles are those of bfloat16.
  """
  try:
    device = compile_lib.topology_devices(topology)[0]
  except ValueError:
    pytest.skip(f"this libtpu knows no {topology}")
  put = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
  )
  x, w = (jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16) for n in (1024, 4096))
  packed = jax.eval_shape(lambda w: eco.quantize(w, eco.FP8), w)

  def cycles(kernel, format, dtypes):
    program = jax.jit(lambda x, w: eco.matmul(x, w, format)).lower(put(x), put(kernel)).compile()
    text = program.as_text()
    assert [found for found, _ in products(text)] == [dtypes]
    for name, lines in compile_lib._computations(text).items():
      if any(" convolution(" in line for line in lines):
        fused = re.search(rf'calls=%{re.escape(name)},.*"estimated_cycles":"(\d+)"', text)
        return int(fused[1])

  share = cycles(packed, eco.FP8_TOKEN, ("f8e4m3fn",) * 2) / cycles(w, None, ("bf16",) * 2)
  assert share < 0.65 if has_units else share > 0.9


def test_float_arrays_are_of_one_layer_or_of_the_parts_that_devices_own(step):
  compiled, report, _ = step
  arrays = {
    (dtype, tuple(int(n) for n in shape.split(",")))
    for dtype, shape in re.findall(r"\b(f32|bf16)\[([\d,]+)\]", compiled.as_text())
  }
  kernels = {(512, 512), (512, 1024), (1024, 512)}
  lead = lambda shape: math.prod(shape[:-2])
  whole = {(dtype, shape) for dtype, shape in arrays if shape[-2:] in kernels}
  # The backward pass dequantizes whole kernels, and never those of two layers.
  assert {shape[-2:] for dtype, shape in whole if dtype == "bf16"} == kernels
  assert max(lead(shape) for _, shape in whole) == 1
  # Of all layers there are moments and gradients, in the quarters that devices own: nothing is
  # larger than one layer's largest kernel.
  assert ("f32", (3, 256, 512)) in arrays
  assert max(math.prod(shape) for _, shape in arrays) == 512 * 1024
  # Gradients are in bfloat16: what is not state is less than one float32 copy of a device's part.
  assert report["bytes_per_device"]["temporaries"] < 4 * report["quantized_parameters"] // 4


def test_every_kernel_takes_the_fused_step(step):
  compiled, _, _ = step
  calls = re.findall(
    r'op_name="([^"]*)".*tpu_custom_call|tpu_custom_call.*op_name="([^"]*)"', compiled.as_text()
  )
  # Each device has whole output channels, and finds their scales without a first pass.
  assert len(calls) == 7


def test_all_of_the_state_is_donated(step):
  compiled, report, _ = step
  state, batch = compiled.args_info[0]
  assert all(x.donated for x in jax.tree.leaves(state))
  assert not any(x.donated for x in jax.tree.leaves(batch))
  # Every array of the new state is in the memory of the old one.
  header = compiled.as_text().splitlines()[0]
  pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, (?:may|must)-alias\)", header)
  assert sorted((int(new), int(old)) for new, old in pairs) == [
    (i, i) for i in range(len(jax.tree.leaves(state)))
  ]
  used = report["bytes_per_device"]
  # Arrays begin at multiples of some bytes, and the tokens are no state.
  assert used["state"] <= used["updated in place"] < used["arguments"]
  assert used["arguments"] - used["updated in place"] <= 4096
  assert used["outputs"] - used["updated in place"] <= 8192


@pytest.mark.parametrize(
  ("topology", "count", "release"),
  [
    *(
      (*where, release)
      for where in (("v5e:2x2", 1), ("h100:1", 1), ("h100:4", 4))
      for release in (False, True)
    ),
    ("v5e:2x2", 4, True),  # An ordinary step of so many has a test of its own.
  ],
)
def test_no_stack_is_copied(tpu, topology, count, release):
  try:
    devices = compile_lib.topology_devices(topology)
  except ImportError as error:
    pytest.skip(str(error))
  config = small("eco_sr")
  config.update({"release": release, "nonfinite": "skip"})
  config.model.update(width=128, heads=2, mlp_width=256)
  config.length = 64  # A device's activations are smaller than its part of a stack.
  with jax.numpy_dtype_promotion("standard"):
    compiled, _ = compile_lib.compile_step(config, devices[:count])
  assert not stacks_copied(compiled, 3 * 128**2 // count)
  if release:  # Kernels change a layer of codes and moments where it lies.
    stacks = re.findall(r"= (\w+\[3,[\d,]+\])\S* dynamic-update-slice\(", compiled.as_text())
    assert max(map(elements, stacks)) < 3 * 128**2 // count
    assert stacks


def elements(array):
  """How many a shape in a program's text has; activations, which are bfloat16, count as none."""
  if array.startswith("bf16"):
    return 0
  return math.prod(map(int, re.findall(r"\d+", array.partition("[")[2])))


def test_several_devices_copy_no_stack(step):
  compiled, _, _ = step
  assert not stacks_copied(compiled, 3 * 512**2 // 4)


def stacks_copied(compiled, smallest):
  """Copies of so many elements as a device has of the smallest stack of kernels."""
  elements = lambda array: math.prod(map(int, re.findall(r"\d+", array.partition("[")[2])))
  return [x for x in compile_lib.copies(compiled.as_text()) if elements(x.array) >= smallest]


@pytest.mark.parametrize("topology", ["v5e:2x2", "h100:1"])
def test_leaves_of_one_kind_are_one_program(tpu, topology):
  """All that tells their steps apart are numbers that kernels are given."""
  try:
    device = compile_lib.topology_devices(topology)[0]
  except ImportError as error:
    pytest.skip(str(error))
  layer = {"kernel": jnp.ones((256, 256)), "bias": jnp.ones(256)}
  params = eco.quantize({f"layer_{i}": layer for i in range(4)}, eco.FP8)
  tx = eco.low_bit_moments(eco.adamw(1e-3))
  grads = eco.dequantize(params)
  arguments = compile_lib.on_device(device, (grads, tx.init(params), params))
  with compile_lib.abstractly(device):
    text = jax.jit(tx.update).lower(*arguments).compile().as_text()
  assert "custom-call" in text
  # Keys of random bits, which depend on a leaf's path, are made in the kernels.
  assert " xor(" not in text
  if device.platform == "gpu":
    kernels = re.findall(r'custom_call_target="__gpu\$xla.gpu.triton".*?backend_config=(.*)', text)
    assert (len(kernels), len(set(kernels))) == (8, 2)


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


def test_products_on_gpus_are_left_to_cublas_unless_flags_say_otherwise(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  assert step_lib._compiler_options("gpu") == {"xla_gpu_enable_triton_gemm": False}
  assert step_lib._compiler_options("cpu") == step_lib._compiler_options("tpu") == {}
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
  assert step_lib._compiler_options("gpu") == {}
