"""Checkpoints of Hugging Face, in and out, against NumPy and against transformers itself."""

import copy
import dataclasses
import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_transformer
import pytest

import eco_optax as eco
from eco_optax.interop import hugging_face, safetensors
from eco_optax.training import sharding
from eco_optax.training.models import transformer
from eco_optax.training.models.config import TransformerConfig

pytest.importorskip("safetensors")
HERE = pathlib.Path(__file__).parent

LLAMA = TransformerConfig(4, 64, 4, 128, kv_heads=2, mlp_width=128)
GEMMA = TransformerConfig(
  7,
  64,
  4,
  128,
  kv_heads=1,
  head_width=32,
  mlp_width=128,
  activation="gelu",
  tied_embedding=True,
  scaled_embedding=True,
  norm_epsilon=1e-6,
  norm_offset=True,
  post_norms=True,
  qk_norm=True,
  rope_interleaved=False,
  rope_base=1e6,
  rope_factor=8.0,
  window=8,
  global_every=3,
)
DEEPSEEK = TransformerConfig(
  3,
  64,
  4,
  128,
  mlp_width=128,
  experts=6,
  experts_per_token=2,
  expert_width=32,
  shared_experts=2,
  dense_layers=1,
  norm_epsilon=1e-6,
  rope_interleaved=False,
)
GEMMA_LIKE = {
  "activation": "gelu",
  "tied_embedding": True,
  "scaled_embedding": True,
  "norm_offset": True,
  "post_norms": True,
}
ROUTED = {"experts": 5, "experts_per_token": 2, "expert_width": 16}
LONG = dataclasses.replace(LLAMA, rope_factor=8.0, rope_length=64, rope_low=1.0, rope_high=4.0)
OLMO = dataclasses.replace(
  LLAMA, pre_norms=False, post_norms=True, qk_norm=True, joint_qk_norm=True
)
MIXTRAL = dataclasses.replace(LLAMA, **ROUTED, mlp_width=0, normalize_expert_weights=True)
NARROW = dataclasses.replace(LLAMA, window=8, global_every=5, rope_interleaved=False)
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 40)).astype(np.int32)


init = jax.jit(transformer.init, static_argnums=(0, 1, 2))


def shapes(config, format=None):
  return jax.eval_shape(lambda: transformer.init(config, 0, format))


def lively(params):
  """Norms that do something and logits that differ, so that nothing is hidden by their sameness."""
  generator = np.random.default_rng(1)

  def leaf(path, x):
    if eco.dequantize(x) is not x:  # Packed.
      return x
    if x.shape[-1] == 1 or path[-1].key == "scale":
      return jnp.asarray(generator.uniform(0.5, 1.5, x.shape), jnp.float32)
    return 3 * x

  is_packed = lambda x: isinstance(x, eco.QuantizedArray)
  return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_packed)


