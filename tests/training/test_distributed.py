"""The same command in one process and in two, on one device and on four."""

import pathlib
import socket
import subprocess
import sys

RUN = pathlib.Path(__file__).with_name("distributed_run.py")


def start(process, processes, devices, port, folder):
  command = [sys.executable, str(RUN), *map(str, (process, processes, devices, port, folder))]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
  """Number of devices, loss and digest of each run; the collectives library prints before them."""
  out, err = process.communicate(timeout=600)
  assert process.returncode == 0, err[-2000:]
  return [line.split("result ")[1].split() for line in out.splitlines() if "result " in line]


def test_states_do_not_depend_on_processes_or_devices(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  pair = [start(i, 2, 2, port, tmp_path) for i in range(2)]
  two_by_two, released_in_two, wire_in_two = finish(pair[0])
  finish(pair[1])
  (one_by_one,) = finish(start(0, 1, 1, port, tmp_path))
  one_by_four, released_in_one, wire_in_one = finish(start(0, 1, 4, port, tmp_path))
  assert [run[0] for run in (two_by_two, one_by_four, one_by_one)] == ["4", "4", "1"]
  # Weights, rounded stochastically, and moments after 20 steps, bit for bit, because the gradients
  # of four groups of sequences are summed in order wherever they were computed.
  assert two_by_two[2] == one_by_four[2] == one_by_one[2]
  assert float(one_by_one[1]) < 5.0  # Well below ln 256: it did learn something.

  # Two processes also take the same released steps as one.
  assert released_in_two == released_in_one

  # Gradients that cross in codes are summed in the order of devices, and errors are each device's
  # own: two processes, which go on from a checkpoint half way, end in the state of one.
  assert wire_in_two == wire_in_one
  assert float(wire_in_two[1]) < 5.0
