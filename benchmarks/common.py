"""What the benchmarks share: batches of real lengths, the processes that are compared, tables and files."""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# DeBERTa-v2-xxlarge as the Hub's config.json has it
XXLARGE: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
# RTE's lengths, shortened to MNLI's mean of 40 tokens; MNLI's files were not at hand
SCALED = {"mnli-like": ("rte", 40 / 70)}
FIXED = "equal-"  # workloads of this name have sequences of so many tokens each


def draw_lengths(workload: str, batch: int, seed: int) -> list[int]:
    """Token counts of a random batch of a task's training pairs, or of `equal-64`, sequences of 64 tokens."""
    if workload.startswith(FIXED):
        return [int(workload.removeprefix(FIXED))] * batch
    if workload in SCALED:
        task, factor = SCALED[workload]
        return [max(round(factor * n), 3) for n in draw_lengths(task, batch, seed)]
    histogram = json.loads((HERE / "lengths.json").read_text())[workload]
    return random.Random(f"{workload} {seed}").choices([int(n) for n in histogram], list(histogram.values()), k=batch)


class Worker:
    """A process of worker.py, of another source tree with `tree`; `ready` waits until its model is built."""

    threads: int  # of torch in it

    def __init__(
        self, side: str, model: str, *layers: str, threads: int | None = None, tree: Path = HERE.parent
    ) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(tree / "src")}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            [sys.executable, str(tree / "benchmarks" / "worker.py"), side, model, *layers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ready(self) -> "Worker":
        self.threads = self._read()["ready"]
        return self

    def _read(self) -> dict:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(self.process.communicate()[1])

    def ask(self, **request: Any) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def workers(model: str, *sides: str, earlier: Path | None = None) -> Iterator[list[Worker]]:
    """A process for each side; the side `earlier` is ours as the source tree in that folder has it."""
    started = []
    try:
        for side in sides:
            is_earlier = side == "earlier" and earlier is not None
            started.append(Worker("ours", model, tree=earlier) if is_earlier else Worker(side, model))
        yield [worker.ready() for worker in started]
    finally:
        for worker in started:
            worker.close()


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this text; nothing is then written to file")
    parser.add_argument("--smoke", action="store_true", help="tiny models and counts, to try the program")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def write_results(args: argparse.Namespace, name: str, results: Any) -> None:
    """Write NAME.json, unless rows are left out."""
    if not args.only and not (args.smoke and args.output == RESULTS):
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def machine(threads: int, dtype: str = "fp32") -> dict[str, Any]:
    """What a figure must be read with."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    import torch

    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"cpu": cpu, "isa": torch.backends.cpu.get_cpu_capability(), "threads": threads, "dtype": dtype} | packages
