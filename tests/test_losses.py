"""mvrepro.losses against an independent oracle (tests/oracle.py), and what must hold of any face loss."""

import io
import itertools
import math
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Answer, oracle
from torch.func import functional_call
from torch.nn import functional as F

from mvrepro.heads import sweep
from mvrepro.heads.margin import MarginHead
from mvrepro.losses import DEFAULT_MARGIN, LOSSES, combined_margin, emphasise, indicator, margin, mine, normalise, sine

# The table of the design, once more: name -> (f, h, g).
TABLE = {
    "Softmax": ("cos", None, None),
    "HM-Softmax": ("cos", None, "HM"),
    "F-Softmax": ("cos", None, "F"),
    "A-Softmax": ("A", None, None),
    "AM-Softmax": ("AM", None, None),
    "Arc-Softmax": ("Arc", None, None),
    "HM-AM-Softmax": ("AM", None, "HM"),
    "F-AM-Softmax": ("AM", None, "F"),
    "HM-Arc-Softmax": ("Arc", None, "HM"),
    "F-Arc-Softmax": ("Arc", None, "F"),
    "SV-Softmax": ("cos", "adaptive", None),
    "SV-AM-Softmax": ("AM", "adaptive", None),
    "SV-Arc-Softmax": ("Arc", "adaptive", None),
    "MV-AM-Softmax-f": ("AM", "fixed", None),
    "MV-AM-Softmax-a": ("AM", "adaptive", None),
    "MV-Arc-Softmax-f": ("Arc", "fixed", None),
    "MV-Arc-Softmax-a": ("Arc", "adaptive", None),
}
NAMES = list(TABLE)
EMPHASISED = [name for name, (_, h, _) in TABLE.items() if h]
MINED_HM = [name for name, (_, _, g) in TABLE.items() if g == "HM"]
MINED_F = [name for name, (_, _, g) in TABLE.items() if g == "F"]

TINY, SMALL, LARGE = (1, 2, 2), (7, 5, 3), (64, 300, 32)  # B, K, D
MARGINS = {"cos": [0.0], "A": [1.0, 1.5, 2.0, 3.0, 4.0], "AM": [0.1, 0.35, 0.6], "Arc": [0.1, 0.5, 1.0]}

every_loss = pytest.mark.parametrize("name", NAMES)
once = pytest.mark.once  # a test that is not about a backend, or about the dense one; the others run on both
quick_hypothesis = settings(max_examples=250, deadline=None, derandomize=True)


