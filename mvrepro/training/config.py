"""Every setting of a training, once: its meaning, its default and its range. Imports no torch, whose environment the
command sets first; the options of `python -m mvrepro train` are made from the fields."""

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from types import UnionType
from typing import Any, get_args, get_origin

from mvrepro.errors import UserError

Range = tuple[float, float]
COUNT: Range = (0, 2**31)  # of steps, images, …
BELOW_1: Range = (0, 0.999999)
PART: Range = (1e-9, 1)  # a share that is not 0


def setting(
    text: str, default: Any = MISSING, within: Range | None = None, *, one_of: tuple[str, ...] = (), free: bool = False
) -> Any:
    """text: for --help; within: the least and the largest value, of which the head may refuse more; one_of: the words.
    free: may change when a run goes on, and between equal runs, since it decides nothing of the weights."""
    about = {"help": text, "within": within, "one_of": one_of, "free": free}
    return field(metadata=about, **({} if default is MISSING else {"default": default}))


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run, and how it is watched. A step is one of the optimiser; counts are of all ranks together.

    Those without a default come from a profile of params.yaml.
    """

    loss: str = setting("a name from mvrepro.LOSSES")
    data: str = setting(
        "what is trained on and tested with: a row of TASKS in training/tasks.py, such as orl or lfw; or the path of a "
        "training set: .rec, .tar, a folder of these, or a folder with a folder a person"
    )  # fmt: skip
    backbone: str = setting("name of the network, of those in mvrepro/networks.py")
    embedding_dim: int = setting("dimensions of an embedding", within=(1, 65536))
    epochs: int = setting("passes over the training set", within=COUNT)
    batch_size: int = setting("images a step, on all ranks and in all accumulated parts together", within=(2, 2**31))
    lr: float = setting("learning rate after the warm-up", within=(0, 1e38))
    milestones: tuple[int, ...] = setting("schedule step: epochs after which lr is divided by 10", within=(1, 2**31))

    profile: str = setting("the section of params.yaml that the settings came from", "", free=True)
    seed: int = setting("decides people, weights, order, mirroring and samples", 0, (0, 2**32 - 1))
    variant: str = setting("what sets the run apart from the plain ones of its profile, in words", "")
    # the training set
    image_size: int = setting("side of the (square) images", 32, (1, 4096))
    train_people: int = setting("orl: how many people to train on; the rest is for the test", 20, (2, 2**31))
    remove: str = setting(
        "lfw, cfp: who is taken out, overlap (who is also in the test set) or others (as many who are not)",
        "overlap", one_of=("overlap", "others"),
    )  # fmt: skip
    people: str = setting(
        "lfw, cfp: who is trained on, all who are in no test, or few (CelebA and the other of the two)",
        "few", one_of=("few", "all"),
    )  # fmt: skip
    renumber: bool = setting("a path: give class ids with holes new numbers 0 … K−1", False)
    synthetic_classes: int = setting("with --data synthetic: random images of K classes, to measure with", 0, COUNT)
    flip: bool = setting("mirror each image with probability 0.5; at the test, add the mirror image's embedding", True)
    # the schedule
    steps: int = setting("end after so many steps (0: after all epochs)", 0, COUNT)
    schedule: str = setting("how lr falls: in steps or as a cosine", "step", one_of=("step", "cosine"))
    warmup: int = setting("steps over which lr grows from 0", 0, COUNT)
    accumulate: int = setting("parts of a batch that go through the network one after the other", 1, (1, 2**20))
    momentum: float = setting("momentum of SGD", 0.9, BELOW_1)
    weight_decay: float = setting("weight decay of SGD", 5e-4, (0, 1e6))
    decay_all: bool = setting("weight decay on biases and on the scales of batch norms, too", True)
    clip: float = setting("largest norm of the gradient of backbone and head together (0: any)", 0.0, (0, 1e38))
    # the loss
    s: float = setting("scale of the cosines", 32.0, (1e-6, 1e6))
    m: float | None = setting("margin; default: that of the loss (AM 0.35, Arc 0.5, A 2)", None, (0, 1e3))
    t: float = setting("strength of the emphasis on marked classes, >= 0 (MV and SV losses)", 0.2, (0, 1e6))
    gamma: float = setting("exponent of the F losses", 2.0, (0, 1e3))
    hard_ratio: float = setting("share of a batch that the HM losses keep", 0.9, PART)
    easy_margin: bool = setting("the margin only where cosθ_y > 0, as in the authors' code", False)
    stop_gradient: bool = setting("no gradient through the emphasis of the adaptive form; not in the paper", False)
    t_warmup: int = setting("steps over which t grows from 0 (after the margin epochs)", 0, COUNT)
    margin_epochs: int = setting("epochs with t = 0 before the others: starts from the margin model", 0, COUNT)
    after: str = setting(
        "a loss: begin with the network that the profile's run of this loss and seed ended with (python -m mvrepro "
        "runs; for a checkpoint of your own: --start-from)", "",
    )  # fmt: skip
    annealing: bool = setting("A-Softmax with the annealed λ of the authors' code", False)
    sample_rate: float = setting("share of the classes that a step sees (Partial FC)", 1.0, PART)
    update_in_backward: bool = setting("the head's gradient never exists as a whole: less memory, no clipping", False)
    # the machine
    bfloat16: bool = setting(
        "autocast the backbone to bfloat16; on a GPU, the head's products, too, where it sweeps", False
    )
    tf32: bool = setting("on a GPU, float32 products and convolutions keep 10 bits of their factors: faster", False)
    channels_last: bool = setting("memory format of images and convolutions", True)
    compile: bool = setting("torch.compile the backbone", False)
    sync_bn: bool = setting("batch norms see the batch of all ranks", False)
    graph: bool = setting("on a GPU, each step is launched as one CUDA graph: several times faster for small networks",
                          False, free=True)  # fmt: skip
    deterministic: bool = setting("the same bits on the same hardware; slower", True)
    portable: bool = setting("the same bits on all x86 processors, by instructions up to AVX2; slower", True)
    device: str = setting("auto, cpu, cuda, cuda:1, … (under torchrun each rank takes the GPU of its number)", "auto")
    threads: int = setting("CPU threads of each process; another number gives other last bits", 1, (1, 1024))
    # the test
    fprs: tuple[float, ...] = setting("false positive rates at which the TPR is measured", (0.01, 0.001), (0, 1))
    verify: tuple[str, ...] = setting("a path: InsightFace's pair sets (.bin) to test on", (), free=True)

    workers: int = setting("processes that read and decode images, of each rank (0: none)", 4, (0, 256), free=True)
    bad_limit: int = setting("images a rank may skip because they don't decode", 100, COUNT, free=True)
    test_every: int = setting("steps between two tests (0: only at the end)", 0, COUNT, free=True)
    log_every: int = setting("steps between two lines of the log", 50, (1, 2**31), free=True)
    snapshot_every: int = setting("steps between two snapshots", 1000, (1, 2**31), free=True)
    keep_snapshots: int = setting("how many snapshots stay", 2, (1, 1000), free=True)
    tensorboard: bool = setting('log for TensorBoard, too (pip install "mvrepro[scale]")', False, free=True)
    timeout: float = setting("minutes that ranks wait for each other before they give up", 10.0, (0.01, 1e5), free=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # as YAML and JSON have it
                object.__setattr__(self, name, tuple(value))

    def decisive(self) -> dict[str, Any]:
        """The settings that equal runs share, as JSON has them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["free"]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def run_name(self) -> str:
        """The name of the run's files: loss, t where it has one (MV and SV), dimensions of the toy, variant, seed."""
        t = f"_t{self.t:g}" if self.loss.startswith(("MV-", "SV-")) else ""
        dim = f"_{self.embedding_dim}d" if self.data == "digits" else ""
        variant = f"_{self.variant.replace(' ', '-')}" if self.variant else ""
        return f"{self.loss}{t}{dim}{variant}_seed{self.seed}"


