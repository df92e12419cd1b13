"""What a head costs: time and memory of one step, against the three matrix products that no head can do without.

The yardstick, measured beside each case: u Wᵀ (B, K), G W (B, D) and Gᵀ u (K, D), of which the last two, the
gradients, get fresh memory, as every head's do. A case is one forward and backward pass, gradients of x and W
included. Times are medians of ratios, cases and products interleaved in one process a shape. Memory is the
highest resident size during a step, less that before it and less dW, in a process for each case.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvrepro.determinism import ENVIRONMENT
from mvrepro.errors import UserError, first_words
from mvrepro.files import ROOT, check_file, display, write_json
from mvrepro.heads import sweep
from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sweep import free_memory
from mvrepro.provenance import provenance

CHUNKS = {"cpu": (4, 16, 64, 256), "cuda": (16, 64, 256, 1024)}  # MiB
# The least and the most of each option; what the memory holds is asked of the machine.
LIMITS = {"batch": (1, 10**12), "classes": (2, 10**12), "dim": (1, 10**12), "threads": (1, 1024), "seconds": (0, 10**6)}
LOSS = "MV-AM-Softmax-a"
SHAPES = [  # B, K, D of the committed file: growth with B at the shape of notebook 11's bars, and with K
    *((B, 86_876, 512) for B in (128, 64, 256, 512, 1024)),
    *((128, K, 128) for K in (10_000, 30_000, 100_000, 300_000, 1_000_000)),
]
MIB = 2**20


class Naive(nn.Module):
    """MV-AM-Softmax-a as one would write it down."""

    def __init__(self, D: int, K: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D) / D**0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        cos = F.linear(F.normalize(x), F.normalize(self.weight))
        f = cos.gather(1, y[:, None]) - 0.35
        cos = torch.where(cos > f, 1.2 * cos + 0.2, cos)
        return F.cross_entropy(32 * cos.scatter(1, y[:, None], f), y)


class Unnormalised(nn.Module):
    """torch's own chunked head, which knows neither cosines nor margins."""

    def __init__(self, D: int, K: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D) / D**0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, self.weight, y)


class ArcFaceLoss(nn.Module):
    """pytorch-metric-learning's: Arc-Softmax, so without an emphasis."""

    def __init__(self, D: int, K: int) -> None:
        super().__init__()
        from pytorch_metric_learning.losses import ArcFaceLoss

        self.loss = ArcFaceLoss(K, D)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.loss.W
        return weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss(x, y)
        return loss


def _head(**how: Any) -> Callable[[int, int], nn.Module]:
    return lambda D, K: MarginHead(LOSS, D, K, check=False, **how)


BFLOAT16 = "fused, keep=none, bfloat16 products"  # measured where x and W are bfloat16, too
DTYPES = ("float32", "bfloat16", "tf32")  # of x and W; tf32: float32 whose products on a GPU keep 10 bits

CASES: dict[str, Callable[[int, int], nn.Module]] = {
    "fused, keep=none": _head(backend="fused", keep="none"),
    "fused, keep=float32": _head(backend="fused", keep="float32"),
    "fused, keep=float16": _head(backend="fused", keep="float16"),
    BFLOAT16: _head(backend="fused", keep="none", products="bfloat16"),
    "dense": _head(backend="dense"),
    "dense, compiled": _head(backend="dense"),
    "naive": Naive,
    "naive, compiled": Naive,
    "ArcFaceLoss": ArcFaceLoss,
    "linear_cross_entropy": Unnormalised,
}


def missing() -> dict[str, str]:
    """Case -> why it can't be measured here."""
    found: dict[str, str] = {}
    if not shutil.which(os.environ.get("CXX", "g++")):
        found |= dict.fromkeys([case for case in CASES if "compiled" in case], "torch.compile needs a C++ compiler")
    if not hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = f"torch {torch.__version__} has none"
    try:
        import pytorch_metric_learning  # noqa: F401
    except ImportError:
        found["ArcFaceLoss"] = "pytorch-metric-learning is not installed (requirements-dev.txt has it)"
    return found


def need(case: str, B: int, K: int, D: int, itemsize: int) -> int:
    """About the bytes that a step takes beside W, so that nobody is sent into swap."""
    logits, weights = (1, 1) if case.startswith("fused") else (8, 3)
    return itemsize * (logits * B * K + weights * K * D)


