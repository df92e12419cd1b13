"""Runs lines of tests/hostile.txt and prints those that end badly: python tests/hostile.py [EVERY [TEXT]]

EVERY: only every so manieth line (default: 1, all); TEXT: of those that hold it. Each line runs in a fork of this
process, which has loaded torch once, with a minute until it counts as a hang.
"""

import io
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

LINES = Path(__file__).with_name("hostile.txt")
LIMIT_S = 60
VERBOSE = bool(os.environ.get("VERBOSE"))
LONGEST = 1000  # characters of a readable line


def lines() -> list[str]:
    found = LINES.read_text(encoding="utf-8").splitlines()
    return [line for line in found if line and not line.startswith("#")]


def material(folder: Path) -> None:
    """What the lines name: files that are damaged, empty, of another kind or of another length, and good ones."""
    import numpy as np
    import torch
    from PIL import Image

    from mvrepro import interchange, networks

    folder.mkdir()
    for name in ("empty", "people/ann", "people/bo", "broken/ann", "model"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for person in ("ann", "bo"):
        for shot in range(2):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"people/{person}/{shot}.png")
    (folder / "broken/ann/0.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "loop").symlink_to("loop")
    good = rng.standard_normal((4, 3)).astype(np.float32)
    arrays = {"good": good, "flat": good[0], "nan": np.full((4, 3), np.nan), "zero": 0 * good, "none": good[:0]}
    arrays |= {"wide": np.tile(good, 2), "words": good.astype("U3"), "object": good.astype(object)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 10**6)})
    (folder / "huge.npy").write_bytes(header.getvalue())
    size = (2**62).to_bytes(8, "little")
    contents = {
        "file": b"a file", "text.npy": b"hello\n", "empty.npy": b"", "empty.txt": b"", "binary.txt": bytes(range(256)),
        "ids.txt": b"a\na\nb\nb\n", "short.txt": b"a\nb\n", "alike.txt": b"a\na\na\na\n",
        "everyone.txt": b"a\nb\nc\nd\n",
        "everybody.txt": b"ann\nbo\n", "bad.rec": b"\x0a\x23\xd7\xce" + bytes(20), "bad.tar": b"tar" * 500,
        "bad.bin": b"\x80\x04cos\nsystem\n.", "bad.onnx": b"\x08\x07 no network", "bad.safetensors": b"{}",
        "huge.safetensors": size + b"{}", "model/manifest.json": b"{", "list.json": b"[1, 2]",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.manual_seed(0)
    about = {"image_size": 32, "embedding_dim": 5}
    net = networks.build("iresnet-tiny", **about)
    interchange.save_backbone(folder / "net.safetensors", net, "iresnet-tiny", **about)


def below(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if not path.is_dir()}


def run(line: str, folder: Path) -> tuple[int, str, str]:
    """Exit code (negative: the signal), stdout and stderr."""
    outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
    child = os.fork()
    if not child:
        for stream, output in enumerate(outputs, 1):
            os.dup2(output.fileno(), stream)
        signal.alarm(LIMIT_S)
        os.chdir(folder)
        code = 70
        try:
            code = call(line)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read().decode(errors="replace"))
    return code, *texts


def call(line: str) -> int:
    from benchmarks.__main__ import BENCHMARKS
    from mvrepro.__main__ import main

    words = shlex.split(line)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    if encoding := os.environ.get("PYTHONIOENCODING"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding)
    program, *words = words
    if program == "benchmarks":
        return main(words, program=program, package="benchmarks", commands=BENCHMARKS)
    return main(words)


def wrong(code: int, said: str) -> str:
    """What is wrong with the end of a command, or nothing."""
    last = said.rstrip("\n").rpartition("\n")[2]
    if code < 0:
        return "hangs" if code == -signal.SIGALRM else f"dies of signal {-code}"
    if code == 0:
        return "is taken for good"
    if code not in (1, 2):
        return f"ends with {code}"
    if "Traceback" in said or "fault of the program" in said:
        return "is a fault of the program"
    usage = code == 2 and (said.startswith("usage: ") and " error: " in last)
    if not usage and (said.count("\n") != 1 or ": " not in said):
        return f"says {said.count(chr(10))} lines"
    return "" if len(last) <= LONGEST else f"says {len(last)} characters"


def check(every: int = 1, text: str = "") -> list[str]:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the command sets it, before torch is loaded
    import torch

    torch.set_num_threads(1)  # others would not outlive a fork
    import mvrepro.commands.data
    import mvrepro.interchange
    import mvrepro.pipeline.workers
    import mvrepro.training.loop  # noqa: F401

    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "here")
        os.environ |= {"MVREPRO_CACHE": f"{place}/cache", "COLUMNS": "80"}
        material(folder)
        before = below(folder)
        for line in [line for line in lines() if text in line][::every]:
            if sys.stderr.isatty() or VERBOSE:
                print(line, file=sys.stderr, flush=True)
            code, _, said = run(line, folder)
            problem = wrong(code, said)
            if after := below(folder) - before:
                problem, before = problem or f"leaves {sorted(after)[0][0]}", before | after
            if problem:
                found.append(f"{line}\n    {problem}: {said.strip()[-600:]}")
    return found


if __name__ == "__main__":
    problems = check(int(sys.argv[1]) if sys.argv[1:] else 1, *sys.argv[2:3])
    print("\n".join(problems) or "every line ends as it should")
    sys.exit(bool(problems))
