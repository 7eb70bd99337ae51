"""Kill a command, and fill its disk, at every call that changes a file; then the same command must end as if alone.

    nice python tests/stress/every_call.py [--commands train convert_bin] [--cases 20] [--jobs 2] [--work DIR]

Each command runs once under strace, which lists the calls that create, write, rename, link, truncate, sync or remove
something in its folder (outputs, caches, temporary files). For every such call it starts again in a fresh folder, and
there `strace --inject` does one of three things at that call:

    kill   SIGKILL: the call, and all that come after it, never happen
    full   the call fails with ENOSPC, once; not removals, which a full disk allows
    stays  the call fails with ENOSPC, and so does every later write or mkdir of the process

Then: a full disk ends the command with code 1 and a message that names a path, without a traceback (or changes nothing
of its results). The same command, started again, ends with code 0, resumes from the last complete checkpoint, and
leaves the same files with the same bits as a run that nothing happened to; only times and memory may differ.

strace counts the calls of each process by name; after a run its log tells which call was struck. If it was another (the
numbers can shift by a call), the case is run again, three times at most, then listed as missed. Only the calls of the
command's own process can be told apart: a case of `compiler` strikes whichever of g++'s processes first makes as many
writes. Of run_seeds.sh only the scheduler is struck, and its runs are copies of finished ones: `train` strikes a run.
The last line sums up; exit code 1 if anything failed, 77 if there is no strace, 2 if a call was missed.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import forked  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402

import lora_nlu.adapters.__main__  # noqa: E402
import lora_nlu.adapters.converting  # noqa: E402
import lora_nlu.report.__main__  # noqa: E402
from lora_nlu.ops import compiling, kernels  # noqa: E402
from lora_nlu.training.checkpoints import complete_checkpoints  # noqa: E402

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What a disk that stays full refuses, what one call may find full, and all calls that change files
WRITES = "write,writev,pwrite64,sendfile,copy_file_range,fallocate,ftruncate,mkdir,mkdirat".split(",")
FULL = [
    *WRITES,
    *"openat,open,creat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,fsync,fdatasync".split(","),
]
CHANGES = [*FULL, *"truncate,unlink,unlinkat,rmdir,chmod,fchmod,fchmodat".split(",")]
STRIKES = {"kill": CHANGES, "full": FULL, "stays": WRITES}
# Python for the scripts that run_seeds.sh starts; a finished run is copied in the place of run_glue.py
PYTHON = """#!/bin/bash
[[ "$1" == */run_glue.py ]] || exec '{python}' "$@"
folder="$3" seed="${{!#}}"
rm -rf "$folder" "$folder.copy"
cp -r '{runs}'/"seed_$seed" "$folder.copy"
mv "$folder.copy" "$folder"
"""
SECONDS = 300  # a start that takes longer hangs
CALL = re.compile(r"(\d+ +)?(\w+)\((.*)")  # of strace: the process, if it follows several; the call; what follows
RANDOM = re.compile(
    r"(?<=tmp)[a-z0-9_]{8}\b|(?<=\.lora_nlu-)[a-z0-9_]{8}(?=\.)|(?<=\.tmp)[A-Za-z0-9]{6}\b"
    r"|(?<=cc)[A-Za-z0-9]{6}(?=\.)|#\d+|(?<=[.-])\d{3,}\b|[0-9a-f]{8,}"
)
VARIES = re.compile(
    r"runtime|per_second|seconds|elapsed|_time$|peak|trainer_state\.json"
)  # keys of times, memory, a length with both


@dataclass(frozen=True)
class Command:
    """A command, called with a fresh folder: what it writes is there."""

    name: str
    main: Callable[[Path], Any]
    output: str = ""  # the folder of a run in the case's folder: it resumes
    prints: bool = False  # what it prints belongs to its results
    follows: bool = False  # struck are the writes of processes that it starts, not its own calls
    strikes: tuple[str, ...] = (*STRIKES,)


@dataclass(frozen=True)
class Call:
    """A system call that changes a file: its name, which of its process's calls of that name it is, and the paths."""

    name: str
    number: int
    place: str
    is_own: bool  # of the command's own process, not of one that it started
    later: tuple[tuple[str, int], ...]  # the number of the process's next call of each name in WRITES, this included

    def injection(self, strike: str) -> list[str]:
        if strike == "stays":
            return [f"--inject={name}:error=ENOSPC:when={number}+" for name, number in self.later]
        effect = "signal=KILL" if strike == "kill" else "error=ENOSPC"
        return [f"--inject={self.name}:{effect}:when={self.number}"]


