"""Flags of transformers' TrainingArguments: what each does to a run, and what none of them may touch."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from runs import LORA
from safetensors.torch import load_file
from test_run_glue import read, rte, scores, succeeded
from transformers import AutoTokenizer, TrainingArguments

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UsageError
from lora_nlu.files import ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.training.metadata import (
    _ALWAYS_RECORDED,
    SCHEDULE,
    WITHOUT_EFFECT,
    deciding_settings,
    left_at_default,
)
from lora_nlu.training.parsing import RunArguments, parse_arguments

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
def test_every_row_of_every_set_is_scored_and_predicted_with_any_flags_for_batches(
    flags, plain, call, glue, trained, tmp_path
):
    got, predictions = evaluated(call, glue, trained, tmp_path / "o", *flags)
    assert got == pytest.approx(plain[0], rel=1e-6) and predictions == plain[1]
    assert sorted(text.count("\n") - 1 for text in predictions.values()) == [5, 7, 9]


def test_every_row_is_scored_and_predicted_by_two_processes_with_any_flags_for_batches(
    plain, fork, glue, trained, tmp_path
):
    flags = ["--dataloader_drop_last", "--accelerator_config", '{"split_batches": true, "even_batches": false}']
    flags += ["--eval_use_gather_object", "--label_smoothing_factor", 0.3, "--batch_eval_metrics"]
    got, predictions = evaluated(fork, glue, trained, tmp_path / "o", *flags, processes=2)
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


# ------------------------------------------------------------------------------------------------- what decides a run

# Fields that the installed version of transformers does not have: the newest that we accept has all of them.
NEW = {"activation_checkpointing", "activation_checkpointing_kwargs"}
ABSENT = NEW - {field.name for field in dataclasses.fields(TrainingArguments)}
DECIDING = """
    seed data_seed num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
    optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 neftune_noise_alpha use_liger_kernel liger_kernel_config
    auto_find_batch_size load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    accelerator_config parallelism_config dataloader_drop_last dataloader_in_order label_names
    train_sampling_strategy length_column_name
""".split()


def test_every_field_of_the_pinned_training_arguments_is_on_one_side_on_purpose():
    """What decides is a list here and the rest in metadata.py; a field that transformers adds stands on neither."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not WITHOUT_EFFECT & {*DECIDING} and (transformers.__version__ < "5.23" or not ABSENT)
    assert (
        names
        == {*DECIDING}
        | WITHOUT_EFFECT - {"overwrite_output_dir", "logging_dir", "cuda_graphs", "write_eval_predictions"} - ABSENT
    )
    ours = {field.name for field in dataclasses.fields(RunArguments)} - names
    rates = {"loraplus_lr_ratio", "head_learning_rate"}
    assert ours - WITHOUT_EFFECT == {"early_stopping_patience", "early_stopping_threshold"} | rates
    assert {*SCHEDULE} < WITHOUT_EFFECT


def test_a_field_of_a_newer_release_counts_as_deciding_and_every_setting_is_plain_and_stable_json(tmp_path):
    @dataclasses.dataclass
    class Newer(TrainingArguments):
        of_next_year: float = 0.5

    own_values = {"lr_scheduler_kwargs": {"b": 1, "a": [1, 2]}, "optim_args": "momentum=0.9", "label_names": ["labels"]}
    own_values |= {
        "accelerator_config": {"non_blocking": True},
        "lr_scheduler_type": "cosine",
        "neftune_noise_alpha": 5,
    }
    args = Newer(output_dir=str(tmp_path), use_cpu=True, report_to="none", **own_values)
    settings = deciding_settings(args)
    assert settings["of_next_year"] == 0.5 and settings["lr_scheduler_type"] == "cosine"
    assert settings["accelerator_config"] == {"non_blocking": True}
    assert json.loads(json.dumps(settings)) == settings
    assert [*settings["lr_scheduler_kwargs"]] == ["a", "b"]
    defaults = left_at_default(args, settings)
    assert "of_next_year" in defaults and not {*own_values} & {*defaults} and "learning_rate" not in defaults
    plain = Newer(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    settings = deciding_settings(plain)
    assert {*settings} - {*left_at_default(plain, settings)} == {*_ALWAYS_RECORDED, "examples_a_step"}


@pytest.fixture(scope="module")
def finished(call, glue, tmp_path_factory):
    """A run that chose its best checkpoint, and one that did not, both on RTE."""
    folder = tmp_path_factory.mktemp("finished")
    succeeded(
        call(*rte(glue, folder / "plain", "--do_train", *SHORT, "--optim", "sgd", "--optim_args", "momentum=0.5"))
    )
    succeeded(call(*rte(glue, folder / "best", "--do_train", "--do_eval", *SHORT, *BEST)))
    return folder


BEST = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1]
SGD = ["--optim", "sgd", "--optim_args", "momentum=0.5"]


