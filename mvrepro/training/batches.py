"""Which image comes at which step, and having it on the device in time.

Order and mirroring follow from (seed, epoch) alone. A run that goes on at step n therefore sees what an unbroken one
sees there, however many processes read, and nothing about the data needs to be in a snapshot.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mvrepro.errors import UserError, first_words
from mvrepro.images import Images, Pixels
from mvrepro.training.config import TrainConfig
from mvrepro.training.ranks import Ranks


class Part(NamedTuple):
    """What one rank sees in one part of a step: rows (n,) int64 of the images, mirrored (n,) bool, and the share of
    the step's images that the part has, on all ranks together."""

    rows: NDArray[np.int64]
    mirrored: NDArray[np.bool_]
    share: float


class Order(Sampler[Part]):
    """The parts that a rank sees, from step `first` of a run to its last.

    Each epoch is a new permutation of the N images, cut into batches of B, those into the accumulated parts, and those
    into a piece for each rank. What is left at the end of an epoch is a smaller batch, if each piece of it has two
    images (batch norms need them). Raises UserError where B is too small for that.
    """

    def __init__(self, config: TrainConfig, images: int, rank: int = 0, ranks: int = 1) -> None:
        self.config, self.images, self.rank, self.ranks = config, images, rank, ranks
        pieces = ranks * config.accumulate
        least = min(config.batch_size, images)
        if least < 2 * pieces or config.batch_size % pieces:
            raise UserError(
                f"batch_size {config.batch_size} of {images} images over {ranks} ranks in {config.accumulate} parts: "
                f"must be a multiple of {pieces}, with two images at least for each rank and part"
            )
        whole, rest = divmod(images, config.batch_size)
        self.an_epoch = whole + (rest >= 2 * pieces)
        self.steps = config.steps or self.an_epoch * config.epochs
        self.first = 0

    def sizes(self) -> list[int]:
        """How many images each step of an epoch has, on all ranks together."""
        rest = self.images - self.config.batch_size * (self.an_epoch - 1)
        return [*[self.config.batch_size] * (self.an_epoch - 1), min(rest, self.config.batch_size)]

    def __iter__(self) -> Iterator[Part]:
        draws = torch.Generator().manual_seed(self.config.seed)
        cuts = np.cumsum([0, *self.sizes()])
        for start in range(0, self.steps, self.an_epoch):
            order = torch.randperm(self.images, generator=draws).numpy()
            mirrored = np.zeros(self.images, np.bool_)
            if self.config.flip:
                mirrored = (torch.rand(int(cuts[-1]), generator=draws) < 0.5).numpy()
            # An epoch that is over is drawn all the same: the next one's numbers are those of an unbroken run.
            for step in range(max(start, self.first), min(start + self.an_epoch, self.steps)):
                here = slice(*cuts[step - start : step - start + 2])
                yield from self._parts(order[here], mirrored[here])

    def _parts(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Iterator[Part]:
        for part in np.array_split(np.arange(len(rows)), self.config.accumulate):
            own = np.array_split(part, self.ranks)[self.rank]
            yield Part(rows[own], mirrored[own], len(part) / len(rows))


class Batch(NamedTuple):
    """images (n, C, S, S) uint8 on the device; labels (n,) int64 on the CPU, where the head sorts them, so that nothing
    waits for the device; share: as in Part."""

    images: Tensor
    labels: Tensor
    share: float


class Feed:
    """The batches of a rank from a step on, on its device. Images in memory lie there as a whole; others are read and
    decoded by processes beside the run, one iterator for all of it, so that no epoch begins with idle processes.

    waited   seconds in which the loop stood still for want of a batch. On a GPU, whose work goes on meanwhile, that
             is more than the device stood still
    bad      numbers of the images that were passed over
    """

    def __init__(self, config: TrainConfig, images: Images, order: Order, ranks: Ranks, first: int = 0) -> None:
        order.first = first
        self.ranks, self.limit, self.waited = ranks, config.bad_limit, 0.0
        self.bad: set[int] = set()
        self.pixels: Tensor | None = None
        if isinstance(images, Pixels):
            self.pixels, self.labels = torch.from_numpy(images.pixels).to(ranks.device), images.labels
            self.batches: Iterator[Any] = iter(order)
            return
        loader = DataLoader(
            Reading(images),
            batch_size=None,
            sampler=order,
            collate_fn=_as_it_is,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            pin_memory=ranks.device.type == "cuda",
            generator=torch.Generator(),  # else each iterator draws from the one that the weights depend on
        )
        self.batches = iter(loader)

    def next(self) -> Batch:
        """Raises UserError where images can't be read."""
        started = time.perf_counter()
        try:
            found = next(self.batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise self.ranks.fault(f"a process that reads images died: {first_words(error)}") from None
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(found, str):
            raise self.ranks.fault(found)
        device = self.ranks.device
        if self.pixels is not None:
            part, labels = found, torch.from_numpy(self.labels[found.rows])
            images = self.pixels[torch.from_numpy(part.rows).to(device, non_blocking=True)]
        else:
            part, images, labels, bad = found
            self.bad.update(bad)
            if len(self.bad) > self.limit:  # each process that reads counts its own, too
                raise self.ranks.fault(
                    f"{len(self.bad)} images don't decode, more than the limit of {self.limit}: --bad-limit raises it; "
                    "`python -m mvrepro data inspect --decode` names them"
                )
            images = images.to(device, non_blocking=True)
        mirrored = torch.from_numpy(part.mirrored).to(device, non_blocking=True)[:, None, None, None]
        return Batch(torch.where(mirrored, images.flip(-1), images), labels, part.share)


class Reading(Dataset[Any]):
    """[part] -> (part, images, labels, numbers of bad images), or what a user reads where there is none: an exception
    that crosses processes comes with its traceback."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, part: Part) -> tuple[Part, Tensor, Tensor, list[int]] | str:
        try:
            pixels = self.images.read(part.rows)
        except UserError as error:
            return str(error)
        labels = torch.from_numpy(self.images.labels[part.rows])
        return part, torch.from_numpy(pixels), labels, sorted(getattr(self.images, "bad", ()))


def _as_it_is(batch: Any) -> Any:
    return batch


def normalised(images: Tensor, channels_last: bool) -> Tensor:
    """(B, C, S, S) uint8 -> float32, (pixel − 127.5)/128; on the device, to which bytes go in a quarter of the time."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).sub_(127.5).div_(128)
