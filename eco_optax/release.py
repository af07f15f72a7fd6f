"""Gradient release: a training step in which no more than one layer's gradient exists.

The loss is traced once and cut into pieces: each scan over a stack of layers by itself, all else
before each equation that is the first to use a parameter. The backward pass goes through the pieces
by hand, the last first. Behind the piece that uses a parameter first its gradient is complete, and
its step is taken. The backward pass of a scan is a loop that steps each layer in place in its stack
and hands the cotangent on.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from eco_optax import dense_view, trees
from eco_optax.quantized_array import dequantize, is_quantized
from eco_optax.transforms import leafwise
from eco_optax.transforms.leafwise import Leaves, flatten, pick
from eco_optax.transforms.packed import Context, require_params
from eco_optax.transforms.stacks import write_layer
from eco_optax.updates import apply_updates, new_sink, require_floats, value_and_grad

_Values = dict[Any, Any]  # By variable of the loss's program.


class Report(NamedTuple):
  """What a step saw of the gradients, before they were scaled or clipped."""

  norm: jax.Array  # float32 scalar: Euclidean norm of the whole gradient.
  skipped: jax.Array  # int32 scalar: how many layers or leaves were not stepped, see below.
  # By path of a parameter: the norm of its gradient, float32; of a stack, one for each layer.
  norms: dict[str, jax.Array]


class _Parameter(NamedTuple):
  """A parameter of a traced loss."""

  value: Any  # Packed, without a sink, or float.
  variables: tuple[Any, ...]  # Of its arrays; the cotangent of the last is its gradient.

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
  values: _Values  # Of its constants and parameters.
  parameters: dict[str, _Parameter]
  pieces: list[_Piece]
  complete: list[list[str]]  # Parameters whose gradients are complete once a piece is passed.
  active: set[Any]  # Variables that have cotangents, since they depend on parameters.
  sink_dtype: Any

  def primal(self, x: Any) -> Any:
    """What is differentiated in place of a value: a packed one's is its sink."""
    return new_sink(x, self.sink_dtype) if is_quantized(x) else x


def _with_primal(x: Any, primal: Any) -> Any:
  return dataclasses.replace(x, sink=primal) if is_quantized(x) else primal


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
) -> _Loss:
  """Cuts a loss into pieces.

  Args:
    closed: its program, of the arrays of parameters and sinks, or of dense views.
    params: by path, packed ones without a sink.
    dense: whether it is of dense views.
    sink_dtype: of packed parameters' gradients.
    is_stack: whether the optimizer's state at the path of a parameter has so many layers.
  """
  jaxpr = closed.jaxpr
  values: _Values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  invars, parameters = iter(jaxpr.invars), {}
  for path, value in params.items():
    if not is_quantized(value) or dense:
      parameter = _Parameter(value, (next(invars),))
    else:
      arrays = [*jax.tree.leaves(value), new_sink(value, sink_dtype)]
      parameter = _Parameter(value, tuple(next(invars) for _ in arrays))
    if len(parameter.variables) == 1:
      arrays = [value]
    values |= zip(parameter.variables, arrays, strict=True)
    parameters[path] = parameter
  uses = collections.Counter(_variables(jaxpr.eqns))
  uses.update(x for x in jaxpr.outvars if not isinstance(x, core.Literal))

  def released(eqn: core.JaxprEqn) -> list[str]:
    """Stacks that a scan has for itself, one layer in each turn."""
    if eqn.primitive.name != "scan":
      return []
    stacks = eqn.invars[eqn.params["num_consts"] + eqn.params["num_carry"] :]

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
  groups: list[tuple[list[core.JaxprEqn], list[str]]] = []
  first: dict[str, int] = {}
  for eqn in jaxpr.eqns:
    own = released(eqn)
    used = [gradients[x] for x in _variables([eqn]) if x in gradients]
    if not groups or own or groups[-1][1] or set(used) - set(first):
      groups.append(([], own))
    groups[-1][0].append(eqn)
    first |= {path: len(groups) - 1 for path in used if path not in first}

  pieces: list[_Piece] = []
  for eqns, own in groups:
    made, inside = [x for eqn in eqns for x in eqn.outvars], collections.Counter(_variables(eqns))
    inputs = [x for x in inside if x not in set(made)]
    outputs = [x for x in made if uses[x] > inside[x]]
    pieces.append(_Piece(eqns, inputs, outputs, own))
  complete: list[list[str]] = [[] for _ in pieces]
  for path, number in first.items():
    if path not in pieces[number].released:
      complete[number].append(path)

  active: set[Any] = set(gradients)
  for eqn in jaxpr.eqns:
    if any(x in active for x in _variables([eqn])):
      active |= {x for x in eqn.outvars if _is_float(x.aval)}
  return _Loss(jaxpr, values, parameters, pieces, complete, active, sink_dtype)


