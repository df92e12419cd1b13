"""mvrepro.evidence.published and the numbers in paper/published.toml."""

import pytest

from mvrepro.errors import UserError
from mvrepro.evidence import published

FILE = """
[marks]
A = "first-hand"
C = "later"

[[facts]]
kind = "training"
what = "images"
value = 3923399
mark = "A"
source = "README"

[[facts]]
kind = "training"
what = "epochs"
value = [4, 8]
mark = "C"
source = "a blog"
note = "guess"

[[results]]
kind = "lfs"
title = "A table"
source = "LFS"
mark = "A"
columns = ["Id", "Ver"]
[results.losses]
Softmax = [91.10, 92.30]
AM-Softmax = [96.77, 97.20]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "published.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_rows_keep_the_order_of_the_file(file):
    rows = published.load(file)
    assert [(r.what, r.column, r.value) for r in rows] == [
        ("images", "", 3923399),
        ("epochs", "", [4, 8]),
        ("Softmax", "Id", 91.10),
        ("Softmax", "Ver", 92.30),
        ("AM-Softmax", "Id", 96.77),
        ("AM-Softmax", "Ver", 97.20),
    ]
    assert {(r.kind, r.mark, r.source) for r in rows[2:]} == {("lfs", "A", "LFS")}


def test_facts_as_a_table(file):
    table = published.table("training", file)
    assert list(table["Value"]) == ["3,923,399", "4, 8"]
    assert list(table["Note"]) == ["", "guess"]


def test_results_as_a_table(file):
    table = published.table("lfs", file)
    assert table.to_dict("list") == {
        "Loss": ["Softmax", "AM-Softmax"],
        "Id": ["91.10", "96.77"],
        "Ver": ["92.30", "97.20"],
    }
    assert published.captions(file) == {"lfs": "**A table** (per cent; LFS; mark A)"}


def test_differences_in_points(file):
    assert published.differences("lfs", "AM-Softmax", "Softmax", file) == {"Id": 5.67, "Ver": 4.9}
    with pytest.raises(UserError, match="lfs: has no MV; it has: Softmax, AM-Softmax"):
        published.differences("lfs", "MV", "Softmax", file)


def test_unknown_kind_names_the_known_ones(file):
    with pytest.raises(UserError, match="nothing of kind 'lsf'; known are: training, lfs"):
        published.table("lsf", file)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('mark = "C"', 'mark = "E"', "training, epochs: needs a source and a mark out of A, C"),
        ('source = "a blog"', 'source = ""', "training, epochs: needs a source"),
        ("AM-Softmax = [96.77, 97.20]", "AM-Softmax = [96.77]", "lfs, AM-Softmax: 1 values for 2 columns"),
    ],
)
def test_what_must_not_be_published(file, old, new, complaint):
    file.write_text(FILE.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        published.load(file)


def test_the_project_s_file():
    """Spot values, and what must add up."""
    values = {(r.kind, r.what, r.column): r.value for r in published.load()}
    left = values["training", "MS-Celeb-1M-v1c (DeepGlint's cleaning): identities", ""]
    left -= values["training", "identities removed because they overlap the test sets by name", ""]
    assert left == values["training", "MS-Celeb-1M-v1c-R: identities that remain", ""] == 72690
    assert values["hyper-parameters", "scale s", ""] == 32
    assert values["hyper-parameters", "strength t of the emphasis, FaceX-Zoo", ""] == 0.12
    assert values["mv-am-megaface", "MV-AM-Softmax-a", "MegaFace Ver"] == 98.31
    assert values["lfs", "A-Softmax", "Trillion Ver"] == 45.59
    facex = published.differences("facex-zoo", "MV-Softmax", "AM-Softmax")
    assert facex == {"LFW": -0.01, "CPLFW": -0.3, "CALFW": -0.11, "AgeDB-30": 0.12, "MegaFace rank-1": 1.47}
    assert set(published.captions()) == {r.kind for r in published.load() if r.column}
    assert set("ABCD") < set(published.marks())
    percentages = [r.value for r in published.load() if r.column]
    assert all(40 < value < 100 for value in percentages)
