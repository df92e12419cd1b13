"""The commands of `python -m mvrepro`, one a module: add_arguments(parser) and run(arguments) -> exit code."""
