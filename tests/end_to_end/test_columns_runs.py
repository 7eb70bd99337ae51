"""Which columns, rows and how much of each text a run reads: named, chosen and printed, from flags to files."""

import csv
import json
import random
from pathlib import Path

import pytest
from runs import LORA, sentence
from test_run_glue import read, succeeded

STILL = ["--learning_rate", "1e-12", "--max_steps", "1", "--max_seq_length", "64", "--save_strategy", "no"]


def write_table(path: Path, header: str, rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


@pytest.fixture
def setfit(tmp_path) -> list[object]:
    """Flags of training, validation and test files in SetFit's layout: the label's name stands beside its number."""
    flags: list[object] = []
    for seed, (flag, rows) in enumerate((("--train_file", 24), ("--validation_file", 12), ("--test_file", 6))):
        rng = random.Random(seed)
        labels = [i % 3 == 0 for i in range(rows)]
        table = [(sentence(rng), str(int(label)), "positive" if label else "negative") for label in labels]
        flags += [flag, write_table(tmp_path / f"{flag.strip('-')}.csv", "text,label,label_text", table)]
    return flags


DO = ["--do_train", "--do_eval", "--do_predict"]


def test_a_run_on_setfits_layout_stops_until_text_columns_and_label_column_name_its_columns(setfit, call, tmp_path):
    flags = [*setfit, *LORA, *STILL, *DO, "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert outcome.code == 1 and outcome.err.count("\n") < 3 and str(setfit[1]) in outcome.err
    assert "text, label, label_text" in outcome.err and "--text_columns" in outcome.err
    lines = succeeded(call(*flags, "--text_columns", "text")).out.splitlines()
    for line in (
        "train: 24 rows, text in 'text', labels in 'label': 0 16, 1 8.",
        "validation: 12 rows, text in 'text', labels in 'label': 0 8, 1 4.",
        "test: 6 rows, text in 'text'; its labels in 'label' are not read.",
    ):
        assert lines.count(line) == 1, lines
    flags += ["--text_columns", "text", "--label_column", "label_text", "--overwrite_output_dir"]
    lines = succeeded(call(*flags)).out.splitlines()
    assert "train: 24 rows, text in 'text', labels in 'label_text': negative 16, positive 8." in lines
    assert read(tmp_path / "o" / "run_metadata.json")["labels"] == ["negative", "positive"]


def test_a_run_whose_text_columns_contain_the_labels_name_is_refused(setfit, call, tmp_path):
    for columns in ("label_text", "text,label_text"):
        outcome = call(*setfit, *LORA, *DO, "--text_columns", columns, "--output_dir", tmp_path / "o")
        assert outcome.code == 1 and "column 'label_text' has one value for each label" in outcome.err


def test_a_run_whose_text_and_labels_are_swapped_stops_and_names_the_column_the_count_and_the_flags(call, tmp_path):
    rng = random.Random(0)
    rows = [(["no", "yes"][i % 2], sentence(rng, f"and {i}")) for i in range(40)]
    flags: list[object] = [*LORA, *STILL, "--output_dir", tmp_path / "o"]
    file = write_table(tmp_path / "a.csv", "text,label", rows)
    right_order = write_table(tmp_path / "b.csv", "text,label", [(text, label) for label, text in rows])
    for files in (
        ["--train_file", file, "--do_train"],
        ["--train_file", right_order, "--validation_file", file, *DO[:2]],
    ):
        outcome = call(*flags, *files)
        assert outcome.code == 1 and f"{file}: column 'label' has 40 different labels in 40 rows" in outcome.err
        assert "--label_column" in outcome.err and "--text_columns" in outcome.err and len(outcome.err) < 600
    names = ["--label_column", "text", "--text_columns", "label"]
    assert "labels in 'text': no 20, yes 20." in succeeded(call(*flags, "--train_file", file, "--do_train", *names)).out


@pytest.mark.parametrize("flag", ["--train_file", "--validation_file"])
def test_a_run_on_numbers_that_are_all_the_same_is_refused_by_file(flag, call, tmp_path):
    rng, files = random.Random(0), []
    for name in ("--train_file", "--validation_file"):
        rows = [(sentence(rng), "0.5" if name == flag else f"{i / 2}") for i in range(12)]
        files += [name, write_table(tmp_path / f"{name[2:]}.csv", "text,label", rows)]
    outcome = call(*LORA, *STILL, *files, *DO[:2], "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and f"{flag[2:]}.csv: every label in column 'label' is 0.5" in outcome.err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--text_columns", "a,b,c"], ["--text_columns a,b,c", "two"]),
        (["--text_columns", "a,a"], ["--text_columns a,a", "different"]),
        (["--text_columns", "a,label"], ["--text_columns a,label", "label"]),
        (["--text_columns", "a", "--label_column", "a"], ["--text_columns a"]),
        (["--sample_seed", "-1", "--max_train_samples", "4"], ["--sample_seed -1"]),
    ],
)
def test_columns_and_samples_that_fit_nothing_are_a_wrong_command_line(flags, parts, setfit, call, tmp_path):
    outcome = call(*setfit, *LORA, *DO, *flags, "--output_dir", tmp_path / "o")
    assert outcome.code == 2 and all(part in outcome.err for part in parts), outcome


