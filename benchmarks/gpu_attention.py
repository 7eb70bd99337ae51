"""The stage `attention` of gpu.sh: attention on packed rows (lora_nlu/ops/packed_attention.py) against that on a grid.

`equal` rows compare context and gradients with float64, dropout's mask by its definition, and repeat the work, which
must give the same bits, where it is not torch's: blocks that race would not. `step` rows time whole training steps of
ours with these functions and without, as CUDA graphs and one operation at a time, in turn. On a CPU (--smoke) Triton's
interpreter runs them, if TRITON_INTERPRET=1 is set.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_graphs
import torch
from common import spread
from gpu_graphs import Graphed, gpu_release, run
from gpu_graphs import release as release_memory
from gpu_speed import DTYPES, D, L, R, Work, X, build, draw, held
from torch import Tensor

from lora_nlu.ops import kernels

HEADS, VIEWS, REPEATS = 2, 2, 3
BOTH = "c2p|p2c"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BOUNDS = {"fp32": 2e-6, "bf16": 5e-2, "fp16": 2e-3}


@dataclass(frozen=True)
class Equal:
    """One row: attention alone, with what and of which heads."""

    precision: str
    size: int
    tables: str  # of relative positions, as DeBERTa's pos_att_type
    p: float
    first_tokens: bool = False
    lengths: tuple[int, ...] = (1, 7, 64, 65, 129, 300, 17, 128)

    @property
    def name(self) -> str:
        queries = "first tokens" if self.first_tokens else "all tokens"
        return (
            f"equal {self.precision}, heads of {self.size}, {self.tables or 'no'} table, dropout {self.p:g}, {queries}"
        )


EQUALS = [
    Equal(precision, size, tables, p, first)
    for precision in PRECISIONS
    for size, tables, p, first in (
        (64, "", 0.0, False), (64, "", 0.1, False), (64, BOTH, 0.1, False), (64, BOTH, 0.0, True),
        (32, "", 0.1, True), (128, BOTH, 0.1, False), (24, "c2p", 0.1, False), (64, "p2c", 0.1, False),
    )
]  # fmt: skip
STEPS = [
    *(Work("step", model, task, 16) for model in (R, D) for task in ("rte", "sst2")),
    *(Work("step", model, "mnli-like", 128) for model in (R, D)),
    *(Work("step", model, "equal-128", 16) for model in (R, D)),
    *(Work("step", model, "rte", 16) for model in (L, X)),
    *(Work("step", model, "rte", 16, "fp32") for model in (R, D)),
]
SMOKE = [Equal("fp32", 16, BOTH, 0.1, lengths=(1, 33)), Work("step", "tiny deberta", "sst2", 2, "fp32")]


def work(stage: Any, smoke: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: nothing to measure")
        return []
    if stage.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("no GPU: set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
        return []
    measures = {Equal: equal, Work: partial(step, count=1 if smoke else 100)}
    rows = SMOKE if smoke else [*EQUALS, *STEPS]
    return [(row.name, partial(measures[type(row)], row, stage.device)) for row in rows]


@contextmanager
def turned(on: bool) -> Iterator[None]:
    """With LORA_NLU_PACKED_ATTENTION on or off."""
    before = os.environ.get("LORA_NLU_PACKED_ATTENTION", "0")
    os.environ["LORA_NLU_PACKED_ATTENTION"] = str(int(on))
    kernels.packed_attention.cache_clear()
    try:
        yield
    finally:
        os.environ["LORA_NLU_PACKED_ATTENTION"] = before
        kernels.packed_attention.cache_clear()


def equal(row: Equal, device: torch.device) -> dict[str, Any]:
    from lora_nlu.ops import packed_attention

    generator = torch.Generator().manual_seed(0)
    dtype, longest, width = PRECISIONS[row.precision], max(row.lengths) + 3, HEADS * row.size
    keys = [0, *torch.tensor(row.lengths).cumsum(0).tolist()]
    queries = list(range(len(keys))) if row.first_tokens else keys
    views = [n % VIEWS for n in range(len(row.lengths))]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [random(queries[-1], width), random(keys[-1], width), random(keys[-1], width)]
    tables = [random(VIEWS, 2 * longest - 1, width) if kind in row.tables else None for kind in ("c2p", "p2c")]
    grad, threshold = random(queries[-1], width), kernels.threshold(row.p)
    scale = (row.size * (3 if row.tables else 1)) ** -0.5
    starts: Any = tuple(torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys, views))
    found = []
    for _ in range(REPEATS):
        torch.manual_seed(1)
        moved = [x.to(device).requires_grad_() for x in inputs]
        on_device = [None if x is None else x.to(device) for x in tables]
        out = packed_attention.attend(*moved, starts, longest, HEADS, scale, threshold, *on_device)
        found.append([out, *torch.autograd.grad(out, moved, grad.to(device))])
    torch.manual_seed(1)
    seed = int(torch.randint(2**62, (1,), device=device)) if threshold else 0
    kept = packed_attention.kept(seed, queries[-1], HEADS, longest, threshold) / (1 - threshold / 65536)
    exact = [x.double().requires_grad_() for x in inputs]
    out = plain(exact, [None if x is None else x.double() for x in tables], queries, keys, views, longest, scale, kept)
    true = [out, *torch.autograd.grad(out, exact, grad.double())]
    errors = [((x.cpu().double() - y).norm() / y.norm()).item() for x, y in zip(found[0], true, strict=True)]
    repeats = all(torch.equal(x, y) for again in found[1:] for x, y in zip(found[0], again, strict=True))
    # torch's adds gradients of queries in any order
    is_torchs = not threshold and not row.tables and packed_attention.has_torch_kernel(moved[0], HEADS, scale)
    names = ("context", "query", "key", "value")
    return {
        "ok": (repeats or is_torchs) and max(errors) <= BOUNDS[row.precision],
        "repeats": repeats,
        **dict(zip(names, errors, strict=True)),
    }


def plain(
    inputs: list[Tensor], tables: list[Tensor | None], queries: list[int], keys: list[int], views: list[int],
    longest: int, scale: float, kept: Tensor,
) -> Tensor:  # fmt: skip
    """Attention sequence by sequence, written out."""
    query, key, value = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in inputs)  # [A, N, D]
    contexts = []
    for n, view in enumerate(views):
        rows, columns = slice(*queries[n : n + 2]), slice(*keys[n : n + 2])
        q, k, v = query[:, rows], key[:, columns], value[:, columns]
        apart = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] + longest - 1  # [M, L]
        scores = q @ k.mT
        for table, x, form in zip(tables, (q, k), ("aid,ijad->aij", "ajd,ijad->aij"), strict=True):
            if table is not None:
                distances = apart if x is q else 2 * longest - 2 - apart
                scores = scores + torch.einsum(form, x, table[view, distances].unflatten(-1, (HEADS, -1)))
        probs = (scale * scores).softmax(-1) * kept[rows, :, : k.shape[1]].transpose(0, 1)
        contexts.append((probs @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


def step(row: Work, device: torch.device, count: int) -> dict[str, Any]:
    """Milliseconds and memory of a step, with graphs ("graphed") and without ("eager")."""
    batches, dtype = draw(row, device, count), DTYPES[row.precision]
    result: dict[str, Any] = {}
    for way in ("graphed", "eager"):
        for on in (True, False):  # one after the other: torch's memory is told apart only so
            with turned(on):
                side = build("ours", row.model, device)
                before = release_memory(device)
                if way == "graphed":
                    side = Graphed(side.model, side.pad, dtype)
                run(side, batches, dtype)  # compiles
                run(side, batches, dtype)  # records, where a shape came once before
                taken = run(side, batches, dtype)
                name = f"{way} {'packed' if on else 'grid'}"
                result[name] = {"ms": spread(taken)}
                if device.type == "cuda":
                    rise = torch.cuda.max_memory_reserved(device) - before
                    result[name]["mib"] = (held(side) + rise) / 2**20
                del side
            gpu_release()
        medians = [result[f"{way} {name}"]["ms"]["median"] for name in ("grid", "packed")]
        result[f"{way} times as fast"] = medians[0] / medians[1]
    return result


failures = gpu_graphs.failures


def line(name: str, row: dict[str, Any]) -> str:
    if "ok" in row:
        return "" if row["ok"] else f"LOOK: {name}: {json.dumps(row)}"
    return f"{name}: {json.dumps(row)}"


def summary(rows: dict[str, Any]) -> str:
    return table(rows)


HEADER = """| model | lengths | batch | precision | steps | packed, ms | grid, ms | times as fast \
| memory, MiB: packed, grid |
|---|---|---|---|---|---|---|---|---|"""


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown, and whether LORA_NLU_PACKED_ATTENTION=1 is right on this card."""
    equals = {name: row for name, row in rows.items() if name.startswith("equal")}
    wrong = [name for name, row in equals.items() if not row.get("ok")]
    text = f"Packed attention: {len(equals) - len(wrong)} of {len(equals)} comparisons with float64 within their bounds"
    lines = [HEADER]
    for row in [*STEPS, *SMOKE]:
        got = rows.get(row.name, {"error": ""})
        if isinstance(row, Equal) or "error" in got:
            continue
        for way in ("graphed", "eager"):
            packed, grid = got[f"{way} packed"], got[f"{way} grid"]
            lines.append(
                f"| {row.model} | {row.task} | {row.batch} | {row.precision} | {way} | "
                f"{packed['ms']['median']:.1f} | {grid['ms']['median']:.1f} | {got[f'{way} times as fast']:.2f} | "
                f"{packed.get('mib', 0):.0f}, {grid.get('mib', 0):.0f} |"
            )
    return "\n\n".join([text + ("." if not wrong else ": not " + "; ".join(wrong) + "."), "\n".join(lines)])