def assert_same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def deepseek_checkpoint(folder, dtype=np.float32):
  """A checkpoint as DeepSeek-MoE's own code names it, and its parameters by our names."""
  generator = np.random.default_rng(0)
  c, tensors = DEEPSEEK, {}

  def new(name, *shape):
    around = 1 if len(shape) == 1 else 0
    x = (around + 0.2 * generator.standard_normal(shape)).astype(dtype)
    tensors[f"{name}.weight"] = x
    return x.astype(np.float32)

  def mlp(name, hidden):
    return {
      "gate": {"kernel": new(f"{name}.gate_proj", hidden, c.width)},
      "up": {"kernel": new(f"{name}.up_proj", hidden, c.width)},
      "down": {"kernel": new(f"{name}.down_proj", c.width, hidden)},
    }

  def layer(i):
    at = f"model.layers.{i}"
    block = {
      "attention_norm": {"scale": new(f"{at}.input_layernorm", c.width)},
      "mlp_norm": {"scale": new(f"{at}.post_attention_layernorm", c.width)},
      "attention": {
        ours: {"kernel": new(f"{at}.self_attn.{theirs}_proj", c.width, c.width)}
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
      },
    }
    if i == 0:
      return block | {"mlp": mlp(f"{at}.mlp", c.mlp_width)}
    experts = [mlp(f"{at}.mlp.experts.{e}", c.expert_width) for e in range(c.experts)]
    return block | {
      "moe": {
        "router": new(f"{at}.mlp.gate", c.experts, c.width).T,
        "experts": jax.tree.map(lambda *x: np.stack(x), *experts),
        "shared": mlp(f"{at}.mlp.shared_experts", 2 * c.expert_width),
      }
    }

  blocks = [layer(i) for i in range(c.layers)]
  params = {
    "embedding": new("model.embed_tokens", c.vocabulary, c.width),
    "dense_blocks": jax.tree.map(lambda x: x[None], blocks[0]),
    "blocks": jax.tree.map(lambda *x: np.stack(x), *blocks[1:]),
    "norm": {"scale": new("model.norm", c.width)},
    "head": new("lm_head", c.vocabulary, c.width).T,
  }
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
  folder.mkdir()
  safetensors.write(folder, tensors.items(), 50_000)
  config = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "vocab_size": 128,
  }
  (folder / "config.json").write_text(json.dumps(config))
  return params


def test_deepseek_moe_is_read_and_computes_what_it_is_defined_as(tmp_path):
  params = deepseek_checkpoint(tmp_path / "deepseek")
  config = TransformerConfig(**hugging_face.read_config(tmp_path / "deepseek"))
  assert config == dataclasses.replace(DEEPSEEK, balance_weight=0.001)
  found = hugging_face.load(tmp_path / "deepseek", shapes(config), config)
  assert_same(found, jax.tree.map(jnp.asarray, params))
  wanted = numpy_transformer.forward(config, params, TOKENS[:1, :12])[0]
  found = logits(config, found, TOKENS[:1, :12])
  # Float32 sums of products up to about 30.
  np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("format", [eco.FP8, eco.INT4, eco.NVFP4, eco.Format("int8", (32, 32))])
def test_weights_are_quantized_on_the_way_and_the_same_on_any_mesh(tmp_path, format):
  params = deepseek_checkpoint(tmp_path / "deepseek", ml_dtypes.bfloat16)
  params = jax.tree.map(jnp.asarray, params)
  wanted = eco.quantize(params, format.transposed, transformer.is_block_kernel)
  target = shapes(DEEPSEEK, format)
  assert_same(hugging_face.load(tmp_path / "deepseek", target, DEEPSEEK), wanted)
  mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2, "expert": 2})
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    target,
    sharding.shardings(target, mesh),
  )
  found = hugging_face.load(tmp_path / "deepseek", placed, DEEPSEEK)
  assert_same(found, wanted)
  for x, s in zip(jax.tree.leaves(found), jax.tree.leaves(placed), strict=True):
    assert x.sharding.is_equivalent_to(s.sharding, x.ndim)
  experts = found["blocks"]["moe"]["experts"]["up"]["kernel"].qvalue
  assert experts.addressable_shards[0].data.size == experts.size // 8


def test_no_more_than_a_layer_is_in_float(tmp_path, monkeypatch):
  deepseek_checkpoint(tmp_path / "deepseek", ml_dtypes.bfloat16)
  made, make = [], jax.make_array_from_callback

  def count(shape, *args):
    made.append(make(shape, *args))
    return made[-1]

  monkeypatch.setattr(jax, "make_array_from_callback", count)
  hugging_face.load(tmp_path / "deepseek", shapes(DEEPSEEK, eco.FP8), DEEPSEEK)
  largest = max(x.size for x in made if x.dtype == jnp.bfloat16)
  assert largest == DEEPSEEK.experts * DEEPSEEK.width * DEEPSEEK.expert_width
  # In float32 there are the leaves alone that stay so.
  kept = [x.size for x in jax.tree.leaves(shapes(DEEPSEEK)) if x.ndim < 3]
  assert sum(x.size for x in made if x.dtype == jnp.float32) <= sum(kept) + 2 * 64 * 6


