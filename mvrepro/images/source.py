"""What all formats share: the interface, decoding, numbering of classes, and files that are whole or not there."""

import contextlib
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError
from mvrepro.files import LOCAL, atomic_file, write_atomic

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Source(ABC):
    """N encoded images (JPEG, PNG, …) with class ids. May be sent to other processes; holds no image."""

    classes: list[str] | None = None  # names by class id, where the format has them

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def __getitem__(self, i: int) -> tuple[bytes, int]:
        """Image i as it is stored, and its class id. Raises IndexError, and UserError for damaged files."""

    @abstractmethod
    def labels(self) -> NDArray[np.int64]:
        """(N,) class ids of all images; may take a pass over the files the first time."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Where image i lies, for messages."""


class Renumbered(Source):
    """A source whose ids become 0 … K−1 in their order; old (K,) int64 are the ids they had."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.old = np.unique(source.labels())
        if source.classes is not None:
            self.classes = [source.classes[i] for i in self.old.tolist()]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        content, label = self.source[i]
        return content, int(np.searchsorted(self.old, label))

    def labels(self) -> NDArray[np.int64]:
        return np.searchsorted(self.old, self.source.labels())

    def where(self, i: int) -> str:
        return self.source.where(i)


class Without(Source):
    """A source without some of its classes: "-R" done for real. The ids of the others stay as they are."""

    def __init__(self, source: Source, removed: NDArray[np.int64]) -> None:
        self.source, self.classes = source, source.classes
        self.rows = np.flatnonzero(~np.isin(source.labels(), removed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[bytes, int]:
        return self.source[int(self.rows[i])]

    def labels(self) -> NDArray[np.int64]:
        return np.asarray(self.source.labels()[self.rows])

    def where(self, i: int) -> str:
        return self.source.where(int(self.rows[i]))


class Decoded:
    """[i] -> ((3, size, size) uint8 RGB, class id). An image that does not decode is skipped: the next one
    that does stands in for it, and `bad` holds its number.

    limit: how many images (of each process that reads) may be bad before a UserError names the last of them.
    An image of another size than size × size is an error at once: the set was not aligned as expected.
    """

    def __init__(self, source: Source, *, size: int = 112, limit: int = 100) -> None:
        self.source, self.size, self.limit = source, size, limit
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        for step in range(len(self.source)):
            at = (i + step) % len(self.source)
            content, label = self.source[at]
            try:
                pixels = decode(content)
            except ValueError as error:
                self.bad.add(at)
                if len(self.bad) > self.limit:
                    raise UserError(
                        f"{len(self.bad)} images don't decode, more than the limit of {self.limit}; "
                        f"the last: {self.source.where(at)}: {error}"
                    ) from None
                continue
            if pixels.shape[1:] != (self.size, self.size):
                raise UserError(
                    f"{self.source.where(at)}: {pixels.shape[2]}×{pixels.shape[1]} pixels, "
                    f"expected {self.size}×{self.size}"
                )
            return pixels, label
        raise UserError(f"none of the {len(self.source)} images decodes; one of them: {self.source.where(0)}")


def decode(content: bytes) -> NDArray[np.uint8]:
    """(3, H, W) uint8 RGB of an encoded image. Raises ValueError with Pillow's reason where it is damaged."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{reason} ({len(content)} bytes)") from None


def check_ids(labels: NDArray[np.int64], what: str) -> None:
    """Raises UserError that names the holes unless the ids (N,) are 0 … K−1, each at least once."""
    if not len(labels):
        raise UserError(f"{what}: no images there")
    present = np.unique(labels)
    classes = int(present[-1]) + 1
    if len(present) == classes:
        return
    edges = np.concatenate([[-1], present])
    gaps = [(a + 1, b - 1) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True) if b - a > 1]
    names = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in gaps[:5])
    more = f" and {len(gaps) - 5} more gaps" if len(gaps) > 5 else ""
    raise UserError(
        f"{what}: {classes - len(present)} of the class ids 0 … {classes - 1} have no image: {names}{more}; "
        "ask for the ids to be renumbered (--renumber) or mend the set"
    )


def read_classes(folder: Path) -> list[str] | None:
    """Names by class id out of classes.txt, one a line; None where there is none."""
    path = folder / "classes.txt"
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.is_file() else None


def write_classes(folder: Path, source: Source) -> None:
    if source.classes:
        write_atomic(folder / "classes.txt", "".join(f"{name}\n" for name in source.classes))


class Reader:
    """Bytes of a file by their place; its handle is opened anew in each process that uses it."""

    _handle: tuple[int, int] | None = None  # process, descriptor

    def __init__(self, path: Path) -> None:
        try:
            self.path, self.size = path, path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from None

    def read(self, start: int, count: int) -> bytes:
        """As many of the bytes as the file has."""
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = os.getpid(), os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{self.path} can't be read: {error.strerror or error}") from None
        try:
            return os.pread(self._handle[1], count, start)
        except OSError as error:
            raise UserError(f"{self.path} can't be read at byte {start}: {error.strerror or error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "_handle": None}

    def __del__(self) -> None:
        if self._handle and self._handle[0] == os.getpid():
            with contextlib.suppress(OSError):
                os.close(self._handle[1])


def kept_array(kind: str, files: list[Path], build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """What `build` computes from these files, memory-mapped from .mvrepro: built once, and anew when a
    file's size or time changes or the kept array is damaged."""
    key = hashlib.sha256(kind.encode())
    for file in files:
        state = file.stat()
        key.update(f"{file.absolute()} {state.st_size} {state.st_mtime_ns}\n".encode())
    path = LOCAL / "formats" / f"{files[0].name}-{kind}-{key.hexdigest()[:16]}.npy"
    if (array := _load(path)) is None:
        buffer = io.BytesIO()
        np.save(buffer, build())
        write_atomic(path, buffer.getvalue())
        array = _load(path)
    assert array is not None
    return array


def _load(path: Path) -> NDArray[Any] | None:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """files.atomic_file where nothing is yet. Raises UserError where something is."""
    if path.exists():
        raise UserError(f"{path} is there already: remove it or choose another place")
    with atomic_file(path) as file:
        yield file
