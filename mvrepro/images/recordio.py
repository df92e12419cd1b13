"""InsightFace's training sets: train.rec and train.idx, MXNet's RecordIO, read and written without MXNet.

A record is a frame or, where its content holds the magic number at a multiple of 4, several:

    magic 0xced7230a | flag << 29 | length | content | padding to a multiple of 4        little-endian
    flag: 0 the whole record; 1 its first part, 2 a middle one, 3 its last one: the magic number that
    stood between two parts is left out                            (dmlc-core, include/dmlc/recordio.h)

Its content is an image behind a header (mxnet/recordio.py, IRHeader, "<IfQQ"):

    flag (uint32) | label (float32) | id (uint64) | id2 (uint64) | flag further labels (float32) | image

The class id is `label` where flag is 0, else the first further label. train.idx has a line "key offset"
a record. InsightFace (src/data/face2rec2.py) gives images the keys 1 … n; the record with key 0 has no image
and the labels [n + 1, n + 1 + people]: the keys of as many records without an image, whose labels are the
first key of a person's images and the one behind its last. The record with key 0 may lie behind the images.
A file without such a record 0 is all images (MXNet's im2rec).
"""

import re
import struct
import warnings
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.files import read_lines
from mvrepro.images.source import Encoded
from mvrepro.images.storage import Reader, kept_array, new_set, read_classes, write_classes

MAGIC = struct.pack("<I", 0xCED7230A)
FRAME, HEADER = struct.Struct("<4sI"), struct.Struct("<IfQQ")
LONGEST = (1 << 29) - 1  # of a frame's content
LARGEST = 1 << 24  # float32 counts no further, and labels and keys are stored as float32


class Records(Encoded):
    """The images of a .rec file in the order of their keys. Its .idx is used where there is one; else a pass over
    the file finds the records (their ids are the keys where they are 0 … M−1, their order otherwise)."""

    def __init__(self, path: Path) -> None:
        self.file, self._index = Reader(path), path.with_suffix(".idx")
        files = [path, self._index] if self._index.exists() else [path]
        # (2, M) int64: by key the offset of the record and its class id, −1 for records without an image.
        self.offsets, labels = kept_array(f"formats/{path.name}-index", files, self._find)
        self._first = int(labels[0] < 0)
        self.labels = labels[self._first : self._first + np.count_nonzero(labels >= 0)]
        self.classes = read_classes(path.parent)

    def content(self, i: int) -> bytes:
        key = self._first + range(len(self))[i]
        labels, content = self._record(key)
        if (label := self._class_id(key, labels)) != self.labels[i]:
            raise UserError(f"{self.where(i)}: its class id is {label}, but {self.labels[i]} by its person's record")
        return content

    def where(self, i: int) -> str:
        return f"{self.file.path}, record {self._first + range(len(self))[i]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self.file.path,), self._settings()

    def _find(self) -> NDArray[np.int64]:
        """What is kept; a file that is cut off, or has another's index, is noticed here and not after an hour."""
        self.offsets = _read_index(self._index, self.file) if self._index.exists() else _scan(self.file)
        if not len(self.offsets):
            raise UserError(f"{self.file.path}: no records there")
        labels = np.full(len(self.offsets), -1, np.int64)
        self._record(len(labels) - 1), self._record(int(self.offsets.argmax()))
        span, content = self._record(0)
        if content or len(span) < 2:  # no header: all records are images
            for key in tqdm(range(len(labels)), "class ids", leave=False, disable=None):
                labels[key] = self._class_id(key, self._labels(key))
            return np.stack([self.offsets, labels])
        first, end = _span(span)
        if not 1 <= first <= end <= len(labels):
            raise UserError(
                f"{self.file.path}: its header announces {first - 1} images and {end - first} people, but "
                f"{self._places} has {len(labels)} records: the index or the file is not whole"
            )
        if first < 2:
            raise UserError(f"{self.file.path}: no images there")
        for key in tqdm(range(first, end), "class ids", leave=False, disable=None):
            start, stop = _span(span := self._labels(key))
            if not 1 <= start < stop <= first or (labels[start:stop] >= 0).any():
                raise UserError(f"{self.file.path}, record {key}: {span} are not the keys of a person's images")
            labels[start:stop], last = (self._class_id(k, self._labels(k)) for k in (start, stop - 1))
            if labels[start] != last:
                raise UserError(
                    f"{self.file.path}, record {key}: its person's images {start} … {stop - 1} have the class ids "
                    f"{labels[start]} and {last}: the people's records don't fit the images"
                )
        if (labels[1:first] < 0).any():
            lost = int(np.argmax(labels[1:first] < 0)) + 1
            raise UserError(f"{self.file.path}, record {lost}: an image that no person's record counts")
        return np.stack([self.offsets, labels])

    @property
    def _places(self) -> str:
        return str(self._index) if self._index.exists() else f"the records found in {self.file.path}"

    def _record(self, key: int) -> tuple[list[float], bytes]:
        """Labels and image of the record with this key."""
        offset = int(self.offsets[key])
        try:
            return _unpack(_content(self.file, offset))
        except ValueError as error:
            raise UserError(
                f"{self.file.path}, record {key}: {error} at byte {offset}, which {self._places} names: "
                "the file is damaged or cut off, or the index is not this file's (without one, it is made anew)"
            ) from None

    def _labels(self, key: int) -> list[float]:
        """Of the record with this key; without its image, where they stand in the first frame."""
        head = self.file.read(int(self.offsets[key]), 40)
        if len(head) == 40 and head[:4] == MAGIC and head[7] >> 5 == 0:
            flag, label, *_ = HEADER.unpack_from(head, FRAME.size)
            if flag <= 2:
                return list(struct.unpack_from("<2f", head, 32))[:flag] or [label]
        return self._record(key)[0]

    def _class_id(self, key: int, labels: list[float]) -> int:
        label = labels[0]
        if not (0 <= label <= LARGEST and label == int(label)):
            raise UserError(f"{self.file.path}, record {key}: {label} is no class id")
        return int(label)


