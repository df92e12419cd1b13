"""Tar shards as webdataset writes them: KEY.jpg and KEY.cls (the class id as text), one pair an image. Where there is
no .cls, KEY.json says it: a number, or an object with a number as its label, cls, class or class_id.

The key is the path up to the first dot of the file's name; other files of a key are passed over.
Images are read where they lie, so the shards must not be compressed.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.files import is_number
from mvrepro.images.folders import suffix
from mvrepro.images.source import SUFFIXES, Encoded
from mvrepro.images.storage import Reader, kept_array, new_set, read_classes, write_classes


class Tars(Encoded):
    """The images of all shards in the order in which they lie there."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [Reader(path) for path in paths]
        # (N, 4) int64: shard, offset, bytes, class id. The first time takes a pass over the shards' headers.
        self._index = kept_array(
            f"formats/{paths[0].name}-index", paths, lambda: np.concatenate([_scan(*p) for p in enumerate(self.files)])
        )
        self.labels = self._index[:, 3]
        self.classes = read_classes(paths[0].parent)
        if not len(self._index):
            raise UserError(f"{paths[0]}: no images there")

    def content(self, i: int) -> bytes:
        shard, offset, count, _ = map(int, self._index[i])
        return self.files[shard].read(offset, count)

    def where(self, i: int) -> str:
        shard, offset, *_ = self._index[i].tolist()
        return f"{self.files[shard].path}, the file at byte {offset}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tars, ([file.path for file in self.files],), self._settings()


def _scan(shard: int, file: Reader) -> NDArray[np.int64]:
    """(n, 4) of one shard."""
    images: dict[str, tuple[int, int]] = {}
    ids: dict[str, int] = {}
    said: dict[str, int] = {}  # in .json
    twice: set[str] = set()
    try:
        with tarfile.open(file.path, "r:") as tar:
            for member in tqdm(tar, f"listing {file.path.name}", leave=False, disable=None):
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                key = folder + slash + name.partition(".")[0]
                kind = "." + name.partition(".")[2].lower()
                if kind not in (*SUFFIXES, ".cls", ".json"):
                    continue
                if member.offset_data + member.size > file.size:
                    raise UserError(f"{file.path}: cut off within {member.name}")
                if kind == ".json":
                    found = _json_id(key, file.read(member.offset_data, member.size))
                    twice |= found.keys() & said.keys()
                    said |= found
                    continue
                if key in (ids if kind == ".cls" else images):
                    raise UserError(f"{file.path}: {key} has two {'class ids' if kind == '.cls' else 'images'}")
                if kind == ".cls":
                    ids[key] = _class_id(file.read(member.offset_data, member.size), f"{file.path}, {member.name}")
                else:
                    images[key] = (member.offset_data, member.size)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{file.path}: not a whole, uncompressed tar file: {error}") from None
    if unsure := sorted(twice & images.keys() - ids.keys()):
        raise UserError(f"{file.path}: {unsure[0]} has two class ids (.json)")
    ids = {key: number for key, number in said.items() if key in images} | ids
    alone = sorted(images.keys() ^ ids.keys())
    if alone:
        lacks = "class id (.cls), and no .json with one" if alone[0] in images else "image"
        raise UserError(f"{file.path}: {alone[0]} has no {lacks} ({len(alone)} such keys)")
    rows = [(shard, *place, ids[key]) for key, place in images.items()]
    return np.array(rows, np.int64).reshape(-1, 4)


def _check_end(file: Reader, end: int) -> None:
    """Raises UserError where more than zeros follows the last file that tarfile lists."""
    for start in range(end, file.size, 1 << 20):
        if file.read(start, 1 << 20).strip(b"\0"):
            raise UserError(
                f"{file.path}: more follows its end at byte {end}, which no reader would see: it is damaged, or tars "
                "were joined by cat; keep each in a file of its own"
            )


def _class_id(content: bytes, where: str) -> int:
    text = content.decode("ascii", "replace").strip()
    if not is_number(text):
        raise UserError(f"{where}: expected a class id, got {text[:20]!r}")
    return int(text)


def _json_id(key: str, content: bytes) -> dict[str, int]:
    """{key: class id}, or nothing: a .json may be about anything."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if isinstance(value, dict):
        value = next((value[name] for name in ("label", "cls", "class", "class_id") if name in value), None)
    return {key: value} if type(value) is int and 0 <= value < 10**9 else {}


def write_tars(root: Path, source: Encoded, shard_size: int = 10_000) -> None:
    """root/000000.tar, 000001.tar, … of shard_size images each, in the order of `source`; the names of classes, where
    it has them, go to root/classes.txt. Whole or not at all."""
    with new_set(root) as aside:
        write_classes(aside, source)
        for shard, first in enumerate(range(0, len(source), shard_size)):
            with tarfile.open(aside / f"{shard:06d}.tar", "w") as tar:
                labels = source.labels[first : first + shard_size].tolist()
                for i, label in enumerate(tqdm(labels, f"writing shard {shard}", leave=False, disable=None), first):
                    content = source.content(i)
                    for kind, data in ((suffix(content), content), (".cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{i:09d}{kind}")  # its time is 0: the same images are the same bytes
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
