"""Injects each fault into a real small run and checks how the run ends.

A run is a process of its own, so that it can be killed. It reads text prepared from files in a
user's format. Its end is compared with the end of an undisturbed run: checksums of codes, scales,
moments and counters, and every metric except times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import inspect
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from eco_optax.training import metrics
from eco_optax.training.data import corpus, shards

_PREPARE = """
import json
import sys
from eco_optax.training import jobs
from eco_optax.training.data import prepare
with jobs.plain_errors():
  prepare.prepare(
    sys.argv[2],
    prepare.from_files([sys.argv[1]]),
    format="c4",
    name="a test",
    percent=10.0,
    vocabulary=512,
  )
"""

_RUN = """
import json
import os
import sys
from eco_optax.training import config, jobs, loop

sys.path.insert(0, sys.argv[5])
from experiments import faults
faults.poison(sys.argv[3])
changed = config.defaults()
changed.update_from_flattened_dict(json.loads(sys.argv[1]))
if sys.argv[4]:
  os.seteuid(int(sys.argv[4]))
with jobs.plain_errors():
  loop.train(changed, sys.argv[2])
"""

# An undisturbed run takes less than a minute, also where tests share two cores. A process that
# needs minutes is taken for hung; a machine ten times slower needs more.
_RUN_SECONDS, _WAIT_SECONDS, _STOP_SECONDS = 600, 300, 120

# Runs import this package from here, since it is not installed.
_ROOT = str(pathlib.Path(__file__).parents[1])

SMALL: dict[str, Any] = {
  "model.layers": 2,
  "model.width": 32,
  "model.heads": 2,
  "model.mlp_width": 64,
  "model.vocabulary": 512,
  "batch_size": 4,
  "length": 32,
  "steps": 240,
  "log_every": 5,
  "evaluate_every": 50,
  "evaluate_batches": 4,
  "optimizer.learning_rate": 1e-2,
  "checkpoint.every": 40,
  "checkpoint.keep": 3,
}

# Changes that make a run one with gradient release, and with all that this keeps in few bytes.
RELEASED: dict[str, Any] = {
  "release": True,
  "kept_format": "FP8_TOKEN",
  "optimizer__clip": "previous",
  "accumulation": 2,
  "model__quantized": "all",
  "moments__mu": "float8_e4m3fn",
  "moments__nu": "factored",
}


@dataclasses.dataclass(frozen=True)
class Bench:
  """Where faults are injected."""

  folder: pathlib.Path  # Of all runs and their text.
  seed: int = 0
  show: Callable[[str], None] = print

  @property
  def raw(self) -> pathlib.Path:
    """A file of documents in C4's format: a part of the standard library."""
    path = self.folder / "documents.json.gz"
    if not path.exists():
      path.parent.mkdir(parents=True, exist_ok=True)
      documents = corpus.standard_library().train[:40]
      with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": x.decode()}) + "\n" for x in documents)
    return path

  @property
  def text(self) -> pathlib.Path:
    """The prepared corpus that runs read."""
    path = self.folder / "text"
    if not (path / shards.MANIFEST).exists():
      code, output = self.prepare(self.raw, path)
      assert code == 0, output
    return path

  def prepare(self, raw: pathlib.Path, output: pathlib.Path) -> tuple[int, str]:
    """Exit code and output of a preparation."""
    done = subprocess.run(
      [sys.executable, "-c", _PREPARE, str(raw), str(output)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=False,
    )
    return done.returncode, done.stdout

  def start(
    self,
    name: str,
    devices: int = 1,
    poison: str = "",
    user: str = "",
    prepare: Callable[[], None] | None = None,
    **changes: Any,
  ) -> subprocess.Popen:
    """Begins or continues the run of this name.

    Args:
      name: of the run's folder.
      devices: number of simulated ones.
      poison: see `poison`.
      user: number of the one it runs as; nothing is the same.
      prepare: called in the new process first.
      **changes: to `SMALL`, with "__" for dots.

    Returns:
      The process, its output a pipe.
    """
    own = {key.replace("__", "."): value for key, value in changes.items()}
    config = SMALL | {"data.path": str(self.text), "mesh.data": devices, "mesh.fsdp": 1} | own
    own_flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_max_isa=AVX"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {own_flags}"  # Of one set twice the last counts.
    return subprocess.Popen(
      [
        sys.executable,
        "-c",
        _RUN,
        json.dumps(config),
        str(self.folder / name),
        poison,
        user,
        _ROOT,
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      preexec_fn=prepare,
      env=os.environ
      | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
      },
    )

  def run(self, name: str, **kwargs: Any) -> tuple[int, str]:
    """Exit code and output of a run that is left to itself."""
    process = self.start(name, **kwargs)
    output, _ = process.communicate(timeout=_RUN_SECONDS)
    return process.returncode, output

  def finish(self, name: str, **kwargs: Any) -> str:
    """Output of a run that has to come to its end."""
    code, output = self.run(name, **kwargs)
    if code:
      raise AssertionError(f"{name} ended with {code}:\n{output[-3000:]}")
    return output

  def steps(self, name: str) -> list[int]:
    """Steps of the finished checkpoints of a run."""
    found = (self.folder / name / "checkpoints").glob("[0-9]*/commit_success.txt")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())

  def newest(self, name: str) -> pathlib.Path:
    """Folder of a run's newest checkpoint."""
    return self.folder / name / "checkpoints" / str(self.steps(name)[-1])

  def end(self, name: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Checksums of a run's last state, and its metrics without what the clock says."""
    record = json.loads((self.newest(name) / "record" / "metadata").read_text())
    rows = metrics.read_metrics(self.folder / name / "metrics.jsonl")
    keep = lambda row: {key: value for key, value in row.items() if key not in metrics.TIMING}
    return record["checksums"] | {"step": record["step"]}, [keep(row) for row in rows]

  def copy(self, name: str, of: str) -> None:
    """Copies a run's folder to another name."""
    shutil.rmtree(self.folder / name, ignore_errors=True)
    shutil.copytree(self.folder / of, self.folder / name)

  def check_same_end(self, name: str, as_of: str = "undisturbed") -> str:
    """Raises `AssertionError` if two runs did not end bit for bit alike."""
    (state, rows), (wanted, wanted_rows) = self.end(name), self.end(as_of)
    if state != wanted:
      wrong = [path for path in wanted if state.get(path) != wanted[path]]
      raise AssertionError(f"{name} ended with other values of {wrong}")
    if rows != wanted_rows:
      first = next((a, b) for a, b in zip(rows, wanted_rows, strict=False) if a != b)
      raise AssertionError(f"{name} has other metrics: {first[0]} for {first[1]}")
    return "ended bit for bit as the undisturbed run"


def poison(step: str) -> None:
  """Makes the batch of this step (a number as text, or nothing) one whose loss is not finite.

  It does so by the weights of its targets, so of a run to be compared 0 poisons none.
  """
  if not step:
    return
  from eco_optax.training.data import pipeline

  honest = pipeline.batches

  def batches(*args: Any, **kwargs: Any) -> Iterator[pipeline.Batch]:
    import jax.numpy as jnp

    start = inspect.signature(honest).bind(*args, **kwargs).arguments["start"]

    for number, batch in enumerate(honest(*args, **kwargs), start):
      ones = jnp.ones_like(batch.tokens[:, 1:], jnp.float32)
      yield batch._replace(weights=ones * (jnp.nan if number + 1 == int(step) else 1.0))

  pipeline.batches = batches


def until(
  condition: Callable[[], bool], process: subprocess.Popen, limit: float = _WAIT_SECONDS
) -> bool:
  """Waits for a condition; False if the process ended before."""
  stop = time.monotonic() + limit
  while not condition():
    if process.poll() is not None or time.monotonic() > stop:
      return False
    time.sleep(0.002)  # A save takes tens of milliseconds, and kills have to hit it.
  return True


def _until_step(bench: Bench, name: str, step: int, process: subprocess.Popen) -> bool:
  """Waits until a run has come so far by its metrics."""
  path = bench.folder / name / "metrics.jsonl"

  def is_there() -> bool:
    rows = metrics.read_metrics(path) if path.exists() else []
    return (rows[-1]["step"] if rows else 0) >= step

  return until(is_there, process)


def _is_saving(bench: Bench, name: str) -> bool:
  """Whether a checkpoint is being written."""
  folder = bench.folder / name / "checkpoints"
  with contextlib.suppress(FileNotFoundError):  # Files renamed or removed meanwhile.
    return any(
      path.is_dir() and "damaged" not in path.name and not (path / "commit_success.txt").exists()
      for path in folder.iterdir()
    )
  return False


def kill(bench: Bench, name: str, times: int, **kwargs: Any) -> tuple[int, int]:
  """Kills a run with SIGKILL at random moments and continues it, then lets it come to its end.

  Args:
    bench: see `Bench`.
    name: of the run.
    times: how often; every second time as soon as a checkpoint is being written.
    **kwargs: see `Bench.start`.

  Returns:
    How often it was killed, and how often during a save.
  """
  draw = random.Random(f"{bench.seed} {name}")
  steps = kwargs.get("steps", SMALL["steps"])
  killed = during = 0
  for i, step in enumerate(sorted(draw.choices(range(steps), k=times))):
    process = bench.start(name, **kwargs)
    reached = _until_step(bench, name, step, process)
    if i % 2:
      reached = reached and until(lambda: _is_saving(bench, name), process)
    else:
      time.sleep(draw.random() * 0.2)  # Anywhere between two log lines.
    saving = _is_saving(bench, name)
    process.kill()
    output, _ = process.communicate()
    if process.returncode == -signal.SIGKILL:
      killed, during = killed + 1, during + saving
    elif process.returncode:
      raise AssertionError(f"{name} ended with {process.returncode}:\n{output[-3000:]}")
  bench.finish(name, **kwargs)
  return killed, during


def _random_kills(bench: Bench) -> str:
  killed, during = kill(bench, "kills", 20)
  return f"killed {killed} times, {during} of them during a save; {bench.check_same_end('kills')}"


def _kills_under_release(bench: Bench) -> str:
  bench.finish("released", **RELEASED)
  killed, during = kill(bench, "released-kills", 10, **RELEASED)
  said = bench.check_same_end("released-kills", "released")
  return f"killed {killed} times, {during} of them during a save; {said}"


def _sigterm(bench: Bench) -> str:
  process = bench.start("sigterm")
  _until_step(bench, "sigterm", 45, process)
  process.terminate()
  output, _ = process.communicate(timeout=_STOP_SECONDS)
  assert process.returncode == 0, output
  line = next(line for line in output.splitlines() if "asked to stop" in line)
  bench.finish("sigterm")
  return f"exit code 0, “{line}”; continued, {bench.check_same_end('sigterm')}"


def _stopped(bench: Bench) -> None:
  """A run that was stopped on its way, to be copied and damaged."""
  if not bench.steps("stopped"):
    process = bench.start("stopped")
    _until_step(bench, "stopped", 100, process)
    process.terminate()
    process.communicate(timeout=_STOP_SECONDS)


def data_files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
  """The files that hold a checkpoint's arrays: all, because some may be ones that nobody reads."""
  return sorted(path for path in checkpoint.rglob("d/*") if path.is_file())


def cut_in_half(path: pathlib.Path) -> None:
  """Truncates a file to its first half."""
  os.truncate(path, path.stat().st_size // 2)


def _each_data_file(damage: Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], None]:
  """Damages each of a checkpoint's data files."""

  def change(checkpoint: pathlib.Path) -> None:
    for path in data_files(checkpoint):
      damage(path)

  return change


def _damaged(bench: Bench, name: str, damage: Callable[[pathlib.Path], None]) -> str:
  """Damages the newest checkpoint of a copy, which has to be named and survived."""
  _stopped(bench)
  bench.copy(name, "stopped")
  steps = bench.steps(name)
  damage(bench.newest(name))
  output = bench.finish(name)
  warning = next((x for x in output.splitlines() if "is damaged and left out" in x), None)
  assert f"from step {steps[-2]}" in output, output
  named = "named in a warning, " if warning and f"/{steps[-1]} " in warning else ""
  return f"{named}went on from the one before; {bench.check_same_end(name)}"


def _truncated_files(bench: Bench) -> str:
  return _damaged(bench, "truncated", _each_data_file(cut_in_half))


def flip_bits(path: pathlib.Path, draw: random.Random, times: int) -> None:
  """Flips bits of a file."""
  content = bytearray(path.read_bytes())
  for _ in range(times):
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
  path.write_bytes(content)


def _flipped_bits(bench: Bench) -> str:
  draw = random.Random(bench.seed)
  return _damaged(bench, "flipped", _each_data_file(lambda x: flip_bits(x, draw, 10)))


def _changed_record(bench: Bench) -> str:
  def change(checkpoint: pathlib.Path) -> None:
    path = checkpoint / "record" / "metadata"
    path.write_text(path.read_text().replace('"batch_size": 4', '"batch_size": 8', 1))

  return _damaged(bench, "record", change)


def _link_out_of_folder(bench: Bench) -> str:
  def change(checkpoint: pathlib.Path) -> None:
    path = data_files(checkpoint)[0]
    moved = bench.folder / "elsewhere"
    shutil.move(path, moved)
    path.symlink_to(moved)

  return _damaged(bench, "link", change)


def _half_written(bench: Bench) -> str:
  """The files that a process leaves if it dies while saving."""
  _stopped(bench)
  bench.copy("half", "stopped")
  newest, before = bench.newest("half"), bench.steps("half")[-2]
  (newest / "commit_success.txt").unlink()
  data_files(newest)[0].unlink()
  newest.rename(newest.with_name(f"{newest.name}.orbax-checkpoint-tmp"))
  output = bench.finish("half")
  assert f"from step {before}" in output, output
  return f"not taken for a checkpoint, went on from the one before; {bench.check_same_end('half')}"


def _all_damaged(bench: Bench) -> str:
  _stopped(bench)
  bench.copy("all", "stopped")
  for step in bench.steps("all"):
    _each_data_file(cut_in_half)(bench.folder / "all" / "checkpoints" / str(step))
  return _refused(bench, "all", "every checkpoint in")


def _refused(bench: Bench, name: str, wanted: str, **kwargs: Any) -> str:
  """The last line of a run that has to end with an error."""
  return _said(bench, *bench.run(name, **kwargs), wanted)


def _said(bench: Bench, code: int, output: str, wanted: str) -> str:
  """The last line of a process that has to have ended with an error."""
  line = output.strip().splitlines()[-1]
  assert code == 1, output
  assert line.startswith("error: "), output
  assert wanted in line, output
  return f"refused: “{line.replace(str(bench.folder), '…')}”"


def _full_disk(bench: Bench) -> str:
  """The kernel refuses to let files grow beyond a size, as it does on a full disk."""
  _stopped(bench)
  bench.copy("full", "stopped")
  last = bench.steps("full")[-1]

  def limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Metrics and records are smaller, the embedding in a checkpoint is larger.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

  said = _refused(bench, "full", "could not", prepare=limit)
  assert bench.steps("full")[-1] == last
  bench.finish("full")
  return f"{said}; checkpoint {last} as it was; with room again, {bench.check_same_end('full')}"


def _read_only_folder(bench: Bench) -> str:
  _stopped(bench)
  bench.copy("readonly", "stopped")
  # Nothing is read-only for an administrator, so one runs it as nobody.
  user = "65534" if os.geteuid() == 0 else ""
  for path in [bench.folder / "readonly", *(bench.folder / "readonly").rglob("*")]:
    path.chmod(0o555 if path.is_dir() else 0o444)
  said = _refused(bench, "readonly", "cannot write in", user=user)
  for path in [bench.folder / "readonly", *(bench.folder / "readonly").rglob("*")]:
    path.chmod(0o755 if path.is_dir() else 0o644)
  bench.finish("readonly")
  return f"{said}; writable again, {bench.check_same_end('readonly')}"


def _other_config(bench: Bench) -> str:
  _stopped(bench)
  bench.copy("config", "stopped")
  return _refused(
    bench, "config", "optimizer.learning_rate was 0.01", optimizer__learning_rate=0.02
  )


def _second_job(bench: Bench) -> str:
  process = bench.start("twice")
  _until_step(bench, "twice", 5, process)
  said = _refused(bench, "twice", "is in use by process")
  process.communicate(timeout=_WAIT_SECONDS)
  return f"the second {said}; the first {bench.check_same_end('twice')}"


def _other_devices(bench: Bench) -> str:
  """1 → 4 → 2 devices on the way, gradients summed in an order that does not depend on them."""
  bench.finish("groups", reduction_groups=4)
  for devices, step in ((1, 50), (4, 100), (2, None)):
    process = bench.start("devices", devices=devices, reduction_groups=4)
    if step:
      _until_step(bench, "devices", step, process)
      process.terminate()
    output, _ = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode == 0, output
  return f"1, then 4, then 2 devices: {bench.check_same_end('devices', 'groups')}"


def _nan_gradient(bench: Bench) -> str:
  said = _refused(bench, "nan", "at step 77", poison="77")
  assert bench.steps("nan")[-1] < 77
  bench.finish("nan", poison="0")
  bench.finish("weighted", poison="0")
  return f"{said}; without the bad batch it {bench.check_same_end('nan', 'weighted')}"


def _nan_gradient_skipped(bench: Bench) -> str:
  output = bench.finish("skip", poison="77", nonfinite="skip")
  assert "at step 77" in output, output
  rows = bench.end("skip")[1]
  assert rows[-2]["skipped"] == 1, rows[-2]
  return f"skipped and counted; validation loss {rows[-1]['validation_loss']:.4f} in the end"


def _bad_file(change: Callable[[bytes], bytes], wanted: str) -> Callable[[Bench], str]:
  """Damages the file of documents, whose preparation has to be refused."""

  def inject(bench: Bench) -> str:
    folder = bench.folder / "bad" / re.sub(r"\W+", "-", wanted)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "bad.json.gz").write_bytes(change(bench.raw.read_bytes()))
    said = _said(bench, *bench.prepare(folder / "bad.json.gz", folder / "out"), wanted)
    assert not (folder / "out" / shards.MANIFEST).exists()
    return said

  return inject


