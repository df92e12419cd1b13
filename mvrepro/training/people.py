"""Who is trained on: everyone in no test, out of all sets of photographs, and what each removal takes away."""

import numpy as np
from numpy.typing import NDArray

from mvrepro.images import Pixels, archives, photographs

MOST = 60  # images a person: some have hundreds, and would be most of the training
LEAST = 3


def select(tested: str, size: int, remove: str = "overlap", seed: int = 0) -> tuple[Pixels, Pixels, dict[str, int]]:
    """(train, dev, sizes) for the test set "lfw" or "cfp"; the other of the two is trained on. Who is in several sets
    by name is one person.

    remove, seed: "others" leaves the people of the test set in, to see what that matters, and takes out as many others
    instead, whom the seed draws

    train  people with LEAST images or more, of whom MOST at most are taken, without those whom the test set has by
           name or to a published network (overlap.tsv)
    dev    people with exactly two images who are in neither test set: nothing trains on them, settings are chosen by
           them
    sizes  of each set: its people and images in `train`, and how many people were removed
    """
    names = ("celeba", "cfp" if tested == "lfw" else "lfw", *archives.ARCHIVES)
    sets: dict[str, Pixels] = {name: archives.archive(name, size) if name in archives.ARCHIVES
                               else getattr(photographs, name)(size) for name in names}  # fmt: skip
    of_test, of_any = (
        np.concatenate([np.isin(images.people, sorted(_known(name, *tests))) for name, images in sets.items()])
        for tests in ((tested,), ("lfw", "cfp"))
    )
    origin = np.repeat(names, [len(images) for images in sets.values()])
    every = Pixels.of_people(
        np.concatenate([images.pixels for images in sets.values()]),
        np.concatenate([_one_name(name, images.people) for name, images in sets.items()]),
    )
    named = np.isin(every.people, [photographs.same_name(person) for person in _tested(tested)])
    gone = np.isin(every.labels, every.labels[of_test | named])  # in all sets that have the person
    images = np.bincount(every.labels)
    also_tested = 0
    if remove == "others":
        usable = images[every.labels] >= LEAST
        known, strangers = np.unique(every.labels[gone & usable]), np.unique(every.labels[~gone & usable])
        drawn = np.random.default_rng(seed).choice(strangers, len(known), replace=False)
        gone, also_tested = np.isin(every.labels, drawn), len(known)
    counts = np.where(gone, 0, images[every.labels])
    train = ~gone & (counts >= LEAST)
    train[train] = _position(every.labels[train]) < MOST
    in_tests = np.isin(every.labels, every.labels[of_any | np.isin(origin, ("lfw", "cfp"))])
    sizes: dict[str, int] = {}
    for name in names:
        for what, rows in (("people", train), ("removed_people", gone)):
            sizes[f"{name}_{what}"] = len(np.unique(every.labels[rows & (origin == name)]))
        sizes[f"{name}_images"] = int((train & (origin == name)).sum())
    return every.only(train), every.only((counts == 2) & ~in_tests), sizes | {"people_also_tested": also_tested}


def _known(name: str, *tested: str) -> set[str]:
    """The people of a set who are also in one of these test sets, as the set's reader calls them."""
    if name == "lfw":  # in CFP, of which overlap.tsv says the CFP side alone
        return photographs.overlapping(_tested("lfw"), _tested("cfp"))
    people = archives.overlap(*tested).get(name, set())
    if name == "celeba":
        return {f"celeba-{int(person):05d}" for person in people}
    if name == "cfp":
        names = photographs.cfp_names()
        return {names[int(person) - 1] for person in people}
    return {f"{name}:{person}" for person in people}


def _tested(name: str) -> list[str]:
    """The people of a test set by their names."""
    if name == "cfp":
        return photographs.cfp_names()
    return sorted(path.name for path in (photographs.folder("lfw") / "images").iterdir())


def _one_name(name: str, people: NDArray[np.str_]) -> NDArray[np.str_]:
    """(N,): what the people are called in all sets: by their names where a set has them, else by its numbers."""
    if name in ("pins", "bolly", "cfp", "lfw"):
        return np.array([photographs.same_name(person.removeprefix(f"{name}:")) for person in people.tolist()])
    twice = archives.duplicates() if name == "fiw" else {}
    return np.array([twice.get(person, person) for person in people.tolist()])


def _position(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,): which of its person's images each is, from 0."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    position = np.empty(len(labels), np.int64)
    position[order] = np.arange(len(labels)) - starts
    return position