# (gradients, weights and states of some parameters or of one layer of them, the number of this
# layer) → new weights and states, perhaps none; squared norms of the gradients
_Visit = Callable[..., tuple[tuple[Leaves, Leaves], dict[str, jax.Array]]]

# (cotangents of outputs by variable, visit, weights and states of released stacks to change)
# → cotangents of inputs, the stacks, squared norms by layer
_Backward = Callable[
  [_Values, _Visit, tuple[Leaves, Leaves]],
  tuple[_Values, tuple[Leaves, Leaves], dict[str, jax.Array]],
]


def _forward(loss: _Loss, piece: _Piece, values: _Values) -> tuple[list[Any], _Backward]:
  """A piece's outputs, and its backward pass."""
  jaxpr = loss.jaxpr.replace(
    constvars=[], invars=piece.inputs, outvars=piece.outputs, eqns=piece.eqns
  )
  given = [x for x in piece.inputs if x in loss.active]
  is_active = [x in loss.active for x in piece.outputs]

  def fn(primals: list[Any]) -> tuple[list[Any], list[Any]]:
    """Outputs that have cotangents, and all."""
    operands = values | {
      x: _with_primal(values[x], primal) for x, primal in zip(given, primals, strict=True)
    }
    outputs = dense_view.evaluate(jaxpr, (), [operands[x] for x in piece.inputs])
    return [y for y, active in zip(outputs, is_active, strict=True) if active], outputs

  _, vjp, outputs = jax.vjp(fn, [loss.primal(values[x]) for x in given], has_aux=True)

  def backward(cotangents: _Values, visit: _Visit, stacks: tuple[Leaves, Leaves]) -> Any:
    del visit
    (inputs,) = vjp([cotangents[x] for x in piece.outputs if x in loss.active])
    return dict(zip(given, inputs, strict=True)), stacks, {}

  return outputs, backward


