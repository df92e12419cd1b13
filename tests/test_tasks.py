"""What runs train on and are judged by: who is in training and test, and what `judge` makes of embeddings.

Pixels carry their own number as pixels here, so that it can be told whose the images of a task are.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvrepro import protocols
from mvrepro.errors import UserError
from mvrepro.images import Pixels, photographs
from mvrepro.images import small as small_sets
from mvrepro.images.photographs import same_name
from mvrepro.training import tasks
from mvrepro.training.config import TrainConfig
from mvrepro.training.tasks import Task

REAL = os.environ.get("MVREPRO_DATA")
NO_DATA = "MVREPRO_DATA is not set: the tasks are tested on made-up sets only"
FPRS = (0.01, 0.001)
SETS = ("lfw", "cfp", "celeba")
WEIGHTS = np.zeros((1, 1), np.float32)  # of the classes: the face tasks don't look at them


def load(data: str, **settings: Any) -> Task:
    """The task of a run with these settings."""
    base = {"profile": "quick", "loss": "Softmax", "backbone": "iresnet-tiny", "embedding_dim": 8, "epochs": 1}
    return tasks.load(TrainConfig(**base | {"batch_size": 2, "lr": 0.1, "milestones": (), "data": data} | settings))


@dataclass(frozen=True)
class World:
    """The three sets; folder is what MVREPRO_DATA names, of which only the lists are read."""

    folder: Path
    sets: dict[str, Pixels]

    def owners(self, images: Pixels) -> list[tuple[str, str]]:
        """The set and the person of each image, the person in the form in which names are compared."""
        numbers = images.pixels.reshape(len(images), 3).astype(int) @ [1, 256, 256**2]
        every = [(name, same_name(str(p))) for name in SETS for p in self.sets[name].people]
        return [every[i] for i in numbers]

    def people(self, images: Pixels) -> set[tuple[str, str]]:
        return set(self.owners(images))

    def load(self, name: str, remove: str = "overlap", seed: int = 0, fprs: tuple[float, ...] = FPRS) -> Task:
        with pytest.MonkeyPatch.context() as patch:
            for key, found in self.sets.items():
                patch.setattr(photographs, key, lambda size, found=found: found)
            return load(name, seed=seed, image_size=1, fprs=fprs, remove=remove)

    def overlap(self, name: str) -> set[str]:
        """The people of the other set, as training would have them, who are in the test set `name` by name."""
        other = self.sets["cfp" if name == "lfw" else "lfw"]
        least = 1 if name == "lfw" else 3
        ours = {same_name(str(p)) for p in other.people[other.sizes() >= least]}
        return ours & {same_name(str(p)) for p in self.sets[name].people} - tasks.FOUND_LATER


def numbered(sets: dict[str, Pixels]) -> dict[str, Pixels]:
    """With the number of each image, over all sets, as its three values."""
    result, first = {}, 0
    for name in SETS:
        numbers = np.arange(first, first + len(sets[name]))
        pixels = np.stack([numbers % 256, numbers // 256 % 256, numbers // 256**2], axis=1).astype(np.uint8)
        result[name] = Pixels.of_people(pixels[:, :, None, None], sets[name].people, sets[name].names)
        first += len(numbers)
    return result


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def some_faces(people: dict[str, int], names: Any) -> Pixels:
    rows = [(names(person, shot), person) for person, shots in people.items() for shot in range(1, shots + 1)]
    named, owners = (np.array(column) for column in zip(*rows, strict=True))
    return Pixels.of_people(np.zeros((len(rows), 3, 1, 1), np.uint8), owners, named)


def made_up(root: Path) -> World:
    """As many images as the FPRs of the ROC need. Of LFW's people 400 have one image, 200 have two, 150 five; of
    CFP's 110, 20 are of the first kind, 10 of the second and 15 of the third."""
    rng = np.random.default_rng(7)
    counts = rng.permutation([1] * 400 + [2] * 200 + [5] * 150).tolist()
    people = {f"P_{i:03d}": count for i, count in enumerate(counts)}
    by_count = {count: [p for p, c in people.items() if c == count] for count in (1, 2, 5)}
    lfw = some_faces(people, lambda person, shot: f"{person}_{shot:04d}")
    shared = by_count[1][:20] + by_count[2][:10] + by_count[5][:15]
    cfp_people = rng.permutation([p.replace("_", " ").lower() for p in shared] + [f"Q {i}" for i in range(65)]).tolist()
    sides = [f"frontal/{i:02d}" for i in range(1, 11)] + [f"profile/{i:02d}" for i in range(1, 5)]
    place = {person: f"{i:03d}" for i, person in enumerate(cfp_people, 1)}
    cfp = some_faces(dict.fromkeys(cfp_people, 14), lambda person, shot: f"{place[person]}/{sides[shot - 1]}")
    numbers = rng.permutation(np.repeat(np.arange(180), np.arange(180) % 4 + 1))  # 45 people each with 1, 2, 3, 4
    owners = np.array([f"celeba-{i:05d}" for i in numbers])
    celeba = Pixels.of_people(np.zeros((len(owners), 3, 1, 1), np.uint8), owners, np.arange(len(owners)).astype(str))

    for name in ("lfw", "cfp"):
        (root / name / "images").mkdir(parents=True)
    lines = []
    for fold in range(10):
        chosen = by_count[5][12 * fold : 12 * fold + 12]
        lines += [f"{p} {i} {i + 1}" for p in chosen for i in (1, 2, 3)]
        lines += [f"{p} {i} {chosen[i - 12 + k]} {k + 1}" for k, p in enumerate(chosen[:4]) for i in range(1, 6)]
        lines += [f"{p} 5 {q} 5" for p, q in zip(chosen[:8] * 2, chosen[1:9] + chosen[3:11], strict=True)]
    write_lines(root / "lfw/pairs.txt", "10 36", *lines)

    trials: dict[str, list[list[str]]] = {"test": [], "gallery": [], "probe": []}
    for _ in range(3):
        known, unknown = rng.permutation(by_count[5])[:40], rng.permutation(by_count[1])[:150]
        trials["gallery"].append([f"{p}_0001" for p in known])
        trials["probe"].append([f"{p}_{i:04d}" for p in known for i in (2, 4)] + [f"{p}_0001" for p in unknown])
        trials["test"].append([f"{p}_{i:04d}" for p in known for i in range(1, 6)])
    for kind, sets in trials.items():
        blocks = [[str(len(names)), *(f"{i}, {n}.jpg" for i, n in enumerate(names, 1))] for names in sets]
        write_lines(root / f"lfw/blufr/{kind}_set.txt", "3", *(line for block in blocks for line in block))

    protocol = root / "cfp/protocol"
    for side, shots in (("F", range(10)), ("P", range(10, 14))):
        paths = [f"x/{place[p]}/{sides[s]}.jpg" for p in cfp_people for s in shots]
        write_lines(protocol / f"Pair_list_{side}.txt", *(f"{i} {path}" for i, path in enumerate(paths, 1)))
    for fold in range(10):
        theirs = range(11 * fold, 11 * fold + 11)
        for kind, step in (("FF", 10), ("FP", 4)):
            here = protocol / "Split" / kind / f"{fold + 1:02d}"
            write_lines(here / "same.txt", *(f"{10 * p + i},{step * p + i + 1}" for p in theirs for i in (1, 2, 3)))
            others = [(p, theirs[k - i]) for k, p in enumerate(theirs) for i in (1, 2, 3)]
            write_lines(here / "diff.txt", *(f"{10 * p + 1},{step * q + 2}" for p, q in others))
    return World(root, numbered({"lfw": lfw, "cfp": cfp, "celeba": celeba}))


