"""`python -m mvrepro code`: note what each part of the code is, so that DVC sees which of them changed."""

import argparse

from mvrepro.pipeline import freshness


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "writes results/code.json, where a comment or a docstring changes nothing"


def run(arguments: argparse.Namespace) -> int:
    freshness.write_code()
    return 0
