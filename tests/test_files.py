"""Writing is whole or not at all: whatever fails, and whenever the process is killed."""

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrepro import files
from mvrepro.errors import LONGEST, UserError, explain_os_error, first_words
from mvrepro.files import (
    ROOT,
    TEMPORARY,
    check_file,
    display,
    lock,
    read_json,
    read_toml,
    sweep,
    sync,
    write_atomic,
    write_json,
)
from mvrepro.images import storage

OLD, NEW = b"the old content", b"something new " * 1000
STEPS = {
    "mkdir": (Path, "mkdir"),
    "mkstemp": (tempfile, "mkstemp"),
    "fsync": (os, "fsync"),
    "chmod": (Path, "chmod"),
    "replace": (Path, "replace"),
}
CURES = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk is full: free some space and run the same command again",
    errno.EACCES: "no permission to write there: make the folder writable and run the same command again",
    errno.EPERM: "no permission to write there: make the folder writable and run the same command again",
    errno.EROFS: "no permission to write there: make the folder writable and run the same command again",
    errno.EIO: os.strerror(errno.EIO),
}


def held(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden and temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> list[str]:
    """Let a step of writing raise; returns the list that gets an entry each time it does."""
    calls = []

    def fail(*arguments: object, **keywords: object) -> None:
        calls.append(step)
        raise error

    monkeypatch.setattr(*STEPS[step], fail)
    return calls


# What is written


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", b""), (b"\x00\xff\r\n", b"\x00\xff\r\n"), ("θ → 1\n", "θ → 1\n".encode())]
)
@pytest.mark.parametrize("old", [None, OLD])
def test_content_is_written_as_it_is(tmp_path: Path, content: bytes | str, expected: bytes, old: bytes | None) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    if old is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(old)
    write_atomic(path, content)
    assert held(tmp_path) == {"a/b/file.txt": expected}
    assert path.stat().st_mode & 0o777 == 0o644  # mkstemp alone would keep it from everybody else


def test_a_reader_keeps_the_file_that_it_opened(tmp_path: Path) -> None:
    """The old file is replaced, never written into."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    with path.open("rb") as reader:
        write_atomic(path, NEW)
        assert reader.read() == OLD
    assert path.read_bytes() == NEW


def test_writers_side_by_side_leave_one_whole_file(tmp_path: Path) -> None:
    contents = [bytes([65 + n]) * 100_000 for n in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: write_atomic(tmp_path / "file", content), contents))
    assert list(held(tmp_path)) == ["file"]
    assert held(tmp_path)["file"] in contents


# What fails


@pytest.mark.parametrize("code", CURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "over"])
def test_a_failure_at_any_step_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, code: int, old: bytes | None
) -> None:
    path = tmp_path / "file.json"
    if old is not None:
        path.write_bytes(old)
    before = held(tmp_path)
    with monkeypatch.context() as patch:
        calls = failing(patch, step, OSError(code, os.strerror(code), "/where/it/was"))
        with pytest.raises(UserError) as caught:
            write_atomic(path, NEW)
    assert calls == [step]
    assert str(caught.value) == (
        f"could not write {path} (/where/it/was): {CURES[code]}; nothing half-written was kept"
    )
    assert caught.value.__suppress_context__  # no second traceback behind the message
    assert held(tmp_path) == before
    write_atomic(path, NEW)  # "run the same command again"
    assert held(tmp_path) == {"file.json": NEW}


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_an_interruption_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str) -> None:
    """The command line says of Ctrl-C that nothing half-written was kept."""
    (tmp_path / "file").write_bytes(OLD)
    failing(monkeypatch, step, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", NEW)
    assert held(tmp_path) == {"file": OLD}


def in_a_process(code: str, *arguments: object) -> list[str]:
    header = (
        "import os, resource, signal, sys, time\nfrom pathlib import Path\nfrom mvrepro.files import write_atomic\n"
    )
    return [sys.executable, "-c", header + code, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_write_that_the_system_stops_halfway(tmp_path: Path) -> None:
    """No simulation: the system lets this process write 1,000 bytes into a file and not one more."""
    path = tmp_path / "file"
    path.write_bytes(OLD)
    code = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 1001)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        in_a_process(code, path), env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(f"UserError could not write {path}: File too large"), done.stdout + done.stderr
    assert held(tmp_path) == {"file": OLD}


@pytest.mark.parametrize("target", ["file/below/it.json", "folder"])
def test_a_place_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    """Below a regular file, or where a folder stands; both hold for root too."""
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"^could not write {tmp_path / target} .*; nothing half-written was kept$"):
        write_atomic(tmp_path / target, NEW)
    assert held(tmp_path) == {"file": OLD}
    assert (tmp_path / "folder").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="no permission to write there: make the folder writable"):
            write_atomic(tmp_path / "file", NEW)
        assert held(tmp_path) == {}
    finally:
        tmp_path.chmod(0o755)


SLOW = {
    # Everything is written, nothing is in place.
    "before the move": """
