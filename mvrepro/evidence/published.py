"""Numbers of other people, out of paper/published.toml: each with its source and how well it is known."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mvrepro.errors import UserError
from mvrepro.files import ROOT, display, read_toml

PUBLISHED = ROOT / "paper" / "published.toml"


@dataclass(frozen=True)
class Row:
    """One published value. In a table of results `what` is the loss and `column` the test set."""

    kind: str
    what: str
    column: str
    value: float | int | str | list[float]
    mark: str
    source: str
    note: str


def load(path: Path = PUBLISHED) -> list[Row]:
    """Every value of the file, in its order. Raises UserError for an unknown mark, a value without a
    source, or a table with a row of the wrong length."""
    content = read_toml(path)
    rows = [
        Row(f["kind"], f["what"], "", f["value"], f["mark"], f["source"], f.get("note", "")) for f in content["facts"]
    ]
    for r in content["results"]:
        for loss, values in r["losses"].items():
            if len(values) != len(r["columns"]):
                raise UserError(
                    f"{display(path)}, {r['kind']}, {loss}: {len(values)} values for {len(r['columns'])} columns"
                )
            for column, value in zip(r["columns"], values, strict=True):
                rows.append(Row(r["kind"], loss, column, value, r["mark"], r["source"], r.get("note", "")))
    known = ", ".join(content["marks"])
    for row in rows:
        if row.mark not in content["marks"] or not row.source:
            raise UserError(f"{display(path)}, {row.kind}, {row.what}: needs a source and a mark out of {known}")
    return rows


def marks(path: Path = PUBLISHED) -> dict[str, str]:
    """What each mark means."""
    return dict(read_toml(path)["marks"])


def captions(path: Path = PUBLISHED) -> dict[str, str]:
    """For each table of results, by kind: its title with source, mark and note."""
    results = read_toml(path)["results"]
    texts = {}
    for r in results:
        note = f"; {r['note']}" if "note" in r else ""
        texts[r["kind"]] = f"**{r['title']}** (per cent; {r['source']}; mark {r['mark']}{note})"
    return texts


def table(kind: str, path: Path = PUBLISHED) -> pd.DataFrame:
    """One kind as readers see it: facts as a list, results with a row a loss and a column a test set."""
    rows = _of_kind(kind, path)
    if not rows[0].column:
        cells = [(r.what, text(r.value), r.mark, r.source, r.note) for r in rows]
        return pd.DataFrame(cells, columns=["What", "Value", "Mark", "Source", "Note"])
    frame = pd.DataFrame({"Loss": list(dict.fromkeys(r.what for r in rows))})
    for column in dict.fromkeys(r.column for r in rows):
        frame[column] = [f"{r.value:.2f}" for r in rows if r.column == column]
    return frame


def differences(kind: str, better: str, worse: str, path: Path = PUBLISHED) -> dict[str, float]:
    """better − worse in points, for each test set of a table of results."""
    values: dict[str, dict[str, Any]] = {}
    for row in _of_kind(kind, path):
        values.setdefault(row.what, {})[row.column] = row.value
    missing = sorted({better, worse} - values.keys())
    if missing:
        raise UserError(f"{display(path)}, {kind}: has no {', '.join(missing)}; it has: {', '.join(values)}")
    return {column: round(value - values[worse][column], 2) for column, value in values[better].items()}


def text(value: float | int | str | list[float]) -> str:
    """86876 -> "86,876", [4, 8] -> "4, 8", text as it is."""
    if isinstance(value, list):
        return ", ".join(text(v) for v in value)
    return value if isinstance(value, str) else f"{value:,}"


def _of_kind(kind: str, path: Path) -> list[Row]:
    rows = load(path)
    chosen = [row for row in rows if row.kind == kind]
    if not chosen:
        known = ", ".join(dict.fromkeys(row.kind for row in rows))
        raise UserError(f"{display(path)}: nothing of kind {kind!r}; known are: {known}")
    return chosen
