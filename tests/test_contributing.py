"""What CONTRIBUTING.md gives to copy is what works: its stages, its claim, and the template of a notebook."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from test_pipeline import closure, imported

from mvrepro.commands import train
from mvrepro.evidence import claims

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TEMPLATE = ROOT / "notebooks" / "templates" / "compare.ipynb"


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", TEXT, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def code():
    cells = json.loads(TEMPLATE.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def stages():
    """The stages of dvc.yaml with those of CONTRIBUTING.md after them."""
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    more = [block for block in blocks("yaml") if "cmd:" in block]
    assert len(more) == 2
    return yaml.safe_load("\n".join([text, *more]))["stages"]


def test_the_stage_of_a_variant_trains_with_options_that_exist(stages):
    words = stages["quick-t-grows"]["cmd"].split()
    options = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert options <= {*train.OPTIONS, *train.FLAGS, "profile", "loss", "seed", "out"}
    assert stages["quick-t-grows"]["deps"] == stages["quick-train"]["deps"]


def test_the_stage_of_a_notebook_depends_on_the_code_behind_the_template(stages):
    listed = {path for path in stages["quick-12"]["deps"] if path.endswith(".py")}
    assert listed == closure({"mvrepro/commands/notebook.py"} | imported("\n".join(code())))


def test_the_stage_of_a_notebook_lists_the_figures_of_the_template(stages):
    written = {path for out in stages["quick-12"]["outs"] for path in out if "/figures/" in path}
    names = re.findall(r'f"\{number\}-(\w+)"', "\n".join(code()))
    assert written == {f"results/figures/quick/12-{n}.{kind}" for n in names for kind in ("json", "pdf", "png")}


def test_the_template_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("MVREPRO_OUT", str(tmp_path))
    shown = {}
    exec(compile("\n".join(code()), str(TEMPLATE), "exec"), shown)
    assert len(shown["table"]) == len(shown["rows"])
    assert {path.name for path in (tmp_path / "figures" / "quick" / "12").iterdir()} == {
        f"{name}.{kind}" for name in ("differences", "curves") for kind in ("json", "pdf", "png")
    }


def test_the_template_says_which_runs_are_missing(monkeypatch):
    changed = "\n".join(code()).replace('["AM-Softmax", ""]', '["AM-Softmax", "of nobody"]')
    with pytest.raises(Exception, match="no runs of the variant 'of nobody'"):
        exec(compile(changed, str(TEMPLATE), "exec"), {})


def test_the_claim_has_what_its_rule_asks_for(tmp_path, monkeypatch):
    (block,) = blocks("toml")
    (claim,) = claims.tomllib.loads(block)["claim"]
    monkeypatch.setattr(claims, "load", lambda: [claim])
    (verdict,) = claims.evaluate("quick", folder=tmp_path)
    assert (verdict.verdict, verdict.found) == ("not tested", "the profile has no such runs")


def test_parameters_named_in_the_text_exist():
    for notebook, name in re.findall(r"notebook (\d\d) -p (\w+)", TEXT):
        (source,) = (ROOT / "notebooks").glob(f"{notebook}-*.ipynb")
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        (parameters,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert name in {node.target.id for node in ast.parse(parameters).body if isinstance(node, ast.AnnAssign)}
