"""`python -m mvrepro runs`: train what a profile of params.yaml lists and no record holds yet."""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from mvrepro.errors import UserError
from mvrepro.files import TEMPORARY, read_json
from mvrepro.pipeline import freshness, plan, workers
from mvrepro.pipeline.plan import Step

JOBS_LIMIT = 1024
SAFETY = 1.5  # other processors have other last bits than those tried


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example:\n  python -m mvrepro runs faces --part 3/16\n"
        "trains every sixteenth run, from the third on. Results are files, so machines that train other parts need\n"
        "nothing else; `make reproduce` or `dvc commit` then tells DVC."
    )
    parser.add_argument("profile", help="a section of params.yaml with runs")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only run I, I + N, I + 2 N, … (from 1)")
    parser.add_argument("--force", action="store_true", help="also those whose record is current")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core, 4 at most)")
    text = "instead, train N of the current runs again with two threads and any instruction set, keep nothing, and "
    text += "print how far each metric moves with the last bits, as the line that params.yaml has for it"
    parser.add_argument("--tolerance", type=int, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    check_jobs(arguments.jobs)
    steps = part(plan.runs(arguments.profile), arguments.part)
    if arguments.tolerance is not None:
        if arguments.tolerance < 1:
            raise UserError(f"--tolerance must be 1 or more, got {arguments.tolerance}")
        return _tolerance(arguments.profile, steps, arguments.tolerance, arguments.jobs)
    lacking = freshness.lacking(steps)
    todo = [step for step in steps if arguments.force or step.name in lacking]
    todo = freshness.with_bases(todo, plan.runs(arguments.profile))
    for _ in workers.compute(todo, lambda step: False, jobs=arguments.jobs):
        pass
    print(f"{arguments.profile}: trained {len(todo)} of {len(steps)} runs; the others are current")
    return 0


def check_jobs(jobs: int | None) -> None:
    """Raises UserError for a number of processes that nobody means."""
    if jobs is not None and not 1 <= jobs <= JOBS_LIMIT:
        raise UserError(f"--jobs must be in 1 … {JOBS_LIMIT}, got {jobs}")


def part(steps: list[Step], words: str) -> list[Step]:
    """Every n-th of the steps for words such as "3/16"."""
    first, _, count = words.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise UserError(f"--part must be I/N with 1 <= I <= N, such as 3/16, got {words!r}")
    return steps[int(first) - 1 :: int(count)]


def _tolerance(profile: str, steps: list[Step], count: int, jobs: int | None) -> int:
    lacking = freshness.lacking(steps)
    known = [step for step in steps if step.name not in lacking and not step.base]
    if not known:
        raise UserError(f"no run of {profile} is current: train them before, `python -m mvrepro runs {profile}`")
    chosen = {step.name: read_json(step.writes[0]) for step in known[:: max(1, len(known) // count)][:count]}
    moves: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as scratch:
        others = plan.runs(profile, Path(scratch), threads=2)
        again = [replace(step, keeps=False) for step in others if step.name in chosen]
        for step in workers.compute(again, lambda step: False, jobs=jobs, capped=False):
            old, new = chosen[step.name], read_json(step.writes[0])
            for metric, value in old["metrics"].items():
                moves[metric].append(abs(new["metrics"][metric] - value))
            moves["first_loss"].append(abs(new["curve"]["loss"][0] / old["curve"]["loss"][0] - 1))
    largest = ", ".join(f"{name}: {SAFETY * max(values):.2g}" for name, values in moves.items())
    print(f"tolerance: {{{largest}}} # {SAFETY:g} times the largest move in {len(again)} runs")
    return 0
