"""Regular expressions of an untrusted adapter_config.json, matched in bounded time.

Python's `re` tries the ways to match one after another, of which `([a-z.]+)+!` has 2^n. Here all ways are followed at
once, as the set of places that they have reached, and the steps are counted.
"""

import re
from collections.abc import Iterable
from typing import Any

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!]|\{(?:\d*,\d*|\d+)\}|.", re.DOTALL)
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_STEPS, _STEPS_TO_COMPILE = 2_000_000, 100  # the most for one call, about a second; for one part of a pattern
_PEFT_NAME = r"(.*\.)?({})$"  # how PEFT matches the names in rank_pattern and alpha_pattern
# What a pattern is parsed to: branches, each a list of (text that `re` matches in one way, or a group; least and most
# repeats, None: any number)
_Branches = list[list[tuple[Any, int, int | None]]]


def check_pattern(pattern: str, ends_name: bool = False) -> None:
    """Raise ValueError, with the reason, for a pattern that `matching` can't match; `ends_name` as there."""
    try:
        if len(pattern) > 10_000:
            raise ValueError("too long")
        full = _PEFT_NAME.format(pattern) if ends_name else pattern
        re.compile(full)
        _parse(_TOKEN.findall(full)[::-1])
    except (re.error, RecursionError, OverflowError) as e:
        raise ValueError(str(e)) from e


def matching(patterns: Iterable[str], names: Iterable[str], ends_name: bool = False) -> dict[str, str]:
    """The first of the patterns that matches each name, for names with one: the full name, or with `ends_name` its end.

    Raises ValueError if that takes too many steps.
    """
    found: dict[str, str] = {}
    rest, matcher = [*names], _Matcher()
    try:
        for pattern in patterns:
            found |= dict.fromkeys(matcher.matched(pattern, rest, ends_name), pattern)
            rest = [name for name in rest if name not in found]
    except RecursionError as e:
        raise ValueError("the pattern is nested too deeply") from e
    return found


def _parse(tokens: list[str]) -> _Branches:
    """Branches up to a closing parenthesis or the end, of a valid pattern whose tokens are given from the last.

    Takes the tokens from the list. Raises ValueError for what is not supported.
    """
    branches: _Branches = [[]]
    while tokens and tokens[-1] != ")":
        token, branch = tokens.pop(), branches[-1]
        part: Any = token
        if token == "|":
            branches.append([])
            continue
        if token in ("(", "(?:", "(?=", "(?!"):
            part = token, _parse(tokens)
            tokens.pop()
        elif token in _REPEATS:
            raise ValueError("only the groups (...), (?:...), (?=...) and (?!...) are supported")
        elif token[0] == "\\" and token[1:].isdigit():
            raise ValueError("references to groups are not supported")
        if tokens and (tokens[-1] in _REPEATS or tokens[-1][0] == "{" != tokens[-1]):
            branch.append((part, *_bounds(tokens.pop())))
            if tokens and tokens[-1] == "?":
                tokens.pop()  # lazy: it matches the same names
            elif tokens and tokens[-1] in _REPEATS:
                raise ValueError("possessive repeats are not supported")
        elif branch and isinstance(part, str) and isinstance(branch[-1][0], str) and branch[-1][1:] == (1, 1):
            branch[-1] = branch[-1][0] + part, 1, 1
        else:
            branch.append((part, 1, 1))
    return branches


def _bounds(token: str) -> tuple[int, int | None]:
    """The least and most repeats of *, +, ?, {3}, {3,}, {,5} or {3,5}; None: any number."""
    if token in _REPEATS:
        return _REPEATS[token]
    low, comma, high = token[1:-1].partition(",")
    return int(low or 0), int(high) if high else None if comma else int(low)


class _Matcher:
    """Matches names, and counts the steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.compiled: dict[str, re.Pattern] = {}

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _STEPS:
            raise ValueError("its patterns take too many steps to match")

    def matched(self, pattern: str, names: list[str], ends_name: bool) -> list[str]:
        full = _PEFT_NAME.format(pattern) if ends_name else pattern
        self.count(_STEPS_TO_COMPILE + 5 * len(full) + len(names))
        if not {*"()|*+?{"} & {*pattern}:  # `re` tries it once after each dot
            match = re.compile(full).match if ends_name else re.compile(full).fullmatch
            return [name for name in names if match(name)]
        branches = _parse(_TOKEN.findall(full)[::-1])
        ends = {name: self.ends(branches, name, {0}) for name in names}
        return [name for name in names if (ends[name] if ends_name else len(name) in ends[name])]

    def ends(self, branches: _Branches, name: str, starts: set[int]) -> set[int]:
        """The places in a name where a match that begins at one of `starts` can end."""
        found: set[int] = set()
        for branch in branches:
            places = starts
            for part, low, high in branch:
                for _ in range(min(low, len(name) + 1)):  # more repeats reach the same places
                    places = self.step(part, name, places)
                new, repeats = places, low
                while new and (high is None or repeats < high):
                    new = self.step(part, name, new) - places
                    places, repeats = places | new, repeats + 1
            found |= places
        return found

    def step(self, part: Any, name: str, starts: set[int]) -> set[int]:
        """The places after one match of a part of a pattern."""
        self.count(1 + len(starts))
        if not starts:
            return starts
        if isinstance(part, str):
            if part not in self.compiled:
                self.count(_STEPS_TO_COMPILE)
                self.compiled[part] = re.compile(part)
            match = self.compiled[part].match
            return {found.end() for start in starts if (found := match(name, start))}
        kind, branches = part
        if kind in ("(", "(?:"):
            return self.ends(branches, name, starts)
        return {start for start in starts if bool(self.ends(branches, name, {start})) == (kind == "(?=")}
