"""`python -m mvrepro claims`: judge every claim and write the tables that show it."""

import argparse

from mvrepro.evidence import claims
from mvrepro.files import display, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is not current")


def run(arguments: argparse.Namespace) -> int:
    outdated = claims.outdated()
    for path, text in outdated.items():
        if arguments.check:
            print(f"{display(path)} is not current: `make reproduce` writes it")
        else:
            write_atomic(path, text)
            print(f"wrote {display(path)}")
    return 1 if arguments.check and outdated else 0
