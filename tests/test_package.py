"""The package as a user meets it: light to import, typed, with a README that runs."""

import json
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_import_is_light():
  heavy = ["flax", "orbax", "grain", "ml_collections", "matplotlib", "tensorflow", "torch"]
  program = f"import sys, eco_optax; print([m for m in {heavy} if m in sys.modules])"
  out = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  ).stdout
  assert out.strip() == "[]"


def test_readme_examples_run(capsys):
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
  assert blocks
  import jax

  with jax.numpy_dtype_promotion("standard"):
    for block in blocks:
      exec(compile(block, "README.md", "exec"), {})
  assert "loss" in capsys.readouterr().out


def test_readmes_commands_are_the_makefiles():
  readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
  for target in re.findall(r"^make (\w+)", readme, re.MULTILINE):
    assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
  assert "make test" in readme
  assert "make pretrain" in readme
  assert re.search(r"^make .*\btest\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_readmes_table_is_the_studys():
  from experiments.studies import claims, sweep

  rows = sweep.read(ROOT / "results" / "claims" / "runs.jsonl")
  assert claims.summary(rows).strip() in (ROOT / "README.md").read_text()
  assert claims.table(rows) == (ROOT / "results" / "claims" / "table.md").read_text()


def test_readmes_other_tables_are_the_studies():
  from eco_optax.training import compile as compile_lib
  from experiments.studies import families, sweep

  load = lambda path: json.loads(path.read_text())
  folder = ROOT / "results"
  tables = {
    "families": families.table(sweep.read(folder / "families" / "runs.jsonl")),
    "compile": compile_lib.table(
      {
        config: tuple(
          load(folder / "compile" / f"{config}_{method}.json") for method in ("eco_sr", "mw_sr")
        )
        for config in compile_lib.TOPOLOGIES
      }
    ),
  }
  for name, table in tables.items():
    assert table == (folder / name / "table.md").read_text()
    assert table.strip() in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  out = tmp_path_factory.mktemp("wheel")
  subprocess.run(
    [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT],
    check=True,
    capture_output=True,
  )
  return next(out.glob("*.whl"))


def test_wheel_holds_the_library_and_its_types(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert "eco_optax/py.typed" in names
  assert "eco_optax/training/loop.py" in names
  assert not any(name.startswith(("tests/", "configs/", "scripts/")) for name in names)


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
  zipfile.ZipFile(wheel).extractall(tmp_path / "site")
  program = (
    f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r});"
    "import eco_optax as eco, jax.numpy as jnp;"
    "print(eco.__file__); print(eco.quantize(jnp.ones((4, 2)), eco.FP8).qvalue.dtype)"
  )
  out = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
  ).stdout.split()
  assert str(tmp_path) in out[0]
  assert out[1] == "float8_e4m3fn"
