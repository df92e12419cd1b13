"""The readers of LFW, CFP and CelebA: on a miniature of their folders, good and damaged, and on the real ones where
MVREPRO_DATA names them."""

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvrepro.errors import UserError
from mvrepro.images import Files, Pairs, Pixels, photographs, storage

SIZE = 8  # of the miniature's images; a pixel is the mean of 14×14
LFW = {"Al_Z": 2, "Al_Z_Jr": 1, "Bo-Bo": 3, "D_B_Cy": 1}
CFP = ["bo-bo", "Dee", "d b  cy"]
CELEBA = {"000001": 7, "000002": 12345678, "000003": 7, "000004": 0}
PAIRS = ["2\t1", "Al_Z\t1\t2", "Al_Z\t2\tBo-Bo\t3", "Bo-Bo\t3\t1", "D_B_Cy\t1\tAl_Z_Jr\t1"]


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def jpeg(seed: int, width: int = 112, height: int = 112) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in place of photographs, laid out as the data are: 7 images of LFW, 3·(2 + 1) of CFP, 4 of CelebA."""
    root = tmp_path_factory.mktemp("faces")
    images = [f"lfw/images/{name}/{name}_{shot:04d}" for name, shots in LFW.items() for shot in range(1, shots + 1)]
    sides = ("frontal/01", "frontal/02", "profile/01")
    images += [f"cfp/images/{person:03d}/{side}" for person in (1, 2, 3) for side in sides]
    images += [f"celeba/images/{name}" for name in CELEBA]
    for seed, name in enumerate(images):
        path = root / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    write_lines(root / "lfw/pairs.txt", *PAIRS)
    write_lines(root / "celeba/identity.txt", *(f"{name}.jpg {person}" for name, person in CELEBA.items()))
    write_lines(root / "cfp/names.txt", *CFP)
    protocol = root / "cfp/protocol"
    for side, shots in (("F", sides[:2]), ("P", sides[2:])):
        paths = [f"../Data/Images/{person:03d}/{shot}.jpg" for person in (1, 2, 3) for shot in shots]
        write_lines(protocol / f"Pair_list_{side}.txt", *(f"{i} {path}" for i, path in enumerate(paths, 1)))
    for fold in range(1, 11):  # front 1, 2 are the first person's, 3, 4 the second's, …; profiles are 1, 2, 3
        write_lines(protocol / f"Split/FF/{fold:02d}/same.txt", "1,2", "6,5")
        write_lines(protocol / f"Split/FF/{fold:02d}/diff.txt", f"{fold % 2 + 1},4")
        write_lines(protocol / f"Split/FP/{fold:02d}/same.txt", "3,2")
        write_lines(protocol / f"Split/FP/{fold:02d}/diff.txt", "3, 1", "2,3")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, which MVREPRO_DATA names; the decoded pixels are kept in tmp_path."""
    copy = shutil.copytree(original, tmp_path / "data")
    monkeypatch.setenv("MVREPRO_DATA", str(copy))
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    return copy


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], list[Path]]:
    """What lies in the folder of decoded pixels, halves of files included."""
    return lambda: sorted((tmp_path / "local").rglob("*.*"))


def pair_rows(pairs: Pairs) -> list[tuple[int, int, bool, int]]:
    columns = (pairs.left, pairs.right, pairs.same, pairs.folds)
    assert [column.dtype for column in columns] == [np.int64, np.int64, np.bool_, np.int64]
    return list(zip(*(column.tolist() for column in columns), strict=True))


# Good input


LFW_NAMES = ["Al_Z_0001", "Al_Z_0002", "Al_Z_Jr_0001", "Bo-Bo_0001", "Bo-Bo_0002", "Bo-Bo_0003", "D_B_Cy_0001"]
CFP_NAMES = [f"{n:03d}/{side}" for n in (1, 2, 3) for side in ("frontal/01", "frontal/02", "profile/01")]
SETS = {
    "lfw": (
        [f"{name.rpartition('_')[0]}/{name}" for name in LFW_NAMES],
        LFW_NAMES,
        ["Al_Z"] * 2 + ["Al_Z_Jr"] + ["Bo-Bo"] * 3 + ["D_B_Cy"],
    ),
    "cfp": (CFP_NAMES, CFP_NAMES, [name for name in CFP for _ in range(3)]),
    "celeba": (list(CELEBA), list(CELEBA), ["celeba-00007", "celeba-12345678", "celeba-00007", "celeba-00000"]),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_has_its_images_in_order_with_their_people(root: Path, name: str) -> None:
    files, names, people = SETS[name]
    found = getattr(photographs, name)(SIZE)
    assert (len(found), found.names.tolist(), found.people.tolist()) == (len(files), names, people)
    assert (found.pixels.dtype, found.pixels.shape) == (np.uint8, (len(files), 3, SIZE, SIZE))
    for row, file in enumerate(files):
        with Image.open(root / name / "images" / f"{file}.jpg") as image:
            blocks = np.asarray(image, float).reshape(SIZE, 14, SIZE, 14, 3)
        np.testing.assert_allclose(found.pixels[row], blocks.mean((1, 3)).transpose(2, 0, 1), rtol=0, atol=1.01)


def test_full_size_is_the_files_pixels(root: Path) -> None:
    with Image.open(root / "celeba/images/000003.jpg") as image:
        assert np.array_equal(photographs.celeba(112).pixels[2].transpose(1, 2, 0), np.asarray(image))


def test_grey_images_get_three_equal_channels(root: Path) -> None:
    path = root / "celeba/images/000002.jpg"
    Image.open(path).convert("L").save(path)
    pixels = photographs.celeba(SIZE).pixels[1]
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[0], pixels[2])


