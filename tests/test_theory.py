"""The closed forms against exact linear algebra, and the package's transforms against both."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax import theory


def transition(rate, beta, curvature):
  """(x, m) → (x − η m̃, m̃) with m̃ = β m + (1 − β) L x."""
  c = (1 - beta) * curvature
  return np.array([[1 - rate * c, -rate * beta], [c, beta]])


def linear_system(method, rate, beta, curvature):
  """A, B and c of s' = A s + B ξ and x̂ = c s, written out from what each method does."""
  a, c = transition(rate, beta, curvature), (1 - beta) * curvature
  if method == "master_weights":  # s = (θ*, m, ξ of this step): the gradient is at θ* + ξ.
    system = np.zeros((3, 3))
    system[:2, :2] = a
    system[:2, 2] = [-rate * c, c]
    return system, np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])
  if method == "naive":
    return a, np.array([1.0, 0.0]), np.array([1.0, 0.0])
  if method == "eco":  # e = θ̃ − θ̂' = −ξ
    return a, np.array([1.0, -(1 / rate) * (1 - 1 / beta)]), np.array([1.0, 0.0])
  system = np.zeros((3, 3))  # s = (x̂, m, e): m' = m̃ + e/η − e'/(ηβ)
  system[:2, :2] = a
  system[1, 2] = 1 / rate
  return system, np.array([1.0, 1 / (rate * beta), -1.0]), np.array([1.0, 0.0, 0.0])


def stationary(method, rate, beta, curvature, variance):
  """c S cᵀ with S = A S Aᵀ + σ² B Bᵀ, solved as a linear system."""
  a, b, c = linear_system(method, rate, beta, curvature)
  n = len(b)
  s = np.linalg.solve(np.eye(n * n) - np.kron(a, a), variance * np.outer(b, b).ravel())
  return c @ s.reshape(n, n) @ c


BETAS, CURVATURES = (0.1, 0.5, 0.9, 0.99), (0.2, 1.0, 7.0)


@pytest.mark.parametrize("method", theory.METHODS)
def test_closed_forms_solve_the_lyapunov_equation(method):
  for beta, curvature in itertools.product(BETAS, CURVATURES):
    limit = 2 * (1 + beta) / ((1 - beta) * curvature)
    for rate in (1e-4 * limit, 1e-2 * limit, 0.3 * limit, 0.9 * limit, 0.999 * limit):
      np.testing.assert_allclose(
        theory.stationary_second_moment(method, rate, beta, curvature, 0.3),
        stationary(method, rate, beta, curvature, 0.3),
        rtol=1e-6,  # The equation's condition is 1e4 and more near both ends, squared.
      )


def test_closed_forms_take_arrays_and_have_their_limits():
  tiny = np.array([1e-7, 1e-8])
  at = lambda method: theory.stationary_second_moment(method, tiny, 0.9, 2.0, 3.0)
  np.testing.assert_allclose(at("master_weights"), 3.0, rtol=1e-5)
  np.testing.assert_allclose(at("eco"), 3.0 / (1 - 0.9**2), rtol=1e-5)
  np.testing.assert_allclose(at("naive"), 3.0 / (2 * 2.0 * tiny), rtol=1e-5)


def test_methods_change_places_where_it_is_said():
  for beta in (0.3, 0.5, 0.9):
    at = lambda method, a, beta=beta: theory.stationary_second_moment(method, a, beta, 1.0)
    for lower, upper, a in (
      ("naive", "eco", (1 + beta) / 2),
      ("eco", "master_weights", beta / (1 - beta)),
    ):
      np.testing.assert_allclose(at(lower, a), at(upper, a))
      assert at(lower, 1.1 * a) < at(upper, 1.1 * a)
      assert at(lower, 0.9 * a) > at(upper, 0.9 * a)


def test_contraction_is_a_spectral_radius_and_one_at_the_limit():
  for beta, curvature in itertools.product(BETAS, CURVATURES):
    limit = theory.stability_limit(beta, curvature)
    for share in (1e-3, 0.1, 0.5, 0.99, 1.01):
      radius = np.max(np.abs(np.linalg.eigvals(transition(share * limit, beta, curvature))))
      np.testing.assert_allclose(
        theory.contraction(share * limit, beta, curvature), radius, rtol=1e-6
      )
      assert (radius < 1) == (share < 1)


