"""What is known of a run while it trains: its course, its pace, and the log of both."""

import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import write_atomic
from mvrepro.training.batches import Feed, Order
from mvrepro.training.config import TrainConfig

CURES = (
    "try a smaller --lr, a --warmup of it, a warm-up of t (--t-warmup), --easy-margin, --clip, or --start-from a "
    "margin model"
)


class Diverged(UserError):
    """The loss is no longer a number."""


class Course:
    """Losses, which stay on the device until somebody looks, and the curve: for each epoch the mean loss, the learning
    rate, and of its first step what the head saw (MarginHead.watch)."""

    def __init__(
        self, config: TrainConfig, order: Order, curve: Any = None, total: float = 0.0, seen: int = 0, done: int = 0
    ) -> None:
        self.config, self.order, self.sizes = config, order, order.sizes()
        self.curve: dict[str, list[float]] = curve or {"loss": [], "lr": []}
        self.total, self.seen, self.done = total, seen, done
        self.lr = config.lr
        self.window: list[tuple[Tensor, Tensor | None]] = []  # of the steps that nobody has looked at
        self.lately: list[float] = []  # losses since the last line
        self.norms: list[float] = []

    def add(self, lr: float, loss: Tensor, norm: Tensor | None, watched: dict[str, float] | None) -> None:
        self.lr = lr
        self.window.append((loss, norm))
        for name, value in (watched or {}).items():
            self.curve.setdefault(name, []).append(value)

    def look(self) -> None:
        """Fetch the losses up to the last step, which waits for the device. Raises Diverged for what is no number."""
        losses = torch.stack([loss for loss, _ in self.window]).tolist()
        self.norms += [norm.item() for _, norm in self.window if norm is not None]
        self.window.clear()
        for loss in losses:
            epoch, place = divmod(self.done, self.order.an_epoch)
            self.done += 1
            if not math.isfinite(loss):
                config, margin = self.config, "" if self.config.m is None else f", m {self.config.m:g}"
                raise Diverged(
                    f"the loss became {loss} at step {self.done} (epoch {epoch + 1}) of {config.run_name()} with lr "
                    f"{self.lr:g}, s {config.s:g}{margin}: {CURES}; no record was written, and snapshots before it stay"
                )
            self.total, self.seen = self.total + loss * self.sizes[place], self.seen + self.sizes[place]
            if place + 1 == self.order.an_epoch or self.done == self.order.steps:
                self.curve["loss"].append(round(self.total / self.seen, 6))
                self.curve["lr"].append(self.lr)
                self.total, self.seen = 0.0, 0
        self.lately += losses

    def line(self) -> dict[str, float]:
        """For the log: what came since its last line."""
        epoch = (self.done - 1) // self.order.an_epoch
        line = {"epoch": epoch, "loss": statistics.fmean(self.lately), "lr": self.lr}
        if self.norms:
            line["gradient_norm"] = max(self.norms)
        self.lately, self.norms = [], []
        return line

    def progress(self) -> dict[str, Any]:
        """What a run that goes on from here needs to give the same curve."""
        return {"curve": self.curve, "total": self.total, "seen": self.seen, "done": self.done}


class Pace:
    """Images a second of all ranks, and the share of time that rank 0 waited for data, between lines of the log. The
    first window after a beginning counts for no summary: processes start in it, and kernels are chosen or compiled."""

    def __init__(self, config: TrainConfig, feed: Feed) -> None:
        self.batch, self.feed, self.steps = config.batch_size, feed, 0
        self.found: list[dict[str, float]] = []
        self.others: dict[str, list[float]] = {}
        self.restart()

    def restart(self) -> None:
        self.started, self.waited = time.perf_counter(), self.feed.waited

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """What is no training, and counts for itself."""
        started = time.perf_counter()
        yield
        self.others.setdefault(f"{name}_s", []).append(time.perf_counter() - started)
        self.restart()

    def line(self, steps: int) -> dict[str, float]:
        """Of the steps since the last line, of `steps` in all; the device must have done them."""
        took, new = time.perf_counter() - self.started, steps - self.steps
        values = {"images_per_s": new * self.batch / took, "waiting": (self.feed.waited - self.waited) / took}
        self.found.append(values)
        self.steps = steps
        self.restart()
        return values

    def summary(self) -> dict[str, float | None]:
        """Medians over the windows, and of the seconds that a snapshot and a test took."""
        counted = self.found[1:]
        names = ("images_per_s", "waiting")
        pace = {name: statistics.median(v[name] for v in counted) if counted else None for name in names}
        return pace | {name: statistics.median(took) for name, took in self.others.items()}


class Logs:
    """folder/log.jsonl, a line a log step, and TensorBoard on request; rank 0 alone has it.

    first: the step that a run goes on from, behind which earlier lines are dropped: they come again.

    Raises UserError where --tensorboard is asked for and not installed, or the folder can't be written.
    """

    def __init__(self, folder: Path, first: int, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        if self.path.exists():
            write_atomic(self.path, "".join(f"{json.dumps(line)}\n" for line in self._lines() if line["step"] <= first))
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('--tensorboard needs an extra: pip install "mvrepro[scale]"') from None
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """All whole lines: the last one of a killed run may be cut off."""
        with suppress(ValueError):
            yield from map(json.loads, self.path.read_text(encoding="utf-8").splitlines())

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line: "step", and the values by name."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise explain_os_error(error, f"write {self.path}") from None
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board:
            self.board.close()
