"""Packed leaves in `flax.serialization`, which knows only pytrees that are registered with it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

_FIELDS = ("qvalue", "scale", "tensor_scale")


def register(packed: type) -> None:
  """Lets Flax, where it is imported, save packed leaves and read them again.

  Then `flax.serialization.to_bytes` and `to_state_dict` take trees with packed leaves, and so does
  `flax.training.checkpoints`, which calls them. `eco.quantize` calls this function, so that this
  package does not import Flax.

  Args:
    packed: `QuantizedArray`; its subclasses are registered too.
  """
  flax = sys.modules.get("flax.serialization")
  if flax is None or flax.is_serializable(packed):
    return

  def to_state(leaf: Any) -> dict[str, Any]:
    if leaf.guard is not None:
      raise TypeError(
        "the update of a packed leaf cannot be saved: save what eco_optax.apply_updates makes of it"
      )
    fields = {name: getattr(leaf, name) for name in _FIELDS}
    return {"format": _meaning(leaf)} | {k: v for k, v in fields.items() if v is not None}

  def from_state(target: Any, state: Any) -> Any:
    where = f"leaf '{flax.current_path().removeprefix('./')}'"
    if not isinstance(state, dict) or "format" not in state:
      raise ValueError(
        f"{where} is packed, but what is to be read for it is not: read it into a float target, and"
        " call eco_optax.quantize on that"
      )
    if state["format"] != _meaning(target):
      raise ValueError(
        f"{where} is packed in {_meaning(target)}, but was saved in {state['format']}: read it into"
        " a target of that format, and call eco_optax.quantize on what was read for another"
      )
    for name in set(_FIELDS) & set(state):
      found, wanted = state[name].shape, getattr(target, name).shape
      if found != wanted:
        raise ValueError(f"{where} has {name} of shape {wanted}, but {found} was saved")
    return dataclasses.replace(target, **{k: v for k, v in state.items() if k != "format"})

  for kind in (packed, *packed.__subclasses__()):
    flax.register_serialization_state(kind, to_state, from_state)


def _meaning(leaf: Any) -> str:
  """What the codes mean, as text."""
  return f"{leaf.format!r}{' of odd length' if leaf.odd else ''}"
