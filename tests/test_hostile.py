"""Hostile command lines (tests/hostile.txt): one readable line and a non-zero exit code, nothing left, no wait.

HOSTILE says to run every so manieth; `make test-hard` runs all of them, otherwise it is a sample.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import lines, wrong

ROOT = Path(__file__).resolve().parent.parent
EVERY = os.environ.get("HOSTILE", "25")


def test_they_end_as_they_should() -> None:
    command = [sys.executable, str(ROOT / "tests" / "hostile.py"), EVERY]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_many_and_each_stands_once() -> None:
    assert len(lines()) >= 300 and len(set(lines())) == len(lines())


@pytest.mark.parametrize(
    ("code", "said", "problem"),
    [
        (1, "mvrepro train: no\n", ""),
        (2, "usage: python -m mvrepro\n  [-h]\npython -m mvrepro: error: no\n", ""),
        (0, "", "is taken for good"),
        (1, "", "says 0 lines"),
        (1, "mvrepro train: no\nand more\n", "says 2 lines"),
        (1, "Traceback (most recent call last):\n", "is a fault of the program"),
        (1, "mvrepro x: unexpected KeyError: 'x'. This is a fault of the program: …\n", "is a fault of the program"),
        (70, "Traceback", "ends with 70"),
        (-14, "", "hangs"),
        (-11, "", "dies of signal 11"),
        (1, "mvrepro train: " + 1000 * "x" + "\n", "says 1015 characters"),
    ],
)
def test_what_counts_as_wrong(code: int, said: str, problem: str) -> None:
    assert wrong(code, said) == problem


def test_the_threat_model_names_what_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?\w+\.(?:py|txt))", text)
    assert len(named) > 20
    for name in (n.removeprefix("tests/") for n in named):
        assert (ROOT / "tests" / name).is_file() or (ROOT / "mvrepro" / name).is_file(), name
    # every module that opens what others wrote
    openers = r"safe_open|Image\.open|pickle|tarfile\.open|zipfile\.ZipFile|np\.load|torch\.load|InferenceSession"
    for path in (ROOT / "mvrepro").rglob("*.py"):
        own = path.stem in ("small", "storage", "plots")  # these open what they made themselves
        if re.search(openers, path.read_text(encoding="utf-8")) and not own:
            place = str(path.relative_to(ROOT / "mvrepro"))
            assert place in text or f"{path.stem}." in text, place
