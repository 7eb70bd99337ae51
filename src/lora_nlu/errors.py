"""Exceptions for mistakes that the user can correct, and text for their messages."""

import re

_NO_MEMORY = re.compile("DefaultCPUAllocator|bad_alloc|Cannot allocate memory")  # in torch's RuntimeErrors


class UserError(Exception):
    """A wrong file, folder, label or setting; the message says what, where and the remedy in at most three lines.

    Names in it may come from an untrusted file: control characters in it never reach the screen.
    """

    def __str__(self) -> str:
        return "\n".join(printable(line, 10_000) for line in super().__str__().split("\n"))


class UsageError(UserError):
    """The command line itself is wrong; a program ends with exit code 2 for it, with 1 for any other UserError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine (not a GPU) has not enough memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def printable(text: object, limit: int = 80) -> str:
    """Text from an untrusted file for a message: on one line, control characters escaped, cut after `limit`."""
    try:
        text = str(text)
    except (RecursionError, ValueError):  # lists in lists in lists ..., an integer of 5,000 digits
        text = type(text).__name__
    cut = text[:limit] + ("..." if len(text) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


def printable_lines(text: object) -> str:
    """Text for the screen, however long, its lines kept: it may quote names that nothing has escaped."""
    return "\n".join(printable(line, len(line)) for line in str(text).split("\n"))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, printable; the error's type if the message is empty."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
