"""Flags of transformers' TrainingArguments: what each does to a run, and what none of them may touch."""

import pytest
import torch
from runs import LORA
from test_run_glue import read, rte, scores, succeeded
from transformers import AutoTokenizer

from lora_nlu.adapters import attach_adapter, read_adapter
from lora_nlu.modeling_roberta import RobertaForSequenceClassification

TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SHORT = ["--max_seq_length", 64, "--max_steps", 3, "--logging_steps", 1, "--learning_rate", "1e-2"]
EVERY_ROW = ["--max_seq_length", 64, "--do_eval", "--do_predict", "--per_device_eval_batch_size", 7]


@pytest.fixture(scope="module")
def trained(call, glue, tmp_path_factory):
    """An adapter for MNLI, whose two validation sets have 24 and 18 rows, and three test sets."""
    folder = tmp_path_factory.mktemp("trained") / "mnli"
    flags = ["--task_name", "mnli", "--glue_dir", glue, *LORA, "--output_dir", folder, "--do_train", *SHORT]
    succeeded(call(*flags))
    return folder


# ------------------------------------------------------------------------------------------------ evaluation's own rows


def evaluated(run, glue, adapter, output, *flags, **kwargs) -> tuple[dict, dict[str, str]]:
    """Scores and predictions of the MNLI adapter under these flags."""
    base = ["--task_name", "mnli", "--glue_dir", glue, *LORA, "--lora_path", adapter, "--output_dir", output]
    succeeded(run(*base, *EVERY_ROW, *flags, **kwargs))
    return scores(output / "eval_results.json"), {p.name: p.read_text() for p in output.glob("predict_results_*.tsv")}


@pytest.fixture(scope="module")
def plain(call, glue, trained, tmp_path_factory) -> tuple[dict, dict[str, str]]:
    return evaluated(call, glue, trained, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataloader_drop_last"],
        ["--accelerator_config", '{"split_batches": true, "even_batches": false}'],
        ["--accelerator_config", '{"dispatch_batches": true}'],
        ["--train_sampling_strategy", "group_by_length"],
        ["--train_sampling_strategy", "batch_rebalance"],
        ["--dataloader_persistent_workers", "--dataloader_num_workers", 1],
        ["--eval_do_concat_batches", "false"],
        ["--batch_eval_metrics"],
        ["--eval_accumulation_steps", 1, "--include_for_metrics", "inputs", "loss", "--eval_use_gather_object"],
        ["--label_smoothing_factor", 0.3],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_every_row_of_every_set_is_scored_and_predicted_whatever_is_said_of_batches(
    flags, plain, call, glue, trained, tmp_path
):
    got, predictions = evaluated(call, glue, trained, tmp_path / "o", *flags)
    assert got == pytest.approx(plain[0], rel=1e-6) and predictions == plain[1]
    assert sorted(text.count("\n") - 1 for text in predictions.values()) == [5, 7, 9]


def test_every_row_is_scored_and_predicted_by_two_processes_whatever_is_said_of_batches(
    plain, start, glue, trained, tmp_path
):
    flags = ["--dataloader_drop_last", "--accelerator_config", '{"split_batches": true, "even_batches": false}']
    flags += ["--eval_use_gather_object", "--label_smoothing_factor", 0.3, "--batch_eval_metrics"]
    got, predictions = evaluated(start, glue, trained, tmp_path / "o", *flags, launcher=TWO)
    assert got == pytest.approx(plain[0], rel=1e-5) and predictions == plain[1]


@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
def test_dropping_the_last_batch_of_a_set_smaller_than_a_batch_is_refused_with_both_numbers(
    strategy, call, glue, tmp_path
):
    flags = ["--dataloader_drop_last", "--per_device_train_batch_size", 64, "--train_sampling_strategy", strategy]
    outcome = call(*rte(glue, tmp_path / "o", "--do_train", *SHORT, *flags))
    assert outcome.code == 1 and "48 examples are fewer than one batch of 64" in outcome.err


# --------------------------------------------------------------------------------------------------- evaluation's loss


def test_the_evaluation_loss_is_the_plain_loss_with_and_without_prediction_loss_only(
    plain, call, glue, trained, tmp_path, tiny_model
):
    """Against torch's cross-entropy of every example; batches of 7 leave 3 of 24 and 4 of 18."""
    for flags in ([], ["--label_smoothing_factor", 0.3]):
        output = tmp_path / f"o{len(flags)}"
        got, predictions = evaluated(call, glue, trained, output, "--prediction_loss_only", *flags)
        assert got.keys() == {"eval_loss", "eval_samples", "eval_loss_mm", "eval_samples_mm"}
        assert predictions == plain[1]
        assert got["eval_loss"] == pytest.approx(plain[0]["eval_loss"], rel=1e-6)
        assert got["eval_loss_mm"] == pytest.approx(plain[0]["eval_loss_mm"], rel=1e-6)
    model = RobertaForSequenceClassification.from_pretrained(tiny_model, num_labels=3)
    attach_adapter(model.eval(), read_adapter(str(trained)), None, allow_new_head=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    names = read(trained / "run_metadata.json")["labels"]
    for name, key in (("dev_matched", "eval_loss"), ("dev_mismatched", "eval_loss_mm")):
        rows = [line.split("\t") for line in (glue / "MNLI" / f"{name}.tsv").read_text().splitlines()[1:]]
        inputs = tokenizer([r[1] for r in rows], [r[2] for r in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.double()
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([names.index(r[4]) for r in rows])).item()
        assert plain[0][key] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("do", [["--do_train"], ["--do_train", "--do_eval", "--eval_strategy", "epoch"]])
def test_label_smoothing_on_a_regression_is_refused(do, call, glue, tmp_path):
    flags = ["--task_name", "stsb", "--glue_dir", glue, *LORA, "--output_dir", tmp_path / "o", *do, *SHORT]
    outcome = call(*flags, "--label_smoothing_factor", 0.1)
    assert outcome.code == 2 and "--label_smoothing_factor is for classes" in outcome.err
