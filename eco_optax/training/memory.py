"""Bytes of a run's state by kind, from live arrays or from their shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

import eco_optax as eco
from eco_optax.training.step import State

# In the order of the tables.
KINDS = ("codes", "scales", "moments", "residual", "other parameters", "other moments", "errors")


class Leaf(NamedTuple):
  """One array of the state."""

  kind: str  # One of KINDS.
  path: str
  array: Any  # Or its shape, dtype and sharding.

  @property
  def nbytes(self) -> int:
    """On all devices together, every part once."""
    return math.prod(self.array.shape) * self.array.dtype.itemsize

  @property
  def nbytes_per_device(self) -> int:
    """Of the part that one device holds."""
    sharding = self.array.sharding
    shape = self.array.shape if sharding is None else sharding.shard_shape(self.array.shape)
    return math.prod(shape) * self.array.dtype.itemsize


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_packed(leaf: Any) -> bool:
  return isinstance(leaf, eco.QuantizedArray)


def quantized(params: Any) -> dict[str, int]:
  """Number of weights of each packed leaf by path."""
  leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)[0]
  return {_name(path): leaf.size for path, leaf in leaves if _is_packed(leaf)}


def leaves(state: State) -> Iterator[Leaf]:
  """Every array of a state with its kind."""
  packed = quantized(state.params)
  for path, array in jax.tree_util.tree_flatten_with_path(state.params)[0]:
    owner, _, field = _name(path).rpartition("/")
    kind = "other parameters"
    if owner in packed:
      kind = "codes" if field == "qvalue" else "scales"
    yield Leaf(kind, _name(path), array)
  for path, array in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
    name = _name(path)
    kind = "other moments"
    if any(name.endswith("/" + owner) or f"/{owner}/" in name for owner in packed):
      kind = "residual" if "residual/" in name else "moments"
    yield Leaf(kind, name, array)
  yield Leaf("other moments", "skipped", state.skipped)
  for path, array in jax.tree_util.tree_flatten_with_path(getattr(state, "wire", ()))[0]:
    yield Leaf("errors", f"wire/{_name(path)}", array)


def per_device(state: State) -> dict[str, int]:
  """Bytes that one device holds, by kind."""
  found = dict.fromkeys(KINDS, 0)
  for leaf in leaves(state):
    found[leaf.kind] += leaf.nbytes_per_device
  return found


class Bytes(NamedTuple):
  """Bytes per quantized parameter."""

  weights: float  # Codes and scales.
  moments: float
  residual: float  # Of master weights that are kept beside the stored weights.

  @property
  def total(self) -> float:
    """All of it."""
    return sum(self)


def per_parameter(state: State, where: Any) -> Bytes:
  """What the parameters chosen by `where` occupy, divided by their number.

  Args:
    state: of a run, live or abstract.
    where: called with path and leaf, as in `eco.quantize`, so that a run without quantization can
      be told by the same parameters.

  Returns:
    Bytes per parameter.
  """
  flat = jax.tree_util.tree_flatten_with_path(state.params, is_leaf=_is_packed)[0]
  chosen = {_name(path): leaf for path, leaf in flat if where(_name(path), leaf)}
  count = sum(math.prod(leaf.shape) for leaf in chosen.values())
  owned = lambda name: any(f"/{path}/" in f"/{name}/" for path in chosen)
  found = {"weights": 0, "moments": 0, "residual": 0}
  for i, tree in enumerate(state[:3]):  # Errors of an exchange are of devices, not of parameters.
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
      if owned(_name(path)):
        kind = "weights" if i == 0 else "residual" if "residual/" in _name(path) else "moments"
        found[kind] += Leaf(kind, "", array).nbytes
  return Bytes(*(n / count for n in found.values()))


def parameter_table(state: State) -> str:
  """One line for each parameter: path, shape, dtype, format, sharding and bytes per device."""
  flat = jax.tree_util.tree_flatten_with_path(state.params, is_leaf=_is_packed)[0]
  rows = [("parameter", "shape", "dtype", "format", "sharding", "bytes per device")]
  for path, leaf in flat:
    first = leaf.qvalue if _is_packed(leaf) else leaf
    size = sum(Leaf("", "", x).nbytes_per_device for x in jax.tree.leaves(leaf))
    rows.append(
      (
        _name(path),
        "×".join(map(str, leaf.shape)),
        (leaf.format.dtype if _is_packed(leaf) else leaf.dtype).name,
        _format_name(_name(path), leaf.format) if _is_packed(leaf) else "",
        _sharding_name(first),
        f"{size:,}",
      )
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  line = lambda row: "  ".join(
    f"{cell:>{w}}" if i == len(row) - 1 else f"{cell:<{w}}"
    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
  )
  return "\n".join([line(rows[0]), "─" * len(line(rows[0])), *map(line, rows[1:])])


def _format_name(name: str, format: eco.Format) -> str:
  """As the config has it; kernels are (out, in)."""
  format = format.transposed if name.endswith("/kernel") else format
  presets = {x: name for name, x in vars(eco).items() if isinstance(x, eco.Format)}
  return presets.get(format, repr(format))


def _sharding_name(array: Any) -> str:
  spec = getattr(array.sharding, "spec", ())
  names = [",".join((e,) if isinstance(e, str) else e or ()) or "·" for e in spec]
  return " ".join(names + ["·"] * (len(array.shape) - len(names)))


def plan(state: State) -> str:
  """The state's bytes per device by kind, and per quantized parameter over all devices."""
  found = per_device(state)
  packed = sum(quantized(state.params).values())
  rows = [(kind, f"{found[kind]:,}") for kind in KINDS if found[kind]]
  rows.append(("state, in all", f"{sum(found.values()):,}"))
  if packed:
    where = lambda path, leaf: _is_packed(leaf)
    rows.append(("quantized parameters", f"{packed:,}"))
    rows.append(("bytes per quantized parameter", f"{per_parameter(state, where).total:.3f}"))
  return table(rows)


def table(rows: Sequence[tuple[str, str]]) -> str:
  """Lines of a name and a number each, in two columns."""
  left, right = (max(map(len, column)) for column in zip(*rows, strict=True))
  return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)
