"""A run from its settings to its record: train, log, test, keep snapshots, go on from one."""

import hashlib
import shutil
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from tqdm import tqdm

from mvrepro import interchange, networks
from mvrepro.determinism import make_deterministic
from mvrepro.errors import UserError
from mvrepro.files import LOCAL, RESULTS, check_file, check_writable, display, read_json, write_atomic, write_json
from mvrepro.losses import LOSSES
from mvrepro.provenance import code_hash, config_hash, provenance
from mvrepro.training import tasks
from mvrepro.training.batches import Feed, Order
from mvrepro.training.checkpoint import Snapshots, is_checkpoint, start_from, write_checkpoint
from mvrepro.training.config import OF_LOSSES, OF_OTHERS, TrainConfig, check, emphasis, rate
from mvrepro.training.graph import check_graph
from mvrepro.training.logs import Course, Logs, Pace
from mvrepro.training.network import Network, check_network
from mvrepro.training.ranks import Ranks, joined
from mvrepro.training.testing import Test, Tested, learned

CODE = code_hash()  # of what is imported here, so of what trains; the files may change while it does


def run(config: TrainConfig, out: Path, *, keep: Path | None = None, begin: Path | None = None) -> dict[str, Any]:
    """`train` for a pipeline: a run that was stopped goes on where it was, unless settings or code have changed, and
    when the record lies at `out` nothing else is left but the network, where `keep` has a place for it. What is tried
    elsewhere than in results/ leaves the snapshots of the runs there alone."""
    work = (LOCAL if out.is_relative_to(RESULTS) else out.parent) / "training" / config.profile / config.run_name()
    record = train(config, out=out, work=work, save=keep, begin=begin, resume="same")
    shutil.rmtree(work, ignore_errors=True)
    return record


def train(
    config: TrainConfig,
    *,
    out: Path | None = None,
    work: Path | None = None,
    save: Path | None = None,
    begin: Path | None = None,
    resume: str = "",
) -> dict[str, Any]:
    """Train and test one network, alone or as one of the ranks of torchrun; returns its record: config, code, sizes,
    metrics, curve, evidence, provenance.

    out     where the record goes (JSON), in one piece once all is known; features of a toy lie beside it
    work    folder for snapshots and log.jsonl; None: neither is written
    save    folder that gets the trained network as a checkpoint;  begin: checkpoint to begin with
    resume  go on from the newest snapshot in `work`: "" (its presence is an error), "strict" (another run's, or one of
            other code or versions, is an error), "despite changes" of those, "same" (begin anew instead of an error)

    Raises UserError for settings that make no sense, on every rank or as an OwnFault on the one that alone knows what
    went wrong, and Diverged where the loss is no longer a number.
    """
    started = time.perf_counter()
    check(config)
    if config.after and not begin:
        raise UserError("--after is for the runs of params.yaml: here --start-from names the checkpoint to begin with")
    if save and save.exists() and not is_checkpoint(save):
        raise UserError(f"{display(save)} is there already and no checkpoint: choose another place for --save")
    for place in filter(None, (out, work)):
        if save and place.resolve().is_relative_to(save.resolve()):  # what lies there makes room for a checkpoint
            raise UserError(f"--out {display(place)} lies in --save {display(save)}: choose another place for one")
    if out:
        check_file(out)
    for place in filter(None, (work, save)):
        check_writable(place)
    with joined(config) as ranks, closing(prepare(config, ranks)) as session:
        network, order = session.network, session.order
        snapshots = Snapshots(work / "snapshots", session.about(), CODE, config.keep_snapshots, ranks) if work else None
        began = {}
        if begin:
            start_from(begin, network)
            began = {"began_with": read_json(begin / "manifest.json").get("made_by", {})}
        first, progress = _first(snapshots, network, resume) if snapshots else (0, {})
        if first and first == order.steps and out and out.exists() and not (save and not save.exists()):
            record = read_json(out)
            if record.get("verified", []) == list(config.verify):
                ranks.say("the run has all its steps already")
                return dict(record)
        with ranks.together():
            logs = Logs(work, first, config.tensorboard) if work and ranks.rank == 0 else None
        course, pace = session.steps(first, progress, snapshots, logs, keep_last=resume != "same")
        with pace.apart("test"):
            tested = session.test.run()
        session.tell(order.steps, tested, logs)
        if save:
            write_checkpoint(save, order.steps, network, {"about": session.about(), "made_by": made_by(config)}, {})
        record = {
            "config": config.decisive(),
            "config_hash": config_hash(config.decisive()),
            "code": CODE,
            **began,
            "sizes": session.sizes(),
            "metrics": tested.metrics,
            "learned": learned(session.task, network, course.curve),
            "curve": course.curve,
            **({"evidence": tested.evidence} if tested.evidence else {}),
            **({"verified": list(config.verify)} if config.verify else {}),
        }
        watched = {"pace": pace.summary(), "resumed_from": first or None}
        record["provenance"] = provenance(started, str(ranks.device), config.threads) | watched
        with ranks.together():
            if out and ranks.rank == 0:
                session.write(record, tested.features, out, work)
        if logs:
            logs.close()
    return record


