"""run_seeds.sh: starts what is not finished, resumes what was interrupted, repeats nothing, ends with the report."""

import errno
import fcntl
import hashlib
import json
import os
import pty
import re
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_nlu.training import launch

ROOT = Path(__file__).parents[1]
STRESS = Path(__file__).parent / "stress"
REPORT = "RTE accuracy"  # a heading of its table

# Stands in for run_glue.py: notes when and how it was started, does what BEHAVIOUR says, and leaves a finished run.
PRETEND = """
import json, os, signal, sys, time
from pathlib import Path

signal.alarm(60)  # outlives no test by long
flags, interrupts = sys.argv[2:], []
last = dict(zip(flags, flags[1:]))  # of several the last wins
folder, seed = Path(last.pop("--output_dir")), int(last.pop("--seed"))
name = str(folder.relative_to(Path("out").resolve()))

def note(event):
    settings = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "devices")}
    told = {"event": event, "name": name, "seconds": time.time(), "flags": flags, "pid": os.getpid(), **settings}
    with open("journal", "a") as file:
        file.write(json.dumps(told) + chr(10))

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: (interrupts.append(1), note("interrupt")))
note("start")
exec(os.environ.get("BEHAVIOUR", ""))
folder.mkdir(parents=True, exist_ok=True)
method = {"method": {"name": "bitfit"}, "lora": {"ranks": [], "scalings": [], "lora_relative_query": False}}
hyper = {"seed": seed, "num_train_epochs": 1, "train_samples": 1, "flags": str(last)}
run = {"task": last["--task_name"], "trained": True, "hyperparameters": hyper, "parameters": {"encoder": 1}, **method}
for file, content in {"run": run, "train_results": {}, "eval_results": {"eval_accuracy": 0.75}}.items():
    (folder / (file + ".json")).write_text(json.dumps(content))
(folder / "adapter_model.safetensors").touch()
note("end")
"""
# Values of BEHAVIOUR
UNTIL_INTERRUPTED = "while not interrupts: time.sleep(0.02)\ntime.sleep(0.3)\nsys.exit(1)"

UNTIL_STARTED = (
    "while Path('journal').read_text().count('start') < {}: time.sleep(0.02)\ntime.sleep(0.1)"  # so many runs
)


class Bench:
    """A folder with launch scripts, and run_seeds.sh started in it."""

    def __init__(self, folder: Path):
        self.folder, self.out, self.started = folder, folder / "out", []
        folder.mkdir()
        (folder / "pretend.py").write_text(PRETEND)
        python = shlex.quote(sys.executable)
        lines = [
            "#!/bin/sh",
            f'case "$1" in *run_glue.py) exec {python} pretend.py "$@" ;; esac',
            f'exec {python} "$@"',
        ]
        (folder / "python").write_text("\n".join(lines))
        (folder / "python").chmod(0o755)
        (folder / "without" / "matplotlib").mkdir(parents=True)  # hides it: a report without pictures takes no second
        (folder / "without" / "matplotlib" / "__init__.py").write_text("raise ImportError")
        self.environment = {"PATH": os.environ["PATH"], "PYTHON": str(folder / "python"), "devices": "0"}
        self.environment["PYTHONPATH"] = str(folder / "without")

    def script(self, name: str, *flags: object, needs: str = "") -> str:
        """Write a launch script; returns its name."""
        words = flags or ("--task_name", name.split("_")[-1], "--do_train", "--do_eval", "--seed", "0")
        lines = ["tuned_for_gpus=${tuned_for_gpus:-1}", f"source {shlex.quote(str(ROOT / 'scripts' / 'launch.sh'))}"]
        lines += [f"args=({shlex.join(map(str, words))})", f"needs_mnli {needs}" if needs else ""]
        (self.folder / f"{name}.sh").write_text("\n".join([*lines, 'launch "${args[@]}" "$@"', ""]))
        return f"{name}.sh"

    def start(self, *argv: str, before: str = "", stderr: Any = subprocess.PIPE, **settings: str) -> subprocess.Popen:
        command = ["bash", "-c", f'{before} exec bash "$@"', "", str(ROOT / "scripts" / "run_seeds.sh")]
        process = subprocess.Popen(
            [*command, "--output_dir", "out", *argv], env=self.environment | settings, cwd=self.folder, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *argv: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*argv, **settings))

    def journal(self, *events: str) -> list[dict[str, Any]]:
        """What the runs noted; with names of events, those only."""
        path = self.folder / "journal"
        notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [note for note in notes if not events or note["event"] in events]

    def names(self, *events: str) -> list[str]:
        return [note["name"] for note in self.journal(*events)]

    def log(self, name: str) -> str:
        return (self.out / f"{name}.log").read_text()


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "a bench")
    yield bench
    for process in bench.started:
        while process.poll() is None:  # a test failed; this ends the runs as well, at the second time whatever they do
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)


