"""The CPU kernels: each against the same thing in float64, its dropout against the law it should follow, its fallback.

What is random is seeded, so that a statistical bound of 5 standard errors either always holds or never.
"""

import copy
import errno
import logging
import sys
from functools import partial
from typing import Any

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.ops import kernels
from lora_nlu.ops.packing import PackedBatch

needs_library = pytest.mark.skipif(kernels.library() is None, reason="no compiled kernels: g++ on Linux makes them")

LENGTHS = [17, 1, 130, 2, 48, 15, 49, 16]  # around the SIMD widths, the kernels' 48 rows at a time, and beyond


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outcome(f: Any, *inputs: Tensor | None, grad: Tensor | None = None) -> list[Tensor]:
    """f's result and the gradient of each input that is not None, where the result's is `grad`, random by default."""
    leaves = [None if x is None else nn.Parameter(x.detach()) for x in inputs]
    y = f(*leaves)
    y.backward(noise(*y.shape, seed=99).to(y.dtype) if grad is None else grad)
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


def assert_same_outcome(
    f: Any, exact: Any, *inputs: Tensor | None, tolerance: float = 1e-5, grad: Tensor | None = None
) -> None:
    """f in fp32 and `exact` in float64 have the same result and gradients."""
    got = outcome(f, *inputs, grad=grad)
    doubles = [None if x is None else x.double() for x in inputs]
    want = outcome(exact, *doubles, grad=None if grad is None else grad.double())
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, tolerance, what=f"gradient {i}" if i else "result")


class Noted:
    """The compiled library, noting which of its functions were looked up."""

    def __init__(self, library: Any) -> None:
        self.library, self.names = library, set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.library, name)


@pytest.fixture
def called(monkeypatch) -> set[str]:
    """Names of the compiled functions that this test used."""
    noted = Noted(kernels.library())
    monkeypatch.setattr(kernels, "library", lambda: noted)
    return noted.names


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(f: Any, *args: Any, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return f(*args)


def factors(rows: int, columns: int, p: float, seed: int = 5) -> Tensor:
    """What each element is multiplied by in a [rows, columns] dropout that starts after `torch.manual_seed(seed)`."""
    ones = torch.ones(rows, columns)
    return kernels._Dropout.run(ones, p, seeded(kernels.draw_seed, seed=seed)) if p else ones


# Dense products.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "out"),
    [((1, 1), 1), ((1, 64), 48), ((7, 5), 3), ((33, 17), 65), ((2, 5, 12), 10), ((2, 3, 4, 16), 8), ((129, 768), 96)]
    + [((20,), 6), ((64, 1), 5), ((9, 5), 1)],
)
def test_a_linear_layer_and_its_gradients_are_those_of_torch_in_float64(shape, out, bias):
    inputs = noise(*shape), noise(out, shape[-1], seed=1), noise(out, seed=2) if bias else None

    def layer(x, weight, bias):
        module = kernels.Linear(shape[-1], out, bias=bias is not None)
        module.weight, module.bias = weight, bias
        return module(x)

    assert_same_outcome(layer, F.linear, *inputs)
    assert_same_outcome(kernels.linear, F.linear, *inputs)


@pytest.mark.parametrize("views", ["transposed", "columns of more", "rows of more", "one row expanded"])
@pytest.mark.parametrize("what", ["x", "weight", "both"])
def test_a_linear_layer_takes_views_of_any_layout(what, views):
    def view(x: Tensor) -> Tensor:
        if views == "transposed":
            return x.t().contiguous().t()
        if views == "one row expanded":
            return x[:1].expand_as(x)
        rows, columns = x.shape
        return torch.cat([x, x])[::2][:rows] if views == "rows of more" else torch.cat([x, x], 1)[:, :columns]

    x, weight = noise(21, 18), noise(13, 18, seed=1)
    x, weight = x if what == "weight" else view(x), weight if what == "x" else view(weight)
    # as intermediate results: a parameter is a leaf, and keeps its layout, but nothing says that it may have one
    want = F.linear(x.double(), weight.double())
    assert_close(kernels.product(x, weight).double(), want)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = kernels.linear(x, weight, None)
    grad = noise(*y.shape, seed=3)
    got = torch.autograd.grad(y, (x, weight), grad)
    assert_close(y.detach().double(), want)
    assert_close(got[0].double(), grad.double() @ weight.detach().double())
    assert_close(got[1].double(), grad.double().t() @ x.detach().double())


@pytest.mark.parametrize("trains", [True, False])
def test_a_linear_layer_keeps_its_input_only_where_the_weight_trains(trains):
    x, weight = noise(4, 6).requires_grad_(), noise(5, 6).requires_grad_(trains)
    kept, _ = kernels.linear(x, weight, noise(5).requires_grad_()).grad_fn.saved_tensors
    assert (kept is not None) == trains


def test_gradients_that_nobody_needs_are_not_computed():
    x, weight, bias = noise(4, 6), noise(5, 6), noise(5).requires_grad_()
    y = kernels.linear(x, weight, bias)
    y.sum().backward()
    assert bias.grad.tolist() == [4.0] * 5
    assert x.grad is None and weight.grad is None
    assert not kernels.linear(x, weight, bias.detach()).requires_grad


