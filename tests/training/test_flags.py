"""Command lines of 2021 in today's flags, each translation by hand and against transformers' own parser."""

import dataclasses
import os
import pickle
import tracemalloc
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from transformers import HfArgumentParser, TrainingArguments

from lora_nlu.errors import UsageError, UserError
from lora_nlu.methods.description import check_flags, description_of, method_flags, settings_of_flags
from lora_nlu.methods.table import METHODS
from lora_nlu.methods.targets import TARGETS
from lora_nlu.training.arguments import DataArguments, ModelArguments
from lora_nlu.training.legacy_flags import DROPPED, RENAMED, SWITCHES, translate
from lora_nlu.training.model import prepare_model
from lora_nlu.training.parsing import Flags, parse_arguments

TRAINING_FLAGS = {field.name for field in dataclasses.fields(TrainingArguments)}


def parsed(argv: list[str]) -> TrainingArguments:
    """As transformers reads them; what it writes into the environment (torch.compile's settings) is undone."""
    with mock.patch.dict(os.environ):
        return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(argv, look_for_args_file=False)[0]


RENAMES = [
    ("evaluation_strategy", "epoch", "eval_strategy"),
    ("no_cuda", "true", "use_cpu"),
    ("per_gpu_train_batch_size", "4", "per_device_train_batch_size"),
    ("per_gpu_eval_batch_size", "8", "per_device_eval_batch_size"),
    ("use_deterministic_algorithms", "True", "full_determinism"),
    ("torchdynamo", "inductor", "torch_compile_backend"),
    ("use_auth_token", "hf_abc", "token"),
    ("max_val_samples", "50", "max_eval_samples"),
]
SWITCHED = [
    ("group_by_length", ["--train_sampling_strategy", "group_by_length"]),
    ("include_inputs_for_metrics", ["--include_for_metrics", "inputs"]),
    ("adafactor", ["--optim", "adafactor"]),
    ("evaluate_during_training", ["--eval_strategy", "steps"]),
]


def test_the_tables_here_contain_every_translation():
    assert {old: new for old, _, new in RENAMES} == RENAMED
    assert dict(SWITCHED) == SWITCHES


@pytest.mark.parametrize("old, value, new", RENAMES)
def test_a_renamed_flag_keeps_its_value_in_every_spelling(old, value, new):
    spellings = [
        [f"--{old}", value],
        [f"--{old}={value}"],
        [f"--{old.replace('_', '-')}", value],
        [f"--{old.replace('_', '-')}={value}"],
    ]
    for spelling in spellings:
        translated, notes = translate(["--seed", "1", *spelling, "--do_train"])
        assert translated == ["--seed", "1", f"--{new}", value, "--do_train"]
        assert notes == [f"{' '.join(spelling)} is now --{new} {value}.".replace("hf_abc", "HIDDEN")]


@pytest.mark.parametrize("old", ["no_cuda", "use_deterministic_algorithms"])  # the renamed ones that are switches
def test_a_renamed_switch_without_a_value_stays_without(old):
    assert translate([f"--{old}"])[0] == [f"--{RENAMED[old]}"]
    assert translate([f"--{old}", "--seed", "1"])[0] == [f"--{RENAMED[old]}", "--seed", "1"]


@pytest.mark.parametrize("old, new", SWITCHED)
@pytest.mark.parametrize("on", [[], ["True"], ["true"], ["1"], ["yes"]])
def test_a_switch_that_is_on_becomes_todays_flags(old, new, on):
    translated, notes = translate([f"--{old}", *on, "--seed", "1"])
    assert translated == [*new, "--seed", "1"]
    assert len(notes) == 1 and notes[0].endswith(f"is now {' '.join(new)}.")
    if on:
        assert translate([f"--{old}={on[0]}"])[0] == new
        assert translate([f"--{old.replace('_', '-')}={on[0]}"])[0] == new


@pytest.mark.parametrize("old, new", SWITCHED)
@pytest.mark.parametrize("off", ["False", "false", "0", "no"])
def test_a_switch_that_is_off_becomes_no_flag(old, new, off):
    for spelling in ([f"--{old}", off], [f"--{old}={off}"], [f"--{old.replace('_', '-')}", off]):
        translated, notes = translate([*spelling, "--seed", "1"])
        assert translated == ["--seed", "1"]
        assert notes == [f"{' '.join(spelling)}: dropped, it changes nothing."]


