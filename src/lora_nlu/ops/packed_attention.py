"""Attention over packed sequences of any lengths on a GPU, forward and backward, without a padded grid. Off by default.

Kernels in Triton for fp32, bf16 and fp16, with dropout and, for DeBERTa, frozen tables of relative positions. They keep
no probabilities: the backward computes them again from the logarithm of each row's sum (Dao et al. 2022, arXiv
2205.14135). Where there is neither dropout nor a table, half precision goes to torch's own attention for packed rows.

LORA_NLU_PACKED_ATTENTION=1 turns them on. They were tested in Triton's interpreter and compiled ahead, but have not run
on a card, and `bash benchmarks/gpu.sh attention` tells whether they are right and faster on yours.

Dim letters: Q query rows, N key rows, H hidden, A heads, D head size, B sequences, S longest of them, V views. In the
kernels M query and M key rows make a block; the distances between them are a window of 2 M rows of a table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_nlu.ops.packing import PackedBatch, is_batched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)  # by TRITON_INTERPRET=1, on CPU tensors
INTERPRETED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def _kept(seed, row, first_key, heads, head, words, threshold, M: tl.constexpr):
    """[M, M] 1 / (1 - p) where dropout keeps a probability and 0 elsewhere; `kept` is the same in plain torch.

    Philox with 7 rounds (Salmon et al. 2011) gives four draws a call, of four neighbouring keys.
    """
    word = first_key // 4 + tl.arange(0, M // 4)
    counter = (row * heads + head)[:, None] * words + word[None, :]  # int32
    zero = counter * 0
    r0, r1, r2, r3 = tl.philox(seed, counter, zero, zero, zero, 7)
    draws = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))  # [M, M], in the order of the keys
    return tl.where((draws & 0xFFFF).to(tl.int32) >= threshold, 65536.0 / (65536 - threshold), 0.0)


@triton.jit
def _product(x, y):
    if INTERPRETED:  # the interpreter multiplies the bits of bf16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")  # no tf32, as torch's default


@triton.jit
def _rows(pointer, first, offset, count, width, head, D: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, PADDED] of one head: rows first + offset ..., 0 outside of the `count` rows that begin at `first`."""
    row, column = offset + tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (row >= 0) & (row < count)
    places = (first + row).to(tl.int64)[:, None] * width + head * D + column[None, :]
    return tl.load(pointer + places, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store(pointer, values, first, offset, count, width, head, D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    row, column = offset + tl.arange(0, M), tl.arange(0, PADDED)
    places = (first + row).to(tl.int64)[:, None] * width + head * D + column[None, :]
    inside = (row < count)[:, None] & (column < D)[None, :]
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _unskewed(products, M: tl.constexpr):
    """[M, 2 M] products with a window of distances to [M, M]: row a, column b takes that of distance b - a."""
    a, b = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    return tl.gather(products, b - a + M - 1, 1)


@triton.jit
def _skewed(grads, M: tl.constexpr):
    """The inverse: [M, M] to [M, 2 M], 0 where a row has no such distance. M is a power of 2."""
    b = tl.arange(0, 2 * M)[None, :] - (M - 1) + tl.arange(0, M)[:, None]
    return tl.where((b >= 0) & (b < M), tl.gather(grads, b & (M - 1), 1), 0.0)


@triton.jit
def _scores(
    q, k, i, j, queries, keys, key_window, query_window, scale,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """[M, M] scaled scores of a block of queries and one of keys, -inf outside of the sequence."""
    scores = _product(q, tl.trans(k))
    if HAS_KEY:
        scores += _unskewed(_product(q, tl.trans(key_window)), M)
    if HAS_QUERY:
        scores += tl.trans(_unskewed(_product(k, tl.trans(query_window)), M))
    inside = (i < queries)[:, None] & (j < keys)[None, :]
    return tl.where(inside, scores * scale, -float("inf"))


@triton.jit
def _window(
    table, view, distance, longest, width, head, D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """[2 M, PADDED] rows of a table [V, 2 S - 1, H] from the one of distance - (M - 1) on; without a table 0."""
    if HAS_TABLE:
        count = 2 * longest - 1
        return _rows(table, view * count, longest - 1 + distance - (M - 1), count, width, head, D, PADDED, 2 * M)
    else:
        return 0


@triton.jit
def _sequence(starts, sequence):
    """The first row of a sequence, and how many it has."""
    first = tl.load(starts + sequence)
    return first, tl.load(starts + sequence + 1) - first


@triton.jit(do_not_specialize=["longest", "threshold"])
def _forward(
    query, key, value, relative_key, relative_query, query_starts, key_starts, view_of, seed, out, lse,
    heads, longest, scale, threshold,
    D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    i0, sequence, head = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    width, words = heads * D, (longest + 3) // 4
    first_query, queries = _sequence(query_starts, sequence)
    first_key, keys = _sequence(key_starts, sequence)
    view, i = tl.load(view_of + sequence), i0 + tl.arange(0, M)
    if i0 < queries:
        q = _rows(query, first_query, i0, queries, width, head, D, PADDED, M)
        largest = tl.full((M,), -float("inf"), tl.float32)
        total, context = tl.zeros((M,), tl.float32), tl.zeros((M, PADDED), tl.float32)
        for j0 in range(0, keys, M):
            k = _rows(key, first_key, j0, keys, width, head, D, PADDED, M)
            v = _rows(value, first_key, j0, keys, width, head, D, PADDED, M)
            key_window = _window(relative_key, view, j0 - i0, longest, width, head, D, PADDED, M, HAS_KEY)
            query_window = _window(relative_query, view, i0 - j0, longest, width, head, D, PADDED, M, HAS_QUERY)
            scores = _scores(
                q, k, i, j0 + tl.arange(0, M), queries, keys, key_window, query_window, scale, HAS_KEY, HAS_QUERY, M
            )
            highest = tl.maximum(largest, tl.max(scores, 1))
            highest = tl.where(i < queries, highest, 0.0)
            probs, shrink = tl.exp(scores - highest[:, None]), tl.exp(largest - highest)
            total, largest = total * shrink + tl.sum(probs, 1), highest
            if DROPS:
                probs *= _kept(tl.load(seed), first_query + i, j0, heads, head, words, threshold, M)
            context = context * shrink[:, None] + _product(probs.to(v.dtype), v)
        total = tl.where(i < queries, total, 1.0)
        _store(out, context / total[:, None], first_query, i0, queries, width, head, D, PADDED, M)
        tl.store(lse + (first_query + i) * heads + head, largest + tl.log(total), mask=i < queries)


@triton.jit
def _score_gradients(
    q, k, v, grad, i, j0, queries, keys, key_window, query_window, row_lse, row_delta, seed, first_query, heads, head,
    words, scale, threshold, HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, DROPS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """[M, M] probabilities after dropout, and the gradients of the scores before scaling."""
    scores = _scores(
        q, k, i, j0 + tl.arange(0, M), queries, keys, key_window, query_window, scale, HAS_KEY, HAS_QUERY, M
    )
    probs = tl.exp(scores - row_lse[:, None])
    grads, dropped = _product(grad, tl.trans(v)), probs
    if DROPS:
        kept = _kept(tl.load(seed), first_query + i, j0, heads, head, words, threshold, M)
        grads, dropped = grads * kept, probs * kept
    return dropped, probs * (grads - row_delta[:, None]) * scale


@triton.jit(do_not_specialize=["longest", "threshold"])
def _query_gradient(
    query, key, value, relative_key, relative_query, grad_out, lse, delta, query_starts, key_starts, view_of, seed,
    grad_query, heads, longest, scale, threshold,
    D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    i0, sequence, head = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    width, words = heads * D, (longest + 3) // 4
    first_query, queries = _sequence(query_starts, sequence)
    first_key, keys = _sequence(key_starts, sequence)
    view, i = tl.load(view_of + sequence), i0 + tl.arange(0, M)
    if i0 < queries:
        q = _rows(query, first_query, i0, queries, width, head, D, PADDED, M)
        grad = _rows(grad_out, first_query, i0, queries, width, head, D, PADDED, M)
        row_lse = tl.load(lse + (first_query + i) * heads + head, mask=i < queries, other=0.0)
        row_delta = tl.load(delta + (first_query + i) * heads + head, mask=i < queries, other=0.0)
        total = tl.zeros((M, PADDED), tl.float32)
        for j0 in range(0, keys, M):
            k = _rows(key, first_key, j0, keys, width, head, D, PADDED, M)
            v = _rows(value, first_key, j0, keys, width, head, D, PADDED, M)
            key_window = _window(relative_key, view, j0 - i0, longest, width, head, D, PADDED, M, HAS_KEY)
            query_window = _window(relative_query, view, i0 - j0, longest, width, head, D, PADDED, M, HAS_QUERY)
            _, grads = _score_gradients(
                q, k, v, grad, i, j0, queries, keys, key_window, query_window, row_lse, row_delta, seed, first_query,
                heads, head, words, scale, threshold, HAS_KEY, HAS_QUERY, DROPS, M,
            )  # fmt: skip
            total += _product(grads.to(k.dtype), k)
            if HAS_KEY:
                total += _product(_skewed(grads, M).to(k.dtype), key_window)
        _store(grad_query, total, first_query, i0, queries, width, head, D, PADDED, M)


@triton.jit(do_not_specialize=["longest", "threshold"])
def _key_and_value_gradient(
    query, key, value, relative_key, relative_query, grad_out, lse, delta, query_starts, key_starts, view_of, seed,
    grad_key, grad_value, heads, longest, scale, threshold,
    D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr,
    HAS_KEY: tl.constexpr, HAS_QUERY: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    j0, sequence, head = tl.program_id(0) * M, tl.program_id(1), tl.program_id(2)
    width, words = heads * D, (longest + 3) // 4
    first_query, queries = _sequence(query_starts, sequence)
    first_key, keys = _sequence(key_starts, sequence)
    view = tl.load(view_of + sequence)
    if j0 < keys:
        k = _rows(key, first_key, j0, keys, width, head, D, PADDED, M)
        v = _rows(value, first_key, j0, keys, width, head, D, PADDED, M)
        key_total, value_total = tl.zeros((M, PADDED), tl.float32), tl.zeros((M, PADDED), tl.float32)
        for i0 in range(0, queries, M):
            i = i0 + tl.arange(0, M)
            q = _rows(query, first_query, i0, queries, width, head, D, PADDED, M)
            grad = _rows(grad_out, first_query, i0, queries, width, head, D, PADDED, M)
            row_lse = tl.load(lse + (first_query + i) * heads + head, mask=i < queries, other=0.0)
            row_delta = tl.load(delta + (first_query + i) * heads + head, mask=i < queries, other=0.0)
            key_window = _window(relative_key, view, j0 - i0, longest, width, head, D, PADDED, M, HAS_KEY)
            query_window = _window(relative_query, view, i0 - j0, longest, width, head, D, PADDED, M, HAS_QUERY)
            dropped, grads = _score_gradients(
                q, k, v, grad, i, j0, queries, keys, key_window, query_window, row_lse, row_delta, seed, first_query,
                heads, head, words, scale, threshold, HAS_KEY, HAS_QUERY, DROPS, M,
            )  # fmt: skip
            value_total += _product(tl.trans(dropped).to(v.dtype), grad)
            key_total += _product(tl.trans(grads).to(k.dtype), q)
            if HAS_QUERY:
                key_total += _product(_skewed(tl.trans(grads), M).to(k.dtype), query_window)
        _store(grad_key, key_total, first_key, j0, keys, width, head, D, PADDED, M)
        _store(grad_value, value_total, first_key, j0, keys, width, head, D, PADDED, M)


def kept(seed: int, queries: int, heads: int, longest: int, threshold: int) -> Tensor:
    """[Q, A, S] True where the kernels' dropout keeps a probability: the definition, in plain torch, slow."""
    words = (longest + 3) // 4
    low = 2**32 - 1
    c0 = torch.arange(queries * heads * words) & low
    c1, c2, c3 = (torch.zeros_like(c0) for _ in range(3))
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(7):
        (high0, low0), (high2, low2) = _multiplied(c0, 0xD2511F53), _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    draws = torch.stack([c0, c1, c2, c3], 1).view(queries, heads, 4 * words)[..., :longest]
    return (draws & 0xFFFF) >= threshold


def _multiplied(x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of x y, both factors below 2**32, in int64."""
    low = (x & 0xFFFF) * y  # below 2**48
    high = (x >> 16) * y + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def can_attend(query: Tensor, key: Tensor, value: Tensor, heads: int, packed: PackedBatch) -> bool:
    """Whether `attend` takes these rows: plain, of one dtype, heads of 128 or less, on a GPU.

    Draws of dropout are counted in 31 bits, and a grid of blocks has at most 65,535 sequences.
    """
    size, draws = query.shape[1] // heads, query.shape[0] * heads * (packed.length + 3) // 4
    fits = all(type(x) is Tensor and x.dtype is query.dtype for x in (query, key, value))
    if not fits or query.dtype not in DTYPES or size > 128 or draws >= 2**31 or packed.batch > 65535:
        return False
    return query.is_cuda or IS_INTERPRETED


def attend(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor, Tensor], longest: int, heads: int,
    scale: float, threshold: int, relative_key: Tensor | None = None, relative_query: Tensor | None = None,
    has_padding: bool = False,
) -> Tensor:  # fmt: skip
    """As `kernels.attention`, with what `PackedBatch.starts_on_device` returns; rows of no sequence become 0.

    The caller has checked that they belong together. `threshold` of 65536 draws drop a probability; `has_padding`:
    there may be rows of no sequence. The backward raises RuntimeError for a second derivative, or a batch of gradients.
    """
    has_table = relative_key is not None or relative_query is not None
    # torch's leaves rows of no sequence, and their gradients, as the memory was
    if threshold == 0 and not has_table and not has_padding and has_torch_kernel(query, heads, scale):
        from torch.nn.attention.varlen import varlen_attn

        query_starts, key_starts, _ = starts
        q, k, v = (x.contiguous().unflatten(1, (heads, -1)) for x in (query, key, value))
        one_query = len(query) != len(key)
        context: Any = varlen_attn(q, k, v, query_starts, key_starts, 1 if one_query else longest, longest)
        return context.flatten(1)
    tables = [None if x is None else x.detach().to(query.dtype).contiguous() for x in (relative_key, relative_query)]
    return _Attention.apply(query, key, value, tables, starts, longest, heads, scale, threshold)


def has_torch_kernel(query: Tensor, heads: int, scale: float) -> bool:
    """Whether torch's `varlen_attn` can attend: half precision, the usual scale, what flash attention asks for."""
    size = query.shape[1] // heads
    if not query.is_cuda or query.dtype is torch.float32 or size % 8 or abs(scale * size**0.5 - 1) > 1e-6:
        return False
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return False
    return (
        torch.cuda.get_device_capability(query.device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()
    )


def blocks(size: int, dtype: torch.dtype, has_table: bool) -> dict[str, int]:
    """Sizes that the kernels are compiled for, so that a block's shared memory fits a card's 99 KiB."""
    padded = max(16, triton.next_power_of_2(size))
    is_large = dtype is torch.float32 or has_table or padded > 64
    rows = 64 if not is_large else 16 if dtype is torch.float32 and has_table and padded > 64 else 32
    return {"D": size, "PADDED": padded, "M": rows, "num_warps": 4, "num_stages": 1 if is_large else 2}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tables: list[Tensor | None],
        starts: tuple[Tensor, Tensor, Tensor], longest: int, heads: int, scale: float, threshold: int,
    ) -> Tensor:  # fmt: skip
        inputs = [x.resolve_neg().contiguous() for x in (query, key, value)]
        # drawn on the device, so that nothing waits and each replay of a CUDA graph draws anew
        seed = torch.randint(2**62, (1,), device=query.device) if threshold else starts[2]
        ctx.settings = (tables, starts, longest, heads, scale, threshold, seed)
        out = torch.zeros_like(inputs[0])
        lse = out.new_zeros(len(out), heads, dtype=torch.float32)
        _Attention.launch(_forward, inputs, [], [out, lse], ctx.settings, len(query) != len(key))
        ctx.save_for_backward(*inputs, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_batched(grad):
            raise RuntimeError(
                "The attention that LORA_NLU_PACKED_ATTENTION=1 turns on has no second derivative and no batches of "
                "gradients: start without it."
            )
        query, key, value, out, lse = ctx.saved_tensors
        heads = ctx.settings[3]
        grad = grad.resolve_neg().contiguous()
        delta = (out.float() * grad.float()).unflatten(1, (heads, -1)).sum(-1)  # [Q, A]
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        given = [grad, lse, delta]
        one_query = len(query) != len(key)
        _Attention.launch(_query_gradient, [query, key, value], given, grads[:1], ctx.settings, one_query)
        _Attention.launch(_key_and_value_gradient, [query, key, value], given, grads[1:], ctx.settings, False)
        return *grads, *[None] * 6

    @staticmethod
    def launch(
        kernel: Any, inputs: list[Tensor], more: list[Tensor], results: list[Tensor], settings: tuple, one_query: bool
    ) -> None:
        """Run a kernel on every block of rows of every sequence and head."""
        tables, starts, longest, heads, scale, threshold, seed = settings
        has_key, has_query = (x is not None for x in tables)
        sizes = blocks(inputs[0].shape[1] // heads, inputs[0].dtype, has_key or has_query)
        grid = (triton.cdiv(1 if one_query else longest, sizes["M"]), len(starts[2]), heads)
        with torch.cuda.device_of(inputs[0]):
            kernel[grid](
                *inputs, *tables, *more, *starts, seed, *results, heads, longest, scale, threshold,
                HAS_KEY=has_key, HAS_QUERY=has_query, DROPS=threshold > 0, **sizes,
            )  # fmt: skip
