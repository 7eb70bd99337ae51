"""Ours on a GPU beside transformers + PEFT: numbers against float64, milliseconds and memory of a training step.

    bash benchmarks/gpu.sh [STAGE ...] [--output DIR] [--seconds N] [--only TEXT] [--smoke] [--data DIR]

Writes each row to DIR/STAGE.json as soon as it is measured, and the tables of all rows to DIR/gpu.md. A row that is in
the file already is not measured again, so an interrupted stage goes on with the next one. Exits with 1 if a row of
`numerics` or `attention` is not within its bound, or a row raised an error.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "peft", "sklearn", "scipy")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"gpu.py needs these packages, which {sys.executable} does not have: {', '.join(missing)}.")

import torch  # noqa: E402
from common import RESULTS, machine  # noqa: E402

# seconds that a stage may take
STAGES = {"numerics": 200, "attention": 400, "speed": 400, "graphs": 400, "finetune": 400}
MARGIN = 5.0  # seconds before the limit after which no row starts


class Stage:
    """The rows of one stage by name, in a file, and how much time is left for more."""

    def __init__(
        self, name: str, output: Path, seconds: float, only: str, device: torch.device, data: Path | None
    ) -> None:
        self.module: Any = import_module(f"gpu_{name}")
        self.path, self.only, self.device = output / f"{name}.json", only, device
        self.data = data  # of `finetune`
        self.end = time.monotonic() + seconds
        self.rows: dict[str, Any] = {}
        self.load()

    def load(self) -> None:
        """Read the rows that are in the file."""
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def seconds_left(self) -> float:
        return self.end - time.monotonic() - MARGIN

    def run(self, work: list[tuple[str, Callable[[], dict[str, Any]]]]) -> None:
        """Measure the rows that are missing, or raised an error before, while there is time."""
        for name, measure in work:
            if self.only not in name or "error" not in self.rows.get(name, {"error": ""}):
                continue
            if self.seconds_left() < 0:
                print(f"not measured (no time left): {name}")
                continue
            start = time.monotonic()
            try:
                row = measure()
            except Exception as e:  # an error of one row must not end the others
                row = {"error": f"{type(e).__name__}: {e}".strip().splitlines()[0][:300], "where": where(e)}
                if "CUDA error" in str(e):  # nothing works in this process any more
                    self.add(name, row, start)
                    raise SystemExit(
                        f"{name}: {row['error']} ({row['where']}). Run it again for the other rows."
                    ) from e
                release()
            self.add(name, row, start)

    def add(self, name: str, row: dict[str, Any], start: float) -> None:
        self.load()  # a row of a process of its own
        if row:
            self.rows[name] = row
        if text := self.module.line(name, self.rows[name]):
            print(f"{text} ({time.monotonic() - start:.1f} s)", flush=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"machine": on_device(self.device), "rows": self.rows}, indent=1) + "\n")
        os.replace(unfinished, self.path)


def where(error: BaseException) -> str:
    """The last places of this repository in an error's traceback: file:line, innermost last."""
    places, trace = [], error.__traceback__
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if "lora_nlu" in path.parts or path.parent.name == "benchmarks":
            places.append(f"{path.name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(places[-4:])


def release() -> None:
    """Give memory that no tensor uses back to the device."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_device(device: torch.device) -> dict[str, Any]:
    """The machine, and the device that did the work."""
    about = machine(torch.get_num_threads())
    del about["dtype"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        about |= {"cuda": torch.version.cuda, "capability": f"{properties.major}.{properties.minor}"}
    else:
        about["device"] = device.type
    return about


def tables(output: Path) -> Iterator[str]:
    """The Markdown tables of the stages that have rows."""
    for name in STAGES:
        path = output / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            about = content["machine"]
            versions = ", ".join(f"{key} {about[key]}" for key in ("torch", "transformers", "peft"))
            table = import_module(f"gpu_{name}").table(content["rows"])
            yield f"## {name}\n\n{about['device']}; {versions}.\n\n{table}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; default: all, in order")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder of the results")
    parser.add_argument("--seconds", type=float, help="how long a stage may take; its other rows are then listed")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this text")
    parser.add_argument("--data", type=Path, help="of finetune: a folder with encoder/, train.csv and dev.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny models, few rows: whether the code runs")
    parser.add_argument("--device", help="default: cuda; with --smoke: cuda where there is one, else cpu")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.stages if name not in STAGES]:
        parser.error(f"unknown stage {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    device = torch.device(args.device or ("cuda" if has_gpu or not args.smoke else "cpu"))
    if device.type == "cuda" and not has_gpu:
        parser.error(f"torch {torch.__version__} finds no CUDA device. On a CPU: --smoke")
    # products in fp32 are of fp32 numbers; torch's convolution would round them to TF32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    has_failed = False
    for name in args.stages or [name for name in STAGES if name != "finetune" or args.data]:
        start = time.monotonic()
        print(f"== {name} on {device}", flush=True)
        stage = Stage(name, args.output, args.seconds or STAGES[name], args.only, device, args.data)
        stage.run(stage.module.work(stage, args.smoke))
        print(f"== {name} took {time.monotonic() - start:.0f} s\n\n{stage.module.summary(stage.rows)}", flush=True)
        for line in stage.module.failures(stage.rows):
            has_failed = True
            print(f"LOOK: {line}")
        (args.output / "gpu.md").write_text("\n".join(tables(args.output)))
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