HOW = {"backend": "dense"}  # what make_head gives a head unless a test says otherwise


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("once") is None:
        metafunc.parametrize("backend", ["dense", "fused"], indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def backend(request):
    """Fused in chunks of a few classes, so that they don't divide K."""
    HOW["backend"] = getattr(request, "param", "dense")
    with pytest.MonkeyPatch.context() as patch:
        if HOW["backend"] == "fused":
            patch.setattr(sweep, "CHUNK_BYTES", {"cpu": 128})
        yield
    HOW["backend"] = "dense"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small cost ten times as much when two threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- helpers


def draw(shape, seed=0):
    """x (B, D), W (K, D), y (B,) as float64 arrays of float32 numbers, rows of many lengths."""
    B, K, D = shape
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal((B, D)) * rng.uniform(0.5, 4, (B, 1))
    W = rng.standard_normal((K, D)) * rng.uniform(0.5, 2, (K, 1))
    return x.astype(np.float32).astype(float), W.astype(np.float32).astype(float), rng.integers(0, K, B)


def ask_oracle(name, data, **options) -> Answer:
    m = options.pop("m", None)
    m = DEFAULT_MARGIN[TABLE[name][0]] if m is None else m
    return oracle(*data, TABLE[name], s=options.pop("s", 32.0), m=m, t=options.pop("t", 0.2), **options)


@cache
def safe_case(name, shape, gap, options=()):
    """Data away from every jump of the loss (indicator, easy margin, last of the hardest), and the answer."""
    options = dict(options)
    for seed in range(500):
        data = draw(shape, seed)
        answer = ask_oracle(name, data, **options)
        hard = np.sort(answer.losses)[::-1]
        kept = max(1, int(0.9 * len(hard)))
        tie = name in MINED_HM and kept < len(hard) and hard[kept - 1] - hard[kept] < gap and hard[kept] > 1e-9
        # Arc's slope grows like 1/sinθ_y: with it the float32 error, so small angles have their own test
        if answer.gap > gap and abs(answer.target).min() > gap and answer.sines.min() > min(0.3, gap * 3e3) and not tie:
            return data, answer
    raise AssertionError("no seed keeps away from the jumps")


def make_head(name, data, dtype=torch.float64, **options) -> MarginHead:
    W = torch.tensor(data[1], dtype=dtype)
    head = MarginHead(name, W.shape[1], W.shape[0], **{**HOW, **options}).to(dtype)
    with torch.no_grad():
        head.weight.copy_(W)
    return head


def run(head, x, y, forward=None, autocast=False):
    """loss, dloss/dx, dloss/dW; x (B, D) and y as arrays or tensors; forward: the compiled head."""
    x = torch.as_tensor(x, dtype=None if torch.is_tensor(x) else head.weight.dtype).detach().requires_grad_()
    head.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (head if forward is None else forward)(x, torch.as_tensor(y))
    loss.backward()
    return loss.detach(), x.grad, head.weight.grad


def library(name, data, dtype=torch.float64, **options):
    return run(make_head(name, data, dtype, **options), data[0], data[2])


def assert_agree(got, data, answer: Answer, s, dtype, what=""):
    """Loss and gradients equal the oracle's, within a share of the largest entry.

    The share is 1e-10 in float64 and 3e-5 in float32 (s > 32: in proportion, s multiplies the rounding of
    cosθ). Where every sample is right and nothing but rounding is left, the measure is what a batch that
    is wrong everywhere would give (full): 1e-13 of it in float64, 3e-5 of 3 % of it in float32.
    """
    loss, dx, dW = (np.asarray(a.double()) for a in got)
    x, W, y = data
    lengths = [np.linalg.norm(a, axis=1) for a in (x, W)]
    full_dx, full_dW = (s / n[n > 0].min() / math.sqrt(len(y)) for n in lengths)
    for part, ours, theirs, full in [
        ("loss", loss, answer.loss, s),
        ("dx", dx, answer.dx, full_dx),
        ("dW", dW, answer.dW, full_dW),
    ]:
        largest = np.abs(theirs).max()
        if dtype == torch.float64:
            allowed = 1e-10 * largest + 1e-13 * full
        else:
            allowed = 3e-5 * max(1, s / 32) * max(largest, 0.03 * full)
        error = np.abs(ours - theirs).max()
        assert error <= allowed, f"{part} is off by {error:.3g}, allowed {allowed:.3g} {what}"


def relevant_options(name):
    """Every s, m, t, easy_margin that makes a difference to this loss."""
    f, h, _ = TABLE[name]
    for s, m, t, easy in itertools.product(
        [1.0, 32.0, 64.0, 128.0], MARGINS[f], [0.0, 0.2, 0.5] if h else [0.2], [False, True] if f != "cos" else [False]
    ):
        yield (("s", s), ("m", m), ("t", t), ("easy_margin", easy))


# ---------------------------------------------------------------- the table and the oracle


@once
def test_losses_has_the_names_of_the_table_with_their_rows():
    assert {name: (row.f, row.h, row.g) for name, row in LOSSES.items()} == TABLE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", [TINY, SMALL], ids=["B1-K2-D2", "B7-K5-D3"])
@every_loss
def test_every_option_agrees_with_the_oracle(name, shape, dtype):
    for options in relevant_options(name):
        data, answer = safe_case(name, shape, 1e-4, options)
        got = library(name, data, dtype, **dict(options))
        assert got[0].dtype == got[1].dtype == got[2].dtype == dtype
        assert_agree(got, data, answer, dict(options)["s"], dtype, options)


@pytest.mark.parametrize("easy", [False, True], ids=["", "easy"])
@every_loss
def test_a_large_batch_agrees_with_the_oracle(name, easy):
    # 19,200 pairs: the seed keeps 2e-6 away from the jumps, ten times the rounding of a float32 cosine
    data, answer = safe_case(name, LARGE, 2e-6, (("easy_margin", easy),))
    for dtype in (torch.float64, torch.float32):
        assert_agree(library(name, data, dtype, easy_margin=easy), data, answer, 32, dtype)


@once
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
@every_loss
def test_logits_agree_with_the_oracle(name, dtype, tolerance):
    for shape, easy in itertools.product([TINY, SMALL], [False, True]):
        data, answer = safe_case(name, shape, 1e-4, (("s", 64.0), ("t", 0.3), ("easy_margin", easy)))
        head = make_head(name, data, dtype, s=64.0, t=0.3, easy_margin=easy)
        logits = head.logits(torch.tensor(data[0], dtype=dtype), torch.tensor(data[2]))
        np.testing.assert_allclose(logits.detach().numpy(), answer.logits, atol=tolerance * 64, rtol=0)


@pytest.mark.parametrize("easy", [False, True], ids=["", "easy"])
@every_loss
def test_gradients_agree_with_finite_differences(name, easy):
    options = (("s", 8.0), ("easy_margin", easy))
    (x, W, y), _ = safe_case(name, (5, 4, 3), 2e-4, options)
    head = make_head(name, (x, W, y), s=8.0, easy_margin=easy).eval()
    labels = torch.tensor(y)
    inputs = torch.tensor(x, requires_grad=True), torch.tensor(W, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, W: functional_call(head, {"weight": W}, (x, labels)), inputs)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("name", MINED_F)
def test_focal_exponents_agree_with_the_oracle(name, gamma):
    data, answer = safe_case(name, SMALL, 1e-4, (("gamma", gamma), ("s", 8.0)))
    assert_agree(library(name, data, gamma=gamma, s=8.0), data, answer, 8, torch.float64)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", MINED_HM)
def test_hard_ratios_agree_with_the_oracle(name, ratio):
    data, answer = safe_case(name, SMALL, 1e-4, (("hard_ratio", ratio), ("s", 8.0)))
    assert_agree(library(name, data, hard_ratio=ratio, s=8.0), data, answer, 8, torch.float64)


@pytest.mark.parametrize("labels", ["all equal", "pairs"])
@every_loss
def test_repeated_labels_agree_with_the_oracle(name, labels):
    x, W, _ = draw(SMALL, seed=3)
    y = np.full(7, 4) if labels == "all equal" else np.arange(7) // 2
    assert_agree(library(name, (x, W, y)), (x, W, y), ask_oracle(name, (x, W, y)), 32, torch.float64)


@every_loss
def test_a_row_of_length_zero_gets_no_gradient(name):
    x, W, y = draw(SMALL, seed=5)
    x[2] = 0
    got = library(name, (x, W, y))
    assert torch.equal(got[1][2], torch.zeros(3, dtype=torch.float64))
    assert_agree(got, (x, W, y), ask_oracle(name, (x, W, y)), 32, torch.float64)
    assert all(part.isfinite().all() for part in library(name, (x, W, y), torch.float32))
    W[y[0]] = 0  # and a class weight of length 0
    got = library(name, (x, W, y))
    assert torch.equal(got[2][y[0]], torch.zeros(3, dtype=torch.float64))
    assert_agree(got, (x, W, y), ask_oracle(name, (x, W, y)), 32, torch.float64)


# ---------------------------------------------------------------- half precision, θ_y = 0 and π, extreme lengths


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_loss
def test_half_precision_embeddings(name, dtype):
    data, answer = safe_case(name, SMALL, 0.02)
    head = make_head(name, data, torch.float32)
    half = torch.tensor(data[0]).to(dtype)
    loss, dx, dW = run(head, half, data[2])
    exact, _, exact_dW = run(head, half.float(), data[2])
    assert loss.dtype == dW.dtype == torch.float32 and dx.dtype == dtype
    assert torch.equal(loss, exact) and torch.equal(dW, exact_dW)
    assert dx.isfinite().all()
    assert abs(loss.item() - answer.loss) <= 4 * torch.finfo(dtype).eps * 32  # the input's own rounding


@every_loss
def test_autocast_computes_in_float32(name):
    data = draw(SMALL, seed=1)
    head = make_head(name, data, torch.float32)
    plain = run(head, data[0], data[2])
    cast = run(head, data[0], data[2], autocast=True)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_loss
def test_a_head_in_half_precision_computes_in_float32(name):
    data = draw(SMALL, seed=1)
    head = make_head(name, data, torch.bfloat16)
    loss, dx, dW = run(head, torch.tensor(data[0], dtype=torch.bfloat16), data[2])
    rounded = (dx.new_tensor(data[0]).double().numpy(), head.weight.detach().double().numpy(), data[2])
    assert loss.dtype == torch.float32 and dx.isfinite().all() and dW.isfinite().all()
    assert torch.equal(loss, library(name, rounded, torch.float32)[0])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("side", [1, -1], ids=["theta=0", "theta=pi"])
@pytest.mark.parametrize("dim", [2, 128, 512])
@every_loss
def test_an_embedding_parallel_to_its_own_weight(name, dim, side, bf16):
    """200 draws of x = ±scale·w_y: cosθ_y is ±1 up to rounding, where d sinθ/d cosθ is infinite."""
    B, K = 200, 10
    rng = np.random.default_rng([dim, 7])
    W = torch.tensor(rng.standard_normal((K, dim)), dtype=torch.bfloat16 if bf16 else torch.float32).float()
    y = torch.tensor(rng.integers(0, K, B))
    scales = [2.0**-10, 1.0, 2.0**10] if bf16 else [1e-3, 0.3, 1.0, 7.0, 1e3]  # powers of 2: exact in bfloat16
    x = side * torch.tensor(scales)[torch.arange(B) % len(scales), None] * W[y]
    x = x.bfloat16() if bf16 else x
    data = (x.double().numpy(), W.double().numpy(), y.numpy())
    head = make_head(name, data, torch.float32)
    loss, dx, dW = run(head, x, y, autocast=bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = head.logits(x, y).detach().double()
    assert loss.isfinite() and dx.isfinite().all() and dW.isfinite().all()

    answer = ask_oracle(name, data)
    assert abs(abs(answer.target) - 1).max() < 1e-12
    target = torch.arange(B), y
    assert np.abs(logits[target].numpy() - answer.logits[target]).max() <= 1e-3 * 32  # f(m, θ_y) within 1e-3
    losses = F.cross_entropy(logits, y, reduction="none").numpy()
    clear = answer.gaps > 2e-3  # closer, and a rounding may mark a class
    assert clear.mean() > 0.5
    assert np.abs(losses - answer.losses)[clear].max() <= 1e-3 * 32


@once
def test_the_sine_has_a_finite_slope_and_the_right_value():
    for dtype in (torch.float32, torch.float64):
        edge = 1 - torch.arange(20, dtype=dtype) * torch.finfo(dtype).eps / 2
        cos = torch.cat([edge, -edge, torch.linspace(-0.999, 0.999, 101, dtype=dtype), edge.new_tensor([1 + 1e-7])])
        cos.requires_grad_()
        value = sine(cos)
        (slope,) = torch.autograd.grad(value.sum(), cos)
        exact = torch.sin(torch.acos(cos.detach().double().clamp(-1, 1)))
        eps = torch.finfo(dtype).eps
        assert slope.isfinite().all() and slope.abs().max() <= eps**-0.5
        assert (value - exact).abs().max() <= 1.01 * eps**0.5
        inside = cos.detach().abs() <= 0.999
        exact_slope = -cos.detach() / exact
        torch.testing.assert_close(slope[inside], exact_slope[inside].to(dtype), rtol=1e3 * eps, atol=10 * eps)


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e6, 1e18])
def test_embeddings_of_any_length(size):
    (x, W, y), _ = safe_case("MV-Arc-Softmax-a", SMALL, 1e-4)
    unscaled = library("MV-Arc-Softmax-a", (x, W, y), torch.float32)
    scaled = library("MV-Arc-Softmax-a", (x * size, W, y), torch.float32)
    torch.testing.assert_close(scaled[0], unscaled[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled[1] * size, unscaled[1], rtol=1e-4, atol=1e-4)


def test_lengths_beyond_the_dtype():
    """|x|² = inf is refused; |x|² = 0 counts as a row of zeros, as the docstring says."""
    head = MarginHead("AM-Softmax", 6, 5, **HOW)
    y = torch.zeros(2, dtype=torch.int64)
    assert "beyond torch.float32 in 2 of 2" in error_of(lambda: head(torch.full((2, 6), 1e25), y))
    x = torch.full((2, 6), 1e-25, requires_grad=True)
    head(x, y).backward()
    assert not x.grad.any()


# ---------------------------------------------------------------- what must hold of every loss

batches = {
    "name": st.sampled_from(NAMES),
    "seed": st.integers(0, 10**6),
    "shape": st.tuples(st.integers(1, 9), st.integers(2, 12), st.integers(2, 8)),
    "s": st.sampled_from([1.0, 16.0, 64.0, 128.0]),
    "t": st.floats(0, 1),
    "easy": st.booleans(),
}


def assert_orthogonal(name, data, found, s):
    """x·dL/dx = 0 and w·dL/dw = 0: what is normalised has no say in its own length."""
    loss, dx, dW = found
    assert loss.isfinite() and loss >= 0
    slope = max(1, 16 / np.sqrt(1 - ask_oracle(name, data).target ** 2).min())
    for row, grad in [(data[0], dx), (data[1], dW)]:
        assert (torch.tensor(row) * grad).sum(1).abs().max() <= 1e-13 * s * slope


@quick_hypothesis
@given(**batches)
def test_gradients_are_orthogonal_to_what_is_normalised(name, seed, shape, s, t, easy):
    data = draw(shape, seed)
    assert_orthogonal(name, data, library(name, data, s=s, t=t, easy_margin=easy), s)


@quick_hypothesis
@given(**batches, power=st.integers(-6, 6), factor=st.floats(1, 10))
def test_lengths_do_not_matter(name, seed, shape, s, t, easy, power, factor):
    x, W, y = draw(shape, seed)
    scale = np.random.default_rng(seed).uniform(1, factor, len(x))[:, None] * 10.0**power
    loss, dx, dW = library(name, (x, W, y), s=s, t=t, easy_margin=easy)
    loss_x, dx_x, dW_x = library(name, (x * scale, W, y), s=s, t=t, easy_margin=easy)
    loss_w, dx_w, dW_w = library(name, (x, W * factor * 10.0**power, y), s=s, t=t, easy_margin=easy)
    near = {"rtol": 1e-8, "atol": 1e-11 * s}
    torch.testing.assert_close(loss_x, loss, **near)
    torch.testing.assert_close(loss_w, loss, **near)
    torch.testing.assert_close(dx_x * torch.tensor(scale), dx, **near)
    torch.testing.assert_close(dW_w * factor * 10.0**power, dW, **near)
    torch.testing.assert_close(dW_x, dW, **near)
    torch.testing.assert_close(dx_w, dx, **near)


@quick_hypothesis
@given(**batches)
def test_order_does_not_matter(name, seed, shape, s, t, easy):
    x, W, y = draw(shape, seed)
    rng = np.random.default_rng(seed)
    rows, classes = rng.permutation(len(x)), rng.permutation(len(W))
    loss, dx, dW = library(name, (x, W, y), s=s, t=t, easy_margin=easy)
    # class k of the shuffled head is class classes[k] of the other
    loss_p, dx_p, dW_p = library(name, (x[rows], W[classes], np.argsort(classes)[y[rows]]), s=s, t=t, easy_margin=easy)
    near = {"rtol": 1e-9, "atol": 1e-12 * s}
    torch.testing.assert_close(loss_p, loss, **near)
    torch.testing.assert_close(dx_p, dx[rows], **near)
    torch.testing.assert_close(dW_p, dW[classes], **near)


def assert_same(a, b):
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("name", EMPHASISED)
def test_t_zero_is_the_margin_loss(name, easy):
    plain = {"cos": "Softmax", "AM": "AM-Softmax", "Arc": "Arc-Softmax"}[TABLE[name][0]]
    for shape in (SMALL, LARGE):
        data = draw(shape)
        for dtype in (torch.float32, torch.float64):
            options = {"dtype": dtype, "easy_margin": easy}
            assert_same(library(name, data, t=0.0, **options), library(plain, data, **options))


@pytest.mark.parametrize("kind", ["AM", "Arc"])
def test_sv_is_mv_adaptive(kind):
    data = draw(SMALL)
    for t in (0.0, 0.2, 0.5):
        assert_same(library(f"SV-{kind}-Softmax", data, t=t), library(f"MV-{kind}-Softmax-a", data, t=t))


@once
@pytest.mark.parametrize("name", ["SV-Softmax", "SV-AM-Softmax", "SV-Arc-Softmax"])
def test_sv_is_the_first_papers_formula(name):
    """h = e^{s (t_SV − 1)(cosθ_k + 1) I_k} with t_SV = 1 + t."""
    data, _ = safe_case(name, SMALL, 1e-4, (("t", 0.2),))
    x, W, y = (torch.tensor(a) for a in data)
    head = make_head(name, data, t=0.2)
    cos = normalise(x) @ normalise(W).T
    f = head.margin(cos.gather(1, y[:, None]))
    expected = 32 * cos + 32 * (1.2 - 1) * (cos + 1) * (f < cos)
    others = torch.arange(5)[None] != y[:, None]
    torch.testing.assert_close(head.logits(x, y)[others], expected[others], rtol=0, atol=1e-12)
    assert (f < cos)[others].any()


@once
@pytest.mark.parametrize("kind", ["f", "a"])
def test_effective_margin_of_a_marked_class(kind):
    """AM: a marked class must be beaten by m + t (fixed) or m + t + t cosθ_k (adaptive), others by m."""
    m, t, s = 0.35, 0.2, 32.0
    data = draw(SMALL, seed=2)
    x, W, y = (torch.tensor(a) for a in data)
    head = make_head(f"MV-AM-Softmax-{kind}", data, m=m, t=t, s=s)
    cos = normalise(x) @ normalise(W).T
    cos_y = cos.gather(1, y[:, None])
    logits = head.logits(x, y)
    difference = (logits - logits.gather(1, y[:, None])) / s  # cosθ_k − cosθ_y + effective margin
    effective = difference - (cos - cos_y)
    marked = (cos_y - m < cos) & (torch.arange(5)[None] != y[:, None])
    unmarked = cos_y - m >= cos
    assert marked.any() and unmarked.any()
    expected = torch.full_like(cos, m + t) if kind == "f" else m + t + t * cos
    torch.testing.assert_close(effective[marked], expected[marked])
    torch.testing.assert_close(effective[unmarked], torch.full_like(effective[unmarked], m))


@once
@pytest.mark.parametrize("name", EMPHASISED)
def test_no_gradient_through_the_indicator(name):
    """A wrong class's logit depends on θ_y through I_k alone, so its gradient with respect to w_y is 0."""
    data = draw(SMALL, seed=2)
    y = torch.tensor(data[2])
    head = make_head(name, data)
    logits = head.logits(torch.tensor(data[0]), y)
    for i in range(len(y)):
        others = torch.arange(5) != y[i]
        (dW,) = torch.autograd.grad(logits[i, others].sum(), head.weight, retain_graph=True)
        assert torch.equal(dW[y[i]], torch.zeros(3, dtype=torch.float64))


@once
@pytest.mark.parametrize("name", EMPHASISED)
def test_the_indicator_at_the_label_does_not_matter(name):
    data = draw(SMALL, seed=2)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    head = make_head(name, data)
    plain = make_head({"cos": "Softmax", "AM": "AM-Softmax", "Arc": "Arc-Softmax"}[TABLE[name][0]], data)
    cos = head.cosines(x)
    fires = indicator(head.margin(cos.gather(1, y[:, None])), cos).gather(1, y[:, None])
    assert fires.any() == (TABLE[name][0] != "cos")
    grads = []
    for h in (head, plain):
        target = h.logits(x, y).gather(1, y[:, None])
        grads.append((target.detach(), *torch.autograd.grad(target.sum(), h.weight)))
    assert_same(*grads)


@once
def test_the_indicator_is_strict():
    f = torch.tensor([[0.5]])
    assert indicator(f, torch.tensor([[0.4, 0.5, 0.6]])).tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("name", "m", "plain"),
    [
        ("A-Softmax", 1.0, "Softmax"),
        ("AM-Softmax", 0.0, "Softmax"),
        ("Arc-Softmax", 0.0, "Softmax"),
        ("HM-Arc-Softmax", 0.0, "HM-Softmax"),
        ("F-AM-Softmax", 0.0, "F-Softmax"),
        ("MV-AM-Softmax-a", 0.0, "SV-Softmax"),
        ("MV-Arc-Softmax-a", 0.0, "SV-Softmax"),
    ],
)
def test_no_margin_is_the_plain_loss(name, m, plain):
    data = draw(SMALL)
    torch.testing.assert_close(library(name, data, m=m), library(plain, data), rtol=1e-12, atol=1e-12)


