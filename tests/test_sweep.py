"""mvrepro.heads.sweep against the dense head and the oracle; its memory; batches that could break it."""

import itertools
import math
import shutil
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from test_losses import (
    EMPHASISED,
    LARGE,
    SMALL,
    TABLE,
    TINY,
    ask_oracle,
    assert_agree,
    assert_orthogonal,
    assert_same,
    batches,
    draw,
    every_loss,
    library,
    make_head,
    one_thread,  # noqa: F401 (a fixture)
    quick_hypothesis,
    relevant_options,
    run,
    safe_case,
)
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from mvrepro.heads import chunks
from mvrepro.heads import sweep as module
from mvrepro.heads.margin import MarginHead
from mvrepro.heads.sweep import KEEP, SGD, fused_losses, pick_by_memory
from mvrepro.losses import mine

ODD = (6, 10, 4)  # B, K, D: chunks of 3 and 7 don't divide K
MIDDLE = (64, 2000, 64)
PLAIN = {None: "Softmax", "cos": "Softmax", "AM": "AM-Softmax", "Arc": "Arc-Softmax"}

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
every_keep = pytest.mark.parametrize("keep", KEEP)
both_forms = pytest.mark.parametrize("form", ["in cache", "few launches"], indirect=True)


@pytest.fixture
def form(request, monkeypatch):
    """Of the work on a chunk; that of GPUs, whose functions run as they are here."""
    monkeypatch.setattr(chunks, "FEW_LAUNCHES", {"cpu"} if request.param == "few launches" else set())
    monkeypatch.setattr(chunks, "COMPILED", set())


# ---------------------------------------------------------------- helpers


def sweep_of(head, **how):
    """The head's forward, (x, y) -> loss, by fused_losses."""
    how = {"chunk": 3, **how}
    return lambda x, y: mine(
        head.loss.g, fused_losses(x, head.weight, y, head._rule(), **how), head.gamma, head.hard_ratio
    )


def sweep(name, data, dtype=torch.float64, how=None, **options):
    """loss, dloss/dx, dloss/dW."""
    head = make_head(name, data, dtype, **options)
    return run(head, data[0], data[2], sweep_of(head, **(how or {})))


def assert_close(got, expected, share, what=""):
    """Loss, dx and dW within a share of the norm that is expected, or of 0.01 where there is little but rounding."""
    for part, a, b in zip(("loss", "dx", "dW"), got, expected, strict=True):
        error, size = (a.double() - b.double()).norm(), b.double().norm()
        assert error <= share * max(size, 0.01), f"{part} is off by {error / size:.3g} of its norm {size:.3g} {what}"


# ---------------------------------------------------------------- the dense head and the oracle


@pytest.mark.parametrize("shape", [TINY, SMALL, ODD], ids=["B1-K2-D2", "B7-K5-D3", "B6-K10-D4"])
@every_loss
def test_every_option_agrees_with_the_dense_head(name, shape):
    for options in relevant_options(name):
        data, _ = safe_case(name, shape, 1e-6, options)
        got, expected = (f(name, data, **dict(options)) for f in (sweep, library))
        assert [part.dtype for part in got] == [torch.float64] * 3
        assert_close(got, expected, 1e-10, options)


@every_keep
@both_dtypes
@every_loss
def test_agrees_with_the_oracle(name, dtype, keep):
    for shape, easy in itertools.product([TINY, SMALL], [False, True]):
        data, answer = safe_case(name, shape, 1e-4 if keep != "float16" else 2e-3, (("easy_margin", easy),))
        got = sweep(name, data, dtype, {"keep": keep}, easy_margin=easy)
        assert [part.dtype for part in got] == [dtype] * 3
        if keep == "float16":
            assert_close(got, [torch.as_tensor(a) for a in (answer.loss, answer.dx, answer.dW)], 0.02)
        else:
            assert_agree(got, data, answer, 32, dtype)


@every_loss
def test_a_large_batch_agrees_with_the_oracle(name):
    data, answer = safe_case(name, LARGE, 2e-6)
    for dtype, chunk in itertools.product([torch.float64, torch.float32], [37, None]):
        assert_agree(sweep(name, data, dtype, {"chunk": chunk}), data, answer, 32, dtype)


