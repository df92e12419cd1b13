"""Training: the record, the same bits twice, divergence, checkpoints, and that nothing half-done is written."""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trees import commit, run_git

from mvrepro import LOSSES, MarginHead, networks, provenance
from mvrepro.commands.train import set_environment
from mvrepro.determinism import ENVIRONMENT
from mvrepro.errors import UserError
from mvrepro.files import ROOT, read_json
from mvrepro.images import Pixels, write_bin
from mvrepro.training import checkpoint, loop, tasks
from mvrepro.training.batches import Feed, normalised
from mvrepro.training.config import TrainConfig
from mvrepro.training.logs import Course, Diverged
from mvrepro.training.loop import Session, prepare, train
from mvrepro.training.network import check_network
from mvrepro.training.ranks import Ranks, pick_device

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    """Training sets threads and determinism for the whole process; other test files have their own."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def toy(**changes: Any) -> TrainConfig:
    """A run of a tenth of a second: digits, two dimensions."""
    settings = {
        "profile": "toy",
        "loss": "AM-Softmax",
        "seed": 0,
        "data": "digits",
        "backbone": "toy",
        "embedding_dim": 2,
        "epochs": 1,
        "batch_size": 64,
        "lr": 0.01,
        "milestones": (),
        "flip": False,
        "s": 16.0,
        "device": "cpu",
    }
    return TrainConfig(**settings | changes)


def faces(**changes: Any) -> TrainConfig:
    """A run of half a second: ORL faces of 16×16."""
    settings = {"profile": "quick", "data": "orl", "backbone": "iresnet-tiny", "embedding_dim": 16, "image_size": 16}
    return toy(**settings | {"batch_size": 50, "lr": 0.05, "flip": True, "s": 32.0} | changes)


def synthetic(**changes: Any) -> TrainConfig:
    """Noise of ten classes."""
    return toy(**{"data": "synthetic", "synthetic_classes": 10, "image_size": 8} | changes)


CONFIGS = pytest.mark.parametrize("config_of", [toy, faces])


def few(images: Pixels, **changes: Any) -> tuple[Session, list[float]]:
    """A session on these images, ready to take its steps, and the losses of every step that it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "few", lambda: tasks.Task(images, images, lambda embeddings, weights: ({}, {})))
        session = prepare(toy(data="few", **changes), ALONE)
    losses: list[float] = []
    session.network.head.register_forward_hook(lambda *given: losses.append(given[-1].item()))
    return session, losses


def fit(session: Session) -> Course:
    return session.steps(0, {}, None, None, keep_last=False)[0]


def fit_few(images: int, **changes: Any) -> tuple[dict[str, list[float]], MarginHead, list[float]]:
    """Train on so many random images of four classes; returns the curve, the head, and the loss of every step."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 1, 8, 8), dtype=np.uint8)
    session, losses = few(Pixels(pixels, np.arange(images) % 4), **changes)
    return fit(session).curve, session.network.head, losses


# The record


@CONFIGS
def test_record_says_what_was_done(config_of: Any, tmp_path: Path) -> None:
    config = config_of(loss="MV-AM-Softmax-a", epochs=2, milestones=(1,))
    record = train(config, out=tmp_path / "run.json")
    assert list(record) == ["config", "config_hash", "code", "sizes", "metrics", "learned", "curve", "provenance"]
    assert TrainConfig(**record["config"], profile=config.profile) == config
    expected = hashlib.sha256(json.dumps(config.decisive(), sort_keys=True).encode()).hexdigest()[:16]
    assert record["config_hash"] == expected
    watched = ["marked_share", "target_cosine", "negative_cosine", "top1", "median_p_y", "gradient_distance"]
    assert list(record["curve"]) == ["loss", "lr", *watched]
    assert {len(values) for values in record["curve"].values()} == {2}
    assert all(0 <= share <= 1 for share in [*record["metrics"].values(), *record["curve"]["marked_share"]])
    assert all(-1 <= cosine <= 1 for cosine in record["curve"]["target_cosine"])
    assert read_json(tmp_path / "run.json") == json.loads(json.dumps(record))


def test_record_has_the_sizes_of_what_was_trained() -> None:
    # Linear without bias + BN + PReLU, twice, then a linear layer with its bias and BN.
    toy_net = (64 * 128 + 2 * 128 + 1) + (128 * 128 + 2 * 128 + 1) + (128 * 2 + 2 + 2 * 2)
    assert train(toy(epochs=0))["sizes"] == {
        "train_images": 676,
        "train_classes": 5,
        "test_images": 225,
        "parameters": toy_net,
        "ranks": 1,
        "steps": 0,
    }
    sizes = train(faces(epochs=0, train_people=30))["sizes"]
    assert (sizes["train_images"], sizes["train_classes"], sizes["test_images"]) == (300, 30, 100)


def test_metrics_are_named_for_what_they_are() -> None:
    assert list(train(toy())["metrics"]) == ["accuracy"]
    assert list(train(faces(fprs=(0.1, 0.001)))["metrics"]) == ["tpr@fpr=0.1", "tpr@fpr=0.001"]


def test_provenance_says_where_the_numbers_come_from() -> None:
    provenance = train(toy(epochs=0))["provenance"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert provenance["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert provenance["dirty"] in ((True, False) if commit.returncode == 0 else (None,))
    assert provenance["device"].startswith("CPU")
    assert provenance["threads"] == 1
    assert provenance["deterministic_algorithms"] is True
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["wall_s"] > 0
    assert 50 < provenance["peak_resident_mib"] < 50_000  # MiB, whatever the system counts in
    assert provenance["peak_gpu_mib"] is None
    assert not [value for value in provenance.values() if isinstance(value, str) and str(ROOT) in value]


@pytest.mark.parametrize(("name", "dirty"), [("benchmarks/head.py", True), ("README.md", False)])
def test_a_commit_is_dirty_where_what_a_result_depends_on_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dirty: bool
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("before")
    run_git(tmp_path, "init", "-q")
    commit(tmp_path)
    (tmp_path / name).write_text("after")
    monkeypatch.setattr(provenance, "CLONE", True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.provenance(0.0, "cpu", 1)["dirty"] is dirty


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (faces(), "AM-Softmax_seed0"),
        (faces(loss="MV-Arc-Softmax-f", t=0.3, seed=7), "MV-Arc-Softmax-f_t0.3_seed7"),
        (faces(loss="SV-Softmax", t=0.0), "SV-Softmax_t0_seed0"),
        (toy(embedding_dim=3), "AM-Softmax_3d_seed0"),
        (toy(loss="MV-AM-Softmax-a"), "MV-AM-Softmax-a_t0.2_2d_seed0"),
    ],
)
def test_run_names(config: TrainConfig, name: str) -> None:
    assert config.run_name() == name


# The same bits


def numbers(config: TrainConfig) -> str:
    """Metrics and curve, exactly."""
    record = train(config)
    return json.dumps([record["metrics"], record["curve"]])


@pytest.mark.parametrize(
    "config",
    [toy(), toy(loss="F-Softmax", flip=True), faces(), faces(loss="MV-Arc-Softmax-a"), faces(loss="HM-AM-Softmax")],
    ids=TrainConfig.run_name,
)
def test_a_seed_gives_the_same_bits_and_another_gives_others(config: TrainConfig) -> None:
    first = numbers(config)
    torch.rand(5), np.random.rand(5)  # noqa: NPY002 (what was drawn before must not matter)
    assert numbers(config) == first
    assert numbers(dataclasses.replace(config, seed=1)) != first


@CONFIGS
def test_what_was_trained_before_does_not_matter(config_of: Any) -> None:
    first = numbers(config_of())
    numbers(config_of(loss="MV-AM-Softmax-a", seed=3, epochs=2))
    assert numbers(config_of()) == first


def test_another_process_gives_the_same_bits() -> None:
    code = """
