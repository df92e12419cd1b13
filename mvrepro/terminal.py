"""What a command says reaches whoever listens, whatever that is: a terminal that knows few characters, a pipe that
closes, a stream that is not there; and Ctrl-C reaches one process, the one that was called."""

import codecs
import contextlib
import io
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvrepro.errors import UserError
from mvrepro.files import LOCAL, display, write_atomic

ERRORS = "mvrepro.plain"  # the name of `plain` as a codec's way with what it can't encode
PLAIN = str.maketrans({
    "…": "...", "−": "-", "–": "-", "×": "x", "·": "*", "≠": "!=", "→": "->", "√": "sqrt", "°": " degrees",
    "“": '"', "”": '"', "²": "^2", "¹": "^1", "⁻": "^-", "ᵀ": "^T", "θ": "theta", "λ": "lambda", "γ": "gamma",
    "π": "pi", "φ": "phi", "Φ": "Phi", "σ": "sigma", "Σ": "sum", "τ": "tau", "█": "#", "▏": "|",
})  # fmt: skip

LONGEST = 800  # characters of a line that people read; libraries have longer ones to say
UNIX = ("fcntl", "resource", "pty", "termios")  # modules that Windows lacks


def plain(error: UnicodeError) -> tuple[str, int]:
    """For codecs.register_error: ASCII that reads nearly the same, or the escapes of Python where there is none."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


class Output(io.FileIO):
    """A stream that takes what nobody reads any more: with `| head` the work goes on, and what it writes to files is
    not lost. Any other error is raised once, and the end of Python, which flushes again, stays silent."""

    def write(self, data: Any) -> int:
        try:
            return int(super().write(data) or 0)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for those that are started from here, too
            os.close(nowhere)
            if isinstance(error, BrokenPipeError):
                return len(data)
            raise OSError(error.errno, error.strerror, "what is printed") from None


def open_streams() -> None:
    """Let stdout and stderr of this process take whatever is printed, and those of the Python processes below it."""
    codecs.register_error(ERRORS, plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        elif stream is getattr(sys, f"__{name}__") and not stream.isatty():
            raw = Output(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(raw), stream.encoding, ERRORS,
                line_buffering=stream.line_buffering or stream.write_through,
            ))  # fmt: skip
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    os.environ["PYTHONIOENCODING"] = f"{encoding}:{errors or 'backslashreplace'}"


def explain(error: Exception) -> str:
    """What to say of an error that ends a command. A fault of the program is one line, too, and its traceback a file
    to send to who can mend it."""
    if isinstance(error, UserError):
        return "\n".join(line if len(line) <= LONGEST else f"{line[:LONGEST]} …" for line in str(error).split("\n"))
    if isinstance(error, OSError):
        named = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{named or 'the system'}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "the memory is full: close other programs, or ask for less at once"
    if isinstance(error, ModuleNotFoundError) and not (error.name or "mvrepro").startswith("mvrepro"):
        if error.name in UNIX:
            return f"this needs Linux or macOS (or WSL on Windows): Python has no {error.name} here"
        return f"this needs the package {error.name}, which is not installed"
    said = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
    try:
        write_atomic(LOCAL / "traceback.txt", "".join(traceback.format_exception(error)))
    except UserError:
        traceback.print_exception(error)
        return said
    return f"{said}. This is a fault of the program: please report it with {display(LOCAL / 'traceback.txt')}"


_interrupts: list[int] = []


def watch() -> None:
    """Note each Ctrl-C, beside the KeyboardInterrupt that it is, unless it is ignored here (as with nohup)."""

    def note(number: int, frame: Any) -> None:
        _interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)


def interrupted() -> bool:
    """Whether Ctrl-C was pressed: by the time that it reaches the door, it may be another error."""
    return bool(_interrupts)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """What is started in here never hears Ctrl-C, which a terminal sends to all processes of a command. Pressed
    meanwhile, it reaches this process at the end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it comes with the first process, and would let this one hear again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(child: subprocess.Popen[Any]) -> None:
    """Kill what was started with start_new_session, and with it all that it has started (on Windows itself alone)."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


@contextlib.contextmanager
def child(command: Sequence[str | Path], **how: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process in a session of its own, which Ctrl-C does not reach. Nothing that it has started outlives this block,
    however that ends: SIGTERM, and a terminal that closes, end the block here as Ctrl-C does."""
    started: subprocess.Popen[Any] | None = None
    asked: list[int] = []

    def leave(number: int, frame: Any) -> None:
        asked.append(number)
        if started:  # else it is about to
            raise SystemExit(128 + number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    heard = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in heard:
            signal.signal(number, leave)
        with deaf():
            started = subprocess.Popen(command, start_new_session=True, **how)
        if asked:
            raise SystemExit(128 + asked[0])
        yield started
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_IGN)
        if started:
            end(started)
        for number in heard:
            signal.signal(number, signal.SIG_DFL)
