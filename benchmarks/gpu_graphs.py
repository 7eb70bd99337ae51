"""The stage `graphs` of gpu.sh: training steps as CUDA graphs beside the same steps without, and the peer's.

`same` rows train twice from one start, with graphs and without, and compare losses and trained parameters. `time` rows
train on a stream of batches whose lengths are drawn anew for each, as in a run: milliseconds a step over the stream,
with recording, and then over the same stream again, when every shape that came twice has been recorded.
"""

import copy
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_speed
import torch
from common import draw_lengths, spread
from gpu_speed import BLOCK, DTYPES, D, L, R, X, build, counts, draw, held, wait
from sides import Side
from torch import Tensor

from lora_nlu.training.graphs import GraphedSteps, logger

STREAM = 200  # steps
STEPS = 20  # of a `same` row


@dataclass(frozen=True)
class Work(gpu_speed.Work):
    """One row; `do` is "time", "same" or "failure"."""

    dropout: float = 0.1

    @property
    def name(self) -> str:
        return super().name + ("" if self.do == "time" else f" dropout {self.dropout:g}")


WORKS = [
    Work("same", R, "sst2", 16, "fp32", 0.0),
    *(Work("time", model, task, 16) for model in (R, D) for task in ("sst2", "rte")),
    Work("same", R, "sst2", 16, "bf16"),
    *(Work("same", D, "sst2", 16, precision, p) for precision, p in (("fp32", 0.0), ("bf16", 0.1))),
    *(Work("time", model, task, 16) for model in (R, D) for task in ("mnli-like", "equal-128")),
    *(Work("time", model, "mnli-like", 128) for model in (R, D)),
    *(Work("time", model, "rte", 16) for model in (L, X)),
    *(Work("time", model, "sst2", 16, "fp32") for model in (R, D)),
    *(Work("time", model, "rte", 16, "fp32") for model in (R, D)),
    *(Work("time", model, "sst2", 128) for model in (R, D)),
    Work("same", X, "sst2", 16, "bf16"),
    Work("failure", R, "sst2", 16),  # last: it may leave torch in a state that nothing recovers from
]
SMOKE = [
    Work("time", "tiny roberta", "sst2", 4),
    Work("same", "tiny deberta", "sst2", 4, "fp32", 0.0),
    Work("failure", "tiny roberta", "sst2", 4),
]


