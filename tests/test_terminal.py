"""What a command says where the terminal knows few characters, the pipe closes or the disk is full, and Ctrl-C."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from mvrepro import terminal
from mvrepro.__main__ import COMMANDS, main
from mvrepro.errors import UserError
from mvrepro.files import ROOT

DOORS = {"mvrepro": ("mvrepro.commands", COMMANDS), "benchmarks": ("benchmarks", BENCHMARKS)}


def start(*arguments: str | Path, **how: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mvrepro", *map(str, arguments)], cwd=ROOT, text=True,
        **{"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize(("program", "name"), [(p, name) for p, (_, names) in DOORS.items() for name in ("", *names)])
def test_help_on_any_terminal(program: str, name: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown, encoding, write_through=True))
    package, commands = DOORS[program]
    with pytest.raises(SystemExit) as caught:
        main([*filter(None, [name]), "--help"], program=program, package=package, commands=commands)
    text = shown.getvalue().decode(encoding)
    assert caught.value.code == 0 and text.startswith(f"usage: python -m {program} {name}")
    assert ("…" in text) <= (encoding in ("utf-8", "cp1252"))


def test_characters_that_a_terminal_lacks_are_others_that_read_the_same() -> None:
    terminal.open_streams()
    said = "θ ≠ 112×112 … „Zoë“ \udcff █"
    assert said.encode("ascii", terminal.ERRORS) == b'theta != 112x112 ... \\u201eZo\\xeb" \\udcff #'
    assert said.encode("latin-1", terminal.ERRORS) == b'theta != 112\xd7112 ... \\u201eZo\xeb" \\udcff #'
    assert said.encode("utf-8", terminal.ERRORS).decode() == said.replace("\udcff", r"\udcff")


@pytest.mark.parametrize(("given", "below"), [("", ":backslashreplace"), ("ascii", "ascii:backslashreplace"),
                                              ("latin-1:replace", "latin-1:replace")])  # fmt: skip
def test_processes_below_can_say_everything_too(given: str, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", given)
    terminal.open_streams()
    assert os.environ["PYTHONIOENCODING"] == below


@pytest.fixture
def people(tmp_path: Path) -> Path:
    (tmp_path / "people.txt").write_text("".join(f"Zoë {number}…\n" for number in range(20_000)), encoding="utf-8")
    return tmp_path / "people.txt"


def test_head_takes_what_it_wants(people: Path) -> None:
    done = start("data", "overlap", people, people)
    assert done.stdout and "20,000 of the 20,000 names" in done.stdout.readline()
    done.stdout.close()
    assert done.stderr and (done.stderr.read(), done.wait(60)) == ("", 0)


def test_the_work_goes_on_where_nobody_listens(people: Path, tmp_path: Path) -> None:
    """Ascii, and a pipe without another end: the list is written all the same."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = start("data", "overlap", people, people, "--out", tmp_path / "shared", stdout=writing, env=environment)
    os.close(writing)
    assert (done.communicate(timeout=60)[1], done.returncode) == ("", 0)
    assert (tmp_path / "shared").read_bytes() == people.read_bytes()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_error(stream: str, people: Path) -> None:
    number = {"stdout": 1, "stderr": 2}[stream]
    done = start("data", "overlap", people, people, preexec_fn=lambda: os.close(number))
    printed, said = done.communicate(timeout=60)
    assert (done.returncode, said) == (0, "") and ("Zoë 9" in printed) == (stream == "stderr")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_below_what_is_printed_is_one_line(people: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = start("data", "overlap", people, people, stdout=full)
    said = "mvrepro data: what is printed: No space left on device\n"
    assert (done.communicate(timeout=60)[1], done.returncode) == (said, 1)


# What ends a command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("no such loss"), "no such loss"),
        (PermissionError(13, "Permission denied", "x.npy"), "x.npy: Permission denied"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a and b: Invalid cross-device link"),
        (MemoryError(), "the memory is full: close other programs, or ask for less at once"),
        (ModuleNotFoundError("no", name="cv2"), "this needs the package cv2, which is not installed"),
        (ModuleNotFoundError("no", name="fcntl"),
         "this needs Linux or macOS (or WSL on Windows): Python has no fcntl here"),
    ],
)  # fmt: skip
def test_an_error_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mvrepro.commands.code.run", lambda arguments: (_ for _ in ()).throw(error))
    assert main(["code"]) == 1
    assert capsys.readouterr().err == f"mvrepro code: {said}\n"


def test_a_fault_of_the_program_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(terminal, "LOCAL", tmp_path)
    monkeypatch.setattr("mvrepro.commands.code.run", lambda arguments: {}["nothing\nat all"])
    assert main(["code"]) == 1
    fault = r"mvrepro code: unexpected KeyError: 'nothing\nat all'"
    report = f". This is a fault of the program: please report it with {tmp_path / 'traceback.txt'}\n"
    assert capsys.readouterr().err == fault + report
    assert "Traceback (most recent call last)" in (tmp_path / "traceback.txt").read_text()
    monkeypatch.setattr(terminal, "LOCAL", tmp_path / "traceback.txt" / "below a file")
    assert main(["code"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith(f"{fault}\n")


CODE = """
import os, signal, sys
from mvrepro import __main__
from mvrepro.commands import code
def run(arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise ImportError("initialization failed")  # as numpy does, when it is stopped while it is loaded
code.run = run
sys.argv = ["mvrepro", "code"]
__main__.door()
"""


def test_ctrl_c_that_a_library_makes_another_error_of_is_still_ctrl_c() -> None:
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=False,
                          preexec_fn=default)  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "mvrepro code: stopped; nothing half-written was kept\n")


def _blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_never_hear_ctrl_c() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with terminal.deaf():
            found = pool.submit(_blocked)
            assert _blocked()
        assert found.result(60) and not _blocked()


# A process in a session of its own that starts another one; both tell their number
BELOW = """
import subprocess, sys, time
from mvrepro import terminal
own = "import os, subprocess, sys; print(os.getpid(), flush=True); "
last = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
with terminal.child([sys.executable, "-c", own + f"subprocess.run([sys.executable, '-c', {last!r}])"]) as child:
    child.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_was_started_ends_with_who_started_it(number: signal.Signals) -> None:
    def hears() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # with nohup it is ignored, and goes on being so

    process = subprocess.Popen(
        [sys.executable, "-c", BELOW], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=hears,
    )  # fmt: skip
    assert process.stdout
    pids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    assert process.wait(30) == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert process.stdout.read() == ""  # which ends when nobody can write there any more
    alive = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in alive.splitlines()]
    assert not {int(pid) for pid, state in rows if not state.startswith("Z")} & set(pids)
