"""Every key of a run: its default, its type and its range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import optax.contrib
from ml_collections import config_dict

import eco_optax as eco
from eco_optax.matmul import check_gradient_format
from eco_optax.training import methods, sharding
from eco_optax.training.models.config import TransformerConfig
from eco_optax.transforms.stored_moments import DTYPES, SECOND_DTYPES

FORMATS = {name: x for name, x in vars(eco).items() if isinstance(x, eco.Format)}
FORMATS["INT4_GROUP32"] = eco.Format("int4", (32, 1))  # As served: 32 inputs share a scale.
# The same codes with the other kind of scales; MXFP4 and MXFP8 have powers of two.
FORMATS["FP8_POWER_OF_TWO"] = eco.Format("float8_e4m3fn", "channel", power_of_two=True)
FORMATS["INT4_POWER_OF_TWO"] = eco.Format("int4", "tensor", power_of_two=True)
FORMATS["INT4_GROUP32_POWER_OF_TWO"] = eco.Format("int4", (32, 1), "float8_e8m0fnu")
FORMATS["NVFP4_POWER_OF_TWO"] = eco.Format("float4_e2m1fn", (16, 1), "float8_e4m3fn", True)
FORMATS["FP4_GROUP32"] = eco.Format("float4_e2m1fn", (32, 1))
_DTYPES = ("float32", "bfloat16")


def defaults() -> config_dict.ConfigDict:
  """A config with every key, locked: setting an unknown key is an error."""
  config = config_dict.ConfigDict()
  config.seed = 0

  config.method = "eco_sr"  # bf16_mw, mw_rtn, mw_sr, naive_rtn, naive_sr, eco_rtn or eco_sr.
  config.schedule_aware = True  # The rule follows the learning rate; False is the paper's rule.
  config.stochastic_after = 1.0  # Share of the steps after which *_rtn rounds stochastically.
  config.residual = "float32"  # Of mw_*: float32, int16, bfloat16, int12 or int8.
  # What moments are stored in, see eco_optax.low_bit_moments; nu may be factored.
  config.moments = {"mu": "float32", "nu": "float32"}
  config.format = "FP8"  # Of the quantized linear weights: a preset of eco_optax.
  config.activation_format = "FP8_TOKEN"  # Of their inputs; "none" leaves them float.
  # Of the cotangents that the gradients of their inputs are made of, FP8_E5M2_TOKEN or FP8_TOKEN,
  # see eco_optax.matmul; "none" multiplies in `dtype`, as the paper's runs do.
  config.gradient_format = "none"
  # The same for the gradients of quantized weights, FP8 or FP8_E5M2.
  config.kernel_gradient_format = "none"

  model = {
    field.name: None if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(TransformerConfig)
    if not field.name.endswith("_format") and field.name != "dtype"
  }
  model |= {name: 0 for name in ("layers", "width", "heads", "vocabulary")}
  model["capacity_factor"] = config_dict.placeholder(float)
  config.model = model  # See TransformerConfig.
  # What to start from, of this very model: the folder of a Hugging Face checkpoint, or a GGUF file;
  # "" draws parameters.
  config.init_from = ""
  config.dtype = "float32"  # Of activations; bfloat16 is slow on CPU.
  config.gradient_dtype = "float32"  # Of the quantized weights' gradients.

  config.data = {
    "path": "",  # Folder made by scripts/prepare_data.py; "" is Python's standard library as bytes.
    "verify": True,  # Whether to hold every shard against its sha256 before training.
  }
  config.batch_size = 1  # Sequences per step, on all devices together.
  config.length = 1  # Tokens per sequence.
  config.steps = 1
  # Parts of a batch whose gradients are computed one after another; fewer where devices would be
  # left without a sequence.
  config.accumulation = 1

  # Whether each layer is stepped as soon as its gradient is there, see eco_optax.value_and_step: no
  # more than one layer's gradient exists, and a layer's activations are made again.
  config.release = False
  # What `release` keeps each layer's input in, until the layer is made again: FP8_TOKEN is a byte
  # per number, "none" is `dtype`.
  config.kept_format = "none"

  # In which `release` sums the gradients of matrices over devices; float32 takes twice the traffic.
  config.reduce_dtype = "bfloat16"
  # Whether `release` keeps each device's part of all gradients and takes all steps at the end: an
  # exact clip then goes backwards once. On a mesh that splits parameters these parts are small.
  config.keep_gradients = False

  # What devices send each other of their gradients: "none" sums them in `gradient_dtype`; fp8,
  # int4, int3, int2, sign, top_k or random_k is a compressor of eco_optax.wire, of default values.
  # What is lost comes back by `wire_method`: error_feedback, ef21 or econtrol. It is for meshes
  # whose only axis is data.
  config.wire = "none"
  config.wire_method = "error_feedback"

  # Groups of sequences whose gradients are computed separately and summed in order: any number of
  # devices that divides the groups trains the same weights, bit for bit. Each device then holds a
  # whole gradient. 0: gradients are summed in the fastest order.
  config.reduction_groups = 0

  # Sizes of the mesh's axes: -1 takes the devices that are left. Of several -1, fsdp takes them.
  config.mesh = {"data": 1, "fsdp": -1, "tensor": 1, "expert": 1}
  # The largest array that a mesh may leave whole on each device. 64 MiB are 0.4% of a v5e's memory
  # and less than the smallest embedding of the paper's models, 78 MiB.
  config.replicated_limit_mib = 64

  config.optimizer = {
    # Or nadamw, amsgrad, ademamix, yogi, radam, sgd, soap, shampoo or muon; see methods.py.
    "name": "adamw",
    "learning_rate": 1e-3,  # The schedule's peak.
    "start_fraction": 0.01,  # Of the peak, where the linear warm-up starts.
    "warmup_fraction": 0.1,  # Of the steps.
    "end_fraction": 0.1,  # Of the peak, where the cosine ends.
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-9,
    "weight_decay": 0.1,
    "max_norm": 1.0,  # Of the gradient, which is clipped to it.
    # By whose norm: "exact" is the whole gradient's, for which `release` goes backwards twice;
    # "previous" is that of the step before, which costs nothing, and leaves the first step as it
    # is; with `release` also "layer", each layer's own.
    "clip": "exact",
  }

  config.checkpoint = {
    "every": 1000,  # Steps between checkpoints; the last step has one too. 0 saves none.
    "keep": 2,  # Latest checkpoints to keep, beside the best.
    "folder": "",  # Where they are, such as gs://bucket/run; "" is <workdir>/checkpoints.
  }
  config.log_every = 20
  config.evaluate_every = 200
  config.evaluate_batches = 32  # Per evaluation but the last.
  config.evaluate_batches_at_end = 0  # Of the last evaluation; 0 takes the whole split.
  config.tensorboard = False  # Whether to write TensorBoard events beside metrics.jsonl.

  # At a loss or gradient that is not finite: "stop" with an error, "skip" the update and count it,
  # or "record" the run as diverged. It reaches neither weights nor moments.
  config.nonfinite = "stop"
  return config.lock()


def scaling_study(
  layers: int, width: int, learning_rate: float, steps: int
) -> config_dict.ConfigDict:
  """The settings of the paper's scaling study, which has one size per config file."""
  config = defaults()
  config.model.update(layers=layers, width=width, heads=width // 128, vocabulary=32128)
  config.model.update(remat="full", loss_chunks=4)
  config.dtype = config.gradient_dtype = "bfloat16"
  config.mesh.update(data=-1, fsdp=-1)
  config.batch_size = config.length = 512
  config.accumulation = 4
  config.steps = steps
  config.optimizer.learning_rate = learning_rate
  config.log_every = 100
  config.evaluate_every = 1000
  return config


def small() -> config_dict.ConfigDict:
  """The settings of runs that fit two CPU cores: bytes of the Python standard library."""
  config = defaults()
  config.model.vocabulary = 256
  config.batch_size = 16
  config.length = 128
  config.steps = 400
  config.optimizer.learning_rate = 2e-3
  config.evaluate_every = config.checkpoint.every = 100
  config.evaluate_batches = 16
  return config


_Check = tuple[Callable[[Any], bool], str]
_one_of = lambda *names: (lambda value: value in names, f"one of {', '.join(names)}")
_positive: _Check = (lambda value: value > 0, "above 0")
_natural: _Check = (lambda value: value >= 0, "0 or more")
_fraction: _Check = (lambda value: 0 <= value <= 1, "between 0 and 1")
_decay: _Check = (lambda value: 0 < value < 1, "above 0 and below 1")

RANGES: dict[str, _Check] = {
  "seed": (lambda value: 0 <= value < 2**32, "0 or more and below 2^32"),
  "method": _one_of(*methods.BY_NAME),
  "residual": _one_of("float32", "int16", "bfloat16", "int12", "int8"),
  "moments.mu": _one_of(*DTYPES),
  "moments.nu": _one_of(*SECOND_DTYPES),
  "format": _one_of(*sorted(FORMATS)),
  "activation_format": _one_of("none", *sorted(FORMATS)),
  "gradient_format": _one_of("none", "FP8_E5M2_TOKEN", "FP8_TOKEN"),
  "kernel_gradient_format": _one_of("none", "FP8", "FP8_E5M2"),
  "kept_format": _one_of("none", "FP8_TOKEN"),
  "model.layers": _positive,
  "model.width": _positive,
  "model.heads": _positive,
  "model.vocabulary": _positive,
  "model.kv_heads": _natural,
  "model.head_width": _natural,
  "model.mlp_width": _natural,
  "model.norm_epsilon": _positive,
  "model.rope_base": _positive,
  "model.local_rope_base": _positive,
  "model.logit_cap": _natural,
  "model.query_scalar": _natural,
  "model.attention_cap": _natural,
  "model.rope_factor": (lambda value: value >= 1, "1 or more"),
  "model.local_rope_factor": (lambda value: value >= 1, "1 or more"),
  "model.rope_length": _natural,
  "model.rope_low": _positive,
  "model.rope_high": _positive,
  "model.window": _natural,
  "model.global_every": _positive,
  "model.experts": _natural,
  "model.shared_experts": _natural,
  "model.capacity_factor": (lambda value: value is None or value > 0, "above 0, or None"),
  "model.balance_weight": _natural,
  "model.separator": (lambda value: value >= -1, "a token, or -1"),
  "model.loss_chunks": _positive,
  "model.vocabulary_parts": _positive,
  "dtype": _one_of(*_DTYPES),
  "gradient_dtype": _one_of(*_DTYPES),
  "reduce_dtype": _one_of(*_DTYPES),
  "wire": _one_of("none", *eco.wire.COMPRESSORS),
  "wire_method": _one_of(*methods.WIRE_METHODS),
  "batch_size": _positive,
  "length": _positive,
  "steps": _positive,
  "accumulation": _positive,
  "reduction_groups": _natural,
  "replicated_limit_mib": _natural,
  **{f"mesh.{axis}": (lambda n: n > 0 or n == -1, "above 0, or -1") for axis in sharding.AXES},
  "stochastic_after": _fraction,
  "optimizer.name": _one_of(*methods.NAMES),
  "optimizer.learning_rate": _positive,
  "optimizer.start_fraction": _fraction,
  "optimizer.warmup_fraction": _fraction,
  "optimizer.end_fraction": _fraction,
  "optimizer.b1": _decay,
  "optimizer.b2": _decay,
  "optimizer.eps": _positive,
  "optimizer.weight_decay": _natural,
  "optimizer.max_norm": _positive,
  "optimizer.clip": _one_of("exact", "previous", "layer"),
  "checkpoint.every": _natural,
  "checkpoint.keep": _positive,
  "nonfinite": _one_of("stop", "skip", "record"),
  "log_every": _positive,
  "evaluate_every": _positive,
  "evaluate_batches": _positive,
  "evaluate_batches_at_end": _natural,
}


def flat(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, Any]:
  """Values by the names that flags give them, such as `optimizer.learning_rate`."""
  out: dict[str, Any] = {}
  for key, value in config.items():
    nested = isinstance(value, config_dict.ConfigDict)
    out |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
  return out


def validate(config: config_dict.ConfigDict) -> None:
  """Checks a config before anything is computed.

  Raises:
    ValueError: naming every key that is missing, unknown (with its nearest match), of another
      type or out of its range, with its value and the values allowed.
  """
  import difflib

  wanted, given = flat(defaults()), flat(config)
  problems = [f"{key} is missing" for key in wanted if key not in given]
  for key, value in given.items():
    if key not in wanted:
      near = difflib.get_close_matches(key, wanted, 1)
      problems.append(f"unknown key {key}" + (f": did you mean {near[0]}?" if near else ""))
      continue
    kind = type(wanted[key])
    if wanted[key] is not None and not isinstance(value, kind):
      problems.append(f"{key} must be of type {kind.__name__}, got {value!r}")
      continue
    if isinstance(value, float) and not math.isfinite(value):
      problems.append(f"{key} must be finite, got {value!r}")
      continue
    check, text = RANGES.get(key, (lambda value: True, ""))
    if not check(value):
      problems.append(f"{key} must be {text}, got {value!r}")
  if not problems:
    if config.batch_size % config.accumulation:
      problems.append(
        f"accumulation {config.accumulation} does not divide batch_size {config.batch_size}"
      )
    if config.length % config.model.loss_chunks:
      problems.append(
        f"model.loss_chunks {config.model.loss_chunks} does not divide length {config.length}"
      )
    if (
      config.reduction_groups and config.batch_size // config.accumulation % config.reduction_groups
    ):
      problems.append(
        f"reduction_groups {config.reduction_groups} does not divide batch_size"
        f" {config.batch_size} / accumulation {config.accumulation}"
      )
    if config.reduction_groups and config.moments.nu == "factored":
      problems.append(
        "moments.nu 'factored' and reduction_groups exclude each other: means over a split axis are"
        " sums in an order that depends on the devices; set one of them"
      )
    if config.reduction_groups and config.optimizer.name in methods.MATRIX_OPTIMIZERS:
      problems.append(
        f"optimizer.name {config.optimizer.name!r} and reduction_groups exclude each other: its"
        " products over a split axis are sums in an order that depends on the devices; set one of"
        " them"
      )
    name, family = config.optimizer.name, methods.of(config).family
    if name in methods.CARRY_NOTHING_BACK and family == methods.ECO:
      problems.append(
        f"method {config.method!r} puts errors in a momentum, which that of optimizer.name {name!r}"
        " does not carry back: set method 'mw_rtn' and residual 'int8'"
      )
    if config.optimizer.name == methods.MUON and not hasattr(optax.contrib, "MuonDimensionNumbers"):
      problems.append(
        f"optimizer.name 'muon' needs Optax 0.2.6 for stacks of matrices, found {optax.__version__}"
      )
    if config.wire != "none":
      for key in ("release", "reduction_groups"):
        if config[key]:
          problems.append(
            f"wire {config.wire!r} and {key} {config[key]} exclude each other: gradients are"
            " exchanged once all of them are there, as each device's own; set one of them"
          )
    problems += _release_problems(config)
    try:
      gradient_format = model(config).gradient_format
    except ValueError as error:
      problems.append(f"model: {error}")
    else:
      if gradient_format:
        try:
          check_gradient_format(gradient_format, FORMATS[config.format])
        except ValueError as error:
          problems.append(f"format {config.format}: {error}")
  if problems:
    raise ValueError("config: " + "; ".join(problems))


def _release_problems(config: config_dict.ConfigDict) -> list[str]:
  """What does not go together with `release`, or not without."""
  if not config.release:
    given = {key: config[key] for key in ("kept_format", "keep_gradients")}
    given["optimizer.clip"] = config.optimizer.clip
    only = ("layer", "FP8_TOKEN", True)
    return [f"{key} {x!r} needs release" for key, x in given.items() if x in only]
  problems = []
  if config.keep_gradients and config.optimizer.clip == "layer":
    problems.append("keep_gradients and optimizer.clip 'layer' exclude each other: set one of them")
  if methods.of(config).rounding is None:
    problems.append(f"release steps packed weights, which method {config.method!r} has none of")
  if config.reduction_groups and config.mesh.tensor > 1:
    problems.append(
      f"release and reduction_groups {config.reduction_groups} have each device compute groups by"
      f" itself, and exclude mesh.tensor {config.mesh.tensor}: set it to 1"
    )
  if (unroll := config.model.unroll) > 1:
    problems.append(f"release takes one layer at a time: set model.unroll to 1, not {unroll}")
  return problems


def formats(config: config_dict.ConfigDict) -> tuple[eco.Format | None, eco.Format | None]:
  """The formats of the weights and of the activations; None is float."""
  if methods.of(config).rounding is None:
    return None, None
  return FORMATS[config.format], FORMATS.get(config.activation_format)


def model(config: config_dict.ConfigDict) -> TransformerConfig:
  """The model of a run; the BF16 baseline computes in bfloat16 whatever the others do."""
  weights, activation_format = formats(config)
  format_of = lambda name: FORMATS.get(name) if weights else None
  return TransformerConfig(
    **config.model,
    dtype=config.dtype if weights else "bfloat16",
    activation_format=activation_format,
    gradient_format=format_of(config.gradient_format),
    kernel_gradient_format=format_of(config.kernel_gradient_format),
  )
