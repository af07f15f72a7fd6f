"""Walking parameter trees leaf by leaf, where a leaf has a path and may be packed."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def path_name(path: tuple) -> str:
  """The `/`-joined name of a key path, such as `layers/0/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_name(path: str) -> str:
  """How an error names the leaf at `path`; a bare array has no path."""
  return f"leaf {path!r}" if path else "the array"


def is_float(leaf: Any) -> bool:
  """Whether `leaf` is an array of real floating-point numbers."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def map_with_path(
  fn: Callable[..., Any],
  tree: PyTree,
  *rest: PyTree,
  is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
  """`jax.tree.map` whose function also gets each leaf's `/`-joined path, first."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
  )


def select(choose_old: jax.Array, old: PyTree, new: PyTree) -> PyTree:
  """`old` where a scalar is true, and `new` where it is not; float8 and 4-bit arrays too."""
  choose = lambda x, y: jax.lax.select(jnp.broadcast_to(choose_old, y.shape), x, y)
  return jax.tree.map(choose, old, new)


def owners(state: dict[str, Any], params: Collection[str]) -> dict[str, str | None]:
  """The parameter that each leaf of an optimizer's state belongs to.

  A state keeps moments in trees like the parameters': below such a tree's path there is
  nothing but paths of parameters. A parameter may be called as a field of the state is, `mu` or
  `count`, and so may what it is in; counters, integers without an axis, belong to none.

  Args:
    state: leaves by path.
    params: paths of all parameters.

  Returns:
    By path of the state's leaves, a parameter's path, or None.
  """
  below = collections.defaultdict(set)
  for path in state:
    for start, rest in _splits(path):
      below[start].add(rest)
  like_params = {start for start, rests in below.items() if rests.issubset(params)}

  def owner(path: str, leaf: Any) -> str | None:
    if jnp.ndim(leaf) == 0 and not is_float(leaf):
      return None
    splits = _splits(path)
    whole = (rest for start, rest in splits if start in like_params)
    return next(whole, next((rest for _, rest in splits if rest in params), None))

  return {path: owner(path, leaf) for path, leaf in state.items()}


def _splits(path: str) -> list[tuple[str, str]]:
  """A path in two, each way there is, the shortest first part first."""
  parts = path.split("/") if path else []
  return [("/".join(parts[:i]), "/".join(parts[i:])) for i in range(len(parts) + 1)]