@pytest.mark.parametrize("trained", [True, False], ids=["already trained", "interrupted"])
@pytest.mark.parametrize(
    "which, flags, expected_message",
    [
        ("plain", ["--optim_args", "momentum=0.9"], "optim_args momentum=0.5, now momentum=0.9"),
        ("plain", ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"power": 2}'], "{'power': 2}"),
        ("plain", ["--dataloader_drop_last"], "dataloader_drop_last False, now True"),
        ("plain", ["--neftune_noise_alpha", 5], "neftune_noise_alpha None, now 5.0"),
        ("plain", ["--do_eval", *BEST], "load_best_model_at_end False, now True"),
        ("plain", ["--do_eval", "--early_stopping_patience", 3, "--eval_strategy", "epoch"], "patience None, now 3"),
        ("plain", ["--max_grad_norm", 2], "max_grad_norm 1.0, now 2.0"),
        ("plain", ["--class_weights", "1,3"], "class_weights None, now ["),
        ("best", ["--metric_for_best_model", "loss"], "metric_for_best_model accuracy, now loss"),
        ("best", ["--eval_steps", 3, "--save_steps", 3], "eval_steps 1.0, now 3"),
        ("best", ["--max_eval_samples", 12], "the evaluation examples differ"),
    ],
)
def test_another_value_of_what_decides_is_another_run(
    which, flags, expected_message, trained, finished, call, glue, tmp_path
):
    output = tmp_path / "o"
    shutil.copytree(finished / which, output)
    if not trained:
        (output / "run.json").write_text(
            json.dumps({k: v for k, v in read(output / "run.json").items() if k != "trained"})
        )
        state = json.dumps({"global_step": 1})
        (output / "checkpoint-1").mkdir(exist_ok=True)
        (output / "checkpoint-1" / "trainer_state.json").write_text(state)
        (output / "checkpoint-1" / "files.json").write_text(json.dumps({"trainer_state.json": len(state)}))
    base = SGD if which == "plain" else ["--do_eval", *BEST]
    outcome = call(*rte(glue, output, "--do_train", *SHORT, *base, *flags))
    assert (
        outcome.code == 1 and "contains a run with other settings" in outcome.err and expected_message in outcome.err
    ), outcome


@pytest.mark.parametrize(
    "flags",
    [
        ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2],
        ["--logging_steps", 3, "--save_steps", 2, "--eval_strategy", "steps", "--eval_steps", 1, "--do_eval"],
        [
            "--dataloader_num_workers",
            1,
            "--log_level",
            "error",
            "--save_total_limit",
            1,
            "--torch_empty_cache_steps",
            2,
        ],
    ],
)
def test_what_decides_nothing_may_change(flags, finished, call, glue):
    outcome = succeeded(call(*rte(glue, finished / "plain", "--do_train", *SHORT, *SGD, *flags)))
    assert "already trained" in outcome.out


def test_of_an_older_versions_run_only_what_it_recorded_is_compared(finished, call, glue, tmp_path):
    output = tmp_path / "o"
    shutil.copytree(finished / "plain", output)
    run = read(output / "run.json")
    kept = {name: value for name, value in run["hyperparameters"].items() if name not in run["left_at_default"]}
    del kept["optim_args"], run["left_at_default"]
    (output / "run.json").write_text(json.dumps(run | {"hyperparameters": kept}))
    flags = ["--do_train", *SHORT, "--optim", "sgd"]
    assert "already trained" in succeeded(call(*rte(glue, output, *flags, *SGD))).out
    outcome = call(*rte(glue, output, *flags, "--learning_rate", 1))
    assert outcome.code == 1 and "learning_rate 0.01, now 1.0" in outcome.err


def test_a_run_whose_best_checkpoint_an_older_version_chose_otherwise_is_not_gone_on_from(
    finished, call, glue, tmp_path
):
    output = tmp_path / "o"
    shutil.copytree(finished / "best", output)
    run = read(output / "run.json")
    del run["trained"], run["hyperparameters"]["metric_for_best_model"], run["hyperparameters"]["greater_is_better"]
    (output / "run.json").write_text(json.dumps(run))
    outcome = call(*rte(glue, output, "--do_train", "--do_eval", *SHORT, *BEST))
    assert outcome.code == 1 and "an older version" in outcome.err and "--overwrite_output_dir" in outcome.err


