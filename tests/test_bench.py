"""mvrepro.bench at small shapes: what it measures and what it says. How large the numbers are is not its business."""

import json

import pytest
import torch

from benchmarks import head as bench
from mvrepro.__main__ import main
from mvrepro.commands.bench import table
from mvrepro.evidence.compare import Comparison, _compare_report


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "head.json"
    cases = ["fused, keep=none", "dense"]
    assert main(["bench", "head", "--batch", "4", "--classes", "3000", "--dim", "32", "--cases", *cases]
                + ["--seconds", "0", "--threads", "1", "--out", str(out)]) == 0  # fmt: skip
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
    monkeypatch.setattr(bench, "free_memory", lambda device: 0)
    monkeypatch.setattr(bench, "apart", lambda function, cases, *rest, threads: {"cases": {c: {} for c in cases}})
    said = []
    how = {"device": "cpu", "dtype": "float32", "threads": 1, "budget": 0.0, "with_memory": False, "say": said.append}
    (entry,) = bench.measure([(4, 11, 8)], ["dense"], **how)
    assert entry["skipped"] == ["dense"] and entry["cases"] == {}
    assert said == ["B 4, K 11, D 8 (too little memory for dense)"]


def test_errors(capsys):
    assert main(["bench", "head", "--batch", "4"]) == 1
    assert "--batch and --classes belong together" in capsys.readouterr().err
    assert main(["bench", "head", "--cases", "fast"]) == 1
    assert "unknown cases fast; known are: fused, keep=none; " in capsys.readouterr().err


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
