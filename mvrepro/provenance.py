"""Where a result comes from: commit, settings, versions, device, time and memory."""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from mvrepro.determinism import ENVIRONMENT
from mvrepro.files import ROOT

# What a result depends on: a change elsewhere (README, results) does not make the commit "dirty".
SOURCES = ["mvrepro", "notebooks", "paper", "params.yaml", "dvc.yaml", "requirements.lock"]


def config_hash(config: dict[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the settings, in a fixed order."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def git(*arguments: str) -> str | None:
    """What git prints, or None outside a repository."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(started: float, device: str, threads: int) -> dict[str, Any]:
    """The record that every run carries. started: time.perf_counter() at its begin; device: a torch device."""
    import torch

    on_gpu = device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    # ru_maxrss counts KiB on Linux, bytes on macOS.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    changed = git("status", "--porcelain", "--", *SOURCES)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "cpus": os.cpu_count(),
        "threads": threads,
        "flags": {name: os.environ.get(name) for name in ENVIRONMENT},
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": version("numpy")},
        "wall_s": round(time.perf_counter() - started, 2),
        "peak_resident_mib": round(resident / 2**20),
        "peak_gpu_mib": None if peak is None else round(peak / 2**20),
    }
