"""InsightFace's .bin pair sets (lfw.bin, cfp_fp.bin, agedb_30.bin, …): a pickled (images, same).

images are 2 P encoded images, pair i being 2i and 2i + 1; same are P booleans (arcface_torch, eval/verification.py).
A pickle may ask Python to call anything; here it gets lists, tuples, bytes and booleans and nothing else.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError
from mvrepro.files import write_atomic


@dataclass(frozen=True)
class Pairs:
    """images: 2 P encoded images; same (P,) bool. folds (P,) int64: ten runs of equal length, in order."""

    images: list[bytes]
    same: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.same)

    @property
    def folds(self) -> NDArray[np.int64]:
        return ten_folds(len(self))


def ten_folds(pairs: int) -> NDArray[np.int64]:
    """(P,): pairs in order in ten runs, the first ones longer by one where P is no multiple of 10, as
    scikit-learn's KFold without shuffling cuts them, which InsightFace uses."""
    return np.repeat(np.arange(10), [pairs // 10 + (fold < pairs % 10) for fold in range(10)])


class _Plain(pickle.Unpickler):
    """Knows no name but the one with which Python 3 writes bytes at protocol 2."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent object {pid!r}")


class _Refused(Exception):
    pass


def _encode(text: Any, coding: Any) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise _Refused(f"_codecs.encode of {type(text).__name__} as {coding!r}")
    return text.encode("latin1")


def read_bin(path: Path) -> Pairs:
    """Raises UserError that names what a pickle asks for beyond lists, tuples, bytes and booleans (0 and 1 count
    as such), without having called it; and for what is no such set."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        # Python 2 wrote bytes as str, which only this encoding leaves alone.
        value = _Plain(io.BytesIO(content), encoding="bytes").load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused: its pickle asks for {refused}; a pair set holds bytes and booleans and nothing else. "
            "Nothing of it was run"
        ) from None
    except Exception as error:  # damaged pickles raise all sorts of things
        raise UserError(f"{path}: not a whole pickle: {error or type(error).__name__}") from None
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(x, tuple | list) for x in value)):
        raise UserError(f"{path}: expected (images, same), two lists")
    images, same = value
    wrong = next((i for i, image in enumerate(images) if not isinstance(image, bytes)), None)
    if wrong is not None:
        raise UserError(f"{path}: image {wrong} is {type(images[wrong]).__name__}, expected bytes")
    wrong = next((i for i, item in enumerate(same) if not (isinstance(item, int) and item in (0, 1))), None)
    if wrong is not None:
        raise UserError(f"{path}: pair {wrong} is {type(same[wrong]).__name__}, expected a boolean")
    if len(images) != 2 * len(same) or not same:
        raise UserError(
            f"{path}: {len(images)} images and {len(same)} pairs, expected two images a pair, one pair at least"
        )
    return Pairs(list(images), np.array(same, bool))


def write_bin(path: Path, pairs: Pairs) -> None:
    """As InsightFace's tools read it."""
    write_atomic(path, pickle.dumps((pairs.images, pairs.same.tolist()), protocol=4))
