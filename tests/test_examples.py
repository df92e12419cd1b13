"""The example notebooks are committed executed: of the others' form, and the same when they are run again."""

import copy
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from notebook_form import source_problems

from mvrepro.determinism import environment
from mvrepro.evidence.compare import text_difference
from mvrepro.files import ROOT
from mvrepro.pages.check import executed_problems
from mvrepro.pages.notebook import CELL_TIMEOUT_S, START_TIMEOUT_S, SocketKernelManager

EXAMPLES = sorted((ROOT / "notebooks" / "examples").glob("*.ipynb"))


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_the_form_of_a_notebook(path: Path, tmp_path: Path) -> None:
    assert executed_problems(path, None, None) == []
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    bare = tmp_path / path.name
    bare.write_text(json.dumps(notebook))
    assert source_problems(bare) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_gives_the_same_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (environment(1) | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    committed = nbformat.read(path, as_version=4)
    again = copy.deepcopy(committed)
    client = NotebookClient(
        again,
        timeout=CELL_TIMEOUT_S,
        startup_timeout=START_TIMEOUT_S,
        iopub_timeout=START_TIMEOUT_S,
        kernel_manager_class=SocketKernelManager,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    for was, now in zip(committed.cells, again.cells, strict=True):
        outputs = [[text(output) for output in cell.get("outputs", [])] for cell in (was, now)]
        assert len(outputs[0]) == len(outputs[1])
        assert [text_difference(a, b) for a, b in zip(*outputs, strict=True)] == [None] * len(outputs[0])
    assert os.environ["PYTHONPATH"] == str(ROOT)


def text(output: nbformat.NotebookNode) -> str:
    return str(output.get("text") or output["data"]["text/plain"])
