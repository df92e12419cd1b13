"""What is computed, from what, and whether it is current: runs out of params.yaml, pages and tables out of dvc.yaml.

A run is current where a record holds the settings that are wanted and the hash of today's code. DVC says by content
(dvc.lock) which other results belong to the files that are here. Since all of that is committed, a clone is current
and `dvc repro` computes nothing there: `make reproduce` asks what this machine has computed from this code, which a
local, ignored file remembers.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from mvrepro.determinism import ENVIRONMENT, environment
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import LOCAL, RESULTS, ROOT, TEMPORARY, display, read_json, read_yaml, write_atomic, write_json
from mvrepro.provenance import code_hash, code_parts, committed

if TYPE_CHECKING:
    from mvrepro.training.train import TrainConfig

CODE, COMPUTED = RESULTS / "code.json", LOCAL / "computed.json"
MOST_JOBS = 4  # a run takes about 450 MiB


@dataclass(frozen=True)
class Run:
    """One training, whose record goes to <folder>/<profile>/<name>.json."""

    config: "TrainConfig"
    folder: Path = RESULTS / "runs"
    reads: ClassVar[tuple[Path, ...]] = ()

    @property
    def name(self) -> str:
        return f"{self.config.profile}/{self.config.run_name()}"

    @property
    def writes(self) -> tuple[Path, ...]:
        record = self.folder / f"{self.name}.json"
        return (record, record.with_suffix(".safetensors")) if self.config.data == "digits" else (record,)

    def source(self) -> list[Any]:
        return [asdict(self.config), code_hash()]

    def compute(self) -> None:
        train(self.config, self.writes[0])


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: its command, the files, folders and parts of the code that it reads, and what it writes."""

    name: str
    command: str
    reads: tuple[Path, ...]
    parts: tuple[str, ...]
    writes: tuple[Path, ...]

    def source(self) -> list[Any]:
        return [self.command, *map(code_hash, self.parts)]

    def compute(self) -> None:
        """Run `python -m MODULE …` in this process, which has its libraries loaded."""
        sys.argv, said = shlex.split(self.command)[2:], io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if end.code:
                    raise UserError(said.getvalue().strip()) from None


Step = Run | Stage


def train(config: "TrainConfig", out: Path) -> None:
    """Train a run and write its record, with the hash of the code as it was before."""
    from mvrepro.training.train import train_to_file

    code = code_hash()
    write_json(out, {**train_to_file(config, out), "code": code})
    keep_committed(out)


def make_config(settings: dict[str, Any]) -> "TrainConfig":
    """Settings as JSON and YAML hold them, as a config. Raises TypeError where one is unknown or missing."""
    from mvrepro.training.train import TrainConfig

    return TrainConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


def wanted(profile: str) -> list[Run]:
    """The runs of a profile in the order of params.yaml. Raises UserError where it makes no sense."""
    section = read_yaml(ROOT / "params.yaml").get(profile, {})
    if "runs" not in section:
        raise UserError(f"params.yaml has no runs for the profile {profile!r}")
    found = []
    for grid in section["runs"]:
        for row in itertools.product(*map(_flat, grid.values())):
            try:
                config = make_config({"profile": profile, **section["train"], **dict(zip(grid, row, strict=True))})
            except TypeError as error:
                raise UserError(f"params.yaml, {profile}: {error}") from None
            found.append(Run(config))
    return found


def _flat(value: Any) -> list[Any]:
    return [inner for part in value for inner in _flat(part)] if isinstance(value, list) else [value]


def lacking(runs: Sequence[Run]) -> dict[Run, str]:
    """The runs that are not current, each with the reason."""
    code = code_hash()
    records = {c: made for profile in {run.config.profile for run in runs} for _, c, made in _records(profile)}
    why = {run: "was made by other code" if run.config in records else "has no record" for run in runs}
    return {run: reason for run, reason in why.items() if records.get(run.config) != code}


def _records(profile: str) -> Iterator[tuple[Path, "TrainConfig | None", str]]:
    """(file, settings or None where they are not today's, hash of the code) of each record of a profile."""
    for path in sorted((RESULTS / "runs" / profile).glob("*.json")):
        record, config = read_json(path), None
        with contextlib.suppress(TypeError):
            config = make_config(record["config"])
        yield path, config, record.get("code", "")


def stages() -> list[Stage]:
    """The stages of dvc.yaml, with every `foreach` written out: no command of DVC tells what a stage reads."""
    params, found = read_yaml(ROOT / "params.yaml"), []
    for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        each = body.get("foreach", [""])
        each = params[each[2:-1]] if isinstance(each, str) else each
        for key, item in (each if isinstance(each, dict) else dict(zip(each, each, strict=True))).items():
            values = {"key": key, "item": item}
            values |= {f"item.{field}": v for field, v in item.items()} if isinstance(item, dict) else {}
            text = re.sub(r"\$\{([\w.]+)\}", lambda found, v=values: v[found[1]], json.dumps(body.get("do", body)))
            stage = json.loads(text)
            reads, writes = (tuple(ROOT / p for p in _names(stage.get(kind, []))) for kind in ("deps", "outs"))
            parts = [p for entry in stage.get("params", []) for p in entry.get("results/code.json", [])]
            found.append(Stage(f"{name}@{key}" if key else name, stage["cmd"], reads, tuple(parts), writes))
    return found


