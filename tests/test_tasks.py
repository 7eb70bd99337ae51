"""The task table against the Hub's and the paper's, written out by hand."""

import pytest

from lora_nlu.metrics import METRICS
from lora_nlu.tasks import TASKS

# `datasets.load_dataset("nyu-mll/glue", task).features["label"].names`; STS-B's label is a float
HUB_LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "stsb": [],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
    "ax": ["entailment", "neutral", "contradiction"],
}
HUB_TEXT = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
    "ax": ["premise", "hypothesis"],
}
PUBLISHED_METRICS = {
    "cola": ["matthews_correlation"],
    "sst2": ["accuracy"],
    "mrpc": ["accuracy", "f1"],
    "stsb": ["pearson", "spearmanr"],
    "qqp": ["accuracy", "f1"],
    "mnli": ["accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "wnli": ["accuracy"],
    "ax": ["matthews_correlation"],
}
ROWS = {
    "cola": [8551, 1043, 1063],
    "sst2": [67349, 872, 1821],
    "mrpc": [3668, 408, 1725],
    "stsb": [5749, 1500, 1379],
    "qqp": [363846, 40430, 390965],
    "mnli": [392702, 9815, 9832, 9796, 9847],
    "qnli": [104743, 5463, 5463],
    "rte": [2490, 277, 3000],
    "wnli": [635, 71, 146],
    "ax": [1104],
}


def test_the_table_holds_the_ten_tasks_of_glue_under_their_own_names():
    assert set(TASKS) == set(HUB_LABELS) and len(TASKS) == 10
    assert all(TASKS[name].name == name for name in TASKS)


@pytest.mark.parametrize("name", HUB_LABELS)
def test_labels_stand_in_the_hubs_id_order_and_only_stsb_is_a_regression(name):
    assert list(TASKS[name].labels) == HUB_LABELS[name]
    assert TASKS[name].is_regression == (name == "stsb")


@pytest.mark.parametrize("name", HUB_TEXT)
def test_text_columns_are_named_as_on_the_hub(name):
    assert list(TASKS[name].text) == HUB_TEXT[name]


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_those_published(name):
    assert list(TASKS[name].rows.values()) == ROWS[name]


@pytest.mark.parametrize("name", PUBLISHED_METRICS)
def test_metrics_are_those_of_the_paper_and_all_can_be_computed(name):
    assert list(TASKS[name].metrics) == PUBLISHED_METRICS[name]
    assert set(TASKS[name].metrics) <= set(METRICS)


@pytest.mark.parametrize("name", HUB_LABELS)
def test_every_split_has_a_file_and_a_row_count(name):
    task = TASKS[name]
    splits = [split for group in ("train", "validation", "test") for split in task.splits[group]]
    assert splits == list(task.files) == list(task.rows)


def test_mnli_is_evaluated_and_predicted_on_matched_and_mismatched_and_ax_is_only_predicted():
    assert TASKS["mnli"].splits == {
        "train": ("train",),
        "validation": ("validation_matched", "validation_mismatched"),
        "test": ("test_matched", "test_mismatched"),
    }
    assert TASKS["ax"].splits == {"train": (), "validation": (), "test": ("test",)}
