"""From files to shards: the same documents, the same bytes however it is run; what is refused."""

import collections
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest

from eco_optax.training import jobs
from eco_optax.training.data import prepare, shards, tokenizers

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def document(number):
  return f"Document {number} of a naïve corpus 漢字. " + f"It counts to {number**3}. " * (
    number % 7
  )


def write_jsonl(path, texts):
  data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


@pytest.fixture
def files(tmp_path):
  """Twelve files of ten documents; one document is in two of them."""
  folder = tmp_path / "files"
  folder.mkdir()
  for number in range(12):
    texts = [document(10 * number + i) for i in range(10)]
    write_jsonl(
      folder / f"{number:02d}.json.gz", [*texts, document(7)][: 11 if number == 5 else 10]
    )
  return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
  monkeypatch.setattr(prepare, "UNIT_BYTES", 500)


def run(output, files, **options):
  options = {"format": "c4", "name": "test", "tokenizer": "bytes", "percent": 20.0} | options
  validation = options.pop("validation", [])
  pattern = str(files if files.is_file() else files / "*")
  return prepare.prepare(output, prepare.from_files([pattern], validation), **options)


def contents(folder):
  """Every file of a corpus and its bytes."""
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file() and path.name != "lock"
  }


def documents(data, folder):
  """The documents of each split, from its tokens alone."""
  tokenizer = tokenizers.load(folder, data.manifest["tokenizer"])
  found = {}
  for split in shards.SPLITS:
    stream = getattr(data, split)
    tokens = stream.read(0, len(stream))
    assert tokens[-1] == data.separator
    parts = np.split(tokens, np.flatnonzero(tokens == data.separator) + 1)[:-1]
    found[split] = collections.Counter(tokenizer.decode(part[:-1]) for part in parts)
  return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_documents_come_back_and_the_manifest_is_true(files, tmp_path, tokenizer):
  output = tmp_path / "out"
  manifest = run(output, files, tokenizer=tokenizer, vocabulary=400)
  data = shards.load(output)
  assert data.manifest == manifest == json.loads((output / "manifest.json").read_text())
  assert data.vocabulary == (256 if tokenizer == "bytes" else 400)
  assert data.separator == 0

  found = documents(data, output)
  wanted = collections.Counter(document(i) for i in range(120))
  wanted[document(7)] += 1
  assert found["train"] + found["validation"] == wanted
  for text in wanted:  # Its hash decides, for all copies alike.
    fraction = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16
    assert found["validation" if fraction < 0.2 else "train"][text] == wanted[text]
  assert 10 <= found["validation"].total() <= 40

  for split in shards.SPLITS:
    totals = manifest["splits"][split]
    assert totals["documents"] == found[split].total()
    assert totals["tokens"] == len(getattr(data, split))
    assert totals["bytes"] == sum(len(text.encode()) for text in found[split].elements())
    for shard in totals["shards"]:
      array = np.load(output / shard["file"])
      assert array.dtype == np.uint16
      assert shard["largest"] == array.max()
      assert shard["sha256"] == hashlib.sha256((output / shard["file"]).read_bytes()).hexdigest()
  assert manifest["sources"] == [
    {
      "name": path.name,
      "bytes": path.stat().st_size,
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
      "documents": 11 if path.name == "05.json.gz" else 10,
    }
    for path in sorted(files.iterdir())
  ]
  assert str(tmp_path) not in json.dumps(manifest)
  assert f"{totals['documents']:>12,}" in prepare.table(manifest)


def test_neither_workers_nor_the_place_change_a_byte(files, tmp_path, monkeypatch):
  one, two = tmp_path / "one", tmp_path / "two"
  run(one, files, tokenizer="bpe", vocabulary=300)
  monkeypatch.chdir(files)
  sources = prepare.from_files(["*.json.gz"])
  prepare.prepare(
    two, sources, format="c4", name="test", percent=20.0, tokenizer="bpe", vocabulary=300, workers=2
  )
  assert contents(one) == contents(two)
  assert len(json.loads((one / "settings.json").read_text())["units"]) > 2
  assert not multiprocessing.active_children()


