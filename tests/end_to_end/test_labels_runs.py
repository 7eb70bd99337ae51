"""Labels are matched by name: heads in another order, of other names or without, in adapters and complete models."""

import csv
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from runs import LORA, Outcome, cut_off, sentence, write_tsv
from safetensors.torch import load_file, save_file
from test_run_glue import read, scores, succeeded, trained_flat

LEARN = ["--learning_rate", "1e-2", "--num_train_epochs", "8", "--max_seq_length", "64", "--save_strategy", "no"]
STILL = ["--learning_rate", "1e-12", "--max_steps", "1", "--max_seq_length", "64", "--save_strategy", "no"]
TURNED = ("positive", "negative")


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def sentences(seed: int, labels: tuple[str, ...] = ("negative", "positive"), rows: int = 40) -> list[tuple[str, str]]:
    """Rows whose last word decides the label; more of the first label than of the others, some words wrong."""
    rng, words = random.Random(seed), ("of", "well", "perhaps")
    label_ids = [0 if rng.random() < 0.5 else rng.randrange(len(labels)) for _ in range(rows)]
    return [(sentence(rng, words[i if rng.random() < 0.9 else 0]), labels[i]) for i in label_ids]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[object]:
    """Flags of a training and a validation file with the labels negative and positive."""
    folder = tmp_path_factory.mktemp("files")
    train, dev = (write_csv(folder / f"{name}.csv", sentences(seed)) for seed, name in enumerate(("train", "dev")))
    return ["--train_file", train, "--validation_file", dev]


@pytest.fixture(scope="module")
def adapter(call, files, tmp_path_factory) -> Path:
    """An adapter for the labels negative and positive, in this order."""
    output = tmp_path_factory.mktemp("adapter") / "output"
    succeeded(call(*files, *LORA, *LEARN, "--do_train", "--do_eval", "--output_dir", output))
    assert 0.7 < read(output / "eval_results.json")["eval_accuracy"] < 1
    return output


@pytest.fixture(scope="module")
def model(call, files, tmp_path_factory) -> Path:
    """A complete model for the labels negative and positive, in this order."""
    output = tmp_path_factory.mktemp("model") / "output"
    succeeded(call(*files, *LEARN, "--learning_rate", "1e-3", "--do_train", "--do_eval", "--output_dir", output))
    assert 0.7 < read(output / "eval_results.json")["eval_accuracy"] < 1
    return output


def relabelled(folder: Path, copy: Path, names: tuple[str, ...] | None, order: list[int] | None = None) -> Path:
    """A copy of a model or adapter that records other names (None: none), with the rows of its head in `order`."""
    shutil.copytree(folder, copy)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if order and (copy / name).is_file():
            state = load_file(copy / name)
            last = [key for key in state if "classifier.out_proj." in key]
            save_file(state | {key: state[key][order] for key in last}, copy / name, {"format": "pt"})
    for name in ("config.json", "run_metadata.json"):
        if (copy / name).is_file():
            record = read(copy / name)
            record.pop("labels", None)
            record.pop("weights_fingerprint", None)  # an older adapter's, else its rows could not have been turned
            if name == "config.json":
                record["id2label"] = {str(i): label for i, label in enumerate(names or ("LABEL_0", "LABEL_1"))}
                record["label2id"] = {label: int(i) for i, label in record["id2label"].items()}
            elif names is not None:
                record["labels"] = list(names)
            (copy / name).write_text(json.dumps(record))
    return copy


def from_(start: Path) -> list[object]:
    return ["--lora_path" if (start / "adapter_config.json").is_file() else "--model_name_or_path", start]


@pytest.fixture(params=["adapter", "model"])
def start(request) -> Path:
    """What a run starts from: an adapter folder, and a complete model's."""
    return request.getfixturevalue(request.param)


