"""Chats with a run: python scripts/generate.py --workdir=runs/chat --prompt='What is a float?'.

Without --prompt it answers line after line of the terminal, and remembers what was said; an empty
line begins anew. Questions are put as the run's chats are, in the template of its model.
--exported=FOLDER asks what scripts/export.py wrote, by way of transformers.
"""

import sys
from collections.abc import Callable, Iterable

from absl import flags, logging

from eco_optax.training import evaluation, jobs
from eco_optax.training.data import chats, readers

_WORKDIR = jobs.define_path("workdir", "runs/smollm2/run", "Folder of a run, finished or not.")
_EXPORTED = jobs.define_path("exported", None, "Folder of an export, in place of a run.")
_PROMPT = flags.DEFINE_string("prompt", None, "One question; without, each line of the terminal.")
_TOKENS = flags.DEFINE_integer("tokens", 200, "Of an answer, at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token; 1 draws.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")

_Answer = Callable[[list[chats.Message]], Iterable[str]]


def _of_run(workdir: str) -> _Answer:
  trained = evaluation.load(workdir)
  print(f"{workdir} at step {trained.step} of {trained.config.steps}", flush=True)
  return lambda messages: evaluation.answer(
    trained, messages, _TOKENS.value, _TEMPERATURE.value, _SEED.value
  )


def _of_export(folder: str) -> _Answer:
  """Answers of transformers."""
  transformers = readers.need("transformers", "--exported", "interop")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
  transformers.set_seed(_SEED.value)
  drawn = {"do_sample": True, "temperature": _TEMPERATURE.value, "top_k": 0}

  def answer(messages: list[chats.Message]) -> Iterable[str]:
    ids = tokenizer.apply_chat_template(
      messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    more = drawn if _TEMPERATURE.value else {"do_sample": False}
    written = model.generate(**ids, max_new_tokens=_TOKENS.value, **more)
    new = written[0, ids["input_ids"].shape[1] :]
    yield tokenizer.decode(new, skip_special_tokens=True)

  return answer


def _say(answer: _Answer, messages: list[chats.Message]) -> str:
  """Shows an answer as it is written."""
  text = ""
  for piece in answer(messages):
    print(piece, end="", flush=True)
    text += piece
  print(flush=True)
  return text


def main(_: list[str]) -> None:
  """Answers one question, or all."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity("error")  # Orbax tells of every step of its own.
  answer = _of_export(_EXPORTED.value) if _EXPORTED.value else _of_run(_WORKDIR.value)
  if _PROMPT.value is not None:
    _say(answer, [{"role": "user", "content": _PROMPT.value}])
    return
  messages: list[chats.Message] = []
  ask = "> " if sys.stdin.isatty() else ""
  print(ask, end="", flush=True)
  for line in sys.stdin:
    if line.strip():
      messages.append({"role": "user", "content": line.strip()})
      try:
        messages.append({"role": "assistant", "content": _say(answer, messages)})
      except ValueError as error:
        print(f"error: {error}")
        del messages[-1:]
    else:
      messages = []
    print(ask, end="", flush=True)


if __name__ == "__main__":
  jobs.run(main)
