"""Losses and scores in TensorBoard, and what a run says when a library of --report_to is missing."""

import json

import pytest
from runs import LORA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_nlu.errors import UsageError
from lora_nlu.training.parsing import parse_arguments


@pytest.mark.parametrize("where", ["runs of the output folder", "--logging_dir"])
def test_tensorboard_has_the_losses_and_scores_of_the_history(where, fork, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, "--do_train", "--do_eval", *LORA, "--max_steps", "4"]
    flags += ["--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2", "--output_dir", tmp_path / "o"]
    flags += ["--logging_dir", tmp_path / "logs"] if where == "--logging_dir" else ["--report_to", "tensorboard"]
    outcome = fork(*flags)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "logs" if where == "--logging_dir" else tmp_path / "o" / "runs"
    (logs,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    log = EventAccumulator(str(logs)).Reload()
    history = json.loads((tmp_path / "o" / "trainer_state.json").read_text())["log_history"]
    for name, tag in (("loss", "train/loss"), ("eval_accuracy", "eval/accuracy")):
        expected = {entry["step"]: entry[name] for entry in history if name in entry}
        logged = {event.step: event.value for event in log.Scalars(tag)}
        assert len(expected) == 2
        assert logged == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wandb", "--report_to wandb: not installed. Install it: pip install wandb"),
        ("comet_ml", "--report_to comet_ml: not installed. Install it: pip install comet-ml"),
        ("paper", "--report_to paper: paper is not supported, only .*tensorboard.* Give one of these, or none."),
    ],
)
def test_a_library_that_is_missing_is_answered_in_a_line_with_the_command_that_installs_it(name, expected, tmp_path):
    flags = ["--model_name_or_path", "x", "--task_name", "rte", "--do_train", "--output_dir", str(tmp_path / "o")]
    with pytest.raises(UsageError, match=f"^{expected}$"):
        parse_arguments([*flags, "--report_to", name], {})
    assert not (tmp_path / "o").exists()
