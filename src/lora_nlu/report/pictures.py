"""The pictures of a report, as PNG; colours that colour-blind readers can distinguish, and different markers."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import matplotlib
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression

from lora_nlu.data.tasks import TASKS
from lora_nlu.files import atomic_write
from lora_nlu.report.collect import TASK_ORDER, Cell

# Okabe and Ito's palette
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
WIDTH = 3.9  # of a panel, inches
DEVIATION = "±\N{NO-BREAK SPACE}standard\N{NO-BREAK SPACE}deviation"


Sweep = Mapping[tuple[str, str], Sequence[tuple[int, Cell]]]  # what `tables.rank_cells` returns


def draw(cells: Sequence[Cell], methods: list[str], swept: Sweep, folder: Path) -> list[str]:
    """Draw the pictures that the cells of one model allow; returns their names.

    methods: in the order of the legend. More of them than colours leave out those of `swept`, drawn by themselves.
    """
    finished = [cell for cell in cells if cell.done]
    if not finished:
        return []
    model, names = finished[0].model, []
    with matplotlib.rc_context({"font.size": 12, "text.parse_math": False}):
        swept_cells = [cell for pairs in swept.values() for _, cell in pairs if cell.done]
        if len(methods) > len(COLORS):
            methods = [m for m in methods if any(cell.method == m and cell not in swept_cells for cell in finished)]
        main = sorted((c for c in finished if c.method in methods), key=lambda cell: methods.index(cell.method))
        sweep = [cell for cell in swept_cells if cell.method not in methods]
        sweep_methods = list(dict.fromkeys(cell.method for cell in sweep))
        for chosen, legend, name in ((main, methods, "curves"), (sweep, sweep_methods, "ranks_curves")):
            if any(len(run.history) > 1 for cell in chosen for run in cell.done):
                names.append(save(curves(model, chosen, legend), folder, f"{model}_{name}"))
        if len({cell.method for cell in main}) > 1:
            names.append(save(sizes(model, main, methods), folder, f"{model}_parameters"))
        if any(run.paper for cell in main for run in cell.done):
            names.append(save(against_paper(model, main, methods), folder, f"{model}_paper"))
        if swept_cells:
            names.append(save(ranks(model, swept), folder, f"{model}_ranks"))
    return names


def curves(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """The metric against steps: the median over seeds, and a band from the lowest to the highest."""
    look_of = looks(cells, methods)
    cells = [cell for cell in cells if any(run.history for run in cell.done)]
    figure, axes = panels(cells)
    for task, ax in axes.items():
        for cell in (cell for cell in cells if cell.task == task):
            histories = [dict(run.history) for run in cell.done]
            steps = sorted(set.intersection(*map(set, histories)))
            figures = [[history[step] for history in histories] for step in steps]
            plot_band(ax, steps, figures, cell.method, look_of[cell.method])
        ax.set(xlabel="step", ylabel=percent(task), xlim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    return finish(figure, axes, f"{model} while training: {over_seeds(cells, 'and range')}", methods)


def plot_band(ax: Any, x: Sequence[int], figures: Sequence[Sequence[float]], label: str, look: dict[str, Any]) -> None:
    """A line through the medians of the figures at each x, and a band from the lowest to the highest."""
    ax.plot(x, list(map(median, figures)), label=label, **look)
    if any(len(at_one_x) > 1 for at_one_x in figures):
        ax.fill_between(x, list(map(min, figures)), list(map(max, figures)), color=look["color"], alpha=0.15, lw=0)


def sizes(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """The best epoch's median against the number of parameters that train in the encoder.

    Methods of about the same size would hide each other, so they are drawn side by side, a marker's width apart.
    """
    marker, look_of = 9, looks(cells, methods)  # marker: points
    figure, axes = panels(cells)
    trained = sorted({cell.done[0].trainable for cell in cells})
    least, most = next((n for n in trained if n), 1) / 2, 2 * max(trained[-1], 1)
    steps = (1, 2, 5) if most < 50 * least else (1,)
    ticks = [m * 10**n for n in range(12) for m in steps if least <= m * 10**n <= most]
    to_none = 0.0 if trained[0] else 0.6  # decades from 0 to the least
    decade = 0.8 * 72 * WIDTH / (math.log10(most / least) + to_none)  # points, about
    for task, ax in axes.items():
        if to_none:
            ax.set_xscale("symlog", linthresh=least, linscale=to_none)
        else:
            ax.set_xscale("log")
        own = sorted((cell for cell in cells if cell.task == task), key=lambda cell: cell.done[0].trainable)
        places = [decade * (math.log10(n / least) if n else -to_none) for n in (c.done[0].trainable for c in own)]
        for cell, place, moved in zip(own, places, apart(places, marker), strict=True):
            look = look_of[cell.method] | {"linestyle": "none", "markersize": marker}
            bar = error_bar(ax, cell.done[0].trainable, cell.figures("best"), label=cell.method, **look)
            shift = ScaledTranslation((moved - place) / 72, 0, figure.dpi_scale_trans)
            for artist in bar.get_children():
                artist.set_transform(ax.transData + shift)
        ax.set_xticks(ticks if trained[0] else [0, *ticks])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        ax.minorticks_off()
        ax.set_xlim(least if trained[0] else -least / 3, most)
        ax.set(xlabel="parameters trained in the encoder", ylabel=percent(task))
    return finish(figure, axes, f"{model} by parameters trained: best epoch, {over_seeds(cells, DEVIATION)}", methods)


def apart(places: Sequence[float], least: float) -> list[float]:
    """Ascending numbers, moved as little as possible so that each is at least `least` above the one before."""
    steps = [i * least for i in range(len(places))]
    moved = isotonic_regression([place - step for place, step in zip(places, steps, strict=True)]).x
    return [place + step for place, step in zip(moved, steps, strict=True)]


def against_paper(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """Our medians beside the paper's: a panel for each task, a line for each method in the paper."""
    papers = {(cell.method, cell.task): run.paper for cell in cells if (run := cell.done[0]).paper}
    cells = [cell for cell in cells if (cell.method, cell.task) in papers]
    shown = [method for method in reversed(methods) if method in {cell.method for cell in cells}]  # from below
    figure, axes = panels(cells, 1.3 + 0.42 * len(shown), grid="x", sharey=True)
    for task, ax in axes.items():
        for cell in (cell for cell in cells if cell.task == task):
            y, (paper, deviation) = shown.index(cell.method), papers[cell.method, task].figures[task]
            here, there = (style(i) | {"linestyle": "none", "markersize": 8} for i in (0, 1))
            error_bar(ax, y + 0.14, cell.figures("best"), upright=False, label="here", **here)
            ax.errorbar(paper, y - 0.14, xerr=deviation, label="paper", capsize=4, **there)
        ax.set_yticks(range(len(shown)), [textwrap.fill(method, 30) for method in shown])
        ax.set(xlabel=percent(task), ylim=(-0.6, len(shown) - 0.4))
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    title = f"{model}: best epoch, {over_seeds(cells, DEVIATION)} here, 5 in the paper"
    return finish(figure, axes, title, ("here", "paper"))


