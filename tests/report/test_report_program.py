"""The program: what it prints, its errors, and what it imports."""

import json
import os
import subprocess
import sys

import pytest
from run_folders import BITFIT, LORA, notes_of, read, refusal, rows_of, write, write_run

from lora_nlu.report.__main__ import main


def test_the_program_prints_the_report_and_where_it_is(small, written, capsys):
    assert main([str(small)]) == 0
    printed = capsys.readouterr()
    assert printed.out == read(small) and not printed.err
    gone = written / "gone"
    assert main([str(written.parents[1] / "runs" / "0"), str(gone), "--out", str(written.parent / "again")]) == 0
    printed = capsys.readouterr().out
    assert f"- missing: {gone}\n" in printed and printed.endswith(f"Written to {written.parent}/again.\n")
    assert (written.parent / "again" / "report.md").read_text() in printed


BROKEN = {
    "cut": ("run.json", '{"task": "co', "run.json: can't be read"),
    "a list": ("run.json", "[]", "run.json: contains a JSON list; expected an object."),
    "cut results": ("eval_results.json", "{", "eval_results.json: can't be read"),
    "no figure": (
        "eval_results.json",
        '{"eval_loss": 1}',
        "no eval_matthews_correlation in it. Evaluate the run again",
    ),
    "cut state": ("trainer_state.json", "", "trainer_state.json: can't be read"),
    "not UTF-8": ("train_results.json", "\udcff", "train_results.json: can't be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incomplete_file_ends_the_program_with_1_and_is_named(tmp_path, capsys, case):
    name, content, message = BROKEN[case]
    write_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(content, errors="surrogateescape")
    assert main([str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"lora_nlu.report: error: {tmp_path}/a/") and message in printed.err
    assert not printed.out and not (tmp_path / "out").exists()
    write_run(tmp_path / "b")
    good = read(tmp_path / "b")
    (note,) = {*notes_of(read(tmp_path))} - {*notes_of(good)}
    assert note.startswith(f"left out: {tmp_path}/a/{name}: ") and message.split(" in it")[0][-20:] in note
    assert rows_of(read(tmp_path)) == rows_of(good)


@pytest.mark.parametrize("key", ["method", "parameters", "lora"])
def test_a_run_of_an_older_version_is_refused_naming_what_it_lacks(tmp_path, key):
    record = json.loads((write_run(tmp_path / "a") / "run.json").read_text())
    del record[key]
    write(tmp_path / "a" / "run.json", record)
    message = f"{tmp_path}/a/run.json: '{key}' is missing: maybe an older version wrote it."
    assert refusal(tmp_path / "a") == f"{message} Train the run again, or leave it out."
    assert f"left out: {message}" in refusal(tmp_path)


def test_folders_without_any_run_and_an_out_that_is_a_file_end_the_program_with_1(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "gone")]) == 1
    why = f"missing: {tmp_path}, no training run in it\nmissing: {tmp_path}/gone"
    expected_message = f"no training run on a GLUE task. Give output folders of run_glue.py.\n{why}\n"
    assert capsys.readouterr().err == f"lora_nlu.report: error: {expected_message}"
    write_run(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    assert main([str(tmp_path), "--out", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [["runs"], ["--out", "out", "runs"], ["runs", "--out", "out"]])
def test_a_folder_with_the_name_of_a_command_is_read_as_before(tmp_path, monkeypatch, capsys, words):
    write_run(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "LoRA r=8" in printed.out and "missing" not in printed.out
    assert printed.err == "lora_nlu.report: 'runs' is taken as the folder of that name.\n"
    assert (tmp_path / "out" / "report.md").is_file() == ("--out" in words)


def test_a_folder_with_the_name_of_a_command_that_has_operands_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    for folder in ("runs", "similarity", "other"):
        write_run(tmp_path / folder / "a", method=LORA if folder == "other" else BITFIT)
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "other"]) == 0
    printed = capsys.readouterr()
    assert "LoRA r=8" in printed.out and "BitFit" not in printed.out
    note = "lora_nlu.report: {0!r} is taken as the command, not as the folder of that name; ./{0} is the folder.\n"
    assert printed.err == note.format("runs")
    assert main(["similarity", "other"]) == 0  # the command needs two adapters
    printed = capsys.readouterr()
    assert "LoRA r=8" in printed.out and "BitFit" in printed.out
    assert printed.err == "lora_nlu.report: 'similarity' is taken as the folder of that name.\n"
    assert main(["similarity", "other", "gone"]) == 1
    assert capsys.readouterr().err.startswith(note.format("similarity") + "lora_nlu.report: error: ")


def test_options_may_stand_before_the_command(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "glue.zip"), "submission", str(tmp_path)]) == 1
    assert f"{tmp_path}: no run in it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["runs", "submission", "similarity"])
def test_every_command_has_a_help_with_an_example(capsys, command):
    for words in ([command, "-h"], ["-h"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    own, overview = capsys.readouterr().out.split("usage: ")[1:]
    assert (
        f"example: python -m lora_nlu.report {command} " in own and f"python -m lora_nlu.report {command} " in overview
    )


@pytest.mark.parametrize("arguments", [[], ["--out", "x"], ["a", "--partial"], ["a", "--what"]])
def test_a_command_line_that_is_wrong_ends_with_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m lora_nlu.report" in capsys.readouterr().err


def test_the_module_runs_as_a_program_without_torch_and_without_a_display(tmp_path):
    write_run(tmp_path / "runs" / "a", figures=(0.5, 0.6))
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-X", "importtime", "-m", "lora_nlu.report", "runs", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("Written to out.\n"), done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"lora_nlu.report.pictures", "matplotlib"} <= imported and not {
        "torch",
        "transformers",
        "datasets",
    } & imported
    assert (tmp_path / "out" / "roberta-base_curves.png").is_file()
