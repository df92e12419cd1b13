"""`python -m mvrepro describe` and reading what face runs keep beside their metrics."""

import json
import os

import numpy as np
import pytest

from mvrepro.__main__ import main
from mvrepro.evidence import runs

needs_data = pytest.mark.skipif(not os.environ.get("MVREPRO_DATA"), reason="MVREPRO_DATA is not set: the photographs")


@needs_data
def test_describe_counts_the_data_and_says_whose_images_a_pair_has(tmp_path, capsys):
    out = tmp_path / "data.json"
    assert main(["describe", "--out", str(out)]) == 0
    assert "LFW: 13,233 images, 5,749 people, 1,680 people with 2 images at least" in capsys.readouterr().out
    values = json.loads(out.read_text())["values"]
    assert values["sets"]["CFP"]["images"] == 7000
    assert values["people of CFP who are in LFW by name"] == 205
    assert runs.numbers(values["images of LFW, person by person"]).max() == 530
    assert all(0.5 < accuracy < 0.75 for accuracy in values["pixels alone"].values())
    for name, pairs in (("lfw", 6000), ("cfp_ff", 7000), ("cfp_fp", 7000)):
        left, right = (runs.numbers(values["pairs"][name][side]) for side in ("left", "right"))
        assert len(left) == len(right) == pairs
        assert (left == right).sum() == pairs // 2


def test_describe_without_data_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MVREPRO_DATA", raising=False)
    assert main(["describe", "--out", str(tmp_path / "data.json")]) == 1
    error = capsys.readouterr().err
    assert "MVREPRO_DATA is not set" in error and "cfpw.io" in error and "quick needs none of them" in error
    assert not (tmp_path / "data.json").exists()


def test_describe_says_at_once_where_it_cannot_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mvrepro.commands.describe.describe", None)
    assert main(["describe", "--out", str(tmp_path)]) == 1
    assert "it is a folder; name a file" in capsys.readouterr().err


def test_evidence_is_read_as_arrays(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "made-up"
    folder.mkdir(parents=True)
    correct = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
    part = {"correct": np.packbits(correct).tobytes().hex(), "rates": [0.5, 0.25], "histogram": {"genuine": "3 0 12"}}
    for i, (variant, loss) in enumerate([("", "AM-Softmax"), ("CFP", "AM-Softmax"), ("", "MV-AM-Softmax-a")]):
        config = {"loss": loss, "t": 0.2, "seed": 7, "variant": variant}
        (folder / f"{i}.json").write_text(json.dumps({"config": config, "evidence": {"lfw": part}}))
    (folder / "3.json").write_text(json.dumps({"config": {"loss": "Softmax", "t": 0.2, "seed": 0}}))
    monkeypatch.setattr(runs, "default_t", lambda profile: 0.2)
    found = runs.evidence("made-up", "lfw", tmp_path)
    assert set(found) == {("AM-Softmax", 0.0, 7), ("MV-AM-Softmax-a", 0.2, 7)}
    one = found["AM-Softmax", 0.0, 7]
    assert one["correct"].tolist() == correct.tolist()
    assert one["rates"].tolist() == [0.5, 0.25]
    assert one["histogram"]["genuine"].tolist() == [3, 0, 12]
    assert set(runs.evidence("made-up", "lfw", tmp_path, kind="CFP")) == {("AM-Softmax", 0.0, 7)}
    assert runs.evidence("made-up", "blufr", tmp_path) == {}
