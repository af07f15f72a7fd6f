"""1-bit Adam: Adam whose variance is frozen after a warm-up, so that its momentum may be coded."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax.quantized_array import Where
from eco_optax.wire import exchange as exchange_lib
from eco_optax.wire import feedback
from eco_optax.wire import state as state_lib
from eco_optax.wire.compressors import Compressor, sign
from eco_optax.wire.exchange import Axis, Exchange


class OneBitAdamState(NamedTuple):
  """State of `scale_by_one_bit_adam`; see `WireState` for what a worker has of its own."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken.
  mu: Any  # float32, the same on all workers.
  nu: Any  # float32, as it was at the end of the warm-up.
  own: dict[str, Any]  # "error".
  server: Any


def scale_by_one_bit_adam(
  axis: Axis,
  warmup: int,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  compressor: Compressor | None = None,
  exchange: Exchange = "scatter",
  seed: int = 0,
  workers: int | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""1-bit Adam: `optax.scale_by_adam` that exchanges its momentum in a bit per value.

  For `warmup` steps gradients are averaged exactly, and it is Adam. From then on the variance v
  stays what it is, and each worker sends what its gradient makes of the common momentum:

  .. math:: m_i = \beta_1 m + (1 - \beta_1) g_i, \quad c_i = C(e_i + m_i), \quad
            e_i \leftarrow e_i + m_i - c_i, \quad m \leftarrow \frac1n \sum_i c_i, \quad
            u = \hat m / (\sqrt{\hat v} + \epsilon)

  With `exchange="scatter"` the mean is compressed again, with an error feedback of its own, as in
  the paper. Momentum and variance are divided by 1 − β^t as in Adam, the variance by that of the
  last step of the warm-up. A variance that was still zero then would divide by eps for good: such
  values are not moved.

  Args:
    axis: of the mesh, or a tuple of several, over which workers exchange.
    warmup: steps of exact exchange, 1 or more; the paper takes 15 to 25% of all, and no fewer than
      the learning rate's warm-up.
    b1: decay of the momentum.
    b2: decay of the variance.
    eps: added to the root of the variance.
    compressor: a contraction; None is `wire.sign()`.
    exchange: as in `error_feedback`.
    seed: of random bits; the same on all workers.
    workers: their number, which `init` needs outside of the axis' scope.
    where: as in `error_feedback`; other leaves take the steps of Adam, with the frozen variance.

  Returns:
    A `GradientTransformationExtraArgs`, used as `error_feedback`, in the place of
    `optax.scale_by_adam`: chain weight decay and the learning rate behind it, and
    `eco.quantize_params` by `eco.chain` or `eco.master_weights`. `eco.error_feedback_to_momentum`
    does not take it, for its momentum is on the wire. Its state is 12 bytes per value. A gradient
    that is not finite skips the step as in `error_feedback`.

  Raises:
    ValueError: as `error_feedback`, and for a warm-up of no steps or decays outside of [0, 1).

  Example:
    >>> import optax
    >>> from eco_optax import wire
    >>> tx = optax.chain(
    ...   wire.scale_by_one_bit_adam("data", warmup=100, workers=4),
    ...   optax.add_decayed_weights(0.1),
    ...   optax.scale_by_learning_rate(1e-3))

  References:
    Tang et al, `1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
    Speed <https://arxiv.org/abs/2102.02888>`_, 2021, Algorithm 1.
  """
  link = feedback.make_link("scale_by_one_bit_adam", compressor or sign(), axis, exchange, seed)
  if warmup < 1:
    raise ValueError(f"wire.scale_by_one_bit_adam: warmup must be 1 step or more, got {warmup}")
  for name, decay in (("b1", b1), ("b2", b2)):
    if not 0 <= decay < 1:
      raise ValueError(f"wire.scale_by_one_bit_adam: {name} must be in [0, 1), got {decay}")
  where = where or state_lib.is_large
  keep1, keep2 = np.float32(b1), np.float32(b2)
  new1, new2 = np.float32(1 - b1), np.float32(1 - b2)

  def init(params: Any) -> OneBitAdamState:
    held = state_lib.start(link, params, ("error",), (), where, workers)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    mu, nu = (jax.tree.map(zeros, state_lib.shapes(params)) for _ in range(2))
    return OneBitAdamState(held.step, mu, nu, held.own, held.server)

  def update(
    updates: Any, state: OneBitAdamState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, OneBitAdamState]:
    del params, extra_args
    state_lib.check_gradients(updates)
    state_lib.check_workers(axis, workers, link.workers())
    grads = {path: x.astype(jnp.float32) for path, x in state_lib.flat(updates).items()}
    chosen = {path: g for path, g in grads.items() if where(path, g)}
    state_lib.check_state(state, chosen, ("error",), ())
    mu, nu, error = map(state_lib.flat, (state.mu, state.nu, state.own["error"]))
    server = None if state.server is None else state.server[0]
    step = optax.safe_increment(state.step)
    is_warm = step <= warmup

    # Only what crosses the wire is in the branches, of which all workers take the same one.
    momenta = {path: error[path][0] + keep1 * mu[path] + new1 * g for path, g in chosen.items()}
    sent, means, server = jax.lax.cond(
      is_warm,
      lambda: (momenta, exchange_lib.mean_in_order(axis, chosen), server),
      lambda: exchange_lib.exchange(link, momenta, server, state.step),
    )
    rest = {path: g for path, g in grads.items() if path not in chosen}
    means |= exchange_lib.mean_in_order(axis, rest)

    new_mu, new_nu, out = {}, {}, {}
    debias1 = 1 / (1 - keep1 ** step.astype(jnp.float32))
    debias2 = 1 / (1 - keep2 ** jnp.minimum(step, warmup).astype(jnp.float32))
    for path, mean in means.items():
      new_mu[path] = keep1 * mu[path] + new1 * mean
      if path in chosen:
        new_mu[path] = jnp.where(is_warm, new_mu[path], mean)
      new_nu[path] = jnp.where(is_warm, keep2 * nu[path] + new2 * mean * mean, nu[path])
      direction = new_mu[path] * debias1 / (jnp.sqrt(new_nu[path] * debias2) + np.float32(eps))
      out[path] = jnp.where(is_warm | (new_nu[path] > 0), direction, np.float32(0))
    errors = {path: (momenta[path] - sent[path])[None] for path in chosen}

    is_finite = exchange_lib.all_finite(link, list(grads.values()), list(new_mu.values()))
    new_state = OneBitAdamState(
      step,
      state_lib.like(state.mu, new_mu),
      state_lib.like(state.nu, new_nu),
      {"error": state_lib.like(state.own["error"], errors)},
      None if server is None else server[None],
    )
    return feedback.finish(is_finite, updates, out, state, new_state)

  return optax.GradientTransformationExtraArgs(init, update)
