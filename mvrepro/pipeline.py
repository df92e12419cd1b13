"""What is computed, from what, and whether it is current: runs out of params.yaml, pages and tables out of dvc.yaml.

A run is current where a record holds the settings that are wanted and the hash of today's code. DVC says by content
(dvc.lock) which other results belong to the files that are here. Since all of that is committed, a clone is current
and `dvc repro` computes nothing there: `make reproduce` asks what this machine has computed from this code, which a
local, ignored file remembers.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvrepro.determinism import set_environment
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import LOCAL, RESULTS, ROOT, TEMPORARY, display, lock, read_json, read_yaml, write_atomic, write_json
from mvrepro.provenance import TRAINING, code_hash, code_parts, committed, config_hash, in_git
from mvrepro.terminal import deaf
from mvrepro.training.config import TrainConfig, from_settings

CODE, COMPUTED = RESULTS / "code.json", LOCAL / "computed.json"
MOST_JOBS = 4  # a run takes about 450 MiB
ASIDE = ("bench", "gpu", "published")  # stages computed where they are asked for by name, and else taken as they lie
NO_RECORD, OTHER_SETTINGS = "has no record", "was made with other settings"  # why a run is not current
OTHER_CODE, OTHER_BASE = "was made by other code", "began with a network of other settings"
AGAIN = "What was computed before is kept: the same command goes on from there."


@dataclass(frozen=True)
class Step:
    """A run, or a stage of dvc.yaml: the files, folders and parts of the code that it reads, and what it writes."""

    name: str
    reads: tuple[Path, ...]
    parts: tuple[str, ...]
    writes: tuple[Path, ...]
    command: str = ""  # of a stage
    config: TrainConfig | None = None  # of a run
    base: TrainConfig | None = None  # of the run with whose network it begins
    keeps: bool = False  # whether another run begins with its network
    given: tuple[str, ...] = ()  # the settings of its row, which are for it and not for a whole profile

    def needs(self, other: "Step") -> bool:
        """True where it reads what the other writes, or a folder around that or below."""
        if self.base and other.config == self.base:
            return True
        pairs = itertools.product(self.reads, other.writes)
        return any(read == out or read in out.parents or out in read.parents for read, out in pairs)

    def inputs(self) -> str:
        """The hash of all that decides what it writes."""
        settings = self.config.decisive() if self.config else self.command
        inputs = [settings, _versions(), [code_hash(part) for part in self.parts], digest(self.reads)]
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()

    def compute(self) -> None:
        """Train the run, or call the stage's `python -m MODULE …`, in this process, where the libraries are loaded."""
        if self.config:
            from mvrepro.training import loop

            loop.check_used(self.config, self.given)
            begin = network_of(self.base) if self.base else None
            loop.run(self.config, self.writes[0], keep=network_of(self.config) if self.keeps else None, begin=begin)
            keep_committed(self.writes[0])
            return
        sys.argv, said = shlex.split(self.command)[2:], io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if end.code:
                    raise UserError(said.getvalue().strip()) from None


@functools.cache
def _versions() -> list[str]:
    return [platform.python_version(), version("torch"), version("numpy")]


def known() -> list[str]:
    """The profiles that have runs."""
    params = read_yaml(ROOT / "params.yaml")
    return [name for name, section in params.items() if isinstance(section, dict) and "runs" in section]


def network_of(config: TrainConfig) -> Path:
    """Where a run leaves its network for those that begin with it; on this machine alone."""
    return LOCAL / "networks" / config.profile / config.run_name()


def runs(profile: str, folder: Path = RESULTS / "runs", **changes: Any) -> list[Step]:
    """The runs of a profile in the order of params.yaml, whose records go to <folder>/<profile>/<run_name>.json.

    changes: settings other than there.
    """
    if profile not in known():
        raise UserError(f"params.yaml lists no runs for the profile {profile!r}; known are: {', '.join(known())}")
    section, found = read_yaml(ROOT / "params.yaml")[profile], []
    for grid in section["runs"]:
        for row in itertools.product(*map(_flat, grid.values())):
            settings = {"profile": profile, **section["train"], **dict(zip(grid, row, strict=True)), **changes}
            config = from_settings(settings, f"params.yaml, {profile}")
            record = folder / profile / f"{config.run_name()}.json"
            writes = (record, record.with_suffix(".safetensors")) if config.data == "digits" else (record,)
            name = f"{profile}/{config.run_name()}"
            found.append(Step(name, (), TRAINING, writes, config=config, given=tuple(grid)))
    names = [step.name for step in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"params.yaml, {profile}: two runs are called {twice[0]}: give one of their rows a variant")
    plain = {(s.config.loss, s.config.seed): s.config for s in found if s.config and not s.config.variant}
    bases = {s.name: plain.get((s.config.after, s.config.seed)) for s in found if s.config and s.config.after}
    if lost := [name for name, base in bases.items() if base is None]:
        raise UserError(f"params.yaml, {profile}: {lost[0]} begins after a run that the profile does not list")
    return [replace(s, base=bases.get(s.name), keeps=s.config in bases.values()) for s in found]


