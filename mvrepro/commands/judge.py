"""`python -m mvrepro judge`: anybody's embeddings, out of .npy files, by any protocol."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvrepro.errors import UserError
from mvrepro.files import write_json

Metrics = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    wide = max(map(len, PROTOCOLS))
    parser.epilog = "protocols, and what each needs beside --embeddings:\n" + "\n".join(
        f"  {name:{wide}}  {function.__doc__.splitlines()[0].rstrip('.') if function.__doc__ else ''}"
        f" ({' '.join(f'--{o}' for o in needs)})"
        for name, (function, needs) in PROTOCOLS.items()
    )
    add = parser.add_argument
    add("--protocol", required=True, choices=PROTOCOLS, metavar="NAME", help="one of those below")
    add(
        "--embeddings", type=Path, required=True, help="(N, D) floats of any length (.npy); the probes, where there are"
    )
    add("--names", type=Path, help="a line a row: the image, such as Aaron_Eckhart_0001 or 001/frontal/01")
    add("--ids", type=Path, help="a line a row: the person")
    add("--pairs", type=Path, help="LFW's pairs.txt (default: that in MVREPRO_DATA)")
    add("--lists", type=Path, help="folder of BLUFR's lists (default: that in MVREPRO_DATA)")
    add("--bin", type=Path, help="InsightFace's pair set: rows 2i and 2i + 1 are its pair i")
    add("--gallery", type=Path, help="(G, D) floats (.npy)")
    add("--gallery-ids", type=Path, help="a line a row of the gallery: the person")
    add("--distractors", type=Path, help="(M, D) floats (.npy) of people who are neither probes nor in the gallery")
    add("--sizes", type=int, nargs="+", metavar="N", help="how many distractors (default: all)")
    add("--fprs", type=float, nargs="+", default=[1e-3], metavar="FPR", help="for all-pairs (default: 0.001)")
    add("--out", type=Path, help="write the figures there, too (JSON)")


def run(arguments: argparse.Namespace) -> int:
    judge, needs = PROTOCOLS[arguments.protocol]
    missing = [f"--{name}" for name in needs if getattr(arguments, name.replace("-", "_")) is None]
    if missing:
        raise UserError(f"the protocol {arguments.protocol} needs {', '.join(missing)}, too")
    try:
        metrics = judge(arguments)
    except ValueError as error:  # the protocols' word on arrays that don't fit
        raise UserError(f"{arguments.protocol}: {error}") from None
    for name, value in metrics.items():
        print(f"{name}: {100 * value:.2f} %")
    if arguments.out:
        write_json(arguments.out, {"protocol": arguments.protocol, "metrics": metrics})
    return 0


def _lfw(arguments: argparse.Namespace) -> Metrics:
    """LFW View 2."""
    import numpy as np

    from mvrepro.images import photographs

    x, names = _rows(arguments, "names")
    pairs = photographs.lfw_pairs(arguments.pairs or photographs.folder("lfw") / "pairs.txt", np.array(names))
    return _kfold(x, pairs.left, pairs.right, pairs.same, pairs.folds)


def _cfp(kind: str) -> Callable[[argparse.Namespace], Metrics]:
    def judge(arguments: argparse.Namespace) -> Metrics:
        import numpy as np

        from mvrepro.images import photographs

        x, names = _rows(arguments, "names")
        pairs = photographs.cfp_pairs(kind, np.array(names))
        return _kfold(x, pairs.left, pairs.right, pairs.same, pairs.folds)

    judge.__doc__ = f"CFP-{kind}, with the lists in MVREPRO_DATA."
    return judge


def _bin(arguments: argparse.Namespace) -> Metrics:
    """The pairs of an InsightFace .bin (LFW, CFP, AgeDB-30, CALFW, CPLFW, …), ten folds in order."""
    import numpy as np

    from mvrepro.images import read_bin

    x, pairs = _load(arguments.embeddings), read_bin(arguments.bin)
    if len(x) != 2 * len(pairs):
        raise UserError(f"{arguments.embeddings} has {len(x)} rows, {arguments.bin} has {2 * len(pairs)} images")
    left = np.arange(0, len(x), 2)
    return _kfold(x, left, left + 1, pairs.same, pairs.folds)


def _all_pairs(arguments: argparse.Namespace) -> Metrics:
    """TPR at each of --fprs over every pair of rows."""
    from mvrepro import protocols

    x, ids = _rows(arguments, "ids")
    return {f"tpr@fpr={p.fpr:g}": p.tpr for p in protocols.all_pairs(x, ids, arguments.fprs)}


def _blufr(arguments: argparse.Namespace) -> Metrics:
    """BLUFR on LFW: mean − standard deviation over its trials."""
    from mvrepro import protocols
    from mvrepro.images import photographs

    x, names = _rows(arguments, "names")
    trials = protocols.blufr_trials(names, arguments.lists or photographs.folder("lfw") / "blufr")
    result = protocols.blufr(x, trials)
    return {"vr@far=0.001": result.vr_summary, "dir@far=0.01": result.dir_summary}


def _identify(arguments: argparse.Namespace) -> Metrics:
    """Rank 1 of probes in a gallery, against distractors."""
    from mvrepro import protocols

    x, ids = _rows(arguments, "ids")
    gallery = _load(arguments.gallery)
    whose = _lines(arguments.gallery_ids, len(gallery), arguments.gallery)
    distractors, sizes = _distractors(arguments)
    found = protocols.identify(x, ids, gallery, whose, distractors, sizes=sizes)
    return {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rates[:, 0], strict=True)}


def _megaface(arguments: argparse.Namespace) -> Metrics:
    """MegaFace challenge 1: rank 1, and TPR at FAR 1e-6."""
    from mvrepro import protocols

    x, ids = _rows(arguments, "ids")
    distractors, sizes = _distractors(arguments)
    found = protocols.megaface(x, ids, distractors, sizes=sizes)
    rates = {f"rank1@{size}": float(rate) for size, rate in zip(found.sizes, found.rank1, strict=True)}
    return rates | {f"tpr@far={found.verification.fpr:g}": found.verification.tpr}


def _trillion_pairs(arguments: argparse.Namespace) -> Metrics:
    """A reading of Trillion Pairs: Id at FAR 1e-3, Ver at FAR 1e-9."""
    from mvrepro import protocols

    x, ids = _rows(arguments, "ids")
    found = protocols.trillion_pairs(x, ids, _distractors(arguments)[0])
    return {"id@far=0.001": found.identification.tpr, "ver@far=1e-09": found.verification.tpr}


PROTOCOLS: dict[str, tuple[Callable[[argparse.Namespace], Metrics], tuple[str, ...]]] = {
    "lfw": (_lfw, ("names",)),
    "cfp-ff": (_cfp("FF"), ("names",)),
    "cfp-fp": (_cfp("FP"), ("names",)),
    "bin": (_bin, ("bin",)),
    "blufr": (_blufr, ("names",)),
    "all-pairs": (_all_pairs, ("ids",)),
    "identify": (_identify, ("ids", "gallery", "gallery-ids", "distractors")),
    "megaface": (_megaface, ("ids", "distractors")),
    "trillion-pairs": (_trillion_pairs, ("ids", "distractors")),
}


def _kfold(x: Any, left: Any, right: Any, same: Any, folds: Any) -> Metrics:
    from mvrepro import protocols

    result = protocols.kfold_accuracy(protocols.pair_cosines(x, left, right), same, folds)
    return {"accuracy": result.mean, "standard deviation over folds": result.std}


def _load(path: Path) -> Any:
    from mvrepro.interchange import load_embeddings

    return load_embeddings(path)


def _rows(arguments: argparse.Namespace, option: str) -> tuple[Any, list[str]]:
    x = _load(arguments.embeddings)
    return x, _lines(getattr(arguments, option), len(x), arguments.embeddings)


def _lines(path: Path, rows: int, of: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read as a list: {error}") from None
    empty = next((i for i, line in enumerate(lines, 1) if not line.strip()), None)
    if empty:
        raise UserError(f"{path}, line {empty}: empty; each line belongs to a row of {of}")
    if len(lines) != rows:
        raise UserError(f"{path} has {len(lines)} lines, {of} has {rows} rows: one each is needed, in their order")
    return [line.strip() for line in lines]


def _distractors(arguments: argparse.Namespace) -> tuple[Any, list[int]]:
    x = _load(arguments.distractors)
    return x, arguments.sizes or [len(x)]
