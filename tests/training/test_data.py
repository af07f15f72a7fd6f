"""The corpus and its batches."""

import collections

import jax
import numpy as np
import pytest

from eco_optax.training import sharding
from eco_optax.training.data import corpus, pipeline


@pytest.fixture
def folder(tmp_path):
  for i in range(200):
    (tmp_path / f"module_{i}.py").write_bytes(b"x = %d\n" % i)
  (tmp_path / "test").mkdir()
  (tmp_path / "test" / "test_x.py").write_text("assert False")
  return tmp_path


def test_corpus_splits_files_by_their_path(folder):
  text = corpus.standard_library(str(folder))
  assert text.manifest["files"] == 200
  assert len(text.train) + len(text.validation) == 200
  assert 2 <= len(text.validation) <= 20  # 5% of 200, give or take what a hash does.
  assert not set(text.train) & set(text.validation)
  assert b"assert False" not in text.train + text.validation

  (folder / "another.py").write_text("y = 1\n")
  again = corpus.standard_library(str(folder))
  assert set(text.train) <= set(again.train)
  assert set(text.validation) <= set(again.validation)
  assert again.manifest["sha256"] != text.manifest["sha256"]


def test_standard_library_is_there_and_large():
  text = corpus.standard_library()
  assert text.manifest["train_bytes"] > 3_000_000
  assert 0.01 < text.manifest["validation_bytes"] / text.manifest["train_bytes"] < 0.15
  assert text == corpus.standard_library()


def test_empty_corpus_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="too few Python files"):
    corpus.standard_library(str(tmp_path))


def one_device():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_an_epoch_trains_on_every_window_once():
  documents = [bytes(range(1, 120)), bytes(range(100, 250))]
  joined = b"\0".join(documents)
  windows = pipeline.train_windows(documents, 8, seed=0)
  count = (len(joined) - 1) // 8
  seen = collections.Counter()
  for step in range(count // 4):
    rows = pipeline.batch(windows, step, 4, one_device())
    assert rows.dtype == np.int32
    for row in np.asarray(rows):
      assert bytes(row.astype(np.uint8)) in joined
      seen[bytes(row.astype(np.uint8))] += 1
  assert len(seen) == 4 * (count // 4)
  assert set(seen.values()) == {1}


def test_batches_depend_on_the_seed_and_the_step_alone():
  documents = [bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8))]

  def draw(seed, steps):
    windows = pipeline.train_windows(documents, 16, seed)
    return np.stack([pipeline.batch(windows, step, 4, one_device()) for step in steps])

  # 249 windows: step 70 is in the second epoch.
  np.testing.assert_array_equal(draw(0, [0, 1, 70]), draw(0, [70, 1, 0])[::-1])
  assert not np.array_equal(draw(0, [0]), draw(1, [0]))


def test_devices_share_the_rows_of_one_batch():
  documents = [bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8))]
  windows = pipeline.train_windows(documents, 16, 0)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  split = pipeline.batch(windows, 3, 8, sharding.batch_sharding(mesh))
  np.testing.assert_array_equal(split, pipeline.batch(windows, 3, 8, one_device()))
  assert {shard.data.shape for shard in split.addressable_shards} == {(2, 17)}


def test_validation_covers_its_split_in_order():
  windows = pipeline.validation_windows([bytes(range(200))], 10)
  batches = pipeline.batch_count(windows, 3)
  targets = np.concatenate(
    [np.asarray(pipeline.batch(windows, i, 3, one_device()))[:, 1:].ravel() for i in range(batches)]
  )
  np.testing.assert_array_equal(targets, np.arange(1, 181))  # 19 windows: 6 batches of 3.


def test_too_little_text_is_refused():
  with pytest.raises(ValueError, match="do not fill one window"):
    pipeline.train_windows([b"abc"], 8, 0)
  with pytest.raises(ValueError, match="do not fill one batch"):
    pipeline.batch_count(pipeline.validation_windows([b"abcdefghijkl"], 8), 2)
