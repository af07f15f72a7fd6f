"""The order of steps: a layer's come after those of the layers behind it.

The backward pass makes gradients from the last layer to the first. XLA may take steps in any order,
and left alone it puts products of gradients off to the end, with both factors of each in memory
until then. Where steps wait for those of the layer behind, XLA's schedulers compute the gradients
of one layer, take its steps and forget them before they turn to the next.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

import jax


def stacks(paths: Iterable[str]) -> list[list[list[str]]]:
  """Leaves by layer, the last layer first.

  Layers are told by the first number in a path, and make a stack with those of other numbers behind
  the same text. A leaf without a number is a stack of its own.

  Args:
    paths: of leaves, `/`-joined.

  Returns:
    Paths of each layer of each stack.

  Example:
    >>> stacks(["head", "layers_9/down", "layers_10/down", "layers_10/up"])
    [[['head']], [['layers_10/down', 'layers_10/up'], ['layers_9/down']]]
  """
  found: dict[str, dict[int, list[str]]] = collections.defaultdict(dict)
  for path in paths:
    start, number = re.findall(r"^(\D*)(\d*)", path)[0]
    found[start].setdefault(int(number or 0), []).append(path)
  return [[layers[number] for number in sorted(layers, reverse=True)] for layers in found.values()]


def after(steps: list[jax.Array], x: Any) -> Any:
  """`x`, which does not exist before the results of `steps` do."""
  return jax.lax.optimization_barrier((steps, x))[1] if steps else x
