"""Runs over seeds to the paper's table, as text, CSV, LaTeX and pictures.

python -m lora_nlu.report RUN... [--out FOLDER]
python -m lora_nlu.report submission RUN... --out glue.zip    # the file for the GLUE test server, see submission.py

RUN is an output folder of run_glue.py, or a folder that holds some. Runs that differ in nothing but the seed are one
line of the table.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from lora_nlu.errors import UserError
from lora_nlu.files import folders_with, read_json, write_text
from lora_nlu.submission import write_submission
from lora_nlu.tasks import LORA_RANKS, PAPER, REPORTED, TASKS, Published

STATE = "trainer_state.json"
PROTOCOL = (
    "Medians over seeds ± standard deviation, in percent. `best epoch` takes each run's best evaluation while "
    "training, the paper's protocol; `last` is what training ended with. `trainable` counts the encoder's part, as the "
    "paper does; `training` is the sum over tasks of the median time, `memory` the most that a run held."
)
RUN_COLUMNS = (
    "model", "method", "task", "metric", "seed", "state", "best_percent", "last_percent", "paper_median_percent",
    "trainable_in_encoder", "train_seconds", "peak_memory_gib", "folder",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one output folder says; figures in percent.

    settings:  all that decided the result but the seed, as hashable items.
    history:   (step, figure) of every evaluation while training.
    last:      the figure after training, None for a run that has not ended.
    """

    folder: Path
    model: str
    method: str
    task: str
    seed: int
    settings: tuple[tuple[str, str], ...]
    paper: Published | None
    trainable: int
    history: tuple[tuple[int, float], ...]
    last: float | None
    progress: str
    seconds: float | None
    memory_gib: float | None
    rank: int | None
    targets: str

    @property
    def best(self) -> float | None:
        return None if self.last is None else max([self.last, *(figure for _, figure in self.history)])


@dataclass(frozen=True)
class Cell:
    """The runs of one model, method and task over seeds."""

    model: str
    method: str
    task: str
    done: tuple[Run, ...]
    unfinished: tuple[Run, ...]

    def figures(self, protocol: str) -> list[float]:
        return [figure for run in self.done if (figure := getattr(run, protocol)) is not None]


def read_run(folder: Path) -> Run:
    """Read an output folder. Raises UserError for one that an older version or something else wrote."""
    known = read_json(folder / "run.json")
    try:
        task, hyper, method = TASKS[known["task"]], known["hyperparameters"], known["method"]
        seed, parameters, lora = hyper["seed"], known["parameters"], known["lora"]
    except KeyError as e:
        raise UserError(f"{folder}/run.json: no {e} in it, or of no GLUE task: an older run? Train it again.") from e
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.parent.name[11:]), default=None)
    path = folder / STATE if (folder / STATE).is_file() else newest
    state = read_json(path) if path else {}
    metric, results = task.metrics[0], folder / "eval_results.json"
    sign = -1 if metric == "mse" else 1
    evaluations = [entry for entry in state.get("log_history", []) if f"eval_{metric}" in entry]
    history = [(entry["step"], 100 * sign * entry[f"eval_{metric}"]) for entry in evaluations]
    last = None
    if known.get("trained") and results.is_file():
        scores = read_json(results)
        last = 100 * sign * scores.get(f"eval_{metric}_overall", scores[f"eval_{metric}"])
    measured = read_json(folder / "train_results.json") if known.get("trained") else {}
    model, epochs = Path(str(known.get("base_model"))).name, hyper["num_train_epochs"]
    label, key = name_method(method, lora, hyper)
    from_adapter = known.get("started_from") is not None
    if key == "lora" and model == "roberta-large" and task.name in ("mrpc", "rte", "stsb") and not from_adapter:
        key = "lora, no MNLI start"
    if key == "lora" and lora["ranks"] != [LORA_RANKS.get(model)]:
        key = None
    settings = {k: v for k, v in hyper.items() if k not in ("seed", "data_seed")} | {
        "scalings": lora["scalings"], "starts from an adapter": from_adapter, "base": known.get("base_fingerprint"),
        "lora_relative_query": lora["lora_relative_query"],
    }  # fmt: skip
    reached = f"at epoch {state.get('epoch', 0):.4g} of {epochs:g}" if not known.get("trained") else "not evaluated"
    return Run(
        folder, model, label, task.name, seed, tuple((name, str(value)) for name, value in settings.items()),
        next((line for line in PAPER if (line.model, line.method) == (model, key)), None),
        parameters["encoder"], tuple(history), last, reached,
        measured.get("train_seconds"), measured.get("peak_gpu_memory_gib", measured.get("peak_memory_gib")),
        lora["ranks"][0] if method["name"] == "lora" and len(lora["ranks"]) == 1 else None,
        ",".join(method.get("targets", [])),
    )  # fmt: skip


