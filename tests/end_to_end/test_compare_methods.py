"""compare_methods.sh: rates are chosen without the reported set, nothing is repeated, the report tells what differs."""

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_nlu.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "compare_methods.sh"

# Stands in for run_glue.py: notes its flags, waits as HOLD says, and leaves a run whose figure follows from its rate.
PRETEND = """
import json, os, signal, sys, time
from pathlib import Path

signal.alarm(60)
flags = sys.argv[2:]
last = dict(zip(flags, flags[1:]))
folder, rate, seed = Path(last["--output_dir"]), float(last["--learning_rate"]), int(last["--seed"])
with open("journal", "a") as file:
    file.write(json.dumps({"name": str(folder.relative_to(Path("out").resolve())), "flags": flags}) + chr(10))
while Path("hold").exists() and "choosing" in str(folder):
    time.sleep(0.02)
name = "bitfit" if "--apply_bitfit" in flags else "head" if "--head_only" in flags else "lora"
peak = {"lora": 2e-3, "bitfit": 2e-3, "head": 1e-3}[name]
level = {"lora": 0.8, "bitfit": 0.79, "head": 0.5}[name]
hyper = {"seed": seed, "learning_rate": rate, "num_train_epochs": 1, "train_samples": 640, "examples_a_step": 32}
if "--validation_from_train" in flags:
    hyper["validation_from_train"] = int(last["--validation_from_train"])
method = {"name": name} | ({"targets": ["query", "value"], "layers": None, "lora_dropout": 0} if name == "lora" else {})
ranks, scalings = ([8], [2.0]) if name == "lora" else ([], [])
lora = {"ranks": ranks, "scalings": scalings, "lora_relative_query": False}
run = {"task": last["--task_name"], "labels": [], "trained": True, "hyperparameters": hyper, "method": method}
run |= {"lora": lora, "parameters": {"encoder": 1}, "base_model": "tiny"}
if rate > 1:
    del run["trained"]
    run["diverged"] = "the loss is nan"
folder.mkdir(parents=True, exist_ok=True)
figure = level - 0.01 * abs(rate / peak - 1) + 0.001 * seed * (2 if name == "lora" else 1)
if name == "bitfit":  # equal figures: the loss decides
    figure = level + 0.001 * seed
trained = {"train_seconds": 2.0, "num_input_tokens_seen": 6400}
results = {"train_results": trained, "eval_results": {"eval_accuracy": figure, "eval_loss": abs(rate - peak)}}
for file, content in {"run": run, **(results if rate <= 1 else {})}.items():
    (folder / (file + ".json")).write_text(json.dumps(content))
sys.exit(rate > 1)
"""
TABLE = """
every run	--model_name_or_path tiny --do_train --do_eval
choosing	--num_train_epochs 1 --validation_from_train 100
final	--num_train_epochs 2
seeds	2	3	2
task	rte
method	LoRA r=8	1e-3 2e-3 4e-3	--apply_lora --lora_r 8 --lora_alpha 16
method	BitFit	1e-3 2e-3 1e3	--apply_bitfit
method	head alone	1e-3	--head_only
"""


