"""`python -m mvrepro reproduce`: compute what this machine has not computed, then compare."""

import argparse
import time

from mvrepro.commands.runs import check_jobs
from mvrepro.errors import UserError
from mvrepro.evidence.compare import compare
from mvrepro.files import RESULTS, ROOT, display, read_json, read_yaml, sweep, write_json
from mvrepro.pipeline import freshness, plan, workers
from mvrepro.pipeline.freshness import Memory
from mvrepro.pipeline.plan import Step
from mvrepro.provenance import CAME, code_hash, keep_as_it_came

MOST_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit code: 0 where every value is identical or within its tolerance, or new, else 1"
    parser.add_argument("--profile", default="quick", help="whose runs and pages (default: quick)")
    parser.add_argument("--notebook", metavar="NB", help="only what this notebook needs, such as 04")
    parser.add_argument("--force", action="store_true", help="compute again what was already computed here")
    parser.add_argument("--jobs", type=int, help="steps side by side (default: one a core, 4 at most)")
    some = parser.add_mutually_exclusive_group()
    text = "execute the notebooks on the committed runs and train nothing, which takes no photographs either"
    some.add_argument("--pages", action="store_true", help=text)
    text = "train only the runs without a record and N of the others, spread over the profile; if they give the "
    text += "committed bits, the code still gives the committed results, and the records of the others say so (taken)"
    some.add_argument("--sample", type=int, metavar="N", help=text)


def run(arguments: argparse.Namespace) -> int:
    started, ran = time.perf_counter(), 0
    check_jobs(arguments.jobs)
    steps = plan.select(arguments.profile, arguments.notebook)  # before anything is written: there may be no such
    with workers.only_one():
        sweep(RESULTS)
        if keep_as_it_came():
            print(f"no git here: what is computed is compared with the results that came along ({display(CAME)})")
        freshness.mend_lock_file()
        freshness.write_code()
        memory = Memory()
        chosen = steps
        if arguments.pages:
            chosen = pages(steps)
        elif arguments.sample is not None:
            chosen = freshness.with_bases(sampled(steps, arguments.sample), steps)
        skip = (lambda step: False) if arguments.force else memory.has
        for step in workers.compute(chosen, skip, jobs=arguments.jobs):
            memory.remember(step)
            ran += 1
        params = read_yaml(ROOT / "params.yaml")
        tolerances = {name: params[name].get("tolerance", {}) for name in plan.profiles(steps)}
        result = compare(plan.files([path for step in chosen for path in step.writes]), tolerances)
        others = [step for step in steps if step not in chosen and step.config]
        if result.same_bits:
            take(others)
        freshness.accept([step for step in steps if step.config or step in chosen])
    for line in result.different[:MOST_LINES]:
        print(f"  different: {line}")
    if len(result.different) > MOST_LINES:
        print(f"  … and {len(result.different) - MOST_LINES} more")
    if result.within:
        print(f"  largest within tolerance: {max(result.within)[1]}")
    took = time.perf_counter() - started
    print(f"{arguments.profile}: computed {ran} of {len(steps)} steps in {took:.0f} s; {result.summary()}")
    if others and not arguments.pages:
        verdict = "the same bits" if result.same_bits else "not the same bits, so nothing follows for the others"
        print(f"a sample of the runs, {len(others)} were not computed: {verdict}")
    for problem in freshness.strays(arguments.profile)[:MOST_LINES]:
        print(f"  stray: {problem}")
    if result.different:
        print(
            "where you changed code or settings, what is different is your change (`git diff results` shows it);\n"
            "where you changed nothing, README says under `different` what to look at"
        )
    executed = sorted(path for step in steps for path in step.writes if path.suffix == ".ipynb")
    if executed:
        print(f"read {display(executed[0].parent)}/ (start with {executed[0].name})")
    return 1 if result.different else 0


def pages(steps: list[Step]) -> list[Step]:
    """The notebooks and the claims. Raises UserError where the runs that they stand on are not current."""
    lacking = freshness.lacking(steps)
    if lacking:
        name, reason = next(iter(lacking.items()))
        raise UserError(
            f"the pages can't stand on what other code or settings gave: {len(lacking)} of the runs are stale, the "
            f"first is {name} ({reason}). Train them: the same command without --pages (PAGES=1)"
        )
    return [step for step in steps if step.reads]


def sampled(steps: list[Step], count: int) -> list[Step]:
    """All reports, the runs without a record, which can't be taken as they are, and `count` of the other runs,
    evenly spread in the order of params.yaml."""
    if count < 1:
        raise UserError(f"--sample must be 1 or more, got {count}")
    new = {name for name, reason in freshness.lacking(steps).items() if reason != freshness.OTHER_CODE}
    runs = [step.name for step in steps if step.config and step.name not in new]
    chosen = new | ({runs[i * len(runs) // count] for i in range(count)} if count < len(runs) else set(runs))
    return [step for step in steps if not step.config or step.name in chosen]


def take(steps: list[Step]) -> None:
    """Note in the records of runs that were not trained again that today's code was taken to give the same."""
    for name in freshness.lacking(steps):
        (path,) = (step.writes[0] for step in steps if step.name == name)
        write_json(path, read_json(path) | {"code": code_hash(), "taken": True})
