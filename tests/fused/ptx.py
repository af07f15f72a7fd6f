"""Runs the PTX of a kernel without a GPU: the threads of a block in step, as NumPy arrays.

It knows the instructions of the fused updates and asks that branches be taken by all threads, but
for those of inline assembly, which only skip what changes nothing. What is approximate on a GPU,
square roots, reciprocals and some divisions, is exact here.
"""

import itertools
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

_SHARED = 2**18  # Bytes that a block shares.
_ADDRESSED = {"global": 0, "shared": 1}

_TYPES = {
  f"{kind}{8 * size}": np.dtype(f"{name}{size}")
  for kind, name in (("u", "u"), ("s", "i"), ("b", "u"), ("f", "f"))
  for size in (1, 2, 4, 8)
  if (kind, size) != ("f", 1)
} | {"bf16": np.dtype(ml_dtypes.bfloat16), "pred": np.dtype(bool), "f16": np.dtype(np.float16)}

_WIDTHS = {"%rs": 16, "%rd": 64, "%r": 32}

_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_ORDERED |= {"ge": np.greater_equal, "num": lambda x, y: (x == x) & (y == y)}
_COMPARED = _ORDERED | {"ne": np.not_equal, "neu": np.not_equal}
_COMPARED["nan"] = lambda x, y: (x != x) | (y != y)

_COMPUTED = {
  "add": np.add,
  "sub": np.subtract,
  "mul": np.multiply,
  "div": np.divide,
  "and": np.bitwise_and,
  "or": np.bitwise_or,
  "xor": np.bitwise_xor,
  "min": np.fmin,
  "max": np.fmax,
  "abs": np.abs,
  "neg": np.negative,
  "sqrt": np.sqrt,
  "rcp": np.reciprocal,
  "copysign": lambda sign, x: np.copysign(x, sign),
}


class Kernel(NamedTuple):
  """What there is to run."""

  parameters: list[str]
  threads: int
  instructions: list[tuple[str, str, list[str]]]  # Guard, name and operands.
  labels: dict[str, int]


def parse(text, name):
  """The kernel of a name."""
  text = text[text.index(f".entry {name}(") :]
  head, _, body = text.partition("\n{")
  # Labels of inline assembly are its own.
  for pattern in (r"\bbra NORMAL\b", r"\bNORMAL:"):
    numbers = itertools.count()
    body = re.sub(pattern, lambda x, n=numbers: x[0].replace("AL", f"AL{next(n)}"), body)
  instructions, labels = [], {}
  for line in re.sub(r"//.*", "", body).split("\n"):
    for statement in line.split(";"):
      if label := re.match(r"\s*(\$\w+|NORMAL\d+):", statement):
        labels[label[1]] = len(instructions)
        statement = statement[label.end() :]
      found = re.match(r"\s*(?:\{\s)?\s*(?:@(!?%?p\d*)\s+)?([a-z][\w.]*)\s*(.*)", statement)
      if found:
        operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", found[3])
        instructions.append((found[1] or "", found[2], operands))
  return Kernel(
    re.findall(rf"({name}_param_\d+)", head),
    int(re.search(r"\.reqntid (\d+)", head)[1]),
    instructions,
    labels,
  )


