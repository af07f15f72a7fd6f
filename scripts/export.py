"""Exports a run for serving: python scripts/export.py --workdir=runs/stdlib_1m --output=exported.

The folder is a Hugging Face checkpoint in the compressed-tensors layout, with the trained codes and
scales bit for bit. It says how transformers and vLLM load it, and what they compute otherwise.
"""

import json
import pathlib

from absl import flags, logging

from eco_optax.interop import compressed_tensors, config_json
from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, export, jobs

_WORKDIR = jobs.define_path("workdir", "runs/stdlib_1m", "Folder of a run, finished or not.")
_OUTPUT = jobs.define_path("output", None, "Folder to make.", required=True)
_KIND = flags.DEFINE_enum(
  "kind",
  None,
  list(config_json.FAMILIES),
  "What config.json calls the model; without, what it is. transformers has no class of DeepSeek-MoE"
  " and serves it as qwen2_moe.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of weights that are not quantized."
)


_ACTIVATIONS = flags.DEFINE_enum(
  "activations",
  "served",
  ["served", "trained", "float"],
  "How a server rounds the inputs of quantized layers: as trained, not at all, or, with served, as"
  " trained where there is a server that does it beside such weights.",
)


def main(_: list[str]) -> None:
  """Reads the newest checkpoint and writes the folder."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity("error")  # Orbax tells of every step of its own.
  trained = evaluation.load(_WORKDIR.value)
  activations = export.export(trained, _OUTPUT.value, _KIND.value, _DTYPE.value, _ACTIVATIONS.value)
  folder = pathlib.Path(_OUTPUT.value)
  told = json.loads((folder / "config.json").read_text())
  stored = told.get("quantization_config")
  layout = stored["format"] if stored else "float"
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(f"{folder}: step {trained.step}, {told['model_type']}, {layout}, {size / 1e6:,.1f} MB.")
  weights, rounded = config_lib.formats(trained.config)
  if stored and activations != rounded:
    print(f"Activations are served in float; the run rounded them to {rounded}.")
  experts = trained.model.experts > 0
  print(_transformers(folder, told["model_type"], layout, activations is not None))
  serves, note = (
    compressed_tensors.vllm(weights, activations, experts) if stored and weights else (True, "")
  )
  print(f"vllm serve {folder}{note and ': ' + note}." if serves else f"{note}.")


def _transformers(folder: pathlib.Path, kind: str, layout: str, rounds: bool) -> str:
  if kind == "deepseek":
    return "transformers has no class of it: export with --kind=qwen2_moe too, to serve it there."
  # transformers fuses experts, and has no kernels for micro-scaled codes: both become floats.
  fused = kind in ("mixtral", "qwen2_moe", "qwen3_moe")
  widened = layout != "float" and (fused or layout.startswith(("mx", "nv")))
  more = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if widened else ""
  left_out = ", which leaves activations in float" if widened and rounds else ""
  return f"AutoModelForCausalLM.from_pretrained({str(folder)!r}{more}){left_out}."


if __name__ == "__main__":
  jobs.run(main)
