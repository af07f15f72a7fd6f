"""The derivative of Muon's polar factor against jax.jvp, finite differences and NumPy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eco_optax import theory

pytestmark = pytest.mark.standard_promotion
SHAPES = [(5, 5), (8, 5), (5, 8)]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(shape, seed):
  return np.random.default_rng(seed).standard_normal(shape)


def numpy_polar(matrix):
  p, _, qt = np.linalg.svd(matrix, full_matrices=False)
  return p @ qt


def polar(matrix):
  """M (MᵀM)^{-1/2}, with a square root by Newton's iteration and no SVD to differentiate."""
  tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
  x = tall / jnp.linalg.norm(tall)
  for _ in range(60):
    x = 1.5 * x - 0.5 * x @ (x.T @ x)
  return x if matrix.shape[0] >= matrix.shape[1] else x.T


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_derivative(shape):
  matrix, change = draw(shape, 0), draw(shape, 1)
  found = theory.polar_derivative(matrix, change)
  assert found.dtype == jnp.float64
  _, by_jvp = jax.jvp(polar, (jnp.asarray(matrix),), (jnp.asarray(change),))
  np.testing.assert_allclose(found, by_jvp, rtol=0, atol=1e-10)
  h = 1e-5
  numeric = (numpy_polar(matrix + h * change) - numpy_polar(matrix - h * change)) / (2 * h)
  np.testing.assert_allclose(found, numeric, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_can_be_paid_back_is_and_the_rest_is_invisible(shape):
  """In NumPy's singular bases: the antisymmetric part and what is outside the range come back."""
  matrix, error = draw(shape, 2), draw(shape, 3)
  p, _, qt = np.linalg.svd(matrix, full_matrices=False)
  inside = p.T @ error @ qt.T
  lost = p @ (inside + inside.T) / 2 @ qt
  back = theory.polar_derivative(matrix, theory.polar_payback(matrix, error))
  np.testing.assert_allclose(back, error - lost, rtol=0, atol=1e-10)
  np.testing.assert_allclose(theory.polar_derivative(matrix, lost), 0, atol=1e-10)
  # So many directions are lost of all there are.
  n = min(shape)
  basis = np.eye(matrix.size).reshape(-1, *shape)
  jacobian = np.stack([np.ravel(theory.polar_derivative(matrix, e)) for e in basis])
  assert matrix.size - np.linalg.matrix_rank(jacobian, tol=1e-8) == n * (n + 1) // 2


def test_batches():
  matrices, changes = draw((3, 6, 4), 4), draw((3, 6, 4), 5)
  for fn in (theory.polar_derivative, theory.polar_payback):
    for i, found in enumerate(fn(matrices, changes)):
      np.testing.assert_allclose(found, fn(matrices[i], changes[i]), atol=1e-12)
