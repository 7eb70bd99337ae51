"""Fast CPU versions of a training step's operations, each with the torch expression it replaces.

Dense products in fp32 on a CPU that isn't Intel's go to oneDNN, which is optimised for more processors than the BLAS
that torch calls (on AMD's AVX-512 cores it is twice as fast). Dropout, the low-rank update, and attention over
sequences of different lengths are the functions of kernels.cpp, compiled once with the machine's own compiler (seconds)
and kept in the user's cache. Plain torch expressions compute the same without a compiler, on a GPU, in another dtype,
under autocast, torch.compile, other traces and transforms (`is_traced`), and for higher-order derivatives.

Dim letters: N rows, I in, O out features; H hidden, A heads, D head size, Q query rows, S longest sequence, V views.
"""

import ctypes
import logging
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from lora_nlu.errors import first_line
from lora_nlu.ops.compiling import compiled

logger = logging.getLogger(__name__)
CPU = torch.device("cpu")
FP32, BF16 = (torch.float32,), torch.bfloat16
FP32_OR_BF16 = (torch.float32, torch.bfloat16)
PLAIN_TENSORS = (Tensor, nn.Parameter)  # subclasses (quantised, DTensor) may keep their data elsewhere
MAKE_FX, FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE  # modes of `is_traced`
# Of the functions in kernels.cpp: P memory of a tensor or None, I an integer, U a seed, F a float
KINDS = {"P": ctypes.c_void_p, "I": ctypes.c_int64, "U": ctypes.c_uint64, "F": ctypes.c_float}
_ATTENTION = "PIPIPI" + "PPI" + "PPP" + "IIII" + "FUIII"
SIGNATURES = {
    "dropout": "PPPIIUIIII", "gelu": "PPPII", "add_low_rank": "PPIIPIIPPPIIIIFIIII", "low_rank_gradient": "PPPIIIFII",
    "attention": _ATTENTION + "PP", "attention_backward": _ATTENTION + "PPPPP",
}  # fmt: skip


def can_replace(x: Tensor, dtypes: tuple[torch.dtype, ...] = FP32) -> bool:
    """Whether the functions of this file may replace torch's on `x`: plain, on a CPU, no autocast, no trace."""
    if x.dtype not in dtypes or not x.is_cpu or type(x) not in PLAIN_TENSORS:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or is_traced():
        return False
    return torch._C._has_storage(x)  # a batch of gradients (is_grads_batched) has none; torch has no public test


def is_traced() -> bool:
    """Whether torch.func, torch.jit.trace, make_fx, FakeTensorMode or forward-mode derivatives are active.

    They trace or transform torch's operations and would miss those of this file. (torch.compile is checked separately.)
    Other dispatch modes don't count: one may be on in a checkpointed forward and off when it is recomputed, and both
    must draw the same dropout. The private names: torch has no public function for these states.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing() or forward_ad._current_level >= 0:
        return True
    mode = torch._C._get_dispatch_mode
    return mode(MAKE_FX) is not None or mode(FAKE) is not None


# ------------------------------------------------------------------------------------- checks before compiled code
# It reads memory by address, without bounds: a tensor must pass one of these two checks first.


def check_tensor(name: str, x: Tensor, device: torch.device, *shape: int) -> None:
    """Raise ValueError unless x has this shape, on this device."""
    if x.shape != shape or x.device != device:
        raise ValueError(f"{name}: expected {list(shape)} on {device}, got {list(x.shape)} on {x.device}.")


def kernel_input(name: str, x: Tensor, *shape: int, dtypes: tuple[Any, ...] = FP32, strided: bool = False) -> Tensor:
    """x, contiguous unless `strided`, for compiled code. Raises ValueError for another shape, dtype, type or device."""
    if x.dtype not in dtypes or type(x) not in PLAIN_TENSORS:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected a plain {expected} tensor, got {type(x).__name__}, {x.dtype}.")
    check_tensor(name, x, CPU, *shape)
    x = x.resolve_neg()  # after a lazy negation the numbers in memory are not negated yet
    x = x if strided else x.contiguous()
    if x.numel() and not x.data_ptr():
        raise ValueError(f"{name}: expected {list(shape)} in memory, but its storage was freed.")
    return x


# ------------------------------------------------------------------------------------------------- dense products

ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # takes x, weight, bias, *NO_ACTIVATION
NO_ACTIVATION: tuple[str, list, str] = ("none", [], "")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x [N, I], weight [O, I], bias [O] to [N, O]; not differentiable. Raises as `linear`."""
    if can_use_onednn(x, weight, bias):
        return ONEDNN_LINEAR(x, weight, bias, *NO_ACTIVATION)
    return F.linear(x, weight, bias)


