"""One job per folder, plain errors, and an end when asked."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from absl import flags

from eco_optax.training import jobs

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def test_the_second_job_in_a_folder_is_refused(tmp_path):
  holder = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "import pathlib, sys, time\nfrom eco_optax.training import jobs\n"
      "with jobs.only_one(pathlib.Path(sys.argv[1])):\n"
      "  print('held', flush=True)\n  time.sleep(60)",
      str(tmp_path),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  assert holder.stdout.readline() == "held\n"
  with (
    pytest.raises(BlockingIOError, match=f"is in use by process {holder.pid} on .*another folder"),
    jobs.only_one(tmp_path),
  ):
    pass
  # However it dies, the folder is free again.
  holder.kill()
  holder.wait()
  holder.stdout.close()
  with jobs.only_one(tmp_path):
    assert str(os.getpid()) in (tmp_path / "lock").read_text()
  with jobs.only_one(tmp_path):
    pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(OSError, match=r"cannot write in .*file/run.*another folder"),
    jobs.only_one(tmp_path / "file" / "run"),
  ):
    pass


@pytest.mark.parametrize("error", [ImportError, OSError, ValueError, FloatingPointError])
def test_what_users_can_mend_is_one_line(error):
  with pytest.raises(SystemExit) as stopped, jobs.plain_errors():
    raise error("do this")
  assert stopped.value.code == "error: do this"


def test_our_own_mistakes_keep_their_traceback():
  with pytest.raises(AssertionError), jobs.plain_errors():
    raise AssertionError


def test_sigterm_is_a_question_that_a_run_answers():
  before = signal.getsignal(signal.SIGTERM)
  with jobs.until_sigterm() as is_asked_to_stop:
    assert not is_asked_to_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert is_asked_to_stop(2)
  assert signal.getsignal(signal.SIGTERM) is before


def test_home_folder_in_path_flags(monkeypatch):
  monkeypatch.setenv("HOME", "/home/x")
  values = flags.FlagValues()
  one = jobs.define_path("output", "~/out", "", flag_values=values)
  many = jobs.define_paths("input", "", flag_values=values)
  values(["script", "--input=~", "--input=a~b/~/c", "--input=~/*.txt"])
  assert one.value == "/home/x/out"
  assert many.value == ["/home/x", "a~b/~/c", "/home/x/*.txt"]
  with pytest.raises(flags.IllegalFlagValueError, match=r"~nobody9/x is in the home folder of no"):
    values(["script", "--output=~nobody9/x"])


@pytest.mark.filterwarnings("ignore:the load_module")
def test_home_folder_in_configs_and_their_overrides(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "c.py").write_text(
    "import ml_collections\n"
    "def get_config():\n  return ml_collections.ConfigDict({'data': {'path': '', 'note': ''}})\n"
  )
  arguments = ["--home=~/c.py", "--home.data.path=~/d", "--home.data.note=a=~/b"]
  monkeypatch.setattr(sys, "argv", ["script", *arguments])
  config = jobs.define_config("home", None)
  try:
    flags.FLAGS(sys.argv)
    assert config.value.data.to_dict() == {"path": str(tmp_path / "d"), "note": "a=~/b"}
  finally:
    for name in [name for name in flags.FLAGS if name == "home" or name.startswith("home.")]:
      delattr(flags.FLAGS, name)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_path_flag_of_the_scripts_knows_the_home_folder(script):
  plain = re.findall(r'flags\.DEFINE_(?:multi_)?string\(\s*"(\w+)"', script.read_text())
  known = {"field", "separator", "prompt", "question", "topology", "only", "coordinator_address"}
  assert set(plain) <= known, "a path is defined by jobs.define_path; add any other flag to `known`"