def _line(number: int, new: bytes) -> Callable[[bytes], bytes]:
  """Replaces a line of a compressed file."""

  def change(content: bytes) -> bytes:
    lines = gzip.decompress(content).splitlines(keepends=True)
    lines[number - 1] = new + b"\n"
    return gzip.compress(b"".join(lines))

  return change


def _bad_corpus(
  name: str, change: Callable[[pathlib.Path], None], wanted: str, **kwargs: Any
) -> Callable[[Bench], str]:
  """Damages a copy of the prepared corpus, from which no step must be trained."""

  def inject(bench: Bench) -> str:
    folder = bench.folder / "bad" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.text, folder)
    change(folder)
    said = _refused(bench, f"bad-{name}", wanted, data__path=str(folder), **kwargs)
    assert not (bench.folder / f"bad-{name}" / "metrics.jsonl").exists()
    return said

  return inject


def _first_shard(folder: pathlib.Path) -> pathlib.Path:
  return min(folder.glob("train-*[0-9].npy"))


def _large_token(folder: pathlib.Path) -> None:
  """Puts a token beyond the vocabulary in a shard, and the shard's new digest in the manifest."""
  path, manifest = _first_shard(folder), folder / shards.MANIFEST
  tokens = np.load(path)
  tokens[100] = 60_000
  old, new = shards.sha256(path), shards.write(path, tokens)
  manifest.write_text(manifest.read_text().replace(old, new))


