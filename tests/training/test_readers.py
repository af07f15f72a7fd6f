"""Documents from files of each format, and what is said of files that are not of it."""

import gzip
import json
import pathlib
import re
import sys
import tempfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eco_optax.training.data import corpus, readers


def jsonl(*texts, field="text"):
  return "".join(json.dumps({field: text, "url": "x"}) + "\n" for text in texts).encode()


def parquet(texts, field="text", rows=2):
  sink = pyarrow.BufferOutputStream()
  table = pyarrow.table({"id": range(len(texts)), field: texts})
  pyarrow.parquet.write_table(table, sink, row_group_size=rows)
  return sink.getvalue().to_pybytes()


def read(path, data, format, field="text"):
  path.write_bytes(data)
  return list(readers.read(format, path, field))


TEXTS = ["one\ntwo", "naïve 漢字 🙂", " ends with a space "]


@pytest.mark.parametrize(
  ("name", "data", "format", "texts"),
  [
    ("a.json.gz", gzip.compress(jsonl(*TEXTS), mtime=0), "c4", TEXTS),
    ("a.json", jsonl(*TEXTS), "c4", TEXTS),
    ("a.jsonl", jsonl("x") + b"\n  \n" + jsonl("y")[:-1], "c4", ["x", "y"]),
    ("a.jsonl", jsonl("x", "", "y"), "c4", ["x", "y"]),
    ("a.txt", "a b\r\n\n \nc\u2028d\x0ce\nf".encode(), "lines", ["a b", "c\u2028d\x0ce", "f"]),
    ("a.txt.gz", gzip.compress(b"a\nb\n", mtime=0), "lines", ["a", "b"]),
    ("a.txt", "a\r\n\nb é\n".encode(), "text", ["a\r\n\nb é\n"]),
    ("a.parquet", parquet(TEXTS * 700, rows=900), "parquet", TEXTS * 700),
  ],
)
def test_each_format_gives_its_documents(tmp_path, name, data, format, texts):
  documents = read(tmp_path / name, data, format)
  assert [document.text for document in documents] == texts
  assert all(document.spans is None for document in documents)
  assert all(document.place.startswith(str(tmp_path / name)) for document in documents)


def test_the_field_of_the_text_has_a_name(tmp_path):
  for name, data, format in (
    ("a.jsonl", jsonl("x", field="body"), "c4"),
    ("a.parquet", parquet(["x"], field="body"), "parquet"),
  ):
    assert [x.text for x in read(tmp_path / name, data, format, "body")] == ["x"]


def test_a_chat_is_trained_on_where_the_assistant_speaks(tmp_path):
  turns = [("Human", " Hé? "), ("Assistant", " Ja 漢 "), ("Human", " b "), ("Assistant", " end")]
  text = "".join(f"### {who}:{what}" for who, what in turns)
  closed = "### Assistant: a### Human: thanks"
  first, second = read(tmp_path / "a.jsonl", jsonl(text, closed), "guanaco")
  assert first.text == text
  assert [text[start:stop] for start, stop in first.spans] == [" Ja 漢 ", " end"]
  assert first.spans[-1][1] == len(text)
  assert [closed[start:stop] for start, stop in second.spans] == [" a"]


def test_the_standard_library_is_read_whole():
  root = pathlib.Path(json.__file__).parents[1]
  text = corpus.standard_library()
  wanted = sorted(data.decode() for data in text.train + text.validation if data)
  assert sorted(x.text for x in readers.read("stdlib", root)) == wanted
  assert readers.fingerprint("stdlib", root) == text.manifest["sha256"]


texts_strategy = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(texts_strategy)
def test_any_text_survives(texts):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    packed = read(path / "a.json.gz", gzip.compress(jsonl(*texts)), "c4")
    table = read(path / "a.parquet", parquet(texts), "parquet")
    whole = read(path / "a.txt", texts[0].encode(), "text")
  assert [x.text for x in packed] == [x.text for x in table] == texts
  assert whole[0].text == texts[0]