def _names(entries: list[Any]) -> list[str]:
    """Those of dvc.yaml's paths, which stand alone or before their options: `path` or `{path: options}`."""
    return [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]


def needs(step: Step, other: Step) -> bool:
    """True where a step reads what the other writes, or a folder around it or below."""
    pairs = itertools.product(step.reads, other.writes)
    return any(read == out or read in out.parents or out in read.parents for read, out in pairs)


def select(profile: str, notebook: str | None = None) -> tuple[list[Run], list[Stage]]:
    """The runs and stages of a profile, or of one of its notebooks, such as "04", with all that they need.

    The claims are judged on every profile; what another one has is taken as it lies here. A measurement of time
    is one machine's: only where the profile is "bench" is it taken anew.
    """
    every, executed = stages(), RESULTS / "executed"
    pages = {out: s for s in every for out in s.writes if out.parent.parent == executed}
    others = {out.parent.name for out in pages} - {profile}
    chosen = [s for out, s in pages.items() if out.parent.name == profile]
    chosen += [s for s in every if s.name in (profile, f"runs@{profile}")]
    if not chosen:
        known = sorted({s.name.removeprefix("runs@") for s in every if s.name.startswith("runs@")})
        raise UserError(f"profile {profile!r} has no stages in dvc.yaml; known are: {', '.join(known)}")
    if notebook:
        numbers = {out.name[:2]: s for out, s in pages.items() if out.parent.name == profile}
        if notebook not in numbers:
            raise UserError(f"there is no notebook {notebook!r} on {profile}; known are: {', '.join(sorted(numbers))}")
        chosen = [numbers[notebook]]
    else:
        chosen += [s for s in every if s.name == "claims"]
    for stage in chosen:  # which grows
        behind = [s for s in every if s not in chosen and s.name != "bench" and needs(stage, s)]
        chosen += [s for s in behind if not {p for out in s.writes for p in out.relative_to(RESULTS).parts} & others]
    runs = [run for s in chosen if s.name.startswith("runs@") for run in wanted(s.name.removeprefix("runs@"))]
    return runs, [s for s in every if s in chosen]


def stale(runs: Sequence[Run], chosen: Sequence[Stage]) -> dict[str, str]:
    """Name -> reason, for the runs and stages whose committed results don't belong to the files that are here."""
    reasons = {run.name: f"the run {why}" for run, why in lacking(runs).items()}
    now, noted = code_parts(), read_json(CODE) if CODE.is_file() else {}
    states = json.loads(dvc("status", "--json"))
    for stage in chosen:
        texts = [f"the code of {part} changed" for part in stage.parts if now.get(part) != noted.get(part)]
        for entry in states.get(stage.name, []):
            texts += (
                [f"{what}: {', '.join(where)}" for what, where in entry.items()] if isinstance(entry, dict) else [entry]
            )
        if texts:
            reasons[stage.name] = "; ".join(texts)
    return reasons


def strays(profile: str) -> list[str]:
    """What is wrong with each file among a profile's results that nothing writes: pages read such runs, too."""
    written = {path for stage in stages() for path in stage.writes if not stage.name.startswith("runs@")}
    folders = [RESULTS / part / profile for part in ("executed", "figures", "values")]
    found = [p for f in folders for p in sorted(f.rglob("*")) if p.is_file() and not p.name.startswith(TEMPORARY)]
    unknown = [f"{display(p)} is written by no stage of dvc.yaml" for p in found if not written & {p, *p.parents}]
    configs = {run.config for run in wanted(profile)}
    for path, config, _ in _records(profile):
        if config not in configs:
            unknown.append(f"{display(path)} is no run of params.yaml, or one more record of the same")
        configs.discard(config)
    return [f"{what}: remove it" for what in unknown]


def dvc(*arguments: str) -> str:
    """What a command of DVC prints. Raises UserError with what it says where it fails, as beside another one."""
    command = [sys.executable, "-m", "dvc", *arguments]
    settings = os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def accept(names: Sequence[str]) -> None:
    """Tell DVC that these stages' results belong to the files that are here (dvc.lock)."""
    if names:
        dvc("commit", "-f", "-q", *names)


def mend_lock_file() -> None:
    """DVC writes dvc.lock in place: a kill in that moment leaves half of it. Take the committed one then."""
    path = ROOT / "dvc.lock"
    try:
        whole = not path.is_file() or isinstance(read_yaml(path), dict)
    except UserError:
        whole = False
    if not whole:
        before = committed(path)
        path.unlink() if before is None else write_atomic(path, before)


