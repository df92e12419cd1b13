"""One style for every figure, and the plots that several notebooks share."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

from mvrepro.evidence import runs
from mvrepro.evidence.stats import mean_interval
from mvrepro.losses import LOSSES

DPI = 150
PAGE = 7.0  # the width in inches of the whole page of a two-column paper

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker for each, so that colour is not alone.
COLOURS = {"cos": "#0072B2", "A": "#CC79A7", "AM": "#E69F00", "Arc": "#009E73"}
MARKERS = {"–": "o", "fixed": "s", "adaptive": "D"}
DASHES = {"–": "-", "fixed": "--", "adaptive": ":"}
SHADES = {"fixed": 0.72, "adaptive": 0.45}  # of the margin's colour: where the three are drawn alone, one would not do
MINED = {  # a colour of their own, whatever the margin: they are drawn beside their margin loss
    "HM": {"color": "#D55E00", "marker": "^", "linestyle": "--"},
    "F": {"color": "#56B4E9", "marker": "v", "linestyle": "-."},
}

Side = tuple[str, str]  # a loss and the variant of its runs, "" for the plain ones


def use_style() -> None:
    """Set the style of every figure: seaborn's ticks, fonts and sizes as in print; drawn without a screen."""
    mpl.use("Agg")
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    mpl.rcParams.update(
        {
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "pdf.fonttype": 42,  # TrueType, which journals ask for and editors can change
        }
    )


def short(loss: str, variant: str = "") -> str:
    """A loss, or side, where there is little room: "MV-AM-Softmax-f", "after AM-Softmax" -> "MV-AM-f (after AM)"."""
    brief = loss.replace("-Softmax", "")
    name = brief if len(brief) > 1 else loss  # F-Softmax and A-Softmax keep theirs
    return f"{name} ({variant.replace('-Softmax', '')})" if variant else name


def look(loss: str) -> dict[str, object]:
    """Colour, marker and line style of a loss: colour is its margin, darker with an emphasis, which the rest says; what
    is mined looks otherwise. A margin or emphasis that somebody added is grey, or has crosses, until it has a place in
    the tables above."""
    row = LOSSES[loss]
    emphasis = row.h or "–"
    red, green, blue = (SHADES.get(emphasis, 1.0) * x for x in mpl.colors.to_rgb(COLOURS.get(row.f, "#666666")))
    plain: dict[str, object] = {
        "color": mpl.colors.to_hex((red, green, blue)).upper(),
        "marker": MARKERS.get(emphasis, "P"),
        "linestyle": DASHES.get(emphasis, "-."),
    }
    return plain | MINED.get(row.g or "", {})


def forest(
    ax: Axes,
    rows: pd.DataFrame,
    looks: Sequence[Mapping[str, object]],
    label: str,
    places: Sequence[float] | None = None,
    *,
    above: bool = False,
) -> None:
    """Rows (name, mean, low, high, seeds): the mean with its interval as a large mark, single seeds as small dots below
    it. places: how far down each row lies, where rows of one name share a line; None: a line each. above: long names
    stand above their line, so that it has the whole width of a telephone."""
    lines = list(places or range(len(rows)))
    for place, row, style in zip(lines, rows.itertuples(), looks, strict=True):
        colour = str(style["color"])
        ends = np.maximum([[row.mean - row.low], [row.high - row.mean]], 0)  # a bootstrap's need not hold the mean
        ax.plot(row.seeds, [place + 0.25] * len(row.seeds), ".", color=colour, alpha=0.6, markersize=4)
        ax.errorbar(row.mean, place, xerr=ends, fmt=str(style["marker"]), color=colour, capsize=2, markersize=5)
    names = rows["name"] if places is None else rows["name"].unique()
    label = "\n".join(textwrap.fill(line, 46) for line in label.splitlines()) if above else label
    ax.set(xlabel=label, ylim=(max(len(names), 1) - 0.4, -0.7 if above else -0.5))
    if not above:
        ax.set_yticks(range(len(names)), names)
        return
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    highest = min(lines, default=0)  # of the first row; the others are as wide
    for place, name in enumerate(names):
        across, box = ax.get_yaxis_transform(), {"color": "white", "pad": 0.5}
        ax.annotate(name, (0, place + highest - 0.36), xycoords=across, va="center", fontsize=8, bbox=box)


