"""What is computed, from what, as steps: runs out of params.yaml, pages and tables out of dvc.yaml."""

import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvrepro.errors import UserError
from mvrepro.files import LOCAL, RESULTS, ROOT, display, read_yaml
from mvrepro.provenance import TRAINING, code_hash
from mvrepro.training.config import TrainConfig, from_settings

ASIDE = ("bench", "gpu", "published")  # stages computed where they are asked for by name, and else taken as they lie


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


def _flat(value: Any) -> list[Any]:
    return [inner for part in value for inner in _flat(part)] if isinstance(value, list) else [value]


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


def profiles(steps: Sequence[Step]) -> list[str]:
    """Whose runs are among these."""
    return list(dict.fromkeys(s.config.profile for s in steps if s.config))


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
