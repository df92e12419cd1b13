"""Heads and embeddings of others: the layouts, written here as their code writes them, and `judge` on small sets."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mvrepro import images, interchange, protocols
from mvrepro.__main__ import main
from mvrepro.commands.judge import PROTOCOLS
from mvrepro.errors import UserError
from mvrepro.heads.margin import MarginHead
from mvrepro.networks import IResNet

K, D = 11, 4


def make_head(name: str = "MV-AM-Softmax-a", **settings: float) -> MarginHead:
    torch.manual_seed(0)
    return MarginHead(name, D, K, **settings)


@pytest.fixture
def theirs() -> Tensor:
    return 3 * torch.randn(K, D, generator=torch.Generator().manual_seed(5))


def partial_fc(weight: Tensor, ranks: int) -> list[Tensor]:
    """The part of each rank as PartialFC_V2.__init__ computes it: num_local classes from class_start on."""
    parts = []
    for rank in range(ranks):
        num_local = K // ranks + int(rank < K % ranks)
        start = K // ranks * rank + min(rank, K % ranks)
        parts.append(weight[start : start + num_local])
    return parts


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_a_head_of_arcface_torch_is_read_from_its_shards(tmp_path: Path, theirs: Tensor, ranks: int) -> None:
    for rank, part in enumerate(partial_fc(theirs, ranks)):
        state = {"epoch": 3, "global_step": 7, "state_dict_backbone": {}, "state_dict_softmax_fc": {"weight": part}}
        torch.save(state, tmp_path / f"checkpoint_gpu_{rank}.pt")
        torch.save({"weight": part}, tmp_path / f"softmax_fc_gpu_{rank}.pt")
        torch.save(part, tmp_path / f"rank_{rank}_softmax_weight.pt")
    for pattern in ("checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank_*_softmax_weight.pt"):
        head = make_head()
        interchange.load_head(head, "arcface_torch", list(tmp_path.glob(pattern)))
        assert torch.equal(head.weight, theirs)
    paths = interchange.save_head(head, "arcface_torch", tmp_path / "ours", ranks)
    for path, part in zip(paths, partial_fc(theirs, ranks), strict=True):
        assert torch.equal(torch.load(path, weights_only=True)["state_dict_softmax_fc"]["weight"], part)
    again = make_head()
    interchange.load_head(again, "arcface_torch", paths[::-1])
    assert torch.equal(again.weight, theirs)


def test_a_head_of_facex_zoo_is_read_and_gives_its_logits(tmp_path: Path, theirs: Tensor) -> None:
    """Against FaceX-Zoo's formulas for AM-Softmax and MV-AM, from the (D, K) weight; where its easy margin is off."""
    torch.save({"state_dict": {"backbone.x": torch.zeros(1), "head.weight": theirs.T}, "epoch": 1, "batch_id": 2},
               tmp_path / "Epoch_1.pt")  # fmt: skip
    x, labels = theirs.repeat(2, 1) + 0.1, torch.arange(K).repeat(2)
    kernel = F.normalize(torch.load(tmp_path / "Epoch_1.pt", weights_only=True)["state_dict"]["head.weight"], dim=0)
    cos = F.normalize(x) @ kernel
    target = cos.gather(1, labels[:, None])
    assert (target > 0.35).all()
    am = cos.scatter(1, labels[:, None], target - 0.35)
    mv_weight = 1.12
    mv = torch.where(cos > target - 0.35, mv_weight * cos + mv_weight - 1, cos).scatter(
        1, labels[:, None], target - 0.35
    )
    assert not torch.equal(am, mv)
    for name, expected in (("AM-Softmax", am), ("MV-AM-Softmax-a", mv)):
        head = make_head(name, s=32.0, m=0.35, t=mv_weight - 1)
        interchange.load_head(head, "facex-zoo", tmp_path / "Epoch_1.pt")
        torch.testing.assert_close(head.logits(x, labels), 32 * expected, rtol=1e-5, atol=1e-4)
    (path,) = interchange.save_head(head, "facex-zoo", tmp_path / "ours" / "Epoch_0.pt")
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["head.weight"], theirs.T)


class Trap:
    def __reduce__(self):
        return os.system, ("touch called",)