def head(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").is_file():
        state = load_file(folder / "model.safetensors")
    else:
        state = trained_flat(folder)
    return {name: tensor for name, tensor in state.items() if name.startswith("classifier.")}


def line_with(outcome: Outcome, *parts: str) -> str:
    """The one line of the output that contains all of these."""
    lines = [line for line in outcome.out.splitlines() if all(part in line for part in parts)]
    assert len(lines) == 1, outcome.out
    return lines[0]


# ------------------------------------------------------------------------------------------- the same names, reordered


def test_training_from_the_same_labels_in_another_order_starts_at_the_figure_that_evaluation_gives(
    start, call, files, tmp_path
):
    turned = relabelled(start, tmp_path / "turned", TURNED, [1, 0])
    dev = files[2:]
    succeeded(call(*dev, *from_(turned), "--max_seq_length", "64", "--do_eval", "--output_dir", tmp_path / "eval"))
    outcome = succeeded(call(*files, *from_(turned), *STILL, "--do_train", "--do_eval", "--output_dir", tmp_path / "o"))
    want = read(start / "eval_results.json")
    for folder in ("eval", "o"):
        got = read(tmp_path / folder / "eval_results.json")
        assert got["eval_accuracy"] == want["eval_accuracy"]
        assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)
    assert str(turned) in line_with(outcome, "positive, negative", "put in the order negative, positive")
    assert read(tmp_path / "o" / "run.json")["labels"] == ["negative", "positive"]


def test_names_that_differ_in_case_and_blanks_alone_are_the_same_labels(start, call, files, tmp_path):
    turned = relabelled(start, tmp_path / "turned", (" POSITIVE", "Negative "), [1, 0])
    succeeded(call(*files, *from_(turned), *STILL, "--do_train", "--do_eval", "--output_dir", tmp_path / "o"))
    assert (
        read(tmp_path / "o" / "eval_results.json")["eval_accuracy"]
        == read(start / "eval_results.json")["eval_accuracy"]
    )


@pytest.fixture(scope="module")
def rte(call, glue, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("rte") / "output"
    flags = ["--task_name", "rte", "--glue_dir", glue, *LORA, *LEARN, "--do_train", "--do_eval"]
    succeeded(call(*flags, "--output_dir", output))
    assert read(output / "eval_results.json")["eval_accuracy"] != 0.5
    return output


@pytest.fixture(scope="module")
def wnli(glue, tmp_path_factory) -> Path:
    """A GLUE folder whose WNLI has the examples of RTE: there 1 is entailment, in RTE id 0."""
    folder = tmp_path_factory.mktemp("wnli")
    for name in ("train", "dev"):
        rows = [line.split("\t") for line in (glue / "RTE" / f"{name}.tsv").read_text().splitlines()]
        ids = {"label": "label", "entailment": "1", "not_entailment": "0"}
        write_tsv(folder / "WNLI" / f"{name}.tsv", [[*row[:3], ids[row[3]]] for row in rows])
    return folder


@pytest.mark.parametrize("do", [["--do_eval"], ["--do_eval", "--do_train"]], ids=["evaluated", "trained on"])
def test_an_rte_adapter_means_the_same_by_its_labels_on_wnli_where_their_order_is_reversed(
    do, rte, wnli, call, tmp_path
):
    flags = ["--task_name", "wnli", "--glue_dir", wnli, "--lora_path", rte, *STILL, *do]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "o"))
    want, got = (read(folder / "eval_results.json")["eval_accuracy"] for folder in (rte, tmp_path / "o"))
    assert got == want != 0.5
    line_with(outcome, "put in the order not_entailment, entailment")
    assert read(tmp_path / "o" / "run.json")["labels"] == ["not_entailment", "entailment"]


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_resuming_and_a_finished_run_do_not_turn_the_labels_a_second_time(kind, call, files, tmp_path, request):
    turned = relabelled(request.getfixturevalue(kind), tmp_path / "turned", TURNED, [1, 0])
    flags = [*files, *from_(turned), "--do_train", "--do_eval", "--learning_rate", "1e-4", "--max_seq_length", "64"]
    flags += ["--max_steps", "4", "--save_steps", "2"]
    uninterrupted = tmp_path / "complete"
    succeeded(call(*flags, "--output_dir", uninterrupted))
    resumed = cut_off(uninterrupted, tmp_path / "resumed", after=2)
    outcome = succeeded(call(*flags, "--output_dir", resumed))
    assert f"Resuming from {resumed / 'checkpoint-2'}" in outcome.out
    for name, tensor in head(uninterrupted).items():
        assert torch.equal(tensor, head(resumed)[name]), name
    again = succeeded(call(*flags, "--output_dir", uninterrupted))
    assert "already trained" in again.out
    assert scores(uninterrupted / "eval_results.json") == scores(resumed / "eval_results.json")


