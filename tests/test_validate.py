"""`make validate` has teeth: a changed formula, number, verdict or table fails it, an untouched tree passes."""

import os
import signal
import sys

import pytest
from trees import copy_tree, make, start


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "project")


def replace(tree, name, old, new):
    path = tree / name
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{name} no longer holds {old!r}: this test mutates nothing"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_untouched_tree_passes_and_so_does_a_comment(tree):
    """Neither a comment nor a docstring makes anything stale, nor does Ctrl-C."""
    path = tree / "mvrepro" / "losses.py"
    path.write_text(
        "# A comment.\n" + path.read_text(encoding="utf-8").replace('"""', '"""Also, ', 1), encoding="utf-8"
    )
    process = start(tree, "env", "PYTHONUNBUFFERED=1", sys.executable, "-m", "mvrepro", "validate", "--notebook", "01")
    assert process.stdout and process.stdout.readline()  # of pytest: the pages are on their way
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    said = "mvrepro validate: stopped; nothing half-written was kept"
    assert (process.returncode, output.splitlines()[-1]) == (130, said) and "Traceback" not in output
    code, output = make(tree, "validate", "NB=01")
    assert code == 0, output
    assert " passed" in output


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("else (1 + t) * cos + t", "else (1 + t) * cos"),
        ("cos * math.cos(m3) - sin * math.sin(m3) - m2", "cos * math.cos(m3) + sin * math.sin(m3) - m2"),
    ],
    ids=["adaptive emphasis", "angular margin"],
)
def test_a_mutated_formula_fails(tree, old, new):
    replace(tree, "mvrepro/losses.py", old, new)
    code, output = make(tree, "validate", "NB=01")
    assert code != 0
    assert "stale: page@quick-01" in output, "the results belong to another formula"
    assert "01-losses.ipynb" in output.split("stale: page@quick-01")[1], "and the notebook itself notices"
    assert " failed" in output
    assert "Traceback (most recent call last)" not in output.split("short test summary")[0].split("=== FAILURES")[0]


def test_a_stale_plot_helper_and_mutated_tables_fail(tree):
    """One call says what is wrong with each of them."""
    replace(tree, "mvrepro/pages/plots.py", "DPI = 150", "DPI = 151")
    replace(tree, "results/claims.json", '"verdict": "reproduced"', '"verdict": "not tested"')
    replace(tree, "README.md", "**reproduced**", "**not reproduced**")
    code, output = make(tree, "validate", "NB=01")
    assert code != 0
    for said in ("stale: page@quick-01", "results/claims.json is not what", "README.md is not what"):
        assert said in output, said


def test_a_mutated_number_of_a_figure_fails(tree):
    replace(tree, "results/figures/quick/01/derivations.json", '"t_zero_error": 1e-16', '"t_zero_error": 1e-05')
    code, output = make(tree, "validate", "NB=01")
    assert code != 0 and "stale: page@quick-01" in output
