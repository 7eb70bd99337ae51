"""The pictures of a report, as PNG and SVG: colours that colour-blind readers tell apart, and markers beside them."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lora_nlu.files import publish
from lora_nlu.tasks import REPORTED, TASKS

# Okabe and Ito's palette
STYLES = list(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F"),
        "osD^vPX*",
        ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--"),
        strict=True,
    )
)


def style(i: int) -> dict[str, Any]:
    color, marker, line = STYLES[i % len(STYLES)]
    return {"color": color, "marker": marker, "linestyle": line, "markersize": 6, "linewidth": 1.8}


def panels(count: int, legend_lines: int) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels in rows of up to four, with room below for a legend."""
    columns = min(count, 4) if count != 4 else 2
    rows = -(-count // columns)
    figure = Figure(figsize=(3.9 * columns + 0.6, 3.1 * rows + 0.4 + 0.28 * legend_lines), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    for used in axes[:count]:
        used.spines[["top", "right"]].set_visible(False)
        used.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        used.set_axisbelow(True)
    return figure, list(axes[:count])


def percent(task: str) -> str:
    return f"{TASKS[task].metrics[0].split('_')[0].capitalize()} (%)"


def save(figure: Figure, folder: Path, name: str) -> str:
    for kind in ("png", "svg"):
        partial = folder / f".{name}.{kind}.partial"
        try:
            figure.savefig(partial, format=kind, dpi=150)
            publish(partial, folder / f"{name}.{kind}")
        finally:
            partial.unlink(missing_ok=True)
    return name


def legend(figure: Figure, axes: Any, count: int) -> None:
    """One legend below all panels, of the labels that any of them has."""
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(count, 3), frameon=False)


def draw(cells: Sequence[Any], methods: list[str], swept: Sequence[Any], folder: Path) -> list[str]:
    """Draw what the cells of one model (report.Cell) can show; returns the pictures' names.

    methods: in the order of the legend; swept: the cells that make up a table of ranks.
    """
    finished = [cell for cell in cells if cell.done]
    if not finished:
        return []
    model, names = finished[0].model, []
    with matplotlib.rc_context({"font.size": 12, "svg.hashsalt": model}):
        apart = {cell.method for cell in finished if cell not in swept}  # a sweep has a picture of its own
        methods = [name for name in methods if len(methods) <= len(STYLES) or name in apart]
        rest = sorted((c for c in finished if c.method in methods), key=lambda cell: methods.index(cell.method))
        if any(len(run.history) > 1 for cell in rest for run in cell.done):
            names.append(save(curves(model, rest, methods), folder, f"{model}_curves"))
        if rest and len({cell.method for cell in rest}) > 1:
            names.append(save(sizes(model, rest, methods), folder, f"{model}_parameters"))
        if any(run.paper for cell in rest for run in cell.done):
            names.append(save(against_paper(model, rest, methods), folder, f"{model}_paper"))
        if swept:
            names.append(save(ranks(model, swept), folder, f"{model}_ranks"))
    return names


def tasks_of(cells: Sequence[Any]) -> list[str]:
    """Tasks in the paper's order, then the others."""
    here = dict.fromkeys(cell.task for cell in cells)
    return [task for task in REPORTED if task in here] + [task for task in here if task not in REPORTED]


def curves(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """The metric against steps: the median over seeds, and a band from the least to the most."""
    tasks = tasks_of(cells)
    figure, axes = panels(len(tasks), -(-len(methods) // 3))
    for ax, task in zip(axes, tasks, strict=True):
        for cell in (cell for cell in cells if cell.task == task):
            histories = [dict(run.history) for run in cell.done]
            steps = sorted(set.intersection(*map(set, histories)))
            at = [[history[step] for history in histories] for step in steps]
            look = style(methods.index(cell.method))
            ax.plot(steps, list(map(median, at)), label=cell.method, **look)
            if len(histories) > 1:
                ax.fill_between(steps, list(map(min, at)), list(map(max, at)), color=look["color"], alpha=0.15, lw=0)
        ax.set(title=TASKS[task].title, xlabel="step", ylabel=percent(task), xlim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    legend(figure, axes, len(methods))
    count = max(len(cell.done) for cell in cells)
    figure.suptitle(f"{model}: median over seeds while training; bands from the least to the most of {count}")
    return figure


def sizes(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """The best epoch's median against the number of parameters that train in the encoder."""
    tasks = tasks_of(cells)
    figure, axes = panels(len(tasks), -(-len(methods) // 3))
    for ax, task in zip(axes, tasks, strict=True):
        for cell in (cell for cell in cells if cell.task == task):
            figures, look = cell.figures("best"), style(methods.index(cell.method)) | {"linestyle": "none"}
            spread = stdev(figures) if len(figures) > 1 else 0.0
            ax.errorbar(
                cell.done[0].trainable,
                median(figures),
                spread,
                label=cell.method,
                capsize=4,
                **look | {"markersize": 9},
            )
        ax.set_xscale("symlog", linthresh=1e3, linscale=0.4)
        ax.set_xlim(-400, None)
        ax.set_xticks([0, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short(n)))
        ax.minorticks_off()
        most = max(cell.done[0].trainable for cell in cells)
        ax.set_xlim(-400, max(most, 1e4) * 3)
        ax.set(title=TASKS[task].title, xlabel="parameters trained in the encoder", ylabel=percent(task))
    legend(figure, axes, len(methods))
    figure.suptitle(f"{model}: best epoch by parameters trained; median ± standard deviation over seeds")
    return figure


def short(n: float) -> str:
    """10000 to 10k."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{letter}"
    return f"{n:g}"


def against_paper(model: str, cells: Sequence[Any], methods: list[str]) -> Figure:
    """Our medians beside the paper's, task by task, a panel for each method that the paper has."""
    shown = [m for m in methods if any(run.paper for cell in cells if cell.method == m for run in cell.done)]
    figure, axes = panels(len(shown), 1)
    for ax, method in zip(axes, shown, strict=True):
        mine = [cell for cell in cells if cell.method == method and cell.done[0].paper]
        for offset, look, label in ((-0.14, style(0), "here"), (0.14, style(1), "paper")):
            look |= {"linestyle": "none", "markersize": 8}
            for x, cell in enumerate(mine):
                figures = cell.figures("best")
                y, spread = (median(figures), stdev(figures) if len(figures) > 1 else 0.0)
                if label == "paper":
                    y, deviation = cell.done[0].paper.figures[cell.task]
                    spread = deviation or 0.0
                ax.errorbar(x + offset, y, spread, capsize=4, label=label if x == 0 else None, **look)
        ax.set_xticks(range(len(mine)), [TASKS[cell.task].title for cell in mine], rotation=45, ha="right")
        ax.set(title=method, ylabel="best epoch (%)", xlim=(-0.6, len(mine) - 0.4))
    legend(figure, axes, 2)
    figure.suptitle(f"{model}: medians over seeds, here and in the paper")
    return figure


def ranks(model: str, cells: Sequence[Any]) -> Figure:
    """The best epoch's median against the rank, a line for each set of layers with LoRA."""
    tasks = tasks_of(cells)
    targets = list(dict.fromkeys(cell.done[0].targets for cell in cells))
    figure, axes = panels(len(tasks), -(-len(targets) // 3) + 1)
    for ax, task in zip(axes, tasks, strict=True):
        for i, names in enumerate(targets):
            mine = [cell for cell in cells if (cell.task, cell.done[0].targets) == (task, names)]
            points = sorted((cell.done[0].rank, cell.figures("best")) for cell in mine)
            look, x = style(i), [rank for rank, _ in points]
            ax.plot(x, [median(figures) for _, figures in points], label=names.replace(",", ", "), **look)
            if any(len(figures) > 1 for _, figures in points):
                low, high = ([f(figures) for _, figures in points] for f in (min, max))
                ax.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        ax.set_xscale("log", base=2)
        every = sorted({cell.done[0].rank for cell in cells})
        ax.set_xticks(every, [str(rank) for rank in every])
        ax.minorticks_off()
        ax.set(title=TASKS[task].title, xlabel="rank r", ylabel=percent(task))
    legend(figure, axes, 1)
    figure.suptitle(f"{model}: LoRA by rank and layers,\nbest epoch, median over seeds")
    return figure