# ------------------------------------------------------------------------------------------------------ other names


def test_training_from_other_recorded_labels_of_the_same_number_starts_a_new_head_and_names_both_sets(
    start, call, files, tmp_path
):
    other = relabelled(start, tmp_path / "other", ("ham", "spam"))
    outcome = succeeded(call(*files, *from_(other), *STILL, "--do_train", "--do_eval", "--output_dir", tmp_path / "o"))
    line = line_with(outcome, "its classifier is for other labels and is not loaded")
    assert str(other) in line and "ham, spam" in line and "negative, positive" in line
    before, after = head(other), head(tmp_path / "o")
    assert not any(torch.allclose(before[name], after[name]) for name in before if name.endswith("weight"))


def test_evaluating_on_other_labels_is_refused_with_both_lists(start, call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, *from_(start), "--do_eval", "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert outcome.code == 1
    assert "negative, positive" in outcome.err and "entailment, not_entailment" in outcome.err


def test_a_regression_does_not_start_from_a_classifiers_head_nor_classes_from_a_regressions(
    adapter, call, glue, files, tmp_path
):
    flags = ["--task_name", "stsb", "--glue_dir", glue, "--lora_path", adapter, *STILL, "--do_train"]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "stsb"))
    assert "a number (regression)" in line_with(outcome, "not loaded", "negative, positive")
    outcome = succeeded(
        call(*files, "--lora_path", tmp_path / "stsb", *STILL, "--do_train", "--output_dir", tmp_path / "o")
    )
    assert "a number (regression)" in line_with(outcome, "not loaded", "negative, positive")


# -------------------------------------------------------------------------------------------------- nothing recorded


def published(folder: Path, path: Path, order: list[int] | None = None) -> Path:
    """An adapter as one flat file, which records neither labels nor alpha."""
    state = trained_flat(folder)
    last = [name for name in state if "out_proj" in name]
    torch.save(state | {name: state[name][order] for name in last if order}, path)
    return path


@pytest.fixture(params=["published", "peft", "model"])
def nameless(request, adapter, model, tmp_path) -> list[object]:
    """Flags of a head that records no names: a published file's, a PEFT folder's, a complete model's with LABEL_0."""
    if request.param == "published":
        return ["--lora_path", published(adapter, tmp_path / "a.bin"), *LORA]
    return from_(relabelled(adapter if request.param == "peft" else model, tmp_path / "nameless", None))


def test_training_from_a_head_without_names_keeps_it_by_position_and_says_so(nameless, call, files, tmp_path):
    outcome = succeeded(call(*files, *nameless, *STILL, "--do_train", "--do_eval", "--output_dir", tmp_path / "o"))
    line = line_with(outcome, "records no label names", "negative, positive, in this order")
    assert str(nameless[1]) in line and "--labels" in line
    assert read(tmp_path / "o" / "eval_results.json")["eval_accuracy"] > 0.7


