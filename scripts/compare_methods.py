"""The program behind compare_methods.sh, which shows how to call it."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

from run_seeds import ROOT, Run, catch_interrupts, read, run_all, run_program, slots

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError
from lora_nlu.report.__main__ import main as report
from lora_nlu.report.records import Figures, read_figures, read_folders
from lora_nlu.report.tables import clock
from lora_nlu.training import launch

KEPT_OUT = "--validation_from_train"
REFUSED = dict.fromkeys(("--task_name", "--learning_rate", "--seed", "--output_dir"), "is set for each run") | {
    "--max_eval_samples": "would score a part of a set",
    "--load_best_model_at_end": "would choose an epoch on the set that is reported",
    "--early_stopping_patience": "would choose an epoch on the set that is reported",
}
FORMS = {
    "every run": "FLAGS", "choosing": "FLAGS", "final": "FLAGS", "seeds": "LEAST, MOST and POINTS",
    "task": "NAME and FLAGS", "method": "NAME, RATES and FLAGS",
}  # fmt: skip
STARTUP_SECONDS = 10.0  # of a run beside its training, until one was measured
SPEED_STEPS = 20


@dataclass
class Method:
    """A row of the table: a method with its settings, and the learning rates to try."""

    name: str
    rates: list[str]
    flags: list[str]


@dataclass
class Plan:
    """What the table says.

    flags:  by kind of row, "every run", "choosing" or "final".
    seeds:  how many a method gets at least, and at most.
    points: a method gets the most seeds on a task if its median is within so many percent of the first method's.
    """

    flags: dict[str, list[str]] = field(default_factory=lambda: {"every run": [], "choosing": [], "final": []})
    seeds: tuple[int, int] = (3, 5)
    points: float = 2.0
    tasks: dict[str, list[str]] = field(default_factory=dict)
    methods: list[Method] = field(default_factory=list)


def read_plan(path: Path) -> Plan:
    """The plan in a table. Raises UserError with file and line."""
    plan = Plan()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # utf-8-sig: some editors begin a file with a mark
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: no table of methods ({e}).") from e
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#"):
            try:
                add_row(plan, [cell.strip() for cell in line.split("\t")])
            except (UserError, ValueError) as e:
                raise UserError(f"{path}:{number}: {e}") from e
    if not plan.tasks or not plan.methods:
        raise UserError(f"{path}: needs a row `task` and a row `method`, with tabs between the columns.")
    if not any(launch.is_flag(flag, KEPT_OUT) for flag in plan.flags["choosing"]):
        text = f"{path}: rates would be chosen on the set that is reported."
        raise UserError(f"{text} Add a row: choosing<tab>{KEPT_OUT} 1000")
    return plan


def add_row(plan: Plan, cells: list[str]) -> None:
    """Add a row of the table to the plan. Raises ValueError or UserError."""
    kind, *values = [cell for cell in cells if cell]
    if odd := [c for cell in cells for c in cell if not c.isprintable()]:  # also spaces that shlex takes for letters
        raise ValueError(f"has the character {ascii(odd[0])}: remove it, or type a space.")
    if kind not in FORMS:
        raise ValueError(f"{kind!r} begins no row: {', '.join(FORMS)}. Columns have tabs between them.")
    texts = {"task": 2, "method": 3, "seeds": 3}.get(kind, 1)
    if not texts - (kind in ("task", "method")) <= len(values) <= texts:
        raise ValueError(f"after {kind!r}, and with tabs between them, come {FORMS[kind]}; here are {len(values)}.")
    text = "" if kind == "seeds" else "".join(values[texts - 1 :])
    flags = [word.replace("{root}", str(ROOT)) for word in shlex.split(text)]
    if refusal := refused(flags):
        raise ValueError(refusal)
    if kind != "choosing" and any(launch.is_flag(flag, KEPT_OUT) for flag in flags):
        raise ValueError(f"{KEPT_OUT} is for the row `choosing`: what is reported is on the validation set.")
    if kind in plan.flags:
        plan.flags[kind] += flags
    elif kind == "seeds":
        least, most = (launch.whole_number("seeds", value, 1) for value in values[:2])
        if most < least:
            raise ValueError(f"seeds {least} {most}: the second is below the first.")
        if not 0 <= to_number(values[2]) < math.inf:
            raise ValueError(f"{values[2]!r}: POINTS is a number, 0 or more.")
        plan.seeds, plan.points = (least, most), to_number(values[2])
    elif kind == "task":
        if values[0] not in TASKS or values[0] in plan.tasks:
            raise ValueError(f"{values[0]!r}: is no GLUE task, or listed before.")
        plan.tasks[values[0]] = flags
    else:
        name, rates = values[0], values[1].split()
        if any(slug(name).casefold() == slug(method.name).casefold() for method in plan.methods):
            raise ValueError(f"{name!r}: listed before, or under a name that gives the same folder.")
        if len(slug(name).encode()) > 200:
            raise ValueError(f"{name[:40]!r}...: too long for the name of a folder.")
        if not all(0 < to_number(rate) < math.inf for rate in rates):
            raise ValueError(f"{values[1]!r}: RATES are numbers above 0, with spaces between them.")
        if len({to_number(rate) for rate in rates}) < len(rates):
            raise ValueError(f"{values[1]!r}: a rate is listed twice.")
        plan.methods.append(Method(name, rates, flags))


def refused(flags: Sequence[str]) -> str:
    """Why a comparison's runs can't have one of these flags; "" if they can."""
    texts = [f"{flag} {why}: leave it out." for flag, why in REFUSED.items() for f in flags if launch.is_flag(f, flag)]
    return "".join(texts[:1])


def to_number(text: str) -> float:
    """The number that a text is; nan if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def slug(name: str) -> str:
    """A method's name as a folder's."""
    return re.sub(r"^\.+|([^\w.=+-]|_)+", "_", name)


