"""AdaLoRA from flags to files: ranks fall while training; resumed, evaluated, merged, in PEFT, in two processes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import AdaLoraConfig, PeftModel
from runs import cut_off, write_models
from safetensors.torch import load_file
from test_methods_runs import rte
from test_run_glue import read, scores, succeeded

from lora_nlu.adapters.__main__ import main as adapters
from lora_nlu.adapters.reading import read_adapter

STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SCHEDULE = ["--target_rank", "1", "--reg_orth_coef", "0.2", "--init_warmup", "2", "--final_warmup", "3"]
SCHEDULE += ["--mask_interval", "2", "--beta1", "0.8"]
ADALORA = ["--apply_lora", "--lora_variant", "adalora", "--lora_r", "3", "--lora_alpha", "16", *SCHEDULE]
ALL = ["--lora_target_modules", "query,key,value,dense,intermediate,output"]
STEPS = ["--max_steps", "12", "--save_steps", "5", "--learning_rate", "2e-2", "--logging_steps", "4"]
STEPS += ["--per_device_train_batch_size", "8", "--do_train", "--do_eval"]
KINDS = ("roberta", "deberta")


@pytest.fixture(scope="module")
def models(glue, tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"), glue, **STEADY)


@pytest.fixture(scope="module")
def trained(models, call, glue, tmp_path_factory) -> dict[str, Path]:
    """A run of each model on all six layers, in PEFT's way where the models differ; what it printed is in `printed`."""
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind) / "run"
        outcome = succeeded(call(*flags(kind, models, glue, folders[kind])))
        (folders[kind].parent / "printed").write_text(outcome.out)
    return folders


def flags(kind: str, models: dict[str, Path], glue: Path, output: Path, *more: object) -> list[object]:
    way = ["--lora_relative_query"] if kind == "deberta" else []
    return rte(glue, output, "--model_name_or_path", models[kind], *ADALORA, *ALL, *way, *STEPS, *more)


