"""Every reader of other people's files on damaged ones: a right result or one clear line, never a traceback.

Bytes are cut, doubled, swapped and changed. FUZZ says how many examples of each (1,000 at night, fewer otherwise).
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mvrepro import images
from mvrepro.errors import UserError
from mvrepro.files import read_column
from mvrepro.images import photographs, storage
from mvrepro.protocols import blufr_trials

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ", "25")), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def damaged(contents: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of these, after a few cuts, doublings, swaps and changes."""

    @st.composite
    def draw(draw: Callable[..., int]) -> bytes:
        content = bytearray(contents[draw(st.integers(0, len(contents) - 1))])
        for _ in range(draw(st.integers(1, 4))):
            a, b = sorted(draw(st.integers(0, len(content))) for _ in range(2))
            kind = draw(st.integers(0, 4))
            if kind == 0:
                del content[a:b]
            elif kind == 1:
                content[b:b] = content[a:b][:1000]
            elif kind == 2:
                content[a:b] = content[a:b][::-1]
            elif kind == 3:
                content[a:a] = draw(st.binary(max_size=8))
            elif a < len(content):
                content[a] = draw(st.integers(0, 255))
        return bytes(content)

    return draw()


def encoded(seed: int, kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tag = Image.Exif()
    tag[274] = 6
    options = {} if kind in ("BMP", "PPM", "GIF") else {"exif": tag}
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [encoded(0, "JPEG"), encoded(1, "PNG"), encoded(2, "PNG", "LA"), encoded(3, "PNG", "P"), encoded(4, "BMP")]
PICTURES += [encoded(5, "WEBP"), encoded(6, "TIFF"), encoded(7, "GIF", "P"), encoded(8, "PPM"), encoded(9, "TIFF", "F")]
LABELS = np.array([0, 0, 1])


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LOCAL", Path(name, "local"))
        patch.setenv("MVREPRO_DATA", name)
        yield Path(name)


def ends_well(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        assert str(error) and "\n" not in str(error)


@fuzzed
@given(damaged(PICTURES))
def test_pictures(content: bytes) -> None:
    try:
        pixels = images.decode(content)
    except ValueError as error:
        assert "bytes)" in str(error)
    else:
        assert (pixels.dtype, pixels.ndim, pixels.shape[0]) == (np.uint8, 3, 3)


def written(kind: str) -> dict[str, bytes]:
    source = images.Memory(PICTURES[:3], LABELS, "pictures")
    source.classes = ["Ann", "Zoë"]
    with folder() as root:
        if kind == "rec":
            images.write_rec(root / "set" / "train.rec", source)
        else:
            images.write_tars(root / "set", source, shard_size=2)
        return {path.name: path.read_bytes() for path in (root / "set").iterdir()}


@pytest.mark.parametrize(
    ("kind", "file"),
    [("rec", "train.rec"), ("rec", "train.idx"), ("rec", "classes.txt"), ("tar", "000000.tar"), ("tar", "classes.txt")],
)
@pytest.mark.parametrize("index", [True, False], ids=["with .idx", "without"])
def test_training_sets(kind: str, file: str, index: bool) -> None:
    files = written(kind)
    if not index:
        files.pop("train.idx", None)
    if file not in files:
        return

    @fuzzed
    @given(damaged([files[file]]))
    def check(content: bytes) -> None:
        with folder() as root:
            (root / "set").mkdir()
            for name, whole in (files | {file: content}).items():
                (root / "set" / name).write_bytes(whole)

            def read() -> None:
                source = images.open_images(root / "set", renumber=True)
                pixels = source.read(np.arange(len(source)))
                assert len(pixels) == len(source.labels) and source.labels.min() >= 0
                assert source.classes is None or source.labels.max() < len(source.classes)

            ends_well(read)

    check()


def test_pair_sets() -> None:
    with folder() as root:
        images.write_bin(root / "x.bin", PICTURES[:4], [True, False])
        whole = (root / "x.bin").read_bytes()

    @fuzzed
    @given(damaged([whole]))
    def check(content: bytes) -> None:
        with folder() as root:
            (root / "x.bin").write_bytes(content)

            def read() -> None:
                source, pairs = images.read_bin(root / "x.bin")
                assert len(source) == 2 * len(pairs) == 2 * len(pairs.folds)
                source.read(np.arange(len(source)))

            ends_well(read)

    check()


NAMES = np.array(["Ann_Lee_0001", "Ann_Lee_0002", "Bo_0001", "Zoë_0001"])
CFP = np.array(
    [f"{person:03d}/{side}/{shot:02d}" for person in (1, 2) for side in ("frontal", "profile") for shot in (1, 2)]
)
BLUFR = b"1\n3\n1, Ann_Lee_0001.jpg\n2, Ann_Lee_0002.jpg\n3, Bo_0001.jpg\n"


def cfp_lists(root: Path, content: bytes) -> object:
    protocol = root / "cfp/protocol"
    (root / "cfp/images").mkdir(parents=True)
    for fold in range(1, 11):
        (protocol / f"Split/FP/{fold:02d}").mkdir(parents=True)
        for name in ("same", "diff"):
            (protocol / f"Split/FP/{fold:02d}/{name}.txt").write_bytes(content)
    (protocol / "Pair_list_F.txt").write_text("1 x/001/frontal/01.jpg\n2 x/002/frontal/01.jpg\n")
    (protocol / "Pair_list_P.txt").write_text("1 x/001/profile/01.jpg\n2 x/002/profile/02.jpg\n")
    return photographs.cfp_pairs("FP", CFP)


def identity(root: Path, content: bytes) -> object:
    (root / "celeba/images").mkdir(parents=True)
    for i in (1, 2):
        Image.new("RGB", (112, 112)).save(root / f"celeba/images/00000{i}.jpg")
    (root / "celeba/identity.txt").write_bytes(content)
    return photographs.celeba(4)


def blufr(root: Path, content: bytes) -> object:
    for kind in ("test", "gallery", "probe"):
        (root / f"{kind}_set.txt").write_bytes(content)
    return blufr_trials(NAMES[:3].tolist(), root)


def listed(root: Path, content: bytes, read: Callable[[Path], object]) -> object:
    (root / "list.txt").write_bytes(content)
    return read(root / "list.txt")


LISTS: dict[str, tuple[Callable[[Path, bytes], object], bytes]] = {
    "column": (lambda root, content: listed(root, content, read_column), "\ufeffAnn\r\nZoë\r\n".encode()),
    "people": (
        lambda root, content: listed(root, content, photographs.people_of),
        "2\n1\nAnn\t3\n1\nZoë\t1\n".encode(),
    ),
    "lfw pairs": (
        lambda root, content: listed(root, content, lambda path: photographs.lfw_pairs(path, NAMES)),
        "1\t1\nAnn_Lee\t1\t2\nBo\t1\tZoë\t1\n".encode(),
    ),
    "cfp pairs": (cfp_lists, b"1,2\n2,1\n"),
    "identity": (identity, b"000001.jpg 7\n000002.jpg 7\n"),
    "blufr": (blufr, BLUFR),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str) -> None:
    read, whole = LISTS[name]
    with folder() as root:
        if name != "blufr":  # gallery and probe would be one image
            read(root, whole)

    @fuzzed
    @given(damaged([whole]))
    def check(content: bytes) -> None:
        with folder() as root:
            ends_well(lambda: read(root, content))

    check()
