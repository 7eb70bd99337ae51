"""Each method from flags to files: trained, evaluated from its folder, resumed, carried to another task, refused."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flags_of
from runs import LORA, Outcome, contents, cut_off
from safetensors.torch import load_file
from test_run_glue import read, scores, succeeded
from transformers import RobertaConfig, RobertaForSequenceClassification

from lora_nlu.methods.method import Method
from lora_nlu.methods.table import METHODS as TABLE

STEPS = ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--learning_rate", "1e-2"]
HOULSBY = ["--apply_adapter", "--adapter_type", "houlsby", "--adapter_size", "8"]
ELSEWHERE = [*LORA, "--lora_target_modules", "output,key,dense", "--lora_layers", "1", "--lora_dropout", "0.2"]
H, ADAPTER = 32, 2 * 32 * 8 + 8 + 32  # the tiny model's width, and the parameters of one adapter in it


def method_in(record: dict[str, Any]) -> dict[str, Any]:
    """The settings of the method in a run's record, without its label, colour and marker, which are the table's."""
    method = dict(record["method"])
    row = TABLE[method["name"]]
    assert [method.pop(name) for name in ("label", "color", "marker")] == [row.label, row.color, row.marker]
    return method


# flags, what run.json says, trained parameters of the encoder, as the closing table calls them, pattern of their names
WITH_NUMBERS: dict[str, tuple[list[str], dict[str, object], int, str, str]] = {
    "bitfit": (["--apply_bitfit"], {"name": "bitfit"}, H + 2 * (7 * H + 48), "biases", r"bias$"),
    "houlsby": (HOULSBY, {"name": "houlsby", "adapter_size": 8}, 2 * 2 * ADAPTER, "adapters", r"\.adapter\."),
    "pfeiffer": (
        ["--apply_adapter", "--adapter_type", "pfeiffer", "--adapter_size", "8"],
        {"name": "pfeiffer", "adapter_size": 8}, 2 * ADAPTER, "adapters", r"\.adapter\.",
    ),
    "head": (["--head_only"], {"name": "head"}, 0, "", r"(?!)"),
    "lora elsewhere": (
        ELSEWHERE,
        {"name": "lora", "targets": ["key", "dense", "output"], "layers": [1], "lora_dropout": 0.2},
        4 * (H + H) + 4 * (H + H) + 4 * (48 + H), "LoRA",
        r"\.layer\.1\.(attention\.self\.key|attention\.output\.dense|output\.dense)\.lora_[AB]\.weight$",
    ),
    "lora and biases": (
        [*LORA, "--apply_bitfit"],
        {"name": "lora", "targets": ["query", "value"], "layers": None, "lora_dropout": 0.0, "biases": True},
        2 * 2 * 4 * (H + H) + H + 2 * (7 * H + 48), "LoRA and biases", r"bias$|\.lora_[AB]\.weight$",
    ),
}  # fmt: skip
# Each row of the table that is not above; its number of parameters, None, is that of the file.
FROM_ROWS: dict[str, tuple[list[str], dict[str, object], None, str, str]] = {
    row.name: (flags_of(row), {"name": row.name}, None, row.part, row.state or r"(?!)")
    for row in TABLE.values()
    if row.name not in WITH_NUMBERS and row.freezes
}
METHODS: dict[str, tuple[list[str], dict[str, object], int | None, str, str]] = {**WITH_NUMBERS, **FROM_ROWS}


def rte(glue: Path, output: Path, *flags: object) -> list[object]:
    return ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", "64", "--output_dir", output, *flags]


def row_of(method: str) -> Method:
    return TABLE[str(METHODS[method][1]["name"])]


def path_flag(method: str) -> str:
    """The flag that reads what a run of the method trained."""
    return f"--{row_of(method).path_flag}"


def is_as_expected(described: dict[str, Any], method: str) -> bool:
    """Whether a record's settings are those above; of a row without them, the name alone is compared."""
    expected = METHODS[method][1]
    return described["name"] == expected["name"] if method in FROM_ROWS else described == expected


