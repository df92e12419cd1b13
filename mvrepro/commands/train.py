"""`python -m mvrepro train`: one run, alone or under torchrun, from params.yaml and options to a record on disk."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_origin

from mvrepro import determinism
from mvrepro.errors import UserError
from mvrepro.files import PARAMS, ROOT, check_apart, check_file, display, read_yaml
from mvrepro.training.config import TrainConfig, check, from_settings, kind

RANKS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # as torchrun sets them, and what a lone process is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n  python -m mvrepro train --loss MV-AM-Softmax-a --t 0.3 --seed 1\n"
        "takes about 5 s on one core and reaches about 60 % TPR at FPR 1 %.\n"
        "  torchrun --nproc-per-node 8 -m mvrepro train --profile paper --data ms1m/ --out runs/mv \\\n"
        "    --verify lfw.bin --t-warmup 2000 --bfloat16 --resume\n"
        "Called again after whatever stopped it, the same line goes on from the last snapshot. docs/scale.md has more."
    )
    add_settings(parser)
    add = parser.add_argument
    add("--out", type=Path, help="record of the run (JSON), or a folder for it (default: scratch/<profile>/…)")
    add("--save", type=Path, help="folder that gets the trained network, to start from or to go on with")
    add("--start-from", type=Path, help="begin with the weights of this checkpoint")
    add("--resume", action="store_true", help="go on from the newest whole snapshot, if there is one")
    add("--despite-changes", action="store_true", help="with --resume: also where other code or torch wrote it")


def add_settings(parser: argparse.ArgumentParser, profile: str = "quick") -> None:
    """An option for each setting; those that are not given are the profile's."""
    parser.add_argument("--profile", default=profile, help=f"a section of params.yaml (default: {profile})")
    for item in fields(TrainConfig):
        if item.name != "profile":
            _add(parser, item)


def _add(parser: argparse.ArgumentParser, item: "Field[Any]") -> None:
    name, text, of = f"--{item.name.replace('_', '-')}", item.metadata["help"], kind(item.name)
    if item.default not in (MISSING, None, "", ()) and not isinstance(item.default, bool):
        default = " ".join(map(str, item.default)) if isinstance(item.default, tuple) else item.default
        text += f" (default: {default})"
    if of is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(item.type) is tuple:
        parser.add_argument(name, type=of, nargs="*", metavar=of.__name__.upper(), help=text)
    else:
        parser.add_argument(name, type=of, metavar=of.__name__.upper(), help=text)


def run(arguments: argparse.Namespace) -> int:
    return with_one_voice(_run, arguments)


def with_one_voice(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The exit code of a rank's work. Rank 0 speaks for all; another rank only of what it alone knows."""
    check_ranks()
    try:
        return work(arguments)
    except UserError as error:
        from mvrepro.training.ranks import speaks

        if speaks(error):
            raise
        return 1
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 130


def check_ranks() -> None:
    """Who this process is decides whether it speaks. Raises UserError for what is no place among the ranks."""
    places = {name: os.environ.get(name, default) for name, default in RANKS.items()}
    for name, text in places.items():
        if not (text.isascii() and text.isdecimal() and len(text) < 8):
            raise UserError(
                f"the environment says {name}={text!r}, which is no rank: torchrun sets it, or leave it out"
            )
    if "RANK" in os.environ and int(places["RANK"]) >= int(places["WORLD_SIZE"]):
        raise UserError(
            f"the environment says RANK={places['RANK']} of WORLD_SIZE={places['WORLD_SIZE']}: count from 0"
        )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings come with the frames of C++


def _run(arguments: argparse.Namespace) -> int:
    config = options(arguments)
    check(config)
    set_environment(config)
    if arguments.despite_changes and not arguments.resume:
        raise UserError("--despite-changes goes with --resume")
    resume = "" if not arguments.resume else "despite changes" if arguments.despite_changes else "strict"
    out = (arguments.out or ROOT / "scratch" / config.profile / f"{config.run_name()}.json").absolute()
    work = out.with_suffix("") if out.suffix == ".json" else out
    out = out if out.suffix == ".json" else out / "record.json"
    _check_places(config, out, work, arguments)
    from mvrepro.training.loop import check_used, train

    check_used(config, given(arguments))
    record = train(config, out=out, work=work, save=arguments.save, begin=arguments.start_from, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        metrics = ", ".join(f"{name} {100 * value:.1f} %" for name, value in record["metrics"].items())
        took, loss = record["provenance"]["wall_s"], (record["curve"]["loss"] or [float("nan")])[-1]
        print(f"{config.run_name()}: {metrics or f'loss {loss:.4f}'} ({took:.0f} s) -> {display(out)}")
    sys.stdout.flush()
    return 0


def _check_places(config: TrainConfig, out: Path, work: Path, arguments: argparse.Namespace) -> None:
    """Raises UserError where the record can't be written, or something would be written into what is read."""
    from mvrepro.training.tasks import TASKS

    read = [*map(Path, config.verify), *([Path(config.data)] if config.data not in TASKS else [])]
    begin, save = arguments.start_from, arguments.save
    check_file(out, [*read, *([begin] if begin else [])])
    for place in filter(None, (work, save)):
        for one in read:
            check_apart(place, one)
    if begin and save and save.resolve() != begin.resolve():  # a checkpoint makes room for the next one
        check_apart(save, begin)


def set_environment(config: TrainConfig) -> None:
    """What must be so before torch starts."""
    if config.deterministic:
        determinism.set_environment(config.threads, portable=config.portable)
        return
    for name in determinism.ENVIRONMENT:  # what makes bits repeatable makes products slow; make sets all of it
        os.environ.pop(name, None)


def options(arguments: argparse.Namespace) -> TrainConfig:
    """The settings of the profile, and over them those that were given."""
    where = f"params.yaml, {arguments.profile}.train"
    return from_settings(profile_settings(arguments.profile) | given(arguments), where)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options."""
    names = [item.name for item in fields(TrainConfig)]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def profile_settings(profile: str) -> dict[str, Any]:
    """The training settings of a profile in params.yaml. Raises UserError with the known profiles."""
    params = read_yaml(PARAMS)
    known = [name for name, section in params.items() if isinstance(section, dict) and "train" in section]
    if profile not in known:
        raise UserError(f"unknown profile {profile!r}; params.yaml has: {', '.join(known)}")
    return dict(params[profile]["train"]) | {"profile": profile}
