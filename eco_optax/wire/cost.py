"""What an exchange costs, and when compression pays."""

from __future__ import annotations

from typing import NamedTuple

from eco_optax.wire.compressors import Compressor
from eco_optax.wire.exchange import Exchange


class Cost(NamedTuple):
  """Seconds of a step, and what compression makes of them."""

  exact: float  # Of an exact all-reduce in float32.
  compressed: float  # Of the exchange of codes.
  speedup: float  # Of whole steps: above 1 it pays.
  break_even: float  # Bytes per second of a link above which it does not.


def cost(
  parameters: float,
  workers: int,
  bytes_per_second: float,
  compressor: Compressor,
  *,
  compute_seconds: float,
  coding_seconds: float = 0.0,
  exchange: Exchange = "scatter",
  exact_bytes: float = 4.0,
) -> Cost:
  """When compression pays: from the link, the size of the model and measured times.

  With n workers, N values of b bytes and a link of s bytes per second for each worker, a ring
  all-reduce takes 2 (n − 1)/n · N b/s, and so does an exchange by "scatter" with the compressor's
  bytes; by "gather" it takes (n − 1) N b/s. Exchange and computation are taken one after another;
  what of it overlaps makes both steps shorter, and compression pays less. Latency is left out.

  Args:
    parameters: N, the values that are exchanged.
    workers: n.
    bytes_per_second: s, of one worker's link, each way.
    compressor: of this module.
    compute_seconds: of a step on one worker, without any exchange; measured.
    coding_seconds: that compressing and decompressing take in a step; measured.
    exchange: as in `error_feedback`.
    exact_bytes: of a value that is exchanged exactly, 2 in bfloat16.

  Returns:
    A `Cost`.

  Raises:
    ValueError: for a number of workers below 2, or a link or a size that is not positive.

  Example:
    >>> from eco_optax import wire
    >>> ethernet = 10e9 / 8  # Ten gigabits.
    >>> cost = wire.cost(1e9, 8, ethernet, wire.int4(), compute_seconds=1.0, coding_seconds=0.02)
    >>> print(f"{cost.exact:.2f} s, {cost.compressed:.2f} s, {cost.speedup:.1f} ×")
    5.60 s, 0.79 s, 3.7 ×
  """
  if workers < 2 or parameters <= 0 or bytes_per_second <= 0:
    raise ValueError(
      f"wire.cost needs 2 workers or more, a model and a link, got {workers} workers,"
      f" {parameters} parameters and {bytes_per_second} bytes per second"
    )
  ring = 2 * (workers - 1) / workers
  passes = workers - 1 if exchange == "gather" and not compressor.linear else ring
  exact_moved = ring * parameters * exact_bytes
  moved = passes * parameters * compressor.bytes_per_value
  exact, compressed = exact_moved / bytes_per_second, moved / bytes_per_second
  speedup = (compute_seconds + exact) / (compute_seconds + coding_seconds + compressed)
  saved = max(exact_moved - moved, 0.0)
  break_even = saved / coding_seconds if coding_seconds else float("inf") if saved else 0.0
  return Cost(exact, compressed, speedup, break_even)
