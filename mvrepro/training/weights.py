"""Backbone and head in one safetensors file, with the settings that built them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mvrepro.errors import UserError
from mvrepro.files import write_atomic
from mvrepro.heads.margin import MarginHead

if TYPE_CHECKING:
    from mvrepro.training.train import TrainConfig


def save_checkpoint(path: Path, backbone: nn.Module, head: MarginHead, config: "TrainConfig") -> None:
    """Write both modules' state, whole or not at all."""
    tensors = {f"backbone.{k}": v.contiguous() for k, v in backbone.state_dict().items()}
    tensors |= {f"head.{k}": v.contiguous() for k, v in head.state_dict().items()}
    write_atomic(path, save(tensors, metadata={"config": json.dumps(asdict(config))}))


def load_checkpoint(path: Path, backbone: nn.Module, head: MarginHead) -> None:
    """Fill both modules with the weights of a checkpoint; its loss may differ (that is how an MV loss
    starts from a margin model), its shapes may not. Raises UserError that names what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from None
    for prefix, module in (("backbone.", backbone), ("head.", head)):
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        expected = module.state_dict()
        wrong = [
            f"{prefix}{name} is {tuple(state[name].shape) if name in state else 'missing'}, "
            f"expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name not in state or state[name].shape != tensor.shape
        ]
        wrong += [f"{prefix}{name} is not part of this model" for name in sorted(state.keys() - expected.keys())]
        if wrong:
            raise UserError(f"{path} does not fit this model: {wrong[0]} ({len(wrong)} differences)")
        module.load_state_dict(state)
    head.step.zero_()  # warm-ups count the steps of the new training
