"""ECO with Equinox: the arrays of a module are the parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))

# Equinox keeps weights as (out, in): scales of output channels are maxima over the last axis.
FORMAT = eco.Format("float8_e4m3fn", "channel", contraction_axis=-1)


def train(steps=200):
  model = eqx.nn.MLP(16, 4, 64, 1, jax.nn.gelu, key=jax.random.key(2))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  params = eco.quantize(params, FORMAT)
  tx = eco.adamw(1e-2, weight_decay=0.0)
  opt_state = tx.init(params)
  loss_fn = lambda params: jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

  @jax.jit
  def step(params, opt_state):
    loss, grads = eco.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return eco.apply_updates(params, updates), opt_state, loss

  losses = []
  for _ in range(steps):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  return losses, params


if __name__ == "__main__":
  losses, _ = train()
  print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