@dataclass
class MethodRun(Run):
    """A run of a method on a task at a rate."""

    stage: str = ""  # speed, choosing or final
    task: str = ""
    method: str = ""
    rate: str = ""

    def has_diverged(self) -> bool:
        return bool((figures := self.figures()) and figures.diverged)

    def has_ended(self) -> bool:
        """Whether nothing is left to do. Raises UserError if it was made with other flags."""
        return self.is_done() or (self.has_diverged() and self.logged_flags() == self.recorded_flags)

    def figures(self) -> Figures | None:
        """What its folder has; None if that is no run on its task. Raises UserError for a damaged one."""
        records, _ = read_folders(self.folder) if self.folder.is_dir() else ([], [])
        return read_figures(records[0]) if records and records[0].run.get("task") == self.task else None

    def figure(self) -> float | None:
        """Its task's first metric, in percent; None without one."""
        figures = self.figures()
        return None if figures is None or figures.last is None or figures.diverged else 100 * figures.last

    def has_failed(self) -> bool:
        """Whether it has to be tried again."""
        return self.figure() is None and not self.has_diverged()


@dataclass
class Comparison:
    """The runs of a plan, made as their results call for them."""

    plan: Plan
    extra: list[str]  # flags for every run
    output: Path
    script: launch.Script
    words: list[str]  # that start the script

    def run(self, stage: str, task: str, method: Method, rate: str, seed: int) -> MethodRun:
        kind = "choosing" if stage == "speed" else stage  # neither reads the set that is reported
        flags = [*self.plan.flags["every run"], *self.plan.flags[kind], *self.plan.tasks[task], *method.flags]
        flags += [*self.extra, "--task_name", task, "--learning_rate", rate, "--seed", str(seed)]
        if stage == "speed":
            flags += ["--max_steps", str(SPEED_STEPS), "--save_strategy", "no", "--max_eval_samples", "64"]
        elif stage == "final":
            flags += ["--write_eval_predictions"]
        name = Path(stage, task, slug(method.name), rate, f"seed_{seed}")
        run = MethodRun(self.words, self.script, flags, self.output / name, str(name))
        run.stage, run.task, run.method, run.rate = stage, task, method.name, rate
        run.plan()
        if run.has_ended():
            run.state = "done"
        return run

    def speed_runs(self) -> list[MethodRun]:
        """A few steps on each task, which tell how long the plan takes."""
        first = self.plan.methods[0]
        return [self.run("speed", task, first, first.rates[0], 0) for task in self.plan.tasks]

    def choosing_runs(self) -> list[MethodRun]:
        places = [(task, method) for task in self.plan.tasks for method in self.plan.methods]
        return [self.run("choosing", task, m, rate, 0) for task, m in places if len(m.rates) > 1 for rate in m.rates]

    def chosen_rates(self, runs: Sequence[MethodRun]) -> dict[tuple[str, str], str]:
        """The best rate by (task, method); of equal figures the one with the lower loss.

        Until a model tells the classes apart its Matthews correlation is 0 at every rate, but its loss falls. There is
        no rate where all diverged, or where one failed: that has to be tried again.
        """
        best: dict[tuple[str, str], tuple[float, float, float, str]] = {}
        failed = {(run.task, run.method) for run in runs if run.has_failed()}
        for run in runs:
            place = run.task, run.method
            if place not in failed and (figure := run.figure()) is not None:
                loss = read(run.folder / "eval_results.json").get("eval_loss", 0.0)
                ranked = figure, -loss, -float(run.rate), run.rate
                best[place] = max(best.get(place, ranked), ranked)
        only = {(task, m.name): m.rates[0] for m in self.plan.methods if len(m.rates) == 1 for task in self.plan.tasks}
        return only | {place: rate for place, (*_, rate) in best.items()}

    def final_runs(self, rates: dict[tuple[str, str], str], seeds: range) -> list[MethodRun]:
        """The runs at the chosen rates, seed by seed."""
        places = [(task, m) for task in self.plan.tasks for m in self.plan.methods if (task, m.name) in rates]
        return [self.run("final", task, m, rates[task, m.name], seed) for seed in seeds for task, m in places]

    def near(self, runs: Sequence[MethodRun]) -> set[tuple[str, str]]:
        """The (task, method) whose median is within the plan's points of the first method's, itself among them."""
        figures: dict[tuple[str, str], list[float]] = {}
        for run in runs:
            if (figure := run.figure()) is not None:
                figures.setdefault((run.task, run.method), []).append(figure)
        first = self.plan.methods[0].name
        medians = {place: median(of_place) for place, of_place in figures.items()}
        return {
            (t, m) for (t, m), x in medians.items() if abs(x - medians.get((t, first), math.nan)) <= self.plan.points
        }


