"""DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): h = m * (W + s B A) x / |W + s B A| + b with W and b frozen.

|V| [O] contains the length of each row of V; m [O] starts as |W|, so a new layer computes what the linear layer that it
replaces did. As in the paper's section 4.3, the backward takes |W + s B A| as a constant.

Dim letters: N rows (tokens), I in_features, O out_features, R rank.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.methods.lora import LoRALinear
from lora_nlu.ops import kernels
from lora_nlu.ops.frozen import add_update, plain, rounded
from lora_nlu.ops.tensors import is_loaded

_CANCELLED = 0.1  # if |W + s B A|^2 is below this share of |W|^2 + |s B A|^2, expanding the square loses digits
_SHORTEST = 1e-30  # taken as the length of a row of zeros, so that dividing by it gives zeros


class _DoRALinear(torch.autograd.Function):
    """y = c * (x W^T + s (x A^T) B^T) + b of x [N, I] on a CPU, with c = m / |W + s B A|.

    squares [O]: |W|^2 of each row in fp64; frozen: W in bf16 (frozen.py), or None. One product multiplies the rows of x
    and of A by W, since the lengths need A W^T. The backward keeps x, x A^T, the product before it is scaled by c, and
    references to parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, squares: Tensor,
        s: float, frozen: Any,
    ) -> Tensor:  # fmt: skip
        ctx.scaling, ctx.frozen, ctx.dtype, count = s, frozen, x.dtype, x.shape[0]
        if frozen is None:
            products = kernels.product(torch.cat([x, A]), weight)  # [N + R, O]
        else:
            x = rounded(x)
            products = frozen.forward(torch.cat([x, A.to(x.dtype)]), None)
        lengths = _lengths_of_sum(weight, A, B, s, squares, products[count:])
        h, down = add_update(products[:count], x, A.t(), B.t(), s, products.dtype)  # [N, O], [N, R]
        ctx.save_for_backward(x, weight, A, B, m, lengths, h, down)
        c = m / lengths
        return (h * c if bias is None else torch.addcmul(bias, h, c)).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, m, lengths, h, down = ctx.saved_tensors
        s, frozen, (need_x, need_weight, need_bias, need_A, need_B, need_m) = (
            ctx.scaling, ctx.frozen, ctx.needs_input_grad[:6]
        )  # fmt: skip
        grad_h = (grad * (m / lengths)).to(grad.dtype)  # [N, O]
        grad_x = grad_weight = grad_A = grad_B = None
        if kernels.needs_torch_operations(grad):  # for gradients of gradients; what the forward saved has no history
            W, x, grad_h = plain(weight).to(B.dtype), x.to(B.dtype), grad_h.to(B.dtype)
            up, down = F.linear(grad_h, B.t()), F.linear(x, A)
            h = F.linear(x, W) + s * F.linear(down, B)
            grad_x = (F.linear(grad_h, W.t()) + s * F.linear(up, A.t())).to(ctx.dtype) if need_x else None
            grad_A, grad_B = s * F.linear(up.t(), x.t()), s * F.linear(grad_h.t(), down.t())
        else:
            if need_x:
                product = kernels.product(grad_h, weight.t()) if frozen is None else frozen.backward(grad_h)
                grad_x, up = add_update(product, grad_h, B, A, s, ctx.dtype)  # [N, I], [N, R]
            else:
                up = kernels.product(grad_h.to(B.dtype), B.t())
            grad_A = kernels.low_rank_gradient(up, x, s) if need_A else None  # [R, N] [N, I]
            grad_B = kernels.low_rank_gradient(down, grad_h, s).t() if need_B else None  # [O, N] [N, R]
        grad_weight = kernels.linear(grad_h.t(), x.t()) if need_weight else None
        grad_bias = grad.sum(0, dtype=m.dtype) if need_bias else None
        grad_m = (grad * h).sum(0, dtype=m.dtype) / lengths if need_m else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_m, None, None, None


