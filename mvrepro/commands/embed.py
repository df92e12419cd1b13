"""`python -m mvrepro embed`: the embeddings of a set of images by a network, for `judge` and `data overlap`."""

import argparse
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvrepro.errors import UserError, explain_os_error
from mvrepro.files import TEMPORARY, check_apart, read_json, sha256, unseen, write_atomic, write_json
from mvrepro.images import (
    Encoded,
    Files,
    Images,
    Memory,
    Pixels,
    Records,
    Tars,
    archives,
    open_images,
    photographs,
    read_bin,
    small,
)
from mvrepro.images.folders import HIDDEN, images_in
from mvrepro.images.storage import alike, alone, is_text

MOST_THREADS = 1024
STATE = "files and people"  # of the set, in about.json
ANEW = "remove it, and the same call writes it anew"
SMALL: dict[str, Callable[[int], Images]] = {"orl": small.orl, "digits": lambda size: small.digits(classes=10)}
NOTE = """OUT gets embeddings.npy (N, D), names.txt with the image of each row, ids.txt with its person where the set
says it, and about.json. What the network says of its input is taken from it; the first line printed tells. A call that
was stopped goes on where it was.

example:
  python -m mvrepro embed model.onnx lfw embeddings/lfw
  python -m mvrepro judge --protocol lfw --embeddings embeddings/lfw/embeddings.npy --names embeddings/lfw/names.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, NOTE
    text = 'an .onnx file (pip install "mvrepro[onnx]"); of ours, the folder of a checkpoint or a backbone.safetensors'
    parser.add_argument("network", type=Path, help=text)
    text = f"lfw, cfp, celeba, {', '.join(archives.ARCHIVES)} (in MVREPRO_DATA), orl or digits; a .bin; or a .rec, "
    text += ".tar or folder as training takes it, or a folder of images alone"
    parser.add_argument("images", help=text)
    parser.add_argument("out", type=Path, help="folder for what is written")
    parser.add_argument("--size", type=int, help="side of the images, which are resized to it")
    parser.add_argument("--colour", choices=["rgb", "bgr", "grey"], help="order of the channels (default: rgb)")
    text = "the network takes (pixel − MEAN)/STD of pixels 0 … 255"
    parser.add_argument("--normalise", type=float, nargs=2, metavar=("MEAN", "STD"), help=text)
    text = "add the embedding of the mirror image (default: as a checkpoint's run did; others: no)"
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, help=text)
    parser.add_argument("--batch", type=int, default=32, help="images at once (default: 32)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: as many as there are cores)")


def run(arguments: argparse.Namespace) -> int:
    check_apart(arguments.out, arguments.network)
    if place := _place(arguments.images):
        check_apart(arguments.out, place)
    with alone(arguments.out):  # two would write into one part
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    path, out = arguments.network, arguments.out
    if not 0 <= arguments.threads <= MOST_THREADS:
        raise UserError(f"--threads must be in 0 … {MOST_THREADS}, got {arguments.threads}")
    network = _network(path, arguments.threads)
    size = network.size if arguments.size is None else arguments.size
    channels = network.channels or (1 if arguments.colour == "grey" else 3)
    if channels not in (1, 3):
        raise UserError(f"{path} takes images of {channels} channels; there are only grey ones and coloured ones")
    colour = arguments.colour or ("grey" if channels == 1 else "rgb")
    if size is None or not 1 <= size <= 4096:
        raise UserError(f"{path} takes images of any size: say which with --size, in 1 … 4096")
    if size != (network.size or size) or (colour == "grey") != (channels == 1):
        side = network.size or size
        raise UserError(f"{path} takes {side}×{side} pixels in {channels} channels, not {size}×{size} in {colour}")
    mean, std = arguments.normalise or network.normalise
    if not (abs(mean) <= 1e6 and 1e-6 <= abs(std) <= 1e6):
        raise UserError(f"--normalise takes numbers up to a million, and no STD of 0, got {mean:g} {std:g}")
    if not 1 <= arguments.batch <= 10**6:
        raise UserError(f"--batch must be in 1 … 1,000,000, got {arguments.batch}")
    mirror = bool(network.mirror) if arguments.mirror is None else arguments.mirror
    print(f"{path}: {size}×{size} {colour}, (pixel − {mean:g})/{std:g}, {'with' if mirror else 'without'} mirroring")
    source = _source(arguments.images, size)
    lists = _lists(source, arguments.images)
    weights = path / "manifest.json" if path.is_dir() else path  # which has the hashes of the checkpoint's files
    about = {"network": sha256(weights, *network.beside), "images": arguments.images}
    about |= {"names": hashlib.sha256(lists["names.txt"]).hexdigest()}
    about |= {"size": size, "colour": colour, "normalise": [mean, std], "mirror": mirror, STATE: _state(source)}
    if _is_complete(out, about, lists, len(source)):
        _write_lists(out, lists)
        print(f"{out} has them all already")
        return 0
    batch = network.batch or arguments.batch

    def embed(first: int) -> NDArray[np.float32]:
        rows = range(first, min(first + batch, len(source)))
        pixels = np.stack([_pixels(source, i, size, colour) for i in rows])
        x = np.zeros((network.batch or len(rows), *pixels.shape[1:]), np.float32)
        x[: len(rows)] = (pixels - np.float32(mean)) / np.float32(std)
        y = network.run(x)
        if y.ndim < 2 or y.size != len(x) * y.shape[1]:
            raise UserError(f"{path}: expected embeddings ({len(x)}, D) of {len(x)} images, got {y.shape}")
        if mirror:
            y = y + network.run(np.ascontiguousarray(x[..., ::-1]))
        if not np.isfinite(y[: len(rows)]).all():
            raise UserError(f"{path}: among the embeddings of images {first} … {rows[-1]} are some that are no numbers")
        return np.asarray(y.reshape(len(x), -1)[: len(rows)], "<f4")

    first = embed(0)  # before anything is written: it may not fit
    write_json(out / "about.json", about)
    _write_lists(out, lists)
    _write(out, len(source), batch, first, embed)
    print(f"wrote {len(source):,} embeddings to {out}")
    return 0


def _network(path: Path, threads: int) -> Any:
    """The Embedder of a file or folder."""
    import torch

    from mvrepro import interchange
    from mvrepro.training import checkpoint

    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix == ".onnx":
        return interchange.load_onnx(path, threads)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if not path.is_dir():
        return interchange.embedder(*interchange.read_backbone(path))
    built, settings, state = checkpoint.read_backbone(path)
    if not built:
        raise UserError(f"{path} was written before checkpoints said what network they hold: save it again")
    if not isinstance(settings.get("flip"), bool):
        raise UserError(f"{path} is not a readable checkpoint: its manifest.json does not say whether to flip")
    return interchange.embedder(interchange.rebuilt(path, built, state), built, settings["flip"])


def _place(images: str) -> Path | None:
    """Where the images lie, or would; None: in a package."""
    if images in SMALL:
        return None
    root = Path(os.environ.get("MVREPRO_DATA") or images)
    if images in archives.ARCHIVES:
        return root / "more"
    return root / images if images in photographs.SOURCES else Path(images)


def _source(images: str, size: int) -> Images:
    if images in SMALL:
        return SMALL[images](size)
    if images in photographs.SOURCES:
        return photographs.files(images)
    if images in archives.ARCHIVES:
        return archives.archive(images, photographs.SIDE)
    path = Path(images)
    if path.suffix == ".bin":
        return read_bin(path)[0]
    return _flat(path) or open_images(path, allow_holes=True, bad_limit=None)


def _flat(path: Path) -> Files | None:
    """The images of a folder that has no folders, nor shards, as `data prepare` writes it of such a one: nothing says
    who they are."""
    if not path.is_dir() or any(path.glob("*.rec")) or any(path.glob("*.tar")):
        return None
    try:
        if any(entry.is_dir() and not entry.name.startswith(HIDDEN) for entry in os.scandir(path)):
            return None
    except OSError:
        return None  # open_images says so
    source = Files(path, sorted(images_in(path, [])))
    source.labels = np.full(len(source), -1, np.int64)
    return source if len(source) else None


def _lists(source: Images, images: str) -> dict[str, bytes]:
    """names.txt: what lists call the images; of a set that has no names, their numbers. ids.txt, where the set says
    who they are. Raises UserError for a name that can't be a line, and for two people who would have the same."""
    rows = range(len(source))
    if source.names is not None:
        names = source.names.tolist()
    elif isinstance(source, Files):
        names = [str(source.path(i).relative_to(source.root)) for i in rows]
    else:
        names = list(map(str, rows))
    known = bool(source.labels[0] >= 0)
    numbers = np.unique(source.labels).tolist() if known else []
    people = {number: source.classes[number] if source.classes else str(number) for number in numbers}
    for name in (*people.values(), *names):
        if not (is_text(name) and name.strip()) or unseen(name):
            raise UserError(f"{images}: {name!r} can't be a line of a list: rename it")
    called = list(people.values())
    if twice := alike(called):
        one, other = called[twice[0]], called[twice[1]]
        raise UserError(f"{images}: the people {one!r} and {other!r} have one name in lists: rename one")
    ids = {"ids.txt": _lines(people[label] for label in source.labels.tolist())} if known else {}
    return {"names.txt": _lines(names), **ids}


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _write_lists(out: Path, lists: dict[str, bytes]) -> None:
    for name, content in lists.items():
        if not (out / name).is_file():
            write_atomic(out / name, content)


