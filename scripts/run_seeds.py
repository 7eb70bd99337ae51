"""The scheduler behind run_seeds.sh, which says how to call it."""

import argparse
import difflib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_nlu import report
from lora_nlu.errors import UsageError, UserError
from lora_nlu.tasks import TASKS

ROOT = Path(__file__).parents[1]
MARK = "run_seeds: "  # begins the line of a log that says with which flags a start was made
OWN = ("--output_dir", "--gradient_accumulation_steps", "--glue_dir", "--lora_path")  # where, not what


@dataclass
class Run:
    """One start of one script: its flags, its folder, and how it is going."""

    script: Path
    flags: list[str]
    folder: Path
    name: str
    needs: "Run | None" = None  # the MNLI run whose adapter this one starts from
    state: str = "waiting"  # or running, done, failed
    process: Any = None
    log: IO | None = None
    slot: str | None = None
    seconds: float = 0.0
    asked: list[str] = field(default_factory=list)

    @property
    def log_path(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def environment(self, **settings: str) -> dict[str, str]:
        env = {**os.environ, **settings, "output_dir": str(self.folder)}
        return env | ({"MNLI_LORA": str(self.needs.folder)} if self.needs else {})

    def command(self) -> list[str]:
        return ["bash", str(self.script), *self.flags]

    def ask(self) -> None:
        """Let the script say what it would run. Raises UserError with its own words if it refuses."""
        env = self.environment(DRY_RUN="1", devices=os.environ.get("devices", "1"))
        if self.needs:
            env["MNLI_LORA"] = "none"  # it may not have run yet
        done = subprocess.run(self.command(), env=env, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip())
        words = shlex.split(done.stdout.replace("\\\n", " "))
        words = words[next(i for i, word in enumerate(words) if word.endswith("run_glue.py")) + 1 :]
        groups: list[list[str]] = []
        for word in words:
            if word.startswith("--") or not groups:
                groups.append([])
            groups[-1].append(word)
        self.asked = [shlex.join(group) for group in groups if group[0] not in OWN]

    def is_done(self) -> bool:
        """Whether a finished run is in the folder. Raises UserError if it was made with other flags."""
        record = read(self.folder / "run.json")
        files = {"--do_eval": "eval_results.json", "--do_predict": "predict_results_*.tsv"}
        wanted = [pattern for flag, pattern in files.items() if flag in self.asked]
        if not record.get("trained") or not all(any(self.folder.glob(pattern)) for pattern in wanted):
            return False
        marks = [line for line in tail(self.log_path, 10**7) if line.startswith(MARK)]
        if marks and (before := json.loads(marks[-1].removeprefix(MARK))) != self.asked:
            changes = [line for line in difflib.ndiff(before, self.asked) if line[0] in "+-"]
            raise UserError(
                f"{self.folder} holds a finished run with other flags: {', '.join(changes)}.\n"
                "Choose another --output_dir, or remove that folder."
            )
        return True

    def start(self, slot: str | None, settings: dict[str, str]) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.log_path.open("a", encoding="utf-8")
        self.log.write(MARK + json.dumps(self.asked) + "\n")
        self.log.flush()
        self.slot, self.state, self.seconds = slot, "running", time.monotonic()
        # A session of its own: Ctrl-C reaches this program alone, which passes it on once.
        self.process = subprocess.Popen(
            self.command(), env=self.environment(**settings), stdin=subprocess.DEVNULL, stdout=self.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def finished(self) -> bool:
        if self.process.poll() is None:
            return False
        assert self.log is not None
        self.log.close()
        self.seconds = time.monotonic() - self.seconds
        self.state = "done" if self.process.returncode == 0 else "failed"
        return True

    def progress(self) -> str:
        found = re.findall(r"'epoch': '?([\d.]+)", "".join(tail(self.log_path, 20_000)))
        return f"{self.name} at epoch {found[-1]}" if found else f"{self.name} starting"

    def outcome(self) -> str:
        if self.state == "failed":
            last = [line for line in tail(self.log_path, 4000) if line.strip()][-4:]
            return "\n".join(
                [f"{self.name} failed with status {self.process.returncode}; {self.log_path} ends:", *last]
            )
        task = TASKS.get(read(self.folder / "run.json").get("task", ""))
        score = read(self.folder / "eval_results.json").get(f"eval_{task.metrics[0]}") if task else None
        return self.name + (f": {task.metrics[0]} {score:.4f}" if task and score is not None else "")


def read(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def tail(path: Path, size: int) -> list[str]:
    """The lines of a file's last `size` bytes."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")


def parse(argv: list[str]) -> tuple[list[Run], argparse.Namespace]:
    """The runs that the command line asks for, seed by seed, and the other settings."""
    cut = argv.index("--") if "--" in argv else len(argv)
    extra = argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="run_seeds.sh", description="Run scripts over seeds.", allow_abbrev=False)
    parser.add_argument("what", nargs="+", metavar="SCRIPT... [COUNT]", help="launch scripts, then how many seeds")
    parser.add_argument("--seeds", help="which seeds, such as 0,1,2; default: 0 to COUNT - 1, and COUNT is 5")
    parser.add_argument("--grid", nargs="+", action="append", default=[], metavar=("FLAG", "VALUE"),
                        help="run with each value of a flag; several grids are combined")  # fmt: skip
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, one without")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "seeds")
    args = parser.parse_intermixed_args(argv[:cut])
    scripts = [Path(word) for word in args.what if not word.isdecimal()]
    counts = [int(word) for word in args.what if word.isdecimal()]
    if missing := [path for path in scripts if not path.is_file()]:
        parser.error(f"{missing[0]}: no such script.")
    if not scripts or len(counts) > 1 or (counts and args.seeds) or 0 in counts or (args.jobs or 1) < 1:
        parser.error("give scripts, then one count of seeds or --seeds; --jobs is 1 or more.")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else range(counts[0] if counts else 5)
    except ValueError:
        parser.error(f"--seeds {args.seeds}: numbers with commas, such as 0,1,2.")
    if any(len(grid) < 2 for grid in args.grid):
        parser.error("--grid needs a flag and its values.")
    if any(word.split("=")[0] in ("--seed", "--output_dir") for word in extra):
        parser.error("--seed and --output_dir are set by run_seeds.sh itself: see --seeds and --output_dir.")
    return list(make_runs(scripts, list(seeds), args.grid, extra, args.output_dir.absolute())), args


def make_runs(
    scripts: list[Path], seeds: list[int], grids: list[list[str]], extra: list[str], output: Path
) -> Iterator[Run]:
    flags = [grid[0].removeprefix("--") for grid in grids]
    made: dict[Path, Run] = {}
    for seed in dict.fromkeys(seeds):
        # an MNLI script first: others may start from its adapter
        for script in sorted(dict.fromkeys(scripts), key=lambda path: not path.stem.endswith("_mnli")):
            for values in itertools.product(*(grid[1:] for grid in grids)):
                pairs = list(zip(flags, values, strict=True))
                name = Path(script.stem, *["-".join(f"{flag}_{value}" for flag, value in pairs)] * bool(pairs))
                name /= f"seed_{seed}"
                run = Run(
                    script,
                    [*extra, *(w for flag, value in pairs for w in (f"--{flag}", value))],
                    output / name,
                    str(name),
                )
                run.flags += ["--seed", str(seed)]
                found = re.search(r"^needs_mnli (\S+)", script.read_text(), flags=re.MULTILINE)
                if found and "MNLI_LORA" not in os.environ:
                    mnli = output / found[1] / f"seed_{seed}"
                    run.needs = made.get(mnli)
                made[run.folder] = run
                yield run


def slots(jobs: int | None) -> tuple[list[str | None], dict[str, str]]:
    """A place for each run at a time, which is a GPU's number or None, and settings for every run."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = min(count, int(os.environ.get("devices", count)))
    if count > 1 and jobs != 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        gpus = visible.split(",")[:count]
        return [gpus[i % count] for i in range(jobs or count)], {"devices": "1"}
    settings = {"devices": str(count)}
    if (jobs or 1) > 1 and not count:  # share the cores
        settings["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (jobs or 1)))
        )
    return [None] * (jobs or 1), settings


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def status(runs: list[Run], since: float, places: int) -> str:
    count = {state: sum(run.state == state for run in runs) for state in ("done", "failed", "waiting")}
    running = [run.progress() for run in runs if run.state == "running"]
    timed = [run.seconds for run in runs if run.state == "done" and run.process]
    left = count["waiting"] + len(running) / 2  # those running are half done, more or less
    togo = f", about {clock(sum(timed) / len(timed) * left / places)} to go" if timed else ""
    failed = f", {count['failed']} failed" if count["failed"] else ""
    return f"{count['done']} of {len(runs)} done{failed}; {'; '.join(running)}; {clock(time.monotonic() - since)}{togo}"


def run_all(runs: list[Run], places: list[str | None], settings: dict[str, str]) -> None:
    """Start runs as places become free, until none is left; on an interruption pass it on and wait."""
    free, since, live = list(places), time.monotonic(), sys.stderr.isatty()
    erase = "\r\x1b[K" if live else ""
    try:
        while any(run.state in ("waiting", "running") for run in runs):
            for run in runs:
                if run.state == "running" and run.finished():
                    free.append(run.slot)
                    print(f"{erase}{run.outcome()} ({clock(run.seconds)})", file=sys.stderr)
                    print(status(runs, since, len(places)), file=sys.stderr)
                if run.state == "waiting" and run.needs and run.needs.state == "failed":
                    run.state = "failed"
                    print(f"{erase}{run.name} can't start: it needs {run.needs.name}", file=sys.stderr)
                if run.state == "waiting" and free and (run.needs is None or run.needs.state == "done"):
                    slot = free.pop(0)
                    run.start(slot, settings | ({"CUDA_VISIBLE_DEVICES": slot} if slot is not None else {}))
            if live:
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                print(erase + status(runs, since, len(places))[: width - 1], end="", file=sys.stderr, flush=True)
            time.sleep(0.5)
    finally:
        running = [run for run in runs if run.state == "running"]
        for run in running:
            os.killpg(run.process.pid, signal.SIGINT)
        for run in running:
            run.process.wait()


def main(argv: list[str]) -> int:
    runs, args = parse(argv)
    for run in runs:
        run.ask()
    for run in runs:
        if run.is_done():
            run.state = "done"
    done = sum(run.state == "done" for run in runs)
    if done:
        print(f"{done} of {len(runs)} are done already", file=sys.stderr)
    if done < len(runs):
        places, settings = slots(args.jobs)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run_all(runs, places, settings)
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from the last checkpoints.", file=sys.stderr)
            return 130
    code = report.main([*(str(run.folder) for run in runs), "--out", str(args.output_dir / "report")])
    return code or int(any(run.state == "failed" for run in runs))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, UsageError) as e:
        print(f"run_seeds.sh: error: {e}", file=sys.stderr)
        sys.exit(2)
