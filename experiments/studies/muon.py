"""What Muon pays back of an error in its momentum, and which way to train it loses least.

The polar factor U of a momentum M is not linear in it. To first order a change E of M changes U by
`theory.polar_derivative`: its antisymmetric part in M's singular bases, and nothing of its
symmetric part. An error is as likely symmetric as not, so that about half of it is lost where M is
square, whatever is put in the momentum.

- `payback` puts an error in the momentum of a float64 simulation, without any rounding, and sees
  how much of it the weights get back in the steps that follow.
- `train` trains a small Transformer with Muon, and keeps or drops errors in every way.

What to expect: a rule that divides by the derivative as if the square root in
U = M (MᵀM)^{-1/2} did not move, as has been published for Muon, gives back
σⱼ / (σᵢ + σⱼ) of the element (i, j) of A = PᵀEQ, and takes as much from the element (j, i), which
nobody asked for: half of E, and an error as long as what is missing. A residual gives back all.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib

import eco_optax as eco
from eco_optax import trees
from eco_optax.training import methods, report, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline
from eco_optax.training.loop import evaluate
from eco_optax.training.models import transformer
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.momentum import Momentum
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  add_update,
  float_gradients,
  stored_weight,
)
from eco_optax.transforms.packed import run as run_transformation
from experiments import figures

BETA = 0.95
SHAPES = {"64 × 64": (64, 64), "128 × 64": (128, 64)}
STEPS = 150
STEPS_SHOWN = 100
_ITERATIONS = 40  # From singular values down to 1e-5 of the norm, by 1.5 each.
_SIZE = 1e-4  # Of what is put in the momentum, relative to it: small, so that derivatives count.

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Of five steps of Newton and Schulz, as Optax has them.


def _factors(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
  """U and H of the polar decomposition M = U H, (n, m) with n ≥ m, by Newton's iteration.

  It takes products alone, which a training step can afford, and has a derivative.
  """
  turned = lambda x: jnp.swapaxes(x, -1, -2)
  size = jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
  step = lambda _, x: 1.5 * x - 0.5 * x @ (turned(x) @ x)
  u = jax.lax.fori_loop(0, _ITERATIONS, step, matrix / jnp.maximum(size, 1e-30))
  h = turned(u) @ matrix
  return u, (h + turned(h)) / 2


# Rules: the change of the momentum M, to first order, for an error E of the weights. Both are n × m
# with n ≥ m.


def published(matrix: jax.Array, error: jax.Array) -> jax.Array:
  """E (MᵀM)^{1/2}: the derivative of M (MᵀM)^{-1/2} where its square root is taken to stay."""
  return error @ _factors(matrix)[1]


def antisymmetric(matrix: jax.Array, error: jax.Array) -> jax.Array:
  """`theory.polar_payback` without singular values: in U's basis A is UᵀE, and S is H."""
  u, h = _factors(matrix)
  inside = jnp.swapaxes(u, -1, -2) @ error
  turn = (inside - jnp.swapaxes(inside, -1, -2)) / 2
  return u @ ((turn @ h + h @ turn) / 2) + (error - u @ inside) @ h


RULES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "published rule": published,
  "antisymmetric part alone": antisymmetric,
}


class Payback(NamedTuple):
  """What came back of an error by each step, means over draws."""

  share: list[float]  # ⟨back, E⟩ / ⟨E, E⟩
  distance: list[float]  # ‖back − E‖ / ‖E‖


def _newton_schulz(matrix: np.ndarray) -> np.ndarray:
  x = matrix / np.linalg.norm(matrix)
  a, b, c = COEFFICIENTS
  for _ in range(5):
    gram = x.T @ x
    x = a * x + x @ (b * gram + c * gram @ gram)
  return x


def _polar(matrix: np.ndarray) -> np.ndarray:
  p, _, qt = np.linalg.svd(matrix, full_matrices=False)
  return p @ qt


DIRECTIONS = {"exact polar factor": _polar, "five Newton-Schulz steps": _newton_schulz}


