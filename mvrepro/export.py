"""Backbones for others to use: safetensors with the settings that rebuild them, and ONNX (extra "onnx")."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mvrepro import networks_large
from mvrepro.errors import UserError
from mvrepro.files import write_atomic


def save_backbone(path: Path, model: nn.Module, name: str, embedding_dim: int) -> None:
    """Weights and buffers in one .safetensors file, whole or not at all; its metadata rebuild the network."""
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in model.state_dict().items()}
    about = json.dumps({"backbone": name, "embedding_dim": embedding_dim})
    write_atomic(path, save(tensors, metadata={"mvrepro": about}))


def load_backbone(path: Path) -> nn.Module:
    """What save_backbone wrote, in evaluation mode. Raises UserError for files that are none or don't fit."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("mvrepro", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a readable backbone: {error}") from None
    if not isinstance(about, dict) or about.keys() != {"backbone", "embedding_dim"}:
        raise UserError(f"{path} does not say which backbone it holds: it was not written by save_backbone")
    model = networks_large.build(about["backbone"], about["embedding_dim"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {about['backbone']}: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


def save_onnx(path: Path, model: nn.Module, side: int = networks_large.SIDE) -> None:
    """The network in evaluation mode as one ONNX file: "images" (B, 3, side, side) float32 -> "embeddings" (B, D).

    B may be any number. Raises UserError where the extra is not installed. One ONNX file holds 2 GiB at most.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'exporting to ONNX needs an extra ({error}): pip install "mvrepro[onnx]"') from None
    training = model.training
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder, "model.onnx")
        try:
            torch.onnx.export(
                model.eval(),
                (torch.zeros(2, 3, side, side),),
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