@pytest.mark.parametrize("old", DROPPED)
def test_a_flag_without_a_successor_is_dropped_with_its_value_and_the_reason(old):
    for spelling in ([f"--{old}"], [f"--{old}", "3"], [f"--{old}=3"], [f"--{old.replace('_', '-')}=3"]):
        translated, notes = translate(["--do_eval", *spelling, "--seed", "1"])
        assert translated == ["--do_eval", "--seed", "1"]
        assert notes == [f"{' '.join(spelling)}: dropped, {DROPPED[old]}."]


@pytest.mark.parametrize("value", [[], ["True"], ["false"]])
def test_use_auth_token_as_the_switch_it_was_is_dropped_for_the_saved_login_counts_anyway(value):
    translated, notes = translate(["--use_auth_token", *value, "--seed", "1"])
    assert translated == ["--seed", "1"] and len(notes) == 1


def test_an_access_token_is_neither_printed_nor_pickled(tmp_path, capsys):
    flags = ["--model_name_or_path", "x", "--task_name", "rte", "--do_eval", "--output_dir", str(tmp_path)]
    model, _, run = parse_arguments([*flags, "--use_auth_token", "hf_abc", "--hub_token", "hf_def"], {})
    assert (model.token, run.hub_token) == ("hf_abc", "hf_def")
    restored = pickle.loads(content := pickle.dumps(run))  # transformers writes it into training_args.bin
    assert b"hf_" not in content and restored.hub_token is None and restored.output_dir == str(tmp_path)
    with pytest.raises(UsageError, match="^unknown flag --hf_token=HIDDEN"):
        parse_arguments([*flags, "--hf_token=hf_abc"], {})
    assert "--token HIDDEN" in (printed := capsys.readouterr().out) and "hf_" not in printed


def test_the_removed_adamw_of_transformers_becomes_torchs():
    for spelling in (["--optim", "adamw_hf"], ["--optim=adamw_hf"]):
        assert translate(spelling)[0] == ["--optim", "adamw_torch"]
    assert translate(["--optim", "sgd"]) == (["--optim", "sgd"], [])


@pytest.mark.parametrize(
    "written, today",
    [
        ("--warmup_ratio 0.06", "--warmup_steps 0.06"),
        ("--warmup_ratio=0.06", "--warmup_steps 0.06"),
        ("--warmup-ratio 0.06", "--warmup_steps 0.06"),
        ("--warmup-ratio=0.06", "--warmup_steps 0.06"),
        ("--warmup_ratio 0", "--warmup_steps 0"),
        ("--warmup_ratio 0.06 --warmup_ratio 0", "--warmup_steps 0.06 --warmup_steps 0"),  # the last one counts
        ("--warmup_ratio 0.06 --warmup_steps 100", "--warmup_steps 100"),
        ("--warmup_steps=100 --warmup_ratio=0.06", "--warmup_steps=100"),
        ("--warmup_ratio 0.06 --warmup_steps 0", "--warmup_steps 0.06"),
        ("--warmup_steps 0 --warmup_ratio 0.06", "--warmup_steps 0.06"),
        ("--warmup_steps=0 --warmup_ratio=0.06", "--warmup_steps 0.06"),
        ("--warmup_steps 0", "--warmup_steps 0"),
        ("--warmup_steps 100", "--warmup_steps 100"),
        ("--warmup_steps 0.06", "--warmup_steps 0.06"),
    ],
)
def test_a_warmup_ratio_becomes_steps_below_one_and_positive_steps_beat_it(written, today):
    assert translate(written.split())[0] == today.split()


def test_after_a_ratio_of_0_06_a_last_ratio_of_0_means_no_warmup(tmp_path):
    translated, _ = translate(["--warmup_ratio", "0.06", "--warmup_ratio", "0", "--output_dir", str(tmp_path)])
    args = parsed(translated)
    assert args.get_warmup_steps(1000) == 0


def test_a_translated_ratio_is_a_fraction_of_all_steps_in_transformers(tmp_path):
    translated, _ = translate(["--warmup_ratio", "0.06", "--output_dir", str(tmp_path)])
    args = parsed(translated)
    assert args.get_warmup_steps(1000) == 60


@pytest.mark.parametrize("value", ["1", "1.0", "-0.1", "6", "nan", "many", ""])
def test_a_warmup_ratio_that_is_no_fraction_is_refused(value):
    with pytest.raises(UserError, match="--warmup_ratio") as caught:
        translate([f"--warmup_ratio={value}"])
    assert str(caught.value).count("\n") < 3


