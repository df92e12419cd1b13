"""The formats of training sets and pair sets, on small ones made here; RecordIO also on bytes put together by hand.

The oracle for RecordIO is the description of the layout in mxnet/recordio.py, dmlc-core's recordio.h and InsightFace's
face2rec2.py: `by_hand` below writes it with nothing of mvrepro.images.
"""

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvrepro import images
from mvrepro.__main__ import main
from mvrepro.errors import UserError
from mvrepro.images import recordio, storage

SIZE = 16
IDS = [0, 0, 0, 1, 2, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    return tmp_path / "local" / "formats"


def image(seed: int, size: int = SIZE, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [image(seed) for seed in range(len(IDS))]
PAIRS = list(zip(IMAGES, IDS, strict=True))


def memory(items: list[tuple[bytes, int]]) -> images.Memory:
    """A source out of a list."""
    contents, labels = zip(*items, strict=True)
    return images.Memory(list(contents), np.array(labels), "a list")


def record(content: bytes) -> bytes:
    """A record in one frame."""
    return struct.pack("<II", 0xCED7230A, len(content)) + content + b"\0" * ((4 - len(content) % 4) % 4)


def by_hand(folder: Path, records: list[tuple[int, bytes]], index: bool = True) -> Path:
    """train.rec of (key, record) in this order, and train.idx."""
    folder.mkdir(exist_ok=True)
    content, lines = b"", []
    for key, data in records:
        lines.append(f"{key}\t{len(content)}\n")
        content += data
    (folder / "train.rec").write_bytes(content)
    if index:
        (folder / "train.idx").write_text("".join(lines))
    return folder / "train.rec"


def insightface(aligned: bool = True) -> list[tuple[int, bytes]]:
    """What face2rec2.py writes for IDS: images 1 … 6, whose labels are [class, 1] or just the class; record 0; a record
    a person."""
    records = []
    for key, (content, label) in enumerate(PAIRS, 1):
        two, one = struct.pack("<IfQQff", 2, 0, key, 0, label, 1), struct.pack("<IfQQ", 0, label, key, 0)
        head = two if aligned else one
        records.append((key, record(head + content)))
    records.append((0, record(struct.pack("<IfQQff", 2, 0, 0, 0, 7, 10))))
    for key, span in ((7, (1, 4)), (8, (4, 5)), (9, (5, 7))):
        records.append((key, record(struct.pack("<IfQQff", 2, 0, key, 0, *span))))
    return records


def items(source: images.Encoded) -> list[tuple[bytes, int]]:
    return [(source.content(i), int(source.labels[i])) for i in range(len(source))]


# RecordIO


@pytest.mark.parametrize("index", [True, False], ids=["with .idx", "without"])
@pytest.mark.parametrize("aligned", [True, False], ids=["two labels", "one label"])
def test_a_set_of_insightface_is_read(tmp_path: Path, aligned: bool, index: bool) -> None:
    path = by_hand(tmp_path / "set", insightface(aligned), index)
    for asked in (path, path.parent, str(path.parent)):
        source = images.open_images(asked)
        assert isinstance(source, images.Records)
        assert items(source) == PAIRS
        assert source.content(-1) == PAIRS[-1][0]
        with pytest.raises(IndexError):
            source.content(6)


@pytest.mark.parametrize("index", [True, False], ids=["with .idx", "without"])
def test_a_set_of_im2rec_has_no_header_and_any_order(tmp_path: Path, index: bool) -> None:
    order = [3, 0, 5, 1, 4, 2]
    records = [(key, record(struct.pack("<IfQQ", 0, IDS[key], key, 0) + IMAGES[key])) for key in order]
    assert items(images.open_images(by_hand(tmp_path / "set", records, index))) == PAIRS


def test_ids_that_are_no_keys_leave_the_order_of_the_file(tmp_path: Path) -> None:
    records = [
        (key, record(struct.pack("<IfQQ", 0, label, 77, 0) + content)) for key, (content, label) in enumerate(PAIRS)
    ]
    assert items(images.open_images(by_hand(tmp_path / "set", records, index=False))) == PAIRS


MAGIC = struct.pack("<I", 0xCED7230A)


def in_parts(*parts: bytes) -> bytes:
    """A record whose content holds the magic number between its parts (each but the last a multiple of 4 long)."""
    flags = [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + b"\0" * ((4 - len(part) % 4) % 4)
        for flag, part in zip(flags, parts, strict=True)
    )


@pytest.mark.parametrize("index", [True, False], ids=["with .idx", "without"])
def test_records_in_parts_are_joined(tmp_path: Path, index: bool) -> None:
    head = [struct.pack("<IfQQ", 0, label, label, 0) for label in range(3)]
    records = [
        (0, in_parts(head[0] + b"abcd", b"efg")),
        (1, in_parts(head[1], b"", b"1234", b"")),
        (2, in_parts(struct.pack("<IfQ", 0, 2, 2), b"\0" * 4 + b"tail")),  # the number in id2 itself
    ]
    source = images.open_images(by_hand(tmp_path / "set", records, index))
    assert items(source) == [(b"abcd" + MAGIC + b"efg", 0), (MAGIC + MAGIC + b"1234" + MAGIC, 1), (b"tail", 2)]


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=9)), max_size=6).map(b"".join))
def test_frames_are_what_a_reader_of_frames_reads(content: bytes) -> None:
    """The reader here is dmlc-core's: magic numbers at multiples of 4 begin frames and nothing else does."""
    written = recordio.frames(content)
    assert len(written) % 4 == 0
    at, parts = 0, []
    while at < len(written):
        magic, lrecord = struct.unpack_from("<4sI", written, at)
        assert magic == MAGIC
        parts.append((lrecord >> 29, written[at + 8 : at + 8 + (lrecord & (2**29 - 1))]))
        inner = written[at + 8 : at + 8 + (len(parts[-1][1]) + 3) // 4 * 4]
        assert all(inner[i : i + 4] != MAGIC for i in range(0, len(inner), 4))
        at += 8 + len(inner)
    flags = [flag for flag, _ in parts]
    assert flags == ([0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3])
    assert MAGIC.join(part for _, part in parts) == content


def test_what_is_written_is_what_insightface_writes(tmp_path: Path) -> None:
    path = tmp_path / "out" / "train.rec"
    shuffled = [PAIRS[i] for i in (4, 0, 3, 1, 5, 2)]
    images.write_rec(path, memory(shuffled))
    assert sorted(items(images.open_images(path)), key=lambda p: IMAGES.index(p[0])) == PAIRS
    read = dict(insightface(aligned=False))  # by key: ours sorts by class, and so does this
    lines = [tuple(map(int, line.split())) for line in path.with_suffix(".idx").read_text().splitlines()]
    assert [key for key, _ in lines] == [*range(1, 7), 0, 7, 8, 9]
    content = path.read_bytes()
    for (key, start), end in zip(lines, [offset for _, offset in lines[1:]] + [len(content)], strict=True):
        if key in (0, 7, 8, 9):
            assert content[start:end] == read[key]
        else:
            flag, label, number, more = struct.unpack_from("<IfQQ", content, start + 8)
            assert (flag, label, number, more) == (0, IDS[key - 1], key, 0)
    assert [child.name for child in path.parent.iterdir() if child.name.startswith(".")] == []


def test_writing_over_a_set_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set" / "train.rec"
    images.write_rec(path, memory(PAIRS))
    before = path.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        images.write_rec(path, memory(PAIRS[:2]))
    path.unlink()
    with pytest.raises(UserError, match="is there already"):
        images.write_rec(path, memory(PAIRS[:2]))
    assert len(before) and not path.exists()


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Broken(images.Memory):
        def content(self, i: int) -> bytes:
            if i == 3:
                raise UserError("no more")
            return super().content(i)

    broken = Broken(IMAGES, np.array(IDS), "a list")

    with pytest.raises(UserError, match="no more"):
        images.write_rec(tmp_path / "out" / "train.rec", broken)
    with pytest.raises(UserError, match="no more"):
        images.write_tars(tmp_path / "tars", broken)
    assert [p.name for p in tmp_path.iterdir()] == ["local"]  # with what is kept, the lock among it


KILLED = """
import os, signal, sys; from pathlib import Path; from mvrepro import images; from mvrepro.images import storage
storage.LOCAL = Path(sys.argv[2]); source = images.open_images(sys.argv[1]); content = source.content
source.content = lambda i: os.kill(os.getpid(), signal.SIGKILL) if i == 5 else content(i)
{write}
"""


@pytest.mark.parametrize(
    "write",
    [
        "images.write_tars(Path(sys.argv[3]), source, shard_size=2)",
        "images.write_folder(Path(sys.argv[3]), source)",
        "images.write_rec(Path(sys.argv[3], 'train.rec'), source)",
    ],
    ids=["tar", "folder", "rec"],
)
def test_a_set_is_whole_or_not_there(tmp_path: Path, write: str) -> None:
    """A writer that is killed leaves nothing that opens as a smaller set; the same call again writes all of it."""
    people, out = make_folder(tmp_path / "people"), tmp_path / "sets" / "out"
    code = KILLED.format(write=write)
    call = [sys.executable, "-c", code, str(people), str(tmp_path / "kept"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(images.__file__).parents[2])}
    assert subprocess.run(call, env=environment, check=False).returncode == -9
    assert not out.exists()
    left = [p.name for p in out.parent.iterdir()]  # aside, and hidden
    assert left == [".writing-out"]
    with pytest.raises(UserError, match="found none"):
        images.open_images(out.parent)
    call[2] = code.replace("if i == 5", "if i == 99")
    subprocess.run(call, env=environment, check=True)
    assert items(images.open_images(out)) == PAIRS
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    again = subprocess.run(call, env=environment, check=False, capture_output=True, text=True)
    assert "out is there already" in again.stderr
    assert items(images.open_images(out)) == PAIRS


@pytest.mark.parametrize("lost", [1, 5, 40, 100])
@pytest.mark.parametrize("index", [True, False], ids=["with .idx", "without"])
def test_a_truncated_file_is_named(tmp_path: Path, index: bool, lost: int) -> None:
    path = by_hand(tmp_path / "set", insightface(), index)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UserError, match=r"train\.(rec|idx)") as caught:
        images.open_images(path)
    assert "cut off" in str(caught.value) or "not whole" in str(caught.value)