# What a setting counts with: rows of mvrepro.LOSSES, or values of another setting. loop.check_used holds to it.
OF_LOSSES: dict[str, Callable[[Any], bool]] = {
    "m": lambda loss: loss.f != "cos",
    "easy_margin": lambda loss: loss.f != "cos",
    "annealing": lambda loss: loss.f == "A",
    "t": lambda loss: loss.h is not None,
    "t_warmup": lambda loss: loss.h is not None,
    "margin_epochs": lambda loss: loss.h is not None,
    "stop_gradient": lambda loss: loss.h == "adaptive",
    "gamma": lambda loss: loss.g == "F",
    "hard_ratio": lambda loss: loss.g == "HM",
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}  # to people
OF_OTHERS = {"milestones": ("schedule", "step"), "portable": ("deterministic", True)}


def kind(name: str) -> type:
    """The type of a setting's value, or of one of its values."""
    hint: Any = next(f.type for f in fields(TrainConfig) if f.name == name)
    if get_origin(hint) is tuple or isinstance(hint, UnionType):
        hint = get_args(hint)[0]
    return hint  # type: ignore[no-any-return]


def check(config: TrainConfig) -> None:
    """Refuse settings that make no sense before anything is computed; the head refuses its own. Raises UserError."""
    for item in fields(config):
        value, within, what = getattr(config, item.name), item.metadata["within"], kind(item.name)
        if isinstance(value, tuple) != (get_origin(item.type) is tuple):
            raise UserError(
                f"{item.name} must be {'one value' if isinstance(value, tuple) else 'a list'}, got {value!r}"
            )
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if not isinstance(one, int | float if what is float else what) or isinstance(one, bool) != (what is bool):
                hint = " (YAML reads 1e-1 as text: write 0.1)" if what is float and isinstance(one, str) else ""
                raise UserError(f"{item.name} must be {KINDS[what]}, got {one!r}{hint}")
            if within and not (isinstance(one, int | float) and math.isfinite(one) and within[0] <= one <= within[1]):
                short = within[1] >= 2**31 and not one > within[1]  # nobody comes near the upper end but who passes it
                bound = f">= {within[0]:g}" if short else f"in {within[0]:g} … {within[1]:.10g}"
                raise UserError(f"{item.name} must be a number {bound}, got {one}")
            if item.metadata["one_of"] and one not in item.metadata["one_of"]:
                known = ", ".join(item.metadata["one_of"])
                raise UserError(f"unknown {item.name} {one!r}; known are: {known}")
    if not config.fprs:
        raise UserError("fprs must hold a false positive rate at least, such as 0.001")
    if any(one >= other for one, other in zip(config.milestones, config.milestones[1:], strict=False)):
        raise UserError(f"milestones must rise, each once, got {' '.join(map(str, config.milestones))}")
    if re.search(r"[/\\]", config.variant) or not config.variant.isprintable():
        raise UserError(
            f"variant must be words, without / and the like: it is a part of files' names, got {config.variant!r}"
        )
    if (config.data == "synthetic") != bool(config.synthetic_classes):
        raise UserError("--data synthetic and --synthetic-classes K belong together")
    if config.update_in_backward and (config.accumulate > 1 or config.clip):
        other = "--accumulate" if config.accumulate > 1 else "--clip"
        raise UserError(
            f"--update-in-backward and {other} exclude each other: the head's step is taken within each backward "
            "pass, so its gradient is neither summed over several nor there to be measured"
        )


