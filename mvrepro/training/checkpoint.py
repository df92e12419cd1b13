"""The state of a run on disk, in one form: a folder that is there as a whole or not at all.

    manifest.json           what the run is and how far it came, by which code and versions; the SHA-256 of each file
                            and of itself
    common.safetensors      backbone, its momentum
    rank-0.safetensors …    a rank's classes, their momentum, its generators of random numbers

Snapshots of a run are such folders, step-00001000 and so on: to go on from, to the bit. All ranks write into a folder
with another name, every file is forced to disk, the manifest last; then the folder gets its name, and only then older
ones go. Whoever is killed in between leaves the previous ones as they were. On several machines the folder must be one
that all of them see.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvrepro.errors import UserError, explain_os_error, first_words
from mvrepro.files import TEMPORARY, display, is_number, read_json, sha256, sync, write_json
from mvrepro.training.network import Network, part_of
from mvrepro.training.ranks import Ranks

COMMON = "common.safetensors"


@dataclass(frozen=True)
class Snapshots:
    """Of one run.

    folder   where they lie
    about    what a run that goes on must share, by name
    code     the hash of the code that trains; the versions of torch and numpy count as well
    keep     how many stay
    """

    folder: Path
    about: dict[str, Any]
    code: str
    keep: int
    ranks: Ranks

    def steps(self) -> list[int]:
        """Those that are there, the newest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if is_number(name)), reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def clear(self) -> None:
        """Remove what a writer that was killed left behind. Rank 0 alone."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)

    def write(self, step: int, network: Network, progress: dict[str, Any]) -> None:
        """Keep this step, and of the others the newest. Every rank calls it; see write_checkpoint."""
        write_checkpoint(self.path(step), step, network, self._manifest(), progress)
        with self.ranks.together():
            if self.ranks.rank == 0:
                for old in self.steps()[self.keep :]:
                    _remove(self.path(old))

    def read(self, *, despite_changes: bool = False) -> tuple[int, dict[str, Tensor], dict[str, Tensor], Any] | None:
        """(step, common, own, progress) of the newest whole snapshot, None where there is none. Every rank calls it.

        Rank 0 says which ones are damaged. Raises UserError where all are, where one is another run's, and, unless
        despite_changes, where other code or another torch wrote it: what follows would not be the same run.
        """
        present = self.ranks.gather(self.steps())[0]
        damaged = []
        for step in present:
            folder, own = self.path(step), _own(self.ranks.rank)
            faults = [text for text in self.ranks.gather(_fault(folder, {COMMON, own})) if text]
            if not faults:
                manifest = read_json(folder / "manifest.json")
                with self.ranks.together():
                    self._compare(manifest, folder, despite_changes)
                return step, _tensors(folder / COMMON), _tensors(folder / own), manifest["progress"]
            damaged.append(f"{folder} is damaged: {faults[0]}")
            self.ranks.say(damaged[-1])
        if damaged:
            raise UserError(f"no snapshot to go on from: {'; '.join(damaged)}")
        return None

    def _manifest(self) -> dict[str, Any]:
        versions = {name: torch.__version__ if name == "torch" else version(name) for name in ("torch", "numpy")}
        return json.loads(json.dumps({"about": self.about, "made_by": {"code": self.code, **versions}}))  # type: ignore[no-any-return]

    def _compare(self, manifest: dict[str, Any], folder: Path, despite_changes: bool) -> None:
        now = self._manifest()
        if other := _differences(manifest["about"], now["about"]):
            raise UserError(
                f"{display(folder)} is of another run: {other}. Go on with its settings and number of ranks, or begin "
                "a new run with another --out"
            )
        if not despite_changes and (other := _differences(manifest["made_by"], now["made_by"])):
            raise UserError(
                f"{display(folder)} was written by other code or versions: {other}. Go on with those, say "
                "--despite-changes to go on all the same, or begin a new run with another --out"
            )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def write_checkpoint(path: Path, step: int, network: Network, about: dict[str, Any], progress: dict[str, Any]) -> None:
    """A folder at `path`, in the place of what lay there. Every rank calls it; rank 0's common state counts.

    Raises UserError on all of them where one can't write, and where a weight is no longer a number.
    """
    aside, ranks = path.parent / f"{TEMPORARY}{path.name}", network.ranks
    own, name, hashes = network.own_state(), _own(ranks.rank), {}
    common = network.common_state() if ranks.rank == 0 else {}
    with ranks.together():
        _check_finite(step, common | own)
        if ranks.rank == 0:
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            except OSError as error:
                raise explain_os_error(error, f"write {display(aside)}", clean=True) from None
    try:
        with ranks.together():
            if ranks.rank == 0:
                hashes[COMMON] = _save(aside / COMMON, common)
            hashes[name] = _save(aside / name, own)
        everyones = {name: value for part in ranks.gather(hashes) for name, value in part.items()}
        with ranks.together():
            if ranks.rank == 0:
                built = {"backbone": network.config.backbone, **network.built}
                manifest = {"step": step, "built": built, **about, "progress": progress, "files": everyones}
                write_json(aside / "manifest.json", manifest | {"sha256": _digest(manifest)})
                _publish(aside, path)
    except UserError:
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, whole or damaged, and holds nothing else: one may take its place."""
    names = {found.name for found in path.iterdir()} if path.is_dir() else set()
    return "manifest.json" in names and all(name.endswith((".json", ".safetensors")) for name in names)


