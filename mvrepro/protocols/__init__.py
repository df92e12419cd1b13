"""Protocols on arrays of embeddings, scores, ids and names: they know nothing of models.

A score is a cosine, larger is more alike. Rates are shares in [0, 1].
"""

from mvrepro.protocols.folds import KFold, kfold_accuracy
from mvrepro.protocols.identification import (
    Identification,
    MegaFace,
    TrillionPairs,
    identify,
    megaface,
    nearest_people,
    rank1_by_person,
    trillion_pairs,
)
from mvrepro.protocols.open_set import Blufr, BlufrTrials, blufr, blufr_trials
from mvrepro.protocols.verification import (
    AllPairs,
    Operating,
    all_pairs,
    check_fprs,
    every_pair,
    impostor_pairs,
    pair_cosines,
    pair_scores,
    tpr_at_fpr,
)

__all__ = [
    "AllPairs", "Blufr", "BlufrTrials", "Identification", "KFold", "MegaFace", "Operating", "TrillionPairs",
    "all_pairs", "blufr", "blufr_trials", "check_fprs", "every_pair", "identify", "impostor_pairs",
    "kfold_accuracy", "megaface", "nearest_people", "pair_cosines", "pair_scores", "rank1_by_person",
    "tpr_at_fpr", "trillion_pairs",
]  # fmt: skip
