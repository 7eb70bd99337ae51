"""The stage `speed` of gpu.sh: milliseconds and memory of a training step, ours and transformers + PEFT in turn.

A step is forward with dropout, loss, backward, clipping and AdamW, on batches that are on the device already; the peer
pads to the longest of the batch. Blocks of steps take turns; the device is waited for at the end of a block alone.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from common import XXLARGE, draw_lengths, spread
from sides import ROBERTA, Side, build_ours, build_peer, make_batch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import DebertaV2Config, RobertaConfig

from lora_nlu.training.graphs import converted, halves_of

BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 500}
MODELS: dict[str, tuple[type, dict]] = {
    "roberta-base": (RobertaConfig, ROBERTA),
    "roberta-large": (RobertaConfig, ROBERTA | LARGE),
    "deberta-v3-base": (DebertaV2Config, XXLARGE | BASE | {"num_hidden_layers": 12, "conv_kernel_size": 0}),
    "deberta-v2-xxlarge": (DebertaV2Config, XXLARGE),
    "tiny roberta": (RobertaConfig, ROBERTA | TINY),
    "tiny deberta": (DebertaV2Config, XXLARGE | TINY),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": None}
BLOCK = 5  # steps that follow each other without a wait
LEAST, MOST, SECONDS = 3, 9, 8.0  # blocks of each side, by how long they take
COMPILING = 110.0  # seconds that a compiled row may take


@dataclass(frozen=True)
class Work:
    """One row: `do` is "time" (both sides), "counts" (of one step, both sides), "compile ours" or "compile peer"."""

    do: str
    model: str
    task: str
    batch: int
    precision: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.do} {self.model} {self.task} B{self.batch} {self.precision}"


R, D, L, X = "roberta-base", "deberta-v3-base", "roberta-large", "deberta-v2-xxlarge"
WORKS = [  # by importance; a profile may slow down what follows it, and compiling takes minutes
    *(Work("time", model, task, 16) for model in (R, D) for task in ("sst2", "rte")),
    *(Work("time", model, task, 128) for model in (R, D) for task in ("mnli-like", "rte", "equal-128")),
    *(Work("time", model, task, 16) for model in (R, D) for task in ("equal-128", "mnli-like")),
    *(Work("time", model, task, 16) for model in (L, X) for task in ("rte", "sst2")),
    *(Work("time", model, task, 16, "fp32") for model in (R, D) for task in ("sst2", "rte", "equal-128")),
    *(Work("counts", model, task, 16) for model in (R, D) for task in ("sst2", "rte")),
    *(Work("time", model, "sst2", 128) for model in (R, D)),
    *(Work("time", model, task, batch) for model, batch in ((L, 128), (X, 16)) for task in ("mnli-like", "equal-128")),
    *(Work("time", L, task, 128) for task in ("rte", "sst2")),
    *(Work("time", model, "rte", 128, "fp32") for model in (R, D)),
    *(Work(f"compile {side}", R, "sst2", 16) for side in ("ours", "peer")),
]
SMOKE = [
    Work("time", "tiny roberta", "sst2", 4),
    Work("time", "tiny deberta", "mnli-like", 2, "fp32"),
    Work("counts", "tiny roberta", "sst2", 4),
]


def work(stage: Any, smoke: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    return [(row.name, partial(measure, row, stage, smoke)) for row in (SMOKE if smoke else WORKS)]


def measure(row: Work, stage: Any, smoke: bool) -> dict[str, Any]:
    if row.do.startswith("compile"):
        return compiled(row, stage.device) if stage.only == row.name else in_process(row, stage)
    both = dict(zip(("ours", "peer"), sides(row.model, stage.device), strict=True))
    batches, dtype = draw(row, stage.device, 2 * BLOCK), DTYPES[row.precision]
    if row.do == "counts":
        return {name: counts(side, batches, dtype) for name, side in both.items()}
    result: dict[str, Any] = {"peer_attention": both["peer"].model.config._attn_implementation}
    for name in list(both):
        try:
            block(both[name], batches, dtype)
        except torch.OutOfMemoryError:
            both.pop(name).optimizer.zero_grad()
            torch.cuda.empty_cache()
            result[f"{name}_error"] = "out of memory"
    taken: dict[str, list[float]] = {name: [] for name in both}
    peaks: dict[str, list[float]] = {name: [] for name in both}
    start = time.monotonic()
    for number in range(1 if smoke else MOST):
        first = BLOCK * (number % 2)
        for name, side in both.items():
            seconds, peak = block(side, batches[first : first + BLOCK], dtype)
            taken[name].append(1000 * seconds)
            peaks[name].append(peak)
        if number + 1 >= LEAST and time.monotonic() - start > SECONDS:
            break
    if len(both) == 2:
        result["times_as_fast"] = spread([b / a for a, b in zip(taken["ours"], taken["peer"], strict=True)])
    for name, side in both.items():
        weights = held(side) / 2**20
        result |= {f"{name}_ms": spread(taken[name]), f"{name}_weights_mib": weights}
        result |= {f"{name}_peak_mib": weights + max(peaks[name]) / 2**20}
    lengths = [draw_lengths(row.task, row.batch, seed) for seed in range(2 * BLOCK)]
    result["real_tokens"] = statistics.mean(map(sum, lengths))
    result["padded_tokens"] = statistics.mean(max(n) * len(n) for n in lengths)
    return result


@lru_cache(maxsize=2)
def sides(model: str, device: torch.device) -> tuple[Side, Side]:
    """Ours and the peer, their random weights drawn on the device."""
    return build("ours", model, device), build("peer", model, device)


def build(side: str, model: str, device: torch.device) -> Side:
    kind, settings = MODELS[model]
    config = kind(**settings, num_labels=2)
    torch.manual_seed(0)
    with device:
        built = (build_ours if side == "ours" else build_peer)(config)
    return (Ours if side == "ours" else WithoutLengths)(built.to(device), config.pad_token_id)


class Ours(Side):
    """A step without a graph as the trainer runs it: frozen weights are converted to half precision once."""

    def __init__(self, model: torch.nn.Module, pad: int) -> None:
        super().__init__(model, pad)
        self.halves: dict[torch.dtype | None, list] = {}

    def train(self, batch: dict[str, Any], autocast: torch.dtype | None = None) -> None:
        if autocast not in self.halves:
            self.halves = {autocast: halves_of(self.model, autocast)}
        with converted(self.halves[autocast]):
            super().train(batch, autocast)


class WithoutLengths(Side):
    """A model that can't be given the lengths of a batch, or one that would be compiled anew for each."""

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return super().loss({name: x for name, x in batch.items() if name != "sequence_lengths"})


