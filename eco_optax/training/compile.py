"""Compiles a run's step ahead of time for chips that are absent, and reads the compiled program."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.experimental.compilation_cache import compilation_cache

from eco_optax.training import config as config_lib
from eco_optax.training import hardware, loop, memory, methods, metrics, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.models import transformer

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Topology(NamedTuple):
  """Chips for a run, and the axes of their mesh that a config leaves to the machine."""

  name: str  # See `topology_devices`.
  mesh: dict[str, int]


# A topology that suits each run of the paper.
TOPOLOGIES = {
  "llama_30m": Topology("v5e:2x2", {"fsdp": 4}),
  "llama_50m": Topology("v5e:2x2", {"fsdp": 4}),
  "llama_100m": Topology("v5e:2x4", {"fsdp": 4}),
  "llama_200m": Topology("v5e:4x4", {"fsdp": 4}),
  "llama_430m": Topology("v5e:4x4", {"fsdp": 4}),
  "llama_800m": Topology("v5p:2x2x4", {"fsdp": 4}),
  "gemma3_1b": Topology("v6e:4x4", {"fsdp": 8}),
  "smoe_2b": Topology("v5p:2x2x4", {"expert": 4}),
  "deepseek_moe_16b": Topology("v5p:2x2x4", {"expert": 8}),
}

_BITS = {"pred": 8, "bf16": 16}  # Of dtypes whose name does not end in their bits.


# Properties of an H100 SXM that XLA's GPU compiler needs, from its data sheet and CUDA. For
# another GPU read cudaGetDeviceProperties on one.
_H100 = """
  platform_name: "CUDA"
  device_description_str: "NVIDIA H100 80GB HBM3"
  runtime_version { major: 12 minor: 9 }
  dnn_version_info { major: 9 minor: 8 }
  gpu_device_info {
    cuda_compute_capability { major: 9 }
    core_count: 132
    fpus_per_core: 128
    clock_rate_ghz: 1.98
    memory_bandwidth: 3352000000000
    device_memory_size: 85000000000
    l2_cache_size: 52428800
    registers_per_core_limit: 65536
    registers_per_block_limit: 65536
    shared_memory_per_core: 233472
    shared_memory_per_block: 49152
    shared_memory_per_block_optin: 232448
    threads_per_warp: 32
    threads_per_core_limit: 2048
    threads_per_block_limit: 1024
    block_dim_limit_x: 2147483647
    block_dim_limit_y: 65535
    block_dim_limit_z: 65535
  }
"""


def _gpus(count: str) -> list[Any]:
  from jax.experimental import topologies

  try:
    return list(
      topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=_H100, topology=f"1x1x{count}"
      ).devices
    )
  except NotImplementedError as error:
    raise ImportError(
      "compiling for a GPU takes JAX's CUDA plugin: pip install 'eco_optax[cuda]', which works"
      " without one"
    ) from error


def on_device(device: Any, tree: Any) -> Any:
  """Shapes placed on a device, which may be absent."""
  place = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def abstractly(device: Any) -> Any:
  """A context that lowers programs for a kind of device, which may be absent."""
  abstract = jax.sharding.AbstractDevice(
    device_kind=device.device_kind,
    num_cores=getattr(device, "core_count", None),
    platform=device.platform,
  )
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract))


def topology_devices(topology: str) -> list[Any]:
  """The devices of a topology such as `v5e:4x4` or `h100:1`; all may be absent.

  Raises:
    ImportError: if the compiler, in `libtpu` or JAX's CUDA plugin, is not installed.
    ValueError: naming an unknown topology.
  """
  from jax.experimental import topologies

  kind, _, size = topology.partition(":")
  if kind == "h100":
    if not size.isdigit():
      raise ValueError(f"no GPU topology {topology!r}: use h100:1 or another number of GPUs")
    return _gpus(size)
  try:
    import libtpu  # noqa: F401
  except ImportError as error:
    raise ImportError(
      "compiling for a TPU takes libtpu: pip install 'eco_optax[tpu]', which works on any Linux"
    ) from error
  options = {"chip_config_name": "megacore"} if kind == "v4" else {}
  try:
    return list(
      topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    )
  except Exception as error:
    raise ValueError(
      f"no TPU topology {topology!r}: use v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1 or"
      f" another size ({error})"
    ) from error


def _shapes(text: str) -> Iterator[tuple[str, int]]:
  """Dtype and bytes of each array in a piece of HLO."""
  for dtype, dims in re.findall(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]", text):
    bits = _BITS.get(dtype) or int(re.match(r"[a-z](\d+)", dtype)[1])  # type: ignore[index]
    yield dtype, math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _computations(text: str) -> dict[str, list[str]]:
  """Instructions of each computation of a compiled module by its name; the entry's is ENTRY."""
  found: dict[str, list[str]] = {}
  name = None
  for line in text.splitlines():
    if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
      name = "ENTRY" if match[1] else match[2]
      found[name] = []
    elif name is not None and " = " in line:
      found[name].append(line)
  return found


