"""Measures steps: python scripts/benchmark.py --backend=cpu|cuda|tpu-aot|cuda-aot.

On this machine's CPU or GPU it times optimizer steps, random bits and whole training steps. For
TPUs and GPUs it compiles ahead of time, on any machine, and counts bytes. Figures go to
results/benchmark/, where a table and a chart are made of all that lie there.
With --config=configs/llama_3m.py it times that run's checkpoints instead.
"""

import json
import os
import pathlib
import re
import runpy
import sys
import tempfile
from typing import Any

import jax
from absl import flags

from eco_optax.training import jobs, report

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import benchmark

_ROOT = pathlib.Path(__file__).parents[1]
_AHEAD = {"tpu-aot": "v5p:2x2x1", "cuda-aot": "h100:1"}
_BACKEND = flags.DEFINE_enum("backend", "cpu", ["cpu", "cuda", *_AHEAD], "What to measure.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "To compile for ahead of time.")
_SIZE = flags.DEFINE_integer("size", 2**24, "Elements per array; a multiple of 4096.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Rounds of a timing.")
_CONFIG = jobs.define_config("config", None)  # Of a run whose checkpoints are timed.
_SAVES = flags.DEFINE_integer("saves", 10, "Checkpoints; the median counts.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results"), "Where figures go.")


def write(name: str, figures: dict[str, Any]) -> None:
  """Writes figures with the command, versions and machine."""
  out = pathlib.Path(_RESULTS.value) / f"{name}.json"
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(figures | report.describe_machine(), indent=2) + "\n")


def checkpoints() -> None:
  """Times a run's checkpoints."""
  with tempfile.TemporaryDirectory(dir=".") as folder:
    figures = benchmark.checkpoint(_CONFIG.value, pathlib.Path(folder).absolute(), _SAVES.value)
  write("checkpoint", figures)
  for name, value in figures.items():
    print(f"{name:<30} {value}")


def compiled() -> None:
  """Counts the bytes that steps move on a TPU or GPU, which may be absent."""
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  from eco_optax.training import compile as compile_lib

  topology = _TOPOLOGY.value or _AHEAD[_BACKEND.value]
  device = compile_lib.topology_devices(topology)[0]
  shape = (4096, _SIZE.value // 4096)
  figures = {
    "elements": _SIZE.value,
    "compiled_for": device.device_kind,
    "optimizer_step": benchmark.compiled_step(device, shape),
    "kernels": benchmark.kernel_traffic(device, shape),
  }
  write(f"benchmark/{_BACKEND.value.removesuffix('-aot')}_{topology.split(':')[0]}", figures)


def timed() -> None:
  """Times steps on this machine's devices."""
  if (found := jax.default_backend()) != {"cuda": "gpu"}.get(_BACKEND.value, _BACKEND.value):
    raise ValueError(
      f"--backend={_BACKEND.value}, but JAX runs on {found}: set JAX_PLATFORMS, or install"
      " eco_optax[cuda]"
    )
  kind = re.sub(r"\W+", "_", jax.devices()[0].device_kind.lower())
  # A model that takes the device long enough for its launches not to count.
  name = {"cpu": "stdlib_1m", "cuda": "packages_30m"}[_BACKEND.value]
  config = runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]()
  config.batch_size, config.accumulation = config.batch_size // config.accumulation, 1
  figures = {
    "elements": _SIZE.value,
    "rounds": _REPEATS.value,
    "trained": f"{name}, {config.batch_size} × {config.length} tokens",
  }
  for key, measure in {
    "optimizer_step": lambda n: benchmark.optimizer_step((4096, _SIZE.value // 4096), n),
    "random_bits": lambda n: benchmark.random_bits(_SIZE.value, n),
    "training_step": lambda n: benchmark.training_step(config, n),
  }.items():
    figures[key] = measure(_REPEATS.value)
    write(f"benchmark/{kind}", figures)  # What there is, should the next one fail.


def main(_: list[str]) -> None:
  """Measures, writes and prints."""
  if _SIZE.value < 4096 or _SIZE.value % 4096:
    raise ValueError(f"--size={_SIZE.value} is not a multiple of 4096")
  if _CONFIG.value:
    checkpoints()
    return
  if _BACKEND.value in _AHEAD:
    compiled()
  else:
    timed()
  results = pathlib.Path(_RESULTS.value)
  table = benchmark.table(results)
  (results / "benchmark" / "table.md").write_text(table)
  benchmark.plot(results)
  print(table)


if __name__ == "__main__":
  jobs.run(main)
