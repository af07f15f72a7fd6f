"""Documents from files of each format, and what is said of files that are not of it."""

import bz2
import gzip
import json
import lzma
import os
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


def zstd(data):
  return pyarrow.compress(data, codec="zstd", asbytes=True)


def broken_parquet():
  """Three strings, of which the second is not UTF-8."""
  column = pyarrow.array([b"x", b"\xff", b"z"], pyarrow.binary()).view(pyarrow.string())
  sink = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
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
    ("a.txt", gzip.compress(b"a\n", mtime=0) + gzip.compress(b"b\n", mtime=0), "lines", ["a", "b"]),
    ("a.gz", b"a\nb\n", "lines", ["a", "b"]),  # What it is says its contents, not its name.
    ("a.txt", gzip.compress(b"a\r\nb", mtime=0), "text", ["a\r\nb"]),
    ("a", zstd(jsonl("x")) + zstd(jsonl("y")), "c4", ["x", "y"]),
    ("a", bz2.compress(jsonl("x")), "c4", ["x"]),
    ("a", lzma.compress(jsonl("x")), "c4", ["x"]),
    ("a.txt", b"a\rb\r\nc\n\rd", "lines", ["a", "b", "c", "d"]),
    ("a.jsonl", b'{"text": "a"}\r{"text": "b\\r"}\r', "c4", ["a", "b\r"]),
    ("a.txt", "\ufeffa\n\ufeffb\n".encode(), "lines", ["a", "b"]),
    ("a.txt.gz", gzip.compress("\ufeffa\n".encode(), mtime=0), "lines", ["a"]),
    ("a.txt", "\ufeffa\ufeff\n".encode(), "text", ["a\ufeff\n"]),
    (
      "a.jsonl",
      "\ufeff".encode() + jsonl("a") + "\ufeff".encode() + jsonl("\ufeffb"),
      "c4",
      ["a", "b"],
    ),
    ("a.parquet", parquet(["\ufeffa", "b"]), "parquet", ["a", "b"]),
    ("a.jsonl", jsonl(" \n", "x", "\u2003", "\ufeff "), "c4", ["x"]),
    ("a.parquet", parquet([" ", "x", ""]), "parquet", ["x"]),
    ("a.txt", b"long " * 10**6, "lines", ["long " * 10**6]),
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


characters = st.characters(codec="utf-8", exclude_characters="\0")
texts_strategy = st.lists(st.text(characters, min_size=1), min_size=1, max_size=8).filter(
  lambda texts: texts[0].removeprefix("\ufeff").strip()
)


@settings(max_examples=25, deadline=None)
@given(texts_strategy)
def test_any_text_survives(texts):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    packed = read(path / "a.json.gz", gzip.compress(jsonl(*texts), mtime=0), "c4")
    table = read(path / "a.parquet", parquet(texts), "parquet")
    whole = read(path / "b.txt", texts[0].encode(), "text")
  kept = [y for x in texts if (y := x.removeprefix("\ufeff")).strip()]
  assert [x.text for x in packed] == [x.text for x in table] == kept
  assert whole[0].text == texts[0].removeprefix("\ufeff")


