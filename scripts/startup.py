"""Measures what passes before the first step, compiled for devices that may be absent.

python scripts/startup.py --topology=cpu
python scripts/startup.py --topology=h100:1     # With the extra [cuda].
python scripts/startup.py --topology=v5p:2x2x1  # With the extra [tpu].
"""

import os

# The compilers are asked for by name; JAX itself runs on this machine's CPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import json
import pathlib
import sys

from absl import flags

from eco_optax.training import jobs, report

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # experiments/ is not installed.
from experiments import startup

_ROOT = pathlib.Path(__file__).parents[1]
_TOPOLOGY = flags.DEFINE_enum("topology", "cpu", list(startup.MODELS), "What to compile for.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Processes that measure each way.", lower_bound=1)
_OUT = jobs.define_path("out", str(_ROOT / "results" / "startup.json"), "File of all figures.")


def main(_: list[str]) -> None:
  """Measures every way on one topology; the file keeps the figures of others."""
  out, topology = pathlib.Path(_OUT.value), _TOPOLOGY.value
  found = json.loads(out.read_text()) if out.exists() else {}
  rows = startup.study(topology, _REPEATS.value, lambda text: print(text, flush=True))
  model = startup.MODELS[topology]._asdict()
  found[topology] = {"rows": rows, "repeats": _REPEATS.value, **model, **report.describe_machine()}
  out.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
  jobs.run(main)