def test_a_truncation_between_records_is_seen_by_the_header(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "set", insightface()[:-1], index=False)
    with pytest.raises(UserError, match=r"announces 6 images and 3 people, but the records found in .* has 9 records"):
        images.open_images(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("\t", "\tx", 1), r"train\.idx, line 1: expected 'key offset'"),
        (lambda text: text + "10\n", r"train\.idx, line 11: expected 'key offset'"),
        (lambda text: text + text.splitlines()[3] + "\n", r"train\.idx: the key 4 stands there twice"),
        (lambda text: text.replace("9\t", "99\t", 1).replace("8\t", "99\t", 1), "the key 99 stands there twice"),
        (lambda text: text + "10\t0\n", "the offset 0 stands there twice"),
        (lambda text: text + "10\t99999999\n", "key 10 lies at byte 99999999, where no record can begin"),
        (lambda text: text + "10\t6\n", "multiples of 4"),
        (lambda text: text.replace("1\t0\n", "1\t8\n", 1), "record 1: no record begins at byte 8"),
        (lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "announces 6 images and 3 people, but"),
        (lambda text: "", "no records there"),
        (lambda text: "é", r"train\.idx"),
    ],
)  # fmt: skip
def test_a_wrong_index_is_named(tmp_path: Path, damage, message: str) -> None:
    path = by_hand(tmp_path / "set", insightface())
    index = path.with_suffix(".idx")
    index.write_text(damage(index.read_text()), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        images.open_images(path)


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "set", insightface())
    path.with_suffix(".idx").write_text(path.with_suffix(".idx").read_text(), encoding="utf-8-sig")
    assert items(images.open_images(path)) == PAIRS


def test_a_byte_wrong_in_the_middle_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "set", insightface())
    offset = int(path.with_suffix(".idx").read_text().splitlines()[1].split()[1])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    source = images.open_images(path)
    with pytest.raises(UserError, match=rf"record 2: no record begins at byte {offset}"):
        source.content(1)
    path.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=f"no record begins at byte {offset} of"):
        images.open_images(path)


