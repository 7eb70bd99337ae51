"""What a run recorded: read from its output folder, or from its line of a runs.jsonl file."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError
from lora_nlu.files import RUN, folders_containing, is_training_run, parse_json, read_json, read_text, write_text

RECORDS = "runs.jsonl"
STATE, EVALUATION, TRAINING = "trainer_state.json", "eval_results.json", "train_results.json"
ANSWERS = "answers"  # in a line of RECORDS: to each validation example, as `report methods` reads and writes them
WEIGHTS = "weights_fingerprint"  # of the model that a run trained, or that gave results

Form = tuple[str, Callable[[Any], bool]]  # of a value: in words, and whether one is of it
_TEXT: Form = ("text", lambda x: isinstance(x, str))
_PRINTABLE: Form = ("printable text", lambda x: isinstance(x, str) and x.isprintable())
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # spaces and joiners are none
_FOLDER: Form = ("printable text", lambda x: isinstance(x, str) and not _CONTROLS.search(x))
_DIGEST: Form = ("a digest", lambda x: x is None or (isinstance(x, str) and bool(re.fullmatch("[0-9a-f]+", x))))
_COUNT: Form = ("a count", lambda x: type(x) is int and 0 <= x < 2**63)
_COUNT_OR_NONE: Form = ("a count", lambda x: x is None or _COUNT[1](x))
_NUMBER: Form = ("a number", lambda x: type(x) in (int, float) and math.isfinite(x))
_NUMBER_OR_NONE: Form = ("a number", lambda x: x is None or _NUMBER[1](x))
_LIST_OR_NONE: Form = ("a list", lambda x: x is None or isinstance(x, list))
# The forms of what reports read of each file, by key; in a list, of each entry
_FORMS: dict[str, Any] = {
    RUN: {
        "task": _PRINTABLE, "base_fingerprint": _DIGEST, WEIGHTS: _DIGEST, "diverged": _TEXT,
        "left_at_default": [_TEXT],
        "hyperparameters": {
            "seed": _COUNT, "num_train_epochs": _NUMBER, "train_data": _TEXT, "learning_rate": _NUMBER,
            "reg_loss_wgt": _NUMBER_OR_NONE,
            "loraplus_lr_ratio": _NUMBER_OR_NONE, "class_weights": [_NUMBER], "validation_from_train": _COUNT,
        },
        "parameters": {"encoder": _COUNT},
        "lora": {"ranks": [_COUNT], "scalings": [_NUMBER]},
        "method": {
            "name": _TEXT, "label": _TEXT, "color": _TEXT, "marker": _TEXT, "targets": [_PRINTABLE],
            "layers": _LIST_OR_NONE, "lora_dropout": _NUMBER, "target_rank": _COUNT,
        },
    },
    STATE: {"epoch": _NUMBER, "log_history": [{"step": _COUNT, "epoch": _NUMBER, "eval_samples": _COUNT}]},
    EVALUATION: {
        WEIGHTS: _DIGEST, "eval_data": _TEXT, "eval_samples": _COUNT, "eval_samples_mm": _COUNT,
        "eval_set_samples": _COUNT_OR_NONE, "eval_set_samples_mm": _COUNT_OR_NONE,
    },
    TRAINING: dict.fromkeys(
        ("train_seconds", "num_input_tokens_seen", "peak_memory_gib", "peak_gpu_memory_gib"), _NUMBER
    ),
    ANSWERS: {"expected": [_NUMBER], "given": [_NUMBER]},
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A run: its output folder, its run.json, and by name the content of its other files.

    place: where it was read, for messages: its folder, or a line of a runs.jsonl file.
    """

    folder: Path
    run: dict[str, Any]
    files: dict[str, dict[str, Any]]
    place: str