class DoRALinear(LoRALinear):
    """`LoRALinear` whose rows have trained lengths: y = c * (x W^T + scaling x A^T B^T) + b, c = m / |W + scaling B A|.

    m is `lora_magnitude_vector` [O], PEFT's name. With dropout, as in PEFT, c - 1 multiplies the frozen product of the
    dropped x': y = x W^T + b + (c - 1) * (x' W^T) + c * (scaling x' A^T B^T).
    """

    method = "dora"
    multiplies_frozen = True
    reads_weight = True  # in fp32, for its lengths (graphs.py)
    update_names = ("lora_A", "lora_B", "lora_magnitude_vector")
    _squares: Any = None  # a weight, its version, and the squared length of each of its rows

    def __init__(self, in_features: int, out_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, *args, **kwargs)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(out_features))
        self.start_magnitude()

    def reset_added_parameters(self, normal_std: float | None = None) -> None:
        super().reset_added_parameters(normal_std)
        if hasattr(self, "lora_magnitude_vector"):  # not in the superclass's constructor
            self.start_magnitude()

    @torch.no_grad()
    def start_magnitude(self) -> None:
        """Set m to |W|, unless it was read from a checkpoint."""
        if not is_loaded(self.lora_magnitude_vector):
            self.lora_magnitude_vector.copy_(_squared_rows(self.weight).sqrt())

    def forward(self, x: Tensor, apply_update: bool = True) -> Tensor:
        """As `LoRALinear.forward`."""
        if self.merged or not apply_update:
            return super().forward(x, apply_update)
        self.check_shapes()
        weight, bias, s, frozen = self.weight, self.bias, self.scaling, self.frozen
        A, B, m = (parameters := self.update_parameters())
        if frozen is None:
            x = kernels.widened(x, weight)
        dropped = self.dropout(x)
        tensors = [x, weight, *parameters, *([] if bias is None else [bias])]
        if dropped is x and x.numel() and (frozen is not None or all(map(kernels.can_replace, tensors))):
            rows, squares = kernels.as_rows(x), self._squared_rows()
            return kernels.as_grid(_DoRALinear.apply(rows, weight, bias, *parameters, squares, s, frozen), x)
        c = m / self.row_lengths()
        update = c * (s * F.linear(F.linear(kernels.widened(dropped, A), A), B))
        multiply: Any = frozen.product if frozen is not None else lambda x, bias: kernels.linear(x, weight, bias)
        product = multiply(dropped, None)
        if dropped is x:
            y = c * product if bias is None else torch.addcmul(bias, product, c)
        else:
            y = multiply(x, bias) + (c - 1) * product
        return (y + update).to(product.dtype)

    @torch.no_grad()
    def row_lengths(self) -> Tensor:
        """|W + scaling B A| of each row, [O]."""
        weight, frozen, A, B, m = self.weight, self.frozen, *self.update_parameters()
        if frozen is None and not all(map(kernels.can_replace, (weight, A, B))):
            return _lengths(_sum(weight, A, B, self.scaling)).to(m.dtype)
        products = kernels.product(A, weight) if frozen is None else frozen.forward(A.to(torch.bfloat16), None)
        return _lengths_of_sum(weight, A, B, self.scaling, self._squared_rows(), products)

    def _squared_rows(self) -> Tensor:
        """|W|^2 of each row, [O] in fp64; computed again when W is another tensor or was written to."""
        weight = self.weight
        state = None if weight.is_inference() else (weight._version, self.frozen or weight.data_ptr())
        if self._squares is None or self._squares[0] is not weight or state is None or self._squares[1] != state:
            self._squares = weight, state, _squared_rows(plain(weight.detach()))
        return self._squares[2]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_squares": None}

    def check_shapes(self) -> None:
        super().check_shapes()
        weight = self.weight
        kernels.check_tensor("lora_magnitude_vector", self.lora_magnitude_vector, weight.device, weight.shape[0])

    def with_update(self, weight: Tensor, parameters: list[Tensor], scaling: float) -> Tensor:
        A, B, m = parameters
        merged = _sum(weight, A, B, scaling)
        return (merged * (m / _lengths(merged))[:, None]).to(weight.dtype)

    def frozen_weight(self) -> Tensor:
        if not self.merged or self._untouched("weight"):
            return super().frozen_weight()
        A, B, m = (getattr(self, f"merged_{name}") for name in self.update_names)
        before = self.weight_before
        c = (m / _lengths(_sum(before, A, B, self.merged_scaling)))[:, None]
        return torch.where(c == 0, before, _sum(self.weight / c, A, B, -self.merged_scaling).to(before.dtype))


def _sum(weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A, in fp32 or fp64."""
    dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device.type
    autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with autocast:
        return weight.to(dtype) + s * (B.to(dtype) @ A.to(dtype))


def _lengths(weight: Tensor) -> Tensor:
    """|W| of each row, [O]."""
    return torch.linalg.vector_norm(weight, dim=1).clamp(min=_SHORTEST)


def _squared_rows(weight: Tensor) -> Tensor:
    """|W|^2 of each row, [O] in fp64."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()


def _lengths_of_sum(weight: Tensor, A: Tensor, B: Tensor, s: float, squares: Tensor, products: Tensor) -> Tensor:
    """|W + s B A| of each row, [O], by its expanded square, without forming the [O, I] sum.

    squares: |W|^2 [O] in fp64; products: A W^T [R, O]. Rows in which W and s B A nearly cancel are summed themselves.
    """
    A, B, dtype = A.double(), s * B.double(), B.dtype
    of_update = ((B @ (A @ A.t())) * B).sum(1)
    squared = squares + 2 * (products.t() * B).sum(1) + of_update
    cancelled = (squared < _CANCELLED * (squares + of_update)).nonzero().flatten()
    if cancelled.numel():
        squared[cancelled] = _squared_rows(plain(weight)[cancelled] + B[cancelled] @ A)
    return squared.sqrt().clamp(min=_SHORTEST).to(dtype)