@pytest.mark.parametrize("point", [(0.3, 0.5, 1.0), (0.02, 0.9, 4.0)], ids=str)
@pytest.mark.parametrize("method", theory.METHODS)
def test_the_transforms_settle_where_the_closed_forms_say(method, point):
  seed = list(theory.METHODS).index(method)
  found = theory.simulate_stationary(method, *point, variance=0.25, chains=20_000, seed=seed)
  wanted = theory.stationary_second_moment(method, *point, 0.25)
  # The mean of 100 independent groups: beyond 4.5 standard errors by chance once in 50,000.
  assert abs(found.value - wanted) < 4.5 * found.standard_error
  assert found.standard_error < 0.01 * wanted
  # The check tells the methods apart: the closed forms of the others do not pass it.
  for other in theory.METHODS:
    form = theory.stationary_second_moment(other, *point, 0.25)
    if abs(form / wanted - 1) > 1e-9:
      assert abs(found.value - form) > 4.5 * found.standard_error


def test_noise_is_white():
  tx = theory.add_noise(0.04, seed=1)
  zeros = {"a": jnp.zeros(200_000), "b": jnp.zeros(200_000)}
  first, state = tx.update(zeros, tx.init(zeros))
  second, _ = tx.update(zeros, state)
  draws = np.stack([first["a"], first["b"], second["a"], second["b"]]).astype(np.float64)
  # 4.5 standard errors: a mean's is σ/√n, a covariance's at most σ²/√n.
  spread = 4.5 / math.sqrt(200_000)
  assert np.all(np.abs(draws.mean(1)) < 0.2 * spread)
  np.testing.assert_allclose(draws @ draws.T / 200_000, 0.04 * np.eye(4), atol=0.04 * spread)


def test_simulate_is_a_plain_loop():
  curvature = np.array([1.0, 3.0])
  loss = lambda x: jnp.sum(jnp.asarray(curvature, jnp.float32) * x**2) / 2
  seen = theory.simulate(
    theory.sgdm(0.2, 0.7), loss, jnp.ones(2), 25, lambda g, x, state: (g, x, state[0].ema)
  )
  x, m = np.ones(2), np.zeros(2)
  for g, new_x, new_m in zip(*map(np.asarray, seen), strict=True):
    np.testing.assert_allclose(g, curvature * x, atol=1e-6)
    m = 0.7 * m + 0.3 * curvature * x
    x = x - 0.2 * m
    np.testing.assert_allclose(new_x, x, atol=1e-6)
    np.testing.assert_allclose(new_m, m, atol=1e-6)


def test_simulate_takes_packed_parameters():
  params = eco.quantize({"w": jnp.ones((5, 4, 2))}, eco.FP8)
  tx = eco.error_feedback_to_momentum(theory.sgdm(0.1, 0.9), eco.quantize_params())
  loss = lambda p: jnp.sum(p["w"] ** 2) / 2
  norms = theory.simulate(tx, loss, params, 100, lambda g, p, s: jnp.sum(p["w"].dequantize() ** 2))
  assert norms.shape == (100,)
  assert norms[-1] < 0.1 * norms[0]


def positive(generator, n):
  """A random symmetric positive matrix whose eigenvalues spread over a decade."""
  x = generator.standard_normal((n, n))
  return x @ x.T / n + 0.3 * np.eye(n)


def coupled_system(method, rate, beta, curvature, preconditioner):
  """`linear_system` of n weights, u = −η K m̃; of the weights A, B and c are matrices each."""
  n, h, k = len(curvature), (1 - beta) * curvature, preconditioner
  one, zero = np.eye(n), np.zeros((n, n))
  a = np.block([[one - rate * k @ h, -rate * beta * k], [h, beta * one]])
  if method in ("master_weights", "eco_keep_error"):  # s = (θ*, m, ξ of this step)
    noisy = np.vstack([-rate * k @ h, h])
    system = np.block([[a, noisy], [np.zeros((n, 2 * n)), zero]])
    return system, np.vstack([zero, zero, one]), np.hstack([one, zero, one])
  injected = (1 / beta - 1) / rate * np.linalg.inv(k) if method == "eco" else zero
  return a, np.vstack([one, injected]), np.hstack([one, zero])


