"""What goes to and comes from others: heads, backbones and embeddings.

Our own backbones lie in safetensors files whose metadata rebuild them, or in ONNX (extra "onnx"). Those of others are
read with torch.load(weights_only=True): tensors and plain containers, and nothing that runs.

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
"""

import io
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mvrepro import networks
from mvrepro.errors import UserError, first_words
from mvrepro.files import write_atomic
from mvrepro.heads.margin import MarginHead

SIZES = {"in_channels": (1, 1024), "image_size": (1, 4096), "embedding_dim": (1, 65536)}  # of a backbone's file
OURS, INSIGHTFACE = (127.5, 128.0), (127.5, 127.5)  # mean and std of pixels 0 … 255

# where a checkpoint has the weight of a head
LAYOUTS = {"arcface_torch": ("state_dict_softmax_fc", "weight"), "facex-zoo": ("state_dict", "head.weight")}


def load_head(head: MarginHead, layout: str, paths: Path | Sequence[Path]) -> None:
    """Fill head.weight (K, D) from the files of others; for arcface_torch one file a rank, sorted here by the number in
    their names. Raises UserError that names the file and what does not fit; head is as it was then."""
    files = [paths] if isinstance(paths, Path) else sorted(paths, key=_rank)
    counts, across = _shares(head, layout, len(files)), layout == "facex-zoo"
    if len(files) > 1 and (ranks := [_rank(file) for file in files]) != list(range(len(files))):
        raise UserError(f"the files of {len(files)} ranks must be those of 0 … {len(files) - 1}, got {ranks}")
    parts = [_tensor(_load(file), LAYOUTS[layout], file) for file in files]
    for file, part, count in zip(files, parts, counts, strict=True):
        expected = (head.embedding_dim, count) if across else (count, head.embedding_dim)
        if tuple(part.shape) != expected:
            raise UserError(
                f"{file}: its weight is {tuple(part.shape)}, expected {expected} as {layout} lays it for "
                f"{head.num_classes} classes in {len(files)} files: another number of classes, or files are missing"
            )
    with torch.no_grad():
        head.weight.copy_(parts[0].T if across else torch.cat(parts))


def save_head(head: MarginHead, layout: str, out: Path, ranks: int = 1) -> list[Path]:
    """The reverse: facex-zoo into the file `out`, arcface_torch into out/checkpoint_gpu_RANK.pt, one a rank.

    Only the head's part of a checkpoint is written: their training wants backbone and optimiser beside it.
    """
    parts = list(head.weight.detach().cpu().split(_shares(head, layout, ranks)))
    paths = [out / f"checkpoint_gpu_{rank}.pt" for rank in range(ranks)]
    if layout == "facex-zoo":
        parts, paths = [parts[0].T], [out]
    outer, inner = LAYOUTS[layout]
    for path, part in zip(paths, parts, strict=True):
        buffer = io.BytesIO()
        torch.save({outer: {inner: part.clone(memory_format=torch.contiguous_format)}}, buffer)
        write_atomic(path, buffer.getvalue())
    return paths


