"""--validation_from_train and --write_eval_predictions: which rows train, which are scored, and the answers to each."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from runs import LORA
from sklearn.metrics import matthews_corrcoef
from test_run_glue import read, succeeded

from lora_nlu.data.examples import Examples, split_validation
from lora_nlu.errors import UserError

TRAIN = ["--max_steps", 2, "--save_strategy", "no", "--learning_rate", "1e-3", *LORA, "--do_train", "--do_eval"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentences(path: Path) -> list[str]:
    return [line.split("\t")[3] for line in path.read_text(encoding="utf-8").splitlines()]


def test_kept_out_rows_are_scored_and_the_validation_set_is_not_read(glue, call, tmp_path):
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text((glue / "CoLA" / "train.tsv").read_text())  # there is no dev.tsv
    flags = ["--task_name", "cola", "--glue_dir", tmp_path / "glue", *TRAIN]
    flags += ["--validation_from_train", 16, "--write_eval_predictions"]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "o"))
    assert "--validation_from_train: 16 of the 48 training rows, drawn at random, do not train." in outcome.out
    assert "train: 32 rows" in outcome.out and "validation: 16 rows" in outcome.out
    run, scores = read(tmp_path / "o" / "run.json"), read(tmp_path / "o" / "eval_results.json")
    assert run["hyperparameters"]["validation_from_train"] == 16 and run["hyperparameters"]["train_samples"] == 32
    assert scores["eval_samples"] == scores["eval_set_samples"] == 16
    answers = read_lines(tmp_path / "o" / "eval_predictions_cola.jsonl")
    assert [answer["index"] for answer in answers] == [*range(16)]
    assert {answer["text"] for answer in answers} <= {*sentences(folder / "train.tsv")}
    expected, given = ([answer[key] for answer in answers] for key in ("expected", "label"))
    assert scores["eval_matthews_correlation"] == pytest.approx(matthews_corrcoef(expected, given), abs=1e-12)
    # another seed of training keeps the same rows out, a smaller training set too
    succeeded(call(*flags, "--output_dir", tmp_path / "other", "--seed", 7, "--max_train_samples", 20))
    again = read_lines(tmp_path / "other" / "eval_predictions_cola.jsonl")
    assert [answer["text"] for answer in again] == [answer["text"] for answer in answers]
    assert read(tmp_path / "other" / "run.json")["hyperparameters"]["train_samples"] == 20


def test_kept_out_rows_are_evaluated_again_without_training_and_a_card_names_them_and_the_label_column(call, tmp_path):
    rows = [{"note": f"a good day {i}", "mood": "happy"} for i in range(20)]
    rows += [{"note": f"a bad day {i}", "mood": "sad"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--train_file", tmp_path / "rows.jsonl", "--label_column", "mood", "--validation_from_train", 12]
    succeeded(call(*flags, *TRAIN, "--output_dir", tmp_path / "o", "--write_eval_predictions"))
    again = [*flags, "--lora_path", tmp_path / "o", "--do_eval", "--write_eval_predictions"]
    outcome = succeeded(call(*again, "--output_dir", tmp_path / "again"))
    assert "\ntrain: " not in outcome.out and "validation: 12 rows" in outcome.out
    first, second = (read_lines(tmp_path / name / "eval_predictions_custom.jsonl") for name in ("o", "again"))
    assert first == second
    card = (tmp_path / "o" / "README.md").read_text()
    assert "Measured on 12 rows of the training set that were kept out of training when it was trained:" in card
    assert "--validation_file examples.csv --label_column mood --output_dir" in card


def test_answers_to_the_validation_set_are_written_in_order_for_pairs_numbers_and_both_sets_of_mnli(
    glue, call, tmp_path
):
    for task, names in {"stsb": ["stsb"], "mnli": ["mnli", "mnli-mm"]}.items():
        out = tmp_path / task
        flags = ["--task_name", task, "--glue_dir", glue, *TRAIN]
        succeeded(call(*flags, "--write_eval_predictions", "--output_dir", out))
        assert {path.name for path in out.glob("eval_predictions_*")} == {f"eval_predictions_{n}.jsonl" for n in names}
        for name in names:
            file = {"stsb": "STS-B/dev.tsv", "mnli": "MNLI/dev_matched.tsv", "mnli-mm": "MNLI/dev_mismatched.tsv"}[name]
            rows = [line.split("\t") for line in (glue / file).read_text(encoding="utf-8").splitlines()[1:]]
            texts = slice(7, 9) if task == "stsb" else slice(1, 3)
            answers = read_lines(out / f"eval_predictions_{name}.jsonl")
            assert [[answer["text"], answer["text_pair"]] for answer in answers] == [row[texts] for row in rows]
            expected = [float(row[-1]) for row in rows] if task == "stsb" else [row[-1] for row in rows]
            assert [answer["expected"] for answer in answers] == expected
            assert {*answers[0]} >= ({"score"} if task == "stsb" else {"label", "probabilities"})


def test_kept_out_rows_of_one_class_are_refused_with_what_changes_them():
    labels = [0] * 40 + [1]
    table = Dataset.from_dict({"text": ["a"] * 41, "label": labels})
    with pytest.raises(UserError, match=r"drawn 4 of 41 .*\nGive a larger --validation_from_train\.$"):
        split_validation(Examples({"train": table}, ("no", "yes"), {"train": ("text", "label")}), 4)


@pytest.mark.parametrize(
    ("flags", "expected_message"),
    [
        (["--validation_from_train", 48], "leaves none of the 48 training rows to train on. Give a smaller number."),
        (["--validation_from_train", 0], "--validation_from_train 0"),
        (["--validation_from_train", 8, "--no_do_eval"], "--validation_from_train has no effect without --do_eval."),
        (["--write_eval_predictions", "--no_do_eval"], "--write_eval_predictions has no effect without --do_eval."),
        (["--validation_from_train", 8, "--validation_file", "dev.csv"], "takes the place of --validation_file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(glue, call, tmp_path, flags, expected_message):
    base = [*TRAIN, "--output_dir", tmp_path / "o"]
    base += [] if "--validation_file" in flags else ["--task_name", "cola", "--glue_dir", glue]
    base += ["--train_file", "dev.csv"] if "--validation_file" in flags else []
    base = [word for word in base if f"--no_{str(word).strip('-')}" not in flags]
    outcome = call(*base, *(word for word in flags if not str(word).startswith("--no_")))
    assert outcome.code in (1, 2) and expected_message in outcome.err, outcome
