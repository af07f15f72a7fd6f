"""Finding the momentum inside any optimizer's state, and probing how updates depend on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import trees

# Fields that hold a momentum in the states of Optax, optax.contrib and most users' own optimizers.
_FIELDS = ("trace", "mu", "momentum", "m", "m1", "ema", "exp_avg")

# States in which those names mean something else: the mean that centres a variance, the
# accumulators of SM3 (whose momentum is `nu`).
_EXCEPTIONS = {
  "ScaleByRStdDevState": (),
  "ScaleByRStdDevWithCountState": (),
  "ScaleBySM3State": ("nu",),
}

# States whose momentum is divided by 1 − b1^t with t = count.
_BIAS_CORRECTED = (
  "ScaleByAdamState",
  "ScaleByAmsgradState",
  "ScaleByBeliefState",
  "ScaleByAdemamixState",
)

Leaves = dict[str, jax.Array]  # Arrays by the `/`-joined path of their parameter.


def flat(tree: Any) -> Leaves:
  """The arrays of a tree by `/`-joined path."""
  return {
    trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _momentum_field(node: Any, shapes: dict[str, tuple[int, ...]]) -> str | None:
  """The field of a state that holds a momentum for (some of) the parameters of `shapes`."""
  is_record = (isinstance(node, tuple) and hasattr(node, "_fields")) or (
    dataclasses.is_dataclass(node) and not isinstance(node, type)
  )
  if not is_record:
    return None
  for field in _EXCEPTIONS.get(type(node).__name__, _FIELDS):
    value = getattr(node, field, None)
    leaves = flat(value) if value is not None else {}
    # A parameter may be called `mu` too, but its statistics have not all the parameters' shapes.
    if leaves and all(
      path in shapes and getattr(leaf, "shape", None) == shapes[path]
      for path, leaf in leaves.items()
    ):
      return field
  return None


@dataclasses.dataclass(frozen=True)
class Momentum:
  """Where the momentum of some parameters is kept in an optimizer's state.

  Attributes:
    shapes: of all parameters by path.
    paths: of the parameters whose momentum is meant.
  """

  shapes: dict[str, tuple[int, ...]]
  paths: tuple[str, ...]

  def _owners(self, state: Any) -> tuple[list, Any, dict[str, tuple[int, str]]]:
    """The state's nodes, their tree definition, and each path's owner: a node and its field.

    Of several momenta the last counts: it is the nearest to the update, so nothing downstream sees
    what is added to it.
    """
    nodes, treedef = jax.tree.flatten(
      state, is_leaf=lambda node: _momentum_field(node, self.shapes) is not None
    )
    owners = {}
    for i, node in enumerate(nodes):
      field = _momentum_field(node, self.shapes)
      for path in flat(getattr(node, field)) if field else ():
        if path in self.paths:
          owners[path] = (i, field or "")
    return nodes, treedef, owners

  def get(self, state: Any) -> Leaves:
    """The momentum of each path that has one."""
    nodes, _, owners = self._owners(state)
    return {path: flat(getattr(nodes[i], field))[path] for path, (i, field) in owners.items()}

  def put(self, state: Any, values: Leaves) -> Any:
    """The state with `values` in place of its momenta."""
    nodes, treedef, owners = self._owners(state)
    for owner in set(owners.values()):
      i, field = owner
      new = trees.map_with_path(
        lambda path, leaf, owner=owner: values[path] if owners.get(path) == owner else leaf,
        getattr(nodes[i], field),
      )
      replace = getattr(type(nodes[i]), "_replace", dataclasses.replace)
      nodes[i] = replace(nodes[i], **{field: new})
    return jax.tree.unflatten(treedef, nodes)

  def counts(self, state: Any) -> dict[str, jax.Array]:
    """By path, the step count that the momentum's bias correction uses, where there is one."""
    nodes, _, owners = self._owners(state)
    return {
      path: nodes[i].count
      for path, (i, _) in owners.items()
      if type(nodes[i]).__name__ in _BIAS_CORRECTED
    }


