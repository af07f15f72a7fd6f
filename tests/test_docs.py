"""The documentation says what the code does: its examples run, its names and messages exist."""

import ast
import configparser
import doctest
import importlib
import json
import pathlib
import re
import runpy

import optax.contrib
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [page.relative_to(DOCS).as_posix() for page in sorted(DOCS.glob("[!_]*.md"))]


def blocks(page, language):
  return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_examples_run(page):
  if page == "carry_back.md" and not hasattr(optax.contrib, "MuonDimensionNumbers"):
    pytest.skip("Muon for stacks of matrices came with Optax 0.2.6")
  code = blocks(page, "python")
  # Each is a session whose output is checked: nothing stands there untried.
  assert all(block.startswith(">>> ") for block in code)
  test = doctest.DocTestParser().get_doctest("\n".join(code), {}, page, None, 0)
  flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  result = doctest.DocTestRunner(optionflags=flags).run(test)
  assert result.attempted
  assert not result.failed


def test_every_public_name_has_an_entry():
  names = runpy.run_path(str(DOCS / "conf.py"))["public_names"]()
  assert {"eco_optax.adamw", "eco_optax.FP8", "eco_optax.theory.simulate"} < names
  entries = set()
  for page in (DOCS / "api").glob("*.rst"):
    text = page.read_text()
    entries |= {f"eco_optax.{name}" for name in re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.M)}
    for module in re.findall(r"^\.\. automodule:: (\S+)\n   :members:", text, re.M):
      entries |= {name for name in names if name.startswith(f"{module}.")}
  assert names - entries == set()


def texts(tree):
  """The strings of a program, with … for what is put in; not its docstrings."""
  documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  for node in ast.walk(tree):
    if isinstance(node, ast.JoinedStr):
      yield "".join(
        getattr(part, "value", "") if isinstance(part, ast.Constant) else "…"
        for part in node.values
      )
    elif isinstance(node, ast.Constant) and id(node) not in documentation:
      yield str(node.value)


def compiled(results):
  from eco_optax.training import compile as compile_lib

  load = lambda name: json.loads((results / "compile" / f"{name}.json").read_text())
  return compile_lib.table(
    {
      config: (load(f"{config}_eco_sr"), load(f"{config}_mw_sr"))
      for config in compile_lib.TOPOLOGIES
    }
  )


@pytest.mark.parametrize(
  ("page", "name"),
  [
    ("pretraining.md", "compile"),
    ("pretraining.md", "families"),
    ("results.md", "scale"),
    ("memory.md", "storage"),
    ("memory.md", "peaks"),
    ("rounding.md", "nearest"),
    ("optimizers.md", "optimizers"),
    ("optimizers.md", "outliers"),
    ("performance.md", "benchmark"),
  ],
)
def test_tables_of_pages_are_the_results(page, name):
  from experiments import benchmark, peaks
  from experiments.studies import sweep

  results = ROOT / "results"
  if name == "compile":
    table = compiled(results)
  elif name == "benchmark":
    table = benchmark.table(results)
  elif name == "peaks":
    table = peaks.table(peaks.read(results / name))
  else:
    study = importlib.import_module(f"experiments.studies.{name}")
    table = study.table(sweep.read(results / name / "runs.jsonl"))
  assert table == (results / name / "table.md").read_text()
  assert table.strip() in (DOCS / page).read_text()


@pytest.mark.parametrize(
  ("config", "devices", "step", "report"),
  [
    ("llama_800m", "16 × TPU v5p", "ordinary", ""),
    ("llama_800m", "16 × TPU v5p", "released, exact clip", "_release"),
    ("llama_800m", "16 × TPU v5p", "released, exact clip, gradients kept", "_release_kept"),
    ("llama_800m", "16 × TPU v5p", "released, clip by layer", "_release_layer"),
    ("gemma3_1b", "16 × TPU v6e", "ordinary", ""),
    ("gemma3_1b", "16 × TPU v6e", "released, clip by layer", "_release_layer"),
  ],
)
def test_traffic_between_devices_is_that_of_the_reports(config, devices, step, report):
  found = json.loads((ROOT / f"results/compile/{config}_eco_sr{report}.json").read_text())
  kinds = found["collectives_per_device"].values()
  traffic = sum(entry["bytes"] for dtypes in kinds for entry in dtypes.values()) / 1e9
  peak = found["bytes_per_device"]["peak"] / 2**30
  row = f"| {config} | {devices} | {step} | {traffic:.1f} GB | {peak:.2f} GiB |"
  assert row in (DOCS / "pretraining.md").read_text()


