"""The machine's own limit of a step: its dense products alone."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Product = tuple[int, int, int, int, bool]  # rows, out, in, which weight of this shape, transposed


def products(config: Any, tokens: int, sequences: int, train: bool) -> list[Product]:
    """(rows, out, in, which weight of this shape, transposed) of a step's dense products in the encoder, in order.

    What can be left out without changing a number is left out: the last layer's work on all but first tokens, gradients
    into what is frozen. LoRA's own products, attention and the heads, about 2 %, are not counted.
    """
    H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # noqa: E741
    kernel = getattr(config, "conv_kernel_size", 0)
    forward: list[Product] = []
    backward: list[Product] = []
    for layer in range(L):
        rows = sequences if layer == L - 1 else tokens
        for place, n in enumerate((rows, tokens, tokens, rows)):  # query, key, value, output
            forward.append((n, H, H, 4 * layer + place, False))
            if layer or place == 3:  # no gradient into the embeddings
                backward.append((n, H, H, 4 * layer + place, True))
        for out, into in ((I, H), (H, I)):
            forward.append((rows, out, into, layer, False))
            backward.append((rows, out, into, layer, True))
        if kernel and layer == 0:
            forward.append((tokens, H, kernel * H, 0, False))  # reads the embeddings, into which no gradient flows
    return forward + backward[::-1] if train else forward


class Limit:
    """Seconds that a step's dense products take alone: by torch's own matmul, and by the fastest this build has.

    Every layer has weights of its own, as in the model: they come from memory, not from the cache. `fastest_s` is the
    least of torch's, of oneDNN's and of oneDNN's with weights in the layout that it chooses itself (packed), in fp32;
    `bf16_s` that of packed weights in bf16.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.weights: dict[tuple[Any, ...], Tensor] = {}

    def weight(self, out: int, into: int, place: int, transposed: bool, kind: str) -> Tensor:
        """A weight [out, into], or its transpose: plain, packed, or packed in bf16; a new one on the first call."""
        key = (out, into, place, transposed and kind != "plain", kind)
        if key not in self.weights:
            if kind == "plain":
                self.weights[key] = torch.randn(out, into)
            else:
                plain = self.weight(out, into, place, transposed, "plain").contiguous()
                self.weights[key] = pack(plain.bfloat16() if kind == "bf16" else plain)
        return self.weights[key].t() if transposed and kind == "plain" else self.weights[key]

    def seconds(self, needed: list[Product], product: Any, kind: str) -> float:
        """Seconds of these products with weights of a kind: plain, packed or bf16."""
        numbers = torch.randn(max(rows * max(out, into) for rows, out, into, _, _ in needed))
        numbers, calls = numbers.bfloat16() if kind == "bf16" else numbers, []
        for rows, out, into, place, transposed in needed:
            x = numbers[: rows * (out if transposed else into)].view(rows, -1)
            calls.append((x, self.weight(out, into, place, transposed, kind)))
        for x, weight in calls[:6]:  # a layer's forward, not counted
            product(x, weight)
        start = time.perf_counter()
        for x, weight in calls:
            product(x, weight)
        return time.perf_counter() - start

    def answer(self, request: dict) -> dict:
        lengths = request["lengths"]
        needed = products(self.config, sum(lengths), len(lengths), request["do"] == "train")
        answer = {"flops": sum(2 * rows * out * into for rows, out, into, _, _ in needed)}
        ways = {"torch": (F.linear, "plain"), "onednn": (onednn, "plain"), "packed": (onednn, "packed")}
        for name, (product, kind) in ways.items():
            answer[f"{name}_s"] = self.seconds(needed, product, kind)
        answer["fastest_s"] = min(answer[f"{name}_s"] for name in ("torch", "onednn", "packed"))
        return answer | ({"bf16_s": self.seconds(needed, onednn, "bf16")} if request.get("bf16") else {})


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, 512)  # a layout chosen for so many rows