@pytest.mark.parametrize("method", theory.METHODS)
@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_covariances_solve_the_lyapunov_equation(beta, method):
  """Also where H and K do not commute, so that no mode is alone."""
  generator = np.random.default_rng(0)
  for n, share in itertools.product((1, 2, 4), (0.05, 0.4, 0.9)):
    h, k = positive(generator, n), positive(generator, n)
    rate = share * theory.stability_limit(beta, np.linalg.eigvals(k @ h).real.max())
    a, b, c = coupled_system(method, rate, beta, h, k)
    s = np.linalg.solve(np.eye(a.size) - np.kron(a, a), 0.3 * (b @ b.T).ravel())
    wanted = c @ s.reshape(a.shape) @ c.T
    found = theory.stationary_covariance(method, rate, beta, h, k, 0.3)
    # The equation loses digits near both ends.
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.max(np.abs(wanted)))
    if n == 1:
      alone = theory.stationary_second_moment(method, rate * k.item(), beta, h.item(), 0.3)
      np.testing.assert_allclose(found.item(), alone, rtol=1e-9)


@pytest.mark.parametrize("method", ["eco", "master_weights"])
def test_no_preconditioner_moves_the_floor(method):
  generator = np.random.default_rng(1)
  for _ in range(3):
    h, k = positive(generator, 3), positive(generator, 3)
    floor = theory.stationary_covariance(method, 1e-8, 0.9, h, k, 0.3)
    wanted = theory.stationary_second_moment(method, 1e-8, 0.9, 1.0, 0.3)
    np.testing.assert_allclose(floor, wanted * np.eye(3), atol=1e-4 * wanted)


SIDES = np.array([[1, 0.3, 0], [0.3, 0.7, 0.1], [0, 0.1, 0.4]]), np.array([[1.2, 0.2], [0.2, 0.5]])


@pytest.mark.parametrize("method", theory.METHODS)
def test_the_transforms_settle_where_the_covariances_say(method):
  """Behind a Kronecker preconditioner, which the rule inverts by itself, within 2%."""
  h, k, beta, chains, memory = (
    positive(np.random.default_rng(2), 6),
    np.kron(*SIDES),
    0.7,
    2000,
    100,
  )
  rate = 0.3 * theory.stability_limit(beta, np.linalg.eigvals(k @ h).real.max())
  row = lambda x: x.reshape(-1, 6)
  loss = lambda x: jnp.sum((row(x) @ jnp.asarray(h, jnp.float32)) * row(x)) / 2
  found = theory.simulate(
    theory.METHODS[method](
      theory.preconditioned_sgdm(rate, beta, *SIDES), theory.add_noise(0.3, 1)
    ),
    loss,
    jnp.zeros((chains, 3, 2)),
    3 * memory,
    lambda g, x, state: row(x).T @ row(x) / chains,
  )
  found = np.asarray(found, np.float64)[memory:].mean(axis=0)
  at = lambda name: theory.stationary_covariance(name, rate, beta, h, k, 0.3)
  wanted = at(method)
  # Of a variance the standard error is 0.7%: 200 steps of 2,000 chains that remember 9 steps.
  assert np.max(np.abs(found - wanted)) < 0.02 * np.max(wanted)
  for other in theory.METHODS:  # The check tells the methods apart.
    if not np.allclose(at(other), wanted):
      assert np.max(np.abs(found - at(other))) > 0.1 * np.max(wanted)


def test_the_virtual_sequence_of_a_preconditioner():
  """θ_t = θ̂_t − (ηβ/(1−β)) K m_t obeys θ_{t+1} = θ_t − η K ∇f(θ̂_t), whatever the quantizer does."""
  beta, rate, k = 0.9, 0.05, np.kron(*SIDES)
  h = positive(np.random.default_rng(3), 6)
  loss = lambda x: jnp.sum((x.ravel() @ jnp.asarray(h, jnp.float32)) * x.ravel()) / 2
  tx = eco.error_feedback_to_momentum(
    theory.preconditioned_sgdm(rate, beta, *SIDES), theory.add_noise(0.01)
  )
  measure = lambda g, x, state: (g.ravel(), x.ravel(), state.inner[0].ema.ravel())
  seen = theory.simulate(tx, loss, jnp.ones((3, 2)), 40, measure)
  g, x, m = (np.asarray(part, np.float64) for part in seen)
  virtual = x - rate * beta / (1 - beta) * m @ k
  residue = virtual[1:] - (virtual[:-1] - rate * g[1:] @ k)
  assert np.max(np.abs(residue)) < 2e-6 * np.max(np.abs(virtual))
  assert np.max(np.abs(np.diff(x, axis=0))) > 0.1


ARGUMENTS = dict(learning_rate=0.03, beta=0.8)


