"""Gradient exchange with error feedback, as Optax transformations.

Each takes the place of `jax.lax.pmean` of the gradients inside `jax.shard_map`: updates are a
worker's own gradients, and what comes out is an estimate of their mean, the same on all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import trees
from eco_optax.quantized_array import Where
from eco_optax.wire import exchange as exchange_lib
from eco_optax.wire import state as state_lib
from eco_optax.wire.compressors import Compressor
from eco_optax.wire.exchange import Axis, Exchange, Link
from eco_optax.wire.state import WireState

Arrays = dict[str, jax.Array]


class Rule(NamedTuple):
  """A method: what a worker sends of one leaf, and what it makes of the answer.

  Both functions take a leaf's arrays by name. `settle` is given what was sent, decompressed, and
  the mean over workers; it returns own arrays, shared arrays and the estimate of the mean gradient.
  """

  own: tuple[str, ...]
  shared: tuple[str, ...]
  message: Callable[[jax.Array, Arrays], jax.Array]
  settle: Callable[
    [jax.Array, Arrays, Arrays, jax.Array, jax.Array], tuple[Arrays, Arrays, jax.Array]
  ]


def make_link(
  method: str,
  compressor: Compressor,
  axis: Axis,
  exchange: Exchange,
  seed: int,
  weights: Sequence[float] | None = None,
) -> Link:
  """A link, if errors of its compressor may be fed back.

  Raises:
    ValueError: naming the method and what it cannot use.
  """
  if compressor.delta is None:
    raise ValueError(
      f"wire.{method} feeds errors back, and {compressor.name} is no contraction, so that they"
      " would grow: leave out unbiased=True, or take a smaller block or more bits"
    )
  if exchange not in ("scatter", "gather"):
    raise ValueError(f"wire.{method}: unknown exchange {exchange!r}: use 'scatter' or 'gather'")
  return Link(axis, compressor, exchange, seed, None if weights is None else tuple(weights))


def _transformation(
  link: Link, rule: Rule, workers: int | None, where: Where | None
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a rule."""
  where = where or state_lib.is_large

  def init(params: Any) -> WireState:
    return state_lib.start(link, params, rule.own, rule.shared, where, workers)

  def update(
    updates: Any, state: WireState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, WireState]:
    del params, extra_args
    state_lib.check_gradients(updates)
    count = state_lib.check_workers(link.axis, workers, link.workers())
    if link.weights is not None and len(link.weights) != count:
      raise ValueError(f"wire: smoothness is of {len(link.weights)} workers, and {count} exchange")
    grads = state_lib.flat(updates)
    chosen = {path: x.astype(jnp.float32) for path, x in grads.items() if where(path, x)}
    state_lib.check_state(state, chosen, rule.own, rule.shared)
    own_leaves = {name: state_lib.flat(tree) for name, tree in state.own.items()}
    shared_leaves = {name: state_lib.flat(tree) for name, tree in state.shared.items()}
    own = {path: {name: x[path][0] for name, x in own_leaves.items()} for path in chosen}
    shared = {path: {name: x[path] for name, x in shared_leaves.items()} for path in chosen}

    messages = {path: rule.message(g, own[path]) for path, g in chosen.items()}
    before = None if state.server is None else state.server[0]
    sent, means, server = exchange_lib.exchange(link, messages, before, state.step)
    rest = {path: g for path, g in grads.items() if path not in chosen}
    out = exchange_lib.mean_in_order(link.axis, rest)
    for path, g in chosen.items():
      own[path], shared[path], out[path] = rule.settle(
        g, own[path], shared[path], sent[path], means[path]
      )

    is_finite = exchange_lib.all_finite(link, list(grads.values()), list(out.values()))
    new_state = WireState(
      optax.safe_increment(state.step),
      {
        name: state_lib.like(tree, {path: x[name][None] for path, x in own.items()})
        for name, tree in state.own.items()
      },
      {
        name: state_lib.like(tree, {path: x[name] for path, x in shared.items()})
        for name, tree in state.shared.items()
      },
      None if server is None else server[None],
    )
    return finish(is_finite, updates, out, state, new_state)

  return optax.GradientTransformationExtraArgs(init, update)


