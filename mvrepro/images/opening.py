"""Which format lies there."""

from pathlib import Path

from mvrepro.errors import UserError
from mvrepro.images.folders import Folder
from mvrepro.images.recordio import Records
from mvrepro.images.source import Encoded, check_ids
from mvrepro.images.tars import Tars


def open_images(
    path: Path | str,
    *,
    renumber: bool = False,
    allow_holes: bool = False,
    size: int | None = None,
    bad_limit: int | None = 100,
) -> Encoded:
    """The training set at `path`: a .rec file, a folder with one, a .tar or a folder of them, or a folder
    with one folder per class. size and bad_limit: see Encoded.

    Class ids must be 0 … K−1, each with an image: else a UserError names the holes; renumber gives the ids
    new numbers in their order, allow_holes takes them as they are. A .rec without InsightFace's header keeps
    them beside its images: a pass over the file, the first time.
    Raises UserError where nothing of that is there.
    """
    source = _open(Path(path), bad_limit or 0)
    _check_names(source, Path(path))
    if renumber:
        source = source.renumbered()
    elif not allow_holes:
        check_ids(source.labels, str(path))
    source.size, source.bad_limit = size, bad_limit
    return source


def _check_names(source: Encoded, path: Path) -> None:
    """Raises UserError unless classes.txt has a name for each class id, and no more: a heading would give every class
    the name of another. One shard of several may lack the last ones."""
    names, ids = len(source.classes or []), int(source.labels.max(initial=-1)) + 1
    shard = isinstance(source, Tars) and path.is_file() and len(list(path.parent.glob("*.tar"))) > 1
    if source.classes is None or names == ids or (names > ids and shard):
        return
    cure = (
        "take out what is no name, such as a heading, or the last names where these people have no images"
        if names > ids
        else "add the names that are missing"
    )
    raise UserError(f"{path}: classes.txt has {names} names, the class ids go to {ids - 1}: {cure}")


def _open(path: Path, limit: int) -> Encoded:
    if path.is_dir():
        records, tars = sorted(path.glob("*.rec")), sorted(path.glob("*.tar"))
        if records and tars:
            raise UserError(f"{path}: holds both .rec and .tar files; say which file is meant")
        if len(records) > 1:
            raise UserError(f"{path}: has {len(records)} .rec files; say which one, such as {records[0]}")
        if records:
            return Records(records[0])
        return Tars(tars) if tars else Folder(path, limit)
    if path.suffix == ".rec":
        return Records(path)
    if path.suffix == ".tar":
        return Tars([path])
    what = "no known format" if path.exists() else "no such file or folder"
    raise UserError(f"{path}: {what}; known are .rec (with .idx), .tar, and folders of either or of people's images")
