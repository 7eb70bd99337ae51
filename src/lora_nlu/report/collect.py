"""Run folders to the cells of a table: one model, method and task over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_nlu.data.tasks import REPORTED, TASKS
from lora_nlu.errors import UserError
from lora_nlu.files import folders_containing, is_training_run, read_json
from lora_nlu.report.paper import LORA_RANKS, PAPER, Published
from lora_nlu.report.submission import Figures, read_figures, read_state

FROM_MNLI = ("mrpc", "rte", "stsb")  # the paper's LoRA starts them from its MNLI adapter, but for a line that says so
_NOT_SETTINGS = ("name", "targets", "label", "color", "marker")  # of what a run records of its method
NO_START = "lora, no MNLI start"


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
    } | {name: value for name, value in method.items() if name not in _NOT_SETTINGS}  # fmt: skip
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
        folders = folders_containing("run.json", start) if start.is_dir() else []
        found = {path: known for path in folders if is_training_run(known := read_json(path / "run.json"))}
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