def test_records_that_are_none_are_named(tmp_path: Path) -> None:
    head = struct.pack("<IfQQ", 0, 0, 0, 0)
    for data, message in (
        (record(b"short"), "too short for its header"),
        (record(struct.pack("<IfQQ", 5, 0, 0, 0) + b"1234"), "too short for its 5 labels"),
        (record(struct.pack("<IfQQ", 0, 0.5, 0, 0) + b"image"), "0.5 is no class id"),
        (record(struct.pack("<IfQQ", 0, -1, 0, 0) + b"image"), "-1.0 is no class id"),
        (record(struct.pack("<IfQQ", 0, float("nan"), 0, 0) + b"image"), "nan is no class id"),
        (MAGIC + struct.pack("<I", 3 << 29 | 24) + head, "flag 3"),
        (MAGIC + struct.pack("<I", 1 << 29 | 24) + head, "the file ends"),
        (b"", "no records there"),
    ):
        for index in (True, False):
            folder = tmp_path / f"{message}-{index}"
            with pytest.raises(UserError, match=message):
                images.open_images(by_hand(folder, [(0, data)] if data else [], index))


def test_people_that_count_wrong_are_named(tmp_path: Path) -> None:
    records = insightface()
    records[-1] = (9, record(struct.pack("<IfQQff", 2, 0, 9, 0, 5, 8)))
    with pytest.raises(UserError, match=r"record 9: \[5.0, 8.0\] are not the keys of a person's images"):
        images.open_images(by_hand(tmp_path / "a", records))
    records[-1] = (9, record(struct.pack("<IfQQff", 2, 0, 9, 0, 6, 7)))
    with pytest.raises(UserError, match="record 5: an image that no person's record counts"):
        images.open_images(by_hand(tmp_path / "b", records))


def test_people_that_do_not_fit_the_class_ids_of_their_images_are_named(tmp_path: Path) -> None:
    """There is one truth about who is on an image, and nothing is read with another."""
    records = insightface()
    records[-3:] = [(7, people_record(7, 1, 3)), (8, people_record(8, 3, 5)), (9, people_record(9, 5, 7))]
    with pytest.raises(UserError, match=r"record 8: its person's images 3 … 4 have the class ids 0 and 1: the"):
        images.open_images(by_hand(tmp_path / "a", records))
    records[-3:] = [(7, people_record(7, 1, 4)), (8, people_record(8, 4, 6)), (9, people_record(9, 5, 7))]
    with pytest.raises(UserError, match=r"record (8|9): "):  # an image of two people
        images.open_images(by_hand(tmp_path / "b", records))
    records = insightface()
    records[1] = (2, record(struct.pack("<IfQQff", 2, 0, 2, 0, 2, 1) + IMAGES[1]))  # in the midst of a person's
    source = images.open_images(by_hand(tmp_path / "c", records))
    with pytest.raises(UserError, match="record 2: its class id is 2, but 0 by its person's record"):
        source.read(np.array([1]))


def people_record(key: int, start: int, stop: int) -> bytes:
    return record(struct.pack("<IfQQff", 2, 0, key, 0, start, stop))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 6.5, 1e30])
def test_keys_that_are_no_numbers_are_named(tmp_path: Path, label: float) -> None:
    records = insightface()
    records[-1] = (9, record(struct.pack("<IfQQff", 2, 0, 9, 0, label, 7)))
    with pytest.raises(UserError, match=r"record 9: .* are not the keys of a person's images"):
        images.open_images(by_hand(tmp_path / "a", records))
    records[6] = (0, record(struct.pack("<IfQQff", 2, 0, 0, 0, 7, label)))
    with pytest.raises(UserError, match="its header announces"):
        images.open_images(by_hand(tmp_path / "b", records))


def test_a_record_damaged_in_the_middle_has_no_class_id(tmp_path: Path) -> None:
    records = [(k, record(struct.pack("<IfQQ", 0, 0, k, 0) + IMAGES[k])) for k in range(3)]
    path = by_hand(tmp_path / "set", records)
    content = bytearray(path.read_bytes())
    content[len(records[0][1])] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="record 1: no record begins"):
        images.open_images(path)


def test_names_of_classes_must_fit(tmp_path: Path) -> None:
    images.write_rec(tmp_path / "set" / "train.rec", memory(PAIRS))
    (tmp_path / "set" / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"classes\.txt has 2 names, the class ids go to 2: add"):
        images.open_images(tmp_path / "set")
    whole = images.open_images(make_folder(tmp_path / "people")).classes
    assert whole is not None
    for heading in ("name", "# classes"):
        (tmp_path / "set" / "classes.txt").write_text("\n".join([heading, *whole]))
        for options in ({}, {"allow_holes": True}, {"renumber": True}):
            with pytest.raises(UserError, match=r"has 4 names, the class ids go to 2: take out what is no name, such"):
                images.open_images(tmp_path / "set", **options)
    for name in ("../out", "", ".", ".."):
        (tmp_path / "set" / "classes.txt").write_text(f"a\nb\n{name}\n")
        with pytest.raises(UserError, match=r"can't be the name of a folder|classes\.txt has 2 names"):
            images.write_folder(tmp_path / "x" / "y", images.open_images(tmp_path / "set"))
    assert not (tmp_path / "x" / "out").exists()


def test_names_of_classes_are_read_as_every_list(tmp_path: Path) -> None:
    images.write_rec(tmp_path / "set" / "train.rec", memory(PAIRS))
    path = tmp_path / "set" / "classes.txt"
    path.write_bytes("\ufeffAnn\r\nBe\u0301a \r\nCy\t\r\n\r\n".encode())
    assert images.open_images(path.parent).classes == ["Ann", "B\u00e9a", "Cy"]
    for content, message in (
        ("Ann\nBo\nAnn\n", "lines 1 and 3: Ann stands there twice"),
        ("B\u00e9a\nBe\u0301a\nCy\n", "lines 1 and 2: B\u00e9a stands there twice"),
        ("Ann\n\nCy\n", "line 2: empty"),
        ("Ann\nB\udce9a\nCy\n", "line 2: not UTF-8"),
    ):
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=rf"classes\.txt, {message}"):
            images.open_images(path.parent)


