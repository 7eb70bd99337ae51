"""The zip file that the GLUE test server accepts, made of the predictions in run folders."""

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_nlu.data.tasks import TASKS, Task
from lora_nlu.errors import UserError
from lora_nlu.files import RUN, atomic_write, read_json, read_text
from lora_nlu.labels import label_number
from lora_nlu.report.records import Figures, is_other_model, leave_out, read_figures, read_folders

HEADER = "index\tprediction"
PREDICTIONS = "predict_results.json"  # what each file of predictions is of


class _File(NamedTuple):
    """A file of the zip: its task and split, and the end of the name of the prediction file that it is made of."""

    name: str
    task: str
    split: str = "test"
    suffix: str = ""

    @property
    def rows(self) -> int:
        return TASKS[self.task].rows[self.split]

    def source(self, folder: Path) -> Path:
        return folder / f"predict_results_{self.task}{self.suffix}.tsv"


FILES = (
    _File("CoLA.tsv", "cola"), _File("SST-2.tsv", "sst2"), _File("MRPC.tsv", "mrpc"), _File("STS-B.tsv", "stsb"),
    _File("QQP.tsv", "qqp"), _File("MNLI-m.tsv", "mnli", "test_matched"),
    _File("MNLI-mm.tsv", "mnli", "test_mismatched", "-mm"), _File("QNLI.tsv", "qnli"), _File("RTE.tsv", "rte"),
    _File("WNLI.tsv", "wnli"), _File("AX.tsv", "ax"),
)  # fmt: skip
_TITLES = {file.task: TASKS[file.task].title for file in FILES}


@dataclass(frozen=True)
class Run:
    """A run folder, with what its files record; other_models: names of predictions in it that are not of its model."""

    folder: Path
    task: str
    seed: int | None
    base_model: str
    figures: Figures
    other_models: frozenset[str] = frozenset()

    def predicts(self, task: str) -> bool:
        """Whether all of the task's prediction files are there, of the run's model."""
        sources = [file.source(self.folder) for file in FILES if file.task == task]
        return all(source.is_file() and source.name not in self.other_models for source in sources)


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Every run on a GLUE task at or under these folders, each once, and lines on what is left out of them.

    Raises UserError for a folder without a run, or a damaged run folder.
    """
    found: dict[str, Run] = {}
    notes: list[str] = []
    for start in paths:
        records, damaged = read_folders(start)
        if not records:
            reasons = "; ".join(damaged) or f"no {RUN}"
            raise UserError(f"{start}: no run in it ({reasons}). Give an output folder of run_glue.py.")
        notes += damaged
        for record in records:
            run, folder = record.run, record.folder
            if run.get("task") not in TASKS or (key := os.path.realpath(folder)) in found:
                continue
            try:
                other_models = frozenset(_predictions_of_others(folder, run))
            except UserError as e:
                notes.append(leave_out(e, folder, [start]))
                continue
            figures, seed = read_figures(record), run.get("hyperparameters", {}).get("seed")
            notes += [figures.left_out] if figures.left_out else []
            notes += [f"left out: {folder / name}: of another model than the run's" for name in sorted(other_models)]
            found[key] = Run(folder, run["task"], seed, str(run.get("base_model", "unknown")), figures, other_models)
    return list(found.values()), notes


def _predictions_of_others(folder: Path, run: dict[str, Any]) -> list[str]:
    """Names of the predictions in a folder that record another model than its run; older versions recorded none."""
    if not (folder / PREDICTIONS).is_file():
        return []
    recorded = read_json(folder / PREDICTIONS)
    return [name for name, of in recorded.items() if not isinstance(of, dict) or is_other_model(run, of)]


def _best(task: str, runs: list[Run]) -> tuple[Run, list[str]]:
    """The run whose final model has the best dev figure, and lines on it."""
    title, metric, figures = _TITLES[task], TASKS[task].metrics[0], [run.figures.last for run in runs]
    if len(runs) > 1 and None in figures:
        raise UserError(
            f"{title}: {len(runs)} runs predict it, and {runs[figures.index(None)].folder} has no dev {metric}.\n"
            "Evaluate them all with --do_eval, or name only one run."
        )
    i = max(range(len(runs)), key=lambda i: figures[i] or 0.0)
    count = f" of {len(runs)} runs" if len(runs) > 1 else ", the only run"
    figure = "not evaluated" if figures[i] is None else f"dev {metric} {figures[i]:.3f} of its final model"
    lines = [f"{title}: seed {runs[i].seed}{count}, {figure}: {runs[i].folder}"]
    evaluations = [(value, epoch, run.seed) for run in runs for _, epoch, value in run.figures.history]
    value, epoch, seed = max(evaluations, key=lambda evaluation: evaluation[0], default=(-math.inf, 0.0, None))
    final_figure = runs[i].figures.first_set
    if final_figure is not None and value > final_figure + 1e-6:
        place = " on the matched set" if task == "mnli" else ""
        lines.append(
            f"{title}: epoch {epoch:g} of seed {seed} had {metric} {value:.3f}{place}; "
            "--load_best_model_at_end would have kept that model and predicted with it."
        )
    return runs[i], lines


def choose(runs: list[Run]) -> tuple[dict[str, Run], list[str]]:
    """The run that predicts each task, for tasks with such a run, and lines on them."""
    chosen: dict[str, Run] = {}
    lines = []
    for task in _TITLES:  # MNLI before AX, which MNLI's model predicts
        candidates = [run for run in runs if run.task == task and run.predicts(task)]
        if task != "ax":
            if candidates:
                chosen[task], notes = _best(task, candidates)
                lines += notes
        elif "mnli" in chosen and chosen["mnli"].predicts("ax"):
            chosen[task] = chosen["mnli"]
            lines.append("AX: from the MNLI run.")
        elif len(candidates) > 1:  # AX has no dev figure to choose by
            text = f"AX: {len(candidates)} runs predict it: {', '.join(str(run.folder) for run in candidates)}."
            raise UserError(f"{text}\nName only the one with the MNLI run's adapter.")
        elif candidates:
            chosen[task] = candidates[0]
            lines.append(f"AX: from a separate run: {candidates[0].folder}")
    bases: dict[str, list[str]] = {}
    for task, run in chosen.items():
        bases.setdefault(run.base_model, []).append(_TITLES[task])
    if len(bases) > 1:
        each = "; ".join(f"{base} ({', '.join(titles)})" for base, titles in bases.items())
        lines.append(f"The runs have different base models: {each}.")
    return chosen, lines


def _is_answer(task: Task, answer: str) -> bool:
    try:
        return math.isfinite(label_number(answer)) if task.is_regression else answer in task.labels
    except ValueError:
        return False


def read_predictions(path: Path, task: Task, rows: int) -> list[str]:
    """The predictions of a file, unchanged but checked. Raises UserError with file, line and remedy."""

    def wrong(line: int, found: str, expected: str) -> UserError:
        return UserError(
            f"{path}:{line}: {found}; expected {expected}.\n"
            f"Run again with --do_predict, without --max_predict_samples: run_glue.py --task_name {task.name} ..."
        )

    # bytes that are not UTF-8 become a character that occurs in no header, index or label
    header, *lines = read_text(path, errors="replace").removesuffix("\n").split("\n")
    if header != HEADER:
        raise wrong(1, f"header {header!r}", repr(HEADER))
    answers = []
    for i, line in enumerate(lines[:rows]):
        index, _, answer = line.partition("\t")
        if index != str(i):
            raise wrong(i + 2, f"index {index!r}", f"'{i}'")
        if not _is_answer(task, answer):
            raise wrong(i + 2, f"prediction {answer!r}", ", ".join(task.labels) or "a finite number")
        answers.append(answer)
    if len(lines) != rows:
        raise wrong(len(lines) + 1, f"the file ends after {len(lines):,} rows", f"{rows:,}")
    return answers


def server_format(task: Task, answers: list[str]) -> list[str]:
    """Predictions as the server expects them: labels as the task's own files write them, or numbers from 0 to 5."""
    if task.is_regression:
        return [f"{min(max(0.0, float(answer)), 5.0):.3f}" for answer in answers]
    written = dict(zip(task.labels, task.written or task.labels, strict=True))
    return [written[answer] for answer in answers]