def can_use_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `ONEDNN_LINEAR` can compute x W^T + b, and fast. Raises ValueError for plain tensors on two devices."""
    fits = can_replace(x) and x.numel() > 0 and x.dim() > 0
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            is_plain = type(other) in PLAIN_TENSORS
            if other.device != x.device and is_plain and type(x) in PLAIN_TENSORS:  # F.linear may miss it (meta)
                raise ValueError(f"{name}: expected on {x.device}, where the input is, but it is on {other.device}.")
            fits = fits and other.dtype is torch.float32 and is_plain
    if not fits or not has_onednn():
        return False
    out, size = weight.shape if weight.dim() == 2 else (0, 0)
    if out == 0 or size != x.shape[-1]:
        return False
    if bias is not None and (bias.shape != (out,) or not bias.is_contiguous()):  # oneDNN ignores the strides of a bias
        return False
    # without AVX-512 oneDNN is slow on a transposed view
    return weight.is_contiguous() or torch.backends.cpu.get_cpu_capability() == "AVX512"


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether oneDNN is there and its fp32 products are faster than torch's: on Intel's processors MKL is as fast."""
    if ONEDNN_LINEAR is None or not torch.backends.mkldnn.is_available():
        return False
    cpu = Path("/proc/cpuinfo")
    return not (torch.backends.mkl.is_available() and cpu.exists() and "GenuineIntel" in cpu.read_text())


# The autograd functions save their inputs themselves: a view made in `forward` would have no autograd history. They
# return no views: torch refuses in-place writes to those. With create_graph=True their backward runs in grad mode.


def needs_torch_operations(grad: Tensor) -> bool:
    """Whether a backward can't use compiled code: for a gradient of gradients, of a batch of them, or under a trace."""
    return torch.is_grad_enabled() or is_traced() or not torch._C._has_storage(grad)


class OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b of x [N, I], where `can_use_onednn`. Keeps x only where W trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return ONEDNN_LINEAR(x, weight, bias, *NO_ACTIVATION)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        multiply: Any = linear if torch.is_grad_enabled() else product
        grad_x = multiply(grad, weight.t()) if need_x else None
        grad_weight = multiply(grad.t(), x.t()) if need_weight else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x [..., I], weight [O, I], bias [O] to [..., O]. Raises as `can_use_onednn` and F.linear."""
    if can_use_onednn(x, weight, bias):
        return as_grid(OneDNNLinear.apply(as_rows(x), weight, bias), x)
    return F.linear(x, weight, bias)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """x, in fp32 where the weight is and another layer, whose weight is held in bf16, has returned x."""
    is_narrow = x.dtype is BF16 and weight.dtype is torch.float32 and x.is_cpu
    return x.float() if is_narrow and not torch.is_autocast_enabled("cpu") else x


def as_rows(x: Tensor) -> Tensor:
    """[..., I] to [N, I]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_grid(rows: Tensor, x: Tensor) -> Tensor:
    """[N, O], computed from `as_rows(x)` of x [..., I], to [..., O]."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


class Linear(nn.Linear):
    """`nn.Linear`, computed as by `linear`; with a `frozen` weight (frozen.py) by that."""

    frozen: Any = None

    @property
    def is_replaced(self) -> bool:
        """Whether `weight` is not what the checkpoint has, which `Checkpoints.restore_weights` reads again."""
        return self.frozen is not None

    def of_checkpoint(self, weight: Tensor) -> Tensor:
        """What this layer multiplies by, before it is held in bf16, of the checkpoint's weight [O, I]."""
        return weight

    def restore_weight(self, weight: Tensor) -> None:
        """Replace `weight` by the checkpoint's."""
        self.weight, self.frozen = nn.Parameter(weight, self.weight.requires_grad), None

    def _refuse_if_held(self, done: str) -> None:
        if self.frozen is not None:
            raise RuntimeError(
                f"This model holds frozen weights in bf16, for products on a CPU alone: they can't be {done}. Save the "
                "adapter (lora_nlu.save_adapter), or call the model's restore_weights() first."
            )

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_if_held("copied or pickled")
        return self.__dict__

    def _save_to_state_dict(self, *args: Any) -> None:
        self._refuse_if_held("saved")
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Any, *args: Any) -> Any:
        if self.frozen is None:
            return super()._apply(fn, *args)
        moved = fn(torch.empty(0, dtype=torch.float32))
        if not moved.is_cpu or moved.dtype is not torch.float32:
            self._refuse_if_held("moved or converted")
        weight = self.weight
        setattr(self, "weight", None)  # noqa: B010
        super()._apply(fn, *args)
        self.weight = weight
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.frozen is not None:
            return self.frozen.product(x, bias)
        x = widened(x, weight)
        if can_use_onednn(x, weight, bias):
            return as_grid(OneDNNLinear.apply(as_rows(x), weight, bias), x)
        return F.linear(x, weight, bias)

    @property
    def qconfig(self) -> None:
        """Set by torch.ao.quantization, which replaces layers of exactly nn.Linear and would silently skip this one."""

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise RuntimeError(
            "torch.ao.quantization replaces layers of exactly nn.Linear and would silently skip those of this model, a "
            "subclass. Quantise the model in transformers' own class: save it (LoRA: save the adapter and merge it by "
            "python -m lora_nlu.adapters convert ... --to merged) and load that folder there; or use "
            "torchao.quantization.quantize_."
        )


# --------------------------------------------------------------------------------------------------- kernels.cpp


def kernels_for(x: Tensor) -> Any:
    """The compiled kernels if they can work on tensors like `x`, in fp32 or bf16, else None."""
    return library() if can_replace(x, FP32_OR_BF16) else None


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled functions of kernels.cpp, or None where they are not available, with one warning."""
    if platform.system() != "Linux":
        return None
    try:
        functions = ctypes.CDLL(str(compiled()))
        for name, kinds in SIGNATURES.items():
            function = getattr(functions, name)
            function.argtypes, function.errcheck = [KINDS[kind] for kind in kinds], _check_memory
        return functions
    except (OSError, RuntimeError) as e:
        logger.warning("Training on the CPU without compiled kernels, which is slower: %s.", first_line(e))
        return None


def draw_seed() -> int:
    """A seed for one dropout, from torch's generator: `torch.manual_seed` and a resumed run repeat it."""
    return int(torch.randint(2**63 - 1, ()).item())


