"""A trained run as a model of lm-eval (EleutherAI's Language Model Evaluation Harness)."""

from __future__ import annotations

from typing import Any

import numpy as np
from lm_eval import simple_evaluate, tasks
from lm_eval.api.model import TemplateLM

from eco_optax.training.evaluation import Trained


class TrainedLM(TemplateLM):
  """Scores and writes text for tasks; texts that are too long keep their ends."""

  def __init__(self, trained: Trained):
    super().__init__()
    self._trained = trained

  @property
  def eot_token_id(self) -> int:
    """The token behind each document, which stands before a text without context too."""
    return self._trained.tokenizer.separator

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Tokens of a text, none of them special."""
    del add_special_tokens, kwargs
    return self._trained.tokenizer.encode(string).tolist()

  def _loglikelihood_tokens(
    self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
  ) -> list[tuple[float, bool]]:
    del kwargs
    longest = self._trained.config.length + 1
    windows = []
    for _, context, continuation in requests:
      if len(continuation) >= longest:
        raise ValueError(
          f"a continuation of {len(continuation)} tokens does not fit in a window of {longest - 1}:"
          " use a model that was trained on longer ones"
        )
      windows.append(np.array((context + continuation)[-longest:]))
    scored = self._trained.scores(windows)
    return [
      (-float(nats[-len(own) :].sum(dtype=np.float64)), bool(greedy[-len(own) :].all()))
      for (_, _, own), (nats, greedy) in zip(requests, scored, strict=True)
    ]

  def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of whole texts; a window starts at the last token of the one before."""
    del disable_tqdm
    length, totals = self._trained.config.length, []
    for request in requests:
      tokens = np.array([self.eot_token_id, *self.tok_encode(request.args[0])])
      windows = [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
      scored = self._trained.scores(windows)
      totals.append(-sum(float(nats.sum(dtype=np.float64)) for nats, _ in scored))
    return totals

  def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
    """What follows each context, up to the first of its stop strings."""
    del disable_tqdm
    return [self._write(*request.args) for request in requests]

  def _write(self, context: str, arguments: dict[str, Any]) -> str:
    until = arguments.get("until") or []
    until = [until] if isinstance(until, str) else until
    temperature = arguments.get("temperature", 0.0) if arguments.get("do_sample") else 0.0
    prompt = self.tok_encode(context) or [self.eot_token_id]
    written: list[int] = []
    text = ""
    for token in self._trained.generate(prompt, arguments.get("max_gen_toks", 256), temperature):
      written.append(token)
      text = self._trained.tokenizer.decode(written)
      if any(stop in text for stop in until):
        break
    ends = [text.index(stop) for stop in until if stop in text]
    return text[: min(ends, default=len(text))]


def run(
  trained: Trained,
  names: list[str],
  folder: str | None = None,
  num_fewshot: int | None = None,
  limit: int | None = None,
) -> dict[str, Any]:
  """Runs tasks of lm-eval.

  Args:
    trained: from `evaluation.load`.
    names: of tasks; lm-eval's own tasks fetch their data from the network.
    folder: with your own tasks, in lm-eval's YAML.
    num_fewshot: examples before each question; None is as the task has it.
    limit: questions of each task; None takes all.

  Returns:
    By task, its metrics.
  """
  found = simple_evaluate(
    model=TrainedLM(trained),
    tasks=names,
    task_manager=tasks.TaskManager(include_path=folder),
    num_fewshot=num_fewshot,
    limit=limit,
    bootstrap_iters=0,
    log_samples=False,
  )
  return found["results"]  # type: ignore[index]
