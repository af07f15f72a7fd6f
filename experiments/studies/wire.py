"""Gradient exchange against its theory: predicted rates beside measured ones.

Workers are simulated by `jax.vmap` over the transformations that a mesh would run, in float32;
optima and distances to them are computed in float64.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import wire
from eco_optax.training import report

EVERYTHING = lambda path, leaf: True
D, KEPT = 64, 8  # Values, of which top-k keeps so many: δ = 1/8.
DELTA = KEPT / D


class Problem(NamedTuple):
  """A sum of workers' losses, f = (1/n) Σ f_i."""

  name: str
  gradients: Callable[[jax.Array], jax.Array]  # x → (n, d), float32.
  value: Callable[[np.ndarray], np.ndarray]  # (steps, d) → f, float64.
  best: np.ndarray
  start: np.ndarray
  smoothness: np.ndarray  # L_i
  L: float  # Of f.
  mu: float  # Of f.

  @property
  def workers(self) -> int:
    """How many."""
    return len(self.smoothness)


def _spectrum(generator: np.random.Generator, low: float, high: float, d: int = D) -> np.ndarray:
  """A symmetric matrix with eigenvalues from low to high."""
  basis = np.linalg.qr(generator.standard_normal((d, d)))[0]
  return (basis * np.geomspace(low, high, d)) @ basis.T


def _quadratic(name: str, A: np.ndarray, b: np.ndarray, start: np.ndarray) -> Problem:
  """f_i = ½ (x − b_i)ᵀ A_i (x − b_i)."""
  mean = A.mean(axis=0)
  best = np.linalg.solve(mean, np.einsum("nij,nj->i", A, b) / len(A))
  A32, b32 = jnp.asarray(A, jnp.float32), jnp.asarray(b, jnp.float32)

  def gradients(x: jax.Array) -> jax.Array:
    return jnp.einsum("nij,nj->ni", A32, x - b32, precision="highest")

  def value(x: np.ndarray) -> np.ndarray:
    way = x - best
    return 0.5 * np.einsum("ti,ij,tj->t", way, mean, way)  # Above the optimum's.

  eigenvalues = np.linalg.eigvalsh(mean)
  constants = np.linalg.eigvalsh(A)[:, -1]
  return Problem(name, gradients, value, best, start, constants, eigenvalues[-1], eigenvalues[0])


def quadratic(workers: int, is_heterogeneous: bool, seed: int = 0) -> Problem:
  """Strongly convex quadratics: one for all workers, or each with its own matrix and optimum."""
  generator = np.random.default_rng(seed)
  if is_heterogeneous:
    A = np.stack([_spectrum(generator, 0.1, 1.0) for _ in range(workers)])
    b = generator.standard_normal((workers, D))
  else:
    A = np.broadcast_to(_spectrum(generator, 0.1, 1.0), (workers, D, D))
    b = np.broadcast_to(generator.standard_normal(D), (workers, D))
  kind = "heterogeneous" if is_heterogeneous else "homogeneous"
  return _quadratic(f"quadratic, {kind}", A, b, np.zeros(D))


def skewed(workers: int, share: float, seed: int = 0) -> Problem:
  """Quadratics whose smoothness has mean 1, of which one worker has a share of the sum."""
  generator = np.random.default_rng(seed)
  constants = np.full(workers, (1 - share) * workers / (workers - 1))
  constants[0] = share * workers
  A = constants[:, None, None] * _spectrum(generator, 0.1, 1.0)
  b = generator.standard_normal((workers, D)) / constants[:, None]
  return _quadratic(f"quadratic, one worker has {share:.0%} of ΣL", A, b, np.zeros(D))


