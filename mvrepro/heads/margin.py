"""The margin head: class weights, the loss of a batch, and which way it is computed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mvrepro.heads.chunks import Rule
from mvrepro.heads.sweep import KEEP, PRODUCTS, SGD, fused_losses, pick_by_memory
from mvrepro.losses import DEFAULT_MARGIN, LOSSES, emphasise, indicator, margin, mine, normalise

BACKENDS = ("dense", "fused", "auto")
MOST_MARGIN = {"AM": 2.0, "Arc": math.pi}  # as far apart as two cosines, and two angles, can be
WATCHED = ("marked_share", "target_cosine", "negative_cosine")  # what MarginHead.watch tells


class MarginHead(nn.Module):
    """The last layer of a face network and its loss: (B, D) embeddings and (B,) labels -> a scalar.

    name           a key of LOSSES
    embedding_dim  D; embeddings come in at any length and are normalised here
    num_classes    K; the weight is (K, D) and is normalised here too
    s, m, t        scale; margin (None: DEFAULT_MARGIN of the loss's f); strength of the emphasis, t >= 0, where 0 gives
                   the plain margin loss. For the SV losses t = t_SV − 1
    gamma          exponent of F-Softmax;  hard_ratio  share of the batch that HM-Softmax keeps
    easy_margin    the target gets its margin only where cosθ_y > 0, as the authors' code does and their equations
                   don't; the indicator keeps comparing with f(m, θ_y)
    stop_gradient  the adaptive emphasis passes no gradient (see emphasise); not in the paper
    t_warmup       steps over which t grows linearly from 0, counted in training mode and kept in the state dict
    annealing      A-Softmax only: f = (λ cosθ + f)/(1 + λ), λ = max(5, 1000 (1 + 1e-4 step)^−2), as the authors do
    backend        "dense": the (B, K) logits in plain torch; "fused": mvrepro.heads.sweep, which never has them;
                   "auto": dense where the logits are small (1 MiB; on a GPU 64), else fused. All give the same loss
                   and gradients; repr says which the last call used
    keep           what "fused" keeps of the cosines for the backward pass, "none", "float32" or "float16" (see
                   mvrepro.heads.sweep); None: what the memory bears that is free when a batch of this size first comes
    products       what "fused" multiplies matrices in: "float32", or float64 if an input is; "bfloat16": their factors
                   are rounded to it, unless an input is float64, and the sums and all else are float32. Only the fused
                   head uses it: dense, and so "auto" where the logits are small, always computes in float32
    check          look for labels out of range and for NaN in every batch, with one clear error

    What a loss does not use is ignored, so that one call serves the whole table. Half-precision embeddings are computed
    with in float32. On a GPU nothing waits for the device where check is off and the labels lie on the CPU. Raises
    ValueError for arguments out of range, with the known names for an unknown one.
    """

    first = 0  # the class of the weight's first row
    weight: nn.Parameter
    step: Tensor
    momentum: Tensor | None

    def __init__(
        self,
        name: str,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 32.0,
        m: float | None = None,
        t: float = 0.2,
        gamma: float = 2.0,
        hard_ratio: float = 0.9,
        easy_margin: bool = False,
        stop_gradient: bool = False,
        t_warmup: int = 0,
        annealing: bool = False,
        backend: str = "auto",
        keep: str | None = None,
        products: str = "float32",
        check: bool = True,
    ) -> None:
        super().__init__()
        named: list[tuple[str, str, Any]] = [("loss", name, LOSSES), ("backend", backend, BACKENDS)]
        named += [("keep", KEEP[0] if keep is None else keep, KEEP), ("products", products, PRODUCTS)]
        for what, given, known in named:
            if given not in known:
                raise ValueError(f"unknown {what} {given!r}; known are: {', '.join(known)}")
        loss = LOSSES[name]
        m = DEFAULT_MARGIN[loss.f] if m is None else m
        numbers = {"embedding_dim": embedding_dim, "num_classes": num_classes, "m": m, "t": t, "gamma": gamma}
        least = {"embedding_dim": 1, "num_classes": 2, "m": 1 if loss.f == "A" else 0}
        for what, value in {**numbers, "t_warmup": t_warmup}.items():
            if not (math.isfinite(value) and value >= least.get(what, 0)):
                raise ValueError(f"{what} of {name} must be a number >= {least.get(what, 0)}, got {value}")
        if m > (most := MOST_MARGIN.get(loss.f, math.inf)):
            unit = f" radians ({m:g} degrees are {math.radians(m):.3g})" if loss.f == "Arc" else ""
            raise ValueError(f"m of {name} must be a number <= {most:.3g}, got {m:g}{unit}")
        if not (math.isfinite(s) and s > 0):
            raise ValueError(f"s must be a number > 0, got {s}")
        if not 0 < hard_ratio <= 1:
            raise ValueError(f"hard_ratio must be in (0, 1], got {hard_ratio}")
        self.name, self.loss, self.backend, self.keep, self.products = name, loss, backend, keep, products
        self.picked = ""  # the backend of the last call
        self._picks: dict[int, tuple[str, str]] = {}  # batch size -> what free memory decided
        self.sgd: SGD | None = None  # the step that update_in_backward asks for
        self.embedding_dim, self.num_classes = embedding_dim, num_classes
        self.s, self.m, self.t, self.gamma, self.hard_ratio = s, m, t, gamma, hard_ratio
        self.easy_margin, self.stop_gradient, self.t_warmup = easy_margin, stop_gradient, t_warmup
        self.annealing, self.check = annealing and loss.f == "A", check
        # Rows of about length 1: the step in the angle goes with 1/|w|², so the length matters.
        self.weight = nn.Parameter(torch.randn(num_classes, embedding_dim) / math.sqrt(embedding_dim))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("momentum", None)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D) floats and (B,) int64 labels -> the scalar loss."""
        losses = self.losses(embeddings, labels)
        if self.training and torch.is_grad_enabled():
            self.step = self.step + 1  # not in place: torch.compile recomputes from it in the backward pass
        return mine(self.loss.g, losses, self.gamma, self.hard_ratio)

    def losses(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """L = −log p_y of every sample, (B,), by the backend."""
        self._check_inputs(embeddings, labels)
        backend, keep = self.pick(len(embeddings))
        if backend == "dense":
            labels = labels.to(embeddings.device, non_blocking=True)
            logits = self._logits(self.cosines(embeddings), labels, self.loss.h)
            return F.cross_entropy(logits, labels, reduction="none")
        update = self._update if self.sgd and self.training else None
        how = {"keep": keep, "products": self.products, "update": update}
        losses: Tensor = fused_losses(embeddings, self.weight, labels, self._rule(), **how)
        return losses

    def logits(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, K): s times the cosines, after the margin at k = y and the emphasis at marked k."""
        self._check_inputs(embeddings, labels)
        return self._logits(self.cosines(embeddings), labels.to(embeddings.device), self.loss.h)

    def _logits(self, cos: Tensor, labels: Tensor, h: str | None) -> Tensor:
        target = cos.gather(1, labels[:, None])
        f = self.margin(target)
        if h:
            t, stop = self.current_t(), self.stop_gradient  # no name for the emphasised cosines: it would keep them
            cos = torch.where(indicator(f, cos), emphasise(h, cos, t, stop_gradient=stop), cos)
        if self.easy_margin:
            f = torch.where(target > 0, f, target)
        return self.s * cos.scatter(1, labels[:, None], f)

    def cosines(self, embeddings: Tensor, classes: slice = slice(None)) -> Tensor:
        """cosθ (B, K) of every embedding with every class weight, or those of some, in float32 or float64."""
        dtype = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            return normalise(embeddings.to(dtype)) @ normalise(self.weight[classes].to(dtype)).T

    @torch.no_grad()
    def watch(self, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        """Of a batch, by the names of WATCHED and with 6 digits: the share of negative classes k ≠ y with
        f(m, θ_y) < cosθ_k (Eq. 5), the mean cosθ_y, and the mean cosθ_k of the negative classes."""
        labels = labels.to(embeddings.device)
        cos = self.cosines(embeddings)
        target = cos.gather(1, labels[:, None])
        marked = (cos > self.margin(target)).scatter(1, labels[:, None], False)
        return self._watched(marked.sum(), target, cos.sum() - target.sum())

    def _watched(self, marked: Tensor, target: Tensor, negative: Tensor) -> dict[str, float]:
        """From the count of the marked, the target cosines and the sum of the negatives' cosines."""
        negatives = len(target) * (self.num_classes - 1)
        values = (marked / negatives, target.mean(), negative / negatives)
        return {name: round(value.item(), 6) for name, value in zip(WATCHED, values, strict=True)}

    def study(self, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
        """What the loss makes of a batch, with 6 digits: top1, the share of samples whose own class is the nearest;
        median_p_y; and gradient_distance, how far its gradient G = dL/dcosθ (B, K) lies from that of its margin loss,
        without emphasis and mining: |G − G0|/|G0|."""
        labels, cos = labels.to(embeddings.device), self.cosines(embeddings.detach()).detach()
        found = {"top1": (cos.argmax(1) == labels).float().mean().item()}
        grads: list[Tensor] = []
        for h, g in ((self.loss.h, self.loss.g), (None, None)):
            with torch.enable_grad():
                x = cos.clone().requires_grad_()
                losses = F.cross_entropy(self._logits(x, labels, h), labels, reduction="none")
                grads += torch.autograd.grad(mine(g, losses, self.gamma, self.hard_ratio), x)
            found.setdefault("median_p_y", (-losses.detach()).exp().median().item())
        found["gradient_distance"] = ((grads[0] - grads[1]).norm() / grads[1].norm().clamp(min=1e-30)).item()
        return {name: float(f"{value:.6g}") for name, value in found.items()}

    def full_weight(self) -> Tensor | None:
        """(K, D), on the CPU."""
        return self.weight.detach().cpu()

    @torch.no_grad()
    def load_full_weight(self, weight: Tensor) -> None:
        """Take the rows that are here of a (K, D) weight, such as full_weight() of a run with other ranks."""
        if weight.shape != (self.num_classes, self.embedding_dim):
            raise ValueError(f"the weight must be {(self.num_classes, self.embedding_dim)}, got {tuple(weight.shape)}")
        self.weight.copy_(weight[self.first : self.first + len(self.weight)])

    def margin(self, target: Tensor) -> Tensor:
        """f(m, θ_y) of the target cosines, in any shape."""
        f = margin(self.loss.f, target, self.m)
        if self.annealing:
            lam = (1000 * (1 + 1e-4 * self.step) ** -2).clamp(min=5).to(f.dtype)
            f = (lam * target + f) / (1 + lam)
        return f

    def current_t(self) -> float | Tensor:
        """t at this step: itself, or its share during the warm-up."""
        if self.t_warmup and self.training:
            return self.t * (self.step / self.t_warmup).clamp(max=1).to(self.weight.dtype)
        return self.t

    def update_in_backward(self, *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        """Let each backward pass take the weight's step of torch.optim.SGD, chunk by chunk: weight.grad stays
        None, and the K × D gradient never exists.

        The momentum is a buffer of the state dict: call this before load_state_dict. For a schedule, set
        `head.sgd.lr`, or call this again. Since the step is taken at once, nothing can come between gradient
        and step: no clipping by the norm over all parameters, no accumulation over several batches, no scaler
        of losses. Raises ValueError for backend "dense" and for negative numbers.
        """
        if self.backend == "dense":
            text = "only the fused head updates its weight in the backward pass, and this one has backend='dense'"
            raise ValueError(text)
        self.sgd = SGD(lr, momentum, weight_decay)
        if momentum and self.momentum is None:
            self.momentum = torch.zeros_like(self.weight)

    def _update(self, classes: slice | Tensor, grad: Tensor) -> None:
        """The step of these rows."""
        assert self.sgd is not None
        rows, momentum = self.weight[classes], None if self.momentum is None else self.momentum[classes]
        self.sgd.step(rows, momentum, grad)
        if isinstance(classes, Tensor):  # then these are copies
            self.weight[classes] = rows
            if self.momentum is not None and momentum is not None:
                self.momentum[classes] = momentum

    def pick(self, batch: int) -> tuple[str, str]:
        """(backend, keep) for a batch of this size, the same at each step."""
        backend, keep = self.backend if self.sgd is None else "fused", self.keep
        if backend == "auto" or (backend == "fused" and keep is None):
            if batch not in self._picks:
                self._picks[batch] = pick_by_memory(batch, self.weight)
            found = self._picks[batch]
            backend, keep = found[0] if backend == "auto" else backend, keep or found[1]
        rounded = "" if self.products == "float32" else f", products={self.products}"
        self.picked = backend if backend == "dense" else f"{backend}, keep={keep}{rounded}"
        return backend, keep or KEEP[0]

    def _rule(self) -> Rule:
        return Rule(self.s, self.margin, self.loss.h, self.current_t(), self.easy_margin, self.stop_gradient)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "MarginHead":
        """Moves all but the count of steps, which stays on the CPU: a warm-up of t would wait for the device."""
        step = self.step
        super()._apply(fn, recurse)
        self.step = step
        return self

    def _check_inputs(self, embeddings: Tensor, labels: Tensor) -> None:
        d, k = self.embedding_dim, self.num_classes
        if embeddings.ndim != 2 or embeddings.shape[1] != d or not embeddings.is_floating_point():
            raise ValueError(f"embeddings must be floats (B, {d}), got {embeddings.dtype} {tuple(embeddings.shape)}")
        if labels.shape != embeddings.shape[:1] or labels.dtype != torch.int64 or not len(labels):
            raise ValueError(
                f"labels must be int64 ({len(embeddings)},), one a row of embeddings and one at least, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if not self.check or torch.compiler.is_compiling():
            return
        low, high = labels.aminmax()
        if low < 0 or high >= k:
            raise ValueError(f"labels must be in 0 … {k - 1}, got {int(low if low < 0 else high)}")
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        bad = ~torch.linalg.vector_norm(embeddings.detach(), dim=1, dtype=dtype).isfinite()
        if bad.any():
            raise ValueError(
                f"embeddings hold NaN, infinity or a length beyond {dtype} in {int(bad.sum())} of {len(bad)} rows, "
                f"first in row {int(bad.nonzero()[0])}"
            )

    def extra_repr(self) -> str:
        sizes = f"{self.name}, {self.embedding_dim} -> {self.num_classes}, s={self.s}, m={self.m}, t={self.t}"
        return f"{sizes}, backend={self.backend}" + (f" (last: {self.picked})" if self.picked else "")
