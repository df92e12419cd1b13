"""Folders of images: ROOT/PERSON/….jpg, PERSON being whatever the folder is called."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.images.source import SUFFIXES, Encoded
from mvrepro.images.storage import class_names, new_set


class Files(Encoded):
    """Image files below a folder. Their paths are kept as one block of bytes: about 40 bytes an image."""

    def __init__(self, root: Path, inside: Iterable[str]) -> None:
        self.root = root
        block, ends = bytearray(), [0]
        for path in inside:
            block += os.fsencode(path)
            ends.append(len(block))
        self._block, self._ends = bytes(block), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def content(self, i: int) -> bytes:
        try:
            return self.path(i).read_bytes()
        except OSError as error:
            raise UserError(f"{self.path(i)} can't be read as an image: {error.strerror or error}") from None

    def path(self, i: int) -> Path:
        i = range(len(self))[i]
        return self.root / os.fsdecode(self._block[self._ends[i] : self._ends[i + 1]])

    def where(self, i: int) -> str:
        return str(self.path(i))


class Folder(Files):
    """Class ids follow the sorted names of the folders in `root`; an image may lie deeper than they."""

    def __init__(self, root: Path) -> None:
        counts = dict.fromkeys(people_in(root), 0)

        def listed() -> Iterator[str]:
            for person in tqdm(counts, f"listing {root.name}", leave=False, disable=None):
                for path in sorted(images_in(root / person)):
                    counts[person] += 1
                    yield f"{person}/{path}"
                if not counts[person]:
                    raise UserError(f"{root / person}: no images there ({', '.join(SUFFIXES)})")

        super().__init__(root, listed())
        self.classes, self.labels = list(counts), np.repeat(np.arange(len(counts)), list(counts.values()))


def people_in(root: Path) -> list[str]:
    """The sorted names of the folders in a folder, one at least, without hidden ones."""
    try:
        people = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"{root} can't be read as a folder: {error.strerror or error}") from None
    if not people:
        raise UserError(f"{root}: expected a folder for each person, found none")
    return people


def images_in(folder: Path, prefix: str = "") -> Iterator[str]:
    """The paths of the images in a folder, in any depth and order. What is hidden, and what is no image by its suffix,
    is passed over."""
    for entry in os.scandir(folder):
        if entry.name[0] == ".":
            continue
        if entry.name.lower().endswith(SUFFIXES):
            yield prefix + entry.name
        elif entry.is_dir():
            yield from images_in(folder / entry.name, f"{prefix}{entry.name}/")


def write_folder(root: Path, source: Encoded) -> None:
    """root/PERSON/0000001.jpg; PERSON is the class's name or, where it has none, its number. Whole or not at all."""
    names = class_names(source)
    width = max(7, len(str(int(source.labels.max()))))
    with new_set(root) as aside:
        for i, label in enumerate(tqdm(source.labels.tolist(), f"writing {root.name}", leave=False, disable=None)):
            folder = aside / (names[label] if names else f"{label:0{width}d}")
            folder.mkdir(exist_ok=True)
            content = source.content(i)
            (folder / f"{i + 1:07d}{suffix(content)}").write_bytes(content)


def suffix(content: bytes) -> str:
    """By the first bytes; .jpg for what is not known."""
    starts = {b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp"}
    return next((name for start, name in starts.items() if content.startswith(start)), ".jpg")