@pytest.mark.parametrize("layer", [kernels.Linear(16, 32), LoRALinear(16, 32, 4, 8), LoRALinear(10, 7, 4, 8)])
def test_a_layer_takes_no_rows_as_torchs_does(layer):
    x = torch.empty(0, 3, layer.in_features, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 3, layer.out_features) and x.grad.shape == x.shape


# The low-rank update.


def textbook_lora(x, weight, bias, A, B):
    y = x @ weight.T + 2.0 * (x @ A.T) @ B.T
    return y if bias is None else y + bias


def lora_layer(x, weight, bias, A, B):
    sizes, rank = (weight.shape[1], weight.shape[0]), A.shape[0]
    layer = LoRALinear(*sizes, r=rank, lora_alpha=2.0 * rank, bias=bias is not None)
    parameters = {"weight": weight, "lora_A": A, "lora_B": B} | ({} if bias is None else {"bias": bias})
    return functional_call(layer, parameters, (x,))


def lora_inputs(shape, out, rank, bias=True) -> list[Tensor | None]:
    size = shape[-1]
    return [noise(*shape), noise(out, size, seed=1), noise(out, seed=2) if bias else None] + [
        noise(rank, size, seed=3),
        noise(out, rank, seed=4),
    ]


@pytest.mark.parametrize("rank", [1, 8, 17, 64])
@pytest.mark.parametrize("rows", [1, 5, 24, 75])
@pytest.mark.parametrize(
    ("size", "out"),
    [(16, 16), (32, 80), (112, 48), (128, 16), (20, 10), (33, 5), (32, 20), (20, 32), (7, 64), (1, 1), (48, 1)],
)
def test_an_updated_layer_and_its_gradients_are_those_of_the_textbook_in_float64(size, out, rows, rank):
    assert_same_outcome(lora_layer, textbook_lora, *lora_inputs((rows, size), out, rank))


@pytest.mark.parametrize("out", [48, 50])
@pytest.mark.parametrize("shape", [(2, 5, 64), (64,), (2, 3, 4, 64)])
def test_an_updated_layer_takes_input_of_any_rank_with_or_without_bias(shape, out):
    assert_same_outcome(lora_layer, textbook_lora, *lora_inputs(shape, out, 8, bias=False))
    assert_same_outcome(lora_layer, textbook_lora, *lora_inputs(shape, out, 8, bias=True))


@needs_library
@pytest.mark.parametrize(("size", "out"), [(64, 48), (64, 50), (50, 64), (50, 50)])
def test_the_update_is_added_by_the_kernel_where_the_sizes_fit_and_else_folded_into_the_weight(called, size, out):
    inputs = [None if x is None else nn.Parameter(x) for x in lora_inputs((6, size), out, 8)]
    y = lora_layer(*inputs)
    assert ("add_low_rank" in called) == (out % 16 == 0)
    called.clear()
    y.sum().backward()
    assert ("add_low_rank" in called) == (size % 16 == 0)


# Dropout.


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two equally large sets of booleans, Pearson's."""
    p, q, both = (torch.count_nonzero(x).item() / x.numel() for x in (a, b, a & b))
    return (both - p * q) / (p * (1 - p) * q * (1 - q)) ** 0.5


def assert_independent(a: Tensor, b: Tensor, what: str) -> None:
    """The correlation is within 5 standard errors, 1 / sqrt n each, of 0."""
    assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5, what


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9, 1e-3])
def test_dropout_drops_the_requested_share_and_scales_the_rest_to_keep_the_mean(p):
    y = factors(4096, 1024, p)
    kept = y[y != 0]
    n = y.numel()
    assert abs((n - len(kept)) / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-5
    assert kept.min() == kept.max()
    share = 1 - round(p * 65536) / 65536  # what the 16 bits of an element make of 1 - p
    assert abs(share - (1 - p)) < 1e-5
    assert kept[0].item() * share == pytest.approx(1, abs=2e-7)  # fp32
    x = noise(100, 30)
    assert_close(seeded(kernels.dropout, x, p, True), x * factors(100, 30, p), 1e-7)


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 49, 1023])
def test_every_column_of_any_width_is_dropped_as_often(width, p):
    rows = 2**20 // width
    shares = (factors(rows, width, p) == 0).double().mean(0)
    assert shares.shape == (width,)
    assert (shares - p).abs().max() < 5 * (p * (1 - p) / rows) ** 0.5 + 1e-5


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("width", [1024, 1021])
def test_dropout_of_an_element_is_independent_of_its_neighbours(width, p):
    kept = factors(2048, width, p) != 0
    for lag in range(1, 9):
        assert_independent(kept[:, lag:], kept[:, :-lag], f"columns {lag} apart")
        assert_independent(kept[lag:], kept[:-lag], f"rows {lag} apart")
        assert_independent(kept[lag:, lag:], kept[:-lag, :-lag], f"{lag} down and right")
        assert_independent(kept[lag:, :-lag], kept[:-lag, lag:], f"{lag} down and left")
        for lane in range(4):  # four elements are drawn together
            a, b = kept[:, lane : width - lag : 4], kept[:, lane + lag :: 4]
            assert_independent(a, b, f"columns {lag} apart, from every fourth, the {lane}th on")
    flat = kept.flatten()
    for lag in (width - 1, width, width + 1, 4 * width):  # the order in memory, across the ends of rows
        assert_independent(flat[lag:], flat[:-lag], f"{lag} apart in memory")


