"""What a run trains on and how its embeddings are judged: one task a value of TrainConfig.data.

A task knows data and protocols, never a model: `judge` gets arrays. Its function takes those settings of
TrainConfig, by name, that it depends on. Lists are read before anything is trained, so that a damaged one
costs no run.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvrepro import protocols
from mvrepro.errors import UserError
from mvrepro.images import Images, Pairs, Pixels, open_images, photographs, read_bin, small
from mvrepro.protocols.scores import unit
from mvrepro.protocols.verification import BINS
from mvrepro.training.config import TrainConfig
from mvrepro.training.people import select

Judged = tuple[dict[str, float], dict[str, Any]]

# Where the ROC of a face test is recorded: three points a decade.
ROC = tuple(float(f"{x:.2e}") for x in np.logspace(-6, -1, 16))
# People of both LFW and CFP whom a network found when the runs of "few" were committed already: those leave them in.
FOUND_LATER = {"beyonce knowles", "catherine zeta-jones", "joseph biden", "kevin costner", "recep tayyip erdogan",
               "robin wright penn"}  # fmt: skip
DISTRACTORS = (10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True)
class Task:
    """train, test     the images of the loop and those to embed
    judge           (embeddings (N, D) of test, class weights (K, D) or None) -> (metrics, evidence): shares in
                    [0, 1] by name, larger is better, and what reports need beside them (curves, counts a
                    person), as JSON
    impostor_pairs  how many the FPRs of the metrics are measured with; None: the task has no FPR (folds have none)
    sizes           what else is worth recording about the data, by name
    features        whether judge gets the class weights, and the embeddings are kept beside the record (toys)
    """

    train: Images
    test: Images
    judge: Callable[[NDArray[np.float32], Any], Judged]
    impostor_pairs: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    features: bool = False


def orl(seed: int, image_size: int, train_people: int, fprs: tuple[float, ...]) -> Task:
    """ORL faces: people-disjoint; TPR at each FPR over all pairs of the people that training never saw."""
    train, test = small.split_people(small.orl(image_size), train_people, seed)

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        return _tprs(protocols.all_pairs(embeddings, test.labels, fprs)), {}

    return Task(train, test, judge, protocols.impostor_pairs(test.labels))


def digits(seed: int) -> Task:
    """Digits, for the toy geometry: the accuracy of the nearest class weight on images held out."""
    train, test = small.split_images(small.digits(), 0.25, seed)

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        nearest = (embeddings @ unit(weights).T).argmax(1)  # whatever an embedding's length, 0 too
        return {"accuracy": float(np.mean(nearest == test.labels))}, {}

    return Task(train, test, judge, features=True)


def lfw(seed: int, image_size: int, fprs: tuple[float, ...], remove: str, people: str) -> Task:
    """Trains on people who are not in LFW; tests on LFW: View 2, all pairs, BLUFR, identification against
    distractors. `dev_…` is measured on people with two images, whom neither training nor a test uses: settings
    are chosen by it. people: "all" of people.select, or "few", CelebA (people with 3 images at least) and CFP."""
    test = photographs.lfw(image_size)
    if people == "all":
        train, dev, sizes = select("lfw", image_size, remove, seed)
    else:
        train, dev, sizes = _beside(test, photographs.cfp(image_size), image_size, remove, seed)
    # the committed runs of "few" were judged by BLUFR's stricter rule, before its authors' was known
    return on_lfw(test, train, dev, sizes, fprs, photographs.folder("lfw"), strict=people == "few")


def on_lfw(
    test: Pixels,
    train: Pixels,
    dev: Pixels,
    sizes: dict[str, int],
    fprs: tuple[float, ...],
    lists: Path,
    *,
    strict: bool = False,
) -> Task:
    """The task `lfw` with these images; lists: the folder of pairs.txt, blufr/ and, where it has one, the home-made
    hard_pairs.txt; strict: see protocols.Blufr."""
    assert test.names is not None
    pairs = photographs.lfw_pairs(lists / "pairs.txt", test.names)
    more_pairs = lists / "hard_pairs.txt"
    hard = photographs.lfw_pairs(more_pairs, test.names) if more_pairs.is_file() else None
    trials = protocols.blufr_trials(test.names.tolist(), lists / "blufr")

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        ours, theirs = embeddings[: len(test)], embeddings[len(test) :]
        evidence: dict[str, Any] = {}
        metrics, evidence["lfw"] = _kfold("lfw", ours, pairs)
        more, evidence["all_pairs"] = _every_pair(ours, test, fprs)
        metrics |= more
        blufr = protocols.blufr(ours, trials)
        rule = "strict_dir" if strict else "dir"
        evidence["blufr"] = {"vr": _round(blufr.vr), "dir": _round(getattr(blufr, rule))}
        metrics |= {"blufr_vr@far=0.001": blufr.summary("vr"), "blufr_dir@far=0.01": blufr.summary(rule)}
        if hard:
            more, evidence["hard"] = _kfold("hard", ours, hard)
            metrics |= more
        more, evidence["rank1"] = _distractors(ours, test, theirs)
        return metrics | more | _dev(theirs, dev), evidence

    return Task(train, test.joined(dev), judge, protocols.impostor_pairs(test.people), sizes)


def development(seed: int, image_size: int, remove: str) -> Task:
    """Trains as `lfw` with everyone does, and tests on its development people alone: what settings are chosen by."""
    train, dev, sizes = select("lfw", image_size, remove, seed)

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        return _dev(embeddings, dev), {}

    return Task(train, dev, judge, protocols.impostor_pairs(dev.people), sizes)


def cfp(seed: int, image_size: int, fprs: tuple[float, ...], remove: str, people: str) -> Task:
    """Trains on people who are not in CFP, as `lfw` does, with LFW's; tests on CFP-FF and CFP-FP."""
    test = photographs.cfp(image_size)
    assert test.names is not None
    if people == "all":
        train, dev, sizes = select("cfp", image_size, remove, seed)
    else:
        other = photographs.lfw(image_size)
        train, dev, sizes = _beside(test, other.only(other.sizes() >= 3), image_size, remove, seed)
    pairs = {kind: photographs.cfp_pairs(kind, test.names) for kind in ("FF", "FP")}

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        ours, theirs = embeddings[: len(test)], embeddings[len(test) :]
        metrics: dict[str, float] = {}
        evidence: dict[str, Any] = {}
        for kind, chosen in pairs.items():
            more, evidence[f"cfp_{kind.lower()}"] = _kfold(f"cfp_{kind.lower()}", ours, chosen)
            metrics |= more
        more, evidence["all_pairs"] = _every_pair(ours, test, fprs)
        return metrics | more | _dev(theirs, dev), evidence

    return Task(train, test.joined(dev), judge, protocols.impostor_pairs(test.people), sizes)


