"""Reading what training wrote: results/runs/<profile>/*.json as tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mvrepro.errors import UserError
from mvrepro.files import RESULTS, display, read_json
from mvrepro.losses import LOSSES

COLUMNS = ["variant", "loss", "f", "h", "g", "t", "seed", "embedding_dim"]  # of `table`, before the metrics


def records(profile: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of all runs of a profile, sorted by file name. Raises UserError where there are none."""
    here = folder / "runs" / profile
    paths = sorted(here.glob("*.json"))
    if not paths:
        raise UserError(f"no runs in {display(here)}: `make reproduce` makes them")
    return [read_json(path) for path in paths]


def table(profile: str, folder: Path = RESULTS, *, kind: str | None = "") -> pd.DataFrame:
    """One row a run: variant, loss, f, h, g, t (0 where the loss has no emphasis), seed, embedding_dim, and
    a column a metric (shares in [0, 1]); sorted by the order of LOSSES, then t, then seed.

    kind: the runs of this variant only ("": the plain ones); None: all.
    """
    rows = []
    for record in records(profile, folder):
        config, row = record["config"], LOSSES[record["config"]["loss"]]
        variant = config.get("variant", "")
        if kind is not None and variant != kind:
            continue
        rows.append(
            {
                "variant": variant,
                "loss": config["loss"],
                "f": row.f,
                "h": row.h or "–",
                "g": row.g or "–",
                "t": config["t"] if row.h else 0.0,
                "seed": config["seed"],
                "embedding_dim": config["embedding_dim"],
                **record["metrics"],
            }
        )
    if not rows:
        raise UserError(f"no runs of the variant {kind!r} in {display(folder / 'runs' / profile)}")
    frame = pd.DataFrame(rows)
    frame["loss"] = pd.Categorical(frame["loss"], categories=list(LOSSES), ordered=True)
    frame = frame.sort_values(["loss", "t", "seed"], kind="stable").reset_index(drop=True)
    frame["loss"] = frame["loss"].astype(str)
    return frame


def curves(profile: str, folder: Path = RESULTS, *, kind: str | None = "") -> pd.DataFrame:
    """One row an epoch of a run: variant, loss, t (0 where the loss has no emphasis), seed, epoch (from 1),
    and the columns of the curve, whose "loss" is called training_loss here. kind: as in table."""
    parts = []
    for record in records(profile, folder):
        config = {"variant": "", **record["config"]}
        if kind is not None and config["variant"] != kind:
            continue
        config["t"] = config["t"] if LOSSES[config["loss"]].h else 0.0
        part = pd.DataFrame(record["curve"])
        part = part.rename(columns={"loss": "training_loss"})
        part.insert(0, "epoch", range(1, len(part) + 1))
        for name in ("seed", "t", "loss", "variant"):
            part.insert(0, name, config[name])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def features(profile: str, folder: Path = RESULTS) -> list[tuple[dict[str, Any], dict[str, NDArray[Any]]]]:
    """(record, arrays) of each run that keeps, beside its record, the features (N, D) of its test images, their ids
    (N,) and its class weights (K, D); in the order of LOSSES, then of file names."""
    paths = sorted((folder / "runs" / profile).glob("*.safetensors"))
    found = [(read_json(path.with_suffix(".json")), load_file(path)) for path in paths]
    return sorted(found, key=lambda each: list(LOSSES).index(each[0]["config"]["loss"]))


def by_seed(frame: pd.DataFrame, metric: str, loss: str, t: float | None = None) -> pd.Series:
    """The metric of one loss indexed by seed; t None: its default run (0.2, or 0 without emphasis).
    Raises UserError where a seed has two such runs, since nothing says which of them counts, and where one
    lacks the metric, since its test measures others."""
    if t is None:
        t = 0.2 if LOSSES[loss].h else 0.0
    chosen = frame[(frame["loss"] == loss) & ((frame["t"] - t).abs() < 1e-9)]
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
    found = {}
    for record in records(profile, folder):
        config = record["config"]
        if config.get("variant", "") == kind and part in record.get("evidence", {}):
            t = config["t"] if LOSSES[config["loss"]].h else 0.0
            found[config["loss"], t, config["seed"]] = _arrays(record["evidence"][part])
    return found


def numbers(words: str) -> NDArray[np.int64]:
    """ "3 0 12" -> array([3, 0, 12])."""
    return np.array(words.split(), dtype=np.int64)


def _arrays(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _arrays(inner, key) for key, inner in value.items()}
    if name == "correct":
        return np.unpackbits(np.frombuffer(bytes.fromhex(value), np.uint8)).astype(bool)
    if isinstance(value, str):
        return numbers(value)
    return np.array(value) if isinstance(value, list) else value