@pytest.mark.parametrize("kind", ["rec", "tar", "folder"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([b"Ann", b"Jos\xe9"], "class 1 is called 'Jos.udce9', which can't be"),
        ([b"Ann", b"a\nb"], "class 1 is called 'a.nb', which can't be"),
        (["Be\u0301a".encode(), "B\u00e9a".encode()], "the classes 0 and 1 are both called B\u00e9a"),
    ],
)
def test_names_that_can_not_be_written_are_refused_before_anything_is(
    tmp_path: Path, kind: str, names: list[bytes], message: str
) -> None:
    for name in names:
        folder = tmp_path / "set" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(IMAGES[0])
    classes = [os.fsdecode(name) for name in sorted(names)]
    source: images.Encoded = images.Memory([IMAGES[0]] * 2, np.arange(2), "two")
    source.classes = classes
    if "both" not in message:  # else a folder isn't opened
        source = images.open_images(tmp_path / "set")
        assert (source.read(np.arange(2)).shape, source.classes) == ((2, 3, SIZE, SIZE), classes)
    out = tmp_path / "out"
    write = {
        "rec": lambda: images.write_rec(out / "train.rec", source),
        "tar": lambda: images.write_tars(out, source),
        "folder": lambda: images.write_folder(out, source),
    }[kind]
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            write()
    assert not out.exists() and not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize("names", [("Ann", " Ann"), ("Zoe\u0308", "Zo\u00eb")])
def test_two_folders_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(IMAGES[0])
    with pytest.raises(UserError, match=r"the folders '.*' and '.*' are both called .*: rename one"):
        images.open_images(tmp_path)


def test_folders_that_are_no_persons_do_not_stop_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    people = make_folder(tmp_path / "people")
    (people / "__MACOSX" / "b c").mkdir(parents=True)
    (people / "__MACOSX" / "b c" / "._0.jpg").write_bytes(b"junk")
    (people / "up").symlink_to(tmp_path)
    (people / "d" / "self").symlink_to(people / "d")
    (people / "d" / "over").symlink_to(people / "b c" / "deeper")  # links that lead on are followed
    (people / "b c" / "deeper" / "across").symlink_to(people / "d")
    (people / "locked").mkdir()
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root reads everything
    source = images.open_images(people)
    assert source.classes == ["b c", "d", "Ångström"]
    assert sorted({Path(source.where(i)).name for i in range(len(source))}) == ["0.JPG", "1.JPG", "2.JPG"]
    assert np.bincount(source.labels).tolist() == [4, 3, 2]
    said = "\n".join(source.passed_over)
    assert f"{people / 'up'}: leads back to {tmp_path}" in said and "locked: Permission denied" in said
    assert f"{people / 'd' / 'self'}: leads back to {people / 'd'}" in said
    with pytest.raises(UserError, match="more than 1 folders can't be listed, such as "):
        images.open_images(people, bad_limit=1)


def test_a_changed_file_is_not_read_with_the_old_index(tmp_path: Path, cache: Path) -> None:
    path = by_hand(tmp_path / "set", insightface(), index=False)
    assert items(images.open_images(path)) == PAIRS
    kept = sorted(cache.iterdir())
    assert len(kept) == 1  # offsets and class ids
    for file in kept:  # damaged: made anew
        file.write_bytes(file.read_bytes()[:-8])
    assert items(images.open_images(path)) == PAIRS
    records = [(k, record(struct.pack("<IfQQ", 0, k, k, 0) + IMAGES[k])) for k in range(3)]
    by_hand(path.parent, records, index=False)
    assert items(images.open_images(path)) == [(IMAGES[k], k) for k in range(3)]


def test_a_source_goes_to_other_processes(tmp_path: Path) -> None:
    source = images.open_images(by_hand(tmp_path / "set", insightface()))
    source.size, source.bad_limit = 112, 7
    assert source.content(0) == PAIRS[0][0]
    again = pickle.loads(pickle.dumps(source))
    assert (items(again), again.size, again.bad_limit) == (PAIRS, 112, 7)
    with get_context("fork").Pool(1) as pool:  # spawn would need this module's imports again
        assert pool.map(source.content, range(6)) == IMAGES
    assert source.content(1) == PAIRS[1][0]


def test_one_process_builds_an_index_while_the_others_wait(tmp_path: Path) -> None:
    """As the ranks of a training do, which all open the set at once."""
    (tmp_path / "set").write_bytes(b"x")
    built = tmp_path / "built"

    def build() -> np.ndarray:
        with built.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return np.arange(5)

    def rank(failing: bool) -> None:
        def fail() -> np.ndarray:
            raise UserError("no index")

        try:
            found = storage.kept_array("formats/set", [tmp_path / "set"], fail if failing else build)
        except UserError:
            os._exit(7)
        os._exit(0 if found.tolist() == [0, 1, 2, 3, 4] else 1)

    context = get_context("fork")
    for failing in ([False] * 4, [True, True, False]):  # who can't build it holds nobody up
        shutil.rmtree(tmp_path / "local", ignore_errors=True)
        built.unlink(missing_ok=True)
        ranks = [context.Process(target=rank, args=(fails,)) for fails in failing]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(30)
        codes = [process.exitcode for process in ranks]
        assert built.read_text() == "x"
        assert set(codes) <= ({0, 7} if any(failing) else {0}) and codes[-1] == 0