import json, sys
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import train
records = [train(TrainConfig(**settings)) for settings in json.loads(sys.argv[1])]
print(json.dumps([[record["metrics"], record["curve"]] for record in records]))
"""
    configs = [faces(loss="MV-AM-Softmax-a"), toy()]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([dataclasses.asdict(config) for config in configs])],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[{', '.join(numbers(config) for config in configs)}]"


# Learning


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_falls_and_digits_are_told_apart(loss: str) -> None:
    record = train(toy(loss=loss, embedding_dim=3, epochs=4))
    assert record["curve"]["loss"][-1] < 0.2 * record["curve"]["loss"][0]
    assert record["curve"]["target_cosine"][-1] > record["curve"]["target_cosine"][0] + 0.5
    assert record["metrics"]["accuracy"] > 0.9  # chance is 0.2


@pytest.mark.parametrize("loss", ["Softmax", "AM-Softmax"])
def test_loss_falls_on_faces(loss: str) -> None:
    """What is learned in a second is not seen at the test yet: an untrained network is nearly as good there."""
    curve = train(faces(loss=loss, epochs=5))["curve"]
    assert curve["loss"][-1] < 0.7 * curve["loss"][0]
    assert curve["target_cosine"][-1] > curve["target_cosine"][0] + 0.2
    assert curve["marked_share"][-1] < 0.7 * curve["marked_share"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.02},
        {"momentum": 0.8},
        {"weight_decay": 0.0},
        {"decay_all": False},
        {"batch_size": 32},
        {"flip": True},
        {"s": 15.0},
        {"m": 0.3},
        {"loss": "MV-AM-Softmax-f"},
        {"loss": "MV-AM-Softmax-f", "t": 0.1},
        {"loss": "MV-AM-Softmax-f", "t_warmup": 20},
        {"loss": "MV-AM-Softmax-f", "easy_margin": True},
        {"loss": "F-AM-Softmax"},
        {"loss": "F-AM-Softmax", "gamma": 0.5},
        {"loss": "HM-AM-Softmax"},
        {"loss": "HM-AM-Softmax", "hard_ratio": 0.5},
        {"loss": "A-Softmax"},
        {"loss": "A-Softmax", "annealing": True},
    ],
    ids=str,
)
def test_every_setting_reaches_the_training(changes: dict[str, Any]) -> None:
    """Against the run without the last of the changes."""
    without = dict(list(changes.items())[:-1])
    assert numbers(toy(**changes)) != numbers(toy(**without))


@pytest.mark.parametrize(
    ("milestones", "lr"),
    [
        ((), [0.01, 0.01, 0.01, 0.01]),
        ((1, 3), [0.01, 0.001, 0.001, 0.0001]),
        ((2,), [0.01, 0.01, 0.001, 0.001]),
        ((9,), [0.01, 0.01, 0.01, 0.01]),
    ],
)
def test_lr_is_divided_by_ten_after_the_milestones(milestones: tuple[int, ...], lr: list[float]) -> None:
    curve, _, _ = fit_few(8, epochs=4, milestones=milestones)
    assert curve["lr"] == pytest.approx(lr)


def test_lr_is_what_the_steps_are_taken_with() -> None:
    """A tenth of it, and the first step is a tenth as long."""
    _, untrained, _ = fit_few(8, epochs=0)
    long, short = (fit_few(8, lr=lr, momentum=0.0)[1].weight - untrained.weight for lr in (0.01, 0.001))
    assert long.norm() > 0
    torch.testing.assert_close(long, 10 * short, rtol=1e-3, atol=1e-6)


def test_t_warmup_counts_the_steps_of_training() -> None:
    _, head, _ = fit_few(8, loss="MV-AM-Softmax-a", batch_size=4, epochs=3, t_warmup=12)
    assert head.step == 6
    head.train()
    assert head.current_t() == pytest.approx(0.1)


def test_a_batch_of_one_image_is_skipped() -> None:
    """Batch normalisation has no variance of one image."""
    curve, head, losses = fit_few(9, batch_size=4, epochs=2)
    assert head.step == len(losses) == 4
    assert all(map(math.isfinite, curve["loss"]))


@pytest.mark.parametrize("images", [8, 9])
def test_loss_of_an_epoch_is_the_mean_over_its_images(images: int) -> None:
    curve, _, losses = fit_few(images, batch_size=4)
    assert curve["loss"] == [pytest.approx(sum(losses) / 2, abs=1e-6)]


def test_batches_of_one_image_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size"):
        train(toy(batch_size=1))


def test_weight_decay_can_spare_biases_and_scales() -> None:
    session, _ = few(Pixels(np.zeros((8, 1, 8, 8), np.uint8), np.arange(8) % 4), decay_all=False)
    decays, others = session.network.sgd.param_groups
    assert (decays["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert {p.ndim for p in decays["params"]} == {2} and {p.ndim for p in others["params"]} == {1}
    session.network.set_rate(0.5)
    assert decays["lr"] == others["lr"] == 0.5


# Has it learned?


def test_a_record_says_whether_its_network_has_learned() -> None:
    names = {"top1", "marked_share", "median_p_y", "own_cosine", "other_cosine", "loss_slope", "gradient_distance"}
    before, after = (train(toy(loss="AM-Softmax", embedding_dim=3, epochs=epochs))["learned"] for epochs in (2, 12))
    assert before.keys() == after.keys() == names | {"histogram"}
    for counts in after["histogram"].values():
        assert len(counts.split()) == 200 and sum(map(int, counts.split())) == 676  # training images
    assert after["top1"] > 0.95 and after["own_cosine"] > before["own_cosine"] and after["other_cosine"] < 0.2
    assert after["marked_share"] < before["marked_share"] and 0 < after["median_p_y"] <= 1
    assert before["loss_slope"] < after["loss_slope"] < 0.1
    assert after["gradient_distance"] == 0  # its own margin loss
    assert train(toy(loss="MV-AM-Softmax-a", epochs=2))["learned"]["gradient_distance"] > 0.01


# Divergence


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"lr": 1e30}, r"nan at step 2 \(epoch 1\) of AM-Softmax_2d_seed0 with lr 1e\+30, s 16: "),
        ({"lr": 1e30, "batch_size": 676, "epochs": 3}, r"nan at step 2 \(epoch 2\) of AM-Softmax_2d_seed0 "),
        (
            {"loss": "MV-Arc-Softmax-a", "lr": 1e30},
            r"\w+ at step 2 \(epoch 1\) of MV-Arc-Softmax-a_t0.2_2d_seed0 with lr 1e\+30, s 16: ",
        ),
    ],
)
def test_a_diverged_run_says_where_and_what_to_try_and_writes_nothing(
    changes: dict[str, Any], where: str, tmp_path: Path
) -> None:
    cure = "try a smaller --lr, .*a warm-up of t .--t-warmup., --easy-margin, .*or --start-from a margin model; "
    with pytest.raises(
        Diverged, match=f"^the loss became {where}.*{cure}no record was written, and snapshots .* stay$"
    ):
        train(toy(**changes), out=tmp_path / "run.json", save=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_diverged_is_an_error_for_the_user() -> None:
    assert issubclass(Diverged, UserError)


@pytest.mark.parametrize("config", [toy(lr=1e30, batch_size=676), faces(lr=1e30, batch_size=200)], ids=["toy", "faces"])
def test_a_run_that_diverges_at_its_last_step_is_no_run(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train(config, out=tmp_path / "run.json")
    assert list(tmp_path.iterdir()) == []


# Files


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full when a file or folder of that name is moved into place."""
    for how in ("replace", "rename"):
        real = getattr(Path, how)

        def move(self: Path, target: Path, real: Any = real) -> Path:
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, target)

        monkeypatch.setattr(Path, how, move)


