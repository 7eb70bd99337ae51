"""The lines of a text file of any size, one after another."""

import codecs
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from huggingface_hub.utils import tqdm

from lora_nlu.errors import UserError


def read_lines(path: Path, newline: str, progress: bool = True) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte-order mark; newline: as in `open`.

    With `progress` a bar appears on a terminal after five seconds. Raises UserError if the file can't be read, has
    nothing but white space or, with the line, is not UTF-8.
    """
    try:
        with path.open("rb") as binary:
            if not any(line.removeprefix(codecs.BOM_UTF8).strip() for line in binary):
                raise UserError(f"{path}: the file is empty.")
            binary.seek(0)
            size, text, disable = path.stat().st_size, f"Reading {path.name}", None if progress else True
            with tqdm(total=size, desc=text, unit="B", unit_scale=True, delay=5, disable=disable) as bar:
                for number, line in enumerate(TextIOWrapper(binary, "utf-8-sig", newline=newline), start=1):
                    yield line
                    if number % 100 == 0:
                        bar.update(binary.tell() - bar.n)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}.") from e
    except UnicodeDecodeError as e:
        raise _not_utf8(path) from e


def _not_utf8(path: Path) -> UserError:
    """Where a file is not UTF-8."""
    start = 0
    with path.open("rb") as binary:
        for number, line in enumerate(binary, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as e:
                return UserError(f"{path}:{number}: not UTF-8 (byte {start + e.start}). Save the file as UTF-8.")
            start += len(line)
    return UserError(f"{path}: it was changed while it was read.")