def answers(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[2, 40, 41, 42, 43, 3], [2, 50, 9, 60, 61, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_has_the_directions_that_are_left_and_the_settings_of_the_run(kind, trained, capsys):
    folder = trained[kind]
    config, tensors = read(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    pattern = config["rank_pattern"]
    assert (
        len(pattern) == 12 and sum(map(sum, pattern.values())) == 12 and {len(mask) for mask in pattern.values()} == {3}
    )
    for name, mask in pattern.items():
        layer = f"base_model.model.{name.removesuffix('.lora_E')}"
        left = sum(mask)
        assert tensors[f"{layer}.lora_A"].shape[0] == tensors[f"{layer}.lora_B"].shape[1] == left
        assert tensors[f"{layer}.lora_E"].shape == (left, 1) and tensors[f"{layer}.lora_E"].count_nonzero() == left
    assert len({sum(mask) for mask in pattern.values()}) > 1, "every layer has the same rank: nothing was chosen"
    expected = {"init_r": 3, "target_r": 1, "tinit": 2, "tfinal": 3, "deltaT": 2, "beta1": 0.8, "beta2": 0.85}
    expected |= {"orth_reg_weight": 0.2, "total_step": 12, "lora_alpha": 16.0, "peft_type": "ADALORA"}
    assert {name: config[name] for name in expected} == expected
    count = sum(tensor.numel() for name, tensor in tensors.items() if "lora_" in name)
    assert adapters(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"method +adalora\n", text) and re.search(
        rf"directions left +12 of 36, with {count:,} of the parameters\n", text
    )
    left = " ".join(str(sum(mask)) for name, mask in pattern.items() if "value" in name)
    assert re.search(rf"ranks left, value +{left}\n", text)
    method = read(folder / "run.json")["method"]
    assert (method["target_rank"], method["beta1"], method["beta2"]) == (1, 0.8, 0.85)


def test_the_closing_table_counts_the_parameters_that_are_left_and_all_that_trained(trained):
    folder = trained["roberta"]
    printed = (folder.parent / "printed").read_text()
    tensors = load_file(folder / "adapter_model.safetensors")
    left = sum(tensor.numel() for name, tensor in tensors.items() if "lora_" in name)
    head = sum(tensor.numel() for name, tensor in tensors.items() if "lora_" not in name)
    trains = 2 * 3 * (4 * (32 + 32 + 1) + 2 * (32 + 48 + 1)) + head
    assert f"{trains:,} of " in printed and f", {left:,} of them AdaLoRA" in printed
    budget = 2 * (4 * (32 + 32 + 1) + 2 * (32 + 48 + 1))
    assert read(folder / "run.json")["parameters"]["encoder"] == budget


@pytest.mark.parametrize(("kind", "after"), [("roberta", 5), ("deberta", 10)])
def test_a_run_that_was_cut_off_before_or_after_the_last_choice_ends_with_the_same_bits(
    kind, after, models, trained, call, glue, tmp_path
):
    output = cut_off(trained[kind], tmp_path / "run", after)
    succeeded(call(*flags(kind, models, glue, output)))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (trained[kind] / name).read_bytes(), name
    assert scores(output / "eval_results.json") == scores(trained[kind] / "eval_results.json")


@pytest.mark.parametrize("kind", KINDS)
def test_evaluated_from_its_folder_merged_and_in_peft_it_answers_the_same(kind, models, trained, call, glue, tmp_path):
    folder, path = trained[kind], models[kind]
    evaluate = ["--model_name_or_path", path, "--lora_path", folder, "--do_eval"]
    way = ["--lora_relative_query"] if kind == "deberta" else []
    succeeded(call(*rte(glue, tmp_path / "again", *evaluate, *way)))
    assert scores(tmp_path / "again" / "eval_results.json") == scores(folder / "eval_results.json")
    assert adapters(["convert", str(folder), str(tmp_path / "merged"), "--to", "merged"]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    in_peft = PeftModel.from_pretrained(base, folder)
    assert isinstance(in_peft.peft_config["default"], AdaLoraConfig)
    expected = answers(in_peft)
    assert (answers(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (answers(in_peft.merge_and_unload()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    succeeded(call(*rte(glue, tmp_path / "plain", "--model_name_or_path", tmp_path / "merged", "--do_eval")))
    one, other = scores(tmp_path / "plain" / "eval_results.json"), scores(folder / "eval_results.json")
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    assert adapters(["convert", str(folder), str(tmp_path / "copy"), "--to", "peft"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_pefts_own_folder_is_read_and_answers_as_peft_does(models, trained, call, glue, tmp_path):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(models["roberta"], num_labels=2)
    theirs = PeftModel.from_pretrained(base, trained["roberta"], is_trainable=True)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name and parameter.numel():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    theirs.save_pretrained(tmp_path / "peft")
    assert not (tmp_path / "peft" / "run_metadata.json").exists()
    adapter = read_adapter(str(tmp_path / "peft"))
    assert adapter.method == "adalora" and {*adapter.ranks.values()} == {3}
    assert adapters(["convert", str(tmp_path / "peft"), str(tmp_path / "m"), "--to", "merged"]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    expected = answers(theirs)
    assert (answers(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_deberta_whose_relative_query_is_frozen_is_saved_as_a_type_that_peft_refuses(models, call, glue, tmp_path):
    run = ["--model_name_or_path", models["deberta"], *ADALORA, *STEPS]
    succeeded(call(*rte(glue, tmp_path / "run", *run)))
    assert read(tmp_path / "run" / "adapter_config.json")["peft_type"] == "ADALORA_FROZEN_RELATIVE_QUERY"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(models["deberta"], num_labels=2)
    with pytest.raises((KeyError, ValueError, TypeError)):
        PeftModel.from_pretrained(base, tmp_path / "run")
    evaluate = ["--model_name_or_path", models["deberta"], "--lora_path", tmp_path / "run", "--do_eval"]
    succeeded(call(*rte(glue, tmp_path / "again", *evaluate)))
    assert scores(tmp_path / "again" / "eval_results.json") == scores(tmp_path / "run" / "eval_results.json")


def test_two_processes_and_accumulated_batches_train_what_one_does(models, fork, call, glue, tmp_path):
    def run(name: str, batch: int, *more: object) -> list[object]:
        return [*flags("roberta", models, glue, tmp_path / name), "--per_device_train_batch_size", batch, *more]

    succeeded(call(*run("one", 8)))
    succeeded(fork(*run("two", 2, "--gradient_accumulation_steps", 2), processes=2))
    one, two = (read_adapter(str(tmp_path / name)) for name in ("one", "two"))
    for name in ("one", "two"):
        assert (tmp_path / name / "adapter_config.json").is_file()
    patterns = [read(tmp_path / name / "adapter_config.json")["rank_pattern"] for name in ("one", "two")]
    assert patterns[0] == patterns[1]
    for name, tensor in one.state.items():
        assert (two.state[name] - tensor).abs().max() <= 1e-4 * max(tensor.abs().max(), 1e-3), name


def test_training_goes_on_from_a_folder_to_a_lower_rank_by_its_own_flags(models, trained, call, glue, tmp_path):
    start = rte(
        glue, tmp_path / "o", "--model_name_or_path", models["roberta"], "--lora_path", trained["roberta"], *STEPS
    )
    outcome = call(*start, "--init_warmup", "9")
    assert outcome.code == 1 and "--init_warmup and --final_warmup are 12 steps together" in outcome.err
    outcome = succeeded(call(*start, "--init_warmup", "1", "--final_warmup", "1"))
    assert "AdaLoRA, rank 3, alpha 16" in outcome.out
    config = read(tmp_path / "o" / "adapter_config.json")
    assert (config["tinit"], config["tfinal"], config["deltaT"], config["target_r"]) == (1, 1, 2, 1)
    before = read(trained["roberta"] / "adapter_config.json")["rank_pattern"]
    after = config["rank_pattern"]
    assert all(not left or before[name][i] for name, mask in after.items() for i, left in enumerate(mask))


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (
            ADALORA[:7],
            2,
            "adalora needs --target_rank, --reg_orth_coef, --init_warmup, --final_warmup, --mask_interval.",
        ),
        ([*ADALORA, "--target_rank", "3"], 2, "--target_rank 3: must be below --lora_r 3"),
        ([*ADALORA, "--beta1", "1"], 2, "--beta1 1"),
        ([*ADALORA, "--init_warmup", "9"], 1, "--init_warmup and --final_warmup are 12 steps together"),
        (["--apply_lora", "--lora_r", "3", "--lora_alpha", "16", "--target_rank", "1"], 2, "has no effect with LoRA"),
        (["--target_rank", "1"], 2, "--target_rank has no effect without --apply_lora"),
    ],
)
def test_a_setting_that_is_missing_or_without_effect_is_named(more, code, words, models, call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", "--model_name_or_path", models["roberta"], *STEPS, *more))
    assert outcome.code == code and words in outcome.err and outcome.err.count("\n") < 3, outcome


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_r": None}, "init_r"),
        ({"rank_pattern": {"x.lora_E": [1, 0]}}, "rank_pattern"),
        ({"rank_pattern": {"x.lora_E": [True]}}, "lora_A is [0, 32]"),
        ({"init_r": 4}, "init_r 4 and a rank_pattern that keeps"),
        ({"init_r": 10**12}, "init_r 1000000000000 is too high"),
        ({"beta1": 1.0}, "beta1"),
    ],
    ids=str,
)
def test_a_folder_whose_config_and_tensors_differ_is_refused(change, words, trained, tmp_path, capsys):
    shutil.copytree(trained["roberta"], tmp_path / "o")
    (tmp_path / "o" / "run_metadata.json").unlink()
    path = tmp_path / "o" / "adapter_config.json"
    path.write_text(json.dumps(read(path) | change))
    assert adapters(["inspect", str(tmp_path / "o")]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") < 4, message