def test_millions_of_records_open_in_seconds_and_stay_on_disk(tmp_path: Path) -> None:
    """1 million records here (3.3 million take about 3 times as long): the second opening takes no time or memory."""
    count = 1_000_000
    cell = np.frombuffer(record(struct.pack("<IfQQ", 0, 0, 0, 0) + b"face"), np.uint8)
    cells = np.tile(cell, (count, 1))
    keys = np.arange(count)
    cells[:, 12:16] = (keys // 1000).astype("<f4").view(np.uint8).reshape(-1, 4)
    cells[:, 16:24] = keys.astype("<u8").view(np.uint8).reshape(-1, 8)
    path = tmp_path / "train.rec"
    cells.tofile(path)
    path.with_suffix(".idx").write_text("".join(f"{k}\t{k * len(cell)}\n" for k in range(count)))
    code = (
        "import resource, sys, time; from pathlib import Path; from mvrepro.images import storage, Records;"
        "storage.LOCAL = Path(sys.argv[2]); start = time.perf_counter();"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; s = Records(Path(sys.argv[1]));"
        "assert len(s) == 1_000_000 and s.content(999_999) == b'face' and s.labels[999_999] == 999;"
        "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(images.__file__).parents[2])}
    for most_seconds, most_kib in ((20, 300_000), (2, 10_000)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / "kept")],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        seconds, kib = map(float, done.stdout.split())
        assert seconds < most_seconds and kib < most_kib


# Pair sets


def test_a_pair_set_of_either_python_is_read(tmp_path: Path) -> None:
    same = [True, False, True]
    python2 = b"".join(  # (lfw_bins, issame_list) with str and protocol 2, as Python 2's cPickle writes it
        [
            b"\x80\x02",
            b"](",
            *(b"T" + struct.pack("<i", len(i)) + i for i in IMAGES),
            b"e",
            b"](\x88\x89\x88e",
            b"\x86.",
        ]
    )
    written = [python2, *(pickle.dumps(value, protocol) for protocol in range(6) for value in
                          ((IMAGES, same), [tuple(IMAGES), tuple(same)], (IMAGES, [1, 0, 1])))]  # fmt: skip
    for content in written:
        (tmp_path / "lfw.bin").write_bytes(content)
        source, pairs = images.read_bin(tmp_path / "lfw.bin")
        assert ([source.content(i) for i in range(6)], len(source)) == (IMAGES, 6)
        assert (pairs.same.tolist(), pairs.same.dtype) == (same, np.bool_)
        assert (pairs.left.tolist(), pairs.right.tolist()) == ([0, 2, 4], [1, 3, 5])
    images.write_bin(tmp_path / "out.bin", IMAGES, pairs.same)
    assert pickle.loads((tmp_path / "out.bin").read_bytes()) == (IMAGES, same)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pair_set_of_arrays_is_read(tmp_path: Path, protocol: int) -> None:
    """As people pack them: encoded images and pixels as arrays, flags as NumPy's booleans or one array of them."""
    bytes_ = [np.frombuffer(image, np.uint8) for image in IMAGES]
    same, pixels = [True, False, True], np.stack([images.decode(image) for image in IMAGES])
    upright = [np.asfortranarray(image.transpose(1, 2, 0)) if k else image.transpose(1, 2, 0).copy() for k, image in enumerate(pixels)]  # fmt: skip  # noqa: E501
    for pictures in (bytes_, [column[:, None] for column in bytes_], upright):
        for flags in (np.array(same), list(np.array(same)), np.array(same).astype(np.uint8)):
            (tmp_path / "x.bin").write_bytes(pickle.dumps((pictures, flags), protocol))
            source, pairs = images.read_bin(tmp_path / "x.bin")
            assert np.array_equal(source.read(np.arange(6)), pixels)
            assert (pairs.same.tolist(), pairs.same.dtype) == (same, np.bool_)


@pytest.mark.parametrize("count", [10, 6000, 6007])
def test_folds_are_those_of_scikit_learn(count: int) -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    folds = images.Pairs.in_order(np.zeros(count, bool)).folds
    for number, (_, inside) in enumerate(model_selection.KFold(10).split(np.zeros(count))):
        assert np.flatnonzero(folds == number).tolist() == inside.tolist()


class Call:
    def __reduce__(self):
        return os.system, ("touch called",)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ((IMAGES, Call()), r"posix\.system"),
        (([Call()], [True]), r"posix\.system"),
        ((IMAGES, np.array([True, False, True], object)), r"an array of 'O8'"),
        ((IMAGES, np.array([1.0, 0.0, 1.0])), r"an array of 'f8'"),
        ((IMAGES, np.array(["a", "b", "c"])), r"an array of 'U1'"),
        ((IMAGES, np.ones((1, 3), bool)), "two lists"),
        (([np.ones((2, 2), np.uint8)] * 6, [True] * 3), r"image 0 is an array of shape \(2, 2\) and type ui"),
        (([np.ones(3, bool)] * 6, [True] * 3), r"image 0 is an array of shape \(3,\) and type bool, expected"),
        (([Path("x")] * 2, [True]), r"pathlib"),
        (({1, 2}, [True]), r"two lists|asks for \w+\.set"),
        ((IMAGES, {"same": True}), "two lists"),
        ((IMAGES, [True, None, False]), "pair 1 is NoneType, expected a boolean"),
        ((IMAGES, [True, 2, False]), "pair 1 is int, expected a boolean"),
        ((IMAGES, [True, 1.0, False]), "pair 1 is float, expected a boolean"),
        ((["text"] * 6, [True] * 3), "image 0 is str, expected bytes"),
        ((IMAGES, [True, False]), "6 images and 2 pairs"),
        (([], []), "0 images and 0 pairs"),
        ((IMAGES, [True], []), "two lists"),
        (b"just bytes", "two lists"),
    ],
)  # fmt: skip
def test_a_pickle_that_asks_for_more_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value, names: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        (tmp_path / "x.bin").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(UserError, match=names):
            images.read_bin(tmp_path / "x.bin")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'touch called'\niposix\nsystem\n.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R.",
        b"Pid\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R.",
        b"cnumpy\nload\n(S'x'\ntR.",  # of NumPy only what makes arrays
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"\x80\x02]r" + struct.pack("<I", 1 << 26) + b".",  # Python makes room for 67 million things
        b"(lp99999999\n.",
    ],
)
def test_pickles_by_hand_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"refused|not a whole pickle"):
        images.read_bin(tmp_path / "x.bin")
    assert not (tmp_path / "called").exists()


