"""`python -m mvrepro published`: networks of others by all protocols of `faces`, in numbers alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from mvrepro import protocols
from mvrepro.__main__ import main
from mvrepro.errors import UserError
from mvrepro.files import LOCAL, RESULTS, check_file, display, write_json
from mvrepro.images import Images, Pairs, photographs
from mvrepro.protocols.folds import CONVENTIONS

NOTE = """Needs MVREPRO_DATA with lfw/ and cfp/ (and celeba/, for the pixels), and pip install "mvrepro[onnx]". Each
network embeds 20,233 photographs, as `python -m mvrepro embed` does: 2 to 4 minutes on a free core. A call that was
stopped goes on where it was. The numbers are what notebook 12 shows; the embeddings are of people, and stay where git
ignores them."""
FPRS = (1e-3, 1e-4, 1e-5)
ROC = tuple(float(f"{x:.2e}") for x in np.logspace(-6, -1, 16))  # three points a decade, as the runs have them
DISTRACTORS = (10, 30, 100, 300, 1000, 3000)  # as the runs, then all
PIXELS, SIDE = "pixels", 32  # the floor: no network
EDGES = tuple(float(edge) for edge in np.arange(30, 95, 5) / 100)  # cosines from which two people are taken for one
DIGITS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, NOTE
    parser.add_argument("networks", type=Path, nargs="*", help=".onnx files (default: those in MVREPRO_DATA/networks)")
    text = "where embed puts the embeddings (default: .mvrepro/published)"
    parser.add_argument("--embeddings", type=Path, default=LOCAL / "published", metavar="FOLDER", help=text)
    text = f"judge the pixels themselves, too, {SIDE}×{SIDE} less the mean of CelebA: the floor"
    parser.add_argument("--pixels", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as many as there are cores)")
    out = RESULTS / "values" / "published" / "networks.json"
    parser.add_argument("--out", type=Path, default=out, help=f"(JSON; default: {display(out)})")


def run(arguments: argparse.Namespace) -> int:
    networks = {path.stem: path for path in arguments.networks or _there()}
    if len(networks) < len(arguments.networks) or PIXELS in networks:
        raise UserError(f"networks go by the names of their files: each needs another one, and not {PIXELS!r}")
    if missing := [path for path in networks.values() if not path.is_file()]:
        raise UserError(f"{missing[0]}: no such file")
    out = arguments.out.absolute()
    check_file(out, networks.values())
    tests = Tests(photographs.files("lfw"), photographs.files("cfp"))
    from mvrepro import interchange  # which needs torch

    values: dict[str, Any] = {}
    for name, path in networks.items():
        sets = []
        for images in ("lfw", "cfp"):
            folder = arguments.embeddings / name / images
            options = ["--threads", str(arguments.threads), "--batch", "4"]  # few, which stay in a core's cache
            if code := main(["embed", str(path), images, str(folder), *options]):
                return code  # it has said why
            sets.append(interchange.load_embeddings(folder / "embeddings.npy"))
        values[name] = tests.judge(name, *sets)
    if arguments.pixels:
        values[PIXELS] = tests.judge(PIXELS, *_pixels(), long=False)
    write_json(out, {"kind": "measured", "values": values})
    for name, found in values.items():
        rates = found["metrics"].items()
        print(f"{name}: " + ", ".join(f"{metric} {100 * rate:.2f}" for metric, rate in rates) + " (%)")
    print(f"wrote {display(out)}")
    return 0


def _there() -> list[Path]:
    """The networks beside the photographs."""
    root = photographs.folder("lfw").parent / "networks"
    if found := sorted(root.glob("*.onnx")):
        return found
    raise UserError(f"{root} holds no .onnx file: name networks, or put some there")


def _pixels() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """LFW and CFP as `describe` compares them without any network."""
    mean = photographs.celeba(SIDE).pixels.mean(axis=0, dtype=np.float64)
    lfw, cfp = (
        (images.pixels - mean).reshape(len(images), -1).astype(np.float32)
        for images in (photographs.lfw(SIDE), photographs.cfp(SIDE))
    )
    return lfw, cfp


Judged = tuple[dict[str, float], dict[str, float], dict[str, Any]]


class Tests:
    """LFW's and CFP's lists, read once, before anything is embedded."""

    def __init__(self, lfw: Images, cfp: Images) -> None:
        names, cfp_names, lists = lfw.names, cfp.names, photographs.folder("lfw")
        assert names is not None and cfp_names is not None
        self.people, self.cfp_people = (np.array(images.classes)[images.labels] for images in (lfw, cfp))
        self.lists: dict[str, tuple[Pairs, int]] = {  # and of which of the two sets
            "lfw": (photographs.lfw_pairs(lists / "pairs.txt", names), 0),
            "hard": (photographs.lfw_pairs(lists / "hard_pairs.txt", names), 0),
            "cfp_ff": (photographs.cfp_pairs("FF", cfp_names), 1),
            "cfp_fp": (photographs.cfp_pairs("FP", cfp_names), 1),
        }
        self.trials = protocols.blufr_trials(names.tolist(), lists / "blufr")

    def judge(self, name: str, lfw: ArrayLike, cfp: ArrayLike, *, long: bool = True) -> dict[str, Any]:
        """What these embeddings (N, D) and (M, D) reach: metrics, as the runs' records call them; errors, the standard
        error of each; and what is behind them, for figures.

        An accuracy's error is over its folds, rank1's of its probes, a TPR's of people drawn anew, with its threshold
        held fixed. BLUFR's is the standard deviation over its trials, which share people: no standard error.
        long: BLUFR, too, and who of CFP is in LFW; in thousands of dimensions they take minutes.
        """
        parts = [self._folds, self._pairs, self._rank1, *([self._blufr, self._overlap] if long else [])]
        found: dict[str, Any] = {"dimensions": np.shape(lfw)[1], "metrics": {}, "errors": {}}
        for part in tqdm(parts, f"judging {name}", unit="protocol", leave=False, disable=None):
            metrics, errors, evidence = part((np.asarray(lfw), np.asarray(cfp)))
            found["metrics"] |= _round(metrics)
            found["errors"] |= _round(errors)
            found |= evidence
        return found

    def _folds(self, sets: Sequence[NDArray[Any]]) -> Judged:
        metrics, errors, evidence = {}, {}, {}
        for name, (pairs, which) in self.lists.items():
            scores = protocols.pair_cosines(sets[which], pairs.left, pairs.right)
            by = {rule: protocols.kfold_accuracy(scores, pairs.same, pairs.folds, rule) for rule in CONVENTIONS}
            key, exact = f"{name}_accuracy", by["exact"]
            metrics[key], errors[key] = exact.mean, exact.standard_error
            evidence[name] = {"pairs": len(pairs), "accuracies": _rounded(exact.accuracies)}
            evidence[name] |= {rule: round(found.mean, DIGITS) for rule, found in by.items()}
        return metrics, errors, {"folds": evidence}

    def _pairs(self, sets: Sequence[NDArray[Any]]) -> Judged:
        found = protocols.every_pair(sets[0], self.people, (*FPRS, *ROC))
        _, place = np.unique(found.genuine_ids, return_inverse=True)
        owned, metrics, errors = np.bincount(place), {}, {}
        for point in found.points[: len(FPRS)]:
            key = f"tpr@fpr={point.fpr:g}"
            accepted = np.bincount(place, found.genuine.astype(np.float64) >= point.threshold, minlength=len(owned))
            metrics[key], errors[key] = point.tpr, error_over_people(accepted, owned)
        curve = {"fpr": list(ROC), "tpr": _rounded([p.tpr for p in found.points[len(FPRS) :]])}
        return metrics, errors, {"roc": curve}

    def _blufr(self, sets: Sequence[NDArray[Any]]) -> Judged:
        found = protocols.blufr(sets[0], self.trials)
        rates = {"vr": found.vr, "dir": found.dir, "strict dir": found.strict_dir}
        metrics = {"blufr_vr@far=0.001": found.summary("vr"), "blufr_dir@far=0.01": found.summary("dir")}
        metrics["blufr_strict_dir@far=0.01"] = found.summary("strict_dir")
        errors = {key: float(each.std(ddof=1)) for key, each in zip(metrics, rates.values(), strict=True)}
        return metrics, errors, {"blufr": {name: _rounded(each) for name, each in rates.items()}}

    def _rank1(self, sets: Sequence[NDArray[Any]]) -> Judged:
        """The second image of a person against the first, among people with one image: strangers drawn once."""
        lfw = sets[0]
        first, counts = np.unique(self.people, return_index=True, return_counts=True)[1:]
        gallery, alone = first[counts >= 2], first[counts == 1]
        probes = gallery + 1  # a person's images stand together
        pool = lfw[alone[np.random.default_rng(0).permutation(len(alone))]]
        steps = (*(n for n in DISTRACTORS if n < len(pool)), len(pool))
        found = protocols.identify(
            lfw[probes], self.people[probes], lfw[gallery], self.people[gallery], pool, sizes=steps
        )
        rates = found.rates[:, 0]
        errors = np.sqrt(rates * (1 - rates) / len(probes))
        kept = {"probes": len(probes), "distractors": list(steps), "rates": _rounded(rates), "errors": _rounded(errors)}
        return {"rank1": float(rates[-1])}, {"rank1": float(errors[-1])}, {"rank1": kept}

    def _overlap(self, sets: Sequence[NDArray[Any]]) -> Judged:
        """The cosine of each of CFP's people with the person of LFW who is most alike, in 1/10,000, sorted, without
        names: of those with a person of LFW's name whom they are most alike, of the others with such a name, and of
        those without; and the share of LFW's own people that look like another one of them, by cosine."""
        lfw, cfp = sets
        people, whom, cosines = protocols.nearest_people(cfp, self.cfp_people, lfw, self.people)
        chance = protocols.nearest_people(lfw, self.people, lfw, self.people)[2][:, 1]  # the first is the same person
        shared = np.isin(people, sorted(photographs.overlapping(people, self.people)))
        called = [[photographs.same_name(person) for person in column.tolist()] for column in (people, whom[:, 0])]
        right = shared & (np.array(called[0]) == np.array(called[1]))
        groups = {"namesake": right, "another": shared & ~right, "no namesake": ~shared}
        in_order = {name: np.rint(1e4 * np.sort(cosines[rows, 0])).astype(int) for name, rows in groups.items()}
        found: dict[str, Any] = {name: " ".join(map(str, each)) for name, each in in_order.items()}
        found["chance"] = {f"{edge:g}": round(float(np.mean(chance >= edge)), DIGITS) for edge in EDGES}
        return {}, {}, {"cfp people in lfw": found}


def error_over_people(accepted: NDArray[Any], owned: NDArray[Any]) -> float:
    """The standard error of sum(accepted) / sum(owned) where people are drawn anew, each with all of the person's
    pairs (P,): of a ratio, to first order."""
    rate, people = accepted.sum() / owned.sum(), len(owned)
    spread = ((accepted - rate * owned) ** 2).sum() * people / max(people - 1, 1)
    return float(np.sqrt(spread) / owned.sum())


def _round(values: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), DIGITS) for name, value in values.items()}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
