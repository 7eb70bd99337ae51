"""One file of runs' records: reports made from it are those made from the run folders."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from run_folders import BITFIT, HEADINGS, LORA, notes_of, read, write, write_run, write_seeds, write_sweep

from lora_nlu.errors import UserError
from lora_nlu.files import flush_and_rename, read_json, write_json
from lora_nlu.report.__main__ import main
from lora_nlu.report.collect import collect
from lora_nlu.report.records import find_records


@pytest.fixture
def study(tmp_path) -> Path:
    """Runs of every kind: done, unfinished, diverged, not of GLUE, evaluations, with many entries in their logs."""
    runs = tmp_path / "runs"
    write_sweep(runs / "sweep", "rte", 2)
    for task in [*HEADINGS][:3]:
        write_seeds(runs / "bitfit", task, (0.1 + 0.2, 1 / 3), method=BITFIT, encoder=102_144)
    for seed, state in enumerate(("stopped", "begun", "unevaluated"), start=3):
        write_run(runs / state, "cola", seed, state=state)
    write_run(runs / "own", "custom")
    write_run(runs / "evaluated", train_samples=0, state="begun")
    log = [{"step": i, "loss": 0.5 + i, "grad_norm": 1.0} for i in range(200)]
    log += [{"step": 200, "epoch": 2.0, "eval_matthews_correlation": 0.4}, {"step": 201, "grad_norm": float("nan")}]
    write(write_run(runs / "diverged", "cola", 6) / "trainer_state.json", {"epoch": 2.0, "log_history": log})
    write(write_run(runs / "long", "cola", 7) / "trainer_state.json", {"epoch": 2.0, "log_history": log[:-1]})
    return runs


def test_a_report_from_the_file_is_the_one_from_the_folders_byte_for_byte(study, tmp_path, capsys):
    assert main(["runs", str(study), "--out", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    shutil.rmtree(study)
    for source, out in ((tmp_path / "a" / "runs.jsonl", "b"), (tmp_path / "b", "c")):  # a file, and a folder with one
        assert main(["runs", str(source), "--out", str(tmp_path / out)]) == 0
        assert capsys.readouterr().out == text.replace(f"{tmp_path}/a", f"{tmp_path}/{out}")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"report.md", "report.csv", "report.tex", "runs.jsonl", "roberta-base_ranks.png"} <= names
    for out in ("b", "c"):
        assert {path.name for path in (tmp_path / out).iterdir()} == names
        assert all((tmp_path / out / n).read_bytes() == (tmp_path / "a" / n).read_bytes() for n in names)
    assert "left out, diverged (grad_norm nan)" in text and "left out, not a GLUE task" in text
    assert "its last checkpoint at epoch 2.5 of 10" in text and "trained, not evaluated" in text


def test_a_line_has_what_a_report_reads_and_no_more_of_the_log(study, tmp_path):
    assert main(["runs", str(study), "--out", str(tmp_path / "a")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a" / "runs.jsonl").read_text().splitlines()]
    by_folder = {line.pop("folder"): line for line in lines}
    assert f"{study}/evaluated" not in by_folder and len(by_folder) == len(lines)
    long = by_folder[f"{study}/long"]
    assert [*long] == ["run.json", "trainer_state.json", "eval_results.json", "train_results.json"]
    assert long["run.json"] == json.loads((study / "long" / "run.json").read_text())
    assert [entry["step"] for entry in long["trainer_state.json"]["log_history"]] == [0, 199, 200]
    assert [*by_folder[f"{study}/begun"]] == ["run.json"]


@pytest.mark.parametrize("kind, name, runs", [("methods", "methods", 319), ("runs", "ranks", 15)])
def test_the_reports_in_results_are_those_of_the_records_beside_them(kind, name, runs, tmp_path):
    folder = Path(__file__).parents[2] / "results" / name
    assert main([kind, str(folder), "--out", str(tmp_path)]) == 0
    for name in ("report.md", "report.csv", "runs.jsonl", *["report.tex"] * (kind == "runs")):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in folder.iterdir() if p.suffix != ".sh"}
    assert len(find_records(folder)[0]) == runs


def test_run_folders_come_before_the_file_that_an_earlier_report_wrote_beside_them(tmp_path):
    run = write_run(tmp_path / "a")
    assert main(["runs", str(tmp_path), "--out", str(tmp_path)]) == 0
    shutil.rmtree(run)
    other = write_run(tmp_path / "b", seed=1)
    assert [record.folder for record in find_records(tmp_path)[0]] == [other]


@pytest.mark.parametrize("line", ["{", "[]", '{"folder": "a"}', '{"run.json": {}}', '{"folder": 1, "run.json": {}}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    main(["runs", str(write_run(tmp_path / "a")), "--out", str(tmp_path / "out")])
    path = tmp_path / "out" / "runs.jsonl"
    text = read(path)
    path.write_text(path.read_text() + line + "\n" + "{\n" * 2)
    (note,) = {*notes_of(read(path))} - {*notes_of(text)}
    assert note.startswith(f"left out: {path}:2: not the record of a run") and note.endswith("So are 2 more lines.")
    path.write_text(line)
    with pytest.raises(UserError, match=r"runs\.jsonl:1: not the record of a run"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "\x1b[31mred"}, "folder is not printable text"),
        ({"run.json": [1]}, "run.json is not an object"),
        ({"run.json": {"task": ["rte"]}}, "task is not printable text"),
        ({"run.json": {"lora": None}}, "lora is not an object"),
        ({"run.json": {"method": {"label": 5}}}, "label is not text"),
        ({"eval_results.json": [1]}, "eval_results.json is not an object"),
        ({"trainer_state.json": {"log_history": [5]}}, "an entry of log_history is not an object"),
    ],
)
def test_a_record_with_a_value_of_another_type_is_named(tmp_path, changes, message):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"folder": "a", "run.json": {"task": "rte"}} | changes) + "\n")
    with pytest.raises(UserError, match=f"runs.jsonl:1: not the record of a run .*{message}"):
        find_records(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_no_text_or_nested_too_deeply_is_refused(tmp_path, content):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"runs\.jsonl"):
        find_records(path)


def test_a_run_in_a_file_and_in_its_folder_counts_once(tmp_path):
    run = write_run(tmp_path / "a")
    main(["runs", str(run), "--out", str(tmp_path / "out")])
    assert read(run, tmp_path / "out") == read(run)


def test_a_folders_name_may_have_spaces_and_joiners_of_any_script(tmp_path):
    for seed, name in enumerate(
        ("\u5b9f\u9a13\u3000\u4e00", "a\u00a0b", "\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u0631")
    ):
        write_run(tmp_path / "runs" / name, seed=seed)
    assert main(["runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    records, notes = find_records(tmp_path / "out" / "runs.jsonl")
    assert len(records) == 4 and not notes


def test_what_a_method_is_called_and_looks_like_divides_no_line(tmp_path):
    """Runs of an earlier version, which recorded neither, and of this one are seeds of one line."""
    write_run(tmp_path / "a", seed=0)
    look = {"label": "LoRA", "color": "#D55E00", "marker": "s"}
    write_run(tmp_path / "b", seed=1, method=LORA | look)
    assert "2 seeds" in read(tmp_path) and "missing" not in read(tmp_path)


def write_again_and_again(output: Path, complete: Path, seed: int) -> None:
    """What a run writes, in its order, afresh each time; of the n-th time every figure and time is n / 1000."""
    run = read_json(complete / "run.json")
    run["hyperparameters"]["seed"] = seed
    del run["trained"]
    for n in range(1, 999):
        figure, run["hyperparameters"]["learning_rate"] = n / 1000, n / 1000
        write_json(output / "run.json", run)
        for name in ("train_results.json", "trainer_state.json", "eval_results.json"):
            (output / name).unlink(missing_ok=True)
        log = [{"step": 10, "epoch": 1, "eval_matthews_correlation": figure}]
        for step in (8, 9, 10):
            write_json(output / ".saving" / "trainer_state.json", {"epoch": step / 1, "log_history": log})
            flush_and_rename(output / ".saving", output / f"checkpoint-{step}")
            shutil.rmtree(output / f"checkpoint-{step - 1}", ignore_errors=True)
        write_json(output / "train_results.json", {"train_seconds": figure})
        write_json(output / "trainer_state.json", {"epoch": 10.0, "log_history": log})
        write_json(output / "run.json", run | {"trained": True})
        write_json(output / "eval_results.json", {"eval_matthews_correlation": figure})
        shutil.rmtree(output / "checkpoint-10")


def test_a_report_while_runs_are_written_has_no_error_and_no_half_of_a_run(tmp_path):
    fork = multiprocessing.get_context("fork")
    complete = write_run(tmp_path / "complete", seed=9, learning_rate=1.0)
    writers = []
    for seed in range(3):
        arguments = (tmp_path / str(seed) / "output", complete, seed)
        writers.append(fork.Process(target=write_again_and_again, args=arguments, daemon=True))
        writers[-1].start()
    seen, reports, end = set(), 0, time.monotonic() + 2
    while time.monotonic() < end or not seen:
        cells, notes = collect([tmp_path])
        assert not [note for note in notes if "left out" in note or "missing" in note], notes
        reports += 1
        for run in (run for cell in cells for run in cell.done if run.folder.name == "output"):
            rate = dict(run.settings)["learning_rate"]
            assert run.last == run.best == 100 * float(rate) and run.seconds == float(rate)
            seen.add(rate)
        assert all(writer.is_alive() for writer in writers)
    for writer in writers:
        writer.kill()
        writer.join()
    assert reports > 3 and len(seen) > 1