def test_ones_own_files_are_not_judged_by_a_head_without_names_until_labels_names_them(nameless, call, files, tmp_path):
    flags = ["--validation_file", files[3], "--test_file", files[3], *nameless, "--max_seq_length", "64"]
    for do in (["--do_eval"], ["--do_predict"], ["--do_eval", "--do_predict"]):
        outcome = call(*flags, *do, "--output_dir", tmp_path / "o")
        assert outcome.code == 1 and outcome.err.count("\n") < 3, outcome
        assert str(nameless[1]) in outcome.err and "--labels" in outcome.err
        assert "sst2 negative,positive" in outcome.err and "rte entailment,not_entailment" in outcome.err
    assert not (tmp_path / "o" / "eval_results.json").exists()
    flags += ["--do_eval", "--do_predict", "--output_dir", tmp_path / "o"]
    succeeded(call(*flags, "--labels", "negative,positive"))
    right = read(tmp_path / "o" / "eval_results.json")["eval_accuracy"]
    answers = [
        line.split("\t")[1] for line in (tmp_path / "o" / "predict_results_custom.tsv").read_text().split("\n")[1:-1]
    ]
    with open(files[3], newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert right == sum(a == b for a, b in zip(answers, labels, strict=True)) / len(labels) > 0.7
    assert read(tmp_path / "o" / "run.json")["labels"] == ["negative", "positive"]
    succeeded(call(*flags, "--labels", "positive,negative"))
    assert read(tmp_path / "o" / "eval_results.json")["eval_accuracy"] == pytest.approx(1 - right)


def test_labels_that_are_the_ids_themselves_need_no_names_and_a_line_says_so(nameless, call, files, tmp_path):
    right = {}
    for kind, names in (("numbers", ("0", "1")), ("placeholders", ("LABEL_0", "LABEL_1"))):
        dev = write_csv(tmp_path / f"{kind}.csv", sentences(1, names))
        flags = ["--validation_file", dev, *nameless, "--max_seq_length", "64", "--do_eval"]
        outcome = succeeded(call(*flags, "--output_dir", tmp_path / kind))
        assert ", ".join(names) in line_with(outcome, "records no label names")
        right[kind] = read(tmp_path / kind / "eval_results.json")["eval_accuracy"]
    assert right["numbers"] == right["placeholders"] > 0.7
    dev = write_csv(tmp_path / "more.csv", sentences(1, ("1", "2")))
    outcome = call("--validation_file", dev, *nameless, "--do_eval", "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and "--labels" in outcome.err


def test_a_head_without_names_is_read_in_the_tasks_own_order_and_a_line_says_so(nameless, call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, *nameless, "--max_seq_length", "64", "--do_eval"]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "o"))
    line = line_with(outcome, "records no label names", "entailment, not_entailment, in this order")
    assert str(nameless[1]) in line and "--labels" in line
    turned = succeeded(call(*flags, "--labels", "not_entailment,entailment", "--output_dir", tmp_path / "turned"))
    line_with(turned, "put in the order entailment, not_entailment")
    one, other = (read(tmp_path / name / "eval_results.json")["eval_accuracy"] for name in ("o", "turned"))
    assert one == pytest.approx(1 - other)


def test_a_published_mnli_file_is_read_in_the_tasks_own_order_or_in_that_of_labels_and_a_line_says_which(
    call, glue, tmp_path
):
    task = ["--task_name", "mnli", "--glue_dir", glue]
    succeeded(call(*task, *LORA, *LEARN, "--do_train", "--do_eval", "--output_dir", tmp_path / "mnli"))
    want = scores(tmp_path / "mnli" / "eval_results.json")
    file = published(tmp_path / "mnli", tmp_path / "mnli.bin")
    evaluate = [*LORA, "--max_seq_length", "64", "--do_eval", "--output_dir", tmp_path / "o"]
    outcome = succeeded(call(*task, "--lora_path", file, *evaluate))
    assert "--labels" in line_with(
        outcome, "records no label names", "entailment, neutral, contradiction, in this order"
    )
    assert scores(tmp_path / "o" / "eval_results.json") == want

    turned = published(tmp_path / "mnli", tmp_path / "turned.bin", [2, 1, 0])
    names = ["--labels", "contradiction,neutral,entailment"]
    outcome = succeeded(call(*task, "--lora_path", turned, *evaluate, *names))
    line_with(outcome, "contradiction, neutral, entailment", "put in the order entailment, neutral, contradiction")
    got = scores(tmp_path / "o" / "eval_results.json")
    assert got == {key: pytest.approx(value, rel=1e-5) for key, value in want.items()}
    rows = [["text", "text_pair", "label"]]
    with open(glue / "MNLI" / "dev_matched.tsv") as lines:
        rows += [
            [fields[i] for i in (1, 2, 4)] for line in list(lines)[1:] if (fields := line.rstrip("\n").split("\t"))
        ]
    write_tsv(tmp_path / "own.tsv", rows)
    own = ["--validation_file", tmp_path / "own.tsv", "--lora_path", turned, *evaluate]
    outcome = call(*own)
    assert outcome.code == 1 and "mnli entailment,neutral,contradiction" in outcome.err
    succeeded(call(*own, *names))
    assert read(tmp_path / "o" / "eval_results.json")["eval_accuracy"] == want["eval_accuracy"]


