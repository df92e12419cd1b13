"""The processes of a run: one, or those that torchrun started. Who they are, what they agree on, and who speaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mvrepro.errors import UserError, first_words
from mvrepro.heads.sharded import is_lost_contact, lost_contact
from mvrepro.training.config import TrainConfig

ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # as torchrun sets them, and what a lone process is
FULL = (
    "the device's memory is full: try a smaller --batch-size, --accumulate, --bfloat16, --sample-rate or "
    "--update-in-backward, or more ranks; --resume goes on from the last snapshot"
)


class OwnFault(UserError):
    """What went wrong on one rank alone, which therefore speaks itself."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. grouped: there is a process group, which serves CPUs, too."""

    rank: int
    count: int
    device: torch.device
    grouped: bool = False

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block without exchanges that may fail on some ranks: all of them then raise the same UserError."""
        fault = None
        try:
            yield
        except UserError as error:
            if self.count == 1:
                raise
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


@contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """The ranks of this run, in the process group that torchrun announces; a lone process needs one for sampled
    classes only. Errors of torch that a user can act on are UserErrors here."""
    here = _start(config)
    try:
        with _explained(here):
            yield here
    finally:
        if here.grouped:
            dist.destroy_process_group()


def pick_device(name: str, local: int | None = None) -> torch.device:
    """ "auto" is the GPU where there is one. local: the number of this process on its machine, under torchrun."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # which lists twenty others
        raise UserError(f"device {name!r} can't be used: known are auto, cpu, cuda, cuda:1, …") from None
    try:
        if device.type == "cuda" and local is not None:
            if ":" in name:
                raise RuntimeError("each rank finds its own GPU: say cuda")
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"this machine has {torch.cuda.device_count()} GPUs, and process {local} of it wants one of its own"
                )
            device = torch.device("cuda", local)
        torch.ones(1, device=device).item()
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} can't be used: {first_words(error)}") from None
    return device


def _start(config: TrainConfig) -> Ranks:
    rank, count, local = (_number(name, value) for name, value in ENVIRONMENT.items())
    together = "RANK" in os.environ
    device = pick_device(config.device, local if together else None)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if not together and config.sample_rate == 1:
        return Ranks(0, 1, device)
    timeout = timedelta(minutes=config.timeout)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        if together:
            dist.init_process_group(backend, timeout=timeout)
        else:
            alone = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise OwnFault(f"rank {rank} of {count} could not join the others: {first_words(error)}") from None
    return Ranks(rank, count, device, True)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment says {name}={text!r}, which is no number: torchrun sets it, or leave it out")
    return int(text)


@contextmanager
def _explained(ranks: Ranks) -> Iterator[None]:
    """What torch says where memory ends, a rank is gone, and the like, as one message that says what to do."""
    try:
        yield
    except ConnectionError as error:  # ShardedHead's word
        raise UserError(str(error)) from None
    except MemoryError:
        raise ranks.fault(FULL) from None
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
            raise ranks.fault(FULL) from None
        if is_lost_contact(error):
            raise UserError(lost_contact(ranks.rank, ranks.count, first_words(error))) from None
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"--compile can't be had here: {first_words(error)}") from None
        if "deterministic" in text:
            raise UserError(f"--deterministic can't be had here: {first_words(error)}") from None
        raise
