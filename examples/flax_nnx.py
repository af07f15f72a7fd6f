"""ECO with Flax NNX: the loop of `nnx.Optimizer`, with packed weights in it."""

import jax
import jax.numpy as jnp
from flax import nnx

import eco_optax as eco
import eco_optax.nnx as eco_nnx

x = jax.random.normal(jax.random.key(0), (256, 16))
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (16, 4)))


class MLP(nnx.Module):
  def __init__(self, rngs):
    self.up, self.down = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 4, rngs=rngs)

  def __call__(self, x):
    return self.down(nnx.gelu(self.up(x)))


def train(steps=200):
  # The only lines that change: the model is packed, and two names are of eco_optax.nnx.
  model = eco_nnx.pack(MLP(nnx.Rngs(0)), eco.FP8)
  optimizer = eco_nnx.Optimizer(model, eco.adamw(1e-2, weight_decay=0.0), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = eco_nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(steps)]
  return losses, nnx.state(model, nnx.Param)


if __name__ == "__main__":
  losses, _ = train()
  print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
