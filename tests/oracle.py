"""The losses of the MV-Softmax paper and their gradients once more: slowly, by hand, in float64.

Nothing here comes from mvrepro or torch. Every loss is the fraction as the paper writes it, sample
by sample and class by class, with angles out of arccos; every gradient is a derivative taken on
paper. The tests compare the library with it, a reader can compare it with the paper.

A loss is the triple (f, h, g) with f in "cos", "A", "AM", "Arc"; h in None, "fixed", "adaptive";
g in None, "HM", "F". θ_k is the angle between x and w_k, y the label, s the scale, m the margin.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Answer:
    """What the oracle says about a batch (B, D) against K class weights (K, D)."""

    loss: float  # the scalar over the batch
    losses: np.ndarray  # (B,) −log p_y
    logits: np.ndarray  # (B, K) exponents: s f at the label, s cosθ_k + log h elsewhere
    dx: np.ndarray  # (B, D) dloss/dx
    dW: np.ndarray  # (K, D) dloss/dW
    gap: float  # least |cosθ_k − f(θ_y)|, k ≠ y: how far the indicator is from its jump
    gaps: np.ndarray  # (B,) the same for each sample
    sines: np.ndarray  # (B,) sinθ_y: Arc's and A's slope is (something)/sinθ_y
    target: np.ndarray  # (B,) cosθ_y: the easy margin switches at 0


def psi(theta: float, m: float) -> float:
    """A-Softmax: ψ(θ) = (−1)^k cos(mθ) − 2k for θ in [kπ/m, (k+1)π/m], k = 0, 1, … (SphereFace)."""
    return (-1) ** interval(theta, m) * math.cos(m * theta) - 2 * interval(theta, m)


def interval(theta: float, m: float) -> int:
    for k in range(math.ceil(m)):
        if k * math.pi / m <= theta <= (k + 1) * math.pi / m:
            return k
    raise AssertionError(f"θ = {theta} is not in [0, π]")


def margin(f: str, theta: float, m: float) -> float:
    """f(m, θ_y)."""
    if f == "cos":
        return math.cos(theta)
    if f == "A":
        return psi(theta, m)
    if f == "AM":
        return math.cos(theta) - m
    assert f == "Arc"
    return math.cos(theta + m)


def margin_slope(f: str, theta: float, m: float) -> float:
    """df/dcosθ = (df/dθ) / (dcosθ/dθ) = −(df/dθ)/sinθ. At θ = 0 and π it isn't asked for (0 here)."""
    if f in ("cos", "AM"):
        return 1.0
    if math.sin(theta) == 0:
        return 0.0
    if f == "A":  # dψ/dθ = −(−1)^k m sin(mθ)
        return (-1) ** interval(theta, m) * m * math.sin(m * theta) / math.sin(theta)
    assert f == "Arc"  # dcos(θ+m)/dθ = −sin(θ+m)
    return math.sin(theta + m) / math.sin(theta)


def log_h(h: str | None, marked: bool, cos_k: float, s: float, t: float) -> float:
    """The logarithm of the emphasis: h = e^{s t I} (fixed) or e^{s t (cosθ_k + 1) I} (adaptive)."""
    if h is None or not marked:
        return 0.0
    if h == "fixed":
        return s * t
    assert h == "adaptive"
    return s * t * (cos_k + 1)


def log_h_slope(h: str | None, marked: bool, s: float, t: float) -> float:
    """d log h / d cosθ_k. The indicator is a step: its derivative is 0 and is left out."""
    return s * t if h == "adaptive" and marked else 0.0


def weight_of(g: str | None, losses: list[float], q: list[float], gamma: float, ratio: float) -> list[float]:
    """For each sample d(batch loss)/dL, L = −log p and q = 1 − p.

    HM: 1/kept for the int(ratio·B) largest L (at least one), 0 for the rest.
    F:  (1/B) d/dL [(1 − e^{−L})^γ L] = (1/B) [q^γ + γ q^{γ−1} p L].
    """
    B = len(losses)
    if g == "HM":
        kept = max(1, int(ratio * B))
        hardest = sorted(range(B), key=lambda i: -losses[i])[:kept]
        return [1 / kept if i in hardest else 0.0 for i in range(B)]
    if g == "F":
        # q = 0 means L = 0: q^γ + γ q^{γ−1} p L ~ (1 + γ) L^γ, which is 0 for γ > 0 and 1 for γ = 0
        return [
            (q[i] ** gamma + gamma * q[i] ** (gamma - 1) * (1 - q[i]) * losses[i] if q[i] else 0.0**gamma) / B
            for i in range(B)
        ]
    assert g is None
    return [1 / B] * B


