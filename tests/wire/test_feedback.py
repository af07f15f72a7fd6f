"""Methods of gradient exchange, beside the papers' algorithms in float64."""

import dataclasses
import functools
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax import wire
from eco_optax.wire.exchange import mean_in_order

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference

P = jax.sharding.PartitionSpec
N, SHAPE, STEPS, BLOCK = 4, (9, 21), 20, 64  # 189 values: three blocks, the last of 61.
D = SHAPE[0] * SHAPE[1]
EVERYTHING = lambda path, leaf: True
COMPRESSORS = {
  "sign": (wire.sign(BLOCK), reference.sign(BLOCK)),
  "top_k": (wire.top_k(5, BLOCK), reference.top_k(5, BLOCK)),
}
WEIGHTS = np.array([1.0, 2.0, 3.0, 10.0])
METHODS = {
  "compressed": (
    lambda c, **how: wire.compressed(c, "data", workers=how["workers"], where=how["where"]),
    reference.Compressed,
  ),
  "error_feedback": (
    lambda c, **how: wire.error_feedback(c, "data", **how),
    reference.ErrorFeedback,
  ),
  "ef21": (lambda c, **how: wire.ef21(c, "data", **how), reference.EF21),
  "ef21_w": (
    lambda c, **how: wire.ef21(c, "data", smoothness=WEIGHTS, **how),
    functools.partial(reference.EF21, weights=WEIGHTS / WEIGHTS.sum()),
  ),
  "econtrol": (
    lambda c, **how: wire.econtrol(c, "data", eta=0.3, **how),
    functools.partial(reference.EControl, eta=0.3),
  ),
  "one_bit_adam": (
    lambda c, **how: wire.scale_by_one_bit_adam(
      "data", 5, b1=0.8, b2=0.9, eps=1e-3, compressor=c, **how
    ),
    functools.partial(reference.OneBitAdam, warmup=5, b1=0.8, b2=0.9, eps=1e-3),
  ),
}
GRADIENTS = np.random.default_rng(0).standard_normal((STEPS, N, *SHAPE)).astype(np.float32)


def mesh_of(count=N):
  return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def stepper(tx, state, mesh):
  """A jitted step of the transformation alone, over a mesh."""
  specs = wire.specs(state, "data")

  def step(grads, state):
    updates, state = tx.update(jax.tree.map(lambda x: x[0], grads), state)
    # Of every worker, so that a test can see that they are the same.
    return jax.tree.map(lambda x: x[None], updates), state

  return jax.jit(
    jax.shard_map(
      step, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P("data"), specs), check_vma=False
    )
  )


@pytest.mark.parametrize(
  ("method", "compressor", "exchange"),
  [
    (method, compressor, exchange)
    for method, compressor, exchange in itertools.product(
      METHODS, COMPRESSORS, ("gather", "scatter")
    )
    if (method, exchange) != ("compressed", "scatter")
  ],
)
def test_steps_are_those_of_the_papers(method, compressor, exchange):
  ours, theirs = COMPRESSORS[compressor]
  make, algorithm = METHODS[method]
  tx = make(ours, exchange=exchange, workers=N, where=EVERYTHING)
  wanted = algorithm(theirs, N, D, second=theirs if exchange == "scatter" else None)
  state = tx.init({"w": jnp.zeros(SHAPE)})
  step = stepper(tx, state, mesh_of())
  for i, grads in enumerate(GRADIENTS):
    updates, state = step({"w": grads}, state)
    expected = wanted.step(grads.reshape(N, D).astype(np.float64)).reshape(SHAPE)
    size = np.abs(expected).max()
    for worker in np.asarray(updates["w"]):
      np.testing.assert_allclose(worker, expected, atol=3e-5 * size, err_msg=f"step {i}")
  for name, array in (("error", "e"), ("estimate", "h")):
    if name in state.own:
      own = np.asarray(state.own[name]["w"]).reshape(N, D)
      np.testing.assert_allclose(own, getattr(wanted, array), atol=1e-4)


