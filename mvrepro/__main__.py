"""The door: python -m mvrepro COMMAND ... Each command is a module of mvrepro.commands, imported when called.

Like the package's __init__ files, this module computes nothing, so nothing is stale where it changes.
"""

import argparse
import importlib
import signal
import sys
from typing import Any

from mvrepro.errors import UserError
from mvrepro.files import CLONE

COMMANDS = {
    "train": "train and test one network with one loss, alone or under torchrun, and write its record",
    "runs": "train the runs of a profile that are not current, or a share of them",
    "reproduce": "compute what this machine has not computed yet, and compare it with the committed values",
    "status": "say which results are stale, without computing anything",
    "validate": "re-execute the committed notebooks strictly and check all that is generated",
    "notebook": "execute one report notebook with papermill",
    "describe": "count what the faces profile trains on and tests with",
    "data": "fetch, align, inspect, compare and convert sets of faces",
    "embed": "embeddings of a set of images by a network, of ours or ONNX, for judge and data overlap",
    "judge": "judge anybody's embeddings (.npy) by any protocol",
    "published": "judge published networks by the protocols of faces, in numbers for notebook 12",
    "claims": "judge the claims: results/claims.json and the table in README.md",
    "code": "note what each part of the code is in results/code.json, which dvc.yaml depends on",
}
# They read or write what only a clone of the project has: notebooks, settings and committed results.
CLONE_ONLY = {"runs", "reproduce", "status", "validate", "notebook", "describe", "claims", "code"}
MOVED = {"bench": "python -m benchmarks head", "scale": "python -m mvrepro train --profile paper"}
NEEDS_CLONE = "works in a clone of the project alone, which has the notebooks and the committed results"
STOPPED = "stopped; nothing half-written was kept"


def main(
    argv: list[str] | None = None,
    *,
    program: str = "mvrepro",
    package: str = "mvrepro.commands",
    commands: dict[str, str] = COMMANDS,
) -> int:
    """Run one of the commands, modules of `package`; returns its exit code. What a user can act on is one line on
    stderr and exit code 1, a command that has moved one line and 2, and Ctrl-C one line and 130."""
    from mvrepro import terminal

    terminal.open_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _call(argv, program, package, commands)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        said, code = STOPPED, 130
    except Exception as error:
        # Ctrl-C in the midst of an import is an ImportError of a library
        said, code = (STOPPED, 130) if terminal.interrupted() else (terminal.explain(error), 1)
    print(f"{' '.join([program, *argv[:1]])}: {said}", file=sys.stderr)
    return code


def _call(argv: list[str], program: str, package: str, commands: dict[str, str]) -> int:
    if argv and argv[0] in MOVED and argv[0] not in commands:
        print(f"{program} {argv[0]}: this is now {MOVED[argv[0]]}", file=sys.stderr)
        return 2
    description = f"Each command is a module of {package}, imported when called."
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in commands.items():
        title = text[0].upper() + text[1:] + ("." if CLONE or name not in CLONE_ONLY else f" ({NEEDS_CLONE}).")
        sub = subparsers.add_parser(name, help=text, description=title, allow_abbrev=False)  # --margin is no option
        if argv[:1] == [name] and (CLONE or name not in CLONE_ONLY):
            command = importlib.import_module(f"{package}.{name}")
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    if not CLONE and CLONE_ONLY.intersection(argv[:1]) and not {"-h", "--help"}.intersection(argv):
        raise UserError(f"{NEEDS_CLONE}: call it there (git clone, then `make help`)")
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


def door(**how: Any) -> None:
    """The command line's own end: after its last word, a second Ctrl-C has nothing to stop."""
    try:
        from mvrepro import terminal

        terminal.watch()
        code = main(**how)
    except KeyboardInterrupt:  # before main could say it
        print("stopped", file=sys.stderr)
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    door()
