"""The pictures of a report, as PNG and SVG: colours that colour-blind readers tell apart, and markers beside them."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_nlu.files import publish
from lora_nlu.tasks import REPORTED, TASKS

# Okabe and Ito's palette
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
WIDTH = 3.9  # of a panel, inches
DEVIATION = "± standard deviation"


def style(i: int) -> dict[str, Any]:
    """The i-th look: eight colours, then the same with other markers and lines, 64 in all."""
    color, rest = i % len(COLORS), (i + i // len(COLORS)) % len(COLORS)
    return {
        "color": COLORS[color],
        "marker": MARKERS[rest],
        "linestyle": LINES[rest],
        "markersize": 6,
        "linewidth": 1.8,
    }


def panels(
    tasks: Sequence[str], height: float = 3.1, grid: str = "y", sharey: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each task, in rows of up to four; height: of a panel, inches."""
    count = len(tasks)
    columns = min(count, 4) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns + 0.6, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    for used, task in zip(axes, tasks, strict=False):
        used.set_title(TASKS[task].title)
        used.spines[["top", "right"]].set_visible(False)
        used.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
        used.set_axisbelow(True)
    return figure, list(axes[:count])


def percent(task: str) -> str:
    return f"{TASKS[task].metrics[0].replace('_', ' ').capitalize()} (%)"


