"""Products with a weight held in bf16, against float64: errors within what rounding to bf16 must cost."""

import pytest
import torch
from torch import Tensor

from lora_nlu.ops import frozen, kernels
from lora_nlu.ops.frozen import FrozenWeight, plain

ROWS, I, O, R = 37, 64, 48, 4  # noqa: E741
EPS = 2.0**-8  # rounding to bf16, which has 8 bits, changes a number by at most this, relatively
SUM = 2.0**-22 * 64  # fp32 sums of 64 products, far below


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["packed", "plain", "without kernels"])
def way(request, monkeypatch) -> str:
    """How products are computed: packed by oneDNN, on a processor without AVX-512, without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr(frozen, "has_bf16_products", lambda: False)
    if request.param == "without kernels":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


def magnitude(x: Tensor, w: Tensor) -> Tensor:
    """The sum of the absolute products of x W^T: what relative errors of the factors are multiplied by."""
    return x.double().abs() @ w.double().abs().t()


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    excess = (got.detach().double() - exact).abs() - bound
    assert excess.max() <= 0, f"{excess.max():.2e} above the bound"
    assert ((got.detach().double() - exact).abs() > 0).any()  # it is rounded at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [False, True])
def test_a_product_and_its_gradients_are_within_the_rounding_of_their_factors(way, dtype, grid):
    w, bias, g = noise(O, I, seed=1), noise(O, seed=2).requires_grad_(), noise(ROWS, O, seed=3).bfloat16()
    x = noise(ROWS, I, seed=4).to(dtype).requires_grad_()
    held = FrozenWeight(w)
    assert held.weight.is_mkldnn == (way != "plain" and frozen.has_bf16_products())
    assert torch.equal(plain(held.weight), w.bfloat16()) and held.transposed is None
    y = held.product(x[None] if grid else x, bias)
    assert y.dtype is torch.bfloat16 and y.shape == ((1,) * grid + (ROWS, O))
    y.backward(g[None] if grid else g)
    X, W, G = x.detach().double(), w.double(), g.double()
    exact = X @ W.t() + bias.detach().double()
    # Two rounded factors (half of EPS each: in a sum of many terms not all are rounded the farthest), then the result,
    # once or, where the bias is added after it, twice.
    assert_within(y.reshape(ROWS, O), exact, (EPS + SUM) * magnitude(X, W) + EPS * (exact.abs() + bias.abs().double()))
    assert x.grad.dtype is dtype and bias.grad.dtype is torch.float32
    assert_within(
        x.grad,
        G @ W,
        (EPS / 2 + SUM) * magnitude(G, W.t()) + EPS / 2 * 1.01 * (G @ W).abs() + EPS / 2 * magnitude(G, W.t()) * EPS,
    )
    torch.testing.assert_close(bias.grad.double(), G.sum(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_x", [True, False])
def test_an_update_and_its_gradients_are_within_the_rounding_of_what_is_in_bf16(way, dtype, needs_x):
    w, g, s = noise(O, I, seed=1), noise(ROWS, O, seed=3).bfloat16(), 2.0
    A, B = noise(R, I, seed=5).requires_grad_(), noise(O, R, seed=6).requires_grad_()
    x = noise(ROWS, I, seed=4).to(dtype).requires_grad_(needs_x)
    y = FrozenWeight(w).product_with_update(x, None, A, B, s)
    y.backward(g)
    X, W, G, a, b = x.detach().double(), w.double(), g.double(), A.detach().double(), B.detach().double()
    update = s * (X @ a.t()) @ b.t()
    exact = X @ W.t() + update
    rounded = EPS * 1.01 * (magnitude(X, W) + (X @ W.t()).abs() + exact.abs())  # the product is rounded, then the sum
    update_bound = (EPS * (dtype is torch.float32) + SUM) * magnitude(X, a)  # the update reads x in bf16, too
    assert_within(y, exact, rounded + s * update_bound @ b.abs().t())
    up, down = s * G @ b, s * X @ a.t()
    grad = G @ W + up @ a
    if needs_x:
        bound = EPS * 1.01 * (magnitude(G, W.t()) + grad.abs()) + SUM * up.abs() @ a.abs()
        assert x.grad.dtype is dtype
        assert_within(x.grad, grad, bound)
    # x is kept in bf16 for the gradient of A; the gradient of B reads x A^T of it and g as it is.
    assert_within(A.grad, up.t() @ X, (EPS / 2 + SUM) * up.abs().t() @ X.abs() + 1e-9)
    assert_within(B.grad, G.t() @ down, G.abs().t() @ (SUM * s * magnitude(X, a) + s * update_bound) + 1e-9)


def test_query_key_and_value_share_one_rounding_of_the_rows_they_read():
    x = noise(5, I, seed=1)
    once = frozen.rounded(x)
    assert frozen.rounded(x) is once and torch.equal(once, x.bfloat16())
    x += 1
    assert torch.equal(frozen.rounded(x), x.bfloat16())
    assert frozen.rounded(once) is once


def test_the_same_seed_gives_the_same_bits_and_no_rows_are_no_error(way):
    held, x = FrozenWeight(noise(O, I, seed=1)), noise(ROWS, I, seed=2)
    A, B = noise(R, I, seed=5), noise(O, R, seed=6)
    assert torch.equal(*(held.product_with_update(x, None, A, B, 0.5) for _ in range(2)))
    assert held.product(x[:0], None).shape == (0, O)
    assert held.product_with_update(x[:0], None, A, B, 0.5).shape == (0, O)


def test_a_gradient_of_gradients_is_refused_by_torch():
    x = noise(3, I, seed=2).requires_grad_()
    y = FrozenWeight(noise(O, I, seed=1)).product(x, None)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-40])
def test_the_kernels_round_to_bf16_as_torch_does(value):
    if kernels.library() is None:
        pytest.skip("needs the compiled kernels")
    x = torch.cat([torch.tensor([value]), noise(4095, seed=1)]).view(64, 64)
    x.view(torch.int32)[1, 0] = 0x7FFFFFFF  # a NaN that rounding by addition would turn into -0
    got = kernels.add_dropout(x.bfloat16(), torch.zeros(64, 64), 0.0, True)
    assert torch.equal(got.nan_to_num(7), x.bfloat16().float().nan_to_num(7))
    back = kernels._Dropout.run(x, 0.0, 0, torch.bfloat16)
    assert torch.equal(back.nan_to_num(7), x.bfloat16().nan_to_num(7))
    assert torch.equal(back.isnan(), x.isnan())


def test_dropout_and_residual_in_one_pass_are_what_both_are_one_after_the_other():
    if kernels.library() is None:
        pytest.skip("needs the compiled kernels")
    x, residual = noise(9, 40, seed=1).bfloat16().requires_grad_(), noise(9, 40, seed=2).requires_grad_()
    torch.manual_seed(3)
    y = kernels.add_dropout(x, residual, 0.3, True)
    torch.manual_seed(3)
    kept = kernels.dropout(torch.ones(9, 40), 0.3, True)
    assert y.dtype is torch.float32 and 0 < (kept == 0).sum() < kept.numel()
    torch.testing.assert_close(y, residual + kept * x.float(), rtol=1e-6, atol=1e-6)
    grad = noise(9, 40, seed=4)
    y.backward(grad)
    assert torch.equal(residual.grad, grad) and torch.equal(x.grad, (grad * kept).bfloat16())


@torch.inference_mode()
def test_in_inference_mode_a_product_is_the_same():
    held, x = FrozenWeight(noise(O, I, seed=1)), noise(ROWS, I, seed=2)
    assert x.is_inference()
    with torch.inference_mode(False):
        expected = held.product(x.clone(), None)
    for _ in range(2):
        assert torch.equal(held.product(x, None), expected)
    x.neg_()
    assert torch.equal(held.product(x, None), -expected)