class Memory:
    """Which steps this machine has computed, from what, and what came out."""

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}
        if COMPUTED.is_file():
            with contextlib.suppress(json.JSONDecodeError):
                self.known = read_json(COMPUTED)

    def has(self, step: Step) -> bool:
        """True where the step was computed here from just this, and its outputs are still the same."""
        return self.known.get(step.name) == [_inputs(step), _digest(step.writes)]

    def remember(self, step: Step) -> None:
        self.known[step.name] = [_inputs(step), _digest(step.writes)]
        write_json(COMPUTED, self.known)


def _inputs(step: Step) -> str:
    versions = [platform.python_version(), version("torch"), version("numpy")]
    return hashlib.sha256(json.dumps([step.source(), versions, _digest(step.reads)]).encode()).hexdigest()


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files(paths):
        digest.update(f"{display(file)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def files(paths: Sequence[Path]) -> list[Path]:
    """The files that these are or hold, without hidden ones."""
    found = [p for path in paths for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [p for p in found if p.is_file() and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the project for one runner; a second one waits. The lock dies with its process."""
    try:
        LOCAL.mkdir(exist_ok=True)
        file = (LOCAL / "lock").open("w")
    except OSError as error:
        raise explain_os_error(error, f"write {display(LOCAL)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another `make reproduce` is at work in this folder; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compute(
    steps: Sequence[Step], skip: Callable[[Step], bool], *, jobs: int | None = None, capped: bool = True
) -> Iterator[Step]:
    """Compute steps side by side in processes that live on, in their order, each when what it needs is done; yields
    each as it ends. What was done stays done, whatever happens to the others.

    skip: is asked about a step when it could begin; capped: with the settings of mvrepro.determinism.
    Raises UserError when a step fails, when a process dies, and for a step whose code or files changed meanwhile.
    """
    write_atomic(probe := RESULTS / ".writing-probe", b"")  # say at once, not after minutes, what can't be written
    probe.unlink()
    jobs = jobs or max(1, min(_cores(), MOST_JOBS))
    behind = {step.name: {o.name for o in steps if o is not step and needs(step, o)} for step in steps}
    waiting, done, moved = list(steps), set[str](), list[str]()
    running: dict[Future[None], tuple[Step, str]] = {}
    bar, pool = tqdm(total=len(steps), unit="step", disable=None), _workers(jobs, capped)
    try:
        while waiting or running:
            for step in [s for s in waiting if behind[s.name] <= done]:
                if len(running) == jobs:
                    break
                waiting.remove(step)
                if skip(step):
                    done.add(step.name)
                    bar.update()
                else:
                    running[pool.submit(step.compute)] = step, _inputs(step)
            finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else ((), ())
            # Those that failed last: what ended in the same instant is done and stays done.
            for future in sorted(finished, key=lambda f: f.exception() is not None):
                step, before = running.pop(future)
                try:
                    future.result()
                except UserError as error:
                    raise UserError(f"{step.name}: {error}\n{AGAIN}") from None
                except BrokenProcessPool:
                    names = ", ".join(sorted({step.name, *(s.name for s, _ in running.values())}))
                    raise UserError(f"a process was killed, or ran out of memory, at one of {names}\n{AGAIN}") from None
                done.add(step.name)
                bar.update()
                bar.set_postfix_str(step.name)
                if bar.disable:
                    print(f"[{len(done)}/{len(steps)}] {step.name}", flush=True)
                if _inputs(step) == before:
                    yield step
                else:
                    moved.append(step.name)
    finally:
        for child in multiprocessing.active_children():  # none is at work where all went well
            child.terminate()
        pool.shutdown()
        bar.close()
    if moved:
        raise UserError(f"what {', '.join(moved)} is computed from changed meanwhile: run the same command again")


AGAIN = "What was computed before is kept: the same command goes on from there."


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(jobs: int, capped: bool) -> ProcessPoolExecutor:
    os.environ.update(environment(threads=1))
    for name in () if capped else ENVIRONMENT:
        del os.environ[name]
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin)


def _begin() -> None:
    """What a worker does first: it prints to .mvrepro/log, and ends when its parent does, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    os.chdir(ROOT)
    LOCAL.mkdir(exist_ok=True)
    with (LOCAL / "log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent and parent.join(), os._exit(1)), daemon=True).start()


def keep_committed(path: Path) -> None:
    """Where all of a record but its provenance is that of the committed one, keep that one: it says where the values
    first came from, and a reproduction that finds the same leaves no change in git."""
    before = committed(path) if path.is_relative_to(RESULTS) else None
    if before and json.loads(before) | {"provenance": ""} == read_json(path) | {"provenance": ""}:
        write_atomic(path, before)