def check_used(config: TrainConfig, given: Iterable[str]) -> None:
    """Refuse what was asked for by name and decides nothing here: a setting of other losses, of another schedule or of
    other data. A profile may have it, for the rest of its runs. Raises UserError that says what it counts with."""
    for name in given:
        if not getattr(config, name):  # 0, none and no-… ask for what is so anyway
            continue
        here, others = f"--loss {config.loss}", ""
        if name in OF_LOSSES and config.loss in LOSSES and not OF_LOSSES[name](LOSSES[config.loss]):
            others = ", ".join(loss for loss, row in LOSSES.items() if OF_LOSSES[name](row))
        elif name in OF_OTHERS and getattr(config, OF_OTHERS[name][0]) != OF_OTHERS[name][1]:
            other, value = OF_OTHERS[name]
            here = f"--{other} {getattr(config, other)}" if isinstance(value, str) else f"--no-{other}"
            others = f"--{other} {value}" if isinstance(value, str) else f"--{other}"
        elif name not in ("data", "seed") and name not in tasks.settings_of(config.data):
            here = f"--data {config.data}"
            others = ", ".join(data for data in (*tasks.TASKS, "PATH") if name in tasks.settings_of(data))
        if others:
            raise UserError(f"--{name.replace('_', '-')} decides nothing with {here}; it does with {others}")
    _check_reached(config, set(given))


def _check_reached(config: TrainConfig, given: set[str]) -> None:
    """Refuse what was asked for by name and lies behind the end of the run, unless that may have been shortened, to
    try it. Raises UserError."""
    limit, most, values = "steps", config.steps, {"test_every": config.test_every} if config.steps else {}
    if not config.steps and config.epochs and "epochs" not in given:
        limit, most = "epochs", config.epochs
        values = {"milestones": max(config.milestones, default=0) + 1, "margin_epochs": config.margin_epochs + 1}
    for name in (name for name in values if name in given):
        value = getattr(config, name)
        if value and values[name] > most:
            text = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"--{name.replace('_', '-')} {text} lies behind the end of the run, --{limit} {most}")


def made_by(config: TrainConfig) -> dict[str, str]:
    """What tells a network that was kept from one of other settings or code."""
    return {"run": config.run_name(), "config_hash": config_hash(config.decisive()), "code": CODE}


def prepare(config: TrainConfig, ranks: Ranks) -> "Session":
    """What a run trains on, in which order, and what it trains. Raises UserError on all ranks."""
    if config.deterministic:
        make_deterministic(config.seed, config.threads)
    else:
        torch.use_deterministic_algorithms(False)  # as a run before this one may have left them
        torch.set_num_threads(config.threads)
        torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    with ranks.together():
        check_network(config)
        check_graph(config, ranks)
        task = tasks.load(config)
        order = Order(config, len(task.train), ranks.rank, ranks.count)
        if config.warmup > order.steps > 0 and not config.steps:
            raise UserError(
                f"a warm-up of {config.warmup:,} steps, but the run has {order.steps:,}: set a --warmup below"
            )
        shape = task.train.read(np.zeros(1, np.int64)).shape[1:]
    network = Network(config, int(task.train.labels.max()) + 1, shape, ranks)
    return Session(config, ranks, task, order, network, Test(task, network))


