"""What README.md and docs/ say is so: their numbers are those of the results, their commands and links exist."""

import argparse
import importlib
import math
import re
from pathlib import Path

import numpy as np
import pytest

from mvrepro.__main__ import COMMANDS
from mvrepro.evidence import claims, published, runs
from mvrepro.files import RESULTS, read_json, read_toml
from mvrepro.pages import comparison

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["read", "background", "article", "model-card", "data-sheet", "play", "reproduce", "data", "head"]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in NAMES]
PAGES = [ROOT / "README.md", *GUIDES]
TABLES = rf"{claims.BEGIN}.*{claims.END}|<!-- answer: .*<!-- end of answer -->"
README = re.sub(TABLES, "", PAGES[0].read_text(encoding="utf-8"), flags=re.DOTALL)
ANSWER = " ".join(re.search(r"^## The answer so far\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1].split())


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
    known = {"--nproc-per-node", "--strict", "--no-deps", "--disable-pip"}  # of torchrun and pip-audit
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


def points(verdict):
    n = {name: f"{100 * verdict.numbers[name]:+.1f}" for name in ("difference", "low", "high")}
    n = {name: re.sub(r"^[+-]0\.0$", "0.0", text) for name, text in n.items()}
    return f"{n['difference']} points, {n['low']} to {n['high']}".replace("-", "−")


def test_the_answer_is_that_of_the_runs():
    values = read_json(RESULTS / "values" / "faces" / "data.json")["values"]
    record = read_json(RESULTS / "runs" / "faces" / "AM-Softmax_seed0.json")
    sizes, faces, every = record["sizes"], runs.table("faces").query("default"), runs.records("faces")
    long = [each for each in every if not each["config"]["after"]]
    (go_on,) = {each["config"]["epochs"] for each in every if each["config"]["after"]}
    gate, seeds = read_toml(ROOT / "paper" / "claims.toml")["gate"], faces.groupby("loss")["seed"].nunique()
    marked = 100 * faces.groupby("loss")["marked_share"].mean()
    turned = [r for r in runs.default_records("faces") if r["config"]["loss"] == "MV-AM-Softmax-a"]
    below = [runs.numbers(each["learned"]["histogram"]["own"]) for each in turned]
    found = {v.id: v for v in claims.evaluate("quick")}
    gains = {name: 100 * v.numbers["difference"] for name, v in found.items() if "difference" in v.numbers}
    other = faces.groupby("loss")["other_cosine"].mean()
    (facex,) = [r.value for r in published.load() if (r.kind, r.what, r.column) == ("facex-zoo", "MV-Softmax", "LFW")]
    assert record["evidence"]["rank1"]["distractors"][-1] == 7975
    for said in (
        f"as far as {seeds.min()} to {seeds.max()} seeds can tell",
        f"`faces` has {len(long)} runs of {record['config']['epochs']} epochs, on "
        f"{sizes['train_images']:,} photographs of {sizes['train_classes']:,} people, "
        f"and {len(every) - len(long)} that go on for {go_on} more. "
        f"All but {['none', 'one'][sum(r['learned']['top1'] < gate['top1'] for r in every)]} have learned",
        f"AM-Softmax ends with {marked['AM-Softmax']:.1f} % of the wrong classes marked",
        f"ends at {other['MV-AM-Softmax-a']:.2f} (MV-Arc-a: {other['MV-Arc-Softmax-a']:.2f})".replace("-0", "−0"),
        f"{100 * np.mean([h[: len(h) // 2].sum() / h.sum() for h in below]):.0f} % of the training images have cosθ_y",
        f"raw pixels reach {100 * values['pixels alone']['lfw_accuracy']:.1f} % on View 2",
        f"[{facex:.2f} %]",
        f"AM by {gains['am-softmax']:.1f} points of TPR at FPR 1 %, Arc by {gains['arc-softmax']:.1f}",
        f"HM and F by {gains['mv-hm']:.1f} and {gains['mv-f']:.1f}",
        points(found["mv-am-a"]),
    ):
        assert said in ANSWER, said
    reading = (RESULTS / "executed" / "faces" / "10-distractors.ipynb").read_text(encoding="utf-8")
    assert "With other people drawn as well as seeds: AM and Softmax cannot be told apart" in reading


def test_what_is_said_of_the_raw_pixels_is_what_the_page_counted():
    page = (RESULTS / "executed" / "quick" / "00-claims.ipynb").read_text(encoding="utf-8")
    (counted,) = re.findall(r"TPR, FPR 1 %: (\d+ of \d+ losses are above the pixels) in the mean", page)
    for path in PAGES[0], ROOT / "docs" / "background.md":
        assert f"only {counted.replace('the', 'the raw')} in the mean" in path.read_text(encoding="utf-8"), path


def test_what_the_answer_says_of_the_verdicts_is_so():
    found = {profile: {v.id: v.verdict for v in claims.evaluate(profile)} for profile in ("faces", "quick")}
    level = {claims.UNDECIDED, claims.NOT_REPRODUCED}
    assert {found["faces"]["mv-am-f"], found["faces"]["mv-arc-f"]} <= level
    assert found["faces"]["am-softmax"] == claims.REPRODUCED
    assert {found["faces"]["after-f"], found["faces"]["after-a"]} == {claims.NOT_REPRODUCED}
    assert {found["faces"]["mv-am-a"], found["faces"]["mv-arc-a"]} == {claims.NOT_REPRODUCED}
    assert found["faces"]["from-scratch"] == claims.REPRODUCED
    assert {found["quick"][name] for name in ("am-softmax", "arc-softmax", "mv-hm", "mv-f")} == {claims.REPRODUCED}
    assert found["quick"]["mv-am-a"] == claims.UNDECIDED


def test_what_the_answer_says_of_single_comparisons_is_so():
    def readings(profile, column, pairs):
        found = comparison.differences(runs.table(profile, kind=None), column, pairs)
        return {row.better: row for row in found.itertuples()}

    column = claims.metric("faces")[0]
    go_on = comparison.Pair(("AM-Softmax", comparison.AFTER), ("AM-Softmax", ""))
    every = [*comparison.MARGIN, *comparison.MV, *comparison.CHANGED, *comparison.MV_AFTER, go_on]
    found = readings("faces", column, every)
    easy, stopped = (found[pair.better] for pair in comparison.CHANGED)
    plain = ("MV-AM-Softmax-a", "")
    assert (easy.reading, stopped.reading) == (comparison.BEHIND, comparison.NO_GAIN)
    (gain,) = readings("faces", column, [comparison.Pair(comparison.CHANGED[1].better, plain)]).values()
    assert f"gains {gain.mean:.1f} points, in {['', 'one', 'two', 'three'][gain.n]} seeds" in ANSWER
    every, weaker = runs.table("faces", kind=None), (("MV-AM-Softmax-a", 0.1), ("AM-Softmax", 0.0))
    apart, mine = (
        comparison.difference_at(every, column, *weaker),
        every.query("loss == 'MV-AM-Softmax-a' and t == 0.1"),
    )
    assert f"**At t = 0.1**, tried afterwards, that mean ends at {mine['other_cosine'].mean():.2f}".replace(
        "-", "−"
    ) in ANSWER.replace("-", "−")
    assert apart.low > 0, "rank-1 leads AM's"
    others = [comparison.difference_at(every, measure, *weaker) for measure in list(comparison.MEASURES)[1:]]
    assert all(e.low < 0 < e.high for e in others), "other measures don't"
    cosines = runs.of(runs.table("faces", kind=None), *comparison.CHANGED[1].better)["other_cosine"]
    assert cosines.min() > -0.02, "its cosines do not fall"
    assert found[go_on.better].reading == comparison.NO_GAIN, "nor with AM itself"
    behind = [side for side, row in found.items() if row.own_high < 0]
    assert behind == [("MV-Arc-Softmax-a", ""), comparison.CHANGED[0].better], "by it only MV-Arc-a and …"
    assert found["AM-Softmax", ""].own_low < 0 < found["AM-Softmax", ""].own_high
    mining = [("HM-Softmax", "Softmax"), ("F-Softmax", "Softmax")]
    mining += [("HM-AM-Softmax", "AM-Softmax"), ("F-AM-Softmax", "AM-Softmax")]
    gained = {row.reading for row in readings("faces", column, comparison.pairs(mining)).values()}
    assert gained == {comparison.NO_GAIN}, "Mining gains nothing that matters, alone or with AM"
    for miner in ("HM-Softmax", "F-Softmax"):
        over = comparison.pairs((loss, miner) for loss in ("AM-Softmax", "MV-AM-Softmax-f", "MV-AM-Softmax-a"))
        says = [row.reading for row in readings("faces", column, over).values()]
        assert says == [comparison.AHEAD, comparison.AHEAD, comparison.NO_GAIN], "nor does MV-AM-a, as AM and … do"
    (quick,) = readings("quick", "tpr@fpr=0.001", comparison.pairs([("MV-AM-Softmax-a", "HM-Softmax")])).values()
    assert quick.low < 0 < quick.high, "At FPR 0.1 % it is level with HM"
