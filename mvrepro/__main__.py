"""The door: python -m mvrepro COMMAND ... Each command is a module of mvrepro.commands, imported when called.

Like the package's __init__ files, this module computes nothing, so nothing is stale where it changes.
"""

import argparse
import importlib
import sys

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
MOVED = {"bench": "python -m benchmarks head", "scale": "python -m mvrepro train --profile paper"}


def main(
    argv: list[str] | None = None,
    *,
    program: str = "mvrepro",
    package: str = "mvrepro.commands",
    commands: dict[str, str] = COMMANDS,
) -> int:
    """Run one of the commands, modules of `package`; returns its exit code. A UserError is one line on stderr and exit
    code 1, a command that has moved one line and 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MOVED and argv[0] not in commands:
        print(f"{program} {argv[0]}: this is now {MOVED[argv[0]]}", file=sys.stderr)
        return 2
    description = f"Each command is a module of {package}, imported when called."
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in commands.items():
        title = text[0].upper() + text[1:] + "."
        sub = subparsers.add_parser(name, help=text, description=title, allow_abbrev=False)  # --margin is no option
        if argv[:1] == [name]:
            command = importlib.import_module(f"{package}.{name}")
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)

    from mvrepro.errors import UserError

    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"{program} {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program} {arguments.command}: stopped; nothing half-written was kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