@pytest.mark.parametrize("flags", [["--text_columns", "sentence1,sentence2"], ["--label_column", "label"]])
def test_columns_of_a_task_are_its_own(flags, call, glue, tmp_path):
    task = ["--task_name", "rte", "--glue_dir", glue, "--do_train", *LORA, "--output_dir", tmp_path / "o"]
    outcome = call(*task, *flags)
    assert outcome.code == 2 and flags[0] in outcome.err and "rte" in outcome.err


def test_a_run_on_a_glue_task_prints_its_columns_labels_and_counts_too(call, glue, tmp_path):
    for task, line in (
        ("rte", "text in 'sentence1' and 'sentence2', labels in 'label': entailment "),
        ("cola", "text in 'sentence', labels in 'label': unacceptable "),
        ("stsb", "text in 'sentence1' and 'sentence2', labels in 'score', a regression: numbers from 0 to 5."),
    ):
        flags = ["--task_name", task, "--glue_dir", glue, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / task]
        assert f"train: 48 rows, {line}" in succeeded(call(*flags)).out


def test_a_run_warns_of_an_adapter_that_was_trained_on_other_text_columns(call, tmp_path):
    rng = random.Random(0)
    rows = [(sentence(rng), sentence(rng), ["no", "yes"][i % 2]) for i in range(12)]
    pair = write_table(tmp_path / "pair.csv", "sentence1,sentence2,label", rows)
    succeeded(call("--train_file", pair, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "a"))
    for name in ("run.json", "run_metadata.json"):
        assert read(tmp_path / "a" / name)["text_columns"] == ["sentence1", "sentence2"]
    single = write_table(tmp_path / "single.csv", "sentence,label", [row[1:] for row in rows])
    adapter = ["--lora_path", tmp_path / "a", "--max_seq_length", "64"]
    trained = f"{tmp_path / 'a'}: was trained on text in 'sentence1' and 'sentence2'; here it is in "
    for n, (file, more, here) in enumerate(
        (
            (single, [], "'sentence'."),
            (pair, ["--text_columns", "sentence2,sentence1"], "'sentence2' and 'sentence1'."),
            (pair, ["--text_columns", "sentence2"], "'sentence2'."),
            (pair, [], None),
        )
    ):
        for split, flags in (
            ("validation", ["--do_eval"]),
            ("test", ["--do_predict"]),
            ("train", ["--do_train", *STILL]),
        ):
            output = ["--output_dir", tmp_path / f"{split}{n}"]
            outcome = succeeded(call(f"--{split}_file", file, *flags, *more, *adapter, *output))
            lines = [line for line in outcome.out.splitlines() if "was trained on text in" in line]
            assert lines == ([] if here is None else [trained + here])
    metadata = read(tmp_path / "a" / "run_metadata.json")
    del metadata["text_columns"]  # an older version's
    (tmp_path / "a" / "run_metadata.json").write_text(json.dumps(metadata))
    outcome = succeeded(call("--validation_file", single, "--do_eval", *adapter, "--output_dir", tmp_path / "old"))
    assert "was trained on text in" not in outcome.out


# ---------------------------------------------------------------------------------------------------- chosen examples


@pytest.fixture
def sorted_files(tmp_path) -> list[object]:
    """Flags of files sorted by label, as many exports are."""
    rng, flags = random.Random(0), []
    for flag in ("train", "validation", "test"):
        rows = [(sentence(rng), label) for label in ["bad"] * 20 + ["good"] * 20]
        flags += [f"--{flag}_file", write_table(tmp_path / f"{flag}.csv", "text,label", rows)]
    return flags