class Times:
    """How long runs take, from the tokens a second of those that have ended."""

    def __init__(self, speed_runs: Sequence[MethodRun]) -> None:
        self.first = {run.task: run for run in speed_runs}
        self.of_task: dict[str, tuple[float, int, int]] = {}  # tokens an example, training rows, examples a step
        self.waiting: list[MethodRun] = []  # of later stages
        self.measured: set[Path] = set()
        self.speeds: dict[str, list[float]] = {}  # tokens a second, by method
        self.beside: list[float] = []  # seconds of a run beside its training

    def measure(self, runs: Iterable[MethodRun]) -> None:
        for run in (run for run in runs if run.state == "done" and run.folder not in self.measured):
            self.measured.add(run.folder)
            result = read(run.folder / "train_results.json")
            tokens, seconds = result.get("num_input_tokens_seen"), result.get("train_seconds")
            if tokens and seconds:
                self.speeds.setdefault(run.method, []).append(tokens / seconds)
                self.beside += [run.seconds - seconds] if run.process else []

    def seconds_to_go(self, runs: Sequence[MethodRun]) -> float | None:
        """Of those of the runs that have not ended, and of `waiting`; None before a speed is known.

        A running one is taken to be half done.
        """
        self.measure([*self.first.values(), *runs])
        if not self.speeds:
            return None
        of_method = {method: median(found) for method, found in self.speeds.items()}
        beside = mean(self.beside) if self.beside else STARTUP_SECONDS
        total = 0.0
        for run in [*runs, *self.waiting]:
            if run.state in ("waiting", "running"):
                speed = of_method.get(run.method, median(of_method.values()))
                seconds = self.tokens(run) / speed + beside
                total += seconds / 2 if run.state == "running" else seconds
        return total

    def tokens(self, run: MethodRun) -> float:
        """About how many tokens a run trains on: its examples, as long as those of its task's first steps.

        0 before these steps have ended.
        """
        if run.task not in self.of_task:
            first = self.first[run.task]
            hyper = read(first.folder / "run.json").get("hyperparameters")
            tokens = read(first.folder / "train_results.json").get("num_input_tokens_seen")
            if first.state != "done" or not hyper or not tokens:
                return 0.0
            batch = hyper["examples_a_step"]
            self.of_task[run.task] = tokens / (SPEED_STEPS * batch), hyper["train_samples"], batch
        length, rows, batch = self.of_task[run.task]
        steps = int(launch.last_value(run.flags, "--max_steps") or 0)
        epochs = float(launch.last_value(run.flags, "--num_train_epochs") or 3)
        return length * (steps * batch or rows * epochs)


