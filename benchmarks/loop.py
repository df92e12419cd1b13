"""What head, loss, data and loop cost on top of the backbone's bare forward and backward pass."""

import argparse
import math
import statistics
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from mvrepro.commands import train as door
from mvrepro.errors import UserError
from mvrepro.files import ROOT, check_file, display, write_json
from mvrepro.training.config import check, rate

WARM_UP = 8  # steps, where time is short


def add_arguments(parser: argparse.ArgumentParser) -> None:
    door.add_settings(parser, profile="paper")
    parser.epilog = (
        "example: python -m benchmarks loop --data synthetic --synthetic-classes 72690 --backbone mobilefacenet "
        "--batch-size 64 --workers 0"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the loop and of the bare passes (default: 9)")
    text = "where the record goes (default: scratch/bench/loop.json)"
    parser.add_argument("--out", type=Path, default=ROOT / "scratch" / "bench" / "loop.json", help=text)


def run(arguments: argparse.Namespace) -> int:
    return door.with_one_voice(_run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    config = door.options(arguments)
    check(config)
    if not 1 <= arguments.rounds <= 10_000:
        raise UserError(f"--rounds must be in 1 … 10,000, got {arguments.rounds}")
    check_file(arguments.out.absolute())
    door.set_environment(config)
    from mvrepro.training.loop import check_used, prepare
    from mvrepro.training.ranks import joined

    check_used(config, door.given(arguments))
    with joined(config) as ranks, closing(prepare(config, ranks)) as session:
        record = measure(session, arguments.rounds)
        if ranks.rank == 0:
            write_json(arguments.out.absolute(), record)
            print(f"{sentence(record)}\nwrote {display(arguments.out.absolute())}")
    return 0


def measure(session: Any, rounds: int, budget: float = math.inf, wanted: int | None = None) -> dict[str, Any]:
    """Rounds of the whole loop and of the bare passes, one after the other in this process.

    loop  the session's own step: data, forward, head, backward, clipping, SGD
    bare  forward and backward of the same backbone on one batch that lies on the device already: no head, no
          gradient exchanged between ranks, no step of SGD
    A round has `wanted` steps, and without them so many that batches read during the bare passes don't hide what
    reading costs. ratio: the median of the rounds' bare time over loop time, with quartiles. Two rounds come first and
    don't count; with a `budget` of seconds one of a few steps, and no further round begins that would not end within
    it, though one counts. other_cores: how many the other processes of this machine kept busy, those that read images
    and other ranks among them.
    """
    import torch

    from benchmarks.head import busy_seconds, others, seconds
    from mvrepro.provenance import provenance
    from mvrepro.training.batches import Feed, normalised

    started = time.perf_counter()
    config, ranks = session.config, session.ranks
    network, order = session.network, session.order
    steps = wanted or max(1, 8 * config.workers)  # twice what the processes that read keep ready
    first = [min(steps, WARM_UP)] if budget < math.inf else [steps, steps]
    order.steps = sum(first) + rounds * steps
    feed = Feed(config, session.task.train, order, ranks)
    parts = config.accumulate
    part = config.batch_size // (ranks.count * parts)
    pixels = torch.randint(0, 256, (part, *network.shape), dtype=torch.uint8)
    pixels = normalised(pixels.to(ranks.device), config.channels_last)
    gradient = torch.randn(part, config.embedding_dim, device=ranks.device)
    forward = torch.compile(network.backbone) if config.compile else network.backbone

    def whole(done: int, steps: int) -> None:
        for number in range(done, done + steps):
            network.step(feed, number, rate(config, number, order.steps, order.an_epoch))

    def bare(steps: int) -> None:
        for _ in range(steps):
            network.sgd.zero_grad()
            for _ in range(parts):
                with network.half():
                    embeddings = forward(pixels)
                embeddings.float().backward(gradient)

    found: dict[str, list[float]] = {"loop": [], "bare": [], "waiting": [], "others": []}
    done = 0
    for number, count in enumerate([*first, *[steps] * rounds]):
        began, before, waited = time.perf_counter(), busy_seconds(), feed.waited
        if number > len(first) and began - started + found["loop"][-1] * steps + found["bare"][-1] * steps > budget:
            break
        loop = seconds(partial(whole, done, count), ranks.device.type)
        alone = seconds(partial(bare, count), ranks.device.type)
        done += count
        if number >= len(first):
            found["loop"].append(loop / steps)
            found["bare"].append(alone / steps)
            found["others"].append(others(began, before))
            found["waiting"].append((feed.waited - waited) / loop)
    low, ratio, high = _quartiles([b / a for a, b in zip(found["loop"], found["bare"], strict=True)])
    return {
        "kind": "measured",
        "config": config.decisive() | {"data": Path(config.data).name},  # where a set lies is this machine's
        "workers": config.workers,
        "sizes": {"classes": network.head.num_classes, "ranks": ranks.count, "steps_a_round": steps},
        "rounds": len(found["loop"]),
        "loop_images_per_s": config.batch_size / statistics.median(found["loop"]),
        "bare_images_per_s": config.batch_size / statistics.median(found["bare"]),
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "waiting": statistics.median(found["waiting"]),
        "other_cores": statistics.median(found["others"]),
        "provenance": provenance(started, str(ranks.device), config.threads),
    }


def sentence(record: dict[str, Any]) -> str:
    """What was measured, for people."""
    low, high = record["ratio_quartiles"]
    return (
        f"{record['loop_images_per_s']:.1f} images/s in the loop, {record['bare_images_per_s']:.1f} in bare passes; "
        f"it runs at {100 * record['ratio']:.1f} % of their pace (quartiles {100 * low:.1f} … {100 * high:.1f}, "
        f"{record['rounds']} rounds); {100 * record['waiting']:.1f} % of its time it waited for data; other processes "
        f"kept {record['other_cores']:.1f} cores busy"
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high
