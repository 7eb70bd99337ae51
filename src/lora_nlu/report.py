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
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from urllib.parse import quote

from lora_nlu.errors import UserError
from lora_nlu.files import folders_with, is_training, read_json, write_text
from lora_nlu.submission import Figures, read_figures, read_state, write_submission
from lora_nlu.tasks import LORA_RANKS, PAPER, REPORTED, TASKS, Published

FROM_MNLI = ("mrpc", "rte", "stsb")  # the paper's LoRA starts them from its MNLI adapter, but for a line that says so
NO_START = "lora, no MNLI start"
PROTOCOL = (
    "Medians over seeds ± standard deviation, in percent. `best epoch` takes each run's best evaluation while "
    "training, the paper's protocol; `last` is of the model that training ended with, the best epoch's with "
    "--load_best_model_at_end. That model makes the predictions, and by `last` a submission chooses among seeds. "
    "`trainable` counts the encoder's part, as the paper does; `training` is the sum over tasks of the median time, "
    "`memory` the most that a run held."
)
TEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    | {character: rf"\{character}" for character in "&%$#_{}"}
)
RUN_COLUMNS = (
    "model", "method", "task", "metric", "seed", "state", "best_percent", "last_percent", "paper_median_percent",
    "trainable_in_encoder", "train_seconds", "peak_memory_gib", "folder",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one output folder says; figures in percent.

    base:      the base model's fingerprint; its name, `model`, may be another's too.
    settings:  all that decided the result but the seed and the training data, as hashable items.
    paper:     the paper's line for the same method and settings, where it has this task.
    history:   (step, figure) of every evaluation while training.
    best:      the highest of them and of the one after training; MNLI's are all on the matched set.
    last:      the figure after training, MNLI's on both sets; like `best` None for a run that has not ended.
    """

    folder: Path
    model: str
    base: str | None
    method: str
    task: str
    seed: int
    settings: tuple[tuple[str, str], ...]
    paper: Published | None
    trainable: int
    history: tuple[tuple[int, float], ...]
    best: float | None
    last: float | None
    progress: str
    seconds: float | None
    memory_gib: float | None
    rank: int | None
    targets: str
    train_data: str | None


@dataclass(frozen=True)
class Cell:
    """The runs of one model, method and task over seeds."""

    model: str
    method: str
    task: str
    done: tuple[Run, ...]
    unfinished: tuple[Run, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return *self.done, *self.unfinished

    def figures(self, protocol: str) -> list[float]:
        return [figure for run in self.done if (figure := getattr(run, protocol)) is not None]


def read_run(folder: Path, known: dict[str, Any], figures: Figures) -> Run:
    """Read an output folder, its run.json and figures already known. Raises UserError for an older version's."""
    try:
        task, hyper, method = TASKS[known["task"]], known["hyperparameters"], known["method"]
        seed, parameters, lora = hyper["seed"], known["parameters"], known["lora"]
        label, key = name_method(method, lora, hyper)
        trainable, epochs = parameters["encoder"], hyper["num_train_epochs"]
    except KeyError as e:
        raise UserError(f"{folder}/run.json: no {e} in it: an older run? Train it again, or leave it out.") from e
    state = read_state(folder)
    history = [(step, 100 * figure) for step, _, figure in figures.history]
    best = last = None
    if known.get("trained") and (folder / "eval_results.json").is_file():
        if figures.last is None or figures.first_set is None:
            path, metric = folder / "eval_results.json", f"eval_{task.metrics[0]}"
            raise UserError(f"{path}: no {metric} in it. Evaluate the run again, or leave it out.")
        best, last = max([100 * figures.first_set, *(figure for _, figure in history)]), 100 * figures.last
    measured = read_json(folder / "train_results.json") if known.get("trained") else {}
    model, from_adapter = Path(known.get("base_model") or "unknown").name, known.get("started_from") is not None
    if key == "lora" and from_adapter != (task.name in FROM_MNLI):
        key = None if from_adapter else NO_START
    if key in ("lora", NO_START) and lora["ranks"] != [LORA_RANKS.get(model)]:
        key = None
    paper = next((line for line in PAPER if (line.model, line.method) == (model, key)), None)
    unsaid = {
        "seed",
        "data_seed",
        "train_data",
        "eval_data",
        *known.get("left_at_default", ()),
    }  # which older runs did not record
    settings = {name: value for name, value in hyper.items() if name not in unsaid} | {
        "scaling": ", ".join(f"{scaling:g}" for scaling in lora["scalings"]),
        "lora_relative_query": lora["lora_relative_query"],
        "started from": "an adapter" if from_adapter else "the base model",
    } | {name: value for name, value in method.items() if name not in ("name", "targets")}  # fmt: skip
    epoch = state.get("epoch", 0)
    reached = f"its last checkpoint at epoch {epoch:.4g} of {epochs:g}" if state else "no checkpoint yet"
    return Run(
        folder, model, known.get("base_fingerprint"), label, task.name, seed,
        tuple((name, str(value)) for name, value in settings.items()),
        paper if paper and task.name in paper.figures else None, trainable, tuple(history), best, last,
        "trained, not evaluated" if known.get("trained") else reached,
        measured.get("train_seconds"), measured.get("peak_gpu_memory_gib", measured.get("peak_memory_gib")),
        lora["ranks"][0] if method["name"] == "lora" and len(lora["ranks"]) == 1 else None,
        ", ".join(method.get("targets", [])), hyper.get("train_data"),
    )  # fmt: skip


def name_method(method: dict[str, Any], lora: dict[str, Any], hyper: dict[str, Any]) -> tuple[str, str | None]:
    """What a table calls a method, and the paper's line for it, if its settings are the paper's."""
    kind, more = method["name"], []
    if kind == "lora":
        label: str = f"LoRA r={','.join(map(str, lora['ranks']))}"
        if method["targets"] != ["query", "value"]:
            more.append(f"on {', '.join(method['targets'])}")
        if method["layers"] is not None:
            more.append(f"layers {', '.join(map(str, method['layers']))}")
        if method["lora_dropout"]:
            more.append(f"dropout {method['lora_dropout']:g}")
        if lora["lora_relative_query"]:  # DeBERTa's, which the paper's runs left out
            more.append("and relative query")
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
    """The cells of all tables, in the paper's order of tasks, and lines worth saying. Raises UserError."""
    runs: dict[Path, Run] = {}
    absent = []
    for start in given:
        folders = folders_with("run.json", start) if start.is_dir() else []
        found = {path: known for path in folders if is_training(known := read_json(path / "run.json"))}
        absent += [] if found else [f"missing: {start}" + ", no training run in it" * start.is_dir()]
        for path, known in found.items():
            if known.get("task") not in TASKS:
                absent.append(f"left out, its task is none of GLUE's: {path}")
            elif (figures := read_figures(path, known)).diverged:
                absent.append(f"left out, diverged ({figures.diverged}): {path}")
            else:
                runs[path.resolve()] = read_run(path, known, figures)
    if not runs:
        why = "".join(f"\n{line}" for line in absent)
        raise UserError(f"no training run on a task of GLUE. Give output folders of run_glue.py.{why}")
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in settle(list(runs.values())):
        groups.setdefault((run.model, run.method, run.task), []).append(run)
    cells = []
    for (model, method, task), members in groups.items():
        for settings, said in differences([run.settings for run in members]).items():
            same = sorted((run for run in members if run.settings == settings), key=lambda run: run.seed)
            for one, other in zip(same, same[1:], strict=False):
                if one.seed == other.seed:
                    raise UserError(f"{one.folder} and {other.folder} are the same run with the same seed: name one.")
            done = tuple(run for run in same if run.last is not None)
            unfinished = tuple(run for run in same if run.last is None)
            cells.append(Cell(model, f"{method} ({said})" if said else method, task, done, unfinished))
            by_data = {run.train_data: run.folder for run in same if run.train_data}  # older versions recorded none
            if len(by_data) > 1:
                two = ", ".join(map(str, by_data.values()))
                absent.append(f"in one line, but trained on examples that differ: {two}")
    places = [*REPORTED, *(name for name in TASKS if name not in REPORTED)]
    cells.sort(key=lambda cell: (cell.model, places.index(cell.task)))
    return cells, absent


def settle(runs: list[Run]) -> list[Run]:
    """What one run can't tell: whether another base model has its name, and which of the paper's lines it belongs to.

    roberta-large has two for LoRA, with and without MNLI's adapter as the start of three tasks: those tasks decide.
    """
    bases = {(run.model, run.base) for run in runs}
    several = {model for model, _ in bases if sum(name == model for name, _ in bases) > 1}
    deciding = [run for run in runs if run.paper and run.task in FROM_MNLI]
    starts = {(run.model, run.base, run.method, run.paper.method) for run in deciding if run.paper}
    settled = []
    for run in runs:
        same, paper = (run.model, run.base, run.method), run.paper
        if paper and paper.method == "lora" and (*same, NO_START) in starts and (*same, "lora") not in starts:
            paper = next(line for line in PAPER if (line.model, line.method) == (paper.model, NO_START))
        model = f"{run.model}@{(run.base or 'unknown')[:8]}" if run.model in several else run.model
        settled.append(replace(run, model=model, paper=paper))
    return settled


def differences(several: Sequence[tuple[tuple[str, str], ...]]) -> dict[tuple[tuple[str, str], ...], str]:
    """Of each of these settings what tells it from the others, as words."""
    each = {settings: dict(settings) for settings in several}
    names = dict.fromkeys(name for settings in each for name, _ in settings)
    differing = [name for name in names if len({known.get(name) for known in each.values()}) > 1]
    return {
        settings: ", ".join(f"{name} {known.get(name, 'not recorded')}" for name in differing)
        for settings, known in each.items()
    }


def spread(figures: Sequence[float]) -> str:
    """median ± standard deviation; without the latter for a single figure."""
    return one_decimal(median(figures)) + (f" ± {one_decimal(stdev(figures))}" if len(figures) > 1 else "")


def shown(cell: Cell | None, protocol: str, wanted: int) -> str:
    """What a table says of a cell: its spread, of how many of the wanted seeds, or why there is none."""
    figures = cell.figures(protocol) if cell else []
    of = f" ({len(figures)} of {wanted})" if len(figures) < wanted else ""
    return spread(figures) + of if figures else "unfinished" if cell else "-"


def one_decimal(value: float) -> str:
    """Halves go to the even digit: so the averages of the paper's figures come out as it prints them."""
    return f"{Decimal(str(round(value, 9))):.1f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def headings(cells: Sequence[Cell]) -> list[str]:
    tasks = dict.fromkeys(cell.task for cell in cells)
    persons = {"matthews": "Matthews", "pearson": "Pearson"}
    metrics = [TASKS[task].metrics[0].partition("_")[0] for task in tasks]
    columns = [f"{TASKS[task].title} {persons.get(name, name)}" for task, name in zip(tasks, metrics, strict=True)]
    return ["method", "trainable", "", *columns, "average", "training", "memory"]


def table(cells: Sequence[Cell]) -> list[list[str]]:
    """The rows of one model's table under `headings`: of each method the best epoch, the last, and the paper's line."""
    tasks, every_seed = list(dict.fromkeys(cell.task for cell in cells)), seeds(cells)
    rows = []
    for method in methods_of(cells):
        mine = {cell.task: cell for cell in cells if cell.method == method}
        sizes = "/".join(f"{n:,}" for n in sorted({run.trainable for cell in mine.values() for run in cell.runs}))
        complete = len(mine) == len(tasks) and all(len(cell.done) == len(every_seed) for cell in mine.values())
        for protocol, title in (("best", "best epoch"), ("last", "last")):
            row = [method, sizes, title] if protocol == "best" else ["", "", title]
            row += [shown(mine.get(task), protocol, len(every_seed)) for task in tasks]
            row.append(one_decimal(mean(median(mine[task].figures(protocol)) for task in tasks)) if complete else "-")
            rows.append([*row, *(costs(mine, len(tasks)) if protocol == "best" else ("", ""))])
        papers = {cell.task: run.paper for cell in mine.values() for run in cell.runs if run.paper}
        if papers:
            row = ["", next(iter(papers.values())).trainable, "paper"]
            for task in tasks:
                figure, deviation = papers[task].figures[task] if task in papers else (None, None)
                row.append("-" if figure is None else f"{figure:.1f}" + (f" ± {deviation:.1f}" if deviation else ""))
            whole = len(papers) == len(tasks) and len({line.method for line in papers.values()}) == 1
            average = one_decimal(mean(line.figures[task][0] for task, line in papers.items())) if whole else "-"
            rows.append([*row, average, "", ""])
    return rows


def costs(mine: dict[str, Cell], wanted: int) -> tuple[str, str]:
    """A method's time, of how many of the wanted tasks where some are missing, and its memory."""
    times = [[run.seconds for run in cell.done if run.seconds is not None] for cell in mine.values()]
    medians = [median(seconds) for seconds in times if seconds]
    of = f" ({len(medians)} of {wanted} tasks)" if len(medians) < wanted else ""
    memory = [run.memory_gib for cell in mine.values() for run in cell.done if run.memory_gib is not None]
    return clock(sum(medians)) + of if medians else "-", f"{max(memory):.1f} GiB" if memory else "-"


def methods_of(cells: Sequence[Cell]) -> list[str]:
    """Fine-tuning first, then by what trains in the encoder."""
    trainable = {cell.method: run.trainable for cell in cells for run in cell.runs}
    return sorted(trainable, key=lambda name: (not name.startswith("fine-tuning"), trainable[name], name))


def seeds(cells: Sequence[Cell]) -> list[int]:
    return sorted({run.seed for cell in cells for run in cell.runs})


def rank_table(cells: Sequence[Cell]) -> list[list[str]]:
    """The paper's table of ranks: of each task and set of layers with LoRA a row, of each rank a column; or nothing."""
    swept, wanted = rank_cells(cells), len(seeds(cells))
    ranks = sorted({rank for mine in swept.values() for rank, _ in mine})
    rows = [["task", "LoRA on", *(f"r = {rank}" for rank in ranks)]]
    for (task, where), mine in swept.items():
        texts = {rank: " / ".join(shown(c, "best", wanted) for r, c in mine if r == rank) for rank in ranks}
        rows.append([TASKS[task].title, where, *(texts[rank] or "-" for rank in ranks)])
    return rows if swept else []


def rank_cells(cells: Sequence[Cell]) -> dict[tuple[str, str], list[tuple[int, Cell]]]:
    """Of each task and set of layers with LoRA the cells by rank, where runs of several ranks differ in nothing else.

    Alpha may stay as the rank changes, or change with it: the scaling is not compared.
    """
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[int, Cell]]] = {}
    for cell in cells:
        if (rank := cell.runs[0].rank) is not None:
            rest = tuple(item for item in cell.runs[0].settings if item[0] != "scaling")
            groups.setdefault((cell.task, rest), []).append((rank, cell))
    groups = {key: mine for key, mine in groups.items() if len({rank for rank, _ in mine}) > 1}
    swept: dict[tuple[str, str], list[tuple[int, Cell]]] = {}
    for (task, rest), mine in groups.items():
        said = differences([other for name, other in groups if name == task])[rest]
        sets = {cell.runs[0].targets for _, cell in mine}
        for targets in sorted(sets, key=lambda names: (names.count(","), names)):
            where = targets + (f" ({said})" if said else "")
            here = [(rank, cell) for rank, cell in mine if cell.runs[0].targets == targets]
            swept[task, where] = sorted(here, key=lambda pair: pair[0])
    return swept