@needs_library
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_dropout_of_narrow_rows_is_independent_too(width):
    kept = factors(2**20 // width, width, 0.3) != 0
    for lag in range(1, 9):
        assert_independent(kept[lag:], kept[:-lag], f"rows {lag} apart")
        assert_independent(kept.flatten()[lag:], kept.flatten()[:-lag], f"{lag} apart in memory")


@needs_library
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_one_call_is_independent_of_the_next(p):
    x = torch.ones(4096, 1024)
    first, second = seeded(kernels.dropout, x, p, True) != 0, kernels.dropout(x, p, True) != 0
    assert_independent(first, second, "two calls")
    for lag in range(1, 9):
        assert_independent(first[:, lag:], second[:, :-lag], f"two calls, columns {lag} apart")
        assert_independent(first[lag:], second[:-lag], f"two calls, rows {lag} apart")


@needs_library
@pytest.mark.parametrize("step", [1, 2, 4, 2**16, 2**32, 2**62])
def test_dropout_of_a_seed_is_independent_of_that_of_a_near_seed(step):
    x, p, seed = torch.ones(4096, 1024), 0.3, 12345
    a, b = (kernels._Dropout.run(x, p, s) != 0 for s in (seed, seed + step))
    assert_independent(a, b, f"seeds {step} apart")
    for lag in range(1, 9):
        assert_independent(a[:, lag:], b[:, :-lag], f"seeds {step} apart, columns {lag} apart")
        assert_independent(a[:, :-lag], b[:, lag:], f"seeds {step} apart, columns -{lag} apart")


@needs_library
def test_the_draws_are_those_published_for_splitmix64():
    # the first outputs for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64"), 16 bits a column
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    bits = torch.tensor([word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)])
    for p in torch.arange(1, 64).div(64).tolist():
        assert torch.equal(kernels._Dropout.run(torch.ones(1, 20), p, 1234567)[0] != 0, bits >= p * 65536)
    one = 65536 / 65535  # the smallest p there is
    y = kernels._Dropout.run(torch.ones(5, 4), 1 / 65536, 1234567)
    assert y.flatten().tolist() == pytest.approx([0 if b < 1 else one for b in bits.tolist()])


@needs_library
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 8)])
def test_dropout_repeats_with_the_seed_and_draws_the_same_backward_as_forward(shape):
    x = torch.ones(*shape)
    assert torch.equal(seeded(kernels.dropout, x, 0.5, True), seeded(kernels.dropout, x, 0.5, True))
    draws = [seeded(kernels.dropout, x, 0.5, True, seed=seed) for seed in range(20)]
    assert len({tuple(y.flatten().tolist()) for y in draws}) > 10
    x.requires_grad_()
    y = seeded(kernels.Dropout(0.5), x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and y.shape == shape
    grad = noise(*shape)
    (again,) = torch.autograd.grad(seeded(kernels.Dropout(0.5), x), x, grad)
    assert torch.equal(again, grad * y)


@needs_library
def test_dropout_takes_views_and_leaves_them_as_they_were():
    x = noise(9, 14)
    for view in (x.t(), x[:, 1:8], x[::2], x[:1].expand(9, 14), x.view(9, 7, 2).transpose(0, 1)):
        before = view.clone()
        y = seeded(kernels.dropout, view, 0.4, True)
        assert torch.equal(y, seeded(kernels.dropout, view.contiguous(), 0.4, True))
        assert torch.equal(view, before) and not torch.equal(y, before)


def test_dropout_is_the_input_itself_in_evaluation_and_without_p():
    x = noise(3, 4)
    state = torch.get_rng_state()
    assert kernels.Dropout(0.5).eval()(x) is x
    assert kernels.Dropout(0.0)(x) is x
    assert kernels.dropout(x, 0.5, False) is x
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"


@pytest.mark.parametrize("p", [1.0, 1 - 1e-6])
def test_dropout_of_everything_gives_zeros_and_no_gradient(p):
    x = noise(30, 40).requires_grad_()
    y = kernels.dropout(x, p, True)
    assert y.shape == x.shape and torch.count_nonzero(y) == 0
    y.sum().backward()
    assert torch.count_nonzero(x.grad) == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), ()])
def test_dropout_of_an_empty_tensor_or_of_one_element_keeps_the_shape(shape):
    x = torch.ones(shape, requires_grad=True)
    y = kernels.dropout(x, 0.5, True)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(y, x.grad)


# Attention.


def packed_batch(lengths: list[int], columns_of_padding: int = 0) -> PackedBatch:
    columns = max(lengths) + columns_of_padding
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    return PackedBatch.from_mask(mask, len(lengths), columns, torch.device("cpu"), keep_distances=True)


