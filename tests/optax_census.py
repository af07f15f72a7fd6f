"""What Optax's own tests ask of an optimizer, asked of ours, on packed and on emulated weights.

`python tests/optax_census.py` asks everything of all optimizers, for ten minutes, and writes what
differs and the counts of docs/loops.md; tests/test_optax_census.py asks a part.

Questions, optimizers, learning rates, targets and tolerance are those of Optax 0.2.8, in
`alias_test.py` and `contrib/_common_test.py`. Weights are INT8 with one scale, since the targets
are vectors of two and three numbers that have to be met to a third of a tenth.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import eco_optax as eco
from eco_optax.quantized_array import is_quantized

FORMAT = eco.Format("int8", "tensor")
EVERY = lambda path, leaf: True
STORAGES = ("packed", "emulated")
TOLERANCE = 3e-2  # Relative and absolute.

# Arguments by Optax's name; of what follows a comma, nothing is Optax's.
OURS = {"eco.adamw": {"learning_rate": 1e-1}, "eco.sgd": {"learning_rate": 1e-3}}
RULE = {
  "adam": {"learning_rate": 1e-1},
  "adamax": {"learning_rate": 1e-1},
  "adamaxw": {"learning_rate": 1e-1},
  "adamw": {"learning_rate": 1e-1},
  "adan": {"learning_rate": 1e-1},
  "amsgrad": {"learning_rate": 1e-1},
  "lars": {"learning_rate": 1.0},
  "nadam": {"learning_rate": 1e-2},
  "nadamw": {"learning_rate": 1e-2},
  "novograd": {"learning_rate": 1e-3},
  "radam": {"learning_rate": 5e-3},
  "rmsprop, with momentum": {"learning_rate": 5e-3, "momentum": 0.9},
  "sgd, with momentum": {"learning_rate": 1e-3, "momentum": 0.9},
  "sm3": {"learning_rate": 1.0},
  "yogi": {"learning_rate": 1e-1},
  "ademamix": {"learning_rate": 1e-3},
  "adopt": {"learning_rate": 1e-2},
}
MASTER = {
  "adabelief": {"learning_rate": 1e-2},
  "adadelta": {"learning_rate": 0.1},
  "adafactor": {"learning_rate": 5e-3},
  "adagrad": {"learning_rate": 1.0},
  "fromage": {"learning_rate": 5e-3},
  "lamb": {"learning_rate": 1e-3},
  "lion": {"learning_rate": 1e-2, "weight_decay": 1e-4},
  "noisy_sgd": {"learning_rate": 1e-3, "eta": 1e-4, "key": 0},
  "optimistic_adam_v2": {"learning_rate": 2e-3},
  "optimistic_gradient_descent": {"learning_rate": 2e-3, "alpha": 0.7, "beta": 0.1},
  "polyak_sgd": {"max_learning_rate": 1.0},
  "rmsprop": {"learning_rate": 5e-3},
  "rprop": {"learning_rate": 1e-1},
  "sign_sgd": {"learning_rate": 1e-1},
  "signum": {"learning_rate": 1e-2},
  "acprop": {"learning_rate": 1e-3},
  "cocob": {},
  "dadapt_adamw": {"learning_rate": 1e-1},
  "dog": {"learning_rate": 1.0},
  "dowg": {"learning_rate": 1.0},
  "galore": {"learning_rate": 1e-2, "rank": 8},
  "madgrad": {"learning_rate": 1e-2},
  "momo": {"learning_rate": 1e-1},
  "momo_adam": {"learning_rate": 1e-1},
  "muon": {"learning_rate": 1e-2},
  "prodigy": {"learning_rate": 1e-1},
  "simplified_ademamix": {"learning_rate": 1e-3},
}
# Optax takes three times as many steps for its contributions.
CONTRIBUTED = {"ademamix", "adopt", *list(MASTER)[list(MASTER).index("acprop") :]}
OPTIMIZERS = OURS | RULE | MASTER


def factory(name: str) -> Callable[..., Any]:
  """Optax's function of that name, or ours."""
  own = name.removeprefix("eco.").split(",")[0]
  return getattr(eco if name in OURS else contrib if name in CONTRIBUTED else optax, own)


