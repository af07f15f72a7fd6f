"""Gradient release: a training step in which no more than one layer's gradient exists.

The loss is traced once and cut into pieces. A scan over a stack of layers is a piece of its own.
All other equations are cut before each one that is the first to use a parameter. The backward pass
goes through the pieces by hand, the last first. A parameter's gradient is complete behind the piece
that uses the parameter first, and its step is taken there. The backward pass of a scan is a loop
that steps each layer in place in its stack and hands the cotangent on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from eco_optax import dense_view, trees
from eco_optax.data_parallel import DataParallel, data_parallel
from eco_optax.formats import Format
from eco_optax.quantized_array import is_quantized, quantize_array
from eco_optax.transforms import leafwise
from eco_optax.transforms.leafwise import Leaves, flatten, pick
from eco_optax.transforms.packed import Context, require_scalar
from eco_optax.transforms.stacks import as_stored, write_layer
from eco_optax.updates import apply_updates, new_sink, require_floats

_Values = dict[Any, Any]  # By variable of the loss's program.
_Specs = dict[Any, PartitionSpec]


class Report(NamedTuple):
  """What a step saw of the gradients, before they were scaled or clipped."""

  norm: jax.Array  # float32 scalar: Euclidean norm of the whole gradient.
  # int32 scalar: layers, and sets of leaves that are stepped together, that were skipped.
  skipped: jax.Array
  # float32, by path of a parameter: its gradient's norm; of a released stack one for each layer.
  norms: dict[str, jax.Array]


class _Parameter(NamedTuple):
  """A parameter of a traced loss."""

  value: Any  # Packed, without a sink, or float.
  variables: tuple[Any, ...]  # Of its arrays; the cotangent of the last is its gradient.
  spec: PartitionSpec  # Of its gradient.

  def operands(self, value: Any, sink: jax.Array | None) -> list[Any]:
    """Values of the variables where the parameter, or one layer of it, is `value`."""
    if is_quantized(value):
      value = dataclasses.replace(value, sink=sink)
    return jax.tree.leaves(value) if len(self.variables) > 1 else [value]


class _Piece(NamedTuple):
  """Equations that are differentiated together."""

  eqns: list[core.JaxprEqn]
  inputs: list[Any]
  outputs: list[Any]  # Variables that something behind it uses.
  released: list[str]  # Paths of stacks whose layers a scan, the only equation, steps in place.


class _Loss(NamedTuple):
  """A traced loss, cut into pieces."""

  jaxpr: core.Jaxpr
  values: _Values  # Of its constants, parameters and further arguments.
  parameters: dict[str, _Parameter]
  pieces: list[_Piece]
  complete: list[list[str]]  # Parameters whose gradients are complete once a piece is passed.
  active: set[Any]  # Variables that have cotangents, since they depend on parameters.
  sink_dtype: Any
  # Micro-batches, and devices or groups, whose values stand along first axes of
  parts: tuple[int, ...]
  split: set[Any]  # these variables.
  devices: DataParallel | None
  # Paths of stacks that a step of one layer is given whole: of weights, and of states.
  in_stacks: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

  def specs(self, variables: dict[Any, Any], layers: Collection[Any] = ()) -> _Specs:
    """How gradients of some variables, or of a layer of them, are split; by the names given."""
    own = {x.variables[-1]: x.spec for x in self.parameters.values()}
    specs = {name: own.get(x, PartitionSpec()) for name, x in variables.items()}
    return {name: _of_layer(x) if name in layers else x for name, x in specs.items()}

  def primal(self, x: Any) -> Any:
    """What is differentiated in place of a value: a packed one's is its sink."""
    return new_sink(x, self.sink_dtype) if is_quantized(x) else x

  def with_weights(
    self, values: _Values, weights: Leaves, needed: Collection[Any] | None = None
  ) -> _Values:
    """The values with other weights, where these are among the variables that are needed."""
    for path, weight in weights.items():
      own = self.parameters[path]
      if needed is not None and not any(x in needed for x in own.variables):
        continue
      sink = self.primal(weight) if is_quantized(weight) and len(own.variables) > 1 else None
      values = values | dict(zip(own.variables, own.operands(weight, sink), strict=True))
    return values


def _with_primal(x: Any, primal: Any) -> Any:
  return dataclasses.replace(x, sink=primal) if is_quantized(x) else primal


def _of_layer(spec: PartitionSpec) -> PartitionSpec:
  """How a layer of a stack is split."""
  return PartitionSpec(*spec[1:])


def _is_float(x: Any) -> bool:
  return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _variables(eqns: Sequence[core.JaxprEqn]) -> list[Any]:
  return [x for eqn in eqns for x in eqn.invars if not isinstance(x, core.Literal)]


