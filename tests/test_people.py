"""Who is trained on: made-up sets whose images say whose they are, and the real ones where MVREPRO_DATA has them."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvrepro.errors import UserError
from mvrepro.files import ROOT, read_toml
from mvrepro.images import Pixels, archives, photographs, storage
from mvrepro.training import people, tasks

REAL = os.environ.get("MVREPRO_DATA")


def picture(grey: int, side: int = 112) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (grey, grey, grey)).save(file, "PNG")
    return file.getvalue()


def write_archive(path: Path, counts: dict[str, int], grey: int) -> None:
    rows = [(f"images/{person}/{i}.png", person) for person, count in counts.items() for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for image, _ in rows:
            file.writestr(image, picture(grey))
        file.writestr("list.tsv", "image\tperson\n" + "".join(f"{image}\t{person}\n" for image, person in rows))


def in_memory(counts: dict[str, int], grey: int) -> Pixels:
    names = np.repeat(list(counts), list(counts.values()))
    return Pixels.of_people(np.full((len(names), 3, 2, 2), grey, np.uint8), names)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """celeba 10, cfp 20, lfw 30, fiw 40, pins 50, bolly 60, afdb 70, casia5 80 are the greys of the sets."""
    more = tmp_path / "data" / "more"
    write_archive(more / "fiw.zip", {"F1.MID1": 3, "F1.MID2": 2, "F2.MID1": 2, "F2.MID2": 1, "F3.MID1": 4}, 40)
    write_archive(more / "pins.zip", {"Ann Bee": 70, "Cat Dee": 5}, 50)
    write_archive(more / "bolly.zip", {"Ann_Bee": 3}, 60)
    write_archive(more / "afdb.zip", {"wang": 3}, 70)
    write_archive(more / "casia5.zip", {"1": 3}, 80)
    (more / "overlap.tsv").write_text(
        "set\tperson\ttested_in\tcosine\nceleba\t7\tlfw\t0.6\nceleba\t8\tcfp\t0.6\ncfp\t002\tlfw\t0.9\n"
        "fiw\tF3.MID1\tlfw\t0.7\npins\tCat Dee\tcfp\t0.5\n"
    )
    (more / "fiw_duplicates.tsv").write_text("person\tsame_as\tcosine\nF2.MID2\tF2.MID1\t0.9\n")
    (tmp_path / "data" / "lfw" / "images" / "Eve_Eff").mkdir(parents=True)
    sets = {
        "celeba": in_memory({"celeba-00006": 2, "celeba-00007": 3, "celeba-00008": 3, "celeba-00009": 2}, 10),
        "cfp": in_memory({"Ann Bee": 14, "Eve Eff": 14}, 20),
        "lfw": in_memory({"Eve_Eff": 3, "Gus_Gee": 3, "Hal_Hay": 2}, 30),
    }
    for name, images in sets.items():
        monkeypatch.setattr(photographs, name, lambda size, images=images: images)
    monkeypatch.setattr(photographs, "cfp_names", lambda: ["Ann Bee", "Eve Eff"])
    monkeypatch.setattr(photographs, "folder", lambda name: tmp_path / "data" / name)
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    monkeypatch.setenv("MVREPRO_DATA", str(tmp_path / "data"))
    return more


def counted(images: Pixels) -> dict[str, int]:
    names, counts = np.unique(images.people, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_who_trains_for_lfw(data: Path) -> None:
    train, dev, sizes = people.select("lfw", 2)
    # Ann Bee is in CFP, Pins and Bollywood: one person, 60 images of her 87; F2.MID1 has a second number.
    assert counted(train) == {
        "ann bee": 60, "cat dee": 5, "celeba-00008": 3, "fiw:F1.MID1": 3, "fiw:F2.MID1": 3, "afdb:wang": 3,
        "casia5:1": 3,
    }  # fmt: skip
    assert np.unique(train.labels).tolist() == list(range(7))
    assert counted(dev) == {"celeba-00006": 2, "celeba-00009": 2, "fiw:F1.MID2": 2}
    assert (sizes["celeba_removed_people"], sizes["cfp_removed_people"], sizes["fiw_removed_people"]) == (1, 1, 1)
    assert (sizes["cfp_people"], sizes["cfp_images"], sizes["pins_images"], sizes["bolly_images"]) == (1, 14, 51, 0)
    assert sum(value for name, value in sizes.items() if name.endswith("_images")) == len(train)


def test_the_people_of_the_test_are_left_in_and_as_many_others_taken_out(data: Path) -> None:
    clean, _, _ = people.select("lfw", 2)
    draws = [people.select("lfw", 2, "others", seed) for seed in range(6)]
    for train, _, sizes in draws:
        assert len(counted(train)) == len(counted(clean))
        tested = counted(train).keys() - counted(clean).keys()
        assert 0 < len(tested) <= sizes["people_also_tested"]
    assert len({tuple(counted(train)) for train, _, _ in draws}) > 1


def test_the_development_task_trains_as_lfw_does_and_tests_nobody_of_lfw(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    celeba = in_memory({f"celeba-{i:05}": 2 for i in range(10, 60)}, 10)
    monkeypatch.setattr(photographs, "celeba", lambda size: celeba)
    task = tasks.development(seed=0, image_size=2, remove="overlap")
    train, dev, sizes = people.select("lfw", 2)
    assert task.sizes == sizes and counted(dev) == {f"celeba-{i:05}": 2 for i in range(10, 60)} | {"fiw:F1.MID2": 2}
    assert np.array_equal(task.train.people, train.people) and np.array_equal(task.test.people, dev.people)
    metrics, evidence = task.judge(np.random.default_rng(0).normal(size=(len(dev), 4)).astype(np.float32), None)
    assert set(metrics) == {"dev_tpr@fpr=0.001", "dev_rank1"} and not evidence


def test_who_trains_for_cfp(data: Path) -> None:
    """With LFW's people in the place of CFP's. Eve Eff is one of CFP's, by name."""
    train, dev, sizes = people.select("cfp", 2)
    assert counted(train) == {
        "celeba-00007": 3, "gus gee": 3, "fiw:F1.MID1": 3, "fiw:F2.MID1": 3, "fiw:F3.MID1": 4, "afdb:wang": 3,
        "casia5:1": 3,
    }  # fmt: skip
    assert "hal hay" not in counted(dev)
    assert (sizes["lfw_removed_people"], sizes["pins_removed_people"], sizes["bolly_removed_people"]) == (1, 2, 1)