cut = gzip.compress(jsonl(*(f"document {i} {i**20}" for i in range(2000))), mtime=0)
flipped = bytearray(gzip.compress(b"line\n" * 3, mtime=0))
flipped[-5] ^= 255  # In the checksum.
BAD = {
  "truncated gzip": ("a.json.gz", cut[:-1000], "c4", ["cut short", r"after line \d+", "again"]),
  "not gzip": ("a.json.gz", jsonl("x"), "c4", ["is not gzip", "without .gz"]),
  "damaged gzip": ("a.txt.gz", bytes(flipped), "lines", ["damaged, after line 3", "again"]),
  "broken JSON": (
    "a.jsonl",
    jsonl("x", "y") + b'{"text": "z',
    "c4",
    ["line 3 is not JSON", "mend"],
  ),
  "a JSON list": ("a.json", b'["x"]\n', "c4", ["line 1 is list, not an object"]),
  "no such key": (
    "a.jsonl",
    jsonl("x", field="body"),
    "c4",
    ["line 1", "'body', 'url'", "--field"],
  ),
  "a number": ("a.jsonl", jsonl("x", 7), "c4", ["line 2", "'text' is int", "mend"]),
  "half a pair": ("a.jsonl", jsonl("x", "a\ud800"), "c4", ["line 2: character 1", "surrogate"]),
  "not UTF-8": ("a.txt", b"fine\nab\xffc\n", "lines", ["line 2: byte 2 is 0xff", "iconv"]),
  "not UTF-8 JSON": (
    "a.jsonl",
    jsonl("x") + b'{"text": "\xe9"}',
    "c4",
    ["line 2: byte 10", "UTF-8"],
  ),
  "not UTF-8 file": ("a.txt", b"ab\n\xc3", "text", ["a.txt: byte 3 is 0xc3", "iconv"]),
  "empty": ("a.txt", b"", "text", ["is empty", "leave it out"]),
  "no text": ("a.txt", b"\n \n", "lines", ["holds no text"]),
  "empty gzip": ("a.json.gz", gzip.compress(b"", mtime=0), "c4", ["holds no text"]),
  "no assistant": ("a.jsonl", jsonl("### Human: x"), "guanaco", ["line 1", "Assistant:'", "mend"]),
  "no column": ("a.parquet", parquet(["x"], "body"), "parquet", ["'id', 'body'", "--field"]),
  "not Parquet": ("a.parquet", b"PAR1 no", "parquet", ["is not Parquet", "again"]),
  "cut Parquet": ("a.parquet", parquet(TEXTS)[:-9], "parquet", ["not Parquet, or", "cut short"]),
  "null": ("a.parquet", parquet(["x", "y", None, "z"]), "parquet", ["row 3", "NoneType", "mend"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_the_place_and_the_remedy(tmp_path, case):
  name, data, format, said = BAD[case]
  with pytest.raises(ValueError, match=name) as error:
    read(tmp_path / name, data, format)
  for pattern in said:
    error.match(pattern)


def test_what_is_before_damage_in_parquet_is_counted(tmp_path):
  data = bytearray(parquet([f"{i} text" for i in range(4000)], rows=2000))
  # The second row group's pages; the footer is whole.
  start = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(bytes(data))).metadata
  offset = start.row_group(1).column(1).dictionary_page_offset
  data[offset : offset + 40] = b"\xff" * 40
  with pytest.raises(ValueError, match=r"a\.parquet, after row \d+: it is not Parquet"):
    read(tmp_path / "a.parquet", bytes(data), "parquet")


def test_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'eco_optax\[data\]'"):
    read(tmp_path / "a.parquet", b"x", "parquet")


def test_patterns_find_each_file_once(tmp_path, monkeypatch):
  for name in ("b.txt", "a.txt", "in/c.txt", "d[1].txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
  monkeypatch.chdir(tmp_path)
  names = lambda *patterns: [
    path.relative_to(tmp_path).as_posix() for path in readers.find(patterns)
  ]
  assert names("*.txt", "a.txt") == ["a.txt", "b.txt", "d[1].txt"]
  assert names("**/*.txt") == ["a.txt", "b.txt", "d[1].txt", "in/c.txt"]
  assert names("d[1].txt", str(tmp_path / "b.txt")) == ["b.txt", "d[1].txt"]
  for pattern in ("*.json", "in"):
    with pytest.raises(FileNotFoundError, match=rf"no file matches '{re.escape(pattern)}'.*quote"):
      readers.find(["a.txt", pattern])
