"""What was never trained is not scored as if it had been, and no other model's results are taken for a run's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flags_of
from peft import LoraConfig, PeftModel, get_peft_model
from runs import contents
from safetensors.torch import load_file, save_file
from test_run_glue import read, rte, scores, succeeded
from transformers import RobertaForSequenceClassification, RobertaModel

from lora_nlu.adapters.reading import read_adapter
from lora_nlu.errors import UserError
from lora_nlu.methods.table import METHODS
from lora_nlu.training.output_folder import locked

SHORT = ["--max_seq_length", "64", "--learning_rate", "1e-2"]
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def trained(call, glue, tmp_path_factory) -> Any:
    """By method: the output folder of a short run, evaluated and predicted."""
    done: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in done:
            done[method] = tmp_path_factory.mktemp("trained") / method
            flags = [*flags_of(METHODS[method]), *SHORT, "--max_steps", "3", "--do_train", "--do_eval", "--do_predict"]
            succeeded(call(*on_rte(glue, done[method], *flags)))
        return done[method]

    return make


def on_rte(glue: Path, output: Path, *flags: object) -> list[object]:
    return ["--task_name", "rte", "--glue_dir", glue, "--output_dir", output, *flags]


@pytest.mark.parametrize("work", ["--do_eval", "--do_predict"])
@pytest.mark.parametrize("method", [row.name for row in METHODS.values() if row.freezes])
def test_a_method_without_what_it_trained_is_not_evaluated(method, work, trained, call, glue, tmp_path):
    flags = ["--model_name_or_path", trained("full"), *flags_of(METHODS[method]), *SHORT]
    outcome = call(*on_rte(glue, tmp_path / "o", *flags, work))
    path_flag = f"--{METHODS[method].path_flag}"
    assert outcome.code == 2 and f"Give it: {path_flag} FOLDER" in outcome.err, outcome.err
    assert f"leave --{METHODS[method].switch} out" in outcome.err
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    shutil.copy(trained(method) / "adapter_config.json", tmp_path / "o")
    shutil.copy(trained("full") / "run.json", tmp_path / "o")
    record = {k: v for k, v in read(tmp_path / "o" / "run.json").items() if k not in ("trained", "hyperparameters")}
    (tmp_path / "o" / "run.json").write_text(json.dumps(record))
    assert f"Give it: {path_flag} {tmp_path / 'o'}." in call(*on_rte(glue, tmp_path / "o", *flags, work)).err


def test_a_fine_tuned_model_without_a_methods_flags_is_evaluated(trained, call, glue, tmp_path):
    for flags in ([], ["--apply_lora", "--lora_r", "0"]):
        evaluation = on_rte(glue, tmp_path / "o", "--model_name_or_path", trained("full"), *SHORT, "--do_eval", *flags)
        succeeded(call(*evaluation))
        assert scores(tmp_path / "o" / "eval_results.json") == scores(trained("full") / "eval_results.json")


@pytest.mark.parametrize("work", ["--do_eval", "--do_predict"])
@EVERY_METHOD
def test_another_models_results_do_not_take_the_place_of_a_trained_runs(method, work, trained, call, glue, tmp_path):
    folder, other = (
        shutil.copytree(trained(method), tmp_path / "run"),
        trained("bitfit" if method != "bitfit" else "head"),
    )
    path_flag = f"--{METHODS[method].path_flag}"
    before = contents(folder)
    for other_model in (["--model_name_or_path", trained("full")], ["--adapter_path", other]):
        outcome = call(*on_rte(glue, folder, *other_model, *SHORT, work))
        assert outcome.code == 1 and str(other_model[1]) in outcome.err and f"{path_flag} {folder}" in outcome.err, (
            outcome.err
        )
    assert contents(folder) == before


@EVERY_METHOD
def test_what_a_run_trained_is_scored_into_its_folder_again(method, trained, call, glue, tmp_path):
    folder = shutil.copytree(trained(method), tmp_path / "run")
    path_flag = f"--{METHODS[method].path_flag}"
    record = (folder / "run.json").read_bytes()
    (folder / "eval_results.json").unlink()
    succeeded(call(*on_rte(glue, folder, path_flag, tmp_path / "." / "run", *SHORT, "--do_eval")))
    assert scores(folder / "eval_results.json") == scores(trained(method) / "eval_results.json")
    assert (folder / "run.json").read_bytes() == record
    other = ["--validation_file", glue / "RTE" / "dev.tsv", "--do_eval", *SHORT]
    outcome = call("--output_dir", folder, path_flag, folder, *other)
    assert outcome.code == 1 and "on custom would be taken for that run's" in outcome.err


def test_an_unfinished_runs_folder_takes_no_other_models_results(trained, call, glue, tmp_path):
    folder = shutil.copytree(trained("lora"), tmp_path / "run")
    (folder / "run.json").write_text(json.dumps({k: v for k, v in read(folder / "run.json").items() if k != "trained"}))
    outcome = call(*on_rte(glue, folder, "--model_name_or_path", trained("full"), *SHORT, "--do_eval"))
    assert outcome.code == 1 and "would be taken for that run's" in outcome.err


def test_a_folder_of_evaluations_may_be_used_again_and_records_the_last(trained, call, glue, tmp_path):
    for other_model in (["--model_name_or_path", trained("full")], ["--lora_path", trained("lora")]):
        succeeded(call(*on_rte(glue, tmp_path / "o", *other_model, *SHORT, "--do_eval")))
    assert read(tmp_path / "o" / "run.json")["started_from"] == str(trained("lora"))


def test_training_does_not_start_among_results_that_another_model_gave(trained, call, glue, tmp_path):
    evaluate = on_rte(glue, tmp_path / "o", "--model_name_or_path", trained("full"), *SHORT, "--do_eval")
    succeeded(call(*evaluate))
    train = rte(glue, tmp_path / "o", *SHORT, "--max_steps", "1", "--do_train")
    outcome = call(*train)
    assert outcome.code == 1 and "eval_results.json" in outcome.err and "--overwrite_output_dir" in outcome.err
    succeeded(call(*train, "--overwrite_output_dir"))
    assert not (tmp_path / "o" / "eval_results.json").exists()


def flags_again(method: str, folder: Path) -> list[object]:
    """Those that evaluate what a run trained."""
    name = METHODS[method].path_flag if METHODS[method].freezes else "model_name_or_path"
    return [f"--{name}", folder, *SHORT]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_trained_runs_results_are_replaced_by_those_of_fewer_examples_or_other_weights_in_no_way(
    method, trained, call, glue, tmp_path
):
    folder = shutil.copytree(trained(method), tmp_path / "run")
    before, again = contents(folder), flags_again(method, folder)
    train = [*flags_of(METHODS[method]), *SHORT, "--max_steps", "3", "--do_train"]
    for flags in (again, train):
        for name, count, few in (
            ("eval_results.json", 24, "--do_eval"),
            ("predict_results_rte.tsv", 10, "--do_predict"),
        ):
            limit = few.replace("do", "max") + "_samples"
            outcome = call(*on_rte(glue, folder, *flags, few, limit, 8, "--sample_seed", 0))
            assert outcome.code == 1 and f"{name} is of {count} examples; results of 8 would take" in outcome.err, (
                outcome
            )
            assert "Choose another --output_dir" in outcome.err
    assert contents(folder) == before
    weights = folder / ("adapter_model.safetensors" if METHODS[method].freezes else "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    if METHODS[method].freezes:  # all files of another adapter
        metadata = read(folder / "run_metadata.json")
        del metadata["weights_fingerprint"]
        (folder / "run_metadata.json").write_text(json.dumps(metadata))
    before = contents(folder)
    for work in ("--do_eval", "--do_predict"):
        outcome = call(*on_rte(glue, folder, *again, work))
        assert outcome.code == 1 and "the weights are not those that its run trained" in outcome.err, outcome
    assert contents(folder) == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_results_record_the_weights_the_examples_and_their_number(method, trained, call, glue, tmp_path):
    run = read(trained(method) / "run.json")
    flags = [*flags_again(method, trained(method)), "--do_eval", "--do_predict", "--max_eval_samples", 8]
    succeeded(call(*on_rte(glue, tmp_path / "o", *flags, "--sample_seed", 0)))
    for folder, samples in ((trained(method), 24), (tmp_path / "o", 8)):
        of = read(folder / "eval_results.json")
        assert (
            of["weights_fingerprint"] == run["weights_fingerprint"] == read(folder / "run.json")["weights_fingerprint"]
        )
        assert (of["eval_samples"], of["eval_set_samples"], len(of["eval_data"])) == (samples, 24, 16)
        (entry,) = read(folder / "predict_results.json").items()
        assert entry[0] == "predict_results_rte.tsv" and entry[1].pop("data") != of["eval_data"]
        counted = {"samples": 10, "set_samples": 10, "precision": "fp32"}
        assert entry[1] == {"weights_fingerprint": run["weights_fingerprint"], **counted}
        assert "predict_results.json" in read_list(folder)
    assert read(trained(method) / "eval_results.json")["eval_data"] != of["eval_data"]
    assert (
        trained("bitfit") and read(trained("bitfit") / "run.json")["weights_fingerprint"] != run["weights_fingerprint"]
    )


def read_list(folder: Path) -> list[str]:
    return json.loads((folder / "files.json").read_text())


def test_a_folder_is_locked_until_a_runs_last_result_is_written(trained, call, run_glue, glue, tmp_path, monkeypatch):
    folder = shutil.copytree(trained("lora"), tmp_path / "run")
    train = [*flags_of(METHODS["lora"]), *SHORT, "--max_steps", "3", "--do_train", "--do_eval", "--do_predict"]
    evaluate = [*flags_again("lora", folder), "--do_eval", "--do_predict"]
    before = contents(folder)
    with locked(folder):
        for flags in (train, [*train, "--overwrite_output_dir"], evaluate):
            outcome = call(*on_rte(glue, folder, *flags))
            assert outcome.code == 1 and "another run" in outcome.err, outcome
    assert contents(folder) == before
    inside = []

    def checked(name: str) -> Any:
        step = getattr(run_glue, name)

        def run(*args: Any) -> Any:
            result = step(*args)
            with pytest.raises(UserError, match="another run"), locked(folder):
                pass
            inside.append(name)
            return result

        return run

    for name in ("evaluate", "describe_run", "predict"):
        monkeypatch.setattr(run_glue, name, checked(name))
    for flags in (train, evaluate):
        succeeded(call(*on_rte(glue, folder, *flags)))
    assert inside == ["evaluate", "describe_run", "predict", "evaluate", "predict"]


# ------------------------------------------------------------------------------------- a file given by the wrong flag


def peft_on(base: Path, folder: Path, **settings: Any) -> PeftModel:
    """A PEFT adapter of a checkpoint, saved."""
    kind = RobertaForSequenceClassification if settings.get("task_type") == "SEQ_CLS" else RobertaModel
    torch.manual_seed(0)
    model = get_peft_model(
        kind.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], **settings)
    )
    model.save_pretrained(folder)
    return model


def test_a_file_given_by_the_wrong_flag_is_refused_with_the_right_flag(trained, call, glue, tiny_model, tmp_path):
    full, lora = trained("full"), trained("lora")
    torch.save(peft_on(tiny_model, tmp_path / "peft", task_type="SEQ_CLS").state_dict(), tmp_path / "peft.bin")
    torch.save(RobertaForSequenceClassification.from_pretrained(full).state_dict(), tmp_path / "complete.bin")
    headless = {n: t for n, t in read_adapter(str(lora)).state.items() if ".lora_" in n}
    torch.save(headless, tmp_path / "headless.bin")
    peft_on(tiny_model, tmp_path / "encoder", task_type="FEATURE_EXTRACTION")
    base, path_flag = "--model_name_or_path", "--lora_path"
    alpha = ["--lora_alpha", "8"]
    for flags, expected_message in (
        ([base, lora], f"is an adapter.\nGive it as --lora_path, and its base ({tiny_model}) as --model_name_or_path"),
        ([base, trained("head")], "Give it as --adapter_path"),
        ([path_flag, full], "is a complete model, no adapter. Give it as --model_name_or_path"),
        ([path_flag, full / "model.safetensors"], "is a complete model, without LoRA. Give it as --model_name_or_path"),
        ([path_flag, tmp_path / "complete.bin"], "is a complete model, without LoRA. Give it as --model_name_or_path"),
        ([path_flag, lora / "adapter_model.safetensors"], "contains PEFT's keys"),
        ([path_flag, tmp_path / "peft.bin"], "Give the folder with its adapter_config.json"),
        (
            [path_flag, tmp_path / "headless.bin", *alpha],
            "contains LoRA and no classifier: train one from it (--do_train)",
        ),
        ([path_flag, tmp_path / "encoder"], "its keys lack 'roberta.'"),
    ):
        outcome = call(*on_rte(glue, tmp_path / "o", *flags, *SHORT, "--do_eval"))
        assert outcome.code == 1 and expected_message in outcome.err, (flags, outcome.err)
    both = shutil.copytree(full, tmp_path / "both")  # transformers itself loads the adapter, and its base for the model
    for path in (tmp_path / "peft").glob("adapter_*"):
        shutil.copy(path, both)
    outcome = call(*on_rte(glue, tmp_path / "o", "--model_name_or_path", both, *SHORT, "--do_eval"))
    assert outcome.code == 1 and "contains a model and an adapter" in outcome.err, outcome.err
    train = on_rte(glue, tmp_path / "o", *SHORT, "--do_train", "--max_steps", "1")
    assert "its keys lack 'roberta.'" in call(*train, path_flag, tmp_path / "encoder").err
    succeeded(call(*train, path_flag, tmp_path / "headless.bin", *alpha))


def test_another_file_of_ones_own_may_have_fewer_examples(call, glue, tmp_path):
    """Its results are not compared with those of the file before it; the run's command works again afterwards."""
    header, *rows = (glue / "RTE" / "dev.tsv").read_text().splitlines()
    (tmp_path / "few.tsv").write_text("\n".join([header, *rows[:9]]) + "\n")
    train = ["--train_file", glue / "RTE" / "train.tsv", *flags_of(METHODS["lora"]), *SHORT, "--max_steps", "1"]
    train += ["--do_train", "--do_eval", "--do_predict", "--output_dir", tmp_path / "o"]
    for file in (glue / "RTE" / "dev.tsv", tmp_path / "few.tsv", glue / "RTE" / "dev.tsv"):
        succeeded(call(*train, "--validation_file", file, "--test_file", file))
        samples = len(file.read_text().splitlines()) - 1
        assert read(tmp_path / "o" / "eval_results.json")["eval_samples"] == samples
        assert read(tmp_path / "o" / "predict_results.json")["predict_results_custom.tsv"]["samples"] == samples
    files = ["--validation_file", glue / "RTE" / "dev.tsv", "--test_file", glue / "RTE" / "dev.tsv"]
    outcome = call(*train, *files, "--max_eval_samples", 9)
    assert outcome.code == 1 and "is of 24 examples; results of 9 would take its place" in outcome.err


