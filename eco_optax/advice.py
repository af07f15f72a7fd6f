r"""What a format and a rounding are expected to cost a run, from a few of its own steps.

Of each weight there are the spacing Δ of the format's grid, its updates u, its gradients g and
their running mean m, and so what rounding does to it:

- Nearest without feedback loses every update below Δ / 2.
- Nearest with master weights or a residual waits Δ / (2 |ū|) steps before a weight moves, where ū
  is the mean update; with ECO 1 / (1 − β) times as long, because one number is momentum and debt.
  Of a run of T steps, a weight that waits for s loses s / T.
- What rounding the weights costs is measured: by the curvature of the loss along the error e of
  rounding, (f(θ + e) + f(θ − e)) / 2 − f(θ). There master weights and ECO settle.
- Stochastic rounding adds noise of variance Δ |u| in each step. Without feedback the noise adds up
  until the loss pulls it back, at an excess of (1/4) Σ Δ E|m| (docs/theory.md, "A real grid"), once
  the noise of so many steps adds up to this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import formats as formats_lib
from eco_optax import rounding as rounding_lib
from eco_optax.formats import FP8, INT4, INT8, NVFP4, Format
from eco_optax.quantized_array import (
  QuantizedArray,
  Where,
  default_where,
  dequantize,
  is_quantized,
  quantize,
)
from eco_optax.transforms.error_feedback import ErrorFeedbackState
from eco_optax.transforms.momentum import flat

# A run that loses a tenth of its progress ends where it would have been a tenth earlier.
_PROGRESS = 0.1
_DRAWS = 2  # Of stochastic rounding, whose costs are averaged.


class Verdict(NamedTuple):
  """What one way to train in one format is expected to cost."""

  format: Format
  way: str  # A key of `CODE`.
  bytes_per_weight: float  # Codes, scales and residual, without moments.
  loss: float  # Expected to be added to the loss by rounding's noise.
  progress: float  # Expected share of the run's progress that is lost to updates too small.
  is_safe: bool

  def __str__(self) -> str:
    """One line of words."""
    said = "safe" if self.is_safe else "not safe"
    return f"{self.way}: {said}, loss {self.loss:+.4f}, progress lost {self.progress:.0%}"


class Grid(NamedTuple):
  """How a run's updates stand to a format's grid."""

  format: Format
  bytes_per_weight: float  # Of codes and scales.
  update: float  # The geometric mean over weights of an update's size, in steps of the grid.
  dead: float  # Share of weights whose updates are below half a step of the grid.
  noise: float  # Variance of stochastic rounding beside that of updates, in one step.
  nearest: float  # Loss that the error of rounding to nearest adds, by the loss's curvature.
  stochastic: float  # The same with stochastic rounding.
  verdicts: tuple[Verdict, ...]

  def __str__(self) -> str:
    """A few lines of words."""
    head = (
      f"{_name(self.format)}, {self.bytes_per_weight:.2f} bytes per weight: updates are"
      f" {self.update:.3g} of a step of the grid, {self.dead:.0%} of them below a half; the noise"
      f" of stochastic rounding is {self.noise:.2g} times that of the updates; rounding the weights"
      f" adds {self.nearest:+.4f} to the loss, stochastically {self.stochastic:+.4f}"
    )
    return "\n".join([head, *(f"  {verdict}" for verdict in self.verdicts)])


class Advice(NamedTuple):
  """What `advise` found; `print` shows it in words."""

  grids: tuple[Grid, ...]
  best: Verdict | None  # The safe one of the fewest bytes; None if none is.
  steps: int  # Of the run.

  def __str__(self) -> str:
    """Words."""
    if self.best is None:
      last = "No way is safe here: keep weights in float32, or allow a larger tolerance."
    else:
      name = f"{_name(self.best.format)} with {self.best.way} rounding"
      last = f"Take {name.replace(',', ' and')}: {CODE[self.best.way]}"
    return "\n".join([f"In a run of {self.steps} steps:", *map(str, self.grids), last])


_TX = {
  "ECO": "eco.error_feedback_to_momentum(tx, {quantizer}, learning_rate=rate)",
  "no feedback": "eco.chain(tx, {quantizer})",
  "int8 residual": 'eco.master_weights(tx, {quantizer}, "int8")',
}
# What to write, by way; in the order of preference where bytes are the same.
CODE = {
  f"{how}, {rounding}": _TX[how].format(quantizer=f'eco.quantize_params(rounding="{rounding}")')
  for how, rounding in (
    ("ECO", "stochastic"),
    ("ECO", "nearest"),
    ("no feedback", "stochastic"),
    ("no feedback", "nearest"),
    ("int8 residual", "nearest"),
  )
}
_ORDER = tuple(CODE)


def _name(format: Format) -> str:
  """The name of a preset, or else the format as code."""
  presets = {x: name for name, x in vars(formats_lib).items() if isinstance(x, Format)}
  return presets.get(format, str(format))


class _Seen(NamedTuple):
  """Sums over steps: float32 arrays by path of a weight to quantize, or those of one weight."""

  update: Any
  magnitude: Any  # Of updates.
  square: Any  # Of updates.
  gradient: Any
  momentum: Any  # The running mean of gradients, times 1 / (1 − b1).
  momentum_magnitude: Any  # Of the running mean itself, without its bias.


class _Sums(NamedTuple):
  """Sums over weights."""

  log_update: Any  # float32 scalars of a leaf, or floats of all.
  dead: Any
  noise: Any
  variance: Any
  work: Any
  lost: Any  # Of work, by updates below half a step.
  waiting: Any  # Of work, by weights that wait with a residual.
  waiting_longer: Any  # The same with ECO.
  settled: Any  # Σ Δ |m| / 4.
  spread: Any  # Σ Δ |u|, which a step adds to the variance.
  rounded: Any  # Σ Δ² / 6, the variance of rounding once.


def _of_leaf(weight: QuantizedArray, seen: _Seen, count: int, steps: int, b1: float) -> _Sums:
  """What rounding does to a leaf."""
  step = rounding_lib.grid_step(weight.codes.astype(jnp.float32), weight.format.dtype)
  spacing = jnp.maximum(weight.apply_scale(step), np.finfo(np.float32).tiny)
  size, drift, gradient = (jnp.abs(x) / count for x in (seen.magnitude, seen.update, seen.gradient))
  work = drift * gradient
  waits = spacing / (2 * jnp.maximum(drift, np.finfo(np.float32).tiny) * steps)
  variance = seen.square / count - jnp.square(seen.update / count)
  return _Sums(
    log_update=jnp.sum(jnp.log(jnp.maximum(size / spacing, 1e-12))),
    dead=jnp.sum(size < spacing / 2),
    noise=jnp.sum(jnp.minimum(size, spacing) * spacing),
    variance=jnp.sum(variance),
    work=jnp.sum(work),
    lost=jnp.sum(jnp.where(size < spacing / 2, work, 0)),
    waiting=jnp.sum(work * jnp.minimum(waits, 1)),
    waiting_longer=jnp.sum(work * jnp.minimum(waits / (1 - b1), 1)),
    settled=jnp.sum(spacing * seen.momentum_magnitude) / (4 * count),
    spread=jnp.sum(spacing * size),
    rounded=jnp.sum(jnp.square(spacing)) / 6,
  )


def _check_state(tx: optax.GradientTransformation, params: Any, opt_state: Any) -> Any:
  """The optimizer's state, of `tx` on float weights."""
  if opt_state is None:
    return tx.init(params)
  if isinstance(opt_state, ErrorFeedbackState):
    opt_state = opt_state.inner
  wanted: Any = jax.tree.structure(jax.eval_shape(tx.init, params))
  given: Any = jax.tree.structure(opt_state)
  if wanted != given:
    raise ValueError(
      "opt_state is not of tx, the optimizer on float weights: pass what tx.init(params) makes, the"
      f" state of eco.error_feedback_to_momentum(tx, …), or None. It has the structure {given}, and"
      f" not {wanted}"
    )
  return opt_state