def name_method(method: dict[str, Any], lora: dict[str, Any], hyper: dict[str, Any]) -> tuple[str, str | None]:
    """What a table calls a method, and the paper's line for it, if its settings are the paper's."""
    kind, more = method["name"], []
    if kind == "lora":
        label: str = f"LoRA r={','.join(map(str, lora['ranks']))}"
        if method["targets"] != ["query", "value"]:
            more.append(f"on {','.join(method['targets'])}")
        if method["layers"] is not None:
            more.append(f"layers {','.join(map(str, method['layers']))}")
        if method["lora_dropout"]:
            more.append(f"dropout {method['lora_dropout']:g}")
    else:
        size = f" {method['adapter_size']}" if "adapter_size" in method else ""
        label = {"bitfit": "BitFit", "head": "head alone", "full": "fine-tuning"}.get(kind) or f"{kind.title()}{size}"
        kind += size
    if method.get("biases"):
        more.append("and biases")
    if hyper.get("reg_loss_wgt"):
        more.append(f"{'cutoff' if hyper.get('masking_prob') else 'R-Drop'} {hyper['reg_loss_wgt']:g}")
    return " ".join([label, *more]), None if more else kind


def collect(given: Sequence[Path]) -> tuple[list[Cell], list[str]]:
    """The cells of all tables, in the paper's order of tasks, and lines on what is not there. Raises UserError."""
    runs: dict[Path, Run] = {}
    absent = []
    for start in given:
        folders = folders_with("run.json", start) if start.is_dir() else []
        absent += [] if folders else [f"missing: {start}"]
        runs |= {path.resolve(): read_run(path) for path in folders if is_training(path)}
    if not runs:
        raise UserError(f"no training run in {', '.join(map(str, given))}. Give output folders of run_glue.py.")
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs.values():
        groups.setdefault((run.model, run.method, run.task), []).append(run)
    cells = []
    for (model, method, task), members in groups.items():
        by_settings: dict[tuple[tuple[str, str], ...], list[Run]] = {}
        for run in members:
            by_settings.setdefault(run.settings, []).append(run)
        differing = {k for a in by_settings for b in by_settings for k in dict(a) if dict(a)[k] != dict(b).get(k)}
        for settings, same in by_settings.items():
            said = ", ".join(f"{name} {value}" for name, value in settings if name in differing)
            same.sort(key=lambda run: run.seed)
            for one, other in zip(same, same[1:], strict=False):
                if one.seed == other.seed:
                    raise UserError(f"{one.folder} and {other.folder} are the same run with the same seed: name one.")
            done = tuple(run for run in same if run.last is not None)
            unfinished = tuple(run for run in same if run.last is None)
            cells.append(Cell(model, f"{method} ({said})" if said else method, task, done, unfinished))
    places = [*REPORTED, *(name for name in TASKS if name not in REPORTED)]
    cells.sort(key=lambda cell: (cell.model, places.index(cell.task)))
    return cells, absent


def is_training(folder: Path) -> bool:
    """Whether a run trained, or began to: an evaluation or a prediction leaves a run.json as well."""
    known = read_json(folder / "run.json")
    return bool(known.get("trained")) or bool((known.get("hyperparameters") or {}).get("train_samples"))


def spread(figures: Sequence[float]) -> str:
    """median ± standard deviation; without the latter for a single figure."""
    return f"{median(figures):.1f}" + (f" ± {stdev(figures):.1f}" if len(figures) > 1 else "")


