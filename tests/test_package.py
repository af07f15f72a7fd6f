"""The package as a user meets it: light to import, typed, with a README that runs."""

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


def test_readmes_tables_are_the_results():
  from experiments import benchmark
  from experiments.studies import claims, sweep

  readme = (ROOT / "README.md").read_text()
  rows = sweep.read(ROOT / "results" / "claims" / "runs.jsonl")
  assert claims.short_summary(rows).strip() in readme
  assert claims.table(rows) == (ROOT / "results" / "claims" / "table.md").read_text()
  assert benchmark.short_table(ROOT / "results").strip() in readme


def test_readmes_choices_are_the_results():
  """The losses and bytes of the table of choices are the study's."""
  from experiments import figures
  from experiments.studies import claims, sweep

  readme = (ROOT / "README.md").read_text()
  rows = sweep.read(ROOT / "results" / "claims" / "runs.jsonl")
  for method, format in (
    ("ECO + SR, schedule-aware", "FP8"),
    ("ECO + SR, FP8 moments", "FP8"),
    ("int8 residual + RTN, FP8 moments", "FP8"),
    ("int8 residual + RTN, FP8 moments", "INT4"),
    ("ECO + SR, schedule-aware", "INT4"),
  ):
    own = claims.names(rows, method, format)
    gap, error, seeds = sweep.mean_and_error(
      figures.paired(rows, own, claims.names(rows, claims.BASELINE, format))
    )
    loss = f"{gap:+.3f} ± {error:.3f}" if seeds > 1 else f"{gap:+.3f}, one seed"
    assert f"| {sweep.used_bytes(rows, own)} | {loss} |" in readme


def test_readme_is_short_and_its_links_exist():
  readme = (ROOT / "README.md").read_text()
  assert len(readme.splitlines()) <= 160
  links = re.findall(r"\]\(([^)#]+)", readme)
  assert [x for x in links if "://" not in x and not (ROOT / x).exists()] == []


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