def payback(
  shape: tuple[int, int],
  rule: Callable[[jax.Array, jax.Array], jax.Array] | None,
  direction: Callable[[np.ndarray], np.ndarray],
  draws: int = 4,
  steps: int = STEPS,
) -> Payback:
  """How much of an error that is put in the momentum the weights get back; float64.

  Gradients are a direction of rank 8 and white noise of the same length, as noisy as those of small
  batches. They do not depend on the weights, so that two runs differ by the error alone.

  Args:
    shape: of the matrix, rows first, no more columns than rows.
    rule: of `RULES`; None is SGD with momentum and its own rule, u = −η m.
    direction: makes u / −η of the momentum.
    draws: matrices and errors to take the mean over.
    steps: after the error.

  Returns:
    What came back by each step.
  """
  shares, distances = [], []
  for seed in range(draws):
    generator = np.random.default_rng(seed)
    low = generator.standard_normal((shape[0], 8)) @ generator.standard_normal((8, shape[1]))
    low /= np.linalg.norm(low) / math.sqrt(low.size)
    draw = lambda generator=generator, low=low: low + generator.standard_normal(shape)
    momentum = np.zeros(shape)
    for _ in range(200):
      momentum = BETA * momentum + (1 - BETA) * draw()
    error = generator.standard_normal(shape)
    # η = 1; a step moves by −U(m̃), to which the momentum left behind has come down by β.
    wanted = error if rule is None else np.asarray(rule(jnp.asarray(momentum), jnp.asarray(error)))
    added = -(1 - BETA) / BETA * wanted
    small = _SIZE * np.linalg.norm(momentum) / np.linalg.norm(added)
    error, other = error * small, momentum + added * small
    back = np.zeros(shape)
    size = np.sum(error**2)
    for _ in range(steps):
      gradient = draw()
      momentum, other = (BETA * m + (1 - BETA) * gradient for m in (momentum, other))
      back -= other - momentum if rule is None else direction(other) - direction(momentum)
      shares.append(np.sum(back * error) / size)
      distances.append(np.linalg.norm(back - error) / np.linalg.norm(error))
  mean = lambda x: [round(float(v), 5) for v in np.mean(np.reshape(x, (draws, steps)), axis=0)]
  return Payback(mean(shares), mean(distances))


def shares_by_ratio(count: int = 9) -> list[dict[str, float]]:
  """What comes back of a single element of A = PᵀEQ, at both places, by σⱼ / σᵢ; by `jax.jvp`."""
  rows = []

  for ratio in np.geomspace(0.05, 20, count):
    matrix = jnp.diag(jnp.asarray([1.0, ratio]))
    error = jnp.zeros((2, 2)).at[0, 1].set(1.0)
    row = {"ratio": float(ratio)}
    for name, rule in RULES.items():
      _, back = jax.jvp(lambda m: _factors(m)[0], (matrix,), (rule(matrix, error),))
      row[name] = round(float(back[0, 1]), 6)
      row[f"{name}, other"] = round(float(back[1, 0]), 6)
    rows.append(row)
  return rows


def simulate(draws: int = 4, steps: int = STEPS) -> dict[str, Any]:
  """`payback` of every shape, rule and direction, and `shares_by_ratio`."""
  with jax.enable_x64(True):
    found: dict[str, Any] = {
      "SGD with momentum": payback(SHAPES["64 × 64"], None, _polar, draws, steps)._asdict()
    }
    for shape_name, shape in SHAPES.items():
      for rule_name, rule in RULES.items():
        for direction_name, direction in DIRECTIONS.items():
          name = f"{rule_name}, {shape_name}, {direction_name}"
          found[name] = payback(shape, rule, direction, draws, steps)._asdict()
    return {"payback": found, "by_ratio": shares_by_ratio()}