cut = gzip.compress(jsonl(*(f"document {i} {i**20}" for i in range(2000))), mtime=0)
flipped = bytearray(gzip.compress(b"line\n" * 3, mtime=0))
flipped[-5] ^= 255  # In the checksum.
BAD = {
  "truncated gzip": ("a.json.gz", cut[:-1000], "c4", ["cut short or damaged: its gzip", "again"]),
  "truncated bzip2": ("a.json", bz2.compress(jsonl("x"))[:-9], "c4", ["its bzip2 stream ends"]),
  "truncated xz": ("a.json", lzma.compress(jsonl("x"))[:-9], "c4", ["its xz stream ends"]),
  "truncated zstd": ("a.txt", zstd(b"line\n" * 99)[:-4], "text", ["its zstd stream ends", "again"]),
  "gzip and more": (
    "a.txt",
    gzip.compress(b"x\n", mtime=0) + b"more",
    "lines",
    ["damaged", "Not a gzipped"],
  ),
  "damaged gzip": ("a.txt.gz", bytes(flipped), "lines", ["damaged: .*CRC check failed", "again"]),
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
  "Parquet of another name": (
    "a.txt",
    parquet(["x"]),
    "lines",
    ["is Parquet: use --format=parquet"],
  ),
  "ZIP": ("a.txt", b"PK\x03\x04...", "text", ["is a ZIP archive: unpack it"]),
  "UTF-16": ("a.txt", "a\n".encode("utf-16"), "lines", ["UTF-16: .*iconv -f UTF-16 -t UTF-8"]),
  "UTF-16 in gzip": ("a", gzip.compress(b"\xfe\xff\0a", mtime=0), "c4", ["UTF-16: .*iconv"]),
  "UTF-32": ("a.txt", "a\n".encode("utf-32"), "text", ["UTF-32: .*iconv -f UTF-32"]),
  "unmarked UTF-16": (
    "a.txt",
    "ab".encode("utf-16-le"),
    "lines",
    ["line 1: byte 1 is 0x00", "iconv"],
  ),
  "NUL": ("a.txt", b"fine\n\xc3\xa9\0\n", "lines", ["line 2: byte 2 is 0x00"]),
  "nested JSON": ("a.json", jsonl("x") + b"[" * 10**5, "c4", ["line 2 is nested too deeply"]),
  "trailing comma": ("a.json", b'{"text": "x"},\n', "c4", ["line 1 is not JSON", "--skip_bad"]),
  "JSON null": ("a.json", b'{"text": null}\n', "c4", ["line 1: 'text' is null", "--skip_bad"]),
  "carriage returns": ("a.json", b'{"text": "x"}\r{"text": 1}\r', "c4", ["line 2: 'text' is int"]),
  "only a mark": ("a.txt", b"\xef\xbb\xbf", "text", ["holds no text"]),
  "only spaces": ("a.jsonl", jsonl(" ", "\u3000"), "c4", ["holds no text"]),
  "not UTF-8 Parquet": ("a.parquet", broken_parquet(), "parquet", ["row 2: 'text' is not UTF-8"]),
  "cut Parquet": ("a.parquet", parquet(TEXTS)[:-9], "parquet", ["not Parquet, or", "cut short"]),
  "null": (
    "a.parquet",
    parquet(["x", "y", None, "z"]),
    "parquet",
    ["row 3: 'text' is null", "mend", "--skip_bad"],
  ),
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
  for pattern in ("*.json", "**/*.json", "none/*", ""):
    with pytest.raises(FileNotFoundError, match=rf"no file matches '{re.escape(pattern)}'.*quote"):
      readers.find(["a.txt", pattern])


def test_links_and_loops_lead_to_each_file_once(tmp_path, monkeypatch):
  (tmp_path / "in" / "deep").mkdir(parents=True)
  (tmp_path / "elsewhere").mkdir()
  for name in ("in/b.txt", "in/deep/c.txt", "elsewhere/d.txt"):
    (tmp_path / name).write_text("x")
  for number in range(6):  # glob.glob would look into 6**40 folders.
    (tmp_path / "in" / f"again{number}").symlink_to(".")
  (tmp_path / "in" / "deep" / "up").symlink_to("..")
  (tmp_path / "in" / "a_link.txt").symlink_to("b.txt")
  (tmp_path / "in" / "hard.txt").hardlink_to(tmp_path / "in" / "b.txt")
  (tmp_path / "in" / "other").symlink_to(tmp_path / "elsewhere")
  monkeypatch.chdir(tmp_path)
  names = lambda *patterns: [str(path.relative_to(tmp_path)) for path in readers.find(patterns)]
  assert names("in/**/*.txt") == ["in/b.txt", "in/deep/c.txt", "in/other/d.txt"]
  assert names("in/**") == names("in/**/*.txt", "in/b.txt", "./in/*.txt", "in/deep/**/c.txt")
  assert names("in/a_link.txt") == ["in/a_link.txt"]
  assert names("in/*/c.txt", "in/again1/deep/c.txt") == ["in/deep/c.txt"]
  assert names("in/other/../elsewhere/d.txt") == ["elsewhere/d.txt"]


def test_paths_to_no_readable_file_are_named(tmp_path, monkeypatch):
  (tmp_path / "a.txt").write_text("x")
  (tmp_path / "folder.txt").mkdir()
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "broken").symlink_to("nowhere")
  for pattern, kind, said in (
    ("broke*", FileNotFoundError, "broken is a link to nothing: mend it"),
    ("pip*", ValueError, "pipe is a pipe or a device.*write it to a file first"),
    (
      "*.txt",
      ValueError,
      r"folder.txt is a folder: name the files in it, such as '.*folder.txt/\*'",
    ),
    ("folder.txt", ValueError, "is a folder"),
  ):
    with pytest.raises(kind, match=said):
      readers.find([f"{tmp_path}/{pattern}"])
  access = os.access  # Root may read everything.
  monkeypatch.setattr(os, "access", lambda path, mode: "a.txt" not in path and access(path, mode))
  with pytest.raises(PermissionError, match=r"a.txt cannot be read: change its permissions"):
    readers.find([f"{tmp_path}/a*"])

  def refuse(path):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(os, "listdir", refuse)
  with pytest.raises(OSError, match=r"cannot read .*, which '.*/a\*' takes in: Permission denied"):
    readers.find([f"{tmp_path}/a*"])


