"""MaxText's training step with emulated and packed weights, by the recipe of docs/trainers.md.

MaxText needs a dozen packages more; what is tested is how it calls an optimizer, written out from
its `train_step` and `TrainStateNNX`, and from the Linen state of older versions. Layers are stacked
in the second axis of their parameters, as MaxText's are.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from recipes import recipe

import eco_optax as eco

nnx = pytest.importorskip("flax.nnx")

import flax.linen as nn  # noqa: E402
from flax.training import train_state  # noqa: E402

import eco_optax.linen  # noqa: E402

pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (16, 32))
Y = jnp.sin(X)
DATA = {"inputs": X, "targets": Y}


class TrainStateNNX(nnx.Module):
  def __init__(self, model, optimizer):
    self.model, self.optimizer = model, optimizer

  def apply_gradients(self, grads, **kwargs):
    self.optimizer.update(self.model, grads, **kwargs)


RECIPE = types.SimpleNamespace(**recipe("MaxText", nnx=nnx, TrainStateNNX=TrainStateNNX))


@dataclasses.dataclass(frozen=True)
class Config:
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-8
  adam_weight_decay: float = 0.1
  gradient_accumulation_steps: int = 1


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.RMSNorm(32, rngs=rngs)
    self.query = nnx.LinearGeneral(32, (4, 8), use_bias=False, rngs=rngs)
    self.out = nnx.LinearGeneral((4, 8), 32, axis=(-2, -1), use_bias=False, rngs=rngs)

  def __call__(self, x):
    return x + self.out(jnp.tanh(self.query(self.norm(x))))


class Model(nnx.Module):
  def __init__(self, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=nnx.StateAxes({nnx.Param: 1, ...: 0}))
    def create(rngs):
      return Layer(rngs)

    self.layers = create(rngs)
    self.logits_dense = nnx.Linear(32, 32, use_bias=False, rngs=rngs)

  def __call__(self, x):
    graphdef, params, rest = nnx.split(self.layers, nnx.Param, ...)
    # A norm's parameters have two axes here, a kernel's three or four.
    params = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0) if x.ndim > 1 else x, params)
    x, _ = jax.lax.scan(lambda x, p: (nnx.merge(graphdef, p, rest)(x), None), x, params)
    return self.logits_dense(x)


def loss_fn(model, data):
  return jnp.mean((model(data["inputs"]) - data["targets"]) ** 2)


def train_step(state, data, config, value_and_grad):
  """MaxText's, and the sum over microbatches of its `gradient_accumulation_loss_and_grad`."""
  graphdef, params, custom, rest = nnx.split(state.model, nnx.Param, nnx.BatchStat, ...)

  def diff_wrapper(params, custom, rest, data):
    model = nnx.merge(graphdef, params, custom, rest, copy=True)
    return loss_fn(model, data), nnx.state(model, nnx.Not(nnx.Param))

  if config.gradient_accumulation_steps > 1:
    grad_fn = nnx.value_and_grad(loss_fn)
    count = config.gradient_accumulation_steps
    micro = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), data)

    def add(total, data):
      loss, grads = grad_fn(nnx.merge(graphdef, params, custom, rest, copy=True), data)
      return jax.tree.map(jnp.add, total, (loss, grads)), None

    init = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    (loss, grads), _ = jax.lax.scan(add, init, micro)
    loss, grads = jax.tree.map(lambda x: x / count, (loss, grads))
  else:
    grad_fn = value_and_grad(diff_wrapper, argnums=(0, 1), has_aux=True)
    (loss, _), (grads, _) = grad_fn(params, custom, rest, data)
  grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
  grads, _ = optax.clip_by_global_norm(1.0).update(grads, optax.EmptyState())
  state.apply_gradients(grads)
  return loss


def train(packed, mesh=None, config=Config(), steps=30, restart=None, tx=None):
  def create(model=None):
    model = model or Model(nnx.Rngs(0))
    optimizer = tx or RECIPE.get_optimizer(config, optax.constant_schedule(1e-2), model, mesh)
    if packed:
      return RECIPE.create_train_state(model, optimizer)
    return TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))

  value_and_grad = RECIPE.value_and_grad if packed else jax.value_and_grad
  state, losses = create(), []
  data = DATA
  if mesh is not None:
    model = Model(nnx.Rngs(0))
    spec = lambda x: jax.sharding.PartitionSpec("fsdp" if x.ndim > 2 else None)
    shard = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(x)))
    nnx.update(model, jax.tree.map(shard, nnx.state(model)))
    state = create(model)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    data = jax.device_put(DATA, rows)

  @jax.jit
  def step(pure, data):
    new = nnx.merge(graphdef, pure)
    loss = train_step(new, data, config, value_and_grad)
    return nnx.state(new), loss

  graphdef, pure = nnx.split(state)
  for i in range(steps):
    if i == restart:
      arrays = [np.asarray(x) for x in jax.tree.leaves(pure)]
      graphdef, new = nnx.split(create())
      pure = jax.tree.unflatten(jax.tree.structure(new), map(jnp.asarray, arrays))
    pure, loss = step(pure, data)
    losses.append(float(loss))
  return nnx.merge(graphdef, pure), losses