def finish(
  is_finite: jax.Array, updates: Any, out: dict[str, jax.Array], state: Any, new_state: Any
) -> tuple[Any, Any]:
  """What comes out of a step, and its state: NaN and the old state where it was not finite.

  One worker's infinity would else be in errors for good. All leaves become NaN on all workers, so
  that whoever looks at any of them skips the step.
  """
  guarded = {path: jnp.where(is_finite, x, jnp.asarray(np.nan, x.dtype)) for path, x in out.items()}
  updates = trees.map_with_path(lambda path, leaf: guarded[path].astype(leaf.dtype), updates)
  return updates, trees.select(~is_finite, state, new_state)


def compressed(
  compressor: Compressor,
  axis: Axis,
  *,
  seed: int = 0,
  workers: int | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""The mean of compressed gradients; what is lost is lost.

  .. math:: g = \frac1n \sum_i C(g_i)

  With an unbiased compressor this is SGD with the variance of ω more (QSGD); with a biased one it
  may diverge. It has no state but a counter, and payloads of all workers are gathered.

  Args:
    compressor: of this module, such as `wire.fp8()`.
    axis: of the mesh, or a tuple of several, over which workers exchange.
    seed: of random bits; the same on all workers.
    workers: their number, which `init` needs outside of the axis' scope.
    where: chooses leaves by path and leaf; None those of 512 values and more. Others are exchanged
      exactly, in the order of workers.

  Returns:
    A `GradientTransformationExtraArgs`; see `error_feedback` for how it is used.

  Example:
    >>> from eco_optax import wire
    >>> tx = wire.compressed(wire.integers(4, unbiased=True), "data", workers=4)

  References:
    Alistarh et al, `QSGD <https://arxiv.org/abs/1610.02132>`_, 2017.
  """
  rule = Rule((), (), lambda g, own: g, lambda g, own, shared, sent, mean: (own, shared, mean))
  link = Link(axis, compressor, "gather", seed, None)
  return _transformation(link, rule, workers, where)


def error_feedback(
  compressor: Compressor,
  axis: Axis,
  *,
  exchange: Exchange = "scatter",
  seed: int = 0,
  workers: int | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Error feedback: each worker adds to its gradient what compression has lost before.

  .. math:: c_i = C(e_i + g_i), \quad e_i \leftarrow e_i + g_i - c_i, \quad
            g = \frac1n \sum_i c_i

  Errors are in units of gradients, as in Seide et al; EF-SGD has those of steps, which is the same
  at a constant learning rate. All that was ever lost is in the errors: Σ g = Σ mean(g_i) − mean(e).
  It suits minibatch gradients. Where workers' own gradients at the optimum differ, errors keep
  moving and a constant learning rate ends at a distance: take `ef21` or `econtrol` there.

  Args:
    compressor: a contraction, such as `wire.int4()` or `wire.sign()`.
    axis: of the mesh, or a tuple of several, over which workers exchange.
    exchange: "scatter": payloads are exchanged in parts, added, compressed again and gathered,
      twice the bytes of a payload, with an error feedback of the second compression as in 1-bit
      Adam. "gather": all payloads go to all workers, which is exact, and less for 2 workers.
    seed: of random bits; the same on all workers.
    workers: their number, which `init` needs outside of the axis' scope.
    where: chooses leaves by path and leaf; None those of 512 values and more. Others are exchanged
      exactly, in the order of workers.

  Returns:
    A `GradientTransformationExtraArgs` whose `update` takes a worker's own gradients inside
    `jax.shard_map(…, check_vma=False)` or `jax.vmap(…, axis_name=…)`. Its state is 4 bytes per
    value and 4/n of the second compression. If a gradient of any worker is not finite, all
    workers' state stays as it is and all leaves become NaN, which `optax.apply_if_finite` and
    `gradient_scale=` of this package's optimizers skip.

  Raises:
    ValueError: if the compressor is no contraction; in `update`, if the axis is not in scope, if
      the state is of another number of workers, or if `shard_map` has summed the gradients.

  Example:
    >>> import jax, jax.numpy as jnp, numpy as np, optax, eco_optax as eco
    >>> from eco_optax import wire
    >>> P = jax.sharding.PartitionSpec
    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    >>> params = eco.quantize({"w": jnp.ones((32, 16))}, eco.FP8)
    >>> tx = optax.chain(
    ...   wire.error_feedback(wire.int4(), "data", workers=mesh.size), eco.adamw(1e-3))
    >>> state = tx.init(params)
    >>> specs = wire.specs(state, "data")
    >>> def step(params, state, batch):
    ...   grads = eco.value_and_grad(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)[1]
    ...   updates, state = tx.update(grads, state, params)
    ...   return eco.apply_updates(params, updates), state
    >>> step = jax.jit(jax.shard_map(
    ...   step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs),
    ...   check_vma=False))
    >>> params, state = step(params, state, jnp.ones((8 * mesh.size, 32)))
    >>> state[0].own["error"]["w"].shape == (mesh.size, 32, 16)
    True

  References:
    Seide et al, `1-Bit Stochastic Gradient Descent`, 2014. Karimireddy et al, `Error Feedback Fixes
    SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019, Algorithm 2.
  """
  link = make_link("error_feedback", compressor, axis, exchange, seed)

  def settle(
    g: jax.Array, own: Arrays, shared: Arrays, sent: jax.Array, mean: jax.Array
  ) -> tuple[Arrays, Arrays, jax.Array]:
    return {"error": own["error"] + g - sent}, shared, mean

  rule = Rule(("error",), (), lambda g, own: own["error"] + g, settle)
  return _transformation(link, rule, workers, where)


def ef21(
  compressor: Compressor,
  axis: Axis,
  *,
  smoothness: Sequence[float] | None = None,
  exchange: Exchange = "scatter",
  seed: int = 0,
  workers: int | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""EF21: each worker compresses how its gradient differs from what all know of it.

  .. math:: c_i = C(g_i - h_i), \quad h_i \leftarrow h_i + c_i, \quad
            h \leftarrow h + \frac1n \sum_i c_i, \quad g = h

  Gradient descent with it converges linearly where f is strongly convex or satisfies the
  Polyak–Łojasiewicz condition, also where workers differ: with step
  γ ≤ 1/(L + L̃ √(2β/θ)), θ = 1 − √(1 − δ), β = (1 − δ)/θ, by 1 − γμ a step. L̃ is the quadratic
  mean of the workers' smoothness; in EF21-W, and by its analysis in EF21 too, the arithmetic mean.
  Gradients must not be noisy: noise of a worker is compressed and kept.

  Args:
    compressor: a contraction, such as `wire.top_k()` or `wire.sign()`.
    axis: of the mesh, or a tuple of several, over which workers exchange.
    smoothness: L_i of each worker's loss, for EF21-W: with w_i = L_i/Σ L, worker i compresses
      g_i/(n w_i) − h_i, and h adds up Σ w_i c_i. With compressors that scale with their input, as
      all of this module do, EF21-W takes the steps of EF21.
    exchange: as in `error_feedback`; "scatter" is EF21 compressed both ways (EF21-BC).
    seed: of random bits; the same on all workers.
    workers: their number, which `init` needs outside of the axis' scope.
    where: as in `error_feedback`.

  Returns:
    A `GradientTransformationExtraArgs`, used as `error_feedback`. Its state is 8 bytes per value.

  Raises:
    ValueError: as `error_feedback`, and if smoothness is not positive.

  Example:
    >>> from eco_optax import wire
    >>> tx = wire.ef21(wire.top_k(8, 256), "data", workers=4)

  References:
    Richtárik et al, `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021, Algorithm 2 and Theorem 2.
    Richtárik et al, `Error Feedback Reloaded <https://arxiv.org/abs/2402.10774>`_, 2024 (EF21-W).
    Fatkhullin et al, `EF21 with Bells & Whistles <https://arxiv.org/abs/2110.03294>`_, 2021.
  """
  weights = None
  if smoothness is not None:
    constants = np.asarray(smoothness, np.float64)
    if constants.ndim != 1 or not np.all(np.isfinite(constants) & (constants > 0)):
      raise ValueError(f"wire.ef21: smoothness must be positive, one per worker, got {smoothness}")
    weights = constants / constants.mean()  # n w_i
  link = make_link("ef21", compressor, axis, exchange, seed, weights)

  def message(g: jax.Array, own: Arrays) -> jax.Array:
    if weights is not None:
      g = g / jnp.asarray(weights, jnp.float32)[jax.lax.axis_index(axis)]
    return g - own["estimate"]

  def settle(
    g: jax.Array, own: Arrays, shared: Arrays, sent: jax.Array, mean: jax.Array
  ) -> tuple[Arrays, Arrays, jax.Array]:
    del g
    estimate = shared["mean"] + mean
    return {"estimate": own["estimate"] + sent}, {"mean": estimate}, estimate

  rule = Rule(("estimate",), ("mean",), message, settle)
  return _transformation(link, rule, workers, where)


def econtrol(
  compressor: Compressor,
  axis: Axis,
  *,
  eta: float | None = None,
  exchange: Exchange = "scatter",
  seed: int = 0,
  workers: int | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""EControl: EF21's differences, and an error that comes back at a controlled strength.

  .. math:: c_i = C(\eta e_i + g_i - h_i), \quad e_i \leftarrow e_i + g_i - h_i - c_i, \quad
            h_i \leftarrow h_i + c_i, \quad h \leftarrow h + \frac1n \sum_i c_i, \quad g = h

  It converges linearly where EF21 does, and with noisy gradients the errors average the noise out,
  as error feedback's do.

  Args:
    compressor: a contraction, such as `wire.top_k()` or `wire.sign()`.
    axis: of the mesh, or a tuple of several, over which workers exchange.
    eta: η; None is the paper's δ/(3 √(1 − δ) (1 + √(1 − δ))), at most 1.
    exchange: as in `error_feedback`.
    seed: of random bits; the same on all workers.
    workers: their number, which `init` needs outside of the axis' scope.
    where: as in `error_feedback`.

  Returns:
    A `GradientTransformationExtraArgs`, used as `error_feedback`. Its state is 12 bytes per value.

  Raises:
    ValueError: as `error_feedback`, and if eta is not between 0 and 1.

  Example:
    >>> from eco_optax import wire
    >>> tx = wire.econtrol(wire.sign(), "data", workers=4)

  References:
    Gao et al, `EControl: Fast Distributed Optimization with Compression and Error Control
    <https://arxiv.org/abs/2311.05645>`_, 2023.
  """
  link = make_link("econtrol", compressor, axis, exchange, seed)
  assert compressor.delta is not None
  if eta is None:
    eta = econtrol_eta(compressor.delta)
  if not 0 <= eta <= 1:
    raise ValueError(f"wire.econtrol: eta must be between 0 and 1, got {eta}")
  strength = np.float32(eta)

  def settle(
    g: jax.Array, own: Arrays, shared: Arrays, sent: jax.Array, mean: jax.Array
  ) -> tuple[Arrays, Arrays, jax.Array]:
    error = own["error"] + g - own["estimate"] - sent
    estimate = shared["mean"] + mean
    return {"error": error, "estimate": own["estimate"] + sent}, {"mean": estimate}, estimate

  rule = Rule(
    ("error", "estimate"),
    ("mean",),
    lambda g, own: strength * own["error"] + g - own["estimate"],
    settle,
  )
  return _transformation(link, rule, workers, where)


def econtrol_eta(delta: float) -> float:
  """η of EControl for a contraction of δ: δ/(3 √(1 − δ) (1 + √(1 − δ))), at most 1.

  Example:
    >>> from eco_optax import wire
    >>> round(wire.econtrol_eta(0.1), 4)
    0.018
  """
  root = float(np.sqrt(1 - delta))
  return min(1.0, delta / (3 * root * (1 + root))) if root > 0 else 1.0
