"""The state of a run on disk: one folder a step, there as a whole or not at all.

    OUT/snapshots/step-00001000/
        manifest.json           what the run is, and the SHA-256 of each file and of itself
        common.safetensors      backbone, its momentum
        rank-0.safetensors …    a rank's classes, their momentum, its generators of random numbers

All ranks write into a folder with another name, every file is forced to disk, the manifest last; then the folder gets
its name, and only then older ones go. Whoever is killed in between leaves the previous snapshots as they were. On
several machines OUT must be a folder that all of them see.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import TEMPORARY, display, write_json
from mvrepro.training.ranks import Ranks

COMMON = "common.safetensors"


class Snapshots:
    """Of one run. folder: OUT/snapshots; about: what a run that goes on must share, by name; keep: how many stay."""

    def __init__(self, folder: Path, about: dict[str, Any], keep: int, ranks: Ranks) -> None:
        self.folder, self.about, self.keep, self.ranks = folder, about, keep, ranks

    def steps(self) -> list[int]:
        """Those that are there, the newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def clear(self) -> None:
        """Remove what a writer that was killed left behind. Rank 0 alone."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def write(self, step: int, common: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """Every rank calls it; rank 0's `common` counts. Raises UserError on all of them where one can't write, and
        where a weight is no longer a number."""
        aside, ranks = self.folder / f"{TEMPORARY}step-{step:08d}", self.ranks
        with ranks.together():
            _check_finite(step, common | own)
            if ranks.rank == 0:
                try:
                    shutil.rmtree(aside, ignore_errors=True)
                    aside.mkdir(parents=True)
                except OSError as error:
                    raise explain_os_error(error, f"write {display(aside)}") from None
        hashes: dict[str, str] = {}
        try:
            with ranks.together():
                if ranks.rank == 0:
                    hashes[COMMON] = _save(aside / COMMON, common)
                name = _own(ranks.rank)
                hashes[name] = _save(aside / name, own)
            everyones = {name: value for part in ranks.gather(hashes) for name, value in part.items()}
            with ranks.together():
                if ranks.rank == 0:
                    manifest = {"step": step, "about": self.about, "files": everyones}
                    write_json(aside / "manifest.json", manifest | {"sha256": _digest(manifest)})
                    self._publish(aside, step)
        except UserError:
            if ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _publish(self, aside: Path, step: int) -> None:
        try:
            _sync(aside)
            if self.path(step).exists():  # a corrupt one, which a run from an earlier one has come past
                self._remove(step)
            aside.rename(self.path(step))
            _sync(self.folder)
            for old in self.steps()[self.keep :]:
                self._remove(old)
        except OSError as error:
            raise explain_os_error(error, f"write {display(self.path(step))}") from None

    def _remove(self, step: int) -> None:
        """By renaming first: half a snapshot never has a snapshot's name."""
        gone = self.folder / f"{TEMPORARY}gone-{step:08d}"
        shutil.rmtree(gone, ignore_errors=True)
        self.path(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def read(self) -> tuple[int, dict[str, Tensor], dict[str, Tensor]] | None:
        """(step, common, own) of the newest whole snapshot, None where there is none at all. Every rank calls it.

        Rank 0 says which ones are damaged. Raises UserError where all are, and where one is another run's.
        """
        present = self.ranks.gather(self.steps())[0]
        damaged = []
        for step in present:
            fault = self._fault(step)
            faults = [text for text in self.ranks.gather(fault) if text]
            if not faults:
                with self.ranks.together():
                    self._compare(self._manifest(step)["about"], step)
                folder = self.path(step)
                return step, load_file(folder / COMMON), load_file(folder / _own(self.ranks.rank))
            damaged.append(f"{self.path(step)} is damaged: {faults[0]}")
            self.ranks.say(damaged[-1])
        if damaged:
            raise UserError(f"no snapshot to go on from: {'; '.join(damaged)}")
        return None

    def _manifest(self, step: int) -> Any:
        return json.loads((self.path(step) / "manifest.json").read_text(encoding="utf-8"))

    def _fault(self, step: int) -> str | None:
        """What is wrong with the files that this rank needs."""
        folder = self.path(step)
        try:
            manifest = self._manifest(step)
            sha256 = manifest.pop("sha256")
            if sha256 != _digest(manifest):
                return "manifest.json does not have the SHA-256 that it names"
            # Of another number of ranks there may be no file for this one: the comparison says so.
            names = [name for name in (COMMON, _own(self.ranks.rank)) if name in manifest["files"]]
            for name in names:
                if _sha256(folder / name) != manifest["files"][name]:
                    return f"{name} does not have the SHA-256 that manifest.json names"
        except OSError as error:
            return f"{Path(error.filename or folder).name} can't be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "manifest.json is not whole"
        return None

    def _compare(self, about: dict[str, Any], step: int) -> None:
        now = json.loads(json.dumps(self.about))
        different = [
            f"{name} was {about.get(name)}, is {now.get(name)}"
            for name in {**now, **about}
            if about.get(name) != now.get(name)
        ]
        if different:
            raise UserError(
                f"{display(self.path(step))} is of another run: {'; '.join(different)}. Go on with its settings and "
                "number of ranks, or begin a new run with another --out"
            )


def _own(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _check_finite(step: int, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"after step {step} {name} holds NaN or infinity: no snapshot was written")


def _save(path: Path, state: dict[str, Tensor]) -> str:
    """Write and force to disk; returns the SHA-256 of the file."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, path)
        path.chmod(0o644)  # safetensors keeps others out
        _sync(path)
        return _sha256(path)
    except OSError as error:
        raise explain_os_error(error, f"write {display(path)}") from None
    except SafetensorError as error:  # what it makes of a full disk
        raise UserError(f"could not write {display(path)}: {error}; nothing half-written was kept") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
