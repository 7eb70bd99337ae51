"""The pictures of a report, as PNG; colours that colour-blind readers can distinguish, and different markers."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from string import ascii_lowercase
from typing import Any

import matplotlib
from matplotlib.colors import is_color_like, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import printable
from lora_nlu.files import atomic_write
from lora_nlu.report.collect import TASK_ORDER, Cell
from lora_nlu.report.grids import Line, grids, short

# Okabe and Ito's palette and markers, for methods whose look is unknown
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = "osD^vPX*"
# Of the settings of one method, which share its colour and marker: together 36 different looks. Open markers come
# first, because they show what lies below them.
FILLS = ("none", "full", "left", "bottom", "right", "top")
LINES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))
LARGER = {"P": 1.3, "X": 1.3, "*": 1.5}  # of markers that look smaller than others
BEST = "best\N{NO-BREAK SPACE}epoch"
MOST_LINES = 7  # of a panel
WIDTH = 3.9  # of a panel, inches; two beside each other are readable in a page of 600 pixels
DEVIATION = "±\N{NO-BREAK SPACE}standard\N{NO-BREAK SPACE}deviation"
AXES = {"rank": "LoRA rank r", "alpha": "LoRA alpha"}  # what the axis of a varied number says, if not its name
FILES = {"rank": "ranks", "alpha": "alphas", "learning_rate": "learning_rates"}

Part = tuple[str, list[str]]  # a panel: its task, and the labels of its lines
Style = dict[str, Any]  # of a line, as matplotlib's arguments


def draw(cells: Sequence[Cell], methods: list[str], folder: Path) -> list[str]:
    """Draw the pictures that the cells of one model allow; returns their names. methods: in the legend's order."""
    finished = sorted((cell for cell in cells if cell.done), key=lambda cell: methods.index(cell.method))
    if not finished:
        return []
    model, figures = finished[0].model, dict[str, Figure]()
    with matplotlib.rc_context({"font.size": 12, "text.parse_math": False}):
        if any(len(run.history) > 1 for cell in finished for run in cell.done):
            figures["curves"] = curves(model, finished, methods)
        if len({cell.method for cell in finished}) > 1:
            figures["parameters"] = sizes(model, finished, methods)
        if any(run.paper for cell in finished for run in cell.done):
            figures["paper"] = against_paper(model, finished, methods)
        for name, lines in grids(finished).items():
            figures[FILES.get(name, name)] = over_number(model, finished, name, lines)
        return [save(figure, folder, f"{model}_{name}") for name, figure in figures.items()]