@pytest.mark.parametrize("name", ["fp8", "int4", "int2", "random_k"])
def test_errors_are_what_was_not_sent(name):
  """Σ g = Σ mean(g_i) − mean(e) − ē: whatever is drawn, nothing is lost."""
  compressor = {
    "fp8": wire.fp8(BLOCK),
    "int4": wire.int4(BLOCK),
    "int2": wire.integers(2, BLOCK),
    "random_k": wire.random_k(8, BLOCK),
  }[name]
  tx = wire.error_feedback(compressor, "data", workers=N, where=EVERYTHING)
  state = tx.init(jnp.zeros(SHAPE))
  step = stepper(tx, state, mesh_of())
  total = np.zeros(SHAPE)
  for grads in GRADIENTS:
    updates, state = step(grads, state)
    total += np.asarray(updates[0], np.float64)
  left = np.asarray(state.own["error"], np.float64).mean(axis=0)
  if state.server is not None:
    left += np.asarray(state.server, np.float64).reshape(-1)[:D].reshape(SHAPE)
  np.testing.assert_allclose(
    total + left, GRADIENTS.astype(np.float64).mean(axis=1).sum(axis=0), atol=2e-4
  )
  assert np.abs(left).max() > 1e-3


def test_ef21_w_takes_the_steps_of_ef21():
  """Compressors that scale with their input do not see the weights."""
  out = []
  for smoothness in (None, WEIGHTS):
    tx = wire.ef21(wire.top_k(5, BLOCK), "data", smoothness=smoothness, exchange="gather",
                   workers=N, where=EVERYTHING)  # fmt: skip
    state = tx.init(jnp.zeros(SHAPE))
    step = stepper(tx, state, mesh_of())
    for grads in GRADIENTS[:5]:
      updates, state = step(grads, state)
    out.append(np.asarray(updates[0]))
  np.testing.assert_allclose(*out, atol=1e-5)


def test_vmap_and_shard_map_take_the_same_steps():
  tx = wire.error_feedback(wire.int4(BLOCK), "data", where=EVERYTHING)
  over_workers = functools.partial(jax.vmap, axis_name="data")
  mapped_state = jax.vmap(tx.init, axis_name="data", axis_size=N, in_axes=None)(jnp.zeros(SHAPE))
  tx_outside = wire.error_feedback(wire.int4(BLOCK), "data", workers=N, where=EVERYTHING)
  state = tx_outside.init(jnp.zeros(SHAPE))
  step = stepper(tx_outside, state, mesh_of())
  mapped_step = jax.jit(over_workers(tx.update))
  for grads in GRADIENTS[:3]:
    updates, state = step(grads, state)
    mapped, mapped_state = mapped_step(jnp.asarray(grads), mapped_state)
    np.testing.assert_array_equal(mapped, updates)
  np.testing.assert_array_equal(mapped_state.own["error"][:, 0], state.own["error"])


def test_workers_may_be_along_several_axes():
  axes = ("slice", "host")
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:N]).reshape(2, 2), axes)
  updates = []
  for axis, over in (("data", mesh_of()), (axes, mesh)):
    tx = wire.error_feedback(wire.int4(BLOCK), axis, workers=N, where=EVERYTHING)
    state = tx.init(jnp.zeros(SHAPE))
    specs = wire.specs(state, axis)
    step = jax.shard_map(
      lambda g, state, tx=tx: tx.update(g[0], state),
      mesh=over,
      in_specs=(P(axis), specs),
      out_specs=(P(), specs),
      check_vma=False,
    )
    updates.append(jax.jit(step)(GRADIENTS[0], state)[0])
  np.testing.assert_array_equal(*updates)


