"""What the pages of the tests say of two losses, on made-up runs."""

import pandas as pd

from mvrepro.pages import compared
from mvrepro.pages.compared import AFTER, Pair

PAIRS = [*compared.MV, *compared.MV_AFTER]


def frame(**means: float) -> pd.DataFrame:
    """Runs of three seeds, which raise every loss alike; a name such as "AM-Softmax|" ends with its variant."""
    rows = [
        {
            "loss": name.split("|")[0],
            "variant": name.split("|")[1],
            "seed": seed,
            "t": 0.2,
            "default": True,
            "top1": 0.9,
        }
        | {"rank1": mean + 0.01 * seed + 0.001 * ((seed + i) % 3)}
        for i, (name, mean) in enumerate(means.items())
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


RUNS = frame(**{"AM-Softmax|": 0.3, "MV-AM-Softmax-f|": 0.3, "MV-AM-Softmax-a|": 0.2, f"AM-Softmax|{AFTER}": 0.4})


def test_names_are_short_and_say_the_variant() -> None:
    assert compared.short("MV-AM-Softmax-f") == "MV-AM-f"
    assert compared.short("AM-Softmax", AFTER) == "AM (after AM)"
    assert Pair("MV-AM-Softmax-f", "AM-Softmax", AFTER).name == "MV-AM-f − AM (after AM)"


def test_pairs_without_runs_are_left_out_and_named() -> None:
    assert [pair.name for pair in compared.known(RUNS, PAIRS)] == ["MV-AM-f − AM", "MV-AM-a − AM"]
    waiting = compared.waiting(RUNS, PAIRS)
    assert "MV-Arc-a − Arc" in waiting and "MV-AM-f − AM (after AM)" in waiting and "MV-AM-a − AM," not in waiting
    assert compared.waiting(RUNS, compared.MV[:2]) == ""


def test_words_say_which_side_an_interval_is_on() -> None:
    words = compared.in_words(RUNS, PAIRS, "rank1")
    assert words.startswith("**for MV-Softmax**: none; **against it**: MV-AM-a − AM -10.")
    assert "**neither (the interval holds 0)**: MV-AM-f − AM" in words
    assert compared.in_words(frame(**{"AM-Softmax|": 0.3}), PAIRS, "rank1").startswith("no MV loss shares two seeds")


def test_tables_have_a_row_a_loss_and_a_row_a_pair() -> None:
    scores = compared.scores(RUNS, {"rank1": "Rank-1"})
    assert list(scores["Loss"]) == ["AM", "MV-AM-f", "MV-AM-a", "AM (after AM)"]
    assert scores["Rank-1"][0].startswith("31.1 [")
    table = compared.differences(RUNS, PAIRS, {"rank1": "Rank-1"})
    assert list(table["Interval"]) == ["holds 0", "below 0"]


def test_one_value_has_no_interval_and_none_is_a_dash() -> None:
    assert compared.interval([24.31]) == "24.3"
    assert compared.interval([float("nan")]) == "–"
