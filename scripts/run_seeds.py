"""The scheduler behind run_seeds.sh, which shows how to call it."""

import argparse
import difflib
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, NoReturn

from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError
from lora_nlu.report.__main__ import main as report
from lora_nlu.report.tables import clock
from lora_nlu.training import launch

ROOT = Path(__file__).parents[1]
MARK = "run_seeds: "  # begins the line of a log that records the flags of a start
LOCATIONS = ("--output_dir", "--glue_dir")  # may differ between two starts of the same run


@dataclass
class Run:
    """One run of a launch script: its flags, its folder and its state."""

    words: list[str]  # of the command line: the script, and the task if it takes one
    script: launch.Script
    flags: list[str]  # added to the script's
    folder: Path
    name: str
    mnli: Path | None = None  # the MNLI run whose adapter this one starts from
    needs: "Run | None" = None  # the same, if it is one of this command's runs
    state: str = "waiting"  # or running, done, failed, stopped
    process: Any = None
    slot: str | None = None
    seconds: float = 0.0
    recorded_flags: list[str] = field(default_factory=list)  # one text a flag with its values
    signals: list[int] = field(default_factory=list)  # sent to it

    @property
    def log_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def environment(self, **settings: str) -> dict[str, str]:
        env = {**os.environ, **settings, "output_dir": str(self.folder)}
        return env | ({"MNLI_LORA": str(self.mnli)} if self.mnli else {})

    def plan(self) -> launch.Command:
        """The command of this run on one device. Raises UserError if launch.sh would refuse it."""
        start = ["--lora_path", str(self.mnli)] if self.mnli else []  # a flag: the adapter need not exist yet
        script = replace(self.script, flags=[*self.script.flags, *self.flags, *start])
        try:
            command = launch.plan(script, self.environment(devices="1"))
        except UserError as error:
            raise UserError(f"{script.name}: {error}") from error
        flags = [flag for flag in launch.flags_with_values(command.flags) if flag[0] not in LOCATIONS]
        # the adapter's path is a location too; that the run starts from one is not
        flags = [flag[:1] if flag[0] == "--lora_path" else launch.hide_tokens(flag) for flag in flags]
        self.recorded_flags = [*map(shlex.join, flags)]
        return command

    def is_done(self) -> bool:
        """Whether the folder has the finished run. Raises UserError if it was made with other flags."""
        files = {"--do_eval": "eval_results.json", "--do_predict": "predict_results_*.tsv"}
        patterns = [pattern for flag, pattern in files.items() if flag in self.recorded_flags]
        if not read(self.folder / "run.json").get("trained") or not all(any(self.folder.glob(p)) for p in patterns):
            return False
        if (earlier_flags := self.logged_flags()) is None:
            print(f"{self.name} is finished, with which flags is not known: {self.log_path} has none", file=sys.stderr)
        elif earlier_flags != self.recorded_flags:
            changes = [line for line in difflib.ndiff(earlier_flags, self.recorded_flags) if line[0] in "+-"]
            raise UserError(
                f"{self.folder} holds a finished run with other flags: {', '.join(changes)}.\n"
                "Choose another --output_dir, or remove that folder."
            )
        return True

    def logged_flags(self) -> list[str] | None:
        """The flags of its last start; None if its log has none."""
        if not self.log_path.is_file():
            return None
        with self.log_path.open(encoding="utf-8", errors="replace", newline="\n") as log:
            marks = [line.removeprefix(MARK) for line in log if line.startswith(MARK)]
        marks = [mark for mark in marks if mark.endswith("]\n")]  # a process that is killed leaves a part of it, no run
        return [shlex.join(launch.hide_tokens(shlex.split(flag))) for flag in json.loads(marks[-1])] if marks else None

    def start(self, slot: str | None, settings: dict[str, str]) -> None:
        """Start the script, its output in the log, unless another process has finished it since this one looked.

        Raises UserError while another process writes to the log, OSError with the log's path for what the system
        refuses.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if self.log_path.is_symlink():
                raise UserError(f"{self.log_path} is a link, and a log is written only in place. Remove the link.")
            with open(self.log_path, "a", encoding="utf-8", opener=open_no_link) as log:
                self.start_with_log(log, slot, settings)
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.log_path)) from e

    def start_with_log(self, log: Any, slot: str | None, settings: dict[str, str]) -> None:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run inherits it, and may outlive this process
        except BlockingIOError as e:
            raise UserError(f"another command is running it, see {self.log_path}") from e
        if self.is_done():
            self.state = "done"
            return
        # an interrupted run may have left half a line
        log.write("\n" * bool(log.tell()) + MARK + json.dumps(self.recorded_flags) + "\n")
        log.flush()
        # A session of its own: Ctrl-C reaches only this program, which passes it on once.
        command, env = ["bash", *self.words, *self.flags], self.environment(**settings)
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **streams)
        self.slot, self.state, self.seconds = slot, "running", time.monotonic()

    def finished(self) -> bool:
        if self.process.poll() is None:
            return False
        self.seconds = time.monotonic() - self.seconds
        self.state = "done" if self.process.returncode == 0 else "stopped" if self.signals else "failed"
        return True

    def send(self, number: int) -> None:
        """Send a signal to all of its processes, once."""
        if number not in self.signals:
            self.signals.append(number)
            os.killpg(self.process.pid, number)

    def progress(self) -> str:
        epochs = re.findall(r"'epoch': '?([\d.]+)", "".join(tail(self.log_path, 20_000)))
        return f"{self.name} at epoch {epochs[-1]}" if epochs else f"{self.name} starting"

    def outcome(self) -> str:
        if self.state == "stopped":
            return f"{self.name} stopped"
        if self.state == "failed":
            headline = f"{self.name} failed with status {self.process.returncode}; {self.log_path} ends:"
            return "\n".join([headline, *[line for line in tail(self.log_path, 4000) if line.strip()][-4:]])
        task = TASKS.get(read(self.folder / "run.json").get("task", ""))
        score = read(self.folder / "eval_results.json").get(f"eval_{task.metrics[0]}") if task else None
        return self.name + (f": {task.metrics[0]} {score:.4f}" if task and score is not None else "")


def open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none yet, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def tail(path: Path, size: int) -> list[str]:
    """The lines of a file's last `size` bytes."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")


