"""The loop of Flax's `examples/gemma` with packed and with emulated weights.

The example is no package: its `train_step` and `setup_initial_state` are written out here, with a
block of a transformer that has its names, shapes and shardings.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from recipes import recipe

import eco_optax as eco

nnx = pytest.importorskip("flax.nnx")

import flax  # noqa: E402
from flax.training import checkpoints, train_state  # noqa: E402

pytestmark = pytest.mark.standard_promotion

BATCH = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)


@pytest.fixture(autouse=True)
def sharded_variables():
  """Tunix turns off, for the whole process, what explicit axes need."""
  name = "flax_always_shard_variable"
  if not hasattr(flax.config, name):
    yield
    return
  before = getattr(flax.config, name)
  flax.config.update(name, True)
  yield
  flax.config.update(name, before)


@dataclasses.dataclass(frozen=True)
class Config:
  learning_rate: float = 1e-2
  weight_decay: float = 1e-4


def sharded(*names):
  """What operations ask for whose result may be split in several ways."""
  explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
  return {"out_sharding": PartitionSpec(*names)} if explicit else {}


def new_param(rngs, shape, names):
  init = nnx.with_partitioning(nnx.initializers.normal(0.1), names)
  return nnx.Param(init(rngs.params(), shape))


class Einsum(nnx.Module):
  def __init__(self, einsum_str, shape, names, *, rngs):
    self.einsum_str = einsum_str
    self.w = new_param(rngs, shape, names)

  def __call__(self, x, **options):
    return jnp.einsum(self.einsum_str, x, self.w[...], **options)


class Transformer(nnx.Module):
  def __init__(self, config, *, rngs):
    self.input_embedding = new_param(rngs, (64, 32), (None, "model"))
    self.q_einsum = Einsum("BTD,NDH->BTNH", (4, 32, 8), ("model", None, None), rngs=rngs)
    self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (4, 8, 32), (None, None, "model"), rngs=rngs)
    self.scale = nnx.Param(jnp.zeros(32))

  def __call__(self, tokens):
    whole = sharded("data", None, None)
    x = self.input_embedding[...].at[tokens].get(**whole)
    heads = self.q_einsum(x * (1 + self.scale[...]), **sharded("data", None, "model", None))
    x = x + self.attn_vec_einsum(jnp.tanh(heads), **whole)
    return jnp.einsum("BTD,VD->BTV", x, self.input_embedding[...], **whole)


class FloatState(train_state.TrainState):
  graphdef: nnx.GraphDef


FLOATS = types.SimpleNamespace(
  TrainState=FloatState,
  value_and_grad=jax.value_and_grad,
  constructor=lambda config, key: Transformer(config, rngs=nnx.Rngs(params=key)),
)
PACKED = types.SimpleNamespace(
  **recipe("Flax's `examples/gemma`", nnx=nnx, jax=jax, Transformer=Transformer)
)
EMULATED = lambda: eco.adamw(1e-2, format=PACKED.FORMAT)
ACCUMULATED = lambda: eco.error_feedback_to_momentum(
  optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(), eco.quantize_params()
)


def setup_initial_state(parts, tx, mesh):
  @jax.jit
  def sharded_init():
    model = parts.constructor(Config(), jax.random.key(0))
    graphdef, params = nnx.split(model, nnx.Param)
    state = parts.TrainState.create(
      apply_fn=graphdef.apply, params=params, tx=tx, graphdef=graphdef
    )
    state = jax.tree.map(jnp.asarray, state)
    return jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))

  with jax.set_mesh(mesh):
    state = sharded_init()
  return state, nnx.get_named_sharding(state, mesh)


def train(parts, tx, mesh, steps=20, workdir=None):
  def train_step(state, tokens):
    def loss_fn(params):
      logits = nnx.merge(state.graphdef, params)(tokens)
      targets = jnp.roll(tokens, 1, 1)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      return losses.mean(), logits

    (loss, _), grads = parts.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss

  state, state_sharding = setup_initial_state(parts, tx, mesh)
  if workdir:
    state = jax.device_put(checkpoints.restore_checkpoint(workdir, state), state_sharding)
  data_sharding = NamedSharding(mesh, PartitionSpec("data"))
  step = jax.jit(
    train_step,
    in_shardings=(state_sharding, data_sharding),
    out_shardings=(state_sharding, None),
    donate_argnums=0,
  )
  losses = []
  with jax.set_mesh(mesh):
    for _ in range(int(state.step), steps):
      state, loss = step(state, jax.device_put(BATCH, data_sharding))
      losses.append(float(loss))
  if workdir:
    checkpoints.save_checkpoint_multiprocess(workdir, state, steps)
  return state, losses


def mesh_of(devices, axis):
  shape = (2, 2) if devices == 4 else (1, 1)
  return jax.make_mesh(shape, ("data", "model"), (axis,) * 2, devices=jax.devices()[:devices])


def contents(state):
  return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.opt_state))]


@pytest.mark.parametrize(
  ("devices", "axis"),
  [(1, AxisType.Auto), (4, AxisType.Auto), (4, AxisType.Explicit)],
  ids=["1", "4, auto", "4, explicit"],
)
def test_the_loop_learns_with_codes_as_with_floats(devices, axis):
  mesh = mesh_of(devices, axis)
  _, floats = train(FLOATS, optax.adamw(1e-2), mesh)
  _, emulated = train(FLOATS, EMULATED(), mesh)
  state, packed = train(PACKED, eco.adamw(1e-2), mesh)
  assert floats[-1] < 0.6 * floats[0]
  np.testing.assert_allclose(packed, floats, rtol=0.05)
  np.testing.assert_allclose(emulated, floats, rtol=0.05)
  leaf = state.params.q_einsum.w.get_raw_value()
  assert leaf.qvalue.dtype == jnp.float8_e4m3fn
  assert leaf.qvalue.sharding.is_fully_replicated == (devices == 1)
  # A scale for each output: the heads' sum goes over two axes.
  assert leaf.scale.shape == (4, 1, 8)
  assert state.params.attn_vec_einsum.w.get_raw_value().scale.shape == (1, 1, 32)


@pytest.mark.parametrize(
  ("parts", "tx"),
  [
    (FLOATS, EMULATED),
    (PACKED, lambda: eco.adamw(1e-2)),
    (PACKED, ACCUMULATED),
    (FLOATS, lambda: optax.MultiSteps(EMULATED(), 2)),
  ],
  ids=["emulated", "packed", "packed, accumulated", "emulated, accumulated"],
)
def test_a_resumed_run_is_the_whole_one(parts, tx, tmp_path):
  pytest.importorskip("orbax.checkpoint")
  mesh = mesh_of(4, AxisType.Explicit)
  whole, losses = train(parts, tx(), mesh, steps=6)
  _, first = train(parts, tx(), mesh, steps=3, workdir=tmp_path)
  resumed, rest = train(parts, tx(), mesh, steps=6, workdir=tmp_path)
  assert losses[-1] < losses[0]
  assert first + rest == losses
  assert contents(resumed) == contents(whole)


def test_without_the_recipe_codes_are_refused():
  mesh = mesh_of(1, AxisType.Auto)
  plain = types.SimpleNamespace(**vars(PACKED) | {"value_and_grad": jax.value_and_grad})
  with pytest.raises(TypeError, match="differentiated with respect to its codes"):
    train(plain, eco.adamw(1e-2), mesh, steps=1)
  plain = types.SimpleNamespace(**vars(PACKED) | {"TrainState": FloatState})
  with pytest.raises(ValueError, match=r"eco_optax\.linen\.TrainState"):
    train(plain, eco.adamw(1e-2), mesh, steps=1)