def batch_loss(g: str | None, losses: list[float], q: list[float], gamma: float, ratio: float) -> float:
    """Σ g(p_y) L, over the samples that were kept (HM) or all of them."""
    B = len(losses)
    if g == "HM":
        kept = max(1, int(ratio * B))
        return sum(sorted(losses)[B - kept :]) / kept
    if g == "F":
        return sum(q[i] ** gamma * losses[i] for i in range(B)) / B
    return sum(losses) / B


def oracle(
    x: np.ndarray,
    W: np.ndarray,
    y: np.ndarray,
    row: tuple[str, str | None, str | None],
    *,
    s: float,
    m: float,
    t: float,
    gamma: float = 2.0,
    hard_ratio: float = 0.9,
    easy_margin: bool = False,
    lam: float | None = None,
) -> Answer:
    """Loss and gradients of the batch.

    easy_margin: where cosθ_y <= 0 the numerator keeps cosθ_y; the indicator compares with f all the same.
    lam: A-Softmax's annealing, f = (λ cosθ_y + ψ)/(1 + λ).
    """
    f_name, h, g = row
    x, W = np.asarray(x, dtype=np.float64), np.asarray(W, dtype=np.float64)
    (B, D), K = x.shape, len(W)
    x_norm = np.sqrt((x * x).sum(1))
    w_norm = np.sqrt((W * W).sum(1))
    u = np.array([x[i] / x_norm[i] if x_norm[i] else np.zeros(D) for i in range(B)])
    v = np.array([W[k] / w_norm[k] if w_norm[k] else np.zeros(D) for k in range(K)])
    C = np.clip(u @ v.T, -1, 1)

    losses, qs = [], []
    logits = np.zeros((B, K))
    dL_dC = np.zeros((B, K))  # of each sample's own −log p_y
    gaps, sines = np.full(B, np.inf), np.zeros(B)
    for i in range(B):
        label = int(y[i])
        cos_y = float(C[i, label])
        theta = math.acos(cos_y)
        sines[i] = math.sin(theta)
        f, f_slope = margin(f_name, theta, m), margin_slope(f_name, theta, m)
        if lam is not None:
            f, f_slope = (lam * cos_y + f) / (1 + lam), (lam + f_slope) / (1 + lam)

        # the exponents of the fraction: s f at the label; h e^{s cosθ_k} = e^{s cosθ_k + log h} elsewhere
        exponent, slope = [0.0] * K, [0.0] * K  # slope: d exponent_k / d cosθ_k
        for k in range(K):
            cos_k = float(C[i, k])
            if k == label:
                with_margin = cos_k > 0 or not easy_margin
                exponent[k] = s * f if with_margin else s * cos_k
                slope[k] = s * f_slope if with_margin else s
            else:
                marked = f - cos_k < 0
                gaps[i] = min(gaps[i], abs(f - cos_k))
                exponent[k] = s * cos_k + log_h(h, marked, cos_k, s, t)
                slope[k] = s + log_h_slope(h, marked, s, t)

        # L = −log numerator/(numerator + others); numerator and others both divided by e^top
        top = max(exponent)
        terms = [math.exp(e - top) for e in exponent]
        numerator = terms[label]
        others = sum(terms[k] for k in range(K) if k != label)
        denominator = numerator + others
        if others < numerator:
            losses.append(math.log1p(others / numerator))
        else:
            losses.append(math.log(denominator) + top - exponent[label])
        qs.append(others / denominator)  # 1 − p_y without cancellation
        logits[i] = exponent

        # dL/dexponent_k = p_k, dL/dexponent_y = p_y − 1
        for k in range(K):
            p_k = terms[k] / denominator
            dL_dC[i, k] = (p_k if k != label else -qs[i]) * slope[k]

    G = dL_dC * np.array(weight_of(g, losses, qs, gamma, hard_ratio))[:, None]

    # cosθ_ik = u_i·v_k, and through u = x/|x|: dL/dx = (du − (du·u) u)/|x|; a row of length 0 has no direction
    dx, dW = np.zeros((B, D)), np.zeros((K, D))
    for i in range(B):
        du = sum(G[i, k] * v[k] for k in range(K))
        dx[i] = (du - (du @ u[i]) * u[i]) / x_norm[i] if x_norm[i] else 0
    for k in range(K):
        dv = sum(G[i, k] * u[i] for i in range(B))
        dW[k] = (dv - (dv @ v[k]) * v[k]) / w_norm[k] if w_norm[k] else 0

    loss = batch_loss(g, losses, qs, gamma, hard_ratio)
    return Answer(loss, np.array(losses), logits, dx, dW, float(gaps.min()), gaps, sines, C[np.arange(B), y])
