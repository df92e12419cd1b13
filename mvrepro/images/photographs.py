"""LFW, CFP and CelebA, aligned to 112×112, in the folder that MVREPRO_DATA names.

    lfw/     images/NAME/NAME_0001.jpg, pairs.txt, blufr/…       (vis-www.cs.umass.edu/lfw)
    cfp/     images/001/{frontal,profile}/01.jpg, names.txt, protocol/…   (cfpw.io)
    celeba/  images/000001.jpg, identity.txt                     (mmlab.ie.cuhk.edu.hk/projects/CelebA.html)

Nothing of them is ever written into the project but numbers. Decoded pixels are kept in the ignored
folder .mvrepro, since 36,000 JPEGs take longer to open than a small network takes to see them once.
"""

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError
from mvrepro.files import check_once, is_number, read_column, read_lines
from mvrepro.images.folders import Files
from mvrepro.images.pairs import Pairs
from mvrepro.images.source import SUFFIXES, Pixels
from mvrepro.images.storage import kept_array

SIDE = 112  # of the aligned crops
SOURCES = {
    "lfw": "Labeled Faces in the Wild, University of Massachusetts: vis-www.cs.umass.edu/lfw",
    "cfp": "Celebrities in Frontal-Profile in the Wild: cfpw.io",
    "celeba": "CelebA, Chinese University of Hong Kong: mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
}


def folder(name: str) -> Path:
    """The folder of one of the sets. Raises UserError that says where to get it where it is not there."""
    root = os.environ.get("MVREPRO_DATA")
    path = Path(root or "") / name
    if root and (path / "images").is_dir():
        return path
    what = f"MVREPRO_DATA is {root}, which has no {name}/images" if root else "MVREPRO_DATA is not set"
    known = "; ".join(f"{key}/ from {where}" for key, where in SOURCES.items())
    raise UserError(
        f"{what}. What trains on photographs needs a folder with {known}; aligned as mvrepro/images/photographs.py "
        "says. The profile quick needs none of them, and `make validate PROFILE=faces` needs no photographs either"
    )


def files(name: str) -> Files:
    """One of the sets as it lies there, 112×112 pixels, with the names of its images and people."""
    return {"lfw": _lfw, "cfp": _cfp, "celeba": _celeba}[name]()


def lfw(size: int) -> Pixels:
    """All 13,233 images of 5,749 people, sorted by name."""
    return _read(files("lfw"), size)


def cfp(size: int) -> Pixels:
    """10 frontal and 4 profile images of each of 500 people; names such as "001/frontal/01"."""
    return _read(files("cfp"), size)


def celeba(size: int) -> Pixels:
    """The images that identity.txt lists; people are its numbers, which say nothing about who they are."""
    return _read(files("celeba"), size)


def _lfw() -> Files:
    images = folder("lfw") / "images"
    paths = sorted(images.glob("*/*.jpg"))
    people = [path.parent.name for path in paths]
    empty = sorted({p.name for p in images.iterdir() if p.is_dir()} - set(people))
    if empty or not paths:
        raise UserError(f"{images / (empty[0] if empty else '')}: no images there")
    for path, person in zip(paths, people, strict=True):
        name, _, shot = path.stem.rpartition("_")
        if name != person or not is_number(shot):
            raise UserError(f"{path}: expected a name like {person}_0001.jpg in this folder")
    return _files(images, paths, [path.stem for path in paths], people)


def _cfp() -> Files:
    here = folder("cfp")
    people = {f"{number:03d}": name for number, name in enumerate(cfp_names(), 1)}
    paths = sorted((here / "images").glob("*/*/*.jpg"))
    places = [path.parts[-3:-1] for path in paths]
    expected = {(number, side) for number in people for side in ("frontal", "profile")}
    for number, side in sorted(expected ^ set(places)):
        if (number, side) in expected:
            raise UserError(
                f"{here / 'names.txt'}, line {int(number)}: {people[number]} has no images in images/{number}/{side}"
            )
        what = "only frontal and profile belong there" if number in people else "names.txt has no line for it"
        raise UserError(f"{here / 'images' / number / side}: {what}")
    names = [f"{number}/{side}/{path.stem}" for (number, side), path in zip(places, paths, strict=True)]
    return _files(here / "images", paths, names, [people[number] for number, _ in places])


