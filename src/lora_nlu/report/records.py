"""What a run recorded: read from its output folder, or from its line of a runs.jsonl file."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError
from lora_nlu.files import folders_containing, parse_json, read_json, write_text

RECORDS = "runs.jsonl"
RUN, STATE, EVALUATION, TRAINING = "run.json", "trainer_state.json", "eval_results.json", "train_results.json"


@dataclass(frozen=True)
class Record:
    """A run: its output folder, its run.json, and for a line of runs.jsonl the content of the other files by name."""

    folder: Path
    run: dict[str, Any]
    files: dict[str, dict[str, Any]] | None = None

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of a file, or None; the state of a run that has not ended is its last checkpoint's."""
        if self.files is not None:
            return self.files.get(name)
        path = self.folder / name
        if name == STATE and not path.is_file():
            checkpoints = [p for p in self.folder.glob(f"checkpoint-*/{STATE}") if p.parent.name[11:].isdigit()]
            path = max(checkpoints, key=lambda p: int(p.parent.name[11:]), default=path)
        return read_json(path) if path.is_file() else None


def find_records(start: Path) -> list[Record]:
    """The records in a runs.jsonl file, or of every run folder at or under a folder.

    In a folder without run folders its runs.jsonl files are read instead. Raises UserError for a damaged file.
    """
    if start.is_file() and start.suffix == ".jsonl":
        return list(_read_records(start))
    if not start.is_dir():
        return []
    if folders := folders_containing(RUN, start):
        return [Record(folder, read_json(folder / RUN)) for folder in folders]
    return [record for folder in folders_containing(RECORDS, start) for record in _read_records(folder / RECORDS)]


def _read_records(path: Path) -> Iterable[Record]:
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except ValueError as e:
        raise UserError(f"{path}: not a file of records ({e}).") from e
    for number, line in enumerate(lines, start=1):
        try:
            files = parse_json(line)
            record = Record(Path(files.pop("folder")), files.pop(RUN), files)
            _check_types(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise UserError(f"{path}:{number}: not the record of a run ({e}). `report runs --out` writes it.") from e
        yield record


def _check_types(record: Record) -> None:
    """Raise an exception for a value that is of another type than a run writes."""
    run, files = record.run, record.files or {}
    objects = {name: run.get(name, {}) for name in ("hyperparameters", "parameters", "lora", "method")} | files
    log = files.get(STATE, {}).get("log_history", [])
    if wrong := [name for name, value in objects.items() if not isinstance(value, dict)]:
        raise TypeError(f"{wrong[0]} is not an object")
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise TypeError("log_history is not a list of objects")
    method = run.get("method", {})
    texts = {name: method[name] for name in ("name", "label", "color", "marker") if name in method}
    for name, value in ({"folder": str(record.folder), "task": run.get("task", "")} | texts).items():
        if not isinstance(value, str) or not value.isprintable():
            raise TypeError(f"{name} is not printable text")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a line for each run with all that a report reads of its folder."""
    lines = []
    for record in records:
        line: dict[str, Any] = {"folder": str(record.folder), RUN: record.run}
        for name in (STATE, EVALUATION, TRAINING):
            if (content := record.read(name)) is not None:
                line[name] = _shortened_state(content) if name == STATE else content
        lines.append(json.dumps(line) + "\n")
    write_text(path, "".join(lines))


def _shortened_state(state: dict[str, Any]) -> dict[str, Any]:
    """The epoch, and of the log the evaluations and what has the first or the last value of some key."""
    log = [*enumerate(state.get("log_history", []))]
    last = {key: i for i, entry in log for key in entry}
    first = {key: i for i, entry in reversed(log) for key in entry}
    ends = {*first.values(), *last.values()}
    kept_entries = [entry for i, entry in log if i in ends or any(key.startswith("eval_") for key in entry)]
    return {key: value for key, value in state.items() if key == "epoch"} | {"log_history": kept_entries}


@dataclass(frozen=True)
class Figures:
    """A run's figures on the validation set in its task's first metric, of which more is better; from 0 or -1 to 1.

    last:      of the model that training ended with (the best epoch's with --load_best_model_at_end), which makes the
               predictions; MNLI's on both sets together. None for a run that was not evaluated.
    first_set: the same, MNLI's on the matched set alone.
    history:   (step, epoch, figure) of every evaluation while training, MNLI's on the matched set.
    diverged:  why training stopped, or the first value that is not finite, with its name; "" if all are finite.
    """

    last: float | None
    first_set: float | None
    history: tuple[tuple[int, float, float], ...]
    diverged: str


def read_figures(record: Record) -> Figures:
    """The figures of a run on a GLUE task. Raises UserError for a file that can't be read."""
    run, metric = record.run, f"eval_{TASKS[record.run['task']].metrics[0]}"
    evaluated, trained = record.read(EVALUATION) or {}, record.read(TRAINING) or {}
    log = (record.read(STATE) or {}).get("log_history", [])
    logged = {key: value for entry in log for key, value in entry.items()}  # the last value of each key
    if (run.get("hyperparameters") or {}).get("fp16"):
        logged.pop("grad_norm", None)  # not finite in a step that the loss scaler skips
    values = [*evaluated.items(), *trained.items(), *logged.items()]
    not_finite = [f"{key} {value}" for key, value in values if isinstance(value, float) and not math.isfinite(value)]
    evaluations = [entry for entry in log if _is_finite(entry.get(metric))]
    history = tuple((entry["step"], entry.get("epoch", 0.0), entry[metric]) for entry in evaluations)
    figures = evaluated.get(f"{metric}_overall", evaluated.get(metric)), evaluated.get(metric)
    last, first_set = (figure if _is_finite(figure) else None for figure in figures)
    return Figures(last, first_set, history, str(run.get("diverged") or "".join(not_finite[:1])))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
