"""params.yaml and dvc.yaml say what is computed from what; these tests say whether they say the truth."""

import ast
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from trees import commit, run_git

import mvrepro
from mvrepro import provenance
from mvrepro.commands import runs as runs_command
from mvrepro.commands.reproduce import pages, sampled, take
from mvrepro.commands.runs import part
from mvrepro.errors import UserError
from mvrepro.evidence.compare import compare, same
from mvrepro.files import read_yaml
from mvrepro.losses import LOSSES
from mvrepro.pipeline import freshness, plan, workers
from mvrepro.pipeline.freshness import Memory
from mvrepro.pipeline.plan import Step
from mvrepro.provenance import TRAINING, code_hash, code_parts, config_hash

ROOT = Path(__file__).resolve().parent.parent
# They compute nothing: the doors, which only pick what is called, and what reads, writes, converts and complains.
PLUMBING = {"commands", "errors", "files", "interchange", "pipeline", "provenance", "terminal"}


def imported(source: str) -> set[str]:
    """The files of mvrepro that a source imports, anywhere in it (type-checking blocks excepted)."""
    found = set()
    tree = ast.parse(source)
    skip = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("mvrepro", "benchmarks")):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if node.module == "mvrepro":  # the public door
                homes = [mvrepro._PUBLIC.get(alias.name, "") for alias in node.names]
                names += [f"mvrepro.{home}" for home in homes if home]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            # A package runs its __init__ whichever of its modules is asked for.
            packages = [name.rsplit(".", depth)[0] + ".__init__" for depth in range(1, name.count(".") + 1)]
            for module in (name, f"{name}.__init__", *packages):
                path = ROOT / (module.replace(".", "/") + ".py")
                if path.is_file():
                    found.add(str(path.relative_to(ROOT)))
    return found


def closure(files: set[str]) -> set[str]:
    """These files and all of mvrepro that they import, directly or not."""
    seen: set[str] = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += imported((ROOT / file).read_text(encoding="utf-8"))
    return seen


def parts_behind(files: set[str]) -> set[str]:
    """The parts of the code that these files and all that they import belong to."""
    names = [Path(file).parts[1] if file.startswith("mvrepro/") else Path(file).parts[0] for file in closure(files)]
    return {name.removesuffix(".py") for name in names} - {"__init__", "__main__"} - PLUMBING