# ------------------------------------------------------------------------------------------------------------- commands


def commands(work: Path) -> list[Command]:
    glue, model = forked.prepare(work)
    tiny = [*map(str, forked.flags(glue, model, work, work / "cache", 6, 1)), "--save_total_limit", "2", "--do_predict"]
    # a step too many would show: the sixth is in the middle of an epoch, and none is of learning rate 0
    tiny += ["--per_device_train_batch_size", "4", "--lr_scheduler_type", "constant"]

    def flags(output: Path, cache: Path) -> list[str]:
        replaced = {"--output_dir": str(output), "--cache_dir": str(cache)}
        return [replaced.get(before, word) for before, word in zip(["", *tiny], tiny, strict=False)]

    runs = work / "runs"  # what report and convert read
    for seed in ("0", "1"):
        pid = forked.start([*flags(runs / f"seed_{seed}", work / "cache"), "--seed", seed], work / "log")
        if code := forked.finish(pid):
            raise SystemExit(f"the run that is to be reported ended with {code}: {printed(work / 'log', 'err')}")
    words = [word for before, word in zip(["", *tiny], tiny, strict=False) if "--output_dir" not in (before, word)]
    (work / "tiny_rte.sh").write_text(
        f'tuned_for_gpus=1; source "{SCRIPTS / "launch.sh"}"; launch {shlex.join(words)} "$@"\n'
    )
    (work / "python").write_text(PYTHON.format(python=sys.executable, runs=runs))
    (work / "python").chmod(0o755)

    def convert(to: str) -> Command:
        def main(folder: Path) -> int:
            adapter = str(runs / "seed_0")
            return lora_nlu.adapters.__main__.main(["convert", adapter, str(folder / "converted"), "--to", to])

        return Command(f"convert_{to}", main)

    return [
        Command(
            "train", lambda folder: forked.run_glue([*flags(folder / "output", folder / "cache")]), output="output"
        ),
        Command("compile", compile_kernels, prints=True),
        Command("compiler", compile_kernels, prints=True, follows=True),
        Command("report", lambda f: lora_nlu.report.__main__.main(["runs", str(runs), "--out", str(f / "report")])),
        *(convert(to) for to in ("peft", "bin", "merged")),
        Command("seeds", lambda folder: run_seeds(work, folder / "output", work / "python")),
    ]


def run_seeds(work: Path, output: Path, python: Path) -> None:
    """run_seeds.py with the script that `commands` wrote, in this process."""
    os.environ |= {"PYTHON": str(python), "devices": "0"}
    sys.argv = ["run_seeds.sh", str(work / "tiny_rte.sh"), "2", "--output_dir", str(output)]
    runpy.run_path(str(SCRIPTS / "run_seeds.py"), run_name="__main__")


def compile_kernels(folder: Path) -> None:
    compiling.FLAGS[compiling.FLAGS.index("-O3")] = "-O0"  # in half of the time
    os.environ["HOME"] = str(folder)
    os.environ.pop("XDG_CACHE_HOME", None)
    torch.manual_seed(0)
    dropped = kernels.dropout(torch.ones(64, 64), 0.5, True)
    print(f"compiled: {kernels.library() is not None}, {hashlib.sha256(dropped.numpy().tobytes()).hexdigest()}")


# -------------------------------------------------------------------------------------------------------------- tracing