def _shares(head: MarginHead, layout: str, files: int) -> list[int]:
    """How many classes each file holds, in order."""
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; known are: {', '.join(LAYOUTS)}")
    most, kept = (1, "one file") if layout == "facex-zoo" else (head.num_classes, f"1 … {head.num_classes} files")
    if not 1 <= files <= most:
        raise UserError(f"{layout} keeps a head in {kept}, got {files}")
    return [head.num_classes // files + (rank < head.num_classes % files) for rank in range(files)]


def load_iresnet(model: networks.IResNet, path: Path) -> None:
    """Fill an IResNet (networks.build("iresnet-50", …) and the like) with a backbone of arcface_torch: model.pt, or the
    "state_dict_backbone" of a checkpoint; with or without DDP's "module." and counts of batches. Their training keeps
    the scale of the last batch norm, features.weight, at 1; "iresnet-50-fixed" and the like do so, too.
    Raises UserError that names what doesn't fit; model is unchanged then."""
    found = _load(path)
    if isinstance(found, Mapping) and "state_dict_backbone" in found:
        found = found["state_dict_backbone"]
    if not (isinstance(found, Mapping) and all(isinstance(x, Tensor) for x in found.values())):
        raise UserError(f"{path}: expected the weights of a backbone by name, got {type(found).__name__}")
    theirs = {_arcface_name(name, model): name for name in model.state_dict()}
    value = {name: torch.tensor(0) for name in theirs if name.endswith(".num_batches_tracked")}
    value |= {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
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


def _arcface_name(name: str, model: networks.IResNet) -> str:
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


def save_backbone(
    path: Path,
    model: nn.Module,
    name: str,
    *,
    in_channels: int = 3,
    image_size: int = networks.SIDE,
    embedding_dim: int,
) -> None:
    """Weights and buffers in one .safetensors file, whole or not at all, with what networks.build was called with."""
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in model.state_dict().items()}
    about = {"backbone": name, "in_channels": in_channels, "image_size": image_size, "embedding_dim": embedding_dim}
    write_atomic(path, save(tensors, metadata={"mvrepro": json.dumps(about)}))


def load_backbone(path: Path) -> nn.Module:
    """What save_backbone wrote, in evaluation mode. Raises UserError for files that are none or don't fit."""
    return read_backbone(path)[0]


def read_backbone(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """load_backbone, and what networks.build was called with."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("mvrepro", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a readable backbone: {error}") from None
    about = {"in_channels": 3, "image_size": networks.SIDE, **about} if isinstance(about, dict) else {}
    if about.keys() != {"backbone", *SIZES}:
        raise UserError(f"{path} does not say which backbone it holds: it was not written by save_backbone")
    return rebuilt(path, about, state), about


def rebuilt(path: Path, about: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The network that `about` says, with these weights, in evaluation mode. Raises UserError for what networks.build
    does not take, and before memory is taken for a network of which the file does not hold the weights."""
    name, sizes = about.get("backbone", ""), {key: value for key, value in about.items() if key != "backbone"}
    for key, (least, most) in SIZES.items():
        value = sizes.get(key)
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"{path} says {key} {value!r}, expected a number in {least} … {most}")
    try:
        with torch.device("meta"):
            wanted = networks.build(name, **sizes).state_dict()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{path} holds no {name} of {sizes}: {first_words(error)}") from None
    for key, tensor in wanted.items():
        found = tuple(state[key].shape) if key in state else "missing"
        if found != tuple(tensor.shape):
            raise UserError(f"{path} does not fit {name}: {key} is {found}, expected {tuple(tensor.shape)}")
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path} does not fit {name}: {key} is of {state[key].dtype}, expected {tensor.dtype}")
    model = networks.build(name, **sizes)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {name}: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


@dataclass(frozen=True)
class Embedder:
    """A network of anybody's, and what it says of its input: None where it says nothing.

    run         (B, C, S, S) float32 -> (B, D) floats; raises UserError where the images don't fit
    channels    C: 1, or 3, which colours come in RGB;  size  S;  batch  B
    normalise   (mean, std): what it takes is (pixel − mean)/std of pixels 0 … 255
    mirror      whether the embedding of the mirror image is added
    beside      files with weights of an ONNX network that lie beside it
    """

    run: Callable[[NDArray[np.float32]], NDArray[Any]]
    channels: int | None
    size: int | None
    batch: int | None = None
    normalise: tuple[float, float] = OURS
    mirror: bool | None = None
    beside: tuple[Path, ...] = ()


def embedder(model: nn.Module, about: dict[str, Any], mirror: bool | None = None) -> Embedder:
    """One of ours in evaluation mode, with what networks.build was called with."""
    run = lambda images: networks.embed(model, torch.from_numpy(images), mirror=False).numpy()  # noqa: E731
    return Embedder(run, about["in_channels"], about["image_size"], mirror=mirror)


