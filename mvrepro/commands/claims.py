"""`python -m mvrepro claims`: judge every claim and write the tables that show it."""

import argparse

from mvrepro.evidence import claims_table
from mvrepro.files import display, write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is not current")


def run(arguments: argparse.Namespace) -> int:
    outdated = claims_table.outdated()
    if arguments.check:
        for path in outdated:
            print(f"{display(path)} is not current: `make reproduce` writes it")
        return 1 if outdated else 0
    for path, text in outdated.items():
        write_atomic(path, text)
        print(f"wrote {display(path)}")
    return 0
