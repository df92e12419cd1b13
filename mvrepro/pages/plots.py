"""One style for every figure, and the plots that several notebooks share."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from mvrepro.evidence.claims import difference
from mvrepro.evidence.runs import by_seed
from mvrepro.evidence.stats import Estimate, mean_interval
from mvrepro.losses import LOSSES

DPI = 150
PAGE = 7.0  # the width in inches of the whole page of a two-column paper

# Okabe and Ito's colours, which the colour-blind can tell apart; a marker for each, so that colour is not alone.
COLOURS = {"cos": "#0072B2", "A": "#CC79A7", "AM": "#E69F00", "Arc": "#009E73"}
MARKERS = {"–": "o", "fixed": "s", "adaptive": "D"}
DASHES = {"–": "-", "fixed": "--", "adaptive": ":"}


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


def look(loss: str) -> dict[str, object]:
    """Colour, marker and line style of a loss: colour is its margin, the rest its emphasis. A margin or emphasis that
    somebody added is grey, or has crosses, until it has a place in the tables above."""
    row = LOSSES[loss]
    emphasis = row.h or "–"
    return {
        "color": COLOURS.get(row.f, "#666666"),
        "marker": MARKERS.get(emphasis, "P"),
        "linestyle": DASHES.get(emphasis, "-."),
    }


def metric_by_loss(ax: Axes, frame: pd.DataFrame, losses: Sequence[str], metric: str, label: str) -> pd.DataFrame:
    """Each loss as a row: its seeds as small dots, the mean with its 95 % interval as a large one, in per cent.

    frame: runs.table() narrowed to one run a loss and seed. Returns the means and ends drawn.
    """
    values = [100 * frame.loc[frame["loss"] == loss, metric] for loss in losses]
    return _intervals(ax, {"loss": losses}, values, [look(loss) for loss in losses], list(losses), label, 0.22)


def paired_differences(
    ax: Axes,
    frame: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    label: str,
    looks: Sequence[Mapping[str, object]] | None = None,
) -> pd.DataFrame:
    """Each pair (better, worse) as a row: better − worse of each seed as small dots, and as a large mark the mean with
    its 95 % interval as verdicts have it (claims.difference), in points. looks: colour and marker of each row; None:
    the better loss's.

    frame: runs.table(); of each loss its default t. Returns the means, ends and single differences drawn.
    """
    better, worse = zip(*pairs, strict=True)
    values = [100 * (by_seed(frame, metric, a) - by_seed(frame, metric, b)).dropna() for a, b in pairs]
    found = [difference(frame, metric, a, b, min_seeds=2) for a, b in pairs]
    estimates = [
        mean_interval(each) if e is None else Estimate(100 * e.mean, 100 * e.low, 100 * e.high, e.n, e.p)
        for each, e in zip(values, found, strict=True)
    ]
    names, looks = [f"{a} − {b}" for a, b in pairs], looks or [look(loss) for loss in better]
    drawn = _intervals(ax, {"better": better, "worse": worse}, values, looks, names, label, 0.25, estimates)
    ax.axvline(0, color="0.5", linewidth=0.8)
    return drawn.assign(seeds=[list(each) for each in values])


def _intervals(
    ax: Axes,
    what: Mapping[str, Sequence[str]],
    values: Sequence[pd.Series],
    looks: Sequence[Mapping[str, object]],
    names: Sequence[str],
    label: str,
    below: float,
    estimates: Sequence[Estimate] | None = None,
) -> pd.DataFrame:
    """A row for each of values, with its seeds so far below the line; returns what, and the means and ends drawn."""
    estimates = estimates or [mean_interval(each) for each in values]
    for place, (each, e, style) in enumerate(zip(values, estimates, looks, strict=True)):
        colour, ends = str(style["color"]), [[e.mean - e.low], [e.high - e.mean]]
        ax.plot(each, [place + below] * len(each), ".", color=colour, alpha=0.6, markersize=4)
        ax.errorbar(e.mean, place, xerr=ends, fmt=str(style["marker"]), color=colour, capsize=2, markersize=5)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel(label)
    return pd.DataFrame({**what, **{end: [getattr(e, end) for e in estimates] for end in ("mean", "low", "high")}})


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


def course(kinds: Mapping[str, tuple[pd.DataFrame, Mapping[str, Any]]]) -> tuple[Figure, dict[str, Any]]:
    """How runs learned, epoch by epoch: loss, training top-1, marked share and p_y, a panel each, a line each of kinds:
    label -> (rows of runs.curves(), look). Returns the figure and what is drawn."""
    fig, axes = new_figure(2, 2, height=4.6)
    data = {}
    for ax, (column, label) in zip(axes.flat, COURSE.items(), strict=True):
        for name, (rows, style) in kinds.items():
            scale = 100 if label.endswith("(%)") else 1
            data[f"{name}: {column}"] = curve(ax, rows.assign(**{column: scale * rows[column]}), column, name, style)
        ax.set_ylabel(label)
        if column in ("marked_share", "median_p_y"):
            ax.set_yscale("log")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig, data


def band(ax: Axes, x: ArrayLike, rows: ArrayLike, label: str, style: Mapping[str, Any]) -> list[float]:
    """Rows (S, P), one a seed, over x (P,): the mean over seeds as a line, lowest to highest as a band. For ROC
    and DET curves, distributions of scores and the like. Returns the means drawn."""
    values = np.asarray(rows, dtype=np.float64)
    ax.plot(x, values.mean(axis=0), **{"label": label, "markersize": 4, "linewidth": 1.2, **style})
    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    return list(values.mean(axis=0))


def deviate_axis(ax: Axes, side: str, ticks: Sequence[float]) -> None:
    """Make side ("x" or "y") an axis of normal deviates, as DET curves have it, for rates in (0, 1): equal
    distances are equal steps of Φ⁻¹(rate). ticks are rates; they are labelled in per cent, as "0.1"."""

    def deviate(rate: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(norm.ppf(np.clip(rate, 1e-12, 1 - 1e-12)))

    getattr(ax, f"set_{side}scale")("function", functions=(deviate, norm.cdf))
    getattr(ax, f"set_{side}ticks")(ticks, [f"{100 * tick:g}" for tick in ticks])
    getattr(ax, f"{side}axis").set_minor_locator(NullLocator())


def new_figure(rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.6):  # type: ignore[no-untyped-def]
    """plt.subplots in the project's sizes (inches)."""
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False)