def write_rec(path: Path, source: Encoded) -> None:
    """Write `source` as InsightFace does: path (.rec), its .idx, images sorted by class id, header record 0.

    The names of classes, where `source` has them, go to classes.txt beside it, which is ours and not InsightFace's.
    Their folder is new, and whole or not there. Raises UserError beyond 2^24 images and people, which the header's
    float32 can't count.
    """
    labels = source.labels
    order = np.argsort(labels, kind="stable")
    people, starts = np.unique(labels[order], return_index=True)
    first = len(labels) + 1
    if first + len(people) > LARGEST:
        raise UserError(f"{len(labels)} images and {len(people)} people are more than the {LARGEST} that a .rec counts")
    if len(people) and not 0 <= people[0] <= people[-1] <= LARGEST:
        raise UserError(f"a .rec holds class ids 0 … {LARGEST}, as float32; these are {people[0]} … {people[-1]}")
    with new_set(path.parent) as aside:
        write_classes(aside, source)
        index, target = (aside / path.with_suffix(".idx").name).open("w"), (aside / path.name).open("wb")
        with index, target:

            def write(key: int, content: bytes) -> None:
                index.write(f"{key}\t{target.tell()}\n")
                target.write(frames(content))

            for key, i in enumerate(tqdm(order.tolist(), f"writing {path.name}", leave=False, disable=None), 1):
                write(key, HEADER.pack(0, labels[i], key, 0) + source.content(i))
            edges = [*(starts + 1).tolist(), first]
            spans = {0: (first, first + len(people))}
            spans |= {first + k: (edges[k], edges[k + 1]) for k in range(len(people))}
            for key, span in spans.items():
                write(key, HEADER.pack(2, 0, key, 0) + struct.pack("<2f", *span))


def frames(content: bytes) -> bytes:
    """A record of this content: one frame, or several where the magic number stands in it at a multiple of 4."""
    cuts, at = [], content.find(MAGIC)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = content.find(MAGIC, at + (4 if at % 4 == 0 else 1))
    starts, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(content)]
    parts = [content[a:b] for a, b in zip(starts, ends, strict=True)]
    if max(map(len, parts)) > LONGEST:
        raise UserError(f"a record of {len(content)} bytes is too long for RecordIO")
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(
        FRAME.pack(MAGIC, flag << 29 | len(part)) + part + bytes(-len(part) % 4)
        for flag, part in zip(flags, parts, strict=True)
    )


def _frame(file: Reader, offset: int, head: bytes) -> tuple[int, int]:
    """Flag and length of the frame that begins with head. Raises ValueError where none does or the file ends in it."""
    if len(head) < FRAME.size:
        raise ValueError("the file ends before a record")
    magic, lrecord = FRAME.unpack_from(head)
    if magic != MAGIC:
        raise ValueError("no record begins")
    flag, length = lrecord >> 29, lrecord & LONGEST
    if offset + FRAME.size + length > file.size:
        raise ValueError(f"the file ends within a record of {length} bytes")
    return flag, length


