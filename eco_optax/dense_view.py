"""The dense view of packed weights, made where a function uses it and not before.

A float32 view of all weights is four bytes per parameter if it has to wait: what a `jax.checkpoint`
takes as an argument is kept for the backward pass, and what a `lax.scan` takes has all its layers.
Here packed weights go into both, and are dequantized inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

from eco_optax.quantized_array import dequantize, is_quantized

# Names of primitives, in all versions of JAX.
_JIT, _CHECKPOINT = ("jit", "pjit"), ("checkpoint", "remat2")

# (equation, its operands) → its outputs; None: the equation takes dense operands.
_Rule = Callable[[core.JaxprEqn, list[Any]], list[Any] | None]

# Of functions that run on the values of their arguments, which have none while they are traced.
NEEDS_VALUES = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)


def dense(x: Any) -> Any:
  """`x` as a function of dense weights knows it; the gradient of a packed leaf is its sink's."""
  return x.dequantize() if is_quantized(x) else x


def apply(fn: Callable[[Any], Any], params: Any) -> Any:
  """`fn(dequantize(params))`, without the dense view of a leaf that `fn` does not need at once.

  Args:
    fn: of parameters, written for dense ones.
    params: packed leaves have a float32 `sink`, which collects the gradient of their dense view.

  Returns:
    What `fn` returns. A function that needs the values of its arguments, such as one with a Python
    `if` on a weight, gets the dense view itself.
  """
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
  try:
    closed, out_tree = trace(fn, jax.eval_shape(dequantize, params))
  except NEEDS_VALUES:
    return fn(jax.tree.unflatten(treedef, map(dense, leaves)))
  return jax.tree.unflatten(out_tree, evaluate(closed.jaxpr, closed.consts, leaves))


def trace(fn: Callable[[Any], Any], params: Any) -> tuple[core.ClosedJaxpr, Any]:
  """The program of `fn(params)`, whose arguments are the leaves of `params`; and the output's tree.

  Raises:
    One of `NEEDS_VALUES`, if `fn` is no function of shapes.
  """
  leaves, treedef = jax.tree.flatten(params)
  returned = []

  def flat(*leaves: Any) -> list[Any]:
    outputs, out_tree = jax.tree.flatten(fn(jax.tree.unflatten(treedef, leaves)))
    returned.append(out_tree)
    return outputs

  return jax.make_jaxpr(flat)(*leaves), returned[0]


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
  """A program in which the bodies of `jax.jit` with a checkpoint or a scan stand in its own."""
  rules: dict[str, _Rule] = {}
  rules |= dict.fromkeys(_JIT, lambda eqn, operands: _body(eqn, operands, rules))
  fn = lambda *args: evaluate(closed.jaxpr, closed.consts, args, rules)
  return jax.make_jaxpr(fn)(*(x.aval for x in closed.jaxpr.invars))


def evaluate(
  jaxpr: core.Jaxpr,
  consts: Sequence[Any],
  args: Sequence[Any],
  rules: dict[str, _Rule] | None = None,
) -> list[Any]:
  """The outputs of a function that was traced with dense arguments; some are given packed.

  Args:
    jaxpr: of the function.
    consts: of its constants.
    args: of it.
    rules: by primitive; None are those for packed operands.
  """
  rules = _RULES if rules is None else rules
  values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)
  views: dict[Any, jax.Array] = {}

  def read(x: Any) -> Any:
    return x.val if isinstance(x, core.Literal) else values[x]

  def read_dense(x: Any) -> Any:
    if not is_quantized(value := read(x)):
      return value
    if x not in views:
      views[x] = dense(value)
    return views[x]

  for eqn in jaxpr.eqns:
    operands = [read(x) for x in eqn.invars]
    rule = rules.get(eqn.primitive.name)
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack):
      outputs = rule and rule(eqn, operands)
    if outputs is None:
      needed = list(dict.fromkeys(x for x in eqn.invars if not isinstance(x, core.Literal)))
      alone = jaxpr.replace(constvars=[], invars=needed, outvars=eqn.outvars, eqns=[eqn])
      outputs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*map(read_dense, needed))
    values |= zip(eqn.outvars, outputs, strict=True)
  return [read_dense(x) for x in jaxpr.outvars]


def _checkpoint(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
  """A `jax.checkpoint` that keeps codes."""
  if not any(map(is_quantized, operands)):
    return None
  fn = lambda *operands: evaluate(eqn.params["jaxpr"], (), operands)
  options = {key: eqn.params[key] for key in ("policy", "prevent_cse")}
  return jax.checkpoint(fn, **options)(*operands)


def _scan(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
  """A `lax.scan` that dequantizes one layer at a time."""
  if not any(map(is_quantized, operands)):
    return None
  p, closed = eqn.params, eqn.params["jaxpr"]
  first_carry, first_x = scan_ends(eqn)
  consts, carry, xs = operands[:first_carry], operands[first_carry:first_x], operands[first_x:]

  def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
    outputs = evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *xs])
    return outputs[: len(carry)], outputs[len(carry) :]

  xs = [x if is_stack(x) else dense(x) for x in xs]
  options = {key: p[key] for key in ("length", "reverse", "unroll")}
  carry, ys = jax.lax.scan(body, [dense(x) for x in carry], xs, **options)
  return [*carry, *ys]


def scan_ends(eqn: core.JaxprEqn) -> tuple[int, int]:
  """Numbers of the first carried operand of a `lax.scan`'s equation, and of the first stacked one.

  Versions of JAX write them into the equation in ways of their own. In all of them the body has
  one axis less of what is stacked, and carried are the outputs that are not.
  """
  body = eqn.params["jaxpr"]
  stacked = lambda outer, inner: [
    x.aval.ndim > aval.ndim for x, aval in zip(outer, inner, strict=True)
  ]
  first_stack = stacked(eqn.invars, body.in_avals).count(False)
  return first_stack - stacked(eqn.outvars, body.out_avals).count(False), first_stack


def is_stack(x: Any) -> bool:
  """Whether the first axis of a leaf is one of all its arrays, so that its layers are leaves."""
  return not is_quantized(x) or (
    x.ndim >= 3 and all(array.shape[:1] == x.shape[:1] for array in jax.tree.leaves(x))
  )


def _jit(eqn: core.JaxprEqn, operands: list[Any]) -> list[Any] | None:
  """A `jax.jit` with packed operands, if it has a checkpoint or a scan."""
  return _body(eqn, operands, _RULES) if any(map(is_quantized, operands)) else None


def _body(eqn: core.JaxprEqn, operands: list[Any], rules: dict[str, _Rule]) -> list[Any] | None:
  """The body of a `jax.jit`, if it has a checkpoint or a scan and lies nowhere in particular."""
  closed = eqn.params["jaxpr"]
  placed = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
  if any(isinstance(x, jax.sharding.Sharding) for x in placed) or not _has_layers(closed.jaxpr):
    return None
  return evaluate(closed.jaxpr, closed.consts, operands, rules)


def _has_layers(jaxpr: core.Jaxpr) -> bool:
  names = {eqn.primitive.name for eqn in jaxpr.eqns}
  return bool(names & {*_CHECKPOINT, "scan"}) or any(
    _has_layers(eqn.params["jaxpr"].jaxpr) for eqn in jaxpr.eqns if eqn.primitive.name in _JIT
  )


# What takes packed operands; of all else the operands are dense.
_RULES: dict[str, _Rule] = {
  **dict.fromkeys(_CHECKPOINT, _checkpoint),
  "scan": _scan,
  **dict.fromkeys(_JIT, _jit),
}
