"""The state of a run and the jitted functions that make, change and evaluate it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import eco_optax as eco
from eco_optax.training import config as config_lib
from eco_optax.training import methods, sharding
from eco_optax.training.models import transformer


class State(NamedTuple):
  """Everything a step changes."""

  params: Any  # Packed and float32 leaves.
  opt_state: Any


def make_init(config: ml_collections.ConfigDict, tx: optax.GradientTransformation) -> Any:
  """A function of no arguments that returns a run's first state."""
  model, (weight_format, _) = config_lib.model(config), config_lib.formats(config)

  def init() -> State:
    params = transformer.init(model, config.seed, weight_format)
    return State(params, tx.init(params))

  return init


def abstract_state(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
  """Shapes, dtypes and shardings of a run's state; nothing is allocated.

  Raises:
    ValueError: naming any large array that the mesh would leave whole on every device.
  """
  shapes = jax.eval_shape(make_init(config, tx))
  sharding.check_sharded(shapes, mesh, config.replicated_limit_mib * 2**20)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.shardings(shapes, mesh),
  )


def init_state(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> State:
  """A run's first state, each device making its own part of it, layer by layer."""
  target = abstract_state(config, tx, mesh)
  with jax.set_mesh(mesh):
    return jax.jit(
      make_init(config, tx), out_shardings=jax.tree.map(lambda x: x.sharding, target)
    )()


def make_train_step(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
  """A jitted (state, tokens) → (state, metrics) that donates its state.

  Args:
    config: of the run.
    tx: its optimizer.
    mesh: to run on.

  Returns:
    The function; tokens are int32 of shape (batch_size, length + 1).
  """
  model = config_lib.model(config)
  loss_and_grad = eco.value_and_grad(
    lambda p, x: transformer.loss(model, p, x),
    dense=False,
    has_aux=True,
    gradient_dtype=jnp.dtype(config.gradient_dtype),
  )
  target = abstract_state(config, tx, mesh)
  in_place = jax.tree.map(lambda x: x.sharding, target)

  def one_group(params: Any, tokens_BxM: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    (loss, aux), grads = loss_and_grad(params, tokens_BxM)
    return {"loss": loss, **aux}, grads

  def gradients(params: Any, tokens_BxM: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    if not (groups := config.reduction_groups):
      metrics, grads = one_group(params, tokens_BxM)
      return metrics, sharding.scatter(grads)
    tokens_GxBxM = tokens_BxM.reshape(groups, -1, tokens_BxM.shape[1])
    metrics, grads = sharding.group_by_group(one_group)(params, tokens_GxBxM)
    # Groups have the same number of tokens, so the mean of their means is the batch's.
    mean = lambda x: (x.astype(jnp.float32) / groups).astype(x.dtype)
    return jax.tree.map(mean, sharding.sum_groups((metrics, grads)))

  def accumulated(params: Any, tokens_BxM: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    """Means over parts of the batch, one after another, summed in float32."""
    parts = config.accumulation
    if parts == 1:
      return gradients(params, tokens_BxM)
    # Every part takes rows from all devices.
    B, M = tokens_BxM.shape
    tokens_PxBxM = jnp.swapaxes(tokens_BxM.reshape(B // parts, parts, M), 0, 1)
    first = jax.eval_shape(gradients, params, tokens_PxBxM[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)

    def add(total: Any, tokens: jax.Array) -> tuple[Any, None]:
      tokens = sharding.constrain(tokens, "batch", None)
      part = gradients(params, tokens)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32) / parts, total, part), None

    return jax.lax.scan(add, zeros, tokens_PxBxM)[0]

  def step(state: State, tokens_BxM: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    metrics, grads = accumulated(state.params, tokens_BxM)
    # A norm of parts depends on what the parts are.
    norm = (
      sharding.on_each_device(methods.global_norm)
      if config.reduction_groups
      else methods.global_norm
    )
    metrics["grad_norm"] = norm(grads)
    updates, opt_state = tx.update(
      grads, state.opt_state, state.params, grad_norm=metrics["grad_norm"]
    )
    return State(eco.apply_updates(state.params, updates), opt_state), metrics

  return jax.jit(step, donate_argnums=0, out_shardings=(in_place, None))


def make_eval_step(config: ml_collections.ConfigDict) -> Any:
  """A jitted (params, tokens) → mean cross-entropy in nats per token."""
  model = config_lib.model(config)
  return jax.jit(lambda p, x: transformer.loss(model, p, x)[1]["cross_entropy"])


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Shape and sharding of a step's tokens."""
  return jax.ShapeDtypeStruct(
    (config.batch_size, config.length + 1), jnp.int32, sharding=sharding.batch_sharding(mesh)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Of what every device has whole."""
  return NamedSharding(mesh, PartitionSpec())
