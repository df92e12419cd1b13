"""heads.sharded on 1, 2 and 4 real processes, started by torchrun as a user would; gloo, since it needs no GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mvrepro.heads.sharded import ShardedHead

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "every_loss",
    "half_precision",
    "labels_on_one_rank",
    "behind_ddp",
    "sampled_negatives",
    "update_in_backward",
    "weights",
    "watch",
    "memory",
    "errors",
]
pytestmark = pytest.mark.xdist_group("sharded")  # the processes of two tests at once are too many


def torchrun(ranks: int, *tests: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "tests" / "sharded_worker.py"), *tests]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree_with_one_dense_head(ranks):
    done = torchrun(ranks, *TESTS)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "passed" in line] == [f"passed: {test}" for test in TESTS]


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        ("a_rank_dies", "exitcode  : 3"),  # torchrun sees it, and names the rank that failed first
        ("a_rank_stands_still", "rank 0 of 2 lost contact with the others"),  # the others see it
    ],
)
def test_a_lost_rank_ends_the_job(fate, message):
    started = time.perf_counter()
    done = torchrun(2, fate)
    assert done.returncode != 0 and "passed" not in done.stdout
    assert message in done.stderr, done.stderr
    assert time.perf_counter() - started < 120


def test_without_a_process_group():
    assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError, match=r"start the script with torchrun and call .*init_process_group first"):
        ShardedHead("Softmax", 4, 3)