def advise(
  loss_fn: Callable[..., Any],
  params: Any,
  tx: optax.GradientTransformation,
  batches: Sequence[Any],
  formats: Sequence[Format] = (FP8, INT8, INT4, NVFP4),
  *,
  steps: int,
  where: Where | None = None,
  opt_state: Any = None,
  b1: float = 0.9,
  tolerance: float = 0.01,
  has_aux: bool = False,
) -> Advice:
  """Says which format and rounding are safe for a run, from a few of its own steps.

  It takes one step on each batch with float weights, and holds the updates against each format's
  grid. Call it in the middle of a run, with the state of its optimizer: the first steps of Adam are
  many times as long as later ones.

  Args:
    loss_fn: (params, batch) → scalar loss, with an auxiliary value if `has_aux`.
    params: a tree of float arrays, or one in which those to quantize are packed.
    tx: the stock optimizer, such as `optax.adamw(1e-4)`; its rate is the one that is judged.
    batches: at least 8, all of one shape; more tell drift from noise better.
    formats: to judge.
    steps: of the whole run, or of its part that is judged.
    where: as in `eco.quantize`; None takes the packed leaves, or if there are none those that
      `eco.quantize` would.
    opt_state: of `tx`, or of ECO over it; None starts anew.
    b1: decay of the optimizer's momentum.
    tolerance: loss that may be added, in the units of `loss_fn`.
    has_aux: whether `loss_fn` returns more.

  Returns:
    An `Advice`: what was seen by format, a verdict on each way to round, and the best of them.

  Raises:
    ValueError: if there are fewer than 8 batches, nothing is to be quantized, the state is not of
      `tx`, or a loss is not finite.

  Example:
    >>> import jax, jax.numpy as jnp, optax, eco_optax as eco
    >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    >>> loss_fn = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
    >>> batches = list(jax.random.normal(jax.random.key(1), (8, 16, 64)))
    >>> advise = eco.diagnostics.advise
    >>> advice = advise(loss_fn, params, optax.adam(1e-5), batches, steps=100, tolerance=0.1)
    >>> [verdict.way for verdict in advice.grids[0].verdicts if not verdict.is_safe]
    ['ECO, nearest', 'no feedback, nearest', 'int8 residual, nearest']

  References:
    docs/theory.md, "A real grid"; Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026.
  """
  if len(batches) < 8:
    raise ValueError(
      f"advise takes at least 8 batches to tell drift from noise, got {len(batches)}"
    )
  if not 0 <= b1 < 1:
    raise ValueError(f"b1 must be in [0, 1), got {b1}")
  chosen = _chosen(params, where)
  params = dequantize(params)
  opt_state = _check_state(tx, params, opt_state)
  loss_of = (lambda *args: loss_fn(*args)[0]) if has_aux else loss_fn
  own = lambda tree: {
    path: leaf.astype(jnp.float32) for path, leaf in flat(tree).items() if path in chosen
  }

  @jax.jit
  def step(params: Any, opt_state: Any, seen: _Seen, number: jax.Array, batch: Any) -> Any:
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    updates, opt_state = tx.update(gradients, opt_state, params)
    u, g = own(updates), own(gradients)
    add = lambda fn, total, *trees: jax.tree.map(lambda total, *x: total + fn(*x), total, *trees)
    momentum = jax.tree.map(lambda m, g: b1 * m + g, seen.momentum, g)
    unbiased = (1 - b1) / (1 - b1 ** (number + 1))
    seen = _Seen(
      add(lambda u: u, seen.update, u),
      add(jnp.abs, seen.magnitude, u),
      add(jnp.square, seen.square, u),
      add(lambda g: g, seen.gradient, g),
      momentum,
      add(lambda m: jnp.abs(m) * unbiased, seen.momentum_magnitude, momentum),
    )
    return loss, optax.apply_updates(params, updates), opt_state, seen

  zeros = lambda: jax.tree.map(jnp.zeros_like, own(params))
  seen, losses = _Seen(*(zeros() for _ in _Seen._fields)), []
  for number, batch in enumerate(batches):
    loss, params, opt_state, seen = step(params, opt_state, seen, jnp.float32(number), batch)
    losses.append(float(loss))
  if not np.all(np.isfinite(losses)):
    raise ValueError(f"the loss is not finite: {losses}; advise needs steps that train")

  evaluate = jax.jit(loss_of)
  mean_loss = lambda params: float(np.mean([evaluate(params, batch) for batch in batches]))
  at_rest = mean_loss(params)

  def cost(packed: Any) -> float:
    """Of an error of rounding: half of its product with the Hessian."""
    rounded = dequantize(packed)
    mirrored = jax.tree.map(lambda x, q: (2 * x - q).astype(x.dtype), params, rounded)
    return (mean_loss(rounded) + mean_loss(mirrored)) / 2 - at_rest

  def is_chosen(path: str, leaf: Any) -> bool:
    del leaf
    return path in chosen

  of_leaf = jax.jit(lambda weight, seen: _of_leaf(weight, seen, len(batches), steps, b1))
  grids = []
  for format in formats:
    packed = quantize(params, format, is_chosen)
    drawn = [quantize(params, format, is_chosen, "stochastic", key) for key in range(_DRAWS)]
    costs = cost(packed), float(np.mean([cost(x) for x in drawn]))
    weights = {path: leaf for path, leaf in flat(packed).items() if path in chosen}
    parts = [of_leaf(w, _Seen(*(x[path] for x in seen))) for path, w in weights.items()]
    total = _Sums(*(float(np.sum(x)) for x in zip(*parts, strict=True)))
    grids.append(_grid(format, weights, total, steps, costs, tolerance))
  safe = [verdict for grid in grids for verdict in grid.verdicts if verdict.is_safe]
  order = lambda verdict: (verdict.bytes_per_weight, _ORDER.index(verdict.way))
  return Advice(tuple(grids), min(safe, key=order, default=None), steps)