def test_workers_draw_bits_of_their_own_and_the_same_ones_anew():
  """The mean of n roundings of one gradient varies n times less than a single one."""
  grads = jnp.broadcast_to(jnp.asarray(GRADIENTS[0, 0]), (N, *SHAPE))
  tx = wire.compressed(wire.int4(BLOCK), "data", workers=N, where=EVERYTHING)
  one = wire.compressed(wire.int4(BLOCK), "data", workers=1, where=EVERYTHING)
  state = tx.init(jnp.zeros(SHAPE))
  step, single = stepper(tx, state, mesh_of()), stepper(one, state, mesh_of(1))
  errors, errors_of_one = [], []
  for i in range(40):
    at = state._replace(step=jnp.int32(i))
    errors.append(np.asarray(step(grads, at)[0][0]) - grads[0])
    errors_of_one.append(np.asarray(single(grads[:1], at)[0][0]) - grads[0])
  ratio = np.mean(np.square(errors_of_one)) / np.mean(np.square(errors))
  assert 3.3 < ratio < 4.8
  np.testing.assert_array_equal(step(grads, at)[0][0] - grads[0], errors[-1])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "compressed"])
def test_a_gradient_that_is_not_finite_changes_no_state(method):
  tx = METHODS[method][0](wire.int4(BLOCK), workers=N, where=lambda path, leaf: path == "w")
  state = tx.init({"w": jnp.zeros(SHAPE), "b": jnp.zeros(3)})
  step = stepper(tx, state, mesh_of())
  grads = {"w": GRADIENTS[0], "b": np.ones((N, 3), np.float32)}
  _, state = step(grads, state)
  for leaf, value in itertools.product(("w", "b"), (np.nan, np.inf, 3e38)):
    bad = jax.tree.map(np.copy, grads)
    bad[leaf].reshape(N, -1)[2, 1] = value  # Of one worker; 3e38 is finite, sums of it are not.
    if value == 3e38:
      bad[leaf][:] = value
      if method not in ("one_bit_adam",) and leaf == "b":
        continue  # A mean of large numbers that is finite.
    updates, new_state = step(bad, state)
    if value == 3e38 and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates)):
      assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new_state))
      continue
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
  updates, _ = step(grads, state)  # And it goes on.
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_means_in_order_are_those_of_each_leaf(dtype):
  generator = np.random.default_rng(0)
  shapes = {"a": (7,), "b/c": (3, 5), "scalar": ()}
  own = {
    path: generator.standard_normal((N, *shape)).astype(dtype) for path, shape in shapes.items()
  }
  with jax.enable_x64(dtype == np.float64):
    mean = jax.vmap(lambda leaves: mean_in_order("data", leaves), axis_name="data")(own)
  for path, x in own.items():
    # One after another, which NumPy's cumulative sum is too.
    wanted = np.cumsum(x, axis=0, dtype=dtype)[-1] / dtype(N)
    np.testing.assert_array_equal(mean[path], np.broadcast_to(wanted, x.shape), path)
    assert mean[path].dtype == dtype


def test_small_leaves_are_exchanged_exactly():
  tx = wire.error_feedback(wire.sign(BLOCK), "data", workers=N)
  params = {"large": jnp.zeros(512), "small": jnp.zeros(511, jnp.bfloat16)}
  state = tx.init(params)
  assert jax.tree.map(jnp.shape, state.own["error"])["large"] == (N, 512)
  assert len(jax.tree.leaves(state.own)) == 1
  grads = {
    "large": np.ones((N, 512), np.float32),
    "small": np.broadcast_to(np.arange(N)[:, None], (N, 511)).astype(jnp.bfloat16),
  }
  updates, _ = stepper(tx, state, mesh_of())(grads, state)
  assert updates["small"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(updates["small"][0], np.float32), 1.5)


