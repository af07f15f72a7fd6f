"""Leaves that an optimizer treats alike: which they are, and that one is stepped as among all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eco_optax as eco
from eco_optax.transforms import alike
from eco_optax.transforms.momentum import flat

PATHS = ("a/k", "b/k", "c/k", "d/k")


def drawn(seed, dtype="float32"):
  generator = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(generator.standard_normal(shape), dtype)
  return {path[0]: {"k": draw(3, 3), "bias": draw(3)} for path in PATHS}


def raw(x):
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def by_label(path, leaf):
  del leaf
  return "fast" if path[0].key in "bd" else "slow"


def labels(params):
  return jax.tree_util.tree_map_with_path(by_label, params)


def decayed(params):
  return jax.tree_util.tree_map_with_path(lambda path, x: path[0].key != "c", params)


def scaled_by_place():
  """Each leaf by a constant of its own."""

  def update(updates, state, params=None):
    del params
    leaves, treedef = jax.tree.flatten(updates)
    return jax.tree.unflatten(treedef, [x * (1.0 + i) for i, x in enumerate(leaves)]), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def swapped():
  """Leaves b and d take each other's updates."""
  swap = lambda tree: tree | {"b": tree["d"], "d": tree["b"]}
  return optax.stateless(lambda updates, params: swap(updates))


OPTIMIZERS = {  # And the kinds of the four matrices.
  "adamw": (optax.adamw(1e-2), ["abcd"]),
  "clipped": (optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-2, 0.9)), ["abcd"]),
  "clipped behind": (optax.chain(optax.trace(0.9), optax.clip_by_global_norm(0.1)), ["abcd"]),
  "lamb": (optax.lamb(1e-2), ["abcd"]),
  # A branch is one operation on all leaves.
  "every second step": (optax.MultiSteps(optax.adam(1e-2), 2), list("abcd")),
  "unless not finite": (optax.apply_if_finite(optax.adam(1e-2), 3), list("abcd")),
  "injected": (optax.inject_hyperparams(optax.adam)(learning_rate=1e-2), ["abcd"]),
  "masked decay": (optax.adamw(1e-2, mask=decayed), ["abd", "c"]),
  "labels": (
    optax.multi_transform({"fast": optax.adam(1.0), "slow": optax.adam(0.1)}, labels),
    ["ac", "bd"],
  ),
  "noise": (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1, 0.9)), list("abcd")),
  "by place": (optax.chain(optax.trace(0.9), scaled_by_place()), list("abcd")),
  "swapped": (optax.chain(optax.trace(0.9), swapped()), ["ac", "b", "d"]),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_of_each_is_stepped_as_among_all(name):
  optimizer, kinds = OPTIMIZERS[name]
  inner = optax.with_extra_args_support(optimizer)
  params = drawn(0)
  state = inner.init(params)
  one = alike.one_of_each(inner, params, state, PATHS, {})
  found = ["".join(path[0] for path in paths) for paths in one.alike.values()]
  assert found == kinds

  def same(own, whole):
    own, whole = ({path: raw(x) for path, x in flat(tree).items()} for tree in (own, whole))
    assert own.keys() <= whole.keys()
    for path, leaf in own.items():
      np.testing.assert_allclose(leaf, whole[path], rtol=1e-6, atol=1e-7)
    return own

  same(one.params, params)
  # For three steps: what the steps of the first of each kind need is kept and changes as it should.
  own_state, own_params = one.state, one.params
  for i in range(3):
    grads = drawn(i + 1)
    given = flat(grads)
    own_grads = jax.tree.unflatten(
      jax.tree.structure(own_params), [given[path] for path in flat(own_params)]
    )
    own_updates, own_state = jax.jit(one.update)(own_grads, own_state, own_params)
    updates, state = jax.jit(inner.update)(grads, state, params)
    firsts = {path: leaf for path, leaf in flat(own_updates).items() if path in one.alike}
    assert firsts.keys() == one.alike.keys()
    same(firsts, updates)
    same(own_state, state)
    params = optax.apply_updates(params, updates)
    changed = flat(params)
    own_params = jax.tree.unflatten(
      jax.tree.structure(own_params), [changed[path] for path in flat(own_params)]
    )


def test_leaves_of_other_shapes_and_dtypes_are_others():
  params = drawn(0)
  params["b"]["k"] = jnp.ones((2, 3))
  params["c"]["k"] = jnp.ones((3, 3), jnp.bfloat16)
  inner = optax.with_extra_args_support(optax.adam(1e-2))
  one = alike.one_of_each(inner, params, inner.init(params), PATHS, {})
  assert list(one.alike.values()) == [("a/k", "d/k"), ("b/k",), ("c/k",)]
  assert set(flat(one.params)) == {"a/k", "b/k", "c/k"}


def test_the_one_leaf_that_cannot_be_is_named():
  params = eco.quantize(drawn(0), eco.FP8, lambda path, x: x.ndim > 1)
  transforms = {"fast": optax.lion(1e-2), "slow": optax.adam(1e-2)}
  tx = eco.error_feedback_to_momentum(
    optax.multi_transform(transforms, labels), eco.quantize_params()
  )
  with pytest.raises(ValueError, match=r"'b/k'.*sign in Lion"):
    tx.init(params)
