"""Files of sets: read by place, indexes that are kept, and new sets that are whole or not there."""

import contextlib
import hashlib
import io
import os
import shutil
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import LOCAL, TEMPORARY, atomic_file, display, lock, read_column
from mvrepro.images.source import Encoded

ELSEWHERE = "MVREPRO_CACHE can name another folder for what is kept between calls"
# Windows has no pread, but no fork either: only threads share the place that is read from.
SEEKING = threading.Lock()


@lru_cache(maxsize=128)  # a set may have more shards than a process may have open files
def _opened(path: Path, state: tuple[int, ...]) -> io.FileIO:
    """A file, opened once for all of its readers; state: what tells it from one that took its place."""
    return io.FileIO(path)


class Reader:
    """Bytes of a file by their place, from any number of processes at once."""

    def __init__(self, path: Path) -> None:
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror or error}") from None
        self.path, self.size = path, found.st_size
        self._state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, start: int, count: int) -> bytes:
        """As many of the bytes as the file has."""
        try:
            file = _opened(self.path, self._state)
            if hasattr(os, "pread"):
                return os.pread(file.fileno(), count, start)
            with SEEKING:
                os.lseek(file.fileno(), start, os.SEEK_SET)
                return os.read(file.fileno(), count)
        except OSError as error:
            raise UserError(f"{self.path} can't be read at byte {start}: {error.strerror or error}") from None


def kept_array(name: str, files: Sequence[Path], build: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """What `build` computes from these files, memory-mapped from the ignored folder .mvrepro: built once, by one
    process while others wait, and anew when a file's size or time changes or the kept array is damaged."""
    key = hashlib.sha256()
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise UserError(f"{file} can't be read: {error.strerror or error}") from None
        key.update(os.fsencode(file.absolute()) + f" {state.st_size} {state.st_mtime_ns}\n".encode())
    path = LOCAL / f"{name}-{key.hexdigest()[:16]}.npy"
    if (array := _load(path)) is None:
        with alone(path):
            if (array := _load(path)) is None:  # else another process has built it meanwhile
                buffer = io.BytesIO()
                np.save(buffer, build())
                try:
                    with atomic_file(path) as target:
                        target.write(buffer.getbuffer())
                        target.write(hashlib.sha256(buffer.getbuffer()).digest())
                except UserError as error:
                    raise UserError(f"{error}; {ELSEWHERE}") from None
                array = _load(path)
    assert array is not None
    return array


def _load(path: Path) -> NDArray[Any] | None:
    """What is kept there, an .npy and its SHA-256; None where that is missing or damaged."""
    try:
        with path.open("rb") as file:
            digest, rest = hashlib.sha256(), path.stat().st_size - 32
            while rest > 0 and (block := file.read(min(rest, 1 << 20))):
                digest.update(block)
                rest -= len(block)
            whole = file.read() == digest.digest()
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) if whole else None
    except (OSError, ValueError, EOFError):
        return None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time makes `path`; the others wait. A lock dies with its process."""
    try:
        place = LOCAL / "locks" / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a")
    except OSError as error:
        raise UserError(f"{explain_os_error(error, 'write to the cache')}; {ELSEWHERE}") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks: each makes it for itself
            lock(file)
        yield


@contextlib.contextmanager
def new_set(root: Path) -> Iterator[Path]:
    """A folder to write a set into, aside, that becomes `root` when all went well: a set is whole or not there.

    Raises UserError where something is there already. What a writer that was killed left is removed by the next.
    """
    root = root.absolute()
    aside = root.parent / f"{TEMPORARY}{root.name}"
    with alone(root):
        if root.exists() and not (root.is_dir() and not any(root.iterdir())):
            raise UserError(f"{root} is there already: choose another place, or remove it")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            if hasattr(os, "sync"):
                os.sync()
            if root.exists():
                root.rmdir()  # it is empty; Windows moves nothing onto it
            aside.replace(root)
        except BaseException as error:  # Ctrl-C, too, must leave nothing
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise explain_os_error(error, f"write {display(root)}", clean=True) from None
            raise


def read_classes(folder: Path) -> list[str] | None:
    """Names by class id out of classes.txt, one a line, each once; None where there is none."""
    path = folder / "classes.txt"
    return read_column(path, once=str) if path.is_file() else None


def write_classes(folder: Path, source: Encoded) -> None:
    if names := class_names(source)[: int(source.labels.max()) + 1]:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def class_names(source: Encoded) -> list[str]:
    """The names of the classes, none where they have no names. Raises UserError, before anything is written, for those
    that aren't both a line of text and a folder, and for two that would be the same: they come from others' files."""
    names = source.classes or []
    for number, name in enumerate(names):
        plain = name.strip()
        if not plain or plain[0] == "." or "/" in plain or not is_text(name):
            raise UserError(f"class {number} is called {name!r}, which can't be the name of a folder")
    if twice := alike(names):
        raise UserError("the classes {} and {} are both called {}: rename one".format(*twice))
    return names


def alike(names: Sequence[str]) -> tuple[int, int, str] | None:
    """The first two that a list can't tell from each other, and what both are in NFC and without blanks around."""
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        plain = unicodedata.normalize("NFC", name.strip())
        if first.setdefault(plain, number) != number:
            return first[plain], number, plain
    return None


def is_text(name: str) -> bool:
    """No control characters, and no bytes that aren't UTF-8, for which names of files have surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