def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, theirs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    head = make_head()
    before = head.weight.clone()
    a, b = tmp_path / "checkpoint_gpu_0.pt", tmp_path / "checkpoint_gpu_1.pt"

    def fails(message: str, layout: str, *paths: Path) -> None:
        with pytest.raises(UserError, match=message):
            interchange.load_head(head, layout, list(paths))
        assert torch.equal(head.weight, before)

    torch.save({"state_dict_softmax_fc": {"weight": theirs[:6]}}, a)
    fails(r"checkpoint_gpu_0\.pt: its weight is \(6, 4\), expected \(11, 4\)", "arcface_torch", a)
    torch.save({"state_dict_softmax_fc": {"weight": theirs[5:]}}, b)
    fails(r"checkpoint_gpu_1\.pt: its weight is \(6, 4\), expected \(5, 4\)", "arcface_torch", a, b)
    fails(r"the files of 2 ranks must be those of 0 … 1, got \[1, 1\]", "arcface_torch", b, b)
    fails("arcface_torch keeps a head in 1 … 11 files, got 0", "arcface_torch")
    fails("facex-zoo keeps a head in one file, got 2", "facex-zoo", a, b)
    torch.save({"state_dict": {"head.weight": theirs}}, a)
    fails(r"its weight is \(11, 4\), expected \(4, 11\) as facex-zoo lays it", "facex-zoo", a)
    torch.save({"state_dict": {"backbone.x": theirs}}, a)
    fails(r"no class weights under state_dict and head.weight; its keys are backbone.x", "facex-zoo", a)
    torch.save([1, 2], a)
    fails("no class weights under .*; list", "arcface_torch", a)
    torch.save({"state_dict_softmax_fc": {"weight": theirs}, "opt": Trap()}, a)
    fails(r"checkpoint_gpu_0\.pt: refused: .* asks for \S*system; nothing of it was run", "arcface_torch", a)
    assert not (tmp_path / "called").exists()
    for content in (b"junk", b"", (a.read_bytes())[:300]):
        a.write_bytes(content)
        fails(r"checkpoint_gpu_0\.pt(: refused| is not a whole checkpoint)", "arcface_torch", a)
    fails("can't be read: No such file", "arcface_torch", tmp_path / "none.pt")
    fails("unknown layout 'caffe'; known are: arcface_torch, facex-zoo", "caffe", a)
    with pytest.raises(UserError, match="arcface_torch keeps a head in 1 … 11 files, got 12"):
        interchange.save_head(head, "arcface_torch", tmp_path / "out", 12)


def arcface_torch(depths: tuple[int, ...], widths: tuple[int, ...], side: int, dim: int) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of arcface_torch's IResNet."""
    state: dict[str, Tensor] = {}

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.5, torch.randn(width)
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(width), torch.rand(width) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name: str, into: int, out: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, into, kernel, kernel) / (into**0.5 * kernel)

    conv("conv1", 3, widths[0], 3)
    norm("bn1", widths[0])
    state["prelu.weight"] = torch.rand(widths[0])
    width = widths[0]
    for stage, (depth, out) in enumerate(zip(depths, widths, strict=True), 1):
        for block in range(depth):
            name = f"layer{stage}.{block}"
            norm(f"{name}.bn1", width)
            conv(f"{name}.conv1", width, out, 3)
            norm(f"{name}.bn2", out)
            state[f"{name}.prelu.weight"] = torch.rand(out)
            conv(f"{name}.conv2", out, out, 3)
            norm(f"{name}.bn3", out)
            if block == 0:
                conv(f"{name}.downsample.0", width, out, 1)
                norm(f"{name}.downsample.1", out)
            width = out
    norm("bn2", width)
    state["fc.weight"], state["fc.bias"] = torch.randn(dim, width * side * side) / 10, torch.randn(dim)
    norm("features", dim)
    return state


def forward(state: dict[str, Tensor], depths: tuple[int, ...], x: Tensor) -> Tensor:
    """What arcface_torch's IResNet computes from those, in evaluation mode."""

    def norm(name: str, y: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias)

    x = F.prelu(norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)), state["prelu.weight"])
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            name, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
            y = F.conv2d(norm(f"{name}.bn1", x), state[f"{name}.conv1.weight"], padding=1)
            y = F.prelu(norm(f"{name}.bn2", y), state[f"{name}.prelu.weight"])
            y = norm(f"{name}.bn3", F.conv2d(y, state[f"{name}.conv2.weight"], stride=stride, padding=1))
            if block == 0:
                x = norm(f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2))
            x = x + y
    return norm("features", F.linear(norm("bn2", x).flatten(1), state["fc.weight"], state["fc.bias"]))