def metric_by_loss(ax: Axes, frame: pd.DataFrame, sides: Sequence[Side], metric: str, label: str) -> pd.DataFrame:
    """Each side as a row: its seeds as small dots, the mean with its 95 % interval as a large one, in per cent.

    frame: runs.table(), of which the default runs count. Returns the means and ends drawn.
    """
    rows = []
    for loss, variant in sides:
        values = 100 * runs.of(frame, loss, variant)[metric]
        e = mean_interval(values)
        rows.append({"name": short(loss, variant), "mean": e.mean, "low": e.low, "high": e.high, "seeds": list(values)})
    drawn = pd.DataFrame(rows, columns=["name", "mean", "low", "high", "seeds"])
    forest(ax, drawn, [look(loss) for loss, _ in sides], label)
    return drawn.drop(columns="seeds")


def curve(ax: Axes, curves: pd.DataFrame, column: str, label: str, style: Mapping[str, Any]) -> list[float]:
    """A column of runs.curves() against the epoch: the mean over seeds as a line, lowest to highest as a
    band. Returns the means drawn."""
    by_epoch = curves.groupby("epoch")[column]
    rows = np.column_stack([values for _, values in by_epoch])
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return band(ax, list(by_epoch.groups), rows, label, {"markevery": 4, **style})


COURSE = {
    "training_loss": "training loss (nats)",
    "top1": "training top-1 (%)",
    "marked_share": "other classes marked (%)",
    "median_p_y": "median $p_y$",
}


# Logarithmic where the values span a decade; below this, linear, since a share of 0 has a place, too.
LOGARITHMIC = {"marked_share": 0.1, "median_p_y": 1e-9}


Kinds = Mapping[str, tuple[pd.DataFrame, Mapping[str, Any]]]  # label -> (rows of runs.curves(), look)


def course(kinds: Kinds) -> tuple[Figure, dict[str, Any]]:
    """How runs learned, epoch by epoch: loss, training top-1, marked share and p_y, a panel each, a line each of kinds.
    Returns the figure and what is drawn."""
    return _by_epoch(kinds, COURSE, *new_figure(2, 2, height=4.6))


def stacked(kinds: Kinds, columns: Mapping[str, str]) -> tuple[Figure, dict[str, Any]]:
    """`course` of other columns of runs.curves() (column -> label), one panel below the other, so that they can be read
    on a telephone."""
    fig, axes = new_figure(len(columns), 1, width=4.6, height=1.7 * len(columns) + 0.6)
    drawn = _by_epoch(kinds, columns, fig, axes)
    for ax in axes[:-1, 0]:
        ax.set_xlabel("")
    return drawn


def _by_epoch(kinds: Kinds, columns: Mapping[str, str], fig: Figure, axes: Any) -> tuple[Figure, dict[str, Any]]:
    data = {}
    for ax, (column, label) in zip(axes.flat, columns.items(), strict=True):
        scale = 100 if label.endswith("(%)") else 1
        for name, (rows, style) in kinds.items():
            every = {"markevery": 1, **style} if rows["epoch"].nunique() < 10 else style
            data[f"{name}: {column}"] = curve(ax, rows.assign(**{column: scale * rows[column]}), column, name, every)
        ax.set_ylabel(label)
        ends = [end for name in kinds for end in (min(data[f"{name}: {column}"]), max(data[f"{name}: {column}"]))]
        if column in LOGARITHMIC and max(ends) > 10 * min(ends):
            if min(ends) > 0:
                ax.set_yscale("log")
            else:
                ax.set_yscale("symlog", linthresh=LOGARITHMIC[column])
                ax.set_ylim(bottom=0)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * axes.shape[1])
    return fig, data


def band(ax: Axes, x: ArrayLike, rows: ArrayLike, label: str, style: Mapping[str, Any]) -> list[float]:
    """Rows (S, P), one a seed, over x (P,): the mean over seeds as a line, lowest to highest as a band. For ROC
    and DET curves, distributions of scores and the like. Returns the means drawn."""
    values = np.asarray(rows, dtype=np.float64)
    ax.plot(x, values.mean(axis=0), **{"label": label, "markersize": 4, "linewidth": 1.2, **style})
    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    return list(values.mean(axis=0))


def new_figure(rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.6):  # type: ignore[no-untyped-def]
    """plt.subplots in the project's sizes (inches)."""
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False)


def picture(figure: Figure, form: str) -> bytes:
    """A figure as "png" or "pdf": equal figures are equal bytes, since neither holds a date. A PNG has 256 colours, for
    a third of the bytes: executed notebooks are kept in git, and hosts show none beyond a megabyte or so."""
    file, undated = io.BytesIO(), {"png": ["Software"], "pdf": ["CreationDate", "Creator", "Producer"]}
    figure.savefig(file, format=form, dpi=DPI, metadata=dict.fromkeys(undated[form]))
    if form == "pdf":
        return file.getvalue()
    with Image.open(file) as whole, io.BytesIO() as small:
        whole.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        return small.getvalue()
