"""The margin head without its B × K logits: one sweep over the classes forward, another one backward.

Every loss of mvrepro.losses needs two numbers of a sample: the cosine of its own class, and the logarithm of what the
other classes add to the denominator of Eqs. 1, 3 and 6,

    O = log Σ_{k≠y} h(t, θ_k, I_k) e^{s cosθ_k},   with which   L = −log p_y = log(1 + e^{O − s f(m, θ_y)}).

`_Sweep` finds both and their gradients, some thousand classes at a time. Margin and mining stay ordinary autograd, on
vectors of length B. With u = x/|x|, v = w/|w|, c_ik = u_i·v_k, and Eqs. 7 and 8 read as a line (a marked c becomes
a c + o):

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
then good to about 1 %).
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvrepro.losses import emphasise, normalise

KEEP = ("none", "float32", "float16")
CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**24}  # the cosines of one chunk: what a cache holds
COMPILED = {"cuda"}  # devices where the elementwise work of a chunk is compiled; it pays where launches are dear
NOWHERE = -1e30  # in the place of a cosine that takes no part: e^{s NOWHERE} = 0

Reduce = Callable[[Tensor, str], Tensor]
Update = Callable[[slice, Tensor], None]
Pair = tuple[Tensor, Tensor]
Form = tuple[float, tuple[Tensor, ...]]


def one_rank(part: Tensor, how: str) -> Tensor:
    """The reduction where one rank holds every class."""
    return part


@dataclass(frozen=True)
class Rule:
    """What a loss does to the cosines.

    s            the scale
    margin       f(m, θ_y) of the target cosines (B,): elementwise and differentiable
    h, t         the emphasis of Eqs. 7 and 8, "fixed" or "adaptive", and its strength; None: no emphasis
    easy_margin  the target gets its margin only where cosθ_y > 0; the indicator compares with f all the same
    stop_gradient  the adaptive emphasis passes no gradient: a = 1, for the same logits
    """

    s: float
    margin: Callable[[Tensor], Tensor]
    h: str | None = None
    t: float | Tensor = 0.0
    easy_margin: bool = False
    stop_gradient: bool = False

    def line(self) -> tuple[float, float, float]:
        """Eqs. 7 and 8 as a line: jump, bend and log a, where the exponent of a marked c is s c + jump + bend c."""
        if self.h is None:
            return 0.0, 0.0, 0.0
        cos = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
        below, at_0, at_1 = emphasise(self.h, cos, float(self.t)).tolist()
        a = at_1 - at_0
        if not (a > 0 and math.isclose(at_0 - below, a, rel_tol=1e-9)):
            raise NotImplementedError(
                f"the emphasis h={self.h!r} is no rising line in cosθ_k, which the fused head takes it for: "
                "use backend='dense', or teach mvrepro.heads.sweep.Rule its form"
            )
        return self.s * at_0, self.s * (a - 1), 0.0 if self.stop_gradient else math.log(a)


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
    chunk: int | None = None,
    reduce: Reduce = one_rank,
    update: Update | None = None,
) -> Tensor:
    """L = −log p_y of every sample: (B, D) embeddings, (K, D) weight, (B,) int64 labels -> (B,).

    Value and gradient are those of the dense head, in float32 (float64 if an input is). There is no second derivative.
    torch.compile leaves this function as it is. With labels on the CPU nothing here waits for a GPU; labels that lie
    there are fetched, since the host cuts the classes into chunks.

    keep   what stays of the cosines between the two sweeps, one of KEEP
    chunk  classes at a time; None: as many as have their cosines, and a quarter of their weights, in CHUNK_BYTES
    reduce for classes spread over ranks, whose labels count from this one's first class: reduce(part, "sum" or "max")
           combines the ranks' tensors. Every rank calls it with the target cosines, the maxima and the sums of O,
           (B, 1) or (B,), and backward with dL/du (B, D), in this order.
    update update(classes, grad) gets the gradient of each chunk in the backward sweep and may change these rows
           of weight, and use up grad (n, D); dL/dW as a whole then never exists, and weight.grad stays as it is
    """
    if keep not in KEEP:
        raise ValueError(f"unknown keep {keep!r}; known are: {', '.join(KEEP)}")
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    if chunk is None:
        size = CHUNK_BYTES["cuda" if embeddings.is_cuda else "cpu"]
        chunk = max(1, size // (dtype.itemsize * max(len(labels), weight.shape[1] // 4)))
    keep = keep if torch.is_grad_enabled() else "none"
    plan = _Plan(rule, labels.cpu(), weight, keep, chunk, reduce, update)
    if reduce is one_rank and len(plan.own) < len(labels):
        raise ValueError(f"labels must be in 0 … {len(weight) - 1}")
    with torch.autocast(embeddings.device.type, enabled=False):
        cos_y, others = _Sweep.apply(normalise(embeddings.to(dtype)), weight, plan)
        f = rule.margin(cos_y)
        if rule.easy_margin:
            f = torch.where(cos_y > 0, f, cos_y)
        return torch.logaddexp(others - rule.s * f, torch.zeros_like(f))


def pick(batch: int, weight: Tensor) -> tuple[str, str]:
    """(backend, keep) for this shape and the memory that is free now.

    "fused" where the (B, K) logits don't fit in one chunk; keep="float32", the bits of "none" in less time,
    where the cosines take at most 256 MiB and an eighth of what is free.
    """
    size = 4 * batch * len(weight)
    if size <= CHUNK_BYTES["cpu"]:
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


class _Plan:
    """The chunks of a sweep, and where in them the targets are. labels: on the CPU, from this rank's first class on."""

    def __init__(
        self, rule: Rule, labels: Tensor, weight: Tensor, keep: str, chunk: int, reduce: Reduce, update: Update | None
    ) -> None:
        self.rule, self.keep, self.reduce, self.update = rule, keep, reduce, update
        self.jump, self.bend, self.log_a = rule.line()
        # e^{z − shift} is neither 0 nor, summed over 10^7 classes, infinite in float32 (e^−87 … e^88) for any z from
        # −s to that of a cosine of 1, with one shift for all where there is such a one
        self.shift = max(0.0, rule.s + max(0.0, self.jump + self.bend) - 70)
        self.climbs = rule.s + self.shift > 86  # else it follows the largest z
        self.chunk = min(chunk, len(weight))
        self.edges = [*range(0, len(weight), self.chunk), len(weight)]
        ordered, order = labels.sort(stable=True)
        bounds = torch.searchsorted(ordered, torch.tensor(self.edges)).tolist()
        self.bounds = [bound - bounds[0] for bound in bounds]
        # the samples whose class is on this rank: which they are, their class, where that is in its chunk, and where
        # the pair of both is in that chunk's cosines, one row after the other
        own, y = (part[bounds[0] : bounds[-1]] for part in (order, ordered))
        column = y % self.chunk
        place = own * (len(weight) - (y - column)).clamp(max=self.chunk) + column
        targets = torch.stack([own, y, column, place]).to(weight.device, non_blocking=True)
        self.own, self.y, self.column, self.place = targets.unbind()

    def form(self, u: Tensor, lift: float = 0.0) -> Form:
        """What the body of a chunk needs: s, and jump, plus lift, and bend as far as the loss has them. Those are
        tensors, since numbers would be compiled in, anew at each step of a warm-up of t."""
        pair = torch.tensor([self.jump + lift, self.bend], dtype=u.dtype).to(u.device, non_blocking=True)
        return self.rule.s, pair.unbind()[: {None: 0, "fixed": 1}.get(self.rule.h, 2)]

    def chunks(self, u: Tensor) -> Iterator[tuple[slice, slice, list[Tensor]]]:
        """Each chunk's classes, where in `own` and `y` its targets are, and four (B, n) buffers in memory that all
        chunks share."""
        memory = u.new_empty(4, len(u) * self.chunk)
        for (start, stop), where in zip(pairwise(self.edges), pairwise(self.bounds), strict=True):
            buffers = memory[:, : len(u) * (stop - start)].view(4, len(u), stop - start)
            yield slice(start, stop), slice(*where), list(buffers)

    def leave_out(self, cos: Tensor, here: slice) -> None:
        """The targets among the cosines of a chunk take no part any more. (`cos[i] = number` would wait for a GPU.)"""
        cos.view(-1).index_fill_(0, self.place[here], NOWHERE)