class _Instruction(NamedTuple):
  """An instruction of a compiled module, how often it runs, and the types around it as text."""

  line: str
  operation: str
  result: str
  operands: list[str]
  computation: str
  times: int
  is_fused: bool  # Its result is no array in memory, unless it is the root of its fusion.


def _types(lines: list[str]) -> dict[str, str]:
  """Types of a computation's results by name, with their layouts."""
  found = {}
  for line in lines:
    if match := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*)", line):
      right = match[2]
      found[match[1]] = right.split(") ", 1)[0] if right[0] == "(" else right.split(" ", 1)[0]
  return found


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
  """How often a loop runs: as the compiler says, or the constant its counter is compared with."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
    return int(known[1])
  bounds = [1]
  for inner in computations[re.search(r"condition=%([\w.\-]+)", line)[1]]:  # type: ignore[index]
    bounds += [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", inner)]
  return max(bounds)


def _instructions(text: str) -> Iterator[_Instruction]:
  """The instructions of one run of a compiled module; of a condition's branches, all of them."""
  computations = _computations(text)
  types = {name: _types(lines) for name, lines in computations.items()}

  def visit(name: str, times: int, is_fused: bool) -> Iterator[_Instruction]:
    for line in computations.get(name, []):
      right = line.split(" = ", 1)[1]
      match = re.search(r"(?:^|\s)([a-z][a-z\-]*)\(", right)
      operation = match[1] if match else ""
      result, _, arguments = right.partition(operation + "(")
      operands = [types[name][x] for x in _names(arguments) if x in types[name]]
      yield _Instruction(line, operation, result, operands, name, times, is_fused)
      inner = times * (_trip_count(line, computations) if operation == "while" else 1)
      called = r"(?:body|calls|called_computations|branch_computations)=(\{[^}]*\}|%[\w.\-]+)"
      for group in re.findall(called, line):
        for reference in re.findall(r"%([\w.\-]+)", group):
          yield from visit(reference, inner, is_fused or operation == "fusion")

  return visit("ENTRY", 1, False)


def _names(arguments: str) -> list[str]:
  """Names of an instruction's operands, from what follows its opening bracket."""
  depth, end = 1, 0
  for end, letter in enumerate(arguments):  # noqa: B007
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      break
  return re.findall(r"%([\w.\-]+)", arguments[:end])


