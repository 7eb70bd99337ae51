"""Records of runs to the cells of a table: one model, method and task over seeds."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_nlu.data.tasks import REPORTED, TASKS
from lora_nlu.errors import UserError, printable
from lora_nlu.report.paper import LORA_RANKS, PAPER, Published
from lora_nlu.report.records import (
    EVALUATION,
    RUN,
    STATE,
    TRAINING,
    Figures,
    Record,
    leave_out,
    read_figures,
    training_records,
)

FROM_MNLI = ("mrpc", "rte", "stsb")  # the paper's LoRA starts them from its MNLI adapter, except on one line
MNLI_START, NO_START = "lora", "lora, no MNLI start"
TASK_ORDER = (*REPORTED, *(name for name in TASKS if name not in REPORTED))  # the paper's, then the others
LOOK = ("color", "marker")  # of a method in plots, keys of its record
# Label, colour and marker of the methods whose runs earlier versions recorded without them.
EARLIER = {
    "lora": ("LoRA", "#D55E00", "s"), "houlsby": ("Houlsby", "#009E73", "D"), "pfeiffer": ("Pfeiffer", "#CC79A7", "^"),
    "bitfit": ("BitFit", "#E69F00", "v"), "head": ("head alone", "#56B4E9", "P"),
    "full": ("fine-tuning", "#0072B2", "o"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a report shows of one run; figures in percent.

    place:      where its record was read: its folder, or a line of a file.
    base:       the base model's fingerprint; another model may have the same name, `model`.
    label:      the method's name without settings; `method` names them too.
    look:       the method's colour and marker in plots; None if they are unknown.
    trains_all: whether every parameter trains.
    settings:   all that decides the result, except for the seed and the training data, as hashable items.
    paper:      the paper's line for the same method and settings, if it has this task.
    history:    (step, figure) of every evaluation while training.
    best:       the highest of them and of the one after training; MNLI's are all on the matched set.
    last:       the figure after training, MNLI's on both sets; like `best` None for a run that has not ended.
    rank:       LoRA's, with its alpha; None for another method, and where layers have different ranks.
    """

    folder: Path
    place: str
    model: str
    base: str | None
    method: str
    label: str
    look: tuple[str, str] | None
    task: str
    seed: int
    settings: tuple[tuple[str, str], ...]
    paper: Published | None
    trainable: int
    trains_all: bool
    history: tuple[tuple[int, float], ...]
    best: float | None
    last: float | None
    progress: str
    seconds: float | None
    memory_gib: float | None
    rank: int | None
    alpha: float | None
    targets: str
    train_data: str | None
    eval_data: str | None


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

    @property
    def learning_rate(self) -> float:
        return float(dict(self.runs[0].settings).get("learning_rate", "nan"))

    def figures(self, protocol: str) -> list[float]:
        return [figure for run in self.done if (figure := getattr(run, protocol)) is not None]


def collect(paths: Sequence[Path]) -> tuple[list[Cell], list[str]]:
    """The cells of the runs at these paths, and notes on what is not in them, as `cells_of`. Raises UserError."""
    return cells_of(*training_records(paths), paths)


def cells_of(
    records: list[Record], notes: list[str], paths: Sequence[Path], unnamed: Collection[str] = ()
) -> tuple[list[Cell], list[str]]:
    """The cells of all tables, in the paper's order of tasks, and notes on what is not in them. Raises UserError.

    notes:   of reading the records at these paths; they are among those returned.
    unnamed: settings that are in no method's name; cells that differ in nothing else have the same name.
    """
    runs = []
    for record in records:
        if record.run.get("task") not in TASKS:
            notes.append(f"left out, not a GLUE task: {record.folder}")
        elif (figures := read_figures(record)).diverged:
            notes.append(f"left out, diverged ({figures.diverged}): {record.folder}")
        else:
            notes += [figures.left_out] if figures.left_out else []
            try:
                runs.append(read_run(record, figures))
            except UserError as e:
                notes.append(leave_out(e, record.folder, paths))
    if not runs:
        reasons = "".join(f"\n{note}" for note in notes)
        raise UserError(f"no training run on a GLUE task. Give output folders of run_glue.py.{reasons}")
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in compare_runs(runs):
        groups.setdefault((run.model, run.method, run.task), []).append(run)
    cells = []
    for (model, method, task), members in groups.items():
        named = {run.settings: tuple(pair for pair in run.settings if pair[0] not in unnamed) for run in members}
        texts = differences([*named.values()])
        for settings, difference in ((settings, texts[short]) for settings, short in named.items()):
            same = sorted((run for run in members if run.settings == settings), key=lambda run: run.seed)
            for one, other in zip(same, same[1:], strict=False):
                if one.seed == other.seed:
                    text = f"{one.place} and {other.place} are the same run with the same seed."
                    raise UserError(f"{text} Name only one of them.")
            done = tuple(run for run in same if run.last is not None)
            unfinished = tuple(run for run in same if run.last is None)
            name = printable(f"{method} ({difference})" if difference else method, 2000)
            cells.append(Cell(model, name, task, done, unfinished))
            for name, verb in (("train_data", "trained"), ("eval_data", "evaluated")):
                folders = {x: run.folder for run in same if (x := getattr(run, name))}  # older versions recorded none
                if len(folders) > 1:
                    text = ", ".join(map(str, folders.values()))
                    notes.append(f"in one line, but {verb} on different examples: {text}")
    cells.sort(key=lambda cell: (cell.model, TASK_ORDER.index(cell.task)))
    return cells, notes


