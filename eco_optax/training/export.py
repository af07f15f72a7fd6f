"""Exports a trained run as a checkpoint for other libraries to serve."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import eco_optax as eco
from eco_optax.interop import compressed_tensors, hugging_face
from eco_optax.training import config as config_lib
from eco_optax.training import evaluation
from eco_optax.training.data import tokenizers


def export(
  trained: evaluation.Trained,
  folder: str | pathlib.Path,
  kind: str | None = None,
  dtype: Any = "float32",
  activations: str = "served",
) -> eco.Format | None:
  """Writes weights, config.json and tokenizer; codes and scales are the trained ones, bit for bit.

  Args:
    trained: from `evaluation.load`.
    folder: must not exist; created atomically.
    kind: of `config_json.FAMILIES`; None takes the first that the model fits.
    dtype: of weights that are not packed.
    activations: "trained", which is refused where no server rounds activations so beside such
      weights; "float"; or "served": trained where they can be served, else float.

  Returns:
    The format of activations in config.json; None for floats.

  Raises:
    FileExistsError: if the folder exists.
    ValueError: if the model is of no family, its format is not one of compressed-tensors, or
      `activations` is none of the three or cannot be served.
    ImportError: if a package is missing, naming the remedy.
  """
  if activations not in ("served", "trained", "float"):
    raise ValueError(f"activations {activations!r} is none of served, trained, float")
  config, model = trained.config, trained.model
  weights, rounded = config_lib.formats(config)
  if weights is None or activations == "float":
    rounded = None
  elif activations == "served":
    rounded = compressed_tensors.served_activations(weights, rounded)
  description, length = trained.corpus["tokenizer"], config.length
  data = pathlib.Path(config.data.path or ".")
  hugging_face.save(
    folder,
    trained.params,
    dataclasses.replace(model, activation_format=rounded),
    kind=kind,
    dtype=dtype,
    length=length,
    more={"eos_token_id": trained.tokenizer.ends[-1]},
    finish=lambda out: tokenizers.save_for_transformers(data, description, out, length),
  )
  return rounded
