"""The compiled kernels on bf16 tensors, against float64, by each kind of instruction that this processor has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_nlu.ops import compiling, kernels

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels: g++ on Linux makes them")

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = CPUINFO.read_text() if CPUINFO.exists() else ""
WAYS: dict[str, list[str]] = {"as compiled here": []}
if "amx_bf16" in CPU_FLAGS:
    WAYS["without matrix registers"] = ["-mno-amx-bf16"]
if "avx512_bf16" in CPU_FLAGS:
    WAYS["without products of bf16"] = ["-mno-amx-bf16", "-mno-avx512bf16"]

ROUNDING = 2.0**-8  # bf16 has 8 bits: to the nearest of them, a number changes by at most this, relatively
SUM = 2.0**-22 * 64  # fp32 sums of a few hundred products: far below it
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 49, 97]  # sorted; around the sizes of tiles and beyond


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[*WAYS])
def way(request) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "FLAGS", compiling.FLAGS + WAYS[request.param])
        library = kernels.library.__wrapped__()
        assert library is not None
        patch.setattr(kernels, "library", lambda: library)
        yield request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_within(got: Tensor, exact: Tensor, bound: Tensor) -> None:
    excess = (got.double() - exact).abs() - bound
    assert excess.max() <= 0, f"{excess.max():.2e} above the bound"
    assert ((got.double() - exact).abs() > 0).any()  # it is rounded at all


class Attention:
    """Inputs of one attention in bf16, its results by the kernel, and the exact ones, each with its bound."""

    def __init__(self, heads: int, size: int, tables: str, p: float, first_only: bool) -> None:
        lengths, width = LENGTHS, heads * size
        self.heads, self.p, self.longest, self.scale, self.seed = heads, p, max(lengths), 0.7 / size**0.5, 12345
        self.k_starts = torch.tensor([0, *lengths]).cumsum(0)
        self.q_starts = torch.arange(len(lengths) + 1) if first_only else self.k_starts
        self.view_of = torch.arange(len(lengths)) % (2 if tables else 1)
        queries, keys = int(self.q_starts[-1]), int(self.k_starts[-1])
        self.inputs = [noise(n, width, seed=i).bfloat16() for i, n in enumerate((queries, keys, keys))]
        self.grad = noise(queries, width, seed=3).bfloat16()
        table = [noise(2, 2 * self.longest - 1, width, seed=i).bfloat16() for i in (4, 5)]
        self.tables = tuple(
            x if name in tables.split() else None for x, name in zip(table, ("key", "query"), strict=True)
        )

    def results(self) -> list[Tensor]:
        """Output, gradients of query, key and value."""
        inputs = [x.clone().requires_grad_() for x in self.inputs]
        starts = (self.q_starts, self.k_starts, self.view_of)
        settings = (self.longest, self.heads, self.scale, self.p, self.seed)
        out = kernels._Attention.apply(*inputs, self.tables, starts, *settings)
        return [out.detach(), *torch.autograd.grad(out, inputs, self.grad)]

    def exact(self) -> list[tuple[Tensor, Tensor]]:
        """Each result in float64, and what rounding to bf16 may change of it.

        Products sum in fp32 what they read in bf16. Rounded are the probabilities, for `out` and the gradient of value,
        the gradients of scores, for those of query and key, and each result.
        """
        split = [x.double().unflatten(1, (self.heads, -1)).transpose(0, 1) for x in (*self.inputs, self.grad)]
        ones = torch.ones(len(self.grad) * self.heads, self.longest)
        kept = kernels._Dropout.run(ones, self.p, self.seed).double().view(-1, self.heads, self.longest)
        parts = [self._sequence(split, kept, i) for i in range(len(LENGTHS))]
        results = []
        for pairs in zip(*parts, strict=True):
            exact, bound = (torch.cat(x, 1).transpose(0, 1).flatten(1) for x in zip(*pairs, strict=True))
            results.append((exact, 1.01 * bound + ROUNDING * exact.abs() + 1e-30))
        return results

    def _sequence(self, split: list[Tensor], kept: Tensor, i: int) -> list[tuple[Tensor, Tensor]]:
        rows, columns = (slice(*x[i : i + 2].tolist()) for x in (self.q_starts, self.k_starts))
        q, k, v, g = (x[:, part] for x, part in zip(split, (rows, columns, columns, rows), strict=True))
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])  # i - j
        none = torch.zeros(self.heads, *distance.shape, q.shape[2], dtype=torch.float64)
        relative_key, relative_query = (
            none if x is None else x[self.view_of[i]].double().unflatten(1, (self.heads, -1))[at].permute(2, 0, 1, 3)
            for x, at in zip(self.tables, (self.longest - 1 - distance, self.longest - 1 + distance), strict=True)
        )  # [A, M, L, D]
        k_of, q_of = k[:, None] + relative_key, q[:, :, None] + relative_query  # what a score's gradient is passed to
        k_size, q_size = k.abs()[:, None] + relative_key.abs(), q.abs()[:, :, None] + relative_query.abs()
        scores = (q[:, :, None] * k_of).sum(3) + (k[:, None] * relative_query).sum(3)
        p = (self.scale * scores).softmax(2)
        # an error of a score changes its probability, and all of its row, by that share
        error = (
            SUM
            * self.scale
            * ((q.abs()[:, :, None] * k_size).sum(3) + (k.abs()[:, None] * relative_query.abs()).sum(3))
        )
        share = SUM + error + error.amax(2, keepdim=True)
        keeps = kept[rows, :, : k.shape[1]].transpose(0, 1)
        dropped, dp = p * keeps, keeps * (g @ v.transpose(1, 2))
        ds = p * (dp - (p * dp).sum(2, keepdim=True))
        size_dp = keeps * (g.abs() @ v.abs().transpose(1, 2))
        off_ds = ROUNDING * ds.abs() + (SUM + share) * p * (size_dp + (p * size_dp).sum(2, keepdim=True))
        off_p = (ROUNDING + share) * dropped
        s = self.scale
        return [
            (dropped @ v, off_p @ v.abs()),
            (s * (ds[..., None] * k_of).sum(2), s * ((off_ds + SUM * ds.abs())[..., None] * k_size).sum(2)),
            (s * (ds[..., None] * q_of).sum(1), s * ((off_ds + SUM * ds.abs())[..., None] * q_size).sum(1)),
            (dropped.transpose(1, 2) @ g, off_p.transpose(1, 2) @ g.abs()),
        ]


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("tables", ["", "key", "query", "key query"])
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 20), (1, 7)])
def test_attention_and_its_gradients_are_within_what_rounding_probabilities_costs(
    way, heads, size, tables, p, first_only
):
    attention = Attention(heads, size, tables, p, first_only)
    for got, (exact, bound) in zip(attention.results(), attention.exact(), strict=True):
        assert got.dtype is torch.bfloat16
        assert_within(got, exact, bound)


@pytest.mark.parametrize("tables", ["", "key query"])
def test_attention_has_the_same_bits_again_and_on_any_number_of_threads(way, set_threads, tables):
    attention, results = Attention(2, 64, tables, 0.1, False), []
    for threads in (1, 1, 3):
        set_threads(threads)
        results.append(attention.results())
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_table_in_fp32_is_rounded_to_bf16_and_one_in_bf16_is_read_by_second_derivatives_too():
    attention = Attention(1, 16, "key query", 0.0, False)
    results = attention.results()
    attention.tables = tuple(x.float() for x in attention.tables)
    assert all(torch.equal(x, y) for x, y in zip(results, attention.results(), strict=True))
    inputs = [x.clone().requires_grad_() for x in attention.inputs]
    starts = (attention.q_starts, attention.k_starts, attention.view_of)
    settings = (attention.longest, 1, attention.scale, 0.0, 0)
    out = kernels._Attention.apply(*inputs, attention.tables, starts, *settings)
    grads = torch.autograd.grad(out, inputs, attention.grad, create_graph=True)
    for grad, result in zip(grads, results[1:], strict=True):
        torch.testing.assert_close(grad, result, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("rows", "size", "out", "rank"), [(1, 32, 16, 1), (70, 64, 48, 8), (33, 50, 144, 16), (300, 90, 32, 40)]
)
@pytest.mark.parametrize("dtypes", [("half", "half"), ("half", "float"), ("float", "float")])
def test_a_low_rank_update_of_bf16_and_its_gradient_lose_nothing_but_the_rounding_of_the_sum(
    way, set_threads, rows, size, out, rank, dtypes
):
    of, to = (torch.bfloat16 if name == "half" else torch.float32 for name in dtypes)
    x, y = noise(rows, size, seed=1).bfloat16(), noise(rows, out, seed=2).to(of)
    down, up, s = noise(rank, size, seed=3).t(), noise(rank, out, seed=4), -0.7
    results = []
    for threads in (1, 3):
        set_threads(threads)
        z, u = kernels.add_update(y, x, down, up, s, torch.empty(rows, out, dtype=to))
        results.append((z, u, kernels.low_rank_gradient(u, x, s)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    X, a, b = x.double(), down.double(), up.double()
    exact, SPLIT = X @ a, 2.0**-16 + 2.0**-20  # a number in fp32 is read as the sum of two bf16, sums are fp32
    assert_within(u, exact, SPLIT * X.abs() @ a.abs())
    sum_ = y.double() + s * exact @ b
    bound = 4 * SPLIT * abs(s) * (X.abs() @ a.abs()) @ b.abs() + 1e-6 * sum_.abs()  # that of u, of both, their product
    assert_within(z, sum_, bound + (ROUNDING * 1.01 * sum_.abs() if to is torch.bfloat16 else 0))
    assert_within(results[0][2], s * u.double().t() @ X, 2 * SPLIT * abs(s) * u.double().abs().t() @ X.abs())


def test_gelu_of_every_bf16_is_the_nearest_to_that_in_float64_and_its_gradient_within_two_roundings(way):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].view(1, -1).requires_grad_()
    y, grad = kernels.GELU()(x), noise(*x.shape, seed=1).bfloat16()
    y.backward(grad)
    exact = x.detach().double().requires_grad_()
    below = torch.special.erfc(-exact / 2**0.5) / 2  # F.gelu loses the digits of its tail, as 1 + erf
    want = exact * below
    (slope,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(y.detach(), want.detach().float().bfloat16(), rtol=0, atol=1e-38)
    assert_within(x.grad, grad.double() * slope, 1.001 * ROUNDING * (grad.double() * slope).abs() + 1e-37)


def test_gelu_keeps_nan_and_infinity_and_has_torchs_second_derivatives():
    x = torch.tensor([float("nan"), -float("inf"), float("inf")]).bfloat16()
    y = kernels.GELU()(x)
    assert y.isnan().tolist() == [True, True, False] and y[2] == x[2]
    x = noise(40, seed=1).bfloat16().requires_grad_()
    twice = []
    for f in (kernels.GELU(), torch.nn.functional.gelu):
        (grad,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        twice += torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(*twice, rtol=0.02, atol=0.02)
    y = kernels.GELU()(x.float())
    assert torch.equal(y, torch.nn.functional.gelu(x.float()))
