"""The library against the float64 oracle, and the identities that the method promises."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import eco_optax as eco

STEPS = 200
PEAK = 2e-2

FP8 = (eco.FP8, "float8_e4m3fn", "channel")
INT4 = (eco.INT4, "int4", "tensor")


def cosine(t):
  """Learning rate of step t = 1, 2, …: linear warm-up over 20 steps, cosine to a tenth."""
  count, warmup = t - 1, 20
  if count < warmup:
    return 0.01 * PEAK + (PEAK - 0.01 * PEAK) * count / warmup
  share = min((count - warmup) / (STEPS - warmup), 1.0)
  return 0.1 * PEAK + 0.9 * PEAK * 0.5 * (1 + math.cos(math.pi * share))


def SCHEDULE(count):
  """The same as a JAX schedule of count = t − 1, clean under strict promotion."""
  count = count.astype(jnp.float32)
  share = jnp.clip((count - 20) / (STEPS - 20), 0, 1)
  decaying = 0.1 * PEAK + 0.9 * PEAK * 0.5 * (1 + jnp.cos(math.pi * share))
  return jnp.where(count < 20, 0.01 * PEAK + 0.99 * PEAK * count / 20, decaying)


constant = lambda t: PEAK
paper_momentum = lambda b1: optax.ema(b1, debias=False)  # m̃ = β m + (1 − β) g

# name: the stock optimizer, its learning rate for the schedule-aware rule, the oracle's recipe.
RECIPES = {
  "sgdm": (optax.sgd(PEAK, 0.9), PEAK, oracle.Recipe(constant)),
  "sgdm, the paper's form": (
    optax.chain(paper_momentum(0.8), optax.scale_by_learning_rate(PEAK)),
    PEAK,
    oracle.Recipe(constant, b1=0.8, share=0.2),
  ),
  "sgdm, schedule, clip, decay": (
    optax.chain(
      optax.clip_by_global_norm(4.0),
      optax.trace(0.9),
      optax.add_decayed_weights(0.1),
      optax.scale_by_learning_rate(SCHEDULE),
    ),
    SCHEDULE,
    oracle.Recipe(cosine, decay=0.1, max_norm=4.0),
  ),
  "adam": (
    optax.adam(PEAK, 0.9, 0.98, 1e-9),
    PEAK,
    oracle.Recipe(constant, kind="adam"),
  ),
  "adamw, schedule, clip, decay": (
    optax.chain(
      optax.clip_by_global_norm(4.0), optax.adamw(SCHEDULE, 0.9, 0.98, 1e-9, weight_decay=0.1)
    ),
    SCHEDULE,
    oracle.Recipe(cosine, kind="adam", decay=0.1, max_norm=4.0),
  ),
}


class Problem(NamedTuple):
  """A noisy quadratic with its own curvature for every weight; a float leaf shares the clip."""

  weights: dict
  target: dict
  curvature: dict
  noise: dict

  def gradient(self, weights, t):
    return jax.tree.map(
      lambda w, target, c, noise: c * (w - target) + noise[t],
      weights,
      self.target,
      self.curvature,
      self.noise,
    )


def problem(seed=0, shapes=None, steps=STEPS):
  generator = np.random.default_rng(seed)
  shapes = shapes or {"w": (24, 16), "b": (16,)}
  draw = lambda scale: {
    k: jnp.asarray(scale * generator.standard_normal(s), jnp.float32) for k, s in shapes.items()
  }
  curvature = {
    k: jnp.asarray(generator.uniform(0.05, 0.5, s), jnp.float32) for k, s in shapes.items()
  }
  noise = {
    k: jnp.asarray(0.2 * generator.standard_normal((steps, *s)), jnp.float32)
    for k, s in shapes.items()
  }
  return Problem(draw(1.0), draw(1.0), curvature, noise)


def momentum_of(state):
  """The (only) momentum among the states of a stock optimizer, by its documented field."""
  fields = {"trace", "mu", "ema"}
  is_state = lambda node: bool(fields & set(getattr(node, "_fields", ())))
  found = [node for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
  assert len(found) == 1
  return next(getattr(found[0], field) for field in fields if field in found[0]._fields)


class Trace(NamedTuple):
  """What a run of the library did, stacked over steps."""

  grads: dict
  codes: jax.Array
  scale: jax.Array
  stored: jax.Array  # After the step, float32.
  momentum: jax.Array
  bias: jax.Array  # The float leaf.


def run(tx, params, task, steps=STEPS, inner=lambda state: state.inner):
  """Trains, jitted, and records every step."""

  def step(carry, t):
    params, state = carry
    grads = task.gradient(eco.dequantize(params), t)
    updates, state = tx.update(grads, state, params)
    params = eco.apply_updates(params, updates)
    w = params["w"]
    return (params, state), Trace(
      grads,
      w.codes.astype(jnp.float32),
      jnp.broadcast_to(w.scale, w.shape),
      w.dequantize(),
      momentum_of(inner(state))["w"],
      params["b"],
    )

  @jax.jit
  def loop(params, state):
    return jax.lax.scan(step, (params, state), jnp.arange(steps))[1]

  return jax.tree.map(np.asarray, loop(params, tx.init(params)))


QUANTIZER = eco.quantize_params(rounding="nearest")
METHODS = {
  "paper": lambda inner, rate: eco.error_feedback_to_momentum(inner, QUANTIZER),
  "aware": lambda inner, rate: eco.error_feedback_to_momentum(inner, QUANTIZER, rate),
  "exact": lambda inner, rate: eco.error_feedback_to_momentum(inner, QUANTIZER, keep_error=True),
  "exact_aware": lambda inner, rate: eco.error_feedback_to_momentum(
    inner, QUANTIZER, rate, keep_error=True
  ),
  "master": lambda inner, rate: eco.master_weights(inner, QUANTIZER),
  "naive": lambda inner, rate: eco.chain(inner, QUANTIZER),
}
CASES = [
  (recipe, method, format)
  for recipe in RECIPES
  for method in METHODS
  for format in (FP8, INT4)
  # The memory-free rules for every recipe. With the last error stored only the schedule-aware rule
  # follows a schedule.
  if method in ("paper", "aware")
  or recipe == "sgdm"
  or ("schedule" in recipe and method != "exact")
]


@pytest.mark.parametrize(
  ("recipe", "method", "format"), CASES, ids=lambda v: v[1] if isinstance(v, tuple) else v
)
def test_two_hundred_steps_follow_the_oracle(recipe, method, format):
  """Codes equal the oracle's until a float64 proposal lands within float32 rounding of a tie.

  Both sides see the library's gradients, so that weights do not influence one another and each can
  be followed alone. A weight whose proposal is near a tie may go to either code, after which it is
  on a path of its own: it is counted and set aside. Near means 32 roundings (2^-24) of the largest
  value that the weight has had, for what adds up in weight and momentum over 200 steps.
  """
  inner, rate, formula = RECIPES[recipe]
  format, dtype, granularity = format
  task = problem()
  params = eco.quantize(task.weights, format)
  pick = (lambda state: state[0]) if method == "naive" else (lambda state: state.inner)
  trace = run(METHODS[method](inner, rate), params, task, inner=pick)

  first = {"w": np.asarray(params["w"].dequantize()), "b": np.asarray(task.weights["b"])}
  wanted = oracle.Run(formula, method, first, ("w",), dtype, granularity)
  together = np.ones(first["w"].shape, bool)
  size, worst = np.abs(first["w"]), 0.0
  # Adam's rate changes from step to step, so that the exact rule only drifts with master weights,
  # and magnifies roundings: the formula is compared while they are small.
  drifts = method.startswith("exact") and formula.kind == "adam"
  for t in range(30 if drifts else STEPS):
    wanted.step({name: g[t] for name, g in trace.grads.items()})
    result = wanted.last["w"]
    differ = together & (trace.codes[t] != result.codes)
    size = np.maximum(size, np.abs(result.scaled) * result.scale)
    near = oracle.distance_to_tie(result.scaled, dtype) * result.scale <= 32 * 2.0**-24 * size
    assert not np.any(differ & ~near), f"step {t + 1}: a code differs away from any tie"
    together &= ~differ
    largest = np.max(np.abs(wanted.m["w"]))
    worst = max(worst, np.max(np.abs(trace.momentum[t] - wanted.m["w"])[together]) / largest)
    np.testing.assert_allclose(
      trace.stored[t][together], result.stored[together], rtol=1e-5, atol=0
    )
    np.testing.assert_allclose(trace.bias[t], wanted.weights["b"], rtol=2e-5, atol=1e-5)
  # With the last error stored nothing decays: the roundings of θ̂ + e add up, and are divided by η,
  # which starts at 2e-4.
  assert worst < (2e-4 if method.startswith("exact") else 1e-5)
  assert np.mean(~together) <= 0.02


sgd_with_decay = lambda rate: optax.chain(
  optax.trace(0.9), optax.add_decayed_weights(0.05), optax.scale_by_learning_rate(rate)
)
nesterov = lambda rate: optax.sgd(rate, 0.9, nesterov=True)
EXACT = {
  "constant rate": (lambda rate: optax.sgd(rate, 0.9), PEAK, None),
  "nesterov": (nesterov, PEAK, None),
  "schedule, decay": (sgd_with_decay, SCHEDULE, SCHEDULE),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("format", [FP8, INT4], ids=["FP8", "INT4"])
@pytest.mark.parametrize("case", EXACT)
def test_the_exact_rule_is_master_weights(case, format, rounding):
  """SGDM, 1,000 steps on the same gradients: the same codes, drawn with the same bits.

  Two float32 computations of one number fall on either side of a tie now and then. The master
  weight has not moved by that, so the codes agree again as soon as it leaves the tie.
  """
  make, rate, aware = EXACT[case]
  format, dtype, _ = format
  quantizer = eco.quantize_params(rounding=rounding, seed=1)
  exact_tx = eco.error_feedback_to_momentum(make(rate), quantizer, aware, keep_error=True)
  master_tx = eco.master_weights(make(rate), quantizer)
  task = problem(1, {"w": (16, 8), "b": (8,)})
  params = eco.quantize(task.weights, format)

  def step(carry, t):
    (exact, exact_state), (master, master_state) = carry
    grads = task.gradient(eco.dequantize(master), t % STEPS)
    updates, exact_state = exact_tx.update(grads, exact_state, exact)
    exact = eco.apply_updates(exact, updates)
    updates, master_state = master_tx.update(grads, master_state, master)
    master = eco.apply_updates(master, updates)
    full = master["w"].dequantize() + master_state.residual["w"]
    seen = [leaf["w"].codes.astype(jnp.float32) for leaf in (exact, master)]
    return ((exact, exact_state), (master, master_state)), (*seen, full, master["w"].scale)

  @jax.jit
  def loop(carry):
    return jax.lax.scan(step, carry, jnp.arange(1000))[1]

  carry = ((params, exact_tx.init(params)), (params, master_tx.init(params)))
  exact, master, full, scale = jax.tree.map(np.asarray, loop(carry))
  differ = exact != master
  if rounding == "nearest":
    off = oracle.distance_to_tie(full.astype(np.float64) / scale, dtype) * scale
    # What 1,000 steps add up to in float32, in units of the largest weight's rounding.
    assert np.all(off[differ] < 128 * 2.0**-24 * np.abs(full).max())
  # A dither within those roundings of its threshold: 1e-5 of the largest weight over a grid step.
  assert np.mean(differ) < 1e-3
  assert np.mean(np.any(master[1:] != master[:-1], axis=0)) > 0.5  # It trained.


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.INT8], ids=["FP8", "INT4", "INT8"])
@pytest.mark.parametrize("form", ["paper", "optax"])
def test_the_virtual_sequence_is_plain_gradient_descent(form, format, rounding):
  """θ_t = θ̂_t − (ηβ/(1−β)) m_t obeys θ_{t+1} = θ_t − η∇f(θ̂_t), whatever the quantizer does.

  With Optax's momentum m̃ = β m + g, which is the paper's divided by 1 − β, so is η.
  """
  beta, rate = 0.9, 0.02
  inner = optax.sgd(rate, beta)
  if form == "paper":
    inner = optax.chain(paper_momentum(beta), optax.scale_by_learning_rate(rate))
  quantizer = eco.quantize_params(rounding=rounding, seed=2)
  task = problem(2)
  params = eco.quantize(task.weights, format)
  trace = run(eco.error_feedback_to_momentum(inner, quantizer), params, task)

  share = 1.0 if form == "paper" else 1 / (1 - beta)
  m = np.concatenate([np.zeros((1, 24, 16)), trace.momentum.astype(np.float64)])
  stored = np.concatenate([np.asarray(params["w"].dequantize())[None], trace.stored])
  virtual = stored.astype(np.float64) - rate * beta / (1 - beta) * m
  residue = virtual[1:] - (virtual[:-1] - rate * share * trace.grads["w"].astype(np.float64))
  # A handful of float32 roundings of the largest weight and of what its momentum stands for.
  size = np.max(np.abs(stored)) + np.max(np.abs(virtual - stored))
  assert np.max(np.abs(residue)) < 4 * 2.0**-24 * size
  assert np.any(np.diff(stored, axis=0) != 0)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("format", [eco.FP8, eco.INT4], ids=["FP8", "INT4"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_virtual_sequence_follows_a_schedule(nesterov, format, rounding):
  """z_t = θ̂_t + D_t m_t moves by gradients alone, at the rates at which each is to be applied.

  A gradient of step t adds g to the momentum, hence D_t g to z, and its own step −η_t g (with
  Nesterov −η_t (1 + β) g), of which the momentum's part is in both. The paper's z misses this.
  """
  beta = 0.9
  inner = optax.sgd(SCHEDULE, beta, nesterov=nesterov)
  quantizer = eco.quantize_params(rounding=rounding, seed=2)
  task = problem(2)
  params = eco.quantize(task.weights, format)
  trace = run(eco.error_feedback_to_momentum(inner, quantizer, SCHEDULE), params, task)

  rates = np.array([cosine(t) for t in range(1, STEPS + 1001)])
  share = beta if nesterov else 1.0
  # D after step t: −Σ β^{k−1} η_{t+k} β, times another β with Nesterov. D[0] is before the first.
  powers = beta ** np.arange(1000)
  debt = np.array([-beta * share * np.sum(powers * rates[t : t + 1000]) for t in range(STEPS + 1)])
  m = np.concatenate([np.zeros((1, 24, 16)), trace.momentum.astype(np.float64)])
  stored = np.concatenate([np.asarray(params["w"].dequantize())[None], trace.stored])
  virtual = stored.astype(np.float64) + debt[:, None, None] * m
  direct = (1 + beta if nesterov else 1.0) * rates[:STEPS]
  moved = (debt[1:] - direct)[:, None, None] * trace.grads["w"].astype(np.float64)
  residue = virtual[1:] - (virtual[:-1] + moved)
  size = np.max(np.abs(stored)) + np.max(np.abs(virtual - stored))
  assert np.max(np.abs(residue)) < 1e-5 * size  # 80 roundings, of sums of 128 float32 rates.
  assert np.any(np.diff(stored, axis=0) != 0)


def test_a_decay_to_zero_does_not_release_what_nearest_rounding_hoarded():
  """A weight that owes 3 steps of the grid pays 1/7.5 of them a step, too little to move it."""
  beta, start, last = 0.9, 10, 20  # The rate falls to zero in the last ten steps.
  rate = lambda count: PEAK * jnp.clip((last - count) / (last - start), 0, 1)
  params = eco.quantize({"w": jnp.array([[1.0], [0.5]])}, eco.INT8)
  grid = np.asarray(params["w"].scale).item()
  tx = eco.error_feedback_to_momentum(optax.sgd(rate, beta), QUANTIZER, rate)
  state = tx.init(params)
  # θ̂ + D m is 3 steps of the grid from θ̂, with D = −β η / (1 − β), in the weight below the largest.
  owed = jnp.array([[0.0], [-3 * grid * (1 - beta) / (beta * PEAK)]])
  trace = state.inner[0]._replace(trace={"w": owed})
  state = state._replace(inner=(trace, *state.inner[1:]))
  zero = {"w": jnp.zeros((2, 1))}
  for _ in range(last):
    updates, state = jax.jit(tx.update)(zero, state, params)
    params = eco.apply_updates(params, updates)
    assert np.asarray(params["w"].qvalue).ravel().tolist() == [127, 64]
  assert abs(np.asarray(momentum_of(state.inner)["w"])[1, 0]) >= abs(owed[1, 0])


# Fast enough for INT4 weights to move in 60 steps.
FAST = 4 * PEAK
FAST_SCHEDULE = lambda count: 4 * SCHEDULE(count)
EMULATED = {
  "paper, adam": lambda q: eco.error_feedback_to_momentum(optax.adam(FAST, 0.9, 0.98), q),
  "aware, adamw, schedule": lambda q: eco.error_feedback_to_momentum(
    optax.adamw(FAST_SCHEDULE, 0.9, 0.98, weight_decay=0.1), q, FAST_SCHEDULE
  ),
  "exact, sgdm": lambda q: eco.error_feedback_to_momentum(optax.sgd(FAST, 0.9), q, keep_error=True),
  "master weights": lambda q: eco.master_weights(optax.adam(FAST, 0.9, 0.98), q),
  "naive": lambda q: eco.chain(optax.adam(FAST, 0.9, 0.98), q),
}


# Every method in the paper's formats, and the schedule-aware rule in the others.
_OTHERS = [eco.MXFP8, eco.Format("int8", (8, 1)), eco.NVFP4]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
  ("method", "format"),
  [(method, format) for method in EMULATED for format in (eco.FP8, eco.INT4)]
  + [("aware, adamw, schedule", format) for format in _OTHERS],
  ids=str,
)
def test_packed_and_emulated_runs_have_the_same_codes(method, format, rounding):
  """Every step. Emulated weights are float32 that `optax.apply_updates` put on the grid."""
  make = EMULATED[method]
  packed_tx = make(eco.quantize_params(rounding=rounding, seed=3))
  emulated_tx = make(eco.quantize_params(format, rounding=rounding, seed=3))
  task = problem(3, {"w": (32, 8), "b": (8,)}, 60)
  packed = eco.quantize(task.weights, format)
  emulated = eco.dequantize(packed)

  def step(carry, t):
    (p, p_state), (e, e_state) = carry
    updates, p_state = packed_tx.update(task.gradient(eco.dequantize(p), t), p_state, p)
    p = eco.apply_updates(p, updates)
    updates, e_state = emulated_tx.update(task.gradient(e, t), e_state, e)
    e = optax.apply_updates(e, updates)
    return ((p, p_state), (e, e_state)), (p["w"].dequantize(), e["w"], p["w"].codes)

  @jax.jit
  def loop(carry):
    return jax.lax.scan(step, carry, jnp.arange(60))[1]

  carry = ((packed, packed_tx.init(packed)), (emulated, emulated_tx.init(emulated)))
  packed, emulated, codes = jax.tree.map(np.asarray, loop(carry))
  # θ̂ + (q − θ̂) may miss q by a rounding of the move: 2^-20 of the largest weight, which is far
  # below the distance of two codes, so that equal values are equal codes. Of the smallest weights
  # it is 4% of that distance, and a random draw in 10^4 falls in between.
  limit = 2.0**-20 * np.abs(packed).max()
  assert np.mean(np.abs(emulated - packed) > limit) <= (2e-4 if rounding == "stochastic" else 0)
  assert np.all(np.abs(emulated - packed) <= limit + 2.0**-3 * np.abs(packed))
  moved = np.mean(np.any(codes[1:] != codes[:-1], axis=0))
  assert moved > 0.2 or (method == "naive" and rounding == "nearest")  # Which loses small updates.


def warmup_from_zero(count):
  return jnp.minimum(count.astype(jnp.float32), 10) / 10 * PEAK


def decay_to_zero(count):
  return jnp.maximum(1 - count.astype(jnp.float32) / 40, 0) * PEAK


def pauses(count):
  return jnp.where((count % 8) < 3, 0.0, PEAK).astype(jnp.float32)


ZERO_RATES = {
  "warm-up from 0": warmup_from_zero,
  "decay to 0": decay_to_zero,
  "pauses": pauses,
  "always 0": lambda count: 0.0 * count.astype(jnp.float32),
  "optax": optax.warmup_cosine_decay_schedule(0.0, PEAK, 5, 40, 0.0),
}


# Every rule where the rate is zero at the start, at the end and in between.
_ZERO_CASES = [
  (case, kind, rule)
  for case in ZERO_RATES
  for kind, rule in [
    ("adam", "paper"),
    ("adam", "aware"),
    ("sgdm", "exact"),
    ("sgdm", "exact_aware"),
  ]
  if rule == "aware" or case not in ("always 0", "optax")
]


@pytest.mark.standard_promotion  # Optax's own cosine is not clean under strict promotion.
@pytest.mark.parametrize(("case", "kind", "rule"), _ZERO_CASES)
def test_a_learning_rate_of_zero_is_safe_anywhere(case, kind, rule):
  """1/η is infinite and 0 · ∞ is NaN; and while the rate is zero no stored weight may move."""
  rate = ZERO_RATES[case]
  inner = optax.adamw(rate, 0.9, 0.98) if kind == "adam" else optax.sgd(rate, 0.9)
  tx = METHODS[rule](inner, rate)
  task = problem(4, {"w": (16, 8), "b": (8,)}, 60)
  params = eco.quantize(task.weights, eco.FP8)
  trace = run(tx, params, task, 60)
  assert np.all(np.isfinite(trace.stored))
  assert np.all(np.isfinite(trace.momentum))
  stored = np.concatenate([np.asarray(params["w"].dequantize())[None], trace.stored])
  rates = np.array([float(rate(jnp.asarray(t, jnp.int32))) for t in range(60)])
  still = rates == 0
  assert np.any(still)
  np.testing.assert_array_equal(stored[1:][still], stored[:-1][still])
  if case == "pauses":  # It goes on where it stopped, and its momentum is of an ordinary size.
    assert np.any(stored[-1] != stored[30])
    assert np.max(np.abs(trace.momentum)) < 20
