"""GLUE's files as published, files of one's own, and tokenised tables; what is wrong is named with file and line."""

import csv
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
from datasets import Dataset, Value, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
)

from lora_nlu.data.examples import Examples, choose_rows, describe_examples
from lora_nlu.data.glue import load_glue_folder
from lora_nlu.data.loading import load_examples
from lora_nlu.data.tasks import TASKS
from lora_nlu.data.tokenization import digest, token_count
from lora_nlu.data.tokenization import tokenize as tokenize_and_say
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UserError

ROOT = Path(__file__).parents[2]
GLUE = Path(os.environ.get("GLUE_DIR") or ROOT.parent / "shared" / "glue")
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE download at {GLUE}; set GLUE_DIR")
BOM = b"\xef\xbb\xbf"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tsv(*rows: str) -> str:
    """Lines of a GLUE file; ` | ` stands for a tab."""
    return "".join(row.replace(" | ", "\t") + "\n" for row in rows)


def refusal(call: Callable, *arguments: object, **settings: object) -> str:
    """The message of the UserError that the call raises: three lines at most, none of them empty."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 3 and all(lines), caught.value
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- GLUE folders

MNLI_FRONT = (
    "index | promptID | pairID | genre | sentence1_binary_parse | sentence2_binary_parse | sentence1_parse"
    " | sentence2_parse | sentence1 | sentence2"
)
MNLI_ROW = "{} | 31 | 31n | fiction | ( a ) | ( b ) | (ROOT a) | (ROOT b) | {} | {}"
STSB_FRONT = "index | genre | filename | year | old_index | source1 | source2 | sentence1 | sentence2"

# (task, split, file, its lines, text, text_pair, label): header and columns as published, label ids as on the Hub
LAYOUTS: list[tuple[str, str, str, list[str], list[str], list[str] | None, list[int] | list[float] | None]] = [
    (
        "cola", "train", "CoLA/train.tsv",
        ["gj04 | 1 |  | They drank the pub dry.", "gj04 | 0 | * | They drank the pub."],
        ["They drank the pub dry.", "They drank the pub."], None, [1, 0],
    ),
    ("cola", "validation", "CoLA/dev.tsv", ["gj04 | 0 | * | Us ran."], ["Us ran."], None, [0]),
    (
        "cola", "test", "CoLA/test.tsv", ["index | sentence", "0 | Bill ran.", "1 | Ran Bill."],
        ["Bill ran.", "Ran Bill."], None, None,
    ),
    (
        "sst2", "train", "SST-2/train.tsv", ["sentence | label", "hide new secretions  | 0", "a joy  | 1"],
        ["hide new secretions ", "a joy "], None, [0, 1],
    ),
    ("sst2", "test", "SST-2/test.tsv", ["index | sentence", "0 | a mishmash ."], ["a mishmash ."], None, None),
    (
        "mrpc", "train", "MRPC/train.tsv",
        ["Quality | #1 ID | #2 ID | #1 String | #2 String", "1 | 70 | 71 | He ran . | He did .", "0 | 2 | 3 | A | B"],
        ["He ran .", "A"], ["He did .", "B"], [1, 0],
    ),
    (
        "mrpc", "test", "MRPC/test.tsv",
        ["index | #1 ID | #2 ID | #1 String | #2 String", "0 | 10 | 11 | PCCW ran . | It ran ."],
        ["PCCW ran ."], ["It ran ."], None,
    ),
    (
        "stsb", "train", "STS-B/train.tsv",
        [STSB_FRONT + " | score", "0 | main | MSRvid | 2012 | 0001 | none | none | A | B | 5.000",
         "1 | main | MSRvid | 2012 | 0004 | none | none | C | D | 0.5"],
        ["A", "C"], ["B", "D"], [5.0, 0.5],
    ),
    (
        "stsb", "test", "STS-B/test.tsv", [STSB_FRONT, "0 | main | MSRvid | 2012 | 0001 | none | none | A | B"],
        ["A"], ["B"], None,
    ),
    (
        "qqp", "train", "QQP/train.tsv",
        ["id | qid1 | qid2 | question1 | question2 | is_duplicate", "9 | 1 | 2 | Why? | How? | 0",
         "8 | 3 | 4 | Who is it? | Who? | 1"],
        ["Why?", "Who is it?"], ["How?", "Who?"], [0, 1],
    ),
    ("qqp", "test", "QQP/test.tsv", ["id | question1 | question2", "0 | Why? | How?"], ["Why?"], ["How?"], None),
    (
        "mnli", "train", "MNLI/train.tsv",
        [MNLI_FRONT + " | label1 | gold_label"]
        + [MNLI_ROW.format(i, f"p{i}", f"h{i}") + f" | entailment | {label}"
           for i, label in enumerate(["neutral", "entailment", "contradiction"])],
        ["p0", "p1", "p2"], ["h0", "h1", "h2"], [1, 0, 2],
    ),
    *[
        (
            "mnli", f"validation_{kind}", f"MNLI/dev_{kind}.tsv",
            [MNLI_FRONT + " | label1 | label2 | label3 | label4 | label5 | gold_label",
             MNLI_ROW.format(0, kind, "h") + " | neutral | neutral | entailment | neutral | neutral | contradiction"],
            [kind], ["h"], [2],
        )
        for kind in ("matched", "mismatched")
    ],
    *[
        (
            "mnli", f"test_{kind}", f"MNLI/test_{kind}.tsv", [MNLI_FRONT, MNLI_ROW.format(0, kind, "h")],
            [kind], ["h"], None,
        )
        for kind in ("matched", "mismatched")
    ],
    (
        "qnli", "train", "QNLI/train.tsv",
        ["index | question | sentence | label", "0 | When? | Now . | entailment", "1 | Who? | Now . | not_entailment"],
        ["When?", "Who?"], ["Now .", "Now ."], [0, 1],
    ),
    ("qnli", "test", "QNLI/test.tsv", ["index | question | sentence", "0 | When? | Now ."], ["When?"], ["Now ."], None),
    (
        "rte", "train", "RTE/train.tsv",
        ["index | sentence1 | sentence2 | label", "0 | A | B | not_entailment", "1 | C | D | entailment"],
        ["A", "C"], ["B", "D"], [1, 0],
    ),
    ("rte", "test", "RTE/test.tsv", ["index | sentence1 | sentence2", "0 | A | B"], ["A"], ["B"], None),
    (
        "wnli", "train", "WNLI/train.tsv", ["index | sentence1 | sentence2 | label", "0 | A | B | 1", "1 | C | D | 0"],
        ["A", "C"], ["B", "D"], [1, 0],
    ),
    ("wnli", "test", "WNLI/test.tsv", ["index | sentence1 | sentence2", "0 | A | B"], ["A"], ["B"], None),
    ("ax", "test", "AX/test.tsv", ["index | sentence1 | sentence2", "0 | A | B"], ["A"], ["B"], None),
    ("ax", "test", "AX/AX.tsv", ["index | sentence1 | sentence2", "0 | A | B"], ["A"], ["B"], None),
    ("ax", "test", "diagnostic/diagnostic.tsv", ["index | sentence1 | sentence2", "0 | A | B"], ["A"], ["B"], None),
]  # fmt: skip


def glue(folder: Path, task: str, split: str) -> Dataset:
    return load_glue_folder(str(folder), TASKS[task], [split]).splits[split]


def assert_table(table: Dataset, text: list, text_pair: list | None, label: list | None) -> None:
    want = {"text": text, "text_pair": text_pair, "label": label}
    assert table.to_dict() == {name: column for name, column in want.items() if column is not None}


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


def test_load_examples_reads_both_sets_of_mnli_and_says_the_labels_in_id_order(tmp_path):
    for _, _, file, lines, *_ in LAYOUTS:
        write(tmp_path / file, tsv(*lines))
    examples = load_examples("mnli", str(tmp_path), {}, ["validation", "test"])
    assert list(examples.splits) == ["validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    assert examples.labels == ("entailment", "neutral", "contradiction") and not examples.is_regression
    assert load_examples("stsb", str(tmp_path), {}, ["train"]).is_regression


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


def test_a_missing_glue_folder_or_file_is_named_with_what_it_must_hold(tmp_path):
    missing = tmp_path / "nowhere"
    message = refusal(load_examples, "rte", str(missing), {}, ["train"])
    assert "--glue_dir" in message and str(missing) in message and "RTE/train.tsv" in message
    message = refusal(load_examples, "rte", str(tmp_path), {}, ["train"])
    assert message.startswith(f"{tmp_path / 'RTE' / 'train.tsv'}: ") and "--glue_dir" in message


def test_a_file_where_the_glue_folder_should_be_is_refused(tmp_path):
    path = write(tmp_path / "train.tsv", RTE)
    assert str(path) in refusal(load_examples, "rte", str(path), {}, ["train"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_diagnostic_task_has_nothing_to_train_or_evaluate_on(tmp_path, split):
    message = refusal(load_examples, "ax", str(tmp_path), {}, [split])
    assert split in message and "--do_predict" in message


def test_the_unreachable_hub_is_said_within_seconds_with_the_flag_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    start = time.monotonic()
    message = refusal(load_examples, "cola", None, {}, ["train", "validation"], cache_dir=str(tmp_path / "cache"))
    assert "--glue_dir" in message and "CoLA/train.tsv" in message and "nyu-mll/glue" in message
    assert time.monotonic() - start < 10


# ----------------------------------------------------------------------------------------------- files of one's own


def own(folder: Path, name: str, content: str | bytes, known: list[str] | tuple | None = None) -> Examples:
    """One training file read alone."""
    return load_files({"train": str(write(folder / name, content))}, known)


def json_lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl"])
def test_one_text_column_of_any_name_and_string_labels_in_alphabetical_order(tmp_path, name):
    rows = [("fine", "good"), ("awful", "bad"), ("so-so", "neutral")]
    if name.startswith("a.json"):
        content = json_lines(*({"review": text, "label": label} for text, label in rows))
    else:
        content = "".join(("\t" if name == "a.tsv" else ",").join(row) + "\n" for row in [("review", "label"), *rows])
    examples = own(tmp_path, name, content)
    assert examples.labels == ("bad", "good", "neutral")
    assert_table(examples.splits["train"], ["fine", "awful", "so-so"], None, [1, 0, 2])


def test_two_text_columns_that_are_named_keep_the_order_of_their_names(tmp_path):
    path = write(tmp_path / "a.csv", "b,label,a\nfirst,x,second\nthird,y,fourth\n")
    examples = load_files({"train": str(path)}, None, ("b", "a"))
    assert_table(examples.splits["train"], ["first", "third"], ["second", "fourth"], [0, 1])
    examples = load_files({"train": str(path)}, None, ("a", "b"))
    assert_table(examples.splits["train"], ["second", "fourth"], ["first", "third"], [0, 1])


@pytest.mark.parametrize(
    "first, second",
    [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")]
    + [("text", "text_pair")],
)
def test_a_pair_with_known_names_is_found_among_other_columns_in_its_own_order(tmp_path, first, second):
    examples = own(tmp_path, "a.csv", f"{second},source,label,{first}\nB,web,x,A\nD,web,y,C\n")
    assert_table(examples.splits["train"], ["A", "C"], ["B", "D"], [0, 1])


@pytest.mark.parametrize("numbers", ["idx", "id", "index", "Id", ""])
def test_a_column_of_row_numbers_is_no_text(tmp_path, numbers):
    examples = own(tmp_path, "a.csv", f"{numbers},text,label\n0,A,x\n1,B,y\n")
    assert_table(examples.splits["train"], ["A", "B"], None, [0, 1])


@pytest.mark.parametrize("as_json", [False, True])
def test_integer_labels_are_classes_in_numerical_order(tmp_path, as_json):
    labels = [10, 2, -1, 2]
    if as_json:
        examples = own(tmp_path, "a.jsonl", json_lines(*({"text": "t", "label": label} for label in labels)))
    else:
        examples = own(tmp_path, "a.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))
    assert examples.labels == ("-1", "2", "10") and not examples.is_regression
    assert examples.splits["train"][:]["label"] == [2, 1, 0, 1]


@pytest.mark.parametrize("as_json", [False, True])
def test_numbers_that_are_not_all_integers_are_a_regression(tmp_path, as_json):
    labels = [1, 2.5, -3]
    if as_json:
        examples = own(tmp_path, "a.jsonl", json_lines(*({"text": "t", "label": label} for label in labels)))
    else:
        examples = own(tmp_path, "a.csv", "text,label\n" + "".join(f"t,{label}\n" for label in labels))
    assert examples.labels == () and examples.is_regression
    assert examples.splits["train"][:]["label"] == [1.0, 2.5, -3.0]
    assert all(type(label) is float for label in examples.splits["train"]["label"])


@pytest.mark.parametrize(
    "labels, names, ids",
    [
        ([0, 1, 1], ("0", "1"), [0, 1, 1]),
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        (["2", "10"], ("2", "10"), [0, 1]),
        ([True, False], ("false", "true"), [1, 0]),
        ([0.5, 1.0], (), [0.5, 1.0]),
        ([1.0, 2.0], (), [1.0, 2.0]),  # written as floats, meant as numbers
        (["1.5", 2.0], (), [1.5, 2.0]),  # a number in quotes beside a float is one too
        (["a", 1], ("1", "a"), [1, 0]),
    ],
)
def test_json_labels_may_be_integers_strings_floats_or_booleans(tmp_path, labels, names, ids):
    examples = own(tmp_path, "a.jsonl", json_lines(*({"text": "t", "label": label} for label in labels)))
    assert examples.labels == names
    assert examples.splits["train"][:]["label"] == ids


def test_csv_fields_in_quotes_may_hold_commas_newlines_and_quotes(tmp_path):
    examples = own(tmp_path, "a.csv", 'text,label\n"one, two",x\n"first\nsecond",y\n"say ""hi""",x\n')
    assert_table(examples.splits["train"], ["one, two", "first\nsecond", 'say "hi"'], None, [0, 1, 0])