def write_zip(out: Path, content: dict[_File, list[str]]) -> None:
    """Write the zip atomically, and read it back before it gets its name; the same content gives the same bytes."""
    try:
        with atomic_write(out) as partial:
            with zipfile.ZipFile(partial, "w") as archive:
                for file, answers in content.items():
                    entry = zipfile.ZipInfo(file.name)  # dated 1980, whatever the clock says
                    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    lines = [HEADER, *(f"{i}\t{answer}" for i, answer in enumerate(answers))]
                    archive.writestr(entry, "\n".join(lines) + "\n")
            with zipfile.ZipFile(partial) as archive:
                found = {name: archive.read(name).count(b"\n") - 1 for name in archive.namelist()}
            if found != (expected := {file.name: file.rows for file in content}):
                raise UserError(f"{out}: contains {found} when read back; expected {expected}. Removed; try again.")
    except zipfile.BadZipFile as e:
        raise UserError(f"{out}: can't be read back ({e}). Removed; check the disk.") from e


def write_submission(runs: Sequence[Path], out: Path, partial: bool = False) -> list[str]:
    """Write the zip for the GLUE server; returns lines on what is in it. If it raises UserError, nothing is written.

    runs: output folders, or folders above them; partial: leave out the tasks that no run predicts.
    """
    if out.exists():
        raise UserError(f"{out}: exists already and is not overwritten. Give another --out.")
    found, notes = find_runs(runs)
    diverged = [f"left out, diverged ({run.figures.diverged}): {run.folder}" for run in found if run.figures.diverged]
    chosen, lines = choose([run for run in found if not run.figures.diverged])
    lines += diverged + notes
    if diverged and not chosen:
        raise UserError("no run with predictions:\n" + "; ".join(diverged))
    untrained = {"wnli"} - {run.task for run in found}
    if missing := [task for task in _TITLES if task not in {*chosen, *untrained}]:
        names = ", ".join(file.name for file in FILES if file.task in missing)
        if not partial:
            tasks = ", ".join(task + " (with the MNLI run's adapter)" * (task == "ax") for task in missing)
            raise UserError(
                f"no predictions for {names}{''.join(f'; {line}' for line in diverged)}.\n"
                f"Make them with run_glue.py --task_name X --do_predict ..., X being {tasks}.\n"
                "--partial leaves these files out."
            )
        lines.append(f"Left out, no run predicts them: {names}. The server accepts only all eleven files.")
    content = {}
    for file in (file for file in FILES if file.task not in missing):
        task = TASKS[file.task]
        if file.task in untrained:
            answers = ["not_entailment"] * file.rows
            lines.append("WNLI: no run; all 146 rows are not_entailment, as 323 of the 635 in training are.")
        else:
            answers = read_predictions(file.source(chosen[file.task].folder), task, file.rows)
        if task.is_regression and (outside := sum(not 0 <= float(answer) <= 5 for answer in answers)):
            lines.append(f"{_TITLES[task.name]}: {outside:,} of {file.rows:,} numbers moved into 0..5.")
        content[file] = server_format(task, answers)
    write_zip(out, content)
    return [*lines, f"{out}: {len(content)} files."]
