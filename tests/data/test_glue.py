"""GLUE's files as published: their tables, and errors with file and line."""

import csv
import os
import time
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
from data_files import BOM, LAYOUTS, STSB_FRONT, assert_table, refusal, tsv, write
from datasets import Dataset

from lora_nlu.data.glue import load_glue, load_glue_folder
from lora_nlu.data.tasks import TASKS
from lora_nlu.errors import UserError

ROOT = Path(__file__).parents[2]
GLUE = Path(os.environ.get("GLUE_DIR") or ROOT.parent / "shared" / "glue")
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE download at {GLUE}; set GLUE_DIR")


def glue(folder: Path, task: str, split: str) -> Dataset:
    return load_glue_folder(str(folder), TASKS[task], [split]).splits[split]


def test_the_layouts_here_are_of_all_ten_tasks():
    assert {layout[0] for layout in LAYOUTS} == set(TASKS) and len(TASKS) == 10


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[2])
@pytest.mark.parametrize("variant", ["as published", "with a byte-order mark", "with Windows line ends"])
def test_a_file_in_the_published_layout_gives_its_text_and_the_hubs_label_ids(tmp_path, layout, variant):
    task, split, file, lines, text, text_pair, label = layout
    content = tsv(*lines).encode()
    if variant == "with a byte-order mark":
        content = BOM + content
    elif variant == "with Windows line ends":
        content = content.replace(b"\n", b"\r\n")
    write(tmp_path / file, content)
    table = glue(tmp_path, task, split)
    assert_table(table, text, text_pair, label)
    if label is not None:
        assert [type(value) for value in table["label"]] == [float if task == "stsb" else int] * len(label)


