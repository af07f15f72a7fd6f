"""Walking parameter trees leaf by leaf, where a leaf has a path and may be packed."""

from __future__ import annotations

from collections.abc import Callable
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


def path_ends(path: str) -> list[str]:
  """A path and what is left of it without its first parts, the longest first."""
  parts = path.split("/")
  return ["/".join(parts[i:]) for i in range(len(parts))]
