"""SOAP and Shampoo on one matrix or vector in NumPy float64, from the papers' algorithms."""

import numpy as np


def power(matrix, exponent):
  """A real power of a symmetric positive matrix."""
  values, vectors = np.linalg.eigh(matrix)
  return vectors @ np.diag(values**exponent) @ vectors.T


class Soap:
  """arXiv 2409.11321, Algorithms 3 and 4, with bias corrections and what the authors' code adds.

  The first gradient sets L and R and gives no update; new eigenvectors are sorted by their
  eigenvalues, and the second moment is permuted with them.
  """

  def __init__(self, shape, b1, b2, eps, frequency, largest):
    self.b1, self.b2, self.eps, self.frequency = b1, b2, eps, frequency
    self.has = [len(shape) == 2 and n <= largest for n in shape]
    self.factors = [np.zeros((n, n)) for n in shape]
    self.bases = [np.eye(n) for n in shape]
    self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

  def rotated(self, x, back=False):
    if x.ndim == 1:
      return x
    left, right = (q.T for q in self.bases) if back else self.bases
    return left.T @ x @ right

  def step(self, g):
    """The direction of a step."""
    direction = np.zeros_like(g)
    if self.t > 0:
      rotated = self.rotated(g)
      self.m = self.b1 * self.m + (1 - self.b1) * g
      self.v = self.b2 * self.v + (1 - self.b2) * rotated**2
      mean, square = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
      direction = self.rotated(self.rotated(mean) / np.sqrt(square + self.eps**2), back=True)
    for side, axis in enumerate(self.has):
      if axis:
        outer = g @ g.T if side == 0 else g.T @ g
        self.factors[side] = self.b2 * self.factors[side] + (1 - self.b2) * outer
        if self.t == 0:
          self.bases[side] = np.linalg.eigh(self.factors[side])[1][:, ::-1]
        elif self.t % self.frequency == 0:
          self.refresh(side)
    self.t += 1
    return direction

  def refresh(self, side):
    p, q = self.factors[side], self.bases[side]
    order = np.argsort(-np.diag(q.T @ p @ q))
    self.bases[side] = np.linalg.qr((p @ q)[:, order])[0]
    self.v = np.take(self.v, order, axis=side)


class Shampoo:
  """arXiv 1802.09568, Algorithm 1, with means in place of sums where b2 < 1, and a momentum."""

  def __init__(self, shape, b1, b2, eps, matrix_eps, frequency, largest, grafts):
    self.b1, self.b2, self.eps, self.matrix_eps = b1, b2, eps, matrix_eps
    self.frequency, self.grafts = frequency, grafts
    self.has = [len(shape) == 2 and n <= largest for n in shape]
    self.factors = [np.zeros((n, n)) for n in shape]
    self.roots = [np.eye(n) for n in shape]
    self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

  def mean(self, old, new):
    return old + new if self.b2 == 1 else self.b2 * old + (1 - self.b2) * new

  def unbiased(self, x):
    return x if self.b2 == 1 else x / (1 - self.b2**self.t)

  def step(self, g):
    """The direction of a step."""
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.mean(self.v, g**2 + self.eps**2)
    mean = self.m / (1 - self.b1**self.t)
    adam = lambda x: x / np.sqrt(self.unbiased(self.v))
    if not any(self.has):
      return adam(mean)
    for side, outer in enumerate((g @ g.T, g.T @ g)):
      self.factors[side] = self.mean(self.factors[side], outer)
      if self.has[side] and (self.t - 1) % self.frequency == 0:
        factor = self.unbiased(self.factors[side])
        damped = factor + self.matrix_eps * np.linalg.eigvalsh(factor)[-1] * np.eye(len(factor))
        self.roots[side] = power(damped, -1 / (2 * sum(self.has)))
    precondition = lambda x: self.roots[0] @ x @ self.roots[1]
    size = np.linalg.norm(adam(g)) / np.linalg.norm(precondition(g)) if self.grafts else 1.0
    return size * precondition(mean)
