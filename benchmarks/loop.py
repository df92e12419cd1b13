"""What head, loss, data and loop cost on top of the backbone's bare forward and backward pass."""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.head import busy_seconds, others, seconds
from mvrepro.files import display, write_json
from mvrepro.provenance import provenance
from mvrepro.training.batches import Feed, normalised
from mvrepro.training.config import ScaleConfig, rate
from mvrepro.training.loop import prepare
from mvrepro.training.ranks import Ranks


def measure(config: ScaleConfig, ranks: Ranks, out: Path, rounds: int) -> dict[str, Any]:
    """Rounds of the whole loop and of the bare passes, one after the other in this process; OUT/overhead.json.

    loop  config's own step: data, forward, head, backward, clipping, SGD
    bare  forward and backward of the same backbone on one batch that lies on the device already: no head, no
          gradient exchanged between ranks, no step of SGD
    A round is long enough that batches read during the bare passes don't hide what reading costs. ratio: the median
    of the rounds' bare time over loop time, with quartiles. Two rounds come first and don't count. other_cores: how
    many the other processes of this machine kept busy, those that read images and other ranks among them.
    """
    started = time.perf_counter()
    images, order, network = prepare(config, ranks)
    steps = max(1, 8 * config.workers)  # twice what the processes that read keep ready
    order.steps = (rounds + 2) * steps
    feed = Feed(config, images.images, order, ranks)
    parts = config.accumulate
    pixels = torch.randint(0, 256, (order.part, 3, config.image_size, config.image_size), dtype=torch.uint8)
    pixels = normalised(pixels.to(ranks.device), config.channels_last)
    gradient = torch.randn(order.part, config.embedding_dim, device=ranks.device)
    forward = torch.compile(network.backbone) if config.compile else network.backbone

    def whole(first: int) -> None:
        for number in range(first, first + steps):
            network.step(feed, number, rate(config, number, order.steps, order.an_epoch))

    def bare() -> None:
        for _ in range(steps):
            network.sgd.zero_grad()
            for _ in range(parts):
                with network.half():
                    embeddings = forward(pixels)
                embeddings.float().backward(gradient)

    found: dict[str, list[float]] = {"loop": [], "bare": [], "waiting": [], "others": []}
    for number in range(rounds + 2):
        waited, began, before = feed.waited, time.perf_counter(), busy_seconds()
        loop = seconds(partial(whole, number * steps), ranks.device.type)
        alone = seconds(bare, ranks.device.type)
        if number >= 2:
            found["loop"].append(loop / steps)
            found["bare"].append(alone / steps)
            found["others"].append(others(began, before))
            found["waiting"].append((feed.waited - waited) / loop)
    low, ratio, high = _quartiles([b / a for a, b in zip(found["loop"], found["bare"], strict=True)])
    record = {
        "kind": "measured",
        "config": config.decisive(),
        "workers": config.workers,
        "sizes": {"classes": images.classes, "ranks": ranks.count, "steps_a_round": steps},
        "rounds": rounds,
        "loop_images_per_s": config.batch_size / statistics.median(found["loop"]),
        "bare_images_per_s": config.batch_size / statistics.median(found["bare"]),
        "ratio": ratio,
        "ratio_quartiles": [low, high],
        "waiting": statistics.median(found["waiting"]),
        "other_cores": statistics.median(found["others"]),
        "provenance": provenance(started, str(ranks.device), config.threads),
    }
    with ranks.together():
        if ranks.rank == 0:
            write_json(out / "overhead.json", record)
            ranks.say(f"wrote {display(out / 'overhead.json')}")
    return record


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