def parse(argv: list[str]) -> tuple[Comparison, argparse.Namespace]:
    own_count = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="compare_methods.sh", allow_abbrev=False, add_help=False,
                                     usage="%(prog)s [TABLE] [options] [-- FLAGS FOR EVERY RUN]")  # fmt: skip
    parser.add_argument("table", nargs="?", type=Path, default=ROOT / "scripts" / "compare_methods.tsv")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--output_dir", type=Path, default=os.environ.get("output_dir") or ROOT / "output" / "methods")
    args = parser.parse_args(argv[:own_count])
    if args.jobs is not None and args.jobs < 1:
        parser.error("--jobs is 1 or more.")
    extra = argv[own_count + 1 :]
    if refusal := refused(extra):
        parser.error(refusal)
    if any(launch.is_flag(flag, KEPT_OUT) for flag in extra):
        parser.error(f"{KEPT_OUT} is for the table's row `choosing`: leave it out.")
    words = [str(ROOT / "scripts" / "one_run.sh")]
    script = launch.read_script(words, os.environ)
    return Comparison(read_plan(args.table), extra, args.output_dir.absolute(), script, words), args


def plan_text(comparison: Comparison, choosing: Sequence[MethodRun], final: int, most: int, seconds: float) -> str:
    """What will run, in lines; final, most: the numbers of final runs, at least and at most."""
    plan = comparison.plan
    least, highest = plan.seeds
    first = plan.methods[0].name
    lines = [
        f"{len(plan.methods)} methods on {', '.join(TASKS[task].title for task in plan.tasks)}, compared with {first}",
        f"choosing: {len(choosing)} runs, every learning rate with one seed, scored on rows kept out of training",
        f"final: {final} runs, the best rates with {least} seed{'s' * (least > 1)}, scored on the validation set",
    ]
    if most > final:
        lines[-1] += (
            f"; up to {most - final} more, for {highest} seeds of what is within {plan.points:g} points of {first}"
        )
    left = f"about {clock(seconds)} for what is left of these, from measured tokens a second"
    return "\n".join([*lines, f"{left}; so is the time to go below"])