def _cut(
  closed: core.ClosedJaxpr,
  params: Leaves,
  dense: bool,
  sink_dtype: Any,
  is_stack: Callable[[str, int], bool],
  args: Sequence[Any],
  parts: tuple[int, ...],
  devices: DataParallel | None,
  specs: dict[str, PartitionSpec],
) -> _Loss:
  """Cuts a loss into pieces.

  Args:
    closed: its program, of the arrays of parameters and sinks, or of dense views.
    params: by path, packed ones without a sink.
    dense: whether it is of dense views.
    sink_dtype: of packed parameters' gradients.
    is_stack: whether the optimizer's state at the path of a parameter has so many layers.
    args: further arguments, whose first axes are `parts`; none if they are constants.
    parts: numbers of micro-batches and of devices.
    devices: that share each micro-batch.
    specs: of gradients, by path.
  """
  jaxpr = closed.jaxpr
  values: _Values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  invars, parameters = iter(jaxpr.invars), {}
  for path, value in params.items():
    count = 1 if dense or not is_quantized(value) else len(jax.tree.leaves(value)) + 1
    variables = tuple(next(invars) for _ in range(count))
    parameters[path] = _Parameter(value, variables, specs.get(path, PartitionSpec()))
  values |= zip(invars, args, strict=True)
  uses = collections.Counter(_variables(jaxpr.eqns))
  uses.update(x for x in jaxpr.outvars if not isinstance(x, core.Literal))

  def released(eqn: core.JaxprEqn) -> list[str]:
    """Stacks that a scan has for itself, one layer in each turn."""
    if eqn.primitive.name != "scan":
      return []
    stacks = eqn.invars[dense_view.scan_ends(eqn)[1] :]

    def is_own(path: str, parameter: _Parameter) -> bool:
      used = [x for x in parameter.variables if uses[x]]
      return (
        is_quantized(parameter.value)
        and parameter.variables[-1] in used
        and all(uses[x] == 1 and x in stacks for x in used)
        and dense_view.is_stack(parameter.value)
        and is_stack(path, eqn.params["length"])
      )

    return [path for path, parameter in parameters.items() if is_own(path, parameter)]

  gradients = {parameter.variables[-1]: path for path, parameter in parameters.items()}
  active, split = set(gradients), set(jaxpr.invars[len(jaxpr.invars) - len(args) :])
  groups: list[tuple[list[core.JaxprEqn], list[str], bool]] = []
  first: dict[str, int] = {}
  for eqn in jaxpr.eqns:
    operands, own = _variables([eqn]), released(eqn)
    if any(x in active for x in operands):
      active |= {x for x in eqn.outvars if _is_float(x.aval)}
    if is_split := any(x in split for x in operands):
      split |= set(eqn.outvars)
    used = [gradients[x] for x in operands if x in gradients]
    # Vectors are too small to be worth a cut, which keeps what goes over it.
    begins = any(path not in first and params[path].ndim > 1 for path in used)
    if not groups or own or begins or groups[-1][1:] != ([], is_split):
      groups.append(([], own, is_split))
    groups[-1][0].append(eqn)
    first |= {path: len(groups) - 1 for path in used if path not in first}

  pieces: list[_Piece] = []
  for eqns, own, _ in groups:
    made, inside = [x for eqn in eqns for x in eqn.outvars], collections.Counter(_variables(eqns))
    inputs = [x for x in inside if x not in set(made)]
    outputs = [x for x in made if uses[x] > inside[x]]
    pieces.append(_Piece(eqns, inputs, outputs, own))
  complete: list[list[str]] = [[] for _ in pieces]
  for path, number in first.items():
    if path not in pieces[number].released:
      complete[number].append(path)
  cut = jaxpr, values, parameters, pieces, complete, active
  loss = _Loss(*cut, sink_dtype, parts, split, devices)
  return loss._replace(values=loss.with_weights(values, params))


class _Seen(NamedTuple):
  """What a visit of gradients makes; its fields have the layers of a released stack."""

  squares: dict[str, jax.Array]  # float32, by path: the gradients' squared norms.
  skipped: jax.Array  # bool: whether the parameters are not stepped.
  weights: Leaves  # New ones, of the parameters that the visit was given.
  states: Leaves
  grads: Leaves  # Gradients kept for a step at the end; else none.


# (gradients, weights and states of parameters or of one layer of stacks, number of this layer)
_Visit = Callable[[Leaves, Leaves, Leaves, jax.Array | None], _Seen]

# (cotangents of the outputs, the parameters' present weights, their states, visit) → cotangents of
# the inputs, and for a scan what the visit made of its stacks.
_Backward = Callable[[_Values, Leaves, Leaves, _Visit], tuple[_Values, _Seen | None]]

# (primals that take the place of some operands, all operands), both by name → outputs
_Function = Callable[[dict[Any, Any], dict[Any, Any]], list[Any]]


