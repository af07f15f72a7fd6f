"""Exports a trained run as a checkpoint for other libraries to serve."""

from __future__ import annotations

import pathlib
from typing import Any

from eco_optax.interop import hugging_face
from eco_optax.training import evaluation
from eco_optax.training.data import tokenizers


def export(
  trained: evaluation.Trained,
  folder: str | pathlib.Path,
  kind: str | None = None,
  dtype: Any = "float32",
) -> None:
  """Writes weights, config.json and tokenizer; codes and scales are the trained ones, bit for bit.

  Args:
    trained: from `evaluation.load`.
    folder: must not exist; created atomically.
    kind: of `config_json.FAMILIES`; None takes the first that the model fits.
    dtype: of weights that are not packed.

  Raises:
    FileExistsError: if the folder exists.
    ValueError: if the model is of no family, or its format is not one of compressed-tensors.
    ImportError: if a package is missing, naming the remedy.
  """
  config = trained.config
  description, length = trained.corpus["tokenizer"], config.length
  data = pathlib.Path(config.data.path or ".")
  hugging_face.save(
    folder,
    trained.params,
    trained.model,
    kind=kind,
    dtype=dtype,
    length=length,
    more={"eos_token_id": trained.tokenizer.separator},
    finish=lambda out: tokenizers.save_for_transformers(data, description, out, length),
  )
