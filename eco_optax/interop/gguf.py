"""GGUF files, as llama.cpp writes them, read as checkpoints of Hugging Face.

A file holds metadata and tensors. The metadata become what `config.json` would say, and tensors get
the names, the order of rows and the values that transformers gives them, so that
`interop.hugging_face` reads a file as it reads a folder.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from eco_optax.interop import json_fields
from eco_optax.interop.json_fields import NATURAL, NUMBER, POSITIVE, TEXT

#: What config.json calls the architectures of GGUF that can be read.
FAMILIES = {
  "llama": "llama",  # Of Mistral and Mixtral too.
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen3moe": "qwen3_moe",
  "olmo2": "olmo2",
  "gemma2": "gemma2",
  "gemma3": "gemma3_text",
}

_TABLES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "post_attention_norm": "post_attention_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = re.compile(r"ffn_(gate|up|down)_exps")
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor that stays in its file, and is dequantized when it is asked for as an array."""

  shape: tuple[int, ...]
  values: Callable[[], np.ndarray]
  dtype: ClassVar[np.dtype] = np.dtype(np.float32)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.values(), dtype)


class _File(NamedTuple):
  """What a file holds, without copies of its tensors."""

  metadata: dict[str, Any]
  tensors: dict[str, Any]  # The gguf package's own, each with a map of its part of the file.


def is_gguf(path: Any) -> bool:
  """Whether a path names a GGUF file."""
  return pathlib.Path(path).suffix == ".gguf"


