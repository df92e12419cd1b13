"""`python -m mvrepro data`: fetch, prepare, inspect, overlap and convert sets of faces."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvrepro import images, protocols
from mvrepro.commands.embed import read_about
from mvrepro.errors import UserError
from mvrepro.files import check_apart, check_file, check_once, is_number, read_column, read_lines, write_atomic
from mvrepro.images import photographs
from mvrepro.images.folders import people_in
from mvrepro.images.storage import is_text
from mvrepro.preparation import align, fetch

BAR = 40  # characters of the histogram's longest bar
FETCH = """example:
  python -m mvrepro data fetch lfw faces/
  python -m mvrepro data prepare faces/raw/lfw faces/lfw"""
PREPARE = """needs pip install "mvrepro[align]"; about 20 photos a second on a free core.
A call that was stopped goes on where it was."""
RULE = """The rule: names are the same when they are so with blanks for underscores, one blank for several,
without case, and by the spellings in mvrepro.images.photographs.SPELLINGS. Nothing else: no initials, no accents,
no other order.

By a network: two people are as alike as the mean directions of their images, and taken for one from --threshold on.
How sure that is, the table says for each cosine: how many people of the first list reach it; how many would by chance,
if they were as alike to strangers as the others are among themselves (too many where these have one person under two
names); how many do with a second one, too; and which share of those with a name of the others. Children look alike.

example:
  python -m mvrepro embed model.onnx people/ emb/people
  python -m mvrepro embed model.onnx lfw emb/lfw
  python -m mvrepro data overlap people/ emb/lfw --embeddings emb/people emb/lfw --out shared.txt
  python -m mvrepro data convert people/ clean/ --to rec --without shared.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str, epilog: str, does: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        sub.set_defaults(does=does)
        return sub

    sub = add("fetch", "fetch LFW from its public mirror (180 MB, sha256 checked)", FETCH, _fetch)
    sub.add_argument("set", choices=["lfw"], help="which set")
    sub.add_argument("out", type=Path, help="folder, as MVREPRO_DATA names it")

    sub = add("prepare", "find the face in each photo and write it aligned to 112×112", PREPARE, _prepare)
    sub.add_argument("raw", type=Path, help="folder of photos, in any depth")
    sub.add_argument("out", type=Path, help="gets images/… as the photos lie, landmarks.tsv and photos.tsv")
    text = "the face of several: nearest the centre (LFW, CFP; default) or the largest (CelebA)"
    sub.add_argument("--pick", choices=["centre", "largest"], default="centre", help=text)
    text = "how many photos that can't be read may be passed over (default: 100); passed_over.txt lists them"
    sub.add_argument("--bad-limit", type=int, default=100, metavar="N", help=text)

    sub = add("inspect", "count images and people of a training set", "", _inspect)
    _set_argument(sub)
    sub.add_argument("--decode", action="store_true", help="decode every image, too, and name those that fail")

    sub = add("overlap", "whom two lists of names share: the paper's “-R” step", RULE, _overlap)
    text = "a list with a name a line, a folder with a folder a person, or a folder that embed wrote"
    sub.add_argument("names", type=Path, help=text)
    sub.add_argument("others", type=Path, help="the same for the people to remove, such as those of a test set")
    text = "write the shared names there, as they stand in the first list; with --embeddings also OUT.tsv, the cosines"
    sub.add_argument("--out", type=Path, help=text)
    text = "two folders that embed wrote, by one network: of the first people and of the others"
    sub.add_argument("--embeddings", type=Path, nargs=2, metavar="FOLDER", help=text)
    text = "with --embeddings: who is found by name, by the network, or by either (both, the default)"
    sub.add_argument("--by", choices=["name", "network", "both"], help=text)
    text = "with --embeddings: cosine from which two people are taken for one (default: 0.5)"
    sub.add_argument("--threshold", type=float, help=text)

    sub = add("convert", "write a training set in another format", "", _convert)
    _set_argument(sub)
    sub.add_argument("out", type=Path, help="new folder; a .rec is called train.rec there")
    sub.add_argument("--to", choices=["rec", "tar", "folder"], required=True, help="the format")
    sub.add_argument("--renumber", action="store_true", help="give class ids with holes new numbers 0 … K−1")
    text = "leave out the people that this list names, as overlap writes it, and renumber"
    sub.add_argument("--without", type=Path, metavar="LIST", help=text)


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", type=Path, help="a .rec, .tar, folder of .tar, or folder with a folder a person")


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.does(arguments))