@once
def test_combined_margin():
    theta = torch.linspace(0.01, math.pi - 0.01, 500, dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(combined_margin(theta.cos(), 1.0, 0.2, 0.3), torch.cos(theta + 0.3) - 0.2, **close)
    # past π the cosine is continued downwards: no jump, and it falls all the way
    for m1, m3 in [(2.0, 0.0), (4.0, 0.0), (1.5, 0.7), (3.0, 0.3)]:
        value = combined_margin(theta.cos(), m1, 0.1, m3)
        steps = value.diff()
        assert steps.max() <= 1e-12 and steps.abs().max() < 1.01 * m1 * (theta[1] - theta[0])
        below_pi = m1 * theta + m3 <= math.pi
        torch.testing.assert_close(value[below_pi], torch.cos(m1 * theta + m3)[below_pi] - 0.1, **close)


# ---------------------------------------------------------------- mining


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 7, 10, 11, 64])
@pytest.mark.parametrize("name", MINED_HM)
def test_hm_keeps_the_hardest_rows(name, batch, ratio):
    data = draw((batch, 20, 6))
    head = make_head(name, data, s=4.0, hard_ratio=ratio)
    loss, dx, _ = run(head, data[0], data[2])
    kept = dx.abs().sum(1) > 0
    assert int(kept.sum()) == max(1, int(ratio * batch))
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    losses = F.cross_entropy(head.logits(x, y), y, reduction="none").detach()
    torch.testing.assert_close(loss, losses[kept].mean())
    assert kept.all() or losses[kept].min() >= losses[~kept].max()


