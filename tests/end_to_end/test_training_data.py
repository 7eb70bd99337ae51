"""A run goes on, or is done, only with the examples that it was trained on; and says which they were."""

import json
import random
import shutil
from pathlib import Path

import pytest
from runs import LORA, contents, sentence
from test_run_glue import read, succeeded

TRAIN = ["--do_train", "--max_steps", "4", "--save_steps", "2", "--max_seq_length", "32", *LORA]


def rows(seed: int = 0, count: int = 24) -> list[str]:
    rng = random.Random(seed)
    return [f"{sentence(rng)},{'yes' if i % 3 else 'no'}" for i in range(count)]


def flipped(lines: list[str]) -> list[str]:
    return [line.removesuffix("yes") + "no" if line.endswith("yes") else line[:-2] + "yes" for line in lines]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(call, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--train_file", write(folder / "train.csv", rows()), *TRAIN, "--output_dir", folder / "o"]
    succeeded(call(*flags))
    return folder


OTHER = {
    "labels flipped": flipped(rows()),
    "another file": rows(1),
    "one word": ["a " + rows()[0], *rows()[1:]],
    "another order": rows()[::-1],
}


@pytest.mark.parametrize("state", ["trained", "cut off", "its checkpoint"])
@pytest.mark.parametrize("other", OTHER)
def test_other_training_examples_of_the_same_number_are_refused_as_other_settings_are(
    other, state, trained, call, tmp_path
):
    output, more = tmp_path / "o", []
    shutil.copytree(trained / "o", output)
    if state != "trained":
        record = read(output / "run.json")
        del record["trained"]
        (output / "run.json").write_text(json.dumps(record))
    if state == "its checkpoint":  # in another folder
        more, output = ["--resume_from_checkpoint", output / "checkpoint-2"], tmp_path / "new"
        output.mkdir()
    before = contents(output)
    file = write(tmp_path / "train.csv", OTHER[other])
    outcome = call("--train_file", file, *TRAIN, "--output_dir", output, *more)
    first = read(trained / "o" / "run.json")["hyperparameters"]["train_data"]
    assert outcome.code == 1 and f"train_data {first}, now " in outcome.err, outcome
    assert "the training examples differ" in outcome.err and outcome.err.count("\n") < 3
    assert contents(output) == before


def test_the_same_examples_in_another_file_another_evaluation_file_and_an_older_record_are_no_difference(
    trained, call, tmp_path
):
    output = tmp_path / "o"
    shutil.copytree(trained / "o", output)
    lines = [json.dumps(dict(zip(("text", "label"), line.rsplit(",", 1), strict=True))) for line in rows()]
    (tmp_path / "same.jsonl").write_text("\n".join(lines) + "\n")
    for seed in (1, 2):
        flags = ["--validation_file", write(tmp_path / "dev.csv", rows(seed)), "--do_eval", "--output_dir", output]
        assert "already trained" in succeeded(call("--train_file", tmp_path / "same.jsonl", *TRAIN, *flags)).out
    for path in (output / "run.json", *output.rglob("run_metadata.json")):
        record = read(path)
        assert record["train_file"] == record["dataset"] == "train.csv"
        assert len(record["hyperparameters"].pop("train_data")) == 16
        path.write_text(json.dumps(record))
    other = write(tmp_path / "other.csv", flipped(rows()))
    assert "already trained" in succeeded(call("--train_file", other, *TRAIN, "--output_dir", output)).out


def test_a_tasks_examples_that_were_changed_in_place_are_refused_and_an_evaluation_records_none(call, glue, tmp_path):
    folder = tmp_path / "glue"
    shutil.copytree(glue / "RTE", folder / "RTE")
    flags = ["--task_name", "rte", "--glue_dir", folder, *TRAIN, "--output_dir", tmp_path / "o"]
    succeeded(call(*flags))
    assert read(tmp_path / "o" / "run_metadata.json")["hyperparameters"]["train_data"]
    file = folder / "RTE" / "train.tsv"
    file.write_text(file.read_text().replace("not_entailment", "X").replace("entailment", "not_entailment").replace(
        "X", "entailment"))  # fmt: skip
    outcome = call(*flags)
    assert outcome.code == 1 and "the training examples differ" in outcome.err
    evaluation = ["--task_name", "rte", "--glue_dir", glue, "--lora_path", tmp_path / "o", "--do_eval"]
    succeeded(call(*evaluation, "--output_dir", tmp_path / "e"))
    assert "train_data" not in read(tmp_path / "e" / "run.json")["hyperparameters"]
