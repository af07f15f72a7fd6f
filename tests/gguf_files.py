"""GGUF files as llama.cpp's converter makes them, of models and tokenizers of this package."""

import json
import pathlib

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from eco_optax.interop import hugging_face, safetensors
from eco_optax.training.models import transformer

TYPES = library.GGMLQuantizationType


def shapes(config, format=None):
  return jax.eval_shape(lambda: transformer.init(config, 0, format))


def random_params(config):
  generator = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(generator.normal(0.2, 0.2, x.shape), x.dtype), shapes(config)
  )


def write(path, architecture, config, params, kind=TYPES.F32, change=lambda writer: None):
  """A file as llama.cpp's converter makes it; the gguf package knows the tensors' names."""
  folder = path.with_suffix("")
  hugging_face.save(folder, params, config)
  told = json.loads((folder / "config.json").read_text())
  writer = library.GGUFWriter(path, architecture)
  writer.add_block_count(config.layers)
  writer.add_context_length(64)
  writer.add_embedding_length(config.width)
  is_mixtral = config.experts and architecture == "llama"
  writer.add_feed_forward_length(config.expert_width if is_mixtral else config.mlp_width)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_key_length(told["head_dim"])
  writer.add_value_length(told["head_dim"])
  if architecture == "llama":
    writer.add_rope_dimension_count(told["head_dim"])
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_vocab_size(config.vocabulary)
  if config.experts:
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.experts_per_token)
    if architecture == "qwen3moe":
      writer.add_expert_feed_forward_length(config.expert_width)
  if config.window:
    writer.add_sliding_window(config.window)
  if config.attention_cap:
    writer.add_attn_logit_softcapping(config.attention_cap)
    writer.add_final_logit_softcapping(config.logit_cap)
  if config.rope_length:  # llama.cpp's own code, with Llama 3.1's numbers.
    base = 1 / config.rope_base ** (np.arange(0, told["head_dim"], 2) / told["head_dim"])
    waves, low, high = 2 * np.pi / base, 8192 / 1.0, 8192 / 4.0
    smooth = (8192 / waves - 1) / 3
    between = 1 / ((1 - smooth) / config.rope_factor + smooth)
    divisors = np.where(waves < high, 1, np.where(waves > low, config.rope_factor, between))
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
  elif config.rope_factor != 1:
    writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_factor)
  change(writer)
  arch = next(x for x, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
  names = library.get_tensor_name_map(arch, config.layers)
  experts = {}
  for name, x in safetensors.read(folder).items():
    x = np.array(x, np.float32)
    if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
      heads = config.heads if "q_proj" in name else config.kv_heads
      x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
    if architecture.startswith("gemma") and "norm" in name:
      x = x + 1
    if ".experts." in name:
      module, expert, part = name.replace(".weight", "").rsplit(".", 2)
      experts.setdefault(f"{module}.{part}", {})[int(expert)] = x
      continue
    module, end = name.rsplit(".", 1)
    put(writer, f"{names.get_name(module)}.{end}", x, kind)
  for module, held in experts.items():
    stacked = np.stack([held[i] for i in range(config.experts)])
    put(writer, f"{names.get_name(module)}.weight", stacked, kind)
  for what in ("header", "kv_data", "tensors"):
    getattr(writer, f"write_{what}_to_file")()
  writer.close()
  return path


def put(writer, name, x, kind):
  """Adds a tensor; rows that are no whole blocks stay float32."""
  if x.ndim < 2 or x.shape[-1] % library.GGML_QUANT_SIZES[kind][0]:
    kind = TYPES.F32
  writer.add_tensor(name, library.quantize(x, kind), raw_dtype=kind)


TEXT = [
  "The quick brown fox jumps over the lazy dog.",
  "def f(x):\n    return  x + 12345\n\n",
  "naïve café, 日本語 and 😀!",
  " one  two   three",
]


def byte_level(pre_tokenizer):
  """A tokenizer of byte pairs, trained on a text of this package."""
  own = tokenizers.Tokenizer(tokenizers.models.BPE())
  own.pre_tokenizer = pre_tokenizer
  own.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=700,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  own.train_from_iterator([pathlib.Path(__file__).read_text(), *TEXT], trainer)
  return own


def add_byte_level(writer, own, pre, bos=False):
  told = json.loads(own.to_str())["model"]
  tokens = sorted(told["vocab"], key=told["vocab"].get)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
  writer.add_token_merges([" ".join(merge) for merge in told["merges"]])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_add_bos_token(bos)
  writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
