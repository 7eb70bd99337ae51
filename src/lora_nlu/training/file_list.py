"""files.json in an output folder and in each checkpoint: which files the program wrote there. It removes no others."""

import os
from contextlib import suppress
from errno import ELOOP, ENOENT
from pathlib import Path

from lora_nlu.errors import UserError
from lora_nlu.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RUN,
    RUN_METADATA,
    parse_json,
    read_json,
    read_text,
    write_json,
)

WEIGHTS = "weights_fingerprint"  # in the records of a run and of results: the model that was trained, or gave them
FILE_LIST = "files.json"
REMOVING = ".removing"  # the list of files of a checkpoint being removed
EVALUATION, PREDICTIONS = "eval_results.json", "predict_results.json"  # the latter: what each .tsv was made of
# Results of versions that kept no list, each with a key that it has
_RESULTS = {
    "trainer_state.json": "log_history", "train_results.json": "train_runtime", "eval_results.json": "eval_runtime",
    "eval_mm_results.json": "eval_runtime_mm", "all_results.json": "num_input_tokens_seen",
    ADAPTER_CONFIG: "peft_type", RUN_METADATA: "hyperparameters",
}  # fmt: skip


def listed_files(folder: Path, file_list: str = FILE_LIST) -> list[Path] | None:
    """The paths that a folder's list names, without those outside of the folder; None if no list can be read."""
    try:
        names = parse_json(read_text(folder / file_list))
        paths = [folder / name for name in names if ".." not in Path(name).parts and "\0" not in name]
        return [path for path in paths if path.parent.resolve().is_relative_to(folder.resolve())]
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def list_files(folder: Path, *names: str) -> None:
    """Add names to the list of a run's folder; called before files of these names are written."""
    listed = listed_files(folder)
    before = {path.name for path in written_files(folder)}
    if listed is None or not before >= {*names}:
        write_json(folder / FILE_LIST, sorted({*before, *names}))


def written_files(folder: Path) -> list[Path]:
    """What a run's folder lists; in one of a version that kept no list, results by their names and content."""
    listed = listed_files(folder)
    if listed is not None or not (folder / RUN).is_file():
        return listed or []
    found = []
    for name, key in _RESULTS.items():
        with suppress(UserError):  # there is none, or it isn't ours
            found += [folder / name] if key in read_json(folder / name) else []
    found += [folder / ADAPTER_WEIGHTS] if folder / RUN_METADATA in found else []
    for path in folder.glob("predict_results_*.tsv"):
        with suppress(OSError), path.open("rb") as file:
            found += [path] if file.readline(20) == b"index\tprediction\n" else []
    return found


def remove_checkpoint(path: Path) -> None:
    """Remove the files that a checkpoint lists, and its folders that are then empty. Raises OSError if it can't.

    The list is renamed first: a half-removed checkpoint is none, and `clear_leftovers` removes what is left of it.
    """
    if path.is_symlink():
        raise OSError(ELOOP, "it is a link", str(path))
    if (files := listed_files(path, REMOVING)) is None:
        if (files := listed_files(path)) is None:
            raise OSError(ENOENT, f"no {FILE_LIST} in it", str(path))
        os.replace(path / FILE_LIST, path / REMOVING)
    for file in files:
        file.unlink(missing_ok=True)
    (path / REMOVING).unlink()
    for folder in sorted({path, *(parent for file in files for parent in file.parents)}, reverse=True):
        if folder.is_relative_to(path):
            with suppress(OSError):  # somebody else's files are in it
                folder.rmdir()
