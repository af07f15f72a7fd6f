"""Every stock optimizer: the quantization error is paid back, or `init` says why it cannot be."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import eco_optax as eco

# Optax's optimizers are not clean under strict promotion.
pytestmark = pytest.mark.standard_promotion

RATE = 1e-3
# b1 = 1/2: under nearest rounding a weight may rest half a step / (1 − b1) from where it belongs,
# which is one step.
ADAM = dict(learning_rate=RATE, b1=0.5)

# Optimizers whose update is smooth and element-wise in a momentum. Arguments make updates of about
# an eighth of a grid step, so that without error feedback nearest rounding loses all of them.
WORKS = {
  "sgd": (optax.sgd, dict(learning_rate=RATE, momentum=0.5)),
  "adam": (optax.adam, ADAM),
  "adamw": (optax.adamw, ADAM | dict(weight_decay=0.1)),
  "nadam": (optax.nadam, ADAM),
  "amsgrad": (optax.amsgrad, ADAM),
  "radam": (optax.radam, dict(learning_rate=4 * RATE, b1=0.5, b2=0.99)),
  "yogi": (optax.yogi, ADAM),
  "adamax": (optax.adamax, ADAM),
  "rmsprop": (optax.rmsprop, dict(learning_rate=RATE / 2, momentum=0.5)),
  "novograd": (optax.novograd, ADAM | dict(learning_rate=4 * RATE)),
  "adan": (optax.adan, ADAM),
  "sm3": (optax.sm3, dict(learning_rate=4 * RATE, momentum=0.5)),
  "ademamix": (contrib.ademamix, ADAM | dict(alpha=1.0)),
  "simplified_ademamix": (contrib.simplified_ademamix, ADAM | dict(alpha=1.0)),
  "adopt": (contrib.adopt, ADAM),
  # Linear in the momentum, and not element-wise. Debts in the momentum are priced anew when the
  # preconditioner is refreshed, which after ten steps from a single gradient is a large change.
  "soap": (
    lambda learning_rate, b1: optax.chain(
      eco.scale_by_soap(b1, 0.99, precondition_frequency=4), optax.scale(-learning_rate)
    ),
    ADAM,
  ),
  "shampoo": (
    lambda learning_rate, b1: optax.chain(
      eco.scale_by_shampoo(b1, precondition_frequency=4, grafting="adam"),
      optax.scale(-learning_rate),
    ),
    ADAM,
  ),
}
# Relatives of those above, and longer chains of stock links.
WORKS_ALONE = {
  "sgd nesterov": (optax.sgd, dict(learning_rate=RATE, momentum=0.5, nesterov=True)),
  "sgd bfloat16": (
    optax.sgd,
    dict(learning_rate=RATE, momentum=0.5, accumulator_dtype=jnp.bfloat16),
  ),
  "adam bfloat16": (optax.adam, ADAM | dict(mu_dtype=jnp.bfloat16)),
  "nadamw": (optax.nadamw, ADAM),
  "adamaxw": (optax.adamaxw, ADAM),
  "rmsprop nesterov": (optax.rmsprop, dict(learning_rate=RATE / 2, momentum=0.5, nesterov=True)),
  "rmsprop centered": (optax.rmsprop, dict(learning_rate=RATE / 4, momentum=0.5, centered=True)),
  "adafactor": (optax.adafactor, dict(learning_rate=RATE, momentum=0.5)),
  "lars": (optax.lars, dict(learning_rate=1.0, momentum=0.5)),
  "ema of adam": (
    lambda b1: optax.chain(optax.scale_by_adam(b1=b1), optax.ema(b1), optax.scale(-RATE)),
    dict(b1=0.5),
  ),
  "smoothed sgd": (  # Its state does not know the inverse of the smoothing.
    lambda b1: optax.chain(
      optax.trace(b1),
      optax.stateless(
        lambda u, _: jax.tree.map(
          lambda x: x + 0.3 * jnp.roll(x, 1, 0) + 0.3 * jnp.roll(x, -1, 0) if x.ndim == 2 else x, u
        )
      ),
      optax.scale(-RATE),
    ),
    dict(b1=0.5),
  ),
  "the paper's sgd": (
    lambda b1: optax.chain(optax.ema(b1, debias=False), optax.scale(-2 * RATE)),
    dict(b1=0.5),
  ),
}

STEPS, REST = 40, 60


def problem(poison=False):
  """A tree with two packed leaves, one of them called `mu`, and a float leaf; and gradients.

  Each packed leaf holds one weight of 1 without gradient, which fixes the grid step at 1/127.
  Gradients have a direction of their own per weight and noise; then they are zero. With `poison`
  one of them is NaN.
  """
  generator = np.random.default_rng(0)
  weights, grads = {}, {}
  for name, shape in {"kernel": (5, 4), "mu": (4, 4), "bias": (4,)}.items():
    w = generator.uniform(0.2, 0.8, shape) * generator.choice([-1, 1], shape)
    drift = generator.uniform(0.5, 1.0, shape) * generator.choice([-1, 1], shape)
    g = drift + 0.2 * generator.standard_normal((STEPS + REST, *shape))
    g[STEPS:] = 0
    if len(shape) == 2:
      w[0, 0] = 1
      g[:, 0, 0] = 0
    weights[name], grads[name] = jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
  if poison:
    grads["kernel"] = grads["kernel"].at[7, 2, 2].set(jnp.nan)
  return {"block": weights}, {"block": grads}


FORMAT = eco.Format("int8", "tensor")
QUANTIZER = eco.quantize_params(rounding="nearest")
EMULATOR = eco.quantize_params(FORMAT, rounding="nearest")
MASK = {"block": {"kernel": True, "mu": True, "bias": False}}
LABELS = {"block": {"kernel": "one", "mu": "two", "bias": "two"}}

# How an optimizer is built inside of ECO.
INSIDE = {
  "alone": lambda make, kwargs: make(**kwargs),
  "chain": lambda make, kwargs: optax.chain(optax.clip_by_global_norm(100.0), make(**kwargs)),
  "inject_hyperparams": lambda make, kwargs: optax.inject_hyperparams(  # Of its numbers only.
    make,
    static_args=set(inspect.signature(make).parameters) - {"learning_rate", "b1", "momentum"},
  )(**kwargs),
  "masked": lambda make, kwargs: optax.masked(make(**kwargs), MASK),
  "partition": lambda make, kwargs: optax.partition(
    {"one": make(**kwargs), "two": optax.adam(RATE, b1=0.5)}, LABELS
  ),
  "apply_if_finite": lambda make, kwargs: optax.apply_if_finite(make(**kwargs), 3),
  "MultiSteps": lambda make, kwargs: optax.MultiSteps(make(**kwargs), 2).gradient_transformation(),
}


def nested(make, kwargs):
  """All of them in one another."""
  for place in ("inject_hyperparams", "chain", "masked", "MultiSteps", "apply_if_finite"):
    inner = INSIDE[place](make, kwargs)
    make, kwargs = (lambda inner=inner: inner), {}
  return INSIDE["partition"](make, kwargs)


INSIDE["nested"] = nested

# And around it, on float leaves.
OUTSIDE = {
  "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
  "chain": lambda tx: optax.chain(optax.clip_by_global_norm(100.0), tx),
}


def train(tx, params, grads):
  """Final parameters; small programs, so compile time is all that matters."""

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (eco.apply_updates(params, updates), state), None

  loop = jax.jit(
    lambda carry, grads: jax.lax.scan(step, carry, grads)[0][0],
    compiler_options={"xla_backend_optimization_level": 0},
  )
  return jax.tree.map(np.asarray, eco.dequantize(loop((params, tx.init(params)), grads)))


def distance(params, wanted, paths=("kernel", "mu")):
  """Largest distance of the quantized leaves in grid steps."""
  return max(
    np.max(np.abs(params["block"][p] - wanted["block"][p]))
    / (np.max(np.abs(wanted["block"][p])) / 127)
    for p in paths
  )


@functools.cache
def reference(name, place):
  """Where the plain optimizer takes float weights: the master weights of the same run."""
  make, kwargs = (WORKS | WORKS_ALONE)[name]
  weights, grads = problem(poison=place in POISONED)
  return train(INSIDE[place](make, kwargs), eco.dequantize(eco.quantize(weights, FORMAT)), grads)


# Where a NaN among the gradients costs one step.
POISONED = ("apply_if_finite", "nested")

# These leave the two quantized leaves' trajectories as they are alone.
SAME_AS_ALONE = ("alone", "chain", "inject_hyperparams", "masked")


def check_paid_back(name, place="alone", outside=None, tolerance=1.5, **rule):
  """ECO must end where the plain optimizer takes float weights.

  The tolerance is one step for nearest rounding with b1 = 1/2 (see ADAM), and half of one for the
  change of Adam's rate while the last error is paid.
  """
  make, kwargs = (WORKS | WORKS_ALONE)[name]
  weights, grads = problem(poison=place in POISONED or outside in POISONED)
  packed = eco.quantize(weights, FORMAT)
  inner = INSIDE[place](make, kwargs)
  if outside is None:
    tx, params = eco.error_feedback_to_momentum(inner, QUANTIZER, **rule), packed
  else:  # Stock wrappers around ECO see float leaves.
    tx = OUTSIDE[outside](eco.error_feedback_to_momentum(inner, EMULATOR, **rule))
    params = eco.dequantize(packed)
  place = outside or place
  wanted = reference(name, "alone" if place in SAME_AS_ALONE else place)
  result = train(tx, params, grads)
  assert distance(eco.dequantize(packed), wanted) > 2, "the run is too short to tell"
  assert distance(result, wanted) < tolerance
  if place not in (
    "masked",
    "partition",
    "nested",
  ):  # There the float leaf has an optimizer of its own.
    np.testing.assert_allclose(
      result["block"]["bias"], wanted["block"]["bias"], rtol=1e-4, atol=1e-6
    )


# Every wrapper by itself around the families of momentum (before and after the learning rate, with
# and without bias correction), all of them in one another around each optimizer.
PLACES = [
  (name, place)
  for name in WORKS
  for place in INSIDE
  if name in ("sgd", "adam", "rmsprop") or place in ("alone", "nested")
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_the_error_is_paid_back(name, place):
  check_paid_back(name, place)


@pytest.mark.parametrize("name", WORKS_ALONE)
def test_the_error_is_paid_back_by_relatives(name):
  check_paid_back(name)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_stock_wrappers_may_stand_around_it(name, outside):
  check_paid_back(name, outside=outside)


@pytest.mark.parametrize(
  "rule",
  [dict(learning_rate=RATE), dict(keep_error=True), dict(learning_rate=RATE, keep_error=True)],
  ids=["aware", "exact", "exact aware"],
)
@pytest.mark.parametrize("place", ["alone", "MultiSteps", "apply_if_finite"])
def test_every_rule_pays_back(place, rule):
  """With the last error stored nothing is lost but the half step of rounding itself."""
  check_paid_back("sgd", place, tolerance=0.51 if "keep_error" in rule else 1.5, **rule)


@pytest.mark.parametrize("name", ["adam", "adamw", "novograd", "rmsprop"])
def test_the_schedule_aware_rule_pays_back(name):
  check_paid_back(name, learning_rate=RATE)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_naive_rounding_does_not_pay_back(name):
  """The check itself can fail: without error feedback small updates are lost."""
  make, kwargs = WORKS[name]
  weights, grads = problem()
  result = train(eco.chain(make(**kwargs), QUANTIZER), eco.quantize(weights, FORMAT), grads)
  assert distance(result, reference(name, "alone")) > 4


# Each with a word of the reason; in every wrapper, which must not hide it.
RAISES = {
  "sgd": (optax.sgd, dict(learning_rate=RATE), "no momentum"),
  "lion": (optax.lion, dict(learning_rate=RATE), "smooth"),
  "clipped sgd": (
    lambda learning_rate: optax.chain(
      optax.sgd(learning_rate, 0.9), optax.clip_by_global_norm(1.0)
    ),
    dict(learning_rate=RATE),
    "element-wise",
  ),
}
RAISES_ALONE = {
  "muon": lambda: contrib.muon(RATE),
  "lamb": lambda: optax.lamb(RATE),
  "adam b1=0": lambda: optax.adam(RATE, b1=0.0),
  "sgd momentum=0": lambda: optax.sgd(RATE, momentum=0.0),
  "adamw b1=0": lambda: optax.adamw(RATE, b1=0.0),
  "sm3 momentum=0": lambda: optax.sm3(RATE, momentum=0.0),
  "rmsprop": lambda: optax.rmsprop(RATE),
  "adagrad": lambda: optax.adagrad(RATE),
  "adadelta": lambda: optax.adadelta(RATE),
  "adafactor": lambda: optax.adafactor(RATE),
  "rprop": lambda: optax.rprop(RATE),
  "fromage": lambda: optax.fromage(RATE),
  "signum": lambda: optax.signum(RATE),
  "sign_sgd": lambda: optax.sign_sgd(RATE),
  "noisy_sgd": lambda: optax.noisy_sgd(RATE, key=jax.random.key(0)),
  "polyak_sgd": lambda: optax.polyak_sgd(),
  "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(RATE),
  "lbfgs": lambda: optax.lbfgs(RATE, linesearch=None),
  "cocob": lambda: contrib.cocob(),
  "dog": lambda: contrib.dog(),
  "dowg": lambda: contrib.dowg(),
  "madgrad": lambda: contrib.madgrad(RATE),
  "galore": lambda: contrib.galore(RATE, rank=2),
  "schedule_free_sgd": lambda: contrib.schedule_free_sgd(RATE),
  "schedule_free_adamw": lambda: contrib.schedule_free_adamw(RATE),
  # Another statistic of the optimizer is made of the momentum, so the residual gets into it.
  "adabelief": lambda: optax.adabelief(RATE, b1=0.5),
  "acprop": lambda: contrib.acprop(RATE),
  "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(RATE, b1=0.5),
  "apply_every": lambda: optax.chain(optax.adam(RATE), optax.apply_every(2)),
  "schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE, 0.5), RATE),
  # Step sizes from inner products over the whole tree.
  "momo": lambda: contrib.momo(RATE, beta=0.5),
  "momo_adam": lambda: contrib.momo_adam(RATE, b1=0.5),
  # Weights' distance from where they began is scaled, and their errors with it.
  "mechanize": lambda: contrib.mechanize(optax.adam(RATE, b1=0.5)),
  # What follows the momentum mixes elements.
  "clipped adam": lambda: optax.chain(optax.adam(RATE), optax.clip_by_global_norm(1.0)),
  "clipped tightly": lambda: optax.chain(optax.adam(RATE), optax.clip_by_global_norm(1e-3)),
  "clipped by block": lambda: optax.chain(optax.adam(RATE), optax.clip_by_block_rms(1.0)),
  "adaptive_grad_clip": lambda: optax.chain(optax.sgd(0.1, 0.9), optax.adaptive_grad_clip(0.1)),
  "centralize": lambda: optax.chain(optax.sgd(0.1, 0.9), optax.centralize()),
  "normalize_by_update_norm": lambda: optax.chain(
    optax.trace(0.9), optax.normalize_by_update_norm()
  ),
  "trust ratio": lambda: optax.chain(
    optax.trace(0.9), optax.scale_by_trust_ratio(), optax.scale(-RATE)
  ),
  # Gradients accumulated, or a rate of zero, for longer than one would try.
  "lion, late": lambda: optax.MultiSteps(optax.lion(RATE), 100).gradient_transformation(),
}


# Than the oldest Optax.
NEWER = ("signum", "madgrad", "galore", "optimistic_adam_v2")


def expect_error(inner, message):
  params = eco.quantize(problem()[0], FORMAT)
  with pytest.raises(ValueError, match=message) as error:
    eco.error_feedback_to_momentum(inner, QUANTIZER).init(params)
  assert "leaf 'block/" in str(error.value)  # Which leaf,
  assert "eco_optax.master_weights" in str(error.value)  # and what to do.


@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("name", RAISES)
def test_what_cannot_be_paid_back_raises(name, place):
  make, kwargs, message = RAISES[name]
  expect_error(INSIDE[place](make, kwargs), message)


@pytest.mark.parametrize("name", RAISES_ALONE)
def test_others_that_cannot_be_paid_back_raise(name):
  if name in NEWER and not (hasattr(optax, name) or hasattr(contrib, name)):
    pytest.skip(f"this Optax has no {name}")
  expect_error(RAISES_ALONE[name](), "momentum")


def refused(make, params):
  """The message of what is refused at `init`, and the line of code in it."""
  with pytest.raises(ValueError, match="Keep the errors beside the weights") as error:
    make().init(params)
  message = str(error.value)
  return message, message[message.index("tx = ") : message.index(" trains with this very optim")]


@pytest.mark.parametrize("storage", ["packed", "emulated"])
@pytest.mark.parametrize("name", [*RAISES, *RAISES_ALONE])
def test_the_line_in_the_message_trains_with_that_optimizer(name, storage):
  """It is run as it stands, and ends where the optimizer takes float32 weights."""
  if name in NEWER and not (hasattr(optax, name) or hasattr(contrib, name)):
    pytest.skip(f"this Optax has no {name}")
  if storage == "emulated" and name not in ("muon", "lion", "lamb", "clipped adam"):
    pytest.skip("the same line for all")
  inner = RAISES[name][0](**RAISES[name][1]) if name in RAISES else RAISES_ALONE[name]()
  weights, grads = problem()
  packed = eco.quantize(weights, FORMAT)
  params, quantizer = packed, QUANTIZER
  if storage == "emulated":
    params, quantizer = eco.dequantize(packed), EMULATOR
  _, line = refused(lambda: eco.error_feedback_to_momentum(inner, quantizer), params)
  assert ('"int8"' in line) == (storage == "packed")
  names = {"eco_optax": eco, "optax": optax, "inner": inner, "quantizer": quantizer}
  exec(line, names)
  tx = names["tx"]
  if name in ("polyak_sgd", "momo", "momo_adam"):  # They ask for the loss.
    inner, tx = (
      optax.GradientTransformation(
        x.init, lambda g, s, p, x=x: x.update(g, s, p, value=jnp.ones([]))
      )
      for x in (inner, tx)
    )
  wanted = train(inner, eco.dequantize(packed), grads)
  result = train(tx, params, grads)
  # Their steps are as long as weights and gradients have changed so far, which a rounding of the
  # first changes by as much: no two runs stay together.
  if name in ("lbfgs", "dog"):
    assert np.all(np.isfinite(eco.dequantize(result)["block"]["kernel"]))
    return
  # Half a step, and what 100 roundings of a residual add.
  assert distance(result, wanted) < 0.9


@pytest.mark.parametrize(
  "make",
  [
    lambda schedule: eco.adamw(schedule, b1=0.0, max_norm=1.0, rounding="nearest", seed=3),
    lambda schedule: eco.adamw(RATE, b1=0.0, weight_decay=0.0, nesterov=True),
    lambda schedule: eco.sgd(schedule, momentum=0.0),
  ],
)
def test_the_line_of_an_alias_spells_out_its_arguments(make):
  """A schedule is called as the argument is; numbers are written out."""
  schedule = optax.linear_schedule(RATE, 0.0, 100)
  packed = eco.quantize(problem()[0], FORMAT)
  _, line = refused(lambda: make(schedule), packed)
  names = {"eco_optax": eco, "optax": optax, "learning_rate": schedule}
  exec(line, names)
  found = train(names["tx"], packed, problem()[1])
  assert distance(found, eco.dequantize(packed)) > 1
  if "adamw" in line:
    assert "b1=0.0" in line
    assert ("seed=3" in line) == ("optax.clip_by_global_norm(max_norm=1.0)" in line)
    assert ("learning_rate=0.001" in line) == ("nesterov=True" in line)


def after_momentum(fn):
  return optax.chain(
    optax.trace(0.9), optax.stateless(lambda u, _: jax.tree.map(fn, u)), optax.scale(-RATE)
  )


@pytest.mark.parametrize("fn", [jnp.tanh, jnp.arcsinh, lambda m: m**3])
def test_an_update_that_is_not_linear_in_its_momentum_raises(fn):
  expect_error(after_momentum(fn), "not linear in its momentum")


@pytest.mark.parametrize("limit", [0.5, 50.0], ids=["tightly", "seldom"])
def test_elements_clipped_after_the_momentum_raise(limit):
  # What is added to a momentum that is clipped anyway changes nothing.
  expect_error(after_momentum(lambda m: jnp.clip(m, -limit, limit)), "clipped behind the momentum")


def test_clipping_before_the_momentum_is_fine():
  params = eco.quantize(problem()[0], FORMAT)
  inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(RATE))
  tx = eco.error_feedback_to_momentum(inner, QUANTIZER)
  grads = jax.tree.map(jnp.ones_like, eco.dequantize(params))
  stock = optax.adam(RATE)
  clipped, _ = optax.clip_by_global_norm(1e-3).update(grads, optax.EmptyState())
  _, stock_state = stock.update(clipped, stock.init(grads), grads)
  _, state = tx.update(grads, tx.init(params), params)
  # The second moment is of the clipped gradients and holds nothing else.
  second = lambda state: optax.tree.get(state, "nu")
  jax.tree.map(
    lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-5),
    second(state),
    second(stock_state),
  )


@pytest.mark.parametrize("path", ["kernel", "mu"])
def test_a_quantized_leaf_that_is_masked_out_raises_by_name(path):
  mask = {"block": MASK["block"] | {path: False}}
  inner = optax.masked(optax.adam(RATE), mask)
  with pytest.raises(ValueError, match=f"leaf 'block/{path}'"):
    eco.error_feedback_to_momentum(inner, QUANTIZER).init(eco.quantize(problem()[0], FORMAT))


def test_float_leaves_may_have_any_optimizer():
  """Only quantized leaves need a momentum; the momenta of float leaves are left as they are."""
  inner = optax.partition(
    {"packed": optax.adam(RATE, b1=0.5), "float": optax.lion(RATE)},
    {"block": {"kernel": "packed", "mu": "packed", "bias": "float"}},
  )
  weights, grads = problem()
  packed = eco.quantize(weights, FORMAT)
  result = train(eco.error_feedback_to_momentum(inner, QUANTIZER), packed, grads)
  assert distance(result, reference("adam", "alone")) < 1.5
  wanted = train(optax.lion(RATE), weights["block"]["bias"], grads["block"]["bias"])
  np.testing.assert_allclose(result["block"]["bias"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
  "optimizer",
  [optax.lion(RATE), contrib.muon(0.02), optax.lamb(0.02), optax.sgd(RATE)],
  ids=["lion", "muon", "lamb", "sgd"],
)
def test_master_weights_serve_the_others(optimizer):
  """It ends within half a grid step of the float run, whatever the optimizer."""
  weights, grads = problem()
  packed = eco.quantize(weights, FORMAT)
  wanted = train(optimizer, eco.dequantize(packed), grads)
  result = train(eco.master_weights(optimizer, QUANTIZER), packed, grads)
  assert distance(eco.dequantize(packed), wanted) > 2
  assert distance(result, wanted) < 0.51


@pytest.mark.parametrize("residual", ["float32", "bfloat16", "int16", "int12", "int8"])
def test_split_master_weights_stay_close(residual):
  """100 roundings of a residual, each at most 1/127 of a step: 1/4 of one is far outside."""
  make, kwargs = WORKS["adam"]
  weights, grads = problem()
  packed = eco.quantize(weights, FORMAT)
  tx = eco.master_weights(make(**kwargs), QUANTIZER, residual)
  dtype = "uint8" if residual == "int12" else residual  # 12 bits are packed.
  assert tx.init(packed).residual["block"]["kernel"].dtype == dtype
  assert distance(train(tx, packed, grads), reference("adam", "alone")) < 0.75


def test_bfloat16_momentum_keeps_the_injection_on_average():
  """Rounding to nearest would swallow an injection below half a bfloat16 step of the momentum."""
  weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1, (64, 64)), jnp.float32)
  params = eco.quantize({"w": weights}, eco.FP8)
  grads = {"w": jnp.full((64, 64), 96.0)}

  def stored(dtype):
    # A decay that is exact in bfloat16, so that both momenta owe the same.
    inner = optax.sgd(2e-3, 0.875, accumulator_dtype=dtype)
    tx = eco.error_feedback_to_momentum(inner, QUANTIZER)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert state.inner[0].trace["w"].dtype == dtype
    return np.asarray(state.inner[0].trace["w"]).astype(np.float64)

  full, low = stored(jnp.float32), stored(jnp.bfloat16)
  assert 0.25 < np.max(np.abs(full - 96)) < 2
  # Between 64 and 128 a bfloat16 step is 1/2, so a deviation is 1/4 at most.
  assert np.max(np.abs(low - full)) <= 0.5
  assert abs(np.mean(low - full)) < 5 * 0.25 / 64
  small = np.abs(full - 96) < 0.2  # What nearest rounding loses altogether.
  owed, paid = (full - 96)[small], (low - 96)[small]
  assert abs(np.sum(np.sign(owed) * (paid - owed))) < 5 * 0.25 * np.sqrt(small.sum())


def test_multisteps_inject_on_real_steps_only():
  params = eco.quantize({"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}, eco.FP8)
  inner = optax.MultiSteps(optax.sgd(1e-2, 0.9), 3).gradient_transformation()
  tx = eco.error_feedback_to_momentum(inner, eco.quantize_params(seed=0))
  state, update = tx.init(params), jax.jit(tx.update)
  grads = {"w": jnp.full((8, 4), 0.3)}
  seen = []
  for _ in range(7):
    updates, state = update(grads, state, params)
    new = eco.apply_updates(params, updates)
    moved = bool(np.any(np.asarray(new["w"].qvalue) != np.asarray(params["w"].qvalue)))
    momentum = np.asarray(state.inner.inner_opt_state[0].trace["w"])
    seen.append((moved, momentum))
    params = new
  assert [moved for moved, _ in seen] == [False, False, True, False, False, True, False]
  np.testing.assert_array_equal(seen[1][1], np.zeros((8, 4)))
  np.testing.assert_array_equal(seen[2][1], seen[4][1])
  assert np.any(seen[2][1] != np.float32(0.3))  # The residual is there.


def test_an_optimizer_is_asked_no_more_often_where_there_are_more_leaves():
  stock, asked = optax.adamw(RATE), []

  def update(updates, state, params):
    asked.append(len(jax.tree.leaves(updates)))
    return stock.update(updates, state, params)

  def questions(leaves):
    params = eco.quantize({f"layer_{i}": jnp.ones((4, 4)) for i in range(leaves)}, eco.FP8)
    inner = optax.GradientTransformation(stock.init, update)
    tx = eco.error_feedback_to_momentum(inner, eco.quantize_params())
    asked.clear()
    state = tx.init(params)
    grads = {path: jnp.ones((4, 4)) for path in params}
    jax.eval_shape(tx.update, grads, state, params)
    return len(asked)

  assert questions(9) == questions(2)