EXPORTS = {
  "llama": (LLAMA, "llama", None, None),
  "llama, FP8 activations": (LLAMA, "llama", eco.FP8, eco.FP8_TOKEN),
  "llama, INT4": (LLAMA, "llama", eco.INT4, None),
  "llama, INT4 in groups": (LLAMA, "llama", eco.Format("int4", (32, 1)), None),
  "llama, INT8": (LLAMA, "llama", eco.INT8, None),
  "llama, MXFP8": (LLAMA, "llama", eco.MXFP8, None),
  "llama, MXFP4": (LLAMA, "llama", eco.MXFP4, None),
  "llama, NVFP4": (LLAMA, "llama", eco.NVFP4, None),
  "long llama": (LONG, "llama", eco.FP8, None),
  "mistral": (NARROW, "mistral", eco.FP8, None),
  "qwen3": (dataclasses.replace(LLAMA, qk_norm=True), "qwen3", eco.FP8, None),
  # With activations in FP8 too, one that lies between two codes may go to either.
  "gemma": (GEMMA, "gemma3_text", eco.FP8, None),
  "gemma, blocks": (GEMMA, "gemma3_text", eco.Format("float8_e4m3fn", (32, 32)), None),
  "qwen2": (dataclasses.replace(LLAMA, qkv_bias=True), "qwen2", eco.FP8, None),
  "olmo2": (OLMO, "olmo2", eco.FP8, None),
  "mixtral": (MIXTRAL, "mixtral", eco.INT4, None),
  "deepseek": (DEEPSEEK, "deepseek", eco.INT4, None),
  "deepseek as qwen2_moe": (DEEPSEEK, "qwen2_moe", eco.INT4, None),
  "deepseek as qwen2_moe, FP8": (DEEPSEEK, "qwen2_moe", eco.FP8, None),
}


def export(name, folder):
  config, kind, format, activations = EXPORTS[name]
  config = dataclasses.replace(config, activation_format=activations)
  params = lively(init(config, 0, format))
  hugging_face.save(folder, params, config, kind=kind if kind == "qwen2_moe" else None)
  return config, params


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_written_is_read_back_bit_for_bit(name, tmp_path):
  config, params = export(name, tmp_path / "out")
  told = json.loads((tmp_path / "out" / "config.json").read_text())
  assert told["model_type"] == EXPORTS[name][1]
  found = hugging_face.load(tmp_path / "out", shapes(config, EXPORTS[name][2]), config)
  if EXPORTS[name][2] == eco.NVFP4:  # Their global scale is a reciprocal, which rounds.
    ulp = lambda x, y: np.testing.assert_allclose(x, y, rtol=1.2e-7)
    kernels = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]
    jax.tree.map(ulp, kernels(found).tensor_scale, kernels(params).tensor_scale)
    np.testing.assert_array_equal(kernels(found).qvalue, kernels(params).qvalue)
    return
  assert_same(found, params)
  fields = hugging_face.read_config(tmp_path / "out")
  fields["rope_interleaved"] = config.rope_interleaved
  again = TransformerConfig(**fields, activation_format=config.activation_format)
  assert again == config


def test_a_quantized_checkpoint_is_read_in_float_too(tmp_path):
  config, params = export("llama, INT4", tmp_path / "out")
  found = hugging_face.load(tmp_path / "out", shapes(config), config)
  assert_same(found, eco.dequantize(params))


def test_codes_of_another_format_are_read_as_values(tmp_path):
  config, params = export("llama", tmp_path / "out")
  found = hugging_face.load(tmp_path / "out", shapes(config, eco.INT4), config)
  format = eco.INT4.transposed
  assert_same(found, eco.quantize(eco.dequantize(params), format, transformer.is_block_kernel))


