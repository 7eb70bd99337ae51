"""Properties of everything that is read: any content is refused, or read as its format means it."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_, tiny_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.data.examples import Examples
from lora_nlu.data.glue import read_glue_file
from lora_nlu.data.tasks import TASKS, Task
from lora_nlu.data.user_files import load_files
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN, RUN_METADATA
from lora_nlu.methods.lora import LoRALinear
from lora_nlu.methods.marking import mark_only_lora_as_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.training.checkpoints import STATE, complete_checkpoints
from lora_nlu.training.output_folder import check_output_dir

many = settings(deadline=None, derandomize=True, database=None, max_examples=300, suppress_health_check=[*HealthCheck])


# ------------------------------------------------------------------------------------------------------ adapter folders

PATTERNS = ["query", "(query|value)", ".*", "(?i)query", "(", "[", "a)(b", "*", "layer.0", "all-linear", "\\"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(PATTERNS)
scalars |= st.sampled_from([1, 4, 6, 2**63, 10**400, -(10**400), 1e308, 5e-324, "4", "6"])
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(PATTERNS), inner, max_size=3)
    ),
    max_leaves=6,
)
DEEP = "[" * 5000
anything = (
    st.binary(max_size=80) | st.text(max_size=80).map(str.encode) | json_values.map(lambda v: json.dumps(v).encode())
)


def lora_model(seed: int = 0) -> RobertaForSequenceClassification:
    model = randomise_(RobertaForSequenceClassification(tiny_config(apply_lora=True, lora_r=4, lora_alpha=6)), seed)
    mark_only_lora_as_trainable(model)
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter folder, and its tensors by the model's names."""
    folder, model = tmp_path_factory.mktemp("adapter"), lora_model()
    save_adapter(model, folder, {"task": "custom", "labels": ["yes", "no", "perhaps"], "base_model": "tiny"})
    return folder, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def refused_or(read: Callable[[], Any], where: Path) -> Any:
    """What `read` gives, or None if it raises a UserError, which must name the place."""
    try:
        return read()
    except UserError as e:
        assert str(where) in str(e) and str(e).strip()
        return None


def attached(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Trained tensors and scaling by layer of a fresh model that took the adapter."""
    model: Any = RobertaForSequenceClassification(tiny_config())
    attach_adapter(model, read_adapter(str(folder)), None, allow_new_head=False)
    layers = {name: m.scaling for name, m in model.named_modules() if isinstance(m, LoRALinear) and m.r > 0}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, layers


def peft_scaling(config: dict[str, Any], name: str) -> float:
    """alpha / r, or alpha / sqrt(r), of a layer of rank 4 as PEFT computes it from the settings."""
    found = [v for key, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", name)]
    alpha = (found or [config["lora_alpha"]])[0]
    return alpha / (math.sqrt(4) if config.get("use_rslora") else 4)


def with_file(folder: Path, name: str, content: bytes, read: Callable[[], Any]) -> Any:
    """`refused_or` with another content of one file, which is put back."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        return refused_or(read, folder)
    finally:
        path.write_bytes(before)


def test_an_adapter_config_with_any_json_in_any_place_is_refused_or_read_as_peft_reads_it(adapter):
    folder, tensors = adapter
    config_keys = json.loads((folder / ADAPTER_CONFIG).read_text())
    keys = [
        *config_keys,
        "use_rslora",
        "use_dora",
        "init_lora_weights",
        "layers_to_transform",
        "exclude_modules",
        "lora_bias",
    ]
    seen: Counter[bool] = Counter()

    @many
    @given(st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), json_values, min_size=1, max_size=2))
    @example({"lora_alpha": 10**400})
    @example({"lora_alpha": math.inf})
    @example({"alpha_pattern": {"(?i)query": 6}})
    @example({"rank_pattern": {"a)(b": 4}})
    @example({"target_modules": "("})
    @example({"target_modules": 5})
    @example({"target_modules": ["query", 5]})
    @example({"alpha_pattern": {"query": 12}, "use_rslora": True})
    def check(changes: dict[str, Any]) -> None:
        config = config_keys | changes
        got = with_file(folder, ADAPTER_CONFIG, json.dumps(config).encode(), lambda: attached(folder))
        seen[got is not None] += 1
        if got is not None:
            trained, scaling = got
            assert trained.keys() == tensors.keys()
            assert all(torch.equal(trained[name], tensors[name]) for name in tensors)
            assert scaling == {name: peft_scaling(config, name) for name in scaling} and len(scaling) == 4
            assert all(math.isfinite(value) and value > 0 for value in scaling.values())

    check()
    assert seen[True] > 20 and seen[False] > 100


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, RUN_METADATA])
def test_any_text_or_bytes_in_place_of_an_adapters_json_are_refused_or_a_complete_object(name, adapter):
    folder, tensors = adapter

    @many
    @given(anything)
    @example(DEEP.encode())
    @example(b'{"a":' * 5000)
    @example(b"\xef\xbb\xbf{}")
    @example(b'{"labels": 5}')
    def check(content: bytes) -> None:
        got = with_file(folder, name, content, lambda: (read_adapter(str(folder)), read_adapter(str(folder)).labels))
        if got is not None:
            assert isinstance(json.loads(content), dict)
            assert all(torch.equal(got[0].state[name], tensors[name]) for name in tensors)
            assert got[1] is None or all(isinstance(label, str) for label in got[1])

    check()


