"""Accuracy on InsightFace's pair sets while training, by the protocol of mvrepro.protocols.kfold_accuracy."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mvrepro import networks, protocols
from mvrepro.errors import UserError
from mvrepro.images import Pairs, decode, read_bin
from mvrepro.training.batches import normalised
from mvrepro.training.config import ScaleConfig
from mvrepro.training.network import Network

BLOCK = 256  # images decoded at once


def open_pairs(config: ScaleConfig) -> dict[str, Pairs]:
    """The sets by their files' names. Raises UserError for what is none, and for sets that can't be judged."""
    sets: dict[str, Pairs] = {}
    for path in map(Path, config.verify):
        if path.stem in sets:
            raise UserError(f"--verify: two sets are called {path.stem}")
        sets[path.stem] = pairs = read_bin(path)
        try:
            protocols.kfold_accuracy(np.arange(float(len(pairs))), pairs.same, pairs.folds)
        except ValueError as error:
            raise UserError(f"{path}: ten folds can't be made of its {len(pairs)} pairs: {error}") from None
        _decode(pairs, path.stem, range(1), config.image_size)
    return sets


def verify(network: Network, sets: dict[str, Pairs]) -> dict[str, float]:
    """name -> accuracy, and "name std" over the folds. Every rank calls it, embeds its share of the images, and gets
    the same figures. Neither weights nor random numbers change."""
    ranks, config = network.ranks, network.config
    for buffer in network.backbone.buffers():  # rank 0's running statistics are those that are saved
        dist.broadcast(buffer, 0)
    figures: dict[str, float] = {}
    for name, pairs in sets.items():
        mine = range(ranks.rank, len(pairs.images), ranks.count)
        with ranks.together():
            parts = [np.empty((0, config.embedding_dim), np.float32)]
            for start in range(0, len(mine), BLOCK):
                images = _decode(pairs, name, mine[start : start + BLOCK], config.image_size).to(ranks.device)
                with network.half():
                    pixels = normalised(images, config.channels_last)
                    parts.append(networks.embed(network.backbone, pixels, mirror=config.flip).numpy())
        embeddings = np.empty((len(pairs.images), config.embedding_dim), np.float32)
        for rank, rows in enumerate(ranks.gather(np.concatenate(parts))):
            embeddings[rank :: ranks.count] = rows
        left = np.arange(0, len(embeddings), 2)
        try:
            result = protocols.kfold_accuracy(
                protocols.pair_cosines(embeddings, left, left + 1), pairs.same, pairs.folds
            )
        except ValueError as error:
            raise UserError(f"{name} can't be judged, the network gives no directions any more: {error}") from None
        figures |= {name: result.mean, f"{name} std": result.std}
    return figures


def _decode(pairs: Pairs, name: str, numbers: range, size: int) -> Tensor:
    images: list[Any] = []
    for i in numbers:
        try:
            pixels = decode(pairs.images[i])
        except ValueError as error:
            raise UserError(f"{name}: image {i} does not decode: {error}") from None
        if pixels.shape[1:] != (size, size):
            raise UserError(f"{name}: image {i} has {pixels.shape[2]}×{pixels.shape[1]} pixels, expected {size}×{size}")
        images.append(pixels)
    return torch.from_numpy(np.stack(images))
