"""mvrepro.training on 1, 2 and 3 real processes: killed and resumed to the bit, fed from files, and given bad input."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvrepro import images
from mvrepro.determinism import environment
from mvrepro.errors import UserError
from mvrepro.training.batches import Order
from mvrepro.training.config import TrainConfig, check, emphasis, rate
from mvrepro.training.logs import Logs
from mvrepro.training.ranks import joined

ROOT = Path(__file__).resolve().parent.parent


def words(text):
    return text.split()


SMALL = words(
    "--backbone iresnet-tiny --image-size 16 --embedding-dim 8 --batch-size 24 --lr 0.05 --loss MV-AM-Softmax-a "
    "--device cpu --milestones --deterministic --log-every 5 --snapshot-every 4 --workers 0 --epochs 12"
)
SET = ["--data", "synthetic", "--synthetic-classes", "30"]  # 300 images, 12 steps an epoch
pytestmark = pytest.mark.xdist_group("scale")  # the processes of two tests at once are too many


def settings(**changes):
    base = {"loss": "Softmax", "backbone": "iresnet-tiny", "embedding_dim": 8, "epochs": 3, "batch_size": 12, "lr": 1.0}
    base |= {"profile": "paper", "data": "synthetic", "milestones": (1, 2), "synthetic_classes": 5}
    return TrainConfig(**base | changes)


def worker(*runs):
    """[(codes, stdouts, stderrs)] of the runs, see ranks_worker.py; nobody may ever show a traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks_worker.py")],
        input=json.dumps(runs), capture_output=True, text=True, timeout=900, check=False,
        env=environment(1) | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = [tuple(zip(*ranks, strict=True)) for ranks in json.loads(done.stdout)]
    assert not any("Traceback" in text for _, _, errors in results for text in errors), results
    return results


def run(out, *arguments, ranks=1, kill=None, data=SET):
    line = ["--profile", "paper", *SMALL, *data, "--out", out, *arguments]
    return {"ranks": ranks, "arguments": list(map(str, line)), "kill": kill}