def test_load_glue_reads_both_sets_of_mnli_and_returns_the_labels_in_id_order(tmp_path):
    for _, _, file, lines, *_ in LAYOUTS:
        write(tmp_path / file, tsv(*lines))
    examples = load_glue("mnli", ["validation", "test"], str(tmp_path))
    assert list(examples.splits) == ["validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    assert examples.labels == ("entailment", "neutral", "contradiction") and not examples.is_regression
    assert load_glue("stsb", ["train"], str(tmp_path)).is_regression


def test_quotes_are_characters_and_none_na_and_null_are_words(tmp_path):
    texts = [
        '"An open quote',
        'He said "no',
        '""',
        "None",
        "NA",
        "null",
        "nan",
        "N/A",
        "",
        " ",
        "a\x0bb",
        "a\x85b\u2028c",
    ]
    write(tmp_path / "SST-2/train.tsv", tsv("sentence | label") + "".join(f"{text}\t1\n" for text in texts))
    assert_table(glue(tmp_path, "sst2", "train"), texts, None, [1] * len(texts))


def test_broken_lines_of_qqp_are_left_out_as_the_hub_does(tmp_path):
    write(
        tmp_path / "QQP/train.tsv",
        tsv(
            "id | qid1 | qid2 | question1 | question2 | is_duplicate",
            "1 | 1 | 2 | Why? | How? | 0",
            "2 | 3 | 4 | A question that goes on",
            "on a second line? | How? | 1",
            "3 | 5 | 6 | Who? | What? | 1",
        ),
    )
    assert_table(glue(tmp_path, "qqp", "train"), ["Why?", "Who?"], ["How?", "What?"], [0, 1])


def test_a_qqp_file_cut_in_its_last_line_is_refused_for_all_that(tmp_path):
    header = "id | qid1 | qid2 | question1 | question2 | is_duplicate"
    path = write(tmp_path / "QQP/train.tsv", tsv(header, "1 | 1 | 2 | Why? | How? | 0", "2 | 3 | 4 | Who"))
    assert f"{path}:3:" in refusal(glue, tmp_path, "qqp", "train")


REAL = {
    "cola": ["train", "validation", "test"],
    "rte": ["train", "validation", "test"],
    "sst2": ["train", "validation", "test"],
    "stsb": ["train", "validation"],
    "wnli": ["train", "validation", "test"],
}


@needs_glue
@pytest.mark.parametrize("task, split", [(task, split) for task in REAL for split in REAL[task]])
def test_the_published_files_have_the_tables_row_counts_and_read_as_pandas_reads_them(task, split):
    table = glue(GLUE, task, split)
    assert len(table) == TASKS[task].rows[split]
    headerless = task == "cola" and split != "test"
    frame = pd.read_csv(
        GLUE / TASKS[task].files[split][0],
        sep="\t",
        quoting=csv.QUOTE_NONE,
        keep_default_na=False,
        dtype=str,
        **({"header": None, "names": ["source", "label", "mark", "sentence"]} if headerless else {}),
    )
    assert len(frame) == len(table)
    columns = ["sentence"] if task in ("cola", "sst2") else ["sentence1", "sentence2"]
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        assert table[:][name] == frame[column].tolist()
    if split == "test":
        assert "label" not in table.column_names
    elif task == "stsb":
        assert table[:]["label"] == frame["score"].astype(float).tolist()
    else:
        ids = {"entailment": 0, "not_entailment": 1} if task == "rte" else {"0": 0, "1": 1}
        assert table[:]["label"] == frame["label"].map(ids).tolist()


RTE = tsv("index | sentence1 | sentence2 | label", "0 | A | B | entailment", "1 | C | D | not_entailment")
STSB = tsv(STSB_FRONT + " | score", "0 | main | MSRvid | 2012 | 0001 | none | none | A | B | {}")
BAD_GLUE = {
    "an empty file": ("rte", "RTE/train.tsv", b"", "{path}: "),
    "only line ends": ("rte", "RTE/train.tsv", b"\n\n", "{path}: "),
    "only a byte-order mark": ("rte", "RTE/train.tsv", BOM, "{path}: "),
    "only a header": ("rte", "RTE/train.tsv", RTE.split("\n")[0] + "\n", "{path}: "),
    "no final line end": ("rte", "RTE/train.tsv", RTE[:-1], "{path}:3: "),
    "cut inside a label": ("rte", "RTE/train.tsv", RTE[:-4], "{path}:3: "),
    "cut inside a line": ("rte", "RTE/train.tsv", RTE[:-18], "{path}:3: "),
    "a line cut, then ended": ("rte", "RTE/train.tsv", RTE[:-18] + "\n", "{path}:3: "),
    "a short line amid": ("rte", "RTE/train.tsv", RTE.replace("A\tB\t", "A\t"), "{path}:2: "),
    "a long line amid": ("rte", "RTE/train.tsv", RTE.replace("A\tB\t", "A\tB\tB\t"), "{path}:2: "),
    "an empty line": ("rte", "RTE/train.tsv", RTE + "\n", "{path}:4: "),
    "another task's header": ("rte", "RTE/train.tsv", "sentence\tlabel\nA\t1\n", "{path}:1: "),
    "no header": ("rte", "RTE/train.tsv", RTE.split("\n", 1)[1], "{path}:1: "),
    "a test file for training": ("rte", "RTE/train.tsv", "index\tsentence1\tsentence2\n0\tA\tB\n", "{path}:1: "),
    "a strange label": ("rte", "RTE/train.tsv", RTE.replace("not_entailment", "neutral"), "{path}:3: "),
    "a label as a number": ("rte", "RTE/train.tsv", RTE.replace("not_entailment", "1"), "{path}:3: "),
    "a hidden label": ("sst2", "SST-2/train.tsv", "sentence\tlabel\nA\t1\nB\t-1\n", "{path}:3: "),
    "an empty label": ("sst2", "SST-2/train.tsv", "sentence\tlabel\nA\t1\nB\t\n", "{path}:3: "),
    "a label beyond": ("sst2", "SST-2/train.tsv", "sentence\tlabel\nA\t1\nB\t2\n", "{path}:3: "),
    "a header in CoLA": ("cola", "CoLA/train.tsv", "source\tlabel\tmark\tsentence\ngj\t1\t\tA\n", "{path}:1: "),
    "another file as CoLA's": ("cola", "CoLA/train.tsv", "sentence\tlabel\nA\t1\n", "{path}:1: "),
    "a score that's a word": ("stsb", "STS-B/train.tsv", STSB.format("high"), "{path}:2: "),
    "a score of NaN": ("stsb", "STS-B/train.tsv", STSB.format("nan"), "{path}:2: "),
    "an infinite score": ("stsb", "STS-B/train.tsv", STSB.format("inf"), "{path}:2: "),
    "an empty score": ("stsb", "STS-B/train.tsv", STSB.format(""), "{path}:2: "),
    "a score above 5": ("stsb", "STS-B/train.tsv", STSB.format("5.1"), "{path}:2: "),
    "a score below 0": ("stsb", "STS-B/train.tsv", STSB.format("-0.1"), "{path}:2: "),
    "Latin-1": ("rte", "RTE/train.tsv", RTE.replace("D", "Dé").encode("latin-1"), "{path}:3: "),
    "UTF-16": ("rte", "RTE/train.tsv", RTE.encode("utf-16"), "{path}:1: "),
}


@pytest.mark.parametrize("what", BAD_GLUE)
def test_a_bad_glue_file_is_refused_by_name_and_line(tmp_path, what):
    task, file, content, place = BAD_GLUE[what]
    path = write(tmp_path / file, content)
    assert refusal(glue, tmp_path, task, "train").startswith(place.format(path=path))


def test_a_missing_glue_folder_or_file_is_named_with_what_it_must_contain(tmp_path):
    missing = tmp_path / "nowhere"
    message = refusal(load_glue, "rte", ["train"], str(missing))
    assert "--glue_dir" in message and str(missing) in message and "RTE/train.tsv" in message
    message = refusal(load_glue, "rte", ["train"], str(tmp_path))
    assert message.startswith(f"{tmp_path / 'RTE' / 'train.tsv'}: ") and "--glue_dir" in message


def test_a_file_where_the_glue_folder_should_be_is_refused(tmp_path):
    path = write(tmp_path / "train.tsv", RTE)
    assert str(path) in refusal(load_glue, "rte", ["train"], str(path))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_diagnostic_task_has_nothing_to_train_or_evaluate_on(tmp_path, split):
    message = refusal(load_glue, "ax", [split], str(tmp_path))
    assert split in message and "--do_predict" in message


def test_an_unreachable_hub_is_reported_within_seconds_with_the_flag_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    start = time.monotonic()
    message = refusal(load_glue, "cola", ["train", "validation"], None, cache_dir=str(tmp_path / "cache"))
    assert "--glue_dir" in message and "CoLA/train.tsv" in message and "nyu-mll/glue" in message
    assert time.monotonic() - start < 10


def hub_table(labels: list[str] | None, rows: int = 2) -> Dataset:
    """RTE's validation set as a mirror of the Hub might have it; labels None: without names."""
    columns = {"sentence1": ["a"] * rows, "sentence2": ["b"] * rows, "label": [0] * rows}
    names = datasets.Value("int64") if labels is None else datasets.ClassLabel(names=labels)
    texts = {"sentence1": datasets.Value("string"), "sentence2": datasets.Value("string")}
    return Dataset.from_dict(columns, features=datasets.Features(texts | {"label": names}))


@pytest.mark.parametrize("labels", [["not_entailment", "entailment"], ["entailment"], None])
def test_labels_on_the_hub_in_another_order_are_refused(labels, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub_table(labels))
    with pytest.raises(UserError, match="rte's validation set has .*; expected entailment, not_entailment"):
        load_glue("rte", ["validation"])


def test_another_number_of_rows_on_the_hub_is_said(monkeypatch):
    warned = []
    monkeypatch.setattr(datasets.logging.get_logger("lora_nlu.data.glue"), "warning", warned.append)
    for rows in (2, TASKS["rte"].rows["validation"]):
        table = hub_table(["entailment", "not_entailment"], rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, table=table, **__: table)
        examples = load_glue("rte", ["validation"])
        assert examples.columns == {"validation": ("sentence1", "sentence2", "label")}
    assert warned == ["nyu-mll/glue: rte validation has 2 examples; the published file has 277."]