def slow(handle):
    print("ready", flush=True)
    time.sleep(60)
os.fsync = slow
""",
    # Half of it is written.
    "in the middle": """
real = os.fdopen
class Slow:
    def __init__(self, *arguments): self.file = real(*arguments)
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        print("ready", flush=True)
        time.sleep(60)
os.fdopen = Slow
""",
}


@pytest.mark.parametrize(("when", "part"), [("before the move", NEW), ("in the middle", NEW[: len(NEW) // 2])])
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "over"])
def test_a_killed_writer_leaves_the_old_file_and_what_sweep_removes(
    tmp_path: Path, when: str, part: bytes, old: bytes | None
) -> None:
    path, source = tmp_path / "results" / "runs" / "file.json", tmp_path / "new"
    path.parent.mkdir(parents=True)
    (path.parent / "other.json").write_bytes(b"not mine")
    source.write_bytes(NEW)
    if old is not None:
        path.write_bytes(old)
    before = held(tmp_path / "results")
    code = SLOW[when] + "write_atomic(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes())"
    with subprocess.Popen(in_a_process(code, path, source), env=environment(), stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            aside = [name for name in held(tmp_path / "results") if Path(name).name.startswith(TEMPORARY)]
            assert len(aside) == 1  # it stands beside the target, so that moving it is one step
            assert held(tmp_path / "results") == before | {aside[0]: part}
        finally:
            writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert held(tmp_path / "results") == before | {aside[0]: part}
    sweep(tmp_path / "results")  # for all that it knows, somebody is still at it
    assert held(tmp_path / "results") == before | {aside[0]: part}
    an_hour_ago(tmp_path / "results" / aside[0])
    sweep(tmp_path / "results")
    assert held(tmp_path / "results") == before


def an_hour_ago(path: Path) -> None:
    os.utime(path, (time.time() - 3601,) * 2)


def test_sweep_removes_temporaries_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hidden", "writing-x", "a/run.json", "a/b/.writing"]
    for name in [*kept, f"{TEMPORARY}1", f"a/{TEMPORARY}2.json", f"a/b/{TEMPORARY}3"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        an_hour_ago(tmp_path / name)
    sweep(tmp_path)
    assert sorted(held(tmp_path)) == sorted(kept)
    sweep(tmp_path / "nowhere")


def test_git_ignores_temporaries() -> None:
    """One that is left behind must not end in a commit."""
    name = f"results/runs/quick/{TEMPORARY}abc"
    done = subprocess.run(["git", "check-ignore", name], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 128:
        pytest.skip("not a git repository")
    assert done.stdout.strip() == name


# JSON

# −0.0 and whole floats are told from integers by the bytes; what is read back is the same value and type.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(json_values)
def test_json_comes_back_and_the_same_value_is_the_same_bytes(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "1.json", Path(folder) / "2.json"
        write_json(first, value)
        found = read_json(first)
        assert (found, repr(found)) == (value, repr(value))
        write_json(second, found)
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes().endswith(b"\n")


def test_json_is_laid_out_for_a_diff(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"θ": [1, 0.1], "a": None})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "θ": [\n  1,\n  0.1\n ],\n "a": null\n}\n'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [1, {"loss": [0.5, x]}]], ids=["bare", "inside"])
def test_json_refuses_what_is_no_number(tmp_path: Path, value: float, wrap) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(OLD)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, wrap(value))
    with pytest.raises(TypeError):
        write_json(path, {"path": path})
    assert held(tmp_path) == {"a.json": OLD}


def test_numbers_keep_every_digit(tmp_path: Path) -> None:
    numbers = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    write_json(tmp_path / "a.json", numbers)
    assert json.loads((tmp_path / "a.json").read_bytes()) == numbers


# Messages


def test_messages_without_a_file_name_have_no_empty_brackets() -> None:
    message = str(explain_os_error(OSError(errno.ENOSPC, "No space left on device"), "write here", clean=True))
    assert message == f"could not write here: {CURES[errno.ENOSPC]}; nothing half-written was kept"
    assert str(explain_os_error(OSError("odd"), "write")) == "could not write: odd"
    assert str(explain_os_error(OSError("odd"), "remove a")) == "could not remove a: odd"


def test_paths_are_shown_as_the_user_knows_them(tmp_path: Path) -> None:
    assert display(ROOT / "results" / "claims.json") == "results/claims.json"
    assert display(tmp_path / "x") == str(tmp_path / "x")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("No such device. Try another one.\nframe #0: …"), "No such device"),
        (RuntimeError("\n  out of luck \nmore"), "out of luck"),
        (RuntimeError(""), "RuntimeError"),
        (RuntimeError("x" * 1000), "x" * LONGEST + " …"),
    ],
)
def test_what_a_library_says_is_cut_to_its_first_sentence(error: RuntimeError, said: str) -> None:
    assert first_words(error) == said


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(OLD)
    (tmp_path / "link").symlink_to(tmp_path / "list.txt")
    inputs = [tmp_path / "missing", tmp_path / "list.txt"]
    for out in ("list.txt", "link", "../" + tmp_path.name + "/list.txt"):
        with pytest.raises(UserError, match="is read, and would be written over: name another file"):
            check_file(tmp_path / out, inputs)
    check_file(tmp_path / "other.txt", inputs)
    check_file(tmp_path / "list.txt", [tmp_path / "missing"])


# Locks, with what Unix has and with what Windows has


def windows(monkeypatch: pytest.MonkeyPatch, busy: int = 0) -> list[tuple[int, int]]:
    """Let files.py find what Windows has, where a lock is another's so many times; (place, bytes) of each try."""
    tries: list[tuple[int, int]] = []

    def locking(handle: int, mode: int, count: int) -> None:
        tries.append((os.lseek(handle, 0, os.SEEK_CUR), count))
        if mode != 2 or len(tries) <= busy:
            raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    return tries


