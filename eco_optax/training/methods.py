"""The methods that are compared, in one registry, and the optimizer that each one makes.

A method is a value. Configs name one by `config.method` and the keys beside it, studies and the
benchmark by its label; nothing else knows what a name means. Optimizers are expressions of the
library's public names, with two exceptions: `until`, which makes a quantizer out of two, and
`_behind_identity` take `PackedTransformation`, and `with_master` fills the residual of a
`MasterWeightsState`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib
from jax.sharding import Mesh

import eco_optax as eco
from eco_optax import trees
from eco_optax.training.models import transformer
from eco_optax.transforms.master_weights import MasterWeightsState
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  run,
  scale_gradients,
  unless_skipped,
)

Rounding = Literal["nearest", "stochastic"]

# Where a method keeps what rounding loses: it rounds no weights, keeps it in master weights, drops
# it, or adds it to the momentum.
FLOAT, MASTER_WEIGHTS, NAIVE, ECO = "float", "master weights", "naive", "ECO"


class Moments(NamedTuple):
  """Dtypes that an optimizer's moments are stored in, see `eco.low_bit_moments`."""

  mu: str = "float32"
  nu: str = "float32"


FLOAT32_MOMENTS, FP8_MOMENTS = Moments(), Moments("float8_e4m3fn", "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train; the fields below `rounding` are the keys of a config that go with its name."""

  label: str  # In tables and in results, where its runs are found by it.
  name: str  # In `config.method`.
  family: str  # FLOAT, MASTER_WEIGHTS, NAIVE or ECO.
  rounding: Rounding | None = None  # None: its weights stay in float32.
  schedule_aware: bool = True  # Of ECO; False is the paper's rule.
  residual: str = "float32"  # Of master weights.
  moments: Moments = FLOAT32_MOMENTS
  stochastic_after: float = 1.0  # Share of the steps after which it rounds stochastically.
  short: str = ""  # Its label in tables where every rule follows the schedule; "" is `label`.

  def __post_init__(self) -> None:
    """Fills in the short label."""
    object.__setattr__(self, "short", self.short or self.label)

  @property
  def stores_float32(self) -> bool:
    """Whether its residual and moments are float32."""
    return self.residual == "float32" and self.moments == FLOAT32_MOMENTS

  @property
  def changes(self) -> dict[str, Any]:
    """The keys that make a config of default values train with this method."""
    usual, changes = Method("", self.name, self.family), {"method": self.name}
    for key in ("schedule_aware", "residual", "stochastic_after"):
      if getattr(self, key) != getattr(usual, key):
        changes[key] = getattr(self, key)
    for name, dtype in self.moments._asdict().items():
      if dtype != getattr(usual.moments, name):
        changes[f"moments.{name}"] = dtype
    return changes

  def but(self, label: str, **fields: Any) -> Method:
    """The same with another label and other fields."""
    return dataclasses.replace(self, label=label, short="", **fields)


def _registry() -> list[Method]:
  """All methods, in the order of tables and colours."""
  master, eco_nearest, eco_stochastic = (
    Method("master weights + RTN", "mw_rtn", MASTER_WEIGHTS, "nearest"),
    Method("ECO + RTN, schedule-aware", "eco_rtn", ECO, "nearest", short="ECO + RTN"),
    Method("ECO + SR, schedule-aware", "eco_sr", ECO, "stochastic", short="ECO + SR"),
  )
  int8_residual = master.but("int8 residual + RTN", residual="int8")
  return [
    Method("BF16 master weights", "bf16_mw", FLOAT),
    master,
    Method("master weights + SR", "mw_sr", MASTER_WEIGHTS, "stochastic"),
    Method("naive RTN", "naive_rtn", NAIVE, "nearest"),
    Method("naive SR", "naive_sr", NAIVE, "stochastic"),
    eco_nearest.but("ECO + RTN, paper's rule", schedule_aware=False),
    eco_nearest,
    eco_stochastic.but("ECO + SR, paper's rule", schedule_aware=False),
    eco_stochastic,
    int8_residual,
    eco_stochastic.but("ECO + SR, FP8 moments", moments=FP8_MOMENTS),
    int8_residual.but("int8 residual + RTN, FP8 moments", moments=FP8_MOMENTS),
  ]


METHODS: dict[str, Method] = {method.label: method for method in _registry()}
# The methods that `config.method` selects, by name.
BY_NAME: dict[str, Method] = {
  method.name: method for method in METHODS.values() if set(method.changes) == {"method"}
}


def of(config: ml_collections.ConfigDict) -> Method:
  """The method that a config's keys select."""
  return dataclasses.replace(
    BY_NAME[config.method],
    schedule_aware=config.schedule_aware,
    residual=config.residual,
    moments=Moments(**config.moments),
    stochastic_after=config.stochastic_after,
  )


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up to the peak, then a cosine; the paper's is 0.01× → 1× (10%) → 0.1×."""
  optimizer, peak = config.optimizer, config.optimizer.learning_rate
  # 1e-6 of a step makes good binary fractions: 0.29 × 100 steps is 28.999999999999996.
  warmup = max(int(optimizer.warmup_fraction * config.steps + 1e-6), 1)
  return optax.warmup_cosine_decay_schedule(
    optimizer.start_fraction * peak,
    peak,
    warmup,
    max(config.steps, warmup + 1),
    optimizer.end_fraction * peak,
  )


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm of all leaves together, summed in float32 whatever their dtype."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip_factor(max_norm: float, grad_norm: jax.Array) -> jax.Array:
  """The factor that brings gradients of norm `grad_norm` down to `max_norm`; 1 if they are below.

  1e-30 stands in for a norm of zero: any positive float32 below every `max_norm` would do.
  """
  return jnp.minimum(1.0, max_norm / jnp.maximum(grad_norm, 1e-30))


class PreviousNorm(NamedTuple):
  """What an optimizer's state has in the place of a clip by the norm of the step before."""

  norm: jax.Array  # float32 scalar: of the whole gradient; 0, which clips nothing, before a step.


def _clip_place(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """The identity, with the state that the config's clip needs, whose place all checkpoints have."""

  def init(params: Any) -> Any:
    del params
    is_previous = config.optimizer.clip == "previous"
    return PreviousNorm(jnp.zeros([], jnp.float32)) if is_previous else optax.EmptyState()

  return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def previous_norm(opt_state: Any) -> jax.Array | None:
  """The norm that an optimizer's state tells to clip by; None with another clip."""
  return opt_state[0].norm if isinstance(opt_state[0], PreviousNorm) else None


def with_norm(opt_state: Any, grad_norm: jax.Array, is_finite: jax.Array) -> Any:
  """The state, which the next step clips by `grad_norm` if it needs one and the norm is finite."""
  before = previous_norm(opt_state)
  if before is None:
    return opt_state
  return PreviousNorm(jnp.where(is_finite, grad_norm, before)), *opt_state[1:]


def scaled(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """A stock optimizer whose `update` takes `gradient_scale=`, like this package's optimizers.

  Args:
    tx: the optimizer.

  Returns:
    A transformation; a scale that is not finite skips the step.
  """

  def update(
    grads: Any, state: Any, params: Any, *, gradient_scale: jax.Array, **extra_args: Any
  ) -> tuple[Any, Any]:
    del extra_args
    updates, new_state = tx.update(scale_gradients(grads, gradient_scale), state, params)
    return unless_skipped(gradient_scale, updates, new_state, state, params)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def _galore(**adam: Any) -> optax.GradientTransformation:
  """GaLore with Adam: of each layer's kernels alone, as its paper has it.

  Rank 32 is a quarter of the width of configs/stdlib_1m.py, and so is the paper's 128 at 60M
  (Zhao et al, `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, tables 2 and 5); scale and gap
  are the paper's too.

  Raises:
    ValueError: where Optax has no GaLore yet.
  """
  if not hasattr(optax.contrib, "scale_by_galore"):
    raise ValueError(f"Optax {optax.__version__} has no GaLore: pip install 'optax>=0.2.7'")
  is_list = lambda x: isinstance(x, list)
  apart = lambda tree: jax.tree.map(lambda x: [*x], tree)
  joined = lambda tree: jax.tree.map(jnp.stack, tree, is_leaf=is_list)
  tx = optax.contrib.scale_by_galore(
    rank=32, update_proj_gap=200, scale=0.25, base_optimizer=optax.scale_by_adam(**adam)
  )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    updates, state = tx.update(apart(updates), state)
    return joined(updates), state

  by_layer = optax.GradientTransformation(lambda params: tx.init(apart(params)), update)
  return optax.partition(
    {True: by_layer, False: optax.scale_by_adam(**adam)},
    lambda params: jax.tree.map(lambda x: x.ndim == 3, params),
  )


# Optimizers by `config.optimizer.name`: the direction of their steps, from b1, b2 and eps.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": optax.scale_by_adam,
  "nadamw": lambda **adam: optax.scale_by_adam(**adam, nesterov=True),
  "amsgrad": optax.scale_by_amsgrad,
  # Optax's b3 of 0.9999 remembers 10⁴ steps. 0.99 remembers 100, so that the slow momentum forgets
  # within the 500 steps that the study of optimizers trains for.
  "ademamix": lambda **adam: optax.contrib.scale_by_ademamix(**adam, b3=0.99, alpha=2.0),
  "yogi": optax.scale_by_yogi,
  "radam": optax.scale_by_radam,
  "galore": _galore,  # For weights in float32: ECO's rule refuses it.
  "sgd": lambda b1, **unused: optax.trace(b1),
  # With the momentum of its paper, whatever Adam's b2 is; ECO's rule refuses its sign.
  "lion": lambda b1, **unused: optax.scale_by_lion(b1, 0.99),
  # Of the linear layers inside blocks; embedding, head and norms take Adam's step.
  "soap": lambda **adam: eco.scale_by_soap(**adam, matrices=transformer.is_block_kernel),
  # With Adam's size of a step, so that Adam's learning rates serve.
  "shampoo": lambda **adam: eco.scale_by_shampoo(
    **adam, matrices=transformer.is_block_kernel, grafting="adam"
  ),
}
MUON = "muon"  # The name of Optax's Muon, whose momentum carries no error back.
NAMES = (*OPTIMIZERS, MUON)
CARRY_NOTHING_BACK = ("lion", MUON)  # What is put in their momenta does not come back.
_FUSED = ("adamw", "nadamw")  # Optimizers that `eco.adamw` fuses with the rule.
# Optimizers that multiply matrices, whose sums follow the devices that share one.
MATRIX_OPTIMIZERS = ("soap", "shampoo", MUON)


def _matrices(params: Any) -> Any:
  """What Muon is for: linear layers of blocks, each matrix of a stack by itself."""
  dimensions = optax.contrib.MuonDimensionNumbers(-2, -1)
  return trees.map_with_path(
    lambda path, _: dimensions if transformer.is_block_kernel(path) else None, params
  )


def _muon_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Of `optax.contrib.muon` and `eco.muon`; b1 and b2 are those of AdamW, for all other leaves."""
  o = config.optimizer
  return {
    "learning_rate": schedule(config),
    "eps": o.eps,
    "weight_decay": o.weight_decay,
    "adam_b1": o.b1,
    "adam_b2": o.b2,
    "adam_weight_decay": o.weight_decay,
    "muon_weight_dimension_numbers": _matrices,
    "consistent_rms": 0.2,  # Steps as long as AdamW's, so that both have one learning rate.
  }


# Ways of `config.wire_method` to feed back what the wire loses.
WIRE_METHODS = {
  "error_feedback": eco.wire.error_feedback,
  "ef21": eco.wire.ef21,
  "econtrol": eco.wire.econtrol,
}


def exchange(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> optax.GradientTransformationExtraArgs | None:
  """The exchange of gradients over the mesh axis `data`; None where the compiler sums them.

  Raises:
    ValueError: if the mesh has other axes of several devices.
  """
  if config.wire == "none":
    return None
  others = {axis: n for axis, n in mesh.shape.items() if axis != "data" and n > 1}
  if others:
    found = ", ".join(f"mesh.{axis} {n}" for axis, n in others.items())
    raise ValueError(
      f"config: wire {config.wire!r} needs whole parameters on each device, and there is {found}:"
      " set mesh.data=-1, mesh.fsdp=1, mesh.tensor=1 and mesh.expert=1, or wire='none'"
    )
  return _exchange(config.wire_method, config.wire, config.seed, mesh.shape["data"])


@functools.lru_cache(maxsize=8)  # One object for all who ask, by which shapes are found again.
def _exchange(
  method: str, compressor: str, seed: int, workers: int
) -> optax.GradientTransformationExtraArgs:
  made = eco.wire.COMPRESSORS[compressor]()
  return WIRE_METHODS[method](made, "data", seed=seed, workers=workers)


def stock_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """The optimizer of the config's name, Optax's where it has one, with decoupled weight decay."""
  o = config.optimizer
  if o.name == MUON:
    return optax.contrib.muon(**_muon_arguments(config))
  return optax.chain(
    OPTIMIZERS[o.name](b1=o.b1, b2=o.b2, eps=o.eps),
    optax.add_decayed_weights(o.weight_decay),
    optax.scale_by_learning_rate(schedule(config)),
  )


def until(
  step: int, first: optax.GradientTransformation, then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """The quantizer `first` for so many steps, and `then` from there on; both have one state."""
  first_update, then_update = first.update, then.update

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    before, new_state = first_update(updates, state, params, **extra_args)
    after, _ = then_update(updates, state, params, **extra_args)
    choose = lambda a, b: jnp.where(state.step < step, a, b)

    def leaf(old: Any, a: Any, b: Any) -> Any:
      if a is old:  # No quantizer moves this leaf; the object itself must be handed on.
        return a
      return jax.tree.map(choose, a, b)

    return jax.tree.map(leaf, updates, before, after), new_state

  return PackedTransformation(first.init, update)


def quantizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """The quantizer of `config.method`, which must round weights."""
  method = of(config)
  make = lambda rounding: eco.quantize_params(rounding=rounding, seed=config.seed)
  if method.stochastic_after < 1:
    switch = int(method.stochastic_after * config.steps)
    return until(switch, make(method.rounding), make("stochastic"))
  return make(method.rounding)


def _low_bit(method: Method, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """The optimizer with its moments stored as the method says."""
  if method.moments == FLOAT32_MOMENTS:
    return tx
  return eco.low_bit_moments(tx, **method.moments._asdict())  # type: ignore[arg-type]


def _fused(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """ECO over `stock_optimizer`, with a leaf's step in one pass where the device has a kernel."""
  o = config.optimizer
  return eco.adamw(
    schedule(config),
    o.b1,
    o.b2,
    o.eps,
    weight_decay=o.weight_decay,
    nesterov=o.name == "nadamw",
    rounding=of(config).rounding,  # type: ignore[arg-type]
    seed=config.seed,
  )


def _can_fuse(config: ml_collections.ConfigDict) -> bool:
  """Whether `eco.adamw` is what the config's method and optimizer come to."""
  method = of(config)
  one_rounding = method.stochastic_after == 1
  return config.optimizer.name in _FUSED and method.schedule_aware and one_rounding


def _behind_identity(
  first: optax.GradientTransformation, tx: PackedTransformation
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain(first, tx)`, which tells a transformation of `eco` all of the step.

  Args:
    first: the identity, whatever its state.
    tx: what steps.

  Returns:
    A transformation.
  """

  def init(params: Any) -> tuple[Any, Any]:
    return first.init(params), tx.init(params)

  def update(
    updates: Any, state: tuple[Any, Any], params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, tuple[Any, Any]]:
    updates, new_state = run(tx, updates, state[1], params, context, extra_args)
    return updates, (state[0], new_state)

  takes_whole = lambda state, params, stored: tx.takes_whole(state[1], params, stored)
  whole = PackedTransformation(init, update, takes_whole)
  whole.skips, whole.steps_in_stacks = True, tx.steps_in_stacks
  return whole


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """The optimizer of `config.method`, layer by layer.

  Its update takes the gradients' factor too, so that a clip makes no copy of them:
  `tx.update(…, gradient_scale=clip_factor(max_norm, global_norm(grads)))`.
  """
  method, inner = of(config), stock_optimizer(config)
  if method.family == FLOAT:
    tx = scaled(_low_bit(method, inner))
    return optax.with_extra_args_support(optax.chain(_clip_place(config), tx))
  is_muon = config.optimizer.name == MUON and method.stochastic_after == 1
  if method.family == MASTER_WEIGHTS and is_muon:
    tx = eco.muon(
      **_muon_arguments(config),
      residual=method.residual,  # type: ignore[arg-type]
      rounding=method.rounding,  # type: ignore[arg-type]
      seed=config.seed,
    )
  elif method.family == MASTER_WEIGHTS:
    tx = eco.master_weights(inner, quantizer(config), method.residual)  # type: ignore[arg-type]
  elif method.family == NAIVE:
    tx = eco.chain(inner, quantizer(config))
  elif _can_fuse(config):
    tx = _fused(config)
  else:
    learning_rate = schedule(config) if method.schedule_aware else None
    tx = eco.error_feedback_to_momentum(inner, quantizer(config), learning_rate)
  return _behind_identity(_clip_place(config), eco.layer_by_layer(_low_bit(method, tx)))


def with_master(
  config: ml_collections.ConfigDict, params: Any, opt_state: Any, master: Any
) -> tuple[Any, Any]:
  """Starts a run with master weights from given float32 weights.

  One step of `eco.master_weights` over the identity moves the stored weights onto the given ones:
  it rounds them into the parameters and puts the rest in the residual.

  Args:
    config: of the run.
    params: packed parameters, from which `opt_state` was made.
    opt_state: of `optimizer`, before any step.
    master: float32 weights in the tree of `eco.dequantize(params)`.

  Returns:
    Parameters and state.
  """
  move = eco.layer_by_layer(
    eco.master_weights(optax.identity(), quantizer(config), config.residual)
  )
  way = jax.tree.map(jnp.subtract, master, eco.dequantize(params))
  updates, moved = move.update(way, move.init(params), params)
  is_master = lambda state: isinstance(state, MasterWeightsState)
  (start,) = [x for x in jax.tree.leaves(moved, is_leaf=is_master) if is_master(x)]
  put = lambda x: x._replace(residual=start.residual) if is_master(x) else x
  return eco.apply_updates(params, updates), jax.tree.map(put, opt_state, is_leaf=is_master)