# ---------------------------------------------------------------------------------------------------------- checkpoints


CHECKPOINT_FILES = (ADAPTER_CONFIG, RUN_METADATA, ADAPTER_WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth")


def write_checkpoint(folder: Path) -> None:
    """A checkpoint's files, the trainer state aside, and the list of them that is written last."""
    folder.mkdir()
    for file in CHECKPOINT_FILES:
        (folder / file).write_bytes(b"x")
    (folder / "files.json").write_text(json.dumps(dict.fromkeys(CHECKPOINT_FILES, 1)))


@pytest.mark.parametrize("gone", [*CHECKPOINT_FILES, STATE, "files.json"])
def test_a_checkpoint_half_removed_when_the_run_was_killed_is_incomplete(gone, tmp_path):
    write_checkpoint(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / STATE).write_text('{"global_step": 5}')
    assert complete_checkpoints(str(tmp_path)) == [tmp_path / "checkpoint-5"]
    (tmp_path / "checkpoint-5" / gone).unlink()
    assert complete_checkpoints(str(tmp_path)) == []


def test_a_run_killed_while_it_marked_its_new_folder_starts_again_by_the_same_command(tmp_path):
    (tmp_path / f".{RUN}.partial").write_text("{")
    check_output_dir(str(tmp_path), overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] in ([], [f".{RUN}.partial"])


def test_checkpoints_with_any_bytes_for_a_trainer_state_never_stop_the_listing_of_the_complete_ones(tmp_path):
    names = ["checkpoint-5", "checkpoint-05", "checkpoint-", "checkpoint-x", "checkpoint-²", "checkpoint-٣"]
    for name in (*names, "checkpoint-2"):
        write_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-2" / STATE).write_text(json.dumps({"global_step": 2, "log_history": []}))
    states = json_values | st.fixed_dictionaries(
        {"global_step": json_values | st.sampled_from([5, 5, 5, 5, 5, 3, 5.0, "5"])}
    )
    seen: Counter[bool] = Counter()

    @many
    @given(st.sampled_from(names), anything | states.map(lambda value: json.dumps(value).encode()))
    @example("checkpoint-5", b'{"global_step": 5}')
    @example("checkpoint-5", b'{"global_step": "5"}')
    @example("checkpoint-5", DEEP.encode())
    @example("checkpoint-5", b'{"global_step": ' + b"9" * 5000 + b"}")
    @example("checkpoint-5", '{"global_step": 5}'.encode("utf-16"))
    def check(name: str, content: bytes) -> None:
        (tmp_path / name / STATE).write_bytes(content)
        listed = complete_checkpoints(str(tmp_path))
        (tmp_path / name / STATE).unlink()
        assert tmp_path / "checkpoint-2" in listed and {*listed} <= {tmp_path / "checkpoint-2", tmp_path / name}
        seen[len(listed) == 2] += 1
        if len(listed) == 2:
            assert json.loads(content)["global_step"] == int(name.removeprefix("checkpoint-"))
        if (name, content) == ("checkpoint-5", b'{"global_step": 5}'):
            assert listed == [tmp_path / "checkpoint-2", tmp_path / "checkpoint-5"]

    check()
    assert seen[True] and seen[False] > 100


# ------------------------------------------------------------------------------------------------------------- examples

PIECES = [
    "\t",
    "\n",
    "\r",
    "\r\n",
    '"',
    ",",
    "\0",
    "\ufeff",
    "é",
    "\u2028",
    "\x1c",
    "\x85",
    "{",
    "}",
    "[",
    "null",
    "NaN",
]
PIECES += ["1e400", "0", "label", "entailment", "\\ud800", "-0", "true", ":", "١", "1" * 400, "1" * 5000]
bytes_pieces = st.sampled_from([*(piece.encode() for piece in PIECES), b"\xff", b"\xc3", b""]) | st.binary(max_size=3)
edits = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4), bytes_pieces), max_size=3)
# without NUL: Python 3.10's csv.writer, which writes some of these files, can't write it
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), max_size=8)


