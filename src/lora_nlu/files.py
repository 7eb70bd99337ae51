"""Files written completely or not at all, folders found by a file in them, JSON objects read."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_nlu.errors import UserError, first_line, printable

RUN = "run.json"  # marks an output folder as one of run_glue.py
ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA = "adapter_config.json", "adapter_model.safetensors", "run_metadata.json"
# In what torch, safetensors and tokenizers raise when a write fails
_FAILED_WRITE = re.compile(r"inline_container|StreamWriter|iostream|open file failed|\(os error \d+\)")


def flush_and_rename(partial: Path, final: Path) -> None:
    """Flush a completely written file or folder to the disk, then rename it, and flush the folder that it is in."""
    for path in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
        _flush(path)
    os.replace(partial, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, renamed to `path` when the block ends, removed if the block fails.

    It is in a new folder beside `path`, so no link that waits there is followed and no other process writes to it.
    """
    with _errors_naming(path), atomic_files(path.parent) as folder:
        yield folder / path.name


@contextmanager
def atomic_files(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, made if need be; what is in it is renamed into `parent` when the block ends."""
    with _errors_naming(parent):
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent, older_than_s=86400)
        folder = Path(tempfile.mkdtemp(".partial", ".lora_nlu-", parent))
        try:
            yield folder
            for path in sorted(folder.iterdir()):
                flush_and_rename(path, parent / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Raise OSError with this path for an error of writing, also for those of libraries that have their own."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, OSError) and not _FAILED_WRITE.search(str(e)):
            raise
        number, reason = getattr(e, "errno", None), getattr(e, "strerror", None)
        raise OSError(number or errno.EIO, reason or first_line(e), str(path)) from e


def remove_leftovers(parent: Path, older_than_s: float) -> None:
    """Remove temporary folders of processes that were killed: those that no process writes to, by their age."""
    for folder in parent.glob(".lora_nlu-*.partial"):
        with suppress(OSError):  # another process may remove it too
            if folder.lstat().st_mtime <= time.time() - older_than_s:
                shutil.rmtree(folder)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def folders_containing(name: str, start: Path) -> tuple[list[Path], list[str]]:
    """Every folder from `start` down that contains a file of this name, without checkpoints and hidden folders.

    Also a line for each folder that can't be read. Raises UserError if `start` is no folder, OSError if it can't be.
    """
    notes = []

    def note(error: OSError) -> None:
        if Path(error.filename) == start:
            raise error
        if not isinstance(error, FileNotFoundError):  # it was removed meanwhile
            notes.append(f"left out: {error.filename}: can't be read ({error.strerror}).")

    if not start.is_dir():
        raise UserError(f"{start}: no such folder. Give an output folder of run_glue.py, or one that contains some.")
    found = []
    for folder, below, files in os.walk(start, onerror=note):
        below[:] = [name for name in below if not name.startswith((".", "checkpoint-"))]
        found += [Path(folder)] if name in files else []
    return sorted(found), notes


def is_training_run(run: dict[str, Any]) -> bool:
    """Whether a run.json is of a run that trained, or began to; evaluations and predictions write one as well."""
    settings = run.get("hyperparameters")
    return bool(run.get("trained") or (isinstance(settings, dict) and settings.get("train_samples")))


def weights_file_problem(path: Path, expected: str = "weights") -> str | None:
    """What is wrong with a file of weights that is empty or text, and the remedy; None for any other file.

    expected: what the file should contain, for the message.
    """
    with path.open("rb") as file:
        start = file.read(600)
    if not start:
        return "damaged or cut short: it is empty.\nDownload it again."
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        if e.start < 500:  # not just a character that ends after the bytes read
            return None
        text = start[: e.start].decode("utf-8-sig")
    if not all(character.isprintable() or character in "\t\n\r\f" for character in text):
        return None
    if text.startswith("version https://git-lfs"):
        return f"no {expected} but a Git LFS pointer.\nRun `git lfs pull` in that folder, or download the file itself."
    head = text.lstrip().lower()
    is_page = head.startswith(("<!doctype html", "<html", "<head", "<!--"))
    kind = "a web page (HTML)" if is_page else "JSON" if head.startswith(("{", "[")) else "text"
    return f"no {expected} but {kind}: {printable(text.strip(), 60)}\nDownload the file itself."


def sha256_of(path: Path, size: int | None = None) -> str:
    """The SHA-256 of a file's bytes, or of the first `size` of them."""
    sha, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while part := file.read(min(left, 2**20)):
            sha.update(part)
            left -= len(part)
    return sha.hexdigest()


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError also for a name twice in one object, and for huge integers."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {printable(name)} occurs twice in one object")
        return content

    def bounded(digits: str) -> int:
        if len(digits) > 30:  # a float can't hold one of more than 308, and the largest seed has 20
            raise ValueError(f"an integer of {len(digits)} digits: {printable(digits, 10)}")
        return int(digits)

    return json.loads(text, object_pairs_hook=unique, parse_int=bounded)


def read_text(path: Path, limit: int = 2**28, errors: str = "strict") -> str:
    """The UTF-8 text of a file of at most `limit` bytes; errors: as of `open`.

    Raises OSError if it can't be read, ValueError if it is larger or no regular file: a pipe would never end.
    """
    with open(path, encoding="utf-8", errors=errors, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes; at most {limit:,} are read")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # without it, opening a pipe waits for its writer


def read_json(path: Path, limit: int = 2**28) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes.

    Raises UserError if the file is missing, damaged or larger, or contains something else.
    """
    try:
        content = parse_json(read_text(path, limit))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: can't be read ({e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: contains a JSON {type(content).__name__}; expected an object.")
    return content


def check_json(path: Path, content: dict[str, Any], checks: Iterable[tuple[str, bool, str]]) -> None:
    """Raise UserError for the first of `checks` (key, whether its value is valid, what is expected) that fails."""
    for key, is_valid, expected in checks:
        if not is_valid:
            value = content.get(key)
            shown = f'"{printable(value)}"' if isinstance(value, str) else printable(value)
            raise UserError(f"{path}: {key} is {shown}; expected {expected}.")