class Bench:
    """A folder with a table, and compare_methods.sh started in it with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pretend.py").write_text(PRETEND)
        (folder / "table.tsv").write_text(TABLE)
        python = shlex.quote(sys.executable)
        stand_in = f'case "$1" in *run_glue.py) exec {python} pretend.py "$@" ;; esac'
        (folder / "python").write_text(f'#!/bin/sh\n{stand_in}\nexec {python} "$@"\n')
        (folder / "python").chmod(0o755)

    def start(self, *argv: str, **settings: str) -> subprocess.Popen:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(self.folder / "python"), "devices": "0"} | settings
        return subprocess.Popen(
            ["bash", str(PROGRAM), "table.tsv", "--output_dir", "out", *argv], env=environment, cwd=self.folder,
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *argv: str, **settings: str) -> tuple[int, str, str]:
        process = self.start(*argv, **settings)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def journal(self) -> dict[str, list[str]]:
        """The flags of each run that started; fails if one started twice."""
        path = self.folder / "journal"
        notes = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len({note["name"] for note in notes}) == len(notes), "a run was repeated"
        return {note["name"]: note["flags"] for note in notes}


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def program(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "compare_methods.py")))


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_best_rates_run_with_all_seeds_and_nothing_is_repeated_after_an_interruption(bench):
    (bench.folder / "hold").touch()
    process = bench.start()
    wait_until(lambda: any(name.startswith("choosing") for name in bench.journal()))
    interrupted = [name for name in bench.journal() if name.startswith("choosing")]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted; the same command goes on from the last checkpoints." in err
    plan, _ = err.split("choosing/rte/LoRA_r=8/1e-3/seed_0 starts")
    for words in (
        "choosing: 6 runs",
        "final: 6 runs",
        "up to 3 more",
        "for what is left of these, from measured tokens",
    ):
        assert words in plan
    (bench.folder / "hold").unlink()
    journal = (bench.folder / "journal").read_text().splitlines()
    (bench.folder / "journal").write_text("\n".join(line for line in journal if interrupted[0] not in line) + "\n")

    code, _, err = bench.run()
    assert code == 0, err
    chosen = {"LoRA_r=8": "2e-3", "BitFit": "2e-3", "head_alone": "1e-3"}
    seeds = {"LoRA_r=8": 3, "BitFit": 3, "head_alone": 2}  # within 2 points of LoRA, and far below
    final = {f"final/rte/{name}/{chosen[name]}/seed_{seed}" for name in chosen for seed in range(seeds[name])}
    names = bench.journal()
    assert {name for name in names if name.startswith("final")} == final
    for line in (
        "head alone on RTE: 1e-3, the only rate",
        "LoRA r=8 on RTE: 2e-3 (80.0)",
        "BitFit on RTE: 2e-3 (79.0); 1e3 diverged",
    ):
        assert f"  {line}\n" in err
    for name, flags in names.items():
        is_final = name.startswith("final")
        assert ("--validation_from_train" in flags) != is_final and ("--write_eval_predictions" in flags) == is_final
    report = (bench.folder / "out" / "report" / "report.md").read_text()
    assert "| LoRA r=8   |" in report and "## Differences from LoRA r=8" in report
    assert "below LoRA r=8 by more than seeds explain: BitFit, head alone." in report
    assert "with one seed, except for head alone on RTE (none was tried)." in report
    code, _, err = bench.run()  # all has ended, also the run that diverged
    assert code == 0 and bench.journal() == names and "starts" not in err


def test_a_rate_that_failed_is_tried_again_before_its_method_goes_on(bench):
    (bench.folder / "pretend.py").write_text(
        PRETEND.replace("name = ", "if Path('broken').exists() and rate == 4e-3: sys.exit(9)\nname = ")
    )
    (bench.folder / "broken").touch()
    code, _, err = bench.run()
    assert code == 2 and "choosing/rte/LoRA_r=8/4e-3/seed_0 failed with status 9" in err
    assert "Failed: choosing/rte/LoRA_r=8/4e-3/seed_0. The same command tries again." in err
    assert "no run of LoRA r=8 at a chosen rate has ended: nothing can be compared with it." in err
    assert not any("final/rte/LoRA" in name for name in bench.journal())
    (bench.folder / "broken").unlink()
    (bench.folder / "journal").unlink()
    code, _, err = bench.run()
    assert code == 0, err
    others = {name for name in bench.journal() if "LoRA_r=8" not in name}
    assert others == {"final/rte/BitFit/2e-3/seed_2"}  # whether it is near was not known


def test_settings_of_one_method_are_compared_and_what_diverged_at_every_rate_is_said(bench):
    lora = "--apply_lora --lora_r 8 --lora_alpha 16"
    methods = f"LoRA\t2e-3\t{lora}", f"decayed\t2e-3\t{lora} --weight_decay 0.1", "fast\t1e2 1e3\t--apply_bitfit"
    table = [*TABLE.split("method")[:1], *(f"method\t{method}\n" for method in methods)]
    (bench.folder / "table.tsv").write_text("".join(table).replace("seeds\t2\t3", "seeds\t1\t1"))
    decay = 'hyper["weight_decay"] = float(last.get("--weight_decay", 0))\n'
    (bench.folder / "pretend.py").write_text(PRETEND.replace("method = {", decay + "method = {"))
    code, _, err = bench.run()
    assert code == 0, err
    assert "  fast on RTE: no rate; 1e2 diverged; 1e3 diverged\n" in err
    report = (bench.folder / "out" / "report" / "report.md").read_text().replace("\\", "")
    assert "## Differences from LoRA r=8 (weight_decay 0.0)" in report and "| LoRA r=8 (weight_decay 0.1) |" in report
    (bench.folder / "out" / "final" / "rte" / "LoRA" / "2e-3" / "seed_0" / "run.json").write_text("[]")
    code, _, err = bench.run()
    assert code == 2 and "seed_0/run.json: " in err and "Traceback" not in err


def test_nothing_is_started_when_the_first_steps_fail_on_every_task(bench):
    (bench.folder / "pretend.py").write_text("raise SystemExit('no GLUE data')")
    code, _, err = bench.run()
    assert code == 2 and err.count(" starts, log in") == 1 and "no GLUE data" in err
    assert "error: these steps failed on every task: nothing else is started." in err


def test_a_dry_run_prints_the_commands_that_choose_and_flags_after_the_dashes_go_to_each(bench):
    code, out, _ = bench.run("--", "--bf16", DRY_RUN="1")
    assert code == 0 and out.count("run_glue.py") == out.count("--bf16") == 6 and not (bench.folder / "out").exists()


def test_the_time_to_go_counts_each_task_by_the_tokens_of_its_first_steps(program, tmp_path):
    def run(name: str, task: str, *flags: str) -> Any:
        return program.MethodRun([], None, [*flags], tmp_path / name, name, task=task, method="LoRA")

    def end(first: Any, tokens: int) -> None:
        first.state = "done"
        first.folder.mkdir()
        hyper = {"train_samples": 1000, "examples_a_step": 10}
        (first.folder / "run.json").write_text(json.dumps({"hyperparameters": hyper}))
        result = {"num_input_tokens_seen": tokens, "train_seconds": tokens / 100}  # 100 tokens a second
        (first.folder / "train_results.json").write_text(json.dumps(result))

    firsts = [run("speed_cola", "cola"), run("speed_rte", "rte")]
    times = program.Times(firsts)
    runs = [run("a", "cola", "--num_train_epochs", "2"), run("b", "rte", "--max_steps", "50")]
    assert times.seconds_to_go(runs) is None
    end(firsts[0], 400)  # 20 steps of 10 examples: 2 tokens an example
    assert times.seconds_to_go(runs) == pytest.approx(2000 * 2 / 100 + 2 * program.STARTUP_SECONDS)
    end(firsts[1], 2000)
    assert times.seconds_to_go(runs) == pytest.approx(2000 * 2 / 100 + 500 * 10 / 100 + 2 * program.STARTUP_SECONDS)
    runs[0].state = "running"
    times.waiting = [run("c", "rte", "--max_steps", "50")]
    assert times.seconds_to_go(runs) == pytest.approx(25 + 2 * 60)


KEPT = "--validation_from_train is for the row `choosing`: what is reported is on the validation set."
RATES = "RATES are numbers above 0, with spaces between them."


@pytest.mark.parametrize(
    ("old", "new", "expected_message"),
    [
        ("task\trte", "task\tnews", ":6: 'news': is no GLUE task, or listed before."),
        ("task\trte", "tasks\trte", ":6: 'tasks' begins no row: every run, choosing, final, seeds, task, method."),
        ("task\trte", "", ": needs a row `task` and a row `method`"),
        ("method\tBitFit\t", "method\tLoRA, r=8\t", ":8: 'LoRA, r=8': listed before, or under a name that gives"),
        ("BitFit", "lora R=8", ":8: 'lora R=8': listed before, or under a name that gives the same folder."),
        ("head alone", "h" * 300, f":9: '{'h' * 40}'...: too long for the name of a folder."),
        ("1e-3 2e-3 1e3", "1e-3 0.001", ":8: '1e-3 0.001': a rate is listed twice."),
        *(("1e-3 2e-3 1e3", x, f":8: {x!r}: {RATES}") for x in ("fast", "1e-3,2e-3", "1 nan", "inf", "-1", "0")),
        ("1e-3 2e-3 1e3\t", "", f":8: '--apply_bitfit': {RATES}"),
        ("seeds\t2\t3\t2", "seeds\t3\t2\t2", ":5: seeds 3 2: the second is below the first."),
        ("seeds\t2\t3\t2", "seeds\tx\t3\t2", ":5: seeds='x' is not a whole number, 1 or more."),
        ("seeds\t2\t3\t2", "seeds\t2\t3\tnan", ":5: 'nan': POINTS is a number, 0 or more."),
        ("--validation_from_train 100", "", ": rates would be chosen on the set that is reported. Add a row: choosing"),
        ("every run\t", "every run\t--validation_from_train=9 ", f":2: {KEPT}"),
        ("final\t", "final\t--validation_from_train 9 ", f":4: {KEPT}"),
        ("task\trte", "task\trte\t--validation-from-train 9", f":6: {KEPT}"),
        ("--head_only", "--head_only --validation_from_train 9", f":9: {KEPT}"),
        ("--head_only", "--head_only --seed 3", ":9: --seed is set for each run: leave it out."),
        ("--head_only", "--load-best-model-at-end", ":9: --load_best_model_at_end would choose an epoch on the set"),
        ("--head_only", "--max_eval_samples=9", ":9: --max_eval_samples would score a part of a set: leave it out."),
        ("--head_only", "'--head_only", ":9: No closing quotation"),
        ("--head_only", "--head_only\0", ":9: has the character '\\x00': remove it, or type a space."),
        ("--head_only", "--a\xa0--b", ":9: has the character '\\xa0': remove it, or type a space."),
        ("\t--head_only", "\t--head_only\tmore\t", ":9: after 'method', and with tabs between them, come"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_line(program, tmp_path, old, new, expected_message):
    assert old in TABLE
    path = tmp_path / "table.tsv"
    path.write_text(TABLE.replace(old, new))
    with pytest.raises(UserError) as error:
        program.read_plan(path)
    assert f"{path}{expected_message}" in str(error.value)


def test_a_wrong_table_ends_the_program_before_anything_runs(bench):
    (bench.folder / "table.tsv").write_text("")
    code, out, err = bench.run()
    assert code == 2 and err.startswith("compare_methods.sh: error: table.tsv: needs a row `task`") and not out
    assert not (bench.folder / "out").exists()


def test_a_table_of_another_editor_is_read_and_names_are_folders(program, tmp_path):
    path, odd = tmp_path / "table.tsv", '../../..\t1e-3\t--lora_path "{root}/a b"\nmethod\tметод\t1e-3\nmethod\t方法'
    path.write_bytes(b"\xef\xbb\xbf" + TABLE.lstrip().replace("head alone", odd).replace("\n", "\r\n").encode())
    methods = program.read_plan(path).methods
    assert methods[2].flags == ["--lora_path", f"{ROOT}/a b"] and methods[-1].flags == ["--head_only"]
    assert [program.slug(method.name) for method in methods] == ["LoRA_r=8", "BitFit", "__.._..", "метод", "方法"]


def test_choosing_needs_no_validation_set_and_a_killed_comparison_ends_as_one_in_one_go(tiny_model, glue, tmp_path):
    """The real program on a tiny model: first there is no dev.tsv, and it is killed; then it is complete."""
    cola = tmp_path / "glue" / "CoLA"
    cola.mkdir(parents=True)
    (cola / "train.tsv").write_text((glue / "CoLA" / "train.tsv").read_text())
    table = f"""every run	--model_name_or_path {tiny_model} --do_train --do_eval --cache_dir {tmp_path / "cache"}
