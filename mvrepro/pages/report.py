"""What every report notebook uses: the box at its top, figures with their data, tables, recorded values.

A notebook begins with `report = Report("04", profile)`. Only what the pipeline runs (mvrepro.pages.notebook.execute)
writes to results/: anywhere else, in JupyterLab or with papermill alone, figures and values go to scratch/, and each
says whether it is the committed one. Under `make validate` (MVREPRO_VALIDATE=1) nothing is written: what would be
written is compared with what is committed, and a difference is an error.
"""

import ast
import hashlib
import itertools
import math
import os
from collections.abc import KeysView, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from mvrepro.errors import UserError
from mvrepro.evidence import claims, runs
from mvrepro.evidence.compare import difference
from mvrepro.files import RESULTS, read_json, write_atomic, write_json
from mvrepro.files import display as shown
from mvrepro.pages import plots
from mvrepro.pages.notebook import NOTEBOOKS, OUT, SCRATCH, literals

KINDS = ("exact", "training", "measured")


class Report:
    """One notebook's place in results/. notebook: its two digits; profile: such as "quick".

    metric, metric_label: what the profile's verdicts rest on, as a column of runs.table and on an axis.
    folder: with the data behind this page's figures, and its recorded values.
    Raises UserError where papermill was given a parameter that the notebook does not have.
    """

    def __init__(self, notebook: str, profile: str) -> None:
        check_parameters(getattr(get_ipython(), "user_ns", {}).get("In", []))
        self.notebook, self.profile = notebook, profile
        self.metric, self.metric_label = claims.metric(profile)
        self.validating = os.environ.get("MVREPRO_VALIDATE") == "1"
        out = RESULTS if self.validating else Path(os.environ.get(OUT, SCRATCH))
        self._shapes: dict[str, KeysView[str]] = {}
        self.folder, self.forms = out / "figures" / profile / notebook, [] if out == RESULTS else ["png", "pdf"]
        if not self.validating and OUT not in os.environ:
            print(f"figures and values of this notebook go to {shown(self.folder)}")
        plots.use_style()

    def header(
        self, *, section: str, equations: str, tested: str, run_time: str, in_short: str = "", trained: bool = True
    ) -> None:
        """The box at the top: the section of the paper, its equations, what is tested, what a long page found,
        the verdicts so far, and how long the notebook takes. All strings are Markdown. trained: whether it shows
        runs of its profile, which the box then describes."""
        verdicts = claims.evaluate(self.profile, self.notebook)
        # Claims about exact values are judged at the end of the notebook that computes them: here they
        # would show what an earlier execution left.
        exact = {claim["id"] for claim in claims.load() if claim["rule"] == "bound"}
        about = f"`{self.profile}`: {claims.metrics()[self.profile].get('about', '')}" if trained else ""
        rows = [("Section of the paper", section), ("Equations", equations), ("Tested here", tested)]
        rows += [("In short", in_short), ("Profile", about)]
        rows += [(v.verdict, f"{v.claim}: {v.found}") for v in verdicts if v.id not in exact]
        lines = [f"| **{name}** | {text} |" for name, text in [*rows, ("Run time", run_time)] if text]
        display(Markdown("\n".join(["| | |", "| --- | --- |", *lines])))

    def verdicts(self) -> None:
        """The verdicts of this notebook's claims, as a table."""
        self.table(claim_table(claims.evaluate(self.profile, self.notebook)))

    def figure(
        self, figure: Figure, name: str, data: Mapping[str, Any], *, alt: str, kind: str, keep: bool = False
    ) -> None:
        """Show a figure and write <name>.json: the data behind it, its alt text, and the hash of the PNG, which
        stands in the executed notebook. Outside results/ the PNG is written beside it, and a PDF for print.

        kind  "exact": pure mathematics; "training": out of runs; "measured": times and memory of one machine
        keep  write the PNG in results/, too
        """
        png = plots.picture(figure, "png")
        self._write(name, {"alt": alt, "sha256": hashlib.sha256(png).hexdigest(), "data": _plain(data)}, kind)
        for form in self.forms or (["png"] if keep and not self.validating else []):
            # Not drawn again as PNG: the layout of a second drawing differs by some pixels.
            write_atomic(self.folder / f"{name}.{form}", png if form == "png" else plots.picture(figure, form))
        plt.close(figure)
        width = round(figure.get_figwidth() * 100)
        display(
            Image(data=png, format="png", width=width, alt=alt), metadata={"image/png": {"alt": alt, "width": width}}
        )

    def record(self, name: str, values: Mapping[str, float | int | str], *, kind: str) -> None:
        """Write named values as <name>.json, where claims and readers find them. kind: as in figure."""
        self._write(name, {"notebook": self.notebook, "values": _plain(values)}, kind)

    def course(
        self, sides: Sequence[plots.Side], name: str, looks: Sequence[Mapping[str, object]] | None = None
    ) -> None:
        """Figure `name`: how the default runs of these sides (loss, variant) learned, epoch by epoch (plots.course).
        Sides without runs are left out; a line of text where none has any. looks: one a side; None: the loss's."""
        curves, kinds = runs.curves(self.profile, kind=None), {}
        for (loss, variant), style in zip(sides, looks or [plots.look(loss) for loss, _ in sides], strict=True):
            if len(rows := runs.of(curves, loss, variant)):
                kinds[plots.short(loss, variant)] = rows, style
        if not kinds:
            print(f"All curves of this figure wait for runs of {', '.join(plots.short(*side) for side in sides)}.")
            return
        figure, data = plots.course(kinds)
        alt = f"Training loss, training top-1, share of marked classes and median p_y by epoch, of {', '.join(kinds)}"
        self.figure(figure, name, data, alt=alt, kind="training")

    def learned(self, frame: pd.DataFrame) -> None:
        """The gate of claims.toml as a table: what runs.table() says of the networks in the end, a row a loss and
        variant, as means over seeds."""
        groups = frame[frame["default"]].groupby(["loss", "variant"], sort=False)
        means, seeds = groups[runs.LEARNED].mean(), groups["seed"].nunique()
        rows = []
        for (loss, variant), row in means.iterrows():
            cells = [percent(row["top1"]), percent(row["marked_share"], 2), f"{row['median_p_y']:.2g}"]
            cells += [f"{row['own_cosine']:+.2f}", f"{row['other_cosine']:+.2f}", percent(row["gradient_distance"])]
            rows.append([plots.short(loss, variant), seeds[loss, variant], *cells])
        columns = ["Loss", "Seeds", "Training top-1 (%)", "Still marked (%)", "Median p_y", "Cosine with the own class"]
        columns += ["With the others", "Gradient's distance from the margin loss's (%)"]
        self.table(pd.DataFrame(rows, columns=columns))

    def table(self, frame: pd.DataFrame) -> None:
        """Show a table without its index; cells are printed as they are, so format them first."""
        columns = [str(c) for c in frame.columns]
        rows = [[str(cell).replace("|", "\\|") for cell in row] for row in frame.itertuples(index=False)]
        lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        display(Markdown("\n".join(lines)))

    def _write(self, name: str, content: Mapping[str, Any], kind: str) -> None:
        """Write <name>.json, or compare it with the committed one."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if self._shapes.setdefault(name, content.keys()) != content.keys():
            raise ValueError(f"{name!r} is the name of a figure and of values: one would replace the other")
        path, record = self.folder / f"{name}.json", {"kind": kind, **content}
        if not self.validating:
            write_json(path, record)
            if OUT not in os.environ:  # somebody plays with it
                print(f"{name}: {against_committed(RESULTS / 'figures' / self.profile / self.notebook, path)}")
            return
        if not path.is_file():
            raise UserError(f"{shown(path)} is missing: `make reproduce` writes it")
        committed = read_json(path)
        for key in sorted(record.keys() - {"sha256"}):  # pixels depend on the fonts
            if found := difference(committed.get(key), record[key], key):
                raise UserError(f"{shown(path)} is not what this notebook computes: {found}")


def against_committed(folder: Path, path: Path) -> str:
    """In words: are the data behind a figure, or recorded values, those of the same name in folder?"""
    committed = folder / path.name
    if not committed.is_file():
        return "nothing of this name is committed"
    old, new = ({**read_json(each), "sha256": ""} for each in (committed, path))  # pixels depend on the fonts
    found = difference({**old, "alt": ""}, {**new, "alt": ""})
    return f"differs from the committed result: {found.lstrip('.')}" if found else "as committed"


def check_parameters(cells: Sequence[str]) -> None:
    """Raise UserError for a parameter that papermill was given and the notebook lacks: papermill alone warns of it
    and goes on. cells: the sources executed so far; papermill's own cell follows that of the parameters."""
    for before, cell in itertools.pairwise(cells):
        if cell.startswith("# Parameters\n"):
            known, given = literals(before), literals(cell)
            if known and given and not given <= known:
                raise UserError(f"no parameter {', '.join(given - known)} here; there are: {', '.join(sorted(known))}")


