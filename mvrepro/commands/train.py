"""`python -m mvrepro train`: one run, from params.yaml and options to a record on disk."""

import argparse
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mvrepro.determinism import environment
from mvrepro.errors import UserError
from mvrepro.files import ROOT, display

# What each option means; those of a profile come from params.yaml and can be overruled here.
OPTIONS: dict[str, tuple[type, str]] = {
    "variant": (str, "what sets this run apart from the plain ones of its profile, in words"),
    "data": (
        str,
        "what is trained on and tested with: a row of TASKS in training/tasks.py, such as orl or lfw",
    ),
    "backbone": (str, "name of the network"),
    "embedding_dim": (int, "dimensions of an embedding"),
    "image_size": (int, "side of the (square) input"),
    "train_people": (int, "orl: how many people to train on; the rest is for the test"),
    "remove": (str, "lfw, cfp: overlap (who is also in the test set) or others (as many who are not)"),
    "epochs": (int, "passes over the training set"),
    "batch_size": (int, "images a step"),
    "lr": (float, "learning rate at the start"),
    "momentum": (float, "momentum of SGD"),
    "weight_decay": (float, "weight decay of SGD"),
    "s": (float, "scale of the cosines"),
    "m": (float, "margin; default: that of the loss (AM 0.35, Arc 0.5, A 2)"),
    "t": (float, "strength of the emphasis on marked classes, >= 0 (MV and SV losses)"),
    "gamma": (float, "exponent of the F losses"),
    "hard_ratio": (float, "share of a batch that the HM losses keep"),
    "t_warmup": (int, "steps over which t grows from 0"),
    "margin_epochs": (int, "epochs with t = 0 before the others: start from the margin model"),
    "device": (str, "auto, cpu, cuda, cuda:1, …"),
    "threads": (int, "CPU threads; another number gives other last bits"),
}
FLAGS = {
    "easy_margin": "the margin only where cosθ_y > 0, as in the authors' code",
    "stop_gradient": "no gradient through the emphasis of the adaptive form; not in the paper",
    "annealing": "A-Softmax with the annealed λ of the authors' code",
    "flip": "mirror each image with probability 0.5",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example:\n  python -m mvrepro train --profile quick --loss MV-AM-Softmax-a --t 0.3 --seed 1\n"
        "takes about 5 s on one core and reaches about 60 % TPR at FPR 1 %."
    )
    parser.add_argument("--profile", default="quick", help="a section of params.yaml (default: quick)")
    parser.add_argument("--loss", required=True, help="a name from mvrepro.losses.LOSSES")
    parser.add_argument("--seed", type=int, default=0, help="decides people, weights and batches (default: 0)")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument("--milestones", type=int, nargs="*", help="epochs after which lr is divided by 10")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--out", type=Path, help="where the record goes (default: scratch/<profile>/…)")
    parser.add_argument("--save", type=Path, help="write backbone and head there (.safetensors)")
    parser.add_argument("--start-from", type=Path, help="begin with the weights of this checkpoint")


def run(arguments: argparse.Namespace) -> int:
    settings = profile_settings(arguments.profile)
    given = {name: getattr(arguments, name) for name in [*OPTIONS, *FLAGS, "milestones"]}
    settings |= {name: value for name, value in given.items() if value is not None}
    os.environ.update(environment(int(settings.get("threads", 1))))  # before torch starts
    from mvrepro.losses import LOSSES
    from mvrepro.training.train import TrainConfig, train_to_file

    if arguments.loss not in LOSSES:
        raise UserError(f"unknown loss {arguments.loss!r}; known are: {', '.join(LOSSES)}")
    settings |= {"profile": arguments.profile, "loss": arguments.loss, "seed": arguments.seed}
    missing = [f.name for f in fields(TrainConfig) if f.default is MISSING and f.name not in settings]
    unknown = sorted(settings.keys() - {f.name for f in fields(TrainConfig)})
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"knows no setting called {', '.join(unknown)}"
        raise UserError(f"params.yaml, {arguments.profile}.train: {what}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    config = TrainConfig(**values)
    default = ROOT / "scratch" / arguments.profile / f"{config.run_name()}.json"
    out = arguments.out.absolute() if arguments.out else default
    record = train_to_file(config, out, start_from=arguments.start_from, save=arguments.save)
    metrics = ", ".join(f"{name} {100 * value:.1f} %" for name, value in record["metrics"].items())
    print(f"{config.run_name()}: {metrics} ({record['provenance']['wall_s']:.0f} s) -> {display(out)}")
    return 0


def profile_settings(profile: str) -> dict[str, Any]:
    """The training settings of a profile in params.yaml. Raises UserError with the known profiles."""
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    known = [name for name, section in params.items() if isinstance(section, dict) and "train" in section]
    if profile not in known:
        raise UserError(f"unknown profile {profile!r}; params.yaml has: {', '.join(known)}")
    return dict(params[profile]["train"])
