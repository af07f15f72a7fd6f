"""ECO with Flax NNX: modules hold the model, plain trees are trained."""

import jax
import jax.numpy as jnp
from flax import nnx

import eco_optax as eco

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


def train(steps=200):
  graph, state = nnx.split(MLP(nnx.Rngs(0)))  # Once; nnx.jit and nnx.Optimizer are not needed.
  params = eco.quantize(nnx.to_pure_dict(state), eco.FP8)
  tx = eco.adamw(1e-2, weight_decay=0.0)
  opt_state = tx.init(params)

  def loss_fn(params):
    own = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(own, params)
    return jnp.mean((nnx.merge(graph, own)(x) - y) ** 2)

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
