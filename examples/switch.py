"""A float run that goes on with ECO in the middle, and back, with its weights and moments."""

import jax
import jax.numpy as jnp
import optax

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


def loss_fn(params):
  return jnp.mean((jax.nn.gelu(x @ params["up"]) @ params["down"] - y) ** 2)


def run(tx, params, opt_state, steps):
  @jax.jit
  def step(params, opt_state):
    loss, grads = eco.value_and_grad(loss_fn)(params)  # Of float and of packed parameters.
    updates, opt_state = tx.update(grads, opt_state, params)
    return eco.apply_updates(params, updates), opt_state, loss

  losses = []
  for _ in range(steps):
    params, opt_state, loss = step(params, opt_state)
    losses.append(float(loss))
  return params, opt_state, losses


def to_eco(tx, params, opt_state, format=eco.FP8):
  """`tx` is ECO over the optimizer that made `opt_state`, whose state ECO's holds as it is."""
  params = eco.quantize(params, format)
  return params, tx.init(params)._replace(inner=opt_state)


def from_eco(params, opt_state):
  """What was owed stays in the momentum and is paid in the float run's next steps."""
  return eco.dequantize(params), opt_state.inner


def train(steps=100):
  draw = lambda i, shape: 0.2 * jax.random.normal(jax.random.key(i), shape)
  params = {"up": draw(2, (16, 64)), "down": draw(3, (64, 4))}
  plain = optax.adamw(1e-2, weight_decay=0.0)
  params, opt_state, before = run(plain, params, plain.init(params), steps)
  without_copy = eco.adamw(1e-2, weight_decay=0.0)  # Its state holds `optax.adamw`'s.
  params, opt_state, during = run(without_copy, *to_eco(without_copy, params, opt_state), steps)
  params, opt_state, after = run(plain, *from_eco(params, opt_state), steps)
  return before + during + after, params


if __name__ == "__main__":
  losses, _ = train()
  print(
    f"loss {losses[0]:.3f} → {losses[99]:.4f} (float) → {losses[199]:.4f} (ECO) → {losses[-1]:.4f}"
  )