@pytest.fixture
def rte(bench) -> str:
    return bench.script("rte")


@pytest.fixture
def scheduler(bench, monkeypatch) -> SimpleNamespace:
    """What scripts/run_seeds.py defines."""
    monkeypatch.setenv("PYTHON", bench.environment["PYTHON"])
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "run_seeds.py")))


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def most_at_once(notes: list[dict[str, Any]]) -> int:
    """The largest number of runs between their start and their end."""
    steps = [1 if note["event"] == "start" else -1 for note in sorted(notes, key=lambda note: note["seconds"])]
    return max(sum(steps[: i + 1]) for i in range(len(steps)))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


# ------------------------------------------------------------------------------------------------ which runs, and where


def test_scripts_run_seed_by_seed_each_run_in_its_folder_with_a_log_and_the_report_comes_last(bench, rte):
    done = bench.run(bench.script("qnli"), rte, "2", BEHAVIOUR="print('learning ...', flush=True); time.sleep(0.3)")
    assert done.returncode == 0, done.stderr
    order = ["qnli/seed_0", "rte/seed_0", "qnli/seed_1", "rte/seed_1"]
    assert bench.names("start") == bench.names("end") == order and most_at_once(bench.journal()) == 1
    for name, note in zip(order, bench.journal("start"), strict=True):
        assert (bench.out / name / "eval_results.json").is_file()
        assert note["flags"][-2:] == ["--seed", name[-1]]
        assert bench.log(name).endswith("learning ...\n")
    lines = re.sub(r"\d+:\d\d:\d\d", "TIME", done.stderr).splitlines()
    expected = [f"rte/seed_1 starts, log in {bench.out}/rte/seed_1.log", "rte/seed_1: accuracy 0.7500 (TIME)"]
    assert lines[-3:] == [*expected, "4 of 4 done; TIME, about TIME to go"] and len(lines) == 12
    assert "\r" not in done.stderr and "\x1b" not in done.stderr
    assert REPORT in done.stdout and (bench.out / "report" / "report.md").read_text() in done.stdout


@pytest.mark.parametrize(
    "words, seeds", [(["3"], "012"), (["--seeds", "7,2"], "72"), ([], "01234")], ids=["count", "--seeds", "default"]
)
def test_seeds_are_counted_or_listed_and_five_by_default(bench, rte, words, seeds):
    done = bench.run(rte, *words, DRY_RUN="1")
    assert re.findall(r"/out/rte/seed_(\d)\b", done.stdout) == [*seeds]


def test_flags_after_two_dashes_reach_every_run_then_come_those_of_each_combination_of_grids_then_the_seed(bench, rte):
    grids = ["--grid", "lora_r", "1", "8", "--grid", "lora_path", "a/b.bin", "none", "--", "--fp16", "--lora_r", "4"]
    done = bench.run(rte, "1", *grids, DRY_RUN="1")
    commands = [shlex.split(text) for text in done.stdout.replace("\\\n", " ").splitlines()]
    combinations = [("1", "a/b.bin"), ("1", "none"), ("8", "a/b.bin"), ("8", "none")]
    assert len(commands) == 4
    for words, (rank, path) in zip(commands, combinations, strict=True):
        tail = ["--fp16", "--lora_r", "4", "--lora_r", rank, "--lora_path", path, "--seed", "0"]
        assert words[-len(tail) :] == tail
        name = f"lora_r_{rank}-lora_path_{path.replace('/', '_')}"
        assert words[words.index("--output_dir") + 1] == str(bench.out / "rte" / name / "seed_0")


def test_runs_of_a_grid_are_kept_apart_and_reported_together(bench, rte):
    done = bench.run(rte, "1", "--grid", "learning_rate", "1e-3", "2e-3")
    assert done.returncode == 0
    assert bench.names("end") == ["rte/learning_rate_1e-3/seed_0", "rte/learning_rate_2e-3/seed_0"]
    assert done.stdout.count("learning_rate") >= 2