def test_what_is_no_jpeg_is_passed_over(root: Path) -> None:
    before = photographs.lfw(SIZE)
    write_lines(root / "lfw/images/.DS_Store", "x")
    write_lines(root / "lfw/images/Al_Z/notes.txt", "x")
    assert photographs.lfw(SIZE).names.tolist() == before.names.tolist()


def test_where_sizes_and_joined() -> None:
    people = np.array(["b", "a", "b", "c"])
    names = np.array(["b1", "a1", "b2", "c1"])
    some = Pixels.of_people(np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1), people, names)
    assert some.sizes().tolist() == [2, 1, 2, 1]
    assert (some.labels.tolist(), some.labels.dtype, some.classes) == ([1, 0, 1, 2], np.int64, ["a", "b", "c"])
    assert some.people.tolist() == people.tolist()
    rest = some.only(people != "a")
    assert (rest.pixels.ravel().tolist(), rest.names.tolist()) == ([0, 2, 3], ["b1", "b2", "c1"])
    assert (rest.labels.tolist(), rest.classes) == ([0, 0, 1], ["b", "c"])  # numbered anew, without a hole
    both = rest.joined(some.only(people == "a"))
    assert (both.people.tolist(), both.names.tolist()) == (["b", "b", "c", "a"], ["b1", "b2", "c1", "a1"])
    assert (both.labels.tolist(), both.pixels.ravel().tolist()) == ([1, 1, 2, 0], [0, 2, 3, 1])
    assert some.read(np.array([3, 1])).ravel().tolist() == [3, 1]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Ann_Lee", "ann  LEE ", True),
        ("Strauß", "STRAUSS", True),
        ("Ann-Lee", "Ann Lee", False),
        ("AnnLee", "Ann Lee", False),
        ("Nicholas Cage", "Nicolas_Cage", True),  # SPELLINGS
    ],
)
def test_same_name(one: str, other: str, same: bool) -> None:
    assert (photographs.same_name(one) == photographs.same_name(other)) is same


def test_overlapping_gives_the_names_of_the_first(root: Path) -> None:
    ours, theirs = photographs.cfp(SIZE).people, photographs.lfw(SIZE).people
    assert photographs.overlapping(ours, theirs) == {"bo-bo", "d b  cy"}
    assert photographs.overlapping(theirs, ours) == {"Bo-Bo", "D_B_Cy"}
    assert photographs.overlapping(["x"], []) == set()


def test_view_2_pairs_are_rows_in_folds(root: Path) -> None:
    found = photographs.lfw_pairs(root / "lfw/pairs.txt", photographs.lfw(SIZE).names)
    assert pair_rows(found) == [(0, 1, True, 0), (1, 5, False, 0), (5, 3, True, 1), (6, 2, False, 1)]


def test_view_1_pairs_are_one_fold(root: Path) -> None:
    path = root / "lfw/pairsDevTest.txt"
    write_lines(path, "1", "Bo-Bo 1 2", "Bo-Bo 1 Al_Z 2")
    assert pair_rows(photographs.lfw_pairs(path, photographs.lfw(SIZE).names)) == [(3, 4, True, 0), (3, 1, False, 0)]


