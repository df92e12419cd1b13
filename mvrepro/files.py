"""Where things lie in the project, and writing that is whole or not at all."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mvrepro.errors import UserError, explain_os_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
LOCAL = ROOT / ".mvrepro"  # what only this machine knows; git ignores it
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


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left behind."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def display(path: Path) -> str:
    """The path as the user knows it: relative to the project where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