def run_stage(runs: Sequence[MethodRun], times: Times, args: argparse.Namespace) -> None:
    """Run what has not ended. Raises KeyboardInterrupt after a signal."""
    if any(run.state == "waiting" for run in runs):
        with catch_interrupts() as interrupts:
            run_all(runs, *slots(args.jobs), interrupts, lambda: times.seconds_to_go(runs))
        if interrupts:
            raise KeyboardInterrupt


def say_chosen(comparison: Comparison, runs: Sequence[MethodRun], rates: dict[tuple[str, str], str]) -> Iterator[str]:
    """A line for each method and task: its rate, and what a reader should know of the choice."""
    for task, method in ((task, method.name) for task in comparison.plan.tasks for method in comparison.plan.methods):
        tried = {run.rate: run for run in runs if (run.task, run.method) == (task, method)}
        rate, place = rates.get((task, method)), f"{method} on {TASKS[task].title}"
        if not tried:
            yield f"{place}: {rate}, the only rate"
            continue
        ordered = sorted(tried, key=float)
        notes = [
            f"{x} {'diverged' if run.has_diverged() else 'failed'}" for x, run in tried.items() if run.figure() is None
        ]
        if rate in (ordered[0], ordered[-1]):
            side = "lowest" if rate == ordered[0] else "highest"
            notes.append(f"the {side} that was tried: a {side[:-3]}er one may be better")
        yield "; ".join([f"{place}: {rate} ({tried[rate].figure():.1f})" if rate else f"{place}: no rate", *notes])


def main(argv: list[str]) -> int:
    comparison, args = parse(argv)
    plan = comparison.plan
    speed, choosing = comparison.speed_runs(), comparison.choosing_runs()
    if launch.is_dry_run(os.environ):
        print(*(run.plan() for run in choosing), sep="\n")
        return 0
    times = Times(speed)
    print(f"{SPEED_STEPS} steps of {plan.methods[0].name} on each task, to tell how long all takes", file=sys.stderr)
    run_stage(speed, times, args)
    if all(run.state == "failed" for run in speed):
        raise UserError("these steps failed on every task: nothing else is started.")
    least, most = plan.seeds
    guess = {(task, method.name): method.rates[0] for task in plan.tasks for method in plan.methods}
    times.waiting = comparison.final_runs(guess, range(least))
    seconds = (times.seconds_to_go(choosing) or 0) / len(slots(args.jobs)[0])
    print(plan_text(comparison, choosing, len(guess) * least, len(guess) * most, seconds), file=sys.stderr)

    run_stage(choosing, times, args)
    rates = comparison.chosen_rates(choosing)
    print("Chosen learning rates, and the metric on the rows kept out of training:", file=sys.stderr)
    print(*(f"  {line}" for line in say_chosen(comparison, choosing, rates)), sep="\n", file=sys.stderr)
    times.waiting = []
    final = comparison.final_runs(rates, range(least))
    run_stage(final, times, args)
    near = comparison.near(final)
    more = comparison.final_runs({place: rate for place, rate in rates.items() if place in near}, range(least, most))
    run_stage(more, times, args)

    runs = [*choosing, *final, *more]
    if failed := [run.name for run in runs if run.has_failed()]:
        print(f"Failed: {', '.join(failed)}. The same command tries again.", file=sys.stderr)
    folders = [str(run.folder) for run in runs if (run.folder / "run.json").is_file()]
    settings = ["--reference", reference(comparison, final), "--out", str(comparison.output / "report")]
    return report(["methods", *folders, *settings]) or int(bool(failed))


def reference(comparison: Comparison, final: Sequence[MethodRun]) -> str:
    """The folder of a run of the method that the others are compared with. Raises UserError if none has ended."""
    first = comparison.plan.methods[0].name
    for run in (run for run in final if run.method == first and run.figure() is not None):
        return str(run.folder)
    raise UserError(f"no run of {first} at a chosen rate has ended: nothing can be compared with it.")


if __name__ == "__main__":
    run_program("compare_methods.sh", main)
