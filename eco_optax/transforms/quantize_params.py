"""quantize_params: the transform that puts parameters on a low-bit grid after each step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.quantized_array import (
  Rounding,
  Where,
  as_parameter,
  default_where,
  dequantize,
  is_quantized,
  quantize_array,
)
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  add_update,
  float_gradients,
  is_packed_transformation,
  require_params,
  require_state,
  run,
)


class _Nearest(PackedTransformation):
  largest_error = 0.5


class QuantizeParamsState(NamedTuple):
  """State of `quantize_params`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken; it numbers the random bits.


def quantize_params(
  format: Format | None = None,
  where: Where | None = None,
  rounding: Rounding = "stochastic",
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces proposed parameters by their quantized values.

  For a stored weight θ̂ and an update u proposed by the links before it:

  .. math:: \hat θ' = q(\hat θ + u)

  A packed leaf carries its own format: its entry of the updates becomes the new QuantizedArray, for
  `eco.apply_updates` to put in place. Alone behind an optimizer, `eco.chain(optax.adamw(…),
  eco.quantize_params())`, this is naive quantized training, which loses small updates;
  `error_feedback_to_momentum` pays them back.

  In emulation a sum θ̂ + u in float32 has to be θ̂'. The update u = θ̂' − θ̂ is exact where a weight
  keeps its sign and changes by a factor of two at most, and where it becomes or was zero. Beyond,
  as for a weight that crosses zero, there may be no number u with that sum; then the weight is off
  its grid by the last place of u, about 2⁻²⁴ of the move, until its next step. Scales with few
  bits, `scale_dtype="bfloat16"` or `power_of_two=True`, leave room for moves by a factor of 2⁸.

  Args:
    format: for emulation, when parameters are floats: the updates are changed so that
      `optax.apply_updates` lands on the format's grid. Nothing is stored in low bits. From weights
      on the grid, `eco.dequantize(eco.quantize(params, format))`, the trajectory is the packed one,
      but for the last place of weights that float32 has no update to, see below. None leaves float
      leaves alone.
    where: called with each leaf's `/`-joined path and the leaf; with `format`, the float leaves to
      round (None: those with at least two axes); without, the leaves promised to be packed.
    rounding: `"nearest"` or `"stochastic"`.
    seed: of the stochastic rounding, which is a function of (seed, step, leaf path, element index).

  Returns:
    A `GradientTransformationExtraArgs`; it must be the last link of a chain.

  Raises:
    ValueError: at `init`, naming the leaf path, if nothing would be quantized, the format does not
      fit a leaf, or a float leaf stands where `where` promises a packed one.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((2, 2))}, eco.FP8)
    >>> tx = eco.chain(optax.sgd(0.5), eco.quantize_params(rounding="nearest"))
    >>> updates, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    >>> eco.apply_updates(params, updates)["w"].dequantize()
    Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)

  References:
    Nikdan et al, `ECO: Quantized Training without Full-Precision Master Weights
    <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithm 1.
  """
  if format is not None and not isinstance(format, Format):
    raise ValueError(f"format must be an eco_optax.Format such as eco.FP8, got {format!r}")
  if rounding not in ("nearest", "stochastic"):
    raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")

  if not jnp.issubdtype(getattr(seed, "dtype", type(seed)), jnp.integer):
    raise ValueError(f"seed must be an integer, got {seed!r}")

  def chosen(path: str, leaf: Any) -> Format | None:
    """The format to round this leaf to, if any."""
    if is_quantized(leaf):
      return leaf.format
    if format is not None and (where or default_where)(path, leaf):
      return format.of(path, leaf).widened(leaf.shape)
    return None

  def init(params: Any) -> QuantizeParamsState:
    formats = []

    def check(path: str, leaf: Any) -> None:
      leaf_format = chosen(path, leaf)
      formats.append(leaf_format)
      if is_quantized(leaf):
        return
      if format is not None and leaf_format is not None:
        if not trees.is_float(leaf):
          raise ValueError(
            f"{trees.leaf_name(path)} holds {leaf.dtype}, only floats can be rounded to {format}:"
            " leave it out with where="
          )
        if leaf.dtype != jnp.float32 and not (leaf.dtype == jnp.bfloat16 and format.power_of_two):
          raise ValueError(
            f"{trees.leaf_name(path)} is {leaf.dtype}, in which values of {format} are not exact,"
            " so that weights would leave its grid: keep the parameters in float32, pack them with"
            " eco.quantize, or for bfloat16 use a format with power_of_two=True"
          )
        leaf_format.check(leaf.shape, path)
      elif where is not None and format is None and where(path, leaf):
        raise ValueError(
          f"{trees.leaf_name(path)} is {leaf.dtype}{list(leaf.shape)} where where= promises a"
          " packed leaf: call eco.quantize(params, format, where) first, or pass format= to emulate"
        )

    trees.map_with_path(check, params, is_leaf=is_quantized)
    if formats and not any(formats):
      raise ValueError(
        "no leaf of params is quantized: call params = eco.quantize(params, eco.FP8) first, or pass"
        " format= (and a where= that selects some leaf) to emulate"
      )
    return QuantizeParamsState(step=jnp.zeros([], jnp.int32))

  def update(
    updates: Any, state: QuantizeParamsState, params: Any, context: Context, **extra_args: Any
  ) -> Any:
    del extra_args
    require_params(params)
    require_state(state, QuantizeParamsState, "eco_optax.quantize_params")

    def put_on_grid(path: str, leaf: Any, update: Any) -> Any:
      leaf_format = chosen(path, leaf)
      if leaf_format is None:
        return update
      if context.only_asks:
        return leaf if is_quantized(leaf) else -update
      stored = dequantize(leaf)
      bits = None
      if rounding == "stochastic":
        key = rounding_lib.stream_key(seed, state.step, path)
        bits = rounding_lib.counter_bits(key, leaf.shape, context.layer)
      packed = quantize_array(add_update(stored, update), leaf_format, rounding, bits)
      # Without an update it stays: stored values need not find their own scales again, such as
      # NVFP4's after stochastic rounding, and those that another library has chosen.
      stays = jnp.all(update == 0)
      if is_quantized(leaf):
        old = dataclasses.replace(as_parameter(leaf), sink=None)
        return trees.select(stays, old, packed)
      # The number whose sum with the weight comes nearest; to some weights none leads.
      moved = packed.dequantize(leaf.dtype) - stored
      return trees.select(stays, jnp.zeros_like(moved), moved)

    updates = trees.map_with_path(put_on_grid, params, updates, is_leaf=is_quantized)
    return updates, QuantizeParamsState(step=optax.safe_increment(state.step))

  kind = _Nearest if rounding == "nearest" else PackedTransformation
  return kind(init, update)


def chain(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`optax.chain` for packed parameters: stock links see packed leaves as float32.

  Args:
    *links: transformations, applied in order; of this package (`quantize_params` last) or stock.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a tuple of the links' states.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((2, 2))}, eco.FP8)
    >>> state = eco.chain(optax.adam(1e-3), eco.quantize_params()).init(params)
    >>> state[0][0].mu["w"].dtype
    dtype('float32')
  """
  packed = [is_packed_transformation(link) for link in links]
  for i, own in enumerate(packed[:-1]):
    if own:
      raise ValueError(
        f"link {i} of {len(links)} of eco_optax.chain moves packed parameters, so that no link can"
        " follow it: put it last, and a clip or a mask before it"
      )

  def init(params: Any) -> tuple:
    dense = dequantize(params)
    return tuple(
      link.init(params if own else dense) for link, own in zip(links, packed, strict=True)
    )

  def update(
    updates: Any, state: tuple, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, tuple]:
    require_state(state, tuple, "eco_optax.chain")
    if len(state) != len(links):
      raise ValueError(
        f"the state is of {len(state)} links, the chain has {len(links)}: init again"
      )
    updates, context = context.scale(updates)
    updates, dense = float_gradients(updates, params), dequantize(params)
    new_state = []
    for link, own, link_state in zip(links, packed, state, strict=True):
      view = params if own else dense
      updates, link_state = run(link, updates, link_state, view, context, extra_args)
      new_state.append(link_state)
    return updates, tuple(new_state)

  return PackedTransformation(init, update)