class Synthetic:
    """K classes of ten images (3, size, size) of noise that follows from their number. Nothing is stored."""

    classes = names = None

    def __init__(self, classes: int, size: int) -> None:
        self.size, self.labels = size, np.arange(10 * classes, dtype=np.int64) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        noise = [np.random.Generator(np.random.PCG64(int(i))).bytes(3 * self.size**2) for i in rows]
        return np.frombuffer(bytearray(b"".join(noise)), np.uint8).reshape(len(rows), 3, self.size, self.size)


def synthetic(synthetic_classes: int, image_size: int, verify: tuple[str, ...]) -> Task:
    """Random images, to measure with."""
    return _verified(Synthetic(synthetic_classes, image_size), verify, image_size)


def at_path(data: str, image_size: int, renumber: bool, bad_limit: int, verify: tuple[str, ...]) -> Task:
    """Trains on a set of one's own, in any of the formats of mvrepro.images; tests on InsightFace's pair sets."""
    train = open_images(data, renumber=renumber, size=image_size, bad_limit=bad_limit)
    return _verified(train, verify, image_size)


class _Joined:
    """Sets of images one after the other."""

    classes = names = None

    def __init__(self, sets: list[Images], size: int) -> None:
        self.sets, self.starts = sets, np.cumsum([0, *map(len, sets)])
        self.none = np.empty((0, 3, size, size), np.uint8)
        self.labels = np.zeros(int(self.starts[-1]), np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        which = np.searchsorted(self.starts, rows, "right") - 1
        parts = [self.sets[i].read(rows[which == i] - self.starts[i]) for i in np.unique(which)]
        return np.concatenate([self.none, *parts])


def _verified(train: Images, verify: tuple[str, ...], size: int) -> Task:
    """Tested on pair sets, by their files' names: accuracy over ten folds, and its standard deviation."""
    sets: dict[str, tuple[Images, Pairs]] = {}
    for path in map(Path, verify):
        if path.stem in sets:
            raise UserError(f"--verify: two sets are called {path.stem}")
        sets[path.stem] = read_bin(path, size=size)
        pairs = sets[path.stem][1]
        try:
            protocols.kfold_accuracy(np.arange(float(len(pairs))), pairs.same, pairs.folds)
        except ValueError as error:
            raise UserError(f"{path}: ten folds can't be made of its {len(pairs)} pairs: {error}") from None

    def judge(embeddings: NDArray[np.float32], weights: Any) -> Judged:
        metrics: dict[str, float] = {}
        start = 0
        for name, (images, pairs) in sets.items():
            own = embeddings[start : start + len(images)]
            scores = protocols.pair_cosines(own, pairs.left, pairs.right)
            found = protocols.kfold_accuracy(scores, pairs.same, pairs.folds)
            metrics |= {name: found.mean, f"{name} std": found.std}
            start += len(images)
        return metrics, {}

    return Task(train, _Joined([images for images, _ in sets.values()], size), judge)


TASKS: dict[str, Callable[..., Task]] = {
    "orl": orl, "digits": digits, "lfw": lfw, "cfp": cfp, "development": development, "synthetic": synthetic,
}  # fmt: skip


def settings_of(data: str) -> Iterable[str]:
    """The settings, by name, that the task of a value of TrainConfig.data depends on."""
    return inspect.signature(TASKS.get(data, at_path)).parameters


def load(config: TrainConfig) -> Task:
    """The task of a config, from those of its settings that it depends on. Raises UserError with the known names, and
    where a test has too few impostor pairs for an FPR."""
    if config.data not in TASKS and not Path(config.data).exists():
        known = ", ".join(TASKS)
        raise UserError(f"unknown data {config.data!r}; known are: {known}; and there is no such file or folder")
    build = TASKS.get(config.data, at_path)
    task = build(**{setting: getattr(config, setting) for setting in settings_of(config.data)})
    if task.impostor_pairs is not None:
        try:
            protocols.check_fprs(task.impostor_pairs, config.fprs)
        except ValueError as error:
            raise UserError(
                f"fprs of data {config.data!r}: {error}; test with more people, or set larger fprs in params.yaml, "
                f"{config.profile}.train"
            ) from None
    return task


def _beside(
    test: Pixels, other: Pixels, image_size: int, remove: str, seed: int
) -> tuple[Pixels, Pixels, dict[str, int]]:
    """(train, dev, sizes): CelebA and the people of `other` who are not tested; CelebA people with two images."""
    clean, sizes = _remove(other, test, remove, seed)
    celeba = photographs.celeba(image_size)
    return celeba.only(celeba.sizes() >= 3).joined(clean), celeba.only(celeba.sizes() == 2), sizes


def _remove(other: Pixels, test: Pixels, remove: str, seed: int) -> tuple[Pixels, dict[str, int]]:
    """`other` without the people of the test set ("overlap"), or, to see what that matters, without as many
    others instead, whom the seed draws ("others")."""
    people = np.unique(other.people)
    known = photographs.overlapping(people, np.unique(test.people))
    known = {person for person in known if photographs.same_name(person) not in FOUND_LATER}
    gone = np.array(sorted(known))
    if remove == "others":
        gone = np.random.default_rng(seed).choice(np.array(sorted(set(people) - known)), len(known), replace=False)
    keep = ~np.isin(other.people, gone)
    sizes = {"removed_people": len(gone), "removed_images": int((~keep).sum())}
    return other.only(keep), sizes | {"people_also_tested": len(known) if remove == "others" else 0}


def _kfold(name: str, embeddings: NDArray[np.float32], pairs: Pairs) -> Judged:
    scores = protocols.pair_cosines(embeddings, pairs.left, pairs.right)
    result = protocols.kfold_accuracy(scores, pairs.same, pairs.folds)
    evidence = {
        "accuracies": _round(result.accuracies),
        "thresholds": _round(result.thresholds),
        # A bit a pair, in the order of the list: reports pair the losses by them, and draw people anew.
        "correct": np.packbits(result.correct).tobytes().hex(),
        "histogram": {
            side: words(np.histogram(scores[chosen], BINS, (-1, 1))[0])
            for side, chosen in (("impostor", ~pairs.same), ("genuine", pairs.same))
        },
    }
    return {f"{name}_accuracy": result.mean}, evidence


def _every_pair(embeddings: NDArray[np.float32], test: Pixels, fprs: tuple[float, ...]) -> Judged:
    """TPR at FPRs over every pair; beside it the ROC, histograms, and accepted genuine pairs a person at
    the first FPR, people in the order of their names."""
    result = protocols.every_pair(embeddings, test.people, (*fprs, *ROC))
    points = result.points[: len(fprs)]
    accepted = result.genuine.astype(np.float64) >= points[0].threshold  # as float32 the threshold would be a tie
    people, place = np.unique(result.genuine_ids, return_inverse=True)
    counts = np.bincount(place, accepted, minlength=len(people)).astype(int)
    share = counts / np.bincount(place)
    metrics = _tprs(points) | {f"tpr_by_person@fpr={fprs[0]:g}": float(share.mean())}
    evidence = {
        "fpr": list(ROC),
        "tpr": _round([p.tpr for p in result.points[len(fprs) :]]),
        "histogram": {side: words(bins) for side, bins in zip(("impostor", "genuine"), result.histogram, strict=True)},
        "genuine_pairs": words(np.bincount(place)),
        "accepted": words(counts),
    }
    return metrics, evidence


def _distractors(embeddings: NDArray[np.float32], test: Pixels, more: NDArray[np.float32]) -> Judged:
    """Rank-1 of the second image of each person against the first, among growing numbers of real distractors: the
    people with one image, and more. Beside it, among all of them, that of every image against each other one of the
    person, where each person counts once."""
    sizes = test.sizes()
    first = np.unique(test.people, return_index=True)[1]
    several = sizes[first] >= 2
    gallery = first[several]
    probes = gallery + 1  # sorted by name: a person's images stand together
    pool = np.concatenate([embeddings[sizes == 1], more])
    pool = pool[np.random.default_rng(0).permutation(len(pool))]
    steps = (*(n for n in DISTRACTORS if n < len(pool)), len(pool))
    result = protocols.identify(
        embeddings[probes], test.people[probes], embeddings[gallery], test.people[gallery], pool, sizes=steps
    )
    _, pairs, found = protocols.rank1_by_person(embeddings[sizes > 1], test.people[sizes > 1], pool)
    rates = _round(result.rates[:, 0])
    evidence = {
        "probes": len(probes),
        "distractors": list(steps),
        "rates": rates,
        "correct": np.packbits(result.found).tobytes().hex(),  # a bit a person, by name
        "pairs": words(pairs),  # a number a person, by name
        "found": words(found),
    }
    return {"rank1": rates[-1], "rank1_by_person": float(np.mean(found / pairs))}, evidence


def _dev(embeddings: NDArray[np.float32], dev: Pixels) -> dict[str, float]:
    """The same measures on people of whom there are two images: TPR over all pairs, and rank-1 of the second among the
    first ones of all."""
    points = protocols.all_pairs(embeddings, dev.people, (0.001,))
    first = np.unique(dev.people, return_index=True)[1]
    order = np.argsort(dev.people, kind="stable")
    people = dev.people[first]
    found = protocols.identify(
        embeddings[order[1::2]], people, embeddings[first], people, np.empty((0, embeddings.shape[1]), np.float32),
        sizes=[0], among="gallery",
    )  # fmt: skip
    return {f"dev_{name}": value for name, value in _tprs(points).items()} | {"dev_rank1": float(found.rates[0, 0])}


def _tprs(points: list[protocols.Operating]) -> dict[str, float]:
    return {f"tpr@fpr={p.fpr:g}": p.tpr for p in points}


def words(counts: Any) -> str:
    """Numbers on one line: as a list, JSON would give each a line of its own."""
    return " ".join(map(str, counts))


def _round(values: Any) -> list[float]:
    return [round(float(v), 6) for v in values]
