"""Exports a run for serving: python scripts/export.py --workdir=runs/stdlib_1m --output=exported.

The folder is a Hugging Face checkpoint in the compressed-tensors layout, with the trained codes and
scales bit for bit. transformers and vLLM load it.
"""

import json
import pathlib

from absl import flags, logging

from eco_optax.interop import config_json
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


def main(_: list[str]) -> None:
  """Reads the newest checkpoint and writes the folder."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity("error")  # Orbax tells of every step of its own.
  trained = evaluation.load(_WORKDIR.value)
  export.export(trained, _OUTPUT.value, _KIND.value, _DTYPE.value)
  folder = pathlib.Path(_OUTPUT.value)
  told = json.loads((folder / "config.json").read_text())
  layout = told.get("quantization_config", {}).get("format", "float")
  size = sum(path.stat().st_size for path in folder.iterdir())
  print(
    f"{folder}: step {trained.step}, {told['model_type']}, {layout}, {size / 1e6:,.1f} MB."
    f" {_how_to_load(folder, told['model_type'], layout)}"
  )


def _how_to_load(folder: pathlib.Path, kind: str, layout: str) -> str:
  if kind == "deepseek":
    return "transformers has no class of it: export with --kind=qwen2_moe too, to serve it there"
  # Fused experts and micro-scaled codes become floats in transformers.
  widened = layout != "float" and (kind == "qwen2_moe" or layout.startswith(("mx", "nv")))
  more = ", quantization_config=CompressedTensorsConfig(dequantize=True)" if widened else ""
  return (
    f"Load it with AutoModelForCausalLM.from_pretrained({str(folder)!r}{more}) or vllm serve"
    f" {folder}"
  )


if __name__ == "__main__":
  jobs.run(main)
