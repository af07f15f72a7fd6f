"""Bytes that a step holds beside its state, counted from the traced loss; nothing is compiled."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.extend import core
from jax.sharding import Mesh

import eco_optax as eco
from eco_optax.quantized_array import is_quantized
from eco_optax.training import config as config_lib
from eco_optax.training import memory
from eco_optax.training import step as step_lib
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig

# What the backward pass makes again, by the name of `model.remat`.
REMAT = {
  "none": "nothing is made again",
  "dots": "all but products is made again",
  "full": "layers are made again, a third more operations",
}


@functools.lru_cache(maxsize=16)  # A trace takes half a second, and a plan asks again.
def kept(
  model: TransformerConfig, weight_format: eco.Format | None, sequences: int, length: int
) -> int:
  """Bytes that the forward pass of a loss leaves for its backward pass, without the parameters.

  Args:
    model: whose loss it is.
    weight_format: of the parameters that are packed.
    sequences: of a batch.
    length: of a sequence, in tokens that are predicted.

  Returns:
    The sum over all arrays that the forward pass makes and the backward pass reads. A compiler may
    make some of them again where that is cheap.
  """
  params = jax.eval_shape(lambda: transformer.init(model, 0, weight_format))
  # A packed parameter is differentiated by the float array that collects its gradient.
  primals = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params, is_leaf=is_quantized
  )

  def forward(params: Any, primals: Any, tokens_BxM: jax.Array) -> Any:
    def loss(primals: Any) -> Any:
      with_primal = lambda x, p: dataclasses.replace(x, sink=p) if is_quantized(x) else p
      leaves = jax.tree.map(with_primal, params, primals, is_leaf=is_quantized)
      return transformer.loss(model, leaves, tokens_BxM)

    return jax.vjp(loss, primals, has_aux=True)[1]

  tokens_BxM = jax.ShapeDtypeStruct((sequences, length + 1), jnp.int32)
  jaxpr = jax.make_jaxpr(forward)(params, primals, tokens_BxM).jaxpr
  made = {x for eqn in jaxpr.eqns for x in eqn.outvars}
  left = {x for x in jaxpr.outvars if isinstance(x, core.Var) and x in made}
  return sum(math.prod(x.aval.shape) * x.aval.dtype.itemsize for x in left)  # type: ignore[attr-defined]


def plan(config: ml_collections.ConfigDict, state: Any, mesh: Mesh) -> str:
  """What a device holds beside the state in a step of a run, and what it would with other `remat`.

  Args:
    config: of the run.
    state: abstract.
    mesh: to run on. What `tensor` splits is counted whole.

  Returns:
    A table of bytes.
  """
  model, weight_format = config_lib.model(config), config_lib.formats(config)[0]
  parts = step_lib.accumulation(config, mesh)
  sequences = max(config.batch_size // parts // (mesh.size // mesh.shape["tensor"]), 1)
  if config.reduction_groups:
    sequences = config.batch_size // parts // config.reduction_groups

  def count(more_layers: int, remat: str) -> int:
    changed = dataclasses.replace(model, layers=model.layers + more_layers, remat=remat)
    return kept(changed, weight_format, sequences, config.length)

  of_layer = lambda remat: count(1, remat) - count(0, remat)
  again = of_layer("none") - of_layer("full" if config.release else model.remat)
  rows = []
  if config.release:
    size = of_layer("full")
    if config.kept_format != "none":
      numbers = size // jnp.dtype(model.dtype).itemsize
      size = numbers + 4 * numbers // model.width  # A code for each, a scale for each token.
    name = "layers' inputs" if parts == 1 else "layers' inputs of all micro-batches"
    rows.append((name, parts * model.layers * size))
  else:
    for remat, what in REMAT.items():
      mark = " (this run)" if remat == model.remat else ""
      rows.append((f"kept, remat={remat}: {what}{mark}", count(0, remat)))
  if again:
    rows.append(("what of one layer is made again", again))
  chunk = sequences * config.length // model.loss_chunks * model.vocabulary
  cut = model.loss_chunks * model.vocabulary_parts
  of = f"one of {cut} parts, made again" if cut > 1 else "whole"
  rows.append((f"logits, {of}", 4 * chunk // model.vocabulary_parts))
  rows.append(_gradients(config, state, parts))
  title = f"activations per device, {sequences} × {config.length} tokens at a time"
  return "\n".join([title, memory.table([(name, f"{n:,}") for name, n in rows])])


def _gradients(config: ml_collections.ConfigDict, state: Any, parts: int) -> tuple[str, int]:
  """A row of the gradients that are there at once."""
  by_path = jax.tree_util.tree_leaves_with_path(state.params, is_leaf=is_quantized)
  if config.release and not config.keep_gradients:
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    layers = config_lib.model(config).layers
    blocks = [math.prod(x.shape) for path, x in by_path if transformer.is_block(name(path))]
    return "gradient of one layer, float32", 4 * sum(blocks) // layers
  summed, total = 4 if parts > 1 else 0, 0
  for _, x in by_path:
    own = memory.Leaf("", "", x.qvalue if is_quantized(x) else x)
    itemsize = jnp.dtype(config.gradient_dtype).itemsize if is_quantized(x) else 4
    total += math.prod(x.shape) * (itemsize + summed) * own.nbytes_per_device // own.nbytes
  return "gradients" if parts == 1 else "gradients, and their float32 sum", total
