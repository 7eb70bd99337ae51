"""Training that leaves the finite numbers: it stops, says where, and leaves nothing behind that looks trained."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import LORA, Outcome
from safetensors.torch import load_file, save_file
from test_run_glue import read, rte, succeeded
from transformers import AutoTokenizer

from lora_nlu.errors import UserError
from lora_nlu.ops.sharding import is_finite
from lora_nlu.training.checkpoints import last_finite_checkpoint

SHORT = ["--max_seq_length", 64, "--max_steps", 8, "--save_steps", 2, "--logging_steps", 1, "--do_train", "--do_eval"]
HUGE = ["--learning_rate", "1e30", "--warmup_steps", 0, "--max_grad_norm", 0]


def assert_nothing_trained(folder: Path) -> None:
    run = read(folder / "run.json")
    assert "trained" not in run and re.fullmatch(r".+ is (nan|inf|no longer finite) at step \d+", run["diverged"])
    left = {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}
    left.discard("_lock")  # of a process that was ended, for another one's error
    assert left == {"run.json", "files.json"} and read(folder / "files.json") == []
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def assert_stopped(outcome: Outcome, folder: Path, pattern: str) -> None:
    assert outcome.code == 1 and re.search(pattern, outcome.err), outcome.err[-2000:]
    assert "Lower --learning_rate" in outcome.err and outcome.err.strip().count("\n") < 3
    assert_nothing_trained(folder)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, tiny_model) -> list[object]:
    """Flags for a model whose embedding of one character overflows, and for rows of which the 19th has it."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(tiny_model, folder / "model")
    state = load_file(folder / "model" / "model.safetensors")
    token = AutoTokenizer.from_pretrained(tiny_model).convert_tokens_to_ids("#")
    row = state["roberta.embeddings.word_embeddings.weight"][token]
    row[::2], row[1::2] = 3e38, -3e38
    save_file(state, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    rows = [f"the cat sees dog {i}{' #' * (i == 18)},{['no', 'yes'][i % 2]}" for i in range(40)]
    (folder / "train.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return ["--model_name_or_path", folder / "model", "--train_file", folder / "train.csv",
            "--train_sampling_strategy", "sequential", "--per_device_train_batch_size", 4, *LORA]  # fmt: skip


def test_a_loss_that_is_not_finite_stops_training_at_its_step_and_nothing_is_marked_trained(call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", *SHORT, "--save_steps", 100, *HUGE))
    assert_stopped(outcome, tmp_path / "o", r"step 2: the loss is (nan|inf)")
    assert "No checkpoint" in outcome.err
    assert "'loss': 'nan'" in outcome.out or "'loss': 'inf'" in outcome.out  # logged as what it is


@pytest.mark.parametrize("method", [[*LORA, "--reg_loss_wgt", 2], []], ids=["R-Drop", "fine-tuning"])
def test_r_drop_and_plain_fine_tuning_stop_likewise(method, call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, "--output_dir", tmp_path / "o", *SHORT, *HUGE]
    outcome = call(*flags, "--save_steps", 100, *method)
    assert_stopped(outcome, tmp_path / "o", "step 2: the loss is (nan|inf)")


@pytest.mark.parametrize("before", ["save", "evaluation", "the end"])
def test_trained_tensors_that_are_not_finite_are_neither_scored_nor_saved(before, call, glue, tmp_path):
    """A weight decay beyond all numbers: the step's loss is finite, what it leaves is not."""
    flags = rte(glue, tmp_path / "o", *SHORT, *HUGE, "--learning_rate", "1e30", "--weight_decay", "1e30")
    flags += ["--max_steps", 1 if before == "the end" else 8, "--save_steps", 1 if before == "save" else 100]
    flags += ["--eval_strategy", "steps", "--eval_steps", 1 if before == "evaluation" else 100]
    outcome = call(*flags)
    assert_stopped(outcome, tmp_path / "o", r"step 1: \S*(lora_|classifier)\S* is no longer finite")
    assert "eval_loss" not in outcome.out


def test_the_last_checkpoint_with_finite_tensors_is_named_and_resumed_from(poisoned, call, tmp_path):
    """One row of the 19th to 20th makes the fifth step's loss NaN."""
    flags = [*poisoned, *SHORT[:-1], "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert_stopped(outcome, tmp_path / "o", "step 5: the loss is nan")
    assert f"finite tensors is {tmp_path / 'o' / 'checkpoint-4'}" in outcome.err
    again = call(*flags)
    assert "Resuming from" in again.out and again.err == outcome.err
    assert read(tmp_path / "o" / "run.json")["diverged"] == "the loss is nan at step 5"
    # an older version's checkpoint, saved full of NaN, is not named
    path = tmp_path / "o" / "checkpoint-4" / "adapter_model.safetensors"
    state = load_file(path)
    state[sorted(state)[-1]].view(-1)[-1] = math.inf
    save_file(state, path, metadata={"format": "pt"})
    assert last_finite_checkpoint(str(tmp_path / "o")) == tmp_path / "o" / "checkpoint-2"


def test_two_processes_end_when_one_of_them_meets_a_loss_that_is_not_finite(poisoned, fork, tmp_path):
    """The row is the second process's."""
    flags = [*poisoned, *SHORT[:-1], "--output_dir", tmp_path / "o", "--per_device_train_batch_size", 2]
    outcome = fork(*flags, processes=2)
    assert outcome.code != 0 and outcome.err.count("run_glue.py: error") == 1
    assert re.search(r"error( \(process 1\))?: training diverged at step 5: the loss is nan", outcome.err)
    assert "finite tensors is" in outcome.err and "checkpoint-4" in outcome.err
    assert_nothing_trained(tmp_path / "o")


def test_logits_that_are_not_finite_are_no_score_and_no_prediction(poisoned, call, tmp_path):
    outcome = call(*poisoned, "--output_dir", tmp_path / "o", "--do_train", "--max_steps", 2, "--max_seq_length", 64)
    succeeded(outcome)
    flags = [*poisoned[:2], "--lora_path", tmp_path / "o", "--max_seq_length", 64]
    for do, file in (("--do_eval", "--validation_file"), ("--do_predict", "--test_file")):
        outcome = call(*flags, do, file, poisoned[3], "--output_dir", tmp_path / do)
        assert outcome.code == 1 and "not finite for 1 of 40 examples, the first is number 19" in outcome.err
        assert {path.name for path in (tmp_path / do).iterdir()} == {"run.json", "files.json"}


def test_a_run_that_is_taken_up_or_begun_afresh_no_longer_counts_as_diverged(poisoned, call, tmp_path, monkeypatch):
    flags = [*poisoned, *SHORT[:-1], "--output_dir", tmp_path / "o"]
    assert call(*flags).code == 1
    seen = []

    def look(*args, **kwargs):
        seen.append(read(tmp_path / "o" / "run.json"))
        raise UserError("seen")

    monkeypatch.setattr("lora_nlu.training.runs.AdapterTrainer.train", look)
    for more in ([], ["--overwrite_output_dir"]):
        assert "diverged" in read(tmp_path / "o" / "run.json")
        assert call(*flags, *more).err == "seen" and "diverged" not in seen[-1]
        monkeypatch.undo()
        assert call(*flags).code == 1
        monkeypatch.setattr("lora_nlu.training.runs.AdapterTrainer.train", look)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_look_finds_one_number_that_is_not_finite_among_many(value):
    tensors = [torch.randn(7, 5), torch.zeros(0), torch.full((3,), 3e38), torch.randn(4).half(), torch.randn(1)]
    assert is_finite(tensors) and is_finite([]) and is_finite([torch.zeros(0)])
    for tensor in tensors:
        if tensor.numel():
            kept, tensor.view(-1)[-1] = tensor.view(-1)[-1].item(), value
            assert not is_finite(tensors)
            tensor.view(-1)[-1] = kept


def test_the_filter_that_hides_a_loss_that_is_not_finite_is_off_and_a_line_says_so(call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", *SHORT, *HUGE, "--save_steps", 100, "--logging_nan_inf_filter", "true"))
    assert_stopped(outcome, tmp_path / "o", "step 2: the loss is")
    assert "--logging_nan_inf_filter is ignored: training stops" in outcome.out