def _content(file: Reader, offset: int) -> bytes:
    parts, expected = [], (0, 1)
    while True:
        flag, length = _frame(file, offset, file.read(offset, FRAME.size))
        if flag not in expected:
            raise ValueError(f"a part of a record with the flag {flag}, expected {' or '.join(map(str, expected))},")
        parts.append(file.read(offset + FRAME.size, length))
        if flag in (0, 3):
            return MAGIC.join(parts)
        offset, expected = offset + FRAME.size + length + -length % 4, (2, 3)


def _unpack(content: bytes) -> tuple[list[float], bytes]:
    if len(content) < HEADER.size:
        raise ValueError(f"a record of {len(content)} bytes, too short for its header,")
    flag, label, *_ = HEADER.unpack_from(content)
    image = HEADER.size + 4 * flag
    if image > len(content):
        raise ValueError(f"a record of {len(content)} bytes, too short for its {flag} labels,")
    return ([label] if not flag else list(struct.unpack_from(f"<{flag}f", content, HEADER.size))), content[image:]


def _span(labels: list[float]) -> tuple[int, int]:
    """The two keys that the records without an image hold; (0, 0) for what is none."""
    whole = len(labels) >= 2 and all(0 <= x <= LARGEST and x == int(x) for x in labels[:2])
    return (int(labels[0]), int(labels[1])) if whole else (0, 0)


def _read_index(path: Path, file: Reader) -> NDArray[np.int64]:
    """(M,) offsets by key; keys that are not 0 … M−1 are only an order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns where text that is no number ends the reading
            numbers = np.fromstring(path.read_text("utf-8-sig"), np.int64, sep=" ")
        if len(numbers) % 2:
            raise ValueError("an odd number of numbers")
    except (ValueError, DeprecationWarning):
        damaged = (str(number) for number, line in read_lines(path) if not re.fullmatch(r"\d+\s+\d+", line))
        raise UserError(f"{path}, line {next(damaged, '?')}: expected 'key offset'") from None
    keys, offsets = numbers[::2], numbers[1::2]
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    for what, column in (("key", keys), ("offset", np.sort(offsets))):
        twice = np.flatnonzero(column[1:] == column[:-1])
        if len(twice):
            raise UserError(f"{path}: the {what} {int(column[twice[0]])} stands there twice")
    wrong = np.flatnonzero((offsets < 0) | (offsets >= file.size) | (offsets % 4 != 0))
    if len(wrong):
        raise UserError(
            f"{path}: key {int(keys[wrong[0]])} lies at byte {int(offsets[wrong[0]])}, where no record can begin: "
            f"{file.path} has {file.size} bytes and records begin at multiples of 4; it is cut off or another file's"
        )
    return offsets


def _scan(file: Reader) -> NDArray[np.int64]:
    """(M,) offsets of the records by key, from a pass over the file that reads 32 bytes a record."""
    places, numbers = array("q"), array("q")
    offset, inside = 0, False
    bar = tqdm(total=file.size, desc=f"finding records in {file.path.name}", unit="B", unit_scale=True,
               leave=False, disable=None)  # fmt: skip
    while offset < file.size:
        head = file.read(offset, FRAME.size + HEADER.size)
        try:
            flag, length = _frame(file, offset, head)
            if flag > 3 or inside != (flag in (2, 3)):
                raise ValueError(f"a part of a record with the unexpected flag {flag}")
        except ValueError as error:
            raise UserError(f"{file.path}: {error} at byte {offset} of {file.size}: damaged or cut off") from None
        if not inside:
            number = HEADER.unpack_from(head, FRAME.size)[2] if length >= HEADER.size else LARGEST
            places.append(offset)
            numbers.append(min(number, LARGEST))
        inside = flag in (1, 2)
        offset += FRAME.size + length + -length % 4
        if len(places) % 10_000 == 0:
            bar.update(offset - bar.n)
    bar.close()
    if inside:
        raise UserError(f"{file.path}: the file ends within a record in parts: damaged or cut off")
    offsets, ids = np.array(places, np.int64), np.array(numbers, np.int64)
    order = np.argsort(ids, kind="stable")
    return offsets[order] if np.array_equal(ids[order], np.arange(len(ids))) else offsets
