"""A run among others: alone in its folder, and ending when it is asked to."""

from __future__ import annotations

import contextlib
import fcntl
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[None]:
  """Locks a folder, at most for as long as the process lives.

  The kernel releases the lock when the process dies, so no stale lock is left behind.

  Raises:
    BlockingIOError: if another process holds it, naming that.
    OSError: if it cannot be written to.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a+")
  except OSError as error:
    raise OSError(
      f"cannot write in {folder}: {error.strerror}. Make it writable, or use another folder"
    ) from error
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise BlockingIOError(
        f"{folder} is in use by process {file.read().strip() or 'of unknown number'}: wait for it,"
        " end it, or use another folder"
      ) from error
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}")
    file.flush()
    yield


def _quiet_libraries() -> None:
  """Sends errors of abandoned reads and writes in other threads to the debug log.

  Orbax and TensorStore print dozens of tracebacks around the one error that counts.
  """
  shown = sys.excepthook

  def excepthook(*error: Any) -> None:
    if threading.current_thread() is threading.main_thread():
      shown(*error)
    else:
      logging.debug("%s", "".join(traceback.format_exception(*error)))

  sys.excepthook = excepthook
  sys.unraisablehook = lambda ignored: logging.debug("ignored: %r", ignored.exc_value)
  python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
  """Ends the process with code 1 and one line for errors that its user can mend.

  The traceback is logged for those who ask for it with --verbosity=1.
  """
  message = ""
  try:
    _quiet_libraries()
    yield
  except (ImportError, OSError, ValueError, FloatingPointError) as error:
    message = f"error: {' '.join(str(error).split())}"
    logging.debug("%s", "".join(traceback.format_exception(error)))
  if message:
    sys.exit(message)


def from_home(path: str) -> str:
  """A path whose leading `~` is the home folder, as in a shell, which leaves `--name=~/…` alone.

  Raises:
    ValueError: if there is no such user.
  """
  full = os.path.expanduser(path)
  if full.startswith("~"):
    raise ValueError(f"{path} is in the home folder of no user: write ./{path} if that is its name")
  return full


class _Path(flags.ArgumentParser):
  """Parses the path of a file or folder."""

  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    """The path with its home folder."""
    return from_home(argument)


def define_path(name: str, default: str | None, help: str, **more: Any) -> Any:
  """`flags.DEFINE_string` for a path, in which `~` is the home folder."""
  return flags.DEFINE(_Path(), name, default, help, serializer=flags.ArgumentSerializer(), **more)


def define_paths(name: str, help: str, **more: Any) -> Any:
  """`define_path` for a flag that may be repeated."""
  return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, [], help, **more)


def define_config(name: str, default: str | None) -> Any:
  """`config_flags.DEFINE_config_file`; an unknown key among the overrides ends in one line.

  In the path of the config, and in overrides such as `--config.data.path=~/data`, `~` is the home
  folder.
  """
  for i, argument in enumerate(sys.argv):
    flag, equals, value = argument.partition("=")
    if re.fullmatch(rf"--?{name}(\..*)?", flag) and value.startswith("~"):
      with plain_errors():
        sys.argv[i] = flag + equals + from_home(value)
  try:
    return config_flags.DEFINE_config_file(name, default)
  except AttributeError as error:  # Overrides of the default are checked here, not in `run`.
    cause = error.args[0]  # A KeyError, whose own text would be quoted once more.
    reason = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
    sys.exit(f"error: unknown key of --{name}: {reason}")


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run` for scripts whose users' mistakes end in one line, flags included.

  Args:
    main: called with the arguments that are no flags.
  """

  def parse(arguments: Sequence[str]) -> list[str]:
    try:
      rest = flags.FLAGS(arguments)
      for name in flags.FLAGS:
        getattr(flags.FLAGS, name)  # Config files and overrides are read at the first look.
    except (flags.Error, AttributeError, ImportError, KeyError, OSError, TypeError) as error:
      raise ValueError(str(error)) from error
    if rest[1:]:
      raise ValueError(f"unexpected {' '.join(rest[1:])}: flags are given as --name=value")
    return rest

  with plain_errors():
    app.run(main, flags_parser=parse)


@contextlib.contextmanager
def until_sigterm() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step that says whether the run has been asked to end.

  Schedulers send SIGTERM to one process or to all, a little before they take the machine. Several
  processes agree on the step at which they stop, through JAX's preemption service.
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
  elif threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python hands signals to the main thread only.
  else:
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
      yield lambda step: asked.is_set()
    finally:
      signal.signal(signal.SIGTERM, before)
