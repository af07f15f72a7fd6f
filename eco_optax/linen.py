"""Flax Linen with packed weights: its `TrainState`, which applies packed updates.

Packed parameters are those of `eco.quantize(variables["params"], …)`, and their gradients are
`eco.value_and_grad`'s: the function that is differentiated, with `apply_fn` in it, gets floats.
"""

from __future__ import annotations

from typing import Any

try:
  from flax.linen import fp8_ops
  from flax.training import train_state
except ImportError as error:
  raise ImportError("Flax is not installed: pip install 'eco_optax[nnx]'") from error

from eco_optax import updates


class TrainState(train_state.TrainState):
  """`flax.training.train_state.TrainState` for packed parameters.

  `create(apply_fn=…, params=…, tx=…)` and subclasses with further fields, such as batch statistics,
  are as Flax has them. `apply_fn` takes floats: evaluate with `eco.dequantize(state.params)`.

  Attributes:
    step: the number of steps.
    apply_fn: usually `model.apply`.
    params: parameters, packed and float ones.
    tx: a transformation of this package, such as `eco.adamw(…)`.
    opt_state: its state.

  Example:
    >>> import eco_optax as eco, flax.linen as nn, jax, jax.numpy as jnp
    >>> from eco_optax.linen import TrainState
    >>> model, x = nn.Dense(2), jnp.ones((3, 4))
    >>> params = eco.quantize(model.init(jax.random.key(0), x)["params"], eco.FP8)
    >>> state = TrainState.create(apply_fn=model.apply, params=params, tx=eco.adamw(1e-2))
    >>> loss_fn = lambda params: jnp.mean(state.apply_fn({"params": params}, x) ** 2)
    >>> loss, grads = eco.value_and_grad(loss_fn)(state.params)
    >>> state = state.apply_gradients(grads=grads)
    >>> state.step, state.params["kernel"].qvalue.dtype
    (1, dtype(float8_e4m3fn))
  """

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
    """The state after a step.

    Args:
      grads: in the tree of `params`, from `eco.value_and_grad`.
      **kwargs: other fields of the state, to be replaced.

    Returns:
      The new state.

    Raises:
      ValueError: if the parameters have a collection that gradients overwrite, as Flax's own FP8
        layers do.
    """
    if fp8_ops.OVERWRITE_WITH_GRADIENT in grads:
      raise ValueError(
        f"params have {fp8_ops.OVERWRITE_WITH_GRADIENT!r} of Flax's FP8 layers, whose weights are"
        " float32: use layers of floats, or flax.training.train_state.TrainState without packed"
        " parameters"
      )
    found, opt_state = self.tx.update(grads, self.opt_state, self.params)
    return self.replace(  # type: ignore[no-any-return]
      step=self.step + 1,
      params=updates.apply_updates(self.params, found),
      opt_state=opt_state,
      **kwargs,
    )
