"""Other people's heads, backbones and embeddings.

How class weights lie in the files of others (K classes, D dimensions; every head normalises them when used):

| layout | file | weight |
| --- | --- | --- |
| arcface_torch | checkpoint_gpu_RANK.pt: {"state_dict_softmax_fc": {"weight": …}, …}, a file a rank | (K/R, D) |
| | RANK's softmax_fc_gpu_RANK.pt: {"weight": …}, or rank_RANK_softmax_weight.pt: a tensor (older versions) | (K/R, D) |
| facex-zoo | Epoch_N.pt: {"state_dict": {"head.weight": …, "backbone.…": …}, …} | (D, K) |

Of R ranks, PartialFC gives the first K mod R one class more than the others, in order (arcface_torch,
partial_fc_v2.py and train_v2.py; FaceX-Zoo, head/*.py and conventional_training/train.py). FaceX-Zoo's mv_weight is
1 + t, and its margin of MV applies where cosθ_y is above m (AM) or 0 (Arc) only. InsightFace's margins (m1, m2, m3) are
this project's m1, m3 and m2.
Files are read with torch.load(weights_only=True): tensors and plain containers, and nothing that runs.
"""

import io
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvrepro.errors import UserError
from mvrepro.files import write_atomic
from mvrepro.heads.margin import MarginHead
from mvrepro.networks import IResNet

LAYOUTS = ("arcface_torch", "facex-zoo")


def load_head(head: MarginHead, layout: str, paths: Path | Sequence[Path]) -> None:
    """Fill head.weight (K, D) from the files of others; for arcface_torch one file a rank, sorted here by the
    number in their names. Raises UserError that names the file and what does not fit; head is as it was then."""
    files = [paths] if isinstance(paths, Path) else list(paths)
    _known(layout)
    if not files:
        raise UserError(f"no files of {layout} were given")
    expected = (head.num_classes, head.embedding_dim)
    if layout == "facex-zoo":
        if len(files) != 1:
            raise UserError(f"facex-zoo keeps a head in one file, got {len(files)}")
        weight = _tensor(_load(files[0]), ("state_dict", "head.weight"), files[0]).T
    else:
        files = sorted(files, key=_rank)
        ranks = [_rank(file) for file in files]
        if len(files) > 1 and ranks != list(range(len(files))):
            raise UserError(f"the files of {len(files)} ranks must be those of 0 … {len(files) - 1}, got {ranks}")
        parts = [_tensor(_load(file), ("state_dict_softmax_fc", "weight"), file) for file in files]
        for file, part, count in zip(files, parts, shares(head.num_classes, len(files)), strict=True):
            if tuple(part.shape) != (count, head.embedding_dim):
                raise UserError(
                    f"{file}: its weight is {tuple(part.shape)}, expected {(count, head.embedding_dim)}, the part of "
                    f"{expected} that one of {len(files)} ranks holds: another number of classes, or files are missing"
                )
        weight = torch.cat(parts)
    if tuple(weight.shape) != expected:
        raise UserError(
            f"{files[0]}: its weight is {tuple(weight.T.shape)}, expected {expected[::-1]} as {layout} lays it (D, K) "
            f"for {expected[0]} classes"
        )
    with torch.no_grad():
        head.weight.copy_(weight)


def save_head(head: MarginHead, layout: str, out: Path, ranks: int = 1) -> list[Path]:
    """The reverse: facex-zoo into the file `out`, arcface_torch into out/checkpoint_gpu_RANK.pt, one a rank.

    Only the head's part of a checkpoint is written: their training wants backbone and optimiser beside it.
    """
    _known(layout)
    weight = head.weight.detach().cpu()
    if layout == "facex-zoo":
        if ranks != 1:
            raise UserError("facex-zoo keeps a head in one file")
        _save(out, {"state_dict": {"head.weight": weight.T.contiguous()}})
        return [out]
    if not 1 <= ranks <= head.num_classes:
        raise UserError(f"ranks must be in 1 … {head.num_classes}, got {ranks}")
    paths = [out / f"checkpoint_gpu_{rank}.pt" for rank in range(ranks)]
    for path, part in zip(paths, weight.split(shares(head.num_classes, ranks)), strict=True):
        _save(path, {"state_dict_softmax_fc": {"weight": part.clone()}})
    return paths