def _call(
  fn: _Function, operands: dict[Any, Any], split: Collection[Any], devices: DataParallel | None
) -> list[Any]:
  """Outputs of a function, of one micro-batch after another where operands are split."""
  own = pick(operands, split)
  if not own:
    call = lambda operands: fn({}, operands)
    return devices.alike(call, operands) if devices else call(operands)

  def each_part(operands: dict[Any, Any], own: dict[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
    return {}, jax.lax.map(lambda own: fn({}, operands | own), own)

  shared = {k: x for k, x in operands.items() if k not in split}
  return (devices.each(each_part, {}, shared, own) if devices else each_part(shared, own))[1]


def _pull(
  fn: _Function,
  primals: dict[Any, Any],
  operands: dict[Any, Any],
  split: Collection[Any],
  cotangents: list[Any],
  devices: DataParallel | None,
  specs: _Specs,
) -> dict[Any, Any]:
  """Cotangents of the primals. Those of shared operands are summed in float32.

  Over devices they are summed behind the last micro-batch, and split as the specs say.
  """
  if not split:

    def whole(given: Any) -> dict[Any, Any]:
      primals, operands, cotangents = given
      return jax.vjp(lambda primals: fn(primals, operands), primals)[1](cotangents)[0]

    given = primals, operands, cotangents
    return devices.alike(whole, given) if devices else whole(given)  # type: ignore[no-any-return]

  def each_part(shared: Any, own: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    primals, operands = shared

    def turn(totals: Any, part: Any) -> tuple[Any, Any]:
      own_primals, own, cotangents = part
      call = lambda primals: fn(primals, operands | own)
      (found,) = jax.vjp(call, primals | own_primals)[1](cotangents)
      totals = {k: total + found[k].astype(total.dtype) for k, total in totals.items()}
      return totals, pick(found, own_primals)

    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.scan(turn, {k: wide(x) for k, x in primals.items()}, own)

  without = lambda values: {k: x for k, x in values.items() if k not in split}
  shared = without(primals), without(operands)
  own = {k: x for k, x in primals.items() if k in split}, pick(operands, split), cotangents
  if devices is None:
    totals, found = each_part(shared, own)
  else:
    totals, found = devices.each(each_part, pick(specs, shared[0]), shared, own)
  return totals | found


def _forward(
  loss: _Loss, piece: _Piece, values: _Values, again: bool
) -> tuple[list[Any], _Backward]:
  """A piece's outputs, and its backward pass, which makes the piece `again` or keeps what it needs.

  A piece that is made again has the weights of then, so that the old ones need not be kept.
  """
  inputs, outputs = dict(enumerate(piece.inputs)), piece.outputs
  jaxpr = loss.jaxpr.replace(constvars=[], invars=piece.inputs, outvars=outputs, eqns=piece.eqns)
  active = [i for i, x in inputs.items() if x in loss.active]
  split = [i for i, x in inputs.items() if x in loss.split]
  felt = [i for i, x in enumerate(outputs) if x in loss.active]

  def fn(primals: dict[int, Any], operands: dict[int, Any]) -> list[Any]:
    values = operands | {i: _with_primal(operands[i], x) for i, x in primals.items()}
    return dense_view.evaluate(jaxpr, (), [values[i] for i in inputs])

  def fn_felt(primals: dict[int, Any], operands: dict[int, Any]) -> list[Any]:
    found = fn(primals, operands)
    return [found[i] for i in felt]

  def given(values: _Values) -> tuple[dict[int, Any], dict[int, Any]]:
    operands = {i: values[x] for i, x in inputs.items()}
    return {i: loss.primal(operands[i]) for i in active}, operands

  def with_cotangents(found: dict[int, Any]) -> _Values:
    return {inputs[i]: x for i, x in found.items()}

  primals, operands = given(values)
  if again:

    def pull(cotangents: _Values, weights: Leaves, states: Leaves, visit: _Visit) -> Any:
      primals, operands = given(loss.with_weights(values, weights, piece.inputs))
      needed = [cotangents[outputs[i]] for i in felt]
      how = split, needed, loss.devices, loss.specs(inputs)
      return with_cotangents(_pull(fn_felt, primals, operands, *how)), None

    return _call(fn, operands, split, loss.devices), pull

  def split_outputs(primals: dict[int, Any]) -> tuple[list[Any], list[Any]]:
    found = fn(primals, operands)
    return [found[i] for i in felt], found

  _, vjp, made = jax.vjp(split_outputs, primals, has_aux=True)

  def backward(cotangents: _Values, weights: Leaves, states: Leaves, visit: _Visit) -> Any:
    return with_cotangents(vjp([cotangents[outputs[i]] for i in felt])[0]), None

  return made, backward


def _forward_of_scan(
  loss: _Loss, piece: _Piece, values: _Values, kept_format: Format | None
) -> tuple[list[Any], _Backward]:
  """The outputs of a scan over released stacks, and its backward pass.

  Kept is what one layer hands to the next, in a format; all else is made again.
  """
  (eqn,) = piece.eqns
  p, closed, parts = eqn.params, eqn.params["jaxpr"], loss.parts
  first_carry, first_stack = dense_view.scan_ends(eqn)
  released = pick(loss.parameters, piece.released)

  # Operands are numbered by their place in the equation. Released stacks are kept apart.
  variables = {i: x for i, x in enumerate(eqn.invars) if not isinstance(x, core.Literal)}
  place = {x: i for i, x in variables.items()}
  places = {path: [place.get(x) for x in own.variables] for path, own in released.items()}
  taken = {i for own in places.values() for i in own}
  number_of = {path: len(eqn.invars) + k for k, path in enumerate(released)}
  others = [i for i in range(len(eqn.invars)) if i not in taken]
  consts, carries, stacks = (
    [i for i in others if i in range(*ends)]
    for ends in ((0, first_carry), (first_carry, first_stack), (first_stack, len(eqn.invars)))
  )
  active = {i for i, x in variables.items() if x in loss.active}
  is_split = any(x in loss.split for x in variables.values())
  # In the loops, all that layers hand on is split where anything is.
  split = {i for i, x in variables.items() if x in loss.split} | set(carries if is_split else ())
  first = tuple(range(len(parts)))  # Axes.
  specs = loss.specs(variables, stacks)
  specs |= {number_of[path]: _of_layer(own.spec) for path, own in released.items()}

  def operand(i: int, values: _Values) -> Any:
    """What the loops take: layers first, then micro-batches."""
    x = eqn.invars[i]
    value = jnp.asarray(x.val) if isinstance(x, core.Literal) else values[x]
    keeps_codes = i < first_carry or (i >= first_stack and dense_view.is_stack(value))
    if is_quantized(value) and not keeps_codes:
      value = value.dequantize()
    if i in split and x not in loss.split:
      return jnp.broadcast_to(value, (*parts, *value.shape))
    return jnp.moveaxis(value, len(first), 0) if i in split and i >= first_stack else value

  def of_operand(i: int, x: jax.Array) -> jax.Array:
    """Turns the cotangent of the loops' operand into that of the equation's operand."""
    if i in split and variables[i] not in loss.split:
      return jnp.sum(x, first)
    return jnp.moveaxis(x, 0, len(first)) if i in split and i >= first_stack else x

  n_carry = len(carries)
  floats = [i for i, x in enumerate(eqn.outvars) if _is_float(x.aval)]

  def layer(primals: dict[Any, Any], operands: dict[Any, Any]) -> list[Any]:
    """The body of the scan; released stacks have numbers behind its own operands."""
    values = operands | {i: _with_primal(operands[i], x) for i, x in primals.items()}
    for path, own in released.items():
      weight = values[number_of[path]]
      sink = loss.primal(weight) if weight.sink is None else weight.sink
      arrays = own.operands(dataclasses.replace(weight, sink=None), sink)
      values |= {i: x for i, x in zip(places[path], arrays, strict=True) if i is not None}
    ordered = [values[i] for i in range(len(eqn.invars))]
    return dense_view.evaluate(closed.jaxpr, closed.consts, ordered)

  def layer_felt(primals: dict[Any, Any], operands: dict[Any, Any]) -> list[Any]:
    found = layer(primals, operands)
    return [found[i] for i in floats]

  def keep(x: jax.Array) -> Any:
    if kept_format is None or not _is_float(x) or x.ndim < 2:
      return x
    kept_format.check(x.shape, f"what the scan over {piece.released[0]} hands on")
    return quantize_array(x, kept_format)

  def turn(carry: list[Any], x: Any) -> tuple[list[Any], Any]:
    rows, own_weights = x
    own_weights = as_stored(own_weights)
    operands = shared | dict(zip(carries, carry, strict=True)) | rows | own_weights
    found = _call(layer, operands, split, loss.devices)
    return found[:n_carry], ([keep(x) for x in carry], found[n_carry:])

  shared = {i: operand(i, values) for i in consts}
  rows = {i: operand(i, values) for i in stacks}
  weights = {number_of[path]: own.value for path, own in released.items()}
  start = [operand(i, values) for i in carries]
  how = {"length": p["length"], "reverse": p["reverse"]}
  last, (kept, ys) = jax.lax.scan(turn, start, (rows, weights), **how)
  ys = [jnp.moveaxis(y, 0, len(first)) if is_split else y for y in ys]
  made = dict(zip(eqn.outvars, [*last, *ys], strict=True))

  def backward(cotangents: _Values, weights: Leaves, states: Leaves, visit: _Visit) -> Any:
    now = loss.with_weights(values, weights, [variables[i] for i in others if i in variables])
    shared = {i: operand(i, now) for i in consts}
    rows = {i: operand(i, now) for i in stacks}
    old = {path: own.value for path, own in released.items()}
    outs = [eqn.outvars[i] for i in floats]
    given = [cotangents[x] if x in cotangents else jnp.zeros_like(made[x]) for x in outs]
    n_felt = sum(i < n_carry for i in floats)
    of_ys = [jnp.moveaxis(x, len(first), 0) if is_split else x for x in given[n_felt:]]
    felt = [carries[i] for i in floats if i < n_carry]

    def turn(state: Any, x: Any) -> tuple[Any, Any]:
      of_carry, of_shared, changing = state
      number, carry, rows, of_ys = x
      carry = [
        x.dequantize(like.dtype) if is_quantized(x) else x
        for x, like in zip(carry, start, strict=True)
      ]
      at = lambda stack: jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)
      own_weights = as_stored(jax.tree.map(at, old | changing[0]))
      operands = shared | dict(zip(carries, carry, strict=True)) | rows
      operands |= {number_of[path]: x for path, x in own_weights.items()}
      differentiated = [i for i in (*consts, *stacks) if i in active] + felt
      differentiated += number_of.values()
      primals = {k: loss.primal(operands[k]) for k in differentiated}
      cotangents = [*of_carry, *of_ys]
      found = _pull(layer_felt, primals, operands, split, cotangents, loss.devices, specs)
      # The state of the layer is not read before its gradient is there.
      found, number = jax.lax.optimization_barrier((found, number))
      grads = {path: found[i] for path, i in number_of.items()}
      pairs = zip(changing, loss.in_stacks, strict=True)
      whole = [pick(x, [path for path in x if path in own]) for x, own in pairs]
      own_states = {path: jax.tree.map(at, x) for path, x in changing[1].items()}
      seen = visit(grads, own_weights | whole[0], own_states | whole[1], number)
      write = lambda stack, x: x if x.ndim == stack.ndim else write_layer(stack, x, number)
      changing = jax.tree.map(write, changing, (seen.weights, seen.states))
      of_shared = {i: x + found[i].astype(x.dtype) for i, x in of_shared.items()}
      of_rows = {i: found[i] for i in stacks if i in active}
      rest = seen._replace(weights={}, states={})
      return ([found[i] for i in felt], of_shared, changing), (of_rows, rest)

    # Sums over layers are float32 whatever is added.
    like = {i: loss.primal(shared[i]) for i in consts if i in active}
    zeros = {i: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for i, x in like.items()}
    own = [path for path in released if path in weights]
    (of_carry, of_shared, changed), (of_rows, seen) = jax.lax.scan(
      turn,
      (given[:n_felt], zeros, (pick(weights, own), states)),
      (jnp.arange(p["length"]), kept, rows, of_ys),
      length=p["length"],
      reverse=not p["reverse"],
    )
    inputs: _Values = {}
    for i, x in (of_shared | dict(zip(felt, of_carry, strict=True)) | of_rows).items():
      if i in active:
        _add(inputs, variables[i], of_operand(i, x))
    return inputs, seen._replace(weights=changed[0], states=changed[1])

  return [made[x] for x in piece.outputs], backward


def _add(cotangents: _Values, variable: Any, x: Any) -> None:
  cotangents[variable] = cotangents[variable] + x if variable in cotangents else x


class _Tape(NamedTuple):
  """A loss that has been computed, to be gone through backwards."""

  loss: _Loss
  outputs: list[Any]
  backwards: list[_Backward]
  shapes: _Values  # Of cotangents.


def _compute(loss: _Loss, again: bool, kept_format: Callable[[str], Format | None]) -> _Tape:
  """The forward pass; `again` as in `_forward`, `kept_format` of the scan over a released stack."""
  values, backwards = dict(loss.values), []
  for piece in loss.pieces:
    if piece.released:
      format = kept_format(piece.released[0])
      outputs, backward = _forward_of_scan(loss, piece, values, format)
    else:
      outputs, backward = _forward(loss, piece, values, again)
    values |= zip(piece.outputs, outputs, strict=True)
    backwards.append(backward)
  read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
  outputs = [x.dequantize() if is_quantized(x) else x for x in map(read, loss.jaxpr.outvars)]
  return _Tape(loss, outputs, backwards, values)


def _backward(
  tape: _Tape, cotangent: jax.Array, visit: _Visit, weights: Leaves, states: dict[str, Leaves]
) -> _Seen:
  """A backward pass.

  Args:
    tape: of the forward pass.
    cotangent: of the loss.
    visit: of gradients that are complete.
    weights: by path, those that the visits change.
    states: by path of a parameter, its leaves of the optimizer's state.

  Returns:
    What the visits made, and how many of them skipped their parameters, int32.
  """
  loss, variable = tape.loss, tape.loss.jaxpr.outvars[0]
  cotangents: _Values = {variable: cotangent} if variable in loss.active else {}
  all_seen = _Seen({}, jnp.zeros([], jnp.int32), {}, {}, {})
  zeros = lambda x: jnp.zeros_like(loss.primal(tape.shapes[x]))
  own = lambda paths: {k: x for path in paths for k, x in states[path].items()}

  def joined(seen: _Seen) -> _Seen:
    return _Seen(
      all_seen.squares | seen.squares,
      all_seen.skipped + jnp.sum(seen.skipped, dtype=jnp.int32),
      all_seen.weights | seen.weights,
      all_seen.states | seen.states,
      all_seen.grads | seen.grads,
    )

  pieces = list(zip(loss.pieces, tape.backwards, loss.complete, strict=True))
  for piece, backward, paths in reversed(pieces):
    given = {x: cotangents.pop(x) for x in piece.outputs if x in cotangents}
    if given or piece.released:
      felt = [x for x in piece.outputs if x in loss.active]
      given = {x: given[x].astype(x.aval.dtype) if x in given else zeros(x) for x in felt}
      inputs, seen = backward(given, weights, own(piece.released), visit)
      for x, cotangent in inputs.items():
        _add(cotangents, x, cotangent)
      all_seen = joined(seen) if seen else all_seen
    if paths:
      variables = {path: loss.parameters[path].variables[-1] for path in paths}
      grads = {path: cotangents.pop(x, None) for path, x in variables.items()}
      grads |= {path: zeros(variables[path]) for path, g in grads.items() if g is None}
      seen = visit(grads, pick(weights, [x for x in paths if x in weights]), own(paths), None)
      # The gradients are of no more use before anything goes on.
      rest, seen = jax.lax.optimization_barrier((list(cotangents.values()), seen))
      cotangents, all_seen = dict(zip(cotangents, rest, strict=True)), joined(seen)
  return all_seen


class _Change(NamedTuple):
  """Other gradients, and what of a step they must not change."""

  factor: np.float32  # Of the gradients that change.
  same: frozenset[str]  # Leaves whose gradients stay.
  same_layer: frozenset[str]  # Stacks whose first layer's gradient stays.

  def gradient(self, path: str, grad: Any) -> Any:
    """The other gradient of a leaf."""
    if path in self.same:
      return grad
    if path in self.same_layer:
      return np.concatenate([grad[:1], self.factor * grad[1:]])
    return self.factor * grad


def _require_apart(tx: optax.GradientTransformation, params: Any) -> None:
  """Raises `ValueError` if, on a miniature, the step of a leaf or layer feels others' gradients."""
  weights = flatten(params)[0]
  stacked = frozenset(p for p, leaf in weights.items() if is_quantized(leaf) and leaf.ndim >= 3)
  changes = []
  # So large that a norm which is clipped only beyond some limit shows too, or not finite.
  for factor in (np.float32(1e4), np.float32(np.nan)):
    for bit in range(max(1, (len(weights) - 1).bit_length())):
      for side in (0, 1):  # Any two leaves differ in some bit of their numbers.
        same = frozenset(path for i, path in enumerate(weights) if i >> bit & 1 == side)
        changes.append(_Change(factor, same, frozenset()))
    changes.append(_Change(factor, frozenset(weights) - stacked, stacked))
  found = leafwise.responses(tx, params, [change.gradient for change in changes])
  if found is None:
    return
  before, *after = found
  owners = trees.owners(before, weights)
  for change, response in zip(changes, after, strict=True):
    for path, new in response.items():
      owner, old = owners[path], before[path]
      if owner in change.same_layer and new.ndim:
        new, old = new[0], old[0]
      elif owner is not None and owner not in change.same:
        continue
      if not np.array_equal(new, old, equal_nan=True):
        what = trees.leaf_name(owner) if owner else f"the optimizer's state {path!r}"
        raise ValueError(
          f"the step of {what} depends on gradients of other leaves or layers, as with"
          " optax.clip_by_global_norm, eco.adamw(max_norm=…) or optax.apply_if_finite, but gradient"
          " release never has these at one time: leave it out of the optimizer, and pass clip= and"
          " max_norm= to eco.value_and_step, which also skips gradients that are not finite"
        )


def _scale(scale: Any, *numbers: jax.Array) -> jax.Array:
  """A factor of gradients, float32; NaN, which skips a step, where a number is not finite."""
  is_finite = jnp.all(jnp.stack([jnp.isfinite(x) for x in numbers]))
  return jnp.where(is_finite, jnp.asarray(scale, jnp.float32), np.float32(np.nan))


def _clipped(scale: jax.Array, norm: jax.Array, max_norm: float | None) -> jax.Array:
  """The factor that also brings gradients of a norm, times their scale, down to `max_norm`."""
  if max_norm is None:
    return scale
  scaled = norm * jnp.abs(scale)
  clip = jnp.where(scaled < max_norm, np.float32(1), np.float32(max_norm) / scaled)
  return scale * clip


def _norm(squares: dict[str, jax.Array]) -> jax.Array:
  """The norm of the whole gradient."""
  return jnp.sqrt(sum(map(jnp.sum, squares.values())))


def _two_passes(
  one_pass: Callable[[jax.Array, Leaves, Leaves], _Seen],
  start: _Seen,
  scale: jax.Array,
  max_norm: float | None,
) -> tuple[_Seen, jax.Array]:
  """A backward pass for the norm, and one that steps by it.

  They are two turns of one loop, so that the compiler finds no array of the first pass in the
  second, and keeps none. The first has a scale of NaN, and steps nothing, bit for bit.

  Args:
    one_pass: (factor of the gradients, weights, states) → what it made.
    start: of the loop.
    scale: factor of the gradients before the clip.
    max_norm: that they are clipped to.

  Returns:
    What the second pass made, and its factor.
  """

  def turn(_: jax.Array, carry: tuple[_Seen, jax.Array, jax.Array]) -> Any:
    before, factor, _ = carry
    seen = one_pass(factor, before.weights, before.states)
    norm = _norm(seen.squares)
    return seen, _scale(_clipped(scale, norm, max_norm), norm), factor

  nan = jnp.full([], np.nan, jnp.float32)
  seen, _, factor = jax.lax.fori_loop(0, 2, turn, (start, nan, nan))
  return seen, factor


def _trace(
  fn: Callable[..., Any],
  params: Any,
  args: Any,
  dense: bool,
  sink_dtype: Any,
  devices: DataParallel | None,
) -> tuple[core.ClosedJaxpr, Any]:
  """The program of a loss, and the tree of its outputs.

  Args:
    fn: of parameters and of further arguments by number.
    params: packed and float.
    args: arrays by number, or their shapes.
    dense: whether the loss takes dense views.
    sink_dtype: of packed parameters' gradients.
    devices: one of which computes it by itself; None leaves it to the compiler.
  """

  def view(x: Any) -> Any:
    if not is_quantized(x):
      return x
    sink = jax.eval_shape(lambda: new_sink(x, sink_dtype))
    return sink if dense else dataclasses.replace(x, sink=sink)

  views = jax.eval_shape(lambda x: x, (jax.tree.map(view, params, is_leaf=is_quantized), args))
  if devices:  # Shapes that lie nowhere.
    views = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), views)
  try:
    with devices.tracing() if devices else contextlib.nullcontext():
      closed, out_tree = dense_view.trace(lambda operands: fn(*operands), views)
      closed = dense_view.inline(closed)
  except dense_view.NEEDS_VALUES as error:
    raise ValueError(
      "the loss needs the values of its arguments, as a Python `if` on one does, but gradient"
      f" release has to trace it: use eco.value_and_grad and the optimizer's update ({error})"
    ) from error
  return closed, out_tree


