"""The step of a run as a CUDA graph: the host launches it as a whole, instead of some 400 kernels one by one. For a
small network these launches are most of a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from mvrepro.errors import UserError
from mvrepro.heads.margin import MarginHead
from mvrepro.training.batches import Batch
from mvrepro.training.config import TrainConfig
from mvrepro.training.ranks import Ranks

Take = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # images, labels -> loss, norm of the gradient
WARM_UP = 3  # steps on a stream of its own, in which libraries choose their kernels and the optimiser gets its momentum


class Graph:
    """`take`, a step, recorded once and replayed with other images and labels.

    The steps before the recording are real ones, too. It holds for one batch size and one t; another batch size is not
    taken (`fits`), and with another t the step is recorded anew. Raises UserError where the head is not dense: the
    sweep cuts the classes on the host, by the labels.
    """

    def __init__(self, take: Take, head: MarginHead, batch_size: int, device: torch.device) -> None:
        if head.pick(batch_size)[0] != "dense":
            raise UserError(
                f"--graph is for the dense head, and {head.num_classes:,} classes with batches of {batch_size} are too "
                "many for it: leave --graph out"
            )
        self.take, self.head, self.batch_size, self.device = take, head, batch_size, device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.t, self.taken = head.t, 0

    def fits(self, batch: Batch) -> bool:
        return len(batch.labels) == self.batch_size

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss and the norm of the gradient, on the device."""
        if self.head.t != self.t:
            self.graph, self.t, self.taken = None, self.head.t, 0
        if self.graph is None:
            self.images, self.labels = batch.images.clone(), batch.labels.to(self.device)
            if self.taken < WARM_UP:
                return self._warm_up()
            self._record()
        assert self.graph is not None
        self.images.copy_(batch.images)
        self.labels.copy_(batch.labels, non_blocking=True)
        self.graph.replay()
        return self.loss.clone(), None if self.norm is None else self.norm.clone()

    def _warm_up(self) -> tuple[Tensor, Tensor | None]:
        self.taken += 1
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            found = self.take(self.images, self.labels)
        here.wait_stream(self.stream)
        return found

    def _record(self) -> None:
        """Takes no step: what is recorded is not run."""
        self.graph = torch.cuda.CUDAGraph()
        # processes that read images have a thread here, which may call CUDA meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss, self.norm = self.take(self.images, self.labels)


def check_graph(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse what a graph can't hold: a step that waits for the device, or that depends on its number but for the
    learning rate. Raises UserError."""
    reasons = {
        f"--device {ranks.device.type}: it is for a GPU": ranks.device.type != "cuda",
        "several ranks or --sample-rate: it is for one process with all classes": ranks.grouped,
        "--deterministic: torch's deterministic kernels wait for the device": config.deterministic,
        "--accumulate: it takes whole batches": config.accumulate > 1,
        "--update-in-backward: it is for the dense head": config.update_in_backward,
        "--t-warmup: it holds one t": config.t_warmup > 0,
        "--annealing: it holds one margin": config.annealing,
    }
    for reason, holds in reasons.items():
        if config.graph and holds:
            raise UserError(f"--graph does not go with {reason}")
