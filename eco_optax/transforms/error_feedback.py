"""error_feedback_to_momentum: ECO, quantized training without master weights.

The rule lives here, once. With J_t = ∂u/∂m, B = ∂m̃/∂m and P = 1 + ∂u/∂θ̂ the derivatives of
step t, element-wise or J a matrix (`inverse` has J⁻¹), a unit of momentum left by it moves the
weights by

    D = Σ B^{k−1} J_{t+k},  k = 1, 2, …

in all the steps to come. So what the quantizer took from the weights is paid back in full by

    memory-free:   m ← m̃ + e_t / D

and the weights that are still to be reached, θ̂ + D m, are those of plain training whatever the
quantizer does: the paper's virtual sequence, for any optimizer and schedule. Its Algorithms 2
(SGDM) and 3 (Adam) are the case of a constant J, D = J / (1 − B). Where a schedule falls to zero
so fast that D would be less than three quarters of what it is at a constant rate, it is taken to be
three quarters: rounding to nearest hoards debts, and the last steps would pay them all at once.
With the last error kept, a master-weight run that holds θ̂ + e takes the same steps as one whose
momentum differs by P e / J, hence

    exact:         m ← m̃ − B P e_{t−1} / J + P' e_t / J',  J' and P' of the next step.

If consecutive errors were equal, this rule would need no memory: m ← m̃ + (P'/J' − B P/J) e. With
rounding to nearest they are, and it comes to the same as the one above; with stochastic rounding
they are not, and where J grows by more than 1/B from one step to the next, as in the first steps of
a warm-up, it would take away what it owes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.quantized_array import dequantize, is_quantized
from eco_optax.transforms import inverse
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.momentum import Leaves, Momentum, Suits
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  add_update,
  float_gradients,
  is_packed_transformation,
  require_params,
  require_rate,
  require_state,
  require_stock,
  run,
  stored_weight,
)

# Steps ahead for which the schedule is asked.
HORIZON = 128

# The least value of D, in units of its value at a constant rate, J / (1 − B): of a debt a
# step pays (1 − B) / 0.75 at most, so that what was too small to move a weight does not move it for
# the rates' fall alone.
SHORTEST = 0.75

# Momenta below float32 are rounded stochastically, with random bits of their own stream.
_INJECTION_SEED = 0x9E3779B97F4A7C15


class ErrorFeedbackState(NamedTuple):
  """State of `error_feedback_to_momentum`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken.
  inner: optax.OptState  # Of the stock optimizer, on float32 parameters.
  quantizer: optax.OptState
  error: Any  # None; with keep_error float32 arrays by leaf, MaskedNode if not quantized.


class Observation(NamedTuple):
  """What one step did to the quantized leaves, by path; for `diagnostics`."""

  error: Leaves  # θ̃ − θ̂'
  momentum: Leaves  # m̃
  injection: Leaves  # what the rule adds to m̃
  stored: Leaves  # m as it is kept, in its own dtype
  owed: Leaves  # what the injection has to move the weights by in one step
  unpaid: Leaves  # what conjugate residuals left of it, of the leaves that they solved


