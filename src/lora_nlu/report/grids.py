"""Grids of runs: the numbers that were varied, and the cells that differ in nothing else."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_nlu.errors import printable
from lora_nlu.report.collect import Cell, differences

_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")  # of a setting that a picture's file may be named after
_NOT_VARIED = ("scaling", "vera_seed")  # the scaling follows from rank and alpha


@dataclass(frozen=True)
class Line:
    """Cells of one task and method that differ in one number; for several targets a line each.

    difference: the other settings in which the method's lines on this task differ, as text.
    points:     (number, cell), ascending.
    """

    task: str
    method: str
    targets: str
    difference: str
    points: tuple[tuple[float, Cell], ...]


def grids(cells: Sequence[Cell]) -> dict[str, list[Line]]:
    """The lines over every number that was varied, by its name: rank, alpha, learning_rate or another setting."""
    values: dict[str, set[str]] = {}
    for cell in cells:
        for name, value in _settings(cell).items():
            values.setdefault(name, set()).add(value)
    varied = [name for name, of_name in values.items() if len(of_name) > 1 and _NAME.fullmatch(name)]
    varied.sort(key=lambda name: (name != "rank", name != "alpha"))
    found = {name: lines_over(name, cells) for name in varied if name not in _NOT_VARIED}
    return {name: lines for name, lines in found.items() if any(len(line.points) > 1 for line in lines)}


def lines_over(name: str, cells: Sequence[Cell]) -> list[Line]:
    """The lines over one number, in the order of the cells.

    Along the ranks alpha may stay or change with them; only where one rank has several alphas is each a line.
    """
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[tuple[float, Cell]]] = {}
    for cell in cells:
        settings = _settings(cell)
        if (number := _number(settings.pop(name, ""))) is not None:
            if name == "rank":
                settings.pop("alpha", None)
            key = cell.task, printable(cell.runs[0].label, 200), tuple(sorted(settings.items()))
            groups.setdefault(key, []).append((number, cell))
    groups = {key: points for key, points in groups.items() if len({number for number, _ in points}) > 1}
    of_method: dict[tuple[str, str], list[tuple[tuple[str, str], ...]]] = {}
    for task, method, settings_of_group in groups:
        of_method.setdefault((task, method), []).append(settings_of_group)
    texts = {key: differences(settings_of_groups) for key, settings_of_groups in of_method.items()}
    lines = []
    for (task, method, settings_of_group), points in groups.items():
        difference = texts[task, method][settings_of_group]
        sets = {cell.runs[0].targets for _, cell in points}
        for targets in sorted(sets, key=lambda names: (names.count(","), names)):
            own = sorted((p for p in points if p[1].runs[0].targets == targets), key=lambda point: point[0])
            by_alpha: dict[float, list[tuple[float, Cell]]] = {}
            for number, cell in own:
                by_alpha.setdefault(cell.runs[0].alpha or 0.0, []).append((number, cell))
            if name != "rank" or len({number for number, _ in own}) == len(own):
                lines.append(Line(task, method, targets, difference, tuple(own)))
                continue
            for alpha in sorted(by_alpha):
                text = ", ".join(filter(None, [difference, f"alpha {alpha:g}"]))
                lines.append(Line(task, method, targets, text, tuple(by_alpha[alpha])))
    return lines


def _settings(cell: Cell) -> dict[str, str]:
    """All that decides the result of a cell but its task, method and targets; LoRA's scaling as rank and alpha."""
    run = cell.runs[0]
    settings = {name: value for name, value in run.settings if name != "variant"}
    if run.targets:
        # Layers of different ranks have the method's name, which lists them: no number, so no line over ranks
        settings["rank"] = cell.method if run.rank is None else str(run.rank)
    if run.alpha is not None:
        del settings["scaling"]
        settings["alpha"] = f"{run.alpha:g}"
    return settings


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def rates_tried(cells: Sequence[Cell]) -> dict[tuple[str, str], dict[float, float]]:
    """The figures after training by (task, method) and learning rate, ascending; of each the cells have one run."""
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for cell in sorted(cells, key=lambda cell: cell.learning_rate):
        for figure in cell.figures("last"):
            tried.setdefault((cell.task, cell.method), {})[cell.learning_rate] = figure
    return tried


def short(n: float) -> str:
    """10000 to 10k, 0.0005 to 5e-4, 0.01 to 1e-2."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{letter}"
    if 0 < n < 0.1:
        digits, _, exponent = f"{n:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{n:g}"
