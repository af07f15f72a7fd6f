"""The corpus and its batches."""

import collections

import jax
import numpy as np
import pytest

from eco_optax.training import sharding
from eco_optax.training.data import corpus, pipeline, prepare, readers
from eco_optax.training.data.shards import TokenStream


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


def test_the_dataset_is_the_corpus_joined(folder):
  text, data = (
    corpus.standard_library(str(folder)),
    corpus.standard_library_dataset(str(folder)),
  )
  for documents, stream in ((text.train, data.train), (text.validation, data.validation)):
    assert bytes(stream.read(0, len(stream)).astype(np.uint8)) == b"\0".join(documents)
  assert (data.vocabulary, data.separator) == (256, 0)


def stream(*parts):
  return TokenStream([np.frombuffer(part, np.uint8) for part in parts])


def one_device():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def test_an_epoch_trains_on_every_window_once():
  parts = [bytes(range(1, 120)) + b"\0", bytes(range(100, 250))]
  joined = b"".join(parts)
  windows = pipeline.train_windows(stream(*parts), 8, seed=0)
  count = (len(joined) - 1) // 8
  seen = collections.Counter()
  for step in range(count // 4):
    rows = pipeline.batch(windows, step, 4, one_device())
    assert rows.weights is None
    assert rows.tokens.dtype == np.int32
    for row in np.asarray(rows.tokens):
      assert bytes(row.astype(np.uint8)) in joined
      seen[bytes(row.astype(np.uint8))] += 1
  assert len(seen) == 4 * (count // 4)
  assert set(seen.values()) == {1}


def noise(size):
  return bytes(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


def test_batches_depend_on_the_seed_and_the_step_alone():
  def draw(seed, steps):
    windows = pipeline.train_windows(stream(noise(4000)), 16, seed)
    return np.stack([pipeline.batch(windows, step, 4, one_device()).tokens for step in steps])

  # 249 windows: step 70 is in the second epoch.
  np.testing.assert_array_equal(draw(0, [0, 1, 70]), draw(0, [70, 1, 0])[::-1])
  assert not np.array_equal(draw(0, [0]), draw(1, [0]))


def test_reading_ahead_gives_the_same_batches():
  windows = pipeline.train_windows(stream(noise(4000)), 16, 0)
  ahead = pipeline.batches(windows, 58, 4, one_device())
  for step in range(58, 70):  # From within the first epoch into the second.
    wanted = pipeline.batch(windows, step, 4, one_device())
    np.testing.assert_array_equal(next(ahead).tokens, wanted.tokens)


def test_devices_share_the_rows_of_one_batch():
  windows = pipeline.train_windows(stream(noise(4000)), 16, 0)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  split = pipeline.batch(windows, 3, 8, sharding.batch_sharding(mesh)).tokens
  np.testing.assert_array_equal(split, pipeline.batch(windows, 3, 8, one_device()).tokens)
  assert {shard.data.shape for shard in split.addressable_shards} == {(2, 17)}


def test_any_number_of_hosts_reads_each_example_once(monkeypatch):
  """A run of 40 steps that changes its hosts twice counts the examples it has read."""
  text = np.arange(4 * 8 * 10 + 1, dtype=np.uint32)  # 320 windows of one token: each its number.
  windows = pipeline.train_windows(TokenStream([text]), 1, seed=0)

  class HostRows:
    """A sharding that gives this process the rows of one host of several."""

    def __init__(self, host, hosts):
      self.rows = slice(host * 8 // hosts, (host + 1) * 8 // hosts)

    def addressable_devices_indices_map(self, shape):
      return {"device": (self.rows, slice(None))}

  monkeypatch.setattr(pipeline, "_assemble", lambda own, rows, *_: own)
  read = []
  for steps, hosts in ((range(13), 1), (range(13, 26), 4), (range(26, 40), 2)):
    ahead = [pipeline.batches(windows, steps[0], 8, HostRows(host, hosts)) for host in range(hosts)]
    for _ in steps:
      read.append(np.concatenate([next(host).tokens[:, 0] for host in ahead]))
  assert sorted(np.concatenate(read)) == list(range(320))
  alone = pipeline.batches(windows, 0, 8, HostRows(0, 1))
  np.testing.assert_array_equal(read, [next(alone).tokens[:, 0] for _ in range(40)])


def test_weights_are_those_of_the_targets():
  text = np.arange(30, dtype=np.uint16)
  parts, masks = [text[:11], text[11:]], [text[:11] % 3 == 0, text[11:] % 3 == 0]
  windows = pipeline.validation_windows(TokenStream(parts, masks), 7)
  for i in range(len(windows)):
    example = windows[i]
    np.testing.assert_array_equal(example.weights, example.tokens[1:] % 3 == 0)
    assert example.weights.dtype == np.float32


def test_validation_covers_its_split_in_order():
  windows = pipeline.validation_windows(stream(bytes(range(200))), 10)
  batches = pipeline.batch_count(windows, 3)
  rows = [pipeline.batch(windows, i, 3, one_device()).tokens for i in range(batches)]
  targets = np.concatenate([np.asarray(x)[:, 1:].ravel() for x in rows])
  np.testing.assert_array_equal(targets, np.arange(1, 181))  # 19 windows: 6 batches of 3.


def test_too_little_text_is_refused():
  with pytest.raises(ValueError, match="do not fill one window"):
    pipeline.train_windows(stream(b"abc"), 8, 0)
  with pytest.raises(ValueError, match="do not fill one batch"):
    pipeline.batch_count(pipeline.validation_windows(stream(b"abcdefghijkl"), 8), 2)


def test_docstrings_become_chats(tmp_path):
  (tmp_path / "a" / "tests").mkdir(parents=True)
  (tmp_path / "a" / "tests" / "b.py").write_text(
    'def f():\n  """Left out, as tests are, all of it."""'
  )
  (tmp_path / "a" / "__init__.py").write_text(
    '"""Of the module."""\n'
    'class C:\n  """A class that says a little about itself."""\n'
    '  def m(self):\n    """Too short."""\n'
    '  async def n(self):\n    """Does what it does\n\n    at length, in two paragraphs."""\n'
    'def again():\n  """A class that says a little about itself."""\n'
  )
  assert list(corpus.docstring_chats(str(tmp_path))) == [
    "### Human: What does a.C do?### Assistant: A class that says a little about itself.",
    "### Human: What does a.C.n do?### Assistant: Does what it does\n\n"
    "at length, in two paragraphs.",
  ]


def test_docstrings_of_the_standard_library_are_guanaco(tmp_path):
  (source,) = prepare.from_docstrings(tmp_path)
  documents = list(readers.read("guanaco", source.path))
  assert len(documents) > 3000
  chat = next(d for d in documents if d.text.startswith("### Human: What does json.dumps do?"))
  ((start, stop),) = chat.spans
  assert stop == len(chat.text)
  assert chat.text[start:].startswith(" Serialize ``obj`` to a JSON formatted ``str``.")
