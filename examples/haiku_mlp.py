"""ECO with Haiku."""

import haiku as hk
import jax
import jax.numpy as jnp

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


def train(steps=200):
  model = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP([64, 4], activation=jax.nn.gelu)(x))
  )
  params = eco.quantize(model.init(jax.random.key(2), x), eco.FP8)  # Weights, not biases.
  tx = eco.adamw(1e-2, weight_decay=0.0)
  opt_state = tx.init(params)
  loss_fn = lambda params: jnp.mean((model.apply(params, x) - y) ** 2)

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
