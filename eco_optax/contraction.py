"""Which axes of a kernel are summed over, by the names that model libraries give their parameters.

For `Format(…, contraction_axis=…)`: weights that are summed into one output share a scale. Kernels
of einsums have more axes than `(in, out)`, and only their names say which are which.
"""

from __future__ import annotations

from typing import Any


def _names(path: str) -> list[str]:
  """The parts of a path; Flax NNX ends it with the `value` of a `Param`."""
  parts = path.split("/")
  return parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts


def flax(path: str, leaf: Any) -> int | tuple[int, ...]:
  """Contraction axes of the attention and embeddings of Flax, Linen and NNX; −2 for all others.

  `query`, `key` and `value` of `MultiHeadDotProductAttention` and `MultiHeadAttention` have kernels
  of shape `(…, width, heads, head width)`, summed over the first of these, and `out` has `(…,
  heads, head width, width)`, summed over two. The `embedding` of an `Embed`, `(tokens, width)`, is
  summed over its width where `attend` makes logits of it. For an `Einsum`, `DenseGeneral` or `Conv`
  of your own write such a function of its names.

  Args:
    path: `/`-joined, of the leaf.
    leaf: an array of any shape.

  Returns:
    One or more axes, counted from the end.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> format = eco.Format("float8_e4m3fn", contraction_axis=eco.contraction.flax)
    >>> params = {"attention": {"query": {"kernel": jnp.ones((64, 4, 16))}}}
    >>> eco.quantize(params, format)["attention"]["query"]["kernel"].scale.shape
    (1, 4, 16)
  """
  parent, name = (["", *_names(path)])[-2:]
  if name == "embedding":
    return -1
  # A bias of heads has their axes too, and a stack of them three.
  if name != "kernel" or leaf.ndim < 3 or parent not in ("query", "key", "value", "out"):
    return -2
  return (-3, -2) if parent == "out" else -3


def gemma(path: str, leaf: Any) -> int | tuple[int, ...]:
  """Contraction axes of the parameters of Gemma's own JAX code; −2 for all other kernels.

  `attn_vec_einsum` is `(heads, head width, width)` and summed over two axes. `q_einsum`,
  `kv_einsum` and `qkv_einsum` are `(…, width, head width)`, as usual. `gating_einsum` is `(2,
  width, hidden width)` or, in later models, `(2, hidden width, width)`, where the smaller is
  summed over. `input_embedding`, `(tokens, width)`, is summed over its width where it makes logits.

  Args:
    path: `/`-joined, of the leaf.
    leaf: an array of any shape.

  Returns:
    One or more axes, counted from the end.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> eco.contraction.gemma("layer_0/attn/attn_vec_einsum/w", jnp.ones((8, 256, 2048)))
    (-3, -2)
  """
  names = _names(path)
  if names[-1] == "input_embedding":
    return -1
  if "attn_vec_einsum" in names and leaf.ndim >= 3:
    return -3, -2
  if "gating_einsum" in names and leaf.ndim >= 2 and leaf.shape[-1] < leaf.shape[-2]:
    return -1
  return -2