def threshold(p: float) -> int:
    """Of 65536 equally likely draws, how many drop an element: p to 1e-5."""
    return round(p * 65536)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check_memory(result: int, function: Any, _: tuple) -> None:
    """Raise MemoryError if a compiled function had no memory for its working buffers."""
    if result:
        raise MemoryError(f"{function.__name__}: not enough memory for its working buffers.")


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int, residual: Tensor | None) -> Tensor:
        ctx.p, ctx.seed, ctx.dtype = p, seed, x.dtype
        return _Dropout.run(x, p, seed, x.dtype if residual is None else residual.dtype, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_residual = grad if ctx.needs_input_grad[3] else None
        if needs_torch_operations(grad):
            kept = _Dropout.run(torch.ones(grad.shape, dtype=torch.float32), ctx.p, ctx.seed)
            return grad * kept, None, None, to_residual
        return _Dropout.run(grad, ctx.p, ctx.seed, ctx.dtype), None, None, to_residual

    @staticmethod
    def run(x: Tensor, p: float, seed: int, dtype: Any = torch.float32, residual: Tensor | None = None) -> Tensor:
        x = kernel_input("dropout's input", x, *x.shape, dtypes=FP32_OR_BF16)
        y, width = torch.empty_like(x, dtype=dtype), x.shape[-1]
        if residual is not None:
            residual = kernel_input("dropout's residual", residual, *x.shape)
        sizes, draws = (x.numel() // width, width), (seed, threshold(p))
        types = (x.dtype is BF16, y.dtype is BF16)
        addresses = map(_address, (x, y, residual))
        library().dropout(*addresses, *sizes, *draws, *types, torch.get_num_threads())
        return y


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Each element 0 with probability p, else divided by 1 - p; `x` itself in evaluation or with p = 0."""
    if not training or p == 0:
        return x
    if 0 < threshold(p) < 65536 and x.dim() and x.numel() and kernels_for(x):
        return _Dropout.apply(x, p, draw_seed(), None)
    return F.dropout(x, p)


def add_dropout(x: Tensor, residual: Tensor, p: float, training: bool) -> Tensor:
    """dropout(x) + residual; of x in bf16 and a residual in fp32, in one pass and fp32."""
    p = p if training else 0.0
    is_mixed = x.dtype is BF16 and residual.dtype is torch.float32 and x.shape == residual.shape
    if is_mixed and threshold(p) < 65536 and x.numel() and can_replace(residual) and kernels_for(x):
        return _Dropout.apply(x, p, draw_seed() if p else 0, residual)
    return dropout(x, p, training) + residual


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps no mask; with a residual, the sum of both."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            return add_dropout(x, residual, self.p, self.training)
        return dropout(x, self.p, self.training)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _Gelu.run(x, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x) if needs_torch_operations(grad) else _Gelu.run(x, grad)

    @staticmethod
    def run(x: Tensor, grad: Tensor | None) -> Tensor:
        x = kernel_input("gelu's input", x, *x.shape, dtypes=(BF16,))
        if grad is not None:
            grad = kernel_input("gelu's gradient", grad, *x.shape, dtypes=(BF16,))
        y = torch.empty_like(x)
        library().gelu(*map(_address, (x, grad, y)), x.numel(), torch.get_num_threads())
        return y


class GELU(nn.GELU):
    """`nn.GELU`; of bf16 on a CPU each value and each derivative is looked up, and rounded once."""

    def forward(self, x: Tensor) -> Tensor:
        return _Gelu.apply(x) if can_replace(x, (BF16,)) and library() else super().forward(x)


def product_with_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, s: float
) -> tuple[Tensor, Tensor | None]:
    """x W^T + b + s x down up; and x down, or None where it was not computed. Not differentiable.

    x [N, I], weight [O, I], bias [O], down [I, R], up [R, O] to [N, O] and [N, R]. The compiled kernel adds the update
    to the product in one pass; without it the update is folded into the weight, one matmul instead of three. Raises as
    `can_add_update` and `add_update_`.
    """
    if can_add_update(x, weight, down, up):
        return add_update_(product(x, weight, bias), x, down, up, s)
    return product(x, torch.addmm(weight, up.t(), down.t(), alpha=s), bias), None


def can_add_update(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> bool:
    """Whether `add_update_` can add x down up to x W^T. Raises ValueError for other shapes or several devices."""
    size, (out, rank) = x.shape[1], (weight.shape[0], down.shape[-1])
    for name, matrix, shape in (("weight", weight, (out, size)), ("down", down, (size, rank)), ("up", up, (rank, out))):
        check_tensor(name, matrix, x.device, *shape)
    functions = library() if all(map(can_replace, (x, weight, down, up))) else None
    return functions is not None and out % functions.vector_width() == 0


def add_update_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """y [N, O] + s x down up, in place if y is contiguous, and x down [N, R]. Raises MemoryError."""
    y = kernel_input("product", y, x.shape[0], up.shape[1], dtypes=FP32_OR_BF16)
    return add_update(y, x, down, up, s, y)


def add_update(y: Tensor, x: Tensor, down: Tensor, up: Tensor, s: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """y [N, O] + s x down up into `out` [N, O], and x down [N, R] in fp32; x, y, out in fp32 or bf16."""
    (rows, size), (rank, width) = x.shape, up.shape
    x = kernel_input("x", x, rows, size, dtypes=FP32_OR_BF16)
    y, u = kernel_input("product", y, rows, width, dtypes=FP32_OR_BF16), x.new_empty(rows, rank, dtype=torch.float32)
    down, up = kernel_input("down", down, size, rank, strided=True), kernel_input("up", up, rank, width, strided=True)
    strided = [part for w in (down, up) for part in (_address(w), *w.stride())]
    types = (x.dtype is BF16, y.dtype is BF16, out.dtype is BF16)
    sizes = (rows, size, width, rank, s, *types, torch.get_num_threads())
    library().add_low_rank(_address(x), *strided, _address(y), _address(out), _address(u), *sizes)
    return out, u


def low_rank_gradient(u: Tensor, x: Tensor, s: float) -> Tensor:
    """s u^T x: u [N, R] in fp32, x [N, I] in fp32 or bf16, to [R, I] in fp32."""
    if not kernels_for(x):
        return s * product(u.t(), x.float().t())
    (rows, rank), size = u.shape, x.shape[1]
    u, x = kernel_input("u", u, rows, rank), kernel_input("x", x, rows, size, dtypes=FP32_OR_BF16)
    out = u.new_empty(rank, size)
    sizes = (rows, size, rank, s, x.dtype is BF16, torch.get_num_threads())
    library().low_rank_gradient(_address(u), _address(x), _address(out), *sizes)
    return out


def count_views(relative: tuple[Tensor | None, ...]) -> int:
    return next((table.shape[0] for table in relative if table is not None), 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, relative: tuple[Tensor | None, ...],
        starts: tuple[Tensor, Tensor, Tensor], longest: int, heads: int, scale: float, p: float, seed: int,
    ) -> Tensor:  # fmt: skip
        rows, width = key.shape[0], query.shape[-1]
        if heads < 1 or width % heads:
            raise ValueError(f"attention: expected a width divisible by {heads} heads, got {width}.")
        inputs, dtype = (query, key, value), query.dtype
        query = kernel_input("query", query, query.shape[0], width, dtypes=FP32_OR_BF16)
        key, value = (kernel_input(n, x, rows, width, dtypes=(dtype,)) for n, x in (("key", key), ("value", value)))
        views = count_views(relative)
        shape = (views, 2 * longest - 1, width)
        tables = [None if x is None else x.detach() for x in relative]
        if dtype is BF16:  # as the products with them are
            tables = [x.to(dtype) if x is not None and x.dtype is torch.float32 else x for x in tables]
        tables = [None if x is None else kernel_input("relative table", x, *shape, dtypes=(dtype,)) for x in tables]
        starts = _Attention.checked_starts(starts, query.shape[0], rows, longest, views)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[0], heads, dtype=torch.float32)
        ctx.settings = (tables, starts, longest, heads, scale, p, seed)
        arguments = _Attention.arguments((query, key, value), ctx.settings)
        library().attention(*arguments, _address(out), _address(lse))
        ctx.save_for_backward(*inputs, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse = ctx.saved_tensors
        if needs_torch_operations(grad):
            return *_Attention.differentiable_gradients(ctx, inputs, grad), *[None] * 7
        names = ("query", "key", "value")
        dtype = inputs[0].dtype
        inputs = tuple(kernel_input(name, x, *x.shape, dtypes=(dtype,)) for name, x in zip(names, inputs, strict=True))
        grad = kernel_input("attention's gradient", grad, *inputs[0].shape, dtypes=(dtype,))
        grads = [torch.empty_like(x) for x in inputs]
        arguments = _Attention.arguments(inputs, ctx.settings)
        library().attention_backward(*arguments, *map(_address, (lse, grad, *grads)))
        return *grads, *[None] * 7

    @staticmethod
    def differentiable_gradients(ctx: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        """The gradients of query, key and value, by autograd through `torch_attention`."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, because one input may be computed from another, and the gradient must stop at each
            query, key, value = inputs = [x.view_as(x) for x in inputs]
            trained = [x for x, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
            out = torch_attention(query, key, value, ctx.settings)
            grads = iter(torch.autograd.grad(out, trained, grad, create_graph=create_graph))
        return [next(grads) if needs else None for needs in ctx.needs_input_grad[:3]]

    @staticmethod
    def checked_starts(starts: tuple[Tensor, ...], queries: int, keys: int, longest: int, views: int) -> Any:
        """The result of `PackedBatch.starts`, readable by compiled code.

        Raises ValueError unless each row is in one sequence, of 1 to `longest` keys and one query or as many as keys.
        """
        count = starts[2].numel()
        sizes = (count + 1, count + 1, count)
        starts = tuple(kernel_input("starts", x, n, dtypes=(torch.int64,)) for x, n in zip(starts, sizes, strict=True))
        q, k, view_of = (x.tolist() for x in starts)
        lengths = zip(q, q[1:], k, k[1:], strict=False)
        fit = all(0 < n - m <= longest and b - a in (1, n - m) for a, b, m, n in lengths)
        if not fit or (q[0], q[-1], k[0], k[-1]) != (0, queries, 0, keys) or not all(0 <= v < views for v in view_of):
            raise ValueError(
                f"attention: expected sequences of 1 to {longest} rows that cover {queries} query and {keys} key rows, "
                f"in {views} views; got query starts {q[:9]}, key starts {k[:9]}, views {view_of[:9]}."
            )
        return starts

    @staticmethod
    def arguments(inputs: tuple[Tensor, ...], settings: tuple[Any, ...]) -> list:
        """The arguments that both compiled attention functions have, in their order."""
        (relative, starts, longest, heads, scale, p, seed), width = settings, inputs[0].shape[1]
        strided = [part for x in inputs for part in (_address(x), width)]
        sizes = (starts[2].numel(), heads, width // heads, longest)
        draws = (scale, seed, threshold(p), inputs[0].dtype is BF16, torch.get_num_threads())
        return [*strided, *map(_address, relative), count_views(relative), *map(_address, starts), *sizes, *draws]


def torch_attention(query: Tensor, key: Tensor, value: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """The compiled attention as torch operations, sequence by sequence: [Q, H]. For derivatives of its backward."""
    (relative_key, relative_query), starts, longest, heads, scale, p, seed = settings
    query_starts, key_starts, views = (x.tolist() for x in starts)
    dtype = query.dtype
    relative_key, relative_query = (None if x is None else x.float() for x in (relative_key, relative_query))
    query, key, value = (x.float().unflatten(1, (heads, -1)).transpose(0, 1) for x in (query, key, value))  # [A, N, D]
    ones = torch.ones(query.shape[1] * heads, longest, dtype=torch.float32)  # whatever the default dtype is
    kept = _Dropout.run(ones, p, seed).view(-1, heads, longest) if p else None
    contexts = []
    for i, view in enumerate(views):
        rows, columns = slice(*query_starts[i : i + 2]), slice(*key_starts[i : i + 2])
        q, k, v = query[:, rows], key[:, columns], value[:, columns]  # [A, M, D], [A, L, D]
        scores = q @ k.transpose(1, 2)  # [A, M, L]
        column = longest - 1 + torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]  # S - 1 + j - i, [M, L]
        column = column.expand_as(scores)
        if relative_key is not None:
            table = relative_key[view].unflatten(1, (heads, -1)).permute(1, 2, 0)  # [A, D, 2 S - 1]
            scores = scores + (q @ table).gather(2, column)
        if relative_query is not None:
            table = relative_query[view].unflatten(1, (heads, -1)).transpose(0, 1)  # [A, 2 S - 1, D]
            scores = scores + (table @ k.transpose(1, 2)).gather(1, 2 * longest - 2 - column)
        probs = (scale * scores).softmax(-1)
        if kept is not None:
            probs = probs * kept[rows, :, : k.shape[1]].transpose(0, 1)
        contexts.append((probs @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts).to(dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, packed: Any, heads: int, scale: float, p: float,
    relative_key: Tensor | None = None, relative_query: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """dropout(softmax(scores)) v within each sequence; None where the kernels can't compute it and the caller must.

    Args:    query [Q, H], key and value [N, H], packed; `scale` times q . k; dropout p. relative_key, relative_query
             [V, 2 S - 1, H] without gradient: the tables by descending and ascending distance (modeling_deberta_v2).
    Returns: [Q, H]. Raises ValueError for tensors that don't belong together, MemoryError.
    """
    relative = (relative_key, relative_query)
    trains = any(x is not None and x.requires_grad and torch.is_grad_enabled() for x in relative)
    if trains or packed.key_mask is not None or not 0 <= threshold(p) < 65536:
        return None
    first_tokens, views = query.shape[0] != key.shape[0], count_views(relative)
    can_replace_torch = not (torch.compiler.is_compiling() or is_traced())
    if can_replace_torch and (gpu := packed_attention()) and gpu.can_attend(query, key, value, heads, packed):
        starts, width, longest = packed.starts_on_device(first_tokens, views), query.shape[1], packed.length
        check_tensor("key", key, query.device, key.shape[0], width)
        check_tensor("value", value, query.device, key.shape[0], width)
        check_tensor("starts", starts[0], query.device, packed.batch + 1)
        for table in (x for x in relative if x is not None):
            check_tensor("relative table", table, query.device, views, 2 * longest - 1, width)
        has_padding = packed.real is not None
        return gpu.attend(query, key, value, starts, longest, heads, scale, threshold(p), *relative, has_padding)
    if packed.real is not None or not kernels_for(query):
        return None
    seed = draw_seed() if p else 0
    starts = packed.starts(first_tokens, views)
    return _Attention.apply(query, key, value, relative, starts, packed.length, heads, scale, p, seed)


@lru_cache(maxsize=1)
def packed_attention() -> Any:
    """The module of this name if LORA_NLU_PACKED_ATTENTION is 1 and it can work here, else None, with one warning."""
    setting = os.environ.get("LORA_NLU_PACKED_ATTENTION", "")
    if setting in ("", "0"):
        return None
    refusal = ""
    module: Any = None
    if setting != "1":
        refusal = f"is 1 or 0, not {setting!r}; it is taken for 0"
    else:
        try:
            from lora_nlu.ops import packed_attention as found

            module = found
        except (ImportError, AttributeError) as e:  # Triton before 3.4, of torch 2.6 and 2.7, lacks `knobs`
            refusal = f"has no effect without Triton 3.4 (pip install triton): {e}"
    if module and not module.IS_INTERPRETED:
        cards = [torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())]
        if min(cards, default=(0, 0)) < (8, 0):
            refusal = "has no effect " + ("below compute capability 8.0" if cards else "without a GPU")
    if refusal:
        logger.warning("LORA_NLU_PACKED_ATTENTION %s.", refusal)
    return None if refusal else module