def test_lists_without_a_header_are_cut_into_ten_runs_of_each_kind(tmp_path: Path) -> None:
    """RFW's lists, fold by fold; CALFW's and CPLFW's, two lines a pair and all pairs of one person first."""
    names = np.array([f"{who}/{who}_{shot:04d}.jpg" for who in ("m.0a", "m.0b") for shot in (1, 2, 3)])
    pairs = [(0, 1, True), (2, 4, False), (3, 5, True), (0, 3, False)]
    rfw = [["m.0a 1 2", "m.0a\t3\tm.0b\t2"], ["m.0b\t1\t3", "m.0a 1 m.0b 1"]]
    write_lines(tmp_path / "rfw.txt", *(line for fold in range(10) for line in rfw[fold % 2]))
    want = [(*pairs[2 * (fold % 2) + k], fold) for fold in range(10) for k in (0, 1)]
    assert pair_rows(photographs.lfw_pairs(tmp_path / "rfw.txt", names)) == want
    flat = sorted(want, key=lambda pair: not pair[2])
    for flag in ("1", "7"):  # CALFW has the number of the fold
        lines = [f"{names[row].split('/')[1]} {flag if same else 0}" for *rows, same, _ in flat for row in rows]
        write_lines(tmp_path / "cplfw.txt", *lines)
        assert pair_rows(photographs.lfw_pairs(tmp_path / "cplfw.txt", names)) == flat


@pytest.mark.parametrize(
    ("number", "lines", "message"),
    [
        (3, ["m.0a_0001.jpg 1 2"], "line 3: expected image flag image flag, got 'm.0a_0001.jpg 1 2 m.0a_0002.jpg 1'"),
        (4, ["m.0a_0002.jpg 0"], "line 3: expected image flag image flag, got 'm.0a_0001.jpg 1 m.0a_0002.jpg 0'"),
        (4, [], r"line 3: an image with itself is no pair, got 'm.0a_0001.jpg 1 m.0a_0001.jpg 1'"),
        (40, [], r"line 39: expected image flag image flag, got 'm.0a_0001.jpg 0 '"),
        (3, ["m.0c_0001.jpg 1"], "line 3: there is no image m.0c_0001"),
        (2, ["m.0a_0001.jpg 1"], "line 1: an image with itself is no pair"),
        (1, ["m.0a_0001.jpg 0", "m.0b_0001.jpg 0", "m.0a_0001.jpg"], "line 3: expected image flag image flag"),
    ],
)
def test_bad_pairs_without_a_header_are_named(tmp_path: Path, number: int, lines: list[str], message: str) -> None:
    names = np.array(["m.0a_0001", "m.0a_0002", "m.0b_0001"])
    good = ["m.0a_0001.jpg 1", "m.0a_0002.jpg 1"] * 10 + ["m.0a_0001.jpg 0", "m.0b_0001.jpg 0"] * 10
    path = tmp_path / "pairs.txt"
    write_lines(path, *good[: number - 1], *lines, *good[number:])
    with pytest.raises(UserError, match=rf"pairs\.txt, {message}"):
        photographs.lfw_pairs(path, names)
    write_lines(path, *good[2:])
    with pytest.raises(UserError, match=r"pairs\.txt: 9 pairs of one person, ten are needed"):
        photographs.lfw_pairs(path, names)
    write_lines(path, *good)
    with pytest.raises(UserError, match=r"names: m.0a_0001 comes twice, as m.0a_0001 and x/m.0a_0001.png"):
        photographs.lfw_pairs(path, np.array([*names, "x/m.0a_0001.png"]))


def test_cfp_pairs_are_rows_in_ten_folds(root: Path) -> None:
    names = photographs.cfp(SIZE).names
    ff = [((0, 1, True, k), (7, 6, True, k), ((k + 1) % 2, 4, False, k)) for k in range(10)]
    fp = [((3, 5, True, k), (3, 2, False, k), (1, 8, False, k)) for k in range(10)]
    for kind, expected in (("FF", ff), ("FP", fp)):
        assert pair_rows(photographs.cfp_pairs(kind, names)) == [pair for fold in expected for pair in fold]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: content.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(lambda content: b"\xef\xbb\xbf" + content, id="byte order mark"),
        pytest.param(lambda content: content.rstrip() + b"\n\n \n", id="blank lines at the end"),
        pytest.param(lambda content: content.rstrip(), id="no line end at the end"),
    ],
)
def test_lists_of_other_editors_say_the_same(root: Path, change: Callable[[bytes], bytes]) -> None:
    def read() -> list[Any]:
        ours, theirs = photographs.cfp(SIZE), photographs.lfw(SIZE)
        pairs = [photographs.lfw_pairs(root / "lfw/pairs.txt", theirs.names), photographs.cfp_pairs("FP", ours.names)]
        return [ours.people.tolist(), photographs.celeba(SIZE).people.tolist(), *map(pair_rows, pairs)]

    before = read()
    for path in root.rglob("*.txt"):
        path.write_bytes(change(path.read_bytes()))
    assert read() == before


# Bad input: each names the file, and the line of a list, and leaves nothing in the cache


