"""Compares kernels stored (in, out) and (out, in) in compiled steps, for devices that are absent.

python scripts/layouts.py --topology=h100:1     # With the extra [cuda].
python scripts/layouts.py --topology=v5p:2x2x1  # With the extra [tpu].
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
from experiments import layouts

_ROOT = pathlib.Path(__file__).parents[1]
_TOPOLOGY = flags.DEFINE_enum(
  "topology", "h100:1", list(layouts.TOPOLOGIES), "What to compile for."
)
_OUT = jobs.define_path("out", str(_ROOT / "results" / "layouts.json"), "File of all figures.")


def main(_: list[str]) -> None:
  """Compiles each way and writes its figures beside those of other topologies."""
  out = pathlib.Path(_OUT.value)
  found = json.loads(out.read_text()) if out.exists() else {}
  rows = layouts.study(_TOPOLOGY.value, lambda text: print(text, flush=True))
  sizes = {name: getattr(layouts, name.upper()) for name in ("layers", "width", "hidden", "tokens")}
  found[_TOPOLOGY.value] = {"rows": rows, **sizes, **report.describe_machine()}
  out.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


if __name__ == "__main__":
  jobs.run(main)
