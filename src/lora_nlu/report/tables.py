"""Tables of runs as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from statistics import mean, median, stdev
from urllib.parse import quote

from lora_nlu.data.tasks import TASKS
from lora_nlu.escaping import csv_cell, latex_text, markdown_text
from lora_nlu.files import write_text
from lora_nlu.report.collect import Cell
from lora_nlu.report.grids import lines_over

PROTOCOL = (
    "Medians over seeds ± standard deviation, in percent. `best epoch` takes each run's best evaluation while "
    "training, the paper's protocol; `last` is of the model that training ended with, the best epoch's with "
    "--load_best_model_at_end. That model makes the predictions, and a submission chooses among seeds by `last`. "
    "`trainable` counts the encoder's parameters, as the paper does; `training` is the sum over tasks of the median "
    "time, `memory` the highest peak of a run."
)
RUN_COLUMNS = (
    "model", "method", "task", "metric", "seed", "state", "best_percent", "last_percent", "paper_median_percent",
    "trainable_in_encoder", "train_seconds", "peak_memory_gib", "folder",
)  # fmt: skip


def spread(figures: Sequence[float]) -> str:
    """median ± standard deviation; without the latter for a single figure."""
    return one_decimal(median(figures)) + (f" ± {one_decimal(stdev(figures))}" if len(figures) > 1 else "")


def cell_text(cell: Cell | None, protocol: str, seed_count: int) -> str:
    """The text of a cell: its spread, with the number of seeds if some are missing, or why there is none."""
    figures = cell.figures(protocol) if cell else []
    count = f" ({len(figures)} of {seed_count})" if len(figures) < seed_count else ""
    return spread(figures) + count if figures else "unfinished" if cell else "-"


def one_decimal(value: float) -> str:
    """One decimal; halves are rounded to the even digit, which gives the averages that the paper prints."""
    text = f"{Decimal(str(round(value, 9))):.1f}"
    return "0.0" if text == "-0.0" else text


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def headings(cells: Sequence[Cell]) -> list[str]:
    tasks = [TASKS[task] for task in dict.fromkeys(cell.task for cell in cells)]
    names = {"matthews_correlation": "Matthews", "pearson": "Pearson"}
    columns = [f"{task.title} {names.get(task.metrics[0], task.metrics[0])}" for task in tasks]
    return ["method", "trainable", "", *columns, "average", "training", "memory"]


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """The rows of one model's table under `headings`: of each method the best epoch, the last, and the paper's line."""
    tasks, every_seed = list(dict.fromkeys(cell.task for cell in cells)), seeds(cells)
    rows = []
    for method in methods_of(cells):
        by_task = {cell.task: cell for cell in cells if cell.method == method}
        sizes = "/".join(f"{n:,}" for n in sorted({run.trainable for cell in by_task.values() for run in cell.runs}))
        complete = len(by_task) == len(tasks) and all(len(cell.done) == len(every_seed) for cell in by_task.values())
        for protocol, title in (("best", "best epoch"), ("last", "last")):
            row = [method, sizes, title] if protocol == "best" else ["", "", title]
            row += [cell_text(by_task.get(task), protocol, len(every_seed)) for task in tasks]
            average = one_decimal(mean(median(by_task[t].figures(protocol)) for t in tasks)) if complete else "-"
            rows.append([*row, average, *(costs(by_task, len(tasks)) if protocol == "best" else ("", ""))])
        papers = {cell.task: run.paper for cell in by_task.values() for run in cell.runs if run.paper}
        if papers:
            row = ["", next(iter(papers.values())).trainable, "paper"]
            for task in tasks:
                figure, deviation = papers[task].figures[task] if task in papers else (None, None)
                row.append("-" if figure is None else f"{figure:.1f}" + (f" ± {deviation:.1f}" if deviation else ""))
            is_complete = len(papers) == len(tasks) and len({line.method for line in papers.values()}) == 1
            average = one_decimal(mean(line.figures[task][0] for task, line in papers.items())) if is_complete else "-"
            rows.append([*row, average, "", ""])
    return rows


def costs(cells: dict[str, Cell], task_count: int) -> tuple[str, str]:
    """A method's time, with the number of tasks if some are missing, and its memory; `cells` by task."""
    times = [[run.seconds for run in cell.done if run.seconds is not None] for cell in cells.values()]
    medians = [median(seconds) for seconds in times if seconds]
    of = f" ({len(medians)} of {task_count} tasks)" if len(medians) < task_count else ""
    memory = [run.memory_gib for cell in cells.values() for run in cell.done if run.memory_gib is not None]
    return clock(sum(medians)) + of if medians else "-", f"{max(memory):.1f} GiB" if memory else "-"


def methods_of(cells: Sequence[Cell]) -> list[str]:
    """The methods: first what trains everything, then by the number of parameters that train in the encoder."""
    order = {cell.method: (not run.trains_all, run.trainable, cell.method) for cell in cells for run in cell.runs}
    return sorted(order, key=order.__getitem__)