def parse(argv: list[str]) -> tuple[list[Run], argparse.Namespace]:
    """The runs of a command line, which run_seeds.sh --help explains, seed by seed; and its other settings."""
    own_count = argv.index("--") if "--" in argv else len(argv)
    extra = argv[own_count + 1 :]  # for every run
    parser = argparse.ArgumentParser(prog="run_seeds.sh", allow_abbrev=False,
                                     usage="%(prog)s SCRIPT[:TASK]... [COUNT] [options] [-- FLAGS FOR EVERY RUN]",
                                     add_help=False)  # fmt: skip
    parser.add_argument("what", nargs="+", metavar="SCRIPT[:TASK]... [COUNT]")
    parser.add_argument("--seeds")
    parser.add_argument("--grid", nargs="+", action="append", default=[])
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--output_dir", type=Path, default=os.environ.get("output_dir") or ROOT / "output" / "seeds")
    args = parser.parse_intermixed_args(argv[:own_count])
    scripts = [split_task(word) for word in args.what if not word.isdecimal()]
    counts = [int(word) for word in args.what if word.isdecimal()]
    if missing := [path for path, *_ in scripts if not Path(path).is_file()]:
        parser.error(f"{missing[0]}: no such script.")
    if others := [path for path, *_ in scripts if "launch.sh" not in Path(path).read_text()]:  # it could do anything
        parser.error(f"{others[0]}: is no launch script, it doesn't source launch.sh.")
    is_too_small = 0 in counts or (args.jobs is not None and args.jobs < 1)
    if not scripts or len(counts) + (args.seeds is not None) > 1 or is_too_small:
        parser.error("give scripts, then one count of seeds or --seeds; --jobs is 1 or more.")
    seeds = list(map(str, range(counts[0] if counts else 5))) if args.seeds is None else args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        parser.error(f"--seeds {args.seeds}: numbers with commas, such as 0,1,2.")
    if any(len(grid) < 2 for grid in args.grid):
        parser.error("--grid needs a flag and its values.")
    if {"--seed", "--output_dir"} & {word.split("=")[0] for word in (*extra, *(f"--{grid[0]}" for grid in args.grid))}:
        parser.error("--seed and --output_dir are set by run_seeds.sh itself: see --seeds and --output_dir.")
    runs = list(make_runs(scripts, [int(seed) for seed in seeds], args.grid, extra, args.output_dir.absolute()))
    if twice := [run.name for run, other in itertools.combinations(runs, 2) if run.folder == other.folder]:
        parser.error(f"{twice[0]}: listed twice; scripts, seeds and the values of a grid must differ.")
    return runs, args


