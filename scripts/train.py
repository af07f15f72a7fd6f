"""Pretrains: python scripts/train.py --config=configs/stdlib_1m.py --config.method=eco_sr."""

import pathlib

import jax
from absl import flags, logging

from eco_optax.training import jobs, loop

_CONFIG = jobs.define_config(
  "config", str(pathlib.Path(__file__).parents[1] / "configs" / "stdlib_1m.py")
)
_WORKDIR = jobs.define_path("workdir", "runs/stdlib_1m", "Folder for metrics and figures.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print config, parameters and memory, and exit.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Join the processes of all hosts; the same command runs on each."
)
# As in jax.distributed.initialize, where there is neither a TPU pod, Slurm nor the like to ask.
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of the first process.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def main(_: list[str]) -> None:
  """Runs the config, or goes on with it."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Libraries say what they do at every checkpoint.
  if _DISTRIBUTED.value:
    jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if _DRY_RUN.value:
    print(loop.dry_run(_CONFIG.value))
  else:
    loop.train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  jobs.run(main)