def textbook_attention(
    packed: PackedBatch, heads: int, scale: float, factor: Tensor, relative_key: Any = None, relative_query: Any = None
) -> Any:
    """Attention as a function of q, k and v: sequence by sequence, every vector with every row of the tables.

    factor [Q * A, S]: what dropout multiplies the probabilities of each query row and head by.
    """

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        contexts, row, first_tokens = [], 0, len(q) != len(k)
        kept = factor.to(q.dtype).view(len(q), heads, -1)  # [Q, A, S]
        for b, length in enumerate(packed.lengths):
            rows = slice(row, row + length)
            query_rows = slice(b, b + 1) if first_tokens else rows
            qs, ks, vs = (x.view(len(x), heads, -1) for x in (q[query_rows], k[rows], v[rows]))
            distance = torch.arange(len(qs))[:, None] - torch.arange(length)  # i - j
            place = row if packed.slots is None else packed.slots[row].item()
            in_batch = place // packed.length
            scores = torch.einsum("iad,jad->aij", qs, ks)
            if relative_key is not None:
                table = relative_key[in_batch * len(relative_key) // packed.batch].to(q.dtype).unflatten(1, (heads, -1))
                at = (packed.length - 1 - distance).expand_as(scores)  # rows by descending distance
                scores = scores + torch.einsum("iad,rad->air", qs, table).gather(2, at)
            if relative_query is not None:
                table = relative_query[in_batch * len(relative_query) // packed.batch].to(q.dtype)
                at = (packed.length - 1 + distance).expand_as(scores)  # rows by ascending distance
                products = torch.einsum("rad,jad->arj", table.unflatten(1, (heads, -1)), ks)
                scores = scores + products.gather(1, at)
            probs = (scale * scores).softmax(-1) * kept[query_rows, :, :length].transpose(0, 1)
            contexts.append(torch.einsum("aij,jad->iad", probs, vs).flatten(1))
            row += length
        return torch.cat(contexts)

    return f


def fused_attention(packed: PackedBatch, heads: int, scale: float, p: float, *tables: Any) -> Any:
    return lambda q, k, v: seeded(kernels.attention, q, k, v, packed, heads, scale, p, *tables)


def attention_inputs(packed: PackedBatch, width: int, first_tokens: bool) -> list[Tensor]:
    rows = sum(packed.lengths)
    queries = packed.batch if first_tokens else rows
    return [noise(queries, width), noise(rows, width, seed=1), noise(rows, width, seed=2)]


def assert_same_attention(
    packed: PackedBatch, heads: int, head_size: int, first_tokens: bool, p: float, *tables: Tensor | None
) -> None:
    inputs = attention_inputs(packed, heads * head_size, first_tokens)
    scale = head_size**-0.5
    exact = textbook_attention(packed, heads, scale, factors(len(inputs[0]) * heads, packed.length, p), *tables)
    assert_same_outcome(fused_attention(packed, heads, scale, p, *tables), exact, *inputs)


SHAPES = [(1, 8), (4, 8), (3, 20), (1, 64), (2, 64)]  # heads, head size


@needs_library
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("first_tokens", [False, True], ids=["all tokens", "first tokens"])
@pytest.mark.parametrize(("heads", "head_size"), SHAPES)
def test_attention_and_its_gradients_are_those_of_a_softmax_in_float64(called, heads, head_size, first_tokens, p):
    assert_same_attention(packed_batch(LENGTHS), heads, head_size, first_tokens, p)
    assert {"attention", "attention_backward"} <= called


@needs_library
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("first_tokens", [False, True], ids=["all tokens", "first tokens"])
@pytest.mark.parametrize(
    ("lengths", "padding"), [([30, 30, 30], 0), ([30, 30, 30], 7), ([50], 0), ([5, 33, 5], 100), ([96], 3)]
)
def test_attention_of_equal_lengths_and_of_columns_of_padding_is_right_too(lengths, padding, first_tokens, p):
    packed = packed_batch(lengths, padding)
    assert packed.length == max(lengths) + padding
    tables = [noise(1, 2 * packed.length - 1, 48, seed=seed) for seed in (3, 4)]
    assert_same_attention(packed, 3, 16, first_tokens, p)
    assert_same_attention(packed, 3, 16, first_tokens, p, *tables)


@needs_library
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("first_tokens", [False, True], ids=["all tokens", "first tokens"])
@pytest.mark.parametrize("kinds", ["key", "query", "both", "two views, key", "two views, query", "two views, both"])
@pytest.mark.parametrize(("heads", "head_size"), [(4, 8), (3, 20), (1, 64)])
def test_attention_by_distance_and_its_gradients_are_those_in_float64(heads, head_size, kinds, first_tokens, p):
    views = 2 if "views" in kinds else 1
    packed = packed_batch(LENGTHS * views)
    key, query = (noise(views, 2 * packed.length - 1, heads * head_size, seed=seed) for seed in (3, 4))
    tables = (None if kinds.endswith("query") else key, None if kinds.endswith("key") else query)
    assert_same_attention(packed, heads, head_size, first_tokens, p, *tables)


@needs_library
def test_two_views_of_equally_long_sequences_have_a_table_each():
    packed = packed_batch([20] * 6)
    tables = [noise(2, 39, 32, seed=seed) for seed in (3, 4)]
    assert_same_attention(packed, 4, 8, False, 0.0, *tables)
    inputs = attention_inputs(packed, 32, False)
    two, one = (fused_attention(packed, 4, 0.3, 0.0, *(t[:n] for t in tables))(*inputs) for n in (2, 1))
    assert torch.equal(two[:60], one[:60])
    assert (two[60:] - one[60:]).abs().max() > 0.1


@needs_library
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1]])
def test_attention_to_a_single_token_is_its_value(lengths):
    packed = packed_batch(lengths)
    inputs = attention_inputs(packed, 24, False)
    table = noise(1, 1, 24, seed=3)
    for tables in ((), (table, None), (None, table), (table, table)):
        out, *grads = outcome(fused_attention(packed, 3, 0.5, 0.0, *tables), *inputs)
        assert_close(out, inputs[2], 1e-6)
        assert_close(grads[2], noise(*out.shape, seed=99), 1e-6)
        for grad in grads[:2]:  # 0, up to the rounding of differences between numbers of the size of D
            assert grad.abs().max() < 1e-5 * 8