# ------------------------------------------------------------------------------------------------------ early stopping


def test_early_stopping_stops_as_transformers_callback_and_goes_by_the_tasks_metric(
    finished, call, fork, glue, tmp_path
):
    """A learning rate of nothing: the first evaluation is the best, and two more are waited for."""
    still = ["--do_train", "--do_eval", "--max_seq_length", 64, "--max_steps", 9, "--learning_rate", "1e-20"]
    still += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--early_stopping_patience", 2]
    outcome = succeeded(call(*rte(glue, tmp_path / "o", *still)))
    assert "by accuracy (greater is better)" in outcome.out and "Stopped early, at step 6 of 9." in outcome.out
    assert re.search("stopped early +at step 6 of 9\n", outcome.out)
    assert read(tmp_path / "o" / "trainer_state.json")["global_step"] == 6
    assert_recorded_as_stopped(tmp_path / "o")
    learns = ["--learning_rate", "1e-2", "--metric_for_best_model", "loss", "--early_stopping_threshold", 100]
    outcome = succeeded(fork(*rte(glue, tmp_path / "far", *still, *learns, "--reg_loss_wgt", 1), processes=2))
    assert outcome.out.count("Stopped early, at step 6 of 9.") == 1  # better, but never by so much
    assert_recorded_as_stopped(tmp_path / "far")
    assert "stopped_early" not in read(finished / "plain" / "run.json")
    assert "stopped_early_at_step" not in read(finished / "plain" / "train_results.json")