def test_tsv_of_ones_own_is_unquoted_as_glues(tmp_path):
    examples = own(tmp_path, "a.tsv", 'text\tlabel\n"one\tx\ntwo, three"\ty\n')
    assert_table(examples.splits["train"], ['"one', 'two, three"'], None, [0, 1])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_none_na_null_and_empty_text_stay_text(tmp_path, name):
    texts = ["None", "NA", "null", "nan", ""]
    if name == "a.jsonl":
        content = json_lines(*({"text": text, "label": f"l{i % 2}"} for i, text in enumerate(texts)))
    else:
        mark = "\t" if name == "a.tsv" else ","
        content = f"text{mark}label\n" + "".join(f"{text}{mark}l{i % 2}\n" for i, text in enumerate(texts))
    assert own(tmp_path, name, content).splits["train"][:]["text"] == texts


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_windows_line_ends_and_empty_lines_change_nothing(tmp_path, name):
    content = "text,label\r\nA,x\r\n\r\nB,y\r\n"
    if name == "a.jsonl":
        content = '{"text": "A", "label": "x"}\r\n\r\n{"text": "B", "label": "y"}\r\n'
    assert_table(own(tmp_path, name, BOM + content.encode()).splits["train"], ["A", "B"], None, [0, 1])


BAD_OWN = {
    "an empty csv": ("a.csv", "", "{path}: "),
    "only a byte-order mark": ("a.csv", BOM, "{path}: "),
    "only a header": ("a.csv", "text,label\n", "{path}: "),
    "only empty lines": ("a.jsonl", "\n \n", "{path}: "),
    "no label column": ("a.csv", "text\nA\n", "{path}:2: "),
    "no label in a line": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B"}\n', "{path}:2: "),
    "no text in a line": ("a.jsonl", '{"text": "A", "label": 1}\n{"label": 0}\n', "{path}:2: "),
    "three text columns": ("a.csv", "a,b,c,label\n1,2,3,x\n", "{path}: "),
    "no text column": ("a.csv", "id,label\n1,x\n", "{path}: "),
    "a label of NaN": ("a.csv", "text,label\nA,1.5\nB,nan\n", "{path}:3: "),
    "an empty label": ("a.csv", "text,label\nA,x\nB,\n", "{path}:3: "),
    "a blank label": ("a.csv", "text,label\nA,x\nB,  \n", "{path}:3: "),
    "a label of null": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B", "label": null}\n', "{path}:2: "),
    "a JSON NaN": ("a.jsonl", '{"text": "A", "label": 1.5}\n{"text": "B", "label": NaN}\n', "{path}:2: "),
    "a JSON infinity": ("a.jsonl", '{"text": "A", "label": 1.5}\n{"text": "B", "label": -Infinity}\n', "{path}:2: "),
    "an infinite label": ("a.csv", "text,label\nA,1.5\nB,Infinity\n", "{path}:3: "),
    "a label too large": ("a.csv", "text,label\nA,1.5\nB,1e999\n", "{path}:3: "),
    "a label that's a list": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B", "label": [1]}\n', "{path}:2: "),
    "a single class": ("a.csv", "text,label\nA,x\nB,x\n", "{path}: "),
    "another extension": ("a.txt", "text,label\nA,x\n", "{path}: "),
    "no extension": ("data", "text,label\nA,x\n", "{path}: "),
    "a short row": ("a.csv", "text,label\nA,x\nB\n", "{path}:3: "),
    "a long row": ("a.csv", "text,label\nA,x\nB,C,y\n", "{path}:3: "),
    "a long tsv row": ("a.tsv", "text\tlabel\nA\tx\nB\tC\ty\n", "{path}:3: "),
    "a quote left open": ("a.csv", 'text,label\nA,x\n"B,y\n', "{path}:3: "),
    "text after a quote": ("a.csv", 'text,label\nA,x\n"B" C,y\n', "{path}:3: "),
    "broken JSON": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B", "lab', "{path}:2: "),
    "no JSON at all": ("a.jsonl", "text,label\nA,x\n", "{path}:1: "),
    "a JSON list": ("a.json", '[{"text": "A", "label": 1}]', "{path}:1: "),
    "JSON nested too deep": ("a.jsonl", '{"text": "A", "label": 1}\n' + "[" * 100_000 + "\n", "{path}:2: "),
    "text that's a number": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": 7, "label": 0}\n', "{path}:2: "),
    "text that's null": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": null, "label": 0}\n', "{path}:2: "),
    "half a surrogate pair": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "\\ud800", "label": 0}\n', "{path}:2: "),
    "two columns of one name": ("a.csv", "text,text,label\nA,B,x\n", "{path}:1: "),
    "a key that stands twice": ("a.jsonl", '{"text": "A", "label": 1}\n{"text": "B", "label": 1, "label": 0}\n',
                                "{path}:2: the key 'label' occurs twice"),
    "a key of an inner object twice": ("a.json", '{"text": "A", "label": 1, "of": {"a": 1, "a": 1}}\n', "{path}:1: "),
    "a text that stands twice": ("a.json", '{"text": "A", "label": 1, "text": "A"}\n', "{path}:1: the key 'text'"),
    "semicolons": ("a.csv", "text;label\nA;x\nB;y\n", "{path}:1: the header is one column, 'text;label'.\nA .csv file "
                   "separates columns by commas, this one by semicolons. Save it with commas."),
    "semicolons and a comma": ("a.csv", "text;label\nA, B;x\n", "{path}:1: the header is one column"),
    "tabs": ("a.csv", "text\tlabel\nA\tx\n", "{path}:1: the header is one column, 'text\\tlabel'.\nA .csv file "
             "separates columns by commas, this one by tabs. Save it with commas, or name it .tsv."),
    "commas": ("a.tsv", "text,label\nA,x\n", "{path}:1: the header is one column, 'text,label'.\nA .tsv file "
               "separates columns by tabs, this one by commas. Save it with tabs, or name it .csv."),
    "semicolons with a comma in the header": ("a.csv", "text;by, me;label\nA;B;x\n", "{path}:2: 1 columns, "
                                              "the header has 2.\nA .csv file separates columns by commas, this one "
                                              "by semicolons"),
    "constant numbers": ("a.csv", "text,label\nA,0.5\nB,0.50\n", "{path}: every label in column 'label' is 0.5"),
    "Latin-1": ("a.csv", "text,label\nA,x\ncafé,y\n".encode("latin-1"), "{path}:3: "),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_OWN)
