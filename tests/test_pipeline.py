"""dvc.yaml says what each stage depends on; these tests say whether it says the truth."""

import ast
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mvrepro.commands.reproduce import pages, sampled
from mvrepro.errors import UserError
from mvrepro.evidence.compare import compare
from mvrepro.pipeline import Memory, Pipeline, Stage

ROOT = Path(__file__).resolve().parent.parent
# The door computes nothing: it only picks the command.
DOOR = {"mvrepro/__init__.py", "mvrepro/__main__.py", "mvrepro/commands/__init__.py"}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline()


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
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mvrepro"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
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
    return seen - DOOR


def code_behind(stage: Stage) -> set[str]:
    words = stage.command.split()
    command = words[3]
    files = closure({f"mvrepro/commands/{command}.py"})
    if command == "notebook":
        (source,) = (ROOT / "notebooks").glob(f"{words[4]}-*.ipynb")
        cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        files |= closure(imported(code))
    return files


def test_stages_depend_on_the_code_that_they_run(pipeline):
    wrong: dict[str, dict[str, None]] = {}  # what is wrong -> the stages, once each, in their order
    for stage in pipeline.stages.values():
        declared = {str(p.relative_to(ROOT)) for p in stage.reads if p.suffix == ".py"}
        behind = code_behind(stage)
        for what, files in (("lack", behind - declared), ("have too much", declared - behind)):
            if files:
                wrong.setdefault(f"{what}: {', '.join(sorted(files))}", {})[stage.name.split("@")[0]] = None
    if wrong:
        lines = [f"the deps of {', '.join(stages)} {what}" for what, stages in wrong.items()]
        pytest.fail("in dvc.yaml, " + "\n".join(lines), pytrace=False)


def test_every_notebook_has_a_stage_that_reads_its_source(pipeline):
    for source in (ROOT / "notebooks").glob("*.ipynb"):
        assert any(source in stage.reads for stage in pipeline.stages.values()), source.name


def test_every_committed_result_is_the_output_of_a_stage(pipeline):
    written = {path for stage in pipeline.stages.values() for path in stage.writes}
    present = {p for p in (ROOT / "results").rglob("*") if p.is_file() and not p.name.startswith(".writing-")}
    assert present <= written, sorted(str(p.relative_to(ROOT)) for p in present - written)


def test_outputs_are_kept_in_git_and_not_in_a_cache():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name, stage in stages.items():
        for out in stage["outs"]:
            assert isinstance(out, dict) and list(out.values()) == [{"cache": False}], (name, out)


def test_analytics_are_off():
    config = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
    assert "analytics = false" in config


def test_a_plot_helper_is_behind_reports_and_behind_no_training(pipeline):
    behind = {s.name for s in pipeline.stages.values() if ROOT / "mvrepro" / "plots.py" in s.reads}
    assert "quick-04" in behind
    assert not [name for name in behind if "@" in name]


def test_the_losses_are_behind_every_training(pipeline):
    losses = ROOT / "mvrepro" / "losses.py"
    assert all(losses in s.reads for s in pipeline.stages.values() if "train" in s.command.split())


def test_memory_knows_a_stage_by_content_not_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr("mvrepro.pipeline.COMPUTED", tmp_path / "computed.json")
    source, result = tmp_path / "in.py", tmp_path / "out.json"
    source.write_text("1")
    result.write_text("1")
    stage = Stage("s", "command", (source,), ("quick.train",), (result,))
    memory = Memory()
    assert not memory.has(stage)
    memory.remember(stage)
    assert Memory().has(stage)
    source.touch()
    assert Memory().has(stage)
    result.write_text("2")
    assert not Memory().has(stage), "a result that somebody changed is not one computed here"
    result.write_text("1")
    source.write_text("2")
    assert not Memory().has(stage)


def test_a_sample_has_all_reports_and_runs_from_all_over(pipeline):
    stages = pipeline.select("faces")
    runs = [s.name for s in stages if "@" in s.name]
    few = sampled(stages, 6)
    picked = [s.name for s in few if "@" in s.name]
    assert len(picked) == 6 and picked[0] == runs[0]
    assert len({name.split("@")[0] for name in picked}) >= 3
    assert [s for s in few if "@" not in s.name] == [s for s in stages if "@" not in s.name]
    assert sampled(stages, 10_000) == stages
    with pytest.raises(UserError, match="--sample must be 1 or more, got 0"):
        sampled(stages, 0)