@pytest.mark.parametrize("name", MINED_HM)
def test_hm_of_everything_is_the_plain_loss(name):
    data = draw(SMALL)
    plain = name.removeprefix("HM-")
    torch.testing.assert_close(library(name, data, hard_ratio=1.0), library(plain, data), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MINED_F)
def test_f_with_gamma_zero_is_the_plain_loss(name):
    data = draw(SMALL)
    torch.testing.assert_close(
        library(name, data, gamma=0.0), library(name.removeprefix("F-"), data), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", MINED_F)
def test_f_of_a_sample_that_is_right_beyond_rounding(name, gamma):
    """p_y = 1 to the last bit: L = 0, g = 0^γ; the gradient is 0 for every γ."""
    W = np.eye(4, 6)
    data = (np.array([[1.0, 0.01, 0, 0, 0, 0], [0, 1.0, 0.02, 0, 0, 0]]), W, np.array([0, 1]))
    got = library(name, data, torch.float32, s=128.0, m=0.1, gamma=gamma)
    assert got[0] == 0
    assert all(part.isfinite().all() and part.abs().max() < 1e-6 for part in got)


# ---------------------------------------------------------------- steps: annealing and warm-up of t


@pytest.mark.parametrize("step", [0, 1, 1000, 100_000, 131_421, 131_422, 10**6])
def test_annealing_follows_its_formula(step):
    lam = max(5, 1000 * (1 + 1e-4 * step) ** -2)
    data = draw(SMALL)
    head = make_head("A-Softmax", data, m=4.0, annealing=True)
    head.step.fill_(step)
    loss, dx, dW = run(head, data[0], data[2])
    answer = ask_oracle("A-Softmax", data, m=4.0, lam=lam)
    # λ itself is a float32
    for ours, theirs in [(loss, answer.loss), (dx, answer.dx), (dW, answer.dW)]:
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-6)
    assert head.step == step + 1


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"A-Softmax"}))
def test_only_a_softmax_is_annealed(name):
    data = draw(SMALL)
    assert_same(library(name, data, annealing=True), library(name, data))


