"""The stage `finetune` of gpu.sh: run_glue.py on real sentences, by CUDA graphs and without, in bf16 and fp32.

`--data` names a folder with encoder/ (config.json, model.safetensors, tokenizer), train.csv and dev.csv, such as the
.demo of scripts/demo.sh. Each row is a process of its own: accuracy, and seconds of training and from start to end.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

PROGRAM = Path(__file__).parents[1] / "examples" / "text-classification" / "run_glue.py"
RECIPE = """
    --apply_lora --lora_r 8 --lora_alpha 16 --do_train --do_eval --max_seq_length 128 --learning_rate 1e-3
    --per_device_train_batch_size 32 --per_device_eval_batch_size 64 --warmup_steps 0.06 --weight_decay 0.1 --seed 0
    --eval_strategy no --save_strategy no --logging_steps 20 --report_to none --disable_tqdm true
    """.split()
PRECISIONS = {"bf16": ["--bf16"], "fp32": []}
LIMIT = 150.0  # seconds of one row


def work(stage: Any, smoke: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    rows = [(precision, graphs, 1) for precision in PRECISIONS for graphs in ("graphs", "plain")]
    rows += [] if smoke else [("bf16", graphs, 2) for graphs in ("graphs", "plain")]
    return [
        (f"{precision}, {graphs}, {epochs} epoch", partial(measure, stage, smoke, precision, graphs, epochs))
        for precision, graphs, epochs in rows[: 1 if smoke else None]
    ]


def measure(stage: Any, smoke: bool, precision: str, graphs: str, epochs: int) -> dict[str, Any]:
    if stage.data is None:
        return {"error": "--data is needed: a folder with encoder/, train.csv and dev.csv"}
    data = stage.data.resolve()
    with TemporaryDirectory(prefix="gpu_finetune_") as folder:
        files = [
            "--train_file",
            data / "train.csv",
            "--validation_file",
            data / "dev.csv",
            "--cache_dir",
            Path(gettempdir(), "gpu_finetune_cache"),
        ]
        command = [sys.executable, PROGRAM, "--model_name_or_path", data / "encoder", *files, *RECIPE]
        command += [*PRECISIONS[precision], "--num_train_epochs", epochs, "--output_dir", f"{folder}/run"]
        command += [
            "--cuda_graphs",
            str(graphs == "graphs").lower(),
            "--use_cpu",
            str(stage.device.type == "cpu").lower(),
        ]
        command += ["--max_train_samples", "64", "--max_eval_samples", "64"] if smoke else []
        start = time.monotonic()
        limit = max(min(LIMIT, stage.seconds_left()), 10.0)
        try:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not finished within {limit:.0f} s"}
        seconds = time.monotonic() - start
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "CUDA graph" in line]
        if done.returncode:
            return {"error": (done.stderr.strip() or done.stdout.strip())[-1500:]}
        output = Path(folder, "run")
        results = json.loads((output / "all_results.json").read_text())
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    names = ("eval_accuracy", "eval_loss", "train_loss", "train_runtime", "train_steps_per_second", "eval_runtime")
    return {
        **{name: results.get(name) for name in names},
        "peak_gpu_memory_gib": results.get("peak_gpu_memory_gib"),
        "seconds": seconds,
        "elapsed_s": [entry["elapsed_s"] for entry in history if "loss" in entry],
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "graph_lines": lines[:5],
    }


def failures(rows: dict[str, Any]) -> list[str]:
    found = [f"{name}: {row['error']}" for name, row in rows.items() if "error" in row]
    return found + [f"{name}: {text}" for name, row in rows.items() for text in row.get("graph_lines", ())]


def line(name: str, row: dict[str, Any]) -> str:
    return f"{name}: {json.dumps({key: x for key, x in row.items() if key not in ('losses', 'elapsed_s')})}"


def summary(rows: dict[str, Any]) -> str:
    return table(rows)


HEADER = """| run | accuracy | loss of training | training, s | steps a second | ms a step at the end | all, s |
|---|---|---|---|---|---|---|"""


def table(rows: dict[str, Any]) -> str:
    lines = [HEADER]
    for name, row in rows.items():
        if "error" not in row:
            elapsed = row["elapsed_s"]
            last = elapsed[-min(len(elapsed), 6) :]  # logged every 20 steps
            ms = f"{1000 * (last[-1] - last[0]) / (20 * (len(last) - 1)):.1f}" if len(last) > 1 else ""
            lines.append(
                f"| {name} | {row['eval_accuracy']:.4f} | {row['train_loss']:.4f} | {row['train_runtime']:.1f} | "
                f"{row['train_steps_per_second']:.1f} | {ms} | {row['seconds']:.0f} |"
            )
    return "\n".join(lines)