def training_records(starts: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """The records of training runs at the paths of a command line, each once, and lines on what is not among them."""
    found: dict[str, dict[str, Record]] = {}  # by folder and content
    notes: list[str] = []
    for start in starts:
        records, damaged = find_records(start)
        records = [record for record in records if is_training_run(record.run)]
        if not records and not damaged:
            notes.append(f"missing: {start}" + ", no training run in it" * start.exists())
        notes += damaged
        for record in records:
            of_folder = found.setdefault(os.path.realpath(record.folder), {})
            of_folder.setdefault(json.dumps([record.run, record.files], sort_keys=True), record)
    for of_folder in found.values():
        if len(of_folder) > 1:
            places = ", ".join(record.place for record in of_folder.values())
            notes.append(f"different runs with the same folder, each of which counts: {places}")
    return [record for of_folder in found.values() for record in of_folder.values()], notes


def find_records(start: Path) -> tuple[list[Record], list[str]]:
    """The records in a runs.jsonl file, or of every run folder at or under a folder, and a line for each damaged one.

    In a folder without run folders its runs.jsonl files are read instead. Raises UserError for a damaged `start`.
    """
    if start.is_file() and start.suffix == ".jsonl":
        return _read_lines(start)
    if not start.is_dir():
        return [], []
    records, notes = read_folders(start)
    if records or notes:
        return records, notes
    folders, notes = folders_containing(RECORDS, start)
    for folder in folders:
        try:
            of_file, damaged = _read_lines(folder / RECORDS)
        except UserError as e:
            of_file, damaged = [], [leave_out(e, folder)]
        records, notes = records + of_file, notes + damaged
    return records, notes


def read_folders(start: Path) -> tuple[list[Record], list[str]]:
    """The record of every run folder at or under a folder, and a line for each damaged one.

    Raises UserError if `start` is no folder, or a damaged run folder.
    """
    folders, notes = folders_containing(RUN, start)
    records = []
    for folder in folders:
        try:
            records.append(_read_folder(folder))
        except UserError as e:
            notes.append(leave_out(e, folder, [start]))
    return records, notes


def leave_out(error: UserError, folder: Path, named: Collection[Path] = ()) -> str:
    """The line on a run that is left out for its files; raises the error if its folder is among those named."""
    if folder in named:
        raise error
    return f"left out: {' '.join(str(error).splitlines())}"


def _read_folder(folder: Path) -> Record:
    """The record of a run that may be writing: its run.json is the same before and after its other files are read."""
    run, files = read_json(folder / RUN), _read_files(folder)
    while json.dumps(now := read_json(folder / RUN)) != json.dumps(run):
        run, files = now, _read_files(folder)
    for name, content in {RUN: run, **files}.items():
        try:
            _check_form(content, _FORMS[name], name)
        except ValueError as e:
            raise UserError(f"{folder / name}: {e}: damaged, or written by another program.") from e
    return Record(folder, run, _shortened(files), str(folder))


def _read_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The files beside run.json; the state of a run that has not ended is its last checkpoint's."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    checkpoints = sorted((p for p, step in steps.items() if step.isdecimal()), key=lambda p: -int(steps[p]))
    files = {}
    for name, folders in {STATE: [folder, *checkpoints], EVALUATION: [folder], TRAINING: [folder]}.items():
        for path in (one / name for one in folders):
            try:
                files[name] = read_json(path)
                break
            except UserError as e:
                if not isinstance(e.__cause__, FileNotFoundError | NotADirectoryError):
                    raise
    return files


def _read_lines(path: Path) -> tuple[list[Record], list[str]]:
    """The records in a runs.jsonl file, and a line on those that are damaged. Raises UserError if all of it is."""
    records: list[Record] = []
    errors: list[str] = []
    try:
        lines = read_text(path).removesuffix("\n").split("\n")
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a file of records ({e}).") from e
    if lines == [""]:
        raise UserError(f"{path}: the file is empty. `report runs --out` writes it.")
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            files = parse_json(line)
            _check_form(files, {"folder": _FOLDER} | _FORMS, "the line")
            records.append(Record(Path(files.pop("folder")), files.pop(RUN), _shortened(files), place))
        except (ValueError, KeyError, RecursionError) as e:
            errors.append(f"{place}: not the record of a run ({e}). `report runs --out` writes it.")
    if errors and not records:
        raise UserError(errors[0])
    more = f" So are {len(errors) - 1:,} more lines." if len(errors) > 1 else ""
    return records, [f"left out: {errors[0]}{more}"] if errors else []


def _check_form(value: Any, form: Any, name: str) -> None:
    """Raise ValueError if a value, or one in it, is not of its form; what is not there is not missed."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is not an object")
        for key in (key for key in form if key in value):
            _check_form(value[key], form[key], key)
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is not a list")
        for entry in value:
            _check_form(entry, form[0], f"an entry of {name}")
    elif not form[1](value):
        raise ValueError(f"{name} is not {form[0]}")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a line for each run with all that a report reads of its folder."""
    lines = ({"folder": str(record.folder), RUN: record.run, **record.files} for record in records)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _shortened(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Files with less in the state: the epoch, and of the log the evaluations and what has some key first or last."""
    if STATE not in files:
        return files
    state = files[STATE]
    log = [*enumerate(state.get("log_history", []))]
    last = {key: i for i, entry in log for key in entry}
    first = {key: i for i, entry in reversed(log) for key in entry}
    ends = {*first.values(), *last.values()}
    kept_entries = [entry for i, entry in log if i in ends or any(key.startswith("eval_") for key in entry)]
    return files | {STATE: {k: value for k, value in state.items() if k == "epoch"} | {"log_history": kept_entries}}


@dataclass(frozen=True)
class Figures:
    """A run's figures on the validation set in its task's first metric, of which more is better; from 0 or -1 to 1.

    last:      of the model that training ended with (the best epoch's with --load_best_model_at_end), which makes the
               predictions; MNLI's on both sets together. None for a run that was not evaluated.
    first_set: the same, MNLI's on the matched set alone.
    history:   (step, epoch, figure) of every evaluation while training, MNLI's on the matched set.
    diverged:  why training stopped, or the first value that is not finite, with its name; "" if all are finite.
    left_out:  a line on an evaluation in the run's folder that is not of the run's model, or not on the full set.
    """

    last: float | None
    first_set: float | None
    history: tuple[tuple[int, float, float], ...]
    diverged: str
    left_out: str


def read_figures(record: Record) -> Figures:
    """The figures of a run on a GLUE task."""
    run, metric = record.run, f"eval_{TASKS[record.run['task']].metrics[0]}"
    evaluated, trained = record.files.get(EVALUATION, {}), record.files.get(TRAINING, {})
    left_out, set_samples = "", evaluated.get("eval_set_samples")
    if reason := _not_its_result(run, evaluated):
        evaluated, left_out = {}, f"left out: {record.place}, {EVALUATION}: {reason}"
    log = record.files.get(STATE, {}).get("log_history", [])
    logged = {key: value for entry in log for key, value in entry.items()}  # the last value of each key
    if run.get("hyperparameters", {}).get("fp16"):
        logged.pop("grad_norm", None)  # not finite in a step that the loss scaler skips
    values = [*evaluated.items(), *trained.items(), *logged.items()]
    not_finite = [f"{key} {value}" for key, value in values if isinstance(value, float) and not math.isfinite(value)]
    evaluations = [entry for entry in log if _is_figure(entry.get(metric)) and "step" in entry]
    if set_samples is not None:  # a later evaluation may be on the full set, those while training on a part
        evaluations = [entry for entry in evaluations if entry.get("eval_samples", set_samples) == set_samples]
    history = tuple((entry["step"], entry.get("epoch", 0.0), entry[metric]) for entry in evaluations)
    figures = evaluated.get(f"{metric}_overall", evaluated.get(metric)), evaluated.get(metric)
    last, first_set = (figure if _is_figure(figure) else None for figure in figures)
    return Figures(last, first_set, history, str(run.get("diverged") or "".join(not_finite[:1])), left_out)


def _not_its_result(run: dict[str, Any], evaluated: dict[str, Any]) -> str:
    """Why an evaluation in a run's folder is not the run's result; "" if it is. Older versions recorded less."""
    if is_other_model(run, evaluated):
        return "of another model"
    for end in ("", "_mm"):
        samples, set_samples = (evaluated.get(f"eval_{name}{end}", 0) for name in ("samples", "set_samples"))
        if set_samples is None or samples < set_samples:
            return f"on {samples:,} of {'more' if set_samples is None else f'{set_samples:,}'} examples"
    return ""


def is_other_model(run: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a result in a run's folder records other weights than the run; older versions recorded none."""
    return None not in (run.get(WEIGHTS), result.get(WEIGHTS)) and run[WEIGHTS] != result[WEIGHTS]


def _is_figure(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2  # 1, or by rounding a little more