def traced_calls(trace: Path, folder: Path) -> Iterator[tuple[str, Call, str]]:
    """Process, call and the line of every call in strace's log that changes something in a folder, in order."""
    count: Counter[tuple[str, str]] = Counter()
    first = None
    for line in trace.read_text(errors="replace").splitlines():
        if not (match := CALL.match(line)):
            continue
        process, name, rest = match.groups(default="")
        first = process if first is None else first
        count[process, name] += 1
        rest = re.sub(r"\) += \d+<.*", ")", rest)  # not the result, which a call that is struck does not have
        paths = [at + (f"/{path}" if path else "") for at, path in re.findall(r'<(/[^>]*)>(?:, "([^/"][^"]*)")?', rest)]
        paths += re.findall(r'"(/[^"]*)"', rest)
        inside = [path.removeprefix(f"{folder}/") for path in paths if path.startswith(f"{folder}/")]
        opens = name in ("open", "openat") and not re.search("O_CREAT|O_TRUNC|O_TMPFILE", rest)
        if not inside or opens or re.search(r"\) += -1 E(?!.*INJECTED)", rest):
            continue
        place = " ".join(RANDOM.sub("*", path) for path in dict.fromkeys(inside))
        later = tuple((w, count[process, w] + (w != name)) for w in WRITES)
        yield process, Call(name, count[process, name], place, process == first, later), line


def struck(trace: Path, folder: Path) -> list[str]:
    """Name and place of the calls in a folder at which strace killed a process or injected an error."""
    found, last = [], {}
    for process, call, line in traced_calls(trace, folder):
        last[process] = call
        if "(INJECTED)" in line:
            found.append(f"{call.name} {call.place}")
    text = trace.read_text(errors="replace")
    for process, call in last.items():
        lines = [line for line in text.splitlines() if line.startswith(process)]
        killed = lines[-1].endswith("+++ killed by SIGKILL +++")
        if killed and re.search(r"(= \?|<unfinished \.\.\.>)$", lines[-2]) and CALL.match(lines[-2]):
            found.append(f"{call.name} {call.place}")
    return found


def run(command: Command, folder: Path, trace: Path | None = None, injections: list[str] | None = None) -> int | None:
    """Run a command in a folder, under strace if there is a trace to write; its exit code, None if it hangs."""

    def main() -> Any:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
        return command.main(folder)

    (folder / "tmp").mkdir(exist_ok=True)
    pid = forked.launch(main, Path(f"{folder}-log"), is_stopped=trace is not None)
    tracer = None
    if trace is not None:
        options = [
            *["-f"] * command.follows,
            "-y",
            "-s",
            "0",
            "-o",
            trace,
            "-e",
            f"trace={','.join(CHANGES)}",
            *(injections or []),
            "-p",
            pid,
        ]
        tracer = subprocess.Popen(["strace", *map(str, options)], stderr=subprocess.DEVNULL)
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                os.killpg(pid, signal.SIGKILL)
                raise SystemExit(f"strace can't trace: it ended with {tracer.returncode}")
            time.sleep(0.002)
        os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + SECONDS
    while not (done := os.waitpid(pid, os.WNOHANG))[0] or (tracer and tracer.poll() is None):
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.01)
        if done[0]:
            break
    if tracer:
        tracer.wait()
    wait_for_runs(folder)
    return os.waitstatus_to_exitcode(done[1])


def wait_for_runs(folder: Path) -> None:
    """Wait for runs that outlive the run_seeds.sh that started them: they have locked their logs."""
    for log in folder.rglob("*.log"):
        with log.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def printed(log: Path, kind: str) -> str:
    return Path(f"{log}.{kind}").read_text(errors="replace")


# -------------------------------------------------------------------------------------------------------------- results


