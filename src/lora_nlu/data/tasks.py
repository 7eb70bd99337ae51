"""The GLUE benchmark (Wang et al. 2018, arXiv 1804.07461) as data: columns, labels, files, metrics of each task."""

from dataclasses import dataclass

BINARY = ("0", "1")


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    text:     the one or two text columns as the Hub's `nyu-mll/glue` names them.
    labels:   label names in the Hub's id order; () for a regression task.
    metrics:  names from `metrics.py`; reports and the choice of the best checkpoint use the first.
    files:    file of each split (by the Hub's name) under the GLUE folder; several names where downloads differ.
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

    @property
    def title(self) -> str:
        """The name that papers and the GLUE server use: CoLA, SST-2, ..."""
        return next(iter(self.files.values()))[0].split("/")[0]

    @property
    def splits(self) -> dict[str, tuple[str, ...]]:
        """The Hub's split names for train, validation and test; MNLI has two each of validation and test."""
        return {kind: tuple(split for split in self.files if split.startswith(kind)) for kind in _SPLITS}

    @property
    def is_regression(self) -> bool:
        return not self.labels


_SPLITS = ("train", "validation", "test")
_MNLI_SPLITS = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")


def _task(name: str, folder: str, rows: tuple[int, ...], **fields) -> Task:
    splits = _MNLI_SPLITS if name == "mnli" else _SPLITS
    files: dict[str, tuple[str, ...]] = {
        split: (f"{folder}/{split.replace('validation', 'dev')}.tsv",) for split in splits
    }
    return Task(name=name, files=files, rows=dict(zip(splits, rows, strict=True)), **fields)


_SENTENCES = ("sentence1", "sentence2")
_MNLI_LABELS = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("cola", "CoLA", (8551, 1043, 1063), text=("sentence",), labels=("unacceptable", "acceptable"),
              written=BINARY, headerless=("source", "label", "mark", "sentence"), metrics=("matthews_correlation",)),
        _task("sst2", "SST-2", (67349, 872, 1821), text=("sentence",), labels=("negative", "positive"),
              written=BINARY, metrics=("accuracy",)),
        _task("mrpc", "MRPC", (3668, 408, 1725), text=_SENTENCES, text_columns=("#1 String", "#2 String"),
              labels=("not_equivalent", "equivalent"), label_column="Quality", written=BINARY,
              metrics=("accuracy", "f1")),
        _task("stsb", "STS-B", (5749, 1500, 1379), text=_SENTENCES, labels=(), label_column="score",
              metrics=("pearson", "spearmanr")),
        _task("qqp", "QQP", (363846, 40430, 390965), text=("question1", "question2"),
              labels=("not_duplicate", "duplicate"), label_column="is_duplicate", written=BINARY,
              metrics=("accuracy", "f1"), skips_broken_lines=True),
        _task("mnli", "MNLI", (392702, 9815, 9832, 9796, 9847), text=("premise", "hypothesis"),
              text_columns=_SENTENCES, labels=_MNLI_LABELS, label_column="gold_label", metrics=("accuracy",)),
        _task("qnli", "QNLI", (104743, 5463, 5463), text=("question", "sentence"), labels=_ENTAILMENT,
              metrics=("accuracy",)),
        _task("rte", "RTE", (2490, 277, 3000), text=_SENTENCES, labels=_ENTAILMENT, metrics=("accuracy",)),
        _task("wnli", "WNLI", (635, 71, 146), text=_SENTENCES, labels=("not_entailment", "entailment"),
              written=BINARY, metrics=("accuracy",)),
        Task("ax", text=("premise", "hypothesis"), text_columns=_SENTENCES, labels=_MNLI_LABELS,
             metrics=("matthews_correlation",), rows={"test": 1104},
             files={"test": ("AX/test.tsv", "AX/AX.tsv", "diagnostic/diagnostic.tsv")}),
    )
}  # fmt: skip
REPORTED = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")  # in the order of the paper's columns