def test_a_backbone_of_arcface_torch_computes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    depths, widths = (2, 1, 3, 1), (4, 4, 8, 8)
    state = arcface_torch(depths, widths, 2, 6)
    torch.save(state, tmp_path / "model.pt")
    torch.save({"epoch": 1, "state_dict_backbone": state}, tmp_path / "checkpoint_gpu_0.pt")
    x = torch.randn(2, 3, 32, 32)
    for name in ("model.pt", "checkpoint_gpu_0.pt"):
        model = IResNet(depths, widths, in_channels=3, image_size=32, embedding_dim=6)
        interchange.load_iresnet(model, tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x), forward(state, depths, x), rtol=1e-4, atol=1e-4)
    bare = {f"module.{name}": value for name, value in state.items() if "num_batches" not in name}
    torch.save({"state_dict_backbone": bare}, tmp_path / "ddp.pt")
    model = IResNet(depths, widths, in_channels=3, image_size=32, embedding_dim=6)
    interchange.load_iresnet(model, tmp_path / "ddp.pt")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), forward(state, depths, x), rtol=1e-4, atol=1e-4)
    before = [p.clone() for p in model.parameters()]
    for other, message in (
        (state | {"layer5.0.bn1.weight": torch.ones(1)}, "layer5.0.bn1.weight is only in the file"),
        ({k: v for k, v in state.items() if k != "fc.bias"}, "fc.bias is only in the model"),
        (state | {"fc.bias": torch.ones(7)}, r"fc.bias is \(7,\), expected \(6,\)"),
        (state | {"fc.bias": 3}, "expected the weights of a backbone by name, got dict"),
        ([state], "expected the weights of a backbone by name, got list"),
    ):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(UserError, match=message):
            interchange.load_iresnet(model, tmp_path / "other.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_embeddings_are_mapped_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    np.save(path, np.ones((3, 4), np.float16))
    assert isinstance(interchange.load_embeddings(path), np.memmap)
    for value, message in (
        (np.ones(3), r"expected floats \(N, D\), got float64 \(3,\)"),
        (np.ones((3, 4), int), "got int64"),
        (np.ones((0, 4)), r"\(0, 4\)"),
        (np.array([Trap()], object), "not a readable .npy"),
    ):
        np.save(path, value)
        with pytest.raises(UserError, match=message):
            interchange.load_embeddings(path)
    np.savez(tmp_path / "e.npz", a=np.ones((3, 4)))
    with pytest.raises(UserError, match="several arrays"):
        interchange.load_embeddings(tmp_path / "e.npz")
    for content in (b"junk", b"PK\x03\x04 no whole archive", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a readable \.npy"):
            interchange.load_embeddings(path)


# judge


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    """12 people with 2 images each, whose embeddings are near each other, and pairs of them in two folds."""
    rng = np.random.default_rng(0)
    names = [f"P_{person:02d}_{shot:04d}" for person in range(12) for shot in (1, 2)]
    x = np.repeat(rng.normal(size=(12, 8)), 2, axis=0) + 0.6 * rng.normal(size=(24, 8))
    np.save(tmp_path / "e.npy", x.astype(np.float32))
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in names))
    (tmp_path / "ids.txt").write_text("".join(f"{name[:4]}\n" for name in names))
    lines = ["2\t3"]
    for fold in (0, 1):
        lines += [f"P_{6 * fold + i:02d}\t1\t2" for i in range(3)]
        lines += [f"P_{6 * fold + i:02d}\t1\tP_{6 * fold + i + 3:02d}\t2" for i in range(3)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    return tmp_path


def judged(capsys: pytest.CaptureFixture[str], protocol: str, *options: str | Path) -> list[str]:
    assert main(["judge", "--protocol", protocol, *map(str, options)]) == 0
    return capsys.readouterr().out.splitlines()


def fails(capsys: pytest.CaptureFixture[str], protocol: str, *options: str | Path) -> str:
    assert main(["judge", "--protocol", protocol, *map(str, options)]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    return printed.err


def test_pairs_are_judged_as_the_protocol_does(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.load(lfw / "e.npy")
    left = np.array([0, 2, 4, 0, 2, 4, 12, 14, 16, 12, 14, 16])
    right = np.array([1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23])
    same = np.tile([True] * 3 + [False] * 3, 2)
    expected = protocols.kfold_accuracy(protocols.pair_cosines(x, left, right), same, np.repeat([0, 1], 6))
    given = ("--embeddings", lfw / "e.npy", "--names", lfw / "names.txt", "--pairs", lfw / "pairs.txt")
    assert "is read, and would be written over" in fails(capsys, "lfw", *given, "--out", given[1])
    printed = judged(capsys, "lfw", *given, "--out", lfw / "out.json")
    assert printed[0] == f"accuracy: {100 * expected.mean:.2f} %"
    assert json.loads((lfw / "out.json").read_text()) == {
        "protocol": "lfw",
        "metrics": {"accuracy": expected.mean, "standard deviation over folds": expected.std},
    }


def test_figures_are_not_written_among_lists(
    lfw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--embeddings", lfw / "e.npy", "--names", lfw / "names.txt")
    (data := tmp_path / "data" / "lfw" / "images").mkdir(parents=True)
    (lists := tmp_path / "lists").mkdir()
    (lists / "test_set.txt").write_text("1\n")
    error = fails(capsys, "blufr", *given, "--lists", lists, "--out", lists / "test_set.txt")
    assert f"{lists / 'test_set.txt'} is read, and would be written over" in error
    monkeypatch.setenv("MVREPRO_DATA", str(tmp_path / "data"))
    for protocol, out in (("lfw", "pairs.txt"), ("blufr", "blufr/test_set.txt")):
        error = fails(capsys, protocol, *given, "--out", data.parent / out)
        assert f"lies in {data.parent}, which is read" in error
    assert "could not write /proc/x.json" in fails(capsys, "lfw", *given, "--pairs", lfw / "pairs.txt", "--out", "/proc/x.json")  # fmt: skip  # noqa: E501


def test_the_convention_of_insightface_is_asked_for_by_name(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.load(lfw / "e.npy")
    left, right = np.arange(20), np.r_[np.arange(20) ^ 1][np.r_[0:10, 15:20, 10:15]]
    same = left // 2 == right // 2
    np.save(lfw / "bin.npy", x[np.stack([left, right], 1).ravel()])
    images.write_bin(lfw / "x.bin", [b"jpeg"] * 40, same)
    given = ("--embeddings", lfw / "bin.npy", "--bin", lfw / "x.bin")
    printed, scores = {}, protocols.pair_cosines(x, left, right)
    for convention in ("exact", "insightface"):
        folds = images.Pairs.in_order(same).folds
        found = protocols.kfold_accuracy(scores, same, folds, convention)
        printed[convention] = judged(capsys, "bin", *given, "--convention", convention, "--out", lfw / "out.json")
        assert printed[convention] == [
            f"accuracy: {100 * found.mean:.2f} %", f"standard deviation over folds: {100 * found.std:.2f} %",
        ]  # fmt: skip
        assert json.loads((lfw / "out.json").read_text())["convention"] == convention
    assert judged(capsys, "bin", *given) == printed["exact"] != printed["insightface"]


def test_an_insightface_set_is_judged_in_its_order(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.load(lfw / "e.npy")
    rows = np.concatenate([np.arange(24).reshape(12, 2), np.roll(np.arange(24), 3).reshape(12, 2)])
    same = np.array([True] * 12 + [False] * 12)
    order = np.random.default_rng(1).permutation(24)
    np.save(lfw / "bin.npy", x[rows[order].ravel()])
    images.write_bin(lfw / "x.bin", [b"jpeg"] * 48, same[order])
    printed = judged(capsys, "bin", "--embeddings", lfw / "bin.npy", "--bin", lfw / "x.bin")
    scores = protocols.pair_cosines(x, *rows[order].T)
    expected = protocols.kfold_accuracy(scores, same[order], images.Pairs.in_order(same[order]).folds)
    assert printed[0] == f"accuracy: {100 * expected.mean:.2f} %"
    assert "has 24 rows" in fails(capsys, "bin", "--embeddings", lfw / "e.npy", "--bin", lfw / "x.bin")


def test_the_other_protocols_are_reached(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, ids = np.load(lfw / "e.npy"), (lfw / "ids.txt").read_text().split()
    common = ("--embeddings", lfw / "e.npy", "--ids", lfw / "ids.txt")
    (point,) = protocols.all_pairs(x, ids, [0.1])
    assert judged(capsys, "all-pairs", *common, "--fprs", "0.1") == [f"tpr@fpr=0.1: {100 * point.tpr:.2f} %"]
    others = np.random.default_rng(2).normal(size=(2000, 8))
    np.save(lfw / "d.npy", others)
    np.save(lfw / "p.npy", x[0::2])
    np.save(lfw / "g.npy", x[1::2])
    (lfw / "half.txt").write_text("\n".join(ids[0::2]))
    gallery = ("--gallery", lfw / "g.npy", "--gallery-ids", lfw / "half.txt", "--distractors", lfw / "d.npy")
    probes = ("--embeddings", lfw / "p.npy", "--ids", lfw / "half.txt")
    printed = judged(capsys, "identify", *probes, *gallery, "--sizes", "10", "2000")
    found = protocols.identify(x[0::2], ids[0::2], x[1::2], ids[0::2], others, sizes=[10, 2000])
    assert printed == [f"rank1@{n}: {100 * rate:.2f} %" for n, rate in zip((10, 2000), found.rates[:, 0], strict=True)]
    error = fails(capsys, "megaface", *common, "--distractors", lfw / "d.npy")
    assert "megaface: " in error and "1e-06" in error  # 48,000 scores measure no FAR of 1e-6
    printed = judged(
        capsys, "megaface", *common, "--distractors", lfw / "d.npy", "--fars", "1e-3", "0.1", "--sizes", "9"
    )
    points = protocols.megaface(x, ids, others, sizes=[9], fars=[1e-3, 0.1]).points
    assert printed[1:] == [f"tpr@far={p.fpr:g}: {100 * p.tpr:.2f} %" for p in points] and "rank1@9" in printed[0]
    assert "trillion-pairs: " in fails(capsys, "trillion-pairs", *common, "--distractors", lfw / "d.npy")
    for kind, content in (
        ("test", "1\n4\n1, P_00_0001\n2, P_00_0002\n3, P_01_0001\n4, P_01_0002\n"),
        ("gallery", "1\n1\n1, P_00_0001\n"),
        ("probe", "1\n2\n2, P_00_0002\n3, P_01_0001\n"),
    ):
        (lfw / f"{kind}_set.txt").write_text(content)
    error = fails(capsys, "blufr", "--embeddings", lfw / "e.npy", "--names", lfw / "names.txt", "--lists", lfw)
    assert error.startswith("mvrepro judge: blufr: ")  # 4 impostor pairs measure no FAR of 0.1 %


def test_names_with_folders_before_them_are_known(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As embed writes them of a folder with a folder a person."""
    names = (lfw / "names.txt").read_text().split()
    (lfw / "deep.txt").write_text("".join(f"{name[:4]}/{name}.jpg\n" for name in names))
    given = ("--embeddings", lfw / "e.npy", "--pairs", lfw / "pairs.txt", "--names")
    assert judged(capsys, "lfw", *given, lfw / "deep.txt") == judged(capsys, "lfw", *given, lfw / "names.txt")
    every = [*names, *(f"S{i:02d}_0001" for i in range(100))]
    rng = np.random.default_rng(3)
    np.save(lfw / "b.npy", np.concatenate([np.load(lfw / "e.npy"), rng.normal(size=(100, 8))]))
    for kind, rows in (("test", every), ("gallery", names[::2]), ("probe", [*names[1::2], *every[24:]])):
        (lfw / f"{kind}_set.txt").write_text(f"1\n{len(rows)}\n" + "".join(f"{i}, {n}\n" for i, n in enumerate(rows)))
    (lfw / "every.txt").write_text("".join(f"x/{name}.jpg\n" for name in every))
    printed = judged(capsys, "blufr", "--embeddings", lfw / "b.npy", "--names", lfw / "every.txt", "--lists", lfw)
    trials = protocols.blufr_trials(every, lfw)
    found = protocols.blufr(np.load(lfw / "b.npy"), trials)
    assert printed == [
        f"vr@far=0.001: {100 * found.summary('vr'):.2f} %", f"dir@far=0.01: {100 * found.summary('dir'):.2f} %",
        f"strict dir@far=0.01: {100 * found.summary('strict_dir'):.2f} %",
    ]  # fmt: skip
    (lfw / "probe_set.txt").write_text("1\n62\n" + "".join(f"1, {name}\n" for name in [*names[1::2], *every[-50:]]))
    asked = ("--embeddings", lfw / "b.npy", "--names", lfw / "every.txt", "--lists", lfw, "--out", lfw / "found.json")
    assert [line.split("@")[0] for line in judged(capsys, "blufr", *asked)] == ["vr", "dir"]  # of 50 strangers
    assert list(json.loads((lfw / "found.json").read_text())["metrics"]) == ["vr@far=0.001", "dir@far=0.01"]


def test_what_is_missing_is_named(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    e = lfw / "e.npy"
    assert "the protocol lfw needs --names, too" in fails(capsys, "lfw", "--embeddings", e)
    assert "needs --gallery, --gallery-ids, --distractors, too" in fails(
        capsys, "identify", "--embeddings", e, "--ids", lfw / "ids.txt"
    )
    (lfw / "short.txt").write_text("a\nb\n")
    assert f"short.txt has 2 lines, {e} has 24 rows" in fails(
        capsys, "all-pairs", "--embeddings", e, "--ids", lfw / "short.txt"
    )
    (lfw / "hole.txt").write_text("a\n\nb\n")
    assert "hole.txt, line 2: empty" in fails(capsys, "all-pairs", "--embeddings", e, "--ids", lfw / "hole.txt")
    assert "can't be read as a list" in fails(capsys, "all-pairs", "--embeddings", e, "--ids", lfw / "none.txt")
    x = np.load(e)
    x[3] = 0
    np.save(e, x)
    assert "all-pairs: embeddings must be finite and of length > 0; row 3 is not" in fails(
        capsys, "all-pairs", "--embeddings", e, "--ids", lfw / "ids.txt"
    )


def test_lists_of_other_editors_give_the_same_figures(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, names = lfw / "e.npy", (lfw / "names.txt").read_text().split()
    ids = ["Bo" if i < 12 else "Zo\u00eb" for i in range(24)]
    pairs, want = ("--pairs", lfw / "pairs.txt"), []
    for number, end in enumerate(("\n", "\r\n", " \t\n", "\r")):
        form, mark = ("NFD", "\ufeff") if number else ("NFC", "")
        text = end.join(unicodedata.normalize(form, line) for line in ids) + end * (1 + number)
        (lfw / "i.txt").write_bytes((mark + text).encode())
        (lfw / "n.txt").write_bytes((mark + end.join(name + ".jpg" * (number % 2) for name in names)).encode())
        want.append([judged(capsys, "all-pairs", "--embeddings", x, "--ids", lfw / "i.txt", "--fprs", "0.1"),
                     judged(capsys, "lfw", "--embeddings", x, "--names", lfw / "n.txt", *pairs)])  # fmt: skip
    (lfw / "pairs.txt").write_bytes(b"\xef\xbb\xbf" + (lfw / "pairs.txt").read_bytes().replace(b"\n", b"\r\n"))
    want.append([want[0][0], judged(capsys, "lfw", "--embeddings", x, "--names", lfw / "n.txt", *pairs)])
    assert want == [want[0]] * 5


@pytest.mark.parametrize("protocol", ["lfw", "blufr", "cfp-ff", "cfp-fp"])
def test_an_image_with_two_rows_is_named_with_both_lines(
    lfw: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    lines = (lfw / "names.txt").read_text().splitlines()
    lines[9] = f"{lines[2]}.jpg"
    (lfw / "names.txt").write_text("\n".join(lines))
    where = {"lfw": ("--pairs", lfw / "pairs.txt"), "blufr": ("--lists", lfw)}.get(protocol, ())
    error = fails(capsys, protocol, "--embeddings", lfw / "e.npy", "--names", lfw / "names.txt", *where)
    assert f"names.txt, lines 3 and 10: {lines[2]} stands there twice" in error


@pytest.mark.parametrize("protocol", ["lfw", "blufr"])
def test_an_image_in_two_folders_is_named_with_both_lines(
    lfw: Path, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    lines = (lfw / "names.txt").read_text().splitlines()
    lines[9], lines[2] = f"y\\{lines[2]}.jpg", f"x/{lines[2]}"
    (lfw / "names.txt").write_text("\n".join(lines))
    where = ("--pairs", lfw / "pairs.txt") if protocol == "lfw" else ("--lists", lfw)
    error = fails(capsys, protocol, "--embeddings", lfw / "e.npy", "--names", lfw / "names.txt", *where)
    assert f"names.txt, lines 3 and 10: {lines[2][2:]} stands there twice" in error


def test_images_of_cfp_are_known_below_other_folders_and_missed_by_name(
    lfw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    protocol = lfw / "cfp" / "protocol"
    (lfw / "cfp" / "images").mkdir(parents=True)
    names = [f"{person:03d}/frontal/{shot:02d}" for person in range(1, 13) for shot in (1, 2)]
    for fold in range(1, 11):
        (folder := protocol / "Split" / "FF" / f"{fold:02d}").mkdir(parents=True)
        (folder / "same.txt").write_text("1,2\n3,4\n")
        (folder / "diff.txt").write_text("1,3\n5,7\n")
    listed = "".join(f"{i} ../Data/Images/{name}.jpg\n" for i, name in enumerate(names, 1))
    (protocol / "Pair_list_F.txt").write_text(listed)
    monkeypatch.setenv("MVREPRO_DATA", str(lfw))
    given, found = ("--embeddings", lfw / "e.npy", "--names", lfw / "n.txt"), []
    for form in ("{}", "images/{}.jpg", "images/{}.png"):
        lines = [form.format(name) for name in names]
        text = "\n".join(lines)
        (lfw / "n.txt").write_text(text.replace("/", "\\") if form.endswith(".png") else text)
        found.append(judged(capsys, "cfp-ff", *given))
    assert found == [found[0]] * 3
    (lfw / "n.txt").write_text("\n".join([names[0], "999/frontal/09", *names[2:]]))
    error = fails(capsys, "cfp-ff", *given)
    assert "names lack 001/frontal/02 (" in error and "they are such as 001/frontal/01" in error


def test_an_option_of_another_protocol_is_refused(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--embeddings", lfw / "e.npy", "--ids", lfw / "ids.txt")
    error = fails(capsys, "all-pairs", *given, "--pairs", lfw / "pairs.txt", "--sizes", "3")
    assert "the protocol all-pairs knows nothing of --pairs, --sizes" in error
    assert "knows nothing of --fprs" in fails(capsys, "megaface", *given, "--distractors", lfw / "e.npy", "--fprs", "1")


def test_text_for_embeddings_is_said_to_be_none(lfw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(capsys, "all-pairs", "--embeddings", lfw / "ids.txt", "--ids", lfw / "ids.txt")
    assert "ids.txt is not a readable .npy file: it holds no plain array of numbers" in error


def test_help_names_every_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in PROTOCOLS)


needs_data = pytest.mark.skipif(not os.environ.get("MVREPRO_DATA"), reason="MVREPRO_DATA is not set")


@needs_data
def test_the_real_lists_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random embeddings of the real names: near chance by every protocol."""
    from mvrepro.images import photographs

    rng = np.random.default_rng(0)
    for folder, protocols_ in (("lfw", ["lfw"]), ("cfp", ["cfp-ff", "cfp-fp"])):
        images = sorted((photographs.folder(folder) / "images").rglob("*.jpg"))
        start = photographs.folder(folder) / "images"
        names = [p.stem if folder == "lfw" else p.relative_to(start).with_suffix("").as_posix() for p in images]
        (tmp_path / "names.txt").write_text("\n".join(names))
        np.save(tmp_path / "e.npy", rng.normal(size=(len(names), 16)))
        for protocol in protocols_:
            line, _ = judged(capsys, protocol, "--embeddings", tmp_path / "e.npy", "--names", tmp_path / "names.txt")
            assert 45 < float(line.split()[1]) < 55