def cfp_names() -> list[str]:
    """The 500 people of CFP in the order of their numbers."""
    return read_column(folder("cfp") / "names.txt", once=same_name)


def _celeba() -> Files:
    here = folder("celeba")
    path, lines = here / "identity.txt", read_lines(here / "identity.txt")
    paths, people = [], []
    for number, line in lines:
        parts = line.split()
        if len(parts) != 2 or not is_number(parts[1]):
            raise UserError(f"{path}, line {number}: expected 'image.jpg person', got {line!r}")
        paths.append(here / "images" / parts[0])
        if not paths[-1].is_file():
            raise UserError(f"{path}, line {number}: there is no image {paths[-1]}")
        people.append(f"celeba-{int(parts[1]):05d}")
    names = [file.stem for file in paths]
    check_once(path, zip((number for number, _ in lines), names, strict=True))
    return _files(here / "images", paths, names, people)


def _files(images: Path, paths: Sequence[Path], names: Sequence[str], people: Sequence[str]) -> Files:
    files = Files(images, (str(path.relative_to(images)) for path in paths))
    plain, files.names = (
        np.array([unicodedata.normalize("NFC", name) for name in column]) for column in (people, names)
    )
    classes, labels = np.unique(plain, return_inverse=True)
    files.classes, files.labels, files.size = classes.tolist(), labels.astype(np.int64), SIDE
    return files


def _read(files: Files, size: int) -> Pixels:
    """The files, made smaller; out of what is kept where that holds just these files."""
    paths = [files.path(i) for i in range(len(files))]
    faces = (files.read(np.array([i]))[0] for i in range(len(files)))
    pixels = made_smaller(files.root.parent.name, paths, faces, size)
    return Pixels(pixels, files.labels, files.classes, files.names)


