"""A user's own CSV, TSV and JSON lines: columns, labels, and errors with file and line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from data_files import BOM, assert_table, own, refusal, write

from lora_nlu.data.examples import Examples, describe_examples
from lora_nlu.data.user_files import load_files


def json_lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "A.CSV", "A.TSV", "A.JSON", "A.Jsonl"])
def test_one_text_column_of_any_name_and_string_labels_in_alphabetical_order(tmp_path, name):
    rows = [("fine", "good"), ("awful", "bad"), ("so-so, yes", "neutral")]
    if name.lower().startswith("a.json"):
        content = json_lines(*({"review": text, "label": label} for text, label in rows))
    else:
        form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.lower() == "a.tsv" else {}
        csv.writer(file := io.StringIO(), **form).writerows([("review", "label"), *rows])
        content = file.getvalue()
    examples = own(tmp_path, name, content)
    assert examples.labels == ("bad", "good", "neutral")
    assert_table(examples.splits["train"], ["fine", "awful", "so-so, yes"], None, [1, 0, 2])


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
def test_a_pair_with_usual_names_is_found_among_other_columns_in_its_own_order(tmp_path, first, second):
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


def test_csv_fields_in_quotes_may_contain_commas_newlines_and_quotes(tmp_path):
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
    for files, recorded_labels in ((["train"], None), (["validation"], None), (["validation"], ("bad", "good"))):
        message = refusal(load_files, dict.fromkeys(files, str(path)), recorded_labels)
        assert message.startswith(f"{path}: column 'label' has {n} different labels in {count} rows ({labels[0]}, ")
        assert all(flag in message for flag in ("--label_column", "--text_columns", "--labels")) and len(message) < 500
    other = write(tmp_path / "train.csv", of_labels(["bad", "good"] * 5))
    message = refusal(load_files, {"train": str(other), "validation": str(path)}, None)
    assert message.startswith(f"{path}: column 'label' has {n} different labels")


def test_many_classes_are_read_if_they_are_recorded_or_rows_are_few_or_each_occurs_twice(tmp_path):
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


def test_the_error_on_an_unknown_label_says_where_the_labels_come_from(tmp_path):
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


def train_and(folder: Path, split: str, train: str, other: str, recorded_labels: tuple | None = None) -> Examples:
    paths = {"train": write(folder / "train.csv", train), split: write(folder / f"{split}.csv", other)}
    return load_files({name: str(path) for name, path in paths.items()}, recorded_labels)


def test_validation_labels_get_the_ids_of_the_training_labels(tmp_path):
    examples = train_and(tmp_path, "validation", "text,label\nA,z\nB,m\nC,a\n", "text,label\nD,z\nE,m\n")
    assert examples.labels == ("a", "m", "z")
    assert_table(examples.splits["validation"], ["D", "E"], None, [2, 1])


def test_a_validation_label_that_training_never_saw_is_named_by_file_and_line(tmp_path):
    message = refusal(train_and, tmp_path, "validation", "text,label\nA,x\nB,y\n", "text,label\nC,x\nD,new\n")
    assert message.startswith(f"{tmp_path / 'validation.csv'}:3: ") and "'new'" in message and "x, y" in message


def test_a_regressions_validation_file_may_contain_integers_but_no_words(tmp_path):
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


def test_recorded_labels_set_the_ids_and_no_others_are_accepted(tmp_path):
    examples = own(tmp_path, "a.csv", "text,label\nA,x\nB,y\n", ["z", "y", "x"])
    assert examples.labels == ("z", "y", "x") and examples.splits["train"][:]["label"] == [2, 1]
    assert refusal(own, tmp_path, "a.csv", "text,label\nA,x\nB,q\n", ["x", "y"]).startswith(f"{tmp_path / 'a.csv'}:3: ")


def test_the_recorded_labels_need_not_all_occur(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nA,x\n")
    assert load_files({"validation": str(path)}, ["x", "y"]).splits["validation"][:]["label"] == [0]
    assert own(tmp_path, "b.csv", "text,label\nA,x\nB,z\n", ["x", "y", "z"]).splits["train"][:]["label"] == [0, 2]
    assert "nothing to learn" in refusal(own, tmp_path, "c.csv", "text,label\nA,x\n", ["x", "y"])


def test_integers_are_read_as_floats_if_a_regression_is_recorded(tmp_path):
    examples = own(tmp_path, "a.csv", "text,label\nA,1\nB,2\n", ())
    assert examples.is_regression and examples.splits["train"][:]["label"] == [1.0, 2.0]
    assert f"{tmp_path / 'a.csv'}:2: " in refusal(own, tmp_path, "a.csv", "text,label\nA,x\n", ())


def test_validation_alone_sets_the_labels_and_a_test_file_alone_cannot(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nA,y\nB,x\n")
    assert load_files({"validation": str(path)}, None).labels == ("x", "y")
    assert "--train_file" in refusal(load_files, {"test": str(path)}, None)
    assert load_files({"test": str(path)}, ["x", "y"]).labels == ("x", "y")


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


def test_labels_that_differ_in_blanks_or_case_alone_are_reported_with_their_counts(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(["Pos", "pos ", "neg", "pos "]))
    examples = own(tmp_path, "a.csv", content)
    assert examples.labels == ("Pos", "neg", "pos ")
    (note,) = examples.notes
    assert note.startswith(f"{tmp_path / 'a.csv'}: ") and "'Pos' (1 rows), 'pos ' (2 rows)" in note
    assert describe_examples(examples)[0] == note


@pytest.mark.parametrize("one, other", [("1", "01"), ("+1", "1"), ("-0", "0"), ("1.0", "1")])
def test_labels_that_are_the_same_number_written_otherwise_are_reported_with_their_counts(one, other, tmp_path):
    names = ["no"] * (one == "1.0")  # else these are numbers of a regression
    examples = own(tmp_path, "a.csv", of_labels([one, other, one, *names]))
    assert {*examples.labels} == {one, other, *names}
    (note,) = examples.notes
    assert note.startswith(f"{tmp_path / 'a.csv'}: ") and f"'{one}' (2 rows), '{other}' (1 rows)" in note
    assert "the same number in different notations" in note


def test_a_label_that_differs_from_a_recorded_one_in_blanks_or_case_alone_is_read_as_it_and_reported(tmp_path):
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


@pytest.mark.parametrize("name", ["nan", "None", "NA", "null", "N/A"])
def test_a_word_for_a_missing_value_is_a_class_and_a_line_says_so(name, tmp_path):
    content = f"text,label\nA,yes\nB,no\nC,{name}\nD,{name}\n"
    examples = own(tmp_path, "a.csv", content)
    assert {*examples.labels} == {"yes", "no", name}
    remedy = "If it means that the label is missing, remove these rows."
    assert examples.notes == (f"{tmp_path / 'a.csv'}: {name!r} is a class (2 rows). {remedy}",)
    assert own(tmp_path, "a.csv", content, ["yes", "no", name]).notes == ()  # named on purpose


def test_messages_are_short_whatever_the_number_of_classes_columns_or_digits(tmp_path):
    names = [f"class {i}" for i in range(10_000)]
    message = refusal(own, tmp_path, "a.csv", "text,label\nA,class 1\nB,other\n", names)
    assert message.startswith(f"{tmp_path / 'a.csv'}:3: label 'other' is not among") and len(message) < 500
    assert message.endswith("class 9 and 9990 more.")
    columns = ",".join(f"column {i}" for i in range(10_000))
    for content in (f"{columns}\n", f"{columns},label\n", f"{columns},column 1,label\n"):
        message = refusal(own, tmp_path, "b.csv", content + "x," * content.count(",") + "x\n")
        assert "more" in message and len(message) < 1000
    big = json_lines({"text": "A", "label": 1}, {"text": ["word"] * 10_000, "label": 0})
    assert len(refusal(own, tmp_path, "a.jsonl", big)) < 500
    big = json_lines({"text": "A", "label": 1}, {"text": "B", "label": " " * 10_000})
    assert len(refusal(own, tmp_path, "a.jsonl", big)) < 500


def test_three_spellings_of_a_label_are_three_classes_and_a_line_names_them(tmp_path):
    examples = own(tmp_path, "a.csv", "text,label\nA,yes\nB,yes \nC,Yes\nD,no\n")
    assert examples.labels == ("Yes", "no", "yes", "yes ")
    (note,) = examples.notes
    assert note.endswith("count as different classes: 'yes' (1 rows), 'yes ' (1 rows), 'Yes' (1 rows).")
