"""BLUFR: verification and open-set identification on all of LFW."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvrepro.errors import UserError
from mvrepro.files import is_number, read_column
from mvrepro.protocols.scores import Largest, unit
from mvrepro.protocols.verification import (
    allowed,
    check_fprs,
    check_scores,
    impostor_pairs,
    operating_points,
    scan_pairs,
    to_keep,
    tpr_at_fpr,
)

Entry = tuple[str, str]  # an image's name, and where the list names it


@dataclass(frozen=True)
class Blufr:
    """vr, dir (T,) float64: each trial's verification rate, and its detection and identification rate at rank 1.

    strict_dir (T,): dir by the rule of tpr_at_fpr, which vr follows: at most floor(FAR · strangers) of them are
    accepted, at a threshold just above the first that is refused, and a tie in rank fails. NaN where that is none.
    """

    vr: NDArray[np.float64]
    dir: NDArray[np.float64]
    strict_dir: NDArray[np.float64]

    def summary(self, of: str) -> float:
        """Mean − standard deviation over trials of one of these, by its name: the benchmark's figure; ddof = 1, as
        MATLAB's std has it."""
        rates = getattr(self, of)
        return float(rates.mean() - (rates.std(ddof=1) if len(rates) > 1 else 0))


@dataclass(frozen=True)
class BlufrTrials:
    """What BLUFR compares: people (N,) int, a number a person, of all images; trials (T): the rows of the test
    set, of the gallery, which has one image a person, and of the probes."""

    people: NDArray[np.intp]
    trials: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]


def blufr_trials(names: Sequence[str], lists_dir: str | Path) -> BlufrTrials:
    """Read test_set.txt, gallery_set.txt and probe_set.txt of BLUFR.

    names (N,) of the images in any order, as Aaron_Eckhart_0001, with or without .jpg: the person is the name
    without its number. Raises UserError, with file and line, for lists that are missing, malformed or name
    images that names lacks, and for names that come twice.
    """
    rows = _rows(names)
    person = {name: code for code, name in enumerate(sorted({_person(name) for name in rows}))}
    people = np.array([person[_person(name)] for name in rows], np.intp)
    folder = Path(lists_dir)
    paths = [folder / f"{kind}_set.txt" for kind in ("test", "gallery", "probe")]
    lists = [list(_trials(path)) for path in paths]
    if len({len(trials) for trials in lists}) != 1:
        counts = ", ".join(f"{path.name} has {len(trials)}" for path, trials in zip(paths, lists, strict=True))
        raise UserError(f"{folder}: the lists must have as many trials each, but {counts}")
    trials = []
    for test, gallery, probe in zip(*lists, strict=True):
        trials.append((_look_up(test, rows), _look_up(gallery, rows), _look_up(probe, rows)))
        _one_image_a_person(gallery, people[trials[-1][1]])
    return BlufrTrials(people, trials)


def blufr(
    embeddings: ArrayLike,
    trials: BlufrTrials,
    *,
    far_verification: float = 0.001,
    far_identification: float = 0.01,
) -> Blufr:
    """The BLUFR benchmark (Liao, Lei, Yi, Li, "A benchmark study of large-scale unconstrained face recognition", 2014).

    embeddings (N, D), in the order of the names that blufr_trials got. Per trial,
    - vr: the share of genuine pairs accepted, over all pairs of the test set, where at most
      floor(FAR · impostor pairs) impostor pairs are; ties at the threshold are refused, as in tpr_at_fpr;
    - dir: the gallery has one image a person. Of the probes of people in it, the share whose own person's
      score is the highest of all and is accepted, score >= threshold. It is computed as the authors' OpenSetROC.m
      does: of the strangers' best scores in the gallery the threshold is the round(FAR · strangers)-th, which is
      accepted itself; where that rounds to 0, what is above all of them is accepted. Of equal scores the image that
      stands first in the gallery has the better rank.
    The two rules differ by a few of millions of pairs, and by up to a point of dir: see Blufr.strict_dir.
    Raises ValueError for wrong arrays, and for a FAR too small for the impostor pairs of its trial.
    """
    x, people = unit(embeddings), trials.people
    if len(people) != len(x):
        raise ValueError(f"embeddings must be (N, D) and the names (N,), got {x.shape} and ({len(people)},)")
    rates = [
        (_vr(x[test], people[test], far_verification), *_dir(x, people, gallery, probe, far_identification))
        for test, gallery, probe in trials.trials
    ]
    return Blufr(*np.array(rates).reshape(-1, 3).T)


