"""`python -m mvrepro scale`: training at the paper's scale, alone or under torchrun."""

import argparse
import os
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from mvrepro.determinism import ENVIRONMENT, environment
from mvrepro.errors import UserError
from mvrepro.files import ROOT, display
from mvrepro.training.config import ScaleConfig, check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example:\n  torchrun --nproc-per-node 8 -m mvrepro scale --data ms1m/ --verify lfw.bin --out runs/mv \\\n"
        "    --loss MV-AM-Softmax-a --t-warmup 2000 --bfloat16 --resume\n"
        "Called again after whatever stopped it, the same line goes on from the last snapshot. docs/scale.md has more."
    )
    parser.add_argument("--profile", default="paper", help="a section of params.yaml with `scale` (default: paper)")
    text = "folder for log, snapshots and record of this run (default: scratch/scale)"
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "scale", help=text)
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole snapshot, if there is one")
    text = "train nothing: measure so many rounds of the loop against the bare backbone, in this process"
    parser.add_argument("--overhead", type=int, metavar="ROUNDS", help=text)
    for item in fields(ScaleConfig):
        _add(parser, item)


def _add(parser: argparse.ArgumentParser, item: "Field[Any]") -> None:
    name, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
    if item.default not in (MISSING, None, "", ()) and not isinstance(item.default, bool):
        text += f" (default: {item.default})"
    kind: Any = item.type
    if kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        parser.add_argument(name, type=kind, nargs="*", metavar=kind.__name__.upper(), help=text)
    else:
        kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
        parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), help=text)


def run(arguments: argparse.Namespace) -> int:
    """Rank 0 speaks for all; another rank only of what it alone knows."""
    try:
        return _run(arguments)
    except UserError as error:
        from mvrepro.training.ranks import speaks

        if speaks(error):
            raise
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 130


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    check(config)
    if arguments.overhead is not None and arguments.overhead < 1:
        raise UserError(f"--overhead must be a number of rounds >= 1, got {arguments.overhead}")
    if config.deterministic:  # before torch starts
        os.environ.update(environment(config.threads))
    else:
        for name in ENVIRONMENT:  # what makes bits repeatable makes products slow
            os.environ.pop(name, None)
    import torch.distributed as dist

    from benchmarks import loop as overhead
    from mvrepro.training import loop, ranks

    here, out = ranks.start(config), arguments.out.absolute()
    with ranks.explained(here):
        if arguments.overhead is not None:
            here.say(overhead.sentence(overhead.measure(config, here, out, arguments.overhead)))
        else:
            record = loop.train(config, out, here, resume=arguments.resume)
    if arguments.overhead is None:
        tested = ", ".join(f"{name} {100 * value:.2f} %" for name, value in record["metrics"].items())
        here.say(f"loss {record['loss'] or float('nan'):.4f}{', ' + tested if tested else ''} -> {display(out)}")
    sys.stdout.flush()
    dist.destroy_process_group()
    return 0


def _config(arguments: argparse.Namespace) -> ScaleConfig:
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    known = {name: part["scale"] for name, part in params.items() if isinstance(part, dict) and "scale" in part}
    if arguments.profile not in known:
        raise UserError(f"unknown profile {arguments.profile!r}; with settings for scale: {', '.join(known)}")
    settings = dict(known[arguments.profile])
    names = [item.name for item in fields(ScaleConfig)]
    unknown = sorted(settings.keys() - set(names))
    if unknown:
        raise UserError(f"params.yaml, {arguments.profile}.scale: knows no setting called {', '.join(unknown)}")
    settings |= {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    missing = [item.name for item in fields(ScaleConfig) if item.default is MISSING and item.name not in settings]
    if missing:
        raise UserError(f"params.yaml, {arguments.profile}.scale: lacks {', '.join(missing)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return ScaleConfig(**values)
