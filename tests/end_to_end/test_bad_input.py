"""What a person can get wrong: each is answered in a line or three, with a remedy, and nothing on disk changes."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import LORA, contents, program, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import BertConfig, RobertaConfig

from lora_nlu.files import write_json
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

SHORT = ["--max_steps", "4", "--save_steps", "4", "--max_seq_length", "64"]


@pytest.fixture(scope="module")
def finished(call, glue, tmp_path_factory) -> Path:
    """The output folder of a finished RTE run of 4 steps, with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "output"
    flags = ["--task_name", "rte", "--glue_dir", glue, "--output_dir", folder, *LORA, *SHORT, "--do_train", "--do_eval"]
    outcome = call(*flags)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def output(finished, tmp_path) -> Path:
    """A copy of it, for one test to endanger."""
    return Path(shutil.copytree(finished, tmp_path / "output"))


@pytest.fixture
def refused(call, output) -> Callable[..., str]:
    """Run with flags that are wrong; returns the message once code, length and the output folder are right."""

    def run(code: int, *flags: object, folder: Path | None = None) -> str:
        folder = folder or output
        before = contents(folder)
        outcome = call("--output_dir", folder, *flags)
        assert outcome.code == code, outcome
        assert 0 < outcome.err.count("\n") + 1 <= 3, outcome.err
        assert contents(folder) == before
        return outcome.err

    return run


@pytest.fixture
def refused_by_process(start, fork, output) -> Callable[..., str]:
    """The same, by a process of its own: a fork, or with an `env`, Python as a user starts it."""

    def run(code: int, *flags: object, env: dict[str, str] | None = None) -> str:
        before = contents(output)
        command = ("--output_dir", output, *flags)
        outcome = fork(*command) if env is None else start(*command, env=env)
        message = outcome.err[outcome.err.find("run_glue.py: error:") :].strip()
        assert outcome.code == code and "Traceback" not in outcome.err, outcome.err
        assert outcome.err.count("run_glue.py: error:") == 1
        assert message.startswith("run_glue.py: error: ") and message.count("\n") < 3, outcome.err
        assert contents(output) == before
        return message

    return run


def rte(glue: Path, *flags: object) -> list[object]:
    return ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", "64", *flags]


