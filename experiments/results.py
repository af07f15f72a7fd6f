"""RESULTS.md: the paper's claims beside our measurements, from the files of all studies."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from eco_optax.training import methods
from experiments.studies import (
  claims,
  clips,
  families,
  finetune,
  four_bits,
  grid,
  nearest,
  optimizers,
  outliers,
  scale,
  storage,
  sweep,
)

_HEAD = """# What the paper claims, and what was measured

`python scripts/reproduce.py --study=results` writes this page from the files in [results](results);
each row names the command that makes its figures. The paper is
[arXiv 2601.22101](https://arxiv.org/abs/2601.22101).

Limits: the paper trains 30M to 800M parameters on 100 tokens of C4 for each, Gemma 3 1B, and a
mixture of experts of 2.1B, and fine-tunes DeepSeek-MoE-16B. Here most models have one to three
million parameters and train on half a million to five million tokens of source code and prose, or
on 20 million where a cell says 4 × tokens. The paper's 30M model was trained on 26 million tokens,
once per method. Losses are nats per token of the run's own tokenizer, so only differences compare.
The runs of `claims` were trained on NVIDIA H200 and H100 GPUs, which sum in no fixed order, and on
CPUs; each line of results/claims/runs.jsonl names its machine. The 30M runs used an H100, all
others two CPU cores. A cell with – has not been run.
"""


class _Missing(Exception):
  """A study has not been run."""


def _load(path: pathlib.Path) -> Any:
  if not path.exists():
    raise _Missing(path)
  return json.loads(path.read_text())


def _memory(results: pathlib.Path) -> str:
  rows = sweep.read(results / "claims" / "runs.jsonl")
  eco, master = (
    sweep.used_bytes(rows, claims.names(rows, method, "FP8"))
    for method in ("ECO + SR, schedule-aware", "master weights + SR")
  )
  if "–" in (eco, master):
    raise _Missing(rows)
  return (
    f"{eco}, counted from live arrays, scales included; master weights beside codes that are kept"
    f" {master}, 12 if codes are made anew at each step"
  )


def _stationary(results: pathlib.Path, method: str) -> str:
  rows = [r for r in _load(results / "theory" / "stationary.json")["rows"] if r["method"] == method]
  worst = max(abs(row["deviation"]) for row in rows)
  interval = max(row["half_interval"] for row in rows)
  return f"{len(rows)} settings within {worst:.2%} (99% intervals up to ±{interval:.2%})"


def _blow_up(results: pathlib.Path) -> str:
  rows = _load(results / "theory" / "stationary.json")["rows"]

  def ends(method: str, beta: float) -> tuple[float, float]:
    own = [r for r in rows if r["method"] == method and r["beta"] == beta and r["curvature"] == 1]
    own.sort(key=lambda row: row["learning_rate"])
    return own[0]["simulated"], own[0]["learning_rate"]

  beta = 0.9
  naive, rate = ends("naive", beta)
  eco, _ = ends("eco", beta)
  return (
    f"at η = {rate:g}, β = {beta:g}: naive {naive:.0f} σ² (σ²/2ηL is {1 / (2 * rate):.0f} σ²), ECO"
    f" {eco:.2f} σ² (σ²/(1−β²) is {1 / (1 - beta**2):.2f} σ²)"
  )


def _on_a_grid(results: pathlib.Path) -> str:
  rows = _load(results / "theory" / "grid.json")["rows"]
  smallest = min(row["learning_rate"] for row in rows)
  share = {
    (row["problem"], row["method"]): row["squared_gradient"] / row["rounded_optimum"]
    for row in rows
    if row["learning_rate"] == smallest
  }
  settled = lambda method: ", ".join(f"{share[problem, method]:.2f}" for problem in grid.PROBLEMS)
  return (
    f"not on a grid, whose noise shrinks with the update: E‖∇f‖² at η = {smallest:g}, in units of"
    f" the rounded optimum's, is {settled('naive')} for naive removal and {settled('eco')} for ECO"
    f" ({'; '.join(grid.PROBLEMS)})"
  )


def _bounds(results: pathlib.Path, rounding: str) -> str:
  rows = [r for r in _load(results / "theory" / "bounds.json")["rows"] if r["rounding"] == rounding]
  shares = [row["smallest_gradient"] / row["gradient_bound"] for row in rows]
  vacuous = sum(row["gradient_bound"] > row["gradient_limit"] ** 2 for row in rows)
  text = (
    f"holds in {sum(x <= 1 for x in shares)} of {len(rows)} settings, at most {max(shares):.1%}"
  )
  text += " of it"
  return text + (f"; in {vacuous} the bound is above G² and says nothing" if vacuous else "")


def _momentum(results: pathlib.Path) -> str:
  rows = _load(results / "theory" / "bounds.json")["rows"]
  shares = [row["momentum"] / row["momentum_bound"] for row in rows]
  return f"holds in all of {len(rows)}, at {min(shares):.0%} to {max(shares):.0%} of the bound"


def _similar(results: pathlib.Path) -> str:
  runs = _load(results / "theory" / "similarity.json")["runs"]
  # The first steps start from weights on the grid, whose errors are far smaller.
  settled = lambda run, key: [x for x in runs[run][key][20:] if x is not None]
  ratios, cosines = (settled("master weights + RTN", key) for key in ("norm_ratio", "cosine"))
  other = settled("ECO + SR", "cosine")
  return (
    f"ratio {min(ratios):.2f} to {max(ratios):.2f}; cosine {min(cosines):.2f}, where the learning"
    f" rate is highest, to {max(cosines):.2f}. With stochastic rounding the cosine is"
    f" {sum(other) / len(other):.3f}: there the rule rests on its virtual"
    " sequence, which asks nothing of errors"
  )


def _seeds(count: int) -> str:
  return f"{count} seed{'s' if count > 1 else ''}"


def _gap(results: pathlib.Path, method: str) -> str:
  """A method's gap to master weights in FP8, and in longer runs where there are some."""
  rows, cells = sweep.read(results / "claims" / "runs.jsonl"), []
  format = "none" if method == claims.BF16 else "FP8"
  for tokens, what in ((1, ""), (claims.LONGER, f" with {claims.LONGER} × tokens")):
    own = claims.names(rows, method, format, tokens)
    reference = claims.names(rows, claims.BASELINE, "FP8", tokens)
    loss, gap = sweep.compared(rows, own, reference)
    if loss != "–":
      shown = gap if gap != "–" else loss
      cells.append(f"{shown}{what}, {_seeds(sum(name in rows for name in own))}")
  if not cells:
    raise _Missing(method)
  return "; ".join(cells)


def _family(results: pathlib.Path, family: str) -> str:
  rows = sweep.read(results / "families" / "runs.jsonl")
  master, eco = (families.names(family, method) for method in families.METHODS)
  _, gap = sweep.compared(rows, eco, master)
  done = [rows[name] for name in eco if name in rows]
  if gap == "–":
    raise _Missing(family)
  return f"{gap} with {done[0]['parameters'] / 1e6:.1f}M parameters, {_seeds(len(done))}"


def _finetuned(results: pathlib.Path, method: str) -> str:
  """A method's gap to master weights in INT4 fine-tuning."""
  rows = sweep.read(results / "finetune" / "runs.jsonl")
  gap = finetune.gap(rows, method)
  if gap is None:
    raise _Missing(method)
  size = next(iter(rows.values()))["parameters"] / 1e6
  shown = f"{gap:+.4f}" if math.isfinite(gap) else "diverges"
  return f"{shown} with {size:.1f}M parameters, each at its best learning rate, one seed"


def _with_papers_rule(method: methods.Method) -> methods.Method:
  """The method as the paper runs it."""
  if method.family != methods.ECO:
    return method
  wanted = {"schedule_aware": False} | method.changes
  return next(found for found in methods.METHODS.values() if found.changes == wanted)


Measure = Callable[[pathlib.Path], str]


def _claims() -> list[tuple[str, str, Measure, str]]:
  """Claim, the paper's figure, our measurement, and the study."""
  theory = "scripts/theory.py"
  rows: list[tuple[str, str, Measure, str]] = [
    ("Weights and both moments, bytes per parameter", "12 → 9", _memory, "claims"),
  ]
  for key, name in (("master_weights", "master weights"), ("naive", "naive"), ("eco", "ECO")):
    measure = functools.partial(_stationary, method=key)
    rows.append((f"Stationary E[x̂²] on L x²/2, {name}", "closed form", measure, theory))
  rows += [
    ("As η → 0 naive removal grows as 1/η, ECO stays", "σ²/2ηL; σ²/(1−β²)", _blow_up, theory),
    ("The same with stochastic rounding to INT8", "as white noise", _on_a_grid, theory),
    (
      "min E‖∇f‖² is bounded, FP8, SR",
      "theorem",
      functools.partial(_bounds, rounding="stochastic"),
      theory,
    ),
    ("The same, RTN", "theorem", functools.partial(_bounds, rounding="nearest"), theory),
    ("Momentum stays bounded", "2G² + 2α²σ²/(1−β²)", _momentum, theory),
    (
      "Consecutive errors are alike",
      "ratio near 1, cosine high, lower at the peak",
      _similar,
      theory,
    ),
  ]
  baseline = claims.METHODS[claims.BASELINE]
  for method in methods.BY_NAME.values():
    if method != baseline:
      loss = scale.PAPER[method.name]
      gap = loss - scale.PAPER[baseline.name]
      paper = "diverges" if math.isinf(loss) else f"{gap:+.4f}"
      own = _with_papers_rule(method).label
      measure = functools.partial(_gap, method=own)
      rows.append((f"{own}, against {claims.BASELINE}, FP8", paper, measure, "claims"))
  for family, name, paper in (
    ("llama_3m", "Llama", "+0.0008"),
    ("gemma_3m", "Gemma 3", "near-lossless"),
    ("smoe_3m", "mixture of experts", "near-lossless"),
    ("deepseek_3m", "DeepSeek-MoE", "–"),
  ):
    claim = f"ECO + SR against master weights + SR, {name}"
    rows.append((claim, paper, functools.partial(_family, family=family), "families"))
  for label, method in finetune.METHODS.items():
    if method.family != methods.MASTER_WEIGHTS:
      claim = f"{label}, against {finetune.BASELINE}, DeepSeek-MoE fine-tuned in INT4"
      paper = "diverges" if method.family == methods.NAIVE else "matches"
      rows.append((claim, paper, functools.partial(_finetuned, method=label), "finetune"))
  return rows


def _command(study: str) -> str:
  return f"`python {study if '/' in study else f'scripts/reproduce.py --study={study}'}`"


def _beyond(results: pathlib.Path) -> list[str]:
  """Tables beyond the paper's claims."""
  out = []
  for study, module, what in (
    ("claims", claims, "Every method at its own best learning rate"),
    ("scale", scale, "The paper's seven runs at its own size"),
    ("storage", storage, "What moments and residuals may be stored in"),
    ("nearest", nearest, "Rounding to nearest: what may be done about its dead zone"),
    ("clips", clips, "Clips of the gradient, with gradient release and without"),
    ("optimizers", optimizers, "ECO over other optimizers"),
    ("outliers", outliers, "Optimizers under quantization, and whether outliers tell"),
    ("four_bits", four_bits, "Pretraining in the four-bit formats that people use"),
    ("finetune", finetune, "INT4 fine-tuning of a tiny DeepSeek-MoE on chats"),
  ):
    rows = sweep.read(results / study / "runs.jsonl")
    out += [f"## {what}", ""]
    if rows:
      out += [
        f"{_command(study)}; {len(rows)} runs are finished.",
        "",
        module.table(rows).strip(),
        "",
      ]
    else:
      out += [f"{_command(study)}; no run is finished.", ""]
  return out


def markdown(results: pathlib.Path) -> str:
  """The page.

  Args:
    results: the folder that the studies write to.

  Returns:
    Markdown.
  """
  lines = [_HEAD, "| claim | paper | measured | command |", "|---|---|---|---|"]
  for claim, paper, measure, study in _claims():
    try:
      measured = measure(results)
    except _Missing:
      measured = "–"
    lines.append(f"| {claim} | {paper} | {measured} | {_command(study)} |")
  return "\n".join([*lines, "", *_beyond(results)]).rstrip() + "\n"
