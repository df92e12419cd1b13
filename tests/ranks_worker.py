"""What tests/test_ranks.py starts: runs of `python -m mvrepro train`, each rank a fork of this process, which has torch
in memory already. Reads a list of runs as JSON, and prints a list of [exit code, stdout, stderr] a rank for each.

A run is {"ranks": R, "arguments": […], "kill": [rank, where, n, signal] or null}: that at the n-th arrival there; or
{"ranks": R, "check": a function of this module}.
"""

import gc
import json
import os
import socket
import sys
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

from mvrepro.__main__ import main
from mvrepro.training import batches, checkpoint, loop, network, ranks
from mvrepro.training.config import TrainConfig


def trap(where, n, number):
    """Let this process get a signal at the n-th call, counted from 1, of what `where` names."""
    owner, name = {
        "step": (network.Network, "step"),
        "file": (checkpoint, "_save"),  # half of it is written then
        "manifest": (checkpoint, "write_json"),
        "publish": (checkpoint, "_publish"),
        "remove": (checkpoint.shutil, "rmtree"),
        "record": (loop, "write_json"),
    }[where]
    original, calls = getattr(owner, name), []

    def call(*arguments, **options):
        calls.append(None)
        if len(calls) == n:
            if where == "file":
                original(*arguments)
                with arguments[0].open("r+b") as file:
                    file.truncate(arguments[0].stat().st_size // 2)
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, call)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank(number, run, port, folder):
    """In a fork: be that rank, as torchrun would have it; never returns."""
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{number}-{stream}", os.O_WRONLY | os.O_CREAT), stream)
    if run["ranks"] > 1 or "check" in run:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": number}
        where |= {"RANK": number, "WORLD_SIZE": run["ranks"]}
        os.environ.update({name: str(value) for name, value in where.items()})
    if run.get("kill") and run["kill"][0] == number:
        trap(*run["kill"][1:])
    code = 70
    try:
        code = globals()[run["check"]]() if "check" in run else main(["train", *run["arguments"]])
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def build(**settings):
    """(network, feed) of small ones, on this rank."""
    base = {"loss": "MV-AM-Softmax-a", "backbone": "iresnet-tiny", "embedding_dim": 8, "epochs": 1, "batch_size": 24}
    base |= {"lr": 0.1, "milestones": (), "synthetic_classes": 30, "image_size": 16, "workers": 0, "device": "cpu"}
    config = TrainConfig(**base, **settings, profile="paper", data="synthetic")
    here = ranks.Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), True)
    session = loop.prepare(config, here)
    return session.network, batches.Feed(config, session.task.train, session.order, here)


def gradients(net):
    return {name: p.grad.clone() for m in (net.backbone, net.head) for name, p in m.named_parameters()}


def clipping():
    """The norm is that of the backbone and of the classes of all ranks, and the gradient ends with at most `clip`."""
    dist.init_process_group("gloo")
    plain, feed = build(clip=1e9)
    whole = plain.step(feed, 0, 0.1)[1]
    free, common = gradients(plain), sum(p.grad.norm() ** 2 for p in plain.backbone.parameters())
    classes = [None] * dist.get_world_size()
    dist.all_gather_object(classes, plain.head.weight.grad.norm() ** 2)
    torch.testing.assert_close(whole, (common + sum(classes)).sqrt())
    net, feed = build(clip=0.5)
    torch.testing.assert_close(net.step(feed, 0, 0.1)[1], whole)
    assert whole > 0.5
    for name, grad in gradients(net).items():
        torch.testing.assert_close(grad, free[name] * 0.5 / whole, rtol=1e-4, atol=1e-7)
    return 0


def accumulation():
    """The gradient of two parts is the mean of each part's own, as a step on it alone would have it."""
    dist.init_process_group("gloo")
    net, feed = build(accumulate=2)
    single, _ = build(accumulate=2)
    _, same = build(accumulate=2)
    loss, *_ = net.step(feed, 0, 0.0)
    losses, parts = [], []
    for _ in range(2):
        single.sgd.zero_grad(), single.head_sgd.zero_grad()
        single.head.step.fill_(0)
        batch = same.next()
        part = single.head(single.embed(batch.images), batch.labels)
        part.backward()
        losses.append(part.detach())
        parts.append(gradients(single))
    torch.testing.assert_close(loss, sum(losses) / 2)
    for name, grad in gradients(net).items():
        torch.testing.assert_close(grad, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)
    return 0


def released():
    """What holds the process group is gone before it is destroyed, and not only when garbage is collected: else the end
    of a run may wait for ever."""
    dist.init_process_group("gloo")
    net, feed = build()
    net.step(feed, 0, 0.1)
    held = weakref.ref(net.ddp)
    gc.disable()
    net.release()
    assert held() is None and net.ddp is None
    return 0


def do(run):
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = []
        for number in range(run["ranks"]):
            child = os.fork()
            if not child:
                rank(number, run, port, folder)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [[code, *((folder / f"{r}-{stream}").read_text() for stream in (1, 2))] for r, code in enumerate(codes)]


if __name__ == "__main__":
    runs = json.load(sys.stdin)
    print(json.dumps([do(run) for run in runs]))
