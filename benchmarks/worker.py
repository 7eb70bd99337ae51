"""One side of a comparison, in a process of its own: answers each JSON line on stdin with one on stdout.

    python benchmarks/worker.py SIDE MODEL [LAYERS]

SIDE is ours, ours-bf16, peer, peer-bf16, limit or ours-without-LEVER; MODEL a name in MODELS of sides.py; LEVER a key
of LEVERS.

A request says what to do (`train`, `evaluate` or `memory`), the token counts of a batch's sequences (`lengths`), the
length they are padded to (`padded`; 0 = the longest) and a seed; the answer holds the seconds it took, or bytes. The
limit is asked for bf16 too by `bf16`.
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
from limit import Limit  # noqa: E402
from sides import SMALL, Side, configure, make_batch, new_side  # noqa: E402
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

    def __init__(self, name: str, config: Any) -> None:
        self.bytes_before = status("VmRSS")
        model, self.autocast = new_side(name, config)
        super().__init__(model, config.pad_token_id)

    def answer(self, request: dict) -> dict:
        batch = make_batch(request["lengths"], request["padded"], request["seed"], self.pad)
        if request["do"] != "memory":
            start = time.perf_counter()
            getattr(self, request["do"])(batch, self.autocast)
            return {"seconds": time.perf_counter() - start}
        gc.collect()
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
        for seed in range(request["steps"]):
            self.train(make_batch(request["lengths"], request["padded"], seed, self.pad), self.autocast)
        return {"weights_bytes": before - self.bytes_before, "above_weights_bytes": status("VmHWM") - before}


def status(field: str) -> int:
    """Bytes of a field of this process's /proc status."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def main() -> None:
    side, name, *layers = sys.argv[1:]
    torch.manual_seed(0)
    config = configure(name, int(layers[0]) if layers else None)
    worker: Any
    if lever := side.removeprefix("ours-without-") if side.startswith("ours-without-") else "":
        pull(lever)
    if side == "limit":
        worker = Limit(config)
    else:
        kind = "ours" if lever else side
        # libraries and thread pools are no part of the model's memory
        small = configure(name, **SMALL, vocab_size=100)
        TimedSide(kind, small).train(make_batch([4, 4], 0, 0, config.pad_token_id, vocabulary=100))
        gc.collect()
        worker = TimedSide(kind, config)
    print(json.dumps({"ready": torch.get_num_threads()}), file=ANSWERS, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