@pytest.mark.parametrize(
    ("config_of", "name", "save"),
    [(faces, "run.json", None), (toy, "run.safetensors", None), (faces, "model", "model"), (toy, "model", "model")],
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "over"])
def test_a_write_that_fails_leaves_what_was_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config_of: Any, name: str, save: str | None, old: bool
) -> None:
    if old:
        for file in ("run.json", "run.safetensors"):
            (tmp_path / file).write_text("old")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    fail_at(monkeypatch, name)
    with pytest.raises(UserError, match=f"could not write .*{name}.*the disk is full: free some space"):
        train(config_of(epochs=0), out=tmp_path / "run.json", save=tmp_path / save if save else None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_the_record_is_written_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A record stands for a whole run: where it is, features and checkpoint are too."""
    fail_at(monkeypatch, "run.json")
    with pytest.raises(UserError, match="the disk is full"):
        train(toy(epochs=0), out=tmp_path / "run.json", save=tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"run.safetensors", "model"}


def test_what_is_there_and_no_checkpoint_is_not_saved_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "site").mkdir()
    for name in ("manifest.json", "index.html"):  # others call a file so, too
        (tmp_path / "site" / name).write_text("{}")
    for place in ("mine", "mine/thesis.txt", "site"):
        with pytest.raises(UserError, match="is there already and no checkpoint: choose another place for --save"):
            train(toy(epochs=0), save=tmp_path / place)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "site" / "index.html").read_text() == "{}"
    train(toy(epochs=0), save=tmp_path / "model")
    first = (tmp_path / "model" / "rank-0.safetensors").read_bytes()
    train(toy(epochs=0, seed=1), save=tmp_path / "model")  # one's own is replaced
    assert (tmp_path / "model" / "rank-0.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_in_the_place_of_the_record_is_told_of_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "d.json").mkdir()
    with pytest.raises(UserError, match=r"could not write .*d\.json: it is a folder; name a file"):
        train(toy(), out=tmp_path / "d.json", work=tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    steps = train(toy())["sizes"]["steps"]
    train(toy(warmup=steps))
    train(toy(warmup=99999, steps=2))  # a try of a run that is longer
    with pytest.raises(UserError, match=rf"a warm-up of {steps + 1} steps, but the run has {steps}: set a --warmup"):
        train(toy(warmup=steps + 1))


def test_a_record_does_not_lie_where_the_network_is_saved(tmp_path: Path) -> None:
    """The network would take the place of the log and the snapshots that were written there."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for save in ("run", "link"):
        with pytest.raises(UserError, match=r"^--out .* lies in --save .*: choose another place for one$"):
            train(toy(epochs=0), out=tmp_path / "run" / "record.json", work=tmp_path / "run", save=tmp_path / save)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_toy_features_go_beside_the_record(tmp_path: Path, dim: int, flip: bool) -> None:
    record = train(toy(embedding_dim=dim, flip=flip), out=tmp_path / "a" / "run.json")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["run.json", "run.safetensors"]
    found = load_file(tmp_path / "a" / "run.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()} == {
        "features": ((225, dim), torch.float32),
        "ids": ((225,), torch.int64),
        "weights": ((5, dim), torch.float32),
    }
    # They are those of the record: what it says of them can be computed from them.
    features, weights = (found[name].double().numpy() for name in ("features", "weights"))
    nearest = (features @ (weights / np.linalg.norm(weights, axis=1, keepdims=True)).T).argmax(axis=1)
    assert record["metrics"]["accuracy"] == pytest.approx((nearest == found["ids"].numpy()).mean())


def test_faces_have_no_features_beside_their_record(tmp_path: Path) -> None:
    train(faces(epochs=0), out=tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_train_alone_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(toy())
    assert list(tmp_path.iterdir()) == []


# Checkpoints


@CONFIGS
def test_a_checkpoint_gives_the_same_embeddings(config_of: Any, tmp_path: Path) -> None:
    config = config_of()
    saved = train(config, save=tmp_path / "model")
    # Without a step of training, the record is the same.
    again = train(dataclasses.replace(config, epochs=0), begin=tmp_path / "model")
    assert again["metrics"] == saved["metrics"]
    assert again["metrics"] != train(dataclasses.replace(config, epochs=0))["metrics"]


def save(session: Session, path: Path) -> None:
    checkpoint.write_checkpoint(path, 0, session.network, {"about": session.about()}, {})


def embeddings(session: Session) -> torch.Tensor:
    images = normalised(torch.from_numpy(session.test.pixels), True)
    return networks.embed(session.network.backbone, images, mirror=True)


def test_a_checkpoint_holds_every_bit_and_the_settings(tmp_path: Path) -> None:
    config = toy(loss="MV-AM-Softmax-a", seed=3)
    session, other = (prepare(c, ALONE) for c in (config, dataclasses.replace(config, seed=4)))
    session.network.head.step += 17
    save(session, tmp_path / "model")
    other.test.pixels = session.test.pixels
    assert not torch.equal(embeddings(other), embeddings(session))
    checkpoint.start_from(tmp_path / "model", other.network)
    assert torch.equal(embeddings(other), embeddings(session))
    assert torch.equal(other.network.head.weight, session.network.head.weight)
    assert other.network.head.step == 0  # a warm-up of t starts anew
    about = json.loads((tmp_path / "model" / "manifest.json").read_text())["about"]
    assert {"data": "digits", **about}.items() >= config.decisive().items()


def test_margin_epochs_are_those_of_the_margin_loss() -> None:
    """The first epochs are AM-Softmax to the bit; then t comes in."""
    margin = train(toy(loss="AM-Softmax", epochs=3))["curve"]
    first = train(toy(loss="MV-AM-Softmax-f", epochs=3, margin_epochs=2))["curve"]
    assert first["loss"][:2] == margin["loss"][:2]
    assert first["target_cosine"] == margin["target_cosine"]  # those of the first step of an epoch
    assert first["loss"][2] > margin["loss"][2]
    never = train(toy(loss="MV-AM-Softmax-f", epochs=3, margin_epochs=3))["curve"]
    assert never == margin


def test_an_mv_loss_starts_from_a_margin_model(tmp_path: Path) -> None:
    train(toy(loss="AM-Softmax", epochs=2), save=tmp_path / "am")
    from_scratch = train(toy(loss="MV-AM-Softmax-a"))["curve"]
    from_margin = train(toy(loss="MV-AM-Softmax-a"), begin=tmp_path / "am")["curve"]
    assert from_margin["target_cosine"][0] > from_scratch["target_cosine"][0] + 0.5
    assert from_margin["marked_share"][0] < from_scratch["marked_share"][0]
    assert from_margin["loss"][0] < from_scratch["loss"][0]


def rewrite(path: Path, change: Any) -> None:
    """Another content of a checkpoint, with a manifest that fits it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in ("common.safetensors", "rank-0.safetensors"):
        tensors |= load_file(path / file)
    changed = change({name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", "head."))})
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    for file, prefix in (("common.safetensors", False), ("rank-0.safetensors", True)):
        save_file({k: v for k, v in changed.items() if k.startswith("head.") is prefix}, path / file)
        manifest["files"][file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    (path / "manifest.json").write_text(with_digest(manifest))


def with_digest(manifest: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps(manifest | {"sha256": digest})


def head_of(classes: int) -> Any:
    return lambda tensors: tensors | {"head.weight": torch.zeros(classes, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (head_of(7), r"head.weight is (7, 2), expected (5, 2) (1 differences)"),
        (lambda t: {**t, "head.weight": torch.zeros(5, 3)}, "head.weight is (5, 3), expected (5, 2) (1 differences)"),
        (lambda t: {k: v for k, v in t.items() if k != "head.weight"}, "head.weight is missing, expected (5, 2)"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("backbone.")},
            "backbone.layers.1.weight is missing, expected (128, 64)",
        ),
        (lambda t: {**t, "backbone.extra": torch.zeros(1)}, "backbone.extra is not part of this model"),
        (lambda t: {"x": torch.zeros(1)}, "backbone.layers.1.weight is missing"),
    ],
    ids=["other classes", "other dimension", "no head", "no backbone", "too much", "something else"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "model"
    save(prepare(toy(), ALONE), path)
    rewrite(path, change)
    with pytest.raises(UserError) as caught:
        train(toy(), begin=path)
    assert str(caught.value).startswith(f"{path} does not fit this model: {message}")


@pytest.mark.parametrize(
    ("saved", "started", "message"),
    [
        (toy(embedding_dim=3), toy(), "backbone.layers.7.weight is (3, 128), expected (2, 128)"),
        (faces(train_people=10), faces(), "head.weight is (10, 16), expected (20, 16)"),
        (faces(image_size=32), faces(), "backbone.neck.2.weight is (16, 384), expected (16, 96)"),
        (toy(), faces(), "backbone.body.0.weight is missing"),
    ],
    ids=["dimension", "people", "image size", "network"],
)
def test_a_model_of_other_settings_is_refused(
    tmp_path: Path, saved: TrainConfig, started: TrainConfig, message: str
) -> None:
    path = tmp_path / "model"
    train(dataclasses.replace(saved, epochs=0), save=path)
    with pytest.raises(UserError) as caught:
        train(started, begin=path)
    assert str(caught.value).startswith(f"{path} does not fit this model: {message}")


@pytest.mark.parametrize("file", ["manifest.json", "common.safetensors", "rank-0.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "header only", "garbage", "empty", "missing", "folder"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str, file: str) -> None:
    path = tmp_path / "model"
    save(prepare(toy(), ALONE), path)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "folder":
        (path / file).mkdir()
    elif damage != "missing":
        kept = {"truncated": content[:-2], "header only": content[:100], "garbage": b"PK\x03\x04" * 99, "empty": b""}
        (path / file).write_bytes(kept[damage])
    with pytest.raises(UserError) as caught:
        train(toy(), begin=path)
    assert str(caught.value).startswith(f"{path} is not a readable checkpoint: {file} ")
    assert len(str(caught.value).splitlines()) == 1


HEADERLESS = b"PK\x03\x04" * 99
ODD = {  # what a manifest says instead, and what is said of it
    "no files": ({"files": {}}, "manifest.json names other files than a checkpoint has"),
    "no head": ({"files": {"common.safetensors": ""}}, "manifest.json names other files than a checkpoint has"),
    "files": ({"files": ["common.safetensors", "rank-0.safetensors"]}, "manifest.json is not whole"),
    "about": ({"about": None}, "manifest.json is not whole"),
    "content": ({}, "common.safetensors can't be read (Error while deserializing header: "),
}


def make_odd(path: Path, changes: dict[str, Any]) -> None:
    """A checkpoint whose hashes fit, but not its content."""
    manifest = read_json(path / "manifest.json")
    del manifest["sha256"]
    if not changes:
        (path / "common.safetensors").write_bytes(HEADERLESS)
        manifest["files"]["common.safetensors"] = hashlib.sha256(HEADERLESS).hexdigest()
    (path / "manifest.json").write_text(with_digest(manifest | changes))


@pytest.mark.parametrize(("changes", "message"), ODD.values(), ids=ODD)
def test_a_checkpoint_whose_hashes_fit_and_nothing_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model"
    save(prepare(toy(), ALONE), path)
    make_odd(path, changes)
    with pytest.raises(UserError) as caught:
        train(toy(), begin=path)
    assert str(caught.value).startswith(f"{path} is not a readable checkpoint: {message}")


def test_a_manifest_of_endless_brackets_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save(prepare(toy(), ALONE), path)
    (path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"is not a readable checkpoint: manifest\.json is not whole"):
        train(toy(), begin=path)


def test_a_network_of_unknown_origin_is_begun_with(tmp_path: Path) -> None:
    """And one that is saved over is not taken for what took its place."""
    path = tmp_path / "model"
    save(prepare(toy(), ALONE), path)
    assert train(toy(), begin=path, save=path)["began_with"] == {}
    assert train(toy(seed=1), begin=path, save=path)["began_with"]["run"] == toy().run_name()


# Stopped, and gone on with


class Stopped(BaseException):
    """As a kill is: nobody catches it."""


def stopped_at(step: int, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """Run a config until it has taken so many steps."""
    with monkeypatch.context() as patch:
        real, taken = loop.Network.step, [0]

        def step_or_stop(*arguments: Any, **options: Any) -> Any:
            if taken[0] == step:
                raise Stopped
            taken[0] += 1
            return real(*arguments, **options)

        patch.setattr(loop.Network, "step", step_or_stop)
        with pytest.raises(Stopped):
            train(config, out=tmp_path / "run.json", work=tmp_path / "work", **how)


def result(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "provenance"}


@pytest.mark.parametrize("step", [1, 4, 5, 9])
@pytest.mark.parametrize("loss", ["MV-AM-Softmax-a", "A-Softmax"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, loss: str
) -> None:
    """In the midst of an epoch of four steps, too, with all that counts steps."""
    how = {"loss": loss, "epochs": 3, "milestones": (1, 2), "t_warmup": 8, "annealing": True, "margin_epochs": 1}
    config = faces(**how, snapshot_every=2)
    whole = train(config)
    stopped_at(step, config, tmp_path, monkeypatch, resume="same")
    record = train(config, out=tmp_path / "run.json", work=tmp_path / "work", resume="same")
    assert result(record) == result(whole)
    assert record["provenance"]["resumed_from"] == (step // 2 * 2 or None)
    assert whole["sizes"]["steps"] == 12


def test_the_pipeline_leaves_a_record_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOCAL", tmp_path / "local")
    record = loop.run(faces(snapshot_every=2), tmp_path / "run.json")
    assert read_json(tmp_path / "run.json") == json.loads(json.dumps(record))
    assert not list((tmp_path / "local").rglob("*.*"))


def test_other_code_or_torch_is_refused_unless_one_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = faces(epochs=2, snapshot_every=2)
    whole = train(config)
    stopped_at(6, config, tmp_path, monkeypatch)
    there = {"out": tmp_path / "run.json", "work": tmp_path / "work"}
    with pytest.raises(UserError, match="holds a run at step 6: --resume goes on with it"):
        train(config, **there)
    monkeypatch.setattr(loop, "CODE", "other code")
    with pytest.raises(
        UserError, match=r"written by other code or versions: code was \w+, is other code\. .*--despite-"
    ):
        train(config, **there, resume="strict")
    with pytest.raises(UserError, match=r"is of another run: lr was 0\.05, is 0\.06"):
        train(dataclasses.replace(config, lr=0.06), **there, resume="despite changes")
    assert not (tmp_path / "run.json").exists()
    went_on = train(config, **there, resume="despite changes")
    assert went_on["provenance"]["resumed_from"] == 6 and went_on["metrics"] == whole["metrics"]


@pytest.mark.parametrize("changes", [*(changes for changes, _ in ODD.values()), {"made_by": 1}, {"progress": None}])
def test_a_snapshot_whose_hashes_fit_and_nothing_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    stopped_at(3, config := faces(snapshot_every=2), tmp_path, monkeypatch)
    make_odd(tmp_path / "work/snapshots/step-00000002", changes)
    with pytest.raises(UserError, match=r"no snapshot to go on from: .*step-00000002 is damaged: "):
        train(config, out=tmp_path / "run.json", work=tmp_path / "work", resume="strict")


def test_where_code_or_settings_changed_a_pipeline_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = faces(epochs=2, snapshot_every=2)
    stopped_at(6, config, tmp_path, monkeypatch, resume="same")
    other = dataclasses.replace(config, lr=0.06)
    record = train(other, out=tmp_path / "run.json", work=tmp_path / "work", resume="same")
    assert record["provenance"]["resumed_from"] is None and result(record) == result(train(other))


# Settings that make no sense


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (toy(backbone="resnet50"), "unknown backbone 'resnet50'; known are: toy, iresnet-tiny"),
        (toy(data="mnist"), "unknown data 'mnist'; known are: orl, digits"),
        (toy(loss="Magic"), "unknown loss 'Magic'; known are: Softmax, HM-Softmax, "),
        (toy(device="gpu"), "device 'gpu' can't be used: "),
        (toy(device=""), "device '' can't be used: "),
        (toy(device="cuda:99"), "device 'cuda:99' can't be used: "),
        (toy(loss="MV-AM-Softmax-f", t=-0.1), "t must be a number in 0 … 1000000, got -0.1"),
        (toy(m=-1.0), "m must be a number in 0 … 1000, got -1.0"),
        (toy(m=3.0), "m of AM-Softmax must be a number <= 2, got 3"),
        (
            toy(variant="../../x"),
            "variant must be words, without / and the like: it is a part of files' names, got '..",
        ),
        (toy(variant="a\tb"), "variant must be words, without / and the like: it is a part of files' names, got 'a"),
        (toy(loss="A-Softmax", m=0.5), "m of A-Softmax must be a number >= 1, got 0.5"),
        (toy(seed=2**32), "seed must be a number in 0 … 4294967295, got 4294967296"),
        (toy(seed=-1), "seed must be a number >= 0, got -1"),
        (toy(lr=math.inf), "lr must be a number in 0 … 1e+38, got inf"),
        (toy(s=0.0), "s must be a number in 1e-06 … 1000000, got 0.0"),
        (toy(loss="HM-Softmax", hard_ratio=0.0), "hard_ratio must be a number in 1e-09 … 1, got 0.0"),
        (toy(loss="F-Softmax", gamma=math.nan), "gamma must be a number in 0 … 1000, got nan"),
        # with classes enough for the sweep
        (
            synthetic(loss="MV-AM-Softmax-a", t=1e17, update_in_backward=True),
            "t must be a number in 0 … 1000000, got 1e+17",
        ),
        (synthetic(sample_rate=0.0), "sample_rate must be a number in 1e-09 … 1, got 0.0"),
        (faces(train_people=39), "train_people must be in 2 … 38 for 40 people, got 39"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_settings_that_make_no_sense_are_one_message(config: TrainConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(config, out=tmp_path / "run.json")
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"backbone": "resnet50"}, {"loss": "Magic"}, {"m": 3.0}, {"loss": "A-Softmax", "m": 0.5}]
)
def test_network_and_head_are_refused_before_the_data_are_read(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(tasks, "load", lambda config: pytest.fail("reads data"))
    with pytest.raises(UserError, match=r"backbone|loss|m of"):
        prepare(toy(**changes), ALONE)


def test_the_check_of_a_network_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_network(toy())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(toy(batch_size=0), id="batch_size=0"),
        pytest.param(toy(batch_size=-1), id="batch_size=-1"),
        pytest.param(toy(epochs=-1), id="epochs=-1"),
        pytest.param(toy(lr=-1.0), id="lr=-1.0"),
        pytest.param(toy(lr=math.nan), id="lr=math.nan"),
        pytest.param(toy(momentum=-1.0), id="momentum=-1.0"),
        pytest.param(toy(weight_decay=-1.0), id="weight_decay=-1.0"),
        pytest.param(toy(embedding_dim=-1), id="embedding_dim=-1"),
        pytest.param(toy(threads=0), id="threads=0"),
        pytest.param(toy(seed=-1), id="seed=-1"),
        pytest.param(toy(device="meta"), id="device=meta"),
        pytest.param(faces(image_size=0), id="image_size=0"),
        # 100 impostor pairs, and a FPR of 0.001 is asked for: it takes a whole training to find out.
        pytest.param(faces(train_people=38, epochs=0), id="train_people=38"),
        pytest.param(faces(fprs=(2.0,), epochs=0), id="fprs=2"),
        pytest.param(faces(margin_epochs=-1, epochs=0), id="margin_epochs=-1"),
        pytest.param(faces(remove="nobody", epochs=0), id="remove=nobody"),
    ],
)
def test_other_settings_that_make_no_sense_are_one_message_too(config: TrainConfig) -> None:
    with pytest.raises(UserError) as caught:
        train(config)
    assert not isinstance(caught.value, Diverged)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU


# The parts


def test_pixels_are_normalised_around_zero() -> None:
    images = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(4, 1, 1, 1)
    found = normalised(images, True)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [-127.5 / 128, -0.5 / 128, 0.5 / 128, 127.5 / 128]


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_shows_every_image_once_and_half_of_them_mirrored_with_flip(flip: bool) -> None:
    pixels = np.zeros((200, 1, 8, 8), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 7, 0] = 255, np.arange(200)  # a bright corner, and which image it is
    session, _ = few(Pixels(pixels, np.arange(200) % 4), flip=flip, batch_size=32, epochs=2)
    seen: list[torch.Tensor] = []
    session.network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit(session)
    shown = torch.cat(seen) * 128 + 127.5
    mirrored = shown[:, 0, 0, 7] == 255
    upright = torch.where(mirrored[:, None, None, None], shown.flip(-1), shown)
    order = upright[:, 0, 7, 0].long()
    assert torch.equal(upright, torch.from_numpy(pixels)[order].float())
    first, second = order.split(200)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(200))
    assert first.tolist() != second.tolist() != list(range(200))
    assert mirrored.sum() == 0 if not flip else 150 < mirrored.sum() < 250


@pytest.mark.parametrize("flip", [False, True])
def test_flip_adds_the_mirror_image_at_the_test(tmp_path: Path, flip: bool) -> None:
    config = toy(flip=flip)
    train(config, out=tmp_path / "run.json", save=tmp_path / "model")
    session = prepare(config, ALONE)
    checkpoint.start_from(tmp_path / "model", session.network)
    backbone, images = session.network.backbone, normalised(torch.from_numpy(session.test.pixels), True)
    with torch.no_grad():
        expected = backbone.eval()(images) + (backbone(images.flip(-1)) if flip else 0)
    torch.testing.assert_close(load_file(tmp_path / "run.safetensors")["features"], expected)


@CONFIGS
def test_embedding_in_parts_and_with_mirror_images(config_of: Any) -> None:
    session = prepare(config_of(), ALONE)
    backbone, test_set = session.network.backbone, session.task.test
    images = normalised(torch.from_numpy(session.test.pixels), True)
    whole = networks.embed(backbone, images, mirror=False, batch_size=1000)
    assert not backbone.training
    assert whole.shape == (len(test_set), config_of().embedding_dim)
    torch.testing.assert_close(networks.embed(backbone, images, mirror=False, batch_size=7), whole)
    mirrored = networks.embed(backbone, images.flip(-1), mirror=False)
    both = networks.embed(backbone, images, mirror=True)
    torch.testing.assert_close(both, whole + mirrored)
    torch.testing.assert_close(networks.embed(backbone, images.flip(-1), mirror=True), both)


# On a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("device", ["cuda", "auto"])
@CONFIGS
def test_training_on_a_gpu(config_of: Any, device: str, tmp_path: Path) -> None:
    config = config_of(loss="MV-AM-Softmax-a", device=device, epochs=4)
    record = train(config, out=tmp_path / "run.json", save=tmp_path / "model")
    assert all(math.isfinite(value) for values in record["curve"].values() for value in values)
    assert record["curve"]["loss"][-1] < record["curve"]["loss"][0]
    assert all(0 <= value <= 1 for value in record["metrics"].values())
    assert record["provenance"]["device"] == torch.cuda.get_device_name()
    assert record["provenance"]["peak_gpu_mib"] > 0
    # What was trained there can be judged without one.
    again = train(dataclasses.replace(config, epochs=0, device="cpu"), begin=tmp_path / "model")
    assert again["metrics"] == pytest.approx(record["metrics"], abs=0.02)


@needs_cuda
def test_a_seed_gives_the_same_bits_on_a_gpu() -> None:
    """CUBLAS_WORKSPACE_CONFIG must be set before CUDA starts, so this takes a process of its own."""
    code = """
import json, sys
from mvrepro.training.config import TrainConfig
from mvrepro.training.loop import train
config = TrainConfig(**json.loads(sys.argv[1]))
records = [train(config) for _ in range(2)]
first, second = ([record["metrics"], record["curve"]] for record in records)
sys.exit(0 if first == second else f"{first} is not {second}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(faces(device="cuda", epochs=2)))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, {"caps", "cublas"}), ({"portable": False}, {"cublas"}), ({"deterministic": False}, set())],
)
def test_caps_that_make_exports_go_where_a_run_wants_none(settings: Any, kept: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ) | ENVIRONMENT)
    set_environment(dataclasses.replace(toy(), **settings))
    names = {"caps": "ATEN_CPU_CAPABILITY", "cublas": "CUBLAS_WORKSPACE_CONFIG"}
    assert {what for what, name in names.items() if name in os.environ} == kept


def test_a_run_that_is_done_still_saves_its_network_and_tests_what_is_new(tmp_path: Path) -> None:
    first = train(toy(), out=tmp_path / "a.json", work=tmp_path / "work", resume="strict")
    again = train(toy(), out=tmp_path / "a.json", work=tmp_path / "work", resume="strict")
    assert again == read_json(tmp_path / "a.json")  # nothing was done
    saved = train(toy(), out=tmp_path / "a.json", work=tmp_path / "work", save=tmp_path / "net", resume="strict")
    assert checkpoint.is_checkpoint(tmp_path / "net")
    assert [saved[part] == first[part] for part in ("metrics", "curve", "learned")] == [True] * 3


def test_a_run_that_is_done_is_tested_on_pairs_that_are_new(tmp_path: Path) -> None:
    sets = [str(tmp_path / f"{name}.bin") for name in ("one", "two")]
    for number, path in enumerate(sets):
        write_bin(Path(path), [_png(10 * number + i // 4) for i in range(40)], np.arange(20) % 2 == 0)
    there = {"out": tmp_path / "a.json", "work": tmp_path / "work", "resume": "strict"}
    first = train(synthetic(verify=(sets[0],), workers=0), **there)
    assert train(synthetic(verify=(sets[0],), workers=0), **there) == read_json(tmp_path / "a.json")  # nothing was done
    wider = train(synthetic(verify=tuple(sets), workers=0), **there)
    assert set(first["metrics"]) == {"one", "one std"} and set(wider["metrics"]) > {"one", "two"}
    assert wider["curve"] == first["curve"] and wider["verified"] == sets
    assert wider["provenance"]["resumed_from"] == wider["sizes"]["steps"]


def _png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_run_that_need_not_be_deterministic_is_not_so_because_another_was() -> None:
    prepare(toy(), ALONE)
    assert torch.are_deterministic_algorithms_enabled()
    prepare(toy(deterministic=False), ALONE)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_is_looked_at_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("mvrepro.training.network.most_looked_at", lambda classes: 5)
    monkeypatch.setattr(MarginHead, "watch", lambda head, x, y: seen.append(len(x)) or {})
    monkeypatch.setattr(MarginHead, "study", lambda head, x, y: seen.append(len(y)) or {})
    session, losses = few(Pixels(np.zeros((40, 1, 8, 8), np.uint8), np.arange(40) % 4), batch_size=20)
    session.network.step(Feed(session.config, session.task.train, session.order, ALONE, 0), 0, 0.1, watch=True)
    assert (seen, len(losses)) == ([5, 5], 1)


def test_what_is_tried_elsewhere_leaves_the_snapshots_of_a_run_alone(tmp_path: Path) -> None:
    config = toy(variant="tried")
    kept = loop.LOCAL / "training" / config.profile / config.run_name() / "snapshots"
    kept.mkdir(parents=True)
    try:
        loop.run(config, tmp_path / "a.json")
        assert kept.is_dir()
    finally:
        kept.rmdir(), kept.parent.rmdir()
