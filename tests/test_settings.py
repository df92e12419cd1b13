"""What was asked for by name counts, or is refused: no setting is ignored in silence."""

import contextlib
import io
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hostile import wrong
from hypothesis import given, settings
from hypothesis import strategies as st

from mvrepro import LOSSES, MarginHead
from mvrepro.__main__ import main
from mvrepro.errors import UserError
from mvrepro.files import ROOT, read_yaml
from mvrepro.pipeline import plan, workers
from mvrepro.training.config import OF_LOSSES, TrainConfig, check, from_settings, kind
from mvrepro.training.loop import check_used

# Of each setting two values that give two losses where it counts. margin_epochs are epochs with t = 0.
TWO: dict[str, tuple[Any, Any]] = {
    "m": (1.0, 1.3), "easy_margin": (False, True), "annealing": (False, True), "t": (0.1, 0.4), "t_warmup": (0, 50),
    "margin_epochs": (0.0, 0.3), "stop_gradient": (False, True), "gamma": (0.5, 2.0), "hard_ratio": (0.3, 1.0),
}  # fmt: skip


def outcome(loss: str, name: str, value: Any) -> tuple[float, ...]:
    """A loss and the sum of its gradient's squares, on cosines of both signs."""
    torch.manual_seed(0)
    head = MarginHead(loss, 4, 9, backend="dense", s=4.0, **{"t" if name == "margin_epochs" else name: value}).double()
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    found = head(x, torch.arange(12) % 9)
    found.backward()
    assert x.grad is not None
    return found.item(), x.grad.square().sum().item()


def test_the_table_has_a_try_for_each_setting() -> None:
    assert TWO.keys() == OF_LOSSES.keys()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", OF_LOSSES)
def test_a_setting_counts_with_the_losses_of_its_row_and_with_no_other(name: str, loss: str) -> None:
    differs = len({outcome(loss, name, value) for value in TWO[name]}) > 1
    assert differs == OF_LOSSES[name](LOSSES[loss])


def config(profile: str = "quick", **changes: Any) -> TrainConfig:
    settings = read_yaml(ROOT / "params.yaml")[profile]["train"]
    return from_settings(settings | {"loss": "Softmax"} | changes, "here")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "AM-Softmax", "t": 0.3}, "--t decides nothing with --loss AM-Softmax; it does with SV-Softmax, SV-"),
        ({"gamma": 3.0}, "--gamma decides nothing with --loss Softmax; it does with F-Softmax, F-AM-Softmax, F-Arc"),
        ({"loss": "F-Softmax", "hard_ratio": 0.5}, "--hard-ratio decides nothing with --loss F-Softmax; it does with "),
        ({"loss": "SV-Softmax", "easy_margin": True}, "--easy-margin decides nothing with --loss SV-Softmax; it does "),
        ({"m": 0.3}, "--m decides nothing with --loss Softmax; it does with A-Softmax, AM-Softmax, Arc-Softmax, HM-"),
        ({"loss": "MV-Arc-Softmax-f", "stop_gradient": True}, "--stop-gradient decides nothing with --loss MV-Arc-S"),
        ({"loss": "Arc-Softmax", "t_warmup": 10}, "--t-warmup decides nothing with --loss Arc-Softmax; it does with "),
        ({"margin_epochs": 2}, "--margin-epochs decides nothing with --loss Softmax; it does with SV-Softmax, SV-AM-"),
        ({"loss": "AM-Softmax", "annealing": True}, "--annealing decides nothing with --loss AM-Softmax; it does with"),
        ({"schedule": "cosine", "milestones": (3,)}, "--milestones decides nothing with --schedule cosine; it does wi"),
        ({"deterministic": False, "portable": True}, "--portable decides nothing with --no-deterministic; it does wit"),
        ({"people": "all"}, "--people decides nothing with --data orl; it does with lfw, cfp"),
        ({"data": "lfw", "train_people": 9}, "--train-people decides nothing with --data lfw; it does with orl"),
        ({"data": "digits", "image_size": 64}, "--image-size decides nothing with --data digits; it does with orl"),
        ({"milestones": (3, 50)}, "--milestones 3 50 lies behind the end of the run, --epochs 20"),
        ({"loss": "MV-AM-Softmax-a", "margin_epochs": 20}, "--margin-epochs 20 lies behind the end of the run, --epoc"),
        ({"steps": 2, "test_every": 5}, "--test-every 5 lies behind the end of the run, --steps 2"),
        ({"renumber": True}, "--renumber decides nothing with --data orl; it does with PATH"),
        ({"verify": ("lfw.bin",)}, "--verify decides nothing with --data orl; it does with synthetic, PATH"),
        ({"data": "set.rec", "fprs": (0.1,)}, "--fprs decides nothing with --data set.rec; it does with orl, lfw, cfp"),
    ],
)  # fmt: skip
def test_what_decides_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_used(config(**changes), changes)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "MV-AM-Softmax-a", "t": 0.3, "t_warmup": 5, "margin_epochs": 1, "stop_gradient": True, "m": 0.2},
        {"loss": "HM-Arc-Softmax", "hard_ratio": 0.5, "easy_margin": True, "milestones": (3,), "train_people": 9},
        {"t": 0.0, "m": 0.0, "easy_margin": False, "t_warmup": 0, "schedule": "cosine", "milestones": ()},
        {"seed": 4, "data": "digits", "lr": 0.1, "loss": "no such loss", "portable": False},
        {"milestones": (3, 50), "epochs": 1},
        {"steps": 2, "warmup": 100, "milestones": (50,)},
        {"data": "set.rec", "renumber": True, "verify": ("lfw.bin",), "bad_limit": 3, "image_size": 16},
    ],
)
def test_what_counts_or_asks_for_nothing_is_taken(changes: dict[str, Any]) -> None:
    check_used(config(**changes), changes)