def read_run(record: Record, figures: Figures) -> Run:
    """What a report shows of a record. Raises UserError for one of an earlier version that lacks something."""
    folder, run = record.folder, record.run
    try:
        task, hyper, method = TASKS[run["task"]], run["hyperparameters"], run["method"]
        seed, parameters, lora = hyper["seed"], run["parameters"], run["lora"]
        name, paper_method = name_method(method, lora, hyper)
        trainable, epochs = parameters["encoder"], hyper["num_train_epochs"]
        all_ranks, scalings, relative_query = lora["ranks"], lora["scalings"], lora["lora_relative_query"]
    except KeyError as e:
        text = f"{folder}/{RUN}: {e} is missing: maybe an older version wrote it."
        raise UserError(f"{text} Train the run again, or leave it out.") from e
    is_trained, state, evaluated = bool(run.get("trained")), record.files.get(STATE, {}), record.files.get(EVALUATION)
    history = [(step, 100 * figure) for step, _, figure in figures.history]
    best = last = None
    if is_trained and evaluated is not None and not figures.left_out:
        if figures.last is None or figures.first_set is None:
            text = f"{folder}/{EVALUATION}: no eval_{task.metrics[0]} in it."
            raise UserError(f"{text} Evaluate the run again, or leave it out.")
        best, last = max([100 * figures.first_set, *(figure for _, figure in history)]), 100 * figures.last
    measured = record.files.get(TRAINING) if is_trained else {}
    if measured is None:
        raise UserError(f"{folder}/{TRAINING}: missing. Train the run again, or leave it out.")
    model = printable(Path(str(run.get("base_model") or "unknown")).name, 200)
    model = model.encode()[:200].decode(errors="ignore")  # it is in the names of pictures too, of 255 bytes at most
    starts_from_adapter = run.get("started_from") is not None
    not_compared = {"seed", "data_seed", "train_data", "eval_data", *run.get("left_at_default", ())}
    if_set = dict.fromkeys(
        ("loraplus_lr_ratio", "head_learning_rate", "class_weights", "validation_from_train")
    )  # recorded where they are set
    settings = if_set | {key: value for key, value in hyper.items() if key not in not_compared}
    settings |= {
        "scaling": ", ".join(f"{scaling:g}" for scaling in scalings),
        "lora_relative_query": relative_query,
        "started from": "an adapter" if starts_from_adapter else "the base model",
    }
    settings |= {key: value for key, value in method.items() if key not in ("name", "label", *LOOK, "targets")}
    if "targets" in method:
        settings["variant"] = label_of(method)
    epoch = state.get("epoch", 0)
    reached = f"its last checkpoint at epoch {epoch:.4g} of {epochs:g}" if state else "no checkpoint yet"
    ranks = all_ranks if "targets" in method else []
    rank = ranks[0] if len(ranks) == 1 else None
    alpha = None
    if rank and len(scalings) == 1:
        alpha = round(scalings[0] * (rank**0.5 if method["name"] == "rslora" else rank), 3)
    return Run(
        folder=folder, place=record.place, model=model, base=run.get("base_fingerprint"), method=name,
        label=label_of(method), look=look_of(method), task=task.name, seed=seed,
        settings=tuple((key, str(value)) for key, value in settings.items()),
        paper=_paper_line(paper_method, task.name, model, all_ranks, starts_from_adapter),
        trainable=trainable, trains_all=parameters.get("trainable") == parameters.get("total"),
        history=tuple(history), best=best, last=last, progress="trained, not evaluated" if is_trained else reached,
        seconds=measured.get("train_seconds"),
        memory_gib=measured.get("peak_gpu_memory_gib", measured.get("peak_memory_gib")),
        rank=rank, alpha=alpha, targets=", ".join(method.get("targets", [])),
        train_data=hyper.get("train_data"), eval_data=(evaluated or {}).get("eval_data"),
    )  # fmt: skip