def _forward_of_scan(loss: _Loss, piece: _Piece, values: _Values) -> tuple[list[Any], _Backward]:
  """The outputs of a scan over released stacks, and its backward pass.

  Kept is what one layer hands to the next; all else is made again.
  """
  (eqn,) = piece.eqns
  p, closed = eqn.params, eqn.params["jaxpr"]
  first_carry, first_stack = p["num_consts"], p["num_consts"] + p["num_carry"]
  released = pick(loss.parameters, piece.released)
  weights = {path: parameter.value for path, parameter in released.items()}

  # Operands by their place in the equation, those of released stacks apart.
  place = {x: i for i, x in enumerate(eqn.invars) if not isinstance(x, core.Literal)}
  places = {path: [place.get(x) for x in own.variables] for path, own in released.items()}
  taken = {i for own in places.values() for i in own}

  def operand(i: int, x: Any) -> Any:
    value = x.val if isinstance(x, core.Literal) else values[x]
    keeps_codes = i < first_carry or (i >= first_stack and dense_view.is_stack(value))
    return value.dequantize() if is_quantized(value) and not keeps_codes else value

  given = {i: operand(i, x) for i, x in enumerate(eqn.invars) if i not in taken}
  consts, carry, xs = (
    {i: x for i, x in given.items() if i in places}
    for places in (
      range(first_carry), range(first_carry, first_stack), range(first_stack, len(eqn.invars))
    )
  )  # fmt: skip
  new_sinks = lambda weights: {path: loss.primal(leaf) for path, leaf in weights.items()}

  def body(operands: dict[int, Any], weights: Leaves, sinks: Leaves) -> list[Any]:
    """One layer."""
    operands = dict(operands)
    for path, own in released.items():
      arrays = own.operands(weights[path], sinks[path])
      operands |= {i: x for i, x in zip(places[path], arrays, strict=True) if i is not None}
    ordered = [operands[i] for i in range(len(eqn.invars))]
    return dense_view.evaluate(closed.jaxpr, closed.consts, ordered)

  def turn(carry: dict[int, Any], x: Any) -> tuple[Any, Any]:
    xs, weights = x
    outputs = body(consts | carry | xs, weights, new_sinks(weights))
    new_carry = dict(zip(carry, outputs, strict=False))
    return new_carry, (carry, outputs[len(carry) :])

  how = {"length": p["length"], "reverse": p["reverse"]}
  last, (kept, ys) = jax.lax.scan(turn, carry, (xs, weights), **how)
  made = dict(zip(eqn.outvars, [*last.values(), *ys], strict=True))

  outvars = [x for x in eqn.outvars if _is_float(x.aval)]
  is_active = lambda i: eqn.invars[i] in loss.active if i in place.values() else False
  differentiated = [i for i in (*consts, *xs) if is_active(i)]
  differentiated += [i for i, x in carry.items() if _is_float(x)]

  def backward(cotangents: _Values, visit: _Visit, stacks: tuple[Leaves, Leaves]) -> Any:
    of_outputs = [
      cotangents[x] if x in cotangents else jnp.zeros_like(made[x]) for x in outvars
    ]
    n_carry = sum(map(_is_float, carry.values()))

    def turn(state: Any, x: Any) -> tuple[Any, Any]:
      of_carry, of_consts, stacks = state
      i, (carry, xs), of_ys = x
      at = lambda stack: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
      own_weights, own_states = jax.tree.map(at, (weights | stacks[0], stacks[1]))
      operands = consts | carry | xs

      def fn(primals: dict[int, Any], sinks: Leaves) -> list[Any]:
        changed = {i: _with_primal(operands[i], x) for i, x in primals.items()}
        outputs = body(operands | changed, own_weights, sinks)
        return [y for y, x in zip(outputs, eqn.outvars, strict=True) if _is_float(x.aval)]

      primals = {i: loss.primal(operands[i]) for i in differentiated}
      _, vjp = jax.vjp(fn, primals, new_sinks(own_weights))
      of_operands, grads = vjp([*of_carry, *of_ys])
      new, squares = visit(grads, own_weights, own_states, i)
      stacks = jax.tree.map(lambda stack, x: write_layer(stack, x, i), stacks, new)
      of_consts = {k: x + of_operands[k] for k, x in of_consts.items()}
      of_carry = [of_operands[k] for k in carry if k in of_operands]
      return (of_carry, of_consts, stacks), (pick(of_operands, [k for k in xs if is_active(k)]), squares)

    zeros = {i: jnp.zeros_like(loss.primal(x)) for i, x in consts.items() if is_active(i)}
    (of_carry, of_consts, stacks), (of_xs, squares) = jax.lax.scan(
      turn,
      (of_outputs[:n_carry], zeros, stacks),
      (jnp.arange(p["length"]), (kept, xs), of_outputs[n_carry:]),
      length=p["length"],
      reverse=not p["reverse"],
    )
    floats = [i for i, x in carry.items() if _is_float(x)]
    by_place = of_consts | dict(zip(floats, of_carry, strict=True)) | of_xs
    inputs: _Values = {}
    for i, x in by_place.items():
      if is_active(i):
        _add(inputs, eqn.invars[i], x)
    return inputs, stacks, squares

  return [made[x] for x in piece.outputs], backward