class Step:
    """One head at one shape, called to do a step."""

    def __init__(
        self, case: str, B: int, K: int, D: int, device: str, dtype: str, weight: Tensor | None = None
    ) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        kind = precision(dtype)
        with self.device:  # a million classes take the host half a minute to draw
            self.head = CASES[case](D, K).to(self.device, kind)
        if weight is not None and self.head.weight.shape == weight.shape:  # one for all cases
            self.head.weight = nn.Parameter(weight)
        self.forward = torch.compile(self.head) if "compiled" in case else self.head
        self.x = torch.randn(B, D, device=self.device, dtype=kind, requires_grad=True)
        host = isinstance(self.head, MarginHead) and self.head.backend == "fused"  # which sorts them there
        self.y = torch.randint(0, K, (B,), device="cpu" if host else self.device)

    def __call__(self) -> None:
        self.clear()
        self.forward(self.x, self.y).backward()

    def clear(self) -> None:
        self.x.grad = None
        self.head.zero_grad(set_to_none=True)


class Products:
    """The yardstick."""

    def __init__(self, B: int, K: int, D: int, device: str, dtype: str) -> None:
        make = {"device": device, "dtype": precision(dtype)}
        self.u, self.W, self.G = (torch.randn(shape, **make) for shape in ((B, D), (K, D), (B, K)))

    def __call__(self) -> None:
        torch.mm(self.u, self.W.T, out=self.G)
        _ = self.G @ self.W, self.G.T @ self.u


def precision(dtype: str) -> torch.dtype:
    """The torch dtype of one of DTYPES, after it was said how products are to be computed."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    return torch.float32 if dtype == "tf32" else getattr(torch, dtype)  # type: ignore[no-any-return]


def seconds(step: Callable[[], None], device: str) -> float:
    """Of one call; on a GPU from the start of its first kernel to the end of its last, by the device's clock."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def others(started: float, before: tuple[float, float]) -> float:
    """Cores that other processes kept busy since then, of /proc/stat; 0 where there is none."""
    busy, own = busy_seconds()
    return max(0.0, (busy - before[0] - (own - before[1])) / (time.perf_counter() - started))


def busy_seconds() -> tuple[float, float]:
    """CPU seconds of the whole machine, and of this process."""
    with suppress(OSError):
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK"), time.process_time()
    return 0.0, 0.0


def time_shape(cases: list[str], shape: tuple[int, int, int], device: str, dtype: str, budget: float) -> dict[str, Any]:
    """Medians over 3 to 25 rounds, as many as the budget (in seconds) allows; each round does every case once. `failed`
    says of the others why they can't take a step.

    On a CPU, a round during which other processes took more than a tenth of a core doesn't count, as long as three that
    count come together within ten times the budget; `disturbed` says where they didn't and all rounds count.
    """
    on_cpu = device.startswith("cpu")
    products = Products(*shape, device, dtype)
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for case in cases:
        if case == BFLOAT16 and dtype != "bfloat16":
            continue
        try:
            step = Step(case, *shape, device, dtype, weight=products.W)
            step()  # compiles, and touches all memory
        except RuntimeError as error:
            failed[case] = first_words(error)
            continue
        step.clear()
        steps[case] = step
    cases = list(steps)
    products()
    started = time.perf_counter()
    rounds: list[tuple[float, dict[str, float]]] = []  # cores that others took; seconds of each case
    quiet: list[dict[str, float]] = []
    while len(quiet) < 25:
        spent = time.perf_counter() - started
        if len(rounds) >= 3 and spent > (budget if len(quiet) >= 3 else 10 * budget):
            break
        first = len(rounds) % max(1, len(cases))
        began, before = time.perf_counter(), busy_seconds()
        took = {"products": seconds(products, device)}
        for case in cases[first:] + cases[:first]:
            took[case] = seconds(steps[case], device)
            steps[case].clear()
        rounds.append((others(began, before), took))
        quiet = [took for busy, took in rounds if busy <= 0.1 or not on_cpu]
    counted = quiet if len(quiet) >= 3 else [took for _, took in rounds]
    found = {}
    for case in cases:
        low, middle, high = statistics.quantiles([took[case] / took["products"] for took in counted], n=4)
        found[case] = {"ms": 1e3 * statistics.median(took[case] for took in counted)}
        found[case] |= {"ratio": middle, "low": low, "high": high}
    return {
        "products_ms": 1e3 * statistics.median(took["products"] for took in counted),
        "rounds": len(counted),
        "disturbed": len(quiet) < 3,
        "failed": failed,
        "cases": found,
    }