@once
@pytest.mark.parametrize("name", ["MV-AM-Softmax-a", "MV-Arc-Softmax-a", "SV-Softmax"])
def test_a_stopped_gradient_leaves_the_loss_and_takes_1_plus_t_from_the_marked_push(name):
    torch.manual_seed(0)
    x, y, t = torch.randn(6, 5, dtype=torch.float64), torch.arange(6), 0.4
    plain, stopped = (MarginHead(name, 5, 9, t=t, stop_gradient=stop).double() for stop in (False, True))
    stopped.load_state_dict(plain.state_dict())
    heads, grads = (plain, stopped), []
    for head in heads:
        cos = head.cosines(x).detach().requires_grad_()
        head.cosines = lambda _, cos=cos: cos
        head(x, y).backward()
        grads.append(cos.grad)
    torch.testing.assert_close(plain.logits(x, y), stopped.logits(x, y), rtol=1e-13, atol=0)
    target = cos.gather(1, y[:, None])
    marked = (cos > plain.margin(target)).scatter(1, y[:, None], False)
    assert marked.any() and not marked.all()
    torch.testing.assert_close(grads[0], torch.where(marked, (1 + t) * grads[1], grads[1]))


def test_t_warmup_grows_linearly_in_training_mode():
    data = draw(SMALL, seed=2)
    for name, t in itertools.product(["MV-AM-Softmax-a", "MV-Arc-Softmax-f"], [0.2, 0.5]):
        head = make_head(name, data, t=t, t_warmup=4)
        full = library(name, data, t=t)
        for step in range(7):
            assert head.step == step
            head.eval()
            assert_same(run(head, data[0], data[2]), full)
            head.train()
            got = run(head, data[0], data[2])
            expected = library(name, data, t=t * min(1, step / 4))
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            assert step == 0 or got[0] > library(name, data, t=t * min(1, step / 4) * 0.98)[0]