def _flip_in(path: pathlib.Path) -> None:
  flip_bits(path, random.Random(0), 1)


FAULTS: dict[str, Callable[[Bench], str]] = {
  "kill -9, 20 times": _random_kills,
  "kill -9, 10 times, with gradient release": _kills_under_release,
  "SIGTERM": _sigterm,
  "half-written newest checkpoint": _half_written,
  "truncated files in the newest checkpoint": _truncated_files,
  "flipped bits in the newest checkpoint": _flipped_bits,
  "changed record in the newest checkpoint": _changed_record,
  "link in the newest checkpoint": _link_out_of_folder,
  "all checkpoints damaged": _all_damaged,
  "full disk": _full_disk,
  "read-only folder": _read_only_folder,
  "other config": _other_config,
  "second job in the folder": _second_job,
  "other number of devices": _other_devices,
  "NaN gradient, nonfinite=stop": _nan_gradient,
  "NaN gradient, nonfinite=skip": _nan_gradient_skipped,
  "data: truncated gzip": _bad_file(lambda x: x[: len(x) // 2], "bad.json.gz"),
  "data: broken JSON": _bad_file(_line(7, b'{"text": "ab'), "line 7"),
  "data: JSON without text": _bad_file(_line(9, b'{"txt": "ab"}'), "line 9"),
  "data: invalid UTF-8": _bad_file(_line(3, b'{"text": "\xff"}'), "line 3"),
  "data: empty file": _bad_file(lambda _: b"", "empty"),
  "data: flipped bit in a shard": _bad_corpus(
    "flipped", lambda x: _flip_in(_first_shard(x)), ".npy"
  ),
  "data: shard cut short": _bad_corpus(
    "cut", lambda x: os.truncate(_first_shard(x), 1000), "cut short"
  ),
  "data: missing shard": _bad_corpus("missing", lambda x: _first_shard(x).unlink(), "is missing"),
  "data: token beyond the vocabulary": _bad_corpus("token", _large_token, "token 60000"),
  "data: changed tokenizer": _bad_corpus(
    "tokenizer", lambda x: _flip_in(x / "tokenizer.json"), "tokenizer.json"
  ),
  "data: unfinished preparation": _bad_corpus(
    "unfinished", lambda x: (x / shards.MANIFEST).unlink(), "has no manifest.json"
  ),
  "data: more tokens than the model has": _bad_corpus(
    "model", lambda x: None, "model.vocabulary 256 is less than the 512", model__vocabulary=256
  ),
}


def inject(bench: Bench, names: list[str] | None = None) -> dict[str, str]:
  """Injects faults one after another.

  Args:
    bench: where.
    names: of `FAULTS`; None is all of them.

  Returns:
    What happened, by name; starting with "FAILED" where it was not what should have.
  """
  if not (bench.folder / "undisturbed" / "summary.json").exists():
    bench.finish("undisturbed")
  outcomes = {}
  for name in names or FAULTS:
    try:
      outcomes[name] = FAULTS[name](bench)
    except AssertionError as error:
      outcomes[name] = f"FAILED: {error}"
    bench.show(f"{name}: {outcomes[name]}")
  return outcomes


def table(outcomes: dict[str, str]) -> str:
  """Faults and what happened, in Markdown."""
  return "".join(
    f"| {name} | {outcome} |\n"
    for name, outcome in {"fault": "what happened", "---": "---", **outcomes}.items()
  )


def soak(bench: Bench, minutes: float) -> tuple[int, int, int]:
  """Kills and continues runs for some minutes; each has to end as one that was left alone.

  Returns:
    How many runs came to their end, how often they were killed, and how often during a save.

  Raises:
    AssertionError: at the first that did not.
  """
  bench.finish("undisturbed")
  end, runs, killed, during = time.monotonic() + 60 * minutes, 0, 0, 0
  while time.monotonic() < end:
    name = f"soak-{bench.seed}-{runs}"
    shutil.rmtree(bench.folder / name, ignore_errors=True)
    kills = kill(bench, name, 10)
    said = bench.check_same_end(name)
    runs, killed, during = runs + 1, killed + kills[0], during + kills[1]
    bench.show(f"run {runs}, killed {killed} times so far, {during} during a save: {said}")
    shutil.rmtree(bench.folder / name)
  return runs, killed, during
