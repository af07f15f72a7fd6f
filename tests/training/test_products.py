"""Products with float32 sums, and the dtypes that their gradients multiply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eco_optax.training.models import transformer
from eco_optax.training.models.products import product

generator = np.random.default_rng(0)


@pytest.mark.parametrize("spec", ["bld,dv->blv", "bld,vd->blv"])
@pytest.mark.parametrize(
  ("left", "right"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_values_and_gradients(spec, left, right):
  sizes = {"b": 2, "l": 5, "d": 7, "v": 3}
  shape = lambda term: tuple(sizes[letter] for letter in term)
  terms, out = spec.split("->")
  first, second = terms.split(",")
  x, y = (
    jnp.asarray(generator.standard_normal(shape(term)), dtype)
    for term, dtype in ((first, left), (second, right))
  )
  grad = jnp.asarray(generator.standard_normal(shape(out)), jnp.float32)
  z, pull = jax.vjp(lambda x, y: product(spec, x, y), x, y)
  dx, dy = pull(grad)
  assert (z.dtype, dx.dtype, dy.dtype) == (jnp.float32, x.dtype, y.dtype)
  exact = [np.asarray(a.astype(jnp.float32), np.float64) for a in (x, y, grad)]
  np.testing.assert_allclose(z, np.einsum(spec, *exact[:2]), atol=1e-5)
  # In bfloat16 the cotangent is rounded, by up to 2⁻⁹ of itself, and so are the other factor, if
  # it is wider, and the gradient.
  wanted = (
    np.einsum(f"{out},{second}->{first}", exact[2], exact[1]),
    np.einsum(f"{out},{first}->{second}", exact[2], exact[0]),
  )
  for got, want in zip((dx, dy), wanted, strict=True):
    error = np.abs(np.asarray(got.astype(jnp.float32)) - want).max() / np.abs(want).max()
    assert error < (1e-6 if left == "float32" else 3 * 2**-9)


def dots(jaxpr):
  """Dtypes of the factors of every product of a traced program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield tuple(x.aval.dtype.name for x in equation.invars)
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
          yield from dots(inner)


ROUTED = {"experts": 4, "experts_per_token": 2, "expert_width": 12, "balance_weight": 0.01}


@pytest.mark.parametrize(("changes", "forward"), [({}, 0), (ROUTED, 1)])
@pytest.mark.parametrize("attention", ["plain", "chunked"])
def test_a_model_in_bfloat16_multiplies_float32_for_its_router_alone(changes, forward, attention):
  """One product of the forward pass: the router's logits."""
  config = transformer.TransformerConfig(
    layers=2, width=16, heads=2, vocabulary=11, dtype="bfloat16", attention=attention, **changes
  )
  params = jax.eval_shape(lambda: transformer.init(config, 0))
  tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
  loss = lambda p, tokens: transformer.loss(config, p, tokens)[0]
  found = list(dots(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr))
  assert len(found) > 3 * (4 + 2 + 3)
  assert sum("float32" in pair for pair in found) == forward
