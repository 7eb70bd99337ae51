"""The exceptions for what a person can put right."""

import re

_NO_MEMORY = re.compile("DefaultCPUAllocator|bad_alloc|Cannot allocate memory")  # how torch says it, in a RuntimeError


class UserError(Exception):
    """A file, folder, label or setting that was given is wrong: says what, where and the remedy in three lines."""


class UsageError(UserError):
    """The command line itself is wrong; a program ends with exit code 2 for it, with 1 for any other UserError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory (of the machine, not of a GPU)."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def printable(text: object, limit: int = 80) -> str:
    """Text from a foreign file, fit for a message: on one line, control characters escaped, not endless."""
    cut = str(text)[:limit] + ("..." if len(str(text)) > limit else "")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, fit for a message of ours; the error's type if it has none."""
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