def trained_in(folder: Path) -> dict[str, torch.Tensor]:
    """What trained in an adapter folder, by the model's own names, but for LoRA's matrices, which end in .weight."""
    prefix, tensors = "base_model.model.", load_file(folder / "adapter_model.safetensors").items()
    trained = {name.removeprefix(prefix): tensor for name, tensor in tensors if name.startswith(prefix)}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in trained.items()}


@pytest.fixture(scope="module")
def trained(call, glue, tmp_path_factory) -> Callable[[str], tuple[Path, Outcome]]:
    """Output folder and printed text of a method's run on RTE, done once, for nobody to change."""

    @cache
    def run(method: str) -> tuple[Path, Outcome]:
        output = tmp_path_factory.mktemp("run") / "output"
        flags = METHODS[method][0] if method in METHODS else []
        return output, succeeded(call(*rte(glue, output, *STEPS, "--do_train", "--do_eval", *flags)))

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_new_call_evaluates_a_methods_folder_to_the_same_numbers_without_the_methods_flags(
    method, trained, call, glue, tmp_path
):
    folder, _ = trained(method)
    outcome = succeeded(call(*rte(glue, tmp_path / "o", "--do_eval", path_flag(method), folder)))
    want = scores(folder / "eval_results.json")
    assert {"eval_accuracy", "eval_loss"} <= want.keys()
    assert scores(tmp_path / "o" / "eval_results.json") == pytest.approx(want, rel=1e-9)
    contents_of = {"houlsby": "houlsby, size 8.", "pfeiffer": "pfeiffer, size 8.", "bitfit": "bitfit.", "head": "head."}
    row = row_of(method)
    variant = f"{row.label}, rank 4" + ", alpha 8." * (method in WITH_NUMBERS)
    other = variant if row.has_ranks else method
    assert f"Loaded {folder}: {contents_of.get(method, other)}" in outcome.out


@pytest.mark.parametrize("method", METHODS)
def test_output_and_checkpoints_contain_what_the_method_trained_and_no_more(method, trained, tiny_model):
    folder, _ = trained(method)
    head = [f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")]
    checkpoints = [folder / "checkpoint-3", folder / "checkpoint-6"]
    assert sorted(folder.glob("checkpoint-*")) == checkpoints
    for place in (folder, *checkpoints):
        tensors = trained_in(place)
        inside = [name for name in tensors if name not in head]
        assert len(tensors) == len(inside) + len(head)
        assert METHODS[method][2] in (None, sum(tensors[name].numel() for name in inside))
        spellings = {name: (name, name.removesuffix(".weight")) for name in inside}
        pattern = METHODS[method][4]
        assert [name for name in inside if not any(re.search(pattern, spelt) for spelt in spellings[name])] == []
    for checkpoint in checkpoints:
        assert len(torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]) == len(tensors)
    assert not [path for name in ("model.safetensors", "pytorch_model.bin") for path in folder.rglob(name)]
    base = load_file(tiny_model / "model.safetensors")
    shared = [name for name in inside if name in base]
    if method in WITH_NUMBERS:
        assert len(shared) == (17 if "bias" in METHODS[method][4] else 0)  # those that were there before
    assert not any(torch.equal(tensors[name], base[name]) for name in shared if "key.bias" not in name)