def inner_count(state: Any) -> jax.Array | None:
  """The step count of an optimizer's learning-rate schedule, or any count of it, if it has one.

  Wrappers such as `optax.MultiSteps` and `optax.apply_if_finite` advance it only with real steps.
  """
  found = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    key = path[-1] if path else None
    if getattr(key, "name", None) == "count" and getattr(leaf, "shape", None) == ():
      found.append(leaf)
  return found[-1] if found else None


@dataclasses.dataclass(frozen=True)
class Derivatives:
  """What one step does, and its element-wise derivatives; all but the states by parameter path."""

  updates: Any
  state: Any
  momentum: Leaves  # m̃
  by_momentum: Leaves  # J = ∂u/∂m
  decay: Leaves  # B = ∂m̃/∂m
  by_weight: Leaves | None  # ∂u/∂θ̂ = P − 1


def differentiate(
  inner: optax.GradientTransformationExtraArgs,
  where: Momentum,
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
  tangents: Leaves | None = None,
  by_weight: bool = False,
) -> Derivatives:
  """Runs one step of a stock optimizer and its derivatives along ones.

  For an element-wise update the derivative along a vector of ones is the diagonal of the Jacobian.

  Args:
    inner: the optimizer.
    where: its momentum.
    grads: as for `inner.update`.
    state: as for `inner.update`.
    params: the dense parameters.
    extra_args: as for `inner.update`.
    tangents: other directions than ones, by path.
    by_weight: whether ∂u/∂θ̂ is wanted too.

  Returns:
    The step and its derivatives, float32.
  """
  paths = where.paths
  momentum = where.get(state)
  weights = {path: leaf for path, leaf in flat(params).items() if path in paths}

  def step(momentum: Leaves, weights: Leaves) -> tuple[tuple[Leaves, Leaves], tuple[Any, Any]]:
    dense = trees.map_with_path(lambda path, leaf: weights.get(path, leaf), params)
    updates, new_state = inner.update(grads, where.put(state, momentum), dense, **extra_args)
    picked = {path: leaf for path, leaf in flat(updates).items() if path in paths}
    return (picked, where.get(new_state)), (updates, new_state)

  ones = jax.tree.map(jnp.ones_like, momentum)
  (_, new_momentum), (by_momentum, decay), (updates, new_state) = jax.jvp(
    lambda m: step(m, weights), (momentum,), (tangents or ones,), has_aux=True
  )
  weight_tangents = None
  if by_weight:
    _, (weight_tangents, _), _ = jax.jvp(
      lambda w: step(momentum, w), (weights,), (jax.tree.map(jnp.ones_like, weights),), has_aux=True
    )
  to_float32 = lambda leaves: {path: leaf.astype(jnp.float32) for path, leaf in leaves.items()}
  return Derivatives(
    updates,
    new_state,
    to_float32(new_momentum),
    to_float32(by_momentum),
    to_float32(decay),
    None if weight_tangents is None else to_float32(weight_tangents),
  )


_PROBE_STEPS = 64
_REMEDY = (
  "Use an optimizer with element-wise momentum for this leaf (optax.adamw, optax.sgd with"
  " momentum), eco_optax.master_weights, which touches no momentum, or leave the leaf float"
)


