"""Folders of images: ROOT/PERSON/….jpg, PERSON being whatever the folder is called."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.images.source import SUFFIXES, Encoded
from mvrepro.images.storage import alike, class_names, new_set

UNREAD = (".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jfif")  # photographs of other formats
HIDDEN = (".", "__MACOSX", "lost+found")  # how names of files and folders begin that systems make for themselves


OTHER = f"not one of {', '.join(SUFFIXES)}"


class Unreadable(UserError, ValueError):
    """An image that can't be read: among many as good as one that doesn't decode."""


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
            raise Unreadable(f"{self.path(i)} can't be read as an image: {error.strerror or error}") from None

    def path(self, i: int) -> Path:
        i = range(len(self))[i]
        return self.root / os.fsdecode(self._block[self._ends[i] : self._ends[i + 1]])

    def where(self, i: int) -> str:
        return str(self.path(i))


class Folder(Files):
    """Class ids follow the sorted names of the folders in `root`; an image may lie deeper than they. Folders that can't
    be read, or lead back, are passed over, up to a limit; and so are photographs of formats that aren't read."""

    def __init__(self, root: Path, limit: int = 100) -> None:
        counts, passed_over, unread = dict.fromkeys(people_in(root), 0), list[str](), list[str]()

        def listed() -> Iterator[str]:
            for person in tqdm(list(counts), f"listing {root.name}", leave=False, disable=None):
                before = len(passed_over)
                for path in sorted(images_in(root / person, passed_over, (root.resolve(),), unread)):
                    counts[person] += 1
                    yield f"{person}/{path}"
                if len(passed_over) > limit:
                    raise UserError(f"{root}: more than {limit} folders can't be listed, such as {passed_over[-1]}")
                if not counts[person] and len(passed_over) == before:
                    raise UserError(f"{root / person}: no images there ({', '.join(SUFFIXES)})")
                if not counts[person]:
                    del counts[person]

        super().__init__(root, listed())
        if not counts:
            raise UserError(f"{root}: none of its folders can be read, such as {passed_over[0]}")
        passed_over += [f"{path}: {OTHER}" for path in unread]
        self.classes, self.passed_over = list(counts), passed_over
        if twice := alike(self.classes):
            one, other, plain = self.classes[twice[0]], self.classes[twice[1]], twice[2]
            raise UserError(f"{root}: the folders {one!a} and {other!a} are both called {plain}: rename one")
        self.labels = np.repeat(np.arange(len(counts)), list(counts.values()))


def people_in(root: Path) -> list[str]:
    """The sorted names of the folders in a folder, one at least, without HIDDEN ones."""
    try:
        people = sorted(
            entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(HIDDEN)
        )
    except OSError as error:
        raise UserError(f"{root} can't be read as a folder: {error.strerror or error}") from None
    if not people:
        raise UserError(f"{root}: expected a folder for each person, found none")
    return people


def images_in(
    folder: Path, passed_over: list[str], above: tuple[Path, ...] = (), unread: list[str] | None = None
) -> Iterator[str]:
    """The paths of the images in a folder, in any depth and order. What is HIDDEN, and what is no image by its suffix,
    doesn't count; folders that can't be read, or contain one of those above them, are added to passed_over, and the
    paths of photographs that are UNREAD to unread."""
    here = Path(os.path.realpath(folder))
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        passed_over.append(f"{folder}: {error.strerror or error}")
        return
    if any(one.is_relative_to(here) for one in above):
        passed_over.append(f"{folder}: leads back to {here}")
        return
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        if Path(entry).is_dir() if entry.is_symlink() else entry.is_dir():  # a link may lead to itself
            inside = images_in(folder / entry.name, passed_over, (*above, here), unread)
            yield from (f"{entry.name}/{path}" for path in inside)
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.name
        elif unread is not None and entry.name.lower().endswith(UNREAD):
            unread.append(str(folder / entry.name))


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
