"""`python -m mvrepro validate`: do the committed results still hold? Nothing is trained or written."""

import argparse
import sys
from pathlib import Path

from mvrepro.determinism import environment
from mvrepro.errors import UserError
from mvrepro.evidence import claims
from mvrepro.files import RESULTS, ROOT, display
from mvrepro.pipeline import freshness, plan, workers
from mvrepro.terminal import child


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="quick", help="whose notebooks (default: quick)")
    parser.add_argument("--notebook", metavar="NB", help="only this notebook, such as 04")


def run(arguments: argparse.Namespace) -> int:
    with workers.only_one():
        steps = plan.select(arguments.profile, arguments.notebook)
        problems = [f"stale: {name} ({why})" for name, why in freshness.stale(steps).items()]
        problems += freshness.strays(arguments.profile)
        for path in claims.outdated():
            problems.append(f"{display(path)} is not what the runs and paper/claims.toml give")
        for problem in problems:
            print(problem)
        if problems:
            print("`make reproduce` computes and writes what is missing; then look at the difference and commit it")
        notebooks = [path for step in steps for path in step.writes if path.suffix == ".ipynb"]
        return 1 if _execute(notebooks, arguments.profile) or problems else 0


def _execute(notebooks: list[Path], profile: str) -> int:
    """Strict nbval on the executed notebooks, side by side, with the form of all notebooks; pytest's exit code."""
    if not notebooks:
        raise UserError(f"no notebook is declared for {profile} in dvc.yaml")
    missing = [n for n in notebooks if not n.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} executed notebooks are missing in {display(RESULTS / 'executed')}: run `make reproduce`"
        )
    settings = environment(threads=1) | {"MVREPRO_VALIDATE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "mvrepro.pages.check", "-p", "no:cacheprovider"]
    command += ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-n", "2", "--dist", "loadfile"]
    command += [*map(str, notebooks), "tests/test_notebook_hygiene.py"]
    with child(command, cwd=ROOT, env=settings) as tests:
        return tests.wait()