@needs_library
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_tables", [False, True])
def test_attention_with_scores_in_the_thousands_stays_finite_and_right(with_tables, p):
    heads, head_size, scale = 2, 20, 1e3 * 20**-0.5
    packed = packed_batch(LENGTHS)
    inputs = attention_inputs(packed, heads * head_size, False)
    tables = [noise(1, 2 * packed.length - 1, heads * head_size, seed=s) for s in (3, 4)] if with_tables else []
    fused = fused_attention(packed, heads, scale, p, *tables)
    exact = textbook_attention(packed, heads, scale, factors(len(inputs[0]) * heads, packed.length, p), *tables)
    got = outcome(fused, *inputs)
    assert all(torch.isfinite(x).all() for x in got)
    # Scores reach 2e4, whose neighbours in fp32 are 2e-3 apart: so much, relative, a probability is off.
    assert_close(got[0].double(), exact(*(x.double() for x in inputs)), 4e-3)
    assert_same_outcome(fused, exact, *inputs, tolerance=1e-2)


@needs_library
def test_attention_to_scores_far_below_zero_is_as_to_those_near_zero():
    packed = packed_batch([33, 20])
    q, k, v = attention_inputs(packed, 16, False)
    one = torch.ones(len(q), 1)
    # a dimension that adds -4096 to every score; integers / 64 elsewhere, so that nothing is rounded away
    q, k = ((x[:, 1:] * 8).round() / 8 for x in (q, k))
    q, far, near = torch.cat([64 * one, q], 1), torch.cat([-64 * one, k], 1), torch.cat([0 * one, k], 1)
    f = fused_attention(packed, 1, 1.0, 0.0)
    for a, b in zip(outcome(f, q, far, v)[::3], outcome(f, q, near, v)[::3], strict=True):  # the result, v's gradient
        assert_close(a, b, 2e-4)  # half of what is between neighbours of 4096


@needs_library
def test_attention_takes_views_of_any_layout():
    packed = packed_batch([9, 4, 17])
    inputs = attention_inputs(packed, 24, False)
    table = noise(1, 33, 24, seed=3)
    want = fused_attention(packed, 3, 0.5, 0.3, table, table)(*inputs)
    wide = torch.cat(inputs, 1)
    views = [wide[:, :24], inputs[1].t().contiguous().t(), torch.stack([inputs[2], inputs[2]], 1)[:, 0]]
    tables = [torch.cat([table, table], 2)[..., :24], table.transpose(1, 2).contiguous().transpose(1, 2)]
    assert torch.equal(fused_attention(packed, 3, 0.5, 0.3, *tables)(*views), want)


def test_attention_leaves_to_its_caller_what_the_kernels_cannot_do():
    packed = packed_batch([9, 4])
    inputs = attention_inputs(packed, 24, False)
    table = noise(1, 17, 24, seed=3)

    def result(packed=packed, dtype=torch.float32, p=0.1, tables=(None, None)):
        return kernels.attention(*(x.to(dtype) for x in inputs), packed, 3, 0.5, p, *tables)

    holes = PackedBatch.from_mask(torch.tensor([[1, 0, 1]]), 1, 3, torch.device("cpu"), keep_distances=True)
    assert holes.key_mask is not None
    assert (result() is None) == (kernels.library() is None)
    assert result(packed=holes) is None
    assert result(dtype=torch.float64) is None
    assert (result(dtype=torch.bfloat16) is None) == (kernels.library() is None)
    assert result(p=1.0) is None
    assert result(tables=(table.requires_grad_(), None)) is None
    assert result(tables=(None, table)) is None
    with torch.no_grad():
        assert (result(tables=(table, table)) is None) == (kernels.library() is None)


# What is true of every kernel.


def operations() -> dict[str, tuple[Any, list[Tensor]]]:
    packed = packed_batch([17, 3, 40])
    tables = [noise(1, 79, 48, seed=seed) for seed in (3, 4)]
    return {
        "linear": (kernels.linear, [noise(60, 48), noise(48, 48, seed=1), noise(48, seed=2)]),
        "update": (lora_layer, lora_inputs((60, 48), 48, 8)),
        "folded update": (lora_layer, lora_inputs((60, 50), 50, 8)),
        "dropout": (lambda x: seeded(kernels.dropout, x, 0.3, True), [noise(60, 48)]),
        "attention": (fused_attention(packed, 3, 0.25, 0.3), attention_inputs(packed, 48, False)),
        "relative attention": (fused_attention(packed, 3, 0.25, 0.3, *tables), attention_inputs(packed, 48, False)),
    }


OPERATIONS = list(operations())