def test_a_lock_is_one_processs_until_its_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("a") as second:
        with (tmp_path / "lock").open("a") as first:
            assert lock(first) and not lock(second, wait=False)
        assert lock(second, wait=False)


def test_a_lock_on_windows_waits_and_holds_one_byte_at_the_beginning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lock").write_text("of before")
    tries = windows(monkeypatch, busy=3)
    with (tmp_path / "lock").open("a") as file:
        assert not lock(file, wait=False) and lock(file)
    assert tries == [(0, 1)] * 4
    assert (tmp_path / "lock").read_text() == "of before"


def test_windows_opens_no_folder_to_force_it_to_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    opened: list[Path] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    sync(tmp_path), sync(tmp_path / "file")
    windows(monkeypatch)
    sync(tmp_path), sync(tmp_path / "file")
    assert opened == [tmp_path, *[tmp_path / "file"] * 2]


@pytest.mark.parametrize("with_pread", [True, False])
def test_a_reader_reads_by_place_from_many_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_pread: bool
) -> None:
    if not with_pread:
        monkeypatch.delattr(os, "pread", raising=False)
    content = bytes(range(256)) * 40
    (tmp_path / "set").write_bytes(content)
    reader = storage.Reader(tmp_path / "set")
    places = [(start, 16) for start in range(0, len(content), 16)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: reader.read(*place), places))
    assert found == [content[start : start + count] for start, count in places]
    assert reader.read(len(content) - 2, 9) == content[-2:] and reader.read(len(content), 1) == b""


