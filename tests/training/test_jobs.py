"""One job per folder, plain errors, and an end when asked."""

import os
import signal
import subprocess
import sys

import pytest

from eco_optax.training import jobs


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
