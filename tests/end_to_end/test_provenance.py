"""What a run began with is compared when it resumes, and its record does not change afterwards."""

import json
import os
import shutil
from pathlib import Path

import pytest
from runs import LORA, contents, cut_off, program
from test_run_glue import read, rte, succeeded
from test_training_data import flipped, rows, write

RUN = ["--do_train", "--max_steps", 4, "--save_steps", 2, "--max_seq_length", 32]


@pytest.fixture(scope="module")
def started(call, glue, tmp_path_factory) -> Path:
    """Two adapters, a and b; `without` began from the base model alone, `from a` from the first."""
    folder = tmp_path_factory.mktemp("started")
    for name, flags in {
        "a": ["--seed", 1],
        "b": ["--seed", 2],
        "without": [],
        "from a": ["--lora_path", folder / "a"],
    }.items():
        succeeded(call(*rte(glue, folder / name, *RUN, *flags)))
    return folder


@pytest.mark.parametrize("state", ["trained", "cut off", "its checkpoint"])
@pytest.mark.parametrize(
    "first, then, message",
    [
        ("without", "a", "started_from None, now {a}"),
        ("from a", None, "started_from {a}, now None"),
        ("from a", "b", "started_from {a}, now {b}: its tensors differ"),
    ],
)
def test_a_run_is_not_resumed_from_another_start_than_its_own(
    first, then, message, state, started, call, glue, tmp_path
):
    output, more = tmp_path / "o", []
    if state == "trained":
        shutil.copytree(started / first, output)
    else:
        cut_off(started / first, output, after=2)
    if state == "its checkpoint":
        more, output = ["--resume_from_checkpoint", output / "checkpoint-2"], tmp_path / "new"
        output.mkdir()
    more += ["--lora_path", started / then] if then else []
    before = contents(output)
    outcome = call(*rte(glue, output, *RUN, *more))
    assert outcome.code == 1 and message.format(a=started / "a", b=started / "b") in outcome.err, outcome
    assert contents(output) == before


def test_a_run_resumes_from_its_start_under_another_name_and_records_of_older_versions_are_compared_by_the_name(
    started, call, glue, tmp_path
):
    shutil.copytree(started / "a", tmp_path / "moved")
    output = cut_off(started / "from a", tmp_path / "o", after=2)
    succeeded(call(*rte(glue, output, *RUN, "--lora_path", tmp_path / "moved")))
    assert contents(output)["adapter_model.safetensors"] == contents(started / "from a")["adapter_model.safetensors"]
    record = read(output / "run.json")
    assert len(record.pop("started_from_fingerprint")) == 16
    (output / "run.json").write_text(json.dumps(record))
    for path in output.rglob("run_metadata.json"):
        path.write_text(json.dumps({k: v for k, v in read(path).items() if k != "started_from_fingerprint"}))
    assert "already trained" in succeeded(call(*rte(glue, output, *RUN, "--lora_path", started / "b"))).out
    outcome = call(*rte(glue, output, *RUN))
    assert outcome.code == 1 and f"started_from {tmp_path / 'moved'}, now None" in outcome.err


def test_a_run_is_not_resumed_with_another_config_of_its_base(started, call, glue, tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    flags = rte(glue, cut_off(started / "without", tmp_path / "o", after=2), *RUN, "--model_name_or_path", base)
    (base / "config.json").write_text(json.dumps(read(base / "config.json") | {"hidden_dropout_prob": 0.5}))
    outcome = call(*flags)
    assert outcome.code == 1 and "hidden_dropout_prob 0.1, now 0.5" in outcome.err, outcome
    (base / "config.json").write_text(json.dumps(read(base / "config.json") | {"hidden_dropout_prob": 0.1}))
    succeeded(call(*flags))  # the base has moved


def test_a_resumed_run_keeps_the_name_of_the_file_that_it_began_with_and_the_settings_that_it_recorded(call, tmp_path):
    def flags(name: str) -> list[object]:
        return ["--train_file", write(tmp_path / name, rows()), *RUN, *LORA]

    succeeded(call(*flags("a.csv"), "--output_dir", tmp_path / "complete"))
    output = cut_off(tmp_path / "complete", tmp_path / "o", after=2)
    for path in (output / "run.json", output / "checkpoint-2" / "run_metadata.json"):  # of before there were digests
        record = read(path)
        del record["hyperparameters"]["train_data"]
        path.write_text(json.dumps(record))
    lengths = read(output / "checkpoint-2" / "files.json") | {path.name: path.stat().st_size}
    (output / "checkpoint-2" / "files.json").write_text(json.dumps(lengths))
    assert "Resuming from" in succeeded(call(*flags("same.csv"), "--output_dir", output)).out
    for path in (output / "run.json", output / "run_metadata.json"):
        record = read(path)
        assert record["train_file"] == record["dataset"] == "a.csv" and "train_data" not in record["hyperparameters"]


def test_a_full_models_checkpoint_of_a_run_on_other_data_is_refused(call, tmp_path):
    full = ["--do_train", "--max_steps", 2, "--save_steps", 2, "--max_seq_length", 32]
    first = write(tmp_path / "a.csv", rows())
    succeeded(call("--train_file", first, *full, "--output_dir", tmp_path / "first"))
    other = ["--train_file", write(tmp_path / "b.csv", flipped(rows())), "--output_dir", tmp_path / "o"]
    outcome = call(*other, *full, "--resume_from_checkpoint", tmp_path / "first" / "checkpoint-2")
    assert outcome.code == 1 and "the training examples differ" in outcome.err, outcome


@pytest.mark.parametrize("split, flags", [("validation", ["--do_eval"]), ("test", ["--do_predict"])])
def test_two_processes_do_not_evaluate_or_predict_different_files(split, flags, started, fork, tmp_path):
    """Each process scores a part of its own file, and the parts would be taken for one set."""
    for rank in range(2):
        lines = [line.replace(",yes", ",entailment").replace(",no", ",not_entailment") for line in rows(rank)]
        write(tmp_path / f"{rank}.csv", lines)
    own = program(tmp_path, f"sys.argv += ['--{split}_file', {str(tmp_path)!r} + '/' + os.environ['RANK'] + '.csv']")
    run = ["--lora_path", started / "a", *flags, *LORA, "--output_dir", tmp_path / "o"]
    outcome = fork(*run, processes=2, script=own)
    assert f"{split}_data " in outcome.err and "was started otherwise than the first" in outcome.err, outcome.err
    assert outcome.code == 1 and not [*(tmp_path / "o").glob("*results*")]


@pytest.mark.parametrize("flag", ["--seed", "--data_seed"])
def test_a_seed_that_no_generator_takes_is_refused(flag, call, glue, tmp_path):
    for seed in (5_000_000_000, -1):
        outcome = call(*rte(glue, tmp_path / "o", *RUN, flag, seed))
        assert outcome.code == 2 and f"{flag} {seed}: must be from 0 to below 4294967296" in outcome.err
    assert os.listdir(tmp_path) == []
