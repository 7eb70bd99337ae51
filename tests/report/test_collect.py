"""What is one line of a table, which line of the paper belongs to it, what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    BITFIT,
    FULL,
    HEAD,
    HEADINGS,
    HOULSBY,
    LORA,
    PFEIFFER,
    names,
    notes_of,
    read,
    refusal,
    rows_of,
    values,
    write,
    write_run,
    write_seeds,
)

from lora_nlu.report.collect import collect

# roberta-large's two lines for LoRA in the paper's table 2, and both averages as printed there
LARGE = {
    "from MNLI": ["90.6 ± 0.2", "96.2 ± 0.5", "90.9 ± 1.2", "68.2 ± 1.9", "94.9 ± 0.3", "91.6 ± 0.1", "87.4 ± 2.5",
                  "92.6 ± 0.2", "89.0"],
    "not": ["90.6 ± 0.2", "96.2 ± 0.5", "90.2 ± 1.0", "68.2 ± 1.9", "94.8 ± 0.3", "91.6 ± 0.2", "85.2 ± 1.1",
            "92.3 ± 0.5", "88.6"],
}  # fmt: skip


SAME = [
    ("roberta-base", {"method": LORA}, "63.4 ± 1.2"),
    ("roberta-base", {"method": BITFIT}, "62.0"),
    ("roberta-base", {"method": FULL}, "63.6"),
    ("roberta-large", {"method": LORA}, "68.2 ± 1.9"),
    ("roberta-large", {"method": FULL}, "68.0"),
    ("roberta-large", {"method": HOULSBY}, "66.3 ± 2.0"),
    ("roberta-large", {"method": HOULSBY | {"adapter_size": 64}}, "66.5 ± 4.4"),
    ("roberta-large", {"method": PFEIFFER}, "68.3 ± 1.0"),
    ("roberta-large", {"method": PFEIFFER | {"adapter_size": 16}}, "67.8 ± 2.5"),
    ("deberta-v2-xxlarge", {"method": LORA, "rank": 16}, "72.4 ± 1.1"),
    ("deberta-v2-xxlarge", {"method": FULL}, "72.0"),
]
OTHER = [
    ("roberta-base", {"rank": 4}),
    ("deberta-v2-xxlarge", {"rank": 8}),
    ("deberta-v2-xxlarge", {"rank": 16, "relative": True}),
    ("roberta-base", {"method": LORA | {"targets": ["query"]}}),
    ("roberta-base", {"method": LORA | {"layers": [0, 1]}}),
    ("roberta-base", {"method": LORA | {"lora_dropout": 0.1}}),
    ("roberta-base", {"method": LORA | {"biases": True}}),
    ("roberta-base", {"reg_loss_wgt": 1.0}),
    ("deberta-v2-xxlarge", {"rank": 16, "reg_loss_wgt": 1.0, "masking_prob": 0.1}),
    ("deberta-v2-xxlarge", {"method": FULL, "reg_loss_wgt": 0.5}),
    ("roberta-base", {"start": "output/roberta_base_mnli"}),
    ("roberta-large", {"start": "output/roberta_large_mnli"}),
    ("roberta-base", {"method": HEAD}),
    ("roberta-base", {"method": HOULSBY}),
    ("roberta-large", {"method": BITFIT}),
    ("roberta-large", {"method": PFEIFFER | {"adapter_size": 8}}),
    ("encoder", {}),
    ("deberta-v2-xlarge", {"rank": 16}),
]


@pytest.mark.parametrize(("model", "settings", "figure"), SAME)
def test_the_papers_line_stands_under_a_method_with_its_settings(tmp_path, model, settings, figure):
    write_run(tmp_path / "a", model=model, **settings)
    *_, line = rows_of(read(tmp_path))
    assert line[2:4] == ["paper", figure]


@pytest.mark.parametrize(("model", "settings"), OTHER)
def test_other_settings_than_the_papers_have_no_line_of_it(tmp_path, model, settings):
    write_run(tmp_path / "a", model=model, **settings)
    assert [row[2] for row in rows_of(read(tmp_path))[1:]] == ["best epoch", "last"]


@pytest.mark.parametrize(("task", "figure"), [("mrpc", "89.7 ± 0.7"), ("rte", "86.6 ± 0.7"), ("stsb", "91.5 ± 0.2")])
def test_where_the_papers_lora_starts_from_mnlis_adapter_runs_that_do_not_have_no_figure_of_it(tmp_path, task, figure):
    write_run(tmp_path / "base" / "from", task, start="mnli/adapter_model.safetensors")
    assert values(read(tmp_path), "LoRA r=8", "paper")[HEADINGS[task]] == figure
    write_run(tmp_path / "not", task, model="other-base")
    write_run(tmp_path / "not_either", task, 1)
    text = read(tmp_path / "not", tmp_path / "not_either")
    assert "| paper" not in text


@pytest.mark.parametrize("starts", LARGE)
def test_of_roberta_larges_two_lora_lines_the_one_with_the_same_start_is_shown_complete(tmp_path, starts):
    for task in HEADINGS:
        start = "mnli.bin" if starts == "from MNLI" and task in ("mrpc", "rte", "stsb") else None
        write_run(tmp_path / task, task, model="roberta-large", start=start, encoder=786_432)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    assert [line[heading] for heading in (*HEADINGS.values(), "average")] == LARGE[starts]
    assert line["trainable"] == "0.8M"


def test_starts_of_both_kinds_have_their_own_figures_and_no_average_of_the_papers(tmp_path):
    for task, start in (("qnli", None), ("mrpc", "mnli.bin"), ("rte", None)):
        write_run(tmp_path / task, task, model="roberta-large", start=start)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    figures = [line[HEADINGS[task]] for task in ("mrpc", "qnli", "rte")]
    assert figures == ["90.9 ± 1.2", "94.9 ± 0.3", "85.2 ± 1.1"] and line["average"] == "-"


def test_a_task_that_is_not_in_the_paper_gets_no_figure_and_the_papers_line_no_average(tmp_path):
    for task in ("wnli", "cola"):
        write_run(tmp_path / task, task)
    line = values(read(tmp_path), "LoRA r=8", "paper")
    assert (line["CoLA Matthews"], line["WNLI accuracy"], line["average"]) == ("63.4 ± 1.2", "-", "-")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "LoRA r=8"),
        ({"rank": 4}, "LoRA r=4"),
        ({"method": LORA | {"targets": ["query", "key", "value", "dense"]}}, "LoRA r=8 on query, key, value, dense"),
        ({"method": LORA | {"layers": [10, 11], "lora_dropout": 0.05}}, "LoRA r=8 layers 10, 11 dropout 0.05"),
        ({"method": LORA | {"biases": True}}, "LoRA r=8 and biases"),
        ({"relative": True}, "LoRA r=8 and relative query"),
        ({"relative": "key"}, "LoRA r=8 and relative key"),
        ({"loraplus_lr_ratio": 16.0}, "LoRA r=8 with LoRA+ 16"),
        ({"reg_loss_wgt": 0.5}, "LoRA r=8 R-Drop 0.5"),
        ({"class_weights": [0.55555, 5.0]}, "LoRA r=8 class weights 0.556/5"),
        ({"reg_loss_wgt": 1.0, "masking_prob": 0.1}, "LoRA r=8 cutoff 1"),
        ({"method": HOULSBY}, "Houlsby 8"),
        ({"method": PFEIFFER}, "Pfeiffer 64"),
        ({"method": PFEIFFER | {"biases": True}}, "Pfeiffer 64 and biases"),
        ({"method": BITFIT}, "BitFit"),
        ({"method": HEAD}, "head alone"),
        ({"method": FULL}, "fine-tuning"),
        ({"method": {"name": "new", "label": "New Method"}}, "New Method"),
        ({"method": {"name": "new"}}, "new"),
    ],
)
def test_a_method_is_named_with_all_that_makes_it_another(tmp_path, settings, name):
    write_run(tmp_path / "a", **settings)
    assert names(tmp_path) == [name]


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    for seed in (3, 1, 2):
        write_run(tmp_path / str(seed), seed=seed, data_seed=seed)
    (cell,), absent = collect([tmp_path])
    assert [run.seed for run in cell.done] == [1, 2, 3] and not absent


def test_runs_that_start_from_the_adapters_of_different_seeds_are_one_row(tmp_path):
    write_seeds(tmp_path, "rte", (0.7,), start="mnli/seed_0/adapter_model.safetensors")
    write_run(tmp_path / "other", "rte", 1, start="mnli/seed_1/adapter_model.safetensors")
    assert names(tmp_path) == ["LoRA r=8"]


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        ({"learning_rate": 1e-4}, {"learning_rate": 4e-4}, ["learning_rate 0.0001", "learning_rate 0.0004"]),
        ({"scaling": 1.0}, {"scaling": 0.25}, ["scaling 0.25", "scaling 1"]),
        ({"lr": 1, "fp16": True}, {"lr": 2, "fp16": False}, ["lr 1, fp16 True", "lr 2, fp16 False"]),
        ({"bf16": True}, {}, ["bf16 True", "bf16 not recorded"]),
        ({"head_learning_rate": 1e-3}, {}, ["head_learning_rate 0.001", "head_learning_rate None"]),
        ({"start": "mnli.bin"}, {}, ["started from an adapter", "started from the base model"]),
    ],
)  # fmt: skip
def test_runs_that_differ_in_a_setting_are_rows_that_name_it(tmp_path, one, other, rows):
    write_run(tmp_path / "a", "rte", 0, (0.5, 0.6), **one)
    write_run(tmp_path / "b", "rte", 0, (0.7, 0.8), **other)
    write_run(tmp_path / "c", "cola", 0)
    assert sorted(names(tmp_path)) == ["LoRA r=8", *(f"LoRA r=8 ({row})" for row in rows)]
    figures = sorted(values(read(tmp_path), f"LoRA r=8 ({row})")["RTE accuracy"] for row in rows)
    assert figures == ["60.0", "80.0"]


def test_another_base_model_of_the_same_name_has_a_table_of_its_own(tmp_path):
    for place, base in (("a", "0123456789abcdef"), ("b", "fedcba9876543210")):
        write_run(tmp_path / place / "cola", "cola", 0, base=base)
        write_run(tmp_path / place / "rte", "rte", 0, base=base)
    titles = [line for line in read(tmp_path).splitlines() if line.startswith("## ")]
    assert titles == ["## roberta-base@01234567, 1 seed", "## roberta-base@fedcba98, 1 seed"]
    assert read(tmp_path / "a").startswith("## roberta-base, 1 seed\n")


def test_every_model_has_its_table_with_its_own_tasks_and_seeds(tmp_path):
    write_seeds(tmp_path / "a", "cola", (0.5, 0.6), model="roberta-large")
    write_seeds(tmp_path / "b", "rte", (0.7,), model="roberta-base")
    text = read(tmp_path)
    assert [line for line in text.splitlines() if line[:2] == "##"] == [
        "## roberta-base, 1 seed",
        "## roberta-large, 2 seeds",
    ]
    assert [row[3] for row in rows_of(text) if row[0] == "method"] == ["RTE accuracy", "CoLA Matthews"]
    assert not notes_of(text)


def test_the_same_seed_twice_is_refused_naming_both_folders(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name, seed=7)
    two = f"{tmp_path}/one and {tmp_path}/two"
    assert refusal(tmp_path) == f"{two} are the same run with the same seed. Name only one of them."


def test_a_folder_given_twice_or_by_a_link_counts_once(tmp_path):
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    (cell,), _ = collect([tmp_path / "runs", tmp_path / "runs" / "a", tmp_path / "link"])
    assert len(cell.runs) == 1


@pytest.mark.parametrize(
    ("state", "progress"),
    [
        ("stopped", "its last checkpoint at epoch 2.5 of 10"),
        ("begun", "no checkpoint yet"),
        ("unevaluated", "trained, not evaluated"),
    ],
)
def test_a_run_without_a_result_is_called_unfinished_and_says_how_far_it_got(tmp_path, state, progress):
    write_run(tmp_path / "a", state=state)
    write_run(tmp_path / "b", "rte")
    text = read(tmp_path)
    for which in ("best epoch", "last"):
        line = values(text, "LoRA r=8", which)
        assert (line["CoLA Matthews"], line["average"]) == ("unfinished", "-")
    assert f"unfinished: {tmp_path}/a, {progress}" in notes_of(text)


def test_a_checkpoint_half_written_and_files_of_ones_own_are_not_progress(tmp_path):
    write_run(tmp_path / "a", state="stopped")
    write(tmp_path / "a" / "checkpoint-9000.saving" / "trainer_state.json", {"epoch": 9.9})
    write(tmp_path / "a" / "checkpoint-best" / "trainer_state.json", {"epoch": 9.9})
    (tmp_path / "a" / "checkpoint-9001").mkdir()
    assert "epoch 2.5 of 10" in notes_of(read(tmp_path))[0]


def test_no_average_includes_a_method_that_lacks_a_seed_or_a_task(tmp_path):
    for method in (LORA, BITFIT, HEAD):
        for task in ("cola", "rte"):
            write_seeds(tmp_path / method["name"], task, (0.5, 0.6), method=method)
    text = read(tmp_path)
    assert {values(text, name)["average"] for name in names(tmp_path)} == {"55.0"}
    write(tmp_path / "bitfit" / "rte_1" / "run.json", {})
    for path in (tmp_path / "head").glob("rte_*/run.json"):
        path.unlink()
    text = read(tmp_path)
    assert [values(text, name)["average"] for name in ("LoRA r=8", "BitFit", "head alone")] == ["55.0", "-", "-"]
    assert [values(text, name)["RTE accuracy"] for name in ("BitFit", "head alone")] == ["50.0 (1 of 2)", "-"]
    assert values(text, "head alone")["training"] == "0:01:40 (1 of 2 tasks)"
    assert notes_of(text) == ["missing, seed 1: BitFit on RTE (roberta-base)"]


def test_seeds_that_some_runs_have_and_others_lack_are_listed_together(tmp_path):
    write_seeds(tmp_path / "a", "cola", (0.5, 0.6, 0.7))
    write_seeds(tmp_path / "b", "rte", (0.5,), start="mnli")
    write_seeds(tmp_path / "c", "rte", (0.5,), method=BITFIT)
    write_run(tmp_path / "d", "cola", 1, state="begun", method=BITFIT)
    lines = notes_of(read(tmp_path))
    where = "LoRA r=8 on RTE (roberta-base); BitFit on RTE (roberta-base)"
    assert f"missing, seeds 1, 2: {where}" in lines and "missing, seeds 0, 2: BitFit on CoLA (roberta-base)" in lines


def test_arguments_that_are_no_folders_or_contain_no_training_run_are_listed(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "evaluated", state="begun", train_samples=0)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    text = read(tmp_path / "a", *(tmp_path / name for name in ("gone", "empty", "evaluated", "file")))
    assert notes_of(text) == [
        f"missing: {tmp_path}/gone",
        f"missing: {tmp_path}/empty, no training run in it",
        f"missing: {tmp_path}/evaluated, no training run in it",
        f"missing: {tmp_path}/file, no training run in it",
    ]


def test_evaluations_beside_training_runs_are_left_out(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "evaluated", train_samples=0, state="begun")
    write(tmp_path / "evaluated" / "eval_results.json", {"eval_matthews_correlation": 0.9})
    assert len(rows_of(read(tmp_path))) == 4 and not notes_of(read(tmp_path))


def test_runs_on_files_of_ones_own_are_left_out_and_listed(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "own", "custom")
    assert notes_of(read(tmp_path)) == [f"left out, not a GLUE task: {tmp_path}/own"]
    assert "no training run on a GLUE task" in refusal(tmp_path / "own")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


THIS_MODELS = {"weights_fingerprint": "ab", "eval_samples": 9, "eval_set_samples": 9, "eval_data": "cd"}


@pytest.mark.parametrize(
    "results, reason",
    [
        ({"weights_fingerprint": "ac"}, "of another model"),
        ({"eval_samples": 8}, "on 8 of 9 examples"),
        ({"eval_samples": 8, "eval_set_samples": None}, "on 8 of more examples"),
        ({"eval_samples_mm": 5, "eval_set_samples_mm": 9}, "on 5 of 9 examples"),
    ],
)
def test_an_evaluation_of_another_model_or_of_a_part_of_the_set_is_left_out_and_named(tmp_path, results, reason):
    for seed in (0, 1):
        folder = write_run(tmp_path / str(seed), seed=seed)
        change(folder / "run.json", weights_fingerprint="ab")
        change(folder / "eval_results.json", **THIS_MODELS | (results if seed else {}))
    (cell,), notes = collect([tmp_path])
    assert notes == [f"left out: {tmp_path}/1, eval_results.json: {reason}"]
    assert [run.seed for run in cell.done] == [0]
    assert [(run.seed, run.progress) for run in cell.unfinished] == [(1, "trained, not evaluated")]


def test_evaluations_of_a_part_while_training_are_no_best_epoch_and_other_examples_are_named(tmp_path):
    for seed in (0, 1):
        folder = write_run(tmp_path / str(seed), seed=seed, figures=(0.9, 0.6, 0.5))
        change(folder / "eval_results.json", **THIS_MODELS | {"eval_data": f"c{seed}"})
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for entry, samples in zip(log[1:], (8, 9, 9), strict=True):
            entry["eval_samples"] = samples
        change(folder / "trainer_state.json", log_history=log)
    (cell,), notes = collect([tmp_path])
    assert [(run.best, run.last) for run in cell.done] == [(60.0, 50.0)] * 2
    assert notes == [f"in one line, but evaluated on different examples: {tmp_path}/0, {tmp_path}/1"]