def transformation(
  name: str,
  storage: str,
  wrap: Callable[[Any], Any] = lambda optimizer: optimizer,
  inject: bool = False,
  **changes: Any,
) -> Any:
  """What is asked: ours, or Optax's under the rule or under master weights.

  Args:
    name: of `OPTIMIZERS`.
    storage: of its weights.
    wrap: what goes around the stock optimizer; around ours in emulation, and not at all if packed.
    inject: whether hyperparameters are part of the state.
    **changes: of the arguments.
  """
  arguments = OPTIMIZERS[name] | changes
  emulates = {"format": FORMAT, "where": EVERY} if storage == "emulated" else {}
  make = factory(name)
  if name in OURS:
    return make(**arguments, **emulates)
  if inject:
    names = (
      "rank",
      "min_dim_size_to_factor",
      "ns_steps",
      "num_betas",
      "key",
      "update_proj_gap",
      "clip_value_fn",
    )
    static = [n for n in names if n in inspect.signature(make).parameters]
    make = optax.inject_hyperparams(make, static_args=static)
  quantizer = eco.quantize_params(**emulates)
  ours = eco.error_feedback_to_momentum if name in RULE else eco.master_weights
  return ours(wrap(make(**arguments)), quantizer)


def weights(tree: Any, storage: str) -> Any:
  """Packed, or floats of the same values."""
  packed = eco.quantize(tree, FORMAT, EVERY)
  return packed if storage == "packed" else eco.dequantize(packed)


def take(tx: Any, params: Any, state: Any, loss: Callable[[Any], Any], **extra: Any) -> Any:
  """A step: parameters and state."""
  value, grads = eco.value_and_grad(loss)(params)
  updates, state = tx.update(grads, state, params, value=value, **extra)
  return eco.apply_updates(params, updates), state


def squares(params: Any) -> Any:
  return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def close(a: Any, b: Any, rtol: float) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_allclose(*(np.asarray(z, np.float64) for z in (x, y)), rtol=rtol, atol=1e-6)


def signature(tree: Any) -> Any:
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [jax.typeof(leaf) for leaf in leaves]


