"""`python -m mvrepro reproduce`: compute what this machine has not computed, then compare."""

import argparse
import time
from collections.abc import Sequence

from mvrepro.errors import UserError
from mvrepro.evidence.compare import Comparison, compare
from mvrepro.files import display
from mvrepro.pipeline import Pipeline, Stage, compute, only_one

MOST_LINES = 20
PAGES = ("python -m mvrepro notebook ", "python -m mvrepro claims")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit code: 0 where every value is identical or within its tolerance, or new, else 1"
    parser.add_argument("--profile", default="quick", help="whose stages (default: quick)")
    parser.add_argument("--notebook", metavar="NB", help="only what this notebook needs, such as 04")
    parser.add_argument("--force", action="store_true", help="compute again what was already computed here")
    parser.add_argument("--jobs", type=int, help="stages side by side (default: one a core, 4 at most)")
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--pages",
        action="store_true",
        help="execute the notebooks on the committed runs and train nothing, which takes no photographs either",
    )
    some.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="train only the runs without a record and N of the others, spread over the profile; if they give the "
        "committed bits, the code still gives the committed results, and the other runs are taken as they are",
    )


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    with only_one():
        pipeline = Pipeline()
        stages = pipeline.select(arguments.profile, arguments.notebook)
        chosen = stages if arguments.sample is None else sampled(stages, arguments.sample)
        if arguments.pages:
            chosen = pages(pipeline, stages)
        ran: list[Stage] = []
        try:
            compute(chosen, force=arguments.force, jobs=arguments.jobs, ran=ran)
        except BaseException:
            pipeline.accept(ran)  # hours of training that are done count as done
            raise
        result = compare(chosen)
        fresh = stages if result.same_bits and not arguments.pages else chosen
        stale = pipeline.stale(fresh)
        pipeline.accept([stage for stage in fresh if stage.name in stale])
    _say(result)
    took = time.perf_counter() - started
    print(f"{arguments.profile}: computed {len(ran)} of {len(stages)} stages in {took:.0f} s; {result.summary()}")
    if len(chosen) < len(stages) and not arguments.pages:
        others = len(stages) - len(chosen)
        verdict = "the same bits" if result.same_bits else "not the same bits, so nothing follows for the others"
        print(f"a sample of the runs, {others} were not computed: {verdict}")
    for problem in pipeline.strays(arguments.profile)[:MOST_LINES]:
        print(f"  stray: {problem}")
    if result.different:
        print(
            "where you changed code or settings, what is different is your change (`git diff results` shows it);\n"
            "where you changed nothing, README says under `different` what to look at"
        )
    executed = sorted(path for stage in stages for path in stage.writes if path.suffix == ".ipynb")
    if executed:
        print(f"read {display(executed[0].parent)}/ (start with {executed[0].name})")
    return 1 if result.different else 0


def pages(pipeline: Pipeline, stages: Sequence[Stage]) -> list[Stage]:
    """The notebooks and the claims. Raises UserError where what they stand on is not that of the files here."""
    chosen = [stage for stage in stages if stage.command.startswith(PAGES)]
    stale = pipeline.stale([stage for stage in stages if stage not in chosen])
    if stale:
        name, reasons = next(iter(stale.items()))
        raise UserError(
            f"the pages can't stand on what other code or settings gave: {len(stale)} of the runs are stale, the "
            f"first is {name} ({reasons[0]}). Train them: the same command without --pages (PAGES=1)"
        )
    return chosen


def sampled(stages: Sequence[Stage], count: int) -> list[Stage]:
    """All reports, the runs (the stages of a matrix) without a record, which can't be taken as they are, and
    `count` of the other runs, evenly spread in the order of dvc.yaml."""
    if count < 1:
        raise UserError(f"--sample must be 1 or more, got {count}")
    new = {stage.name for stage in stages if not all(path.exists() for path in stage.writes)}
    runs = [stage.name for stage in stages if "@" in stage.name and stage.name not in new]
    chosen = new | ({runs[i * len(runs) // count] for i in range(count)} if count < len(runs) else set(runs))
    return [stage for stage in stages if "@" not in stage.name or stage.name in chosen]


def _say(result: Comparison) -> None:
    for line in result.different[:MOST_LINES]:
        print(f"  different: {line}")
    if len(result.different) > MOST_LINES:
        print(f"  … and {len(result.different) - MOST_LINES} more")
    if result.largest:
        print(f"  largest within tolerance: {result.largest}")