def draw(row: Work, device: torch.device, count: int) -> list[dict[str, Any]]:
    """Batches on the device, with the lengths of their sequences, as the trainer has them."""
    vocabulary = MODELS[row.model][1]["vocab_size"]
    pad = 1 if MODELS[row.model][0] is RobertaConfig else 0
    batches = []
    for seed in range(count):
        lengths = draw_lengths(row.task, row.batch, seed)
        batch = make_batch(lengths, 0, seed, pad, min(vocabulary, 50000))
        batches.append({name: x.to(device) for name, x in batch.items()} | {"sequence_lengths": lengths})
    return batches


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def block(side: Side, batches: list[dict[str, Any]], dtype: torch.dtype | None) -> tuple[float, float]:
    """Seconds a step, and the bytes by which the device's memory rose above what was in use before."""
    device = batches[0]["input_ids"].device
    wait(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for batch in batches:
        side.train(batch, dtype)
    wait(device)
    seconds = (time.perf_counter() - start) / len(batches)
    return seconds, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def held(side: Side) -> int:
    """Bytes of a side's parameters, converted ones too, buffers and optimizer states."""
    tensors = [*side.model.parameters(), *side.model.buffers()]
    if isinstance(side, Ours):
        tensors += [half for halves in side.halves.values() for _, half in halves]
    tensors += [x for state in side.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def counts(side: Side, batches: list[dict[str, Any]], dtype: torch.dtype | None) -> dict[str, Any]:
    """Of one step: kernels launched, milliseconds that the device works, and the places that wait for the device."""
    device = batches[0]["input_ids"].device
    block(side, batches[:BLOCK], dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            side.train(batches[-1], dtype)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
    wait(device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as recorded:
        side.train(batches[-2], dtype)
        wait(device)
    events = recorded.key_averages()
    launches = sum(e.count for e in events if e.key.startswith(("cudaLaunch", "cuLaunch")))
    copies = sum(e.count for e in events if e.key.startswith(("cudaMemcpy", "cudaMemset")))
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:8]
    return {
        "launches": launches,
        "copies": copies,
        "device_ms": sum(e.self_device_time_total for e in kernels) / 1000,
        "waits": len(waits),
        "places": dict(places),
        "longest": {e.key[:90]: [e.count, round(e.self_device_time_total / 1000, 3)] for e in longest},
    }


def compiled(row: Work, device: torch.device) -> dict[str, Any]:
    """One side under torch.compile: the seconds of its first steps, which compile, and then milliseconds a step."""
    side = build(row.do.removeprefix("compile "), row.model, device)
    batches, dtype = draw(row, device, 4 * BLOCK), DTYPES[row.precision]
    side = WithoutLengths(torch.compile(side.model), side.pad)  # type: ignore[arg-type]
    start = time.monotonic()
    block(side, batches, dtype)
    first = time.monotonic() - start
    taken = [1000 * block(side, batches[i : i + BLOCK], dtype)[0] for _ in range(2) for i in range(0, 4 * BLOCK, BLOCK)]
    return {"ms": spread(taken), "first_steps_s": first, "recompiles": dict(torch._dynamo.utils.counters["recompiles"])}


def in_process(row: Work, stage: Any) -> dict[str, Any]:
    """A row in a process of its own, which is ended where it takes too long; it writes the row itself."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("gpu.py")), "speed", "--only", row.name]
    command += ["--output", str(stage.path.parent), "--device", str(stage.device), "--seconds", "600"]
    limit = min(max(stage.seconds_left(), 1.0), COMPILING)
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            error = process.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"error": f"not finished within {limit:.0f} s"}
    stage.load()
    if row.name in stage.rows:
        return {}
    lines = error.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
    return {"error": lines[-1][:300]}


def failures(rows: dict[str, Any]) -> list[str]:
    return [f"{name}: {row['error']} {row.get('where', '')}" for name, row in rows.items() if "error" in row]


def line(name: str, row: dict[str, Any]) -> str:
    """What is printed of a row when it is measured."""
    if "real_tokens" not in row:
        return f"{name}: {json.dumps(row)}"
    ratio = f"{row['times_as_fast']['median']:.2f} times as fast" if "times_as_fast" in row else ""
    return f"{name}: {ratio}; ours {milliseconds(row, 'ours')}, peer {milliseconds(row, 'peer')}"


def milliseconds(row: dict[str, Any], side: str) -> str:
    if f"{side}_ms" not in row:
        return row[f"{side}_error"]
    return f"{row[f'{side}_ms']['median']:.1f} ms, {row[f'{side}_peak_mib']:.0f} MiB"


def summary(rows: dict[str, Any]) -> str:
    return table(rows)


HEADER = """| model | lengths | batch | precision | real / padded tokens | ours | peer \
| times as fast (least to most) | memory, ours / peer |
|---|---|---|---|---|---|---|---|---|"""
COUNTED = """| model | lengths | batch | side | kernel launches | copies | device works, ms | waits |
|---|---|---|---|---|---|---|---|"""
COMPILED = """| model | lengths | batch | side | ms a step | first 20 steps, s |
|---|---|---|---|---|---|"""


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown; memory is weights, optimizer and what a step takes above them."""
    timed, counted, done, missing = [], [], [], []
    for row in dict.fromkeys(WORKS + SMOKE):
        got = rows.get(row.name)
        about = f"| {row.model} | {row.task} | {row.batch} |"
        if got is None:
            missing += [row.name] if row in WORKS else []
        elif "error" in got:
            missing.append(f"{row.name} ({got['error']})")
        elif row.do == "time":
            ratio = memory = ""
            if "times_as_fast" in got:
                ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format_map(got["times_as_fast"])
                memory = f"{got['ours_peak_mib'] / got['peer_peak_mib']:.2f}"
            timed.append(
                f"{about} {row.precision} | {got['real_tokens']:.0f} / {got['padded_tokens']:.0f} | "
                f"{milliseconds(got, 'ours')} | {milliseconds(got, 'peer')} | {ratio} | {memory} |"
            )
        elif row.do == "counts":
            for side in ("ours", "peer"):
                n = got[side]
                places = ", ".join(f"{place} x{times}" for place, times in n["places"].items())
                counted.append(
                    f"{about} {side} | {n['launches']} | {n['copies']} | {n['device_ms']:.1f} | "
                    f"{n['waits']}: {places} |"
                )
        else:
            side = row.do.removeprefix("compile ")
            done.append(f"{about} {side} | {got['ms']['median']:.1f} | {got['first_steps_s']:.0f} |")
    parts = []
    for title, header, lines in (("", HEADER, timed), ("One step", COUNTED, counted), ("Compiled", COMPILED, done)):
        if lines:
            parts.append("\n".join([f"### {title}\n"] * bool(title) + [header, *lines]))
    if missing and any(row.name in rows for row in WORKS):
        parts.append("Not measured: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)
