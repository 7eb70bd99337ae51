"""The choice of rows and the lines that describe them."""

import pytest
from data_files import LAYOUTS, own, refusal, tsv, write
from datasets import Dataset

from lora_nlu.data.examples import Examples, choose_rows, describe_examples
from lora_nlu.data.glue import load_glue


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
    alone = choose_rows(of_two_classes([1] * 50), {split: 10})  # the set has no more
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


def test_the_line_of_counts_names_a_class_that_is_missing_from_a_part():
    table = Dataset.from_dict({"text": list("abcdef"), "label": [0, 0, 1, 1, 2, 2]})
    examples = Examples({"train": table}, ("x", "y", "z"), {"train": ("text", "label")})
    (line,) = describe_examples(choose_rows(examples, {"train": 4}))
    assert line == "train: 4 rows (the first of 6), text in 'text', labels in 'label': x 2, y 2; none of z."
    (line,) = describe_examples(choose_rows(examples, {"train": 5}, 0), 0)
    assert "5 rows (drawn of 6)" in line


def test_every_split_has_a_line_of_its_columns_labels_and_counts(tmp_path):
    for _, _, file, lines, *_ in LAYOUTS:
        write(tmp_path / file, tsv(*lines))
    examples = load_glue("mnli", ["train", "validation", "test"], str(tmp_path))
    assert describe_examples(examples) == [
        "train: 3 rows, text in 'sentence1' and 'sentence2', labels in 'gold_label': "
        "entailment 1, neutral 1, contradiction 1.",
        *[f"validation_{kind}: 1 rows, text in 'sentence1' and 'sentence2', labels in 'gold_label': contradiction 1; "
          "none of entailment, neutral." for kind in ("matched", "mismatched")],
        *[f"test_{kind}: 1 rows, text in 'sentence1' and 'sentence2'." for kind in ("matched", "mismatched")],
    ]  # fmt: skip
    (line,) = describe_examples(load_glue("stsb", ["train"], str(tmp_path)))
    texts = "text in 'sentence1' and 'sentence2'"
    assert line == f"train: 2 rows, {texts}, labels in 'score', a regression: numbers from 0.5 to 5."
    many = "text,label\n" + "".join(f"t{i % 7},c{i % 40:02}\n" for i in range(120))
    (line,) = describe_examples(own(tmp_path, "a.csv", many))
    assert line.endswith("c08 3, c09 3 and 30 more.")
