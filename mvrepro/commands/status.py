"""`python -m mvrepro status`: which committed results no longer belong to the files that are here."""

import argparse

from mvrepro.pipeline import Memory, Pipeline

MOST_LINES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="quick", help="whose stages (default: quick)")


def run(arguments: argparse.Namespace) -> int:
    pipeline = Pipeline()
    stages = pipeline.select(arguments.profile)
    stale = pipeline.stale(stages)
    for name, reasons in list(stale.items())[:MOST_LINES]:
        print(f"stale: {name} ({'; '.join(reasons[:3])}{' …' if len(reasons) > 3 else ''})")
    if len(stale) > MOST_LINES:
        print(f"… and {len(stale) - MOST_LINES} more")
    strays = pipeline.strays(arguments.profile)
    for problem in strays[:MOST_LINES]:
        print(f"stray: {problem}")
    memory = Memory()
    here = sum(memory.has(stage) for stage in stages)
    print(
        f"{arguments.profile}: {len(stages)} stages, {len(stages) - len(stale)} fresh "
        "(their results belong to the files that are here); "
        f"{here} computed on this machine"
    )
    return 0
