"""The exceptions for what a person can put right."""


class UserError(Exception):
    """A file, folder, label or setting that was given is wrong: says what, where and the remedy in three lines."""


class UsageError(UserError):
    """The command line itself is wrong; a program ends with exit code 2 for it, with 1 for any other UserError."""