ROWS = b"\n".join(
  (
    b'{"text": "a"}',
    b'{"text": null}',
    b"{",
    b'{"text": "\xff"}',
    b"[" * 10**5,
    b"[]",
    b'{"a": 1}',
    b'{"text": "\\ud800"}',
    b"a\0",
    b'{"text": " "}',
    b'{"text": "b"}',
  )
)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(ROWS)
  tally = readers.Tally(skip_bad=True)
  texts = [x.text for x in readers.read("c4", tmp_path / "a.jsonl", "text", tally)]
  assert texts == ["a", "b"]
  assert tally.counts == {"bad rows": 8, "blank documents": 1}
  assert tally.first["bad rows"].startswith(f"{tmp_path}/a.jsonl, line 2: 'text' is null")

  for format, data, texts, count in (
    ("parquet", parquet(["x", None, "z"]), ["x", "z"], 1),
    ("parquet", broken_parquet(), ["x", "z"], 1),
    ("lines", b"a\n\xff\nb", ["a", "b"], 1),
    ("text", b"\xff", [], 1),
    ("lines", b"", [], 1),
    ("guanaco", jsonl("### Human: x", "### Assistant: y"), ["### Assistant: y"], 1),
  ):
    tally = readers.Tally(skip_bad=True)
    (tmp_path / "b").write_bytes(data)
    assert [x.text for x in readers.read(format, tmp_path / "b", "text", tally)] == texts
    assert tally.counts == {"bad rows": count}
  (tmp_path / "b").write_bytes(cut[:-1000])  # What else it held is unknown.
  with pytest.raises(ValueError, match=r"b is cut short"):
    list(readers.read("c4", tmp_path / "b", "text", readers.Tally(skip_bad=True)))


@settings(max_examples=200, deadline=None)
@given(
  st.sampled_from(sorted(readers.FORMATS.keys() - {"stdlib", "packages"})),
  st.sampled_from(
    [b"", gzip.compress(b"x\n", mtime=0), zstd(b"x\n"), lzma.compress(b"x"), parquet(["x"])]
  )
  | st.just(ROWS),
  st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=4)), max_size=3),
  st.booleans(),
)
def test_whatever_a_file_holds_is_text_or_a_plain_error(format, data, changes, skip_bad):
  for at, new in changes:
    data = data[:at] + new + data[at + len(new) :]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "a"
    path.write_bytes(data)
    tally = readers.Tally(skip_bad)
    documents, said = [], str(path)
    try:
      documents = list(readers.read(format, path, "text", tally))
    except ValueError as error:
      said = str(error)
  assert str(path) in said
  assert documents or tally.counts or said != str(path)
  assert all(document.text.strip() for document in documents)


CHATS = {
  'write "### Human: x" ok': "",
  "write '### Human: x### Assistant: y' ok": "",
  "(“### Assistant:”) is a mark": "",
  'He said "hi"### Human: b### Assistant: c': "",
  'an unclosed "### Human: x': "a quotation mark is before a turn",
  "a### Assistant: b": "a turn follows one of the same speaker",
  "marks are\n### Human: x\n### Assistant: y": "some turns begin a line, and some do not",
  "```\n### Human: x\n``` is how": "block of code|some turns begin a line",
  "a mark is ### Human: as said": "the last turn is not the assistant's",
}


@pytest.mark.parametrize("reply", CHATS)
def test_marks_that_a_reply_quotes_are_no_turns_or_the_chat_is_counted(tmp_path, reply):
  (tmp_path / "a.jsonl").write_bytes(jsonl("### Human: a### Assistant:" + reply))
  tally = readers.Tally()
  (chat,) = readers.read("guanaco", tmp_path / "a.jsonl", "text", tally)
  assert re.fullmatch(f".*({CHATS[reply]}).*" if CHATS[reply] else "", chat.ambiguous)
  assert tally.counts.get("ambiguous chats", 0) == bool(CHATS[reply])
  if not CHATS[reply] and "hi" not in reply:
    assert [chat.text[start:stop] for start, stop in chat.spans] == [reply]