@pytest.mark.parametrize("method", METHODS)
def test_the_run_records_its_method_and_how_many_parameters_it_trains(method, trained, tiny_model):
    folder, outcome = trained(method)
    _, _, encoder, part, _ = METHODS[method]
    run, tensors = read(folder / "run.json"), trained_in(folder)
    assert is_as_expected(method_in(run), method)
    config = RobertaConfig.from_pretrained(tiny_model, num_labels=2)
    plain = dict(RobertaForSequenceClassification(config).named_parameters())
    trainable = sum(tensor.numel() for tensor in tensors.values())
    if row_of(method).count:  # what trained, some of which may not be in the file
        moments = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"].values()
        trainable = sum(moment["exp_avg"].numel() for moment in moments)
    if encoder is None:
        encoder = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("classifier."))
        if row_of(method).to_file and not row_of(method).count:  # with the starts of matrices, which do not train
            encoder, trainable = encoder // 2, trainable - encoder // 2
    added = sum(tensor.numel() for name, tensor in tensors.items() if name not in plain)
    if row_of(method).count:
        added = trainable - sum(tensor.numel() for name, tensor in tensors.items() if name in plain)
    total = sum(p.numel() for p in plain.values()) + added
    assert run["parameters"] == {"encoder": encoder, "trainable": trainable, "total": total}
    assert is_as_expected(method_in(read(folder / "run_metadata.json")), method)
    table = dict(re.findall(r"^  (\S[\w -]*?)  +(\S.*)$", outcome.out, re.MULTILINE))
    of_them = f", {encoder:,} of them {part}" if part else ""
    assert table["trainable parameters"] == f"{trainable:,} of {total:,}{of_them}"
    accuracy = read(folder / "eval_results.json")["eval_accuracy"]
    assert table["accuracy"] == f"{accuracy:.4f}" and table["peak memory"].endswith(" GiB")


@pytest.mark.parametrize("method", METHODS)
def test_the_card_in_the_folder_says_by_which_flag_run_glue_reads_it(method, trained):
    card = (trained(method)[0] / "README.md").read_text()
    assert [flag for flag in ("--lora_path", "--adapter_path") if flag in card] == [path_flag(method)]


def test_full_fine_tuning_saves_a_complete_model_and_records_its_parameter_count(trained, call, glue, tmp_path):
    folder, outcome = trained("full")
    theirs, report = RobertaForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (folder / "checkpoint-6" / "model.safetensors").is_file() and not [*folder.rglob("adapter_*")]
    run, numbers = read(folder / "run.json"), sum(p.numel() for p in theirs.parameters())
    assert method_in(run) == {"name": "full"}
    encoder = sum(p.numel() for p in theirs.roberta.parameters())
    assert run["parameters"] == {"encoder": encoder, "trainable": numbers, "total": numbers}
    assert re.search(rf"trainable parameters +{numbers:,} of {numbers:,}$", outcome.out, re.MULTILINE)
    settings = read(folder / "config.json")
    ours = ("apply_", "adapter_", "lora_", "head_only")
    assert [name for name, value in settings.items() if name.startswith(ours) and value] == []
    again = rte(glue, tmp_path / "o", "--do_eval", "--model_name_or_path", folder)
    succeeded(call(*again))
    assert scores(tmp_path / "o" / "eval_results.json") == pytest.approx(scores(folder / "eval_results.json"), rel=1e-9)


@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_a_run_records_its_training_time_its_memory_and_the_time_of_each_log(method, trained):
    folder, _ = trained(method)
    results, state = read(folder / "train_results.json"), read(folder / "trainer_state.json")
    elapsed = [entry["elapsed_s"] for entry in state["log_history"] if "loss" in entry]
    assert len(elapsed) == 6 and elapsed == sorted(elapsed) and elapsed[-1] > elapsed[0] > 0
    assert results["train_seconds"] >= elapsed[-1]
    assert 0.05 < results["peak_memory_gib"] < 64


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(method, trained, call, glue, tmp_path):
    folder, _ = trained(method)
    output = cut_off(folder, tmp_path / "output", after=3)
    before = [entry["elapsed_s"] for entry in read(output / "checkpoint-3" / "trainer_state.json")["log_history"]]
    outcome = succeeded(call(*rte(glue, output, *STEPS, "--do_train", "--do_eval", *METHODS[method][0])))
    assert f"Resuming from {output / 'checkpoint-3'}." in outcome.out
    weights = "adapter_model.safetensors"
    assert contents(output)[weights] == contents(folder)[weights]
    assert scores(output / "eval_results.json") == scores(folder / "eval_results.json")
    elapsed = [e["elapsed_s"] for e in read(output / "trainer_state.json")["log_history"] if "elapsed_s" in e]
    assert elapsed[:3] == before and elapsed == sorted(elapsed)  # the clock goes on from where it stood