def _add(cotangents: _Values, variable: Any, x: Any) -> None:
  cotangents[variable] = cotangents[variable] + x if variable in cotangents else x


class _Tape(NamedTuple):
  """A loss that has been computed, to be gone through backwards."""

  loss: _Loss
  outputs: list[Any]
  backwards: list[_Backward]
  zeros: Callable[[Any], jax.Array]  # The cotangent of a variable that the value does not feel.


def _compute(loss: _Loss) -> _Tape:
  """The forward pass."""
  values, backwards = dict(loss.values), []
  for piece in loss.pieces:
    forward = _forward_of_scan if piece.released else _forward
    outputs, backward = forward(loss, piece, values)
    values |= zip(piece.outputs, outputs, strict=True)
    backwards.append(backward)
  read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
  outputs = [
    x.dequantize() if is_quantized(x) else x for x in map(read, loss.jaxpr.outvars)
  ]
  return _Tape(loss, outputs, backwards, lambda x: jnp.zeros_like(loss.primal(values[x])))


class _Passed(NamedTuple):
  """What a backward pass leaves."""

  weights: Leaves  # New ones, of parameters whose gradients the pass met.
  states: Leaves
  squares: dict[str, jax.Array]  # Squared norms of gradients, of released stacks by layer.
  skipped: jax.Array  # int32: groups that were met together, and whose norm is not finite.


def _backward(
  tape: _Tape, cotangent: jax.Array, visit: _Visit, weights: Leaves, states: dict[str, Leaves]
) -> _Passed:
  """A backward pass.

  Args:
    tape: of the forward pass.
    cotangent: of the loss.
    visit: of complete gradients.
    weights: to be changed on the visit; none if it changes nothing.
    states: by path of a parameter, its leaves of the optimizer's state.
  """
  loss = tape.loss
  cotangents: _Values = {}
  if loss.jaxpr.outvars[0] in loss.active:
    cotangents[loss.jaxpr.outvars[0]] = cotangent
  new_weights, new_states, squares, skipped = {}, {}, {}, jnp.zeros([], jnp.int32)

  def of(paths: Sequence[str]) -> tuple[Leaves, Leaves]:
    own = [path for path in paths if path in weights]
    return pick(weights, own), {k: x for path in own for k, x in states[path].items()}

  for piece, backward, paths in reversed(
    list(zip(loss.pieces, tape.backwards, loss.complete, strict=True))
  ):
    outputs = {x: cotangents.pop(x) for x in piece.outputs if x in cotangents}
    if outputs or piece.released:
      missing = [x for x in piece.outputs if x in loss.active and x not in outputs]
      outputs |= {x: tape.zeros(x) for x in missing}
      inputs, done, own_squares = backward(outputs, visit, of(piece.released))
      for x, cotangent in inputs.items():
        _add(cotangents, x, cotangent)
      if own_squares:
        new_weights, new_states = new_weights | done[0], new_states | done[1]
        squares |= own_squares
        skipped += jnp.sum(~jnp.isfinite(sum(own_squares.values())), dtype=jnp.int32)
    if not paths:
      continue
    handles = {path: loss.parameters[path].variables[-1] for path in paths}
    grads = {
      path: cotangents.pop(x) if x in cotangents else tape.zeros(x) for path, x in handles.items()
    }
    done, own_squares = visit(grads, *of(paths), None)
    skipped += (~jnp.isfinite(sum(own_squares.values()))).astype(jnp.int32)
    # Nothing behind goes on before these gradients are of no more use.
    rest, done, own_squares = jax.lax.optimization_barrier(
      (list(cotangents.values()), done, own_squares)
    )
    cotangents = dict(zip(cotangents, rest, strict=True))
    new_weights, new_states = new_weights | done[0], new_states | done[1]
    squares |= own_squares
  return _Passed(new_weights, new_states, squares, skipped)


