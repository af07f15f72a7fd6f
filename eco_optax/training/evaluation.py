"""Evaluates a trained run: its loss on any prepared text, and the text that it generates."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from eco_optax.training import checkpoints, loop, methods, sharding
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import chats, shards, tokenizers
from eco_optax.training.models import transformer


@dataclasses.dataclass(frozen=True)
class Trained:
  """The newest whole checkpoint of a run, on this machine's devices."""

  config: ml_collections.ConfigDict  # Of the run, but for its mesh.
  step: int
  params: Any
  mesh: Mesh
  tokenizer: tokenizers.Tokenizer
  corpus: dict[str, Any]  # The manifest of what it reads.

  @functools.cached_property
  def model(self) -> Any:
    """The model's own config."""
    return config_lib.model(self.config)

  @functools.cached_property
  def _scores(self) -> Any:
    @jax.jit
    def scores(params: Any, tokens_BxM: jax.Array) -> tuple[jax.Array, jax.Array]:
      logits_BxLxV = transformer.apply(self.model, params, tokens_BxM[:, :-1])
      targets_BxL = tokens_BxM[:, 1:]
      chosen = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], -1)[..., 0]
      is_greedy = jnp.argmax(logits_BxLxV, -1) == targets_BxL
      return jax.nn.logsumexp(logits_BxLxV, -1) - chosen, is_greedy

    return scores

  def scores(self, windows: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores each token of some texts given the tokens before it.

    Args:
      windows: int arrays of 2 to `config.length + 1` tokens each.

    Yields:
      For each, of all tokens but the first: their nats, float32, and whether they are the likeliest
      ones, bool.
    """
    # Devices share a batch by rows; rows of padding are ignored.
    size, length = self.config.batch_size, self.config.length + 1
    rows = size + -size % (self.mesh.size // self.mesh.shape["tensor"])
    split = sharding.batch_sharding(self.mesh)
    for start in range(0, len(windows), size):
      part = windows[start : start + size]
      tokens = np.zeros((rows, length), np.int32)
      for row, window in zip(tokens, part, strict=False):
        row[: len(window)] = window
      with jax.set_mesh(self.mesh):  # Not while the caller has a result.
        nats, greedy = jax.device_get(self._scores(self.params, jax.device_put(tokens, split)))
      for i, window in enumerate(part):
        yield nats[i, : len(window) - 1], greedy[i, : len(window) - 1]

  @functools.cached_property
  def _next_token(self) -> Any:
    @jax.jit
    def next_token(
      params: Any, tokens_1xL: jax.Array, last: jax.Array, temperature: jax.Array, key: jax.Array
    ) -> jax.Array:
      logits_V = transformer.next_logits(self.model, params, tokens_1xL, last)[0]
      # 1e-6 only keeps the branch that is not taken at temperature 0 from dividing by it.
      sampled = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
      return jnp.where(temperature > 0, sampled, jnp.argmax(logits_V))

    return next_token

  def generate(
    self, prompt: Sequence[int], count: int, temperature: float = 0.0, seed: int = 0
  ) -> Iterator[int]:
    """Tokens that follow a prompt.

    Every token recomputes its whole window: this is for looking at a run, not for serving it.

    Args:
      prompt: tokens, one or more; of a longer one than `config.length` its end counts.
      count: how many to write, at most: a text ends with one of the tokenizer's `ends`.
      temperature: 0 takes the likeliest token, 1 draws as the model says.
      seed: of the draws.

    Yields:
      Tokens, without the one that ends them.
    """
    length, tokens = self.config.length, list(prompt)
    whole = jax.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
    for i in range(count):
      window = tokens[-length:]
      padded = np.zeros((1, length), np.int32)
      padded[0, : len(window)] = window
      with jax.set_mesh(self.mesh):  # Not while the caller has a result.
        key = jax.random.fold_in(jax.random.key(seed), i)
        token = self._next_token(
          self.params,
          jax.device_put(padded, whole),
          np.int32(len(window) - 1),
          np.float32(temperature),
          jax.device_put(key, whole),
        )
      tokens.append(int(token))
      if tokens[-1] in self.tokenizer.ends:
        return
      yield tokens[-1]


def load(workdir: str | pathlib.Path) -> Trained:
  """Opens a run, finished or under way, and changes nothing there.

  Args:
    workdir: of `scripts/train.py`.

  Returns:
    Its newest checkpoint that is whole, on all of this machine's devices.

  Raises:
    FileNotFoundError: if it is not the folder of a run, or has no checkpoint yet.
    OSError: if all of its checkpoints are damaged.
  """
  folder = pathlib.Path(workdir)
  if not (folder / "run.json").exists():
    raise FileNotFoundError(f"{folder} has no run.json: it is not the workdir of a run")
  run = json.loads((folder / "run.json").read_text())
  config = config_lib.defaults()
  config.update(run["config"])
  # Parameters are split over whatever devices there are.
  config.mesh.update(data=1, fsdp=-1, tensor=1, expert=1)
  if config.wire != "none":  # The state has errors, for which parameters are whole.
    config.mesh.update(data=-1, fsdp=1)
  tx, mesh = methods.optimizer(config), sharding.make_mesh(config.mesh.to_dict())
  where = pathlib.Path(config.checkpoint.folder or folder / "checkpoints")
  saved = None
  if where.exists():
    with jax.set_mesh(mesh), checkpoints.manager(where, keep=None) as store:
      target = step_lib.abstract_state(config, tx, mesh)
      saved = checkpoints.restore(store, target, config, run["corpus"], read_only=True)
  if saved is None:
    raise FileNotFoundError(
      f"{where} has no checkpoint: let the run go on until it has saved one (config.checkpoint)"
    )
  tokenizer = tokenizers.load(pathlib.Path(config.data.path or "."), run["corpus"]["tokenizer"])
  return Trained(config, saved.step, saved.state.params, mesh, tokenizer, run["corpus"])


def begin(config: ml_collections.ConfigDict) -> Trained:
  """What a run starts from, such as a checkpoint rounded to the run's format.

  Args:
    config: of the run.

  Returns:
    Its parameters before the first step, on all of this machine's devices.

  Raises:
    ValueError: for a config, data or checkpoint that does not fit.
  """
  tx, mesh = loop.prepare(config)
  manifest = loop.load_data(config).manifest
  params = step_lib.init_state(config, tx, mesh).params
  tokenizer = tokenizers.load(pathlib.Path(config.data.path or "."), manifest["tokenizer"])
  return Trained(config, 0, params, mesh, tokenizer, manifest)


def chat_template(trained: Trained) -> chats.Template:
  """The template of the chats that a run is trained on.

  Raises:
    ValueError: if it is trained on other texts.
  """
  if trained.tokenizer.chat is not None:
    return trained.tokenizer.chat
  if trained.corpus.get("settings", {}).get("format") == "guanaco":
    return chats.GUANACO
  raise ValueError(
    f"the run is trained on {trained.corpus['source']}, and not on chats: see what it writes with"
    " scripts/evaluate.py --prompt, or prepare chats with scripts/prepare_data.py --format=guanaco"
  )


def answer(
  trained: Trained,
  messages: Sequence[chats.Message],
  count: int,
  temperature: float = 0.0,
  seed: int = 0,
) -> Iterator[str]:
  """The assistant's next reply in a chat.

  Args:
    trained: from `load` or `begin`.
    messages: of the chat so far, the last one the user's.
    count: of tokens, at most.
    temperature: as of `Trained.generate`.
    seed: as of `Trained.generate`.

  Yields:
    Pieces of text.

  Raises:
    ValueError: if the run is not trained on chats, or the chat does not fit into its length.
  """
  tokenizer = trained.tokenizer
  for message in messages:
    chats.check(message, tokenizer.special)
  asked = chats.render(chat_template(trained), messages, is_asked=True)
  prompt = tokenizer.encode(asked).tolist()
  if len(prompt) >= trained.config.length:
    raise ValueError(
      f"the chat is {len(prompt)} tokens long, and the run was trained on texts of"
      f" {trained.config.length}: begin anew, or ask for less"
    )
  tokens, shown = list[int](), ""
  for token in trained.generate(prompt, count, temperature, seed):
    tokens.append(token)
    # A character may take several tokens; what is shown is not taken back.
    text = tokenizer.decode(tokens)
    if not text.endswith("\ufffd"):
      yield text[len(shown) :]
      shown = text


class Result(NamedTuple):
  """The loss on a split of a corpus."""

  loss: float  # Nats per token.
  perplexity: float
  nats_per_byte: float | None  # None where only some tokens count, or the bytes are not known.
  tokens: int  # Number of scored tokens.


def evaluate(trained: Trained, data: shards.Dataset, split: str = "validation") -> Result:
  """The mean loss over every token of a split, each window starting on the one before's last token.

  Args:
    trained: from `load`.
    data: of the same tokenizer, from `shards.load` or `loop.load_data`.
    split: "validation" or "train".

  Returns:
    Figures over the tokens that would be trained on, all but the first.

  Raises:
    ValueError: if the data has tokens that the model does not know, or is of another tokenizer.
  """
  # The same file may be a corpus's own BPE here and a tokenizer.json there.
  which = lambda manifest: manifest["tokenizer"].get("sha256", manifest["tokenizer"]["kind"])
  if data.vocabulary > trained.config.model.vocabulary:
    raise ValueError(
      f"the data has {data.vocabulary} tokens and the model {trained.config.model.vocabulary}:"
      " prepare it with the tokenizer of the run's data"
    )
  if which(data.manifest) != which(trained.corpus):
    raise ValueError(
      "the data is in tokens of another tokenizer than the run's: prepare it with --tokenizer= and"
      " the tokenizer of the run's data"
    )
  stream, length = getattr(data, split), trained.config.length
  starts = range(0, len(stream) - 1, length)
  ends = [min(start + length, len(stream) - 1) + 1 for start in starts]
  windows = [stream.read(start, end) for start, end in zip(starts, ends, strict=True)]
  nats, targets = 0.0, 0
  for start, end, (own, _) in zip(starts, ends, trained.scores(windows), strict=True):
    mask = stream.read_mask(start + 1, end)
    own = own.astype(np.float64)
    nats += float(own.sum() if mask is None else own[mask].sum())
    targets += len(own) if mask is None else int(mask.sum())
  size = data.manifest.get("splits", {}).get(split, {}).get("bytes")
  if data.manifest["tokenizer"]["kind"] == "bytes":
    size = len(stream)
  is_whole = size and stream.read_mask(0, 1) is None
  loss = nats / max(targets, 1)
  per_byte = nats / size if is_whole else None
  # e^709 is the largest power that a float holds; a loss above 700 is shown as e^700.
  return Result(loss, math.exp(min(loss, 700.0)), per_byte, targets)


def open_data(trained: Trained, path: str | None) -> shards.Dataset:
  """The prepared tokens at `path`, or the run's own."""
  if path is None:
    return loop.load_data(trained.config)
  return shards.load(path)
