"""Backbone, head, optimiser and one step of them, on one rank or many."""

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
from mvrepro.heads.margin import SETTINGS
from mvrepro.heads.sharded import ShardedHead
from mvrepro.training.batches import Feed, normalised
from mvrepro.training.config import ScaleConfig
from mvrepro.training.ranks import Ranks

# the argument's name from torch 2.13 on, and before
SYNC_BUFFERS = "forward_sync_buffers"
if SYNC_BUFFERS not in signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "broadcast_buffers"


class Network:
    """What a run trains. The backbone is the same on all ranks; each holds its share of the classes.

    Raises UserError for unknown names and for arguments that the head refuses. Every rank must build it.
    """

    def __init__(self, config: ScaleConfig, classes: int, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        with ranks.together():
            torch.manual_seed(config.seed)
            backbone = build_backbone(config)
            if config.sync_bn and ranks.count > 1:
                if ranks.device.type == "cpu":
                    raise UserError("--sync-bn needs GPUs: torch has no such batch norm for CPUs")
                backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
            head = build_head(config, classes)
            # From here on each rank draws its own: dropout, sampled negatives.
            own = np.random.SeedSequence([config.seed, ranks.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(own[0]))
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.backbone = backbone.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]
        self.head = head.to(ranks.device)
        self.head.step = self.head.step.cpu()  # the warm-up of t would wait for the device to read it
        sgd: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.sgd = torch.optim.SGD(self.backbone.parameters(), **sgd)
        self.head_sgd: torch.optim.SGD | None = None
        if config.update_in_backward:
            self.head.update_in_backward(**sgd)
        else:
            self.head_sgd = torch.optim.SGD(self.head.parameters(), **sgd)
        self.ddp: DistributedDataParallel | None = None
        if ranks.count > 1:
            self.ddp = DistributedDataParallel(
                self.backbone,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{SYNC_BUFFERS: False},  # type: ignore[arg-type] # batch norms use them in tests alone: see verify
            )
        self.forward: Any = self.ddp or self.backbone
        if config.compile:
            self.forward = torch.compile(self.forward)
        if self.ddp and config.deterministic:
            self._settle()

    def _settle(self) -> None:
        """One pass that changes nothing. After the first one of a process DDP makes its buckets anew, in the order in
        which gradients came; then three ranks or more add up in another order, and a run that goes on would differ in
        its last bits from an unbroken one."""
        drawn = [torch.get_rng_state()]
        if self.ranks.device.type == "cuda":
            drawn.append(torch.cuda.get_rng_state(self.ranks.device))
        buffers = [buffer.clone() for buffer in self.backbone.buffers()]
        part = self.config.batch_size // self.ranks.count // self.config.accumulate
        shape = (part, 3, self.config.image_size, self.config.image_size)
        self.backbone.train()
        self.embed(torch.zeros(shape, dtype=torch.uint8, device=self.ranks.device)).sum().backward()
        with torch.no_grad():
            for buffer, before in zip(self.backbone.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.set_rng_state(drawn[0])
        for state in drawn[1:]:
            torch.cuda.set_rng_state(state, self.ranks.device)

    def half(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, D) float32, in training mode."""
        with self.half():
            embeddings: Tensor = self.forward(normalised(images, self.config.channels_last))
        return embeddings.float()

    def step(self, feed: Feed, number: int, lr: float) -> tuple[Tensor, Tensor | None]:
        """One step of SGD, `number` counting from 0: the loss of the whole batch, the same on all ranks, and with
        `clip` the norm of its gradient. Both scalars stay on the device, so that nothing waits for it."""
        parts = self.config.accumulate
        self.backbone.train(), self.head.train()
        self.sgd.zero_grad()
        if self.head_sgd:
            self.head_sgd.zero_grad()
        self.set_rate(lr)
        total = torch.zeros((), device=self.ranks.device)
        for part in range(parts):
            images, labels = feed.next()
            self.head.step.fill_(number)  # it counts calls, and warm-ups count steps
            with self.ddp.no_sync() if self.ddp and part < parts - 1 else nullcontext():
                loss = self.head(self.embed(images), labels) / parts
                loss.backward()
            total += loss.detach()
        norm = self.clip() if self.config.clip else None
        self.sgd.step()
        if self.head_sgd:
            self.head_sgd.step()
        return total, norm

    def set_rate(self, lr: float) -> None:
        for sgd in filter(None, (self.sgd, self.head_sgd)):
            sgd.param_groups[0]["lr"] = lr
        if self.head.sgd:
            self.head.sgd.lr = lr

    def clip(self) -> Tensor:
        """The norm of the gradient of backbone and all ranks' classes, before it is cut to config.clip."""
        common, own = ([p.grad for p in m.parameters() if p.grad is not None] for m in (self.backbone, self.head))
        classes = nn.utils.get_total_norm(own) ** 2
        dist.all_reduce(classes)
        norm = (nn.utils.get_total_norm(common) ** 2 + classes).sqrt()
        torch._foreach_mul_([*common, *own], (self.config.clip / (norm + 1e-6)).clamp(max=1))
        return norm

    def common_state(self) -> dict[str, Tensor]:
        """What is the same on all ranks (but for the running statistics of batch norms, of which rank 0's count)."""
        state = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        return state | {f"momentum.{name}": tensor for name, tensor in self._velocities(self.backbone, self.sgd)}

    def own_state(self) -> dict[str, Tensor]:
        """What is this rank's: its classes, their momentum, the head's count of steps, the generators of numbers."""
        state = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        if self.head_sgd:
            state |= {f"momentum.{name}": tensor for name, tensor in self._velocities(self.head, self.head_sgd)}
        state["random.cpu"] = torch.get_rng_state()
        if self.ranks.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return state

    def load(self, common: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """What common_state and own_state gave."""
        self.backbone.load_state_dict(_part(common, "backbone."))
        self.head.load_state_dict(_part(own, "head."))
        self._set_velocities(self.backbone, self.sgd, _part(common, "momentum."))
        if self.head_sgd:
            self._set_velocities(self.head, self.head_sgd, _part(own, "momentum."))
        torch.set_rng_state(own["random.cpu"])
        if "random.cuda" in own:
            torch.cuda.set_rng_state(own["random.cuda"], self.ranks.device)

    @staticmethod
    def _velocities(module: nn.Module, sgd: torch.optim.SGD) -> list[tuple[str, Tensor]]:
        found = [(name, sgd.state.get(p, {}).get("momentum_buffer")) for name, p in module.named_parameters()]
        return [(name, velocity) for name, velocity in found if velocity is not None]

    @staticmethod
    def _set_velocities(module: nn.Module, sgd: torch.optim.SGD, velocities: dict[str, Tensor]) -> None:
        parameters = dict(module.named_parameters())
        for name, velocity in velocities.items():
            parameter = parameters[name]
            sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).detach().copy_(velocity)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def build_backbone(config: ScaleConfig) -> nn.Module:
    return networks.build(config.backbone, image_size=config.image_size, embedding_dim=config.embedding_dim)


def build_head(config: ScaleConfig, classes: int) -> ShardedHead:
    try:
        return ShardedHead(
            config.loss,
            config.embedding_dim,
            classes,
            ddp=True,
            sample_rate=config.sample_rate,
            **{name: getattr(config, name) for name in SETTINGS},
            check=False,  # labels are 0 … K − 1 by construction, and the loop looks at the loss itself
        )
    except ValueError as error:
        raise UserError(str(error)) from None