@pytest.mark.parametrize("limit", ["--max_train_samples", "--max_eval_samples"])
def test_a_single_class_chosen_of_a_sorted_file_is_refused_and_a_seed_draws_both(limit, sorted_files, call, tmp_path):
    flags = [*sorted_files, *LORA, *STILL, *DO, limit, "8", "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert outcome.code == 1 and "all have the label 'bad'" in outcome.err and "--sample_seed" in outcome.err
    assert limit in outcome.err and outcome.err.count("\n") < 3
    out = succeeded(call(*flags, "--sample_seed", "1")).out
    split = "train" if "train" in limit else "validation"
    (line,) = [line for line in out.splitlines() if line.startswith(f"{split}: 8 rows (drawn of 40)")]
    assert "bad" in line and "good" in line


def test_the_first_rows_stay_the_convention_and_test_rows_are_never_drawn(sorted_files, call, glue, tmp_path):
    task = ["--task_name", "rte", "--glue_dir", glue, *LORA, *STILL, *DO, "--output_dir", tmp_path / "rte"]
    limits = ["--max_train_samples", "30", "--max_eval_samples", "12", "--max_predict_samples", "4"]
    out = succeeded(call(*task, *limits)).out
    for split, rows, total in (("train", 30, 48), ("validation", 12, 24), ("test", 4, 10)):
        assert f"{split}: {rows} rows (the first of {total})" in out
    flags = [*sorted_files, *LORA, *STILL, *DO, *limits, "--sample_seed", "0", "--output_dir", tmp_path / "o"]
    assert "test: 4 rows (the first of 40)" in succeeded(call(*flags)).out


def test_another_sample_seed_is_another_run_only_where_it_draws_what_is_trained_on(sorted_files, call, tmp_path):
    flags = [*sorted_files, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "o", "--max_train_samples"]
    succeeded(call(*flags, "8", "--sample_seed", "1"))
    assert read(tmp_path / "o" / "run.json")["hyperparameters"]["sample_seed"] == 1
    outcome = call(*flags, "8", "--sample_seed", "2")
    assert outcome.code == 1 and "sample_seed 1, now 2" in outcome.err
    succeeded(call(*flags, "99", "--sample_seed", "1", "--overwrite_output_dir"))
    assert "sample_seed" not in read(tmp_path / "o" / "run.json")["hyperparameters"]
    out = succeeded(call(*flags, "99", "--sample_seed", "2")).out
    assert "already trained" in out and "--sample_seed has no effect here: every row is read." in out


# ------------------------------------------------------------------------------------------------------- long texts


def test_texts_that_are_cut_are_reported_in_one_line_per_split_each_time(call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, *LORA, *STILL, *DO, "--max_seq_length", "24"]
    for folder in ("first", "from the cache"):
        out = succeeded(call(*flags, "--output_dir", tmp_path / folder)).out
        cut = [line for line in out.splitlines() if "are cut at --max_seq_length 24; the longest has " in line]
        assert [line.split(":")[0] for line in cut] == ["train", "validation", "test"]
        assert " of 48 examples" in cut[0] and " of 24 examples" in cut[1] and " of 10 examples" in cut[2]
    long = [*flags[:-1], "64", "--output_dir", tmp_path / "complete"]
    assert "are cut at" not in succeeded(call(*long)).out


def test_a_cell_longer_than_the_csv_modules_limit_is_trained_on(call, tmp_path):
    rows = [("the cat sees " * 11_000, "yes"), ("the dog", "no"), ("the bird", "yes")]
    file = write_table(tmp_path / "long.csv", "text,label", rows)
    out = succeeded(call("--train_file", file, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "o")).out
    assert "train: 1 of 3 examples are cut at --max_seq_length 64; the longest has " in out


# ----------------------------------------------------------------------------------------------- a task's other names


@pytest.mark.parametrize(("written", "task"), [("RTE", "rte"), ("STS-B", "stsb"), ("CoLA", "cola"), ("sts-b", "stsb")])
def test_a_task_may_be_written_as_papers_and_the_server_write_it(written, task, call, glue, tmp_path):
    flags = ["--glue_dir", glue, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "o"]
    out = succeeded(call("--task_name", written, *flags)).out
    assert f"--task_name {written} is now --task_name {task}" in out
    assert json.loads((tmp_path / "o" / "run.json").read_text())["task"] == task
    outcome = call(f"--task_name={written}x", *flags)
    assert outcome.code == 2 and f"{task}x" in outcome.err
