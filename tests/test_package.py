"""The package as users meet it: what `from mvrepro import …` gives, and where what has moved is now."""

import importlib
import subprocess
import sys

import pytest

import mvrepro
from mvrepro import MOVED
from mvrepro.files import ROOT


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


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