def notes(cells: Sequence[Cell], absent: Sequence[str]) -> list[str]:
    """What a reader of the tables must know: unfinished and missing runs, and how MNLI's best epoch was chosen."""
    lines = list(absent)
    lacking: dict[str, list[str]] = {}
    for cell in cells:
        lines += [f"unfinished: {run.folder}, {run.progress}" for run in cell.unfinished]
        here = seeds([other for other in cells if other.model == cell.model])
        gone = [str(seed) for seed in here if seed not in {run.seed for run in cell.runs}]
        if gone:
            lacking.setdefault(", ".join(gone), []).append(f"{cell.method} on {TASKS[cell.task].title} ({cell.model})")
    lines += [f"missing, seed{'s' * (',' in gone)} {gone}: {'; '.join(where)}" for gone, where in lacking.items()]
    if any(cell.task == "mnli" for cell in cells):
        lines.append(
            "MNLI: `last` is on both validation sets together, as the paper's; the best epoch is on the matched."
        )
    single = dict.fromkeys(TASKS[cell.task].title for cell in cells if any(len(run.history) < 2 for run in cell.done))
    if single:
        lines.append(f"evaluated once, so that the best epoch is the last: runs of {', '.join(single)}")
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular that needs no package."""
    escaped = [[cell.translate(TEX) for cell in row] for row in rows]
    lines = [" & ".join(row) + r" \\" for row in escaped]
    return "\n".join([rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}", r"\hline", lines[0], r"\hline", *lines[1:],
                      r"\hline", r"\end{tabular}"])  # fmt: skip


def run_lines(cells: Sequence[Cell]) -> str:
    """Every run as a line of CSV, finished or not."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RUN_COLUMNS)
    for cell in cells:
        for run in cell.runs:
            paper = run.paper.figures[run.task][0] if run.paper else None
            figures = [None if figure is None else round(figure, 4) for figure in (run.best, run.last)]
            state = "done" if run.last is not None else run.progress
            row = [run.model, cell.method, run.task, TASKS[run.task].metrics[0], run.seed, state, *figures, paper]
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
        text += [line for name in pictures.get(model, ()) for line in (f"![{name}]({quote(name)}.png)", "")]
    text += [PROTOCOL, "", *(f"- {line}" for line in notes(cells, absent))]
    tex += [f"% {line}" for line in (PROTOCOL, *notes(cells, absent), "")]
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
            text = write_report(*collect(runs), args.out)
            print(text, *([f"Written to {args.out}."] if args.out else []), sep="\n", end="\n" if args.out else "")
    except (UserError, OSError) as e:
        print(f"lora_nlu.report: error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