def test_steps_count_in_training_with_gradients_only():
    data = draw(SMALL)
    head = make_head("MV-AM-Softmax-a", data, t_warmup=10)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    head(x, y)
    with torch.no_grad():
        head(x, y)
    with torch.inference_mode():
        head(x, y)
    head.eval()(x, y)
    assert head.step == 1


@pytest.mark.parametrize(
    ("name", "options"), [("A-Softmax", {"m": 4.0, "annealing": True}), ("MV-AM-Softmax-a", {"t_warmup": 100})]
)
def test_the_step_survives_a_checkpoint(name, options):
    data = draw(SMALL, seed=2)
    head = make_head(name, data, **options)
    for _ in range(30):
        run(head, data[0], data[2])
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    fresh = MarginHead(name, 3, 5, **HOW, **options).double()
    before = run(make_head(name, data, **options), data[0], data[2])
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.step == head.step == 30
    resumed, continued = run(fresh, data[0], data[2]), run(head, data[0], data[2])
    assert_same(resumed, continued)
    assert resumed[0] != before[0]


# ---------------------------------------------------------------- options, compile, errors


@once
def test_defaults():
    data = draw(SMALL)
    for name, (f, _, _) in TABLE.items():
        m = {"cos": 0.0, "A": 2.0, "AM": 0.35, "Arc": 0.5}[f]
        spelled = {"s": 32.0, "m": m, "t": 0.2, "gamma": 2.0, "hard_ratio": 0.9, "easy_margin": False}
        assert_same(library(name, data, backend="auto"), library(name, data, **spelled))