def collectives(text: str) -> dict[str, dict[str, dict[str, int]]]:
  """Counts the collectives in one run of a compiled module.

  Args:
    text: the module's HLO.

  Returns:
    By operation and dtype, how often it runs on one device and the bytes of its larger side (the
    gathered or the summed array), with loops multiplied by their trip counts.
  """
  found: dict[str, dict[str, dict[str, int]]] = {}
  seen: set[str] = set()
  for instruction in _instructions(text):
    kind = instruction.operation.removesuffix("-start")
    if kind not in _COLLECTIVES:
      continue
    # The stages of one overlapped operation are fusions that each hold it, on one channel.
    if stage := re.search(r"channel_id=(\d+).*chain_id=", instruction.line):
      if stage[1] in seen:
        continue
      seen.add(stage[1])
    sides = [list(_shapes(side)) for side in (instruction.result, " ".join(instruction.operands))]
    if instruction.operation.endswith("-start") and len(sides[0]) > len(sides[1]):
      for operand in sides[1]:  # A start's result holds its operands too.
        if operand in sides[0]:
          sides[0].remove(operand)
    larger = max(sides, key=lambda side: sum(size for _, size in side))
    # TPUs scatter sums by a fusion of this name.
    is_scatter = instruction.computation.startswith("all-reduce-scatter")
    shown = "reduce-scatter" if is_scatter else kind
    for dtype in {dtype for dtype, _ in larger}:
      entry = found.setdefault(shown, {}).setdefault(dtype, {"count": 0, "bytes": 0})
      entry["count"] += instruction.times
      size = sum(size for other, size in larger if other == dtype)
      entry["bytes"] += instruction.times * size
  return {kind: dict(sorted(found[kind].items())) for kind in sorted(found)}


def _arrays(text: str) -> list[tuple[str, list[int]]]:
  """Dtype and shape of each array in a piece of HLO."""
  found = re.findall(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]", text)
  return [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in found]


def _contracted(line: str, operands: list[tuple[str, list[int]]]) -> int:
  """The number of products in each element of a product's result."""
  (_, left), (_, right) = operands[:2]
  if labels := re.search(r"dim_labels=\w+_(\w+)->", line):
    # A convolution: inputs times the window, but for axes that are dilated, which are of a batch.
    size = re.search(r"size=([\dx]+)", line)
    dilated = re.search(r"lhs_dilate=([\dx]+)", line)
    sizes = [int(n) for n in size[1].split("x")] if size else []
    dilations = [int(n) for n in dilated[1].split("x")] if dilated else [1] * len(sizes)
    window = [n for n, dilation in zip(sizes, dilations, strict=True) if dilation == 1]
    return right[labels[1].index("i")] * math.prod(window)
  axes = re.search(r'lhs_contracting_(?:dims=\{|dimensions":\[)([\d,"]*)', line)
  return math.prod(left[int(n)] for n in axes[1].replace('"', "").split(",") if n) if axes else 1


def products(text: str) -> dict[str, float]:
  """Operations of matrix products in one run of a compiled module, by the dtypes of their factors.

  Two for each multiplication and addition, with loops multiplied by their trip counts. cuDNN's
  attention counts the logits that a causal mask or a window leaves. Kernels of Pallas are not seen.

  Args:
    text: the module's HLO.

  Returns:
    Operations on one device by a pair such as `bf16 × bf16`, the most first.
  """
  found: dict[str, float] = {}
  for line, operation, result, operands, _, times, _ in _instructions(text):
    target = re.search(r'custom_call_target="([^"]*)"', line)
    factors = _arrays(" ".join(operands))
    if target and "fmha" in target[1]:
      (dtype, (B, L, H, K)), (_, (_, M, *_)) = factors[:2]
      window = re.search(r'"sliding_window_length": ?(\d+)', line)
      seen = M / 2 if '"CAUSAL"' in line else M
      seen = min(seen, int(window[1])) if window and int(window[1]) else seen
      amount = (10 if "Backward" in target[1] else 4) * B * L * H * K * seen
      pair = (dtype, dtype)
    elif operation in ("dot", "convolution") or (target and "cublas" in target[1]):
      amount = 2 * math.prod(_arrays(result)[0][1]) * _contracted(line, factors)
      pair = (factors[0][0], factors[1][0])
      if algorithm := re.search(r"algorithm=dot_([a-z0-9]+)_([a-z0-9]+)_f32", line):
        pair = (algorithm[1], algorithm[2])
    else:
      continue
    name = " × ".join(pair)
    found[name] = found.get(name, 0.0) + times * amount
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def _root(lines: list[str]) -> str:
  """The last operation of a computation, behind changes of dtype and shape alone."""
  found, root = {}, ""
  for line in lines:
    if match := re.match(r"\s*(ROOT )?%([\w.\-]+) = (.*)", line):
      right = match[3].split(") " if match[3][0] == "(" else " ", 1)[1]
      operation, _, arguments = right.partition("(")
      found[match[2]] = operation, _names(arguments)
      root = match[2] if match[1] else root
  operation, operands = found[root]
  while operation in ("bitcast", "convert", "reshape") and operands[0] in found:
    operation, operands = found[operands[0]]
  return operation