def _state(source: Images) -> str:
    """A SHA-256 that changes when a file of the set gets another place, size or time, or an image another person."""
    digest = hashlib.sha256()
    if isinstance(source, Pixels):
        digest.update(np.ascontiguousarray(source.pixels).data)
    elif isinstance(source, Memory):
        digest.update(b"".join(hashlib.sha256(content).digest() for content in source.contents))
    else:
        root, paths = Path(), list[Path]()
        if isinstance(source, Files):
            root, paths = source.root.resolve(), [source.path(i).relative_to(source.root) for i in range(len(source))]
        elif isinstance(source, Records | Tars):
            files = source.files if isinstance(source, Tars) else [source.file]
            paths = [file.path.resolve() for file in files]
        digest.update(os.fsencode(root))
        for path in paths:
            try:
                found = (root / path).stat()
            except OSError:
                continue  # who reads it says what is wrong with it
            digest.update(os.fsencode(path) + f" {found.st_size} {found.st_mtime_ns}\n".encode())
    digest.update(source.labels.astype("<i8").tobytes())
    digest.update("\n".join(source.classes or []).encode(errors="surrogateescape"))
    return digest.hexdigest()


def _pixels(source: Images, i: int, size: int, colour: str) -> NDArray[np.uint8]:
    """Image i as (C, size, size); made smaller as photographs are for training."""
    from PIL import Image

    pixels = source.read(np.array([i]))[0]
    if pixels.shape[1] != pixels.shape[2]:
        where = source.where(i) if isinstance(source, Encoded) else f"image {i}"
        raise UserError(f"{where}: {pixels.shape[2]}×{pixels.shape[1]} pixels, expected a square, aligned image")
    image = Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).convert("L" if colour == "grey" else "RGB")
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BOX if image.width > size else Image.Resampling.BILINEAR)
    found = np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)
    return found[::-1] if colour == "bgr" else found