@dataclass
class Session:
    """A run that is ready to take its steps."""

    config: TrainConfig
    ranks: Ranks
    task: tasks.Task
    order: Order
    network: Network
    test: Test
    bad: set[int] = field(default_factory=set)  # numbers of the images that were passed over

    def close(self) -> None:
        """Before the process group goes."""
        self.network.release()

    def about(self) -> dict[str, Any]:
        """What a run that goes on from a snapshot must share with it; the place of a set is not among it."""
        train, settings = self.task.train, self.config.decisive()
        about: dict[str, Any] = {
            "ranks": self.ranks.count,
            "images": len(train),
            "classes": self.network.head.num_classes,
        }
        about |= {"labels": hashlib.sha256(np.ascontiguousarray(train.labels).tobytes()).hexdigest()}
        del settings["data"]
        return about | settings | {"device": self.ranks.device.type}

    def sizes(self) -> dict[str, int]:
        bad = self.ranks.gather(self.bad)
        return {
            "train_images": len(self.task.train),
            "train_classes": self.network.head.num_classes,
            "test_images": len(self.task.test),
            "parameters": networks.parameter_count(self.network.backbone),
            "ranks": self.ranks.count,
            "steps": self.order.steps,
            **({"bad_images": len(set().union(*bad))} if any(bad) else {}),
            **self.task.sizes,
        }

    def steps(
        self, first: int, progress: Any, snapshots: Snapshots | None, logs: Logs | None, *, keep_last: bool
    ) -> tuple[Course, Pace]:
        """Take the steps from `first` on, tests and snapshots in between; keep_last: a snapshot at the end, too."""
        config, network, order, ranks = self.config, self.network, self.order, self.ranks
        feed = Feed(config, self.task.train, order, ranks, first)
        self.bad = feed.bad
        course, pace = Course(config, order, **progress), Pace(config, feed)
        bar = tqdm(
            total=order.steps, initial=first, desc=config.run_name(), unit="step", leave=False,
            disable=True if ranks.rank else None,
        )  # fmt: skip
        for step in range(first, order.steps):
            lr = rate(config, step, order.steps, order.an_epoch)
            network.head.t, counted = emphasis(config, step, order.an_epoch)
            course.add(lr, *network.step(feed, counted, lr, watch=step % order.an_epoch == 0))
            done = step + 1
            last = done == order.steps
            snapshot = done % config.snapshot_every == 0 or (last and keep_last)
            log = snapshot or last or done % config.log_every == 0
            if log or done % order.an_epoch == 0:
                course.look()
            if log:
                values = course.line() | pace.line(done - first) | {"bad_images": len(feed.bad)}
                if logs:
                    logs.write(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}", images_per_s=f"{values['images_per_s']:.0f}")
            bar.update()
            if config.test_every and done % config.test_every == 0 and not last:
                with pace.apart("test"):
                    tested = self.test.run()
                bar.clear()
                self.tell(done, tested, logs)
            if snapshots and snapshot:
                with pace.apart("snapshot"):
                    snapshots.write(done, network, course.progress())
        bar.close()
        return course, pace

    def tell(self, done: int, tested: Tested, logs: Logs | None) -> None:
        """What a test found, into the log, and to who watches."""
        if logs and tested.metrics:
            logs.write(done, tested.metrics)
            found = ", ".join(f"{name} {100 * value:.2f} %" for name, value in tested.metrics.items())
            if self.config.test_every:
                self.ranks.say(f"step {done:,}: {found}")

    def write(self, record: dict[str, Any], features: dict[str, Any], out: Path, work: Path | None) -> None:
        """The record last: where it is, what belongs to it is, too."""
        if features:
            write_atomic(out.with_suffix(".safetensors"), to_bytes(features))
        if work and out.is_relative_to(work):
            path, network = work / "backbone.safetensors", self.network
            interchange.save_backbone(path, network.backbone, self.config.backbone, **network.built)
        write_json(out, record)


def _first(snapshots: Snapshots, network: Network, resume: str) -> tuple[int, dict[str, Any]]:
    """The step to begin with and how far the curve is, after the network got its state."""
    ranks, here = snapshots.ranks, display(snapshots.folder)
    with ranks.together():
        if ranks.rank == 0:
            snapshots.clear()
            if snapshots.steps() and not resume:
                raise UserError(
                    f"{here} holds a run at step {snapshots.steps()[0]}: --resume goes on with it, another --out "
                    "begins a new one"
                )
    try:
        found = snapshots.read(despite_changes=resume == "despite changes") if resume else None
    except UserError:
        if resume != "same":
            raise
        found = None
        shutil.rmtree(snapshots.folder, ignore_errors=True)
    if found is None:
        if resume in ("strict", "despite changes"):
            ranks.say(f"{here} holds no snapshot yet: beginning at step 0")
        return 0, {}
    step, common, own, progress = found
    network.load(common, own)
    if resume != "same":
        ranks.say(f"going on from {display(snapshots.path(step))}")
    return step, progress
