"""Every loss of the MV-Softmax paper on one page: a margin f, an emphasis h and a mining weight g.

Symbols, with the shapes that the code uses (B samples, K classes, D dimensions):

    x (B, D)       embeddings, normalised here: u = x / |x|
    W (K, D)       class weights, normalised here: v = w / |w|
    cosθ_k (B, K)  u·v_k;  y is the label, θ_y the angle to its own class
    s              the scale that multiplies every cosine

Equation numbers follow the order in which the paper introduces its equations; L1 to L4 are its own names for the first
four ("Mis-classified Vector Guided Softmax Loss for Face Recognition", AAAI 2020, arXiv 1912.00833; definitions as in
the authors' code, see paper/published.toml).

    Eq. 1  L1 = −log e^{s cosθ_y} / (e^{s cosθ_y} + Σ_{k≠y} e^{s cosθ_k})             Softmax
    Eq. 2  L2 = −g(p_y) log p_y                                                       mining
    Eq. 3  L3: cosθ_y becomes f(m, θ_y) = cos(m1 θ_y + m3) − m2                       margin
    Eq. 4  L4 = −g(p_y) log p_y with the p_y of Eq. 3                                 naive fusion
    Eq. 5  I_k = 1 where f(m, θ_y) − cosθ_k < 0, else 0 (k ≠ y)                       indicator
    Eq. 6  L5: e^{s cosθ_k} is multiplied by h(t, θ_k, I_k)                           MV-Softmax
    Eq. 7  h = e^{s t I_k}:              a marked cosθ_k becomes cosθ_k + t           fixed, -f
    Eq. 8  h = e^{s t (cosθ_k + 1) I_k}: a marked cosθ_k becomes (1 + t) cosθ_k + t   adaptive, -a

mvrepro.heads puts them to work on embeddings and class weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """One row of the table of losses.

    f: "cos" (no margin), "A", "AM" or "Arc"; h: None, "fixed" or "adaptive"; g: None, "HM" or "F".
    """

    f: str = "cos"
    h: str | None = None
    g: str | None = None


LOSSES: dict[str, Loss] = {
    "Softmax": Loss(),
    "HM-Softmax": Loss(g="HM"),
    "F-Softmax": Loss(g="F"),
    "A-Softmax": Loss("A"),
    "AM-Softmax": Loss("AM"),
    "Arc-Softmax": Loss("Arc"),
    "HM-AM-Softmax": Loss("AM", g="HM"),
    "F-AM-Softmax": Loss("AM", g="F"),
    "HM-Arc-Softmax": Loss("Arc", g="HM"),
    "F-Arc-Softmax": Loss("Arc", g="F"),
    "SV-Softmax": Loss("cos", h="adaptive"),
    "SV-AM-Softmax": Loss("AM", h="adaptive"),  # t_SV = 1 + t: MV-AM-Softmax-a under its first name
    "SV-Arc-Softmax": Loss("Arc", h="adaptive"),
    "MV-AM-Softmax-f": Loss("AM", h="fixed"),
    "MV-AM-Softmax-a": Loss("AM", h="adaptive"),
    "MV-Arc-Softmax-f": Loss("Arc", h="fixed"),
    "MV-Arc-Softmax-a": Loss("Arc", h="adaptive"),
}

# What a margin is when nobody says: AM's is the default of the authors' code, Arc's what others use,
# A's our choice among the integers (the paper's are not available to us).
DEFAULT_MARGIN = {"cos": 0.0, "A": 2.0, "AM": 0.35, "Arc": 0.5}


def sine(cos: Tensor) -> Tensor:
    """sinθ from cosθ, with a finite slope everywhere.

    The slope −cosθ/sinθ is infinite at θ = 0 and π. Within rounding of those points (1 − cos²θ below the dtype's
    epsilon) the sine is 0 and so is its slope.
    """
    eps = torch.finfo(cos.dtype).eps
    square = (1 - cos) * (1 + cos)
    safe = square.clamp(min=eps)
    # x/√x for √x, whose last bits torch takes from MKL on a CPU: other ones on AMD's than on Intel's
    return torch.where(square > eps, safe * safe.rsqrt(), torch.zeros_like(square))


def combined_margin(cos: Tensor, m1: float = 1.0, m2: float = 0.0, m3: float = 0.0) -> Tensor:
    """Eq. 3: f = cos(m1 θ + m3) − m2, of cosθ in any shape.

    m1 > 1 is A-Softmax: past π the cosine would rise again, so it is continued downwards as (−1)^k cos φ − 2k with
    k = floor(φ/π), φ = m1 θ + m3 (SphereFace, arXiv 1704.08063, section 3.2). m2 is the margin of the cosine
    (AM-Softmax), m3 that of the angle (Arc-Softmax), as in this paper; InsightFace numbers them the other way round.
    """
    sin = sine(cos)
    if m1 == 1.0:  # cos(θ + m3) by the addition theorem: no arccos, whose slope is infinite at 0
        return cos * math.cos(m3) - sin * math.sin(m3) - m2
    angle = m1 * torch.atan2(sin, cos) + m3
    k = torch.floor(angle.detach() / math.pi)
    sign = 1 - 2 * (k % 2)
    return sign * torch.cos(angle) - 2 * k - m2


def margin(f: str, cos: Tensor, m: float) -> Tensor:
    """f(m, θ_y) of Eq. 3 for one of the names "cos", "A", "AM", "Arc". Raises ValueError for another."""
    if f == "cos":
        return cos
    if f == "A":
        return combined_margin(cos, m1=m)
    if f == "AM":
        return combined_margin(cos, m2=m)
    if f == "Arc":
        return combined_margin(cos, m3=m)
    raise ValueError(f"no margin is called f={f!r}")


def indicator(f: Tensor, cos: Tensor) -> Tensor:
    """Eq. 5: I_k, True where f(m, θ_y) < cosθ_k. f (B, 1), cos (B, K) -> (B, K) bool; no gradient.

    It also fires at k = y, where the target logit overwrites what it did.
    """
    return cos.detach() > f.detach()


def emphasise(h: str, cos: Tensor, t: float | Tensor, *, stop_gradient: bool = False) -> Tensor:
    """Eqs. 7 and 8: what a marked cosθ_k becomes; s times it is the exponent of h e^{s cosθ_k}.

    stop_gradient: the t cosθ_k of Eq. 8 is a number to the backward pass, so a marked class is pushed with the strength
    of its probability and not 1 + t times that. Raises ValueError for another h than "fixed" and "adaptive".
    """
    if h == "fixed":
        return cos + t
    if h == "adaptive":
        return cos + t * (cos.detach() + 1) if stop_gradient else (1 + t) * cos + t
    raise ValueError(f"no emphasis is called h={h!r}")


def mine(g: str | None, losses: Tensor, gamma: float, hard_ratio: float) -> Tensor:
    """Eqs. 2 and 4: the mean of g(p_y) L over the batch, from the losses L = −log p_y (B,).

    HM: g = 1 for the hardest int(hard_ratio·B) samples (one at least), and the mean is over those.
    F: g = (1 − p_y)^γ = (1 − e^{−L})^γ, and the gradient goes through g too, as in the authors' code.
    None: g = 1. Raises ValueError for another.
    """
    if g == "HM":
        return losses.topk(max(1, int(hard_ratio * len(losses)))).values.mean()
    if g == "F":
        # At L = 0 the product is 0 whatever g is; g = 1 there keeps an infinite slope (γ < 1) out of it.
        miss = torch.where(losses > 0, -torch.expm1(-losses), 1)
        return (miss**gamma * losses).mean()
    if g is None:
        return losses.mean()
    raise ValueError(f"no mining is called g={g!r}")


def normalise(x: Tensor) -> Tensor:
    """Rows of x (N, D) at length 1. A row whose squared length rounds to 0 becomes 0 and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm == 0, math.inf, norm)


def __getattr__(name: str) -> Any:
    if name == "MarginHead":
        raise ImportError("mvrepro.losses.MarginHead is mvrepro.heads.MarginHead now")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
