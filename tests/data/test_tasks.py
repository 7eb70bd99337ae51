"""The task table against the Hub's and the paper's, written out by hand."""

import pytest

from lora_nlu.data.metrics import METRICS
from lora_nlu.data.tasks import REPORTED, TASKS
from lora_nlu.report.paper import LORA_RANKS, PAPER

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
TITLES = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
    "wnli": "WNLI",
    "ax": "AX",
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


def test_the_table_contains_the_ten_tasks_of_glue_under_their_own_names():
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


@pytest.mark.parametrize("name", TITLES)
def test_a_tasks_title_is_its_name_in_papers_and_on_the_server(name):
    assert TASKS[name].title == TITLES[name]


# -------------------------------------------------------------------------------------------------- the paper's table 2

# model, method, trainable, then MNLI SST-2 MRPC CoLA QNLI QQP RTE STS-B, and the average as printed there
TABLE_2 = """
roberta-base       | full                | 125.0M | 87.6 94.8 90.2 63.6 92.8 91.9 78.7 91.2 | 86.4
roberta-base       | bitfit              | 0.1M   | 84.7 93.7 92.7 62.0 91.8 84.0 81.5 90.8 | 85.2
roberta-base       | lora                | 0.3M   | 87.5 95.1 89.7 63.4 93.3 90.8 86.6 91.5 | 87.2
roberta-large      | full                | 355.0M | 90.2 96.4 90.9 68.0 94.7 92.2 86.6 92.4 | 88.9
roberta-large      | lora                | 0.8M   | 90.6 96.2 90.9 68.2 94.9 91.6 87.4 92.6 | 89.0
roberta-large      | pfeiffer 64         | 3.0M   | 90.2 96.1 90.2 68.3 94.8 91.9 83.8 92.1 | 88.4
roberta-large      | pfeiffer 16         | 0.8M   | 90.5 96.6 89.7 67.8 94.8 91.7 80.1 91.9 | 87.9
roberta-large      | houlsby 64          | 6.0M   | 89.9 96.2 88.7 66.5 94.7 92.1 83.4 91.0 | 87.8
roberta-large      | houlsby 8           | 0.8M   | 90.3 96.3 87.7 66.3 94.7 91.5 72.9 91.5 | 86.4
roberta-large      | lora, no MNLI start | 0.8M   | 90.6 96.2 90.2 68.2 94.8 91.6 85.2 92.3 | 88.6
deberta-v2-xxlarge | full                | 1500M  | 91.8 97.2 92.0 72.0 96.0 92.7 93.9 92.9 | 91.1
deberta-v2-xxlarge | lora                | 4.7M   | 91.9 96.9 92.6 72.4 96.0 92.9 94.9 93.0 | 91.3
"""
# its standard deviations, in the same order; lines without are from earlier work
DEVIATIONS = {
    ("roberta-base", "lora"): [0.3, 0.2, 0.7, 1.2, 0.3, 0.1, 0.7, 0.2],
    ("roberta-large", "lora"): [0.2, 0.5, 1.2, 1.9, 0.3, 0.1, 2.5, 0.2],
    ("roberta-large", "pfeiffer 64"): [0.3, 0.3, 0.7, 1.0, 0.2, 0.1, 2.9, 0.7],
    ("roberta-large", "pfeiffer 16"): [0.3, 0.2, 1.2, 2.5, 0.3, 0.2, 2.9, 0.4],
    ("roberta-large", "houlsby 64"): [0.5, 0.3, 2.9, 4.4, 0.2, 0.1, 1.1, 1.7],
    ("roberta-large", "houlsby 8"): [0.3, 0.3, 1.7, 2.0, 0.2, 0.1, 2.9, 0.5],
    ("roberta-large", "lora, no MNLI start"): [0.2, 0.5, 1.0, 1.9, 0.3, 0.2, 1.1, 0.5],
    ("deberta-v2-xxlarge", "lora"): [0.2, 0.2, 0.6, 1.1, 0.1, 0.1, 0.4, 0.2],
}
COLUMNS = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]


def test_the_papers_figures_are_those_of_its_table_2_and_their_means_its_averages():
    lines = [[cell.strip() for cell in line.split("|")] for line in TABLE_2.strip().splitlines()]
    assert [(line.model, line.method, line.trainable) for line in PAPER] == [tuple(line[:3]) for line in lines]
    assert list(REPORTED) == COLUMNS
    for line, (*key, _, figures, average) in zip(PAPER, lines, strict=True):
        medians, deviations = zip(*line.figures.values(), strict=True)
        assert list(line.figures) == COLUMNS and list(medians) == [float(figure) for figure in figures.split()]
        assert list(deviations) == DEVIATIONS.get(tuple(key), [None] * 8)
        # the paper rounded what it averaged, so that a mean of rounded figures may be off by half a digit
        assert sum(medians) / 8 == pytest.approx(float(average), abs=0.05 + 1e-9)


def test_the_ranks_are_those_behind_the_papers_numbers_of_trainable_parameters():
    # A and B of r times the hidden size, for query and value of each layer
    layers_and_widths = {"roberta-base": (12, 768), "roberta-large": (24, 1024), "deberta-v2-xxlarge": (48, 1536)}
    assert set(LORA_RANKS) == set(layers_and_widths)
    for model, (layers, width) in layers_and_widths.items():
        count = layers * 2 * 2 * LORA_RANKS[model] * width
        printed = {line.trainable for line in PAPER if line.model == model and "lora" in line.method}
        assert printed == {f"{count / 1e6:.1f}M"}