class Graphed(Side):
    """As `Side`, by CUDA graphs; with `record=False`, the same steps of fixed sizes without graphs."""

    def __init__(self, model: torch.nn.Module, pad: int, dtype: torch.dtype | None, record: bool = True) -> None:
        super().__init__(model, pad)
        self.dtype = dtype
        limit = model.config.max_position_embeddings - pad - 1  # type: ignore[operator, union-attr]
        self.steps = GraphedSteps(model, self.loss_of, limit, pad, dtype)
        self.steps.has_failed = not record
        self.recording = 0.0
        record_step = self.steps._record

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            recorded = record_step(*arguments)
            self.recording += time.perf_counter() - start
            if recorded is None:  # torch's memory is left as if it were still recording
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.steps.pool)
            return recorded

        self.steps._record = timed  # type: ignore[method-assign]

    def loss_of(self, inputs: dict[str, Any]) -> Tensor:
        device = inputs["input_ids"].device.type
        with torch.autocast(device, dtype=self.dtype) if self.dtype else nullcontext():
            return self.model(**inputs).loss

    def train(self, batch: dict[str, Any], autocast: torch.dtype | None = None) -> Tensor:
        if not self.model.training:
            self.model.train()
        loss = self.steps.step(batch)
        assert loss is not None
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def work(stage: Any, smoke: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    measures = {"time": timed_row, "same": same_row, "failure": failure_row}
    rows = SMOKE if smoke else WORKS
    logging.basicConfig()
    logger.setLevel(logging.DEBUG)  # with the traceback of a step that can't be recorded
    return [(row.name, partial(measures[row.do], row, stage.device, 12 if smoke else STREAM)) for row in rows]


def release(device: torch.device) -> int:
    """Give back memory that no tensor uses; the bytes that torch still holds, from where its peak counts anew."""
    if device.type != "cuda":
        return 0
    wait(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def run(side: Side, batches: list[dict[str, Any]], dtype: torch.dtype | None) -> list[float]:
    """Milliseconds a step of each block of steps that follow each other without a wait."""
    device, taken = batches[0]["input_ids"].device, []
    for first in range(0, len(batches), BLOCK):
        wait(device)
        start, steps = time.perf_counter(), batches[first : first + BLOCK]
        for batch in steps:
            side.train(batch, dtype)
        wait(device)
        taken.append(1000 * (time.perf_counter() - start) / len(steps))
    return taken


def timed_row(row: Work, device: torch.device, count: int) -> dict[str, Any]:
    if row.batch > 16 or row.model in (L, X):
        count = min(count, 100 if row.model != X else 60)
    batches, dtype = draw(row, device, count), DTYPES[row.precision]
    sizes = [draw_lengths(row.task, row.batch, n) for n in range(count)]
    result: dict[str, Any] = {
        "steps": count,
        "real_tokens": statistics.mean(map(sum, sizes)),
        "padded_tokens": statistics.mean(max(n) * len(n) for n in sizes),
    }
    for name in ("peer", "eager", "graphed"):
        side = build("peer" if name == "peer" else "ours", row.model, device)
        before = release(device)
        if name == "graphed":
            side = Graphed(side.model, side.pad, dtype)
        if isinstance(side, Graphed):
            start = time.perf_counter()
            run(side, batches, dtype)
            result["with_recording_ms"] = 1000 * (time.perf_counter() - start) / count
            result |= {"graphs": len(side.steps.recorded), "recording_s": side.recording}
            result |= {"shapes": len(side.steps.seen), "failed": side.steps.has_failed}
            replays = side.steps.replays
            taken = run(side, batches, dtype)
            result["replayed"] = (side.steps.replays - replays) / count
        else:
            run(side, batches[: 2 * BLOCK], dtype)  # warm-up
            taken = run(side, batches[: 6 * BLOCK], dtype)
        result[f"{name}_ms"] = spread(taken)
        if device.type == "cuda":
            rise = torch.cuda.max_memory_reserved(device) - before
            result[f"{name}_mib"] = (held(side) + rise) / 2**20
        if name == "graphed" and row.task in ("sst2", "rte") and row.batch == 16:
            try:
                with_counts = counts(side, batches[: 2 * BLOCK], dtype)
                result["counts"] = {key: with_counts[key] for key in ("launches", "device_ms", "waits", "longest")}
            except Exception as e:  # a profiler that can't look into a graph
                result["counts_error"] = f"{type(e).__name__}: {e}"[:200]
        del side
        gpu_release()
    ms = {name: result[f"{name}_ms"]["median"] for name in ("peer", "eager", "graphed")}
    return result | {"times_as_fast": ms["peer"] / ms["graphed"], "against_eager": ms["eager"] / ms["graphed"]}


def gpu_release() -> None:
    from gpu import release

    release()


def same_row(row: Work, device: torch.device, count: int) -> dict[str, Any]:
    """Trained from one start: plain steps, steps of fixed size, and graphs. The last two should agree bit for bit."""
    dtype, batches = DTYPES[row.precision], draw(row, device, 5)
    start = build("ours", row.model, device)
    for module in start.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = row.dropout
    losses: dict[str, list[float]] = {}
    trained: dict[str, list[Tensor]] = {}
    differ = None
    for name in ("plain", "fixed", "again", "graphed"):
        model = copy.deepcopy(start.model)
        side = Plain(model, start.pad) if name == "plain" else Graphed(model, start.pad, dtype, name == "graphed")
        for group in side.optimizer.param_groups:
            group["lr"] = 1e-3
        torch.manual_seed(1)
        losses[name] = [float(side.train(batches[n % len(batches)], dtype)) for n in range(min(STEPS, 2 * count))]
        trained[name] = [p.detach().clone() for p in side.trained]
        if isinstance(side, Graphed) and name == "graphed":
            graphs, replays = len(side.steps.recorded), side.steps.replays
            pair = []
            for _ in range(2):  # dropout of two replays
                pair.append(float(side.steps.step(batches[0])))  # type: ignore[arg-type]
                side.optimizer.zero_grad()
            differ = pair[0] != pair[1]
        del side, model
        gpu_release()

    def apart(one: str, other: str) -> dict[str, float]:
        loss = max(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))
        pairs = zip(trained[one], trained[other], strict=True)
        return {"loss": loss, "parameters": max(float((a - b).abs().max()) for a, b in pairs)}

    fixed, plain = apart("fixed", "graphed"), apart("plain", "graphed")
    again = apart("fixed", "again")  # what the device itself does not repeat
    ok = fixed["parameters"] <= 4 * again["parameters"] and differ == (row.dropout > 0)
    if row.dropout == 0 and row.precision == "fp32":
        ok &= plain["loss"] < 1e-4 and plain["parameters"] < 1e-4
    return {
        "ok": ok, "fixed": fixed, "again": again, "plain": plain, "replays_differ": differ, "graphs": graphs,
        "replays": replays, "losses": losses,
        "mean_loss": {name: statistics.mean(values) for name, values in losses.items()},
    }  # fmt: skip


class Plain(Side):
    """As `Side`, and a step returns its loss."""

    def train(self, batch: dict[str, Any], autocast: torch.dtype | None = None) -> Tensor:
        seen: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda module, inputs, output: seen.append(output.loss.detach()))
        super().train(batch, autocast)
        handle.remove()
        return seen[0]


