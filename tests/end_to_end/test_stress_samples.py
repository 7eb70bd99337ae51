"""Samples of tests/stress/: each program runs a few of its cases and finds nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import program, write_models
from safetensors.torch import save_file

from lora_nlu.files import ADAPTER_WEIGHTS

STRESS = Path(__file__).parents[1] / "stress"
sys.path.insert(0, str(STRESS))
import compare  # noqa: E402
import distributed_methods  # noqa: E402
import same_results  # noqa: E402


def stress(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, STRESS / script, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)


STRUCK = {
    "a finished checkpoint gets its name": "train, kill .* rename output/.*checkpoint-3 output/checkpoint-3$",
    "an old checkpoint is removed": "train, kill .* unlink(at)? output/.*optimizer.pt",
    "the trained model is there, and not yet its record": "train, kill .* write output/.*all_results.json",
    "the disk is full in a checkpoint and stays full": "train, stays .* output/.*checkpoint-4/optimizer.pt",
    "the disk is full in the results": "train, full .* write output/.*train_results.json",
    "the disk is full in the cache of tokens": "train, full .* write cache/lora_nlu/",
}


def test_a_run_killed_or_out_of_disk_space_at_a_call_ends_by_the_same_command_with_the_bits_of_one_left_alone():
    done = stress("every_call.py", "--commands", "train", "--only", *STRUCK.values())
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith(f"{len(STRUCK)} calls struck, 0 missed"), done.stdout


def test_two_commands_of_run_seeds_over_one_folder_leave_what_one_leaves_and_start_no_run_twice():
    done = stress("at_once.py", "--schedulers", 2, "--rounds", 2)
    assert done.returncode == 0 and re.search("2 rounds of 2 at once, .* 0 failures", done.stdout), done.stdout


def test_random_models_batches_and_masks_have_transformers_outputs_and_gradients():
    worst, failures, judged = compare.compare_cases(0, range(60))
    assert not failures and judged <= 1
    drawn = [compare.drawn(0, number) for number in range(60)]
    assert {case["mask"] for case in drawn} == {*compare.MASKS} and all(number >= 0 for _, number in worst.values())


@pytest.fixture(scope="module")
def fuzzed() -> dict[str, dict[str, int]]:
    """Outcomes of 2,100 damaged files by format."""
    done = stress("fuzz.py", "--mutations", 2100)
    reports = re.findall(r"^([a-z_. ]+): (\d+) mutations: (.*); \d+ s$", done.stdout, re.MULTILINE)
    outcomes = {
        kind: {name: int(count) for name, count in re.findall(r"([^,]+?) (\d+)(?:, |$)", counts)}
        for kind, _, counts in reports
    }
    assert {kind: sum(counts.values()) for kind, counts in outcomes.items()} == {kind: int(n) for kind, n, _ in reports}
    assert len(outcomes) == 7 and sum(int(n) for _, n, _ in reports) == 2100, done.stdout + done.stderr[-3000:]
    return outcomes


@pytest.mark.parametrize(
    "kind", ["zip", "repacked zip", "legacy", "safetensors", "run", "adapter_config.json", "run_metadata.json"]
)
def test_a_damaged_adapter_file_is_refused_or_read_and_values_change_only_where_there_is_no_checksum(kind, fuzzed):
    fine = {"refused", "same"} | ({"changed"} if kind in ("repacked zip", "legacy", "safetensors") else set())
    assert {name: n for name, n in fuzzed[kind].items() if name not in fine} == {}
    assert fuzzed[kind]["refused"] > 150 and fuzzed[kind]["same"] > 0


def test_a_case_recorded_twice_is_equal_and_with_another_seed_its_losses_and_weights_differ(fork, tmp_path):
    """The record of the other seed as a user makes it; of the equal ones the part that trains, in forked processes."""
    one, again, other = (tmp_path / f"{name}.json" for name in ("one", "again", "other"))
    done = stress("same_results.py", "record", other, "--seed", 1, "--cases", "^roberta houlsby, cutoff$")
    assert done.returncode == 0 and "2 cases" in done.stdout, done.stdout + done.stderr[-3000:]
    for record in (one, again):
        folder = tmp_path / record.stem
        folder.mkdir()
        there = program(folder, f"os.chdir({str(folder)!r})", STRESS / "same_results.py")
        arguments = json.dumps([str(STRESS.parents[1]), "roberta", ["roberta houlsby, cutoff"], 0])
        outcome = fork("run", arguments, base=False, script=there)
        assert outcome.code == 0, outcome
        cases = json.loads((folder / "record.json").read_text())
        record.write_text(json.dumps(json.loads(other.read_text()) | {"seed": 0, "cases": cases}))
    done = stress("same_results.py", "compare", one, again)
    assert done.returncode == 0 and "0 differences" in done.stdout, done.stdout
    done = stress("same_results.py", "compare", one, other)
    files = "DIFFERS: roberta houlsby, cutoff/files/trained"
    for differs in (
        "adapter_model.safetensors: ",
        "checkpoint-10/optimizer.pt: ",
        "trainer_state.json/log_history/0/loss",
    ):
        assert f"{files}/{differs}" in done.stdout
    assert done.returncode == 1


def test_a_file_a_value_or_a_case_that_one_record_lacks_is_a_difference_and_a_new_value_is_a_note():
    files = {"weights": "0f", "run.json": {"seed": 0, "steps": [0.1, 0.2]}}
    record = {"seed": 0, "environment": {}, "cases": {"a": {"exit codes": [0], "files": files}}}

    def compared(**changed: Any) -> tuple[int, int]:
        other = {"exit codes": [0], "files": {name: x for name, x in (files | changed).items() if x is not None}}
        differences, new = same_results.compare(record, record | {"cases": {"a": other}})
        return len(differences), len(new)

    assert compared() == (0, 0)
    assert compared(weights="10") == compared(weights=None) == compared(more="0f") == (1, 0)
    assert compared(**{"run.json": {"seed": 0, "steps": [0.1, 0.2], "colour": "red"}}) == (0, 1)
    assert compared(**{"run.json": {"seed": 0}}) == compared(**{"run.json": {"seed": 0, "steps": [0.1]}}) == (1, 0)
    assert len(same_results.compare(record, record | {"cases": {}})[0]) == 1


def test_a_method_trains_in_two_processes_with_sharded_weights_what_it_trains_in_one(call, fork, glue, tmp_path):
    """A case of distributed_methods.py by its flags and its comparison; it starts them by torchrun."""
    base = write_models(tmp_path / "models", glue, **distributed_methods.NO_DROPOUT)["roberta"]
    flags = ["--model_name_or_path", base, *distributed_methods.FLAGS, *distributed_methods.METHODS["pfeiffer"]]
    flags += ["--glue_dir", glue, "--cache_dir", tmp_path / "cache", "--output_dir"]
    size, sharded = "--per_device_train_batch_size", distributed_methods.BACKENDS["FSDP2"]
    assert call(*flags, tmp_path / "one", size, 8).code == 0
    outcome = fork(*flags, tmp_path / "two", size, 4, *sharded, processes=2)
    assert outcome.code == 0, outcome
    found, largest = distributed_methods.differences(tmp_path / "one", tmp_path / "two")
    assert found == [] and largest > 0


def test_runs_whose_losses_weights_or_predictions_differ_are_not_taken_for_equal(tmp_path):
    def write(folder: Path, loss: float = 0.5, weight: float = 2.0, answer: str = "yes", steps: int = 2) -> Path:
        folder.mkdir(parents=True)
        log = [{"loss": loss, "grad_norm": 1.0}] * steps
        scores = {"eval_loss": 0.7, "eval_accuracy": 0.5, "eval_samples": 21}
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (folder / "eval_results.json").write_text(json.dumps(scores))
        (folder / "predict_results_rte.tsv").write_text(answer)
        save_file({"a": torch.tensor([weight, 1.0])}, folder / ADAPTER_WEIGHTS)
        return folder

    one = write(tmp_path / "one")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"loss": 0.500001, "weight": 2.000001}, []),
        ({"loss": 0.50001}, ["loss"]),
        ({"weight": 2.0001}, ["a"]),
        ({"answer": "no"}, ["other predictions"]),
        ({"steps": 1}, ["loss", "grad_norm"]),
    ]
    for number, (changed, differs) in enumerate(cases):
        found, _ = distributed_methods.differences(one, write(tmp_path / str(number), **changed))
        assert [line.partition(":")[0] for line in found] == differs
