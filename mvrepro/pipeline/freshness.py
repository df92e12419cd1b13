"""Whether what lies here belongs to the code and the settings that are here.

A run is current where a record holds the settings that are wanted and the hash of today's code. DVC says by content
(dvc.lock) which other results belong to the files that are here. Since all of that is committed, a clone is current
and `dvc repro` computes nothing there: `make reproduce` asks what this machine has computed from this code, which a
local, ignored file remembers (Memory).
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mvrepro.errors import UserError
from mvrepro.files import LOCAL, RESULTS, ROOT, display, read_json, write_atomic, write_json
from mvrepro.pipeline import plan
from mvrepro.pipeline.plan import Step, digest, network_of
from mvrepro.provenance import code_hash, code_parts, committed, config_hash, in_git
from mvrepro.training.config import from_settings

CODE, COMPUTED = RESULTS / "code.json", LOCAL / "computed.json"
NO_RECORD, OTHER_SETTINGS = "has no record", "was made with other settings"  # why a run is not current
OTHER_CODE, OTHER_BASE = "was made by other code", "began with a network of other settings"


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


def stale(steps: Sequence[Step]) -> dict[str, str]:
    """Name -> reason, for those whose committed results don't belong to the files that are here."""
    reasons = lacking(steps)
    now, noted = code_parts(), read_json(CODE) if CODE.is_file() else {}
    states = json.loads(dvc("status", "--json")) if in_git() else {}  # DVC wants git
    parts = {s.name: s.parts for s in steps if not s.config} | {f"runs@{p}": () for p in plan.profiles(steps)}
    for name in parts:
        texts = [f"the code of {part} changed" for part in parts[name] if now.get(part) != noted.get(part)]
        for entry in states.get(name, []):
            texts += [f"{k}: {', '.join(v)}" for k, v in entry.items()] if isinstance(entry, dict) else [entry]
        if texts:
            reasons[name] = "; ".join(texts)
    return reasons


def strays(profile: str) -> list[str]:
    """What is wrong with each file among a profile's results that nothing writes: pages read such runs, too."""
    written = {out for s in plan.stages() for out in s.writes if not s.name.startswith("runs@")}
    written |= {out for run in (plan.runs(profile) if profile in plan.known() else []) for out in run.writes}
    folders = [RESULTS / kind / profile for kind in ("executed", "figures", "runs", "values")]
    unknown = [path for path in plan.files(folders) if not written & {path, *path.parents}]
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
    names = {"code", *(s.name for s in steps if not s.config), *(f"runs@{p}" for p in plan.profiles(steps))}
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
    if stages_found is None or stages_before & {stage.name for stage in plan.stages()} - stages_found:
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


def keep_committed(path: Path) -> None:
    """Where all of a record but its provenance is that of the committed one, which may have been taken over from older
    code, keep that one: it says where the values first came from, and a reproduction that finds the same leaves no
    change in git."""
    before, apart = committed(path) if path.is_relative_to(RESULTS) else None, {"provenance": "", "taken": ""}
    if before and json.loads(before) | apart == read_json(path) | apart:
        write_atomic(path, before)