def dense_shapes(params: Any) -> Any:
  """Shapes and dtypes of the dense view."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32" if is_quantized(leaf) else leaf.dtype),
    params,
    is_leaf=is_quantized,
  )


def moved_paths(
  quantizer: optax.GradientTransformation, state: Any, params: Any
) -> tuple[str, ...]:
  """Paths of the leaves that the quantizer moves: it hands back all others untouched."""
  moved: list[str] = []

  def trace(state: Any, params: Any) -> None:
    updates = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dense_shapes(params))
    new_updates, _ = run(quantizer, updates, state, params, Context(only_asks=True), {})
    trees.map_with_path(
      lambda path, leaf, old, new: moved.append(path) if new is not old else None,
      params,
      updates,
      new_updates,
      is_leaf=is_quantized,
    )

  jax.eval_shape(trace, state, params)
  return tuple(moved)


def require_momenta(where: Momentum, state: Any) -> None:
  """Raises `ValueError` for a quantized leaf that a state has no momentum for."""
  found = where.get(state)
  for path in where.paths:
    if path not in found:
      raise ValueError(
        f"{trees.leaf_name(path)} has no momentum of its shape {where.shapes[path]} in the state:"
        " the state is of another optimizer or of other parameters. Call tx.init(params), or"
        " restore the state that belongs to them"
      )


def refuse_kept_errors(where: Momentum, state: Any) -> None:
  """Raises `ValueError` where the exact rule meets a preconditioner that it cannot foresee."""
  for path, node in where.preconditioners(state).items():
    raise ValueError(
      f"{trees.leaf_name(path)}: keep_error=True has to know the next step's preconditioner, and"
      f" that of {type(node).__name__} changes, at a refreshment by many times. Leave keep_error"
      " out, or store the error where no preconditioner meets it:"
      ' eco_optax.master_weights(…, residual="int8") takes one byte per weight'
    )


def refuse_packed(path: str, leaf: Any) -> None:
  """Raises `ValueError` for a packed leaf, which a quantizer of one's own cannot move."""
  if is_quantized(leaf):
    raise ValueError(
      f"{trees.leaf_name(path)} is packed, which this quantizer cannot move: use"
      " eco.quantize_params, or keep the leaf float"
    )


def residual_instead(spelling: str, params: Any, paths: tuple[str, ...]) -> str:
  """How errors are kept beside the weights at some paths, where no momentum carries them back.

  Args:
    spelling: as in `build`.
    params: packed and float.
    paths: of the leaves that are quantized.
  """
  float_paths: list[str] = []
  trees.map_with_path(
    lambda path, leaf: None if is_quantized(leaf) else float_paths.append(path),
    params,
    is_leaf=is_quantized,
  )
  # An integer counts parts of the step of a packed leaf's grid.
  residual = "bfloat16" if set(paths) & set(float_paths) else "int8"
  return (
    f'Keep the errors beside the weights: tx = eco_optax.master_weights({spelling}, "{residual}")'
    " trains with this very optimizer, whatever its momentum does"
  )


def rate_ratio(learning_rate: Callable[[jax.Array], Any] | None, count: jax.Array) -> jax.Array:
  """η_{t+1} / η_t; infinite where the rate was zero."""
  if learning_rate is None or not callable(learning_rate):
    return jnp.ones([], jnp.float32)
  now = jnp.asarray(learning_rate(count), jnp.float32)
  return jnp.asarray(learning_rate(count + 1), jnp.float32) / now


def bias_ratio(decay: jax.Array, count: jax.Array) -> jax.Array:
  """(1 − B^t) / (1 − B^{t+1}): how bias correction changes J from step t to the next."""
  # One number for all of a leaf. Powers of a whole array may differ from it, and from one program
  # to another, in the last place.
  decay = decay.ravel()[0]
  t = count.astype(jnp.float32)
  return (1 - decay**t) / (1 - decay ** (t + 1))