@pytest.mark.parametrize(
    ("option", "users"),
    [
        ({"t": 0.9}, EMPHASISED),
        ({"gamma": 5.0}, MINED_F),
        ({"hard_ratio": 0.3}, MINED_HM),
        ({"m": 1.5}, [name for name in NAMES if TABLE[name][0] != "cos"]),
        ({"easy_margin": True}, [name for name in NAMES if TABLE[name][0] != "cos"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_matters_to_the_losses_that_use_it(option, users):
    data = draw((20, 5, 3), seed=2)
    for name in NAMES:
        same = torch.equal(library(name, data, s=8.0, **option)[0], library(name, data, s=8.0)[0])
        assert same != (name in users), name


@once
def test_easy_margin_keeps_the_indicator_at_f():
    """The target at cosθ_y <= 0 loses its margin, the marked classes stay those of f(m, θ_y)."""
    data = draw((40, 5, 3), seed=2)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    easy, hard = (make_head("MV-AM-Softmax-f", data, easy_margin=e) for e in (True, False))
    cos_y = easy.cosines(x).gather(1, y[:, None])
    a, b = easy.logits(x, y), hard.logits(x, y)
    others = torch.arange(5)[None] != y[:, None]
    assert torch.equal(a[others], b[others])
    torch.testing.assert_close(a.gather(1, y[:, None]), 32 * torch.where(cos_y > 0, cos_y - 0.35, cos_y))
    assert (cos_y > 0).any() and (cos_y <= 0).any()


def test_a_float64_head_takes_float32_embeddings():
    data = draw(SMALL)
    head = make_head("MV-AM-Softmax-a", data)
    mixed = run(head, torch.tensor(data[0], dtype=torch.float32), data[2])
    assert mixed[0].dtype == torch.float64 and mixed[1].dtype == torch.float32
    assert torch.equal(mixed[0], run(head, data[0], data[2])[0])


@once
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HM-Arc-Softmax", {}),
        ("F-AM-Softmax", {}),
        ("MV-AM-Softmax-a", {}),
        ("MV-Arc-Softmax-f", {"easy_margin": True}),
        ("A-Softmax", {"m": 4.0, "annealing": True}),
        ("MV-AM-Softmax-a", {"t_warmup": 100_000}),
    ],
)
def test_compiled_is_eager(name, options):
    data = draw(SMALL, seed=2)
    eager, twin = (make_head(name, data, s=4.0, **options) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for head in (eager, twin):
        head.step.fill_(50_000)  # where one step more or less changes the gradient by about 1e-6
    for _ in range(3):
        expected = run(eager, data[0], data[2])
        torch.testing.assert_close(run(twin, data[0], data[2], compiled), expected, rtol=1e-10, atol=1e-12)
    assert eager.step == twin.step == 50_003


def error_of(function) -> str:
    """The message of the one ValueError that the function raises, without warnings or a second error behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            function()
    assert caught.type is ValueError and caught.value.__context__ is None
    return str(caught.value)


NAN, INF = math.nan, math.inf


@once
@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("AM-Softmax", {"backend": "cuda"}, ["unknown backend 'cuda'", "dense, fused, auto"]),
        ("AM-Softmax", {"keep": "half"}, ["unknown keep 'half'", "none, float32, float16"]),
        ("MV-AM-Softmax-a", {"t": -0.1}, ["t of MV-AM-Softmax-a", ">= 0", "-0.1"]),
        ("MV-AM-Softmax-a", {"t": NAN}, ["t of", "nan"]),
        ("MV-AM-Softmax-a", {"t": INF}, ["t of", "inf"]),
        ("MV-AM-Softmax-a", {"t_warmup": -1}, ["t_warmup", "-1"]),
        ("AM-Softmax", {"m": NAN}, ["m of AM-Softmax", "nan"]),
        ("Arc-Softmax", {"m": INF}, ["m of Arc-Softmax", "inf"]),
        ("AM-Softmax", {"m": -0.1}, ["m of AM-Softmax", ">= 0", "-0.1"]),
        ("A-Softmax", {"m": 0.9}, ["m of A-Softmax", ">= 1", "0.9"]),
        ("MV-Arc-Softmax-a", {"m": 28.6}, ["m of MV-Arc", "<= 3.14", "28.6 radians (28.6 degrees are 0.499)"]),
        ("F-AM-Softmax", {"m": 35.0}, ["m of F-AM-Softmax must be a number <= 2, got 35"]),
        ("Softmax", {"s": 0.0}, ["s must be", "> 0", "0.0"]),
        ("Softmax", {"s": -1.0}, ["s must be", "-1.0"]),
        ("Softmax", {"s": NAN}, ["s must be", "nan"]),
        ("Softmax", {"s": INF}, ["s must be", "inf"]),
        ("HM-Softmax", {"hard_ratio": 0.0}, ["hard_ratio", "(0, 1]", "0.0"]),
        ("HM-Softmax", {"hard_ratio": 1.1}, ["hard_ratio", "1.1"]),
        ("HM-Softmax", {"hard_ratio": NAN}, ["hard_ratio", "nan"]),
        ("F-Softmax", {"gamma": -1.0}, ["gamma", ">= 0", "-1.0"]),
        ("F-Softmax", {"gamma": NAN}, ["gamma", "nan"]),
        ("Softmax", {"num_classes": 1}, ["num_classes", ">= 2", "1"]),
        ("Softmax", {"embedding_dim": 0}, ["embedding_dim", ">= 1", "0"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_errors_of_the_arguments(name, options, parts):
    message = error_of(lambda: MarginHead(name, **{"embedding_dim": 4, "num_classes": 3, **options}))
    assert all(part in message for part in parts), message


@once
@pytest.mark.parametrize("name", ["AM", "mv-am-softmax-a", "ArcFace", ""])
def test_an_unknown_loss_lists_the_known_ones(name):
    message = error_of(lambda: MarginHead(name, 4, 3))
    assert repr(name) in message and all(known in message for known in NAMES)


@once
def test_a_row_with_an_unknown_part_is_refused():
    """A new row of LOSSES whose branch is missing: no silent other loss."""
    ones = torch.ones(2, 3)
    assert error_of(lambda: margin("sphere", ones, 0.1)) == "no margin is called f='sphere'"
    assert error_of(lambda: emphasise("square", ones, 0.1)) == "no emphasis is called h='square'"
    assert error_of(lambda: mine("soft", ones[0], 2.0, 0.9)) == "no mining is called g='soft'"


def with_value(row, value):
    x = torch.ones(4, 6)
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "parts"),
    [
        (torch.ones(6), torch.zeros(6, dtype=torch.int64), ["embeddings", "(B, 6)", "(6,)"]),
        (torch.ones(4, 6, 1), torch.zeros(4, dtype=torch.int64), ["embeddings", "(4, 6, 1)"]),
        (torch.ones(4, 5), torch.zeros(4, dtype=torch.int64), ["embeddings", "(B, 6)", "(4, 5)"]),
        (torch.ones(4, 6, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), ["embeddings", "int64"]),
        (torch.ones(4, 6), torch.zeros(3, dtype=torch.int64), ["labels", "(4,)", "(3,)"]),
        (torch.ones(4, 6), torch.zeros(4, 1, dtype=torch.int64), ["labels", "(4, 1)"]),
        (torch.ones(4, 6), torch.tensor(0), ["labels", "()"]),
        (torch.ones(4, 6), torch.zeros(4, dtype=torch.int32), ["labels", "int64", "int32"]),
        (torch.ones(4, 6), torch.zeros(4), ["labels", "int64", "float32"]),
        (torch.ones(0, 6), torch.zeros(0, dtype=torch.int64), ["one at least", "(0,)"]),
        (torch.ones(4, 6), torch.tensor([0, 1, 5, 2]), ["labels", "0 … 4", "5"]),
        (torch.ones(4, 6), torch.tensor([0, 1, -1, 2]), ["labels", "0 … 4", "-1"]),
        (torch.ones(4, 6), torch.tensor([0, 1, -100, 2]), ["labels", "0 … 4", "-100"]),
        (with_value(2, NAN), torch.zeros(4, dtype=torch.int64), ["NaN, infinity", "1 of 4", "row 2"]),
        (with_value(3, INF), torch.zeros(4, dtype=torch.int64), ["NaN, infinity", "1 of 4", "row 3"]),
        (with_value([1, 3], -INF), torch.zeros(4, dtype=torch.int64), ["2 of 4", "row 1"]),
        (with_value(0, NAN).half(), torch.zeros(4, dtype=torch.int64), ["row 0"]),
    ],
)
@pytest.mark.parametrize("name", ["HM-Softmax", "MV-Arc-Softmax-a"])
def test_errors_of_the_batch(name, x, y, parts):
    head = MarginHead(name, 6, 5, **HOW)
    for call in (head, head.logits):
        message = error_of(lambda call=call: call(x, y))
        assert all(part in message for part in parts), message
    assert head.step == 0


def test_check_can_be_turned_off():
    head = MarginHead("Softmax", 6, 5, check=False, **HOW)
    y = torch.zeros(4, dtype=torch.int64)
    head(with_value(2, NAN), y)
    assert "labels" in error_of(lambda: head(torch.ones(4, 6), y[:3]))


@pytest.mark.parametrize("where", ["embeddings", "weight"])
def test_nan_that_nobody_checks_reaches_the_loss(where):
    """A training that has diverged must not report a finite loss."""
    head = MarginHead("Softmax", 6, 5, check=False, **HOW)
    x, y = torch.ones(4, 6), torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        (x if where == "embeddings" else head.weight)[0, 2] = NAN
    assert head(x, y).isnan()


# ---------------------------------------------------------------- what a training watches


@pytest.mark.once
@pytest.mark.parametrize("name", LOSSES)
def test_study_says_what_the_gradient_of_the_cosines_is(name):
    """Against the head's own gradients of embeddings that lie on the axes, whose cosines are the weights' entries."""
    torch.manual_seed(0)
    head, base = (MarginHead(n, 6, 9, s=4.0) for n in (name, BASES[LOSSES[name].f]))
    base.load_state_dict(head.state_dict())
    x, y = torch.randn(12, 6), torch.randint(0, 9, (12,))
    with torch.no_grad():
        x[:6] = 3 * head.weight[y[:6]]  # the first half lie on their own weight
    found = head.study(x, y)
    assert found["top1"] >= 0.5 and list(found) == ["top1", "median_p_y", "gradient_distance"]
    assert found["median_p_y"] == pytest.approx((-head.losses(x, y)).exp().median().item(), rel=1e-4)
    grads = []
    for one in (head, base):
        cos = one.cosines(x).detach().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(one), "cosines", lambda self, embeddings, cos=cos: cos)
            one.backend = "dense"
            grads += torch.autograd.grad(one(x, y), cos)
    expected = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
    assert found["gradient_distance"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (expected > 1e-4) == bool(LOSSES[name].h or LOSSES[name].g)


BASES = {"cos": "Softmax", "A": "A-Softmax", "AM": "AM-Softmax", "Arc": "Arc-Softmax"}


def on_circle(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


@once
@pytest.mark.parametrize(
    ("loss", "m", "share"),
    [
        # Weights at 0°, 90° and 180°. First row at 30°, label 0: cosθ = 0.866, 0.5, −0.866, marked against class 1
        # where f < 0.5. Second at 50°, label 1: cosθ = 0.643, 0.766, −0.643, marked against class 0 where f < 0.643.
        ("Softmax", None, 0 / 4),
        ("AM-Softmax", 0.12, 0 / 4),  # f = 0.746 and 0.646
        ("AM-Softmax", 0.13, 1 / 4),  # 0.736 and 0.636
        ("AM-Softmax", 0.37, 2 / 4),  # 0.496 and 0.396
        ("AM-Softmax", 1.75, 4 / 4),  # below every cosine
        ("Arc-Softmax", math.radians(25), 1 / 4),  # cos 55° = 0.574 and cos 65° = 0.423
        ("Arc-Softmax", math.radians(31), 2 / 4),  # cos 61° = 0.485 and cos 71°
        ("MV-AM-Softmax-a", 0.37, 2 / 4),  # the emphasis does not change what is marked
    ],
)
def test_marked_share_of_a_case_worked_out_by_hand(loss, m, share):
    head = MarginHead(loss, 2, 3, m=m)
    head.weight.data = 3 * on_circle(0, 90, 180)
    found = head.watch(7 * on_circle(30, 50), torch.tensor([0, 1]))
    target, negative = [30, 40], [60, 150, 50, 130]
    assert found == {
        "marked_share": share,
        "target_cosine": pytest.approx(np.cos(np.radians(target)).mean(), abs=2e-6),
        "negative_cosine": pytest.approx(np.cos(np.radians(negative)).mean(), abs=2e-6),
    }