def load_onnx(path: Path, threads: int = 0) -> Embedder:
    """An ONNX file with one input of images, (N, C, H, W) or (N, H, W, C), and embeddings (N, D) as its first output.

    A graph that begins with subtracting, scaling or a batch norm takes pixels as they are; one with the names that
    save_onnx gives, as ours do; others as InsightFace's, (pixel − 127.5)/127.5.
    threads: 0 is as many as there are cores. Raises UserError for what is no such network, and without the extra.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f'ONNX networks need an extra ({error}): pip install "mvrepro[onnx]"') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a core that is shared waits in vain
    try:
        network = onnx.load(path, load_external_data=False)
        beside = _external(path, network, onnx)
        graph = network.graph
        session = onnxruntime.InferenceSession(path, options, onnxruntime.get_available_providers())
    except UserError:
        raise
    except Exception as error:  # either has many errors of its own
        raise UserError(f"{path} is not a readable ONNX network: {first_words(error)}") from None
    inputs = session.get_inputs()
    shape = [side if isinstance(side, int) else None for side in inputs[0].shape] if len(inputs) == 1 else []
    if last := len(shape) == 4 and shape[1] not in (1, 3) and shape[3] in (1, 3):
        shape = [shape[0], shape[3], *shape[1:3]]
    if len(shape) != 4 or shape[1] not in (None, 1, 3) or shape[2] != shape[3] or inputs[0].type != "tensor(float)":
        found = "; ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs)
        raise UserError(f"{path}: expected one input of square images, float32 (N, C, H, W), got {found}")

    def run(images: NDArray[np.float32]) -> NDArray[Any]:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if last else images
        try:
            found = session.run(None, {inputs[0].name: images})[0]
        except Exception as error:
            raise UserError(f"{path} doesn't take images {images.shape}: {first_words(error)}") from None
        return np.asarray(found)

    ours = (inputs[0].name, session.get_outputs()[0].name) == ("images", "embeddings")
    normalise = (0.0, 1.0) if _scales(graph, inputs[0].name) else OURS if ours else INSIGHTFACE
    return Embedder(run, shape[1], shape[2], shape[0], normalise, beside=beside)


def _external(path: Path, network: Any, onnx: Any) -> tuple[Path, ...]:
    """The other files in which weights lie, in the folder of the network or below. Raises UserError where it names one
    that is elsewhere: what lies there would be read."""
    folder, found = path.absolute().parent, set()
    for tensor in _tensors(network, onnx):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
            file = (folder / place).resolve()
            if not file.is_relative_to(folder.resolve()) or not file.is_file():
                raise UserError(f"{path} has weights in {place!r}, which is no file in its folder: refused")
            found.add(file)
    return tuple(sorted(found))


def _tensors(message: Any, onnx: Any) -> Iterator[Any]:
    """Those of an ONNX network, wherever they stand: among its weights, in attributes, in graphs within graphs."""
    for field, value in message.ListFields():
        if field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                if isinstance(part, onnx.TensorProto):
                    yield part
                else:
                    yield from _tensors(part, onnx)


def _scales(graph: Any, name: str) -> bool:
    """Whether the first that happens to the images is that they are normalised."""
    for node in graph.node:
        if name in node.input:
            if node.op_type not in ("Cast", "Transpose", "Identity"):
                return node.op_type in ("Sub", "Add", "Mul", "Div", "BatchNormalization")
            name = node.output[0]
    return False


def save_onnx(path: Path, model: nn.Module, side: int = networks.SIDE) -> None:
    """The network in evaluation mode as one ONNX file: "images" (B, 3, side, side) float32 -> "embeddings" (B, D).

    B may be any number. Raises UserError where the extra is not installed. One ONNX file holds 2 GiB at most.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'exporting to ONNX needs an extra ({error}): pip install "mvrepro[onnx]"') from None
    training, device = model.training, next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder, "model.onnx")
        try:
            torch.onnx.export(
                model.eval(),
                (torch.zeros(2, 3, side, side, device=device),),
                aside,
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        finally:
            model.train(training)
        write_atomic(path, aside.read_bytes())


def load_embeddings(path: Path) -> NDArray[np.floating[Any]]:
    """(N, D) floats out of a .npy file, memory-mapped. Raises UserError for what is none, and for a pickle in it."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of damaged headers, NumPy raises all sorts of things
        reason = "it holds no plain array of numbers" if "pickle" in str(error) else first_words(error)
        raise UserError(f"{path} is not a readable .npy file: {reason}") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds several arrays (.npz); save the embeddings with numpy.save")
    if array.ndim != 2 or array.dtype.kind != "f" or not array.size:
        raise UserError(f"{path}: expected floats (N, D), got {array.dtype} {array.shape}")
    return array


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
        keys_there = f"its keys are {', '.join(map(str, list(value)[:6]))}" if isinstance(value, Mapping) else None
        raise UserError(f"{path}: no class weights under {' and '.join(keys)}; {keys_there or type(value).__name__}")
    return value
