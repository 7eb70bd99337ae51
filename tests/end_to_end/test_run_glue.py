"""run_glue.py from flags to files: training, evaluation, prediction, resuming, and other programs' files."""

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import LORA, SCRIPT, Outcome, contents, sentence, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_nlu.data.tasks import TASKS
from lora_nlu.report.submission import find_runs, read_predictions
from lora_nlu.training.parsing import parse_arguments

LEARN = ["--learning_rate", "1e-2", "--num_train_epochs", "15", "--max_seq_length", "64", "--logging_steps", "10"]
SHORT = ["--max_steps", "6", "--max_seq_length", "64", "--learning_rate", "1e-2"]
TIMES = re.compile(r"runtime|per_second|preparation_time|elapsed_s|train_seconds|peak_memory")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def scores(path: Path) -> dict:
    """A results file without the times, the training's counters and what it records of the model and the examples."""
    ignored = ("epoch", "num_input_tokens_seen", "weights_fingerprint", "eval_data", "eval_set_samples")
    ignored += ("eval_data_mm", "eval_set_samples_mm", "eval_precision")
    return {key: v for key, v in read(path).items() if not TIMES.search(key) and key not in ignored}


def rte(glue: Path, output: Path, *flags: object) -> list[object]:
    return ["--task_name", "rte", "--glue_dir", glue, "--output_dir", output, *LORA, *flags]


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err[-3000:]
    return outcome


