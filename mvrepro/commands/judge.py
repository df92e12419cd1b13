"""`python -m mvrepro judge`: anybody's embeddings, out of .npy files, by any protocol."""

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mvrepro import protocols
from mvrepro.errors import UserError
from mvrepro.files import check_file, read_column, write_json
from mvrepro.images import photographs, read_bin
from mvrepro.protocols.folds import CONVENTIONS

Metrics = dict[str, float]
OPTIONS: dict[str, dict[str, Any]] = {
    "embeddings": {"type": Path, "help": "(N, D) floats of any length (.npy); the probes, where there are"},
    "names": {"type": Path, "help": "a line a row: the image, such as Aaron_Eckhart_0001 or 001/frontal/01"},
    "ids": {"type": Path, "help": "a line a row: the person"},
    "pairs": {"type": Path, "help": "LFW's pairs.txt (default: that in MVREPRO_DATA), or RFW's, CALFW's, CPLFW's list"},
    "lists": {"type": Path, "help": "folder of BLUFR's lists (default: that in MVREPRO_DATA)"},
    "bin": {"type": Path, "help": "InsightFace's pair set: rows 2i and 2i + 1 are its pair i"},
    "gallery": {"type": Path, "help": "(G, D) floats (.npy)"},
    "gallery_ids": {"type": Path, "help": "a line a row of the gallery: the person"},
    "distractors": {"type": Path, "help": "(M, D) floats (.npy) of people who are neither probes nor in the gallery"},
    "sizes": {"type": int, "nargs": "+", "metavar": "N", "help": "how many distractors (default: all)"},
    "fprs": {"type": float, "nargs": "+", "metavar": "FPR", "help": "for all-pairs (default: 0.001)"},
    "fars": {"type": float, "nargs": "+", "metavar": "FAR", "help": "for megaface (default: 1e-6)"},
    "convention": {"choices": CONVENTIONS, "help": "how folds choose their threshold (default: exact; see the docs)"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    wide = max(map(len, PROTOCOLS))
    parser.epilog = "protocols, and what each needs [and takes]:\n" + "\n".join(
        f"  {name:{wide}}  {(protocol.__doc__ or '').rstrip('.')} "
        f"({' '.join([_options(needs), *(f'[{_options([option])}]' for option in takes)])})"
        for name, protocol in PROTOCOLS.items()
        for needs, takes in [_inputs(protocol)]
    )
    parser.add_argument("--protocol", required=True, choices=PROTOCOLS, metavar="NAME", help="one of those below")
    for name, settings in OPTIONS.items():
        parser.add_argument(_options([name]), required=name == "embeddings", **settings)
    parser.add_argument("--out", type=Path, help="write the figures there, too (JSON)")


def run(arguments: argparse.Namespace) -> int:
    protocol = PROTOCOLS[arguments.protocol]
    needs, takes = _inputs(protocol)
    given = [name for name in OPTIONS if getattr(arguments, name) is not None]
    if missing := [name for name in needs if name not in given]:
        raise UserError(f"the protocol {arguments.protocol} needs {_options(missing, ', ')}, too")
    if foreign := [name for name in given if name not in needs + takes]:
        raise UserError(f"the protocol {arguments.protocol} knows nothing of {_options(foreign, ', ')}")
    if arguments.out:
        paths = [value for name in given if isinstance(value := getattr(arguments, name), Path)]
        read = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path])]
        check_file(arguments.out, [*read, *_lists(arguments)])
    inputs: dict[str, Any] = {}
    for name in given:
        value = getattr(arguments, name)
        if name in ("embeddings", "gallery", "distractors"):
            from mvrepro.interchange import load_embeddings  # which needs torch

            value = load_embeddings(value)
        elif name in ("names", "ids", "gallery_ids"):  # embeddings and gallery come before them
            rows = "gallery" if name == "gallery_ids" else "embeddings"
            once = photographs.cfp_name if arguments.protocol.startswith("cfp") else photographs.lfw_name
            lines = read_column(value, once if name == "names" else None)
            if len(lines) != len(inputs[rows]):
                raise UserError(
                    f"{value} has {len(lines)} lines, {getattr(arguments, rows)} has {len(inputs[rows])} rows: "
                    "one each is needed, in their order"
                )
            value = np.array([once(line) if name == "names" else line for line in lines])
        inputs[name] = value
    try:
        metrics = protocol(**inputs)
    except ValueError as error:  # the protocols' word on arrays that don't fit
        raise UserError(f"{arguments.protocol}: {error}") from None
    for name, rate in metrics.items():
        print(f"{name}: {100 * rate:.2f} %")
    if arguments.out:
        asked = {"convention": arguments.convention} if arguments.convention else {}
        write_json(arguments.out, {"protocol": arguments.protocol, **asked, "metrics": metrics})
    return 0


