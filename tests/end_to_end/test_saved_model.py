"""A saved model that contains what a method trained, as a run's base: loaded as it was, or refused; never dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LORA, Outcome
from test_deberta import text, tiny_deberta  # noqa: F401 (fixtures)
from test_run_glue import scores, succeeded
from transformers import AutoTokenizer

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.labels import set_labels
from lora_nlu.models.loading import load_config, load_model

STEPS = ["--max_steps", "4", "--learning_rate", "1e-2"]
PFEIFFER = ["--apply_adapter", "--adapter_type", "pfeiffer", "--adapter_size", "4"]
HOULSBY = ["--apply_adapter", "--adapter_type", "houlsby", "--adapter_size", "4"]


@pytest.fixture(scope="module")
def saved_model(call, glue, tiny_model, tiny_deberta, tmp_path_factory) -> Any:  # noqa: F811
    """By kind and flags: the folder of a run's adapter, and the complete model with it, saved by save_pretrained."""
    done: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def make(kind: str, *flags: str) -> tuple[Path, Path]:
        key = (kind, *flags)
        if key not in done:
            base, folder = (tiny_deberta if kind == "deberta" else tiny_model), tmp_path_factory.mktemp("complete")
            succeeded(run(call, glue, base, folder / "run", "--do_train", "--do_eval", *STEPS, *flags))
            config = load_config(str(base))
            set_labels(config, ("entailment", "not_entailment"))
            torch.manual_seed(0)
            model, _ = load_model(str(base), config, needs_head=False)
            attach_adapter(model, read_adapter(str(folder / "run")), None, allow_new_head=False)
            model.save_pretrained(folder / "model")
            AutoTokenizer.from_pretrained(base).save_pretrained(folder / "model")
            done[key] = folder / "run", folder / "model"
        return done[key]

    return make


def run(call: Any, glue: Path, model: Path, output: Path, *flags: object) -> Outcome:
    data = ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", "64", "--output_dir", output]
    return call("--model_name_or_path", model, *data, *flags)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("roberta", [*LORA]),
        ("roberta", [*LORA, "--lora_target_modules", "dense,output", "--lora_layers", "1"]),
        ("deberta", [*LORA]),
        ("deberta", [*LORA, "--lora_relative_query"]),
        ("roberta", PFEIFFER),
        ("deberta", HOULSBY),
    ],
    ids=str,
)
def test_a_saved_model_with_the_flags_of_its_training_has_its_adapters_scores(
    kind, flags, saved_model, call, glue, tmp_path
):
    trained, model = saved_model(kind, *flags)
    succeeded(run(call, glue, model, tmp_path / "o", "--do_eval", *flags))
    assert scores(tmp_path / "o" / "eval_results.json") == pytest.approx(
        scores(trained / "eval_results.json"), rel=1e-6
    )


@pytest.mark.parametrize("work", [["--do_eval"], ["--do_train", *STEPS]], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("kind", "trained_with", "flags", "expected_message"),
    [
        ("roberta", LORA, [], "left out"),
        ("roberta", LORA, ["--apply_lora", "--lora_r", "4", "--lora_alpha", "16"], "Give --lora_alpha 8"),
        ("roberta", LORA, ["--apply_lora", "--lora_r", "2", "--lora_alpha", "8"], "not of config.json's shape"),
        ("roberta", LORA, [*LORA, "--lora_layers", "1"], "left out"),
        ("roberta", LORA, HOULSBY, "left out"),
        ("deberta", [*LORA, "--lora_relative_query"], LORA, "Give --lora_relative_query."),
        ("deberta", LORA, [*LORA, "--lora_relative_query"], "Leave out --lora_relative_query."),
        ("roberta", PFEIFFER, [], "left out"),
        ("roberta", PFEIFFER, LORA, "left out"),
        ("roberta", PFEIFFER, HOULSBY, "Give --adapter_type pfeiffer"),
    ],
    ids=str,
)
def test_a_saved_model_is_refused_with_other_flags_than_its_trainings(
    kind, trained_with, flags, expected_message, work, saved_model, call, glue, tmp_path
):
    _, model = saved_model(kind, *trained_with)
    outcome = run(call, glue, model, tmp_path / "o", *work, *flags)
    assert outcome.code == 1 and str(model) in outcome.err and expected_message in outcome.err


def test_a_saved_model_whose_config_does_not_record_its_alpha_is_refused(saved_model, call, glue, tmp_path):
    _, model = saved_model("roberta", *LORA)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    del config["lora_alpha"], config["apply_lora"]
    (copy / "config.json").write_text(json.dumps(config))
    outcome = run(call, glue, copy, tmp_path / "o", "--do_eval", *LORA)
    assert outcome.code == 1 and "doesn't record the lora_alpha" in outcome.err


def test_an_adapter_for_a_saved_model_that_contains_another_one_is_refused(saved_model, call, glue, tmp_path):
    trained, model = saved_model("roberta", *LORA)
    outcome = run(call, glue, model, tmp_path / "o", "--do_eval", "--lora_path", trained)
    assert outcome.code == 1 and "left out" in outcome.err
