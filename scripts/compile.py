"""Compiles a step for TPUs that are not there: --config=configs/llama_800m.py --topology=v5p:4x4x4."""

import os

# The compiler for TPUs is asked for by name; JAX itself runs on this machine's CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import json
import pathlib

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import compile as compile_lib
from eco_optax.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", None)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:4x4 or v5p:4x4x4.")
_OUT = flags.DEFINE_string("out", None, "JSON file for the report.")
_HLO = flags.DEFINE_string("hlo", None, "File for the compiled program, to read.")


def main(_: list[str]) -> None:
  """Compiles, prints and writes the report."""
  devices = compile_lib.topology_devices(_TOPOLOGY.value)
  show = lambda text: print(text, flush=True)
  compiled, report = compile_lib.compile_step(_CONFIG.value, devices, show)
  print(compile_lib.report_text(report))
  if _HLO.value:
    pathlib.Path(_HLO.value).write_text(compiled.as_text())
  if _OUT.value:
    path = pathlib.Path(_OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"topology": _TOPOLOGY.value, "config": _CONFIG.value.to_dict()}
    path.write_text(json.dumps(report | about | loop.describe_machine(), indent=1) + "\n")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  app.run(main)