def really() -> World:
    """The real sets, none of whose images is opened."""
    with pytest.MonkeyPatch.context() as patch:
        blank = lambda files, size: Pixels(
            np.zeros((len(files), 3, 1, 1), np.uint8), files.labels, files.classes, files.names
        )
        patch.setattr(photographs, "_read", blank)
        return World(Path(str(REAL)), numbered({name: getattr(photographs, name)(1) for name in SETS}))


REAL_WORLD = pytest.param("real", marks=pytest.mark.skipif(not REAL, reason=NO_DATA))


@pytest.fixture(scope="module", params=["made up", REAL_WORLD])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    found = really() if request.param == "real" else made_up(tmp_path_factory.mktemp("data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVREPRO_DATA", str(found.folder))
        yield found


only_real = pytest.mark.parametrize("world", [REAL_WORLD], indirect=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The made-up sets, which are quick to judge."""
    found = made_up(tmp_path_factory.mktemp("data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MVREPRO_DATA", str(found.folder))
        yield found


FACE_TASKS = pytest.mark.parametrize("name", ["lfw", "cfp"])


# Who is in training and test


@FACE_TASKS
def test_no_person_is_in_both_training_and_test_by_name(world: World, name: str) -> None:
    task = world.load(name)
    train, test = ({person for _, person in world.people(images)} for images in (task.train, task.test))
    assert world.overlap(name)
    assert not train & test - tasks.FOUND_LATER


@FACE_TASKS
def test_classes_are_people_numbered_without_holes(world: World, name: str) -> None:
    task = world.load(name)
    for images in (task.train, task.test):
        number = dict(zip(world.owners(images), images.labels.tolist(), strict=True))
        assert [number[owner] for owner in world.owners(images)] == images.labels.tolist()
        assert sorted(number.values()) == list(range(len(number)))
        assert images.labels.dtype == np.int64


@FACE_TASKS
def test_training_has_all_others_with_images_enough_and_no_dev_people(world: World, name: str) -> None:
    task = world.load(name)
    celeba, own = world.sets["celeba"], world.sets[name]
    sizes = dict(zip(celeba.people.tolist(), celeba.sizes().tolist(), strict=True))
    train = world.people(task.train)
    expected = {("celeba", person) for person, size in sizes.items() if size >= 3}
    other = "cfp" if name == "lfw" else "lfw"
    found = world.sets[other]
    kept = {same_name(str(p)) for p in found.people[found.sizes() >= (1 if name == "lfw" else 3)]} - world.overlap(name)
    assert train == expected | {(other, person) for person in kept}
    dev = {("celeba", person) for person, size in sizes.items() if size == 2}
    assert world.people(task.test) == dev | {(name, same_name(str(p))) for p in own.people}
    assert not dev & train
    # The images to be embedded: the whole test set in its order, and then those of the dev people.
    assert np.array_equal(task.test.pixels[: len(own)], own.pixels)
    assert len(task.test) == len(own) + 2 * len(dev)
    assert len(np.unique(task.test.pixels.reshape(-1, 3), axis=0)) == len(task.test)
    assert len(np.unique(task.train.pixels.reshape(-1, 3), axis=0)) == len(task.train)


@FACE_TASKS
def test_others_leaves_the_same_number_of_classes_and_the_people_of_the_test_in(world: World, name: str) -> None:
    clean, dirty = world.load(name), world.load(name, "others")
    assert clean.train.labels.max() == dirty.train.labels.max()
    test = {person for kind, person in world.people(dirty.test) if kind == name}
    known = {person for _, person in world.people(dirty.train)} & test - tasks.FOUND_LATER
    assert known == world.overlap(name)
    gone = world.people(clean.train) - world.people(dirty.train)
    assert len(gone) == len(known)
    assert {kind for kind, _ in gone} == {"cfp" if name == "lfw" else "lfw"}
    assert np.array_equal(clean.test.pixels, dirty.test.pixels)
    for task, tested in ((clean, 0), (dirty, len(known))):
        assert task.sizes["removed_people"] == len(known)
        assert task.sizes["people_also_tested"] == tested
        other = world.sets["cfp" if name == "lfw" else "lfw"]
        usable = int((other.sizes() >= (1 if name == "lfw" else 3)).sum()) + int(
            (world.sets["celeba"].sizes() >= 3).sum()
        )
        assert len(task.train) == usable - task.sizes["removed_images"]


@FACE_TASKS
def test_the_seed_draws_who_else_is_removed_and_nothing_more(small: World, name: str) -> None:
    draws = [small.people(small.load(name, "others", seed).train) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert small.people(small.load(name, seed=0).train) == small.people(small.load(name, seed=1).train)


def test_where_nobody_overlaps_nobody_is_removed(small: World) -> None:
    stranger = small.sets["cfp"].only(np.char.startswith(small.sets["cfp"].people, "Q"))
    for remove in ("overlap", "others"):
        clean, sizes = tasks._remove(stranger, small.sets["lfw"], remove, 0)
        assert clean.names.tolist() == stranger.names.tolist()
        assert sizes == {"removed_people": 0, "removed_images": 0, "people_also_tested": 0}


@only_real
@pytest.mark.parametrize(
    ("name", "people", "images", "removed"),
    [("lfw", 1422 + 500 - 199, 14420, 199), ("cfp", 1422 + 901 - 119, 15146, 119)],
)
def test_real_sizes(world: World, name: str, people: int, images: int, removed: int) -> None:
    task = world.load(name)
    assert (task.train.labels.max() + 1, len(task.train)) == (people, images)
    assert task.sizes["removed_people"] == removed
    assert len(task.test) == {"lfw": 13233, "cfp": 7000}[name] + 2 * (3059 - 1422)


@FACE_TASKS
def test_impostor_pairs_are_those_of_the_test_set_alone(world: World, name: str) -> None:
    sizes = np.unique(world.sets[name].people, return_counts=True)[1]
    assert world.load(name).impostor_pairs == (sizes.sum() ** 2 - (sizes**2).sum()) // 2


def test_unknown_data_lists_the_known() -> None:
    with pytest.raises(
        UserError, match=f"unknown data 'mnist'; known are: {', '.join(tasks.TASKS)}; and there is no such file"
    ):
        load("mnist")


def test_a_damaged_list_is_found_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = made_up(tmp_path)
    monkeypatch.setenv("MVREPRO_DATA", str(tmp_path))
    world.load("lfw")
    (tmp_path / "lfw/blufr/probe_set.txt").write_text("10\n")
    with pytest.raises(UserError, match=r"probe_set\.txt, line 2: expected the number of images"):
        world.load("lfw")


# Whatever is in TASKS, one of your own as well


# synthetic has no test, and test_people.py has the sets of development
@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name not in ("synthetic", "development")])
def test_every_task_tests_on_others_and_judges_in_shares(small: World, name: str, monkeypatch: Any) -> None:
    for key, found in small.sets.items():
        monkeypatch.setattr(photographs, key, lambda size, found=found: found)
    task = load(name)
    assert task.train.labels.dtype == np.int64
    assert np.unique(task.train.labels).tolist() == list(range(int(task.train.labels.max()) + 1))
    if task.train.pixels.shape[1:] == (3, 1, 1):  # of the made-up sets, whose pixels say who is on them
        train, test = ({person for _, person in small.people(images)} for images in (task.train, task.test))
    else:
        train, test = ({image.tobytes() for image in images.pixels} for images in (task.train, task.test))
    assert train and test and not train & test
    classes = int(task.train.labels.max()) + 1
    weights = np.random.default_rng(1).normal(size=(classes, 64)).astype(np.float32)
    metrics, evidence = task.judge(embed(task, 1.0), weights)
    assert metrics
    assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values()), metrics
    assert json.loads(json.dumps([metrics, evidence], allow_nan=False)) == [metrics, evidence]
    assert task.judge(embed(task, 1.0), weights) == (metrics, evidence)


# What judge makes of embeddings


def embed(task: Task, noise: float, dim: int = 64, seed: int = 0) -> np.ndarray:
    """A direction a person, of any length, and noise of that length beside one."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(int(task.test.labels.max()) + 1, dim)) / np.sqrt(dim)
    rows = directions[task.test.labels] + noise * rng.normal(size=(len(task.test), dim)) / np.sqrt(dim)
    return (rows * rng.uniform(0.1, 30, (len(rows), 1))).astype(np.float32)


def judged(world: World, name: str, embeddings: np.ndarray | None = None, noise: float = 1.0) -> Any:
    task = world.load(name)
    return task.judge(embed(task, noise) if embeddings is None else embeddings, WEIGHTS)


NAMES = {
    "lfw": [
        "lfw_accuracy",
        "tpr@fpr=0.01",
        "tpr@fpr=0.001",
        "tpr_by_person@fpr=0.01",
        "blufr_vr@far=0.001",
        "blufr_dir@far=0.01",
        "rank1",
        "rank1_by_person",
        "dev_tpr@fpr=0.001",
        "dev_rank1",
    ],
    "cfp": [
        "cfp_ff_accuracy",
        "cfp_fp_accuracy",
        "tpr@fpr=0.01",
        "tpr@fpr=0.001",
        "tpr_by_person@fpr=0.01",
        "dev_tpr@fpr=0.001",
        "dev_rank1",
    ],
}


@FACE_TASKS
def test_perfect_embeddings_get_one_everywhere(small: World, name: str) -> None:
    metrics, evidence = judged(small, name, noise=1e-3)
    assert metrics == dict.fromkeys(NAMES[name], 1.0)
    assert set(evidence["all_pairs"]["tpr"]) == {1.0}
    assert evidence["all_pairs"]["accepted"] == evidence["all_pairs"]["genuine_pairs"]
    if name == "lfw":
        assert set(evidence["rank1"]["rates"]) == {1.0}


@FACE_TASKS
def test_random_embeddings_are_about_chance(small: World, name: str) -> None:
    task = small.load(name)
    embeddings = np.random.default_rng(3).normal(size=(len(task.test), 64)).astype(np.float32)
    metrics, evidence = task.judge(embeddings, WEIGHTS)
    for key, value in metrics.items():
        if key.endswith("accuracy"):
            assert value == pytest.approx(0.5, abs=0.08), key
        elif key.startswith("tpr"):
            assert value == pytest.approx(float(key.partition("=")[2]), abs=0.02), key
        else:
            assert value < 0.06, key
    np.testing.assert_allclose(evidence["all_pairs"]["tpr"], evidence["all_pairs"]["fpr"], atol=0.03)


@FACE_TASKS
def test_dev_metrics_are_of_the_dev_people_alone(small: World, name: str) -> None:
    """Whatever the embeddings of the test set are, and the other way round."""
    task, own = small.load(name), len(small.sets[name])
    embeddings = embed(task, 1.0)
    metrics, _ = task.judge(embeddings, WEIGHTS)
    dev = task.test.labels[own:]
    (expected,) = protocols.tpr_at_fpr(*protocols.pair_scores(embeddings[own:], dev), (0.001,))
    assert 0 < metrics["dev_tpr@fpr=0.001"] == expected.tpr < 1
    unit = embeddings[own:] / np.linalg.norm(embeddings[own:], axis=1, keepdims=True)
    order = np.argsort(dev, kind="stable")
    scores = unit[order[1::2]] @ unit[order[::2]].T
    assert metrics["dev_rank1"] == pytest.approx(np.mean(scores.argmax(1) == np.arange(len(scores))), abs=1e-9)
    changed = embeddings.copy()
    changed[:own] = np.random.default_rng(1).normal(size=changed[:own].shape)
    theirs = task.judge(changed, WEIGHTS)[0]
    assert all(theirs[key] == metrics[key] for key in ("dev_tpr@fpr=0.001", "dev_rank1"))
    changed = embeddings.copy()
    changed[own:] = np.random.default_rng(1).normal(size=changed[own:].shape)
    moved = {k for k, v in task.judge(changed, WEIGHTS)[0].items() if v != metrics[k]}
    assert moved <= {"dev_tpr@fpr=0.001", "dev_rank1", "rank1", "rank1_by_person"}


def kfold_parts(world: World, name: str) -> list[tuple[str, photographs.Pairs]]:
    names = world.sets[name].names
    if name == "lfw":
        return [("lfw", photographs.lfw_pairs(world.folder / "lfw/pairs.txt", names))]
    return [(f"cfp_{kind.lower()}", photographs.cfp_pairs(kind, names)) for kind in ("FF", "FP")]


def words(text: str) -> np.ndarray:
    return np.array(text.split(), int)


@FACE_TASKS
def test_evidence_of_the_folds_gives_the_accuracy(small: World, name: str) -> None:
    task = small.load(name)
    embeddings = embed(task, 1.0)
    metrics, evidence = task.judge(embeddings, WEIGHTS)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for key, pairs in kfold_parts(small, name):
        part = evidence[key]
        assert np.mean(part["accuracies"]) == pytest.approx(metrics[f"{key}_accuracy"], abs=1e-6)
        assert 0.6 < metrics[f"{key}_accuracy"] < 1
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(part["correct"]), np.uint8), count=len(pairs.same))
        assert len(part["correct"]) == 2 * -(-len(bits) // 8)
        for fold in range(10):
            inside = pairs.folds == fold
            assert bits[inside].mean() == pytest.approx(part["accuracies"][fold], abs=1e-6)
            scores = (unit[pairs.left[inside]] * unit[pairs.right[inside]]).sum(1)
            clear = abs(scores - part["thresholds"][fold]) > 1e-5
            right = (scores >= part["thresholds"][fold]) == pairs.same[inside]
            assert clear.mean() > 0.95
            assert np.array_equal(bits[inside][clear], right[clear])
        for side, chosen in (("impostor", ~pairs.same), ("genuine", pairs.same)):
            counts = words(part["histogram"][side])
            scores = (unit[pairs.left[chosen]] * unit[pairs.right[chosen]]).sum(1)
            assert (len(counts), counts.sum()) == (200, chosen.sum())
            assert np.abs(np.cumsum(counts) - np.cumsum(np.histogram(scores, 200, (-1, 1))[0])).max() <= 2


@FACE_TASKS
@pytest.mark.parametrize("ties", [False, True])
def test_evidence_of_all_pairs_gives_the_tpr(small: World, name: str, ties: bool) -> None:
    """Against every score held. With embeddings of few values a genuine pair ties with the impostors at the edge."""
    task, own = small.load(name), small.sets[name]
    embeddings = embed(task, 1.0)
    if ties:
        embeddings = np.sign(embeddings[:, :16])
    metrics, evidence = task.judge(embeddings, WEIGHTS)
    part = evidence["all_pairs"]
    genuine, impostor = protocols.pair_scores(embeddings[: len(own)], own.people)
    points = protocols.tpr_at_fpr(genuine, impostor, (*FPRS, *tasks.ROC))
    assert [metrics[f"tpr@fpr={fpr:g}"] for fpr in FPRS] == [p.tpr for p in points[:2]]
    assert part["fpr"] == list(tasks.ROC)
    assert part["tpr"] == [round(p.tpr, 6) for p in points[2:]]
    for side, scores in (("impostor", impostor), ("genuine", genuine)):
        counts = np.bincount(np.minimum((scores.astype(float) + 1) * 100, 199).astype(int), minlength=200)
        assert np.array_equal(words(part["histogram"][side]), counts)
    people, sizes = np.unique(own.people, return_counts=True)
    total, accepted = words(part["genuine_pairs"]), words(part["accepted"])
    assert np.array_equal(total, (sizes * (sizes - 1) // 2)[sizes > 1])  # in the order of the names
    assert accepted.sum() / total.sum() == points[0].tpr
    assert (accepted / total).mean() == metrics["tpr_by_person@fpr=0.01"]
    rows = np.triu_indices(len(own), k=1)
    owner = own.people[rows[0]][own.people[rows[0]] == own.people[rows[1]]]
    by_hand = [int((genuine[owner == p].astype(float) >= points[0].threshold).sum()) for p in people[sizes > 1]]
    assert accepted.tolist() == by_hand
    if ties:  # or the case is none
        edge = np.nextafter(points[0].threshold, -np.inf)
        assert (genuine == np.float32(edge)).any()


def test_evidence_of_rank_1_is_that_of_a_search_by_hand(small: World) -> None:
    task, own = small.load("lfw"), small.sets["lfw"]
    embeddings = embed(task, 0.9, dim=24)
    metrics, evidence = task.judge(embeddings, WEIGHTS)
    part = evidence["rank1"]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    row = {str(n): i for i, n in enumerate(own.names)}
    several = sorted(n[:-5] for n in row if n.endswith("_0002"))
    alone = [i for n, i in row.items() if n.endswith("_0001") and f"{n[:-5]}_0002" not in row]
    pool = np.concatenate([unit[alone], unit[len(own) :]])
    gallery = unit[[row[f"{p}_0001"] for p in several]]
    probes = unit[[row[f"{p}_0002"] for p in several]]
    found = (gallery * probes).sum(1) > (probes @ pool.T).max(1)
    assert part["probes"] == len(several) == 350
    assert part["distractors"] == [10, 30, 100, 300, len(pool)] == [10, 30, 100, 300, 400 + 90]
    assert part["rates"] == sorted(part["rates"], reverse=True)
    assert 0.1 < part["rates"][-1] < part["rates"][0] <= 1
    assert metrics["rank1"] == part["rates"][-1] == pytest.approx(found.mean(), abs=1e-6)
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(part["correct"]), np.uint8), count=len(found)).astype(bool)
    assert np.array_equal(bits, found)
    mates = [[i for n, i in row.items() if n[:-5] == p] for p in several]
    share = [np.mean([unit[a] @ unit[b] > (pool @ unit[a]).max() for a, b in permutations(each, 2)]) for each in mates]
    assert metrics["rank1_by_person"] == pytest.approx(np.mean(share))
    assert [int(n) for n in part["pairs"].split()] == [len(each) * (len(each) - 1) for each in mates]
    assert np.array(part["found"].split(), int) / np.array(part["pairs"].split(), int) == pytest.approx(np.array(share))


def test_harder_pairs_are_judged_where_the_folder_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = made_up(tmp_path)
    monkeypatch.setenv("MVREPRO_DATA", str(tmp_path))
    (tmp_path / "lfw/hard_pairs.txt").write_text((tmp_path / "lfw/pairs.txt").read_text())
    metrics, evidence = judged(world, "lfw")
    assert metrics["hard_accuracy"] == metrics["lfw_accuracy"]
    assert evidence["hard"] == evidence["lfw"]


def test_evidence_of_blufr_is_that_of_the_protocol(small: World) -> None:
    task, own = small.load("lfw"), small.sets["lfw"]
    embeddings = embed(task, 1.0)
    metrics, evidence = task.judge(embeddings, WEIGHTS)
    found = protocols.blufr(
        embeddings[: len(own)], protocols.blufr_trials(own.names.tolist(), small.folder / "lfw/blufr")
    )
    assert (metrics["blufr_vr@far=0.001"], metrics["blufr_dir@far=0.01"]) == (found.summary("vr"), found.summary("dir"))
    assert evidence["blufr"] == {"vr": found.vr.round(6).tolist(), "dir": found.dir.round(6).tolist()}
    assert 0 < found.summary("dir") < 1


@FACE_TASKS
def test_metrics_are_shares_and_all_is_json_of_short_lines(small: World, name: str) -> None:
    metrics, evidence = judged(small, name)
    assert list(metrics) == NAMES[name]
    assert all(type(value) is float and 0 <= value <= 1 for value in metrics.values())
    text = json.dumps([metrics, evidence], indent=1, allow_nan=False)
    assert json.loads(text) == [metrics, evidence]
    assert len(text.splitlines()) < 200
    assert judged(small, name) == (metrics, evidence)


@only_real
def test_real_cfp_is_judged(world: World) -> None:
    metrics, evidence = judged(world, "cfp", noise=1e-3)
    assert metrics == dict.fromkeys(NAMES["cfp"], 1.0)
    assert [len(evidence[key]["correct"]) for key in ("cfp_ff", "cfp_fp")] == [2 * 875] * 2


# ORL and the digits


def test_orl_is_judged_over_all_pairs_of_the_test_embeddings() -> None:
    task = load("orl", seed=3, image_size=8, train_people=30, fprs=(0.5, 0.01))
    train, test = small_sets.split_people(small_sets.orl(8), 30, 3)
    for ours, theirs in ((task.train, train), (task.test, test)):
        assert np.array_equal(ours.pixels, theirs.pixels)
        assert np.array_equal(ours.labels, theirs.labels)
    embeddings = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    half, hundredth = protocols.tpr_at_fpr(*protocols.pair_scores(embeddings, test.labels), (0.5, 0.01))
    assert task.judge(embeddings, WEIGHTS) == ({"tpr@fpr=0.5": half.tpr, "tpr@fpr=0.01": hundredth.tpr}, {})
    assert half.tpr > hundredth.tpr
    assert task.impostor_pairs == 100 * 90 // 2
    assert task.sizes == {}


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_digits_are_judged_by_the_nearest_class_weight_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Pixels(np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 1, 2, 2]))
    monkeypatch.setattr(small_sets, "split_images", lambda images, share, seed: (images, few))
    task = load("digits", seed=0)
    weights = np.array([[9], [1], [0.1]], np.float32) * on_circle(0, 120, 240)
    embeddings = np.array([[1], [50], [0.01], [1]], np.float32) * on_circle(59, 61, 181, 10)  # nearest: 0, 1, 2, 0
    assert task.judge(embeddings, weights) == ({"accuracy": 0.75}, {})
    assert task.impostor_pairs is None


@pytest.mark.filterwarnings("error")
def test_an_embedding_of_zeros_is_no_error_for_digits() -> None:
    task = load("digits", seed=0)
    metrics, _ = task.judge(np.zeros((len(task.test), 2), np.float32), on_circle(0, 72, 144, 216, 288))
    assert metrics == {"accuracy": float(np.mean(task.test.labels == 0))}


def test_digits_are_a_quarter_held_out() -> None:
    task = load("digits", seed=5)
    train, test = small_sets.split_images(small_sets.digits(), 0.25, 5)
    assert np.array_equal(task.train.pixels, train.pixels)
    assert np.array_equal(task.test.pixels, test.pixels)
    assert np.array_equal(task.test.labels, test.labels)
    assert set(task.train.labels.tolist()) == set(range(5))
