"""Configs: every file is in order, and what is out of order is named."""

import ast
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

import eco_optax as eco
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import loop, methods, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.models import transformer

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name):
  return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", methods.BY_NAME)
def test_every_config_is_in_order_with_every_method(name, method):
  config = load(name)
  config.method = method
  if method == "bf16_mw":  # Which has no packed weights to release.
    config.update(release=False, kept_format="none")
    config.optimizer.clip = "exact"
  config_lib.validate(config)
  assert callable(methods.optimizer(config).update)


# Size → (non-embedding parameters, peak learning rate, steps, warm-up), the scaling study's table.
STUDY = {
  "30m": (30_482_560, 1.2e-3, 11444, 1144),
  "50m": (49_556_736, 1.2e-3, 19073, 1907),
  "100m": (102_777_856, 6e-4, 38146, 3814),
  "200m": (203_188_480, 3e-4, 76293, 7629),
  "430m": (443_068_288, 1.5e-4, 164031, 16403),
  "800m": (822_151_168, 7.5e-5, 305175, 30517),
}


@pytest.mark.parametrize("size", STUDY)
def test_the_scaling_studys_numbers(size):
  parameters, peak, steps, warmup = STUDY[size]
  config = load(f"llama_{size}")
  assert transformer.count_params(config_lib.model(config)) == parameters
  assert (config.batch_size, config.length, config.steps) == (512, 512, steps)
  optimizer = config.optimizer
  assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.98, 1e-9)
  assert (optimizer.weight_decay, optimizer.max_norm) == (0.1, 1.0)
  rate = methods.schedule(config)
  found = [float(rate(i)) for i in (0, warmup, steps)]
  assert found == pytest.approx([0.01 * peak, peak, 0.1 * peak], rel=1e-5)
  assert float(rate(warmup - 1)) < peak


@pytest.mark.parametrize(
  ("name", "total", "rates"),
  [
    ("gemma3_1b", 999_885_952, (1e-6, 1e-4, 1e-5)),
    ("smoe_2b", 2_107_764_288, (2e-6, 2e-5, 2e-6)),
    ("deepseek_moe_16b", 16_375_728_128, (2e-10, 2e-5, 0.0)),
    ("llama3_8b", 8_030_261_248, (2e-10, 2e-5, 0.0)),
  ],
)
def test_the_other_runs_numbers(name, total, rates):
  config = load(name)
  assert transformer.count_params(config_lib.model(config), embedding=True) == total
  rate = methods.schedule(config)
  warmup = int(config.optimizer.warmup_fraction * config.steps)
  found = [float(rate(i)) for i in (0, warmup, config.steps)]
  assert found == pytest.approx(rates, rel=1e-3, abs=1e-12)