class _Block:
  """A block of threads."""

  def __init__(self, kernel, memory, pointers, place):
    self.thread = np.arange(kernel.threads)
    self.warp, self.lane = self.thread & ~31, self.thread & 31
    self.memories = memory, np.zeros(_SHARED, np.uint8)
    self.registers = {"%tid.x": self.thread.astype(np.uint32), "global_smem": np.uint64(0)}
    for axis, i in zip("xyz", place, strict=True):
      self.registers[f"%ctaid.{axis}"] = np.uint32(i)
    self.parameters = dict(zip(kernel.parameters, pointers, strict=True))

  def read(self, operand, type):
    """An operand's value in each thread, as of a type."""
    dtype = _TYPES[type]
    if operand.startswith("0f"):
      value = np.uint32(int(operand[2:], 16))
    elif re.match(r"-?\d", operand):
      value = np.array(int(operand.rstrip("U"), 0)).astype(f"i{dtype.itemsize}")
    else:
      value = self.registers[operand]
    value = np.broadcast_to(value, self.thread.shape)
    if value.dtype == dtype:
      return value
    if value.dtype.kind == "f":
      value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
    return np.ascontiguousarray(value.astype(f"u{dtype.itemsize}")).view(dtype)

  def write(self, register, value, where):
    """Puts each thread's value, widened with its sign, in a register."""
    if register == "_":
      return
    if register.startswith("%p"):
      value = value.astype(bool)
    else:
      if not register.startswith("%"):  # Declared by inline assembly, and never guarded.
        self.registers[register] = np.broadcast_to(value, self.thread.shape)
        return
      width = _WIDTHS[re.match(r"%[a-z]+", register)[0]] // 8
      if value.dtype.kind in "iu":
        value = value.astype(f"{value.dtype.kind}{width}")
      value = np.ascontiguousarray(value).view(f"u{width}")
    old = self.registers.get(register, np.zeros_like(value))
    self.registers[register] = np.where(where, value, old)

  def address(self, operand):
    base, _, offset = operand.strip("[] ").partition("+")
    return self.read(base.strip(), "u64").astype(np.int64) + int(offset or 0)

  def load(self, space, address, type, where):
    memory = self.memories[_ADDRESSED[space]]
    size = _TYPES[type].itemsize
    where = np.broadcast_to(where, address.shape)
    assert np.all((address[where] >= 0) & (address[where] + size <= len(memory)))
    places = np.where(where, address, 0)[:, None] + np.arange(size)
    return memory[places].view(_TYPES[type])[:, 0]

  def store(self, space, address, value, where):
    memory = self.memories[_ADDRESSED[space]]
    size = value.dtype.itemsize
    where = np.broadcast_to(where, address.shape)
    assert np.all((address[where] >= 0) & (address[where] + size <= len(memory)))
    raw = np.ascontiguousarray(value).view(np.uint8).reshape(-1, size)
    memory[(address[:, None] + np.arange(size))[where]] = raw[where]


def _registers(operand):
  return [x.strip() for x in operand.strip("{} ").split(",")]


