"""What fits one card: peaks of compiled training steps beside what others need.

The bars are read from results/one_gpu, which scripts/compile.py writes. Plain training of the
larger models fits no card, and its state alone is counted: float32 weights and AdamW's moments.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from experiments import figures

CARDS = (24, 32, 80)  # In GB, of 10⁹ bytes.
_GIB = 2**30
_STATE = 12  # Bytes per parameter of plain training: weights, momentum, second moment in float32.
# torchtune's README of 2024, "Memory and training speed", https://github.com/pytorch/torchtune:
# full fine-tuning of Llama 3.1 8B on an RTX 4090 with 2 × 2,048 tokens.
_TORCHTUNE = 18.9


class Bar(NamedTuple):
  """A way to train a model."""

  model: str
  label: str
  gib: float
  color: str
  is_state: bool = False  # Whether nothing but the state is counted.


def _report(folder: pathlib.Path, name: str) -> dict[str, Any]:
  return json.loads((folder / f"{name}.json").read_text())  # type: ignore[no-any-return]


def _tokens(report: dict[str, Any]) -> str:
  return f"{report['config']['batch_size']} × {report['config']['length']:,} tokens"


def bars(folder: pathlib.Path) -> list[Bar]:
  """The bars, from the reports in `folder`; one model after another."""
  found: list[Bar] = []

  def add(model: str, name: str, label: str, color: str = figures.ECO) -> dict[str, Any]:
    report = _report(folder, name)
    found.append(Bar(model, label, report["bytes_per_device"]["peak"] / _GIB, color))
    return report

  small = _report(folder, "llama_800m_eco_sr")
  model = f"Llama 800M, {_tokens(small)}"
  for name, label in (
    ("bf16_mw", "BF16, float32 AdamW"),
    ("eco_sr", "ECO, FP8 codes"),
    ("eco_sr_release", "ECO, gradients released"),
    ("eco_sr_release_fp8_moments", "ECO, released, FP8 moments"),
    ("eco_sr_release_factored_moments", "ECO, released, FP8 and factored"),
  ):
    color = figures.MASTER if name == "bf16_mw" else figures.ECO
    add(model, f"llama_800m_{name}", label, color)

  large = _report(folder, "llama3_8b_two_sequences")
  model, state = f"Llama 3.1 8B, {_tokens(large)}", large["parameters"] * _STATE / _GIB
  found.append(Bar(model, "plain AdamW, its state alone", state, figures.MASTER, True))
  label = "torchtune, BF16, optimizer in host memory"
  found.append(Bar(model, label, _TORCHTUNE, figures.RESIDUAL))
  add(model, "llama3_8b_two_sequences", "ECO, released, all in FP8")
  add(model, "llama3_8b_two_sequences_int4", "ECO, released, INT4 codes")

  experts = _report(folder, "deepseek_moe_16b_one_gpu")
  model, state = f"DeepSeek-MoE 16B, {_tokens(experts)}", experts["parameters"] * _STATE / _GIB
  found.append(Bar(model, "plain AdamW, its state alone", state, figures.MASTER, True))
  add(model, "deepseek_moe_16b_one_gpu", "ECO, released, INT4 codes")
  return found


def plot(found: list[Bar], path: pathlib.Path, limit: float = 100.0) -> None:
  """Draws bars by model, and the cards' memory as lines.

  Args:
    found: from `bars`.
    path: of the picture.
    limit: of the axis in GiB; what is beyond it says so.
  """
  plt = figures.pyplot()
  figure, ax = plt.subplots(figsize=(9, 5.2), layout="constrained")
  places: list[float] = []
  place, last = 0.0, ""
  for bar in found:
    if bar.model != last:
      place += 1
      ax.text(-1, place, bar.model, ha="right", va="center", weight="bold")
    place += 1
    places, last = [*places, place], bar.model
    ax.barh(
      place,
      min(bar.gib, limit),
      color="white" if bar.is_state else bar.color,
      edgecolor=bar.color,
      hatch="///" if bar.is_state else None,
      alpha=0.9,
    )
    text = f"{bar.gib:.0f} →" if bar.gib > limit else f"{bar.gib:.1f}"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    side = {"ha": "right", "x": limit - 1} if bar.gib > limit else {"ha": "left", "x": bar.gib + 1}
    ax.text(y=place, s=text, va="center", fontsize=9, bbox=box, **side)
  ax.set_yticks(places, [bar.label for bar in found])
  for card in CARDS:
    ax.axvline(card * 1e9 / _GIB, color="tab:orange", lw=1.2, ls="--", zorder=0)
    ax.text(card * 1e9 / _GIB, -0.1, f"{card} GB", color="tab:orange", ha="center", size="small")
  ax.tick_params(axis="y", length=0)
  ax.set(xlim=(0, limit), ylim=(place + 0.7, 0))
  ax.set_xlabel("GiB of device memory at the peak of a training step; cards in orange")
  figures.save(figure, path)