def _lists(arguments: argparse.Namespace) -> list[Path]:
    """The lists of MVREPRO_DATA that are read where none are named."""
    name, named = arguments.protocol, arguments.pairs or arguments.lists
    if name in ("cfp-ff", "cfp-fp"):
        return [photographs.folder("cfp")]
    return [photographs.folder("lfw")] if name in ("lfw", "blufr") and not named else []


def _inputs(protocol: Callable[..., Metrics]) -> tuple[list[str], list[str]]:
    """The options that a protocol needs, and those that it takes."""
    parameters = inspect.signature(protocol).parameters.values()
    needs = [p.name for p in parameters if p.default is p.empty]
    return needs, [p.name for p in parameters if p.name not in needs]


def _options(names: list[str], between: str = " ") -> str:
    return between.join(f"--{name.replace('_', '-')}" for name in names)


def _lfw(embeddings: Any, names: Any, pairs: Path | None = None, convention: str = "exact") -> Metrics:
    """LFW View 2; RFW, CALFW and CPLFW by their lists."""
    path = pairs or photographs.folder("lfw") / "pairs.txt"
    return _kfold(embeddings, photographs.lfw_pairs(path, names), convention)


def _cfp_ff(embeddings: Any, names: Any, convention: str = "exact") -> Metrics:
    """CFP-FF, with the lists in MVREPRO_DATA."""
    return _kfold(embeddings, photographs.cfp_pairs("FF", names), convention)


def _cfp_fp(embeddings: Any, names: Any, convention: str = "exact") -> Metrics:
    """CFP-FP, with the lists in MVREPRO_DATA."""
    return _kfold(embeddings, photographs.cfp_pairs("FP", names), convention)


def _bin(embeddings: Any, bin: Path, convention: str = "exact") -> Metrics:
    """The pairs of an InsightFace .bin (LFW, CFP, AgeDB-30, CALFW, CPLFW, …), ten folds in order."""
    images, pairs = read_bin(bin)
    if len(embeddings) != len(images):
        raise UserError(f"the array of embeddings has {len(embeddings)} rows, {bin} has {len(images)} images")
    return _kfold(embeddings, pairs, convention)


def _all_pairs(embeddings: Any, ids: Any, fprs: tuple[float, ...] = (1e-3,)) -> Metrics:
    """TPR at each of --fprs over every pair of rows."""
    return {f"tpr@fpr={p.fpr:g}": p.tpr for p in protocols.all_pairs(embeddings, ids, fprs)}


def _blufr(embeddings: Any, names: Any, lists: Path | None = None) -> Metrics:
    """BLUFR on LFW: mean − standard deviation over its trials; DIR by its authors' rule and by that of VR."""
    trials = protocols.blufr_trials(names, lists or photographs.folder("lfw") / "blufr")
    found = protocols.blufr(embeddings, trials)
    dirs = {"dir@far=0.01": found.summary("dir"), "strict dir@far=0.01": found.summary("strict_dir")}
    return {"vr@far=0.001": found.summary("vr")} | {name: rate for name, rate in dirs.items() if not np.isnan(rate)}


def _identify(
    embeddings: Any, ids: Any, gallery: Any, gallery_ids: Any, distractors: Any, sizes: list[int] | None = None
) -> Metrics:
    """Rank 1 of probes in a gallery, against distractors."""
    sizes = sizes or [len(distractors)]
    found = protocols.identify(embeddings, ids, gallery, gallery_ids, distractors, sizes=sizes)
    return {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rates[:, 0], strict=True)}


def _megaface(
    embeddings: Any, ids: Any, distractors: Any, sizes: list[int] | None = None, fars: tuple[float, ...] = (1e-6,)
) -> Metrics:
    """MegaFace challenge 1: rank 1, and TPR at each of --fars."""
    found = protocols.megaface(embeddings, ids, distractors, sizes=sizes or [len(distractors)], fars=fars)
    rates = {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rank1, strict=True)}
    return rates | {f"tpr@far={point.fpr:g}": point.tpr for point in found.points}


def _trillion_pairs(embeddings: Any, ids: Any, distractors: Any) -> Metrics:
    """A reading of Trillion Pairs: Id at FAR 1e-3, Ver at FAR 1e-9."""
    found = protocols.trillion_pairs(embeddings, ids, distractors)
    return {"id@far=0.001": found.identification.tpr, "ver@far=1e-09": found.verification.tpr}


def _kfold(embeddings: Any, pairs: Any, convention: str) -> Metrics:
    scores = protocols.pair_cosines(embeddings, pairs.left, pairs.right)
    result = protocols.kfold_accuracy(scores, pairs.same, pairs.folds, convention)
    return {"accuracy": result.mean, "standard deviation over folds": result.std}


PROTOCOLS: dict[str, Callable[..., Metrics]] = {
    function.__name__[1:].replace("_", "-"): function
    for function in (_lfw, _cfp_ff, _cfp_fp, _bin, _blufr, _all_pairs, _identify, _megaface, _trillion_pairs)
}