def rewrite(folder, change):
  tensors = {name: np.array(x) for name, x in safetensors.read(folder).items()}
  change(tensors)
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  safetensors.write(folder, tensors.items())


def test_tensors_that_are_not_as_they_should_be_are_all_named(tmp_path):
  deepseek_checkpoint(tmp_path / "deepseek")
  at = "model.layers.1.mlp.experts.5"

  def spoil(tensors):
    del tensors[f"{at}.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.gate.bias"] = np.zeros(6)
    tensors[f"{at}.down_proj.weight"] = np.zeros((32, 64))
    tensors[f"{at}.gate_proj.weight"] = np.zeros((32, 64), np.int8)

  rewrite(tmp_path / "deepseek", spoil)
  with pytest.raises(ValueError, match="does not hold this model") as error:
    hugging_face.load(tmp_path / "deepseek", shapes(DEEPSEEK), DEEPSEEK)
  text = str(error.value)
  assert f"missing model.norm.weight, {at}.up_proj.weight" in text or (
    f"missing {at}.up_proj.weight, model.norm.weight" in text
  )
  assert "not known model.layers.1.mlp.gate.bias" in text
  assert f"of another shape: {at}.down_proj is [32, 64] and has to be [64, 32]" in text
  assert f"codes without a weight_scale: {at}.gate_proj is int8" in text


def test_another_model_is_named(tmp_path):
  deepseek_checkpoint(tmp_path / "deepseek")
  other = dataclasses.replace(DEEPSEEK, layers=4, norm_epsilon=1e-5)
  with pytest.raises(ValueError, match="layers is 4 and has to be 3; norm_epsilon is 1e-05"):
    hugging_face.load(tmp_path / "deepseek", shapes(other), other)
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    hugging_face.read_config(tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model_type": "gpt2"}, "model_type 'gpt2' is none of llama"),
    ({"attention_bias": True}, "no attention_bias True"),
    ({"scoring_func": "sigmoid"}, "no scoring_func 'sigmoid'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "no rope_type 'yarn'"),
    (
      {"hidden_act": "relu", "moe_layer_freq": 2},
      "no hidden_act 'relu'; models here have no moe_layer_freq 2",
    ),
    (
      {"hidden_size": None, "rms_norm_eps": "0"},
      "hidden_size null has to be .*rms_norm_eps '0' has",
    ),
  ],
)
def test_what_models_here_have_not_is_refused(tmp_path, changes, message):
  deepseek_checkpoint(tmp_path / "deepseek")
  path = tmp_path / "deepseek" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    hugging_face.read_config(tmp_path / "deepseek")


@pytest.mark.parametrize("name", ["gemma", "deepseek as qwen2_moe"])
def test_incomplete_and_malformed_configs_are_one_line_that_names_file_and_key(name, tmp_path):
  export(name, tmp_path / "out")
  path = tmp_path / "out" / "config.json"
  whole = json.loads(path.read_text())
  nested = ("rope_parameters", "rope_scaling", "quantization_config")
  places = [((), key) for key in whole]
  places += [((key,), inside) for key in nested for inside in whole.get(key, {})]
  refused = 0
  for at, key in places:
    for value in ("absent", None, "x", -1, 0.5, True, [], {}, [1], {"y": 2}):
      changed = copy.deepcopy(whole)
      inside = changed[at[0]] if at else changed
      if value == "absent":
        del inside[key]
      else:
        inside[key] = value
      path.write_text(json.dumps(changed))
      try:
        TransformerConfig(**hugging_face.read_config(tmp_path / "out"))
      except ValueError as error:  # Anything else is a failure.
        text = str(error)
      else:
        continue
      refused += 1
      assert "\n" not in text
      assert text.startswith(f"{path}: ")
      assert key in text or "rope_" in key  # One of two keys that say the same may be named.
  assert refused > 80