def logistic(workers: int, is_heterogeneous: bool, seed: int = 0) -> Problem:
  """Logistic regression, regularized; heterogeneous: examples are sorted by label."""
  generator = np.random.default_rng(seed)
  each, decay = 32, 0.02
  x = generator.standard_normal((workers * each, D)) / np.sqrt(D) * 2
  y = np.where(
    x @ generator.standard_normal(D) + 0.5 * generator.standard_normal(len(x)) > 0, 1, -1
  )
  order = np.argsort(y, kind="stable") if is_heterogeneous else np.arange(len(x))
  z = (x * y[:, None])[order].reshape(workers, each, D)
  Z = z.reshape(-1, D)

  def full_value(w: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -w @ Z.T).mean(axis=-1) + decay / 2 * (w * w).sum(axis=-1)

  best = np.zeros(D)
  for _ in range(50):  # Newton.
    p = 1 / (1 + np.exp(Z @ best))
    gradient = -(Z * p[:, None]).mean(axis=0) + decay * best
    hessian = (Z * (p * (1 - p))[:, None]).T @ Z / len(Z) + decay * np.eye(D)
    best = best - np.linalg.solve(hessian, gradient)
  z32 = jnp.asarray(z, jnp.float32)

  def gradients(w: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(-jnp.einsum("nmd,d->nm", z32, w, precision="highest"))
    return -jnp.einsum("nm,nmd->nd", p, z32, precision="highest") / each + np.float32(decay) * w

  top = lambda rows: np.linalg.eigvalsh(rows.T @ rows / len(rows))[-1] / 4 + decay
  constants = np.array([top(own) for own in z])
  kind = "sorted by label" if is_heterogeneous else "shuffled"
  return Problem(
    f"logistic regression, {kind}", gradients, lambda w: full_value(w) - full_value(best), best,
    np.zeros(D), constants, top(Z), decay,
  )  # fmt: skip


def amplification(delta: float) -> float:
  """√(2β/θ) of EF21's theorem under the Polyak–Łojasiewicz condition."""
  theta = 1 - np.sqrt(1 - delta)
  return float(np.sqrt(2 * (1 - delta) / theta**2))


def ef21_rate(problem: Problem, mean: str) -> float:
  """The step that EF21's theorem allows, by the quadratic or the arithmetic mean of smoothness."""
  L = problem.smoothness
  spread = np.sqrt(np.mean(L**2)) if mean == "quadratic" else np.mean(L)
  return float(1 / (problem.L + spread * amplification(DELTA)))


def methods(workers: int, smoothness: Any = None) -> dict[str, Any]:
  """The transformations that are compared, all with the same top-k."""
  top = wire.top_k(KEPT, D)
  how: dict[str, Any] = {"exchange": "gather", "where": EVERYTHING}
  return {
    "exact": optax.GradientTransformation(
      lambda params: optax.EmptyState(),
      lambda g, state, params=None: (jax.lax.pmean(g, "data"), state),
    ),
    "no feedback": wire.compressed(top, "data", where=EVERYTHING),
    "error feedback": wire.error_feedback(top, "data", **how),
    "EF21": wire.ef21(top, "data", **how),
    "EF21-W": wire.ef21(top, "data", smoothness=smoothness, **how),
    "EF21-BC": wire.ef21(top, "data", **(how | {"exchange": "scatter"})),
    "EControl": wire.econtrol(top, "data", **how),
  }


def course(
  problem: Problem, tx: Any, rate: float, steps: int, noise: float = 0.0, seed: int = 0
) -> np.ndarray:
  """The gap f − f* after each step of gradient descent, float64 of shape (steps + 1,)."""
  n, d = problem.workers, problem.start.size
  start = jnp.asarray(problem.start, jnp.float32)
  state = jax.vmap(tx.init, axis_name="data", axis_size=n, in_axes=None)(start)

  @jax.jit
  def run(state: Any) -> jax.Array:
    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
      x, state = carry
      g = problem.gradients(x)
      if noise:
        g = g + np.float32(noise / np.sqrt(d)) * jax.random.normal(key, g.shape)
      updates, state = jax.vmap(tx.update, axis_name="data")(g, state)
      x = x - np.float32(rate) * updates[0]
      return (x, state), x

    return jax.lax.scan(step, (start, state), jax.random.split(jax.random.key(seed), steps))[1]

  with np.errstate(over="ignore", invalid="ignore"):
    points = np.concatenate([problem.start[None], np.asarray(run(state), np.float64)])
    return problem.value(points)


def measured_rate(gaps: np.ndarray) -> float | None:
  """The factor per step of a linear course; None if it does not come down by a million.

  The slope of log(f − f*) from a hundredth of the start to a millionth.
  """
  relative = gaps / gaps[0]
  below = np.flatnonzero(relative < 1e-6)
  if not below.size:
    return None
  first, last = int(np.flatnonzero(relative < 1e-2)[0]), int(below[0])
  return float((relative[last] / relative[first]) ** (1 / max(1, last - first)))


def floor_of(gaps: np.ndarray) -> float:
  """Where a course ends: the mean of its last tenth, as a share of the start."""
  return float(np.mean(gaps[-len(gaps) // 10 :]) / gaps[0])


def convergence(
  workers: tuple[int, ...] = (4, 16, 64), steps: int = 6000, show: Any = print
) -> list[dict[str, Any]]:
  """Linear or not: a row per problem, number of workers and method."""
  rows = []
  for n in workers:
    for make in (quadratic, logistic):
      for is_heterogeneous in (False, True):
        problem = make(n, is_heterogeneous)
        for name, tx in methods(n, problem.smoothness).items():
          rate = ef21_rate(problem, "arithmetic" if name == "EF21-W" else "quadratic")
          gaps = course(problem, tx, rate, steps)
          row = {
            "problem": problem.name, "workers": n, "method": name, "rate": rate,
            "condition": float(problem.L / problem.mu),
            "bound": float(1 - rate * problem.mu), "factor": measured_rate(gaps),
            "floor": floor_of(gaps),
          }  # fmt: skip
          if name == "error feedback":
            row["floor_at_half"] = floor_of(course(problem, tx, rate / 2, 2 * steps))
          rows.append(row)
          show(f"  {row}")
  return rows


def means(workers: int = 64, show: Any = print) -> list[dict[str, Any]]:
  """Steps to a millionth, as L_QM grows and L_AM does not: at the step that either allows."""
  rows = []
  for share in (1 / workers, 0.25, 0.5, 0.9):
    problem = skewed(workers, share)
    txs = methods(workers, problem.smoothness)
    row: dict[str, Any] = {
      "share": share, "workers": workers,
      "quadratic_mean": float(np.sqrt(np.mean(problem.smoothness**2))),
      "arithmetic_mean": float(np.mean(problem.smoothness)),
    }  # fmt: skip
    for mean, name in (("quadratic", "EF21"), ("arithmetic", "EF21-W")):
      rate = ef21_rate(problem, mean)
      # The theorem has (1 − γμ)^t, and a quadratic's slowest mode its square.
      steps = int(1.2 * np.log(1e6) / (rate * problem.mu))
      gaps = course(problem, txs[name], rate, steps) / problem.value(problem.start[None])[0]
      row[f"bound_{mean}"] = float(np.log(1e6) / -np.log1p(-rate * problem.mu))
      row[f"steps_{mean}"] = int(np.flatnonzero(gaps < 1e-6)[0])
    rows.append(row)
    show(f"  {row}")
  return rows


def noisy(
  workers: tuple[int, ...] = (4, 16, 64), steps: int = 20_000, show: Any = print
) -> list[dict[str, Any]]:
  """Where noisy gradients end: EControl and error feedback average noise over workers."""
  rows = []
  for n in workers:
    problem = quadratic(n, is_heterogeneous=False)
    # Of exact SGD in the end only the noise is left: γ Σ_j (σ²/d)/n / (2(2 − γλ_j)).
    for name in ("exact", "error feedback", "EF21", "EControl"):
      tx = methods(n)[name]
      rate, noise = 0.01, 1.0
      gaps = course(problem, tx, rate, steps, noise)
      eigenvalues = np.geomspace(0.1, 1.0, D)
      exact = float(np.sum(rate * noise**2 / D / n / (2 * (2 - rate * eigenvalues))))
      rows.append(
        {
          "workers": n,
          "method": name,
          "rate": rate,
          "noise": noise,
          "floor": float(np.mean(gaps[-steps // 2 :])),
          "exact_sgd": exact,
        }
      )
      show(f"  {rows[-1]}")
  return rows


def divergence(steps: int = 400, show: Any = print) -> list[dict[str, Any]]:
  """Three quadratics on which top-1 without feedback grows by 1 + 11γ/6 in each step."""
  a = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
  A = 2 * np.einsum("ni,nj->nij", a, a) + 0.5 * np.eye(3)
  problem = _quadratic("three quadratics of Beznosikov et al", A, np.zeros((3, 3)), np.ones(3))
  rate, rows = 0.01, []
  top = wire.top_k(1, 8)
  how: dict[str, Any] = {"exchange": "gather", "where": EVERYTHING}
  for name, tx in (
    ("no feedback", wire.compressed(top, "data", where=EVERYTHING)),
    ("error feedback", wire.error_feedback(top, "data", **how)),
    ("EF21", wire.ef21(top, "data", **how)),
    ("EControl", wire.econtrol(top, "data", **how)),
  ):
    gaps = course(problem, tx, rate, steps)
    rows.append(
      {
        "method": name,
        "rate": rate,
        "growth_of_x": float((gaps[-1] / gaps[0]) ** (0.5 / steps)),
        "predicted": 1 + 11 * rate / 6 if name == "no feedback" else None,
      }
    )
    show(f"  {rows[-1]}")
  return rows


def _network(seed: int, noise: float) -> tuple[Any, Callable[..., jax.Array]]:
  """First parameters of a network of two layers, and its loss on noisy outputs of another."""
  width, outputs = 32, 8
  keys = jax.random.split(jax.random.key(seed), 4)

  def draw(key: jax.Array, scale: float, *shape: int) -> jax.Array:
    return np.float32(scale / np.sqrt(shape[0])) * jax.random.normal(key, shape)

  def make(first: jax.Array, second: jax.Array, scale: float) -> Any:
    a, b = draw(first, scale, D, width), draw(second, scale, width, outputs)
    return {"a": a, "b": b, "c": jnp.zeros(width)}

  net = lambda p, x: jnp.tanh(x @ p["a"] + p["c"]) @ p["b"]
  teacher = make(keys[0], keys[1], 3.0)

  def loss(p: Any, key: jax.Array, count: int) -> jax.Array:
    x = jax.random.normal(key, (count, D))
    beside = jax.random.normal(jax.random.fold_in(key, 1), (count, outputs))
    return jnp.mean((net(p, x) - net(teacher, x) - np.float32(noise) * beside) ** 2)

  return make(keys[2], keys[3], 1.0), loss


def _classifier(seed: int) -> tuple[Any, Callable[..., jax.Array]]:
  """First parameters of a logistic regression, and its loss on labels that another draws."""
  wanted = np.float32(0.5) * jax.random.normal(jax.random.key(seed), (D,))

  def loss(w: jax.Array, key: jax.Array, count: int) -> jax.Array:
    x = jax.random.normal(key, (count, D))
    chance = jax.random.uniform(jax.random.fold_in(key, 1), (count,))
    sign = jnp.where(chance < jax.nn.sigmoid(x @ wanted), np.float32(1), np.float32(-1))
    return jnp.mean(jnp.logaddexp(np.float32(0), -sign * (x @ w)))

  return jnp.zeros(D), loss


# What is trained, from a seed: first parameters, and their loss on so many examples of a key.
MODELS: dict[str, Callable[[int], tuple[Any, Callable[..., jax.Array]]]] = {
  "logistic regression": _classifier,
  "network, noisy outputs": lambda seed: _network(seed, 1.0),
  "network": lambda seed: _network(seed, 0.1),
}


def _trained(tx: Any, model: str, seed: int, workers: int, steps: int) -> float:
  """A model's loss on new examples, after workers trained it on 32 each per step."""
  start, loss = MODELS[model](seed)

  def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
    params, state = carry
    keys = jax.random.split(key, workers)
    grads = jax.vmap(lambda key: jax.grad(loss)(params, key, 32))(keys)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), params)
    updates, state = jax.vmap(tx.update, axis_name="data")(grads, state, own)
    first = jax.tree.map(lambda u: u[0], updates)
    return (optax.apply_updates(params, first), state), None

  @jax.jit
  def run() -> jax.Array:
    state = jax.vmap(tx.init, axis_name="data", axis_size=workers, in_axes=None)(start)
    keys = jax.random.split(jax.random.key(1000 + seed), steps)
    (params, _), _ = jax.lax.scan(step, (start, state), keys)
    return loss(params, jax.random.key(2000 + seed), 8192)

  return float(run())


def one_bit_adam(
  workers: int = 4, steps: int = 800, seeds: tuple[int, ...] = (0, 1, 2), show: Any = print
) -> list[dict[str, Any]]:
  """Exact AdamW, 1-bit Adam and what makes it lose, and gradients of one bit.

  The paper asks for a variance that has settled within the warm-up. That of the regression has;
  that of the network goes on falling with its loss. How much of what is lost is the variance's part
  shows a momentum that is exact; the rest is the bit's.
  """
  warmup = steps // 4
  adam: dict[str, Any] = {"b2": 0.99}
  schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps, 1e-4)
  rest = (optax.add_decayed_weights(1e-2), optax.scale_by_learning_rate(schedule))
  mean = optax.stateless(lambda g, _: jax.lax.pmean(g, "data"))
  fed_back = wire.error_feedback(wire.sign(), "data", where=EVERYTHING)
  alone = wire.compressed(wire.sign(), "data", where=EVERYTHING)
  everything = lambda rows, bits: (rows,)
  exact = wire.Compressor("exact", D, everything, lambda payload, bits: payload[0], 4.0, delta=1.0)

  def one_bit(warmup: int, compressor: wire.Compressor) -> Any:
    how = adam | {"compressor": compressor, "where": EVERYTHING}
    return optax.chain(wire.scale_by_one_bit_adam("data", warmup, **how), *rest)

  txs = {
    "AdamW": optax.chain(mean, optax.scale_by_adam(**adam), *rest),
    "1-bit Adam": one_bit(warmup, wire.sign()),
    "1-bit Adam, momentum exact": one_bit(warmup, exact),
    "1-bit Adam, momentum in 4 bits": one_bit(warmup, wire.int4()),
    "1-bit Adam, warm-up of half the steps": one_bit(steps // 2, wire.sign()),
    "1-bit error feedback, AdamW": optax.chain(fed_back, optax.scale_by_adam(**adam), *rest),
    "1-bit gradients, no feedback, AdamW": optax.chain(alone, optax.scale_by_adam(**adam), *rest),
  }
  rows = []
  for name, tx in txs.items():
    for model in MODELS:
      losses = [_trained(tx, model, seed, workers, steps) for seed in seeds]
      facts = {"method": name, "workers": workers, "steps": steps}
      rows.append(facts | {"model": model, "losses": losses})
      show(f"  {rows[-1]}")
  return rows


def parts(small: bool = False) -> dict[str, Callable[[], list[dict[str, Any]]]]:
  """The parts of the study; `small` is few workers and steps."""
  few = (4,) if small else (4, 16, 64)
  return {
    "convergence": lambda: convergence(few),
    "means": lambda: means(16 if small else 64),
    "noisy": lambda: noisy(few, 4000 if small else 20_000),
    "divergence": divergence,
    "one_bit_adam": lambda: one_bit_adam(seeds=(0,) if small else (0, 1, 2)),
  }


LINEAR = ("exact", "EF21", "EF21-W", "EF21-BC", "EControl")


def failures(found: dict[str, Any]) -> list[str]:
  """What the papers say and was not found."""
  wrong = []
  for row in found["convergence"]:
    where = f"{row['method']} on {row['problem']}, {row['workers']} workers"
    differs = row["problem"] != "quadratic, homogeneous"
    if row["method"] in LINEAR and not (row["factor"] or 1) <= row["bound"]:
      wrong.append(f"{where}: {row['factor']} per step is above {row['bound']}")
    if row["method"] == "error feedback" and differs:
      if row["factor"] is not None:
        wrong.append(f"{where} does not stall")
      if not 3.5 < row["floor"] / row["floor_at_half"] < 4.5:
        wrong.append(f"{where}: half the step ends at {row['floor_at_half']}, not a quarter")
  for row in found["means"]:
    for mean in ("quadratic", "arithmetic"):
      if row[f"steps_{mean}"] > row[f"bound_{mean}"]:
        wrong.append(f"{row[f'steps_{mean}']} steps by the {mean} mean, above the theorem's")
  grown = [row["growth_of_x"] for row in found["divergence"]]
  adam, one_bit = (
    np.mean(row["losses"])
    for row in found["one_bit_adam"]
    if row["model"] == "logistic regression" and row["method"] in ("AdamW", "1-bit Adam")
  )
  if abs(one_bit / adam - 1) > 0.02:
    wrong.append(f"1-bit Adam ends at {one_bit}, AdamW at {adam}")
  if abs(grown[0] / found["divergence"][0]["predicted"] - 1) > 1e-6 or max(grown[1:]) >= 1:
    wrong.append(f"growth per step {grown}")
  return wrong


def table(found: dict[str, Any]) -> str:
  """Predicted beside measured, in Markdown."""
  lines = [
    "| problem | workers | γ | exact descent | EF21, EF21-W, EControl: predicted | EF21 | EF21-W"
    " | EF21-BC | EControl | error feedback ends at | at γ/2, predicted ¼ | no feedback |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  rows = found["convergence"]
  for problem, workers in dict.fromkeys((row["problem"], row["workers"]) for row in rows):
    own = [row for row in rows if (row["problem"], row["workers"]) == (problem, workers)]
    of = {row["method"]: row for row in own}
    factors = [f"{of[method]['factor']:.4f}" for method in LINEAR]
    feedback, none = of["error feedback"], of["no feedback"]
    ends, half = f"{feedback['floor']:.1e}", f"{feedback['floor_at_half'] / feedback['floor']:.2f}"
    if feedback["factor"] is not None:
      ends, half = f"linear, {feedback['factor']:.4f}", "–"
    lone = f"{none['floor']:.1e}" if none["factor"] is None else f"linear, {none['factor']:.4f}"
    cells = [problem, str(workers), f"{feedback['rate']:.3f}", factors[0]]
    cells += [f"≤ {of['EF21']['bound']:.4f}", *factors[1:], ends, half, lone]
    lines.append(f"| {' | '.join(cells)} |")

  lines += [
    "",
    "| largest worker's share of ΣL | L_QM / L_AM | EF21's first theorem: steps allowed | taken"
    " | EF21-W's theorem: steps allowed | taken |",
    "|---|---|---|---|---|---|",
  ]
  for row in found["means"]:
    ratio = row["quadratic_mean"] / row["arithmetic_mean"]
    lines.append(
      f"| {row['share']:.0%} | {ratio:.2f} | {row['bound_quadratic']:,.0f}"
      f" | {row['steps_quadratic']:,} | {row['bound_arithmetic']:,.0f}"
      f" | {row['steps_arithmetic']:,} |"
    )

  names = list(dict.fromkeys(row["method"] for row in found["noisy"]))
  lines += [
    "",
    f"| workers, noisy gradients | exact SGD, predicted | {' | '.join(names)} |",
    "|" + "---|" * (len(names) + 2),
  ]
  for workers in dict.fromkeys(row["workers"] for row in found["noisy"]):
    own = [row for row in found["noisy"] if row["workers"] == workers]
    floors = " | ".join(f"{row['floor']:.2e}" for row in own)
    lines.append(f"| {workers} | {own[0]['exact_sgd']:.2e} | {floors} |")

  lines += ["", "| three quadratics, top-1 | growth of x per step | predicted |", "|---|---|---|"]
  for row in found["divergence"]:
    wanted = "–" if row["predicted"] is None else f"{row['predicted']:.5f}"
    lines.append(f"| {row['method']} | {row['growth_of_x']:.5f} | {wanted} |")

  models = list(dict.fromkeys(row["model"] for row in found["one_bit_adam"]))
  lines += [
    "",
    f"| 4 workers: losses of three seeds | {' | '.join(models)} |",
    "|---|" + "---|" * len(models),
  ]
  for name in dict.fromkeys(row["method"] for row in found["one_bit_adam"]):
    reached = {
      row["model"]: row["losses"] for row in found["one_bit_adam"] if row["method"] == name
    }
    cells = [", ".join(f"{x:.4f}" for x in reached.get(model, [])) or "–" for model in models]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def run(out: pathlib.Path, small: bool = False, part: str = "all") -> list[str]:
  """Runs the study and writes theory.json and theory.md.

  Args:
    out: the folder to write to.
    small: whether a few workers are enough.
    part: of the study; the others stay what they are in theory.json.

  Returns:
    What does not hold.
  """
  path = out / "theory.json"
  found = json.loads(path.read_text()) if part != "all" and path.exists() else {}
  for name, make in parts(small).items():
    if part in ("all", name):
      found[name] = make()
  out.mkdir(parents=True, exist_ok=True)
  figures = found | report.describe_machine() | {"seed": 0}
  path.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
  (out / "theory.md").write_text(table(found))
  return failures(found)
