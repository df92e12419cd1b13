"""Which image comes at which step, and reading it in time.

The order and the mirroring follow from (seed, epoch, image) alone. A run that goes on at step n therefore sees what
an unbroken one sees there, however many processes read, and nothing about the data needs to be in a snapshot.
"""

import hashlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mvrepro.errors import UserError
from mvrepro.images import Decoded, open_images
from mvrepro.training.config import ScaleConfig
from mvrepro.training.ranks import Ranks

SYNTHETIC = 10  # images a class


class Synthetic:
    """[i] -> ((3, size, size) uint8, class id): noise that follows from i, of class i mod K. Nothing is stored."""

    def __init__(self, classes: int, size: int) -> None:
        self.classes, self.size = classes, size
        self.bad: set[int] = set()

    def __len__(self) -> int:
        return SYNTHETIC * self.classes

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        noise = np.random.Generator(np.random.PCG64(i)).bytes(3 * self.size**2)
        return np.frombuffer(noise, np.uint8).reshape(3, self.size, self.size), i % self.classes


Images = Synthetic | Decoded


class TrainingSet(NamedTuple):
    """images: by number; classes: K; labels: SHA-256 of all class ids, by which a snapshot knows its set."""

    images: Images
    classes: int
    labels: str


def open_set(config: ScaleConfig) -> TrainingSet:
    """Raises UserError for what is no set of images, class ids with holes, and fewer images than a batch."""
    if config.synthetic_classes:
        images: Images = Synthetic(config.synthetic_classes, config.image_size)
        classes, labels = config.synthetic_classes, f"synthetic {config.synthetic_classes}"
    else:
        source = open_images(config.data, renumber=config.renumber)
        ids = source.labels()
        images = Decoded(source, size=config.image_size, limit=config.bad_limit)
        classes, labels = int(ids.max()) + 1, hashlib.sha256(ids.tobytes()).hexdigest()
    if len(images) < config.batch_size:
        raise UserError(
            f"{len(images)} images don't fill one batch of {config.batch_size}: choose a smaller --batch-size"
        )
    return TrainingSet(images, classes, labels)


def coins(seed: int, epoch: int, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool, each True with probability 1/2: the lowest bits of SplitMix64's mix of seed, epoch and row."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    z = (rows.astype(np.uint64) + key) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) & np.uint64(1)).astype(bool)


class Order(Sampler[tuple[int, NDArray[np.int64]]]):
    """(epoch, row numbers) of every part of a batch that a rank sees, from the first step of a run to its last.

    Each epoch is a new permutation of the N images, cut into ⌊N/B⌋ batches, those into the accumulated parts, and those
    into one piece of `part` images a rank. Raises UserError where B can't be cut so.
    """

    def __init__(self, config: ScaleConfig, images: int, rank: int, ranks: int) -> None:
        self.config, self.images, self.rank, self.ranks = config, images, rank, ranks
        self.part, rest = divmod(config.batch_size, ranks * config.accumulate)
        if rest or self.part < 2:
            raise UserError(
                f"batch_size {config.batch_size} over {ranks} ranks in {config.accumulate} parts: must be a multiple "
                f"of {ranks * config.accumulate}, with two images at least for each rank and part"
            )
        self.an_epoch = images // config.batch_size
        self.steps = config.steps or self.an_epoch * config.epochs
        self.first = 0  # step

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        known, order = -1, np.empty(0, np.int64)
        for step in range(self.first, self.steps):
            epoch, batch = divmod(step, self.an_epoch)
            if epoch != known:
                known, order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(self.images)
            rows = order[batch * self.config.batch_size : (batch + 1) * self.config.batch_size]
            for part in rows.reshape(self.config.accumulate, self.ranks, self.part):
                yield epoch, part[self.rank]


class Batch(NamedTuple):
    """images (B, 3, S, S) uint8, labels (B,) int64, bad: numbers of the images that were passed over."""

    images: Tensor
    labels: Tensor
    bad: list[int]


class Reading(Dataset[Batch | str]):
    """[epoch, rows] -> Batch, or what a user reads where there is none: an exception that crosses processes comes with
    its traceback."""

    def __init__(self, images: Images, seed: int, flip: bool) -> None:
        self.images, self.seed, self.flip = images, seed, flip

    def __getitem__(self, place: tuple[int, NDArray[np.int64]]) -> Batch | str:
        epoch, rows = place
        try:
            read = [self.images[i] for i in rows.tolist()]
        except UserError as error:
            return str(error)
        pixels = np.stack([image for image, _ in read])
        if self.flip:
            mirrored = coins(self.seed, epoch, rows)
            pixels[mirrored] = pixels[mirrored][..., ::-1]
        return Batch(torch.from_numpy(pixels), torch.tensor([label for _, label in read]), sorted(self.images.bad))


class Feed:
    """The batches of a rank from a step on, on its device; one iterator for the whole run, so that no epoch begins with
    idle processes.

    waited   seconds in which the loop stood still for want of a batch. On a GPU, whose work goes on meanwhile, that
             is more than the device stood still
    bad      numbers of the images that were passed over
    """

    def __init__(self, config: ScaleConfig, images: Images, order: Order, ranks: Ranks, first: int = 0) -> None:
        order.first = first
        self.ranks, self.limit, self.waited = ranks, config.bad_limit, 0.0
        self.bad: set[int] = set()
        loader = DataLoader(
            Reading(images, config.seed, config.flip),
            batch_size=None,
            sampler=order,
            collate_fn=_as_it_is,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            pin_memory=ranks.device.type == "cuda",
            generator=torch.Generator(),  # else each iterator draws from the one that the weights depend on
        )
        self.batches = iter(loader)

    def next(self) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 and (B,) int64. Raises UserError where images can't be read."""
        started = time.perf_counter()
        try:
            batch = next(self.batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise self.ranks.fault(f"a process that reads images died: {str(error).splitlines()[0]}") from None
        finally:
            self.waited += time.perf_counter() - started
        if isinstance(batch, str):
            raise self.ranks.fault(batch)
        self.bad.update(batch.bad)
        if len(self.bad) > self.limit:  # each process that reads counts its own, too
            raise self.ranks.fault(
                f"{len(self.bad)} images don't decode, more than the limit of {self.limit}: --bad-limit raises it; "
                "`python -m mvrepro data inspect --decode` names them"
            )
        device = self.ranks.device
        return batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)


def _as_it_is(batch: Any) -> Any:
    return batch


def normalised(images: Tensor, channels_last: bool) -> Tensor:
    """(B, 3, S, S) uint8 -> float32, (pixel − 127.5)/128; on the device, to which bytes go in a quarter of the time."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).sub_(127.5).div_(128)
