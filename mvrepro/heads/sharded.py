"""The margin head with its classes spread over ranks, for more of them than one device holds.

Every process runs the same script, started by torchrun:

    torch.distributed.init_process_group(timeout=timedelta(minutes=2))  # gloo for CPUs, nccl for GPUs
    head = ShardedHead("MV-AM-Softmax-a", embedding_dim=512, num_classes=10_000_000, ddp=True)
    loss = head(backbone(images), labels)  # each rank its own images; one loss, that of all of them
    loss.backward()

Of B samples on all ranks together there travel: embeddings (B, D) and labels, three vectors (B,) forward and
dL/du (B, D) backward. No weight does. Each rank sweeps over its own classes (mvrepro.heads.sweep).

A rank that dies takes the job with it: the others raise ConnectionError in their next exchange, at once where the
connection breaks and after init_process_group's timeout where it just falls silent (with nccl torch's watchdog ends the
process then), and torchrun stops what is left, says which rank failed first and exits with 1.
Tested with gloo; nccl was not at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvrepro.errors import first_words
from mvrepro.heads.chunks import Update
from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sweep import fused_losses
from mvrepro.losses import normalise


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether an exchange failed for want of another rank, and not for want of memory or by a wrong call."""
    text = str(error)
    return (isinstance(error, dist.DistError) or "gloo" in text) and "memory" not in text


def lost_contact(rank: int, ranks: int, reason: str) -> str:
    """What a user reads on a rank that an exchange failed on; reason: torch's word for it."""
    return (
        f"rank {rank} of {ranks} lost contact with the others: one of them died or stands still, and its own error "
        f"says why ({reason})"
    )