def test_pages_alone_train_nothing_and_want_runs_of_this_code(pipeline, monkeypatch):
    stages = pipeline.select("faces")
    monkeypatch.setattr(pipeline, "stale", lambda chosen: {})
    written = [s.writes[0].suffix if s.name != "claims" else "claims" for s in pages(pipeline, stages)]
    assert sorted(written) == [".ipynb"] * 12 + ["claims"]
    asked = []
    monkeypatch.setattr(pipeline, "stale", lambda chosen: asked.extend(chosen) or {"faces-train@1": ["a.py: modified"]})
    with pytest.raises(UserError, match=r"1 of the runs are stale, the first is faces-train@1 \(a.py: modified\)"):
        pages(pipeline, stages)
    assert asked and not {".ipynb"} & {p.suffix for s in asked for p in s.writes}


def test_a_sample_has_every_run_without_a_record(pipeline, tmp_path):
    """There is nothing that could be taken as it is."""
    stages = pipeline.select("quick")
    new = [replace(stages[0], name=f"quick-mine@{i}", writes=(tmp_path / f"{i}.json",)) for i in (0, 1)]
    few = [s.name for s in sampled([*stages, *new], 1) if "@" in s.name]
    assert len(few) == 3 and few[1:] == ["quick-mine@0", "quick-mine@1"]
    (tmp_path / "1.json").write_text("{}")
    assert [s.name for s in sampled([*stages, *new], 1) if "@" in s.name][1:] == ["quick-mine@0"]


def test_the_bits_of_a_sample_are_those_of_its_committed_runs(tmp_path, monkeypatch):
    """A new run has nothing to be compared with: it says nothing for or against the others."""
    known, new = (tmp_path / "runs" / "made-up" / name for name in ("known.json", "new.json"))
    known.parent.mkdir(parents=True)
    record = {"config": {"seed": 0}, "metrics": {"rank1": 0.5}, "curve": {"loss": [1.0]}}
    for path in (known, new):
        path.write_text(json.dumps(record))
    monkeypatch.setattr(
        "mvrepro.evidence.compare.committed", lambda path: {known: json.dumps(record).encode()}.get(path)
    )
    stages = [Stage(path.stem, "command", (), (), (path,)) for path in (known, new)]
    both = compare(stages)
    assert both.same_bits and len(both.new) == 1
    assert not compare(stages[1:]).same_bits
    known.write_text(json.dumps(record | {"curve": {"loss": [1.1]}}))
    assert not compare(stages).same_bits


def test_a_profile_with_a_hyphen_is_refused_before_it_computes_nothing(pipeline):
    with pytest.raises(UserError, match=r"profile 'my-set': .* has no '-', .* such as my_set-train"):
        pipeline.select("my-set")


def test_a_profile_computes_nothing_of_another(pipeline):
    """The claims rest on all profiles, but `make reproduce` on quick must not train for hours on faces."""
    for profile, other in (("quick", "faces-"), ("faces", "quick-")):
        names = [stage.name for stage in pipeline.select(profile)]
        assert "claims" in names and not [name for name in names if name.startswith((other, "bench-"))]
    assert [stage.name for stage in pipeline.select("bench")] == ["bench-head", "claims"]


def test_a_run_that_no_stage_writes_is_named(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("mvrepro.pipeline.RESULTS", tmp_path)
    stray = tmp_path / "runs" / "quick" / "AM-Softmax_t0.7_seed0.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("{}")
    (stray.parent / ".writing-abc").write_text("half")
    assert pipeline.strays("quick") == [f"{stray} is written by no stage of dvc.yaml: remove it"]
    assert pipeline.strays("faces") == []


def test_a_second_command_beside_one_that_writes_is_one_message():
    from dvc.lock import LockError

    def lock():
        raise LockError("Unable to acquire lock.")

    busy = object.__new__(Pipeline)
    busy.repo, busy._known = SimpleNamespace(lock=SimpleNamespace(lock=lock)), {}
    with pytest.raises(UserError, match="another command of DVC or mvrepro is at work in this folder"):
        busy.stale([])


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