def replace_line(name: str, number: int, *lines: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        before = (root / name).read_text().splitlines()
        write_lines(root / name, *before[: number - 1], *lines, *before[number:])

    return change


def content_of(name: str, content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def emptied(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        without(name)(root)
        (root / name).mkdir()

    return change


def copied(name: str, to: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, root / to)

    return change


def png_that_claims(side: int) -> bytes:
    """The head of a PNG file, which a few bytes make as large as one likes."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\x01IDAT\0"
    )


PERSON, PHOTO, CFP_PHOTO, CELEBA_PHOTO = (
    "lfw/images/Bo-Bo",
    "lfw/images/Bo-Bo/Bo-Bo_0002.jpg",
    "cfp/images/002/profile/01.jpg",
    "celeba/images/000003.jpg",
)
BAD_IMAGES = [
    ("lfw", content_of(PHOTO, b""), r"Bo-Bo_0002\.jpg can't be read as an image: not an image"),
    ("lfw", content_of(PHOTO, b"<html>Not found</html>"), r"Bo-Bo_0002\.jpg can't be read as an image: not an im"),
    ("lfw", content_of(PHOTO, jpeg(0)[:3000]), r"Bo-Bo_0002\.jpg can't be read as an image: .*truncated"),
    ("lfw", content_of(PHOTO, jpeg(0)[:300]), r"Bo-Bo_0002\.jpg can't be read as an image"),
    ("lfw", content_of(PHOTO, jpeg(0, 250, 250)), r"Bo-Bo_0002\.jpg: 250×250 pixels, expected 112×112$"),
    ("lfw", content_of(PHOTO, jpeg(0, 112, 111)), r"Bo-Bo_0002\.jpg: 112×111 pixels"),
    ("lfw", content_of(PHOTO, png_that_claims(112)), r"Bo-Bo_0002\.jpg can't be read as an image"),
    ("lfw", content_of(PHOTO, png_that_claims(30000)), r"Bo-Bo_0002\.jpg can't be read as an image: .*exceeds limit"),
    ("lfw", emptied(PHOTO), r"Bo-Bo_0002\.jpg can't be read as an image"),
    ("lfw", emptied(PERSON), r"lfw/images/Bo-Bo: no images there$"),
    ("lfw", emptied("lfw/images"), r"lfw/images: no images there$"),
    ("lfw", copied(PHOTO, "lfw/images/Al_Z/Bo-Bo_0002.jpg"), r"Al_Z/Bo-Bo_0002\.jpg: expected .* Al_Z_0001\.jpg"),
    ("lfw", copied(PHOTO, f"{PERSON}/Bo-Bo_copy.jpg"), r"Bo-Bo/Bo-Bo_copy\.jpg: expected a name like Bo-Bo_0001\.jpg"),
    ("lfw", copied(PHOTO, f"{PERSON}/._Bo-Bo_0002.jpg"), r"Bo-Bo/\._Bo-Bo_0002\.jpg: expected a name like"),
    ("cfp", content_of(CFP_PHOTO, jpeg(0)[:3000]), r"002/profile/01\.jpg can't be read as an image: .*truncated"),
    ("cfp", content_of(CFP_PHOTO, jpeg(0, 64, 64)), r"002/profile/01\.jpg: 64×64 pixels"),
    ("cfp", without("cfp/images/002"), r"names\.txt, line 2: Dee has no images in images/002/frontal$"),
    ("cfp", without("cfp/images/003/frontal"), r"names\.txt, line 3: d b  cy has no images in images/003/frontal$"),
    ("cfp", without(CFP_PHOTO), r"names\.txt, line 2: Dee has no images in images/002/profile$"),
    ("cfp", emptied("cfp/images"), r"names\.txt, line 1: bo-bo has no images in images/001/frontal$"),
    ("cfp", copied(CFP_PHOTO, "cfp/images/004/frontal/01.jpg"), r"images/004/frontal: names\.txt has no line for it$"),
    ("cfp", copied(CFP_PHOTO, "cfp/images/²/frontal/01.jpg"), r"images/²/frontal: names\.txt has no line for it$"),
    ("cfp", copied(CFP_PHOTO, "cfp/images/2/frontal/01.jpg"), r"images/2/frontal: names\.txt has no line for it$"),
    ("cfp", copied(CFP_PHOTO, "cfp/images/002/left/01.jpg"), r"images/002/left: only frontal and profile belong"),
    ("celeba", content_of(CELEBA_PHOTO, b"\xff\xd8\xff"), r"000003\.jpg can't be read as an image"),
    ("celeba", content_of(CELEBA_PHOTO, jpeg(0, 178, 218)), r"000003\.jpg: 178×218 pixels"),
]
IDENTITY, NAMES = "celeba/identity.txt", "cfp/names.txt"
NO_NUMBER = ["-1", "7.0", "x", "²", "9" * 5000]
BAD_SET_LISTS = [
    ("celeba", without(CELEBA_PHOTO), r"identity\.txt, line 3: there is no image .*celeba/images/000003\.jpg$"),
    ("celeba", replace_line(IDENTITY, 2, "", "9.jpg 1"), r"identity\.txt, line 3: there is no image .*images/9\.jpg$"),
    (
        "celeba",
        replace_line(IDENTITY, 2, "000002.jpg"),
        r"identity\.txt, line 2: expected 'image\.jpg person', got '000",
    ),
    ("celeba", replace_line(IDENTITY, 2, "000002.jpg 1 2"), r"identity\.txt, line 2: expected 'image\.jpg person'"),
    *(
        ("celeba", replace_line(IDENTITY, 2, f"000002.jpg {text}"), r"identity\.txt, line 2: expected 'image\.jpg pers")
        for text in NO_NUMBER
    ),
    ("celeba", replace_line(IDENTITY, 3, "", "000001.jpg 8"), r"identity\.txt, lines 1 and 4: 000001 stands there twi"),
    ("celeba", replace_line(IDENTITY, 3, "./000001.jpg 8"), r"identity\.txt, lines 1 and 3: 000001 stands there twice"),
    ("celeba", content_of(IDENTITY, b""), r"identity\.txt: the list is empty$"),
    ("celeba", content_of(IDENTITY, b"000001.jpg 7\n\n\xe9.jpg 8\n"), r"identity\.txt, line 3: not UTF-8"),
    ("celeba", without(IDENTITY), r"identity\.txt can't be read as a list: No such file or directory$"),
    ("celeba", emptied(IDENTITY), r"identity\.txt can't be read as a list: Is a directory$"),
    ("cfp", replace_line(NAMES, 3, "Bo-Bo"), r"names\.txt, lines 1 and 3: bo-bo stands there twice$"),
    ("cfp", replace_line(NAMES, 2, "", "Dee"), r"names\.txt, line 2: empty; each line of this list stands for"),
    ("cfp", replace_line(NAMES, 3), r"images/003/frontal: names\.txt has no line for it$"),
    ("cfp", replace_line(NAMES, 3, "d b cy", "Flo"), r"names\.txt, line 4: Flo has no images in images/004/frontal$"),
    ("cfp", content_of(NAMES, b"\n \n"), r"names\.txt: the list is empty$"),
    ("cfp", content_of(NAMES, b"a\nJos\xe9\nc\n"), r"names\.txt, line 2: not UTF-8"),
    ("cfp", without(NAMES), r"names\.txt can't be read as a list: No such file"),
]


def ids(cases: list[Any]) -> list[str]:
    return [f"{case[0]}-{case[-1][:40]}" for case in cases]


@pytest.mark.parametrize(("name", "damage", "message"), BAD_IMAGES, ids=ids(BAD_IMAGES))
def test_bad_images_are_named(
    root: Path, kept: Callable[[], list[Path]], name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(root)
    with pytest.raises(UserError, match=message):
        getattr(photographs, name)(SIZE)
    assert kept() == []


@pytest.mark.parametrize(("name", "damage", "message"), BAD_SET_LISTS, ids=ids(BAD_SET_LISTS))
def test_bad_lists_of_a_set_are_named_with_the_line(
    root: Path, kept: Callable[[], list[Path]], name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(root)
    with pytest.raises(UserError, match=message) as error:
        getattr(photographs, name)(SIZE)
    assert str(error.value).startswith(str(root))
    assert kept() == []


@pytest.mark.parametrize("size", [0, -1, 113])
def test_sizes_that_cannot_be_are_refused(root: Path, kept: Callable[[], list[Path]], size: int) -> None:
    with pytest.raises(UserError, match=rf"image_size must be in 1 … 112 for aligned faces, got {size}$"):
        photographs.lfw(size)
    assert kept() == []


BAD_LFW_PAIRS = [
    (
        1,
        ["2 1 1"],
        r"line 1: expected 'folds pairs' or 'pairs', got '2 1 1'; a list without such a line needs 20, it has 5$",
    ),
    (1, ["Al_Z 1 2"], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["-2 1"], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["² 1"], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["0"], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["0 300"], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["9" * 5000], r"line 1: expected 'folds pairs' or 'pairs'"),
    (1, ["10 300"], r"line 1: 6000 pairs announced, 4 lines follow$"),
    (4, [], r"line 1: 4 pairs announced, 3 lines follow$"),
    (5, [PAIRS[4], PAIRS[1]], r"line 1: 4 pairs announced, 5 lines follow$"),
    (2, [PAIRS[2]], r"line 2: expected name i j, got 'Al_Z\\t2\\tBo-Bo\\t3'$"),
    (3, [PAIRS[1]], r"line 3: expected name i other j, got 'Al_Z\\t1\\t2'$"),
    (3, ["", "Al_Z 2 Bo-Bo"], r"line 4: expected name i other j"),
    (2, ["Al_Z 1 3"], r"line 2: there is no image Al_Z_0003$"),
    (2, ["Al_Z 1 ²"], r"line 2: there is no image Al_Z_²$"),
    (2, ["Al_Z 1 -2"], r"line 2: there is no image Al_Z_-2$"),
    (3, ["Al_Z 1 Al_Z 2"], r"line 3: expected name i other j, got 'Al_Z 1 Al_Z 2'$"),
    (2, ["Al_Z 1 1"], r"line 2: an image with itself is no pair, got 'Al_Z 1 1'$"),
    (5, ["Bo-Bo 3 Al_Z 2"], r"lines 3 and 5: Al_Z_0002 and Bo-Bo_0003 stands there twice$"),
    (5, ["D_B_Cy 1 al_z_jr 1"], r"line 5: there is no image al_z_jr_0001$"),
]


@pytest.mark.parametrize(("number", "lines", "message"), BAD_LFW_PAIRS, ids=[case[2][:40] for case in BAD_LFW_PAIRS])
def test_bad_pairs_of_lfw_are_named_with_the_line(root: Path, number: int, lines: list[str], message: str) -> None:
    replace_line("lfw/pairs.txt", number, *lines)(root)
    with pytest.raises(UserError, match=rf"lfw/pairs\.txt, {message}"):
        photographs.lfw_pairs(root / "lfw/pairs.txt", np.array(LFW_NAMES))


def test_names_of_cfp_may_have_folders_before_them_and_one_that_lacks_is_named(root: Path) -> None:
    names = photographs.cfp(SIZE).names
    assert names is not None
    expected = pair_rows(photographs.cfp_pairs("FP", names))
    for other in ([f"images/{name}.jpg" for name in names], ["C:\\" + name.replace("/", "\\") for name in names]):
        assert pair_rows(photographs.cfp_pairs("FP", np.array(other))) == expected
    with pytest.raises(UserError, match=r"names lack 001/frontal/01 \(.*Pair_list_F\.txt, line 1\); they are"):
        photographs.cfp_pairs("FF", names[names != "001/frontal/01"])
    with pytest.raises(UserError, match=r"names: 001/frontal/01 comes twice"):
        photographs.cfp_pairs("FF", np.array([*names, "x/001/frontal/01.jpg"]))


def test_empty_and_missing_pairs_are_named(root: Path) -> None:
    path = root / "lfw/pairs.txt"
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"lfw/pairs\.txt: the list is empty$"):
        photographs.lfw_pairs(path, np.array(LFW_NAMES))
    path.unlink()
    with pytest.raises(UserError, match=r"lfw/pairs\.txt can't be read as a list: No such file"):
        photographs.lfw_pairs(path, np.array(LFW_NAMES))


FRONT, PROFILE, SAME = "Pair_list_F.txt", "Pair_list_P.txt", "Split/FP/03/same.txt"
BAD_CFP_PAIRS = [
    (replace_line(f"cfp/protocol/{SAME}", 1, "3,4"), rf"{SAME}, line 1: the pair lists have no image 4$"),
    (replace_line(f"cfp/protocol/{SAME}", 1, "7,1"), rf"{SAME}, line 1: the pair lists have no image 7$"),
    (replace_line(f"cfp/protocol/{SAME}", 1, "0,1"), rf"{SAME}, line 1: the pair lists have no image 0$"),
    *(
        (replace_line(f"cfp/protocol/{SAME}", 1, "3,2", text), rf"{SAME}, line 2: expected 'index,index', got")
        for text in ("1", "1,2,3", "1 2", ",", "1,²", "-1,1", "1,x", f"1,{'9' * 5000}")
    ),
    (content_of(f"cfp/protocol/{SAME}", b""), rf"{SAME}: the list is empty$"),
    (without(f"cfp/protocol/{SAME}"), rf"{SAME} can't be read as a list: No such file"),
    (without("cfp/protocol"), rf"{FRONT} can't be read as a list: No such file"),
    (replace_line(f"cfp/protocol/{PROFILE}", 2, "1 x/002/profile/01.jpg"), rf"{PROFILE}, line 2: index 1 stands there"),
    *(
        (
            replace_line(f"cfp/protocol/{FRONT}", 3, text),
            rf"{FRONT}, line 3: expected 'index path of a known image', got",
        )
        for text in ("3 .", "3 /", "3 ..", "3", "² x/001/frontal/01.jpg", "3 a b", "3 01.jpg")
    ),
]


@pytest.mark.parametrize(("damage", "message"), BAD_CFP_PAIRS, ids=[case[1][:60] for case in BAD_CFP_PAIRS])
def test_bad_pairs_of_cfp_are_named_with_the_line(root: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=rf"cfp/protocol/{message}"):
        photographs.cfp_pairs("FP", np.array(CFP_NAMES))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("value", [None, "", "/nowhere"])
def test_without_the_data_the_message_says_where_they_are(
    monkeypatch: pytest.MonkeyPatch, value: str | None, name: str
) -> None:
    monkeypatch.delenv("MVREPRO_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("MVREPRO_DATA", value)
    with pytest.raises(UserError) as error:
        getattr(photographs, name)(SIZE)
    text = str(error.value)
    what = f"MVREPRO_DATA is {value}, which has no {name}/images. " if value else "MVREPRO_DATA is not set. "
    assert text.startswith(what)
    assert "\n" not in text
    for part in ("vis-www.cs.umass.edu/lfw", "cfpw.io", "mmlab.ie.cuhk.edu.hk", "quick", "make validate PROFILE=faces"):
        assert part in text


# The decoded pixels that are kept


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The images that were opened."""
    opened: list[Path] = []
    read = Files.content
    monkeypatch.setattr(Files, "content", lambda files, i: opened.append(files.path(i)) or read(files, i))
    return opened


def test_pixels_are_decoded_once_for_each_size_and_set(
    root: Path, kept: Callable[[], list[Path]], decoded: list[Path]
) -> None:
    first = photographs.lfw(SIZE)
    assert len(decoded) == 7
    again = photographs.lfw(SIZE)
    assert len(decoded) == 7
    assert np.array_equal(first.pixels, again.pixels)
    assert (again.pixels.dtype, again.names.tolist()) == (np.uint8, first.names.tolist())
    photographs.lfw(4), photographs.celeba(SIZE)
    assert len(decoded) == 7 + 7 + 4
    assert len(kept()) == 3


def test_a_changed_an_added_and_a_removed_file_are_noticed(root: Path, decoded: list[Path]) -> None:
    before = photographs.lfw(SIZE).pixels
    path = root / PHOTO
    path.write_bytes(jpeg(99))
    changed = photographs.lfw(SIZE).pixels
    assert [int(row) for row in np.flatnonzero((before != changed).any((1, 2, 3)))] == [LFW_NAMES.index(path.stem)]
    same_size = path.stat()
    os.utime(path, ns=(same_size.st_atime_ns, same_size.st_mtime_ns + 1))
    decoded.clear()
    photographs.lfw(SIZE)
    assert len(decoded) == 7
    shutil.copy(path, path.with_stem("Bo-Bo_0004"))
    assert len(photographs.lfw(SIZE).pixels) == 8
    path.unlink()
    assert photographs.lfw(SIZE).names.tolist() == [n for n in LFW_NAMES if n != path.stem][:-1] + [
        "Bo-Bo_0004",
        "D_B_Cy_0001",
    ]


def test_pixels_follow_the_order_of_the_list(root: Path) -> None:
    before = photographs.celeba(SIZE)
    lines = (root / IDENTITY).read_text().splitlines()
    write_lines(root / IDENTITY, *reversed(lines))
    after = photographs.celeba(SIZE)
    assert np.array_equal(after.pixels, before.pixels[::-1])
    assert after.names.tolist() == before.names.tolist()[::-1]


def flip_a_bit(content: bytes) -> bytes:
    return content[:700] + bytes([content[700] ^ 1]) + content[701:]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:20], id="half a header"),
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: content[:-1], id="one byte less"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
        pytest.param(lambda content: b"PK\x03\x04" + content, id="a zip"),
        pytest.param(flip_a_bit, id="one bit"),
    ],
)
def test_damaged_pixels_are_made_anew(
    root: Path, kept: Callable[[], list[Path]], decoded: list[Path], damage: Callable[[bytes], bytes]
) -> None:
    good = photographs.celeba(SIZE).pixels
    (path,) = kept()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    decoded.clear()
    assert np.array_equal(photographs.celeba(SIZE).pixels, good)
    assert len(decoded) == 4
    assert kept() == [path]
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "local").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"could not write to the cache \(.*local.*MVREPRO_CACHE"):
        photographs.celeba(SIZE)