def ranks(model: str, swept: Sweep) -> Figure:
    """The best epoch's median against the rank, a line for each set of layers with LoRA."""
    done = {key: [(rank, cell) for rank, cell in pairs if cell.done] for key, pairs in swept.items()}
    cells = [cell for pairs in done.values() for _, cell in pairs]
    sets = list(dict.fromkeys(layers for _, layers in done))
    all_ranks = sorted({rank for pairs in done.values() for rank, _ in pairs})
    figure, axes = panels(cells)
    for task, ax in axes.items():
        for layers in (layers for name, layers in done if name == task):
            figures = [cell.figures("best") for _, cell in done[task, layers]]
            plot_band(ax, [rank for rank, _ in done[task, layers]], figures, layers, style(sets.index(layers)))
        ax.set_xscale("log", base=2)
        ax.set_xticks(all_ranks, [str(rank) for rank in all_ranks])
        ax.minorticks_off()
        ax.set(xlabel="rank r", ylabel=percent(task))
    return finish(figure, axes, f"{model}, LoRA by rank and layers: best epoch, {over_seeds(cells, 'and range')}", sets)


def looks(cells: Sequence[Cell], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The look of each method in plots: the colour and marker that its runs record, if no other method has them yet.

    Methods without a recorded look, and further settings of the same method, get the first of `style` that is free.
    """
    recorded = {cell.method: run.look for cell in cells for run in cell.runs if run.look}
    look_of: dict[str, dict[str, Any]] = {}
    for method in (method for method in methods if method in recorded):
        color, marker = recorded[method]
        used_pairs = {(look["color"], look["marker"]) for look in look_of.values()}
        if is_color_like(color) and marker in Line2D.markers and (color, marker) not in used_pairs:
            look_of[method] = _look(color, marker, LINES[COLORS.index(color)] if color in COLORS else LINES[0])
    for method in (method for method in methods if method not in look_of):
        used_colors = {look["color"] for look in look_of.values()}
        used_pairs = {(look["color"], look["marker"]) for look in look_of.values()}
        unused = [look for look in map(style, range(64)) if (look["color"], look["marker"]) not in used_pairs]
        new_colors = [look for look in unused if look["color"] not in used_colors]
        look_of[method] = [*new_colors, *unused, style(len(look_of))][0]
    return {method: look_of[method] for method in methods}


def style(i: int) -> dict[str, Any]:
    """The i-th of 64 looks: eight colours, then the same with other markers and lines."""
    shape = (i + i // len(COLORS)) % len(COLORS)
    return _look(COLORS[i % len(COLORS)], MARKERS[shape], LINES[shape])


def _look(color: str, marker: str, line: Any) -> dict[str, Any]:
    return {"color": color, "marker": marker, "linestyle": line, "markersize": 6, "linewidth": 1.8}


def panels(
    cells: Sequence[Cell], height: float = 3.1, grid: str = "y", sharey: bool = False
) -> tuple[Figure, dict[str, Any]]:
    """A figure, and its panel for each task, in rows of up to four; height: of a panel, inches."""
    tasks = sorted({cell.task for cell in cells}, key=TASK_ORDER.index)
    count = len(tasks)
    columns = {4: 2, 5: 3, 6: 3}.get(count, min(count, 4))
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.4, WIDTH * columns + 0.6), height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    for used, task in zip(axes, tasks, strict=False):
        used.set_title(TASKS[task].title)
        used.spines[["top", "right"]].set_visible(False)
        used.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
        used.set_axisbelow(True)
    return figure, dict(zip(tasks, axes, strict=False))


def percent(task: str) -> str:
    name = TASKS[task].metrics[0].partition("_")[0]
    return f"{name.capitalize()}{' correlation' * (name != 'accuracy')} (%)"


def short(n: float) -> str:
    """10000 to 10k."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{letter}"
    return f"{n:g}"


def error_bar(ax: Any, at: float, figures: Sequence[float], upright: bool = True, **look: Any) -> Any:
    """The median of some figures with their standard deviation, if there are several."""
    deviation = stdev(figures) if len(figures) > 1 else None
    x, y = (at, median(figures)) if upright else (median(figures), at)
    return ax.errorbar(x, y, **{"yerr" if upright else "xerr": deviation}, capsize=4, **look)


def over_seeds(cells: Sequence[Cell], spread: str) -> str:
    """What the points of these cells are, for a title; spread: what is drawn of the seeds beside their median."""
    counts = {len(cell.done) for cell in cells}
    return f"median {spread} over {'up to ' * (len(counts) > 1)}{max(counts)} seeds" if max(counts) > 1 else "one seed"


def finish(figure: Figure, axes: dict[str, Any], title: str, labels: Sequence[str]) -> Figure:
    """Put a title above all panels and one legend below them, of those labels that a panel has; enlarge the figure."""
    panels_legends = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes.values()]
    handle_of = {label: handle for legend in panels_legends for handle, label in legend}
    width, height = figure.get_size_inches()
    letters = int(10 * width)  # of a line of text
    labels = [label for label in labels if label in handle_of]
    texts = [textwrap.fill(label, letters - 8) for label in labels]
    columns = max(1, min(len(texts), letters // (max(map(len, texts)) + 8)))
    handles = [handle_of[label] for label in labels]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False)
    heading = textwrap.fill(title, letters)
    figure.suptitle(heading, fontsize="medium")
    lines = -(-sum(text.count("\n") + 1 for text in texts) // columns) + heading.count("\n") + 1
    figure.set_size_inches(width, height + 0.25 * lines)
    return figure


def save(figure: Figure, folder: Path, name: str) -> str:
    with atomic_write(folder / f"{name}.png") as partial:
        figure.savefig(partial, format="png", dpi=150)
    return name
