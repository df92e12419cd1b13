"""Where things lie, in a clone of the project or where it is installed, and writing that is whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
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
LONGEST_LIST = 2**30  # bytes
JOINERS = "\u200c\u200d"  # within and behind letters of Persian, Hindi, Malayalam and others
BARE_JOINER = re.compile(rf"(?<![\w\u0900-\u0dff])[{JOINERS}]|(?<![\u0900-\u0dff])[{JOINERS}](?!\w)")
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
            raise explain_os_error(error, f"write {display(path)}", clean=True) from None
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
        raise explain_os_error(OSError(code, os.strerror(code)), f"write {display(path)}", clean=True)
    try:
        tempfile.TemporaryFile(prefix=TEMPORARY, dir=there).close()  # /proc says that it can be written to
    except OSError as error:
        raise explain_os_error(OSError(error.errno, error.strerror), f"write {display(path)}", clean=True) from None


def check_file(path: Path, inputs: Iterable[Path] = ()) -> None:
    """check_writable, for a place where a file goes: a folder of that name would be in its way. It must be none of
    the inputs either, nor lie in one that is a folder."""
    if path.is_dir():
        raise UserError(f"could not write {display(path)}: it is a folder; name a file")
    for one in inputs:
        if path.exists() and one.exists() and path.samefile(one):
            raise UserError(f"{display(path)} is read, and would be written over: name another file")
        if one.is_dir() and path.resolve().is_relative_to(one.resolve()):
            raise UserError(f"{display(path)} lies in {display(one)}, which is read: name a file elsewhere")
    check_writable(path)


def check_apart(out: Path, source: Path) -> None:
    """Raises UserError where what is written to `out` would be among what is read."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out} lies in {source}, which is read: choose another place")


def sha256(*paths: Path) -> str:
    """Of the content of files, one after the other, as hex digits; of any size."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """JSON with a stable layout, so that equal values are equal bytes; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError where it is no JSON."""
    return _parsed(path, json.loads)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises UserError with the place where it is no TOML."""
    found: dict[str, Any] = _parsed(path, tomllib.loads)
    return found


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{display(path)} can't be read: {error}") from None


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
    same is the same. Raises UserError for what can't be read, isn't UTF-8, is of more than LONGEST_LIST bytes, or holds
    what can't be seen.
    """
    content = _text(path)
    try:
        text = unicodedata.normalize("NFC", content.decode().replace("\ufeff", ""))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8, {error.reason}") from None
    ends = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if unseen(text):
        number, what = next((number, what) for number, line in enumerate(ends, 1) if (what := unseen(line)))
        raise UserError(f"{path}, line {number}: holds {what}, which can't be seen: take it out")
    lines = [(number, line.strip()) for number, line in enumerate(ends, 1) if line.strip()]
    if not lines and not empty:
        raise UserError(f"{path}: the list is empty")
    return lines


def _text(path: Path) -> bytes:
    """The bytes of a list. Raises UserError, without having read all of it, where they are too many or no text."""
    try:
        with path.open("rb") as file:
            content = file.read(1 << 20)
            if b"\0" not in content:
                content += file.read(LONGEST_LIST + 1 - len(content))
    except OSError as error:
        raise UserError(f"{path} can't be read as a list: {error.strerror or error}") from None
    if (zero := content.find(b"\0")) >= 0:
        line = content.count(b"\n", 0, zero) + 1
        raise UserError(f"{path}, line {line}: a zero byte, so it is UTF-16 or no text: a list in UTF-8 is expected")
    if len(content) > LONGEST_LIST:
        raise UserError(f"{path} can't be read as a list: it has more than {LONGEST_LIST:,} bytes")
    return content


def unseen(text: str) -> str:
    """The first character of a text that can't be seen but makes names different, as "U+200B": of those that control,
    but tabs and line ends, and of those that format, but JOINERS among letters. "" where there is none."""
    for character in sorted(set(text) - set("\t\r\n")):
        kind = unicodedata.category(character)
        if kind == "Cc" or (kind == "Cf" and (character not in JOINERS or BARE_JOINER.search(text))):
            return f"U+{ord(character):04X}"
    return ""


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


def is_number(text: str) -> bool:
    """Digits that int() reads: no sign, no "²", no thousands of them."""
    return text.isdecimal() and len(text) < 10


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
