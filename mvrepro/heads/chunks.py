"""The classes cut into chunks, and the work on one of them, in two forms. The letters are those of mvrepro.heads.sweep.

InCache      for CPUs: the cosines of a chunk are as many as a cache holds, and operations in place run over them and
             three more buffers, which all chunks share.
FewLaunches  for GPUs, to which the host has to send every operation: the chunks are large, and what is to be done
             between two products is one function, which torch.compile makes a kernel or two. It takes the raw products
             u·w_k and gives the sums forward and P backward, with the target left out where the number of a column is
             that of the class; another one takes q_k v_k = v_k (v_k·Σ_i G_ik u_i) off. What this form keeps for the
             backward sweep are raw products, or cosines in float16.

Products with bfloat16 factors take the second form on every device.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvrepro.losses import emphasise

FEW_LAUNCHES = {"cuda"}  # devices of the second form; a GPU for which nothing can be compiled has the first
COMPILED = {"cuda"}  # devices where its functions are compiled
NOWHERE = -1e30  # in the place of a cosine that takes no part: e^{s NOWHERE} = 0

Reduce = Callable[[Tensor, str], Tensor]
Update = Callable[[slice, Tensor], None]
Pair = tuple[Tensor, Tensor]
Form = tuple[float, tuple[Tensor, ...]]


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
                "use backend='dense', or teach mvrepro.heads.chunks.Rule its form"
            )
        return self.s * at_0, self.s * (a - 1), 0.0 if self.stop_gradient else math.log(a)


class Chunk(NamedTuple):
    """Its number, its rows of the weight, and the part of Plan.own, y, column and place that tells of its targets."""

    number: int
    classes: slice
    here: slice


class Plan:
    """The chunks of a sweep, and where in them the targets are. labels: on the CPU, from this rank's first class on;
    products: the dtype of the factors of matrix products."""

    def __init__(
        self,
        rule: Rule,
        labels: Tensor,
        weight: Tensor,
        keep: str,
        chunk: int,
        products: torch.dtype,
        reduce: Reduce,
        update: Update | None,
    ) -> None:
        self.rule, self.keep, self.products, self.reduce, self.update = rule, keep, products, reduce, update
        self.jump, self.bend, self.log_a = rule.line()
        # e^{z − shift} is neither 0 nor, summed over 10^7 classes, infinite in float32 (e^−87 … e^88) for any z from
        # −s to that of a cosine of 1, with one shift for all where there is such a one
        self.shift = max(0.0, rule.s + max(0.0, self.jump + self.bend) - 70)
        self.climbs = rule.s + self.shift > 86  # else it follows the largest z
        self.chunk = min(chunk, len(weight))
        self.edges = [*range(0, len(weight), self.chunk), len(weight)]
        self.labels, self.device = labels, weight.device
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

    @functools.cached_property
    def columns(self) -> Tensor:
        """(chunks, B, 1) int32: the target's column in each chunk, and no column's number where it lies in another."""
        first = torch.arange(0, self.edges[-1], self.chunk, dtype=torch.int32, device=self.device)
        return self.labels.int().to(self.device, non_blocking=True)[:, None] - first[:, None, None]

    def chunks(self) -> Iterator[Chunk]:
        for number, (edges, bounds) in enumerate(zip(pairwise(self.edges), pairwise(self.bounds), strict=True)):
            yield Chunk(number, slice(*edges), slice(*bounds))


class InCache:
    """u (B, D) in the dtype of the computation, weight (K, D). inverse (K,), 1/|w|, 0 for a row of length 0, and kept,
    a tensor a chunk or none, come out of the forward sweep and go into the backward one."""

    def __init__(
        self, plan: Plan, u: Tensor, weight: Tensor, form: Form, inverse: Tensor | None, kept: Sequence[Tensor]
    ) -> None:
        self.plan, self.u, self.weight, self.form, self.kept = plan, u, weight, form, list(kept)
        self.inverse = u.new_empty(len(weight)) if inverse is None else inverse
        self.memory = u.new_empty(4, len(u) * plan.chunk)

    def weigh(self, chunk: Chunk, tau: Tensor, top: Tensor, total: Tensor) -> Pair:
        """top, and total = Σ_{k≠y} e^{z − top}, (B, 1), after one more chunk."""
        block, (cos, *scratch) = self.weight[chunk.classes].to(self.u.dtype), self._buffers(chunk)
        norm = torch.linalg.vector_norm(block, dim=1, out=self.inverse[chunk.classes]).reciprocal_()
        norm.masked_fill_(norm.isinf(), 0)
        torch.mm(self.u, block.T, out=cos).mul_(norm)
        if self.plan.keep != "none":
            self.kept.append(cos.to(torch.float16 if self.plan.keep == "float16" else cos.dtype, copy=True))
        self._leave_out(cos, chunk)
        higher = top
        if self.plan.climbs:
            most = cos.amax(1, keepdim=True)  # z grows with c
            small = (torch.empty_like(most) for _ in scratch)
            higher = torch.maximum(top, _exponents_in(self.form, most, tau, torch.zeros_like(top), *small))
        terms = _exponents_in(self.form, cos, tau, higher, *scratch).exp_()
        return higher, total * (top - higher).exp() + terms.sum(1, keepdim=True)

    def share(
        self, chunk: Chunk, tau: Tensor, others: Tensor, row: Tensor, row_u: Tensor, du: Tensor | None, out: Any
    ) -> None:
        """Adds Σ_{k≠y} P_ik v_k to du (B, D) and writes what the k ≠ y give to dL/dw to out (n, D); either may be None.

        others (B, 1); row (B,), where G_ik = row_i P_ik; row_u (B, D), row_i u_i, as a factor of products.
        """
        block, norm = self.weight[chunk.classes].to(self.u.dtype), self.inverse[chunk.classes]
        cos, *scratch = self._buffers(chunk)
        if self.kept:
            cos.copy_(self.kept[chunk.number])
        else:
            torch.mm(self.u, block.T, out=cos).mul_(norm)
        self._leave_out(cos, chunk)
        p = _exponents_in(self.form, cos, tau, others, *scratch).exp_().mul_(norm)  # P_ik/|w_k|
        pc = torch.mul(cos, p, out=scratch[1])
        if du is not None:
            du.addmm_(p, block)
        if out is not None:
            torch.mul(block, (-pc.T.mv(row) * norm)[:, None], out=out).addmm_(p.T, row_u)

    def _buffers(self, chunk: Chunk) -> list[Tensor]:
        size = chunk.classes.stop - chunk.classes.start
        return list(self.memory[:, : len(self.u) * size].view(4, len(self.u), size))

    def _leave_out(self, cos: Tensor, chunk: Chunk) -> None:
        """The targets among the cosines take no part any more. (`cos[i] = number` would wait for a GPU.)"""
        cos.view(-1).index_fill_(0, self.plan.place[chunk.here], NOWHERE)


def _exponents_in(form: Form, cos: Tensor, tau: Tensor, shift: Tensor, *scratch: Tensor) -> Tensor:
    """z − shift of the cosines, in the first scratch (B, n), but tau and shift (B, 1).

    A mark is a float 0 or 1: on a CPU torch.where costs as much as a third of a matrix product.
    """
    (s, emphasis), (out, marks, extra) = form, scratch
    torch.add(-shift, cos, alpha=s, out=out)
    if emphasis:
        jump, *bend = emphasis
        torch.gt(cos, tau, out=marks)  # Eq. 5
        out.addcmul_(marks, torch.mul(cos, bend[0], out=extra).add_(jump) if bend else jump)
    return out


class FewLaunches:
    """As InCache, but all of inverse is there from the start."""

    def __init__(
        self, plan: Plan, u: Tensor, weight: Tensor, form: Form, inverse: Tensor | None, kept: Sequence[Tensor]
    ) -> None:
        self.plan, self.weight, self.form, self.kept = plan, weight, form, list(kept)
        self.u = u.to(plan.products)
        if inverse is None:  # the reduction reads bfloat16 itself: a GPU makes no float32 copy of the weight
            inverse = torch.linalg.vector_norm(weight, dim=1, dtype=u.dtype).reciprocal_()
            inverse.masked_fill_(inverse.isinf(), 0)
        self.inverse = inverse
        self._weigh, self._share, self._project = (_on(u.device, body) for body in (_weigh, _share, _project))

    def weigh(self, chunk: Chunk, tau: Tensor, top: Tensor, total: Tensor) -> Pair:
        """As InCache's."""
        dots, norm = product(self.u, self._block(chunk).T), self.inverse[chunk.classes]
        if self.plan.keep == "float32":
            self.kept.append(dots)
        elif self.plan.keep == "float16":  # which holds numbers in [−1, 1] well, and others not at all
            self.kept.append(torch.mul(dots, norm, out=torch.empty_like(dots, dtype=torch.float16)))
        column = self.plan.columns[chunk.number]
        grown: Pair = self._weigh(self.form, self.plan.climbs, dots, norm, column, tau, top, total)
        return grown

    def share(
        self, chunk: Chunk, tau: Tensor, others: Tensor, row: Tensor, row_u: Tensor, du: Tensor | None, out: Any
    ) -> None:
        """As InCache's; out may be of the products' dtype, too."""
        block, norm, column = self._block(chunk), self.inverse[chunk.classes], self.plan.columns[chunk.number]
        dots = self.kept[chunk.number] if self.kept else product(self.u, block.T)
        p = self._share(self.form, dots, norm, column, tau, others, self.plan.products)
        del dots  # its memory serves the products to come
        if du is not None:
            du += product(p, block)
        if out is not None:
            self._project(product(p.T, row_u, out), self.weight[chunk.classes], norm)

    def _block(self, chunk: Chunk) -> Tensor:
        return self.weight[chunk.classes].to(self.plan.products)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in the dtype of out, or else in theirs; of bfloat16 factors the sums are float32, and so is the result."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        whole = a.float() @ b.float()
        return whole if out is None else out.copy_(whole)
    if out is not None and out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    found: Tensor = torch.mm(a, b, out_dtype=torch.float32, out=out)
    return found