def test_a_warmup_ratio_without_a_value_is_refused():
    with pytest.raises(UserError, match="--warmup_ratio"):
        translate(["--warmup_ratio", "--do_train"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["settings.json"],
        ["--do_train", "--do_eval"],
        ["--learning_rate", "5e-4", "--seed=3", "--weight-decay", "-0.1", "--label-smoothing-factor=0.1"],
        ["--token=--odd", "--run_name="],  # joined by `=`, for apart they would read as flags
        ["--fsdp_config={\"version\": 2, \"x\": \"a=b\"}"],
        ["--report_to", "tensorboard", "wandb"],
        ["--eval_strategy", "epoch", "--use_cpu", "--token", "hf_abc", "--max_eval_samples", "5"],
    ],
)  # fmt: skip
def test_todays_flags_pass_untouched_and_unremarked(argv):
    assert translate(argv) == (argv, [])


def test_there_is_one_note_for_each_translation_in_the_order_written():
    _, notes = translate(
        ["--evaluation_strategy", "epoch", "--seed", "1", "--adafactor", "--local_rank=0", "--warmup_ratio", "0.1"]
    )
    assert notes == [
        "--evaluation_strategy epoch is now --eval_strategy epoch.",
        "--adafactor is now --optim adafactor.",
        f"--local_rank=0: dropped, {DROPPED['local_rank']}.",
        "--warmup_ratio 0.1 is now --warmup_steps 0.1.",
    ]


def test_every_new_flag_exists_in_transformers_or_in_run_glue():
    ours = {field.name for c in (ModelArguments, DataArguments) for field in dataclasses.fields(c)}
    targets = {*RENAMED.values(), *(words[0].removeprefix("--") for words in SWITCHES.values())}
    assert targets - TRAINING_FLAGS == {"token", "max_eval_samples"}
    assert {"token", "max_eval_samples"} <= ours


def test_transformers_takes_the_translated_flags_with_their_values(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--no_cuda", "--local_rank=-1", "--fp16_opt_level", "O1"]
    argv += ["--per_gpu_train_batch_size=4", "--per_gpu_eval_batch_size", "6", "--use_deterministic_algorithms"]
    argv += ["--torchdynamo", "inductor", "--group_by_length"]
    argv += ["--include_inputs_for_metrics", "--adafactor", "--evaluate_during_training", "--eval_steps", "9"]
    translated, _ = translate(argv)
    args = parsed(translated)
    assert (args.use_cpu, args.full_determinism) == (True, True)
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (4, 6)
    assert args.torch_compile_backend == "inductor"
    assert args.train_sampling_strategy == "group_by_length" and args.include_for_metrics == ["inputs"]
    assert args.optim == "adafactor" and args.eval_strategy == "steps" and args.eval_steps == 9


@pytest.mark.parametrize("old", sorted({*RENAMED, *SWITCHES, *DROPPED, "warmup_ratio"}))
def test_no_translated_flag_is_one_of_todays(old):
    """But two that transformers keeps for a while: it calls one deprecated, the other it ignores."""
    assert (old in TRAINING_FLAGS) == (old == "local_rank")


# Layers with LoRA: lists in one word.


def setting(name: str, text: str | None) -> Any:
    """What the config of a model of 12 layers gets for one method's flag."""
    flags = SimpleNamespace(**{flag.name: flag.default for flag in method_flags()} | {name: text})
    return settings_of_flags(flags, SimpleNamespace(num_hidden_layers=12))[name]


parse_targets, parse_layers = partial(setting, "lora_target_modules"), partial(setting, "lora_layers")


@pytest.mark.parametrize(
    ("text", "value"),
    [(None, None), ("none", "none"), ("false", "none"), ("KEY", "key"), ("both", True), ("true", True)],
)
def test_the_relative_query_is_none_key_or_both_and_true_and_false_are_read_as_before(text, value):
    assert setting("lora_relative_query", text) == value


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_method_that_can_not_be_sharded_is_refused_by_its_name_before_anything_is_loaded(
    backend, from_file, monkeypatch
):
    chosen = {"apply_lora": True, "lora_variant": "toy"}
    toy = dataclasses.replace(METHODS["lora"], name="toy", label="Toy", chosen_by=chosen, shards=False)
    monkeypatch.setitem(METHODS, "toy", toy)
    run = SimpleNamespace(is_sharded=True, deepspeed="zero3.json" if backend == "deepspeed" else None)
    of_methods = {flag.name: flag.default for flag in method_flags()}
    model = SimpleNamespace(**of_methods | ({} if from_file else chosen))
    adapter: Any = SimpleNamespace(row=toy) if from_file else None
    with pytest.raises(UsageError, match=f"--{backend}: Toy can't be sharded. Leave the flag out"):
        prepare_model(Flags(model, None, run), None, adapter, None, ())  # type: ignore[arg-type]


def test_a_flag_or_setting_that_a_variant_of_lora_lacks_is_refused_by_its_name(monkeypatch):
    without = tuple(flag for flag in METHODS["lora"].flags if flag.name != "lora_alpha")
    chosen = {"apply_lora": True, "lora_variant": "toy"}
    toy = dataclasses.replace(METHODS["lora"], name="toy", label="Toy", chosen_by=chosen, flags=without, missing=None)
    monkeypatch.setitem(METHODS, "toy", toy)
    settings = chosen | {"lora_r": 4}
    flags = {flag.name: flag.default for flag in method_flags()} | settings
    check_flags(SimpleNamespace(**flags))
    with pytest.raises(UsageError, match="^--lora_alpha has no effect with Toy; it is a setting of LoRA, .*. Remove"):
        check_flags(SimpleNamespace(**flags | {"lora_alpha": 8.0}))
    check_flags(SimpleNamespace(**flags | {"lora_variant": None, "lora_alpha": 8.0}))
    with pytest.raises(ValueError, match="^config.lora_alpha has no effect with Toy; .*. Remove lora_alpha.$"):
        description_of(SimpleNamespace(num_hidden_layers=2, **settings, lora_alpha=8.0))


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (None, None),
        ("query", ["query"]),
        ("value,query", ["query", "value"]),  # the order is the table's, whatever is written
        ("query_proj, value_proj", ["query", "value"]),
        ("key,key,key_proj", ["key"]),
        ("output,intermediate,dense,value,key,query", ["query", "key", "value", "dense", "intermediate", "output"]),
    ],
)
def test_targets_are_names_between_commas_each_once_in_the_models_order(text, targets):
    assert parse_targets(text) == targets


