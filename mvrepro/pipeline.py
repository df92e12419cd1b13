"""Running the graph of dvc.yaml on this machine: what is to do, side by side, whole or not at all.

DVC holds the graph and says by content what is stale (dvc.lock). `dvc repro` runs one stage after the
other and, since a clone's results are fresh, would run none there. This runner computes every stage
that this machine has not computed yet from this code; a local, ignored file remembers which it has.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from mvrepro.determinism import environment
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import LOCAL, RESULTS, ROOT, TEMPORARY, display, read_json, sweep, write_atomic, write_json

COMPUTED = LOCAL / "computed.json"
MOST_JOBS = 4  # a run takes about 450 MiB


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml: a command, what it reads (files, folders, parameters) and what it writes."""

    name: str
    command: str
    reads: tuple[Path, ...]
    params: tuple[str, ...]
    writes: tuple[Path, ...]
    needs: frozenset[str] = field(default=frozenset(), compare=False)


class Pipeline:
    """The stages of dvc.yaml by name, in an order in which they can run."""

    def __init__(self) -> None:
        _mend_lock_file()
        import logging
        import warnings

        import networkx

        warnings.filterwarnings("ignore", category=DeprecationWarning, module="dvc")
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            self.repo = Repo(str(ROOT))
            logging.getLogger("dvc").setLevel(logging.ERROR)  # its hints (git add dvc.lock, …) are not for our reader
            graph = self.repo.index.graph
        except DvcException as error:
            raise UserError(f"dvc.yaml can't be read: {error}") from None
        order = list(networkx.topological_sort(graph.reverse(copy=True)))
        self.stages = {stage.addressing: _stage(stage, graph) for stage in order}
        self._known = {stage.addressing: stage for stage in order}  # DVC's own objects, with dvc.lock read once

    def select(self, profile: str, notebook: str | None = None) -> list[Stage]:
        """The stages of a profile, or only those behind one of its notebooks, with all that they need."""
        if "-" in profile:
            raise UserError(
                f"profile {profile!r}: the name of a profile has no '-', since a stage's begins with it and one, "
                f"such as {profile.replace('-', '_')}-train"
            )
        wanted = [s for s in self.stages if s.startswith(f"{profile}-")]
        known = sorted({s.split("-")[0] for s in self.stages if "-train@" in s})
        if not wanted:
            raise UserError(f"profile {profile!r} has no stages in dvc.yaml; known are: {', '.join(known)}")
        if notebook:
            wanted = [s for s in wanted if s == f"{profile}-{notebook}"]
            if not wanted:
                numbers = [s.removeprefix(f"{profile}-") for s in self.stages if s[len(profile) + 1 :].isdigit()]
                raise UserError(
                    f"there is no notebook {notebook!r} on {profile}; known are: {', '.join(sorted(numbers))}"
                )
        chosen: set[str] = set()
        todo = [*wanted, *([] if notebook else ["claims"])]
        while todo:
            name = todo.pop()
            # The claims are judged on every profile; what other profiles have is taken as it lies here.
            # A measurement of time is one machine's, and only its own profile takes it anew.
            foreign = name.split("-")[0] in {*known, "bench"} - {profile}
            if name not in chosen and name in self.stages and not foreign:
                chosen.add(name)
                todo += self.stages[name].needs
        return [stage for name, stage in self.stages.items() if name in chosen]

    def stale(self, stages: Sequence[Stage]) -> dict[str, list[str]]:
        """Stage -> reasons, for those whose committed results don't belong to the files that are here."""
        reasons: dict[str, list[str]] = {}
        with self._locked():
            found = {name: entries for s in stages for name, entries in self._known[s.name].status().items()}
        for name, entries in found.items():
            texts = []
            for entry in entries:
                if isinstance(entry, dict):
                    for what, changes in entry.items():
                        texts += [f"{where}: {how}" for where, how in _flat(changes)] or [what]
                else:
                    texts.append(str(entry))
            reasons[name] = texts
        return reasons

    def strays(self, profile: str) -> list[str]:
        """What is wrong with each file among a profile's results that no stage writes: pages read such runs, too."""
        written = {path for stage in self.stages.values() for path in stage.writes}
        folders = [RESULTS / part / profile for part in ("executed", "figures", "runs", "values")]
        found = [p for f in folders for p in sorted(f.rglob("*")) if p.is_file() and not p.name.startswith(TEMPORARY)]
        return [f"{display(p)} is written by no stage of dvc.yaml: remove it" for p in found if p not in written]

    def accept(self, stages: Sequence[Stage]) -> None:
        """Tell DVC that these stages' outputs belong to the files that are here (dvc.lock)."""
        from dvc.dvcfile import Lockfile

        chosen = [self._known[stage.name] for stage in stages]
        with self._locked():
            for known in chosen:
                known.save()
            # All at once: a stage's own dump reads and writes the whole file, minutes for 200 stages.
            Lockfile(self.repo, str(ROOT / "dvc.lock")).dump_stages(chosen)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold DVC's own lock, which another command holds while it writes dvc.lock."""
        from dvc.lock import LockError

        try:
            self.repo.lock.lock()
        except LockError:
            raise UserError(
                "another command of DVC or mvrepro is at work in this folder: when it has ended, run this one again"
            ) from None
        try:
            yield
        finally:
            self.repo.lock.unlock()


