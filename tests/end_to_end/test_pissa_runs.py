"""PiSSA through run_glue.py: in bf16, in two processes, after a kill, from a folder, merged."""

from pathlib import Path

import pytest
import torch
from runs import cut_off
from safetensors.torch import load_file
from test_run_glue import read, scores, succeeded
from transformers import RobertaForSequenceClassification

from lora_nlu.adapters.__main__ import main

PISSA = ["--apply_lora", "--lora_variant", "pissa", "--lora_r", "4", "--lora_alpha", "8"]
STEPS = ["--do_train", "--do_eval", "--max_steps", 4, "--save_steps", 2, "--learning_rate", "1e-2"]


def rte(glue: Path, output: Path, *flags: object) -> list[object]:
    data = ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", 64, "--max_train_samples", 16]
    return [*data, "--per_device_train_batch_size", 4, "--output_dir", output, *flags]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(call, glue, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pissa") / "output"
    succeeded(call(*rte(glue, folder, *STEPS, *PISSA, "--bf16")))
    return folder


def test_a_run_in_bf16_is_resumed_to_the_same_bits_and_evaluated_to_the_last_digit(trained, call, glue, tmp_path):
    resumed = cut_off(trained, tmp_path / "output", after=2)
    outcome = succeeded(call(*rte(glue, resumed, *STEPS, *PISSA, "--bf16")))
    assert "Resuming from" in outcome.out
    got, want = tensors(resumed), tensors(trained)
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    succeeded(call(*rte(glue, tmp_path / "o", "--do_eval", "--bf16", "--lora_path", trained)))
    assert scores(tmp_path / "o" / "eval_results.json") == scores(trained / "eval_results.json")


def test_two_processes_train_from_the_start_of_one(trained, fork, glue, tmp_path):
    outcome = fork(*rte(glue, tmp_path / "o", *STEPS, *PISSA, "--bf16"), processes=2)
    succeeded(outcome)
    got, want = tensors(tmp_path / "o"), tensors(trained)
    for name in [name for name in want if "lora_" in name]:
        dim = int("lora_B" in name)
        assert torch.equal(got[name].split(4, dim)[1], want[name].split(4, dim)[1])
        assert not torch.equal(*got[name].abs().split(4, dim)), name


def test_another_run_goes_on_from_the_folder_and_its_merged_model_is_transformers_own(trained, call, glue, tmp_path):
    still = ["--do_train", "--do_eval", "--max_steps", 1, "--learning_rate", 0, "--lora_path", trained]
    succeeded(call(*rte(glue, tmp_path / "on", *still)))
    assert read(tmp_path / "on" / "run.json")["method"]["name"] == "pissa"
    got, want = tensors(tmp_path / "on"), tensors(trained)
    assert got.keys() == want.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert main(["convert", str(trained), str(tmp_path / "merged"), "--to", "merged"]) == 0
    _, report = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    merged = ["--do_eval", "--model_name_or_path", tmp_path / "merged"]
    succeeded(call(*rte(glue, tmp_path / "of_merged", *merged)))
    want_scores = scores(tmp_path / "on" / "eval_results.json")
    assert scores(tmp_path / "of_merged" / "eval_results.json")["eval_loss"] == pytest.approx(
        want_scores["eval_loss"], rel=1e-5
    )
