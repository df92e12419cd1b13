"""`python -m mvrepro reproduce`: compute what this machine has not computed, then compare."""

import argparse
import time

from mvrepro.compare import compare
from mvrepro.files import display
from mvrepro.pipeline import Pipeline, Stage, compute, only_one

MOST_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit code: 0 where every value is identical or within its tolerance, else 1"
    parser.add_argument("--profile", default="quick", help="whose stages (default: quick)")
    parser.add_argument("--notebook", metavar="NB", help="only what this notebook needs, such as 04")
    parser.add_argument("--force", action="store_true", help="compute again what was already computed here")
    parser.add_argument("--jobs", type=int, help="stages side by side (default: one a core, 4 at most)")


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    with only_one():
        pipeline = Pipeline()
        stages = pipeline.select(arguments.profile, arguments.notebook)
        ran: list[Stage] = []
        try:
            compute(stages, force=arguments.force, jobs=arguments.jobs, ran=ran)
        except BaseException:
            pipeline.accept(ran)  # hours of training that are done count as done
            raise
        stale = pipeline.stale(stages)
        pipeline.accept([stage for stage in stages if stage.name in stale])
        result = compare(stages)
    for line in result.different[:MOST_LINES]:
        print(f"  different: {line}")
    if len(result.different) > MOST_LINES:
        print(f"  … and {len(result.different) - MOST_LINES} more")
    if result.largest:
        print(f"  largest within tolerance: {result.largest}")
    took = time.perf_counter() - started
    print(f"{arguments.profile}: computed {len(ran)} of {len(stages)} stages in {took:.0f} s; {result.summary()}")
    executed = sorted(path for stage in stages for path in stage.writes if path.suffix == ".ipynb")
    if executed:
        print(f"read {display(executed[0].parent)}/ (start with {executed[0].name})")
    return 1 if result.different else 0