def test_what_layouts_of_kernels_copy_is_that_of_the_compiled_steps():
  found = json.loads((ROOT / "results/layouts.json").read_text())
  rows, columns = (found["h100:1"]["rows"][name]["copied"] for name in ("(out, in)", "(in, out)"))
  copied = f"copies {rows / 2**20:.0f} MiB, and {columns / 2**20:.0f} MiB with kernels"
  assert copied in (DOCS / "performance.md").read_text()
  by_way = [found["v5p:2x2x1"]["rows"][name] for name in ("(out, in)", "(in, out)")]
  for key in ("bytes", "copied", "temporaries"):
    assert f"{by_way[0][key] / 2**20:.0f}" == f"{by_way[1][key] / 2**20:.0f}"


def test_the_page_says_what_scales_do_to_rounding_to_nearest():
  from experiments.studies import four_bits, sweep

  results = ROOT / "results" / "four_bits"
  rows = sweep.read(results / "runs.jsonl")
  assert four_bits.table(rows) == (results / "table.md").read_text()
  assert four_bits.scales_table(rows).strip() in (DOCS / "rounding.md").read_text()


def test_the_page_says_how_often_the_adviser_was_right():
  from experiments.studies import advice

  results = ROOT / "results"
  verdicts = json.loads((results / "advice" / "advice.json").read_text())["verdicts"]
  rows = advice.held(results, verdicts)
  table = advice.table(rows)
  assert table == (results / "advice" / "table.md").read_text()
  page = (DOCS / "rounding.md").read_text()
  assert table.split("\n\n")[1].strip() in page
  safe = sum(row["lost"] <= advice.TOLERANCE for row in rows)
  assert f"{safe} of the {len(rows)} are" in page.replace("\n", " ")


def test_pages_have_the_summary_of_the_claims():
  from experiments.studies import claims, sweep

  rows = sweep.read(ROOT / "results" / "claims" / "runs.jsonl")
  assert claims.summary(rows).strip() in (DOCS / "results.md").read_text()
  assert claims.short_summary(rows).strip() in (DOCS / "index.md").read_text()


def test_pages_open_with_their_use_and_show_pictures_that_exist():
  pictures = {}
  for page in PAGES:
    text = (DOCS / page).read_text()
    assert page == "index.md" or "\n\nAfter this page you " in text[:200], page
    pictures[page] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [x for x in pictures[page] if not (DOCS / x).exists()] == []
  assert pictures["index.md"]
  assert len({x for own in pictures.values() for x in own}) >= 10


def test_quoted_messages_are_the_codes():
  sources = (ROOT / "eco_optax").rglob("*.py")
  found = [text for path in sources for text in texts(ast.parse(path.read_text()))]
  quoted = [block.strip() for block in blocks("troubleshooting.md", "text")]
  assert len(quoted) == len(set(quoted)) > 40
  assert [message for message in quoted if not any(message in text for text in found)] == []


def test_the_map_of_the_code_names_files_that_exist():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  named = set(re.findall(r"[a-z_0-9]+\.(?:py|sh)\b", re.search(r"```\n(.*?)```", text, re.S)[1]))
  assert len(named) > 50
  rooms = [ROOT / room for room in ("eco_optax", "experiments", "scripts", "tests")]
  assert named - {path.name for room in rooms for path in room.rglob("*.*")} == set()


def test_the_citation_is_of_this_version():
  config = configparser.ConfigParser()
  config.read(ROOT / "setup.cfg")
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {config['metadata']['version']}\n" in citation
  assert f"\nlicense: {config['metadata']['license']}\n" in citation