def split_task(word: str) -> list[str]:
    """SCRIPT:TASK as script and task, SCRIPT alone as it is."""
    path, colon, task = word.rpartition(":")
    return [path, task] if colon and not Path(word).is_file() else [word]


def make_runs(
    scripts: list[list[str]], seeds: list[int], grids: list[list[str]], extra: list[str], output: Path
) -> Iterator[Run]:
    """A run for each seed, script and combination of the grids' values, MNLI first: others start from its adapter."""
    run_of_folder: dict[Path, Run] = {}
    read_scripts = [(words, launch.read_script(words, os.environ)) for words in scripts]
    read_scripts.sort(key=lambda pair: launch.last_value(pair[1].flags, "--task_name") != "mnli")
    combinations = list(itertools.product(*(itertools.product(grid[:1], grid[1:]) for grid in grids)))
    for seed, (words, script), settings in itertools.product(seeds, read_scripts, combinations):
        subfolder = Path("-".join(map("_".join, settings)).replace("/", "_"), f"seed_{seed}")
        flags = [*extra, *(word for flag, value in settings for word in (f"--{flag}", value)), "--seed", str(seed)]
        run = Run(words, script, flags, output / script.name / subfolder, str(Path(script.name, subfolder)))
        run_of_folder[run.folder] = run
        mnli_script = launch.last_value(script.flags, "--needs_mnli")
        if mnli_script and not os.environ.get("MNLI_LORA") and "--lora_path" not in flags:
            mnli = output / mnli_script / subfolder
            run.needs = run_of_folder.get(mnli)
            run.mnli = mnli if run.needs or (mnli / "adapter_model.safetensors").is_file() else None
        yield run


