"""Metrics on disk, which a run that died goes on with, and the clock."""

import json
import pathlib
import struct

import pytest
from tensorboardX.proto import event_pb2

from eco_optax.training import metrics, report


@pytest.fixture
def log(tmp_path):
  path = tmp_path / "metrics.jsonl"
  for step in (10, 20, 30):
    metrics.append_metrics(path, step, loss=step / 10)
  return path


def test_a_command_can_be_pasted_at_the_root(monkeypatch, tmp_path):
  root = pathlib.Path(__file__).parents[2]
  script = str(root / "scripts" / "train.py")
  monkeypatch.chdir(tmp_path)
  assert report.command(["/usr/bin/python3", script, "--config.steps=3", "--workdir=my runs"]) == (
    "python scripts/train.py --config.steps=3 '--workdir=my runs'"
  )
  assert report.command(["python3", "-c", "import sys; print(1)", "2 3"]) == (
    "python -c 'import sys; print(1)' '2 3'"
  )
  monkeypatch.chdir(root / "scripts")
  assert report.command(["python3", "-u", "train.py"]) == "python -u scripts/train.py"


def test_rows_come_back(log):
  metrics.append_metrics(log, 40, loss=float("nan"), skipped=1)
  rows = metrics.read_metrics(log)
  assert rows[0] == {"step": 10, "loss": 1.0}
  assert rows[-1] == {"step": 40, "loss": None, "skipped": 1.0}
  for line in log.read_text().splitlines():
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_that_a_dying_process_left_is_no_row(log):
  with log.open("a") as file:
    file.write('{"step": 40, "lo')
  assert [row["step"] for row in metrics.read_metrics(log)] == [10, 20, 30]
  metrics.cut_metrics(log, 40)
  metrics.append_metrics(log, 40, loss=4.0)
  assert [row["step"] for row in metrics.read_metrics(log)] == [10, 20, 30, 40]


def test_a_run_that_goes_back_takes_its_rows_back(log):
  metrics.cut_metrics(log, 20)
  metrics.append_metrics(log, 30, loss=5.0)
  rows = metrics.read_metrics(log)
  assert rows == [{"step": s, "loss": x} for s, x in ((10, 1.0), (20, 2.0), (30, 5.0))]
  metrics.cut_metrics(log.with_name("none.jsonl"), 20)  # A new run has nothing to take back.


def test_a_file_is_whole_at_every_moment(tmp_path):
  path = tmp_path / "run.json"
  metrics.write_whole(path, "old")
  with pytest.raises(TypeError):
    metrics.write_whole(path, None)
  assert path.read_text() == "old"


def events(path):
  """Events of a TensorBoard file: records of length, checksum, message, checksum."""
  content, at = path.read_bytes(), 0
  while at < len(content):
    (length,) = struct.unpack_from("<Q", content, at)
    yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
    at += 12 + length + 4


def test_tensorboard_follows_the_metrics_file(log, tmp_path):
  folder = tmp_path / "tensorboard"
  with metrics.tensorboard(folder, log) as write:
    write(40, loss=float("nan"))
  metrics.cut_metrics(log, 20)  # The run died and goes on from step 20.
  with metrics.tensorboard(folder, log) as write:
    write(30, loss=5.0)
  (path,) = folder.glob("*.from-20")
  found = list(events(path))
  # As TensorBoard has it: a start at step 0 hides all that older files hold from there on.
  assert [e.step for e in found if e.session_log.status == event_pb2.SessionLog.START] == [0]
  scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
  assert scalars == [(10, "loss", 1.0), (20, "loss", 2.0), (30, "loss", 5.0)]


def test_the_clock_goes_on_where_it_was_saved(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = metrics.Clock(tokens_per_step=50)
  clock.resume(1)
  now[0] += 4
  clock.pause(3)
  now[0] += 10  # An evaluation, which is not training.
  assert clock.tokens_per_second == 50 * 2 / 4
  assert clock.seconds == 14

  saved, now[0] = clock.saved(), 1000.0
  other = metrics.Clock(50, saved)
  other.resume(3)
  now[0] += 1
  other.pause(5)
  assert other.tokens_per_second == 50 * 4 / 5
  assert other.seconds == 15
