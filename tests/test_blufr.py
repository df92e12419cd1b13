"""blufr against a plain computation of the same, on made-up lists and on the real ones."""

import math
import os
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mvrepro.errors import UserError
from mvrepro.protocols import blufr, blufr_trials, impostor_pairs, open_set

Trials = list[list[str]]


def write_lists(folder: Path, **kinds: Trials) -> Path:
    for kind, trials in kinds.items():
        lines = [str(len(trials))]
        for trial in trials:
            lines += [str(len(trial)), *(f"{n}, {name}.jpg" for n, name in enumerate(trial, 1))]
        (folder / f"{kind}_set.txt").write_text("\n".join(lines) + "\n")
    return folder


def person(name: str) -> str:
    return name[: name.rindex("_")]


def small_world(seed: int, trials: int = 3) -> tuple[np.ndarray, list[str], dict[str, Trials]]:
    """30 people with one to six images; each trial tests 20 of them, 8 of whom are in the gallery."""
    rng = np.random.default_rng(seed)
    names, rows = [], []
    for n in range(30):
        centre = rng.normal(size=8)
        for k in range(rng.integers(1, 7)):
            names.append(f"De_la_{n}_{k + 1:04d}")
            rows.append(centre + 0.8 * rng.normal(size=8))
    order = rng.permutation(len(names))
    lists: dict[str, Trials] = {"test": [], "gallery": [], "probe": []}
    for _ in range(trials):
        people = [f"De_la_{n}" for n in rng.permutation(30)[:20]]
        test = [name for name in names if person(name) in people]
        gallery = [next(name for name in test if person(name) == who) for who in people[:8]]
        lists["test"].append(test)
        lists["gallery"].append(gallery)
        lists["probe"].append([name for name in test if name not in gallery])
    return np.array(rows)[order], [names[k] for k in order], lists


def plain_rates(scores, test: list[str], gallery: list[str], probe: list[str], fars: tuple[float, float]):
    """VR and strict DIR with lists and loops. scores(a, b): the similarity of two images."""
    genuine, impostor = [], []
    for a, b in combinations(test, 2):
        (genuine if person(a) == person(b) else impostor).append(scores(a, b))
    refused = sorted(impostor, reverse=True)[math.floor(fars[0] * len(impostor))]
    vr = sum(score > refused for score in genuine) / len(genuine)
    known = {person(name) for name in gallery}
    strangers = [max(scores(p, g) for g in gallery) for p in probe if person(p) not in known]
    refused = sorted(strangers, reverse=True)[math.floor(fars[1] * len(strangers))]
    found = []
    for p in probe:
        if person(p) in known:
            best, second = sorted(((scores(p, g), g) for g in gallery), reverse=True)[:2]
            found.append(person(best[1]) == person(p) and best[0] > max(second[0], refused))
    return vr, sum(found) / len(found)


def authors_dir(scores, gallery: list[str], probe: list[str], far: float) -> float:
    """DIR at rank 1 as OpenSetROC.m of BLUFR's authors defines it, with lists and loops."""
    known = {person(name) for name in gallery}
    strangers = sorted((max(scores(p, g) for g in gallery) for p in probe if person(p) not in known), reverse=True)
    alarms = math.floor(far * len(strangers) + 0.5)
    found = []
    for p in probe:
        if person(p) in known:
            ranked = sorted(gallery, key=lambda g: scores(p, g), reverse=True)  # equal ones stay in their order
            accepted = alarms == len(strangers) or scores(p, ranked[0]) >= strangers[alarms - 1]
            found.append(person(ranked[0]) == person(p) and accepted)
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [False, True])
def test_rates_are_those_of_the_plain_computation(tmp_path: Path, seed: int, ties: bool) -> None:
    embeddings, names, lists = small_world(seed)
    if ties:  # ±1 in four dimensions: cosines are exact halves
        embeddings = np.where(embeddings[:, :4] > 0, 1.0, -1.0)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    table = dict(zip(names, unit, strict=True))
    fars = (0.05, 0.25)
    found = blufr(
        embeddings,
        blufr_trials(names, write_lists(tmp_path, **lists)),
        far_verification=fars[0],
        far_identification=fars[1],
    )
    scores = lambda a, b: np.float32(table[a] @ table[b])
    each = list(zip(lists["test"], lists["gallery"], lists["probe"], strict=True))
    expected = [plain_rates(scores, *trial, fars) for trial in each]
    np.testing.assert_allclose(found.vr, [vr for vr, _ in expected], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.strict_dir, [rate for _, rate in expected], rtol=0, atol=1e-12)
    theirs = [authors_dir(scores, *trial[1:], fars[1]) for trial in each]
    np.testing.assert_allclose(found.dir, theirs, rtol=0, atol=1e-12)
    assert found.summary("vr") == pytest.approx(np.mean(found.vr) - np.std(found.vr, ddof=1))
    assert found.summary("dir") == pytest.approx(np.mean(found.dir) - np.std(found.dir, ddof=1))
    assert found.summary("strict_dir") == pytest.approx(np.mean(found.strict_dir) - np.std(found.strict_dir, ddof=1))
    everybody = blufr(embeddings, blufr_trials(names, tmp_path), far_verification=1, far_identification=1)
    assert everybody.dir.tolist() == [authors_dir(scores, *trial[1:], 1) for trial in each]


