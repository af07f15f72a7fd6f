"""Finding the momentum inside any optimizer's state, and probing how updates depend on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import trees
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms import alike as alike_lib
from eco_optax.transforms import eager, linearity
from eco_optax.transforms.factored import is_array
from eco_optax.transforms.linearity import Leaves, Preconditioner
from eco_optax.transforms.packed import update_stock
from eco_optax.transforms.stored_moments import Kind

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
  "ScaleByAdemamixState",
  "ScaleBySoapState",
  "ScaleByShampooState",
)

# Fields that hold a mean or a sum of squares, or what else is not negative.
_SECOND_FIELDS = ("nu", "nu_max", "v", "exp_avg_sq", "sum_of_squares")

# Slower momenta, of an update with more than one.
_SLOW_FIELDS = ("m2",)


def flat(tree: Any) -> Leaves:
  """The arrays of a tree by `/`-joined path, a packed leaf or a factored moment being one."""
  leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)[0]
  return {trees.path_name(path): leaf for path, leaf in leaves}


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of all parameters by path, by which an optimizer's moments are found."""
  return {path: leaf.shape for path, leaf in flat(params).items()}


def _holds(node: Any, fields: tuple[str, ...], shapes: dict[str, tuple[int, ...]]) -> list[str]:
  """Those of a state's fields that hold an array for each of (some of) the parameters."""
  is_record = (isinstance(node, tuple) and hasattr(node, "_fields")) or (
    dataclasses.is_dataclass(node) and not isinstance(node, type)
  )
  found = []
  for field in fields if is_record else ():
    value = getattr(node, field, None)
    leaves = flat(value) if value is not None else {}
    # A parameter may be called `mu` too, but its statistics have not all the parameters' shapes.
    if leaves and all(
      path in shapes and getattr(leaf, "shape", None) == shapes[path]
      for path, leaf in leaves.items()
    ):
      found.append(field)
  return found


def _momentum_field(node: Any, shapes: dict[str, tuple[int, ...]]) -> str | None:
  """The field of a state that holds a momentum for (some of) the parameters of `shapes`."""
  fields = _EXCEPTIONS.get(type(node).__name__, _FIELDS)
  return next(iter(_holds(node, fields, shapes)), None)


def _moment_fields(node: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Kind]:
  """All fields of a state that hold moments; not those whose difference is a variance."""
  first = _EXCEPTIONS.get(type(node).__name__, _FIELDS + _SLOW_FIELDS)
  second = tuple(field for field in _SECOND_FIELDS if first and field not in first)
  kinds: dict[str, Kind] = {field: "first" for field in _holds(node, first, shapes)}
  return kinds | {field: "second" for field in _holds(node, second, shapes)}


def map_moments(
  fn: Callable[[str, Kind, Any], Any], state: Any, shapes: dict[str, tuple[int, ...]]
) -> Any:
  """An optimizer's state with `fn(path, kind, array)` in place of every moment.

  Args:
    fn: its first argument is the moment's path in the state.
    state: of an optimizer; its moments may be packed.
    shapes: of all parameters by path.

  Returns:
    The state.
  """

  def change(path: str, node: Any) -> Any:
    new = {
      field: trees.map_with_path(
        lambda leaf, x, field=field, kind=kind: fn(f"{path}/{field}/{leaf}".rstrip("/"), kind, x),
        getattr(node, field),
        is_leaf=is_array,
      )
      for field, kind in _moment_fields(node, shapes).items()
    }
    replace = getattr(type(node), "_replace", dataclasses.replace)
    return replace(node, **new) if new else node

  return trees.map_with_path(change, state, is_leaf=lambda node: bool(_moment_fields(node, shapes)))