def collectives(compressor, exchange, count=N):
  from eco_optax.training import compile as compile_lib

  tx = wire.error_feedback(compressor, "data", exchange=exchange, workers=count, where=EVERYTHING)
  params = {"a": jnp.zeros((64, 96)), "b": jnp.zeros((128, 16))}  # 8,192 values.
  state = tx.init(params)
  grads = jax.tree.map(lambda x: jnp.zeros((count, *x.shape)), params)
  text = stepper(tx, state, mesh_of(count)).lower(grads, state).compile().as_text()
  found = compile_lib.collectives(text)
  return {kind: {d: x["bytes"] for d, x in by.items()} for kind, by in found.items()}


@pytest.mark.parametrize("name", ["sign", "int4", "fp8"])
def test_what_crosses_the_wire_are_packed_bytes(name):
  """Read from the compiled program: codes in whole bytes, and scales; nothing in float."""
  compressor = {"sign": wire.sign(64), "int4": wire.int4(64), "fp8": wire.fp8(64)}[name]
  bits = {"sign": 1, "int4": 4, "fp8": 8}[name]
  found = collectives(compressor, "scatter")
  codes, scales = 8192 * bits // 8, 8192 // 64 * 4
  assert found["all-to-all"] == {"u8": codes, "f32": scales}
  assert found["all-gather"] == {"u8": codes, "f32": scales}
  assert found["all-reduce"] == {"s32": 4}  # Whether all is finite.
  assert codes + scales == compressor.bytes_per_value * 8192
  found = collectives(compressor, "gather")
  assert found["all-gather"] == {"u8": N * codes, "f32": N * scales}
  assert "all-to-all" not in found


def test_random_k_sums_its_values_on_the_way():
  found = collectives(wire.random_k(32), "scatter")
  assert sum(x for by in found.values() for x in by.values()) == 8192 // 32 * 4 + 4


@pytest.mark.standard_promotion
@pytest.mark.parametrize("compressor", ["sign", "int4"])
def test_weights_moments_and_wire_are_all_of_few_bits(compressor):
  """In a chain with `eco.adamw`: workers agree to the bit, and learn as without compression."""
  x = jax.random.normal(jax.random.key(0), (64, 32))
  y = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (32, 16)))
  start = eco.quantize({"w": 0.1 * jax.random.normal(jax.random.key(2), (32, 16))}, eco.FP8)
  loss = lambda p, batch: jnp.mean((batch[0] @ p["w"] - batch[1]) ** 2)
  adam = eco.low_bit_moments(eco.adamw(1e-2))
  exchanges = {
    "exact": optax.stateless(lambda updates, _: jax.lax.pmean(updates, "data")),
    compressor: wire.error_feedback(wire.COMPRESSORS[compressor](), "data", workers=N),
  }
  losses = {}
  for name, exchange in exchanges.items():
    tx = optax.chain(exchange, adam)
    params, state = start, tx.init(start)
    specs = wire.specs(state, "data")

    def step(params, state, batch, tx=tx):
      grads = eco.value_and_grad(loss)(params, batch)[1]
      updates, state = tx.update(grads, state, params)
      params = eco.apply_updates(params, updates)
      return params, state, params["w"].qvalue[None]

    step = jax.jit(
      jax.shard_map(
        step,
        mesh=mesh_of(),
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs, P("data")),
        check_vma=False,
      )
    )
    for _ in range(60):
      params, state, codes = step(params, state, (x, y))
    codes = np.asarray(codes).view(np.uint8)
    assert all(np.array_equal(codes[0], other) for other in codes)
    losses[name] = float(loss(eco.dequantize(params), (x, y)))
  assert losses["exact"] < 0.5 * float(loss(eco.dequantize(start), (x, y)))
  behind = {"int4": 0.03, "sign": 0.15}[compressor]  # A bit per value, both ways, takes its time.
  assert abs(losses[compressor] / losses["exact"] - 1) < behind


