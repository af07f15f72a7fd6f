"""Reading and writing safetensors, against the library of that name."""

import json

import ml_dtypes
import numpy as np
import pytest

from eco_optax.interop import safetensors

save_file = pytest.importorskip("safetensors.numpy").save_file

ARRAYS = {
  "a.weight": np.arange(-4, 4, dtype=np.float32).reshape(2, 4).astype(ml_dtypes.float8_e4m3fn),
  "b": np.ones((3, 2), ml_dtypes.bfloat16),
  "c": np.arange(5, dtype=np.int32),
  "d": np.arange(6, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).reshape(3, 2),
  "e": np.zeros((0, 3), np.float64),
  "f": np.array(7, np.int64),
}


def assert_holds(found, wanted):
  assert found.keys() == wanted.keys()
  for name, x in wanted.items():
    assert found[name].dtype == x.dtype
    assert found[name].shape == x.shape
    assert found[name].tobytes() == x.tobytes()


def test_reads_what_the_library_writes(tmp_path):
  save_file(ARRAYS, tmp_path / "any_name.safetensors")
  assert_holds(safetensors.read(tmp_path), ARRAYS)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 30, 1])
def test_the_library_reads_what_is_written(tmp_path, shard_bytes):
  safetensors.write(tmp_path, ARRAYS.items(), shard_bytes)
  assert_holds(safetensors.read(tmp_path), ARRAYS)
  files = sorted(tmp_path.glob("*.safetensors"))
  assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []
  index = tmp_path / safetensors.INDEX
  assert index.exists() == (len(files) > 1) == (shard_bytes < 1 << 30)
  from safetensors import safe_open

  for file in files:
    with safe_open(file, framework="np") as opened:
      assert opened.metadata() == {"format": "pt"}
      for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        assert tuple(part.get_shape()) == ARRAYS[name].shape
        if index.exists():
          assert json.loads(index.read_text())["weight_map"][name] == file.name


def test_a_header_of_odd_length_is_read(tmp_path):
  header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
  header += b" " * (1 - len(header) % 2)
  data = np.array([1.5, -2], ml_dtypes.bfloat16)
  raw = len(header).to_bytes(8, "little") + header + data.tobytes()
  (tmp_path / "model.safetensors").write_bytes(raw)
  np.testing.assert_array_equal(np.array(safetensors.read(tmp_path)["x"], np.float32), [1.5, -2])


def test_what_is_damaged_or_missing_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
    safetensors.read(tmp_path)
  safetensors.write(tmp_path, ARRAYS.items(), 1)
  files = sorted(tmp_path.glob("*.safetensors"))
  whole = files[0].read_bytes()
  headers = (b"[]", b'{"a": 3}', b'{"a": {"shape": [1], "data_offsets": [0, 4]}}')
  damaged_header = [len(x).to_bytes(8, "little") + x + bytes(4) for x in headers]
  for damaged in (
    whole[:-1],
    whole[:20],
    b"",
    b"\xff" * 40,
    whole.replace(b"F8_E4M3", b"F9_E4M3"),
    *damaged_header,
  ):
    files[0].write_bytes(damaged)
    with pytest.raises(ValueError, match=files[0].name):
      safetensors.read(tmp_path)
  files[0].unlink()
  with pytest.raises(FileNotFoundError, match=files[0].name):
    safetensors.read(tmp_path)
  files[0].write_bytes(whole)
  index = json.loads((tmp_path / safetensors.INDEX).read_text())
  index["weight_map"]["lost"] = files[1].name
  (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="'lost', which is in none of its files"):
    safetensors.read(tmp_path)
  for damaged in ("[]", "{}", '{"weight_map": {"a": 3}}'):
    (tmp_path / safetensors.INDEX).write_text(damaged)
    with pytest.raises(ValueError, match=f"{safetensors.INDEX} is damaged"):
      safetensors.read(tmp_path)
