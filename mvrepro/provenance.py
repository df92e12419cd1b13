"""Where a result comes from: code, commit, settings, versions, device, time and memory."""

import ast
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvrepro.determinism import ENVIRONMENT
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import CLONE, LOCAL, PACKAGE, RESULTS, ROOT, TEMPORARY, display

# What a result depends on: a change elsewhere (README, results) does not make the commit "dirty".
SOURCES = ["mvrepro", "benchmarks", "notebooks", "paper", "params.yaml", "dvc.yaml", "requirements.lock"]
CAME = LOCAL / "came"  # the results of a ZIP
# The parts of mvrepro/ that decide what a training gives.
TRAINING = ("losses", "heads", "networks", "images", "protocols", "training", "determinism")


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the settings, in a fixed order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(*parts: str) -> str:
    """16 hex digits of the SHA-256 of what the code of some parts does: of its syntax trees without docstrings,
    where comments and layout don't count and a formula does.

    parts: modules and folders of mvrepro/ (or beside it), such as "losses"; none: TRAINING, what decides a run.
    Raises UserError where there is no such part or it is no Python.
    """
    digest = hashlib.sha256()
    for part in parts or TRAINING:
        for path in _sources(part):
            try:
                digest.update(f"{path.relative_to(PACKAGE.parent)} {_meaning(path.read_bytes())}\n".encode())
            except SyntaxError as error:
                raise UserError(f"{display(path)}, line {error.lineno}: {error.msg}") from None
    return digest.hexdigest()[:16]


def code_parts() -> dict[str, str]:
    """The code_hash of each part by itself: what results/code.json holds."""
    found = [p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    names = sorted({path.stem for path in found} - {"__init__", "__main__"})
    return {name: code_hash(name) for name in [*names, "benchmarks"]}


def _sources(part: str) -> list[Path]:
    for path in (PACKAGE / f"{part}.py", PACKAGE / part, PACKAGE.parent / part):
        if path.exists():
            return [path] if path.is_file() else sorted(path.rglob("*.py"))
    raise UserError(f"mvrepro has no part {part!r}: neither a module nor a folder of that name is there")


@functools.cache
def _meaning(source: bytes) -> str:
    """A syntax tree in words of our own: ast.dump shows other fields under another Python."""

    def plain(node: Any) -> Any:
        if isinstance(node, list):  # a statement that is a constant is a docstring, or does as little
            return [plain(n) for n in node if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        if isinstance(node, ast.AST):
            fields = ((name, plain(value)) for name, value in ast.iter_fields(node))
            return type(node).__name__, [(name, value) for name, value in fields if value not in (None, [])]
        return node

    return repr(plain(ast.parse(source)))


def git(*arguments: str) -> str | None:
    """What git prints, or None outside the project's repository and where there is no git."""
    found = _git(*arguments)
    return None if found is None else found.decode(errors="replace").strip()


def committed(path: Path) -> bytes | None:
    """The file as it stands in the last commit, or None where it has none; without git, as keep_as_it_came found it."""
    shown = _git("show", f"HEAD:{display(path)}")
    if shown is not None or in_git():
        return shown
    came = CAME / display(path)
    return came.read_bytes() if came.is_file() else None


def in_git() -> bool:
    """Whether the project is a clone, and not a ZIP of one."""
    return _git("rev-parse", "--git-dir") is not None


def keep_as_it_came() -> bool:
    """Without git, copy the results before they are first written over: what is computed is compared with them.
    Returns whether that is needed here."""
    if in_git():
        return False
    if not CAME.exists():
        aside = CAME.with_name(f"{TEMPORARY}{CAME.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            shutil.copytree(RESULTS, aside / display(RESULTS))
            aside.replace(CAME)
        except OSError as error:
            raise explain_os_error(error, f"keep a copy of {display(RESULTS)}") from None
    return True


def _git(*arguments: str) -> bytes | None:
    """Of the repository whose root the project is: one further up, around a ZIP that was unpacked or around an
    environment that it is installed in, is somebody else's."""
    if not CLONE or not shutil.which("git"):
        return None
    settings = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    done = subprocess.run(["git", *arguments], cwd=ROOT, env=settings, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def provenance(started: float, device: str, threads: int) -> dict[str, Any]:
    """The record that every run carries. started: time.perf_counter() at its begin; device: a torch device."""
    import torch

    on_gpu = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": version("numpy")}
    if on_gpu:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    changed = git("status", "--porcelain", "--", *SOURCES)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # AVX2, AVX512, …: other last bits
        "threads": threads,
        "flags": {name: os.environ.get(name) for name in ENVIRONMENT},
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "versions": versions,
        "wall_s": round(time.perf_counter() - started, 2),
        "peak_resident_mib": _peak_resident(),
        "peak_gpu_mib": None if peak is None else round(peak / 2**20),
    }


def _peak_resident() -> int | None:
    """MiB of this process; None on Windows, where Python doesn't tell."""
    try:
        import resource
    except ImportError:
        return None
    # ru_maxrss counts KiB on Linux, bytes on macOS.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10))