@needs_library
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "columns of more", "one number"])
def test_a_gradient_may_have_any_layout(name, layout):
    f, inputs = operations()[name]
    shape = outcome(f, *inputs)[0].shape
    grad = noise(*shape, seed=99)
    if layout == "transposed":
        grad = grad.t().contiguous().t()
    elif layout == "expanded":
        grad = grad[:1].expand(shape)
    elif layout == "columns of more":
        grad = torch.cat([grad, grad], 1)[:, : shape[1]]
    else:
        grad = grad[:1, :1].expand(shape)
    assert not grad.is_contiguous()
    want = outcome(f, *inputs, grad=grad.contiguous())
    scale = max(x.abs().max().item() for x in want)  # of a constant gradient, LayerNorm's own is 0
    for a, b in zip(outcome(f, *inputs, grad=grad), want, strict=True):
        assert_close(a, b, scale=scale)


@needs_library
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("linear", "update", "folded update")])
def test_the_number_of_threads_does_not_change_a_bit(set_threads, name):
    f, inputs = operations()[name]
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(outcome(f, *inputs))
    if name.endswith("norm"):  # torch sums the gradients of weight and bias over all rows, in an order of its own
        results = [result[:3] for result in results]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_update_is_right_on_any_number_of_threads(set_threads, threads):
    set_threads(threads)
    assert_same_outcome(lora_layer, textbook_lora, *lora_inputs((75, 32), 80, 8))


@needs_library
@pytest.mark.parametrize("name", OPERATIONS)
def test_without_gradients_the_result_is_the_same(name):
    f, inputs = operations()[name]
    want = outcome(f, *inputs)[0]
    with torch.no_grad():
        assert torch.equal(f(*map(nn.Parameter, inputs)), want)
    with torch.inference_mode():
        assert torch.equal(f(*map(nn.Parameter, inputs)), want)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(6, 48), (48,), (2, 3, 48)], ids=["2-D", "1-D", "3-D"])
@pytest.mark.parametrize("name", ["linear", "update", "folded update", "dropout", "attention", "relative attention"])
def test_the_output_of_a_layer_can_be_changed_in_place(name, shape, grad):
    """As with torch's layers; values and gradients are those of the operation that makes a new tensor."""
    if "attention" in name:
        packed = packed_batch([2, 4])
        tables = [noise(1, 7, 48, seed=seed) for seed in (3, 4)] if "relative" in name else []
        shape, f = (6, 48), lambda x: fused_attention(packed, 3, 0.25, 0.3, *tables)(x, x, x)
        f = f if kernels.library() else kernels.Dropout(0.3)
    elif name == "dropout":
        f = lambda x: seeded(kernels.Dropout(0.3), x)  # noqa: E731
    else:
        f = kernels.Linear(48, 32) if name == "linear" else LoRALinear(48, 33 if "folded" in name else 32, 4, 8)
        f.requires_grad_(True)

    def add(x: Tensor) -> Tensor:
        return torch.sin(f(x) + 1)

    def write(x: Tensor) -> Tensor:
        y = f(x)
        y += 1
        y[..., :2].mul_(1.0)
        return torch.sin(y)

    x = noise(*shape)
    with torch.set_grad_enabled(grad):
        if not grad:
            assert torch.equal(write(x), add(x))
            return
        for got, want in zip(outcome(write, x), outcome(add, x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_outputs_of_a_model_can_be_changed_in_place(kind, training):
    config = (tiny_config if kind == "roberta" else tiny_deberta_config)(apply_lora=True, lora_r=4, lora_alpha=8)
    model = randomise_(CLASSIFIERS[kind][0](config)).train(training)
    batch = ragged_batch([5, 3], pad=config.pad_token_id)
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        want = model(**inputs).logits
        logits = model(**inputs).logits
        logits += 1
        assert torch.equal(logits, want + 1)
        logits.sum().backward()
        last = model.base_model(**inputs).last_hidden_state
        before = last.detach().clone()
        last *= 2
        assert torch.equal(last, 2 * before)
        last.sum().backward()
        with torch.no_grad():
            base = model.base_model(**inputs, output_hidden_states=True)
            for x in (base.last_hidden_state, *base.hidden_states):
                x += 1


@needs_library
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_under_dropout_are_the_same_to_the_bit(reentrant):
    packed = packed_batch([17, 3, 40])
    tables = [noise(1, 79, 48, seed=seed) for seed in (3, 4)]
    norm, drop = nn.LayerNorm(48), kernels.Dropout(0.2)

    def block(x, weight, A, B):
        x = drop(x)
        attended = kernels.attention(lora_layer(x, weight, None, A, B), x, x, packed, 3, 0.25, 0.3, *tables)
        return norm(drop(kernels.linear(attended, weight, None)) + x)

    def checkpointed(*leaves):
        return checkpoint(block, *leaves, use_reentrant=reentrant)

    inputs = noise(60, 48), 0.1 * noise(48, 48, seed=1), noise(8, 48, seed=2), 0.1 * noise(48, 8, seed=3)
    want = outcome(lambda *leaves: seeded(block, *leaves), *inputs)
    got = outcome(lambda *leaves: seeded(checkpointed, *leaves), *inputs)
    other = outcome(lambda *leaves: seeded(block, *leaves, seed=6), *inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(other, want, strict=True)), "dropout was off"


# Whole models.

MODELS = {
    "roberta": (RobertaForSequenceClassification, tiny_config),
    "deberta-v2": (DebertaV2ForSequenceClassification, tiny_deberta_config),
}
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}


def lora_model(kind: str, trains: str, **settings: Any) -> nn.Module:
    model_class, config = MODELS[kind]
    model = randomise_(model_class(config(**LORA, **settings))).train()
    if trains == "lora":
        mark_only_lora_as_trainable(model)
    else:
        model.requires_grad_(True)
    return model


def step(model: nn.Module) -> Tensor:
    model.zero_grad()
    batch = ragged_batch([9, 4, 6, 4, 1], pad=model.config.pad_token_id)
    loss = seeded(lambda: model(**batch, labels=torch.arange(5) % 3).loss)
    loss.backward()
    return loss.detach()


@needs_library
@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("roberta", {}), ("deberta-v2", {}), ("deberta-v2", {"conv_kernel_size": 0, "share_att_key": False})]
    + [("deberta-v2", {"relative_attention": False}), ("deberta-v2", {"pos_att_type": ["c2p"]})]
    + [("deberta-v2", {"lora_relative_query": True}), ("deberta-v2", {"reg_loss_wgt": 1.0})],
)
def test_a_training_step_is_the_same_with_and_without_kernels_and_onednn(monkeypatch, called, kind, settings, trains):
    model = lora_model(kind, trains, **settings)
    bare = copy.deepcopy(model)
    loss = step(model)
    table_trains = kind != "roberta" and (trains == "all" or "lora_relative_query" in settings)
    fused = {"attention", "attention_backward"} if not table_trains or "relative_attention" in settings else set()
    assert called >= {"add_low_rank"} | fused
    names = set(called)
    for patched in ("library", "has_onednn"):
        monkeypatch.setattr(kernels, patched, lambda: None)
        assert_close(step(bare), loss, what=patched)
        largest = max(p.grad.abs().max().item() for p in bare.parameters() if p.grad is not None)
        for (name, got), want in zip(model.named_parameters(), bare.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None), name
            if want.grad is not None:
                # 2e-5 of each gradient's largest entry (helpers says why); where the exact one is 0, noise
                scale = max(want.grad.abs().max().item(), 0.05 * largest)
                assert_close(got.grad, want.grad, 2e-5, scale, f"{name}, {patched}")
    assert called == names, "the bare model used a kernel"


