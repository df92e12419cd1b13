"""`python -m mvrepro judge`: anybody's embeddings, out of .npy files, by any protocol."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mvrepro import protocols
from mvrepro.errors import UserError
from mvrepro.files import read_column, write_json
from mvrepro.images import photographs, read_bin
from mvrepro.images.source import SUFFIXES

Metrics = dict[str, float]
OPTIONS: dict[str, dict[str, Any]] = {
    "names": {"type": Path, "help": "a line a row: the image, such as Aaron_Eckhart_0001 or 001/frontal/01"},
    "ids": {"type": Path, "help": "a line a row: the person"},
    "pairs": {"type": Path, "help": "LFW's pairs.txt (default: that in MVREPRO_DATA)"},
    "lists": {"type": Path, "help": "folder of BLUFR's lists (default: that in MVREPRO_DATA)"},
    "bin": {"type": Path, "help": "InsightFace's pair set: rows 2i and 2i + 1 are its pair i"},
    "gallery": {"type": Path, "help": "(G, D) floats (.npy)"},
    "gallery_ids": {"type": Path, "help": "a line a row of the gallery: the person"},
    "distractors": {"type": Path, "help": "(M, D) floats (.npy) of people who are neither probes nor in the gallery"},
    "sizes": {"type": int, "nargs": "+", "metavar": "N", "help": "how many distractors (default: all)"},
    "fprs": {"type": float, "nargs": "+", "metavar": "FPR", "help": "for all-pairs (default: 0.001)"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    wide = max(map(len, PROTOCOLS))
    parser.epilog = "protocols, and what each needs beside --embeddings [and takes]:\n" + "\n".join(
        f"  {name:{wide}}  {text} ({' '.join([*map(_option, needs), *(f'[{_option(o)}]' for o in takes)])})"
        for name, (_, text, needs, takes) in PROTOCOLS.items()
    )
    add = parser.add_argument
    add("--protocol", required=True, choices=PROTOCOLS, metavar="NAME", help="one of those below")
    text = "(N, D) floats of any length (.npy); the probes, where there are"
    add("--embeddings", type=Path, required=True, help=text)
    for name, settings in OPTIONS.items():
        add(_option(name), **settings)
    add("--out", type=Path, help="write the figures there, too (JSON)")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(arguments: argparse.Namespace) -> int:
    judge, _, needs, takes = PROTOCOLS[arguments.protocol]
    given = {name for name in OPTIONS if getattr(arguments, name) is not None}
    for wrong, text in ((set(needs) - given, "needs {}, too"), (given - {*needs, *takes}, "knows nothing of {}")):
        if wrong:
            listed = ", ".join(_option(name) for name in OPTIONS if name in wrong)
            raise UserError(f"the protocol {arguments.protocol} {text.format(listed)}")
    try:
        metrics = judge(_load(arguments.embeddings), arguments)
    except ValueError as error:  # the protocols' word on arrays that don't fit
        raise UserError(f"{arguments.protocol}: {error}") from None
    for name, value in metrics.items():
        print(f"{name}: {100 * value:.2f} %")
    if arguments.out:
        write_json(arguments.out, {"protocol": arguments.protocol, "metrics": metrics})
    return 0


def _lfw(x: Any, arguments: argparse.Namespace) -> Metrics:
    names = _names(x, arguments)
    return _kfold(x, photographs.lfw_pairs(arguments.pairs or photographs.folder("lfw") / "pairs.txt", names))


def _cfp(x: Any, arguments: argparse.Namespace) -> Metrics:
    return _kfold(x, photographs.cfp_pairs(arguments.protocol[-2:].upper(), _names(x, arguments)))


def _bin(x: Any, arguments: argparse.Namespace) -> Metrics:
    images, pairs = read_bin(arguments.bin)
    if len(x) != len(images):
        raise UserError(f"{arguments.embeddings} has {len(x)} rows, {arguments.bin} has {len(images)} images")
    return _kfold(x, pairs)


def _blufr(x: Any, arguments: argparse.Namespace) -> Metrics:
    lists = arguments.lists or photographs.folder("lfw") / "blufr"
    result = protocols.blufr(x, protocols.blufr_trials(_names(x, arguments), lists))
    return {"vr@far=0.001": result.vr_summary, "dir@far=0.01": result.dir_summary}


def _all_pairs(x: Any, arguments: argparse.Namespace) -> Metrics:
    points = protocols.all_pairs(x, _ids(x, arguments), arguments.fprs or [1e-3])
    return {f"tpr@fpr={p.fpr:g}": p.tpr for p in points}


def _identify(x: Any, arguments: argparse.Namespace) -> Metrics:
    gallery = _load(arguments.gallery)
    whose = _lines(arguments.gallery_ids, gallery, arguments.gallery)
    distractors, sizes = _distractors(arguments)
    found = protocols.identify(x, _ids(x, arguments), gallery, whose, distractors, sizes=sizes)
    return {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rates[:, 0], strict=True)}


def _megaface(x: Any, arguments: argparse.Namespace) -> Metrics:
    distractors, sizes = _distractors(arguments)
    found = protocols.megaface(x, _ids(x, arguments), distractors, sizes=sizes)
    rates = {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rank1, strict=True)}
    return rates | {f"tpr@far={found.verification.fpr:g}": found.verification.tpr}


def _trillion_pairs(x: Any, arguments: argparse.Namespace) -> Metrics:
    found = protocols.trillion_pairs(x, _ids(x, arguments), _distractors(arguments)[0])
    return {"id@far=0.001": found.identification.tpr, "ver@far=1e-09": found.verification.tpr}


# name -> function, what it is, the options that it needs and those that it takes
PROTOCOLS: dict[str, tuple[Callable[[Any, argparse.Namespace], Metrics], str, list[str], list[str]]] = {
    "lfw": (_lfw, "LFW View 2", ["names"], ["pairs"]),
    "cfp-ff": (_cfp, "CFP-FF, with the lists in MVREPRO_DATA", ["names"], []),
    "cfp-fp": (_cfp, "CFP-FP, with the lists in MVREPRO_DATA", ["names"], []),
    "bin": (_bin, "the pairs of an InsightFace .bin (AgeDB-30, CALFW, …), ten folds in order", ["bin"], []),
    "blufr": (_blufr, "BLUFR on LFW: mean − standard deviation over its trials", ["names"], ["lists"]),
    "all-pairs": (_all_pairs, "TPR at each of --fprs over every pair of rows", ["ids"], ["fprs"]),
    "identify": (
        _identify,
        "rank 1 of probes in a gallery, against distractors",
        ["ids", "gallery", "gallery_ids", "distractors"],
        ["sizes"],
    ),
    "megaface": (_megaface, "MegaFace challenge 1: rank 1, and TPR at FAR 1e-6", ["ids", "distractors"], ["sizes"]),
    "trillion-pairs": (
        _trillion_pairs,
        "a reading of Trillion Pairs: Id at FAR 1e-3, Ver at FAR 1e-9",
        ["ids", "distractors"],
        [],
    ),
}


def _kfold(x: Any, pairs: Any) -> Metrics:
    result = protocols.kfold_accuracy(protocols.pair_cosines(x, pairs.left, pairs.right), pairs.same, pairs.folds)
    return {"accuracy": result.mean, "standard deviation over folds": result.std}


def _load(path: Path) -> Any:
    from mvrepro.interchange import load_embeddings  # which needs torch

    return load_embeddings(path)


def _ids(x: Any, arguments: argparse.Namespace) -> list[str]:
    return _lines(arguments.ids, x, arguments.embeddings)


def _names(x: Any, arguments: argparse.Namespace) -> Any:
    """(N,) names of the images, without the suffixes of files; each once."""
    return np.array([_plain(name) for name in _lines(arguments.names, x, arguments.embeddings, once=_plain)])


def _plain(name: str) -> str:
    return next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), name)


def _lines(path: Path, rows: Any, of: Path, once: Callable[[str], str] | None = None) -> list[str]:
    lines = read_column(path, once)
    if len(lines) != len(rows):
        raise UserError(f"{path} has {len(lines)} lines, {of} has {len(rows)} rows: one each is needed, in their order")
    return lines


def _distractors(arguments: argparse.Namespace) -> tuple[Any, list[int]]:
    x = _load(arguments.distractors)
    return x, arguments.sizes or [len(x)]