def _made(text: str) -> Iterator[tuple[_Instruction, str]]:
  """Instructions whose results are new arrays in memory, and the operation that makes them."""
  computations = _computations(text)
  none = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "conditional")
  for instruction in _instructions(text):
    operation = instruction.operation
    if instruction.is_fused or operation in none or operation.endswith("-done"):
      continue
    if operation == "fusion":
      called = re.search(r"calls=%([\w.\-]+)", instruction.line)
      operation = _root(computations[called[1]])  # type: ignore[index]
    yield instruction, operation


class Copy(NamedTuple):
  """An array that a compiled module writes to move numbers and no more, on one device."""

  array: str  # Such as f32[16,8].
  bytes: int  # Each time.
  times: int  # In one run of the module.


def copies(text: str) -> list[Copy]:
  """Copies and transposes, also where they change the dtype, in a compiled module.

  What a TPU moves between its memories is none of them.

  Args:
    text: the module's HLO.
  """
  found = []
  for instruction, operation in _made(text):
    between = any("S(" in x for x in (instruction.result, *instruction.operands))
    if operation in ("copy", "copy-start", "transpose") and not between:
      sizes = [size for _, size in _shapes(instruction.result)]
      arrays = [
        f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in _arrays(instruction.result)
      ]
      made = list(zip(arrays, sizes, strict=True))
      # What a copy that is only started tells of besides is its operand.
      made = made[:1] if operation == "copy-start" else made
      found += [Copy(array, size, instruction.times) for array, size in made]
  return found


def bytes_copied(text: str) -> int:
  """Bytes that one run of a compiled module writes in `copies`.

  Args:
    text: the module's HLO.
  """
  return sum(copy.bytes * copy.times for copy in copies(text))


def _table(text: str, name: str) -> dict[str, str]:
  """A module's table of this name, such as its stack frames: entries by their numbers."""
  section = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.M)
  return dict(line.split(" ", 1) for line in section[1].splitlines()) if section else {}


def _sources(text: str) -> dict[str, str]:
  """File and line of each stack frame: of this package's own code, where it calls others."""
  files, places = _table(text, "FileNames"), _table(text, "FileLocations")
  number = lambda name, entry: re.search(rf"{name}=(\d+)", entry)[1]  # type: ignore[index]
  frames = {
    frame: (number("file_location_id", entry), str(int(number("parent_frame_id", entry)) - 1))
    for frame, entry in _table(text, "StackFrames").items()
  }

  def describe(frame: str) -> str:
    found = []
    while frame in frames:
      place, frame = frames[frame]
      file = files[number("file_name_id", places[place])].strip('"')
      found.append(f"{file}:{number(' line', places[place])}")
    own = [line for line in found if "eco_optax/" in line]
    return f"eco_optax/{own[0].rpartition('eco_optax/')[2]}" if own else next(iter(found), "")

  return {frame: describe(frame) for frame in frames}


def _returned(entry: list[str]) -> set[str]:
  """Names of the results that a module returns, `name/index` for those of several."""
  element = r"\s*%([\w.\-]+) = .* get-tuple-element\(%([\w.\-]+)\), index=(\d+)"
  parts = {match[1]: f"{match[2]}/{match[3]}" for x in entry if (match := re.match(element, x))}
  root = next(line for line in entry if line.lstrip().startswith("ROOT"))
  tuple_of = re.search(r" tuple\((.*)", root)
  names = _names(tuple_of[1]) if tuple_of else re.findall(r"ROOT %([\w.\-]+) =", root)
  return {parts.get(name, name) for name in names}