def probe(
  inner: optax.GradientTransformationExtraArgs, params: Any, paths: tuple[str, ...]
) -> tuple[str, ...]:
  """Checks on a miniature of the parameters that momentum can carry an error back.

  Args:
    inner: the optimizer.
    params: dense parameters; only structure, shapes and dtypes are used.
    paths: of the leaves that are quantized.

  Returns:
    The paths whose learning rate is applied before the momentum, as in `optax.rmsprop`.

  Raises:
    ValueError: naming the first leaf that has no momentum, or one on which the update does not
      depend smoothly and element by element.
  """
  if not paths:
    return ()
  names = flat(params)
  # At most three per axis: enough that a norm, a sort or a matrix product shows.
  shapes = {path: tuple(min(n, 3) for n in leaf.shape) for path, leaf in names.items()}
  generator = np.random.default_rng(0)

  def draw(scale: float) -> Any:
    return trees.map_with_path(
      lambda path, leaf: jnp.asarray(
        scale * generator.standard_normal(shapes[path]), getattr(leaf, "dtype", jnp.float32)
      ),
      params,
    )

  with jax.ensure_compile_time_eval():
    weights = draw(1.0)
    state = inner.init(weights)
    where = Momentum(shapes, paths)
    found = where.get(state)
    for path in paths:
      if path not in found:
        raise ValueError(
          f"{trees.leaf_name(path)} is quantized, but the optimizer keeps no momentum for it in"
          f" {type(state).__name__} to put the quantization error in. {_REMEDY}"
        )
    directions = {
      path: jnp.asarray(generator.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
      for path, leaf in found.items()
    }

    @jax.jit
    def step(grads: Any, state: Any, weights: Any) -> tuple[Any, Any, Any, Any]:
      ones = differentiate(inner, where, grads, state, weights, {})
      along = differentiate(inner, where, grads, state, weights, {}, directions)
      updates = {path: leaf for path, leaf in flat(ones.updates).items() if path in paths}
      return ones.state, updates, (ones.by_momentum, ones.decay), along.by_momentum

    try:
      for _ in range(_PROBE_STEPS):
        before, grads = state, draw(0.1)
        state, updates, (by_momentum, decay), along = step(grads, before, weights)
        # A learning rate of zero or gradient accumulation says nothing yet.
        if all(np.any(np.asarray(u) != 0) for u in updates.values()):
          break
      else:
        return ()
      # A norm that is clipped, or a trust ratio that is bounded, shows at large momenta only.
      large = {
        path: jnp.asarray(1e4 * generator.standard_normal(m.shape), m.dtype)
        for path, m in found.items()
      }
      _, _, (by_large, _), along_large = step(grads, where.put(before, large), weights)
      seen = (by_momentum, decay, along, by_large, along_large, directions)
      by_momentum, decay, along, by_large, along_large, directions = jax.device_get(seen)
    except TypeError as error:
      if "missing" in str(error):  # The optimizer needs extra arguments; nothing to probe it with.
        return ()
      raise

  early = []
  for path in paths:
    jacobian, b = by_momentum[path], decay[path]
    name = trees.leaf_name(path)
    # A bfloat16 momentum has derivatives of 8 bits, and at large momenta a derivative may be a
    # small difference of large terms; what is not element-wise is off by its own size.
    for diagonal, product, tolerance in (
      (jacobian, along[path], 0.02),
      (by_large[path], along_large[path], 0.1),
    ):
      with np.errstate(all="ignore"):  # An absurd learning rate shows soon enough.
        wanted = diagonal * directions[path].astype(np.float32)
        gap, size = np.max(np.abs(product - wanted)), np.max(np.abs(wanted))
      if gap > tolerance * size + 1e-30:
        raise ValueError(
          f"{name}: the update is not element-wise in its momentum (a norm, a trust ratio or a"
          " matrix function follows it), so a quantization error cannot be paid back through it."
          f" {_REMEDY}"
        )
    if not np.any(b):
      raise ValueError(
        f"{name}: the momentum keeps nothing from step to step (its decay rate b1 is 0), so a"
        f" quantization error put in it is lost: use b1 > 0. {_REMEDY}"
      )
    if not np.any(jacobian):
      raise ValueError(
        f"{name}: the update does not depend smoothly on its momentum (its derivative is 0, as with"
        f" the sign in Lion), so a quantization error cannot be paid back through it. {_REMEDY}"
      )
    if np.max(np.abs(b)) >= 1:
      raise ValueError(
        f"{name}: the momentum never decays (its decay rate is {np.max(b):g}), so nothing pays a"
        f" quantization error back. {_REMEDY}"
      )
    # After a learning rate, u = −m̃ and J = −B (B² with Nesterov): J does not scale with the rate.
    if any(np.allclose(np.abs(jacobian), np.abs(b) ** k, rtol=1e-5) for k in (1, 2)):
      early.append(path)
  return tuple(early)
