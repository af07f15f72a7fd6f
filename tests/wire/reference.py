"""Gradient exchange in NumPy float64, written from the papers' algorithms alone.

Compressors take a vector, whose blocks they compress one by one. A method is a class with one
`step(gradients)`: workers' gradients of shape (n, d) in, the estimate of their mean out.
"""

import numpy as np


def blocks(x, block):
  """Rows of a vector, the last filled up with zeros, and how many values of each are its own."""
  rows = -(-x.size // block)
  padded = np.zeros(rows * block)
  padded[: x.size] = x
  return padded.reshape(rows, block)


def sign(block):
  def compress(x):
    rows = blocks(x, block)
    scale = np.abs(rows).mean(axis=1, keepdims=True)
    return (np.where(rows < 0, -1, 1) * scale).ravel()[: x.size]

  return compress


def top_k(count, block):
  def compress(x):
    rows = blocks(x, block)
    kept = np.zeros_like(rows)
    for row, out in zip(rows, kept, strict=True):
      order = np.argsort(-np.abs(row), kind="stable")[:count]
      out[order] = row[order]
    return kept.ravel()[: x.size]

  return compress


class Mean:
  """The mean of what workers send; by `second` it is compressed again, with error feedback."""

  def __init__(self, second=None):
    self.second, self.error = second, 0.0

  def __call__(self, sent, weights=None):
    mean = np.average(sent, axis=0, weights=weights)
    if self.second is None:
      return mean
    out = self.second(mean + self.error)
    self.error = mean + self.error - out
    return out


class Compressed:
  def __init__(self, compress, n, d, second=None):
    self.compress, self.mean = compress, Mean()

  def step(self, g):
    return self.mean(np.stack([self.compress(x) for x in g]))


class ErrorFeedback:
  def __init__(self, compress, n, d, second=None):
    self.compress, self.mean, self.e = compress, Mean(second), np.zeros((n, d))

  def step(self, g):
    sent = np.stack([self.compress(x) for x in self.e + g])
    self.e = self.e + g - sent
    return self.mean(sent)


class EF21:
  """With weights w_i of sum 1 it is EF21-W."""

  def __init__(self, compress, n, d, second=None, weights=None):
    self.compress, self.mean = compress, Mean(second)
    self.h, self.total = np.zeros((n, d)), np.zeros(d)
    self.w = np.full(n, 1 / n) if weights is None else np.asarray(weights)

  def step(self, g):
    n = len(g)
    sent = np.stack(
      [self.compress(x / (n * w) - h) for x, w, h in zip(g, self.w, self.h, strict=True)]
    )
    self.h = self.h + sent
    self.total = self.total + self.mean(sent, self.w)
    return self.total


class EControl:
  def __init__(self, compress, n, d, eta, second=None):
    self.compress, self.mean, self.eta = compress, Mean(second), eta
    self.e, self.h, self.total = np.zeros((n, d)), np.zeros((n, d)), np.zeros(d)

  def step(self, g):
    sent = np.stack([self.compress(x) for x in self.eta * self.e + g - self.h])
    self.e = self.e + g - self.h - sent
    self.h = self.h + sent
    self.total = self.total + self.mean(sent)
    return self.total


class OneBitAdam:
  def __init__(self, compress, n, d, warmup, b1, b2, eps, second=None):
    self.compress, self.mean, self.warmup = compress, Mean(second), warmup
    self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
    self.m, self.v, self.e = np.zeros(d), np.zeros(d), np.zeros((n, d))

  def step(self, g):
    self.t += 1
    if self.t <= self.warmup:
      mean = g.mean(axis=0)
      self.m = self.b1 * self.m + (1 - self.b1) * mean
      self.v = self.b2 * self.v + (1 - self.b2) * mean**2
      self.corrected = self.v / (1 - self.b2**self.t)
    else:
      own = self.b1 * self.m + (1 - self.b1) * g
      sent = np.stack([self.compress(x) for x in self.e + own])
      self.e = self.e + own - sent
      self.m = self.mean(sent)
    return self.m / (1 - self.b1**self.t) / (np.sqrt(self.corrected) + self.eps)
