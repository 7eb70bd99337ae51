"""The one exception for what a person can put right."""


class UserError(Exception):
    """A file, folder, label or setting that was given is wrong: says what, where and the remedy in three lines."""
