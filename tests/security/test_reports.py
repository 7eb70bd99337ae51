"""Run records that somebody else wrote: what they name stays text in every file of a report."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from report.run_folders import LORA, notes_of, refusal, write_run

from lora_nlu.errors import UserError
from lora_nlu.files import read_json
from lora_nlu.report.__main__ import main
from lora_nlu.report.submission import find_runs
from lora_nlu.training.checkpoints import complete_checkpoints
from lora_nlu.training.file_list import listed_files

NASTY = "x\n\\input{x}\n## a | <script>\x1b[2J=1"


@pytest.fixture
def files(tmp_path, capsys) -> dict[str, str]:
    """The report's files on two runs with such names, and what the program prints."""
    for seed in (0, 1):
        folder = write_run(tmp_path / "runs" / f"=1+1\n\\input{{x}}{seed}", "rte", seed, method={"name": NASTY})
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | {"base_model": f"/models/={NASTY}"}))
    write_run(tmp_path / "runs" / "left\nout", "other\x1b[2J")
    assert main(["runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    screen = capsys.readouterr().out
    return {path.suffix: path.read_text() for path in (tmp_path / "out").glob("report.*")} | {"screen": screen}


def test_names_in_run_records_start_no_line_and_no_command_in_a_report(files):
    assert {*files} == {".md", ".tex", ".csv", "screen"}
    for name, text in files.items():
        assert all(line.isprintable() for line in text.split("\n")), name
        assert not any(line.startswith(("\\input", "## a", "out")) for line in text.split("\n")), name
    assert "\\input" not in "".join(line for line in files[".tex"].split("\n") if not line.startswith("%"))
    assert "<script>" not in files[".md"] and "textbackslash{}n" in files[".tex"]


def test_names_in_run_records_are_no_formulas_in_csv(files):
    rows = [*csv.DictReader(files[".csv"].splitlines())]
    assert len(rows) == 2
    for row in rows:
        assert row["model"].startswith("'=x\\n")
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())


# Valid JSON of other types than a run writes: a file, the place in it, a value for that place, a part of the message
TYPES: list[tuple[str, tuple[str | int, ...], Any, str]] = [
    ("run.json", ("task",), [], "task is not printable text"),
    ("run.json", ("hyperparameters",), [], "hyperparameters is not an object"),
    ("run.json", ("hyperparameters", "seed"), "x", "seed is not a count"),
    ("run.json", ("hyperparameters", "num_train_epochs"), None, "num_train_epochs is not a number"),
    ("run.json", ("hyperparameters", "loraplus_lr_ratio"), "x", "loraplus_lr_ratio is not a number"),
    ("run.json", ("left_at_default",), None, "left_at_default is not a list"),
    ("run.json", ("lora", "scalings"), ["x"], "an entry of scalings is not a number"),
    ("run.json", ("lora",), {"ranks": [8], "lora_relative_query": False}, "'scalings' is missing"),
    ("run.json", ("method", "targets"), [5], "an entry of targets is not printable text"),
    ("run.json", ("method", "layers"), 5, "layers is not a list"),
    ("run.json", ("base_fingerprint",), "\n\\input{x}", "base_fingerprint is not a digest"),
    ("run.json", ("parameters", "encoder"), -1, "encoder is not a count"),
    ("eval_results.json", ("eval_matthews_correlation",), 10**400, "an integer of 401 digits"),
    ("eval_results.json", ("eval_matthews_correlation",), 1e300, "no eval_matthews_correlation in it"),
    ("eval_results.json", ("eval_samples",), "x", "eval_samples is not a count"),
    ("trainer_state.json", ("log_history",), [5], "an entry of log_history is not an object"),
    ("trainer_state.json", ("log_history", 1, "step"), "x", "step is not a count"),
    ("train_results.json", ("train_seconds",), "x", "train_seconds is not a number"),
    ("train_results.json", ("peak_memory_gib",), float("inf"), "peak_memory_gib is not a number"),
]  # fmt: skip


def damage(path: Path, place: tuple[str | int, ...], value: Any) -> None:
    content = read_json(path)
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))