def memory(case: str, shape: tuple[int, int, int], device: str, dtype: str) -> dict[str, Any]:
    """MiB of one step beyond dW and what lay there before, and of the process in all (on a GPU: of tensors)."""
    step = Step(case, *shape, device, dtype)
    step()  # what libraries keep for themselves, once
    step.clear()
    gc.collect()
    dW = sum(p.nbytes for p in step.head.parameters())
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = everything = torch.cuda.max_memory_allocated(device)
    else:
        everything = _resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
        before = _resident("VmRSS")
        step()
        peak = _resident("VmHWM")
    return {"beyond_dw_mib": (peak - before - dW) / MIB, "in_all_mib": max(peak, everything) / MIB}


def on_gpu(cases: list[str], shape: tuple[int, int, int], device: str, dtype: str, budget: float) -> dict[str, Any]:
    """Times and memory of a shape in one process, since a GPU tells how much of its memory tensors take."""
    found = time_shape(cases, shape, device, dtype, budget)
    for case in found["cases"]:
        gc.collect()
        torch.cuda.empty_cache()
        found["cases"][case] |= memory(case, shape, device, dtype)
    return found


def chunk_sizes(shape: tuple[int, int, int], device: str, dtype: str, budget: float) -> dict[str, Any]:
    """What the sweep takes, in bare products, by the MiB of a chunk's cosines."""
    kind, found = torch.device(device).type, {}
    case = BFLOAT16 if dtype == "bfloat16" else "fused, keep=none"
    for mib in CHUNKS[kind]:
        torch.compiler.reset()  # no function is compiled for more than 8 shapes
        sweep.CHUNK_BYTES[kind] = mib * MIB
        found[str(mib)] = time_shape([case], shape, device, dtype, budget / len(CHUNKS[kind]))["cases"][case]["ratio"]
    return {"chunk_mib": found}


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise UserError("this system doesn't tell a process how much memory it takes: --no-memory leaves that out")


