"""A run's output folder: whether it may be used, what it records, what of the run remains to be done."""

import fcntl
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from lora_nlu.data.tasks import TASKS
from lora_nlu.data.tokenization import digest
from lora_nlu.errors import UserError, printable, printable_lines
from lora_nlu.files import RUN, RUN_METADATA, check_json, is_training_run, read_json, write_json
from lora_nlu.labels import label_list
from lora_nlu.methods.table import METHODS
from lora_nlu.training.checkpoints import clear_checkpoint, complete_checkpoints
from lora_nlu.training.file_list import FILE_LIST, WEIGHTS, list_files, remove_checkpoint, written_files
from lora_nlu.training.metadata import IF_SET
from lora_nlu.training.trainer import AdapterTrainer

_NO_CONTENT = re.compile(rf"\..*\.partial|[._]saving|\.removing|_lock|{FILE_LIST}")  # what a killed process may leave
_LOCK = "_lock"  # there while a run trains, and after one that was killed; uploads leave out "_*"
# Of a run that trains, after training
_SCORES = ("eval_results.json", "eval_mm_results.json", "predict_results_", "predictions_")
_AFRESH = "Choose another --output_dir, or --overwrite_output_dir to train afresh."
# What decides a run's result, and which files it was trained on
_DECIDING = """
    task labels base_fingerprint tokenizer_fingerprint lora method model_config hyperparameters
    """.split()
_FILES = ("dataset", "train_file", "text_columns")
_LOOK = ("label", "color", "marker")  # of a method in reports; an older version did not record it
# What a difference means in settings whose values are digests
_MEANING = {"train_data": ": the training examples differ", "eval_data": ": the evaluation examples differ"}


def check_output_dir(output_dir: str, overwrite: bool) -> None:
    """Raise UserError if the output folder can't be written, or contains anything but a run.

    A missing folder is not made yet, so that a run that is refused leaves none behind.
    """
    folder = Path(output_dir)
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=nearest):
            pass
        paths = folder.iterdir() if nearest == folder else ()
        content = [path.name for path in paths if not _NO_CONTENT.fullmatch(path.name)]
    except OSError as e:
        raise UserError(f"--output_dir {folder}: can't be written ({e.strerror}).") from e
    if content and RUN not in content and not overwrite:
        raise UserError(
            f"--output_dir {folder} contains {len(content)} entries ({content[0]}, ...) and no {RUN}: it is no run's.\n"
            "Choose another folder, or --overwrite_output_dir to write into it all the same."
        )


def recorded(folder: Path) -> dict[str, Any]:
    """The record of the run in a folder (run.json); empty if there is none. Raises UserError for a damaged one."""
    path = folder / RUN
    run = read_json(path) if path.is_file() else {}
    check_json(path, run, [(n, isinstance(run.get(n, {}), dict), "an object") for n in ("method", "hyperparameters")])
    check_json(path, run, [("labels", isinstance(run.get("labels", []), list), "a list")])
    return run


def record(trainer: AdapterTrainer, **more: Any) -> None:
    """Write the run's metadata, and what else is to be recorded, into run.json."""
    if trainer.args.process_index == 0:
        list_files(Path(trainer.args.output_dir))
        write_json(Path(trainer.args.output_dir, RUN), trainer.metadata | more)


def record_evaluation(trainer: AdapterTrainer, evaluated: str, weights: str) -> None:
    """Record an evaluation or prediction, unless the folder already has the record of a training run, which stays.

    evaluated: the adapter, or else the model; weights: its fingerprint. Raises UserError in a training run's folder if
    that run trained something else, or on another task: readers would take the new results for that run's.
    """
    folder, now = Path(trainer.args.output_dir), trainer.metadata
    (earlier,) = broadcast_object_list([recorded(folder)])
    if not is_training_run(earlier):
        record(trainer, weights_fingerprint=weights)
        return
    task, method = earlier.get("task"), earlier.get("method", {}).get("name")
    if folder.resolve() != Path(evaluated).resolve() or task != now["task"]:
        flag = METHODS[method].path_flag if method in METHODS else "adapter_path"
        raise UserError(
            f"--output_dir {folder} is of a run that trained on {task}; the results of {evaluated} on {now['task']} "
            f"would be taken for that run's.\nChoose another --output_dir; what was trained there is --{flag} {folder}."
        )