def made_smaller(name: str, paths: Sequence[Path], faces: Iterable[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """(N, 3, size, size) of the faces (3, 112, 112) that these files have; or what is kept of them under that name,
    and then no face is asked for."""
    from PIL import Image

    if not 1 <= size <= SIDE:
        raise UserError(f"image_size must be in 1 … {SIDE} for aligned faces, got {size}")

    def build() -> NDArray[np.uint8]:
        photos = (Image.fromarray(face.transpose(1, 2, 0)) for face in faces)
        small = [np.asarray(photo.resize((size, size), Image.Resampling.BOX)) for photo in photos]
        return np.stack(small).transpose(0, 3, 1, 2)

    return np.array(kept_array(f"faces/{name}-{size}", paths, build), order="C")


# Names in CFP that are people of LFW spelt otherwise, found by looking at near names one by one.
SPELLINGS = {
    "albert pujol": "albert pujols",
    "alex fergusson": "alex ferguson",
    "barbara streisand": "barbra streisand",
    "beyonce": "beyonce knowles",
    "catherine zeta": "catherine zeta-jones",
    "cristina fernandez de kirchner": "cristina kirchner",
    "david cruso": "david caruso",
    "diane feinstein": "dianne feinstein",
    "diego maradona": "diego armando maradona",
    "fernando alanso": "fernando alonso",
    "george bush": "george w bush",
    "gerard schroeder": "gerhard schroeder",
    "jean chretian": "jean chretien",
    "jennifer anniston": "jennifer aniston",
    "jennifer capriarti": "jennifer capriati",
    "jevin kostner": "kevin costner",
    "joe biden": "joseph biden",
    "luiz lula da silva": "luiz inacio lula da silva",
    "mathew mcconaughey": "matthew mcconaughey",
    "nancy peloci": "nancy pelosi",
    "nicholas cage": "nicolas cage",
    "recep erdogen": "recep tayyip erdogan",
    "robert do niro": "robert de niro",
    "robert downey": "robert downey jr",
    "robin wright": "robin wright penn",
    "rooh moo-hyan": "roh moo-hyun",
    "warren buffet": "warren buffett",
    "yulia tymoshenko": "julia tymoshenko",
    "ziyi zhang": "zhang ziyi",
}


def same_name(name: str) -> str:
    """The form in which names of different sets are compared: blanks for underscores, case ignored, SPELLINGS."""
    plain = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()
    return SPELLINGS.get(plain, plain)


def overlapping(people: Iterable[str], others: Iterable[str]) -> set[str]:
    """Those of `people` that are also in `others` by name: what the paper's "-R" step removes."""
    known = {same_name(str(name)) for name in others}
    return {str(name) for name in people if same_name(str(name)) in known}


def plain_name(name: str) -> str:
    """The name of an image, without the suffix of its file."""
    return next((name[: -len(end)] for end in SUFFIXES if name.lower().endswith(end)), name)


def lfw_name(path: str) -> str:
    """What LFW's lists, and those like them, call the image of this file: Aaron_Eckhart_0001."""
    return plain_name(path).replace("\\", "/").rpartition("/")[2]


def cfp_name(path: str) -> str:
    """What CFP's lists call the image of this file: 001/frontal/01."""
    return "/".join(plain_name(path).replace("\\", "/").split("/")[-3:])


def _rows(names: NDArray[np.str_], called: Callable[[str], str]) -> dict[str, int]:
    """The row of each image, by what the lists call it. Raises UserError for one that comes twice."""
    row: dict[str, int] = {}
    for i, name in enumerate(names.tolist()):
        if row.setdefault(called(name), i) != i:
            raise UserError(f"names: {called(name)} comes twice, as {names[row[called(name)]]} and {name}")
    return row


def lfw_pairs(path: Path, names: NDArray[np.str_]) -> Pairs:
    """Pairs of the images called names (N,), with or without folders before and .jpg behind, out of a list of

    - LFW: a first line "folds pairs" (View 2) or "pairs" (View 1, one fold), then per fold so many lines "name i j" of
      one person and "name i other j" of two;
    - RFW: such lines without the first one; or CALFW and CPLFW: lines "image.jpg flag", two a pair, 0 for two people.
      Both need 20 lines, for of each kind of pairs the folds are ten runs in order.
    """
    lines = read_lines(path)
    head = lines[0][1].split()
    titled = len(head) <= 2 and all(is_number(part) and int(part) > 0 for part in head)
    if not titled and (len(lines) < 20 or not 2 <= len(head) <= 4):
        short = f"; a list without such a line needs 20, it has {len(lines)}" if 2 <= len(head) <= 4 else ""
        raise UserError(f"{path}, line {lines[0][0]}: expected 'folds pairs' or 'pairs', got {lines[0][1]!r}{short}")
    folds, half = (1, int(head[0])) if len(head) == 1 else (int(head[0]), int(head[1])) if titled else (10, 0)
    if titled and len(lines) - 1 != 2 * folds * half:
        raise UserError(
            f"{path}, line {lines[0][0]}: {2 * folds * half} pairs announced, {len(lines) - 1} lines follow"
        )
    row = _rows(names, lfw_name)
    flags = not titled and len(head) == 2
    if flags:
        couples = zip_longest(lines[::2], lines[1::2], fillvalue=(0, ""))
        lines = [(number, f"{first} {second}") for (number, first), (_, second) in couples]
    found, numbered = [], list[tuple[int, str]]()
    for place, (number, line) in enumerate(lines[titled:]):
        first, second, same = _two_images(line.split(), flags)
        expected = place % (2 * half) < half if titled else same
        if not first or same != expected:
            form = "image flag image flag" if flags else "name i j" if expected else "name i other j"
            raise UserError(f"{path}, line {number}: expected {form}, got {line!r}")
        for name in (first, second):
            if name not in row:
                raise UserError(f"{path}, line {number}: there is no image {name}")
        if first == second:
            raise UserError(f"{path}, line {number}: an image with itself is no pair, got {line!r}")
        found.append((row[first], row[second], same, place // (2 * half) if titled else 0))
        if titled:
            numbered.append((number, " and ".join(sorted((first, second)))))
    check_once(path, numbered)
    pairs = _pairs(found)
    for side in () if titled else (True, False):
        rows = np.flatnonzero(pairs.same == side)
        if len(rows) < 10:
            raise UserError(f"{path}: {len(rows)} pairs of {'one person' if side else 'two people'}, ten are needed")
        for fold, part in enumerate(np.array_split(rows, 10)):
            pairs.folds[part] = fold
    return pairs


def _two_images(parts: list[str], flags: bool) -> tuple[str, str, bool]:
    """The images that a line of a list of pairs names, or two lines with flags; and whether they are of one person.
    Empty names where it has another form."""
    match parts:
        case [first, flag, second, again] if flags and flag == again and is_number(flag):
            return plain_name(first), plain_name(second), flag != "0"
        case [person, i, j] if not flags:
            return _shot(person, i), _shot(person, j), True
        case [person, i, other, j] if not flags and person != other:
            return _shot(person, i), _shot(other, j), False
    return "", "", False


def _shot(person: str, number: str) -> str:
    return f"{person}_{int(number):04d}" if is_number(number) else f"{person}_{number}"


def cfp_pairs(kind: str, names: NDArray[np.str_]) -> Pairs:
    """The 7,000 pairs of CFP-FF ("FF") or CFP-FP ("FP") in their 10 folds: index pairs into Pair_list_F.txt
    and, for the second image of FP, into Pair_list_P.txt. names (N,) such as 001/frontal/01, with or without folders
    before and .jpg behind."""
    here = folder("cfp") / "protocol"
    row = _rows(names, cfp_name)
    lists = [_cfp_list(here / f"Pair_list_{side}.txt", row) for side in kind]
    found = []
    for fold in range(10):
        for file, same in (("same.txt", True), ("diff.txt", False)):
            path = here / "Split" / kind / f"{fold + 1:02d}" / file
            for number, line in read_lines(path):
                parts = line.split(",")
                if len(parts) != 2 or not all(is_number(part.strip()) for part in parts):
                    raise UserError(f"{path}, line {number}: expected 'index,index', got {line!r}")
                ends = []
                for part, index in zip(parts, lists, strict=True):
                    if int(part) not in index:
                        raise UserError(f"{path}, line {number}: the pair lists have no image {part}")
                    ends.append(index[int(part)])
                found.append((ends[0], ends[1], same, fold))
    return _pairs(found)


def _cfp_list(path: Path, row: dict[str, int]) -> dict[int, int]:
    index: dict[int, int] = {}
    for number, line in read_lines(path):
        parts = line.split()
        name = cfp_name(parts[-1])
        if len(parts) != 2 or not is_number(parts[0]) or name.count("/") != 2:
            raise UserError(f"{path}, line {number}: expected 'index path of a known image', got {line!r}")
        if name not in row:
            raise UserError(f"names lack {name} ({path}, line {number}); they are such as {next(iter(row), '')}")
        if int(parts[0]) in index:
            raise UserError(f"{path}, line {number}: index {parts[0]} stands there twice")
        index[int(parts[0])] = row[name]
    return index


def _pairs(found: list[tuple[int, int, bool, int]]) -> Pairs:
    left, right, same, folds = (np.array(column) for column in zip(*found, strict=True))
    return Pairs(left, right, same.astype(bool), folds)