def test_rates_of_B_and_of_the_head_are_recorded_and_compared_and_a_resumed_run_ends_with_the_same_bits(
    trained, call, glue, tmp_path
):
    rates = ["--loraplus_lr_ratio", "3", "--head_learning_rate", "2e-3"]
    flags = [*METHODS["lora"][0], *STEPS, "--do_train"]
    succeeded(call(*rte(glue, tmp_path / "run", *flags, *rates)))
    hyper = read(tmp_path / "run" / "run.json")["hyperparameters"]
    assert (hyper["loraplus_lr_ratio"], hyper["head_learning_rate"]) == (3.0, 2e-3)
    assert not {"loraplus_lr_ratio", "head_learning_rate"} & {*read(trained("lora")[0] / "run.json")["hyperparameters"]}
    groups = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-2, 3e-2, 2e-3}
    assert [group["lr"] / group["initial_lr"] for group in groups] == pytest.approx([0.5] * len(groups))
    output = cut_off(tmp_path / "run", tmp_path / "output", after=3)
    for others, difference in (
        ([*rates, "--loraplus_lr_ratio", "4"], "loraplus_lr_ratio 3.0, now 4.0"),
        (rates[:2], "head_learning_rate 0.002, now None"),
    ):
        outcome = call(*rte(glue, output, *flags, *others))
        assert outcome.code == 1 and difference in outcome.err
    without = cut_off(trained("lora")[0], tmp_path / "without", after=3)
    outcome = call(*rte(glue, without, *flags, *rates))
    assert outcome.code == 1 and "loraplus_lr_ratio None, now 3.0; head_learning_rate None, now 0.002" in outcome.err
    succeeded(call(*rte(glue, output, *flags, *rates)))
    weights = "adapter_model.safetensors"
    assert contents(output)[weights] == contents(tmp_path / "run")[weights] != contents(trained("lora")[0])[weights]


def test_a_finished_run_of_adapters_is_not_trained_again(trained, call, glue, tmp_path):
    folder, _ = trained("houlsby")
    output = cut_off(folder, tmp_path / "output", after=6)
    for name in ("adapter_model.safetensors", "adapter_config.json", "run_metadata.json", "run.json"):
        (output / name).write_bytes((folder / name).read_bytes())
    outcome = succeeded(call(*rte(glue, output, *STEPS, "--do_train", "--do_eval", *HOULSBY)))
    assert "already trained" in outcome.out
    assert scores(output / "eval_results.json") == scores(folder / "eval_results.json")
    before = contents(output)
    for flags, expected_message in (
        (METHODS["pfeiffer"][0], "name houlsby, now pfeiffer"),
        ([*HOULSBY, "--adapter_size", "4"], "adapter_size 8, now 4"),
        ([*HOULSBY, "--apply_bitfit"], "biases None, now True"),
        (METHODS["head"][0], "name houlsby, now head"),
        ([], "name houlsby, now full"),
    ):
        outcome = call(*rte(glue, output, *STEPS, "--do_train", *flags))
        assert outcome.code == 1 and expected_message in outcome.err, outcome
    assert contents(output) == before


def test_the_best_checkpoint_of_an_adapter_run_is_what_is_saved_at_the_end(call, glue, tmp_path):
    output = tmp_path / "output"
    best = ["--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end"]
    # a rate that grows until it is far too fast: by the loss the first of the two checkpoints is the best
    best += ["--learning_rate", "0.05", "--warmup_steps", "6", "--metric_for_best_model", "loss"]
    succeeded(call(*rte(glue, output, *STEPS, *best, "--do_train", *METHODS["bitfit"][0])))
    losses = {e["step"]: e["eval_loss"] for e in read(output / "trainer_state.json")["log_history"] if "eval_loss" in e}
    assert losses.keys() == {3, 6} and losses[3] < losses[6] - 0.03, "the last is the best: nothing to tell"
    got, kept, last = (trained_in(place) for place in (output, output / "checkpoint-3", output / "checkpoint-6"))
    assert all(torch.equal(got[name], tensor) for name, tensor in kept.items())
    assert not all(torch.equal(got[name], tensor) for name, tensor in last.items())


