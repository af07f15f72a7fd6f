"""Every script ends in one plain line where its user has made a mistake."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))

# A script, its flags, and what the line says.
MISTAKES = [
  *((script, ["--no_such_flag"], "Unknown command line flag 'no_such_flag'") for script in SCRIPTS),
  *(
    (script, ["word"], "unexpected word")
    for script in SCRIPTS
    if script not in ("export.py", "prepare_data.py")
  ),
  ("benchmark.py", ["--backend=abacus"], "should be one of <cpu|cuda|tpu-aot|cuda-aot>"),
  ("benchmark.py", ["--backend=cuda"], "--backend=cuda, but JAX runs on cpu"),
  ("benchmark.py", ["--size=1000"], "--size=1000 is not a multiple of 4096"),
  ("benchmark.py", ["--backend=tpu-aot", "--topology=v5q:2x2"], "no TPU topology 'v5q:2x2'"),
  ("compile.py", ["--topology=v5q:2x2"], "no TPU topology 'v5q:2x2': use v4:2x2x1"),
  ("compile.py", ["--topology=h100:many"], "no GPU topology 'h100:many': use h100:1"),
  ("compile.py", ["--config=configs/llama.py"], "configs/llama.py"),
  ("compile.py", ["--config.batch_size=1"], "accumulation 4 does not divide batch_size 1"),
  ("evaluate.py", ["--workdir=nowhere"], "nowhere has no run.json"),
  ("evaluate.py", ["--tokens=some"], "flag --tokens=some"),
  ("export.py", ["--workdir=nowhere", "--output=out"], "nowhere has no run.json"),
  ("export.py", [], "Flag --output must have a value"),
  ("finetune.py", ["--config.steps=0"], "config: steps must be above 0, got 0"),
  ("finetune.py", ["--config.init_from=no.gguf"], "there is no no.gguf: name a GGUF file"),
  ("generate.py", ["--workdir=nowhere"], "nowhere has no run.json"),
  ("generate.py", ["--tokens=0"], "flag --tokens=0"),
  ("faults.py", ["--only=fire"], "--only: no fault fire; use kill -9, 20 times"),
  ("prepare_data.py", ["--output=out", "--input=x"], "--input needs --format"),
  ("prepare_data.py", ["--output=out", "--format=c4", "--input=no.gz"], "no.gz"),
  ("prepare_data.py", ["--output=out", "--corpus=stdlib", "--chat_template"], "is for chats, of"),
  ("reproduce.py", ["--study=everything"], "should be one of <methods|claims"),
  ("reproduce.py", ["--config=configs/none.py"], "configs/none.py"),
  ("summarize.py", ["--workdir=nowhere"], "nowhere has no run.json"),
  ("theory.py", ["--study=everything"], "should be one of <all|stationary"),
  ("train.py", ["--config=configs/none.py"], "configs/none.py"),
  ("train.py", ["--config.optimizer.learning_rat=1"], 'Did you mean "learning_rate"'),
  ("train.py", ["--config.steps=many"], "config.steps=many"),
  ("train.py", ["--config.method=eco", "--dry_run"], "method must be one of bf16_mw"),
  ("train.py", ["--config.data.path=nowhere", "--workdir=out"], "nowhere"),
]

# Imports what all scripts need, and runs each in a fork of itself.
DRIVER = """
import contextlib, io, json, os, runpy, sys
import jax, matplotlib, orbax.checkpoint
from eco_optax.training import evaluation, export, jobs, loop
sys.path.insert(0, sys.argv[2])
from experiments import benchmark, faults, results
root, folder = sys.argv[2], sys.argv[3]
for i, (script, flags, _) in enumerate(json.loads(sys.argv[1])):
  if child := os.fork():
    os.waitpid(child, 0)
    continue
  out = os.open(f"{folder}/{i}", os.O_CREAT | os.O_WRONLY)
  os.dup2(out, 1)
  os.dup2(out, 2)
  sys.argv = [f"{root}/scripts/{script}", *flags]
  try:
    runpy.run_path(sys.argv[0], run_name="__main__")
  except SystemExit as end:
    print(f"exit {end.code}", flush=True)
  except BaseException as error:
    print(f"traceback {error!r}", flush=True)
  os._exit(0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
  """The lines of each mistake, by its number."""
  pytest.importorskip("libtpu")
  folder = tmp_path_factory.mktemp("mistakes")
  subprocess.run(
    [sys.executable, "-c", DRIVER, json.dumps(MISTAKES), str(ROOT), str(folder)],
    cwd=folder,
    check=True,
    capture_output=True,
    timeout=120,
  )
  return [(folder / str(i)).read_text().splitlines() for i in range(len(MISTAKES))]


@pytest.mark.parametrize(
  "i", range(len(MISTAKES)), ids=lambda i: " ".join([MISTAKES[i][0], *MISTAKES[i][1]])
)
def test_a_mistake_is_one_plain_line(i, said):
  *before, line = said[i]
  assert line.startswith("exit error: ")
  assert MISTAKES[i][2] in line
  # libtpu writes what it likes; nothing else comes before the line.
  assert not before or MISTAKES[i][0] in ("benchmark.py", "compile.py")
