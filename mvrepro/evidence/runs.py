"""Reading what training wrote: results/runs/<profile>/*.json as tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mvrepro.errors import UserError
from mvrepro.files import RESULTS, ROOT, display, read_json, read_yaml
from mvrepro.losses import LOSSES

# of `table`, before the metrics
LEARNED = ["top1", "marked_share", "median_p_y", "own_cosine", "other_cosine", "gradient_distance"]
COLUMNS = ["variant", "loss", "f", "h", "g", "t", "default", "seed", "embedding_dim", *LEARNED]


class NoRuns(UserError):
    """A profile has no records yet."""


def records(profile: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of all runs of a profile, sorted by file name. Raises NoRuns where there are none."""
    here = folder / "runs" / profile
    paths = sorted(here.glob("*.json"))
    if not paths:
        raise NoRuns(f"no runs in {display(here)}: `make reproduce` makes them")
    return [read_json(path) for path in paths]


def default_records(profile: str, variant: str | None = "", folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of the runs at the profile's own t, in the order of `records`: of one variant ("": the plain ones),
    or of all (None)."""
    return [record for config, record in _chosen(profile, folder, variant) if config["default"]]


def default_t(profile: str) -> float:
    """The t of a profile's plain runs, out of params.yaml. Raises UserError where it says none."""
    settings = read_yaml(ROOT / "params.yaml").get(profile, {}).get("train", {})
    if "t" not in settings:
        raise UserError(f"params.yaml, {profile}.train: needs t, which says what the default run of an MV loss is")
    return float(settings["t"])


def table(profile: str, folder: Path = RESULTS, *, kind: str | None = "") -> pd.DataFrame:
    """One row a run: variant, loss, f, h, g, t (0 where the loss has no emphasis), default
    (is t that of the profile, or 0?), seed, embedding_dim, whether the network has learned (training.testing.learned;
    of older records NaN, and the marked share of the last epoch), and a column a metric (shares in [0, 1]); sorted by
    the order of LOSSES, then t, then seed.

    kind: the runs of this variant only ("": the plain ones); None: all.
    """
    rows = []
    for config, record in _chosen(profile, folder, kind):
        f, h, g = (getattr(LOSSES[config["loss"]], part) for part in "fhg")
        values = config | {"f": f, "h": h or "–", "g": g or "–"}
        marked = (record["curve"].get("marked_share") or [np.nan])[-1]
        values |= dict.fromkeys(LEARNED, np.nan) | {"marked_share": marked} | record.get("learned", {})
        rows.append({column: values[column] for column in COLUMNS} | record["metrics"])
    if not rows:
        raise UserError(f"no runs of the variant {kind!r} in {display(folder / 'runs' / profile)}")
    order = {loss: place for place, loss in enumerate(LOSSES)}
    return pd.DataFrame(rows).sort_values(
        ["loss", "t", "seed"], kind="stable", ignore_index=True, key=lambda c: c.map(order) if c.name == "loss" else c
    )


def curves(profile: str, folder: Path = RESULTS, *, kind: str | None = "") -> pd.DataFrame:
    """One row an epoch of a run: variant, loss, t, default (both as in table), seed, epoch (from 1), and the columns
    of the curve, whose "loss" is called training_loss here. kind: as in table."""
    parts = []
    for config, record in _chosen(profile, folder, kind):
        part = pd.DataFrame(record["curve"]).rename(columns={"loss": "training_loss"})
        about = {name: config[name] for name in ("variant", "loss", "t", "default", "seed")}
        for place, (name, value) in enumerate((about | {"epoch": range(1, len(part) + 1)}).items()):
            part.insert(place, name, value)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def features(profile: str, folder: Path = RESULTS) -> list[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    """(record, arrays) of each run that keeps, beside its record, the features (N, D) of its test images, their ids
    (N,) and its class weights (K, D); in the order of LOSSES, then of file names."""
    paths = sorted((folder / "runs" / profile).glob("*.safetensors"))
    found = [(read_json(path.with_suffix(".json")), load_file(path)) for path in paths]
    return sorted(found, key=lambda each: list(LOSSES).index(each[0]["config"]["loss"]))


def of(frame: pd.DataFrame, loss: str, variant: str = "") -> pd.DataFrame:
    """The default runs of a loss, in this variant, out of a table or curves."""
    return frame[(frame["loss"] == loss) & (frame["variant"] == variant) & frame["default"]]


def by_seed(frame: pd.DataFrame, metric: str, loss: str, t: float | None = None) -> pd.Series:
    """The metric of one loss indexed by seed; t None: its default run.
    Raises UserError where a seed has two such runs, since nothing says which of them counts, and where one
    lacks the metric, since its test measures others."""
    at_t = frame["default"] if t is None else (frame["t"] - t).abs() < 1e-9
    chosen = frame[(frame["loss"] == loss) & at_t]
    if chosen["seed"].duplicated().any():
        raise UserError(f"two runs of {loss} have the same t and seed: keep one of their files in results/runs")
    values = chosen.set_index("seed").reindex(columns=[metric])[metric].sort_index()
    if values.isna().any():
        known = chosen.drop(columns=COLUMNS, errors="ignore").dropna(axis="columns", how="all")
        variant = f", {chosen['variant'].iloc[0]}," if chosen["variant"].iloc[0] else ""
        raise UserError(f"the runs of {loss}{variant} don't measure {metric!r}; they have: {', '.join(known)}")
    return values


def evidence(
    profile: str, part: str, folder: Path = RESULTS, *, kind: str = ""
) -> dict[tuple[str, float, int], dict[str, Any]]:
    """(loss, t, seed) -> what the runs of this variant keep of one part of their test beside its metrics, such
    as "lfw", "all_pairs", "blufr", "rank1" (mvrepro/training/tasks.py says what is in each); rows of numbers and bits
    are arrays here. t is 0 where the loss has no emphasis."""
    return {
        (config["loss"], config["t"], config["seed"]): _arrays(record["evidence"][part])
        for config, record in _chosen(profile, folder, kind)
        if part in record.get("evidence", {})
    }


def numbers(words: str) -> NDArray[np.int64]:
    """ "3 0 12" -> array([3, 0, 12])."""
    return np.array(words.split(), dtype=np.int64)


def _chosen(profile: str, folder: Path, kind: str | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(settings, record) of the runs of a variant, with t = 0 where the loss has no emphasis, and
    whether t is the profile's own."""
    found = [({"variant": "", **record["config"]}, record) for record in records(profile, folder)]
    found = [(config, record) for config, record in found if kind is None or config["variant"] == kind]
    usual = default_t(profile) if any(LOSSES[config["loss"]].h for config, _ in found) else 0.0
    for config, _ in found:
        config["t"] = config["t"] if LOSSES[config["loss"]].h else 0.0
        config["default"] = not LOSSES[config["loss"]].h or abs(config["t"] - usual) < 1e-9
    return found


def _arrays(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _arrays(inner, key) for key, inner in value.items()}
    if name == "correct":
        return np.unpackbits(np.frombuffer(bytes.fromhex(value), np.uint8)).astype(bool)
    if isinstance(value, str):
        return numbers(value)
    return np.array(value) if isinstance(value, list) else value