def test_bounds_are_the_theorems():
  eta, beta, smooth, g, variance, gap, steps = 0.03, 0.8, 2.0, 1.5, 0.01, 0.7, 400
  square = theory.momentum_bound(**ARGUMENTS, gradient=g, variance=variance)
  alpha = (1 / eta) * (1 - 1 / beta)
  np.testing.assert_allclose(square, 2 * g**2 + 2 * alpha**2 * variance / (1 - beta**2))
  np.testing.assert_allclose(
    theory.gradient_bound(gap, steps, **ARGUMENTS, smoothness=smooth, momentum=square),
    4 * gap / (eta * steps)
    + 4 * eta**2 * beta**2 * smooth**2 * g**2 / (1 - beta) ** 2
    + 4 * smooth**2 * variance / (1 - beta**2),
  )
  delta = 0.1
  square = theory.nearest_momentum_bound(**ARGUMENTS, gradient=g, error=delta)
  np.testing.assert_allclose(
    theory.gradient_bound(gap, math.inf, **ARGUMENTS, smoothness=smooth, momentum=square),
    2 * smooth**2 * eta**2 * beta**2 / (1 - beta) ** 2 * (g + abs(alpha) * delta / (1 - beta)) ** 2,
  )


def test_the_bounds_noise_floor_is_four_times_what_a_quadratic_has():
  """So no better constant than 1/4 of it is possible: the quadratic is a case of the theorem."""
  square = theory.momentum_bound(1e-8, 0.9, gradient=0.0, variance=0.2)
  floor = theory.gradient_bound(1.0, math.inf, 1e-8, 0.9, smoothness=3.0, momentum=square)
  settled = 3.0**2 * theory.stationary_second_moment("eco", 1e-8, 0.9, 3.0, 0.2)
  np.testing.assert_allclose(floor, 4 * settled, rtol=1e-6)


def test_what_the_theory_does_not_cover_is_refused():
  with pytest.raises(ValueError, match="not below 38"):
    theory.stationary_second_moment("eco", 40.0, 0.9, 1.0)
  with pytest.raises(ValueError, match="not below 38"):
    theory.simulate_stationary("eco", 40.0, 0.9, 1.0)
  with pytest.raises(ValueError, match="method must be one of master_weights, naive"):
    theory.stationary_second_moment("lion", 0.1, 0.9, 1.0)
  with pytest.raises(ValueError, match="beta must be above 0"):
    theory.momentum_bound(0.1, 1.0, 1.0, 1.0)
  with pytest.raises(ValueError, match="learning_rate must be above 0"):
    theory.nearest_momentum_bound(0.0, 0.9, 1.0, 1.0)
  with pytest.raises(ValueError, match=r"learning_rate ≤ 1/\(2L\) = 0.25"):
    theory.gradient_bound(1.0, 10, 0.3, 0.9, smoothness=2.0, momentum=1.0)
  with pytest.raises(ValueError, match=r"momentum 0\.9 becomes unstable"):
    theory.stationary_covariance("eco", 20.0, 0.9, np.eye(2), 2 * np.eye(2))
  with pytest.raises(ValueError, match="preconditioner must be a symmetric positive matrix"):
    theory.stationary_covariance("eco", 0.1, 0.9, np.eye(2), np.diag([1.0, 0.0]))
  with pytest.raises(ValueError, match="method must be one of master_weights, naive"):
    theory.stationary_covariance("lion", 0.1, 0.9, np.eye(2), np.eye(2))
  with pytest.raises(ValueError, match="multiple of 100"):
    theory.simulate_stationary("eco", 0.1, 0.9, 1.0, chains=150)


def test_the_papers_momentum_is_found_in_every_method():
  """`sgdm` is stock Optax, so that a bare chain and each method train alike without noise."""
  loss = lambda x: jnp.sum(x**2) / 2
  still = optax.GradientTransformation(
    lambda params: optax.EmptyState(), lambda u, s, p=None: (jax.tree.map(lambda x: x + 0, u), s)
  )
  plain, *others = (
    theory.simulate(tx, loss, jnp.ones(3), 20, lambda g, x, s: x)
    for tx in [theory.sgdm(0.1, 0.9)]
    + [join(theory.sgdm(0.1, 0.9), still) for join in theory.METHODS.values()]
  )
  for other in others:
    # Float32 roundings of a weight of 1, which ECO divides by η and pays back.
    np.testing.assert_allclose(other, plain, atol=1e-6)