def curves(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """The metric against steps: the median over seeds, and a band from the lowest to the highest."""
    look_of, groups = looks(cells, methods), groups_of(cells, methods)
    cells = [cell for cell in cells if any(run.history for run in cell.done)]
    parts = parts_of(groups, [(cell.task, cell.method) for cell in cells])
    by_place = {(cell.task, cell.method): cell for cell in cells}
    figure, axes = panels(parts)
    last_step = {cell.task: 0 for cell in cells}
    for (task, labels), ax in zip(parts, axes, strict=True):
        for label in labels:
            histories = [dict(run.history) for run in by_place[task, label].done]
            steps = sorted(set.intersection(*map(set, histories)))
            figures = [[history[step] for history in histories] for step in steps]
            plot_band(ax, steps, figures, label, look_of[label])
            last_step[task] = max([last_step[task], *steps])
        ax.set(xlabel="training step", ylabel=percent(task), xlim=(0, 1.06 * last_step[task] or 1))
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
    title = f"{model} while training: {over_seeds(cells, 'and range')}"
    return finish(figure, parts, axes, title, [method for group in groups for method in group], len(groups) > 1)


def plot_band(ax: Any, x: Sequence[float], figures: Sequence[Sequence[float]], label: str, look: Style) -> None:
    """A line through the medians of the figures at each x, and a band from the lowest to the highest."""
    ax.plot(x, list(map(median, figures)), label=label, markevery=max(1, len(x) // 8), **look)
    if any(len(at_one_x) > 1 for at_one_x in figures):
        ax.fill_between(x, list(map(min, figures)), list(map(max, figures)), color=look["color"], alpha=0.15, lw=0)


def sizes(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """The best epoch's median against the number of parameters that train in the encoder."""
    look_of, groups = looks(cells, methods), groups_of(cells, methods)
    parts = parts_of(groups, [(cell.task, cell.method) for cell in cells])
    by_place = {(cell.task, cell.method): cell for cell in cells}
    figure, axes = panels(parts)
    trained = sorted({cell.done[0].trainable for cell in cells})
    least, most = next((n for n in trained if n), 1) / 2, 2 * max(trained[-1], 1)
    steps = (1, 2, 5) if most < 50 * least else (1,)
    ticks = [m * 10**n for n in range(20) for m in steps if least <= m * 10**n <= most]
    for (task, labels), ax in zip(parts, axes, strict=True):
        if trained[0]:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=least, linscale=0.6)  # 0.6 decades from 0 to the least
        for i, label in enumerate(labels):
            cell, look = by_place[task, label], look_of[label] | {"linestyle": "none"}
            look["markersize"] *= 1.3
            # Of points in the same place the caps have different widths
            error_bar(ax, cell.done[0].trainable, cell.figures("best"), label=label, capsize=3 + 2 * (i % 3), **look)
        ax.set_xticks(ticks if trained[0] else [0, *ticks])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        ax.minorticks_off()
        ax.set_xlim(least if trained[0] else -least / 2, most)
        ax.set(xlabel="parameters trained in the encoder", ylabel=percent(task))
    title = f"{model} by parameters trained: {BEST}, {over_seeds(cells, DEVIATION)}"
    return finish(figure, parts, axes, title, [method for group in groups for method in group], len(groups) > 1)


def against_paper(model: str, cells: Sequence[Cell], methods: list[str]) -> Figure:
    """Our medians beside the paper's: a panel for each task, a line for each method in the paper."""
    look_of = looks(cells, methods)
    papers = {(cell.method, cell.task): run.paper for cell in cells if (run := cell.done[0]).paper}
    cells = [cell for cell in cells if (cell.method, cell.task) in papers]
    shown = [method for method in reversed(methods) if method in {cell.method for cell in cells}]  # from below
    parts = parts_of([["here", "paper"]], [(cell.task, "here") for cell in cells])
    figure, axes = panels(parts, 1.3 + 0.42 * len(shown), grid="x")
    for i, ((task, _), ax) in enumerate(zip(parts, axes, strict=True)):
        for cell in (cell for cell in cells if cell.task == task):
            y, (paper, deviation) = shown.index(cell.method), papers[cell.method, task].figures[task]
            here = look_of[cell.method] | {"linestyle": "none"}
            error_bar(ax, y + 0.16, cell.figures("best"), upright=False, label="here", capsize=4, **here)
            there = {"color": "#000000", "marker": "|", "markersize": 12, "markeredgewidth": 2.5, "linestyle": "none"}
            bar = ax.errorbar(paper, y - 0.16, xerr=deviation, label="paper", capsize=4, **there)
            for cap in bar.lines[1]:
                cap.set_markeredgewidth(1.4)
        names = [balanced(method, 30) for method in shown]
        ax.set_yticks(range(len(shown)), names if i % 2 == 0 else [""] * len(shown))
        ax.set(xlabel=percent(task), ylim=(-0.6, len(shown) - 0.4))
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    title = f"{model}: {BEST}, {over_seeds(cells, DEVIATION)} here, 5 in the paper"
    return finish(figure, parts, axes, title, ["here", "paper"], metric_axis="x")


def over_number(model: str, cells: Sequence[Cell], name: str, lines: Sequence[Line]) -> Figure:
    """The best epoch's median against a number that was varied, a line for all that differs in nothing else.

    cells: all of the report, so that methods have the same looks as in the other pictures.
    """
    bases = base_looks(cells)
    labels = labels_of(lines)
    by_place = {(line.task, label): line for line, label in zip(lines, labels, strict=True)}
    labels = list(dict.fromkeys(labels))
    cells = [cell for line in lines for _, cell in line.points]
    base_of = {label: line.method for (_, label), line in by_place.items()}
    look_of = looks_of_settings(bases, base_of)
    groups = chunks(labels)
    parts = parts_of(groups, list(by_place))
    figure, axes = panels(parts)
    numbers = sorted({number for line in lines for number, _ in line.points})
    is_log = numbers[0] > 0 and numbers[-1] >= 4 * numbers[0]
    for (task, own), ax in zip(parts, axes, strict=True):
        for label in own:
            points = by_place[task, label].points
            figures = [cell.figures("best") for _, cell in points]
            plot_band(ax, [number for number, _ in points], figures, label, look_of[label])
        ax.set_xscale("log" if is_log else "linear")
        ticks = apart(numbers, math.log if is_log else float)
        ax.set_xticks(ticks, map(short, ticks))
        ax.minorticks_off()
        ax.margins(x=0.07)
        ax.set(xlabel=AXES.get(name, name.replace("_", " ")), ylabel=percent(task))
    title = f"{model} by {AXES.get(name, name.replace('_', ' '))}: {BEST}, {over_seeds(cells, 'and range')}"
    return finish(figure, parts, axes, title, labels, len(groups) > 1)


def labels_of(lines: Sequence[Line]) -> list[str]:
    """What a legend says of each line: its method, and those of its settings that are not the same in all."""
    several_targets = len({line.targets for line in lines if line.targets}) > 1
    texts = []
    for line in lines:
        targets = f" on {line.targets}" if several_targets and line.targets else ""
        texts.append(line.method + targets + (f" ({line.difference})" if line.difference else ""))
    return [printable(text, 2000) for text in texts]


def apart(numbers: Sequence[float], scale: Any) -> list[float]:
    """Those of the ascending numbers whose texts have room on an axis."""
    places = list(map(scale, numbers))
    chosen, room = [0], (places[-1] - places[0]) / 7
    for i in range(1, len(places)):
        if places[i] - places[chosen[-1]] >= room:
            chosen.append(i)
    return [numbers[i] for i in chosen]


def groups_of(cells: Sequence[Cell], methods: list[str]) -> list[list[str]]:
    """The methods in groups of as many as a panel shows; each line of a grid, of three and more, is a group."""
    if len(methods) <= MOST_LINES:
        return [methods]
    found = [[list(dict.fromkeys(c.method for _, c in line.points)) for line in own] for own in grids(cells).values()]
    found = [[line for line in lines if len(line) > 2] for lines in found]
    longest = max(found, key=lambda lines: max(map(len, lines), default=0), default=[])
    lines: list[list[str]] = []
    for line in longest:  # of several tasks the same
        seen = {method for other in lines for method in other}
        lines.append([method for method in line if method not in seen])
    others = [method for method in methods if not any(method in line for line in lines)]
    return [group for line in (others, *lines) for group in chunks(line)]


def chunks(labels: Sequence[str]) -> list[list[str]]:
    """The labels in as few groups as a panel's lines allow, of about the same length."""
    count = -(-len(labels) // MOST_LINES)
    ends = [len(labels) * i // count for i in range(count + 1)] if count else [0]
    return [list(labels[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


def parts_of(groups: Sequence[Sequence[str]], places: Iterable[tuple[str, str]]) -> list[Part]:
    """The panels of a picture, task by task and group by group; places: (task, label) of what is drawn."""
    drawn = {*places}
    tasks = sorted({task for task, _ in drawn}, key=TASK_ORDER.index)
    parts = [(task, [label for label in group if (task, label) in drawn]) for task in tasks for group in groups]
    return [(task, labels) for task, labels in parts if labels]


def looks(cells: Sequence[Cell], methods: Sequence[str]) -> dict[str, Style]:
    """The look of each method with its settings in all pictures of these cells."""
    base_of = {cell.method: cell.runs[0].label for cell in cells}
    bases = base_looks(cells)
    look_of: dict[str, Style] = {}
    for group in groups_of(cells, list(methods)):
        look_of |= looks_of_settings(bases, {method: base_of[method] for method in group if method in base_of})
    return look_of


def looks_of_settings(bases: Mapping[str, tuple[str, str]], base_of: Mapping[str, str]) -> dict[str, Style]:
    """The looks of the lines of a panel, whose methods without settings are in `base_of`.

    Lines of one method have its colour, from light to dark, and its marker; the fill and the line are of the setting.
    """
    look_of = {}
    for base in dict.fromkeys(base_of.values()):
        color, marker = bases[base]
        settings = [label for label, other in base_of.items() if other == base]
        for i, label in enumerate(settings):
            look_of[label] = {
                "color": darker(color, 0.7 * i / len(settings)), "marker": marker, "fillstyle": FILLS[i % len(FILLS)],
                "linestyle": LINES[(i + i // len(FILLS)) % len(LINES)], "linewidth": 1.8,
                "markersize": 7 * LARGER.get(marker, 1), "markeredgewidth": 1.5,
            }  # fmt: skip
    return {label: look_of[label] for label in base_of}


def darker(color: str, amount: float) -> str:
    """A colour with this share of black in it, between 0 and 1."""
    red, green, blue = ((1 - amount) * part for part in to_rgb(color))
    return to_hex((red, green, blue))


def base_looks(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """The colour and marker of each method without its settings: those of its runs, if no other method has them.

    Other methods get the first that are free.
    """
    known = {run.label: run.look for cell in cells for run in cell.runs}
    look_of: dict[str, tuple[str, str]] = {}
    for base, look in known.items():
        if look and is_color_like(look[0]) and look[1] in Line2D.filled_markers and look not in look_of.values():
            look_of[base] = look
    free = [(COLORS[i % 8], MARKERS[(i + i // 8) % 8]) for i in range(64)]
    for base in known:
        if base not in look_of:
            used = {*look_of.values()}
            colors = {color for color, _ in used}
            choice = [look for look in free if look not in used] or free
            look_of[base] = next((look for look in choice if look[0] not in colors), choice[0])
    return look_of


def panels(parts: Sequence[Part], height: float = 3.1, grid: str = "y") -> tuple[Figure, list[Any]]:
    """A figure and its panels, two in a row, with letters; those of one task have the same axes. height: inches."""
    columns = min(len(parts), 2)
    rows = -(-len(parts) // columns)
    size = (max(6.4, WIDTH * columns + 0.6), height * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06, wspace=0.03))
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in cells[len(parts) :]:
        unused.set_axis_off()
    first: dict[str, Any] = {}
    axes = list(cells[: len(parts)])
    for i, ((task, _), ax) in enumerate(zip(parts, axes, strict=True)):
        ax.set_title(TASKS[task].title)
        if len(parts) > 1:
            ax.set_title(letters(i), loc="left", fontweight="bold")
        if task in first:
            ax.sharex(first[task])
            ax.sharey(first[task])
        first.setdefault(task, ax)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def letters(i: int) -> str:
    """a to z, then aa."""
    return (letters(i // 26 - 1) if i >= 26 else "") + ascii_lowercase[i % 26]


def percent(task: str) -> str:
    """The label of a metric's axis."""
    name = TASKS[task].metrics[0].partition("_")[0]
    return f"{name.capitalize()}{' correlation' * (name != 'accuracy')} (%)"


def error_bar(ax: Any, at: float, figures: Sequence[float], upright: bool = True, **look: Any) -> None:
    """The median of some figures with their standard deviation, if there are several."""
    deviation = stdev(figures) if len(figures) > 1 else None
    x, y = (at, median(figures)) if upright else (median(figures), at)
    bar = ax.errorbar(x, y, **{"yerr" if upright else "xerr": deviation}, elinewidth=1.4, **look)
    # Inside an open marker none of the bars is seen, but other markers are
    bar.lines[0].set_zorder(3)
    ax.plot(x, y, marker=look["marker"], markersize=look["markersize"], color="white", linestyle="none", zorder=2.5)


def over_seeds(cells: Sequence[Cell], spread: str) -> str:
    """What the points of these cells are, for a title; spread: what is drawn of the seeds beside their median."""
    counts = {len(cell.done) for cell in cells}
    return f"median {spread} over {'up to ' * (len(counts) > 1)}{max(counts)} seeds" if max(counts) > 1 else "one seed"


def balanced(text: str, width: int) -> str:
    """Text in as few lines as `width` allows, of about the same length."""
    fewest = len(textwrap.wrap(text, width, break_on_hyphens=False))
    while width > 1 and len(textwrap.wrap(text, width - 1, break_on_hyphens=False)) == fewest:
        width -= 1
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


def finish(
    figure: Figure, parts: Sequence[Part], axes: Sequence[Any], title: str, labels: Sequence[str],
    is_by_panel: bool = False, metric_axis: str = "y",
) -> Figure:  # fmt: skip
    """Put a title above all panels, and a legend below all or below each; give the metric's axis room.

    labels: in the legend's order.
    """
    for task in dict.fromkeys(task for task, _ in parts):
        give_room([ax for (name, _), ax in zip(parts, axes, strict=True) if name == task], metric_axis)
    width, height = figure.get_size_inches()
    heading = balanced(title, int(10 * width))
    figure.suptitle(heading, fontsize="medium")
    height += 0.25 * (heading.count("\n") + 1)
    if is_by_panel:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "fontsize": "small"}
        lines = []
        for ax in axes:
            below = ax.transAxes + ScaledTranslation(0, -0.55, figure.dpi_scale_trans)
            lines.append(add_legend(ax, [ax], labels, int(6.3 * width), bbox_transform=below, **place))
        height += sum(0.22 * max(lines[i : i + 2]) for i in range(0, len(lines), 2))
    else:
        height += 0.25 * add_legend(figure, axes, labels, int(10 * width), loc="outside lower center")
    figure.set_size_inches(width, height)
    return figure


def give_room(axes: Sequence[Any], which: str) -> None:
    """Set the limits of panels with one scale of a metric: room around all points, and at least two percent."""
    intervals = [getattr(ax.dataLim, f"interval{which}") for ax in axes]
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    half = max(high - low, 2) * 0.6
    for ax in axes:
        getattr(ax, f"set_{which}lim")((low + high) / 2 - half, (low + high) / 2 + half)


def add_legend(place: Any, axes: Sequence[Any], labels: Sequence[str], width: int, **options: Any) -> int:
    """Add a legend, `width` letters wide, of the labels that the panels have; returns the number of its lines.

    place: the figure or panel that gets it.
    """
    handles: dict[str, list[Any]] = {}  # of several methods under one label, that of each
    for ax in reversed(axes):
        found: dict[str, dict[Any, Any]] = {}
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            line = handle if isinstance(handle, Line2D) else handle.lines[0]
            found.setdefault(label, {})[line.get_color(), line.get_marker()] = handle
        for label, own in found.items():
            handles[label] = max([*own.values()], handles.get(label, []), key=len)
    labels = [label for label in labels if label in handles]
    texts = [balanced(label, width - 8) for label in labels]
    columns = max(1, min(len(texts), width // (max(len(line) for text in texts for line in text.split("\n")) + 8)))
    shown = [
        own[0] if len(own) == 1 else tuple(bar.lines[0] for bar in own) for own in (handles[label] for label in labels)
    ]
    length = max(2, *(1.5 * len(own) for own in handles.values()))
    handlers = {tuple: HandlerTuple(ndivide=None)}
    place.legend(shown, texts, ncols=columns, frameon=False, handlelength=length, handler_map=handlers, **options)
    return -(-sum(text.count("\n") + 1 for text in texts) // columns)


def save(figure: Figure, folder: Path, name: str) -> str:
    with atomic_write(folder / f"{name}.png") as partial:
        figure.savefig(partial, format="png", dpi=min(150, 60_000 / figure.get_size_inches().max()))
    return name
