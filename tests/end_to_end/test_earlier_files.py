"""What version 0.1 wrote is read, evaluated, resumed, converted and reported (tests/fixtures/version_0_1)."""

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Outcome
from safetensors.torch import load_file
from test_run_glue import read, scores, succeeded

FILES = Path(__file__).parents[1] / "fixtures" / "version_0_1"
COMMANDS: dict[str, list[str]] = json.loads((FILES / "commands.json").read_text())
METHODS = {name: read(FILES / "runs" / name / "run.json")["method"]["name"] for name in COMMANDS}
ADAPTERS = [name for name, method in METHODS.items() if method != "full"]
UNFINISHED = sorted(path.name for path in (FILES / "unfinished").iterdir())


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """A copy of all files, and the current directory: the recorded paths are relative."""
    folder = tmp_path / "files"
    shutil.copytree(FILES, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def evaluate(call, tmp_path) -> Callable[..., Path]:
    """Evaluate and predict with these flags on the data of a run; returns the output folder."""

    def run(name: str, *flags: object) -> Path:
        at = COMMANDS[name].index("--task_name" if "--task_name" in COMMANDS[name] else "--train_file")
        data = COMMANDS[name][at : at + 4 + 2 * (COMMANDS[name][at] == "--train_file")]
        common = ["--do_eval", "--do_predict", "--max_seq_length", 64, "--cache_dir", tmp_path / "cache"]
        succeeded(call(*common, *data, *flags, "--output_dir", tmp_path / "evaluated", base=False))
        return tmp_path / "evaluated"

    return run


def base(name: str) -> list[str]:
    return ["--model_name_or_path", f"models/{name.partition('_')[0]}"]


def source(name: str) -> list[str]:
    """The flags that start from a run's output folder."""
    if METHODS[name] == "full":
        return ["--model_name_or_path", f"runs/{name}"]
    return [*base(name), "--lora_path" if METHODS[name] == "lora" else "--adapter_path", f"runs/{name}"]


def predictions(folder: Path) -> list[str]:
    (path,) = folder.glob("predict_results_*.tsv")
    return path.read_text().splitlines()


def assert_same_scores(got: Path, name: str) -> None:
    """Metrics to 1e-5 and predictions as the earlier version's run has them in its folder."""
    want = Path("runs", name)
    assert scores(got / "eval_results.json") == pytest.approx(scores(want / "eval_results.json"), rel=1e-5)
    assert predictions(got) == predictions(want) and len(predictions(got)) == 11


def module(name: str, *argv: object) -> str:
    """What `python -m NAME ARGV` prints, run in this process."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [name, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert not exit.value.code, out.getvalue()
    return out.getvalue()


def test_there_is_a_run_of_every_method_with_both_models():
    assert {*METHODS.values()} == {"lora", "bitfit", "houlsby", "pfeiffer", "head", "full"}
    assert {name.partition("_")[0] for name in COMMANDS} == {"roberta", "deberta"}
    assert UNFINISHED == ["deberta_lora", "roberta_full", "roberta_lora"]
    assert sorted(COMMANDS) == sorted(path.name for path in (FILES / "runs").iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_folder_evaluates_and_predicts_as_it_did(name, evaluate):
    assert_same_scores(evaluate(name, *source(name)), name)


@pytest.mark.parametrize(
    "name, flags",
    [
        ("roberta_lora", ["--lora_path", "converted/roberta_lora.bin", "--lora_alpha", 8]),
        ("deberta_lora", ["--lora_path", "converted/deberta_lora.bin", "--lora_alpha", 8]),
        ("roberta_lora", ["--model_name_or_path", "converted/roberta_lora_merged"]),
        ("deberta_lora", ["--model_name_or_path", "converted/deberta_lora_merged"]),
        ("roberta_houlsby", ["--adapter_path", "converted/roberta_houlsby_peft"]),
        ("roberta_lora", ["--lora_path", "runs/roberta_lora/checkpoint-30"]),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[1]),
)
def test_a_converted_adapter_a_merged_model_and_a_checkpoint_evaluate_to_the_same(name, flags, evaluate):
    assert_same_scores(evaluate(name, *base(name), *flags), name)


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_run_is_resumed_by_the_same_command_to_the_numbers_it_would_have_had(name, call, tmp_path):
    folder = Path("unfinished", name)
    outcome = succeeded(call(*COMMANDS[name], "--output_dir", folder, "--cache_dir", tmp_path / "cache", base=False))
    assert f"Resuming from {folder}/checkpoint-20" in outcome.out
    histories = [read(path / "trainer_state.json")["log_history"] for path in (folder, Path("runs", name))]
    for key, count in (("loss", 15), ("grad_norm", 15), ("eval_loss", 3)):
        got, want = ([entry[key] for entry in history if key in entry] for history in histories)
        assert len(want) == count and got == pytest.approx(want, rel=1e-5), key
    assert_same_scores(folder, name)
    if METHODS[name] == "lora":  # of a full model the key's bias has no gradient but rounding, which Adam takes for one
        got, want = (load_file(path / "adapter_model.safetensors") for path in (folder, Path("runs", name)))
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert (got[key] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), key


@pytest.mark.parametrize("name", ["roberta_lora", "roberta_full", "deberta_pfeiffer"])
def test_a_finished_run_is_not_trained_again_by_the_same_command(name, call, tmp_path):
    before = {path: path.read_bytes() for path in Path("runs", name).rglob("*.safetensors")}
    outcome = succeeded(call(*COMMANDS[name], "--cache_dir", tmp_path / "cache", base=False))
    assert f"runs/{name}: already trained" in outcome.out
    assert {path: path.read_bytes() for path in Path("runs", name).rglob("*.safetensors")} == before
    want = scores(FILES / "runs" / name / "eval_results.json")
    assert scores(Path("runs", name, "eval_results.json")) == pytest.approx(want, rel=1e-5)


def test_a_run_with_other_flags_than_the_earlier_one_is_refused(call, tmp_path):
    """Every setting that decides is still compared with what the earlier version recorded of it."""
    changed = ["--learning_rate", "1e-3", "--cache_dir", tmp_path / "cache"]
    for folder in ("runs", "unfinished"):
        outcome: Outcome = call(
            *COMMANDS["roberta_lora"], *changed, "--output_dir", f"{folder}/roberta_lora", base=False
        )
        assert outcome.code == 1 and "learning_rate 0.005, now 0.001" in outcome.err


def test_training_starts_from_an_earlier_adapter(call, tmp_path):
    """Its first loss is below the earlier run's, which starts from nothing."""
    flags = [*COMMANDS["roberta_lora"], "--lora_path", "runs/roberta_lora", "--cache_dir", tmp_path / "cache"]
    succeeded(call(*flags, "--output_dir", tmp_path / "o", base=False))
    first = [
        read(path / "trainer_state.json")["log_history"][0]["loss"]
        for path in (tmp_path / "o", Path("runs", "roberta_lora"))
    ]
    assert first[0] < first[1]
    assert read(tmp_path / "o" / "run.json")["started_from"] == "runs/roberta_lora"


def test_the_report_on_the_earlier_runs_is_the_earlier_report(tmp_path):
    module("lora_nlu.report", "runs", "--out", tmp_path / "report")
    assert (tmp_path / "report" / "report.csv").read_text() == Path("report", "report.csv").read_text()


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_earlier_adapter_is_inspected_and_converted(name, tmp_path):
    table = dict(
        re.findall(r"^  (\S.*?)  +(\S.*)$", module("lora_nlu.adapters", "inspect", f"runs/{name}"), re.MULTILINE)
    )
    run = read(Path("runs", name, "run.json"))
    assert table["method"] == METHODS[name] and table["base fingerprint"] == run["base_fingerprint"]
    assert (
        table["labels"] == ", ".join(run["labels"]) and table.get("rank", "4") == "4" and table.get("alpha", "8") == "8"
    )
    module("lora_nlu.adapters", "convert", f"runs/{name}", tmp_path / "peft", "--to", "peft")
    got, want = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "peft", Path("runs", name)))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ["roberta_lora", "deberta_lora"])
def test_an_earlier_adapter_converts_to_what_it_converted_to(name, tmp_path):
    module("lora_nlu.adapters", "convert", f"runs/{name}", tmp_path / "published.bin", "--to", "bin")
    got, want = (torch.load(path, weights_only=True) for path in (tmp_path / "published.bin", f"converted/{name}.bin"))
    assert [*got] == [*want] and all(torch.equal(got[key], want[key]) for key in want)
    module("lora_nlu.adapters", "convert", f"runs/{name}", tmp_path / "merged", "--to", "merged")
    got, want = (
        load_file(path / "model.safetensors") for path in (tmp_path / "merged", Path("converted", f"{name}_merged"))
    )
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-6, atol=1e-7)
    configs = [read(folder / "config.json") for folder in (tmp_path / "merged", Path("converted", f"{name}_merged"))]
    assert all(config.pop("transformers_version") for config in configs) and configs[0] == configs[1]