# ---------------------------------------------------------------------------------------------- from MNLI to RTE


@pytest.fixture(scope="module")
def mnli_run(call, glue, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mnli") / "output"
    flags = ["--task_name", "mnli", "--glue_dir", glue, "--output_dir", output, "--max_seq_length", "64"]
    succeeded(call(*flags, *STEPS, "--save_strategy", "no", "--do_train", *HOULSBY))
    return output


@pytest.mark.parametrize("own_flags", [[], HOULSBY], ids=["the folder alone", "the method too"])
def test_rte_starts_from_an_mnli_runs_adapters_and_leaves_its_head_behind(own_flags, mnli_run, call, glue, tmp_path):
    output = tmp_path / "rte"
    flags = ["--adapter_path", mnli_run, *own_flags, *STEPS, "--learning_rate", "0", "--do_train"]
    outcome = succeeded(call(*rte(glue, output, *flags)))
    assert len(re.findall("its classifier is for other labels and is not loaded", outcome.out)) == 1
    assert "was trained on mnli; this is rte" in outcome.out
    got, mnli = trained_in(output), trained_in(mnli_run)
    assert got.keys() == mnli.keys()
    for name in got:
        assert torch.equal(got[name], mnli[name]) == (".adapter." in name), name
    assert got["classifier.out_proj.weight"].shape == (2, H)
    run = read(output / "run.json")
    assert method_in(run) == METHODS["houlsby"][1] and run["started_from"] == str(mnli_run)
    assert run["parameters"]["encoder"] == METHODS["houlsby"][2]


@pytest.mark.parametrize("own_flags, p", [([], 0.0), (["--lora_dropout", "0.3"], 0.3)])
def test_training_that_starts_from_updates_uses_the_dropout_of_its_own_flags(
    own_flags, p, trained, call, glue, tmp_path
):
    folder, _ = trained("lora elsewhere")
    flags = ["--lora_path", folder, *STEPS, "--max_steps", "1", "--do_train", *own_flags]
    succeeded(call(*rte(glue, tmp_path / "o", *flags)))
    described = METHODS["lora elsewhere"][1] | {"lora_dropout": p}
    assert method_in(read(tmp_path / "o" / "run.json")) == described
    assert read(tmp_path / "o" / "adapter_config.json")["lora_dropout"] == p


def test_an_mnli_runs_adapters_are_not_evaluated_on_rte(mnli_run, call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", "--do_eval", "--adapter_path", mnli_run))
    assert outcome.code == 1 and "entailment, neutral, contradiction" in outcome.err


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def refused(call, glue, tmp_path) -> Callable[..., str]:
    """Run with flags that are wrong; returns the message once the code is right and nothing was written."""

    def run(code: int, *flags: object) -> str:
        outcome = call(*rte(glue, tmp_path / "none", *flags))
        assert outcome.code == code, outcome
        assert 0 < outcome.err.count("\n") + 1 <= 3, outcome.err
        assert contents(tmp_path / "none") == {}
        return outcome.err

    return run


NO_SIZE, NO_TYPE = HOULSBY[:3], [HOULSBY[0], *HOULSBY[3:]]
OTHER = METHODS["pfeiffer"][0]


@pytest.mark.parametrize(
    ("flags", "message_parts"),
    [
        (["--apply_adapter"], ["--adapter_type (houlsby or pfeiffer) and --adapter_size"]),
        (NO_SIZE, ["--apply_adapter needs", "--adapter_size"]),
        (NO_TYPE, ["--apply_adapter needs", "--adapter_type"]),
        ([*HOULSBY, "--adapter_type", "parallel"], ["--adapter_type", "parallel", "houlsby", "pfeiffer"]),
        ([*HOULSBY, "--adapter_size", "0"], ["--adapter_size 0", "1 or more"]),
        ([*HOULSBY, "--adapter_size", "-8"], ["--adapter_size -8", "1 or more"]),
        ([*LORA, *HOULSBY], ["--apply_lora and --apply_adapter", "choose one"]),
        ([*LORA, "--adapter_path", "x"], ["--apply_lora and --adapter_path", "choose one"]),
        (["--lora_path", "x", "--adapter_path", "y"], ["--lora_path and --adapter_path", "choose one"]),
        (["--head_only", *LORA], ["--apply_lora and --head_only", "choose one"]),
        (["--head_only", *HOULSBY], ["--apply_adapter and --head_only", "choose one"]),
        (["--head_only", "--apply_bitfit"], ["--head_only and --apply_bitfit", "choose one"]),
        (["--lora_target_modules", "key"], ["--lora_target_modules", "Add --apply_lora"]),
        (["--lora_layers", "1"], ["--lora_layers", "Add --apply_lora"]),
        (["--lora_r", "8", "--lora_alpha", "16"], ["--lora_r", "Add --apply_lora"]),
        (["--lora_variant", "rslora"], ["--lora_variant", "Add --apply_lora"]),
        ([*LORA, "--lora_variant", "lore"], ["--lora_variant", "choose from", "rslora"]),
        ([*LORA, "--lora_relative_query", "query"], ["--lora_relative_query query", "none, key and both"]),
        (["--apply_bitfit", "--loraplus_lr_ratio", "16"], ["--loraplus_lr_ratio has no effect with BitFit"]),
        ([*LORA, "--loraplus_lr_ratio", "0"], ["--loraplus_lr_ratio 0.0: must be above 0"]),
        (["--head_learning_rate", "-1"], ["--head_learning_rate -1.0: must be 0 or more"]),
        (["--apply_lora", "--lora_variant", "vera", "--lora_r", "4", "--vera_seed", str(2**63)],
         [f"--vera_seed {2**63}: must be from 0 to below"]),
        (["--do_train", "false", "--do_eval", "--head_learning_rate", "1"], ["--head_learning_rate", "Add --do_train"]),
        (["--lora_dropout", "0.1"], ["--lora_dropout", "Add --apply_lora"]),
        (["--apply_bitfit", "--lora_dropout", "0.1"], ["--lora_dropout", "Add --apply_lora"]),
        (["--adapter_path", "x", "--lora_target_modules", "key"], ["--lora_target_modules", "Add --apply_lora"]),
        (["--adapter_path", "x", "--lora_dropout", "0.1"], ["--lora_dropout", "Add --apply_lora"]),
        (["--adapter_path", "x", "--lora_r", "8"], ["--lora_r", "Add --apply_lora"]),
        (["--adapter_type", "houlsby"], ["--adapter_type", "Add --apply_adapter"]),
        ([*LORA, "--adapter_size", "8"], ["--adapter_size", "Add --apply_adapter"]),
        ([*LORA, "--lora_dropout", "1"], ["--lora_dropout 1.0", "from 0 to below 1"]),
        ([*LORA, "--lora_target_modules", "query,attention"],
         ["'attention'", "query, key, value, dense, intermediate, output"]),
        ([*LORA, "--lora_layers", "2"], ["--lora_layers 2", "the model has 2 layers, 0 to 1"]),
        ([*LORA, "--lora_layers", "0-2"], ["--lora_layers 0-2", "the model has 2 layers, 0 to 1"]),
        ([*LORA, "--lora_layers", "all"], ["--lora_layers all", "give numbers and ranges from 0"]),
        ([*LORA, "--lora_layers=-1"], ["--lora_layers -1", "give numbers and ranges from 0"]),
    ],
    ids=lambda value: " ".join(value)[-60:],
)  # fmt: skip
def test_flags_of_methods_that_make_no_sense_end_with_code_2(flags, message_parts, refused):
    message = refused(2, "--do_train", *flags)
    assert [part for part in message_parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("method", "flags", "message_parts"),
    [
        ("houlsby", ["--lora_path"], ["contains houlsby", "Give it as --adapter_path"]),
        ("bitfit", ["--lora_path"], ["contains bitfit", "Give it as --adapter_path"]),
        ("head", ["--lora_path"], ["contains head", "Give it as --adapter_path"]),
        ("lora elsewhere", ["--adapter_path"], ["contains lora", "Give it as --lora_path"]),
        ("houlsby", [*OTHER, "--adapter_path"], ["houlsby, size 8; the flags differ: --adapter_type pfeiffer"]),
        ("houlsby", ["--adapter_type", "pfeiffer", "--adapter_path"], ["contains houlsby", "the flags differ"]),
        ("houlsby", [*HOULSBY, "--adapter_size", "4", "--adapter_path"],
         ["size 8; the flags differ: --adapter_size 4.\nLeave it out"]),
        ("houlsby", ["--apply_bitfit", "--adapter_path"], ["contains houlsby", "the flags differ: --apply_bitfit."]),
        ("bitfit", ["--apply_adapter", "--adapter_path"], ["contains bitfit", "the flags differ"]),
        ("bitfit", [*HOULSBY, "--adapter_path"],
         ["differ: --apply_adapter, --adapter_type houlsby, --adapter_size 8.\nLeave them out"]),
        ("head", ["--apply_bitfit", "--adapter_path"], ["contains head", "the flags differ"]),
        ("lora elsewhere", ["--lora_target_modules", "query,value", "--lora_path"],
         ["updates in key,dense,output", "Leave --lora_target_modules out"]),
        ("lora elsewhere", ["--lora_target_modules", "key,dense", "--lora_path"], ["Leave --lora_target_modules out"]),
        ("lora elsewhere", [*LORA, "--lora_variant", "dora", "--lora_path"],
         ["contains LoRA, rank 4, alpha 8; the flags differ: --lora_variant dora.\nLeave it out"]),
        ("lora elsewhere", ["--lora_layers", "0-1", "--lora_path"], ["updates in 1", "Leave --lora_layers out"]),
        ("houlsby", ["--head_only", "--adapter_path"], ["contains houlsby", "the flags differ"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)  # fmt: skip
def test_a_folder_that_the_flags_contradict_is_refused_and_its_contents_are_named(
    method, flags, message_parts, trained, refused
):
    message = refused(1, "--do_eval", *flags, trained(method)[0])
    assert [part for part in message_parts if part not in message] == [], message


@pytest.mark.parametrize("flag", ["--lora_path", "--adapter_path"])
def test_a_folder_that_is_not_there_is_named_with_the_flag_that_gave_it(flag, refused, tmp_path):
    message = refused(1, "--do_eval", flag, tmp_path / "nowhere")
    assert message.startswith(f"{flag} {tmp_path / 'nowhere'}: no such file or folder")


def test_new_adapters_in_a_trained_model_are_not_evaluated_as_if_they_were_trained(trained, refused):
    # they are no identity, as LoRA with B = 0 is
    refused(2, "--do_eval", *HOULSBY, "--model_name_or_path", trained("full")[0])


@pytest.mark.parametrize("method", ["houlsby", "lora elsewhere"])
def test_the_flags_that_a_folder_was_trained_with_are_no_contradiction(method, trained, call, glue, tmp_path):
    folder, _ = trained(method)
    flags = [*METHODS[method][0], path_flag(method), folder]
    succeeded(call(*rte(glue, tmp_path / "o", "--do_eval", *flags)))
    assert scores(tmp_path / "o" / "eval_results.json") == pytest.approx(scores(folder / "eval_results.json"), rel=1e-9)
