"""Fine-tunes a pretrained model on chats, and shows what changed: make finetune.

It measures the loss on held-out chats and asks a question before and after, exports the run, and
asks transformers with the export the same question. What it found is in finetune.json beside the
run.
"""

import json
import pathlib
import resource
import shutil
import subprocess
import sys

from absl import flags, logging

from eco_optax.training import evaluation, export, jobs, loop, report

ROOT = pathlib.Path(__file__).parents[1]

_CONFIG = jobs.define_config("config", str(ROOT / "configs" / "smollm2_135m.py"))
_WORKDIR = jobs.define_path("workdir", "runs/smollm2/run", "Folder for metrics and checkpoints.")
_QUESTION = flags.DEFINE_string("question", "What does json.dumps do?", "Asked before and after.")
_TOKENS = flags.DEFINE_integer("tokens", 48, "Of an answer, at most.", lower_bound=1)


def _measure(trained: evaluation.Trained, when: str) -> tuple[float, str]:
  """The loss on held-out chats, and the answer to the question; shows both."""
  loss = evaluation.evaluate(trained, evaluation.open_data(trained, None)).loss
  messages = [{"role": "user", "content": _QUESTION.value}]
  text = "".join(evaluation.answer(trained, messages, _TOKENS.value))
  print(f"\n{when}: {loss:.4f} nats per held-out token\n> {_QUESTION.value}\n{text}\n", flush=True)
  return loss, text


def main(_: list[str]) -> None:
  """Trains, exports and serves."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity("error")  # Orbax tells of every step of its own.
  config, out = _CONFIG.value, pathlib.Path(_WORKDIR.value) / "exported"
  before, answer = _measure(evaluation.begin(config), "before")
  summary = loop.train(config, _WORKDIR.value)
  trained = evaluation.load(_WORKDIR.value)
  after, text = _measure(trained, "after")
  shutil.rmtree(out, ignore_errors=True)
  export.export(trained, out)
  command = [sys.executable, str(ROOT / "scripts" / "generate.py"), f"--exported={out}"]
  command += [f"--prompt={_QUESTION.value}", f"--tokens={_TOKENS.value}"]
  served = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  print(f"transformers, with {out}:\n{served}")
  size = sum(path.stat().st_size for path in out.iterdir())
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  rows = {
    "parameters": f"{summary['parameters']:,}",
    "held-out loss": f"{before:.4f} before, {after:.4f} after",
    "weights and moments": f"{summary['bytes_per_parameter']['total']:.2f} bytes per parameter",
    "peak memory": f"{peak / 2**30:.2f} GiB, all of the process",
    "speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
    "export": f"{size / 1e6:,.0f} MB",
    "same answer": "yes" if served.strip() == text.strip() else "no",
  }
  answers = {"question": _QUESTION.value, "before": answer, "after": text}
  found = rows | {"answers": answers} | report.describe_machine()
  (out.parent / "finetune.json").write_text(json.dumps(found, indent=1) + "\n")
  print("\n".join(f"{name:<20}  {value}" for name, value in rows.items()))


if __name__ == "__main__":
  jobs.run(main)
