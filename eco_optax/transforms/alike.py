"""Which leaves an optimizer treats alike, so that a check can try one leaf of each kind.

The optimizer is traced once. Two leaves are alike if what becomes of them is the same function of
their own gradient, parameter and state and of what all leaves share, operation by operation.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

from eco_optax import trees

_SHARED = None  # The owner of what belongs to no leaf, or depends on several.


class OneOfEach(NamedTuple):
  """The first leaf of each kind, and an optimizer of these and of what their steps depend on."""

  alike: dict[str, tuple[str, ...]]  # Path of a kind's first leaf → paths of all its leaves.
  # Its update takes gradients, states and parameters from which `params` and `state` have left out
  # what is not needed.
  update: Callable[..., tuple[Any, Any]]
  params: Any
  state: Any


def one_of_each(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  state: Any,
  paths: tuple[str, ...],
  extra_args: dict[str, Any],
) -> OneOfEach:
  """Sorts leaves by what an optimizer does with them.

  Args:
    inner: the optimizer.
    params: dense parameters, which stand for gradients too.
    state: of the optimizer.
    paths: of the leaves to sort.
    extra_args: of its update.
  """
  traced, results = jax.make_jaxpr(
    lambda grads, state, params: inner.update(grads, state, params, **extra_args),
    return_shape=True,
  )(params, state, params)
  found: Any = jax.tree.structure(results)
  if found != jax.tree.structure((params, state)):
    # Whose each result is cannot be told.
    return OneOfEach({path: (path,) for path in paths}, inner.update, params, state)
  weights = _by_path(params)
  owners = [*weights, *trees.owners(_by_path(state), weights).values(), *weights]
  kinds: dict[Any, list[str]] = {}
  for path, kind in _kinds(traced, owners, paths).items():
    kinds.setdefault(kind, []).append(path)
  alike = {first: (first, *rest) for first, *rest in kinds.values()}
  wanted = [owner is _SHARED or owner in alike for owner in owners[: len(traced.out_avals)]]
  return OneOfEach(alike, *_pruned(traced, wanted, params, state))


def _by_path(tree: Any) -> dict[str, Any]:
  """The arrays of a tree one by one, as a trace takes them, also those of a factored moment."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {trees.path_name(path): leaf for path, leaf in leaves}


def _kinds(
  traced: ClosedJaxpr, owners: list[str | None], paths: tuple[str, ...]
) -> dict[str, tuple[Any, ...]]:
  """By path, what its outputs are functions of: equal where they are equally computed."""
  found: dict[str, list[Any]] = {path: [] for path in paths}
  for i, (origin, signature) in enumerate(_sign(traced, owners)):
    if (owner := owners[i]) in found:
      # What is made of another leaf alone is like nothing else.
      is_own = origin in (owner, _SHARED)
      found[owner].append(signature if is_own else ("of another", i))
  return {path: tuple(signatures) for path, signatures in found.items()}


def _sign(traced: ClosedJaxpr, owners: list[str | None]) -> list[tuple[str | None, Any]]:
  """Of each output whose it is, and what it is a function of: equal ones are equally computed."""
  jaxpr, interned = traced.jaxpr, dict[Any, int]()

  def intern(*key: Any) -> int:
    return interned.setdefault(key, len(interned))

  of: dict[Any, tuple[str | None, int]] = {}
  for i, var in enumerate(jaxpr.constvars):
    of[var] = _SHARED, intern("constant", i)
  roles: dict[str | None, int] = {}
  for i, (var, owner) in enumerate(zip(jaxpr.invars, owners, strict=True)):
    # All leaves have their operands in the same order.
    role = roles[owner] = roles.get(owner, -1) + 1
    of[var] = owner, intern("input", i if owner is _SHARED else role, owner is _SHARED, var.aval)

  def look_up(atom: Any) -> tuple[str | None, int]:
    if not isinstance(atom, Literal):
      return of[atom]
    value = np.asarray(atom.val)
    return _SHARED, intern("literal", value.tobytes(), atom.aval)

  for number, eqn in enumerate(jaxpr.eqns):
    found = [look_up(atom) for atom in eqn.invars]
    those = {owner for owner, _ in found if owner is not _SHARED}
    owner = next(iter(those)) if len(those) == 1 else _SHARED
    key: tuple = (eqn.primitive, *eqn.params.items(), *(signature for _, signature in found))
    # A signature does not name leaves, so a result of several leaves equals no other. Neither does
    # a result of an operation whose parameters cannot be compared.
    if len(those) > 1 or not _is_hashable(key):
      key = (number,)
    for k, var in enumerate(eqn.outvars):
      of[var] = owner, intern("result", k, *key)
  return [look_up(atom) for atom in jaxpr.outvars]


def _is_hashable(x: Any) -> bool:
  try:
    hash(x)
  except TypeError:
    return False
  return True


def _pruned(
  traced: ClosedJaxpr, wanted: list[bool], params: Any, state: Any
) -> tuple[Callable[..., Any], Any, Any]:
  """The update, parameters and state of a `OneOfEach`, by which outputs are wanted at first."""
  count = len(jax.tree.leaves(params))
  # States are the inputs behind the gradients and the outputs behind the updates, in one order. In
  # the steps to come those are wanted too that the wanted ones need.
  while True:
    jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    needed = [*wanted[:count], *map(operator.or_, wanted[count:], used[count : len(wanted)])]
    if needed == wanted:
      break
    wanted = needed
  compute = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
  kept = list(map(operator.or_, wanted[:count], map(operator.or_, used[:count], used[-count:])))
  is_given = kept + wanted[count:] + kept

  def keep(tree: Any, mask: list[bool]) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    masked = [x if own else optax.MaskedNode() for x, own in zip(leaves, mask, strict=True)]
    return jax.tree.unflatten(treedef, masked)

  def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
    del extra_args
    given = iter(jax.tree.leaves((grads, state, params)))
    operands = [next(given) if own else None for own in is_given]
    done = iter(compute(*itertools.compress(operands, used)))
    results = [next(done) if own else x for x, own in zip(operands, wanted, strict=False)]
    treedef = jax.tree.structure((grads, state))
    return jax.tree.unflatten(treedef, itertools.compress(results, is_given))

  return update, keep(params, kept), keep(state, wanted[count:])