@pytest.mark.parametrize("devices", [1, 4])
def test_packed_and_emulated_weights_learn_as_floats_do(devices):
  mesh = None
  if devices == 4:
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("fsdp",), auto, devices=jax.devices()[:4])
  _, floats = train(False, mesh, tx=optax.adamw(1e-2, b2=0.95, weight_decay=0.1))
  emulated, dense = train(False, mesh)
  state, packed = train(True, mesh)
  assert floats[-1] < 0.2 * floats[0]
  assert packed[-1] < 0.3 * packed[0]
  assert dense[-1] < 0.3 * dense[0]
  layers = state.model.layers
  leaf = layers.query.kernel.get_raw_value()
  assert leaf.qvalue.dtype == jnp.float8_e4m3fn
  # Each output of each layer has its scale.
  assert leaf.scale.shape == (1, 3, 4, 8)
  assert layers.out.kernel.get_raw_value().scale.shape == (1, 3, 1, 32)
  assert not eco_optax.quantized_array.is_quantized(layers.norm.scale.get_raw_value())
  # An emulated kernel holds few values in each column, and its norm any.
  column = np.asarray(emulated.model.layers.query.kernel[...])[:, 1, 2, 3]
  again = eco.quantize({"kernel": jnp.asarray(column)[:, None]}, eco.FP8)["kernel"]
  np.testing.assert_allclose(again.dequantize()[:, 0], column, rtol=1e-5)


def test_a_restored_state_goes_on_as_it_was():
  for packed in (False, True):
    whole, losses = train(packed, steps=6)
    restored, rest = train(packed, steps=6, restart=3)
    assert rest == losses
    leaves = lambda state: [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(state))]
    assert leaves(restored) == leaves(whole)


def test_accumulated_gradients_are_those_of_the_batch_or_refused():
  config = Config(gradient_accumulation_steps=2)
  _, whole = train(False, steps=3)
  _, halves = train(False, config=config, steps=3)
  np.testing.assert_allclose(halves, whole, rtol=1e-3)
  with pytest.raises(TypeError, match=r"eco_optax\.nnx\.value_and_grad"):
    train(True, config=config, steps=1)


def test_without_the_recipe_codes_are_refused():
  state, _ = train(True, steps=1)
  with pytest.raises(TypeError, match="differentiated with respect to its codes"):
    train_step(state, DATA, Config(), jax.value_and_grad)


class LinenLayer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    boxed = lambda *names: nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
    h = nn.Dense(64, use_bias=False, kernel_init=boxed("embed", "mlp"), name="wi")(x)
    return x + nn.Dense(32, use_bias=False, kernel_init=boxed("mlp", "embed"), name="wo")(
      jnp.tanh(h)
    ), None


class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, x):
    metadata = {nn.PARTITION_NAME: "layers"}
    stack = nn.scan(
      LinenLayer,
      variable_axes={"params": 1},
      split_rngs={"params": True},
      length=3,
      metadata_params=metadata,
    )
    return stack(name="layers")(x, None)[0]


def test_the_linen_state_of_older_versions():
  model, tx = LinenModel(), RECIPE.get_optimizer(Config(), optax.constant_schedule(1e-2))
  boxed = model.init(jax.random.key(0), X)
  assert isinstance(boxed["params"]["layers"]["wi"]["kernel"], nn.LogicallyPartitioned)
  unbox = lambda tree: jax.tree.map(
    lambda x: x.unbox() if isinstance(x, nn.LogicallyPartitioned) else x,
    tree,
    is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
  )
  # The state is made of boxed parameters, and its boxes are taken off.
  state = unbox(train_state.TrainState.create(apply_fn=model.apply, params=boxed, tx=tx))
  plain = train_state.TrainState.create(apply_fn=model.apply, params=unbox(boxed), tx=tx)
  assert jax.tree.structure(state.opt_state) == jax.tree.structure(plain.opt_state)
  params = eco.quantize(unbox(boxed), RECIPE.FORMAT, where=RECIPE.is_kernel)
  assert params["params"]["layers"]["wi"]["kernel"].scale.shape == (1, 3, 64)
  packed = eco_optax.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  def run(state, value_and_grad):
    @jax.jit
    def step(state):
      loss_fn = lambda params: jnp.mean((state.apply_fn(params, X) - Y) ** 2)
      loss, grads = value_and_grad(loss_fn)(state.params)
      return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(30):
      state, loss = step(state)
      losses.append(float(loss))
    return losses

  emulated = run(state, jax.value_and_grad)
  assert emulated == run(plain, jax.value_and_grad)
  assert emulated[-1] < 0.3 * emulated[0]
  codes = run(packed, eco.value_and_grad)
  assert codes[-1] < 0.3 * codes[0]
