"""The paper's claims and their verdicts, by rules that stood in paper/claims.toml before the runs.

Rules:
    bound     a value that a notebook computed (results/figures/<profile>/<notebook>/<artifact>.json) is <= bound:
              reproduced, else not reproduced. For exact mathematics.
    greater   `better` beats `worse` on the profile's metric, paired over seeds; better_variant,
              worse_variant: in runs of that runs.variant. Reproduced: the one-sided paired
              t-test, Holm-adjusted within the claim's family, has p < 0.05. Qualitatively: the mean
              difference is above 0, but not significant. Not reproduced: it is not above 0.
    unclear   of none of the `pairs` (better, worse) is the gain significant, judged as in `greater` with the
              pairs as family: qualitatively (no gain seen is not proof of none), else not reproduced.
    argmax    averaged over `losses` and the seeds that every t has, the best t lies in `range`: qualitatively (no test
              stands behind it), else not reproduced.
    untested  not tested, with the reason.
A verdict holds for one profile. A claim with `profiles` is judged on those alone: others have no notebook for it.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mvrepro.errors import UserError
from mvrepro.evidence import runs
from mvrepro.evidence.stats import Estimate, holm, paired_difference
from mvrepro.files import RESULTS, ROOT, display, read_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPRODUCED, QUALITATIVELY, NOT_REPRODUCED, NOT_TESTED = (
    "reproduced",
    "qualitatively",
    "not reproduced",
    "not tested",
)


@dataclass(frozen=True)
class Verdict:
    """One row of the table of claims. `found` says what was measured, in words; `numbers` holds it."""

    id: str
    notebook: str
    claim: str
    source: str
    mark: str
    profile: str
    verdict: str
    found: str
    numbers: dict[str, float | int | None]
    command: str
    artifact: str


def load(path: Path = ROOT / "paper" / "claims.toml") -> list[dict[str, Any]]:
    """The claims in the order of the file."""
    return list(tomllib.loads(path.read_text(encoding="utf-8"))["claim"])


def metric(profile: str, path: Path = ROOT / "paper" / "claims.toml") -> tuple[str, str]:
    """The metric that a profile's verdicts rest on: its column in runs.table and its name for readers."""
    found = metrics(path)
    if profile not in found:
        raise UserError(f"{display(path)}: no metric for the profile {profile!r}; it has: {', '.join(found)}")
    return found[profile]["column"], found[profile]["label"]


def metrics(path: Path = ROOT / "paper" / "claims.toml") -> dict[str, dict[str, str]]:
    """[metric.<profile>] of the file, by profile and in its order."""
    return dict(tomllib.loads(path.read_text(encoding="utf-8"))["metric"])


def evaluate(profile: str, notebook: str | None = None, folder: Path = RESULTS) -> list[Verdict]:
    """A verdict for each claim (of one notebook, such as "04", or of all) on one profile.

    Holm's correction always counts the whole family, whichever notebook is asked for.
    """
    claims = load()
    frame = _runs(profile, folder)
    column = metric(profile)[0]
    greater = [c for c in claims if c["rule"] == "greater" and profile in _profiles(c, profile)]
    differences = {c["id"]: _difference(c, column, frame) for c in greater}
    adjusted = _adjust(claims, differences)
    verdicts = []
    for claim in claims:
        if notebook is None or claim["notebook"] == notebook:
            verdicts.append(_judge(claim, profile, column, frame, differences, adjusted, folder))
    return verdicts


def _profiles(claim: dict[str, Any], profile: str) -> list[str]:
    """Those that the claim is judged on: all, so this one, too, unless it names them."""
    return list(claim.get("profiles", [profile]))


def _runs(profile: str, folder: Path) -> pd.DataFrame | None:
    try:
        return runs.table(profile, folder, kind=None)
    except UserError:
        return None


def _difference(claim: dict[str, Any], column: str, frame: pd.DataFrame | None) -> Estimate | None:
    """The paired difference over the seeds that both losses have, or None where there are too few."""
    if frame is None or column not in frame:
        return None
    better, worse = (
        runs.by_seed(frame[frame["variant"] == claim.get(f"{side}_variant", "")], column, claim[side])
        for side in ("better", "worse")
    )
    seeds = better.index.intersection(worse.index)
    if len(seeds) < claim.get("min_seeds", 3):
        return None
    return paired_difference(better[seeds], worse[seeds])