def one_decimal(value: float) -> str:
    """Halves go up, as the paper rounds."""
    return f"{value + 1e-9:.1f}"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def headings(cells: Sequence[Cell]) -> list[str]:
    tasks = dict.fromkeys(cell.task for cell in cells)
    columns = [f"{TASKS[task].title} {TASKS[task].metrics[0].split('_')[0]}" for task in tasks]
    return ["method", "trainable", "", *columns, "average", "training", "memory"]


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """The rows of one model's table under `headings`: of each method the best epoch, the last, and the paper's line."""
    tasks, every_seed = list(dict.fromkeys(cell.task for cell in cells)), seeds(cells)
    rows = []
    for method in methods_of(cells):
        mine = {cell.task: cell for cell in cells if cell.method == method}
        done = [run for cell in mine.values() for run in cell.done]
        sizes = sorted({run.trainable for cell in mine.values() for run in (*cell.done, *cell.unfinished)})
        for protocol, title in (("best", "best epoch"), ("last", "last")):
            row = [method, "/".join(f"{n:,}" for n in sizes), title] if protocol == "best" else ["", "", title]
            for task in tasks:
                cell = mine.get(task)
                figures = cell.figures(protocol) if cell else []
                of = f" ({len(figures)} of {len(every_seed)})" if cell and len(figures) < len(every_seed) else ""
                row.append(spread(figures) + of if figures else "unfinished" if cell else "-")
            complete = len(mine) == len(tasks) and all(len(cell.done) == len(every_seed) for cell in mine.values())
            row.append(one_decimal(mean(median(mine[task].figures(protocol)) for task in tasks)) if complete else "-")
            times = [[run.seconds for run in cell.done if run.seconds is not None] for cell in mine.values()]
            memory = [run.memory_gib for run in done if run.memory_gib is not None]
            if protocol == "best":
                row.append(clock(sum(map(median, times))) if all(times) else "-")
                row.append(f"{max(memory):.1f} GiB" if memory else "-")
            else:
                row += ["", ""]
            rows.append(row)
        papers = {run.task: run.paper for cell in mine.values() for run in (*cell.done, *cell.unfinished) if run.paper}
        if papers:
            figures_of = {task: line.figures[task] for task, line in papers.items() if task in line.figures}
            row = ["", next(iter(papers.values())).trainable, "paper"]
            for task in tasks:
                figure, deviation = figures_of.get(task, (None, None))
                spreads = f" ± {deviation:.1f}" if deviation is not None else ""
                row.append("-" if figure is None else f"{figure:.1f}{spreads}")
            whole = all(task in figures_of for task in tasks)
            rows.append([*row, one_decimal(mean(figures_of[task][0] for task in tasks)) if whole else "-", "", ""])
    return rows


def methods_of(cells: Sequence[Cell]) -> list[str]:
    """Fine-tuning first, then by what trains in the encoder."""
    trainable = {cell.method: run.trainable for cell in cells for run in (*cell.done, *cell.unfinished)}
    return sorted(trainable, key=lambda name: (not name.startswith("fine-tuning"), trainable[name], name))


def seeds(cells: Sequence[Cell]) -> list[int]:
    return sorted({run.seed for cell in cells for run in (*cell.done, *cell.unfinished)})


def rank_table(cells: Sequence[Cell]) -> list[list[str]]:
    """The paper's table of ranks: of each task and set of layers with LoRA a row, of each rank a column; or nothing."""
    swept = rank_cells(cells)
    ranks = sorted({cell.done[0].rank or 0 for cell in swept})
    rows = [["task", "LoRA on", *(f"r = {rank}" for rank in ranks)]]
    for task, targets in dict.fromkeys((cell.task, cell.done[0].targets) for cell in swept):
        row = [TASKS[task].title, targets.replace(",", ", ")]
        for rank in ranks:
            found = [c for c in swept if (c.task, c.done[0].targets, c.done[0].rank) == (task, targets, rank)]
            row.append(" / ".join(spread(cell.figures("best")) for cell in found) or "-")
        rows.append(row)
    return rows if len(rows) > 1 else []


