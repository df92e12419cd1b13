"""What every source of images has in common: the protocol, images in memory, encoded ones, and class ids.

Encoded sources hold nothing of a set but what finds an image, and may be sent to other processes.
"""

import contextlib
import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # Pillow knows others that start programs


class Images(Protocol):
    """N images with class ids: what a network is trained on and tested with, wherever it lies."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class ids."""

    @property
    def classes(self) -> list[str] | None:
        """The names of the people by class id, where the source has them."""

    @property
    def names(self) -> NDArray[np.str_] | None:
        """(N,) names of the images, where lists go by them: LFW, CFP and CelebA have them, encoded sources none."""

    def __len__(self) -> int:
        """N."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, C, H, W): the images of these rows, RGB or grey."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images in memory: pixels (N, C, H, W) uint8; labels (N,) int64: 0 … K−1, each at least once."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str] | None = None
    names: NDArray[np.str_] | None = None

    @classmethod
    def of_people(
        cls, pixels: NDArray[np.uint8], people: NDArray[np.str_], names: NDArray[np.str_] | None = None
    ) -> "Pixels":
        """Class ids follow the order of the people's names; people (N,)."""
        classes, labels = np.unique(people, return_inverse=True)
        return cls(pixels, labels.astype(np.int64), classes.tolist(), names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def people(self) -> NDArray[np.str_]:
        """(N,): the name of each image's person; of a set that has no names, its class id."""
        return self.labels.astype(np.str_) if self.classes is None else np.array(self.classes)[self.labels]

    def sizes(self) -> NDArray[np.int64]:
        """(N,): how many images the person of each image has."""
        return np.bincount(self.labels)[self.labels]

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.pixels[rows]

    def only(self, keep: NDArray[np.bool_]) -> "Pixels":
        """The images for which keep (N,) is True, ids renumbered in their order."""
        ids, labels = np.unique(self.labels[keep], return_inverse=True)
        classes = None if self.classes is None else [self.classes[i] for i in ids.tolist()]
        names = None if self.names is None else self.names[keep]
        return Pixels(self.pixels[keep], labels.astype(np.int64), classes, names)

    def joined(self, other: "Pixels") -> "Pixels":
        """The images of both, by their people: who has one name is one person."""
        pixels, people = np.concatenate([self.pixels, other.pixels]), np.concatenate([self.people, other.people])
        names = None if self.names is None or other.names is None else np.concatenate([self.names, other.names])
        return Pixels.of_people(pixels, people, names)


class Encoded(ABC):
    """Images as JPEG, PNG, …, decoded when they are read.

    size: the side that each must have; None: those of one read() must be alike.
    bad_limit: how many of them (for each process that reads) may be passed over because they don't decode. None:
    every image counts, the first that doesn't decode is an error. bad: the numbers of those that were passed over.
    passed_over: what couldn't even be listed, and why.
    """

    labels: NDArray[np.int64]
    classes: list[str] | None = None
    names: NDArray[np.str_] | None = None
    size: int | None = None
    bad_limit: int | None = None
    passed_over: Sequence[str] = ()

    @cached_property
    def bad(self) -> set[int]:
        return set()

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def content(self, i: int) -> bytes:
        """Image i as it is stored. Raises IndexError, and UserError for damaged files."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Where image i lies, for messages."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, 3, H, W) RGB. For an image that does not decode stands the next of its class that does, so that
        labels[rows] holds.

        Raises UserError that names an image of another size, the last of more than bad_limit that don't decode, and a
        class of which none does.
        """
        pixels: list[NDArray[np.uint8]] = []
        shape = None if self.size is None else (self.size, self.size)
        for i in np.asarray(rows).tolist():
            pixels.append(self._pixels(i, shape))
            shape = pixels[0].shape[1:]
        return np.stack(pixels) if pixels else np.empty((0, 3, self.size or 0, self.size or 0), np.uint8)

    def without(self, removed: NDArray[np.int64]) -> "View":
        """Without some of the classes: the "-R" step done for real. The ids of the others stay as they are."""
        rows = np.flatnonzero(~np.isin(self.labels, removed))
        return View(self, rows, self.labels[rows], self.classes)

    def renumbered(self) -> "View":
        """With the ids 0 … K−1 in the order of those they have."""
        old, labels = np.unique(self.labels, return_inverse=True)
        classes = None if self.classes is None else [self.classes[i] for i in old.tolist()]
        return View(self, np.arange(len(self)), labels.astype(np.int64), classes)

    def _pixels(self, i: int, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
        for at in self._stand_ins(i):
            try:
                return decode(self.content(at), shape)
            except WrongSize as error:
                raise UserError(f"{self.where(at)}: {error}") from None
            except ValueError as error:
                if self.bad_limit is None:
                    raise UserError(f"{self.where(at)} can't be read as an image: {error}") from None
                self.bad.add(at)
                if len(self.bad) > self.bad_limit:
                    raise UserError(
                        f"{len(self.bad)} images don't decode, more than the limit of {self.bad_limit}; "
                        f"the last: {self.where(at)}: {error}"
                    ) from None
        raise UserError(f"no image of the class {self.labels[i]} decodes: leave it out or mend one, {self.where(i)}")

    def _stand_ins(self, i: int) -> Iterator[int]:
        """Image i, then those of its class that follow, in a circle; without those that are known not to decode."""
        if i not in self.bad:
            yield i
        same = np.flatnonzero(self.labels == self.labels[i])
        yield from (at for at in np.roll(same, -int(np.searchsorted(same, i))).tolist() if at not in self.bad)

    def _settings(self) -> dict[str, Any]:
        """What a source that other processes open anew takes along."""
        return {"size": self.size, "bad_limit": self.bad_limit, "bad": self.bad}


class View(Encoded):
    """Some rows (n,) of a source, with class ids of their own."""

    def __init__(
        self, source: Encoded, rows: NDArray[np.int64], labels: NDArray[np.int64], classes: list[str] | None
    ) -> None:
        self.source, self.rows, self.labels, self.classes = source, rows, labels, classes
        self.passed_over, self.size, self.bad_limit = source.passed_over, source.size, source.bad_limit

    def content(self, i: int) -> bytes:
        return self.source.content(int(self.rows[i]))

    def where(self, i: int) -> str:
        return self.source.where(int(self.rows[i]))


class Memory(Encoded):
    """Encoded images that are in memory already; `what` they are, for messages."""

    def __init__(self, contents: list[bytes], labels: NDArray[np.int64], what: str) -> None:
        self.contents, self.labels, self.what = contents, labels, what

    def content(self, i: int) -> bytes:
        return self.contents[i]

    def where(self, i: int) -> str:
        return f"{self.what}, image {i}"


class WrongSize(ValueError):
    """An image of another size than was expected."""


def decode(content: bytes, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """(3, H, W) uint8 RGB of an encoded image, upright by its EXIF orientation, on black where it is transparent.

    Raises ValueError with the reason where it is damaged, or is of more than Pillow's 89 million pixels, which take
    about 1 GB; WrongSize where it is not of this shape (H, W): unless its sides are swapped by its header, and
    with nothing of it decoded.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if shape is not None and sorted(image.size) != sorted(shape):
                raise WrongSize(f"{image.width}×{image.height} pixels, expected {shape[1]}×{shape[0]}")
            image = _rgb(image)
            if shape is not None and (image.height, image.width) != shape:  # upright at last
                raise WrongSize(f"{image.width}×{image.height} pixels, expected {shape[1]}×{shape[0]}")
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except (WrongSize, MemoryError):
        raise
    except Exception as error:  # for damaged files, Pillow raises all sorts of things
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise ValueError(f"{reason} ({len(content)} bytes)") from None


def _rgb(image: Any) -> Any:
    """Pillow's image in RGB. Raises ValueError for a mode whose values have no known range."""
    from PIL import Image, ImageOps

    white_is_0 = _white_is_0(image)
    image.load()
    with contextlib.suppress(Exception):  # a tag that can't be read turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG"):
        grey = np.asarray(image).astype(np.uint32)
        grey = 65535 - grey if white_is_0 else grey
        if isinstance(clear := image.info.get("transparency"), int):
            grey[grey == clear] = 0
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, of which it isn't known what is white")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def _white_is_0(image: Any) -> bool:
    """Whether 0 is white in a TIFF of 16 bits, which Pillow leaves as it is. Raises ValueError for one of other bits
    that it gives as of 16."""
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return False
    bits = image.tag_v2.get(258, (16,))
    if tuple(bits) != (16,):
        raise ValueError(f"a TIFF of {bits[0]} bits a pixel, expected 8 or 16")
    return bool(image.tag_v2.get(262) == 0)


def check_ids(labels: NDArray[np.int64], what: str) -> None:
    """Raises UserError that names the holes unless the ids (N,) are 0 … K−1, each at least once."""
    if not len(labels):
        raise UserError(f"{what}: no images there")
    present = np.unique(labels)
    classes = int(present[-1]) + 1
    if len(present) == classes:
        return
    edges = np.concatenate([[-1], present])
    gaps = [(a + 1, b - 1) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True) if b - a > 1]
    names = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in gaps[:5])
    more = f" and {len(gaps) - 5} more gaps" if len(gaps) > 5 else ""
    raise UserError(
        f"{what}: {classes - len(present)} of the class ids 0 … {classes - 1} have no image: {names}{more}; "
        "ask for the ids to be renumbered (--renumber) or mend the set"
    )
