"""The plots that reports share: curves with a band over seeds, the axes of DET curves, and the files of a figure."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mvrepro.losses import Loss
from mvrepro.pages import plots

matplotlib.use("Agg")


def test_a_band_is_the_mean_from_the_lowest_to_the_highest_seed():
    fig, axes = plots.new_figure()
    rows = [[0.1, 0.5], [0.3, 0.4], [0.2, 0.9]]
    means = plots.band(axes[0, 0], [1e-3, 1e-2], rows, "AM-Softmax", plots.look("AM-Softmax"))
    assert means == pytest.approx([0.2, 0.6])
    (line,), (area,) = axes[0, 0].lines, axes[0, 0].collections
    assert list(line.get_ydata()) == means
    assert line.get_label() == "AM-Softmax"
    corners = {(float(x), float(y)) for x, y in area.get_paths()[0].vertices}
    assert {(1e-3, 0.1), (1e-3, 0.3), (1e-2, 0.4), (1e-2, 0.9)} <= corners
    plots.plt.close(fig)


def test_one_seed_has_a_band_without_width():
    fig, axes = plots.new_figure()
    assert plots.band(axes[0, 0], [0, 1], [[1, 2]], "", {"color": "k", "linewidth": 3}) == [1, 2]
    assert axes[0, 0].lines[0].get_linewidth() == 3
    plots.plt.close(fig)


def test_a_loss_that_somebody_added_can_be_drawn(monkeypatch):
    monkeypatch.setitem(plots.LOSSES, "MV-AM-Softmax-x", Loss("AM", h="x"))
    monkeypatch.setitem(plots.LOSSES, "New-Softmax", Loss("new"))
    assert plots.look("MV-AM-Softmax-x") == {"color": plots.COLOURS["AM"], "marker": "P", "linestyle": "-."}
    assert plots.look("New-Softmax") == {"color": "#666666", "marker": "o", "linestyle": "-"}


def test_every_loss_is_told_apart_from_its_margin_loss():
    for names in (
        ["Softmax", "HM-Softmax", "F-Softmax", "SV-Softmax"],
        [n for n in plots.LOSSES if plots.LOSSES[n].f == "AM"],
    ):
        looks = [
            tuple(plots.look(name).values()) for name in names if name != "SV-AM-Softmax"
        ]  # MV-AM-Softmax-a itself
        assert len(set(looks)) == len(looks)
        assert len({(look[0], look[2]) for look in looks}) == len(looks)  # also as lines without markers


def test_scores_are_drawn_a_line_a_side():
    rows = [
        {"loss": "F-Softmax", "variant": v, "default": d, "seed": s, "x": x}
        for v, d, s, x in (("", True, 0, 0.2), ("", True, 1, 0.4), ("", False, 2, 0.9), ("late", True, 0, 0.5))
    ]
    ax = plots.plt.figure().subplots()
    drawn = plots.metric_by_loss(ax, pd.DataFrame(rows), [("F-Softmax", ""), ("F-Softmax", "late")], "x", "score (%)")
    assert list(drawn["mean"]) == pytest.approx([30, 50]) and np.isnan(drawn["low"][1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["F-Softmax", "F-Softmax (late)"]
    plots.plt.close("all")


def test_equal_figures_are_equal_bytes_in_both_formats():
    def draw():
        plots.use_style()
        fig, axes = plots.new_figure()
        axes[0, 0].plot([0, 1], [1, 2], label=r"$\cos\theta_y$")
        axes[0, 0].legend()
        found = tuple(plots.picture(fig, form) for form in ("png", "pdf"))
        plots.plt.close(fig)
        return found

    png, pdf = draw()
    assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF")
    assert (png, pdf) == draw()