def _fetch(arguments: argparse.Namespace) -> int:
    photos = fetch.fetch_lfw(arguments.out)
    print(f"LFW's lists are in {arguments.out / 'lfw'}, its photos in {photos}; to align them:")
    print(f"python -m mvrepro data prepare {photos} {arguments.out / 'lfw'}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    counts = align.prepare(arguments.raw, arguments.out, pick=arguments.pick, bad_limit=arguments.bad_limit)
    print(
        f"{counts['aligned']:,} aligned, {counts['centre']:,} without a face (their centre was taken), "
        f"{counts['several faces']:,} with several faces, {counts['known']:,} were there; "
        f"see {arguments.out / 'landmarks.tsv'}"
    )
    if "passed over" in counts:
        print(f"{counts['passed over']:,} could not be read: see {arguments.out / 'passed_over.txt'}")
    if "left over" in counts:
        print(f"{counts['left over']:,} crops in {arguments.out / 'images'} are of no photo in {arguments.raw}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    source = images.open_images(arguments.set, allow_holes=True)
    present = np.unique(source.labels, return_counts=True)[1]
    print(f"{arguments.set}: {type(source).__name__}, {len(source):,} images of {len(present):,} people")
    low, middle, high = (int(f(present)) for f in (np.min, np.median, np.max))
    print(f"images a person: {low:,} at least, {middle:,} in the median, {high:,} at most")
    print(histogram(present))
    _list("folders were passed over", source.passed_over)
    try:
        images.check_ids(source.labels, "class ids")
        print(f"class ids: 0 … {len(present) - 1}, none without an image")
    except UserError as error:
        print(error)
    if not arguments.decode:
        return 0
    bad, sizes = [], set()
    for i in tqdm(range(len(source)), "decoding", leave=False, disable=None):
        try:
            sizes.add(images.decode(source.content(i)).shape[1:])
        except ValueError as error:
            where, text = source.where(i), str(error)
            bad.append(text if text.startswith(where) else f"{where}: {text}")
    print("sizes: " + ", ".join(f"{width}×{height}" for height, width in sorted(sizes)))
    _list("images don't decode", bad)
    if not bad:
        print("every image decodes")
    return 1 if bad else 0


def _list(what: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n".join([f"{len(lines):,} {what}", *lines[:20]]))


def histogram(counts: NDArray[np.int64]) -> str:
    """Of the images a person (K,), one line for 1, 2, 3–4, 5–8, 9–16, … images, as text."""
    people = np.bincount(np.ceil(np.log2(counts)).astype(int))
    lines = []
    for power, number in enumerate(people.tolist()):
        low, high = 2**power // 2 + 1, 2**power
        bar = "█" * round(BAR * number / people.max()) or ("▏" if number else "")
        lines.append(f"{high if high <= 2 else f'{low}–{high}':>13} images {number:>9,} people  {bar}".rstrip())
    return "\n".join(lines)


def _overlap(arguments: argparse.Namespace) -> int:
    by = arguments.by or "both"
    threshold = 0.5 if arguments.threshold is None else arguments.threshold
    if not arguments.embeddings and (arguments.by or arguments.threshold is not None):
        raise UserError("--by and --threshold go with --embeddings: names alone know no network")
    if not -1 <= threshold <= 1:
        raise UserError(f"--threshold must be a cosine, in -1 … 1, got {threshold:g}")
    outs = [out, out.with_name(f"{out.name}.tsv")] if (out := arguments.out) else []  # the names, their cosines
    for each in outs:
        check_file(each, (arguments.names, arguments.others, *(arguments.embeddings or ())))
    names, others = (people_of(path) for path in (arguments.names, arguments.others))
    shared = photographs.overlapping(names, others)
    alike, chance = _alike(names, others, *arguments.embeddings) if arguments.embeddings else ({}, None)
    print(f"{len(shared):,} of the {len(names):,} names in {arguments.names} are also among the {len(others):,} "
          f"in {arguments.others}; {len(names) - len(shared):,} remain")  # fmt: skip
    if not shared:
        print(_none_found(arguments.names, names, arguments.others, others))
    if chance is not None:
        if lacking := len(names) - len(alike):
            print(f"{lacking:,} of the {len(names):,} names have no embeddings in {arguments.embeddings[0]}: "
                  "the network says nothing of them")  # fmt: skip
        seen = {name for name, (cosine, *_) in alike.items() if cosine >= threshold}
        print(_evidence(alike, shared, chance))
        print(f"the network finds {len(seen):,} from {threshold:g} on, {len(seen & shared):,} of them by "
              f"name, too; {len(seen | shared):,} are found by either")  # fmt: skip
        if outs:
            lines = [f"{name}\t{cosine:.4f}\t{whom}\t{name in shared}" for name, (cosine, _, whom) in alike.items()]
            text = "\n".join(["person\tcosine\twith\tby_name", *lines])
            write_atomic(outs[1], f"{text}\n")
        shared = {"name": shared, "network": seen, "both": shared | seen}[by]
    listed = [name for name in names if name in shared]
    if outs:
        write_atomic(outs[0], "".join(f"{name}\n" for name in listed))
        print(f"wrote {outs[0]}")
    else:
        print("\n".join(listed))
    return 0


def people_of(path: Path, *, empty: bool = False) -> list[str]:
    """The people that a folder has folders of, or that a list names, each once: a name a line, or, as LFW's people.txt
    has it, "name<tab>number of images", between lines that only count; or of the ids.txt that `embed` wrote into a
    folder, or the classes.txt of a set. An empty list is an error unless `empty`, and so is a folder whose people are
    in its folder `images`."""
    for listed in ("ids.txt", "classes.txt"):
        if (path / listed).is_file():
            return list(dict.fromkeys(read_column(path / listed)))
    if (path / "images").is_dir():
        raise UserError(f"{path}: its folders are no people, for one is called images: name {path / 'images'}")
    if path.is_dir():
        for name in (people := people_in(path)):
            if not is_text(name):
                raise UserError(f"{path}: {name!r} is no name in UTF-8: rename that folder")
        return people
    lines = read_lines(path, empty=empty)
    if any("\t" in line for _, line in lines):
        lines = [(number, line.split("\t")[0].strip()) for number, line in lines if not is_number(line)]
    check_once(path, ((number, photographs.same_name(name)) for number, name in lines))
    return [name for _, name in lines]


def _none_found(ours: Path, names: list[str], theirs: Path, others: list[str]) -> str:
    """What the names of two lists look like, of which none is in the other, and what may be wrong with them."""
    said = f"none is the same: {ours} has names such as {names[0]!r}, {theirs} such as {others[0]!r}"
    for path, change, keep in ((ours, names, others), (theirs, others, names)):
        try:
            lines = [line for _, line in read_lines(path)]
        except UserError:  # a folder, or a set
            lines = change
        bare = {_bare(line): line for line in lines}
        if found := photographs.overlapping(bare, keep):
            return (
                f"{said}; {len(found):,} would be if {path} had a name alone in each line, such as {min(found)!r} for "
                f"{bare[min(found)]!r}"
            )
    return f"{said}; a name a line is expected, or a folder a person"


def _bare(line: str) -> str:
    """A name without quotation marks, the number of an image or count before or behind it, and the file's suffix."""
    plain = photographs.plain_name(line.strip().strip("\"'").rpartition("/")[2])
    return re.sub(r"^\d+[\s,;]+|[\s,;_]+\d+$", "", plain).strip("\"' ") or line


def _alike(
    names: list[str], others_names: list[str], ours: Path, theirs: Path
) -> tuple[dict[str, tuple[float, float, str]], NDArray[np.float32]]:
    """Of each of `names` that has embeddings the two best cosines with the others, and whose is the first, the most
    alike first; and of each of the others (P,) the best with another of themselves."""
    from mvrepro.interchange import load_embeddings  # which needs torch

    _check_alike(ours, theirs)
    (x, ids), (y, others) = (
        (load_embeddings(folder / "embeddings.npy"), np.array(read_column(folder / "ids.txt")))
        for folder in (ours, theirs)
    )
    try:
        people, whom, cosines = protocols.nearest_people(x, ids, y, others)
        chance = protocols.nearest_people(y, others, y, others)[2][:, 1]  # the first is the same person
    except ValueError as error:
        raise UserError(f"{ours} and {theirs}: {error}") from None
    called = {photographs.same_name(name): name for name in names}
    known = {photographs.same_name(name) for name in others_names}
    for folder, those, listed, what in (
        (ours, people, called.keys(), "names"), (theirs, np.unique(others), known, "others")
    ):  # fmt: skip
        if unknown := [name for name in those.tolist() if photographs.same_name(name) not in listed]:
            raise UserError(
                f"{folder / 'ids.txt'}: {unknown[0]} is not among the {what} ({len(unknown):,} such people)"
            )
    order = np.argsort(-cosines[:, 0], kind="stable")
    found = zip(people[order].tolist(), cosines[order].tolist(), whom[order, 0].tolist(), strict=True)
    return {
        called[photographs.same_name(name)]: (first, second, other) for name, (first, second), other in found
    }, chance


def _check_alike(ours: Path, theirs: Path) -> None:
    """Raises UserError where the notes that embed left in both folders tell of two networks, or ways to call one."""
    one, other = (read_about(folder) or {} for folder in (ours, theirs))
    for key in ("network", "size", "colour", "normalise", "mirror"):
        if key in one and key in other and one[key] != other[key]:
            raise UserError(
                f"{ours} and {theirs} hold embeddings by two networks, or of images prepared in two ways: {key} is "
                f"{one[key]} and {other[key]}; embed both alike"
            )


def _evidence(alike: dict[str, tuple[float, float, str]], shared: set[str], chance: NDArray[np.float32]) -> str:
    """A line for every 0.05 of the best cosine."""
    best, second = np.array([cosines for *cosines, _ in alike.values()]).T
    named = np.array([alike[name][0] for name in shared & alike.keys()])
    edges = np.arange(30, 95, 5) / 100
    bins = np.histogram(best, [-2, *edges, 2])[0][1:]
    lines = ["cosine   people  from there on  by chance  second best  same names"]
    for edge, count in zip(edges, bins, strict=True):
        above, twice, expected = np.sum(best >= edge), np.sum(second >= edge), len(best) * np.mean(chance >= edge)
        share = f"{100 * np.mean(named >= edge):.0f} %" if len(named) else "–"
        bar = "█" * round(BAR * count / max(1, bins.max()))
        lines.append(f"{edge:6.2f} {count:8,} {above:14,} {expected:10,.0f} {twice:12,} {share:>11}  {bar}".rstrip())
    return "\n".join(lines)


def _convert(arguments: argparse.Namespace) -> int:
    check_apart(arguments.out, arguments.set)
    holes = arguments.without is not None or arguments.to != "rec"
    source = images.open_images(arguments.set, renumber=arguments.renumber, allow_holes=holes)
    left_out = ""
    if arguments.without:
        if source.classes is None:
            raise UserError(
                f"{arguments.set}: its classes have no names (no classes.txt), so none can be left out by name"
            )
        listed = people_of(arguments.without, empty=True)
        removed = photographs.overlapping(source.classes, listed)
        numbers = [number for number, name in enumerate(source.classes) if name in removed]
        source = source.without(np.array(numbers, np.int64)).renumbered()
        if not len(source):
            raise UserError(f"{arguments.without} names everybody in {arguments.set}: nothing would be left")
        left_out = f"; {len(removed):,} people were left out"
    if arguments.to == "rec":
        images.write_rec(arguments.out / "train.rec", source)
    else:
        (images.write_tars if arguments.to == "tar" else images.write_folder)(arguments.out, source)
    print(f"wrote {len(source):,} images of {len(np.unique(source.labels)):,} people to {arguments.out}{left_out}")
    if arguments.without and listed and not removed:
        print(_none_found(arguments.set, source.classes or [], arguments.without, listed))
    _list("folders were passed over", source.passed_over)
    return 0