def decay_ratio(by_weight: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
  """P and P' from ∂u/∂θ̂, which follows the learning rate; where that was zero P' does not count."""
  ratio = jnp.where(jnp.isfinite(ratio), ratio, 1)
  return 1 + by_weight, 1 + by_weight * ratio


def rates_ahead(learning_rate: optax.ScalarOrSchedule | None, count: jax.Array) -> jax.Array:
  """Rates of steps t to t + `HORIZON`, float32, up to a factor; count is the schedule's at t."""
  if not callable(learning_rate):
    return jnp.ones(HORIZON + 1, jnp.float32)
  rate = lambda k: jnp.asarray(learning_rate(count + k), jnp.float32)
  rates = jax.vmap(rate)(jnp.arange(HORIZON + 1, dtype=count.dtype))
  # Behind the end of a run a schedule may say anything; nothing is paid back there. Rates are
  # negative where the schedule has the sign of the update in it.
  return jnp.where(rates * rates[0] > 0, rates, 0)


def payback(rates: jax.Array, decay: jax.Array, bias_count: jax.Array | None = None) -> jax.Array:
  """D / J = Σ B^{k−1} J_{t+k} / J_t over k ≥ 1: the steps in which a debt in the momentum is paid.

  Args:
    rates: that J follows, from step t on; the last is taken to stay.
    decay: B; one element stands for all.
    bias_count: t where the momentum's bias correction divides J by 1 − B^t.

  Returns:
    A float32 scalar, 1 / (1 − B) at constant J, and no less than `SHORTEST` of what it is at a
    constant rate; infinite or NaN where the rate of step t is zero.
  """
  # One number for all of a leaf. Powers of a whole array may differ from it, and from one program
  # to another, in the last place; so may powers from products.
  b = decay.ravel()[0]
  powers = jnp.cumprod(jnp.full(HORIZON, b, jnp.float32))
  powers = jnp.concatenate([jnp.ones(1, jnp.float32), powers])
  corrected = jnp.ones_like(rates)
  if bias_count is not None:
    corrected = 1 / (1 - b ** bias_count.astype(jnp.float32) * powers)

  def paid(j: jax.Array) -> jax.Array:
    ratios = j[1:] / j[0]
    return jnp.sum(powers[:-1] * ratios) + powers[-1] / (1 - b) * ratios[-1]

  return jnp.maximum(paid(rates * corrected), SHORTEST * paid(corrected))


def due(error: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the momentum has to move the weights by in a step like this one: e J / D.

  Args:
    error: e.
    steps: D / J.

  Returns:
    It, and whether D can be trusted.
  """
  usable = (steps > 0) & jnp.isfinite(steps)
  return jnp.where(usable, error / jnp.where(usable, steps, 1), 0), usable


def inject(error: jax.Array, j: jax.Array, steps: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the memory-free rule adds to m̃, e / D, for an element-wise J, and whether it does."""
  owed, usable = due(error, steps)
  added, reached = inverse.divide(owed, j)
  return added, usable & reached


def due_exactly(
  error: jax.Array,
  old: jax.Array,
  b: jax.Array,
  p: jax.Array,
  p_next: jax.Array,
  j_ratio: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The same for the exact rule, P' e_{t+1} J / J' − B P e_t."""
  usable = (j_ratio > 0) & jnp.isfinite(j_ratio)
  owed = p_next / jnp.where(usable, j_ratio, 1) * error - b * p * old
  return jnp.where(usable, owed, 0), usable


def build(
  inner: optax.GradientTransformation,
  quantizer: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule | None,
  keep_error: bool,
  observe: Callable[[Observation], Any] | None = None,
  is_known: bool = False,
  spelling: str = "inner, quantizer",
) -> PackedTransformation:
  """`error_feedback_to_momentum`, with arguments for this package alone.

  Args:
    inner: as there.
    quantizer: as there.
    learning_rate: as there.
    keep_error: as there.
    observe: the update also hands out what this makes of what it did (`diagnostics`).
    is_known: whether the optimizer is known to suit, with its rate behind the momentum, so that it
      is not tried.
    spelling: of `inner` and `quantizer`, as arguments in a line of code.
  """
  require_stock(
    inner,
    "eco_optax.error_feedback_to_momentum",
    "use eco_optax.adamw and eco_optax.sgd by themselves, and put eco_optax.low_bit_moments and"
    " eco_optax.layer_by_layer around the rule",
  )
  if learning_rate is not None:
    require_rate(learning_rate)
  inner = optax.with_extra_args_support(inner)
  packed_quantizer = is_packed_transformation(quantizer)
  aware = learning_rate is not None
  probes: dict[Any, Suits] = {}

  def plan(state: Any, params: Any) -> tuple[tuple[str, ...], Suits]:
    """Paths of the quantized leaves, and what is to be known of them; may raise."""
    if not packed_quantizer:
      trees.map_with_path(refuse_packed, params, is_leaf=is_quantized)
    paths = moved_paths(quantizer, state, params)
    if is_known:
      return paths, Suits()
    dense = dense_shapes(params)
    key = (paths, *((path, *spec) for path, spec in momentum_lib.miniature(dense).items()))
    if key not in probes:
      instead = residual_instead(spelling, params, paths)
      probes[key] = momentum_lib.probe(inner, dense, paths, instead)
    return paths, probes[key]

  def init(params: Any) -> ErrorFeedbackState:
    quantizer_state = quantizer.init(params)
    dense = dequantize(params)
    inner_state = inner.init(dense)
    error = None
    if keep_error:
      paths = plan(quantizer_state, params)[0]
      refuse_kept_errors(Momentum(momentum_lib.shapes_of(dense), paths), inner_state)
      error = trees.map_with_path(
        lambda path, leaf: (
          jnp.zeros_like(leaf, jnp.float32) if path in paths else optax.MaskedNode()
        ),
        dense,
      )
    elif jax.tree.leaves(params):
      plan(quantizer_state, params)
    return ErrorFeedbackState(jnp.zeros([], jnp.int32), inner_state, quantizer_state, error)

  def update(
    updates: Any, state: ErrorFeedbackState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, Any]:
    require_params(params)
    require_state(state, ErrorFeedbackState, "eco_optax.error_feedback_to_momentum")
    if (state.error is not None) != keep_error:
      raise ValueError(
        f"keep_error is {keep_error}, but the state was made with {not keep_error}: call"
        " tx.init(params), or keep it as long as the state"
      )
    updates, context = context.scale(updates)
    updates = float_gradients(updates, params)
    paths, suits = plan(state.quantizer, params)
    dense = dequantize(params)
    weights = momentum_lib.flat(dense)
    where = Momentum({path: leaf.shape for path, leaf in weights.items()}, paths)
    require_momenta(where, state.inner)
    step = momentum_lib.differentiate(
      inner, where, updates, state.inner, dense, extra_args, by_weight=aware and keep_error
    )
    quantized, quantizer_state = run(
      quantizer, step.updates, state.quantizer, params, context, extra_args
    )

    error = {}

    def measure(path: str, leaf: Any, update: Any, quantized: Any) -> None:
      if path in paths:
        # θ̃ − θ̂' in the order that keeps an update far below the weight's own precision.
        error[path] = add_update(
          weights[path].astype(jnp.float32) - stored_weight(path, leaf, quantized), update
        )

    trees.map_with_path(measure, params, step.updates, quantized, is_leaf=is_quantized)
    last_error = momentum_lib.flat(state.error) if keep_error else {}

    count = momentum_lib.inner_count(state.inner)
    count = state.step if count is None else count
    rates = rates_ahead(learning_rate, count)
    bias_counts = where.counts(step.state) if aware else {}
    owed, usable = {}, {}
    for path in paths:
      b = step.decay[path]
      is_early = path in suits.early
      if not keep_error:
        own = jnp.ones_like(rates) if is_early else rates
        owed[path], usable[path] = due(error[path], payback(own, b, bias_counts.get(path)))
      else:
        ratio = rate_ratio(learning_rate, count)
        j_ratio = jnp.ones([], jnp.float32) if is_early else ratio  # J' / J
        if path in bias_counts:
          j_ratio = j_ratio * bias_ratio(b, bias_counts[path])
        p = p_next = jnp.ones([], jnp.float32)
        if step.by_weight is not None:
          p, p_next = decay_ratio(step.by_weight[path], ratio)
        old = last_error[path]
        owed[path], usable[path] = due_exactly(error[path], old, b, p, p_next, j_ratio)
    injection = inverse.invert(step, where.preconditioners(step.state), suits.solved, owed)

    stored, found = {}, where.get(step.state)
    for path in paths:
      if keep_error:
        # Without a step the debt stays.
        is_paid = usable[path] & injection.reached[path]
        error[path] = jnp.where(is_paid, error[path], last_error[path])
      stored[path] = step.momentum[path] + injection.added[path]
      if (dtype := found[path].dtype) != jnp.float32:
        key = rounding_lib.stream_key(_INJECTION_SEED, state.step, path)
        bits = rounding_lib.counter_bits(key, weights[path].shape, context.layer)
        stored[path] = rounding_lib.stochastic_cast(stored[path], dtype, bits)

    new_state = ErrorFeedbackState(
      step=optax.safe_increment(state.step),
      inner=where.put(step.state, stored),
      quantizer=quantizer_state,
      error=trees.map_with_path(lambda path, _: error[path], state.error) if keep_error else None,
    )
    if observe is None:
      return quantized, new_state
    seen = Observation(error, step.momentum, injection.added, stored, owed, injection.unpaid)
    return quantized, (new_state, observe(seen))

  return PackedTransformation(init, update)


def error_feedback_to_momentum(
  inner: optax.GradientTransformation,
  quantizer: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule | None = None,
  keep_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""ECO: trains quantized parameters without master weights, with any stock optimizer.

  The optimizer proposes θ̃ = θ̂ + u, the quantizer stores θ̂' = q(θ̃), and the error
  e = θ̃ − θ̂' goes into the optimizer's own momentum, which pays it back in later steps:

  .. math:: m \leftarrow \tilde m + e / D, \quad D = \sum_{k \ge 1} B^{k-1} J_{t+k}

  where J = ∂u/∂m and B = ∂m̃/∂m are found by differentiating the optimizer's own `update`, so that
  no hyperparameter is told twice. J is element-wise, as Adam's, or a preconditioner of matrices, as
  Shampoo's and SOAP's. D is what the rest of the run makes of a unit of momentum; at the
  end of a decay to zero it is three quarters of what it would be at a constant rate.
  Without `learning_rate` J is taken to be constant, D = J / (1 − B): the paper's rule,
  (1/η)(1 − 1/β) e for SGD with momentum. It adds no buffer to the optimizer's.

  Args:
    inner: a transformation whose update is linear in its momentum while its other state stays:
      `optax.adamw`, `optax.sgd` with momentum, `eco.scale_by_soap` and many more, alone or inside
      `chain`, `masked`, `partition`, `inject_hyperparams`, `MultiSteps` or `apply_if_finite`. It
      sees packed leaves as float32. One that requires extra arguments of your own is not checked at
      `init`. For an element-wise update J⁻¹ costs one derivative along ones, about a step of
      `inner`. One that mixes elements is inverted by its state, if that has the methods
      `precondition(path, momentum)`, which is J but for one factor per matrix, and
      `unprecondition(path, update)`, its inverse: one derivative, and one call of each. Without
      them J must be symmetric and definite. The rule then takes 16 conjugate residuals, each one
      application of J, which leave a share of the error that `diagnostics.watch` measures as
      `unpaid`; and J is taken to follow the learning rate.
    quantizer: `quantize_params`, or for float parameters any transformation that moves a proposed
      update (a rounding of your own, added noise). The error is the difference that it made.
    learning_rate: the schedule of `inner`. It makes the rule schedule-aware: J follows the rates of
      the next 128 steps and bias correction. The paper's rule pays back too much in a warm-up and
      too little in a decay, which coarse formats and rounding to nearest feel.
    keep_error: also keep the last error, 4 bytes per quantized weight, and apply the exact rule

      .. math:: m \leftarrow \tilde m - B\,P\,e_{t-1}/J + P'\,e_t/J'

      which for SGD with momentum equals master weights. P = 1 + ∂u/∂θ̂ is of decoupled weight decay;
      J' and P' are those of the next step. SOAP's and Shampoo's J' is not known, so that it is
      refused for them.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`.

  Raises:
    ValueError: at `init`, naming the leaf, if a quantized leaf has no momentum, or one that cannot
      carry an error back: Lion (the sign has no derivative), Muon, LAMB and norms clipped after the
      momentum (not linear), b1 = 0. It has the line of code that trains with the same optimizer and
      a residual of a byte per weight.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.error_feedback_to_momentum(optax.adamw(1e-3), eco.quantize_params(seed=0))
    >>> state = tx.init(params)
    >>> loss, grads = eco.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = eco.apply_updates(params, updates)
    >>> params["w"].qvalue.dtype
    dtype(float8_e4m3fn)

  References:
    Nikdan et al, `ECO: Quantized Training without Full-Precision Master Weights
    <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithms 2 and 3.
  """
  return build(inner, quantizer, learning_rate, keep_error)