def test_a_damaged_pair_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        images.read_bin(tmp_path / "lfw.bin")
    whole = pickle.dumps((IMAGES, [True] * 3), 2)
    shape = pickle.dumps((IMAGES, np.ones(3, bool)), 2).replace(b"K\x03\x85", b"K\x04\x85")
    for content in (b"", whole[:-20], b"JPEG", whole[:100], shape):
        (tmp_path / "lfw.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"lfw\.bin: not a whole pickle"):
            images.read_bin(tmp_path / "lfw.bin")


# Folders and tar shards


def make_folder(root: Path) -> Path:
    for name, contents in {"b c": IMAGES[:3], "Ångström": IMAGES[4:], "d": IMAGES[3:4]}.items():
        (root / name / "deeper").mkdir(parents=True)
        for i, content in enumerate(contents):
            (root / name / ("deeper" if i else ".") / f"{i}.JPG").write_bytes(content)
        (root / name / "notes.txt").write_text("no image")
        (root / name / ".hidden.jpg").write_text("no image")
    return root


def test_a_folder_of_people_is_read(tmp_path: Path) -> None:
    source = images.open_images(make_folder(tmp_path / "people"))
    assert source.classes == ["b c", "d", "Ångström"]
    assert items(source) == PAIRS
    assert source.where(4) == str(tmp_path / "people" / "Ångström" / "0.JPG")
    assert items(pickle.loads(pickle.dumps(source))) == PAIRS
    for i in (6, -7):
        with pytest.raises(IndexError):
            source.content(i)
    (tmp_path / "people" / "d" / "0.JPG").unlink()
    with pytest.raises(UserError, match=r"0\.JPG can't be read"):
        source.content(3)
    with pytest.raises(UserError, match=r"people/d: no images there"):
        images.open_images(tmp_path / "people")


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, "expected a folder for each person"),
        (Path(__file__), "no known format"),
        (tmp_path / "no.rec", r"no\.rec can't be read"),
        (tmp_path / "no.tar", r"no\.tar can't be read"),
    ):
        with pytest.raises(UserError, match=message):
            images.open_images(path)
    (tmp_path / "a.rec").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(UserError, match="both"):
        images.open_images(tmp_path)
    (tmp_path / "b.tar").rename(tmp_path / "b.rec")
    with pytest.raises(UserError, match=r"2 \.rec files"):
        images.open_images(tmp_path)


def make_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    long = "people/" + "x" * 150
    make_tar(
        tmp_path / "set" / "1.tar",
        [("b.jpg", IMAGES[3]), ("b.cls", b"1\n"), ("c/d.v2.json", b"{}"), ("c/d.cls", b"2"), ("c/d.jpg", IMAGES[4])],
    )
    make_tar(
        tmp_path / "set" / "0.tar",
        [("a.cls", b"0"), ("a.jpg", IMAGES[0]), (f"{long}.JPG", IMAGES[1]), (f"{long}.cls", b"0")]
        + [("z/a.jpg", IMAGES[2]), ("z/a.cls", b"0")],
    )
    make_tar(tmp_path / "set" / "2.tar", [("a.png", IMAGES[5]), ("a.cls", b"2")])
    source = images.open_images(tmp_path / "set")
    assert items(source) == PAIRS
    assert images.open_images(tmp_path / "set" / "2.tar", renumber=True).labels.tolist() == [0]
    assert source.where(3).startswith(str(tmp_path / "set" / "1.tar"))


def test_labels_in_json_are_read_where_there_is_no_cls(tmp_path: Path) -> None:
    said = [b"2", b'{"label": 0, "sha": "x"}', b'{"cls": 1}', b'{"class": 0}', b'{"class_id": 2, "name": "B\xc3\xb6"}']
    files = [(f"{i}.json", content) for i, content in enumerate(said)]
    files += [
        ("5.cls", b"1"),
        ("5.json", b'{"label": 7}'),
        ("6.json", b"about the shard"),
        ("meta.json", b'{"label": 9}'),
    ]
    files += [(f"{i}.jpg", image) for i, image in enumerate(IMAGES)]
    source = images.open_images(make_tar(tmp_path / "x.tar", files))
    assert source.labels.tolist() == [2, 0, 1, 0, 2, 1]
    assert [source.content(i) for i in range(6)] == IMAGES


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", b"1")], r"a has no class id \(.cls\)"),
        ([("a.jpg", b"1"), ("a.json", b'{"label": "x"}')], r"a has no class id \(.cls\), and no .json with one"),
        ([("a.jpg", b"1"), ("a.json", b"[0")], r"a has no class id"),
        ([("a.jpg", b"1"), ("a.json", b"-1")], r"a has no class id"),
        ([("a.jpg", b"1"), ("a.json", b"true")], r"a has no class id"),
        ([("a.cls", b"1")], "a has no image"),
        ([("a.cls", b"-1"), ("a.jpg", b"1")], r"a\.cls: expected a class id, got '-1'"),
        ([("a.cls", b"\xff"), ("a.jpg", b"1")], r"expected a class id"),
        ([("a.cls", b"1"), ("a.cls", b"1"), ("a.jpg", b"1")], "a has two class ids"),
        ([("a.json", b"1"), ("a.json", b"0"), ("a.jpg", b"1")], r"a has two class ids \(\.json\)"),
        ([("a.cls", b"1"), ("a.png", b"1"), ("a.jpg", b"1")], "a has two images"),
        ([], "no images there"),
        ([("a.cls", b"1"), ("a.jpg", b"1")], "1 of the class ids 0 … 1 have no image: 0;"),
    ],
)
def test_a_shard_that_is_wrong_is_named(tmp_path: Path, files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        images.open_images(make_tar(tmp_path / "x.tar", files))


def test_a_damaged_or_compressed_shard_is_named(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.cls", b"0"), ("a.jpg", os.urandom(5000))])
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"x\.tar: (cut off|not a whole)"):
        images.open_images(path)
    whole = make_tar(tmp_path / "y.tar", [("a.cls", b"0"), ("a.jpg", b"1")]).read_bytes()
    path.write_bytes(whole + bytes(3 << 20))
    assert len(images.open_images(path)) == 1
    for more in (whole, bytes(2 << 20) + whole, b"junk" * 200):
        path.write_bytes(whole + more)
        with pytest.raises(UserError, match=r"x\.tar: more follows its end at byte 2048, .* keep each in a file"):
            images.open_images(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        images.open_images(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "a.jpg")
    with pytest.raises(UserError, match="not a whole, uncompressed tar"):
        images.open_images(path)


def test_every_format_turns_into_every_other(tmp_path: Path) -> None:
    folder = images.open_images(make_folder(tmp_path / "people"))
    images.write_rec(tmp_path / "rec" / "train.rec", folder)
    images.write_tars(tmp_path / "tars", images.open_images(tmp_path / "rec"), shard_size=4)
    assert [p.name for p in sorted((tmp_path / "tars").glob("*.tar"))] == ["000000.tar", "000001.tar"]
    images.write_folder(tmp_path / "again", images.open_images(tmp_path / "tars"))
    again = images.open_images(tmp_path / "again")
    assert (items(again), again.classes) == (PAIRS, folder.classes)
    with pytest.raises(UserError, match="again is there already"):
        images.write_folder(tmp_path / "again", images.open_images(tmp_path / "tars"))
    for path in (tmp_path / "rec" / "classes.txt", tmp_path / "tars" / "classes.txt"):
        path.unlink()
    images.write_folder(tmp_path / "numbers", images.open_images(tmp_path / "tars"))
    assert images.open_images(tmp_path / "numbers").classes == ["0000000", "0000001", "0000002"]


def test_classes_are_left_out_with_their_images(tmp_path: Path) -> None:
    source = images.open_images(make_folder(tmp_path / "people")).without(np.array([1]))
    assert items(source) == [PAIRS[i] for i in (0, 1, 2, 4, 5)]
    assert source.where(3).endswith("Ångström/0.JPG")
    assert source.renumbered().classes == ["b c", "Ångström"]
    assert items(source.renumbered())[3] == (IMAGES[4], 1)


def test_a_class_without_images_at_the_end_loses_its_name_with_them(tmp_path: Path) -> None:
    source = images.open_images(make_folder(tmp_path / "people")).without(np.array([2]))
    images.write_tars(tmp_path / "tars", source, shard_size=3)
    assert images.open_images(tmp_path / "tars").classes == ["b c", "d"]
    assert images.open_images(tmp_path / "tars" / "000000.tar").classes == ["b c", "d"]  # a shard of two


# Class ids and decoding


def test_holes_are_named_or_filled_on_request(tmp_path: Path) -> None:
    old = {0: 3, 1: 4, 2: 9}
    images.write_rec(tmp_path / "set" / "train.rec", memory([(content, old[label]) for content, label in PAIRS]))
    with pytest.raises(UserError, match=r"7 of the class ids 0 … 9 have no image: 0–2, 5–8; .*--renumber"):
        images.open_images(tmp_path / "set")
    source = images.open_images(tmp_path / "set", renumber=True)
    assert items(source) == PAIRS
    assert source.where(0) == f"{tmp_path / 'set' / 'train.rec'}, record 1"
    assert images.open_images(tmp_path / "set", allow_holes=True).labels.max() == 9
    many = np.arange(0, 40, 2)
    with pytest.raises(UserError, match="19 of the class ids 0 … 38 have no image: 1, 3, 5, 7, 9 and 14 more gaps"):
        images.check_ids(many, "set")


def decoded(items: list[tuple[bytes, int]], size: int | None = SIZE, limit: int | None = 100) -> images.Memory:
    source = memory(items)
    source.size, source.bad_limit = size, limit
    return source


def test_decoding_gives_pixels() -> None:
    for kind in ("PNG", "JPEG"):
        content = image(1, kind=kind)
        pixels = decoded([(content, 5), PAIRS[0]]).read(np.array([1, 0, 0]))
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 3, SIZE, SIZE))
        assert (pixels[2].transpose(1, 2, 0) == np.asarray(Image.open(io.BytesIO(content)))).all()
    assert decoded(PAIRS).read(np.array([], np.int64)).shape == (0, 3, SIZE, SIZE)
    grey = io.BytesIO()
    Image.new("L", (SIZE, SIZE), 7).save(grey, "PNG")
    assert (images.decode(grey.getvalue()) == 7).all()