@needs_library
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("roberta", {}), ("deberta-v2", {}), ("deberta-v2", {"lora_relative_query": True})]
    + [("deberta-v2", {"share_att_key": False}), ("deberta-v2", {"pos_att_type": ["c2p"], "lora_dropout": 0.2})],
)
def test_a_models_checkpointed_gradients_under_dropout_are_the_same(kind, settings, trains, reentrant):
    p = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    model = lora_model(kind, trains, **p, **settings)
    model.enable_input_require_grads()  # reentrant checkpointing gives no gradients where no input has one
    want = step(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(step(model), want)
    assert len(grads) >= 8
    for name, grad in grads.items():
        # not to the bit: a BLAS may round differently where it finds the recomputed rows at another alignment
        assert_close(model.get_parameter(name).grad, grad, 1e-6, what=name)


@needs_library
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trains", ["rel_embeddings", "encoder.LayerNorm", "key_proj.bias", "word_embeddings"])
def test_gradient_checkpointing_of_a_model_gives_the_same_gradients_whatever_part_of_it_trains(trains, reentrant):
    model = lora_model("deberta-v2", "all", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in name)
    embedded = torch.randn(3, 9, 32, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, attention_mask=torch.arange(9) < torch.tensor([[9], [4], [6]])).logits

    results = []
    for call in (logits, partial(checkpoint, logits, use_reentrant=reentrant)):
        torch.manual_seed(0)
        y = call(embedded)
        trained = [x for x in model.parameters() if x.requires_grad and "word" not in trains]
        model.zero_grad()
        embedded.grad = None
        y.square().sum().backward()
        results.append([y, embedded.grad, *(x.grad for x in trained)])
    for got, want in zip(*results[::-1], strict=True):
        assert_close(got, want, 1e-6)


@needs_library
@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_models_selectively_checkpointed_gradients_are_the_same(kind, trains):
    def keeps_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    model = lora_model(kind, trains, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    want = step(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    contexts = partial(create_selective_checkpoint_contexts, keeps_products)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    assert torch.equal(step(model), want)
    for name, grad in grads.items():
        assert_close(model.get_parameter(name).grad, grad, 2e-6, what=name)


@needs_library
@pytest.mark.parametrize("what", ["table", "key", "query", "nothing", "another layer"])
@pytest.mark.parametrize("shared", [True, False])
def test_attention_with_trained_relative_positions_draws_the_same_dropout_with_and_without_grad_mode(what, shared):
    model = lora_model("deberta-v2", "lora", attention_probs_dropout_prob=0.3, share_att_key=shared).train()
    attention = model.deberta.encoder.layer[0].attention.self
    model.requires_grad_(False)
    attention.query_proj.lora_A.requires_grad_(shared)  # trains the queries, not the relative queries
    table, distances = model.deberta.encoder.relative_table(packed := packed_batch([9, 4]), 1)
    table.requires_grad_(what == "table")
    if what in ("key", "query"):
        getattr(attention, f"{what}_proj" if shared else f"pos_{what}_proj").bias.requires_grad_(True)
    attention.value_proj.requires_grad_(what == "another layer")
    rows = noise(13, 32)

    def context() -> Tensor:
        return seeded(attention, rows, rows, packed, False, table, distances, what == "table")[0]

    want = context().detach()
    with torch.no_grad():
        assert torch.equal(context(), want)
    assert (
        seeded(attention, 2 * rows, rows, packed, False, table, distances, what == "table")[0] - want
    ).abs().max() > 1e-3


# Where there are no kernels.


@pytest.fixture
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.library.cache_clear()
    yield tmp_path
    kernels.library.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled")
@pytest.mark.parametrize(
    ("error", "expected_message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/kernels.so"), "No space left on device: '/cache/ke"),
        (RuntimeError("there is no g++; install it"), "slower: there is no g++; install it."),
        (RuntimeError("kernels.cpp:1: error: what is this\nand more\n"), "kernels.cpp:1: error: what is this."),
    ],
)
def test_without_a_library_there_are_no_kernels_and_one_warning(
    empty_home, monkeypatch, caplog, error, expected_message
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kernels, "compiled", fail)
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None and kernels.library() is None
        x = noise(4, 6)
        assert kernels.kernels_for(x) is None
        assert torch.equal(seeded(kernels.dropout, x, 0.5, True), seeded(F.dropout, x, 0.5))
    (record,) = caplog.records
    assert expected_message in record.getMessage() and "and more" not in record.getMessage()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is compiled")
def test_a_library_that_does_not_load_means_no_kernels(empty_home, monkeypatch, caplog):
    (empty_home / "kernels.so").write_text("not a library")
    monkeypatch.setattr(kernels, "compiled", lambda: empty_home / "kernels.so")
    assert kernels.library() is None
    assert len(caplog.records) == 1


def test_on_another_system_nothing_is_compiled_and_nothing_is_printed(empty_home, monkeypatch, caplog):
    monkeypatch.setattr(kernels.platform, "system", lambda: "Windows")
    assert kernels.library() is None
    assert caplog.records == [] and [*empty_home.iterdir()] == []


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float16),
        torch.ones(2, 3, dtype=torch.int64),
        torch.ones(2, 3, device="meta"),
        torch.ones(2, 3).as_subclass(Subclass),
    ],
    ids=["float64", "float16", "int64", "another device", "a subclass"],
)
def test_there_are_kernels_for_fp32_and_bf16_tensors_on_the_cpu_alone(x):
    assert kernels.kernels_for(torch.ones(2, 3)) is kernels.library()
    assert kernels.kernels_for(torch.ones(2, 3, dtype=torch.bfloat16)) is kernels.library()
    assert kernels.kernels_for(nn.Parameter(torch.ones(2, 3))) is kernels.library()
    assert not kernels.can_replace(x) and kernels.kernels_for(x) is None


