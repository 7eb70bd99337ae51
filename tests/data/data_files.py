"""Files written for the tests of this folder, and the tables read back."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

from lora_nlu.data.examples import Examples
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UserError

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


def assert_table(table: Dataset, text: list, text_pair: list | None, label: list | None) -> None:
    want = {"text": text, "text_pair": text_pair, "label": label}
    assert table.to_dict() == {name: column for name, column in want.items() if column is not None}


def own(folder: Path, name: str, content: str | bytes, recorded_labels: list[str] | tuple | None = None) -> Examples:
    """One training file read alone."""
    return load_files({"train": str(write(folder / name, content))}, recorded_labels)