def test_a_file_that_cannot_be_read_is_as_good_as_one_that_does_not_decode(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.png").write_bytes(image(1))
    (tmp_path / "set" / "a" / "2.png").symlink_to("nowhere.png")
    (tmp_path / "set" / "a" / "3.png").symlink_to("3.png")
    source = images.open_images(tmp_path / "set")
    assert len(source.read(np.arange(3))) == 3 and source.bad == {1, 2}
    assert main(["data", "inspect", str(tmp_path / "set"), "--decode"]) == 1
    said = capsys.readouterr().out
    assert "2 images don't decode" in said and "2.png can't be read as an image: No such file or directory" in said
    assert main(["data", "convert", str(tmp_path / "set"), str(tmp_path / "rec"), "--to", "rec"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "rec").exists()


def test_an_image_that_does_not_decode_is_skipped_and_counted() -> None:
    """Another of its class stands in for it: what labels say of it holds."""
    pairs = [(IMAGES[0], 0), (b"junk", 0), (IMAGES[3], 1), (image(3)[:200], 0), (IMAGES[4], 0), (b"", 1)]
    data = decoded(pairs, limit=3)
    for _ in range(2):  # the same image counts once
        pixels = data.read(np.arange(6))
    expected = decoded([pairs[i] for i in (0, 4, 2, 4, 4, 2)]).read(np.arange(6))
    assert np.array_equal(pixels, expected) and data.bad == {1, 3, 5}
    strict = decoded(pairs, limit=2)
    strict.read(np.array([1]))
    message = r"3 images don't decode, more than the limit of 2; the last: a list, image 5: not an"
    with pytest.raises(UserError, match=message):
        strict.read(np.array([5]))
    for _ in range(2):
        with pytest.raises(
            UserError, match="no image of the class 7 decodes: leave it out or mend one, a list, image 1"
        ):
            (none := decoded([PAIRS[0], (b"junk", 7), (b"", 7)])).read(np.array([1]))
    assert none.bad == {1, 2}


def test_where_every_image_counts_none_stands_for_another() -> None:
    """Of a pair set, whose images are what they are compared as."""
    with pytest.raises(UserError, match=r"a list, image 1 can't be read as an image: not an image \(4 bytes\)"):
        decoded([PAIRS[3], (b"junk", 9)], limit=None).read(np.array([0, 1]))


RAMP = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE)


def modes() -> dict[str, tuple[Image.Image, str, np.ndarray | str]]:
    """In each mode, a ramp of grey, the format that holds it, and what is right: (H, W) or why it is refused."""
    grey = Image.fromarray(RAMP.astype(np.uint8))
    rgba = grey.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.where(RAMP < 100, 0, 255).astype(np.uint8)))
    palette = grey.convert("P")
    palette.info["transparency"] = 0
    exact = RAMP.astype(np.uint8)
    return {
        "L": (grey, "PNG", exact),
        "1": (grey.convert("1", dither=Image.Dither.NONE), "PNG", np.where(exact > 127, 255, 0)),
        "I;16": (Image.fromarray((RAMP * 257).astype(np.uint16)), "PNG", RAMP),
        "I;16 in TIFF": (Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF", RAMP),
        "I": (Image.fromarray((RAMP * 1000).astype(np.int32)), "TIFF", "pixels of mode I"),
        "F": (Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF", "pixels of mode F"),
        "LA": (grey.convert("LA"), "PNG", exact),
        "RGBA": (rgba, "PNG", np.where(RAMP < 100, 0, exact)),
        "P": (palette, "PNG", exact),
        "CMYK": (grey.convert("RGB").convert("CMYK"), "TIFF", exact),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_comes_out_right_or_is_refused_by_name(mode: str) -> None:
    picture, kind, expected = modes()[mode]
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            images.decode(buffer.getvalue())
    else:
        np.testing.assert_allclose(images.decode(buffer.getvalue()), np.broadcast_to(expected, (3, SIZE, SIZE)), atol=1)


def tiff(bits: int, photometric: int, data: bytes) -> bytes:
    """A grey one without compression, by hand."""
    tags = {256: SIZE, 257: SIZE, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: SIZE, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def test_grey_of_sixteen_bits_comes_out_right_or_is_refused() -> None:
    deep, right = (RAMP * 257).astype("<u2"), np.broadcast_to(RAMP, (3, SIZE, SIZE))
    assert (images.decode(tiff(16, 1, deep.tobytes())) == right).all()
    assert (images.decode(tiff(16, 0, (65535 - deep).tobytes())) == right).all()  # 0 is white
    with pytest.raises(ValueError, match="a TIFF of 12 bits a pixel, expected 8 or 16"):
        images.decode(tiff(12, 1, bytes(SIZE * SIZE * 3 // 2)))
    clear = int(deep.max())
    Image.fromarray(deep).save(buffer := io.BytesIO(), "PNG", transparency=clear)
    assert (images.decode(buffer.getvalue()) == np.where(deep == clear, 0, right)).all()


def test_images_that_are_stored_turned_have_the_size_that_is_seen() -> None:
    turned = Image.Exif()
    turned[274] = 6
    Image.new("RGB", (40, 20), "red").save(buffer := io.BytesIO(), "JPEG", exif=turned)
    lying = buffer.getvalue()
    assert decoded([(lying, 0)] * 2, size=None).read(np.arange(2)).shape == (2, 3, 40, 20)
    Image.new("RGB", (40, 20), "red").save(buffer := io.BytesIO(), "JPEG")
    with pytest.raises(UserError, match="image 1: 40×20 pixels, expected 20×40"):
        decoded([(lying, 0), (buffer.getvalue(), 0)], size=None).read(np.arange(2))


def test_an_image_of_too_many_pixels_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="exceeds limit of 89478485 pixels"):
        images.decode(buffer.getvalue())


BOMB = """
import resource, sys, numpy as np; from mvrepro.images import Memory; from mvrepro.errors import UserError
from PIL import Image; Image.init()
source = Memory([sys.stdin.buffer.read()], np.zeros(1, int), "a list"); source.size = 112
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: source.read(np.zeros(1, int))
except UserError as error: print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_size_is_looked_at_before_anything_is_decoded() -> None:
    """A PNG of 110 KB, whose pixels take 900 MB, is refused by its header."""
    buffer = io.BytesIO()
    Image.new("L", (9000, 9000)).save(buffer, "PNG")
    environment = os.environ | {"PYTHONPATH": str(Path(images.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", BOMB], input=buffer.getvalue(), capture_output=True, check=True, env=environment
    )
    message, kib = done.stdout.decode().splitlines()
    assert len(buffer.getvalue()) < 200_000 and message == "a list, image 0: 9000×9000 pixels, expected 112×112"
    assert int(kib) < 20_000


def test_an_image_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image 0: 16×16 pixels, expected 112×112"):
        decoded(PAIRS, size=112).read(np.array([0]))
    with pytest.raises(UserError, match="image 1: 8×8 pixels, expected 16×16"):  # those of one read must be alike
        decoded([PAIRS[0], (image(1, 8), 0)], size=None).read(np.array([0, 1]))
    source = images.open_images(make_folder(tmp_path / "people"), size=112)
    with pytest.raises(UserError, match=r"0\.JPG: 16×16 pixels, expected 112×112"):
        source.read(np.array([0]))


@pytest.mark.parametrize("labels", [(-1, 0), (0, 2**24 + 1)])
def test_class_ids_that_float32_does_not_hold_are_refused(tmp_path: Path, labels: tuple[int, int]) -> None:
    source = memory([(image(0), 0), (image(1), 1)])
    source.labels = np.array(labels)
    with pytest.raises(UserError, match=r"a \.rec holds class ids 0"):
        images.write_rec(tmp_path / "set" / "train.rec", source)
    assert not (tmp_path / "set").exists()


def test_a_set_without_some_classes_keeps_what_it_was_opened_with(tmp_path: Path) -> None:
    images.write_rec(tmp_path / "set" / "train.rec", memory([*PAIRS, (b"no image", 0)]))
    source = images.open_images(tmp_path / "set", size=SIZE, bad_limit=5)
    for view in (source.without(np.array([1])), source.renumbered()):
        assert (view.size, view.bad_limit) == (SIZE, 5)
        assert view.read(np.arange(len(view))).shape == (len(view), 3, SIZE, SIZE)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux shows them")
def test_a_set_of_many_files_keeps_few_of_them_open(tmp_path: Path) -> None:
    readers = []
    for number in range(300):
        (tmp_path / f"{number}").write_bytes(bytes([number % 256]))
        readers.append(storage.Reader(tmp_path / f"{number}"))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    assert [reader.read(0, 1)[0] for reader in readers] == [number % 256 for number in range(300)]
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) - before <= 128
    (tmp_path / "new").write_bytes(b"n")
    (tmp_path / "new").replace(tmp_path / "299")
    assert storage.Reader(tmp_path / "299").read(0, 1) == b"n"  # and not the file that was there before
