"""ECO in a loop that calls `optax.apply_updates`: float arrays that hold values of the grid."""

import jax
import jax.numpy as jnp
import optax

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


def loss_fn(params):
  return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


def train(steps=200):
  draw = lambda i, shape: 0.2 * jax.random.normal(jax.random.key(i), shape)
  params = {"up": draw(2, (16, 64)), "down": draw(3, (64, 4))}
  # The only lines that change: where weights begin, and the optimizer.
  params = eco.dequantize(eco.quantize(params, eco.FP8))
  tx = eco.error_feedback_to_momentum(
    optax.adamw(1e-2, weight_decay=0.0), eco.quantize_params(eco.FP8), learning_rate=1e-2
  )
  opt_state = tx.init(params)

  @jax.jit
  def step(params, opt_state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  losses = []
  for _ in range(steps):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  return losses, params


if __name__ == "__main__":
  losses, _ = train()
  print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