def _adjust(claims: list[dict[str, Any]], differences: dict[str, Estimate | None]) -> dict[str, float]:
    families: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for claim in claims:
        estimate = differences.get(claim["id"])
        if estimate:
            families[claim["family"]].append((claim["id"], estimate.p))
    return {
        id_: p for family in families.values() for (id_, _), p in zip(family, holm([p for _, p in family]), strict=True)
    }


def _judge(
    claim: dict[str, Any],
    profile: str,
    column: str,
    frame: pd.DataFrame | None,
    differences: dict[str, Estimate | None],
    adjusted: dict[str, float],
    folder: Path,
) -> Verdict:
    judged_on = _profiles(claim, profile)
    here = profile in judged_on
    rule, artifact = claim["rule"] if here else "untested", ""
    command = f"make reproduce PROFILE={profile if here else judged_on[0]} NB={claim['notebook']}"
    verdict, numbers = NOT_TESTED, {}
    found = claim.get("why", "the profile has no such runs" if here else f"judged on {judged_on[0]}")
    if rule == "bound":
        name, key = claim["value"].split(":")
        place = Path("figures", profile, claim["notebook"], f"{name}.json")
        artifact, path = f"results/{place}", folder / place
        found = "not computed yet"
        values = read_json(path)["values"] if path.is_file() else {}
        if key in values:
            numbers = {"value": values[key], "bound": claim["bound"]}
            value = math.nan if values[key] is None else values[key]
            verdict = REPRODUCED if value <= claim["bound"] else NOT_REPRODUCED
            relation = "within" if value <= claim["bound"] else "beyond"
            found = f"deviation {relation} its bound, {claim['bound']:.0e}"
    elif rule == "greater":
        artifact = f"results/runs/{profile}"
        estimate = differences[claim["id"]]
        if estimate:
            p = adjusted[claim["id"]]
            verdict = REPRODUCED if estimate.mean > 0 and p < 0.05 else QUALITATIVELY
            verdict = verdict if estimate.mean > 0 else NOT_REPRODUCED
            found = (
                f"{100 * estimate.mean:+.2f} points [{100 * estimate.low:+.2f}, {100 * estimate.high:+.2f}], "
                f"{estimate.n} seeds, adjusted p = {p:.2g}"
            )
            numbers = {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}
            numbers |= {"seeds": estimate.n, "adjusted_p": p}
    elif rule == "argmax":
        artifact = f"results/runs/{profile}"
        best = None if frame is None else best_t(frame[frame["variant"] == ""], column, claim["losses"])
        if best is not None:
            low, high = claim["range"]
            verdict = QUALITATIVELY if low - 1e-9 <= best <= high + 1e-9 else NOT_REPRODUCED
            found, numbers = f"best mean at t = {best:g}", {"best_t": best}
    elif rule == "unclear":
        artifact = f"results/runs/{profile}"
        pairs = [_difference({"better": a, "worse": b}, column, frame) for a, b in claim["pairs"]]
        estimates = [e for e in pairs if e]
        if len(estimates) == len(pairs):
            ps = holm([e.p for e in estimates])
            verdict = QUALITATIVELY if min(ps) >= 0.05 else NOT_REPRODUCED
            gains = ", ".join(f"{100 * e.mean:+.2f}" for e in estimates)
            found = f"gains of {gains} points, least adjusted p = {min(ps):.2g}"
            numbers = {"least_adjusted_p": min(ps), "largest_gain": max(e.mean for e in estimates)}
    elif rule != "untested":
        raise UserError(f"paper/claims.toml, claim {claim['id']}: unknown rule {rule!r}")
    return Verdict(
        claim["id"], claim["notebook"], claim["claim"], claim["source"], claim["mark"],
        profile, verdict, found, numbers, command, artifact,
    )  # fmt: skip


def best_t(frame: pd.DataFrame, metric: str, losses: list[str]) -> float | None:
    """The t whose mean over losses and seeds is highest, among those that every one of the losses has
    (t = 0 is not one of them: it is another loss), over the seeds that all of these have; None where there
    are fewer than two t, or no such seed."""
    if metric not in frame:
        return None
    chosen = frame[frame["loss"].isin(losses)]
    complete = chosen.groupby("t")["loss"].nunique() == len(losses)
    chosen = chosen[chosen["t"].isin(complete.index[complete])]
    whole = chosen.groupby("seed").size() == len(losses) * int(complete.sum())
    means = chosen[chosen["seed"].isin(whole.index[whole])].groupby("t")[metric].mean()
    return float(means.idxmax()) if len(means) > 1 else None
