"""Run folders written for tests, and the report on them read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_nlu.errors import UserError
from lora_nlu.report.collect import collect
from lora_nlu.report.tables import (
    write_report,
)

LORA = {"name": "lora", "targets": ["query", "value"], "layers": None, "lora_dropout": 0.0}
HOULSBY, PFEIFFER = {"name": "houlsby", "adapter_size": 8}, {"name": "pfeiffer", "adapter_size": 64}
BITFIT, FULL, HEAD = {"name": "bitfit"}, {"name": "full"}, {"name": "head"}
METRICS = {"cola": "matthews_correlation", "stsb": "pearson"}  # of the others accuracy
HEADINGS = {  # in the order of the paper's columns
    "mnli": "MNLI accuracy", "sst2": "SST-2 accuracy", "mrpc": "MRPC accuracy", "cola": "CoLA Matthews",
    "qnli": "QNLI accuracy", "qqp": "QQP accuracy", "rte": "RTE accuracy", "stsb": "STS-B Pearson",
}  # fmt: skip


def write_run(
    folder: Path,
    task: str = "cola",
    seed: int = 0,
    figures: Any = (0.25, 0.75, 0.5),
    *,
    state: str = "done",
    model: str = "roberta-base",
    base: str = "0123456789abcdef",
    method: dict[str, Any] = LORA,
    rank: int = 8,
    scaling: float = 2.0,
    relative: bool = False,
    start: str | None = None,
    encoder: int = 294_912,
    overall: float | None = None,
    measured: dict[str, float] | None = None,
    **hyper: Any,
) -> Path:
    """An output folder of run_glue.py, of 10 epochs with one evaluation after each 100 steps and one at the end.

    state: done; unevaluated, trained without --do_eval; stopped, with checkpoints; or begun, without.
    """
    folder.mkdir(parents=True)
    metric, trained = f"eval_{METRICS.get(task, 'accuracy')}", state in ("done", "unevaluated")
    log: list[dict[str, float]] = [{"step": 10, "loss": 0.7}]
    log += [{"step": 100 * i, "epoch": i, metric: figure} for i, figure in enumerate(figures, 1)]
    is_lora, total = "targets" in method, encoder + 1538 if method["name"] == "full" else 125_000_000
    record = {
        "task": task, "labels": [], "base_model": f"/models/{model}", "base_fingerprint": base, "started_from": start,
        "lora": {"ranks": [rank] * is_lora, "scalings": [scaling] * is_lora, "lora_relative_query": relative},
        "method": method, "parameters": {"encoder": encoder, "trainable": encoder + 1538, "total": total},
        "hyperparameters": {"seed": seed, "data_seed": None, "learning_rate": 5e-4, "num_train_epochs": 10.0,
                            "train_samples": 8551, "reg_loss_wgt": 0.0, "masking_prob": 0.0} | hyper,
    } | ({"trained": True} if trained else {})  # fmt: skip
    write(folder / "run.json", record)
    for step in (50, 150, 1000) if state == "stopped" else ():
        write(folder / f"checkpoint-{step}" / "trainer_state.json", {"epoch": step / 400, "log_history": log})
    if trained:
        write(folder / "trainer_state.json", {"epoch": 10.0, "log_history": log})
        write(folder / "train_results.json", {"train_seconds": 100.0, "peak_memory_gib": 2.0} | (measured or {}))
    if state == "done":
        both = {f"{metric}_mm": 0.1, f"{metric}_overall": overall} if overall else {}
        write(folder / "eval_results.json", {metric: figures[-1], "eval_loss": 0.5} | both)
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_seeds(folder: Path, task: str, ends: Any, **settings: Any) -> None:
    """A run for each figure, seeds from 0, evaluated twice: the first time lower by 0.1."""
    for seed, end in enumerate(ends):
        write_run(folder / f"{task}_{seed}", task, seed, (end - 0.1, end), **settings)


def read(*folders: Path) -> str:
    return write_report(*collect(folders), None)


def rows_of(text: str) -> list[list[str]]:
    """The cells of every line of Markdown tables, headings among them."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def values(text: str, method: str, which: str = "best epoch") -> dict[str, str]:
    """What the line of a method says, by heading; which: best epoch, last or paper."""
    heading, *rows = rows_of(text)
    name = ""
    for row in rows:
        name = row[0] or name
        if name == method and row[2] == which:
            return dict(zip(heading, row, strict=True))
    raise AssertionError(f"no line {which!r} of {method!r} in\n{text}")


def notes_of(text: str) -> list[str]:
    """The remarks below the tables."""
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


def names(folder: Path) -> list[str]:
    """The methods that the table of these runs has, in its order."""
    return [row[0] for row in rows_of(read(folder))[1:] if row[0]]


def refusal(*folders: Path) -> str:
    with pytest.raises(UserError) as caught:
        collect(folders)
    return str(caught.value)


SMALL = """
| method   | trainable |            | CoLA Matthews | QNLI accuracy       | average | training               | memory   |
| BitFit   | 102,144   | best epoch | 50.0 (1 of 3) | -                   | -       | 0:01:40 (1 of 2 tasks) | 2.0 GiB  |
|          |           | last       | 50.0 (1 of 3) | -                   | -       |                        |          |
|          | 0.1M      | paper      | 62.0          | -                   | -       |                        |          |
| LoRA r=8 | 294,912   | best epoch | 62.0 ± 3.6    | 85.0 ± 7.1 (2 of 3) | -       | 0:02:51                | 11.3 GiB |
|          |           | last       | 60.0 ± 4.7    | 75.0 ± 7.1 (2 of 3) | -       |                        |          |
|          | 0.3M      | paper      | 63.4 ± 1.2    | 93.3 ± 0.3          | 78.4    |                        |          |
"""  # noqa: E501


WHERE = ("query", "query, value", "query, key, value, dense")


def write_sweep(
    folder: Path, task: str = "cola", seeds: int = 1, **settings: Any
) -> dict[tuple[str, int], list[float]]:
    """The paper's sweep: ranks by sets of layers, alpha the same. Returns the figures in percent."""
    figures = {}
    for i, where in enumerate(WHERE):
        targets = where.split(", ")
        for j, rank in enumerate((1, 2, 4, 8, 64)):
            figures[where, rank] = [50.0 + 10 * i + j + 0.25 * seed for seed in range(seeds)]
            method, encoder = LORA | {"targets": targets}, 1536 * 12 * rank * len(targets)
            write_seeds(
                folder / f"{where}-{rank}", task, [figure / 100 for figure in figures[where, rank]],
                method=method, rank=rank, scaling=16 / rank, encoder=encoder, **settings,
            )  # fmt: skip
    return figures
