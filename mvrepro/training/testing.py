"""The test of a network that is being trained: embeddings of the task's images, and what the task makes of them."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mvrepro import networks
from mvrepro.errors import UserError
from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sharded import ShardedHead
from mvrepro.protocols.verification import BINS
from mvrepro.training.batches import normalised
from mvrepro.training.logs import CURES, Diverged
from mvrepro.training.network import Network, most_looked_at
from mvrepro.training.tasks import Task, words

BLOCK = 256  # images embedded at once


class Tested(NamedTuple):
    """metrics and evidence as tasks.Task.judge gives them; features: what a toy task's drawings need."""

    metrics: dict[str, float]
    evidence: dict[str, Any]
    features: dict[str, Tensor]


class Test:
    """Of one run: every rank embeds its share of the images, read and decoded once, and rank 0 judges."""

    def __init__(self, task: Task, network: Network) -> None:
        self.task, self.network = task, network
        ranks = network.ranks
        self.rows = np.arange(ranks.rank, len(task.test), ranks.count)
        with ranks.together():
            self.pixels = task.test.read(self.rows)

    def run(self) -> Tested:
        """The same on all ranks, which all call it. Neither weights nor random numbers change. Raises UserError where
        the network gives no directions any more."""
        network, task = self.network, self.task
        ranks, config = network.ranks, network.config
        if ranks.count > 1:
            for buffer in network.backbone.buffers():  # rank 0's running statistics are those that are saved
                dist.broadcast(buffer, 0)
        parts = [np.empty((0, config.embedding_dim), np.float32)]
        with ranks.together():
            for start in range(0, len(self.pixels), BLOCK):
                parts.append(_embed(network, self.pixels[start : start + BLOCK], mirror=config.flip).numpy())
        embeddings = np.empty((len(task.test), config.embedding_dim), np.float32)
        for rank, rows in enumerate(ranks.gather(np.concatenate(parts))):
            embeddings[rank :: ranks.count] = rows
        weight = network.head.full_weight() if task.features else None
        found = Tested({}, {}, {})
        with ranks.together():
            if ranks.rank == 0:
                found = judge(task, embeddings, weight)
        metrics, evidence = ranks.gather((found.metrics, found.evidence))[0]
        return Tested(metrics, evidence, found.features)


def _embed(network: Network, pixels: NDArray[np.uint8], *, mirror: bool) -> Tensor:
    """networks.embed of images as they are read, in the arithmetic that the run has."""
    images = torch.from_numpy(pixels).to(network.ranks.device)
    with network.half():
        return networks.embed(network.backbone, normalised(images, network.config.channels_last), mirror=mirror)


SAMPLE = 2048  # training images that `learned` looks at, if they are not too many for so many classes
CALLED = {"target_cosine": "own_cosine", "negative_cosine": "other_cosine"}


def learned(task: Task, network: Network, curve: dict[str, list[float]]) -> dict[str, Any]:
    """Whether the network has learned, which a comparison of losses presupposes: on training images in evaluation
    mode top1, marked_share, median_p_y, own_cosine and other_cosine (MarginHead.watch and study); where one rank has
    all classes, histogram: counts of the cosines with the own class and with the nearest other one, in BINS equal steps
    from −1 to 1; loss_slope, nats an epoch over the last tenth of the epochs, two at least; and the mean
    gradient_distance over the run. Every rank calls it."""
    ranks = network.ranks
    count = min(SAMPLE, most_looked_at(network.head.num_classes))
    rows = np.random.default_rng(0).permutation(len(task.train))[:count][ranks.rank :: ranks.count]
    with ranks.together():
        embeddings = _embed(network, task.train.read(np.sort(rows)), mirror=False).to(ranks.device)
    network.head.eval()
    labels = torch.from_numpy(np.asarray(task.train.labels)[np.sort(rows)])
    found: dict[str, Any] = {CALLED.get(name, name): value for name, value in network.look(embeddings, labels).items()}
    if not isinstance(network.head, ShardedHead):
        found["histogram"] = _histogram(network.head, embeddings, labels)
    losses = curve["loss"][-max(2, len(curve["loss"]) // 10) :]
    if len(losses) > 1:
        found["loss_slope"] = round(float(np.polyfit(np.arange(len(losses)), losses, 1)[0]), 6)
    if curve.get("gradient_distance"):
        found["gradient_distance"] = round(float(np.mean(curve["gradient_distance"])), 6)
    return found


@torch.no_grad()
def _histogram(head: MarginHead, embeddings: Tensor, labels: Tensor) -> dict[str, str]:
    cosines, own = head.cosines(embeddings).cpu(), labels[:, None]
    sides = {"own": cosines.gather(1, own), "nearest_other": cosines.scatter(1, own, -2).amax(1)}
    counts = {side: np.histogram(found.numpy(), BINS, (-1, 1))[0] for side, found in sides.items()}
    return {side: words(found) for side, found in counts.items()}


def judge(task: Task, embeddings: NDArray[np.float32], weight: Tensor | None) -> Tested:
    """(N, D) embeddings of the task's test images, and where it wants them (K, D) class weights."""
    if not np.isfinite(embeddings).all():
        raise Diverged(f"the last step left no numbers in the network: {CURES}; no record was written")
    try:
        metrics, evidence = task.judge(embeddings, None if weight is None else weight.numpy())
    except ValueError as error:
        raise UserError(f"the test can't be judged, the network gives no directions any more: {error}") from None
    features = {}
    if weight is not None:
        ids = torch.from_numpy(np.asarray(task.test.labels))
        features = {"features": torch.from_numpy(embeddings), "ids": ids, "weights": weight}
    return Tested(metrics, evidence, features)