@pytest.mark.parametrize(
    ("text", "wrong"), [("queries", "queries"), ("query,embeddings", "embeddings"), ("query;value", "query;value"),
                        ("query,,value", ""), ("", ""), ("Query", "Query"), ("dense,all-linear", "all-linear")]
)  # fmt: skip
def test_a_target_that_is_none_is_refused_with_those_that_are(text, wrong):
    with pytest.raises(UsageError) as error:
        parse_targets(text)
    assert f"--lora_target_modules {text}: {wrong!r} is none of {', '.join(TARGETS)}." == str(error.value)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (None, None),
        ("0", [0]),
        ("0-3,11", [0, 1, 2, 3, 11]),
        ("11,0 - 3", [0, 1, 2, 3, 11]),
        ("5-5, 5", [5]),
        ("2-4,3-6,4", [2, 3, 4, 5, 6]),
        ("0-11", [*range(12)]),
    ],
)
def test_layers_are_numbers_and_ranges_with_both_ends_each_once_in_order(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text", ["", "one", "1,", "-1", "1-", "1--2", "1-2-3", "1.5", "0x1", "1;2", "\u00b2", "+1", "0-x"]
)
def test_layers_that_are_no_numbers_are_refused_with_an_example(text):
    with pytest.raises(UsageError, match="give numbers and ranges from 0, such as 0-3,11") as error:
        parse_layers(text)
    assert f"--lora_layers {text}:" in str(error.value)


@pytest.mark.parametrize("text", ["12", "0,12", "0-12", "99999999"])
def test_layers_that_the_model_does_not_have_are_refused_with_those_it_has(text):
    with pytest.raises(UsageError, match="the model has 12 layers, 0 to 11"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["3-1", "3-1,7", "7,3-1"])
def test_a_range_that_runs_backwards_is_refused_not_left_out(text):
    with pytest.raises(UsageError, match=f"--lora_layers {text}: "):
        parse_layers(text)


def test_a_range_far_beyond_the_model_is_refused_without_counting_to_its_end():
    tracemalloc.start()
    with pytest.raises(UsageError, match="the model has 12 layers"):
        parse_layers("0-300000")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1e6


def test_a_list_of_none_in_a_file_of_flags_is_a_flag_left_out(tmp_path):
    path = tmp_path / "flags.json"
    text = '{"output_dir": "o", "report_to": [], "label_names": null, "do_train": true, "seed": 0'
    path.write_text(text + ', "model_name_or_path": "x", "task_name": "rte"}')
    args = parse_arguments([str(path)], {}).run
    assert (args.report_to, args.label_names, args.do_train, args.seed) == ([], None, True, 0)