def open_set_example(folder: Path, strangers: list[float], mates: list[float]) -> tuple[np.ndarray, list[str]]:
    """One person in the gallery, whose probes score `mates`; each stranger has one image."""
    scores = np.array([*mates, *strangers])
    side = np.sqrt(1 - scores**2)
    rows = np.zeros((1 + len(scores), 3))
    rows[0, 0], rows[1:, 0], rows[1 : 1 + len(mates), 1] = 1, scores, side[: len(mates)]
    rows[1 + len(mates) :, 2] = side[len(mates) :]
    names = [f"Ann_{i:04d}" for i in range(1 + len(mates))] + [f"S{i}_0001" for i in range(len(strangers))]
    write_lists(folder, test=[names], gallery=[names[:1]], probe=[names[1:]])
    return rows, names


@pytest.mark.parametrize(
    ("strangers", "mates", "theirs", "strict"),
    [
        ([0.9, 0.8, *[0.6] * 198], [0.7] * 20, 0, 1),  # the second false alarm is let in, and so is what equals it
        ([0.9, 0.7, *[0.6] * 198], [0.7] * 20, 1, 1),
        ([0.9, 0.8, *[0.6] * 248], [0.7] * 20, 1, 1),  # 2.5 false alarms are 3
        ([0.9, 0.8, *[0.6] * 247], [0.7] * 20, 0, 1),  # 2.49 are 2
        ([0.9, 0.8, 0.8, *[0.6] * 197], [0.8] * 10 + [0.85] * 10, 1, 0.5),
        ([0.9, *[0.6] * 149], [0.7] * 20, 1, 1),  # 1.5 are 2
    ],
)
def test_dir_lets_as_many_false_alarms_in_as_the_authors_do(
    tmp_path: Path, strangers: list[float], mates: list[float], theirs: float, strict: float
) -> None:
    embeddings, names = open_set_example(tmp_path, strangers, mates)
    found = blufr(embeddings, blufr_trials(names, tmp_path))
    assert (found.dir.tolist(), found.strict_dir.tolist()) == ([theirs], [strict])


@pytest.mark.parametrize(("strangers", "expected"), [(40, 0.5), (49, 0.5), (50, 1), (60, 1), (99, 1), (100, 1)])
def test_dir_needs_no_hundred_strangers_and_the_strict_one_does(
    tmp_path: Path, strangers: int, expected: float
) -> None:
    scores, mates = [0.7, *[0.6] * (strangers - 1)], [0.95] * 10 + [0.7] * 10
    embeddings, names = open_set_example(tmp_path, scores, mates)
    found = blufr(embeddings, blufr_trials(names, tmp_path))
    assert found.dir.tolist() == [expected]  # below 50 none is let in, nor what equals the best
    assert np.isnan(found.strict_dir[0]) == np.isnan(found.summary("strict_dir")) == (strangers < 100)
    with pytest.raises(ValueError, match="a false-alarm rate must be in"):
        blufr(embeddings, blufr_trials(names, tmp_path), far_identification=0)


def test_neither_the_order_of_the_images_nor_their_suffix_matters(tmp_path: Path) -> None:
    embeddings, names, lists = small_world(1)
    write_lists(tmp_path, **lists)
    fars = {"far_verification": 0.05, "far_identification": 0.25}
    before = blufr(embeddings, blufr_trials(names, tmp_path), **fars)
    after = blufr(embeddings[::-1], blufr_trials([f"{name}.jpg" for name in names[::-1]], str(tmp_path)), **fars)
    assert (after.vr.tolist(), after.dir.tolist()) == (before.vr.tolist(), before.dir.tolist())