def is_alive(process):
  try:
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def test_killed_and_continued_it_is_the_same(files, tmp_path):
  for number in range(12, 60):
    write_jsonl(files / f"{number}.json.gz", [document(10 * number + i) * 30 for i in range(10)])
  fresh, output = tmp_path / "fresh", tmp_path / "out"
  options = {"tokenizer": "bpe", "vocabulary": 300}
  run(fresh, files, **options)

  program = f"""
from eco_optax.training.data import prepare
prepare.UNIT_BYTES = 500
prepare.prepare({str(output)!r}, prepare.from_files([{str(files / "*")!r}]), format="c4",
                name="test", percent=20.0, tokenizer="bpe", vocabulary=300, workers=2)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", program], env=os.environ | {"JAX_PLATFORMS": "cpu"}
  )
  units = output / "units"
  done = lambda: len(list(units.glob("*.json"))) if units.exists() else 0
  while done() < 3:
    assert process.poll() is None
    time.sleep(0.001)
  workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  process.kill()
  process.wait()
  finished = done()
  assert finished < len(list((fresh / "units").iterdir()))
  with pytest.raises(FileNotFoundError, match=r"no manifest.json: .* not come to its end"):
    shards.load(output)

  kept = {path: path.stat().st_mtime_ns for path in units.iterdir() if path.suffix == ".json"}
  deadline = time.monotonic() + 20
  while any(map(is_alive, workers)):  # They end by themselves.
    assert time.monotonic() < deadline
    time.sleep(0.01)
  run(output, files, **options)
  assert {k: v for k, v in contents(output).items() if ".new" not in k} == contents(fresh)
  assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
  shards.load(output)


def test_a_second_run_makes_again_only_what_is_damaged(files, tmp_path):
  output = tmp_path / "out"
  run(output, files)
  before = contents(output)
  written = {path: path.stat().st_mtime_ns for path in output.glob("*.npy")}
  damaged, lost = sorted(written)[2], sorted(written)[3]
  damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
  lost.unlink()
  run(output, files)
  assert contents(output) == before
  again = {path for path, when in written.items() if path.stat().st_mtime_ns != when}
  units = lambda paths: {path.name.split("-")[1] for path in paths}
  assert {damaged, lost} <= again
  assert units(again) == units([damaged, lost])


def test_large_units_are_written_in_pieces(files, tmp_path, monkeypatch):
  whole, pieces = tmp_path / "whole", tmp_path / "pieces"
  monkeypatch.setattr(prepare, "UNIT_BYTES", 2**20)
  run(whole, files)
  monkeypatch.setattr(prepare, "SHARD_TOKENS", 500)
  manifest = run(pieces, files)
  names = [shard["file"] for shard in manifest["splits"]["train"]["shards"]]
  assert names[:2] == ["train-00000-000.npy", "train-00000-001.npy"]
  assert len(names) > 10
  assert all(500 <= len(np.load(pieces / name)) < 1000 for name in names[:-1])
  one, many = shards.load(whole).train, shards.load(pieces).train
  np.testing.assert_array_equal(one.read(0, len(one)), many.read(0, len(many)))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_chat_is_masked(tmp_path, tokenizer):
  rows = [
    f"### Human: Hé {i}?### Assistant: 漢 {i}### Human: b### Assistant: end" for i in range(40)
  ]
  rows += [f"### Human: {i}### Assistant: a### Human: thanks" for i in range(40)]
  path = tmp_path / "chat.jsonl"
  write_jsonl(path, rows)
  output = tmp_path / "out"
  run(output, path, format="guanaco", tokenizer=tokenizer, vocabulary=270)
  data = shards.load(output)
  stream = data.train
  tokens, mask = stream.read(0, len(stream)), stream.read_mask(0, len(stream))
  decode = tokenizers.load(output, data.manifest["tokenizer"]).decode
  ends = np.flatnonzero(tokens == data.separator) + 1
  for part, kept in zip(np.split(tokens, ends)[:-1], np.split(mask, ends)[:-1], strict=True):
    text = decode(part[:-1])
    said = "".join(re.findall(r"### Assistant:(.*?)(?=### Human:|$)", text))
    assert decode(part[:-1][kept[:-1]]) == said
    assert kept[-1] == text.endswith("end")


def test_validation_may_have_files_of_its_own(files, tmp_path):
  held_out = tmp_path / "held_out"
  held_out.mkdir()
  write_jsonl(held_out / "v.json", [document(i) for i in range(500, 510)])
  output = tmp_path / "out"
  manifest = run(output, files, validation=[str(held_out / "*")])
  found = documents(shards.load(output), output)
  assert found["validation"] == collections.Counter(document(i) for i in range(500, 510))
  assert found["train"].total() == 121
  names = {source["name"] for source in manifest["sources"]}
  assert {"files/00.json.gz", "held_out/v.json"} <= names
  with pytest.raises(ValueError, match=r"00.json.gz is both in --input and in --validation: leave"):
    prepare.from_files([str(files / "*")], [str(files / "00*")])


def test_wide_vocabularies_have_wide_shards(files, tmp_path):
  import tokenizers as library

  words = {"[UNK]": 0, "</s>": 1, "Document": 70_000}
  model = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
  model.pre_tokenizer = library.pre_tokenizers.Whitespace()
  path = tmp_path / "tokenizer.json"
  model.save(str(path))
  output = tmp_path / "out"
  manifest = run(output, files, tokenizer=str(path))
  assert (manifest["dtype"], manifest["vocabulary"]) == ("uint32", 70_001)
  assert (output / "tokenizer.json").read_bytes() == path.read_bytes()
  assert shards.load(output).train.read(0, 2).tolist() == [70_000, 0]


OTHER = {
  "percent": ({"percent": 10.0}, r"validation_percent was 20\.0 and is 10\.0"),
  "format": ({"format": "lines"}, r"format was 'c4' and is 'lines'"),
  "tokenizer": ({"tokenizer": "bytes"}, r"tokenizer\.kind was 'bpe' and is 'bytes'"),
  "vocabulary": ({"vocabulary": 310}, r"tokenizer\.vocabulary was 300 and is 310"),
  "field": ({"field": "body"}, r"field was 'text' and is 'body'"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_in_the_same_folder_are_refused(files, tmp_path, case):
  options, said = OTHER[case]
  output = tmp_path / "out"
  options = {"tokenizer": "bpe", "vocabulary": 300} | options
  run(output, files, tokenizer="bpe", vocabulary=300)
  before = contents(output)
  with pytest.raises(ValueError, match=rf"out was prepared, or begun, with .*{said}.*empty folder"):
    run(output, files, **options)
  assert contents(output) == before


def test_other_files_in_the_same_folder_are_refused(files, tmp_path):
  output = tmp_path / "out"
  run(output, files)
  (files / "05.json.gz").rename(files / "05a.json.gz")
  with pytest.raises(ValueError, match=r"was '05.json.gz' and is '05a.json.gz'"):
    run(output, files)
  (files / "05a.json.gz").rename(files / "05.json.gz")
  data = bytearray((files / "05.json.gz").read_bytes())
  data[8] ^= 1  # The header's flags for speed: the same text and size.
  (files / "05.json.gz").write_bytes(data)
  with pytest.raises(ValueError, match=r"05.json.gz has changed since it was prepared: .*--output"):
    run(output, files)


def test_changed_tokenizer_is_refused(files, tmp_path):
  output = tmp_path / "out"
  run(output, files, tokenizer="bpe", vocabulary=300)
  path = output / "tokenizer.json"
  path.write_text(path.read_text() + " ")
  with pytest.raises(ValueError, match=r"tokenizer.json has changed since .*--output"):
    run(output, files, tokenizer="bpe", vocabulary=300)
  with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer that"):
    shards.load(output)


def test_a_file_that_is_mended_is_gone_on_with(files, tmp_path):
  good = (files / "07.json.gz").read_bytes()
  (files / "07.json.gz").write_bytes(good[:-20])
  output, fresh = tmp_path / "out", tmp_path / "fresh"
  with pytest.raises(ValueError, match=r"07.json.gz is cut short"):
    run(output, files)
  assert not (output / "manifest.json").exists()
  (files / "07.json.gz").write_bytes(good)
  run(output, files)
  run(fresh, files)
  assert contents(output) == contents(fresh)


REFUSED = {
  "format": ({"format": "c5"}, r"format 'c5' is not one of c4, lines"),
  "percent": ({"percent": 100.0}, r"validation_percent 100.0 is not between 0 and 100"),
  "workers": ({"workers": 0}, r"workers 0 is not 1 or more"),
  "vocabulary": ({"tokenizer": "bpe", "vocabulary": 256}, r"vocabulary 256 is less than 257"),
  "separator": ({"separator": "</s>"}, r"separator '</s>' is for .* bytes has its own"),
  "separator of a BPE": ({"tokenizer": "bpe", "separator": "x"}, r"'x' is for .* bpe has its own"),
  "tokenizer": ({"tokenizer": "words"}, r"tokenizer 'words' is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(files, tmp_path, case):
  options, said = REFUSED[case]
  with pytest.raises(ValueError, match=said):
    run(tmp_path / "out", files, **options)
  assert not (tmp_path / "out").exists()


def test_empty_splits_are_refused(files, tmp_path):
  with pytest.raises(ValueError, match=r"no document of test is in the validation split.*percent"):
    run(tmp_path / "out", files, percent=1e-9)
  assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_separator_in_a_text_is_refused(files, tmp_path, workers):
  write_jsonl(files / "11.json.gz", ["fine", "漢字 a\0b"])
  said = (
    r"11.json.gz, line 2: character 4 is encoded to the separator of documents, token 0: .*--tok"
  )
  with pytest.raises(ValueError, match=said):
    run(tmp_path / "out", files, workers=workers)
  assert not multiprocessing.active_children()


def test_folder_of_something_else_is_left_alone(files, tmp_path):
  output = tmp_path / "home"
  output.mkdir()
  (output / "thesis.tex").write_text("x")
  with pytest.raises(
    ValueError, match=r"home holds thesis.tex, and no corpus: use an empty folder"
  ):
    run(output, files)
  assert (output / "thesis.tex").read_text() == "x"


def test_damaged_records_are_named(files, tmp_path):
  output = tmp_path / "out"
  run(output, files)
  for damage in ("{", "[" * 10**5, "\0"):
    (output / "units" / "00001.json").write_text(damage)
    with pytest.raises(ValueError, match=r"units/00001.json is damaged .*empty folder"):
      run(output, files)


def test_one_folder_is_prepared_once_at_a_time(files, tmp_path):
  with jobs.only_one(tmp_path / "out"), pytest.raises(BlockingIOError, match=r"out is in use by"):
    run(tmp_path / "out", files)


def test_full_disk_is_said_and_gone_on_from(files, tmp_path):
  output, fresh = tmp_path / "out", tmp_path / "fresh"
  run(fresh, files)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
  try:
    with pytest.raises(OSError, match=r"cannot write in .*out: .*same command again"):
      run(output, files)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  with pytest.raises(FileNotFoundError, match=r"no manifest.json"):
    shards.load(output)
  run(output, files)
  assert contents(output) == contents(fresh)


def test_worker_that_dies_is_said(files, tmp_path):
  stop = threading.Event()

  def kill():
    while not stop.wait(0.01):
      for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        return

  thread = threading.Thread(target=kill)
  thread.start()
  try:
    with pytest.raises(ChildProcessError, match=r"worker process died.*fewer --workers"):
      run(tmp_path / "out", files, workers=2)
  finally:
    stop.set()
    thread.join()
  assert not multiprocessing.active_children()


def test_progress_says_what_is_left(monkeypatch, capsys):
  clock = itertools.count(0, 40)
  monkeypatch.setattr(prepare, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
  progress = prepare._Progress(4000)
  progress.add(1, 10, 40_000_000)
  source = prepare.Source(pathlib.Path("x"), "x", 1000)
  progress.add_unit([source], {"splits": {"train": [{"bytes": 40_000_000}], "validation": []}})
  progress.add(1, 10, 40_000_000)
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith("1 documents, 10 tokens, 1.0 MB/s, ? left")
  # A quarter of the sources was 40 MB of text, so there are 160, of which 80 took 80 s.
  assert second.startswith("2 documents, 20 tokens, 1.0 MB/s, 1:20 left")


def script(*arguments, **environment):
  return subprocess.run(
    [sys.executable, str(SCRIPT), *arguments],
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
  )


def test_the_script_prepares_and_says_what(files, tmp_path):
  output = tmp_path / "out"
  arguments = [f"--input={files}/*", f"--output={output}", "--validation_percent=20"]
  result = script("--format=c4", "--tokenizer=bytes", *arguments)
  assert result.returncode == 0, result.stderr
  assert re.search(r"(?m)^train +\d+ +[\d,]+ +0\.0 +0\.9\d$", result.stdout)
  assert "12 c4 files: 12 sources, vocabulary 256 (bytes), separator 0, uint16" in result.stdout
  assert len(shards.load(output).validation)

  result = script("--format=c4", "--tokenizer=bytes", "--vocabulary=300", *arguments)
  assert (result.returncode, result.stdout) == (1, "")
  assert result.stderr.startswith("error: --vocabulary is of --tokenizer=bpe alone")


def test_a_file_of_both_splits_is_refused_however_it_is_reached(files, tmp_path):
  (tmp_path / "link").symlink_to(files)
  (tmp_path / "held.json.gz").hardlink_to(files / "05.json.gz")
  for held, said in (
    (files / "05*", r"05.json.gz is both in --input and in --validation: leave it out of one"),
    (tmp_path / "link" / "05.json.gz", r"link/05.json.gz is both .* .*files/05.json.gz, the same"),
    (
      tmp_path / "held.json.gz",
      r"held.json.gz is both .* .*files/05.json.gz, the same file, is in",
    ),
  ):
    with pytest.raises(ValueError, match=said):
      prepare.from_files([f"{files}/*"], [str(held)])
  twice = prepare.from_files([f"{files}/0*"], [f"{files}/1*", f"{tmp_path}/link/11*"])
  assert [source.split for source in twice] == ["train"] * 10 + ["validation"] * 2


def test_output_is_no_input(tmp_path):
  (tmp_path / "a.txt").write_text("\n".join(map(str, range(100))))
  options = {"format": "lines", "name": "x", "tokenizer": "bytes", "percent": 20.0}
  find = lambda output: prepare.from_files([f"{tmp_path}/**/*", f"{tmp_path}/*"], (), output)
  one, two = tmp_path / "one", tmp_path / "two"
  first = prepare.prepare(one, find(one), **options)
  (one / "half").write_text("x")  # As a run leaves it that dies.
  (tmp_path / "link").symlink_to(one)
  assert prepare.prepare(one, find(one), **options) == first
  assert prepare.prepare(two, find(two), **options) == first  # The other corpus is none either.
  (tmp_path / "three").mkdir()
  (tmp_path / "three" / "lock").touch()  # All there is at first.
  assert [source.name for source in find(tmp_path / "three")] == ["a.txt"]
  with pytest.raises(
    FileNotFoundError, match=r"no file matches .*one/\*' that is not in a prepared"
  ):
    prepare.from_files([f"{one}/*"], (), two)


@pytest.mark.parametrize("workers", [1, 2])
def test_skipped_rows_are_counted_in_the_manifest_and_shown(files, tmp_path, workers):
  name = "05.json.gz"
  texts = [document(1), None, "a\0b", " ", document(2)]
  write_jsonl(files / name, texts)
  with pytest.raises(ValueError, match=rf"{name}, line 2: 'text' is null.*or --skip_bad leaves"):
    run(tmp_path / "out", files, workers=workers)
  assert list((tmp_path / "out").glob("units/*.json")) or workers == 2
  output = tmp_path / "skipped"
  manifest = run(output, files, skip_bad=True, workers=workers)
  none = {"ambiguous chats": 0, "unknown tokens": 0, "dropped characters": 0}
  assert manifest["counts"] == {"bad rows": 2, "blank documents": 1} | none
  source = next(source for source in manifest["sources"] if source["name"] == name)
  assert source["documents"] == 2
  assert source["counts"] == {"bad rows": 2, "blank documents": 1}
  assert source["first"]["bad rows"].startswith(f"{name}, line 2: 'text' is null")
  assert str(tmp_path) not in json.dumps(manifest)
  shown = prepare.table(manifest)
  assert f"\nbad rows: 2 left out; the first: {name}, line 2: 'text' is null" in shown
  assert "\nblank documents: 1 left out" in shown
  assert "ambiguous" not in shown

  assert run(tmp_path / "out", files, skip_bad=True) == manifest  # Goes on where it had ended.
  assert contents(tmp_path / "out") == contents(output)
  with pytest.raises(ValueError, match=rf"{name}, line 2: 'text' is null"):
    run(output, files)


def test_a_wrong_field_is_no_corpus_of_skipped_rows(files, tmp_path):
  said = r"(?s)no document of test is in the train split.*bad rows: 121 .*has no key 'body'"
  with pytest.raises(ValueError, match=said):
    run(tmp_path / "out", files, skip_bad=True, field="body")
  assert not (tmp_path / "out" / "manifest.json").exists()


def test_text_that_a_tokenizer_loses_is_counted_and_shown(tmp_path):
  import tokenizers as library

  write_jsonl(tmp_path / "a.json", ["b a bé é", "漢a漢", "漢", *"ab" * 20])
  model = library.Tokenizer(library.models.BPE({"a": 0, "b": 1, "é": 2, "</s>": 3}, []))
  model.save(str(tmp_path / "tokenizer.json"))
  options = {"tokenizer": str(tmp_path / "tokenizer.json"), "percent": 50.0}
  manifest = run(tmp_path / "dropped", tmp_path / "a.json", **options)
  assert manifest["counts"]["dropped characters"] == 3
  assert manifest["counts"]["blank documents"] == 1  # What is left of one of them is nothing.
  assert manifest["counts"]["unknown tokens"] == 0
  assert (
    r"dropped characters: 3 left out by the tokenizer; the first: a.json, line 2: '\u6f22'"
    in (prepare.table(manifest))
  )

  model = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 3}, "[UNK]"))
  model.pre_tokenizer = library.pre_tokenizers.Whitespace()
  model.save(str(tmp_path / "tokenizer.json"))
  manifest = run(tmp_path / "unknown", tmp_path / "a.json", **options)
  assert manifest["counts"]["unknown tokens"] == 3 + 1 + 1 + 20
  assert manifest["counts"]["dropped characters"] == 0
  assert "unknown tokens: 25 in place of what the tokenizer does not know; the first: a.json" in (
    prepare.table(manifest)
  )


def test_ambiguous_chats_are_kept_and_counted(tmp_path):
  chats = [f"### Human: {i}### Assistant: {i}" for i in range(20)]
  write_jsonl(tmp_path / "a.json", [*chats, "### Human: a### Assistant: b### Assistant: c"])
  manifest = run(tmp_path / "out", tmp_path / "a.json", format="guanaco", percent=50.0)
  assert manifest["counts"]["ambiguous chats"] == 1
  assert sum(split["documents"] for split in manifest["splits"].values()) == 21
  assert "\nambiguous chats: 1 trained on as their marks say; the first: a.json" in (
    prepare.table(manifest)
  )


def test_text_that_a_tokenizer_cannot_encode_is_named(tmp_path):
  import tokenizers as library

  write_jsonl(tmp_path / "a.json", [*"cdcdfghjklcdcdcdcd", "e"])
  model = library.Tokenizer(
    library.models.WordLevel({x: i for i, x in enumerate([*"cdfghjkl", "</s>"])})
  )
  model.save(str(tmp_path / "tokenizer.json"))
  options = {"tokenizer": str(tmp_path / "tokenizer.json"), "percent": 50.0}
  said = r"a.json, line 19: .*tokenizer.json cannot encode it .*: use another --tokenizer"
  with pytest.raises(ValueError, match=said):
    run(tmp_path / "out", tmp_path / "a.json", **options)
  manifest = run(tmp_path / "skipped", tmp_path / "a.json", skip_bad=True, **options)
  assert manifest["counts"]["bad rows"] == 1
  assert str(tmp_path) not in json.dumps(manifest)
  assert manifest["counts"]["dropped characters"] == 0


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (b"", "is empty"),
    ("{}".encode("utf-16"), "is UTF-16: convert it"),
    (b"PK\x03\x04", "is a ZIP archive"),
    (gzip.compress(b"{}", mtime=0)[:-9], "is cut short"),
    (b"no JSON", "line 1 is not JSON"),
    (b'{"body": "x"}', "line 1 has no key 'text'"),
  ],
)
def test_files_of_another_kind_are_named_before_anything_is_written(files, tmp_path, data, said):
  (files / "12.json.gz").write_bytes(data)
  with pytest.raises(ValueError, match=rf"12.json.gz,? {said}"):
    run(tmp_path / "out", files)
  assert not (tmp_path / "out").exists()


def test_the_script_knows_the_home_folder_and_skips_rows(files, tmp_path):
  write_jsonl(files / "05.json.gz", [document(1), None])
  flags = ["--format=c4", "--input=~/files/*", "--output=~/out", "--tokenizer=bytes"]
  flags += ["--validation_percent=20", "--workers=1"]
  result = script(*flags, HOME=str(tmp_path))
  assert (result.returncode, result.stdout) == (1, "")
  assert re.fullmatch(
    r"error: .*/05.json.gz, line 2: 'text' is null.* --skip_bad.*\n", result.stderr
  )
  result = script(*flags, "--skip_bad", HOME=str(tmp_path))
  assert result.returncode == 0, result.stderr
  assert "\nbad rows: 1 left out; the first: 05.json.gz, line 2: 'text' is null" in result.stdout
  assert shards.load(tmp_path / "out").manifest["counts"]["bad rows"] == 1