def test_a_tied_head_that_is_not_the_embedding_is_refused(tmp_path):
  tied = dataclasses.replace(LLAMA, tied_embedding=True)
  hugging_face.save(tmp_path / "out", init(tied, 0), tied)
  load = lambda: hugging_face.load(tmp_path / "out", shapes(tied), tied)
  embedding = np.array(safetensors.read(tmp_path / "out")["model.embed_tokens.weight"])
  rewrite(tmp_path / "out", lambda x: x.update({"lm_head.weight": embedding}))
  load()
  rewrite(tmp_path / "out", lambda x: x.update({"lm_head.weight": embedding + 1}))
  with pytest.raises(ValueError, match=r"tie_word_embeddings is true in config\.json, and lm_head"):
    load()


def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path):
  blocks = eco.Format("float8_e4m3fn", (32, 32))
  with pytest.raises(ValueError, match="channels have to change places"):
    hugging_face.save(tmp_path / "out", init(LLAMA, 0, blocks), LLAMA)
  with pytest.raises(ValueError, match="its FP8 is E4M3"):
    hugging_face.save(tmp_path / "out", init(LLAMA, 0, eco.FP8_E5M2), LLAMA)
  odd = dataclasses.replace(LLAMA, post_norms=True)
  with pytest.raises(ValueError, match="as llama: post_norms True and not False; as mistral"):
    hugging_face.save(tmp_path / "out", init(odd, 0), odd)
  (tmp_path / "there").mkdir()
  with pytest.raises(FileExistsError, match="name another folder"):
    hugging_face.save(tmp_path / "there", init(LLAMA, 0), LLAMA)
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


needs_transformers = pytest.mark.skipif(
  not all(importlib.util.find_spec(x) for x in ("torch", "transformers", "compressed_tensors")),
  reason="transformers and compressed-tensors are in the extra [interop]",
)


def transformers_side(*args):
  command = [sys.executable, str(HERE / "transformers_side.py"), *map(str, args)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]


def logits(config, params, tokens):
  apply = jax.jit(transformer.apply, static_argnums=0)
  return np.asarray(apply(config, params, jnp.asarray(tokens, jnp.int32)))


@needs_transformers
def test_random_checkpoints_of_transformers_are_refused_or_computed_the_same(tmp_path):
  transformers_side("write", tmp_path)
  same, refused = [], []
  for folder in sorted(tmp_path.iterdir()):
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    try:
      config = TransformerConfig(**hugging_face.read_config(folder))
      params = hugging_face.load(folder, shapes(config), config)
    except ValueError as error:
      refused.append(str(error))
      continue
    if not (folder / "expected.npy").exists():  # transformers has no answer.
      continue
    wanted = np.load(folder / "expected.npy")
    found = logits(config, params, np.random.default_rng(0).integers(0, 64, (2, 24)))
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=1e-4 * scale, err_msg=str(folder))
    same.append((folder.name, kind))
  # Two of each family are as transformers writes them, and most of those can be computed here.
  untouched = [kind for name, kind in same if int(name) < 20]
  assert len(set(untouched)) == 10
  assert len(same) > len(refused)
  assert all(str(tmp_path) in text and "\n" not in text for text in refused)


