"""Files that appear whole or not at all, and JSON objects read with an error for people."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_nlu.errors import UserError, printable

ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA = "adapter_config.json", "adapter_model.safetensors", "run_metadata.json"


def flush_and_rename(partial: Path, final: Path) -> None:
    """Give a completely written file or folder its name: on the disk first, then renamed."""
    for path in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(partial, final)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under; it gets its own when the block ends, and is gone if the block fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush_and_rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 under a temporary name, then rename."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON under a temporary name, then rename."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def folders_containing(name: str, start: Path) -> list[Path]:
    """Every folder under `start`, itself among them, that holds a file of this name; checkpoints and hidden ones not.

    Raises UserError if `start` is no folder, OSError for one that can't be read.
    """

    def fail(error: OSError) -> None:
        raise error

    if not start.is_dir():
        raise UserError(f"{start}: no such folder. Give an output folder of run_glue.py, or one that holds some.")
    found = []
    for folder, below, files in os.walk(start, onerror=fail):
        below[:] = [name for name in below if not name.startswith((".", "checkpoint-"))]
        found += [Path(folder)] if name in files else []
    return sorted(found)


def is_training_run(known: dict[str, Any]) -> bool:
    """Whether a run.json is of a run that trained, or began to: an evaluation or a prediction leaves one as well."""
    return bool(known.get("trained") or known.get("hyperparameters", {}).get("train_samples"))


def weights_file_problem(path: Path, wanted: str = "weights") -> str | None:
    """What is wrong with a file of weights that is empty or text, and the remedy; None for any other file.

    wanted: what the file should hold, for the message.
    """
    with path.open("rb") as file:
        start = file.read(600)
    if not start:
        return "damaged or cut short: it is empty.\nDownload it again."
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        if e.start < 500:  # not just a character that the reading cut
            return None
        text = start[: e.start].decode("utf-8-sig")
    if not all(character.isprintable() or character in "\t\n\r\f" for character in text):
        return None
    if text.startswith("version https://git-lfs"):
        return f"no {wanted} but a Git LFS pointer.\nRun `git lfs pull` in that folder, or download the file itself."
    head = text.lstrip().lower()
    page = head.startswith(("<!doctype html", "<html", "<head", "<!--"))
    kind = "a web page (HTML)" if page else "JSON" if head.startswith(("{", "[")) else "text"
    return f"no {wanted} but {kind}: {printable(text.strip(), 60)}\nDownload the file itself."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if it is missing, cut or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: can't be read ({e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__}; expected an object.")
    return content