def test_a_bad_file_of_ones_own_is_refused_by_name_and_line(tmp_path, what):
    name, content, place = BAD_OWN[what]
    assert refusal(own, tmp_path, name, content).startswith(place.format(path=tmp_path / name))


def of_labels(labels: list[str], texts: list[str] | None = None) -> str:
    texts = texts or [f"text {i} of {len(labels)}" for i in range(len(labels))]
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts, labels, strict=True))


@pytest.mark.parametrize(
    "labels",
    [
        [f"a long text {i} as texts are"[:24] for i in range(160)],
        [str(i) for i in range(10)],
        [f"c{i % 6}" for i in range(11)],
    ],
    ids=["text", "whole numbers", "more classes than half of the rows"],
)
def test_a_label_column_in_which_nearly_every_row_has_its_own_label_is_refused(labels, tmp_path):
    content = of_labels(labels, ["good", "bad"] * (len(labels) // 2) + ["good"] * (len(labels) % 2))
    n, count = len({*labels}), len(labels)
    path = write(tmp_path / "a.csv", content)
    for files, known in ((["train"], None), (["validation"], None), (["validation"], ("bad", "good"))):
        message = refusal(load_files, dict.fromkeys(files, str(path)), known)
        assert message.startswith(f"{path}: column 'label' has {n} different labels in {count} rows ({labels[0]}, ")
        assert all(flag in message for flag in ("--label_column", "--text_columns", "--labels")) and len(message) < 500
    other = write(tmp_path / "train.csv", of_labels(["bad", "good"] * 5))
    message = refusal(load_files, {"train": str(other), "validation": str(path)}, None)
    assert message.startswith(f"{path}: column 'label' has {n} different labels")


def test_many_classes_are_read_where_they_are_known_or_rows_are_few_or_each_has_two(tmp_path):
    names = tuple(f"c{i}" for i in range(12))
    assert len(own(tmp_path, "a.csv", of_labels([*names]), names).labels) == 12
    path, train = write(tmp_path / "dev.csv", of_labels([*names])), write(tmp_path / "t.csv", of_labels([*names] * 2))
    assert load_files({"validation": str(path)}, names).labels == names
    assert len(load_files({"train": str(train), "validation": str(path)}, None).labels) == 12
    assert len(own(tmp_path, "a.csv", of_labels([*names[:9]])).labels) == 9
    assert own(tmp_path, "a.csv", of_labels([f"{i}.5" for i in range(12)])).is_regression


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("written", ["1", "0.25", "-3e2"])
def test_numbers_that_are_all_the_same_are_no_regression_to_learn_or_to_judge(written, split, tmp_path):
    path = write(tmp_path / "a.csv", of_labels([written] * 3))
    message = refusal(load_files, {split: str(path)}, ())
    assert message.startswith(f"{path}: every label in column 'label' is {float(written):g}; ")
    assert "--label_column" in message and "correlation" in message
    assert load_files({split: str(write(path, of_labels([written])))}, ()).is_regression  # one row alone


def test_a_label_that_is_not_known_says_where_the_known_ones_come_from(tmp_path):
    path = write(tmp_path / "dev.csv", of_labels(["1", "0"]))
    for source in ("--labels", "output/adapter"):
        message = refusal(load_files, {"validation": str(path)}, ("negative", "positive"), expected_by=source)
        assert message == f"{path}:2: label '1' is not among those of {source}: negative, positive."
    train = write(tmp_path / "train.csv", of_labels([f"c{i:02}" for i in range(14)] * 2))
    message = refusal(load_files, {"train": str(train), "validation": str(path)}, None)
    assert (
        message.startswith(f"{path}:2: label '1' is not among those of {train}: c00, ") and "c09 and 4 more" in message
    )
    for split in ("train", "validation"):
        numbers = write(tmp_path / "numbers.csv", of_labels(["0.5", "1"]))
        message = refusal(load_files, {split: str(numbers)}, ("negative", "positive"), expected_by="--labels")
        assert message.startswith(f"{numbers}: ") and "a regression has no label names" in message


def test_a_missing_file_and_a_folder_in_its_place_are_refused_by_name(tmp_path):
    assert str(tmp_path / "no.csv") in refusal(load_files, {"train": str(tmp_path / "no.csv")}, None)
    (tmp_path / "folder.csv").mkdir()
    assert str(tmp_path / "folder.csv") in refusal(load_files, {"train": str(tmp_path / "folder.csv")}, None)


def test_columns_that_could_all_be_text_are_listed(tmp_path):
    message = refusal(own, tmp_path, "a.csv", "title,body,author,label\n1,2,3,x\n")
    assert all(column in message for column in ("title", "body", "author", "--text_columns", "--label_column"))


def train_and(folder: Path, split: str, train: str, other: str, known: tuple | None = None) -> Examples:
    paths = {"train": write(folder / "train.csv", train), split: write(folder / f"{split}.csv", other)}
    return load_files({name: str(path) for name, path in paths.items()}, known)


def test_validation_labels_get_the_ids_of_the_training_labels(tmp_path):
    examples = train_and(tmp_path, "validation", "text,label\nA,z\nB,m\nC,a\n", "text,label\nD,z\nE,m\n")
    assert examples.labels == ("a", "m", "z")
    assert_table(examples.splits["validation"], ["D", "E"], None, [2, 1])


def test_a_validation_label_that_training_never_saw_is_named_by_file_and_line(tmp_path):
    message = refusal(train_and, tmp_path, "validation", "text,label\nA,x\nB,y\n", "text,label\nC,x\nD,new\n")
    assert message.startswith(f"{tmp_path / 'validation.csv'}:3: ") and "'new'" in message and "x, y" in message


def test_a_regressions_validation_file_may_hold_whole_numbers_but_no_words(tmp_path):
    examples = train_and(tmp_path, "validation", "text,label\nA,0.5\nB,2\n", "text,label\nC,1\nD,2\n")
    assert examples.is_regression and examples.splits["validation"][:]["label"] == [1.0, 2.0]
    message = refusal(train_and, tmp_path, "validation", "text,label\nA,0.5\nB,2\n", "text,label\nC,1\nD,x\n")
    assert message.startswith(f"{tmp_path / 'validation.csv'}:3: ")


def test_a_test_file_needs_no_labels_and_those_it_has_are_not_read(tmp_path):
    examples = train_and(tmp_path, "test", "text,label\nA,x\nB,y\n", "text\nC\n")
    assert_table(examples.splits["test"], ["C"], None, None)
    assert describe_examples(examples)[1] == "test: 1 rows, text in 'text'."
    examples = train_and(tmp_path, "test", "text,label\nA,x\nB,y\n", "text,label\nC,\n")
    assert_table(examples.splits["test"], ["C"], None, None)
    assert describe_examples(examples)[1] == "test: 1 rows, text in 'text'; its labels in 'label' are not read."


def test_all_files_are_read_by_the_columns_of_the_first(tmp_path):
    examples = train_and(tmp_path, "test", "text,label\nA,x\nB,y\n", "text,author,year\nC,me,1999\n")
    assert_table(examples.splits["test"], ["C"], None, None)
    examples = train_and(tmp_path, "test", "question,sentence,label\nA,B,x\nC,D,y\n", "sentence,question\nF,E\n")
    assert_table(examples.splits["test"], ["E"], ["F"], None)


def test_pairs_in_one_file_and_single_texts_in_the_other_are_refused(tmp_path):
    pairs = "premise,hypothesis,label\nA,B,x\nC,D,y\n"
    message = refusal(train_and, tmp_path, "test", pairs, "sentence\nE\n")
    assert message.startswith(f"{tmp_path / 'test.csv'}:2: ") and "premise, hypothesis" in message


def test_known_labels_set_the_ids_and_none_others_are_taken(tmp_path):
    examples = own(tmp_path, "a.csv", "text,label\nA,x\nB,y\n", ["z", "y", "x"])
    assert examples.labels == ("z", "y", "x") and examples.splits["train"][:]["label"] == [2, 1]
    assert refusal(own, tmp_path, "a.csv", "text,label\nA,x\nB,q\n", ["x", "y"]).startswith(f"{tmp_path / 'a.csv'}:3: ")


def test_the_known_labels_need_not_all_occur(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nA,x\n")
    assert load_files({"validation": str(path)}, ["x", "y"]).splits["validation"][:]["label"] == [0]
    assert own(tmp_path, "b.csv", "text,label\nA,x\nB,z\n", ["x", "y", "z"]).splits["train"][:]["label"] == [0, 2]
    assert "nothing to learn" in refusal(own, tmp_path, "c.csv", "text,label\nA,x\n", ["x", "y"])


def test_known_labels_of_a_regression_make_whole_numbers_floats(tmp_path):
    examples = own(tmp_path, "a.csv", "text,label\nA,1\nB,2\n", ())
    assert examples.is_regression and examples.splits["train"][:]["label"] == [1.0, 2.0]
    assert f"{tmp_path / 'a.csv'}:2: " in refusal(own, tmp_path, "a.csv", "text,label\nA,x\n", ())


def test_validation_alone_sets_the_labels_and_a_test_file_alone_cannot(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nA,y\nB,x\n")
    assert load_files({"validation": str(path)}, None).labels == ("x", "y")
    assert "--train_file" in refusal(load_files, {"test": str(path)}, None)
    assert load_files({"test": str(path)}, ["x", "y"]).labels == ("x", "y")


def test_load_examples_reads_only_the_wanted_files(tmp_path):
    files = {"train": str(write(tmp_path / "a.csv", "text,label\nA,y\nB,x\n")), "test": str(tmp_path / "missing.csv")}
    assert list(load_examples(None, None, files, ["train"]).splits) == ["train"]


# ------------------------------------------------------------------------------------------------------ tokenising


def tokenize(*arguments: object, **settings: object) -> dict[str, Dataset]:
    return tokenize_and_say(*arguments, **settings)[0]


WORDS = "the cat sat on a mat while dogs ran far away from it".split()


def texts(rows: int, pairs: bool = False, seed: int = 0) -> Examples:
    """Sentences of 1 to 12 known words, label = row % 2."""
    sentences = [" ".join(WORDS[(seed + i * k) % len(WORDS)] for k in range(1, 2 + i % 12)) for i in range(rows)]
    columns = {"text": sentences, "label": [i % 2 for i in range(rows)]}
    if pairs:
        columns["text_pair"] = sentences[::-1]
    return Examples({"train": Dataset.from_dict(columns)}, ("0", "1"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> RobertaTokenizer:
    """Byte-level BPE, `<s> a </s></s> b </s>`, no token types."""
    folder = tmp_path_factory.mktemp("roberta")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    bpe.model.save(str(folder))
    return RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def deberta() -> DebertaV2Tokenizer:
    """Unigram, `[CLS] a [SEP] b [SEP]`, token types 0 and 1."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        unk_token="[UNK]",
        show_progress=False,
    )
    unigram.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    vocabulary = json.loads(unigram.to_str())["model"]["vocab"]
    return DebertaV2Tokenizer(vocab=[tuple(piece) for piece in vocabulary])


def cache_files(folder: Path) -> dict[str, int]:
    """Time of last change, in ns, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("family", ["roberta", "deberta"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("max_length", [7, 64])
def test_ids_are_those_of_the_tokenizer_called_on_each_example(tmp_path, request, family, pairs, max_length):
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(family)
    examples = texts(30, pairs)
    encoded = tokenize(examples, tokenizer, max_length, str(tmp_path))["train"]
    assert len(encoded) == 30
    for got, row in zip(encoded, examples.splits["train"], strict=True):
        want = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=max_length)
        assert got == {**want, "label": row["label"]}
    assert ("token_type_ids" in encoded.column_names) == (family == "deberta")
    lengths = [len(row) for row in encoded["input_ids"]]
    assert max(lengths) == 7 if max_length == 7 else len(set(lengths)) > 3  # truncated to it; else unpadded
    assert token_count(encoded) == sum(lengths)


def test_token_types_tell_the_second_text_from_the_first(tmp_path, deberta):
    row = tokenize(texts(4, pairs=True), deberta, 64, str(tmp_path))["train"][1]
    end_of_first = row["input_ids"].index(deberta.sep_token_id)
    assert row["token_type_ids"] == [int(i > end_of_first) for i in range(len(row["input_ids"]))]


def test_what_the_tokenizer_did_before_changes_neither_ids_nor_cache(tmp_path, roberta):
    first = tokenize(texts(20), roberta, 64, str(tmp_path))["train"]
    before = cache_files(tmp_path)
    roberta(["the cat", "the cat sat on a mat"], padding="max_length", truncation=True, max_length=5)
    again = tokenize(texts(20), roberta, 64, str(tmp_path))["train"]
    assert again.to_dict() == first.to_dict()
    assert cache_files(tmp_path) == before


def own_file(folder: Path, text: str) -> Examples:
    return own(folder, "train.csv", f"text,label\n{text},x\nthe cat,y\nthe dogs,x\n")


def test_a_second_call_reads_the_cached_file_and_overwrite_cache_makes_it_anew(tmp_path, roberta):
    first = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path))["train"]
    made = cache_files(tmp_path)
    assert len(made) == 1
    second = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path))["train"]
    assert cache_files(tmp_path) == made and second.to_dict() == first.to_dict()
    third = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path), overwrite_cache=True)["train"]
    remade = cache_files(tmp_path)
    assert remade.keys() == made.keys() and remade != made and third.to_dict() == first.to_dict()


def test_changed_text_length_rows_or_tokenizer_make_another_cache(tmp_path, roberta, deberta):
    def files_after(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
        encoded = tokenize(examples, tokenizer, max_length, str(tmp_path))["train"]
        row = tokenizer(examples.splits["train"][0]["text"], truncation=True, max_length=max_length)
        assert encoded[0]["input_ids"] == row["input_ids"]
        return len(cache_files(tmp_path))

    assert files_after(own_file(tmp_path, "a mat"), roberta, 32) == 1
    assert files_after(own_file(tmp_path, "a cat"), roberta, 32) == 2
    assert files_after(own_file(tmp_path, "a cat"), roberta, 4) == 3
    assert files_after(own_file(tmp_path, "a cat"), deberta, 4) == 4
    assert files_after(choose_rows(own_file(tmp_path, "a cat"), {"train": 2}), deberta, 4) == 5


def test_the_digest_of_training_data_is_of_every_id_token_type_and_label_in_order(tmp_path, deberta):
    table = tokenize(texts(20, pairs=True), deberta, 64, str(tmp_path))["train"]
    rows = table.to_dict()

    def of(changed: dict[str, list]) -> str:
        return digest(Dataset.from_dict(changed))

    assert len(digest(table)) == 16 and digest(table) == of(rows)
    in_pieces = concatenate_datasets([table.select(range(7)), table.select(range(7, 20))])
    drawn = concatenate_datasets([table, table]).select([*range(5), *range(25, 40)])  # by row numbers
    floats = table.cast_column("label", Value("float64"))
    alike = {digest(t) for t in (in_pieces, drawn, floats, table.remove_columns("attention_mask"))}
    assert alike == {digest(table)}
    flipped = {**rows, "label": [1 - label for label in rows["label"]]}
    one_id = {**rows, "input_ids": [*rows["input_ids"][:-1], [7, *rows["input_ids"][-1][1:]]]}
    types = {**rows, "token_type_ids": [[0] * len(row) for row in rows["token_type_ids"]]}
    turned = {name: column[::-1] for name, column in rows.items()}
    rest = {name: column for name, column in rows.items() if name != "token_type_ids"}
    cuts = [Dataset.from_dict({"input_ids": ids}) for ids in ([[1, 2], [3]], [[1], [2, 3]])]
    others = {of(x) for x in (rows, flipped, one_id, types, turned, rest)} | {digest(table.select(range(19)))}
    assert len(others | {digest(table) for table in cuts}) == 9


def test_scores_of_the_hub_and_of_a_file_have_one_digest():
    ids = {"input_ids": [[1], [2]]}
    file, hub = (Dataset.from_dict(ids | {"label": [3.8, 0.2]}) for _ in range(2))
    assert digest(file) == digest(hub.cast_column("label", Value("float32")))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_texts_cut_at_the_longest_length_are_counted_in_one_line_a_split_also_from_the_cache(
    family, pairs, tmp_path, request
):
    tokenizer, examples = request.getfixturevalue(family), texts(30, pairs)
    rows = examples.splits["train"][:]
    lengths = [len(ids) for ids in tokenizer(rows["text"], rows.get("text_pair")).input_ids]
    for longest in (sorted(lengths)[10], sorted(lengths)[20]):
        cut = sum(length > longest for length in lengths)
        assert 0 < cut < 30
        said = (
            f"train: {cut} of 30 examples are cut at --max_seq_length {longest}; the longest has {max(lengths)} tokens."
        )
        for _ in range(2):  # the second time from the cache
            assert tokenize_and_say(examples, tokenizer, longest, str(tmp_path))[1] == [said]
    assert len(cache_files(tmp_path)) == 2
    assert tokenize_and_say(examples, tokenizer, max(lengths), str(tmp_path))[1] == []


def test_truncation_from_the_left_is_another_cache_than_from_the_right(tmp_path, deberta):
    examples = own_file(tmp_path, "the cat sat on a mat")
    right = tokenize(examples, deberta, 6, str(tmp_path))["train"][0]
    deberta.truncation_side = "left"
    try:
        left = tokenize(examples, deberta, 6, str(tmp_path))["train"][0]
        assert (
            left["input_ids"] == deberta(examples.splits["train"][0]["text"], truncation=True, max_length=6).input_ids
        )
    finally:
        deberta.truncation_side = "right"
    assert left["input_ids"] != right["input_ids"]


def test_the_same_bytes_as_csv_and_as_tsv_do_not_share_a_cache(tmp_path, roberta):
    content = 'text\n"the cat"\n'
    got = []
    for name in ("a.csv", "a.tsv"):
        examples = load_files({"test": str(write(tmp_path / name, content))}, ["x", "y"])
        got.append(tokenize(examples, roberta, 32, str(tmp_path))["test"][0]["input_ids"])
    assert got == [roberta("the cat").input_ids, roberta('"the cat"').input_ids]


@pytest.mark.parametrize("with_file", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_read_by_the_wrong_tokenizer_class_is_refused(tmp_path, with_file):
    """BERT's files beside a RoBERTa config, as AutoTokenizer reads them: no word arrives, or letters without spaces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*letters, *WORDS])]
    if with_file == "tokenizer.json":
        right = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
        right.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    else:
        write(tmp_path / "vocab.txt", "".join(piece + "\n" for piece in pieces))
    RobertaConfig().save_pretrained(tmp_path)
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    message = refusal(tokenize, texts(50), wrong, 64, str(tmp_path))
    assert type(wrong).__name__ in message and "tokenizer_class" in message and "--tokenizer_name" in message
    assert not cache_files(tmp_path)


def test_a_tokenizer_to_which_every_word_is_unknown_is_refused(tmp_path):
    unknowing = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "Cat": 5})
    assert unknowing("the cat").input_ids == [2, 1, 1, 3]
    assert "BertTokenizer" in refusal(tokenize, texts(50), unknowing, 64, str(tmp_path))


def test_a_few_unknown_words_are_no_reason_to_refuse(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[::2], *WORDS[1::4]]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    encoded = tokenize(texts(50), tokenizer, 64, str(tmp_path))["train"]
    assert tokenizer.unk_token_id in [i for row in encoded["input_ids"] for i in row]


def _tokenize_in_a_process(folder: str, tokenizer: PreTrainedTokenizerBase, barrier, results) -> None:
    examples = texts(3000, pairs=True)
    barrier.wait(60)
    encoded = tokenize(examples, tokenizer, 32, folder)["train"]
    results.put((os.getpid(), token_count(encoded), len(encoded)))


def test_two_processes_that_tokenise_at_once_both_get_the_whole_table(tmp_path, roberta):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path), roberta, barrier, results)
    other = context.Process(target=_tokenize_in_a_process, args=arguments)
    other.start()
    _tokenize_in_a_process(*arguments)  # this process is the second
    got = [results.get(timeout=60) for _ in range(2)]
    other.join(30)
    assert other.exitcode == 0
    rows = texts(3000, pairs=True).splits["train"]
    want = sum(map(len, roberta(rows[:]["text"], rows[:]["text_pair"], truncation=True, max_length=32)["input_ids"]))
    assert len({pid for pid, _, _ in got}) == 2
    assert [(tokens, count) for _, tokens, count in got] == [(want, 3000)] * 2
    assert len(cache_files(tmp_path)) == 1 and not list(tmp_path.rglob("*tmp*"))  # and nothing half-written stays


def of_two_classes(labels: list[int]) -> Examples:
    table = Dataset.from_dict({"text": [str(i) for i in range(len(labels))], "label": labels})
    return Examples({"train": table, "validation": table, "test": table.remove_columns("label")}, ("neg", "pos"))


def test_choose_rows_keeps_the_first_of_each_split_and_all_without_a_limit():
    examples = of_two_classes([0, 1, 0, 1, 0])
    limited = choose_rows(examples, {"train": 2, "validation": None, "test": 99})
    assert limited.splits["train"][:]["text"] == ["0", "1"] and limited.rows["train"] == 5
    assert limited.splits["validation"][:]["text"] == limited.splits["test"][:]["text"] == list("01234")
    assert len(choose_rows(examples, {}).splits["train"]) == 5 and limited.labels == ("neg", "pos")
    assert len(examples.splits["train"]) == 5


def test_a_limit_is_for_every_set_of_its_kind():
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_ax")
    table = of_two_classes([0, 1, 0, 1, 0]).splits["train"]
    limited = choose_rows(Examples(dict.fromkeys(names, table), ("neg", "pos")), {"validation": 3, "test": 2})
    assert [len(limited.splits[name]) for name in names] == [5, 3, 3, 2, 2]


def test_a_seed_draws_rows_that_keep_their_order_and_never_test_rows():
    examples = of_two_classes([0, 1] * 50)
    limits = {"train": 20, "validation": 20, "test": 20}
    drawn = [choose_rows(examples, limits, seed) for seed in (0, 0, 1)]
    rows = [[int(text) for text in part.splits["train"][:]["text"]] for part in drawn]
    assert rows[0] == rows[1] == sorted(rows[0]) != rows[2] and len({*rows[0]}) == 20 and rows[0] != [*range(20)]
    assert all(part.splits["test"][:]["text"] == [str(i) for i in range(20)] for part in drawn)
    assert choose_rows(examples, {}, 3).splits["train"][:]["text"] == examples.splits["train"][:]["text"]


@pytest.mark.parametrize("split, flag", [("train", "--max_train_samples"), ("validation", "--max_eval_samples")])
def test_a_chosen_part_of_a_sorted_set_with_a_single_class_is_refused_naming_the_flag_that_draws(split, flag):
    examples = of_two_classes([0] * 50 + [1] * 50)
    message = refusal(choose_rows, examples, {split: 10})
    assert message.startswith(f"{split}: ") and "'neg'" in message and "neg 50, pos 50" in message
    assert "--sample_seed" in message and flag in message
    drawn = choose_rows(examples, {split: 10}, 0)
    assert {*drawn.splits[split][:]["label"]} == {0, 1}
    assert choose_rows(examples, {"test": 10}).rows == {"train": 100, "validation": 100, "test": 100}
    alone = choose_rows(of_two_classes([1] * 50), {split: 10})  # the whole set has no more
    assert len(alone.splits[split]) == 10
    assert len(choose_rows(examples, {split: 1}).splits[split]) == 1


@pytest.mark.parametrize("split, flag", [("train", "--max_train_samples"), ("validation", "--max_eval_samples")])
def test_a_chosen_part_of_a_regression_with_a_single_number_is_refused_likewise(split, flag):
    table = Dataset.from_dict({"text": [str(i) for i in range(40)], "label": [0.5] * 20 + [1.5] * 20})
    examples = Examples({"train": table, "validation": table}, ())
    message = refusal(choose_rows, examples, {split: 10})
    assert message.startswith(f"{split}: the first 10 of 40 rows all have the label '0.5'; the set has 0.5 20, 1.5 20.")
    assert "--sample_seed" in message and flag in message
    assert len({*choose_rows(examples, {split: 10}, 0).splits[split][:]["label"]}) == 2
    assert len(choose_rows(examples, {split: 1}).splits[split]) == 1


def test_a_part_that_lacks_a_class_says_which_in_the_line_of_counts():
    table = Dataset.from_dict({"text": list("abcdef"), "label": [0, 0, 1, 1, 2, 2]})
    examples = Examples({"train": table}, ("x", "y", "z"), {"train": ("text", "label")})
    (line,) = describe_examples(choose_rows(examples, {"train": 4}))
    assert line == "train: 4 rows (the first of 6), text in 'text', labels in 'label': x 2, y 2; none of z."
    (line,) = describe_examples(choose_rows(examples, {"train": 5}, 0), 0)
    assert "5 rows (drawn of 6)" in line


# ------------------------------------------------------------------------------------------- which columns are read

GUESSES = {  # columns of real files whose text was guessed: (header, two rows)
    "SetFit's": ("text,label,label_text", "fine,1,positive", "awful,0,negative"),
    "pandas' index": ("Unnamed: 0,text,label", "0,fine,1", "1,awful,0"),
    "an id": ("review_id,text,label", "r1,fine,1", "r2,awful,0"),
    "a split": ("text,split,label", "fine,train,1", "awful,train,0"),
    "an author": ("text,author,label", "fine,me,1", "awful,you,0"),
    "a title": ("title,body,label", "a,fine,1", "b,awful,0"),
    "two known pairs": ("premise,hypothesis,question,sentence,label", "a,b,c,d,1", "e,f,g,h,0"),
    "half a known pair": ("sentence1,text,label", "a,b,1", "c,d,0"),
}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("what", GUESSES)
def test_columns_of_which_one_would_have_to_guess_are_refused_until_text_columns_names_them(what, form, tmp_path):
    header, *rows = (line.split(",") for line in GUESSES[what])
    if form == "csv":
        path = write(tmp_path / "a.csv", "".join(",".join(line) + "\n" for line in (header, *rows)))
    else:
        path = write(tmp_path / "a.jsonl", json_lines(*(dict(zip(header, row, strict=True)) for row in rows)))
    message = refusal(load_files, {"train": str(path)}, None)
    assert message.startswith(f"{path}: ") and ", ".join(header) in message
    assert "--text_columns" in message and "--label_column" in message
    named = [column for column in header if column not in ("label", "label_text")][-2:]
    examples = load_files({"train": str(path)}, None, named)
    columns = [[row[header.index(column)] for row in rows] for column in named]
    assert_table(examples.splits["train"], columns[0], columns[1] if named[1:] else None, [1, 0])
    assert describe_examples(examples)[0].startswith(
        f"train: 2 rows, text in {' and '.join(map(repr, named))}, labels in 'label'"
    )


def test_label_column_names_another_column_and_what_is_left_is_the_text(tmp_path):
    path = write(tmp_path / "a.csv", "review,sentiment\nfine,good\nawful,bad\n")
    message = refusal(load_files, {"train": str(path)}, None)
    assert message.startswith(f"{path}:2: no column 'label' among review, sentiment") and "--label_column" in message
    examples = load_files({"train": str(path)}, None, None, "sentiment")
    assert_table(examples.splits["train"], ["fine", "awful"], None, [1, 0])
    assert describe_examples(examples) == ["train: 2 rows, text in 'review', labels in 'sentiment': bad 1, good 1."]
    message = refusal(load_files, {"train": str(path)}, None, None, "mood")
    assert "no column 'mood'" in message and "--label_column" in message


def test_a_column_that_text_columns_names_must_be_in_every_file(tmp_path):
    train = write(tmp_path / "train.csv", "text,author,label\nA,me,x\nB,you,y\n")
    test = write(tmp_path / "test.csv", "sentence\nC\n")
    message = refusal(load_files, {"train": str(train)}, None, ("body",))
    assert message.startswith(f"{train}:2: no column 'body' among text, author, label") and "--text_columns" in message
    message = refusal(load_files, {"train": str(train), "test": str(test)}, None, ("text",))
    assert message.startswith(f"{test}:2: no column 'text' among sentence")
    one = write(tmp_path / "one.csv", "text,label\nA,x\nB,y\n")
    message = refusal(load_files, {"train": str(one), "test": str(test)}, None)
    assert message.startswith(f"{test}:2: no column 'text'")  # not another that stands alone


LEAKS = {
    "a label's name": ("text,label,label_text", "{i},0,negative", "{i},1,positive"),
    "a label's number": ("text,label,code", "{i},no,0", "{i},yes,1"),
    "one answer per label": ("text,label,answer", "{i},b,it is so", "{i},a,it is not"),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("what", LEAKS)
def test_a_text_column_with_one_value_per_label_is_refused_by_name(what, split, tmp_path):
    header, *rows = LEAKS[what]
    column = header.split(",")[-1]
    content = header + "\n" + "".join(row.format(i=i) + "\n" for i in range(3) for row in rows)
    path = write(tmp_path / "a.csv", content)
    for columns in ((column,), ("text", column)):
        message = refusal(load_files, {split: str(path)}, None, columns)
        assert message.startswith(f"{path}: column {column!r}") and "--text_columns" in message
    assert load_files({split: str(path)}, None, ("text",)).columns[split] == ("text", "label")


def test_few_rows_mixed_values_and_numbers_are_no_leak(tmp_path):
    few = "text,label\n" + "good,1\nbad,0\n" * 2
    mixed = "text,label\n" + "good,1\nbad,0\n" * 3 + "bad,1\n"
    numbers = "text,label\n" + "good,1.5\nbad,0\n" * 3
    same = "text,label\n" + "good,1\ngood,0\n" * 3
    for content in (few, mixed, numbers, same):
        assert own(tmp_path, "a.csv", content).columns["train"] == ("text", "label")


def test_every_split_has_a_line_of_its_columns_labels_and_counts(tmp_path):
    for _, _, file, lines, *_ in LAYOUTS:
        write(tmp_path / file, tsv(*lines))
    examples = load_examples("mnli", str(tmp_path), {}, ["train", "validation", "test"])
    assert describe_examples(examples) == [
        "train: 3 rows, text in 'sentence1' and 'sentence2', labels in 'gold_label': "
        "entailment 1, neutral 1, contradiction 1.",
        *[f"validation_{kind}: 1 rows, text in 'sentence1' and 'sentence2', labels in 'gold_label': contradiction 1; "
          "none of entailment, neutral." for kind in ("matched", "mismatched")],
        *[f"test_{kind}: 1 rows, text in 'sentence1' and 'sentence2'." for kind in ("matched", "mismatched")],
    ]  # fmt: skip
    (line,) = describe_examples(load_examples("stsb", str(tmp_path), {}, ["train"]))
    texts = "text in 'sentence1' and 'sentence2'"
    assert line == f"train: 2 rows, {texts}, labels in 'score', a regression: numbers from 0.5 to 5."
    many = "text,label\n" + "".join(f"t{i % 7},c{i % 40:02}\n" for i in range(120))
    (line,) = describe_examples(own(tmp_path, "a.csv", many))
    assert line.endswith("c08 3, c09 3 and 30 more.")


def test_labels_that_differ_in_blanks_or_case_alone_are_said_with_their_counts(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(["Pos", "pos ", "neg", "pos "]))
    examples = own(tmp_path, "a.csv", content)
    assert examples.labels == ("Pos", "neg", "pos ")
    (note,) = examples.notes
    assert note.startswith(f"{tmp_path / 'a.csv'}: ") and "'Pos' (1 rows), 'pos ' (2 rows)" in note
    assert describe_examples(examples)[0] == note


@pytest.mark.parametrize("one, other", [("1", "01"), ("+1", "1"), ("-0", "0"), ("1.0", "1")])
def test_labels_that_are_the_same_number_written_otherwise_are_said_with_their_counts(one, other, tmp_path):
    names = ["no"] * (one == "1.0")  # else these are numbers of a regression
    examples = own(tmp_path, "a.csv", of_labels([one, other, one, *names]))
    assert {*examples.labels} == {one, other, *names}
    (note,) = examples.notes
    assert note.startswith(f"{tmp_path / 'a.csv'}: ") and f"'{one}' (2 rows), '{other}' (1 rows)" in note
    assert "the same number in different notations" in note


def test_a_label_that_differs_from_a_known_one_in_blanks_or_case_alone_is_read_as_it_and_said(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nA,POSITIVE\nB,negative \nC,positive\n")
    examples = load_files({"validation": str(path)}, ("positive", "Negative"))
    assert examples.splits["validation"][:]["label"] == [0, 1, 0] and examples.labels == ("positive", "Negative")
    assert examples.notes == (
        f"{path}: label 'POSITIVE' (1 rows) is read as 'positive'.",
        f"{path}: label 'negative ' (1 rows) is read as 'Negative'.",
    )
    path = write(tmp_path / "b.csv", "text,label\nA,POS\n")
    assert f"{path}:2: " in refusal(load_files, {"validation": str(path)}, ("Pos", "pos"))  # it may be either


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("length", [131_072, 131_073, 2_000_000])
def test_a_cell_of_any_length_is_read(name, length, tmp_path):
    mark = "\t" if name == "a.tsv" else ","
    content = f"text{mark}label\n{'x' * length}{mark}y\nshort{mark}n\n"
    assert [len(text) for text in own(tmp_path, name, content).splits["train"][:]["text"]] == [length, 5]


def test_a_long_cell_in_quotes_keeps_its_lines_and_an_open_quote_is_still_refused(tmp_path):
    text = "one, line\n" * 30_000
    assert own(tmp_path, "a.csv", f'text,label\n"{text}",y\nshort,n\n').splits["train"][0]["text"] == text
    message = refusal(own, tmp_path, "b.csv", f'text,label\nshort,n\n"{text}')
    assert message.startswith(f"{tmp_path / 'b.csv'}:") and "broken or cut line" in message
