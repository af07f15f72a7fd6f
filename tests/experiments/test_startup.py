"""What is published of the time before the first step is what the study measures."""

import json
import pathlib

import pytest

from experiments import startup

ROOT = pathlib.Path(__file__).parents[2]
FOUND = json.loads((ROOT / "results" / "startup.json").read_text())


@pytest.mark.parametrize("way", startup.WAYS)
def test_every_way_is_made_traced_and_compiled(way):
  found = startup.measure(way, "cpu", startup.Model(2, 32))
  assert list(found) == ["init", "trace", "compile"]
  assert all(seconds > 0 for seconds in found.values())


def test_published_figures_are_of_the_models_and_ways_of_the_study():
  for topology, own in FOUND.items():
    assert tuple(own["rows"]) == startup.WAYS
    assert startup.Model(own["matrices"], own["width"]) == startup.MODELS[topology]
    assert f"scripts/startup.py --topology={topology}" in own["command"]
    assert startup.ratio(own["rows"], startup.PLAIN) == 1


def test_the_page_has_the_table():
  assert startup.table(FOUND).strip() in (ROOT / "docs" / "performance.md").read_text()