# -------------------------------------------------------------------------------------------- the command line: code 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--task_name", "rtf", "--do_eval"], ["rtf", "rte", "mnli"]),
        (["--task_name", "rte", "--do_eval", "--lora_rank", "8"], ["--lora_rank", "Did you mean", "--lora_r"]),
        (["--task_name", "rte", "--do_eval", "--apply_lora", "--lora_r", "-1", "--lora_alpha", "8"], ["--lora_r -1"]),
        (["--task_name", "rte", "--do_eval", "--apply_lora"], ["--lora_r", "--lora_alpha"]),
        (["--task_name", "rte", "--do_eval", "--apply_lora", "--lora_r", "8"], ["--lora_alpha"]),
        (["--task_name", "rte", "--do_eval", "--lora_r", "eight"], ["--lora_r", "eight"]),
        (["--task_name", "rte"], ["nothing to do", "--do_train"]),
        (["--do_eval"], ["--task_name", "--train_file"]),
        (["--task_name", "rte", "--train_file", "x.csv", "--do_train"], ["--task_name", "--train_file"]),
        (["--train_file", "x.csv", "--do_train", "--do_eval"], ["--do_eval needs --validation_file"]),
        (["--task_name", "rte", "--do_eval", "--max_seq_length", "2"], ["--max_seq_length 2"]),
        (["--task_name", "rte", "--do_train", "--cls_dropout", "1.5"], ["--cls_dropout 1.5"]),
        (["--task_name", "rte", "--do_train", "--bf16", "--fp16"], ["bf16", "fp16"]),
        (["--task_name", "rte", "--do_train", "--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--task_name", "rte", "--do_train", "--eval_strategy", "sometimes"], ["sometimes", "epoch"]),
        (["--task_name", "rte", "--do_train", "--load_best_model_at_end"], ["load_best_model_at_end"]),
        (["--task_name", "rte", "--do_train", "--optim", "sgdd"], ["sgdd"]),
        (["--task_name", "rte", "--do_train", "extra"], ["extra"]),
        (["--task_name", "rte", "--do_train", "--max_train_samples", "0"], ["--max_train_samples 0"]),
        (["--task_name", "rte", "--do_eval", "--max_eval_samples", "-3"], ["--max_eval_samples -3"]),
        (
            ["--task_name", "rte", "--do_train", "--per_device_train_batch_size", "0"],
            ["--per_device_train_batch_size 0"],
        ),
        (["--task_name", "rte", "--do_train", "--learning_rate", "-1"], ["--learning_rate -1"]),
        (["--task_name", "rte", "--do_train", "--seed", "-1"], ["--seed -1"]),
        (["--task_name", "rte", "--do_train", "--dataloader_num_workers", "-2"], ["--dataloader_num_workers -2"]),
        (["--task_name", "rte", "--do_train", *LORA, "--lora_alpha", "nan"], ["--lora_alpha nan"]),
        (["--task_name", "rte", "--do_train", *LORA, "--lora_alpha", "0"], ["--lora_alpha 0"]),
        (["--task_name", "rte", "--do_train", "--report_to", "paper"], ["--report_to paper", "none"]),
        (["--task_name", "rte", "--do_train", "--torch_compile_backend", "gcc"], ["backend gcc", "inductor"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_a_wrong_command_line_ends_with_code_2_and_the_flag_in_question(flags, expected, refused):
    message = refused(2, *flags)
    assert [part for part in expected if part not in message] == [], message


def test_a_metric_for_the_best_model_that_isnt_evaluated_is_refused_with_those_that_are(refused, glue):
    best = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
    message = refused(2, *rte(glue, "--do_train", *LORA, *best, "--metric_for_best_model", "f1"))
    assert "--metric_for_best_model f1" in message and "loss, accuracy" in message


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_trains_without_a_gpu_too_and_saves_finite_fp32(precision, call, glue, tmp_path):
    outcome = call(*rte(glue, "--do_train", *LORA, "--max_steps", "2", precision, "--output_dir", tmp_path / "o"))
    assert outcome.code == 0, outcome.err
    tensors = load_file(tmp_path / "o" / "adapter_model.safetensors").values()
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)


def test_bf16_on_a_gpu_that_cant_compute_in_it_is_refused_with_the_flag_to_drop(refused, glue, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    message = refused(2, *rte(glue, "--do_train", *LORA, "--bf16"))
    assert "--bf16: Tesla T4" in message and "Remove it" in message


def test_a_warmup_ratio_that_is_no_fraction_is_refused(refused):
    assert "--warmup_ratio 6" in (message := refused(2, "--task_name", "rte", "--do_train", "--warmup_ratio", "6")), (
        message
    )


def test_an_unknown_task_or_flag_ends_a_process_with_code_2_and_no_traceback(refused_by_process):
    assert "--task_name" in refused_by_process(2, "--task_name", "rtf", "--do_eval")
    message = refused_by_process(2, "--task_name", "rte", "--do_evaluate", "--apply_lora")
    assert "--do_eval" in message.split("Did you mean")[1]


# ------------------------------------------------------------------------------------------------------------- data


def test_without_data_and_hub_the_answer_comes_in_seconds_and_names_glue_dir(refused_by_process):
    nobody = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    began = time.monotonic()
    message = refused_by_process(1, "--task_name", "rte", "--do_eval", *LORA, env=nobody)
    assert "--glue_dir" in message and "RTE" in message
    assert time.monotonic() - began < 90  # a start takes 30 on a busy machine; transformers' own retries minutes


def test_a_glue_folder_that_is_missing_or_lacks_the_task_is_reported(refused, glue, tmp_path):
    shutil.copytree(glue / "CoLA", tmp_path / "glue" / "CoLA")
    message = refused(1, *rte(tmp_path / "glue", "--do_train", *LORA))
    assert str(tmp_path / "glue" / "RTE" / "train.tsv") in message and "--glue_dir" in message
    assert str(tmp_path / "none") in refused(1, *rte(tmp_path / "none", "--do_eval", *LORA))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda lines: "\n".join(lines)[:-25], ":25"),
        (lambda lines: "\n".join([*lines[:10], lines[10][:12], *lines[11:]]) + "\n", ":11"),
        (lambda lines: "\n".join(["index\tpremise\thypothesis\tlabel", *lines[1:]]) + "\n", ":1: the header lacks"),
        (lambda lines: "\n".join([*lines[:5], lines[5].rsplit("\t", 1)[0] + "\tmaybe", *lines[6:]]) + "\n", ":6"),
        (lambda lines: "", "empty"),
        (lambda lines: lines[0] + "\n", "only a header"),
    ],
    ids=["cut in the last line", "cut mid-line", "wrong header", "label outside the set", "empty", "header only"],
)
def test_a_spoilt_glue_file_is_named_with_its_line(spoil, expected, refused, glue, tmp_path):
    shutil.copytree(glue / "RTE", tmp_path / "glue" / "RTE")
    file = tmp_path / "glue" / "RTE" / "dev.tsv"
    file.write_text(spoil(file.read_text().splitlines()))
    message = refused(1, *rte(tmp_path / "glue", "--do_train", "--do_eval", *LORA))
    assert f"{file}{expected}" in message or (str(file) in message and expected in message), message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "empty"),
        ("text,label\n", "only a header"),
        ("a,b,c,label\nx,y,z,1\n", "which hold the text"),
        ("text,class\nx,1\ny,0\n", "label"),
        ("text,label\nx,1\ny,\nz,0\n", ":3"),
        ("text,label\nx,1\ny,0\nz,nan\n", ":4"),
        ("text,label\nx,1\ny,0,3\n", ":3"),
        ('text,label\nx,1\n"y,0\n', "broken or cut"),
        ("text,label\nx,1\ny,1\n", "nothing to learn"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_csv_that_cant_be_learnt_from_is_named_with_its_line(content, expected, refused, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(content)
    message = refused(1, "--train_file", file, "--do_train", *LORA)
    assert str(file) in message and expected in message, message


def test_an_evaluation_label_that_training_never_saw_is_named_with_its_line(refused, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nx,good\ny,bad\n")
    (tmp_path / "dev.csv").write_text("text,label\nx,good\ny,ugly\n")
    files = ["--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "dev.csv"]
    message = refused(1, *files, "--do_train", "--do_eval", *LORA)
    assert f"{tmp_path / 'dev.csv'}:3" in message and "'ugly'" in message and "bad, good" in message


def test_a_spoilt_file_ends_a_process_with_code_1_and_no_traceback(refused_by_process, glue, tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "dev.tsv").write_text((glue / "RTE" / "dev.tsv").read_text()[:-10])
    assert f"{tmp_path / 'RTE' / 'dev.tsv'}:25" in refused_by_process(1, *rte(tmp_path, "--do_eval", *LORA))


# -------------------------------------------------------------------------------------------------------- model folders


def test_a_model_that_is_no_folder_and_no_hub_id_is_refused_in_seconds(refused, glue, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    message = refused(1, *rte(glue, "--model_name_or_path", "roberta-bose", "--do_train", *LORA))
    assert "--model_name_or_path roberta-bose: no such folder; the Hub (http://127.0.0.1:9) is not reached" in message
    assert "hf download roberta-bose --local-dir FOLDER" in message
    assert time.monotonic() - began < 15  # the retries of the libraries take 20 or more


def test_a_model_path_that_is_nothing_or_an_empty_folder_is_refused(refused, glue, tmp_path):
    for path in (tmp_path / "nowhere" / "roberta", tmp_path):
        message = refused(1, *rte(glue, "--model_name_or_path", path, "--do_train", *LORA))
        assert f"--model_name_or_path {path}" in message


def test_a_bert_checkpoint_is_refused_with_the_supported_kinds(refused, glue, tmp_path):
    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "bert")
    message = refused(1, *rte(glue, "--model_name_or_path", tmp_path / "bert", "--do_train", *LORA))
    assert "'bert'" in message and "roberta" in message


def test_a_quantised_base_is_refused_by_the_name_of_its_quantisation(refused, glue, tiny_model, tmp_path):
    quantised = shutil.copytree(tiny_model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    setting = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": setting}))
    message = refused(1, *rte(glue, "--model_name_or_path", quantised, "--do_train", *LORA))
    assert f"--model_name_or_path {quantised}: quantisation (bitsandbytes)" in message


def test_a_truncated_or_missing_weights_file_is_refused(refused, glue, tiny_model, tmp_path):
    broken = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    flags = rte(glue, "--model_name_or_path", broken, "--do_train", *LORA)
    content = (broken / "model.safetensors").read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        (broken / "model.safetensors").write_bytes(content[:size])
        assert f"--model_name_or_path {broken}" in refused(1, *flags)
    (broken / "model.safetensors").unlink()
    assert f"--model_name_or_path {broken}" in refused(1, *flags)


TEXTS = {
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3550413\n",
        "git lfs pull",
    ),
    "a web page": (b"<!doctype html>\n<html>", "Download the file itself"),
    "JSON": (b'{"error":"Repository not found"}', "Repository not found"),
    "it is empty": (b"", "Download it again"),
}


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "shards"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_the_place_of_base_weights_is_refused_by_the_files_name_with_the_remedy(
    kind, form, refused, glue, tiny_model, tmp_path
):
    content, remedy = TEXTS[kind]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if form == "shards":
        RobertaForSequenceClassification.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
        form = sorted(path.name for path in folder.glob("model-*.safetensors"))[-1]
    elif form != "model.safetensors":
        (folder / "model.safetensors").unlink()
    (folder / form).write_bytes(content)
    message = refused(1, *rte(glue, "--model_name_or_path", folder, "--do_train", *LORA))
    assert form in message and kind in message and remedy in message, message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_base_weights_that_are_not_finite_are_refused(value, refused, glue, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["roberta.encoder.layer.1.output.dense.weight"][1, 2] = float(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = refused(1, *rte(glue, "--model_name_or_path", folder, "--do_train", *LORA))
    assert "1 of its weights are not finite" in message and "layer.1.output.dense.weight first" in message


def test_weights_of_another_shape_than_the_config_says_are_refused(refused, glue, tiny_model, tmp_path):
    broken = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((broken / "config.json").read_text())
    for change in ({"num_hidden_layers": 3}, {"intermediate_size": 64}):
        (broken / "config.json").write_text(json.dumps(config | change))
        message = refused(1, *rte(glue, "--model_name_or_path", broken, "--do_train", *LORA))
        assert "missing or not of config.json's shape" in message
    (broken / "config.json").write_text(json.dumps(config)[:50])
    assert str(broken) in refused(1, *rte(glue, "--model_name_or_path", broken, "--do_train", *LORA))


def test_a_folder_without_a_tokenizer_is_refused(refused, glue, tiny_model, tmp_path):
    broken = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for file in broken.glob("tokenizer*"):
        file.unlink()
    assert "--tokenizer_name" in refused(1, *rte(glue, "--model_name_or_path", broken, "--do_train", *LORA))


def test_evaluating_a_model_whose_head_is_untrained_is_refused(refused, glue):
    assert "no trained head" in refused(1, *rte(glue, "--do_eval", *LORA))


def test_a_max_seq_length_above_the_models_limit_is_lowered_to_it_and_a_line_says_so(call, finished, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, "--do_eval", *LORA, "--lora_path", finished]
    outcome = call(*flags, "--max_seq_length", "512", "--output_dir", tmp_path / "o")
    assert outcome.code == 0
    assert "--max_seq_length 512 is more than the model's 64 positions; using 64." in outcome.out
    results = [json.loads((f / "eval_results.json").read_text())["eval_loss"] for f in (tmp_path / "o", finished)]
    assert results[0] == results[1]


# --------------------------------------------------------------------------------------------------------- --lora_path


def flat(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter folder's tensors in the published layout."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name: name.removeprefix("base_model.model.") for name in tensors}
    return {(n.removesuffix(".weight") if "lora_" in n else n): tensors[name] for name, n in names.items()}


class Payload:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_file_that_isnt_this_models_is_refused_with_the_reason(training, refused, finished, glue, tmp_path):
    state = flat(finished)
    layer = "roberta.encoder.layer.0.attention.self.query.lora_"
    files = {
        "list.bin": ([torch.zeros(2)], "no state dict"),
        "deberta.bin": ({k.replace("roberta.", "deberta."): t for k, t in state.items()}, "deberta-v2 model"),
        "rank.bin": (
            {k: t[:2] if k.endswith("A") else t[:, :2] if k.endswith("B") else t for k, t in state.items()},
            "--lora_r 2",
        ),
        "hidden.bin": (
            {k: torch.cat([t, t], -1) if k.endswith("A") else t for k, t in state.items()},
            f"{layer}A is [4, 64]",
        ),
        "layers.bin": (
            {k: t for k, t in state.items() if "layer.1." not in k},
            "1 in the file, 2 in the roberta model",
        ),
    }
    for name, (content, expected) in files.items():
        torch.save(content, tmp_path / name)
        do = ["--do_train", "--overwrite_output_dir"] if training else ["--do_eval"]
        message = refused(1, *rte(glue, *do, *LORA, "--lora_path", tmp_path / name))
        assert str(tmp_path / name) in message and expected in message, message
    assert "no such file" in refused(1, *rte(glue, *do, *LORA, "--lora_path", tmp_path / "none.bin"))


def test_an_adapter_of_another_rank_alpha_or_task_is_refused(refused, finished, glue):
    flags = rte(glue, "--do_eval", "--lora_path", finished, "--apply_lora")
    assert "--lora_r 4" in refused(1, *flags, "--lora_r", "8", "--lora_alpha", "8")
    assert "--lora_alpha 8" in refused(1, *flags, "--lora_r", "4", "--lora_alpha", "16")
    message = refused(1, *flags, *LORA, "--task_name", "mnli")
    assert "entailment, not_entailment" in message and "contradiction" in message


def test_a_pickle_that_would_run_code_ends_a_process_with_code_1_and_never_runs(
    refused, refused_by_process, glue, tmp_path
):
    marker = tmp_path / "marker"
    torch.save({"a.lora_A": Payload(f"touch {marker}")}, tmp_path / "bad.bin")
    assert "refused" in refused_by_process(1, *rte(glue, "--do_eval", *LORA, "--lora_path", tmp_path / "bad.bin"))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Payload(f"touch {marker}")))
    assert "refused" in refused(1, *rte(glue, "--do_eval", *LORA, "--lora_path", tmp_path / "plain.pkl"))
    assert not marker.exists()


def test_a_larger_models_adapter_is_refused_and_says_which_key_differs(call, refused, glue, vocabulary, tmp_path):
    wide = write_checkpoint(tmp_path / "wide", vocabulary, hidden_size=64)
    flags = rte(glue, "--model_name_or_path", wide, *LORA, "--max_steps", "1", "--do_train")
    assert call(*flags, "--output_dir", tmp_path / "adapter").code == 0
    message = refused(1, *rte(glue, "--do_eval", *LORA, "--lora_path", tmp_path / "adapter"))
    assert "64]" in message and "32]" in message and "another base model" in message


# ------------------------------------------------------------------------------------------------------- output folders


def test_a_folder_that_contains_something_else_is_refused_and_with_overwrite_its_files_are_kept(
    call, refused, glue, tmp_path
):
    folder = tmp_path / "thesis"
    (folder / "chapters").mkdir(parents=True)
    (folder / "chapters" / "one.txt").write_text("years of work")
    (folder / "model.txt").write_text("more")
    before = contents(folder)
    flags = rte(glue, "--do_train", *LORA, "--max_steps", "1")
    assert "--overwrite_output_dir" in refused(1, *flags, folder=folder)
    outcome = call(*flags, "--output_dir", folder, "--overwrite_output_dir")
    assert outcome.code == 0, outcome.err
    after = contents(folder)
    assert {name: after[name] for name in before} == before and "adapter_model.safetensors" in after


def test_an_output_folder_that_cant_be_written_is_refused_before_anything_is_loaded(
    call, refused_by_process, glue, tmp_path
):
    (tmp_path / "file").write_text("a file")
    for folder in ("/proc/sys/output", tmp_path / "file" / "output", tmp_path / "file"):
        outcome = call(*rte(glue, "--do_train", *LORA, "--output_dir", folder))
        assert outcome.code == 1 and f"--output_dir {folder}: can't be written" in outcome.err
    message = refused_by_process(1, *rte(glue, "--do_train", *LORA, "--output_dir", "/proc/sys/output"))
    assert "--output_dir /proc/sys/output: can't be written" in message


@pytest.mark.parametrize(
    "flags",
    [["--lora_rank", "8"], ["--max_steps", "x"], ["--glue_dir", "nowhere"], ["--lora_path", "none.bin"],
     ["--model_name_or_path", "someone/no-model"], ["--tokenizer_name", "nowhere"]],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_a_run_that_is_refused_leaves_no_output_folder(flags, call, glue, tmp_path):
    outcome = call(*rte(glue, "--do_train", *LORA, "--output_dir", tmp_path / "a" / "o", *flags))
    assert outcome.code and not [*tmp_path.iterdir()]


def test_a_full_disk_ends_with_code_1_and_the_earlier_checkpoint_can_still_be_resumed(
    fork, call, output, glue, tmp_path
):
    """The disk is full from the first file above 12 kB on: the optimizer's; the adapter has 10 kB."""
    full_disk = program(tmp_path, "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))")
    assert (output / "adapter_model.safetensors").stat().st_size < 12_000
    assert (output / "checkpoint-4" / "optimizer.pt").stat().st_size > 12_000
    flags = [*rte(glue, "--do_train", *LORA, "--output_dir", output), "--max_steps", "8", "--save_steps", "4"]
    for name in ("run.json", "checkpoint-4/run_metadata.json"):  # as if it had been cut off on the way to step 8
        metadata = json.loads((output / name).read_text())
        metadata["hyperparameters"]["max_steps"] = 8
        if name == "run.json":
            del metadata["trained"], metadata["weights_fingerprint"]
        write_json(output / name, metadata)  # the checkpoint's is as long as it was
    before = contents(output)
    outcome = fork(*flags, script=full_disk)
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome.err
    message = outcome.err[outcome.err.find("run_glue.py: error:") :].strip()
    assert message.count("\n") < 3 and "checkpoint-8" in message and "checkpoint-4 is complete" in message
    after = contents(output)
    assert after.keys() == before.keys()
    assert after == before
    again = call(*flags)
    assert again.code == 0 and f"Resuming from {output / 'checkpoint-4'}" in again.out
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 8


def test_pushing_to_a_hub_that_isnt_there_is_refused_before_training(refused_by_process, glue, tmp_path):
    flags = [*rte(glue, "--do_train", *LORA, *SHORT), "--push_to_hub", "--overwrite_output_dir"]
    message = refused_by_process(1, *flags)
    assert "--push_to_hub" in message and "hf upload" in message


# ----------------------------------------------------------------------------------- complete models as the base model


@pytest.fixture
def whole_model(tiny_model, tmp_path) -> Callable[..., Path]:
    """A saved classifier with the given labels, in a folder with the tiny model's tokenizer."""

    def save(labels: list[str], **settings) -> Path:
        folder = Path(shutil.copytree(tiny_model, tmp_path / "complete"))
        config = RobertaConfig.from_pretrained(tiny_model, id2label=dict(enumerate(labels)))
        for name, value in settings.items():
            setattr(config, name, value)
        RobertaForSequenceClassification(config).save_pretrained(folder)
        return folder

    return save


def test_a_complete_model_with_lora_matrices_is_not_evaluated_without_them(refused, glue, whole_model):
    folder = whole_model(["entailment", "not_entailment"], apply_lora=True, lora_r=4, lora_alpha=8)
    message = refused(1, *rte(glue, "--do_eval", "--model_name_or_path", folder))
    assert "lora_A" in message and "--lora_path" in message


def test_a_trained_model_is_not_evaluated_under_other_labels(refused, glue, whole_model):
    folder = whole_model(["unacceptable", "acceptable"])
    message = refused(1, *rte(glue, "--do_eval", "--model_name_or_path", folder))
    assert "unacceptable, acceptable" in message and "entailment, not_entailment" in message