class _Sweep(torch.autograd.Function):
    """u (B, D), weight (K, D) -> cosθ_y (B,) and O (B,)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, plan: _Plan) -> Pair:
        dtype = u.dtype
        cos_y = u.new_zeros(len(u))
        cos_y[plan.own] = (u[plan.own] * normalise(weight[plan.y].to(dtype))).sum(1)
        cos_y = plan.reduce(cos_y, "sum")
        tau = plan.rule.margin(cos_y)[:, None]

        inverse = u.new_empty(len(weight))  # 1/|w|; 0 for a row of length 0
        # A number near the largest z: one that serves all, or the largest z so far, of which none is below −s.
        top = torch.full_like(tau, -plan.rule.s if plan.climbs else plan.shift)
        total = torch.zeros_like(tau)  # Σ_{k≠y} e^{z − top}
        kept = []
        weigh, form = _on(u.device, _weigh), plan.form(u)
        for classes, here, (cos, *scratch) in plan.chunks(u):
            block = weight[classes].to(dtype)
            norm = torch.linalg.vector_norm(block, dim=1, out=inverse[classes]).reciprocal_()
            norm.masked_fill_(norm.isinf(), 0)
            torch.mm(u, block.T, out=cos).mul_(norm)
            if plan.keep != "none":
                kept.append(cos.to(torch.float16 if plan.keep == "float16" else dtype, copy=True))
            plan.leave_out(cos, here)
            top, total = weigh(form, plan.climbs, cos, tau, top, total, *scratch)
        highest = plan.reduce(top, "max")
        others = (highest + plan.reduce(total * (top - highest).exp(), "sum").log())[:, 0]
        ctx.plan = plan
        ctx.save_for_backward(u, weight, cos_y, others, tau, inverse, *kept)
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
        row_u = row[:, None] * u
        wants_u, wants_weight = ctx.needs_input_grad[:2]
        du = torch.zeros_like(u) if wants_u else None
        dweight: Any = torch.empty_like(weight) if wants_weight and not plan.update else None
        spare = None  # one chunk of dL/dW, where it can't be computed in its place
        if wants_weight and (plan.update or weight.dtype != dtype):
            spare = u.new_empty(plan.chunk, u.shape[1])
        share, form = _on(u.device, _share), plan.form(u, plan.log_a)
        with torch.autocast(u.device.type, enabled=False):
            for i, (classes, here, (cos, *scratch)) in enumerate(plan.chunks(u)):
                block, norm = weight[classes].to(dtype), inverse[classes]
                if kept:
                    cos.copy_(kept[i])
                else:
                    torch.mm(u, block.T, out=cos).mul_(norm)
                plan.leave_out(cos, here)
                p, pc = share(form, cos, tau, others[:, None], norm, *scratch)
                if du is not None:
                    du.addmm_(p, block)
                if wants_weight:
                    out = dweight[classes] if spare is None else spare[: len(block)]
                    torch.mul(block, (-pc.T.mv(row) * norm)[:, None], out=out).addmm_(p.T, row_u)
                    out.index_add_(0, plan.column[here], dw_y[here])
                    if plan.update:
                        plan.update(classes, out)
                    elif spare is not None:
                        dweight[classes] = out
        if du is not None:
            du = plan.reduce(du.mul_(row[:, None]).index_add_(0, own, grad * v_y), "sum")
        return du, dweight, None


def _exponents(form: Form, cos: Tensor, tau: Tensor, shift: Tensor, *scratch: Tensor) -> Tensor:
    """z − shift of the cosines, in the first scratch: (B, n), but tau and shift (B, 1).

    A mark is a float 0 or 1: on a CPU torch.where costs as much as a third of a matrix product.
    """
    (s, emphasis), (out, marks, extra) = form, scratch
    torch.add(-shift, cos, alpha=s, out=out)
    if emphasis:
        jump, *bend = emphasis
        torch.gt(cos, tau, out=marks)  # Eq. 5
        out.addcmul_(marks, torch.mul(cos, bend[0], out=extra).add_(jump) if bend else jump)
    return out


def _weigh(form: Form, climbs: bool, cos: Tensor, tau: Tensor, top: Tensor, total: Tensor, *scratch: Tensor) -> Pair:
    """top and total (B, 1) after one more chunk; climbs: top follows the largest z."""
    higher = top
    if climbs:
        most = cos.amax(1, keepdim=True)  # z grows with c
        small = (torch.empty_like(most) for _ in scratch)
        higher = torch.maximum(top, _exponents(form, most, tau, torch.zeros_like(top), *small))
    terms = _exponents(form, cos, tau, higher, *scratch).exp_()
    return higher, total * (top - higher).exp() + terms.sum(1, keepdim=True)


def _share(form: Form, cos: Tensor, tau: Tensor, others: Tensor, norm: Tensor, *scratch: Tensor) -> Pair:
    """P_ik/|w_k| (B, n) in the first scratch, and P_ik c_ik/|w_k| in the second."""
    p = _exponents(form, cos, tau, others, *scratch).exp_().mul_(norm)
    return p, torch.mul(cos, p, out=scratch[1])


def _on(device: torch.device, body: Callable[..., Any]) -> Callable[..., Any]:
    compiles = device.type in COMPILED and (device.type != "cuda" or _triton())
    return _compiled(body) if compiles else body


@functools.cache
def _triton() -> bool:
    """Whether kernels can be compiled for GPUs: by Triton, which needs a C compiler."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


_compiled = functools.cache(torch.compile)
