"""A prepared corpus on disk, and what is said of one that is not what its manifest says."""

import hashlib
import json
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eco_optax.training.data import shards

TOKENS = {
  "train-0": np.array([5, 6, 1, 7, 1], np.uint16),
  "train-1": np.array([2, 3, 1], np.uint16),
  "validation-0": np.array([4, 1], np.uint16),
}


def digest(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path):
  """A corpus of three shards with masks, written with NumPy alone."""
  tokenizer = tmp_path / "tokenizer.json"
  tokenizer.write_text("{}")
  entries = {}
  for name, tokens in TOKENS.items():
    np.save(tmp_path / f"{name}.npy", tokens)
    np.save(tmp_path / f"{name}.mask.npy", tokens > 2)
    entries[name] = {
      "file": f"{name}.npy",
      "tokens": len(tokens),
      "largest": int(tokens.max()),
      "sha256": digest(tmp_path / f"{name}.npy"),
      "mask": f"{name}.mask.npy",
      "mask_sha256": digest(tmp_path / f"{name}.mask.npy"),
    }
  manifest = {
    "version": 1,
    "tokenizer": {"kind": "bpe", "file": tokenizer.name, "sha256": digest(tokenizer)},
    "vocabulary": 8,
    "separator": 1,
    "dtype": "uint16",
    "splits": {
      "train": {"shards": [entries["train-0"], entries["train-1"]]},
      "validation": {"shards": [entries["validation-0"]]},
    },
  }
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path


def edit(folder, change):
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  change(manifest)
  path.write_text(json.dumps(manifest))


def shard(manifest):
  return manifest["splits"]["train"]["shards"][1]


def test_corpus_is_read_back(folder):
  data = shards.load(folder)
  assert (data.vocabulary, data.separator) == (8, 1)
  train = np.concatenate([TOKENS["train-0"], TOKENS["train-1"]])
  np.testing.assert_array_equal(data.train.read(0, 8), train)
  np.testing.assert_array_equal(data.train.read_mask(2, 7), train[2:7] > 2)
  assert data.train.read(0, 8).dtype == np.int32
  np.testing.assert_array_equal(data.validation.read(0, 2), TOKENS["validation-0"])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, bool])
@pytest.mark.parametrize("length", [0, 1, 3000])
def test_write_makes_what_numpy_reads_and_says_its_digest(tmp_path, dtype, length):
  path = tmp_path / "a.npy"
  array = (np.arange(length) % 3).astype(dtype)
  assert shards.write(path, array) == digest(path)
  assert np.load(path).dtype == dtype
  np.testing.assert_array_equal(np.load(path), array)
  np.save(tmp_path / "b.npy", array)
  assert path.read_bytes() == (tmp_path / "b.npy").read_bytes()
  assert sorted(x.name for x in tmp_path.iterdir()) == ["a.npy", "b.npy"]


@pytest.mark.parametrize("length", [950, 1000, 4000, 100_000])
def test_write_to_a_full_disk_is_an_error(tmp_path, length):
  """Also where all but the last few bytes fit."""
  path = tmp_path / "a.npy"
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(OSError, match=r"."):
      shards.write(path, np.ones(length, np.uint16))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not path.exists()


def overwrite(name, array):
  return lambda folder: np.save(folder / name, array)


def cut(name, size):
  return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(folder):
  path = folder / "train-1.npy"
  path.write_bytes(path.read_bytes()[:-1] + b"\1")


def token_beyond(folder):
  """A shard and its manifest agree, but on its largest token."""
  np.save(folder / "train-1.npy", np.array([2, 9, 1], np.uint16))
  edit(folder, lambda x: shard(x).update(sha256=digest(folder / "train-1.npy")))


def name_it(name):
  return lambda folder: edit(folder, lambda manifest: shard(manifest).update(file=name))


