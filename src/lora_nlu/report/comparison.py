"""Methods compared at learning rates that were chosen for each: a table, what differs by more than seeds, a page.

Runs with --validation_from_train chose the rates; the others are what is compared.
"""

import base64
import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError, first_line, printable
from lora_nlu.escaping import markdown_text
from lora_nlu.files import parse_json, read_text, write_text
from lora_nlu.report.collect import Cell, Run, cells_of
from lora_nlu.report.grids import rates_tried, short
from lora_nlu.report.records import ANSWERS, RECORDS, Record, read_figures, write_records
from lora_nlu.report.tables import clock, csv_text, headings, markdown, methods_of, one_decimal, spread

KEPT_OUT = "validation_from_train"  # the setting of runs that choose
LEVEL = 0.05  # chance of any false claim on a task
RESAMPLES = 1000
METRIC = (
    "Medians over seeds ± standard deviation, in percent, of the model that training ended with. `rate` is the "
    "learning rate; beside it is the number of seeds. `trainable` counts the encoder's parameters, the head trains in "
    "every method; `tokens/s` counts real tokens of training; `memory` is the highest peak of a run."
)
CHOSEN = " Each rate is the best of those tried on training rows that were kept out of training, with one seed"
CHOOSING = ", scored on training rows"  # in the CSV
MOST_ANSWERS = 100_000  # no GLUE set has as many


@dataclass(frozen=True)
class Difference:
    """How far a method is from the one that it is compared with, on one task, in percent.

    mean:    over the seeds that both have.
    error:   standard error of that mean, from the spread of the seeds' differences; None for fewer than two seeds.
    p_alone: of Student's paired test of this comparison alone; None where `paired_p` has none.
    p:       p_alone, adjusted by Holm's method over the task's comparisons.
    of_rows: standard error of the mean under another draw of the validation set, all seeds as they are; None where the
             answers to the examples were not kept.
    """

    mean: float
    seeds: int
    error: float | None
    p_alone: float | None
    p: float | None
    of_rows: float | None

    @property
    def is_told(self) -> bool:
        """Whether it is more than the seeds' spread explains."""
        return self.p is not None and self.p < LEVEL

    @property
    def needs_seeds(self) -> bool:
        """Whether it is more than the seeds' spread explains only without regard to the other comparisons."""
        return not self.is_told and self.p_alone is not None and self.p_alone < LEVEL


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): below LEVEL with a chance of any false claim of at most LEVEL."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def paired_p(differences: Sequence[float]) -> float | None:
    """p-value of Student's test that paired differences have mean 0.

    None for fewer than two, and for differences that are all the same and not 0: on a small set, where figures are
    multiples of one example's share, equal methods often have such, and the test would take them for certain.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return None
    if (deviation := stdev(differences)) < 1e-9:  # percent: of rounding
        return 1.0 if abs(mean(differences)) < 1e-9 else None
    statistic = abs(mean(differences)) / (deviation / len(differences) ** 0.5)
    return float(2 * t.sf(statistic, len(differences) - 1))


def resampled(metric: str, expected: np.ndarray, given: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The metric [resamples] of answers [examples] that count as often as `weights` [resamples, examples] say.

    metric: accuracy, or a correlation: Matthews' of two classes is Pearson's of 0 and 1.
    """
    if metric == "accuracy":
        return weights @ (expected == given) / weights.sum(1)
    total = weights.sum(1)
    x, y = ((values - values.mean()).astype(np.float64) for values in (expected, given))
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variances = (weights @ (x * x) / total - mean_x**2) * (weights @ (y * y) / total - mean_y**2)
    return np.divide(covariance, np.sqrt(variances.clip(0)), out=np.zeros_like(total), where=variances > 0)