def test_a_script_with_a_task_runs_in_a_folder_of_script_and_task(bench):
    script = bench.folder / "method.sh"
    text = (bench.folder / bench.script("method")).read_text()
    text = text.replace("launch.sh\n", 'launch.sh\nname="${name}_$1"\n').replace(
        "--task_name method", '--task_name "$1"'
    )
    script.write_text(text.replace('"$@"', '"${@:2}"'))
    done = bench.run("method.sh:rte", "method.sh:qnli", bench.script("rte"), "1", "--", "--max_steps", "5")
    assert done.returncode == 0, done.stderr
    assert bench.names("end") == ["method_rte/seed_0", "method_qnli/seed_0", "rte/seed_0"]
    assert all(note["flags"][-4:] == ["--max_steps", "5", "--seed", "0"] for note in bench.journal("start"))
    assert [note["flags"][3] for note in bench.journal("start")] == ["rte", "qnli", "rte"]
    assert bench.run("method.sh:rte", "1", "--", "--max_steps", "5").stderr == "1 of 1 are done already\n"
    (bench.folder / "a:b.sh").write_text((bench.folder / "rte.sh").read_text())
    assert bench.run("a:b.sh", "1", DRY_RUN="1").stdout.count("out/a:b/seed_0") == 1


def test_the_baselines_take_a_task_and_refuse_others(bench):
    script = str(ROOT / "scripts" / "baselines" / "full_roberta_base.sh")
    done = bench.run(f"{script}:rte", f"{script}:stsb", "2", DRY_RUN="1")
    assert re.findall(r"/out/(\w+)/seed_(\d)", done.stdout) == [
        (f"full_roberta_base_{task}", seed) for seed in "01" for task in ("rte", "stsb")
    ]
    for word, task in ((script, ""), (f"{script}:wnli", "wnli")):
        done = bench.run(word, "2")
        assert done.returncode == 2
        assert (
            f"run_seeds.sh: error: full_roberta_base: needs a task as its first argument, not '{task}'" in done.stderr
        )


def test_the_old_name_of_tuned_for_gpus_reaches_every_run_with_one_line(bench, rte):
    done = bench.run(rte, "2", DRY_RUN="1", num_gpus="4")
    assert done.stdout.count("--gradient_accumulation_steps 4") == 2
    assert done.stderr == "run_seeds: num_gpus is now called tuned_for_gpus; tuned_for_gpus=4 is used\n"


def test_a_dry_run_shows_the_commands_with_the_users_settings_and_runs_nothing(bench, rte):
    done = bench.run(rte, "2", DRY_RUN="1", tuned_for_gpus="4", GLUE_DIR="my glue")
    assert done.returncode == 0 and done.stdout.count("run_glue.py") == 2
    assert done.stdout.count("--gradient_accumulation_steps 4") == done.stdout.count("--glue_dir 'my glue'") == 2
    assert not bench.journal() and not bench.out.exists()


def test_results_go_to_the_folder_that_the_user_names_or_to_output_seeds_in_the_repository(
    bench, rte, scheduler, monkeypatch
):
    monkeypatch.chdir(bench.folder)
    monkeypatch.delenv("output_dir", raising=False)
    assert [run.folder for run in scheduler.parse([rte, "1"])[0]] == [ROOT / "output" / "seeds" / "rte" / "seed_0"]
    monkeypatch.setenv("output_dir", "mine")
    assert [run.folder for run in scheduler.parse([rte, "1"])[0]] == [bench.folder / "mine" / "rte" / "seed_0"]


