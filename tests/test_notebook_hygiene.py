"""Every notebook of the project obeys the rules for sources or for executed ones; nothing is executed here."""

from pathlib import Path

import pytest
from notebook_form import source_problems

from mvrepro.pages.check import beside, executed_problems

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEMPLATES = sorted((ROOT / "notebooks" / "templates").glob("*.ipynb"))
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
