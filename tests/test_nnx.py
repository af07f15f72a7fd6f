"""Packed Flax NNX models against float ones, and against the same steps in plain trees."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import eco_optax as eco

nnx = pytest.importorskip("flax.nnx")

import eco_optax.nnx as eco_nnx  # noqa: E402

# Flax's own layers add what is not of one dtype.
pytestmark = pytest.mark.standard_promotion

X = jax.random.normal(jax.random.key(0), (32, 16))
Y = jnp.sin(X)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(16, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.down = nnx.Linear(64, 16, rngs=rngs)

  def __call__(self, x):
    return self.down(self.dropout(nnx.gelu(self.norm(self.up(x)))))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(16, 16, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + jnp.tanh(self.dropout(self.linear(x)))


def stack_of(kind, layers, rngs):
  return nnx.split_rngs(splits=layers)(nnx.vmap(kind))(rngs)


class Stack(nnx.Module):
  def __init__(self, rngs):
    self.blocks = stack_of(Block, 4, rngs)

  def __call__(self, x):
    body = nnx.remat(lambda x, block: block(x))
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


def loss_fn(model, x, y):
  return jnp.mean((model(x) - y) ** 2)


def is_variable(x):
  return isinstance(x, nnx.Variable)


def stored(tree):
  """What variables hold, in place of them."""
  return jax.tree.map(
    lambda x: x.get_raw_value() if is_variable(x) else x, tree, is_leaf=is_variable
  )


def by_path(tree):
  """What variables hold, in one dictionary."""
  is_leaf = lambda x: isinstance(x, eco.QuantizedArray)
  leaves, _ = jax.tree_util.tree_flatten_with_path(stored(tree), is_leaf=is_leaf)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def dense(model):
  """The same model with float arrays in plain parameters."""
  model = nnx.clone(model)
  graph, state = nnx.split(model)
  plain = lambda x: nnx.Param(x[...]) if isinstance(x, nnx.Param) else x
  return nnx.merge(graph, jax.tree.map(plain, state, is_leaf=is_variable))


def same(a, b):
  def raw(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  a, b = jax.tree.leaves(stored(a)), jax.tree.leaves(stored(b))
  assert len(a) == len(b) > 0
  pairs = [(raw(x), raw(y)) for x, y in zip(a, b, strict=True)]
  return all(x.dtype == y.dtype and np.array_equal(*map(as_bytes, (x, y))) for x, y in pairs)


def as_bytes(x):
  return np.frombuffer(np.asarray(x).tobytes(), np.uint8)


def step(model, optimizer, x, y):
  loss, grads = eco_nnx.value_and_grad(loss_fn)(model, x, y)
  optimizer.update(model, grads)
  return loss


def train(model, tx, steps):
  optimizer = eco_nnx.Optimizer(model, tx, wrt=nnx.Param)
  compiled = nnx.jit(step)
  return [float(compiled(model, optimizer, X, Y)) for _ in range(steps)], optimizer


def train_trees(model, format, tx, steps):
  """The same in plain trees: `nnx` splits and merges, `eco` trains."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  params = eco.quantize(stored(params), format, lambda path, x: path.endswith("kernel"))
  opt_state = tx.init(params)

  @jax.jit
  def step(params, opt_state, rest):
    def of_params(params):
      own = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
      return loss_fn(own, X, Y), nnx.split(own, nnx.Param, ...)[2]

    (loss, rest), grads = eco.value_and_grad(of_params, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eco.apply_updates(params, updates), opt_state, rest, loss

  losses = []
  for _ in range(steps):
    params, opt_state, rest, loss = step(params, opt_state, rest)
    losses.append(float(loss))
  return losses, params, opt_state, rest


@pytest.mark.parametrize(
  ("model", "format", "tx"),
  [
    (Net, eco.FP8, eco.adamw(1e-2)),
    (Net, eco.INT4, eco.low_bit_moments(eco.adamw(1e-2), nu="factored")),
    (
      Net,
      eco.NVFP4,
      eco.master_weights(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        eco.quantize_params(),
        "int8",
      ),
    ),
    (
      Stack,
      eco.FP8,
      eco.error_feedback_to_momentum(optax.adamw(1e-2), eco.quantize_params(), learning_rate=1e-2),
    ),
  ],
  ids=["adamw", "low_bit_moments", "master_weights", "stack"],
)
def test_modules_train_to_the_bits_of_plain_trees(model, format, tx):
  packed = eco_nnx.pack(model(nnx.Rngs(0)), format)
  losses, optimizer = train(packed, tx, 10)
  wanted, params, opt_state, rest = train_trees(model(nnx.Rngs(0)), format, tx, 10)
  assert losses == wanted
  assert losses[-1] < 0.7 * losses[0]
  assert any(isinstance(x, eco_nnx.PackedParam) for _, x in nnx.iter_graph(packed))
  assert same(nnx.state(packed, nnx.Param), params)
  assert same(optimizer.opt_state, opt_state)
  # Running means, and counters of the keys that dropout draws.
  assert same(nnx.split(packed, nnx.Param, ...)[2], rest)
  assert int(optimizer.step[...]) == 10


@pytest.mark.parametrize("model", [Net, Stack])
def test_values_gradients_and_statistics_are_the_float_models(model):
  packed = eco_nnx.pack(model(nnx.Rngs(0)), eco.FP8)
  floats = dense(packed)
  assert not any(isinstance(x, eco_nnx.PackedParam) for _, x in nnx.iter_graph(floats))
  loss, grads = nnx.jit(eco_nnx.value_and_grad(loss_fn))(packed, X, Y)
  wanted, wanted_grads = nnx.jit(nnx.value_and_grad(loss_fn))(floats, X, Y)
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  grads, wanted_grads = by_path(grads), by_path(wanted_grads)
  assert {path: x.dtype for path, x in grads.items()} == {
    path: jnp.float32 for path in wanted_grads
  }
  for path, x in wanted_grads.items():
    np.testing.assert_allclose(grads[path], x, rtol=1e-5, atol=1e-7)
  rest, wanted_rest = (by_path(nnx.split(m, nnx.Param, ...)[2]) for m in (packed, floats))
  counts = [path for path in wanted_rest if path.endswith("count")]
  means = [path for path in wanted_rest if path.startswith("norm/")]
  assert counts
  assert len(means) == (2 if model is Net else 0)
  for path in counts:
    np.testing.assert_array_equal(rest[path], wanted_rest[path])
    assert np.all(np.asarray(rest[path]) == 1)
  for path in means:
    np.testing.assert_allclose(rest[path], wanted_rest[path], rtol=1e-5)


def test_packed_parameters_read_as_floats():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(8, 16, rngs=rngs)
      self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
      self.einsum = nnx.Einsum("bsd,df->bsf", (16, 12), (12,), rngs=rngs)
      self.own = nnx.Param(jax.random.normal(rngs.params(), (12, 6)))

    def __call__(self, tokens):
      x = self.einsum(self.attention(self.embed(tokens)))
      return x @ self.own, x @ self.own[...], jnp.dot(x, self.own), x @ self.own.T.T

  model = Model(nnx.Rngs(0))
  format = eco.Format("float8_e4m3fn", contraction_axis=eco.contraction.flax)
  assert eco_nnx.pack(model, format) is model
  packed = {
    path for path, x in by_path(nnx.state(model)).items() if isinstance(x, eco.QuantizedArray)
  }
  names = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
  assert packed == names | {"einsum/kernel", "own"}  # No bias of heads, and no embedding.
  leaf = model.own.get_raw_value()
  assert leaf.qvalue.dtype == jnp.float8_e4m3fn
  np.testing.assert_array_equal(model.own[...], leaf.dequantize())
  np.testing.assert_array_equal(model.own[2:4, 1], leaf.dequantize()[2:4, 1])
  assert (model.own.shape, model.own.dtype, model.own.ndim) == ((12, 6), jnp.float32, 2)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    np.testing.assert_array_equal(model.own.value, leaf.dequantize())
  tokens = jnp.array([[1, 2, 3]])
  for a, b in zip(model(tokens), dense(model)(tokens), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert jax.tree.map(jnp.shape, nnx.state(model))["own"].get_raw_value().scale == (1, 6)
  repr(model)


def test_shapes_of_a_packed_model_are_had_without_weights():
  model = nnx.eval_shape(lambda: eco_nnx.pack(Net(nnx.Rngs(0)), eco.INT4))
  leaf = model.up.kernel.get_raw_value()
  assert isinstance(leaf.qvalue, jax.ShapeDtypeStruct)
  assert (leaf.qvalue.shape, leaf.qvalue.dtype) == ((8, 64), jnp.uint8)
  assert (model.up.kernel.shape, model.up.kernel.dtype) == ((16, 64), jnp.float32)


def test_filters_choose_what_is_differentiated():
  class Adapted(nnx.Module):
    def __init__(self, rngs):
      self.base, self.lora = Stack(rngs), nnx.LoRA(16, 4, 16, rngs=rngs)

    def __call__(self, x):
      return self.base(x) + self.lora(x)

  model = Adapted(nnx.Rngs(0))
  eco_nnx.pack(model, eco.FP8, where=lambda path, x: path == "base/blocks/linear/kernel")
  only_lora = nnx.DiffState(0, nnx.LoRAParam)
  # A frozen base may be packed under Flax's own transformation too.
  for library in (nnx, eco_nnx):
    grads = nnx.jit(library.grad(loss_fn, argnums=only_lora))(model, X, Y)
    assert set(by_path(grads)) == {"lora/lora_a", "lora/lora_b"}
  kernels = nnx.DiffState(0, nnx.PathContains("kernel"))
  model.eval()  # Without dropout.
  (grads,) = eco_nnx.grad(loss_fn, argnums=(kernels,))(model, X, y=Y)
  (path,) = by_path(grads)
  assert path == "base/blocks/linear/kernel"
  wanted = by_path(nnx.grad(loss_fn)(dense(model), X, Y))[path]
  np.testing.assert_allclose(by_path(grads)[path], wanted, rtol=1e-5, atol=1e-7)


def test_several_models_and_further_results():
  a, b = (eco_nnx.pack(nnx.Linear(16, 16, rngs=nnx.Rngs(i)), eco.FP8) for i in (0, 1))

  @eco_nnx.value_and_grad(argnums=(0, 2), has_aux=True)
  def value(a, x, b):
    y = b(jnp.tanh(a(x)))
    return jnp.mean(y), {"largest": jnp.max(y)}

  (loss, aux), grads = value(a, X, b=b)
  plain = lambda a, x, b: (lambda y: (jnp.mean(y), {"largest": jnp.max(y)}))(b(jnp.tanh(a(x))))
  (wanted, other), others = nnx.value_and_grad(plain, argnums=(0, 2), has_aux=True)(
    dense(a), X, dense(b)
  )
  np.testing.assert_allclose([loss, aux["largest"]], [wanted, other["largest"]], rtol=1e-6)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_shared_parameters_stay_shared_and_other_kinds_are_found():
  class Kernel(nnx.Param):
    pass

  class Tied(nnx.Module):
    def __init__(self):
      self.a = Kernel(jnp.eye(16))
      self.b = self.a

    def __call__(self, x):
      return jnp.tanh(x @ self.a) @ self.b

  model = eco_nnx.pack(Tied(), eco.FP8)
  assert model.a is model.b
  assert isinstance(model.a, Kernel)
  before = model.a.get_raw_value()
  optimizer = eco_nnx.Optimizer(model, eco.adamw(1e-2), wrt=Kernel)
  grads = eco_nnx.grad(loss_fn, argnums=nnx.DiffState(0, Kernel))(model, X, Y)
  wanted = jax.grad(lambda w: jnp.mean((jnp.tanh(X @ w) @ w - Y) ** 2))(before.dequantize())
  np.testing.assert_allclose(by_path(grads)["a"], wanted, rtol=1e-5, atol=1e-7)
  optimizer.update(model, grads)
  assert model.a is model.b
  assert not same(model.a.get_raw_value(), before)


def test_steps_are_in_place():
  model = eco_nnx.pack(Net(nnx.Rngs(0)), eco.FP8)
  kernel, codes = model.up.kernel, model.up.kernel.get_raw_value().qvalue
  optimizer = eco_nnx.Optimizer(model, eco.adamw(1e-2), wrt=nnx.Param)
  nnx.jit(step, donate_argnums=(0, 1))(model, optimizer, X, Y)
  assert codes.is_deleted()
  assert model.up.kernel is kernel


def test_what_waits_for_the_backward_pass_is_codes():
  wide, layers = 128, 8

  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(wide, wide, use_bias=False, rngs=rngs)

    def __call__(self, x):
      return jnp.tanh(self.linear(x))

  def create():
    return eco_nnx.pack(stack_of(Layer, layers, nnx.Rngs(0)), eco.FP8)

  graph, state = nnx.split(nnx.eval_shape(create))
  body = nnx.remat(lambda x, block: block(x))
  scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

  def of_modules(state, x):
    loss = lambda blocks, x: jnp.mean(scan(x, blocks))
    return by_path(eco_nnx.grad(loss)(nnx.merge(graph, state), x))

  def of_trees(params, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return eco.value_and_grad(lambda w: jnp.mean(jax.lax.scan(layer, x, w)[0]))(params)[1]

  x = jax.ShapeDtypeStruct((4, wide), jnp.float32)
  params = by_path(state)["linear/kernel"]
  temporary = lambda fn, *args: jax.jit(fn).lower(*args).compile().memory_analysis()
  modules, trees = (
    temporary(fn, args, x).temp_size_in_bytes
    for fn, args in ((of_modules, state), (of_trees, params))
  )
  # The gradient aside, which is an output, no array of all layers is float32.
  assert modules < trees + 4 * wide * wide


def test_orbax_takes_a_packed_run_and_gives_it_back(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = eco.low_bit_moments(eco.adamw(1e-2))
  model = eco_nnx.pack(Net(nnx.Rngs(0)), eco.INT4)
  _, optimizer = train(model, tx, 2)
  run = model, optimizer
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "run", nnx.state(run))
    checkpointer.wait_until_finished()

    def create():
      model = eco_nnx.pack(Net(nnx.Rngs(1)), eco.INT4)
      return model, eco_nnx.Optimizer(model, tx, wrt=nnx.Param)

    graph, target = nnx.split(create())
    again = nnx.merge(graph, checkpointer.restore(tmp_path / "run", target))
  before = jax.tree.map(jnp.copy, nnx.state(run))
  compiled = nnx.jit(step)
  losses = [float(compiled(*both, X, Y)) for both in (run, again)]
  assert losses[0] == losses[1]
  assert same(nnx.state(run), nnx.state(again))
  assert not same(nnx.state(run), before)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_codes_and_moments_stay_where_they_are_on_four_devices(kind):
  class Model(nnx.Module):
    def __init__(self, rngs):
      split = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
      self.linear = nnx.Linear(16, 16, kernel_init=split, use_bias=False, rngs=rngs)

    def __call__(self, x):
      return jnp.tanh(self.linear(x))

  mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):

    def create():
      graph, state = nnx.split(Model(nnx.Rngs(0)))
      return nnx.merge(graph, jax.device_put(state, nnx.get_named_sharding(state, mesh)))

    model = eco_nnx.pack(create(), eco.FP8)
    losses, optimizer = train(model, eco.adamw(1e-2), 5)
    wanted, params, opt_state, _ = train_trees(create(), eco.FP8, eco.adamw(1e-2), 5)
    state = nnx.state(eco_nnx.pack(Model(nnx.Rngs(0)), eco.NVFP4))
    moved = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    assert losses == wanted
    assert same(nnx.state(model), params)
    assert same(optimizer.opt_state, opt_state)
    if kind == AxisType.Auto:  # Devices that are told of their parts take the same steps.
      again = eco_nnx.pack(create(), eco.FP8)
      shardings = jax.tree.map(lambda x: x.sharding, nnx.state(again, nnx.Param))
      told = eco_nnx.Optimizer(again, eco.adamw(1e-2), wrt=nnx.Param)
      grads = nnx.jit(eco_nnx.grad(loss_fn))(again, X, Y)
      nnx.jit(lambda m, o, g: o.update(m, g, shardings=shardings) and None)(again, told, grads)
      other = eco_nnx.pack(create(), eco.FP8)
      nnx.jit(lambda m, o, g: o.update(m, g) and None)(
        other, eco_nnx.Optimizer(other, eco.adamw(1e-2), wrt=nnx.Param), grads
      )
      assert same(nnx.state(again), nnx.state(other))
  columns = NamedSharding(mesh, PartitionSpec(None, "model"))
  leaf = model.linear.kernel.get_raw_value()
  matrices = [x for x in jax.tree.leaves(by_path(optimizer.opt_state)) if x.shape == (16, 16)]
  assert len(matrices) == 2
  for x in (leaf.qvalue, leaf.scale, *matrices):
    assert x.sharding.is_equivalent_to(columns, 2)
  # Scales of blocks are split as codes are, and one for the matrix is not.
  moved = by_path(moved)["linear/kernel"]
  assert moved.scale.sharding.is_equivalent_to(columns, 2)
  assert moved.tensor_scale.sharding.is_fully_replicated


def test_state_of_other_shapes_is_split_where_it_divides():
  split = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", None))
  mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    model = nnx.Linear(64, 64, kernel_init=split, use_bias=False, rngs=nnx.Rngs(0))
    weights = nnx.state(model)
    nnx.update(model, jax.device_put(weights, nnx.get_named_sharding(weights, mesh)))
    tx = eco.low_bit_moments(eco.adamw(1e-2), nu="factored")
    optimizer = eco_nnx.Optimizer(eco_nnx.pack(model, eco.FP8), tx, wrt=nnx.Param)
    state = nnx.state(optimizer)
    state = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    nnx.jit(step)(model, optimizer, X @ jnp.ones((16, 64)), X @ jnp.ones((16, 64)))
  rows = NamedSharding(mesh, PartitionSpec("model", None))
  for leaves in (by_path(state), by_path(nnx.state(optimizer))):
    shapes = {
      x.shape: x.sharding.is_equivalent_to(rows, 2) for x in jax.tree.leaves(leaves) if x.ndim == 2
    }
    # Codes, scales of blocks of 32 rows, means of rows and of columns.
    assert shapes == {(64, 64): True, (2, 64): False, (64, 1): True, (1, 64): False}


def test_a_loop_of_split_states_on_a_mesh():
  """As Flax's own example of Gemma has it: a train state with the graph and the parameters."""
  from eco_optax.linen import TrainState

  class State(TrainState):
    graphdef: nnx.GraphDef

  class Model(nnx.Module):
    def __init__(self, rngs):
      split = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
      self.linear = nnx.Linear(16, 16, kernel_init=split, rngs=rngs)

    def __call__(self, x):
      return jnp.tanh(self.linear(x))

  mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

  def init():
    model = eco_nnx.pack(Model(nnx.Rngs(0)), eco.FP8)
    graphdef, params = nnx.split(model, nnx.Param)
    state = State.create(apply_fn=None, params=params, tx=eco.adamw(1e-2), graphdef=graphdef)
    state = jax.tree.map(jnp.asarray, state)
    return jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state))

  def step(state):
    loss_of = lambda params: loss_fn(nnx.merge(state.graphdef, params), X, Y)
    loss, grads = eco.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss

  with jax.set_mesh(mesh):
    state = jax.jit(init)()
    shardings = nnx.get_named_sharding(state, mesh)
    compiled = jax.jit(step, in_shardings=(shardings,), out_shardings=(shardings, None))
    losses = []
    for _ in range(20):
      state, loss = compiled(state)
      losses.append(float(loss))
  assert losses[-1] < 0.5 * losses[0]
  leaf = state.params["linear"]["kernel"].get_raw_value()
  assert leaf.qvalue.dtype == jnp.float8_e4m3fn
  columns = NamedSharding(mesh, PartitionSpec(None, "model"))
  floats = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 16)]
  assert len(floats) == 2
  assert all(x.sharding.is_equivalent_to(columns, 2) for x in (leaf.qvalue, leaf.scale, *floats))


