"""Every notebook runs from a clean kernel, draws, and shows what its text says."""

import base64
import pathlib
import re

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module", params=sorted(p.name for p in NOTEBOOKS.glob("*.ipynb")))
def outputs(request):
  notebook = nbformat.read(NOTEBOOKS / request.param, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
  client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": "."}})
  client.execute()
  return request.param, [out for cell in notebook.cells for out in cell.get("outputs", [])]


# nbclient's own event loops and sockets are closed late; nothing of ours is involved.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_runs_and_draws(outputs):
  _, cells = outputs
  pictures = [out.data["image/png"] for out in cells if "image/png" in out.get("data", {})]
  assert pictures
  assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
  text = "".join(out.text for out in cells if out.output_type == "stream")
  assert "float8_e4m3fn (2, 64, 128) 1.06 bytes per weight" in text
  rows = dict(re.findall(r"^(.+?)\s+validation (\d\.\d+)", text, re.MULTILINE))
  loss = {name: float(value) for name, value in rows.items()}
  # What the notebook is there to show, with room for other versions' roundings.
  assert loss["ECO"] < loss["naive"] - 0.03
  assert loss["ECO"] < loss["master weights"] + 0.02
  assert loss["ECO, stochastic rounding"] < loss["naive"]
