"""ECO in a loop of `flax.nnx.Optimizer`: float arrays that hold values of the grid.

`nnx.Optimizer` adds updates to what the model holds, which packed weights cannot take; they are
trained as in flax_nnx.py. This is how to see what FP8 weights would do to an NNX run as it is.
"""

import jax
import jax.numpy as jnp
import optax
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
  model = MLP(nnx.Rngs(0))
  # The only lines that change: where weights begin, and the optimizer.
  nnx.update(model, eco.dequantize(eco.quantize(nnx.state(model, nnx.Param), eco.FP8)))
  tx = eco.error_feedback_to_momentum(
    optax.adamw(1e-2, weight_decay=0.0), eco.quantize_params(eco.FP8), learning_rate=1e-2
  )
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(steps)]
  return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


if __name__ == "__main__":
  losses, _ = train()
  print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
