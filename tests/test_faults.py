"""Kill what is at work at a random moment: the next `make reproduce` finishes with the same bytes."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from trees import ROOT, commit, copy_tree, make, run, run_git, start

KILLS = int(os.environ.get("KILLS", "4"))  # `make test-hard`: 30
FOLDER = "a project für " + 150 * "x"  # what people call folders
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The project with three runs and a page, computed and committed once."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    tree = copy_tree(tmp_path_factory.mktemp("faults") / FOLDER)
    run_git(tree, "rm", "-r", "-q", "results", "notebooks")
    run_git(tree, "rm", "-q", "--ignore-unmatch", "dvc.lock")
    graph, params = (yaml.safe_load((tree / name).read_text()) for name in ("dvc.yaml", "params.yaml"))
    train = params["quick"]["train"] | {"epochs": 3}
    runs = [{"loss": ["AM-Softmax", "MV-AM-Softmax-a", "Arc-Softmax"], "seed": 0}]
    pages = {"quick-98": {"profile": "quick", "nb": "98", "name": "fault", "reads": "results/runs/quick"}}
    params = {"quick": {"train": train, "runs": runs}, "pages": pages}
    (tree / "params.yaml").write_text(yaml.safe_dump(params))
    stages = {name: graph["stages"][name] for name in ("code", "runs", "page")}
    stages["runs"]["foreach"] = ["quick"]
    (tree / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    cells = [
        new_markdown_cell("# Fault", id="title"),
        new_code_cell('profile: str = "quick"', id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(SETUP, id="setup"),
        new_code_cell('scores = runs.table(profile)["tpr@fpr=0.01"].round(3).tolist()\nprint(scores)', id="show"),
        new_code_cell('report.record("scores", {"mean": sum(scores) / len(scores)}, kind="training")', id="record"),
    ]
    (tree / "notebooks").mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=METADATA), tree / "notebooks" / "98-fault.ipynb")
    (tree / "paper").mkdir(exist_ok=True)
    commit(tree)
    code, output = make(tree, "reproduce")
    assert code == 0, output
    commit(tree)
    return tree


SETUP = """import time
from mvrepro.evidence import runs
from mvrepro.pages.report import Report
report = Report("98", profile)
time.sleep(1)"""


def unharmed(tree: Path) -> None:
    assert run_git(tree, "status", "--porcelain") == ""


def children(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all that runs below a process."""
    table = subprocess.run(["ps", "-ewwo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    below, todo = [], [pid]
    while todo:
        parent = todo.pop()
        found = [(int(r[0]), r[2]) for r in rows if int(r[1]) == parent]
        below += found
        todo += [child for child, _ in found]
    return below


def below(process: subprocess.Popen[str], wanted: str) -> list[int]:
    """Wait until processes whose command line holds `wanted` run below this one."""
    for _ in range(1200):
        found = [pid for pid, command in children(process.pid) if wanted in command]
        if found:
            time.sleep(0.3)
            return found
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no process with {wanted!r} appeared: {process.communicate()[0]}")


def kill_one(process: subprocess.Popen[str], wanted: str) -> None:
    os.kill(below(process, wanted)[-1], signal.SIGKILL)


def gone(pids: list[int], seconds: float = 20) -> bool:
    for _ in range(int(seconds / 0.1)):
        table = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
        alive = {int(line.split()[0]) for line in table.splitlines() if not line.split()[1].startswith("Z")}
        if not alive & set(pids):
            return True
        time.sleep(0.1)
    return False


WORKER = "spawn_main"


@pytest.mark.xdist_group("faults")
def test_a_second_call_does_nothing(tree):
    began = time.perf_counter()
    code, output = make(tree, "reproduce")
    assert code == 0, output
    assert "computed 0 of 4 steps" in output
    assert "0 different" in output
    assert time.perf_counter() - began < 30
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("seed", range(KILLS))
def test_reproduce_killed_at_a_random_moment(tree, seed):
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    time.sleep(random.Random(seed).uniform(0.5, 9.0))
    os.killpg(process.pid, signal.SIGTERM if seed % 3 == 2 else signal.SIGKILL)
    process.communicate()
    code, output = make(tree, "reproduce", "FORCE=1" if seed % 2 else "FORCE=")
    assert code == 0, output
    assert "0 different" in output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    ("victim", "message"),
    [(WORKER, "a process was killed, or ran out of memory, at "), ("ipykernel", "the kernel of 98-fault.ipynb died")],
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
@pytest.mark.parametrize("victim", [WORKER, "ipykernel"])
@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_when_reproduce_is_ended(tree, with_signal, victim):
    """Neither a training nor a kernel, although only the parent gets the signal."""
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    below(process, victim)
    pids = [pid for pid, _ in children(process.pid)]
    os.kill(process.pid, with_signal)
    process.communicate(timeout=60)
    assert gone(pids), f"{pids} outlived the parent"
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("seed", range(2))
def test_ctrl_c_at_a_random_moment(tree, seed):
    """A terminal sends it to all processes of the command."""
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    below(process, WORKER)
    time.sleep(random.Random(seed).uniform(0, 5))
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    said = "mvrepro reproduce: stopped; nothing half-written was kept"
    assert [line for line in output.splitlines() if line and line[0] != "["] == [said]
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_ctrl_c_while_runs_are_trained(tree):
    process = start(tree, sys.executable, "-m", "mvrepro", "runs", "quick", "--force")
    assert process.stdout and process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    said = "mvrepro runs: stopped; nothing half-written was kept"
    assert [line for line in output.splitlines() if line and line[0] != "["] == [said]
    assert not list(tree.rglob(".writing-*.json"))
    code, output = run(tree, sys.executable, "-m", "mvrepro", "runs", "quick")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    ("line", "sign", "left"),
    [
        ("embed net.safetensors people out --batch 1 --threads 1", "out/.writing-*", {"out"}),  # goes on from there
        ("data convert people out --to folder", ".writing-out/*", set()),
    ],
    ids=["embed", "convert"],
)
def test_ctrl_c_while_images_are_read(tmp_path, line, sign, left):
    from PIL import Image

    from mvrepro import interchange, networks

    name, about = "iresnet-tiny", {"image_size": 32, "embedding_dim": 16}
    interchange.save_backbone(tmp_path / "net.safetensors", networks.build(name, **about), name, **about)
    Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(3 * 32 * 32)).save(tmp_path / "one.png")
    for number in range(100 if left else 3000):
        (path := tmp_path / f"people/{number % 20}/{number}.png").parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(tmp_path / "one.png")
    before = {path.name for path in tmp_path.iterdir()}
    command = ["env", f"MVREPRO_CACHE={tmp_path / 'people'}/../cache", *HERE[1:], "-m", "mvrepro", *line.split()]
    process = start(tmp_path, *command)
    while process.poll() is None and not list(tmp_path.glob(sign)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    said = f"mvrepro {line.split()[0]}: stopped; nothing half-written was kept"
    assert (process.returncode, output.splitlines()[-1]) == (130, said) and "Traceback" not in output
    assert {path.name for path in tmp_path.iterdir()} - before - {"cache"} == left
    code, output = run(tmp_path, *command)
    assert code == 0, output
    assert not list(tmp_path.rglob(".writing-*"))


@pytest.mark.xdist_group("faults")
def test_code_that_is_edited_during_a_training_is_not_what_trained(tree):
    """The record tells the code before; what was computed counts as stale, and nothing is accepted as fresh."""
    losses = tree / "mvrepro" / "losses.py"
    before, lock = losses.read_text(), (tree / "dvc.lock").read_text()
    process = start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force")
    assert process.stdout and "[1/4]" in process.stdout.readline()  # the workers have loaded the code
    losses.write_text(before.replace("return", "1 + 1\n    return", 1))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "is made from changed while it was: run the same command again" in output
    assert (tree / "dvc.lock").read_text() == lock
    _, output = make(tree, "status")
    assert "stale: quick/Arc-Softmax_seed0 (was made by other code)" in output
    losses.write_text(before)
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_a_comment_trains_nothing_and_is_no_reason_to(tree):
    losses = tree / "mvrepro" / "losses.py"
    before = losses.read_text()
    losses.write_text("# A comment.\n" + before.replace('"""', '"""Also, ', 1))
    code, output = make(tree, "status")
    assert code == 0 and "stale" not in output, output
    code, output = make(tree, "reproduce")
    assert code == 0 and "computed 0 of 4 steps" in output, output
    code, output = run(tree, sys.executable, "-m", "dvc", "repro")
    assert code == 0 and output.count("Running stage") <= 1, output  # `code`, whose output is the same
    losses.write_text(before)
    run_git(tree, "checkout", "-q", "dvc.lock")
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_a_zip_without_git_is_computed_and_compared(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "zip", ignore=shutil.ignore_patterns(".git", ".mvrepro"))
    run_git(tmp_path, "init", "-q")  # a repository around it is another project's
    code, output = make(tmp_path / "zip", "reproduce")
    assert code == 0, output
    assert "no git here" in output and "computed 4 of 4 steps" in output and "0 different" in output
    (record, *_) = sorted((tmp_path / "zip" / "results" / "runs" / "quick").glob("*.json"))
    assert record.read_bytes() == (tree / record.relative_to(tmp_path / "zip")).read_bytes()  # the same values
    came = tmp_path / "zip" / ".mvrepro" / "came" / record.relative_to(tmp_path / "zip")
    values = json.loads(came.read_text())
    values["metrics"]["tpr@fpr=0.01"] += 0.3
    came.write_text(json.dumps(values))
    code, output = make(tmp_path / "zip", "reproduce")
    assert code != 0 and f"different: results/runs/quick/{record.name}" in output
    code, output = make(tmp_path / "zip", "status")
    assert code == 0 and "no git here" in output and "Traceback" not in output


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


# As root, too, who else may write everywhere: without the right to do what permissions forbid.
OBEYING = """
import ctypes, os, sys
for right in (1, 2):
    ctypes.CDLL(None).prctl(24, right, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.xdist_group("faults")
def test_results_that_are_read_only_are_one_clear_message_before_anything_is_trained(tree):
    folders = [tree / "results", *(p for p in (tree / "results").rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        command = [sys.executable, "-c", OBEYING, sys.executable, "-m", "mvrepro", "reproduce", "--force"]
        code, output = run(tree, *command)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert code == 1 and output.count("\n") == 1, output
    assert output.startswith("mvrepro reproduce: could not write results") and "no permission to write there" in output
    code, output = make(tree, "reproduce")
    assert code == 0, output
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_two_at_once_work_one_after_the_other(tree):
    """Both by force: the one that waits computes the same once more, beside nobody."""
    first, second = (start(tree, sys.executable, "-m", "mvrepro", "reproduce", "--force") for _ in range(2))
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert sorted("waiting for it to end" in text for text in said) == [False, True], said
    assert all("computed 4 of 4 steps" in text and "0 different" in text for text in said)
    unharmed(tree)


@pytest.mark.xdist_group("faults")
def test_a_clock_that_is_set_back_makes_nothing_stale(tree):
    """All files are of tomorrow, then of long ago: neither computes anything, and what is computed is the same."""
    paths = [tree / name for name in run_git(tree, "ls-files", "-z").split("\0") if name]
    paths += [path for path in (tree / ".mvrepro").rglob("*") if path.is_file()]
    for moment in (time.time() + 86_400, 1_000_000_000):
        for path in paths:
            os.utime(path, (moment, moment))
        code, output = make(tree, "reproduce")
        assert code == 0 and "computed 0 of 4 steps" in output, output
    code, output = make(tree, "reproduce", "FORCE=1")
    assert code == 0 and "0 different" in output, output
    unharmed(tree)


# A training alone

HERE = ["env", f"PYTHONPATH={ROOT}", sys.executable]
LONE = ["train", "--loss", "MV-AM-Softmax-a", "--epochs", "8", "--snapshot-every", "3", "--keep-snapshots", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the record, snapshots and network of a training that nobody stopped."""
    folder = tmp_path_factory.mktemp("lone")
    code, output = run(folder, *HERE, "-m", "mvrepro", *LONE, "--out", "run", "--save", "net")
    assert code == 0, output
    return folder


def bits(folder: Path) -> dict[str, bytes]:
    """All that a training left, without what tells of time and interruptions."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    record = json.loads(found["run/record.json"])
    found["run/record.json"] = json.dumps(record | {"provenance": {}}).encode()
    return {name: content for name, content in found.items() if not name.endswith("log.jsonl")}


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("with_signal", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seed", range(max(1, KILLS // 4)))
def test_a_training_that_is_killed_goes_on_to_the_same_bits(whole, tmp_path, with_signal, seed):
    line = [*HERE, "-m", "mvrepro", *LONE, "--out", "run", "--save", "net", "--resume"]
    process = start(tmp_path, *line)
    for _ in range(600):
        if (tmp_path / "run" / "log.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(random.Random(f"{seed} {with_signal}").uniform(0, 3))
    process.send_signal(with_signal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (0, -with_signal), output
    code, output = run(tmp_path, *line)
    assert code == 0, output
    assert bits(tmp_path) == bits(whole)


@pytest.mark.xdist_group("faults")
def test_memory_that_runs_out_in_a_training_is_one_line(tmp_path):
    """26 GB of class weights, where a process may have 8."""
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2); "
    limit += "runpy.run_module('mvrepro', run_name='__main__')"
    sizes = ["--data", "synthetic", "--synthetic-classes", "100000", "--embedding-dim", "65536"]
    code, output = run(tmp_path, *HERE, "-c", limit, *LONE, *sizes, "--out", "run")
    assert code == 1 and output.count("\n") == 1, output
    assert output.startswith("mvrepro train: the device's memory is full: try a smaller --batch-size")
    assert not (tmp_path / "run" / "record.json").exists()


# A disk of 300 kB, on which each command is called, then once more where it has grown
DISK = """mount -t tmpfs -o size=300k none small || exit 77
python() { "$PYTHON" "$@"; }
[ -z "$FILL" ] || cat /dev/zero > small/filled 2> /dev/null
python -m mvrepro $LINE; echo "code $?"; find small -name '.writing-*'
mount -o remount,size=64m small; python -m mvrepro $LINE; echo "code $?"; find small -name '.writing-*'"""


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    "line",
    [
        "train --loss Softmax --epochs 1 --out small/run --save small/net --resume",
        "train --loss Softmax --epochs 1 --out out/run --save small/net --resume",
        "data convert people small/set --to tar",
        "data convert people small/set --to rec",
        "data convert people small/set --to folder",
        "embed net.safetensors people small/out",
        "data inspect people.tar",  # whose index goes to the cache
        "data overlap names.txt names.txt --out small/shared",
        "judge --protocol all-pairs --embeddings e.npy --ids ids.txt --fprs 0.1 --out small/judged.json",
    ],
)
def test_a_full_disk_is_one_line_and_the_next_call_ends_the_work(tmp_path, line):
    from PIL import Image

    from mvrepro import interchange, networks

    name, about = "iresnet-tiny", {"image_size": 32, "embedding_dim": 4096}
    interchange.save_backbone(tmp_path / "net.safetensors", networks.build(name, **about), name, **about)
    noise = random.Random(0)
    for place in (f"{person}/{shot}" for person in ("ann", "bo") for shot in range(60)):
        (path := tmp_path / f"people/{place}.png").parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (32, 32), noise.randbytes(3 * 32 * 32)).save(path)
    with tarfile.open(tmp_path / "people.tar", "w") as file:
        for number, path in enumerate(sorted((tmp_path / "people").rglob("*.png"))):
            file.add(path, f"{number}.png")
            about = f"{number % 2}".encode()
            (entry := tarfile.TarInfo(f"{number}.cls")).size = len(about)
            file.addfile(entry, io.BytesIO(about))
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(40, 4)))
    (tmp_path / "ids.txt").write_text("".join(f"{number // 2}\n" for number in range(40)))
    (tmp_path / "names.txt").write_text("".join(f"Zoë {number}\n" for number in range(40)))
    (tmp_path / "small").mkdir()
    settings = {"PYTHON": sys.executable, "LINE": line}
    settings["MVREPRO_CACHE"] = "small/cache" if "inspect" in line else "cache"
    settings["FILL"] = "yes" if line.startswith(("data inspect", "data overlap", "judge")) else ""
    shell = ["unshare", "--user", "--map-root-user", "--mount", *HERE[:2], *map("=".join, settings.items())]
    if not shutil.which("unshare"):
        pytest.skip("there is no unshare here")
    _, output = run(tmp_path, *shell, "bash", "-c", DISK)
    if "code" not in output:
        pytest.skip(f"no disk can be mounted here: {output.strip()}")
    first, _, rest = output.partition("code ")
    (said,) = [text for text in first.splitlines() if text.startswith("mvrepro ")]
    assert rest.startswith("1\n") and "the disk is full: free some space" in said, output
    assert rest.rpartition("code ")[2].startswith("0\n") and "Traceback" not in output, output
    left = output.count("\nsmall/")
    assert left == (1 if line.startswith("embed") else 0), output  # embed goes on from the part that it has


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
