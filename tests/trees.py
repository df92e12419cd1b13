"""Copies of the project in a temporary folder, to break them on purpose."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def copy_tree(target: Path) -> Path:
    """The files that git tracks or would track, as they are now, in a git repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    run_git(target, "init", "-q")
    commit(target)
    return target


def run_git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "gc.auto=0"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True
    ).stdout  # fmt: skip


def commit(tree: Path) -> None:
    run_git(tree, "add", "-A")
    run_git(tree, "commit", "-q", "-m", "state")


def start(tree: Path, *command: str) -> subprocess.Popen[str]:
    """A command in the tree, with the tree's own mvrepro, in a process group of its own."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MVREPRO_")}
    settings |= {"PYTHONPATH": str(tree), "BIN": str(Path(sys.executable).parent)}
    return subprocess.Popen(
        command, cwd=tree, env=settings, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(tree: Path, *command: str) -> tuple[int, str]:
    """Exit code and output (stdout and stderr together)."""
    process = start(tree, *command)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def make(tree: Path, *arguments: str) -> tuple[int, str]:
    """`make …` with the environment that runs the tests."""
    return run(tree, "make", f"BIN={Path(sys.executable).parent}", *arguments)