def test_what_knows_nothing_of_codes_is_refused():
  model = eco_nnx.pack(Stack(nnx.Rngs(0)), eco.FP8)
  for transform in (nnx.value_and_grad(loss_fn), nnx.jit(nnx.grad(loss_fn))):
    with pytest.raises(TypeError, match=r"\(16, 16\) .*codes: use eco_optax\.nnx\.value_and_grad"):
      transform(model, X, Y)
  with pytest.raises(TypeError, match="real- or complex-valued inputs"):
    nnx.grad(loss_fn)(eco_nnx.pack(Net(nnx.Rngs(0)), eco.INT4), X, Y)
  grads = eco_nnx.grad(loss_fn)(model, X, Y)
  optimizer = nnx.Optimizer(model, eco.adamw(1e-2), wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"there are eco_optax\.nnx\.Optimizer"):
    optimizer.update(model, grads)
  optimizer = eco_nnx.Optimizer(model, optax.sgd(1e-2), wrt=nnx.Param)
  with pytest.raises(ValueError, match=r"'blocks/linear/kernel' is packed, but its update is not"):
    optimizer.update(model, grads)
  with pytest.raises(TypeError, match=r"\(4, 16, 16\) takes no floats"):
    model.blocks.linear.kernel[...] = jnp.ones((4, 16, 16))

  def assign(model):
    model.blocks.linear.kernel.set_value(model.blocks.linear.kernel.get_raw_value())
    return loss_fn(model, X, Y)

  with pytest.raises(TypeError, match="is assigned in a function that is differentiated"):
    eco_nnx.grad(assign)(model)
  with pytest.raises(ValueError, match="bound"):
    eco_nnx.grad(model.__call__)
  # A failure inside leaves the model as it was.
  before = model.blocks.linear.kernel.get_raw_value()
  with pytest.raises(ZeroDivisionError):
    eco_nnx.grad(lambda model: 1 / 0)(model)
  assert model.blocks.linear.kernel.get_raw_value() is before


