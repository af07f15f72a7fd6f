"""Compiles a step ahead of time: --config=configs/llama_800m.py --topology=v5p:4x4x4, or --all."""

import os

# The compiler for TPUs is asked for by name; JAX itself runs on this machine's CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import json
import pathlib
import runpy

from absl import flags

from eco_optax.training import compile as compile_lib
from eco_optax.training import jobs
from eco_optax.training import report as report_lib

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = jobs.define_config("config", str(_ROOT / "configs" / "llama_30m.py"))
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "Such as v5e:4x4, v5p:4x4x4 or h100:1.")
_OUT = jobs.define_path("out", None, "JSON file for the report.")
_HLO = jobs.define_path("hlo", None, "File for the compiled program, to read.")
_ALL = flags.DEFINE_bool("all", False, "Every config of the paper, ECO and master weights.")
_RESULTS = jobs.define_path("results", str(_ROOT / "results" / "compile"), "Folder of --all.")


def _compile(config, topology: str, out: str | pathlib.Path | None) -> dict:
  """Compiles, prints and writes one report."""
  show = lambda text: print(text, flush=True)
  devices = compile_lib.topology_devices(topology)
  compiled, report = compile_lib.compile_step(config, devices, show)
  print(compile_lib.report_text(report), flush=True)
  report |= {"topology": topology, "config": config.to_dict(), **report_lib.describe_machine()}
  if _HLO.value:
    pathlib.Path(_HLO.value).write_text(compiled.as_text())
  if out:
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(out).write_text(json.dumps(report, indent=1) + "\n")
  return report


def _compile_all(results: pathlib.Path) -> None:
  """Compiles the runs that have no report yet, and writes the table of all."""
  reports = {}
  for name, topology in compile_lib.TOPOLOGIES.items():
    pair = []
    for method in ("eco_sr", "mw_sr"):
      out = results / f"{name}_{method}.json"
      if not out.exists():
        print(f"\n{name}, {method}, {topology.name}", flush=True)
        config = runpy.run_path(str(_ROOT / "configs" / f"{name}.py"))["get_config"]()
        config.method = method
        config.mesh.update(topology.mesh)
        _compile(config, topology.name, out)
      pair.append(json.loads(out.read_text()))
    reports[name] = (pair[0], pair[1])
    (results / "table.md").write_text(compile_lib.table(reports))
  print(compile_lib.table(reports))


def main(_: list[str]) -> None:
  """Compiles one config or all."""
  if _ALL.value:
    _compile_all(pathlib.Path(_RESULTS.value))
  else:
    _compile(_CONFIG.value, _TOPOLOGY.value, _OUT.value)


if __name__ == "__main__":
  jobs.run(main)
