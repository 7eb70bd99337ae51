"""Files that are larger than the memory they may take, and files of which only the first rows are read."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_files import assert_table, refusal, write

from lora_nlu.data import lines
from lora_nlu.data.examples import Examples, choose_rows, describe_examples
from lora_nlu.data.user_files import load_files

LOAD = """
import sys, threading, time
from lora_nlu.data.examples import choose_rows, describe_examples
from lora_nlu.data.user_files import load_files

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024

def watch():
    while True:
        peaks.append(anonymous())
        time.sleep(0.02)

file, small, folder = sys.argv[1:]
load_files({"train": small}, None, cache_dir=folder)  # what the libraries take
before, peaks = anonymous(), []
threading.Thread(target=watch, daemon=True).start()
examples = choose_rows(load_files({"train": file}, None, cache_dir=folder), {})
print(describe_examples(examples)[0])
print(max(peaks) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_the_memory_for_a_file_of_64_mb_is_a_fraction_of_its_size(name, tmp_path):
    text, rows = "a word of several, " * 34, 100_000  # 640 bytes a row
    with (tmp_path / name).open("w") as file:
        file.write("text,label\n" if name == "a.csv" else "")
        for i in range(rows):
            label = "yes" if i % 2 else "no"
            file.write(
                f'"{text}{i}",{label}\n' if name == "a.csv" else json.dumps({"text": text, "label": label}) + "\n"
            )
    assert (tmp_path / name).stat().st_size > 64e6
    small = write(tmp_path / "small.csv", "text,label\nA,x\nB,y\n")
    for _ in range(2):  # parsed, then from the cache
        command = [sys.executable, "-c", LOAD, tmp_path / name, small, tmp_path]
        line, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert line == "train: 100000 rows, text in 'text', labels in 'label': no 50000, yes 50000."
        assert int(megabytes) < 32


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_byte_that_is_not_utf8_far_into_a_file_is_named_by_its_line_and_place(name, newline, tmp_path):
    rows = [("é" * 50, "yes" if i % 2 else "no") for i in range(5000)]
    if name == "a.jsonl":
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    else:
        lines = [("," if name == "a.csv" else "\t").join(row) for row in [("text", "label"), *rows]]
    good = [line.encode() + newline.encode() for line in lines]
    place = sum(map(len, good[:4321])) + 12
    content = b"".join(good)
    path = write(tmp_path / name, content[:place] + b"\xff" + content[place + 1 :])
    message = refusal(load_files, {"train": str(path)}, None)
    assert message == f"{path}:4322: not UTF-8 (byte {place}). Save the file as UTF-8."


def limited(path: Path, split: str, names: tuple | None, limit: int) -> Examples:
    limits = {split: limit}
    return choose_rows(load_files({split: str(path)}, names, limits=limits), limits)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_the_first_rows_are_read_if_the_class_names_come_from_elsewhere(split, tmp_path):
    rows = "".join(f"{text},{'xy'[i % 2]}\n" for i, text in enumerate("ABCDEFGHIJ"))
    path = write(tmp_path / "a.csv", f"text,label\n{rows}broken\n")
    examples = limited(path, split, ("x", "y"), 4)
    assert_table(examples.splits[split], [*"ABCD"], None, None if split == "test" else [0, 1, 0, 1])
    assert describe_examples(examples)[0].startswith(f"{split}: 4 rows (the first, no more of the file is read), text")
    assert refusal(limited, path, split, ("x", "y"), 11).startswith(f"{path}:12: ")
    if split != "test":
        assert refusal(limited, path, split, None, 4).startswith(f"{path}:12: ")
    complete = write(tmp_path / "b.csv", f"text,label\n{rows}")
    assert "10 rows, text" in describe_examples(limited(complete, split, ("x", "y"), 10))[0]


def test_the_complete_file_is_read_if_its_first_rows_all_have_one_label(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"{i},{'xy'[i > 4]}\n" for i in range(10)))
    message = refusal(limited, path, "train", ("x", "y"), 4)
    assert message.startswith("train: the first 4 of 10 rows all have the label 'x'; the set has x 5, y 5.")
    numbers = write(tmp_path / "b.csv", "text,label\n" + "A,0.5\n" * 5 + "B,1.5\n" * 5)
    assert "the first 4 of 10 rows all have the label '0.5'" in refusal(limited, numbers, "validation", (), 4)
    assert len(limited(path, "train", ("x", "y"), 1).splits["train"]) == 1


def test_a_validation_file_may_be_limited_by_the_class_names_of_the_training_file(tmp_path):
    train = write(tmp_path / "train.csv", "text,label\nA,x\nB,y\n")
    dev = write(tmp_path / "dev.csv", "text,label\nC,y\nD,x\nE,y\nbroken\n")
    files = {"train": str(train), "validation": str(dev)}
    examples = load_files(files, None, limits={"train": 2, "validation": 2})
    assert examples.labels == ("x", "y") and examples.rows == {"validation": None}
    assert_table(examples.splits["validation"], ["C", "D"], None, [1, 0])


def test_other_first_rows_are_another_table(tmp_path):
    fingerprints = set()
    for content in ("A,x\nB,y\nC,x\n", "A,y\nB,x\nC,x\n", "a,x\nB,y\nC,x\n"):
        path = write(tmp_path / "a.csv", f"text,label\n{content}")
        fingerprints.add(limited(path, "train", ("x", "y"), 2).splits["train"]._fingerprint)
    assert len(fingerprints) == 3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds, is_shown", [(4, False), (6, True)])
@pytest.mark.parametrize("stream, is_terminal", [(Terminal(), True), (io.StringIO(), False)])
def test_a_progress_bar_appears_on_a_terminal_after_five_seconds(
    seconds, is_shown, stream, is_terminal, tmp_path, monkeypatch
):
    class LateBar(lines.tqdm):
        def __init__(self, **settings) -> None:
            super().__init__(file=stream, **settings)
            self._time = lambda: time.time() + seconds

    monkeypatch.setattr(lines, "tqdm", LateBar)
    path = write(tmp_path / "a.csv", "a line\n" * 40_000)
    stream.truncate(stream.seek(0))
    assert sum(1 for _ in lines.read_lines(path, "\n")) == 40_000
    assert ("Reading a.csv" in stream.getvalue()) == (is_shown and is_terminal)