def test_every_run_of_the_paper_has_a_topology():
  assert set(compile_lib.TOPOLOGIES) <= set(NAMES)
  assert {f"llama_{size}" for size in STUDY} < set(compile_lib.TOPOLOGIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_runs_on_whatever_devices_there_are(name):
  config = load(name)
  config.init_from = ""  # A file that a user has.
  model, (weights, _) = config_lib.model(config), config_lib.formats(config)
  params = jax.eval_shape(lambda: transformer.init(model, config.seed, weights))
  moments = jax.eval_shape(eco.dequantize, params)
  for devices in (1, 4):
    _, mesh = loop.prepare(config, jax.devices()[:devices])
    assert mesh.shape["fsdp"] == devices
    limit = config.replicated_limit_mib * 2**20
    sharding.check_sharded((params, moments), mesh, limit)


def test_a_dry_run_takes_the_devices_it_is_given():
  assert "mesh data 1 × fsdp 4 × tensor 1" in loop.dry_run(load("tiny"), jax.devices()[:4])


@pytest.mark.parametrize("name", NAMES)
def test_every_config_opens_with_its_command_its_machine_and_its_result(name):
  head = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
  command = f"python scripts/train.py --config=configs/{name}.py --workdir=runs/{name}"
  if name == "smollm2_135m":  # The file that it starts from has to be fetched first.
    command = "make finetune"
  assert " ".join(head.split("\n\n")[1].split()).startswith(command)
  assert "\nMachine: " in head
  assert "\nResult: " in head
  # Every loss is in a file that the text names.
  named = re.findall(r"[\w/]+/\w+\.(?:md|py)|results/[\w/]+\.json", head)
  files = [(ROOT / file).read_text() for file in named]
  for loss in re.findall(r"\d\.\d{4}", head):
    assert any(loss in text for text in files), loss


def test_parts_of_a_batch_are_joined_until_every_device_has_a_sequence():
  config = load("deepseek_3m_chat")
  count = lambda config, n: step_lib.accumulation(
    config, loop.prepare(config, jax.devices()[:n])[1]
  )
  assert [count(config, n) for n in (1, 2, 4, 8)] == [16, 8, 4, 2]
  config.batch_size = 64  # Parts of four sequences are enough for four devices.
  assert [count(config, n) for n in (1, 2, 4, 8)] == [16, 16, 16, 8]
  config.batch_size, config.reduction_groups = 16, 1
  with pytest.raises(ValueError, match="not a multiple of the 4 devices"):
    loop.prepare(config, jax.devices()[:4])


def changed(changes):
  config = load("tiny").unlock()
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optimizer.learning_rate": -1e-3}, "optimizer.learning_rate must be above 0, got -0.001"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate must be finite, got nan"),
    ({"optimizer.b1": 0.0}, "optimizer.b1 must be above 0 and below 1, got 0.0"),
    ({"optimizer.warmup_fraction": 1.5}, "optimizer.warmup_fraction must be between 0 and 1"),
    ({"steps": 0}, "steps must be above 0, got 0"),
    ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got 'float16'"),
    ({"accumulation": 3}, "accumulation 3 does not divide batch_size 16"),
    ({"reduction_groups": 5}, "reduction_groups 5 does not divide batch_size 16 / accumulation 1"),
    (
      {"reduction_groups": 4, "optimizer.name": "soap"},
      "optimizer.name 'soap' and reduction_groups exclude each other",
    ),
    ({"model.loss_chunks": 3}, "model.loss_chunks 3 does not divide length 128"),
    ({"model.heads": 5}, "model: width 32 does not make 5 heads"),
    ({"model.remat": "some"}, "model: remat 'some' is none of none, dots, full"),
    ({"mesh.data": 0}, "mesh.data must be above 0, or -1, got 0"),
    ({"seed": 0, "batch_size": -1, "length": 0}, "batch_size must be .*; length must be above 0"),
  ],
)
def test_values_out_of_range_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    config_lib.validate(changed(changes))


def test_unknown_and_missing_keys_and_other_types_are_named():
  config = load("tiny")
  with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
    config.optimizer.learnin_rate = 1.0
  config = config.unlock()
  config.optimizer.learnin_rate = 1.0
  with pytest.raises(ValueError, match=r"did you mean optimizer\.learning_rate"):
    config_lib.validate(config)
  config = load("tiny").unlock()
  del config.optimizer.b2
  with pytest.raises(ValueError, match=r"optimizer\.b2 is missing"):
    config_lib.validate(config)
  config = load("tiny")
  with config.ignore_type():
    config.steps = "60"
  with pytest.raises(ValueError, match="steps must be of type int, got '60'"):
    config_lib.validate(config)


def test_dry_run_prints_what_a_run_would_be():
  config = load("llama_800m")
  config.mesh.update(data=2, fsdp=4)
  text = loop.dry_run(config)
  assert "learning_rate: 7.5e-05" in text
  assert "953,747,456 parameters (822,151,168 without embedding and head)" in text
  assert "mesh data 2 × fsdp 4" in text
  # One kernel's line: path, shape, dtype, format, sharding; codes and scales of a quarter.
  size = 16 * 2048 * 5632
  line = next(line for line in text.splitlines() if "mlp/gate/kernel" in line).split()
  assert line == [
    *("blocks/mlp/gate/kernel", "16×5632×2048", "float8_e4m3fn", "FP8"),
    *("·", "fsdp", "·", f"{(size + 16 * 5632 * 4) // 4:,}"),
  ]
  assert "bytes per quantized parameter  9.00" in " ".join(text.split("  ")) or "9.002" in text
  config.method = "mw_sr"
  assert "residual" in loop.dry_run(config)


def test_the_command_line_overrides_and_refuses():
  command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--dry_run"]
  command += ["--config=configs/tiny.py", "--config.optimizer.learning_rate=0.25"]
  env = {"JAX_PLATFORMS": "cpu", "PATH": ""}
  run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
  assert "learning_rate: 0.25" in run.stdout
  bad = subprocess.run(
    [*command, "--config.optimizer.learning_rat=1"],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  assert bad.returncode != 0
  assert 'Did you mean "learning_rate"' in bad.stderr


def test_devices_of_this_test():
  assert jax.device_count() == 8  # What the mesh of the dry run above takes.
