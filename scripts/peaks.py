"""What the README's lines take at their peak on an unrolled model, compiled for an absent device.

python scripts/peaks.py --topology=h100:1     # With the extra [cuda].
python scripts/peaks.py --topology=v5p:2x2x1  # With the extra [tpu].
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
from experiments import peaks

_ROOT = pathlib.Path(__file__).parents[1]
_TOPOLOGY = flags.DEFINE_enum("topology", "h100:1", list(peaks.DEVICES), "One of its devices.")
_OUT = jobs.define_path("out", str(_ROOT / "results" / "peaks"), "Folder of figures and table.")


def main(_: list[str]) -> None:
  """Compiles each way and writes its bytes and the table of all topologies."""
  out = pathlib.Path(_OUT.value)
  rows = peaks.study(_TOPOLOGY.value, lambda text: print(text, flush=True))
  sizes = {name: getattr(peaks, name.upper()) for name in ("layers", "width", "hidden", "tokens")}
  file = {"rows": rows, "topology": _TOPOLOGY.value, **sizes, **report.describe_machine()}
  out.mkdir(parents=True, exist_ok=True)
  peaks.path_of(out, _TOPOLOGY.value).write_text(json.dumps(file, indent=1) + "\n")
  (out / "table.md").write_text(peaks.table(peaks.read(out)))
  print(peaks.table(peaks.read(out)))


if __name__ == "__main__":
  jobs.run(main)
