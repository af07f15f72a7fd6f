"""Evaluates a run: python scripts/evaluate.py --workdir=runs/stdlib_1m.

Without more it gives loss and perplexity over the whole validation split. --data=… takes other
prepared data, --prompt=… shows what the run writes, and --tasks=… runs tasks of lm-eval.
"""

import json
import pathlib
from typing import Any

from absl import flags, logging

from eco_optax.training import evaluation, jobs, metrics, report
from eco_optax.training.data import readers

_WORKDIR = jobs.define_path("workdir", "runs/stdlib_1m", "Folder of a run, finished or not.")
_DATA = jobs.define_path("data", None, "Folder of prepared data; without, the run's own.")
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "train"], "Of the data.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to go on with, instead of a loss.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "To write after the prompt, at most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; 1 draws.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_TASKS = flags.DEFINE_list("tasks", None, "Of lm-eval, such as arc_easy,hellaswag,piqa.")
_TASK_FOLDER = jobs.define_path("task_folder", None, "Folder with your own tasks.")
_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each question of a task.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of each task.")
_OUTPUT = jobs.define_path("output", None, "File for the figures, in JSON.")


def measure(trained: evaluation.Trained) -> dict[str, Any]:
  """The figures that are asked for, printed as well."""
  if _PROMPT.value is not None:
    prompt = trained.tokenizer.encode(_PROMPT.value).tolist() or [trained.tokenizer.separator]
    written = list(trained.generate(prompt, _TOKENS.value, _TEMPERATURE.value, _SEED.value))
    text = trained.tokenizer.decode(written)
    print(_PROMPT.value + text)
    return {"prompt": _PROMPT.value, "text": text, "tokens": written}
  if _TASKS.value:
    readers.need("lm_eval", "--tasks", "eval")
    from eco_optax.training import lm_eval_model

    results = lm_eval_model.run(
      trained, _TASKS.value, _TASK_FOLDER.value, _FEWSHOT.value, _LIMIT.value
    )
    for task, row in results.items():
      for name, value in row.items():
        if isinstance(value, float):
          print(f"{task:<24} {name:<32} {value:.4f}")
    return {"tasks": results}
  found = evaluation.evaluate(trained, evaluation.open_data(trained, _DATA.value), _SPLIT.value)
  print(f"loss        {found.loss:.4f} nats per token, over {found.tokens:,}")
  print(f"perplexity  {found.perplexity:.3f}")
  if found.nats_per_byte is not None:
    print(f"per byte    {found.nats_per_byte:.4f} nats")
  return {"split": _SPLIT.value, "data": _DATA.value, **found._asdict()}


def main(_: list[str]) -> None:
  """Measures and writes."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  trained = evaluation.load(_WORKDIR.value)
  print(f"{_WORKDIR.value} at step {trained.step} of {trained.config.steps}")
  figures = measure(trained) | {"workdir": _WORKDIR.value, "step": trained.step}
  if _OUTPUT.value:
    text = json.dumps(figures | report.describe_machine(), indent=2, default=str) + "\n"
    metrics.write_whole(pathlib.Path(_OUTPUT.value), text)


if __name__ == "__main__":
  jobs.run(main)