def check_results(
    trainer: AdapterTrainer, weights: str | None, samples: int, set_samples: int | None, before: Any, name: str
) -> None:
    """Raise UserError if results would, in a training run's folder, replace those of more examples or of other weights.

    Another file of the user's own may have fewer examples; GLUE's sets are always the same.
    weights, samples, set_samples: what the results are of, how many examples of how many; before: the number of
    examples of those in the folder, as recorded; name: of their file.
    """
    folder, run = Path(trainer.args.output_dir), recorded(Path(trainer.args.output_dir))
    if not is_training_run(run):
        return
    if None not in (weights, run.get(WEIGHTS)) and weights != run[WEIGHTS]:
        raise UserError(
            f"--output_dir {folder}: the weights are not those that its run trained, as {RUN} records; their results "
            "would be taken for that run's.\nChoose another --output_dir."
        )
    is_part = samples != set_samples
    if isinstance(before, int) and before > samples and (is_part or run.get("task") in TASKS):
        remedy = ", or evaluate all (no --max_eval_samples, no --max_predict_samples)" * is_part
        raise UserError(
            f"{folder / name} is of {before:,} examples; results of {samples:,} would take its place.\n"
            f"Choose another --output_dir{remedy}."
        )


def check_all_alike(trainer: AdapterTrainer, tables: dict[str, Any]) -> None:
    """Raise UserError in a process that was started with other flags, examples or base model than the first process."""
    if trainer.args.world_size == 1:
        return
    flags = {name: str(value) for name, value in trainer.args.to_dict().items() if name != "local_rank"}
    flags |= {f"{split}_data": digest(table) for split, table in tables.items()}
    own_run = trainer.metadata | {"hyperparameters": flags | trainer.metadata["hyperparameters"]}
    (first_run,) = broadcast_object_list([own_run])
    if differences := _differences(first_run, own_run):
        raise UserError(
            f"process {trainer.args.process_index} (on {socket.gethostname()}) was started otherwise than the first: "
            f"{'; '.join(differences[:8])}.\nStart the same command, with as many devices, on all machines."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder while a run trains into it. Raises UserError if another process, even an orphan, has it locked.

    The lock is on a file in the folder, open for writing, since a network disk can't lock a folder.
    """
    path = folder / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := _lock(path)) is None:
            pass
    except BlockingIOError as e:
        raise UserError(
            f"{folder}: another run trains into it now, or evaluates. Wait for it, or choose another folder."
        ) from e
    except OSError as e:
        raise UserError(f"{path}: can't be locked ({e.strerror}). Remove it, or choose another --output_dir.") from e
    try:
        yield
    finally:
        with suppress(OSError):
            if not path.stat().st_size:  # somebody's file of this name stays
                path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """The descriptor of a file that is now locked, or None if it was removed meanwhile, which ends another's lock.

    Raises BlockingIOError if another process has it locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as e:
        reason = f"{path.parent}: its disk has no locks ({e.strerror}). Start no second run into it."
        print(printable_lines(reason), flush=True)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.lstat()):
            return descriptor
    os.close(descriptor)
    return None


def clear_earlier_run(args: Any) -> None:
    """Remove the files that earlier runs and their checkpoints list, and no others. args: TrainingArguments."""
    folder = Path(args.output_dir)
    for path in folder.glob("checkpoint-*"):
        if path.name.removeprefix("checkpoint-").isdigit():  # others are somebody's copies
            with suppress(OSError):
                remove_checkpoint(path)
    for path in complete_checkpoints(args.output_dir):
        clear_checkpoint(path, args)
    for path in written_files(folder):
        path.unlink(missing_ok=True)
    write_json(folder / FILE_LIST, [])


