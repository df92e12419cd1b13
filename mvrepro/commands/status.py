"""`python -m mvrepro status`: which committed results no longer belong to the files that are here."""

import argparse

from mvrepro.pipeline import freshness, plan
from mvrepro.provenance import in_git

MOST_LINES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "of all profiles; trains nothing and writes nothing"


def run(arguments: argparse.Namespace) -> int:
    every = {profile: plan.select(profile) for profile in plan.known()}
    stale = freshness.stale(list({step.name: step for steps in every.values() for step in steps}.values()))
    problems = [f"stale: {name} ({why})" for name, why in stale.items()]
    problems += [f"stray: {problem}" for profile in every for problem in freshness.strays(profile)]
    for line in problems[:MOST_LINES]:
        print(line)
    if len(problems) > MOST_LINES:
        print(f"… and {len(problems) - MOST_LINES} more")
    if not in_git():
        print("no git here, so DVC can't say which pages and tables are stale: what is said of runs holds")
    memory = freshness.Memory()
    for profile, steps in every.items():
        fresh, here = sum(step.name not in stale for step in steps), sum(memory.has(step) for step in steps)
        print(
            f"{profile}: {len(steps)} runs, pages and tables, {fresh} fresh (their results belong to the files that "
            f"are here); {here} computed on this machine"
        )
    return 0