def _weigh(
    form: Form, climbs: bool, dots: Tensor, norm: Tensor, column: Tensor, tau: Tensor, top: Tensor, total: Tensor
) -> Pair:
    """top and total (B, 1) after one more chunk, of dots (B, n); climbs: top follows the largest z."""
    z = _exponents(form, _cosines(dots, norm), column, tau)
    higher = torch.maximum(top, z.amax(1, keepdim=True)) if climbs else top
    return higher, total * (top - higher).exp() + (z - higher).exp().sum(1, keepdim=True)


def _share(
    form: Form, dots: Tensor, norm: Tensor, column: Tensor, tau: Tensor, others: Tensor, dtype: torch.dtype
) -> Tensor:
    """P_ik/|w_k| (B, n) in dtype."""
    return ((_exponents(form, _cosines(dots, norm), column, tau) - others).exp() * norm).to(dtype)


def _project(out: Tensor, rows: Tensor, norm: Tensor) -> None:
    """Takes off out (n, D), Σ_i G_ik u_i/|w_k|, what lies along rows, w_k (n, D)."""
    v = rows * norm[:, None]
    out.sub_(v * (out * v).sum(1, keepdim=True))


def _cosines(dots: Tensor, norm: Tensor) -> Tensor:
    """Of raw products, or of what was kept of them in float16."""
    return dots.to(norm.dtype) if dots.dtype == torch.float16 else dots * norm