def _arrays(args: Any, parts: int | None, devices: DataParallel | None) -> dict[int, Any]:
  """Arrays among the leaves of arguments, by number, as they are split; none if they are not."""
  if parts is None and devices is None:
    return {}
  is_array = lambda x: isinstance(x, (jax.Array, np.ndarray))
  arrays = {i: x for i, x in enumerate(jax.tree.leaves(args)) if is_array(x)}
  shapes = [x.shape for x in arrays.values()]
  if parts is not None and (not arrays or any(shape[:1] != (parts,) for shape in shapes)):
    raise ValueError(
      f"accumulation={parts} takes arguments whose arrays all have a first axis of {parts}"
      f" micro-batches, got shapes {shapes}: reshape them, and close the loss over what all"
      " micro-batches share"
    )
  if devices is None:
    return arrays
  axis = 0 if parts is None else 1
  if not arrays or any(not shape[axis:] or shape[axis] % devices.size for shape in shapes):
    who = "groups" if devices.groups else "devices"
    raise ValueError(
      f"batch_axes take arguments whose arrays all have an axis {axis} of examples, as many for"
      f" each of {devices.size} {who}, got shapes {shapes}: reshape them, and close the loss over"
      " what all examples share"
    )
  return {i: devices.split(x[None] if parts is None else x) for i, x in arrays.items()}


