"""`python -m mvrepro embed`: any network over any set, against the same computed here."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvrepro import images, interchange, networks
from mvrepro.__main__ import main
from mvrepro.commands import embed
from mvrepro.files import TEMPORARY, read_json, write_json
from mvrepro.images import archives, storage
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import train

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)
PLACES = [f"{who}/{who}_{shot:04d}.png" for who, count in (("Ann_Lee", 3), ("Bo", 4)) for shot in range(1, count + 1)]


@pytest.fixture(autouse=True)
def people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """7 images of 2 people, 12×12; with the names that images.open_images gives them in their order."""
    monkeypatch.setattr(storage, "LOCAL", tmp_path / "local")
    for place, pixels in zip(PLACES, PIXELS, strict=True):
        (tmp_path / "people" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "people" / place)
    return tmp_path / "people"


def done(*arguments: object) -> np.ndarray:
    """What a call writes."""
    assert main(["embed", *map(str, arguments)]) == 0
    return np.load(Path(str(arguments[2])) / "embeddings.npy")


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["embed", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    about = {"image_size": 12, "embedding_dim": 5}
    model = networks.build("iresnet-tiny", **about)
    interchange.save_backbone(tmp_path / "b.safetensors", model, "iresnet-tiny", **about)
    return tmp_path / "b.safetensors", model.eval()


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) bytes as our networks take them."""
    return torch.from_numpy((pixels.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 128)


def test_a_backbone_of_ours_gives_what_it_gives_in_training(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = ours
    found = done(path, people, tmp_path / "e")
    assert capsys.readouterr().out.startswith(f"{path}: 12×12 rgb, (pixel − 127.5)/128, without mirroring\n")
    assert (found.shape, found.dtype) == ((7, 5), np.float32)
    x = normalised(PIXELS)
    np.testing.assert_allclose(found, networks.embed(model, x, mirror=False), rtol=1e-5, atol=1e-6)
    mirrored = done(path, people, tmp_path / "m", "--mirror", "--batch", 2)
    np.testing.assert_allclose(mirrored, networks.embed(model, x, mirror=True), rtol=1e-5, atol=1e-6)
    blue = done(path, people, tmp_path / "b", "--colour", "bgr", "--normalise", 0, 255)
    want = model(torch.from_numpy(PIXELS[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255)).detach()
    np.testing.assert_allclose(blue, want, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "e" / "names.txt").read_text().splitlines() == PLACES
    assert (tmp_path / "e" / "ids.txt").read_text().splitlines() == ["Ann_Lee"] * 3 + ["Bo"] * 4
    images.write_bin(tmp_path / "x.bin", [(people / place).read_bytes() for place in PLACES[:6]], [True, False, True])
    assert np.array_equal(done(path, tmp_path / "x.bin", tmp_path / "bin", "--batch", 7), done(path, people, tmp_path / "e7", "--batch", 6)[:6])  # fmt: skip  # noqa: E501
    assert not (tmp_path / "bin" / "ids.txt").exists()


def test_images_are_resized_as_for_training_and_must_be_square(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    big = np.kron(PIXELS, np.ones((1, 2, 2, 1), np.uint8))  # the mean of 2×2 equal pixels is the pixel
    for place, pixels in zip(PLACES, big, strict=True):
        Image.fromarray(pixels).save(people / place)
    np.testing.assert_allclose(
        done(ours[0], people, tmp_path / "e"), networks.embed(ours[1], normalised(PIXELS), mirror=False), atol=1e-6
    )
    Image.fromarray(big[0, :20]).save(people / PLACES[3])
    error = fails(capsys, ours[0], people, tmp_path / "f")
    assert f"{people / PLACES[3]}: 24×20 pixels, expected a square, aligned image" in error
    (people / PLACES[3]).write_bytes(b"junk")
    assert f"{people / PLACES[3]} can't be read as an image" in fails(capsys, ours[0], people, tmp_path / "f")


def test_a_call_that_was_stopped_goes_on_with_the_same_bits(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = done(ours[0], people, tmp_path / "whole", "--batch", 2)
    read, seen = embed._pixels, []

    def counted(source: Any, i: int, *rest: Any) -> Any:
        seen.append(i)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return read(source, i, *rest)

    monkeypatch.setattr(embed, "_pixels", counted)
    for stop, again in ((1, 7), (3, 7), (6, 5), (7, 3)):
        seen.clear()
        out = tmp_path / str(stop)
        assert main(["embed", str(ours[0]), str(people), str(out), "--batch", "2"]) == 130
        assert not (out / "embeddings.npy").exists()
        seen.clear(), monkeypatch.setattr(embed, "_pixels", lambda *x: seen.append(x[1]) or read(*x))
        assert np.array_equal(done(ours[0], people, out, "--batch", 2), whole)
        assert len(seen) == again, "the first two tell the number of dimensions; what is there isn't computed again"
        seen.clear(), monkeypatch.setattr(embed, "_pixels", counted)
    monkeypatch.undo()
    part = tmp_path / "1" / f"{TEMPORARY}embeddings.npy"
    for cut in (1, 60, 140, 170, 999):  # killed while it wrote
        (tmp_path / "1" / "embeddings.npy").rename(part)
        part.write_bytes(part.read_bytes()[:cut])
        assert np.array_equal(done(ours[0], people, tmp_path / "1", "--batch", 2), whole)
        assert not part.exists()
    capsys.readouterr()
    done(ours[0], people, tmp_path / "1")
    assert "has them all already" in capsys.readouterr().out


def test_what_is_there_is_not_written_over(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    done(ours[0], people, tmp_path / "e")
    error = fails(capsys, ours[0], people, tmp_path / "e", "--mirror")
    assert "e holds other embeddings: mirror was False, is True" in error
    (people / PLACES[0]).unlink()
    assert "holds other embeddings: names was" in fails(capsys, ours[0], people, tmp_path / "e")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for out in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        assert "is there already and holds no embeddings" in fails(capsys, ours[0], people, out)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_embeddings_of_images_that_changed_are_other_ones(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    said = "had another place, size or time, or an image another person; remove it or choose another place"
    done(ours[0], people, tmp_path / "e")
    contents = [(people / place).read_bytes() for place in PLACES]
    for name, order in (("one", [0, 1, 2, 3, 4, 5, 6]), ("two", [3, 4, 5, 6, 0, 1, 2])):
        some = [contents[i] for i in order]
        images.write_rec(tmp_path / name / "x.rec", images.Memory(some, np.array([0, 0, 0, 1, 1, 1, 1]), name))
        images.write_bin(tmp_path / name / "x.bin", some[:6], [True, False, True])
    for name in ("x.rec", "x.bin"):
        (tmp_path / name).write_bytes((tmp_path / "one" / name).read_bytes())
        done(ours[0], tmp_path / name, tmp_path / f"e{name}")
        (tmp_path / name).write_bytes((tmp_path / "two" / name).read_bytes())
        assert said in fails(capsys, ours[0], tmp_path / name, tmp_path / f"e{name}")
    Image.fromarray(PIXELS[1]).save(people / PLACES[0])
    assert said in fails(capsys, ours[0], people, tmp_path / "e")
    about = read_json(tmp_path / "e" / "about.json")
    write_json(tmp_path / "e" / "about.json", {key: about[key] for key in about if key != embed.STATE})
    done(ours[0], people, tmp_path / "e")  # as 0.1 left it
    assert "has them all already" in capsys.readouterr().out


def test_damaged_results_are_not_taken_for_whole_ones(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = done(ours[0], people, tmp_path / "e"), tmp_path / "e"
    lists = {name: (out / name).read_bytes() for name in ("names.txt", "ids.txt")}
    for name in lists:
        (out / name).unlink()
    done(ours[0], people, out)
    assert lists == {name: (out / name).read_bytes() for name in lists}
    content = (out / "embeddings.npy").read_bytes()
    for damaged in (b"xx", content[:-4]):
        (out / "embeddings.npy").write_bytes(damaged)
        assert "is not a readable .npy file" in fails(capsys, ours[0], people, out)
    for array in (whole[:6], whole.astype(np.float64)):
        np.save(out / "embeddings.npy", array)
        assert "expected float32 (7, D), got" in fails(capsys, ours[0], people, out)
    (out / "ids.txt").write_text("Ann\n" * 7)
    assert "ids.txt isn't what embed wrote: remove it, and the same call" in fails(capsys, ours[0], people, out)
    (out / "ids.txt").unlink(), (out / "embeddings.npy").unlink()
    assert np.array_equal(done(ours[0], people, out), whole)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (["A\nB/1.png"], r"'A\nB' can't be a line of a list: rename it"),
        (["A/1\r.png"], r"'A/1\r.png' can't be a line"),
        ([os.fsdecode(b"Jos\xe9/1.png")], r"'Jos\udce9' can't be a line"),
        (["A\u200bnn/1.png"], "can't be a line of a list"),
        ([" Ann/1.png", "Ann/1.png"], ": rename one"),
        (["Zo\u00eb/1.png", "Zoe\u0308/1.png"], ": rename one"),
        (["Zo\u00eb/1.png", "Zoe/1.png"], ""),
    ],
)
def test_names_that_are_no_lines_are_refused(
    tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str], places: list[str], said: str
) -> None:
    for place in places:
        (tmp_path / "odd" / place).parent.mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / "odd" / place)
    if said:
        assert said in fails(capsys, ours[0], tmp_path / "odd", tmp_path / "e") and not (tmp_path / "e").exists()
    else:
        assert len(done(ours[0], tmp_path / "odd", tmp_path / "e")) == len(places)


def test_folders_of_images_alone_archives_and_digits_are_embedded(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat").mkdir()
    for place in PLACES:
        (people / place).rename(tmp_path / "flat" / Path(place).name)
    found = done(ours[0], tmp_path / "flat", tmp_path / "f")
    assert (tmp_path / "f" / "names.txt").read_text().split() == [Path(place).name for place in PLACES]
    assert len(found) == 7 and not (tmp_path / "f" / "ids.txt").exists()
    kept = images.Pixels.of_people(PIXELS.transpose(0, 3, 1, 2), np.array(["fiw:A"] * 3 + ["fiw:B"] * 4))
    monkeypatch.setattr(archives, "archive", lambda name, size: {("fiw", 112): kept}[name, size])
    assert np.array_equal(done(ours[0], "fiw", tmp_path / "a"), found)
    assert (tmp_path / "a" / "ids.txt").read_text().split() == ["fiw:A"] * 3 + ["fiw:B"] * 4
    assert len(done(ours[0], "digits", tmp_path / "d", "--batch", 64)) == 1797


def test_embeddings_do_not_lie_among_what_is_read(
    people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: tuple[Path, torch.nn.Module],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert f"lies in {people}, which is read: choose another place" in fails(capsys, ours[0], people, people / "emb")
    assert f"lies in {ours[0]}, which is read" in fails(capsys, ours[0], people, ours[0])
    monkeypatch.setenv("MVREPRO_DATA", str(tmp_path))
    (tmp_path / "lfw" / "images").mkdir(parents=True)
    out = tmp_path / "lfw" / "images" / "emb"
    assert f"lies in {tmp_path / 'lfw'}, which is read" in fails(capsys, ours[0], "lfw", out)
    assert not out.exists() and not (people / "emb").exists()


def test_a_checkpoint_is_embedded_as_its_run_tested(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(
        "AM-Softmax", str(people), "iresnet-tiny", 4, epochs=1, batch_size=2, lr=0.1, milestones=(),
        image_size=12, workers=0, device="cpu",
    )  # fmt: skip
    train(config, save=tmp_path / "saved")
    found = done(tmp_path / "saved", people, tmp_path / "e", "--batch", 7)
    assert "with mirroring" in capsys.readouterr().out
    assert found.shape == (7, 4)
    x, flip = normalised(PIXELS), normalised(PIXELS[:, :, ::-1])
    built = read_json(tmp_path / "saved" / "manifest.json")["built"]
    model = networks.build(built.pop("backbone"), **built).eval()
    from safetensors.torch import load_file

    state = load_file(tmp_path / "saved" / "common.safetensors")
    model.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x) + model(flip), rtol=1e-4, atol=1e-5)
    (tmp_path / "saved" / "common.safetensors").write_bytes(b"junk")
    assert "is not a readable checkpoint" in fails(capsys, tmp_path / "saved", people, tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 1_000_000}, "says image_size 1000000, expected a number in 1 … 4096"),
        ({"image_size": 4096, "embedding_dim": 65536}, "does not fit iresnet-tiny: neck."),
        ({"image_size": "a"}, "says image_size 'a', expected a number in 1 … 4096"),
        ({"embedding_dim": -1}, "says embedding_dim -1, expected a number in 1 … 65536"),
        ({"embedding_dim": 10**30}, "says embedding_dim 1000000000000000000000000000000, expected a number"),
        ({"embedding_dim": True}, "says embedding_dim True, expected a number"),
        ({"embedding_dim": 5.0}, "says embedding_dim 5.0, expected a number"),
        ({"in_channels": None}, "says in_channels None, expected a number in 1 … 1024"),
        ({"in_channels": 2}, "does not fit iresnet-tiny: body."),
        ({"backbone": ["x"]}, "x.safetensors: unknown backbone ['x']; known are: toy, iresnet-tiny, "),
        ({"backbone": "iresnet-100"}, "does not fit iresnet-100: "),
        ({"backbone": "mobilefacenet"}, "mobilefacenet takes images of 112×112 pixels in 3 channels, got 12×12 "),
        ({"more": 1}, "does not say which backbone it holds"),
    ],
)
def test_what_a_backbone_says_of_itself_is_not_believed(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any], message: str,
) -> None:  # fmt: skip
    from safetensors.torch import load_file, save_file

    about = {"backbone": "iresnet-tiny", "in_channels": 3, "image_size": 12, "embedding_dim": 5} | changes
    save_file(load_file(ours[0]), tmp_path / "x.safetensors", {"mvrepro": json.dumps(about)})
    assert message in fails(capsys, tmp_path / "x.safetensors", people, tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_network_of_two_channels_is_no_network_of_photographs(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about: dict[str, Any] = {"in_channels": 2, "image_size": 12, "embedding_dim": 5}
    interchange.save_backbone(tmp_path / "2.safetensors", networks.build("toy", **about), "toy", **about)
    assert "2.safetensors takes images of 2 channels; " in fails(capsys, tmp_path / "2.safetensors", people, "e")


@pytest.mark.parametrize("content", [b"", b'{"network": ', b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_damaged_note_of_what_a_folder_holds_is_one_message(
    people: Path, tmp_path: Path, ours: tuple[Path, torch.nn.Module], capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    done(ours[0], people, tmp_path / "e")
    (tmp_path / "e" / "about.json").write_bytes(content)
    error = fails(capsys, ours[0], people, tmp_path / "e")
    assert f"{tmp_path / 'e' / 'about.json'} is damaged, so nothing tells what {tmp_path / 'e'} holds" in error


# ONNX


def save(path: Path, *nodes: Any, shape: tuple[Any, ...] = ("n", 3, 12, 12), more: dict[str, np.ndarray] | None = None,
         inputs: int = 1, kind: int = 1, names: tuple[str, str] = ("x", "y")) -> Path:  # fmt: skip
    """A graph of (op, inputs, output, attributes) from the first of `names` to the second."""
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    helper, of = onnx.helper, onnx.numpy_helper.from_array
    given = [helper.make_tensor_value_info(name, kind, shape) for name in (names[0], "x2")[:inputs]]
    graph = helper.make_graph(
        [helper.make_node(op, ins, [out], **attributes) for op, ins, out, attributes in nodes],
        "net", given, [helper.make_tensor_value_info(names[1], kind, None)],
        [of(value.astype(np.float32), name) for name, value in (more or {}).items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


WEIGHT = RNG.normal(size=(432, 4))
FLAT, GEMM = ("Flatten", ["x"], "f", {}), ("MatMul", ["f", "w"], "y", {})
SCALED = [("Sub", ["x", "c"], "a", {}), ("Flatten", ["a"], "f", {}), GEMM]
CAST = [("Cast", ["x"], "b", {"to": 1}), ("Sub", ["b", "c"], "a", {}), ("Flatten", ["a"], "f", {}), GEMM]


def flat(pixels: np.ndarray, mean: float = 0, std: float = 1) -> np.ndarray:
    return ((pixels.astype(np.float64) - mean) / std).reshape(len(pixels), -1) @ WEIGHT


FIRST = PIXELS.transpose(0, 3, 1, 2)
BOTH = flat(FIRST, 127.5, 127.5) + flat(FIRST[..., ::-1], 127.5, 127.5)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("nodes", "options", "want"),
    [
        ([FLAT, GEMM], [], flat(FIRST, 127.5, 127.5)),
        ([FLAT, GEMM], ["--normalise", "1", "2"], flat(FIRST, 1, 2)),
        ([FLAT, GEMM], ["--mirror"], BOTH),
        ([FLAT, GEMM], ["--colour", "bgr", "--normalise", "0", "1"], flat(FIRST[:, ::-1])),
        (SCALED, [], flat(FIRST, 100)),
        (CAST, [], flat(FIRST, 100)),
    ],
)
def test_a_network_gets_its_images_as_it_says(
    people: Path, tmp_path: Path, nodes: list[Any], options: list[str], want: np.ndarray
) -> None:
    path = save(tmp_path / "n.onnx", *nodes, more={"w": WEIGHT, "c": np.float64(100)})
    np.testing.assert_allclose(done(path, people, tmp_path / "e", *options), want, rtol=1e-3, atol=0.05)


@pytest.mark.extra
def test_layouts_and_batches_of_others_are_served(people: Path, tmp_path: Path) -> None:
    want = flat(PIXELS)
    last = save(tmp_path / "last.onnx", FLAT, GEMM, shape=("n", 12, 12, 3), more={"w": WEIGHT})
    np.testing.assert_allclose(done(last, people, tmp_path / "l", "--normalise", 0, 1), want, rtol=1e-3, atol=0.05)
    fixed = save(tmp_path / "fixed.onnx", FLAT, GEMM, shape=(3, 3, 12, 12), more={"w": WEIGHT})
    found = done(fixed, people, tmp_path / "f", "--normalise", 0, 1)  # 7 images in batches of 3
    np.testing.assert_allclose(found, flat(FIRST), rtol=1e-3, atol=0.05)
    named = save(tmp_path / "named.onnx", ("Flatten", ["images"], "f", {}), ("MatMul", ["f", "w"], "embeddings", {}),
                 more={"w": WEIGHT}, names=("images", "embeddings"))  # as save_onnx calls them  # fmt: skip
    found = done(named, people, tmp_path / "n")
    np.testing.assert_allclose(found, flat(FIRST, 127.5, 128), rtol=1e-3, atol=0.05)
    grey = save(tmp_path / "grey.onnx", FLAT, ("MatMul", ["f", "w"], "y", {}), shape=("n", 1, 12, 12), more={"w": WEIGHT[:144]})  # fmt: skip  # noqa: E501
    luma = np.stack([np.asarray(Image.fromarray(p).convert("L"), np.float64) for p in PIXELS]).reshape(7, -1)
    found = done(grey, people, tmp_path / "g", "--normalise", 0, 1)
    np.testing.assert_allclose(found, luma @ WEIGHT[:144], rtol=1e-3, atol=0.05)
    pooled = [("GlobalAveragePool", ["x"], "y", {})]
    anysize = save(tmp_path / "any.onnx", *pooled, shape=("n", 3, "h", "w"))
    found = done(anysize, people, tmp_path / "a", "--normalise", 0, 1, "--size", 12)  # (N, 3, 1, 1) counts as (N, 3)
    np.testing.assert_allclose(found, FIRST.mean((2, 3)), rtol=1e-4)


@pytest.mark.extra
def test_a_network_that_does_not_fit_is_one_message(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: tuple[Path, torch.nn.Module]
) -> None:
    def of(*nodes: Any, **settings: Any) -> Path:
        made.append(save(tmp_path / f"{len(made)}.onnx", *(nodes or (FLAT, GEMM)), more={"w": WEIGHT}, **settings))
        return made[-1]

    made: list[Path] = []
    pool, out = ("GlobalAveragePool", ["x"], "y", {}), tmp_path / "e"
    for path, options, message in (
        (of(), ["--size", 9], "takes 12×12 pixels in 3 channels, not 9×9 in rgb"),
        (of(), ["--colour", "grey"], "takes 12×12 pixels in 3 channels, not 12×12 in grey"),
        (of(pool, shape=("n", 3, "h", "w")), [], "takes images of any size: say which with --size"),
        (of(pool, shape=("n", 4, 12, 12)), [], "expected one input of square images"),
        (of(("Identity", ["x"], "y", {}), shape=("n", 9)), [], r"got x: tensor(float) ['n', 9]"),
        (of(("Add", ["x", "x2"], "y", {}), inputs=2), [], "expected one input of square images"),
        (of(pool, shape=("n", 3, 12, 9)), [], "expected one input of square images"),
        (of(pool, kind=10), [], "tensor(float16)"),
        (of(("Identity", ["x"], "y", {})), [], "expected embeddings (7, D) of 7 images, got (7, 3, 12, 12)"),
        (of(("Log", ["x"], "l", {}), ("GlobalAveragePool", ["l"], "y", {})), [], "are some that are no numbers"),
        (of(FLAT, GEMM, shape=("n", 3, "h", "w")), ["--size", 9], "doesn't take images (7, 3, 9, 9)"),
        (tmp_path / "none.onnx", [], "none.onnx: no such file or folder"),
        (people, [], "is not a readable checkpoint"),
        (people / PLACES[0], [], "is not a readable backbone"),
        (ours[0], ["--size", 9], "takes 12×12 pixels"),
        (ours[0], ["--normalise", 1, 0], "--normalise takes numbers up to a million, and no STD of 0, got 1 0"),
    ):
        assert message in fails(capsys, path, people, out, *options)
        assert not out.exists()


@pytest.mark.extra
@pytest.mark.parametrize("where", ["../secret", "/etc/hostname", "link", "none", "", "folder", "below/w"])
def test_weights_beside_a_network_lie_in_its_folder_or_are_refused(
    people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    path = tmp_path / "here" / "n.onnx"
    (tmp_path / "here" / "folder").mkdir(parents=True)
    save(path, FLAT, GEMM, more={"w": WEIGHT})
    onnx = pytest.importorskip("onnx")
    network = onnx.load(path)
    (weight,) = network.graph.initializer
    (path.parent / "below").mkdir()
    for place in (tmp_path / "secret", path.parent / "below" / "w"):
        place.write_bytes(weight.raw_data)
    (path.parent / "link").symlink_to(tmp_path / "secret")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", where
    path.write_bytes(network.SerializeToString())
    if where == "below/w":
        want = flat(FIRST, 127.5, 127.5)
        np.testing.assert_allclose(done(path, people, tmp_path / "e"), want, rtol=1e-3, atol=0.05)
        beside = path.parent / "below" / "w"  # another network of the same .onnx file
        beside.write_bytes(beside.read_bytes()[::-1])
        assert "holds other embeddings: network was" in fails(capsys, path, people, tmp_path / "e")
        return
    said = f"{path} has weights in {where!r}, which is no file in its folder: refused"
    assert said in fails(capsys, path, people, tmp_path / "e") and not (tmp_path / "e").exists()
    network.graph.initializer.pop()
    inner = network.graph.node.add(op_type="Constant", output=["w"])
    inner.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(weight)
    path.write_bytes(network.SerializeToString())
    assert said in fails(capsys, path, people, tmp_path / "e")
