"""The arithmetic of a fused step, written once: optimizer, rounding, error and injection.

`propose` and `settle` say how gradient, moments and weight become code, scale and new moments, of a
whole leaf as of a tile of it. A backend loads and stores, divides as its device does, and draws
random bits. `definition` is the whole step in plain `jnp`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.fused.leaf import Leaf, largest_proposal, random_bits
from eco_optax.quantized_array import QuantizedArray, Rounding, unit_of
from eco_optax.transforms import stacks
from eco_optax.transforms.factored import FactoredMoment, Factors, factored
from eco_optax.transforms.stored_moments import (
  PLAIN,
  Arithmetic,
  Codes,
  Stored,
  pack_like,
  stored_as,
  unpack,
)

Moments = tuple[jax.Array, ...]  # float32; the momentum comes first.


class Step(NamedTuple):
  """An optimizer as element-wise functions.

  Numbers that do not depend on the weight are worked out beforehand, in a few float32 scalars.
  """

  scalars: Callable[..., Any]  # The NamedTuple of its float32 scalars.
  # (scalars, gradient, moments, θ̂) → (u, new moments)
  propose: Callable[[Any, jax.Array, Moments, jax.Array], tuple[jax.Array, Moments]]
  # (scalars, new moments, error) → the rule's addition to the momentum
  inject: Callable[[Any, Moments, jax.Array], jax.Array]
  skips: bool = False  # Whether a factor of the gradient that is not finite changes nothing.

  def skipped(self, scalars: Any) -> jax.Array | None:
    """Whether the step changes nothing, bit for bit; None for a step that is never skipped."""
    return ~jnp.isfinite(scalars.clip) if self.skips else None


class Plan(NamedTuple):
  """The static part of a step: known before any number is."""

  step: Step
  rounding: Rounding
  weight: Stored
  moments: tuple[Stored, ...]
  how: Arithmetic = PLAIN  # The device computes.

  def value(self, proposal: Proposal) -> jax.Array:
    """θ̃ = θ̂ + u."""
    return self.how.add(proposal.weight, proposal.update)


def plan_of(
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
  groups: Sequence[Any] | None = None,
  how: Arithmetic = PLAIN,
) -> Plan:
  """The plan of a leaf's step.

  Args:
    step: of the optimizer.
    rounding: of the codes.
    leaf: of arrays or of their shapes.
    groups: of a tile of the weight and of each moment, each a `Groups` or of its interface; those
      of the whole leaf if None.
    how: the device computes.
  """
  stored = [stored_as(x) for x in (leaf.weight, *leaf.moments)]
  if groups is not None:
    stored = [
      x if x.format is None else x._replace(groups=own)
      for x, own in zip(stored, groups, strict=True)
    ]
  return Plan(step, rounding, stored[0], tuple(stored[1:]), how)


class Proposal(NamedTuple):
  """What the optimizer proposes; all float32."""

  weight: jax.Array  # θ̂
  update: jax.Array  # u
  moments: Moments


def propose(
  plan: Plan,
  scalars: Any,
  gradient: jax.Array,
  weight: Codes,
  moments: tuple[Codes | Factors | jax.Array, ...],
) -> Proposal:
  """The optimizer's own step on stored arrays."""
  stored = plan.weight.read(weight, plan.how)
  values = tuple(how.read(x, plan.how) for how, x in zip(plan.moments, moments, strict=True))
  update, new_moments = plan.step.propose(scalars, gradient, values, stored)
  return Proposal(stored, update, new_moments)


def settle(
  plan: Plan,
  scalars: Any,
  proposal: Proposal,
  bits: Callable[[int], jax.Array],
  largest: jax.Array | None = None,
  unit: jax.Array | None = None,
) -> Iterator[Codes | jax.Array | None]:
  """Rounds a proposal, and puts the error θ̃ − θ̂' in the momentum.

  Args:
    plan: of the step.
    scalars: of the optimizer's step.
    proposal: of the optimizer.
    bits: uint32 random bits of the weight, 0, and of each moment, from 1 on.
    largest: the largest proposal of each group, where the tile has only a part of it.
    unit: the `tensor_scale` of a two-level format.

  Yields:
    The results, one after another, so that a kernel need not keep them: the weight's codes,
    with scales as stored, and each moment, None for one that is read only.
  """
  random = bits(0) if plan.rounding == "stochastic" else None
  code, scale, factor = plan.weight.rounded(
    plan.value(proposal), plan.rounding, random, largest, unit, plan.how
  )
  stored = plan.weight.read(Codes(code, factor), plan.how)
  yield Codes(code, scale)
  # In the order that keeps an update far below the weight's own precision.
  error = plan.how.add(proposal.weight - stored, proposal.update)
  added = plan.step.inject(scalars, proposal.moments, error)
  yield plan.moments[0].write(proposal.moments[0] + added, lambda: bits(1), plan.how)
  yield from settle_others(plan, proposal, bits)


def settle_others(
  plan: Plan, proposal: Proposal, bits: Callable[[int], jax.Array]
) -> Iterator[Codes | jax.Array | None]:
  """The stored moments after the first, which no error changes."""
  others = zip(plan.moments[1:], proposal.moments[1:], strict=True)
  for k, (how, moment) in enumerate(others, 2):
    yield how.write(moment, functools.partial(bits, k), plan.how)


