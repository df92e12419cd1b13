"""Kill what is at work at a random moment: the next `make reproduce` finishes with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from trees import commit, copy_tree, make, run, run_git, start

METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project with a graph of four stages, computed and committed once."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    tree = copy_tree(tmp_path_factory.mktemp("faults") / "project")
    run_git(tree, "rm", "-r", "-q", "results", "notebooks", "dvc.lock")
    graph = yaml.safe_load((tree / "dvc.yaml").read_text())
    params = yaml.safe_load((tree / "params.yaml").read_text())
    params["losses"] = ["AM-Softmax", "MV-AM-Softmax-a", "Arc-Softmax"]
    params["quick"]["seeds"] = [0]
    params["quick"]["train"]["epochs"] = 3
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    report = {
        "cmd": "python -m mvrepro notebook 98 --profile quick",
        "deps": ["notebooks/98-fault.ipynb", "results/runs/quick"],
        "outs": [{"results/executed/quick/98-fault.ipynb": {"cache": False}}],
    }
    stages = {"quick-train": graph["stages"]["quick-train"], "quick-98": report}
    (tree / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    cells = [
        new_markdown_cell("# Fault", id="title"),
        new_code_cell('profile: str = "quick"', id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell("import time\nfrom mvrepro import runs\ntime.sleep(1)", id="setup"),
        new_code_cell('print(runs.table(profile)["tpr@fpr=0.01"].round(3).tolist())', id="show"),
    ]
    (tree / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), tree / "notebooks" / "98-fault.ipynb")
    commit(tree)
    code, output = make(tree, "reproduce")
    assert code == 0, output
    commit(tree)
    return tree


def unharmed(tree: Path) -> None:
    assert run_git(tree, "status", "--porcelain") == ""
    assert not list((tree / "results").rglob(".writing-*"))


def children(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all that runs below a process."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    below, todo = [], [pid]
    while todo:
        parent = todo.pop()
        found = [(int(r[0]), r[2]) for r in rows if int(r[1]) == parent]
        below += found
        todo += [child for child, _ in found]
    return below


def kill_one(process: subprocess.Popen[str], wanted: str) -> None:
    """Wait until something whose command line holds `wanted` runs below the process, and kill it with -9."""
    for _ in range(600):
        found = [pid for pid, command in children(process.pid) if wanted in command and "sh -c" not in command]
        if found:
            time.sleep(0.3)
            os.kill(found[-1], signal.SIGKILL)
            return
        time.sleep(0.05)
    pytest.fail(f"no process with {wanted!r} appeared")


@pytest.mark.xdist_group("faults")
def test_a_second_call_does_nothing(tree):
    began = time.perf_counter()
    code, output = make(tree, "reproduce")
    assert code == 0, output
    assert "computed 0 of 4 stages" in output
    assert "0 different" in output
    assert time.perf_counter() - began < 30
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("seed", range(4))
def test_reproduce_killed_at_a_random_moment(tree, seed):
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    time.sleep(random.Random(seed).uniform(0.5, 9.0))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    code, output = make(tree, "reproduce", "FORCE=1" if seed % 2 else "FORCE=")
    assert code == 0, output
    assert "0 different" in output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    ("victim", "message"),
    [("mvrepro train", "was killed by signal 9"), ("ipykernel", "the kernel of 98-fault.ipynb died")],
)
def test_a_stage_is_killed(tree, victim, message):
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    kill_one(process, victim)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in output
    assert "Traceback" not in output
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_half_a_lock_file_is_mended(tree):
    lock = tree / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: len(whole) // 2] + "\n  - {broken")
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_results_that_cannot_be_written_are_one_clear_message(tree):
    (tree / "results").rename(tree / "results-aside")
    try:
        (tree / "results").write_text("not a folder")
        code, output = run(tree, sys.executable, "-m", "mvrepro", "reproduce")
    finally:
        (tree / "results").unlink()
        (tree / "results-aside").rename(tree / "results")
    assert code == 1
    assert "could not write results" in output
    assert "Traceback" not in output


@pytest.mark.xdist_group("faults")
def test_a_changed_value_is_reported_and_fails(tree):
    run_file = next((tree / "results" / "runs" / "quick").glob("*.json"))
    before = run_file.read_text()
    record = json.loads(before)
    record["metrics"]["tpr@fpr=0.01"] += 0.3
    run_file.write_text(json.dumps(record, indent=1) + "\n")
    commit(tree)
    code, output = make(tree, "reproduce")
    assert code != 0
    assert f"different: results/runs/quick/{run_file.name}" in output
    run_git(tree, "reset", "-q", "--hard", "HEAD~1")