class ShardedHead(MarginHead):
    """MarginHead over R ranks, of which rank r holds the classes ⌊K r/R⌋ … ⌊K (r+1)/R⌋ − 1.

    Every rank calls it with its own (B_r, D) embeddings and (B_r,) labels of 0 … K − 1, and calls backward. B_r may
    differ from rank to rank; the loss is that of all samples, mining included, and the same number everywhere. Then
    embeddings.grad is dL/dx of the rank's samples, and weight.grad dL/dW of its classes. Don't wrap the head in
    DistributedDataParallel: each rank's weights are its own. The state dict holds the rank's shard; see full_weight.
    Labels on the CPU, for which no GPU is waited, need a group that serves CPUs, too.

    group        the ranks; None: all
    ddp          the embeddings come out of a DistributedDataParallel backbone, which divides what reaches it by R:
                 dL/dx is multiplied by R before, and the backbone's gradient is exact
    sample_rate  r < 1: sampled negatives (Partial FC, arXiv 2203.15565). In training mode a step sees, of the K_r
                 classes of a rank, those that are labels in the batch, and others drawn evenly without replacement
                 until there are ⌊r K_r⌋ (two at least; more only if the labels are). The loss is that of a head with
                 these classes alone, and the others get no gradient; `sampled` holds their local numbers, the labels
                 first. A plain weight.grad still has all rows; with update_in_backward only the rows of the sample
                 exist, and only they decay and change their momentum

    Everything else as in MarginHead; backend is always "fused". Raises RuntimeError without a process group,
    ValueError for fewer classes than ranks.
    """

    sampled: Tensor | None

    def __init__(
        self,
        name: str,
        embedding_dim: int,
        num_classes: int,
        *,
        group: dist.ProcessGroup | None = None,
        ddp: bool = False,
        sample_rate: float = 1.0,
        **options: Any,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "ShardedHead needs a process group: start the script with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        with torch.device("meta"):  # no rank ever holds K × D
            super().__init__(name, embedding_dim, num_classes, backend="fused", **options)
        self.group, self.ddp, self.sample_rate, self.sampled = group, ddp, sample_rate, None
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if num_classes < self.ranks:
            raise ValueError(f"{num_classes} classes can't be spread over {self.ranks} ranks: each needs one")
        self.edges = [num_classes * r // self.ranks for r in range(self.ranks + 1)]
        self.first, stop = self.edges[self.rank : self.rank + 2]
        # A seed of its own for each rank: all with one seed would start with the same weights.
        seed = np.random.SeedSequence([torch.initial_seed(), self.rank]).generate_state(1, np.uint64)
        draws = torch.Generator("cpu").manual_seed(int(seed[0]))
        weight = torch.randn(stop - self.first, embedding_dim, generator=draws, device="cpu")
        self.weight = nn.Parameter(weight / embedding_dim**0.5)
        self.step = torch.zeros((), dtype=torch.int64)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """L = −log p_y of the samples of all ranks, rank by rank: (B,)."""
        self._check_inputs(embeddings, labels)
        x, y = self._gather(embeddings, labels)
        weight: Tensor = self.weight
        update: Update | None = self._update if self.sgd and self.training else None
        if self.sample_rate < 1 and self.training:
            weight, y, update = self._sample(y)
        how = {"keep": self.pick(len(x))[1], "products": self.products, "reduce": self._reduce, "update": update}
        losses: Tensor = fused_losses(x, weight, y, self._rule(), **how)
        return losses

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError("no rank has the logits of every class: give full_weight() to a MarginHead")

    @torch.no_grad()
    def watch(self, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        """As MarginHead's, of the first 256 samples of each rank and all classes. Every rank must call it."""
        x, y = self._gather(embeddings[:256], labels[:256])
        x, y = x.to(torch.promote_types(x.dtype, torch.float32)), y.to(x.device)
        targets = normalise(self.weight[y.clamp(min=0)].to(x.dtype))  # or class 0, which is another rank's then
        target = self._reduce((normalise(x) * targets).sum(1) * (y >= 0), "sum")
        f = self.margin(target)[:, None]
        sums = torch.zeros(2, dtype=torch.float64, device=x.device)  # the marked; the negatives' cosines
        for start in range(0, len(self.weight), 4096):
            cos = self.cosines(x, slice(start, start + 4096))
            negative = torch.arange(start, start + cos.shape[1], device=x.device) != y[:, None]
            sums += torch.stack([((cos > f) & negative).sum(), (cos * negative).sum()])
        marked, negatives = self._reduce(sums, "sum")
        return self._watched(marked, target, negatives)

    @torch.no_grad()
    def full_weight(self) -> Tensor | None:
        """(K, D), on the CPU, for rank 0, None for the others. Every rank must call it."""
        full = torch.empty(self.num_classes, self.embedding_dim, dtype=self.weight.dtype) if self.rank == 0 else None
        for r, (start, stop) in enumerate(pairwise(self.edges)):
            part = self.weight if r == self.rank else self.weight.new_empty(stop - start, self.embedding_dim)
            with self._contact():
                dist.broadcast(part.detach(), group=self.group, group_src=r)
            if full is not None:
                full[start:stop] = part
        return full

    def _sample(self, y: Tensor) -> tuple[Tensor, Tensor, Update | None]:
        """Weight and labels of the sampled classes, and the update of their rows. y: local, −1 on other ranks."""
        own = y[y >= 0].unique()
        y = torch.where(y >= 0, torch.searchsorted(own, y), -1)
        own = own.to(self.weight.device, non_blocking=True)
        order = torch.rand(len(self.weight), device=own.device)
        order.index_fill_(0, own, -1.0)  # behind all that are drawn
        count = max(len(own), int(self.sample_rate * len(self.weight)), min(2, len(self.weight)))
        self.sampled = classes = torch.cat([own, order.topk(count - len(own)).indices.sort().values])
        if self.sgd is None:
            return self.weight[classes], y, None
        rows = self.weight.detach()[classes].requires_grad_(self.weight.requires_grad)
        return rows, y, lambda chunk, grad: self._update(classes[chunk], grad)

    def _gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all ranks, rank by rank; labels count from this rank's first class, and are −1 for others'."""
        with self._contact():
            x, y = _Gather.apply(embeddings, labels, self)
        return x, torch.where((self.first <= y) & (y < self.first + len(self.weight)), y - self.first, -1)

    def _reduce(self, part: Tensor, how: str) -> Tensor:
        whole = part.clone()
        with self._contact():
            dist.all_reduce(whole, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=self.group)
        return whole

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """What a user reads when another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if not is_lost_contact(error):
                raise
            raise ConnectionError(lost_contact(self.rank, self.ranks, first_words(error))) from None

    def extra_repr(self) -> str:
        held = f"classes {self.first} … {self.first + len(self.weight) - 1} on rank {self.rank} of {self.ranks}"
        return f"{super().extra_repr()}, {held}, sample_rate={self.sample_rate}"


class _Gather(torch.autograd.Function):
    """The embeddings and labels of all ranks, rank by rank. Backward sends nothing: the sweep has summed dL/du."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, labels: Tensor, head: ShardedHead) -> tuple[Tensor, Tensor]:
        counts = [torch.empty_like(labels[:1]) for _ in range(head.ranks)]
        dist.all_gather(counts, torch.full_like(labels[:1], len(labels)), group=head.group)
        sizes = torch.cat(counts).tolist()
        start = sum(sizes[: head.rank])
        ctx.own, ctx.factor = slice(start, start + len(labels)), head.ranks if head.ddp else 1
        x, y = (_rows(part, sizes, head.group) for part in (embeddings, labels))
        ctx.mark_non_differentiable(y)
        return x, y

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor * grad[ctx.own], None, None


def _rows(part: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all ranks; padded on the way, since an exchange wants equal shapes."""
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])