def with_rule(
  config: ml_collections.ConfigDict, rule: Callable[[jax.Array, jax.Array], jax.Array]
) -> optax.GradientTransformationExtraArgs:
  """Muon whose momentum is given the errors of stochastic rounding, as a rule says."""
  inner = optax.with_extra_args_support(methods.stock_optimizer(config))
  quantizer, schedule = methods.quantizer(config), methods.schedule(config)

  def init(params: Any) -> Any:
    return jnp.zeros([], jnp.int32), inner.init(eco.dequantize(params)), quantizer.init(params)

  def update(
    updates: Any, state: Any, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, Any]:
    count, inner_state, quantizer_state = state
    updates, context = context.scale(updates)
    updates, dense = float_gradients(updates, params), eco.dequantize(params)
    updates, inner_state = inner.update(updates, inner_state, dense)
    quantized, quantizer_state = run_transformation(
      quantizer, updates, quantizer_state, params, context, extra_args
    )
    weights = momentum_lib.flat(dense)
    paths = tuple(path for path in weights if transformer.is_block_kernel(path))
    where = Momentum({path: x.shape for path, x in weights.items()}, paths)
    momenta, rate = where.get(inner_state), jnp.asarray(schedule(count), jnp.float32)

    def add(path: str, leaf: Any, update: Any, new: Any) -> None:
      if path not in paths:
        return
      error = add_update(weights[path] - stored_weight(path, leaf, new), update)
      is_tall = error.shape[-2] >= error.shape[-1]
      turn = (lambda x: x) if is_tall else (lambda x: jnp.swapaxes(x, -1, -2))
      change = turn(rule(turn(momenta[path]), turn(error)))
      # Steps are 0.2 √max(n, m) η long; Nesterov's momentum feels β of what is in it.
      size = rate * np.float32(0.2 * math.sqrt(max(error.shape[-2:])) * BETA**2 / (1 - BETA))
      momenta[path] = momenta[path] - jnp.where(jnp.isfinite(change), change, 0) / size

    trees.map_with_path(
      add, params, updates, quantized, is_leaf=lambda x: isinstance(x, eco.QuantizedArray)
    )
    return quantized, (count + 1, where.put(inner_state, momenta), quantizer_state)

  whole = PackedTransformation(init, update)
  return optax.with_extra_args_support(optax.chain(optax.identity(), whole))


# Ways to train with Muon: what a config changes, and a rule where errors go into the momentum.
_RESIDUAL = {"method": "mw_rtn", "residual": "int8"}
_NAIVE = {"method": "naive_sr"}
WAYS: dict[str, tuple[dict[str, Any], Callable[[jax.Array, jax.Array], jax.Array] | None]] = {
  "master weights": ({"method": "mw_rtn"}, None),
  "int8 residual": (_RESIDUAL, None),
  "int8 residual, FP8 momentum": (
    _RESIDUAL | {"moments.mu": "float8_e4m3fn", "moments.nu": "float8_e4m3fn"},
    None,
  ),
  "int16 residual, bfloat16 momentum": (
    {"method": "mw_rtn", "residual": "int16"}
    | {"moments.mu": "bfloat16", "moments.nu": "bfloat16"},
    None,
  ),
  "antisymmetric part alone": (_NAIVE, RULES["antisymmetric part alone"]),
  "published rule": (_NAIVE, RULES["published rule"]),
  "naive SR": (_NAIVE, None),
}


def train(
  config: ml_collections.ConfigDict, rule: Callable[[jax.Array, jax.Array], jax.Array] | None
) -> dict[str, float]:
  """The validation loss of a run on the standard library, and its bytes per packed weight."""
  mesh = sharding.make_mesh(config.mesh.to_dict())
  tx = methods.optimizer(config) if rule is None else with_rule(config, rule)
  data = corpus.standard_library_dataset()
  windows = pipeline.train_windows(data.train, config.length, config.seed)
  with jax.set_mesh(mesh):
    state = step_lib.init_state(config, tx, mesh)
    train_step = step_lib.make_train_step(config, tx, mesh)
    batches = pipeline.batches(windows, 0, config.batch_size, sharding.batch_sharding(mesh))
    for _ in range(config.steps):
      state, _ = train_step(state, next(batches))
    held_out = pipeline.validation_windows(data.validation, config.length)
    found = evaluate(
      step_lib.make_eval_step(config), state.params, held_out, config.batch_size, mesh,
      config.evaluate_batches,
    )  # fmt: skip
    return {"validation_loss": round(found, 5), "bytes": stored_bytes(state)}