def rank_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The LoRA cells of those tasks that have runs of several ranks."""
    lora = [cell for cell in cells if cell.done and cell.done[0].rank is not None]
    swept = {task for task in {c.task for c in lora} if len({c.done[0].rank for c in lora if c.task == task}) > 1}
    targets = {cell.done[0].targets: len(cell.done[0].targets.split(",")) for cell in lora}
    return sorted(
        (c for c in lora if c.task in swept), key=lambda c: (c.task, targets[c.done[0].targets], c.done[0].targets)
    )


def notes(cells: Sequence[Cell], absent: Sequence[str]) -> list[str]:
    """What a reader of the tables must know: unfinished and missing runs, and how MNLI's best epoch was chosen."""
    lines = list(absent)
    lacking: dict[str, list[str]] = {}
    for cell in cells:
        lines += [f"unfinished: {run.folder}, {run.progress}" for run in cell.unfinished]
        here = seeds([other for other in cells if other.model == cell.model])
        gone = [str(seed) for seed in here if seed not in {run.seed for run in (*cell.done, *cell.unfinished)}]
        if gone:
            lacking.setdefault(", ".join(gone), []).append(f"{cell.method} on {TASKS[cell.task].title} ({cell.model})")
    lines += [f"missing, seed {gone}: {'; '.join(where)}" for gone, where in lacking.items()]
    if any(cell.task == "mnli" for cell in cells):
        lines.append(
            "MNLI: `last` is on both validation sets together, as the paper's; the best epoch is on the matched."
        )
    single = {cell.task for cell in cells for run in cell.done if len(run.history) < 2}
    if single:
        lines.append(f"evaluated once, so that the best epoch is the last: runs of {', '.join(sorted(single))}")
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular that needs no package."""
    escaped = [[cell.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$") for cell in row] for row in rows]
    lines = [" & ".join(row) + r" \\" for row in escaped]
    return "\n".join([rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}", r"\hline", lines[0], r"\hline", *lines[1:],
                      r"\hline", r"\end{tabular}"])  # fmt: skip


def run_lines(cells: Sequence[Cell]) -> str:
    """Every run as a line of CSV, finished or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RUN_COLUMNS)
    for cell in cells:
        for run in (*cell.done, *cell.unfinished):
            paper = run.paper.figures.get(run.task) if run.paper else None
            figures = [None if figure is None else round(figure, 4) for figure in (run.best, run.last)]
            state = "done" if run.last is not None else run.progress
            of_paper, metric = paper[0] if paper else None, TASKS[run.task].metrics[0]
            row = [run.model, cell.method, run.task, metric, run.seed, state, *figures, of_paper]
            writer.writerow([*row, run.trainable, run.seconds, run.memory_gib, run.folder])
    return text.getvalue()


def by_model(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {model: [c for c in cells if c.model == model] for model in dict.fromkeys(c.model for c in cells)}


def write_report(cells: Sequence[Cell], absent: Sequence[str], folder: Path | None) -> str:
    """The report as Markdown; with a folder also as files there, pictures among them where matplotlib is installed."""
    pictures: dict[str, list[str]] = {}
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            from lora_nlu import pictures as drawing

            for model, mine in by_model(cells).items():
                pictures[model] = drawing.draw(mine, methods_of(mine), rank_cells(mine), folder)
        except ImportError:
            absent = [*absent, "no pictures: they need matplotlib (pip install 'lora-nlu[plots]')"]
    text, tex = [], []
    for model, mine in by_model(cells).items():
        rows, ranks = [headings(mine), *table(mine)], rank_table(mine)
        count = len(seeds(mine))
        text += [f"## {model}, {count} seed{'s' * (count != 1)}", "", markdown(rows), ""]
        tex += [f"% {model}", latex(rows), ""]
        if ranks:
            text += ["### Ranks, best epoch", "", markdown(ranks), ""]
            tex += [f"% {model}, ranks", latex(ranks), ""]
        text += [line for name in pictures.get(model, ()) for line in (f"![{name}]({name}.png)", "")]
    text += [PROTOCOL, "", *(f"- {line}" for line in notes(cells, absent))]
    report = "\n".join(text).rstrip() + "\n"
    if folder:
        write_text(folder / "report.md", report)
        write_text(folder / "report.tex", "\n".join(tex))
        write_text(folder / "report.csv", run_lines(cells))
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lora_nlu.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output folder, or one that holds some")
    parser.add_argument(
        "--out", type=Path, help="a folder for report.md, report.csv, report.tex and pictures; the zip of a submission"
    )
    parser.add_argument("--partial", action="store_true", help="submission: leave out tasks that no run predicts")
    args = parser.parse_args(argv)
    runs = args.runs[1:] if (submits := args.runs[0] == Path("submission")) else args.runs
    if submits != bool(submits and runs and args.out) or (args.partial and not submits):
        parser.error("give: submission RUN... --out glue.zip [--partial], or RUN... [--out FOLDER].")
    try:
        if submits:
            print(*write_submission(runs, args.out, args.partial), sep="\n")
        else:
            print(write_report(*collect(runs), args.out))
            print(*([f"Written to {args.out}."] if args.out else []))
    except (UserError, OSError) as e:
        print(f"lora_nlu.report: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