def _exponents(form: Form, cos: Tensor, column: Tensor, tau: Tensor) -> Tensor:
    """z (B, n) of the cosines, −∞ for a target: its column is the one of that number (B, 1)."""
    s, emphasis = form
    z = s * cos
    if emphasis:
        jump, *bend = emphasis
        z = z + torch.where(cos > tau, jump + bend[0] * cos if bend else jump, 0.0)  # Eq. 5
    here = torch.arange(cos.shape[1], device=cos.device, dtype=column.dtype)
    return torch.where(here == column, -math.inf, z)


def start(
    plan: Plan, u: Tensor, weight: Tensor, form: Form, inverse: Tensor | None = None, kept: Sequence[Tensor] = ()
) -> InCache | FewLaunches:
    """The work in the form that suits device and products."""
    few = u.device.type in FEW_LAUNCHES and _compiles(u.device)
    return (FewLaunches if few or plan.products == torch.bfloat16 else InCache)(plan, u, weight, form, inverse, kept)


def _on(device: torch.device, body: Callable[..., Any]) -> Callable[..., Any]:
    return _compiled(body) if device.type in COMPILED and _compiles(device) else body


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether functions can be compiled for the device: for GPUs by Triton, which needs a C compiler."""
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    return device.type != "cuda" or (
        importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
    )


# Whole chunks and the last one are two sizes: kernels that know theirs are the faster ones.
_compiled = functools.cache(functools.partial(torch.compile, dynamic=False))