def load_iresnet(model: IResNet, path: Path) -> None:
    """Fill an IResNet (backbones_large.build("iresnet-50") and the like) with a backbone of arcface_torch: model.pt, or
    the "state_dict_backbone" of a checkpoint. Raises UserError that names what doesn't fit; model is unchanged then."""
    value = _load(path)
    if isinstance(value, Mapping) and "state_dict_backbone" in value:
        value = value["state_dict_backbone"]
    if not (isinstance(value, Mapping) and all(isinstance(x, Tensor) for x in value.values())):
        raise UserError(f"{path}: expected the weights of a backbone by name, got {type(value).__name__}")
    theirs = {_arcface_name(name, model): name for name in model.state_dict()}
    wrong = sorted(theirs.keys() ^ value.keys())
    if wrong:
        where = "the file" if wrong[0] in value else "the model"
        raise UserError(f"{path} is no such IResNet: {wrong[0]} is only in {where} ({len(wrong)} such names)")
    for name, ours in theirs.items():
        if value[name].shape != model.state_dict()[ours].shape:
            raise UserError(
                f"{path}: {name} is {tuple(value[name].shape)}, expected {tuple(model.state_dict()[ours].shape)}"
            )
    model.load_state_dict({theirs[name]: tensor for name, tensor in value.items()})


def _arcface_name(name: str, model: IResNet) -> str:
    """What arcface_torch (backbones/iresnet.py) calls a weight or buffer of our IResNet."""
    part, number, *rest = name.split(".")
    outer = {"body": ("conv1", "bn1", "prelu"), "neck": ("bn2", "", "fc", "features")}[part]
    if int(number) < len(outer):
        return ".".join([outer[int(number)], *rest])
    blocks = list(model.body)[len(outer) :]
    at = int(number) - len(outer)
    firsts = [i for i, block in enumerate(blocks) if not isinstance(block.shortcut, nn.Identity)]  # of each stage
    stage = sum(first <= at for first in firsts)
    inner = "downsample"
    if rest[0] == "residual":
        inner, rest = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")[int(rest[1])], rest[1:]
    return ".".join([f"layer{stage}", str(at - firsts[stage - 1]), inner, *rest[1:]])


def shares(classes: int, ranks: int) -> list[int]:
    """How many classes each rank holds, in order."""
    return [classes // ranks + (rank < classes % ranks) for rank in range(ranks)]


def load_embeddings(path: Path) -> NDArray[np.floating[Any]]:
    """(N, D) floats out of a .npy file, memory-mapped. Raises UserError for what is none, and for a pickle in it."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = "it holds no plain array of numbers" if "pickle" in str(error) else error
        raise UserError(f"{path} is not a readable .npy file: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays (.npz); save the embeddings with numpy.save")
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{path}: expected floats (N, D), got {array.dtype} {array.shape}")
    return array


def _known(layout: str) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known are: {', '.join(LAYOUTS)}")


def _rank(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {asked.group(1)}" if asked else "is none that holds tensors alone"
        raise UserError(f"{path}: refused: this checkpoint {what}; nothing of it was run") from None
    except Exception as error:  # of damaged files, torch raises all sorts of things
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole checkpoint: {reason}") from None


def _tensor(value: Any, keys: tuple[str, str], path: Path) -> Tensor:
    """The weight in a checkpoint: under both keys, under the last alone, or the value itself."""
    for key in keys:
        if isinstance(value, Mapping) and key in value:
            value = value[key]
    if not (isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()):
        found = (
            f"its keys are {', '.join(map(str, list(value)[:6]))}"
            if isinstance(value, Mapping)
            else type(value).__name__
        )
        raise UserError(f"{path}: no class weights under {' and '.join(keys)}; {found}")
    return value


def _save(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())