def label_of(method: dict[str, Any]) -> str:
    """The name of a method without its settings, from its record."""
    return method.get("label") or EARLIER.get(method["name"], (method["name"],))[0]


def look_of(method: dict[str, Any]) -> tuple[str, str] | None:
    """The colour and marker of a method in plots, from its record."""
    if {*LOOK} <= {*method}:
        return method["color"], method["marker"]
    return EARLIER[method["name"]][1:] if method["name"] in EARLIER else None


def name_method(method: dict[str, Any], lora: dict[str, Any], hyper: dict[str, Any]) -> tuple[str, str | None]:
    """The name of a method in tables, and in the paper's lines; None for settings that the paper does not have."""
    name, more = method["name"], []  # more: what differs from the paper's settings
    label = label_of(method)
    if "targets" in method:
        label += f" r={','.join(map(str, lora['ranks']))}"
        if "target_rank" in method:
            label += f" to {method['target_rank']}"
        if method["targets"] != ["query", "value"]:
            more.append(f"on {', '.join(method['targets'])}")
        if method["layers"] is not None:
            more.append(f"layers {', '.join(map(str, method['layers']))}")
        if method["lora_dropout"]:
            more.append(f"dropout {method['lora_dropout']:g}")
        if lora["lora_relative_query"]:  # DeBERTa's; the paper's runs do not train it
            more.append(f"and relative {'key' if lora['lora_relative_query'] == 'key' else 'query'}")
    if "adapter_size" in method:
        label, name = f"{label} {method['adapter_size']}", f"{name} {method['adapter_size']}"
    if ratio := hyper.get("loraplus_lr_ratio"):
        more.append(f"with LoRA+ {ratio:g}")
    if method.get("biases"):
        more.append("and biases")
    if hyper.get("reg_loss_wgt"):
        more.append(f"{'cutoff' if hyper.get('masking_prob') else 'R-Drop'} {hyper['reg_loss_wgt']:g}")
    if weights := hyper.get("class_weights"):
        more.append(f"class weights {'/'.join(f'{weight:.3g}' for weight in weights)}")
    if kept_out := hyper.get("validation_from_train"):
        more.append(f"scored on {kept_out:,} training rows")
    return " ".join([label, *more]), None if more else name


def _paper_line(
    method: str | None, task: str, model: str, ranks: list[int], starts_from_adapter: bool
) -> Published | None:
    """The paper's line for a run; of a task that it starts from MNLI's adapter only with the same start."""
    if method == MNLI_START:
        if ranks != [LORA_RANKS.get(model)]:
            return None
        if starts_from_adapter != (task in FROM_MNLI):
            method = None if starts_from_adapter else NO_START
    return next((line for line in PAPER if (line.model, line.method) == (model, method) and task in line.figures), None)


def compare_runs(runs: list[Run]) -> list[Run]:
    """The runs with what only their comparison shows: names of models, and the paper's line they belong to.

    Two base models can share a name; their fingerprints are then added. roberta-large has two LoRA lines in the paper,
    with and without MNLI's adapter as the start of three tasks: the runs on those tasks decide.
    """
    bases = {(run.model, run.base) for run in runs}
    ambiguous = {model for model, _ in bases if sum(name == model for name, _ in bases) > 1}
    starts = {(r.model, r.base, r.method, r.paper.method) for r in runs if r.paper and r.task in FROM_MNLI}
    compared = []
    for run in runs:
        key, paper = (run.model, run.base, run.method), run.paper
        if paper and paper.method == MNLI_START and (*key, NO_START) in starts and (*key, MNLI_START) not in starts:
            paper = next(line for line in PAPER if (line.model, line.method) == (paper.model, NO_START))
        model = f"{run.model}@{(run.base or 'unknown')[:8]}" if run.model in ambiguous else run.model
        compared.append(replace(run, model=model, paper=paper))
    return compared


def differences(settings_of_runs: Sequence[tuple[tuple[str, str], ...]]) -> dict[tuple[tuple[str, str], ...], str]:
    """For each run's settings a text of the values that are not the same in all."""
    by_name = {settings: dict(settings) for settings in settings_of_runs}
    names = dict.fromkeys(name for settings in by_name for name, _ in settings)
    differing = [name for name in names if len({values.get(name) for values in by_name.values()}) > 1]
    return {
        settings: ", ".join(f"{name} {values.get(name, 'not recorded')}" for name in differing)
        for settings, values in by_name.items()
    }