def has_moments(state: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
  """Whether `map_moments` finds any."""
  found = jax.tree.leaves(state, is_leaf=lambda node: bool(_moment_fields(node, shapes)))
  return any(_moment_fields(node, shapes) for node in found)


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
    the additions to it.
    """
    nodes, treedef = jax.tree.flatten(
      state, is_leaf=lambda node: _momentum_field(node, self.shapes) is not None
    )
    owners, paths = {}, set(self.paths)
    for i, node in enumerate(nodes):
      field = _momentum_field(node, self.shapes)
      for path in flat(getattr(node, field)) if field else ():
        if path in paths:
          owners[path] = (i, field or "")
    return nodes, treedef, owners

  def get(self, state: Any) -> Leaves:
    """The momentum of each path that has one."""
    nodes, _, owners = self._owners(state)
    fields = {owner: flat(getattr(nodes[owner[0]], owner[1])) for owner in set(owners.values())}
    return {path: fields[owner][path] for path, owner in owners.items()}

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
      path: getattr(nodes[i], "averaged", nodes[i].count)  # SOAP's leaves the first gradient out.
      for path, (i, _) in owners.items()
      if type(nodes[i]).__name__ in _BIAS_CORRECTED
    }

  def preconditioners(self, state: Any) -> dict[str, Preconditioner]:
    """By path, the states that know the inverse of their preconditioner."""
    nodes, _, owners = self._owners(state)
    return {
      path: nodes[i] for path, (i, _) in owners.items() if isinstance(nodes[i], Preconditioner)
    }


# States whose `count` is the step that a learning-rate schedule is asked for; the first kind that
# an optimizer has. Others count something else, as `ReduceLROnPlateauState` does.
_SCHEDULE_STATES = (
  ("ScaleByScheduleState",),
  ("WrappedScheduleState", "InjectStatefulHyperparamsState", "InjectHyperparamsState"),
  _BIAS_CORRECTED,
)


def inner_count(state: Any) -> jax.Array | None:
  """The step count of an optimizer's learning-rate schedule; None if no state is known to keep it.

  Wrappers such as `optax.MultiSteps` and `optax.apply_if_finite` advance it only with real steps.
  """
  for names in _SCHEDULE_STATES:
    is_one = lambda node, names=names: type(node).__name__ in names
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if found:
      return found[-1].count
  return None


@dataclasses.dataclass(frozen=True)
class Derivatives:
  """What one step does, and its derivatives along ones; all but the states by parameter path."""

  updates: Any
  state: Any
  momentum: Leaves  # m̃
  by_momentum: Leaves  # J 1, of J = ∂u/∂m; its diagonal, where J is element-wise.
  decay: Leaves  # B = ∂m̃/∂m
  by_weight: Leaves | None  # ∂u/∂θ̂ = P − 1
  # Paths → a function of directions of these leaves' momenta: J along them.
  linearized: Callable[[tuple[str, ...]], Callable[[Leaves], Leaves]]


def differentiate(
  inner: optax.GradientTransformationExtraArgs,
  where: Momentum,
  grads: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
  by_weight: bool = False,
) -> Derivatives:
  """Runs one step of a stock optimizer and its derivatives along ones.

  For an element-wise update the derivative along a vector of ones is the diagonal of the Jacobian.
  For one that is linear in another way it is a sample of it.

  Args:
    inner: the optimizer.
    where: its momentum.
    grads: as for `inner.update`.
    state: as for `inner.update`.
    params: the dense parameters.
    extra_args: as for `inner.update`.
    by_weight: whether ∂u/∂θ̂ is wanted too.

  Returns:
    The step and its derivatives, float32.
  """
  paths = where.paths
  momentum = where.get(state)
  weights = {path: leaf for path, leaf in flat(params).items() if path in paths}

  def step(momentum: Leaves, weights: Leaves) -> tuple[tuple[Leaves, Leaves], tuple[Any, Any]]:
    dense = trees.map_with_path(lambda path, leaf: weights.get(path, leaf), params)
    state_of = where.put(state, momentum)
    updates, new_state = update_stock(inner, grads, state_of, dense, extra_args)
    picked = {path: leaf for path, leaf in flat(updates).items() if path in paths}
    return (picked, where.get(new_state)), (updates, new_state)

  ones = jax.tree.map(jnp.ones_like, momentum)
  (_, new_momentum), (by_momentum, decay), (updates, new_state) = jax.jvp(
    lambda m: step(m, weights), (momentum,), (ones,), has_aux=True
  )

  def linearized(paths: tuple[str, ...]) -> Callable[[Leaves], Leaves]:
    own = {path: momentum[path] for path in paths}

    def update(m: Leaves) -> Leaves:
      (picked, _), _ = step(momentum | m, weights)
      return {path: picked[path] for path in paths}

    _, push = jax.linearize(update, own)
    cast = lambda direction: {path: direction[path].astype(m.dtype) for path, m in own.items()}
    return lambda direction: to_float32(push(cast(direction)))

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
    linearized,
  )


# Steps of the miniature: one after another, and then a few at each power of two, for a learning
# rate of zero before a warm-up says nothing. Where still no leaf has moved, as with gradients that
# are accumulated over hundreds of steps, one after another again.
_PROBE_STEPS = 64
_STEPS_AT_A_POWER = 4
_ACCUMULATED_STEPS = 1024
# Of a weight's error in one step: ∂(θ + u)/∂θ is below 1 with weight decay, and about 1 else.
_LARGEST_GROWTH = 1.5
_LAST_POWER = 24  # Ahead of 2^24 = 16.8 million steps a schedule has begun.
_REMEDY = (
  "Or use an optimizer with element-wise momentum for this leaf (optax.adamw, optax.sgd with"
  " momentum), or leave the leaf float"
)


def miniature(params: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and dtype by path of the arrays that stand for `params` in `probe`.

  At most three per axis: enough that a norm, a sort or a matrix product shows.
  """
  return {
    path: (tuple(min(n, 3) for n in leaf.shape), getattr(leaf, "dtype", jnp.dtype("float32")))
    for path, leaf in flat(params).items()
  }


class Suits(NamedTuple):
  """What `probe` found out about leaves, by their paths."""

  early: tuple[str, ...] = ()  # The learning rate is applied before the momentum, as in rmsprop.
  solved: tuple[str, ...] = ()  # Linear, not element-wise, and with no inverse in the state.


def probe(
  inner: optax.GradientTransformationExtraArgs, params: Any, paths: tuple[str, ...], instead: str
) -> Suits:
  """Checks on a miniature of the parameters that momentum can carry an error back.

  Args:
    inner: the optimizer.
    params: dense parameters; only structure, shapes and dtypes are used.
    paths: of the leaves that are quantized.
    instead: says what serves an optimizer that is refused.

  Returns:
    What the rule has to know of them.

  Raises:
    ValueError: naming the first leaf that has no momentum, or one on which the update does not
      depend smoothly, and element by element or linearly.
  """
  shapes = miniature(params)
  treedef = jax.tree.structure(params)
  return eager.now(lambda: _probe(inner, treedef, shapes, paths, instead)) if paths else Suits()


def _probe(
  inner: optax.GradientTransformationExtraArgs,
  treedef: Any,
  shapes: dict[str, tuple[tuple[int, ...], Any]],
  paths: tuple[str, ...],
  instead: str,
) -> Suits:
  """`probe` on arrays of the given shapes and dtypes."""
  remedy = f"{instead}. {_REMEDY}"
  where = Momentum({path: shape for path, (shape, _) in shapes.items()}, paths)
  generator = np.random.default_rng(0)

  def draw(like: Any, scale: float) -> Any:
    normal = lambda x: (scale * generator.standard_normal(x.shape)).astype(x.dtype)
    return jax.device_put(jax.tree.map(normal, like))

  dense = [jax.ShapeDtypeStruct(*spec) for spec in shapes.values()]
  params = draw(jax.tree.unflatten(treedef, dense), 1.0)
  state = inner.init(params)
  found = where.get(state)
  for path in paths:
    if path not in found:
      raise ValueError(
        f"{trees.leaf_name(path)} is quantized, but the optimizer keeps no momentum for it in"
        f" {type(state).__name__} to put the quantization error in. {remedy}"
      )
    if is_quantized(found[path]):
      raise ValueError(
        f"{trees.leaf_name(path)}: the optimizer stores its momentum in few bits: put"
        " eco_optax.low_bit_moments around eco_optax.error_feedback_to_momentum, not inside"
      )

  def try_out(extra_args: dict[str, Any]) -> tuple[dict[str, tuple[str, ...]], dict[str, _Found]]:
    firsts = alike_lib.one_of_each(inner, params, state, paths, extra_args)
    own = Momentum(where.shapes, tuple(firsts.alike))
    drawn = lambda scale: draw(firsts.params, scale)
    return firsts.alike, _try_out(firsts, own, drawn, extra_args)

  tried, failure = eager.with_made_up_arguments(try_out)
  if isinstance(failure, jax.errors.UnexpectedTracerError):
    raise ValueError(
      f"{trees.leaf_name(paths[0])}: the optimizer has a traced value in it, such as a learning"
      " rate that is an argument of jax.jit, so that it cannot be tried on a miniature of the"
      " parameters. Make the optimizer outside of jit with a schedule, or put the value in its"
      " state: eco_optax.error_feedback_to_momentum(optax.inject_hyperparams(optax.adamw)("
      "learning_rate=…), eco_optax.quantize_params())"
    ) from failure
  # An argument of the user's own cannot be made up: then the rule is taken on trust.
  if eager.is_missing_argument(failure):
    return Suits()
  if tried is None:
    raise ValueError(
      f"{trees.leaf_name(paths[0])}: the optimizer cannot be tried on a miniature of the"
      f" parameters to see what its update does with momentum ({failure}). {remedy}"
    ) from failure
  alike, reports = tried
  # A leaf that never moves, as a frozen one, has no errors to be paid back.
  for path, leaf in reports.items():
    message = leaf.fault or _refusal(path, leaf.usual) or _refusal(path, leaf.at_large)
    if not message and not leaf.mixes:
      message = _nonlinearity(*(np.asarray(report.by_momentum[path]) for report in leaf.reports))
    if message:
      raise ValueError(f"{trees.leaf_name(path)}: {message}. {remedy}")
  # After a learning rate, u = −m̃ and J = −B (B² with Nesterov): J does not scale with the rate. Of
  # an update that mixes elements it is taken to do so.
  early = [path for path, leaf in reports.items() if not leaf.mixes and leaf.is_early(path)]
  solved = [path for path, leaf in reports.items() if leaf.mixes and not leaf.knows]
  all_of = lambda firsts: tuple(path for first in firsts for path in alike[first])
  return Suits(early=all_of(early), solved=all_of(solved))


def _nonlinearity(j: np.ndarray, j_at_ten: np.ndarray, j_at_large: np.ndarray) -> str | None:
  """Why an element-wise update is not linear, from its J at usual, tenfold and huge momenta."""
  # The derivative of a clip is 0 or what it is without.
  if np.any((j_at_ten != 0) & ~np.isclose(j, j_at_ten, rtol=0.05, atol=0)):
    return (
      "the update is not linear in its momentum (its derivative changes with it), so a"
      " quantization error put in it would not come back in full"
    )
  if np.any((j != 0) & ((j_at_ten == 0) | (j_at_large == 0))):
    return (
      "the update is clipped behind the momentum, and where it is clipped a quantization error"
      " in the momentum is lost. Clip gradients instead, before the optimizer, as in"
      " optax.chain(optax.clip(1.0), optax.adamw(schedule)), or leave the clip out"
    )
  return None


class _Report(NamedTuple):
  """What one step of a miniature does with momentum; arrays by path."""

  updates: Leaves
  by_momentum: Leaves  # J
  decay: Leaves  # B
  by_weight: Leaves  # P − 1
  one: Leaves  # A direction with a single nonzero element in each leaf.
  along_one: Leaves  # The derivative of the update in that direction.
  drawn: Leaves  # A random direction.
  along_drawn: Leaves  # The derivative in that one.
  spreads: jax.Array  # Whether the direction reaches other state than the momentum.
  is_large: bool = False

  def mixes(self, path: str) -> bool:
    """Whether an element of the update depends on another of the momentum."""
    along = np.asarray(self.along_one[path], np.float32)
    if np.any(along[np.asarray(self.one[path]) == 0] != 0):
      return True
    # A flip or a transpose may leave the one element where it is.
    apart = np.asarray(self.by_momentum[path] * self.drawn[path], np.float32)
    return not linearity.agree(self.along_drawn[path], apart)


class _Found(NamedTuple):
  """What was found out about a leaf."""

  reports: tuple[_Report, _Report, _Report]  # At usual, tenfold and huge momenta.
  mixes: bool  # Whether the update is not element-wise.
  knows: bool  # Whether the state knows the inverse of its preconditioner.
  fault: (
    str | None
  )  # Why an update that is not element-wise is not linear either, or not invertible.

  @property
  def usual(self) -> _Report:
    return self.reports[0]

  @property
  def at_large(self) -> _Report:
    return self.reports[2]

  def is_early(self, path: str) -> bool:
    """Whether the update is the momentum itself, or what it keeps of it with Nesterov."""
    j, b = np.abs(self.usual.by_momentum[path]), np.abs(self.usual.decay[path])
    return any(np.allclose(j, b**k, rtol=1e-5) for k in (1, 2))


def _try_out(
  firsts: alike_lib.OneOfEach, where: Momentum, draw: Any, extra_args: Any
) -> dict[str, _Found]:
  """What was found out by path; no path that the optimizer never moves."""
  weights, state = firsts.params, firsts.state
  inner = optax.GradientTransformationExtraArgs(lambda params: state, firsts.update)
  # By NumPy: operations of JAX one by one would each be compiled.
  one = {
    path: jnp.asarray((np.arange(m.size) == m.size // 2).reshape(m.shape), m.dtype)
    for path, m in where.get(state).items()
  }

  noise = flat(draw(1.0))
  drawn = {path: noise[path].astype(m.dtype) for path, m in where.get(state).items()}

  @jax.jit
  def step(grads: Any, state: Any) -> tuple[Any, _Report]:
    diagonal = differentiate(inner, where, grads, state, weights, extra_args, by_weight=True)
    run = lambda m: inner.update(grads, where.put(state, m), weights, **extra_args)
    _, (along_one, state_tangent) = jax.jvp(run, (where.get(state),), (one,))
    along_drawn = diagonal.linearized(tuple(drawn))(drawn)
    pick = lambda tree: {path: leaf for path, leaf in flat(tree).items() if path in where.paths}
    others = where.put(state_tangent, jax.tree.map(jnp.zeros_like, one))
    spreads = [jnp.any(t != 0) for t in jax.tree.leaves(others) if t.dtype != jax.dtypes.float0]
    report = _Report(
      pick(diagonal.updates),
      diagonal.by_momentum,
      diagonal.decay,
      diagonal.by_weight or {},
      one,
      pick(along_one),
      drawn,
      along_drawn,
      jnp.any(jnp.asarray(spreads)),
    )
    return diagonal.state, report

  def sampler(grads: Any, state: Any) -> Callable[[Leaves, Leaves], linearity.Sample]:
    """Steps at one state from any momentum, with the derivative along a direction."""

    @jax.jit
    def sample(momentum: Leaves, direction: Leaves) -> Any:
      done = differentiate(inner, where, grads, where.put(state, momentum), weights, extra_args)
      updates = {path: leaf for path, leaf in flat(done.updates).items() if path in where.paths}
      along = done.linearized(tuple(momentum))(direction)
      return updates, along, done.by_momentum, done.decay, done.state

    def read(momentum: Leaves, direction: Leaves) -> linearity.Sample:
      updates, along, ones, decay, new = jax.device_get(sample(momentum, direction))
      return linearity.Sample(updates, along, ones, decay, where.preconditioners(new))

    return read

  # Some optimizers treat their first step specially: a leaf is judged by its third that moves it.
  moves = dict.fromkeys(where.paths, 0)
  done: dict[str, _Found] = {}

  def judge(before: Any, grads: Any, report: _Report) -> None:
    for path, update in jax.device_get(report.updates).items():
      moves[path] += bool(np.any(update != 0))
    if ready := [path for path in where.paths if moves[path] >= 3 and path not in done]:
      momentum = where.get(before)
      tenfold = {path: (10 * np.asarray(m)).astype(m.dtype) for path, m in momentum.items()}
      _, at_ten = step(grads, where.put(before, jax.tree.map(jnp.asarray, tenfold)))
      # A norm that is clipped, or a trust ratio that is bounded, shows at large momenta only.
      noise = flat(draw(1e4))
      large = {path: noise[path].astype(m.dtype) for path, m in momentum.items()}
      _, at_large = step(grads, where.put(before, large))
      reports = jax.device_get((report, at_ten, at_large))
      reports = tuple(r._replace(is_large=k > 0) for k, r in enumerate(reports))
      mixed = [path for path in ready if any(r.mixes(path) for r in reports)]
      preconditioners = where.preconditioners(before)
      known = [path for path in ready if path in preconditioners]
      faults: dict[str, str] = {}
      if paths := tuple(dict.fromkeys((*mixed, *known))):
        random = lambda: flat(draw(1.0))
        faults = linearity.faults(sampler(grads, before), momentum, random, paths)
      for path in ready:
        done[path] = _Found(reports, path in mixed, path in known, faults.get(path))

  counts = [*[0] * _PROBE_STEPS]
  for power in range(7, _LAST_POWER + 1):
    counts += [2**power, *[0] * (_STEPS_AT_A_POWER - 1)]
  for i, count in enumerate([*counts, *[0] * _ACCUMULATED_STEPS]):
    if i >= len(counts) and done:
      break
    before, grads = _at_count(state, count) if count else state, draw(0.1)
    state, report = step(grads, before)
    judge(before, grads, report)
    if len(done) == len(where.paths):
      break
  return done


def _at_count(state: Any, count: int) -> Any:
  """A state whose step counters, arrays called `count`, stand at a step."""

  def change(path: tuple, x: Any) -> Any:
    name = getattr(path[-1], "name", None) if path else None
    is_counter = name == "count" and jnp.shape(x) == () and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.asarray(count, x.dtype) if is_counter else x

  return jax.tree_util.tree_map_with_path(change, state)


def _refusal(path: str, report: _Report) -> str | None:
  """Why an error cannot be paid back through the momentum of a leaf, if it cannot."""
  if report.is_large:  # Where an update is clipped element by element `probe` says so.
    return None
  if not np.any(report.decay[path]):
    return (
      "the momentum keeps nothing from step to step (its decay rate b1 is 0), so a quantization"
      " error put in it is lost: use b1 > 0"
    )
  if not np.any(report.by_momentum[path]):
    return (
      "the update does not depend smoothly on its momentum (its derivative is 0, as with the sign"
      " in Lion), so a quantization error cannot be paid back through it"
    )
  if np.max(np.abs(report.decay[path])) >= 1:
    return "the momentum never decays, so nothing pays a quantization error back"
  growth = np.max(1 + np.asarray(report.by_weight[path]))
  if not growth <= _LARGEST_GROWTH:  # Nor where there is no derivative.
    return (
      "the update depends on the weight itself (as where contrib.mechanize scales the way gone so"
      " far), so that it makes a quantization error grow"
    )
  if report.spreads:
    return (
      "the momentum feeds another statistic of the optimizer (as the variance in AdaBelief), which"
      " a quantization error put in it would spoil"
    )
  return None
