"""`python -m mvrepro published`: anybody's networks by all protocols of faces, on made-up people."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_tasks import World, made_up, write_lines

from mvrepro import __main__, protocols
from mvrepro.commands import published
from mvrepro.evidence import runs
from mvrepro.images import Pixels, photographs
from mvrepro.training import tasks

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = made_up(tmp_path_factory.mktemp("data"))
    lfw = found.folder / "lfw"
    write_lines(lfw / "hard_pairs.txt", *(lfw / "pairs.txt").read_text().splitlines())
    (found.folder / "networks").mkdir()
    for name in ("small", "other"):
        (found.folder / "networks" / f"{name}.onnx").write_bytes(b"made up")
    return found


@pytest.fixture
def embedded(world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Made-up embeddings of LFW and CFP, which `embed` finds here whatever the network is: a direction a person, and
    noise. A pixel of each image holds its person, so that `--pixels` knows everybody."""
    monkeypatch.setenv("MVREPRO_DATA", str(world.folder))
    found = {}
    for name in ("lfw", "cfp"):
        images = world.sets[name]
        centres = RNG.normal(size=(images.labels.max() + 1, 12))
        found[name] = (centres[images.labels] + RNG.normal(0, 0.5, (len(images), 12))).astype(np.float32)
    known = {key: coloured(images) for key, images in world.sets.items()}
    monkeypatch.setattr(photographs, "files", lambda name: world.sets[name])
    for name, images in known.items():
        monkeypatch.setattr(photographs, name, lambda size, images=images: images)

    def embed(arguments: list[str]) -> int:
        command, network, images, out, *_ = arguments
        assert command == "embed" and network.endswith(".onnx")
        Path(out).mkdir(parents=True)
        np.save(Path(out) / "embeddings.npy", found[images])
        return 0

    monkeypatch.setattr(published, "main", embed)
    return found


def coloured(images: Pixels) -> Pixels:
    """Twelve random values a person, as an image of 2×2 pixels."""
    colours = np.random.default_rng(1).integers(0, 256, (images.labels.max() + 1, 3, 2, 2), np.uint8)
    return Pixels(colours[images.labels], images.labels, images.classes, images.names)