def arrays(
  stored: Stored, moment: Codes | jax.Array | None, pack: Callable[[jax.Array, Format], jax.Array]
) -> tuple[jax.Array, ...]:
  """A moment as written: its scales and packed codes, or the array itself."""
  if moment is None:
    return ()
  if not isinstance(moment, Codes):
    return (moment,)
  assert stored.format is not None
  return moment.scale, pack(moment.code, stored.format)


def definition(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """The step of one leaf in plain `jnp`.

  Args:
    step: of the optimizer.
    rounding: of the codes.
    leaf: a packed weight of any format and shape, its gradient and moments.

  Returns:
    The new weight and the new moments.
  """
  plan = plan_of(step, rounding, leaf)
  weight, moments = unpack(leaf.weight), tuple(map(unpack, leaf.moments))
  proposal = propose(plan, leaf.scalars, leaf.gradient, weight, moments)
  format = leaf.weight.format
  largest = whole = None
  if leaf.part and leaf.part.sharing:
    largest = largest_proposal(leaf, plan.value(proposal))
  if format.two_level:
    whole, largest = largest, None
  unit = unit_of(plan.value(proposal), format, whole)
  bits = lambda k: random_bits(leaf, k)
  new_weight, *new_moments = settle(plan, leaf.scalars, proposal, bits, largest, unit)
  old = dataclasses.replace(leaf.weight, tensor_scale=unit, sink=None)
  kept = zip(leaf.moments, new_moments, strict=True)
  new = pack_like(old, new_weight), tuple(pack_like(m, x) for m, x in kept)
  skip = step.skipped(leaf.scalars)
  return new if skip is None else trees.select(skip, leaf.results, new)


def with_means(
  take_step: Callable[[Step, Rounding, Leaf], tuple[QuantizedArray, Moments]],
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
) -> tuple[QuantizedArray, Moments]:
  """`take_step` of a leaf with factored moments, whose new means it does not see.

  It reads such a moment as a product of two factors, and writes none. The new means are sums over
  the gradient, which a compiler fuses, so that no such moment is ever in memory as a whole.
  """
  is_factored = lambda moment: isinstance(moment, FactoredMoment)
  if not any(map(is_factored, leaf.moments)):
    return take_step(step, rounding, leaf)
  over_rows, over_columns = (leaf.part.rows, leaf.part.columns) if leaf.part else ((), ())
  over = lambda x, axes: jax.lax.pmean(x, axes) if axes else x

  def factors(own: Any, moment: Any) -> Any:
    if not is_factored(own):
      return moment
    return own.factors(over(jnp.mean(own.row, -2, keepdims=True), over_rows))

  own, skip = leaf.alone, step.skipped(leaf.scalars)
  given = own._replace(moments=tuple(map(factors, own.moments, own.moments)))
  proposed = _proposed_moments(step, rounding, given)

  def means(old: Any, x: jax.Array) -> Any:
    if not is_factored(old):
      return None
    new = factored(x)
    new = FactoredMoment(over(new.row, over_columns), over(new.column, over_rows))
    return new if skip is None else trees.select(skip, old, new)

  found = tuple(map(means, own.moments, proposed))
  if leaf.in_stack:
    # What reads a stack comes before what changes it in place: else a compiler copies the stack.
    scalars, found = jax.lax.optimization_barrier((leaf.scalars, found))
    moments = tuple(map(factors, own.moments, leaf.moments))
    given = leaf._replace(scalars=scalars, moments=moments)
  weight, moments = take_step(step, rounding, given)
  put = lambda old, kept, new: kept if new is None else jax.tree.map(leaf.placed, old, new)
  return weight, tuple(map(put, leaf.moments, moments, found))


def _proposed_moments(step: Step, rounding: Rounding, leaf: Leaf) -> Moments:
  """A leaf's new moments before any error."""
  moments = tuple(map(unpack, leaf.moments))
  plan = plan_of(step, rounding, leaf)
  return propose(plan, leaf.scalars, leaf.gradient, unpack(leaf.weight), moments).moments


def by_layers(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """`definition` of one matrix after another, so that no temporary is of the size of a stack.

  First axes are gone through where all arrays have them: layers, and experts of a layer.
  """
  size, part = leaf.weight.shape[0], leaf.part
  arrays = jax.tree.leaves((leaf.weight, leaf.moments, leaf.gradient))
  if leaf.weight.ndim < 3 or any(x.shape[0] != size for x in arrays):
    return definition(step, rounding, leaf)
  first = jnp.zeros([], jnp.int32) if part is None else part.first[0]
  if leaf.layer is not None:
    first = first + leaf.layer.astype(jnp.int32) * np.int32(part.shape[0] if part else size)
  if part is not None:
    part = dataclasses.replace(part, first=part.first[1:], shape=part.shape[1:])

  def one(i: jax.Array, layer: Any, gradient: jax.Array) -> tuple[QuantizedArray, Moments]:
    weight, moments = layer
    own = leaf._replace(
      layer=first + i, weight=weight, gradient=gradient, moments=moments, part=part
    )
    return by_layers(step, rounding, own)

  return stacks.each_layer(one, (leaf.weight, leaf.moments), leaf.gradient)