def trained_flat(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter folder's tensors by the model's own names: the published layout."""
    return {
        re.sub(r"(lora_[AB])\.weight$", r"\1", name.removeprefix("base_model.model.")): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


# --------------------------------------------------------------------------------------------------------- one task


# Runs the program that its arguments name and prints which of these modules our code imported meanwhile.
WATCHED_IMPORTS = """
import builtins, runpy, sys
plain, backends, seen = builtins.__import__, ("torch.distributed.fsdp", "transformers.integrations.deepspeed"), set()
def watch(name, globals=None, locals=None, fromlist=(), level=0):
    names = (name, *(f"{name}.{part}" for part in fromlist or ()))
    if (globals or {}).get("__name__", "").startswith(("lora_nlu", "__main__")):
        seen.update(name for name in names if name.startswith((*backends, "deepspeed", "lora_nlu.training.sharded")))
    return plain(name, globals, locals, fromlist, level)
builtins.__import__ = watch
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", sorted(seen))
"""


@pytest.fixture(scope="module")
def rte_run(start, glue, tmp_path_factory) -> tuple[Path, Outcome]:
    """RTE trained, evaluated and predicted by a process of its own, in the flags of 2021's scripts, imports watched."""
    output = tmp_path_factory.mktemp("rte") / "output"
    flags = [*LEARN, "--do_train", "--do_eval", "--do_predict", "--evaluation_strategy", "epoch"]
    flags += ["--warmup_ratio", "0.06", "--use_deterministic_algorithms", "--local_rank", "-1", "--seed", "0"]
    flags += ["--overwrite_output_dir", "--save_strategy", "epoch", "--per_gpu_train_batch_size", "8"]
    flags += ["--logging_dir", output.parent / "log"]
    return output, succeeded(start(*rte(glue, output, *flags), launcher=("-c", WATCHED_IMPORTS)))


def test_train_eval_predict_writes_the_adapter_and_every_result_file(rte_run, tiny_model):
    output, outcome = rte_run
    assert read(output / "run.json")["dataset"] == "nyu-mll/glue"
    assert read(output / "train_results.json").keys() >= {"train_loss", "train_runtime", "train_samples", "epoch"}
    assert read(output / "train_results.json")["train_samples"] == 48
    evaluated = read(output / "eval_results.json")
    assert evaluated.keys() >= {"eval_accuracy", "eval_loss", "eval_runtime", "eval_samples", "epoch"}
    assert evaluated["eval_samples"] == 24 and evaluated["epoch"] == 15
    both = read(output / "all_results.json")
    assert both.keys() >= {"train_loss", "train_samples", "eval_accuracy", "eval_samples"}
    state = read(output / "trainer_state.json")
    assert state["global_step"] == 90 and sum("eval_accuracy" in entry for entry in state["log_history"]) == 15
    config = read(output / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(tiny_model))
    metadata = read(output / "run_metadata.json")
    assert metadata["task"] == "rte" and metadata["labels"] == ["entailment", "not_entailment"]
    assert metadata["hyperparameters"]["seed"] == 0 and metadata["base_model"] == str(tiny_model)
    names = trained_flat(output)
    assert all("lora_" in name or name.startswith("classifier.") for name in names) and len(names) == 12
    assert not list(output.rglob("model.safetensors")) and not list(output.rglob("pytorch_model.bin"))
    assert "Traceback" not in outcome.err
    for part in ("accuracy", "trainable parameters", "of them LoRA", "best while training", str(output)):
        assert part in outcome.out, part


def test_a_run_without_a_sharded_backend_imports_none(rte_run):
    assert rte_run[1].out.splitlines()[-1] == "imported: []"


def test_training_learns_what_the_examples_teach(rte_run):
    losses = [entry["loss"] for entry in read(rte_run[0] / "trainer_state.json")["log_history"] if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0], losses


def test_predictions_are_label_names_under_the_header_the_glue_server_wants(rte_run):
    lines = (rte_run[0] / "predict_results_rte.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 11
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows] == [str(i) for i in range(10)]
    assert {row[1] for row in rows} <= {"entailment", "not_entailment"}


def details_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of predictions with texts; each has the same index and label as the one for the server."""
    lines = (folder / f"predictions_{name}.jsonl").read_text(encoding="utf-8").split("\n")
    details = [json.loads(line) for line in lines[:-1]]
    answers = [line.split("\t") for line in (folder / f"predict_results_{name}.tsv").read_text().splitlines()[1:]]
    assert lines[-1] == "" and [int(index) for index, _ in answers] == [one["index"] for one in details]
    for (_, answer), one in zip(answers, details, strict=True):
        if "score" in one:
            assert float(answer) == pytest.approx(one["score"], abs=6e-4)
            continue
        probabilities = one["probabilities"]
        assert one["label"] == answer == max(probabilities, key=probabilities.__getitem__)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5) and min(probabilities.values()) > 0
    return details


def test_beside_them_are_the_texts_and_the_probability_of_each_class(rte_run, glue):
    details = details_of(rte_run[0], "rte")
    rows = [line.split("\t")[1:3] for line in (glue / "RTE" / "test.tsv").read_text().splitlines()[1:]]
    assert [[one["text"], one["text_pair"]] for one in details] == rows
    assert all([*one["probabilities"]] == ["entailment", "not_entailment"] for one in details)
    assert "predictions_rte.jsonl" in read(rte_run[0] / "files.json")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--evaluation_strategy epoch", "--eval_strategy epoch"),
        ("--warmup_ratio 0.06", "--warmup_steps 0.06"),
        ("--use_deterministic_algorithms", "--full_determinism"),
        ("--per_gpu_train_batch_size 8", "--per_device_train_batch_size 8"),
        ("--local_rank -1", "dropped"),
    ],
)
def test_each_flag_of_2021_is_reported_in_one_line_with_what_it_is_now(old, new, rte_run):
    matching = [line for line in rte_run[1].out.splitlines() if line.startswith(f"run_glue.py: {old}")]
    assert len(matching) == 1 and new in matching[0]


def test_logging_dir_gets_tensorboards_files_or_a_line_that_it_stays_empty(
    rte_run, glue, tiny_model, tmp_path, monkeypatch
):
    assert list((rte_run[0].parent / "log").glob("events.out.tfevents.*"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # the flag sets it; the test puts it back
    monkeypatch.setattr("lora_nlu.training.parsing.is_tensorboard_available", lambda: False)
    printed = io.StringIO()
    flags = ["--model_name_or_path", tiny_model, *rte(glue, tmp_path / "o", "--do_eval", "--logging_dir", "log")]
    with contextlib.redirect_stdout(printed):
        args = parse_arguments([*map(str, flags)], os.environ)[2]
    assert args.report_to == [] and "run_glue.py: --logging_dir log: nothing is written there" in printed.getvalue()


def test_a_new_process_evaluates_the_output_folder_to_exactly_the_same_numbers(rte_run, fork, glue, tmp_path):
    trained, _ = rte_run
    flags = ["--do_eval", "--do_predict", "--max_seq_length", "64", "--lora_path", trained]
    outcome = succeeded(fork(*rte(glue, tmp_path / "eval", *flags)))
    assert scores(tmp_path / "eval" / "eval_results.json") == scores(trained / "eval_results.json")
    predictions = "predict_results_rte.tsv"
    assert (tmp_path / "eval" / predictions).read_bytes() == (trained / predictions).read_bytes()
    assert f"Loaded {trained}" in outcome.out


def test_re_running_a_finished_run_skips_training_says_so_and_gives_the_same_result(rte_run, call, glue, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(rte_run[0], output)
    before = contents(output)
    flags = [*LEARN, "--do_train", "--do_eval", "--seed", "0", "--warmup_steps", "0.06", "--logging_steps", "5"]
    flags += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]  # also 8 examples a step
    outcome = succeeded(call(*rte(glue, output, *flags)))
    assert "already trained" in outcome.out and "--overwrite_output_dir" in outcome.out
    after, results = contents(output), {"eval_results.json", "all_results.json"}
    assert {n: h for n, h in after.items() if n not in results} == {n: h for n, h in before.items() if n not in results}
    assert scores(output / "eval_results.json") == scores(rte_run[0] / "eval_results.json")
    for name in ("epoch", "num_input_tokens_seen"):
        assert read(output / "all_results.json")[name] == read(rte_run[0] / "all_results.json")[name] > 0


@pytest.mark.parametrize(
    ("changed", "expected_message"),
    [
        (["--learning_rate", "1e-3"], "learning_rate 0.01, now 0.001"),
        (["--seed", "3"], "seed 0, now 3"),
        (["--num_train_epochs", "16"], "num_train_epochs 15.0, now 16.0"),
        (["--per_device_train_batch_size", "4"], "examples_a_step 8, now 4"),
        (["--lora_r", "2"], "ranks [4], now [2]"),
        (["--lora_alpha", "16"], "scalings [2.0], now [4.0]"),
        (["--max_train_samples", "40"], "train_samples 48, now 40"),
        (["--reg_loss_wgt", "1"], "reg_loss_wgt 0.0, now 1.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "cut off"])
def test_a_run_with_other_settings_is_refused_with_the_differences(
    changed, expected_message, finished, rte_run, call, glue, tmp_path
):
    output = tmp_path / "output"
    shutil.copytree(rte_run[0], output)
    if not finished:
        run = read(output / "run.json")
        del run["trained"]
        (output / "run.json").write_text(json.dumps(run))
    before = contents(output)
    flags = [*LEARN, "--do_train", "--seed", "0", "--warmup_steps", "0.06", "--per_device_train_batch_size", "8"]
    outcome = call(*rte(glue, output, *flags, *changed))
    assert outcome.code == 1 and expected_message in outcome.err and outcome.err.count("\n") < 3, outcome
    assert contents(output) == before


def test_an_adapter_of_another_base_model_is_refused_by_its_fingerprint(rte_run, call, glue, vocabulary, tmp_path):
    other = write_checkpoint(tmp_path / "other", vocabulary)
    weights = load_file(other / "model.safetensors")
    weights["roberta.encoder.layer.1.output.dense.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    flags = ["--do_eval", "--max_seq_length", "64", "--lora_path", rte_run[0], "--model_name_or_path", other]
    outcome = call(*rte(glue, tmp_path / "o", *flags))
    assert outcome.code == 1 and "another base model" in outcome.err and "fingerprint" in outcome.err, outcome


def test_an_adapter_needs_no_lora_flags_of_its_own(rte_run, call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, "--do_eval", "--max_seq_length", "64"]
    outcome = succeeded(call(*flags, "--lora_path", rte_run[0], "--output_dir", tmp_path / "o"))
    assert "rank 4, alpha 8" in outcome.out
    assert scores(tmp_path / "o" / "eval_results.json") == scores(rte_run[0] / "eval_results.json")


def test_a_published_file_needs_lora_alpha_and_the_log_says_that_it_is_unconfirmed(rte_run, call, glue, tmp_path):
    torch.save(trained_flat(rte_run[0]), tmp_path / "rte.bin")
    flags = ["--task_name", "rte", "--glue_dir", glue, "--do_eval", "--max_seq_length", "64"]
    flags += ["--lora_path", tmp_path / "rte.bin", "--output_dir", tmp_path / "o"]
    outcome = call(*flags)
    assert outcome.code == 1 and "Give --lora_alpha" in outcome.err and outcome.err.count("\n") < 3
    assert "alpha 8, which the file can't confirm" in succeeded(call(*flags, "--lora_alpha", "8")).out
    assert scores(tmp_path / "o" / "eval_results.json") == scores(rte_run[0] / "eval_results.json")


def test_the_adapter_records_base_task_labels_metric_and_hyperparameters(rte_run, tiny_model):
    metadata = read(rte_run[0] / "run_metadata.json")
    assert metadata["base_model"] == str(tiny_model) and len(metadata["base_fingerprint"]) == 16
    assert (metadata["task"], metadata["labels"]) == ("rte", ["entailment", "not_entailment"])
    accuracy = read(rte_run[0] / "eval_results.json")["eval_accuracy"]
    assert metadata["metrics"]["eval_accuracy"] == accuracy
    assert metadata["hyperparameters"]["learning_rate"] == 1e-2 and metadata["hyperparameters"]["examples_a_step"] == 8


def test_starting_a_finished_run_again_without_evaluation_keeps_the_figure_it_had(rte_run, call, glue, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(rte_run[0], output)
    before = contents(output)
    flags = [*LEARN, "--do_train", "--seed", "0", "--warmup_steps", "0.06", "--per_device_train_batch_size", "8"]
    succeeded(call(*rte(glue, output, *flags)))
    assert contents(output) == before and read(output / "run_metadata.json")["metrics"]


def test_overwrite_output_dir_trains_afresh_and_removes_no_file_that_the_run_did_not_write(call, glue, tmp_path):
    output = tmp_path / "output"
    succeeded(call(*rte(glue, output, *SHORT, "--do_train", "--do_eval", "--do_predict", "--save_steps", "2")))
    others = {
        "notes.txt", "checkpoint-notes.txt", "checkpoint-backup/thesis.txt", "checkpoint-9000/model.bin",
        "my_paper_results.json", "predict_results_mine.tsv", "checkpoint-2/notes.txt",
    }  # fmt: skip
    for name in others:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-copy")
    copied = {f"checkpoint-copy/{path.name}" for path in (output / "checkpoint-copy").iterdir()}
    first = trained_flat(output)
    flags = [*SHORT, "--do_train", "--save_strategy", "no", "--seed", "1", "--overwrite_output_dir"]
    outcome = succeeded(call(*rte(glue, output, *flags)))
    assert "already trained" not in outcome.out and "Resuming" not in outcome.out
    assert not all(torch.equal(tensor, first[name]) for name, tensor in trained_flat(output).items())
    assert all((output / name).read_text() == "mine" for name in others)
    results = {"train_results.json", "all_results.json", "trainer_state.json", "adapter_config.json"}
    own = {"run.json", "files.json", "run_metadata.json", "adapter_model.safetensors", "README.md"} | results
    assert contents(output).keys() == own | others | copied


def test_a_run_of_another_task_in_the_output_folder_is_refused_not_taken_up(rte_run, call, glue, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(rte_run[0], output)
    before = contents(output)
    flags = ["--task_name", "cola", "--glue_dir", glue, "--output_dir", output, *LORA, *LEARN, "--do_train"]
    outcome = call(*flags)
    assert outcome.code == 1 and "rte" in outcome.err and "--overwrite_output_dir" in outcome.err
    assert contents(output) == before


def test_flags_may_come_as_one_json_file(call, glue, base_flags, tmp_path):
    flags = {"task_name": "rte", "glue_dir": str(glue), "output_dir": str(tmp_path / "json"), "do_train": True}
    flags |= {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "max_steps": 6, "max_seq_length": 64}
    flags |= {"learning_rate": 1e-2, "warmup_ratio": 0.5, "lora_path": None, "cls_dropout": 0.0}
    flags |= {flag.removeprefix("--"): value for flag, value in zip(base_flags[::2], base_flags[1::2], strict=True)}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    outcome = succeeded(call(tmp_path / "flags.json", base=False))
    assert "--warmup_ratio 0.5 is now --warmup_steps 0.5" in outcome.out
    same = [*SHORT, "--do_train", "--warmup_steps", "0.5", "--cls_dropout", "0"]
    succeeded(call(*rte(glue, tmp_path / "flags", *same)))
    got, want = trained_flat(tmp_path / "json"), trained_flat(tmp_path / "flags")
    assert all(torch.equal(got[name], want[name]) for name in want)


# ------------------------------------------------------------------------------------------------------- other tasks


@pytest.fixture(scope="module")
def mnli_run(call, glue, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mnli") / "output"
    flags = ["--task_name", "mnli", "--glue_dir", glue, "--output_dir", output, "--max_seq_length", "64"]
    flags += ["--apply_lora", "--lora_r", "8", "--lora_alpha", "16", "--max_steps", "20", "--learning_rate", "1e-2"]
    succeeded(call(*flags, "--do_train", "--do_eval", "--do_predict"))
    return output


def test_mnli_reports_matched_mismatched_and_overall_and_predicts_both_sets_and_the_diagnostic_one(mnli_run):
    results, mismatched = read(mnli_run / "eval_results.json"), read(mnli_run / "eval_mm_results.json")
    assert results["eval_samples"] == 24 and results["eval_samples_mm"] == 18
    overall = (24 * results["eval_accuracy"] + 18 * results["eval_accuracy_mm"]) / 42
    assert results["eval_accuracy_overall"] == pytest.approx(overall, rel=1e-12)
    assert mismatched["eval_accuracy_mm"] == results["eval_accuracy_mm"]
    for name, rows in (("mnli", 7), ("mnli-mm", 9), ("ax", 5)):
        name = f"predict_results_{name}.tsv"
        lines = (mnli_run / name).read_text().splitlines()
        assert lines[0] == "index\tprediction" and len(lines) == rows + 1
        assert len({one["text"] for one in details_of(mnli_run, name[16:-4])}) > 1
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


def test_the_best_evaluation_while_training_is_none_of_the_final_ones(call, glue, tmp_path):
    flags = ["--task_name", "mnli", "--glue_dir", glue, "--max_seq_length", "64", "--max_steps", "1", "--head_only"]
    for strategy, folder in (("no", "none"), ("steps", "one")):
        out = call(
            *flags, "--do_train", "--do_eval", "--eval_strategy", strategy, "--eval_steps", "1", "--output_dir",
            tmp_path / folder, "--max_train_samples", "8",
        ).out  # fmt: skip
        if strategy == "no":
            assert "best while training" not in out
    (best,) = re.findall(r"best while training +(\S+) at", out)
    assert float(best) == round(read(tmp_path / "one" / "eval_results.json")["eval_accuracy"], 4)


def test_the_references_evaluation_command_works_on_a_published_file(mnli_run, start, glue, tmp_path):
    file = tmp_path / "roberta_base_lora_mnli.bin"
    torch.save(trained_flat(mnli_run), file)
    flags = ["--task_name", "mnli", "--glue_dir", glue, "--do_eval", "--output_dir", tmp_path / "output"]
    flags += ["--apply_lora", "--lora_r", "8", "--lora_alpha", "16", "--lora_path", file, "--max_seq_length", "64"]
    launcher = ("-m", "torch.distributed.launch", "--nproc_per_node=1", "--master_port=29517")
    succeeded(start(*flags, launcher=launcher))
    assert scores(tmp_path / "output" / "eval_results.json") == scores(mnli_run / "eval_results.json")


def test_rte_training_that_starts_from_an_mnli_adapter_says_that_the_head_is_left_behind(
    mnli_run, call, glue, tmp_path
):
    rank = ["--lora_r", "8", "--lora_alpha", "16", "--lora_path", mnli_run]
    outcome = succeeded(call(*rte(glue, tmp_path / "rte", *rank, *SHORT, "--learning_rate", "0", "--do_train")))
    assert len([line for line in outcome.out.splitlines() if "its classifier is for other labels" in line]) == 1
    got, mnli = trained_flat(tmp_path / "rte"), trained_flat(mnli_run)
    assert all(torch.equal(got[name], mnli[name]) for name in mnli if "lora_" in name)
    assert got["classifier.out_proj.weight"].shape[0] == 2
    assert not torch.equal(got["classifier.dense.weight"], mnli["classifier.dense.weight"])


def test_do_predict_alone_needs_no_labels(mnli_run, call, glue, tmp_path):
    folder = tmp_path / "glue" / "MNLI"
    folder.mkdir(parents=True)
    for name in ("test_matched.tsv", "test_mismatched.tsv"):
        shutil.copy(glue / "MNLI" / name, folder)
    flags = ["--task_name", "mnli", "--glue_dir", folder.parent, "--output_dir", tmp_path / "o", "--do_predict"]
    flags += ["--apply_lora", "--lora_r", "8", "--lora_alpha", "16", "--lora_path", mnli_run, "--max_seq_length", "64"]
    outcome = succeeded(call(*flags))
    names = ("predict_results_mnli.tsv", "predict_results_mnli-mm.tsv")
    for name in (*names, "predictions_mnli.jsonl", "predictions_mnli-mm.jsonl"):
        assert (tmp_path / "o" / name).read_bytes() == (mnli_run / name).read_bytes()
    assert "No predictions for the diagnostic set (AX): " in outcome.out and "AX/test.tsv" in outcome.out
    assert not (tmp_path / "o" / "predict_results_ax.tsv").exists()
    assert not (tmp_path / "o" / "eval_results.json").exists()


def test_the_diagnostic_set_is_predicted_from_an_mnli_adapter_on_its_own_as_well(mnli_run, call, glue, tmp_path):
    flags = ["--task_name", "ax", "--glue_dir", glue, "--output_dir", tmp_path / "o", "--do_predict"]
    succeeded(call(*flags, "--lora_path", mnli_run, "--max_seq_length", "64"))
    name = "predict_results_ax.tsv"
    assert (tmp_path / "o" / name).read_bytes() == (mnli_run / name).read_bytes()


def test_the_predictions_of_a_run_are_what_the_submission_reads(mnli_run, rte_run):
    for folder, task, name, rows in ((mnli_run, "mnli", "mnli-mm", 9), (mnli_run, "ax", "ax", 5)):
        path = folder / f"predict_results_{name}.tsv"
        answers = [line.split("\t")[1] for line in path.read_text().splitlines()[1:]]
        assert read_predictions(path, TASKS[task], rows) == answers
    (run,), _ = find_runs([rte_run[0]])
    assert run.predicts("rte") and run.figures.last == read(rte_run[0] / "eval_results.json")["eval_accuracy"]


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("cola", {"eval_matthews_correlation"}),
        ("stsb", {"eval_pearson", "eval_spearmanr", "eval_combined_score"}),
    ],
)
def test_each_task_reports_its_own_metrics_and_writes_its_own_predictions(task, keys, call, glue, tmp_path):
    flags = ["--task_name", task, "--glue_dir", glue, "--output_dir", tmp_path / "o", *LORA, *SHORT]
    succeeded(call(*flags, "--do_train", "--do_eval", "--do_predict"))
    assert read(tmp_path / "o" / "eval_results.json").keys() >= keys
    answers = [
        line.split("\t")[1] for line in (tmp_path / "o" / f"predict_results_{task}.tsv").read_text().split("\n")[1:-1]
    ]
    assert len(answers) == 10
    assert [{*one} for one in details_of(tmp_path / "o", task)] == [
        {"index", "text", "text_pair", "score"} if task == "stsb" else {"index", "text", "label", "probabilities"}
    ] * 10
    assert all(
        re.fullmatch(r"-?\d+\.\d{3}", a) if task == "stsb" else a in ("unacceptable", "acceptable") for a in answers
    )


# -------------------------------------------------------------------------------------------------- files of one's own


def write_csv(path: Path, rows: list[tuple[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def own_run(call, tmp_path_factory) -> tuple[Path, Path]:
    """The output folder and the CSV files of a run on three classes named by words."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(1)
    words = {"spam": "surely", "ham": "never", "eggs": "perhaps"}
    for name, rows in (("train", 36), ("validation", 18)):
        labels = [rng.choice([*words]) for _ in range(rows)]
        write_csv(folder / f"{name}.csv", [(f'{sentence(rng, words[label])}, "so"', label) for label in labels])
    flags = ["--train_file", folder / "train.csv", "--validation_file", folder / "validation.csv", *LORA, *SHORT]
    succeeded(call(*flags, "--do_train", "--do_eval", "--output_dir", folder / "output"))
    return folder / "output", folder


def test_a_csv_with_labels_in_words_trains_and_records_them(own_run):
    output, _ = own_run
    assert read(output / "run_metadata.json")["labels"] == ["eggs", "ham", "spam"]
    assert read(output / "eval_results.json")["eval_samples"] == 18
    assert load_file(output / "adapter_model.safetensors")["base_model.model.classifier.out_proj.weight"].shape[0] == 3


def test_evaluating_a_custom_adapter_alone_uses_the_labels_it_recorded(own_run, call, tmp_path):
    output, folder = own_run
    with (folder / "validation.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    some = [tuple(row) for row in rows if row[1] == "spam"]  # by itself this file has one label, and no ids for it
    part = write_csv(tmp_path / "part.csv", some)
    flags = [*LORA, "--lora_path", output, "--max_seq_length", "64"]
    succeeded(
        call("--validation_file", folder / "validation.csv", "--do_eval", "--output_dir", tmp_path / "all", *flags)
    )
    assert scores(tmp_path / "all" / "eval_results.json") == scores(output / "eval_results.json")
    succeeded(call("--validation_file", part, "--do_eval", "--output_dir", tmp_path / "part", *flags))
    succeeded(call("--test_file", part, "--do_predict", "--output_dir", tmp_path / "predict", *flags))
    lines = (tmp_path / "predict" / "predict_results_custom.tsv").read_text().splitlines()[1:]
    right = sum(line.split("\t")[1] == "spam" for line in lines)
    assert read(tmp_path / "part" / "eval_results.json")["eval_accuracy"] == right / len(some)


def test_a_fine_tuned_model_predicts_by_the_labels_that_its_config_records(own_run, call, tmp_path):
    _, folder = own_run
    files = ["--train_file", folder / "train.csv", "--validation_file", folder / "validation.csv"]
    fine_tuned = tmp_path / "complete"
    succeeded(call(*files, *SHORT, "--do_train", "--do_eval", "--output_dir", fine_tuned))
    flags = ["--model_name_or_path", fine_tuned, "--max_seq_length", "64", "--output_dir", tmp_path / "o"]
    succeeded(call("--test_file", folder / "validation.csv", "--do_predict", *flags))
    lines = (tmp_path / "o" / "predict_results_custom.tsv").read_text().splitlines()[1:]
    with (folder / "validation.csv").open(newline="", encoding="utf-8") as file:
        right_labels = [row[1] for row in list(csv.reader(file))[1:]]
    right = sum(line.split("\t")[1] == label for line, label in zip(lines, right_labels, strict=True))
    assert read(fine_tuned / "eval_results.json")["eval_accuracy"] == pytest.approx(right / len(right_labels))


def test_a_csv_with_decimal_labels_is_a_regression(call, tmp_path):
    rng = random.Random(2)
    files = [
        write_csv(tmp_path / f"{name}.csv", [(sentence(rng, "very " * n + "so"), n / 2) for n in range(5)] * 4)
        for name in ("train", "validation")
    ]
    flags = ["--train_file", files[0], "--validation_file", files[1], "--test_file", files[1], *LORA, *SHORT]
    outcome = call(*flags, "--do_train", "--do_eval", "--do_predict", "--output_dir", tmp_path / "o")
    assert succeeded(outcome)
    results = read(tmp_path / "o" / "eval_results.json")
    assert results.keys() >= {"eval_pearson", "eval_mse"}
    assert results["eval_mse"] == pytest.approx(results["eval_loss"], rel=1e-4)
    answers = [
        line.split("\t")[1] for line in (tmp_path / "o" / "predict_results_custom.tsv").read_text().split("\n")[1:-1]
    ]
    mse = sum((float(a) - n % 5 / 2) ** 2 for n, a in enumerate(answers)) / len(answers)
    assert mse == pytest.approx(results["eval_mse"], abs=5e-3)  # three decimals are written
    assert read(tmp_path / "o" / "run_metadata.json")["labels"] == []


# ---------------------------------------------------------------------------------------------------- interrupted runs


def test_an_interrupted_run_says_how_to_resume_and_its_re_run_ends_bit_equal(
    call, fork, glue, environment, base_flags, tmp_path
):
    long = [
        "--max_steps",
        "240",
        "--save_steps",
        "20",
        "--max_seq_length",
        "64",
        "--learning_rate",
        "1e-3",
        "--do_train",
    ]
    output = tmp_path / "output"
    command = [sys.executable, SCRIPT, *base_flags, *rte(glue, output, *long)]
    process = subprocess.Popen(
        [*map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in a shell's background has Ctrl-C ignored, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err, err[-3000:]
    assert "run_glue.py: error: interrupted" in err and "same command resumes" in err
    checkpoints = list(output.glob("checkpoint-*"))
    assert checkpoints and not (output / "adapter_model.safetensors").exists() and not (output / "_saving").exists()
    for checkpoint in checkpoints:
        assert read(checkpoint / "trainer_state.json")["global_step"] == int(checkpoint.name.split("-")[1])
        assert len(trained_flat(checkpoint)) == 12
        assert len(torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]) == 12

    outcome = succeeded(fork(*rte(glue, output, *long)))
    assert f"Resuming from {output / 'checkpoint-'}" in outcome.out
    succeeded(call(*rte(glue, tmp_path / "complete", *long)))
    got, want = trained_flat(output), trained_flat(tmp_path / "complete")
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    assert read(output / "trainer_state.json")["global_step"] == 240


# ------------------------------------------------------------------------------------- without LoRA, two processes


def test_plain_fine_tuning_saves_a_model_that_transformers_own_class_loads(call, glue, tmp_path):
    output = tmp_path / "o"
    flags = ["--task_name", "rte", "--glue_dir", glue, "--output_dir", output, *SHORT, "--do_train", "--do_eval"]
    outcome = succeeded(call(*flags, "--do_predict", "--save_strategy", "no"))
    assert "LoRA" not in outcome.out and not (output / "adapter_config.json").exists()
    theirs, report = transformers.RobertaForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert theirs.config.id2label == {0: "entailment", 1: "not_entailment"}
    tokenizer = AutoTokenizer.from_pretrained(output)
    rows = [line.split("\t") for line in (glue / "RTE" / "test.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        batch = tokenizer([r[1] for r in rows], [r[2] for r in rows], padding=True, return_tensors="pt")
        answers = [theirs.config.id2label[int(i)] for i in theirs.eval()(**batch).logits.argmax(1)]
    written = [line.split("\t")[1] for line in (output / "predict_results_rte.tsv").read_text().splitlines()[1:]]
    assert written == answers


def test_two_processes_train_one_model_and_write_one_set_of_results(fork, glue, tmp_path):
    flags = [
        *SHORT,
        "--do_train",
        "--do_eval",
        "--do_predict",
        "--per_device_train_batch_size",
        "4",
        "--save_steps",
        "3",
    ]
    outcome = succeeded(fork(*rte(glue, tmp_path / "o", *flags), processes=2))
    assert outcome.out.count("trainable parameters") == 1
    assert read(tmp_path / "o" / "train_results.json")["epoch"] == 1.0  # 6 steps of 2 x 4 examples are all 48
    assert read(tmp_path / "o" / "eval_results.json")["eval_samples"] == 24
    assert len((tmp_path / "o" / "predict_results_rte.tsv").read_text().splitlines()) == 11
    assert sorted(path.name for path in (tmp_path / "o").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert len(trained_flat(tmp_path / "o")) == 12
