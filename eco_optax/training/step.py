"""The state of a run and the jitted functions that make, change and evaluate it."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eco_optax as eco
from eco_optax.interop import hugging_face
from eco_optax.training import config as config_lib
from eco_optax.training import methods, sharding
from eco_optax.training.data.pipeline import Batch
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig


def accumulation(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """Parts in which a batch's gradients are computed: `config.accumulation`, or fewer.

  Where a part has fewer sequences than there are devices, parts are joined until every device has a
  sequence of its own: that takes no more memory on a device. With `config.reduction_groups` the
  number stays what it is, because the weights must not depend on the devices.
  """
  devices = mesh.size // mesh.shape["tensor"]
  wanted, batch = config.accumulation, config.batch_size
  if config.reduction_groups:
    return wanted
  fits = [n for n in range(1, wanted + 1) if wanted % n == 0 and batch // n % devices == 0]
  return max(fits, default=wanted)


def sums_once(config: ml_collections.ConfigDict, mesh: Mesh) -> bool:
  """Whether a released step gathers a layer's codes and sums its gradient once for all of a batch.

  Otherwise the compiler does both for each micro-batch: of models with routed experts, which
  devices may share and whose balance is that of all tokens, and on meshes that split products over
  `tensor`. With `config.reduction_groups` each group is computed by one device, experts and all.
  """
  if config.reduction_groups:
    return True
  return mesh.size > 1 and mesh.shape["tensor"] == 1 and not config.model.experts


class State(NamedTuple):
  """Everything a step changes."""

  params: Any  # Packed and float32 leaves.
  opt_state: Any
  skipped: Any  # int32 scalar: steps skipped because loss or gradient was not finite.


class ExchangingState(NamedTuple):
  """A `State` of a run whose devices exchange compressed gradients, see `config.wire`."""

  params: Any
  opt_state: Any
  skipped: Any
  wire: Any  # Of `methods.exchange`: errors, which each device has of its own.


def workers(state: Any) -> int | None:
  """The number of devices that a state's errors are of; None where nothing is compressed."""
  if not isinstance(state, ExchangingState):
    return None
  return int(jax.tree.leaves(state.wire.own)[0].shape[0])


