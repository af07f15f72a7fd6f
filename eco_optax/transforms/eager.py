"""Computing at once, whatever is being traced."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def now(fn: Callable[[], T]) -> T:
  """Calls `fn` outside of any trace, mesh or other context of JAX, which belong to a thread.

  A check may be due while an update is traced for devices that are not even there.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(fn).result()