def code_behind(stage: Step) -> set[str]:
    """The parts of the code that a stage runs."""
    words = stage.command.split()
    files = {"mvrepro/training/loop.py" if words[3] == "runs" else f"mvrepro/commands/{words[3]}.py"}
    if words[2] == "benchmarks":
        files = {f"benchmarks/{words[3]}.py"}
    if words[3] == "notebook":
        (source,) = (ROOT / "notebooks").glob(f"{words[4]}-*.ipynb")
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        files |= imported("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    return parts_behind(files)


def named(name: str) -> Step:
    return next(stage for stage in plan.stages() if stage.name == name)


# The graph


def test_stages_depend_on_the_code_that_they_run():
    """A page lists the parts behind all pages, so that a new one is a line; the others just what they run."""
    wrong, shown = [], set()
    for stage in plan.stages():
        behind, declared = code_behind(stage) if stage.name != "code" else set(), set(stage.parts)
        if "notebook" in stage.command.split():
            shown |= behind
            behind |= declared
        if behind != declared:
            lacks, more = ", ".join(sorted(behind - declared)), ", ".join(sorted(declared - behind))
            wrong.append(f"{stage.name} lacks: {lacks or 'nothing'}; has too much: {more or 'nothing'}")
    assert not wrong, wrong
    assert shown == set(named("page@quick-01").parts) == set(named("front@faces").parts)


def test_a_run_is_made_by_the_parts_that_its_stage_depends_on():
    for profile in plan.known():
        assert set(named(f"runs@{profile}").parts) == set(TRAINING) == set(plan.runs(profile)[0].parts)


def test_every_notebook_has_a_stage_that_reads_its_source():
    read = {path for stage in plan.stages() for path in stage.reads if path.suffix == ".ipynb"}
    sources = set((ROOT / "notebooks").glob("*.ipynb"))
    assert sources - read == {ROOT / "notebooks" / "00-claims.ipynb"}  # which reads them all
    assert ROOT / "notebooks" in named("front@quick").reads


def test_every_committed_result_is_the_output_of_a_stage():
    written = {path for stage in plan.stages() for path in stage.writes}
    present = {p for p in (ROOT / "results").rglob("*") if p.is_file() and not p.name.startswith(".writing-")}
    alien = [str(p.relative_to(ROOT)) for p in present if not written & {p, *p.parents}]
    assert not alien, sorted(alien)
    assert not [problem for profile in plan.known() for problem in freshness.strays(profile)]


def test_outputs_are_kept_in_git_and_not_in_a_cache():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, stage in stages.items():
        for out in stage.get("do", stage)["outs"]:
            (settings,) = out.values()
            # what is trained stays where a stage begins anew
            assert settings == {"cache": False} | ({"persist": True} if name == "runs" else {}), name


def test_analytics_are_off():
    config = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
    assert "analytics = false" in config


def test_a_plot_helper_is_behind_reports_and_behind_no_training():
    behind = {stage.name for stage in plan.stages() if "pages" in stage.parts}
    assert {"page@quick-04", "front@quick"} <= behind
    assert "pages" not in TRAINING and not [name for name in behind if name.startswith("runs@")]


def test_a_page_is_computed_without_the_runs_that_it_does_not_read():
    for notebook, profiles in (("01", set()), ("02", {"toy"}), ("03", {"quick"}), ("11", set())):
        assert set(plan.profiles(plan.select("quick", notebook))) == profiles, notebook


def test_a_profile_computes_nothing_of_another():
    """The claims rest on all profiles, but `make reproduce` on quick must not train for hours on faces."""
    for profile, other in (("quick", "faces"), ("faces", "quick")):
        steps = plan.select(profile)
        names = [step.name for step in steps]
        assert "claims" in names and not [name for name in names if other in name or name in plan.ASIDE]
        assert plan.profiles(steps) == [profile, *(["cfp", "tuning", "early"] if profile == "faces" else []), "toy"]
    for name in plan.ASIDE:
        assert [step.name for step in plan.select(name)] == [name, "claims"]


def test_what_a_profile_or_a_notebook_is_called():
    with pytest.raises(
        UserError, match=r"profile 'quik' has no stages in dvc.yaml; known are: quick, faces, cfp, tuning, early, toy"
    ):
        plan.select("quik")
    with pytest.raises(UserError, match=r"no notebook '07' on quick; known are: 00, 01, 02, 03, 04, 05, 06, 11"):
        plan.select("quick", "07")


# The runs


def test_a_run_for_every_combination():
    counts = {profile: len(plan.runs(profile)) for profile in plan.known()}
    fixed = {"quick": 7 * 20 + 4 * 10 + 6 * 3 + 4 * 3 * 3, "early": 13 * 3 + (3 + 3) * 3 + 3 + 2, "toy": 7 * 3 + 3}
    assert counts == fixed | {profile: counts[profile] for profile in ("faces", "cfp", "tuning")}
    for profile in counts:
        steps = plan.runs(profile)
        assert len({step.name for step in steps}) == len({step.config for step in steps}) == len(steps)
        assert {step.config.loss for step in steps} <= set(LOSSES)
    assert {step.config.loss for step in plan.runs("quick")} == set(LOSSES)
    first = plan.runs("early")[13 * 3].config
    assert (first.variant, first.t_warmup, first.loss, first.seed) == ("t warmed up", 678, "MV-AM-Softmax-a", 0)


@pytest.fixture
def followed(monkeypatch, tmp_path):
    """A profile of two runs of AM-Softmax, one of Softmax, and those that begin with AM-Softmax's networks."""
    profile = read_yaml(ROOT / "params.yaml")["quick"]
    after = {"variant": "after AM", "after": "AM-Softmax", "seed": [0, 1], "loss": ["AM-Softmax", "MV-AM-Softmax-a"]}
    profile["runs"] = [{"loss": "AM-Softmax", "seed": [0, 1]}, {"loss": "Softmax", "seed": 0}, after]
    monkeypatch.setattr(plan, "read_yaml", lambda path: {"mine": profile})
    monkeypatch.setattr(plan, "LOCAL", tmp_path / "local")
    return profile


def test_runs_that_follow_others_know_whom(followed, tmp_path):
    steps = plan.runs("mine", tmp_path)
    assert [s.name for s in steps if s.keeps] == ["mine/AM-Softmax_seed0", "mine/AM-Softmax_seed1"]
    assert [s.base.run_name() if s.base else None for s in steps] == [
        None, None, None, *["AM-Softmax_seed0"] * 2, *["AM-Softmax_seed1"] * 2,
    ]  # fmt: skip
    assert steps[-1].name == "mine/MV-AM-Softmax-a_t0.2_after-AM_seed1" and steps[-1].needs(steps[1])
    assert not any(steps[-1].needs(other) for other in (steps[0], steps[2], *steps[3:]))
    followed["runs"][2]["after"] = "Arc-Softmax"
    with pytest.raises(UserError, match=r"params.yaml, mine: .*after-AM_seed0 begins after a run that the profile"):
        plan.runs("mine", tmp_path)


def test_a_network_that_is_not_here_is_trained_again(followed, tmp_path):
    steps = plan.runs("mine", tmp_path)
    wanted = [steps[-1]]
    assert freshness.with_bases(wanted, steps) == [steps[1], steps[-1]]
    folder = plan.network_of(steps[1].config)
    folder.mkdir(parents=True)
    made = {"config_hash": config_hash(steps[1].config.decisive()), "code": code_hash()}
    for found, expected in ((made, wanted), (made | {"code": "0"}, [steps[1], *wanted]), (None, [steps[1], *wanted])):
        (folder / "manifest.json").write_text(json.dumps({"made_by": found}) if found else "half of it")
        assert freshness.with_bases(wanted, steps) == expected


def test_a_run_that_began_with_another_network_is_not_current(followed, tmp_path):
    step = plan.runs("mine", tmp_path)[-1]
    began = {"config_hash": config_hash(step.base.decisive())}
    record = {"config": step.config.decisive(), "code": code_hash()}
    step.writes[0].parent.mkdir()
    for found, reason in ((began, {}), ({"config_hash": "0"}, {step.name: "began with a network of other settings"})):
        step.writes[0].write_text(json.dumps(record | {"began_with": found}))
        assert freshness.lacking([step]) == reason


def test_a_setting_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(
        plan, "read_yaml", lambda path: {"mine": {"train": {"lr": 0.1}, "runs": [{"loss": "Softmax", "tt": 1}]}}
    )
    with pytest.raises(UserError, match=r"params.yaml, mine: knows no setting called tt"):
        plan.runs("mine")
    with pytest.raises(UserError, match=r"no runs for the profile 'yours'; known are: mine"):
        plan.runs("yours")


def test_parts_are_all_of_it_once():
    steps = plan.runs("quick")
    shares = [part(steps, f"{i}/16") for i in range(1, 17)]
    assert sorted(step.name for share in shares for step in share) == sorted(step.name for step in steps)
    assert {len(share) for share in shares} == {len(steps) // 16, len(steps) // 16 + 1}
    for wrong in ("0/4", "5/4", "3", "3/", "a/b", "-1/4"):
        with pytest.raises(UserError, match="--part must be I/N"):
            part(steps, wrong)


@pytest.fixture
def record(tmp_path):
    """record(**changes) -> the step of a run whose record lies in tmp_path, with changes to the record."""

    def write(**changes):
        step = plan.runs("quick", tmp_path)[0]
        content = {"config": step.config.decisive(), "code": code_hash(), "metrics": {"x": 0.5}, "curve": {}} | changes
        step.writes[0].parent.mkdir(exist_ok=True)
        step.writes[0].write_text(json.dumps(content))
        return step

    return write


def test_a_run_is_current_by_its_settings_and_its_code(record):
    step = record()
    settings = step.config.decisive()
    assert freshness.lacking([step]) == {}
    older = {name: value for name, value in settings.items() if name != "clip"}  # a setting that came later
    assert freshness.lacking([record(config=older)]) == {}
    for wrong in (settings | {"lr": 0.06}, settings | {"of_old": 1}, {"loss": "Softmax"}):
        assert freshness.lacking([record(config=wrong)]) == {step.name: "was made with other settings"}
    assert freshness.lacking([record(code="0123")]) == {step.name: "was made by other code"}
    step.writes[0].unlink()
    assert freshness.lacking([step]) == {step.name: "has no record"}


def test_a_run_that_is_taken_says_so(record):
    step = record(code="of yesterday")
    take([step])
    assert freshness.lacking([step]) == {}
    assert json.loads(step.writes[0].read_text())["taken"] is True


def test_a_run_that_nothing_writes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(freshness, "RESULTS", tmp_path)
    stray = tmp_path / "runs" / "quick" / "AM-Softmax_t0.7_seed0.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("{}")
    (stray.parent / ".writing-abc").write_text("half")
    assert freshness.strays("quick") == [f"{stray} is written by nothing in params.yaml and dvc.yaml: remove it"]
    assert freshness.strays("faces") == []


# The code


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Write a module of a made-up mvrepro; returns its hash."""
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "mvrepro")
    (tmp_path / "mvrepro" / "heads").mkdir(parents=True)

    def write(text, name="losses.py", part="losses"):
        (tmp_path / "mvrepro" / name).write_text(text)
        return code_hash(part)

    return write


CODE = '''"""What it is."""
def f(x: float) -> float:
    """Doubles."""
    return 2 * x  # twice
'''


def test_comments_docstrings_and_layout_are_no_change(source):
    first = source(CODE)
    assert source(CODE.replace("# twice", "# once and again")) == first
    assert source(CODE.replace("Doubles.", "Two times.").replace("What", "Where")) == first
    assert source(CODE.replace('    """Doubles."""\n', "\n\n")) == first
    assert source(CODE.replace("2 * x", "(2\n        * x)")) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [("2 * x", "3 * x"), ("2 * x", "2.0 * x"), ("2 * x", "x * 2"), ("def f", "def g"), ("float:", "int:")],
)
def test_a_formula_is_a_change(source, old, new):
    assert source(CODE) != source(CODE.replace(old, new, 1))


def test_code_in_a_folder_counts_by_its_place(source):
    first = source(CODE, "heads/margin.py", "heads")
    assert source("x = 1", "heads/sweep.py", "heads") != first
    with pytest.raises(UserError, match="no part 'tails'"):
        code_hash("tails")
    with pytest.raises(UserError, match=r"heads/margin.py, line 1"):
        source("def", "heads/margin.py", "heads")


def test_every_part_that_a_stage_names_is_there():
    assert {part for stage in plan.stages() for part in stage.parts} <= code_parts().keys()


# What was computed here


def test_memory_knows_a_step_by_content_not_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr(freshness, "COMPUTED", tmp_path / "computed.json")
    source, result = tmp_path / "in.py", tmp_path / "out.json"
    source.write_text("1")
    result.write_text("1")
    step = Step("s", (source,), ("losses",), (result,), "command")
    memory = Memory()
    assert not memory.has(step)
    memory.remember(step)
    assert Memory().has(step)
    source.touch()
    assert Memory().has(step)
    assert not Memory().has(replace(step, command="another"))
    result.write_text("2")
    assert not Memory().has(step), "a result that somebody changed is not one computed here"
    result.write_text("1")
    source.write_text("2")
    assert not Memory().has(step)


def test_a_circle_is_named_before_anything_runs(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    steps = [Step("one", (a,), (), (b,), "x"), Step("two", (b,), (), (a,), "x")]
    with pytest.raises(UserError, match=r"dvc.yaml goes in a circle: one, two wait for each other"):
        next(workers.compute(steps, lambda step: True))


def test_a_sample_has_all_reports_and_runs_from_all_over(monkeypatch):
    monkeypatch.setattr(freshness, "lacking", lambda steps: {})
    steps = plan.select("faces")
    runs = [s.name for s in steps if s.config]
    few = sampled(steps, 6)
    picked = [s for s in few if s.config]
    assert len(picked) == 6 and picked[0].name == runs[0]
    assert len({(s.config.variant, s.config.loss) for s in picked}) >= 3
    assert [s for s in few if not s.config] == [s for s in steps if not s.config]
    assert sampled(steps, 10_000) == steps
    with pytest.raises(UserError, match="--sample must be 1 or more, got 0"):
        sampled(steps, 0)


def test_a_sample_has_every_run_without_a_record(monkeypatch):
    """There is nothing that could be taken as it is; what was made by other code can be."""
    steps = plan.select("quick")
    new = [s.name for s in steps if s.config][4:6]
    reasons = {new[0]: "has no record", new[1]: "was made with other settings", "quick/x": "was made by other code"}
    monkeypatch.setattr(freshness, "lacking", lambda steps: reasons)
    assert [s.name for s in sampled(steps, 1) if s.config][1:] == new
    monkeypatch.setattr(freshness, "lacking", lambda steps: {new[1]: "was made by other code"})
    assert len([s for s in sampled(steps, 1) if s.config]) == 1


def test_pages_alone_train_nothing_and_want_runs_of_this_code(monkeypatch):
    steps = plan.select("faces")
    monkeypatch.setattr(freshness, "lacking", lambda steps: {})
    written = [s.writes[0].suffix if s.name != "claims" else "claims" for s in pages(steps)]
    assert sorted(written) == [".ipynb"] * 13 + ["claims"]
    monkeypatch.setattr(freshness, "lacking", lambda steps: {"faces/A": "was made by other code"})
    with pytest.raises(UserError, match=r"1 of the runs are stale, the first is faces/A \(was made by other code\)"):
        pages(steps)


def committing(monkeypatch, contents: dict[Path, str]) -> None:
    """Let `compare` find these contents in the last commit."""
    monkeypatch.setattr("mvrepro.evidence.compare.git", lambda *arguments: None)
    monkeypatch.setattr(
        "mvrepro.evidence.compare.committed", lambda path: contents[path].encode() if path in contents else None
    )


RECORD = {"config": {"seed": 0}, "metrics": {"rank1": 0.5}, "curve": {"loss": [1.0, 0.5]}}


def test_the_bits_of_a_sample_are_those_of_its_committed_runs(tmp_path, monkeypatch):
    """A new run has nothing to be compared with: it says nothing for or against the others."""
    known, new = (tmp_path / "runs" / "made-up" / name for name in ("known.json", "new.json"))
    known.parent.mkdir(parents=True)
    for path in (known, new):
        path.write_text(json.dumps(RECORD))
    committing(monkeypatch, {known: json.dumps(RECORD)})
    both = compare([known, new], {})
    assert both.same_bits and both.new == [str(new)]
    assert not compare([new], {}).same_bits
    known.write_text(json.dumps(RECORD | {"curve": {"loss": [1.0, 0.6]}}))
    assert not compare([known, new], {}).same_bits


def test_a_changed_run_is_noticed_whatever_its_name(tmp_path, monkeypatch):
    """git quotes names that are not ASCII, where nothing tells it otherwise."""
    path = tmp_path / "results" / "runs" / "made-up" / "AM-Softmax_t wächst_seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(RECORD))
    run_git(tmp_path, "init", "-q")
    commit(tmp_path)
    for module in ("provenance", "files"):
        monkeypatch.setattr(f"mvrepro.{module}.ROOT", tmp_path)
    monkeypatch.setattr(provenance, "CLONE", True)
    assert compare([path], {}).same_bits
    path.write_text(json.dumps(RECORD | {"metrics": {"rank1": 0.25}}))
    found = compare([path], {})
    assert len(found.different) == 1 and not found.same_bits


@pytest.mark.parametrize(
    ("metric", "first", "within", "different"),
    [(0.5, 1.0, 0, 0), (0.52, 1.0, 1, 0), (0.54, 1.0, 0, 1), (0.5, 1.0005, 1, 0), (0.5, 1.002, 0, 1)],
)
def test_metrics_may_move_with_the_last_bits_and_the_first_loss_hardly(
    tmp_path, monkeypatch, metric, first, within, different
):
    """Another loss's runs have metrics nearby, but their first epoch gives them away."""
    path = tmp_path / "runs" / "made-up" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(RECORD | {"metrics": {"rank1": metric}, "curve": {"loss": [first, 0.7]}}))
    committing(monkeypatch, {path: json.dumps(RECORD)})
    found = compare([path], {"made-up": {"rank1": 0.03, "first_loss": 1e-3}})
    assert (len(found.within), len(found.different)) == (within, different)
    assert found.identical == 2 - within - different


def test_the_runs_of_another_loss_are_noticed():
    """Within what other last bits may move, of all pairs of losses on the same people and seed."""
    tolerance = read_yaml(ROOT / "params.yaml")["quick"]["tolerance"]
    runs = [step for step in plan.runs("quick") if step.config.t == 0.2]
    records = {step.name: json.loads(step.writes[0].read_text(encoding="utf-8")) for step in runs}
    pairs = [(a, b) for a in runs for b in runs if a.config.seed == b.config.seed and a is not b]
    unnoticed = 0
    for a, b in pairs:
        old, new = records[a.name], records[b.name]
        alike = [same(old["metrics"][name], new["metrics"][name], tolerance[name]) for name in old["metrics"]]
        first = old["curve"]["loss"][0], new["curve"]["loss"][0]
        unnoticed += all(alike) and same(*first, tolerance["first_loss"] * first[0])
    assert len(pairs) == 3 * 17 * 16 + 7 * 11 * 10 + 10 * 7 * 6
    assert unnoticed < 0.04 * len(pairs)


def test_a_changed_number_or_text_of_a_report_is_different(tmp_path, monkeypatch):
    path = tmp_path / "figures" / "quick" / "04" / "a.json"
    path.parent.mkdir(parents=True)
    old = {"kind": "training", "sha256": "a", "data": {"x": [1.0, 2.0], "label": "at 0.25 s"}}
    committing(monkeypatch, {path: json.dumps(old)})

    def found(kind="training", sha256="b", x=2.0, label="at 0.25 s"):
        path.write_text(json.dumps({"kind": kind, "sha256": sha256, "data": {"x": [1.0, x], "label": label}}))
        return compare([path], {})

    assert found().different == []  # pixels depend on the fonts
    assert len(found(x=2.0000001).within) == 1
    assert "figures/quick/04/a.json.data.x[1]: 2 committed, 2.1 here" in found(x=2.1).different[0]
    assert len(found(label="at 0.26 s").different) == 1
    old["kind"] = "measured"
    committing(monkeypatch, {path: json.dumps(old)})
    assert found("measured", x=7).different == []


def test_a_second_command_beside_one_that_writes_is_one_message(monkeypatch):
    failed = subprocess.CompletedProcess([], 255, "", "ERROR: Unable to acquire lock. Most likely another DVC process")
    monkeypatch.setattr(freshness.subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setattr(freshness, "in_git", lambda: True)
    with pytest.raises(UserError, match="dvc status: ERROR: Unable to acquire lock"):
        freshness.stale([])


@pytest.mark.parametrize("place", [0.05, 0.3, 0.35, 0.5, 0.55, 0.7, 0.9])
def test_half_a_lock_file_is_mended_wherever_it_ends(tmp_path, monkeypatch, place):
    whole, lock = (ROOT / "dvc.lock").read_bytes(), tmp_path / "dvc.lock"
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    monkeypatch.setattr(freshness, "in_git", lambda: True)
    monkeypatch.setattr(freshness, "committed", lambda path: whole)
    lock.write_bytes(whole[: int(place * len(whole))])
    freshness.mend_lock_file()
    assert lock.read_bytes() == whole


def test_a_whole_lock_file_that_knows_more_or_other_things_is_left(tmp_path, monkeypatch):
    lock = tmp_path / "dvc.lock"
    noted = yaml.safe_load((ROOT / "dvc.lock").read_bytes())
    before = dict(noted["stages"])
    noted["stages"]["claims"] = before["claims"] | {"cmd": "other"}
    changed = yaml.safe_dump(noted).encode()
    del noted["stages"]["code"]
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    monkeypatch.setattr(freshness, "in_git", lambda: True)
    monkeypatch.setattr(freshness, "committed", lambda path: yaml.safe_dump(noted).encode())
    lock.write_bytes(changed)
    freshness.mend_lock_file()
    assert lock.read_bytes() == changed


# The environment and git


def test_environment_yml_and_lock_agree():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [d["pip"] for d in conda["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.lock"]
    assert "python=3.11" in conda["dependencies"]
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in pin and "@" not in pin for pin in pins)
    locked = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    asked = (ROOT / "requirements.in").read_text().splitlines()
    assert {a.split("==")[0] for a in asked if a and a[0] != "#"} <= locked
    assert "torchvision" not in locked


def test_git_holds_no_photograph_and_no_large_file():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert not [f for f in tracked if f.lower().endswith((".jpg", ".jpeg", ".pgm", ".bmp"))]
    large = [f for f in tracked if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2 * 2**20]
    assert not large


@pytest.mark.parametrize(("change", "kept"), [({}, True), ({"taken": True}, True), ({"metrics": {"tpr": 0.4}}, False)])
def test_a_record_that_is_found_again_stays_the_committed_one(tmp_path, monkeypatch, change, kept):
    """Also one that was taken over from older code: else a reproduction would leave hundreds of changed files."""
    found = {"metrics": {"tpr": 0.5}, "code": "c", "provenance": {"wall_s": 2}}
    before = json.dumps(found | {"provenance": {"wall_s": 1}} | change).encode()
    monkeypatch.setattr(freshness, "RESULTS", tmp_path)
    monkeypatch.setattr(freshness, "committed", lambda path: before)
    (tmp_path / "run.json").write_text(json.dumps(found))
    freshness.keep_committed(tmp_path / "run.json")
    assert ((tmp_path / "run.json").read_bytes() == before) == kept


def test_measuring_a_tolerance_keeps_no_network(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Step] = []

    def compute(steps: list[Step], *given: Any, **how: Any) -> Any:
        asked.extend(steps)
        for step in steps:
            step.writes[0].parent.mkdir(exist_ok=True)
            step.writes[0].write_bytes((ROOT / "results/runs/faces" / step.writes[0].name).read_bytes())
            yield step

    monkeypatch.setattr(workers, "compute", compute)
    monkeypatch.setattr(freshness, "lacking", lambda steps: {s.name: "" for s in steps if not s.writes[0].is_file()})
    assert runs_command._tolerance("faces", plan.runs("faces"), 40, None) == 0
    assert any(step.keeps for step in plan.runs("faces"))
    assert asked and not any(step.keeps or step.base for step in asked)
    assert "first_loss: 0" in capsys.readouterr().out