def test_a_run_with_a_value_of_another_type_is_left_out_by_name_of_a_report_and_a_submission(tmp_path, capsys):
    for number, (name, place, value, _) in enumerate(TYPES):
        damage(write_run(tmp_path / "runs" / f"{number:02}", seed=number) / name, place, value)
    method = LORA | {"label": "LoRA", "color": "rm", "marker": "--"}  # neither a color nor a marker of matplotlib
    good = write_run(
        tmp_path / "runs" / "good", seed=99, method=method, model="\N{LATIN SMALL LETTER E WITH ACUTE}" * 190
    )
    log = read_json(good / "trainer_state.json")
    del log["log_history"][2]["step"]
    (good / "trainer_state.json").write_text(json.dumps(log))
    for folder in ("checkpoint-\N{SUPERSCRIPT TWO}", "checkpoint-x"):
        (good / folder).mkdir()
        (good / folder / "trainer_state.json").write_text("{")
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    notes = notes_of(capsys.readouterr().out)
    for number, (*_, message) in enumerate(TYPES):
        (note,) = [note for note in notes if f"left out: {tmp_path}/runs/{number:02}/" in note]
        assert message.replace("_", "") in note.replace("\\", "").replace("_", ""), note
    assert len([*csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines())]) == 1
    assert "input" not in (tmp_path / "out" / "report.tex").read_text().replace(r"\\input", "")
    runs, damaged = find_runs([tmp_path / "runs"])
    assert good in [run.folder for run in runs] and len(runs) + len(damaged) == len(TYPES) + 1
    (tmp_path / "m.jsonl").write_text('{"folder": "a", "run.json": ' + "[" * 900 + "]" * 900 + "}")
    assert "run.json is not an object" in refusal(tmp_path / "m.jsonl")


def test_records_of_different_runs_with_one_folder_all_count(tmp_path, monkeypatch, capsys):
    """As two machines write them, with relative folders."""
    for machine, figures in (("a", (0.5, 0.6)), ("b", (0.8, 0.9))):
        (tmp_path / machine).mkdir()
        monkeypatch.chdir(tmp_path / machine)
        write_run(Path("out", "run"), seed=ord(machine), figures=figures)
        assert main(["out", "--out", "report"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["a/report/runs.jsonl", "b/report", "b/report/runs.jsonl", "--out", "c"]) == 0
    text = capsys.readouterr().out
    assert "2 seeds" in text and "each of which counts: a/report/runs.jsonl:1, b/report/runs.jsonl:1" in text
    assert main(["c"]) == 0 and "2 seeds" in capsys.readouterr().out
    damage_line = (tmp_path / "b" / "report" / "runs.jsonl").read_text().replace('"seed": 98', '"seed": 97')
    (tmp_path / "b" / "report" / "runs.jsonl").write_text(damage_line)
    text = refusal(Path("a/report/runs.jsonl"), Path("b/report/runs.jsonl"))
    assert text.startswith("a/report/runs.jsonl:1 and b/report/runs.jsonl:1 are the same run with the same seed")


def test_a_pipe_or_a_huge_file_in_the_place_of_a_runs_file_is_named_and_not_read(tmp_path, capsys):
    """Opening a pipe that nobody writes to would wait for ever."""
    write_run(tmp_path / "good")
    for number, name in enumerate(["run.json", "eval_results.json", "trainer_state.json"], start=1):
        for kind, make in (("pipe", os.mkfifo), ("huge", lambda path: (path.touch(), os.truncate(path, 2**40)))):
            path = write_run(tmp_path / f"{kind}_{name}", seed=number) / name
            path.unlink()
            make(path)
    assert main([str(tmp_path)]) == 0
    notes = [note for note in notes_of(capsys.readouterr().out) if note.startswith("left out")]
    assert sum("it is no regular file" in note for note in notes) == 3
    assert sum("it has 1,099,511,627,776 bytes" in note for note in notes) == 3
    runs, damaged = find_runs([tmp_path])
    assert len(runs) == 1 and len(damaged) == 6
    checkpoint = tmp_path / "good" / "checkpoint-5"
    checkpoint.mkdir()
    os.mkfifo(checkpoint / "files.json")
    assert complete_checkpoints(str(tmp_path / "good")) == [] and listed_files(checkpoint) is None
    with pytest.raises(UserError, match="it is no regular file"):
        find_runs([tmp_path / "pipe_run.json"])