@every_loss
def test_gradients_in_float32(name):
    """The bar of the design: 5e-6 of the norm, at a size where sums are long."""
    for seed in itertools.count():
        data = draw(MIDDLE, seed)
        head = make_head(name, data)
        cos = head.cosines(torch.tensor(data[0])).detach()
        f = head.margin(cos.gather(1, torch.tensor(data[2])[:, None]))
        others = torch.arange(MIDDLE[1]) != torch.tensor(data[2])[:, None]
        if (cos - f)[others].abs().min() > 3e-7:  # no mark that rounding turns over
            break
    expected = library(name, data)
    for keep, share in [("none", 5e-6), ("float32", 5e-6), ("float16", 2e-2)]:
        assert_close(sweep(name, data, torch.float32, {"keep": keep, "chunk": 300}), expected, share)


@every_keep
@every_loss
def test_the_chunk_does_not_matter(name, keep):
    data, _ = safe_case(name, ODD, 2e-3)
    expected = library(name, data)
    for chunk in (1, 3, 7, 10, 11, None):
        got = sweep(name, data, how={"keep": keep, "chunk": chunk})
        assert_close(got, expected, 0.02 if keep == "float16" else 1e-10, f"chunk {chunk}")


@both_dtypes
@every_loss
def test_kept_cosines_give_the_bits_of_computed_ones(name, dtype):
    data = draw(LARGE)
    assert_same(*(sweep(name, data, dtype, {"keep": keep, "chunk": 37}) for keep in ("none", "float32")))


@pytest.mark.parametrize("easy", [False, True], ids=["", "easy"])
@every_loss
def test_gradients_agree_with_finite_differences(name, easy):
    (x, W, y), _ = safe_case(name, (5, 4, 3), 2e-4, (("s", 8.0), ("easy_margin", easy)))
    head = make_head(name, (x, W, y), s=8.0, easy_margin=easy).eval()
    losses = lambda x, W: fused_losses(x, W, torch.tensor(y), head._rule(), chunk=3)
    inputs = torch.tensor(x, requires_grad=True), torch.tensor(W, requires_grad=True)
    assert torch.autograd.gradcheck(losses, inputs)


@quick_hypothesis
@given(**batches)
def test_gradients_are_orthogonal_to_what_is_normalised(name, seed, shape, s, t, easy):
    data = draw(shape, seed)
    assert_orthogonal(name, data, sweep(name, data, s=s, t=t, easy_margin=easy), s)


@every_loss
def test_every_combination_of_options(name):
    """A head with backend "fused" against a dense one: every option with every other, in every precision."""
    warmups = [0, 4] if name in EMPHASISED else [0]
    stopped = [False, True] if TABLE[name][1] == "adaptive" else [False]
    annealed = [False, True] if name == "A-Softmax" else [False]
    for easy, t_warmup, stop, annealing in itertools.product([False, True], warmups, stopped, annealed):
        data, _ = safe_case(name, ODD, 1e-4, (("easy_margin", easy),))
        options = {"easy_margin": easy, "t_warmup": t_warmup, "stop_gradient": stop, "annealing": annealing}

        def found(backend, dtype, data=data, options=options, **how):
            head = make_head(name, data, dtype, backend=backend, **options)
            head.step.fill_(2)  # half of the warm-up
            return run(head, data[0], data[2], **how)

        exact = found("dense", torch.float64)
        assert_close(found("fused", torch.float64), exact, 1e-10, options)
        single = found("fused", torch.float32)
        assert_close(single, exact, 1e-5, options)
        assert_same(found("fused", torch.float32, autocast=True), single)


# ---------------------------------------------------------------- the form of GPUs, products of bfloat16 factors


few_launches = pytest.mark.parametrize("form", ["few launches"], indirect=True)


@few_launches
@every_loss
def test_few_launches(name, form):
    """With every keep and precision, and scales at which the largest exponent is and isn't followed."""
    for s, keep in itertools.product([1.0, 32.0, 128.0], KEEP):
        data, _ = safe_case(name, ODD, 2e-3, (("s", s),))
        exact = library(name, data, s=s)
        for dtype, chunk in itertools.product([torch.float64, torch.float32], [1, 3, None]):
            got = sweep(name, data, dtype, {"keep": keep, "chunk": chunk}, s=s)
            assert [part.dtype for part in got] == [dtype] * 3
            share = {torch.float64: 1e-10, torch.float32: 1e-5 * max(1, s / 32)}[dtype]
            assert_close(got, exact, max(0.02, s / 1000) if keep == "float16" else share, (s, keep, dtype, chunk))
    for dtype in (torch.float64, torch.float32):
        found = (sweep(name, draw(LARGE), dtype, {"keep": keep, "chunk": 37}) for keep in ("none", "float32"))
        assert_same(*found)