def test_all_alike_is_all_refused_and_all_apart_is_all_found(tmp_path: Path) -> None:
    embeddings, names, lists = small_world(2)
    write_lists(tmp_path, **lists)
    people = np.array([int(person(name).rpartition("_")[2]) for name in names])
    fars = {"far_verification": 0.05, "far_identification": 0.25}
    assert blufr(np.eye(30)[people], blufr_trials(names, tmp_path), **fars).summary("dir") == 1
    same = blufr(np.ones_like(embeddings), blufr_trials(names, tmp_path), **fars)
    assert same.vr.tolist() == same.strict_dir.tolist() == [0, 0, 0]
    first = [lists["gallery"][k][0] for k in range(3)]  # of equal scores, the first image of the gallery is found
    shares = []
    for name, gallery, probes in zip(first, lists["gallery"], lists["probe"], strict=True):
        known = [p for p in probes if person(p) in map(person, gallery)]
        shares.append(sum(person(p) == person(name) for p in known) / len(known))
    assert same.dir.tolist() == pytest.approx(shares)


def edit(line: int, text: str | None):
    def change(path: Path) -> None:
        lines = path.read_text().splitlines()
        lines[line : line + 1] = [] if text is None else [text]
        path.write_text("\n".join(lines) + "\n")

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("test", Path.unlink, r"test_set\.txt: no such file"),
        ("probe", lambda path: path.write_bytes(b"\xff\xfe"), r"probe_set\.txt, line 1: not UTF-8"),
        (
            "gallery",
            lambda path: path.write_text(""),
            r"gallery_set\.txt, line 1: expected the number of trials, found",
        ),
        ("gallery", edit(0, "many"), r"gallery_set\.txt, line 1: expected the number of trials, found 'many'"),
        ("gallery", edit(0, "2"), r"gallery_set\.txt, line 20: 2 trials announced, but more follows: '8'"),
        (
            "gallery",
            edit(0, "4"),
            r"gallery_set\.txt, line 29: expected the number of images of trial 4 \(of 4\), found",
        ),
        (
            "gallery",
            edit(1, "7"),
            r"gallery_set\.txt, line 10: expected the number of images of trial 2 \(of 3\), found",
        ),
        ("gallery", edit(1, "9"), r'gallery_set\.txt, line 11: expected "index, image", found \'8\''),
        ("gallery", edit(19, "9"), r"gallery_set\.txt, line 20: 9 images announced, 8 lines follow"),
        ("gallery", edit(4, "x3, De_la_1_0001.jpg"), r'gallery_set\.txt, line 5: expected "index, image", found \'x3,'),
        ("gallery", edit(4, "3 De_la_1_0001.jpg"), r'gallery_set\.txt, line 5: expected "index, image"'),
        ("test", edit(5, "4, Nobody_0001.jpg"), r"test_set\.txt, line 6: the image Nobody_0001 is not among the names"),
    ],
)
def test_a_bad_list_is_named_with_its_line(tmp_path: Path, kind: str, change, message: str) -> None:
    _, names, lists = small_world(1)
    write_lists(tmp_path, **lists)
    change(tmp_path / f"{kind}_set.txt")
    with pytest.raises(UserError, match=message) as caught:
        blufr_trials(names, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_lists_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    _, names, lists = small_world(1)
    write_lists(tmp_path, **lists | {"probe": lists["probe"][:2]})
    with pytest.raises(UserError, match=r"as many trials each, but test_set.txt has 3, .* probe_set.txt has 2"):
        blufr_trials(names, tmp_path)
    doubled = [lists["test"][0] + lists["test"][0][:1], *lists["test"][1:]]
    write_lists(tmp_path, **lists | {"test": doubled})
    with pytest.raises(UserError, match=rf"test_set.txt, line {len(doubled[0]) + 2}: .* comes twice in its trial"):
        blufr_trials(names, tmp_path)
    who = next(person(name) for name in lists["gallery"][0] if f"{person(name)}_0002" in lists["test"][0])
    two = [[*lists["gallery"][0], f"{who}_0002"], *lists["gallery"][1:]]
    write_lists(tmp_path, **lists | {"gallery": two})
    with pytest.raises(UserError, match=rf"gallery_set.txt, line 11: a gallery has one image a person, but {who} has"):
        blufr_trials(names, tmp_path)


def test_bad_names_and_arrays_are_refused(tmp_path: Path) -> None:
    embeddings, names, lists = small_world(1)
    write_lists(tmp_path, **lists)
    with pytest.raises(UserError, match=rf"names: {names[0]} comes twice, as numbers 0 and 3"):
        blufr_trials([*names[:3], f"{names[0]}.jpg", *names[4:]], tmp_path)
    with pytest.raises(UserError, match="names: number 1, 'Aaron', isn't like Aaron_Eckhart_0001"):
        blufr_trials([names[0], "Aaron", *names[2:]], tmp_path)
    trials = blufr_trials(names, tmp_path)
    with pytest.raises(ValueError, match=r"embeddings must be \(N, D\) and the names \(N,\)"):
        blufr(embeddings[1:], trials)
    with pytest.raises(ValueError, match="impostor pairs can't show a false-positive rate of 1e-06"):
        blufr(embeddings, trials, far_verification=1e-6)
    embeddings[7, 0] = math.nan
    with pytest.raises(ValueError, match="row 7 is not"):
        blufr(embeddings, trials)


# The real lists


@pytest.fixture(scope="module")
def real() -> tuple[Path, list[str], dict[str, Trials]]:
    data = os.environ.get("MVREPRO_DATA")
    if not data:
        pytest.skip("MVREPRO_DATA is not set: the folder with LFW's lists is needed")
    folder = Path(data) / "lfw" / "blufr"
    lists: dict[str, Trials] = {}
    for kind in ("test", "gallery", "probe"):
        text = (folder / f"{kind}_set.txt").read_text().partition("\n")[2]
        parts = re.split(r"^\d+\n", text, flags=re.MULTILINE)[1:]
        lists[kind] = [re.findall(r", (\S+)\.jpg", part) for part in parts]
    return folder, (folder / "image_list.txt").read_text().replace(".jpg", "").split(), lists


def test_real_lists_have_the_published_numbers_of_pairs(real) -> None:
    """The slides: 9,708 images on average, 156,915 genuine and 46,960,863 impostor pairs.

    The last is not the mean over trials (47,003,565) but what 9,708 images have, less the genuine pairs.
    """
    _, names, lists = real
    assert len(names) == 13_233
    images = [len(test) for test in lists["test"]]
    impostors = [impostor_pairs([person(name) for name in test]) for test in lists["test"]]
    genuine = np.mean([math.comb(n, 2) - m for n, m in zip(images, impostors, strict=True)])
    assert (round(np.mean(images)), round(genuine)) == (9708, 156_915)
    assert math.comb(9708, 2) - 156_915 == 46_960_863


def test_real_lists_are_read_whole(real) -> None:
    folder, _, lists = real
    for kind, trials in lists.items():
        assert len(trials) == 10
        assert [[name for name, _ in trial] for trial in open_set._trials(folder / f"{kind}_set.txt")] == trials


def test_a_real_trial_is_that_of_a_plain_computation(real, tmp_path: Path) -> None:
    _, names, lists = real
    rng = np.random.default_rng(0)
    people, codes = np.unique([person(name) for name in names], return_inverse=True)
    x = rng.normal(size=(len(people), 48))[codes] + 0.9 * rng.normal(size=(len(names), 48))
    order = rng.permutation(len(names))
    trial = 1  # of two: all ten take a while
    lists = {kind: trials[:2] for kind, trials in lists.items()}
    found = blufr(x[order].astype(np.float32), blufr_trials([names[k] for k in order], write_lists(tmp_path, **lists)))
    assert found.vr.shape == found.dir.shape == (2,)

    x = x.astype(np.float32).astype(np.float64)
    x /= np.sqrt(np.sum(x * x, axis=1))[:, None]
    row = {name: k for k, name in enumerate(names)}
    test, gallery, probe = (
        np.array([row[name] for name in lists[kind][trial]]) for kind in ("test", "gallery", "probe")
    )
    genuine, impostor = [], []
    for k in range(len(test) - 1):
        scores = np.float32(x[test[k + 1 :]] @ x[test[k]])
        same = codes[test[k + 1 :]] == codes[test[k]]
        genuine.append(scores[same])
        impostor.append(scores[~same])
    bad = np.concatenate(impostor)
    allowed = len(bad) // 1000
    refused = np.partition(bad, len(bad) - allowed - 1)[len(bad) - allowed - 1]
    assert found.vr[trial] == pytest.approx(np.mean(np.concatenate(genuine) > refused), abs=1e-4)
    scores = np.float32(x[probe] @ x[gallery].T)
    known = np.isin(codes[probe], codes[gallery])
    strangers = np.sort(scores[~known].max(axis=1))[::-1]
    refused, last = strangers[len(strangers) // 100], strangers[math.floor(len(strangers) / 100 + 0.5) - 1]
    right = codes[gallery][scores[known].argmax(axis=1)] == codes[probe][known]
    assert found.strict_dir[trial] == pytest.approx(np.mean(right & (scores[known].max(axis=1) > refused)), abs=1e-3)
    assert found.dir[trial] == pytest.approx(np.mean(right & (scores[known].max(axis=1) >= last)), abs=1e-3)
    assert 0.2 < found.dir[trial] < 0.98, "a figure at the edge would show nothing"
