"""The command line: flags to dataclasses, lists in flags to Python lists."""

import csv
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from lora_nlu.errors import UsageError, UserError
from lora_nlu.files import read_json
from lora_nlu.methods.description import target_names
from lora_nlu.training.legacy_flags import translate


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: list[str], groups: Any) -> tuple[tuple[Any, ...], list[str]]:
    """Read flags, or the JSON file that is the only argument, into one object of each dataclass of `groups`.

    Returns them and a line for each old flag that was translated. Raises UsageError; an unknown flag names near ones.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _from_json(Path(argv[0]))
    argv, notes = translate(argv)
    parser = _Parser(groups, allow_abbrev=False)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as e:
        raise UsageError("\n".join(str(e).strip().splitlines()[:3])) from e
    if rest:
        near = difflib.get_close_matches(rest[0], parser._option_string_actions, n=3)
        raise UsageError(f"unknown flag {rest[0]}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    return tuple(parsed), notes


def _from_json(path: Path) -> list[str]:
    """The flags of a JSON object: a list is several values, null or a list of none a flag left out."""
    try:
        settings = read_json(path)
    except UserError as e:
        raise UsageError(str(e)) from e
    argv = []
    for name, value in settings.items():
        if value not in (None, []):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def parse_targets(text: str | None) -> list[str] | None:
    """`query,value` to names of `lora.TARGETS`, in their order; `query_proj` is `query`. Raises UsageError."""
    if text is None:
        return None
    try:
        return target_names(text)
    except ValueError as e:
        raise UsageError(f"--lora_target_modules {text}: {e}") from e


def parse_layers(text: str | None, count: int) -> list[int] | None:
    """`0-3,11` to the numbers of those of `count` encoder layers, from 0. Raises UsageError."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UsageError(f"--lora_layers {text}: give numbers and ranges from 0, such as 0-3,{count - 1}.")
        if int(last) >= count:
            raise UsageError(f"--lora_layers {text}: the model has {count} layers, 0 to {count - 1}.")
        numbers |= set(range(int(first), int(last) + 1))
    return sorted(numbers)


def parse_names(flag: str, text: str | None) -> tuple[str, ...] | None:
    """`a,b,c` to names without blanks around them; one that holds a comma stands in quotes. Raises UsageError."""
    if text is None:
        return None
    names = tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    if not names or "" in names or len({*names}) < len(names):
        raise UsageError(f"--{flag} {text}: give different names with commas between them.")
    return names
