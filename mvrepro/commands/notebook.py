"""`python -m mvrepro notebook`: execute one report notebook on a profile."""

import argparse
from pathlib import Path

from mvrepro.errors import UserError
from mvrepro.files import display
from mvrepro.pages import notebook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m mvrepro notebook 04 --profile quick"
    parser.add_argument("name", help="the notebook's number or file name")
    parser.add_argument("--profile", default="quick", help="whose runs it reads (default: quick)")
    add, pair = parser.add_argument, ("NAME", "VALUE")
    add("-p", "--parameter", nargs=2, action="append", default=[], metavar=pair, help="set a parameter")
    text = "for executed/, and for figures/ as data, PNG and PDF (default: scratch where a parameter is set; else "
    text += "results, which holds the data alone)"
    add("--out", type=Path, metavar="FOLDER", help=text)


def run(arguments: argparse.Namespace) -> int:
    parameters = {name: _literal(name, value) for name, value in arguments.parameter}
    out = arguments.out or (notebook.SCRATCH if parameters else None)
    path = notebook.execute(notebook.find(arguments.name), arguments.profile, parameters, out)
    print(f"executed {display(path)}")
    return 0


def _literal(name: str, text: str) -> object:
    """A parameter's value as YAML reads it, so that 0.3 is a number and text needs no quotes."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"parameter {name}: {text!r} is not a YAML value") from None