def _converges(name: str, storage: str, start: Any, optimum: Any, loss: Any) -> None:
  length = 30_000 if name in CONTRIBUTED else 10_000

  def course(tx: Any, params: Any) -> np.ndarray:
    def step(kept: Any, _: Any) -> Any:
      kept = take(tx, *kept, loss)
      return kept, eco.dequantize(kept[0])

    run = jax.jit(lambda kept: jax.lax.scan(step, kept, None, length)[1])
    return np.asarray(run((params, tx.init(params))))

  near = lambda x: np.allclose(x, optimum, rtol=TOLERANCE, atol=TOLERANCE)
  start = jnp.asarray(start)
  found = course(transformation(name, storage), weights(start, storage))
  if near(found[-1]):
    return
  mean = found[3 * length // 4 :].mean(axis=0)
  if near(mean):
    raise Excused("last weight")
  if name in MASTER:
    stock = course(factory(name)(**OPTIMIZERS[name]), start)[-1]
    raise Excused("noise" if near(stock) else "stock")
  raise AssertionError(f"ends at {found[-1]}, its mean at {mean}")


def parabola(name: str, storage: str) -> None:
  """The last weights are near the optimum of a parabola."""
  optimum = jnp.array([1.0, -1.0, 1.0])
  loss = lambda w: jnp.sum((w - optimum) ** 2)
  _converges(name, storage, [-1.0, 10.0, 1.0], optimum, loss)


def rosenbrock(name: str, storage: str) -> None:
  """The last weights are near the optimum of Rosenbrock's function."""
  loss = lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2
  _converges(name, storage, [0.0, 0.0], np.ones(2), loss)


def extra_arguments(name: str, storage: str) -> None:
  """An unexpected argument does no harm, and a second step compiles nothing."""
  tx, params = transformation(name, storage), weights(jnp.ones((3, 2)), storage)
  step = jax.jit(lambda params, state: take(tx, params, state, squares, unexpected=1))
  step(*step(params, tx.init(params)))
  assert step._cache_size() == 1


def injected_hyperparameters(name: str, storage: str) -> None:
  """With hyperparameters in the state a step is the same."""
  tree = [jnp.full((2, 3), -1.0), jnp.ones((2, 5, 2))]
  params = weights(tree, storage)
  found = []
  if name in OURS:
    raise Excused("injected")
  for inject in (False, True):
    tx = transformation(name, storage, inject=inject)
    state = jax.jit(tx.init)(params)
    params_, state = jax.jit(lambda p, s, tx=tx: take(tx, p, s, squares))(params, state)
    inner = state.inner.inner_state if inject else state.inner
    found.append((eco.dequantize(params_), inner))
  close(*found, rtol=1e-4)


def moment_dtypes(name: str, storage: str) -> None:
  """Moments are stored in the dtype that is asked for, or in the parameters'."""
  fields = {"sgd": ("accumulator_dtype", "trace"), "adam": ("mu_dtype", "mu")}
  argument, field = fields["sgd" if "sgd" in name else "adam"]
  for dtype in (None, jnp.float32, jnp.bfloat16):
    tx = transformation(name, storage, **{argument: dtype})
    moment = optax.tree.get(tx.init(weights(jnp.zeros(2), storage)), field)
    assert moment.dtype == (dtype or jnp.float32)
  format = eco.Format("float8_e4m3fn", "tensor", power_of_two=True)
  small = eco.quantize(jnp.ones(2, jnp.bfloat16), format, EVERY)
  if storage == "packed":
    assert optax.tree.get(transformation(name, storage).init(small), field).dtype == jnp.float32
    raise Excused("bfloat16")


def dtypes(name: str, storage: str) -> None:
  """Updates and new parameters have the dtypes of the old, whatever the gradients'."""
  params = weights(jnp.array([1.0, 2.0]), storage)
  tx = transformation(name, storage)
  for dtype in (jnp.float32, jnp.bfloat16):
    grads = eco.dequantize(params).astype(dtype)
    update = jax.jit(lambda g, s: tx.update(g, s, params, value=jnp.ones((), g.dtype)))
    updates, state = update(grads, tx.init(params))
    assert signature(eco.apply_updates(params, updates)) == signature(params)
    assert is_quantized(updates) or updates.dtype == params.dtype
    if dtype == jnp.float32:
      assert signature(state) == signature(tx.init(params))


def stable(name: str, storage: str) -> None:
  """A step and no step are branches of one condition."""
  params = weights(jnp.array([-1.0, 10.0, 1.0]), storage)
  tx = transformation(name, storage)

  @jax.jit
  def step(params: Any, state: Any, is_step: Any) -> Any:
    return jax.lax.cond(is_step, lambda: take(tx, params, state, squares), lambda: (params, state))

  state = tx.init(params)
  for is_step in (True, False):
    new = step(params, state, is_step)
    assert signature(new) == signature((params, state))
    params, state = new


def accumulation(name: str, storage: str) -> None:
  """`optax.MultiSteps` changes nothing for three micro-steps, then takes the step of their mean."""
  if name in OURS and storage == "packed":
    raise Excused("accumulated")
  around = name in OURS or storage == "emulated"
  multiple = lambda optimizer: optax.MultiSteps(optimizer, 4)
  plain = transformation(name, storage)

  def inside(optimizer: Any) -> Any:
    steps = multiple(optimizer)
    return optax.GradientTransformationExtraArgs(steps.init, steps.update)

  tx = multiple(plain) if around else transformation(name, storage, inside)
  start = params = weights(jnp.array([1.0, 2.0, 1.5]), storage)
  state = tx.init(params)
  dense = eco.dequantize(params)
  step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.ones(())))
  for i in range(4):
    close(params, start, rtol=0)
    updates, state = step(dense * (2 * i - 2.0), state, params)  # Their mean is the weight.
    params = eco.apply_updates(params, updates)
  updates, _ = plain.update(dense, plain.init(start), start, value=jnp.ones(()))
  wanted = eco.apply_updates(start, updates)
  if around:
    close(eco.dequantize(params), eco.dequantize(wanted), rtol=1e-6)
  else:  # The quantizer counts micro-steps, so that its random bits are others.
    grid = float(jnp.max(jnp.abs(dense))) / 127
    assert np.max(np.abs(eco.dequantize(params) - eco.dequantize(wanted))) <= 1.01 * grid


def schedules(name: str, storage: str) -> None:
  """A constant schedule is a number."""
  found = []
  for rate in (1e-3, optax.constant_schedule(1e-3)):
    tx = transformation(name, storage, learning_rate=rate)
    params = weights(jnp.array([-1.0, 10.0, 1.0]), storage)

    def body(_: Any, kept: Any, tx: Any = tx) -> Any:
      return take(tx, *kept, lambda w: jnp.sum((w - 1) ** 2))

    run = jax.jit(lambda kept, body=body: jax.lax.fori_loop(0, 10, body, kept)[0])
    found.append(eco.dequantize(run((params, tx.init(params)))))
  close(*found, rtol=1e-6)