def with_bases(todo: Sequence[Step], steps: Sequence[Step]) -> list[Step]:
    """These runs, and in the order of `steps` those with whose network one of them begins where this machine doesn't
    have it from this code: they are trained again."""
    wanted = {step.name for step in todo}
    for step in todo:
        if step.base:
            have, manifest = None, network_of(step.base) / "manifest.json"
            with contextlib.suppress(OSError, UserError, KeyError):
                made_by = read_json(manifest)["made_by"]
                have = made_by["config_hash"], made_by["code"]
            if have != (config_hash(step.base.decisive()), code_hash()):
                wanted |= {base.name for base in steps if base.config == step.base}
    return [step for step in steps if step.name in wanted]


def _flat(value: Any) -> list[Any]:
    return [inner for part in value for inner in _flat(part)] if isinstance(value, list) else [value]


def lacking(steps: Sequence[Step]) -> dict[str, str]:
    """Name -> reason, for the runs among these that are not current."""
    code, reasons = code_hash(), {}
    for step in (s for s in steps if s.config):
        if not all(path.is_file() for path in step.writes):
            reasons[step.name] = NO_RECORD
            continue
        record, reasons[step.name] = read_json(step.writes[0]), OTHER_SETTINGS
        with contextlib.suppress(UserError):  # a setting that is no longer known; a newer one has its default there
            if step.config and from_settings(record["config"], "").decisive() == step.config.decisive():
                reasons[step.name] = OTHER_CODE if record.get("code") != code else ""
            if step.base and record.get("began_with", {}).get("config_hash") != config_hash(step.base.decisive()):
                reasons[step.name] = OTHER_BASE
    return {name: reason for name, reason in reasons.items() if reason}


def stages() -> list[Step]:
    """The stages of dvc.yaml, with every `foreach` written out: no command of DVC tells what a stage reads."""
    params, found = read_yaml(ROOT / "params.yaml"), []
    for name, body in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        each = body.get("foreach", [""])
        each = params[each[2:-1]] if isinstance(each, str) else each
        for key, item in (each if isinstance(each, dict) else dict(zip(each, each, strict=True))).items():
            values = {"key": key, "item": item}
            values |= {f"item.{field}": v for field, v in item.items()} if isinstance(item, dict) else {}
            text = json.dumps(body.get("do", body))
            for place, value in values.items():
                text = text.replace(f"${{{place}}}", str(value))
            stage = json.loads(text)
            reads, writes = (tuple(_paths(stage.get(kind, []))) for kind in ("deps", "outs"))
            parts = [part for entry in stage.get("params", []) for part in entry.get("results/code.json", [])]
            found.append(Step(f"{name}@{key}" if key else name, reads, tuple(parts), writes, stage["cmd"]))
    return found


def _paths(entries: list[Any]) -> Iterator[Path]:
    """In dvc.yaml a path stands alone or before its options: `path` or `{path: options}`."""
    for entry in entries:
        yield from (ROOT / path for path in ([entry] if isinstance(entry, str) else entry))


def select(profile: str, notebook: str | None = None) -> list[Step]:
    """The runs and stages of a profile, or of one of its notebooks, such as "04", with all that they need.

    The claims are judged on every profile, but what another one has is taken as it lies here. So is a measurement of
    time, which is one machine's, and what networks of others give, which takes their files: ASIDE, to be asked for.
    """
    every = stages()
    pages = {out: s for s in every for out in s.writes if out.parent.parent == RESULTS / "executed"}
    mine = {out.name[:2]: s for out, s in pages.items() if out.parent.name == profile}
    chosen = [*mine.values(), *(s for s in every if s.name in (profile, f"runs@{profile}"))]
    if not chosen:
        raise UserError(f"profile {profile!r} has no stages in dvc.yaml; known are: {', '.join(known())}")
    if notebook is not None and notebook not in mine:
        raise UserError(f"there is no notebook {notebook!r} on {profile}; known are: {', '.join(sorted(mine))}")
    chosen = [mine[notebook]] if notebook else [*chosen, *(s for s in every if s.name == "claims")]
    foreign = {RESULTS / kind / out.parent.name for out in pages for kind in ("figures", "runs", "values")}
    foreign -= {RESULTS / kind / profile for kind in ("figures", "runs", "values")}
    for stage in chosen:  # which grows
        behind = [s for s in every if s not in chosen and s.name not in ASIDE and stage.needs(s)]
        chosen += [s for s in behind if not {p for out in s.writes for p in (out, *out.parents)} & foreign]
    names = [s.name for s in every if s in chosen]
    trained = [run for name in names if name.startswith("runs@") for run in runs(name.removeprefix("runs@"))]
    return trained + [s for s in every if s in chosen and not s.name.startswith("runs@")]