def _memory(block, name, operands, where):
  """Instructions that load or store."""
  kind, *rest = name.split(".")
  type = rest[-1]
  if name.startswith("ld.param"):
    pointer = block.parameters[operands[1].strip("[]")]
    block.write(operands[0], np.full(block.thread.shape, pointer, np.uint64), where)
  elif kind == "ld":
    for k, register in enumerate(_registers(operands[0])):
      address = block.address(operands[1]) + k * _TYPES[type].itemsize
      block.write(register, block.load(rest[0], address, type, where), where)
  elif kind == "st":
    for k, register in enumerate(_registers(operands[1])):
      address = block.address(operands[0]) + k * _TYPES[type].itemsize
      block.store(rest[0], address, block.read(register, type), where)
  elif kind == "ldmatrix":  # Of 8 × 8 pairs of bytes, whose rows begin where eight threads say.
    address = block.address(operands[1])
    for k, register in enumerate(_registers(operands[0])):
      own = address[block.warp + 8 * k + block.lane // 4] + block.lane % 4 * 4
      block.write(register, block.load("shared", own, "b32", where), where)
  elif kind == "stmatrix":  # The reverse.
    address = block.address(operands[0])
    for k, register in enumerate(_registers(operands[1])):
      own = address[block.warp + 8 * k + block.lane // 4] + block.lane % 4 * 4
      block.store("shared", own, block.read(register, "b32"), where)
  else:
    assert kind == "atom"
    place, value = block.address(operands[1]), block.read(operands[2], type)
    for i in np.flatnonzero(np.broadcast_to(where, place.shape)):
      old = block.load("global", place[i : i + 1], type, True)
      new = {"max": np.maximum, "min": np.minimum}[rest[-2]](old, value[i])
      block.store("global", place[i : i + 1], new.astype(old.dtype), True)


def _converted(value, name):
  *how, to, _ = name.split(".")
  if "rmi" in how:
    return np.floor(value)
  if value.dtype.kind == "f" and to[0] in "su":
    return np.trunc(np.nan_to_num(value.astype(np.float64))).astype(_TYPES[to])
  return value.astype(_TYPES[to])


def _result(block, name, operands):
  """What instructions on registers give."""
  kind, *rest = name.split(".")
  type = rest[-1]
  read = lambda k, as_type=type: block.read(operands[k], as_type)
  if kind in ("mov", "cvta"):
    if operands[1].startswith("{"):
      low, high = (block.read(x, "u16").astype(np.uint32) for x in _registers(operands[1]))
      return low | (high << 16)
    return read(1)
  if name == "cvt.rn.bf16x2.f32":
    high, low = (read(k, "f32").astype(_TYPES["bf16"]).view(np.uint16) for k in (1, 2))
    return low.astype(np.uint32) | (high.astype(np.uint32) << 16)
  if name == "cvt.rn.f16x2.e4m3x2":
    pair = np.ascontiguousarray(read(1, "b16")).view(ml_dtypes.float8_e4m3fn)
    return np.ascontiguousarray(pair.astype(np.float16)).view(np.uint32)
  if name == "cvt.rn.satfinite.e4m3x2.f32":
    top = np.float32(448)
    high, low = (np.clip(read(k, "f32"), -top, top) for k in (1, 2))
    high, low = (x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) for x in (high, low))
    return low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8))
  if kind == "cvt":
    return _converted(read(1), name)
  if kind == "setp":
    x, y = read(1), read(2)
    return _COMPARED[rest[0]](x, y)
  if kind == "selp":
    return np.where(read(3, "pred"), read(1), read(2))
  if kind == "shfl":
    other = read(2, "s32")
    source = block.lane ^ other if rest[1] == "bfly" else other & 31
    return read(1)[block.warp + source]
  if kind == "redux":
    return np.repeat(np.max(read(1).reshape(-1, 32), axis=1), 32)
  if kind == "prmt":
    both = read(1).astype(np.uint64) | (read(2).astype(np.uint64) << np.uint64(32))
    chosen = both[:, None].view(np.uint8).reshape(-1, 8)
    picks = (read(3)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    picked = np.take_along_axis(chosen, (picks & 7).astype(int), axis=1)
    signs = np.where(picked >= 128, 255, 0).astype(np.uint8)
    return np.where(picks & 8, signs, picked).astype(np.uint8).view(np.uint32)[:, 0]
  if kind == "bfe":
    start, count = (int(x) for x in operands[2:])
    bits = _TYPES[type].itemsize * 8
    value = read(1)
    shifts = (value.dtype.type(x) for x in (bits - start - count, bits - count))
    return (value << next(shifts)) >> next(shifts)
  if kind in ("shl", "shr"):
    count, value = read(2, "u32").astype(np.int64), read(1)
    assert np.all(count < 8 * value.dtype.itemsize)
    shift = np.left_shift if kind == "shl" else np.right_shift
    return shift(value, count.astype(value.dtype))
  if kind == "mul" and rest[0] in ("wide", "hi"):
    wide = "i8" if type.startswith("s") else "u8"
    product = read(1).astype(wide) * read(2).astype(wide)
    return (
      product if rest[0] == "wide" else (product >> product.dtype.type(32)).astype(read(1).dtype)
    )
  if kind == "mad":
    return read(1) * read(2) + read(3)
  if kind == "fma":  # Rounded once, but for what is too close to tell.
    return (read(1).astype(np.longdouble) * read(2) + read(3)).astype(np.float32)
  if kind == "not":
    return ~read(1)
  if name == "add.rm.f32":
    total = read(1).astype(np.float64) + read(2)
    near = total.astype(np.float32)
    return np.where(near > total, np.nextafter(near, np.float32(-np.inf)), near)
  function = _COMPUTED[kind]
  if "NaN" in rest:
    function = {"min": np.minimum, "max": np.maximum}[kind]
  return function(*(read(k) for k in range(1, len(operands))))


def run(kernel, memory, pointers, place):
  """Runs one block.

  Args:
    kernel: of `parse`.
    memory: uint8 array, changed in place.
    pointers: where in it the kernel's arrays begin.
    place: the block's, on three axes.
  """
  block = _Block(kernel, memory, pointers, place)
  i = 0
  with np.errstate(all="ignore"):
    while True:
      guard, name, operands = kernel.instructions[i]
      i += 1
      where = np.bool_(True)
      if guard:
        where = block.registers[guard.lstrip("!")] ^ guard.startswith("!")
      kind = name.partition(".")[0]
      if kind == "ret":
        return
      if kind in ("bar", "griddepcontrol"):
        continue
      if kind == "bra":
        inline = operands[0].startswith("NORMAL")
        assert inline or np.all(where) or not np.any(where)
        i = kernel.labels[operands[0]] if np.all(where) else i
      elif kind in ("ld", "st", "ldmatrix", "stmatrix", "atom"):
        _memory(block, name, operands, where)
      elif operands[0].startswith("{"):  # The halves of a register.
        for k, register in enumerate(_registers(operands[0])):
          half = block.read(operands[1], "u32") >> np.uint32(16 * k)
          block.write(register, half.astype(np.uint16), where)
      else:
        block.write(operands[0], _result(block, name, operands), where)