choosing	--max_steps 2 --validation_from_train 16
final	--max_steps 3
seeds	1	1	0
task	cola
method	LoRA r=4	1e-3 1e-2	--apply_lora --lora_r 4 --lora_alpha 8
"""
    (tmp_path / "table.tsv").write_text(table)
    environment = os.environ | {"PYTHON": sys.executable, "GLUE_DIR": str(tmp_path / "glue"), "devices": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    command = ["bash", str(PROGRAM), str(tmp_path / "table.tsv"), "--output_dir", str(tmp_path / "out")]
    options = {"env": environment, "text": True, "stdin": subprocess.DEVNULL, "cwd": tmp_path}

    killed = subprocess.Popen(command, **options, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: [*tmp_path.glob("out/choosing/cola/*/*/seed_0/run.json")])
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not running(tmp_path / "out"))

    without_dev = subprocess.run(command, **options, capture_output=True)
    assert without_dev.returncode == 2 and "dev.tsv" in without_dev.stderr
    scores = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/choosing/**/eval_results.json")}
    assert len(scores) == 2 and all(json.loads(path.read_text())["eval_samples"] == 16 for path in scores)
    assert not [*tmp_path.glob("out/final/**/eval_results.json")]

    (cola / "dev.tsv").write_text((glue / "CoLA" / "dev.tsv").read_text())
    done = subprocess.run(command, **options, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in scores} == scores
    finals = [*tmp_path.glob("out/final/**/eval_results.json")]
    assert [json.loads(path.read_text())["eval_samples"] for path in finals] == [24]
    report = tmp_path / "out" / "report"
    assert "| LoRA r=4 |" in (report / "report.md").read_text()
    records = [json.loads(line) for line in (report / "runs.jsonl").read_text().splitlines()]
    assert [len(record.get("answers", {}).get("given", ())) for record in records] == [0, 0, 24]


def running(folder: Path) -> list[str]:
    """Processes that write to this folder."""
    found = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True)
    return found.stdout.split()
