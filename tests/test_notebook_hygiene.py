"""Every notebook of the project obeys the rules for sources or for executed ones; nothing is executed here."""

import hashlib
import json
from pathlib import Path

import pytest
from notebook_form import source_problems

from mvrepro.pages.check import beside, executed_problems

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATES = sorted((ROOT / "notebooks" / "templates").glob("*.ipynb"))
PICTURES = sorted((ROOT / "results").glob("**/*.png"))
EXECUTED = sorted((ROOT / "results" / "executed").glob("*/*.ipynb"))


def test_there_are_notebooks() -> None:
    assert SOURCES, "notebooks/ has no notebook, so there is nothing to reproduce"


@pytest.mark.parametrize("path", [*SOURCES, *TEMPLATES], ids=lambda path: path.name)
def test_source_notebook(path: Path) -> None:
    assert source_problems(path) == []


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_executed_notebook(path: Path) -> None:
    source, figures = beside(path)
    assert source == ROOT / "notebooks" / path.name
    assert executed_problems(path, source, figures) == []


def test_a_picture_that_is_kept_is_the_one_that_is_recorded() -> None:
    assert [str(path.relative_to(ROOT)) for path in PICTURES] == ["results/figures/faces/00/summary.png"]
    for path in PICTURES:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