def largest_temporaries(text: str, count: int = 5) -> list[dict[str, Any]]:
  """The largest arrays that one run of a compiled module makes and does not return.

  Args:
    text: the module's HLO.
    count: how many, those of one shape and source together.

  Returns:
    Each one's bytes on one device, dtype and shape, and line of source, the largest first.
  """
  sources = _sources(text)
  returned = _returned(_computations(text)["ENTRY"])
  found: dict[tuple[str, str], int] = {}
  for instruction, operation in _made(text):
    if operation == "dynamic-update-slice" or "output_to_operand_aliasing" in instruction.line:
      continue  # In place.
    name = re.match(r"\s*(?:ROOT )?%([\w.\-]+) =", instruction.line)[1]  # type: ignore[index]
    frame = re.search(r"stack_frame_id=(\d+)", instruction.line)
    source = sources.get(frame[1], "") if frame else ""
    arrays = zip(_shapes(instruction.result), _arrays(instruction.result), strict=True)
    for index, ((_, size), (dtype, shape)) in enumerate(arrays):
      if instruction.computation == "ENTRY" and {name, f"{name}/{index}"} & returned:
        continue  # In the memory of a donated argument.
      found[f"{dtype}[{','.join(map(str, shape))}]", source] = size
  largest = sorted(found.items(), key=lambda item: -item[1])[:count]
  return [{"bytes": size, "array": array, "source": source} for (array, source), size in largest]


class _Heartbeat:
  """Shows every ten seconds that a long compilation is still going on."""

  def __init__(self, what: str, show: Callable[[str], None], seconds: float = 10.0):
    self._stop = threading.Event()
    started = time.perf_counter()

    def beat() -> None:
      while not self._stop.wait(seconds):
        show(f"{what} … {metrics.clock(time.perf_counter() - started)}")

    self._thread = threading.Thread(target=beat, daemon=True)

  def __enter__(self) -> None:
    self._thread.start()

  def __exit__(self, *_: Any) -> None:
    self._stop.set()
    self._thread.join()


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Compiles anew: what a cache has for devices that are not there cannot be loaded."""
  name = "jax_enable_compilation_cache"
  before = getattr(jax.config, name)
  jax.config.update(name, False)
  compilation_cache.reset_cache()  # JAX asks once whether there is one.
  try:
    yield
  finally:
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def compile_step(
  config: ml_collections.ConfigDict,
  devices: list[Any],
  show: Callable[[str], None] = lambda text: None,
) -> tuple[Any, dict[str, Any]]:
  """Compiles one training step of a config for devices that need not exist.

  Args:
    config: of the run.
    devices: of a topology, see `topology_devices`, or of this machine.
    show: called with lines of progress.

  Returns:
    The compiled step, and a report: bytes per device by kind, collectives by dtype, operations, and
    whether it fits the chip.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh.to_dict(), devices)
  loop.check_batch(config, mesh)
  tx = methods.optimizer(config)
  show("tracing")
  started = time.perf_counter()
  state = step_lib.abstract_state(config, tx, mesh)
  train_step = step_lib.make_train_step(config, tx, mesh)
  with jax.set_mesh(mesh):
    lowered = train_step.lower(state, step_lib.abstract_batch(config, mesh))
  traced = time.perf_counter()
  show(f"compiling for {len(devices)} × {devices[0].device_kind}")
  with _Heartbeat("compiling", show), without_cache():
    compiled = lowered.compile()
  finished = time.perf_counter()

  used = compiled.memory_analysis()
  peak = (
    used.argument_size_in_bytes
    + used.output_size_in_bytes
    + used.temp_size_in_bytes
    - used.alias_size_in_bytes
  )
  model = config_lib.model(config)
  chip = hardware.chip(devices[0].device_kind)
  where = transformer.is_quantized(model)
  tokens = config.batch_size * config.length
  cost = compiled.cost_analysis() or {}
  static = memory.per_parameter(state, where)
  text = compiled.as_text()
  report = {
    "method": config.method,
    "parameters": transformer.count_params(model, embedding=True),
    "quantized_parameters": sum(memory.quantized(state.params).values()),
    "devices": len(devices),
    "chip": chip.name if chip else devices[0].device_kind,
    "mesh": dict(mesh.shape),
    "bytes_per_quantized_parameter": static._asdict() | {"total": static.total},
    "bytes_per_device": {
      **memory.per_device(state),
      "state": sum(memory.per_device(state).values()),
      "arguments": used.argument_size_in_bytes,
      "outputs": used.output_size_in_bytes,
      "updated in place": used.alias_size_in_bytes,
      "temporaries": used.temp_size_in_bytes,
      "peak": peak,
    },
    "fits": None if chip is None else peak <= chip.bytes,
    "chip_bytes": None if chip is None else chip.bytes,
    "collectives_per_device": collectives(text),
    "product_flops_per_device": products(text),
    "bytes_copied_per_device": bytes_copied(text),
    "largest_temporaries": largest_temporaries(text),
    "model_flops_per_step": transformer.flops_per_token(model, config.length) * tokens,
    # The compiler counts the body of a loop once.
    "compiler_flops_per_device": cost.get("flops"),
    "seconds": {"trace": traced - started, "compile": finished - traced},
  }
  return compiled, report


