"""What transformers makes of checkpoints: `write FOLDER`, `serve FOLDER …`, or `gguf FOLDER`.

Without folders it takes them from its input, one a line, and says when one is done.

A program that tests start, because torch and JAX are better off apart. `write` draws tiny models of
each family, edits the config.json of some, and saves the logits that transformers computes with
them then. `serve` loads what was exported and says its logits and what it writes by itself. `gguf`
says the logits and the tokens of the GGUF files in a folder.
"""

import json
import pathlib
import sys
import warnings

warnings.simplefilter("ignore")  # They are about its own insides.

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # Models are tiny: threads would only wait for each other.

SIZES = {
  "hidden_size": 32,
  "num_attention_heads": 4,
  "intermediate_size": 48,
  "vocab_size": 64,
  "max_position_embeddings": 128,
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24))
FAMILIES = (
  *("llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3_text"),
  *("mixtral", "qwen3_moe", "qwen2_moe"),
)
DRAWS = 4  # Of each family; the first two stay as transformers wrote them.


def rope(one_of):
  """Parameters of rotary embedding."""
  kind = one_of("default", "linear", "llama3")
  found = {"rope_type": kind, "rope_theta": one_of(1e3, 1e4, 5e5)}
  if kind != "default":
    found["factor"] = one_of(2.0, 8)
  if kind == "llama3":
    found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found["original_max_position_embeddings"] = one_of(16, 64)
  return found


def draw(family, one_of):
  """A random config of a family."""
  layers = one_of(3, 4)
  types = lambda every: [
    "sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)
  ]
  config = SIZES | {
    "num_hidden_layers": layers,
    "num_key_value_heads": one_of(1, 2, 4),
    "rms_norm_eps": one_of(1e-6, 1e-5, 1e-2),
    "tie_word_embeddings": one_of(False, True),
    "rope_parameters": rope(one_of),
  }
  if one_of(False, True) or family in ("qwen3", "gemma2", "gemma3_text"):
    config["head_dim"] = one_of(8, 16)
  if family in ("mistral", "mixtral"):
    config["sliding_window"] = one_of(None, 5, 100)
  if family in ("qwen2", "qwen3", "qwen3_moe") and one_of(False, True):
    config |= {"use_sliding_window": True, "sliding_window": one_of(None, 5)}
    if family != "qwen3_moe" and config["sliding_window"]:
      config |= {"max_window_layers": one_of(0, layers)}
      config["layer_types"] = one_of(None, types(2), types(3))
  if family.startswith("gemma"):
    config |= {
      "query_pre_attn_scalar": one_of(8, 16, 20),
      "sliding_window": 5,
      "layer_types": one_of(None, types(2), types(3), types(9), types(1)),
      "final_logit_softcapping": one_of(None, 2.0, 30.0),
    }
  if family == "gemma2":
    config["attn_logit_softcapping"] = one_of(None, 1.0, 50.0)
  if family == "gemma3_text":
    both = {"full_attention": rope(one_of), "sliding_attention": rope(one_of)}
    config |= {"rope_parameters": both, "sliding_window_pattern": one_of(2, 3, 6)}
  if family in ("mixtral", "qwen3_moe", "qwen2_moe"):
    config |= {
      "num_local_experts" if family == "mixtral" else "num_experts": 5,
      "num_experts_per_tok": one_of(1, 2, 3),
      "moe_intermediate_size": 16,
      "norm_topk_prob": one_of(False, True),
      "mlp_only_layers": one_of([], [0], [0, 1]),
    }
  if family == "mixtral":
    del config["moe_intermediate_size"], config["norm_topk_prob"], config["mlp_only_layers"]
  if family == "qwen2_moe":
    config |= {"qkv_bias": one_of(False, True), "shared_expert_intermediate_size": 32}
  return config