def stored_bytes(state: Any) -> float:
  """Bytes of codes, scales, moments and residuals per weight of linear layers."""
  weights = momentum_lib.flat(state.params)
  count = sum(x.size for path, x in weights.items() if transformer.is_block_kernel(path))
  total = 0
  for path, x in momentum_lib.flat((state.params, state.opt_state)).items():
    is_own = path.removesuffix("/row").removesuffix("/column").endswith("/kernel")
    total += x.nbytes if is_own and "blocks" in path else 0
  return round(total / count, 3)


def study(
  config: ml_collections.ConfigDict,
  formats: tuple[str, ...] = ("FP8", "INT4"),
  seeds: tuple[int, ...] = (0,),
  done: Sequence[dict[str, Any]] = (),
) -> Iterator[list[dict[str, Any]]]:
  """Trains in every way, format and seed; yields all rows that there are, after each new one."""
  rows = list(done)
  yield rows
  for seed in seeds:
    for format in formats:
      for name, (changes, rule) in WAYS.items():
        setting = {"way": name, "format": format, "seed": seed}
        if any(setting.items() <= row.items() for row in rows):
          continue
        own = config.copy_and_resolve_references()
        own.update({"seed": seed, "format": format})
        own.optimizer.name = methods.MUON
        own.update_from_flattened_dict(changes)
        rows.append(setting | train(own, rule))
        yield rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Losses of all ways in Markdown; differences to master weights are paired by seed."""
  formats = list(dict.fromkeys(row["format"] for row in rows))
  head = [f"{format}: bytes | {format}: loss" for format in formats]
  lines = [f"| Muon with | {' | '.join(head)} |", "|---" * (1 + 2 * len(formats)) + "|"]
  of = lambda way, format: {
    row["seed"]: row for row in rows if (row["way"], row["format"]) == (way, format)
  }
  for way in WAYS:
    cells = [way]
    for format in formats:
      own, master = of(way, format), of("master weights", format)
      values = [
        row["validation_loss"] - (0 if way == "master weights" else master[seed]["validation_loss"])
        for seed, row in own.items()
      ]
      if not values:
        cells += ["–", "–"]
        continue
      sign = "" if way == "master weights" else "+"
      cells += [f"{next(iter(own.values()))['bytes']:.2f}", f"{np.mean(values):{sign}.4f}"]
      if len(values) > 1:
        cells[-1] += f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}"
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def payback_table(found: Mapping[str, Any]) -> str:
  """What has come back after all steps, in Markdown."""
  lines = [
    "| rule | matrix | direction | comes back | distance from the error |",
    "|---|---|---|---|---|",
  ]
  for name, own in found["payback"].items():
    cells = name.split(", ") if ", " in name else [name, "64 × 64", "the momentum itself"]
    lines.append(
      f"| {' | '.join(cells)} | {100 * own['share'][-1]:.1f}% | {own['distance'][-1]:.2f} |"
    )
  return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], out: pathlib.Path) -> None:
  """Draws what comes back over steps, and of one element by the ratio of singular values.

  Args:
    found: of `simulate`.
    out: the PNG to write.
  """
  plt = figures.pyplot()
  figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
  colors = {"published rule": figures.NAIVE, "antisymmetric part alone": figures.ECO}
  steps = np.arange(1, STEPS_SHOWN + 1)
  linear = found["payback"]["SGD with momentum"]["share"][:STEPS_SHOWN]
  left.plot(
    steps, np.multiply(100, linear), color=figures.MASTER, label="SGD with momentum (linear)"
  )
  for rule, color in colors.items():
    for shape, line in zip(SHAPES, ("-", "--"), strict=True):
      share = found["payback"][f"{rule}, {shape}, exact polar factor"]["share"][:STEPS_SHOWN]
      left.plot(steps, np.multiply(100, share), line, color=color, label=f"Muon, {rule}, {shape}")
  left.axhline(100, color="0.8", lw=0.8, zorder=0)
  left.set(xlabel="steps after the error", ylabel="% of the error that came back", ylim=(0, 108))
  left.legend(frameon=False, fontsize=8, loc="lower right")
  ratios = [row["ratio"] for row in found["by_ratio"]]
  between = np.geomspace(ratios[0], ratios[-1], 100)
  for rule, color in colors.items():
    of = lambda key: [row[key] for row in found["by_ratio"]]
    theory_of = between / (1 + between) if rule == "published rule" else np.full_like(between, 0.5)
    right.plot(between, 100 * theory_of, color=color, lw=1)
    right.plot(between, -100 * theory_of, color=color, lw=1, ls=":")
    right.plot(ratios, np.multiply(100, of(rule)), "o", color=color, mfc="none")
    right.plot(ratios, np.multiply(100, of(f"{rule}, other")), "x", color=color)
  right.plot([], [], "ko", mfc="none", label="at (i, j), where the error is")
  right.plot([], [], "kx", label="at (j, i), where there is none")
  right.axhline(100, color=figures.MASTER, lw=1, label="at (i, j) with a linear update")
  right.axhline(0, color="0.8", lw=0.8, zorder=0)
  right.set(
    xscale="log", xlabel=r"ratio of singular values, $\sigma_j / \sigma_i$",
    ylabel="% of an error in one element", ylim=(-108, 108),
  )  # fmt: skip
  right.legend(frameon=False, fontsize=8, loc="lower left")
  figures.save(figure, out)


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config of the study's runs: two layers, 300 steps of 8 sequences."""
  own = config.copy_and_resolve_references()
  own.model.update(layers=2, width=64, heads=2)
  own.steps, own.batch_size, own.evaluate_batches = 300, 8, 64
  return own