def edited(content: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """Each change takes away some bytes at a place and puts others there."""
    for place, gone, new in changes:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + gone :]
    return content


def glue_rows(content: bytes, task: Task, with_labels: bool) -> dict[str, list]:
    """A GLUE file's table by splitting on tabs."""
    lines = content.decode("utf-8-sig").split("\n")
    assert lines.pop() == ""
    cells = [line.rstrip("\r").split("\t") for line in lines]
    header = [*task.headerless] if with_labels and task.headerless else cells.pop(0)
    if any(len(row) != len(header) for row in cells):
        assert task.skips_broken_lines and len(cells[-1]) == len(header)
        cells = [row for row in cells if len(row) == len(header)]
    texts = [header.index(column) for column in task.text_columns or task.text]
    table = {name: [row[at] for row in cells] for name, at in zip(("text", "text_pair"), texts, strict=False)}
    if with_labels:
        written = [row[header.index(task.label_column)] for row in cells]
        names = [*(task.written or task.labels)]
        table["label"] = [names.index(w) if names else float(w) for w in written]
    return table


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_any_glue_file_is_refused_or_read_as_splitting_on_tabs_reads_it(task, tmp_path):
    seen: Counter[bool] = Counter()
    path = tmp_path / "file.tsv"

    @settings(many, max_examples=100)
    @given(st.booleans(), st.lists(st.tuples(words, words, words, st.integers(0, 2)), max_size=3), edits, anything)
    def check(with_labels: bool, rows: list[tuple], changes: list, other: bytes) -> None:
        with_labels = with_labels and task.name != "ax"
        labels = [*(task.written or task.labels or ("0", "2.5", "5.000"))]
        header = [*(task.text_columns or task.text), "index"]
        written = []
        if with_labels and task.headerless:
            header = [*task.headerless]
        else:
            header += [task.label_column] * with_labels
            written = [header]
        for one, two, three, label in rows:
            row = dict(zip(header, (one, two, three, ""), strict=False))
            written.append([*(row | {task.label_column: labels[label % len(labels)]} if with_labels else row).values()])
        undamaged = "".join("\t".join(row) + "\n" for row in written).encode()
        for content in (undamaged, edited(undamaged, changes), other):
            path.write_bytes(content)
            columns = [*(task.text_columns or task.text)] + [task.label_column] * with_labels
            got = refused_or(partial(read_glue_file, path, task, columns, with_labels), path)
            seen[got is not None] += 1
            if content == undamaged and rows and b"".join(undamaged.split()) and not task.headerless:
                assert got is not None
            if got is not None:
                assert got.to_dict() == glue_rows(content, task, with_labels) and len(got) > 0

    check()
    assert seen[True] > 60 and seen[False] > 60


