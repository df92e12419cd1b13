"""Where a notebook's figures and values go, and that playing with one changes nothing that is committed."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from trees import ROOT, copy_tree, run, run_git

from mvrepro.errors import UserError
from mvrepro.pages import plots, report


def draw(page, *, height=1.0, alt="a line", **options):
    fig, axes = plots.new_figure(width=2, height=2)
    axes[0, 0].plot([0, 1], [0, height])
    page.figure(fig, "line", {"y": [0, height]}, alt=alt, kind="exact", **options)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder that stands in for results/, and to which the pipeline lets a notebook write."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setenv("MVREPRO_OUT", str(tmp_path))
    monkeypatch.delenv("MVREPRO_VALIDATE", raising=False)
    return tmp_path


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_results_hold_the_data_of_each_figure_and_the_one_picture_to_keep(results, capsys):
    page = report.Report("04", "quick")
    draw(page)
    page.record("values", {"a": 0.5}, kind="exact")
    assert written(results) == ["figures/quick/04/line.json", "figures/quick/04/values.json"]
    record = json.loads((results / "figures/quick/04/line.json").read_text())
    assert list(record) == ["kind", "alt", "sha256", "data"]
    assert json.loads((results / "figures/quick/04/values.json").read_text()) == {
        "kind": "exact", "notebook": "04", "values": {"a": 0.5},
    }  # fmt: skip
    draw(page, keep=True)
    assert written(results)[1] == "figures/quick/04/line.png"
    png = (results / "figures/quick/04/line.png").read_bytes()
    assert hashlib.sha256(png).hexdigest() == record["sha256"]
    assert "figures and values" not in capsys.readouterr().out


def test_a_figure_and_values_need_two_names(results):
    page = report.Report("04", "quick")
    page.record("line", {"a": 0.5}, kind="exact")
    with pytest.raises(ValueError, match="'line' is the name of a figure and of values"):
        draw(page)
    page.record("line", {"a": 0.6}, kind="exact")  # a cell that is run again


def test_elsewhere_there_are_pictures_too(results, tmp_path_factory, monkeypatch):
    aside = tmp_path_factory.mktemp("build")
    monkeypatch.setenv("MVREPRO_OUT", str(aside))
    draw(report.Report("04", "quick"))
    assert written(aside) == [f"figures/quick/04/line.{form}" for form in ("json", "pdf", "png")]
    assert written(results) == []


def test_without_the_pipeline_the_scratch_folder_is_named(results, tmp_path_factory, monkeypatch, capsys):
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(report, "SCRATCH", scratch)
    monkeypatch.delenv("MVREPRO_OUT")
    draw(report.Report("04", "quick"))
    line = capsys.readouterr().out.splitlines()[0]
    assert line == f"figures and values of this notebook go to {scratch}/figures/quick/04"
    assert written(results) == [] != written(scratch)


def test_without_the_pipeline_each_result_is_compared_with_the_committed_one(
    results, tmp_path_factory, monkeypatch, capsys
):
    page = report.Report("04", "quick")
    draw(page)
    page.record("values", {"a": 0.5}, kind="exact")
    monkeypatch.setattr(report, "SCRATCH", tmp_path_factory.mktemp("scratch"))
    monkeypatch.delenv("MVREPRO_OUT")
    page = report.Report("04", "quick")
    capsys.readouterr()
    draw(page)
    draw(page, height=1.1)
    page.record("values", {"a": 0.6}, kind="exact")
    page.record("other", {"a": 0.6}, kind="exact")
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("<")] == [
        "line: as committed",
        "line: differs from the committed result: data.y[1] is 1.0 there and 1.1 here",
        "values: differs from the committed result: values.a is 0.5 there and 0.6 here",
        "other: nothing of this name is committed",
    ]


def test_validation_compares_and_writes_nothing(results, monkeypatch):
    page = report.Report("04", "quick")
    draw(page, keep=True)
    page.record("values", {"a": 0.5}, kind="exact")
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    monkeypatch.setenv("MVREPRO_VALIDATE", "1")
    monkeypatch.setenv("MVREPRO_OUT", "nowhere")
    page = report.Report("04", "quick")
    draw(page, keep=True)
    page.record("values", {"a": 0.5 + 1e-9}, kind="exact")
    with pytest.raises(UserError, match=r"line\.json is not what this notebook computes: data\.y\[1\] is 1.0 there"):
        draw(page, height=1.1)
    with pytest.raises(UserError, match=r"line\.json is not what this notebook computes: alt is 'a line' there"):
        draw(page, height=1.1, alt="a curve")  # of two differences the first by name
    with pytest.raises(UserError, match=r"values\.json is not what this notebook computes: values\.a is 0.5 there"):
        page.record("values", {"a": 0.6}, kind="exact")
    with pytest.raises(UserError, match=r"other\.json is missing: `make reproduce` writes it"):
        page.record("other", {"a": 0.6}, kind="exact")
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


PARAMETERS = 'profile: str = "quick"\nm: float = 0.35  # the margin'


@pytest.mark.parametrize(
    "cells",
    [
        ["", PARAMETERS, "import math"],
        ["", PARAMETERS, "# Parameters\nm = 0.5\n", "import math"],
        ["", PARAMETERS, "# Parameters\nm = 0.5\n", "import math", "# Parameters\nm = 0.5\n"],  # run again by hand
        [],
    ],
)
def test_parameters_that_a_notebook_has(cells):
    report.check_parameters(cells)


def test_a_parameter_that_a_notebook_lacks():
    with pytest.raises(UserError, match=r"^no parameter margin here; there are: m, profile$"):
        report.check_parameters(["", PARAMETERS, "# Parameters\nm = 0.5\nmargin = 0.5\n", "import math"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("playing") / "project")


def papermill(tree, folder, *parameters):
    """papermill alone on a copy of notebook 04 that lies somewhere else."""
    source = Path(shutil.copy(ROOT / "notebooks" / "04-margin-based.ipynb", folder))
    return run(tree, sys.executable, "-m", "papermill", str(source), str(folder / "out.ipynb"), *parameters)


def test_playing_with_a_notebook_changes_nothing_that_is_committed(tree, tmp_path):
    code, output = papermill(tree, tmp_path, "-p", "m", "0.5")
    assert code == 0, output
    assert run_git(tree, "status", "--porcelain") == ""
    assert "figures and values of this notebook go to scratch/figures/quick/04" in (tmp_path / "out.ipynb").read_text()
    assert written(tree / "scratch")[:3] == [
        f"figures/quick/04/margin-cosines.{form}" for form in ("json", "pdf", "png")
    ]


def test_a_misspelt_parameter_is_an_error_without_the_pipeline(tree, tmp_path):
    code, output = papermill(tree, tmp_path, "-p", "mm", "0.5")
    assert code != 0
    assert "UserError: no parameter mm here; there are: example, m, profile, t" in output


def test_the_sliders_of_notebook_02_draw_what_they_are_set_to(monkeypatch, tmp_path):
    """In a live notebook; its cells up to that one, with the parameter that asks for it."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MVREPRO_OUT", str(tmp_path))
    (path,) = (ROOT / "notebooks").glob("02-*.ipynb")
    space = {"__name__": "notebook"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "sliders" not in space.get("done", ()):
            code = "".join(cell["source"]) + ("\nsliders = True" if cell["id"] == "parameters" else "")
            exec(compile(code, cell["id"], "exec"), space)
            space["done"] = {*space.get("done", ()), cell["id"]}
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gca().get_title()))
    loss, m, t, _ = space["controls"].widget.children
    loss.value, m.value, t.value = "MV-Arc-Softmax-f", 0.5, 0.3
    assert drawn[-1] == "MV-Arc-Softmax-f, m = 0.50, t = 0.30" and len(drawn) >= 2
    plt.close("all")
