"""--class_weights from the flag to the loss, the records and the messages; several processes: test_distributed.py."""

import json
import random

import pytest
from runs import LORA, sentence, write_models
from test_distributed import STEADY
from test_run_glue import read, succeeded

ROWS = {"negative": 4, "neutral": 2, "positive": 10}
STILL = ["--max_steps", 1, "--per_device_train_batch_size", 16, "--learning_rate", "1e-20", "--logging_steps", 1]
STILL += ["--max_seq_length", 64, "--save_strategy", "no", *LORA, "--do_train"]


@pytest.fixture(scope="module")
def steady(tmp_path_factory, glue):
    return write_models(tmp_path_factory.mktemp("steady"), glue, **STEADY)["roberta"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of 16 rows with three labels."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    labels = [label for label, count in ROWS.items() for _ in range(count)]
    path.write_text("\n".join(json.dumps({"text": sentence(rng, label), "label": label}) for label in labels))
    return path


def test_the_loss_of_a_step_is_the_weighted_sum_over_its_rows_by_their_number(steady, rows, call, tmp_path):
    """All rows in one step, without dropout, at a learning rate of nothing: the sums of the classes can be told."""

    def loss(name: str, *flags: object) -> float:
        files = ["--train_file", rows, "--validation_file", rows, "--do_eval", "--output_dir", tmp_path / name]
        succeeded(call("--model_name_or_path", steady, *files, *STILL, *flags))
        first = next(e["loss"] for e in read(tmp_path / name / "trainer_state.json")["log_history"] if "loss" in e)
        evaluated.append(read(tmp_path / name / "eval_results.json")["eval_loss"])
        return first

    evaluated: list[float] = []
    mean = loss("plain")
    one, other = (loss(weights, "--class_weights", weights) for weights in ("1,0,0", "0,1,0"))  # each a class's mean
    sums = {"negative": 4 * one, "neutral": 2 * other, "positive": 16 * mean - 4 * one - 2 * other}
    assert len({round(total / ROWS[name], 3) for name, total in sums.items()}) == 3
    expected = (1 * sums["negative"] + 5 * sums["neutral"] + 0.5 * sums["positive"]) / (1 * 4 + 5 * 2 + 0.5 * 10)
    assert loss("mixed", "--class_weights", "1, 5, 0.5") == pytest.approx(expected, rel=1e-5)
    balanced = sum(total / ROWS[name] for name, total in sums.items()) / 3
    assert loss("balanced", "--class_weights", "balanced") == pytest.approx(balanced, rel=1e-5)
    assert evaluated == pytest.approx([mean] * 5, rel=1e-5)  # an evaluation weighs nothing


def test_weights_are_printed_by_label_recorded_as_used_and_those_of_the_run_when_it_resumes(
    steady, rows, call, tmp_path
):
    flags = ["--model_name_or_path", steady, "--train_file", rows, *STILL, "--output_dir", tmp_path / "o"]
    outcome = succeeded(call(*flags, "--class_weights", "balanced"))
    assert "class weights: negative 1.333, neutral 2.667, positive 0.5333\n" in outcome.out
    used = [16 / (3 * count) for count in ROWS.values()]
    for name in ("run.json", "run_metadata.json"):
        assert read(tmp_path / "o" / name)["hyperparameters"]["class_weights"] == pytest.approx(used, rel=1e-12)
    assert "already trained" in succeeded(call(*flags, "--class_weights", "balanced")).out
    for other in (["--class_weights", "1,1,1"], []):
        outcome = call(*flags, *other)
        assert outcome.code == 1 and "class_weights [1.33" in outcome.err, outcome


@pytest.mark.parametrize(
    ("weights", "flags", "expected_message"),
    [
        ("evenly", [], "--class_weights evenly: give balanced, or a number for each class"),
        ("1,-1,1", [], "each 0 or more"),
        ("1,nan,1", [], "each 0 or more"),
        ("1,inf,1", [], "each 0 or more"),
        ("0,0,0", [], "not all 0"),
        ("", [], "give balanced"),
        ("1,2", [], "has 2 numbers for 3 classes.\nGive one for each, in this order: negative, neutral, positive."),
        ("0,0,0,1", ["--labels", "negative,neutral,positive,mixed"], "every training row has a class of weight 0"),
        ("balanced", ["--labels", "negative,neutral,positive,mixed"], "no training row has the label mixed."),
        ("balanced", ["--label_smoothing_factor", 0.1], "give one only"),
        ("balanced", ["--do_train", "false", "--do_predict", "--test_file", "x"], "has no effect without --do_train"),
    ],
)
def test_weights_that_can_not_be_right_are_refused(weights, flags, expected_message, steady, rows, call, tmp_path):
    outcome = call(
        "--model_name_or_path", steady, "--train_file", rows, *STILL, "--class_weights", weights, *flags,
        "--output_dir", tmp_path / "o",
    )  # fmt: skip
    assert outcome.code == 2 and expected_message in outcome.err and outcome.err.count("\n") < 2, outcome


def test_weights_for_a_regression_are_refused(steady, glue, call, tmp_path):
    flags = ["--model_name_or_path", steady, "--task_name", "stsb", "--glue_dir", glue, *STILL]
    outcome = call(*flags, "--class_weights", "balanced", "--output_dir", tmp_path / "o")
    assert outcome.code == 2 and "--class_weights is for classes, and these labels are numbers" in outcome.err