@few_launches
@pytest.mark.parametrize("name", ["F-Softmax", "MV-Arc-Softmax-f", "MV-AM-Softmax-a"])
def test_few_launches_with_a_weight_in_half_precision(name, form):
    data, _ = safe_case(name, SMALL, 0.02)
    half = torch.tensor(data[0]).bfloat16()
    head = make_head(name, data, torch.bfloat16)
    exact = make_head(name, (half.double().numpy(), head.weight.detach().double().numpy(), data[2]))
    expected = run(exact, half.double(), data[2])
    for products in ("float32", "bfloat16"):
        got = run(head, half, data[2], sweep_of(head, products=products))
        assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == torch.bfloat16
        assert_close(got, expected, 0.005 if products == "float32" else 0.02)


@every_loss
def test_products_of_bfloat16_factors(name):
    """Against the dense head in float64, with the cosines that keep asks for; an input in float64 asks for all of it.

    What a cosine is off by turns few marks over, of 2000 a sample.
    """
    data, exact = draw(MIDDLE), library(name, draw(MIDDLE))
    for keep in KEEP:
        how = {"keep": keep, "chunk": 300, "products": "bfloat16"}
        got = sweep(name, data, torch.float32, how)
        assert [part.dtype for part in got] == [torch.float32] * 3
        assert_close(got, exact, 0.01 if keep != "float16" else 0.02)
        assert not torch.equal(got[2], sweep(name, data, torch.float32, {**how, "products": "float32"})[2])
    assert_close(sweep(name, data, torch.float64, how | {"keep": "none"}), exact, 1e-10)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@few_launches
