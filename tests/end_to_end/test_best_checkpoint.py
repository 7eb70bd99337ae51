"""By which metric, and in which direction, a run's best checkpoint and learning rate are chosen."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LORA, Outcome, sentence
from safetensors.torch import load_file

from lora_nlu.data.metrics import METRICS, greater_is_better
from lora_nlu.errors import UsageError
from lora_nlu.training.checks import set_best_metric
from lora_nlu.training.metadata import deciding_settings
from lora_nlu.training.parsing import parse_arguments

STEPS = ["--do_train", "--max_seq_length", "32", "--logging_steps", "1", "--learning_rate", "1e-2", *LORA]
BEST = ["--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--load_best_model_at_end"]


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err[-3000:]
    return outcome


def state(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def history(folder: Path, name: str) -> dict[int, float]:
    """A logged figure by step."""
    return {entry["step"]: entry[name] for entry in state(folder)["log_history"] if name in entry}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> list[object]:
    """The flags of a regression on files of one's own: how often a word is in the text."""
    folder, rng = tmp_path_factory.mktemp("numbers"), random.Random(0)
    for name, rows in (("train", 32), ("dev", 16)):
        counts = [rng.randint(0, 4) for _ in range(rows)]
        lines = [json.dumps({"text": sentence(rng, "very " * n), "label": n + 0.5}) for n in counts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return ["--train_file", folder / "train.jsonl", "--validation_file", folder / "dev.jsonl"]


def chosen(folder: Path) -> str:
    """The checkpoint that the run calls its best; its tensors are those that the run ended with."""
    best = folder / Path(state(folder)["best_model_checkpoint"]).name
    got, kept = (load_file(place / "adapter_model.safetensors") for place in (folder, best))
    assert all(torch.equal(got[name], tensor) for name, tensor in kept.items())
    return best.name


@pytest.mark.parametrize("metric", ["mse", "eval_mse", "loss", "pearson"])
def test_the_best_checkpoint_by_a_metric_is_its_best_where_smaller_is_better_too(call, numbers, tmp_path, metric):
    flags = [*numbers, *STEPS, *BEST, "--max_steps", "12", "--metric_for_best_model", metric]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "o"))
    better = "greater" if metric == "pearson" else "smaller"
    assert f"Best checkpoint by {metric} ({better} is better)." in outcome.out
    figures = history(tmp_path / "o", f"eval_{metric.removeprefix('eval_')}")
    best, worst = (pick(figures, key=lambda step: figures[step]) for pick in (min, max))
    assert len(figures) == 6 and best != worst
    assert chosen(tmp_path / "o") == f"checkpoint-{worst if metric == 'pearson' else best}"


@pytest.mark.parametrize(
    ("task", "first"), [("own", "pearson"), ("stsb", "pearson"), ("cola", "matthews_correlation"), ("mnli", "accuracy")]
)
def test_load_best_model_at_end_alone_goes_by_the_tasks_first_metric_and_says_so(
    call, numbers, glue, tmp_path, task, first
):
    examples = numbers if task == "own" else ["--task_name", task, "--glue_dir", glue]
    outcome = succeeded(call(*examples, *STEPS, *BEST, "--max_steps", "6", "--output_dir", tmp_path / "o"))
    assert f"Best checkpoint by {first} (greater is better)." in outcome.out
    figures = history(tmp_path / "o", f"eval_{first}")
    assert chosen(tmp_path / "o") == f"checkpoint-{max(figures, key=lambda step: figures[step])}"
    assert state(tmp_path / "o")["best_metric"] == max(figures.values())


def test_save_strategy_best_alone_goes_by_the_tasks_first_metric(call, glue, tmp_path):
    flags = ["--task_name", "cola", "--glue_dir", glue, *STEPS, "--eval_strategy", "steps", "--eval_steps", "2"]
    outcome = succeeded(call(*flags, "--save_strategy", "best", "--max_steps", "6", "--output_dir", tmp_path / "o"))
    assert "Best checkpoint by matthews_correlation (greater is better)." in outcome.out
    assert state(tmp_path / "o")["best_metric"] == max(history(tmp_path / "o", "eval_matthews_correlation").values())