BAD = {
  "no manifest": (lambda x: (x / "manifest.json").unlink(), r"no manifest.json: .* its end"),
  "damaged manifest": (cut("manifest.json", 50), r"manifest.json is damaged"),
  "other version": (
    lambda x: edit(x, lambda m: m.update(version=2)),
    r"manifest.json has version 2, .* version 1",
  ),
  "missing shard": (lambda x: (x / "train-1.npy").unlink(), r"train-1.npy is missing"),
  "missing mask": (lambda x: (x / "train-1.mask.npy").unlink(), r"train-1.mask.npy is missing"),
  "missing tokenizer": (lambda x: (x / "tokenizer.json").unlink(), r"tokenizer.json is missing"),
  "changed tokenizer": (
    lambda x: (x / "tokenizer.json").write_text("{ }"),
    r"tokenizer.json is not the tokenizer that the shards were made with",
  ),
  "cut shard": (cut("train-1.npy", 131), r"train-1.npy is damaged or cut short"),
  "cut header": (cut("train-1.npy", 20), r"train-1.npy is damaged or cut short"),
  "empty shard": (cut("train-1.npy", 0), r"train-1.npy is damaged or cut short"),
  "changed shard": (flip, r"train-1.npy is not what was prepared: its sha256"),
  "changed mask": (
    overwrite("train-1.mask.npy", np.zeros(3, bool)),
    r"train-1.mask.npy is not what was prepared",
  ),
  "other dtype": (
    overwrite("train-1.npy", np.array([2, 3, 1], np.uint32)),
    r"train-1.npy holds uint32 of shape \(3,\), .* uint16",
  ),
  "other length": (
    overwrite("train-1.npy", np.array([2, 3], np.uint16)),
    r"train-1.npy holds uint16 of shape \(2,\), .*\(3,\)",
  ),
  "mask of integers": (
    overwrite("train-1.mask.npy", np.ones(3, np.uint8)),
    r"train-1.mask.npy holds uint8 .* bool",
  ),
  "objects": (overwrite("train-1.npy", np.array([{}])), r"train-1.npy is damaged"),
  "said beyond the vocabulary": (
    lambda x: edit(x, lambda m: shard(m).update(largest=8)),
    r"train-1.npy holds token 8, beyond the vocabulary of 8",
  ),
  "beyond the vocabulary": (
    token_beyond,
    r"train-1.npy holds token 9, beyond the vocabulary of 8",
  ),
  "some masks": (
    lambda x: edit(x, lambda m: shard(m).pop("mask")),
    r"only some shards of train have masks",
  ),
  "absolute path": (name_it("/etc/hostname"), r"manifest.json names '/etc/hostname', which is not"),
  "path out of it": (name_it("../train-1.npy"), r"names '\.\./train-1.npy', which is not"),
  "a folder": (name_it("."), r"names '\.', which is not"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(folder, case):
  spoil, said = BAD[case]
  spoil(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
    shards.load(folder)
  if "which is not" not in said:  # No preparation makes such a manifest.
    error.match(
      r"Prepare the corpus again with scripts/prepare_data.py|Run scripts/prepare_data.py"
    )


def test_without_verifying_sizes_and_the_manifest_are_still_checked(folder):
  flip(folder)
  assert len(shards.load(folder, verify=False).train) == 8
  cut("train-1.npy", 131)(folder)
  with pytest.raises(ValueError, match=r"train-1.npy is damaged or cut short"):
    shards.load(folder, verify=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.data())
def test_a_stream_is_its_shards_end_to_end(lengths, data):
  joined = np.arange(sum(lengths), dtype=np.uint16)
  arrays = np.split(joined, np.cumsum(lengths)[:-1])
  stream = shards.TokenStream(arrays, [array % 3 == 0 for array in arrays])
  assert len(stream) == len(joined)
  start = data.draw(st.integers(0, len(joined)))
  stop = data.draw(st.integers(start, len(joined)))
  np.testing.assert_array_equal(stream.read(start, stop), joined[start:stop])
  np.testing.assert_array_equal(stream.read_mask(start, stop), joined[start:stop] % 3 == 0)
  with pytest.raises(IndexError, match=f"of {len(joined)}"):
    stream.read(start, len(joined) + 1)
