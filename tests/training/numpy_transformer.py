"""A decoder-only Transformer in float64 NumPy: loops written from its definition, to test against.

Nothing here shares code with eco_optax. Parameters are a nested dict of arrays, tokens are
(batch, length); one sequence, and in attention and experts one position, is taken at a time.
"""

import math

import numpy as np


def float64(tree):
  if isinstance(tree, dict):
    return {name: float64(value) for name, value in tree.items()}
  return np.asarray(tree).astype(np.float64)


def layer_of(tree, layer):
  if isinstance(tree, dict):
    return {name: layer_of(value, layer) for name, value in tree.items()}
  return tree[layer]


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def rms_norm(config, scale, x):
  factor = 1 + scale if config.norm_offset else scale
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * factor


def activate(config, x):
  if config.activation == "silu":
    return x / (1 + np.exp(-x))
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x_LxNxK, base, interleaved):
  """Turns each pair of a head by its position times the pair's rate."""
  length, _, width = x_LxNxK.shape
  turned = np.empty_like(x_LxNxK)
  for position in range(length):
    for i in range(width // 2):
      first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
      angle = position * float(base) ** (-2 * i / width)
      a, b = x_LxNxK[position, :, first], x_LxNxK[position, :, second]
      turned[position, :, first] = a * np.cos(angle) - b * np.sin(angle)
      turned[position, :, second] = a * np.sin(angle) + b * np.cos(angle)
  return turned


def capped(x, cap):
  return cap * np.tanh(x / cap) if cap else x


def attention(config, p, x_LxD, layer):
  """Attention of one sequence in the layer of this number."""
  length = len(x_LxD)
  heads, kv_heads, width = config.heads, config.kv_heads, config.head_width
  is_global = config.window == 0 or (layer + 1) % config.global_every == 0
  linear = lambda name: x_LxD @ p[name]["kernel"].T + p[name].get("bias", 0)
  query, key, value = linear("query"), linear("key"), linear("value")
  if config.joint_qk_norm:
    query = rms_norm(config, p["query_norm"]["scale"], query)
    key = rms_norm(config, p["key_norm"]["scale"], key)
  query, key = query.reshape(length, heads, width), key.reshape(length, kv_heads, width)
  value = value.reshape(length, kv_heads, width)
  if config.qk_norm and not config.joint_qk_norm:
    query = rms_norm(config, p["query_norm"]["scale"], query)
    key = rms_norm(config, p["key_norm"]["scale"], key)
  base = config.rope_base if is_global else config.local_rope_base
  query = rotate(query, base, config.rope_interleaved)
  key = rotate(key, base, config.rope_interleaved)
  mixed = np.zeros((length, heads, width))
  for head in range(heads):
    kv_head = head // (heads // kv_heads)
    for at in range(length):
      seen = [m for m in range(at + 1) if is_global or at - m < config.window]
      logits = np.array([query[at, head] @ key[m, kv_head] for m in seen])
      logits = capped(logits / np.sqrt(config.query_scalar or width), config.attention_cap)
      for weight, m in zip(softmax(logits), seen, strict=True):
        mixed[at, head] += weight * value[m, kv_head]
  return mixed.reshape(length, heads * width) @ p["out"]["kernel"].T


def mlp(config, p, x):
  linear = lambda name, x: x @ p[name]["kernel"].T
  up = linear("up", x)
  hidden = activate(config, linear("gate", x)) * up if config.gated else activate(config, up)
  return linear("down", hidden)


def route(config, router, x_LxD):
  """Returns choices as lists of (expert, weight, kept), dropped share and balance loss."""
  length, experts, per_token = len(x_LxD), config.experts, config.experts_per_token
  capacity = length
  if config.capacity_factor is not None:
    capacity = min(length, math.ceil(config.capacity_factor * length * per_token / experts))
  probabilities = softmax(x_LxD @ router)
  taken, chosen = np.zeros(experts, int), np.zeros(experts, int)
  choices = []
  for at in range(length):
    # A stable sort of what is negated puts the lower index of two equal ones first.
    best = np.argsort(-probabilities[at], kind="stable")[:per_token]
    total = probabilities[at, best].sum() if config.normalize_expert_weights else 1.0
    choices.append([])
    for expert in best:
      kept = taken[expert] < capacity
      taken[expert] += kept
      chosen[expert] += 1
      choices[-1].append((int(expert), probabilities[at, expert] / total, bool(kept)))
  dropped = 1 - taken.sum() / (length * per_token)
  share = chosen / (length * per_token)
  return choices, dropped, experts * np.sum(share * probabilities.mean(0))


def routed_experts(config, p, x_LxD):
  """Experts of one sequence: output, dropped share, balance loss."""
  choices, dropped, balance_loss = route(config, p["router"], x_LxD)
  out = np.zeros_like(x_LxD)
  for at, row in enumerate(choices):
    for expert, weight, kept in row:
      if kept:
        out[at] += weight * mlp(config, layer_of(p["experts"], expert), x_LxD[at])
  if config.shared_experts:
    out = out + mlp(config, p["shared"], x_LxD)
  return out, dropped, balance_loss


def forward(config, params, tokens_BxL):
  """Logits, and balance_loss and dropped (means over routed layers) where there are experts."""
  p = float64(params)
  tokens_BxL = np.asarray(tokens_BxL)
  dense_layers = config.dense_layers if config.experts else 0
  blocks = []
  for layer in range(config.layers):
    stack = "dense_blocks" if layer < dense_layers else "blocks"
    blocks.append(layer_of(p[stack], layer - (dense_layers if stack == "blocks" else 0)))
  logits, dropped, balance_loss = [], [], []
  for tokens in tokens_BxL:
    x = p["embedding"][tokens]
    if config.scaled_embedding:
      x = x * np.sqrt(config.width)
    for layer, block in enumerate(blocks):
      after = lambda name, y, block=block: (
        rms_norm(config, block[name]["scale"], y) if config.post_norms else y
      )
      before = lambda name, y, block=block: (
        rms_norm(config, block[name]["scale"], y) if config.pre_norms else y
      )
      y = attention(config, block["attention"], before("attention_norm", x), layer)
      x = x + after("attention_post_norm", y)
      normed = before("mlp_norm", x)
      if config.experts and layer >= dense_layers:
        y, drops, loss = routed_experts(config, block["moe"], normed)
        # Each sequence and each layer has the same weight, so one mean over all is the mean of
        # means.
        dropped.append(drops)
        balance_loss.append(loss)
      else:
        y = mlp(config, block["mlp"], normed)
      x = x + after("mlp_post_norm", y)
    x = rms_norm(config, p["norm"]["scale"], x)
    head = p["embedding"].T if config.tied_embedding else p["head"]
    logits.append(capped(x @ head, config.logit_cap))
  aux = {}
  if config.experts:
    aux = {"balance_loss": np.mean(balance_loss), "dropped": np.mean(dropped)}
  return np.stack(logits), aux


def cross_entropy(logits, targets, weights=None):
  """Mean of −log softmax(logits) at the targets, weighted if there are weights."""
  logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
  total = weight_sum = 0.0
  for index in np.ndindex(*targets.shape):
    row = logits[index]
    loss = row.max() + np.log(np.sum(np.exp(row - row.max()))) - row[targets[index]]
    weight = 1.0 if weights is None else float(np.asarray(weights)[index])
    total += weight * loss
    weight_sum += weight
  return total / weight_sum