def _chosen(params: Any, where: Where | None) -> frozenset[str]:
  """Paths of the leaves to quantize."""
  leaves = {path: leaf for path, leaf in flat(params).items() if hasattr(leaf, "ndim")}
  if where is None and any(map(is_quantized, leaves.values())):
    where = lambda path, leaf: is_quantized(leaf)
  found = frozenset(path for path, x in leaves.items() if (where or default_where)(path, x))
  if not found:
    raise ValueError(f"no leaf is to be quantized, of {sorted(leaves)}: change where=")
  return found


def _grid(
  format: Format,
  weights: dict[str, Any],
  total: _Sums,
  steps: int,
  costs: Sequence[float],
  tolerance: float,
) -> Grid:
  """The verdicts on a format."""
  count = sum(weight.size for weight in weights.values())
  stored = sum(weight.nbytes for weight in weights.values()) / count
  nearest, stochastic = costs
  share = lambda x: x / total.work if total.work > 0 else 0.0
  # A step's noise costs so much, as a part of what rounding once does.
  per_step = max(stochastic, 0.0) * total.spread / max(total.rounded, 1e-30)
  is_left = math.exp(-steps * per_step / total.settled) if total.settled > 0 else 1.0
  expected = {
    "ECO, stochastic": (stochastic, 0.0),
    "ECO, nearest": (nearest, share(total.waiting_longer)),
    "no feedback, stochastic": (total.settled + (nearest - total.settled) * is_left, 0.0),
    "no feedback, nearest": (nearest, share(total.lost)),
    "int8 residual, nearest": (nearest, share(total.waiting)),
  }
  verdicts = []
  for way, (loss, progress) in expected.items():
    own = stored + ("residual" in way)
    is_safe = loss <= tolerance and progress <= _PROGRESS
    verdicts.append(Verdict(format, way, own, loss, progress, is_safe))
  return Grid(
    format,
    stored,
    update=float(np.exp(total.log_update / count)),
    dead=total.dead / count,
    noise=total.noise / max(total.variance, 1e-30),
    nearest=nearest,
    stochastic=stochastic,
    verdicts=tuple(verdicts),
  )
