"""Times random bits and optimizer steps: python scripts/benchmark.py.

With --config=configs/llama_3m.py it times that run's checkpoints. With --topology=v5p:2x2x1 it
counts what fused steps move on a TPU, which need not be there.
"""

import json
import os
import pathlib
import tempfile
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from eco_optax.training import benchmark, report

_ROOT = pathlib.Path(__file__).parents[1]
_SIZE = flags.DEFINE_integer("size", 2**25, "Elements per array; a multiple of 4096.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Rounds, of which the median counts.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "Of a run whose checkpoints are timed.")
_SAVES = flags.DEFINE_integer("saves", 10, "Checkpoints, of which the median counts.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Of a TPU to compile for; nothing is timed.")
_OUT = flags.DEFINE_string("out", None, "Where figures go; by default a file in results/.")


def write(name: str, figures: dict[str, Any]) -> None:
  """Writes figures with the command, versions and machine."""
  out = pathlib.Path(_OUT.value or _ROOT / "results" / f"{name}.json")
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(figures | report.describe_machine(), indent=2) + "\n")


def main(_: list[str]) -> None:
  """Measures, prints and writes."""
  if _CONFIG.value:
    with tempfile.TemporaryDirectory(dir=".") as folder:
      figures = benchmark.checkpoint(_CONFIG.value, pathlib.Path(folder).absolute(), _SAVES.value)
    write("checkpoint", figures)
    return
  if _TOPOLOGY.value:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from eco_optax.training import compile as compile_lib

    device = compile_lib.topology_devices(_TOPOLOGY.value)[0]
    traffic = benchmark.kernel_traffic(device, (4096, _SIZE.value // 4096))
    for name, row in traffic.items():
      print(f"{name:<14} {row['moved']:7.3f} bytes moved, {row['temporaries']:.4f} temporaries")
    write("kernels", {"bytes_per_parameter": traffic, "compiled_for": device.device_kind})
    return
  figures = {
    "random_bits": benchmark.random_bits(_SIZE.value, _REPEATS.value),
    "optimizer_step": benchmark.optimizer_step(_SIZE.value, _REPEATS.value),
  }
  for study, rows in figures.items():
    print(f"{study}, {_SIZE.value:,} elements")
    for name, row in rows.items():
      print(f"  {name:<30} {row['milliseconds']:9.1f} ms  {row['ratio']:6.2f}×")
  write("benchmark", figures)


if __name__ == "__main__":
  app.run(main)
