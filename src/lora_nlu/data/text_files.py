"""Text files as bytes and as UTF-8, with errors that name the file and line."""

import codecs
from pathlib import Path

from lora_nlu.errors import UserError


def read_nonempty(path: Path) -> bytes:
    """The content of a file. Raises UserError if it can't be read or has nothing but white space."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}.") from e
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"{path}: the file is empty.")
    return content


def decode_utf8(path: Path, content: bytes) -> str:
    """The text of a file's content, without a byte-order mark. Raises UserError, with the line, if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {e.start}). Save the file as UTF-8.") from e