def from_settings(settings: dict[str, Any], where: str) -> TrainConfig:
    """A config out of a profile's settings and options. Raises UserError for an unknown name and a missing one.

    where: who gave them, for the message.
    """
    known = {f.name: f.default is MISSING for f in fields(TrainConfig)}
    unknown = sorted(settings.keys() - known.keys())
    missing = [name for name, needed in known.items() if needed and name not in settings]
    if unknown or missing:
        what = f"knows no setting called {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise UserError(f"{where}: {what}")
    return TrainConfig(**settings)


def rate(config: TrainConfig, step: int, steps: int, steps_an_epoch: int) -> float:
    """The learning rate of step 0 … steps − 1: a linear warm-up, then constant between milestones, or a cosine to 0.

    A function of the step and nothing else, so no snapshot has to hold a schedule.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    lr = config.lr
    for epoch in config.milestones:
        if step // steps_an_epoch >= epoch:
            lr *= 0.1  # one after the other: a power of 0.1 has other last bits
    return lr


def emphasis(config: TrainConfig, step: int, steps_an_epoch: int) -> tuple[float, int]:
    """(t, the step that its warm-up counts) of step 0 … steps − 1: t is 0, and no warm-up is spent, while the margin
    model is trained."""
    since = step - config.margin_epochs * steps_an_epoch
    return (config.t, since) if since >= 0 else (0.0, 0)
