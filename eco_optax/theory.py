"""SGD with momentum under quantization, in closed forms, bounds and a simulator; Muon's derivative.

Momentum is in the paper's form, m̃ = β m + (1 − β) g and u = −η m̃, see `sgdm`, or u = −η K m̃ with a
preconditioner K that stays, see `preconditioned_sgdm`. The simulator runs
the package's own transforms, so what it finds holds for them and not for a copy of their formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax.transforms.error_feedback import error_feedback_to_momentum
from eco_optax.transforms.master_weights import master_weights
from eco_optax.transforms.quantize_params import chain
from eco_optax.updates import apply_updates, value_and_grad

METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
  "master_weights": master_weights,
  "naive": chain,
  "eco": error_feedback_to_momentum,
  "eco_keep_error": functools.partial(error_feedback_to_momentum, keep_error=True),
}
"""How each method joins an optimizer and a quantizer, by name."""


def sgdm(learning_rate: float, beta: float) -> optax.GradientTransformation:
  """SGD with momentum as the theory has it: m̃ = β m + (1 − β) g, u = −η m̃."""
  return optax.chain(optax.ema(beta, debias=False), optax.scale_by_learning_rate(learning_rate))


def preconditioned_sgdm(
  learning_rate: float, beta: float, left: Any, right: Any
) -> optax.GradientTransformation:
  r"""SGD with momentum behind a preconditioner that stays: m̃ = β m + (1 − β) g, u = −η A m̃ B.

  With A = L^(−1/4) and B = R^(−1/4) it is Shampoo with constant factors. On row-major vectors of
  weights it is K = A ⊗ B, `np.kron(left, right)`. Its state does not know K; the rule inverts the
  step by conjugate residuals, which are exact from as many steps on as K has different eigenvalues.

  Args:
    learning_rate: η.
    beta: β.
    left: A, symmetric and positive, (m, m) with m ≤ 3.
    right: B, symmetric and positive, (n, n) with n ≤ 3: the rule tries an optimizer on matrices of
      this size.

  Returns:
    A `GradientTransformation` for arrays (…, m, n).

  Example:
    >>> import jax.numpy as jnp
    >>> tx = preconditioned_sgdm(0.5, 0.5, jnp.diag(jnp.array([1.0, 4.0])), jnp.eye(1))
    >>> tx.update(jnp.ones((2, 1)), tx.init(jnp.ones((2, 1))))[0]
    Array([[-0.25],
           [-1.  ]], dtype=float32)
  """
  left, right = (jnp.asarray(side, jnp.float32) for side in (left, right))
  times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  precondition = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u: times(times(left, u), right), updates)
  )
  return optax.chain(
    optax.ema(beta, debias=False), precondition, optax.scale_by_learning_rate(learning_rate)
  )


def _check_rates(learning_rate: Any, beta: Any) -> None:
  if not (np.all(np.greater(beta, 0)) and np.all(np.less(beta, 1))):
    raise ValueError(f"beta must be above 0 and below 1, got {beta}")
  if not np.all(np.greater(learning_rate, 0)):
    raise ValueError(f"learning_rate must be above 0, got {learning_rate}")


def stability_limit(beta: Any, curvature: Any) -> Any:
  r"""The learning rate below which SGD with momentum is stable on f(x) = L x²/2.

  .. math:: \eta < \frac{2(1+\beta)}{(1-\beta) L}

  Args:
    beta: decay of the momentum.
    curvature: the L of the quadratic.

  Returns:
    The limit, the same for all methods: what they do with noise does not change how it fades.

  Example:
    >>> stability_limit(0.5, 1.0)
    6.0
  """
  return 2 * (1 + beta) / ((1 - beta) * curvature)


def contraction(learning_rate: float, beta: float, curvature: float) -> float:
  r"""The factor per step at which a start is forgotten on f(x) = L x²/2.

  It is the largest modulus of a root of

  .. math:: z^2 - (1 + \beta - \eta (1-\beta) L) z + \beta

  Args:
    learning_rate: η.
    beta: decay of the momentum.
    curvature: the L of the quadratic.

  Returns:
    The factor; below 1 where the learning rate is below `stability_limit`.

  Example:
    >>> round(contraction(1.0, 0.81, 1.0), 6)
    0.9
  """
  trace = 1 + beta - learning_rate * (1 - beta) * curvature
  return float(np.max(np.abs(np.roots([1, -trace, beta]))))


def stationary_second_moment(
  method: str, learning_rate: Any, beta: Any, curvature: Any, variance: Any = 1.0
) -> Any:
  r"""E[x̂²] that a stored weight settles at on f(x) = L x²/2 when quantization adds white noise.

  With a quantizer q(x) = x + ξ, E ξ = 0, E ξ² = σ²:

  .. math::
    \text{master weights: } & \sigma^2 + \sigma^2 \frac{L\eta(1+\beta)}{2(1+\beta) - L\eta(1-\beta)}
    \\ \text{naive: } &
    \sigma^2 \frac{(1-\beta^2) + 2\beta L\eta}{L\eta\,[2(1-\beta^2) - L\eta(1-\beta)^2]}
    \\ \text{ECO: } & \frac{2\sigma^2}{2(1-\beta^2) - L\eta(1-\beta)^2}

  As η → 0 they tend to σ², to infinity as σ²/(2Lη), and to σ²/(1 − β²). ECO's is that of the
  memory-free rule; with the last error kept it is master weights. The order turns around at large
  learning rates: naive removal is below ECO for Lη > (1+β)/2, ECO below master weights for
  Lη > β/(1−β), as far as these are stable.

  Args:
    method: a name of `METHODS`.
    learning_rate: η, a number or an array.
    beta: decay of the momentum.
    curvature: the L of the quadratic.
    variance: σ².

  Returns:
    E[x̂²]: a number, or an array if an argument is one.

  Raises:
    ValueError: for an unknown method, or a learning rate at or above `stability_limit`.

  Example:
    >>> round(stationary_second_moment("eco", 1e-9, 0.9, 1.0), 6) == round(1 / (1 - 0.9**2), 6)
    True

  References:
    Nikdan et al, `ECO: Quantized Training without Full-Precision Master Weights
    <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  _check_rates(learning_rate, beta)
  if np.any(np.greater_equal(learning_rate, stability_limit(beta, curvature))):
    raise ValueError(
      f"no stationary state: learning_rate {learning_rate} is not below"
      f" {stability_limit(beta, curvature)}, where momentum {beta} becomes unstable"
    )
  a = learning_rate * curvature
  if method in ("master_weights", "eco_keep_error"):
    return variance * (1 + a * (1 + beta) / (2 * (1 + beta) - a * (1 - beta)))
  damping = 2 * (1 - beta**2) - a * (1 - beta) ** 2
  if method == "naive":
    return variance * (1 - beta**2 + 2 * beta * a) / (a * damping)
  if method == "eco":
    return variance * 2 / damping
  raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def stationary_covariance(
  method: str,
  learning_rate: float,
  beta: float,
  curvature: Any,
  preconditioner: Any,
  variance: float = 1.0,
) -> np.ndarray:
  r"""E[x̂ x̂ᵀ] that stored weights settle at on f(x) = xᵀ H x / 2 behind a preconditioner K.

  For u = −η K m̃ and a quantizer q(x) = x + ξ, E ξ ξᵀ = σ² 1. In y = K^(−1/2) x it is SGD with
  momentum on the curvature K^(1/2) H K^(1/2) = W diag(a) Wᵀ with noise of covariance σ² K⁻¹, so
  that modes i and j share noise. With s_i = η (1 − β) a_i they settle at

  .. math::
    E[x̂ x̂^T] = K^{1/2} W \left[ C ∘ (\sigma^2 W^T K^{-1} W) \right] W^T K^{1/2}, \quad
    S_{ij} = \frac{1 - \beta^2}
    {(1-\beta)^2 [(1+\beta)(s_i + s_j) - s_i s_j] + \beta (s_i - s_j)^2}

  .. math::
    \text{master weights: } & C_{ij} = 1 + s_i s_j S_{ij}
    \\ \text{naive: } & C_{ij} = S_{ij} [(1-\beta)^2 + \beta (s_i + s_j) / (1+\beta)]
    \\ \text{ECO: } & C_{ij} = S_{ij} (s_i + s_j) / (1+\beta)

  As η → 0 ECO tends to σ²/(1 − β²) times the identity and master weights to σ² times it, whatever
  K and H are: a preconditioner moves no floor. Naive removal grows as 1/η, with a covariance Y that
  solves K H Y + Y H K = σ²/η. Where K and H commute, each eigendirection of theirs has what
  `stationary_second_moment` says of one weight with η times its eigenvalue of K.

  Args:
    method: a name of `METHODS`.
    learning_rate: η.
    beta: decay of the momentum.
    curvature: H, symmetric and positive, (n, n).
    preconditioner: K, symmetric and positive, (n, n); `np.kron(left, right)` for matrices.
    variance: σ².

  Returns:
    float64 array (n, n).

  Raises:
    ValueError: for an unknown method, a matrix that is not symmetric and positive, or a learning
      rate at or above `stability_limit` of the largest curvature of K^(1/2) H K^(1/2).

  Example:
    >>> stationary_covariance("eco", 1e-9, 0.5, np.diag([1.0, 9.0]), np.diag([4.0, 1.0])).round(6)
    array([[1.333333, 0.      ],
           [0.      , 1.333333]])
  """
  _check_rates(learning_rate, beta)
  h, k = (
    _positive(name, x) for name, x in (("curvature", curvature), ("preconditioner", preconditioner))
  )
  values, vectors = np.linalg.eigh(k)
  root, inverse = (vectors * values**p @ vectors.T for p in (0.5, -1.0))
  a, modes = np.linalg.eigh(root @ h @ root)
  if learning_rate >= stability_limit(beta, a[-1]):
    raise ValueError(
      f"no stationary state: learning_rate {learning_rate} is not below"
      f" {stability_limit(beta, a[-1])}, where momentum {beta} becomes unstable"
    )
  s = learning_rate * (1 - beta) * a
  total, product, gap = s[:, None] + s, s[:, None] * s, s[:, None] - s
  shared = (1 - beta**2) / ((1 - beta) ** 2 * ((1 + beta) * total - product) + beta * gap**2)
  if method in ("master_weights", "eco_keep_error"):
    factors = 1 + product * shared
  elif method == "naive":
    factors = shared * ((1 - beta) ** 2 + beta * total / (1 + beta))
  elif method == "eco":
    factors = shared * total / (1 + beta)
  else:
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
  to_weights = root @ modes
  noise = variance * modes.T @ inverse @ modes
  return to_weights @ (factors * noise) @ to_weights.T


def _positive(name: str, matrix: Any) -> np.ndarray:
  """A matrix in float64, which must be symmetric and positive."""
  x = np.asarray(matrix, np.float64)
  is_square = x.ndim == 2 and x.shape[0] == x.shape[1]
  if not (is_square and np.allclose(x, x.T) and np.linalg.eigvalsh(x)[0] > 0):
    raise ValueError(f"{name} must be a symmetric positive matrix, got {matrix!r}")
  return x


def momentum_bound(learning_rate: float, beta: float, gradient: float, variance: float) -> float:
  r"""Bound on E‖m‖² of ECO when rounding is unbiased.

  With ‖∇f‖ ≤ G, E‖e‖² ≤ σ² and α = (1/η)(1 − 1/β):

  .. math:: E\|m\|^2 \le 2 G^2 + \frac{2\alpha^2\sigma^2}{1-\beta^2}

  Args:
    learning_rate: η.
    beta: decay of the momentum.
    gradient: G, on all weights together.
    variance: σ², the sum over all weights.

  Returns:
    The bound.

  Example:
    >>> momentum_bound(0.1, 0.5, gradient=1.0, variance=0.0)
    2.0

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  _check_rates(learning_rate, beta)
  alpha = (1 - 1 / beta) / learning_rate
  return 2 * gradient**2 + 2 * alpha**2 * variance / (1 - beta**2)


def nearest_momentum_bound(
  learning_rate: float, beta: float, gradient: float, error: float
) -> float:
  r"""Bound on ‖m‖² of ECO when the error is bounded and may have a bias, as with nearest rounding.

  With ‖∇f‖ ≤ G, ‖e‖ ≤ δ and α = (1/η)(1 − 1/β):

  .. math:: \|m\|^2 \le \left(G + \frac{|\alpha|\delta}{1-\beta}\right)^2

  Args:
    learning_rate: η.
    beta: decay of the momentum.
    gradient: G, on all weights together.
    error: δ, of all weights together.

  Returns:
    The bound.

  Example:
    >>> nearest_momentum_bound(0.5, 0.5, gradient=1.0, error=0.25)
    4.0

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  _check_rates(learning_rate, beta)
  alpha = (1 - 1 / beta) / learning_rate
  return (gradient + abs(alpha) * error / (1 - beta)) ** 2


def gradient_bound(
  gap: float, steps: float, learning_rate: float, beta: float, smoothness: float, momentum: float
) -> float:
  r"""The theorem: how small the mean over steps of E‖∇f(θ̂_t)‖² gets with ECO.

  For any L-smooth f and η ≤ 1/(2L), with E‖m‖² ≤ M² (`momentum_bound`, or
  `nearest_momentum_bound`):

  .. math::
    \min_{t<T} E\|\nabla f(\hat\theta_t)\|^2
    \le \frac1T \sum_{t<T} E\|\nabla f(\hat\theta_t)\|^2
    \le \frac{4 (f(\theta_0) - f^*)}{\eta T} + \frac{2 L^2\eta^2\beta^2}{(1-\beta)^2} M^2

  The sequence θ_t = θ̂_t − (ηβ/(1−β)) m_t obeys θ_{t+1} = θ_t − η∇f(θ̂_t) whatever the quantizer
  does, and the second term is 2L² times its squared distance from θ̂_t. With unbiased rounding it is
  4η²β²L²G²/(1−β)² + 4L²σ²/(1−β²).

  Args:
    gap: f(θ_0) − f*.
    steps: T; `math.inf` leaves the floor.
    learning_rate: η.
    beta: decay of the momentum.
    smoothness: L.
    momentum: M².

  Returns:
    The bound.

  Raises:
    ValueError: for a learning rate above 1/(2L), of which the theorem says nothing.

  Example:
    >>> variance = momentum_bound(0.1, 0.5, gradient=0.0, variance=3.0)
    >>> round(gradient_bound(1.0, math.inf, 0.1, 0.5, 1.0, variance), 6)  # 4L²σ²/(1 − β²)
    16.0

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  _check_rates(learning_rate, beta)
  if learning_rate > 1 / (2 * smoothness):
    raise ValueError(
      f"the theorem needs learning_rate ≤ 1/(2L) = {1 / (2 * smoothness)}, got {learning_rate}"
    )
  distance = (learning_rate * beta / (1 - beta)) ** 2 * momentum
  return 4 * gap / (learning_rate * steps) + 2 * smoothness**2 * distance


class NoiseState(NamedTuple):
  """State of `add_noise`."""

  key: jax.Array  # shape=(), a typed key.


def add_noise(variance: float, seed: int = 0) -> optax.GradientTransformation:
  """The quantizer of the theory: q(x) = x + ξ with independent uniform ξ, E ξ = 0 and E ξ² = σ².

  For float parameters; it shows what a quantizer of one's own may be.

  Args:
    variance: σ².
    seed: of the noise.

  Returns:
    A `GradientTransformation` that moves a proposed update.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> tx = eco.error_feedback_to_momentum(eco.theory.sgdm(0.1, 0.9), eco.theory.add_noise(1e-4))
    >>> tx.init({"x": jnp.ones(3)}).inner[0].ema["x"].shape
    (3,)
  """
  half_width = math.sqrt(3 * variance)

  def init(params: Any) -> NoiseState:
    del params
    return NoiseState(jax.random.key(seed))

  def update(updates: Any, state: NoiseState, params: Any = None) -> tuple[Any, NoiseState]:
    del params
    leaves, treedef = jax.tree.flatten(updates)
    next_key, *keys = jax.random.split(state.key, len(leaves) + 1)
    moved = [
      u + jax.random.uniform(key, u.shape, u.dtype, -half_width, half_width)
      for u, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved), NoiseState(next_key)

  return optax.GradientTransformation(init, update)


def simulate(
  tx: optax.GradientTransformation,
  loss: Callable[[Any], jax.Array],
  params: Any,
  steps: int,
  measure: Callable[[Any, Any, Any], Any],
) -> Any:
  """Trains on the exact gradient of a loss and measures every step.

  Independent chains are a leading axis of the parameters over which the loss is a sum.

  Args:
    tx: a transformation of this package, or any other.
    loss: a scalar function of the dense parameters.
    params: to start from, packed or float.
    steps: how many.
    measure: called with the gradients of a step and the parameters and state that it leaves.

  Returns:
    What `measure` returned, stacked over steps.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> eco.theory.simulate(
    ...   eco.theory.sgdm(0.5, 0.5), lambda x: x**2 / 2, jnp.ones([]), 3, lambda g, x, state: x
    ... )
    Array([0.75    , 0.4375  , 0.171875], dtype=float32)
  """
  gradient = value_and_grad(loss)

  def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Any]:
    params, state = carry
    grads = gradient(params)[1]
    updates, state = tx.update(grads, state, params)
    params = apply_updates(params, updates)
    return (params, state), measure(grads, params, state)

  run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[1])
  return run((params, tx.init(params)))


class Estimate(NamedTuple):
  """A mean over independent chains."""

  value: float
  standard_error: float
  burn_in: int  # Steps left out at the start.
  steps: int  # Steps averaged over after them.


_GROUPS = 100  # Of chains; their means are independent, whatever each chain's correlation in time.


def simulate_stationary(
  method: str,
  learning_rate: float,
  beta: float,
  curvature: float,
  variance: float = 1.0,
  chains: int = 100_000,
  seed: int = 0,
) -> Estimate:
  """Measures `stationary_second_moment` by running the package's transforms.

  Chains start at the optimum with no momentum and run until what they remember of that has faded to
  1e-4 of a second moment; then x̂² is averaged over four times the memory of a chain.

  Args:
    method: a name of `METHODS`.
    learning_rate: η.
    beta: decay of the momentum.
    curvature: the L of the quadratic.
    variance: σ² of `add_noise`.
    chains: how many, a multiple of 100.
    seed: of the noise.

  Returns:
    The estimate; its standard error comes from 100 groups of chains.

  Raises:
    ValueError: if there is no stationary state, or chains do not make groups.

  Example:
    >>> import eco_optax as eco
    >>> found = eco.theory.simulate_stationary("eco", 0.5, 0.5, 1.0, chains=1000)
    >>> wanted = eco.theory.stationary_second_moment("eco", 0.5, 0.5, 1.0)
    >>> abs(found.value - wanted) < 5 * found.standard_error
    True
  """
  if chains % _GROUPS or chains < _GROUPS:
    raise ValueError(f"chains must be a multiple of {_GROUPS}, got {chains}")
  factor = contraction(learning_rate, beta, curvature)
  if factor >= 1:
    raise ValueError(
      f"no stationary state: learning_rate {learning_rate} is not below"
      f" {stability_limit(beta, curvature)}, where momentum {beta} becomes unstable"
    )
  burn_in = math.ceil(math.log(1e-4) / (2 * math.log(factor)))
  steps = max(math.ceil(4 / (1 - factor)), 32)
  group_means = simulate(
    METHODS[method](sgdm(learning_rate, beta), add_noise(variance, seed)),
    lambda x: jnp.sum(np.float32(curvature / 2) * x**2),
    jnp.zeros(chains),
    burn_in + steps,
    lambda grads, x, state: jnp.mean(jnp.square(x).reshape(_GROUPS, -1), axis=1),
  )
  means = np.asarray(group_means, np.float64)[burn_in:].mean(axis=0)
  error = means.std(ddof=1) / math.sqrt(_GROUPS)
  return Estimate(float(means.mean()), float(error), burn_in, steps)


def polar_derivative(matrix: Any, direction: Any) -> jax.Array:
  r"""The derivative of the polar factor, which is what Muon makes of its momentum.

  For M = P S Qᵀ the polar factor is U = P Qᵀ = M (MᵀM)^{-1/2}. A change E, seen in the singular
  bases as A = Pᵀ E Q, changes it by

  .. math::
    dU = P \left[ \frac{A - A^\top}{\sigma_i + \sigma_j} \right] Q^\top
      + (1 - P P^\top) E Q S^{-1} Q^\top + P S^{-1} P^\top E (1 - Q Q^\top)

  The symmetric part of A is invisible: no change of the momentum along it, however large, moves a
  weight. It is one of n (n + 1) / 2 directions of the n × m there are. The last two terms are zero
  for square matrices.

  Args:
    matrix: (n, m) floats of full rank; leading axes are batches.
    direction: E, of the same shape.

  Returns:
    dU, of the same shape, in the matrix's dtype.

  Example:
    >>> import numpy as np
    >>> bool(np.all(polar_derivative(np.diag([2.0, 1.0]), np.diag([5.0, 7.0])) == 0))
    True

  References:
    Kenney and Laub, `Polar decomposition and matrix sign function condition estimates
    <https://doi.org/10.1137/0912027>`_, 1991.
  """
  p, s, qt, a, left, right = _singular(matrix, direction)
  sums = s[..., :, None] + s[..., None, :]
  inside = p @ ((a - _transposed(a)) / sums) @ qt
  return (
    inside
    + (left @ _transposed(qt) / s[..., None, :]) @ qt
    + p @ (_transposed(p) @ right / s[..., :, None])
  )


def polar_payback(matrix: Any, error: Any) -> jax.Array:
  r"""The change of a matrix for which its polar factor changes by as much of an error as it can.

  It is the pseudo-inverse of `polar_derivative`, which gives the error's antisymmetric part back,
  in the singular bases, and what lies outside the range. The symmetric part is lost.

  .. math::
    X = P \left[ (\sigma_i + \sigma_j) \frac{A - A^\top}{4} \right] Q^\top
      + (1 - P P^\top) E Q S Q^\top + P S P^\top E (1 - Q Q^\top)

  Args:
    matrix: (n, m) floats of full rank; leading axes are batches.
    error: of the same shape.

  Returns:
    X, of the same shape, in the matrix's dtype.

  Example:
    >>> import numpy as np
    >>> matrix, turn = np.diag([2.0, 1.0]), np.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> bool(np.allclose(polar_derivative(matrix, polar_payback(matrix, turn)), turn, atol=1e-6))
    True
  """
  p, s, qt, a, left, right = _singular(matrix, error)
  sums = s[..., :, None] + s[..., None, :]
  inside = p @ ((a - _transposed(a)) / 4 * sums) @ qt
  return (
    inside
    + (left @ _transposed(qt) * s[..., None, :]) @ qt
    + p @ (_transposed(p) @ right * s[..., :, None])
  )


def _transposed(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, -1, -2)


def _singular(matrix: Any, other: Any) -> tuple[jax.Array, ...]:
  """P, S and Qᵀ of a matrix; Pᵀ E Q of another, and its parts outside the range of P and of Q."""
  matrix, other = jnp.asarray(matrix), jnp.asarray(other)
  p, s, qt = jnp.linalg.svd(matrix, full_matrices=False)
  a = _transposed(p) @ other @ _transposed(qt)
  return p, s, qt, a, other - p @ (_transposed(p) @ other), other - other @ _transposed(qt) @ qt
