"""The zip that the GLUE test server takes, out of the predictions that runs left in their folders.

python -m lora_nlu.report submission RUN... --out glue.zip [--partial]
"""

import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lora_nlu.data.tasks import TASKS, Task
from lora_nlu.errors import UserError
from lora_nlu.files import atomic_write, folders_containing, read_json

HEADER = "index\tprediction"
STATE = "trainer_state.json"


class _File(NamedTuple):
    """A file of the zip, the task and split it answers, and the end of the prediction file's name."""

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
    _File("CoLA.tsv", "cola"),
    _File("SST-2.tsv", "sst2"),
    _File("MRPC.tsv", "mrpc"),
    _File("STS-B.tsv", "stsb"),
    _File("QQP.tsv", "qqp"),
    _File("MNLI-m.tsv", "mnli", "test_matched"),
    _File("MNLI-mm.tsv", "mnli", "test_mismatched", "-mm"),
    _File("QNLI.tsv", "qnli"),
    _File("RTE.tsv", "rte"),
    _File("WNLI.tsv", "wnli"),
    _File("AX.tsv", "ax"),
)
_TITLES = {file.task: TASKS[file.task].title for file in FILES}


@dataclass(frozen=True)
class Figures:
    """A run's figures on the validation set in its task's first metric, of which more is better; from 0 or -1 to 1.

    last:      of the model that training ended with (the best epoch's with --load_best_model_at_end), which makes the
               predictions; MNLI's on both sets together. None for a run that was not evaluated.
    first_set: the same, MNLI's on the matched set alone.
    history:   (step, epoch, figure) of every evaluation while training, MNLI's on the matched set.
    diverged:  where training stopped for it, or the figure that is not finite, and its value; "" where all are.
    """

    last: float | None
    first_set: float | None
    history: tuple[tuple[int, float, float], ...]
    diverged: str


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer_state.json of a run, or of its last checkpoint while it has not ended; without either {}."""
    checkpoints = [path for path in folder.glob(f"checkpoint-*/{STATE}") if path.parent.name[11:].isdigit()]
    newest = max(checkpoints, key=lambda path: int(path.parent.name[11:]), default=None)
    path = folder / STATE if (folder / STATE).is_file() else newest
    return read_json(path) if path else {}


def read_figures(folder: Path, known: dict[str, Any]) -> Figures:
    """The figures of an output folder, its run.json already known. Raises UserError for a file that can't be read."""
    metric = f"eval_{TASKS[known['task']].metrics[0]}"
    evaluated, trained = (
        read_json(path) if (path := folder / f"{name}_results.json").is_file() else {} for name in ("eval", "train")
    )
    log = read_state(folder).get("log_history", [])
    logged = {key: value for entry in log for key, value in entry.items()}  # the last of each
    if (known.get("hyperparameters") or {}).get("fp16"):
        logged.pop("grad_norm", None)  # not finite in a step that the loss scaler leaves out
    broken = [
        (key, value)
        for source in (evaluated, trained, logged)
        for key, value in source.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    history = [
        (entry["step"], entry.get("epoch", 0.0), entry[metric])
        for entry in log
        if isinstance(entry.get(metric), int | float) and math.isfinite(entry[metric])
    ]
    last, first_set = (
        value if isinstance(value, int | float) and math.isfinite(value) else None
        for value in (evaluated.get(f"{metric}_overall", evaluated.get(metric)), evaluated.get(metric))
    )
    diverged = str(known.get("diverged") or (" ".join(map(str, broken[0])) if broken else ""))
    return Figures(last, first_set, tuple(history), diverged)


@dataclass(frozen=True)
class Run:
    """An output folder, and what its run.json says of it."""

    folder: Path
    task: str
    seed: int | None
    base_model: str
    figures: Figures

    def predicts(self, task: str) -> bool:
        """Whether all of the task's prediction files are there."""
        return all(file.source(self.folder).is_file() for file in FILES if file.task == task)


def find_runs(given: Sequence[Path]) -> list[Run]:
    """Every run in or under the given folders, each once. Raises UserError for a folder that holds none."""
    found: dict[Path, Run] = {}
    for start in given:
        folders = folders_containing("run.json", start)
        if not folders:
            raise UserError(f"{start}: holds no run (no run.json). Give an output folder of run_glue.py.")
        for path in folders:
            known = read_json(path / "run.json")
            if known.get("task") in TASKS:
                seed, base = (known.get("hyperparameters") or {}).get("seed"), str(known.get("base_model", "unknown"))
                run = Run(path, known["task"], seed, base, read_figures(path, known))
                found.setdefault(path.resolve(), run)
    return list(found.values())


def _best(task: str, runs: list[Run]) -> tuple[Run, list[str]]:
    """The run that ended with the model of the best dev figure, and lines on it."""
    title, metric, figures = _TITLES[task], TASKS[task].metrics[0], [run.figures.last for run in runs]
    if len(runs) > 1 and None in figures:
        raise UserError(
            f"{title}: {len(runs)} runs predict it; no dev {metric} in {runs[figures.index(None)].folder}.\n"
            "Evaluate them all with --do_eval, or name one run only."
        )
    i = max(range(len(runs)), key=lambda i: figures[i] or 0.0)
    which = f"seed {runs[i].seed}" + (f" of {len(runs)} runs" if len(runs) > 1 else ", the only run")
    figure = "not evaluated" if figures[i] is None else f"dev {metric} {figures[i]:.3f} of its final model"
    lines = [f"{title}: {which}, {figure}: {runs[i].folder}"]
    seen = [(value, epoch, run.seed) for run in runs for _, epoch, value in run.figures.history]
    reached = runs[i].figures.first_set
    if seen and reached is not None and (best := max(seen, key=lambda one: one[0]))[0] > reached + 1e-6:
        value, epoch, seed = best
        place = " on the matched set" if task == "mnli" else ""
        lines.append(
            f"{title}: epoch {epoch:g} of seed {seed} had {metric} {value:.3f}{place}; "
            "--load_best_model_at_end would have kept that model and predicted with it."
        )
    return runs[i], lines


def _only(runs: list[Run]) -> tuple[Run, list[str]]:
    """The run made for AX, which has no dev figure, and a line on it."""
    if len(runs) > 1:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UserError(f"AX: {len(runs)} runs predict it: {folders}.\nName only the one with the MNLI run's adapter.")
    return runs[0], [f"AX: from a separate run: {runs[0].folder}"]


def choose(runs: list[Run]) -> tuple[dict[str, Run], list[str]]:
    """The run that answers each task, for those that have one, and lines on them."""
    chosen: dict[str, Run] = {}
    lines = []
    for task in _TITLES:  # MNLI before AX, which is the same model's
        candidates = [run for run in runs if run.task == task and run.predicts(task)]
        if task == "ax" and "mnli" in chosen and chosen["mnli"].predicts("ax"):
            chosen[task], said = chosen["mnli"], ["AX: from the MNLI run."]
        elif candidates:
            chosen[task], said = _only(candidates) if task == "ax" else _best(task, candidates)
        else:
            continue
        lines += said
    bases: dict[str, list[str]] = {}
    for task, run in chosen.items():
        bases.setdefault(run.base_model, []).append(_TITLES[task])
    if len(bases) > 1:
        each = "; ".join(f"{base} ({', '.join(titles)})" for base, titles in bases.items())
        lines.append(f"The runs have different base models: {each}.")
    return chosen, lines


def _is_answer(task: Task, answer: str) -> bool:
    if not task.is_regression:
        return answer in task.labels
    try:
        return math.isfinite(float(answer))
    except ValueError:
        return False


def read_predictions(path: Path, task: Task, rows: int) -> list[str]:
    """The predictions of a file as they stand in it, all checked. Raises UserError with file, line and remedy."""

    def wrong(line: int, found: str, expected: str) -> UserError:
        return UserError(
            f"{path}:{line}: {found}; expected {expected}.\n"
            f"Run again with --do_predict, without --max_predict_samples: run_glue.py --task_name {task.name} ..."
        )

    # what is not UTF-8 becomes a character that no header, index or label has
    header, *lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
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


def written_for_server(task: Task, answers: list[str]) -> list[str]:
    """Predictions as the server wants them: as the task's own files write labels, or numbers from 0 to 5."""
    if task.is_regression:
        return [f"{min(max(0.0, float(answer)), 5.0):.3f}" for answer in answers]
    written = dict(zip(task.labels, task.written or task.labels, strict=True))
    return [written[answer] for answer in answers]


def write_zip(out: Path, content: dict[_File, list[str]]) -> None:
    """Write the zip whole or not at all, read back before it gets its name; same bytes for same content."""
    out.parent.mkdir(parents=True, exist_ok=True)
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
                raise UserError(f"{out}: reads back as {found}; expected {expected}. Nothing was kept; try again.")
    except zipfile.BadZipFile as e:
        raise UserError(f"{out}: can't be read back ({e}). Nothing was kept; is the disk sound?") from e


def write_submission(runs: Sequence[Path], out: Path, partial: bool = False) -> list[str]:
    """Write the zip for the GLUE server; returns lines on what is in it. Raises UserError, and then writes nothing.

    runs: output folders, or folders that hold some at any depth; partial: do without the tasks that no run predicts.
    """
    if out.exists():
        raise UserError(f"{out}: is there already. Give another --out; nothing is written over.")
    found = find_runs(runs)
    diverged = [f"left out, diverged ({run.figures.diverged}): {run.folder}" for run in found if run.figures.diverged]
    chosen, lines = choose([run for run in found if not run.figures.diverged])
    lines += diverged
    if diverged and not chosen:
        raise UserError("no run to take predictions from:\n" + "; ".join(diverged))
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
        lines.append(f"Left out, no run predicts them: {names}. The server wants all eleven files.")
    content = {}
    for file in (file for file in FILES if file.task not in missing):
        task = TASKS[file.task]
        if file.task in untrained:
            answers = ["not_entailment"] * file.rows
            lines.append("WNLI: no run; all 146 rows say not_entailment, as 323 of the 635 in training do.")
        else:
            answers = read_predictions(file.source(chosen[file.task].folder), task, file.rows)
        outside = sum(not 0 <= float(answer) <= 5 for answer in answers) if task.is_regression else 0
        if outside:
            lines.append(f"{_TITLES[task.name]}: {outside:,} of {file.rows:,} numbers moved into 0..5.")
        content[file] = written_for_server(task, answers)
    write_zip(out, content)
    return [*lines, f"{out}: {len(content)} files."]
