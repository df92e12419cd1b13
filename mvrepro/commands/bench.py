"""`python -m mvrepro bench head`: what the head costs, in bare matrix products and in memory."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from mvrepro.determinism import ENVIRONMENT
from mvrepro.errors import UserError
from mvrepro.files import RESULTS, display, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "example:\n  python -m mvrepro bench head --batch 128 --classes 86876 --dim 512\n"
        "takes about a minute a shape on two idle cores; the ten shapes of the committed file 15 minutes and 6 GB."
    )
    parser.add_argument("what", choices=["head"], help="what to measure")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="with --classes: every B with every K")
    parser.add_argument("--classes", type=int, nargs="+", metavar="K", help="default: the shapes of the committed file")
    parser.add_argument("--dim", type=int, default=512, metavar="D", help="dimensions of an embedding (default: 512)")
    parser.add_argument("--cases", nargs="+", help="only these (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, …")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of x and W")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=30, help="for the times of one shape, about (default: 30)")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--out", type=Path, help="where the record goes (default: scratch/bench/head.json)")


def run(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    for name in ENVIRONMENT:  # what makes bits repeatable makes products slow
        os.environ.pop(name, None)
    from benchmarks import head as bench
    from mvrepro.provenance import provenance

    if bool(arguments.batch) != bool(arguments.classes):
        raise UserError("--batch and --classes belong together")
    unknown = sorted(set(arguments.cases or ()) - set(bench.CASES))
    if unknown:
        raise UserError(f"unknown cases {', '.join(unknown)}; known are: {'; '.join(bench.CASES)}")
    absent = bench.missing()
    cases = [case for case in arguments.cases or bench.CASES if case not in absent]
    for case, why in absent.items():
        print(f"{case} is left out: {why}")
    shapes = [(B, K, arguments.dim) for B in arguments.batch or () for K in arguments.classes or ()] or bench.SHAPES
    measured = bench.measure(
        shapes,
        cases,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads,
        budget=arguments.seconds,
        with_memory=not arguments.no_memory,
        say=lambda text: print(text, flush=True),
    )
    out = (arguments.out or RESULTS.parent / "scratch" / "bench" / "head.json").absolute()
    record = {"kind": "measured", "loss": bench.LOSS, "dtype": arguments.dtype, "left_out": absent, "shapes": measured}
    write_json(out, _rounded(record) | {"provenance": provenance(started, arguments.device, arguments.threads)})
    for entry in measured:
        print(table(entry))
    print(f"wrote {display(out)}")
    return 0


def table(entry: dict[str, Any]) -> str:
    """One shape, a line a case."""
    dense = entry["cases"].get("dense", {}).get("ms")
    lines = [
        f"\nB {entry['B']}, K {entry['K']:,}, D {entry['D']}: three bare products take {entry['products_ms']:.1f} ms "
        f"(median of {entry['rounds']} rounds{', disturbed by other processes' if entry['disturbed'] else ''})",
        f"  {'':22}{'ms':>9}  × products      quartiles  × dense  beyond dW   in all (MiB)",
    ]
    for case, found in entry["cases"].items():
        quartiles = f"{found['low']:.2f} … {found['high']:.2f}"
        line = f"  {case:22}{found['ms']:9.1f}  {found['ratio']:10.2f}  {quartiles:>13}"
        line += f"  {found['ms'] / dense:7.2f}" if dense else f"  {'–':>7}"
        if "beyond_dw_mib" in found:
            line += f"  {found['beyond_dw_mib']:9.1f}  {found['in_all_mib']:7.0f}"
        lines.append(line)
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    """Four digits are more than a measurement of time holds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