def test_a_head_of_one_row_without_names_is_a_regression(call, glue, tmp_path):
    task = ["--task_name", "stsb", "--glue_dir", glue, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "o"]
    succeeded(call(*task))
    file = published(tmp_path / "o", tmp_path / "stsb.bin")
    dev = write_csv(tmp_path / "dev.csv", [("a cat", "1.5"), ("a dog", "2")])
    flags = ["--validation_file", dev, "--test_file", dev, "--do_eval", "--do_predict", "--lora_path", file, *LORA]
    outcome = succeeded(call(*flags, "--output_dir", tmp_path / "own"))
    assert "eval_mse" in read(tmp_path / "own" / "eval_results.json") and "no label names" not in outcome.out


# ------------------------------------------------------------------------------------------------------------ --labels


def test_labels_sets_the_order_of_a_new_runs_ids(call, files, tmp_path):
    flags = [*files, *LORA, *STILL, "--do_train", "--labels", "positive, negative", "--output_dir", tmp_path / "o"]
    succeeded(call(*flags))
    assert read(tmp_path / "o" / "run_metadata.json")["labels"] == ["positive", "negative"]


def test_labels_that_contradict_what_is_recorded_are_refused_with_both(start, call, files, tmp_path):
    flags = [*files, *from_(start), "--output_dir", tmp_path / "o"]
    for do, names in (
        ("--do_eval", "positive,negative"),
        ("--do_eval", "ham,spam"),
        ("--do_train", "positive,negative"),
    ):
        outcome = call(*flags, do, "--labels", names)
        assert outcome.code == 1 and "Leave --labels out" in outcome.err
        assert "negative, positive" in outcome.err and names.replace(",", ", ") in outcome.err
    succeeded(call(*flags, "--do_eval", "--labels", "Negative,Positive"))


def test_a_label_outside_labels_is_named_by_file_and_line(call, files, tmp_path):
    outcome = call(*files, *LORA, "--do_train", "--labels", "good,bad", "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and f"{files[1]}:2: " in outcome.err and "good, bad" in outcome.err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--labels", "yes,no"], ["rte", "entailment, not_entailment"]),
        (["--labels", "entailment"], ["--labels entailment", "two"]),
        (["--labels", "entailment,entailment"], ["different"]),
        (["--labels", "entailment,"], ["different"]),
    ],
)
def test_labels_that_fit_no_task_are_a_wrong_command_line(flags, parts, call, glue, rte, tmp_path):
    task = ["--task_name", "rte", "--glue_dir", glue, "--lora_path", rte, "--do_eval", "--output_dir", tmp_path / "o"]
    outcome = call(*task, *flags)
    assert outcome.code == 2 and all(part in outcome.err for part in parts), outcome