def read_backbone(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """What networks.build made the backbone of a checkpoint from, its run's settings, and its weights by name.
    Raises UserError."""
    if fault := _fault(path):
        raise UserError(f"{path} is not a readable checkpoint: {fault}")
    manifest = read_json(path / "manifest.json")
    return manifest["built"], manifest["about"], part_of(_tensors(path / COMMON), "backbone.")


def start_from(path: Path, network: Network) -> None:
    """Give the network the weights of a checkpoint; its loss may differ (that is how an MV loss starts from a margin
    model), and the number of ranks, its shapes may not. Raises UserError that names what does not fit."""
    _, _, backbone = read_backbone(path)
    ranks = [_tensors(path / _own(rank)) for rank in range(len(read_json(path / "manifest.json")["files"]) - 1)]
    parts = [state.get("head.weight", torch.empty(0)) for state in ranks]
    try:
        weight = torch.cat(parts)
    except RuntimeError:
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise UserError(f"{path} does not fit this model: head.weight is {shapes} in its ranks") from None
    expected = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in network.backbone.state_dict().items()}
    expected["head.weight"] = (network.head.num_classes, network.head.embedding_dim)
    found = {f"backbone.{name}": tuple(tensor.shape) for name, tensor in backbone.items()}
    found |= {"head.weight": tuple(weight.shape)} if len(weight) else {}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ] + [f"{name} is not part of this model" for name in sorted(found.keys() - expected.keys())]
    if wrong:
        raise UserError(f"{path} does not fit this model: {wrong[0]} ({len(wrong)} differences)")
    network.start_from(backbone, weight)


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a file holds. Raises UserError for what torch has no tensors for."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{display(path)} can't be read: {first_words(error)}") from None


def _own(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _fault(folder: Path, names: set[str] | None = None) -> str | None:
    """What is wrong with these files, or with any."""
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest.pop("sha256") != _digest(manifest):
            return "manifest.json does not have the SHA-256 that it names"
        files, parts = manifest["files"], ("about", "built", "files", *(("made_by", "progress") if names else ()))
        if not all(isinstance(manifest[part], dict) for part in parts):
            return "manifest.json is not whole"
        if files.keys() != {COMMON, *map(_own, range(max(1, len(files) - 1)))}:
            return "manifest.json names other files than a checkpoint has"
        # Of another number of ranks there may be no file for this one: the comparison says so.
        for name in files.keys() & names if names else files:
            if sha256(folder / name) != files[name]:
                return f"{name} does not have the SHA-256 that manifest.json names"
            with safe_open(folder / name, "pt"):  # which reads the header and holds it against the file's size
                pass
    except SafetensorError as error:
        return f"{name} can't be read ({first_words(error)})"
    except OSError as error:
        return f"{Path(error.filename or folder).name} can't be read ({error.strerror})"
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is not whole"
    return None


def _publish(aside: Path, path: Path) -> None:
    try:
        sync(aside)
        if path.exists():  # a corrupt one, which a run from an earlier one has come past
            _remove(path)
        aside.rename(path)
        sync(path.parent)
    except OSError as error:
        raise explain_os_error(error, f"write {display(path)}", clean=True) from None


def _remove(path: Path) -> None:
    """By renaming first: half a checkpoint never has a checkpoint's name."""
    gone = path.parent / f"{TEMPORARY}gone-{path.name}"
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError as error:
        raise explain_os_error(error, f"remove {display(path)}") from None


def _check_finite(step: int, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"after step {step} {name} holds NaN or infinity: no snapshot was written")


def _save(path: Path, state: dict[str, Tensor]) -> str:
    """Write and force to disk; returns the SHA-256 of the file."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, path)
        path.chmod(0o644)  # safetensors keeps others out
        sync(path)
        return sha256(path)
    except OSError as error:
        raise explain_os_error(error, f"write {display(path)}", clean=True) from None
    except SafetensorError as error:  # what it makes of a full disk
        number = re.search(r"os error (\d+)", str(error))
        fault = OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
        raise explain_os_error(fault, f"write {display(path)}", clean=True) from None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
