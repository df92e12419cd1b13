"""`python -m mvrepro describe`: the data of the faces profile in numbers, for reports that have no photographs."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mvrepro import protocols
from mvrepro.files import RESULTS, check_file, display, write_json
from mvrepro.images import Pairs, Pixels, photographs

SIZE = 32  # of the decoded pixels; only the scores of the pixels themselves depend on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "needs MVREPRO_DATA; takes about 10 s the first time, and prints what it counted"
    parser.add_argument("--out", type=Path, default=RESULTS / "values" / "faces" / "data.json", help="(JSON)")


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out.absolute()
    check_file(out)
    values = describe()
    write_json(out, {"kind": "exact", "values": values})
    for name, counts in values["sets"].items():
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print(f"wrote {display(out)}")
    return 0


def describe() -> dict[str, Any]:
    """Counts of each set, how they overlap, whose images the pairs of each list are (people by number), and
    the accuracy on them without any network: the cosine of the pixels, less the mean of CelebA's."""
    lfw, cfp, celeba = photographs.lfw(SIZE), photographs.cfp(SIZE), photographs.celeba(SIZE)
    assert lfw.names is not None and cfp.names is not None
    sets = {}
    for name, chosen in (("LFW", lfw), ("CFP", cfp), ("CelebA", celeba)):
        counts = np.bincount(chosen.labels)
        sets[name] = {"images": len(chosen), "people": len(counts)}
        sets[name] |= {f"people with {n} images at least": int((counts >= n).sum()) for n in (2, 3, 10)}
    view1, view2 = (
        photographs.lfw_pairs(photographs.folder("lfw") / file, lfw.names) for file in ("pairsDevTest.txt", "pairs.txt")
    )
    lists: dict[str, tuple[Pairs, Pixels]] = {"lfw": (view2, lfw)}
    lists |= {f"cfp_{kind.lower()}": (photographs.cfp_pairs(kind, cfp.names), cfp) for kind in ("FF", "FP")}
    mean = celeba.pixels.mean(axis=0, dtype=np.float64)
    accuracies = {}
    for name, (pairs, chosen) in lists.items():
        flat = (chosen.pixels - mean).reshape(len(chosen), -1)
        scores = protocols.pair_cosines(flat, pairs.left, pairs.right)
        accuracies[f"{name}_accuracy"] = round(protocols.kfold_accuracy(scores, pairs.same, pairs.folds).mean, 6)
    in_view = [set(lfw.labels[[*v.left, *v.right]].tolist()) for v in (view1, view2)]
    return {
        "sets": sets,
        "people of CFP who are in LFW by name": len(photographs.overlapping(set(cfp.people), set(lfw.people))),
        "people in the pairs of View 1's test": len(in_view[0]),
        "of them in the pairs of View 2": len(in_view[0] & in_view[1]),
        "images of LFW, person by person": _words(np.bincount(lfw.labels)),
        "pixels alone": accuracies,
        "pairs": {
            name: {side: _words(chosen.labels[getattr(pairs, side)]) for side in ("left", "right")}
            for name, (pairs, chosen) in lists.items()
        },
    }


def _words(numbers: Any) -> str:
    return " ".join(map(str, numbers))
