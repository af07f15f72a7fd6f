"""Test-wide settings: eight host devices, strict promotion, fixed flags before JAX starts."""

import atexit
import contextlib
import ctypes
import gc
import importlib.util
import os
import shutil
import tempfile

import jaxlib.version

# Programs are many and small: they take longer to compile than to run. Most of that time goes into
# XLA's emitters by way of MLIR, and into cutting programs into 32 parts to compile in parallel.
# Notebooks run with the flags that users have. Of a flag set twice the last value counts:
# XLA_FLAGS=--xla_cpu_use_fusion_emitters=true tests with users' emitters.
os.environ["XLA_FLAGS"] = " ".join(
  [
    # From 0.12 on jaxlib has no other emitters, and it aborts at a flag that it does not know.
    "--xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 12) else "",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_optimization_level=0",
    # XLA checks its own program between its passes, for a tenth of its time.
    "--xla_disable_hlo_passes=hlo-verifier",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Of the ten frames that each operation of a program would name, all but the innermost cost a tenth
# of the time to compile.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")
# Threads of torch and of NumPy's products wait for each other where arrays are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs that several tests and their subprocesses compile are compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="eco_optax_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  # A limit comes with a lock, so that nobody reads what another process is still writing.
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**31)
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import optax
import pytest

# Programs that tests start.
collect_ignore = ["training/distributed_run.py", "interop/transformers_side.py"]

# Modules whose docstrings have examples that take a package of an extra.
_EXTRAS = {
  "eco_optax.interop.gguf": "gguf",
  "eco_optax.interop.qwix": "qwix",
  "eco_optax.interop.safetensors": "safetensors",
  "eco_optax.interop.hugging_face": "safetensors",
}


def pytest_collection_finish():
  """Takes what packages have made from the garbage collector, which walks it again and again.

  Traces allocate by the million; collections after every 700th take a twentieth of all time.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


def pytest_make_parametrize_id(val, argname):
  """Names bytes by their argument, for gzip writes the time into what it compresses."""
  return argname if isinstance(val, bytes) else None


# Modules with tests of half a minute: they come first, so that no worker is left alone with one.
_LONG = ("test_notebooks.py", "test_faults.py", "test_step.py", "test_distributed.py")


def pytest_collection_modifyitems(items):
  """Puts long tests first, and leaves out examples whose packages are not installed."""
  items.sort(key=lambda item: item.path.name not in _LONG)
  for item in items:
    module = getattr(getattr(item, "dtest", None), "globs", {}).get("__name__")
    if module in _EXTRAS and importlib.util.find_spec(_EXTRAS[module]) is None:
      item.add_marker(pytest.mark.skip(reason=f"needs {_EXTRAS[module]}"))


# Strict promotion holds our own code to explicit dtypes. Optax's own bias correction raises a
# Python float to an int32 count, which strict promotion forbids, so that one function is let off.
_bias_correction = optax.tree.bias_correction


def _bias_correction_with_standard_promotion(moment, decay, count):
  with jax.numpy_dtype_promotion("standard"):
    return _bias_correction(moment, decay, count)


@pytest.fixture(autouse=True)
def strict_promotion(request, monkeypatch):
  """Strict dtype promotion; `@pytest.mark.standard_promotion` where stock code needs less."""
  monkeypatch.setattr(optax.tree, "bias_correction", _bias_correction_with_standard_promotion)
  mode = "standard" if request.node.get_closest_marker("standard_promotion") else "strict"
  with jax.numpy_dtype_promotion(mode):
    yield


# Bytes of a process from which on it lets compiled programs go.
_MUCH = 3 * 2**29


def _resident():
  """Bytes of memory that this process has, without bound where that is not known."""
  try:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    return float("inf")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_go():
  """Lets compiled programs go once they are many: those of all modules would fill several GB.

  As long as they are few, the next module finds the hundreds of small ones that tests share.
  """
  yield
  if _resident() > _MUCH:
    jax.clear_caches()
    # The allocator of glibc keeps what is freed, and every module from here on would start anew.
    with contextlib.suppress(OSError, AttributeError):
      ctypes.CDLL("libc.so.6").malloc_trim(0)