def test_labels_of_another_number_than_the_head_has_rows_are_refused(nameless, call, files, tmp_path):
    flags = [*files[2:], *nameless, "--do_eval", "--labels", "a,b,c", "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert outcome.code == 1 and "2 classes" in outcome.err and "--labels names 3" in outcome.err


def test_a_regression_has_no_label_names(call, glue, files, tmp_path):
    """Of a head for regression, of a task, and of one's own files."""
    numbers = write_csv(tmp_path / "a.csv", [(f"a cat {i}", f"{i}.5") for i in range(12)])
    flags = ["--labels", "negative,positive", "--output_dir", tmp_path / "o"]
    succeeded(call("--train_file", numbers, *LORA, *STILL, "--do_train", "--output_dir", tmp_path / "score"))
    outcome = call("--validation_file", numbers, *from_(tmp_path / "score"), "--do_eval", *flags)
    assert outcome.code == 1 and "a regression has no label names" in outcome.err
    outcome = call("--task_name", "stsb", "--glue_dir", glue, *LORA, *STILL, "--do_train", *flags)
    assert outcome.code == 2 and "a regression, which has no label names" in outcome.err
    outcome = call("--train_file", numbers, *LORA, *STILL, "--do_train", *flags)
    assert outcome.code == 1 and "a regression has no label names" in outcome.err and str(numbers) in outcome.err


def test_a_label_that_the_adapter_does_not_record_is_refused_and_the_adapter_named(adapter, call, tmp_path):
    dev = write_csv(tmp_path / "dev.csv", [("a cat", "1"), ("a dog", "0")])
    outcome = call("--validation_file", dev, *from_(adapter), "--do_eval", "--output_dir", tmp_path / "o")
    assert outcome.err == f"{dev}:2: label '1' is not among those of {adapter}: negative, positive."


# ------------------------------------------------------------------------- what a checkpoint's config says of its head


def changed(model: Path, copy: Path, **settings: object) -> list[object]:
    """Flags of a copy of a complete model with other settings in its config."""
    shutil.copytree(model, copy)
    (copy / "config.json").write_text(json.dumps(read(copy / "config.json") | settings))
    return from_(copy)


@pytest.mark.parametrize("do", ["--do_eval", "--do_train"])
def test_a_config_whose_two_lists_of_labels_contradict_each_other_is_refused(do, model, call, files, tmp_path):
    flags = changed(model, tmp_path / "m", label2id={"positive": 0, "negative": 1})
    outcome = call(*files, *flags, *STILL, do, "--output_dir", tmp_path / "o")
    expected = "id2label says that 0 is negative, label2id that negative is 1"
    assert outcome.code == 1 and expected in outcome.err and str(tmp_path / "m") in outcome.err
    for i, other in enumerate(({"LABEL_0": 0, "LABEL_1": 1}, None, {"negative": 0, "positive": 1})):  # these don't
        flags = changed(model, tmp_path / f"m{i}", label2id=other)
        succeeded(call(*files, *flags, *STILL, do, "--output_dir", tmp_path / f"o{i}"))


@pytest.mark.parametrize("do", ["--do_eval", "--do_train"])
def test_a_model_for_several_labels_at_once_is_scored_as_one_for_single_labels_and_a_line_says_so(
    do, model, call, files, tmp_path
):
    flags = changed(model, tmp_path / "m", problem_type="multi_label_classification")
    outcome = succeeded(call(*files, *flags, *STILL, do, "--output_dir", tmp_path / "o"))
    line_with(outcome, f"{tmp_path / 'm'}: its config says multi-label classification; scored here as single-label")
    outcome = succeeded(call(*files, *from_(model), *STILL, do, "--output_dir", tmp_path / "o2"))
    assert "multi-label" not in outcome.out


def test_a_config_with_more_names_than_its_head_has_rows_is_reported_as_that_alone(model, call, files, tmp_path):
    names = {"0": "positive", "1": "negative", "2": "neutral"}
    flags = changed(model, tmp_path / "m", id2label=names, label2id=None)
    dev = write_csv(tmp_path / "dev.csv", sentences(1, tuple(names.values())))
    outcome = call("--validation_file", dev, *flags, "--do_eval", "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and outcome.err == (
        f"{tmp_path / 'm'}: the head in its weights has 2 rows, and its config.json has 3 labels: positive, negative, "
        "neutral."
    )
    outcome = succeeded(call("--train_file", dev, *flags, *STILL, "--do_train", "--output_dir", tmp_path / "o"))
    line_with(outcome, "not loaded", "It has 2 outputs; the examples have negative, neutral, positive")


def test_the_first_message_on_an_encoder_without_a_head_is_that_it_has_no_trained_head(
    tiny_model, adapter, call, files, tmp_path
):
    flags = [*files[2:], "--do_eval", "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    first, *rest = outcome.err.split("\n")
    assert outcome.code == 1 and len(rest) == 2
    assert first == f"{tiny_model}: has no trained head, by its config.json (a RobertaForMaskedLM)."
    assert "--do_train" in rest[0] and "--lora_path" in rest[0] and "class 0 first, with --labels" in rest[1]
    outcome = call(*flags, "--labels", "negative,positive")
    assert outcome.code == 1 and f"{tiny_model} has no trained head.\nTrain one (run_glue.py --do_train)" in outcome.err
    headless = tmp_path / "headless"
    shutil.copytree(adapter, headless)
    state = load_file(headless / "adapter_model.safetensors")
    state = {key: tensor for key, tensor in state.items() if "classifier" not in key}
    save_file(state, headless / "adapter_model.safetensors", {"format": "pt"})
    metadata = json.loads((headless / "run_metadata.json").read_text())
    del metadata["weights_fingerprint"]  # of the weights with their classifier
    (headless / "run_metadata.json").write_text(json.dumps(metadata))
    outcome = call(*flags, *from_(headless), "--labels", "negative,positive")
    assert outcome.code == 1 and "no classifier" in outcome.err and "a new one starts" not in outcome.out
