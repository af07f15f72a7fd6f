"""The runs that are compared: each is an expression of the library's public names."""

from __future__ import annotations

from typing import Any

import ml_collections
import optax

import eco_optax as eco

# How each method keeps what rounding loses: in master weights, not at all, or in the momentum.
METHODS = ("bf16_mw", "mw_rtn", "mw_sr", "naive_rtn", "naive_sr", "eco_rtn", "eco_sr")

_ROUNDING = {"rtn": "nearest", "sr": "stochastic"}


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up from 0.01× the peak over 10% of the steps, then a cosine to 0.1×."""
  peak = config.learning_rate
  return optax.warmup_cosine_decay_schedule(
    0.01 * peak, peak, max(config.steps // 10, 1), config.steps, 0.1 * peak
  )


def stock_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW behind a clip by global norm, with the scaling study's settings in the config."""
  return optax.chain(
    optax.clip_by_global_norm(config.max_norm),
    optax.adamw(
      schedule(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay
    ),
  )


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """The optimizer of `config.method`.

  Raises:
    ValueError: for an unknown method, naming those there are.
  """
  if config.method not in METHODS:
    raise ValueError(f"unknown method {config.method!r}: use one of {', '.join(METHODS)}")
  inner = stock_optimizer(config)
  if config.method == "bf16_mw":
    return optax.with_extra_args_support(inner)
  family, rounding = config.method.split("_")
  quantizer = eco.quantize_params(rounding=_ROUNDING[rounding], seed=config.seed)  # type: ignore[arg-type]
  if family == "mw":
    return eco.master_weights(inner, quantizer, config.residual)
  if family == "naive":
    return eco.chain(inner, quantizer)
  learning_rate = schedule(config) if config.schedule_aware else None
  return eco.error_feedback_to_momentum(inner, quantizer, learning_rate)


def formats(config: ml_collections.ConfigDict) -> tuple[eco.Format | None, eco.Format | None]:
  """The formats of the weights and of the activations; None is float.

  Raises:
    ValueError: for an unknown format, naming those there are.
  """
  if config.method == "bf16_mw":
    return None, None
  presets: dict[str, Any] = {
    name: value for name, value in vars(eco).items() if isinstance(value, eco.Format)
  }
  for key in ("format", "activation_format"):
    if config[key] not in (*presets, "none") or (key == "format" and config[key] == "none"):
      raise ValueError(f"unknown {key} {config[key]!r}: use one of {', '.join(sorted(presets))}")
  return presets[config.format], presets.get(config.activation_format)


def compute_dtype(config: ml_collections.ConfigDict) -> str:
  """The activations' dtype: bfloat16 for the BF16 baseline, the config's for the others."""
  return "bfloat16" if config.method == "bf16_mw" else config.dtype
