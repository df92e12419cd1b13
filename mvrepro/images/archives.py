"""Further people to train on: aligned 112×112 crops in stored zips, in the folder `more` of MVREPRO_DATA.

    more/NAME.zip     images/PERSON/….webp, and list.tsv with a line an image: image, person, …
    more/overlap.tsv  set, person, tested_in, cosine: who is also in a test set, by name or to a published network

How others get them, and under which terms, stands in paper/people.toml. Families In the Wild shows families with
children: nothing of it is ever displayed.
"""

import csv
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError, first_words
from mvrepro.files import is_number
from mvrepro.images.photographs import SIDE, made_smaller
from mvrepro.images.source import Pixels, decode
from mvrepro.images.storage import is_text

ARCHIVES = {
    "fiw": "Families In the Wild, Northeastern University: Kaggle, recognizing-faces-in-the-wild",
    "pins": "Pins-105: Kaggle, pins-face-recognition",
    "bolly": "Bollywood-100: Kaggle, bollywood-celeb-localized-face-dataset",
    "afdb": "Asian celebrities of RMFRD, Wuhan University",
    "casia5": "CASIA-FaceV5, Chinese Academy of Sciences",
}


LIST, IMAGE = 2**26, 2**20  # the most bytes of a member: 40 times the largest list, 170 times the largest image
# what damaged files raise; RuntimeError where one is encrypted or packed in an unknown way
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, csv.Error)
UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, ValueError, *DAMAGED)


def place(name: str) -> Path:
    """A file of MVREPRO_DATA/more. Raises UserError that says where to get all that is missing there."""
    folder = Path(os.environ.get("MVREPRO_DATA") or "MVREPRO_DATA is not set") / "more"
    missing = [key for key in ARCHIVES if not (folder / f"{key}.zip").is_file()]
    if missing or not (folder / name).is_file():
        known = "; ".join(f"{key}.zip from {ARCHIVES[key]}" for key in missing) or name
        raise UserError(f"{folder} lacks {known}; made as paper/people.toml says")
    return folder / name


def archive(name: str, size: int) -> Pixels:
    """One of ARCHIVES, made smaller: size × size. People are called NAME:PERSON. Raises UserError for damaged files."""
    path = place(f"{name}.zip")
    try:
        with zipfile.ZipFile(path) as file:
            table = io.StringIO(_read(file, "list.tsv", LIST).decode("utf-8-sig"), newline=None)
            rows = list(_rows(table, f"{path}, list.tsv", "image", "person"))
            if not rows:
                raise UserError(f"{path}: its list.tsv lists no images")
            pixels = made_smaller(name, [path], _faces(file, rows), size)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a whole archive with list.tsv in it: {first_words(error)}") from None
    return Pixels.of_people(pixels, np.array([f"{name}:{row['person']}" for row in rows]))


def _read(file: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member. Raises ValueError, before anything is inflated, where it has more bytes than the limit."""
    size = file.getinfo(name).file_size
    if size > limit:
        raise ValueError(f"{name} has {size:,} bytes, more than {limit:,}")
    with file.open(name) as member:
        return member.read(limit)  # inflates no more than that, whatever the archive says of its size


def _faces(file: zipfile.ZipFile, rows: list[dict[str, str]]) -> Iterator[NDArray[np.uint8]]:
    for row in rows:
        try:
            yield decode(_read(file, row["image"], IMAGE), (SIDE, SIDE))
        except UNREADABLE as error:
            raise UserError(
                f"{file.filename}, {row['image']}: can't be read as an image: {first_words(error)}"
            ) from None


def overlap(*tested: str) -> dict[str, set[str]]:
    """Set -> its people who are also in one of these test sets ("lfw", "cfp"), as overlap.tsv calls them."""
    found: dict[str, set[str]] = {}
    for row in _table("overlap.tsv", "set", "person", "tested_in"):
        if row["tested_in"] in tested:
            _check_number(row["set"], row["person"])
            found.setdefault(row["set"], set()).add(row["person"])
    return found


def _check_number(name: str, person: str) -> None:
    """CelebA and CFP call their people by numbers."""
    most = {"celeba": 10**9, "cfp": 500}.get(name)
    if most and not (is_number(person) and 1 <= int(person) <= most):
        raise UserError(f"{place('overlap.tsv')}: {name} has no person {person!r}")


def duplicates() -> dict[str, str]:
    """People of Families In the Wild who stand there under two numbers: one -> the other."""
    return {
        f"fiw:{row['person']}": f"fiw:{row['same_as']}" for row in _table("fiw_duplicates.tsv", "person", "same_as")
    }


def _table(name: str, *columns: str) -> Iterator[dict[str, str]]:
    path = place(name)
    try:
        with path.open(encoding="utf-8-sig", newline="") as table:
            yield from _rows(table, str(path), *columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table in UTF-8: {first_words(error)}") from None


def _rows(table: Iterable[str], where: str, *columns: str) -> Iterator[dict[str, str]]:
    rows = csv.DictReader(table, delimiter="\t")
    for row in rows:
        if not all(row.get(column) and is_text(row[column]) for column in columns):
            raise UserError(f"{where}, line {rows.line_num}: expected {'<tab>'.join(columns)}, …")
        yield row
