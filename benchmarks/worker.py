"""One side of a comparison, in a process of its own: answers each JSON line on stdin with one on stdout.

    python benchmarks/worker.py SIDE MODEL [LAYERS]     # SIDE: ours, peer, limit or ours-without-LEVER

MODEL is a name in MODELS of sides.py, LEVER a key of LEVERS.

A request says what to do (`train`, `evaluate` or `memory`), the token counts of a batch's sequences (`lengths`), the
length they are padded to (`padded`; 0 = the longest) and a seed; the answer holds the seconds it took, or bytes.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Warnings and progress go to stderr; nothing but answers may reach stdout.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from sides import Side, build_ours, build_peer, configure, make_batch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

# Which attribute of ours to put back to what stood there before; each is the plain torch expression.
LEVERS: dict[str, list[tuple[str, Any]]] = {
    "onednn": [("ops.kernels.has_onednn", lambda: False)],
    "kernels": [("ops.kernels.library", lambda: None)],
    "attention": [
        ("models.modeling_roberta.attention", lambda *a: None),
        ("models.modeling_deberta_v2.attention", lambda *a: None),
    ],
    "low-rank": [("ops.kernels.can_add_update", lambda *a: False)],
    "dropout": [("ops.kernels.dropout", F.dropout)],
}


def pull(lever: str) -> None:
    for path, value in LEVERS[lever]:
        module, name = path.rsplit(".", 1)
        setattr(importlib.import_module(f"lora_nlu.{module}"), name, value)


class TimedSide(Side):
    """A side that answers requests."""

    def answer(self, request: dict) -> dict:
        batch = make_batch(request["lengths"], request["padded"], request["seed"], self.pad)
        if request["do"] != "memory":
            start = time.perf_counter()
            getattr(self, request["do"])(batch)
            return {"seconds": time.perf_counter() - start}
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
        for seed in range(request["steps"]):
            self.train(make_batch(request["lengths"], request["padded"], seed, self.pad))
        return {"weights_bytes": before, "peak_bytes": status("VmHWM")}


def status(field: str) -> int:
    """Bytes of a field of this process's /proc status."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field + ":"))
    return 1024 * int(line.split()[1])


# ------------------------------------------------------------------------------------------------------- the limit


def products(config: Any, tokens: int, sequences: int, train: bool) -> list[tuple[int, int, int, int, bool]]:
    """(rows, out, in, which weight of this shape, transposed) of a step's dense products in the encoder, in order.

    What can be left out without changing a number is left out: the last layer's work on all but first tokens, gradients
    into what is frozen. LoRA's own products, attention and the heads, about 2 %, are not counted.
    """
    H, I, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # noqa: E741
    kernel = getattr(config, "conv_kernel_size", 0)
    forward: list[tuple[int, int, int, int, bool]] = []
    backward: list[tuple[int, int, int, int, bool]] = []
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
    """Seconds that a step's dense products take alone, by torch's own matmul and by the fastest this build has.

    Every layer has weights of its own, as in the model: they come from memory, not from the cache.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.weights: dict[tuple[int, int, int], Tensor] = {}

    def answer(self, request: dict) -> dict:
        lengths = request["lengths"]
        needed = products(self.config, sum(lengths), len(lengths), request["do"] == "train")
        numbers = torch.randn(max(rows * max(out, into) for rows, out, into, _, _ in needed))
        calls = []
        for rows, out, into, place, transposed in needed:
            if (out, into, place) not in self.weights:
                self.weights[out, into, place] = torch.randn(out, into)
            weight = self.weights[out, into, place]
            x = numbers[: rows * (out if transposed else into)].view(rows, -1)
            calls.append((x, weight.t() if transposed else weight))
        times = []
        for product in (F.linear, onednn):
            for x, weight in calls[:6]:  # a layer's forward, not counted
                product(x, weight)
            start = time.perf_counter()
            for x, weight in calls:
                product(x, weight)
            times.append(time.perf_counter() - start)
        flops = sum(2 * rows * out * into for rows, out, into, _, _ in needed)
        return {"flops": flops, "torch_s": times[0], "fastest_s": min(times)}


def onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def main() -> None:
    side, name, *layers = sys.argv[1:]
    torch.manual_seed(0)
    config = configure(name, int(layers[0]) if layers else None)
    pad = config.pad_token_id
    worker: Any
    if lever := side.removeprefix("ours-without-") if side.startswith("ours-without-") else "":
        pull(lever)
    if side == "limit":
        worker = Limit(config)
    else:
        worker = TimedSide(build_peer(config) if side == "peer" else build_ours(config), pad)
    print(json.dumps({"ready": torch.get_num_threads()}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