def _vr(x: NDArray[np.float64], codes: NDArray[np.intp], far: float) -> float:
    impostors = impostor_pairs(codes)
    check_fprs(impostors, [far])
    top = Largest(to_keep(impostors, [far]))
    genuine, _ = scan_pairs(x, codes, top, chunk=1024)
    return operating_points(genuine, top.scores(), impostors, [far])[0].tpr


def _dir(
    x: NDArray[np.float64], codes: NDArray[np.intp], gallery: NDArray[np.intp], probe: NDArray[np.intp], far: float
) -> tuple[float, float]:
    """dir and strict_dir."""
    if not 0 < far <= 1:
        raise ValueError(f"a false-alarm rate must be in (0, 1], got {far}")
    scores = (x[probe] @ x[gallery].T).astype(np.float32)
    own = codes[probe][:, None] == codes[gallery]
    known = own.any(axis=1)
    mate = scores[own]  # one per known probe, in their order
    others = np.where(own, -np.inf, scores).max(axis=1)
    strangers = np.sort(others[~known])[::-1]
    check_scores(genuine=len(mate), impostor=len(strangers))
    strict = np.full(len(mate), np.nan)
    if allowed(len(strangers), far):
        (point,) = tpr_at_fpr(mate, strangers, [far])
        strict = (mate > others[known]) & (mate >= np.float64(point.threshold))  # see Operating
    count = int(np.floor(far * len(strangers) + 0.5))  # MATLAB rounds halves up
    if count == 0:
        accepted = mate > strangers[0]
    else:
        accepted = mate >= strangers[count - 1] if count < len(strangers) else np.ones(len(mate), bool)
    first = scores[known].argmax(axis=1) == own[known].argmax(axis=1)
    return float(np.mean(first & accepted)), float(np.mean(strict))


# Names and lists


def _plain(name: str) -> str:
    return name.removesuffix(".jpg")


def _person(name: str) -> str:
    return name.rpartition("_")[0]


def _rows(names: Sequence[str]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        plain = _plain(str(name))
        if not re.fullmatch(r".+_\d+", plain):
            raise UserError(f"names: number {row}, {str(name)!r}, isn't like Aaron_Eckhart_0001")
        if plain in rows:
            raise UserError(f"names: {plain} comes twice, as numbers {rows[plain]} and {row}")
        rows[plain] = row
    return rows


def _trials(path: Path) -> Iterator[list[Entry]]:
    """The trials of one list: their number, then for each the number of images and a line "index, name" an image."""
    if not path.exists():
        raise UserError(f"{path}: no such file; the folder of the BLUFR lists must hold it")
    lines = read_column(path, empty=True)
    at = 0

    def count(of: str) -> int:
        nonlocal at
        line = lines[at].strip() if at < len(lines) else "the end of the file"
        at += 1
        if not is_number(line) or int(line) < 1:
            raise UserError(f"{path}, line {at}: expected the number of {of}, found {line!r}")
        return int(line)

    trials = count("trials")
    for trial in range(1, trials + 1):
        images = count(f"images of trial {trial} (of {trials})")
        first, end = at, at + images
        if end > len(lines):
            raise UserError(f"{path}, line {first}: {images} images announced, {len(lines) - first} lines follow")
        yield [_entry(path, number, line) for number, line in enumerate(lines[first:end], first + 1)]
        at = end
    if at < len(lines):
        raise UserError(f"{path}, line {at + 1}: {trials} trials announced, but more follows: {lines[at]!r}")


def _entry(path: Path, number: int, line: str) -> Entry:
    index, comma, name = (part.strip() for part in line.partition(","))
    if not comma or not index.isdecimal():
        raise UserError(f'{path}, line {number}: expected "index, image", found {line!r}')
    return _plain(name), f"{path}, line {number}"


def _look_up(entries: list[Entry], rows: dict[str, int]) -> NDArray[np.intp]:
    seen: set[str] = set()
    for name, where in entries:
        if name not in rows:
            raise UserError(f"{where}: the image {name} is not among the names")
        if name in seen:
            raise UserError(f"{where}: the image {name} comes twice in its trial")
        seen.add(name)
    return np.array([rows[name] for name, _ in entries], np.intp)


def _one_image_a_person(entries: list[Entry], codes: NDArray[np.intp]) -> None:
    seen: set[int] = set()
    for (name, where), code in zip(entries, codes.tolist(), strict=True):
        if code in seen:
            raise UserError(f"{where}: a gallery has one image a person, but {_person(name)} has two")
        seen.add(code)