# The real sets


REAL = os.environ.get("MVREPRO_DATA")
needs_data = pytest.mark.skipif(
    not REAL, reason="MVREPRO_DATA is not set: the real LFW, CFP and CelebA are neither counted nor paired"
)


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, Pixels]]:
    """All three, each image opened, at 4×4: once, since the cache is the one that test_people uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVREPRO_DATA", str(REAL))
        yield {name: getattr(photographs, name)(4) for name in SETS}


@needs_data
@pytest.mark.parametrize(
    ("name", "images", "people", "with_at_least"),
    [
        ("lfw", 13233, 5749, {2: 1680}),
        ("cfp", 7000, 500, {14: 500, 15: 0}),
        ("celeba", 15982, 5561, {2: 3059, 3: 1422, 10: 253}),
    ],
)
def test_real_counts(
    real: dict[str, Pixels], name: str, images: int, people: int, with_at_least: dict[int, int]
) -> None:
    found = real[name]
    assert (found.pixels.shape, found.pixels.dtype) == ((images, 3, 4, 4), np.uint8)
    assert len(found) == len(set(found.names.tolist())) == images
    counts = np.unique(found.people, return_counts=True)[1]
    assert len(counts) == people
    assert {n: int((counts >= n).sum()) for n in with_at_least} == with_at_least
    assert found.labels.max() == people - 1
    assert found.pixels.std(0).min() > 5  # photographs, not one colour


@needs_data
def test_real_cfp_has_ten_frontal_and_four_profile_images_of_each(real: dict[str, Pixels]) -> None:
    sides = [name.rpartition("/")[0] for name in real["cfp"].names.tolist()]
    assert {side: sides.count(side) for side in set(sides)} == {
        f"{person:03d}/{side}": count for person in range(1, 501) for side, count in (("frontal", 10), ("profile", 4))
    }


@needs_data
def test_205_people_of_cfp_are_people_of_lfw_by_name(real: dict[str, Pixels]) -> None:
    ours, theirs = np.unique(real["cfp"].people), np.unique(real["lfw"].people)
    assert len(photographs.overlapping(ours, theirs)) == len(photographs.overlapping(theirs, ours)) == 205
    assert not photographs.overlapping(np.unique(real["celeba"].people), [*ours, *theirs])  # it has numbers only


@needs_data
@pytest.mark.parametrize(
    ("set_name", "pairs_of", "folds", "half"),
    [
        pytest.param(
            "lfw", lambda here, names: photographs.lfw_pairs(here / "lfw/pairs.txt", names), 10, 300, id="View 2"
        ),
        pytest.param(
            "lfw", lambda here, names: photographs.lfw_pairs(here / "lfw/pairsDevTest.txt", names), 1, 500, id="View 1"
        ),
        pytest.param("cfp", lambda here, names: photographs.cfp_pairs("FF", names), 10, 350, id="FF"),
        pytest.param("cfp", lambda here, names: photographs.cfp_pairs("FP", names), 10, 350, id="FP"),
    ],
)
def test_real_pairs(real: dict[str, Pixels], set_name: str, pairs_of: Any, folds: int, half: int) -> None:
    found, pairs = real[set_name], pairs_of(Path(str(REAL)), real[set_name].names)
    assert np.array_equal(found.people[pairs.left] == found.people[pairs.right], pairs.same)
    assert (pairs.left != pairs.right).all()
    assert np.array_equal(np.bincount(pairs.folds[pairs.same]), [half] * folds)
    assert np.array_equal(np.bincount(pairs.folds[~pairs.same]), [half] * folds)
    if folds > 1 and set_name == "lfw":  # no person is in two folds, so thresholds are chosen on others
        owners = [set(found.people[np.r_[pairs.left, pairs.right][np.tile(pairs.folds == k, 2)]]) for k in range(10)]
        assert sum(map(len, owners)) == len(set().union(*owners))


@needs_data
def test_fp_pairs_a_frontal_with_a_profile_and_ff_two_frontal_images(real: dict[str, Pixels]) -> None:
    side = np.array([name.split("/")[1] for name in real["cfp"].names.tolist()])
    for kind, second in (("FF", "frontal"), ("FP", "profile")):
        pairs = photographs.cfp_pairs(kind, real["cfp"].names)
        assert set(side[pairs.left]) == {"frontal"}
        assert set(side[pairs.right]) == {second}


@needs_data
def test_view_1_tests_people_of_view_2_so_settings_are_not_chosen_there(real: dict[str, Pixels]) -> None:
    people = real["lfw"].people
    seen = []
    for name in ("pairsDevTest.txt", "pairs.txt"):
        pairs = photographs.lfw_pairs(Path(str(REAL)) / "lfw" / name, real["lfw"].names)
        seen.append(set(people[pairs.left]) | set(people[pairs.right]))
    assert len(seen[0] & seen[1]) > len(seen[0]) / 2