def stale(steps: Sequence[Step]) -> dict[str, str]:
    """Name -> reason, for those whose committed results don't belong to the files that are here."""
    reasons = lacking(steps)
    now, noted = code_parts(), read_json(CODE) if CODE.is_file() else {}
    states = json.loads(dvc("status", "--json")) if in_git() else {}  # DVC wants git
    parts = {s.name: s.parts for s in steps if not s.config} | {f"runs@{p}": () for p in profiles(steps)}
    for name in parts:
        texts = [f"the code of {part} changed" for part in parts[name] if now.get(part) != noted.get(part)]
        for entry in states.get(name, []):
            texts += [f"{k}: {', '.join(v)}" for k, v in entry.items()] if isinstance(entry, dict) else [entry]
        if texts:
            reasons[name] = "; ".join(texts)
    return reasons


def profiles(steps: Sequence[Step]) -> list[str]:
    """Whose runs are among these."""
    return list(dict.fromkeys(s.config.profile for s in steps if s.config))


def strays(profile: str) -> list[str]:
    """What is wrong with each file among a profile's results that nothing writes: pages read such runs, too."""
    written = {out for s in stages() for out in s.writes if not s.name.startswith("runs@")}
    written |= {out for run in (runs(profile) if profile in known() else []) for out in run.writes}
    folders = [RESULTS / kind / profile for kind in ("executed", "figures", "runs", "values")]
    unknown = [path for path in files(folders) if not written & {path, *path.parents}]
    return [f"{display(path)} is written by nothing in params.yaml and dvc.yaml: remove it" for path in unknown]


def write_code() -> None:
    """Bring results/code.json up to date, on which all stages of dvc.yaml depend."""
    if not CODE.is_file() or read_json(CODE) != code_parts():
        write_json(CODE, code_parts())


def dvc(*arguments: str) -> str:
    """What a command of DVC prints. Raises UserError with its message where it fails, as beside another one."""
    command, settings = [sys.executable, "-m", "dvc", *arguments], os.environ | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def accept(steps: Sequence[Step]) -> None:
    """Tell DVC (dvc.lock) that the results of these belong to the files that are here, where it doesn't know."""
    if not in_git():  # which DVC wants
        return
    lack = lacking(steps)
    names = {"code", *(s.name for s in steps if not s.config), *(f"runs@{p}" for p in profiles(steps))}
    names -= {f"runs@{s.config.profile}" for s in steps if s.config and s.name in lack}
    waiting = sorted(names & json.loads(dvc("status", "--json")).keys())
    if waiting:
        dvc("commit", "--force", "--quiet", *waiting)


def mend_lock_file() -> None:
    """DVC writes dvc.lock in place: a kill in that moment leaves half of it, which DVC refuses or which lacks stages.
    Take the committed one then. It may know less of what was computed since: `accept` says it again."""
    path = ROOT / "dvc.lock"
    if not path.is_file() or not in_git():  # which DVC wants
        return
    found, before = path.read_bytes(), committed(path) or b""
    if found == before:
        return
    stages_found, stages_before = _noted(found), _noted(before) or set()
    if stages_found is None or stages_before & {stage.name for stage in stages()} - stages_found:
        write_atomic(path, before)


def _noted(lock: bytes) -> set[str] | None:
    """The stages that a dvc.lock knows; None where DVC would refuse it."""
    import yaml
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        return set(COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(lock)).get("stages", ()))
    except (yaml.YAMLError, Invalid):
        return None


class Memory:
    """Which steps this machine has computed, from what, and what came out."""

    def __init__(self) -> None:
        self.known: dict[str, list[str]] = {}
        with contextlib.suppress(FileNotFoundError, UserError):
            self.known = read_json(COMPUTED)

    def has(self, step: Step) -> bool:
        """True where the step was computed here from just this, and its outputs are still the same."""
        if step.config and step.keeps and not network_of(step.config).is_dir():
            return False
        return step.name in self.known and self.known[step.name] == [step.inputs(), digest(step.writes)]

    def remember(self, step: Step) -> None:
        self.known[step.name] = [step.inputs(), digest(step.writes)]
        write_json(COMPUTED, self.known)