@pytest.mark.parametrize("milestones", [(5, 3), (3, 3)])
def test_milestones_rise(milestones: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"milestones must rise, each once, got {milestones[0]} 3"):
        check(config(milestones=milestones))


def test_a_profile_has_settings_for_all_its_losses() -> None:
    """`faces` says t, easy_margin and schedule for every loss; what is said at the command is for one."""
    assert config("faces").t and config("faces").easy_margin
    check_used(config("faces"), ["loss", "seed"])


def test_the_command_says_it_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert main(["train", "--loss", "AM-Softmax", "--gamma", "1", "--out", str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mvrepro train: --gamma decides nothing with --loss AM-Softmax") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_row_of_params_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = read_yaml(ROOT / "params.yaml")["quick"] | {"runs": [{"loss": "AM-Softmax", "gamma": 3}]}
    monkeypatch.setattr(plan, "read_yaml", lambda path: {"mine": profile})
    with pytest.raises(UserError, match=r"^--gamma decides nothing with --loss AM-Softmax"):
        workers.compute_here(plan.runs("mine")[0])


@pytest.mark.parametrize("row", [{"loss": "Softmax", "lr": [0.1, 0.2]}, {"loss": ["Softmax", "Softmax"]}])
def test_two_runs_that_would_write_one_record_are_refused(monkeypatch: pytest.MonkeyPatch, row: Any) -> None:
    profile = read_yaml(ROOT / "params.yaml")["quick"] | {"runs": [row | {"seed": 0}]}
    monkeypatch.setattr(plan, "read_yaml", lambda path: {"mine": profile})
    said = "params.yaml, mine: two runs are called mine/Softmax_seed0: give one of their rows a variant"
    with pytest.raises(UserError, match=f"^{said}"):
        plan.runs("mine")
    profile["runs"].append({"loss": "Softmax", "lr": 0.3, "variant": "fast", "seed": 0})
    profile["runs"][0] = {"loss": "Softmax", "seed": 0}
    assert [step.name for step in plan.runs("mine")] == ["mine/Softmax_seed0", "mine/Softmax_fast_seed0"]


RANGES = {item.name: item.metadata["within"] for item in fields(TrainConfig) if item.metadata["within"]}
FAR = [1e300, -1e300, float("nan"), float("inf"), -float("inf"), 2**70, -(2**70), -1]


@st.composite
def out_of_range(draw: st.DrawFn) -> tuple[str, float]:
    """A setting that has a range, and a number that is not in it."""
    name = draw(st.sampled_from(sorted(RANGES)))
    least, most = RANGES[name]
    near = [math.nextafter(least, -math.inf), math.nextafter(most, math.inf)]
    near = [least - 1, most + 1] if kind(name) is int else near
    return name, draw(st.sampled_from([value for value in FAR + near if not least <= value <= most]))


@given(out_of_range())
@settings(max_examples=100, deadline=None)
def test_a_number_out_of_its_range_is_one_line_before_anything_starts(chosen: tuple[str, float]) -> None:
    option, said = f"--{chosen[0].replace('_', '-')}={chosen[1]!r}", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr("mvrepro.training.loop.train", lambda *_, **__: pytest.fail(f"trained with {option}"))
        try:
            code: Any = main(["train", "--loss", "Softmax", option])
        except SystemExit as end:
            code = end.code
    assert wrong(code, said.getvalue()) == "", said.getvalue()
    assert code == 2 or chosen[0] in said.getvalue()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": "1e-1"}, "lr must be a number, got '1e-1' (YAML reads 1e-1 as text: write 0.1)"),
        ({"flip": "false"}, "flip must be true or false, got 'false'"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"milestones": (1.5,)}, "milestones must be a whole number, got 1.5"),
        ({"milestones": 3}, "milestones must be a list, got 3"),
        ({"loss": 3}, "loss must be text, got 3"),
        ({"fprs": ()}, "fprs must hold a false positive rate at least, such as 0.001"),
    ],
)
def test_a_value_of_another_type_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check(config(**changes))
    assert str(caught.value) == said
    check(config(lr=1, m=None, fprs=(1,)))  # a whole number is a number