def picture(figure: Figure, form: str) -> bytes:
    """A figure as "png" or "pdf": equal figures are equal bytes, since neither holds a date."""
    file, undated = io.BytesIO(), {"png": ["Software"], "pdf": ["CreationDate", "Creator", "Producer"]}
    figure.savefig(file, format=form, dpi=DPI, metadata=dict.fromkeys(undated[form]))
    return file.getvalue()


def stacked(
    kinds: Mapping[str, tuple[pd.DataFrame, Mapping[str, Any]]], columns: Mapping[str, str], *, log: Sequence[str] = ()
) -> tuple[Figure, dict[str, Any]]:
    """Columns of runs.curves() (column -> label) by epoch, a panel each, one below the other, so that they can be read
    on a telephone; a line each of kinds: label -> (rows, look). log: columns with a logarithmic axis. Returns the
    figure and what is drawn."""
    fig, axes = new_figure(len(columns), 1, width=4.6, height=1.7 * len(columns) + 0.6)
    data = {}
    for ax, (column, label) in zip(axes[:, 0], columns.items(), strict=True):
        for name, (rows, style) in kinds.items():
            data[f"{name}: {column}"] = curve(ax, rows, column, name, style)
        ax.set(ylabel=label, xlabel="epoch" if ax is axes[-1, 0] else "", yscale="log" if column in log else "linear")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig, data