def results(folder: Path, with_output: bool) -> dict[str, Any]:
    """Every file under a folder, temporary ones aside: its digest, or a JSON file's values without times and memory."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # what a killed process was writing where no run has a lock is removed when it is a day old
        if name.split("/")[0] == "tmp" or path.suffix == ".log" or ".lora_nlu-" in name:
            continue
        is_timed = name.startswith("output/report/")  # has the times of runs; `report` compares those of the same runs
        content = b"" if path.is_dir() or is_timed else path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if path.suffix == ".json":
            try:
                found |= {f"{name}{key}": value for key, value in values(json.loads(content)).items()}
                continue
            except ValueError:
                name += f" (no JSON, {len(content)} bytes)"
        found[RANDOM.sub("*", name)] = hashlib.sha256(content).hexdigest()
    return found | ({"printed": printed(Path(f"{folder}-log"), "out")} if with_output else {})


def values(content: Any, key: str = "") -> dict[str, Any]:
    """The values in nested lists and dicts by where they are, without times and memory."""
    if not isinstance(content, dict | list):
        return {key: content}
    items = content.items() if isinstance(content, dict) else enumerate(content)
    inner = {k: v for k, v in items if not VARIES.search(str(k))}
    return {k: v for name, item in inner.items() for k, v in values(item, f"{key}/{name}").items()}


def differences(got: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    """How results differ from those alone; of a folder that is there only once, the folder and not its files."""

    def only(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
        keys = {key for key in one if key not in other}
        return [key for key in sorted(keys) if not any(key.startswith(f"{folder}/") for folder in keys)]

    wrong = [f"{key}: {got[key]}, alone {alone[key]}" for key in alone if key in got and got[key] != alone[key]]
    return wrong + [f"lacks {key}" for key in only(alone, got)] + [f"left behind: {key}" for key in only(got, alone)]


# ---------------------------------------------------------------------------------------------------------------- cases


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_case(
    command: Command, calls: list[Call], number: int, strike: str, folder: Path, alone: dict[str, Any]
) -> list[str] | None:
    """What is wrong after a strike at a call; None if another call was struck. `calls` is brought up to date."""
    trace, log = Path(f"{folder}-trace"), Path(f"{folder}-log")
    for _ in range(3):
        call = calls[number]
        code = run(command, fresh(folder), trace, call.injection(strike))
        found = struck(trace, folder)
        if f"{call.name} {call.place}" in found or (found and not call.is_own):
            break
        counted = count_calls(command, folder)
        if [(call.name, call.place) for call in counted] == [(call.name, call.place) for call in calls]:
            calls[:] = counted
    else:
        return None
    output = folder / command.output
    checkpoints = complete_checkpoints(str(output)) if command.output else []
    is_trained = (output / "run.json").is_file() and "trained" in (output / "run.json").read_text()
    wrong = wrong_at_once(code, strike, folder, differences(results(folder, command.prints), alone), checkpoints)
    if code is None:
        return wrong
    code = run(command, folder)
    if code != 0:
        err = printed(log, "err")
        return [*wrong, f"started again: exit code {code}: {shortened(err[max(err.rfind(': error:'), 0) :], folder)}"]
    if checkpoints and not is_trained and f"Resuming from {checkpoints[-1]}." not in printed(log, "out"):
        wrong.append("started again: does not resume from the last complete checkpoint")
    changed = differences(results(folder, command.prints), alone)
    return wrong + ([f"started again, {len(changed)} differences: {'; '.join(changed[:12])}"] if changed else [])


def wrong_at_once(
    code: int | None, strike: str, folder: Path, changed: list[str], checkpoints: list[Path]
) -> list[str]:
    """What is wrong with how a command ended when it was struck; changed: how its results differ from those alone."""
    err = printed(Path(f"{folder}-log"), "err")
    message, wrong = err[max(err.rfind(": error:"), 0) :], []
    if code is None:
        return [f"hangs for {SECONDS} s"]
    if "Traceback" in err:
        wrong.append(f"a traceback: {shortened(err, folder)}")
    if code == 0 and changed and (not err or (strike != "kill" and str(folder) not in err)):
        wrong.append(f"exit code 0, no message that names a path, but {changed[0]} (of {len(changed)})")
    if code > 0 and (code != 1 or ": error:" not in err or str(folder) not in message):
        wrong.append(f"exit code {code}, no message that names a path: {shortened(message, folder)}")
    if code > 0 and "checkpoint-" in message and checkpoints and f"{checkpoints[-1]} is complete" not in message:
        wrong.append(
            f"{checkpoints[-1].name} is complete, which the message does not say: {shortened(message, folder)}"
        )
    if code > 0 and (left := [path for path in folder.rglob(".*") if path.parts[len(folder.parts)] != "tmp"]):
        wrong.append(f"left behind: {left[0].relative_to(folder)}")
    return wrong


def shortened(text: str, folder: Path) -> str:
    """The last lines of what was printed, in one."""
    lines = text.strip().replace(str(folder), "FOLDER").splitlines()
    return " / ".join(lines[-3:])[-400:] or "nothing printed"


def count_calls(command: Command, folder: Path) -> list[Call]:
    """The calls of a command that can be struck, from a run in a fresh folder that nothing happens to."""
    trace = Path(f"{folder}-trace")
    if code := run(command, fresh(folder), trace):
        raise SystemExit(f"{command.name} alone ended with {code}: {printed(Path(f'{folder}-log'), 'err')}")
    return [call for _, call, _ in traced_calls(trace, folder) if call.is_own != command.follows]


def reference(command: Command, folder: Path) -> tuple[list[Call], dict[str, Any]]:
    """The calls of a command that nothing happens to, and its results, which two such runs must have."""
    count_calls(command, folder)
    alone = results(folder, command.prints)
    calls = count_calls(command, folder)
    if wrong := differences(results(folder, command.prints), alone):
        raise SystemExit(f"{command.name}: two runs alone differ: {wrong[:5]}")
    return calls, alone


def work_through(
    command: Command, calls: list[Call], cases: list[tuple[int, str]], folder: Path, alone: dict[str, Any]
) -> None:
    """Run cases and print a line for each, which begins with its outcome."""
    for number, strike in cases:
        wrong = run_case(command, calls, number, strike, folder, alone)
        outcome = "MISSED" if wrong is None else "FAILED" if wrong else "passed"
        print(" | ".join([f"{outcome}: {title(command, calls, number, strike)}", *(wrong or [])]), flush=True)


def title(command: Command, calls: list[Call], number: int, strike: str) -> str:
    return f"{command.name}, {strike} at call {number}, {calls[number].name} {calls[number].place}"


def chosen(titles: dict[tuple[int, str], str], count: int | None, patterns: list[str] | None) -> list[tuple[int, str]]:
    """`count` of the cases, evenly spaced, the first and the last among them; or the first that each pattern fits."""
    cases = [*titles]
    if patterns is not None:
        fitting = [[case for case in cases if re.search(pattern, titles[case])] for pattern in patterns]
        return [found[0] for found in fitting if found]
    if count is None or count >= len(cases):
        return cases
    return [cases[round(i * (len(cases) - 1) / max(count - 1, 1))] for i in range(count)]


def in_memory() -> Path | None:
    """A folder in memory, where fsync takes no time; None if there is none that programs run in."""
    folder = Path("/dev/shm")
    is_fit = folder.is_dir() and os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_NOEXEC
    return folder if is_fit else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--commands",
        nargs="+",
        help="default: train compile compiler report convert_peft convert_bin convert_merged seeds",
    )
    parser.add_argument("--cases", type=int, help="for each command, evenly spaced; default: all")
    parser.add_argument("--only", nargs="+", metavar="REGEX", help="of each, the first case whose line it fits")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--work", type=Path, help="a folder for everything, kept; default: a temporary one")
    args = parser.parse_args()
    if not shutil.which("strace"):
        print("there is no strace here, which kills and fails calls")
        return 77
    work = (args.work or Path(tempfile.mkdtemp(prefix="lora-nlu-calls-", dir=in_memory()))).resolve()
    begun, outcomes = time.monotonic(), Counter[str]()
    try:
        for command in commands(work):
            if args.commands and command.name not in args.commands:
                continue
            calls, alone = reference(command, work / command.name)
            titles = {
                (number, strike): title(command, calls, number, strike)
                for number, call in enumerate(calls)
                for strike in command.strikes
                if call.name in STRIKES[strike] and (call.is_own or call.name == "write")
            }
            print(f"{command.name}: {len(calls)} calls, {len(titles)} cases", flush=True)
            cases, jobs = chosen(titles, args.cases, args.only), []
            for job in range(args.jobs):
                folder, log = work / f"case-{job}", work / f"job-{job}"
                share = partial(work_through, command, calls, cases[job :: args.jobs], folder, alone)
                jobs.append((forked.launch(share, log), log))
            for pid, log in jobs:
                if code := forked.finish(pid):
                    raise SystemExit(f"the cases ended with {code}: {printed(log, 'err')}")
                lines = printed(log, "out").splitlines()
                outcomes.update(line[:6] for line in lines)
                for line in lines:
                    if not line.startswith("passed"):
                        print(line, flush=True)
    finally:
        if not args.work:
            shutil.rmtree(work, ignore_errors=True)
    print(
        f"{outcomes.total() - outcomes['MISSED']} calls struck, {outcomes['MISSED']} missed, "
        f"{time.monotonic() - begun:.0f} s, {outcomes['FAILED']} failures"
    )
    return 1 if outcomes["FAILED"] or not outcomes else 2 if outcomes["MISSED"] else 0


if __name__ == "__main__":
    sys.exit(main())