def remaining(trainer: AdapterTrainer) -> tuple[str | None, bool, dict[str, Any]]:
    """The checkpoint to resume from, if any; whether the run has trained; its metadata. Raises UserError for another's.

    In the metadata of a run that resumes, what decides its result stays as its first start recorded it.
    """
    folder, now = Path(trainer.args.output_dir), trainer.metadata
    earlier = recorded(folder) or now
    checkpoint = find_checkpoint(trainer.args.output_dir, trainer.args.resume_from_checkpoint)
    if checkpoint or "trained" in earlier:
        _check_same_run(folder, earlier, now)
    elif left := complete_checkpoints(trainer.args.output_dir):
        raise UserError(
            f"--resume_from_checkpoint false: {left[-1]} is there, of an earlier run, to be taken for this one's.\n"
            "Leave the flag out to resume, or --overwrite_output_dir to train afresh."
        )
    elif results := [p.name for p in written_files(folder) if p.name.startswith(_SCORES) and p.is_file()]:
        raise UserError(
            f"--output_dir {folder} contains results of another model ({results[0]}), to be taken for this run's.\n"
            "Choose another folder, or --overwrite_output_dir to remove them first."
        )
    if checkpoint:  # --resume_from_checkpoint may be of another folder
        of_adapter = Path(checkpoint, RUN_METADATA)
        first = read_json(of_adapter) if of_adapter.is_file() else recorded(Path(checkpoint).parent)
        if not first:
            raise UserError(f"{checkpoint}: no {RUN} is beside it, so it can't be compared with this run.")
        _check_same_run(checkpoint, first, now)
        now = now | {name: first[name] for name in (*_DECIDING, *_FILES) if name in first}
    if checkpoint and "trained" not in earlier:
        if trainer.args.metric_for_best_model and "metric_for_best_model" not in earlier.get("hyperparameters", {}):
            raise UserError(
                f"{folder} contains a run of an older version, which chose the best checkpoint by a metric that it did "
                f"not record.\n{_AFRESH}"
            )
        trainer.check_backend(checkpoint)
    return checkpoint, "trained" in earlier, now


def find_checkpoint(output_dir: str, resume_flag: str | None) -> str | None:
    """The checkpoint of --resume_from_checkpoint, or without it the last complete one in the folder."""
    checkpoints = [str(path) for path in complete_checkpoints(output_dir)]
    if resume_flag and str(resume_flag).lower() not in ("true", "false"):
        if str(Path(resume_flag)) not in map(str, complete_checkpoints(str(Path(resume_flag).parent))):
            raise UserError(f"--resume_from_checkpoint {resume_flag}: no complete checkpoint.")
        return resume_flag
    return checkpoints[-1] if checkpoints and str(resume_flag).lower() != "false" else None


def _check_same_run(source: object, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError, naming the differences, if an earlier run had other settings."""
    if differences := _differences(earlier, now):
        raise UserError(f"{source} contains a run with other settings: {'; '.join(differences[:8])}.\n{_AFRESH}")


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings in which two runs differ, of those that decide what a run ends with."""
    differences = []
    sources = [run.get("started_from") for run in (earlier, now)]
    starts = [run.get("started_from_fingerprint") for run in (earlier, now)]  # the folder may have been moved
    if "started_from_fingerprint" not in earlier:  # older versions recorded the name alone
        starts = [source is None for source in sources]
    if "started_from" in earlier and starts[0] != starts[1]:
        differences.append(
            f"started_from {sources[0]}, now {sources[1]}" + ": its tensors differ" * (None not in sources)
        )
    for key in _DECIDING:
        before, after = earlier.get(key, now.get(key)), now.get(key)  # older versions recorded less
        if isinstance(before, dict) and isinstance(after, dict):
            names = {**before, **after}
            if key == "hyperparameters":  # older versions recorded fewer
                names = {**before, **dict.fromkeys(IF_SET)}
            changed = [name for name in names if name not in _LOOK and before.get(name) != after.get(name)]
            differences += [f"{n} {before.get(n)}, now {after.get(n)}{_MEANING.get(n, '')}" for n in changed]
        elif before != after:
            before, after = (label_list(value) if key == "labels" else value for value in (before, after))
            differences.append(f"{key} {before}, now {after}")
    return [printable(difference, 1000) for difference in differences]


def wait_for_file(path: Path, content: str, args: Any) -> None:
    """Wait until this process can read what the first one wrote: network disks may be late. Raises UserError."""
    for _ in range(60):
        if path.is_file() and path.read_text() == content:
            return
        time.sleep(0.5)
    raise UserError(
        f"{path}: process {args.process_index} (on {socket.gethostname()}) doesn't see what the first process wrote.\n"
        "--output_dir must be on a disk that all machines share."
    )