def value_and_step(
  fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  dense: bool = True,
  has_aux: bool = False,
  gradient_dtype: Any = jnp.float32,
  *,
  clip: Literal["exact", "layer"] = "exact",
  max_norm: float | None = None,
  accumulation: int | None = None,
  kept_format: Format | Callable[[str], Format | None] | None = None,
  shardings: Any = None,
  batch_axes: Sequence[str] | None = None,
  reduce_dtype: Any = jnp.bfloat16,
  reduction_groups: int | None = None,
  keep_gradients: bool = False,
) -> Callable[..., Any]:
  """A training step that never holds more than one layer's gradient.

  `eco.value_and_grad`, the optimizer's update and `eco.apply_updates` in one: a parameter is
  stepped as soon as its gradient is complete, in the middle of the backward pass. Of packed
  parameters that a `jax.lax.scan` takes as a stack, each layer is stepped in place before the next
  one's gradient is made; such a scan keeps what one layer hands to the next, and makes all else
  again. Parameters of an unrolled model are stepped one layer after another; `jax.checkpoint` each
  layer. What the loss uses in several places, such as a tied embedding, is stepped at the end.

  The step gives the numbers of the ordinary step, except that sums may be in another order.
  Gradients that are not finite skip the step of their own layer, or of the leaves that are stepped
  with them, bit for bit, where the ordinary step would skip all or nothing. The optimizer still
  counts the step. A loss that is not finite changes nothing.

  Args:
    fn: a scalar function of parameters and further arguments, as in `value_and_grad`. It is traced.
    tx: an optimizer that steps each leaf, and each layer of a stack, by itself: `eco.adamw(…)`,
      `eco.layer_by_layer(…)`, `eco.low_bit_moments(…)` and others, without a clip by global norm.
    dense: as in `value_and_grad`.
    has_aux: as in `value_and_grad`.
    gradient_dtype: as in `value_and_grad`.
    clip: how gradients are clipped to `max_norm`. `"exact"`: by the norm of the whole gradient, for
      which a first backward pass is made. `"layer"`: those of each layer, or of the leaves that are
      stepped together, by their own norm. To clip by the norm of the step before, which costs
      nothing, pass `gradient_scale=jnp.minimum(1, max_norm / report.norm)`.
    max_norm: None does not clip.
    accumulation: a number of micro-batches, along a first axis of all arrays among the further
      arguments of the step. The value is the mean over them, `aux` has their axis. They are the
      inner loop: what layers hand on is kept for all, and the gradient of one layer is summed over
      them in float32 and stepped. None is for one batch without such an axis.
    kept_format: of what a released scan keeps of the floats that one layer hands to the next, such
      as `eco.FP8_TOKEN`: the backward pass makes a layer again from the rounded values. Arrays with
      one axis or none are kept as they are, and so is all with None. Or a function of a stack's
      path that says so for the scan over it.
    shardings: a tree of the parameters' NamedShardings on a mesh. Gradients are summed into the
      parts that devices own, and each device does the step of its own part.
    batch_axes: names of the mesh's axes that examples are split over, all of them with several
      devices. The first axis of all arrays among the further arguments, or the second with
      `accumulation`, is then one of examples, of whose values the loss must be the mean. Each
      device computes with its own examples by itself: it gathers the codes of a layer once for the
      forward pass and once for the backward pass, and the devices sum a gradient once, behind the
      last micro-batch. `aux` has a further axis, of devices. None leaves it to the compiler, which
      gathers and sums for each micro-batch.
    reduce_dtype: of the gradients of two axes and more that `batch_axes` have summed over devices.
    reduction_groups: parts of a micro-batch, a multiple of the devices that `batch_axes` split it
      over. Each group is computed by itself, and gradients are summed in the groups' order, so that
      any number of devices takes the same step, bit for bit, where the compiler makes the same
      program of it, as XLA does from two devices on. Each device then holds one layer's gradients
      of all its groups, and gathers gradients for their norm. `aux` has a further axis of groups,
      not of devices.
    keep_gradients: takes all steps at the end, as the ordinary step does, so that an exact clip
      needs no first backward pass. Each device then holds its part of all gradients, those of
      packed parameters in the wider one of `gradient_dtype` and `reduce_dtype`. On a mesh that
      splits parameters these parts are small. A gradient that is not finite skips the whole step.

  Returns:
    A function `step(params, state, *args, gradient_scale=None, **kwargs)` that returns `(value,
    params, state, report)`; value is `(value, aux)` with `has_aux`. Donate `params` and `state` to
    the `jax.jit` around it. Gradients are multiplied by `gradient_scale` before all else; one that
    is not finite skips the step. The `Report` has `norm`, of the whole gradient as it was before,
    `skipped`, the number of layers or leaves that were skipped, and `norms` by path of a parameter.

  Raises:
    ValueError: when traced, naming the leaf, if its step depends on other leaves or layers; if the
      loss needs the values of parameters, or is not one real number; and as `value_and_grad`.

  Example:
    >>> import jax, jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"blocks": jnp.ones((12, 4, 4))}, eco.FP8)
    >>> def loss_fn(params, x):
    ...   x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["blocks"])
    ...   return jnp.mean(x**2)
    >>> tx = eco.adamw(1e-3)
    >>> step = jax.jit(eco.value_and_step(loss_fn, tx, max_norm=1.0), donate_argnums=(0, 1))
    >>> value, params, state, report = step(params, tx.init(params), jnp.ones((2, 4)))
    >>> report.norms["blocks"].shape, int(report.skipped)
    ((12,), 0)

  References:
    Lv et al, `Full Parameter Fine-tuning for Large Language Models with Limited Resources
    <https://arxiv.org/abs/2306.09782>`_, 2023 (LOMO).
  """
  if clip not in ("exact", "layer"):
    raise ValueError(f"clip must be 'exact' or 'layer', got {clip!r}")
  if max_norm is not None:
    require_scalar("max_norm", max_norm)
  if keep_gradients and clip == "layer":
    raise ValueError("clip='layer' and keep_gradients exclude each other: leave one of them out")
  checked: set[Any] = set()
  kept_dtype = max(map(jnp.dtype, (gradient_dtype, reduce_dtype)), key=lambda x: x.itemsize)
  sink_dtype = jnp.float32 if dense else gradient_dtype

  def step(
    params: Any, state: Any, *args: Any, gradient_scale: Any = None, **kwargs: Any
  ) -> tuple[Any, Any, Any, Report]:
    trees.map_with_path(require_floats, params, is_leaf=is_quantized)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    key = jax.tree.structure(params), tuple(jax.tree.leaves(shapes))
    if key not in checked:
      _require_apart(tx, params)
      checked.add(key)
    (weights, treedef), (states, state_treedef) = flatten(params), flatten(state)
    optimizer = leafwise.Optimizer(tx, params, params, state, {})
    owned = optimizer.owned()
    shared = pick(states, owned[None])
    places = flatten(shardings)[0]

    def is_stack(path: str, layers: int) -> bool:
      arrays = jax.tree.leaves(pick(states, owned[path]))
      return all(x.ndim and x.shape[0] == layers for x in arrays)

    places = {path: x.qvalue if is_quantized(x) else x for path, x in places.items()}
    specs = {path: place.spec for path, place in places.items()}

    def placed(path: str, grad: jax.Array, layer: Any) -> jax.Array:
      """A gradient as its parameter is split over devices."""
      if path not in places:
        return grad
      spec = specs[path] if layer is None else _of_layer(specs[path])
      return jax.lax.with_sharding_constraint(grad, NamedSharding(places[path].mesh, spec))

    devices = None
    if batch_axes is not None:
      of = jax.tree.leaves(shardings)
      devices = data_parallel(of, batch_axes, reduce_dtype, reduction_groups)
    elif reduction_groups is not None:
      raise ValueError("reduction_groups needs batch_axes, the axes that examples are split over")
    arrays = _arrays((args, kwargs), accumulation, devices)
    parts: tuple[int, ...] = () if accumulation is None else (accumulation,)
    if devices:
      parts = (accumulation or 1, devices.size)
    arg_leaves, args_treedef = jax.tree.flatten((args, kwargs))

    def call(params: Any, arrays: dict[int, Any]) -> Any:
      filled = [arrays.get(i, x) for i, x in enumerate(arg_leaves)]
      own_args, own_kwargs = jax.tree.unflatten(args_treedef, filled)
      return fn(params, *own_args, **own_kwargs)

    one = {i: jax.eval_shape(lambda x: x[(0,) * len(parts)], x) for i, x in arrays.items()}
    closed, out_tree = _trace(call, params, one, dense, sink_dtype, devices)
    out = closed.out_avals[0]
    if out.shape or not jnp.issubdtype(out.dtype, jnp.floating):
      raise ValueError(f"the loss must be one real number, got {out}: sum it, or set has_aux")
    is_exact = max_norm is not None and clip == "exact"
    traced = closed, weights, dense, sink_dtype
    loss = _cut(*traced, is_stack, list(arrays.values()), parts, devices, specs)
    loss = loss._replace(in_stacks=optimizer.in_stacks())
    of_scan = kept_format if callable(kept_format) else lambda path: kept_format
    tape = _compute(loss, (is_exact and not keep_gradients) or bool(parts), of_scan)
    outputs = list(tape.outputs)
    cotangent = jnp.ones_like(outputs[0])
    if loss.jaxpr.outvars[0] in loss.split:
      cotangent = cotangent / np.asarray(math.prod(parts), cotangent.dtype)
      outputs[0] = devices.whole(jnp.mean, outputs[0]) if devices else jnp.mean(outputs[0])
    scale = _scale(1.0 if gradient_scale is None else gradient_scale, outputs[0])

    def seen(grads: Leaves, layer: Any) -> tuple[Leaves, dict[str, jax.Array]]:
      """Gradients as the optimizer gets them, and their squared norms."""
      # Sums over micro-batches stay in float32.
      is_cast = lambda path: is_quantized(weights[path]) and not parts
      cast = lambda path, g: g.astype(gradient_dtype) if is_cast(path) else g
      grads = {path: placed(path, cast(path, g), layer) for path, g in grads.items()}
      square = lambda g: jnp.sum(jnp.square(g.astype(jnp.float32)))
      squares = lambda grads: jax.tree.map(square, grads)
      return grads, devices.whole(squares, grads) if devices else squares(grads)

    def visit(
      scale: jax.Array, grads: Leaves, weights: Leaves, states: Leaves, layer: Any
    ) -> _Seen:
      grads, squares = seen(grads, layer)
      total = jnp.sum(jnp.stack(list(squares.values())))
      own = _clipped(scale, jnp.sqrt(total), max_norm if clip == "layer" else None)
      own = _scale(own, total)
      context = Context(layer, shardings, own)
      updates, new_states = optimizer.step(grads, weights, shared | states, context)
      new_weights = {path: apply_updates(leaf, updates[path]) for path, leaf in weights.items()}
      return _Seen(squares, ~jnp.isfinite(own), new_weights, pick(new_states, states), {})

    kept = lambda path, g: g.astype(kept_dtype) if is_quantized(weights[path]) else g

    def keep(grads: Leaves, given: Leaves, states: Leaves, layer: Any) -> _Seen:
      """Leaves all steps to be taken at the end; skipped are all of them, or none."""
      grads, squares = seen(grads, layer)
      return _Seen(squares, jnp.ones([], bool), {}, {}, {k: kept(k, g) for k, g in grads.items()})

    def one_pass(scale: jax.Array, weights: Leaves, states: Leaves) -> _Seen:
      by_owner = {path: pick(states, owned[path]) for path in weights}
      return _backward(tape, cotangent, functools.partial(visit, scale), weights, by_owner)

    released = {path for piece in loss.pieces for path in piece.released}
    stepped = set() if keep_gradients else released.union(*loss.complete)
    # In the order of the tree: a set's would change from process to process, and the program too.
    used = {path: leaf for path, leaf in weights.items() if path in stepped}
    used_states = pick(states, [x for path in used for x in owned[path]])
    if keep_gradients:
      done = _backward(tape, cotangent, keep, {}, {path: {} for path in weights})
      norm = _norm(done.squares)
      scale = _scale(_clipped(scale, norm, max_norm), norm)
      done = done._replace(skipped=jnp.where(jnp.isfinite(scale), 0, done.skipped))
    elif is_exact:
      axes = {path: weights[path].shape[:1] if path in released else () for path in used}
      squares = {path: jnp.zeros(shape, jnp.float32) for path, shape in axes.items()}
      start = _Seen(squares, jnp.zeros([], jnp.int32), used, used_states, {})
      done, scale = _two_passes(one_pass, start, scale, max_norm)
    else:
      done = one_pass(scale, used, used_states)

    # What has not been stepped, such as what the loss does not use, and what all parameters share,
    # such as the count of steps.
    others = pick(weights, [path for path in weights if path not in used])
    grads = {path: jnp.zeros_like(loss.primal(leaf)) for path, leaf in others.items()} | done.grads
    rest = pick(states, [x for path in (None, *others) for x in owned[path]])
    updates, new_states = optimizer.step(grads, others, rest, Context(None, shardings, scale))
    new_weights = {path: apply_updates(leaf, updates[path]) for path, leaf in others.items()}
    new_weights, new_states = done.weights | new_weights, done.states | new_states
    squares = {path: done.squares.get(path, jnp.zeros([], jnp.float32)) for path in weights}
    norms = {path: jnp.sqrt(x) for path, x in squares.items()}
    if devices and accumulation is None:
      outputs[1:] = [
        jnp.squeeze(x, 0) if out in loss.split else x
        for x, out in zip(outputs[1:], loss.jaxpr.outvars[1:], strict=True)
      ]
    return (
      jax.tree.unflatten(out_tree, outputs),
      jax.tree.unflatten(treedef, [new_weights[path] for path in weights]),
      jax.tree.unflatten(state_treedef, [new_states[path] for path in states]),
      Report(_norm(squares), done.skipped, norms),
    )

  return step
