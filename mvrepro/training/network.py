"""Backbone, head, optimiser and one step of them, on one rank or many."""

from collections.abc import Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mvrepro import networks
from mvrepro.errors import UserError
from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sharded import ShardedHead
from mvrepro.training.batches import Batch, Feed, normalised
from mvrepro.training.config import TrainConfig
from mvrepro.training.graph import Graph
from mvrepro.training.ranks import Ranks

# What a config calls as MarginHead does.
OF_HEAD = ("s", "m", "t", "gamma", "hard_ratio", "easy_margin", "stop_gradient", "t_warmup", "annealing")

# the argument's name from torch 2.13 on, and before
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"


def most_looked_at(classes: int) -> int:
    """How many samples are looked at, which takes some (samples, classes) tensors: of 2^25 cosines, 32 at least."""
    return int(max(32, 2**25 // classes))


class Network:
    """What a run trains, on images of `shape` (C, S, S). The backbone is the same on all ranks; each holds its share of
    the classes.

    Raises UserError for unknown names and for arguments that the head refuses. Every rank must build it.
    """

    def __init__(self, config: TrainConfig, classes: int, shape: tuple[int, ...], ranks: Ranks) -> None:
        self.config, self.ranks, self.shape = config, ranks, shape
        with ranks.together():
            torch.manual_seed(config.seed)
            self.built = {"in_channels": shape[0], "image_size": shape[-1], "embedding_dim": config.embedding_dim}
            backbone = networks.build(config.backbone, **self.built)
            if config.sync_bn and ranks.count > 1:
                if ranks.device.type == "cpu":
                    raise UserError("--sync-bn needs GPUs: torch has no such batch norm for CPUs")
                backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
            head = build_head(config, classes, ranks)
            # From here on each rank draws its own: dropout, sampled negatives.
            own = np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(own[0]))
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.backbone = backbone.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]
        self.head = head.to(ranks.device)
        sgd: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        kernels: dict[str, Any] = {"fused" if ranks.device.type == "cuda" else "foreach": True}
        if config.graph:  # which reads the rate anew at each step
            kernels["lr"] = torch.tensor(config.lr, device=ranks.device)
        decays = [p for p in self.backbone.parameters() if p.ndim > 1 or config.decay_all]
        others = [p for p in self.backbone.parameters() if not (p.ndim > 1 or config.decay_all)]
        groups: list[dict[str, Any]] = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
        self.sgd = torch.optim.SGD(groups, **sgd | kernels)
        self.head_sgd: torch.optim.SGD | None = None
        if config.update_in_backward:
            self.head.update_in_backward(**sgd)
        else:
            self.head_sgd = torch.optim.SGD(self.head.parameters(), **sgd | kernels)
        self.ddp: DistributedDataParallel | None = None
        if ranks.count > 1:
            self.ddp = DistributedDataParallel(
                self.backbone,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{SYNC_BUFFERS: False},  # type: ignore[arg-type] # batch norms use them in tests alone: see testing
            )
        self.forward: Any = self.ddp or self.backbone
        if config.compile:
            self.forward = torch.compile(self.forward)
        if self.ddp and config.deterministic:
            self._settle()
        self.graph: Graph | None = None
        if config.graph:
            self.graph = Graph(self._take, self.head, config.batch_size, ranks.device)

    def _settle(self) -> None:
        """One pass that changes nothing. After the first one of a process DDP makes its buckets anew, in the order in
        which gradients came; then three ranks or more add up in another order, and a run that goes on would differ in
        its last bits from an unbroken one."""
        drawn = [torch.get_rng_state()]
        if self.ranks.device.type == "cuda":
            drawn.append(torch.cuda.get_rng_state(self.ranks.device))
        buffers = [buffer.clone() for buffer in self.backbone.buffers()]
        self.backbone.train()
        self.embed(torch.zeros((2, *self.shape), dtype=torch.uint8, device=self.ranks.device)).sum().backward()
        with torch.no_grad():
            for buffer, before in zip(self.backbone.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.set_rng_state(drawn[0])
        for state in drawn[1:]:
            torch.cuda.set_rng_state(state, self.ranks.device)

    def release(self) -> None:
        """Let go of the process group; no step can follow. Where DDP is the last to hold a group, torch waits for its
        threads with Python's lock held, and one that needs the lock to free the last exchange waits, too."""
        self.ddp, self.forward = None, self.backbone

    def half(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, S, S) uint8 -> (B, D) float32, in training mode."""
        with self.half():
            embeddings: Tensor = self.forward(normalised(images, self.config.channels_last))
        return embeddings.float()

    def step(self, feed: Feed, number: int, lr: float, *, watch: bool = False) -> tuple[Tensor, Tensor | None, Any]:
        """One step of SGD, `number` counting from 0 as the head's warm-ups do: the loss of the whole batch, the same
        on all ranks; with `clip` the norm of its gradient; and on request what the head sees of the first part before
        the step (MarginHead.watch, and study where one rank has all classes). The scalars stay on the device, so that
        nothing waits for it."""
        parts, seen = self.config.accumulate, None
        for module in (self.backbone, self.head):
            if not module.training:  # to tell each of its parts takes time
                module.train()
        self.set_rate(lr)
        self.head.step.fill_(number)
        batches: Iterator[Batch] = (feed.next() for _ in range(parts))
        if self.graph and not watch:
            batch = feed.next()
            if self.graph.fits(batch):
                return *self.graph(batch), None
            batches = iter([batch])
        self._clear()
        total = torch.zeros((), device=self.ranks.device)
        for part, batch in enumerate(batches):
            self.head.step.fill_(number)  # it counts calls, and warm-ups count steps
            with self.ddp.no_sync() if self.ddp and part < parts - 1 else nullcontext():
                embeddings = self.embed(batch.images)
                if watch and part == 0:
                    few = most_looked_at(self.head.num_classes)
                    seen = self.look(embeddings[:few].detach(), batch.labels[:few])
                loss = self.head(embeddings, batch.labels) * batch.share
                loss.backward()
            total += loss.detach()
        return total, self._update(), seen

    def _take(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The step with a whole batch, as a graph records it."""
        self._clear()
        loss = self.head(self.embed(images), labels)
        loss.backward()
        return loss.detach(), self._update()

    def _clear(self) -> None:
        self.sgd.zero_grad()
        if self.head_sgd:
            self.head_sgd.zero_grad()

    def _update(self) -> Tensor | None:
        """The step of SGD, and the norm of the gradient where it is clipped."""
        norm = self.clip() if self.config.clip else None
        self.sgd.step()
        if self.head_sgd:
            self.head_sgd.step()
        return norm

    def look(self, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        seen = self.head.watch(embeddings, labels)
        return seen if isinstance(self.head, ShardedHead) else seen | self.head.study(embeddings, labels)

    def set_rate(self, lr: float) -> None:
        for sgd in filter(None, (self.sgd, self.head_sgd)):
            for group in sgd.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        if self.head.sgd:
            self.head.sgd.lr = lr

    def clip(self) -> Tensor:
        """The norm of the gradient of backbone and all ranks' classes, before it is cut to config.clip."""
        common, own = ([p.grad for p in m.parameters() if p.grad is not None] for m in (self.backbone, self.head))
        classes = nn.utils.get_total_norm(own) ** 2
        if self.ranks.grouped:
            dist.all_reduce(classes)
        norm = (nn.utils.get_total_norm(common) ** 2 + classes).sqrt()
        torch._foreach_mul_([*common, *own], (self.config.clip / (norm + 1e-6)).clamp(max=1))
        return norm

    def common_state(self) -> dict[str, Tensor]:
        """What is the same on all ranks (but for the running statistics of batch norms, of which rank 0's count)."""
        state = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        return state | {f"momentum.{name}": tensor for name, tensor in _velocities(self.backbone, self.sgd)}

    def own_state(self) -> dict[str, Tensor]:
        """What is this rank's: its classes, their momentum, the head's count of steps, the generators of numbers."""
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.head_sgd:
            state |= {f"momentum.{name}": tensor for name, tensor in _velocities(self.head, self.head_sgd)}
        state["random.cpu"] = torch.get_rng_state()
        if self.ranks.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return state

    def load(self, common: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """What common_state and own_state gave."""
        self.backbone.load_state_dict(part_of(common, "backbone."))
        self.head.load_state_dict(part_of(own, "head."))
        _set_velocities(self.backbone, self.sgd, part_of(common, "momentum."))
        if self.head_sgd:
            _set_velocities(self.head, self.head_sgd, part_of(own, "momentum."))
        torch.set_rng_state(own["random.cpu"])
        if "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"], self.ranks.device)

    def start_from(self, backbone: dict[str, Tensor], weight: Tensor) -> None:
        """Begin with another run's weights; its loss may differ, and so may the number of its ranks."""
        self.backbone.load_state_dict(backbone)
        self.head.load_full_weight(weight)


def _velocities(module: nn.Module, sgd: torch.optim.SGD) -> list[tuple[str, Tensor]]:
    found = [(name, sgd.state.get(p, {}).get("momentum_buffer")) for name, p in module.named_parameters()]
    return [(name, velocity) for name, velocity in found if velocity is not None]


def _set_velocities(module: nn.Module, sgd: torch.optim.SGD, velocities: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, velocity in velocities.items():
        parameter = parameters[name]
        sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).detach().copy_(velocity)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_network(config: TrainConfig) -> None:
    """Refuse an unknown backbone, and what the head refuses, before any data is read. Draws no random numbers."""
    networks.check_name(config.backbone)
    with torch.device("meta"):
        build_head(config, 2, Ranks(0, 1, torch.device("meta")))


def build_head(config: TrainConfig, classes: int, ranks: Ranks) -> MarginHead:
    """With all classes, or with this rank's where there are several ranks or only a sample of the classes is seen."""
    # labels are 0 … K − 1 by construction, and the loop looks at the loss itself
    options = {name: getattr(config, name) for name in OF_HEAD} | {"check": False}
    if config.bfloat16 and ranks.device.type == "cuda":  # a CPU gains nothing by it
        options["products"] = "bfloat16"
    try:
        if ranks.grouped:
            rate = config.sample_rate
            return ShardedHead(config.loss, config.embedding_dim, classes, ddp=True, sample_rate=rate, **options)
        backend = "fused" if config.update_in_backward else "auto"
        return MarginHead(config.loss, config.embedding_dim, classes, backend=backend, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