def read_about(folder: Path) -> dict[str, Any] | None:
    """The about.json of a folder that embed wrote; None where there is none. Raises UserError for a damaged one."""
    path = folder / "about.json"
    if not path.is_file():
        return None
    try:
        about = read_json(path)
    except (OSError, UserError):
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} is damaged, so nothing tells what {folder} holds: remove that folder and embed anew")
    return about


def _is_complete(out: Path, about: dict[str, Any], lists: dict[str, bytes], count: int) -> bool:
    """Whether all is there but lists, perhaps. Raises UserError where the folder holds something else, or damaged."""
    if (before := read_about(out)) is not None:
        state = about[STATE]  # which notes of 0.1 lack
        if other := [
            f"{name} was {before.get(name)}, is {value}"
            for name, value in about.items()
            if name != STATE and before.get(name) != value
        ]:
            raise UserError(f"{out} holds other embeddings: {other[0]}; remove it or choose another place")
        if before.get(STATE, state) != state:
            raise UserError(
                f"{out} holds other embeddings: a file of {about['images']} had another place, size or time, or an "
                "image another person; remove it or choose another place"
            )
        for name, content in lists.items():
            if (out / name).is_file() and (out / name).read_bytes() != content:
                raise UserError(f"{out / name} isn't what embed wrote: {ANEW}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and holds no embeddings: choose another place")
    return _is_whole(out / "embeddings.npy", count)


def _is_whole(path: Path, count: int) -> bool:
    """Whether embeddings of so many images are there. Raises UserError for damaged ones."""
    from mvrepro.interchange import load_embeddings  # which needs torch

    if not path.exists():
        return False
    try:
        found = load_embeddings(path)
    except UserError as error:
        raise UserError(f"{error}: {ANEW}") from None
    if len(found) != count or found.dtype != np.float32:
        raise UserError(f"{path}: expected float32 ({count}, D), got {found.dtype} {found.shape}: {ANEW}")
    return True


def _write(
    out: Path, count: int, batch: int, first: NDArray[np.float32], embed: Callable[[int], NDArray[np.float32]]
) -> None:
    """embeddings.npy (count, D), of which embed gives `batch` rows from one on. The size of the part that is there says
    how far it is; whole batches stay, so that a call that goes on gives the bits of an unbroken one."""
    part, header = out / f"{TEMPORARY}embeddings.npy", io.BytesIO()
    row = first.shape[1] * first.itemsize
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, first.shape[1])}
    np.lib.format.write_array_header_1_0(header, shape)
    try:
        with part.open("ab") as file:
            done = max(0, file.tell() - header.tell()) // row // batch * batch
            file.truncate(header.tell() + done * row if done else 0)
            if not done:
                file.write(header.getvalue() + first.tobytes())
            with tqdm(total=count, initial=done or batch, unit="image", leave=False, disable=None) as bar:
                for start in range(done or batch, count, batch):
                    file.write(embed(start).tobytes())
                    file.flush()
                    bar.update(batch)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out / "embeddings.npy")
    except OSError as error:
        raise explain_os_error(error, f"write {out}") from None
