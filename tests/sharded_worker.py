"""What tests/test_sharded.py starts with torchrun: a ShardedHead on every rank against one dense head."""

import datetime
import os
import sys
import time
from itertools import product
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sharded import ShardedHead
from mvrepro.losses import LOSSES

K, D = 43, 16  # no number of ranks but 1 divides K
SIZES = {1: [24], 2: [23, 1], 4: [9, 1, 8, 6]}  # B = 24, unevenly


def draw(seed, dtype):
    """x (B, D), W (K, D), y (B,), the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(rows, D, generator=random) for rows in (24, K))
    return x.to(dtype), W.to(dtype), torch.randint(0, K, (24,), generator=random)


def own(x):
    """The rows of a batch that are this rank's."""
    return x.split(SIZES[dist.get_world_size()])[dist.get_rank()]


def all_rows(x):
    """The rows of every rank, one below the other."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return torch.cat(parts)


def heads(name, seed=0, dtype=torch.float32, sharded=None, **options):
    """(sharded head, dense head in float64, x, y) with the same weights."""
    x, W, y = draw(seed, dtype)
    many = ShardedHead(name, D, K, **options, **(sharded or {})).to(dtype)
    many.load_full_weight(W)
    one = MarginHead(name, D, K, backend="dense", **{k: v for k, v in options.items() if k != "keep"}).double()
    with torch.no_grad():
        one.weight.copy_(W)
    return many, one, x, y


def clear(head, x, y, gap=3e-6):
    """True where rounding in float32 turns over no mark, no easy margin and no order of the hardest."""
    cos = head.cosines(x.double()).detach()
    target = cos.gather(1, y[:, None])
    others = torch.arange(K) != y[:, None]
    hard = head.losses(x.double(), y).detach().sort().values.diff()
    return (cos - head.margin(target))[others].abs().min() > gap and target.abs().min() > gap and hard.min() > 1e-4


def step(head, x, y):
    x = x.detach().requires_grad_()
    head.weight.grad = None
    loss = head(x, y)
    loss.backward()
    return loss.detach(), x.grad, head.weight.grad


def assert_close(got, expected, share, what):
    for part, a, b in zip(("loss", "dx", "dW"), got, expected, strict=True):
        error, size = (a.double() - b.double()).norm(), b.double().norm()
        assert error <= share * max(size, 0.01), f"{what}: {part} is off by {error / size:.3g} of {size:.3g}"


def agrees(name, dtype, share, **options):
    seed = next(s for s in range(1000) if clear(*heads(name, s, dtype, **options)[1:]))
    many, one, x, y = heads(name, seed, dtype, **options)
    loss, dx, dW = step(many, own(x), own(y))
    assert_close((loss, all_rows(dx), all_rows(dW)), step(one, x.double(), y), share, (name, dtype, options))
    assert dx.dtype == dW.dtype == dtype and len(set(all_rows(loss[None]).tolist())) == 1


def every_loss():
    for name, dtype in product(LOSSES, (torch.float32, torch.float64)):
        agrees(name, dtype, 1e-5 if dtype == torch.float32 else 1e-10)
    for keep, share in (("none", 1e-5), ("float32", 1e-5), ("float16", 2e-2)):
        agrees("MV-Arc-Softmax-a", torch.float32, share, keep=keep, easy_margin=True)
    agrees("HM-Arc-Softmax", torch.float32, 1e-5, hard_ratio=0.3)


def half_precision():
    many, one, x, y = heads("AM-Softmax")
    x = x.bfloat16()
    loss, dx, dW = step(many, own(x), own(y))
    assert dx.dtype == torch.bfloat16 and dW.dtype == torch.float32
    assert_close((loss, all_rows(dx), all_rows(dW)), step(one, x.double(), y), 0.01, "bfloat16")


def labels_on_one_rank():
    many, one, x, y = heads("HM-AM-Softmax")
    y = torch.full_like(y, K - 1)
    loss, dx, dW = step(many, own(x), own(y))
    assert_close((loss, all_rows(dx), all_rows(dW)), step(one, x.double(), y), 1e-5, "one label")


def behind_ddp():
    many, one, x, y = heads("MV-AM-Softmax-f", dtype=torch.float64, sharded={"ddp": True})
    torch.manual_seed(0)
    backbone = torch.nn.Linear(D, D).double()
    spread = DistributedDataParallel(torch.nn.Linear(D, D).double())
    spread.module.load_state_dict(backbone.state_dict())
    many(spread(own(x)), own(y)).backward()
    one(backbone(x), y).backward()
    torch.testing.assert_close(spread.module.weight.grad, backbone.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(all_rows(many.weight.grad), one.weight.grad, rtol=1e-10, atol=1e-12)


def sampled_negatives():
    """The loss is that of a dense head with the sampled classes alone."""
    for name, updates in product(("MV-Arc-Softmax-a", "HM-AM-Softmax"), (False, True)):
        many, _, x, y = heads(name, dtype=torch.float64, sharded={"sample_rate": 0.4})
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        if updates:
            many.update_in_backward(**options)
        for seed in range(3):
            x, _, y = draw(seed, torch.float64)
            before = all_rows(many.weight.detach())
            loss, dx, dW = step(many, own(x), own(y))
            kept = all_rows(many.sampled + many.first).sort().values
            mine = y.unique()
            mine = mine[(mine >= many.first) & (mine < many.first + len(many.weight))]
            assert len(many.sampled) == max(2, len(mine), int(0.4 * len(many.weight)))
            assert set(y.tolist()) <= set(kept.tolist())
            few = MarginHead(name, D, len(kept), backend="dense").double()
            few.weight.data.copy_(before[kept])
            expected = step(few, x, torch.searchsorted(kept, y))
            if not updates:
                assert_close((loss, all_rows(dx), all_rows(dW)[kept]), expected, 1e-10, "sampled")
                assert all_rows(dW).count_nonzero() == D * len(kept)
                continue
            assert dW is None
            if seed == 0:  # no momentum yet
                torch.optim.SGD(few.parameters(), **options).step()
                torch.testing.assert_close(all_rows(many.weight.detach())[kept], few.weight.detach())
            others = torch.ones(K).index_fill(0, kept, 0).bool()
            assert torch.equal(all_rows(many.weight.detach())[others], before[others])
        many.eval()
        assert torch.equal(many(own(x), own(y)), many(own(x), own(y)))  # nothing is drawn outside training


def update_in_backward():
    many, one, _, _ = heads("MV-AM-Softmax-a", dtype=torch.float64)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    many.update_in_backward(**options)
    sgd = torch.optim.SGD(one.parameters(), **options)
    for seed in range(4):
        x, _, y = draw(seed, torch.float64)
        step(many, own(x), own(y))
        step(one, x, y)
        sgd.step()
        assert many.weight.grad is None
    torch.testing.assert_close(all_rows(many.weight.detach()), one.weight.detach(), rtol=1e-10, atol=1e-12)


def weights():
    torch.manual_seed(3)
    head = ShardedHead("Softmax", D, K)
    rows = all_rows(head.weight.detach())
    assert len(rows) == K and len(rows.unique(dim=0)) == K, "ranks began with the same weights"
    assert len({int(n) for n in all_rows(torch.tensor([len(head.weight)]))}) <= 2
    torch.manual_seed(4)
    other = all_rows(ShardedHead("Softmax", D, K).weight.detach())
    assert len(torch.cat([rows, other]).unique(dim=0)) == 2 * K, "a seed's rank began with another seed's weights"
    full = head.full_weight()
    assert (full is None) == (head.rank != 0) and (full is None or torch.equal(full, rows))
    fresh = ShardedHead("Softmax", D, K)
    fresh.load_full_weight(rows)
    assert torch.equal(fresh.weight, head.weight)
    assert head.state_dict()["weight"].shape == (len(head.weight), D)
    assert f"on rank {head.rank} of {head.ranks}" in repr(head)


def watch():
    """Of the first 256 samples of each rank, and of more classes than one chunk has."""
    classes, counts = 9000, {1: [300], 2: [300, 5], 4: [9, 270, 1, 5]}[dist.get_world_size()]
    random = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, D, generator=random) for rows in (sum(counts), classes))
    y = torch.randint(0, classes, (len(x),), generator=random)
    x += 2 * W[y]
    seen = torch.cat([rows[:256] for rows in torch.arange(len(x)).split(counts)])
    own = torch.arange(len(x)).split(counts)[dist.get_rank()]
    for name, dtype in product(("Softmax", "A-Softmax", "MV-Arc-Softmax-a"), (torch.float32, torch.bfloat16)):
        many, one = ShardedHead(name, D, classes), MarginHead(name, D, classes)
        many.load_full_weight(W)
        with torch.no_grad():
            one.weight.copy_(W)
        found, expected = many.watch(x[own].to(dtype), y[own]), one.watch(x[seen].to(dtype), y[seen])
        assert found.keys() == expected.keys() and found["target_cosine"] > 0.5
        assert all(abs(found[what] - expected[what]) < 3e-6 for what in found), (found, expected)


def memory():
    """What a full memory raises in an exchange is no word about the other ranks."""
    head = ShardedHead("Softmax", D, K)
    x, _, y = draw(0, torch.float32)
    for error, kind in [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), torch.OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), RuntimeError),
        (dist.DistBackendError("NCCL error: ncclUnhandledCudaError, 'out of memory'"), dist.DistBackendError),
        (RuntimeError("expected two tensors of one shape"), RuntimeError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), ConnectionError),
        (dist.DistNetworkError("the client socket has timed out"), ConnectionError),
    ]:
        with mock.patch.object(dist, "all_reduce", side_effect=error):
            try:
                step(head, own(x), own(y))
            except (RuntimeError, OSError) as raised:
                assert type(raised) is kind, (raised, kind)
                assert ("lost contact" in str(raised)) == (kind is ConnectionError)
            else:
                raise AssertionError("nothing was raised")


def errors():
    head = ShardedHead("Softmax", D, K)
    for call, kind, text in [
        (lambda: ShardedHead("Softmax", D, K, sample_rate=0.0), ValueError, "sample_rate must be in (0, 1]"),
        (lambda: ShardedHead("Softmax", D, 2), ValueError, "2 classes can't be spread over"),
        (lambda: head.load_full_weight(torch.zeros(2, D)), ValueError, "the weight must be (43, 16), got (2, 16)"),
        (lambda: head(torch.zeros(1, D), torch.tensor([K])), ValueError, "labels must be in 0 … 42, got 43"),
        (lambda: head.logits(torch.zeros(1, D), torch.tensor([0])), NotImplementedError, "full_weight()"),
    ]:
        try:
            call()
        except kind as error:
            assert text in str(error), error
        else:
            assert "spread" in text and head.ranks <= 2, text


def a_rank_dies():
    head = ShardedHead("Softmax", D, K)
    x, _, y = draw(0, torch.float32)
    for i in range(10):
        if i == 3 and head.rank == 1:
            os._exit(3)
        step(head, own(x), own(y))


def a_rank_stands_still():
    head = ShardedHead("Softmax", D, K, group=dist.new_group(timeout=datetime.timedelta(seconds=8)))
    x, _, y = draw(0, torch.float32)
    step(head, own(x), own(y))
    if head.rank == 1:
        time.sleep(600)
    step(head, own(x), own(y))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    for test in sys.argv[1:]:
        globals()[test]()
        if dist.get_rank() == 0:
            print(f"passed: {test}", flush=True)
    dist.destroy_process_group()
