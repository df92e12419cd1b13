"""The margin head without its B × K logits: one sweep over the classes forward, another one backward.

Every loss of mvrepro.losses needs two numbers of a sample: the cosine of its own class, and the logarithm of what the
other classes add to the denominator of Eqs. 1, 3 and 6,

    O = log Σ_{k≠y} h(t, θ_k, I_k) e^{s cosθ_k},   with which   L = −log p_y = log(1 + e^{O − s f(m, θ_y)}).

`_Sweep` finds both and their gradients, a chunk of classes at a time (mvrepro.heads.chunks). Margin and mining stay
ordinary autograd, on vectors of length B. With u = x/|x|, v = w/|w|, c_ik = u_i·v_k, and Eqs. 7 and 8 read as a line
(a marked c becomes a c + o):

    forward    c = (u Wᵀ) diag(1/|w|)                        so V, a second W, never exists
               z = s (a c + o) where c > τ = f(m, θ_y), else s c
               O = log Σ_{k≠y} e^z
    backward   P_ik = a_ik e^{z_ik − O_i}, and 0 at k = y    a_ik = a where marked, else 1
               G_ik = s (dL/dO_i) P_ik, G_iy = dL/dc_iy      what reaches each cosine
               dL/du_i = Σ_k G_ik v_k
               dL/dw_k = (Σ_i G_ik u_i − q_k v_k)/|w_k|      q_k = Σ_i G_ik c_ik = v_k·Σ_i G_ik u_i

The last line is the Jacobian of the normalisation, for one sum a class instead of a matrix product. There are four
products in all, one more than the least, where the cosines are computed anew in the backward sweep (keep="none"; beside
dW this takes O(B·chunk + B·D + K) memory), and three where B·K of them are kept: in the precision of the computation
("float32") or in half of it ("float16", where a number in [−1, 1] has 11 bits and not the 8 of bfloat16; gradients are
then good to about 1 %). The factors of the products may be rounded to bfloat16 (products="bfloat16": u and W, P/|w| and
row u): their sums, and all else, stay in float32, and so do the targets' own terms.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvrepro.heads.chunks import Pair, Plan, Reduce, Rule, Update, start
from mvrepro.losses import normalise

KEEP = ("none", "float32", "float16")
PRODUCTS = ("float32", "bfloat16")
# The cosines of one chunk: what a cache holds, or on a GPU so many that it and not the host takes the time. A launch
# costs the host about 25 µs, and a compiled function 100; on an H100, twice the chunk was half the time up to 2**27.
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}
DENSE_BYTES = {"cpu": 2**20, "cuda": 2**26}  # logits up to which "auto" is dense


def one_rank(part: Tensor, how: str) -> Tensor:
    """The reduction where one rank holds every class."""
    return part


@dataclass
class SGD:
    """The step of torch.optim.SGD, some rows of a weight at a time; no dampening, no Nesterov.

    Raises ValueError for negative numbers.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value}")

    def step(self, rows: Tensor, momentum: Tensor | None, grad: Tensor) -> None:
        """rows and momentum (n, D) change in place, and grad, their dL/dw, is used up."""
        grad.add_(rows, alpha=self.weight_decay)
        if momentum is not None:
            grad = momentum.mul_(self.momentum).add_(grad)
        rows.sub_(grad, alpha=self.lr)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_losses(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    rule: Rule,
    *,
    keep: str = "none",
    products: str = "float32",
    chunk: int | None = None,
    reduce: Reduce = one_rank,
    update: Update | None = None,
) -> Tensor:
    """L = −log p_y of every sample: (B, D) embeddings, (K, D) weight, (B,) int64 labels -> (B,).

    Value and gradient are those of the dense head, in float32 (float64 if an input is). There is no second derivative.
    torch.compile leaves this function as it is. With labels on the CPU nothing here waits for a GPU; labels that lie
    there are fetched, since the host cuts the classes into chunks.

    keep   what stays of the cosines between the two sweeps, one of KEEP
    products  the factors of the matrix products, one of PRODUCTS: as all else ("float32"), or, unless an input is
           float64, rounded to bfloat16 and summed in float32
    chunk  classes at a time; None: as many as have their cosines, and their weights or, on a CPU, a quarter of these,
           in CHUNK_BYTES
    reduce for classes spread over ranks, whose labels count from this one's first class: reduce(part, "sum" or "max")
           combines the ranks' tensors. Every rank calls it with the target cosines, the maxima and the sums of O,
           (B, 1) or (B,), and backward with dL/du (B, D), in this order.
    update update(classes, grad) gets the gradient of each chunk in the backward sweep and may change these rows
           of weight, and use up grad (n, D); dL/dW as a whole then never exists, and weight.grad stays as it is
    """
    for what, given, known in (("keep", keep, KEEP), ("products", products, PRODUCTS)):
        if given not in known:
            raise ValueError(f"unknown {what} {given!r}; known are: {', '.join(known)}")
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    factors = torch.bfloat16 if products == "bfloat16" and dtype == torch.float32 else dtype
    if chunk is None:
        kind, part = ("cuda", 1) if embeddings.is_cuda else ("cpu", 4)
        chunk = max(1, CHUNK_BYTES[kind] // (dtype.itemsize * max(len(labels), weight.shape[1] // part)))
        if embeddings.is_cuda and chunk > 64:
            chunk -= chunk % 64  # a GPU is faster with rows that begin at multiples of 16 bytes
    keep = keep if torch.is_grad_enabled() else "none"
    plan = Plan(rule, labels.cpu(), weight, keep, chunk, factors, reduce, update)
    if reduce is one_rank and len(plan.own) < len(labels):
        raise ValueError(f"labels must be in 0 … {len(weight) - 1}")
    with torch.autocast(embeddings.device.type, enabled=False):
        cos_y, others = _Sweep.apply(normalise(embeddings.to(dtype)), weight, plan)
        f = rule.margin(cos_y)
        if rule.easy_margin:
            f = torch.where(cos_y > 0, f, cos_y)
        return torch.logaddexp(others - rule.s * f, torch.zeros_like(f))


def pick_by_memory(batch: int, weight: Tensor) -> tuple[str, str]:
    """(backend, keep) for this shape and the memory that is free now.

    "fused" where the (B, K) logits take more than DENSE_BYTES; keep="float32", the bits of "none" in less time,
    where the cosines take at most 256 MiB and an eighth of what is free.
    """
    size = 4 * batch * len(weight)
    if size <= DENSE_BYTES["cuda" if weight.is_cuda else "cpu"]:
        return "dense", "float32"
    return "fused", "float32" if size <= 2**28 and size <= free_memory(weight.device) // 8 else "none"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device; 0 where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return 0


class _Sweep(torch.autograd.Function):
    """u (B, D), weight (K, D) -> cosθ_y (B,) and O (B,)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, plan: Plan) -> Pair:
        cos_y = u.new_zeros(len(u))
        cos_y[plan.own] = (u[plan.own] * normalise(weight[plan.y].to(u.dtype))).sum(1)
        cos_y = plan.reduce(cos_y, "sum")
        tau = plan.rule.margin(cos_y)[:, None]

        # A number near the largest z: one that serves all, or the largest z so far, of which none is below −s.
        top = torch.full_like(tau, -plan.rule.s if plan.climbs else plan.shift)
        total = torch.zeros_like(tau)  # Σ_{k≠y} e^{z − top}
        work = start(plan, u, weight, plan.form(u))
        for chunk in plan.chunks():
            top, total = work.weigh(chunk, tau, top, total)
        highest = plan.reduce(top, "max")
        others = (highest + plan.reduce(total * (top - highest).exp(), "sum").log())[:, 0]
        ctx.plan = plan
        ctx.save_for_backward(u, weight, cos_y, others, tau, work.inverse, *work.kept)
        return cos_y, others

    @staticmethod
    def backward(ctx: Any, grad_cos_y: Tensor, grad_others: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the fused head has no second derivative (create_graph=True); backend='dense' has"
            )
        u, weight, cos_y, others, tau, inverse, *kept = ctx.saved_tensors
        plan, dtype = ctx.plan, u.dtype
        # the targets' own G_iy, whose B terms need no product
        own, y = plan.own, plan.y
        grad, norm_y = grad_cos_y[own, None], inverse[y, None]
        v_y = norm_y * weight[y].to(dtype)
        dw_y = grad * norm_y * (u[own] - cos_y[own, None] * v_y)

        row = plan.rule.s * grad_others  # G_ik = row_i P_ik, so that P alone goes through the products
        row_u = (row[:, None] * u).to(plan.products)
        wants_u, wants_weight = ctx.needs_input_grad[:2]
        du = torch.zeros_like(u) if wants_u else None
        dweight: Any = torch.empty_like(weight) if wants_weight and not plan.update else None
        spare = None  # one chunk of dL/dW, where it can't be computed in its place
        if wants_weight and (plan.update or weight.dtype not in (dtype, plan.products)):
            spare = u.new_empty(plan.chunk, u.shape[1])
        dw_y = dw_y.to(weight.dtype if spare is None else dtype)
        work = start(plan, u, weight, plan.form(u, plan.log_a), inverse, kept)
        others, out = others[:, None], None
        with torch.autocast(u.device.type, enabled=False):
            for chunk in plan.chunks():
                classes, here = chunk.classes, chunk.here
                if wants_weight:
                    out = dweight[classes] if spare is None else spare[: classes.stop - classes.start]
                work.share(chunk, tau, others, row, row_u, du, out)
                if out is not None:
                    out.index_add_(0, plan.column[here], dw_y[here])
                    if plan.update:
                        plan.update(classes, out)
                    elif spare is not None:
                        dweight[classes] = out
        if du is not None:
            du = plan.reduce(du.mul_(row[:, None]).index_add_(0, own, grad * v_y), "sum")
        return du, dweight, None
