"""The package as users meet it: its door, where what has moved is now, and no circle of imports."""

import ast
import graphlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mvrepro
from mvrepro import MOVED
from mvrepro.files import ROOT


def python(code: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], os.environ | settings
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_public_door_opens_when_it_is_asked() -> None:
    code = """
import sys, mvrepro
assert "torch" not in sys.modules
from mvrepro import LOSSES, MarginHead, ShardedHead
from mvrepro.heads import margin, sharded
from mvrepro import losses
assert (LOSSES, MarginHead, ShardedHead) == (losses.LOSSES, margin.MarginHead, sharded.ShardedHead)
assert set(mvrepro.__all__) == {"LOSSES", "MarginHead", "ShardedHead"}
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_help_needs_no_torch() -> None:
    done = python("""
import sys
from mvrepro.__main__ import main
try:
    main(["--help"])
except SystemExit as end:
    sys.exit(end.code or "torch" in sys.modules)
""")
    assert done.returncode == 0 and "train" in done.stdout


WINDOWS = """
import sys
sys.modules |= dict.fromkeys(["fcntl", "resource", "pty", "termios"])  # as good as missing
import os
import signal
import subprocess  # which takes msvcrt for Windows
import types
del signal.pthread_sigmask, os.pread, os.sync
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda handle, mode, count: None)
import mvrepro.files
mvrepro.files.sys = types.SimpleNamespace(platform="win32")
"""


def test_without_what_windows_lacks_heads_train_and_sets_are_written_and_read(tmp_path: Path) -> None:
    done = python(
        WINDOWS
        + """
import torch
from mvrepro import MarginHead
from mvrepro.__main__ import main
from mvrepro.provenance import provenance
loss = MarginHead("MV-AM-Softmax-a", 4, 5)(torch.randn(3, 4), torch.arange(3))
loss.backward()
assert provenance(0.0, "cpu", 1)["peak_resident_mib"] is None
import mvrepro.terminal
with mvrepro.terminal.deaf():
    pass
from PIL import Image
os.chdir(os.environ["MVREPRO_CACHE"])
os.makedirs("set/Ann Ü")
Image.new("RGB", (8, 8)).save("set/Ann Ü/1.png")
os.mkdir("rec")
assert main(["data", "convert", "set", "rec", "--to", "rec"]) == 0  # into an empty folder, too
assert main(["data", "convert", "rec", "tar", "--to", "tar"]) == 0
sys.exit(main(["data", "inspect", "tar", "--decode"]))
""",
        MVREPRO_CACHE=str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("every image decodes\n")


# every path of version 0.1, so that none is forgotten
PATHS = """fused sharded backbones backbones_large data faces formats align fetch train tasks checkpoint scale runs
stats claims claims_table published compare values report plots notebook nbcheck bridge export"""
OLD = PATHS.split()


def test_every_old_path_is_in_the_table() -> None:
    assert sorted(OLD) == sorted(MOVED)


@pytest.mark.parametrize("old", OLD)
def test_what_has_moved_says_where_to_in_one_line_that_is_true(old: str) -> None:
    for name in (f"mvrepro.{old}", f"mvrepro.{old}.inner"):
        with pytest.raises(ImportError) as caught:
            importlib.import_module(name)
        assert str(caught.value) == f"mvrepro.{old} is mvrepro.{MOVED[old]} now"
    for code in (f"from mvrepro import {old}", f"from mvrepro.{old} import something"):
        with pytest.raises(ImportError, match=rf"^mvrepro\.{old} is mvrepro\.{MOVED[old]} now$"):
            exec(code)
    with pytest.raises(AttributeError, match=rf"has no attribute '{old}': it is mvrepro\.{MOVED[old]} now$"):
        getattr(mvrepro, old)
    importlib.import_module(f"mvrepro.{MOVED[old]}")


def test_what_left_a_module_or_the_package_says_where_to() -> None:
    with pytest.raises(ImportError, match=r"^mvrepro\.losses\.MarginHead is mvrepro\.heads\.MarginHead now$"):
        exec("from mvrepro.losses import MarginHead")
    with pytest.raises(ImportError, match=r"^mvrepro\.bench is benchmarks\.head now, beside the package$"):
        exec("from mvrepro import bench")
    importlib.import_module("benchmarks.head")
    assert importlib.import_module("mvrepro.heads").MarginHead


@pytest.mark.parametrize("name", ["mvrepro.nothing", "mvrepro.heads.fused", "fused", "backbones"])
def test_other_names_are_unknown_as_ever(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module(name)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        mvrepro.nothing  # noqa: B018


# Who imports whom: pyproject.toml has the directions, `make lint` holds them


def imported(path: Path) -> set[str]:
    """The modules of the package and of others that a file imports, in functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {node.module}
    return found


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("mvrepro", "benchmarks")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def test_there_is_no_circle_of_imports() -> None:
    graph = {name: imported(path) & MODULES.keys() for name, path in MODULES.items()}
    assert graph["mvrepro.heads.sharded"] >= {"mvrepro.heads.margin", "mvrepro.losses"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_the_losses_stand_on_torch_alone() -> None:
    outside = {name.partition(".")[0] for name in imported(MODULES["mvrepro.losses"])} - set(sys.stdlib_module_names)
    assert outside == {"torch"}