def claim_table(verdicts: list[claims.Verdict]) -> pd.DataFrame:
    """The table of claims as readers see it."""
    rows = [(v.claim, f"{v.source} ({v.mark})", f"**{v.verdict}**", v.found, v.notebook) for v in verdicts]
    return pd.DataFrame(rows, columns=["Claim", "Source", "Verdict", "Found", "Notebook"])


def contents(folder: Path = NOTEBOOKS) -> pd.DataFrame:
    """The notebooks that exist: each title as a link, with the section of the paper that its header names."""
    rows = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        cells = read_json(path)["cells"]
        title = "".join(cells[0]["source"]).splitlines()[0].removeprefix("# ")
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        keywords = [n for text in code for n in ast.walk(ast.parse(text)) if isinstance(n, ast.keyword)]
        sections = [ast.literal_eval(k.value) for k in keywords if k.arg == "section"]
        rows.append((path.stem[:2], f"[{title}]({path.name})", sections[0] if sections else "–"))
    return pd.DataFrame(rows, columns=["Notebook", "Title", "Section of the paper"])


def percent(value: float, digits: int = 1) -> str:
    """0.573 -> "57.3"."""
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _plain(value: Any) -> Any:
    """Arrays, tensors and frames as lists, so that JSON holds the data; NaN as null."""
    if isinstance(value, pd.DataFrame):
        return _plain(value.to_dict("list"))
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.9g}")
    return value