def _finite_or_nan(scale: jax.Array, *of: jax.Array) -> jax.Array:
  """A factor of gradients that skips the step, where one of some numbers is not finite."""
  is_finite = jnp.all(jnp.stack([jnp.isfinite(x) for x in of]))
  return jnp.where(is_finite, scale, np.float32(np.nan))


def value_and_step(
  fn: Callable[..., Any],
  tx: optax.GradientTransformation,
  dense: bool = True,
  has_aux: bool = False,
  gradient_dtype: Any = jnp.float32,
) -> Callable[..., Any]:
  """TODO."""

  checked = set()

  def step(
    params: Any, state: Any, *args: Any, gradient_scale: Any = None, **kwargs: Any
  ) -> tuple[Any, Any, Any, Report]:
    trees.map_with_path(require_floats, params, is_leaf=is_quantized)
    weights, treedef = flatten(params)
    states, state_treedef = flatten(state)
    optimizer = leafwise.Optimizer(tx, params, params, state, {})
    owned = optimizer.owned()
    shared = pick(states, owned[None])
    own_states = {path: pick(states, owned[path]) for path in weights}
    sink_dtype = jnp.float32 if dense else gradient_dtype

    def is_stack(path: str, layers: int) -> bool:
      arrays = jax.tree.leaves(own_states[path])
      return all(x.ndim and x.shape[0] == layers for x in arrays)

    shapes = jax.eval_shape(lambda x: x, params)
    if dense:
      shapes = jax.eval_shape(dequantize, shapes)
    else:
      sink = lambda x: dataclasses.replace(x, sink=jax.ShapeDtypeStruct(x.shape, gradient_dtype))
      shapes = jax.tree.map(
        lambda x: sink(x) if is_quantized(x) else x, shapes, is_leaf=is_quantized
      )
    closed, out_tree = dense_view.trace(lambda params: fn(params, *args, **kwargs), shapes)
    loss = _cut(dense_view.inline(closed), weights, dense, sink_dtype, is_stack)
    tape = _compute(loss)
    value = tape.outputs[0]
    scale = jnp.ones([], jnp.float32) if gradient_scale is None else gradient_scale
    scale = _finite_or_nan(jnp.asarray(scale, jnp.float32), value)

    def visit(grads: Leaves, weights: Leaves, states: Leaves, layer: Any) -> Any:
      cast = lambda path, g: g.astype(gradient_dtype) if is_quantized(weights[path]) else g
      grads = {path: cast(path, g) for path, g in grads.items()}
      squares = {path: jnp.sum(jnp.square(g.astype(jnp.float32))) for path, g in grads.items()}
      context = Context(layer, None, _finite_or_nan(scale, sum(squares.values())))
      updates, new_states = optimizer.step(grads, weights, shared | states, context)
      new = {path: apply_updates(leaf, updates[path]) for path, leaf in weights.items()}
      return (new, pick(new_states, states)), squares

    passed = _backward(tape, jnp.ones_like(value), visit, weights, own_states)
    unused = [path for path in weights if path not in passed.squares]
    zeros = {path: jnp.zeros_like(loss.primal(weights[path])) for path in unused}
    updates, last = optimizer.step(
      zeros, pick(weights, unused), shared | {k: x for path in unused for k, x in own_states[path].items()},
      Context(None, None, scale),
    )
    new_weights = passed.weights | {path: apply_updates(weights[path], updates[path]) for path in unused}
    new_states = passed.states | last
    squares = passed.squares | {path: jnp.zeros([], jnp.float32) for path in unused}
    norms = {path: jnp.sqrt(squares[path]) for path in weights}
    total = jnp.sqrt(sum(map(jnp.sum, squares.values())))
    report = Report(total, passed.skipped, norms)
    result = jax.tree.unflatten(out_tree, tape.outputs)
    return (
      result,
      jax.tree.unflatten(treedef, [new_weights[path] for path in weights]),
      jax.tree.unflatten(state_treedef, [new_states[path] for path in states]),
      report,
    )

  return step
