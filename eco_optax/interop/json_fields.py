"""JSON objects: every entry is checked when it is taken, and an entry left over is an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
  """The kind of value that a key needs."""

  text: str
  check: Callable[[Any], bool]
  stand_in: Any  # For a value that is not, so that what follows can be checked too.


_is_whole = lambda x: isinstance(x, int) and not isinstance(x, bool)
_is_number = lambda x: isinstance(x, (int, float)) and x is not True and x is not False
_is_finite = lambda x: _is_number(x) and math.isfinite(x)

POSITIVE = Kind("a whole number above 0", lambda x: _is_whole(x) and x > 0, 1)
NATURAL = Kind("a whole number, 0 or more", lambda x: _is_whole(x) and x >= 0, 0)
NUMBER = Kind("a number above 0", lambda x: _is_finite(x) and x > 0, 1.0)
NONNEGATIVE = Kind("a number, 0 or more", lambda x: _is_finite(x) and x >= 0, 0.0)
ONE_OR_MORE = Kind("a number, 1 or more", lambda x: _is_finite(x) and x >= 1, 1.0)
FLAG = Kind("true or false", lambda x: isinstance(x, bool), False)
TEXT = Kind("a string", lambda x: isinstance(x, str), "")
LIST = Kind("a list", lambda x: isinstance(x, list), [])
OBJECT = Kind("an object", lambda x: isinstance(x, dict), {})

#: The default of an entry that must be there.
REQUIRED = object()


class Fields:
  """An object of JSON; `problems` collects faults, in words that name the entry.

  `finish` reports every entry that was neither taken, expected nor ignored: such an entry may
  change the meaning of the others.

  Args:
    raw: the object.
    name: of it inside the file; empty for the file's own.
    problems: a list to add to.

  Example:
    >>> from eco_optax.interop import json_fields
    >>> fields = json_fields.Fields({"heads": 4, "twist": 1})
    >>> fields.take("heads", json_fields.POSITIVE), fields.take("depth", json_fields.POSITIVE, 2)
    (4, 2)
    >>> fields.finish()
    >>> fields.problems
    ['twist 1 is not understood: remove it if the model computes the same without']
  """

  def __init__(self, raw: Mapping[str, Any], name: str = "", problems: list[str] | None = None):
    self.raw, self.name = dict(raw), name
    self.problems: list[str] = [] if problems is None else problems
    self._understood: set[str] = set()

  def child(self, name: str, raw: Any) -> Fields:
    """An object inside this one, whose problems are added to this one's."""
    if not isinstance(raw, Mapping):
      self.problems.append(f"{self._path(name)} {raw!r} has to be an object")
      raw = {}
    return Fields(raw, self._path(name), self.problems)

  def take(self, key: str, kind: Kind, default: Any = REQUIRED, *, null: bool = False) -> Any:
    """The value of a key.

    Args:
      key: of this object.
      kind: what the value has to be.
      default: of a key that is not there; without one, that is a problem.
      null: whether the value may be null too.

    Returns:
      The value, or a stand-in after a problem.
    """
    self._understood.add(key)
    if key not in self.raw and default is not REQUIRED:
      return default
    value = self.raw.get(key)
    if value is None and null:
      return None
    if kind.check(value):
      return value
    if key not in self.raw:
      self.problems.append(
        f"{self._path(key)} is missing: fetch the file again, or add what the model has"
      )
    else:
      self.problems.append(f"{self._path(key)} {_shown(value)} has to be {kind.text}")
    return kind.stand_in

  def expect(self, key: str, value: Any) -> None:
    """Makes any other value than this, null or none at all a problem."""
    self._understood.add(key)
    found = self.raw.get(key)
    same = found == value and isinstance(found, bool) == isinstance(value, bool)
    if found is not None and not same:
      self.problems.append(f"models here have no {self._path(key)} {_shown(found)}")

  def ignore(self, *keys: str) -> None:
    """Counts keys as understood."""
    self._understood.update(keys)

  def rename(self, old: str, new: str) -> None:
    """Makes a key another one's name, which must not say something else."""
    if old in self.raw:
      value = self.raw.pop(old)
      if self.raw.setdefault(new, value) != value:
        self.problems.append(
          f"{self._path(old)} {_shown(value)} and {self._path(new)} {_shown(self.raw[new])} differ"
        )

  def finish(self) -> None:
    """Makes every key that is not understood a problem, unless it is null."""
    for key in sorted(self.raw.keys() - self._understood):
      if self.raw[key] is not None:
        self.problems.append(
          f"{self._path(key)} {_shown(self.raw[key])} is not understood: remove it if the model"
          " computes the same without"
        )

  def _path(self, key: str) -> str:
    return f"{self.name}.{key}" if self.name else key


def _shown(value: Any) -> str:
  text = "null" if value is None else repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