def done(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out = tmp_path / "values.json"
    assert __main__.main(["published", *arguments, "--embeddings", str(tmp_path / "e"), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_network_is_judged_as_a_run_is(
    world: World, embedded: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task `lfw` judges what training makes; its numbers and these are the same for the same embeddings."""
    record = done(tmp_path)
    values = record["values"]
    assert record["kind"] == "measured" and list(values) == ["other", "small", "pixels"]
    assert values["small"] == values["other"], "the same embeddings"
    lfw = world.sets["lfw"]
    dev = world.sets["celeba"].only(world.sets["celeba"].sizes() == 2)
    task = tasks.on_lfw(lfw, lfw, dev, {}, published.FPRS, world.folder / "lfw")
    metrics, evidence = task.judge(np.concatenate([embedded["lfw"], RNG.normal(size=(len(dev), 12))]), None)
    found = values["small"]
    for name in ("lfw_accuracy", "tpr@fpr=0.001", "tpr@fpr=1e-05", "blufr_vr@far=0.001", "blufr_dir@far=0.01"):
        assert found["metrics"][name] == pytest.approx(metrics[name], abs=1e-6), name
    assert found["metrics"]["hard_accuracy"] == found["metrics"]["lfw_accuracy"], "here the same list"
    assert found["folds"]["lfw"]["accuracies"] == evidence["lfw"]["accuracies"]
    assert found["roc"] == {key: evidence["all_pairs"][key] for key in ("fpr", "tpr")}
    assert found["blufr"]["dir"] == evidence["blufr"]["dir"]
    assert list(tasks.ROC) == found["roc"]["fpr"] and tasks.DISTRACTORS == published.DISTRACTORS
    assert capsys.readouterr().out.count("lfw_accuracy") == 3


def test_errors_and_conventions_are_those_of_the_protocols(embedded: dict[str, np.ndarray], tmp_path: Path) -> None:
    found = done(tmp_path, "--no-pixels")["values"]["small"]
    pairs = photographs.cfp_pairs("FP", photographs.files("cfp").names)
    scores = protocols.pair_cosines(embedded["cfp"], pairs.left, pairs.right)
    for rule in ("exact", "insightface"):
        want = protocols.kfold_accuracy(scores, pairs.same, pairs.folds, rule)
        assert found["folds"]["cfp_fp"][rule] == pytest.approx(want.mean, abs=1e-6)
    accuracies = np.array(found["folds"]["cfp_fp"]["accuracies"])
    assert found["errors"]["cfp_fp_accuracy"] == pytest.approx(accuracies.std(ddof=1) / 10**0.5, abs=1e-5)
    assert found["errors"].keys() == found["metrics"].keys()
    assert all(0 <= error < 0.2 for error in found["errors"].values())


def test_distractors_are_the_people_with_one_image(embedded: dict[str, np.ndarray], tmp_path: Path) -> None:
    rank1 = done(tmp_path, "--no-pixels")["values"]["small"]["rank1"]
    assert (rank1["probes"], rank1["distractors"]) == (350, [10, 30, 100, 300, 400])
    assert rank1["rates"] == sorted(rank1["rates"], reverse=True) and rank1["rates"][0] > 0.5
    p = rank1["rates"][-1]
    assert rank1["errors"][-1] == pytest.approx((p * (1 - p) / 350) ** 0.5, abs=1e-6)


def test_who_of_cfp_is_in_lfw_by_name_and_to_the_network(
    world: World, embedded: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """45 people of CFP are called as one of LFW. 40 of them look just like their namesake, five like somebody else."""
    lfw, cfp = world.sets["lfw"], world.sets["cfp"]
    assert lfw.classes and cfp.classes
    known = {photographs.same_name(name): label for label, name in enumerate(lfw.classes)}
    directions = embedded["lfw"] / np.linalg.norm(embedded["lfw"], axis=1, keepdims=True)
    shared = [name for name in cfp.classes if photographs.same_name(name) in known]
    for place, name in enumerate(shared):
        label = known[photographs.same_name(name)]
        of_whom = label if place < 40 else (label + 1) % len(lfw.classes)
        embedded["cfp"][cfp.labels == cfp.classes.index(name)] = directions[lfw.labels == of_whom].mean(axis=0)
    found = done(tmp_path)["values"]
    assert "cfp people in lfw" not in found["pixels"]
    groups = found["small"]["cfp people in lfw"]
    chance = list(groups.pop("chance").values())
    cosines = {key: runs.numbers(words) / 1e4 for key, words in groups.items()}
    assert {key: len(x) for key, x in cosines.items()} == {"namesake": 40, "another": 5, "no namesake": 65}
    assert all((np.diff(x) >= 0).all() for x in cosines.values()) and cosines["namesake"].min() > 0.99
    assert chance == sorted(chance, reverse=True) and 1 >= chance[0] > chance[-1] >= 0


def test_the_pixels_are_less_the_mean_of_celeba(embedded: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Each person has a colour of their own here, the same in all of the person's images."""
    found = done(tmp_path)["values"]["pixels"]
    assert (found["dimensions"], found["metrics"]["lfw_accuracy"], found["metrics"]["rank1"]) == (12, 1.0, 1.0)
    assert "blufr" not in found and found["errors"].keys() == found["metrics"].keys()
    lfw = photographs.lfw(32)
    mean = photographs.celeba(32).pixels.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(published._pixels()[0][7], (lfw.pixels[7] - mean).ravel(), rtol=1e-6)


def test_the_error_over_people_is_that_of_drawing_them() -> None:
    owned = RNG.integers(1, 30, 300)
    accepted = RNG.binomial(owned, RNG.uniform(0.2, 0.9, 300))
    drawn = RNG.multinomial(300, np.full(300, 1 / 300), 4000)
    spread = ((drawn @ accepted) / (drawn @ owned)).std()
    assert published.error_over_people(accepted, owned) == pytest.approx(spread, rel=0.06)
    assert published.error_over_people(np.array([3]), np.array([4])) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx"], "none.onnx: no such file"),
        (["a/net.onnx", "b/net.onnx"], "networks go by the names of their files: each needs another one"),
        (["pixels.onnx"], "and not 'pixels'"),
    ],
)
def test_wrong_networks_are_one_message(
    embedded: dict[str, np.ndarray], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["published", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_what_is_missing_is_named_before_anything_is_embedded(
    world: World, embedded: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def never(arguments: list[str]) -> int:
        raise AssertionError("nothing may be embedded yet")

    monkeypatch.setattr(published, "main", never)
    hard = world.folder / "lfw" / "hard_pairs.txt"
    kept = hard.read_text()
    hard.write_text(kept.replace("10 36", "10 37"))
    assert __main__.main(["published"]) == 1
    assert "hard_pairs.txt, line 1: 740 pairs announced, 720 lines follow" in capsys.readouterr().err
    hard.write_text(kept)
    for path in (networks := world.folder / "networks").iterdir():
        path.rename(tmp_path / path.name)
    assert __main__.main(["published"]) == 1
    assert f"{networks} holds no .onnx file: name networks, or put some there" in capsys.readouterr().err
    for path in tmp_path.glob("*.onnx"):
        path.rename(networks / path.name)
    monkeypatch.setenv("MVREPRO_DATA", "")
    assert __main__.main(["published"]) == 1
    assert "MVREPRO_DATA is not set" in capsys.readouterr().err


def test_a_network_that_cannot_be_embedded_ends_it(
    embedded: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "main", lambda arguments: 1)
    assert __main__.main(["published", "--out", str(tmp_path / "out.json")]) == 1
    assert not (tmp_path / "out.json").exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_embedded(
    world: World, embedded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(published, "main", None)
    network = world.folder / "networks" / "small.onnx"
    for out, message in ((world.folder, "it is a folder"), (network, "is read, and would be written over")):
        assert __main__.main(["published", "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