def assert_recorded_as_stopped(folder: Path) -> None:
    """After step 6 of 9, in the records of the run and of its adapter, and in the results."""
    assert read(folder / "run.json")["trained"]
    for name in ("run.json", RUN_METADATA):
        assert read(folder / name)["stopped_early"] == {"step": 6, "max_steps": 9}
    assert read(folder / "train_results.json")["stopped_early_at_step"] == 6


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_that_is_resumed_stops_early_where_it_would_have(step, call, glue, tmp_path):
    """From the middle of its patience, and from the very checkpoint after which it ended."""
    flags = ["--do_train", "--do_eval", "--max_seq_length", 64, "--max_steps", 9, "--learning_rate", "1e-20"]
    flags += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--early_stopping_patience", 2]
    succeeded(call(*rte(glue, tmp_path / "o", *flags)))
    shutil.copytree(tmp_path / "o" / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}")
    run = read(tmp_path / "o" / "run.json")
    del run["trained"]
    (tmp_path / "again" / "run.json").write_text(json.dumps(run))
    outcome = succeeded(call(*rte(glue, tmp_path / "again", *flags)))
    assert "Resuming from" in outcome.out and "Stopped early, at step 6 of 9." in outcome.out
    assert_recorded_as_stopped(tmp_path / "again")
    one, other = load_file(tmp_path / "o" / ADAPTER_WEIGHTS), load_file(tmp_path / "again" / ADAPTER_WEIGHTS)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "flags, expected_message",
    [
        (["--early_stopping_patience", 2], "add --eval_strategy"),
        (["--early_stopping_patience", 0, "--eval_strategy", "epoch"], "must be 1 or more"),
        (
            ["--early_stopping_threshold", 0.1, "--eval_strategy", "epoch"],
            "no effect without --early_stopping_patience",
        ),
        (
            ["--early_stopping_patience", 2, "--eval_strategy", "epoch", "--metric_for_best_model", "f1"],
            "not evaluated",
        ),
        (["--early_stopping_patience", 2, "--early_stopping_threshold", -1, "--eval_strategy", "epoch"], "0 or more"),
    ],
)
def test_early_stopping_that_could_not_work_is_refused(flags, expected_message, call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", "--do_train", "--do_eval", *SHORT, *flags))
    assert outcome.code == 2 and expected_message in outcome.err


# ---------------------------------------------------------------------------------------- every flag and every choice

SMALL = ["--do_train", "--do_eval", "--max_steps", 2, "--max_seq_length", 64, "--max_train_samples", 12]
SMALL += ["--max_eval_samples", 8, "--save_steps", 2]


@pytest.fixture
def same_process_afterwards():
    """What some flags set for the process is put back."""
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, False
    transformers.logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


# One other value a field, and where it is refused, how.
SWEEP: dict[str, tuple[list[object], str]] = {
    "output_dir": ([], ""),
    "per_device_train_batch_size": ([4], ""),
    "num_train_epochs": ([0.2], ""),
    "max_steps": ([1], ""),
    "learning_rate": ([1e-3], ""),
    "lr_scheduler_type": (["warmup_stable_decay"], "missing 1 required positional argument: 'num_decay_steps'"),
    "lr_scheduler_kwargs": (['{"num_cycles": 2}'], "unexpected keyword argument 'num_cycles'"),
    "warmup_steps": ([0.5], ""),
    "optim": (["adamw_8bit"], "--optim adamw_8bit.*bitsandbytes"),
    "optim_args": (["momentum=0.9"], ""),
    "weight_decay": ([0.1], ""),
    "adam_beta1": ([0.8], ""),
    "adam_beta2": ([0.9], ""),
    "adam_epsilon": ([1e-6], ""),
    "optim_target_modules": (["all-linear"], ""),
    "gradient_accumulation_steps": ([2], ""),
    "average_tokens_across_devices": (["false"], ""),
    "max_grad_norm": ([0], ""),
    "label_smoothing_factor": ([0.1], ""),
    "bf16": ([], ""),
    "fp16": ([], ""),
    "bf16_full_eval": ([], ""),
    "fp16_full_eval": ([], ""),
    "tf32": (["true"], "Ampere"),
    "activation_checkpointing": ([], ""),
    "activation_checkpointing_kwargs": (['{"use_reentrant": false}'], ""),
    "gradient_checkpointing": ([], ""),
    "gradient_checkpointing_kwargs": (['{"use_reentrant": true}'], ""),
    "use_liger_kernel": ([], "Liger has no kernels for these models"),
    "liger_kernel_config": (['{"rope": true}'], "invalid dict value"),
    "use_cache": ([], ""),
    "neftune_noise_alpha": ([5], ""),
    "torch_empty_cache_steps": ([1], ""),
    "auto_find_batch_size": ([], "would change the examples a step"),
    "logging_strategy": (["epoch"], ""),
    "logging_steps": ([0.5], ""),
    "logging_first_step": ([], ""),
    "log_on_each_node": (["false"], ""),
    "logging_nan_inf_filter": ([], ""),
    "include_num_input_tokens_seen": (["yes"], ""),
    "log_level": (["error"], ""),
    "log_level_replica": (["error"], ""),
    "disable_tqdm": (["false"], ""),
    "report_to": (["tensorboard"], ""),
    "run_name": (["name"], ""),
    "project": (["name"], ""),
    "trackio_space_id": (["name/space"], ""),
    "trackio_bucket_id": (["name"], ""),
    "trackio_static_space_id": (["name/space"], ""),
    "eval_strategy": (["steps"], ""),
    "eval_steps": ([0.5], ""),
    "eval_delay": ([1], ""),
    "per_device_eval_batch_size": ([3], ""),
    "prediction_loss_only": ([], ""),
    "eval_on_start": ([], ""),
    "eval_do_concat_batches": (["false"], ""),
    "eval_use_gather_object": ([], ""),
    "eval_accumulation_steps": ([1], ""),
    "include_for_metrics": (["inputs"], ""),
    "batch_eval_metrics": ([], ""),
    "save_only_model": ([], ""),
    "save_strategy": (["epoch"], ""),
    "save_steps": ([0.5], ""),
    "save_on_each_node": ([], "on a disk that all machines share"),
    "save_total_limit": ([1], ""),
    "enable_jit_checkpoint": ([], ""),
    "load_best_model_at_end": ([], "requires the save and eval strategy to match"),
    "metric_for_best_model": (["loss"], ""),
    "greater_is_better": (["true"], ""),
    "ignore_data_skip": ([], ""),
    "restore_callback_states_from_checkpoint": ([], ""),
    "full_determinism": ([], ""),
    "seed": ([1], ""),
    "data_seed": ([3], ""),
    "use_cpu": ([], ""),
    "accelerator_config": (['{"split_batches": true}'], "split_batches would change which examples a step has"),
    "parallelism_config": (['{"dp_shard_size": 1}'], "invalid ParallelismConfig value"),
    "dataloader_drop_last": ([], ""),
    "dataloader_num_workers": ([1], ""),
    "dataloader_pin_memory": (["false"], ""),
    "dataloader_persistent_workers": ([], "no effect without --dataloader_num_workers"),
    "dataloader_prefetch_factor": ([2], "dataloader_num_workers > 0"),
    "dataloader_multiprocessing_context": (["fork"], "no effect without --dataloader_num_workers"),
    "dataloader_in_order": (["false"], ""),
    "remove_unused_columns": (["false"], ""),
    "label_names": (["labels"], ""),
    "train_sampling_strategy": (["sequential"], ""),
    "length_column_name": (["size"], ""),
    "ddp_find_unused_parameters": (["true"], ""),
    "ddp_bucket_cap_mb": ([1], ""),
    "ddp_broadcast_buffers": (["true"], ""),
    "ddp_static_graph": (["true"], ""),
    "ddp_backend": (["gloo"], "Default process group has not been initialized"),
    "ddp_timeout": ([60], ""),
    "debug": (["underflow_overflow"], ""),
    "skip_memory_metrics": (["false"], ""),
    "do_train": (["false"], ""),
    "do_eval": (["false"], ""),
    "do_predict": (["false"], ""),
    "resume_from_checkpoint": (["false"], ""),
    "local_rank": ([0], ""),
}
PARSED = {"deepspeed", "fsdp", "fsdp_config", "torch_compile", "torch_compile_backend", "torch_compile_mode"}
PARSED |= {f"hub_{name}" for name in "token private_repo model_id strategy always_push revision".split()} | {
    "push_to_hub"
}


def test_the_sweep_has_every_field_of_the_pinned_training_arguments():
    assert {field.name for field in dataclasses.fields(TrainingArguments)} == ({*SWEEP} | PARSED) - ABSENT
    assert not {*SWEEP} & PARSED


@pytest.mark.parametrize("name", [name for name in SWEEP if name not in ABSENT])
def test_every_flag_of_training_arguments_works_or_is_refused_in_a_sentence(
    name, call, glue, tmp_path, same_process_afterwards
):
    values, expected_message = SWEEP[name]
    flags = [f"--{name}", *values] if name != "output_dir" else []
    outcome = call(
        *rte(glue, tmp_path / "o", *SMALL, *(["--lora_path", "/nowhere"] if name == "do_train" else []), *flags)
    )
    if name == "do_train":  # then there must be something trained
        assert outcome.code == 1 and "no such file" in outcome.err
    elif expected_message:
        assert outcome.code and re.search(expected_message, outcome.err) and outcome.err.count("\n") < 4, outcome.err
    else:
        succeeded(outcome)


@pytest.mark.parametrize("name", sorted(PARSED))
def test_flags_of_backends_compilers_and_the_hub_are_parsed(name, tmp_path, same_process_afterwards):
    kind = {f.name: f for f in dataclasses.fields(RunArguments)}[name]
    value = {"fsdp_config": '{"version": 2}', "deepspeed": "{}", "hub_strategy": "end", "torch_compile_mode": "default"}
    value |= {"torch_compile_backend": "eager", "hub_private_repo": "true", "hub_token": "t", "hub_model_id": "a/b"}
    flags = ["--model_name_or_path", "x", "--task_name", "rte", "--do_train", "--output_dir", str(tmp_path)]
    flags += [f"--{kind.name}", *([value[name]] if name in value else ["main"] if name == "hub_revision" else [])]
    try:
        args = parse_arguments(flags, os.environ)[2]
    except UsageError as e:
        assert name in ("deepspeed", "torch_compile") and str(e).startswith(f"--{name}")
    else:
        assert getattr(args, name) is not None or name in ("fsdp", "fsdp_config")  # one process has nothing to share


@pytest.mark.parametrize(
    "settings",
    [
        '{"even_batches": false}',
        '{"use_seedable_sampler": false}',
        '{"dispatch_batches": true}',
        '{"gradient_accumulation_kwargs": {"num_steps": 2}}',
    ],
)
def test_what_would_change_the_examples_of_a_step_unseen_is_refused(settings, call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", "--do_train", *SHORT, "--accelerator_config", settings))
    assert outcome.code == 2 and outcome.err.startswith("--accelerator_config: ")


def test_an_upload_that_fails_loses_nothing_and_says_how_to_repeat_it(call, glue, tmp_path, monkeypatch):
    """The Hub gives a repository and then breaks the connection."""

    class Hub:
        def create_repo(self, *args: object, **kwargs: object) -> object:
            return SimpleNamespace(repo_id="me/run")

        def upload_folder(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("Connection reset by peer")

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    flags = rte(glue, tmp_path / "o", "--do_train", *SHORT, "--push_to_hub", "--hub_strategy", "end")
    outcome = call(*flags)
    assert outcome.code == 1 and "the upload to the Hub failed (Connection reset by peer)" in outcome.err
    assert f"hf upload me/run {tmp_path / 'o'}" in outcome.err
    assert read(tmp_path / "o" / "run.json")["trained"] and (tmp_path / "o" / ADAPTER_WEIGHTS).is_file()
    assert read(tmp_path / "o" / "train_results.json")["train_samples"] == 48
    assert "already trained" in succeeded(call(*flags)).out
