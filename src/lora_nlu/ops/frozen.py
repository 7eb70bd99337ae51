"""Products with a frozen weight in bf16, with sums in fp32. No other copy of the weight is kept.

oneDNN multiplies fastest by a packed weight, in a layout that it chooses itself (`torch._mkldnn`): one for the forward
and one, of the transposed weight, for the backward. A packed weight has a shape and a dtype, but can't be read or
written like another tensor; `to_dense` gives its numbers.

Dim letters: N rows, I in, O out features, R rank.
"""

import ctypes
import platform
import weakref
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_nlu.ops import kernels

_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_ROWS = 512  # rows of x for which oneDNN chooses the layout; products with any other number are right too


class FrozenWeight:
    """W [O, I] in bf16 for y = x W^T + b, packed where the processor can."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = _packed(weight)  # [O, I]
        self.transposed: Tensor | None = None  # [I, O], from the first backward on

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] in fp32 or bf16, b [O] in fp32, to [..., O] in bf16; differentiable once in x and b."""
        return kernels.as_grid(_Product.apply(kernels.as_rows(x), bias, self), x)

    def product_with_update(self, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        """`product` + s (x A^T) B^T, x in bf16, A [R, I], B [O, R] in fp32; differentiable once in x, b, A and B."""
        return kernels.as_grid(_ProductWithUpdate.apply(kernels.as_rows(x), bias, A, B, s, self), x)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [N, I] W^T + b to [N, O], in bf16."""
        return _multiply(x, self.weight, bias)

    def backward(self, grad: Tensor) -> Tensor:
        """grad [N, O] W to [N, I], in bf16."""
        if self.transposed is None:
            self.transposed = _packed(plain(self.weight).t())
        return _multiply(grad, self.transposed, None)


def plain(x: Tensor) -> Tensor:
    """The numbers of a tensor, packed or not."""
    return x.to_dense() if x.is_mkldnn else x


def _packed(weight: Tensor) -> Tensor:
    weight = weight.to(torch.bfloat16).contiguous()
    if has_bf16_products():
        weight = _PACK(weight, _ROWS)
        _return_freed_memory()  # else what was converted stays between the packed weights, a third of their size
    return weight


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if platform.system() == "Linux" else None


def _return_freed_memory() -> None:
    """Let the C library give memory that is free back to the system, where it has a function for that (glibc)."""
    if trim := _malloc_trim():
        trim(0)


_latest: list[Any] = [None, None, None]  # a tensor (weakly referenced), its version, and its copy in bf16


def rounded(x: Tensor) -> Tensor:
    """x in bf16. The latest result is kept: query, key and value read the same rows."""
    if x.dtype is torch.bfloat16:
        return x
    if x.is_inference():  # it counts no versions
        return x.to(torch.bfloat16)
    if _latest[0] is None or _latest[0]() is not x or _latest[1] != x._version:
        _latest[:] = weakref.ref(x), x._version, x.to(torch.bfloat16)
    return _latest[2]


def has_bf16_products() -> bool:
    """Whether weights can be packed for oneDNN's bf16 products, which need AVX-512."""
    return _PACK is not None and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = rounded(x)
    if weight.is_mkldnn and x.numel():
        return kernels.ONEDNN_LINEAR(x, weight, bias, *kernels.NO_ACTIVATION)
    y = F.linear(x, plain(weight))
    return y if bias is None else (y + bias).to(torch.bfloat16)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, frozen: FrozenWeight) -> Tensor:
        ctx.frozen = frozen
        return frozen.forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_bias, _ = ctx.needs_input_grad
        grad_x = ctx.frozen.backward(grad) if need_x else None
        return grad_x, grad.sum(0, dtype=torch.float32) if need_bias else None, None


class _ProductWithUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, frozen: FrozenWeight
    ) -> Tensor:
        x16 = rounded(x)
        y = frozen.forward(x16, bias)
        y, down = add_update(y, x16, A.t(), B.t(), s, torch.bfloat16)
        ctx.save_for_backward(x16, A, B, down)
        ctx.scaling, ctx.frozen, ctx.dtype = s, frozen, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, down = ctx.saved_tensors
        s, (need_x, need_bias, need_A, need_B, _, _) = ctx.scaling, ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if need_x:
            grad_x, up = add_update(ctx.frozen.backward(grad), grad, B, A, s, ctx.dtype)  # [N, I], [N, R]
        else:
            up = kernels.product(grad.float(), B.t())
        if need_A:
            grad_A = kernels.low_rank_gradient(up, x, s)
        if need_B:
            grad_B = kernels.low_rank_gradient(down, grad, s).t()
        return grad_x, grad.sum(0, dtype=torch.float32) if need_bias else None, grad_A, grad_B, None, None


def add_update(y: Tensor, x: Tensor, down: Tensor, up: Tensor, s: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y [N, O] + s x down up in `dtype`, and x down [N, R] in fp32, of x [N, I], down [I, R], up [R, O].

    May write to y.
    """
    functions = kernels.kernels_for(x)
    if functions and y.shape[1] % functions.vector_width() == 0:
        return kernels.add_update(y, x, down, up, s, y if y.dtype is dtype else torch.empty_like(y, dtype=dtype))
    u = x.float() @ down
    return torch.addmm(y.float(), u, up, alpha=s).to(dtype), u