def failures(found: Mapping[str, Any]) -> list[str]:
  """What does not hold: SGD pays all, Muon does not, and one element comes back as derived."""
  last = {name: own["share"][-1] for name, own in found["payback"].items()}
  problems = [
    f"{name} pays {100 * share:.1f}% back"
    for name, share in last.items()
    if (share < 0.99) != name.startswith(tuple(RULES))
  ]
  for row in found["by_ratio"]:
    wanted = {"published rule": row["ratio"] / (1 + row["ratio"]), "antisymmetric part alone": 0.5}
    for rule, share in wanted.items():
      if abs(row[rule] - share) + abs(row[f"{rule}, other"] + share) > 1e-3:
        problems.append(f"{rule} at a ratio of {row['ratio']:.3g}: {row[rule]}, not {share:.6f}")
  return problems


def run(out: pathlib.Path, config: ml_collections.ConfigDict, small: bool = False) -> list[str]:
  """Runs the simulation and the training runs that are not in `out` yet, and writes all.

  Args:
    out: the folder to write to: muon.json, muon.md and muon.png of the simulation, muon_runs.json
      and muon_runs.md.
    config: of the runs, see `tiny`.
    small: whether one draw, and 20 steps of each way in FP8, are enough.

  Returns:
    What does not hold.
  """
  machine = report.describe_machine()
  write = lambda name, x: (out / name).write_text(json.dumps(x, indent=1, allow_nan=False) + "\n")
  seeds = (0,) if small else (0, 1, 2, 3)
  found = simulate(len(seeds), STEPS_SHOWN if small else STEPS)
  write("muon.json", machine | {"seeds": seeds} | found)
  (out / "muon.md").write_text(payback_table(found))
  plot(found, out / "muon.png")
  if small:
    config.steps = 20
  runs = out / "muon_runs.json"
  before = json.loads(runs.read_text()) if runs.exists() else {}
  done = before["rows"] if before.get("steps") == config.steps else []
  for rows in study(config, ("FP8",), (0,), done) if small else study(config, done=done):
    write("muon_runs.json", machine | {"steps": config.steps, "rows": rows})
    (out / "muon_runs.md").write_text(table(rows))
  return failures(found)