def test_another_number_of_workers_takes_over_the_mean_of_all_errors():
  for method in ("econtrol", "one_bit_adam"):
    make = METHODS[method][0]
    tx = make(wire.sign(BLOCK), workers=N, where=EVERYTHING)
    state = tx.init(jnp.zeros(SHAPE))
    step = stepper(tx, state, mesh_of())
    for grads in GRADIENTS[:8]:
      _, state = step(grads, state)
    state = jax.device_get(state)
    other = jax.device_get(wire.on_workers(state, 2))
    for name in state.own:
      means = [np.asarray(s.own[name]).mean(axis=0) for s in (state, other)]
      np.testing.assert_allclose(*means, atol=1e-6)
    values = [np.asarray(s.server).reshape(-1, BLOCK)[:3] for s in (state, other)]
    np.testing.assert_array_equal(*values)
    tx = make(wire.sign(BLOCK), workers=2, where=EVERYTHING)
    _, after = stepper(tx, other, mesh_of(2))(GRADIENTS[8, :2], other)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, other)


def test_ef21_compressed_both_ways_keeps_what_workers_and_server_know_together():
  """mean(h_i) = h + ē at all times, also after another number of workers took over."""
  tx = wire.ef21(wire.sign(BLOCK), "data", workers=N, where=EVERYTHING)
  state = tx.init(jnp.zeros(SHAPE))
  step = stepper(tx, state, mesh_of())
  for grads in GRADIENTS:
    _, state = step(grads, state)
  for held in (state, wire.on_workers(state, 3)):
    known = np.asarray(held.own["estimate"]).mean(axis=0)
    left = np.asarray(held.server).reshape(-1)[:D].reshape(SHAPE)
    np.testing.assert_allclose(held.shared["mean"] + left, known, atol=1e-5)


def test_misuse_is_named_with_its_remedy():
  tx = wire.error_feedback(wire.sign(BLOCK), "data", workers=N, where=EVERYTHING)
  state, grads = tx.init(jnp.zeros(SHAPE)), jnp.zeros(SHAPE)
  with pytest.raises(ValueError, match=r"'data' is not in scope: call update inside jax.shard_map"):
    tx.update(grads, state)
  unknown = wire.error_feedback(wire.sign(BLOCK), "data")
  with pytest.raises(ValueError, match=r"init cannot know how many workers.*workers=…"):
    unknown.init(jnp.zeros(SHAPE))
  with pytest.raises(ValueError, match="is of 4 workers, and axis 'data' has 2: make it with"):
    stepper(tx, state, mesh_of(2))(GRADIENTS[0, :2], state)
  several = wire.error_feedback(wire.sign(BLOCK), "data", where=EVERYTHING)
  with pytest.raises(
    ValueError, match=r"error of the array is of 2 workers where one is.*on_workers"
  ):
    stepper(several, state, mesh_of(2))(GRADIENTS[0, :2], state)
  with pytest.raises(
    ValueError, match=r"wire.ef21 feeds errors back, and random_k.*no contraction"
  ):
    wire.ef21(wire.random_k(8, unbiased=True), "data")
  with pytest.raises(ValueError, match="unknown exchange 'ring': use 'scatter' or 'gather'"):
    wire.econtrol(wire.sign(), "data", exchange="ring")
  with pytest.raises(ValueError, match="smoothness must be positive"):
    wire.ef21(wire.sign(), "data", smoothness=[1.0, 0.0])
  with pytest.raises(ValueError, match="eta must be between 0 and 1, got 2"):
    wire.econtrol(wire.sign(), "data", eta=2.0)
  with pytest.raises(ValueError, match="warmup must be 1 step or more, got 0"):
    wire.scale_by_one_bit_adam("data", 0)
  step = stepper(tx, state, mesh_of())
  with pytest.raises(
    ValueError, match=r"the array has shape .4, 9, 21.*of other parameters|asks for"
  ):
    step(np.zeros((N, 8, 8), np.float32), state)
  with pytest.raises(TypeError, match=r"the array is no float gradient but .* of int32"):
    step(np.zeros((N, *SHAPE), np.int32), state)
  with pytest.raises(
    ValueError, match=r"has \['error'\] where the method needs \['estimate', 'mean'\]"
  ):
    stepper(wire.ef21(wire.sign(), "data", where=EVERYTHING), state, mesh_of())(GRADIENTS[0], state)


