"""The GLUE benchmark (Wang et al. 2018, arXiv 1804.07461) as data: columns, labels, files, metrics of each task."""

from dataclasses import dataclass, field

BINARY = ("0", "1")


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    text:     the one or two text columns as the Hub's `nyu-mll/glue` names them.
    labels:   label names in the Hub's id order; () for a regression task.
    metrics:  names from `metrics.py`; reports and the choice of the best checkpoint use the first.
    splits:   for train, validation and test the Hub's split names (MNLI has two each of validation and test).
    files:    file of each split under the GLUE folder; several names where downloads differ.
    columns:  columns of the file's header that hold text (and, last, the label), where they differ from the defaults.
    written:  how the file writes each label, in id order, where it is not the label's name.
    rows:     number of examples of each split as published.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    rows: dict[str, int]
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    written: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()  # the columns of train and dev files that have no header (CoLA)
    skips_broken_lines: bool = False  # QQP: the Hub leaves out the few published lines that are broken
    splits: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"train": ("train",), "validation": ("validation",), "test": ("test",)}
    )

    @property
    def title(self) -> str:
        """The name that papers and the GLUE server use: CoLA, SST-2, ..."""
        return next(iter(self.files.values()))[0].split("/")[0]

    @property
    def is_regression(self) -> bool:
        return not self.labels


def _task(name: str, folder: str, rows: tuple[int, int, int], **fields) -> Task:
    files: dict[str, tuple[str, ...]] = {
        split: (f"{folder}/{file}.tsv",)
        for split, file in zip(("train", "validation", "test"), ("train", "dev", "test"), strict=True)
    }
    return Task(name=name, files=files, rows=dict(zip(("train", "validation", "test"), rows, strict=True)), **fields)


_MNLI_LABELS = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "cola",
            "CoLA",
            (8551, 1043, 1063),
            text=("sentence",),
            labels=("unacceptable", "acceptable"),
            written=BINARY,
            metrics=("matthews_correlation",),
            headerless=("source", "label", "mark", "sentence"),
        ),
        _task(
            "sst2",
            "SST-2",
            (67349, 872, 1821),
            text=("sentence",),
            labels=("negative", "positive"),
            written=BINARY,
            metrics=("accuracy",),
        ),
        _task(
            "mrpc",
            "MRPC",
            (3668, 408, 1725),
            text=("sentence1", "sentence2"),
            text_columns=("#1 String", "#2 String"),
            label_column="Quality",
            labels=("not_equivalent", "equivalent"),
            written=BINARY,
            metrics=("accuracy", "f1"),
        ),
        _task(
            "stsb",
            "STS-B",
            (5749, 1500, 1379),
            text=("sentence1", "sentence2"),
            label_column="score",
            labels=(),
            metrics=("pearson", "spearmanr"),
        ),
        _task(
            "qqp",
            "QQP",
            (363846, 40430, 390965),
            text=("question1", "question2"),
            label_column="is_duplicate",
            labels=("not_duplicate", "duplicate"),
            written=BINARY,
            metrics=("accuracy", "f1"),
            skips_broken_lines=True,
        ),
        Task(
            name="mnli",
            text=("premise", "hypothesis"),
            text_columns=("sentence1", "sentence2"),
            label_column="gold_label",
            labels=_MNLI_LABELS,
            metrics=("accuracy",),
            splits={
                "train": ("train",),
                "validation": ("validation_matched", "validation_mismatched"),
                "test": ("test_matched", "test_mismatched"),
            },
            files={
                "train": ("MNLI/train.tsv",),
                "validation_matched": ("MNLI/dev_matched.tsv",),
                "validation_mismatched": ("MNLI/dev_mismatched.tsv",),
                "test_matched": ("MNLI/test_matched.tsv",),
                "test_mismatched": ("MNLI/test_mismatched.tsv",),
            },
            rows={
                "train": 392702,
                "validation_matched": 9815,
                "validation_mismatched": 9832,
                "test_matched": 9796,
                "test_mismatched": 9847,
            },
        ),
        _task(
            "qnli",
            "QNLI",
            (104743, 5463, 5463),
            text=("question", "sentence"),
            labels=_ENTAILMENT,
            metrics=("accuracy",),
        ),
        _task(
            "rte",
            "RTE",
            (2490, 277, 3000),
            text=("sentence1", "sentence2"),
            labels=_ENTAILMENT,
            metrics=("accuracy",),
        ),
        _task(
            "wnli",
            "WNLI",
            (635, 71, 146),
            text=("sentence1", "sentence2"),
            labels=("not_entailment", "entailment"),
            written=BINARY,
            metrics=("accuracy",),
        ),
        Task(
            name="ax",
            text=("premise", "hypothesis"),
            text_columns=("sentence1", "sentence2"),
            labels=_MNLI_LABELS,
            metrics=("matthews_correlation",),
            splits={"train": (), "validation": (), "test": ("test",)},
            files={"test": ("AX/test.tsv", "AX/AX.tsv", "diagnostic/diagnostic.tsv")},
            rows={"test": 1104},
        ),
    )
}
REPORTED = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")  # in the order of the paper's columns
