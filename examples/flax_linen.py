"""ECO with Flax Linen and its `TrainState`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

import eco_optax as eco
from eco_optax.linen import TrainState

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.gelu(nn.Dense(64)(x)))


def train(steps=200):
  model = MLP()
  params = eco.quantize(model.init(jax.random.key(2), x)["params"], eco.FP8)  # Kernels, not biases.
  tx = eco.adamw(1e-2, weight_decay=0.0)
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state):
    loss_fn = lambda params: jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
    loss, grads = eco.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(steps):
    state, loss = step(state)
    losses.append(float(loss))
  return losses, state.params


if __name__ == "__main__":
  losses, _ = train()
  print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
