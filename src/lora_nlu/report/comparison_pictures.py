"""The pictures of `report methods`: the metric against learning rates and against parameters, and the differences."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from lora_nlu.data.tasks import TASKS
from lora_nlu.report.collect import TASK_ORDER, Cell
from lora_nlu.report.grids import rates_tried, short
from lora_nlu.report.pictures import (
    DEVIATION,
    MOST_LINES,
    WIDTH,
    Style,
    add_legend,
    apart,
    balanced,
    base_looks,
    error_bar,
    give_room,
    letters,
    looks_of_settings,
    over_seeds,
    percent,
    save,
)

HEIGHT = 2.9  # of a panel, inches
Tried = Mapping[tuple[str, str], Mapping[float, float]]  # as of `rates_tried`


def draw_comparison(
    cells: Sequence[Cell],
    choosing: Sequence[Cell],
    methods: list[str],
    reference: str,
    differences: Mapping[tuple[str, str], Any],
    folder: Path,
) -> list[str]:
    """Draw the pictures, as far as there are runs for them; returns their names.

    cells: at the chosen rates; choosing: at all rates. methods: in the legend's order. reference: the method that the
    others are compared with. differences: of each from it, by (method, task), as `comparison.Difference`.
    """
    # an axis of logarithms has only rates above 0
    model, tried = cells[0].model, rates_tried([cell for cell in choosing if cell.learning_rate > 0])
    base_of = {cell.method: cell.runs[0].label for cell in cells}
    look_of = looks_of_settings(base_looks(cells), {method: base_of[method] for method in methods})
    with matplotlib.rc_context({"font.size": 12, "text.parse_math": False}):
        figures = {}
        if any(len(points) > 1 for points in tried.values()):
            shown = [method for method in methods if any(m == method for _, m in tried)]
            chosen = {(cell.task, cell.method): cell.learning_rate for cell in cells}
            figures["learning_rates"] = against_rates(model, tried, chosen, shown, reference, look_of)
        if len({cell.method for cell in cells}) > 1:
            figures["parameters"] = against_parameters(model, cells, methods, look_of)
        if differences:
            figures["differences"] = from_reference(model, differences, methods, reference, look_of)
        return [save(figure, folder, f"{model}_{name}") for name, figure in figures.items()]


def against_rates(
    model: str,
    tried: Tried,
    chosen: Mapping[tuple[str, str], float],
    methods: Sequence[str],
    reference: str,
    look_of: Mapping[str, Style],
) -> Figure:
    """A row a task; a line a method, in as few columns as a panel's lines allow. Filled: the rate that was chosen."""
    others = [method for method in methods if method != reference]
    columns = -(-len(others) // (MOST_LINES - 1)) or 1
    ends = [len(others) * i // columns for i in range(columns + 1)]
    groups = [[reference, *others[start:end]] for start, end in zip(ends, ends[1:], strict=False)]
    tasks = sorted({task for task, _ in tried}, key=TASK_ORDER.index)
    figure, axes = grid(len(tasks), columns, sharex="col", sharey="row")
    for i, task in enumerate(tasks):
        for j, group in enumerate(groups):
            ax = axes[i][j]
            for method in (method for method in group if (task, method) in tried):
                points, look = tried[task, method], look_of[method] | {"fillstyle": "none"}
                ax.plot([*points], [*points.values()], label=method, **look)
                if (rate := chosen.get((task, method), 0.0)) in points:
                    ax.plot(rate, points[rate], **look | {"fillstyle": "full", "linestyle": "none"})
            rates = sorted({rate for method in group for rate in tried.get((task, method), ())})
            ax.set_xscale("log")
            ticks = apart(rates, math.log) if len(rates) > 1 else rates
            ax.set_xticks(ticks, [short(rate) for rate in ticks])
            ax.minorticks_off()
            ax.margins(x=0.07)
            dress(ax, TASKS[task].title, i * columns + j, len(tasks) * columns)
            ax.set(xlabel="learning rate" if i == len(tasks) - 1 else "", ylabel=percent(task) if j == 0 else "")
        give_room(list(axes[i]), "y")
    title = f"{model} by learning rate, on training rows kept out of training: one seed; filled: chosen"
    return close(figure, axes, title, methods, by_column=columns > 1)


def against_parameters(
    model: str, cells: Sequence[Cell], methods: Sequence[str], look_of: Mapping[str, Style]
) -> Figure:
    """A panel a task, with the median of every method at the rate chosen for it."""
    tasks = sorted({cell.task for cell in cells}, key=TASK_ORDER.index)
    figure, axes = grid(len(tasks), 1, 2 * WIDTH + 0.6)  # wide, because many methods train about as many parameters
    flat = [row[0] for row in axes]
    trained = sorted({cell.done[0].trainable for cell in cells})
    least, most = next((n for n in trained if n), 1) / 2, 2 * max(trained[-1], 1)
    ticks = [10**n for n in range(20) if least <= 10**n <= most]
    for i, task in enumerate(tasks):
        ax = flat[i]
        if trained[0]:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=least, linscale=0.6)
        own = sorted((cell for cell in cells if cell.task == task), key=lambda cell: methods.index(cell.method))
        for k, cell in enumerate(own):
            look = look_of[cell.method] | {"linestyle": "none", "capsize": 3 + 2 * (k % 3)}
            error_bar(ax, cell.done[0].trainable, cell.figures("last"), label=cell.method, **look)
        ax.set_xticks(ticks if trained[0] else [0, *ticks])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        ax.minorticks_off()
        ax.set_xlim(least if trained[0] else -least / 2, most)
        ax.set(xlabel="parameters trained in the encoder", ylabel=percent(task))
        dress(ax, TASKS[task].title, i, len(tasks))
        give_room([ax], "y")
    title = f"{model} by parameters trained, each at its own learning rate: {over_seeds(cells, DEVIATION)}"
    return close(figure, axes, title, methods)


def from_reference(
    model: str,
    differences: Mapping[tuple[str, str], Any],
    methods: Sequence[str],
    reference: str,
    look_of: Mapping[str, Style],
) -> Figure:
    """A panel a task: each method's mean difference and its standard error; filled: more than seeds explain."""
    shown = [method for method in reversed(methods) if any(method == m for m, _ in differences)]  # from below
    tasks = sorted({task for _, task in differences}, key=TASK_ORDER.index)
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure, axes = grid(rows, columns, WIDTH * columns + 2.2, 1.0 + 0.3 * len(shown), sharey=True)
    flat = [ax for row in axes for ax in row]
    for i, task in enumerate(tasks):
        ax = flat[i]
        ax.axvline(0, color="#888888", linewidth=1)
        for y, method in enumerate(shown):
            if found := differences.get((method, task)):
                look = look_of[method] | {"linestyle": "none", "fillstyle": "full" if found.is_told else "none"}
                ax.errorbar(found.mean, y, xerr=found.error, capsize=4, elinewidth=1.4, **look)
        ax.set_yticks(range(len(shown)), shown)
        ax.set_ylim(-0.6, len(shown) - 0.4)
        dress(ax, TASKS[task].title, i, len(tasks), "x")
        ax.set_xlabel(f"{percent(task).removesuffix(' (%)')}, difference in points")
    for ax in flat[len(tasks) :]:
        ax.set_axis_off()
    title = f"{model}: difference from {reference}, mean and standard error over seeds; filled: more than seeds explain"
    return close(figure, axes, title, [])


def grid(rows: int, columns: int, width: float = 0, height: float = HEIGHT, **shared: Any) -> tuple[Figure, Any]:
    figure = Figure(
        figsize=(width or max(6.4, WIDTH * columns + 0.6), height * rows),
        layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06, wspace=0.03),
    )
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def dress(ax: Any, title: str, i: int, count: int, lines: str = "y") -> None:
    """Give a panel its title, and its letter if it is one of several."""
    ax.set_title(title)
    if count > 1:
        ax.set_title(letters(i), loc="left", fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=lines, color="#DDDDDD", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelbottom=True)


def close(figure: Figure, axes: Any, title: str, labels: Sequence[str], by_column: bool = False) -> Figure:
    """Put the title above, and below a legend of all panels, or one of each column; without labels none."""
    width, height = figure.get_size_inches()
    heading = balanced(title, int(10 * width))
    figure.suptitle(heading, fontsize="medium")
    height += 0.25 * (heading.count("\n") + 1)
    if by_column:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.28), "fontsize": "small"}
        lines = [
            add_legend(axes[-1][j], [row[j] for row in axes], labels, int(6.3 * width / 1.1), **place)
            for j in range(len(axes[0]))
        ]
        height += 0.22 * max(lines)
    elif labels:
        flat = [ax for row in axes for ax in row if ax.axison]
        height += 0.25 * add_legend(figure, flat, labels, int(10 * width), loc="outside lower center")
    figure.set_size_inches(width, height)
    return figure