def apart(function: str, *arguments: Any, threads: int) -> Any:
    """A function of this module in a process of its own."""
    # Freed memory goes back at once, so that the resident size is what is in use.
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if function == "memory" else {}
    command = [sys.executable, "-m", "benchmarks.head", function, str(threads), json.dumps(arguments)]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{function} of {arguments[:2]} failed:\n{done.stderr.strip() or f'exit {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shapes: list[tuple[int, int, int]], cases: list[str], how: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry a shape: B, K, D, products_ms, rounds, cases and what was skipped, for want of memory. how: options.

    Raises UserError, before anything is measured, for a shape of which not even the products fit.
    """
    found = []
    itemsize = precision(how.dtype).itemsize
    room = {shape: _room(shape, how.device, itemsize) for shape in shapes}
    for shape, free in room.items():
        B, K, D = shape
        skipped = [case for case in cases if need(case, *shape, itemsize) > free]
        chosen = [case for case in cases if case not in skipped]
        few = f" (too little memory for {', '.join(skipped)})" if skipped else ""
        print(f"B {B}, K {K:,}, D {D}{few}", flush=True)
        entry: dict[str, Any] = {"B": B, "K": K, "D": D, "skipped": skipped}
        entry |= apart("time_shape", chosen, shape, how.device, how.dtype, how.seconds, threads=how.threads)
        for case in () if how.no_memory else entry["cases"]:
            entry["cases"][case] |= apart("memory", case, shape, how.device, how.dtype, threads=how.threads)
        found.append(entry)
    return found


def _room(shape: tuple[int, int, int], device: str, itemsize: int) -> float:
    """Bytes that a case may take beside the products' matrices, and W twice; no end of them where nothing tells."""
    B, K, D = shape
    free = free_memory(torch.device(device)) or math.inf
    products = itemsize * K * (B + 3 * D)
    if products > 0.8 * free:
        raise UserError(
            f"B {B:,}, K {K:,}, D {D:,} takes {products / 2**30:,.1f} GiB for the bare products alone, and "
            f"{free / 2**30:,.1f} GiB are free: fewer --classes or a smaller --dim"
        )
    return 0.8 * free - products


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example:\n  python -m benchmarks head --batch 128 --classes 86876 --dim 512\n"
        "takes about a minute a shape on two idle cores; the ten shapes of the committed file 15 minutes and 6 GB."
    )
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="with --classes: every B with every K")
    parser.add_argument("--classes", type=int, nargs="+", metavar="K", help="default: the shapes of the committed file")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="dimensions of an embedding (default: 512)")
    parser.add_argument("--cases", nargs="+", help=f"only these (default: all): {'; '.join(CASES)}")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, …")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of x and W (default: float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=30, help="for the times of one shape, about (default: 30)")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="where the record goes (default: scratch/bench/head.json)")


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    for name in ENVIRONMENT:  # what makes bits repeatable makes products slow; those that measure start from here
        os.environ.pop(name, None)
    _check(arguments)
    out = (arguments.out or ROOT / "scratch" / "bench" / "head.json").absolute()
    check_file(out)
    absent = missing()
    cases = [case for case in arguments.cases or CASES if case not in absent]
    for case, why in absent.items():
        print(f"{case} is left out: {why}")
    shapes = [(B, K, arguments.dim) for B in arguments.batch or () for K in arguments.classes or ()] or SHAPES
    measured = measure(shapes, cases, arguments)
    record = {"kind": "measured", "loss": LOSS, "dtype": arguments.dtype, "left_out": absent, "shapes": measured}
    write_json(out, rounded(record) | {"provenance": provenance(started, arguments.device, arguments.threads)})
    for entry in measured:
        print(table(entry))
    print(f"wrote {display(out)}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for options out of range, before anything is measured."""
    if bool(arguments.batch) != bool(arguments.classes):
        raise UserError("--batch and --classes belong together")
    for name, (least, most) in LIMITS.items():
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not value >= least:
                raise UserError(f"--{name} must be a number >= {least}, got {value}")
            if value is not None and value > most:
                raise UserError(f"--{name} must be a number <= {most:,}, got {value}")
    unknown = sorted(set(arguments.cases or ()) - set(CASES))
    if unknown:
        raise UserError(f"unknown cases {', '.join(unknown)}; known are: {'; '.join(CASES)}")
    try:
        torch.ones(1, device=arguments.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {arguments.device} can't be used: {first_words(error)}") from None


def table(entry: dict[str, Any]) -> str:
    """One shape, a line a case."""
    dense = entry["cases"].get("dense", {}).get("ms")
    width = max(map(len, [" " * 22, *entry["cases"]]))
    lines = [
        f"\nB {entry['B']}, K {entry['K']:,}, D {entry['D']}: three bare products take {entry['products_ms']:.1f} ms "
        f"(median of {entry['rounds']} rounds{', disturbed by other processes' if entry['disturbed'] else ''})",
        f"  {'':{width}}{'ms':>9}  × products      quartiles  × dense  beyond dW   in all (MiB)",
    ]
    for case, found in entry["cases"].items():
        quartiles = f"{found['low']:.2f} … {found['high']:.2f}"
        line = f"  {case:{width}}{found['ms']:9.1f}  {found['ratio']:10.2f}  {quartiles:>13}"
        line += f"  {found['ms'] / dense:7.2f}" if dense else f"  {'–':>7}"
        if "beyond_dw_mib" in found:
            line += f"  {found['beyond_dw_mib']:9.1f}  {found['in_all_mib']:7.0f}"
        lines.append(line)
    lines += [f"  {case:{width}}  {why}" for case, why in entry.get("failed", {}).items()]
    return "\n".join(lines)


def rounded(value: Any) -> Any:
    """Four digits are more than a measurement of time holds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    functions = {f.__name__: f for f in (time_shape, memory, on_gpu, chunk_sizes)}
    print(json.dumps(functions[sys.argv[1]](*json.loads(sys.argv[3]))))
