"""The training loop: SGD with momentum, on a CPU or a GPU, from a config to a record of what came out."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from mvrepro import backbones, data
from mvrepro.checkpoint import load_checkpoint, save_checkpoint
from mvrepro.determinism import make_deterministic
from mvrepro.errors import UserError
from mvrepro.files import write_atomic, write_json
from mvrepro.losses import LOSSES, MarginHead
from mvrepro.protocols import all_pairs
from mvrepro.provenance import config_hash, provenance


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; params.yaml gives each profile its values."""

    profile: str
    loss: str
    seed: int
    data: str  # "orl": people-disjoint verification; "digits": classification, for the toy geometry
    backbone: str
    embedding_dim: int
    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...]  # epochs after which lr is divided by 10
    image_size: int = 32
    train_people: int = 20
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = True  # mirror each image with probability 0.5; at the test, add the mirror image's embedding
    s: float = 32.0
    m: float | None = None  # None: the default of the loss's margin
    t: float = 0.2
    gamma: float = 2.0
    hard_ratio: float = 0.9
    easy_margin: bool = False
    t_warmup: int = 0  # steps
    annealing: bool = False
    fprs: tuple[float, ...] = (0.01, 0.001)
    device: str = "auto"
    threads: int = 1

    def run_name(self) -> str:
        """The name of the run's files: loss, its t where it has one, seed."""
        t = f"_t{self.t:g}" if self.loss in LOSSES and LOSSES[self.loss].h else ""
        dim = f"_{self.embedding_dim}d" if self.data == "digits" else ""
        return f"{self.loss}{t}{dim}_seed{self.seed}"


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
    train_set, test_set = load(config)
    check_test(config, test_set)
    backbone, head = build(config, train_set, device)
    if start_from:
        load_checkpoint(start_from, backbone, head)
    curve = fit(config, backbone, head, train_set, device)
    embeddings = backbones.embed(backbone, normalise_pixels(test_set), mirror=config.flip)
    if not embeddings.isfinite().all():
        raise Diverged(f"the last step of {config.run_name()} left no numbers in the network: {CURES}")
    if save:
        save_checkpoint(save, backbone, head, config)
    settings = asdict(config)
    record = {
        "config": settings,
        "config_hash": config_hash(settings),
        "sizes": {
            "train_images": len(train_set),
            "train_classes": head.num_classes,
            "test_images": len(test_set),
            "parameters": backbones.parameter_count(backbone),
        },
        "metrics": evaluate(config, embeddings, test_set, head),
        "curve": curve,
        "provenance": provenance(started, str(device), config.threads),
    }
    features = {}
    if config.data == "digits":
        ids = torch.from_numpy(test_set.ids)
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
    }
    for name, bound in least.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise UserError(f"{name} must be a number >= {bound}, got {value}")
    wrong = [fpr for fpr in config.fprs if not 0 < fpr <= 1]
    if wrong:
        raise UserError(f"a false-positive rate must be in (0, 1], got {wrong[0]}")


def check_test(config: TrainConfig, test_set: data.Images) -> None:
    """Refuse a false-positive rate that the test set has too few impostor pairs for."""
    if config.data == "digits":
        return
    sizes = np.bincount(test_set.ids)
    impostors = int((len(test_set) ** 2 - (sizes**2).sum()) // 2)
    if impostors * min(config.fprs) < 1:
        raise UserError(
            f"the test has {impostors} impostor pairs, too few for a false-positive rate of {min(config.fprs):g}: "
            "train on fewer people"
        )


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


def load(config: TrainConfig) -> tuple[data.Images, data.Images]:
    """The train and test sets of a config."""
    if config.data == "orl":
        return data.split_people(data.orl(config.image_size), config.train_people, config.seed)
    if config.data == "digits":
        return data.split_images(data.digits(), 0.25, config.seed)
    raise UserError(f"unknown data {config.data!r}; known are: orl, digits")


def normalise_pixels(images: data.Images) -> Tensor:
    """(N, C, H, W) float32, (pixel − 127.5)/128."""
    return (torch.from_numpy(images.pixels).float() - 127.5) / 128


def build(config: TrainConfig, train_set: data.Images, device: torch.device) -> tuple[nn.Module, MarginHead]:
    """The backbone and the head of a config, on the device."""
    _, channels, _, side = train_set.pixels.shape
    backbone = backbones.build(
        config.backbone, in_channels=channels, image_size=side, embedding_dim=config.embedding_dim
    )
    try:
        head = MarginHead(
            config.loss,
            config.embedding_dim,
            int(train_set.ids.max()) + 1,
            s=config.s,
            m=config.m,
            t=config.t,
            gamma=config.gamma,
            hard_ratio=config.hard_ratio,
            easy_margin=config.easy_margin,
            t_warmup=config.t_warmup,
            annealing=config.annealing,
            check=False,  # the labels are 0 … K−1 by construction, and `fit` looks at the loss itself
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return backbone.to(device), head.to(device)


def fit(
    config: TrainConfig, backbone: nn.Module, head: MarginHead, train_set: data.Images, device: torch.device
) -> dict[str, list[float]]:
    """Run all epochs; returns, for each, the mean loss, the learning rate, and the share of negative
    classes that are marked (Eq. 5) and the mean cosθ_y at its first step."""
    images, labels = normalise_pixels(train_set).to(device), torch.from_numpy(train_set.ids).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(config.milestones))
    order = torch.Generator().manual_seed(config.seed)
    half = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    curve: dict[str, list[float]] = {"loss": [], "lr": [], "marked_share": [], "target_cosine": []}
    step = 0
    # disable=None: a bar in a terminal, silence in a notebook, a pipe or a log.
    bar = trange(config.epochs, desc=config.run_name(), unit="epoch", disable=None, leave=False)
    for epoch in bar:
        backbone.train(), head.train()
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
                share, cosine = marked_share(head, embeddings.detach(), truth)
                curve["marked_share"].append(share)
                curve["target_cosine"].append(cosine)
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


@torch.no_grad()
def marked_share(head: MarginHead, embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """The share of negative classes k ≠ y with f(m, θ_y) < cosθ_k, and the mean cosθ_y, of one batch."""
    cos = head.cosines(embeddings)
    target = cos.gather(1, labels[:, None])
    marked = (cos > head.margin(target)).scatter(1, labels[:, None], False)
    return round(marked.sum().item() / (len(labels) * (head.num_classes - 1)), 6), round(target.mean().item(), 6)


def evaluate(config: TrainConfig, embeddings: Tensor, test_set: data.Images, head: MarginHead) -> dict[str, float]:
    """Metrics of the test embeddings, as shares in [0, 1]: TPR at each FPR over all pairs (faces), or
    the accuracy of the nearest class weight (digits)."""
    if config.data == "digits":
        nearest = (F.normalize(embeddings) @ F.normalize(head.weight.detach().cpu()).T).argmax(1)
        return {"accuracy": (nearest == torch.from_numpy(test_set.ids)).float().mean().item()}
    points = all_pairs(embeddings.numpy(), test_set.ids, config.fprs)
    return {f"tpr@fpr={p.fpr:g}": p.tpr for p in points}
