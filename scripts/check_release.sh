#!/usr/bin/env bash
# Builds sdist and wheel and holds the installed wheel against the library's tests, out of the checkout's
# reach, for each PYTHON or PYTHON:CONSTRAINTS that is given; a Python that is not there is left out.
# Without arguments: Python 3.11 with the newest packages and with the oldest, Python 3.12 with the newest.
# PYTEST_ARGS goes to pytest, such as PYTEST_ARGS="-k 'formats or rounding'".
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- python3.11 python3.11:tests/floor.txt python3.12
unset PYTHONPATH
export JAX_PLATFORMS=cpu
eval "arguments=(${PYTEST_ARGS:-})"  # As a shell splits them.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== build"
# From the tracked files alone, so that nothing left over from earlier builds gets in.
mkdir "$work/source"
git ls-files -z | tar --create --null --files-from=- | tar --extract --directory="$work/source"
"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build twine
"$work/tools/bin/python" -m build --outdir "$work/dist" "$work/source" &>"$work/build.log" ||
  { cat "$work/build.log"; exit 1; }
"$work/tools/bin/twine" check --strict "$work"/dist/*

echo "== contents"
git ls-files eco_optax | sort >"$work/wanted"
"$work/tools/bin/python" -m zipfile --list "$work"/dist/*.whl | awk 'NR > 1 { print $1 }' | sort >"$work/found"
info=$(grep --only-matching --max-count=1 '^[^/]*\.dist-info' "$work/found")
for name in METADATA RECORD WHEEL licenses/LICENSE top_level.txt; do echo "$info/$name"; done >>"$work/wanted"
sort --output="$work/wanted" "$work/wanted"
diff "$work/wanted" "$work/found" || { echo "the wheel lacks (<) or should not have (>) these"; exit 1; }
grep --quiet '^eco_optax/py.typed$' "$work/found"
echo "$(wc -l <"$work/found") files, all of them wanted"

# The tests of the library; those of the harness, of notebooks and of the checkout itself stay behind.
mkdir "$work/away"
cp -r "$work/source"/{tests,examples,pyproject.toml} "$work/away"
mv "$work/away/tests/training/numpy_transformer.py" "$work/away/tests"  # Checkpoints are held against it.
rm -r "$work/away/tests"/{training,test_package.py,test_docs.py,test_notebooks.py}

for job in "$@"; do
  python=${job%%:*} constraints=() warnings=()
  if [ "$job" != "$python" ]; then
    # The oldest packages warn that others have deprecated what they use.
    constraints=(--constraint "$(realpath "${job#*:}")") warnings=(-W default::DeprecationWarning)
  fi
  echo "== $job"
  "$python" -c 'import venv' 2>/dev/null || { echo "left out: there is no $python"; continue; }
  venv="$work/venv"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  # Of what the library does not require, its tests read and write checkpoints with Orbax and safetensors,
  # and the models that these are of are Flax's.
  "$venv/bin/pip" install --quiet "${constraints[@]}" "$work"/dist/*.whl \
    pytest pytest-xdist filelock hypothesis orbax-checkpoint flax safetensors
  (
    cd "$work/away"
    library=$("$venv/bin/python" -c "import eco_optax; print(eco_optax.__path__[0])")
    case $library in "$venv"/*) ;; *) echo "$library is not the wheel's"; exit 1 ;; esac
    "$venv/bin/python" -c "import platform, flax, jax, optax; print(*map(str, (
      'Python', platform.python_version(), 'jax', jax.__version__, 'flax', flax.__version__, 'optax',
      optax.__version__)))"
    "$venv/bin/python" -m pytest --config-file=pyproject.toml tests "$library" \
      --ignore="$library/training" --numprocesses=auto --maxprocesses=8 --dist=worksteal \
      "${warnings[@]}" "${arguments[@]}"
  )
done
mkdir -p dist
cp "$work"/dist/* dist
echo "== dist/ holds what was checked: $(cd "$work/dist" && echo *)"