def open_file(path: Any) -> _File:
  """The metadata of a file, and its tensors, on disk until they are looked at.

  Raises:
    FileNotFoundError: if there is none.
    ImportError: without the gguf package.
    ValueError: if it is damaged, cut short, of several parts, or has tensors of a type that the
      gguf package cannot read, naming file and tensor.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no {path}: name a GGUF file")
  status = path.stat()
  return _open(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # A vocabulary takes seconds to read, and a run asks four times.
def _open(path: pathlib.Path, size: int, time: int) -> _File:
  library = package()
  version = importlib.metadata.version("gguf")
  try:
    reader = library.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
  except Exception as error:  # The package raises whatever its arrays do.
    if "GGMLQuantizationType" in str(error):
      raise ValueError(
        f"{path} has tensors of a type that gguf {version} does not know ({error}): update it, or"
        " quantize the model to another type, such as Q8_0"
      ) from error
    raise ValueError(
      f"{path} is no GGUF file, or is damaged or cut short ({error}): fetch it again"
    ) from error
  if metadata.get("split.count", 1) > 1:
    raise ValueError(
      f"{path} is one of {metadata['split.count']} parts of a model: join them with llama.cpp's"
      " llama-gguf-split --merge"
    )
  first: dict[Any, str] = {}
  for tensor in tensors.values():
    first.setdefault(tensor.tensor_type, tensor.name)
  for kind, name in first.items():
    try:
      _dequantized(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (NotImplementedError, KeyError) as error:
      raise ValueError(
        f"{path}: {name!r} is of type {kind.name}, which gguf {version} cannot turn into floats:"
        " quantize the model to another type, such as Q8_0"
      ) from error
  return _File(metadata, tensors)


def package() -> Any:
  """The gguf package.

  Raises:
    ImportError: if it is not installed, naming the remedy.
  """
  try:
    import gguf
  except ImportError as error:
    raise ImportError("reading GGUF files takes pip install 'eco_optax[train]'") from error
  return gguf


def _dequantized(data: np.ndarray, kind: Any) -> np.ndarray:
  """Rows of blocks as float32, (…, row)."""
  return np.asarray(package().dequantize(data, kind), np.float32)


def read_config(path: Any) -> dict[str, Any]:
  """What `config.json` would say of the model in a file.

  Args:
    path: of a model of one of `FAMILIES`.

  Raises:
    FileNotFoundError: if there is none.
    ImportError: without the gguf package.
    ValueError: naming every key that is missing, malformed, unknown, or of a value that models here
      do not have; or as `open_file`.

  Example:
    >>> import pathlib, tempfile, gguf as package, numpy as np
    >>> from eco_optax.interop import gguf
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.gguf"
    >>> writer = package.GGUFWriter(path, "llama")
    >>> for name in ("block_count", "embedding_length", "feed_forward_length", "context_length"):
    ...   writer.add_uint32(f"llama.{name}", 64)
    >>> writer.add_head_count(4)
    >>> writer.add_layer_norm_rms_eps(1e-5)
    >>> writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    >>> for write in ("header", "kv_data", "tensors"):
    ...   getattr(writer, f"write_{write}_to_file")()
    >>> writer.close()
    >>> config = gguf.read_config(path)
    >>> config["model_type"], config["head_dim"], config["vocab_size"], config["rms_norm_eps"]
    ('llama', 16, 100, 1e-05)

  References:
    `GGUF <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_.
  """
  metadata, tensors = open_file(path)
  kind = metadata.get("general.architecture")
  if kind not in FAMILIES:
    raise ValueError(
      f"{path}: general.architecture {kind!r} is none of {', '.join(FAMILIES)}: this package has no"
      " model of it"
    )
  own = {
    name.removeprefix(f"{kind}."): _shortest(x)
    for name, x in metadata.items()
    if name.startswith(f"{kind}.")
  }
  told = json_fields.Fields(own, kind)
  if (table := tensors.get("token_embd.weight")) is None:
    told.problems.append("it has no token_embd.weight: it holds no language model, or not all")
  # The number of tokens in the metadata leaves out padding.
  told.ignore("vocab_size")
  config: dict[str, Any] = {
    "model_type": FAMILIES[kind],
    "num_hidden_layers": told.take("block_count", POSITIVE),
    "hidden_size": (width := told.take("embedding_length", POSITIVE)),
    "num_attention_heads": (heads := told.take("attention.head_count", POSITIVE)),
    "num_key_value_heads": told.take("attention.head_count_kv", POSITIVE, heads),
    "intermediate_size": told.take("feed_forward_length", POSITIVE),
    "rms_norm_eps": told.take("attention.layer_norm_rms_epsilon", NUMBER),
    "max_position_embeddings": told.take("context_length", POSITIVE, 2048),
    "vocab_size": 1 if table is None else int(table.shape[-1]),
    "tie_word_embeddings": "output.weight" not in tensors,
  }
  config["head_dim"] = told.take("attention.key_length", POSITIVE, max(1, width // heads))
  for key in ("attention.value_length", "rope.dimension_count"):
    told.expect(key, config["head_dim"])
  for name in ("bos", "eos"):
    if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
      config[f"{name}_token_id"] = token
  rope = _rope(told, tensors, config)
  _put_experts(told, kind, config)
  if kind.startswith("gemma"):
    _put_gemma(told, kind, config, rope)
  else:
    config["rope_parameters"] = rope
  told.finish()
  if told.problems:
    raise ValueError(f"{path}: {'; '.join(told.problems)}")
  return config


def _shortest(value: Any) -> Any:
  """A number that was rounded to float32, as the shortest decimal of that float32."""
  return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope(
  told: json_fields.Fields, tensors: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
  """Rotary embedding, in the words of config.json."""
  rope: dict[str, Any] = {"rope_theta": told.take("rope.freq_base", NUMBER, 1e4)}
  told.rename("rope.scale_linear", "rope.scaling.factor")  # As older files have it.
  told.ignore("rope.scaling.finetuned")
  length = told.take("rope.scaling.original_context_length", POSITIVE, 8192)
  kind = told.take("rope.scaling.type", TEXT, "linear")
  factor = told.take("rope.scaling.factor", NUMBER, 1.0)
  stored = tensors.get("rope_freqs.weight")
  if kind not in ("none", "linear") or (kind == "linear" and factor != 1):
    if stored is not None:
      told.problems.append(f"rope.scaling.type {kind!r} and rope_freqs.weight exclude each other")
    return rope | {"rope_type": kind, "factor": factor}
  if stored is None:
    return rope | {"rope_type": "default"}
  # Of Llama 3.1 and later a file has no numbers, only what they make of each frequency.
  divisors = _dequantized(stored.data, stored.tensor_type)
  factor = _shortest(float(divisors.max()))
  wanted = _llama3_divisors(rope["rope_theta"], config["head_dim"], factor, length)
  if divisors.shape != wanted.shape or not np.allclose(divisors, wanted, rtol=1e-4):
    told.problems.append(
      f"rope_freqs.weight is not what Llama 3.1 makes of a factor {factor} and a length of"
      f" {length}: models here have no other frequencies"
    )
  return rope | {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": length,
  }


def _llama3_divisors(base: float, width: int, factor: float, length: int) -> np.ndarray:
  """What each frequency is divided by, (K / 2): slow ones by `factor`, fast ones by 1."""
  frequencies = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  turns = length * frequencies / (2 * math.pi)  # In a text of the length trained for.
  share = np.clip((turns - 1) / (4 - 1), 0, 1)
  return 1 / ((1 - share) / factor + share)


def _put_experts(told: json_fields.Fields, kind: str, config: dict[str, Any]) -> None:
  """What config.json says of experts."""
  experts = told.take("expert_count", NATURAL, 0)
  if not experts:
    told.ignore("expert_used_count")
    return
  used = told.take("expert_used_count", POSITIVE)
  if kind == "llama":
    config |= {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": used}
    config["sliding_window"] = None
  elif kind == "qwen3moe":
    config |= {"num_experts": experts, "num_experts_per_tok": used, "norm_topk_prob": True}
    config["moe_intermediate_size"] = told.take("expert_feed_forward_length", POSITIVE)
    told.expect("expert_weights_norm", True)
  else:
    told.problems.append(f"models here have no {kind}.expert_count {experts}")


def _put_gemma(
  told: json_fields.Fields, kind: str, config: dict[str, Any], rope: dict[str, Any]
) -> None:
  """What config.json says of Gemma alone."""
  config["hidden_activation"] = "gelu_pytorch_tanh"
  config["sliding_window"] = told.take("attention.sliding_window", POSITIVE, 4096)
  # llama.cpp knows the models of 27B, which divide by the width of another head, by their layers.
  is_27b = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[kind]
  of_width = config["hidden_size"] // config["num_attention_heads"]
  config["query_pre_attn_scalar"] = of_width if is_27b else config["head_dim"]
  config["final_logit_softcapping"] = told.take("final_logit_softcapping", NUMBER, None)
  if kind == "gemma2":
    config["attn_logit_softcapping"] = told.take("attn_logit_softcapping", NUMBER, None)
    config["rope_parameters"] = rope
  else:
    config["sliding_window_pattern"] = told.take("attention.sliding_window_pattern", POSITIVE, 6)
    local = {"rope_type": "default", "rope_theta": told.take("rope.freq_base_swa", NUMBER, 1e4)}
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}


def read(path: Any) -> dict[str, Tensor]:
  """The tensors of a file as transformers names them, on disk until they are looked at.

  Experts that one tensor holds are apart, rows of queries and keys are in transformers' order, and
  scales of Gemma's norms are without the 1 that llama.cpp adds. A tensor that is not known keeps
  its name.

  Args:
    path: of a file that `read_config` reads.

  Raises:
    As `read_config`.
  """
  config, (metadata, tensors) = read_config(path), open_file(path)
  is_llama = metadata["general.architecture"] == "llama"
  is_gemma = config["model_type"].startswith("gemma")
  heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
  found: dict[str, Tensor] = {}
  of: dict[str, str] = {}

  # A parameter that is split over devices, or quantized, is asked for several times in a row.
  @functools.lru_cache(maxsize=1)
  def values(name: str, ours: str, expert: int | None) -> np.ndarray:
    tensor = tensors[name]
    data = tensor.data if expert is None else tensor.data[expert]
    x = _dequantized(data, tensor.tensor_type)
    if is_llama and (count := heads.get(ours.split(".")[-2])):
      x = _halves_apart(x, count)
    return x - np.float32(1) if is_gemma and "norm" in ours else x

  for name, tensor in tensors.items():
    if name == "rope_freqs.weight":  # See `_rope`.
      continue
    shape = tuple(int(n) for n in reversed(tensor.shape))
    for ours, expert in _names(name, config["model_type"], shape):
      if ours in of:
        raise ValueError(f"{path}: {of[ours]} and {name} are both {ours}: convert the model again")
      of[ours] = name
      read_it = functools.partial(values, name, ours, expert)
      found[ours] = Tensor(shape if expert is None else shape[1:], read_it)
  return found


def _halves_apart(x: np.ndarray, heads: int) -> np.ndarray:
  """Rows of heads from llama.cpp's order, pairs side by side, to transformers', (H · K, …)."""
  pairs = x.reshape(heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)


def _names(name: str, kind: str, shape: tuple[int, ...]) -> list[tuple[str, int | None]]:
  """The names that transformers has for a tensor, and which of its experts each is."""
  module, _, end = name.rpartition(".")
  if module in _TABLES:
    return [(f"{_TABLES[module]}.{end}", None)]
  found = _LAYER.fullmatch(name)
  if found is None:
    return [(name, None)]
  layer, part, end = found.groups()
  at = f"model.layers.{layer}"
  is_mixtral = kind == "mixtral"
  routed = "block_sparse_moe" if is_mixtral else "mlp"
  if (exps := _EXPERTS.fullmatch(part)) and len(shape) == 3:
    own = _MIXTRAL_PARTS[exps[1]] if is_mixtral else f"{exps[1]}_proj"
    return [(f"{at}.{routed}.experts.{i}.{own}.{end}", i) for i in range(shape[0])]
  special = {"ffn_gate_inp": f"{routed}.gate"}
  if kind.startswith("gemma"):
    special["ffn_norm"] = "pre_feedforward_layernorm"
  own = (_PARTS | special).get(part, "")
  return [(f"{at}.{own}.{end}" if own else name, None)]