def test_there_are_no_kernels_under_autocast_or_while_compiling(monkeypatch):
    x = torch.ones(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.kernels_for(x) is None
    with torch.autocast("cpu", enabled=False):
        assert kernels.kernels_for(x) is kernels.library()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.kernels_for(x) is None


@pytest.mark.parametrize("mode", ["float64", "float16", "autocast", "compiling", "no library"])
def test_where_there_are_no_kernels_everything_is_torchs_own_to_the_bit(monkeypatch, mode):
    dtype = getattr(torch, mode, torch.float32) if mode in ("float64", "float16") else torch.float32
    x, matrix, bias = noise(6, 24).to(dtype), noise(24, 24, seed=4).to(dtype), noise(24, seed=5).to(dtype)
    if mode == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if mode == "no library":
        monkeypatch.setattr(kernels, "library", lambda: None)
        monkeypatch.setattr(kernels, "has_onednn", lambda: False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        assert torch.equal(kernels.linear(x, matrix, bias), F.linear(x, matrix, bias))
        assert torch.equal(seeded(kernels.dropout, x, 0.5, True), seeded(F.dropout, x, 0.5))
        packed = packed_batch([4, 2])
        assert kernels.attention(x, x, x, packed, 3, 0.5, 0.1) is None


# ---------------------------------------------------------------------------------------------- a GPU's attention


@pytest.mark.parametrize("model_type", ["roberta", "deberta-v2"])
@pytest.mark.parametrize("first_tokens", [True, False])
def test_one_masked_attention_on_the_padded_grid_gives_the_same_step(model_type, first_tokens, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    config = (tiny_config if model_type == "roberta" else tiny_deberta_config)(
        apply_lora=True, lora_r=4, lora_alpha=8, reg_loss_wgt=1.0
    )
    model = randomise_(CLASSIFIERS[model_type][0](config)).train()
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([4, 9, 1, 6])[:, None]
    inputs = {"input_ids": ids.masked_fill(~mask, config.pad_token_id), "attention_mask": mask.long()}
    results = []
    for padded in (False, True):
        model.zero_grad()
        monkeypatch.setattr(
            PackedBatch, "attends_padded", lambda self, device, with_probs, on=padded: on and len(self.groups) > 1
        )
        output = model(**inputs, labels=torch.arange(4) % 3, output_hidden_states=not first_tokens)
        output.loss.backward()
        results.append([output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        results[-1] = [x.clone() for x in results[-1]]
    assert len(results[0]) == len(results[1]) > 20
    for by_group, on_grid in zip(*results, strict=True):
        assert_close(on_grid, by_group, 2e-5, scale=max(by_group.abs().max().item(), 1e-2))