def seeds(cells: Sequence[Cell]) -> list[int]:
    return sorted({run.seed for cell in cells for run in cell.runs})


def rank_table(cells: Sequence[Cell]) -> list[list[str]]:
    """The paper's table of ranks, or nothing: a row for each task and set of layers, a column for each rank."""
    lines, seed_count = lines_over("rank", cells), len(seeds(cells))
    if not lines:
        return []
    ranks = sorted({rank for line in lines for rank, _ in line.points})
    rows = [["task", "LoRA on", *(f"r = {rank:g}" for rank in ranks)]]
    for line in lines:
        several = len({other.method for other in lines if other.task == line.task}) > 1
        details = ", ".join(filter(None, [f"variant {line.method}" if several else "", line.difference]))
        by_rank = {rank: cell_text(cell, "best", seed_count) for rank, cell in line.points}
        layers = line.targets + (f" ({details})" if details else "")
        rows.append([TASKS[line.task].title, layers, *(by_rank.get(rank, "-") for rank in ranks)])
    return rows


def all_notes(cells: Sequence[Cell], notes: Sequence[str]) -> list[str]:
    """The notes of `collect`, unfinished and missing runs, and how MNLI's best epoch is chosen."""
    lines = list(notes)
    places_by_missing: dict[str, list[str]] = {}
    for cell in cells:
        lines += [markdown_text(f"unfinished: {run.folder}, {run.progress}") for run in cell.unfinished]
        expected = seeds([other for other in cells if other.model == cell.model])
        if missing := ", ".join(str(seed) for seed in expected if seed not in {run.seed for run in cell.runs}):
            place = f"{cell.method} on {TASKS[cell.task].title} ({cell.model})"
            places_by_missing.setdefault(missing, []).append(place)
    for seed_list, places in places_by_missing.items():
        lines.append(markdown_text(f"missing, seed{'s' * (',' in seed_list)} {seed_list}: {'; '.join(places)}"))
    if any(cell.task == "mnli" for cell in cells):
        lines += ["MNLI: `last` is on both validation sets together, as the paper's; the best epoch is on the matched."]
    single = dict.fromkeys(TASKS[cell.task].title for cell in cells if any(len(run.history) < 2 for run in cell.done))
    if single:
        lines.append(f"evaluated once, so that the best epoch is the last: runs of {', '.join(single)}")
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    rows = [[*map(markdown_text, row)] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular that needs no package."""
    lines = [" & ".join(map(latex_text, row)) + r" \\" for row in rows]
    return "\n".join([rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}", r"\hline", lines[0], r"\hline", *lines[1:],
                      r"\hline", r"\end{tabular}"])  # fmt: skip


def csv_text(cells: Sequence[Cell]) -> str:
    """A line of CSV for each run, finished or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RUN_COLUMNS)
    for cell in cells:
        for run in cell.runs:
            paper = run.paper.figures[run.task][0] if run.paper else None
            figures = [None if x is None else round(x, 4) + 0.0 for x in (run.best, run.last)]  # -0.0 + 0.0 is 0.0
            state = "done" if run.last is not None else run.progress
            row = [run.model, cell.method, run.task, TASKS[run.task].metrics[0], run.seed, state, *figures, paper]
            row += [run.trainable, run.seconds, run.memory_gib, str(run.folder)]
            writer.writerow(map(csv_cell, row))
    return text.getvalue()


def write_report(cells: Sequence[Cell], notes: Sequence[str], folder: Path | None) -> str:
    """The report as Markdown; given a folder, its files are written there, with pictures if matplotlib is installed."""
    models = {model: [c for c in cells if c.model == model] for model in dict.fromkeys(c.model for c in cells)}
    drawn: dict[str, list[str]] = {}
    notes = [*map(markdown_text, notes)]
    if folder:
        try:
            from lora_nlu.report.pictures import draw

            drawn = {model: draw(own, methods_of(own), folder) for model, own in models.items()}
        except ImportError:
            notes = [*notes, "no pictures: they need matplotlib (pip install 'lora-nlu[plots]')"]
    text, tex, notes = [], [], all_notes(cells, notes)
    for model, own in models.items():
        rows, ranks, count = [headings(own), *table(own)], rank_table(own), len(seeds(own))
        text += [f"## {markdown_text(model)}, {count} seed{'s' * (count != 1)}", "", markdown(rows), ""]
        tex += [f"% {model}", latex(rows), ""]
        if ranks:
            text += ["### Ranks, best epoch", "", markdown(ranks), ""]
            tex += [f"% {model}, ranks", latex(ranks), ""]
        text += [line for name in drawn.get(model, ()) for line in (f"![{markdown_text(name)}]({quote(name)}.png)", "")]
    text += [PROTOCOL, "", *(f"- {note}" for note in notes)]
    tex += [f"% {line}" for line in (PROTOCOL, *notes, "")]
    report = "\n".join(text).rstrip() + "\n"
    if folder:
        write_text(folder / "report.md", report)
        write_text(folder / "report.tex", "\n".join(tex))
        write_text(folder / "report.csv", csv_text(cells))
    return report
