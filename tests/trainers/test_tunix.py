"""Tunix's PeftTrainer with packed and with emulated weights, by the recipe of docs/trainers.md."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import recipe

import eco_optax as eco

pytest.importorskip("tunix", reason="google-tunix is not installed")

import orbax.checkpoint as ocp
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

import eco_optax.nnx as eco_nnx

pytestmark = [pytest.mark.standard_promotion, pytest.mark.filterwarnings("ignore")]

RECIPE = types.SimpleNamespace(**recipe("Tunix"))
FORMAT = RECIPE.FORMAT
SIZES = {"num_layers": 1, "vocab_size": 64, "embed_dim": 32, "hidden_dim": 64}
HEADS = {"num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
CONFIG = llama.ModelConfig(**SIZES, **HEADS, rope_theta=10_000, norm_eps=1e-5)
TOKENS = jax.random.randint(jax.random.key(1), (6, 8, 12), 1, 64)

adamw = lambda: eco.adamw(1e-2)
emulated = lambda: eco.adamw(1e-2, format=FORMAT, where=is_matrix)
accumulated = lambda: eco.error_feedback_to_momentum(
  optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(), eco.quantize_params()
)


def is_matrix(path, leaf):
  return leaf.ndim >= 2 and "lora" not in path


def new_model():
  """Tunix makes kernels of zeros, which checkpoints fill; these have gradients."""
  model = llama.Llama3(CONFIG, rngs=nnx.Rngs(0))
  for i, (_, x) in enumerate(nnx.iter_graph(model)):
    if isinstance(x, nnx.Param) and x.ndim >= 2:
      x[...] = 0.2 * jax.random.normal(jax.random.key(i), x.shape)
  return model


def create(packed, mesh=None):
  model = new_model()
  if mesh:
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
  return eco_nnx.pack(model, FORMAT, is_matrix) if packed else model


def unpack(model):
  """The same numbers, as floats."""
  for _, x in nnx.iter_graph(model):
    if isinstance(x, eco_nnx.PackedParam):
      value = x[...]
      x.__class__ = nnx.Param
      x.set_raw_value(value)
  return model


def to_inputs(x):
  n = x.input_tokens.shape[1]
  return {
    "input_tokens": x.input_tokens,
    "input_mask": x.input_mask,
    "positions": jnp.cumsum(x.input_mask, -1) - 1,
    "attention_mask": jnp.tril(jnp.ones((n, n), bool))[None] & x.input_mask[:, None],
  }


def train(trainer, model, tx, steps, *, accumulation=None, root=None, mesh=None, tokens=TOKENS):
  config = TrainingConfig(
    eval_every_n_steps=1000,
    max_steps=steps,
    gradient_accumulation_steps=accumulation,
    checkpoint_root_directory=root and str(root),
    checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=2),
    pbar_description=None,
  )
  losses = []
  count = steps * (accumulation or 1)
  batches = [TrainingInput(np.asarray(x), np.ones(x.shape, bool)) for x in tokens[:count]]

  class Recorded(trainer):
    def _buffer_metrics(self, buffer, loss, *args, **kwargs):
      losses.append(float(loss))
      return super()._buffer_metrics(buffer, loss, *args, **kwargs)

  with mesh or contextlib.nullcontext():
    found = Recorded(model, tx, config).with_gen_model_input_fn(to_inputs)
    found.train(batches)
  return found, losses


def codes(trainer):
  kernel = trainer.model.layers[0].mlp.up_proj.kernel
  return np.asarray(kernel.get_raw_value().qvalue)


def everything(trainer):
  state = nnx.state((trainer.model, trainer.optimizer))
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def plain(tx, steps):
  """The packed steps without Tunix and without `eco_optax.nnx`, on a tree of arrays."""
  graphdef, state = nnx.split(new_model())
  params = eco.quantize(nnx.to_pure_dict(state), FORMAT, where=is_matrix)
  opt_state = tx.init(params)

  def loss_fn(params, tokens):
    nnx.replace_by_pure_dict(state, params)
    logits, _ = nnx.merge(graphdef, state)(
      tokens, jnp.arange(12)[None].repeat(8, 0), None, jnp.tril(jnp.ones((1, 12, 12), bool))
    )
    found = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(found, tokens[:, 1:, None], -1))

  losses = []
  for tokens in TOKENS[:steps]:
    loss, grads = jax.jit(eco.value_and_grad(loss_fn))(params, tokens)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = eco.apply_updates(params, updates)
    losses.append(float(loss))
  return losses


def test_packed_training_is_that_of_a_plain_loop():
  found, losses = train(RECIPE.PackedTrainer, create(True), adamw(), 6)
  assert codes(found).dtype == jnp.float8_e4m3fn
  np.testing.assert_allclose(losses, plain(adamw(), 6), rtol=2e-4)


def test_packed_and_emulated_weights_learn_alike():
  tokens = TOKENS[:1].repeat(12, 0)
  _, packed = train(RECIPE.PackedTrainer, create(True), adamw(), 12, tokens=tokens)
  _, dense = train(PeftTrainer, unpack(create(True)), emulated(), 12, tokens=tokens)
  _, floats = train(PeftTrainer, unpack(create(True)), optax.adamw(1e-2), 12, tokens=tokens)
  assert packed[0] == pytest.approx(dense[0], rel=1e-5)
  assert floats[-1] < 0.6 * floats[0]
  assert packed[-1] == pytest.approx(floats[-1], rel=0.2)
  assert dense[-1] == pytest.approx(floats[-1], rel=0.2)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
  ("trainer", "tx", "accumulation"),
  [
    (PeftTrainer, emulated, None),
    (PeftTrainer, emulated, 2),
    (RECIPE.PackedTrainer, adamw, None),
    (RECIPE.PackedTrainer, accumulated, None),
  ],
  ids=["emulated", "emulated, accumulated", "packed", "packed, accumulated"],
)
def test_a_resumed_run_is_the_whole_one(trainer, tx, accumulation, devices, tmp_path):
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((4, 1), ("fsdp", "tp"), auto, devices=jax.devices()[:4])
  mesh = mesh if devices == 4 else None
  steps = 2 if accumulation else 6
  new = lambda: create(trainer is not PeftTrainer, mesh)
  options = {"accumulation": accumulation, "mesh": mesh}
  whole, losses = train(trainer, new(), tx(), steps + steps % 2, **options)
  train(trainer, new(), tx(), 2 if steps > 2 else 1, root=tmp_path, **options)
  resumed, rest = train(trainer, new(), tx(), steps + steps % 2, root=tmp_path, **options)
  assert 0 < len(rest) < len(losses)
  assert rest == losses[-len(rest) :]
  assert everything(resumed) == everything(whole)


def test_accumulated_gradients_are_those_of_the_whole_batch():
  nearest = eco.quantize_params(rounding="nearest")
  half = optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation()
  tx, whole = (eco.error_feedback_to_momentum(x, nearest) for x in (half, optax.adamw(1e-2)))
  twice, _ = train(RECIPE.PackedTrainer, create(True), tx, 6, tokens=jnp.repeat(TOKENS, 2, 0))
  once, _ = train(RECIPE.PackedTrainer, create(True), whole, 3)
  assert np.mean(codes(twice) == codes(once)) > 0.99
  kernel = create(True).layers[0].mlp.up_proj.kernel
  assert np.mean(codes(once) != np.asarray(kernel.get_raw_value().qvalue)) > 0.5


def test_what_tunix_would_do_with_codes_is_refused():
  with pytest.raises(TypeError, match=r"eco_optax\.nnx\.value_and_grad"):
    train(PeftTrainer, create(True), adamw(), 1)
  with pytest.raises(TypeError, match=r"optax\.MultiSteps inside"):
    train(RECIPE.PackedTrainer, create(True), adamw(), 1, accumulation=2)


def test_a_packed_base_under_lora_is_frozen():
  def create_lora():
    rule = qwix.LoraProvider(module_path=".*_proj", rank=2, alpha=4.0)
    one = {"input_tokens": (1, 1), "positions": (1, 1), "attention_mask": (1, 1, 1)}
    inputs = {k: jnp.ones(x, bool if "mask" in k else jnp.int32) for k, x in one.items()}
    model = create(False)
    model = qwix.apply_lora_to_model(model, rule, cache=None, rngs=nnx.Rngs(1), **inputs)
    return eco_nnx.pack(model, FORMAT, is_matrix)

  model = create_lora()
  before = np.asarray(model.layers[0].mlp.up_proj.kernel.get_raw_value().qvalue)
  found, losses = train(PeftTrainer, model, optax.adamw(1e-2), 6)
  _, dense = train(PeftTrainer, unpack(create_lora()), optax.adamw(1e-2), 6)
  assert np.array_equal(codes(found), before)
  np.testing.assert_allclose(losses, dense, rtol=1e-5)
  assert jnp.any(model.layers[0].mlp.up_proj.kernel_lora_b[...] != 0)


def test_weights_whose_lora_would_not_be_found_are_refused():
  class Twins(nnx.Module):
    def __init__(self, rngs):
      normal = lambda: nnx.Param(jax.random.normal(rngs.params(), (16, 16)))
      self.a, self.b = normal(), normal()

    def __call__(self, x):
      return jnp.einsum("bi,io->bo", jnp.einsum("bi,io->bo", x, self.a[...]), self.b[...])

  rule = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
  model = qwix.apply_lora_to_model(Twins(nnx.Rngs(0)), rule, jnp.ones((2, 16)), rngs=nnx.Rngs(1))
  with pytest.raises(ValueError, match=r"leaf 'a' has a LoRA of Qwix"):
    eco_nnx.pack(model, eco.FP8, is_matrix)
