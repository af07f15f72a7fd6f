"""What is published of peaks is of steps that train, and of one card what was compiled."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import one_card, peaks

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "results"


@pytest.mark.parametrize("number", range(len(peaks.ways())))
def test_a_step_gives_back_what_it_was_given(number):
  """And its arguments are the bytes that were published as the state."""
  name, way = list(peaks.ways().items())[number]
  sizes = 1, 64, 128
  params = jax.eval_shape(lambda: way.params(*sizes))
  state = jax.eval_shape(way.tx.init, params)
  x = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
  new_params, new_state, value = jax.eval_shape(way.step, params, state, x)
  assert (new_params, new_state) == (params, state)
  assert value.shape == ()
  full = jax.eval_shape(lambda: way.params(peaks.LAYERS, peaks.WIDTH, peaks.HIDDEN))
  own = full, jax.eval_shape(way.tx.init, full)
  nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own))
  for file in peaks.read(RESULTS / "peaks").values():
    row = file["rows"][name]
    assert row["state"] == pytest.approx(nbytes / peaks.WEIGHTS)
    assert row["peak"] >= row["state"]
    assert row["peak"] == pytest.approx(row["state"] + row["temporaries"], abs=0.05)


def test_what_fits_one_card(tmp_path):
  found = one_card.bars(RESULTS / "one_gpu")
  for bar in found:
    if bar.is_state:  # 12 bytes for each parameter.
      assert bar.gib > 80
  one_card.plot(found, tmp_path / "one_card.png")
  assert (tmp_path / "one_card.png").stat().st_size > 10_000
  # The lines of the README and of the docs are the reports'.
  text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "memory.md").read_text()
  for path in (RESULTS / "one_gpu").glob("*.json"):
    report = json.loads(path.read_text())
    assert f"{report['bytes_per_device']['peak'] / 2**30:.1f}" in text, path.name