def digest(paths: Sequence[Path]) -> str:
    """The hash of the content of files and folders."""
    found = hashlib.sha256()
    for file in files(paths):
        found.update(f"{display(file)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def files(paths: Sequence[Path]) -> list[Path]:
    """The files that these are or hold, without hidden ones."""
    found = [p for path in paths for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [p for p in found if p.is_file() and not p.name.startswith(".") and not p.parent.name.startswith(".")]


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the project for one runner; a second one waits. The lock dies with its process."""
    try:
        LOCAL.mkdir(parents=True, exist_ok=True)
        file = (LOCAL / "lock").open("a")
    except OSError as error:
        raise explain_os_error(error, f"lock {display(LOCAL)}") from None
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            if not lock(file, wait=False):
                print("another `make reproduce` is at work in this folder; waiting for it to end", flush=True)
                lock(file)
        yield


def _died(steps: Iterable[Step]) -> UserError:
    names = ", ".join(step.name for step in steps)
    return UserError(f"a process was killed, or ran out of memory, at {names}\n{AGAIN}")


def compute(
    steps: Sequence[Step], skip: Callable[[Step], bool], *, jobs: int | None = None, capped: bool = True
) -> Iterator[Step]:
    """Compute steps side by side in processes that live on, in their order, each when what it needs is done; yields
    each as it ends. What was done stays done, whatever happens to the others.

    skip: is asked of a step when it could begin; capped: where a run is portable, with the caps of
    mvrepro.determinism.
    Raises UserError when a step fails, when a process dies, and for steps whose inputs changed meanwhile.
    """
    write_atomic(probe := RESULTS / f"{TEMPORARY}probe", b"")  # say at once, not after minutes, what can't be written
    probe.unlink()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or min(cores, MOST_JOBS)
    behind = {step.name: {o.name for o in steps if o is not step and step.needs(o)} for step in steps}
    waiting, done, moved = list(steps), set[str](), list[str]()
    running: dict[Future[None], tuple[Step, str]] = {}
    bar, pools = tqdm(total=len(steps), unit="step", disable=None), [_workers(jobs, False), _workers(jobs, True)]
    try:
        while waiting or running:
            ready = [s for s in waiting if behind[s.name] <= done]
            if not ready and not running:
                raise UserError(f"dvc.yaml goes in a circle: {', '.join(s.name for s in waiting)} wait for each other")
            for step in ready[: jobs - len(running)]:
                waiting.remove(step)
                if skip(step):
                    done.add(step.name)
                    bar.update()
                else:
                    pool, before = pools[capped and (step.config is None or step.config.portable)], step.inputs()
                    try:
                        with deaf():  # the workers, which `submit` starts: who started them ends them
                            running[pool.submit(step.compute)] = step, before
                    except BrokenProcessPool:  # one died since, and its step has not been heard of yet
                        raise _died([step, *(s for s, _ in running.values())]) from None
            finished = wait(running, return_when=FIRST_COMPLETED).done if running else set()
            # Those that failed last: what ended in the same instant is done and stays done.
            for future in sorted(finished, key=lambda f: f.exception() is not None):
                step, before = running.pop(future)
                try:
                    future.result()
                except UserError as error:
                    raise UserError(f"{step.name}: {error}\n{AGAIN}") from None
                except BrokenProcessPool:
                    raise _died([step, *(s for s, _ in running.values())]) from None
                done.add(step.name)
                bar.update()
                bar.set_postfix_str(step.name)
                if bar.disable:
                    print(f"[{len(done)}/{len(steps)}] {step.name}", flush=True)
                if step.inputs() == before:
                    yield step
                else:
                    moved.append(step.name)
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown()
        bar.close()
    if moved:
        raise UserError(f"what {', '.join(moved)} is made from changed while it was: run the same command again")


def _workers(jobs: int, capped: bool) -> ProcessPoolExecutor:
    set_environment(threads=1)
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (capped,))


def _begin(capped: bool) -> None:
    """What a worker does first: it prints to .mvrepro/log, and ends when its parent does, however that ended."""
    set_environment(threads=1, portable=capped)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for good: the parent ends its workers
    os.chdir(ROOT)
    LOCAL.mkdir(parents=True, exist_ok=True)
    with (LOCAL / "log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that outlives a process that is killed
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def keep_committed(path: Path) -> None:
    """Where all of a record but its provenance is that of the committed one, which may have been taken over from older
    code, keep that one: it says where the values first came from, and a reproduction that finds the same leaves no
    change in git."""
    before, apart = committed(path) if path.is_relative_to(RESULTS) else None, {"provenance": "", "taken": ""}
    if before and json.loads(before) | apart == read_json(path) | apart:
        write_atomic(path, before)
