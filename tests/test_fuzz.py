"""Every reader of other people's files on damaged ones: a right result or one clear line, never a traceback.

Bytes are cut, doubled, swapped and changed. FUZZ says how many examples of each (1,000 at night, fewer otherwise).
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from mvrepro import images, interchange, networks
from mvrepro.commands import data, embed, judge
from mvrepro.errors import UserError
from mvrepro.files import read_column
from mvrepro.heads.margin import MarginHead
from mvrepro.images import archives, photographs, storage
from mvrepro.protocols import blufr_trials
from mvrepro.training import checkpoint
from mvrepro.training.ranks import Ranks

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
        lambda root, content: listed(root, content, data.people_of),
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


# Each byte changed in several ways, and the file cut short at each place: more than chance finds.


def spoiled(whole: bytes, step: int = 1) -> Iterator[bytes]:
    yield from (whole[:at] for at in range(0, len(whole), step))
    for at in range(0, len(whole), step):
        start, rest = whole[:at], whole[at + 1 :]
        yield from (start + bytes([whole[at] ^ bits]) + rest for bits in (1, 128, 255))
        yield start + rest
        yield start + b"9" * 20 + whole[at:]  # counts become huge
        yield start + b"\n" + whole[at:]


def all_end_well(path: Path, contents: Iterable[bytes], read: Callable[[], object]) -> None:
    for content in contents:
        path.write_bytes(content)
        ends_well(read)
    path.unlink()
    ends_well(read)
    path.mkdir()
    with pytest.raises(UserError):
        read()


def with_header(shape: str, kind: str = "'<f4'") -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(24)


HEADERS = [
    *map(with_header, ("(2**70, 2)", f"({9**25}, 2)", f"({2**62}, {2**62})")),
    *map(with_header, ("(-3, -2)", "(1e3, 2)", "(3,", "'", "(0, 2)")),
    *(with_header("(3, 2)", kind) for kind in ("'O'", "[('a', '<f4')]", "3", "'<c8'", "[]")),
    with_header("(3, 2)", "('<f4', (9999999, 99999))"),
    with_header("(" * 9000), with_header("(3, 2)" + " " * 20000), b"PK\x03\x04", b"PK\x05\x06" + bytes(18),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # NumPy's about headers of Python 2
def test_embeddings() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((3, 2), np.float32))
    with folder() as root:
        path = root / "x.npy"
        all_end_well(
            path, [*spoiled(buffer.getvalue(), step=2), *HEADERS], lambda: np.array(interchange.load_embeddings(path))
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0, 3e38])
def test_judge(bad: float) -> None:
    with folder() as root:
        numbers = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
        numbers[1] = bad
        np.save(root / "x.npy", numbers)

        def read(protocol: str, *options: str) -> Callable[[], object]:
            parser = argparse.ArgumentParser()
            judge.add_arguments(parser)
            names = [
                "--embeddings",
                str(root / "x.npy"),
                *(str(root / part) if "." in part else part for part in options),
            ]
            return lambda: judge.run(parser.parse_args(["--protocol", protocol, *names]))

        (root / "pairs.txt").write_text("1\t1\nAnn_Lee\t1\t2\nBo\t1\tZoë\t1\n")
        for protocol, option, more in (("all-pairs", "--ids", ()), ("lfw", "--names", ("--pairs", "pairs.txt"))):
            run = read(protocol, option, "list.txt", *more)
            all_end_well(root / "list.txt", spoiled("\n".join(NAMES).encode(), step=5), run)
            (root / "list.txt").rmdir()


def zipped(kind: int, table: bytes = b"image\tperson\na.png\tAnn\n") -> bytes:
    buffer, image = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (112, 112)).save(image, "PNG")
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("a.png", image.getvalue())
        file.writestr("list.tsv", table)
    return buffer.getvalue()


@contextlib.contextmanager
def more() -> Iterator[Path]:
    with folder() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(photographs, "kept_array", lambda name, files, build: build())
        (root / "more").mkdir()
        for name in archives.ARCHIVES:
            (root / f"more/{name}.zip").touch()
        yield root / "more"


def pins() -> object:
    found = archives.archive("pins", 2)
    assert len(found) and not {"pins:", "pins:None"} & set(found.people.tolist())
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives(kind: int) -> None:
    with more() as root:
        (root / "pins.zip").write_bytes(zipped(kind))
        pins()
        all_end_well(root / "pins.zip", spoiled(zipped(kind), step=9), pins)


TABLES = [b"", b"image\n", b"image\tperson\n", b"image\tperson\na.png\n", b'image\tperson\n"' + b"x" * 200_000]
TABLES += [b'image\tperson\n"a\nb"\tAnn\n', b"image\tperson\n\xff\tAnn\n", b"image\tperson\na.png\t\n"]


def test_lists_of_archives() -> None:
    with more() as root:
        tables = [*TABLES, *spoiled(b"image\tperson\na.png\tAnn\n")]
        all_end_well(root / "pins.zip", (zipped(zipfile.ZIP_STORED, table) for table in tables), pins)


def overlap() -> None:
    for name, found in archives.overlap("lfw").items():
        assert all(1 <= int(person) <= 500 for person in found if name == "cfp")
        assert all(int(person) >= 0 for person in found if name == "celeba")


OVERLAP = b"set\tperson\ttested_in\tcosine\nceleba\t7\tlfw\t0.6\ncfp\t002\tlfw\t1\n"


@pytest.mark.parametrize(
    ("name", "whole", "read"),
    [("overlap", OVERLAP, overlap), ("fiw_duplicates", b"person\tsame_as\nF1\tF2\n", archives.duplicates)],
)
def test_tables(name: str, whole: bytes, read: Callable[[], object]) -> None:
    with more() as root:
        all_end_well(root / f"{name}.tsv", [*spoiled(whole), whole + b'"' + b"x" * 200_000], read)


BACKBONE = {"name": "toy", "in_channels": 1, "image_size": 4, "embedding_dim": 2}


def test_backbones() -> None:
    with folder() as root:
        path, model = root / "x.safetensors", networks.build(**BACKBONE)
        interchange.save_backbone(path, model, **BACKBONE)
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        contents = [head + whole[start:] for head in spoiled(whole[:start], step=7)]
        about = {"backbone": "toy", "in_channels": 1, "image_size": 4, "embedding_dim": 2}
        state = model.state_dict()
        for change in (
            {"backbone": [1]},
            {"backbone": "toy\n"},
            {"image_size": 10**30},
            {"embedding_dim": 65536},
            {"x": 1},
        ):
            contents.append(save(state, metadata={"mvrepro": json.dumps(about | change)}))
        contents += [save(state, metadata={"mvrepro": text}) for text in ("[" * 10**5, "NaN", "{}")]
        all_end_well(
            path,
            [*contents, *(whole[:at] for at in range(start, len(whole), 9999))],
            lambda: interchange.load_backbone(path),
        )
        path.rmdir()
        for kind in (torch.complex64, torch.int64, torch.bool):
            path.write_bytes(save({name: x.to(kind) for name, x in state.items()}, {"mvrepro": json.dumps(about)}))
            with pytest.raises(UserError, match="expected torch"):
                interchange.load_backbone(path)


def checkpoint_of(root: Path, manifest: dict[str, Any], head: torch.Tensor) -> None:
    """A checkpoint whose SHA-256 are right."""
    model = {f"backbone.{name}": x for name, x in networks.build(**BACKBONE).state_dict().items()}
    files = {"common.safetensors": model, "rank-0.safetensors": {"head.weight": torch.ones(3, 2)}}
    files["rank-1.safetensors"] = {"head.weight": head}
    for name, state in files.items():
        (root / name).write_bytes(save(state))
    sums = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in files}
    about = {"backbone" if key == "name" else key: value for key, value in BACKBONE.items()}
    value = {"built": about, "about": {"flip": True}, "files": sums} | manifest
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(value | {"sha256": digest}))


def test_checkpoints() -> None:
    with folder() as root:
        checkpoint_of(root, {}, torch.ones(2, 2))
        assert embed._network(root, 1).mirror
        whole = (root / "manifest.json").read_bytes()
        read = lambda: embed._network(root, 1)
        all_end_well(root / "manifest.json", spoiled(whole, step=9), read)
        (root / "manifest.json").rmdir()
        for value in ([], "x", 1, None, {}, {"x": [1]}, {"rank-0.safetensors": 1}):
            for part in ("built", "about", "files"):
                checkpoint_of(root, {part: value}, torch.ones(2, 2))
                with pytest.raises(UserError):
                    read()
        for head in (torch.ones(2, 3), torch.ones(2), torch.tensor(1.0), torch.ones(0)):
            checkpoint_of(root, {}, head)
            with pytest.raises(UserError, match="does not fit this model"):
                network = SimpleNamespace(backbone=networks.build(**BACKBONE), head=MarginHead("AM-Softmax", 2, 5))
                checkpoint.start_from(root, network)  # type: ignore[arg-type]
        checkpoint_of(root, {}, torch.ones(2, 2))
        all_end_well(root / "common.safetensors", [b"", b"9" * 99], read)


def test_names_of_snapshots(tmp_path: Path) -> None:
    for name in ("step-²", "step-00000007", "step-x", "step-" + "9" * 200):
        (tmp_path / name).mkdir()
    assert checkpoint.Snapshots(tmp_path, {}, "", 1, Ranks(0, 1, torch.device("cpu"))).steps() == [7]


def test_lists_of_cfp_and_blufr() -> None:
    """What test_lists leaves whole: the lists of images and names, huge counts, and folders in the place of lists."""
    with folder() as root:
        cfp_lists(root, b"1,2\n2,1\n")
        for name in ("cfp/protocol/Pair_list_F.txt", "cfp/protocol/Split/FP/03/diff.txt"):
            whole = (root / name).read_bytes()
            all_end_well(root / name, spoiled(whole), lambda: photographs.cfp_pairs("FP", CFP))
            (root / name).rmdir()
            (root / name).write_bytes(whole)
        for number, side in ((number, side) for number in (1, 2) for side in ("frontal", "profile")):
            (root / f"cfp/images/{number:03d}/{side}").mkdir(parents=True)
            (root / f"cfp/images/{number:03d}/{side}/01.jpg").touch()
        all_end_well(root / "cfp/names.txt", spoiled("Ann\nZoë\n".encode()), lambda: photographs.files("cfp"))
        for kind in ("test", "gallery", "probe"):
            (root / f"{kind}_set.txt").write_bytes(b"1\n2\n1, Ann_Lee_0001.jpg\n2, Bo_0001.jpg\n")
        for kind in ("test", "gallery", "probe"):
            whole = (root / f"{kind}_set.txt").read_bytes()
            all_end_well(root / f"{kind}_set.txt", spoiled(whole), lambda: blufr_trials(NAMES[:3].tolist(), root))
            (root / f"{kind}_set.txt").rmdir()
            (root / f"{kind}_set.txt").write_bytes(whole)