def own_rows(content: bytes, suffix: str) -> list[dict[str, Any]]:
    """The rows of a file of one's own, as the csv and json modules read them."""
    text = content.decode("utf-8-sig")
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {"strict": True}
    header, *rows = csv.reader(io.StringIO(text, newline=""), **form)
    return [dict(zip(header, row, strict=True)) for row in rows if row]


def text_columns(columns: Sequence[str]) -> list[str]:
    """Which columns contain text: a pair with usual names, or what is neither label nor a row number."""
    for pair in (
        "sentence1 sentence2",
        "premise hypothesis",
        "question1 question2",
        "question sentence",
        "text text_pair",
    ):
        if {*pair.split()} <= {*columns}:
            return pair.split()
    return [c for c in columns if c != "label" and c.lower() not in ("idx", "id", "index", "")]


def assert_own_table(got: Examples, rows: list[dict[str, Any]]) -> None:
    table = got.splits["train"].to_dict()
    columns = dict(zip(("text", "text_pair"), text_columns([*rows[0]]), strict=False))
    assert table.keys() == {*columns, "label"}
    for name, column in columns.items():
        assert table[name] == [row[column] for row in rows]
    for value, row in zip(table["label"], rows, strict=True):
        label = row["label"]
        if got.labels:
            written = str(label).lower() if isinstance(label, bool) else str(label)
            assert got.labels[value] == (written if written in got.labels else written.strip())  # of recorded ones
        else:
            assert value == float(label) and math.isfinite(value)


HEADERS = [
    ["text", "label"],
    ["label", "review", "id"],
    ["sentence2", "label", "sentence1"],
    ["question", "label", "sentence"],
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_any_file_of_ones_own_is_refused_or_read_as_pythons_csv_and_json_read_it(suffix, tmp_path):
    seen: Counter[bool] = Counter()
    path = tmp_path / f"train{suffix}"
    labels = st.sampled_from(["a", "b", "0", "1", "2.5", "-1", "1e3"])
    numbers = labels | st.integers() | st.floats() | st.booleans() | st.none() | st.just(10**400)
    recorded_labels = st.sampled_from([None, None, None, (), ("a", "b"), ("0", "1")])
    rows = st.lists(st.tuples(words, words, labels if suffix != ".jsonl" else labels | numbers), max_size=4)

    @many
    @given(st.sampled_from(HEADERS), rows, recorded_labels, edits, anything)
    @example(["text", "label"], [("A", "", "1" * 400), ("B", "", "2")], (), [], b"")
    @example(["text", "label"], [("A", "", 10**400), ("B", "", 0.5)], None, [], b"")
    @example(["text", "label"], [("A", "", "1" * 5000), ("B", "", "2")], None, [], DEEP.encode())
    def check(header: list[str], rows: list[tuple], names: Any, changes: list, other: bytes) -> None:
        written = []
        for one, two, label in rows:
            texts = iter((one, two))
            written.append({column: label if column == "label" else next(texts) for column in header})
        if suffix == ".jsonl":
            undamaged = "".join(json.dumps(row) + "\n" for row in written).encode()
        elif suffix == ".csv":
            with io.StringIO(newline="") as out:
                csv.writer(out).writerows([header, *(row.values() for row in written)])
                undamaged = out.getvalue().encode()
        else:
            undamaged = "".join(
                "\t".join(map(str, row)) + "\n" for row in [header, *(r.values() for r in written)]
            ).encode()
        for content in (undamaged, edited(undamaged, changes), other):
            path.write_bytes(content)
            try:
                got = load_files({"train": str(path)}, names)
            except UserError as e:
                assert str(path) in str(e)
                seen[False] += 1
                continue
            seen[True] += 1
            assert_own_table(got, own_rows(content, suffix))

    check()
    assert seen[True] > 50 and seen[False] > 50
