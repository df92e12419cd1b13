"""A run at scale from its settings to its record: train, log, test, keep snapshots, go on from one."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mvrepro import interchange, networks
from mvrepro.determinism import make_deterministic
from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import display, read_json, write_json
from mvrepro.provenance import config_hash, provenance
from mvrepro.training.batches import Feed, Order, TrainingSet, open_set
from mvrepro.training.checkpoint import Snapshots
from mvrepro.training.config import ScaleConfig, emphasis, rate
from mvrepro.training.logs import Logs
from mvrepro.training.network import Network
from mvrepro.training.ranks import Ranks
from mvrepro.training.testing import open_pairs, verify

CURES = "try a smaller --lr, a --warmup of it, a warm-up of t (--t-warmup), --easy-margin or --clip"


def prepare(config: ScaleConfig, ranks: Ranks) -> tuple[TrainingSet, Order, Network]:
    """What a run trains on, in which order, and what it trains. Raises UserError on all ranks."""
    if config.deterministic:
        make_deterministic(config.seed, config.threads)
    else:
        torch.set_num_threads(config.threads)
        torch.backends.cudnn.benchmark = True
    with ranks.together():
        images = open_set(config)
        order = Order(config, len(images.images), ranks.rank, ranks.count)
    return images, order, Network(config, images.classes, ranks)


def train(config: ScaleConfig, out: Path, ranks: Ranks, *, resume: bool) -> dict[str, Any]:
    """Run all steps, or those that are left; returns the record, which lies in OUT/record.json, too.

    Raises UserError on every rank, or an OwnFault on the one that alone knows what went wrong.
    """
    started = time.perf_counter()
    images, order, network = prepare(config, ranks)
    with ranks.together():
        sets = open_pairs(config)
    about: dict[str, Any] = {"ranks": ranks.count, "device": ranks.device.type, "images": len(images.images)}
    about |= {"classes": images.classes, "labels": images.labels, **config.decisive()}
    snapshots = Snapshots(out / "snapshots", about, config.keep_snapshots, ranks)
    first = _first(snapshots, network, ranks, resume=resume)
    if first == order.steps and (out / "record.json").exists():
        ranks.say("the run has all its steps already")
        return dict(read_json(out / "record.json"))
    with ranks.together():
        logs = Logs(out, first, config.tensorboard) if ranks.rank == 0 else None
    ranks.say(
        f"{config.loss}, {config.backbone}: {len(images.images):,} images of {images.classes:,} classes, "
        f"steps {first:,} … {order.steps:,}, {order.an_epoch:,} an epoch, on {ranks.count} ranks ({ranks.device.type})"
    )
    feed = Feed(config, images.images, order, ranks, first)
    pace = Pace(config, feed)
    # of a run that was stopped between its last snapshot and its record
    figures = verify(network, sets) if first == order.steps else {}
    values: dict[str, float] = logs.last() if logs else {}
    window: list[tuple[Tensor, Tensor | None]] = []  # of the steps since the last log step, still on the device
    bar = tqdm(
        total=order.steps, initial=first, desc=config.loss, unit="step", leave=False,
        disable=True if ranks.rank else None,
    )  # fmt: skip
    for step in range(first, order.steps):
        lr = rate(config, step, order.steps, order.an_epoch)
        network.head.t = emphasis(config, step, order.an_epoch)
        window.append(network.step(feed, step, lr))
        done = step + 1
        last, snapshot = done == order.steps, done % config.snapshot_every == 0
        if last or snapshot or done % config.log_every == 0:
            losses = torch.stack([loss for loss, _ in window]).tolist()  # waits for the device
            norms = [norm.item() for _, norm in window if norm is not None]
            window.clear()
            _check(losses, done, lr, config)
            values = {"epoch": step // order.an_epoch, "loss": statistics.fmean(losses), "lr": lr}
            values |= {"gradient_norm": max(norms)} if norms else {}
            values |= pace.since(len(losses)) | {"bad_images": len(feed.bad)}
            if logs:
                logs.write(done, values)
            bar.set_postfix(loss=f"{values['loss']:.3f}", images_per_s=f"{values['images_per_s']:.0f}")
        bar.update()
        if sets and (last or done % config.verify_every == 0):
            with pace.apart("verify"):
                figures = verify(network, sets)
            if logs:
                logs.write(done, figures)
            bar.clear()
            ranks.say(f"step {done:,}: " + ", ".join(f"{n} {100 * v:.2f} %" for n, v in figures.items()))
        if last or snapshot:
            with pace.apart("snapshot"):
                snapshots.write(done, network.common_state(), network.own_state())
    bar.close()
    record = {
        **_settings(config, images, order, network),
        "metrics": figures,
        "loss": values.get("loss"),
        "pace": pace.summary(),
        "bad_images": len(set().union(*ranks.gather(feed.bad))),
        "resumed_from": first or None,
        "provenance": provenance(started, str(ranks.device), config.threads),
    }
    with ranks.together():
        if ranks.rank == 0:
            sizes = {"image_size": config.image_size, "embedding_dim": config.embedding_dim}
            interchange.save_backbone(out / "backbone.safetensors", network.backbone, config.backbone, **sizes)
            write_json(out / "record.json", record)
    if logs:
        logs.close()
    return record


def _settings(config: ScaleConfig, images: TrainingSet, order: Order, network: Network) -> dict[str, Any]:
    settings = asdict(config)
    sizes = {
        "train_images": len(images.images),
        "train_classes": images.classes,
        "parameters": networks.parameter_count(network.backbone),
        "ranks": order.ranks,
        "steps": order.steps,
    }
    return {"config": settings, "config_hash": config_hash(settings), "sizes": sizes}


def _first(snapshots: Snapshots, network: Network, ranks: Ranks, *, resume: bool) -> int:
    """The step to begin with, after the network got its state."""
    with ranks.together():
        if ranks.rank == 0:
            try:
                snapshots.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain_os_error(error, f"write {display(snapshots.folder)}") from None
            snapshots.clear()
            if snapshots.steps() and not resume:
                raise UserError(
                    f"{display(snapshots.folder)} holds a run at step {snapshots.steps()[0]}: "
                    "--resume goes on with it, another --out begins a new one"
                )
    found = snapshots.read() if resume else None
    if found is None:
        if resume:
            ranks.say(f"{display(snapshots.folder)} holds no snapshot yet: beginning at step 0")
        return 0
    step, common, own = found
    network.load(common, own)
    ranks.say(f"going on from {display(snapshots.path(step))}")
    return step


def _check(losses: list[float], done: int, lr: float, config: ScaleConfig) -> None:
    wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if wrong is not None:
        raise UserError(
            f"the loss became {losses[wrong]} at step {done - len(losses) + wrong + 1} with lr {lr:g}: {CURES}; "
            "the snapshots before it stay"
        )


class Pace:
    """Images a second of all ranks, and the share of time that rank 0 waited for data, between log steps. The first
    window after a beginning counts for no summary: processes start in it, and kernels are chosen or compiled."""

    def __init__(self, config: ScaleConfig, feed: Feed) -> None:
        self.batch, self.feed = config.batch_size, feed
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

    def since(self, steps: int) -> dict[str, float]:
        """Of the steps since the last call; the device must have done them."""
        took = time.perf_counter() - self.started
        values = {"images_per_s": steps * self.batch / took, "waiting": (self.feed.waited - self.waited) / took}
        self.found.append(values)
        self.restart()
        return values

    def summary(self) -> dict[str, float | None]:
        """Medians over the windows, and of the seconds that a snapshot and a test took."""
        counted = self.found[1:]
        names = ("images_per_s", "waiting")
        pace = {name: statistics.median(v[name] for v in counted) if counted else None for name in names}
        return pace | {name: statistics.median(took) for name, took in self.others.items()}
