"""The training loop: SGD with momentum, on a CPU or a GPU, from a config to a record of what came out."""

import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from mvrepro import networks, protocols
from mvrepro.determinism import make_deterministic
from mvrepro.errors import UserError
from mvrepro.files import write_atomic, write_json
from mvrepro.heads.margin import SETTINGS, WATCHED, MarginHead
from mvrepro.images.small import Images
from mvrepro.losses import LOSSES
from mvrepro.provenance import config_hash, provenance
from mvrepro.training import tasks
from mvrepro.training.weights import load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; params.yaml gives each profile its values."""

    profile: str
    loss: str
    seed: int
    data: str  # a key of tasks.TASKS; CONTRIBUTING says how to add one
    backbone: str
    embedding_dim: int
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]  # epochs after which lr is divided by 10
    variant: str = ""  # what sets the run apart from the plain ones of its profile, in words
    image_size: int = 32
    train_people: int = 20  # orl only
    remove: str = "overlap"  # lfw and cfp: who is taken out of the training set, see tasks.REMOVALS
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = True  # mirror each image with probability 0.5; at the test, add the mirror image's embedding
    s: float = 32.0
    m: float | None = None  # None: the default of the loss's margin
    t: float = 0.2
    gamma: float = 2.0
    hard_ratio: float = 0.9
    easy_margin: bool = False
    stop_gradient: bool = False
    t_warmup: int = 0  # steps
    margin_epochs: int = 0  # epochs with t = 0 before the others: starts from the margin model
    annealing: bool = False
    fprs: tuple[float, ...] = (0.01, 0.001)
    device: str = "auto"
    threads: int = 1

    def run_name(self) -> str:
        """The name of the run's files: loss, its t where it has one, variant, seed."""
        t = f"_t{self.t:g}" if self.loss in LOSSES and LOSSES[self.loss].h else ""
        dim = f"_{self.embedding_dim}d" if self.data == "digits" else ""
        variant = f"_{self.variant.replace(' ', '-')}" if self.variant else ""
        return f"{self.loss}{t}{dim}{variant}_seed{self.seed}"


class Diverged(UserError):
    """The loss is no longer a number."""


CURES = (
    "try a smaller --lr, a warm-up of t (--t-warmup), --easy-margin, or --start-from a margin model; "
    "nothing was written"
)


def train(config: TrainConfig, *, start_from: Path | None = None, save: Path | None = None) -> dict[str, Any]:
    """Train and test one network; returns its record: config, metrics, curve, provenance.

    start_from and save name checkpoints to begin with and to write. Raises UserError for settings that
    make no sense and Diverged on a non-finite loss.
    """
    return _train(config, start_from, save)[0]


def train_to_file(
    config: TrainConfig, out: Path, *, start_from: Path | None = None, save: Path | None = None
) -> dict[str, Any]:
    """`train`, with the record written to `out` (JSON) in one piece once all is known. Toy features of
    2 or 3 dimensions go beside it as .safetensors, for the drawings of notebook 02."""
    from safetensors.torch import save as to_bytes

    if config.data == "digits" and save == out.with_suffix(".safetensors"):
        raise UserError(f"{save} is where the features of this run go: --save the checkpoint under another name")
    record, features = _train(config, start_from, save)
    if features:
        write_atomic(out.with_suffix(".safetensors"), to_bytes(features))
    write_json(out, record)
    return record


def _train(config: TrainConfig, start_from: Path | None, save: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    started = time.perf_counter()
    check(config)
    device = pick_device(config.device)
    make_deterministic(config.seed, config.threads)
    task = load(config)
    backbone, head = build(config, task.train, device)
    if start_from:
        load_checkpoint(start_from, backbone, head)
    curve = fit(config, backbone, head, task.train, device)
    embeddings = networks.embed(backbone, normalise_pixels(task.test), mirror=config.flip)
    if not embeddings.isfinite().all():
        raise Diverged(f"the last step of {config.run_name()} left no numbers in the network: {CURES}")
    if save:
        save_checkpoint(save, backbone, head, config)
    metrics, evidence = task.judge(embeddings.numpy(), head.weight.detach().cpu().numpy())
    settings = asdict(config)
    record = {
        "config": settings,
        "config_hash": config_hash(settings),
        "sizes": {
            "train_images": len(task.train),
            "train_classes": head.num_classes,
            "test_images": len(task.test),
            "parameters": networks.parameter_count(backbone),
            **task.sizes,
        },
        "metrics": metrics,
        "curve": curve,
        **({"evidence": evidence} if evidence else {}),
        "provenance": provenance(started, str(device), config.threads),
    }
    features = {}
    if config.data == "digits":
        ids = torch.from_numpy(task.test.ids)
        features = {"features": embeddings, "ids": ids, "weights": head.weight.detach().cpu()}
    return record, features


def check(config: TrainConfig) -> None:
    """Refuse settings that make no sense before anything is computed."""
    least = {
        "batch_size": 2,  # batch normalisation needs two
        "epochs": 0,
        "lr": 0,
        "momentum": 0,
        "weight_decay": 0,
        "embedding_dim": 1,
        "image_size": 1,
        "threads": 1,
        "seed": 0,
        "margin_epochs": 0,
    }
    for name, bound in least.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise UserError(f"{name} must be a number >= {bound}, got {value}")
    if config.remove not in tasks.REMOVALS:
        raise UserError(f"unknown remove {config.remove!r}; known are: {', '.join(tasks.REMOVALS)}")


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} can't be used: {str(error).splitlines()[0]}") from None
    return device


