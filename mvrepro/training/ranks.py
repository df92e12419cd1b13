"""The processes of a run: one, or those that torchrun started. Who they are, what they agree on, and who speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mvrepro.errors import UserError
from mvrepro.heads.sharded import lost_contact
from mvrepro.training.config import ScaleConfig


class OwnFault(UserError):
    """What went wrong on one rank alone, which therefore speaks itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. objects: the group for what isn't a tensor of the device."""

    rank: int
    count: int
    device: torch.device
    objects: dist.ProcessGroup | None

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.objects)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without exchanges that may fail on some ranks: all of them then raise the same UserError."""
        fault = None
        try:
            yield
        except UserError as error:
            fault = str(error)
        faults = self.gather(fault)
        if any(faults):
            alike = len(set(faults)) == 1
            named = [f"rank {rank} of {self.count}: {text}" for rank, text in enumerate(faults) if text]
            raise UserError(str(fault) if alike else "; ".join(named)) from None

    def fault(self, text: str) -> UserError:
        """The error for what only this rank knows of, in the midst of a step."""
        return OwnFault(f"rank {self.rank} of {self.count}: {text}") if self.count > 1 else UserError(text)


def speaks(error: UserError) -> bool:
    """Whether this process prints the error: rank 0, and whoever alone knows of it."""
    return isinstance(error, OwnFault) or os.environ.get("RANK", "0") == "0"


def start(config: ScaleConfig) -> Ranks:
    """Join the process group that torchrun announces, or be a group of one. Raises UserError."""
    rank, count, local = (int(os.environ.get(name, value)) for name, value in ENVIRONMENT.items())
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("device 'cuda' can't be used: torch finds no GPU here")
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, and process {local} of it wants another")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=config.timeout)
    backend = "nccl" if cuda else "gloo"
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
        objects = dist.new_group(backend="gloo", timeout=timeout) if cuda else None
    except (RuntimeError, ValueError) as error:
        raise OwnFault(f"rank {rank} of {count} could not join the others: {str(error).splitlines()[0]}") from None
    return Ranks(rank, count, device, objects)


ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # as torchrun sets them, and what a lone process is


@contextmanager
def explained(ranks: Ranks) -> Iterator[None]:
    """What torch says where memory ends, a rank is gone, and the like, as one message that says what to do."""
    try:
        yield
    except ConnectionError as error:  # ShardedHead's word
        raise UserError(str(error)) from None
    except torch.OutOfMemoryError:
        raise ranks.fault(
            "the device's memory is full: try a smaller --batch-size, --accumulate, --bfloat16, --sample-rate or "
            "--update-in-backward, or more ranks; --resume goes on from the last snapshot"
        ) from None
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, dist.DistError) or "gloo" in text:
            reason = text.splitlines()[0].split(". ")[0]
            raise UserError(lost_contact(ranks.rank, ranks.count, reason)) from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile can't be had here: {text.splitlines()[0]}") from None
        if "deterministic" in text:
            raise UserError(f"--deterministic can't be had here: {text.splitlines()[0]}") from None
        raise
