"""Cached tables: used again if they are intact, made again if they are damaged."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from data_files import own, refusal, tsv, write
from datasets import Dataset
from transformers import BertTokenizer

from lora_nlu.data import cache, glue, user_files
from lora_nlu.data.glue import load_glue
from lora_nlu.data.tokenization import tokenize

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "cat": 5, "dog": 6}
ROWS = 2500  # three batches


def tokens_of_own_file(folder: Path) -> Dataset:
    content = "text,label\n" + "".join(f"{'cat ' * (i % 7 + 1)},{'xyz'[i % 3]}\n" for i in range(ROWS))
    return tokenize(own(folder, "a.csv", content), BertTokenizer(vocab=VOCABULARY), 16)[0]["train"]


def rows_of_a_task(folder: Path, **settings: Any) -> Dataset:
    lines = ["sentence | label", *(f"{'dog ' * (i % 7 + 1)}| {i % 2}" for i in range(ROWS))]
    write(folder / "SST-2" / "train.tsv", tsv(*lines))
    return load_glue("sst2", ["train"], str(folder), **settings).splits["train"]


def cut_after_a_batch(content: bytes) -> bytes:
    """The first of several batches, complete by Arrow's rules."""
    with pa.ipc.open_stream(content) as reader:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, reader.schema) as writer:
            writer.write_batch(reader.read_next_batch())
    return sink.getvalue().to_pybytes()


DAMAGES = {
    "empty": lambda content: b"",
    "only a few bytes": lambda content: content[:16],
    "cut": lambda content: content[: len(content) // 2],
    "cut after a batch": cut_after_a_batch,
    "cut after a batch, but for its end": lambda content: cut_after_a_batch(content)[:-8],
    "without its last byte": lambda content: content[:-1],
    "one bit of a value": lambda content: content[:-9000] + bytes([content[-9000] ^ 1]) + content[-8999:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("make", [tokens_of_own_file, rows_of_a_task])
def test_a_cached_table_that_is_damaged_is_made_again(make, damage, tmp_path, cache, monkeypatch):
    monkeypatch.setattr("lora_nlu.data.cache._BLOCK_BYTES", 5000)  # several a file
    right = make(tmp_path).to_dict()
    files = {path: path.read_bytes() for path in cache.rglob("*.arrow")}
    assert len(files) == (2 if make is tokens_of_own_file else 1)
    for path, content in files.items():
        path.write_bytes(DAMAGES[damage](content))
        assert make(tmp_path).to_dict() == right
        assert path.read_bytes() == content
    assert {*cache.rglob("*.*")} == {*files}


def test_a_second_start_parses_no_file_and_tokenises_nothing(tmp_path, monkeypatch):
    first = [tokens_of_own_file(tmp_path).to_dict(), rows_of_a_task(tmp_path).to_dict()]
    for module in (user_files, glue):
        monkeypatch.setattr(module, "_batches", lambda *arguments: 1 / 0)
    monkeypatch.setattr("lora_nlu.data.tokenization._encoded", lambda *arguments: 1 / 0)
    assert [tokens_of_own_file(tmp_path).to_dict(), rows_of_a_task(tmp_path).to_dict()] == first


def test_overwrite_cache_reads_a_glue_folder_again(tmp_path, monkeypatch):
    rows_of_a_task(tmp_path)
    monkeypatch.setattr(glue, "_batches", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows_of_a_task(tmp_path, overwrite_cache=True)


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_cached(tmp_path, monkeypatch, cache):
    def changing(*arguments):
        yield from batches(*arguments)
        path.write_text(path.read_text() + "D,x\n")

    batches, path = user_files._batches, tmp_path / "a.csv"
    monkeypatch.setattr(user_files, "_batches", changing)
    message = refusal(own, tmp_path, "a.csv", "text,label\nA,x\nB,y\nC,x\n")
    assert message == f"{path}: was changed while it was read. Start again."
    assert not [*cache.rglob("*.*")]


def test_other_columns_of_the_same_file_are_another_table(tmp_path):
    content = "".join(json.dumps({"a": f"a{i}", "b": f"b{i}", "x": i % 2, "y": i % 3}) + "\n" for i in range(9))
    path, got = str(write(tmp_path / "a.jsonl", content)), []
    for texts, label in ((["a"], "x"), (["b"], "x"), (["a", "b"], "x"), (["a"], "y")):
        got.append(user_files.load_files({"train": path}, None, texts, label).splits["train"].to_dict())
    assert [{*table} for table in got] == [{"text", "label"}] * 2 + [{"text", "text_pair", "label"}, {"text", "label"}]
    assert got[1]["text"][0] == "b0" and got[3]["label"] == [i % 3 for i in range(9)]


def test_a_table_that_could_not_be_made_leaves_nothing_behind(tmp_path):
    def failing():
        yield pa.RecordBatch.from_pydict({"a": [1]})
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.cached_table("a", "key", failing, str(tmp_path))
    assert not [*tmp_path.rglob("*.*")]