def save(figure: Figure, folder: Path, name: str) -> str:
    for kind in ("png", "svg"):
        partial = folder / f".{name}.{kind}.partial"
        try:
            figure.savefig(partial, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            publish(partial, folder / f"{name}.{kind}")
        finally:
            partial.unlink(missing_ok=True)
    return name


def finish(figure: Figure, axes: Sequence[Any], title: str) -> Figure:
    """Put a title above all panels and below them one legend of the labels that any of them has, and room for both."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    width, height = figure.get_size_inches()
    letters = 10 * width  # of a line of text
    columns = max(1, min(len(found), int(letters / (max(map(len, found)) + 8))))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)
    lines = textwrap.wrap(title, int(letters))
    figure.suptitle("\n".join(lines))
    figure.set_size_inches(width, height + 0.25 * (len(lines) + -(-len(found) // columns)))
    return figure


def over_seeds(cells: Sequence[Any], how: str) -> str:
    """What a figure of these cells is, for a title: of several seeds a median, and how the others are shown."""
    most = max(len(cell.done) for cell in cells)
    return f"median {how} over up to {most} seeds" if most > 1 else "one seed"


def draw(
    cells: Sequence[Any],
    methods: list[str],
    swept: Mapping[tuple[str, str], Sequence[tuple[int, Any]]],
    folder: Path,
) -> list[str]:
    """Draw what the cells of one model (report.Cell) can show; returns the pictures' names.

    methods: in the order of the legend; swept: as report.rank_cells has them.
    """
    finished = [cell for cell in cells if cell.done]
    if not finished:
        return []
    model, names = finished[0].model, []
    with matplotlib.rc_context({"font.size": 12, "svg.hashsalt": model, "text.parse_math": False}):
        of_ranks = [cell for mine in swept.values() for _, cell in mine]
        apart = {cell.method for cell in finished if cell not in of_ranks}  # a sweep has a picture of its own
        methods = [name for name in methods if len(methods) <= len(COLORS) or name in apart]
        rest = sorted((c for c in finished if c.method in methods), key=lambda cell: methods.index(cell.method))
        if any(len(run.history) > 1 for cell in rest for run in cell.done):
            names.append(save(curves(model, rest, methods), folder, f"{model}_curves"))
        if len({cell.method for cell in rest}) > 1:
            names.append(save(sizes(model, rest, methods), folder, f"{model}_parameters"))
        if any(run.paper for cell in rest for run in cell.done):
            names.append(save(against_paper(model, rest, methods), folder, f"{model}_paper"))
        if any(cell.done for cell in of_ranks):
            names.append(save(ranks(model, swept), folder, f"{model}_ranks"))
    return names


def tasks_of(tasks: Sequence[str]) -> list[str]:
    """Each once: in the paper's order, then the others."""
    here = dict.fromkeys(tasks)
    return [task for task in REPORTED if task in here] + [task for task in here if task not in REPORTED]


def curves(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """The metric against steps: the median over seeds, and a band from the least to the most."""
    cells = [cell for cell in cells if any(run.history for run in cell.done)]
    tasks = tasks_of([cell.task for cell in cells])
    figure, axes = panels(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        for cell in (cell for cell in cells if cell.task == task):
            histories = [dict(run.history) for run in cell.done]
            steps = sorted(set.intersection(*map(set, histories)))
            at = [[history[step] for history in histories] for step in steps]
            look = style(methods.index(cell.method))
            ax.plot(steps, list(map(median, at)), label=cell.method, **look)
            if len(histories) > 1:
                ax.fill_between(steps, list(map(min, at)), list(map(max, at)), color=look["color"], alpha=0.15, lw=0)
        ax.set(xlabel="step", ylabel=percent(task), xlim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return finish(figure, axes, f"{model} while training: {over_seeds(cells, 'and range')}")


def sizes(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """The best epoch's median against the number of parameters that train in the encoder."""
    tasks = tasks_of([cell.task for cell in cells])
    figure, axes = panels(tasks)
    most = max(cell.done[0].trainable for cell in cells)
    for ax, task in zip(axes, tasks, strict=True):
        for cell in (cell for cell in cells if cell.task == task):
            look = style(methods.index(cell.method)) | {"linestyle": "none", "markersize": 9}
            error_bar(ax, cell.done[0].trainable, cell.figures("best"), label=cell.method, **look)
        ax.set_xscale("symlog", linthresh=1e3, linscale=0.4)
        ax.set_xticks([0, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        ax.minorticks_off()
        ax.set_xlim(-400, max(most, 1e4) * 3)
        ax.set(xlabel="parameters trained in the encoder", ylabel=percent(task))
    return finish(figure, axes, f"{model} by parameters trained: best epoch, {over_seeds(cells, DEVIATION)}")


def error_bar(ax: Any, at: float, figures: Sequence[float], upright: bool = True, **look: Any) -> None:
    """The median of some figures with their standard deviation, if there are several."""
    deviation = stdev(figures) if len(figures) > 1 else None
    x, y = (at, median(figures)) if upright else (median(figures), at)
    ax.errorbar(x, y, **{"yerr" if upright else "xerr": deviation}, capsize=4, **look)


def short(n: float) -> str:
    """10000 to 10k."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{letter}"
    return f"{n:g}"


def against_paper(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """Our medians beside the paper's, a panel for each task, a line for each method that the paper has."""
    cells = [cell for cell in cells if cell.done[0].paper]
    tasks = tasks_of([cell.task for cell in cells])
    shown = [method for method in reversed(methods) if method in {cell.method for cell in cells}]  # from below
    figure, axes = panels(tasks, 1.3 + 0.42 * len(shown), grid="x", sharey=True)
    for ax, task in zip(axes, tasks, strict=True):
        for cell in (cell for cell in cells if cell.task == task):
            y, (paper, deviation) = shown.index(cell.method), cell.done[0].paper.figures[task]
            here, there = (style(i) | {"linestyle": "none", "markersize": 8} for i in (0, 1))
            error_bar(ax, y + 0.14, cell.figures("best"), upright=False, label="here", **here)
            ax.errorbar(paper, y - 0.14, xerr=deviation, label="paper", capsize=4, **there)
        ax.set_yticks(range(len(shown)), [textwrap.fill(method, 30) for method in shown])
        ax.set(xlabel=percent(task), ylim=(-0.6, len(shown) - 0.4))
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return finish(figure, axes, f"{model}, here and in the paper: best epoch, {over_seeds(cells, DEVIATION)}")


def ranks(model: str, swept: Mapping[tuple[str, str], Sequence[tuple[int, Any]]]) -> Figure:
    """The best epoch's median against the rank, a line for each set of layers with LoRA."""
    done = {key: [(rank, cell) for rank, cell in mine if cell.done] for key, mine in swept.items()}
    cells = [cell for mine in done.values() for _, cell in mine]
    tasks, sets = tasks_of([cell.task for cell in cells]), list(dict.fromkeys(where for _, where in done))
    every = sorted({rank for mine in done.values() for rank, _ in mine})
    figure, axes = panels(tasks)
    for ax, task in zip(axes, tasks, strict=True):
        for where in (where for name, where in done if name == task):
            points = [(rank, cell.figures("best")) for rank, cell in done[task, where]]
            look, x = style(sets.index(where)), [rank for rank, _ in points]
            ax.plot(x, [median(figures) for _, figures in points], label=where, **look)
            if any(len(figures) > 1 for _, figures in points):
                low, high = ([f(figures) for _, figures in points] for f in (min, max))
                ax.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(every, [str(rank) for rank in every])
        ax.minorticks_off()
        ax.set(xlabel="rank r", ylabel=percent(task))
    return finish(figure, axes, f"{model}, LoRA by rank and layers: best epoch, {over_seeds(cells, 'and range')}")