def load(config: TrainConfig) -> tasks.Task:
    """The task of a config. Raises UserError where its test has too few impostor pairs for an FPR."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    task = tasks.load(settings.pop("data"), **settings)
    if task.impostor_pairs is not None:
        try:
            protocols.check_fprs(task.impostor_pairs, config.fprs)
        except ValueError as error:
            raise UserError(
                f"fprs of data {config.data!r}: {error}; test with more people, or set larger fprs in params.yaml, "
                f"{config.profile}.train"
            ) from None
    return task


def normalise_pixels(images: Images) -> Tensor:
    """(N, C, H, W) float32, (pixel − 127.5)/128, channels last: on a CPU convolutions are faster then."""
    return ((torch.from_numpy(images.pixels).float() - 127.5) / 128).contiguous(memory_format=torch.channels_last)


def build(config: TrainConfig, train_set: Images, device: torch.device) -> tuple[nn.Module, MarginHead]:
    """The backbone and the head of a config, on the device."""
    _, channels, _, side = train_set.pixels.shape
    backbone = networks.build(
        config.backbone, in_channels=channels, image_size=side, embedding_dim=config.embedding_dim
    )
    try:
        head = MarginHead(
            config.loss,
            config.embedding_dim,
            int(train_set.ids.max()) + 1,
            **{name: getattr(config, name) for name in SETTINGS},
            check=False,  # the labels are 0 … K−1 by construction, and `fit` looks at the loss itself
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return backbone.to(device, memory_format=torch.channels_last), head.to(device)  # type: ignore[call-overload]


def fit(
    config: TrainConfig, backbone: nn.Module, head: MarginHead, train_set: Images, device: torch.device
) -> dict[str, list[float]]:
    """Run all epochs; returns, for each, the mean loss, the learning rate, and at its first step the share
    of negative classes that are marked (Eq. 5), the mean cosθ_y and the mean cosθ_k of the others."""
    images, labels = normalise_pixels(train_set).to(device), torch.from_numpy(train_set.ids).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(config.milestones))
    order = torch.Generator().manual_seed(config.seed)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    curve: dict[str, list[float]] = {name: [] for name in ("loss", "lr", *WATCHED)}
    step = 0
    # disable=None: a bar in a terminal, silence in a notebook, a pipe or a log.
    bar = trange(config.epochs, desc=config.run_name(), unit="epoch", disable=None, leave=False)
    for epoch in bar:
        backbone.train(), head.train()
        head.t = config.t if epoch >= config.margin_epochs else 0.0
        total, seen = 0.0, 0
        batches = torch.randperm(len(labels), generator=order).split(config.batch_size)
        for first, rows in enumerate(batches):
            if len(rows) == 1:  # batch normalisation needs two
                continue
            batch, truth = images[rows], labels[rows]
            if config.flip:
                mirrored = torch.rand(len(rows), generator=order).to(device) < 0.5
                batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
            with half:
                embeddings = backbone(batch)
            if first == 0:
                for name, value in head.watch(embeddings.detach(), truth).items():
                    curve[name].append(value)
            loss = head(embeddings, truth)
            value = loss.item()
            step += 1
            if not math.isfinite(value):
                raise Diverged(
                    f"the loss became {value} at step {step} (epoch {epoch + 1}) of {config.run_name()} with "
                    f"lr {config.lr:g}, s {config.s:g}, m {head.m:g}: {CURES}"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += value * len(rows)
            seen += len(rows)
        curve["loss"].append(round(total / seen, 6))
        curve["lr"].append(optimiser.param_groups[0]["lr"])
        bar.set_postfix(loss=f"{curve['loss'][-1]:.3f}")
        schedule.step()
    return curve
