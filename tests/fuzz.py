"""Random compositions of Optax and eco_optax on random trees, held against Optax alone.

`python tests/fuzz.py --minutes=10` draws them until it is over and prints those that fail; `--seed`
runs one again. tests/test_fuzz.py runs the first few.

The same stock optimizer moves float32 parameters by the same gradients. Weights that are trained
without master weights trail behind those by what their momentum still owes, a few steps of their
grid; frozen leaves stay as they are, and float leaves go the same way. Or an error names a leaf and
says what to do.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle

import eco_optax as eco
from eco_optax import trees
from eco_optax.quantized_array import is_quantized

STEPS = 48
DECAY = 0.5  # Of all momenta: what is owed is soon paid.
RATE = 4e-3

FORMATS = {
  "FP8": eco.FP8,
  "FP8_E5M2": eco.FP8_E5M2,
  "INT8": eco.INT8,
  "INT4": eco.INT4,
  "MXFP8": eco.MXFP8,
  "MXFP4": eco.MXFP4,
  "NVFP4": eco.NVFP4,
  "rows": eco.Format("float8_e4m3fn", contraction_axis=-1),
}
NAMES = ("kernel", "bias", "mu", "nu", "count", "step", "trace", "w", "0", "error", "inner")
SHAPES = ((32, 8), (3, 32, 8), (64, 4), (2, 3, 32, 4))
VECTORS = ((8,), (), (0, 4), (5,))
# Share of its way that a weight may go too far where the second moment is kept in FP8, as four
# standard deviations. With b2 = 0.999 the moment v of step k should grow by v / k, which is below
# FP8's spacing of about v / 12, so that it grows by a whole spacing now and then: after K steps its
# variance is v² / 24, that of its root a quarter.
FP8_SPREAD = 4 * (1 / 24) ** 0.5 / 2


class Case(NamedTuple):
  """One draw."""

  seed: int
  params: Any
  frozen: tuple[str, ...]  # Paths.
  parts: tuple[str, ...]  # What was composed, for people.
  make: Callable[[], optax.GradientTransformation]  # Ours, on packed parameters.
  stock: Callable[[], optax.GradientTransformation]  # The same of Optax alone, on float32.
  must_work: bool  # Whether an error is a fault.
  slack: float  # Steps of the grid by which weights may trail.
  spread: float  # Share of its way by which a weight may go too far or not far enough.


def schedule(count: Any) -> Any:
  """A warm-up, and a decay to a tenth."""
  rate = optax.warmup_cosine_decay_schedule(RATE / 10, RATE, 8, STEPS + 16, RATE / 10)
  return rate(count)


# Optimizers by name, from a rate; under the rule they are right or refused.
SUPPORTED = {
  "adam": lambda rate: optax.adam(rate, b1=DECAY),
  "adamw": lambda rate: optax.adamw(rate, b1=DECAY, weight_decay=0.01),
  "nadam": lambda rate: optax.nadam(rate, b1=DECAY),
  "amsgrad": lambda rate: optax.amsgrad(rate, b1=DECAY),
  "sgd": lambda rate: optax.sgd(rate, momentum=DECAY),
  "nesterov": lambda rate: optax.sgd(rate, momentum=DECAY, nesterov=True),
}
OTHERS = {
  "lion": lambda rate: optax.lion(rate, b1=DECAY, b2=DECAY),
  "lamb": lambda rate: optax.lamb(rate, b1=DECAY),
  "adabelief": lambda rate: optax.adabelief(rate, b1=DECAY),
  "novograd": lambda rate: optax.novograd(rate, b1=DECAY),
  "plain sgd": lambda rate: optax.sgd(rate),
  "rmsprop": lambda rate: optax.rmsprop(rate, momentum=DECAY),
  "adagrad": lambda rate: optax.adagrad(rate),
  "yogi": lambda rate: optax.yogi(rate, b1=DECAY),
  "lars": lambda rate: optax.lars(rate, momentum=DECAY),
}
# Links before and after the optimizer, under the rule.
BEFORE = {
  "clip_by_global_norm": lambda: optax.clip_by_global_norm(3.0),
  "clip": lambda: optax.clip(0.5),
  "zero_nans": lambda: optax.zero_nans(),
}
AFTER = {
  "reduce_on_plateau": lambda: optax.contrib.reduce_on_plateau(patience=10**6),
  "scale": lambda: optax.scale(0.5),
}
AFTER_UNSURE = {
  "clip_by_global_norm after": lambda: optax.clip_by_global_norm(1e-3),
  "clip after": lambda: optax.clip(RATE / 2),
  "scale_by_schedule": lambda: optax.scale_by_schedule(lambda count: 1 / (1 + 0.01 * count)),
}
# Links behind packed updates: those that only skip are right, arithmetic is refused.
BEHIND_UNSURE = {
  "scale behind": lambda: optax.scale(0.5),
  "clip behind": lambda: optax.clip(1e-3),
  "trace behind": lambda: optax.trace(0.5),
  "scale_by_schedule behind": lambda: optax.scale_by_schedule(lambda count: 0.5),
  "add_decayed_weights behind": lambda: optax.add_decayed_weights(0.01),
}


def draw_tree(rng: np.random.Generator) -> tuple[Any, list[str]]:
  """Float32 parameters in dicts, lists and tuples; paths of those that will be packed."""
  size, made = int(rng.integers(1, 4)), 0

  def leaf() -> jax.Array:
    shapes = SHAPES if made == 0 or rng.uniform() < 0.6 else VECTORS
    shape = shapes[rng.integers(len(shapes))]
    spread = 10.0 ** rng.choice([-1, 0, 0])
    return jnp.asarray(spread * rng.standard_normal(shape), jnp.float32)

  def node(depth: int) -> Any:
    nonlocal made
    if depth == 0 or rng.uniform() < 0.5:
      x = leaf()
      made += 1
      return x
    children = [node(depth - 1) for _ in range(int(rng.integers(1, 3)))]
    kind = rng.choice(["dict", "dict", "list", "tuple"])
    if kind == "dict":
      names = rng.permutation(NAMES)[: len(children)]
      return dict(zip(map(str, names), children, strict=True))
    return children if kind == "list" else tuple(children)

  names = rng.permutation(NAMES)[:size]
  tree = {str(name): node(2) for name in names}
  paths: list[str] = []
  trees.map_with_path(lambda path, x: paths.append(path) if x.ndim >= 2 and x.size else None, tree)
  packed = [path for path in paths if rng.uniform() < 0.8] or paths[:1]
  return tree, packed


def draw(seed: int) -> Case:
  """The case of a seed."""
  rng = np.random.default_rng(seed)
  pick = lambda options: str(rng.choice(sorted(options)))
  tree, packed = draw_tree(rng)
  formats = {path: FORMATS[pick(FORMATS)] for path in packed}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of formats that take more bytes than floats.
    first = str(np.random.default_rng((seed, 1)).choice(["nearest", "stochastic"]))
    store = lambda path, x: eco.quantize(x, formats[path], rounding=first, key=seed)
    params = trees.map_with_path(lambda path, x: store(path, x) if path in packed else x, tree)
  frozen = tuple(path for path in packed[1:] if rng.uniform() < 0.4)
  is_frozen = lambda: trees.map_with_path(lambda path, x: path in frozen, tree)

  must_work, slack, spread = True, 2 + 1 / (1 - DECAY), 0.05
  parts = [",".join(map(repr, formats.values())), f"stored {first}"]
  kind = rng.choice(["rule", "rule", "master", "fused"])
  aware = bool(rng.uniform() < 0.7)
  rate = schedule if aware and rng.uniform() < 0.7 else RATE
  rounding = str(rng.choice(["nearest", "stochastic"]))
  quantizer = lambda: eco.quantize_params(rounding=rounding, seed=seed)
  links: list[Callable[[], Any]] = []

  if kind == "fused":
    name = str(rng.choice(["adamw", "sgd"]))
    max_norm = 3.0 if rng.uniform() < 0.3 else None
    if name == "adamw":
      own = lambda: eco.adamw(
        rate, b1=DECAY, weight_decay=0.01, max_norm=max_norm, rounding=rounding, seed=seed
      )
      links = [lambda: SUPPORTED["adamw"](rate)]
    else:
      own = lambda: eco.sgd(rate, momentum=DECAY, max_norm=max_norm, rounding=rounding, seed=seed)
      links = [lambda: SUPPORTED["sgd"](rate)]
    if max_norm:
      links.insert(0, lambda: optax.clip_by_global_norm(max_norm))
    parts += [f"eco.{name}", f"max_norm={max_norm}"]
  else:
    if rng.uniform() < 0.3:
      name = pick(BEFORE)
      links.append(BEFORE[name])
      parts.append(name)
    name = pick(OTHERS) if rng.uniform() < 0.35 else pick(SUPPORTED)
    chosen = (SUPPORTED | OTHERS)[name]
    links.append(lambda: chosen(rate))
    must_work = name in SUPPORTED or kind == "master"
    parts.append(name)
    if rng.uniform() < 0.4:
      after = AFTER if rng.uniform() < 0.6 else AFTER_UNSURE
      extra = pick(after)
      links.append(after[extra])
      parts.append(extra)
      must_work &= after is AFTER or kind == "master"
    if frozen and rng.uniform() < 0.5:
      links.append(lambda: optax.masked(optax.set_to_zero(), is_frozen()))
      parts.append("masked inside")
      frozen_inside = True
    else:
      frozen_inside = False
    inner = lambda: optax.chain(*[link() for link in links])
    if rng.uniform() < 0.15:
      finite = inner
      inner = lambda: optax.apply_if_finite(finite(), 5)
      parts.append("apply_if_finite")
    if kind == "rule":
      keep = bool(rng.uniform() < 0.2)
      # The rule is told the schedule, or the rate is constant.
      told = rate if aware else None
      own = lambda: eco.error_feedback_to_momentum(inner(), quantizer(), told, keep)
      parts.append(f"rule aware={aware} keep={keep}")
    else:
      residual = str(rng.choice(["float32", "bfloat16", "int16", "int12", "int8"]))
      own = lambda: eco.master_weights(inner(), quantizer(), residual)
      parts.append(f"master {residual}")
  if kind == "fused":
    frozen_inside = False

  wrapped = own
  behind: list[Callable[[], Any]] = []
  mask = lambda: optax.masked(optax.set_to_zero(), is_frozen())
  masked_within = bool(frozen and not frozen_inside and rng.uniform() < 0.5)
  if masked_within:
    wrapped = lambda: optax.chain(own(), mask())
    behind.append(mask)  # Of the stock optimizer.
    parts.append("masked within")
  if rng.uniform() < 0.3:
    dtypes = [str(rng.choice(["bfloat16", "float8_e4m3fn", "float32"])) for _ in range(2)]
    before = wrapped
    wrapped = lambda: eco.low_bit_moments(before(), *dtypes)
    parts.append(f"low_bit_moments {dtypes}")
    slack += 2
    spread = FP8_SPREAD if dtypes[1] == "float8_e4m3fn" else spread
    must_work &= "plain sgd" not in parts and dtypes != ["float32"] * 2
  if rng.uniform() < 0.3:
    by_layer = wrapped
    wrapped = lambda: eco.layer_by_layer(by_layer())
    parts.append("layer_by_layer")
    # These couple a stack's layers, or keep one number for all of them.
    coupling = {"clip_by_global_norm", "max_norm=3.0", "lamb", "novograd", "lars", "zero_nans"}
    must_work &= not coupling & set(parts)
    must_work &= "clip_by_global_norm after" not in parts
  if frozen and not frozen_inside and not masked_within:
    behind.append(mask)
    parts.append("masked behind")
  if rng.uniform() < 0.15:
    name = pick(BEHIND_UNSURE)
    behind.append(BEHIND_UNSURE[name])
    parts.append(name)
    must_work = False
  return Case(
    seed,
    params,
    frozen,
    (*parts, rounding, f"frozen={frozen}"),
    lambda: optax.chain(wrapped(), *[link() for link in behind[masked_within:]]),
    lambda: optax.chain(*[link() for link in (*links, *behind)]),
    must_work,
    slack,
    spread,
  )


def gradients(params: Any, seed: int, count: Any) -> Any:
  """Of no loss: each element has its own sign, and a magnitude that varies from step to step."""
  key = jax.random.key(seed)

  def gradient(path: str, x: Any) -> jax.Array:
    own = jax.random.fold_in(key, sum(map(ord, path)) + len(path))
    usual = jax.random.normal(own, x.shape)
    usual = jnp.sign(usual) * (0.2 + jnp.abs(usual))
    return usual * (1 + 0.2 * jax.random.normal(jax.random.fold_in(own, count), x.shape))

  return trees.map_with_path(gradient, params)


def train(tx: optax.GradientTransformation, params: Any, seed: int, apply: Any) -> tuple[Any, Any]:
  """Parameters and state after `STEPS` steps of any transformation."""
  tx = optax.with_extra_args_support(tx)
  state = tx.init(params)

  def step(count: Any, carried: Any) -> Any:
    params, state = carried
    grads = gradients(eco.dequantize(params), seed, count)
    updates, state = tx.update(grads, state, params, value=jnp.float32(1))
    return apply(params, updates), state

  return jax.jit(lambda carried: jax.lax.fori_loop(0, STEPS, step, carried))((params, state))


def grid_step(leaf: Any) -> np.ndarray:
  """The larger spacing beside each stored weight, float64."""
  table = np.unique(np.asarray(oracle.TABLES[leaf.format.dtype.name], np.float64))
  table = table[np.isfinite(table)]
  codes = np.abs(np.asarray(leaf.codes.astype(jnp.float32), np.float64))
  at = np.clip(np.searchsorted(table, codes), 1, len(table) - 2)
  spacing = np.maximum(table[at + 1] - table[at], table[at] - table[at - 1])
  return spacing * np.asarray(
    leaf.dequantize(jnp.float32) * 0 + leaf.apply_scale(jnp.ones(leaf.shape))
  )


def is_clear(error: BaseException, params: Any) -> bool:
  """Whether an error names a leaf, or what of the optimizer is wrong, and a remedy."""
  text = str(error)
  if "the optimizer keeps no moments in its " in text:
    return isinstance(error, ValueError) and "use it without" in text
  # JAX compares updates and parameters by their types, and names the update's.
  names_leaf = (
    "leaf '" in text or "state '" in text or ("at key path" in text and "call eco_optax" in text)
  )
  return isinstance(error, (ValueError, TypeError)) and names_leaf and len(text) > 60


def fault(case: Case) -> str | None:
  """What is wrong with a case, if anything is."""
  start = eco.dequantize(case.params)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    wanted = train(case.stock(), start, case.seed, optax.apply_updates)[0]
    try:
      found, _ = train(case.make(), case.params, case.seed, eco.apply_updates)
    except Exception as error:
      if case.must_work:
        return "refused, and should be right: " + traceback.format_exc(limit=-3)
      return None if is_clear(error, case.params) else f"unclear: {traceback.format_exc(limit=-3)}"
  faults: list[str] = []

  def compare(path: str, old: Any, new: Any, want: jax.Array) -> None:
    if path in case.frozen:
      # A code of −0 may become 0.
      if not np.array_equal(*(np.asarray(x.dequantize()) for x in (old, new))):
        faults.append(f"{path}: frozen, and moved")
      return
    want64 = np.asarray(want, np.float64)
    dense = lambda x: np.asarray(x.dequantize() if is_quantized(x) else x, np.float64)
    value, moved = dense(new), np.abs(want64 - dense(old))
    if not is_quantized(new):
      near = STEPS * RATE / 8 + 1e-2 * np.abs(want64) + case.spread * moved
      if not np.all(np.abs(value - want64) <= near):
        faults.append(f"{path}: a float leaf goes another way")
      return
    limit = case.slack * np.maximum(grid_step(old), grid_step(new)) + case.spread * moved + 1e-6
    off = np.abs(value - want64) / limit
    if not np.all(off <= 1):
      faults.append(
        f"{path} in {new.format}: off by {off.max():.1f} of the limit, {np.mean(off > 1):.0%} of"
        f" weights beyond it; mean way {np.mean(moved):.4f}"
      )

  trees.map_with_path(compare, case.params, found, wanted, is_leaf=is_quantized)
  return "; ".join(faults) or None


def foreign_state(seed: int) -> str | None:
  """What is wrong where an optimizer is given the state of another, if anything is."""
  case, other = draw(seed), draw(seed + 1)
  params = case.params
  try:
    state = jax.eval_shape(case.make().init, params)
    given = jax.eval_shape(other.make().init, params)
  except (ValueError, TypeError):
    return None  # One of them does not take these parameters.
  describe = lambda tree: (
    jax.tree.structure(tree),
    [(x.shape, x.dtype) for x in jax.tree.leaves(tree)],
  )
  if describe(state) == describe(given):
    return None
  update = optax.with_extra_args_support(case.make()).update
  grads = jax.eval_shape(eco.dequantize, params)
  try:
    jax.eval_shape(lambda g, s, p: update(g, s, p, value=jnp.float32(1)), grads, given, params)
  except (ValueError, TypeError):
    return None
  except Exception:
    return "unclear: " + traceback.format_exc(limit=-3)
  return f"accepts the state of {other.parts}"


def report(seed: int) -> int:
  """Prints what is wrong with the cases of a seed; how many faults there are."""
  case = draw(seed)
  messages = [message for message in (fault(case), foreign_state(seed)) if message]
  for message in messages:
    print(f"seed {seed}: {case.parts}\n  {message}", flush=True)
  return len(messages)


def main() -> None:
  """Draws cases for as long as asked."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--seed", type=int, help="run one case again")
  parser.add_argument("--first", type=int, default=0, help="the first seed")
  args = parser.parse_args()
  end, seed, failed = time.monotonic() + 60 * args.minutes, args.first, 0
  while time.monotonic() < end:
    failed += report(seed if args.seed is None else args.seed)
    if args.seed is not None:
      sys.exit(failed > 0)
    seed += 1
    if seed % 20 == 0:
      jax.clear_caches()
  print(f"{seed - args.first} cases, {failed} faults")
  sys.exit(failed > 0)


if __name__ == "__main__":
  main()