@pytest.mark.parametrize("file", ["dev_matched.tsv", "dev_mismatched.tsv"])
def test_a_glue_folder_with_fewer_rows_does_not_replace_a_runs_results(file, call, glue, tmp_path):
    few = shutil.copytree(glue, tmp_path / "glue")
    lines = (few / "MNLI" / file).read_text().splitlines()
    (few / "MNLI" / file).write_text("\n".join(lines[:9]) + "\n")
    train = ["--task_name", "mnli", *flags_of(METHODS["lora"]), *SHORT, "--max_steps", "1", "--do_train", "--do_eval"]
    train += ["--output_dir", tmp_path / "o", "--glue_dir"]
    succeeded(call(*train, glue))
    outcome = call(*train, few)
    assert outcome.code == 1 and outcome.err.endswith("would take its place.\nChoose another --output_dir."), outcome


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_trained_run_without_its_weights_says_so_and_its_folder_is_not_to_be_removed(
    method, damage, trained, call, glue, tmp_path
):
    folder = shutil.copytree(trained(method), tmp_path / "run")
    weights = folder / ("adapter_model.safetensors" if METHODS[method].freezes else "model.safetensors")
    weights.unlink() if damage == "missing" else weights.write_bytes(weights.read_bytes()[:-9])
    flags = [*flags_of(METHODS[method]), *SHORT, "--max_steps", "3", "--do_train", "--do_eval"]
    outcome = call(*on_rte(glue, folder, *flags))
    assert outcome.code == 1 and str(folder if damage == "missing" else weights) in outcome.err
    assert "optimizer" not in outcome.err and "Remove the folder" not in outcome.err, outcome.err
    assert "what was trained isn't there" in outcome.err or "damaged" in outcome.err