def last_snapshot(out):
    """Its files' bytes: weights, momentum, random numbers; the settings, too."""
    folder = sorted((out / "snapshots").iterdir())[-1]
    return folder.name, {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


EVERYTHING = words("--steps 22 --sample-rate 0.5 --accumulate 2 --clip 5 --t-warmup 10 --warmup 5 --schedule cosine")
IN_BACKWARD = words("--steps 22 --update-in-backward --bfloat16 --workers 1 --margin-epochs 1")
PLACES = [(0, "step", 6), (1, "file", 1), (0, "manifest", 1), (1, "step", 5), (0, "publish", 1), (0, "remove", 3)]


@pytest.mark.parametrize(
    ("ranks", "options", "kills"),
    [
        (1, EVERYTHING, [*PLACES, (0, "file", 2), (0, "record", 1)]),
        (1, IN_BACKWARD, [(0, "step", 9), (0, "file", 1)]),
        (2, EVERYTHING, [*PLACES, (0, "record", 1)]),
        (3, ["--steps", "10"], [(2, "step", 6), (1, "step", 3, signal.SIGTERM), (0, "step", 2, signal.SIGTERM)]),
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, ranks, options, kills):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kills = [(rank % ranks, where, n, *(number or [signal.SIGKILL])) for rank, where, n, *number in kills]
    runs = [run(whole, *options, ranks=ranks)]
    runs += [run(broken, *options, "--resume", ranks=ranks, kill=kill) for kill in kills]
    *_, (codes, said, errors) = results = worker(*runs, run(broken, *options, "--resume", ranks=ranks))
    for (rank, where, _, number), (fate, _, _) in zip(kills, results[1:], strict=False):
        assert fate[rank] == -number, f"{where} was never reached: {results}"
    assert codes == (0,) * ranks, errors
    assert "going on from" in said[0] and not any(said[1:])
    assert last_snapshot(whole) == last_snapshot(broken)
    assert losses(broken) == losses(whole)
    assert not list((broken / "snapshots").glob(".writing-*"))
    assert len(list((broken / "snapshots").iterdir())) == 2
    record = json.loads((broken / "record.json").read_text())
    assert record["sizes"]["ranks"] == ranks and record["provenance"]["deterministic_algorithms"]


def test_damaged_and_foreign_snapshots(tmp_path):
    whole, out, lost = tmp_path / "whole", tmp_path / "out", tmp_path / "lost"
    steps = ["--steps", "10"]
    worker(run(out, *steps))
    shutil.copytree(out, whole)
    shutil.copytree(out, lost)
    for path in lost.glob("snapshots/*/manifest.json"):
        path.write_bytes(path.read_bytes()[:-20])
    newest = out / "snapshots" / "step-00000010"
    content = bytearray((newest / "rank-0.safetensors").read_bytes())
    content[-100] ^= 1
    (newest / "rank-0.safetensors").write_bytes(content)
    (out / "record.json").unlink()
    foreign = {
        "loss": (["--loss", "AM-Softmax"], "loss was MV-AM-Softmax-a, is AM-Softmax"),
        "classes": (["--synthetic-classes", "31"], "classes was 30, is 31"),
        "dimensions": (["--embedding-dim", "9"], "embedding_dim was 8, is 9"),
        "rate": (["--lr", "0.06"], "lr was 0.05, is 0.06"),
    }
    (code, said, _), *refused, (ranks_code, _, ranks_error), (again, *_), (gone, _, nothing) = worker(
        run(out, *steps, "--resume"),
        *(run(out, *steps, *more, "--resume") for more, _ in foreign.values()),
        run(out, *steps, "--resume", ranks=2),
        run(out, *steps),
        run(lost, *steps, "--resume"),
    )
    assert code == (0,)
    assert "step-00000010 is damaged: rank-0.safetensors does not have the SHA-256 that manifest.json names" in said[0]
    assert "going on from" in said[0] and "step-00000008" in said[0]
    assert last_snapshot(out) == last_snapshot(whole)
    for (_, text), (code, _, error) in zip(foreign.values(), refused, strict=True):
        assert code == (1,) and "is of another run: " in error[0] and text in error[0], error
    assert ranks_code == (1, 1) and "ranks was 1, is 2" in ranks_error[0] and not ranks_error[1]
    assert again == (1,)  # without --resume nothing is overwritten
    assert gone == (1,) and nothing[0].count("manifest.json is not whole") == 2
    assert "no snapshot to go on from" in nothing[0]


def png(seed, size=16):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A folder of 6 people × 10 images of 16 × 16, of which one is damaged, and a pair set of 20 pairs."""
    root = tmp_path_factory.mktemp("faces")
    for i in range(60):
        path = root / "people" / f"p{i % 6}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (root / "people" / "p1" / "13.png").write_bytes(b"none")
    same = np.arange(20) % 2 == 0
    contents = [png(100 + i // 2 if same[i // 2] else 200 + i) for i in range(40)]
    images.write_bin(root / "pairs.bin", contents, same)
    images.write_rec(root / "rec" / "train.rec", images.open_images(root / "people"))
    return root


def test_from_files_to_a_verified_record(tmp_path, faces):
    options = ["--steps", "10", "--verify", faces / "pairs.bin", "--test-every", "4"]
    folder, rec, limit = ["--data", faces / "people"], ["--data", faces / "rec"], ["--bad-limit", "0"]
    one, two, resumed, (codes, _, errors) = worker(
        run(tmp_path / "folder", *options, "--workers", "2", data=folder),
        run(tmp_path / "rec", *options, ranks=2, data=rec),
        run(tmp_path / "folder", *options, "--resume", data=rec),  # the same set in another place and format
        run(tmp_path / "limit", *options, *limit, ranks=2, data=folder),
    )
    assert (one[0], two[0], resumed[0]) == ((0,), (0, 0), (0,)), (one, two, resumed)
    assert "the run has all its steps already" in resumed[1][0]
    for name in ("folder", "rec"):
        record = json.loads((tmp_path / name / "record.json").read_text())
        assert record["metrics"]["pairs"] > 0.9  # the same image twice is easy
        assert record["sizes"]["bad_images"] == 1 and record["sizes"]["train_classes"] == 6
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "pairs" in line] == [4, 8, 10]
        assert all(line["images_per_s"] > 0 and 0 <= line["waiting"] <= 1 for line in lines if "loss" in line)
    spoken = [text for text in errors if "1 images don't decode, more than the limit of 0" in text]
    assert set(codes) == {1} and len(spoken) == 1 and spoken[0].startswith("mvrepro train: rank ")


def test_bad_input_is_one_readable_message(tmp_path, faces):
    """For each: nothing is trained, the exit code tells, and rank 0 alone speaks."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    source = images.open_images(faces / "people")
    images.write_rec(tmp_path / "holes" / "train.rec", source.without(np.array([2, 3])))
    PEOPLE = ["--data", faces / "people"]
    cases = [
        ("unknown loss 'Hardmax'; known are: Softmax", 1, ["--loss", "Hardmax"], SET),
        ("unknown backbone 'vit'; known are: toy, iresnet-tiny", 1, ["--backbone", "vit"], SET),
        ("mobilefacenet takes images of 112×112 pixels", 1, ["--backbone", "mobilefacenet"], SET),
        ("batch_size must be a number >= 2, got 1", 1, ["--batch-size", "1"], SET),
        ("must be a multiple of 10, with two images", 2, ["--accumulate", "5"], SET),
        ("--update-in-backward and --accumulate exclude", 1, ["--update-in-backward", "--accumulate", "2"], SET),
        ("--update-in-backward and --clip exclude", 1, ["--update-in-backward", "--clip", "1"], SET),
        ("--tensorboard needs an extra", 1, ["--tensorboard"], SET),
        ("unknown profile 'huge'", 1, ["--profile", "huge"], SET),
        ("lacks data", 1, [], []),
        ("--data synthetic and --synthetic-classes K belong together", 1, [], ["--data", "synthetic"]),
        ("2 classes can't be spread over 3 ranks", 3, ["--batch-size", "6"], [*SET[:-1], "2"]),
        ("there is no such file or folder", 2, [], ["--data", tmp_path / "nowhere"]),
        ("expected a folder for each person, found none", 2, [], ["--data", tmp_path / "empty"]),
        ("have no image: 2–3; ask for the ids to be renumbered (--renumber)", 1, [], ["--data", tmp_path / "holes"]),
        ("batch_size 62 of 60 images over 1 ranks in 31 parts", 1, words("--batch-size 62 --accumulate 31"), PEOPLE),
        ("16×16 pixels, expected 32×32", 1, ["--image-size", "32"], PEOPLE),
        ("its pickle asks for os.system", 2, ["--verify", tmp_path / "wrong.bin"], SET),
        ("the loss became nan at step", 2, ["--lr", "1e30", "--steps", "6"], SET),
    ]
    try:
        import tensorboard  # noqa: F401

        cases = [case for case in cases if "tensorboard" not in case[0]]
    except ImportError:
        pass
    results = worker(*(run(tmp_path / f"{i}", *more, ranks=r, data=d) for i, (_, r, more, d) in enumerate(cases)))
    for i, ((text, ranks, *_), (codes, _, errors)) in enumerate(zip(cases, results, strict=True)):
        assert codes == (1,) * ranks and text in errors[0], (text, codes, errors)
        assert errors[0].count("\n") == 1 and not any(errors[1:]), (text, errors)
        assert not list(tmp_path.glob(f"{i}/snapshots/*")) and not (tmp_path / f"{i}" / "record.json").exists()


def test_gradients_over_ranks():
    checks = [(1, "clipping"), (2, "clipping"), (1, "accumulation"), (2, "accumulation"), (2, "released")]
    for (ranks, name), (codes, _, errors) in zip(
        checks, worker(*({"ranks": r, "check": name} for r, name in checks)), strict=True
    ):
        assert codes == (0,) * ranks, (name, ranks, errors)


def test_the_papers_number_of_classes_under_torchrun(tmp_path):
    """K = 72,690 on two ranks, as a user would start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mvrepro"]
    command += ["train", "--profile", "paper", *SMALL, *SET[:-1], "72690", "--steps", "3", "--out", str(tmp_path)]
    command += ["--embedding-dim", "128", "--lr", "0.001"]
    where = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=os.environ | where, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["sizes"]["train_classes"] == 72690 and record["sizes"]["train_images"] == 726900
    assert 25 < record["curve"]["loss"][-1] < 50  # about 30 at D = 512, whose cosines start nearer to 0


@pytest.mark.extra
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra scale is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = Logs(tmp_path, 0, tensorboard=True)
    logs.write(5, {"loss": 2.5, "lr": 0.1})
    logs.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(5, 2.5)]
    assert board.Tags()["scalars"] == ["loss", "lr"]


def test_rate():
    constant = [rate(settings(warmup=4), step, 15, 5) for step in range(15)]
    assert constant[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    np.testing.assert_allclose(constant[5:], [0.1] * 5 + [0.01] * 5)
    cosine = [rate(settings(warmup=2, schedule="cosine"), step, 12, 5) for step in range(12)]
    np.testing.assert_allclose(cosine[2:], [0.5 * (1 + np.cos(np.pi * i / 10)) for i in range(10)])
    with pytest.raises(UserError, match="unknown schedule 'linear'; known are: step, cosine"):
        check(settings(schedule="linear"))


def test_lr_falls_by_one_tenth_after_the_other() -> None:
    """As torch's MultiStepLR has it: a power of 0.1 has other last bits."""
    assert [rate(settings(lr=0.3), step, 15, 5) for step in (4, 5, 14)] == [0.3, 0.3 * 0.1, 0.3 * 0.1 * 0.1]
    assert 0.3 * 0.1 * 0.1 != 0.3 * 0.1**2


def test_a_start_from_the_margin_model() -> None:
    """Its warm-up of t begins when t does: t never jumps."""
    config = settings(loss="MV-AM-Softmax-a", t=0.3, margin_epochs=2)
    assert [emphasis(config, step, 10) for step in (0, 19, 20, 29)] == [(0.0, 0), (0.0, 0), (0.3, 0), (0.3, 9)]
    with pytest.raises(UserError, match="margin_epochs must be a number >= 0, got -1"):
        check(settings(margin_epochs=-1))


def test_order_is_a_function_of_seed_and_step():
    config = settings(accumulate=2)
    ranks = [list(Order(config, 50, rank, 3)) for rank in range(3)]
    assert all(len(places) == 3 * 4 * 2 for places in ranks)  # epochs, steps, parts
    for epoch in range(3):
        parts = [part for places in ranks for part in places[8 * epoch : 8 * epoch + 8]]
        seen = Counter(i for part in parts for i in part.rows.tolist())
        assert set(seen.values()) == {1} and len(seen) == 48  # each image once; two of 50 are no batch for six pieces
        assert {part.share for part in parts} == {0.5}
    resumed = Order(config, 50, 1, 3)
    for first in (5, 8, 11):
        resumed.first = first
        for one, other in zip(resumed, ranks[1][2 * first :], strict=True):
            assert (one.rows == other.rows).all() and (one.mirrored == other.mirrored).all()
    other = list(Order(settings(accumulate=2, seed=1), 50, 1, 3))
    assert any((a.rows != b.rows).any() for a, b in zip(other, ranks[1], strict=True))


def test_what_is_left_of_an_epoch_is_a_smaller_batch():
    order = Order(settings(accumulate=2), 47, 0, 2)  # 12 a step, four pieces: 11 are left, in pieces of 3, 3, 3, 2
    assert (order.an_epoch, order.sizes()) == (4, [12, 12, 12, 11])
    ranks = [list(Order(settings(accumulate=2), 47, rank, 2)) for rank in range(2)]
    assert [len(part.rows) for part in (*ranks[0][6:8], *ranks[1][6:8])] == [3, 3, 3, 2]
    assert sorted(i for places in ranks for part in places[:8] for i in part.rows.tolist()) == list(range(47))
    assert ranks[0][6].share + ranks[0][7].share == 1 and ranks[0][6].share == 6 / 11


def test_mirroring_is_fair_and_its_own():
    parts = list(Order(settings(batch_size=1000, epochs=2), 20_000))
    first, second = (np.concatenate([p.mirrored for p in half])[np.argsort(np.concatenate([p.rows for p in half]))]
                     for half in (parts[:20], parts[20:]))  # fmt: skip
    other = np.concatenate([p.mirrored for p in Order(settings(batch_size=1000, epochs=1, seed=1), 20_000)])
    for a, b in ((first, second), (first, other)):
        assert abs((a == b).mean() - 0.5) < 0.02  # 5 standard deviations
    assert abs(first.mean() - 0.5) < 0.02 and abs((first[1:] == first[:-1]).mean() - 0.5) < 0.02
    assert not any(p.mirrored.any() for p in Order(settings(flip=False), 50))


def test_an_environment_that_torchrun_did_not_make(monkeypatch):
    monkeypatch.setenv("RANK", "x")
    with (
        pytest.raises(UserError, match="the environment says RANK='x', which is no number: torchrun sets it"),
        joined(settings()),
    ):
        pass