def error_of_rows(metric: str, pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """Standard error, in percent, of a mean difference under other draws of the examples (a bootstrap).

    pairs: of each seed the expected answers, the method's and those of the one that it is compared with; [examples].
    """
    count, rng = len(pairs[0][0]), np.random.default_rng(0)
    means: list[np.ndarray] = []
    for _ in range(0, RESAMPLES, 100):  # 100 at a time, for memory
        weights = rng.multinomial(count, [1 / count] * count, 100).astype(np.float64)
        found = [resampled(metric, e, a, weights) - resampled(metric, e, b, weights) for e, a, b in pairs]
        means.append(np.mean(found, axis=0))
    return float(100 * np.std(np.concatenate(means), ddof=1))


def with_answers(record: Record, notes: list[str]) -> Record:
    """The record with the answers to the validation set if it or its folder has them, MNLI's to both sets.

    Answers that do not give the run's figure are left out, with a note.
    """
    task = record.run.get("task")
    names = ("mnli", "mnli-mm") if task == "mnli" else (task,)
    paths = [record.folder / f"eval_predictions_{name}.jsonl" for name in names]
    if task not in TASKS or not (ANSWERS in record.files or all(path.is_file() for path in paths)):
        return record
    try:
        answers = record.files[ANSWERS] if ANSWERS in record.files else read_answers(record, paths)
        metric, figure = TASKS[task].metrics[0], read_figures(record).last
        score = score_of(metric, np.array(answers["expected"], float), np.array(answers["given"], float))
        if figure is None or not abs(score - figure) < 0.001:
            raise ValueError(f"their {metric} is {score:.4f}, the run's {'unknown' if figure is None else figure}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        place = record.place if ANSWERS in record.files else paths[0]
        notes.append(f"left out, answers that are not the run's: {place} ({type(e).__name__}: {first_line(e)})")
        return replace(record, files={name: content for name, content in record.files.items() if name != ANSWERS})
    return replace(record, files=record.files | {ANSWERS: answers})


def read_answers(record: Record, paths: Sequence[Path]) -> dict[str, list[float]]:
    """The answers in a run's files, classes by number. Raises what a damaged file does."""
    rows = [parse_json(line) for path in paths for line in read_text(path).splitlines()]
    ids = {label: i for i, label in enumerate(record.run["labels"])}
    if ids:
        return {"expected": [ids[row["expected"]] for row in rows], "given": [ids[row["label"]] for row in rows]}
    return {"expected": [row["expected"] for row in rows], "given": [float(f"{row['score']:.6g}") for row in rows]}


def score_of(metric: str, expected: np.ndarray, given: np.ndarray) -> float:
    """The metric of answers. Raises ValueError if these are no two lists of as many numbers."""
    if not (expected.ndim == given.ndim == 1 and 0 < len(expected) == len(given) <= MOST_ANSWERS):
        raise ValueError(f"{expected.size:,} expected answers, {given.size:,} given")
    with np.errstate(all="ignore"):  # of numbers that are too large for a square
        return float(resampled(metric, expected, given, np.ones((1, len(expected))))[0])


def is_unscored(record: Record) -> bool:
    """Whether a run has not ended, or was scored on a part of the set, as compare_methods.sh's first steps are."""
    if record.run.get("task") not in TASKS:
        return False
    figures = read_figures(record)
    return figures.last is None and not figures.diverged


def named_as_final(record: Record) -> Record:
    """The record of a run that chooses, under the name that its method has in the runs that are compared."""
    hyper = {key: x for key, x in record.run["hyperparameters"].items() if key != KEPT_OUT}
    return replace(record, run=record.run | {"hyperparameters": hyper})


def answers_of(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The expected and given answers of the runs that kept them, by the place of the record."""
    return {
        record.place: (np.array(found["expected"]), np.array(found["given"]))
        for record in records
        if (found := record.files.get(ANSWERS))
    }


def differences_from(
    reference: str, cells: Sequence[Cell], answers: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[tuple[str, str], Difference]:
    """The difference of each method from `reference` by (method, task), where they have a seed in common."""
    found: dict[tuple[str, str], Difference] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        own = [cell for cell in cells if cell.task == task]
        base = {run.seed: run for cell in own if cell.method == reference for run in cell.done}
        tested: dict[tuple[str, str], float] = {}
        for cell in (cell for cell in own if cell.method != reference):
            pairs = [(run, base[run.seed]) for run in cell.done if run.seed in base]
            if not pairs:
                continue
            figures = [last(run) - last(other) for run, other in pairs]
            kept = [(answers[a.place], answers[b.place]) for a, b in pairs if {a.place, b.place} <= {*answers}]
            kept = [(mine, other) for mine, other in kept if np.array_equal(mine[0], other[0])]
            rows = [(mine[0], mine[1], other[1]) for mine, other in kept]
            of_rows = error_of_rows(TASKS[task].metrics[0], rows) if len(rows) == len(pairs) else None
            error = stdev(figures) / len(figures) ** 0.5 if len(figures) > 1 else None
            p = paired_p(figures)
            found[cell.method, task] = Difference(mean(figures), len(figures), error, p, None, of_rows)
            if p is not None:
                tested[cell.method, task] = p
        for place, p in zip(tested, holm([*tested.values()]), strict=True):
            found[place] = replace(found[place], p=p)
    return found


def last(run: Run) -> float:
    assert run.last is not None  # of a run that is done
    return run.last


def figures_table(cells: Sequence[Cell], records: Sequence[Record]) -> list[list[str]]:
    """Two rows a method: its figures, then the rates and the numbers of seeds."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    titles = headings(cells)
    rows = [["method", "trainable", "", *titles[3:-3], "average", "tokens/s", "memory"]]
    by_place = {record.place: record for record in records}
    for method in methods_of(cells):
        own = {cell.task: cell for cell in cells if cell.method == method}
        runs = [run for cell in own.values() for run in cell.done]
        sizes = "/".join(f"{n:,}" for n in sorted({run.trainable for cell in own.values() for run in cell.runs}))
        figures = {task: own[task].figures("last") if task in own else [] for task in tasks}
        texts = [spread(found) if found else "-" for found in figures.values()]
        average = one_decimal(mean(map(median, figures.values()))) if all(figures.values()) else "-"
        memory = [run.memory_gib for run in runs if run.memory_gib is not None]
        speed = tokens_a_second([by_place[run.place] for run in runs])
        costs = [f"{speed:,.0f}" if speed else "-", f"{max(memory):.1f} GiB" if memory else "-"]
        rows.append([method, sizes, "median", *texts, average, *costs])
        rates = [f"{short(own[task].learning_rate)} ({len(figures[task])})" if figures[task] else "-" for task in tasks]
        rows.append(["", "", "rate (seeds)", *rates, "", "", ""])
    return rows


def tokens_a_second(records: Sequence[Record]) -> float | None:
    """Real tokens a second of training, the median over runs; None if none recorded them."""
    speeds = []
    for record in records:
        trained = record.files.get("train_results.json", {})
        tokens, seconds = trained.get("num_input_tokens_seen"), trained.get("train_seconds")
        speeds += [tokens / seconds] if tokens and seconds else []
    return median(speeds) if speeds else None


def differences_table(cells: Sequence[Cell], found: Mapping[tuple[str, str], Difference]) -> list[list[str]]:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    rows = [["method", *(TASKS[task].title for task in tasks)]]
    for method in methods_of(cells):
        if any((method, task) in found for task in tasks):
            rows.append([method, *(difference_text(found.get((method, task))) for task in tasks)])
    return rows


def difference_text(difference: Difference | None) -> str:
    """+1.2 ± 0.3 (p 0.01; rows ± 0.8)"""
    if difference is None:
        return "-"
    text = signed(difference.mean) + (f" ± {one_decimal(difference.error)}" if difference.error is not None else "")
    p = difference.p
    notes = [] if p is None else ["p < 0.001" if p < 0.001 else f"p {p:.3f}" if p < 0.1 else f"p {p:.2f}"]
    notes += [] if difference.of_rows is None else [f"rows ± {one_decimal(difference.of_rows)}"]
    return text + (f" ({'; '.join(notes)})" if notes else "")


def signed(number: float) -> str:
    text = one_decimal(number)
    return text if text.startswith("-") or text == "0.0" else f"+{text}"


def in_words(reference: str, cells: Sequence[Cell], found: Mapping[tuple[str, str], Difference]) -> list[str]:
    """A line for each task: which methods are above and below the reference by more than seeds explain."""
    lines = []
    for task in dict.fromkeys(cell.task for cell in cells):
        own = {method: d for (method, of), d in found.items() if of == task}
        groups = {
            f"above {reference} by more than seeds explain": [m for m, d in own.items() if d.is_told and d.mean > 0],
            f"below {reference} by more than seeds explain": [m for m, d in own.items() if d.is_told and d.mean < 0],
            f"more seeds may tell, as p is below {LEVEL} before Holm's correction and above after it": [
                f"{m} ({signed(d.mean)})" for m, d in own.items() if d.needs_seeds
            ],
            "not told apart": [m for m, d in own.items() if d.p is not None and not (d.is_told or d.needs_seeds)],
            "not tested, with one seed or the same difference in each": [m for m, d in own.items() if d.p is None],
        }
        parts = [f"{words}: {', '.join(methods)}" for words, methods in groups.items() if methods]
        if parts:
            lines.append(f"{TASKS[task].title}. {'; '.join(parts)}.")
    return lines


def costs_text(chosen: Sequence[Record], final: Sequence[Record]) -> str:
    """How many runs there were, and how long they trained."""
    parts = []
    for name, records in (("to choose the rates", chosen), ("at the chosen rates", final)):
        seconds = [record.files.get("train_results.json", {}).get("train_seconds") or 0.0 for record in records]
        parts.append(f"{len(records)} run{'s' * (len(records) != 1)} {name} trained for {clock(sum(seconds))}")
    return f"What it cost: {', '.join(parts)}, added up, without the time to start and to evaluate."


def not_chosen(cells: Sequence[Cell], tried: Mapping[tuple[str, str], Mapping[float, float]]) -> str:
    """The end of the sentence CHOSEN, with the cells for which it is not true."""
    texts = []
    for cell in cells:
        figures = tried.get((cell.task, cell.method), {})
        figure = figures.get(cell.learning_rate)
        if figure is None or figure < max(figures.values()):
            why = "none was tried" if not figures else "another was tried" if figure is None else "another was better"
            texts.append(f"{cell.method} on {TASKS[cell.task].title} ({why})")
    return f", except for {', '.join(texts)}" * bool(texts)


def at_the_end(cells: Sequence[Cell], tried: Mapping[tuple[str, str], Mapping[float, float]]) -> Iterator[str]:
    """A line on each chosen rate that is the lowest or the highest of those tried."""
    for cell in cells:
        rates = [*tried.get((cell.task, cell.method), {})]
        if len(rates) > 1 and cell.learning_rate in (rates[0], rates[-1]):
            which, better = ("lowest", "lower") if cell.learning_rate == rates[0] else ("highest", "higher")
            place = f"{cell.method} on {TASKS[cell.task].title}"
            yield f"{place}: {short(cell.learning_rate)} is the {which} rate that was tried; {better} ones were not"


def default_reference(cells: Sequence[Cell]) -> str | None:
    """Plain LoRA of r 8 on query and value, or the first plain LoRA; None without one."""
    names = [cell.method for cell in cells if cell.runs[0].label == "LoRA"]
    return next((name for name in names if name == "LoRA r=8"), names[0] if names else None)


def refusal(text: str, notes: Sequence[str]) -> UserError:
    """The error, with what was left out before: that may be why."""
    return UserError("\n".join([text, *notes]))


def write_comparison(records: list[Record], notes: list[str], paths: Sequence[Path], reference: str | None,
                     folder: Path | None) -> str:  # fmt: skip
    """The comparison as Markdown; in a folder also as a page, with pictures, a CSV of all runs and the records.

    reference: a method's name in the table, or the folder of one of its runs.
    Raises UserError for runs of several models, or that no method can be compared with.
    """
    if not any(record.run.get("task") in TASKS for record in records):
        cells_of(records, notes, paths)  # raises the error on runs of no GLUE task, or none at all
    is_choosing = [bool(record.run.get("hyperparameters", {}).get(KEPT_OUT)) for record in records]
    chosen = [record for record, is_one in zip(records, is_choosing, strict=True) if is_one and not is_unscored(record)]
    final = [with_answers(record, notes) for record, is_one in zip(records, is_choosing, strict=True) if not is_one]
    if not final:
        text = "no runs on the validation set: all of these keep training rows for it, to choose settings."
        raise refusal(text, notes)
    cells, notes = cells_of(final, notes, paths, ["learning_rate"])
    choosing: list[Cell] = []
    if any(record.run.get("task") in TASKS and not read_figures(record).diverged for record in chosen):
        choosing, notes = cells_of([named_as_final(record) for record in chosen], notes, paths, ["learning_rate"])
    elif chosen:
        notes.append(f"left out, the runs to choose the rates ({len(chosen)}): each diverged, or is on no GLUE task")
    if len(models := {cell.model for cell in (*cells, *choosing)}) > 1:
        raise refusal(f"runs of several models: {', '.join(sorted(models))}. Name those of one.", notes)
    cells = [cell for cell in cells if cell.done]
    if not cells:
        raise refusal("no run has ended with an evaluation of the complete validation set.", notes)
    tried = rates_tried(choosing)
    notes += at_the_end(cells, tried)
    rates_text = CHOSEN + not_chosen(cells, tried) + "." if choosing else " No runs here chose between rates."
    places = Counter((cell.task, cell.method) for cell in cells)
    cells = [with_rate(cell) if places[cell.task, cell.method] > 1 else cell for cell in cells]
    notes += [f"compared, but evaluated on different examples: {text}" for text in different_examples(cells)]
    of_folder = {str(run.folder): cell.method for cell in cells for run in cell.done}
    reference = of_folder.get(reference, reference) if reference else default_reference(cells)
    if reference is None:
        text = "no runs of plain LoRA to compare with. Name another method of the table: --reference NAME"
        raise refusal(text, notes)
    if reference not in {cell.method for cell in cells}:
        text = f"--reference {printable(reference, 80)}: no finished run has this method."
        raise refusal(f"{text} There are: {', '.join(methods_of(cells))}.", notes)
    found = differences_from(reference, cells, answers_of(final))
    sections: list[Any] = [
        ("heading", f"Methods on {cells[0].model}"), ("table", figures_table(cells, final)),
        ("text", METRIC + rates_text),
        ("heading", f"Differences from {reference}"), ("table", differences_table(cells, found)),
        ("text", difference_words(cells, found)), ("list", in_words(reference, cells, found)),
        ("text", costs_text(chosen, final)),
    ]  # fmt: skip
    if folder:
        pictures, no_pictures = draw(cells, choosing, reference, found, folder)
        sections += [("picture", name) for name in pictures]
        notes = [*notes, *no_pictures]
    if notes:
        sections.append(("list", notes))
    text = as_markdown(sections)
    if folder:
        write_text(folder / "report.md", text)
        write_text(folder / "report.html", as_page(sections, folder))
        write_text(folder / "report.csv", csv_text([*cells, *(with_rate(cell, CHOOSING) for cell in choosing)]))
        write_records(folder / RECORDS, [*chosen, *final])
    return text


def with_rate(cell: Cell, note: str = "") -> Cell:
    return replace(cell, method=f"{cell.method} (learning_rate {cell.learning_rate:g}{note})")


def different_examples(cells: Sequence[Cell]) -> Iterator[str]:
    """For each task whose runs were not all evaluated on the same examples a run of each kind."""
    for task in dict.fromkeys(cell.task for cell in cells):
        runs = [run for cell in cells if cell.task == task for run in cell.done]
        folders = {run.eval_data: run.folder for run in runs if run.eval_data}  # older versions recorded none
        if len(folders) > 1:
            yield ", ".join(map(str, folders.values()))


def difference_words(cells: Sequence[Cell], found: Mapping[tuple[str, str], Difference]) -> str:
    text = (
        "Mean over the seeds that both have ± its standard error. p is of Student's paired test over seeds, adjusted "
        f"by Holm's method over a task's comparisons: below {LEVEL} it is called more than seeds explain."
    )
    if any(difference.of_rows is not None for difference in found.values()):
        text += (
            " `rows` is the standard error that another draw of the validation set would add (a bootstrap over its "
            "examples): a difference of less than twice that may be an accident of these examples."
        )
    return text


def draw(
    cells: Sequence[Cell],
    choosing: Sequence[Cell],
    reference: str,
    found: Mapping[tuple[str, str], Difference],
    folder: Path,
) -> tuple[list[str], list[str]]:
    """Draw the pictures; their names, and notes."""
    try:
        from lora_nlu.report.comparison_pictures import draw_comparison
    except ImportError:
        return [], ["no pictures: they need matplotlib (pip install 'lora-nlu[plots]')"]
    return draw_comparison(cells, choosing, methods_of(cells), reference, found, folder), []


def as_markdown(sections: Sequence[tuple[str, Any]]) -> str:
    parts = {
        "heading": lambda text: f"## {markdown_text(text)}",
        "table": markdown,
        "text": lambda text: text,
        "list": lambda lines: "\n".join(f"- {markdown_text(line)}" for line in lines),
        "picture": lambda name: f"![{markdown_text(name)}]({name}.png)",
    }
    return "\n\n".join(parts[kind](content) for kind, content in sections) + "\n"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
th, td { padding: 0.2rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 }
img { max-width: 100%; height: auto; margin: 1rem 0 }
"""


def as_page(sections: Sequence[tuple[str, Any]], folder: Path) -> str:
    """One HTML file with the pictures in it, that needs no network and runs no script."""

    def table(rows: list[list[str]]) -> str:
        lines = []
        for i, row in enumerate(rows):
            tag = "td" if i else "th"
            lines.append(f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>")
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    def picture(name: str) -> str:
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'

    parts = {
        "heading": lambda text: f"<h2>{html.escape(text)}</h2>",
        "table": table,
        "text": lambda text: f"<p>{html.escape(text.replace('`', ''))}</p>",
        "list": lambda lines: "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>",
        "picture": picture,
    }
    title = next(content for kind, content in sections if kind == "heading")
    body = "\n".join(parts[kind](content) for kind, content in sections)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
