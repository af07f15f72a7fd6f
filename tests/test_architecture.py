"""Imports point one way, inside functions too, and only `fused.dispatch` imports backends."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]

# Rooms of the library from the ground up; a module belongs to the longest name that begins its own.
LEVELS = (
  (
    "explicit_axes",
    "flax_state",
    "contraction",
    "lowering",
    "rounded_dot",
    "data_parallel",
    "formats",
    "rounding",
    "trees",
    "quantized_array",
    "dense_view",
    "matmul",
    "updates",
  ),
  ("transforms", "wire"),
  ("fused",),
  ("optimizers",),
  # Theory simulates the transforms that it has closed forms of. "" is eco_optax/__init__.py.
  ("advice", "diagnostics", "release", "theory", ""),
  # Other packages' formats, and their trainers.
  ("interop", "linen", "nnx"),
  ("training",),
)
BACKENDS = ("cpu", "tpu", "gpu")
# Whoever may import a room; everything else may not.
TRAINING_MAY_BE_IMPORTED_BY = (
  "eco_optax.training",
  "experiments",
  "scripts",
  "tests",
  "notebooks",
  "configs",
)


def modules(*folders):
  """Python files by the name of their module."""
  found = {}
  for folder in folders:
    for path in sorted((ROOT / folder).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


def imports(name, path, known):
  """Modules that a file imports, wherever in it, except for type checking."""
  tree = ast.parse(path.read_text())
  skipped = {
    inner
    for node in ast.walk(tree)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for inner in ast.walk(node)
  }
  package = name if path.name == "__init__.py" else name.rpartition(".")[0]
  for node in ast.walk(tree):
    if node in skipped:
      continue
    if isinstance(node, ast.Import):
      wanted = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base]).rstrip(".")
      # What is imported from a package may be a module of it, or a name of its own.
      names = [f"{base}.{alias.name}" for alias in node.names]
      wanted = [full if full in known else base for full in names]
    else:
      continue
    yield from (x for x in wanted if x in known and x != name)


FILES = modules("eco_optax", "experiments", "scripts", "configs", "tests", "examples", "docs")
IMPORTS = {name: set(imports(name, path, FILES)) for name, path in FILES.items()}


def level(name):
  """The floor that a module of the library is on, counted from the ground."""
  own = name.removeprefix("eco_optax").removeprefix(".")
  for number, rooms in enumerate(LEVELS):
    if own in rooms or any(room and own.startswith(f"{room}.") for room in rooms):
      return number
  raise AssertionError(f"{name} has no place in LEVELS")


def test_no_import_points_upward():
  library = [name for name in FILES if name.startswith("eco_optax")]
  upward = [
    f"{name} imports {other}"
    for name in library
    for other in sorted(IMPORTS[name])
    # Interop and training use the library as its users do, through `import eco_optax`.
    if level(other) > level(name)
  ]
  assert not upward, "\n".join(upward)


def test_no_imports_form_a_circle():
  seen, circles = {}, []

  def visit(name, path):
    seen[name] = "open"
    for other in sorted(IMPORTS[name]):
      if seen.get(other) == "open":
        circles.append(" → ".join([*path[path.index(other) :], other]))
      elif other not in seen:
        visit(other, [*path, other])
    seen[name] = "closed"

  for name in FILES:
    if name not in seen:
      visit(name, [name])
  assert not circles, "\n".join(circles)


def test_experiments_are_imported_by_scripts_and_tests_alone():
  found = [
    f"{name} imports {other}"
    for name, others in IMPORTS.items()
    for other in others
    if other.startswith("experiments") and not name.startswith(("experiments", "scripts", "tests"))
  ]
  assert not found, "\n".join(found)


def test_training_is_imported_by_runs_alone():
  found = [
    f"{name} imports {other}"
    for name, others in IMPORTS.items()
    for other in others
    if other.startswith("eco_optax.training") and not name.startswith(TRAINING_MAY_BE_IMPORTED_BY)
  ]
  assert not found, "\n".join(found)


def test_flax_is_imported_by_its_own_modules_and_training_alone():
  found = {
    name
    for name, path in modules("eco_optax").items()
    if re.search(r"^\s*(from|import) flax\b", path.read_text(), re.MULTILINE)
  }
  own = {"eco_optax.linen", "eco_optax.nnx"}
  assert own <= found
  assert {name for name in found - own if not name.startswith("eco_optax.training")} == set()


def test_backends_are_imported_by_dispatch_alone():
  backends = [
    name for name in FILES if name.startswith(tuple(f"eco_optax.fused.{x}" for x in BACKENDS))
  ]
  assert backends
  found = [
    f"{name} imports {other}"
    for name, others in IMPORTS.items()
    for other in others
    if other in backends
    and name.startswith("eco_optax")
    and name != "eco_optax.fused.dispatch"
    and name not in backends
  ]
  assert not found, "\n".join(found)


def test_an_upward_import_inside_a_function_is_seen(tmp_path):
  path = tmp_path / "rounding.py"
  path.write_text("def f():\n  from eco_optax.fused import tpu\n  from . import training\n")
  found = set(imports("eco_optax.rounding", path, FILES))
  assert found == {"eco_optax.fused.tpu", "eco_optax.training"}