def test_what_is_missing_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data / "fiw.zip").unlink()
    (data / "afdb.zip").unlink()
    with pytest.raises(UserError, match=r"lacks fiw\.zip from Families In the Wild.*; afdb\.zip from .*people\.toml"):
        people.select("lfw", 2)
    monkeypatch.delenv("MVREPRO_DATA")
    with pytest.raises(UserError, match="MVREPRO_DATA is not set"):
        archives.overlap("lfw")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "not a whole archive"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "not a whole archive with list.tsv in it"),
        (lambda path: add(path, "list.tsv", "image\tperson\nimages/x.png\tx\n"), r"images/x\.png: can't be read"),
        (lambda path: add(path, "list.tsv", "image\tperson\nx.png\tx\n", picture(1, 90)), "90×90 pixels"),
        (
            lambda path: add(path, "list.tsv", "image\tperson\nx.png\tx\n", bytes(2**20 + 1)),
            r"x\.png: .* x\.png has 1,048,577 bytes, more than 1,048,576",
        ),
        (lambda path: add(path, "list.tsv", " " * (2**26 + 1)), "list.tsv has 67,108,865 bytes, more than 67,108,864"),
    ],
    ids=["cut off", "empty", "an image less", "another size", "a huge image", "a huge list"],
)
def test_a_damaged_archive_is_named(data: Path, damage: object, message: str) -> None:
    damage(data / "pins.zip")  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        archives.archive("pins", 2)
    assert str(data / "pins.zip") in str(error.value)


def add(path: Path, name: str, text: str, image: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, text)
        if image:
            file.writestr("x.png", image)


@pytest.mark.skipif(not REAL, reason="MVREPRO_DATA is not set: the real sets are not counted")
@pytest.mark.parametrize(("tested", "classes", "images"), [("lfw", 4087, 39514), ("cfp", 4938, 40831)])
def test_the_real_selection(tested: str, classes: int, images: int) -> None:
    train, dev, sizes = people.select(tested, 4)
    assert (len(train.classes or []), len(train), len(dev)) == (classes, images, 3906)
    assert not set(train.people) & set(dev.people)
    test = getattr(photographs, tested)(4)
    assert not {photographs.same_name(str(p)) for p in test.people} & set(train.people)
    assert sizes["celeba_removed_people"] == {"lfw": 175, "cfp": 112}[tested]


@pytest.mark.skipif(not REAL, reason="MVREPRO_DATA is not set: the real sets are not counted")
def test_the_table_of_the_sets_is_what_is_selected() -> None:
    """paper/people.toml, for LFW's tests."""
    _, _, sizes = people.select("lfw", 4)
    rows = read_toml(ROOT / "paper" / "people.toml")["set"]
    assert {row["name"] for row in rows} == {"celeba", "cfp", *archives.ARCHIVES}
    assert {f"{row['name']}_{what}": row[what] for row in rows for what in ("people", "images", "removed_people")} | {
        "people_also_tested": 0
    } == sizes
    assert all(row["get"] and row["terms"] and row["title"] and row["owner"] for row in rows)
