"""What README.md and docs/ say is so: their numbers are those of the results, their commands and links exist."""

import argparse
import importlib
import math
import re
from pathlib import Path

import pytest

from mvrepro.__main__ import COMMANDS
from mvrepro.evidence import claims, published, runs
from mvrepro.files import RESULTS, read_json

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["read", "background", "article", "model-card", "data-sheet", "play", "reproduce", "data", "head"]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in NAMES]
PAGES = [ROOT / "README.md", *GUIDES]
README = re.sub(rf"{claims.BEGIN}.*{claims.END}", "", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
ANSWER = " ".join(re.search(r"^## The answer so far\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1].split())


def last(profile, loss, quantity, t=""):
    """Of the last epoch of the plain runs of a loss."""
    found = [read_json(path) for path in (RESULTS / "runs" / profile).glob(f"{loss}{t}_seed*.json")]
    assert found
    return [record["curve"][quantity][-1] for record in found]


def score(profile, loss, t=None):
    """The mean over seeds, in per cent; a hair more, so that halves are rounded up."""
    column, _ = claims.metric(profile)
    table = runs.table(profile)
    chosen = table[(table["loss"] == loss) & (table["default"] if t is None else table["t"] == t)]
    return 100 * chosen[column].mean() + 1e-9


def test_readme_is_short():
    assert len(README.split()) <= 1200


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_sentences_are_short(path):
    text = README if path.name == "README.md" else path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|<!--.*?-->|^#.*?$|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    parts = re.split(r"(?<=[.!?])[*\"”)]*\s|\n\s*\n|\n(?=\s*(?:[-|]|\d+\.))|\|", text)
    assert [part for part in parts if len(part.split()) > 35] == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    inside = [link.partition("#")[0] for link in links if "://" not in link]
    assert inside
    assert [link for link in inside if link and not (path.parent / link).exists()] == []


def test_commands_and_options_are_there():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    assert set(re.findall(r"python -m mvrepro ([a-z]+)", text)) <= set(COMMANDS)
    assert set(re.findall(r"python -m benchmarks ([a-z]+)", text)) <= {"head", "loop"}
    known = {"--nproc-per-node"}  # of torchrun
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"mvrepro.commands.{name}").add_arguments(parser)
        inner = [a.choices.values() for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for each in [parser, *(sub for subs in inner for sub in subs)]:
            known |= set(each.format_help().replace("[no-]", "").replace(",", " ").split())
    known |= {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", re.sub(r"<!--|-->", "", text))) <= known


def test_code_runs_as_it_stands():
    for path in (PAGES[0], ROOT / "docs" / "head.md"):
        shown = {}
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            if "init_process_group" not in block:  # that one is for torchrun
                exec(compile(block, path.name, "exec"), shown)
        assert math.isfinite(shown["loss"].item())


def test_the_answer_is_that_of_the_runs():
    """The numbers of the longer training and the top-1 of 6 epochs come from runs that are not committed yet."""
    faces, values = runs.records("faces"), read_json(RESULTS / "values" / "faces" / "data.json")["values"]
    record = read_json(RESULTS / "runs" / "faces" / "AM-Softmax_seed0.json")
    sizes, curve, default = record["sizes"], record["curve"], runs.table("faces").query("default")
    (verdict,) = [v for v in claims.evaluate("quick") if v.id == "mv-am-a"]
    accuracies = 100 * default.groupby("loss")[claims.metric("faces")[0]].mean()
    (facex,) = [r.value for r in published.load() if (r.kind, r.what, r.column) == ("facex-zoo", "MV-Softmax", "LFW")]
    points = {name: 100 * verdict.numbers[name] for name in ("difference", "low", "high")}
    assert {r["config"]["epochs"] for r in faces} == {6} and len(accuracies) == 17
    for said in (
        f"The {len(faces)} runs of `faces`",
        f"{sizes['train_images']:,} photographs of {sizes['train_classes']:,} people",
        f"{100 * curve['marked_share'][-1]:.0f} % of the wrong classes",
        f"Its loss is {curve['loss'][-1]:.1f}, where an even guess costs {math.log(sizes['train_classes']):.2f}",
        f"{accuracies.min():.1f} to {accuracies.max():.1f} % on LFW View 2 there",
        f"raw pixels {100 * values['pixels alone']['lfw_accuracy']:.1f} %",
        f"[{facex:.2f} %]",
        f"{score('quick', 'MV-AM-Softmax-a', 0.3):.1f} against {score('quick', 'AM-Softmax'):.1f} % TPR",
        f"{points['difference']:+.1f} points, {points['low']:.1f} to {points['high']:+.1f}".replace("-", "−"),
    ):
        assert said in ANSWER, said
    (pixels,) = re.findall(
        r"Pixels alone: ([\d.]+) %", (RESULTS / "executed" / "quick" / "00-claims.ipynb").read_text(encoding="utf-8")
    )
    assert f"raw pixels score {pixels} %" in ANSWER


def test_in_quick_the_adaptive_form_leads_where_the_answer_says_so():
    for margin, expected in (("AM", [0.1, 0.2, 0.3, 0.5]), ("Arc", [0.2, 0.3])):
        adaptive = {t: score("quick", f"MV-{margin}-Softmax-a", t) for t in (0.1, 0.2, 0.3, 0.5)}
        assert [t for t, found in adaptive.items() if found > score("quick", f"{margin}-Softmax")] == expected
        assert max(adaptive, key=adaptive.get) == 0.3
        plain = [f"{margin}-Softmax"], [f"MV-{margin}-Softmax-f", f"MV-{margin}-Softmax-a"]
        for losses, t in zip(plain, ("", "_t0.2"), strict=True):
            assert max(share for loss in losses for share in last("quick", loss, "marked_share", t)) < 0.01
