"""Computing at once, whatever is being traced."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

T = TypeVar("T")


def now(fn: Callable[[], T]) -> T:
  """Calls `fn` outside of any trace, mesh or other context of JAX, which belong to a thread.

  A check may be due while an update is traced for devices that are not even there.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(fn).result()


def with_made_up_arguments(fn: Callable[[dict[str, Any]], T]) -> tuple[T | None, Exception | None]:
  """Tries `fn` on arguments that an optimizer's update may want besides gradients.

  Args:
    fn: takes them by name, in a dict.

  Returns:
    Its result, or None and why it failed. A `TypeError` about one that is missing speaks of a
    user's own argument, which cannot be made up.
  """
  failure: Exception | None = None
  for extra_args in ({}, {"value": jnp.ones([])}):  # A loss.
    try:
      return fn(extra_args), None
    except (TypeError, ValueError) as error:
      failure = error
  return None, failure


def is_missing_argument(failure: Exception | None) -> bool:
  """Whether what failed was the lack of an argument."""
  return isinstance(failure, TypeError) and "missing" in str(failure)
