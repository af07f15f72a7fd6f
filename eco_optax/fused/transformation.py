"""ECO over AdamW and SGD with momentum in closed form: the steps of `adamw` and `sgd`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.fused import steps
from eco_optax.fused.fused_update import Leaf, fits
from eco_optax.fused.mesh import fused_update
from eco_optax.quantized_array import Rounding, is_quantized
from eco_optax.transforms import error_feedback
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.error_feedback import ErrorFeedbackState
from eco_optax.transforms.quantize_params import (
  PackedTransformation,
  float_gradients,
  require_params,
)


class FusedTransformation(PackedTransformation):
  """One whose update takes moments as `low_bit_moments` stores them, with that one's codec.

  It is called with `codec=` and `codec_step=`, the number of the step whose random bits it uses.
  """


class Closed(NamedTuple):
  """A stock optimizer whose step and rule are known in closed form."""

  step: steps.Step
  state_type: type  # Of the link of the optimizer's state that has the moments.
  fields: tuple[str, ...]  # Of its moments, the momentum first.
  # (that state, count of the schedule, factor of the gradients, weight decay) → scalars of `step`
  scalars: Callable[[Any, jax.Array | None, jax.Array, Any], Any]


def _rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array | None) -> jax.Array:
  rate = learning_rate(count) if callable(learning_rate) else learning_rate
  return jnp.asarray(rate, jnp.float32)


def _per_error(
  learning_rate: optax.ScalarOrSchedule,
  count: jax.Array | None,
  j: jax.Array,
  b: jax.Array,
  bias_count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """What the rule adds to the momentum per error where J = `j`, and whether it adds anything."""
  count = jnp.zeros([], jnp.int32) if count is None else count
  rates = error_feedback.rates_ahead(learning_rate, count)
  steps = error_feedback.payback(rates, b, bias_count)
  return error_feedback.inject(jnp.ones([], jnp.float32), j, steps)


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: Any,
  b2: Any,
  eps: Any,
  eps_root: Any,
  nesterov: bool,
) -> Closed:
  """`optax.adamw` in closed form."""

  def scalars(
    state: optax.ScaleByAdamState, count: jax.Array | None, clip: jax.Array, decay: Any
  ) -> steps.AdamScalars:
    t = optax.safe_increment(state.count).astype(jnp.float32)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    keep1, keep2, rate = f32(b1), f32(b2), _rate_at(learning_rate, count)
    debias1, lookahead = 1 / (1 - keep1**t), f32(0)
    if nesterov:
      debias1, lookahead = keep1 / (1 - keep1 ** (t + 1)), f32(1 - b1) * debias1
    # J is this over the denominator.
    j = -rate * keep1 * debias1
    injection, usable = _per_error(learning_rate, count, j, keep1, t)
    limit = jnp.where(usable, jnp.abs(j) / error_feedback.SMALLEST_DERIVATIVE, 0)
    return steps.AdamScalars(
      clip, f32(1 - b1), keep1, f32(1 - b2), keep2, debias1, lookahead, 1 / (1 - keep2**t),
      f32(eps_root), f32(eps), f32(decay), rate, injection, limit,
    )  # fmt: skip

  return Closed(
    steps.NADAMW if nesterov else steps.ADAMW, optax.ScaleByAdamState, ("mu", "nu"), scalars
  )


def sgd(learning_rate: optax.ScalarOrSchedule, momentum: Any, nesterov: bool) -> Closed:
  """`optax.sgd` with momentum in closed form."""

  def scalars(
    state: optax.TraceState, count: jax.Array | None, clip: jax.Array, decay: Any
  ) -> steps.SgdScalars:
    del state, decay
    keep, rate = jnp.asarray(momentum, jnp.float32), _rate_at(learning_rate, count)
    j = -rate * keep * (keep if nesterov else 1)
    injection, _ = _per_error(learning_rate, count, j, keep)
    return steps.SgdScalars(clip, keep, rate, injection)

  return Closed(steps.NESTEROV if nesterov else steps.SGD, optax.TraceState, ("trace",), scalars)


def _factor(updates: Any, scale: Any, max_norm: Any) -> jax.Array:
  """What gradients are multiplied by: a scale, and then what `optax.clip_by_global_norm` takes."""
  scale = jnp.ones([], jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
  if max_norm is None:
    return scale
  norm = optax.tree.norm(updates).astype(jnp.float32) * jnp.abs(scale)
  clip = jnp.where(norm < max_norm, np.float32(1), jnp.asarray(max_norm, jnp.float32) / norm)
  return scale * clip


def scale_gradients(updates: Any, scale: Any) -> Any:
  """Gradients times a factor, in their dtypes; None is 1."""
  if scale is None:
    return updates
  scale = jnp.asarray(scale, jnp.float32)
  return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), updates)


def _decays(decay: Any, mask: Any, updates: Any) -> dict[str, Any]:
  """Weight decay by path."""
  flags = jax.tree.map(lambda _: True, updates)
  if mask is not None:
    tree = mask(updates) if callable(mask) else mask
    flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), tree, updates)
  return {path: decay if flag else 0.0 for path, flag in momentum_lib.flat(flags).items()}


def _is_masked(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def fuse(
  general: optax.GradientTransformationExtraArgs,
  closed: Closed,
  rounding: Rounding,
  seed: int,
  max_norm: Any = None,
  decay: Any = 0.0,
  mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """`general` with the steps of packed leaves in closed form, each in one pass.

  Args:
    general: `error_feedback_to_momentum` over the optimizer, schedule-aware, perhaps behind a clip.
    closed: the optimizer.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    max_norm: of the clip, or None.
    decay: decoupled weight decay.
    mask: of the decay, as in `optax.adamw`.

  Returns:
    A transformation with the same state and, but for roundings of the last place, the same steps.
    Leaves that are not packed, or whose moments are stored in a way that the fused step does not
    know, take those of `general`.
  """
  is_moments = lambda node: isinstance(node, closed.state_type)

  def on_moments(fn: Callable[[str, Any], Any], inner: Any) -> Any:
    """The optimizer's state with `fn(field, moment)` in place of its moments."""
    change = lambda node: node._replace(**{f: fn(f, getattr(node, f)) for f in closed.fields})
    return jax.tree.map(
      lambda node: change(node) if is_moments(node) else node, inner, is_leaf=is_moments
    )

  def moments_in(state: ErrorFeedbackState) -> tuple[Any, list[dict[str, Any]]]:
    """The link of the optimizer that has the moments, and these by path."""
    nodes = [x for x in jax.tree.leaves(state.inner, is_leaf=is_moments) if is_moments(x)]
    return nodes[0], [momentum_lib.flat(getattr(nodes[0], field)) for field in closed.fields]

  def weights_of(params: Any) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    trees.map_with_path(weights.__setitem__, params, is_leaf=is_quantized)
    return weights

  def fused_paths(
    weights: dict[str, Any], moments: list[dict[str, Any]], rounds: bool
  ) -> list[str]:
    """Of leaves that are packed and whose moments the step takes, see `fits`."""
    return [
      path
      for path, leaf in weights.items()
      if is_quantized(leaf) and all(fits(m[path], rounds) for m in moments)
    ]

  def takes_whole(state: ErrorFeedbackState, params: Any, rounds: bool = False) -> list[str]:
    return fused_paths(weights_of(params), moments_in(state)[1], rounds)

  def update(
    updates: Any,
    state: ErrorFeedbackState,
    params: Any = None,
    codec: Any = None,
    codec_step: Any = None,
    shardings: Any = None,
    gradient_scale: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, ErrorFeedbackState]:
    require_params(params)
    weights = weights_of(params)
    places: dict[str, Any] = {}
    trees.map_with_path(places.__setitem__, shardings, is_leaf=is_quantized)
    gradients = momentum_lib.flat(updates)

    node, moments = moments_in(state)
    fused = fused_paths(weights, moments, codec is not None)
    keys = moments
    if codec is not None:
      keys = moments_in(codec.keys(state, momentum_lib.shapes_of(params), codec_step))[1]

    factor = _factor(float_gradients(updates, params), gradient_scale, max_norm)
    count = momentum_lib.inner_count(state.inner)
    decays = _decays(decay, mask, updates)
    done = {}
    for path in fused:
      leaf = Leaf(
        closed.scalars(node, count, factor, decays[path]),
        rounding_lib.stream_key(seed, state.quantizer.step, path),
        extra_args.get("layer"),
        weights[path],
        gradients[path],
        tuple(m[path] for m in moments),
        tuple(k[path] for k in keys) if codec is not None else (),
      )
      place = places.get(path)
      place = place.qvalue if is_quantized(place) else place
      done[path] = fused_update(closed.step, rounding, leaf, place)

    def rest(tree: Any) -> Any:
      """Without the leaves that are done."""
      return trees.map_with_path(
        lambda path, leaf: optax.MaskedNode() if path in done else leaf, tree, is_leaf=is_quantized
      )

    if max_norm is not None or gradient_scale is not None:
      # A second clip of what was clipped together finds nothing to do.
      updates = scale_gradients(updates, factor)
    rest_state = state._replace(inner=on_moments(lambda _, moment: rest(moment), state.inner))
    shapes = momentum_lib.shapes_of(rest(params))
    if codec is not None:
      rest_state = codec.read(rest_state, shapes)
    new_updates, new_state = general.update(rest(updates), rest_state, rest(params), **extra_args)
    if codec is not None:
      new_state = codec.store(new_state, rest(params), codec_step, extra_args.get("layer"))

    def fill(tree: Any, leaves: dict[str, Any]) -> Any:
      return trees.map_with_path(
        lambda path, leaf: leaves.get(path, leaf),
        tree,
        is_leaf=lambda leaf: is_quantized(leaf) or _is_masked(leaf),
      )

    def new_moment(field: str, moment: Any) -> Any:
      i = closed.fields.index(field)
      return fill(moment, {path: new[1][i] for path, new in done.items()})

    new_updates = fill(new_updates, {path: new[0] for path, new in done.items()})
    return new_updates, new_state._replace(inner=on_moments(new_moment, new_state.inner))

  return FusedTransformation(general.init, update, takes_whole)
