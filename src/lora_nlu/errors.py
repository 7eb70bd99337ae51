"""Exceptions for mistakes that the user can correct, and text for their messages."""

import re

_NO_MEMORY = re.compile("DefaultCPUAllocator|bad_alloc|Cannot allocate memory")  # in torch's RuntimeErrors


class UserError(Exception):
    """A wrong file, folder, label or setting; the message says what, where and the remedy in at most three lines."""


class UsageError(UserError):
    """The command line itself is wrong; a program ends with exit code 2 for it, with 1 for any other UserError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine (not a GPU) has not enough memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def printable(text: object, limit: int = 80) -> str:
    """Text from an untrusted file for a message: on one line, control characters escaped, cut after `limit`."""
    cut = str(text)[:limit] + ("..." if len(str(text)) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, printable; the error's type if the message is empty."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
