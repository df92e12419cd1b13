"""Folders of images: ROOT/PERSON/….jpg, PERSON being whatever the folder is called."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.files import write_atomic
from mvrepro.images.source import SUFFIXES, Source


class Folder(Source):
    """Class ids follow the sorted names of the folders in `root`; an image may lie deeper than they. Files that
    are no images by their suffix are passed over. The paths are kept as one block of bytes: about 30 bytes an image."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            people = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        except OSError as error:
            raise UserError(f"{root} can't be read as a folder: {error.strerror or error}") from None
        block, ends, counts = bytearray(), [], []
        for person in tqdm(people, f"listing {root.name}", leave=False, disable=None):
            paths = sorted(_images(root / person))
            if not paths:
                raise UserError(f"{root / person}: no images there ({', '.join(SUFFIXES)})")
            for path in paths:
                block += os.fsencode(path)
                ends.append(len(block))
            counts.append(len(paths))
        if not people:
            raise UserError(f"{root}: expected a folder for each person, found none")
        self.classes = people
        self._block, self._ends = bytes(block), np.array([0, *ends], np.int64)
        self._labels = np.repeat(np.arange(len(people)), counts)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        try:
            return self.path(i).read_bytes(), int(self._labels[i])
        except OSError as error:
            raise UserError(f"{self.path(i)} can't be read: {error.strerror or error}") from None

    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def path(self, i: int) -> Path:
        i %= len(self)
        inside = os.fsdecode(self._block[self._ends[i] : self._ends[i + 1]])
        assert self.classes is not None
        return Path(self.root, self.classes[int(self._labels[i])], inside)

    def where(self, i: int) -> str:
        return str(self.path(i))


def _images(folder: Path, prefix: str = "") -> list[str]:
    found = []
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            found += _images(folder / entry.name, f"{prefix}{entry.name}/")
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(prefix + entry.name)
    return found


def write_folder(root: Path, source: Source) -> None:
    """root/PERSON/0000001.jpg; PERSON is the class's name or, where it has none, its number. An image already
    there is left when it is the same, so that a stopped call can be repeated; another one is an error."""
    labels = source.labels()
    width = max(7, len(str(int(labels.max()))))
    for i in tqdm(range(len(source)), f"writing {root.name}", leave=False, disable=None):
        content, label = source[i]
        name = source.classes[label] if source.classes else f"{label:0{width}d}"
        if not name or "/" in name or name[0] == ".":  # names come out of other people's files
            raise UserError(f"class {label} is called {name!r}, which can't be the name of a folder")
        path = root / name / f"{i + 1:07d}{suffix(content)}"
        if not path.exists():
            write_atomic(path, content)
        elif path.read_bytes() != content:
            raise UserError(f"{path} is there already and another image: remove it or choose another place")


def suffix(content: bytes) -> str:
    """By the first bytes; .jpg for what is not known."""
    starts = {b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp"}
    return next((name for start, name in starts.items() if content.startswith(start)), ".jpg")