def mapped_states(name: str, storage: str) -> None:
  """`optax.tree.map_params` finds what is shaped like parameters, and nothing else."""
  params = weights(jnp.ones((4, 3)), storage)
  tx = transformation(name, storage)
  state = tx.init(params)
  close(optax.tree.map_params(tx, lambda x: x, state), state, rtol=0)
  doubled = optax.tree.map_params(tx, lambda x: x + 1, state)
  for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(doubled), strict=True):
    assert jnp.shape(old) == jnp.shape(new)


QUESTIONS = (
  parabola, rosenbrock, extra_arguments, injected_hyperparameters, moment_dtypes, dtypes, stable,
  accumulation, schedules, mapped_states,
)  # fmt: skip


class Excused(Exception):
  """The answer differs from Optax's, for the reason of that name in `REASONS`."""


REASONS = {
  "last weight": "Weights jump between neighbours of the grid to the end; the mean of the last"
  " quarter is near the optimum. A learning rate that decays ends it.",
  "noise": "Gradients are taken at rounded weights, and jump where those of float32 grow smoothly."
  " Optimizers that shorten steps where gradients are large or change their sign stop short in"
  " Rosenbrock's valley; `acprop` divides by a variance that was zero, and wants `eps=1e-4`.",
  "stock": "Optax's own does not get there either, in float32 with as many steps.",
  "injected": "`eco.adamw` and `eco.sgd` take numbers and schedules. Put `inject_hyperparams` into"
  " `error_feedback_to_momentum`.",
  "bfloat16": "The momentum of a packed leaf is float32 unless `mu_dtype` says otherwise: weights"
  " have no dtype of their own, and the momentum carries their errors.",
  "accumulated": "`MultiSteps` goes into `error_feedback_to_momentum`, or gradients are added by"
  " hand.",
}


_SCHEDULES = (optax.ScalarOrSchedule, "optax.ScalarOrSchedule")


def asks(name: str) -> list[Callable[[str, str], None]]:
  """The questions that Optax asks of an optimizer."""
  rate = inspect.signature(factory(name)).parameters.get("learning_rate")
  takes_schedules = rate is not None and rate.annotation in _SCHEDULES
  has_dtype = name in ("eco.adamw", "eco.sgd", "adam", "adamw", "sgd, with momentum")
  asked = {moment_dtypes: has_dtype, schedules: takes_schedules}
  return [question for question in QUESTIONS if asked.get(question, True)]


def answer(question: Callable[[str, str], None], name: str, storage: str) -> str:
  """An empty text, a key of `REASONS`, or what went wrong."""
  try:
    question(name, storage)
  except Excused as excuse:
    return str(excuse)
  except Exception as error:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
  return ""


def table(counts: dict[str, dict[str, int]]) -> str:
  """How many questions were answered how, in Markdown; counts are by storage and reason."""
  lines = [
    "| weights | asked | as Optax has it | differ, for the reasons below | failed |",
    "|---|---|---|---|---|",
  ]
  for storage, count in counts.items():
    total, passed, failed = sum(count.values()), count.get("passed", 0), count.get("failed", 0)
    lines.append(f"| {storage} | {total} | {passed} | {total - passed - failed} | {failed} |")
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--names", nargs="*", default=list(OPTIMIZERS), help="those to ask")
  parser.add_argument("--out", help="file to write, such as results/optax/census.json")
  options = parser.parse_args()
  warnings.simplefilter("ignore")
  counts: dict[str, collections.Counter[str]] = {s: collections.Counter() for s in STORAGES}
  differs = []
  for name in options.names:
    for storage in STORAGES:
      for question in asks(name):
        found = answer(question, name, storage)
        known = found if found in REASONS else "failed"
        counts[storage][known if found else "passed"] += 1
        if found:
          differs.append(f"{name}, {storage}, {question.__name__}: {found}")
          print(differs[-1], flush=True)
    jax.clear_caches()
  print(table(counts))
  if options.out:
    from eco_optax.training import report

    file = {"counts": counts, "differs": differs, **report.describe_machine()}
    path = pathlib.Path(options.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(file, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
