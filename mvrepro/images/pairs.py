"""Pairs of images, and InsightFace's sets of them (lfw.bin, cfp_fp.bin, agedb_30.bin, …): a pickled (images, same).

images are 2 P encoded images, pair i being 2i and 2i + 1; same are P booleans (arcface_torch, eval/verification.py).
A pickle may ask Python to call anything; here it gets lists, tuples, bytes and booleans, and for NumPy's arrays and
scalars of bytes or booleans something of ours that holds their bytes; and nothing else.
"""

import io
import pickle
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvrepro.errors import UserError
from mvrepro.files import write_atomic
from mvrepro.images.source import Memory


@dataclass(frozen=True, eq=False)
class Pairs:
    """left, right (P,) int64 rows of the images; same (P,) bool; folds (P,) int64, 0 …"""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    folds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.same)

    @classmethod
    def in_order(cls, same: ArrayLike) -> "Pairs":
        """The rows 2i and 2i + 1, in ten runs, the first ones longer by one where P is no multiple of 10: as
        scikit-learn's KFold without shuffling cuts them, which InsightFace uses."""
        pairs = len(same := np.asarray(same, bool))
        left = 2 * np.arange(pairs)
        lengths = [pairs // 10 + (fold < pairs % 10) for fold in range(10)]
        return cls(left, left + 1, same, np.repeat(np.arange(10), lengths))


class _Plain(pickle.Unpickler):
    """Knows no names but the one with which Python 3 writes bytes at protocol 2, and those of NumPy's arrays, for which
    it has classes of its own: what NumPy's would do with a state by hand, nobody vouches for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        found = _NUMPY.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent object {pid!r}")


class _Refused(Exception):
    pass


class _Type:
    """A dtype: bytes or booleans."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in ("b1", "u1"):
            raise _Refused(f"an array of {self.code!r}")

    def __setstate__(self, state: Any) -> None:
        """Nothing that matters to single bytes."""


class _Array:
    """An array, as its bytes, type and shape."""

    value: NDArray[Any] = np.empty(0)

    def __init__(self, data: Any = b"", of: Any = None, shape: Any = (0,), order: Any = "C", *_: Any) -> None:
        self.__setstate__((1, shape, of, order != "C", data))

    def __setstate__(self, state: Any) -> None:
        _, shape, of, fortran, data = state
        code = of.code if isinstance(of, _Type) else "u1"
        self.value = np.frombuffer(data, code).reshape(shape, order="F" if fortran else "C")


_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda of, data: _Array(data, of, ()).value.item(),
    ("numpy.core.numeric", "_frombuffer"): _Array,
}


def _bytes(image: Any) -> Any:
    """An image that is an array as an encoded one; what is none as it is."""
    pixels = image.value if isinstance(image, _Array) else np.empty(0)
    if pixels.dtype != np.uint8:
        return image
    if pixels.ndim == 3 and pixels.shape[2] == 3:
        from PIL import Image

        Image.fromarray(pixels).save(buffer := io.BytesIO(), "BMP")
        return buffer.getvalue()
    return pixels.tobytes() if pixels.ndim == 1 or pixels.shape[1:] == (1,) else image


_OPERATIONS = {operation.code.encode("latin1"): operation for operation in pickletools.opcodes}


def _check_memo(content: bytes) -> None:
    """Raises _Refused for what is remembered under a number that no pickler comes to: Python makes room for as many,
    1 GB for nine bytes."""
    file, operations = io.BytesIO(content), 0
    while code := file.read(1):
        operation = _OPERATIONS[code]
        if operation.name == "STRING":  # what pickletools makes of it is ASCII alone
            file.readline()
            continue
        value = operation.arg.reader(file) if operation.arg else None
        operations += 1
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > operations:
            raise _Refused(f"room for {value:,} things after {operations:,} of them")
        if operation.name == "STOP":
            return


def _encode(text: Any, coding: Any) -> bytes:
    if not isinstance(text, str) or coding not in ("latin1", b"latin1"):
        raise _Refused(f"_codecs.encode of {type(text).__name__} as {coding!r}")
    return text.encode("latin1")


def read_bin(path: Path, *, size: int | None = None) -> tuple[Memory, Pairs]:
    """The 2 P images, whose labels are all −1: nobody says who they are; and their pairs. size: see Encoded.

    An image may also be a NumPy array of bytes: encoded (n,) or (n, 1), or pixels (H, W, 3), RGB as MXNet has them; and
    `same` an array, or NumPy's booleans. Raises UserError that names what a pickle asks for beyond these, lists,
    tuples, bytes and booleans (0 and 1 count as such), without having called it; and for what is no such set.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        _check_memo(content)
        # Python 2 wrote bytes as str, which only this encoding leaves alone.
        value = _Plain(io.BytesIO(content), encoding="bytes").load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused: its pickle asks for {refused}; a pair set holds bytes and booleans and nothing else. "
            "Nothing of it was run"
        ) from None
    except Exception as error:  # damaged pickles raise all sorts of things
        raise UserError(f"{path}: not a whole pickle: {error or type(error).__name__}") from None
    if isinstance(value, tuple | list):
        value = [x.value.tolist() if isinstance(x, _Array) and x.value.ndim == 1 else x for x in value]
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(x, tuple | list) for x in value)):
        raise UserError(f"{path}: expected (images, same), two lists")
    images, same = [_bytes(image) for image in value[0]], value[1]
    wrong = next((i for i, image in enumerate(images) if not isinstance(image, bytes)), None)
    if wrong is not None:
        one = images[wrong]
        what = f"an array of shape {one.value.shape} and type {one.value.dtype}" if isinstance(one, _Array) else None
        rule = ": pixels must be (H, W, 3) of uint8" if what else ""
        raise UserError(f"{path}: image {wrong} is {what or type(one).__name__}, expected bytes{rule}")
    wrong = next((i for i, item in enumerate(same) if not (isinstance(item, int) and item in (0, 1))), None)
    if wrong is not None:
        raise UserError(f"{path}: pair {wrong} is {type(same[wrong]).__name__}, expected a boolean")
    if len(images) != 2 * len(same) or not same:
        raise UserError(
            f"{path}: {len(images)} images and {len(same)} pairs, expected two images a pair, one pair at least"
        )
    source = Memory(images, np.full(len(images), -1, np.int64), str(path))
    source.size = size
    return source, Pairs.in_order(same)


def write_bin(path: Path, images: Sequence[bytes], same: ArrayLike) -> None:
    """As InsightFace's tools read it: 2 P encoded images, P booleans."""
    write_atomic(path, pickle.dumps((list(images), np.asarray(same, bool).tolist()), protocol=4))