def _stage(stage: Any, graph: Any) -> Stage:
    reads = tuple(Path(d.fs_path) for d in stage.deps if not hasattr(d, "params"))
    params = tuple(p for d in stage.deps if hasattr(d, "params") for p in d.params)
    writes = tuple(Path(o.fs_path) for o in stage.outs)
    needs = frozenset(s.addressing for s in graph.successors(stage))
    return Stage(stage.addressing, stage.cmd, reads, params, writes, needs)


def _flat(changes: Any) -> Iterator[tuple[str, str]]:
    for where, how in changes.items():
        if isinstance(how, dict):
            yield from ((f"{where} {inner}", state) for inner, state in _flat(how))
        else:
            yield where, str(how)


def _mend_lock_file() -> None:
    """DVC writes dvc.lock in place: a kill in that moment leaves half of it. Take the committed one then."""
    path = ROOT / "dvc.lock"
    if not path.is_file():
        return
    try:
        whole = isinstance(
            yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)), dict
        )
    except yaml.YAMLError:
        whole = False
    if not whole:
        before = committed(path)
        if before is None:
            path.unlink()
        else:
            write_atomic(path, before)


class Memory:
    """Which stages this machine has computed, from what, and what came out."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, str]] = {}
        if COMPUTED.is_file():
            with contextlib.suppress(json.JSONDecodeError):
                self.known = read_json(COMPUTED)
        self.params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        self.hashes: dict[Path, str] = {}

    def has(self, stage: Stage) -> bool:
        """True where the stage was computed here from just this, and its outputs are still the same."""
        return self.known.get(stage.name) == self._state(stage)

    def remember(self, stage: Stage) -> None:
        for path in stage.writes:
            self.hashes.pop(path, None)
            self.hashes.pop(path.parent, None)
        self.known[stage.name] = self._state(stage)
        write_json(COMPUTED, self.known)

    def _state(self, stage: Stage) -> dict[str, str]:
        versions = [platform.python_version(), version("torch"), version("numpy")]
        inputs = [stage.command, *versions, *(f"{p}={self._param(p)}" for p in stage.params)]
        inputs += [f"{display(path)}={self._hash(path)}" for path in stage.reads]
        return {
            "from": hashlib.sha256("\n".join(inputs).encode()).hexdigest(),
            "to": hashlib.sha256("\n".join(self._hash(path) for path in stage.writes).encode()).hexdigest(),
        }

    def _param(self, dotted: str) -> str:
        value = self.params
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return json.dumps(value, sort_keys=True)

    def _hash(self, path: Path) -> str:
        if path not in self.hashes:
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            digest = hashlib.sha256()
            for file in files:
                digest.update(f"{file.name}\n".encode())
                digest.update(file.read_bytes() if file.is_file() else b"missing")
            self.hashes[path] = digest.hexdigest()
        return self.hashes[path]


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
    stages: Sequence[Stage], *, force: bool = False, jobs: int | None = None, ran: list[Stage] | None = None
) -> list[Stage]:
    """Run what this machine has not computed yet (or all, with `force`); returns the stages that ran, which
    are in `ran`, too, when it ends early.

    Raises UserError when a stage fails, with the end of what it printed; what was done stays done.
    """
    _check_writable()
    sweep(RESULTS)
    memory, ran = Memory(), [] if ran is None else ran
    jobs = jobs or max(1, min(_cores(), MOST_JOBS))
    waiting, done, running = list(stages), set[str](), dict[Future[None], Stage]()
    names = {stage.name for stage in stages}
    bar = tqdm(total=len(stages), unit="stage", disable=None)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for stage in [s for s in waiting if s.needs & names <= done]:
                    if not force and memory.has(stage):
                        waiting.remove(stage)
                        done.add(stage.name)
                        bar.update()
                    elif len(running) < jobs:
                        waiting.remove(stage)
                        running[pool.submit(_run, stage)] = stage
                if not running:
                    continue
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                # Those that failed last: what ended in the same instant is done and stays done.
                for future in sorted(finished, key=lambda f: f.exception() is not None):
                    stage = running.pop(future)
                    future.result()
                    for path in stage.writes:
                        keep_committed(path)
                    memory.remember(stage)
                    ran.append(stage)
                    done.add(stage.name)
                    bar.update()
                    bar.set_postfix_str(stage.name)
                    if bar.disable:
                        print(f"[{len(done)}/{len(stages)}] {stage.name}", flush=True)
        finally:
            _stop_children()
            bar.close()
    return ran


_children: set[subprocess.Popen[bytes]] = set()


def _run(stage: Stage) -> None:
    """One stage in a process of its own; what it prints goes to .mvrepro/logs/<stage>.log."""
    log = LOCAL / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    settings = environment(threads=1) | {"PATH": path, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(stage.command, shell=True, cwd=ROOT, env=settings, stdout=file, stderr=file)
        _children.add(child)
        code = child.wait()
        _children.discard(child)
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:]
        signal = -code if code < 0 else code - 128  # a shell reports its child's signal n as 128 + n
        how = f"was killed by signal {signal}" if signal > 0 else f"failed with exit code {code}"
        raise UserError(
            f"stage {stage.name} {how} after {time.perf_counter() - started:.0f} s ({stage.command}):\n"
            + "\n".join(tail)
            + "\nWhat was computed before is kept: the same command goes on from there."
        )


def _stop_children() -> None:
    for child in list(_children):
        child.terminate()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_writable() -> None:
    """Say at once, not after minutes, that results can't be written."""
    probe = RESULTS / ".writing-probe"
    write_atomic(probe, b"")
    probe.unlink(missing_ok=True)


def committed(path: Path) -> bytes | None:
    """The file as it stands in the last commit, or None where it has none."""
    done = subprocess.run(["git", "show", f"HEAD:{display(path)}"], cwd=ROOT, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def keep_committed(path: Path) -> None:
    """Where a run's values are those committed, keep the committed file: it says where they first came
    from, and a reproduction that finds the same leaves no change in git."""
    if path.suffix != ".json" or not path.is_relative_to(RESULTS / "runs"):
        return
    before = committed(path)
    if before is None or before == path.read_bytes():
        return
    old, new = json.loads(before), read_json(path)
    if {k: v for k, v in old.items() if k != "provenance"} == {k: v for k, v in new.items() if k != "provenance"}:
        write_atomic(path, before)
