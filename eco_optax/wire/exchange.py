"""The exchange: collectives of packed bytes that make workers' compressed rows their mean."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import explicit_axes
from eco_optax import rounding as rounding_lib
from eco_optax.wire.compressors import Compressor, Payload, from_rows, to_rows

Exchange = Literal["scatter", "gather"]
Axis = str | tuple[str, ...]  # Of the mesh, one or several, over which workers exchange.

# In place of a leaf's path: the second compression draws bits of its own.
_SECOND = "second compression"


class Link(NamedTuple):
  """How workers reach each other: what all leaves of an exchange have in common."""

  axis: Axis
  compressor: Compressor
  exchange: Exchange
  seed: int
  weights: tuple[float, ...] | None  # Of workers, whose mean is 1; None: all are alike.

  def workers(self) -> int:
    """The number of workers.

    Raises:
      ValueError: if the axis is not in scope, or `shard_map` sums gradients by itself.
    """
    count = axis_size(self.axis)
    if count is None:
      raise ValueError(
        f"wire: axis {self.axis!r} is not in scope: call update inside jax.shard_map over a mesh"
        f" that has it, with check_vma=False, or inside jax.vmap(…, axis_name={self.axis!r})"
      )
    if explicit_axes.varying(jax.lax.axis_index(self.axis)):
      raise ValueError(
        f"wire: jax.shard_map checks what varies over {self.axis!r}, and has summed the gradients"
        " of what devices share already, uncompressed: give it check_vma=False, and each worker's"
        " own gradients to update"
      )
    return count

  def bits(self, step: jax.Array, path: str, rows: int) -> jax.Array | None:
    """Random bits for the rows of one leaf, a worker's own, or all workers' for a linear one."""
    if not self.compressor.draws:
      return None
    # Not the bits by which `quantize_params` of this seed rounds the leaf itself.
    key = rounding_lib.stream_key(self.seed, step, f"wire/{path}")
    worker = None if self.compressor.linear else jax.lax.axis_index(self.axis)
    return rounding_lib.counter_bits(key, (rows, self.compressor.draws), worker)


def axis_size(axis: Axis) -> int | None:
  """The number of devices along an axis in scope, or None."""
  try:
    return int(jax.lax.axis_size(axis))
  except NameError:
    return None


def in_parts(x: jax.Array, workers: int) -> jax.Array:
  """Rows as one part for each worker, of shape (workers, rows of a part, …), padded with zeros."""
  rows = -(-x.shape[0] // workers)
  padding = [(0, workers * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, padding).reshape(workers, rows, *x.shape[1:])


def _weighted_mean(link: Link, payload: Payload) -> jax.Array:
  """Rows of the mean over the first axis, workers, added in their order, one after another."""
  count = payload[0].shape[0]
  weights = np.ones(count) if link.weights is None else np.asarray(link.weights)
  shares = jnp.asarray(weights / count, jnp.float32)

  def add(total: jax.Array, one: tuple[Payload, jax.Array]) -> tuple[jax.Array, None]:
    return total + link.compressor.decode(one[0], None) * one[1], None

  first = jnp.zeros((payload[0].shape[1], link.compressor.block), jnp.float32)
  return jax.lax.scan(add, first, (payload, shares))[0]


def exchange(
  link: Link, messages: dict[str, jax.Array], server: jax.Array | None, step: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array | None]:
  """What workers' messages are once they are compressed, and the mean of them over workers.

  By "gather" each worker gets all payloads: the bytes grow with the number of workers, and nothing
  more is lost. By "scatter" each gets its part of all rows, adds them in float32, compresses the
  mean again, and hands it to all: twice the bytes of a payload, however many workers there are.
  What the second compression loses is fed back too: with s the mean of a part, C(s + ē) is handed
  on, and ē ← s + ē − C(s + ē). Payloads of a linear compressor are summed on the way.

  Args:
    link: of the workers.
    messages: float32 arrays by leaf, a worker's own.
    server: float32 of shape (rows of a part, block), ē; None where there is no second compression.
    step: int32 scalar.

  Returns:
    What was sent by leaf, decompressed; the mean by leaf; and the new ē.
  """
  if not messages:
    return {}, {}, server
  compressor = link.compressor
  rows = {path: to_rows(x, compressor.block) for path, x in messages.items()}
  bits = {path: link.bits(step, path, x.shape[0]) for path, x in rows.items()}
  payloads = {path: compressor.encode(x, bits[path]) for path, x in rows.items()}
  whole = lambda path, x: from_rows(x, messages[path].shape)
  sent = {path: whole(path, compressor.decode(x, bits[path])) for path, x in payloads.items()}

  if compressor.linear:
    share = jnp.float32(1 / link.workers())
    if link.weights is not None:
      own = jnp.asarray(link.weights, jnp.float32)[jax.lax.axis_index(link.axis)]
      share = share * own
    total = jax.lax.psum(jax.tree.map(lambda x: x * share, payloads), link.axis)
    means = {path: compressor.decode(x, bits[path]) for path, x in total.items()}
  else:
    # Codes and scales of all leaves together, a tenth of the gradients' bytes: few large transfers.
    together = tuple(jnp.concatenate(parts) for parts in zip(*payloads.values(), strict=True))
    if link.exchange == "gather":
      gather = lambda x: jax.lax.all_gather(x, link.axis)
      summed = _weighted_mean(link, jax.tree.map(gather, together))
    else:
      counts = [(len(x), messages[path].size) for path, x in rows.items()]
      summed, server = _by_parts(link, together, counts, server, step)
    ends = np.cumsum([len(x) for x in rows.values()])[:-1]
    means = dict(zip(rows, jnp.split(summed, ends), strict=True))
  return sent, {path: whole(path, x) for path, x in means.items()}, server


def _by_parts(
  link: Link,
  payload: Payload,
  counts: list[tuple[int, int]],
  server: jax.Array | None,
  step: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The mean by parts, each of which one worker adds and compresses again.

  Args:
    link: of the workers.
    payload: of all leaves' rows.
    counts: of each leaf, its rows and its values.
    server: ē.
    step: int32 scalar.

  Returns:
    Rows of the mean, and the new ē.
  """
  assert server is not None
  compressor, workers, me = link.compressor, link.workers(), jax.lax.axis_index(link.axis)
  to_owners = lambda x: jax.lax.all_to_all(in_parts(x, workers), link.axis, 0, 0)
  summed = _weighted_mean(link, jax.tree.map(to_owners, payload)) + server

  # What fills up a leaf's last row belongs to nobody, and must not count in its scale.
  ends = np.cumsum([n for n, _ in counts])
  last = [size - (n - 1) * compressor.block for n, size in counts]
  filled = jnp.full(ends[-1], compressor.block, jnp.int32).at[ends - 1].set(jnp.asarray(last))
  own = in_parts(filled, workers)[me]
  is_own = jax.lax.broadcasted_iota(jnp.int32, summed.shape, 1) < own[:, None]
  summed = jnp.where(is_own, summed, np.float32(0))

  second = compressor.encode(summed, link.bits(step, _SECOND, len(summed)))
  lost = jnp.where(is_own, summed - compressor.decode(second, None), np.float32(0))
  gather = lambda x: jax.lax.all_gather(x, link.axis, tiled=True)[: ends[-1]]
  return compressor.decode(jax.tree.map(gather, second), None), lost