BASES = {
  "llama": {},
  "mistral": {"window": 5, "global_every": 9},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True, "head_width": 16},
  "olmo2": {"pre_norms": False, "post_norms": True, "qk_norm": True, "joint_qk_norm": True},
  "gemma2": {**GEMMA_LIKE, "attention_cap": 2.0, "logit_cap": 3.0, "window": 5, "global_every": 2},
  "gemma3_text": {**GEMMA_LIKE, "qk_norm": True, "window": 5, "global_every": 3},
  "mixtral": {**ROUTED, "normalize_expert_weights": True},
  "qwen3_moe": {**ROUTED, "qk_norm": True},
  "qwen2_moe": {**ROUTED, "shared_experts": 2},
}
MUTATIONS = {
  "layers": (3, 4),
  "kv_heads": (1, 4),
  "norm_epsilon": (1e-6, 1e-2),
  "tied_embedding": (False, True),
  "rope_interleaved": (False, True),
  "rope_base": (1e3, 1e4),
  "local_rope_base": (1e3, 1e4),
  "rope_factor": (1.0, 4.0),
  "local_rope_factor": (1.0, 4.0),
  "rope_length": (0, 16),
  "window": (0, 5),
  "global_every": (1, 2, 3, 9),
  "qkv_bias": (False, True),
  "qk_norm": (False, True),
  "query_scalar": (0, 20, 2.5),
  "logit_cap": (0.0, 1.0),
  "attention_cap": (0.0, 1.0),
  "post_norms": (False, True),
}
ROUTED_MUTATIONS = {
  "dense_layers": (0, 1),
  "experts_per_token": (1, 3),
  "shared_experts": (0, 2),
  "normalize_expert_weights": (False, True),
}


def random_exports(folder, draws):
  """Saves what can be saved of random models; returns their logits by folder, and what cannot."""
  wanted, refused = {}, []
  for i in range(draws * len(BASES)):
    generator = np.random.default_rng(i)
    kind = list(BASES)[i % len(BASES)]
    fields = {"layers": 3, "width": 32, "heads": 4, "vocabulary": 64, "mlp_width": 48}
    fields |= BASES[kind]
    can = MUTATIONS | (ROUTED_MUTATIONS if fields.get("experts") else {})
    for name in generator.choice(sorted(can), 3 if i >= len(BASES) else 0, replace=False):
      fields[str(name)] = can[name][generator.integers(len(can[name]))]
    try:
      config = TransformerConfig(**fields)
      draw = lambda x, generator=generator: generator.normal(0.2, 0.3, x.shape)
      params = jax.tree.map(lambda x, draw=draw: jnp.asarray(draw(x), x.dtype), shapes(config))
      # DeepSeek's own class is not in transformers.
      asked = "qwen2_moe" if config.experts and config.shared_experts else None
      hugging_face.save(folder / f"{i:03d}", params, config, kind=asked)
    except ValueError as error:
      refused.append(str(error))
      continue
    if json.loads((folder / f"{i:03d}" / "config.json").read_text())["model_type"] == "deepseek":
      continue
    tokens = TOKENS[:, :24] % 64
    wanted[folder / f"{i:03d}"] = logits(config, params, tokens)
    np.save(folder / f"{i:03d}" / "tokens.npy", tokens)
  return wanted, refused


@needs_transformers
def test_transformers_computes_the_same_with_what_is_exported(tmp_path):
  wanted, refused = random_exports(tmp_path, 5)
  assert len(wanted) > len(refused)
  for name in EXPORTS:
    if name == "deepseek":  # It has no class of its own there.
      continue
    config, params = export(name, tmp_path / name)
    wanted[tmp_path / name] = logits(config, params, TOKENS)
    np.save(tmp_path / name / "tokens.npy", TOKENS)
    # Fused experts have no codes there, and micro-scaled ones become bfloat16 of themselves.
    if "qwen2_moe" in name or "mixtral" in name or "MX" in name or "NV" in name:
      (tmp_path / name / "dequantize").touch()
  transformers_side("serve", *wanted)
  for folder, own in wanted.items():
    served = np.load(folder / "served.npz")["logits"]
    # compressed-tensors rounds NVFP4's two scales together to bfloat16, eight bits.
    atol = 1e-2 if "NVFP4" in folder.name else 1e-4 * np.abs(own).max()
    np.testing.assert_allclose(served, own, atol=atol, err_msg=folder.name)
    shutil.rmtree(folder)
