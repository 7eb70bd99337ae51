"""--bf16 on a CPU: frozen weights are held in bf16 without autocast; every score says its precision."""

import json
from pathlib import Path

import pytest
import torch
from runs import LORA
from safetensors.torch import load_file

from lora_nlu.models import checkpoints


def rte(glue: Path, *flags: object) -> list[object]:
    return ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", "64", *flags]


SIZE = ["--max_train_samples", 16, "--max_eval_samples", 16, "--max_steps", 2, "--per_device_train_batch_size", 4]
HELD = "bf16: the weights of 12 linear layers are held in bf16"


def test_a_run_in_bf16_trains_an_fp32_adapter_without_autocast_and_its_scores_say_their_precision(
    call, glue, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "autocast", None)  # an error if anything uses it
    folder, evaluated = tmp_path / "trained", tmp_path / "evaluated"
    run = [*rte(glue, "--do_train", "--do_eval", *LORA, *SIZE), "--output_dir", folder]
    outcome = call(*run, "--bf16", "--eval_strategy", "epoch", "--save_strategy", "steps", "--save_steps", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(HELD) == 1 and "real tokens/s, bf16" in outcome.out
    assert all(x.dtype is torch.float32 for x in load_file(folder / "adapter_model.safetensors").values())
    assert json.loads((folder / "run_metadata.json").read_text())["precision"] == "bf16"
    assert json.loads((folder / "eval_results.json").read_text())["eval_precision"] == "bf16"
    resumed = call(*run, "--bf16")
    assert resumed.code == 0 and "already trained" in resumed.out

    losses = {}
    for flags, precision in (([], "fp32"), (["--bf16"], "bf16"), (["--bf16_full_eval"], "bf16")):
        again = rte(glue, "--do_eval", "--do_predict", "--max_eval_samples", 16, "--max_predict_samples", 8, *LORA)
        again += ["--lora_path", folder, *flags]
        outcome = call(*again, "--output_dir", evaluated / "".join(flags), "--overwrite_output_dir")
        assert outcome.code == 0, outcome.err
        results = json.loads((evaluated / "".join(flags) / "eval_results.json").read_text())
        assert results["eval_precision"] == precision and (HELD in outcome.out) == (precision == "bf16")
        predicted = json.loads((evaluated / "".join(flags) / "predict_results.json").read_text())
        assert [entry["precision"] for entry in predicted.values()] == [precision]
        losses["".join(flags)] = results["eval_loss"]
    assert losses["--bf16"] == losses["--bf16_full_eval"] != losses[""]
    assert losses["--bf16"] == pytest.approx(losses[""], abs=0.01)


def test_where_every_weight_trains_bf16_computes_in_fp32_and_says_it(call, glue, tmp_path):
    outcome = call(*rte(glue, "--do_train", "--do_eval", *SIZE, "--bf16"), "--output_dir", tmp_path / "o")
    assert (
        outcome.code == 0
        and "bf16: all is computed in fp32: no weight is frozen" in outcome.out
        and "real tokens/s, fp32" in outcome.out
    )
    evaluated = rte(glue, "--do_eval", "--max_eval_samples", 16, "--model_name_or_path", tmp_path / "o", "--bf16")
    outcome = call(*evaluated, "--output_dir", tmp_path / "evaluated")
    assert outcome.code == 0 and HELD in outcome.out and "real tokens/s, bf16" in outcome.out


def test_a_processor_that_is_slower_in_bf16_is_named(call, glue, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "has_fast_bf16", lambda: False)
    outcome = call(*rte(glue, "--do_train", *LORA, *SIZE, "--bf16"), "--output_dir", tmp_path / "o")
    assert outcome.code == 0 and "bf16: this processor has no fast instructions for it" in outcome.out


def test_two_processes_and_gradient_checkpointing_train_in_bf16_together(fork, glue, tmp_path):
    run = rte(glue, "--do_train", "--do_eval", *LORA, *SIZE, "--bf16", "--gradient_checkpointing")
    outcome = fork(*run, "--output_dir", tmp_path / "o", processes=2)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count(HELD) == 1 and "real tokens/s, bf16" in outcome.out
    assert all(x.isfinite().all() for x in load_file(tmp_path / "o" / "adapter_model.safetensors").values())
