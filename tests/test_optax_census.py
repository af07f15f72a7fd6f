"""Some of what Optax's own tests ask, see optax_census.py, whose `main` asks it all."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax_census as census
import pytest

import eco_optax as eco

pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "loops.md"
# What is not as Optax has it; all else has to be.
EXPECTED = {
  ("eco.adamw", "packed", "injected_hyperparameters"): "injected",
  ("eco.adamw", "packed", "moment_dtypes"): "bfloat16",
  ("eco.adamw", "packed", "accumulation"): "accumulated",
  ("adadelta", "packed", "rosenbrock"): "noise",
}
ASKED = [
  ("eco.adamw", "packed", [question.__name__ for question in census.asks("eco.adamw")]),
  ("nadamw", "packed", [question.__name__ for question in census.asks("nadamw")]),
  ("nadamw", "emulated", ["parabola", "injected_hyperparameters", "dtypes", "accumulation"]),
  ("lion", "packed", ["parabola", "injected_hyperparameters", "stable", "accumulation"]),
  ("adadelta", "packed", ["rosenbrock"]),
]


@pytest.mark.parametrize(
  ("name", "storage", "question"),
  [(name, storage, question) for name, storage, questions in ASKED for question in questions],
)
def test_optimizers_do_what_optax_asks_of_its_own(name, storage, question):
  found = census.answer(getattr(census, question), name, storage)
  assert found == EXPECTED.get((name, storage, question), "")


def test_an_optimizer_that_does_not_is_found():
  def no_step(name, storage):
    census._converges(name, storage, [-1.0, 10.0, 1.0], [5.0, 5.0, 5.0], lambda w: 0.0 * w.sum())

  assert census.answer(no_step, "eco.adamw", "packed").startswith("AssertionError: ends at")


def test_the_page_has_the_counts_and_gives_every_reason():
  file = json.loads((ROOT / "results" / "optax" / "census.json").read_text())
  text = PAGE.read_text()
  assert census.table(file["counts"]) in text
  assert all(line.rsplit(": ", 1)[1] in census.REASONS for line in file["differs"])
  text = " ".join(text.split())
  assert [reason for reason in census.REASONS.values() if reason not in text] == []


START = {
  "k": jax.random.normal(jax.random.key(0), (8, 4)),
  "e": jax.random.normal(jax.random.key(1), (6, 4)),
  "b": jnp.ones(4),
}
PARAMS, GRADS = eco.quantize(START, eco.FP8), jax.tree.map(jnp.sin, START)
LABELS = {"k": "packed", "e": "packed", "b": "float"}
OURS = {
  "eco.adamw": lambda: eco.adamw(1e-2),
  "eco.muon": lambda: eco.low_bit_moments(eco.muon(1e-2, max_norm=1.0)),
  "rule": lambda: eco.error_feedback_to_momentum(optax.nadam(1e-2), eco.quantize_params()),
  "master weights": lambda: eco.master_weights(optax.lion(1e-2), eco.quantize_params()),
  "low_bit_moments": lambda: eco.low_bit_moments(eco.adamw(1e-2)),
  "layer_by_layer": lambda: eco.layer_by_layer(eco.adamw(1e-2)),
}


def two_steps(tx, params=PARAMS, grads=GRADS):
  state = tx.init(params)
  for _ in range(2):
    updates, state = tx.update(grads, state, params)
    params = eco.apply_updates(params, updates)
  return params, state


def assert_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
  """The same but for last places."""
  double = lambda x: np.asarray(x, np.float64)
  close = lambda x, y: np.testing.assert_allclose(double(x), double(y), rtol=2e-7)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(close, a, b)


def test_wrappers_around_packed_weights():
  """Labels are of the dense view, one for each leaf, or a function that gives such."""
  own, sgd = eco.adamw(1e-2), optax.sgd(0.1)
  parts = {"packed": own, "float": sgd}

  @jax.jit
  def steps():
    return {
      "alone": two_steps(own)[0],
      "partition": two_steps(optax.partition(parts, LABELS))[0],
      "labels of a function": two_steps(optax.partition(parts, lambda params: LABELS))[0],
      "named_chain": two_steps(optax.named_chain(("clip", optax.clip(9.0)), ("own", own)))[0],
    }

  found = steps()
  for name in ("partition", "labels of a function"):
    assert_equal(found[name] | {"b": None}, found["alone"] | {"b": None})
    np.testing.assert_allclose(found[name]["b"], START["b"] - 0.2 * GRADS["b"], rtol=1e-6)
  assert_equal(found["named_chain"], found["alone"])


def test_state_that_is_flattened():
  """One vector for all leaves has no momentum of a leaf; master weights need none."""
  flat = lambda: optax.flatten(optax.adamw(1e-2))
  with pytest.raises(ValueError, match="keeps no momentum for it"):
    eco.error_feedback_to_momentum(flat(), eco.quantize_params()).init(PARAMS)
  make = lambda inner: eco.master_weights(inner, eco.quantize_params())
  steps = lambda inner: jax.jit(lambda: two_steps(make(inner))[0])()
  assert_equal(steps(flat()), steps(optax.adamw(1e-2)))


@pytest.mark.parametrize("name", OURS)
def test_trees_of_any_shape_and_states_of_any_make(name):
  """One array, lists, None, scalars, no leaf at all; shapes alone, compiled, batched."""
  tx = OURS[name]()
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), (PARAMS, GRADS))

  @jax.jit
  def steps():
    with_scalar = two_steps(tx, [PARAMS["k"], None, jnp.ones(())], [GRADS["k"], None, jnp.ones(())])
    return {
      "tree": two_steps(tx)[0],
      "array": two_steps(tx, PARAMS["k"], GRADS["k"])[0],
      "list": with_scalar[0],
      "batch": jax.vmap(lambda params, grads: two_steps(tx, params, grads)[0])(*stacked),
      "init": tx.init(PARAMS),
    }

  found = steps()
  assert jax.tree.structure(found["array"]) == jax.tree.structure(PARAMS["k"])
  assert found["list"][1] is None
  assert found["list"][2].shape == ()
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], found["batch"])
    # XLA may fuse a multiplication and a sum of one of them, and not of the other.
    assert_close(one, found["tree"])
  assert_equal(found["init"], tx.init(PARAMS))
  signature = census.signature(found["init"])
  shapes = jax.eval_shape(tx.init, PARAMS)
  assert jax.tree.structure(shapes) == signature[0]
  assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == [
    (x.shape, x.dtype) for x in signature[1]
  ]
  assert two_steps(tx, {}, {})[0] == {}