def test_without_metrics_the_best_checkpoint_goes_by_the_loss(call, glue, tmp_path):
    flags = ["--task_name", "mnli", "--glue_dir", glue, *STEPS, *BEST, "--prediction_loss_only", "--do_eval"]
    outcome = succeeded(call(*flags, "--max_steps", "4", "--output_dir", tmp_path / "o"))
    assert "Best checkpoint by loss (smaller is better)." in outcome.out
    figures = history(tmp_path / "o", "eval_loss")
    assert chosen(tmp_path / "o") == f"checkpoint-{min((2, 4), key=lambda step: figures[step])}"


def test_a_learning_rate_that_waits_for_a_plateau_falls_where_the_metric_stops_rising(call, glue, tmp_path):
    flags = ["--task_name", "cola", "--glue_dir", glue, *STEPS, "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5}']
    outcome = succeeded(call(*flags, "--max_steps", "24", "--save_strategy", "no", "--output_dir", tmp_path / "o"))
    assert "Best checkpoint and learning rate by matthews_correlation (greater is better)." in outcome.out
    figures, rates = (history(tmp_path / "o", name) for name in ("eval_matthews_correlation", "learning_rate"))
    want, best = 1e-2, float("-inf")
    for step, figure in figures.items():
        want, best = (want if figure > best else want / 2), max(best, figure)
        assert step + 1 not in rates or rates[step + 1] == pytest.approx(want), (step, figures, rates)
    assert len({*figures.values()}) > 2 and want < 1e-2


# ---------------------------------------------------------------------------------------------------- flags alone


def args_of(tmp_path: Path, *flags: str):
    required = ["--model_name_or_path", "m", "--task_name", "rte", "--do_train", "--output_dir", str(tmp_path)]
    return parse_arguments([*required, *flags], os.environ)[2]


@pytest.mark.parametrize(
    ("metric", "direction", "better"),
    [
        ("mse", "true", "smaller"),
        ("eval_mse", "true", "smaller"),
        ("loss", "true", "smaller"),
        ("pearson", "false", "greater"),
    ],
)
def test_a_direction_that_is_not_the_metrics_is_refused_and_the_metrics_own_is_taken(
    tmp_path, metric, direction, better
):
    flags = ["--eval_strategy", "steps", "--metric_for_best_model", metric, "--greater_is_better"]
    with pytest.raises(UsageError, match=f"{better} is better for --metric_for_best_model {metric}"):
        set_best_metric(args_of(tmp_path, *flags, direction), ("pearson", "mse"))
    args = args_of(tmp_path, *flags, str(direction == "false"))
    set_best_metric(args, ("pearson", "mse"))
    assert args.greater_is_better == (direction == "false")


def test_a_mode_of_the_schedule_that_is_not_the_metrics_is_refused(tmp_path):
    flags = ["--eval_strategy", "steps", "--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs"]
    with pytest.raises(UsageError, match="mode 'min', but greater is better for accuracy"):
        set_best_metric(args_of(tmp_path, *flags, '{"mode": "min"}'), ("accuracy",))


def test_where_nothing_goes_by_a_metric_none_is_set(tmp_path, capsys):
    args = args_of(tmp_path)
    capsys.readouterr()
    set_best_metric(args, ("accuracy",))
    assert capsys.readouterr().out == ""
    assert (args.metric_for_best_model, args.greater_is_better) == (None, None)


@pytest.mark.parametrize("metric", ["accuracy", "loss", "combined_score"])
def test_a_metric_under_its_longer_name_is_the_same_setting_on_resuming(tmp_path, metric):
    decided = []
    for name in (metric, f"eval_{metric}"):
        args = args_of(tmp_path, "--eval_strategy", "steps", "--metric_for_best_model", name)
        set_best_metric(args, ("accuracy", "f1"))
        decided.append(deciding_settings(args))
    assert decided[0] == decided[1] and decided[0]["metric_for_best_model"] == metric


def test_every_metric_has_a_direction_and_it_is_the_one_of_a_perfect_prediction():
    labels = np.array([0, 1, 1, 0, 1])
    for name, score in METRICS.items():
        perfect, poor = score(labels, labels), score(labels, np.array([1, 1, 0, 0, 1]))
        assert (perfect > poor) == greater_is_better(name) == greater_is_better(f"eval_{name}"), name