def test_gradients_that_shard_map_has_summed_are_refused():
  tx = wire.error_feedback(wire.sign(BLOCK), "data", workers=N, where=EVERYTHING)
  state = tx.init(jnp.zeros(SHAPE))
  specs = wire.specs(state, "data")
  step = jax.shard_map(tx.update, mesh=mesh_of(), in_specs=(P(), specs), out_specs=(P(), specs))
  with pytest.raises(ValueError, match=r"has summed the gradients.*give it check_vma=False"):
    jax.jit(step)(jnp.zeros(SHAPE), state)


def test_outer_steps_move_all_workers_by_the_mean_way():
  """Of DiLoCo's outer optimizer, with what 2, 3 and 4 bits lose fed back."""
  rounds, rate = 30, 0.7
  generator = np.random.default_rng(3)
  ways = generator.standard_normal((rounds, N, *SHAPE)).astype(np.float32)
  for bits in (2, 3, 4):
    tx = optax.chain(
      wire.error_feedback(wire.integers(bits, BLOCK), "data", where=EVERYTHING), optax.sgd(rate)
    )
    start = {"w": jnp.zeros(SHAPE)}
    init = functools.partial(jax.vmap, axis_name="data", axis_size=N, in_axes=None)(tx.init)
    anchors = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape)), start)
    params, state = anchors, init(start)
    outer = jax.jit(jax.vmap(functools.partial(wire.outer_step, tx), axis_name="data"))
    for way in ways:
      params = {"w": params["w"] - way}
      anchors, params, state = outer(anchors, params, state)
    np.testing.assert_array_equal(params["w"], anchors["w"])
    assert np.all(np.asarray(anchors["w"]) == np.asarray(anchors["w"][0]))
    left = np.asarray(state[0].own["error"]["w"]).reshape(N, D).mean(axis=0)
    left = left + np.asarray(state[0].server)[:, 0].reshape(-1)[:D]
    wanted = -rate * (ways.mean(axis=1).sum(axis=0) - left.reshape(SHAPE))
    np.testing.assert_allclose(anchors["w"][0], wanted, atol=2e-4)


def test_outer_steps_of_packed_weights_round_the_anchor():
  params = eco.quantize({"w": jnp.asarray(GRADIENTS[0, 0])}, eco.FP8)
  anchor = eco.dequantize(params)
  tx = optax.chain(wire.error_feedback(wire.int4(BLOCK), "data", where=EVERYTHING), optax.sgd(0.5))

  def worker(params):
    return wire.outer_step(tx, anchor, params, tx.init(anchor))

  moved = jax.vmap(lambda i: eco.quantize(jax.tree.map(lambda x: x + i, anchor), eco.FP8))
  ends = moved(jnp.arange(1.0, 1.0 + N))
  step = jax.jit(jax.vmap(worker, axis_name="data"))
  new_anchor, new_params, _ = step(ends)
  assert new_params["w"].format == eco.FP8
  one = eco.quantize(jax.tree.map(lambda x: x[0], new_anchor), eco.FP8)["w"]
  np.testing.assert_array_equal(new_params["w"].code_bits[0], one.code_bits)
  assert 0.8 < float(jnp.mean(new_anchor["w"][0] - anchor["w"])) < 1.7
  scale = ends["w"].scale.at[1, 0, 0].set(jnp.nan)
  broken = step({"w": dataclasses.replace(ends["w"], scale=scale)})
  np.testing.assert_array_equal(broken[0]["w"][0], anchor["w"])
  with pytest.raises(ValueError, match="anchor and params are of different trees or shapes"):
    wire.outer_step(tx, {"v": jnp.zeros(3)}, {"w": jnp.zeros(3)}, ())