def test_floats_in_a_packed_parameter_are_refused_until_they_are_packed_again():
  model = eco_nnx.pack(Net(nnx.Rngs(0)), eco.FP8)
  optimizer = eco_nnx.Optimizer(model, eco.adamw(1e-2), wrt=nnx.Param)
  state = nnx.state(model)
  # The pure dictionary is the dense view.
  nnx.replace_by_pure_dict(state, nnx.to_pure_dict(state))
  other = Net(nnx.Rngs(0))
  nnx.update(eco_nnx.pack(other, eco.FP8), state)
  with pytest.raises(ValueError, match=r"leaf '(up|down)/kernel' was packed, but holds floats"):
    eco_nnx.value_and_grad(loss_fn)(other, X, Y)
  with pytest.raises(ValueError, match=r"leaf '(up|down)/kernel' was packed, but holds floats"):
    optimizer.update(other, eco_nnx.grad(loss_fn)(model, X, Y))
  eco_nnx.pack(other, eco.FP8)
  assert same(nnx.state(other, nnx.Param), nnx.state(model, nnx.Param))


def test_what_cannot_be_packed_is_named():
  with pytest.raises(ValueError, match="leaf 'up/kernel'"):
    eco_nnx.pack(Net(nnx.Rngs(0)), eco.FP8_BLOCK128, where=lambda path, x: path == "up/kernel")
  linear = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
  linear.kernel = nnx.Param(linear.kernel[...], ref=True)
  with pytest.raises(ValueError, match=r"leaf 'kernel' is an nnx\.Variable with ref=True"):
    eco_nnx.pack(linear, eco.FP8)
  with pytest.raises(ValueError, match="format must be"):
    eco_nnx.pack(Net(nnx.Rngs(0)), "fp8")


def test_weights_that_qwix_would_not_find_are_refused():
  linear = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
  linear.kernel_lora_a = nnx.LoRAParam(jnp.ones((16, 2)))
  is_base = lambda path, x: path == "kernel"
  packed = eco_nnx.pack(nnx.clone(linear), eco.FP8, is_base)
  assert isinstance(packed.kernel, eco_nnx.PackedParam)
  linear.other = nnx.Param(jnp.ones((16, 8)))
  with pytest.raises(ValueError, match=r"leaf 'kernel' has a LoRA of Qwix.*'other' beside it"):
    eco_nnx.pack(linear, eco.FP8, is_base)
