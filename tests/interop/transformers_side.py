"""What transformers makes of checkpoints: `write FOLDER`, or `serve FOLDER …`.

A program that tests start, because torch and JAX are better off apart. `write` saves a tiny random
model of each family, with its logits. `serve` loads what was exported and says its logits and what
it writes by itself.
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

SMALL = {
  "hidden_size": 64,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 96,
  "vocab_size": 128,
  "max_position_embeddings": 512,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def configs():
  llama, qwen2_moe = transformers.LlamaConfig, transformers.Qwen2MoeConfig
  return {
    "llama": llama(**SMALL),
    "llama, tied, long": llama(
      **SMALL, tie_word_embeddings=True, rope_scaling=LLAMA3, rope_theta=5e5
    ),
    "llama, positions divided": llama(**SMALL, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=8),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=24),
    "gemma3": transformers.Gemma3TextConfig(
      **{**SMALL, "num_hidden_layers": 7, "num_key_value_heads": 1},
      head_dim=32,
      query_pre_attn_scalar=32,
      sliding_window=8,
      sliding_window_pattern=3,
    ),
    "qwen2_moe": qwen2_moe(
      **{**SMALL, "num_hidden_layers": 3, "num_key_value_heads": 4},
      qkv_bias=False,
      num_experts=6,
      num_experts_per_tok=2,
      moe_intermediate_size=48,
      shared_expert_intermediate_size=96,
      mlp_only_layers=[0],
    ),
  }


def write(folder):
  torch.manual_seed(0)
  tokens = np.random.default_rng(0).integers(0, 128, (2, 40))
  for name, config in configs().items():
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    for key, p in model.named_parameters():
      # Norms that do something, and logits that are not all alike.
      p.data = p.data.normal_(0.3, 0.2) if p.ndim == 1 else 3 * p.data
      if key.endswith("shared_expert_gate.weight"):
        p.data.zero_()
    model.save_pretrained(folder / name, max_shard_size="100KB")
    with torch.no_grad():
      logits = model(torch.tensor(tokens)).logits.numpy()
    np.savez(folder / name / "expected.npz", tokens=tokens, logits=logits)


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


if __name__ == "__main__":
  command, *folders = sys.argv[1:]
  for each in folders:
    {"write": write, "serve": serve}[command](pathlib.Path(each))
