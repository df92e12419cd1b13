"""The door: python -m benchmarks NAME ... Each is a module of this folder with add_arguments and run."""

from mvrepro.__main__ import door

BENCHMARKS = {
    "head": "what the head costs, in bare matrix products and in memory",
    "gpu": "all that a GPU is wanted for, in so many minutes: tests, the head, the loop, evidence",
    "loop": "what the training loop costs on top of the backbone's bare passes",
}

if __name__ == "__main__":
    door(program="benchmarks", package="benchmarks", commands=BENCHMARKS)