def report_text(report: dict[str, Any]) -> str:
  """A report as a person reads it."""
  mib = lambda n: f"{n / 2**20:,.1f} MiB"
  axes = " × ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1)
  rows = [
    ("method", report["method"]),
    ("parameters", f"{report['parameters']:,}, {report['quantized_parameters']:,} quantized"),
    ("devices", f"{report['devices']} × {report['chip']}, {axes or 'one device'}"),
    (
      "static bytes per quantized parameter",
      f"{report['bytes_per_quantized_parameter']['total']:.3f}",
    ),
    *((f"{kind} per device", mib(n)) for kind, n in report["bytes_per_device"].items() if n),
  ]
  if report["fits"] is not None:
    verdict = "yes" if report["fits"] else "NO"
    rows.append(("fits", f"{verdict}, the chip has {mib(report['chip_bytes'])}"))
  for kind, dtypes in report["collectives_per_device"].items():
    for dtype, entry in dtypes.items():
      rows.append((f"{kind} {dtype}", f"{entry['count']} × , {mib(entry['bytes'])}"))
  flops = report["product_flops_per_device"]
  for pair, amount in flops.items():
    share = amount / max(1.0, sum(flops.values()))
    rows.append((f"products {pair} per device", f"{amount:.3e}, {share:.1%}"))
  rows.append(("copied and transposed per device", mib(report["bytes_copied_per_device"])))
  for entry in report["largest_temporaries"]:
    where = f"{entry['array']} {entry['source']}"
    rows.append(("large temporary per device", f"{mib(entry['bytes'])}, {where}"))
  rows.append(("model operations per step", f"{report['model_flops_per_step']:.3e}"))
  seconds = report["seconds"]
  rows.append(
    ("compile time", f"{seconds['trace']:.0f} s traced, {seconds['compile']:.0f} s compiled")
  )
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def table(reports: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> str:
  """Reports of ECO and of master weights by config, as a Markdown table."""
  lines = [
    "| config | parameters | devices | bytes per quantized parameter | state per device"
    " | peak per device | peak against master weights | fits |",
    "|---|---|---|---|---|---|---|---|",
  ]
  gib = lambda n: f"{n / 2**30:.2f}"
  for name, pair in reports.items():
    eco, master = (report["bytes_per_device"] for report in pair)
    static = [report["bytes_per_quantized_parameter"]["total"] for report in pair]
    first = pair[0]
    fits = ["yes" if report["fits"] else "no" for report in pair]
    lines.append(
      f"| {name} | {first['parameters']:,} | {first['devices']} × {first['chip']}"
      f" | {static[0]:.2f} / {static[1]:.2f} | {gib(eco['state'])} / {gib(master['state'])} GiB"
      f" | {gib(eco['peak'])} / {gib(master['peak'])} GiB | {eco['peak'] / master['peak']:.2f}×"
      f" | {' / '.join(fits)} |"
    )
  return "\n".join(lines) + "\n"