def slots(jobs: int | None) -> tuple[list[str | None], dict[str, str]]:
    """A slot for each run at a time, which is a GPU's number or None, and settings for every run."""
    setting = os.environ.get("devices")
    count = launch.whole_number("devices", setting, 0) if setting else None
    if count != 0:
        available = launch.count_devices(sys.executable)
        count = min(available, count or available)
    if count > 1 and jobs != 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        gpus = visible.split(",")[:count]
        return [gpus[i % count] for i in range(jobs or count)], {"devices": "1"}
    settings = {"devices": str(count)}
    if (jobs or 1) > 1 and not count:  # share the cores
        threads = max(1, (os.cpu_count() or 1) // (jobs or 1))
        settings["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return [None] * (jobs or 1), settings


def status(
    runs: Sequence[Run], start_seconds: float, slot_count: int, seconds_to_go: Callable[[], float | None] | None = None
) -> str:
    """A line: how many runs are done and failed, how far the running ones are, the time so far and about to go.

    seconds_to_go: of all runs one after another, None if unknown; by default from the mean of those that are done.
    """
    count = Counter(run.state for run in runs)
    running = [run.progress() for run in runs if run.state == "running"]
    if seconds_to_go:
        seconds = seconds_to_go()
    else:
        durations = [run.seconds for run in runs if run.state == "done" and run.process]
        runs_to_go = count["waiting"] + len(running) / 2  # on average, running ones are half done
        seconds = mean(durations) * runs_to_go if durations else None
    to_go = "" if seconds is None else f", about {clock(seconds / slot_count)} to go"
    failed = f", {count['failed']} failed" if count["failed"] else ""
    elapsed = clock(time.monotonic() - start_seconds)
    return "; ".join([f"{count['done']} of {len(runs)} done{failed}", *running, elapsed + to_go])


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """The signals to end that this program receives while the context lasts; empty at first."""
    interrupts: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        # A signal that is ignored, as under nohup, stays so, but by a handler: the runs would inherit SIG_IGN
        ignored = handler == signal.SIG_IGN
        signal.signal(number, lambda number, _, ignored=ignored: None if ignored else interrupts.append(number))
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(
    runs: Sequence[Run],
    slots: list[str | None],
    settings: dict[str, str],
    interrupts: list[int],
    seconds_to_go: Callable[[], float | None] | None = None,
) -> None:
    """Start runs as slots become free, until none is left.

    seconds_to_go: as of `status`.

    interrupts: signals received, appended by their handler. After the first no run starts, and the running ones are
    interrupted and waited for; Ctrl-C after it kills them.
    """
    free, start_seconds, is_stopping = list(slots), time.monotonic(), False
    is_terminal = sys.stderr.isatty()
    erase = "\r\x1b[K" if is_terminal else ""

    def show(*lines: str) -> None:
        print(erase + "\n".join(lines), file=sys.stderr, flush=True)

    def line() -> str:
        return status(runs, start_seconds, len(slots), seconds_to_go)

    try:
        while any(run.state == "running" or (run.state == "waiting" and not interrupts) for run in runs):
            if interrupts and not is_stopping:
                is_stopping = True
                show("Stopping the running ones, which may take a moment; Ctrl-C now kills them")
            for run in runs:
                if run.state == "running" and run.finished():
                    free.append(run.slot)
                    show(f"{run.outcome()} ({clock(run.seconds)})", line())
                elif run.state == "running" and interrupts:
                    run.send(signal.SIGKILL if signal.SIGINT in interrupts[1:] else signal.SIGINT)
                if run.state != "waiting" or interrupts:
                    continue
                if run.needs and run.needs.state == "failed":
                    run.state = "failed"
                    show(f"{run.name} can't start: it needs {run.needs.name}")
                elif free and (run.needs is None or run.needs.state == "done"):
                    try:
                        run.start(free[0], settings | ({"CUDA_VISIBLE_DEVICES": free[0]} if free[0] else {}))
                        is_started = run.state == "running"
                        free = free[is_started:]
                        show(f"{run.name} " + (f"starts, log in {run.log_path}" if is_started else "is done already"))
                    except UserError as e:
                        run.state = "failed"
                        show(f"{run.name} can't start: {e}")
            if is_terminal:
                width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                print(erase + line()[: width - 1], end="", file=sys.stderr, flush=True)
            time.sleep(0.1)
        print(erase, end="", file=sys.stderr, flush=True)
    finally:  # no process is left behind after an error
        running = [run for run in runs if run.state == "running"]
        for run in running:
            run.send(signal.SIGINT)
        for run in running:
            run.process.wait()


def run_program(name: str, main: Callable[[list[str]], int]) -> NoReturn:
    """End with the status that `main` returns for the command line, or with its error, after the program's name."""
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, OSError) as e:
        print(f"{name}: error: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, OSError) else 2)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from the last checkpoints.", file=sys.stderr)
        sys.exit(130)


def main(argv: list[str]) -> int:
    runs, args = parse(argv)
    commands = [run.plan() for run in runs]
    if launch.is_dry_run(os.environ):
        print(*commands, sep="\n")
        missing = {note: None for command in commands for note in command.notes if note.startswith(launch.NO_MNLI)}
        print(*(f"run_seeds.sh: {note}\n" for note in missing), sep="", end="", file=sys.stderr)
        return 0
    done = [run for run in runs if run.is_done()]
    for run in done:
        run.state = "done"
    if done:
        print(f"{len(done)} of {len(runs)} are done already", file=sys.stderr)
    if len(done) < len(runs):
        with catch_interrupts() as interrupts:
            run_all(runs, *slots(args.jobs), interrupts)
        if interrupts:
            raise KeyboardInterrupt
    code = report([*(str(run.folder) for run in runs), "--out", str(args.output_dir / "report")])
    if failed := [run.name for run in runs if run.state == "failed"]:
        print(f"Failed: {', '.join(failed)}. The same command tries again.", file=sys.stderr)
    return code or int(bool(failed))


if __name__ == "__main__":
    run_program("run_seeds.sh", main)