@pytest.mark.parametrize("doing", ["lock", "index"])
def test_a_cache_that_cannot_be_written_says_how_to_have_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, doing: str
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "file" / "below")
    if doing == "index":
        monkeypatch.setattr(storage, "alone", lambda path: contextlib.nullcontext())
        use = lambda: storage.kept_array("index", [tmp_path / "file"], lambda: np.zeros(1))
    else:
        use = storage.alone(tmp_path / "set").__enter__
    with pytest.raises(UserError, match=r"; MVREPRO_CACHE can name another folder for what is kept between calls$"):
        use()


# Lists


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "Ann\nBo\n".encode("utf-16-le"),
            "line 1: a zero byte, so it is UTF-16 or no text: a list ",
        ),
        (b"Ann\nBo\0", "line 2: a zero byte, "),
        (b"\x0a\x23\xd7\xce" + bytes(8), "line 2: a zero byte, "),  # a .rec
        (b"Ann\nBo\n\x1a", "line 3: holds U+001A, which can't be seen: take it out"),
        ("Ann\n\u200bBo\n".encode(), "line 2: holds U+200B, "),
        ("\u00adAnn".encode(), "line 1: holds U+00AD, "),
        ("Ann\u200e".encode(), "line 1: holds U+200E, "),
        ("Bo \u200c".encode(), "line 1: holds U+200C, "),
        (b"Ann\xff", "line 1: not UTF-8, "),
        (b"A" * 1001, "can't be read as a list: it has more than 1,000 bytes"),
    ],
)
def test_what_cannot_be_seen_in_a_list_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, said: str
) -> None:
    monkeypatch.setattr(files, "LONGEST_LIST", 1000)
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_lines(tmp_path / "l.txt")
    assert str(caught.value).startswith(str(tmp_path / "l.txt")) and said in str(caught.value)


def test_letters_that_are_joined_by_what_is_not_seen_are_names(tmp_path: Path) -> None:
    persian, hindi, malayalam = "\u0639\u0644\u06cc\u200c\u0627", "\u0915\u094d\u200d\u0937", "\u0d28\u0d4d\u200d"
    (tmp_path / "l.txt").write_text(f"\ufeff{persian}\t3\r\n{hindi}\n{malayalam}\n", encoding="utf-8")
    assert [line for _, line in files.read_lines(tmp_path / "l.txt")] == [f"{persian}\t3", hindi, malayalam]


def test_nothing_is_written_into_a_folder_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "set" / "Ann").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    for out in (tmp_path / "set" / "new.txt", tmp_path / "set" / "Ann" / "0.png", tmp_path / "link" / "0.png"):
        with pytest.raises(UserError, match=f"lies in {tmp_path / 'set'}, which is read: name a file elsewhere"):
            check_file(out, [tmp_path / "set"])
    check_file(tmp_path / "set.txt", [tmp_path / "set"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_folder_that_only_seems_to_be_writable_is_found_out() -> None:
    with pytest.raises(UserError, match="could not write /proc/mvrepro"):
        check_file(Path("/proc/mvrepro.json"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "<<<<<<< HEAD\n{}"), ("a.toml", "[claim\n"), ("b.json", "\xff")]
)
def test_a_file_of_settings_that_is_damaged_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        (read_json if name.endswith("json") else read_toml)(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name} can't be read: ")