def mean_in_order(axis: Axis, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Means of leaves over workers, uncompressed, added in the workers' order.

  Each worker adds its part of all values, in float32 or in float64 if a leaf is, and hands the part
  to all. It moves the bytes of `pmean`. The order in which `pmean` adds, and so the last place of
  its sums, depends on how workers are spread over processes.
  """
  if not leaves:
    return {}
  workers = jax.lax.axis_size(axis)
  is_double = any(x.dtype == jnp.float64 for x in leaves.values())
  dtype = np.dtype(np.float64 if is_double else np.float32)
  values = jnp.concatenate([jnp.ravel(x).astype(dtype) for x in leaves.values()])
  received = jax.lax.all_to_all(in_parts(values, workers), axis, 0, 0)
  summed = jax.lax.scan(lambda total, x: (total + x, None), received[0], received[1:])[0]
  mean = jax.lax.all_gather(summed / dtype.type(workers), axis, tiled=True)[: values.size]
  pieces = jnp.split(mean, np.cumsum([x.size for x in leaves.values()])[:-1])
  of_shape = lambda piece, x: piece.reshape(x.shape).astype(x.dtype)
  return {path: of_shape(p, x) for p, (path, x) in zip(pieces, leaves.items(), strict=True)}


def all_finite(link: Link, own: list[Any], common: list[Any]) -> jax.Array:
  """Whether arrays of all workers are finite, a scalar; `common` ones are the same on all."""
  is_finite = lambda arrays: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]))
  everywhere = jax.lax.pmin(is_finite(own).astype(jnp.int32), link.axis)
  return (everywhere > 0) & is_finite(common)