def failure_row(row: Work, device: torch.device, count: int) -> dict[str, Any]:
    """A step that can't be recorded, because it waits for the device, trains all the same, and so do those after it."""
    batches, dtype = draw(row, device, 2), DTYPES[row.precision]
    side = build("ours", row.model, device)
    side = Graphed(side.model, side.pad, dtype)
    side.train(batches[0])
    side.train(batches[0])  # recorded
    compute = side.loss_of
    side.steps.loss_of = lambda inputs: compute(inputs) * float(compute(inputs) * 0 + 1)
    fewer = {name: x[1:] for name, x in batches[1].items()}  # a shape that is not recorded yet
    losses = [float(side.train(fewer)) for _ in range(4)]
    ok = all(0 < loss < 10 for loss in losses) and (device.type != "cuda" or side.steps.has_failed)
    return {"ok": ok, "losses": losses, "graphs": len(side.steps.recorded)}


def failures(rows: dict[str, Any]) -> list[str]:
    found = [f"{name}: {row['error']} {row.get('where', '')}" for name, row in rows.items() if "error" in row]
    found += [f"{name}: a step could not be recorded" for name, row in rows.items() if row.get("failed")]
    return found + [f"{name}: {json.dumps(row)}" for name, row in rows.items() if not row.get("ok", True)]


def line(name: str, row: dict[str, Any]) -> str:
    if "graphed_ms" not in row:
        return f"{name}: {json.dumps({key: x for key, x in row.items() if key != 'losses'})}"
    found = ", ".join(f"{key} {row[f'{key}_ms']['median']:.1f} ms" for key in ("graphed", "eager", "peer"))
    return (
        f"{name}: {row['times_as_fast']:.2f} times as fast; {found}; with recording {row['with_recording_ms']:.1f} ms; "
        f"{row['graphs']} graphs of {row['shapes']} shapes in {row['recording_s']:.1f} s, {row['replayed']:.0%} replays"
    )


def summary(rows: dict[str, Any]) -> str:
    return table(rows)


HEADER = """| model | lengths | batch | precision | graphs, ms | with recording, ms | eager, ms | peer, ms \
| peer / graphs | eager / graphs | graphs of shapes | memory, MiB: graphs, eager, peer |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
SAME = """| trained with and without graphs | loss apart, parameters apart | from plain steps | two replays differ \
| as expected |
|---|---|---|---|---|"""


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown; memory is weights, optimizer, and what torch reserved beyond them."""
    timed, same, missing = [], [], []
    for row in dict.fromkeys(WORKS + SMOKE):
        got = rows.get(row.name)
        if got is None or "error" in got:
            missing += [row.name] if row in WORKS else []
        elif "graphed_ms" in got:
            graphed, eager, peer = (got[f"{name}_ms"]["median"] for name in ("graphed", "eager", "peer"))
            memory = ", ".join(f"{got.get(f'{name}_mib', 0):.0f}" for name in ("graphed", "eager", "peer"))
            timed.append(
                f"| {row.model} | {row.task} | {row.batch} | {row.precision} | {graphed:.1f} | "
                f"{got['with_recording_ms']:.1f} | {eager:.1f} | {peer:.1f} | {got['times_as_fast']:.2f} | "
                f"{got['against_eager']:.2f} | {got['graphs']} of {got['shapes']} | {memory} |"
            )
        elif "fixed" in got:
            apart, plain = ("{loss:.1e}, {parameters:.1e}".format_map(got[key]) for key in ("fixed", "plain"))
            differ, ok = ("yes" if got[key] else "no" for key in ("replays_differ", "ok"))
            same.append(f"| {row.name} | {apart} | {plain} | {differ} | {ok} |")
    parts = ["\n".join([header, *lines]) for header, lines in ((HEADER, timed), (SAME, same)) if lines]
    if missing and any(row.name in rows for row in WORKS):
        parts.append("Not measured: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)
