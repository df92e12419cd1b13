"""Every setting of a run at scale. Imports no torch, whose environment the command sets first."""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from mvrepro.errors import UserError

SCHEDULES = ("step", "cosine")


def setting(text: str, default: Any = MISSING, *, free: bool = False) -> Any:
    """text: for --help. free: may change when a run goes on, since it decides nothing of the weights."""
    return field(metadata={"help": text, "free": free}, **({} if default is MISSING else {"default": default}))


@dataclass(frozen=True)
class ScaleConfig:
    """What decides a run, and how it is watched. A step is one of the optimiser; counts are of all ranks together."""

    # those without a default come from a profile of params.yaml
    loss: str = setting("a name from mvrepro.losses.LOSSES")
    backbone: str = setting("a name from mvrepro.networks")
    embedding_dim: int = setting("dimensions of an embedding")
    epochs: int = setting("passes over the training set")
    batch_size: int = setting("images a step, on all ranks and in all accumulated parts together")
    lr: float = setting("learning rate after the warm-up")
    milestones: tuple[int, ...] = setting("schedule step: epochs after which lr is divided by 10")

    data: str = setting(
        "the training set: .rec, .tar, a folder of these, or a folder with a folder a person", "", free=True
    )
    renumber: bool = setting("give class ids with holes new numbers 0 … K−1", False)
    synthetic_classes: int = setting("instead of --data: random images of K classes, to measure with", 0)
    image_size: int = setting("side of the (square) images; the large backbones want 112", 112)
    flip: bool = setting("mirror each image with probability 0.5; at the test, add the mirror image's embedding", True)
    seed: int = setting("decides weights, order, mirroring, dropout and sampled negatives", 0)
    steps: int = setting("end after so many steps (0: after all epochs)", 0)
    accumulate: int = setting("parts of a batch that go through the network one after the other", 1)
    momentum: float = setting("momentum of SGD", 0.9)
    weight_decay: float = setting("weight decay of SGD", 5e-4)
    clip: float = setting("largest norm of the gradient of backbone and head together (0: any)", 0.0)
    schedule: str = setting(" or ".join(SCHEDULES), "step")
    warmup: int = setting("steps over which lr grows from 0", 0)
    s: float = setting("scale of the cosines", 32.0)
    m: float | None = setting("margin; default: that of the loss (AM 0.35, Arc 0.5, A 2)", None)
    t: float = setting("strength of the emphasis on marked classes, >= 0 (MV and SV losses)", 0.2)
    gamma: float = setting("exponent of the F losses", 2.0)
    hard_ratio: float = setting("share of a batch that the HM losses keep", 0.9)
    easy_margin: bool = setting("the margin only where cosθ_y > 0, as in the authors' code", False)
    stop_gradient: bool = setting("no gradient through the emphasis of the adaptive form; not in the paper", False)
    t_warmup: int = setting("steps over which t grows from 0", 0)
    margin_epochs: int = setting("epochs with t = 0 before the others: starts from the margin model", 0)
    annealing: bool = setting("A-Softmax with the annealed λ of the authors' code", False)
    sample_rate: float = setting("share of the classes that a step sees (Partial FC)", 1.0)
    update_in_backward: bool = setting("the head's gradient never exists as a whole: less memory, no clipping", False)
    bfloat16: bool = setting("autocast the backbone to bfloat16; the head stays in float32", False)
    channels_last: bool = setting("memory format of images and convolutions", True)
    compile: bool = setting("torch.compile the backbone", False)
    sync_bn: bool = setting("batch norms see the batch of all ranks", False)
    deterministic: bool = setting("the same bits on the same hardware; slower", False)
    device: str = setting("auto, cpu or cuda (each rank takes the GPU of its local number)", "auto")
    threads: int = setting("CPU threads of each process, besides those that read images", 1)

    workers: int = setting("processes that read and decode images, of each rank (0: none beside it)", 4, free=True)
    bad_limit: int = setting("images a rank may skip because they don't decode", 100, free=True)
    verify: tuple[str, ...] = setting("InsightFace's pair sets (.bin) to test on while training", (), free=True)
    verify_every: int = setting("steps between two tests; there is one at the end, too", 2000, free=True)
    log_every: int = setting("steps between two lines of the log", 50, free=True)
    snapshot_every: int = setting("steps between two snapshots; there is one at the end, too", 1000, free=True)
    keep_snapshots: int = setting("how many snapshots stay", 2, free=True)
    tensorboard: bool = setting('log for TensorBoard, too (pip install "mvrepro[scale]")', False, free=True)
    timeout: float = setting("minutes that ranks wait for each other before they give up", 10.0, free=True)

    def decisive(self) -> dict[str, Any]:
        """The settings that a snapshot and the run that goes on from it must share."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}


LEAST: dict[str, float] = {
    "embedding_dim": 1, "epochs": 1, "batch_size": 2, "lr": 0, "image_size": 1, "seed": 0, "steps": 0, "accumulate": 1,
    "momentum": 0, "weight_decay": 0, "clip": 0, "warmup": 0, "margin_epochs": 0, "threads": 1, "workers": 0,
    "bad_limit": 0, "verify_every": 1, "log_every": 1, "snapshot_every": 1, "keep_snapshots": 1, "synthetic_classes": 0,
}  # fmt: skip


def check(config: ScaleConfig) -> None:
    """Refuse settings that make no sense before anything is computed; the head refuses its own. Raises UserError."""
    for name, bound in LEAST.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= bound):
            raise UserError(f"{name} must be a number >= {bound:g}, got {value}")
    if not (math.isfinite(config.timeout) and config.timeout > 0):
        raise UserError(f"timeout must be a number of minutes > 0, got {config.timeout}")
    if config.schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {config.schedule!r}; known are: {', '.join(SCHEDULES)}")
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {config.device!r}: each rank finds its own GPU")
    if bool(config.data) == bool(config.synthetic_classes):
        raise UserError("exactly one of --data and --synthetic-classes says what is trained on")
    if config.update_in_backward and (config.accumulate > 1 or config.clip):
        other = "--accumulate" if config.accumulate > 1 else "--clip"
        raise UserError(
            f"--update-in-backward and {other} exclude each other: the head's step is taken within each backward "
            "pass, so its gradient is neither summed over several nor there to be measured"
        )


def rate(config: ScaleConfig, step: int, steps: int, steps_an_epoch: int) -> float:
    """The learning rate of step 0 … steps − 1: a linear warm-up, then constant between milestones, or a cosine to 0.

    A function of the step and nothing else, so no snapshot has to hold a schedule.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * 0.1 ** sum(step // steps_an_epoch >= epoch for epoch in config.milestones)


def emphasis(config: ScaleConfig, step: int, steps_an_epoch: int) -> float:
    """t of step 0 … steps − 1, to which a warm-up then comes: 0 while the margin model is trained."""
    return config.t if step >= config.margin_epochs * steps_an_epoch else 0.0
