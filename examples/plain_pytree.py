"""ECO on a plain tree of arrays: no framework."""

import jax
import jax.numpy as jnp

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


def loss_fn(params):
  hidden = jax.nn.gelu(x @ params["up"] + params["bias"])
  return jnp.mean((hidden @ params["down"] - y) ** 2)


def train(steps=200):
  up, down = (
    0.2 * jax.random.normal(jax.random.key(i), s) for i, s in ((2, (16, 64)), (3, (64, 4)))
  )
  params = {"up": up, "bias": jnp.zeros(64), "down": down}
  params = eco.quantize(params, eco.FP8)  # Leaves with two axes or more; `where=` chooses others.
  tx = eco.adamw(1e-2, weight_decay=0.0)
  opt_state = tx.init(params)

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
