"""Where things lie, in a clone of the project or where it is installed, and writing that is whole or not at all."""

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from mvrepro.errors import UserError, explain_os_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parent
CLONE = (PACKAGE.parent / "dvc.yaml").is_file()  # else it was installed, as by pip


def _here() -> Path:
    with contextlib.suppress(OSError):  # a folder that was removed meanwhile
        return Path.cwd()
    return Path()


def _local() -> Path:
    if chosen := os.environ.get("MVREPRO_CACHE"):
        return Path(chosen).absolute()
    if CLONE:
        return ROOT / ".mvrepro"  # which git ignores
    import platformdirs

    return platformdirs.user_cache_path("mvrepro", appauthor=False)


ROOT = PACKAGE.parent if CLONE else _here()
PARAMS = (ROOT if CLONE else PACKAGE) / "params.yaml"
RESULTS = ROOT / "results"
LOCAL = _local()  # what only this machine knows
TEMPORARY = ".writing-"  # the prefix of files that are not whole yet; git ignores it


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, aside, that moves into place when all went well: a reader, or a run after a
    crash, never sees half a file.

    Raises UserError where the disk is full or the folder can't be written, and leaves nothing there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:  # Ctrl-C, too, must leave nothing
        if temporary:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        if isinstance(error, OSError):
            raise explain_os_error(error, f"write {display(path)}") from None
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """The whole content of a file, by atomic_file."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_writable(path: Path) -> None:
    """Say at once, not after hours, that a file or folder can't be made there. Raises UserError."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if there == path.absolute() and there.is_file():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise explain_os_error(OSError(code, os.strerror(code)), f"write {display(path)}")


def check_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """check_writable, for a place where a file goes: a folder of that name would be in its way. It must be none of
    the inputs either."""
    if path.is_dir():
        raise UserError(f"could not write {display(path)}: it is a folder; name a file")
    check_writable(path)
    if any(path.exists() and one.exists() and path.samefile(one) for one in inputs):
        raise UserError(f"{display(path)} is read, and would be written over: name another file")


def write_json(path: Path, value: Any) -> None:
    """JSON with a stable layout, so that equal values are equal bytes; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_yaml(path: Path) -> Any:
    """Raises UserError with the place where it is no YAML."""
    import yaml

    try:
        return yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise UserError(f"{display(path)} can't be read: {error}") from None


def read_lines(path: Path, *, empty: bool = False) -> list[tuple[int, str]]:
    """The lines of a text list that hold something, one at least unless `empty`, with their numbers from 1.

    Byte-order marks, any line ends and blanks around a line don't count, and names are in NFC, so that what looks the
    same is the same. Raises UserError for what can't be read or isn't UTF-8.
    """
    try:
        content = path.read_bytes()
        text = unicodedata.normalize("NFC", content.decode().replace("\ufeff", ""))
    except OSError as error:
        raise UserError(f"{path} can't be read as a list: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8, {error.reason}") from None
    ends = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = [(number, line.strip()) for number, line in enumerate(ends, 1) if line.strip()]
    if not lines and not empty:
        raise UserError(f"{path}: the list is empty")
    return lines


def read_column(path: Path, once: Callable[[str], str] | None = None, *, empty: bool = False) -> list[str]:
    """The lines of a list of which each stands for something: an empty one between others is an error, and so are
    two that are the same by `once`, where it is given."""
    lines = read_lines(path, empty=empty)
    for expected, (number, _) in enumerate(lines, 1):
        if number != expected:
            raise UserError(f"{path}, line {expected}: empty; each line of this list stands for something")
    if once:
        check_once(path, ((number, once(line)) for number, line in lines))
    return [line for _, line in lines]


def check_once(path: Path, numbered: Iterable[tuple[int, str]]) -> None:
    """Raises UserError that names both lines of a list (number, text) in which a text stands twice."""
    first: dict[str, int] = {}
    for number, text in numbered:
        if first.setdefault(text, number) != number:
            raise UserError(f"{path}, lines {first[text]} and {number}: {text} stands there twice")


def lock(file: IO[Any], *, wait: bool = True) -> bool:
    """Hold an open file for this process, until it is closed or the process ends, however that comes about. Returns
    whether it is held: without `wait`, not where another process has it. Raises OSError on a file system without locks.
    """
    if sys.platform == "win32":
        import msvcrt

        file.seek(0)  # what is held is one byte from here on
        while True:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EDEADLK):
                    raise
            if not wait:
                return False
            time.sleep(0.1)
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk. Windows, which opens no folder, keeps names without it."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left behind an hour ago or more: what is younger may be another's work."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):  # its writer has moved it into place
            if path.stat().st_mtime < time.time() - 3600:
                path.unlink()


def display(path: Path) -> str:
    """The path as the user knows it: relative to the project where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
