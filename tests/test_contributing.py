"""What CONTRIBUTING.md gives to copy is what works: its rows of params.yaml, its claim, and a notebook's template."""

import ast
import json
import re
from pathlib import Path

import pytest
from test_pipeline import imported, parts_behind

from mvrepro.evidence import claims
from mvrepro.files import tomllib
from mvrepro.pipeline import plan

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TEMPLATE = ROOT / "notebooks" / "templates" / "compare.ipynb"


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", TEXT, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def code():
    cells = json.loads(TEMPLATE.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def params(below, row):
    """params.yaml with one more line of CONTRIBUTING.md after this one, indented as the next."""
    lines = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines()
    place = next(i for i, line in enumerate(lines) if line == below) + 1
    indent = len(lines[place]) - len(lines[place].lstrip())
    return "\n".join([*lines[:place], " " * indent + row.strip(), *lines[place:]])


@pytest.fixture
def with_params(tmp_path, monkeypatch):
    """Let the pipeline read another params.yaml."""

    def use(text):
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        original = plan.read_yaml
        monkeypatch.setattr(plan, "read_yaml", lambda p: original(tmp_path / p.name if p.name == "params.yaml" else p))

    return use


def test_the_row_of_a_variant_is_three_runs_more(with_params):
    (row,) = [block for block in blocks("yaml") if "variant" in block]
    before = {step.name for step in plan.runs("quick")}
    with_params(params("  runs:", row))
    steps = plan.runs("quick")
    more = [step for step in steps if step.name not in before]
    assert [step.name for step in more] == [f"quick/MV-AM-Softmax-a_t0.2_t-grows_seed{seed}" for seed in range(3)]
    assert {step.config.t_warmup for step in more} == {100}


def test_another_t_is_twelve_runs_more(with_params):
    """The rows of the text are those of params.yaml, but for the value added."""
    (block,) = [block for block in blocks("yaml") if "*mv" in block]
    written = next(line for line in block.splitlines() if "*mv" in line).partition(" #")[0]
    row = next(line for line in (ROOT / "params.yaml").read_text().splitlines() if "t: [0.1, 0.3, 0.5]" in line)
    changed = row.replace("0.5]", "0.5, 0.7]")
    assert changed == written
    before = len(plan.runs("quick"))
    with_params((ROOT / "params.yaml").read_text().replace(row, changed))
    assert len(plan.runs("quick")) == before + 4 * 3


def test_the_line_of_a_page_is_its_stage(with_params):
    (line,) = [block for block in blocks("yaml") if "quick-13" in block]
    with_params(params("pages:", line))
    *runs, page = plan.select("quick", "13")
    assert page.name == "page@quick-13" and plan.profiles(runs) == ["quick"]
    executed, figures = page.writes
    assert executed == ROOT / "results" / "executed" / "quick" / "13-t-grows.ipynb"
    assert figures == ROOT / "results" / "figures" / "quick" / "13"
    assert ROOT / "notebooks" / "13-t-grows.ipynb" in page.reads
    assert parts_behind(imported("\n".join(code()))) <= set(page.parts)


def test_the_template_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("MVREPRO_OUT", str(tmp_path))
    shown = {}
    exec(compile("\n".join(code()), str(TEMPLATE), "exec"), shown)
    assert len(shown["table"]) == len(shown["rows"])
    assert {path.name for path in (tmp_path / "figures" / "quick" / "13").iterdir()} == {
        f"{name}.{kind}" for name in ("differences", "curves") for kind in ("json", "pdf", "png")
    }


def test_the_template_says_which_runs_are_missing(monkeypatch):
    changed = "\n".join(code()).replace('["AM-Softmax", ""]', '["AM-Softmax", "of nobody"]')
    with pytest.raises(Exception, match="no runs of the variant 'of nobody'"):
        exec(compile(changed, str(TEMPLATE), "exec"), {})


def test_the_claim_has_what_its_rule_asks_for(tmp_path, monkeypatch):
    (block,) = blocks("toml")
    (claim,) = tomllib.loads(block)["claim"]
    monkeypatch.setattr(claims, "load", lambda: [claim])
    (verdict,) = claims.evaluate("quick", folder=tmp_path)
    assert (verdict.verdict, verdict.found) == ("not tested", "the profile has no such runs")


def test_parameters_named_in_the_text_exist():
    for notebook, name in re.findall(r"notebook (\d\d) -p (\w+)", TEXT):
        (source,) = (ROOT / "notebooks").glob(f"{notebook}-*.ipynb")
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        (parameters,) = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
        assert name in {node.target.id for node in ast.parse(parameters).body if isinstance(node, ast.AnnAssign)}
