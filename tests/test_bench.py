"""benchmarks.head at small shapes: what it measures and what it says. How large the numbers are is not its business."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import head as bench
from benchmarks.__main__ import BENCHMARKS
from benchmarks.head import table
from mvrepro.__main__ import main
from mvrepro.evidence.compare import Comparison, _compare_report
from mvrepro.files import ROOT


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


def test_what_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 2500)  # the products take 1232, the dense head 2464 more
    monkeypatch.setattr(bench, "apart", lambda function, cases, *rest, threads: {"cases": {c: {} for c in cases}})
    said = []
    how = {"device": "cpu", "dtype": "float32", "threads": 1, "budget": 0.0, "with_memory": False, "say": said.append}
    (entry,) = bench.measure([(4, 11, 8)], ["dense"], **how)
    assert entry["skipped"] == ["dense"] and entry["cases"] == {}
    assert said == ["B 4, K 11, D 8 (too little memory for dense)"]
    monkeypatch.setattr(bench, "free_memory", lambda device: 0)  # nothing says what is free
    (entry,) = bench.measure([(4, 11, 8)], ["dense"], **how)
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
        ("--batch 4 --classes 10 --seconds inf", "--seconds must be a number >= 0, got inf"),
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


def call(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
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
    path.write_text('{"kind": "measured", "shapes": [1.0]}')
    result = Comparison()
    _compare_report(result, path, b'{"kind": "measured", "shapes": [2.0]}', False)
    assert not result.different


def test_the_loop_against_the_bare_backbone(tmp_path):
    words = "--data synthetic --synthetic-classes 30 --backbone iresnet-tiny --image-size 16 --embedding-dim 8"
    words += f" --batch-size 24 --workers 0 --device cpu --rounds 3 --out {tmp_path / 'loop.json'}"
    done = call("benchmarks", "loop", *words.split())
    assert done.returncode == 0 and "images/s in the loop" in done.stdout, done.stderr
    record = json.loads((tmp_path / "loop.json").read_text())
    assert record["ratio"] > 0 and record["rounds"] == 3 and record["kind"] == "measured"
    done = call("benchmarks", "loop", *words.split(), "--rounds", "0")
    assert done.returncode == 1 and done.stderr == "benchmarks loop: --rounds must be 1 or more, got 0\n"