@pytest.mark.parametrize(
    "words, expected_message",
    [
        ("2", "give scripts"),
        ("none.sh", "none.sh: no such script"),
        ("rte.sh other.sh", "other.sh: is no launch script"),
        ("rte.sh --seeds 0,x", "--seeds 0,x"),
        ("rte.sh --seeds ''", "--seeds :"),
        ("rte.sh --seeds 1,1", "rte/seed_1: listed twice"),
        ("rte.sh 3 4", "one count"),
        ("rte.sh 3 --seeds 1", "one count"),
        ("rte.sh 0", "one count"),
        ("rte.sh --jobs 0", "--jobs is 1 or more"),
        ("rte.sh --jobs -1", "--jobs is 1 or more"),
        ("rte.sh 1 --grid lora_r", "--grid needs a flag and its values"),
        ("rte.sh 1 --grid lora_r 4 4", "rte/lora_r_4/seed_0: listed twice"),
        ("rte.sh 1 --grid seed 4 5", "--seed and --output_dir are set by"),
        ("rte.sh 1 -- --seed 4", "--seed and --output_dir are set by"),
        ("rte.sh 1 -- --output_dir=there", "--seed and --output_dir are set by"),
        ("rte.sh 1 --job 2", "unrecognized arguments: --job"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_with_status_2_and_nothing_runs(
    bench, rte, words, expected_message
):
    (bench.folder / "other.sh").write_text("touch oops\n")
    done = bench.run(*shlex.split(words))
    assert done.returncode == 2 and "run_seeds.sh: error: " in done.stderr and expected_message in done.stderr
    assert not bench.journal() and not bench.out.exists() and not (bench.folder / "oops").exists()


def test_a_scripts_own_error_message_is_printed_before_anything_starts(bench, rte):
    done = bench.run(rte, bench.script("mrpc", needs="roberta_base_mnli"), "2")
    assert done.returncode == 2 and not bench.journal()
    assert done.stderr.startswith("run_seeds.sh: error: mrpc: starts from an MNLI adapter, and there is none at ")
    assert "MNLI_LORA=none" in done.stderr


@pytest.mark.parametrize(
    "last, expected_message", [("exit 3", "rte.sh: ends with status 3"), ("true", "rte.sh: is no launch script")]
)
def test_a_script_that_does_not_end_with_launch_is_no_launch_script(bench, last, expected_message):
    (bench.folder / "rte.sh").write_text(f"# no launch.sh\n{last}\n")
    done = bench.run("rte.sh", "1")
    assert done.returncode == 2 and expected_message in done.stderr and not bench.journal()


# ------------------------------------------------------------------------------------------- what is done, what is not


def test_what_is_done_is_not_repeated_and_what_is_missing_runs(bench, rte):
    bench.run(rte, "2")
    before = contents(bench.out / "rte")
    again = bench.run(rte, "3")
    assert again.returncode == 0 and bench.names("start") == [f"rte/seed_{i}" for i in range(3)]
    assert again.stderr.startswith("2 of 3 are done already\nrte/seed_2 starts")
    assert before.items() <= contents(bench.out / "rte").items()
    assert "3 seeds" in again.stdout
    once_more = bench.run(rte, "3")
    assert (once_more.returncode, once_more.stderr) == (0, "3 of 3 are done already\n")
    assert once_more.stdout == again.stdout and len(bench.names("start")) == 3


@pytest.mark.parametrize(
    "flags, lost", [((), "eval_results.json"), (("--do_predict",), "predict_results_rte.tsv"), ((), "run.json")]
)
def test_a_run_that_lacks_a_result_it_was_to_make_is_not_done(bench, rte, flags, lost):
    predict = "folder.mkdir(parents=True, exist_ok=True); (folder / 'predict_results_rte.tsv').touch()"
    for _ in range(2):
        bench.run(rte, "2", "--", *flags, BEHAVIOUR=predict)
        (bench.out / "rte" / "seed_1" / lost).unlink()
    assert bench.names("start") == ["rte/seed_0", "rte/seed_1", "rte/seed_1"]


@pytest.mark.parametrize(
    "flags, settings, expected_message",
    [
        (["--lora_r", "4"], {}, "+ --lora_r 4"),
        ([], {"tuned_for_gpus": "8"}, "+ --gradient_accumulation_steps 8"),
        (["--lora_path", "some.bin"], {}, "+ --lora_path"),
    ],
    ids=["a flag", "another batch", "from an adapter"],
)
def test_a_run_that_finished_with_other_flags_is_no_result_of_these_and_nothing_starts(
    bench, rte, flags, settings, expected_message
):
    bench.run(rte, "1")
    refused = bench.run(rte, "2", "--", *flags, **settings)
    assert refused.returncode == 2 and len(bench.names("start")) == 1
    assert f"{bench.out}/rte/seed_0 holds a finished run with other flags: {expected_message}.\n" in refused.stderr
    assert "Choose another --output_dir, or remove that folder." in refused.stderr


def test_flags_are_compared_however_long_the_log_and_a_log_without_them_is_mentioned(bench, rte):
    bench.run(rte, "1", "--", "--hub_token", "hf_a")
    assert "hf_a" not in bench.log("rte/seed_0")
    log = bench.out / "rte" / "seed_0.log"
    with log.open("a") as file:
        file.write("12%\r" * 3_000_000)
    refused = bench.run(rte, "1", "--", "--hub_token", "hf_b", "--lora_r", "4")
    assert refused.returncode == 2 and "with other flags: + --lora_r 4." in refused.stderr
    assert bench.run(rte, "1", "--", "--hub_token", "hf_b").stderr == "1 of 1 are done already\n"
    log.unlink()
    done = bench.run(rte, "1")
    message = f"rte/seed_0 is finished, with which flags is not known: {log} has none\n1 of 1 are done already\n"
    assert done.returncode == 0 and done.stderr == message


def test_a_log_that_is_a_link_is_not_written_through(bench, rte):
    (bench.out / "rte").mkdir(parents=True)
    (bench.folder / "thesis.txt").write_text("mine")
    (bench.out / "rte" / "seed_0.log").symlink_to(bench.folder / "thesis.txt")
    done = bench.run(rte, "2")
    assert done.returncode == 1 and "seed_0.log is a link" in done.stderr and bench.names("end") == ["rte/seed_1"]
    assert (bench.folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_run_that_the_system_cannot_start_ends_the_others_and_says_why(
    number, bench, rte, scheduler, machine, monkeypatch
):
    machine(0, **bench.environment, BEHAVIOUR=UNTIL_INTERRUPTED)
    monkeypatch.chdir(bench.folder)
    runs, _ = scheduler.parse([rte, "2", "--output_dir", "out"])

    def fail(*args: object, **kwargs: object) -> None:
        wait_until(lambda: bench.journal("start"))
        raise OSError(number, os.strerror(number))

    start = runs[1].start
    runs[1].start = lambda *args: (monkeypatch.setattr(subprocess, "Popen", fail), start(*args))
    with pytest.raises(OSError, match=os.strerror(number)):
        scheduler.run_all(runs, [None, None], {"devices": "0"}, [])
    assert bench.names() == ["rte/seed_0", "rte/seed_0"] and runs[1].state == "waiting"
    assert_gone(bench.journal("start")[0]["pid"])


def test_places_may_change_without_a_finished_run_becoming_another(bench, rte):
    bench.run(rte, "1", "--", "--lora_path", "some.bin", GLUE_DIR="glue")
    again = bench.run(rte, "1", "--", "--lora_path", "moved/some.bin", GLUE_DIR="moved/glue")
    assert again.returncode == 0 and len(bench.names("start")) == 1


def test_a_log_contains_every_start_of_its_run_also_after_half_a_line(bench, rte):
    for behaviour in ("print('12%', end='', flush=True); sys.exit(1)", "print('100%')"):
        bench.run(rte, "1", BEHAVIOUR=behaviour)
    marks = [line for line in bench.log("rte/seed_0").splitlines() if line.startswith("run_seeds: [")]
    assert len(marks) == 2 and re.search("12%\n(.*\n)+100%\n$", bench.log("rte/seed_0"))


@pytest.mark.parametrize("left", ["run_seeds: [", 'run_seeds: ["--task_name rte", "--do_tr'])
def test_half_a_line_of_flags_in_a_log_is_no_start(bench, rte, left):
    bench.run(rte, "1")
    with (bench.out / "rte" / "seed_0.log").open("a") as log:
        log.write(left)
    assert bench.run(rte, "1").stderr == "1 of 1 are done already\n"
    refused = bench.run(rte, "1", "--", "--lora_r", "4")
    assert refused.returncode == 2 and "with other flags: + --lora_r 4." in refused.stderr


def test_a_full_disk_ends_the_command_with_the_path_of_the_log(bench, rte):
    done = bench.run(rte, "2", before="ulimit -f 0;")
    path = bench.out / "rte" / "seed_0.log"
    assert done.returncode == 1 and done.stderr == f"run_seeds.sh: error: [Errno 27] File too large: '{path}'\n"
    assert bench.run(rte, "2").returncode == 0


def test_a_run_that_another_command_finished_meanwhile_is_not_repeated(bench, rte, scheduler, machine, monkeypatch):
    machine(0, **bench.environment)
    monkeypatch.chdir(bench.folder)
    runs, _ = scheduler.parse([rte, "2", "--output_dir", "out"])
    commands = [run.plan() for run in runs]
    assert len(commands) == 2 and not any(run.is_done() for run in runs)
    assert bench.run(rte, "1").returncode == 0
    scheduler.run_all(runs, [None], {"devices": "0"}, [])
    assert [run.state for run in runs] == ["done", "done"]
    assert bench.names("start") == ["rte/seed_0", "rte/seed_1"]


def test_a_run_that_fails_shows_its_last_lines_the_others_go_on_and_the_same_command_tries_it_again(bench, rte):
    failing = "print('reading', 'first', sep=chr(10), flush=True)\nif seed == 1: sys.exit('out of memory')"
    done = bench.run(rte, "3", BEHAVIOUR=failing)
    assert done.returncode == 1 and bench.names("end") == ["rte/seed_0", "rte/seed_2"]
    log = bench.out / "rte" / "seed_1.log"
    assert re.search(
        rf"rte/seed_1 failed with status 1; {re.escape(str(log))} ends:\n(.*\n)?reading\nfirst\nout of memory",
        done.stderr,
    )
    assert done.stderr.endswith("Failed: rte/seed_1. The same command tries again.\n")
    assert REPORT in done.stdout and f"missing: {bench.out}/rte/seed_1" in done.stdout
    again = bench.run(rte, "3")
    assert again.returncode == 0 and bench.names("start")[3:] == ["rte/seed_1"]


# ------------------------------------------------------------------------------------------------------- side by side


def test_jobs_run_so_many_at_a_time_never_more_and_share_the_cores(bench, rte):
    done = bench.run(rte, "4", "--jobs", "2", BEHAVIOUR=UNTIL_STARTED.format(2))
    assert done.returncode == 0 and most_at_once(bench.journal()) == 2
    shares = {(note["OMP_NUM_THREADS"], note["CUDA_VISIBLE_DEVICES"]) for note in bench.journal("start")}
    assert shares == {(str(max(1, (os.cpu_count() or 1) // 2)), "")}


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """Make this process find so many GPUs and these settings."""

    def machine(gpus: int, **settings: str) -> None:
        monkeypatch.setattr(launch, "count_devices", lambda python: gpus)
        for name in ("CUDA_VISIBLE_DEVICES", "devices", "OMP_NUM_THREADS", "MNLI_LORA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return machine


@pytest.mark.parametrize(
    "gpus, jobs, settings, slots, passed_on",
    [
        (4, None, {}, ["0", "1", "2", "3"], {"devices": "1"}),
        (2, None, {"CUDA_VISIBLE_DEVICES": "5,7"}, ["5", "7"], {"devices": "1"}),
        (4, 2, {}, ["0", "1"], {"devices": "1"}),
        (4, None, {"devices": "3"}, ["0", "1", "2"], {"devices": "1"}),
        (2, 3, {}, ["0", "1", "0"], {"devices": "1"}),
        (4, 1, {}, [None], {"devices": "4"}),
        (4, None, {"devices": "1"}, [None], {"devices": "1"}),
        (1, 2, {}, [None, None], {"devices": "1"}),
        (4, 2, {"devices": "0", "OMP_NUM_THREADS": "3"}, [None, None], {"devices": "0", "OMP_NUM_THREADS": "3"}),
        (0, None, {}, [None], {"devices": "0"}),
    ],
)
def test_each_of_several_gpus_takes_one_run_at_a_time_unless_jobs_or_devices_is_set(
    scheduler, machine, gpus, jobs, settings, slots, passed_on
):
    machine(gpus, **settings)
    assert scheduler.slots(jobs) == (slots, passed_on)


def test_devices_that_are_no_number_are_refused_by_name(bench, rte):
    done = bench.run(rte, "1", devices="two")
    assert done.returncode == 2 and "devices='two' is not a whole number" in done.stderr and not bench.journal()


def test_runs_on_several_gpus_have_one_each_and_no_gpu_has_two_at_a_time(bench, rte, scheduler, machine, monkeypatch):
    monkeypatch.chdir(bench.folder)
    settings = bench.environment | {"BEHAVIOUR": UNTIL_STARTED.format(3)}
    machine(3, **{name: value for name, value in settings.items() if name != "devices"}, CUDA_VISIBLE_DEVICES="2,5,7")
    runs, _ = scheduler.parse([rte, "8", "--output_dir", "out"])
    scheduler.run_all(runs, *scheduler.slots(None), [])
    assert [run.state for run in runs] == ["done"] * 8
    assert {note["devices"] for note in bench.journal("start")} == {"1"} and most_at_once(bench.journal()) == 3
    for gpu in "257":
        mine = [note for note in bench.journal() if note["CUDA_VISIBLE_DEVICES"] == gpu]
        assert most_at_once(mine) == 1


# ------------------------------------------------------------------------------------------ starting from MNLI adapters


@pytest.fixture
def pair(bench) -> list[str]:
    """A script that starts from the MNLI adapter of another, and that one."""
    return [bench.script("roberta_base_rte", needs="roberta_base_mnli"), bench.script("roberta_base_mnli")]


def lora_paths(bench: Bench, task: str = "rte") -> dict[str, str | None]:
    """Run: the adapter it started from."""
    starts = {note["name"]: note["flags"] for note in bench.journal("start") if f"_{task}/" in note["name"]}
    return {
        name: flags[flags.index("--lora_path") + 1] if "--lora_path" in flags else None
        for name, flags in starts.items()
    }


def test_a_run_starts_from_the_mnli_adapter_of_its_seed_and_combination_once_it_is_there(bench, pair):
    done = bench.run(*pair, "2", "--grid", "lora_r", "4", "8", "--jobs", "8", BEHAVIOUR="time.sleep(0.2)", MNLI_LORA="")
    assert done.returncode == 0, done.stderr
    places = [f"lora_r_{rank}/seed_{seed}" for seed in (0, 1) for rank in (4, 8)]
    assert lora_paths(bench) == {
        f"roberta_base_rte/{place}": f"{bench.out}/roberta_base_mnli/{place}" for place in places
    }
    ends = {note["name"]: note["seconds"] for note in bench.journal("end")}
    for note in bench.journal("start"):
        if "_rte/" in note["name"]:
            assert note["seconds"] > ends[note["name"].replace("_rte", "_mnli")]


def test_a_run_whose_mnli_run_failed_is_reported_and_not_started(bench, pair):
    done = bench.run(*pair, "2", "--jobs", "2", BEHAVIOUR="if 'mnli' in name and seed == 0: sys.exit(1)")
    assert done.returncode == 1
    assert sorted(bench.names("end")) == ["roberta_base_mnli/seed_1", "roberta_base_rte/seed_1"]
    assert "roberta_base_rte/seed_0 can't start: it needs roberta_base_mnli/seed_0\n" in done.stderr
    assert "Failed: roberta_base_mnli/seed_0, roberta_base_rte/seed_0. " in done.stderr


def test_runs_of_the_papers_recipe_are_in_folders_of_their_own_and_start_from_each_other(bench, pair):
    done = bench.run(*pair, "1", recipe="paper", MNLI_LORA="")
    assert done.returncode == 0, done.stderr
    assert lora_paths(bench, "rte_paper") == {
        "roberta_base_rte_paper/seed_0": f"{bench.out}/roberta_base_mnli_paper/seed_0"
    }
    flags = [note["flags"] for note in bench.journal("start")]
    assert len(flags) == 2 and all(words[words.index("--lora_alpha") + 1] == "8" for words in flags)


def test_a_users_own_adapter_wins(bench, pair):
    (bench.folder / "my.bin").touch()
    done = bench.run(*pair, "1", "--jobs", "2", MNLI_LORA="my.bin", BEHAVIOUR=UNTIL_STARTED.format(2))
    assert done.returncode == 0 and lora_paths(bench) == {"roberta_base_rte/seed_0": "my.bin"}
    run_flags = ["--seeds", "1", "--jobs", "2", "--", "--lora_path", "other.bin"]
    assert bench.run(*pair, *run_flags, BEHAVIOUR=UNTIL_STARTED.format(4)).returncode == 0
    bench.run(pair[0], "--seeds", "2", MNLI_LORA="none")
    assert [*lora_paths(bench).values()] == ["my.bin", "other.bin", None]


def test_mnli_adapters_of_earlier_runs_are_taken_and_a_run_without_one_is_another_run(bench, pair):
    bench.run(pair[1], "1")
    done = bench.run(pair[0], "1")
    assert done.returncode == 0, done.stderr
    assert lora_paths(bench) == {"roberta_base_rte/seed_0": f"{bench.out}/roberta_base_mnli/seed_0"}
    assert bench.run(*pair, "1").stderr == "2 of 2 are done already\n"
    other = bench.run(pair[0], "1", MNLI_LORA="none")
    assert other.returncode == 2 and "other flags: - --lora_path." in other.stderr


# -------------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    "number, before",
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        (signal.SIGHUP, ""),
        (signal.SIGTERM, "trap '' INT;"),  # as in the background of a script
    ],
    ids=["Ctrl-C", "SIGTERM", "a terminal closed", "SIGTERM in the background"],
)
def test_an_interruption_reaches_each_run_once_is_waited_for_and_the_same_command_goes_on(bench, rte, number, before):
    command = [rte, "3", "--jobs", "2"]
    process = bench.start(*command, before=before, BEHAVIOUR=UNTIL_INTERRUPTED)
    wait_until(lambda: len(bench.names("start")) == 2)
    process.send_signal(number)
    done = finish(process)
    assert done.returncode == 130 and done.stdout == ""
    assert sorted(bench.names("interrupt")) == sorted(bench.names("start")) == ["rte/seed_0", "rte/seed_1"]
    assert "rte/seed_0 stopped" in done.stderr and "failed" not in done.stderr
    assert done.stderr.endswith("Interrupted; the same command goes on from the last checkpoints.\n")
    for note in bench.journal("start"):
        assert_gone(note["pid"])
    if number == signal.SIGINT:
        assert bench.run(*command).returncode == 0
        assert sorted(bench.names("end")) == [f"rte/seed_{i}" for i in range(3)]


def assert_gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_second_ctrl_c_kills_what_does_not_stop_and_leaves_nothing_running(bench, rte):
    process = bench.start(rte, "2", BEHAVIOUR="while True: time.sleep(0.1)")
    wait_until(lambda: bench.journal("start"))
    process.send_signal(signal.SIGINT)
    wait_until(lambda: bench.journal("interrupt"))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130 and "Ctrl-C now kills them" in done.stderr and bench.names("start") == ["rte/seed_0"]
    assert_gone(bench.journal("start")[0]["pid"])


def test_a_nohup_command_outlives_its_terminal(bench, rte):
    process = bench.start(rte, "1", before="trap '' HUP;", BEHAVIOUR="time.sleep(0.5)")
    wait_until(lambda: bench.journal("start"))
    process.send_signal(signal.SIGHUP)
    assert finish(process).returncode == 0 and bench.names("end") == ["rte/seed_0"]


def test_a_run_that_goes_on_elsewhere_is_not_started_twice_even_if_the_command_that_started_it_was_killed(bench, rte):
    first = bench.start(rte, "1", BEHAVIOUR=UNTIL_INTERRUPTED)
    wait_until(lambda: bench.journal("start"))
    pid = bench.journal("start")[0]["pid"]
    try:
        for _ in range(2):
            second = bench.run(rte, "1")
            assert second.returncode == 1 and len(bench.journal("start")) == 1
            assert "rte/seed_0 can't start: another command is running it" in second.stderr
            first.kill()
            first.wait()
    finally:
        os.kill(pid, signal.SIGINT)
    wait_until(lambda: bench.run(rte, "1").returncode == 0)
    assert bench.names("end") == ["rte/seed_0"]


# -------------------------------------------------------------------------------------------------------- on a terminal


def test_a_terminal_shows_one_line_of_progress_over_and_over_never_wider_than_it_is(bench, rte):
    parent, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    learning = "print({'loss': 0.5, 'epoch': '1.5'}, flush=True); time.sleep(0.6)"
    process = bench.start(rte, "2", stderr=terminal, BEHAVIOUR=learning)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 10_000)
        except OSError:  # nobody writes there any more
            break
    os.close(parent)
    done = finish(process)
    drawn = shown.decode().split("\r\x1b[K")
    progress = [text for text in drawn if re.fullmatch(r"\d of 2 done[^\r\n]*", text)]
    assert len(progress) > 6 and max(map(len, progress)) <= 49
    assert any(text.startswith("0 of 2 done; rte/seed_0 at epoch 1.5; 0:0") for text in progress)
    assert any(text.startswith("1 of 2 done; rte/seed_1 at epoch 1.5; 0:0") for text in progress)
    assert sum("rte/seed_1 starts, log in " in text for text in drawn) == 1 and drawn[-1] == ""
    assert done.returncode == 0 and REPORT in done.stdout


# -------------------------------------------------------------------------------------------------------- real training

PREPARE = """
import json, sys
from pathlib import Path
import forked

work = Path(sys.argv[1])
glue, model = forked.prepare(work)
for folder, seed in (("alone", 0), ("out/tiny_rte/seed_1", 1)):
    flags = [*map(str, forked.flags(glue, model, work / folder, work / "cache", 40, 4)), "--seed", str(seed)]
    assert forked.finish(forked.start(flags, work / "log")) == 0
print(json.dumps(flags))
"""


def test_real_training_goes_on_from_its_checkpoint_and_ends_as_if_never_interrupted(bench):
    prepared = subprocess.run(
        [sys.executable, "-c", PREPARE, bench.folder], cwd=STRESS, capture_output=True, text=True, timeout=240
    )
    assert prepared.returncode == 0, prepared.stderr
    flags = json.loads(prepared.stdout.splitlines()[-1])
    place = flags.index("--output_dir")
    del flags[place : place + 2]

    command = [bench.script("tiny_rte", *flags), "--seeds", "0,1"]
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(bench.folder)}
    interrupted, finished = (bench.out / "tiny_rte" / f"seed_{seed}" for seed in (0, 1))
    before = contents(finished)

    process = bench.start(*command, **settings)
    wait_until(lambda: any(interrupted.glob("checkpoint-*")))
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.returncode == 130, done.stderr
    weights = "adapter_model.safetensors"
    assert "interrupted at step " in bench.log("tiny_rte/seed_0") and not (interrupted / weights).exists()

    done = bench.run(*command, **settings)
    assert done.returncode == 0, done.stderr
    assert f"Resuming from {interrupted}/checkpoint-" in bench.log("tiny_rte/seed_0")
    assert (interrupted / weights).read_bytes() == (bench.folder / "alone" / weights).read_bytes()
    assert contents(finished) == before and not (bench.out / "tiny_rte" / "seed_1.log").exists()
    assert "2 seeds" in done.stdout and REPORT in done.stdout