def make_init(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A function of no arguments that returns a run's first state."""
  model, weight_format = config_lib.model(config), config_lib.formats(config)[0]
  return _make_init(model, config.seed, weight_format, tx, methods.exchange(config, mesh))


def _make_init(
  model: TransformerConfig,
  seed: int,
  weight_format: eco.Format | None,
  tx: optax.GradientTransformation,
  exchange: optax.GradientTransformation | None,
) -> Any:
  def init() -> Any:
    params = transformer.init(model, seed, weight_format)
    state = State(params, tx.init(params), jnp.zeros([], jnp.int32))
    return state if exchange is None else ExchangingState(*state, exchange.init(params))

  return init


@functools.lru_cache(maxsize=8)  # A run asks three times, and a trace of `tx.init` takes seconds.
def _shapes(
  model: TransformerConfig,
  weight_format: eco.Format | None,
  tx: optax.GradientTransformation,
  exchange: optax.GradientTransformation | None,
) -> Any:
  """Shapes and dtypes of a first state, which depend on no seed."""
  return jax.eval_shape(_make_init(model, 0, weight_format, tx, exchange))


def abstract_state(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """Shapes, dtypes and shardings of a run's state; nothing is allocated.

  Raises:
    ValueError: naming any large array that the mesh would leave whole on every device.
  """
  exchange = methods.exchange(config, mesh)
  shapes = _shapes(config_lib.model(config), config_lib.formats(config)[0], tx, exchange)
  sharding.check_sharded(shapes, mesh, config.replicated_limit_mib * 2**20)
  in_place = sharding.shardings(shapes, mesh)
  if exchange is not None:
    specs = eco.wire.specs(shapes.wire, "data")
    in_place = in_place._replace(wire=jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, in_place
  )


def init_state(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A run's first state; each device makes or reads its own part, layer by layer."""
  target = abstract_state(config, tx, mesh)
  in_place = jax.tree.map(lambda x: x.sharding, target)
  with jax.set_mesh(mesh):
    if not config.init_from:
      return jax.jit(make_init(config, tx, mesh), out_shardings=in_place)()
    model = config_lib.model(config)
    params = hugging_face.load(config.init_from, target.params, model)
    opt_state = jax.jit(tx.init, out_shardings=in_place.opt_state)(params)
    if methods.of(config).family == methods.MASTER_WEIGHTS:
      # Master weights start from the checkpoint's own values, not from their rounded ones.
      dense = jax.eval_shape(eco.dequantize, target.params)
      place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
      dense = jax.tree.map(place, dense, sharding.shardings(dense, mesh))
      master = hugging_face.load(config.init_from, dense, model)
      params, opt_state = jax.jit(
        lambda *args: methods.with_master(config, *args),
        out_shardings=(in_place.params, in_place.opt_state),
        donate_argnums=(0, 1),
      )(params, opt_state, master)
    skipped = jax.device_put(jnp.zeros([], jnp.int32), in_place.skipped)
    exchange = methods.exchange(config, mesh)
    if exchange is None:
      return State(params, opt_state, skipped)
    errors = jax.jit(exchange.init, out_shardings=in_place.wire)(params)
    return ExchangingState(params, opt_state, skipped, errors)


def _compiler_options(platform: str) -> dict[str, bool]:
  """XLA's options for a step on a platform; XLA_FLAGS goes before them.

  On GPUs products are left to cuBLAS. The choice among Triton's products takes 90 seconds for an
  800M model, and the step is as fast without (results/gpu).
  """
  if platform != "gpu" or "xla_gpu_enable_triton_gemm" in os.environ.get("XLA_FLAGS", ""):
    return {}
  return {"xla_gpu_enable_triton_gemm": False}


def make_train_step(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A jitted (state, batch) → (state, metrics) that donates its state.

  A step whose loss or gradient is not finite leaves parameters and moments unchanged, adds one to
  `state.skipped`, and tells in the metric `bad_leaf` which leaf of the gradient is the first that
  is not finite, by its number in the order of `jax.tree.leaves(params)` with packed leaves as one;
  −1 where all are. The metric `bad_weight` tells the same of the parameters after the step: an
  update of finite gradients may still be too large for float32. With `config.release` and a clip
  that is not exact, only layers whose gradients are not finite stay unchanged.

  Args:
    config: of the run.
    tx: its optimizer.
    mesh: to run on.

  Returns:
    The function; its batch is a `pipeline.Batch`.
  """
  model = config_lib.model(config)
  loss = lambda params, batch: transformer.loss(model, params, *batch)
  gradient_dtype = jnp.dtype(config.gradient_dtype)
  how: dict[str, Any] = {"dense": False, "has_aux": True, "gradient_dtype": gradient_dtype}
  loss_and_grad = eco.value_and_grad(loss, **how)
  max_norm = config.optimizer.max_norm
  target = abstract_state(config, tx, mesh)
  in_place = jax.tree.map(lambda x: x.sharding, target)

  def one_group(params: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
    (loss, aux), grads = loss_and_grad(params, batch)
    return {"loss": loss, **aux}, grads

  def gradients(params: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
    if not (groups := config.reduction_groups):
      metrics, grads = one_group(params, batch)
      return metrics, sharding.scatter(grads)
    batch = jax.tree.map(lambda x: x.reshape(groups, -1, x.shape[1]), batch)
    metrics, grads = sharding.group_by_group(one_group)(params, batch)
    # Groups have the same number of tokens, so the mean of their means is the batch's.
    mean = lambda x: (x.astype(jnp.float32) / groups).astype(x.dtype)
    return jax.tree.map(mean, sharding.sum_groups((metrics, grads)))

  def accumulated(params: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
    """Means over parts of the batch, one after another, summed in float32."""
    parts = accumulation(config, mesh)
    if parts == 1:
      return gradients(params, batch)
    batch = _in_parts(batch, parts)
    first = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
      part = jax.tree.map(lambda x: sharding.constrain(x, "batch", None), part)
      means = gradients(params, part)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32) / parts, total, means), None

    return jax.lax.scan(add, zeros, batch)[0]

  exchange = methods.exchange(config, mesh)

  def exchanged(params: Any, errors: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any, Any]:
    """Means over devices, which compute their own gradients and exchange them compressed."""

    def alone(params: Any, errors: Any, batch: Batch) -> Any:
      assert exchange is not None
      metrics, grads = accumulated(params, batch)
      # Behind the exchange none would be finite.
      bad = _first_without_norm(jax.tree.leaves(grads))
      none = np.int32(2**31 - 1)
      first = jax.lax.pmin(jnp.where(bad < 0, none, bad), "data")
      grads, errors = exchange.update(grads, errors)
      metrics = jax.lax.pmean(metrics, "data")
      return metrics | {"bad_leaf": jnp.where(first == none, -1, first)}, grads, errors

    whole, specs = PartitionSpec(), eco.wire.specs(errors, "data")
    return jax.shard_map(  # type: ignore[no-any-return]
      alone,
      mesh=mesh,
      in_specs=(whole, specs, PartitionSpec("data")),
      out_specs=(whole, whole, specs),
      check_vma=False,
    )(params, errors, batch)

  def ordinary(state: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
    if exchange is None:
      metrics, grads = accumulated(state.params, batch)
    else:
      metrics, grads, errors = exchanged(state.params, state.wire, batch)
      state = state._replace(wire=errors)
    # A sum over the devices' parts would depend on how many there are.
    norm = (
      sharding.on_each_device(methods.global_norm)
      if config.reduction_groups
      else methods.global_norm
    )
    metrics["grad_norm"] = norm(grads)

    # A norm that is not finite: some element is not, or their sum of squares overflows.
    if exchange is None:
      metrics["bad_leaf"] = _first_without_norm(jax.tree.leaves(grads))
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    # A branch around the update would copy all moments on a GPU; a scale of NaN skips the step.
    before = methods.previous_norm(state.opt_state)
    clip = methods.clip_factor(max_norm, metrics["grad_norm"] if before is None else before)
    scale = jnp.where(is_finite, clip, np.float32(np.nan))
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, gradient_scale=scale, shardings=in_place.params
    )
    opt_state = methods.with_norm(opt_state, metrics["grad_norm"], is_finite)
    skipped = state.skipped + jnp.where(is_finite, 0, 1)
    params = eco.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, skipped=skipped), metrics

  parts = accumulation(config, mesh)
  clips_before = config.optimizer.clip == "previous"  # Then a step is given its factor.
  # What the loss hands on over the vocabulary is small, and decides every gradient.
  kept_format = config_lib.FORMATS.get(config.kept_format)
  value_and_step = eco.value_and_step(
    loss,
    tx,
    **how,
    clip="exact" if clips_before else config.optimizer.clip,
    max_norm=None if clips_before else max_norm,
    accumulation=parts if parts > 1 else None,
    kept_format=lambda path: kept_format if transformer.is_block(path) else None,
    shardings=in_place.params,
    batch_axes=sharding.RULES["batch"] if sums_once(config, mesh) else None,
    reduce_dtype=jnp.dtype(config.reduce_dtype),
    reduction_groups=config.reduction_groups or None,
    keep_gradients=config.keep_gradients,
  )

  def released(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    if parts > 1:
      split = lambda x: sharding.constrain(x, None, "batch", None)
      batch = jax.tree.map(split, _in_parts(batch, parts))
    before = methods.previous_norm(state.opt_state)
    (loss, aux), params, opt_state, report = value_and_step(
      state.params,
      state.opt_state,
      batch,
      gradient_scale=None if before is None else methods.clip_factor(max_norm, before),
    )
    mean = lambda x: jax.tree.map(jnp.mean, x)
    aux = sharding.on_each_device(mean)(aux) if config.reduction_groups else mean(aux)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(report.norm)
    opt_state = methods.with_norm(opt_state, report.norm, is_finite)
    bad_leaf = _first_without_norm(list(report.norms.values()))
    metrics = {"loss": loss, **aux, "grad_norm": report.norm, "bad_leaf": bad_leaf}
    skipped = state.skipped + jnp.where(report.skipped > 0, 1, 0)
    return State(params, opt_state, skipped), metrics

  def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    if batch.weights is not None:
      # Of mean 1 over the whole batch, so that the mean of its parts' means is the weighted mean.
      # A batch may have no target at all; one among 2³⁰ tokens makes a mean of 1e-9.
      mean = jnp.maximum(jnp.mean(batch.weights), 1e-9)
      batch = batch._replace(weights=batch.weights / mean)
    state, metrics = (released if config.release else ordinary)(state, batch)
    # Codes are always finite; a bad weight shows in its scale.
    is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
    leaves = jax.tree.leaves(state.params, is_leaf=is_packed)
    values = [leaf.float_scale() if is_packed(leaf) else leaf for leaf in leaves]
    metrics["bad_weight"] = _first_without_norm(values)
    return state, metrics | {"skipped": state.skipped}

  options = _compiler_options(mesh.devices.flat[0].platform)
  return jax.jit(step, donate_argnums=0, out_shardings=(in_place, None), compiler_options=options)


def _in_parts(batch: Batch, parts: int) -> Batch:
  """A batch with a first axis of parts, each with rows of all devices."""
  return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, x.shape[1]), 0, 1), batch)


def _first_without_norm(leaves: list[jax.Array]) -> jax.Array:
  """Number of the first array whose norm is not finite, int32; −1 if all are."""
  is_bad = jnp.stack([~jnp.isfinite(methods.global_norm(leaf)) for leaf in leaves])
  return jnp.where(jnp.any(is_bad), jnp.argmax(is_bad), -1).astype(jnp.int32)


def make_eval_step(config: ml_collections.ConfigDict) -> Any:
  """A jitted (params, batch) → float32 sums over each sequence: its nats, and its targets."""
  model = config_lib.model(config)

  def one_group(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    ones = jnp.ones(batch.tokens[:, 1:].shape, jnp.float32)
    weights = ones if batch.weights is None else batch.weights
    return transformer.nats(model, params, *batch)[0], jnp.sum(weights, axis=1)

  def evaluate(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if groups := config.reduction_groups:
      batch = jax.tree.map(lambda x: x.reshape(groups, -1, x.shape[1]), batch)
      sums = sharding.group_by_group(one_group)(params, batch)
    else:
      sums = one_group(params, batch)
    return jax.tree.map(lambda x: sharding.constrain(x.ravel(), None), sums)

  return jax.jit(evaluate)


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> Batch:
  """Shape and sharding of a step's tokens, all of them targets."""
  shape = (config.batch_size, config.length + 1)
  return Batch(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh)))
