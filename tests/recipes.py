"""The code of docs/trainers.md that is no session: tests put it into the trainers it is for."""

import pathlib
import re
import textwrap

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "trainers.md"


def recipe(heading, **names):
  """What the `py` blocks under a heading define, given other names.

  A recipe is of 15 lines at most.
  """
  section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.S | re.M)[1]
  code = "\n".join(
    textwrap.dedent(block) for block in re.findall(r"^```py\n(.*?)^```", section, re.S | re.M)
  )
  lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
  assert 0 < len(lines) <= 15
  exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
  return names
