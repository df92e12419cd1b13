"""`python -m mvrepro describe`: the data of the faces profile in numbers, for reports that have no photographs."""

import argparse
from pathlib import Path
from typing import Any

from mvrepro.files import RESULTS, display, write_json

SIZE = 32  # of the decoded pixels; only the scores of the pixels themselves depend on it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "needs MVREPRO_DATA; takes about 10 s the first time, and prints what it counted"
    parser.add_argument("--out", type=Path, default=RESULTS / "values" / "faces" / "data.json", help="(JSON)")


def run(arguments: argparse.Namespace) -> int:
    values = describe()
    out = arguments.out.absolute()
    write_json(out, {"kind": "exact", "values": values})
    for name, counts in values["sets"].items():
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    print(f"wrote {display(out)}")
    return 0


def describe() -> dict[str, Any]:
    """Counts of each set, how they overlap, whose images the pairs of each list are (people by number), and
    the accuracy on them without any network: the cosine of the pixels, less the mean of CelebA's."""
    import numpy as np

    from mvrepro import protocols
    from mvrepro.images import photographs

    lfw, cfp, celeba = photographs.lfw(SIZE), photographs.cfp(SIZE), photographs.celeba(SIZE)
    sets = {}
    for name, chosen in (("LFW", lfw), ("CFP", cfp), ("CelebA", celeba)):
        counts = np.unique(chosen.people, return_counts=True)[1]
        sets[name] = {"images": len(chosen), "people": len(counts)}
        sets[name] |= {f"people with {n} images at least": int((counts >= n).sum()) for n in (2, 3, 10)}
    view1 = photographs.lfw_pairs(photographs.folder("lfw") / "pairsDevTest.txt", lfw.names)
    view2 = photographs.lfw_pairs(photographs.folder("lfw") / "pairs.txt", lfw.names)
    lists = {"lfw": (view2, lfw)} | {
        f"cfp_{k.lower()}": (photographs.cfp_pairs(k, cfp.names), cfp) for k in ("FF", "FP")
    }
    mean = celeba.pixels.mean(axis=0, dtype=np.float64)
    pixels = {}
    for name, (pairs, chosen) in lists.items():
        flat = (chosen.pixels - mean).reshape(len(chosen), -1)
        scores = protocols.pair_cosines(flat, pairs.left, pairs.right)
        pixels[f"{name}_accuracy"] = round(protocols.kfold_accuracy(scores, pairs.same, pairs.folds).mean, 6)
    in_view = [{*lfw.people[v.left], *lfw.people[v.right]} for v in (view1, view2)]
    shared = photographs.overlapping(np.unique(cfp.people), np.unique(lfw.people))
    return {
        "sets": sets,
        "people of CFP who are in LFW by name": len(shared),
        "people in the pairs of View 1's test": len(in_view[0]),
        "of them in the pairs of View 2": len(in_view[0] & in_view[1]),
        "images of LFW, person by person": " ".join(map(str, np.unique(lfw.people, return_counts=True)[1])),
        "pixels alone": pixels,
        "pairs": {name: _people(pairs, chosen.people) for name, (pairs, chosen) in lists.items()},
    }


def _people(pairs: Any, people: Any) -> dict[str, str]:
    import numpy as np

    number = np.unique(people, return_inverse=True)[1]
    return {side: " ".join(map(str, number[getattr(pairs, side)])) for side in ("left", "right")}