def test_few_launches_update_in_backward(products, form, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 128})  # several chunks
    data = draw(ODD)
    head, plain = (
        make_head("MV-AM-Softmax-a", data, torch.float32, backend="fused", products=products) for _ in range(2)
    )
    head.update_in_backward(lr=0.1, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        x, _, y = draw(ODD, seed=step)
        got, expected = run(head, x, y), run(plain, x, y)
        sgd.step()
        assert_close((*got[:2], head.weight.detach()), (*expected[:2], plain.weight.detach()), 1e-6)
    assert head.weight.grad is None and head.picked.endswith("products=bfloat16") == (products == "bfloat16")


# ---------------------------------------------------------------- odd batches


@pytest.mark.parametrize("labels", ["all equal", "pairs", "one chunk has all", "first and last class"])
@every_loss
def test_repeated_labels(name, labels):
    x, W, _ = draw(ODD, seed=3)
    y = {"all equal": [4] * 6, "pairs": [0, 0, 1, 1, 2, 2], "one chunk has all": [3, 4, 5] * 2}.get(labels, [0, 9] * 3)
    data = (x, W, np.array(y))
    assert_close(sweep(name, data), library(name, data), 1e-10)
    assert_agree(sweep(name, data), data, ask_oracle(name, data), 32, torch.float64)


@few_launches
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_few_launches_give_rows_of_length_zero_no_gradient(products, form):
    x, W, y = draw(ODD, seed=5)
    x[2] = 0
    W[[y[0], (y[0] + 1) % 10]] = 0
    got = sweep("MV-AM-Softmax-a", (x, W, y), torch.float32, {"products": products})
    assert not got[1][2].any() and not got[2][[y[0], (y[0] + 1) % 10]].any()
    share = 1e-5 if products == "float32" else 0.02
    assert_close(got, library("MV-AM-Softmax-a", (x, W, y), torch.float32), share)


@every_keep
@both_dtypes
@every_loss
def test_rows_of_length_zero_get_no_gradient(name, dtype, keep):
    x, W, y = draw(ODD, seed=5)
    x[2] = 0
    W[[y[0], (y[0] + 1) % 10]] = 0
    got, expected = sweep(name, (x, W, y), dtype, {"keep": keep}), library(name, (x, W, y), dtype)
    assert not got[1][2].any() and not got[2][[y[0], (y[0] + 1) % 10]].any()
    assert all(part.isfinite().all() for part in got)
    assert_close(got, expected, 1e-10 if dtype == torch.float64 else 1e-5) if keep != "float16" else None


@pytest.mark.parametrize("side", [1, -1], ids=["theta=0", "theta=pi"])
@pytest.mark.parametrize("s", [1.0, 32.0, 128.0])
@every_loss
def test_cosines_of_exactly_one(name, s, side):
    """x = ±w_y, and as many other classes at ±1: coordinate axes, so that no product rounds."""
    W = np.concatenate([np.eye(5), -np.eye(5), 2 * np.eye(5)])
    y = np.array([0, 3, 4, 9, 14, 7, 0])
    x = side * np.array([1, 0.5, 2, 4, 1, 8, 16])[:, None] * W[y]
    options = {"s": s, "hard_ratio": 1.0}  # the samples are equally hard: which HM keeps would be chance
    for dtype, keep in itertools.product([torch.float32, torch.float64], ["none", "float32"]):
        got = sweep(name, (x, W, y), dtype, {"keep": keep}, **options)
        expected = library(name, (x, W, y), dtype, **options)
        assert all(part.isfinite().all() for part in got)
        assert_close(got, expected, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("s", [1e-3, 1.0, 64.0, 128.0, 1e4])
@every_loss
def test_any_scale(name, s):
    for t in (0.0, 0.2, 1.0):
        data, _ = safe_case(name, SMALL, 1e-4, (("s", 32.0), ("t", t)))
        for dtype in (torch.float64, torch.float32):
            got, expected = sweep(name, data, dtype, s=s, t=t), library(name, data, dtype, s=s, t=t)
            assert all(part.isfinite().all() for part in got)
            assert_close(got, expected, 1e-10 * max(1, s) if dtype == torch.float64 else 1e-6 * max(10, s))


@every_loss
def test_a_sample_that_is_right_beyond_rounding(name):
    """s = 128 and c_y = 1: e^O is far below the least float32, the loss 0 or nearly, no gradient is NaN."""
    W = np.eye(4, 6)
    data = (np.array([[1.0, 0.01, 0, 0, 0, 0], [0, 1.0, 0.02, 0, 0, 0]]), W, np.array([0, 1]))
    for chunk in (1, 4):
        got = sweep(name, data, torch.float32, {"chunk": chunk}, s=128.0, m=1.0 if TABLE[name][0] == "A" else 0.1)
        assert got[0] <= 1e-6 and all(part.isfinite().all() and part.abs().max() < 1e-6 for part in got)


@pytest.mark.parametrize("name", EMPHASISED)
def test_t_zero_is_the_margin_loss(name):
    data = draw(LARGE)
    for easy in (False, True):
        plain = sweep(PLAIN[TABLE[name][0]], data, torch.float32, easy_margin=easy)
        assert_same(sweep(name, data, torch.float32, t=0.0, easy_margin=easy), plain)


@pytest.mark.parametrize("size", [1e-15, 1e-6, 1e6, 1e15])
def test_rows_of_any_length(size):
    (x, W, y), _ = safe_case("MV-Arc-Softmax-a", SMALL, 1e-4)
    loss, dx, dW = sweep("MV-Arc-Softmax-a", (x, W, y), torch.float32)
    for scaled, factors in [((x * size, W, y), (1, size, 1)), ((x, W * size, y), (1, 1, size))]:
        got = sweep("MV-Arc-Softmax-a", scaled, torch.float32)
        assert_close([a * b for a, b in zip(got, factors, strict=True)], (loss, dx, dW), 1e-5)


@pytest.mark.parametrize("where", ["x", "own class", "another class"])
@pytest.mark.parametrize("name", ["Softmax", "MV-Arc-Softmax-a", "MV-AM-Softmax-f"])
@both_forms
def test_nan_reaches_the_loss(name, where, form):
    x, W, y = draw(ODD, seed=1)
    if where == "x":
        x[0, 1] = math.nan
    else:
        W[y[0] if where == "own class" else (y[0] + 1) % 10, 1] = math.nan
    assert sweep(name, (x, W, y), torch.float32)[0].isnan()


# ---------------------------------------------------------------- warm-up, annealing, precision, compile


@both_forms
def test_warm_up_and_annealing_follow_the_head(form):
    data = draw(SMALL, seed=2)
    for name, options in [
        ("MV-AM-Softmax-a", {"t_warmup": 4}),
        ("MV-Arc-Softmax-f", {"t_warmup": 4}),
        ("A-Softmax", {"m": 4.0, "annealing": True}),
    ]:
        for step in (0, 1, 3, 4, 1000):
            head = make_head(name, data, **options)
            head.step.fill_(step)
            got = run(head, data[0], data[2], sweep_of(head))
            assert_close(got, run(head, data[0], data[2]), 1e-10, (name, step))


@every_keep
@pytest.mark.parametrize("name", ["Softmax", "MV-AM-Softmax-f", "MV-Arc-Softmax-a", "F-Arc-Softmax"])
def test_half_precision_computes_in_float32(name, keep):
    data, _ = safe_case(name, SMALL, 0.02)
    how = {"keep": keep}
    head = make_head(name, data, torch.float32)
    forward = sweep_of(head, **how)
    plain = run(head, data[0], data[2], forward)
    assert_same(run(head, data[0], data[2], forward, autocast=True), plain)
    x, y = torch.tensor(data[0], dtype=torch.float32, requires_grad=True), torch.tensor(data[2])
    head.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(x, y)
        loss.backward()  # inside as well
    assert_same((loss.detach(), x.grad, head.weight.grad), plain)

    half = torch.tensor(data[0]).bfloat16()
    got, expected = run(head, half, data[2], forward), run(head, half.float(), data[2], forward)
    assert got[1].dtype == torch.bfloat16
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
    head = make_head(name, data, torch.bfloat16)  # a weight in half precision
    got, expected = run(head, half, data[2], sweep_of(head, **how)), run(head, half, data[2])
    assert got[0].dtype == torch.float32 and got[2].dtype == torch.bfloat16
    assert_close(got, expected, 0.03 if keep == "float16" else 0.01)


def test_a_float64_weight_takes_float32_embeddings():
    data = draw(SMALL)
    head = make_head("MV-AM-Softmax-a", data)
    mixed = run(head, torch.tensor(data[0], dtype=torch.float32), data[2], sweep_of(head))
    assert mixed[0].dtype == torch.float64 and mixed[1].dtype == torch.float32
    assert torch.equal(mixed[0], run(head, data[0], data[2], sweep_of(head))[0])


@pytest.mark.parametrize("name", ["HM-Arc-Softmax", "F-AM-Softmax", "MV-AM-Softmax-a", "MV-Arc-Softmax-f"])
def test_under_compile(name):
    data = draw(SMALL, seed=2)
    head = make_head(name, data, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(sweep_of(head), backend="aot_eager")
    for _ in range(2):
        assert_same(run(head, data[0], data[2], compiled), run(head, data[0], data[2], sweep_of(head)))


@pytest.mark.parametrize("options", [{}, {"easy_margin": True}, {"t_warmup": 100_000}], ids=str)
def test_a_compiled_head_is_eager(options):
    """The sweep itself stays as it is: a graph break, so without fullgraph."""
    data = draw(SMALL, seed=2)
    eager, twin = (make_head("MV-AM-Softmax-a", data, s=4.0, backend="fused", **options) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager")
    for head in (eager, twin):
        head.step.fill_(50_000)
    for _ in range(3):
        expected = run(eager, data[0], data[2])
        torch.testing.assert_close(run(twin, data[0], data[2], compiled), expected, rtol=1e-10, atol=1e-12)
    assert eager.step == twin.step == 50_003


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_compiled_chunks(monkeypatch):
    """What CUDA does: the elementwise work of a chunk goes through inductor. t changes as in a warm-up."""
    data = draw(ODD, seed=2)
    for name, s in itertools.product(["MV-AM-Softmax-a", "MV-AM-Softmax-f"], [32.0, 48.0, 128.0]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for t in (0.0, 0.1, 0.2, 0.3):
            expected = sweep(name, data, s=s, t=t)
            with monkeypatch.context() as patch:
                patch.setattr(chunks, "FEW_LAUNCHES", {"cpu"})
                patch.setattr(chunks, "COMPILED", {"cpu"})
                assert_close(sweep(name, data, s=s, t=t), expected, 1e-12, (name, s, t))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 6, "three functions, each for whole chunks and for the last one, whatever t is"


# ---------------------------------------------------------------- what autograd asks


@every_keep
def test_a_gradient_for_one_side_only(keep):
    data = draw(ODD)
    _, dx, dW = sweep("MV-Arc-Softmax-a", data, how={"keep": keep})
    head = make_head("MV-Arc-Softmax-a", data)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    sweep_of(head, keep=keep)(x, y).backward()
    assert torch.equal(head.weight.grad, dW)
    head.requires_grad_(False)
    sweep_of(head, keep=keep)(x.requires_grad_(), y).backward()
    assert torch.equal(x.grad, dx)


@every_keep
def test_backward_twice_and_no_second_derivative(keep):
    data = draw(ODD)
    head = make_head("MV-AM-Softmax-a", data)
    x, y = torch.tensor(data[0], requires_grad=True), torch.tensor(data[2])
    loss = sweep_of(head, keep=keep)(x, y)
    inputs = (x, head.weight)
    assert_same(
        torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs, retain_graph=True)
    )
    with pytest.raises(NotImplementedError, match=r"no second derivative .*backend='dense'"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(sweep_of(head, keep=keep)(x, y), loss.detach())


def test_losses_are_per_sample():
    """HM and F act on them from outside; so may anyone."""
    data = draw(ODD)
    head = make_head("MV-AM-Softmax-a", data)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    losses = fused_losses(x, head.weight, y, head._rule(), chunk=3)
    expected = torch.nn.functional.cross_entropy(head.logits(x, y), y, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(some[2], head.weight)[0] for some in (losses, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


class Storages(TorchDispatchMode):
    """Elements of every storage that an operation made, forward and backward."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.made = {t.untyped_storage().data_ptr() for t in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.made.append((t.untyped_storage().nbytes(), t))  # held, so that no address comes twice
                self.known.add(t.untyped_storage().data_ptr())
        return out


@every_keep
@pytest.mark.parametrize("name", ["HM-Softmax", "MV-Arc-Softmax-a"])
def test_memory(name, keep):
    """B × K exists only where cosines are kept, then once; K × D only once, as dW."""
    B, K, D, chunk = 16, 5000, 24, 100
    data = draw((B, K, D))
    head = make_head(name, data, torch.float32)
    x, y = torch.tensor(data[0], dtype=torch.float32, requires_grad=True), torch.tensor(data[2])
    with Storages(x, head.weight, y) as storages:
        sweep_of(head, keep=keep, chunk=chunk)(x, y).backward()
    sizes = sorted(size for size, _ in storages.made)
    assert head.weight.grad.untyped_storage().nbytes() == sizes[-1] == 4 * K * D
    assert sizes[-2] <= max(4 * K, 4 * 4 * B * chunk)  # 1/|w|, or the buffers of a sweep
    kept = sum(size for size, t in storages.made if t.shape == (B, chunk) and t.untyped_storage().nbytes() == t.nbytes)
    assert kept == {"none": 0, "float32": 4 * B * K, "float16": 2 * B * K}[keep]

    with Storages(x, head.weight, y) as storages:  # the dense head, to see that the test sees
        run_dense = head(x, y)
        run_dense.backward()
    assert sum(size >= 4 * B * K for size, _ in storages.made) > 5


# ---------------------------------------------------------------- the step of the weight in the backward sweep


@pytest.mark.parametrize("settings", [(0.1, 0.0, 0.0), (0.1, 0.9, 0.0), (0.05, 0.9, 0.01)], ids=str)
@pytest.mark.parametrize("name", ["MV-AM-Softmax-a", "HM-Arc-Softmax", "F-Softmax"])
@both_dtypes
def test_update_in_backward_is_sgd(name, settings, dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 128})  # several chunks
    options = dict(zip(("lr", "momentum", "weight_decay"), settings, strict=True))
    data = draw(ODD)
    head, plain = (make_head(name, data, dtype, backend="fused") for _ in range(2))
    head.update_in_backward(**options)
    sgd = torch.optim.SGD(plain.parameters(), **options)
    for step in range(6):
        x, _, y = draw(ODD, seed=step)
        if step == 4:  # the schedule
            head.sgd.lr = sgd.param_groups[0]["lr"] = 0.01
        loss, dx, dW = run(head, x, y)
        expected = run(plain, x, y)
        sgd.step()
        assert dW is None
        assert_close((loss, dx, head.weight.detach()), (*expected[:2], plain.weight.detach()), 1e-6)
    assert ("momentum" in head.state_dict()) == (options["momentum"] > 0)


@pytest.mark.parametrize("name", ["MV-AM-Softmax-a", "HM-Arc-Softmax"])
def test_update_in_backward_trains_in_training_mode_alone(name):
    data = draw(ODD)
    head = make_head(name, data, backend="fused")
    head.update_in_backward(lr=0.1)
    before = head.weight.detach().clone()
    head.eval()
    _, _, gradient = run(head, data[0], data[2])
    assert gradient is not None and torch.equal(head.weight.detach(), before)


def test_update_in_backward_leaves_no_gradient_in_memory():
    B, K, D = 16, 5000, 24
    data = draw((B, K, D))
    head = make_head("MV-AM-Softmax-a", data, torch.float32, backend="fused", keep="none")
    head.update_in_backward(lr=0.1, momentum=0.9)
    x, y = torch.tensor(data[0], dtype=torch.float32, requires_grad=True), torch.tensor(data[2])
    with pytest.MonkeyPatch.context() as patch, Storages(x, head.weight, head.momentum, y) as storages:
        patch.setattr(module, "CHUNK_BYTES", {"cpu": 4 * B * 100})
        head(x, y).backward()
    assert max(size for size, _ in storages.made) < 4 * K * D / 10
    assert head.weight.grad is None


def test_update_in_backward_survives_a_checkpoint_and_refuses_what_it_cannot():
    data = draw(ODD)
    head, fresh = (make_head("AM-Softmax", data, backend="auto") for _ in range(2))
    for h in (head, fresh):
        h.update_in_backward(lr=0.1, momentum=0.9)
    run(head, data[0], data[2])
    assert "fused" in repr(head)  # auto, for this shape dense, has no choice here
    fresh.load_state_dict(head.state_dict())
    for h in (head, fresh):
        run(h, data[0], data[2])
    assert torch.equal(head.weight, fresh.weight)

    loss = head(torch.tensor(data[0]), torch.tensor(data[2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # of the old weight, which is no more
    with pytest.raises(ValueError, match="backend='dense'"):
        make_head("AM-Softmax", data).update_in_backward(lr=0.1)
    for name in ("lr", "momentum", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got -1"):
            SGD(**{"lr": 0.1, name: -1.0})


# ---------------------------------------------------------------- classes over ranks, errors, "auto"


@every_keep
@pytest.mark.parametrize("name", ["Softmax", "HM-Arc-Softmax", "MV-AM-Softmax-a"])
@both_forms
def test_classes_over_ranks(name, keep, form):
    """Three threads play three ranks with 1, 4 and 5 of the 10 classes."""
    x, W, _ = draw(ODD, seed=4)
    data = (x, W, np.array([0, 0, 2, 9, 5, 4]))
    head = make_head(name, data)
    edges, barrier, parts, results = [0, 1, 5, 10], threading.Barrier(3, timeout=10), {}, {}

    def rank(r):
        def reduce(part, how):
            parts[r] = part
            barrier.wait()
            ranks = torch.stack([parts[i] for i in range(3)])
            barrier.wait()
            return ranks.sum(0) if how == "sum" else ranks.amax(0)

        part = torch.tensor(W[edges[r] : edges[r + 1]], requires_grad=True)
        u = torch.tensor(x, requires_grad=True)
        how = {"keep": keep, "chunk": 2, "reduce": reduce}
        losses = fused_losses(u, part, torch.tensor(data[2]) - edges[r], head._rule(), **how)
        loss = mine(head.loss.g, losses, head.gamma, head.hard_ratio)
        loss.backward()
        results[r] = loss.detach(), u.grad, part.grad

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = library(name, data)
    share = 0.02 if keep == "float16" else 1e-10
    for r in range(3):
        assert_close((*results[r][:2], torch.cat([results[i][2] for i in range(3)])), expected, share)


def test_errors():
    data = draw(ODD)
    with pytest.raises(ValueError, match=r"unknown keep 'half'; known are: none, float32, float16"):
        sweep("Softmax", data, how={"keep": "half"})
    for call in (
        lambda: sweep("Softmax", data, how={"products": "half"}),
        lambda: make_head("Softmax", data, products="half"),
    ):
        with pytest.raises(ValueError, match=r"unknown products 'half'; known are: float32, bfloat16"):
            call()
    for label in (-1, 10):
        with pytest.raises(ValueError, match=r"labels must be in 0 … 9"):
            sweep("Softmax", (*data[:2], np.full(6, label)))


def test_pick(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 2**30)
    weight = lambda classes: torch.empty(classes, 1)
    assert pick_by_memory(128, weight(2048)) == ("dense", "float32")
    assert pick_by_memory(128, weight(86_876)) == ("fused", "float32")
    assert pick_by_memory(512, weight(86_876)) == ("fused", "none")  # 170 MiB of the 128 that are an eighth
    monkeypatch.setattr(module, "free_memory", lambda device: 2**40)
    assert pick_by_memory(512, weight(86_876)) == ("fused", "float32")
    assert pick_by_memory(128, weight(1_000_000)) == ("fused", "none")


def test_auto_says_what_it_picked(monkeypatch):
    head = MarginHead("AM-Softmax", 4, 1000)
    x, y = torch.randn(8, 4), torch.arange(8)
    assert repr(head).endswith("backend=auto)")
    head(x, y)
    assert repr(head).endswith("backend=auto (last: dense))")
    monkeypatch.setattr(module, "DENSE_BYTES", {"cpu": 2**10})
    monkeypatch.setattr(module, "free_memory", lambda device: 2**30)
    head = MarginHead("AM-Softmax", 4, 1000)
    head(x, y)
    assert repr(head).endswith("backend=auto (last: fused, keep=float32))")
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    head(x, y)
    assert head.picked == "fused, keep=float32", "what is free is asked once for a shape"
    head(x[:7], y[:7])
    assert head.picked == "fused, keep=none"
    head.keep = "float16"
    head(x, y)
    assert head.picked == "fused, keep=float16"


def test_nobody_asks_for_the_free_memory_where_nothing_hangs_on_it(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: pytest.fail("asked"))
    x, y = torch.randn(8, 4), torch.arange(8)
    for backend, keep in [("dense", None), ("fused", "none"), ("fused", "float16"), ("auto", None)]:
        MarginHead("AM-Softmax", 4, 1000, backend=backend, keep=keep)(x, y)
    assert pick_by_memory(1000, torch.empty(1_000_000, 1)) == ("fused", "none")


@pytest.mark.parametrize(
    "form",
    [lambda cos, t: cos + t * (cos + 1) ** 2, lambda cos, t: -t * cos, lambda cos, t: t + 0 * cos],
    ids=["square", "falling", "flat"],
)
def test_an_emphasis_that_is_no_rising_line_is_refused(monkeypatch, form):
    monkeypatch.setattr(chunks, "emphasise", lambda h, cos, t: form(cos, t))
    head = make_head("MV-AM-Softmax-a", draw(ODD))
    x, _, y = (torch.tensor(part) for part in draw(ODD))
    with pytest.raises(NotImplementedError, match=r"h='adaptive' is no rising line .* backend='dense'"):
        fused_losses(x, head.weight, y, head._rule())


def test_auto_is_dense_for_the_shapes_of_the_profiles():
    """Their committed results are the dense head's, bit for bit."""
    for batch, classes in [(40, 20), (64, 10), (64, 1723), (128, 2000)]:
        assert pick_by_memory(batch, torch.empty(classes, 1))[0] == "dense"


@pytest.mark.parametrize("name", ["Softmax", "HM-AM-Softmax", "F-Arc-Softmax", "A-Softmax", "MV-AM-Softmax-f"])
@pytest.mark.parametrize(
    "how",
    [
        {"backend": "dense"},
        *({"backend": "fused", "keep": keep} for keep in KEEP),
        {"backend": "fused", "keep": "none", "products": "bfloat16"},
    ],
    ids=str,
)
def test_no_step_reads_from_the_device(name, how, monkeypatch):
    """A tensor on the device "meta" has no values: whatever asks for one raises, as it would wait on a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no such device
    head = MarginHead(name, 8, 5000, t_warmup=10, annealing=True, check=False, **how).to("meta")
    head.step.fill_(5)  # the count of steps stays where it can be read
    monkeypatch.setattr(chunks, "FEW_LAUNCHES", {"meta"} if how.get("keep") == "float16" else set())  # both forms
    if how["backend"] == "fused":
        head.update_in_backward(lr=0.1, momentum=0.9)
    x, y = torch.empty(6, 8, device="meta", requires_grad=True), torch.randint(0, 5000, (6,))
    loss = head(x, y)
    loss.backward()
    assert loss.device.type == x.grad.device.type == "meta" and head.step.device.type == "cpu" and head.step == 6


def test_free_memory():
    free = module.free_memory(torch.device("cpu"))
    assert isinstance(free, int) and 0 <= free < 2**50


def test_a_functional_weight():
    """fused_losses takes any tensor: a view, or a weight that is itself computed."""
    data = draw(ODD)
    head = make_head("MV-AM-Softmax-a", data)
    x, y = torch.tensor(data[0]), torch.tensor(data[2])
    wide = torch.cat([head.weight.detach(), torch.ones(10, 2)], 1).requires_grad_()
    loss = fused_losses(x, wide[:, :4] * 2, y, head._rule(), chunk=3).mean()
    loss.backward()
    expected = functional_call(head, {"weight": head.weight}, (x, y))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(wide.grad[:, :4], head.weight.grad)
    assert not wide.grad[:, 4:].any()