# Values that keys of one family or another have, and that keep the shapes of all tensors.
EDITS = {
  "rms_norm_eps": (1e-6, 0.1),
  "rope_theta": (100.0, 1e4),
  "rope_local_base_freq": (100.0,),
  "rope_scaling": (
    {"type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
  ),
  "rope_parameters": ({"rope_theta": 50.0}, {"rope_type": "linear", "factor": 3.0}),
  "partial_rotary_factor": (0.5, 1.0),
  "original_max_position_embeddings": (32,),
  "max_position_embeddings": (32, 128),
  "sliding_window": (4, 100),
  "use_sliding_window": (True, False),
  "max_window_layers": (1,),
  "sliding_window_pattern": (2,),
  "_sliding_window_pattern": (2,),
  "layer_types": (["sliding_attention"] * 3, ["full_attention"] * 3),
  "hidden_act": ("silu", "gelu"),
  "hidden_activation": ("gelu_pytorch_tanh", "gelu"),
  "query_pre_attn_scalar": (4, 32),
  "attn_logit_softcapping": (1.0,),
  "final_logit_softcapping": (1.0,),
  "norm_topk_prob": (True, False),
  "num_experts_per_tok": (1, 4),
  "decoder_sparse_step": (1, 2),
  "tie_word_embeddings": (True, False),
  "attention_dropout": (0.1,),
}
# Of them, what a config may have that does not have it yet.
NEW = ("rope_theta", "rope_scaling", "partial_rotary_factor", "max_window_layers", "layer_types")


def edit(config, one_of):
  """Takes keys away, sets others, or writes rotary embedding as transformers 4 did."""
  what = one_of("take", "null", "set", "set", "old")
  if what == "old":
    said = config.pop("rope_parameters", None) or {}
    if "full_attention" in said:
      local = said.get("sliding_attention") or {}
      config["rope_local_base_freq"] = local.get("rope_theta", 1e4)
      said = said["full_attention"] or {}
    config["rope_theta"] = said.pop("rope_theta", 1e4)
    config["rope_scaling"] = said if said.get("rope_type", "default") != "default" else None
  elif what == "set":
    key = one_of(*NEW, *(key for key in EDITS if key in config))
    config[key] = one_of(*EDITS[key])
  else:
    key = one_of(*(key for key in config if key not in SIZES))
    if what == "take":
      del config[key]
    else:
      config[key] = None


def logits_of(folder):
  """What transformers computes with a folder, if it takes all that is in it and nothing else."""
  try:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    if any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
      return None
    with torch.no_grad():
      return model.eval()(torch.tensor(TOKENS)).logits.numpy()
  except Exception:  # Whatever it is, it is no result to compare with.
    return None


def write(folder):
  torch.manual_seed(0)
  for i in range(DRAWS * len(FAMILIES)):
    family, at = FAMILIES[i % len(FAMILIES)], folder / f"{i:03d}"
    generator = np.random.default_rng(i)
    one_of = lambda *xs, generator=generator: xs[generator.integers(len(xs))]
    config = transformers.AutoConfig.for_model(family, **draw(family, one_of))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for key, p in model.float().named_parameters():
      # Norms that do something, and logits that are not all alike.
      p.data = p.data.normal_(0.3, 0.2) if p.ndim == 1 else p.data.normal_(0, 0.3)
      if key.endswith("shared_expert_gate.weight"):
        p.data.zero_()
    model.save_pretrained(at, max_shard_size="100KB")
    if i >= 2 * len(FAMILIES):
      path = at / "config.json"
      told = json.loads(path.read_text())
      for _ in range(one_of(1, 1, 2)):
        edit(told, one_of)
      path.write_text(json.dumps(told))
    logits = logits_of(at)
    if logits is not None:
      np.save(at / "expected.npy", logits)


def serve(folder):
  config = json.loads((folder / "config.json").read_text())
  options = {}
  if "quantization_config" in config and (folder / "dequantize").exists():
    options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, **options
  ).eval()
  tokens = torch.tensor(np.load(folder / "tokens.npy"))
  with torch.no_grad():
    found = {"logits": model(tokens).logits.numpy()}
  text = ""
  if (folder / "tokenizer_config.json").exists():
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = (folder / "prompt.txt").read_text()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    written = model.generate(
      ids, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(ids)
    )
    found["prompt"] = ids[0].numpy()
    found["written"] = written[0, ids.shape[1] :].numpy()
    text = tokenizer.decode(found["written"], skip_special_tokens=True)
  np.savez(folder / "served.npz", **found)
  (folder / "served.txt").write_text(text)


def gguf(folder):
  tokens = torch.tensor(np.load(folder / "tokens.npy"))
  texts = json.loads((folder / "texts.json").read_text())
  for path in sorted(folder.glob("*.gguf")):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
      np.savez(path.with_suffix(".npz"), logits=model.eval()(tokens).logits.numpy())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    path.with_suffix(".json").write_text(json.dumps(tokenizer(texts).input_ids))


if __name__ == "__main__":
  command, *folders = sys.argv[1:]
  for each in folders or map(str.strip, sys.stdin):
    {"write": write, "serve": serve, "gguf": gguf}[command](pathlib.Path(each))
    print("done", each, flush=True)
